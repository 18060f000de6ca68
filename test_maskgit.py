"""Every test, in the order of the code: maskgit.py, then the scripts, then the README.

    python -m pytest test_maskgit.py

Expected values are worked out here in another way: by hand, by loops, by enumeration. No test needs a network, a
GPU (those that use one skip themselves) or data from elsewhere.
"""

import argparse
import csv
import hashlib
import itertools
import json
import math
import os
import platform
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fid
import inpaint
import maskgit
import train_rectangles
import train_squares
from maskgit import (
    SCHEDULES,
    Attention,
    Block,
    MaskGIT,
    PatchTokenizer,
    decode,
    grid_coords,
    image_grid,
    learning_rate_factor,
    line_plot,
    load_checkpoint,
    masked_cross_entropy,
    pick_device,
    position_encoding,
    random_mask,
    rotary_angles,
    save_checkpoint,
    save_gif,
    seed_everything,
    train,
    training_mask,
    turn,
)

HERE = Path(__file__).resolve().parent


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny_model(seed=0, codes=5, **options):
    torch.manual_seed(seed)
    settings = {"dim": 16, "heads": 2, "layers": 2, "dropout": 0.0} | options
    return MaskGIT(codes, **settings).eval()


# ---------------------------------------------------------------------------------------------------
# Tokens


def blobs(seed=0, count=200, size=3):
    """Points around four far corners, in random order."""
    rng = np.random.default_rng(seed)
    corners = np.array([[0, 0, 9], [0, 9, 0], [9, 0, 0], [9, 9, 9]])[:, :size]
    return (corners[rng.integers(4, size=count)] + rng.normal(0, 0.1, (count, size))).astype(np.float32)


def brute_force_lloyd(points, centroids, iterations):
    """Lloyd's iterations one point at a time, in float64."""
    points, centroids = points.astype(np.float64), centroids.astype(np.float64)
    for iteration in range(iterations + 1):
        distances = np.array([[sum((x - c) ** 2) for c in centroids] for x in points])
        labels = distances.argmin(axis=1)
        if iteration < iterations:
            centroids = np.array([points[labels == k].mean(axis=0) for k in range(len(centroids))])
    return centroids, labels, distances.min(axis=1).sum()


def test_kmeans_finds_clusters_that_lie_apart():
    points = blobs()
    result = maskgit.kmeans(points, 4, seed=0, restarts=5)
    corners = np.array(sorted(np.rint(result.centroids).astype(int).tolist()))
    assert corners.tolist() == [[0, 0, 9], [0, 9, 0], [9, 0, 0], [9, 9, 9]]
    assert result.centroids.dtype == np.float32 and result.labels.dtype == np.int64
    for k, centroid in enumerate(result.centroids):
        np.testing.assert_allclose(centroid, points[result.labels == k].mean(axis=0), atol=1e-5)


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_kmeans_equals_brute_force_from_the_same_start(iterations):
    points = np.random.default_rng(1).normal(size=(150, 5)).astype(np.float32) + 30
    centroids, labels, inertia = brute_force_lloyd(points, points[:7], iterations)
    result = maskgit.kmeans(points, 7, init=points[:7], max_iter=iterations, tol=0)
    np.testing.assert_allclose(result.centroids, centroids, atol=1e-4)
    assert (result.labels == labels).all()
    assert result.inertia == pytest.approx(inertia, rel=1e-4)
    assert result.iterations == iterations


def test_kmeans_inertia_never_rises_and_tol_ends_it():
    points = np.random.default_rng(2).random((3000, 8)).astype(np.float32)
    runs = [maskgit.kmeans(points, 20, init=points[:20], max_iter=i, tol=0) for i in range(1, 15)]
    assert all(after.inertia <= before.inertia * (1 + 1e-6) for before, after in itertools.pairwise(runs))
    converged = maskgit.kmeans(points, 20, init=points[:20], max_iter=500, tol=0)
    assert 1 < converged.iterations < 500
    assert maskgit.kmeans(points, 20, init=points[:20], tol=0.1).iterations < converged.iterations


def test_kmeans_fills_empty_clusters():
    points = blobs()
    far_away = np.full((2, 3), 1000, dtype=np.float32)  # no point is near these two
    result = maskgit.kmeans(points, 4, init=np.concatenate([points[:2], far_away]), max_iter=50)
    assert (np.bincount(result.labels, minlength=4) > 0).all()
    assert np.abs(result.centroids).max() < 20


def test_kmeans_repeats_with_its_seed_and_keeps_the_best_restart():
    points = np.random.default_rng(3).random((500, 4))
    once, again = (maskgit.kmeans(points, 12, seed=5, restarts=3) for _ in range(2))
    assert (once.centroids == again.centroids).all() and once.inertia == again.inertia
    assert not np.array_equal(once.centroids, maskgit.kmeans(points, 12, seed=6).centroids)
    rng = np.random.default_rng(5)
    single = [maskgit.lloyd(p, maskgit.plus_plus(p, 12, rng), 100, 1e-4) for p in [points.astype(np.float32)] * 3]
    assert once.inertia == min(run.inertia for run in single)


def test_plus_plus_draws_by_squared_distance():
    points = np.array([[0.0], [1.0], [3.0]], dtype=np.float32)
    rng, seconds = np.random.default_rng(0), []
    while len(seconds) < 2000:
        first, second = maskgit.plus_plus(points, 2, rng)[:, 0]
        if first == 0:
            seconds.append(second)
    assert np.mean(np.array(seconds) == 3) == pytest.approx(9 / 10, abs=0.03)


@pytest.mark.parametrize(
    ("points", "k", "message"),
    [
        (np.repeat(np.eye(3), 50, axis=0), 4, "only 3 of the 150 points are distinct"),
        (np.array([[0.0], [np.nan]]), 1, "finite"),
        (np.array([[0.0], [np.inf]]), 1, "finite"),
        (np.zeros(5), 1, "shape"),
        (np.zeros((5, 2)), 0, "at least 1"),
    ],
)
def test_kmeans_refuses_what_cannot_be_clustered(points, k, message):
    with pytest.raises(ValueError, match=message):
        maskgit.kmeans(points, k)


def test_kmeans_refuses_a_start_of_another_shape():
    with pytest.raises(ValueError, match=r"init has shape \(2, 3\)"):
        maskgit.kmeans(np.random.default_rng(0).random((9, 3)), 4, init=np.zeros((2, 3)))


def test_nearest_centroid_equals_brute_force_far_from_the_origin():
    rng = np.random.default_rng(4)
    points, centroids = (rng.random((n, 6)).astype(np.float32) + 100 for n in (2500, 30))
    distances = np.square(points[:, None].astype(np.float64) - centroids).sum(axis=-1)
    chosen = np.take_along_axis(distances, maskgit.nearest_centroid(points, centroids)[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(chosen, distances.min(axis=1), atol=1e-5)


@pytest.mark.parametrize(("patch", "stride", "channels"), [(2, 2, 1), (3, 3, 4), (2, 1, 3), (4, 2, 2)])
def test_tokens_bring_the_images_back_when_codes_suffice(patch, stride, channels):
    rng = np.random.default_rng(0)
    size = patch + 2 * stride
    images = rng.integers(0, 5, size=(6, size, size, channels)).astype(np.float32) / 4
    codes = len(np.unique(maskgit.image_patches(images, patch, stride).reshape(-1, patch * patch * channels), axis=0))
    tokenizer = PatchTokenizer.fit(images, codes, patch, stride, seed=1)
    tokens = tokenizer.encode(images)
    assert tokens.shape == (6, 3, 3) and tokens.dtype == np.int64
    np.testing.assert_allclose(tokenizer.decode(tokens), images, atol=1e-5)


def test_patches_are_flattened_row_by_row_and_stitched_by_hand():
    image = np.arange(25, dtype=np.float32).reshape(1, 5, 5, 1)
    patches = maskgit.image_patches(image, 3, 2)
    assert patches.shape == (1, 2, 2, 9)
    assert patches[0, 0, 1].tolist() == [2, 3, 4, 7, 8, 9, 12, 13, 14]
    # Four constant 3x3 patches, two pixels apart: where two overlap it is their mean, in the middle that of all.
    tokenizer = PatchTokenizer(np.repeat([[1.0], [2.0], [3.0], [4.0]], 9, axis=1), patch=3, stride=2)
    expected = [
        [1, 1, 1.5, 2, 2],
        [1, 1, 1.5, 2, 2],
        [2, 2, 2.5, 3, 3],
        [3, 3, 3.5, 4, 4],
        [3, 3, 3.5, 4, 4],
    ]
    assert tokenizer.decode(np.array([[[0, 1], [2, 3]]]))[0, :, :, 0].tolist() == expected


def test_encoding_many_images_equals_one_at_a_time():
    images = np.random.default_rng(0).random((7, 8, 12, 3)).astype(np.float32)
    tokenizer = PatchTokenizer.fit(images, 10, 4)
    expected = np.concatenate([tokenizer.encode(images[i : i + 1]) for i in range(7)])
    assert expected.shape == (7, 2, 3)
    assert (tokenizer.encode(images) == expected).all()
    large = np.tile(images, (4, 32, 20, 1))  # more than are encoded at once
    expected = np.concatenate([tokenizer.encode(large[i : i + 1]) for i in range(28)])
    assert (tokenizer.encode(large) == expected).all()


def test_tokenizer_refuses_images_that_do_not_fit():
    tokenizer = PatchTokenizer(np.zeros((2, 27)), patch=3)
    with pytest.raises(ValueError, match="1 channels"):
        tokenizer.encode(np.zeros((1, 9, 9, 1)))
    with pytest.raises(ValueError, match="10x9"):
        tokenizer.encode(np.zeros((1, 9, 10, 3)))
    with pytest.raises(ValueError, match="stride 4"):
        PatchTokenizer(np.zeros((2, 27)), patch=3, stride=4)


def test_tokenizer_travels_in_the_checkpoint(tmp_path):
    images = np.random.default_rng(0).random((4, 8, 8, 1)).astype(np.float32)
    tokenizer = PatchTokenizer.fit(images, 5, 4, stride=2)
    save_checkpoint(tmp_path / "model.pt", tiny_model(), tokenizer=tokenizer)
    loaded = load_checkpoint(tmp_path / "model.pt")["tokenizer"]
    assert (loaded.encode(images) == tokenizer.encode(images)).all()
    assert (loaded.patch, loaded.stride) == (4, 2)
    save_checkpoint(tmp_path / "model.pt", tiny_model())
    assert load_checkpoint(tmp_path / "model.pt")["tokenizer"] is None


# ---------------------------------------------------------------------------------------------------
# Positions


def test_grid_coords_are_x_then_y_row_by_row():
    assert grid_coords(2, 3).tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]


@pytest.mark.parametrize("layout", ["split", "printed"])
def test_position_encoding_equals_its_formula_dimension_by_dimension(layout):
    coords = torch.tensor([[0.0, 0.0], [3.0, 5.0], [-1.25, 7.5]])
    dim = 16
    encoded = position_encoding(coords, dim, layout)
    assert encoded.shape == (3, dim)
    for row, (x, y) in enumerate(coords.tolist()):
        for i in range(dim):
            value = x if i < dim // 2 else y
            if layout == "printed":
                frequency = 10000 ** (-i / dim)
            else:
                within = i % (dim // 2)
                frequency = 10000 ** (-(within - within % 2) / (dim // 2))
            expected = math.sin(value * frequency) if i % 2 == 0 else math.cos(value * frequency)
            assert encoded[row, i].item() == pytest.approx(expected, abs=1e-5)


def test_printed_layout_hardly_tells_rows_apart_and_split_does():
    rows = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    printed, split = (position_encoding(rows, 64, layout).diff(dim=0).abs().max() for layout in ("printed", "split"))
    assert printed < 0.011
    assert split > 0.8


def test_position_encoding_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="divisible by 4"):
        position_encoding(grid_coords(2, 2), 18)
    with pytest.raises(ValueError, match="split or printed"):
        position_encoding(grid_coords(2, 2), 16, "learned")


def test_rotary_angles_equal_their_formula():
    coords = torch.tensor([[2.0, -1.5], [0.25, 3.0]])
    angles = rotary_angles(coords, 12)  # three frequencies for each axis
    for row, (x, y) in enumerate(coords.tolist()):
        expected = [value * math.pi / 100 ** (i / 3) for value in (x, y) for i in range(3)]
        assert angles[row].tolist() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="divisible by 4, not 6"):
        rotary_angles(coords, 6)


# ---------------------------------------------------------------------------------------------------
# Transformer


def test_attention_equals_an_explicit_softmax():
    torch.manual_seed(0)
    attention, x = Attention(12, 3), torch.randn(2, 7, 12)
    weight, bias = attention.qkv.weight, attention.qkv.bias
    heads = []
    for h in range(3):
        rows = [slice(part * 12 + h * 4, part * 12 + h * 4 + 4) for part in range(3)]
        query, key, value = (x @ weight[r].T + bias[r] for r in rows)
        scores = torch.exp(query @ key.transpose(1, 2) / math.sqrt(4))
        heads.append(scores / scores.sum(dim=2, keepdim=True) @ value)
    expected = torch.cat(heads, dim=2) @ attention.out.weight.T + attention.out.bias
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-6)

    # In bf16, differentiated (on a CPU by another way) and not; gradients of the same sum.
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), weight)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(x)
        with torch.no_grad():
            torch.testing.assert_close(attention(x).float(), expected, rtol=0.05, atol=0.01)
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.01)
    (found_gradient,) = torch.autograd.grad(found.float().square().sum(), weight)
    torch.testing.assert_close(found_gradient, expected_gradient, rtol=0.1, atol=0.05)


def layer_norm(x, module):
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * module.weight + module.bias


def gelu_mlp(x, block):
    x = x @ block.mlp[0].weight.T + block.mlp[0].bias
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2))) @ block.mlp[2].weight.T + block.mlp[2].bias


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_block_is_the_written_formula(norm):
    torch.manual_seed(0)
    block, x = Block(8, 2, 24, 0.1, norm).eval(), torch.randn(2, 5, 8)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if norm == "post":
        y = layer_norm(x + block.attention(x), block.norm1)
        expected = layer_norm(y + gelu_mlp(y, block), block.norm2)
    else:
        y = x + block.attention(layer_norm(x, block.norm1))
        expected = y + gelu_mlp(layer_norm(y, block.norm2), block)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def test_dropout_follows_attention_and_mlp_in_training():
    block, x = Block(8, 2, 24, 0.5, "pre").train(), torch.randn(2, 5, 8)
    dropped = (block.dropout(torch.ones(1000)) == 0).float().mean()
    assert 0.4 < dropped < 0.6
    assert not torch.equal(block(x), block(x))


def test_rotary_attention_sees_differences_of_coordinates_alone():
    torch.manual_seed(0)
    attention, x = Attention(16, 2), torch.randn(1, 5, 16)
    coords = torch.rand(5, 2) * 6
    here, moved, mirrored = (
        attention(x, rotary_angles(at, 8)[None, None]) for at in (coords, coords + torch.tensor([3.0, -7.5]), -coords)
    )
    torch.testing.assert_close(here, moved, rtol=1e-4, atol=1e-5)
    assert (here - mirrored).abs().max() > 1e-3
    # The score of one pair by hand: both vectors turned as complex numbers.
    angles = rotary_angles(coords, 8)
    query, key = (torch.randn(8) for _ in range(2))
    turned = [torch.complex(v[:4], v[4:]) * torch.exp(1j * angles[i]) for v, i in ((query, 0), (key, 1))]
    expected = (turned[0] * turned[1].conj()).real.sum()
    found = (turn(query[None, None, None], angles[0]) * turn(key[None, None, None], angles[1])).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_rotary_model_takes_shared_and_own_coordinates():
    model = tiny_model(rotary=True)
    tokens, coords = torch.randint(0, 6, (3, 4), generator=seeded()), grid_coords(2, 2)
    shared = model(tokens, coords)
    torch.testing.assert_close(model(tokens, coords.expand(3, 4, 2)), shared)
    assert (shared - tiny_model()(tokens, coords)).abs().max() > 1e-3  # the same weights without it


