"""Tests of the method, the training and the four scripts, in the order of the code.

Expected values are worked out here in another way: by hand, by loops, by enumeration. No test needs a network, a
GPU (those that use one skip themselves) or data from elsewhere.
"""

import collections
import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock

import fid
import inpaint
import maskgit
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import train_rectangles
import train_squares
from maskgit import ORDERS, PatchTokenizer, decode, grid_coords, kmeans, random_mask, train, training_mask
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)  # threads of tiny models wait for each other most of the time
train_rectangles.fit_tokenizer = functools.cache(train_rectangles.fit_tokenizer)  # most runs here have the same one


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny_model(seed=0, codes=5, **options):
    torch.manual_seed(seed)
    return maskgit.MaskGIT(codes, **{"dim": 16, "heads": 2, "layers": 2} | options).eval()


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def saved(folder):
    """What a run has left in its checkpoint."""
    return maskgit.load_checkpoint(folder / "model.pt")


def saved_weights(folder):
    return weights(saved(folder)["model"])


def logged(folder, column):
    """A column of a run's log.csv."""
    return [float(row[column]) for row in csv.DictReader((folder / "log.csv").read_text().splitlines())]


def refusal(function, *arguments, **options):
    """The one line that says why it refuses its arguments."""
    with pytest.raises((maskgit.InputError, fid.InputError)) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def ending(main, *streams):
    """The exit code of a script's main(), with the state of a new process and, if they are given, other streams."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maskgit, "STATUS", maskgit.STATUS | {"training": False, "checkpoint": None})
        for name, stream in zip(("stdout", "stderr"), streams or (sys.stdout, sys.stderr), strict=True):
            patch.setattr(sys, name, stream)
        try:
            maskgit.run_as_script(main)
        except SystemExit as stop:
            return stop.code
    return 0


one_record = functools.cache(maskgit.run_record)


def call(script, *arguments):
    """The exit code of a script's command line, with few draws, the first run's record and no Inception at hand."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (maskgit, script):
            patch.setattr(module, "run_record", one_record, raising=False)
        patch.setattr(sys, "argv", [f"{script.__name__.replace('.', '/')}.py", *map(str, arguments)])
        patch.setattr(train_squares, "EXACT_DRAWS", 100)
        patch.setattr(train_squares, "MODEL_DRAWS", 20)
        patch.setattr(fid, "release_path", lambda: Path("no-weights-here.pth"))
        return ending(script.main)


@contextlib.contextmanager
def room_for(size):
    """As on a full disk, no file may become larger than `size` bytes."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# ---------------------------------------------------------------------------------------------------
# Tokens


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_kmeans_equals_brute_force_from_the_same_start(iterations):
    """Of more points than are looked at at once, far from the origin."""
    points = np.random.default_rng(1).normal(size=(1500, 5)).astype(np.float32) + 100

    def assigned(centroids):
        distances = np.square(points[:, None].astype(np.float64) - centroids).sum(axis=2)
        return distances.argmin(axis=1), distances.min(axis=1).sum()

    centroids = points[:7]
    for _ in range(iterations):
        labels, _ = assigned(centroids)
        centroids = np.array([points[labels == k].mean(axis=0, dtype=np.float64) for k in range(7)])
    labels, inertia = assigned(centroids)
    result = kmeans(points, 7, init=points[:7], max_iter=iterations, tol=0)
    np.testing.assert_allclose(result.centroids, centroids, atol=1e-4)
    assert (result.labels == labels).all() and result.inertia == pytest.approx(inertia, rel=1e-4)
    assert result.centroids.dtype == np.float32 and result.labels.dtype == np.int64


def test_kmeans_ends_when_nothing_moves_or_by_tol_and_gives_empty_clusters_the_farthest_points():
    points = np.random.default_rng(2).random((1000, 8)).astype(np.float32)
    converged = kmeans(points, 20, init=points[:20], max_iter=500, tol=0)
    assert (kmeans(points, 20, init=converged.centroids, max_iter=1).centroids == converged.centroids).all()
    assert kmeans(points, 20, init=points[:20], max_iter=500, tol=0.1).inertia > converged.inertia
    result = kmeans(np.array([[0], [1], [2], [20], [10]]), 3, init=[[0.5], [1000], [2000]], max_iter=1)
    assert sorted(result.centroids.ravel().tolist()) == pytest.approx([6.6, 10, 20])


def test_kmeans_repeats_with_its_seed_and_keeps_the_best_restart():
    points = np.random.default_rng(3).random((500, 4)).astype(np.float32)
    once, again, other = (kmeans(points, 12, seed=seed).centroids for seed in (5, 5, 6))
    assert (once == again).all() and not (once == other).all()
    inertias = [kmeans(points, 12, seed=5, restarts=restarts).inertia for restarts in range(1, 7)]
    assert inertias == sorted(inertias, reverse=True) and inertias[-1] < inertias[0]


def test_plus_plus_draws_by_squared_distance():
    points = np.array([[0.0], [1.0], [3.0]], dtype=np.float32)
    rng = np.random.default_rng(0)
    chosen = np.array([maskgit.plus_plus(points, 3, rng)[:, 0] for _ in range(6000)])
    assert np.mean(chosen[chosen[:, 0] == 0, 1] == 3) == pytest.approx(9 / 10, abs=0.03)
    assert (np.sort(chosen, axis=1) == points[:, 0]).all(), "none is chosen twice"


@pytest.mark.parametrize(("patch", "stride", "channels"), [(2, 2, 1), (2, 1, 3), (4, 2, 4)])
def test_tokens_bring_the_images_back_when_codes_suffice(patch, stride, channels, tmp_path):
    """Also after a checkpoint; and of more images than are encoded at once each is encoded as it is alone."""
    size = patch + 2 * stride
    images = np.random.default_rng(0).integers(0, 5, size=(6, size, size, channels)).astype(np.float32) / 4
    codes = len(np.unique(maskgit.image_patches(images, patch, stride).reshape(-1, patch * patch * channels), axis=0))
    fitted = PatchTokenizer.fit(images, codes, patch, stride)
    maskgit.save_checkpoint(tmp_path / "model.pt", tiny_model(), tokenizer=fitted)
    tokenizer = saved(tmp_path)["tokenizer"]
    assert (tokenizer.patch, tokenizer.stride) == (patch, stride)
    tokens = tokenizer.encode(images)
    assert tokens.shape == (6, 3, 3) and tokens.dtype == np.int64
    np.testing.assert_allclose(tokenizer.decode(tokens), images, atol=1e-5)
    many = np.resize(images, (2**22 // images[0].size + 7, *images.shape[1:]))
    assert (tokenizer.encode(many) == np.resize(tokens, (len(many), 3, 3))).all()


def test_patches_are_flattened_row_by_row_and_stitched_by_hand():
    patches = maskgit.image_patches(np.arange(25).reshape(1, 5, 5, 1), 3, 2)  # (1, 2, 2, 9)
    assert patches[0, 0, 1].tolist() == [2, 3, 4, 7, 8, 9, 12, 13, 14]
    # Four constant 3x3 patches, two pixels apart: where two overlap it is their mean, in the middle that of all.
    tokenizer = PatchTokenizer(np.repeat([[1.0], [2.0], [3.0], [4.0]], 9, axis=1), patch=3, stride=2)
    row = [1, 1, 1.5, 2, 2]
    middle = [2, 2, 2.5, 3, 3]
    expected = [row, row, middle, [x + 2 for x in row], [x + 2 for x in row]]
    assert tokenizer.decode(np.array([[[0, 1], [2, 3]]]))[0, :, :, 0].tolist() == expected


# ---------------------------------------------------------------------------------------------------
# Positions


@pytest.mark.parametrize("layout", ["split", "printed"])
def test_position_encoding_equals_its_formula_dimension_by_dimension(layout):
    assert grid_coords(2, 3).tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]
    coords = torch.tensor([[0.0, 0.0], [3.0, 5.0], [-1.25, 7.5]])
    dim = 16
    encoded = maskgit.position_encoding(coords, dim, layout)
    assert encoded.shape == (3, dim)
    for (row, (x, y)), i in itertools.product(enumerate(coords.tolist()), range(dim)):
        within = i % (dim // 2)
        exponent = i / dim if layout == "printed" else (within - within % 2) / (dim // 2)
        angle = (x if i < dim // 2 else y) * 10000**-exponent
        assert encoded[row, i].item() == pytest.approx(math.sin(angle) if i % 2 == 0 else math.cos(angle), abs=1e-5)


# ---------------------------------------------------------------------------------------------------
# Transformer


def test_attention_equals_an_explicit_softmax():
    torch.manual_seed(0)
    attention = maskgit.Attention(12, 3)
    x = torch.randn(2, 7, 12)
    weight = attention.qkv.weight
    heads = []
    for h in range(3):
        of_all = (x @ weight.T + attention.qkv.bias).split(4, dim=2)  # of three heads queries, then keys, then values
        query, key, value = of_all[h::3]
        scores = torch.exp(query @ key.transpose(1, 2) / math.sqrt(4))
        heads.append(scores / scores.sum(dim=2, keepdim=True) @ value)
    expected = torch.cat(heads, dim=2) @ attention.out.weight.T + attention.out.bias
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-6)

    # In bf16, differentiated (on a CPU by another way) and not; gradients of the same sum.
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(x)
        with torch.no_grad():
            torch.testing.assert_close(attention(x).float(), expected, rtol=0.05, atol=0.01)
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.01)
    gradients = [torch.autograd.grad(each.float().square().sum(), weight)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_block_is_the_written_formula(norm):
    torch.manual_seed(0)
    block = maskgit.Block(8, 2, 24, 0.5, norm).eval()
    x = torch.randn(2, 5, 8)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)

    def mlp(x):
        return block.mlp[2](F.gelu(block.mlp[0](x)))

    if norm == "post":
        y = block.norm1(x + block.attention(x))
        expected = block.norm2(y + mlp(y))
    else:
        y = x + block.attention(block.norm1(x))
        expected = y + mlp(block.norm2(y))
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    block.train()  # with dropout after the attention and in the MLP
    for part in (block.dropout, block.mlp[3]):
        assert 0.4 < (part(torch.ones(1000)) == 0).float().mean() < 0.6
    block.mlp[3].p = 0.0
    assert not torch.equal(block(x), block(x))


def test_rotary_attention_sees_differences_of_coordinates_alone():
    torch.manual_seed(0)
    attention = maskgit.Attention(16, 2)
    x = torch.randn(1, 5, 16)
    coords = torch.rand(5, 2) * 6
    places = coords, coords + torch.tensor([3.0, -7.5]), -coords
    here, moved, mirrored = (attention(x, maskgit.rotary_angles(at, 8)[None, None]) for at in places)
    torch.testing.assert_close(here, moved, rtol=1e-4, atol=1e-5)
    assert (here - mirrored).abs().max() > 1e-3
    angles = maskgit.rotary_angles(coords, 12)  # three frequencies for each axis
    for row, at in enumerate(coords.tolist()):
        expected = [value * math.pi / 100 ** (i / 3) for value in at for i in range(3)]
        assert angles[row].tolist() == pytest.approx(expected, rel=1e-4)
    angles = maskgit.rotary_angles(coords, 8)  # a pair of numbers is turned as a complex one is
    turned = torch.complex(x[..., :4], x[..., 4:8]) * torch.exp(1j * angles)
    found = maskgit.turn(x[..., :8], angles)
    torch.testing.assert_close(found, torch.cat([turned.real, turned.imag], dim=-1))


@pytest.mark.parametrize("rotary", [False, True])
def test_only_coordinates_tell_tokens_apart_and_each_image_may_have_its_own(rotary):
    model = tiny_model(rotary=rotary)
    tokens = torch.randint(6, (2, 9), generator=seeded())
    coords = torch.stack([grid_coords(3, 3), grid_coords(3, 3) * 1.7 + 0.3])
    order = torch.randperm(9, generator=seeded())
    logits = model(tokens, coords)
    one_by_one = torch.cat([model(tokens[i : i + 1], coords[i]) for i in range(2)])
    torch.testing.assert_close(logits, one_by_one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(tokens[:, order], coords[:, order]), logits[:, order], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(tokens[:, order], coords), logits[:, order], atol=1e-3)
    if rotary:  # the same weights without it
        assert (logits - tiny_model(rotary=False)(tokens, coords)).abs().max() > 1e-3


@pytest.mark.parametrize("head", ["tied", "cosine", "linear"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_heads_by_hand_and_no_logit_for_mask(head, norm):
    """Tied and cosine compare the state with each code's row of the embedding table."""
    model = tiny_model(head=head, norm=norm)
    coords = grid_coords(2, 2)
    tokens = torch.tensor([[0, 4, 5, 2]])
    inputs = 4 * model.embedding.weight[tokens] + maskgit.position_encoding(coords, 16)
    states = []
    model.blocks[0].register_forward_pre_hook(lambda module, arguments: states.append(arguments[0]))
    model.to_logits.register_forward_hook(lambda module, arguments, output: states.append(output))
    if head == "tied":
        torch.nn.init.normal_(model.bias)
    logits = model(tokens, coords)
    assert model.mask_id == 5 and logits.shape == (1, 4, 5)
    torch.testing.assert_close(states[0], inputs)
    products = torch.einsum("btd,kd->btk", states[1], model.embedding.weight[:5]) if head != "linear" else logits
    if head == "tied":
        products = products + model.bias
    if head == "cosine":
        products = products / states[1].norm(dim=-1, keepdim=True) / model.embedding.weight[:5].norm(dim=-1)
        scaled = tiny_model(head=head, norm=norm, learn_temperature=True)
        torch.nn.init.constant_(scaled.log_scale, math.log(7))
        torch.testing.assert_close(scaled(tokens, coords), 7 * logits)
    torch.testing.assert_close(logits, products)


# ---------------------------------------------------------------------------------------------------
# Masking


def test_schedules_fall_from_one_to_zero():
    halves = {"cosine": 2**-0.5, "linear": 0.5, "square": 0.75, "cubic": 0.875, "sqrt": 1 - 2**-0.5}
    halves |= {"arccos": 2 / 3, "log": 1 - math.log2(1.5), "exp": 1 - (math.e**0.5 - 1) / (math.e - 1)}
    assert maskgit.SCHEDULES.keys() == halves.keys()
    for name, gamma in maskgit.SCHEDULES.items():
        assert [gamma(0.0), gamma(0.5), gamma(1.0)] == pytest.approx([1, halves[name], 0], abs=1e-12)
        assert (np.diff(gamma(np.linspace(0, 1, 101))) < 0).all(), name


def test_masks_hide_exact_counts_and_every_token_equally_often():
    mask = random_mask((5, 64), torch.tensor([0.0, 0.01, 0.2, 0.5, 1.0]), seeded())
    assert mask.dtype == torch.bool and mask.sum(dim=1).tolist() == [1, 1, 13, 32, 64]
    for ratio, tokens, count in ((0.55, 100, 55), (0.14, 50, 7), (0.5500001, 100, 56)):
        assert int(random_mask((1, tokens), ratio).sum()) == count, "products of floats are rounded before they rise"
    assert torch.equal(*(random_mask((3, 10), 0.25, seeded(1)) for _ in range(2)))
    assert training_mask((6, 100), "0.2+single+linear", seeded()).sum(dim=1)[:4].tolist() == [20, 20, 1, 1]
    frequency = random_mask((20000, 8), 0.25, seeded()).float().mean(dim=0)
    assert (frequency - 0.25).abs().max() < 0.015  # 5 standard deviations


def test_training_masks_are_the_boxes_of_two_tokens_and_the_halves():
    """Of a grid, a line and a point, as rows of one batch: each of them occurs and nothing else."""
    places = [grid_coords(3, 4), grid_coords(12, 1), torch.zeros(12, 2)]
    coords = torch.stack(places).repeat_interleave(2000, dim=0)
    mask = training_mask((12000, 12), "half+box", seeded(), torch.cat([coords, coords.flip(0)]))
    halves, boxes = ([set(map(tuple, rows.tolist())) for rows in part.split(2000)] for part in mask.split(6000))
    line = (*6 * [True], *6 * [False])
    of_grid = [lambda x, y: x < 2, lambda x, y: x >= 2, lambda x, y: y < 1, lambda x, y: y > 1]
    expected = {tuple(hole(x, y) for x, y in places[0].tolist()) for hole in of_grid}
    assert halves == [expected, {line, line[::-1]}, {12 * (True,)}]
    for at, found in zip(places, boxes[::-1], strict=True):
        spans = [(torch.minimum(a, b), torch.maximum(a, b)) for a, b in itertools.product(at, repeat=2)]
        assert found == {tuple(((low <= at) & (at <= high)).all(dim=1).tolist()) for low, high in spans}
    masks = [training_mask((9, 12), "box", seeded(), at) for at in (places[0].long(), coords[:9])]
    assert torch.equal(*masks), "of any type, and the same for all rows"


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-24])
def test_the_extremes_of_the_random_numbers_are_masks(extreme, monkeypatch):
    """The least and the largest number that torch.rand draws, of no default type: as r they round to 0 and to 1."""
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, **_: torch.full(shape, extreme, dtype=dtype))
    for kind, rows in itertools.product(maskgit.SCHEDULES, (1, 16)):
        hidden = training_mask((rows, 9), kind).sum(dim=1)
        assert hidden.min() >= 1 and hidden.max() <= 9
        assert hidden[-1] == 1 if extreme else hidden[0] == 9


