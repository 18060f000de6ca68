"""MaskGIT in one file: fill in the hidden part of an image with a bidirectional transformer.

An image is a set of discrete tokens at known coordinates. Some of them are hidden. The transformer sees all the others
at once and gives, for each hidden one, a distribution over the codes; `decode` commits a few hidden tokens per step
until none is left. In the order in which data flows: tokens, positions, transformer, masking, decoding; then training;
then what only the scripts need.

Shapes: B images, T tokens, K codes, D model width. Tokens are int64, masks are bool with True = hidden, coordinates are
(x, y). Sources: "paper" is Chang et al., MaskGIT, CVPR 2022; S1 and S2 are the two blog posts on squares and
rectangles; R1 and R2 the two course reports on photographs.
"""

import argparse
import contextlib
import copy
import ctypes
import functools
import inspect
import json
import math
import os
import platform
import random
import re
import shlex
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode


def require_choice(what, value, choices):
    """ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"unknown {what} {value!r}; choose from {', '.join(choices)}")


# ---------------------------------------------------------------------------------------------------
# Tokens


class KMeansResult(NamedTuple):
    centroids: np.ndarray  # (k, D) float32
    labels: np.ndarray  # (N,) int64: the nearest centroid of each point
    inertia: float  # sum of the squared distances to it
    iterations: int


def kmeans(points, k, *, seed=0, restarts=1, max_iter=100, tol=1e-4, init=None):
    """Cluster points (N, D) around k centroids: Lloyd's iterations from a k-means++ start.

    A run ends after max_iter iterations, or once the centroids' summed squared shift is at most `tol` times the mean
    variance of the dimensions. The best of `restarts` runs is returned; init (k, D) replaces the random start. A seed
    repeats its result for the same number of threads, by which sums are rounded. ValueError on points that are not
    finite, and on fewer than k distinct ones.
    """
    points = np.ascontiguousarray(points, dtype=np.float32)
    if points.ndim != 2 or not np.isfinite(points).all():
        raise ValueError(f"kmeans needs points of shape (N, D), all of them finite; these have shape {points.shape}")
    if min(k, restarts, max_iter) < 1:
        raise ValueError(f"kmeans needs k, restarts and max_iter of at least 1, not {k}, {restarts}, {max_iter}")
    looked_at, distinct = 0, 0
    while distinct < k and looked_at < len(points):  # no more of them than it takes
        looked_at = min(len(points), max(2 * k, 2 * looked_at))
        distinct = len(np.unique(points[:looked_at], axis=0))
    if distinct < k:
        raise ValueError(f"{k} clusters asked for, but only {distinct} of the {len(points)} points are distinct")
    if init is not None:
        if np.shape(init) != (k, points.shape[1]):
            raise ValueError(f"init has shape {np.shape(init)}; {k} of these points have {(k, points.shape[1])}")
        return lloyd(points, np.array(init, dtype=np.float32), max_iter, tol)
    rng = np.random.default_rng(seed)
    runs = [lloyd(points, plus_plus(points, k, rng), max_iter, tol) for _ in range(restarts)]
    return min(runs, key=lambda run: run.inertia)


def plus_plus(points, k, rng):
    """k of the points, each drawn with a probability proportional to its squared distance from those before it
    (Arthur and Vassilvitskii 2007)."""
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
    """Move each centroid to the mean of the points nearest to it, until it stays; an empty cluster takes one of the
    points farthest from their own centroid."""
    k = len(centroids)
    enough = tol * points.var(axis=0, dtype=np.float64).mean()
    labels = nearest_centroid(points, centroids)
    sums = cluster_sums(points, labels, k)
    for iteration in range(1, max_iter + 1):  # noqa: B007
        counts = np.bincount(labels, minlength=k)
        moved = (sums / counts.clip(min=1)[:, None]).astype(np.float32)
        empty = np.flatnonzero(counts == 0)
        if len(empty):
            moved[empty] = points[squared_distances(points, centroids, labels).argsort()[-len(empty) :]]
        shift = np.square(moved - centroids).sum()
        centroids, before = moved, labels
        labels = nearest_centroid(points, centroids)
        changed = labels != before
        sums += cluster_sums(points[changed], labels[changed], k) - cluster_sums(points[changed], before[changed], k)
        if shift <= enough:
            break
    return KMeansResult(centroids, labels, float(squared_distances(points, centroids, labels).sum()), iteration)


def nearest_centroid(points, centroids, block=1024):
    """The index of the centroid (k, D) nearest to each point (N, D): (N,) int64."""
    # |x - c|^2 is |x|^2, the same for all centroids, plus (x, 1) . (-2 c, |c|^2): one product and one argmin for
    # each block of points. Measured from the centroids' mean, the squares stay small and lose few digits.
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


def cluster_sums(points, labels, k):
    """The sum of each cluster's points (N, D): (k, D) float64."""
    return np.stack([np.bincount(labels, column, minlength=k) for column in points.T], axis=1)


def squared_distances(points, centroids, labels):
    """Of each point (N, D) to the centroid that its label names: (N,) float64; axis by axis, to save memory."""
    return sum(np.square(x - c[labels], dtype=np.float64) for x, c in zip(points.T, centroids.T, strict=True))