@pytest.mark.parametrize("head", ["tied", "cosine", "linear"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_mask_has_no_logit_and_every_head_works(head, norm):
    model = tiny_model(head=head, norm=norm)
    tokens = torch.tensor([[0, 4, model.mask_id, 2]])
    logits = model(tokens, grid_coords(2, 2))
    assert model.mask_id == 5 and logits.shape == (1, 4, 5)
    if head == "cosine":
        assert logits.abs().max() <= 1 + 1e-6


def test_tied_and_cosine_heads_compare_with_the_embedding_table():
    for head in ("tied", "cosine"):
        model, seen = tiny_model(head=head), []
        if head == "tied":
            torch.nn.init.normal_(model.bias)
        model.to_logits.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        logits = model(torch.tensor([[0, 1, 2, 5]]), grid_coords(2, 2))
        for t, k in itertools.product(range(4), range(5)):
            state, code = seen[0][0, t], model.embedding.weight[k]
            expected = (state * code).sum()
            expected = expected + model.bias[k] if head == "tied" else expected / (state.norm() * code.norm())
            assert logits[0, t, k].item() == pytest.approx(expected.item(), abs=1e-5)


def test_learned_temperature_multiplies_the_similarities():
    model = tiny_model(head="cosine", learn_temperature=True)
    tokens, coords = torch.tensor([[0, 1, 2, 5]]), grid_coords(2, 2)
    before = model(tokens, coords)
    with torch.no_grad():
        model.log_scale.fill_(math.log(7))
    torch.testing.assert_close(model(tokens, coords), 7 * before)
    with pytest.raises(ValueError, match="cosine head"):
        tiny_model(head="tied", learn_temperature=True)


def test_only_coordinates_tell_the_order_of_tokens():
    model, coords = tiny_model(), grid_coords(3, 3)
    tokens, permutation = torch.randint(6, (2, 9), generator=seeded()), torch.randperm(9, generator=seeded())
    shuffled = model(tokens[:, permutation], coords[permutation])
    torch.testing.assert_close(shuffled, model(tokens, coords)[:, permutation], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(tokens[:, permutation], coords), model(tokens, coords)[:, permutation], atol=1e-3)


def test_coordinates_may_differ_per_image():
    model, tokens = tiny_model(), torch.randint(6, (2, 9), generator=seeded())
    coords = torch.stack([grid_coords(3, 3), grid_coords(3, 3) * 1.7 + 0.3])
    one_by_one = torch.cat([model(tokens[i : i + 1], coords[i]) for i in range(2)])
    torch.testing.assert_close(model(tokens, coords), one_by_one, rtol=1e-4, atol=1e-5)


def test_model_refuses_unknown_choices():
    for wrong in ({"norm": "none"}, {"head": "mlp"}, {"heads": 3}):
        with pytest.raises(ValueError, match="choose|divisible"):
            tiny_model(**wrong)


# ---------------------------------------------------------------------------------------------------
# Masking


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_fall_from_one_to_zero(name):
    gamma, r = SCHEDULES[name], np.linspace(0, 1, 101)
    assert gamma(0.0) == pytest.approx(1) and gamma(1.0) == pytest.approx(0, abs=1e-12)
    assert (np.diff(gamma(r)) < 0).all()
    assert gamma(0.3) == pytest.approx(gamma(r)[30])


def test_schedules_at_one_half():
    expected = {"cosine": 2**-0.5, "linear": 0.5, "square": 0.75, "cubic": 0.875, "sqrt": 1 - 2**-0.5}
    expected |= {"arccos": 2 / 3, "log": 1 - math.log2(1.5), "exp": 1 - (math.e**0.5 - 1) / (math.e - 1)}
    assert {name: float(gamma(0.5)) for name, gamma in SCHEDULES.items()} == pytest.approx(expected)


def test_random_mask_hides_exact_counts():
    ratios = torch.tensor([0.0, 0.01, 0.2, 0.5, 1.0])
    mask = random_mask((5, 64), ratios, seeded())
    assert mask.dtype == torch.bool and mask.sum(dim=1).tolist() == [1, 1, 13, 32, 64]
    assert random_mask((3, 10), 0.25, seeded()).sum(dim=1).tolist() == [3, 3, 3]
    assert torch.equal(random_mask((3, 10), 0.25, seeded(1)), random_mask((3, 10), 0.25, seeded(1)))


def test_random_mask_hides_every_token_equally_often():
    frequency = random_mask((20000, 8), 0.25, seeded()).float().mean(dim=0)
    assert (frequency - 0.25).abs().max() < 0.015  # 5 standard deviations


def test_random_mask_refuses_impossible_ratios():
    with pytest.raises(ValueError, match="between 0 and 1"):
        random_mask((2, 4), 1.5)


def test_training_masks_of_several_kinds_share_the_rows():
    mask = training_mask((6, 100), "0.2+single+linear", seeded())
    assert mask.sum(dim=1)[:4].tolist() == [20, 20, 1, 1]
    assert training_mask((6, 100), "0.2", seeded()).sum() == 120
    for kind in ("sideways", "0.2+", "1.5", "nan"):
        with pytest.raises(ValueError):
            training_mask((6, 100), kind)


def test_soft_targets_in_the_loss_by_hand():
    logits, mask = torch.randn(2, 3, 4, generator=seeded()), torch.tensor([[True, False, True], [False, True, False]])
    targets = torch.rand(2, 3, 4, generator=seeded(1)).softmax(dim=-1)
    expected = -(targets * logits.log_softmax(dim=-1)).sum(dim=-1)[mask].mean()
    torch.testing.assert_close(masked_cross_entropy(logits, targets, mask), expected)


def test_masked_cross_entropy_by_hand():
    logits = torch.tensor([[[0.0, 0.0], [3.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]]])
    targets = torch.tensor([[0, 1], [1, 0]])
    mask = torch.tensor([[True, False], [True, True]])
    hidden = [math.log(2), math.log(1 + math.exp(-1)), math.log(2)]
    given = math.log(1 + math.exp(3))
    assert masked_cross_entropy(logits, targets, mask).item() == pytest.approx(sum(hidden) / 3)
    everything = masked_cross_entropy(logits, targets, mask, every_position=True)
    assert everything.item() == pytest.approx((sum(hidden) + given) / 4)
    smooth = masked_cross_entropy(logits, targets, mask, label_smoothing=0.2)
    other = [math.log(2), math.log(1 + math.exp(1)), math.log(2)]  # of the wrong code
    assert smooth.item() == pytest.approx(sum(0.9 * a + 0.1 * b for a, b in zip(hidden, other, strict=True)) / 3)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-24])
def test_the_extremes_of_the_random_numbers_are_masks(kind, extreme, monkeypatch):
    """The least and the largest number that torch.rand draws: as r they round to 0 and to 1."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, extreme))
    for rows in (1, 16):
        hidden = training_mask((rows, 9), kind).sum(dim=1)
        assert hidden.min() >= 1 and hidden.max() <= 9
        assert hidden[-1] == 1 if extreme else hidden[0] == 9


# ---------------------------------------------------------------------------------------------------
# Decoding

ORDERS = ("entropy", "confidence", "random", "halton")


def ragged_batch(seed, images=6, tokens=16, codes=5):
    """Random tokens whose rows have different numbers of hidden ones, none and all among them."""
    ids = torch.randint(codes, (images, tokens), generator=seeded(seed))
    mask = torch.stack([torch.rand(tokens, generator=seeded(seed + i)) < i / (images - 1) for i in range(images)])
    return ids, mask


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("sample", "steps"), [("categorical", 1), ("argmax", 5), ("categorical", 8), ("argmax", 40)])
def test_decode_keeps_its_promises(order, schedule, sample, steps):
    model, coords, trace = tiny_model(), grid_coords(4, 4), []
    tokens, mask = ragged_batch(steps)
    arguments = {"steps": steps, "schedule": schedule, "order": order, "sample": sample}
    result = decode(model, tokens, mask, coords, generator=seeded(), trace=trace, **arguments)
    assert torch.equal(result[~mask], tokens[~mask]), "given tokens come back unchanged"
    assert result.min() >= 0 and result.max() < model.mask_id, "no [MASK] comes out"
    assert torch.equal(result, decode(model, tokens, mask, coords, generator=seeded(), **arguments)), "same generator"

    start = had = mask.sum(dim=1)
    before = tokens.masked_fill(mask, model.mask_id)
    for t, (now, hidden) in enumerate(trace, start=1):
        committed = before != model.mask_id
        assert torch.equal(now[committed], before[committed]), "a committed token never changes"
        assert torch.equal(hidden, now == model.mask_id)
        scheduled = [math.floor(SCHEDULES[schedule](t / steps) * n) for n in start.tolist()]
        if t == steps:
            scheduled = [0] * len(start)
        expected = torch.tensor(scheduled).minimum(had - 1).clamp(min=0)
        left = hidden.sum(dim=1)
        assert (left <= expected).all() if order == "entropy" else torch.equal(left, expected)
        before, had = now, left
    assert len(trace) <= steps and not trace[-1][1].any()


@pytest.mark.parametrize("order", ORDERS)
def test_decode_with_nothing_and_with_everything_hidden(order):
    model, coords = tiny_model(), grid_coords(4, 4)
    tokens = torch.randint(5, (3, 16), generator=seeded())
    nothing, everything = torch.zeros(3, 16, dtype=torch.bool), torch.ones(3, 16, dtype=torch.bool)
    assert torch.equal(decode(model, tokens, nothing, coords, order=order), tokens)
    from_nothing = decode(model, tokens, everything, coords, order=order, generator=seeded())
    other_contents = decode(model, (tokens + 1) % 5, everything, coords, order=order, generator=seeded())
    assert from_nothing.max() < 5 and torch.equal(from_nothing, other_contents), "hidden contents do not matter"


def test_decode_leaves_its_inputs_and_the_models_mode_alone():
    model, (tokens, mask) = tiny_model(dropout=0.5).train(), ragged_batch(0)
    tokens_before, mask_before = tokens.clone(), mask.clone()
    results = [decode(model, tokens, mask, grid_coords(4, 4), generator=seeded()) for _ in range(2)]
    assert torch.equal(*results), "dropout is off while decoding"
    assert model.training and torch.equal(tokens, tokens_before) and torch.equal(mask, mask_before)


class FixedMarginals:
    """The same independent distributions whatever is visible."""

    def __init__(self, probabilities):
        self.log_probabilities = torch.tensor(probabilities).log()
        self.mask_id, self.calls = self.log_probabilities.shape[-1], 0

    def __call__(self, tokens, coords):
        self.calls += 1
        return self.log_probabilities.expand(len(tokens), -1, -1)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_decode_draws_from_the_model_at_a_temperature(temperature):
    model = FixedMarginals([[0.1, 0.2, 0.7], [0.5, 0.25, 0.25]])
    hidden = torch.ones(40000, 2, dtype=torch.bool)
    drawn = decode(
        model, hidden.long(), hidden, grid_coords(1, 2), order="random", temperature=temperature, generator=seeded()
    )
    frequency = torch.nn.functional.one_hot(drawn, 3).float().mean(dim=0)
    expected = model.log_probabilities.exp() ** (1 / temperature)
    torch.testing.assert_close(frequency, expected / expected.sum(dim=-1, keepdim=True), rtol=0, atol=0.013)


def committed_first(order, probabilities, **options):
    """Which token a deterministic decode of one image commits at each step."""
    t, trace = len(probabilities), []
    hidden = torch.ones(1, t, dtype=torch.bool)
    arguments = {"steps": t, "schedule": "cubic", "order": order, "sample": "argmax", "trace": trace} | options
    decode(FixedMarginals(probabilities), hidden.long(), hidden, grid_coords(1, t), **arguments)
    masks = [hidden, *(mask for _, mask in trace)]
    return [(a & ~b).nonzero()[:, 1].tolist() for a, b in itertools.pairwise(masks)]


def test_confidence_commits_the_most_probable_first():
    probabilities = [[0.6, 0.4], [0.9, 0.1], [0.3, 0.7], [0.2, 0.8]]
    for confidence in ("probability", "log_probability"):
        found = committed_first("confidence", probabilities, confidence=confidence, choice_temperature=0.0)
        assert found == [[1], [3], [2], [0]]


def test_entropy_commits_the_certain_and_the_most_uncertain():
    probabilities = [[0.6, 0.4], [0.999, 0.001], [0.3, 0.7], [0.0001, 0.9999], [0.2, 0.8]]
    assert committed_first("entropy", probabilities) == [[0, 1, 3], [2], [4]]
    assert committed_first("entropy", probabilities, certain=0.0) == [[0], [2], [4], [1], [3]]


def test_draws_follow_the_probabilities():
    """Frequencies of 40,000 draws within five standard errors; what has no probability is never drawn."""
    probabilities = torch.tensor([[0.0, 0.1, 0.0, 0.6, 0.3, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    rows = probabilities.log().repeat(40_000, 1)
    found = maskgit.draw(rows, torch.Generator().manual_seed(0)).view(-1, 2)
    share = torch.stack([(found == k).float().mean(dim=0) for k in range(6)], dim=1)
    error = (probabilities * (1 - probabilities) / 40_000).sqrt()
    assert bool(((share - probabilities).abs() <= 5 * error).all())


def test_entropy_draws_the_uncertain_but_not_the_certain():
    model = FixedMarginals([[0.995, 0.005], [0.6, 0.4]])
    hidden = torch.ones(20000, 2, dtype=torch.bool)
    drawn = decode(model, hidden.long(), hidden, grid_coords(1, 2), generator=seeded()).float().mean(dim=0)
    assert drawn[0] == 0 and drawn[1].item() == pytest.approx(0.4, abs=0.02)


def test_entropy_keeps_to_the_schedule_when_little_is_certain():
    probabilities = [[0.5 + 0.01 * i, 0.5 - 0.01 * i] for i in range(8)]
    assert committed_first("entropy", probabilities, steps=4, schedule="linear") == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_halton_visits_the_quarters_in_turn():
    trace, hidden = [], torch.ones(1, 64, dtype=torch.bool)
    model = FixedMarginals([[0.5, 0.5]] * 64)
    decode(model, hidden.long(), hidden, grid_coords(8, 8), steps=64, schedule="linear", order="halton", trace=trace)
    masks = [hidden, *(mask for _, mask in trace)]
    visited = [(a & ~b).nonzero()[0, 1].item() for a, b in itertools.pairwise(masks)]
    assert sorted(visited) == list(range(64))
    # By hand: radical inverses (0, 0), (1/2, 1/3), (1/4, 2/3), (3/4, 1/9) of a 7 x 7 box.
    assert [(i % 8, i // 8) for i in visited[:4]] in ([(0, 0), (x, 2), (2, 5), (5, 1)] for x in (3, 4))


def test_stop_after_commits_the_rest():
    model, coords, trace = tiny_model(), grid_coords(4, 4), []
    tokens, mask = ragged_batch(3)
    arguments = {"steps": 10, "order": "confidence", "generator": seeded()}
    result = decode(model, tokens, mask, coords, stop_after=3, trace=trace, **arguments)
    full = []
    decode(model, tokens, mask, coords, trace=full, **arguments | {"generator": seeded()})
    assert len(trace) == 3 and torch.equal(trace[1][0], full[1][0]) and (result < model.mask_id).all()


def test_finished_images_cost_no_more_calls():
    model = FixedMarginals([[0.6, 0.4]] * 4)
    sizes, call = [], model.__call__
    counting = type(
        "Counting", (), {"mask_id": 2, "__call__": lambda self, t, c: (sizes.append(len(t)), call(t, c))[1]}
    )
    mask = torch.tensor([[True] * 4, [True] + [False] * 3, [False] * 4])
    decode(counting(), torch.zeros(3, 4, dtype=torch.int64), mask, grid_coords(2, 2), steps=4, order="random")
    assert sizes == [2, 1, 1, 1]


class HostQuestions(TorchDispatchMode):
    """Counts the operations that would wait for a device: their result decides on the host, or has an unknown size."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        by_mask = function.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
        by_mask = by_mask and any(index is not None and index.dtype == torch.bool for index in arguments[1])
        waits = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)
        self.count += by_mask or function.overloadpacket in waits
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sample", ["categorical", "argmax"])
def test_decode_does_not_wait_for_the_device_between_its_calls(order, sample):
    questions, asked_at_call = HostQuestions(), []
    model, (tokens, mask) = tiny_model(), ragged_batch(0)

    def call(*arguments):
        asked_at_call.append(questions.count)
        return model(*arguments)

    call.mask_id = model.mask_id
    arguments = {"steps": 6, "sample": sample, "evidence": torch.zeros(6, 16, 5), "generator": seeded()}
    with questions:
        decode(call, tokens, mask, grid_coords(4, 4), order=order, **arguments)
        assert len(asked_at_call) > 1 and len(set(asked_at_call)) == 1
        before = questions.count
        assert bool(mask.any()) and len(tokens[mask]) and questions.count == before + 2, "the counter counts"