def test_masked_cross_entropy_by_hand():
    logits = torch.tensor([[[0.0, 0.0], [3.0, 0.0]], [[0.0, 1.0], [2.0, 0.0]]])
    targets = torch.tensor([[0, 1], [0, 0]])
    mask = torch.tensor([[True, False], [True, True]])
    hidden = [math.log(2), math.log(1 + math.e), math.log(1 + math.exp(-2))]
    assert maskgit.masked_cross_entropy(logits, targets, mask).item() == pytest.approx(sum(hidden) / 3)
    assert maskgit.masked_cross_entropy(logits, targets, mask, count=7).item() == pytest.approx(sum(hidden) / 7)


# ---------------------------------------------------------------------------------------------------
# Decoding


def ragged_batch(seed, images=6, tokens=16, codes=5):
    """Random tokens whose rows have different numbers of hidden ones, none and all among them."""
    ids = torch.randint(codes, (images, tokens), generator=seeded(seed))
    mask = torch.stack([torch.rand(tokens, generator=seeded(seed + i)) < i / (images - 1) for i in range(images)])
    return ids, mask


def decode_ragged(model=None, seed=0, **options):
    tokens, mask = ragged_batch(seed)
    options = {"tokens": tokens, "mask": mask, "coords": grid_coords(4, 4), "generator": seeded()} | options
    return decode(model or tiny_model(), **options)


def lazy(state):
    """An order at its own pace that wants the first half of the images' even places, and then nothing."""
    return (state.place % 2 == 0) & (state.row < 3) & (state.step < 3)


def eager(state):
    """An order at its own pace that wants all."""
    return state.place >= 0


OWN_PACE = {"entropy", lazy, eager}


@pytest.mark.parametrize("order", [*ORDERS, lazy, eager])
@pytest.mark.parametrize("schedule", [*maskgit.SCHEDULES, lambda r: 1 - r])
@pytest.mark.parametrize(("sample", "steps"), [("categorical", 1), ("categorical", 8), ("argmax", 20)])
def test_decode_keeps_its_promises(order, schedule, sample, steps):
    model = tiny_model(dropout=0.5)
    trace = []
    tokens, mask = ragged_batch(steps)
    given = {"tokens": tokens.clone(), "mask": mask.clone()}
    gamma = maskgit.SCHEDULES.get(schedule, schedule)
    options = {"steps": steps, "schedule": schedule, "order": order, "sample": sample}
    result = decode_ragged(model, trace=trace, **given, **options)
    assert torch.equal(result[~mask], tokens[~mask]), "given tokens come back unchanged"
    assert result.min() >= 0 and result.max() < model.mask_id, "no [MASK] comes out"
    other_contents = torch.where(mask, (tokens + 1) % 5, tokens)
    assert torch.equal(result, decode_ragged(model, tokens=other_contents, mask=mask, **options))
    assert torch.equal(tokens, given["tokens"]) and torch.equal(mask, given["mask"]), "inputs are left alone"

    start = had = mask.sum(dim=1)
    before = tokens.masked_fill(mask, model.mask_id)
    for t, (now, hidden) in enumerate(trace, start=1):
        committed = before != model.mask_id
        assert torch.equal(now[committed], before[committed]), "a committed token never changes"
        assert torch.equal(hidden, now == model.mask_id)
        scheduled = [math.floor(gamma(t / steps) * n) if t < steps else 0 for n in start.tolist()]
        left = hidden.sum(dim=1)
        expected = torch.tensor(scheduled).minimum(had - 1).clamp(min=0)
        if order in OWN_PACE:
            assert ((left < had) | (had == 0)).all() and (order != "entropy" or (left <= expected).all())
        else:
            assert torch.equal(left, expected)
        before = now
        had = left
    assert len(trace) <= steps and not trace[-1][1].any()


