"""MaskGIT in one file: fill in the hidden part of an image with a bidirectional transformer.

An image is a set of discrete tokens at known coordinates. Some of them are hidden. The transformer
sees all the others at once and gives, for each hidden one, a distribution over the codes; `decode`
commits a few hidden tokens per step until none is left. Read from top to bottom:

    Tokens        kmeans, PatchTokenizer
    Positions     grid_coords, position_encoding, rotary_angles
    Transformer   Attention, Block, MaskGIT
    Masking       SCHEDULES, random_mask, training_mask, masked_cross_entropy
    Decoding      decode
    Running       pick_device, seed_everything, train, save_checkpoint, load_checkpoint
    Pictures      image_grid, line_plot, save_gif

Shapes: B images, T tokens, K codes, D model width. Tokens are int64, masks are bool with True =
hidden, coordinates are (x, y). Sources: "paper" is Chang et al., MaskGIT, CVPR 2022; S1 and S2 are the
two blog posts on squares and rectangles; R1 and R2 the two course reports on photographs.
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import json
import math
import os
import platform
import random
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ---------------------------------------------------------------------------------------------------
# Tokens


class KMeansResult(NamedTuple):
    centroids: np.ndarray  # (k, D) float32
    labels: np.ndarray  # (N,) int64: the nearest centroid of each point
    inertia: float  # sum of the squared distances to it
    iterations: int


def kmeans(points, k, *, seed=0, restarts=1, max_iter=100, tol=1e-4, init=None):
    """Cluster points (N, D) around k centroids: Lloyd's iterations from a k-means++ start.

    A run ends after max_iter iterations, or once the centroids' summed squared shift is at most `tol` times the
    mean variance of the dimensions. The best of `restarts` runs is returned; init (k, D) replaces the random start.
    A seed repeats its result, as long as the number of threads, by which sums are rounded, is the same.
    Raises ValueError on points that are not finite, and on fewer than k distinct ones.
    """
    points = np.ascontiguousarray(points, dtype=np.float32)
    if points.ndim != 2 or not np.isfinite(points).all():
        raise ValueError(f"kmeans needs points of shape (N, D), all of them finite; these have shape {points.shape}")
    if k < 1 or restarts < 1 or max_iter < 1:
        raise ValueError(f"kmeans needs k, restarts and max_iter of at least 1, not {k}, {restarts}, {max_iter}")
    require_distinct(points, k)
    if init is not None and np.shape(init) != (k, points.shape[1]):
        raise ValueError(f"init has shape {np.shape(init)}; {k} centroids of these points are {(k, points.shape[1])}")
    rng = np.random.default_rng(seed)
    runs = []
    for _ in range(restarts if init is None else 1):
        start = plus_plus(points, k, rng) if init is None else np.array(init, dtype=np.float32)
        runs.append(lloyd(points, start, max_iter, tol))
    return min(runs, key=lambda run: run.inertia)


def require_distinct(points, k):
    """ValueError unless k points differ; looks at no more of them than it takes."""
    looked_at, distinct = 0, 0
    while distinct < k and looked_at < len(points):
        looked_at = min(len(points), max(2 * k, 2 * looked_at))
        distinct = len(np.unique(points[:looked_at], axis=0))
    if distinct < k:
        raise ValueError(f"{k} clusters asked for, but only {distinct} of the {len(points)} points are distinct")


def plus_plus(points, k, rng):
    """k of the points, each drawn with a probability proportional to its squared distance from those before it
    (Arthur and Vassilvitskii 2007)."""
    norms = np.einsum("nd,nd->n", points, points)
    chosen = [rng.integers(len(points))]
    closest = np.full(len(points), np.inf, dtype=np.float32)
    while len(chosen) < k:
        newest = points[chosen[-1]]
        distances = norms - 2 * (points @ newest) + norms[chosen[-1]]
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
    """Of each point (N, D) to the centroid that its label names: (N,) float64."""
    squares = np.zeros(len(points))
    for column, values in zip(points.T, centroids.T, strict=True):
        squares += np.square(column - values[labels], dtype=np.float64)
    return squares


class PatchTokenizer:
    """Square patches of images, each named by the nearest of a set of typical patches.

    centroids (codes, patch * patch * C) are those typical patches, flattened row by row; patches lie `stride` pixels
    apart, the default being `patch`, and overlap where it is less. The images' sides must be patch + a multiple of
    stride: S2's 16x16 with patch 4 and stride 1 gives 13x13 tokens, R1's and R2's 64x64 with patch 4 gives 16x16.
    """

    def __init__(self, centroids, patch, stride=None):
        self.centroids = np.ascontiguousarray(centroids, dtype=np.float32)
        self.patch = patch
        self.stride = stride or patch
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
        for y in range(self.patch):
            for x in range(self.patch):
                rows = slice(y, y + (h - 1) * self.stride + 1, self.stride)
                columns = slice(x, x + (w - 1) * self.stride + 1, self.stride)
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
    """Sinusoids of real (x, y) coordinates: (..., 2) -> (..., dim), float32.

    The first half of the dimensions encodes x, the second half y; even dimensions are sines, odd
    ones cosines.

    layout="split": each axis gets the full range of frequencies, 1 to 1/10000 rad per unit, as if
        it had an encoding of `dim / 2` dimensions to itself. `dim` must be divisible by 4.
    layout="printed": S1's formula as typed. The frequency of dimension i is 10000^(-i / dim) on
        both axes, so y only has those below 0.01 rad per unit: its rows look nearly alike.
    """
    if dim % 4:
        raise ValueError(f"position_encoding needs a dim divisible by 4, not {dim}")
    index = torch.arange(dim, device=coords.device)  # made where it is used: a GPU would wait for a copy
    if layout == "split":
        exponent = index % (dim // 2) // 2 * 2 / (dim / 2)
    elif layout == "printed":
        exponent = index / dim
    else:
        raise ValueError(f"unknown position layout {layout!r}; choose split or printed")
    frequency = 10000.0**-exponent  # (dim,)
    values = coords.float().repeat_interleave(dim // 2, dim=-1)  # (..., dim): x ... x, y ... y
    angles = values * frequency
    return torch.where(index % 2 == 0, angles.sin(), angles.cos())


def rotary_angles(coords, dim):
    """The angles by which attention turns the dim / 2 pairs of numbers of a head: (..., 2) -> (..., dim / 2).

    A query and a key turned by the angles of their positions have a product that depends on the difference of the
    positions alone (Su et al., RoFormer, 2021). Half of the pairs follow x, the others y, at frequencies from pi, which
    turns neighbouring cells against each other, to pi / 100 rad per unit. `dim` must be divisible by 4.
    """
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
    """Multi-head self-attention without a causal mask: (B, T, D) -> (B, T, D).

    angles (1 or B, 1, T, D / heads / 2) make it rotary, see rotary_angles.
    """

    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not divisible by {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x, angles=None):
        b, t, d = x.shape
        qkv = self.qkv(x).view(b, t, 3, self.heads, d // self.heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, heads, T, D / heads)
        query, key = qkv[:2] if angles is None else turn(qkv[:2], angles)
        value = qkv[2]
        # On a CPU the fused kernel is slow to differentiate in bf16.
        plain = query.is_cpu and query.requires_grad and query.dtype == torch.bfloat16
        x = plain_attention(query, key, value) if plain else F.scaled_dot_product_attention(query, key, value)
        return self.out(x.transpose(1, 2).reshape(b, t, d))


def plain_attention(query, key, value):
    """scaled_dot_product_attention by its definition: (B, heads, T, d) each -> (B, heads, T, d)."""
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)  # (B, heads, T, T)
    return scores.softmax(dim=-1) @ value


class Block(nn.Module):
    """One transformer layer: (B, T, D) -> (B, T, D).

    norm="post" is S1's: x = LN1(x + drop(MHA(x))), x = LN2(x + MLP(x)).
    norm="pre" normalises what enters each branch, so the sum of the branches stays untouched.
    """

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
    """The bidirectional transformer: tokens (B, T) at coords (T, 2) or (B, T, 2) -> logits (B, T, codes).

    Tokens are 0 .. codes-1, or `mask_id` (== codes) where hidden; [MASK] never gets a logit.

    norm      "pre" or "post", see Block.
    head      what turns the last state, after a small MLP, into logits (E is the embedding table):
              "tied"    dot product with each code's row of E, plus a bias per code (paper);
              "cosine"  cosine similarity with each code's row of E (S1). At most 1, so with K codes
                        the cross-entropy cannot fall below log(1 + (K-1) e^-2);
              "linear"  a linear layer (S1's alternative, "predict the one-hot code").
    learn_temperature  cosine head only: multiply the similarities by a learned scale, which lifts
              that floor.
    positions the layout of position_encoding.
    rotary    attention also sees the differences of the coordinates, see rotary_angles.
    """

    def __init__(
        self,
        codes,
        dim,
        heads,
        layers,
        hidden=None,
        dropout=0.1,
        norm="pre",
        head="tied",
        positions="split",
        rotary=False,
        learn_temperature=False,
    ):
        super().__init__()
        hidden = hidden or 4 * dim
        for name, value, choices in (
            ("norm", norm, ("pre", "post")),
            ("head", head, ("tied", "cosine", "linear")),
        ):
            if value not in choices:
                raise ValueError(f"unknown {name} {value!r}; choose {' or '.join(choices)}")
        if learn_temperature and head != "cosine":
            raise ValueError(f"learn_temperature belongs to the cosine head, not to {head!r}")
        self.config = dict(codes=codes, dim=dim, heads=heads, layers=layers, hidden=hidden, dropout=dropout)
        self.config |= dict(norm=norm, head=head, positions=positions, rotary=rotary)
        self.config |= dict(learn_temperature=learn_temperature)
        self.mask_id = codes
        self.head = head
        self.positions = positions

        self.embedding = nn.Embedding(codes + 1, dim)
        # Rows of length about 1 keep the tied head's first logits small; forward() scales them up again to
        # the size of the position encoding (Vaswani et al. 2017, 3.4).
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.blocks = nn.ModuleList(Block(dim, heads, hidden, dropout, norm) for _ in range(layers))
        self.last_norm = nn.LayerNorm(dim) if norm == "pre" else nn.Identity()
        self.to_logits = nn.Sequential(
            nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, codes if head == "linear" else dim)
        )
        if head == "tied":
            self.bias = nn.Parameter(torch.zeros(codes))
        if learn_temperature:
            self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, tokens, coords):
        dim = self.embedding.embedding_dim
        x = self.embedding(tokens) * math.sqrt(dim) + position_encoding(coords, dim, self.positions)  # (B, T, D)
        angles = None
        if self.config["rotary"]:
            angles = rotary_angles(coords, dim // self.config["heads"])  # (T, d / 2) or (B, T, d / 2)
            angles = angles[:, None] if angles.ndim == 3 else angles[None, None]
        for block in self.blocks:
            x = block(x, angles)
        x = self.to_logits(self.last_norm(x))
        if self.head == "linear":
            return x
        codebook = self.embedding.weight[: self.mask_id]  # (K, D)
        if self.head == "tied":
            return F.linear(x, codebook, self.bias)
        similarity = F.linear(F.normalize(x, dim=-1), F.normalize(codebook, dim=-1))
        return similarity * self.log_scale.exp() if self.config["learn_temperature"] else similarity


# ---------------------------------------------------------------------------------------------------
# Masking

# gamma(r): the share of tokens that is hidden once the share r of the steps is done; gamma(0) = 1,
# gamma(1) = 0. Takes and returns floats or numpy arrays. The paper compares cosine, linear, square, sqrt,
# cubic and exp; R1 and R2 use the first three.
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


def schedule_function(name):
    """SCHEDULES[name], or a ValueError that lists the names."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; choose from {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


def random_mask(shape, ratio, generator=None):
    """Hide exactly ceil(ratio * T) tokens of each row, at least 1: bool (B, T).

    shape is (B, T); ratio is a float, or one per row, in [0, 1].
    """
    rows, tokens = shape
    ratio = torch.as_tensor(ratio, dtype=torch.float64).expand(rows)
    if not bool(((ratio >= 0) & (ratio <= 1)).all()):
        raise ValueError("the share of hidden tokens must lie between 0 and 1")
    count = (ratio * tokens).ceil().clamp(min=1)
    device = generator.device if generator is not None else "cpu"
    rank = torch.rand(rows, tokens, generator=generator, device=device).argsort(dim=1).argsort(dim=1)
    return rank < count[:, None].to(device)


def training_mask(shape, kind, generator=None):
    """Random hidden tokens of a kind: bool (B, T).

    kind is a name of SCHEDULES, to hide gamma(r) of each row with r uniform (paper); a fraction such as "0.2"
    or "single" for one token (S2); or several kinds that share the rows, such as "0.2+cosine".
    """
    kinds = kind.split("+")
    parts = torch.arange(shape[0]).tensor_split(len(kinds))
    return torch.cat([mask_of_kind((len(rows), shape[1]), k, generator) for rows, k in zip(parts, kinds, strict=True)])


def mask_of_kind(shape, kind, generator):
    if kind in SCHEDULES:
        # One r from each B-th of [0, 1): the mean loss of a batch then depends less on luck.
        r = (torch.arange(shape[0]) + torch.rand(shape[0], generator=generator)) / shape[0]
        gamma = SCHEDULES[kind](r.numpy()).clip(0, 1)  # rounded to 1, r has a cosine of -4e-8
        return random_mask(shape, gamma, generator)
    try:
        share = 0.0 if kind == "single" else float(kind)
    except ValueError:
        raise ValueError(f"{kind!r} is no mask: choose single, a fraction, or {', '.join(SCHEDULES)}") from None
    return random_mask(shape, share, generator)


def masked_cross_entropy(logits, targets, mask, label_smoothing=0.0, *, every_position=False, count=None):
    """Cross-entropy in nats, averaged over the hidden tokens: a scalar.

    logits (B, T, K), mask (B, T); targets are codes (B, T), or a distribution for each token (B, T, K).
    every_position=True averages over all tokens, as R1 and R2 do (paper: hidden ones only). count replaces the number
    of tokens to divide by, so that the parts of a larger batch add up to its mean.
    """
    targets = targets.transpose(1, 2) if targets.ndim == 3 else targets
    loss = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", label_smoothing=label_smoothing)
    if every_position:
        mask = torch.ones_like(mask)
    count = mask.sum() if count is None else count
    return (loss * mask).sum() / count


# ---------------------------------------------------------------------------------------------------
# Decoding


@torch.no_grad()
def decode(
    model,
    tokens,
    mask,
    coords,
    *,
    steps=20,
    schedule="cosine",
    order="entropy",
    sample="categorical",
    temperature=1.0,
    choice_temperature=4.5,
    confidence="probability",
    certain=0.05,
    stop_after=None,
    evidence=None,
    generator=None,
    trace=None,
):
    """Fill in the hidden tokens, several per step, each step seeing all that is committed so far.

    model       MaskGIT, or any callable (tokens (b, T), coords) -> logits (b, T, K) with a `mask_id`.
    tokens      (B, T) int64; what stands where mask is True is ignored.
    mask        (B, T) bool, True = hidden. All True generates from nothing.
    coords      (T, 2), or (B, T, 2).
    steps       T: the number of network calls, or the most of them for order="entropy".
    schedule    a name of SCHEDULES: how many tokens are still hidden after each step.
    order       which hidden tokens a step commits:
                "entropy"     every token whose entropy is below `certain` nats and, of the rest, the most
                              uncertain; more of the uncertain ones only when the schedule asks for it;
                "confidence"  those whose drawn value is the most probable, plus `choice_temperature` times
                              Gumbel noise that fades with the steps (paper, R1, R2);
                "random"      any;
                "halton"      spread evenly over the image by a Halton sequence.
    sample      how a value is drawn: "categorical" (R2), or "argmax" (R1).
    temperature divides the logits.
    confidence  "probability" (R1, R2), or "log_probability" (the paper's code).
    stop_after  commit all that is left after this many steps (the reports' sweet spot).
    evidence    (B, T, K), added to the logits: the log-likelihood of what else is known of each token.
    generator   a torch.Generator on the tokens' device; the same one gives the same tokens.
    trace       a list; each step appends (tokens, mask) as they stand after it, (B, T) both.

    Returns tokens (B, T). Given tokens come back unchanged, a committed token never changes, and after
    step t image i has min(floor(gamma(t / steps) * N_i), what it had - 1) hidden tokens left, where N_i
    is its own number at the start (with order="entropy" at most that); none after the last step.
    """
    check_decode_arguments(model, tokens, mask, steps, order, sample, temperature, confidence, stop_after)
    tokens, hidden = tokens.masked_fill(mask, model.mask_id), mask.clone()
    last_step = min(steps, stop_after or steps)
    left = hidden.sum(dim=1).cpu().numpy()  # (B,): how many tokens of each image are hidden
    scheduled = most_hidden(left, schedule_function(schedule), steps, last_step)  # (last_step + 1, B)
    most_left = torch.from_numpy(scheduled).to(tokens.device)
    halton = halton_priority(coords.expand(*tokens.shape, 2)) if order == "halton" else None
    undefined = torch.zeros((), dtype=torch.bool, device=tokens.device)

    with evaluation_mode(model):
        for step in range(1, last_step + 1):
            if not left.any():
                break
            # With the sizes known, the device need not be waited for.
            rows = torch.nonzero_static(hidden.any(dim=1), size=np.count_nonzero(left))[:, 0]  # the b unfinished images
            asked = hidden[rows]
            image, place = torch.nonzero_static(asked, size=int(left.sum())).unbind(dim=1)  # of the n hidden tokens
            logits = model(tokens[rows], coords if coords.ndim == 2 else coords[rows])[image, place].float()  # (n, K)
            if evidence is not None:
                logits = logits + evidence[rows[image], place]
            log_probs = (logits / temperature).log_softmax(dim=-1)
            undefined |= log_probs.isnan().any()
            likeliest = log_probs.argmax(dim=-1)
            values = likeliest if sample == "argmax" else draw(log_probs, generator)
            if order == "halton":
                priority = halton[rows[image], place]
            else:
                noise = choice_temperature * (1 - step / steps)
                priority = commit_priority(order, log_probs, values, certain, confidence, noise, generator)
            values = torch.where(priority.isinf(), likeliest, values)

            stays = stay_hidden(asked, priority, most_left[step, rows])
            tokens[rows] = tokens[rows].masked_scatter(asked, values).masked_fill(stays, model.mask_id)
            hidden[rows] = stays
            left = hidden.sum(dim=1).cpu().numpy() if order == "entropy" else scheduled[step]
            if trace is not None:
                trace.append((tokens.clone(), hidden.clone()))
    if undefined:
        raise ValueError("the model's logits are no numbers")
    return tokens


def most_hidden(at_start, gamma, steps, last_step):
    """How many tokens of each image may be hidden at the start (B,) and after each step: int64, (last_step + 1, B)."""
    most = [at_start]
    for step in range(1, last_step + 1):
        scheduled = np.floor(gamma(step / steps) * at_start) if step < last_step else 0
        most.append(np.minimum(scheduled, most[-1] - 1).clip(min=0))
    return np.stack(most).astype(np.int64)


def commit_priority(order, log_probs, values, certain, confidence, noise, generator):
    """(n,): the hidden tokens of highest priority are committed first; all infinite ones at once."""
    if order == "entropy":
        entropy = torch.special.entr(log_probs.exp()).sum(dim=-1)
        return entropy.masked_fill(entropy < certain, math.inf)
    if order == "confidence":
        priority = log_probs.gather(-1, values[..., None])[..., 0]
        priority = priority.exp() if confidence == "probability" else priority
        return priority + noise * gumbel_like(priority, generator)
    return torch.rand(values.shape, generator=generator, device=values.device)


def stay_hidden(hidden, priority, most):
    """Which of the n hidden tokens (b, T) are left: the `most` (b,) ones of lowest priority (n,), or fewer, since
    besides those of infinite priority at least one is committed."""
    priority = torch.full_like(hidden, math.inf, dtype=priority.dtype).masked_scatter(hidden, priority)  # (b, T)
    left = most.minimum(priority.isfinite().sum(dim=1) - 1).clamp(min=0)
    rank = priority.argsort(dim=1, stable=True).argsort(dim=1)
    return rank < left[:, None]


def draw(log_probs, generator):
    """One code per token, drawn from log-probabilities (n, K): (n,)."""
    cumulative = log_probs.exp().cumsum(dim=-1)
    uniform = torch.rand(len(log_probs), 1, generator=generator, device=log_probs.device)
    codes = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
    return codes.clamp(max=log_probs.shape[1] - 1)  # beyond are draws from no numbers


def check_decode_arguments(model, tokens, mask, steps, order, sample, temperature, confidence, stop_after):
    choices = (
        ("order", order, ("confidence", "random", "halton", "entropy")),
        ("sample", sample, ("categorical", "argmax")),
        ("confidence", confidence, ("probability", "log_probability")),
    )
    for name, value, allowed in choices:
        if value not in allowed:
            raise ValueError(f"unknown {name} {value!r}; choose {', '.join(allowed)}")
    if steps < 1 or (stop_after is not None and stop_after < 1):
        raise ValueError("decode needs steps and stop_after of at least 1")
    if temperature <= 0:
        raise ValueError('decode needs a temperature above 0; for the likeliest value use sample="argmax"')
    if tokens.shape != mask.shape or mask.dtype != torch.bool:
        raise ValueError(f"tokens {tuple(tokens.shape)} and mask {tuple(mask.shape)} must agree, the mask as bool")
    if bool((tokens[~mask] >= model.mask_id).any()):
        raise ValueError(f"a given token is {model.mask_id} or more, but the codes are 0 .. {model.mask_id - 1}")


def gumbel_like(x, generator):
    """Standard Gumbel noise of x's shape."""
    return -torch.empty_like(x).exponential_(generator=generator).log()


def halton_priority(coords):
    """Priorities (B, T) that visit the tokens evenly: the k-th point of the Halton sequence (bases 2 and 3,
    stretched over the tokens' bounding box) takes the nearest token not yet taken. coords: (B, T, 2)."""
    low, high = coords.amin(dim=1, keepdim=True), coords.amax(dim=1, keepdim=True)
    b, t, _ = coords.shape
    priority = torch.full((b, t), math.inf, device=coords.device)
    images = torch.arange(b, device=coords.device)
    for k in range(t):
        point = low + (high - low) * coords.new_tensor([radical_inverse(k, 2), radical_inverse(k, 3)])
        distance = (coords - point).square().sum(dim=-1).masked_fill(priority.isfinite(), math.inf)
        priority[images, distance.argmin(dim=1)] = float(-k)
    return priority


def radical_inverse(k, base):
    """The digits of k in `base`, mirrored at the point: 6 = 110 in base 2 gives 0.011 = 0.375."""
    value, unit = 0.0, 1.0
    while k:
        unit /= base
        k, digit = divmod(k, base)
        value += digit * unit
    return value


# ---------------------------------------------------------------------------------------------------
# Running


class CommandLine(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line on stderr, with exit code 2, and the options all scripts share.

    A script adds the groups it needs and gives the defaults of the model and of training by set_defaults.
    """

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")

    def add_run_options(self, out):
        add = self.add_argument_group("run").add_argument
        add("--out", type=Path, default=Path(out), help="folder of the run, default %(default)s")
        add("--json", type=Path, help="write the figures to this file as well")
        add("--resume", action="store_true", help="go on with the run in --out")
        add("--force", action="store_true", help="start over in a folder that holds a run")
        add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        add("--seed", type=at_least(0), default=0)

    def add_model_options(self):
        add, count = self.add_argument_group("model").add_argument, at_least(1)
        add("--dim", type=count)
        add("--heads", type=count)
        add("--layers", type=count)
        add("--hidden", type=count, help="of the MLPs, default 4 x dim")
        add("--dropout", type=share, default=0.0)
        add("--norm", choices=("pre", "post"), default="pre")
        add("--head", choices=("tied", "cosine", "linear"), default="linear")
        add("--learn-temperature", action="store_true", help="of the cosine head")
        add("--positions", choices=("split", "printed"), default="split")
        add("--rotary", action=argparse.BooleanOptionalAction, default=False, help="attention sees relative positions")

    def add_training_options(self):
        add, count, amount = self.add_argument_group("training").add_argument, at_least(1), at_least(0.0, float)
        add("--steps", type=count)
        add("--batch-size", type=count, help="of all processes together")
        add("--optimizer", choices=("adamw", "muon"), default="muon")
        add("--lr", type=amount)
        add("--warmup", type=at_least(0), default=100)
        add("--decay", choices=("constant", "linear", "cosine"), default="linear")
        add("--weight-decay", type=amount, default=0.0)
        add("--clip", type=amount, default=1.0, help="largest norm of the gradient")
        add("--accumulate", type=count, default=1, help="parts in which a batch is worked through")
        add("--ema", type=share, default=0.0, help="decay of a moving average of the weights")
        add("--precision", choices=("auto", "float32", "bf16"), default="auto")
        add("--compile", action="store_true", help="torch.compile")
        add("--tensorboard", action="store_true", help="log to --out, if it is installed")
        add("--checkpoint-steps", type=count, help="besides every 5 minutes")


def at_least(low, kind=int):
    """An argparse type: a number that is not below `low`."""

    def parse(text):
        value = kind(text)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"{text} is below {low}")
        return value

    return parse


def share(text):
    """An argparse type: a number from 0 to below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def mask_kind(text):
    """An argparse type: a kind of training_mask."""
    try:
        training_mask((1, 1), text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def run_as_script(main):
    """Call main(). Bad input (ValueError, OSError) ends in one line on stderr and exit code 2, Ctrl-C in 130.

    Of several processes the first alone writes to the screen.
    """
    keep_freed_memory()
    if process_rank()[0] > 0:
        sys.stdout = None  # print() then does nothing
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; if training had begun, --resume goes on", file=sys.stderr)
        sys.exit(130)


def keep_freed_memory():
    """Let the C library keep what is freed. A training step on a CPU soon needs as much again, and pages that the
    system hands out anew are cleared first. Without glibc nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own, which would end with it
        library.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the end of the heap back


def pick_device(name="auto"):
    """The torch.device for "auto" (CUDA where there is one, else CPU), "cpu", "cuda" or "cuda:N"."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; choose auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {name!r} asked for, but torch sees no CUDA device; use --device cpu")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"device {device} asked for, but there are only {torch.cuda.device_count()} CUDA devices")
    return device


def seed_everything(seed):
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def run_record():
    """Where a number comes from: command, commit, machine, versions and date, as plain values."""
    folder = Path(__file__).resolve().parent
    git = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    machine = f"{cpu}, {os.cpu_count()} cores, {platform.system()}"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    script = Path(sys.argv[0])
    return {
        "command": " ".join(["python", script.name if script.is_absolute() else str(script), *sys.argv[1:]]),
        "commit": commit,
        "machine": machine,
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}",
        "date": time.strftime("%Y-%m-%d"),
    }