class NothingOnTheHost(TorchDispatchMode):
    """Fails if an operation makes a tensor that is not on the device "meta"."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        assert all(made.is_meta for made in tree_leaves(result) if isinstance(made, torch.Tensor)), function
        return result


@pytest.mark.parametrize("options", [{}, {"positions": "printed"}, {"rotary": True}, {"head": "cosine"}])
def test_model_copies_nothing_to_its_device(options):
    with torch.device("meta"):
        model, tokens, coords = tiny_model(**options), torch.zeros(2, 6, dtype=torch.int64), torch.zeros(6, 2)
    with NothingOnTheHost():
        assert model(tokens, coords).shape == (2, 6, 5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"order": "raster"}, "unknown order"),
        ({"schedule": "quadratic"}, "unknown schedule"),
        ({"sample": "greedy"}, "unknown sample"),
        ({"confidence": "margin"}, "unknown confidence"),
        ({"steps": 0}, "at least 1"),
        ({"stop_after": 0}, "at least 1"),
        ({"temperature": 0.0}, "argmax"),
        ({"mask": torch.zeros(6, 16)}, "bool"),
        ({"tokens": torch.full((6, 16), 5)}, "codes are 0 .. 4"),
        ({"evidence": torch.full((6, 16, 5), math.nan)}, "no numbers"),
        ({"evidence": torch.full((6, 16, 5), math.nan), "order": "confidence"}, "no numbers"),
    ],
)
def test_decode_refuses_bad_arguments(wrong, message):
    tokens, mask = ragged_batch(0)
    arguments = {"tokens": tokens, "mask": mask, "coords": grid_coords(4, 4)} | wrong
    with pytest.raises(ValueError, match=message):
        decode(tiny_model(), **arguments)


def test_evidence_is_added_to_the_logits_of_its_own_token():
    """Evidence for one code in each token overrules the model, whichever images are finished."""
    model, tokens, coords = tiny_model(), torch.zeros(3, 6, dtype=torch.int64), grid_coords(2, 3)
    mask = random_mask((3, 6), torch.tensor([0.2, 0.6, 1.0]), seeded())
    wanted = torch.randint(5, (3, 6), generator=seeded(1))
    evidence = 100.0 * F.one_hot(wanted, 5)
    found = decode(model, tokens, mask, coords, order="confidence", steps=4, evidence=evidence, generator=seeded())
    assert torch.equal(found, torch.where(mask, wanted, tokens))


# ---------------------------------------------------------------------------------------------------
# Running


def striped_batch(step):
    """24 images of one colour each (codes 0 and 1), with very different numbers of hidden tokens."""
    generator = seeded(step)
    tokens = torch.randint(2, (24, 1), generator=generator).expand(24, 9).contiguous()
    return tokens, random_mask(tokens.shape, torch.rand(24, generator=generator), generator), grid_coords(3, 3)


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_learns_and_returns_the_log(optimizer, tmp_path):
    model = tiny_model(codes=2)
    rows = train(model, striped_batch, steps=150, log_steps=50, lr=0.01, optimizer=optimizer, out=tmp_path, warmup=5)
    assert rows[-1]["loss"] < 0.2 < math.log(2)  # what is left: images hidden altogether
    with open(tmp_path / "log.csv") as file:
        saved = list(csv.DictReader(file))
    assert [int(row["step"]) for row in saved] == [50, 100, 150] == [row["step"] for row in rows]
    assert [float(row["loss"]) for row in saved] == [row["loss"] for row in rows]
    loaded = load_checkpoint(tmp_path / "model.pt")
    assert torch.equal(weights(loaded["model"]), weights(model)) and loaded["step"] == 150
    assert not loaded["model"].training and loaded["tokenizer"] is None


def test_first_logged_loss_is_that_of_the_untrained_model():
    model = tiny_model(codes=2)
    tokens, mask, coords = striped_batch(0)
    log_probs = model(tokens.masked_fill(mask, 2), coords).log_softmax(dim=-1)
    expected = -log_probs.gather(-1, tokens[..., None])[..., 0][mask].mean().item()
    assert train(model, striped_batch, steps=1)[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_adamw_step_by_hand():
    """One step of AdamW without clipping moves every weight by lr against the sign of its gradient, plus decay."""
    model = tiny_model(codes=2)
    tokens, mask, coords = striped_batch(0)
    masked_cross_entropy(model(tokens.masked_fill(mask, 2), coords), tokens, mask).backward()
    matrix = model.blocks[0].mlp[0].weight
    before, gradient = matrix.detach().clone(), matrix.grad.clone()
    model.zero_grad()
    train(model, striped_batch, steps=1, lr=0.01, warmup=0, clip=math.inf, weight_decay=0.5)
    large = gradient.abs() > 1e-5
    expected = before * (1 - 0.01 * 0.5) - 0.01 * gradient.sign()
    torch.testing.assert_close(matrix.detach()[large], expected[large], rtol=0, atol=2e-5)


def test_muon_steps_are_orthogonal_and_only_for_the_blocks_matrices():
    adamw, muon = maskgit.make_optimizers(tiny_model(), "muon", 0.01, (0.9, 0.95), 0.0)
    assert sum(p.numel() for group in muon.param_groups for p in group["params"]) == 2 * (4 * 16 * 16 + 2 * 16 * 64)
    model = tiny_model(codes=2)
    matrix, (tokens, mask, coords) = model.blocks[0].attention.out.weight, striped_batch(0)
    masked_cross_entropy(model(tokens.masked_fill(mask, 2), coords), tokens, mask).backward()
    gradient, before = torch.linalg.svdvals(matrix.grad), matrix.detach().clone()
    model.zero_grad()
    train(model, striped_batch, steps=1, lr=0.01, warmup=0, optimizer="muon", weight_decay=0.0)
    step = torch.linalg.svdvals((matrix.detach() - before) / (0.01 * 0.2 * math.sqrt(16)))
    assert gradient[3] / gradient[0] < 0.2 and step[3] / step[0] > 0.5 and 0.6 < step[0] < 1.3


def test_learning_rate_rises_and_falls():
    assert learning_rate_factor(0, 100, 4, "linear") == pytest.approx(1 / 5)
    assert learning_rate_factor(4, 100, 4, "linear") == pytest.approx(1)
    assert learning_rate_factor(52, 100, 4, "linear") == pytest.approx(0.5)
    assert learning_rate_factor(28, 100, 4, "cosine") == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate_factor(0, 100, 0, "constant") == learning_rate_factor(99, 100, 0, "constant") == 1
    with pytest.raises(ValueError, match="constant, linear, cosine"):
        learning_rate_factor(0, 100, 0, "step")


@pytest.mark.parametrize("accumulate", [1, 5, 24])
def test_accumulated_parts_add_up_to_the_batchs_mean(accumulate):
    """Parts with different numbers of hidden tokens must not be averaged as equals."""
    model, (tokens, mask, coords) = tiny_model(codes=2), striped_batch(0)
    inputs = tokens.masked_fill(mask, 2)
    loss = torch.nn.functional.cross_entropy(model(inputs, coords)[mask], tokens[mask])
    loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    plain = {"every_position": False, "soft_targets": None, "label_smoothing": 0.0}
    total = maskgit.backward(model, tokens, mask, coords, mask_id=2, accumulate=accumulate, **plain)
    assert total.item() == pytest.approx(loss.item(), rel=1e-5)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_batch_smaller_than_its_parts_is_refused():
    with pytest.raises(ValueError, match="cannot be split"):
        train(tiny_model(codes=2), striped_batch, steps=1, accumulate=25)


def test_every_position_trains_on_given_tokens_too():
    model = tiny_model(codes=2)
    tokens, mask, coords = striped_batch(0)
    log_probs = model(tokens.masked_fill(mask, 2), coords).log_softmax(dim=-1)
    expected = -log_probs.gather(-1, tokens[..., None]).mean().item()
    assert train(model, striped_batch, steps=1, every_position=True)[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_soft_targets_are_what_training_aims_at():
    trained = []
    for targets in (None, torch.eye(2), torch.full((2, 2), 0.5)):
        model = tiny_model(codes=2)
        train(model, striped_batch, steps=3, warmup=0, soft_targets=targets)
        trained.append(weights(model))
    torch.testing.assert_close(trained[0], trained[1], rtol=0, atol=1e-5)
    assert (trained[0] - trained[2]).abs().max() > 1e-3


def test_moving_average_is_what_comes_out(tmp_path):
    path = []
    plain = tiny_model(codes=2)
    for steps in (1, 2, 3):
        model = tiny_model(codes=2)
        train(model, striped_batch, steps=steps, lr=0.01, decay="constant", warmup=0)
        path.append(weights(model))
    train(plain, striped_batch, steps=3, lr=0.01, decay="constant", warmup=0, ema=0.8, out=tmp_path)
    expected = path[0]
    for later in path[1:]:
        expected = 0.8 * expected + 0.2 * later
    torch.testing.assert_close(weights(plain), expected, rtol=0, atol=1e-6)
    assert torch.equal(weights(load_checkpoint(tmp_path / "model.pt")["model"]), weights(plain))


@pytest.mark.parametrize("options", [{}, {"ema": 0.9, "optimizer": "muon", "accumulate": 3}])
def test_resumed_run_is_bit_identical(options, tmp_path):
    """With dropout, after a run that broke off between two checkpoints and two rows of the log."""
    arguments = {"steps": 20, "log_steps": 6, "lr": 0.01, "checkpoint_steps": 4, "config": {"dim": 16}} | options

    def breaks_off(step):
        if step == 11:
            raise KeyboardInterrupt
        return striped_batch(step)

    undisturbed, resumed = tiny_model(codes=2, dropout=0.1), tiny_model(codes=2, dropout=0.1)
    rows = train(undisturbed, striped_batch, **arguments)
    with pytest.raises(KeyboardInterrupt):
        train(resumed, breaks_off, out=tmp_path, **arguments)
    assert load_checkpoint(tmp_path / "model.pt")["step"] == 8
    again = tiny_model(seed=1, codes=2, dropout=0.1)
    resumed_rows = train(again, striped_batch, out=tmp_path, resume=True, **arguments)
    assert torch.equal(weights(again), weights(undisturbed))
    assert [row["loss"] for row in resumed_rows] == [row["loss"] for row in rows]
    with open(tmp_path / "log.csv") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [6, 12, 18, 20]


def test_ctrl_c_finishes_the_step_and_saves(tmp_path):
    """A real signal in the middle of step 7; the resumed run ends as the undisturbed one does. A second one is at
    once. Afterwards Ctrl-C is what it was."""

    def signalled(times):
        def batch(step):
            for _ in range(times if step == 6 else 0):
                signal.raise_signal(signal.SIGINT)
            return striped_batch(step)

        return batch

    before, arguments = signal.getsignal(signal.SIGINT), {"steps": 10, "lr": 0.01, "out": tmp_path / "run"}
    undisturbed, resumed = tiny_model(codes=2, dropout=0.1), tiny_model(codes=2, dropout=0.1)
    train(undisturbed, striped_batch, steps=10, lr=0.01)
    with pytest.raises(KeyboardInterrupt):
        train(resumed, signalled(2), **arguments)
    assert not (tmp_path / "run" / "model.pt").exists()
    resumed = tiny_model(codes=2, dropout=0.1)
    with pytest.raises(KeyboardInterrupt):
        train(resumed, signalled(1), **arguments)
    assert load_checkpoint(tmp_path / "run" / "model.pt")["step"] == 7
    train(resumed, striped_batch, resume=True, **arguments)
    assert torch.equal(weights(resumed), weights(undisturbed))
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(maskgit.fcntl is None, reason="folders are not locked on this system")
def test_a_second_run_into_the_same_folder_is_refused(tmp_path):
    def begins_another(step):
        if step == 1:
            with pytest.raises(ValueError, match="another run is writing"):
                train(tiny_model(codes=2), striped_batch, steps=2, out=tmp_path)
        return striped_batch(step)

    train(tiny_model(codes=2), begins_another, steps=3, out=tmp_path)
    assert load_checkpoint(tmp_path / "model.pt")["step"] == 3
    train(tiny_model(codes=2), striped_batch, steps=2, out=tmp_path)  # free again


@pytest.mark.skipif(maskgit.fcntl is None, reason="folders are not locked on this system")
def test_file_systems_without_locks_are_written_to(tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError("Function not implemented")

    monkeypatch.setattr(maskgit.fcntl, "flock", no_locks)
    train(tiny_model(codes=2), striped_batch, steps=2, out=tmp_path)
    assert load_checkpoint(tmp_path / "model.pt")["step"] == 2


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_the_best_validated_model_is_kept(ema, tmp_path):
    """The figures 3, 1, 2, 1.5 make the second row's model the result, also of a run that was broken off after it."""
    seen = {}

    def validate(model):
        seen[len(seen)] = weights(model).clone()
        return {"figure": [3.0, 1.0, 2.0, 1.5][len(seen) - 1]}

    def breaks_off(step):
        if step == 7:
            raise KeyboardInterrupt
        return striped_batch(step)

    model, again = tiny_model(codes=2), tiny_model(codes=2)
    arguments = {"steps": 8, "log_steps": 2, "lr": 0.01, "ema": ema, "validate": validate, "best_by": "figure"}
    train(model, striped_batch, **arguments)
    best = seen[1]
    assert torch.equal(weights(model), best) and not torch.equal(best, seen[3])
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        train(again, breaks_off, out=tmp_path, checkpoint_steps=6, **arguments)
    assert torch.equal(weights(load_checkpoint(tmp_path / "model.pt")["model"]), best)
    train(again, striped_batch, out=tmp_path, resume=True, **arguments)
    assert torch.equal(weights(again), best) and len(seen) == 4
    assert torch.equal(weights(load_checkpoint(tmp_path / "model.pt")["model"]), best)


def test_resume_refuses_another_configuration_and_no_checkpoint(tmp_path):
    model = tiny_model(codes=2)
    with pytest.raises(ValueError, match="no checkpoint"):
        train(model, striped_batch, steps=2, out=tmp_path, resume=True)
    train(model, striped_batch, steps=2, out=tmp_path, config={"lr": 0.1})
    with pytest.raises(ValueError, match="lr=0.1, not 0.2"):
        train(model, striped_batch, steps=2, out=tmp_path, config={"lr": 0.2}, resume=True)
    save_checkpoint(tmp_path / "model.pt", model, training={"model": {}})
    with pytest.raises(ValueError, match="does not fit this run"):
        train(model, striped_batch, steps=2, out=tmp_path, resume=True)
    save_checkpoint(tmp_path / "model.pt", model)
    with pytest.raises(ValueError, match="without its training state"):
        train(model, striped_batch, steps=2, out=tmp_path, resume=True)


def test_loss_that_is_no_number_stops_and_keeps_the_checkpoint(tmp_path):
    model = tiny_model(codes=2)

    def poisoned(step):
        if step == 5:
            with torch.no_grad():
                model.embedding.weight.fill_(math.nan)
        return striped_batch(step)

    with pytest.raises(ValueError, match="no longer finite at step 6"):
        train(model, poisoned, steps=20, log_steps=2, checkpoint_steps=2, out=tmp_path)
    loaded = load_checkpoint(tmp_path / "model.pt")
    assert loaded["step"] == 4 and weights(loaded["model"]).isfinite().all()
    with pytest.raises(ValueError, match="no longer finite at step 1;"):  # the loss still was, before the update
        train(tiny_model(codes=2), striped_batch, steps=1, lr=math.inf, warmup=0, decay="constant", out=tmp_path)
    assert load_checkpoint(tmp_path / "model.pt")["step"] == 4


