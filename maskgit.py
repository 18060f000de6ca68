"""MaskGIT in one file: fill in the hidden part of an image with a bidirectional transformer.

An image is a set of discrete tokens at known coordinates. Some of them are hidden. The transformer sees all the others
at once and gives, for each hidden one, a distribution over the codes; `decode` commits a few hidden tokens per step
until none is left. The method comes in the order in which data flows, then training, then what only the scripts need.

Shapes: B images, T tokens, K codes, D model width. Tokens are int64, masks are bool with True = hidden, coordinates are
(x, y). Sources, by their short names:
    paper    Chang et al., MaskGIT: Masked Generative Image Transformer, CVPR 2022
    S1, S2   two blog posts of 2022, "Using BeRT for inpainting squares" and its Part 2 (squares, then rectangles)
    R1, R2   two students' reports of a course's lab on MaskGIT for image inpainting (photographs of cats)
"""

import contextlib
import copy
import io
import json
import math
import os
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode


class InputError(ValueError):
    """Bad input, named in one line with its remedy. Scripts print that line alone; other errors are bugs."""


def require_choice(what, value, choices):
    """InputError unless the value is one of the choices."""
    if value not in choices:
        raise InputError(f"unknown {what} {value!r}; choose from {', '.join(choices)}")


# ---------------------------------------------------------------------------------------------------
# Tokens


class KMeansResult(NamedTuple):
    centroids: np.ndarray  # (k, D) float32
    labels: np.ndarray  # (N,) int64: the nearest centroid of each point
    inertia: float  # sum of the squared distances to it


def kmeans(points, k, *, seed=0, restarts=1, max_iter=100, tol=1e-4, init=None):
    """Cluster points (N, D) around k centroids: Lloyd's iterations from a k-means++ start.

    A run ends after max_iter iterations, or once the centroids' summed squared shift is at most `tol` times the mean
    variance of the dimensions. The best of `restarts` runs is returned; init (k, D) replaces the random start. A seed
    repeats its result for the same number of threads, on which the rounding of sums depends.
    """
    points = np.ascontiguousarray(points, dtype=np.float32)
    if points.ndim != 2 or not np.isfinite(points).all():
        raise InputError(f"kmeans needs points of shape (N, D), all of them finite; these have shape {points.shape}")
    if len(set(map(bytes, points + 0.0))) < k:  # distinct ones, by their bytes; + 0.0 turns -0.0 into 0.0
        raise InputError(f"{k} clusters asked for, but fewer of the {len(points)} points are distinct")
    if init is not None:
        if np.shape(init) != (k, points.shape[1]):
            raise InputError(f"init has shape {np.shape(init)}; {k} of these points have {(k, points.shape[1])}")
        return lloyd(points, np.array(init, dtype=np.float32), max_iter, tol)
    rng = np.random.default_rng(seed)
    runs = [lloyd(points, plus_plus(points, k, rng), max_iter, tol) for _ in range(restarts)]
    return min(runs, key=lambda run: run.inertia)


def plus_plus(points, k, rng):
    """k points, each drawn in proportion to its squared distance from those before it (Arthur, Vassilvitskii 2007)."""
    norms = np.einsum("nd,nd->n", points, points)
    chosen = [rng.integers(len(points))]
    closest = np.full(len(points), np.inf, dtype=np.float32)
    while len(chosen) < k:
        distances = norms - 2 * (points @ points[chosen[-1]]) + norms[chosen[-1]]
        closest = np.minimum(closest, distances.clip(min=0))
        cumulative = closest.cumsum(dtype=np.float64)
        position = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
        chosen.append(min(position, len(points) - 1))
    return points[chosen]


def lloyd(points, centroids, max_iter, tol):
    """Move each centroid to the mean of its points until the shift is small; an empty one to the farthest point."""
    enough = tol * points.var(axis=0, dtype=np.float64).mean()
    labels = nearest_centroid(points, centroids)
    for _ in range(max_iter):
        counts = np.bincount(labels, minlength=len(centroids))
        sums = np.stack([np.bincount(labels, weights=x, minlength=len(counts)) for x in points.T], axis=1)  # (k, D)
        moved = (sums / counts.clip(min=1)[:, None]).astype(np.float32)
        empty = np.flatnonzero(counts == 0)
        if len(empty):
            farthest = squared_distances(points, centroids, labels).argsort()[-len(empty) :]
            moved[empty] = points[farthest]
        shift = np.square(moved - centroids).sum()
        centroids = moved
        labels = nearest_centroid(points, centroids)
        if shift <= enough:
            break
    return KMeansResult(centroids, labels, float(squared_distances(points, centroids, labels).sum()))


def nearest_centroid(points, centroids, block=1024):
    """The index of the centroid (k, D) nearest to each point (N, D): (N,) int64."""
    # |x - c|^2 is |x|^2, the same for all centroids, plus (x, 1) . (-2 c, |c|^2): one product for a block of points and
    # all centroids. Measured from the centroids' mean, the squares stay small and lose few digits.
    origin = centroids.mean(axis=0)
    centred = centroids - origin
    weights = np.vstack([-2 * centred.T, np.square(centred).sum(axis=1)])  # (D + 1, k)
    labels = np.empty(len(points), dtype=np.int64)
    extended = np.ones((block, points.shape[1] + 1), dtype=np.float32)
    for start in range(0, len(points), block):
        part = points[start : start + block]
        extended[: len(part), :-1] = part - origin
        labels[start : start + block] = (extended[: len(part)] @ weights).argmin(axis=1)
    return labels


def squared_distances(points, centroids, labels):
    """Of each point (N, D) to the centroid that its label names: (N,) float64; axis by axis, to save memory."""
    return sum(np.square(x - c[labels], dtype=np.float64) for x, c in zip(points.T, centroids.T, strict=True))