def write_figures(settings, figures, *paths):
    """The figures, the settings and where they come from, as JSON to each of the paths that is not None."""
    plain = {}
    for name, value in vars(settings).items():
        plain[name] = str(value) if isinstance(value, Path) or value == math.inf else value
    record = plain.pop("record")
    text = json.dumps({**record, "settings": plain, **figures}, indent=1) + "\n"
    for path in filter(None, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def print_table(head, rows):
    """Text in columns: the first one to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for first, *others in [head, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))
    print()


def process_rank():
    """(rank, number of processes) as torchrun says; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def in_any_process(flag, device):
    """Whether the flag is set in at least one process: all of them learn it at the same step."""
    if process_rank()[1] == 1:
        return flag
    flags = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(flags)
    return bool(flags)


@contextlib.contextmanager
def evaluation_mode(model):
    """No dropout inside the block; the model's mode is put back afterwards."""
    training = getattr(model, "training", False)
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def precision_context(device, precision):
    """Run what is inside in "float32", or in "bf16" by autocast; weights and loss stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def fast_precision(device):
    """ "bf16" where the processor multiplies it natively (CUDA since Ampere, AVX512-BF16), else "float32"."""
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = torch.cpu._is_avx512_bf16_supported()
    return "bf16" if native else "float32"


def make_optimizers(model, optimizer, lr, betas, weight_decay):
    """[AdamW], or for "muon" [AdamW, Muon] with the matrices of the blocks on Muon.

    Muon (torch.optim) makes each update orthogonal; its rate is scaled to AdamW's size, so both share lr.
    Only matrices decay.
    """
    if optimizer not in ("adamw", "muon"):
        raise ValueError(f"unknown optimizer {optimizer!r}; choose adamw or muon")
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    taken = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in taken]
    groups = [dict(params=others, weight_decay=0.0)]
    if optimizer == "adamw":
        groups.append(dict(params=matrices, weight_decay=weight_decay))
    optimizers = [torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)]
    if optimizer == "muon":
        optimizers.append(torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def learning_rate_factor(step, steps, warmup, decay):
    """What the learning rate is multiplied by at `step` of `steps`: a linear rise over `warmup` steps, then
    "constant", or down to 0 as a straight line ("linear") or half a cosine wave ("cosine")."""
    rise = min(1.0, (step + 1) / (warmup + 1))
    done = max(0, step - warmup) / max(1, steps - warmup)
    fall = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    if decay not in fall:
        raise ValueError(f"unknown decay {decay!r}; choose {', '.join(fall)}")
    return rise * fall[decay]


def step_seed(seed, step, rank=0):
    """A seed of its own for each step and process of a run."""
    return ((seed * 1_000_003 + step) * 1_009 + rank) % 2**63


class TrainingState:
    """All that a resumed run needs to go on to the very same weights."""

    def __init__(self, model, optimizers, ema, best_by):
        self.model = model
        self.optimizers = optimizers
        self.best_by = best_by
        self.best = None  # the model whose validated figure `best_by` was the lowest
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema)) if ema else None
        self.step = 0
        self.seconds = 0.0
        self.loss_sum = 0.0  # over the steps since the last row of history
        self.history = []  # the rows of log.csv

    def current(self):
        """The model as it stands: the moving average of the weights if there is one."""
        return self.average.module if self.average else self.model

    def result(self):
        """The model to use."""
        return self.best or self.current()

    def update(self, loss, lr):
        """Step with the gradients at hand."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        if self.average:
            self.average.update_parameters(self.model)
        self.step += 1
        self.loss_sum = self.loss_sum + loss

    def mean_loss(self):
        """Over the steps since the last row of history."""
        return float(self.loss_sum) / (self.step - (self.history[-1]["step"] if self.history else 0))

    def log(self, gradient_norm, validate):
        """Add a row to history, with the figures of the validated model."""
        row = dict(step=self.step, loss=self.mean_loss(), seconds=round(self.seconds, 2))
        row |= dict(lr=self.optimizers[0].param_groups[0]["lr"], gradient_norm=float(gradient_norm))
        if validate:
            with torch.no_grad(), evaluation_mode(self.current()):
                row |= validate(self.current())
        self.history.append(row)
        self.loss_sum = 0.0
        if self.best_by and row[self.best_by] <= min(past[self.best_by] for past in self.history):
            self.best = copy.deepcopy(self.current())

    def require_finite(self, gradient_norm):
        weights = all(bool(p.isfinite().all()) for p in self.model.parameters())
        if not (weights and math.isfinite(float(self.loss_sum) + float(gradient_norm))):
            raise ValueError(f"loss or weights are no longer finite at step {self.step}; try a lower learning rate")

    def state_dict(self):
        return {
            "progress": dict(step=self.step, seconds=self.seconds, loss_sum=self.loss_sum, history=self.history),
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load_state_dict(self, saved, result):
        """Go back to a state_dict(); `result` holds the weights that result() had then."""
        vars(self).update(saved["progress"])
        if self.best_by and self.history:
            self.best = copy.deepcopy(self.current())
            self.best.load_state_dict(result)
        self.model.load_state_dict(saved["model"])
        if self.average:
            self.average.load_state_dict(saved["average"])
        for optimizer, optimizer_state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)


class TrainingLog:
    """Where a run reports and what it leaves in its folder `out`, if it has one: a progress line on stderr, log.csv,
    model.pt and, if asked for, TensorBoard. `belongings` are saved with the model."""

    def __init__(self, out, first_step, steps, validate, belongings, tensorboard):
        self.out, self.first_step, self.steps = out, first_step, steps
        self.validate, self.belongings = validate, belongings
        self.started = self.printed = self.saved = time.monotonic()
        self.opened = False
        self.board = tensorboard_writer(out) if tensorboard else None

    def log(self, state, gradient_norm):
        """Validate, and add a row to log.csv; at first all rows, those of the checkpoint that was resumed."""
        state.log(gradient_norm, self.validate)
        rows = state.history[-1:] if self.opened else state.history
        if self.out:
            self.out.mkdir(parents=True, exist_ok=True)
            with open(self.out / "log.csv", "a" if self.opened else "w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                if not self.opened:
                    writer.writeheader()
                writer.writerows(rows)
        if self.board:
            for name, value in rows[-1].items():
                self.board.add_scalar(name, value, state.step)
        self.opened = True

    def save(self, state):
        if self.out:
            training = state.state_dict()
            save_checkpoint(
                self.out / "model.pt", state.result(), step=state.step, training=training, **self.belongings
            )
        self.saved = time.monotonic()

    def minutes_since_save(self):
        return (time.monotonic() - self.saved) / 60

    def print_progress(self, state):
        """On a terminal the line rewrites itself every second; elsewhere there is a new one every 10 seconds."""
        now, terminal, last = time.monotonic(), sys.stderr.isatty(), state.step == self.steps
        if last or now - self.printed > (1 if terminal else 10):
            self.printed = now
            speed = (state.step - self.first_step) / (now - self.started)
            minutes, seconds = divmod(round((self.steps - state.step) / speed), 60)
            line = f"step {state.step}/{self.steps}  loss {state.mean_loss():.4f}  {speed:.1f} steps/s"
            end = "\r" if terminal and not last else "\n"
            print(f"{line}  {minutes}:{seconds:02d} left   ", end=end, file=sys.stderr, flush=True)


def tensorboard_writer(out):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("TensorBoard is not installed: pip install tensorboard, or leave it out") from None
    return SummaryWriter(out)


def train(
    model,
    batch,
    *,
    steps,
    seed=0,
    optimizer="adamw",
    lr=1e-3,
    betas=(0.9, 0.95),
    weight_decay=0.01,
    warmup=100,
    decay="linear",
    clip=1.0,
    accumulate=1,
    every_position=False,
    label_smoothing=0.0,
    soft_targets=None,
    ema=0.0,
    precision="float32",
    compile=False,
    out=None,
    tokenizer=None,
    config=None,
    resume=False,
    checkpoint_steps=None,
    checkpoint_minutes=5.0,
    log_steps=100,
    validate=None,
    best_by=None,
    tensorboard=False,
):
    """Train `model`, on the device where it is, to predict the hidden tokens of `batch(step)`.

    batch(step) returns tokens (B, T), mask (B, T) and coords (T, 2) or (B, T, 2): the whole batch of that
    step, as a pure function of the step. Started by torchrun, each process takes its share of the rows;
    accumulate=n works through them in n parts. Either way the gradient is that of the mean over all hidden
    tokens of the batch, and a resumed run ends with the same weights as one that never stopped.

    lr rises over `warmup` steps and then follows `decay`, see learning_rate_factor; gradients are clipped to
    norm `clip`; ema > 0 keeps a moving average of the weights, which is what is validated and saved;
    soft_targets (K, K) gives the distribution to be predicted in place of each true code.
    out is a folder for model.pt, written every checkpoint_steps steps or checkpoint_minutes minutes, and for
    log.csv, with a row every log_steps steps to which validate(model) -> dict of floats may add columns; with
    best_by, the name of one of them, the result is the model of the row where it was the lowest.
    resume goes on from out/model.pt; config, plain values that are saved, must not have changed then.
    Ctrl-C finishes the step and saves; two runs at once with the same out are refused.

    Returns the rows of log.csv; the model then holds the result. Raises ValueError when the loss is no
    longer finite; the last checkpoint stays as it was.
    """
    device = next(model.parameters()).device
    rank, world = process_rank()
    out = out and Path(out)
    state = TrainingState(model, make_optimizers(model, optimizer, lr, betas, weight_decay), ema, best_by)
    if resume:
        resume_training(state, out / "model.pt", config, device)
    belongings = dict(tokenizer=tokenizer, config=config)
    log = TrainingLog(out, state.step, steps, validate, belongings, tensorboard) if rank == 0 else None
    network = torch.compile(model) if compile else model
    if world > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        network = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)

    objective = dict(every_position=every_position, soft_targets=soft_targets, label_smoothing=label_smoothing)
    objective |= dict(mask_id=model.mask_id, accumulate=accumulate)
    started = time.monotonic() - state.seconds
    model.train()
    stopped = False
    with only_writer(out if log else None), delayed_interrupt() as interrupted:
        while state.step < steps and not stopped:
            torch.manual_seed(step_seed(seed, state.step, rank))  # dropout, too, depends on the step alone
            tokens, mask, coords = (tensor.to(device, non_blocking=True) for tensor in batch(state.step))
            with precision_context(device, precision):
                loss = backward(network, tokens, mask, coords, **objective)
            gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
            state.update(loss, lr * learning_rate_factor(state.step, steps, warmup, decay))
            state.seconds = time.monotonic() - started
            stopped = in_any_process(interrupted.is_set(), device)
            if log:
                log.print_progress(state)
                logs = state.step == steps or state.step % log_steps == 0
                saves = checkpoint_steps is not None and state.step % checkpoint_steps == 0
                saves |= stopped or state.step == steps or log.minutes_since_save() > checkpoint_minutes
                if logs or saves:
                    state.require_finite(gradient_norm)
                if logs:
                    log.log(state, gradient_norm)
                if saves:
                    log.save(state)
    if world > 1:
        # Gloo's threads need the interpreter's lock once more after the last exchange, and destroying the group
        # waits for them with that lock held: without a pause both may wait for ever.
        time.sleep(0.5)
        del network
        torch.distributed.destroy_process_group()
    if stopped:
        raise KeyboardInterrupt
    model.load_state_dict(state.result().state_dict())
    model.eval()
    return state.history


@contextlib.contextmanager
def only_writer(folder):
    """ValueError if another run is inside the block with the same folder; None is nobody's."""
    if folder is None or fcntl is None:
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given up by the system however the process ends
        except BlockingIOError:
            raise ValueError(f"another run is writing to {folder}; --out renames") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):  # which is not empty: the usual case
            for path in made:
                path.rmdir()


