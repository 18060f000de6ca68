"""Every test, in the order of the code: maskgit.py, then the scripts, then the README.

    python -m pytest test_maskgit.py

Expected values are worked out here in another way: by hand, by loops, by enumeration. No test needs a network, a
GPU (those that use one skip themselves) or data from elsewhere.
"""

import argparse
import csv
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import random
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
import vqgan
from maskgit import (
    ORDERS,
    SCHEDULES,
    Attention,
    Block,
    MaskGIT,
    PatchTokenizer,
    decode,
    grid_coords,
    image_grid,
    kmeans,
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
    return MaskGIT(codes, **{"dim": 16, "heads": 2, "layers": 2, "dropout": 0.0} | options).eval()


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# ---------------------------------------------------------------------------------------------------
# Tokens


def blobs():
    """Points around four far corners, in random order."""
    rng = np.random.default_rng(0)
    corners = np.array([[0, 0, 9], [0, 9, 0], [9, 0, 0], [9, 9, 9]])
    return (corners[rng.integers(4, size=200)] + rng.normal(0, 0.1, (200, 3))).astype(np.float32)


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
    result = kmeans(points, 4, seed=0, restarts=5)
    assert sorted(np.rint(result.centroids).tolist()) == [[0, 0, 9], [0, 9, 0], [9, 0, 0], [9, 9, 9]]
    assert result.centroids.dtype == np.float32 and result.labels.dtype == np.int64
    for k, centroid in enumerate(result.centroids):
        np.testing.assert_allclose(centroid, points[result.labels == k].mean(axis=0), atol=1e-5)


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_kmeans_equals_brute_force_from_the_same_start(iterations):
    points = np.random.default_rng(1).normal(size=(150, 5)).astype(np.float32) + 30
    centroids, labels, inertia = brute_force_lloyd(points, points[:7], iterations)
    result = kmeans(points, 7, init=points[:7], max_iter=iterations, tol=0)
    np.testing.assert_allclose(result.centroids, centroids, atol=1e-4)
    assert (result.labels == labels).all() and result.iterations == iterations
    assert result.inertia == pytest.approx(inertia, rel=1e-4)


def test_kmeans_ends_when_nothing_moves_or_by_tol():
    points = np.random.default_rng(2).random((3000, 8)).astype(np.float32)
    converged = kmeans(points, 20, init=points[:20], max_iter=500, tol=0)
    assert 1 < converged.iterations < 500
    assert kmeans(points, 20, init=points[:20], tol=0.1).iterations < converged.iterations


def test_kmeans_fills_empty_clusters():
    points = blobs()
    far_away = np.full((2, 3), 1000, dtype=np.float32)  # no point is near these two
    result = kmeans(points, 4, init=np.concatenate([points[:2], far_away]), max_iter=50)
    assert (np.bincount(result.labels, minlength=4) > 0).all() and np.abs(result.centroids).max() < 20
    farthest = kmeans(np.array([[0], [1], [2], [10]]), 2, init=[[0.5], [1000]], max_iter=1)
    assert farthest.centroids.ravel().tolist() == [3.25, 10]


def test_kmeans_repeats_with_its_seed_and_keeps_the_best_restart():
    points = np.random.default_rng(3).random((500, 4)).astype(np.float32)
    once, again = (kmeans(points, 12, seed=5, restarts=3) for _ in range(2))
    assert (once.centroids == again.centroids).all() and once.inertia == again.inertia
    assert not np.array_equal(once.centroids, kmeans(points, 12, seed=6).centroids)
    rng = np.random.default_rng(5)
    single = [maskgit.lloyd(points, maskgit.plus_plus(points, 12, rng), 100, 1e-4) for _ in range(3)]
    assert once.inertia == min(run.inertia for run in single)


def test_plus_plus_draws_by_squared_distance():
    points = np.array([[0.0], [1.0], [3.0]], dtype=np.float32)
    rng = np.random.default_rng(0)
    chosen = np.array([maskgit.plus_plus(points, 3, rng)[:, 0] for _ in range(6000)])
    assert np.mean(chosen[chosen[:, 0] == 0, 1] == 3) == pytest.approx(9 / 10, abs=0.03)
    assert (np.sort(chosen, axis=1) == points[:, 0]).all(), "none is chosen twice"


def test_nearest_centroid_equals_brute_force_far_from_the_origin():
    rng = np.random.default_rng(4)
    points, centroids = (rng.random((n, 6)).astype(np.float32) + 100 for n in (2500, 30))
    distances = np.square(points[:, None].astype(np.float64) - centroids).sum(axis=-1)
    chosen = np.take_along_axis(distances, maskgit.nearest_centroid(points, centroids)[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(chosen, distances.min(axis=1), atol=1e-5)


@pytest.mark.parametrize(("patch", "stride", "channels"), [(2, 2, 1), (3, 3, 4), (2, 1, 3), (4, 2, 2)])
def test_tokens_bring_the_images_back_when_codes_suffice(patch, stride, channels, tmp_path):
    """Also after a checkpoint; many images at once are encoded as each alone is."""
    size = patch + 2 * stride
    images = np.random.default_rng(0).integers(0, 5, size=(6, size, size, channels)).astype(np.float32) / 4
    codes = len(np.unique(maskgit.image_patches(images, patch, stride).reshape(-1, patch * patch * channels), axis=0))
    save_checkpoint(tmp_path / "model.pt", tiny_model(), tokenizer=PatchTokenizer.fit(images, codes, patch, stride))
    tokenizer = load_checkpoint(tmp_path / "model.pt")["tokenizer"]
    assert (tokenizer.patch, tokenizer.stride) == (patch, stride)
    tokens = tokenizer.encode(images)
    assert tokens.shape == (6, 3, 3) and tokens.dtype == np.int64
    np.testing.assert_allclose(tokenizer.decode(tokens), images, atol=1e-5)
    many = np.resize(images, (2**22 // images[0].size + 7, *images.shape[1:]))  # more than are encoded at once
    assert (tokenizer.encode(many) == np.resize(tokens, (len(many), 3, 3))).all()


def test_patches_are_flattened_row_by_row_and_stitched_by_hand():
    image = np.arange(25, dtype=np.float32).reshape(1, 5, 5, 1)
    patches = maskgit.image_patches(image, 3, 2)
    assert patches.shape == (1, 2, 2, 9)
    assert patches[0, 0, 1].tolist() == [2, 3, 4, 7, 8, 9, 12, 13, 14]
    # Four constant 3x3 patches, two pixels apart: where two overlap it is their mean, in the middle that of all.
    tokenizer = PatchTokenizer(np.repeat([[1.0], [2.0], [3.0], [4.0]], 9, axis=1), patch=3, stride=2)
    row, middle = [1, 1, 1.5, 2, 2], [2, 2, 2.5, 3, 3]
    expected = [row, row, middle, [x + 2 for x in row], [x + 2 for x in row]]
    assert tokenizer.decode(np.array([[[0, 1], [2, 3]]]))[0, :, :, 0].tolist() == expected


# ---------------------------------------------------------------------------------------------------
# Positions


def test_grid_coords_are_x_then_y_row_by_row():
    assert grid_coords(2, 3).tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]


@pytest.mark.parametrize("layout", ["split", "printed"])
def test_position_encoding_equals_its_formula_dimension_by_dimension(layout):
    coords, dim = torch.tensor([[0.0, 0.0], [3.0, 5.0], [-1.25, 7.5]]), 16
    encoded = position_encoding(coords, dim, layout)
    assert encoded.shape == (3, dim)
    for (row, (x, y)), i in itertools.product(enumerate(coords.tolist()), range(dim)):
        within = i % (dim // 2)
        exponent = i / dim if layout == "printed" else (within - within % 2) / (dim // 2)
        angle = (x if i < dim // 2 else y) * 10000**-exponent
        assert encoded[row, i].item() == pytest.approx(math.sin(angle) if i % 2 == 0 else math.cos(angle), abs=1e-5)


def test_rotary_angles_equal_their_formula():
    coords = torch.tensor([[2.0, -1.5], [0.25, 3.0]])
    angles = rotary_angles(coords, 12)  # three frequencies for each axis
    for row, (x, y) in enumerate(coords.tolist()):
        expected = [value * math.pi / 100 ** (i / 3) for value in (x, y) for i in range(3)]
        assert angles[row].tolist() == pytest.approx(expected, rel=1e-5)


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
    block, x = Block(8, 2, 24, 0.5, norm).eval(), torch.randn(2, 5, 8)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if norm == "post":
        y = layer_norm(x + block.attention(x), block.norm1)
        expected = layer_norm(y + gelu_mlp(y, block), block.norm2)
    else:
        y = x + block.attention(layer_norm(x, block.norm1))
        expected = y + gelu_mlp(layer_norm(y, block.norm2), block)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    block.train()  # with dropout after the attention and in the MLP
    for part in (block.dropout, block.mlp[3]):
        assert 0.4 < (part(torch.ones(1000)) == 0).float().mean() < 0.6
    block.mlp[3].p = 0.0
    assert not torch.equal(block(x), block(x))


def test_rotary_attention_sees_differences_of_coordinates_alone():
    torch.manual_seed(0)
    attention, x, coords = Attention(16, 2), torch.randn(1, 5, 16), torch.rand(5, 2) * 6
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


@pytest.mark.parametrize("rotary", [False, True])
def test_coordinates_may_be_shared_or_differ_per_image(rotary):
    model, tokens = tiny_model(rotary=rotary), torch.randint(6, (2, 9), generator=seeded())
    coords = torch.stack([grid_coords(3, 3), grid_coords(3, 3) * 1.7 + 0.3])
    one_by_one = torch.cat([model(tokens[i : i + 1], coords[i]) for i in range(2)])
    torch.testing.assert_close(model(tokens, coords), one_by_one, rtol=1e-4, atol=1e-5)
    if rotary:  # the same weights without it
        assert (model(tokens, coords) - tiny_model()(tokens, coords)).abs().max() > 1e-3


@pytest.mark.parametrize("head", ["tied", "cosine", "linear"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_heads_by_hand_and_no_logit_for_mask(head, norm):
    """Tied and cosine compare the state with each code's row of the embedding table."""
    model, states, coords = tiny_model(head=head, norm=norm), [], grid_coords(2, 2)
    if head == "tied":
        torch.nn.init.normal_(model.bias)
    model.to_logits.register_forward_hook(lambda module, arguments, output: states.append(output))
    model.blocks[0].register_forward_pre_hook(lambda module, arguments: states.append(arguments[0]))
    tokens = torch.tensor([[0, 4, model.mask_id, 2]])
    logits = model(tokens, coords)
    torch.testing.assert_close(states.pop(0), 4 * model.embedding.weight[tokens] + position_encoding(coords, 16)[None])
    assert model.mask_id == 5 and logits.shape == (1, 4, 5)
    for t, k in itertools.product(range(4), range(5) if head != "linear" else ()):
        state, code = states[0][0, t], model.embedding.weight[k]
        expected = (state * code).sum()
        expected = expected + model.bias[k] if head == "tied" else expected / (state.norm() * code.norm())
        assert logits[0, t, k].item() == pytest.approx(expected.item(), abs=1e-5)
    if head == "cosine":  # a learned temperature multiplies the similarities
        model = tiny_model(head=head, norm=norm, learn_temperature=True)
        torch.nn.init.constant_(model.log_scale, math.log(7))
        torch.testing.assert_close(model(tokens, coords), 7 * logits)


def test_only_coordinates_tell_the_order_of_tokens():
    model, coords = tiny_model(), grid_coords(3, 3)
    tokens, permutation = torch.randint(6, (2, 9), generator=seeded()), torch.randperm(9, generator=seeded())
    expected = model(tokens, coords)[:, permutation]
    torch.testing.assert_close(model(tokens[:, permutation], coords[permutation]), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(tokens[:, permutation], coords), expected, atol=1e-3)


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


# ---------------------------------------------------------------------------------------------------
# Masking


@pytest.mark.parametrize(
    ("name", "half"),
    [("cosine", 2**-0.5), ("linear", 0.5), ("square", 0.75), ("cubic", 0.875), ("sqrt", 1 - 2**-0.5)]
    + [("arccos", 2 / 3), ("log", 1 - math.log2(1.5)), ("exp", 1 - (math.e**0.5 - 1) / (math.e - 1))],
)
def test_schedules_fall_from_one_to_zero(name, half):
    gamma, r = SCHEDULES[name], np.linspace(0, 1, 101)
    assert [gamma(0.0), gamma(0.5), gamma(1.0)] == pytest.approx([1, half, 0], abs=1e-12)
    assert (np.diff(gamma(r)) < 0).all() and gamma(0.3) == pytest.approx(gamma(r)[30])
    assert len(SCHEDULES) == 8


def test_random_mask_hides_exact_counts_and_every_token_equally_often():
    mask = random_mask((5, 64), torch.tensor([0.0, 0.01, 0.2, 0.5, 1.0]), seeded())
    assert mask.dtype == torch.bool and mask.sum(dim=1).tolist() == [1, 1, 13, 32, 64]
    assert random_mask((3, 10), 0.25, seeded()).sum(dim=1).tolist() == [3, 3, 3]
    assert torch.equal(random_mask((3, 10), 0.25, seeded(1)), random_mask((3, 10), 0.25, seeded(1)))
    frequency = random_mask((20000, 8), 0.25, seeded()).float().mean(dim=0)
    assert (frequency - 0.25).abs().max() < 0.015  # 5 standard deviations


def test_training_masks_and_several_kinds_that_share_the_rows():
    mask = training_mask((6, 100), "0.2+single+linear", seeded())
    assert mask.sum(dim=1)[:4].tolist() == [20, 20, 1, 1]
    assert training_mask((6, 100), "0.2", seeded()).sum() == 120


def test_training_masks_are_the_boxes_of_two_tokens_and_the_halves():
    """On a grid with its rows: every box and half occurs, and nothing else; at other coordinates by counting."""
    coords, found = grid_coords(3, 4), {}
    for kind in ("box", "half"):
        masks = training_mask((4000, 12), kind, seeded(), coords).reshape(-1, 3, 4)
        found[kind] = {tuple(mask.flatten().tolist()) for mask in masks}
    rows, columns = ([(a, b) for a in range(n) for b in range(a, n)] for n in (3, 4))
    boxes = [(a <= y <= b) and (c <= x <= d) for a, b in rows for c, d in columns for y in range(3) for x in range(4)]
    assert found["box"] == {tuple(boxes[i : i + 12]) for i in range(0, len(boxes), 12)}
    halves = [lambda x, y: x < 2, lambda x, y: x >= 2, lambda x, y: y < 1, lambda x, y: y > 1]
    assert found["half"] == {tuple(half(x, y) for x, y in coords.tolist()) for half in halves}
    points = torch.rand(50, 20, 2, generator=seeded(1))
    mask = training_mask((50, 20), "half+box", seeded(2), points)
    for hidden, at in zip(mask[25:], points[25:], strict=True):
        low, high = at[hidden].min(dim=0).values, at[hidden].max(dim=0).values
        assert hidden.any() and torch.equal(hidden, ((low <= at) & (at <= high)).all(dim=1))
    for hidden, at in zip(mask[:25], points[:25], strict=True):
        seen = at[~hidden]
        middle = (at.min(dim=0).values + at.max(dim=0).values) / 2
        assert any(
            ((at[hidden] - middle)[:, axis] * side > 0).all() and ((seen - middle)[:, axis] * side <= 0).all()
            for axis in (0, 1)
            for side in (1, -1)
        )


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-24])
def test_the_extremes_of_the_random_numbers_are_masks(kind, extreme, monkeypatch):
    """The least and the largest number that torch.rand draws: as r they round to 0 and to 1."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, extreme))
    for rows in (1, 16):
        hidden = training_mask((rows, 9), kind).sum(dim=1)
        assert hidden.min() >= 1 and hidden.max() <= 9
        assert hidden[-1] == 1 if extreme else hidden[0] == 9


def test_masked_cross_entropy_by_hand():
    logits = torch.tensor([[[0.0, 0.0], [3.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]]])
    targets, mask = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[True, False], [True, True]])
    hidden = [math.log(2), math.log(1 + math.exp(-1)), math.log(2)]
    assert masked_cross_entropy(logits, targets, mask).item() == pytest.approx(sum(hidden) / 3)
    assert masked_cross_entropy(logits, targets, mask, count=7).item() == pytest.approx(sum(hidden) / 7)
    smooth = masked_cross_entropy(logits, targets, mask, label_smoothing=0.2)
    other = [math.log(2), math.log(1 + math.exp(1)), math.log(2)]  # of the wrong code
    assert smooth.item() == pytest.approx(sum(0.9 * a + 0.1 * b for a, b in zip(hidden, other, strict=True)) / 3)
    soft = torch.rand(2, 2, 2, generator=seeded(1)).softmax(dim=-1)
    expected = -(soft * logits.log_softmax(dim=-1)).sum(dim=-1)[mask].mean()
    torch.testing.assert_close(masked_cross_entropy(logits, soft, mask), expected)


# ---------------------------------------------------------------------------------------------------
# Decoding


def ragged_batch(seed, images=6, tokens=16, codes=5):
    """Random tokens whose rows have different numbers of hidden ones, none and all among them."""
    ids = torch.randint(codes, (images, tokens), generator=seeded(seed))
    mask = torch.stack([torch.rand(tokens, generator=seeded(seed + i)) < i / (images - 1) for i in range(images)])
    return ids, mask


def lazy(step):
    """An order at its own pace that wants the first half of the images' even places, and then nothing."""
    return (step.place % 2 == 0) & (step.image < 3) & (step.step < 3)


def vandal(step):
    """An order that wants all and draws no codes."""
    step.values.fill_(1000)
    return step.values > 0


OWN_PACE = {"entropy", lazy, vandal}


@pytest.mark.parametrize("order", [*ORDERS, lazy, vandal])
@pytest.mark.parametrize("schedule", [*SCHEDULES, lambda r: 1 - r])
@pytest.mark.parametrize(("sample", "steps"), [("categorical", 1), ("argmax", 5), ("categorical", 8), ("argmax", 40)])
def test_decode_keeps_its_promises(order, schedule, sample, steps):
    model, coords, trace = tiny_model(dropout=0.5).train(), grid_coords(4, 4), []
    tokens, mask = ragged_batch(steps)
    inputs, gamma = (tokens.clone(), mask.clone()), SCHEDULES.get(schedule, schedule)
    arguments = {"steps": steps, "schedule": schedule, "order": order, "sample": sample}
    result = decode(model, tokens, mask, coords, generator=seeded(), trace=trace, **arguments)
    assert torch.equal(result[~mask], tokens[~mask]), "given tokens come back unchanged"
    assert result.min() >= 0 and result.max() < model.mask_id, "no [MASK] comes out"
    assert torch.equal(result, decode(model, tokens, mask, coords, generator=seeded(), **arguments)), "same generator"
    other_contents = torch.where(mask, (tokens + 1) % 5, tokens)
    assert torch.equal(result, decode(model, other_contents, mask, coords, generator=seeded(), **arguments))
    assert model.training and torch.equal(tokens, inputs[0]) and torch.equal(mask, inputs[1]), "inputs are left alone"

    start = had = mask.sum(dim=1)
    before = tokens.masked_fill(mask, model.mask_id)
    for t, (now, hidden) in enumerate(trace, start=1):
        committed = before != model.mask_id
        assert torch.equal(now[committed], before[committed]), "a committed token never changes"
        assert torch.equal(hidden, now == model.mask_id)
        scheduled = [math.floor(gamma(t / steps) * n) if t < steps else 0 for n in start.tolist()]
        left, expected = hidden.sum(dim=1), torch.tensor(scheduled).minimum(had - 1).clamp(min=0)
        if order in OWN_PACE:
            assert ((left < had) | (had == 0)).all() and (order != "entropy" or (left <= expected).all())
        else:
            assert torch.equal(left, expected)
        before, had = now, left
    assert len(trace) <= steps and not trace[-1][1].any()


def test_an_order_sees_the_step_and_is_obeyed():
    """What it is told, against the trace; and just the tokens that it wants are committed, with its values."""
    model, coords, trace, told = tiny_model(), grid_coords(4, 4), [], []
    tokens, mask = ragged_batch(2)

    def order(step):
        step.values.copy_((step.place + step.step) % 5)
        step.memory["calls"] = step.memory.get("calls", 0) + 1
        told.append(step._replace(memory=dict(step.memory)))
        return step.place % 3 == step.step % 3

    decode(model, tokens, mask, coords, steps=20, schedule="linear", order=order, trace=trace, generator=seeded())
    before = (tokens.masked_fill(mask, 5), mask)
    for t, (step, (now, hidden)) in enumerate(zip(told, trace, strict=True), start=1):
        assert torch.equal(torch.stack([step.image, step.place]), before[1].nonzero().T)
        with torch.no_grad():
            expected = model(before[0], coords).log_softmax(dim=-1)[step.image, step.place]
        torch.testing.assert_close(step.log_probs, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(step.coords, coords.expand(6, 16, 2)) and step.memory == {"calls": t}
        assert (step.step, step.steps) == (t, 20)
        scheduled = (mask.sum(dim=1) * (1 - t / 20)).floor()
        assert torch.equal(step.left, scheduled.minimum(before[1].sum(dim=1) - 1).clamp(min=0).long())
        wanted = before[1] & (torch.arange(16) % 3 == t % 3)
        open_images = wanted.any(dim=1)
        assert torch.equal((before[1] & ~hidden)[open_images], wanted[open_images])
        assert ((before[1] & ~hidden).sum(dim=1)[~open_images] <= 1).all()
        committed = before[1] & ~hidden
        assert torch.equal(now[committed], ((torch.arange(16) + t) % 5).expand(6, 16)[committed])
        before = (now, hidden)


class FixedMarginals:
    """The same independent distributions whatever is visible; remembers how many images each call has."""

    def __init__(self, probabilities):
        self.log_probabilities = torch.tensor(probabilities).log()
        self.mask_id, self.sizes = self.log_probabilities.shape[-1], []

    def __call__(self, tokens, coords):
        self.sizes.append(len(tokens))
        return self.log_probabilities.expand(len(tokens), -1, -1)


def decode_from_nothing(probabilities, draws=1, **options):
    hidden = torch.ones(draws, len(probabilities), dtype=torch.bool)
    coords = grid_coords(1, len(probabilities))
    return decode(FixedMarginals(probabilities), hidden.long(), hidden, coords, generator=seeded(), **options)


def committed_first(order, probabilities, **options):
    """Which token a deterministic decode of one image commits at each step."""
    trace, t = [], len(probabilities)
    options = {"steps": t, "schedule": "cubic", "sample": "argmax"} | options
    decode_from_nothing(probabilities, order=order, trace=trace, **options)
    masks = [torch.ones(1, t, dtype=torch.bool), *(mask for _, mask in trace)]
    return [(a & ~b).nonzero()[:, 1].tolist() for a, b in itertools.pairwise(masks)]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_decode_draws_from_the_model_at_a_temperature(temperature):
    probabilities = torch.tensor([[0.0, 0.1, 0.2, 0.7, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]])  # what has none is never drawn
    drawn = decode_from_nothing(probabilities.tolist(), 40000, order="random", temperature=temperature)
    expected = probabilities ** (1 / temperature)
    expected /= expected.sum(dim=-1, keepdim=True)
    error = (expected * (1 - expected) / 40000).sqrt()
    assert bool(((F.one_hot(drawn, 5).float().mean(dim=0) - expected).abs() <= 5 * error).all())


def test_confidence_commits_the_most_probable_first():
    probabilities = [[0.6, 0.4], [0.9, 0.1], [0.3, 0.7], [0.2, 0.8]]
    for log_probability in (False, True):
        order = functools.partial(maskgit.by_confidence, choice_temperature=0.0, log_probability=log_probability)
        assert committed_first(order, probabilities) == [[1], [3], [2], [0]]


@pytest.mark.parametrize("log_probability", [False, True])
def test_confidence_is_noisy_at_first_and_not_at_last(log_probability):
    """Ranks of two tokens by (log) probability plus Gumbel noise: the noise's difference is logistic."""
    probabilities, n = torch.tensor([0.9, 0.5]), 20000
    log_probs = torch.stack([probabilities, 1 - probabilities], dim=-1).log().repeat(n, 1)
    image, place = torch.arange(2 * n) // 2, torch.arange(2 * n) % 2
    for t, temperature in ((1, 4.5), (3, 4.5), (3, 1.0), (4, 4.5)):
        step = maskgit.Step(log_probs, torch.zeros_like(image), image, place, None, None, t, 4, seeded(), {})
        priority = maskgit.by_confidence(step, temperature, log_probability).view(n, 2)
        gap = math.log(0.9 / 0.5) if log_probability else 0.9 - 0.5
        noise = temperature * (1 - t / 4)
        expected = 1 / (1 + math.exp(-gap / noise)) if noise else 1.0
        confidence = math.log(0.9) if log_probability else 0.9
        mean = confidence + 0.5772 * noise  # of the first token; Gumbel noise has Euler's constant for its mean
        assert priority[:, 0].mean().item() == pytest.approx(mean, abs=0.05 * noise + 1e-5)
        assert (priority[:, 0] > priority[:, 1]).float().mean().item() == pytest.approx(expected, abs=0.018)


def test_entropy_commits_the_most_uncertain_and_what_the_budget_allows():
    probabilities = [[0.6, 0.4], [0.999, 0.001], [0.3, 0.7], [0.0001, 0.9999], [0.2, 0.8]]
    # In nats 0.673, 0.0079, 0.611, 0.0010 and 0.500: the sum of the small ones counts, 0.0089.
    expected = {0.01: [[0, 1, 3], [2], [4]], 0.0085: [[0, 3], [1, 2], [4]], 0.005: [[0, 3], [2], [4], [1]]}
    for budget, committed in expected.items():
        assert committed_first(functools.partial(maskgit.by_entropy, budget=budget), probabilities) == committed
    assert committed_first("entropy", probabilities) == [[0], [2], [4], [1], [3]]
    uncertain = [[0.5 + 0.01 * i, 0.5 - 0.01 * i] for i in range(8)]  # then the schedule asks for the most certain
    assert committed_first("entropy", uncertain, steps=4, schedule="linear") == [[0, 7], [1, 6], [2, 5], [3, 4]]
    order = functools.partial(maskgit.by_entropy, budget=0.1)
    drawn = decode_from_nothing([[0.995, 0.005], [0.6, 0.4]], 20000, order=order, steps=1).float().mean(dim=0)
    assert drawn.tolist() == pytest.approx([0.005, 0.4], abs=0.002, rel=0.05)


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
    (tokens, mask), traces = ragged_batch(3), ([], [])
    for trace, stop_after in zip(traces, (3, None), strict=True):
        options = {"steps": 10, "order": "confidence", "stop_after": stop_after, "generator": seeded()}
        result = decode(tiny_model(), tokens, mask, grid_coords(4, 4), trace=trace, **options)
        assert (result < 5).all()
    assert len(traces[0]) == 3 and torch.equal(traces[0][1][0], traces[1][1][0])


def test_finished_images_cost_no_more_calls():
    model = FixedMarginals([[0.6, 0.4]] * 4)
    mask = torch.tensor([[True] * 4, [True] + [False] * 3, [False] * 4])
    decode(model, torch.zeros(3, 4, dtype=torch.int64), mask, grid_coords(2, 2), steps=4, order="random")
    assert model.sizes == [2, 1, 1, 1]
    assert not decode(model, torch.zeros(3, 4, dtype=torch.int64), mask & False, grid_coords(2, 2)).any()
    assert len(model.sizes) == 4


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


def test_evidence_is_added_to_the_logits_of_its_own_token():
    """Evidence for one code in each token overrules the model, whichever images are finished."""
    model, tokens, coords = tiny_model(), torch.zeros(3, 6, dtype=torch.int64), grid_coords(2, 3)
    mask = random_mask((3, 6), torch.tensor([0.2, 0.6, 1.0]), seeded())
    wanted = torch.randint(5, (3, 6), generator=seeded(1))
    evidence = 100.0 * F.one_hot(wanted, 5)
    found = decode(model, tokens, mask, coords, order="confidence", steps=4, evidence=evidence, generator=seeded())
    assert torch.equal(found, torch.where(mask, wanted, tokens))


# ---------------------------------------------------------------------------------------------------
# What the functions refuse


def decode_with(**wrong):
    tokens, mask = ragged_batch(0)
    return decode(tiny_model(), **{"tokens": tokens, "mask": mask, "coords": grid_coords(4, 4)} | wrong)


NO_NUMBERS = torch.full((6, 16, 5), math.nan)
ROWS = np.random.default_rng(0).random((9, 3))
REFUSED = [
    ("only 3 of the 150 points are distinct", lambda: kmeans(np.repeat(np.eye(3), 50, axis=0), 4)),
    ("finite", lambda: kmeans(np.array([[0.0], [np.nan]]), 1)),
    ("finite", lambda: kmeans(np.array([[0.0], [np.inf]]), 1)),
    ("shape", lambda: kmeans(np.zeros(5), 1)),
    ("at least 1", lambda: kmeans(np.zeros((5, 2)), 0)),
    (r"init has shape \(2, 3\)", lambda: kmeans(ROWS, 4, init=np.zeros((2, 3)))),
    ("1 channels", lambda: PatchTokenizer(np.zeros((2, 27)), 3).encode(np.zeros((1, 9, 9, 1)))),
    ("10x9", lambda: PatchTokenizer(np.zeros((2, 27)), 3).encode(np.zeros((1, 9, 10, 3)))),
    ("stride 4", lambda: PatchTokenizer(np.zeros((2, 27)), 3, stride=4)),
    ("divisible by 4", lambda: position_encoding(grid_coords(2, 2), 18)),
    ("split, printed", lambda: position_encoding(grid_coords(2, 2), 16, "learned")),
    ("divisible by 4, not 6", lambda: rotary_angles(grid_coords(2, 2), 6)),
    ("pre, post", lambda: tiny_model(norm="none")),
    ("tied, cosine, linear", lambda: tiny_model(head="mlp")),
    ("16 is not divisible by 3 heads", lambda: tiny_model(heads=3)),
    ("cosine head", lambda: tiny_model(head="tied", learn_temperature=True)),
    ("between 0 and 1", lambda: random_mask((2, 4), 1.5)),
    *(("is no mask", functools.partial(training_mask, (6, 100), kind)) for kind in ("sideways", "0.2+", "1.5", "nan")),
    ("unknown order 'raster'", lambda: decode_with(order="raster")),
    (r"an order returned \(1,\)", lambda: decode_with(order=lambda step: step.values[:1])),
    ("unknown schedule 'quadratic'", lambda: decode_with(schedule="quadratic")),
    ("unknown sample 'greedy'", lambda: decode_with(sample="greedy")),
    ("at least 1", lambda: decode_with(steps=0)),
    ("at least 1", lambda: decode_with(stop_after=0)),
    ("argmax", lambda: decode_with(temperature=0.0)),
    ("bool", lambda: decode_with(mask=torch.zeros(6, 16))),
    ("must agree", lambda: decode_with(mask=torch.zeros(6, 15, dtype=torch.bool))),
    ("codes are 0 .. 4", lambda: decode_with(tokens=torch.full((6, 16), 5))),
    ("no numbers", lambda: decode_with(evidence=NO_NUMBERS)),
    ("no numbers", lambda: decode_with(evidence=NO_NUMBERS, order="confidence")),
    ("cannot be split", lambda: train(tiny_model(codes=2), striped_batch, steps=1, accumulate=25)),
    ("needs the coordinates", lambda: training_mask((6, 100), "0.2+half")),
    ("must have one shape", lambda: train(tiny_model(codes=2), growing_batch, steps=2, on_policy=0.5)),
    ("adamw, muon", lambda: train(tiny_model(codes=2), striped_batch, steps=1, optimizer="sgd")),
    ("constant, linear, cosine", lambda: learning_rate_factor(0, 100, 0, "step")),
    ("is no mask", lambda: maskgit.open_run(argparse.Namespace(device="cpu", mask="0.2+1.5"))),
    ("'gpu' cannot be used", lambda: pick_device("gpu")),
    ("'cuda:99' cannot be used", lambda: pick_device("cuda:99")),
    ("nothing to plot", lambda: line_plot({"a": ([1], [-1])}, title="t", x_label="", y_label="", log_y=True)),
]


@pytest.mark.parametrize(("message", "call"), REFUSED, ids=[message for message, _ in REFUSED])
def test_bad_arguments_are_named_in_one_line(message, call):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------
# Training


def striped_batch(step):
    """24 images of one colour each (codes 0 and 1), with very different numbers of hidden tokens."""
    generator = seeded(step)
    tokens = torch.randint(2, (24, 1), generator=generator).expand(24, 9).contiguous()
    return tokens, random_mask(tokens.shape, torch.rand(24, generator=generator), generator), grid_coords(3, 3)


def growing_batch(step):
    tokens = torch.zeros(4, 4 + step, dtype=torch.int64)
    return tokens, tokens == 0, grid_coords(1, 4 + step)


def broken_off_at(stop, error=KeyboardInterrupt):
    def batch(step):
        if step == stop:
            raise error
        return striped_batch(step)

    return batch


def trained(batch=striped_batch, steps=20, **options):
    """The weights of a tiny model after training, and the rows of its log."""
    model = tiny_model(codes=2, dropout=options.pop("dropout", 0.0))
    rows = train(model, batch, steps=steps, **{"lr": 0.01} | options)
    return weights(model), rows


def losses_by_hand(model, step=0):
    """Of each token of a batch."""
    tokens, mask, coords = striped_batch(step)
    log_probs = model(tokens.masked_fill(mask, 2), coords).log_softmax(dim=-1)
    return -log_probs.gather(-1, tokens[..., None])[..., 0], mask


def gradients_by_hand(model):
    losses, mask = losses_by_hand(model)
    return torch.autograd.grad(losses[mask].mean(), list(model.parameters()))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_learns_and_returns_the_log(optimizer, tmp_path):
    out = tmp_path / "new" / "run"
    found, rows = trained(steps=150, log_steps=50, optimizer=optimizer, out=out, warmup=5)
    assert rows[-1]["loss"] < 0.2 < math.log(2)  # what is left: images hidden altogether
    with open(out / "log.csv") as file:
        saved = list(csv.DictReader(file))
    assert [int(row["step"]) for row in saved] == [50, 100, 150] == [row["step"] for row in rows]
    assert [float(row["loss"]) for row in saved] == [row["loss"] for row in rows]
    loaded = load_checkpoint(out / "model.pt")
    assert torch.equal(weights(loaded["model"]), found) and loaded["step"] == 150
    assert not loaded["model"].training and loaded["tokenizer"] is None


def test_first_logged_loss_is_that_of_the_untrained_model():
    losses, mask = losses_by_hand(tiny_model(codes=2))
    assert trained(steps=1)[1][0]["loss"] == pytest.approx(losses[mask].mean().item(), rel=1e-5)
    everywhere = trained(steps=1, every_position=True)[1][0]["loss"]
    assert everywhere == pytest.approx(losses.mean().item(), rel=1e-5)


def test_adamw_step_by_hand():
    """One step of AdamW without clipping moves every weight by lr against the sign of its gradient, plus decay of the
    matrices in the blocks alone."""
    model = tiny_model(codes=2)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    gradients = gradients_by_hand(model)
    train(model, striped_batch, steps=1, lr=0.01, warmup=0, clip=math.inf, weight_decay=0.5)
    in_blocks = {id(parameter) for parameter in model.blocks.parameters() if parameter.ndim == 2}
    for parameter, start, gradient in zip(model.parameters(), before, gradients, strict=True):
        large, decay = gradient.abs() > 1e-5, 0.5 if id(parameter) in in_blocks else 0.0
        expected = start * (1 - 0.01 * decay) - 0.01 * gradient.sign()
        torch.testing.assert_close(parameter.detach()[large], expected[large], rtol=0, atol=2e-5)


def test_muon_steps_are_orthogonal_and_only_for_the_blocks_matrices():
    adamw, muon = maskgit.make_optimizers(tiny_model(), "muon", 0.01, (0.9, 0.95), 0.0)
    assert sum(p.numel() for group in muon.param_groups for p in group["params"]) == 2 * (4 * 16 * 16 + 2 * 16 * 64)
    model = tiny_model(codes=2)
    matrix = model.blocks[0].attention.out.weight
    before, losses_and_mask = matrix.detach().clone(), losses_by_hand(model)
    (gradient,) = torch.autograd.grad(losses_and_mask[0][losses_and_mask[1]].mean(), matrix)
    gradient = torch.linalg.svdvals(gradient)
    train(model, striped_batch, steps=1, lr=0.01, warmup=0, optimizer="muon", weight_decay=0.0)
    step = torch.linalg.svdvals((matrix.detach() - before) / (0.01 * 0.2 * math.sqrt(16)))
    assert gradient[3] / gradient[0] < 0.2 and step[3] / step[0] > 0.5 and 0.6 < step[0] < 1.3


def test_learning_rate_rises_and_falls_and_is_used():
    assert learning_rate_factor(0, 100, 4, "linear") == pytest.approx(1 / 5)
    assert learning_rate_factor(4, 100, 4, "linear") == pytest.approx(1)
    assert learning_rate_factor(52, 100, 4, "linear") == pytest.approx(0.5)
    assert learning_rate_factor(28, 100, 4, "cosine") == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate_factor(0, 100, 0, "constant") == learning_rate_factor(99, 100, 0, "constant") == 1
    rows = trained(steps=6, log_steps=1, lr=0.3, warmup=2)[1]
    assert [row["lr"] for row in rows] == pytest.approx([0.1, 0.2, 0.3, 0.225, 0.15, 0.075])


@pytest.mark.parametrize("accumulate", [1, 5, 24])
def test_accumulated_parts_add_up_to_the_batchs_mean(accumulate):
    """Parts with different numbers of hidden tokens must not be averaged as equals."""
    model, (tokens, mask, coords) = tiny_model(codes=2), striped_batch(0)
    losses, expected = losses_by_hand(model)[0], gradients_by_hand(model)
    total = maskgit.backward(model, tokens.masked_fill(mask, 2), tokens, mask, coords, accumulate)
    assert total.item() == pytest.approx(losses[mask].mean().item(), rel=1e-5)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped():
    norms = [trained(steps=1, clip=clip)[1][0]["gradient_norm"] for clip in (math.inf, 1e-3)]
    assert norms[0] == norms[1] > 0.01
    start = weights(tiny_model(codes=2))
    moves = [(trained(steps=1, warmup=0, clip=c)[0] - start).abs().mean() for c in (math.inf, 1e-9)]
    assert moves[1] < 0.2 * moves[0]  # so small that AdamW's epsilon shows


def test_soft_targets_are_what_training_aims_at():
    hard, sure, even = (
        trained(steps=3, warmup=0, soft_targets=t)[0] for t in (None, torch.eye(2), torch.ones(2, 2) / 2)
    )
    torch.testing.assert_close(hard, sure, rtol=0, atol=1e-4)
    assert (hard - even).abs().max() > 1e-3


def test_moving_average_is_what_comes_out(tmp_path):
    constant = {"decay": "constant", "warmup": 0}
    first, *others = (trained(steps=steps, **constant)[0] for steps in (1, 2, 3))
    found, _ = trained(steps=3, ema=0.8, out=tmp_path, **constant)
    expected = first
    for later in others:
        expected = 0.8 * expected + 0.2 * later
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert torch.equal(weights(load_checkpoint(tmp_path / "model.pt")["model"]), found)


@pytest.mark.parametrize("at_own_coords", [False, True])
@pytest.mark.parametrize("accumulate", [1, 5])
def test_on_policy_rows_are_what_decode_visits(at_own_coords, accumulate):
    """With a model that stays as it is: row by row the states of decode, told the true values, and then a new image."""
    coords, inputs, model = grid_coords(3, 3), [], tiny_model(codes=2)
    if at_own_coords:
        coords = coords + torch.arange(24)[:, None, None]

    def batch(step):
        tokens = torch.randint(2, (24, 9), generator=seeded(step))
        return tokens, random_mask(tokens.shape, 0.6, seeded(step)), coords + step if at_own_coords else coords

    hook = model.register_forward_pre_hook(lambda _, args: inputs.append([args[0], args[1].expand(*args[0].shape, 2)]))
    order = functools.partial(maskgit.by_entropy, budget=1.5)
    train(model, batch, steps=9, lr=0.0, on_policy=0.25, policy=order, accumulate=accumulate)
    hook.remove()
    shown, at = (torch.cat(parts).reshape(9, 24, 9, -1) for parts in zip(*inputs, strict=True))
    fresh = [batch(step)[0].masked_fill(batch(step)[1], 2) for step in range(9)]
    assert all(torch.equal(shown[step, :18, :, 0], fresh[step][:18]) for step in range(9))
    for row in range(18, 24):
        step = 0
        while step < 9:
            one, (tokens, mask, where) = slice(row, row + 1), batch(step)
            tokens, mask, where = tokens[one], mask[one], where[one] if at_own_coords else where
            trace = [(fresh[step][one], mask)]

            def follow(visit, tokens=tokens):
                visit.values.copy_(tokens[0, visit.place])
                return order(visit)

            decode(model.eval(), tokens, mask, where, steps=9, order=follow, trace=trace)
            for state, _ in trace[:-1][: 9 - step]:
                assert torch.equal(shown[step, row, :, 0], state[0]), (row, step)
                assert torch.equal(at[step, row], where[0] if at_own_coords else where)
                step += 1


ON_POLICY = {"on_policy": 0.5, "accumulate": 3}


@pytest.mark.parametrize("options", [{}, {"ema": 0.9, "optimizer": "muon", "accumulate": 3}, ON_POLICY])
def test_resumed_run_is_bit_identical(options, tmp_path):
    """With dropout, after a run that broke off between two checkpoints and two rows of the log."""
    options = {"log_steps": 6, "checkpoint_steps": 4, "config": {"dim": 16}, "dropout": 0.1} | options
    undisturbed, rows = trained(**options)
    assert not torch.equal(undisturbed, trained(seed=1, **options)[0]), "dropout follows the seed"
    with pytest.raises(KeyboardInterrupt):
        trained(broken_off_at(11), out=tmp_path, **options)
    assert load_checkpoint(tmp_path / "model.pt")["step"] == 8
    resumed, resumed_rows = trained(out=tmp_path, resume=True, **options)
    assert torch.equal(resumed, undisturbed)
    assert [row["loss"] for row in resumed_rows] == [row["loss"] for row in rows]
    with open(tmp_path / "log.csv") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [6, 12, 18, 20]


def test_ctrl_c_finishes_the_step_and_saves(tmp_path):
    """A real signal in the middle of step 7; the resumed run ends as the undisturbed one does. A second one is at
    once. Afterwards Ctrl-C is what it was."""

    def signalled(times, step):
        for _ in range(times if step == 6 else 0):
            signal.raise_signal(signal.SIGINT)
        return striped_batch(step)

    signal.signal(signal.SIGINT, before := signal.default_int_handler)  # a background job's is to ignore it
    options = {"steps": 10, "dropout": 0.1, "out": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        trained(functools.partial(signalled, 2), **options)
    assert not (tmp_path / "run").exists()
    with pytest.raises(KeyboardInterrupt):
        trained(functools.partial(signalled, 1), **options)
    assert load_checkpoint(tmp_path / "run" / "model.pt")["step"] == 7
    resumed, _ = trained(resume=True, **options)
    assert torch.equal(resumed, trained(steps=10, dropout=0.1)[0])
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(sys.platform == "win32", reason="folders are not locked on this system")
def test_a_second_run_into_the_same_folder_is_refused(tmp_path, monkeypatch):
    def begins_another(step):
        if step == 1:
            with pytest.raises(ValueError, match="another run is writing"):
                trained(steps=2, out=tmp_path)
        return striped_batch(step)

    trained(begins_another, steps=3, out=tmp_path)
    assert load_checkpoint(tmp_path / "model.pt")["step"] == 3
    trained(steps=2, out=tmp_path)  # free again
    assert load_checkpoint(tmp_path / "model.pt")["step"] == 2

    def no_locks(*_):
        raise OSError("Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)  # of this file system
    trained(steps=4, out=tmp_path)
    assert load_checkpoint(tmp_path / "model.pt")["step"] == 4


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_the_best_validated_model_is_kept(ema, tmp_path):
    """The figures 3, 1, 2, 1.5 make the second row's model the result, also of a run that was broken off after it."""
    seen = []

    def validate(model):
        assert not model.training
        seen.append(weights(model).clone())
        return {"figure": [3.0, 1.0, 2.0, 1.5][len(seen) - 1]}

    options = {"steps": 8, "log_steps": 2, "ema": ema, "validate": validate, "best_by": "figure"}
    found, _ = trained(**options)
    best = seen[1]
    assert torch.equal(found, best) and not torch.equal(best, seen[3])
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        trained(broken_off_at(7), out=tmp_path, checkpoint_steps=6, **options)
    assert torch.equal(weights(load_checkpoint(tmp_path / "model.pt")["model"]), best)
    found, _ = trained(out=tmp_path, resume=True, **options)
    assert torch.equal(found, best) and len(seen) == 4
    assert torch.equal(weights(load_checkpoint(tmp_path / "model.pt")["model"]), best)


def test_resume_refuses_another_configuration_and_no_checkpoint(tmp_path):
    def refused(message, contents=None, **options):
        if contents is not None:
            save_checkpoint(tmp_path / "model.pt", tiny_model(codes=2), **contents)
        with pytest.raises(ValueError, match=message):
            trained(steps=2, out=tmp_path, resume=True, **options)

    refused("no checkpoint")
    trained(steps=2, out=tmp_path, config={"lr": 0.1})
    refused("lr=0.1, not 0.2", config={"lr": 0.2})
    refused("no training that fits", contents={"training": {"model": {}}})
    refused("no training that fits", contents={})


def test_loss_that_is_no_number_stops_and_keeps_the_checkpoint(tmp_path):
    model = tiny_model(codes=2)

    def poisoned(step):
        if step == 5:
            torch.nn.init.constant_(model.embedding.weight, math.nan)
        return striped_batch(step)

    with pytest.raises(ValueError, match="no longer finite at step 6"):
        train(model, poisoned, steps=20, log_steps=2, checkpoint_steps=2, out=tmp_path)
    for options in ({"log_steps": 1}, {}):  # the loss still was finite, before the update
        with pytest.raises(ValueError, match="no longer finite at step 1;"):
            trained(steps=1 + len(options), lr=math.inf, warmup=0, decay="constant", out=tmp_path, **options)
    loaded = load_checkpoint(tmp_path / "model.pt")
    assert loaded["step"] == 4 and weights(loaded["model"]).isfinite().all()


def test_bf16_trains_close_to_float32():
    exact, near = (trained(steps=30, log_steps=30, precision=p)[1][0]["loss"] for p in ("float32", "bf16"))
    assert near == pytest.approx(exact, rel=0.05) and near != exact


@pytest.mark.parametrize("function", ["torch.save", "os.fsync", "os.replace"])
def test_checkpoint_is_replaced_whole(function, tmp_path, monkeypatch):
    def disk_full(*_):
        raise OSError("No space left on device")

    path = tmp_path / "model.pt"
    save_checkpoint(path, tiny_model(), step=1)
    monkeypatch.setattr(function, disk_full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, tiny_model(), step=2)
    assert load_checkpoint(path)["step"] == 1 and list(tmp_path.iterdir()) == [path]


class Malicious:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_damaged_checkpoints_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, model = tmp_path / "model.pt", tiny_model()
    save_checkpoint(path, model)
    whole, contents = path.read_bytes(), torch.load(path)
    weight = whole.index(model.embedding.weight.detach().numpy().tobytes())
    flipped = whole[:weight] + bytes([whole[weight] ^ 1]) + whole[weight + 1 :]
    damaged = [b"", whole[: len(whole) // 2], b"not a checkpoint", flipped]
    others = [
        Malicious(),
        [1, 2],
        {"weights": 1},
        contents | {"architecture": {"codes": 5}},
        contents | {"weights": {}},
    ]
    for wrong in damaged + others:
        path.write_bytes(wrong) if isinstance(wrong, bytes) else torch.save(wrong, path)
        with pytest.raises(ValueError, match="model.pt is damaged or no checkpoint") as error:
            load_checkpoint(path)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "owned").exists()
    with pytest.raises(ValueError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "missing.pt")


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
    """Between the first network call and the last; an order at its own pace asks how many tokens are left."""
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
# For the scripts


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
print(given_back, min(faults() for _ in range(5)))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    given_back, kept = map(int, run.stdout.split())
    assert kept < given_back / 10


def test_seeds_repeat_and_the_cpu_is_a_device():
    draws = []
    for _ in range(2):
        seed_everything(3)
        draws.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert draws[0] == draws[1]
    assert pick_device("cpu").type == "cpu" and pick_device().type in ("cpu", "cuda")


def test_image_grid_puts_each_image_in_its_place(tmp_path):
    images = np.arange(6).reshape(6, 1, 1, 1) / 10 * np.ones((6, 2, 3, 1))
    sheet = np.asarray(image_grid(images, 4, scale=5, gap=2))
    assert sheet.shape == (2 * 12 + 2, 4 * 17 + 2, 3)
    for i in range(6):
        top, left = 2 + i // 4 * 12, 2 + i % 4 * 17
        assert (sheet[top : top + 10, left : left + 15] == round(i / 10 * 255)).all()
    assert (sheet[:2] == maskgit.FRAME).all() and (sheet[14:, 36:] == maskgit.FRAME).all()
    colour = np.zeros((1, 1, 1, 3)) + [1, 0.5, 0]
    assert np.asarray(image_grid(colour, 1, titles=["orange"]))[-5, 4].tolist() == [255, 128, 0]
    save_gif(tmp_path / "a.gif", [Image.new("RGB", (4, 4), (60 * i, 0, 0)) for i in range(4)])
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 4 and gif.info["loop"] == 0


def test_axis_ticks_are_round_and_inside():
    def ticks(low, high, log=False):
        return maskgit.axis([low, high], 0, 100, log)[1]

    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(3, 7000, True) == [10, 100, 1000] and ticks(1, 64, True) == [1, 2, 5, 10, 20, 50]
    assert ticks(0.21, 0.45, True) == pytest.approx([0.25, 0.3, 0.35, 0.4, 0.45])
    position, _ = maskgit.axis([1, 100], 200, 0, True)
    assert position(1) == 200 and position(10) == pytest.approx(100) and position(100) == 0
    for low, high in ((0.2, 0.21), (-3, 12345), (5, 5)):
        found = ticks(low, high)
        assert 2 <= len(found) <= 7 and min(low, 4.5) <= min(found) and max(found) <= max(high, 5.5) + 1e-9


def test_line_plot_draws_the_curve_where_it_belongs():
    labels = {"title": "t", "x_label": "x", "y_label": "y"}
    picture = line_plot({"flat": ([0, 1], [0.5, 0.5])}, references={"a": 0, "b": 1}, **labels)
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    blue = (np.abs(pixels - [0, 0x72, 0xB2]).sum(axis=-1) < 60)[:, 80:650].nonzero()
    assert abs(np.median(blue[0]) - (60 + 468) / 2) <= 2 and blue[1].max() - blue[1].min() > 560
    shown = {"a": ([1, 2], [1.0, 10.0])}
    hidden = {"a": ([1, 2, 3, 0], [1.0, 10.0, math.nan, -1]), "nothing to show": ([1], [-1])}
    assert (
        len(
            {
                line_plot(c, references=r, log_y=True, **labels).tobytes()
                for c in (shown, hidden)
                for r in ({}, {"0": 0.0})
            }
        )
        == 1
    )


# ---------------------------------------------------------------------------------------------------
# train_squares.py: the prior, its posterior, scores, completions

SQUARES = train_squares.all_squares(8, 2, 5)
EXACT = train_squares.ExactModel(SQUARES)


@pytest.mark.parametrize(("sides", "count"), [((2, 5), 126), ((2, 6), 135), ((1, 4), 174)])
def test_number_of_squares(sides, count):
    prior = train_squares.all_squares(8, *sides)
    assert prior.shape == (count, 64) and len({tuple(image) for image in prior.tolist()}) == count
    for image in prior.reshape(-1, 8, 8):
        ys, xs = image.nonzero().T
        side = int(ys.max() - ys.min()) + 1
        assert side == xs.max() - xs.min() + 1 and image.sum() == side**2 and sides[0] <= side <= sides[1]


def test_posterior_equals_counting():
    tokens = SQUARES[torch.randint(126, (40,), generator=seeded())]
    mask = training_mask(tokens.shape, "cosine", seeded(1))
    mask[0] = True
    found = train_squares.posterior(SQUARES, tokens, mask)
    for row in range(40):
        visible = [(p, int(tokens[row, p])) for p in range(64) if not mask[row, p]]
        agreeing = [image for image in SQUARES.tolist() if all(image[p] == colour for p, colour in visible)]
        assert found[row].numpy() == pytest.approx(np.mean(agreeing, axis=0))
    torch.testing.assert_close(found[0], SQUARES.float().mean(dim=0))


def test_scores_are_expectations_over_the_posterior():
    """An untrained model's loss is its mean over images as they are drawn; the posterior's is at the known limit."""
    model = tiny_model(codes=2)
    result = train_squares.score(model, SQUARES, "cosine", 4096, 1)
    tokens = SQUARES[torch.randint(126, (4096,), generator=seeded(2))]
    mask = training_mask(tokens.shape, "cosine", seeded(3))
    with torch.no_grad():
        log_probs = model(tokens.masked_fill(mask, 2), grid_coords(8, 8)).log_softmax(dim=-1)
    drawn = -log_probs.gather(-1, tokens[..., None])[..., 0][mask]
    assert result["cross_entropy"] == pytest.approx(drawn.mean().item(), rel=0.02)
    correct = (log_probs.argmax(dim=-1) == tokens)[mask].float().mean().item()
    assert result["accuracy"] == pytest.approx(correct, abs=0.02)
    model.forward = lambda tokens, coords: EXACT(tokens, coords).clamp(min=-50)
    exact = train_squares.score(model, SQUARES, "cosine", 4096, 1)
    assert exact["kl"] == pytest.approx(0, abs=1e-6) == exact["accuracy"] - exact["posterior_accuracy"]
    assert exact["limit"] == pytest.approx(0.216, abs=0.006) and exact["accuracy"] == pytest.approx(0.910, abs=0.004)
    assert train_squares.score(model, SQUARES, "single", 4096, 1)["accuracy"] > 0.99


def test_cosine_heads_limit_by_brute_force():
    """No pair of similarities in [-1, 1] does better on any pixel."""
    white = train_squares.test_set(SQUARES, "cosine", 200, train_squares.TEST_SEED)[2]
    difference = torch.linspace(-2, 2, 401)[:, None]
    best = (white * F.softplus(-difference) + (1 - white) * F.softplus(difference)).amin(dim=0).mean().item()
    assert train_squares.cosine_head_limit(SQUARES, "cosine", 200) == pytest.approx(best, abs=1e-4)


def test_epochs_show_every_image_as_often_and_batches_spread_their_masks():
    settings = argparse.Namespace(grid=8, seed=3, batch_size=50, presentations=2, mask="cosine")
    batch, again = (train_squares.make_batch(SQUARES, settings) for _ in range(2))
    shown = torch.cat([batch(step)[0] for step in range(126)])  # 6300 images: 25 epochs of 252
    for images, times in ((shown, 50), (shown[:252], 2)):
        assert ((images[:, None] == SQUARES).all(dim=-1).sum(dim=0) == times).all()
    assert all(map(torch.equal, batch(7), again(7))) and not torch.equal(shown[:252], shown[252:504])
    other = train_squares.make_batch(SQUARES, argparse.Namespace(**vars(settings) | {"seed": 4}))
    assert not any(map(torch.equal, batch(7)[:2], other(7)[:2]))
    gamma = [64 * math.cos(math.pi / 2 * i / 50) for i in range(51)]
    for i, hidden in enumerate(batch(7)[1].sum(dim=1).tolist()):
        assert gamma[i + 1] <= hidden <= math.ceil(gamma[i])


def test_total_variation_by_hand():
    found = torch.tensor([[5 / 8, 2 / 8, 0], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)  # 1 / 8 is no image at all
    truth = torch.tensor([[1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    expected = (abs(5 / 8 - 1 / 2) + abs(2 / 8 - 1 / 2) + 1 / 8) / 2
    assert train_squares.total_variation(found, truth) == pytest.approx(expected / 2)


def nothing_visible(prior):
    return train_squares.completion_inputs(prior)["nothing"]


def test_completions_are_scored_exactly():
    """Three pixels per step, row by row: the product of the images' shares, by counting."""
    prior, chance = train_squares.all_squares(3, 1, 2), {}
    for target in prior.tolist():
        chance[tuple(target)], known = 1.0, 0
        while known < 9:
            agreeing = [image for image in prior.tolist() if image[:known] == target[:known]]
            for pixel in range(known, known + 3):
                chance[tuple(target)] *= np.mean([image[pixel] == target[pixel] for image in agreeing])
            known += 3
    p, n = np.array(list(chance.values())), len(prior)
    options = {"order": lambda step: -step.place.float(), "steps": 3, "schedule": "linear"}
    arguments = train_squares.ExactModel(prior), prior, *nothing_visible(prior), "cpu", options
    result = train_squares.judge(*arguments, 20)
    assert result["valid"] == pytest.approx(p.sum()) and result["kl"] == pytest.approx(-np.log(p * n).mean())
    assert result["total_variation"] == pytest.approx((np.abs(p - 1 / n).sum() + 1 - p.sum()) / 2)
    assert result["calls"] == pytest.approx(3) == result["most_calls"] and "draws" not in result
    left = prior[:1], torch.tensor([[False] + [True] * 8])  # a corner is white: 1x1, or 2x2 with two pixels at once
    corner = train_squares.judge(*arguments[:2], *left, *arguments[4:], 20)
    assert corner["valid"] == pytest.approx(1 / 4 + 1 / 4) and corner["total_variation"] == pytest.approx(1 / 2)


@pytest.mark.parametrize(("order", "steps"), [(maskgit.by_halton, 12), (maskgit.by_entropy, 10)])
def test_exact_and_counted_completions_agree(order, steps):
    n, arguments = 4000, (EXACT, SQUARES, *nothing_visible(SQUARES), "cpu")
    counted = {"order": lambda step: (step.values.sum(), order(step))[1], "steps": steps}
    exact, by_draws = (train_squares.judge(*arguments, o, n) for o in ({"order": order, "steps": steps}, counted))
    assert "kl" in exact and by_draws["draws"] == 32 * 126 >= n and 0.3 < exact["valid"] < 0.95
    assert abs(exact["valid"] - by_draws["valid"]) < 4 * math.sqrt(exact["valid"] * (1 - exact["valid"]) / n)
    assert abs(exact["calls"] - by_draws["calls"]) < 0.2
    distance = by_draws["total_variation"] - exact["total_variation"]
    assert -0.01 < distance < by_draws["exact_sampling"] == pytest.approx(0.0709, abs=0.003)


def test_completions_with_the_posteriors_marginals():
    """The entropy order samples the squares exactly, in few calls. Orders that need drawn numbers are counted."""
    options = {"order": maskgit.by_entropy}
    for given, (tokens, mask) in train_squares.completion_inputs(SQUARES).items():
        result = train_squares.judge(EXACT, SQUARES, tokens, mask, "cpu", options, 20)
        assert result["valid"] == pytest.approx(1) and result["total_variation"] < 1e-6 > result["kl"], given
        assert result["calls"] < 9 and result["most_calls"] <= 20
    masks = {given: mask for given, (_, mask) in train_squares.completion_inputs(SQUARES).items()}
    assert (masks["random half"].sum(dim=1) == 32).all() and len(masks["random half"].unique(dim=0)) > 100
    for given, half in (("left half", (..., slice(4))), ("bottom half", (..., slice(4, 8), slice(None)))):
        expected = torch.ones(126, 8, 8, dtype=torch.bool)
        expected[half] = False
        assert torch.equal(masks[given].reshape(126, 8, 8), expected)


def test_inputs_that_show_the_same_count_as_often_as_there_are():
    """Of the four 1x1 squares on 2x2 the top row is hidden: two show black, where a guess is right by half."""
    prior, mask = train_squares.all_squares(2, 1, 1), torch.tensor([[True, True, False, False]]).expand(4, 4)
    order = {"order": lambda step: -step.place.float(), "steps": 1}  # at once: white and white, too
    counted = {"order": lambda step: 0 * step.values.float(), "steps": 1}
    for options in (order, counted):
        result = train_squares.judge(train_squares.ExactModel(prior), prior, prior, mask, "cpu", options, 40000)
        assert result["valid"] == pytest.approx((0.5 + 0.5 + 1 + 1) / 4, abs=0.01)
        assert result["total_variation"] == pytest.approx((0.5 + 0.5) / 4, abs=0.01)
    assert result["exact_sampling"] < 0.01
    entropy = {"order": maskgit.by_entropy}
    result = train_squares.judge(train_squares.ExactModel(prior), prior, prior, mask, "cpu", entropy, 20)
    assert result["calls"] == pytest.approx((2 + 2 + 1 + 1) / 4) and result["valid"] == pytest.approx(1)
    arguments = EXACT, SQUARES, *nothing_visible(SQUARES), "cpu"
    paper, at_random = (
        train_squares.judge(*arguments, {"order": train_squares.ORDERS[name], "steps": 16}, 1000)
        for name in ("confidence", "random")
    )
    assert 0.70 < paper["valid"] < 0.88 and paper["calls"] == 16 and {"draws", "exact_sampling"} <= paper.keys()
    assert "draws" in at_random and "kl" not in at_random


def test_samplers_of_the_literature_by_hand():
    samplers = runpy.run_path(str(HERE / "benchmarks" / "samplers.py"))
    # Entropies of 0.673, 0.0079, 0.611, 0.0010 and 0.500 nats.
    probabilities = [[0.6, 0.4], [0.999, 0.001], [0.3, 0.7], [0.0001, 0.9999], [0.2, 0.8]]
    expected = {"each_below": [[0, 1, 3], [2], [4]], "entropy_bounded": [[1, 3, 4], [2], [0]]}
    expected |= {"margin": [[3], [1], [4], [2], [0]], "threshold": [[1, 3], [4], [2], [0]]}
    expected |= {"klass": [[3], [1], [4], [2], [0]]}  # at first nothing is known to be stable
    assert {name: committed_first(samplers[name], probabilities) for name in expected} == expected
    lower = functools.partial(samplers["threshold"], probability=0.75)
    assert committed_first(lower, probabilities) == [[1, 3, 4], [2], [0]]
    halton, rolled = (committed_first(order, [[0.5, 0.5]] * 9) for order in ("halton", samplers["rolled_halton"]))
    assert rolled != halton and rolled in [halton[start:] + halton[:start] for start in range(9)]
    trace, (a, b) = [], (sum(p ** (1 + 1 / 2.25) for p in pair) for pair in ((0.9, 0.1), (0.5, 0.5)))
    decode_from_nothing([[0.9, 0.1], [0.5, 0.5]], 20000, order=samplers["moment"], steps=2, trace=trace)
    assert (~trace[0][1]).float().mean(dim=0).tolist() == pytest.approx([a / (a + b), b / (a + b)], abs=0.015)
    explained = samplers["explained"]
    tokenizer = train_rectangles.fit_tokenizer(0)
    tokens = tokenizer.nearest(
        train_rectangles.coverage(train_rectangles.draw_rectangles(6, 1), train_rectangles.GRID_POINTS)
    )
    broken = tokens.copy()
    broken[:, 80] = (broken[:, 80] + 1) % 20
    assert explained(tokens, tokenizer).mean() > 0.8 and not explained(broken, tokenizer, 300).any()


def test_presets_and_the_ablation_carry_the_sources_numbers(monkeypatch):
    def settings(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_squares.py", "--preset", *arguments])
        return train_squares.parse_arguments()

    one, two = settings("post1"), settings("post2", "--lr", "0.001")
    assert (one.dim, one.hidden, one.layers, one.heads, one.dropout) == (768, 3072, 6, 8, 0.1)
    assert (one.norm, one.head, one.positions, one.batch_size, one.steps) == ("post", "cosine", "printed", 126, 300)
    assert (two.dim, two.hidden, two.layers, two.heads, two.min_side, two.max_side) == (640, 1600, 6, 8, 1, 4)
    assert two.steps == 300 * 40 and two.mask == "0.2" and two.lr == 0.001
    assert settings("post2", "--steps", "7").steps == 7
    recipe, variants = train_squares.S1_RECIPE, train_squares.ablation_variants()
    changed = {name: sum(recipe[key] != value for key, value in v.items()) for name, v in variants.items()}
    assert changed["S1"] == 0 and changed["S1 + temperature"] == changed["S1 + linear head"] == 1
    assert changed["all repairs"] == 4 and changed["all but pre-norm, warm-up"] == 2


# ---------------------------------------------------------------------------------------------------
# train_rectangles.py: rectangles, tokens, the posterior


@pytest.fixture(scope="module")
def tokenizer():
    return train_rectangles.fit_tokenizer(0)


def test_rectangles_are_uniform_corners_with_room_between():
    for task in ("grid", "sparse"):
        rectangles = train_rectangles.draw_rectangles(5000, 0, task)
        sides = rectangles[:, 2:] - rectangles[:, :2]
        assert rectangles.min() >= 0 and rectangles.max() <= 16 and sides.min() >= 2
        # The distance of two uniform numbers in [0, 16], if it is at least 2, has the mean below.
        assert sides.mean() == pytest.approx(2 + 14 / 3, abs=0.15)
        assert (rectangles * 16 == np.rint(rectangles * 16)).all() == (task == "grid")


def test_point_samplings():
    rng = np.random.default_rng(0)
    rectangles = train_rectangles.draw_rectangles(300, rng, "sparse")
    edges, cornerless = (train_rectangles.draw_points(s, rectangles, 8, rng) for s in ("edges", "cornerless"))
    mixed = np.abs(train_rectangles.coverage(rectangles, edges).mean(axis=-1) - 0.5) < 0.5  # neither 0 nor 1
    assert mixed[:, ::2].mean() > 0.99 and mixed[:, 1::2].mean() < 0.7
    for (x0, y0, x1, y1), points in zip(rectangles, cornerless, strict=True):
        for (x, y), corner_x, corner_y in itertools.product(points, (x0, x1), (y0, y1)):
            assert not (x < corner_x < x + 4 and y < corner_y < y + 4)
    assert np.minimum(edges, cornerless).min() >= 0 and np.maximum(edges, cornerless).max() <= 12


def test_coverage_equals_an_integration_on_8192_points_and_images_256_downsampled_pixels():
    rng = np.random.default_rng(0)
    rectangles, points = train_rectangles.draw_rectangles(6, rng, "sparse"), rng.random((6, 5, 2)) * 12
    exact = train_rectangles.coverage(rectangles, points).reshape(6, 5, 4, 4)
    halves = (np.arange(8192) + 0.5) / 8192
    for image, point, row, column in itertools.product(range(6), range(5), range(4), range(4)):
        x0, y0, x1, y1 = rectangles[image]
        x, y = points[image, point] + (column, row)
        inside_x = ((x0 < x + halves) & (x + halves < x1)).mean()
        inside_y = ((y0 < y + halves) & (y + halves < y1)).mean()
        assert exact[image, point, row, column] == pytest.approx(inside_x * inside_y, abs=3e-4)
    rectangles = train_rectangles.draw_rectangles(4, 0)
    for (x0, y0, x1, y1), image in zip(rectangles * 16, train_rectangles.draw_images(rectangles), strict=True):
        large = np.zeros((256, 256))
        large[int(y0) : int(y1), int(x0) : int(x1)] = 1
        np.testing.assert_allclose(image[:, :, 0], large.reshape(16, 16, 16, 16).mean(axis=(1, 3)), atol=1e-6)


def test_codebook_is_that_of_the_sources_rectangles_and_sparse_tokens_are_the_grids(tokenizer):
    assert tokenizer.centroids.shape == (20, 16) and (tokenizer.patch, tokenizer.stride) == (4, 1)
    images = train_rectangles.draw_images(train_rectangles.draw_rectangles(100, [0, 0]))
    patches = maskgit.image_patches(images, 4, 1).reshape(-1, 16)
    labels = tokenizer.nearest(patches)
    for code, centroid in enumerate(tokenizer.centroids):  # each is the mean of what it stands for
        np.testing.assert_allclose(centroid, patches[labels == code].mean(axis=0), atol=0.05)
    rectangles = train_rectangles.draw_rectangles(50, 1, "sparse")
    grid = tokenizer.encode(train_rectangles.draw_images(rectangles)).reshape(50, 169)
    assert (tokenizer.nearest(train_rectangles.coverage(rectangles, train_rectangles.GRID_POINTS)) == grid).all()
    chosen = np.tile([[3.0, 0.0], [12.0, 7.0]], (50, 1, 1))
    assert (tokenizer.nearest(train_rectangles.coverage(rectangles, chosen)) == grid[:, [3, 7 * 13 + 12]]).all()


def test_soft_targets_weigh_codes_by_distance():
    centroids = np.array([0.0, 0.3, 2.0])
    weights = np.exp(-(((centroids[:, None] - centroids) / 0.5) ** 2))
    targets = train_rectangles.soft_targets(PatchTokenizer(centroids[:, None], patch=1), 0.5)
    np.testing.assert_allclose(targets, weights / weights.sum(axis=1, keepdims=True), atol=1e-6)


def test_batches_depend_on_the_step_alone(tokenizer):
    settings = argparse.Namespace(task="sparse", seed=3, batch_size=6, rectangles=None, points=[5], mask="0.2")
    settings.sampling, settings.fixed_points = "uniform", False
    first, second = (train_rectangles.make_batch(tokenizer, settings) for _ in range(2))
    for step in (4, 0):
        assert all((a == b).all() for a, b in zip(first(step), second(step), strict=True))
    other = train_rectangles.make_batch(tokenizer, argparse.Namespace(**vars(settings) | {"seed": 4}))
    for different in (first(1), other(0)):
        assert not any(map(torch.equal, first(0), different))
    several = train_rectangles.make_batch(tokenizer, argparse.Namespace(**vars(settings) | {"points": [4, 16]}))
    counts = [several(step)[0].shape[1] for step in range(200)]
    few = sum(count < 8 for count in counts)  # half of them, on a log scale
    assert {4, 16} < set(counts) <= set(range(4, 17)) and 80 < few < 120
    settings.rectangles = 2  # of 2 rectangles, whatever the step, there are two pictures and two sets of fixed points
    for settings.task, settings.fixed_points, shown in (("grid", False, 0), ("sparse", True, 2)):
        batch = train_rectangles.make_batch(tokenizer, settings)
        assert len({str(row) for step in range(5) for row in batch(step)[shown].tolist()}) == 2


def test_posterior_equals_rejection_sampling_and_of_everything_hidden_is_the_prior(tokenizer):
    """Draw from the prior, keep what agrees with the visible tokens: slow, but the definition of the posterior."""
    truth, prior = (train_rectangles.draw_rectangles(count, count, "sparse") for count in (3, 100_000))
    test = train_rectangles.make_test("sparse", truth, tokenizer, points=5, mask="0.5", proposals=15_000, seed=1)
    posterior = iter(test.posterior.numpy())
    for points, tokens, mask in zip(test.points, test.tokens, test.mask, strict=True):
        drawn = tokenizer.nearest(train_rectangles.coverage(prior, points))
        agreeing = drawn[(drawn == tokens)[:, ~mask].all(axis=1)]
        assert len(agreeing) > 200
        for position in np.flatnonzero(mask):
            expected = np.bincount(agreeing[:, position], minlength=20) / len(agreeing)
            assert np.abs(next(posterior) - expected).sum() / 2 < 0.1
    # With a single, hidden patch the chain reaches the prior whatever it starts from. Two uniform corners in [0, 16] at
    # least 2 apart are both in [4, 16], on an axis, with the probability (10 / 14)^2; one such axis leaves it empty.
    truth, points = np.tile([[0.0, 0.0, 16.0, 16.0]], (40, 1)), np.zeros((40, 1, 2))
    rng, mask = np.random.default_rng(0), np.ones((40, 1), dtype=bool)
    chain = train_rectangles.posterior_chain(truth, points, mask, tokenizer, rng, "sparse")
    states = np.concatenate([state.copy() for state, _ in itertools.islice(chain, 1000, 3000, 10)])
    empty = (train_rectangles.coverage(states, points[0]).sum(axis=(1, 2)) == 0).mean()
    assert empty == pytest.approx(1 - (1 - (10 / 14) ** 2) ** 2, abs=0.04)


@pytest.mark.parametrize(("task", "count", "proposals"), [("sparse", 60, 2000), ("grid", 20, 200)])
def test_the_posterior_agrees_with_what_is_visible_and_is_the_limit(task, count, proposals, tokenizer, monkeypatch):
    rectangles = train_rectangles.draw_rectangles(count, 5, task)
    test = train_rectangles.make_test(task, rectangles, tokenizer, proposals=proposals)
    drawn = tokenizer.nearest(train_rectangles.coverage(test.draws, test.points))
    assert (drawn == test.tokens)[~test.mask].all() and not np.array_equal(test.draws, rectangles)
    assert (test.draws * 16 == np.rint(test.draws * 16)).all() == (task == "grid")
    assert (test.posterior.sum(dim=1) - 1).abs().max() < 1e-5
    monkeypatch.setattr(train_rectangles, "hidden_log_probs", lambda *_: test.posterior.log().clamp(min=-50))
    perfect, codes = train_rectangles.score(None, test), test.tokens[test.mask]
    assert perfect["cross_entropy"] == pytest.approx(perfect["limit"], rel=1e-5)
    assert perfect["accuracy"] == perfect["posterior_accuracy"]
    assert perfect["commonest"] == pytest.approx(max(np.mean(codes == code) for code in range(20)))
    assert perfect["hits"] == perfect["posterior_hits"] == pytest.approx(perfect["accuracy"], abs=0.08)
    monkeypatch.setattr(train_rectangles, "hidden_log_probs", lambda *_: torch.full_like(test.posterior, 0.05).log())
    assert train_rectangles.score(None, test)["cross_entropy"] == pytest.approx(math.log(20), rel=1e-5)


def test_picture_errors_by_hand(tokenizer, monkeypatch):
    test = train_rectangles.make_test("grid", train_rectangles.draw_rectangles(2, 0), tokenizer, mask="half")
    assert test.mask.reshape(2, 13, 13).tolist() == [[[True] * 6 + [False] * 7] * 13] * 2
    drawn, likeliest = np.random.default_rng(0).integers(20, size=(2, 2, 169))
    monkeypatch.setattr(train_rectangles, "fill", lambda *_, sample=None: likeliest if sample else drawn)
    found, errors = train_rectangles.score_pictures(None, test, tokenizer), {}
    posterior = tokenizer.nearest(train_rectangles.coverage(test.draws, train_rectangles.GRID_POINTS))
    filled = {"drawn": drawn, "posterior": posterior, "likeliest": likeliest, "tokenizer": test.tokens}
    for name, tokens in filled.items():
        sheets = np.full((169, 2, 16, 16), np.nan)  # a sheet for each patch
        for k, (y, x) in enumerate(np.ndindex(13, 13)):
            sheets[k, :, y : y + 4, x : x + 4] = tokenizer.centroids[tokens[:, k]].reshape(2, 4, 4)
        difference = np.nanmean(sheets, axis=0) - train_rectangles.draw_images(test.rectangles)[..., 0]
        errors[name] = np.abs(difference).mean(axis=(1, 2))
        assert found[name] == pytest.approx(errors[name].mean(), rel=1e-4)
    excess = errors["likeliest"] - errors["tokenizer"]
    assert found["likeliest_excess"] == pytest.approx([excess.mean(), excess.std() / 2**0.5], rel=1e-3)


def test_hidden_tokens_are_not_shown_to_the_model_that_is_scored(tokenizer):
    test, model = (
        train_rectangles.make_test("sparse", train_rectangles.draw_rectangles(9, 0), tokenizer),
        tiny_model(codes=20),
    )
    tokens, mask = (
        torch.from_numpy(test.tokens).masked_fill(torch.from_numpy(test.mask), 20),
        torch.from_numpy(test.mask),
    )
    with torch.no_grad():
        expected = model(tokens, torch.from_numpy(test.points).float()).log_softmax(dim=-1)[mask]
    torch.testing.assert_close(train_rectangles.hidden_log_probs(model, test), expected, rtol=1e-4, atol=1e-5)


def test_patches_are_drawn_where_they_lie(tokenizer):
    cell, brightest = train_rectangles.CELL, tokenizer.centroids.mean(axis=1).argmax()
    drawn = train_rectangles.draw_patches(np.array([[0.5, 10.0]]), [brightest], tokenizer)
    rows, columns = np.nonzero(drawn != train_rectangles.GREY)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10 * cell, 14 * cell - 1, 6, 6 + 4 * cell - 1)
    boxed = train_rectangles.draw_boxes(drawn, [(2, 3, 5, 6, (255, 0, 0))])
    assert boxed[3 * cell, 3 * cell].tolist() == boxed[6 * cell - 1, 5 * cell - 1].tolist() == [1, 0, 0]
    assert boxed[6 * cell, 5 * cell].tolist() != [1, 0, 0]


# ---------------------------------------------------------------------------------------------------
# train_squares.py and train_rectangles.py as a user runs them

TINY = ["--dim", "8", "--heads", "2", "--layers", "1", "--hidden", "16", "--batch-size", "16", "--draws", "20"]
TINY += ["--device", "cpu", "--precision", "float32"]
SMALL = ["--dim", "16", "--heads", "2", "--layers", "1", "--batch-size", "8", "--steps", "4"]
SMALL += ["--test-images", "8", "--proposals", "10", "--device", "cpu"]
FIXED = "--task sparse --rectangles 3 --fixed-points --soft-targets 0.5 --sampling edges"
POINTS = "6 points, 12 points, 48 points, 96 points"


def call(monkeypatch, script, *arguments):
    """Run a script in this process as its command line would be; returns the exit code."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
    monkeypatch.setattr(train_squares, "EXACT_DRAWS", 100)
    try:
        maskgit.run_as_script(script.main)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.parametrize(
    ("script", "options", "scored", "printed"),
    [
        (train_squares, "", "cosine+cosine+half+1, cosine, single, 0.2", "cosine masking, one masked pixel"),
        (train_rectangles, "", "unseen rectangles, cosine masking, left half hidden", "mean error of a cell"),
        (train_rectangles, "--task sparse", f"unseen rectangles, {POINTS}", "share"),
        (train_rectangles, FIXED, f"unseen rectangles, training rectangles, {POINTS}", "training rectangles"),
    ],
)
def test_a_run_leaves_what_it_promises(script, options, scored, printed, tmp_path, monkeypatch, capsys):
    out, copy, squares = tmp_path / "run", tmp_path / "new folder" / "figures.json", script is train_squares
    arguments = [*(TINY if squares else SMALL), "--steps", "4", *options.split(), "--out", out]
    assert call(monkeypatch, script, *arguments, "--json", copy) == 0
    screen, figures = capsys.readouterr().out, json.loads(copy.read_text())
    assert all(text in screen for text in [*printed.split(", "), str(out / "samples.png")])
    pictures = ("prior.png", "decode.gif") if squares else ("rectangles.png", "centroids.png")
    pictures += ("loss.png", "samples.png")
    assert {path.name for path in out.iterdir()} == {"model.pt", "log.csv", "metrics.json", *pictures}
    for name in pictures:
        Image.open(out / name).verify()
    assert figures == json.loads((out / "metrics.json").read_text())
    required = {"command", "commit", "machine", "settings", "seconds", "completions" if squares else "log"}
    assert required <= figures.keys()
    scores = figures["tasks" if squares else "scores"]
    assert ", ".join(scores) == scored
    for row in scores.values():
        assert row["cross_entropy"] >= row["limit"] and row["accuracy"] <= row["posterior_accuracy"]
        assert squares == (row.get("kl", 0) > 0)
    saved, before = load_checkpoint(out / "model.pt"), (out / "model.pt").read_bytes()
    assert saved["model"].mask_id == (2 if squares else 20)
    assert squares or saved["tokenizer"].centroids.shape == (20, 16)
    assert call(monkeypatch, script, *arguments) == 2, "a finished run is not overwritten"
    assert "holds a run already" in capsys.readouterr().err and (out / "model.pt").read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr(train_rectangles, "fit_tokenizer", None)  # a resumed run takes the one it has
        assert call(patch, script, *arguments, "--resume") == 0
    assert json.loads((out / "metrics.json").read_text())["tasks" if squares else "scores"] == scores
    assert call(monkeypatch, script, *arguments, "--force", "--steps", "5") == 0
    assert load_checkpoint(out / "model.pt")["step"] == 5


def test_killed_run_resumes_to_the_very_same_weights(tmp_path, monkeypatch):
    arguments = [*TINY, "--steps", "400", "--checkpoint-steps", "20", "--dropout", "0.1", "--ema", "0.9"]
    assert call(monkeypatch, train_squares, *arguments, "--out", tmp_path / "undisturbed") == 0
    out = tmp_path / "killed"
    script = [sys.executable, HERE / "train_squares.py", *arguments, "--out", out]
    with subprocess.Popen(script, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (out / "model.pt").exists() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    assert 0 < load_checkpoint(out / "model.pt")["step"] < 400
    assert call(monkeypatch, train_squares, *arguments, "--out", out, "--resume") == 0
    runs = (load_checkpoint(tmp_path / name / "model.pt")["model"] for name in ("killed", "undisturbed"))
    assert torch.equal(*map(weights, runs))


def test_comparisons_on_a_small_scale(tmp_path, monkeypatch, capsys):
    small, out = [*TINY, "--grid", "4", "--max-side", "3", "--steps", "6"], ["--out", tmp_path]
    assert call(monkeypatch, train_squares, *small, *out) == 0
    monkeypatch.setattr(train_squares, "ORDERS", {name: train_squares.ORDERS[name] for name in ("entropy", "random")})
    (tmp_path / "mine.py").write_text("ORDERS = {'mine': {'a': lambda step: step.log_probs[:, 0]}}")
    assert call(monkeypatch, train_squares, "--completions", tmp_path / "mine.py", "--draws", "20", *out) == 0
    rows = json.loads((tmp_path / "completions.json").read_text())["completions"]
    combinations = {(row["given"], row["order"], row["setting"]) for row in rows}
    assert len(rows) == len(combinations) == 2 * (5 + 5 + 1)
    assert all(0 <= row[m]["valid"] <= 1.0001 and row[m]["calls"] <= 64 for row in rows for m in ("exact", "model"))
    monkeypatch.setattr(train_squares, "TEST_COUNT", 64)
    monkeypatch.setattr(train_squares, "ABLATION", train_squares.ABLATION | {"dim": 8, "layers": 1})
    assert call(monkeypatch, train_squares, "--ablation", "--steps", "4", *out, "--device", "cpu") == 0
    assert len(json.loads((tmp_path / "ablation.json").read_text())["runs"]) == 3 * 9  # variants
    assert call(monkeypatch, train_rectangles, "--remedies", *SMALL, "--out", tmp_path / "run") == 0
    runs = json.loads((tmp_path / "run" / "remedies.json").read_text())["runs"]
    assert len(runs) == len({(row["variant"], row["seed"]) for row in runs}) == 2 * 4 * 3
    assert len({tuple(row["curve"]) for row in runs if row["seed"] == 0}) == 8  # each trains in a way of its own
    assert "100 rectangles, no corners" in capsys.readouterr().out
    for name in ("ablation.png", "completions.png", "run/remedies.png"):
        Image.open(tmp_path / name).verify()


@pytest.mark.parametrize(
    ("message", "squares", "rectangles"),
    [
        ("is below", "--steps 0, --lr -1, --lr nan, --draws 0", "--soft-targets -1, --rectangles 0, --points 1"),
        ("takes one number", "", "--points 6 5, --points 5 6 7"),
        ("is below 0.0, or not below 1.0", "--dropout 1, --ema 2", ""),
        ("invalid", "--steps many, --norm none, --preset post3", "--task round"),
        ("unrecognized", "--stepz 3", ""),
        ("is no mask", "--mask quarter, --mask 1.5", "--mask sideways, --mask 0.2+1.5"),
        ("do not fit a grid of", "--grid 4 --max-side 5, --min-side 4 --max-side 3", ""),
        ("divisible by", "--heads 5, --dim 6 --heads 2", "--dim 18"),
        ("belongs to the cosine head", "--learn-temperature", ""),
        ("cannot be used", "--device tpu, --device cuda:99", "--device abacus"),
        ("cannot be split", "--accumulate 1000", ""),
        ("there is no checkpoint", "--resume, --completions", "--resume --out nowhere"),
        ("Not a directory", "--out file/run", ""),
        ("gives no dict ORDERS", "--completions file, --completions none.py", ""),
        ("needs a number of --rectangles", "", "--fixed-points"),
        ("those of the sparse task", "", "--remedies --task grid"),
        ("run of another script", "", "--resume --out squares"),
    ],
)
def test_bad_input_gets_one_line_and_code_2(message, squares, rectangles, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("in the way")
    save_checkpoint("squares/model.pt", tiny_model())
    for script, inputs in ((train_squares, squares), (train_rectangles, rectangles)):
        for arguments in filter(None, inputs.split(", ")):
            assert call(monkeypatch, script, *arguments.split()) == 2, arguments
            complaint = capsys.readouterr().err
            assert complaint.startswith("error: ") and complaint.count("\n") == 1 and message in complaint, arguments
            assert sorted(path.name for path in Path().rglob("*")) == ["file", "model.pt", "squares"], arguments


# ---------------------------------------------------------------------------------------------------
# inpaint.py: pictures, cats and holes


def noise_picture(seed, width=20, height=16):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_pictures_of_a_folder(tmp_path, capsys):
    """Of any mode, cropped at the centre. The same pixels in another name, folder or format are a duplicate."""
    (tmp_path / "deep").mkdir()
    for i, name in [*((i, f"{i}.png") for i in range(80)), (0, "a.bmp"), (1, "deep/b.PNG")]:
        Image.fromarray(noise_picture(i)).save(tmp_path / name)
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = (200, 100, 50)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(np.full((9, 9), 40, np.uint8)).save(tmp_path / "grey.webp", lossless=True)
    Image.fromarray(np.full((8, 8), 70 * 256, np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGBA", (8, 8), (9, 8, 7, 0)).save(tmp_path / "clear.png")
    Image.new("CMYK", (8, 8)).save(tmp_path / "white.jpg")
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "readme.txt").write_text("no picture")
    found = np.concatenate(inpaint.open_pictures(tmp_path, None, 8, None))
    assert found.shape == (85, 8, 8, 3) and len({image.tobytes() for image in found}) == 85
    for colour in [(200, 100, 50), (40,) * 3, (70,) * 3, (9, 8, 7), (255,) * 3]:
        assert (found == colour).all(axis=(1, 2, 3)).sum() == 1
    shown = capsys.readouterr()
    assert "85 distinct pictures, 2 duplicates" in shown.out and "cut.jpg cannot be read" in shown.err


def test_more_pictures_never_move_one_to_another_part(monkeypatch):
    monkeypatch.setattr(inpaint, "cartoon_cats", lambda count, *_: map(noise_picture, range(count)))

    def parts(count):
        split = inpaint.open_pictures(None, count, 16, 0)
        return {image.tobytes(): i for i, part in enumerate(split) for image in part}

    few, many = parts(400), parts(600)
    assert len(few) == 400 and len(many) == 600 and all(many[image] == part for image, part in few.items())
    shares = np.bincount(list(many.values())) / 600
    assert shares == pytest.approx([0.843, 0.060, 0.097], abs=0.04)


@pytest.mark.parametrize(
    ("kind", "distinct", "low", "high"),
    [("cats", 20, 0, 255), ("brush", 20, 0.23, 0.33), ("box", 4, 0.23, 0.26), ("half", 4, 0.5, 0.5)],
)
def test_cats_and_holes_depend_on_their_seed_and_number_alone(kind, distinct, low, high):
    def first(count, seed):
        return inpaint.cartoon_cats(count, 64, seed) if kind == "cats" else inpaint.make_holes(kind, count, 64, seed)

    found = first(20, 1)
    assert found.shape[:3] == (20, 64, 64) and found.dtype == (np.uint8 if kind == "cats" else bool)
    assert len({item.tobytes() for item in found}) >= distinct and all(low <= item.mean() <= high for item in found)
    assert (first(5, 1) == found[:5]).all() and (first(5, 2) != found[:5]).any()


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
    decoded, tokens = np.round(tokenizer.decode(codes) * 255), torch.from_numpy(codes).flatten(1)
    images = (decoded + [40, 20, 10]).astype(np.uint8)
    filled = inpaint.to_pictures(tokenizer, tokens, np.where(holes[..., None], 0, images), holes, blend=True)
    assert np.abs(filled.astype(int) - images).max() <= 2 and (filled[~holes] == images[~holes]).all()
    plain = inpaint.to_pictures(tokenizer, tokens, images, holes, blend=False)
    assert (plain[holes] == decoded[holes]).all() and (plain[~holes] == images[~holes]).all()


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


def test_cross_entropy_picture_by_picture(inpaint_run):
    """In more than one batch, weighted by hidden tokens, those with any hole pixel; with and without evidence."""
    checkpoint = load_checkpoint(inpaint_run / "model.pt")
    model, tokenizer = checkpoint["model"], checkpoint["tokenizer"]
    images, holes = inpaint.with_holes(inpaint.cartoon_cats(70, 16), "brush", seed=3)
    plain, informed = [], []
    for image, hole in zip(images, holes, strict=True):
        codes = torch.from_numpy(tokenizer.encode(image[None] / np.float32(255))).flatten()
        mask = torch.tensor([bool(hole[y : y + 4, x : x + 4].any()) for y in range(0, 16, 4) for x in range(0, 16, 4)])
        logits = model(codes.masked_fill(mask, 16)[None], grid_coords(4, 4)).detach()
        evidence = inpaint.pixel_evidence(tokenizer, image[None], hole[None])
        for found, values in ((plain, logits), (informed, logits + evidence)):
            found += (-values[0].log_softmax(-1)[range(16), codes])[mask].tolist()
    # bf16 where the processor has it
    assert inpaint.cross_entropy(checkpoint, images, holes) == pytest.approx(np.mean(plain), rel=0.02)
    assert inpaint.cross_entropy(checkpoint, images, holes, True) == pytest.approx(np.mean(informed), rel=0.02)
    assert np.mean(informed) < np.mean(plain)


def test_mean_colour_is_that_of_the_visible_pixels():
    image, hole = noise_picture(0)[None], np.random.default_rng(1).random((1, 16, 20)) < 0.4
    found = inpaint.mean_colour(image, hole)
    expected = [np.mean([image[0, y, x, c] for y, x in zip(*(~hole[0]).nonzero(), strict=True)]) for c in range(3)]
    assert (found[~hole] == image[~hole]).all()
    assert np.abs(found[hole] - np.array(expected)).max() <= 0.5
    assert (inpaint.mean_colour(image, np.ones_like(hole)) == 128).all()


def test_fid_and_kid_where_the_weights_are(inception_weights):
    """Those of the two sets' features; a set is at distance 0 from itself."""
    network = inpaint.inception_network(inception_weights, torch.device("cpu"))
    cats = inpaint.cartoon_cats(6, 32)
    found = inpaint.inception_scores(network, cats, cats[:, ::-1])
    with torch.inference_mode():
        network = fid.load_inception(weights=inception_weights)
        x, y = (network(fid.network_input(list(images), "cpu")).numpy() for images in (cats, cats[:, ::-1]))
    assert found["fid"] == pytest.approx(fid.frechet_distance_from_features(x, y), rel=1e-4)
    assert found["kid"] == pytest.approx(fid.kernel_distance(x, y)[0], rel=1e-4)
    assert inpaint.inception_scores(network, cats, cats)["fid"] < 1e-6 * found["fid"]


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


def test_a_run_on_a_folder_resumes_and_is_scored_anew(tmp_path, monkeypatch, capsys):
    """Broken off, it resumes to the very same weights; finished, it is scored again, with other options."""

    def save_and_stop(*arguments, **options):
        save_checkpoint(*arguments, **options)
        raise InterruptedError

    (tmp_path / "cats").mkdir()
    for i, cat in enumerate(inpaint.cartoon_cats(150, 20)):
        Image.fromarray(cat).save(tmp_path / "cats" / f"{i}.png")
    options = [*TINY_CATS, "--data", tmp_path / "cats", "--schedules", "cubic", "--out"]
    call_inpaint(monkeypatch, *options, tmp_path / "once")
    assert "150 distinct pictures, 0 duplicates" in capsys.readouterr().out
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(maskgit, "save_checkpoint", save_and_stop)
        call_inpaint(monkeypatch, *options, tmp_path / "twice", "--checkpoint-steps", 2)
    assert load_checkpoint(tmp_path / "twice" / "model.pt")["step"] == 2
    for change in ([], ["--score-seeds", 2, "--order", "halton"]):
        call_inpaint(monkeypatch, *options, tmp_path / "twice", "--resume", *change)
        once, twice = (load_checkpoint(tmp_path / name / "model.pt") for name in ("once", "twice"))
        assert torch.equal(weights(once["model"]), weights(twice["model"]))
        assert (once["tokenizer"].centroids == twice["tokenizer"].centroids).all()
        assert "cubic, T=8" in capsys.readouterr().out
    with pytest.raises(ValueError, match="trained with dim=16, not 32"):
        call_inpaint(monkeypatch, *options, tmp_path / "twice", "--resume", "--dim", 32)


def test_training_batches(monkeypatch):
    """Of both views, for more codes than a byte holds and more pictures than are encoded at once; of the step alone."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (280, 8, 8, 3), dtype=np.uint8)
    tokenizer = PatchTokenizer(rng.random((300, 12), dtype=np.float32), 2)
    plain, flipped = (tokenizer.encode(view / np.float32(255)) for view in (images, images[:, :, ::-1]))
    both = np.concatenate([plain, flipped])
    assert plain.max() > 255 and (inpaint.encode_training(tokenizer, images, mirror=False) == plain).all()
    assert (inpaint.encode_training(tokenizer, images, mirror=True) == both).all()
    monkeypatch.setattr(maskgit, "train_as_set", lambda settings, codes, batch, device, best_by, **_: (batch, best_by))
    monkeypatch.setattr(sys, "argv", ["inpaint.py", "--batch-size", "6000"])
    settings, split = inpaint.parse_arguments()[0], inpaint.Split(images, images, images)
    batch, best_by = inpaint.train_model(settings, tokenizer, split, torch.device("cpu"), may_change=())
    assert best_by == "validation"
    tokens, mask, coords = batch(3)
    assert tokens.shape == mask.shape == (6000, 16) and coords.shape == (16, 2) and mask.any(dim=1).all()
    assert {tuple(row) for row in tokens.tolist()} == {tuple(codes.ravel().tolist()) for codes in both}
    assert all(torch.equal(a, b) for a, b in zip(batch(3), (tokens, mask, coords), strict=True))
    assert not torch.equal(batch(4)[1], mask)


def test_the_reports_preset_carries_their_numbers(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["inpaint.py", "--preset", "report"])
    settings = vars(inpaint.parse_arguments()[0])
    sizes = {"dim": 768, "heads": 16, "layers": 15, "hidden": 1536, "codes": 1024, "patch": 4, "batch_size": 10}
    training = {"optimizer": "adamw", "lr": 1e-4, "betas": (0.9, 0.96), "loss": "all", "steps": 120_000}
    assert sizes | training == {name: settings[name] for name in sizes | training}


def write_pairs(folder, *pictures):
    """The reports' folders: masked_image/image_NNN.png with a grey hole and mask64/mask_NNN.png, of pictures (width,
    height, share that is hidden): [(image, hole)]."""
    pairs = []
    for i, (width, height, share) in enumerate(pictures):
        hole = np.random.default_rng(i).random((height, width)) < share
        hole[:, width // 2 :] |= share > 0  # some tokens show nothing
        image = np.where(hole[..., None], 128, noise_picture(i, width, height)).astype(np.uint8)
        pairs.append((image, hole))
        for name, pixels in (("masked_image/image", image), ("mask64/mask", np.where(hole, 0, 255).astype(np.uint8))):
            (folder / name).parent.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{name}_{i:03d}.png")
    return pairs


def filled_pairs(monkeypatch, run, folder, *options, out="out"):
    """What inpaint.py makes of the folders of write_pairs: {name: picture}."""
    paths = ["--images", folder / "masked_image", "--masks", folder / "mask64", "--out", folder / out]
    call_inpaint(monkeypatch, "--checkpoint", run / "model.pt", "--device", "cpu", *paths, *options)
    return {file.stem: np.asarray(Image.open(file)) for file in sorted((folder / out).iterdir())}


def test_folders_as_in_the_reports(inpaint_run, tmp_path, monkeypatch, capsys):
    """Of the model's size and others, with no hole and nothing else: what was visible comes back bit by bit."""
    pairs = write_pairs(tmp_path, (16, 16, 0.3), (16, 16, 0.3), (40, 32, 0.3), (7, 9, 0.3), (16, 16, 0), (16, 16, 1))
    results = filled_pairs(monkeypatch, inpaint_run, tmp_path)
    assert [*results] == [f"image_{i:03d}" for i in range(6)]
    for result, (image, hole) in zip(results.values(), pairs, strict=True):
        assert result.shape == image.shape and (result[~hole] == image[~hole]).all()
        assert (result[hole] != 128).any() == hole.any()
    assert "2 pictures were filled at the model's 16x16" in capsys.readouterr().out
    with pytest.raises(ValueError, match="image_000.png exists"):
        filled_pairs(monkeypatch, inpaint_run, tmp_path)
    again = filled_pairs(monkeypatch, inpaint_run, tmp_path, "--force", "--seed", "1")
    assert (again["image_000"] != results["image_000"]).any()


def test_samples_whole_pictures_and_one_mask_for_all(inpaint_run, tmp_path, monkeypatch):
    (image, _), (other, hole) = write_pairs(tmp_path, (16, 16, 0.5), (16, 16, 0.5))
    results = filled_pairs(monkeypatch, inpaint_run, tmp_path, "--samples", "3", "--whole", "--order", "entropy")
    assert [*results] == [f"image_00{i}{end}" for i in range(2) for end in ("", "_1", "_2", "_3")]
    side_by_side, *samples = list(results.values())[:4]
    assert (side_by_side == np.concatenate([image, *samples], axis=1)).all() and (samples[0] != samples[1]).any()
    patches = samples[0].reshape(4, 4, 4, 4, 3).transpose(0, 2, 1, 3, 4).reshape(16, -1)
    centroids = load_checkpoint(inpaint_run / "model.pt")["tokenizer"].centroids
    assert all(np.abs(np.round(centroids * 255) - patch).max(axis=1).min() <= 1 for patch in patches)
    options = ["--masks", tmp_path / "mask64" / "mask_001.png", "--sample", "argmax", "--decode-steps", 3]
    results = filled_pairs(monkeypatch, inpaint_run, tmp_path, *options, "--stop-after", 2, out="one mask")
    for result, before in zip(results.values(), (image, other), strict=True):
        assert (result[~hole] == before[~hole]).all()


def test_trace_of_a_schedule_and_a_seed_for_each_batch(inpaint_run, monkeypatch):
    """After step t a hole of N tokens has floor(gamma(t / T) N) left; the pictures show those in grey."""
    checkpoint = load_checkpoint(inpaint_run / "model.pt")
    options = {"steps": 5, "order": "confidence", "choice_temperature": 1.0, "evidence": False, "blend": False}
    gamma = {"linear": lambda r: 1 - r, "cosine": lambda r: math.cos(math.pi * r / 2), "square": lambda r: 1 - r * r}
    for name, left in gamma.items():
        holed = inpaint.cartoon_cats(1, 16), np.ones((1, 16, 16), bool)
        shown = inpaint.trace_pictures(checkpoint, *holed, options | {"schedule": name})
        for t, (masks, pictures) in enumerate(shown, start=1):
            expected = min(math.floor(left(t / 5) * 16 + 1e-9), 16 - t) if t < 5 else 0
            assert (masks[0, ::4, ::4, 0] == 255).sum() == expected and (pictures[masks == 255] == 128).all()
    monkeypatch.setattr(inpaint, "AT_ONCE", 1)
    first, second = inpaint.fill_in_batches(checkpoint, *(np.repeat(array, 2, axis=0) for array in holed), options)
    assert (first != second).any()


def test_bad_input_to_inpaint_is_named(inpaint_run, tmp_path, monkeypatch):
    write_pairs(tmp_path, (16, 16, 0.3), (16, 16, 0.3))
    images, masks, out = tmp_path / "masked_image", tmp_path / "mask64", tmp_path / "out"
    filling = ["--checkpoint", inpaint_run / "model.pt", "--images", images, "--masks", masks, "--out", out]
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
    for *arguments, said in [
        (*filling, "--images", empty, "empty holds no pictures"),
        (*filling, "--images", tmp_path / "nothing", "no folder or file"),
        (*filling, "--images", damaged, "image_001.png cannot be read"),
        (*filling, "--masks", small, r"mask_001.png is 8x8, .*image_001.png is 16x16"),
        (*filling, "--masks", fewer, "2 pictures, .* 1 masks"),
        (*filling, "--masks", others, "image_001.png and mask_007.png"),
        (*filling, "--masks", empty, "empty holds no pictures"),
        (*filling, "--checkpoint", other, "no checkpoint of inpaint.py"),
        (*filling, "--checkpoint", text, "damaged or no checkpoint"),
        (*filling, "--checkpoint", tmp_path / "none.pt", "there is no checkpoint"),
        (*TINY_CATS, "--out", out, "--data", empty, "empty holds no pictures"),
        (*TINY_CATS, "--out", out, "--data", images, "too few"),
        ("--checkpoint", other, "^2$"),
        ("--size", "30", "^2$"),
        ("--patch", "0", "^2$"),
        ("--schedules", "linear,cubist", "unknown schedule 'cubist'"),
    ]:
        with pytest.raises((ValueError, SystemExit), match=said) as error:
            call_inpaint(monkeypatch, *arguments, "--device", "cpu")
        assert "\n" not in str(error.value) and not out.exists()


# ---------------------------------------------------------------------------------------------------
# vqgan.py: layers and files as they are described

LAYERS = {  # kind and channels that come out: 0, 1, 2 ... in the description
    "encoder": "conv 128," + 4 * "res 128," + 2 * "res 256," + "down 256," + 2 * "res 256," + 2 * "res 512,"
    + "down 512,res 512,att 512,res 512,norm 512,swish 512,conv 256",
    "decoder": "conv 512,res 512,att 512,res 512," + 3 * "res 512,att 512," + "up 512," + 6 * "res 256,"
    + "up 256," + 6 * "res 128," + "norm 128,conv 3",
}  # fmt: skip


class Take(dict):
    def __call__(self, name, *shape):
        """The weight of that name and shape, which is used up."""
        assert self[name].shape == shape, name
        return self.pop(name)


def by_its_layers(take, part, x, scale=1):
    """The encoder or decoder of images (B, C, H, W), layer by layer; `scale` divides the channels."""

    def conv(x, name, out, side=3):
        weight = take(f"{at}{name}.weight", out, x.shape[1], side, side)
        return F.conv2d(F.pad(x, [side // 2] * 4), weight, take(f"{at}{name}.bias", out))

    def norm(x, name):
        weight, bias = (take(f"{at}{name}.gn.{end}", x.shape[1]) for end in ("weight", "bias"))
        return F.group_norm(x, 32, weight, bias, 1e-6)

    for i, (kind, out) in enumerate(layer.split() for layer in LAYERS[part].split(",")):
        at, out = f"{part}.model.{i}", int(out) // (1 if out == "3" else scale)
        if kind == "res":
            branch = conv(F.silu(norm(x, ".block.0")), ".block.2", out)
            branch = conv(F.silu(norm(branch, ".block.3")), ".block.5", out)
            x = branch + (x if x.shape[1] == out else conv(x, ".channel_up", out, 1))
        elif kind == "att":
            normed = norm(x, ".norm")
            q, k, v = (conv(normed, name, out, 1).flatten(2) for name in (".q", ".k", ".v"))  # (B, C, H * W)
            shares = (torch.einsum("bcq,bck->bqk", q, k) / math.sqrt(out)).softmax(dim=2)
            x = x + conv(torch.einsum("bqk,bck->bcq", shares, v).view(x.shape), ".proj_out", out, 1)
        elif kind == "down":  # with a border at the right and bottom alone the windows begin one pixel further on
            x = conv(x, ".conv", out)[:, :, 1::2, 1::2]
        elif kind == "up":
            x = conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), ".conv", out)
        else:
            x = F.silu(x) if kind == "swish" else norm(x, "") if kind == "norm" else conv(x, "", out)
    return x


def random_weights(network):
    """Pieces of one tensor, so that a file stays small."""
    pool = torch.randn(2**22, generator=seeded()) / 20
    pieces = {n: pool[997 * i :][: w.numel()].view(w.shape) for i, (n, w) in enumerate(network.state_dict().items())}
    return {n: piece + 1 if n.endswith("weight") and piece.ndim == 1 else piece for n, piece in pieces.items()}


def test_vqgan_has_the_names_and_shapes_of_its_file():
    with torch.device("meta"):
        take = Take(vqgan.VQGAN().state_dict())
        assert len(take) == 315 and sum(w.numel() for w in take.values()) == 70_775_299
        assert by_its_layers(take, "encoder", torch.empty(1, 3, 64, 64)).shape == (1, 256, 16, 16)
        assert by_its_layers(take, "decoder", torch.empty(1, 256, 16, 16)).shape == (1, 3, 64, 64)
    rest = {"codebook.embedding.weight": (1024, 256)}
    for name in ("quant_conv", "post_quant_conv"):
        rest |= {f"{name}.weight": (256, 256, 1, 1), f"{name}.bias": (256,)}
    assert {name: tuple(w.shape) for name, w in take.items()} == rest


MOMENTS = {"training": [[0.4816, 0.4324, 0.3845], [0.2602, 0.2518, 0.2537]]}
MOMENTS |= {"filling": [[0.4868, 0.4341, 0.3844], [0.2620, 0.2527, 0.2543]]}


@pytest.mark.parametrize("pixels", MOMENTS)
def test_codes_and_pictures_of_a_vqgan(pixels, monkeypatch):
    """A quarter of the channels, one picture at a time: the nearest rows of the codebook, and what they decode to."""
    monkeypatch.setattr(vqgan, "VQGAN_AT_ONCE", 1)
    network, images = vqgan.VQGAN(32, pixels), torch.from_numpy(inpaint.cartoon_cats(2, 64)) / 255
    take, (mean, std) = Take(weights := random_weights(network)), torch.tensor(MOMENTS[pixels])
    latents = by_its_layers(take, "encoder", ((images - mean) / std).permute(0, 3, 1, 2), scale=4)
    latents = F.conv2d(latents, take["quant_conv.weight"], take["quant_conv.bias"]).permute(0, 2, 3, 1)
    near = latents.reshape(512, 64)[torch.randperm(512, generator=seeded())].repeat(2, 1)
    codebook = weights["codebook.embedding.weight"] = near + weights["codebook.embedding.weight"]
    network.load_state_dict(weights)
    codes = network.encode(images.numpy())
    distances = (latents.double()[..., None, :] - codebook).square().sum(dim=-1)  # (2, 16, 16, 1024)
    assert (codes == distances.argmin(dim=-1).numpy()).all() and len(np.unique(codes)) > 100
    latents = codebook[codes].permute(0, 3, 1, 2)
    latents = F.conv2d(latents, take["post_quant_conv.weight"], take["post_quant_conv.bias"])
    expected = (by_its_layers(take, "decoder", latents, scale=4).permute(0, 2, 3, 1) * std + mean).clip(0, 1)
    np.testing.assert_allclose(network.decode(codes), expected, atol=1e-4)
    assert expected.std() > 0.1


def transformer_by_its_formulas(take, tokens):
    """Logits (B, 256, 1025) of tokens (B, 256)."""

    def norm(x, name):
        return F.layer_norm(x, (768,), take(f"{name}.weight", 768), take(f"{name}.bias", 768), 1e-12)

    def linear(x, name, out):
        return x @ take(f"{name}.weight", out, x.shape[-1]).T + take(f"{name}.bias", out)

    table = take("tok_emb.weight", 1025, 768)
    x = norm(table[tokens] + take("pos_emb", 256, 768), "LN")
    for at in (f"blocks.{i}." for i in range(15)):
        q, k, v = linear(x, f"{at}Attention.qkv", 2304).view(-1, 256, 3, 16, 48).unbind(2)
        shares = (torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(48)).softmax(dim=3)
        heads = torch.einsum("bhqk,bkhd->bqhd", shares, v).flatten(2)
        x = norm(x + linear(heads, f"{at}Attention.proj", 768), f"{at}LayerNorm1")
        x = norm(x + linear(F.gelu(linear(x, f"{at}MLP.0", 1536)), f"{at}MLP.2", 768), f"{at}LayerNorm2")
    x = norm(F.gelu(linear(x, "Token_Prediction.0", 768)), "Token_Prediction.2")
    return x @ table.T + take("bias", 256, 1025)


@pytest.fixture(scope="module")
def reports():
    """Random weights of both, by the names in the files; the attention has no bias, since one student's has none."""
    with torch.device("meta"):
        networks = vqgan.VQGAN(), vqgan.ReportTransformer()
    tokenizer, transformer = map(random_weights, networks)
    transformer = {n: 0 * w if n.endswith("qkv.bias") else w for n, w in transformer.items()}
    return tokenizer, {n.replace("Attention.out", "Attention.proj"): w for n, w in transformer.items()}


def whole_maskgit(tokenizer, transformer):
    return {f"vqgan.{n}": w for n, w in tokenizer.items()} | {f"transformer.{n}": w for n, w in transformer.items()}


def with_attention(weights, *names):
    """With another student's names of query, key and value, in one or three, and of the output."""
    found, (*inputs, output) = {}, names
    for n, w in weights.items():
        parts = zip(inputs, w.chunk(len(inputs)), strict=True) if "qkv" in n else [("qkv", w)]
        found |= {n.replace("qkv", each).replace("n.proj", f"n.{output}"): part for each, part in parts}
    return found


def test_a_transformer_by_its_formulas_and_each_students_names(reports, tmp_path):
    """Bare, under "model", or in a whole MaskGIT: the same tokens."""
    (vq, weights), mask, coords = reports, random_mask((1, 256), 0.3, seeded()), grid_coords(16, 16)
    assert len(weights) == 189 and sum(w.numel() for w in weights.values()) == 72_745_472
    tokens, take = torch.randint(1024, (1, 256), generator=seeded()), Take(weights)
    hidden = tokens.masked_fill(mask, 1024)
    logits = transformer_by_its_formulas(take, hidden)[..., :1024]
    assert not take and logits.std() > 0.5
    students = [("q_linear", "k_linear", "v_linear", "out_linear"), ("query", "key", "value", "output_layer")]
    students = [with_attention(weights, *names) for names in [*students, ("Wq", "Wk", "Wv", "out"), ("to_qkv", "proj")]]
    students[1] = whole_maskgit(vq, students[1])
    students[3] = {"epoch": 3, "model": {n: w for n, w in students[3].items() if not n.endswith("qkv.bias")}}
    for saved in [weights, *students]:
        torch.save(saved, tmp_path / "best.pth")
        model = vqgan.load_transformer(tmp_path / "best.pth", "cpu")
        found = decode(model, tokens, mask, coords, steps=1, sample="argmax")
        assert torch.equal(found, torch.where(mask, logits.argmax(dim=-1), tokens))
    np.testing.assert_allclose(model(hidden).detach(), logits, atol=1e-3)


class RunsCode:
    def __reduce__(self):
        return os.system, ("echo > it_ran",)


def test_files_of_anything_else_are_refused(reports, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (vq, weights), three = reports, torch.ones(3)
    lacking = with_attention(weights, "Wq", "Wk", "Wv", "out")
    del lacking["blocks.3.Attention.Wk.weight"]
    torch.save(vq, path := tmp_path / "file.pt")
    whole = path.read_bytes()
    flipped = whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :]
    vqgan_of, transformer_of = vqgan.load_vqgan, vqgan.load_transformer
    for load, content, said in [
        (vqgan_of, b"", "file.pt does not hold the reports' vqgan"),
        (vqgan_of, whole[:-1000], "not a zip file"),
        (vqgan_of, flipped, "another checksum"),
        (vqgan_of, RunsCode(), "damaged or asks to run code"),
        (vqgan_of, [three], "list"),
        (vqgan_of, weights, "504 keys do not fit: .*'LN.bias'.* 189 keys are "),
        (vqgan_of, vq | {"discriminator.0.bias": three}, r"'discriminator.0.bias' is \(3,\) where nothing is expected"),
        (vqgan_of, vq | {"quant_conv.bias": three}, r"'quant_conv.bias' is \(3,\) where \(256,\)"),
        (vqgan_of, vq | {"quant_conv.bias": torch.full((256,), math.nan)}, "no numbers"),
        (transformer_of, vq, "no names; its 315 keys are 'encoder.model.0.weight'"),
        (transformer_of, with_attention(weights, "heads", "proj"), "its attention has heads, proj;"),
        (transformer_of, weights | {"blocks.0.Attention.Wq.weight": three}, "its attention has Wq, proj, qkv;"),
        (transformer_of, lacking, "'blocks.3.Attention.qkv.weight' is missing"),
        (transformer_of, weights | {"transformer.bias": three}, "'transformer.bias' is"),
        (transformer_of, weights | {"model": weights}, "'model' is"),
    ]:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ValueError, match=said) as error:
            load(path, "cpu")
        assert "\n" not in str(error.value) and not Path("it_ran").exists()


# ---------------------------------------------------------------------------------------------------
# inpaint.py: the reports' VQGAN and transformer


def test_the_reports_files_fill_a_picture(reports, tmp_path, monkeypatch):
    torch.save(whole_maskgit(*reports), whole := tmp_path / "whole.pth")
    [(image, hole)], fill, seen = write_pairs(tmp_path, (64, 64, 0.3)), inpaint.fill, []
    monkeypatch.setattr(inpaint, "fill", lambda *args, **options: seen.append(args[0]) or fill(*args, **options))
    paths = ["--images", tmp_path / "masked_image", "--masks", tmp_path / "mask64", "--out", tmp_path / "out"]
    options = ["--samples", 2, "--decode-steps", 2, "--device", "cpu"]
    call_inpaint(monkeypatch, "--vqgan", whole, "--transformer", whole, *paths, *options)
    _, first, second = (np.asarray(Image.open(file)) for file in sorted((tmp_path / "out").iterdir()))
    assert all((filled[~hole] == image[~hole]).all() and (filled[hole] != 128).any() for filled in (first, second))
    assert (first != second).any()
    assert seen[0]["tokenizer"].mean == pytest.approx((0.4868, 0.4341, 0.3844)), "as the reports fill"


@pytest.fixture
def small_vqgan(monkeypatch):
    monkeypatch.setattr(vqgan.VQGAN.__init__, "__defaults__", (32, "training"))
    network = vqgan.VQGAN()
    network.load_state_dict(random_weights(network))
    return network


def test_what_is_visible_knows_nothing_of_the_hole(small_vqgan):
    """Of two pictures that differ in a hole alone even visible tokens differ, but not those that the model is given."""
    images, holes = inpaint.cartoon_cats(1, 64).repeat(2, axis=0), np.zeros((2, 64, 64), bool)
    holes[:, 20:44, 20:44] = True
    images[1][holes[1]] = 255 - images[1][holes[1]]
    true = torch.from_numpy(small_vqgan.encode(images / np.float32(255))).flatten(1)
    checkpoint = {"model": tiny_model(), "tokenizer": small_vqgan}
    for targets in (True, False):
        tokens, mask, *_ = inpaint.model_input(checkpoint, images, holes, informed=False, targets=targets)
        assert (true[0] != true[1])[~mask[0]].any() and torch.equal(tokens[0][~mask[0]], tokens[1][~mask[1]])
        assert torch.equal(tokens[mask], true[mask]) == targets


def test_a_run_on_a_vqgans_tokens(small_vqgan, inpaint_run, tmp_path, monkeypatch, capsys):
    """Its model.pt does not hold the VQGAN, but belongs to it, by the SHA-256 of the weights."""
    monkeypatch.setattr(inpaint, "ways_to_fill", lambda settings: [("as set", inpaint.options_of(settings))])
    monkeypatch.setattr(inpaint, "HOLES", {"brush": inpaint.brush_hole})
    monkeypatch.setattr(inpaint, "draw_pictures", lambda *_: None)
    weights, out, run = small_vqgan.state_dict(), tmp_path / "out", tmp_path / "run"
    torch.save({f"vqgan.{n}": w for n, w in weights.items()}, file := tmp_path / "VQGAN.pt")
    torch.save(weights | {"quant_conv.bias": torch.ones(64)}, other := tmp_path / "other.pt")
    small = ["--cartoons", 10, "--seed", 30, "--no-mirror", "--test-images", 8, "--device", "cpu", "--out", run]
    small += ["--dim", 16, "--heads", 2, "--layers", 1, "--batch-size", 4, "--steps", 2]
    call_inpaint(monkeypatch, "--vqgan", file, *small)
    checkpoint = load_checkpoint(run / "model.pt")
    digest = hashlib.sha256(b"".join(w.numpy() for w in weights.values()))
    assert checkpoint["tokenizer"] is None and checkpoint["config"]["vqgan_sha256"] == digest.hexdigest()
    assert set(json.loads((run / "metrics.json").read_text())["cross_entropy"]) == {"test", "seen"}
    [(image, hole)] = write_pairs(tmp_path, (64, 64, 0.3))
    [filled] = filled_pairs(monkeypatch, run, tmp_path, "--vqgan", file, out="filled").values()
    assert (filled[~hole] == image[~hole]).all() and (filled[hole] != 128).any()
    files = ["--images", tmp_path / "masked_image", "--masks", tmp_path / "mask64", "--out", out]
    filling, k_means = ["--checkpoint", run / "model.pt", *files], ["--checkpoint", inpaint_run / "model.pt"]
    before = (run / "model.pt").read_bytes()
    capsys.readouterr()
    for *arguments, said in [
        (*filling, "trained with a VQGAN: name its file by --vqgan"),
        (*small, "--resume", "trained with a VQGAN: name its file by --vqgan"),
        (*filling, "--vqgan", other, "trained with another VQGAN"),
        (*filling, *k_means, "--vqgan", file, "trained without a VQGAN: leave out --vqgan"),
        (*filling, "--vqgan", file, "--evidence", "--evidence needs a centroid in pixels"),
        (*filling, "--vqgan", file, "--transformer", other, "no --checkpoint"),
        (*files, "--transformer", other, "takes their --vqgan"),
        (*files, "--vqgan", file, "name all three"),
        ("--out", out, "--vqgan", file, "--size", 32, "pictures of 64x64"),
    ]:
        with pytest.raises((ValueError, SystemExit)) as error:
            call_inpaint(monkeypatch, *arguments)
        assert re.fullmatch(f"[^\n]*{said}[^\n]*", capsys.readouterr().err.strip() or str(error.value))
    assert not out.exists() and (run / "model.pt").read_bytes() == before


# ---------------------------------------------------------------------------------------------------
# Several processes, as torchrun starts them, with gloo

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ADAMW = ["--optimizer", "adamw", "--lr", "0.001"]
PARALLEL = {
    "train_squares": [*TINY, *ADAMW, "--steps", "12", "--accumulate", "2", "--on-policy", "0.5"],
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
    assert kept > 103 or rows != set(map(tuple, features[:kept])), "chosen at random"
    other = fid.statistics_of([features[::-1] + 1], 103)
    assert fid.fid_of(found, other) == pytest.approx(6, rel=1e-3), "of all images, however many are kept"


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


@pytest.mark.parametrize("whole", [True, False])
def test_readme_examples_run_on_a_copy_of_maskgit(whole, tmp_path):
    """Word for word, one after the other, also on a copy that ends before the scripts' part; it saves and resumes."""
    examples = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert len(examples) == 2 and len(examples[1].splitlines()) < 10
    more = ["print(decode(model, torch.zeros(3, 16, dtype=torch.int64), hidden, coords, order=margin).view(3, 4, 4))"]
    more += [f'train(model, batch, steps={steps}, out="run", resume={steps > 3})' for steps in (3, 5)]
    source = (HERE / "maskgit.py").read_text()
    (tmp_path / "maskgit.py").write_text(source if whole else source[: source.index("# For the scripts\n")])
    (tmp_path / "example.py").write_text("\n".join([*examples, *more]))
    finished = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stderr
    assert len(re.findall(r"tensor\(\[\[\[[01],", finished.stdout)) == 2


def test_readmes_own_order_joins_the_table(tmp_path, monkeypatch, capsys):
    readme = (HERE / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    Path("margin.py").write_text(re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[1])
    assert call(monkeypatch, train_squares, *TINY, "--steps", "2") == 0
    monkeypatch.setattr(train_squares, "ORDERS", {"entropy": train_squares.ORDERS["entropy"]})
    capsys.readouterr()
    command = re.search(r"python train_squares.py (--completions .*)", readme)[1]
    assert call(monkeypatch, train_squares, *command.split()) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[1:-1]] == ["entropy"] * 5 + ["margin"] * 5
    # 64 steps, one token each, are exact by exact marginals; beside them stands the untrained model.
    assert re.search(r"64 steps +nothing +100.0% +0.000 +0.000 +64.0 +0.0% +1.000", table[-2])


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