def test_tensorboard_is_optional_and_its_absence_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="TensorBoard is not installed"):
        train(tiny_model(codes=2), striped_batch, steps=1, out=tmp_path, tensorboard=True)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_kept_memory_is_not_fetched_again():
    """Page faults of blocks of 32 and of 8 MB, eight at a time, before and after (in a process of its own)."""
    code = """
import resource, torch, maskgit
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (2**23, 2**23, 2**21, 2**21):
        [torch.ones(size) for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
given_back = faults()
maskgit.keep_freed_memory()
faults()
print(given_back, faults())
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    given_back, kept = map(int, run.stdout.split())
    assert kept < given_back / 10


def test_bf16_trains_close_to_float32():
    losses = {}
    for precision in ("float32", "bf16"):
        model = tiny_model(codes=2)
        losses[precision] = train(model, striped_batch, steps=30, log_steps=30, precision=precision)[0]["loss"]
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert losses["bf16"] == pytest.approx(losses["float32"], rel=0.05) and losses["bf16"] != losses["float32"]


def test_checkpoint_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    save_checkpoint(path, tiny_model(), step=1)

    def disk_full(contents, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, tiny_model(), step=2)
    assert load_checkpoint(path)["step"] == 1 and list(tmp_path.iterdir()) == [path]


class Malicious:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_damaged_checkpoints_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pt"
    model = tiny_model()
    save_checkpoint(path, model)
    whole = path.read_bytes()
    contents = torch.load(path)
    weight = whole.index(model.embedding.weight.detach().numpy().tobytes())
    damaged = {
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "text": b"not a checkpoint",
        "one bit of one weight": whole[:weight] + bytes([whole[weight] ^ 1]) + whole[weight + 1 :],
    }
    for data in damaged.values():
        path.write_bytes(data)
        with pytest.raises(ValueError, match="model.pt is damaged") as error:
            load_checkpoint(path)
        assert "\n" not in str(error.value)
    others = [Malicious(), [1, 2], {"weights": 1}, contents | {"architecture": {"codes": 5}}]
    for wrong in [*others, contents | {"weights": {}}]:
        torch.save(wrong, path)
        with pytest.raises(ValueError, match="model.pt") as error:
            load_checkpoint(path)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "owned").exists()
    with pytest.raises(ValueError, match="no checkpoint"):
        load_checkpoint(tmp_path / "missing.pt")


def test_pick_device():
    assert pick_device("cpu").type == "cpu" and pick_device().type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="unknown device"):
        pick_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA"):
            pick_device("cuda")


def test_seed_everything_repeats_all_three():
    draws = []
    for _ in range(2):
        seed_everything(3)
        draws.append((torch.rand(1).item(), np.random.rand(), __import__("random").random()))
    assert draws[0] == draws[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_cuda_trains_and_decodes_like_the_cpu(precision):
    losses = []
    for device in ("cpu", "cuda"):
        model = tiny_model(codes=2).to(device)
        losses.append(train(model, striped_batch, steps=20, log_steps=20, precision=precision)[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    hidden = torch.ones(4, 9, dtype=torch.bool, device="cuda")
    for order in ORDERS:
        generator = torch.Generator("cuda").manual_seed(0)
        filled = decode(model, hidden.long(), hidden, grid_coords(3, 3).cuda(), order=order, generator=generator)
        assert filled.is_cuda and filled.max() < 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("order", ["confidence", "random", "halton"])
def test_cuda_decodes_without_a_wait(order):
    """Between the first network call and the last; the order by entropy asks how many tokens are left."""
    model, hidden = tiny_model(codes=2).cuda(), torch.ones(4, 16, dtype=torch.bool, device="cuda")
    calls = []

    def call(*arguments):
        calls.append(torch.cuda.set_sync_debug_mode("error" if len(calls) < 3 else "default"))
        return model(*arguments)

    call.mask_id = 2
    generator = torch.Generator("cuda").manual_seed(0)
    try:
        decode(call, hidden.long(), hidden, grid_coords(4, 4).cuda(), steps=4, order=order, generator=generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 4


# ---------------------------------------------------------------------------------------------------
# Pictures


def test_image_grid_puts_each_image_in_its_place():
    images = np.arange(6).reshape(6, 1, 1, 1) / 10 * np.ones((6, 2, 3, 1))
    sheet = np.asarray(image_grid(images, 4, scale=5, gap=2))
    assert sheet.shape == (2 * 12 + 2, 4 * 17 + 2, 3)
    for i in range(6):
        top, left = 2 + i // 4 * 12, 2 + i % 4 * 17
        assert (sheet[top : top + 10, left : left + 15] == round(i / 10 * 255)).all()
    assert (sheet[:2] == maskgit.FRAME).all() and (sheet[14:, 36:] == maskgit.FRAME).all()
    colour = np.zeros((1, 1, 1, 3)) + [1, 0.5, 0]
    assert np.asarray(image_grid(colour, 1, titles=["orange"]))[-5, 4].tolist() == [255, 128, 0]


def test_axis_ticks_are_round_and_inside():
    assert maskgit.Axis([0, 1], 0, 100, False).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert maskgit.Axis([3, 7000], 0, 100, True).ticks() == [10, 100, 1000]
    assert maskgit.Axis([1, 64], 0, 100, True).ticks() == [1, 2, 5, 10, 20, 50]
    assert maskgit.Axis([0.21, 0.45], 0, 100, True).ticks() == pytest.approx([0.25, 0.3, 0.35, 0.4, 0.45])
    axis = maskgit.Axis([1, 100], 200, 0, True)
    assert axis(1) == 200 and axis(10) == pytest.approx(100) and axis(100) == 0
    for low, high in ((0.2, 0.21), (-3, 12345), (5, 5)):
        axis = maskgit.Axis([low, high], 0, 100, False)
        assert 2 <= len(axis.ticks()) <= 7 and all(axis.low <= tick <= axis.high + 1e-9 for tick in axis.ticks())


def test_line_plot_draws_the_curve_where_it_belongs():
    picture = line_plot(
        {"flat": ([0, 1], [0.5, 0.5])}, title="t", x_label="x", y_label="y", references={"a": 0, "b": 1}
    )
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    blue = (np.abs(pixels - [0, 0x72, 0xB2]).sum(axis=-1) < 60)[:, 80:650].nonzero()
    assert abs(np.median(blue[0]) - (60 + 468) / 2) <= 2 and blue[1].max() - blue[1].min() > 560
    with pytest.raises(ValueError, match="nothing to plot"):
        line_plot({"empty": ([1, 2], [math.nan, -1])}, title="t", x_label="x", y_label="y", log_y=True)
    without = {"curves": {"a": ([1, 2], [1.0, 10.0])}, "title": "", "x_label": "", "y_label": "", "log_y": True}
    assert line_plot(**without, references={"none": 0.0}).tobytes() == line_plot(**without).tobytes()


def test_gif_has_every_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), (60 * i, 0, 0)) for i in range(4)]
    save_gif(tmp_path / "a.gif", frames)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 4 and gif.info["loop"] == 0


# ---------------------------------------------------------------------------------------------------
# train_squares.py: the prior, its posterior, scores


@pytest.mark.parametrize(("sides", "count"), [((2, 5), 126), ((2, 6), 135), ((1, 4), 174)])
def test_number_of_squares(sides, count):
    prior = train_squares.all_squares(8, *sides)
    assert prior.shape == (count, 64) and len({tuple(image) for image in prior.tolist()}) == count
    for image in prior.reshape(-1, 8, 8):
        ys, xs = image.nonzero().T
        side = int(ys.max() - ys.min()) + 1
        assert side == xs.max() - xs.min() + 1 and image.sum() == side**2 and sides[0] <= side <= sides[1]


def posterior_by_counting(prior, tokens, mask):
    """For one image: {pixel: share of white} over the images that agree with the visible pixels, by sets."""
    visible = [(p, int(tokens[p])) for p in range(len(tokens)) if not mask[p]]
    agreeing = [image for image in prior.tolist() if all(image[p] == colour for p, colour in visible)]
    return [sum(image[p] for image in agreeing) / len(agreeing) for p in range(len(tokens))]


def test_posterior_equals_counting():
    prior = train_squares.all_squares(8, 2, 5)
    tokens = prior[torch.randint(126, (40,), generator=seeded())]
    mask = training_mask(tokens.shape, "cosine", seeded(1))
    found = train_squares.posterior(prior, tokens, mask)
    for row in range(40):
        assert found[row].tolist() == pytest.approx(posterior_by_counting(prior, tokens[row], mask[row]))
    nothing_visible = train_squares.posterior(prior, tokens[:1], torch.ones(1, 64, dtype=torch.bool))
    torch.testing.assert_close(nothing_visible[0], prior.float().mean(dim=0))


class PosteriorModel(torch.nn.Module):
    """The exact posterior, as a module that score() accepts."""

    def __init__(self, prior):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.exact = train_squares.ExactModel(prior)

    def forward(self, tokens, coords):
        return self.exact(tokens, coords).clamp(min=-50)


def test_the_posterior_scores_at_its_own_limit_which_is_the_known_one():
    prior = train_squares.all_squares(8, 2, 5)
    result = train_squares.score(PosteriorModel(prior), prior, "cosine", 4096, 1)
    assert result["kl"] == pytest.approx(0, abs=1e-6)
    assert result["accuracy"] == pytest.approx(result["posterior_accuracy"], abs=1e-6)
    assert result["limit"] == pytest.approx(0.216, abs=0.006) and result["accuracy"] == pytest.approx(0.910, abs=0.004)
    assert train_squares.score(PosteriorModel(prior), prior, "single", 4096, 1)["accuracy"] > 0.99


def test_score_is_the_expected_loss():
    """Against drawing the hidden pixels: the mean log loss of an untrained model on 126 equally likely images."""
    prior, model = train_squares.all_squares(8, 2, 5), tiny_model(codes=2)
    result = train_squares.score(model, prior, "cosine", 4096, 1)
    tokens = prior[torch.randint(126, (4096,), generator=seeded(2))]
    mask = training_mask(tokens.shape, "cosine", seeded(3))
    with torch.no_grad():
        log_probs = model(tokens.masked_fill(mask, 2), grid_coords(8, 8)).log_softmax(dim=-1)
    drawn = -log_probs.gather(-1, tokens[..., None])[..., 0][mask]
    assert result["cross_entropy"] == pytest.approx(drawn.mean().item(), rel=0.02)
    correct = (log_probs.argmax(dim=-1) == tokens)[mask].float().mean().item()
    assert result["accuracy"] == pytest.approx(correct, abs=0.02)


def test_cosine_heads_limit_by_brute_force():
    """No pair of similarities in [-1, 1] does better on any pixel."""
    prior = train_squares.all_squares(8, 2, 5)
    generator = seeded(train_squares.TEST_SEED)
    tokens = prior[torch.randint(126, (200,), generator=generator)]
    mask = training_mask(tokens.shape, "cosine", generator)
    white = train_squares.posterior(prior, tokens, mask)[mask][:, None]
    difference = torch.linspace(-2, 2, 401)
    losses = white * torch.nn.functional.softplus(-difference) + (1 - white) * torch.nn.functional.softplus(difference)
    best = losses.amin(dim=1).mean().item()
    assert train_squares.cosine_head_limit(prior, "cosine", 200) == pytest.approx(best, abs=1e-4)


def test_epochs_show_every_image_as_often():
    settings = train_squares.argparse.Namespace(grid=8, seed=3, batch_size=50, presentations=2, mask="single")
    prior = train_squares.all_squares(8, 2, 5)
    batch = train_squares.make_batch(prior, settings)
    shown = torch.cat([batch(step)[0] for step in range(126)])  # 6300 images: 25 epochs of 252
    counts = (shown[:, None] == prior).all(dim=-1).sum(dim=0)
    assert (counts == 50).all()
    first = torch.cat([batch(step)[0] for step in range(6)])[:252]
    assert ((first[:, None] == prior).all(dim=-1).sum(dim=0) == 2).all()
    again = train_squares.make_batch(prior, settings)
    assert all(torch.equal(a, b) for a, b in zip(batch(7), again(7), strict=True))


def test_draw_mask_kinds():
    cosine = training_mask((1000, 64), "cosine", seeded()).sum(dim=1)
    expected = [math.ceil(64 * math.cos(math.pi / 2 * (i + 0.5) / 1000)) for i in range(1000)]
    assert (cosine - torch.tensor(expected)).abs().max() <= 1
    assert (training_mask((9, 64), "single", seeded()).sum(dim=1) == 1).all()
    assert (training_mask((9, 64), "0.2", seeded()).sum(dim=1) == 13).all()


# ---------------------------------------------------------------------------------------------------
# train_squares.py: completions


def test_total_variation_by_hand():
    prior = torch.tensor([[0, 0, 1], [0, 1, 0], [1, 0, 0]])
    tokens = torch.tensor([[0, 0, 0]] * 8)
    mask = torch.tensor([[False, True, True]] * 8)  # leaves the first two images, equally likely
    matches = torch.zeros(8, 3, dtype=torch.bool)
    matches[:5, 0] = matches[5:7, 1] = True  # the eighth is no image at all
    found, floor = train_squares.total_variation(prior, tokens, mask, matches)
    assert found == pytest.approx((abs(5 / 8 - 1 / 2) + abs(2 / 8 - 1 / 2) + 1 / 8) / 2)
    exact = sum(math.comb(8, k) / 2**8 * abs(k / 8 - 1 / 2) for k in range(9))
    assert floor == pytest.approx(exact, abs=0.03)


def test_entropy_order_samples_the_squares_exactly():
    """With the posterior's marginals: all valid, as close to uniform as exact sampling, few calls."""
    prior = train_squares.all_squares(8, 2, 5)
    tokens, mask = train_squares.completion_inputs(prior, 2000, 1)["nothing visible"]
    options = {"order": "entropy", "steps": 20, "certain": 0.02}
    result = train_squares.judge(train_squares.ExactModel(prior), prior, tokens, mask, "cpu", options, 0)
    assert result["valid"] == 1 and result["calls"] < 9.2 and result["most_calls"] <= 20
    assert result["total_variation"] < result["exact_sampling"] + 0.015
    paper = {"order": "confidence", "steps": 16}
    worse = train_squares.judge(train_squares.ExactModel(prior), prior, tokens, mask, "cpu", paper, 0)
    assert 0.70 < worse["valid"] < 0.88 and worse["calls"] == 16


def test_half_hidden_completions_agree_with_what_is_visible():
    prior = train_squares.all_squares(8, 2, 5)
    for given, (tokens, mask) in train_squares.completion_inputs(prior, 100, 1).items():
        result = train_squares.judge(train_squares.ExactModel(prior), prior, tokens, mask, "cpu", {}, 0)
        assert result["valid"] == 1, given
    half = train_squares.completion_inputs(prior, 100, 1)
    assert (half["random half"][1].sum(dim=1) == 32).all()
    assert (
        half["left half"][1].reshape(-1, 8, 8)[:, :, 4:].all()
        and not half["left half"][1].reshape(-1, 8, 8)[:, :, :4].any()
    )


# ---------------------------------------------------------------------------------------------------
# train_squares.py as a user runs it

TINY = ["--dim", "8", "--heads", "2", "--layers", "1", "--hidden", "16", "--batch-size", "16", "--draws", "20"]
TINY += ["--device", "cpu", "--precision", "float32"]