@contextlib.contextmanager
def delayed_interrupt():
    """Ctrl-C inside the block sets the event that it gives, so that a step can be finished; a second one interrupts."""
    event, before = threading.Event(), signal.getsignal(signal.SIGINT)

    def remember(*_):
        event.set()
        signal.signal(signal.SIGINT, before)

    if threading.current_thread() is threading.main_thread():  # only there may signals be handled
        signal.signal(signal.SIGINT, remember)
    try:
        yield event
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


# What a resumed run may do differently; everything else would change its weights.
MAY_CHANGE = {"out", "json", "resume", "force", "device", "compile", "tensorboard", "checkpoint_steps", "record"}


def open_run(settings):
    """The device of a script's run; ValueError if its folder holds a run that it would overwrite."""
    device = pick_device(settings.device)
    settings.precision = fast_precision(device) if settings.precision == "auto" else settings.precision
    if (settings.out / "model.pt").exists() and not (settings.resume or settings.force):
        holds = f"{settings.out} holds a run already"
        raise ValueError(f"{holds}: --resume goes on with it, --force starts over, --out renames")
    return device


def train_as_set(settings, codes, batch, device, *, out=None, may_change=(), **options):
    """A new MaskGIT, trained by the options of CommandLine, and the rows of its log; options go to train()."""
    seed_everything(settings.seed)
    architecture = ("dim", "heads", "layers", "hidden", "dropout", "norm", "head", "positions", "rotary")
    architecture += ("learn_temperature",)
    model = MaskGIT(codes, **{name: getattr(settings, name) for name in architecture}).to(device)
    passed_on = ("steps", "seed", "optimizer", "lr", "weight_decay", "warmup", "decay", "clip", "accumulate", "ema")
    passed_on += ("precision", "compile", "resume", "checkpoint_steps", "tensorboard")
    options |= {name: getattr(settings, name) for name in passed_on}
    config = {name: value for name, value in vars(settings).items() if name not in {*MAY_CHANGE, *may_change}}
    return model, train(model, batch, out=out, config=config, log_steps=max(1, settings.steps // 20), **options)


def backward(network, tokens, mask, coords, *, mask_id, accumulate, every_position, soft_targets, label_smoothing):
    """Accumulate the gradient of the loss averaged over the counted tokens of the whole batch; returns that loss.

    Each process works through every world-th row, in `accumulate` parts. All divide by the count of the whole
    batch, so the parts add up to its mean however the hidden tokens are spread over them.
    """
    rank, world = process_rank()
    if len(tokens) < world * accumulate:
        raise ValueError(f"a batch of {len(tokens)} cannot be split over {world} processes x {accumulate} parts")
    inputs = tokens.masked_fill(mask, mask_id)
    targets = tokens if soft_targets is None else soft_targets.to(tokens.device)[tokens]
    counted = torch.ones_like(mask) if every_position else mask
    count, total = counted.sum(), torch.zeros((), device=tokens.device)
    parts = torch.arange(rank, len(tokens), world, device=tokens.device).tensor_split(accumulate)
    for i, rows in enumerate(parts):
        # Processes exchange gradients once, after the last part.
        exchange = contextlib.nullcontext() if world == 1 or i == accumulate - 1 else network.no_sync()
        with exchange:
            logits = network(inputs[rows], coords if coords.ndim == 2 else coords[rows]).float()
            loss = masked_cross_entropy(logits, targets[rows], counted[rows], label_smoothing, count=count)
            (loss * world).backward()  # DistributedDataParallel averages over the processes
        total += loss.detach()
    if world > 1:
        torch.distributed.all_reduce(total)
    return total


def save_checkpoint(path, model, *, tokenizer=None, config=None, step=0, training=None):
    """Write model.pt whole or not at all: to a temporary file beside it, which then takes its name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
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


def read_checkpoint(path, device):
    """The contents of a file of save_checkpoint; ValueError if there is none, or something else."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():  # torch.load does not compare the checksums
                raise ValueError(f"{broken} has another checksum")
        contents = torch.load(path, map_location=device, weights_only=True)
        missing = {"architecture", "weights", "config", "step", "training"} - set(contents)
    except Exception as error:  # torch.load raises half a dozen types on damaged files
        raise ValueError(f"{path} is damaged or no checkpoint: {first_line(error)}") from None
    if missing:
        raise ValueError(f"{path} is no checkpoint of maskgit.py: it lacks {', '.join(sorted(missing))}")
    return contents


def first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0]


def resume_training(state, path, config, device):
    """Put `state` where the run at `path` stopped; ValueError if that run had another config."""
    contents = read_checkpoint(path, device)
    before, now = contents["config"] or {}, config or {}
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{path} was trained with {name}={before.get(name)}, not {now.get(name)}; resume as it was"
            )
    if contents["training"] is None:
        raise ValueError(f"{path} holds a model without its training state; it cannot be resumed")
    try:
        state.load_state_dict(contents["training"], contents["weights"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit this run: {first_line(error)}") from None


def load_checkpoint(path, device="cpu"):
    """A trained model and what belongs to it, as a dict:

    model      MaskGIT on `device`, in eval mode
    tokenizer  PatchTokenizer, or None where the tokens are the pixels
    config     the settings of the run, plain values
    step       how many steps it was trained
    """
    contents = read_checkpoint(path, device)
    try:
        model = MaskGIT(**contents["architecture"]).to(device)
        model.load_state_dict(contents["weights"])
        saved = contents.get("tokenizer")
        tokenizer = saved and PatchTokenizer(saved["centroids"].cpu().numpy(), saved["patch"], saved["stride"])
    except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} does not fit this maskgit.py: {first_line(error)}") from None
    return dict(model=model.eval(), tokenizer=tokenizer, config=contents["config"], step=contents["step"])


# ---------------------------------------------------------------------------------------------------
# Pictures

PAPER, INK, FAINT, FRAME = (255, 255, 255), (40, 40, 40), (225, 225, 225), (170, 190, 215)
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
COLOURS += ["#000000", "#999933", "#882255", "#44aa99", "#aa4499", "#888888"]


def image_grid(images, columns, *, scale=1, gap=4, titles=()):
    """Images (B, H, W, C), float in [0, 1], C 1 or 3, in rows of `columns`, each pixel `scale` wide: a PIL image.

    titles: a line of text above each column.
    """
    images = np.asarray(images)
    count, height, width, channels = images.shape
    pixels = (images.clip(0, 1) * 255).round().astype(np.uint8)
    if channels == 1:
        pixels = pixels.repeat(3, axis=-1)
    cell_width, cell_height, top = width * scale + gap, height * scale + gap, 22 if titles else 0
    rows = math.ceil(count / columns)
    sheet = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap + top), FRAME)
    for i, image in enumerate(pixels):
        x, y = gap + i % columns * cell_width, gap + top + i // columns * cell_height
        sheet.paste(Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.NEAREST), (x, y))
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        x = gap + column * cell_width + width * scale / 2
        draw.text((x, gap + 8), title, fill=INK, font=ImageFont.load_default(14), anchor="mm")
    return sheet