class PatchTokenizer:
    """Square patches of images, each named by the nearest of typical ones: centroids (codes, patch * patch * C),
    flattened row by row. Patches lie `stride` pixels apart (default: patch), and overlap where it is less. S2's 16x16
    with patch 4 and stride 1 gives 13x13 tokens, R1's and R2's 64x64 with patch 4 gives 16x16."""

    def __init__(self, centroids, patch, stride=None):
        self.centroids = np.ascontiguousarray(centroids, dtype=np.float32)
        self.patch, self.stride = patch, stride or patch
        self.channels, rest = divmod(self.centroids.shape[1], patch * patch)
        if rest or not 1 <= self.stride <= patch:
            numbers = f"centroids of {self.centroids.shape[1]} numbers"
            raise ValueError(f"{numbers} are no patches of side {patch}, or stride {self.stride} is not 1 to {patch}")

    @classmethod
    def fit(cls, images, codes, patch, stride=None, seed=0, **options):
        """Cluster all patches of images (B, H, W, C) into `codes` centroids; options go to kmeans."""
        patches = image_patches(images, patch, stride or patch)
        return cls(kmeans(patches.reshape(-1, patches.shape[-1]), codes, seed=seed, **options).centroids, patch, stride)

    def nearest(self, patches):
        """Flattened patches (..., patch * patch * C) -> their codes (...)."""
        return nearest_centroid(patches.reshape(-1, patches.shape[-1]), self.centroids).reshape(patches.shape[:-1])

    def encode(self, images):
        """Images (B, H, W, C) -> codes (B, h, w), a few images at a time: memory does not grow with B."""
        if images.shape[-1] != self.channels:
            raise ValueError(f"images have {images.shape[-1]} channels, the tokenizer was made for {self.channels}")
        at_once = max(1, 2**22 // images[0].size)
        parts = [images[start : start + at_once] for start in range(0, len(images), at_once)]
        return np.concatenate([self.nearest(image_patches(part, self.patch, self.stride)) for part in parts])

    def decode(self, ids):
        """Codes (B, h, w) -> images (B, H, W, C): the centroids, averaged where they overlap."""
        b, h, w = ids.shape
        height, width = ((n - 1) * self.stride + self.patch for n in (h, w))
        patches = self.centroids[ids].reshape(b, h, w, self.patch, self.patch, self.channels)
        total = np.zeros((b, height, width, self.channels), dtype=np.float32)
        count = np.zeros((height, width, 1), dtype=np.float32)
        for y, x in np.ndindex(self.patch, self.patch):
            rows, columns = (slice(i, i + (n - 1) * self.stride + 1, self.stride) for i, n in ((y, h), (x, w)))
            total[:, rows, columns] += patches[:, :, :, y, x]
            count[rows, columns] += 1
        return total / count


def image_patches(images, patch, stride):
    """All patches of images (B, H, W, C), each flattened row by row: (B, h, w, patch * patch * C)."""
    b, height, width, channels = images.shape
    if min(height, width) < patch or (height - patch) % stride or (width - patch) % stride:
        raise ValueError(f"images of {width}x{height} are not covered by patches of {patch} every {stride} pixels")
    windows = np.lib.stride_tricks.sliding_window_view(images, (patch, patch), axis=(1, 2))[:, ::stride, ::stride]
    return windows.transpose(0, 1, 2, 4, 5, 3).reshape(b, *windows.shape[1:3], patch * patch * channels)


# ---------------------------------------------------------------------------------------------------
# Positions


def grid_coords(height, width):
    """(x, y) of every cell of a grid, row by row: float32, (height * width, 2)."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2).float()


def position_encoding(coords, dim, layout="split"):
    """Sinusoids of real (x, y) coordinates: (..., 2) -> (..., dim), float32, with dim divisible by 4. The first half of
    the dimensions encodes x, the second half y; even ones are sines, odd ones cosines.

    layout="split" gives each axis all frequencies from 1 to 1/10000 rad per unit. "printed" is S1's formula as typed:
    dimension i has 10000^(-i / dim) on both axes, so y only gets those below 0.01 and its rows look nearly alike.
    """
    if dim % 4:
        raise ValueError(f"position_encoding needs a dim divisible by 4, not {dim}")
    require_choice("position layout", layout, ("split", "printed"))
    index = torch.arange(dim, device=coords.device)
    exponent = index / dim if layout == "printed" else index % (dim // 2) // 2 * 2 / (dim / 2)
    values = coords.float().repeat_interleave(dim // 2, dim=-1)  # (..., dim): x ... x, y ... y
    angles = values * 10000.0**-exponent
    return torch.where(index % 2 == 0, angles.sin(), angles.cos())


def rotary_angles(coords, dim):
    """The angles by which attention turns the dim / 2 pairs of numbers of a head: (..., 2) -> (..., dim / 2), dim
    divisible by 4. The product of a query and a key, each turned by its position's, depends on the difference of the
    positions alone (Su et al., RoFormer, 2021). Half of the pairs follow x, the others y, at frequencies from pi, which
    turns neighbouring cells against each other, to pi / 100 rad per unit."""
    if dim % 4:
        raise ValueError(f"rotary attention needs heads whose width is divisible by 4, not {dim}")
    pairs = dim // 4
    frequency = math.pi * 100 ** -(torch.arange(pairs, device=coords.device) / pairs)
    return (coords.float()[..., None] * frequency).flatten(-2)  # (..., dim / 2): x ... x, y ... y


# ---------------------------------------------------------------------------------------------------
# Transformer


def turn(x, angles):
    """Turn the pairs (x[i], x[i + d / 2]) of heads' vectors (..., B, heads, T, d) by angles (1 or B, 1, T, d / 2)."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention, not causal: (B, T, D) -> (B, T, D); rotary by angles (1 or B, 1, T, d / 2)."""

    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not divisible by {heads} heads")
        self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, angles=None):
        b, t, d = x.shape
        qkv = self.qkv(x).view(b, t, 3, self.heads, d // self.heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, heads, T, D / heads)
        query, key = qkv[:2] if angles is None else turn(qkv[:2], angles)
        value = qkv[2]
        if query.is_cpu and query.requires_grad and query.dtype == torch.bfloat16:
            # By its definition: on a CPU the fused kernel is slow to differentiate in bf16.
            x = (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(dim=-1) @ value
        else:
            x = F.scaled_dot_product_attention(query, key, value)
        return self.out(x.transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    """One transformer layer: (B, T, D) -> (B, T, D). norm="post" is S1's: x = LN1(x + drop(MHA(x))),
    x = LN2(x + MLP(x)); "pre" normalises what enters each branch, so the sum of the branches stays untouched."""

    def __init__(self, dim, heads, hidden, dropout, norm):
        super().__init__()
        self.norm, self.norm1, self.norm2 = norm, nn.LayerNorm(dim), nn.LayerNorm(dim)
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
    "tied"    dot product with each code's row of the embedding table, plus a bias per code (paper);
    "cosine"  cosine similarity with it (S1). At most 1, so with K codes the cross-entropy cannot fall below
              log(1 + (K-1) e^-2), unless learn_temperature multiplies the similarities by a learned scale;
    "linear"  a linear layer (S1's alternative, "predict the one-hot code").
    """

    def __init__(
        self, codes, dim, heads, layers, hidden=None, dropout=0.1, norm="pre", head="tied", positions="split",
        rotary=False, learn_temperature=False,
    ):  # fmt: skip
        super().__init__()
        hidden = hidden or 4 * dim
        require_choice("norm", norm, ("pre", "post"))
        require_choice("head", head, ("tied", "cosine", "linear"))
        if learn_temperature and head != "cosine":
            raise ValueError(f"learn_temperature belongs to the cosine head, not to {head!r}")
        self.config = dict(codes=codes, dim=dim, heads=heads, layers=layers, hidden=hidden, dropout=dropout, norm=norm)
        self.config |= dict(head=head, positions=positions, rotary=rotary, learn_temperature=learn_temperature)
        self.mask_id = codes
        self.embedding = nn.Embedding(codes + 1, dim)
        # Rows of length about 1 keep the tied head's first logits small; forward() scales them up again to the size of
        # the position encoding (Vaswani et al. 2017, 3.4).
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
        dim, head = self.config["dim"], self.config["head"]
        positions = position_encoding(coords, dim, self.config["positions"])
        x = self.embedding(tokens) * math.sqrt(dim) + positions  # (B, T, D)
        angles = None
        if self.config["rotary"]:
            angles = rotary_angles(coords, dim // self.config["heads"])  # (T, d / 2) or (B, T, d / 2)
            angles = angles[:, None] if angles.ndim == 3 else angles[None, None]
        for block in self.blocks:
            x = block(x, angles)
        x = self.to_logits(self.last_norm(x))
        if head == "linear":
            return x
        codebook = self.embedding.weight[: self.mask_id]  # (K, D)
        if head == "tied":
            return F.linear(x, codebook, self.bias)
        similarity = F.linear(F.normalize(x, dim=-1), F.normalize(codebook, dim=-1))
        return similarity * self.log_scale.exp() if self.config["learn_temperature"] else similarity


# ---------------------------------------------------------------------------------------------------
# Masking

# gamma(r): the share of tokens that is hidden once the share r of the steps is done; gamma(0) = 1, gamma(1) = 0. Takes
# and returns floats or numpy arrays. The paper compares all but arccos and log; R1 and R2 use the first three.
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


def random_mask(shape, ratio, generator=None):
    """Hide exactly ceil(ratio * T) tokens of each row, at least 1: bool, of shape (B, T). ratio is in [0, 1], one for
    all rows or one for each."""
    rows, tokens = shape
    ratio = torch.as_tensor(ratio, dtype=torch.float64).expand(rows)
    if not bool(((ratio >= 0) & (ratio <= 1)).all()):
        raise ValueError("the share of hidden tokens must lie between 0 and 1")
    count = (ratio * tokens).ceil().clamp(min=1)
    device = generator.device if generator is not None else "cpu"
    rank = torch.rand(rows, tokens, generator=generator, device=device).argsort(dim=1).argsort(dim=1)
    return rank < count[:, None].to(device)


def training_mask(shape, kind, generator=None, coords=None):
    """Random hidden tokens of a kind: bool, of shape (B, T). kind is a name of SCHEDULES, to hide gamma(r) of each row
    with r uniform (paper); a share such as "0.2", or "single" for one token (S2); a hole in tokens at coords (T, 2) or
    (B, T, 2): the "box" that two tokens span, or the "half" beyond the middle on one of four sides; or several that
    share the rows, such as "0.2+cosine"."""
    kinds = kind.split("+")
    if len(kinds) > 1:
        masks, parts = [], torch.arange(shape[0]).tensor_split(len(kinds))
        for rows, each in zip(parts, kinds, strict=True):
            at = coords if coords is None or coords.ndim == 2 else coords[rows]
            masks.append(training_mask((len(rows), shape[1]), each, generator, at))
        return torch.cat(masks)
    if kind in ("box", "half"):
        if coords is None:
            raise ValueError(f"the mask {kind!r} needs the coordinates of the tokens")
        return hole(coords.expand(*shape, 2), kind, generator)
    if kind in SCHEDULES:
        # One r from each B-th of [0, 1): the mean loss of a batch then depends less on luck.
        r = (torch.arange(shape[0]) + torch.rand(shape[0], generator=generator)) / shape[0]
        return random_mask(shape, SCHEDULES[kind](r.numpy()).clip(0, 1), generator)  # at 1 the cosine is -4e-8
    try:
        return random_mask(shape, 0.0 if kind == "single" else float(kind), generator)
    except ValueError:
        raise ValueError(f"{kind!r} is no mask: choose single, a share, box, half, or {', '.join(SCHEDULES)}") from None


def hole(coords, kind, generator):
    """training_mask's "box" and "half" of tokens at coords (B, T, 2): (B, T)."""
    rows, tokens, _ = coords.shape
    if kind == "box":
        corners = torch.randint(tokens, (rows, 2, 1), generator=generator).expand(-1, -1, 2)
        low, high = coords.gather(1, corners).aminmax(dim=1, keepdim=True)
        return ((low <= coords) & (coords <= high)).all(dim=-1)
    low, high = coords.aminmax(dim=1, keepdim=True)
    beyond = coords - (low + high) / 2
    side = torch.randint(4, (rows, 1, 1), generator=generator).expand(-1, tokens, -1)
    return torch.cat([beyond, -beyond], dim=-1).gather(2, side)[..., 0] > 0


def masked_cross_entropy(logits, targets, mask, label_smoothing=0.0, *, count=None):
    """Cross-entropy in nats, averaged over the hidden tokens: a scalar. logits (B, T, K), mask (B, T); targets are
    codes (B, T), or a distribution for each token (B, T, K). count replaces the number of tokens to divide by, so that
    the parts of a larger batch add up to its mean."""
    targets = targets.transpose(1, 2) if targets.ndim == 3 else targets
    loss = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", label_smoothing=label_smoothing)
    return (loss * mask).sum() / (mask.sum() if count is None else count)


# ---------------------------------------------------------------------------------------------------
# Decoding


class Step(NamedTuple):
    """What an order knows in a step of decode, of the n tokens that are still hidden and of the step."""

    log_probs: torch.Tensor  # (n, K): the model's, evidence and temperature included
    values: torch.Tensor  # (n,): the code drawn for each; an order may put another in its place
    image: torch.Tensor  # (n,): its image, 0 .. B-1, ascending
    place: torch.Tensor  # (n,): which of the image's T tokens it is
    coords: torch.Tensor  # (B, T, 2): of all tokens
    left: torch.Tensor  # (B,): how many tokens of each image the schedule leaves hidden after the step
    step: int  # 1 .. steps
    steps: int
    generator: torch.Generator | None
    memory: dict  # whatever an order keeps for its next steps; empty at first


# An order is a function of a Step that says which of its tokens are committed now: by priorities, float (n,), of which
# the schedule takes the highest; or at its own pace, by a bool (n,).


def by_confidence(step, choice_temperature=4.5, log_probability=False):
    """Those whose drawn value is the most probable, plus choice_temperature times Gumbel noise that fades with the
    steps. R1 and R2 rank by probability, the paper's code by its logarithm."""
    confidence = step.log_probs.gather(-1, step.values[:, None])[:, 0]
    confidence = confidence if log_probability else confidence.exp()
    gumbel = -torch.empty_like(confidence).exponential_(generator=step.generator).log()
    return confidence + choice_temperature * (1 - step.step / step.steps) * gumbel


def at_random(step):
    """Any, whatever the model says."""
    return torch.rand(step.place.shape, generator=step.generator, device=step.place.device)


def by_halton(step):
    """Evenly over the image: the k-th point of the Halton sequence (bases 2 and 3, stretched over the tokens' bounding
    box) takes the nearest token not yet taken."""
    if "halton" not in step.memory:
        coords = step.coords
        low, high = coords.amin(dim=1, keepdim=True), coords.amax(dim=1, keepdim=True)
        priority = torch.full(coords.shape[:2], math.inf, device=coords.device)  # (B, T)
        k = torch.arange(coords.shape[1], dtype=torch.float64, device=coords.device)
        points = torch.stack([radical_inverse(k, 2), radical_inverse(k, 3)], dim=-1).to(coords.dtype)  # (T, 2)
        for i in range(len(points)):
            distance = (coords - (low + (high - low) * points[i])).square().sum(dim=-1)
            nearest = distance.masked_fill(priority.isfinite(), math.inf).argmin(dim=1, keepdim=True)
            priority.scatter_(1, nearest, float(-i))
        step.memory["halton"] = priority
    return step.memory["halton"][step.image, step.place]


def radical_inverse(k, base):
    """The digits of numbers k (T,) in `base`, mirrored at the point: 6 = 110 in base 2 gives 0.011 = 0.375. (T,)"""
    return sum(k.div(base**i, rounding_mode="floor") % base / base ** (i + 1) for i in range(24))


def by_entropy(step, budget=0.001):
    """At its own pace: the most uncertain token and, with it, the most certain ones, as many as have entropies that add
    up to `budget` nats, and more where the schedule asks for it. Tokens committed together are drawn as if independent,
    which costs at most the sum of their entropies but the largest: so the most uncertain one is free."""
    entropy = torch.special.entr(step.log_probs.exp()).sum(dim=-1)  # (n,)
    of_all = entropy.new_zeros(step.coords.shape[:2]).index_put((step.image, step.place), entropy)  # (B, T)
    ascending, token = of_all.sort(dim=1, stable=True)
    beyond = (ascending.cumsum(dim=1) > budget).sum(dim=1)  # (B,): of these the last is asked
    asked = step.place == token[step.image, -1]
    return highest((-entropy).masked_fill(asked, math.inf), step.image, step.left.minimum((beyond - 1).clamp(min=0)))


ORDERS = {"confidence": by_confidence, "random": at_random, "halton": by_halton, "entropy": by_entropy}


@torch.no_grad()
def decode(
    model, tokens, mask, coords, *, steps=20, schedule="cosine", order="entropy", sample="categorical",
    temperature=1.0, stop_after=None, evidence=None, generator=None, trace=None,
):  # fmt: skip
    """Fill in the hidden tokens, several per step, each step seeing all that is committed so far.

    model       MaskGIT in eval mode, or any callable (tokens (b, T), coords) -> logits (b, T, K) with a `mask_id`.
    tokens      (B, T) int64; what stands where mask is True is ignored.
    mask        (B, T) bool, True = hidden. All True generates from nothing.
    coords      (T, 2), or (B, T, 2).
    steps       T: the number of network calls, or the most of them for an order with its own pace.
    schedule    a name of SCHEDULES, or such a function: how many tokens are still hidden after each step.
    order       a name of ORDERS, or such a function: which tokens are committed next.
    sample      how a value is drawn: "categorical" (R2), or "argmax" (R1).
    temperature divides the logits.
    stop_after  commit all that is left after this many steps (the reports' sweet spot).
    evidence    (B, T, K), added to the logits: the log-likelihood of what else is known of each token.
    generator   a torch.Generator on the tokens' device; the same one gives the same tokens.
    trace       a list; each step appends (tokens, mask) as they stand after it, (B, T) both.

    Returns tokens (B, T). Given tokens come back unchanged, a committed token never changes, and after step t image i
    has min(floor(gamma(t / steps) * N_i), what it had - 1) hidden tokens left, where N_i is its own number at the
    start; by an order with its own pace any number that is smaller than before. After the last step none is left.
    """
    gamma, order = SCHEDULES.get(schedule, schedule), ORDERS.get(order, order)
    check_decode_arguments(model, tokens, mask, steps, gamma, order, sample, temperature, stop_after)
    tokens, hidden, memory = tokens.masked_fill(mask, model.mask_id), mask.clone(), {}
    all_coords, last_step = coords.expand(*tokens.shape, 2), min(steps, stop_after or steps)
    at_start = hidden.sum(dim=1)  # (B,)
    for t in range(1, last_step + 1):
        rows = hidden.any(dim=1).nonzero()[:, 0]  # the b images that are not finished
        if not len(rows):
            break
        row, place = hidden[rows].nonzero(as_tuple=True)  # their n hidden tokens
        image, had = rows[row], hidden.sum(dim=1)
        logits = model(tokens[rows], coords if coords.ndim == 2 else coords[rows])[row, place].float()  # (n, K)
        if evidence is not None:
            logits = logits + evidence[image, place]
        log_probs = (logits / temperature).log_softmax(dim=-1)
        if log_probs.isnan().any():
            raise ValueError("the model's logits are no numbers")
        values = log_probs.argmax(dim=-1) if sample == "argmax" else draw(log_probs, generator)

        scheduled = (at_start.double() * float(gamma(t / steps))).long() * (t < last_step)
        left = scheduled.minimum(had - 1).clamp(min=0)
        choice = order(Step(log_probs, values, image, place, all_coords, left, t, steps, generator, memory))
        if choice.shape != values.shape:
            raise ValueError(f"an order returned {tuple(choice.shape)} for {len(values)} hidden tokens")
        if choice.dtype == torch.bool:  # those it chose, or the most certain one where an image has none; at last all
            chosen = torch.zeros_like(had).index_add(0, image, choice.long())
            left = (had - chosen.clamp(min=1)) * (t < last_step)
            choice = log_probs.amax(dim=-1).masked_fill(choice, math.inf)
        commits = highest(choice, image, left)
        tokens[image, place] = values.clamp(0, model.mask_id - 1).masked_fill(~commits, model.mask_id)
        hidden[image, place] = ~commits
        if trace is not None:
            trace.append((tokens.clone(), hidden.clone()))
    return tokens


def check_decode_arguments(model, tokens, mask, steps, gamma, order, sample, temperature, stop_after):
    if not callable(gamma):
        require_choice("schedule", gamma, SCHEDULES)
    if not callable(order):
        require_choice("order", order, ORDERS)
    require_choice("sample", sample, ("categorical", "argmax"))
    if steps < 1 or (stop_after is not None and stop_after < 1):
        raise ValueError("decode needs steps and stop_after of at least 1")
    if temperature <= 0:
        raise ValueError('decode needs a temperature above 0; for the likeliest value use sample="argmax"')
    if tokens.shape != mask.shape or mask.dtype != torch.bool:
        raise ValueError(f"tokens {tuple(tokens.shape)} and mask {tuple(mask.shape)} must agree, the mask as bool")
    if bool((tokens[~mask] >= model.mask_id).any()):
        raise ValueError(f"a given token is {model.mask_id} or more, but the codes are 0 .. {model.mask_id - 1}")
    if getattr(model, "training", False):
        raise ValueError("decode needs a model without dropout: call model.eval() first")


def draw(log_probs, generator):
    """One code per token, drawn from log-probabilities (n, K): (n,)."""
    cumulative = log_probs.exp().cumsum(dim=-1)
    uniform = torch.rand(len(log_probs), 1, generator=generator, device=log_probs.device)
    codes = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
    return codes.clamp(max=log_probs.shape[1] - 1)  # uniform may round to the whole


def highest(priority, image, left):
    """All tokens but the `left` (B,) ones of lowest priority (n,) in each image (n,), ascending: bool (n,)."""
    ascending = priority.argsort(stable=True)
    ascending = ascending[image[ascending].argsort(stable=True)]  # image by image
    rank = ascending.argsort() - torch.searchsorted(image, image)  # from 0 within each image
    return rank >= left[image]


# ---------------------------------------------------------------------------------------------------
# Training


def train(
    model, batch, *, steps, seed=0, accumulate=1, every_position=False, soft_targets=None, optimizer="adamw", lr=1e-3,
    betas=(0.9, 0.95), weight_decay=0.01, warmup=100, decay="linear", clip=1.0, precision="float32", compile=False,
    on_policy=0.0, policy=by_entropy, validate=None, best_by=None, log_steps=100, out=None, tokenizer=None, config=None,
    checkpoint_steps=None, resume=False,
):  # fmt: skip
    """Train `model`, where it is, to predict the hidden tokens of `batch(step)`; returns the rows of log.csv.

    batch(step) gives tokens (B, T), mask (B, T) and coords (T, 2) or (B, T, 2): the whole batch, as a pure function of
    the step, so that a resumed run ends with the same weights as one that never stopped. Started by torchrun, each
    process takes its share of the rows; accumulate=n works through them in n parts. The gradient is always that of the
    mean over all hidden tokens of the batch (every_position: all tokens, as R1 and R2 have it). soft_targets (K, K)
    holds the distribution to predict in place of each code.

    The last rows of a batch, a share of on_policy, show what decode visits. They start as batch() has them. A row that
    is not finished comes back in the next batch, and the tokens that the policy, an order at its own pace, commits by
    the pass just made are then visible, with their true values. All coordinates must be the same, (T, 2).

    out is a folder for model.pt, written every checkpoint_steps steps or two minutes, and log.csv, with a row every
    log_steps steps to which validate(model) -> dict of floats may add columns. In the end the model is the last one, or
    the one whose column `best_by` was the lowest. resume goes on from out/model.pt, if config, plain values that are
    saved, is the same. ValueError if the loss is no longer finite, or if another run writes to the same out. However a
    run ends, the last checkpoint stays whole.
    """
    device, (rank, world) = next(model.parameters()).device, process_rank()
    run = Run(model, make_optimizers(model, optimizer, lr, betas, weight_decay), best_by, out)
    if resume:
        run.resume(config, device)
    network = torch.compile(model) if compile else model
    if world > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        network = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    model.train()
    while run.step < steps:
        torch.manual_seed(step_seed(seed, run.step, rank))  # dropout, too, depends on the step alone
        tokens, mask, coords = (tensor.to(device, non_blocking=True) for tensor in batch(run.step))
        look = None
        if count := round(on_policy * len(tokens)):
            tokens, mask = run.go_on(count, tokens, mask, coords)
            look = functools.partial(run.visit, policy, coords, len(tokens))
        inputs, counted = tokens.masked_fill(mask, model.mask_id), torch.ones_like(mask) if every_position else mask
        targets = tokens if soft_targets is None else soft_targets.to(device)[tokens]
        with precision_context(device, precision):
            loss = backward(network, inputs, targets, counted, coords, accumulate, look)
        if look and world > 1:  # each process has seen its rows
            torch.distributed.all_reduce(run.visited[1].view(torch.uint8), torch.distributed.ReduceOp.MIN)
        run.update(loss, clip, lr * learning_rate_factor(run.step, steps, warmup, decay), precision)
        if rank == 0:
            last = run.step == steps
            if out:  # at the first step, since it may be impossible, and whenever somebody has removed it
                run.path.parent.mkdir(parents=True, exist_ok=True)
            run.print_progress(steps)
            if last or run.step % log_steps == 0:
                run.log(validate)
            if last or run.step % (checkpoint_steps or math.inf) == 0 or time.monotonic() - run.saved > 120:
                run.save(tokenizer, config)
    if world > 1:
        time.sleep(0.5)  # destroying the group holds the interpreter's lock, which Gloo's threads need once more
        del network
        torch.distributed.destroy_process_group()
    model.load_state_dict((run.best or model).state_dict())
    model.eval()
    return run.history


def backward(network, inputs, targets, counted, coords, accumulate, look=None):
    """Accumulate the gradient of the loss averaged over the counted tokens of the whole batch; returns that loss.
    Each process works through every world-th row, in `accumulate` parts. All divide by the count of the whole batch,
    so the parts add up to its mean however the hidden tokens are spread over them. Each is shown to look(rows, logits).
    """
    rank, world = process_rank()
    if len(inputs) < world * accumulate:
        raise ValueError(f"a batch of {len(inputs)} cannot be split over {world} processes x {accumulate} parts")
    count, total = counted.sum(), torch.zeros((), device=inputs.device)
    for i, rows in enumerate(torch.arange(rank, len(inputs), world, device=inputs.device).tensor_split(accumulate)):
        # Processes exchange gradients once, after the last part.
        with contextlib.nullcontext() if world == 1 or i == accumulate - 1 else network.no_sync():
            logits = network(inputs[rows], coords if coords.ndim == 2 else coords[rows]).float()
            loss = masked_cross_entropy(logits, targets[rows], counted[rows], count=count)
            (loss * world).backward()  # DistributedDataParallel averages over the processes
        total += loss.detach()
        if look:
            look(rows, logits.detach())
    if world > 1:
        torch.distributed.all_reduce(total)
    return total


class Run:
    """The state of a training: all that a resumed one needs to go on to the very same weights."""

    def __init__(self, model, optimizers, best_by, out):
        self.model, self.optimizers, self.best_by, self.path = model, optimizers, best_by, out and Path(out, "model.pt")
        self.best = None  # the model whose column `best_by` was the lowest
        self.step, self.seconds, self.history, self.loss_sum = 0, 0.0, [], 0.0  # the sum: since the last row of history
        self.visited = None  # tokens and mask of the on-policy rows
        self.started = self.printed = self.saved = time.monotonic()
        self.last_known = self.written()

    def go_on(self, count, tokens, mask, coords):
        """The batch, the last `count` rows being those on-policy rows that are not finished, or its own."""
        visited = [part[-count:].clone() for part in (tokens, mask)]
        if coords.ndim == 3 or (self.visited and self.visited[1].shape != visited[1].shape):
            raise ValueError("on-policy rows come back in the next batch: all need one shape and the same coordinates")
        if self.visited:
            unfinished = self.visited[1].any(dim=1, keepdim=True)
            visited = [torch.where(unfinished, *parts) for parts in zip(self.visited, visited, strict=True)]
        self.visited = visited
        return (torch.cat([new[:-count], old]) for new, old in zip((tokens, mask), visited, strict=True))

    def visit(self, policy, coords, batch_size, rows, logits):
        """Uncover what the policy commits next by these logits, in the on-policy ones of the batch's rows."""
        mask = self.visited[1]
        rows = rows - (batch_size - len(mask))
        rows, logits = rows[rows >= 0], logits[rows >= 0]
        image, place = mask[rows].nonzero(as_tuple=True)
        log_probs, left = logits[image, place].log_softmax(dim=-1), mask[rows].sum(dim=1) - 1
        at = coords.expand(len(rows), -1, -1)
        mask[rows[image], place] = ~policy(Step(log_probs, None, image, place, at, left, 1, 1, None, {}))

    def update(self, loss, clip, lr, precision):
        """Step with the gradients at hand."""
        self.gradient_norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            with WithoutBf16() if precision == "float32" else contextlib.nullcontext():
                optimizer.step()
            optimizer.zero_grad()
        self.step, self.loss_sum, self.lr = self.step + 1, self.loss_sum + loss, lr
        self.seconds = time.monotonic() - self.started

    def mean_loss(self):
        return float(self.loss_sum) / (self.step - (self.history[-1]["step"] if self.history else 0))

    def require_finite(self):
        weights = all(bool(p.isfinite().all()) for p in self.model.parameters())
        if not (weights and math.isfinite(float(self.loss_sum) + float(self.gradient_norm))):
            raise ValueError(f"loss or weights are no longer finite at step {self.step}; try a lower learning rate")

    def print_progress(self, steps):
        """On a terminal the line rewrites itself every second; elsewhere there is a new one every 10 seconds."""
        now, terminal, last = time.monotonic(), sys.stderr.isatty(), self.step == steps
        if last or now - self.printed > (1 if terminal else 10):
            self.printed = now
            minutes, seconds = divmod(round((steps - self.step) * self.seconds / self.step), 60)
            line = f"step {self.step}/{steps}  loss {self.mean_loss():.4f}  {self.step / self.seconds:.1f} steps/s  "
            end = "\r" if terminal and not last else "\n"
            print(f"{line}{minutes}:{seconds:02d} left   ", end=end, file=sys.stderr, flush=True)

    def log(self, validate):
        """Add a row to history, with the figures of the validated model, and write log.csv."""
        self.require_finite()
        row = dict(step=self.step, loss=self.mean_loss(), seconds=round(self.seconds, 2), lr=self.lr)
        row |= dict(gradient_norm=float(self.gradient_norm))
        if validate:
            with torch.no_grad():
                row |= validate(self.model.eval())
            self.model.train()
        self.history.append(row)
        self.loss_sum = 0.0
        if self.best_by and row[self.best_by] <= min(past[self.best_by] for past in self.history):
            self.best = copy.deepcopy(self.model)
        if self.path:
            lines = [",".join(row), *(",".join(map(str, past.values())) for past in self.history)]
            self.path.with_name("log.csv").write_text("\n".join(lines) + "\n")

    def written(self):
        """When the checkpoint was written, in seconds; -inf if there is none."""
        return self.path.stat().st_mtime if self.path and self.path.exists() else -math.inf

    def save(self, tokenizer, config):
        self.require_finite()
        progress = {name: getattr(self, name) for name in ("step", "seconds", "loss_sum", "history", "visited")}
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        training = dict(progress=progress, model=self.model.state_dict(), optimizers=optimizers)
        if self.path:
            if self.written() > self.last_known + 2:  # not all file systems are exact to the second
                raise ValueError(f"another run has written {self.path}; --out renames")
            belongings = dict(tokenizer=tokenizer, config=config, step=self.step, training=training)
            save_checkpoint(self.path, self.best or self.model, **belongings)
        self.last_known, self.saved = self.written(), time.monotonic()

    def resume(self, config, device):
        """Go on where the run that wrote the checkpoint stopped; ValueError if that had another config."""
        checkpoint = load_checkpoint(self.path, device)
        before, now, saved = checkpoint["config"] or {}, config or {}, checkpoint["training"]
        for name in sorted(before.keys() | now.keys()):
            if (was := before.get(name)) != now.get(name):
                raise ValueError(f"{self.path} was trained with {name}={was}, not {now.get(name)}; resume as it was")
        try:
            vars(self).update(saved["progress"])
            self.best = checkpoint["model"] if self.best_by and self.history else None
            states = [saved["model"], *saved["optimizers"]]
            for part, state in zip([self.model, *self.optimizers], states, strict=True):
                part.load_state_dict(state)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path} holds no training that fits this run: {error}".splitlines()[0]) from None
        self.started -= self.seconds


def make_optimizers(model, optimizer, lr, betas, weight_decay):
    """[AdamW], or for "muon" [AdamW, Muon] with the matrices of the blocks on Muon (torch.optim), which makes each
    update orthogonal, scaled to AdamW's size so that both share lr. Only those matrices decay."""
    require_choice("optimizer", optimizer, ("adamw", "muon"))
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    taken = {id(p) for p in matrices}
    groups = [dict(params=[p for p in model.parameters() if id(p) not in taken], weight_decay=0.0)]
    if optimizer == "adamw":
        groups.append(dict(params=matrices, weight_decay=weight_decay))
    optimizers = [torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)]
    if optimizer == "muon":
        optimizers.append(torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


class WithoutBf16(TorchFunctionMode):
    """Tensor.bfloat16() only copies. torch.optim's Muon multiplies in bf16 whatever the precision of the training, and
    a processor without it is slow at that."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return args[0].clone() if function is torch.Tensor.bfloat16 else function(*args, **(kwargs or {}))


def learning_rate_factor(step, steps, warmup, decay):
    """What the learning rate is multiplied by at `step` of `steps`: a linear rise over `warmup` steps, then
    "constant", or "linear" down to 0."""
    done = max(0, step - warmup) / max(1, steps - warmup)
    fall = {"constant": 1.0, "linear": 1 - done}
    require_choice("decay", decay, fall)
    return min(1.0, (step + 1) / (warmup + 1)) * fall[decay]


def step_seed(seed, step, rank=0):
    """A seed of its own for each step and process of a run."""
    return ((seed * 1_000_003 + step) * 1_009 + rank) % 2**63


def precision_context(device, precision):
    """Run what is inside in "float32", or in "bf16" by autocast; weights and loss stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def process_rank():
    """(rank, number of processes) as torchrun says; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def save_checkpoint(path, model, *, tokenizer=None, config=None, step=0, training=None):
    """Write model.pt whole or not at all: to a temporary file beside it, which then takes its name."""
    path, partial = Path(path), Path(f"{path}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = dict(architecture=model.config, weights=model.state_dict(), config=config, step=step, training=training)
    if tokenizer:
        centroids = torch.from_numpy(tokenizer.centroids)
        contents["tokenizer"] = dict(centroids=centroids, patch=tokenizer.patch, stride=tokenizer.stride)
    try:
        with open(partial, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_tensors(path, device):
    """What torch.save has written, without running code in it; an error if a checksum is wrong."""
    with zipfile.ZipFile(path) as archive:
        if broken := archive.testzip():  # torch.load does not compare them
            raise ValueError(f"{broken} has another checksum")
    return torch.load(path, map_location=device, weights_only=True)


def load_checkpoint(path, device="cpu"):
    """What save_checkpoint wrote, as a dict: model (MaskGIT on `device`, in eval mode), tokenizer (PatchTokenizer, or
    None where the tokens are the pixels), config, step, and training, which train(resume=True) goes on from.
    ValueError if there is no such file, or it is damaged or something else."""
    if not Path(path).is_file():
        raise ValueError(f"there is no checkpoint {path}")
    try:
        saved = read_tensors(path, device)
        model = MaskGIT(**saved["architecture"]).to(device).eval()
        model.load_state_dict(saved["weights"])
        tokenizer = saved.get("tokenizer")
        if tokenizer:
            tokenizer = PatchTokenizer(tokenizer["centroids"].cpu().numpy(), tokenizer["patch"], tokenizer["stride"])
        rest = {name: saved[name] for name in ("config", "step", "training")}
    except Exception as error:  # torch.load raises half a dozen types on damaged files
        raise ValueError(f"{path} is damaged or no checkpoint: {error}".splitlines()[0]) from None
    return dict(model=model, tokenizer=tokenizer, **rest)


# ---------------------------------------------------------------------------------------------------
# For the scripts
#
# Command line, records and pictures: a copy of this file may end here.


class CommandLine(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line on stderr, with exit code 2."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.set_defaults(record=run_record())  # at once: the code may change while it runs

    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")

    def add_shared_options(self, out):
        """What all scripts have; each sets the defaults of its model and training."""
        add, count = self.add_argument_group("run, model and training").add_argument, at_least(1)
        share = at_least(0.0, float, below=1.0)
        add("--out", type=Path, default=Path(out), help="folder of the run, default %(default)s")
        add("--json", type=Path, help="write the figures to this file as well")
        add("--resume", action="store_true", help="go on with the run in --out")
        add("--force", action="store_true", help="start over in a folder that holds a run")
        add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        add("--seed", type=at_least(0), default=0)
        for flag in ("--dim", "--heads", "--layers", "--steps"):
            add(flag, type=count)
        add("--hidden", type=count, help="width of the MLPs, default 4 x dim")
        add("--batch-size", type=count, help="of all processes together")
        add("--mask", help="single, a schedule, a share, box, half, or several of them, as 0.2+cosine")
        add("--on-policy", type=share, default=0.0, help="share of a batch's rows that follow decode, step by step")
        add("--accumulate", type=count, default=1, help="parts in which a batch is worked through")
        add("--checkpoint-steps", type=count, help="write model.pt so often, besides every two minutes")
        add("--lr", type=at_least(0.0, float))
        add("--warmup", type=at_least(0), default=100)
        add("--dropout", type=share, default=0.0)
        add("--optimizer", choices=("adamw", "muon"), default="muon")
        add("--precision", choices=("auto", "float32", "bf16"), default="auto")
        add("--head", choices=("tied", "cosine", "linear"), default="linear")
        add("--rotary", action=argparse.BooleanOptionalAction, default=True, help="attention sees relative positions")
        add("--compile", action="store_true", help="torch.compile")
        self.set_defaults(norm="pre", positions="split", learn_temperature=False)
        self.set_defaults(decay="linear", clip=1.0, weight_decay=0.0)


def at_least(low, kind=int, below=None):
    """An argparse type: a number that is not below `low`, and below a limit if there is one."""

    def number(text):
        if not kind(text) >= low or (below is not None and kind(text) >= below):
            raise argparse.ArgumentTypeError(f"{text} is below {low}" + (f", or not below {below}" if below else ""))
        return kind(text)

    return number


def run_as_script(main):
    """Call main(). Bad input (ValueError, OSError) ends in one line on stderr and exit code 2, Ctrl-C in 130. Of
    several processes the first alone writes to the screen."""
    keep_freed_memory()
    if process_rank()[0] > 0:
        sys.stdout = None  # print() then does nothing
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def keep_freed_memory():
    """Let the C library (glibc) keep what is freed: a training step on a CPU soon needs as much again, and pages that
    the system hands out anew are cleared first."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own, which would end with it
        library.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the end of the heap back


def pick_device(name="auto"):
    """The torch.device for "auto" (CUDA where there is one, else CPU), "cpu", "cuda" or "cuda:N"."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises all three
        raise ValueError(f"device {name!r} cannot be used: {error}".splitlines()[0]) from None


def fast_precision(device):
    """ "bf16" where the processor multiplies it natively (CUDA since Ampere, AVX512-BF16), else "float32"."""
    cuda = device.type == "cuda"
    native = torch.cuda.get_device_capability(device) >= (8, 0) if cuda else torch.cpu._is_avx512_bf16_supported()
    return "bf16" if native else "float32"


def seed_everything(seed):
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def open_run(settings):
    """The device of a script's run; ValueError if its folder holds a run that it would overwrite."""
    device = pick_device(settings.device)
    training_mask((99, 1), settings.mask, coords=torch.zeros(1, 2))  # complains if there is no such kind
    settings.precision = fast_precision(device) if settings.precision == "auto" else settings.precision
    if (settings.out / "model.pt").exists() and not (settings.resume or settings.force):
        holds = f"{settings.out} holds a run already"
        raise ValueError(f"{holds}: --resume goes on with it, --force starts over, --out renames")
    return device


def train_as_set(settings, codes, batch, device, *, may_change=(), **options):
    """A new MaskGIT, trained by the settings that have the names of arguments, and the rows of its log. options go to
    train(); all settings but may_change and these few must be the same in a resumed run."""
    may_change = {"out", "json", "resume", "force", "device", "compile", "checkpoint_steps", "record", *may_change}
    config = {name: value for name, value in vars(settings).items() if name not in may_change}
    options = dict(config=config, log_steps=max(1, settings.steps // 20)) | options
    for_model, for_training = (
        {n: v for n, v in vars(settings).items() if n in inspect.signature(f).parameters} for f in (MaskGIT, train)
    )
    seed_everything(settings.seed)
    model = MaskGIT(**for_model | {"codes": codes}).to(device)
    return model, train(model, batch, **for_training | options)


def run_record():
    """Where a number comes from: command, commit, machine, versions and date, as plain values."""
    here, script, info = Path(__file__).resolve().parent, Path(sys.argv[0]), Path("/proc/cpuinfo")
    failed, commit = subprocess.getstatusoutput(f"git -C {shlex.quote(str(here))} rev-parse --short HEAD")
    cpu = re.search("model name.*: (.*)", info.read_text() if info.exists() else "")
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return {
        "command": shlex.join(["python", script.name if script.is_absolute() else str(script), *sys.argv[1:]]),
        "commit": "unknown" if failed else commit,
        "machine": f"{cpu[1] if cpu else platform.processor()}, {os.cpu_count()} cores, {platform.system()}{gpu}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}",
        "date": time.strftime("%Y-%m-%d"),
    }


def write_figures(settings, figures, *paths):
    """The figures, the settings and where they come from, as JSON to each of the paths that is not None."""
    plain = {k: str(v) if isinstance(v, Path) or v == math.inf else v for k, v in vars(settings).items()}
    text = json.dumps({**plain.pop("record"), "settings": plain, **figures}, indent=1) + "\n"
    for path in filter(None, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def print_table(head, rows):
    """Text in columns: the first one to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for first, *others in [head, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))
    print()


INK, FAINT, FRAME = (40, 40, 40), (225, 225, 225), (170, 190, 215)
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
COLOURS += ["#000000", "#999933", "#882255", "#44aa99", "#aa4499", "#888888", "#661100"]


def image_grid(images, columns, *, scale=1, gap=4, titles=()):
    """Images (B, H, W, C), float in [0, 1], C 1 or 3, in rows of `columns` with titles above them, each pixel `scale`
    wide: a PIL image."""
    pixels = (np.asarray(images).clip(0, 1) * 255).round().astype(np.uint8).repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = pixels.shape
    rows, top = math.ceil(count / columns), 22 if titles else 0
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap + top), FRAME)
    for i, image in enumerate(pixels.repeat(3 // channels, axis=-1)):
        corner = gap + i % columns * (width + gap), gap + top + i // columns * (height + gap)
        sheet.paste(Image.fromarray(image), corner)
    for i, title in enumerate(titles):
        centre = gap + i * (width + gap) + width / 2, gap + 8
        ImageDraw.Draw(sheet).text(centre, title, fill=INK, font=ImageFont.load_default(14), anchor="mm")
    return sheet


def save_gif(path, frames, seconds_per_frame=0.4, pause=2.0):
    """PIL images as an endlessly repeated GIF that rests on the last one for `pause` seconds."""
    durations = [1000 * seconds_per_frame] * (len(frames) - 1) + [1000 * pause]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def line_plot(curves, *, title, x_label, y_label, references=None, log_x=False, log_y=False):
    """A line chart of curves {label: (x values, y values)} and thin levels, references {label: y}, such as a limit, as
    a PIL image with its legend to the right. What is not finite, or not positive on a log axis, is left out."""
    font, lines = ImageFont.load_default(26), {}
    levels = {label: y for label, y in (references or {}).items() if y > 0 or not log_y}
    for label, curve in curves.items():
        points = [(float(x), float(y)) for x, y in zip(*curve, strict=True) if math.isfinite(x + y)]
        lines[label] = [(x, y) for x, y in points if (x > 0 or not log_x) and (y > 0 or not log_y)]
    lines = {label: line for label, line in lines.items() if line}
    points = sum(lines.values(), [])
    if not points:
        raise ValueError(f"nothing to plot in {title!r}")
    left, top, bottom = 160, 120, 960  # drawn at twice the size: smooth lines
    right = min(1300, 1680 - max(map(font.getlength, [*lines, *levels])))
    x_at, x_ticks = axis([x for x, _ in points], left, right, log_x)
    y_at, y_ticks = axis([*(y for _, y in points), *levels.values()], bottom - 24, top, log_y)
    sheet = Image.new("RGB", (1800, 1100), "white")
    draw = ImageDraw.Draw(sheet)
    for tick in x_ticks:
        draw.line([(x_at(tick), bottom), (x_at(tick), top)], fill=FAINT, width=2)
        draw.text((x_at(tick), bottom + 14), f"{tick:g}", fill=INK, font=font, anchor="mt")
    for tick in y_ticks:
        draw.line([(left, y_at(tick)), (right, y_at(tick))], fill=FAINT, width=2)
        draw.text((left - 14, y_at(tick)), f"{tick:g}", fill=INK, font=font, anchor="rm")
    draw.line([(left, top), (left, bottom), (right, bottom)], fill=INK, width=3)
    draw.text((left, 36), title, fill=INK, font=ImageFont.load_default(34), anchor="lm")
    draw.text((left, 90), y_label, fill=INK, font=font, anchor="lm")
    draw.text((right, bottom + 70), x_label, fill=INK, font=font, anchor="rm")
    paths = {label: [(x_at(x), y_at(y)) for x, y in line] for label, line in lines.items()}
    paths |= {label: [(left, y_at(y)), (right, y_at(y))] for label, y in levels.items()}
    for i, (label, path) in enumerate(paths.items()):
        colour, width, legend = COLOURS[i % len(COLOURS)], 3 if label in levels else 5, top + 20 + 44 * i
        draw.line(path, fill=colour, width=width, joint="curve")
        draw.line([(right + 30, legend), (right + 90, legend)], fill=colour, width=width)
        draw.text((right + 104, legend), label, fill=INK, font=font, anchor="lm")
    return sheet.resize((900, 550), Image.Resampling.LANCZOS)


def axis(values, start, end, log):
    """Where a value lies between the pixels `start` and `end`, and some round values: about one to three a decade on a
    log axis, or else three to six."""
    low, high = min(values), max(values)
    if low == high:  # a range of some width, whatever there is to show
        low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
    scale = math.log10 if log else float
    if log and high > 10 * low:
        factors = (1, 2, 5) if high < 1000 * low else (1,)
        ticks = [10.0**power * factor for power in range(-12, 13) for factor in factors]
    else:
        step = 10.0 ** math.floor(math.log10((high - low) / 3))
        step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
        ticks = [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]

    def position(value):
        return start + (scale(value) - scale(low)) / (scale(high) - scale(low)) * (end - start)

    return position, [tick for tick in ticks if low <= tick <= high]