def call(monkeypatch, *arguments):
    """Run train_squares in this process as its command line would be; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["train_squares.py", *map(str, arguments)])
    try:
        maskgit.run_as_script(train_squares.main)
    except SystemExit as stop:
        return stop.code
    return 0


def test_a_run_leaves_what_it_promises(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    figures = tmp_path / "new folder" / "figures.json"
    assert call(monkeypatch, *TINY, "--steps", 30, "--out", out, "--json", figures) == 0
    screen = capsys.readouterr().out
    assert "cosine masking" in screen and "one masked pixel" in screen and str(out / "samples.png") in screen
    names = {"model.pt", "log.csv", "metrics.json", "loss.png", "samples.png", "prior.png", "decode.gif"}
    assert {path.name for path in out.iterdir()} == names
    for name in names:
        if name.endswith((".png", ".gif")):
            with Image.open(out / name) as picture:
                picture.verify()
    metrics = json.loads(figures.read_text())
    assert metrics == json.loads((out / "metrics.json").read_text())
    assert {"command", "commit", "machine", "settings", "seconds", "tasks", "completions"} <= metrics.keys()
    for task in metrics["tasks"].values():
        assert task["kl"] > 0 and task["accuracy"] <= task["posterior_accuracy"]

    before = (out / "model.pt").read_bytes()
    assert call(monkeypatch, *TINY, "--steps", 30, "--out", out) == 2, "a finished run is not overwritten"
    assert (out / "model.pt").read_bytes() == before
    assert call(monkeypatch, "--completions", "--out", tmp_path / "nothing") == 2
    assert call(monkeypatch, *TINY, "--steps", 31, "--out", out, "--force") == 0
    assert load_checkpoint(out / "model.pt")["step"] == 31


def test_killed_run_resumes_to_the_very_same_weights(tmp_path, monkeypatch):
    arguments = [*TINY, "--steps", "400", "--checkpoint-steps", "20", "--dropout", "0.1", "--ema", "0.9"]
    assert call(monkeypatch, *arguments, "--out", tmp_path / "undisturbed") == 0
    out = tmp_path / "killed"
    script = [sys.executable, str(HERE / "train_squares.py"), *arguments, "--out", str(out)]
    process = subprocess.Popen(script, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out / "model.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < load_checkpoint(out / "model.pt")["step"] < 400
    assert call(monkeypatch, *arguments, "--out", out, "--resume") == 0
    resumed, undisturbed = (load_checkpoint(tmp_path / name / "model.pt") for name in ("killed", "undisturbed"))
    assert torch.equal(weights(resumed["model"]), weights(undisturbed["model"]))


def test_completions_and_ablation_on_a_small_scale(tmp_path, monkeypatch, capsys):
    small = [*TINY, "--grid", "4", "--max-side", "3", "--steps", "6", "--out", tmp_path]
    assert call(monkeypatch, *small) == 0
    monkeypatch.setattr(train_squares, "ORDERS", {name: train_squares.ORDERS[name] for name in ("entropy", "random")})
    monkeypatch.setattr(train_squares, "SCHEDULES", {name: SCHEDULES[name] for name in ("cosine", "linear")})
    assert call(monkeypatch, "--completions", "--draws", "20", "--out", tmp_path) == 0
    rows = json.loads((tmp_path / "completions.json").read_text())["completions"]
    combinations = {(row["given"], row["order"], row["schedule"], row["steps"], row["marginals"]) for row in rows}
    assert len(rows) == len(combinations) == (3 + 1) * 2 * 7 * 2  # inputs and schedules, orders, steps, marginals
    monkeypatch.setattr(train_squares, "TEST_COUNT", 64)
    monkeypatch.setattr(train_squares, "VALIDATION_COUNT", 64)
    monkeypatch.setitem(train_squares.ABLATION, "dim", 8)
    monkeypatch.setitem(train_squares.ABLATION, "layers", 1)
    assert call(monkeypatch, "--ablation", "--steps", "4", "--out", tmp_path, "--device", "cpu") == 0
    runs = json.loads((tmp_path / "ablation.json").read_text())["runs"]
    assert len(runs) == 3 * len(train_squares.ablation_variants())
    for name in ("ablation.png", "completions_model.png", "completions_exact.png"):
        with Image.open(tmp_path / name) as picture:
            picture.verify()


def test_ablation_variants_differ_from_the_recipe_as_they_say():
    variants = train_squares.ablation_variants()
    changed = {
        name: sum(train_squares.S1_RECIPE[key] != value for key, value in v.items()) for name, v in variants.items()
    }
    assert changed["S1"] == 0 and changed["S1 + temperature"] == changed["S1 + linear head"] == 1
    assert changed["all repairs"] == 4 and changed["all but pre-norm, warm-up"] == 2


def test_presets_carry_the_sources_numbers(monkeypatch):
    def settings(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_squares.py", *arguments])
        return train_squares.parse_arguments()

    one, two = settings("--preset", "post1"), settings("--preset", "post2", "--lr", "0.001")
    assert (one.dim, one.hidden, one.layers, one.heads, one.dropout) == (768, 3072, 6, 8, 0.1)
    assert (one.norm, one.head, one.positions, one.batch_size, one.steps) == ("post", "cosine", "printed", 126, 300)
    assert (two.dim, two.hidden, two.layers, two.heads, two.min_side, two.max_side) == (640, 1600, 6, 8, 1, 4)
    assert two.steps == 300 * 40 and two.mask == "0.2" and two.lr == 0.001
    assert settings("--preset", "post2", "--steps", "7").steps == 7


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "0"],
        ["--steps", "many"],
        ["--stepz", "3"],
        ["--lr", "-1"],
        ["--lr", "nan"],
        ["--mask", "1.5"],
        ["--mask", "half"],
        ["--dropout", "1"],
        ["--ema", "2"],
        ["--norm", "none"],
        ["--preset", "post3"],
        ["--grid", "4", "--max-side", "5"],
        ["--min-side", "4", "--max-side", "3"],
        ["--heads", "5"],
        ["--dim", "6", "--heads", "2"],
        ["--learn-temperature"],
        ["--device", "tpu"],
        ["--device", "cuda:99"],
        ["--accumulate", "1000"],
        ["--draws", "0"],
        ["--resume"],
        ["--completions"],
    ],
)
def test_bad_input_gets_one_line_and_code_2(arguments, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, "--out", tmp_path / "run", *arguments) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("error: ") and complaint.count("\n") == 1
    assert not (tmp_path / "run" / "model.pt").exists()


def test_an_out_folder_that_cannot_be_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    assert call(monkeypatch, *TINY, "--steps", "2", "--out", tmp_path / "file" / "run") == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---------------------------------------------------------------------------------------------------
# train_rectangles.py: rectangles, tokens, the posterior

SPARSE, GRID = (argparse.Namespace(task=task) for task in ("sparse", "grid"))


@pytest.fixture(scope="module")
def tokenizer():
    return train_rectangles.fit_tokenizer(0)


def test_rectangles_are_uniform_corners_with_room_between():
    for pixels in (None, 16):
        rectangles = train_rectangles.draw_rectangles(5000, np.random.default_rng(0), pixels)
        sides = rectangles[:, 2:] - rectangles[:, :2]
        assert rectangles.min() >= 0 and rectangles.max() <= 16 and sides.min() >= 2
        # The distance of two uniform numbers in [0, 16], if it is at least 2, has the mean below.
        assert sides.mean() == pytest.approx(2 + 14 / 3, abs=0.15)
    assert (rectangles * 16 == np.rint(rectangles * 16)).all()


def test_coverage_equals_an_integration_on_8192_points():
    rng = np.random.default_rng(0)
    rectangles = train_rectangles.draw_rectangles(6, rng)
    points = rng.random((6, 5, 2)) * 12
    exact = train_rectangles.coverage(rectangles, points).reshape(6, 5, 4, 4)
    halves = (np.arange(8192) + 0.5) / 8192
    for image, point, row, column in itertools.product(range(6), range(5), range(4), range(4)):
        x0, y0, x1, y1 = rectangles[image]
        x, y = points[image, point] + (column, row)
        inside_x = ((x0 < x + halves) & (x + halves < x1)).mean()
        inside_y = ((y0 < y + halves) & (y + halves < y1)).mean()
        assert exact[image, point, row, column] == pytest.approx(inside_x * inside_y, abs=3e-4)


def test_images_are_the_area_downsampled_pictures_of_256_pixels():
    rectangles = train_rectangles.draw_rectangles(4, np.random.default_rng(0), 16)
    for rectangle, image in zip(rectangles, train_rectangles.draw_images(rectangles), strict=True):
        x0, y0, x1, y1 = (rectangle * 16).astype(int)
        large = np.zeros((256, 256))
        large[y0:y1, x0:x1] = 1
        np.testing.assert_allclose(image[:, :, 0], large.reshape(16, 16, 16, 16).mean(axis=(1, 3)), atol=1e-6)


def test_sparse_tokens_on_the_grid_are_the_grids_tokens(tokenizer):
    rectangles = train_rectangles.draw_rectangles(50, np.random.default_rng(1))
    grid = tokenizer.encode(train_rectangles.draw_images(rectangles)).reshape(50, 169)
    assert (train_rectangles.encode(rectangles, train_rectangles.GRID_POINTS, tokenizer) == grid).all()
    chosen = np.array([[3.0, 0.0], [12.0, 7.0]])
    sparse = train_rectangles.encode(rectangles, np.tile(chosen, (50, 1, 1)), tokenizer)
    assert (sparse == grid[:, [3, 7 * 13 + 12]]).all()


def test_codebook_is_that_of_the_sources_rectangles(tokenizer):
    assert tokenizer.centroids.shape == (20, 16)
    assert (tokenizer.patch, tokenizer.stride) == (4, 1)
    rectangles = train_rectangles.training_rectangles(argparse.Namespace(rectangles=100, seed=0))
    patches = maskgit.image_patches(train_rectangles.draw_images(rectangles), 4, 1).reshape(-1, 16)
    labels = tokenizer.nearest(patches)
    for code, centroid in enumerate(tokenizer.centroids):  # each is the mean of what it stands for
        np.testing.assert_allclose(centroid, patches[labels == code].mean(axis=0), atol=0.05)


def test_point_samplings():
    rng = np.random.default_rng(0)
    rectangles = train_rectangles.draw_rectangles(300, rng)
    edges = train_rectangles.draw_points("edges", rectangles, 8, rng)
    mixed = train_rectangles.coverage(rectangles, edges).mean(axis=-1)
    assert ((mixed > 0) & (mixed < 1))[:, ::2].mean() > 0.99
    assert ((mixed > 0) & (mixed < 1))[:, 1::2].mean() < 0.7
    cornerless = train_rectangles.draw_points("cornerless", rectangles, 8, rng)
    for (x0, y0, x1, y1), points in zip(rectangles, cornerless, strict=True):
        for (x, y), corner_x, corner_y in itertools.product(points, (x0, x1), (y0, y1)):
            assert not (x < corner_x < x + 4 and y < corner_y < y + 4)
    for points in (edges, cornerless):
        assert points.min() >= 0 and points.max() <= 12


def test_soft_targets_weigh_codes_by_distance():
    tokenizer = PatchTokenizer(np.array([[0.0], [0.3], [2.0]]), patch=1)
    targets = train_rectangles.soft_targets(tokenizer, 0.5)
    weights = np.exp(-(np.array([0.0, 0.3, 2.0]) ** 2) / 0.25)
    np.testing.assert_allclose(targets[0], weights / weights.sum(), atol=1e-6)
    np.testing.assert_allclose(targets.sum(dim=1), 1, atol=1e-6)


def test_batches_depend_on_the_step_alone(tokenizer):
    settings = argparse.Namespace(task="sparse", seed=3, batch_size=6, rectangles=None, points=5, mask="0.2")
    settings.sampling, settings.fixed_points = "uniform", False
    first, second = (train_rectangles.make_batch(tokenizer, settings) for _ in range(2))
    for step in (4, 0):
        assert all((a == b).all() for a, b in zip(first(step), second(step), strict=True))
    assert not torch.equal(first(0)[2], first(1)[2])
    settings.rectangles = 2  # of 2 rectangles, whatever the step, there are two pictures
    settings.task = "grid"
    shown = {
        tuple(tokens)
        for step in range(5)
        for tokens in train_rectangles.make_batch(tokenizer, settings)(step)[0].tolist()
    }
    assert len(shown) == 2


def test_posterior_equals_rejection_sampling(tokenizer):
    """Draw from the prior, keep what agrees with the visible tokens: slow, but the definition of the posterior."""
    rng = np.random.default_rng(0)
    truth = train_rectangles.draw_rectangles(3, rng)
    test = train_rectangles.make_test(SPARSE, truth, tokenizer, points=5, mask="0.5", proposals=15_000, seed=1)
    prior = train_rectangles.draw_rectangles(100_000, rng)
    hidden_so_far = 0
    for points, tokens, mask in zip(test.points, test.tokens, test.mask, strict=True):
        drawn = train_rectangles.encode(prior, points, tokenizer)
        agreeing = drawn[(drawn == tokens)[:, ~mask].all(axis=1)]
        assert len(agreeing) > 200
        for position in np.flatnonzero(mask):
            expected = np.bincount(agreeing[:, position], minlength=20) / len(agreeing)
            found = test.posterior[hidden_so_far].numpy()
            assert np.abs(found - expected).sum() / 2 < 0.1
            hidden_so_far += 1


def test_posterior_of_everything_hidden_is_the_prior(tokenizer):
    """Whatever the chain starts from: the share of prior rectangles that leave a patch empty is known exactly."""
    truth = np.tile([[0.0, 0.0, 16.0, 16.0]], (40, 1))
    points, mask = np.tile([[0.0, 0.0]], (40, 1, 1)), np.ones((40, 1), dtype=bool)
    chain = train_rectangles.posterior_chain(truth, points, mask, tokenizer, np.random.default_rng(0))
    states = np.concatenate([state.copy() for state, _ in itertools.islice(chain, 1000, 3000, 10)])
    # Two uniform corners in [0, 16] at least 2 apart: both in [4, 16] has the probability (10 / 14)^2 on an axis.
    empty = 1 - (1 - (10 / 14) ** 2) ** 2
    found = (train_rectangles.coverage(states, np.zeros((1, 2))).sum(axis=(1, 2)) == 0).mean()
    assert found == pytest.approx(empty, abs=0.04)


@pytest.mark.parametrize("settings", [SPARSE, GRID])
def test_the_posteriors_draws_agree_with_what_is_visible(settings, tokenizer):
    rectangles = train_rectangles.unseen_rectangles(settings, 20, 5)
    test = train_rectangles.make_test(settings, rectangles, tokenizer, proposals=200)
    drawn = train_rectangles.encode(test.draws, test.points, tokenizer)
    assert (drawn == test.tokens)[~test.mask].all()
    assert not np.array_equal(test.draws, rectangles)
    assert (test.posterior.sum(dim=1) - 1).abs().max() < 1e-5
    if settings is GRID:
        assert (test.draws * 16 == np.rint(test.draws * 16)).all()
        half = train_rectangles.make_test(settings, rectangles, tokenizer, mask="half")
        assert half.mask.reshape(20, 13, 13).all(axis=(0, 1)).tolist() == [True] * 6 + [False] * 7
        assert half.mask.sum() == 20 * 13 * 6


def test_score_of_the_posterior_itself_is_the_limit(tokenizer, monkeypatch):
    rectangles = train_rectangles.unseen_rectangles(SPARSE, 60, 5)
    test = train_rectangles.make_test(SPARSE, rectangles, tokenizer, proposals=2000)
    monkeypatch.setattr(train_rectangles, "hidden_log_probs", lambda *_: test.posterior.log().clamp(min=-50))
    perfect = train_rectangles.score(None, test)
    assert perfect["cross_entropy"] == pytest.approx(perfect["limit"], rel=1e-5)
    assert perfect["accuracy"] == perfect["posterior_accuracy"]
    codes = test.tokens[test.mask]
    assert perfect["commonest"] == pytest.approx(max(np.mean(codes == code) for code in range(20)))
    assert perfect["hits"] == perfect["posterior_hits"]
    assert perfect["hits"] == pytest.approx(perfect["accuracy"], abs=0.08)
    uniform = torch.full_like(test.posterior, 1 / 20).log()
    monkeypatch.setattr(train_rectangles, "hidden_log_probs", lambda *_: uniform)
    assert train_rectangles.score(None, test)["cross_entropy"] == pytest.approx(math.log(20), rel=1e-5)


def test_picture_error_by_hand(tokenizer):
    rectangles = train_rectangles.draw_rectangles(2, np.random.default_rng(0), 16)
    tokens = train_rectangles.encode(rectangles, train_rectangles.GRID_POINTS, tokenizer)
    found = train_rectangles.picture_errors(tokens, tokenizer, rectangles)
    for i, rectangle in enumerate(rectangles):
        cells = [[[] for _ in range(16)] for _ in range(16)]
        for position, code in enumerate(tokens[i]):
            for cell, value in enumerate(tokenizer.centroids[code]):
                cells[position // 13 + cell // 4][position % 13 + cell % 4].append(value)
        stitched = np.array([[np.mean(values) for values in row] for row in cells])
        truth = train_rectangles.draw_images(rectangle[None])[0, :, :, 0]
        assert found[i] == pytest.approx(np.abs(stitched - truth).mean(), rel=1e-4)


def test_patches_are_drawn_where_they_lie(tokenizer):
    cell = train_rectangles.CELL
    brightest = tokenizer.centroids.mean(axis=1).argmax()
    drawn = train_rectangles.draw_patches(np.array([[0.5, 10.0]]), [brightest], tokenizer)
    rows, columns = np.nonzero(drawn != train_rectangles.GREY)
    assert (rows.min(), rows.max()) == (10 * cell, 14 * cell - 1)
    assert (columns.min(), columns.max()) == (cell // 2, cell // 2 + 4 * cell - 1)
    boxed = train_rectangles.draw_boxes(drawn, [(2, 3, 5, 6, (255, 0, 0))])
    assert boxed[3 * cell, 3 * cell].tolist() == [1, 0, 0]
    assert boxed[6 * cell - 1, 5 * cell - 1].tolist() == [1, 0, 0]
    assert boxed[6 * cell, 5 * cell].tolist() != [1, 0, 0]


# ---------------------------------------------------------------------------------------------------
# train_rectangles.py as a user runs it

SMALL = ["--dim", "16", "--heads", "2", "--layers", "1", "--batch-size", "8", "--steps", "4"]
SMALL += ["--test-images", "8", "--proposals", "10", "--device", "cpu"]


def call_rectangles(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train_rectangles.py", *map(str, arguments)])
    train_rectangles.main()


@pytest.mark.parametrize(
    ("options", "scored", "table"),
    [
        (["--task", "grid"], ["unseen rectangles", "cosine masking", "left half hidden"], "mean error of a cell"),
        (["--task", "sparse"], ["unseen rectangles", "6 points", "12 points", "48 points", "96 points"], "share"),
        (
            ["--task", "sparse", "--rectangles", "3", "--fixed-points", "--soft-targets", "0.5", "--sampling", "edges"],
            ["unseen rectangles", "training rectangles", "6 points", "12 points", "48 points", "96 points"],
            "training rectangles",
        ),
    ],
)
def test_rectangles_run_leaves_what_it_promises(options, scored, table, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    call_rectangles(monkeypatch, *options, *SMALL, "--out", out, "--json", tmp_path / "copy.json")
    assert {path.name for path in out.iterdir()} == {
        *("model.pt", "log.csv", "metrics.json", "loss.png", "samples.png", "rectangles.png", "centroids.png")
    }
    figures = json.loads((out / "metrics.json").read_text())
    assert list(figures["scores"]) == scored
    assert figures == json.loads((tmp_path / "copy.json").read_text())
    printed = capsys.readouterr().out
    assert table in printed and str(out / "samples.png") in printed
    for row in figures["scores"].values():
        assert row["cross_entropy"] >= row["limit"] and row["accuracy"] <= row["posterior_accuracy"] + 1e-6
    checkpoint = load_checkpoint(out / "model.pt")
    assert checkpoint["tokenizer"].centroids.shape == (20, 16)
    assert checkpoint["model"].mask_id == 20
    monkeypatch.setattr(train_rectangles, "fit_tokenizer", None)  # a resumed run takes the one it has
    call_rectangles(monkeypatch, *options, *SMALL, "--out", out, "--resume")
    again = json.loads((out / "metrics.json").read_text())
    assert again["scores"] == figures["scores"]
    with pytest.raises(ValueError, match="holds a run already"):
        call_rectangles(monkeypatch, *options, *SMALL, "--out", out)


def test_rectangles_refuse_to_resume_a_run_of_the_squares(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "model.pt", tiny_model())
    with pytest.raises(ValueError, match="run of another script"):
        call_rectangles(monkeypatch, *SMALL, "--resume", "--out", tmp_path)


def test_remedies_on_a_small_scale(tmp_path, monkeypatch, capsys):
    call_rectangles(monkeypatch, "--remedies", *SMALL, "--out", tmp_path / "run")
    figures = json.loads((tmp_path / "run" / "remedies.json").read_text())
    assert len(figures["runs"]) == 2 * 4 * 3
    assert len({(row["variant"], row["seed"]) for row in figures["runs"]}) == 24
    curves = {row["variant"]: tuple(row["curve"]) for row in figures["runs"] if row["seed"] == 0}
    assert len(set(curves.values())) == 8  # each variant trains in a way of its own
    assert (tmp_path / "run" / "remedies.png").is_file()
    assert "100 rectangles, no corners" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--task", "round"],
        ["--mask", "sideways"],
        ["--mask", "0.2+1.5"],
        ["--soft-targets", "-1"],
        ["--rectangles", "0"],
        ["--fixed-points"],
        ["--points", "1"],
        ["--dim", "18"],
        ["--device", "abacus"],
        ["--resume", "--out", "nowhere"],
    ],
)
def test_rectangles_bad_input_gets_one_line_and_code_2(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_rectangles.py", *SMALL, *arguments])
    with pytest.raises(SystemExit) as stop:
        maskgit.run_as_script(train_rectangles.main)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------
# inpaint.py: pictures, cats and holes


def noise_picture(seed, width=20, height=16):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_duplicates_are_dropped_and_the_unreadable_named(tmp_path, capsys):
    """The same pixels in another name, folder or format are a duplicate."""
    (tmp_path / "deep").mkdir()
    for i in range(5):
        Image.fromarray(noise_picture(i)).save(tmp_path / f"{i}.png")
    for i, name in enumerate(["a.bmp", "deep/b.PNG"]):
        Image.fromarray(noise_picture(i)).save(tmp_path / name)
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "readme.txt").write_text("no picture")
    images, hashes = inpaint.load_pictures(tmp_path, 8)
    shown = capsys.readouterr()
    assert images.shape == (5, 8, 8, 3) and len(set(hashes)) == 5
    assert "5 distinct pictures, 2 duplicates" in shown.out and "cut.jpg cannot be read" in shown.err


def test_pictures_of_any_mode_and_shape_are_cropped_at_the_centre(tmp_path):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = (200, 100, 50)
    Image.fromarray(wide).save(tmp_path / "a.png")
    grey = Image.fromarray(np.full((9, 9), 40, np.uint8))
    grey.save(tmp_path / "b.webp", lossless=True)
    Image.fromarray(np.full((8, 8), 70 * 256, np.uint16)).save(tmp_path / "c.png")
    Image.new("RGBA", (8, 8), (9, 8, 7, 0)).save(tmp_path / "d.png")
    Image.new("CMYK", (8, 8)).save(tmp_path / "e.jpg")
    images, _ = inpaint.load_pictures(tmp_path, 8)
    assert [tuple(image[4, 4]) for image in images] == [(200, 100, 50), (40,) * 3, (70,) * 3, (9, 8, 7), (255,) * 3]
    assert (images[0] == images[0][0, 0]).all()


def test_more_pictures_never_move_one_to_another_part():
    images = [noise_picture(i) for i in range(600)]
    hashes = np.array([inpaint.content_hash(image) for image in images])

    def parts(count):
        split = inpaint.split_by_content(np.stack(images[:count]), hashes[:count])
        return {image.tobytes(): i for i, part in enumerate(split) for image in part}

    few, many = parts(400), parts(600)
    assert len(few) == 400 and len(many) == 600 and all(many[image] == part for image, part in few.items())
    shares = np.bincount(list(many.values())) / 600
    assert shares == pytest.approx([0.843, 0.060, 0.097], abs=0.04)


def test_too_few_pictures_are_an_error():
    with pytest.raises(ValueError, match="too few"):
        inpaint.split_by_content(np.zeros((3, 8, 8, 3), np.uint8), np.array([0.1, 0.5, 0.99]))


def test_cats_depend_on_their_seed_and_number_alone():
    cats = inpaint.cartoon_cats(30, 32, seed=1)
    assert cats.shape == (30, 32, 32, 3) and cats.dtype == np.uint8
    assert len({cat.tobytes() for cat in cats}) == 30
    assert (inpaint.cartoon_cats(5, 32, seed=1) == cats[:5]).all()
    assert (inpaint.cartoon_cats(5, 32, seed=2) != cats[:5]).any()


@pytest.mark.parametrize(("kind", "low", "high"), [("brush", 0.23, 0.33), ("box", 0.23, 0.26), ("half", 0.5, 0.5)])
def test_holes(kind, low, high):
    holes = inpaint.make_holes(kind, 20, 64, 0)
    assert holes.shape == (20, 64, 64) and holes.dtype == bool
    assert all(low <= hole.mean() <= high for hole in holes)
    assert (inpaint.make_holes(kind, 5, 64, 0) == holes[:5]).all()
    assert len({hole.tobytes() for hole in holes}) >= min(4, len(holes))


def test_evidence_of_the_visible_pixels_by_loops():
    """Differences between codes are those of a normal density; a token that is wholly hidden knows nothing."""
    rng = np.random.default_rng(0)
    images, holes = rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8), np.zeros((2, 8, 8), bool)
    holes[:, 2:8, 5:8] = holes[1, 4:8, 4:8] = True
    tokenizer = PatchTokenizer(rng.random((5, 48), dtype=np.float32), 4, 4)
    found = inpaint.pixel_evidence(tokenizer, images, holes).numpy()
    assert found.shape == (2, 4, 5) and np.abs(found[1, 3]).max() == 0
    for b in range(2):
        squares = np.zeros((4, 5, 4, 4))
        for t, k, i, j in itertools.product(range(4), range(5), range(4), range(4)):
            pixel, code = images[b, t // 2 * 4 + i, t % 2 * 4 + j] / 255, tokenizer.centroids[k].reshape(4, 4, 3)[i, j]
            squares[t, k, i, j] = ((pixel - code) ** 2).sum()
        hidden = holes[b].reshape(2, 4, 2, 4).transpose(0, 2, 1, 3).reshape(4, 1, 4, 4)
        whole = [t for t in range(4) if not hidden[t].any()]
        noise = 3.5 * np.mean([squares[t].sum(axis=(1, 2)).min() / 48 for t in whole])
        expected = -(squares * ~hidden).sum(axis=(2, 3)) / (2 * noise)
        np.testing.assert_allclose(found[b] - found[b][:, :1], expected - expected[:, :1], rtol=1e-4, atol=1e-4)


def test_a_membrane_solves_laplaces_equation():
    """Beside a dense linear solve: inside the hole each value is the mean of its neighbours, mirrored at the border."""
    rng = np.random.default_rng(0)
    values, holes = rng.normal(size=(3, 12, 8, 2)), rng.random((3, 12, 8)) < 0.6
    holes[2] = True
    found = inpaint.membrane(values, holes, sweeps=400)
    assert (found[~holes] == values[~holes]).all() and (found[2] == 0).all()
    for b in range(2):
        matrix, known = np.eye(96), np.where(holes[b][..., None], 0, values[b]).reshape(96, 2)
        for y, x in zip(*holes[b].nonzero(), strict=True):
            for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1)):
                neighbour = min(max(y + dy, 0), 11) * 8 + min(max(x + dx, 0), 7)
                matrix[y * 8 + x, neighbour] -= 1 / 4
        np.testing.assert_allclose(found[b].reshape(96, 2), np.linalg.solve(matrix, known), atol=1e-6)
    few = inpaint.membrane(values, holes)
    assert np.abs(few - found)[:2].max() < 0.1 * np.abs(values).max()
    wide = np.zeros((1, 64, 64), bool)
    wide[0, 2:62, 2:62] = True  # far from its rim, too
    assert inpaint.membrane(np.ones((1, 64, 64, 1)), wide).min() > 0.99


def test_what_is_filled_in_is_shifted_to_join_its_rim():
    """Pictures that are brighter than their tokens by 40, 20 and 10: the shift is known from what is visible."""
    rng = np.random.default_rng(0)
    tokenizer = PatchTokenizer(rng.random((5, 48), dtype=np.float32) / 2, 4)
    codes, holes = rng.integers(5, size=(2, 4, 4)), rng.random((2, 16, 16)) < 0.4
    decoded = np.round(tokenizer.decode(codes) * 255)
    images = (decoded + [40, 20, 10]).astype(np.uint8)
    filled = inpaint.to_pictures(tokenizer, codes, np.where(holes[..., None], 0, images), holes, blend=True)
    assert np.abs(filled.astype(int) - images).max() <= 2 and (filled[~holes] == images[~holes]).all()
    plain = inpaint.to_pictures(tokenizer, codes, images, holes, blend=False)
    assert (plain[holes] == decoded[holes]).all() and (plain[~holes] == images[~holes]).all()


def test_a_token_with_any_hole_pixel_is_hidden():
    holes = np.random.default_rng(0).random((6, 12, 8)) < 0.05
    found = inpaint.hidden_tokens(holes, 4)
    for b, y, x in itertools.product(range(6), range(3), range(2)):
        pixels = [holes[b, 4 * y + i, 4 * x + j] for i in range(4) for j in range(4)]
        assert found[b, y, x] == any(pixels)


# ---------------------------------------------------------------------------------------------------
# inpaint.py: scores


def test_picture_scores_by_hand():
    """Errors count inside the hole alone: 10 and 20 of 255 in two pictures."""
    images = np.full((2, 16, 16, 3), 100, np.uint8)
    holes = np.zeros((2, 16, 16), bool)
    holes[:, 3:5, 7] = True
    filled = images.copy()
    filled[0][holes[0]] += 10
    filled[1][holes[1]] -= 20
    filled[:, 0, 0] = 0
    found = inpaint.picture_scores(images, holes, filled)
    assert found["l1"] == pytest.approx(15)
    assert found["psnr"] == pytest.approx((20 * math.log10(25.5) + 20 * math.log10(12.75)) / 2)


def test_structural_similarity_by_loops():
    x, y = np.random.default_rng(0).integers(0, 256, (2, 2, 13, 12, 3), dtype=np.uint8)
    window = np.array([[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)])
    window /= window.sum()
    values = []
    for b, c, top, left in itertools.product(range(2), range(3), range(3), range(2)):
        p, q = (images[b, top : top + 11, left : left + 11, c] / 255 for images in (x, y))
        mp, mq = (window * p).sum(), (window * q).sum()
        vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
        cov = (window * (p - mp) * (q - mq)).sum()
        values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    assert inpaint.structural_similarity(x, y) == pytest.approx(np.mean(values))
    assert inpaint.structural_similarity(x, x) == pytest.approx(1)


def test_cross_entropy_of_a_test_picture_by_picture(inpaint_run):
    """In more than one batch, weighted by hidden tokens, with and without evidence."""
    checkpoint = load_checkpoint(inpaint_run / "model.pt")
    model, tokenizer, settings = checkpoint["model"], checkpoint["tokenizer"], argparse.Namespace(hole="brush", size=16)
    test = inpaint.make_test(inpaint.cartoon_cats(70, 16), tokenizer, settings, seed=3)
    plain, informed = [], []
    for image, hole, codes, mask in zip(test.images, test.holes, test.codes.flatten(1), test.mask, strict=True):
        logits = model(codes.masked_fill(mask, 16)[None], grid_coords(4, 4)).detach()
        evidence = inpaint.pixel_evidence(tokenizer, image[None], hole[None])
        for found, values in ((plain, logits), (informed, logits + evidence)):
            found += (-values[0].log_softmax(-1)[range(16), codes])[mask].tolist()
    assert test.cross_entropy(model) == pytest.approx(np.mean(plain), rel=0.02)  # bf16 where the processor has it
    assert test.cross_entropy(model, tokenizer) == pytest.approx(np.mean(informed), rel=0.02)
    assert np.mean(informed) < np.mean(plain)


def test_mean_colour_is_that_of_the_visible_pixels():
    image, hole = noise_picture(0)[None], np.random.default_rng(1).random((1, 16, 20)) < 0.4
    found = inpaint.mean_colour(image, hole)
    expected = [np.mean([image[0, y, x, c] for y, x in zip(*(~hole[0]).nonzero(), strict=True)]) for c in range(3)]
    assert (found[~hole] == image[~hole]).all()
    assert np.abs(found[hole] - np.array(expected)).max() <= 0.5
    assert (inpaint.mean_colour(image, np.ones_like(hole)) == 128).all()


# ---------------------------------------------------------------------------------------------------
# inpaint.py as a user runs it

TINY_CATS = ["--cartoons", "150", "--size", "16", "--codes", "16", "--dim", "16", "--heads", "2", "--layers", "1"]
TINY_CATS += ["--batch-size", "8", "--steps", "4", "--test-images", "8", "--device", "cpu", "--precision", "float32"]


def call_inpaint(monkeypatch, *arguments):
    monkeypatch.setattr(fid, "release_path", lambda: Path("no-weights-here.pth"))
    monkeypatch.setattr(sys, "argv", ["inpaint.py", *map(str, arguments)])
    inpaint.main()


@pytest.fixture(scope="module")
def inpaint_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("inpaint") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        call_inpaint(monkeypatch, *TINY_CATS, "--out", out)
    return out


def test_an_inpaint_run_leaves_what_it_promises(inpaint_run):
    pictures = {"samples.png", "steps.png", "reconstruction.png", "loss.png", "decode.gif"}
    assert {file.name for file in inpaint_run.iterdir()} == pictures | {"model.pt", "log.csv", "metrics.json"}
    figures = json.loads((inpaint_run / "metrics.json").read_text())
    names = [row["name"] for row in figures["rows"]]
    for schedule, steps in itertools.product(("linear", "cosine", "square"), (1, 4, 8, 10, 20)):
        assert names.count(f"{schedule}, T={steps}") == 1
    assert {"mean colour", "true tokens", "order entropy", "likeliest, T=1"} <= set(names)
    assert set(figures["as set"]) == {"seen", "brush", "box", "half"}
    assert all(0 < row["psnr"] < 60 and 0 < row["ssim"] <= 1 for row in [*figures["rows"], *figures["as set"].values()])
    chosen = next(row for row in figures["rows"] if row["name"] == "as set")
    assert figures["as set"]["brush"]["psnr"] == chosen["psnr"], "the same pictures, holes and draws"
    assert figures["pictures"]["training"] + figures["pictures"]["validation"] + figures["pictures"]["test"] == 150
    best = min(float(row["validation"]) for row in csv.DictReader((inpaint_run / "log.csv").read_text().splitlines()))
    assert figures["validation"] == best


def test_an_inpaint_run_on_a_folder_and_its_scores_anew(tmp_path, monkeypatch, capsys):
    """A finished run is scored again, with other options, by --resume."""
    for i, cat in enumerate(inpaint.cartoon_cats(150, 20)):
        (tmp_path / "cats").mkdir(exist_ok=True)
        Image.fromarray(cat).save(tmp_path / "cats" / f"{i}.png")
    options = [*TINY_CATS, "--data", tmp_path / "cats", "--out", tmp_path / "run", "--schedules", "cubic"]
    call_inpaint(monkeypatch, *options)
    assert "150 distinct pictures, 0 duplicates" in capsys.readouterr().out
    before = load_checkpoint(tmp_path / "run" / "model.pt")["model"].state_dict()
    call_inpaint(monkeypatch, *options, "--resume", "--score-seeds", 2, "--order", "halton")
    assert "cubic, T=8" in capsys.readouterr().out
    after = load_checkpoint(tmp_path / "run" / "model.pt")["model"].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ValueError, match="trained with dim=16, not 32"):
        call_inpaint(monkeypatch, *options, "--resume", "--dim", 32)


def test_an_inpaint_run_resumes_to_the_very_same_weights(inpaint_run, tmp_path, monkeypatch):
    class KilledError(Exception):
        pass

    def stop(*arguments, **options):
        real(*arguments, **options)
        raise KilledError

    real = maskgit.save_checkpoint
    monkeypatch.setattr(maskgit, "save_checkpoint", stop)
    with pytest.raises(KilledError):
        call_inpaint(monkeypatch, *TINY_CATS, "--out", tmp_path, "--checkpoint-steps", 2)
    monkeypatch.setattr(maskgit, "save_checkpoint", real)
    assert load_checkpoint(tmp_path / "model.pt")["step"] == 2
    call_inpaint(monkeypatch, *TINY_CATS, "--out", tmp_path, "--resume")
    once, twice = (load_checkpoint(folder / "model.pt") for folder in (inpaint_run, tmp_path))
    for name, values in once["model"].state_dict().items():
        assert torch.equal(values, twice["model"].state_dict()[name])
    assert (once["tokenizer"].centroids == twice["tokenizer"].centroids).all()


def test_training_sees_mirrored_pictures_in_batches_that_depend_on_the_step_alone(monkeypatch):
    captured = {}

    def capture(settings, codes, batch, device, **options):
        captured["batch"] = batch

    monkeypatch.setattr(inpaint, "train_as_set", capture)
    monkeypatch.setattr(sys, "argv", ["inpaint.py", "--size", "16", "--codes", "8", "--batch-size", "200"])
    settings, cats = inpaint.parse_arguments(), inpaint.cartoon_cats(3, 16)
    tokenizer = inpaint.fit_tokenizer(cats, settings)
    inpaint.train_model(settings, tokenizer, inpaint.Split(cats, cats, cats), torch.device("cpu"))
    tokens, mask, coords = captured["batch"](3)
    assert tokens.shape == mask.shape == (200, 16) and coords.shape == (16, 2) and mask.any(dim=1).all()
    both_ways = np.concatenate([cats, cats[:, :, ::-1]]) / np.float32(255)
    assert {tuple(row) for row in tokens.tolist()} == {tuple(c.ravel().tolist()) for c in tokenizer.encode(both_ways)}
    assert all(torch.equal(a, b) for a, b in zip(captured["batch"](3), (tokens, mask, coords), strict=True))
    assert not torch.equal(captured["batch"](4)[1], mask)


def test_training_codes_on_disk_are_those_of_both_views():
    """For more codes than a byte holds, and more pictures than are encoded at once."""
    rng = np.random.default_rng(0)
    images, rows = rng.integers(0, 256, (300, 4, 8, 3), dtype=np.uint8), rng.permutation(300)[:280]
    tokenizer = PatchTokenizer(rng.random((300, 12), dtype=np.float32), 2)
    pictures = inpaint.Pictures(images, rows)
    plain, flipped = (tokenizer.encode(view / np.float32(255)) for view in (images[rows], images[rows][:, :, ::-1]))
    assert plain.max() > 255
    assert (inpaint.encode_training(tokenizer, pictures, mirror=False) == plain).all()
    assert (inpaint.encode_training(tokenizer, pictures, mirror=True) == np.concatenate([plain, flipped])).all()


def test_the_reports_preset_carries_their_numbers(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["inpaint.py", "--preset", "report"])
    settings = inpaint.parse_arguments()
    sizes = (settings.dim, settings.heads, settings.layers, settings.hidden, settings.codes, settings.patch)
    assert sizes == (768, 16, 15, 1536, 1024, 4)
    training = (settings.optimizer, settings.lr, settings.betas, settings.batch_size, settings.loss, settings.steps)
    assert training == ("adamw", 1e-4, (0.9, 0.96), 10, "all", 120_000)


def test_fid_and_kid_where_the_weights_are(inception_weights):
    """Those of the two sets' features; a set is at distance 0 from itself."""
    scorer = inpaint.Inception(inception_weights, torch.device("cpu"))
    cats = inpaint.cartoon_cats(6, 32)
    found = scorer.scores(cats, cats[:, ::-1])
    with torch.inference_mode():
        network = fid.load_inception(weights=inception_weights)
        x, y = (network(fid.network_input(list(images), "cpu")).numpy() for images in (cats, cats[:, ::-1]))
    assert found["fid"] == pytest.approx(fid.frechet_distance_from_features(x, y), rel=1e-4)
    assert found["kid"] == pytest.approx(fid.kernel_distance(x, y)[0], rel=1e-4)
    assert scorer.scores(cats, cats)["fid"] < 1e-6 * found["fid"]