class PatchTokenizer:
    """Square patches of images, each named by the nearest of typical ones: centroids (codes, patch * patch * C),
    flattened row by row. Patches lie `stride` pixels apart (default: patch), and overlap where it is less. S2's 16x16
    with patch 4 and stride 1 gives 13x13 tokens, R1's and R2's 64x64 with patch 4 gives 16x16."""

    def __init__(self, centroids, patch, stride=None):
        self.centroids = np.ascontiguousarray(centroids, dtype=np.float32)
        self.patch = int(patch)
        self.stride = int(stride or patch)
        if not 1 <= self.stride <= patch:
            raise InputError(f"stride {self.stride} is not 1 to {patch}, so patches would not cover an image")

    @classmethod
    def fit(cls, images, codes, patch, stride=None, seed=0, **options):
        """Cluster all patches of images (B, H, W, C) into `codes` centroids; options go to kmeans."""
        patches = image_patches(images, patch, stride or patch)
        return cls(kmeans(patches.reshape(-1, patches.shape[-1]), codes, seed=seed, **options).centroids, patch, stride)

    def nearest(self, patches):
        """Flattened patches (..., patch * patch * C) -> their tokens (...)."""
        return nearest_centroid(patches.reshape(-1, patches.shape[-1]), self.centroids).reshape(patches.shape[:-1])

    def encode(self, images):
        """Images (B, H, W, C) -> tokens (B, h, w)."""
        values_at_once = 2**22  # so that memory does not grow with the number of images
        at_once = max(1, values_at_once // images[0].size)
        parts = [images[start : start + at_once] for start in range(0, len(images), at_once)]
        return np.concatenate([self.nearest(image_patches(part, self.patch, self.stride)) for part in parts])

    def decode(self, tokens):
        """Tokens (B, h, w) -> images (B, H, W, C): the centroids, averaged where they overlap."""
        return stitch_patches(self.centroids[tokens], self.patch, self.stride)


def image_patches(images, patch, stride):
    """All patches of images (B, H, W, C), each flattened row by row: (B, h, w, patch * patch * C)."""
    b, height, width, channels = images.shape
    if min(height, width) < patch or (height - patch) % stride or (width - patch) % stride:
        raise InputError(f"images of {width}x{height} are not covered by patches of {patch} every {stride} pixels")
    windows = np.lib.stride_tricks.sliding_window_view(images, (patch, patch), axis=(1, 2))[:, ::stride, ::stride]
    windows = windows.transpose(0, 1, 2, 4, 5, 3)  # from (B, h, w, C, patch, patch)
    return windows.reshape(b, *windows.shape[1:3], patch * patch * channels)


def stitch_patches(patches, patch, stride):
    """Images (B, H, W, C) of such patches (B, h, w, patch * patch * C): their mean where they overlap."""
    b, h, w, size = patches.shape
    pixels = patches.reshape(b, h, w, patch, patch, size // patch**2)
    total = np.zeros((b, (h - 1) * stride + patch, (w - 1) * stride + patch, pixels.shape[-1]), dtype=np.float32)
    count = np.zeros((*total.shape[1:3], 1), dtype=np.float32)
    for y, x in np.ndindex(patch, patch):  # one pixel of all patches at once
        rows = slice(y, y + (h - 1) * stride + 1, stride)
        columns = slice(x, x + (w - 1) * stride + 1, stride)
        total[:, rows, columns] += pixels[:, :, :, y, x]
        count[rows, columns] += 1
    return total / count


# ---------------------------------------------------------------------------------------------------
# Positions

LAYOUTS = ("split", "printed")  # of position_encoding: ours, and S1's formula as it is printed there


def grid_coords(height, width):
    """(x, y) of every cell of a grid, row by row: float32, (height * width, 2)."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2).float()


def position_encoding(coords, dim, layout="split"):
    """Sinusoids of real (x, y) coordinates: (..., 2) -> (..., dim), float32, with dim divisible by 4. The first half of
    the dimensions encodes x, the second half y; even ones are sines, odd ones cosines. layout="split" gives each axis
    all frequencies from 1 rad per unit down to almost 1/10000. In S1's formula, "printed", dimension i has
    10000^(-i / dim) whichever its axis, so y has only those up to 0.01: rows look alike."""
    if dim % 4:
        raise InputError(f"position_encoding needs a dim divisible by 4, not {dim}")
    require_choice("position layout", layout, LAYOUTS)
    index = torch.arange(dim, device=coords.device)
    if layout == "printed":
        exponent = index / dim
    else:
        pair = index % (dim // 2) // 2  # of a sine and a cosine, counted from 0 on each axis
        exponent = pair * 2 / (dim / 2)
    values = coords.float().repeat_interleave(dim // 2, dim=-1)  # (..., dim): x ... x, y ... y
    angles = values * 10000.0**-exponent
    return torch.where(index % 2 == 0, angles.sin(), angles.cos())


def rotary_angles(coords, width):
    """The angles by which attention turns the width / 2 pairs of numbers of a head: (..., 2) -> (..., width / 2). Then
    the product of a query and a key knows their positions by the difference alone (Su et al., RoFormer, 2021). Half of
    the pairs follow x, the others y, at frequencies from half a turn per cell, pi, to pi / 100^(1 - 4 / width)."""
    if width % 4:
        raise InputError(f"rotary attention needs heads whose width is divisible by 4, not {width}")
    pairs = width // 4
    frequency = math.pi * 100 ** -(torch.arange(pairs, device=coords.device) / pairs)
    return (coords.float()[..., None] * frequency).flatten(-2)  # (..., width / 2): x ... x, y ... y


# ---------------------------------------------------------------------------------------------------
# Transformer

NORMS = ("pre", "post")
HEADS = ("linear", "tied", "cosine")


def turn(x, angles):
    """Turn the pairs (x[i], x[i + d / 2]) of heads' vectors (B, heads, T, d) by angles ([B,] 1, T, d / 2)."""
    cos = angles.cos().to(x.dtype)
    sin = angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Attention(nn.Module):
    """Self-attention of heads of width d = D / heads, not causal: (B, T, D) -> (B, T, D); angles ([B,] 1, T, d / 2)."""

    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise InputError(f"dim {dim} is not divisible by {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x, angles=None):
        b, t, dim = x.shape
        qkv = self.qkv(x).view(b, t, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, d) each
        if angles is not None:
            query = turn(query, angles)
            key = turn(key, angles)
        if query.is_cpu and query.requires_grad and query.dtype == torch.bfloat16:
            # By its definition: on a CPU the backward pass of scaled_dot_product_attention is slow in bf16.
            x = ((query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)).softmax(dim=-1) @ value
        else:
            x = F.scaled_dot_product_attention(query, key, value)
        return self.out(x.transpose(1, 2).reshape(b, t, dim))


class Block(nn.Module):
    """One transformer layer: (B, T, D) -> (B, T, D). norm="post" is S1's: x = LN1(x + drop(MHA(x))),
    x = LN2(x + MLP(x)); "pre" normalises what enters each branch, so the sum of the branches stays untouched."""

    def __init__(self, dim, heads, hidden, dropout, norm):
        super().__init__()
        self.norm = norm
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.dropout = nn.Dropout(dropout)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim), nn.Dropout(dropout))

    def forward(self, x, angles=None):
        if self.norm == "post":
            x = self.norm1(x + self.dropout(self.attention(x, angles)))
            return self.norm2(x + self.mlp(x))
        x = x + self.dropout(self.attention(self.norm1(x), angles))
        return x + self.mlp(self.norm2(x))


class MaskGIT(nn.Module):
    """The bidirectional transformer: tokens (B, T) at coords (T, 2) or (B, T, 2) -> logits (B, T, codes). Tokens are
    0 .. codes-1, or `mask_id` (== codes) where hidden; [MASK] never gets a logit.

    norm is Block's, positions the layout of position_encoding; rotary lets attention see differences of coordinates.
    head turns the last state, after a small MLP, into logits:
    "linear"  a linear layer (S1's alternative, "predict the one-hot code");
    "tied"    dot product with each code's row of the embedding table, plus a bias per code (paper);
    "cosine"  cosine similarity with it (S1). At most 1, so with K codes the cross-entropy cannot fall below
              log(1 + (K-1) e^-2), unless learn_temperature multiplies the similarities by a learned scale.
    """

    def __init__(
        self, codes, dim, heads, layers, hidden=None, dropout=0.0, norm="pre", head="linear", positions="split",
        rotary=True, learn_temperature=False,
    ):  # fmt: skip
        super().__init__()
        require_choice("norm", norm, NORMS)
        require_choice("head", head, HEADS)
        if learn_temperature and head != "cosine":
            raise InputError(f"learn_temperature belongs to the cosine head, not to {head!r}")
        hidden = hidden or 4 * dim
        self.config = dict(
            codes=codes, dim=dim, heads=heads, layers=layers, hidden=hidden, dropout=dropout, norm=norm, head=head,
            positions=positions, rotary=rotary, learn_temperature=learn_temperature,
        )  # fmt: skip
        self.mask_id = codes
        self.embedding = nn.Embedding(codes + 1, dim)
        # Rows of length about 1 keep the tied head's first logits small; forward() brings them to the positions' size.
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.blocks = nn.ModuleList(Block(dim, heads, hidden, dropout, norm) for _ in range(layers))
        self.last_norm = nn.LayerNorm(dim) if norm == "pre" else nn.Identity()
        width = codes if head == "linear" else dim
        self.to_logits = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, width))
        if head == "tied":
            self.bias = nn.Parameter(torch.zeros(codes))
        if learn_temperature:
            self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, tokens, coords):
        dim, heads = self.config["dim"], self.config["heads"]
        positions = position_encoding(coords, dim, self.config["positions"])
        x = self.embedding(tokens) * math.sqrt(dim)  # (B, T, D)
        x = x + positions.to(x.dtype)
        angles = rotary_angles(coords, dim // heads).unsqueeze(-3) if self.config["rotary"] else None
        for block in self.blocks:
            x = block(x, angles)
        x = self.to_logits(self.last_norm(x))
        if self.config["head"] == "linear":
            return x
        codebook = self.embedding.weight[: self.mask_id]  # (K, D)
        if self.config["head"] == "tied":
            return F.linear(x, codebook, self.bias)
        similarity = F.linear(F.normalize(x, dim=-1), F.normalize(codebook, dim=-1))
        return similarity * self.log_scale.exp() if self.config["learn_temperature"] else similarity


# ---------------------------------------------------------------------------------------------------
# Masking

# gamma(r), of floats or arrays: the share of tokens that is hidden once the share r of the steps is done; gamma(0) = 1,
# gamma(1) = 0. R1 and R2 use the first three. The paper has all but arccos; its log and exp depend on how many tokens.
SCHEDULES = {
    "cosine": lambda r: np.cos(r * (math.pi / 2)),
    "linear": lambda r: 1 - r,
    "square": lambda r: 1 - r**2,
    "cubic": lambda r: 1 - r**3,
    "sqrt": lambda r: 1 - r**0.5,
    "arccos": lambda r: np.arccos(r) * (2 / math.pi),
    "log": lambda r: 1 - np.log2(1 + r),
    "exp": lambda r: (math.e - np.exp(r)) / (math.e - 1),
}

# In floats 0.55 * 100 is 55.00000000000001, which rounds up to 56: ceil and floor forgive a product this much.
ROUNDING = 1e-9


def random_mask(shape, ratio, generator=None):
    """Hide exactly ceil(ratio * T) tokens of each row, at least 1: bool (B, T). ratio: one in [0, 1], or one a row."""
    rows, tokens = shape
    ratio = torch.as_tensor(ratio, dtype=torch.float64)
    if not bool(((ratio >= 0) & (ratio <= 1)).all()):
        raise InputError("the share of hidden tokens must lie between 0 and 1")
    count = (ratio.expand(rows) * tokens - ROUNDING).ceil().long().clamp(min=1)
    # argsort says which number comes at each rank, and argsort of that the rank of each number.
    rank = torch.rand(rows, tokens, generator=generator, dtype=torch.float32).argsort(dim=1).argsort(dim=1)
    return rank < count[:, None]


def random_box(coords, generator=None):
    """The tokens at coords (B, T, 2) in the box that two of them span: (B, T)."""
    rows, tokens, _ = coords.shape
    corners = torch.randint(tokens, (rows, 2, 1), generator=generator).expand(-1, -1, 2)
    low, high = coords.gather(1, corners).aminmax(dim=1, keepdim=True)
    return ((low <= coords) & (coords <= high)).all(dim=-1)


def random_half(coords, generator=None):
    """The tokens at coords (B, T, 2) on one of four sides of the middle; if none, on the next; if none there, all."""
    rows, tokens, _ = coords.shape
    low, high = coords.aminmax(dim=1, keepdim=True)
    beyond = coords - (low + high) / 2
    sides = torch.cat([beyond, -beyond], dim=-1) > 0  # (B, T, 4): right, below, left, above
    side = torch.randint(4, (rows, 1, 1), generator=generator).expand(-1, tokens, -1)
    half = sides.gather(2, side)[..., 0]
    across = sides.gather(2, (side + 1) % 4)[..., 0]
    half = torch.where(half.any(dim=1, keepdim=True), half, across)
    return half | ~half.any(dim=1, keepdim=True)


REGIONS = {"box": random_box, "half": random_half}


def training_mask(shape, kind, generator=None, coords=None):
    """Random hidden tokens, at least one in each row: bool, of shape (B, T). A kind is one of these, or several joined
    by +, such as "0.2+cosine", which share the rows:
    - a name of SCHEDULES: the share gamma(r) of each row, with r uniform (paper);
    - a share, such as "0.2" of the tokens, or "single": one of them (S2);
    - "box": of tokens at coords (T, 2) or (B, T, 2) those in the box that two of them span;
    - "half": those beyond the middle on one of four sides."""
    kinds = kind.split("+")
    masks = []
    for part, each in zip(torch.arange(shape[0]).tensor_split(len(kinds)), kinds, strict=True):
        at = coords if coords is None or coords.ndim == 2 else coords[part]
        masks.append(mask_of_kind((len(part), shape[1]), each, generator, at))
    return torch.cat(masks)


def mask_of_kind(shape, kind, generator, coords):
    """training_mask of one kind, without +; InputError if it is none."""
    if kind in REGIONS:
        return REGIONS[kind](coords.expand(*shape, 2), generator)
    if kind in SCHEDULES:
        # Stratified: row i draws r from [i / B, (i + 1) / B), so that the loss of a batch depends less on luck.
        r = (torch.arange(shape[0]) + torch.rand(shape[0], generator=generator, dtype=torch.float32)) / shape[0]
        return random_mask(shape, SCHEDULES[kind](r.numpy()).clip(0, 1), generator)  # at 1 the cosine is -4e-8
    try:
        return random_mask(shape, 0.0 if kind == "single" else float(kind), generator)  # at 0 it hides one
    except ValueError:
        raise InputError(f"{kind!r} is no mask: choose single, a share, {', '.join([*REGIONS, *SCHEDULES])}") from None


def masked_cross_entropy(logits, targets, mask, *, count=None):
    """Cross-entropy in nats, averaged over the hidden tokens: a scalar. logits (B, T, K), targets (B, T), mask (B, T).
    count replaces the number of tokens to divide by, so that the parts of a larger batch add up to its mean."""
    # Flat, so that each token's logits lie side by side: with 1,024 codes on a CPU five times as fast as (B, K, T).
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    return (loss * mask).sum() / (mask.sum() if count is None else count)


# ---------------------------------------------------------------------------------------------------
# Decoding


class Step(NamedTuple):
    """What decode hands to its sample and order in each step: the n tokens that are still hidden, and the step."""

    log_probs: torch.Tensor  # (n, K): the model's, evidence and temperature included
    row: torch.Tensor  # (n,): the row of its image in the batch, 0 .. B-1, ascending
    place: torch.Tensor  # (n,): which of the image's T tokens it is
    coords: torch.Tensor  # (B, T, 2): of all tokens
    left: torch.Tensor  # (B,): how many tokens of each image the schedule leaves hidden after the step
    step: int  # 1 .. steps
    steps: int
    generator: torch.Generator | None
    tokens: torch.Tensor | None = None  # (n,): the token drawn for each; only orders see them, since samples draw them


def categorical(state):
    """A token each, drawn from its probabilities (R2): (n,)."""
    # As torch.multinomial does, which is many times slower on a CPU.
    cumulative = state.log_probs.exp().cumsum(dim=-1)  # (n, K)
    uniform = torch.rand(len(cumulative), 1, generator=state.generator, device=cumulative.device, dtype=torch.float32)
    tokens = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
    return tokens.clamp(max=cumulative.shape[1] - 1)  # the product may round to the whole sum


SAMPLES = {"categorical": categorical, "argmax": lambda state: state.log_probs.argmax(dim=-1)}  # R1's is argmax

# An order is a function of a Step that says which of its tokens are committed now. If it returns priorities, float
# (n,), the schedule says how many, and takes the highest. One that knows itself how many returns a bool (n,).


def by_confidence(state, choice_temperature=4.5, log_probability=False):
    """Those whose drawn token is the most probable, plus choice_temperature times Gumbel noise that fades with the
    steps. R1 and R2 rank by probability, the paper's code by its logarithm."""
    confidence = state.log_probs.gather(-1, state.tokens[:, None])[:, 0]
    confidence = confidence if log_probability else confidence.exp()
    gumbel = -torch.empty_like(confidence).exponential_(generator=state.generator).log()
    return confidence + choice_temperature * (1 - state.step / state.steps) * gumbel


def at_random(state):
    """Any, whatever the model says."""
    return torch.rand(len(state.place), generator=state.generator, device=state.place.device, dtype=torch.float32)


def all_but_lowest(priority, row, left):
    """True for all but the left[r] tokens of lowest priority in each row r: bool (n,). row (n,) is ascending."""
    ascending = priority.argsort(stable=True)
    ascending = ascending[row[ascending].argsort(stable=True)]  # row by row
    first = torch.searchsorted(row, row)  # where each token's row begins
    return ascending.argsort() - first >= left[row]  # argsort of an order gives the ranks


def by_entropy(state, budget=0.001):
    """At its own pace: the most uncertain token and, with it, the most certain ones, as many as have entropies that add
    up to `budget` nats, and more where the schedule asks for it. Tokens committed together are drawn as if independent:
    a KL divergence of at most the sum of their entropies without the largest. So the most uncertain one is free."""
    entropy = torch.special.entr(state.log_probs.exp()).sum(dim=-1)  # (n,)
    # As a table of all tokens of each image, (B, T). Visible ones have 0, and cost nothing.
    table = entropy.new_zeros(state.coords.shape[:2]).index_put((state.row, state.place), entropy)
    ascending, place = table.sort(dim=1, stable=True)
    unpaid = (ascending.cumsum(dim=1) > budget).sum(dim=1)  # (B,): tokens that the budget does not reach
    most_uncertain = state.place == place[state.row, -1]
    priority = (-entropy).masked_fill(most_uncertain, math.inf)
    left = (unpaid - 1).clamp(min=0)  # all of them but the most uncertain one
    return all_but_lowest(priority, state.row, state.left.minimum(left))


ORDERS = {"confidence": by_confidence, "random": at_random, "entropy": by_entropy}


@torch.no_grad()
def decode(
    model, tokens, mask, coords, *, steps=20, schedule="cosine", order="entropy", sample="categorical",
    temperature=1.0, stop_after=None, evidence=None, generator=None, trace=None,
):  # fmt: skip
    """Fill in the hidden tokens, several per step, each step seeing all that is committed so far.

    model       MaskGIT in eval mode, or any callable (tokens (b, T), coords) -> logits (b, T, K) with a `mask_id`.
                It is given the b images that have hidden tokens left, not always all B.
    tokens      (B, T) integers; what stands where mask is True is ignored.
    mask        (B, T) bool, True = hidden. All True generates from nothing.
    coords      (T, 2), or (B, T, 2).
    steps       the most network calls; fewer for an order with its own pace, or once no token is hidden.
    schedule    a name of SCHEDULES, or such a function: how many tokens are still hidden after each step.
    order       a name of ORDERS, or such a function: which tokens are committed next.
    sample      a name of SAMPLES ("categorical" is R2's, "argmax" R1's), or such a function: which token each becomes.
    temperature divides the logits.
    stop_after  a step in which all that is left is committed, whatever the schedule (R1, R2).
    evidence    (B, T, K), added to the logits: the log-likelihood of what else is known of each token.
    generator   a torch.Generator on the tokens' device; the same one gives the same tokens.
    trace       a list; each step appends (tokens, mask) as they stand after it, (B, T) both.

    Returns int64 tokens (B, T). Given ones come back unchanged, a committed one never changes, and after step t image
    i has min(floor(gamma(t / steps) * N_i), what it had - 1) hidden tokens left, where N_i is its own number at the
    start; by an order with its own pace any number that is smaller than before. After the last step none is left.
    """
    gamma = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
    order = ORDERS[order] if isinstance(order, str) else order
    sample = SAMPLES[sample] if isinstance(sample, str) else sample
    last_step = steps if stop_after is None else min(steps, stop_after)
    if last_step < 1 or temperature <= 0:
        raise InputError("decode needs steps and stop_after of at least 1, and a temperature above 0")
    if getattr(model, "training", False):
        raise InputError("decode needs a model without dropout: call model.eval() first")
    check_tokens(tokens, mask, model.mask_id, visible_only=True)
    tokens = tokens.long().masked_fill(mask, model.mask_id)
    hidden = mask.clone()
    at_start = hidden.sum(dim=1).tolist()  # B numbers
    all_coords = coords.expand(*tokens.shape, 2)
    for t in range(1, last_step + 1):
        rows = hidden.any(dim=1).nonzero()[:, 0]  # the b images that are not finished
        if not len(rows):
            break
        logits = model(tokens[rows], coords if coords.ndim == 2 else coords[rows])
        if logits.shape != (*tokens[rows].shape, model.mask_id):
            raise InputError(
                f"the model's logits are {tuple(logits.shape)}, not (b, T, {model.mask_id}), without [MASK]"
            )
        row, place = hidden.nonzero(as_tuple=True)  # of the n hidden tokens
        logits = logits[hidden[rows]].float()  # (n, K)
        if evidence is not None:
            logits = logits + evidence[row, place]
        log_probs = (logits / temperature).log_softmax(dim=-1)
        if log_probs.isnan().any():
            raise InputError("the model's logits, or the evidence, are no numbers")
        had = hidden.sum(dim=1)  # (B,)
        share = float(gamma(t / steps)) if t < last_step else 0.0
        scheduled = torch.tensor([math.floor(share * count + ROUNDING) for count in at_start], device=had.device)
        left = scheduled.minimum(had - 1).clamp(min=0)
        state = Step(log_probs, row, place, all_coords, left, t, steps, generator)
        drawn = sample(state)
        choice = order(state._replace(tokens=drawn))
        if not drawn.shape == choice.shape == place.shape:
            raise InputError(
                f"{tuple(drawn.shape)} samples, {tuple(choice.shape)} of the order, {len(place)} hidden tokens"
            )
        if bool(((drawn < 0) | (drawn >= model.mask_id)).any()):
            raise InputError(f"a sample is none of the codes 0 .. {model.mask_id - 1}")
        if choice.dtype == torch.bool:  # at its own pace: what it chose, or the most certain one; all in the last step
            chosen = torch.zeros_like(had).index_add(0, row, choice.long())
            left = (had - chosen.clamp(min=1)) * (t < last_step)
            choice = log_probs.amax(dim=-1).masked_fill(choice, math.inf)
        commits = all_but_lowest(choice, row, left)
        tokens[row, place] = drawn.masked_fill(~commits, model.mask_id)
        hidden[row, place] = ~commits
        if trace is not None:
            trace.append((tokens.clone(), hidden.clone()))
    return tokens


def check_tokens(tokens, mask, codes, visible_only=False):
    if tokens.shape != mask.shape or mask.dtype != torch.bool:
        raise InputError(f"tokens {tuple(tokens.shape)} and mask {tuple(mask.shape)} must agree, the mask as bool")
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise InputError(f"tokens are integers, not {tokens.dtype}")
    tokens = (tokens[~mask] if visible_only else tokens).long()  # beside uint8 the number 1024 would wrap round to 0
    if bool(((tokens < 0) | (tokens >= codes)).any()):
        raise InputError(f"the tokens are {int(tokens.min())} .. {int(tokens.max())}, the codes 0 .. {codes - 1}")


# ---------------------------------------------------------------------------------------------------
# Training


def setting(default, help, *, choices=None, low=None, below=None):
    """A field of a dataclass of settings, with the values that it may have. One with a help text becomes a flag."""
    return field(default=default, metadata=dict(help=help, choices=choices, low=low, below=below))


def check_settings(settings):
    """InputError if such a dataclass has a value that may not be."""
    for each in fields(settings):
        allowed = each.metadata
        kind = type(each.default)
        value = getattr(settings, each.name)
        if not isinstance(value, (int, float) if kind is float else kind):
            raise InputError(f"{each.name} is {value!r}, not of type {kind.__name__}")
        if allowed["choices"]:
            require_choice(each.name, value, allowed["choices"])
        low, below = allowed["low"], allowed["below"]
        for number in value if kind is tuple else [value]:
            if not (low is None or number >= low) or not (below is None or number < below):
                span = f"at least {low}" if below is None else f"at least {low} and below {below}"
                raise InputError(f"{each.name} is {value}; it must be {span}")


@dataclass(frozen=True)
class Recipe:
    """How to train: together with the model and its batches, all that decides the weights at the end."""

    steps: int = setting(1000, "updates of the weights", low=1)
    seed: int = setting(0, "of the first weights, batches and dropout", low=0, below=2**63)
    accumulate: int = setting(1, "parts in which a batch is worked through", low=1)
    loss: str = setting("masked", "the tokens that count; R1 and R2 have all", choices=("masked", "all"))
    optimizer: str = setting("muon", "of the blocks' matrices; the rest is AdamW's", choices=("muon", "adamw"))
    lr: float = setting(4e-3, "learning rate", low=0.0)
    betas: tuple[float, float] = setting((0.9, 0.95), "of AdamW", low=0.0, below=1.0)
    weight_decay: float = setting(0.0, "of the blocks' matrices", low=0.0)
    warmup: int = setting(100, "steps in which the learning rate rises", low=0)
    decay: str = setting("linear", "of the learning rate after that, down to 0", choices=("linear", "constant"))
    clip: float = setting(1.0, "largest norm of a gradient", low=1e-9)
    precision: str = setting("auto", "auto: bf16 where it is fast", choices=("auto", "float32", "bf16"))
    log_rows: int = setting(20, "about so many rows of log.csv, each with a validation", low=1)

    def __post_init__(self):
        check_settings(self)

    def for_device(self, device):
        """The same, with the precision that "auto" means on a device."""
        return replace(self, precision=fast_precision(device)) if self.precision == "auto" else self


def fast_precision(device):
    """ "bf16" where the processor multiplies it natively (CUDA since Ampere, AVX512-BF16), else "float32"."""
    native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()  # torch has no public name for it
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16" if native else "float32"


def precision_context(device, precision):
    """Run what is inside in "float32", or in "bf16" by autocast; weights and loss stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def step_seed(seed, step, part=0):
    """A seed for each part of each step of a run; no two are equal up to a million steps and a thousand parts."""
    return ((seed * 1_000_003 + step) * 1_009 + part) % 2**63


CHECKPOINT_SECONDS = 120  # between two checkpoints
STATUS = dict(training=False, checkpoint=None, signal=None)  # set by train, the last by stop()
DROPOUT = 500  # where step_seed's parts for dropout begin; a batch has part 0


def train(
    model, batch, recipe, *, out=None, resume=False, force=False, validate=None, best_by=None, tokenizer=None,
    extra=None,
):  # fmt: skip
    """Train `model` in place, on its device, to predict the hidden tokens of batch(step); returns the rows of log.csv.

    batch(step) gives tokens (B, T), mask (B, T) and coords (T, 2) or (B, T, 2): the whole batch, as a pure function of
    the step, so that a resumed run ends with the same weights as one that never stopped. Started by torchrun, each
    process takes its share of the rows, and the gradient is still that of the mean over the whole batch.

    out is a folder for log.csv, to whose rows validate(model) -> dict of numbers adds columns, and for model.pt,
    written every two minutes with the recipe, the tokenizer and `extra`, a dict of tensors. In the end the model is the
    last one, or the one whose column `best_by` was the lowest. resume goes on from out/model.pt, if model and recipe
    are the same; force starts over. InputError if the loss is no longer finite, or if a batch hides nothing. In scripts
    SIGINT and SIGTERM end it after a step and a checkpoint. The last checkpoint stays whole, however a run ends.
    """
    device = next(model.parameters()).device
    recipe = recipe.for_device(device)
    rank, world = process_rank()
    network = model  # what is called: the model, in the wrapper of torch.compile or of several processes
    model = getattr(model, "_orig_mod", model)
    optimizers = make_optimizers(model, recipe)
    state = dict(step=0, seconds=0.0, loss_sum=0.0, history=[])  # the sum of losses since the last row of history
    best = None  # the model whose column `best_by` was the lowest
    path = Path(out, "model.pt") if out else None
    if resume:
        best = resume_run(path, model, optimizers, state, recipe, best_by)
    if out:
        require_no_run(out, resume, force)
        path.parent.mkdir(parents=True, exist_ok=True)  # now, since it may be impossible
    if world > 1:
        start_group(device)
        network = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    started = time.monotonic() - state["seconds"]
    saved = printed = time.monotonic()
    row_every = max(1, recipe.steps // recipe.log_rows)
    model.train()
    stopped = None  # or the signal
    STATUS.update(training=True, signal=None)
    while state["step"] < recipe.steps and not stopped:
        torch.manual_seed(step_seed(recipe.seed, state["step"], DROPOUT + rank))
        tokens, mask, coords = batch(state["step"])
        check_tokens(tokens, mask, model.mask_id)
        if not mask.any():
            raise InputError(f"batch({state['step']}) hides no token, so there is nothing to learn from")
        tokens, mask, coords = (each.to(device, non_blocking=True) for each in (tokens.long(), mask, coords))
        inputs = tokens.masked_fill(mask, model.mask_id)
        counted = torch.ones_like(mask) if recipe.loss == "all" else mask
        with precision_context(device, recipe.precision):
            loss = backward(network, inputs, tokens, counted, coords, recipe.accumulate)
        rate, norm = update(model, optimizers, recipe, state["step"])
        state["step"] += 1
        state["loss_sum"] = state["loss_sum"] + loss
        state["seconds"] = time.monotonic() - started
        if rank > 0:
            continue  # the first process alone reports, writes and stops
        stopped = STATUS["signal"]
        printed = print_progress(state, recipe.steps, printed)
        last = state["step"] == recipe.steps
        row_due = last or state["step"] % row_every == 0
        checkpoint_due = out and (last or stopped or time.monotonic() - saved > CHECKPOINT_SECONDS)
        if row_due or checkpoint_due:
            require_finite(model, state)
        if row_due:
            row = dict(step=state["step"], loss=mean_loss(state), seconds=round(state["seconds"], 2))
            row |= dict(lr=rate, gradient_norm=float(norm))
            if validate:
                with torch.no_grad():
                    row |= {name: float(value) for name, value in validate(model.eval()).items()}
                model.train()
            state["history"].append(row)
            state["loss_sum"] = 0.0
            if best_by and row[best_by] == np.fmin.reduce([past[best_by] for past in state["history"]]):
                best = copy.deepcopy(model)
            if out:
                write_log(path.with_name("log.csv"), state["history"])
        if checkpoint_due:
            training = dict(progress=state, model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers])
            belongings = dict(tokenizer=tokenizer, extra=extra, config=asdict(recipe))
            save_checkpoint(path, best or model, step=state["step"], training=training, **belongings)
            STATUS["checkpoint"] = path
            saved = time.monotonic()
    STATUS["training"] = False
    if STATUS["signal"]:  # also one that came after the last step
        raise KeyboardInterrupt(STATUS["signal"])
    result = [state["history"], (best or model).state_dict()]
    if world > 1:
        torch.distributed.broadcast_object_list(result, src=0, device=device)
    model.load_state_dict(result[1])
    model.eval()
    return result[0]


def process_rank():
    """(rank, number of processes) of the group there is, or as torchrun says; (0, 1) without either."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start_group(device):
    """Let the processes find each other, once. On a CPU they share its cores; torchrun itself gives each only one."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", process_rank()[1]))))


def make_optimizers(model, recipe):
    """[AdamW], or for "muon" [AdamW, Muon] with the matrices of the blocks on Muon (torch.optim), which makes each
    update orthogonal, scaled to AdamW's size so that both share lr. Only those matrices decay."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    groups = [dict(params=others, weight_decay=0.0), dict(params=matrices, weight_decay=recipe.weight_decay)]
    options = dict(lr=recipe.lr, betas=recipe.betas, fused=True)
    if recipe.optimizer == "adamw":
        return [torch.optim.AdamW(groups, **options)]
    muon = torch.optim.Muon(groups[1:], lr=recipe.lr, adjust_lr_fn="match_rms_adamw")
    return [torch.optim.AdamW(groups[:1], **options), muon]


def backward(network, inputs, targets, counted, coords, accumulate):
    """Accumulate the gradient of the loss averaged over the counted tokens of the whole batch; returns that loss.
    Each process works through every world-th row, in `accumulate` parts. All divide by the count of the whole batch,
    so the parts add up to its mean however the hidden tokens are spread over them."""
    rank, world = process_rank()
    total = torch.zeros((), device=inputs.device)
    for i, rows in enumerate(torch.arange(rank, len(inputs), world, device=inputs.device).tensor_split(accumulate)):
        # Processes exchange gradients once, after the last part.
        with contextlib.nullcontext() if world == 1 or i == accumulate - 1 else network.no_sync():
            logits = network(inputs[rows], coords if coords.ndim == 2 else coords[rows]).float()
            loss = masked_cross_entropy(logits, targets[rows], counted[rows], count=counted.sum())
            (loss * world).backward()  # since DistributedDataParallel takes the mean over the processes, not the sum
        total += loss.detach()
    if world > 1:
        torch.distributed.all_reduce(total)
    return total


def update(model, optimizers, recipe, step):
    """Update the weights by their gradients; returns the learning rate, and the gradient's norm before clipping."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    rate = learning_rate(step, recipe)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        with WithoutBf16() if recipe.precision == "float32" else contextlib.nullcontext():
            optimizer.step()
        optimizer.zero_grad()
    return rate, norm


class WithoutBf16(TorchFunctionMode):
    """Here Tensor.bfloat16() is a float32 copy. Muon calls it in any precision; processors without bf16 are slow."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return args[0].clone() if function is torch.Tensor.bfloat16 else function(*args, **(kwargs or {}))


def learning_rate(step, recipe):
    """A linear rise to recipe.lr over the warm-up; then it stays, or falls to 0."""
    factor = min(1.0, (step + 1) / (recipe.warmup + 1))
    if recipe.decay == "linear":
        factor *= 1 - max(0, step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * factor


def mean_loss(state):
    """Since the last row of history."""
    rows = state["history"]
    return float(state["loss_sum"]) / (state["step"] - (rows[-1]["step"] if rows else 0))


def require_finite(model, state):
    weights = all(bool(p.isfinite().all()) for p in model.parameters())
    if not (weights and math.isfinite(state["loss_sum"])):
        raise InputError(f"loss or weights are no longer finite at step {state['step']}; try a lower learning rate")


def print_progress(state, steps, printed):
    """A line every 10 seconds, or on a terminal every second in place of the one before; returns when the last was."""
    terminal = sys.stderr.isatty()
    now = time.monotonic()
    step = state["step"]
    if step < steps and now - printed < (1 if terminal else 10):
        return printed
    speed = step / state["seconds"]
    minutes, seconds = divmod(round((steps - step) / speed), 60)
    line = f"step {step}/{steps}  loss {mean_loss(state):.4f}  {speed:.1f} steps/s  {minutes}:{seconds:02d} left   "
    print(line, end="\r" if terminal and step < steps else "\n", file=sys.stderr, flush=True)
    return now


def write_log(path, rows):
    lines = [list(rows[0]), *([row[name] for name in rows[0]] for row in rows)]
    write_whole(path, "".join(",".join(map(str, line)) + "\n" for line in lines).encode())


def require_no_run(out, resume, force):
    """InputError if a run would overwrite the one in its folder."""
    if Path(out, "model.pt").exists() and not (resume or force):
        raise InputError(
            f"{out} holds a run already: resume goes on with it, force starts over, another out keeps both"
        )


def resume_run(path, model, optimizers, state, recipe, best_by):
    """Bring all to where the checkpoint's run stopped; returns its best model, if any. InputError if it was another."""
    checkpoint = load_checkpoint(path)
    before = (checkpoint["config"] or {}) | checkpoint["model"].config  # both decide the weights
    now = plain(asdict(recipe) | model.config)
    for name in sorted(before.keys() | now.keys()):
        if (was := before.get(name)) != now.get(name):
            raise InputError(f"{path} was trained with {name}={was}, not {now.get(name)}; resume as it was")
    training = checkpoint["training"]
    state.update(training["progress"])
    for part, saved in zip([model, *optimizers], [training["model"], *training["optimizers"]], strict=True):
        part.load_state_dict(saved)
    return checkpoint["model"] if best_by and not all(math.isnan(row[best_by]) for row in state["history"]) else None


def write_whole(path, data):
    """Write bytes under a temporary name, then rename the file: it is whole, or not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.urandom(8).hex()}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def plain(value):
    """Numbers and strings, also in dicts and lists, as a checkpoint can hold them: those of numpy become Python's."""
    return json.loads(json.dumps(value, default=lambda number: number.item()))


def save_checkpoint(path, model, *, tokenizer=None, extra=None, config=None, step=0, training=None):
    """Write model.pt, whole or not at all; InputError if extra has more than tensors."""
    model = getattr(model, "_orig_mod", model)  # out of the wrapper of torch.compile
    if not all(isinstance(value, torch.Tensor) for value in (extra or {}).values()):
        raise InputError("extra is no dict of tensors")
    contents = dict(architecture=plain(model.config), weights=model.state_dict(), extra=extra)
    contents |= dict(config=plain(config), step=plain(step), training=training)
    if tokenizer:
        centroids = torch.from_numpy(tokenizer.centroids)
        contents["tokenizer"] = dict(centroids=centroids, patch=tokenizer.patch, stride=tokenizer.stride)
    buffer = io.BytesIO()  # since torch.save does not say that a disk is full
    torch.save(contents, buffer)
    write_whole(path, buffer.getbuffer())


def read_tensors(path):
    """What torch.save has written, without running code in it; an error if a checksum is wrong."""
    with zipfile.ZipFile(path) as archive:
        if broken := archive.testzip():  # torch.load does not compare them
            raise InputError(f"{broken} has another checksum")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_checkpoint(path, device="cpu"):
    """What save_checkpoint wrote, as a dict: model (MaskGIT on `device`, in eval mode), tokenizer (PatchTokenizer or
    None), extra, config, step, and training, which train(resume=True) goes on from. InputError if it is damaged."""
    try:
        saved = read_tensors(path)
        model = MaskGIT(**saved["architecture"]).eval()
        model.load_state_dict(saved["weights"])
        tokenizer = PatchTokenizer(**saved["tokenizer"]) if "tokenizer" in saved else None
    except Exception as error:  # torch.load raises half a dozen types on damaged files
        raise InputError(f"{path} is damaged or no checkpoint: {error}".splitlines()[0]) from None
    return saved | dict(model=model.to(device), tokenizer=tokenizer)


# ---------------------------------------------------------------------------------------------------
# For the scripts: command line, records and pictures. A copy of this file may end here.

import argparse
import platform
import re
import shlex
import signal
import subprocess

from PIL import Image, ImageDraw, ImageFont

STARTED = time.monotonic()


@dataclass(frozen=True)
class Experiment(Recipe):
    """All that decides the weights of a script's run: a Recipe, with its batches and its model."""

    batch_size: int = setting(64, "rows of a batch, of all processes together", low=1)
    mask: str = setting("cosine", "single, a schedule, a share, box, half, or several of them, as 0.2+cosine")
    dim: int = setting(64, "width of the model", low=1)
    heads: int = setting(4, "of attention", low=1)
    layers: int = setting(4, "blocks of the model", low=1)
    hidden: int = setting(0, "width of the MLPs; 0 is 4 x dim", low=0)
    dropout: float = setting(0.0, "in the blocks", low=0.0, below=1.0)
    norm: str = setting("pre", "where the blocks have their norms", choices=NORMS)
    head: str = setting("linear", "what gives the logits", choices=HEADS)
    learn_temperature: bool = setting(False, "of the cosine head")
    positions: str = setting("split", "layout of the position encoding; printed is S1's", choices=LAYOUTS)
    rotary: bool = setting(True, "attention sees differences of positions")

    def __post_init__(self):
        super().__post_init__()
        training_mask((0, 1), self.mask, coords=torch.zeros(1, 2))  # of no rows: InputError at once if it is none

    def new_model(self, codes, device):
        torch.manual_seed(self.seed)
        names = (
            "dim",
            "heads",
            "layers",
            "hidden",
            "dropout",
            "norm",
            "head",
            "positions",
            "rotary",
            "learn_temperature",
        )
        return MaskGIT(codes, **{name: getattr(self, name) for name in names}).to(device)


class CommandLine(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line on stderr, with exit code 2."""

    def __init__(self, description):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")

    def parse_with(self, defaults_of):
        """The arguments, where some decide what others default to: defaults_of(arguments) is a dict of these."""
        first, _ = self.parse_known_args([each for each in sys.argv[1:] if each not in ("-h", "--help")])
        self.set_defaults(**defaults_of(first))
        return self.parse_args()


def add_run_flags(parser, out):
    """The flags of every script's run that do not touch its weights."""
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--out", type=Path, default=Path(out), help="folder of the run, default %(default)s")
    add("--json", type=new_file, help="write the figures to this file as well")
    either = group.add_mutually_exclusive_group().add_argument
    either("--resume", action="store_true", help="go on with the run in --out")
    either("--force", action="store_true", help="start over in a folder that holds a run")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or (not tested) mps")


def add_flags(parser, settings, **defaults):
    """A flag for each setting of a dataclass that has a help text, some with other defaults."""
    add = parser.add_argument_group(settings.__name__.lower()).add_argument
    for each in (each for each in fields(settings) if each.metadata["help"]):
        options = dict(
            default=defaults.get(each.name, each.default), help=each.metadata["help"] + "; default %(default)s"
        )
        if isinstance(each.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(each.default, tuple):
            options |= dict(type=type(each.default[0]), nargs=len(each.default))
        else:
            options |= dict(type=type(each.default), choices=each.metadata["choices"])
        add(f"--{each.name.replace('_', '-')}", **options)


def settings_from(arguments, settings):
    """An instance of the dataclass, from the values of its flags."""
    values = {each.name: getattr(arguments, each.name) for each in fields(settings) if each.metadata["help"]}
    return settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def new_file(text):
    """An argparse type: a path for a new file, tried before the work that is to go there."""
    path = Path(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder")
    return path


def at_least(low):
    """An argparse type: an integer that is not below `low`."""

    def number(text):
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is below {low}")
        return int(text)

    return number


class Output:
    """Standard output or error. Once a line cannot be written, all are dropped; what its encoding lacks is escaped."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115  None: closed before the program began

    def write(self, text):
        encoding = self.stream.encoding or "utf-8"
        try:
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def stop(number, frame):
    """What a signal does: a training first ends its step and writes a checkpoint, unless it is the second signal."""
    if STATUS["signal"] or not STATUS["training"]:
        raise KeyboardInterrupt(number)
    STATUS["signal"] = number


def run_as_script(main):
    """Call main(). Bad input (InputError, OSError) and too little memory end in one line on stderr and exit code 2,
    SIGINT (Ctrl-C) in 130 and SIGTERM in 143. Of several processes the first alone prints."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as a shell sets it for what runs in the background
            signal.signal(number, stop)
    sys.stderr = Output(sys.stderr)
    sys.stdout = Output(sys.stdout) if process_rank()[0] == 0 else None
    try:
        main()
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        lacking = "" if isinstance(error, (InputError, OSError)) else "not enough memory: "
        print(f"error: {lacking}{error}".splitlines()[0], file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        resumable = f"; --resume goes on from {STATUS['checkpoint']}" if STATUS["checkpoint"] else ""
        print(f"interrupted{resumable}", file=sys.stderr)
        sys.exit(128 + (interrupt.args or [signal.SIGINT])[0])


def pick_device(name="auto"):
    """The torch.device for "auto" (CUDA where there is one, else CPU), "cpu", "cuda", "cuda:N" or "mps"."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name  # a process of torchrun has its own
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises all three
        raise InputError(f"device {name!r} cannot be used: {error}".splitlines()[0]) from None


def run_record():
    """Where a number comes from, asked at the start of a run, since the code may change meanwhile: plain values."""
    here = Path(__file__).resolve().parent
    script = Path(sys.argv[0]).resolve()
    script = script.relative_to(here) if script.is_relative_to(here) else script.name
    cpu_limits = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
    limits = [f"{name}={os.environ[name]}" for name in cpu_limits if name in os.environ]
    git = f"git -C {shlex.quote(str(here))} describe --always --dirty --exclude '*'"  # the commit, -dirty if changed
    failed, commit = subprocess.getstatusoutput(git)
    info = Path("/proc/cpuinfo")
    cpu = re.search("model name.*: (.*)", info.read_text() if info.exists() else "")
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return {
        "command": shlex.join([*limits, "python", str(script), *sys.argv[1:]]),
        "commit": "unknown" if failed else commit.removesuffix("-dirty"),
        "changed": commit.endswith("-dirty"),
        "machine": f"{cpu[1] if cpu else platform.processor()}, {os.cpu_count()} cores, {platform.system()}{gpu}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}",
        "date": time.strftime("%Y-%m-%d"),
    }


def write_figures(record, settings, figures, *paths):
    """The figures, settings (a dict), record and minutes, as JSON to each of the paths that is not None."""
    settings = {name: str(value) if value == math.inf else value for name, value in settings.items()}  # JSON has no inf
    record = record | {"minutes": round((time.monotonic() - STARTED) / 60, 1), "settings": settings}
    for path in filter(None, paths):
        write_whole(path, (json.dumps(record | figures, indent=1, default=str) + "\n").encode())


def print_table(head, rows):
    """Text in columns: the first one to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for first, *others in [head, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))
    print()


INK = "#282828"
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"]


def image_grid(images, columns, *, scale=1, gap=4, titles=()):
    """A PIL image of images (B, H, W, C), float in [0, 1], C 1 or 3, in rows of `columns`, titles over the first."""
    pixels = (np.asarray(images).clip(0, 1) * 255).round().astype(np.uint8).repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = pixels.shape
    rows = math.ceil(count / columns)
    top = 22 if titles else 0
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap + top), "#aabed7")
    for i, image in enumerate(pixels.repeat(3 // channels, axis=-1)):
        corner = gap + i % columns * (width + gap), gap + top + i // columns * (height + gap)
        sheet.paste(Image.fromarray(image), corner)
    for i, title in enumerate(titles):
        centre = gap + i * (width + gap) + width / 2, gap + 8
        ImageDraw.Draw(sheet).text(centre, title, fill=INK, font=ImageFont.load_default(14), anchor="mm")
    return sheet


def save_gif(path, frames):
    """PIL images as an endlessly repeated GIF that rests on the last one."""
    milliseconds = [400] * (len(frames) - 1) + [2000]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)


def line_plot(curves, *, title, y_label, x_label="step"):
    """A PIL image of curves {label: (x values, y values)} over a logarithmic y axis, with a legend to the right. What
    is not finite or not positive is left out."""
    font = ImageFont.load_default(26)
    left, right, top, bottom = 160, 1300, 120, 960  # twice the size of the picture, for smooth lines
    lines = {name: [(x, y) for x, y in zip(*curve, strict=True) if 0 < y < math.inf] for name, curve in curves.items()}
    lines = {name: line for name, line in lines.items() if line}
    xs, ys = zip(*sum(lines.values(), []), strict=True)
    x_at, x_ticks = axis(xs, left, right)
    y_at, y_ticks = axis(ys, bottom - 24, top, log=True)  # above the x axis
    sheet = Image.new("RGB", (1800, 1100), "white")
    pen = ImageDraw.Draw(sheet)
    for tick in x_ticks:
        pen.line([(x_at(tick), bottom), (x_at(tick), top)], fill="#e1e1e1", width=2)
        pen.text((x_at(tick), bottom + 14), f"{tick:g}", fill=INK, font=font, anchor="mt")
    for tick in y_ticks:
        pen.line([(left, y_at(tick)), (right, y_at(tick))], fill="#e1e1e1", width=2)
        pen.text((left - 14, y_at(tick)), f"{tick:g}", fill=INK, font=font, anchor="rm")
    pen.line([(left, top), (left, bottom), (right, bottom)], fill=INK, width=3)
    pen.text((left, 36), title, fill=INK, font=ImageFont.load_default(34), anchor="lm")
    pen.text((left, 90), y_label, fill=INK, font=font, anchor="lm")
    pen.text((right, bottom + 70), x_label, fill=INK, font=font, anchor="rm")
    for i, (label, line) in enumerate(lines.items()):
        legend = top + 20 + 44 * i
        style = {"fill": COLOURS[i % len(COLOURS)], "width": 5}
        pen.line([(x_at(x), y_at(y)) for x, y in line], joint="curve", **style)
        pen.line([(right + 30, legend), (right + 90, legend)], **style)
        pen.text((right + 104, legend), label, fill=INK, font=font, anchor="lm")
    return sheet.resize((900, 550), Image.Resampling.LANCZOS)


def axis(values, start, end, log=False):
    """A function from values to pixels between `start` and `end`, and the round values among them."""
    low, high = min(values), max(values)
    scale = math.log10 if log else float
    if log and high > 10 * low:
        ticks = [10.0**power * factor for power in range(-12, 13) for factor in (1, 2, 5)]
    else:
        step = 10.0 ** math.floor(math.log10((high - low or 1) / 3))
        step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
        ticks = [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]

    length = scale(high) - scale(low) or 1
    shown = [tick for tick in ticks if low <= tick <= high]
    return lambda value: start + (scale(value) - scale(low)) / length * (end - start), shown