@pytest.mark.parametrize(("steps", "tokens"), [(50, 100), (29, 29)])
def test_a_linear_schedule_takes_as_many_each_time(steps, tokens):
    """Though 0.29 * 100 is 28.999999999999996: and no call is left out."""
    trace = []
    decode_from_nothing([[0.5, 0.5]] * tokens, steps=steps, schedule="linear", order="random", trace=trace)
    assert [int(hidden.sum()) for _, hidden in trace] == list(range(tokens - tokens // steps, -1, -tokens // steps))


@pytest.mark.parametrize("order", ORDERS)
def test_decode_takes_what_people_have(order):
    """Any integers as tokens and as coordinates, and models of any precision."""
    tokens, mask = ragged_batch(0)
    options = {"steps": 5, "order": order, "sample": "argmax"}
    expected = decode_ragged(**options)
    for kind in (torch.int32, torch.uint8):
        found = decode_ragged(tokens=tokens.to(kind), coords=grid_coords(4, 4).to(kind), **options)
        assert found.dtype == torch.int64 and torch.equal(found, expected)
    assert torch.equal(decode_ragged(tokens=tokens.masked_fill(mask, -1), **options), expected)
    bytes_of_many = decode_ragged(tiny_model(codes=1024), tokens=tokens.byte(), **options)
    assert torch.equal(bytes_of_many[~mask], tokens[~mask])
    options["steps"] = 1
    for kind in (torch.float16, torch.bfloat16):
        found = decode_ragged(tiny_model().to(kind), **options)
        assert (found == decode_ragged(**options)).float().mean() > 0.9


@torch.no_grad()
def test_an_order_sees_the_step_and_is_obeyed():
    """What it is told, against the trace; and just the tokens that it wants are committed, as they were sampled."""
    model = tiny_model()
    coords = grid_coords(4, 4)
    shown, before = tokens, mask = ragged_batch(2)
    trace, told = [], []

    def sample(state):
        assert state.tokens is None
        return (state.place + state.step) % 5

    def order(state):
        told.append(state)
        return state.place % 3 == state.step % 3

    decode_ragged(model, 2, steps=20, schedule="linear", order=order, sample=sample, trace=trace)
    for t, (step, (now, hidden)) in enumerate(zip(told, trace, strict=True), start=1):
        assert (step.step, step.steps) == (t, 20) and torch.equal(step.coords, coords.expand(6, 16, 2))
        assert torch.equal(torch.stack([step.row, step.place]), before.nonzero().T)
        expected = model(shown.masked_fill(before, 5), coords).log_softmax(dim=-1)[before]
        torch.testing.assert_close(step.log_probs, expected, rtol=1e-4, atol=1e-5)
        scheduled = (mask.sum(dim=1) * (1 - t / 20)).floor()
        assert torch.equal(step.left, scheduled.minimum(before.sum(dim=1) - 1).clamp(min=0).long())
        assert torch.equal(step.tokens, (step.place + t) % 5)
        assert torch.equal(now[before & ~hidden], ((torch.arange(16) + t) % 5).expand(6, 16)[before & ~hidden])
        for was, left, wanted in zip(before, hidden, before & (torch.arange(16) % 3 == t % 3), strict=True):
            assert torch.equal(was & ~left, wanted) or (not wanted.any() and (was & ~left).sum() == was.any())
        shown, before = now, hidden


class FixedMarginals:
    """The same independent distributions whatever is visible; remembers how many images each call has."""

    def __init__(self, probabilities):
        self.log_probabilities = torch.tensor(probabilities).log()
        self.mask_id = self.log_probabilities.shape[-1]
        self.sizes = []

    def __call__(self, tokens, coords):
        self.sizes.append(len(tokens))
        return self.log_probabilities.expand(len(tokens), -1, -1)


def decode_from_nothing(probabilities, draws=1, **options):
    hidden = torch.ones(draws, len(probabilities), dtype=torch.bool)
    options = {"coords": grid_coords(1, len(probabilities)), "generator": seeded()} | options
    return decode(FixedMarginals(probabilities), hidden.long(), hidden, **options)


def committed_first(order, probabilities, **options):
    """Which token a deterministic decode of one image commits at each step."""
    trace = []
    t = len(probabilities)
    options = {"steps": t, "schedule": "cubic", "sample": "argmax"} | options
    decode_from_nothing(probabilities, order=order, trace=trace, **options)
    masks = [torch.ones(1, t, dtype=torch.bool), *(mask for _, mask in trace)]
    return [(a & ~b).nonzero()[:, 1].tolist() for a, b in itertools.pairwise(masks)]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_decode_draws_from_the_model_at_a_temperature(temperature, monkeypatch):
    probabilities = torch.tensor([[0.0, 0.1, 0.2, 0.7, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]])  # what has none is never drawn
    drawn = decode_from_nothing(probabilities.tolist(), 40000, order="random", temperature=temperature)
    expected = probabilities ** (1 / temperature)
    expected /= expected.sum(dim=-1, keepdim=True)
    error = (expected * (1 - expected) / 40000).sqrt()
    assert bool(((F.one_hot(drawn, 5).float().mean(dim=0) - expected).abs() <= 5 * error).all())
    for extreme, token in ((0.0, 1), (1 - 2**-24, 3)):
        monkeypatch.setattr(torch, "rand", lambda *shape, dtype, extreme=extreme, **_: torch.full(shape, extreme))
        assert decode_from_nothing(probabilities.tolist(), order="random").tolist() == [[token, 0]]


@pytest.mark.parametrize("log_probability", [False, True])
def test_confidence_is_noisy_at_first_and_not_at_last(log_probability):
    """Ranks of two tokens by (log) probability plus Gumbel noise: the noise's difference is logistic."""
    order = functools.partial(maskgit.by_confidence, choice_temperature=0.0, log_probability=log_probability)
    assert committed_first(order, [[0.6, 0.4], [0.9, 0.1], [0.3, 0.7], [0.2, 0.8]]) == [[1], [3], [2], [0]]
    probabilities = torch.tensor([0.9, 0.5])
    n = 20000
    log_probs = torch.stack([probabilities, 1 - probabilities], dim=-1).log().repeat(n, 1)
    tokens = torch.zeros(2 * n, dtype=torch.int64)
    first, second = probabilities.log().tolist() if log_probability else probabilities.tolist()
    for t, temperature in ((1, 4.5), (3, 4.5), (3, 1.0), (4, 4.5)):
        step = maskgit.Step(log_probs, None, None, None, None, t, 4, seeded(), tokens)
        priority = maskgit.by_confidence(step, temperature, log_probability).view(n, 2)
        noise = temperature * (1 - t / 4)
        expected = 1 / (1 + math.exp((second - first) / noise)) if noise else 1.0
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


def test_stop_after_commits_the_rest_and_finished_images_cost_no_more_calls():
    short, whole = [], []
    for trace, stop_after in ((short, 3), (whole, None)):
        assert decode_ragged(steps=10, order="confidence", stop_after=stop_after, trace=trace).max() < 5
    assert len(short) == 3 and torch.equal(short[0][0], whole[0][0])
    model = FixedMarginals([[0.6, 0.4]] * 4)
    mask = torch.tensor([[True] * 4, [True] + [False] * 3, [False] * 4])
    for hidden in (mask, mask & False):
        decode(model, torch.zeros(3, 4, dtype=torch.int64), hidden, grid_coords(2, 2), steps=4, order="random")
        assert model.sizes == [2, 1, 1, 1]


def test_evidence_is_added_to_the_logits_of_its_own_token():
    """Evidence for one code in each token overrules the model, whichever images are finished."""
    tokens, mask = ragged_batch(0)
    wanted = torch.randint(5, (6, 16), generator=seeded(1))
    found = decode_ragged(order="confidence", steps=4, evidence=100.0 * F.one_hot(wanted, 5))
    assert torch.equal(found, torch.where(mask, wanted, tokens))


# ---------------------------------------------------------------------------------------------------
# What the functions refuse

ONE_TOO_MANY = Mock(mask_id=5, training=False, return_value=torch.zeros(5, 16, 6))  # a logit for [MASK], too
REFUSED = [
    ("fewer of the 3 points are distinct", lambda: kmeans(np.array([[0.0], [-0.0], [1.0]]), 3)),
    ("finite", lambda: kmeans(np.array([[0.0], [np.nan]]), 1)),
    (r"init has shape \(2, 3\)", lambda: kmeans(np.eye(3), 3, init=np.zeros((2, 3)))),
    ("10x9", lambda: maskgit.image_patches(np.zeros((1, 9, 10, 3)), 3, 3)),
    ("stride 4", lambda: PatchTokenizer(np.zeros((2, 27)), 3, stride=4)),
    ("divisible by 4", lambda: maskgit.position_encoding(grid_coords(2, 2), 18)),
    ("linear, tied, cosine", lambda: tiny_model(head="mlp")),
    ("cosine head", lambda: tiny_model(head="tied", learn_temperature=True)),
    ("between 0 and 1", lambda: random_mask((2, 4), 1.5)),
    ("'nan' is no mask", lambda: training_mask((6, 100), "nan")),
    (r"\(1,\) of the order, 45 hidden tokens", lambda: decode_ragged(order=lambda state: state.tokens[:1])),
    ("none of the codes", lambda: decode_ragged(sample=lambda state: state.place + 5)),
    ("at least 1", lambda: decode_ragged(steps=0)),
    ("above 0", lambda: decode_ragged(temperature=0.0)),
    ("must agree", lambda: decode_ragged(mask=torch.zeros(6, 1, dtype=torch.bool))),
    ("tokens are 5 .. 5, the codes 0 .. 4", lambda: decode_ragged(tokens=torch.full((6, 16), 5))),
    ("tokens are -1 .. -1", lambda: decode_ragged(tokens=torch.full((6, 16), -1))),
    ("integers, not torch.float32", lambda: decode_ragged(tokens=torch.zeros(6, 16))),
    (r"logits are \(5, 16, 6\)", lambda: decode_ragged(ONE_TOO_MANY)),
    (r"model\.eval\(\)", lambda: decode_ragged(tiny_model().train())),
    ("no numbers", lambda: decode_ragged(evidence=torch.full((6, 16, 5), math.nan))),
    ("precision 'fp16'; choose from auto, float32, bf16", lambda: recipe(precision="fp16")),
    ("clip is 0.0", lambda: recipe(clip=0.0)),
    ("lr is nan", lambda: recipe(lr=math.nan)),
    ("steps is 'many', not of type int", lambda: recipe(steps="many")),
    (r"betas is \(0.9, 1.0\); it must be at least 0.0 and below 1.0", lambda: recipe(betas=(0.9, 1.0))),
    ("'sideways' is no mask", lambda: maskgit.Experiment(mask="cosine+sideways")),
]


@pytest.mark.parametrize(("message", "call"), REFUSED, ids=[message for message, _ in REFUSED])
def test_bad_arguments_are_named_in_one_line(message, call):
    assert re.search(message, refusal(call))


# ---------------------------------------------------------------------------------------------------
# Training


def striped_batch(step):
    """24 images of one colour each (codes 0 and 1), with very different numbers of hidden tokens."""
    generator = seeded(step)
    tokens = torch.randint(2, (24, 1), generator=generator).expand(24, 9).contiguous()
    return tokens, random_mask(tokens.shape, torch.rand(24, generator=generator), generator), grid_coords(3, 3)


def placed_batch(step):
    """The same, each image with its own coordinates."""
    tokens, mask, coords = striped_batch(step)
    return tokens, mask, coords + torch.arange(24)[:, None, None]


def recipe(**settings):
    return maskgit.Recipe(**{"steps": 20, "lr": 0.01, "optimizer": "adamw", "precision": "float32"} | settings)


def trained(batch=striped_batch, *, dropout=0.0, **settings):
    """The weights of a tiny model after training, and the rows of its log."""
    model = tiny_model(codes=2, dropout=dropout)
    options = {name: settings.pop(name) for name in list(settings) if name not in asdict(recipe())}
    rows = train(model, batch, recipe(**settings), **options)
    return weights(model), rows


@pytest.fixture
def saving(monkeypatch):
    """saving(4, 8, stop=11) are batches that let a run save after these steps, and in the end, and break off at 11."""

    def batch(saves, stop, step):
        if step == stop:
            raise KeyboardInterrupt
        monkeypatch.setattr(maskgit, "CHECKPOINT_SECONDS", -1 if step + 1 in saves else math.inf)
        return striped_batch(step)

    return lambda *saves, stop=None: functools.partial(batch, saves, stop)


def gradients_by_hand(model, every_position=False):
    """The loss of the first batch, and of each parameter."""
    tokens, mask, coords = striped_batch(0)
    log_probs = model(tokens.masked_fill(mask, 2), coords).log_softmax(dim=-1)
    losses = -log_probs.gather(-1, tokens[..., None])[..., 0]
    loss = losses.mean() if every_position else losses[mask].mean()
    return loss.item(), torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_learns_and_returns_the_log(optimizer, tmp_path, capsys):
    out = tmp_path / "new" / "run"
    found, rows = trained(steps=90, log_rows=3, optimizer=optimizer, out=out, warmup=5)
    assert rows[-1]["loss"] < 0.2 < math.log(2)  # what is left: images hidden altogether
    assert [row["step"] for row in rows] == logged(out, "step") == [30, 60, 90]
    assert [row["loss"] for row in rows] == logged(out, "loss")
    assert re.search(r"step 90/90  loss 0\.\d{4}  [\d.]+ steps/s  0:00 left *\n$", capsys.readouterr().err)
    assert torch.equal(saved_weights(out), found) and saved(out)["step"] == 90
    assert not saved(out)["model"].training and saved(out)["tokenizer"] is None


@pytest.mark.parametrize("accumulate", [1, 5, 30])
@pytest.mark.parametrize("counted", ["masked", "all"])
def test_loss_and_gradient_are_those_of_the_batchs_mean(accumulate, counted):
    """Parts with different numbers of hidden tokens must not be averaged as equals; some may be empty."""
    loss, gradients = gradients_by_hand(tiny_model(codes=2), every_position=counted == "all")
    (row,) = trained(steps=1, accumulate=accumulate, loss=counted)[1]
    assert row["loss"] == pytest.approx(loss, rel=1e-5)
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
    assert row["gradient_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_first_step_by_hand(optimizer):
    """AdamW moves weights by lr against the gradient's sign, Muon blocks' matrices by orthogonal ones; these decay."""
    model = tiny_model(codes=2, head="tied", rotary=False)
    matrices = {id(parameter) for parameter in model.blocks.parameters() if parameter.ndim == 2}
    before = [p.detach().clone() for p in model.parameters()]
    gradients = gradients_by_hand(model)[1]
    options = {"lr": 0.01, "warmup": 0, "clip": math.inf, "weight_decay": 0.5, "optimizer": optimizer}
    train(model, striped_batch, recipe(steps=1, **options))
    for parameter, start, gradient in zip(model.parameters(), before, gradients, strict=True):
        in_blocks = id(parameter) in matrices
        step = (parameter.detach() - start * (1 - 0.01 * 0.5 * in_blocks)) / 0.01
        if in_blocks and optimizer == "muon":
            sizes = torch.linalg.svdvals(step)[:4]
            assert (sizes / (0.2 * math.sqrt(max(step.shape))) - 1).abs().max() < 0.4
        else:
            large = gradient.abs() > 1e-5
            torch.testing.assert_close(step[large], -gradient.sign()[large], rtol=0, atol=2e-3)


def test_learning_rate_rises_and_falls_and_gradients_are_clipped():
    for decay, fall in {"constant": [1] * 4, "linear": [1, 3 / 4, 1 / 2, 1 / 4]}.items():
        rows = trained(steps=6, lr=0.3, warmup=2, decay=decay)[1]
        assert [row["lr"] for row in rows] == pytest.approx([0.1, 0.2, *(0.3 * share for share in fall)])
    norms = [trained(steps=1, clip=clip)[1][0]["gradient_norm"] for clip in (math.inf, 1e-3)]
    assert norms[0] == norms[1] > 0.01
    start = weights(tiny_model(codes=2))
    moves = [(trained(steps=1, warmup=0, clip=c)[0] - start).abs().mean() for c in (math.inf, 1e-9)]
    assert moves[1] < 0.2 * moves[0]  # so small that AdamW's epsilon shows


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_muon_has_the_precision_of_the_training(precision):
    """Newton and Schulz's polynomials of a random matrix by float64."""
    model = tiny_model(codes=2)
    target = model.blocks[0].mlp[0].weight
    start = target.detach().clone()
    target.grad = torch.randn(64, 16, generator=seeded())
    x = target.grad.double().T / target.grad.double().norm()  # the first step's momentum has the gradient's direction
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    settings = recipe(optimizer="muon", warmup=0, clip=math.inf, precision=precision)
    maskgit.update(model, maskgit.make_optimizers(model, settings), settings, 0)
    moved = (start - target).detach() / (0.01 * 0.2 * 8)
    error = (moved - x.T).norm() / x.norm()
    assert error < 1e-4 if precision == "float32" else 1e-4 < error < 0.05
    assert torch.ones(1).bfloat16().dtype == torch.bfloat16, "only the optimiser is told otherwise"


def test_bf16_trains_close_to_float32():
    exact, near = (trained(steps=30, log_rows=1, precision=p)[1][0]["loss"] for p in ("float32", "bf16"))
    assert near == pytest.approx(exact, rel=0.05) and near != exact


@pytest.mark.parametrize("options", [{}, {"optimizer": "muon", "accumulate": 3}])
def test_resumed_run_is_bit_identical(options, tmp_path, saving):
    """With dropout, after a run that broke off between two checkpoints and two rows of the log."""
    options = {"log_rows": 3, "dropout": 0.1} | options
    undisturbed, rows = trained(**options)
    assert not torch.equal(undisturbed, trained(seed=1, **options)[0]), "dropout follows the seed"
    with pytest.raises(KeyboardInterrupt):
        trained(saving(4, 8, 12, stop=11), out=tmp_path, **options)
    assert saved(tmp_path)["step"] == 8
    resumed, resumed_rows = trained(out=tmp_path, resume=True, **options)
    assert torch.equal(resumed, undisturbed) and logged(tmp_path, "step") == [6, 12, 18, 20]
    assert [row["loss"] for row in resumed_rows] == [row["loss"] for row in rows]
    seeds = set()  # of dropout: another in each step, and none that a part of a batch may have
    trained(lambda step: seeds.add(torch.initial_seed()) or striped_batch(step), steps=5)
    assert len(seeds) == 5
    assert seeds.isdisjoint(maskgit.step_seed(0, step, part) for step in range(5) for part in range(100))


def test_the_best_validated_model_is_kept(tmp_path, saving):
    """The second row's, where the first has no number; also of a run that was broken off after it."""
    seen = []

    def validate(model):
        assert not model.training
        seen.append(weights(model))
        return {"figure": [math.nan, 1.0, 3.0, 1.5][len(seen) - 1]}

    options = {"steps": 8, "log_rows": 4, "validate": validate, "best_by": "figure"}
    found, _ = trained(**options)
    best, *_, last = seen[1:]
    assert torch.equal(found, best) and not torch.equal(best, last)
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        trained(saving(6, stop=7), out=tmp_path, **options)
    assert torch.equal(saved_weights(tmp_path), best)
    found, _ = trained(out=tmp_path, resume=True, **options)
    assert torch.equal(found, best) and torch.equal(saved_weights(tmp_path), best) and len(seen) == 4
    options["validate"] = lambda model: {"figure": math.nan}
    assert torch.equal(trained(**options)[0], last), "without any number"


def test_resume_refuses_another_recipe_another_model_and_no_checkpoint(tmp_path):
    resumed = functools.partial(refusal, trained, steps=2, out=tmp_path, resume=True)
    assert "No such file" in resumed()
    trained(steps=2, out=tmp_path, lr=0.1)
    assert "holds a run already" in resumed(resume=False) and saved(tmp_path)["step"] == 2
    assert "lr=0.1, not 0.2" in resumed(lr=0.2)
    other = tiny_model(codes=2, dim=32)
    assert "dim=16, not 32" in refusal(train, other, striped_batch, recipe(steps=2, lr=0.1), out=tmp_path, resume=True)
    with pytest.raises(NotADirectoryError):  # at the start
        trained(Mock(side_effect=AssertionError), out=tmp_path / "model.pt" / "run")


def test_loss_that_is_no_number_stops_and_keeps_the_checkpoint(tmp_path, saving):
    model = tiny_model(codes=2)

    def poisoned(step):
        if step == 5:
            torch.nn.init.constant_(model.embedding.weight, math.nan)
        return saving(2, 4, 6)(step)

    said = refusal(train, model, poisoned, recipe(log_rows=1), out=tmp_path)
    assert "no longer finite at step 6" in said
    for options in ({"steps": 2}, {"steps": 1}):  # the loss still was finite, before the update
        said = refusal(trained, lr=math.inf, warmup=0, decay="constant", out=tmp_path, force=True, **options)
        assert "no longer finite at step 1;" in said
    assert saved(tmp_path)["step"] == 4 and saved_weights(tmp_path).isfinite().all()


def test_batches_of_any_integers_and_none_that_hides_nothing():
    tokens, mask, coords = striped_batch(0)
    expected, _ = trained(lambda step: (tokens, mask, coords), steps=3)
    for kind in (torch.int32, torch.uint8):
        assert torch.equal(trained(lambda step, kind=kind: (tokens.to(kind), mask, coords), steps=3)[0], expected)
    assert "batch(0) hides no token" in refusal(trained, lambda step: (tokens, mask & False, coords))
    assert "the mask as bool" in refusal(trained, lambda step: (tokens, mask.long(), coords))
    assert "tokens are 1 .. 2, the codes 0 .. 1" in refusal(trained, lambda step: (tokens + 1, mask, coords))


def test_what_is_written_can_be_read(tmp_path):
    """Numbers of numpy wherever they may come from, tensors beside them, and models that are compiled."""
    model = torch.compile(tiny_model(codes=2), backend="eager")
    numbers = {"a": np.float32(0.5), "b": torch.tensor(0.25), "c": np.int64(3), "d": True}
    options = {"out": tmp_path, "validate": lambda model: numbers}
    train(model, striped_batch, recipe(steps=2), **options)
    first = train(tiny_model(codes=2), striped_batch, recipe(steps=2), resume=True, **options)[0]
    assert [first[name] for name in numbers] == [0.5, 0.25, 3.0, 1.0]
    assert torch.equal(saved_weights(tmp_path), weights(model))
    model = tiny_model(codes=np.int64(2), dim=np.int32(16))
    config = {"a": np.float32(0.5), "b": [np.int64(1), torch.tensor(2)], "c": {"d": np.bool_(True)}, "e": None}
    options = dict(config=config, step=np.int64(7), extra={"a": torch.ones(2)})
    maskgit.save_checkpoint(tmp_path / "model.pt", torch.compile(model, backend="eager"), **options)
    assert torch.equal(saved_weights(tmp_path), weights(model))
    assert torch.equal(saved(tmp_path)["extra"]["a"], torch.ones(2)) and saved(tmp_path)["step"] == 7
    assert saved(tmp_path)["config"] == {"a": 0.5, "b": [1, 2], "c": {"d": True}, "e": None}
    assert "of tensors" in refusal(maskgit.save_checkpoint, tmp_path / "model.pt", model, extra={"a": np.ones(2)})


def test_checkpoint_is_replaced_whole(tmp_path, monkeypatch, capsys):
    """Whatever the room on the disk: none, all but a byte, or enough for what fails later."""
    path = tmp_path / "model.pt"
    maskgit.save_checkpoint(path, tiny_model(), step=1)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError(27, "at the very end")))
    for size in (*range(0, len(before), len(before) // 30), len(before) - 1, 2 * len(before)):
        with room_for(size):
            assert ending(lambda: maskgit.save_checkpoint(path, tiny_model(), step=2)) == 2
        assert re.fullmatch(r"error: \[Errno 27\] .*\n", capsys.readouterr().err)
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_after_a_checkpoint(number, code, tmp_path, capsys):
    """Of the step under way, from which it resumes to the very same weights. Twice, or where nothing is trained, it
    ends the run at once; where it is ignored, as in the background of a shell, it does nothing."""

    def batch(times, step):
        for _ in range(times if step == 3 else 0):
            signal.raise_signal(number)
        return striped_batch(step)

    signal.signal(number, signal.default_int_handler)  # SIGINT is ignored where the tests run in the background
    options = {"steps": 9, "log_rows": 2, "dropout": 0.1}
    for times, more in ((1, f"; --resume goes on from {tmp_path}/model.pt"), (2, "")):
        run = functools.partial(trained, functools.partial(batch, times), out=tmp_path, force=True, **options)
        assert ending(run) == code and capsys.readouterr().err == f"interrupted{more}\n"
        assert saved(tmp_path)["step"] == 4
    resumed, rows = trained(out=tmp_path, resume=True, **options)
    assert torch.equal(resumed, trained(**options)[0]) and [row["step"] for row in rows] == [4, 8, 9]
    late = functools.partial(
        trained, out=tmp_path / "late", validate=lambda model: signal.raise_signal(number) or {}, steps=1
    )
    assert ending(late) == code and saved(tmp_path / "late")["step"] == 1
    assert ending(lambda: signal.raise_signal(number)) == code
    handler = signal.signal(number, signal.SIG_IGN)
    assert ending(lambda: signal.raise_signal(number)) == 0
    signal.signal(number, handler)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_damaged_checkpoints_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pt"
    model = tiny_model()
    maskgit.save_checkpoint(path, model)
    whole = path.read_bytes()
    contents = torch.load(path)
    weight = whole.index(model.embedding.weight.detach().numpy().tobytes())
    flipped = whole[:weight] + bytes([whole[weight] ^ 1]) + whole[weight + 1 :]
    for wrong in (b"", whole[: len(whole) // 2], flipped, Malicious(), [1, 2], contents | {"weights": {}}):
        path.write_bytes(wrong) if isinstance(wrong, bytes) else torch.save(wrong, path)
        assert "model.pt is damaged or no checkpoint" in refusal(saved, tmp_path)
    assert not (tmp_path / "owned").exists()
    assert "No such file" in refusal(saved, tmp_path / "nowhere")
    monkeypatch.setattr(maskgit.MaskGIT, "to", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    path.write_bytes(whole)
    with pytest.raises(torch.OutOfMemoryError):  # which is not the file's fault
        saved(tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_cuda_trains_like_the_cpu_and_decodes(precision):
    models = [tiny_model(codes=2).to(device) for device in ("cpu", "cuda")]
    losses = [train(model, striped_batch, recipe(log_rows=1, precision=precision))[0]["loss"] for model in models]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    hidden = torch.ones(4, 16, dtype=torch.bool, device="cuda")
    for order in ORDERS:
        options = {"steps": 4, "order": order, "generator": torch.Generator("cuda").manual_seed(0)}
        filled = decode(models[1], hidden.long(), hidden, grid_coords(4, 4).cuda(), **options)
        assert filled.is_cuda and filled.max() < 2


# ---------------------------------------------------------------------------------------------------
# For the scripts


def test_a_seed_makes_a_model_and_the_cpu_is_a_device():
    models = (maskgit.Experiment(seed=seed, dim=8, heads=1).new_model(3, "cpu") for seed in (3, 3, 4))
    first, again, other = map(weights, models)
    assert torch.equal(first, again) and not torch.equal(first, other)
    cpu = maskgit.pick_device("cpu")
    assert recipe(precision="bf16").for_device(cpu).precision == "bf16"
    assert recipe(precision="auto").for_device(cpu).precision == maskgit.fast_precision(cpu)


def test_settings_become_flags_and_flags_settings(monkeypatch, capsys):
    """Flags win over a preset's defaults, these over a script's, and these over the dataclass's own."""

    def differing(command):
        parser = maskgit.CommandLine("")
        parser.add_argument("--preset")
        maskgit.add_flags(parser, maskgit.Experiment, hidden=32, lr=0.5, rotary=False)
        monkeypatch.setattr(sys, "argv", ["script.py", *command.split()])
        arguments = parser.parse_with(lambda first: {"steps": 77, "lr": 7.0} if first.preset == "large" else {})
        found = asdict(maskgit.settings_from(arguments, maskgit.Experiment))
        return {name: value for name, value in found.items() if value != getattr(maskgit.Experiment, name)}

    assert differing("") == dict(hidden=32, lr=0.5, rotary=False)
    assert differing("--lr 2 --preset large --rotary") == dict(hidden=32, lr=2.0, steps=77)
    assert differing("--lr 4e-3 --rotary --hidden 0 --betas 0.5 0.25") == dict(betas=(0.5, 0.25))
    with pytest.raises(SystemExit):
        differing("--help --preset large")
    assert "default 77" in capsys.readouterr().out


def test_bad_input_is_one_line_and_a_bug_has_its_traceback(capsys):
    for error, said in [
        (maskgit.InputError("no such hole\nat all"), "error: no such hole\n"),
        (FileNotFoundError(2, "No such file", "a.png"), "error: [Errno 2] No such file: 'a.png'\n"),
        (torch.OutOfMemoryError("CUDA out of memory"), "error: not enough memory: CUDA out of memory\n"),
    ]:
        assert ending(Mock(side_effect=error)) == 2 and capsys.readouterr().err == said
    for error in (ValueError, RuntimeError):
        with pytest.raises(error):
            ending(Mock(side_effect=error))


def test_lines_that_cannot_be_written_end_nothing():
    """They are dropped, or escaped where the encoding lacks a letter."""

    def main():
        print("ü की", flush=True)
        assert not sys.stderr.isatty()
        raise maskgit.InputError("ü की")

    read, write = os.pipe()
    os.close(read)
    for file in (write, *filter(os.path.exists, ["/dev/full"])):
        with open(file, "w") as file:  # which writes nothing more when it is closed
            assert ending(main, file, file) == 2
    assert ending(main, None, None) == 2
    for encoding, shown in {"utf-8": "ü की", "cp1252": r"ü \u0915\u0940", "ascii": r"\xfc \u0915\u0940"}.items():
        file = io.TextIOWrapper(io.BytesIO(), encoding)
        assert ending(main, file, file) == 2
        assert file.buffer.getvalue().decode(encoding).splitlines() == [shown, f"error: {shown}"]


def test_a_record_knows_the_commit_and_whether_files_differ_from_it(tmp_path, monkeypatch):
    (folder := tmp_path / "a folder").mkdir()
    monkeypatch.setattr(maskgit, "__file__", str(folder / "maskgit.py"))
    (folder / "toy.py").write_text("")
    assert maskgit.run_record()["commit"] == "unknown"
    for command in ("init", "add toy.py", "-c user.name=a -c user.email=a commit -m first"):
        subprocess.run(["git", "-C", folder, *command.split()], check=True, capture_output=True)
    for text in ("", "a change"):
        (folder / "toy.py").write_text(text)
        record = maskgit.run_record()
        assert re.fullmatch("[0-9a-f]{7,}", record["commit"]) and record["changed"] == bool(text)
    maskgit.write_figures(record, {"clip": math.inf}, {"kl": 0.5}, tmp_path / "new" / "a.json", None)
    figures = json.loads((tmp_path / "new" / "a.json").read_text())
    assert figures == {**record, "minutes": figures["minutes"], "settings": {"clip": "inf"}, "kl": 0.5}


def test_pictures_show_each_thing_in_its_place():
    """In a plot 10 lies half way between 1 and 100; what has no logarithm is left out."""
    images = np.arange(6).reshape(6, 1, 1, 1) / 10 * np.ones((6, 2, 3, 1))
    sheet = np.asarray(maskgit.image_grid(images, 4, scale=5, gap=2))
    assert sheet.shape == (2 * 12 + 2, 4 * 17 + 2, 3)
    assert all((sheet[2 + i // 4 * 12 :, 2 + i % 4 * 17 :][:10, :15] == round(i / 10 * 255)).all() for i in range(6))
    assert (sheet[:2] == (170, 190, 215)).all() and (sheet[14:, 36:] == sheet[0, 0]).all()
    colour = np.zeros((1, 1, 1, 3)) + [1, 0.5, 0]
    assert np.asarray(maskgit.image_grid(colour, 1, titles=["orange"]))[-5, 4].tolist() == [255, 128, 0]
    plot = functools.partial(maskgit.line_plot, title="t", y_label="y")
    curves = {"flat": ([0, 1], [10, 10]), "steep": ([0, 1], [1, 100])}
    blue = np.abs(np.asarray(plot(curves)).astype(int) - [0, 0x72, 0xB2]).sum(axis=-1) < 60
    rows, columns = blue[:, 80:650].nonzero()
    assert abs(np.median(rows) - (60 + 468) / 2) <= 2 and columns.max() - columns.min() > 560
    assert plot(curves) == plot(curves | {"flat": ([0, 1, 1, 0], [10, 10, math.nan, 0]), "none": ([0, 1], [0, 0])})
    assert maskgit.axis([0, 1], 0, 100)[1] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])


# ---------------------------------------------------------------------------------------------------
# train_squares.py: the prior, its posterior, scores, completions

SQUARES = train_squares.all_squares(8, 2, 5)
EXACT = train_squares.ExactModel(SQUARES)


def test_number_of_squares():
    for low, high, count in ((2, 5, 126), (2, 6, 135), (1, 4, 174)):
        prior = train_squares.all_squares(8, low, high)
        assert prior.shape == (count, 64) and len(prior.unique(dim=0)) == count
        for image in prior.reshape(-1, 8, 8):
            ys, xs = image.nonzero().T
            side = int(ys.max() - ys.min()) + 1
            assert side == xs.max() - xs.min() + 1 and image.sum() == side**2 and low <= side <= high


def test_posterior_equals_counting():
    tokens = SQUARES[torch.randint(126, (40,), generator=seeded())]
    mask = training_mask(tokens.shape, "cosine", seeded(1))
    mask[0] = True
    shown = tokens.masked_fill(mask, 2)
    of_pixels = train_squares.posterior(SQUARES, shown)
    of_images = train_squares.image_posterior(SQUARES, shown)
    for row in range(40):
        agreeing = ((tokens[row] == SQUARES) | mask[row]).all(dim=1)
        torch.testing.assert_close(of_pixels[row], SQUARES[agreeing].float().mean(dim=0))
        torch.testing.assert_close(of_images[row], agreeing.double() / agreeing.sum())


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


def test_epochs_show_every_image_as_often_and_batches_spread_their_masks():
    settings = train_squares.Squares(seed=3, batch_size=50, presentations=2, mask="cosine")
    batch, again, other = (train_squares.make_batch(SQUARES, replace(settings, seed=seed)) for seed in (3, 3, 4))
    shown = torch.cat([batch(step)[0] for step in range(126)])  # 6300 images: 25 epochs of 252
    for images, times in ((shown, 50), (shown[:252], 2)):
        assert ((images[:, None] == SQUARES).all(dim=-1).sum(dim=0) == times).all()
    assert all(map(torch.equal, batch(7), again(7))) and not torch.equal(shown[:252], shown[252:504])
    assert not any(map(torch.equal, batch(7)[:2], other(7)[:2]))
    gamma = [64 * math.cos(math.pi / 2 * i / 50) for i in range(51)]
    for i, hidden in enumerate(batch(7)[1].sum(dim=1).tolist()):
        assert gamma[i + 1] <= hidden <= math.ceil(gamma[i])


def test_completions_are_scored_exactly():
    """Three pixels per step, row by row: the product of the images' shares, by counting."""
    prior = train_squares.all_squares(3, 1, 2)
    n = len(prior)
    images = prior.tolist()
    p = np.ones(n)
    for i, known in itertools.product(range(n), (0, 3, 6)):
        agreeing = [image for image in images if image[:known] == images[i][:known]]
        for pixel in range(known, known + 3):
            p[i] *= np.mean([image[pixel] == images[i][pixel] for image in agreeing])
    options = {"order": lambda state: -state.place.float(), "steps": 3, "schedule": "linear"}
    exact = train_squares.ExactModel(prior)
    nothing = train_squares.completion_inputs(prior)["nothing"]
    result = train_squares.judge_followed(exact, prior, nothing, "cpu", **options)
    assert result["valid"] == pytest.approx(p.sum()) and result["kl"] == pytest.approx(-np.log(p * n).mean())
    assert result["total_variation"] == pytest.approx((np.abs(p - 1 / n).sum() + 1 - p.sum()) / 2)
    assert result["calls"] == pytest.approx(3) == result["most_calls"]
    # A corner is white: 1x1, or 2x2 with two pixels at once.
    corner = train_squares.judge_followed(exact, prior, torch.tensor([[1] + [2] * 8]), "cpu", **options)
    assert corner["valid"] == pytest.approx(1 / 4 + 1 / 4) and corner["total_variation"] == pytest.approx(1 / 2)


def test_completions_with_the_posteriors_marginals():
    """The entropy order samples the squares exactly, in few calls."""
    inputs = train_squares.completion_inputs(SQUARES)
    for given, shown in inputs.items():
        result = train_squares.judge_followed(EXACT, SQUARES, shown, "cpu", order=maskgit.by_entropy)
        assert result["valid"] == pytest.approx(1) and result["total_variation"] < 1e-6 > result["kl"], given
        assert result["calls"] < 9 and result["most_calls"] <= 20
    hidden = {given: shown == 2 for given, shown in inputs.items()}
    assert (hidden["random half"].sum(dim=1) == 32).all() and len(hidden["random half"].unique(dim=0)) > 100
    columns = torch.arange(64) % 8
    assert (hidden["left half"] == (columns >= 4)).all() and (hidden["bottom half"] == (torch.arange(64) < 32)).all()


def test_inputs_that_show_the_same_count_as_often_as_there_are():
    """Of the four 1x1 squares on 2x2 the top row is hidden: two show black, where a guess is right by half."""
    prior = train_squares.all_squares(2, 1, 1)
    shown = prior.masked_fill(torch.tensor([True, True, False, False]), 2)
    start = train_squares.ExactModel(prior), prior, shown, "cpu"
    at_once = {"order": lambda state: -state.place.float(), "steps": 1}  # white and white, too
    followed = train_squares.judge_followed(*start, **at_once)
    counted = train_squares.judge_counted(*start, 40000, **at_once)
    for result, error in ((followed, 1e-6), (counted, 0.01)):
        assert result["valid"] == pytest.approx((0.5 + 0.5 + 1 + 1) / 4, abs=error)
        assert result["total_variation"] == pytest.approx((0.5 + 0.5) / 4, abs=error)
        assert result["calls"] == 1 == result["most_calls"]
    of_heads = math.sqrt(2 / math.pi) * 0.5 / math.sqrt(40000 / 3)  # the mean error of their share in so many tosses
    assert counted["exact_sampling"] == pytest.approx((of_heads + of_heads) / 4, rel=0.2) and counted["draws"] == 40002
    result = train_squares.judge_followed(*start, order=maskgit.by_entropy)
    assert result["calls"] == pytest.approx((2 + 2 + 1 + 1) / 4) and result["valid"] == pytest.approx(1)
    for order in (lambda state: state.tokens.float(), maskgit.at_random):
        with pytest.raises((AttributeError, TypeError)):  # since it looks at drawn tokens, or draws numbers
            train_squares.judge_followed(*start, order=order)


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


def test_coverage_equals_an_integration_on_8192_points_and_images_256_downsampled_pixels():
    rng = np.random.default_rng(0)
    rectangles = train_rectangles.draw_rectangles(6, rng, "sparse")
    points = rng.random((6, 5, 2)) * 12
    found = train_rectangles.coverage(rectangles, points).reshape(6, 5, 4, 4)
    at = points[..., None] + (np.arange(4 * 8192) + 0.5) / 8192  # (6, 5, 2, 4 * 8192)
    low, high = rectangles.reshape(6, 2, 1, 2, 1).swapaxes(0, 1)
    x, y = ((low < at) & (at < high)).reshape(6, 5, 2, 4, 8192).mean(axis=-1).transpose(2, 0, 1, 3)
    np.testing.assert_allclose(found, y[..., None] * x[..., None, :], atol=3e-4)
    rectangles = train_rectangles.draw_rectangles(4, 0, "grid")
    large = np.zeros((4, 256, 256))
    for picture, (x0, y0, x1, y1) in zip(large, (rectangles * 16).astype(int), strict=True):
        picture[y0:y1, x0:x1] = 1
    expected = large.reshape(4, 16, 16, 16, 16).mean(axis=(2, 4))
    np.testing.assert_allclose(train_rectangles.paint_rectangles(rectangles)[..., 0], expected, atol=1e-6)


def test_codebook_is_that_of_the_sources_rectangles_and_sparse_tokens_are_the_grids(tokenizer):
    assert tokenizer.centroids.shape == (20, 16) and (tokenizer.patch, tokenizer.stride) == (4, 1)
    images = train_rectangles.paint_rectangles(train_rectangles.draw_rectangles(100, 0, "grid"))
    patches = maskgit.image_patches(images, 4, 1).reshape(-1, 16)
    labels = tokenizer.nearest(patches)
    for code, centroid in enumerate(tokenizer.centroids):  # each is the mean of what it stands for
        np.testing.assert_allclose(centroid, patches[labels == code].mean(axis=0), atol=0.05)
    rectangles = train_rectangles.draw_rectangles(50, 1, "sparse")
    grid = tokenizer.encode(train_rectangles.paint_rectangles(rectangles)).reshape(50, 169)
    assert (tokenizer.nearest(train_rectangles.coverage(rectangles, train_rectangles.GRID_POINTS)) == grid).all()


def test_batches_depend_on_the_step_alone(tokenizer):
    options = train_rectangles.Rectangles(task="sparse", seed=3, batch_size=6, points=5, mask="0.2")
    first, second = (train_rectangles.make_batch(tokenizer, options) for _ in range(2))
    for step in (4, 0):
        assert all((a == b).all() for a, b in zip(first(step), second(step), strict=True))
    other = train_rectangles.make_batch(tokenizer, replace(options, seed=4))
    for different in (first(1), other(0)):
        assert not any(map(torch.equal, first(0), different))
    # Of 2 rectangles, whatever the step, there are two pictures and two sets of fixed points.
    for task, fixed_points, shown in (("grid", False, 0), ("sparse", True, 2)):
        points = 5 if fixed_points else 24
        options = replace(options, task=task, rectangles=2, fixed_points=fixed_points, points=points)
        batch = train_rectangles.make_batch(tokenizer, options)
        assert len({str(row) for step in range(5) for row in batch(step)[shown].tolist()}) == 2


def test_posterior_equals_rejection_sampling_and_of_everything_hidden_is_the_prior(tokenizer):
    """Draw from the prior, keep what agrees with the visible tokens: slow, but the definition of the posterior."""
    truth, prior = (train_rectangles.draw_rectangles(count, count, "sparse") for count in (2, 100_000))
    test = train_rectangles.make_test("sparse", truth, tokenizer, point_count=5, mask="0.5", proposals=15_000, seed=1)
    for points, tokens, mask, posterior in zip(test.points, test.tokens, test.mask, test.posterior, strict=True):
        drawn = tokenizer.nearest(train_rectangles.coverage(prior, points))
        agreeing = drawn[(drawn == tokens)[:, ~mask].all(axis=1)]
        assert len(agreeing) > 200
        for place in range(5):
            expected = np.bincount(agreeing[:, place], minlength=20) / len(agreeing)
            assert np.abs(posterior[place] - expected).sum() / 2 < 0.1
    # With a single, hidden patch the chain reaches the prior whatever it starts from. Two uniform corners in [0, 16] at
    # least 2 apart are both in [4, 16], on an axis, with the probability (10 / 14)^2; one such axis leaves it empty.
    truth = np.tile([[0.0, 0.0, 16.0, 16.0]], (40, 1))
    points = np.zeros((40, 1, 2))
    mask = np.ones((40, 1), dtype=bool)
    chain = train_rectangles.posterior_chain(truth, points, mask, tokenizer, np.random.default_rng(0), "sparse")
    states = np.concatenate([state for state, _ in itertools.islice(chain, 1000, 3000, 10)])
    empty = (train_rectangles.coverage(states, points[0]).sum(axis=(1, 2)) == 0).mean()
    assert empty == pytest.approx(1 - (1 - (10 / 14) ** 2) ** 2, abs=0.04)


@pytest.mark.parametrize(("task", "count", "proposals"), [("sparse", 60, 2000), ("grid", 20, 200)])
def test_the_posterior_agrees_with_what_is_visible_and_is_the_limit(task, count, proposals, tokenizer, monkeypatch):
    rectangles = train_rectangles.draw_rectangles(count, 5, task)
    test = train_rectangles.make_test(task, rectangles, tokenizer, proposals=proposals)
    drawn = tokenizer.nearest(train_rectangles.coverage(test.draws, test.points))
    assert (drawn == test.tokens)[~test.mask].all() and not np.array_equal(test.draws, rectangles)
    assert (test.draws * 16 == np.rint(test.draws * 16)).all() == (task == "grid")
    posterior = torch.from_numpy(test.posterior[test.mask])
    assert (posterior.sum(dim=1) - 1).abs().max() < 1e-5
    monkeypatch.setattr(train_rectangles, "hidden_log_probs", lambda *_: posterior.log().clamp(min=-50))
    perfect = train_rectangles.score(None, test)
    codes = test.tokens[test.mask]
    assert perfect["cross_entropy"] == pytest.approx(perfect["limit"], rel=1e-5)
    assert perfect["accuracy"] == perfect["posterior_accuracy"]
    assert perfect["commonest"] == pytest.approx(max(np.mean(codes == code) for code in range(20)))
    assert perfect["hits"] == perfect["posterior_hits"] == pytest.approx(perfect["accuracy"], abs=0.08)
    monkeypatch.setattr(train_rectangles, "hidden_log_probs", lambda *_: torch.full_like(posterior, 0.05).log())
    assert train_rectangles.score(None, test)["cross_entropy"] == pytest.approx(math.log(20), rel=1e-5)


def test_picture_errors_by_hand(tokenizer, monkeypatch):
    rectangles = train_rectangles.draw_rectangles(2, 0, "grid")
    test = train_rectangles.make_test("grid", rectangles, tokenizer, mask="left half", proposals=1)
    assert test.mask.reshape(2, 13, 13).tolist() == [[[True] * 6 + [False] * 7] * 13] * 2
    drawn, likeliest = np.random.default_rng(0).integers(20, size=(2, 2, 169))
    monkeypatch.setattr(train_rectangles, "fill", lambda *_, sample=None: likeliest if sample else drawn)
    found = train_rectangles.score_pictures(None, test, tokenizer)
    errors = {}
    posterior = tokenizer.nearest(train_rectangles.coverage(test.draws, train_rectangles.GRID_POINTS))
    filled = {"drawn": drawn, "posterior": posterior, "likeliest": likeliest, "tokenizer": test.tokens}
    for name, tokens in filled.items():
        difference = tokenizer.decode(tokens.reshape(2, 13, 13)) - train_rectangles.paint_rectangles(test.rectangles)
        errors[name] = np.abs(difference).mean(axis=(1, 2, 3))
        assert found[name] == pytest.approx(errors[name].mean(), rel=1e-4)
    excess = errors["likeliest"] - errors["tokenizer"]
    assert found["likeliest_excess"] == pytest.approx([excess.mean(), excess.std() / 2**0.5], rel=1e-3)


def test_hidden_tokens_are_not_shown_to_the_model_that_is_scored(tokenizer):
    test = train_rectangles.make_test("sparse", train_rectangles.draw_rectangles(9, 0, "grid"), tokenizer, proposals=1)
    model = tiny_model(codes=20)
    tokens, mask, points = map(torch.from_numpy, (test.tokens, test.mask, test.points))
    with torch.no_grad():
        expected = model(tokens.masked_fill(mask, 20), points.float()).log_softmax(dim=-1)[mask]
    torch.testing.assert_close(train_rectangles.hidden_log_probs(model, test), expected, rtol=1e-4, atol=1e-5)


def test_patches_are_painted_where_they_lie(tokenizer):
    cell = train_rectangles.SCALE
    brightest = tokenizer.centroids.mean(axis=1).argmax()
    drawn = train_rectangles.paint_patches(np.array([[0.5, 10.0]]), [brightest], tokenizer)
    rows, columns = np.nonzero(drawn != train_rectangles.GREY)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10 * cell, 14 * cell - 1, 6, 6 + 4 * cell - 1)
    boxed = train_rectangles.paint_boxes(drawn, [(2, 3, 5, 6, (255, 0, 0))])
    assert boxed[3 * cell, 3 * cell].tolist() == boxed[6 * cell - 1, 5 * cell - 1].tolist() == [1, 0, 0]
    assert boxed[6 * cell, 5 * cell].tolist() != [1, 0, 0]


# ---------------------------------------------------------------------------------------------------
# train_squares.py and train_rectangles.py as a user runs them

TINY = ["--dim", "8", "--heads", "2", "--layers", "1", "--hidden", "16", "--batch-size", "16"]
TINY += ["--grid", "4", "--max-side", "3", "--device", "cpu", "--precision", "float32"]
SMALL = ["--dim", "16", "--heads", "2", "--layers", "1", "--batch-size", "8", "--steps", "4"]
SMALL += ["--test-images", "8", "--proposals", "10", "--device", "cpu"]
FIXED = [*SMALL, "--task", "sparse", "--rectangles", "3", "--fixed-points"]


def test_the_squares_that_come_along():
    """They are the default run's, of which squares.json is, and near the posterior."""
    path = HERE / "results" / "squares.pt"
    figures = json.loads(path.with_suffix(".json").read_text())
    assert figures["weights_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    checkpoint = maskgit.load_checkpoint(path)
    assert checkpoint["training"] is None and path.stat().st_size < 1_000_000
    kl = train_squares.score(checkpoint["model"], SQUARES, "cosine", 1024, seed=7)["kl"]
    assert 0.7 < kl / figures["tasks"]["cosine"]["kl"] < 1.4


AS_SHOWN = {"cosine+cosine+cosine+half": "as in training"}


@pytest.mark.parametrize(
    ("script", "options", "scored"),
    [
        (train_squares, TINY, "cosine+cosine+cosine+half, cosine, single, 0.2"),
        (train_rectangles, SMALL, "unseen rectangles, cosine masking, left half hidden"),
        (train_rectangles, FIXED, "unseen rectangles, training rectangles, 6 points, 12 points, 48 points, 96 points"),
    ],
)
def test_a_run_leaves_what_it_promises(script, options, scored, tmp_path, monkeypatch, capsys):
    squares = script is train_squares
    out = tmp_path / "run"
    copy = tmp_path / "new folder" / "figures.json"
    small = tmp_path / "small.pt"
    arguments = [*options, "--steps", "4", "--out", out]
    assert call(script, *arguments, "--json", copy, *(["--weights", small] if squares else [])) == 0
    screen = capsys.readouterr().out
    assert all((train_squares.TASKS | AS_SHOWN).get(name, name) in screen for name in scored.split(", "))
    pictures = {"prior.png", "decode.gif"} if squares else {"rectangles.png", "centroids.png"}
    pictures |= {"loss.png", "samples.png"}
    assert {path.name for path in out.iterdir()} == {"model.pt", "log.csv", "metrics.json"} | pictures
    for name in pictures:
        Image.open(out / name).verify()
        assert str(out / name) in screen
    figures = json.loads((out / "metrics.json").read_text())
    assert figures == json.loads(copy.read_text())
    assert {"command", "commit", "machine", "settings", "seconds", "completions" if squares else "log"} <= set(figures)
    scores = figures["tasks" if squares else "scores"]
    assert ", ".join(scores) == scored
    for row in scores.values():
        assert row["cross_entropy"] >= row["limit"] and row["accuracy"] <= row["posterior_accuracy"]
    if squares:
        assert torch.equal(weights(maskgit.load_checkpoint(small)["model"]), saved_weights(out))
        assert figures["weights_sha256"] == hashlib.sha256(small.read_bytes()).hexdigest()
    before = (out / "model.pt").read_bytes()
    assert call(script, *arguments) == 2, "a finished run is not overwritten"
    assert "holds a run already" in capsys.readouterr().err and (out / "model.pt").read_bytes() == before
    monkeypatch.setattr(script, "fit_tokenizer", None, raising=False)  # a resumed run takes the one it has
    assert call(script, *arguments, "--resume", "--json", copy) == 0
    assert json.loads(copy.read_text())["tasks" if squares else "scores"] == scores


def test_presets_carry_the_sources_numbers(monkeypatch):
    one = dict(dim=768, hidden=3072, layers=6, heads=8, dropout=0.1, norm="post", head="cosine", positions="printed")
    one |= dict(batch_size=126, steps=300)
    two = dict(dim=640, hidden=1600, layers=6, heads=8, min_side=1, max_side=4, mask="0.2", steps=300 * 40, lr=0.001)
    report = dict(dim=768, heads=16, layers=15, hidden=1536, codes=1024, patch=4, batch_size=10, steps=120_000)
    report |= dict(optimizer="adamw", lr=1e-4, betas=(0.9, 0.96), decay="constant", warmup=0, loss="all", dropout=0.1)
    report |= dict(hole_rows=0.0, mirror=False, rotary=False)
    flags = {"post1": one, "post2 --lr 0.001": two, "post2 --steps 7": {"steps": 7}, "report": report}
    for preset, numbers in flags.items():
        script = inpaint if numbers is report else train_squares
        monkeypatch.setattr(sys, "argv", ["script.py", "--preset", *preset.split()])
        settings = asdict(script.parse_arguments()[1])
        assert numbers == {name: settings[name] for name in numbers}


def test_bad_input_gets_one_line_and_code_2(tmp_path, monkeypatch, capsys):
    """Before anything is made."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("in the way")
    for script, arguments, message in [
        (train_squares, "--lr nan", "it must be at least 0"),
        (train_squares, "--grid 4", "max side"),
        (train_squares, "--heads 5", "divisible by"),
        (train_squares, "--device cuda:99", "cannot be used"),
        (train_squares, "--out file/run", "Not a directory"),
        (train_squares, "--json file/a.json", "File exists: 'file'"),
        (train_squares, "--weights .", "argument --weights: . is a folder"),
        (train_rectangles, "--json .", "argument --json: . is a folder"),
        (train_rectangles, "--resume", "no checkpoint"),
        (train_rectangles, "--proposals 9", "is below 10"),
        (train_rectangles, "--fixed-points", "need a number of rectangles"),
        (train_rectangles, "--points 5", "are for the sparse task"),
    ]:
        assert call(script, *arguments.split()) == 2
        assert re.fullmatch(f"error: .*{message}.*\n", capsys.readouterr().err)
        assert [path.name for path in Path().rglob("*")] == ["file"]


# ---------------------------------------------------------------------------------------------------
# inpaint.py: pictures, cats and holes


def noise_picture(seed, width=20, height=16):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_pictures_of_a_folder(tmp_path, monkeypatch, capsys):
    """Cropped at the centre. The same pixels in another name, folder or format are a duplicate."""
    out = tmp_path / "deep" / "out"
    pictures = {f"{i}.png": noise_picture(i) for i in range(80)}
    pictures |= {"a.bmp": pictures["0.png"], "deep/b.PNG": pictures["1.png"]}
    pictures |= dict.fromkeys(["deep/out/no data.png", ".trash/no data.png", "._0.png"], noise_picture(100))
    pictures["wide.png"] = np.pad(np.full((8, 8, 4), (200, 100, 50, 0), np.uint8), ((0, 0), (8, 8), (0, 0)))
    for name, pixels in pictures.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "readme.txt").write_text("no picture")
    (tmp_path / "link").symlink_to(tmp_path)
    split, digest = inpaint.open_pictures(tmp_path, None, 8, None, out)
    found = np.concatenate(split)
    assert found.shape == (81, 8, 8, 3) and len({image.tobytes() for image in found}) == 81
    assert (found == (200, 100, 50)).all(axis=(1, 2, 3)).sum() == 1
    shown = capsys.readouterr()
    assert "81 distinct pictures, 2 duplicates" in shown.out and "cut.jpg cannot be read" in shown.err
    assert "no pictures: 1 .txt, 1 linked folder" in shown.out and ", 1 lost their transparency" in shown.out
    assert "cannot be read from and written to" in refusal(inpaint.open_pictures, tmp_path, None, 8, None, tmp_path)
    Image.fromarray(noise_picture(102)).save(tmp_path / "0.png")
    assert inpaint.open_pictures(tmp_path, None, 8, None, out)[1] != digest
    monkeypatch.setattr(os, "scandir", Mock(side_effect=PermissionError))
    with pytest.raises(PermissionError):
        inpaint.picture_files(tmp_path)


def test_more_pictures_never_move_one_to_another_part(monkeypatch):
    monkeypatch.setattr(inpaint, "cartoon_cats", lambda count, *_: map(noise_picture, range(count)))

    def parts(count):
        split, _ = inpaint.open_pictures(None, count, 16, 0)
        return {image.tobytes(): i for i, part in enumerate(split) for image in part}

    few, many = parts(400), parts(600)
    assert len(few) == 400 and len(many) == 600 and all(many[image] == part for image, part in few.items())
    shares = np.bincount(list(many.values())) / 600
    assert shares == pytest.approx([0.843, 0.060, 0.097], abs=0.04)
    training = [*few.values()].count(0) * 16 * 16 * 3
    for room in (training // 2, training - 1):  # also where only the last bytes lack room
        with room_for(room):
            assert "(TMPDIR) cannot hold the pictures" in refusal(parts, 400)


def test_cats_and_holes_depend_on_their_seed_and_number_alone():
    ranges = {"cats": (20, 0, 255), "brush": (20, 0.23, 0.33), "box": (4, 0.23, 0.26), "half": (4, 0.5, 0.5)}
    for kind, (distinct, low, high) in ranges.items():
        make = inpaint.cartoon_cats if kind == "cats" else functools.partial(inpaint.make_holes, kind)
        found = make(20, 64, 1)
        assert found.shape[:3] == (20, 64, 64) and found.dtype == (np.uint8 if kind == "cats" else bool)
        assert len({item.tobytes() for item in found}) >= distinct and all(low <= item.mean() <= high for item in found)
        assert (make(5, 64, 1) == found[:5]).all() and (make(5, 64, 2) != found[:5]).any()


def test_evidence_of_the_visible_pixels_by_loops():
    """Differences between codes are those of a mixture of normal densities; a wholly hidden token knows nothing."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    holes = np.zeros((2, 8, 8), bool)
    holes[:, 2:8, 5:8] = True
    holes[1, 4:8, 4:8] = True
    tokenizer = PatchTokenizer(rng.random((5, 48), dtype=np.float32), 4, 4)
    found = inpaint.pixel_evidence(tokenizer, images, holes).numpy()
    assert found.shape == (2, 4, 5) and np.ptp(found[1, 3]) == 0
    centroids = tokenizer.centroids.reshape(5, 4, 4, 3)
    for b in range(2):
        cells = [np.s_[b, y : y + 4, x : x + 4] for y in (0, 4) for x in (0, 4)]
        squares = [np.square(images[cell] / 255 - centroids).sum(axis=3) for cell in cells]  # (5, 4, 4) each
        visible = [~holes[cell] for cell in cells]
        best = [of_cell.sum(axis=(1, 2)).min() for of_cell, seen in zip(squares, visible, strict=True) if seen.all()]
        count = 3 * np.sum(visible, axis=(1, 2))[:, None]
        distances = np.sum(np.array(squares) * np.array(visible)[:, None], axis=(2, 3))
        noises = np.quantile(np.array(best) / 48, np.arange(1, 12, 2) / 12)
        densities = [(-distances / noise - count * np.log(2 * np.pi * noise)) / 2 for noise in noises]
        expected = np.logaddexp.reduce(np.array(densities) / 4)
        np.testing.assert_allclose(found[b] - found[b][:, :1], expected - expected[:, :1], rtol=1e-4, atol=1e-4)
    flat = np.full((2, 8, 8, 3), 51, np.uint8)
    exact = PatchTokenizer(np.full((1, 48), 0.2, np.float32), 4)
    holes[0] = True  # nothing to measure the noise on, and beside it none
    assert inpaint.pixel_evidence(exact, flat, holes).isfinite().all()


def test_a_membrane_solves_laplaces_equation():
    """Beside a dense linear solve: inside the hole each value is the mean of its neighbours, mirrored at the border."""
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.normal(size=(3, 2, 12, 8)))
    holes = torch.from_numpy(rng.random((3, 1, 12, 8)) < 0.6)
    holes[2] = True
    found = inpaint.membrane(values, holes, sweeps=400)
    assert torch.equal(found[:2][~holes[:2].expand(2, 2, 12, 8)], values[:2][~holes[:2].expand(2, 2, 12, 8)])
    assert (found[2] == 0).all()
    for b in range(2):
        matrix = np.eye(96)
        known = values[b].masked_fill(holes[b], 0).reshape(2, 96).numpy()
        for y, x in zip(*holes[b, 0].numpy().nonzero(), strict=True):
            for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1)):
                neighbour = np.clip(y + dy, 0, 11) * 8 + np.clip(x + dx, 0, 7)
                matrix[y * 8 + x, neighbour] -= 1 / 4
        np.testing.assert_allclose(found[b].reshape(2, 96).T, np.linalg.solve(matrix, known.T), atol=1e-6)
    few = inpaint.membrane(values, holes)
    assert (few - found)[:2].abs().max() < 0.1 * values.abs().max()
    wide = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    wide[..., 2:62, 2:62] = True  # far from its rim, too
    values = torch.full((1, 3, 64, 64), 0.5).masked_fill(wide, math.nan)
    np.testing.assert_allclose(inpaint.membrane(values, wide), 0.5, atol=0.01)


def test_a_painter_starts_as_what_joins_the_visible(monkeypatch):
    """Whatever the size, and picture by picture."""
    rng = np.random.default_rng(0)
    decoded = rng.random((2, 9, 8, 3), dtype=np.float32)
    images = rng.integers(256, size=(2, 9, 8, 3), dtype=np.uint8)
    holes = rng.random((2, 9, 8)) < 0.4
    monkeypatch.setattr(inpaint, "AT_ONCE", 1)
    errors = torch.from_numpy(images / np.float32(255) - decoded).permute(0, 3, 1, 2)
    joined = decoded + inpaint.membrane(errors, torch.from_numpy(holes)[:, None]).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(joined[~holes] * 255, images[~holes], atol=1e-3)
    np.testing.assert_allclose(inpaint.Painter().paint(decoded, images, holes), joined, atol=1e-6)


def test_a_painter_learns_what_tokens_do_not_say():
    """Pictures brighter than their tokens, by as much as only the visible pixels tell."""
    rng = np.random.default_rng(0)
    tokenizer = PatchTokenizer(np.tile(0.8 * rng.random((5, 3), dtype=np.float32), 16), 4)
    brighter = rng.uniform(0, 0.2, (220, 1, 1, 1))
    pictures = (255 * (tokenizer.decode(rng.integers(5, size=(220, 4, 4))) + brighter)).astype(np.uint8)
    recipe = inpaint.Inpainting(size=16, codes=5, painter_steps=30)
    learnt = inpaint.train_painter(recipe, tokenizer, pictures[20:], torch.device("cpu"))
    images, holes = inpaint.with_holes(pictures[:20], "brush", seed=1)
    decoded = tokenizer.decode(tokenizer.encode(images / np.float32(255)))
    plain, painted = (inpaint.into_holes(decoded, images, holes, painter) for painter in (None, learnt))
    assert (painted[~holes] == images[~holes]).all() and (plain[holes] == np.round(decoded * 255)[holes]).all()
    scores = [inpaint.psnr(images, holes, filled) for filled in (plain, painted)]
    assert scores[1] > scores[0] + 2


def test_a_painter_is_shown_wrong_tokens_in_holes_alone():
    """Noise of another strength in each picture, and nothing outside the hole."""
    shown = []

    class Recorder(PatchTokenizer):
        def encode(self, images):
            shown.append(images)
            return super().encode(images)

    tokenizer = Recorder(np.random.default_rng(0).random((5, 48), dtype=np.float32), 4)
    pictures = np.full((4, 16, 16, 3), 102, np.uint8)
    inpaint.train_painter(inpaint.Inpainting(size=16, painter_steps=4), tokenizer, pictures, torch.device("cpu"))
    noise = np.concatenate(shown) - np.float32(0.4)
    changed = (np.abs(noise) > 1e-6).any(axis=-1)
    assert len(noise) == 64 and all(0.2 < share < 0.55 for share in changed.mean(axis=(1, 2)))
    strengths = [each[hole].std() for each, hole in zip(noise, changed, strict=True)]
    assert min(strengths) < 0.05 and 0.11 < max(strengths) < 0.17


def test_psnr_by_hand():
    """Errors count inside the hole alone: 10 and 20 of 255 in two pictures."""
    images = np.full((2, 16, 16, 3), 100, np.uint8)
    holes = np.zeros((2, 16, 16), bool)
    holes[:, 3:5, 7] = True
    filled = images.copy()
    filled[0, 3:5, 7] = 110
    filled[1, 3:5, 7] = 80
    filled[:, 0, 0] = 0
    found = inpaint.psnr(images, holes, filled)
    assert found == pytest.approx((20 * math.log10(25.5) + 20 * math.log10(12.75)) / 2)


def test_grain_by_loops():
    """Patches of 4x4 at every second row and column, and at the last ones. What has half of the energy is sharp."""
    rng = np.random.default_rng(0)
    low = rng.integers(60, 190, (13, 11, 3), dtype=np.uint8)
    hole = np.zeros((13, 11), bool)
    hole[8:, 3:5] = hole[10:12, 9:] = True
    pixels = (low + rng.integers(-40, 40, low.shape) * np.where(hole[..., None], 0.3, 1)).round().astype(np.uint8)
    high = pixels.astype(float) - low
    corners = [(y, x) for y in range(10) for x in range(8)]
    hidden = [hole[y : y + 4, x : x + 4].any() for y, x in corners]
    sources = [corner for corner, each in zip(corners, hidden, strict=True) if not each]
    total, weight, energies = np.zeros((13, 11, 3)), np.zeros((13, 11, 1)), []
    for (y, x), each in zip(corners, hidden, strict=True):
        if each and y in (0, 2, 4, 6, 8, 9) and x in (0, 2, 4, 6, 7):
            own = low[y : y + 4, x : x + 4].astype(float)
            at = min(sources, key=lambda at: np.square(low[at[0] : at[0] + 4, at[1] : at[1] + 4] - own).sum())
            borrowed = high[at[0] : at[0] + 4, at[1] : at[1] + 4]
            energies += np.square(borrowed)[hole[y : y + 4, x : x + 4]].ravel().tolist()
            for i, j in np.ndindex(4, 4):
                share = min(i + 1, 4 - i) * min(j + 1, 4 - j)
                total[y + i, x + j] += share * borrowed[i, j]
                weight[y + i, x + j] += share
    average = (total / weight.clip(1))[hole]
    missing = 1 - np.square(high[hole]).mean() / np.mean(energies)
    scaled = average * math.sqrt(missing * np.mean(energies) / np.square(average).mean())
    found = inpaint.with_grain(pixels, low, hole)
    assert np.abs(found[hole] - (pixels[hole] + scaled).clip(0, 255)).max() < 0.51 and 0.6 < missing < 0.95
    assert (found[~hole] == pixels[~hole]).all() and (inpaint.with_grain(pixels, low, hole) == found).all()
    for share, changed in ((0.45, True), (0.55, False)):
        pixels[hole] = low[hole] + np.rint(math.sqrt(share * np.mean(energies)) * rng.choice((-1, 1), (hole.sum(), 3)))
        assert (inpaint.with_grain(pixels, low, hole) != pixels).any() == changed


def test_grain_goes_on_in_a_hole(monkeypatch):
    """As strong as around it, and of the mean that was there, though it is looked for in few places."""
    rng = np.random.default_rng(0)
    wall = rng.integers(124, 133, (90, 90, 3), dtype=np.uint8)
    fur = (wall + 20 * rng.standard_normal((90, 90, 1))).round().astype(np.uint8)
    hole = np.zeros((90, 90), bool)
    hole[30:60, 30:60] = True
    nearest = Mock(wraps=maskgit.nearest_centroid)
    monkeypatch.setattr(maskgit, "nearest_centroid", nearest)
    monkeypatch.setattr(inpaint, "GRAIN_SOURCES", 500)
    found, again = (inpaint.with_grain(inpaint.paste(fur, hole, wall), wall, hole) for _ in range(2))
    assert (found == again).all()
    inside = found[hole].astype(float)
    assert len(np.unique(nearest.call_args.args[1], axis=0)) == 500
    assert abs(inside.mean() - 128) < 3 and inside.std() == pytest.approx(20, abs=3)
    assert (inpaint.with_grain(wall, fur, np.ones_like(hole)) == wall).all(), "there is nothing to borrow from"


def test_windows_cover_every_hole():
    """Squares of the shorter side, in a picture and its transpose. The hole is in the middle, if it fits."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width = sorted(rng.integers(1, 40, 2))
        hole = np.repeat(rng.random((height, 5)) < rng.choice((0.1, 0.5, 1.0)), 8, axis=1)[:, :width]
        hole[:, rng.integers(width) :] = False
        for _ in range(1 + 2 * math.ceil(width / height)):
            if hole.any():
                window = inpaint.next_window(hole)
                assert hole[window].any() and hole[window].shape == (height, height)
                assert height == width or inpaint.next_window(hole.T) == window[::-1]
                hole[window] = False
        assert not hole.any()
    wide = np.zeros((10, 50), bool)
    wide[5, [20, 23]] = True
    assert inpaint.next_window(wide)[1] == slice(17, 27)
    wide[:] = np.arange(50) >= 40  # what goes on beyond the end is not made up from nothing
    assert inpaint.next_window(wide)[1] == slice(35, 45)
    assert inpaint.next_window(wide[:, ::-1])[1] == slice(5, 15)
    wide[:] = (np.arange(50) >= 1) & (np.arange(50) < 30)  # nor from the one visible column
    assert inpaint.next_window(wide)[1] == slice(25, 35)


def test_cross_entropy_picture_by_picture(inpaint_run):
    """In more than one batch, weighted by hidden tokens, those with any hole pixel; with and without evidence."""
    inpainter, _ = inpaint.open_model(inpaint_run / "model.pt", "cpu", "float32")
    model, tokenizer, *_ = inpainter
    images, holes = inpaint.with_holes(inpaint.cartoon_cats(70, 16), "brush", seed=3)
    plain, informed = [], []
    for image, hole in zip(images, holes, strict=True):
        tokens = torch.from_numpy(tokenizer.encode(image[None] / np.float32(255))).flatten()
        mask = torch.tensor([bool(hole[y : y + 4, x : x + 4].any()) for y in range(0, 16, 4) for x in range(0, 16, 4)])
        logits = model(tokens.masked_fill(mask, 16)[None], grid_coords(4, 4)).detach()
        evidence = inpaint.pixel_evidence(tokenizer, image[None], hole[None])
        for found, values in ((plain, logits), (informed, logits + evidence)):
            found += (-values[0].log_softmax(-1)[range(16), tokens])[mask].tolist()
    for expected, use in ((plain, False), (informed, True)):
        inputs = [*inpaint.input_batches(inpainter, images, holes, use)]
        assert inpaint.cross_entropy(inpainter, inputs) == pytest.approx(np.mean(expected), rel=1e-5)
    assert np.mean(informed) < np.mean(plain)
    coarse = inpaint.cross_entropy(inpainter._replace(precision="bf16"), inputs)
    assert 1e-5 < abs(coarse / np.mean(informed) - 1) < 0.02


def test_a_trace_in_pictures_and_a_seed_for_each_batch(inpaint_run, tmp_path, monkeypatch):
    """By a linear schedule 16 tokens in 5 steps; the pictures show those that are left in grey. All samples have the
    precision that was asked for."""
    inpainter, _ = inpaint.open_model(inpaint_run / "model.pt", "cpu", "float32")
    inpainter = inpainter._replace(painter=None)
    cats = inpaint.cartoon_cats(1, 16).repeat(2, axis=0)
    holes = np.ones((2, 16, 16), bool)
    way = inpaint.Filling(decode_steps=5, schedule="linear", temperature=1.0, evidence=False)
    shown = inpaint.trace_pictures(inpainter, cats[:1], holes[:1], way)
    grey = [maskgit.image_patches(pictures == 128, 4, 4).all(axis=-1).sum() for pictures in shown]
    assert grey == [12, 9, 6, 3, 0]
    monkeypatch.setattr(inpaint, "AT_ONCE", 1)
    first, second = inpaint.fill_in_batches(inpainter, cats, holes, way)
    assert (first != second).any()
    asked = Mock(wraps=maskgit.precision_context)
    monkeypatch.setattr(maskgit, "precision_context", asked)
    monkeypatch.setattr(inpaint, "trace_pictures", Mock(return_value=[cats[:1]]))
    history = [dict(step=1, loss=1.0, validation=1.0)]
    inpaint.save_pictures(tmp_path, inpainter._replace(precision="bf16"), cats[:1], holes[:1], way, history)
    assert [each.args[1] for each in asked.call_args_list] == ["bf16"] * 3


# ---------------------------------------------------------------------------------------------------
# inpaint.py as a user runs it

TINY_CATS = ["--cartoons", "150", "--size", "16", "--codes", "16", "--dim", "16", "--heads", "2", "--layers", "1"]
TINY_CATS += ["--batch-size", "8", "--steps", "4", "--test-images", "8", "--device", "cpu", "--precision", "float32"]
TINY_CATS += ["--painter-steps", "4"]


@pytest.fixture(scope="module")
def inpaint_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("inpaint") / "run"
    assert call(inpaint, *TINY_CATS, "--out", out) == 0
    return out


def test_an_inpaint_run_leaves_what_it_promises(inpaint_run):
    pictures = {"samples.png", "loss.png", "decode.gif"}
    assert {file.name for file in inpaint_run.iterdir()} == pictures | {"model.pt", "log.csv", "metrics.json"}
    assert 3 <= Image.open(inpaint_run / "decode.gif").n_frames <= 11
    figures = json.loads((inpaint_run / "metrics.json").read_text())
    assert [*figures["scores"]] == ["brush", "thick", "box", "half"] and sum(figures["pictures"].values()) == 150
    for row in figures["scores"].values():
        assert [*row] == ["nats, test", "nats, seen", "nats, with evidence", "dB, test", "dB, seen", "dB, true tokens"]
        assert all(0 < value < 60 for value in row.values()) and len(set(row.values())) >= 5
    assert figures["validation"] == min(logged(inpaint_run, "validation"))


def test_a_run_on_a_folder_resumes_and_is_scored_anew(tmp_path, monkeypatch, capsys):
    """Broken off, it resumes to the very same weights, also from moved pictures, but not from others; finished, it is
    scored again, with other options. It is trained on as many pictures as it is told."""

    def stop_in_step_2(*arguments, update=maskgit.update):
        if arguments[-1] == 1:
            signal.raise_signal(signal.SIGTERM)
        return update(*arguments)

    cats, moved, once, twice = (tmp_path / name for name in ("cats", "moved", "once", "twice"))
    cats.mkdir()
    for i, cat in enumerate(inpaint.cartoon_cats(150, 20)):
        Image.fromarray(cat).save(cats / f"{i}.png")
    options = [*TINY_CATS, "--training-images", 40, "--data"]
    with monkeypatch.context() as patch:
        patch.setattr(inpaint, "score", Mock(side_effect=OSError))
        assert call(inpaint, *options, cats, "--out", once) == 2
        patch.setattr(maskgit, "update", stop_in_step_2)
        assert call(inpaint, *options, cats, "--out", twice) == 143
    assert saved(twice)["step"] == 2
    cats.rename(moved)
    changed = moved / "3.png"
    before = changed.read_bytes()
    Image.fromarray(noise_picture(0, 20, 20)).save(changed)
    capsys.readouterr()
    resumed = [*options, moved, "--out", twice, "--resume"]
    assert call(inpaint, *resumed) == 2 and "was trained with pictures_sha256=" in capsys.readouterr().err
    changed.write_bytes(before)
    for change in ([], ["--order", "random"]):
        assert call(inpaint, *resumed, *change) == 0 and "dB, true tokens" in capsys.readouterr().out
        assert torch.equal(saved_weights(once), saved_weights(twice))
        assert (saved(once)["tokenizer"].centroids == saved(twice)["tokenizer"].centroids).all()
        painters = [saved(run)["extra"] for run in (once, twice)]
        assert all(torch.equal(painters[0][name], painters[1][name]) for name in painters[0])
    assert json.loads((twice / "metrics.json").read_text())["pictures"]["training"] == 40


def test_training_batches(monkeypatch):
    """Of both views, for more codes than a byte holds and more pictures than are encoded at once; of the step alone."""
    monkeypatch.setattr(inpaint, "make_holes", functools.cache(inpaint.make_holes))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (280, 12, 12, 3), dtype=np.uint8)
    tokenizer = PatchTokenizer(rng.random((300, 27), dtype=np.float32), 3)
    views = [tokenizer.encode(view / np.float32(255)) for view in (images, images[:, :, ::-1])]
    plain, flipped = ({tuple(grid.ravel().tolist()) for grid in view} for view in views)
    recipe = inpaint.Inpainting(batch_size=1500, size=12, patch=3, codes=300)
    batch = inpaint.make_batch(recipe, tokenizer, images)
    tokens, mask, coords = batch(3)
    assert mask.shape == (1500, 16) and torch.equal(coords, grid_coords(4, 4))
    found = {tuple(row) for row in tokens.tolist()}
    assert found <= plain | flipped and len(found) > 500 and max(map(max, found)) > 255
    assert all(map(torch.equal, batch(3), (tokens, mask, coords))) and not torch.equal(batch(4)[1], mask)
    # One half at random, by the cosine; the other within holes, of which half are whole.
    assert float(mask[:750].float().mean()) == pytest.approx(2 / math.pi, abs=0.05)
    holes = np.concatenate([inpaint.make_holes(kind, 1000, 12, inpaint.TRAINING_SEED) for kind in inpaint.HOLES])
    whole = torch.from_numpy(holes.reshape(-1, 4, 3, 4, 3).any(axis=(2, 4))).flatten(1)
    outside = mask[750:].float() @ (~whole).float().T  # (750, 3000): tokens of each row outside each hole
    assert (outside.amin(dim=1) == 0).all()
    whole = {tuple(row) for row in whole.tolist()}
    hidden = [tuple(row) for row in mask[750:].tolist()]
    assert 0.5 < np.mean([row in whole for row in hidden]) < 0.75 and {sum(row) for row in hidden} >= {*range(1, 9)}
    batch = inpaint.make_batch(replace(recipe, batch_size=1, hole_rows=0.9, mirror=False), tokenizer, images)
    few = [batch(step) for step in range(50)]
    assert all(mask.any() for _, mask, _ in few), "something is hidden in the smallest batch"
    assert {tuple(tokens[0].tolist()) for tokens, *_ in few} <= plain
    monkeypatch.setattr(maskgit, "train", lambda *_, best_by, **options: best_by)
    parts = replace(recipe, precision="bf16"), tokenizer, inpaint.Painter(), inpaint.Split(*3 * [images])
    inpainter, best_by = inpaint.train_model(*parts, "cpu")
    assert best_by == "validation" and inpainter.precision == "bf16"


# ---------------------------------------------------------------------------------------------------
# inpaint.py: filling files


def write_pairs(folder, *sizes):
    """The reports' folders: masked_image/image_NNN.png with a grey hole and mask64/mask_NNN.png: [(image, hole)]."""
    pairs = []
    for i, size in enumerate(sizes):
        hole = np.random.default_rng(i).random((size, size)) < 0.3
        hole[:, size // 2 :] = True  # some tokens show nothing
        image = np.where(hole[..., None], 128, noise_picture(i, size, size)).astype(np.uint8)
        pairs.append((image, hole))
        for name, pixels in (("masked_image/image", image), ("mask64/mask", np.where(hole, 0, 255).astype(np.uint8))):
            (folder / name).parent.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{name}_{i:03d}.png")
    return pairs


def filled_pairs(run, folder, *options, script=inpaint):
    """What the model of a run makes of the folders of write_pairs: {name: picture}."""
    assert call(script, "--checkpoint", run / "model.pt", *paths_of(folder), *options) == 0
    return {file.stem: np.asarray(Image.open(file)) for file in sorted((folder / "out").glob("*.png"))}


def paths_of(folder):
    """The flags that fill the folders of write_pairs."""
    folders = {"--images": "masked_image", "--masks": "mask64", "--out": "out"}
    return ["--device", "cpu", *(word for flag, name in folders.items() for word in (flag, folder / name))]


def test_samples_of_a_precision(inpaint_run, tmp_path, monkeypatch):
    write_pairs(tmp_path, 16, 16)
    results = filled_pairs(inpaint_run, tmp_path, "--samples", 3, "--order", "entropy")
    assert [*results] == [f"image_00{i}_{k}" for i in range(2) for k in (1, 2, 3)]
    assert len({result.tobytes() for result in results.values()}) == 6
    monkeypatch.setattr(inpaint, "fill_files", given := Mock())
    for precision in ("bf16", "float32"):
        filled_pairs(inpaint_run, tmp_path, "--precision", precision)
        assert given.call_args.args[0].precision == precision


# Pictures, and their masks in the same order.
PAIRED = "cat dog / Cat DOG; damask mask_1 / damask mask_1; a b c mask_d / Mask-a b_masks01 mask2.c mask_d_mask; "
PAIRED += "IMG_0101_7 IMG_0102_8 / mask_1_007 m008; image_1 image_10 / mask_01 mask_010; "
PAIRED += "café được ü / café_mask mask-được ü_mask; का की राम रामा / का_mask की_mask mask_राम mask_रामा"
UNPAIRED = "cat dog / dog bee; cat / cat dog; cat / cat_mask1 cat_mask2; cat_1 dog_1 / mask_1; "
UNPAIRED += "cat_1 dog_1 / m1 m2; cat dog_7 / cat mask_7; cat-a / cata_mask; की / का_mask; ü / u_mask"


@pytest.mark.parametrize("names", [*PAIRED.split("; "), *UNPAIRED.split("; ")])
def test_masks_go_by_name(names, tmp_path):
    """Whatever the order of the files, and in whichever form letters have their accents; hidden files are none."""
    pictures, masks = (part.split() for part in names.split(" / "))
    for folder, form, stems in (("i", "NFC", pictures), ("m", "NFD", masks)):
        for stem in (*stems, "._hidden", ".hidden/x"):
            file = tmp_path / folder / f"{unicodedata.normalize(form, stem)}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    pair = functools.partial(inpaint.pair_files, tmp_path / "i", tmp_path / "m", tmp_path / "out")
    if names in UNPAIRED:
        assert re.search(rf"{len(pictures)} pictures \({pictures[0]}.* do not belong together", refusal(pair))
    else:
        found = {picture.stem: unicodedata.normalize("NFC", mask.stem) for picture, mask in pair()}
        assert found == dict(zip(pictures, masks, strict=True))


def test_one_folder_may_hold_both_and_one_the_other(tmp_path):
    """A single picture may leave masks over, and a single mask serves all."""
    for name in ["cat.jpg", "masks/cat.png", "dog.webp", "masks/dog.gif", "out/cat.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    pair = functools.partial(inpaint.pair_files, out=tmp_path / "out")
    cat, mask = tmp_path / "cat.jpg", tmp_path / "masks" / "cat.png"
    assert pair(tmp_path, mask.parent) == [(cat, mask), (tmp_path / "dog.webp", mask.with_name("dog.gif"))]
    assert pair(cat, mask.parent) == [(cat, mask)] and len(pair(tmp_path, mask)) == 3
    shutil.rmtree(mask.parent)
    (tmp_path / "MASK_cat.bmp").touch()
    assert "2 pictures (cat.jpg, dog.webp) and 1 masks (MASK_cat.bmp)" in refusal(pair, tmp_path, tmp_path)
    (tmp_path / "dog.webp").unlink()
    assert pair(tmp_path, tmp_path) == [(cat, tmp_path / "MASK_cat.bmp")]


def grey_image(levels, dtype=np.uint8, palette=None, alpha=None):
    image = Image.fromarray(np.asarray(levels).astype(dtype))
    if palette:
        image.putpalette(palette)
    if alpha is not None:
        image.putalpha(grey_image(alpha))
    return image


VISIBLE = np.random.default_rng(0).random((9, 7)) < 0.7
WHITE, CLEAR = grey_image(VISIBLE * 255), grey_image(VISIBLE * 255, alpha=VISIBLE * 255)
COLOUR, BLACK = Image.fromarray(noise_picture(0, 7, 9)), Image.new("RGB", (7, 9))
GREY, CMYK, TURNED = COLOUR.convert("L"), COLOUR.convert("CMYK"), COLOUR.transpose(Image.Transpose.ROTATE_90)
DEEP = np.asarray(GREY).astype(int) * 257
PALETTE = grey_image(VISIBLE, palette=(200, 100, 50, 0, 0, 255))
OPAQUE = PALETTE.convert("RGB")
# EXIF that begins with orientation 6, and has a text as resolution.
ODD_TAG = bytes.fromhex("457869660000 49492a0008000000 0200 120103000100000006000000 1a0102000300000037320000 00000000")
PAGES = {"save_all": True, "append_images": [COLOUR.copy(), WHITE.copy()]}
FILES = {  # by what it is and its suffix: the image, how it is saved, what it is read as or why it is refused
    "bits png": (WHITE.convert("1"), {}, WHITE),
    "grey with a clear level png": (WHITE, {"transparency": 0}, CLEAR),
    "palette with a clear colour png": (PALETTE, {"transparency": 0}, Image.merge("RGBA", (*OPAQUE.split(), WHITE))),
    "CMYK tif": (CMYK, {}, CMYK.convert("RGB")),
    "16 bits png": (grey_image(DEEP, np.uint16), {}, GREY),
    "16 bits, the high byte first tif": (grey_image(DEEP, ">u2"), {}, GREY),
    "telephone's mpo": (BLACK, {"save_all": True, "append_images": [BLACK]}, BLACK),
    "EXIF without a header png": (COLOUR, {"exif": b"no TIFF"}, COLOUR),
    "EXIF with an odd tag png": (TURNED, {"exif": ODD_TAG}, COLOUR),
    "12 bits in 16 png": (grey_image(DEEP // 16, np.uint16), {}, r"16 bits up to 3\d+.*: save it with 8 bits"),
    "integers tif": (GREY.convert("I"), {}, "mode I: save it as RGB with 8 bits"),
    "floats tif": (GREY.convert("F"), {}, "mode F: save it"),
    "LAB tif": (COLOUR.convert("LAB"), {}, "mode LAB: save it"),
    "without a palette png": (PALETTE, {}, "mode P: save it"),
    "pages tif": (COLOUR, PAGES, "3 images: save the one that is meant"),
    "animation webp": (BLACK, PAGES, "3 images"),
    "mask of 16 bits tif": (grey_image(VISIBLE * 65535, np.uint16), {}, VISIBLE),
    "mask, 0 and 1 in colour png": (grey_image(VISIBLE).convert("RGB"), {}, VISIBLE),
    "mask, 0 and 1 in 16 bits png": (grey_image(VISIBLE, np.uint16), {}, VISIBLE),
    "mask, soft png": (grey_image(np.where(VISIBLE, [[230], [160], [255]] * 3, [[20], [0], [100]] * 3)), {}, VISIBLE),
    "mask, white first gif": (grey_image(~VISIBLE, palette=(255, 255, 255, 0, 0, 0)), {}, VISIBLE),
    "mask, opaque png": (grey_image(VISIBLE * 255, alpha=VISIBLE | 255), {}, VISIBLE),
    "mask, all clear png": (grey_image(VISIBLE * 255, alpha=VISIBLE * 0), {}, VISIBLE),
    "mask, erased png": (CLEAR, {}, "is transparent in part"),
    "mask, photograph png": (GREY, {}, "values are 25 to 242, and white is 255"),
    "mask, one grey png": (grey_image(VISIBLE * 0 + 128), {}, "values are 128 to 128"),
    "mask, labels png": (grey_image(VISIBLE * 2), {}, "values are 0 to 2"),
    "mask, bright labels png": (grey_image(VISIBLE * 25 + 230), {}, "values are 230 to 255"),
    "mask, 8 bits in 16 png": (grey_image(VISIBLE * 255, np.uint16), {}, "values are 0 to 255, and white is 65535"),
}


@pytest.mark.parametrize("kind", FILES)
def test_what_a_file_says(kind, tmp_path):
    image, options, expected = FILES[kind]
    file = tmp_path / f"a.{kind.split()[-1]}"
    image.save(file, **options)
    if kind == "without a palette png":
        file.write_bytes(re.sub(rb"(?s).{4}PLTE.{10}", b"", file.read_bytes()))
    read = functools.partial(inpaint.read_mask, invert=True) if kind.startswith("mask") else inpaint.read_picture
    if isinstance(expected, str):
        assert re.search(rf"a\.{kind.split()[-1]} .*{expected}", refusal(read, file))
    else:
        assert np.array_equal(read(file), expected)  # the shape of an image's array says its mode


def test_pictures_are_upright(tmp_path, monkeypatch):
    """As their EXIF says, all eight ways; and an error that says nothing has its name."""
    file = tmp_path / "a.webp"
    exif = Image.Exif()
    for exif[274] in range(1, 9):
        COLOUR.save(file, lossless=True, exif=exif)
        with Image.open(file) as image:
            assert np.array_equal(ImageOps.exif_transpose(image), inpaint.read_picture(file))
    monkeypatch.setattr(Image, "open", Mock(side_effect=EOFError))
    assert refusal(inpaint.read_picture, file) == f"{file} cannot be read: EOFError"


RESULTS = {"grey": GREY, "colour": COLOUR, "palette": PALETTE, "CMYK": CMYK, "small": Image.new("RGB", (16, 16), "red")}
RESULTS |= {
    246 * "n": COLOUR,
    "clear grey": CLEAR,
    "clear": TURNED.convert("RGBA"),
    "no hole": GREY,
    "all hole": COLOUR,
}


def test_results_keep_what_was_visible(inpaint_run, tmp_path, capsys):
    """To the bit, with alpha and colour profile, also beside a name of 250 bytes; their rights are as umask says."""
    images, masks, out = (tmp_path / name for name in ("images", "masks", "out"))
    images.mkdir(), masks.mkdir()
    RESULTS["clear"].putalpha(grey_image(np.arange(63).reshape(7, 9) * 4))
    visible = {}
    for name, image in RESULTS.items():
        shares = np.random.default_rng(0).random(image.size[::-1])
        visible[name] = shares < {"no hole": 1, "all hole": 0}.get(name, 0.5)
        image.save(images / f"{name}.tif", icc_profile=b"a profile")
        grey_image(visible[name] * 255).save(masks / f"{name}.png")
    umask = os.umask(0o027)
    paths = ["--images", images, "--masks", masks, "--out", out, "--device", "cpu"]
    code = call(inpaint, "--checkpoint", inpaint_run / "model.pt", *paths)
    os.umask(umask)
    assert code == 0 and {file.name for file in out.iterdir()} == {f"{name}.png" for name in RESULTS}
    for name, image in RESULTS.items():
        before = image.convert("RGB") if image.mode in ("P", "CMYK") else image
        with Image.open(out / f"{name}.png") as found:
            assert found.info.get("icc_profile") == (None if name == "CMYK" else b"a profile")
            assert found.mode == before.mode and (out / f"{name}.png").stat().st_mode & 0o777 == 0o640
            changed = np.asarray(found) != np.asarray(before)
        assert not changed[visible[name]].any() and changed.any() == (not visible[name].all())
        assert "clear" not in name or not changed[..., -1].any()
    shown = capsys.readouterr().out
    assert "pictures filled: 10, in " in shown
    assert re.search("(?s)all hole.*nothing is visible.*no hole.*there is no hole", shown)


def test_weights_for_others(inpaint_run, tmp_path):
    """In bf16, but for the codebook, and without the training; they fill as the run's own do."""
    few = tmp_path / "few.pt"
    assert call(inpaint, *TINY_CATS, "--out", inpaint_run, "--resume", "--weights", few) == 0
    assert few.stat().st_size < 0.6 * (inpaint_run / "model.pt").stat().st_size
    found, own = (maskgit.load_checkpoint(file) for file in (few, inpaint_run / "model.pt"))
    assert (found["tokenizer"].centroids == own["tokenizer"].centroids).all() and found["config"] == own["config"]
    assert found["training"] is None and found["step"] == 4
    for name, tensor in own["model"].state_dict().items():
        assert torch.equal(found["model"].state_dict()[name], tensor.bfloat16().float())
    for run in (few, inpaint_run / "model.pt"):
        inpainter, _ = inpaint.open_model(run, "cpu", "float32")
        assert all(tensor.dtype == torch.float32 for tensor in inpainter.painter.state_dict().values())


def test_large_pictures_are_filled_square_by_square(inpaint_run, monkeypatch):
    """By a model of 16x16: of that size as fill does; larger, what is visible stays, and the same comes out again. A
    later square is shown what an earlier one was filled with."""
    inpainter, _ = inpaint.open_model(inpaint_run / "model.pt", "cpu", "float32")
    cats, holes = inpaint.with_holes(inpaint.cartoon_cats(1, 16), "thick", seed=3)
    way = inpaint.Filling()
    expected = inpaint.fill(inpainter, cats, holes, way, maskgit.step_seed(5, 0, 0))[0]
    assert (inpaint.fill_picture(inpainter, 16, cats[0], holes[0], way, 5) == expected).all()
    cat = np.concatenate([inpaint.cartoon_cat(np.random.default_rng(i), 50) for i in range(2)], axis=1)
    hole = np.zeros((50, 100), bool)
    hole[20:30, 10:85] = True
    black = inpaint.paste(cat, hole, np.uint8(0))  # what is in the hole must not matter
    options = ((cat, True), (black, True), (cat, False))
    results = [
        inpaint.fill_picture(inpainter, 16, given, hole, replace(way, grain=grain), 5) for given, grain in options
    ]
    assert (results[0] == results[1]).all() and (results[0] != results[2]).any()
    assert all((found[~hole] == cat[~hole]).all() and (found[hole] != cat[hole]).mean() > 0.9 for found in results)
    shown = []

    def fill_square(_inpainter, _size, pixels, hole, *_):
        shown.append((hole.sum(), (pixels == 7).all(axis=-1).sum()))
        return inpaint.paste(pixels, hole, np.uint8(7))

    monkeypatch.setattr(inpaint, "fill_square", fill_square)
    assert (inpaint.fill_picture(inpainter, 16, cat, hole, way, 5) == inpaint.paste(cat, hole, np.uint8(7))).all()
    assert shown == [(500, 0), (250, 130)]


def test_the_fillers_that_come_along():
    """They are those of the runs. The cats' fills cats that nobody has seen as well as its JSON says."""
    for name, run, size in (("photographs", "inpaint_cats64", 4e6), ("cats", "inpaint", 2.5e6)):
        path = HERE / "results" / f"{name}.pt"
        figures = json.loads((HERE / "results" / f"{run}.json").read_text())
        inpainter, config = inpaint.open_model(path, "cpu", "float32")
        assert path.stat().st_size < size and config["pictures_sha256"] == figures["settings"]["pictures_sha256"]
    cats = np.stack([inpaint.cartoon_cat(np.random.default_rng([0, i]), 64) for i in range(6000, 6024)])
    given = inpaint.with_holes(cats, "brush", inpaint.TEST_SEED)
    found = inpaint.psnr(*given, inpaint.fill(inpainter, *given, inpaint.Filling()))
    assert found == pytest.approx(figures["scores"]["brush"]["dB, test"], abs=1)


def test_the_examples_that_come_along(tmp_path):
    """README's commands fill them; what it shows is near the truth, in the hole alone."""
    examples = HERE / "results" / "examples"
    for model, name in (("photographs", "chelsea"), ("cats", "two_cats")):
        folder = examples / model
        files = ["--images", folder, "--masks", folder, "--out", tmp_path / model]
        assert call(inpaint, "--checkpoint", HERE / "results" / f"{model}.pt", *files) == 0
        hole = inpaint.read_mask(folder / f"{name}_mask.png", False)
        paths = folder / f"{name}.png", examples / f"{name}_truth.png", HERE / "results" / f"{name}_filled.png"
        given, truth, shown, filled = (
            np.asarray(Image.open(path)) for path in (*paths, tmp_path / model / paths[0].name)
        )
        assert (given[hole] == inpaint.GREY).all() and (given == truth)[~hole].all() and (shown == truth)[~hole].all()
        assert (filled == truth)[~hole].all()
        for picture in (shown, filled):
            assert inpaint.psnr(truth[None], hole[None], picture[None]) > 18


def test_filling_overwrites_nothing_and_leaves_nothing_half(inpaint_run, tmp_path, monkeypatch, capsys):
    write_pairs(tmp_path, 16, 16)
    out = tmp_path / "out"
    filled = functools.partial(call, inpaint, "--checkpoint", inpaint_run / "model.pt", *paths_of(tmp_path))
    assert filled() == 0
    before = {file: file.read_bytes() for file in out.iterdir()}
    (out / "image_000.png").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", Mock(side_effect=OSError("No space")))
        for options, said in (([], "image_001.png exists; --force overwrites"), (["--force"], "No space")):
            capsys.readouterr()
            assert filled(*options) == 2 and said in capsys.readouterr().err
            assert [file.read_bytes() for file in out.iterdir()] == [before[out / "image_001.png"]]
    for seed in range(2):
        assert filled("--force", "--seed", seed) == 0
        assert ({file: file.read_bytes() for file in out.iterdir()} == before) == (seed == 0)


def test_bad_input_to_inpaint_is_named(inpaint_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path, 16, 16)
    for folder in ("damaged", "mixed", "mixed/again"):
        shutil.copytree("masked_image", folder)
    shutil.copytree("mask64", "small")
    Path("link").symlink_to("masked_image")
    Path("damaged/image_001.png").write_bytes(Path("damaged/image_001.png").read_bytes()[:100])
    Image.new("L", (8, 8)).save("small/mask_001.png")
    maskgit.save_checkpoint("other.pt", tiny_model())
    by_run = ["--checkpoint", inpaint_run / "model.pt", *paths_of(Path())]
    cats = [*TINY_CATS, "--out", "out"]
    for options, arguments, said in [
        (by_run, "--images nothing", "No such file or directory: 'nothing'"),
        (by_run, "--images damaged", "damaged/image_001.png cannot be read"),
        (by_run, "--masks small", "mask_001.png is 8x8, .*image_001.png is 16x16"),
        (by_run, "--images masked_image/image_000.png --out link --force", "would be written to"),
        (by_run, "--images mixed --masks mask64/mask_000.png", "two pictures would become out/image_00"),
        (by_run, "--size 16", "--size is only for a training"),
        (by_run, "--checkpoint other.pt", "no checkpoint of inpaint.py"),
        (cats, "--invert-masks --samples 1", "--invert-masks is only for filling files"),
        (cats, "--data masked_image", "too few"),
        (cats, "--images masked_image", "name all three"),
    ]:
        assert call(inpaint, *options, *arguments.split()) == 2, said
        assert re.search(f"^error: .*{said}.*\n$", capsys.readouterr().err) and not Path("out").exists(), said


# ---------------------------------------------------------------------------------------------------
# Several processes, as torchrun starts them, with gloo

ACCUMULATED = [*TINY_CATS, "--accumulate", "2", "--optimizer", "adamw", "--lr", "0.001", "--out"]
EIGHT_STEPS = {"steps": 8, "lr": 0.001, "log_rows": 1}


def trained_by_figures():
    """The weights of a training whose first row has the best figure, and its log but for the seconds."""
    figures = iter([1.0, 2.0, 3.0])
    options = {"validate": lambda model: {"figure": next(figures)}, "best_by": "figure"}
    found, rows = trained(placed_batch, steps=3, lr=0.001, **options)
    return found, [row | {"seconds": 0} for row in rows]


def train_together(out):
    """What each of two processes does. In its last training the second one is killed."""

    def batch(step):
        if step == 4 and os.environ["RANK"] == "1":
            time.sleep(2)  # the other one may still be writing
            signal.raise_signal(signal.SIGKILL)
        return striped_batch(step)

    assert call(inpaint, *ACCUMULATED, out / "run") == 0 and torch.distributed.is_initialized()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(cores + 1)
    torch.save(trained_by_figures(), out / f"rank{os.environ['RANK']}")
    assert torch.get_num_threads() == max(1, cores // 2)
    maskgit.CHECKPOINT_SECONDS = 0
    trained(batch, out=out / "killed", **EIGHT_STEPS)


def test_two_processes_agree_with_one_and_stop_together(tmp_path, capsys):
    """On the same batch, by a script, and by a training in the group that it has made. Then one of both is killed: the
    last checkpoint stays whole, and resumed by one process that run ends as one of a single process does."""
    (two := tmp_path / "two").mkdir()
    python = [sys.executable, "-c", f"from test_maskgit import *; train_together(Path({str(two)!r}))"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command += python
    finished = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=200)
    assert finished.returncode != 0 and "SIGKILL" in finished.stderr, finished.stderr

    assert call(inpaint, *ACCUMULATED, tmp_path / "run") == 0
    torch.testing.assert_close(saved_weights(two / "run"), saved_weights(tmp_path / "run"), rtol=0, atol=1e-4)
    for column in ("loss", "gradient_norm"):
        assert logged(two / "run", column) == pytest.approx(logged(tmp_path / "run", column), rel=1e-3)
    # Counted, since two writers may interleave.
    assert finished.stdout.count("pictures:") == capsys.readouterr().out.count("pictures:") > 0

    found, rows = trained_by_figures()
    (first, its_rows), (second, other_rows) = (torch.load(two / f"rank{rank}") for rank in range(2))
    assert torch.equal(first, second) and its_rows == other_rows == [pytest.approx(row, rel=1e-3) for row in rows]
    torch.testing.assert_close(first, found, rtol=0, atol=1e-4)

    assert [path.name for path in (two / "killed").iterdir()] == ["model.pt"] and saved(two / "killed")["step"] == 4
    resumed, _ = trained(out=two / "killed", resume=True, **EIGHT_STEPS)
    torch.testing.assert_close(resumed, trained(**EIGHT_STEPS)[0], rtol=0, atol=1e-4)


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
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(state, path)
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
        results = []
        shrink = {} if pool else {"stride": 2, "padded": False}
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
    double = "3x3dbl_1 3x3dbl_2 3x3dbl_3"
    sevens = "7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5"
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
    state = torch.load(inception_weights)
    x = torch.rand(1, 3, 299, 299, generator=seeded()) * 2 - 1
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


# ---------------------------------------------------------------------------------------------------
# fid.py: distances, statistics and the command line


@pytest.mark.parametrize(("size", "rank"), [(2, 2), (5, 5), (12, 12), (12, 7), (30, 20), (300, 1)])
def test_frechet_distance_in_whole_numbers(size, rank):
    """Covariances S and T S T, the root of whose product is S T: nothing is rounded, and S has small and large axes."""
    rng = np.random.default_rng(0)
    mu1, mu2 = rng.integers(-9, 10, (2, size))
    a = rng.integers(-3, 4, (size, rank)) * 10 ** (np.arange(rank) % 5)
    b = rng.integers(-1, 2, (size, 2))
    s = a @ a.T
    t = b @ b.T + np.eye(size, dtype=int)
    means = ((mu1 - mu2) ** 2).sum()
    spreads = np.trace(s + t @ s @ t - 2 * s @ t)
    assert fid.frechet_distance(mu1, s, mu2, t @ s @ t) == pytest.approx(means + spreads, rel=1e-12)
    # Features on both sides of the mean, whose covariances are 2 / (2 rank - 1) of those.
    x, y = (np.concatenate([mu + root.T, mu - root.T]) for mu, root in ((mu1, a), (mu2, t @ a)))
    expected = means + spreads * 2 / (2 * rank - 1)
    assert fid.frechet_distance_from_features(x, y) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(7, 9), (7, 200), (200, 7), (200, 300), (51, 51), (2, 2)])
def test_features_and_covariances_give_the_same_distance(n, m):
    """More images than the 50 dimensions, fewer, and both; and a set is at distance 0 from itself."""
    rng = np.random.default_rng(0)
    x = 5 * rng.standard_normal((n, 50))
    y = rng.standard_normal((m, 50)) @ rng.standard_normal((50, 50)) + 5
    a, b = ((f.mean(axis=0), np.cov(f, rowvar=False)) for f in (x, y))
    found = fid.frechet_distance_from_features(x, y)
    assert found == pytest.approx(fid.frechet_distance(*a, *b), rel=1e-6)
    assert found == pytest.approx(fid.frechet_distance_from_features(y, x), rel=1e-10)
    assert 0 <= fid.frechet_distance(*b, *b) < 1e-6
    assert 0 <= fid.frechet_distance_from_features(y, y[::-1]) < 1e-6


def test_distances_refuse_what_they_cannot_compare():
    x = np.random.default_rng(0).random((9, 4))
    eye = np.eye(4)
    assert "at least 2" in refusal(fid.frechet_distance_from_features, x, x[:1])
    assert "finite" in refusal(fid.frechet_distance, x[0], eye, x[0], eye * np.nan)
    assert "do not fit" in refusal(fid.frechet_distance, x[0], eye, x[:1].T, eye)
    assert "four images" in refusal(fid.kernel_distance, x[:3], x)


def test_kernel_distance_by_loops():
    x, y = np.random.default_rng(0).random((2, 8, 5))
    within = sum((f[i] @ f[j] / 5 + 1) ** 3 for f in (x, y) for i in range(8) for j in range(8) if i != j) / 56
    across = sum((a @ b / 5 + 1) ** 3 for a in x for b in y) / 64
    assert fid.kernel_distance(x, y, subsets=3000, subset_size=3)[0] == pytest.approx(within - 2 * across, abs=0.02)
    assert fid.kernel_distance(x, y, seed=1) == fid.kernel_distance(x, y, seed=1)


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
def call_fid(inception_weights, tmp_path, monkeypatch, capsys):
    def call(*arguments):  # in this process: the exit code, the numbers after FID: and KID:, and stderr
        common = ["fid.py", "--num-workers", 0, "--device", "cpu", "--dims", 64, "--weights", inception_weights]
        monkeypatch.setattr(sys, "argv", list(map(str, (*common, *arguments))))
        with pytest.raises(SystemExit) as end:
            sys.exit(fid.main() or 0)
        out, err = capsys.readouterr()
        return end.value.code, [float(number) for number in re.findall(r"^[FK]ID:\s+(\S+)", out, re.MULTILINE)], err

    monkeypatch.chdir(tmp_path)
    np.savez("é.npz", mu=np.zeros(64), sigma=np.cov(np.random.default_rng(0).random((64, 99))))
    return call


@pytest.fixture(scope="module")
def two_folders(tmp_path_factory):
    """Images of several modes, sizes and suffixes; the second folder is lighter."""
    folders = [tmp_path_factory.mktemp("images") for _ in range(2)]
    for lightness, folder in zip((0, 60), folders, strict=True):
        rng = np.random.default_rng(lightness)
        for i, name in enumerate(["RGB.JPG", "L.bmp", "RGBA.png", "CMYK.jpeg", "P.png", "1.tif", "LA.png"]):
            pixels = rng.integers(lightness, 200, (20 + i % 2 * 5, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(name.split(".")[0]).save(folder / name)
    return folders


def test_two_folders(two_folders, inception_weights, call_fid):
    """Images, sizes and modes mixed, against the independent network; and statistics files, as others read them."""
    features = []
    state = torch.load(inception_weights)
    for folder in two_folders:
        images = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.iterdir())]
        features.append(next(inception_by_functions(state, fid.network_input(images, "cpu"))).numpy())
    expected = pytest.approx(fid.frechet_distance_from_features(*features), rel=1e-4)
    _, (found, kid), screen = call_fid(*two_folders, "--kid", "--batch-size", 3, "--num-workers", 2)
    assert found == expected and kid == pytest.approx(fid.kernel_distance(*features)[0], rel=1e-3)
    assert "7/7 images" in screen and "warning: 7 and 7 images" in screen and "--kid" in screen
    for name, folder in zip(("a", "b.npz"), two_folders, strict=True):
        call_fid("--save-stats", folder, name)
    assert sorted(os.listdir()) == ["a.npz", "b.npz", "é.npz"] and sorted(np.load("a.npz")) == ["mu", "sigma"]
    np.testing.assert_allclose(np.load("a.npz")["sigma"], np.cov(features[0], rowvar=False), rtol=1e-3, atol=1e-6)
    assert call_fid("a.npz", two_folders[1])[1] == [expected]
    assert call_fid("a.npz", "b.npz") == (0, [expected], "")


def test_grey_of_16_bits(tmp_path):
    for dtype, brightest in (("<u2", 65535), (">u2", 65535), ("<u2", 6554)):
        levels = np.linspace(0, brightest, 40).reshape(8, 5).astype(dtype)
        Image.fromarray(levels).save(tmp_path / "a.tif")
        assert (fid.read_image(tmp_path / "a.tif") == (levels.astype(int)[..., None] + 128) // 257).all()


def test_bad_input_to_fid_is_one_line(two_folders, inception_weights, call_fid):
    good = two_folders[0]
    Path("bad").mkdir()
    Path("bad", "RGB.JPG").write_bytes((good / "RGB.JPG").read_bytes()[:300])
    for mode in ("f4", "i4", "u2"):
        Image.fromarray(np.array([[0, 6553]], mode)).save(f"bad/{mode}.tif")
    Image.new("LAB", (5, 5)).save("bad/LAB.tif")
    whole = inception_weights.read_bytes()
    Path("name-01234567.pth").write_bytes(whole)
    wrong = {"empty": b"", "pointer": b"version https://git-lfs", "page": b"<html>", "other": {"a": torch.zeros(3)}}
    wrong |= {"code": Malicious(), "flipped": whole[: 10**6] + b"flip" + whole[10**6 + 4 :]}
    for name, content in wrong.items():
        Path(name).write_bytes(content) if isinstance(content, bytes) else torch.save(content, name)
    weights = {"nothing": "there is no file nothing", "bad": "bad is a folder", "name-01234567.pth": ".* is damaged.*"}
    weights |= {name: f"{name} is not the Inception weights" for name in wrong}
    for arguments, said in [
        ((inception_weights.parent, good), ".* holds 0 images; .*"),
        ((good, "pointer"), "pointer is neither .* mu and sigma"),
        ((good, "é.npz", "--dims", 192), ".*64 features per image, the other 192; set --dims"),
        ((good, "é.npz", "--dims", 5), ".*--dims.*"),
        ((good, "é.npz", "--kid"), "--kid needs two folders.*"),
        (("bad", good), ".*LAB; .*RGB.JPG cannot be .* mode is F; .* mode is I; .* value is 6553; save it with 8 bits"),
        (("--save-stats", "bad", "é.npz"), "é.npz exists; .*"),
        (("--save-stats", "bad", "no/new"), ".*No such file or directory: 'no/.*"),
        *(((good, good, "--weights", name), said) for name, said in weights.items()),
    ]:
        code, _, error = call_fid(*arguments)
        assert code == 2 and re.fullmatch(f"error: {said}\n", error) and not Path("owned").exists()
    with pytest.raises(ValueError, match="num_workers"):  # another error keeps its traceback
        call_fid(good, good, "--num-workers", -1)


def test_statistics_are_written_whole_or_not_at_all(call_fid, monkeypatch):
    """On a disk with any room, under a long name, beside what a killed run has left, and with the usual rights."""
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", Mock())
        call_fid("--save-stats", "nothing.npz", "n" * 251)
    for room in [*range(0, 15_000, 499), resource.RLIM_INFINITY]:
        assert [name[0] for name in sorted(os.listdir())] == [".", "é"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        code, _, said = call_fid("--save-stats", "é.npz", "n" * 251)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert re.fullmatch("error: .* too large\n" if code else "statistics of .*\n", said)
    assert code == 0 and os.stat("n" * 251 + ".npz").st_mode == os.stat("é.npz").st_mode


def test_signals_and_lines_that_cannot_be_written(call_fid, monkeypatch):
    full, letters = open("/dev/full", "w"), io.TextIOWrapper(io.BytesIO(), "ascii")  # noqa: SIM115
    for screen, second in ((full, full), (letters, None)):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", screen)
            patch.setattr(sys, "stderr", second)
            assert call_fid("--save-stats", "é.npz", screen.encoding)[0] == call_fid("é.npz", "é.npz")[0] == 0
        screen.close()  # with nothing left that it does not take
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where the tests run in the background
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: signal.raise_signal(signal.SIGCHLD))  # as a worker's end does
    for number, handler in ((signal.SIGINT, signal.SIG_DFL), (signal.SIGTERM, Mock(side_effect=RuntimeError))):
        signal.signal(signal.SIGCHLD, handler)
        monkeypatch.setattr(np, "load", lambda path, number=number: signal.raise_signal(number))
        assert call_fid("--save-stats", "é.npz", "new") == (128 + number, [], "interrupted\n")


def test_large_images_are_shrunk_where_they_are_read_and_folders_below_are_told(tmp_path, capsys):
    for name in ("large.png", "small.png", ".hidden.png", "below/c.png", "below/deep/d.JPG", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise_picture(0, *((1400, 1100) if "large" in name else (20, 16)))).save(tmp_path / name, "PNG")
    images = fid.ImageFolder(tmp_path)
    assert f"{tmp_path}: 2 images in its subfolders are not counted" in capsys.readouterr().err
    large, small = images
    assert large.nbytes == 4 * 3 * 299 * 299 and small.shape == (16, 20, 3) and len(images) == 2
    expected = torch.cat([fid.network_input([np.asarray(Image.open(path))], "cpu") for path in images.files])
    torch.testing.assert_close(fid.network_input([large, small], "cpu"), expected, rtol=0, atol=1e-6)


def test_too_little_memory_ends_in_one_line(two_folders, call_fid, monkeypatch):
    kill = functools.partial(signal.raise_signal, signal.SIGKILL)  # as the system does to a process that reads images
    with pytest.raises(RuntimeError) as killed:
        list(fid.folder_features(collections.defaultdict(kill, a=0), torch.nn.Conv2d(3, 1, 1), 1, num_workers=1))
    for error in (MemoryError(), killed.value, torch.OutOfMemoryError("CUDA out of memory"), PermissionError("no")):
        monkeypatch.setattr(torch, "load", Mock(side_effect=error))
        assert re.fullmatch("error: (not enough memory: .*|no)\n", call_fid(*two_folders)[2])
    assert not fid.lacks_memory(RuntimeError("an illegal memory access"))


# ---------------------------------------------------------------------------------------------------
# The README


def readme_examples():
    return re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)


def test_readme_examples_run_on_a_copy_of_maskgit(tmp_path):
    """Word for word but for the steps, on a copy that ends before the scripts' part; it saves and resumes. The first
    prints the square that README.md shows, since the model comes along."""
    draw, order, training = readme_examples()
    more = ["print(decode(model, torch.zeros(1, 16).long(), torch.ones(1, 16).bool(), coords, order=ask).view(4, 4))"]
    more += [f'train(model, batch, Recipe(steps=5), out="run", resume={resume})' for resume in (False, True)]
    more.append('import sys; assert "PIL" not in sys.modules, "a copy carries no imports of the scripts"')
    source = (HERE / "maskgit.py").read_text()
    (tmp_path / "results").mkdir()
    shutil.copy(HERE / "results" / "squares.pt", tmp_path / "results")
    (tmp_path / "maskgit.py").write_text(source[: source.index("# For the scripts")])
    (tmp_path / "example.py").write_text("\n".join([draw, order, training, *more]).replace("steps=300", "steps=30"))
    finished = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stderr
    first, *others = finished.stdout.split("tensor(")[1:]
    assert f"```\ntensor({first}```" in (HERE / "README.md").read_text() and first.count("1") == 4
    assert len(others) == 2 and all(re.match(r"\[\[[01], [01], [01], [01]\],", each) for each in others)


@pytest.mark.parametrize("script", [train_squares, train_rectangles, inpaint])
def test_help_names_every_flag(script, capsys):
    assert call(script, "--help") == 0
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--seed", "--resume", "--json", "--precision", "--mask", "--no-rotary"))


def test_pins_are_exact():
    pins = (HERE / "requirements.txt").read_text().split()
    assert sorted(pin.split("==")[0] for pin in pins) == ["numpy", "pillow", "pytest", "torch"]
    assert all(re.fullmatch(r"\w+==[\d.]+", pin) for pin in pins)