def write_pairs(folder, sizes, share=0.3):
    """The reports' folders: masked_image/image_NNN.png with a grey hole and mask64/mask_NNN.png; [(image, hole)]."""
    pairs = []
    for name in ("masked_image", "mask64"):
        (folder / name).mkdir(parents=True)
    for i, (width, height) in enumerate(sizes):
        hole = np.random.default_rng(i).random((height, width)) < share
        hole[:, width // 2 :] |= share > 0  # some tokens show nothing
        image = np.where(hole[..., None], 128, noise_picture(i, width, height)).astype(np.uint8)
        Image.fromarray(image).save(folder / "masked_image" / f"image_{i:03d}.png")
        Image.fromarray(np.where(hole, 0, 255).astype(np.uint8)).save(folder / "mask64" / f"mask_{i:03d}.png")
        pairs.append((image, hole))
    return pairs


def fill_call(monkeypatch, run, folder, *options):
    paths = ["--images", folder / "masked_image", "--masks", folder / "mask64", "--out", folder / "out"]
    call_inpaint(monkeypatch, "--checkpoint", run / "model.pt", *paths, "--device", "cpu", *options)


def test_folders_as_in_the_reports(inpaint_run, tmp_path, monkeypatch, capsys):
    """Of the model's size and others: what was visible comes back bit by bit, the holes are filled."""
    pairs = write_pairs(tmp_path, [(16, 16), (16, 16), (40, 32), (7, 9)])
    fill_call(monkeypatch, inpaint_run, tmp_path)
    results = [np.asarray(Image.open(file)) for file in sorted((tmp_path / "out").iterdir())]
    assert [file.name for file in sorted((tmp_path / "out").iterdir())] == [f"image_{i:03d}.png" for i in range(4)]
    for result, (image, hole) in zip(results, pairs, strict=True):
        assert result.shape == image.shape and (result[~hole] == image[~hole]).all()
        assert (result[hole] != 128).any()
    assert "2 pictures were filled at the model's 16x16" in capsys.readouterr().out
    with pytest.raises(ValueError, match="image_000.png exists"):
        fill_call(monkeypatch, inpaint_run, tmp_path)
    fill_call(monkeypatch, inpaint_run, tmp_path, "--force", "--seed", "1")
    again = np.asarray(Image.open(tmp_path / "out" / "image_000.png"))
    assert (again != results[0]).any()


def test_samples_and_whole_pictures(inpaint_run, tmp_path, monkeypatch):
    pairs = write_pairs(tmp_path, [(16, 16)] * 2, share=0.5)
    fill_call(monkeypatch, inpaint_run, tmp_path, "--samples", "3", "--whole", "--order", "entropy")
    shown = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert shown == [f"image_00{i}{end}.png" for i in range(2) for end in ("", "_1", "_2", "_3")]
    first, second = (np.asarray(Image.open(tmp_path / "out" / f"image_000_{i}.png")) for i in (1, 2))
    side_by_side = np.asarray(Image.open(tmp_path / "out" / "image_000.png"))
    assert side_by_side.shape == (16, 64, 3)
    assert (side_by_side[:, :16] == pairs[0][0]).all() and (side_by_side[:, 16:32] == first).all()
    assert (first != second).any()
    patches = first.reshape(4, 4, 4, 4, 3).transpose(0, 2, 1, 3, 4).reshape(16, -1)
    centroids = load_checkpoint(inpaint_run / "model.pt")["tokenizer"].centroids
    assert all(np.abs(np.round(centroids * 255) - patch).max(axis=1).min() <= 1 for patch in patches)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_hole_and_nothing_but_hole(inpaint_run, tmp_path, monkeypatch, share):
    ((image, _),) = write_pairs(tmp_path, [(16, 16)], share)
    fill_call(monkeypatch, inpaint_run, tmp_path)
    result = np.asarray(Image.open(tmp_path / "out" / "image_000.png"))
    assert (result == image).all() == (share == 0)


def test_single_files_and_one_mask_for_all(inpaint_run, tmp_path, monkeypatch):
    write_pairs(tmp_path, [(16, 16)] * 3)
    masks = tmp_path / "mask64" / "mask_001.png"
    call_inpaint(
        monkeypatch, "--checkpoint", inpaint_run / "model.pt", "--images", tmp_path / "masked_image", "--masks", masks,
        "--out", tmp_path / "out", "--device", "cpu", "--sample", "argmax", "--decode-steps", 3, "--stop-after", 2,
    )  # fmt: skip
    assert len(list((tmp_path / "out").iterdir())) == 3
    hole = np.asarray(Image.open(masks)) < 128
    for i in range(3):
        result, image = (
            np.asarray(Image.open(tmp_path / folder / f"image_{i:03d}.png")) for folder in ("out", "masked_image")
        )
        assert (result[~hole] == image[~hole]).all()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "square"])