def save_gif(path, frames, seconds_per_frame=0.4, pause=2.0):
    """PIL images as an endlessly repeated GIF that rests on the last one for `pause` seconds."""
    durations = [1000 * seconds_per_frame] * (len(frames) - 1) + [1000 * pause]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


class Axis:
    """Maps the range of some values, linearly or by logarithm, to the pixels from `start` to `end`."""

    def __init__(self, values, start, end, log):
        self.start, self.end, self.scale = start, end, math.log10 if log else float
        self.low, self.high = min(values), max(values)
        if self.low == self.high:  # a range of some width, whatever there is to show
            self.low, self.high = (self.low / 2, self.high * 2) if log else (self.low - 0.5, self.high + 0.5)

    def __call__(self, value):
        low, high = self.scale(self.low), self.scale(self.high)
        return self.start + (self.scale(value) - low) / (high - low) * (self.end - self.start)

    def ticks(self):
        """Three to seven round numbers; on a log axis powers of ten, or those times 1, 2 and 5, if there are three."""
        if self.scale is math.log10:
            powers = [10.0**i for i in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)]
            for factors in ((1,), (1, 2, 5)):
                ticks = [power * factor for power in powers for factor in factors]
                ticks = [tick for tick in ticks if self.low <= tick <= self.high]
                if len(ticks) >= 3:
                    return ticks
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / 3))
        step *= next(factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (step * factor) <= 6)
        return [step * k for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def line_plot(curves, *, title, x_label, y_label, references=None, log_x=False, log_y=False):
    """A line chart as a PIL image, with its legend to the right.

    curves      {label: (x values, y values)}; points that are not finite, or not positive on a log
                axis, are left out.
    references  {label: y}: dashed horizontal lines, such as a limit that can be computed; likewise.
    """
    references = {label: y for label, y in (references or {}).items() if y > 0 or not log_y}
    lines = {}
    for label, (x, y) in curves.items():
        pairs = [(float(a), float(b)) for a, b in zip(x, y, strict=True)]
        shown = [(a, b) for a, b in pairs if math.isfinite(a + b) and (a > 0 or not log_x) and (b > 0 or not log_y)]
        lines[label] = shown
    points = [point for line in lines.values() for point in line]
    if not points:
        raise ValueError(f"nothing to plot in {title!r}")
    font = ImageFont.load_default(26)
    legend_width = max(font.getlength(label) for label in [*curves, *references])
    left, right, top, bottom = 160, min(1300, 1680 - legend_width), 120, 960  # drawn at twice the size: smooth lines
    x_axis = Axis([x for x, _ in points], left, right, log_x)
    y_axis = Axis([y for _, y in points] + list(references.values()), bottom - 24, top, log_y)

    sheet = Image.new("RGB", (1800, 1100), PAPER)
    draw = ImageDraw.Draw(sheet)
    for tick in x_axis.ticks():
        draw.line([(x_axis(tick), bottom), (x_axis(tick), top)], fill=FAINT, width=2)
        draw.text((x_axis(tick), bottom + 14), f"{tick:g}", fill=INK, font=font, anchor="mt")
    for tick in y_axis.ticks():
        draw.line([(left, y_axis(tick)), (right, y_axis(tick))], fill=FAINT, width=2)
        draw.text((left - 14, y_axis(tick)), f"{tick:g}", fill=INK, font=font, anchor="rm")
    draw.line([(left, top), (left, bottom), (right, bottom)], fill=INK, width=3)
    draw.text((left, 36), title, fill=INK, font=ImageFont.load_default(34), anchor="lm")
    draw.text((left, 90), y_label, fill=INK, font=font, anchor="lm")
    draw.text((right, bottom + 70), x_label, fill=INK, font=font, anchor="rm")

    lines |= {label: [(x_axis.low, y), (x_axis.high, y)] for label, y in references.items()}
    for i, (label, line) in enumerate(lines.items()):
        colour, legend = COLOURS[i % len(COLOURS)], top + 20 + 44 * i
        draw_line(draw, [(x_axis(x), y_axis(y)) for x, y in line], colour, dashed=label in references)
        draw_line(draw, [(right + 30, legend), (right + 90, legend)], colour, dashed=label in references)
        draw.text((right + 104, legend), label, fill=INK, font=font, anchor="lm")
    return sheet.resize((900, 550), Image.Resampling.LANCZOS)


def draw_line(draw, points, colour, dashed):
    if not dashed:
        draw.line(points, fill=colour, width=5, joint="curve")
        return
    (x, y), (end, _) = points
    while x < end:
        draw.line([(x, y), (min(x + 14, end), y)], fill=colour, width=4)
        x += 24