def test_trace_of_a_schedule(inpaint_run, schedule):
    """After step t a hole of N tokens has floor(gamma(t / T) N) left; the pictures show those in grey."""
    checkpoint = load_checkpoint(inpaint_run / "model.pt")
    images, holes, trace = inpaint.cartoon_cats(1, 16), np.ones((1, 16, 16), bool), []
    options = {"schedule": schedule, "steps": 5, "order": "confidence", "evidence": False}
    inpaint.fill(checkpoint, images, holes, options, trace=trace)
    gamma = {"linear": lambda r: 1 - r, "cosine": lambda r: math.cos(math.pi * r / 2), "square": lambda r: 1 - r * r}
    for t, (codes, hidden) in enumerate(trace, start=1):
        expected = min(math.floor(gamma[schedule](t / 5) * 16 + 1e-9), 16 - t) if t < 5 else 0
        masks, pictures = inpaint.trace_pictures(checkpoint["tokenizer"], images, holes, codes, hidden, blend=False)
        assert int(hidden.sum()) == expected == (masks[0, ::4, ::4, 0] == 255).sum()
        assert (pictures[0][masks[0, ..., 0] == 255] == 128).all()


def test_bad_input_to_inpaint_is_named(inpaint_run, tmp_path, monkeypatch):
    write_pairs(tmp_path, [(16, 16)] * 2)
    images, masks, out = tmp_path / "masked_image", tmp_path / "mask64", tmp_path / "out"
    good = {"--checkpoint": inpaint_run / "model.pt", "--images": images, "--masks": masks, "--out": out}
    (empty := tmp_path / "empty").mkdir()
    shutil.copytree(images, damaged := tmp_path / "damaged")
    (damaged / "image_001.png").write_bytes((images / "image_001.png").read_bytes()[:100])
    shutil.copytree(masks, small := tmp_path / "small")
    Image.new("L", (8, 8)).save(small / "mask_001.png")
    shutil.copytree(masks, fewer := tmp_path / "fewer", ignore=shutil.ignore_patterns("mask_001.png"))
    shutil.copytree(masks, others := tmp_path / "others")
    (others / "mask_001.png").rename(others / "mask_007.png")
    save_checkpoint(other := tmp_path / "other.pt", tiny_model())
    (text := tmp_path / "text.pt").write_text("no model")
    for change, said in [
        ({"--images": empty}, "empty holds no pictures"),
        ({"--images": tmp_path / "nothing"}, "no folder or file"),
        ({"--images": damaged}, "image_001.png cannot be read"),
        ({"--masks": small}, r"mask_001.png is 8x8, .*image_001.png is 16x16"),
        ({"--masks": fewer}, "2 pictures, .* 1 masks"),
        ({"--masks": others}, "image_001.png and mask_007.png"),
        ({"--masks": empty}, "empty holds no pictures"),
        ({"--checkpoint": other}, "no checkpoint of inpaint.py"),
        ({"--checkpoint": text}, "damaged or no checkpoint"),
        ({"--checkpoint": tmp_path / "none.pt"}, "there is no checkpoint"),
    ]:
        with pytest.raises(ValueError, match=said) as error:
            call_inpaint(monkeypatch, *itertools.chain(*(good | change).items()), "--device", "cpu")
        assert "\n" not in str(error.value) and not out.exists()
    for arguments in [("--checkpoint", other), ("--size", "30"), ("--patch", "0"), ("--schedules", "linear,cubist")]:
        with pytest.raises(SystemExit, match="2"):
            call_inpaint(monkeypatch, *arguments)
    with pytest.raises(ValueError, match="empty holds no pictures"):
        call_inpaint(monkeypatch, *TINY_CATS, "--data", empty, "--out", out)
    with pytest.raises(ValueError, match="too few"):
        call_inpaint(monkeypatch, *TINY_CATS, "--data", images, "--out", out)
    assert not out.exists()


# ---------------------------------------------------------------------------------------------------
# Several processes, as torchrun starts them, with gloo

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ADAMW = ["--optimizer", "adamw", "--lr", "0.001"]
PARALLEL = {
    "train_squares": [*TINY, *ADAMW, "--steps", "12", "--accumulate", "2"],
    "train_rectangles": ["--task", "sparse", *SMALL, *ADAMW, "--precision", "float32"],
    "inpaint": [*TINY_CATS, *ADAMW],
}


@pytest.mark.parametrize("script", PARALLEL)
def test_two_processes_agree_with_one(script, tmp_path):
    """On the same global batch: equal loss and weights, one writer."""
    command = [str(HERE / f"{script}.py"), *PARALLEL[script], "--out"]
    options = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "capture_output": True, "text": True, "timeout": 200}
    one = subprocess.run([sys.executable, *command, str(tmp_path / "one")], **options)
    two = subprocess.run([*TORCHRUN, *command, str(tmp_path / "two")], **options)
    assert two.returncode == one.returncode == 0, two.stderr
    assert two.stdout.count("pictures:") == one.stdout.count("pictures:") > 0  # no space: two writers may interleave
    models = [load_checkpoint(tmp_path / name / "model.pt")["model"] for name in ("one", "two")]
    torch.testing.assert_close(weights(models[1]), weights(models[0]), rtol=0, atol=1e-4)
    logged = []
    for name in ("one", "two"):
        with open(tmp_path / name / "log.csv") as file:
            logged.append([float(row[column]) for row in csv.DictReader(file) for column in ("loss", "gradient_norm")])
    assert logged[1] == pytest.approx(logged[0], rel=1e-3)


STOPS = """
import os, signal, sys
import maskgit, torch

def batch(step):
    if step == 4 and os.environ.get("RANK") == sys.argv[2]:
        signal.raise_signal(getattr(signal, sys.argv[3]))
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(2, (8, 16), generator=generator)
    return tokens, maskgit.training_mask(tokens.shape, "cosine", generator), maskgit.grid_coords(4, 4)

torch.manual_seed(0)
model = maskgit.MaskGIT(2, 16, 2, 1, dropout=0.0)
maskgit.train(model, batch, steps=8, out=sys.argv[1], checkpoint_steps=2, resume=sys.argv[4:] == ["--resume"])
"""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("how", "step"), [("SIGKILL", 4), ("SIGINT", 5)])
def test_a_process_that_stops_stops_all_and_one_process_goes_on(how, step, rank, tmp_path, monkeypatch):
    """Killed, it leaves the last checkpoint whole; interrupted, all finish the step, and the first saves. Resumed by
    one process the run ends as one of a single process does."""
    script = tmp_path / "stops.py"
    script.write_text(STOPS)
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, str(script), str(tmp_path / "two"), str(rank), how]
    assert subprocess.run(command, env=environment, capture_output=True, timeout=100).returncode != 0
    assert load_checkpoint(tmp_path / "two" / "model.pt")["step"] == step
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["model.pt"]
    for name, option in (("one", "--force"), ("two", "--resume")):
        monkeypatch.setattr(sys, "argv", ["stops.py", str(tmp_path / name), "no rank", "no signal", option])
        runpy.run_path(str(script))
    models = [load_checkpoint(tmp_path / name / "model.pt")["model"] for name in ("one", "two")]
    torch.testing.assert_close(weights(models[1]), weights(models[0]), rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------
# fid.py: the network


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """A file of random weights under which signals keep their size."""
    torch.manual_seed(0)
    state = fid.Inception().state_dict()
    for name, values in state.items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(values)
        elif ".bn." in name and values.is_floating_point():
            values.uniform_(0.5, 1.5)
    torch.save(state, path := tmp_path_factory.mktemp("weights") / "weights.pth")
    return path


def inception_by_functions(state, x):
    """The averages (B, dims) of the layers of fid.DIMS, from the state dict alone and with its batch norms."""

    def conv(name, x, stride=1, padded=True):
        weight = state[f"{name}.conv.weight"]
        x = F.conv2d(x, weight, None, stride, [size // 2 * padded for size in weight.shape[2:]])
        norm = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(state[f"{name}.bn.{part}"] for part in norm), eps=0.001).relu()

    def mean_of_pixels_there(x):
        return F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(torch.ones_like(x), 3, 1, 1)

    def mixed(block, x, *chains, pool=None):  # without a pool the block halves the image
        results, shrink = [], {} if pool else {"stride": 2, "padded": False}
        for *stem, end in (chain.split() for chain in chains):
            y = x
            for name in stem:
                y = conv(f"Mixed_{block}.branch{name}", y)
            results.append(conv(f"Mixed_{block}.branch{end}", y, **shrink))
        return torch.cat([*results, conv(f"Mixed_{block}.branch_pool", pool(x)) if pool else F.max_pool2d(x, 3, 2)], 1)

    x = conv("Conv2d_2a_3x3", conv("Conv2d_1a_3x3", x, 2, padded=False), padded=False)
    x = F.max_pool2d(conv("Conv2d_2b_3x3", x), 3, 2)
    yield x.mean((2, 3))
    x = F.max_pool2d(conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", x), padded=False), 3, 2)
    yield x.mean((2, 3))
    double, sevens = "3x3dbl_1 3x3dbl_2 3x3dbl_3", "7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5"
    for block in ("5b", "5c", "5d"):
        x = mixed(block, x, "1x1", "5x5_1 5x5_2", double, pool=mean_of_pixels_there)
    x = mixed("6a", x, "3x3", double)
    for block in ("6b", "6c", "6d", "6e"):
        x = mixed(block, x, "1x1", "7x7_1 7x7_2 7x7_3", sevens, pool=mean_of_pixels_there)
    yield x.mean((2, 3))
    x = mixed("7a", x, "3x3_1 3x3_2", "7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4")
    for block, pool in (("7b", mean_of_pixels_there), ("7c", lambda x: F.max_pool2d(x, 3, 1, 1))):
        x = mixed(block, x, "1x1", "3x3_1 3x3_2a", "3x3_1 3x3_2b", double + "a", double + "b", pool=pool)
    yield x.mean((2, 3))


def test_inception_equals_an_independent_network(inception_weights):
    """In the release's 566 names and shapes, by their hash, and in the features of every layer."""
    state, x = torch.load(inception_weights), torch.rand(2, 3, 299, 299, generator=seeded()) * 2 - 1
    shapes = json.dumps({name: list(values.shape) for name, values in state.items()}, sort_keys=True)
    digest = hashlib.sha256(shapes.encode()).hexdigest()
    assert digest == "1932d991bb5cf8808abf9f0ad5ddee2fcd56818e5de76c379f0bcae7edafe563"
    with torch.inference_mode():
        for dims, expected in zip(fid.DIMS, inception_by_functions(state, x), strict=True):
            found = fid.load_inception(dims, inception_weights)(x)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


def test_images_are_resized_without_corner_alignment():
    """Linear along each axis: pixel centres at i + 1/2, the border repeated; [0, 255] becomes [-1, 1]."""

    def stretched(values, axis):
        size = values.shape[axis]
        centres = (np.arange(299) + 0.5) * size / 299 - 0.5
        return np.apply_along_axis(lambda line: np.interp(centres, range(size), line), axis, values)

    images = [np.random.default_rng(i).integers(0, 256, (5 + i, 7, 3), dtype=np.uint8) for i in range(2)]
    for image, found in zip(images, fid.network_input(images, "cpu").numpy(), strict=True):
        expected = stretched(stretched(image / 127.5 - 1, 0), 1).transpose(2, 0, 1)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def refusal(function, *arguments):
    """The one line that says why it refuses its arguments."""
    with pytest.raises(ValueError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_weights_are_fetched_once_and_a_damaged_copy_again(inception_weights, tmp_path, monkeypatch):
    """From a server whose file is an error page in the end, and then none; those are not kept."""
    content = inception_weights.read_bytes()
    served = tmp_path / f"weights-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    copy = tmp_path / "hub" / "checkpoints" / served.name
    monkeypatch.setattr(fid, "WEIGHTS_URL", served.as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    served.write_bytes(content)
    assert fid.load_inception(64).dims == 64 and copy.read_bytes() == content
    copy.write_bytes(content[:-1000])
    assert fid.load_inception(64).dims == 64 and copy.read_bytes() == content
    served.write_bytes(b"an error page")
    fid.load_inception(64)
    copy.unlink()
    wrong = refusal(fid.load_inception)
    served.unlink()
    for said in (wrong, refusal(fid.load_inception)):
        assert all(part in said for part in ("could not be fetched", fid.WEIGHTS_URL, str(copy.parent), "--weights"))
    assert not list(copy.parent.iterdir())


def test_wrong_weights_are_refused(inception_weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("truncated.pth").write_bytes(inception_weights.read_bytes()[:100_000])
    torch.save({"weight": torch.zeros(3)}, "other.pth")
    torch.save(Malicious(), "pickle.pth")
    shutil.copy(inception_weights, "weights-01234567.pth")
    reasons = {"truncated": "does not hold", "other": "does not hold", "pickle": "does not hold"}
    for name, reason in (reasons | {"weights-01234567": "is damaged", "nothing": "no file"}).items():
        said = refusal(fid.load_inception, 64, f"{name}.pth")
        assert f"{name}.pth" in said and reason in said
    assert not Path("owned").exists()


# ---------------------------------------------------------------------------------------------------
# fid.py: distances


@pytest.mark.parametrize(("size", "rank"), [(2, 2), (5, 5), (12, 12), (12, 7), (30, 20), (300, 1)])
def test_frechet_distance_in_whole_numbers(size, rank):
    """Covariances S and T S T, the root of whose product is S T: nothing is rounded, and S has small and large axes."""
    rng = np.random.default_rng(0)
    mu1, mu2 = rng.integers(-9, 10, (2, size))
    a, b = rng.integers(-3, 4, (size, rank)) * 10 ** (np.arange(rank) % 5), rng.integers(-1, 2, (size, 2))
    s, t = a @ a.T, b @ b.T + np.eye(size, dtype=int)
    means, spreads = ((mu1 - mu2) ** 2).sum(), np.trace(s + t @ s @ t - 2 * s @ t)
    assert fid.frechet_distance(mu1, s, mu2, t @ s @ t) == pytest.approx(means + spreads, rel=1e-12)
    # Features on both sides of the mean, whose covariances are 2 / (2 rank - 1) of those.
    x, y = (np.concatenate([mu + root.T, mu - root.T]) for mu, root in ((mu1, a), (mu2, t @ a)))
    expected = means + spreads * 2 / (2 * rank - 1)
    assert fid.frechet_distance_from_features(x, y) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(7, 9), (7, 200), (200, 7), (200, 300), (51, 51), (2, 2)])
def test_features_and_covariances_give_the_same_distance(n, m):
    """More images than the 50 dimensions, fewer, and both; and a set is at distance 0 from itself."""
    rng = np.random.default_rng(0)
    x, y = 5 * rng.standard_normal((n, 50)), rng.standard_normal((m, 50)) @ rng.standard_normal((50, 50)) + 5
    a, b = ((f.mean(axis=0), np.cov(f, rowvar=False)) for f in (x, y))
    found = fid.frechet_distance_from_features(x, y)
    assert found == pytest.approx(fid.frechet_distance(*a, *b), rel=1e-6)
    assert found == pytest.approx(fid.frechet_distance_from_features(y, x), rel=1e-10)
    assert 0 <= fid.frechet_distance(*b, *b) < 1e-6
    assert 0 <= fid.frechet_distance_from_features(y, y[::-1]) < 1e-6


def test_distances_refuse_what_they_cannot_compare():
    x, eye = np.random.default_rng(0).random((9, 4)), np.eye(4)
    for distance, arguments, reason in [
        (fid.frechet_distance_from_features, (x, x[:, :3]), "features (9, 4) and (9, 3)"),
        (fid.frechet_distance_from_features, (x, x[:1]), "at least 2"),
        (fid.frechet_distance_from_features, (x, x * np.nan), "finite"),
        (fid.frechet_distance, (x[0], eye, x[0], np.eye(5)), "do not fit"),
        (fid.frechet_distance, (x[0], eye, x[0, :3], eye), "do not fit"),
        (fid.frechet_distance, (x[0], eye, x[0], eye + np.inf), "finite"),
        (fid.kernel_distance, (x[:3], x), "four images"),
    ]:
        assert reason in refusal(distance, *arguments)


def test_kernel_distance_by_loops():
    x, y = np.random.default_rng(0).random((2, 8, 5))
    within = sum((f[i] @ f[j] / 5 + 1) ** 3 for f in (x, y) for i in range(8) for j in range(8) if i != j) / 56
    across = sum((a @ b / 5 + 1) ** 3 for a in x for b in y) / 64
    assert fid.kernel_distance(x, y, subsets=3000, subset_size=3)[0] == pytest.approx(within - 2 * across, abs=0.02)
    assert fid.kernel_distance(x, y, seed=1) == fid.kernel_distance(x, y, seed=1)


@pytest.mark.parametrize("count", [60, 1200])
def test_the_bias_of_small_sets(count):
    """Two Gaussians in 300 dimensions, 3 apart: what FID has above 9 is bias, and the bound near it if N is above D."""
    x, y = np.random.default_rng(0).standard_normal((2, count, 300)) / np.sqrt(np.arange(1, 301))
    y[:, 0] += 3
    a, b = (fid.statistics_of([f], count) for f in (x, y))
    bound, bias = fid.bias_at_least(a, b), fid.fid_of(a, b) - 9
    assert (0.7 if count > 300 else 0.2) * bias < bound < 1.3 * bias


# ---------------------------------------------------------------------------------------------------
# fid.py: statistics and the command line


@pytest.mark.parametrize("kept", [200, 10])
def test_running_sums_equal_numpys_statistics(kept, monkeypatch):
    """Far from the origin and in uneven batches; of many images only some features are kept."""
    monkeypatch.setattr(fid, "KEPT", kept)
    features = np.random.default_rng(0).standard_normal((103, 6)) + 1e6
    found = fid.statistics_of(np.array_split(features, 7), 103)
    np.testing.assert_allclose(found.mu, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.sigma, np.cov(features, rowvar=False), rtol=1e-8)
    rows = set(map(tuple, found.features))
    assert rows <= set(map(tuple, features)) and len(rows) == len(found.features) == min(kept, 103)


@pytest.fixture
def call_fid(inception_weights, monkeypatch, capsys):
    def call(*arguments):  # in this process: the numbers after FID: and KID:, and stderr
        common = ["fid.py", "--num-workers", 0, "--device", "cpu", "--dims", 64, "--weights", inception_weights]
        monkeypatch.setattr(sys, "argv", list(map(str, (*common, *arguments))))
        fid.main()
        shown = capsys.readouterr()
        return [float(number) for number in re.findall(r"^[FK]ID:\s+(\S+)", shown.out, re.MULTILINE)], shown.err

    return call


@pytest.fixture(scope="module")
def two_folders(tmp_path_factory):
    """Images of every mode and several sizes and suffixes; the second folder is lighter."""
    folders = [tmp_path_factory.mktemp("images") for _ in range(2)]
    for lightness, folder in zip((0, 60), folders, strict=True):
        rng = np.random.default_rng(lightness)
        for i, name in enumerate(["RGB.JPG", "L.bmp", "RGBA.png", "CMYK.jpeg", "P.png", "1.tif", "LA.png", "I;16.png"]):
            pixels, mode = rng.integers(lightness, 200, (20 + i % 2 * 5, 30, 3), dtype=np.uint8), name.split(".")[0]
            image = Image.fromarray(pixels[..., 0].astype(np.uint16) if mode == "I;16" else pixels)
            image.convert(mode).save(folder / name)
        (folder / "notes.md").write_text("not an image")
    return folders


def test_two_folders(two_folders, inception_weights, call_fid, tmp_path):
    """Images, sizes and modes mixed, against the independent network; and statistics files, as others read them."""
    features, state = [], torch.load(inception_weights)
    for folder in two_folders:
        images = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.[!m]*"))]
        features.append(next(inception_by_functions(state, fid.network_input(images, "cpu"))).numpy())
    expected = pytest.approx(fid.frechet_distance_from_features(*features), rel=1e-4)
    (found, kid), screen = call_fid(*two_folders, "--kid", "--batch-size", 3)
    assert found == expected and kid == pytest.approx(fid.kernel_distance(*features)[0], rel=1e-3)
    assert "8/8 images" in screen and "warning: 8 and 8 images" in screen and "--kid" in screen
    assert call_fid(two_folders[0], two_folders[0])[0][0] < 1e-6
    a, b = tmp_path / "a.npz", tmp_path / "b.npz"
    for path, folder in zip((tmp_path / "a", b), two_folders, strict=True):
        call_fid("--save-stats", folder, path)
    assert sorted(tmp_path.iterdir()) == [a, b] and sorted(np.load(a)) == ["mu", "sigma"]
    np.testing.assert_allclose(np.load(a)["sigma"], np.cov(features[0], rowvar=False), rtol=1e-3, atol=1e-6)
    assert call_fid(a, two_folders[1])[0] == [expected] == call_fid(two_folders[0], b)[0]
    assert call_fid(a, b) == ([expected], "")


def test_the_options_of_pytorch_fid(monkeypatch):
    command = "fid.py --batch-size 7 --num-workers 3 --device cuda:1 --dims 768 --save-stats a b"
    monkeypatch.setattr(sys, "argv", command.split())
    settings = fid.settings_from_command_line()
    assert (settings.batch_size, settings.num_workers, settings.device, settings.dims) == (7, 3, "cuda:1", 768)
    assert settings.save_stats and settings.path == [Path("a"), Path("b")]


def test_bad_input_to_fid_is_named(two_folders, call_fid, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    good = two_folders[0]
    for folder in ("empty", "single", "damaged"):
        Path(folder).mkdir()
    for name in ("CMYK.jpeg", "RGB.JPG"):
        Path("damaged", name).write_bytes((good / name).read_bytes()[:300])
    shutil.copy(good / "RGB.JPG", "single")
    np.savez_compressed("stats.npz", mu=np.zeros(64), sigma=np.eye(64))
    whole = Path("stats.npz").read_bytes()
    Path("bits.npz").write_bytes(whole[:56] + bytes(8) + whole[64:])
    Path("text.npz").write_text("no archive")
    np.savez("unfit.npz", mu=np.zeros(64), sigma=np.eye(3))
    np.savez("other.npz", mean=np.zeros(3))
    for arguments, said in [
        ((good, "empty"), "empty holds 0 images"),
        (("single", good), "single holds 1 images"),
        ((good, "nothing"), "nothing is neither"),
        ((good, good / "RGB.JPG"), "RGB.JPG is neither"),
        ((good, "unfit.npz"), "unfit.npz: mu"),
        *(((good, f"{name}.npz"), f"{name}.npz is no statistics file") for name in ("bits", "text", "other")),
        ((good, "stats.npz", "--dims", 192), "64 features per image, the other 192"),
        ((good, "stats.npz", "--kid"), "--kid needs two folders"),
        ((good, good, "--device", "cuda:99"), "device cuda:99 cannot be used"),
        ((good, good, "--device", "x"), "device x cannot be used"),
        (("--save-stats", good, "stats.npz"), "stats.npz exists"),
        (("--save-stats", good, "no/a.npz"), "no folder"),
        (("--save-stats", "damaged", "new.npz"), "CMYK.jpeg cannot be read.*RGB.JPG cannot be read"),
    ]:
        assert re.search(said, refusal(call_fid, *arguments))
    assert not Path("new.npz").exists() and np.load("stats.npz")["mu"].shape == (64,)
    for option in [("--batch-size", 0), ("--num-workers", -1), ("--dims", 5), ("--batch-size", "x")]:
        with pytest.raises(SystemExit, match="2"):
            call_fid(good, good, *option)
        assert re.fullmatch("error: .*\n", capsys.readouterr().err)


def test_fid_as_a_program(two_folders, inception_weights):
    """With workers; and an error is one line and exit code 2."""
    command = [sys.executable, HERE / "fid.py", "--weights", inception_weights, "--dims", "64", "--device", "cpu"]
    finished = subprocess.run([*command, *two_folders, "--num-workers", "2"], capture_output=True, text=True)
    assert finished.returncode == 0 and re.fullmatch(r"FID:  \d+\.\d+\n", finished.stdout), finished.stderr
    finished = subprocess.run([*command, "no", "folder"], capture_output=True, text=True)
    assert (finished.returncode, finished.stdout) == (2, "") and re.fullmatch("error: .*\n", finished.stderr)


# ---------------------------------------------------------------------------------------------------
# The README


def test_readme_example_runs_on_maskgit_alone(tmp_path):
    """maskgit.py in an empty folder, and the README's example word for word."""
    readme = (HERE / "README.md").read_text()
    example = re.search(r"```python\n(import torch.*?)```", readme, re.DOTALL)[1]
    shutil.copy(HERE / "maskgit.py", tmp_path)
    (tmp_path / "example.py").write_text(example)
    finished = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stderr
    assert re.search(r"[01]", finished.stdout)


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("train_squares.py", ["--preset", "--ablation", "--completions", "--draws", "--positions"]),
        ("inpaint.py", ["--data", "--hole", "--checkpoint", "--images", "--masks", "--samples", "--order", "--preset"]),
        ("train_rectangles.py", ["--task", "--remedies", "--rectangles", "--points", "--soft-targets", "--no-rotary"]),
    ],
)
def test_help_names_every_flag(script, flags):
    shown = subprocess.run([sys.executable, HERE / script, "--help"], capture_output=True, text=True)
    for flag in [*flags, "--device", "--seed", "--resume", "--force", "--precision", "--compile", "--mask", "--out"]:
        assert flag in shown.stdout


def test_pins_are_exact():
    pins = (HERE / "requirements.txt").read_text().split()
    assert sorted(pin.split("==")[0] for pin in pins) == ["numpy", "pillow", "pytest", "torch"]
    assert all(re.fullmatch(r"\w+==[\d.]+", pin) for pin in pins)
