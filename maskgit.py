"""MaskGIT in one file: fill in the hidden part of an image with a bidirectional transformer.

An image is a set of discrete tokens at known coordinates. Some of them are hidden. The transformer sees all the others
at once and gives, for each hidden one, a distribution over the codes; `decode` commits a few hidden tokens per step
until none is left. In the order in which data flows: tokens, positions, transformer, masking, decoding; then training;
then what only the scripts need.

Shapes: B images, T tokens, K codes, D model width. Tokens are int64, masks are bool with True = hidden, coordinates are
(x, y). Sources: "paper" is Chang et al., MaskGIT, CVPR 2022; S1 and S2 are the two blog posts on squares and
rectangles; R1 and R2 the two course reports on photographs.
"""

import contextlib
import copy
import itertools
import math
import os
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple, get_args, get_origin

# How often a thread that waits for another looks again before it sleeps. As torch has it, 300,000 times, which beside
# other work costs a third of the time. It is read when torch is imported, so the scripts import this file before that.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode


def require_choice(what, value, choices):
    """ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"unknown {what} {value!r}; choose from {', '.join(choices)}")


def plain(value, name):
    """A value of plain Python, as a checkpoint can hold it: numbers of numpy and of tensors become Python's. ValueError
    if there is none."""
    if isinstance(value, dict):
        return {plain(key, name): plain(each, f"{name}'s {key}") for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(each, name) for each in value)
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if value is not None and type(value) not in (bool, int, float, str):
        raise ValueError(f"{name} is {value!r} of {type(value)}, which a checkpoint cannot hold")
    return value


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
    distinct = set()
    for start in range(0, len(points), 4096):  # no more of them than it takes
        distinct.update(map(bytes, points[start : start + 4096] + 0.0))  # -0.0 becomes 0.0
        if len(distinct) >= k:
            break
    else:
        found = f"only {len(distinct)} of the {len(points)} points are distinct"
        raise ValueError(f"{k} clusters asked for, but {found}")
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
        centroids = moved
        before = labels
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
        self.patch = int(patch)
        self.stride = int(stride or patch)
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
        """Flattened patches (..., patch * patch * C) -> their tokens (...)."""
        return nearest_centroid(patches.reshape(-1, patches.shape[-1]), self.centroids).reshape(patches.shape[:-1])

    def encode(self, images):
        """Images (B, H, W, C) -> tokens (B, h, w), a few images at a time: memory does not grow with B."""
        if images.shape[-1] != self.channels:
            raise ValueError(f"images have {images.shape[-1]} channels, the tokenizer was made for {self.channels}")
        at_once = max(1, 2**22 // images[0].size)
        parts = [images[start : start + at_once] for start in range(0, len(images), at_once)]
        return np.concatenate([self.nearest(image_patches(part, self.patch, self.stride)) for part in parts])

    def decode(self, tokens):
        """Tokens (B, h, w) -> images (B, H, W, C): the centroids, averaged where they overlap."""
        return stitch_patches(self.centroids[tokens], self.patch, self.stride)


def image_patches(images, patch, stride):
    """All patches of images (B, H, W, C), each flattened row by row: (B, h, w, patch * patch * C)."""
    b, height, width, channels = images.shape
    if min(height, width) < patch or (height - patch) % stride or (width - patch) % stride:
        raise ValueError(f"images of {width}x{height} are not covered by patches of {patch} every {stride} pixels")
    windows = np.lib.stride_tricks.sliding_window_view(images, (patch, patch), axis=(1, 2))[:, ::stride, ::stride]
    return windows.transpose(0, 1, 2, 4, 5, 3).reshape(b, *windows.shape[1:3], patch * patch * channels)


def stitch_patches(patches, patch, stride):
    """Images (B, H, W, C) of such patches (B, h, w, patch * patch * C): their mean where they overlap."""
    b, h, w, size = patches.shape
    height, width = ((n - 1) * stride + patch for n in (h, w))
    pixels = patches.reshape(b, h, w, patch, patch, size // patch**2)
    total = np.zeros((b, height, width, pixels.shape[-1]), dtype=np.float32)
    count = np.zeros((height, width, 1), dtype=np.float32)
    for y, x in np.ndindex(patch, patch):
        rows, columns = (slice(i, i + (n - 1) * stride + 1, stride) for i, n in ((y, h), (x, w)))
        total[:, rows, columns] += pixels[:, :, :, y, x]
        count[rows, columns] += 1
    return total / count


# ---------------------------------------------------------------------------------------------------
# Positions

LAYOUTS = ("split", "printed")


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
    require_choice("position layout", layout, LAYOUTS)
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

NORMS = ("pre", "post")
HEADS = ("linear", "tied", "cosine")


def turn(x, angles):
    """Turn the pairs (x[i], x[i + d / 2]) of heads' vectors (..., B, heads, T, d) by angles (1 or B, 1, T, d / 2)."""
    cos = angles.cos().to(x.dtype)
    sin = angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention, not causal: (B, T, D) -> (B, T, D); rotary by angles (1 or B, 1, T, d / 2)."""

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
        query, key, value = qkv
        if angles is not None:
            query, key = turn(qkv[:2], angles)
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
        hidden = hidden or 4 * dim
        require_choice("norm", norm, NORMS)
        require_choice("head", head, HEADS)
        if learn_temperature and head != "cosine":
            raise ValueError(f"learn_temperature belongs to the cosine head, not to {head!r}")
        self.config = dict(codes=codes, dim=dim, heads=heads, layers=layers, hidden=hidden, dropout=dropout, norm=norm)
        self.config |= dict(head=head, positions=positions, rotary=rotary, learn_temperature=learn_temperature)
        self.config = plain(self.config, "the model")
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
        dim = self.config["dim"]
        positions = position_encoding(coords, dim, self.config["positions"])
        x = self.embedding(tokens) * math.sqrt(dim)  # (B, T, D)
        x = x + positions.to(x.dtype)
        angles = None
        if self.config["rotary"]:
            angles = rotary_angles(coords, dim // self.config["heads"])  # (T, d / 2) or (B, T, d / 2)
            angles = angles[:, None] if angles.ndim == 3 else angles[None, None]
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


ROUNDING = 1e-9  # by so much a product may miss the whole number that it is: 0.55 * 100 is 55.00000000000001


def random_mask(shape, ratio, generator=None):
    """Hide exactly ceil(ratio * T) tokens of each row, at least 1: bool, of shape (B, T). ratio is in [0, 1], one for
    all rows or one for each."""
    rows, tokens = shape
    ratio = torch.as_tensor(ratio, dtype=torch.float64).expand(rows)
    if not bool(((ratio >= 0) & (ratio <= 1)).all()):
        raise ValueError("the share of hidden tokens must lie between 0 and 1")
    count = (ratio * tokens - ROUNDING).ceil().long().clamp(min=1)
    device = generator.device if generator is not None else "cpu"
    rank = torch.rand(rows, tokens, generator=generator, device=device).argsort(dim=1).argsort(dim=1)
    return rank < count[:, None].to(device)


def training_mask(shape, kind, generator=None, coords=None):
    """Random hidden tokens of a kind, at least one in each row: bool, of shape (B, T). A kind is
    a name of SCHEDULES    the share gamma(r) of each row, with r uniform (paper);
    a share, or "single"   such as "0.2" of the tokens, or one of them (S2);
    "box", "half"          of tokens at coords (T, 2) or (B, T, 2), those in the box that two of them span, or those
                           beyond the middle on one of four sides;
    several of these       such as "0.2+cosine", which share the rows."""
    rows, tokens = shape
    kinds = mask_kinds(kind)
    if len(kinds) > 1:
        masks = []
        for part, each in zip(torch.arange(rows).tensor_split(len(kinds)), kinds, strict=True):
            at = coords if coords is None or coords.ndim == 2 else coords[part]
            masks.append(training_mask((len(part), tokens), each, generator, at))
        return torch.cat(masks)
    if kind in HOLES:
        if coords is None:
            raise ValueError(f"the mask {kind!r} needs the coordinates of the tokens")
        return HOLES[kind](coords.expand(*shape, 2), generator)
    if kind in SCHEDULES:
        # Stratified: row i draws r from [i / B, (i + 1) / B), so that the loss of a batch depends less on luck.
        r = (torch.arange(rows) + torch.rand(rows, generator=generator)) / rows
        return random_mask(shape, SCHEDULES[kind](r.numpy()).clip(0, 1), generator)  # at 1 the cosine is -4e-8
    return random_mask(shape, 0.0 if kind == "single" else float(kind), generator)


def mask_kinds(kind):
    """The parts of a kind of training_mask; ValueError if one of them is none."""
    kinds = kind.split("+")
    for each in kinds:
        known = each == "single" or each in HOLES or each in SCHEDULES
        with contextlib.suppress(ValueError):
            known = known or 0 <= float(each) <= 1
        if not known:
            raise ValueError(f"{each!r} is no mask: choose single, a share, box, half, or {', '.join(SCHEDULES)}")
    return kinds


def random_box(coords, generator):
    """The tokens at coords (B, T, 2) in the box that two of them span: (B, T)."""
    rows, tokens, _ = coords.shape
    corners = torch.randint(tokens, (rows, 2, 1), generator=generator).expand(-1, -1, 2)
    low, high = coords.gather(1, corners).aminmax(dim=1, keepdim=True)
    return ((low <= coords) & (coords <= high)).all(dim=-1)


def random_half(coords, generator):
    """The tokens at coords (B, T, 2) on one of four sides of the middle: (B, T). A line has two sides, and where all
    tokens are in one place it is all of them."""
    rows, tokens, _ = coords.shape
    low, high = coords.aminmax(dim=1, keepdim=True)
    beyond = coords - (low + high) / 2
    sides = torch.cat([beyond, -beyond], dim=-1) > 0  # (B, T, 4): right, below, left, above
    side = torch.randint(4, (rows, 1, 1), generator=generator).expand(-1, tokens, -1)
    half, across = (sides.gather(2, which)[..., 0] for which in (side, (side + 1) % 4))
    half = torch.where(half.any(dim=1, keepdim=True), half, across)
    return half | ~half.any(dim=1, keepdim=True)


HOLES = {"box": random_box, "half": random_half}


def masked_cross_entropy(logits, targets, mask, *, count=None):
    """Cross-entropy in nats, averaged over the hidden tokens: a scalar. logits (B, T, K), targets (B, T), mask (B, T).
    count replaces the number of tokens to divide by, so that the parts of a larger batch add up to its mean."""
    # Flat, so that each token's logits lie side by side: with 1,024 codes on a CPU five times as fast.
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    return (loss * mask).sum() / (mask.sum() if count is None else count)


# ---------------------------------------------------------------------------------------------------
# Decoding


class Step(NamedTuple):
    """What is known in a step of decode, of the n tokens that are still hidden and of the step."""

    log_probs: torch.Tensor  # (n, K): the model's, evidence and temperature included
    tokens: torch.Tensor | None  # (n,): the token drawn for each; None before they are drawn
    image: torch.Tensor  # (n,): its image, 0 .. B-1, ascending
    place: torch.Tensor  # (n,): which of the image's T tokens it is
    coords: torch.Tensor  # (B, T, 2): of all tokens
    left: torch.Tensor  # (B,): how many tokens of each image the schedule leaves hidden after the step
    step: int  # 1 .. steps
    steps: int
    generator: torch.Generator | None
    memory: dict  # whatever an order keeps for its next steps; empty at first


def categorical(state):
    """A token each, drawn from its probabilities (R2): (n,)."""
    cumulative = state.log_probs.exp().cumsum(dim=-1)  # (n, K)
    uniform = torch.rand(len(cumulative), 1, generator=state.generator, device=cumulative.device)
    tokens = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
    return tokens.clamp(max=cumulative.shape[1] - 1)  # uniform may round to the whole


def likeliest(state):
    """The most probable token each (R1): (n,)."""
    return state.log_probs.argmax(dim=-1)


SAMPLES = {"categorical": categorical, "argmax": likeliest}

# An order is a function of a Step that says which of its tokens are committed now: by priorities, float (n,), of which
# the schedule takes the highest; or at its own pace, by a bool (n,).


def by_confidence(state, choice_temperature=4.5, log_probability=False):
    """Those whose drawn token is the most probable, plus choice_temperature times Gumbel noise that fades with the
    steps. R1 and R2 rank by probability, the paper's code by its logarithm."""
    confidence = state.log_probs.gather(-1, state.tokens[:, None])[:, 0]
    confidence = confidence if log_probability else confidence.exp()
    gumbel = -torch.empty_like(confidence).exponential_(generator=state.generator).log()
    return confidence + choice_temperature * (1 - state.step / state.steps) * gumbel


def at_random(state):
    """Any, whatever the model says."""
    return torch.rand(state.place.shape, generator=state.generator, device=state.place.device)


def by_entropy(state, budget=0.001):
    """At its own pace: the most uncertain token and, with it, the most certain ones, as many as have entropies that add
    up to `budget` nats, and more where the schedule asks for it. Tokens committed together are drawn as if independent,
    which costs at most the sum of their entropies but the largest: so the most uncertain one is free."""
    entropy = torch.special.entr(state.log_probs.exp()).sum(dim=-1)  # (n,)
    of_image = entropy.new_zeros(state.coords.shape[:2]).index_put((state.image, state.place), entropy)  # (B, T)
    ascending, place = of_image.sort(dim=1, stable=True)
    unpaid = (ascending.cumsum(dim=1) > budget).sum(dim=1)  # (B,): tokens that the budget does not reach
    most_uncertain = state.place == place[state.image, -1]
    priority = (-entropy).masked_fill(most_uncertain, math.inf)
    left = (unpaid - 1).clamp(min=0)  # all of them but the most uncertain one
    return all_but_lowest(priority, state.image, state.left.minimum(left))


ORDERS = {"confidence": by_confidence, "random": at_random, "entropy": by_entropy}


@torch.no_grad()
def decode(
    model, tokens, mask, coords, *, steps=20, schedule="cosine", order="entropy", sample="categorical",
    temperature=1.0, stop_after=None, evidence=None, generator=None, trace=None,
):  # fmt: skip
    """Fill in the hidden tokens, several per step, each step seeing all that is committed so far.

    model       MaskGIT in eval mode, or any callable (tokens (b, T), coords) -> logits (b, T, K) with a `mask_id`.
    tokens      (B, T) integers; what stands where mask is True is ignored.
    mask        (B, T) bool, True = hidden. All True generates from nothing.
    coords      (T, 2), or (B, T, 2).
    steps       T: the number of network calls, or the most of them for an order with its own pace.
    schedule    a name of SCHEDULES, or such a function: how many tokens are still hidden after each step.
    order       a name of ORDERS, or such a function: which tokens are committed next.
    sample      a name of SAMPLES ("categorical" is R2's, "argmax" R1's), or such a function: which token each becomes.
    temperature divides the logits.
    stop_after  commit all that is left after this many steps (the reports' sweet spot).
    evidence    (B, T, K), added to the logits: the log-likelihood of what else is known of each token.
    generator   a torch.Generator on the tokens' device; the same one gives the same tokens.
    trace       a list; each step appends (tokens, mask) as they stand after it, (B, T) both.

    Returns int64 tokens (B, T). Given ones come back unchanged, a committed one never changes, and after step t image
    i has min(floor(gamma(t / steps) * N_i), what it had - 1) hidden tokens left, where N_i is its own number at the
    start; by an order with its own pace any number that is smaller than before. After the last step none is left.
    """
    gamma = SCHEDULES.get(schedule, schedule)
    order = ORDERS.get(order, order)
    sample = SAMPLES.get(sample, sample)
    check_decode_arguments(model, tokens, mask, coords, steps, gamma, order, sample, temperature, stop_after)
    tokens = tokens.long().masked_fill(mask, model.mask_id)
    hidden = mask.clone()
    at_start = hidden.sum(dim=1).tolist()  # B numbers
    last_step = min(steps, stop_after or steps)
    memory = {}
    for t in range(1, last_step + 1):
        rows = hidden.any(dim=1).nonzero()[:, 0]  # the b images that are not finished
        if not len(rows):
            break
        image, place, logits = hidden_logits(model, tokens, hidden, rows, coords)
        if evidence is not None:
            logits = logits + evidence[image, place]
        log_probs = (logits / temperature).log_softmax(dim=-1)
        if log_probs.isnan().any():
            raise ValueError("the model's logits are no numbers")
        had = hidden.sum(dim=1)
        share = float(gamma(t / steps)) if t < last_step else 0.0
        scheduled = [math.floor(share * count + ROUNDING) for count in at_start]
        left = torch.tensor(scheduled, device=had.device).minimum(had - 1).clamp(min=0)
        all_coords = coords.expand(*tokens.shape, 2)
        state = Step(log_probs, None, image, place, all_coords, left, t, steps, generator, memory)
        drawn = sample(state)
        choice = order(state._replace(tokens=drawn))
        check_choice(drawn, choice, place, model.mask_id)
        if choice.dtype == torch.bool:
            commits = at_own_pace(choice, log_probs, image, had) | (t == last_step)
        else:
            commits = all_but_lowest(choice, image, left)
        tokens[image, place] = drawn.masked_fill(~commits, model.mask_id)
        hidden[image, place] = ~commits
        if trace is not None:
            trace.append((tokens.clone(), hidden.clone()))
    return tokens


def check_decode_arguments(model, tokens, mask, coords, steps, gamma, order, sample, temperature, stop_after):
    named = {"schedule": (gamma, SCHEDULES), "order": (order, ORDERS), "sample": (sample, SAMPLES)}
    for name, (function, choices) in named.items():
        if not callable(function):
            require_choice(name, function, choices)
    if steps < 1 or (stop_after is not None and stop_after < 1):
        raise ValueError("decode needs steps and stop_after of at least 1")
    if temperature <= 0:
        raise ValueError('decode needs a temperature above 0; for the likeliest token use sample="argmax"')
    check_mask(tokens, mask)
    check_tokens(tokens[~mask], model.mask_id)
    if tuple(coords.shape) not in ((tokens.shape[1], 2), (*tokens.shape, 2)):
        raise ValueError(f"coords are {tuple(coords.shape)}, not (T, 2) or (B, T, 2) of tokens {tuple(tokens.shape)}")
    if getattr(model, "training", False):
        raise ValueError("decode needs a model without dropout: call model.eval() first")


def check_mask(tokens, mask):
    if tokens.shape != mask.shape or mask.dtype != torch.bool:
        raise ValueError(f"tokens {tuple(tokens.shape)} and mask {tuple(mask.shape)} must agree, the mask as bool")


def check_tokens(tokens, codes):
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens are integers, not {tokens.dtype}")
    tokens = tokens.long()  # a byte compares with 1024 as with 0
    if bool(((tokens < 0) | (tokens >= codes)).any()):
        span = f"{int(tokens.min())} .. {int(tokens.max())}"
        raise ValueError(f"the tokens are {span}, but the codes are 0 .. {codes - 1}")


def hidden_logits(model, tokens, hidden, rows, coords):
    """The n hidden tokens of the images `rows` (b,): image (n,), place (n,), and the model's logits (n, K)."""
    row, place = hidden[rows].nonzero(as_tuple=True)
    logits = model(tokens[rows], coords if coords.ndim == 2 else coords[rows])  # (b, T, K)
    if logits.shape != (*tokens[rows].shape, model.mask_id):
        expected = (*tokens[rows].shape, model.mask_id)
        raise ValueError(f"the model's logits are {tuple(logits.shape)}, not {expected}: [MASK] has none")
    return rows[row], place, logits[row, place].float()


def check_choice(drawn, choice, place, codes):
    for name, returned in (("sample", drawn), ("order", choice)):
        if returned.shape != place.shape:
            raise ValueError(f"{name} returned {tuple(returned.shape)} for {len(place)} hidden tokens")
    if bool(((drawn < 0) | (drawn >= codes)).any()):
        raise ValueError(f"sample or order made a token that is none of the codes 0 .. {codes - 1}")


def all_but_lowest(priority, image, left):
    """All tokens but the `left` (B,) ones of lowest priority (n,) in each image (n,), ascending: bool (n,)."""
    ascending = priority.argsort(stable=True)
    ascending = ascending[image[ascending].argsort(stable=True)]  # image by image
    rank = ascending.argsort() - torch.searchsorted(image, image)  # from 0 within each image
    return rank >= left[image]


def at_own_pace(choice, log_probs, image, had):
    """What an order's bool choice (n,) commits of the `had` (B,) hidden tokens of each image: bool (n,). Where it is
    none, the most certain one."""
    chosen = torch.zeros_like(had).index_add(0, image, choice.long())  # (B,)
    most_certain = all_but_lowest(log_probs.amax(dim=-1), image, had - 1)
    return choice | (most_certain & (chosen[image] == 0))


# ---------------------------------------------------------------------------------------------------
# Training


def setting(default, help, *, choices=None, low=None, below=None):
    """A field of Settings: its default, what it is, and which values it may have. Scripts make a flag of each that has
    a help text."""
    return field(default=default, metadata=dict(help=help, check=dict(choices=choices, low=low, below=below)))


@dataclass(frozen=True)
class Settings:
    """Values with a name, checked where they are made. Subclasses have a setting() for each."""

    def __post_init__(self):
        for each in fields(self):
            value = plain(getattr(self, each.name), each.name)
            object.__setattr__(self, each.name, value)
            kinds = get_args(each.type)  # of a tuple, or of what may be None
            if get_origin(each.type) is not tuple:
                value = () if value is None and type(None) in kinds else (value,)
            elif not isinstance(value, tuple) or len(value) != len(kinds):
                raise ValueError(f"{each.name} is {value!r}, not of type {each.type}")
            for one in value:
                check_setting(each.name, one, kind_of(each), **each.metadata["check"])


def kind_of(each):
    """int, float, str or bool: of a field of Settings, or of each of its values if it is a tuple."""
    return (get_args(each.type) or (each.type,))[0]


def check_setting(name, value, kind, choices, low, below):
    if not isinstance(value, (int, float) if kind is float else kind):
        raise ValueError(f"{name} is {value!r}, not of type {kind.__name__}")
    if choices:
        require_choice(name, value, choices)
    if not (low is None or value >= low) or not (below is None or value < below):
        raise ValueError(f"{name} is {value}; it must be at least {low}" + (f" and below {below}" if below else ""))


@dataclass(frozen=True)
class Recipe(Settings):
    """How to train: with the model and its batches all that decides the weights in the end."""

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
    clip: float = setting(1.0, "largest norm of a gradient", low=0.0)
    precision: str = setting("auto", "auto: bf16 where it is fast", choices=("auto", "float32", "bf16"))
    compile: bool = setting(False, "torch.compile")
    log_rows: int = setting(20, "rows of log.csv, each with a validation", low=1)

    def on(self, device):
        """The same, with the precision that "auto" means on a device."""
        return replace(self, precision=fast_precision(device)) if self.precision == "auto" else self


def fast_precision(device):
    """ "bf16" where the processor multiplies it natively (CUDA since Ampere, AVX512-BF16), else "float32"."""
    native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16" if native else "float32"


CHECKPOINT_SECONDS = 120  # between two checkpoints


def train(
    model, batch, recipe, *, out=None, resume=False, force=False, validate=None, best_by=None, tokenizer=None,
    extra=None,
):  # fmt: skip
    """Train `model`, where it is, to predict the hidden tokens of `batch(step)`; returns the rows of log.csv.

    batch(step) gives tokens (B, T), mask (B, T) and coords (T, 2) or (B, T, 2): the whole batch, as a pure function of
    the step, so that a resumed run ends with the same weights as one that never stopped. Started by torchrun, each
    process takes its share of the rows; recipe.accumulate parts are worked through one after another. The gradient is
    always that of the mean over all tokens of the batch that count.

    out is a folder for log.csv, to whose rows validate(model) -> dict of numbers may add columns, and for model.pt,
    written every two minutes with the recipe, the tokenizer and `extra`, a dict of tensors. In the end the model is the
    last one, or the one whose column `best_by` was the lowest. resume goes on from out/model.pt, if model and recipe
    are the same; force starts over where there is one. ValueError if the loss is no longer finite, if a batch hides
    nothing, or if another run writes to the same out. However a run ends, the last checkpoint stays whole.
    """
    device = next(model.parameters()).device
    rank, world = process_rank()
    recipe = recipe.on(device)
    network = model
    model = unwrapped(model)
    if best_by and not validate:
        raise ValueError(f"without validate there is no {best_by!r} to choose the best model by")
    run = Run(model, recipe, out, best_by)
    if out:
        require_no_run(out, resume, force)
    if resume:
        run.resume(device)
    if recipe.compile and network is model:
        network = torch.compile(model)
    group = world > 1 and not in_group()
    if group:
        start_group(device)
    if world > 1:
        network = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    model.train()
    while run.step < recipe.steps:
        torch.manual_seed(step_seed(recipe.seed, run.step, rank))  # dropout, too, depends on the step alone
        tokens, mask, coords = batch(run.step)
        check_mask(tokens, mask)
        check_tokens(tokens, model.mask_id)
        if not mask.any():
            raise ValueError(f"batch({run.step}) hides no token, so there is nothing to learn from")
        tokens, mask, coords = (tensor.to(device, non_blocking=True) for tensor in (tokens.long(), mask, coords))
        inputs = tokens.masked_fill(mask, model.mask_id)
        counted = torch.ones_like(mask) if recipe.loss == "all" else mask
        with precision_context(device, recipe.precision):
            loss = backward(network, inputs, tokens, counted, coords, recipe.accumulate)
        run.update(loss)
        if rank == 0:
            run.report(validate, dict(tokenizer=tokenizer, extra=extra))
    if group:
        # Destroying it holds the interpreter's lock, which Gloo's threads need once more for what is under way; there
        # is nothing to wait for that would say that they are done.
        time.sleep(0.5)
        del network
        torch.distributed.destroy_process_group()
    model.load_state_dict((run.best or model).state_dict())
    model.eval()
    return run.history


def unwrapped(model):
    """The model itself, without the wrapper of torch.compile; ValueError if it is in another one."""
    model = getattr(model, "_orig_mod", model)
    if hasattr(model, "module"):
        raise ValueError(f"{type(model).__name__} wraps a model: give its .module; torchrun starts several processes")
    return model


def in_group():
    """Whether processes have been told of each other."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


GROUPS = itertools.count()


def start_group(device):
    """Let the processes that torchrun started find each other, each time under a name of its own: the addresses of an
    earlier group are still there. On a CPU they share its cores, where torchrun gives each a single one."""
    store, rank, world = next(torch.distributed.rendezvous("env://"))
    store = torch.distributed.PrefixStore(f"group {next(GROUPS)}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world)
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", world))))


def backward(network, inputs, targets, counted, coords, accumulate):
    """Accumulate the gradient of the loss averaged over the counted tokens of the whole batch; returns that loss.
    Each process works through every world-th row, in `accumulate` parts. All divide by the count of the whole batch,
    so the parts add up to its mean however the hidden tokens are spread over them."""
    rank, world = process_rank()
    if len(inputs) < world * accumulate:
        raise ValueError(f"a batch of {len(inputs)} cannot be split over {world} processes x {accumulate} parts")
    total = torch.zeros((), device=inputs.device)
    for i, rows in enumerate(torch.arange(rank, len(inputs), world, device=inputs.device).tensor_split(accumulate)):
        # Processes exchange gradients once, after the last part.
        with contextlib.nullcontext() if world == 1 or i == accumulate - 1 else network.no_sync():
            logits = network(inputs[rows], coords if coords.ndim == 2 else coords[rows]).float()
            loss = masked_cross_entropy(logits, targets[rows], counted[rows], count=counted.sum())
            (loss * world).backward()  # DistributedDataParallel averages over the processes
        total += loss.detach()
    if world > 1:
        torch.distributed.all_reduce(total)
    return total


class Run:
    """The progress of a training: all that a resumed one needs to go on to the very same weights."""

    PROGRESS = ("step", "seconds", "loss_sum", "history")

    def __init__(self, model, recipe, out=None, best_by=None):
        self.model = model
        self.recipe = recipe
        self.path = Path(out, "model.pt") if out else None
        self.best_by = best_by
        self.best = None  # the model whose column `best_by` was the lowest
        self.optimizers = make_optimizers(model, recipe)
        self.step = 0
        self.seconds = 0.0
        self.history = []  # the rows of log.csv
        self.loss_sum = 0.0  # since the last of them
        self.lr = 0.0  # of the last step, as is
        self.gradient_norm = 0.0  # before it was clipped
        self.started = time.monotonic()
        self.printed = [(self.started, 0)]  # when and at which step, in the last seconds
        self.checkpointed = self.started
        self.last_written = self.written()

    def update(self, loss):
        """Step with the gradients at hand."""
        self.gradient_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.lr = self.recipe.lr * learning_rate_factor(self.step, self.recipe)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr
            with WithoutBf16() if self.recipe.precision == "float32" else contextlib.nullcontext():
                optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.loss_sum = self.loss_sum + loss
        self.seconds = time.monotonic() - self.started

    def report(self, validate, belongings):
        """Show the progress, and write log.csv and model.pt when it is time."""
        last = self.step == self.recipe.steps
        if self.path:  # at the first step, since it may be impossible, and whenever somebody has removed it
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self.print_progress(last)
        if last or self.step % max(1, self.recipe.steps // self.recipe.log_rows) == 0:
            self.log(validate)
        if last or time.monotonic() - self.checkpointed > CHECKPOINT_SECONDS:
            self.save(belongings)

    def mean_loss(self):
        return float(self.loss_sum) / (self.step - (self.history[-1]["step"] if self.history else 0))

    def require_finite(self):
        weights = all(bool(p.isfinite().all()) for p in self.model.parameters())
        if not (weights and math.isfinite(float(self.loss_sum) + float(self.gradient_norm))):
            raise ValueError(f"loss or weights are no longer finite at step {self.step}; try a lower learning rate")

    def print_progress(self, last):
        """On a terminal the line rewrites itself every second; elsewhere there is a new one every 10 seconds."""
        terminal = sys.stderr.isatty()
        now = time.monotonic()
        if last or now - self.printed[-1][0] > (1 if terminal else 10):
            self.printed = [mark for mark in self.printed if now - mark[0] < 10] or self.printed[-1:]
            since, before = self.printed[0]
            self.printed.append((now, self.step))
            speed = (self.step - before) / (now - since)
            steps = self.recipe.steps
            minutes, seconds = divmod(round((steps - self.step) / speed), 60)
            line = f"step {self.step}/{steps}  loss {self.mean_loss():.4f}  {speed:.1f} steps/s  "
            end = "\r" if terminal and not last else "\n"
            print(f"{line}{minutes}:{seconds:02d} left   ", end=end, file=sys.stderr, flush=True)

    def log(self, validate):
        """Add a row to history, with the figures of the validated model, and write log.csv."""
        self.require_finite()
        row = dict(step=self.step, loss=self.mean_loss(), seconds=round(self.seconds, 2), lr=self.lr)
        row |= dict(gradient_norm=float(self.gradient_norm))
        if validate:
            with torch.no_grad():
                figures = validate(self.model.eval())
            self.model.train()
            row |= validated(figures, row, self.best_by)
        self.history.append(row)
        self.loss_sum = 0.0
        if self.best_by and row[self.best_by] <= self.lowest():
            self.best = copy.deepcopy(self.model)
        if self.path:
            columns = list(dict.fromkeys(name for past in self.history for name in past))
            lines = [columns, *([past.get(name, "") for name in columns] for past in self.history)]
            with whole_file(self.path.with_name("log.csv")) as file:
                file.write("".join(",".join(map(str, line)) + "\n" for line in lines).encode())

    def lowest(self):
        """The lowest of the column `best_by` so far; inf if there is no number in it."""
        figures = [row.get(self.best_by, math.nan) for row in self.history]
        return min((figure for figure in figures if not math.isnan(figure)), default=math.inf)

    def written(self):
        """When the checkpoint was written, in seconds; -inf if there is none."""
        return self.path.stat().st_mtime if self.path and self.path.exists() else -math.inf

    def save(self, belongings):
        self.require_finite()
        progress = {name: getattr(self, name) for name in self.PROGRESS}
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        training = dict(progress=progress, model=self.model.state_dict(), optimizers=optimizers)
        if self.path:
            if self.written() > self.last_written + 2:  # not all file systems are exact to the second
                raise ValueError(f"another run has written {self.path}; --out renames")
            state = dict(config=asdict(self.recipe), step=self.step, training=training)
            save_checkpoint(self.path, self.best or self.model, **state, **belongings)
        self.last_written = self.written()
        self.checkpointed = time.monotonic()

    def resume(self, device):
        """Go on where the run that wrote the checkpoint stopped; ValueError if its model or recipe was another."""
        checkpoint = load_checkpoint(self.path, device)
        before = (checkpoint["config"] or {}) | checkpoint["model"].config
        now = asdict(self.recipe) | self.model.config
        for name in sorted(before.keys() | now.keys()):
            if (was := before.get(name)) != now.get(name):
                raise ValueError(f"{self.path} was trained with {name}={was}, not {now.get(name)}; resume as it was")
        try:
            training = checkpoint["training"]
            for name in self.PROGRESS:
                setattr(self, name, training["progress"][name])
            states = [training["model"], *training["optimizers"]]
            for part, state in zip([self.model, *self.optimizers], states, strict=True):
                part.load_state_dict(state)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path} holds no training that fits this run: {error}".splitlines()[0]) from None
        self.best = checkpoint["model"] if self.best_by and self.lowest() < math.inf else None
        self.printed = [(self.started, self.step)]
        self.started -= self.seconds


def validated(figures, row, best_by):
    """The figures as numbers; ValueError if they are none, share a name with the row's own, or lack `best_by`."""
    if taken := figures.keys() & row.keys():
        raise ValueError(f"validate gives {', '.join(map(repr, sorted(taken)))}, which log.csv has already")
    if best_by and best_by not in figures:
        raise ValueError(f"validate gives no {best_by!r} to choose the best model by, but {', '.join(figures)}")
    try:
        return {name: float(value) for name, value in figures.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"validate must give numbers: {error}".splitlines()[0]) from None


def make_optimizers(model, recipe):
    """[AdamW], or for "muon" [AdamW, Muon] with the matrices of the blocks on Muon (torch.optim), which makes each
    update orthogonal, scaled to AdamW's size so that both share lr. Only those matrices decay."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    taken = {id(p) for p in matrices}
    groups = [dict(params=[p for p in model.parameters() if id(p) not in taken], weight_decay=0.0)]
    decay = dict(lr=recipe.lr, weight_decay=recipe.weight_decay)
    if recipe.optimizer == "adamw":
        groups.append(dict(params=matrices, **decay))
        return [torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)]
    adamw = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)
    return [adamw, torch.optim.Muon(matrices, **decay, adjust_lr_fn="match_rms_adamw")]


class WithoutBf16(TorchFunctionMode):
    """Tensor.bfloat16() only copies. torch.optim's Muon multiplies in bf16 whatever the precision of the training, and
    a processor without it is slow at that."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return args[0].clone() if function is torch.Tensor.bfloat16 else function(*args, **(kwargs or {}))


def learning_rate_factor(step, recipe):
    """What the learning rate is multiplied by at a step: a linear rise over the warm-up, then 1, or a fall to 0."""
    rise = min(1.0, (step + 1) / (recipe.warmup + 1))
    if recipe.decay == "constant":
        return rise
    return rise * (1 - max(0, step - recipe.warmup) / max(1, recipe.steps - recipe.warmup))


def step_seed(seed, step, rank=0):
    """A seed of its own for each step and process of a run."""
    return ((seed * 1_000_003 + step) * 1_009 + rank) % 2**63


def precision_context(device, precision):
    """Run what is inside in "float32", or in "bf16" by autocast; weights and loss stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def process_rank():
    """(rank, number of processes) of the group there is, or as torchrun says; (0, 1) without either."""
    if in_group():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def require_no_run(out, resume, force):
    """ValueError if a run would overwrite the one in its folder."""
    if Path(out, "model.pt").exists() and not (resume or force):
        holds = f"{out} holds a run already"
        raise ValueError(f"{holds}: resume goes on with it, force starts over, another out keeps both")


@contextlib.contextmanager
def whole_file(path):
    """A file to write to that takes its name once it is whole: until then a temporary one beside it has what is
    written, and nothing is left of that if it fails."""
    path = Path(path)
    partial = Path(f"{path}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_checkpoint(path, model, *, tokenizer=None, extra=None, config=None, step=0, training=None):
    """Write model.pt, whole or not at all; ValueError if the config has more than plain values, or extra more than
    tensors."""
    model = unwrapped(model)
    if not all(isinstance(value, torch.Tensor) for value in (extra or {}).values()):
        raise ValueError("extra is no dict of tensors")
    contents = dict(architecture=model.config, weights=model.state_dict(), config=plain(config, "config"))
    contents |= dict(step=plain(step, "step"), training=training, extra=extra)
    if tokenizer:
        centroids = torch.from_numpy(tokenizer.centroids)
        contents["tokenizer"] = dict(centroids=centroids, patch=tokenizer.patch, stride=tokenizer.stride)
    with whole_file(path) as file:
        torch.save(contents, file)


def read_tensors(path, device):
    """What torch.save has written, without running code in it; an error if a checksum is wrong."""
    with zipfile.ZipFile(path) as archive:
        if broken := archive.testzip():  # torch.load does not compare them
            raise ValueError(f"{broken} has another checksum")
    return torch.load(path, map_location=device, weights_only=True)


def load_checkpoint(path, device="cpu"):
    """What save_checkpoint wrote, as a dict: model (MaskGIT on `device`, in eval mode), tokenizer (PatchTokenizer, or
    None where the tokens are the pixels), extra, config, step, and training, which train(resume=True) goes on from.
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
        rest = {name: saved[name] for name in ("config", "step", "training")} | {"extra": saved.get("extra")}
    except Exception as error:  # torch.load raises half a dozen types on damaged files
        raise ValueError(f"{path} is damaged or no checkpoint: {error}".splitlines()[0]) from None
    return dict(model=model, tokenizer=tokenizer, **rest)


# ---------------------------------------------------------------------------------------------------
# For the scripts
#
# Command line, records and pictures: a copy of this file may end here.

import argparse
import ctypes
import hashlib
import json
import platform
import re
import shlex
import subprocess

from PIL import Image, ImageDraw, ImageFont


@dataclass(frozen=True)
class Experiment(Recipe):
    """All that decides the weights of a script's run: a Recipe, with its batches and its model."""

    batch_size: int = setting(64, "rows of a batch, of all processes together", low=1)
    mask: str = setting("cosine", "single, a schedule, a share, box, half, or several of them, as 0.2+cosine")
    dim: int = setting(64, "width of the model", low=1)
    heads: int = setting(4, "of attention", low=1)
    layers: int = setting(4, "blocks of the model", low=1)
    hidden: int | None = setting(None, "width of the MLPs; where it has no default, 4 x dim", low=1)
    dropout: float = setting(0.0, "in the blocks", low=0.0, below=1.0)
    norm: str = setting("pre", "where the blocks have their norms", choices=NORMS)
    head: str = setting("linear", "what gives the logits", choices=HEADS)
    learn_temperature: bool = setting(False, "of the cosine head")
    positions: str = setting("split", "layout of the position encoding; printed is S1's", choices=LAYOUTS)
    rotary: bool = setting(True, "attention sees differences of positions")

    def __post_init__(self):
        super().__post_init__()
        mask_kinds(self.mask)

    def new_model(self, codes, device):
        torch.manual_seed(self.seed)
        options = dict(norm=self.norm, head=self.head, positions=self.positions, rotary=self.rotary)
        options |= dict(hidden=self.hidden, dropout=self.dropout, learn_temperature=self.learn_temperature)
        return MaskGIT(codes, self.dim, self.heads, self.layers, **options).to(device)


class CommandLine(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line on stderr, with exit code 2."""

    def __init__(self, description=None, **options):
        options |= dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        super().__init__(description=description, **options)

    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")

    def given(self):
        """The names of what the command line has, without those that have their default."""
        default = object()
        found = self.parse_args(namespace=argparse.Namespace(**dict.fromkeys(vars(self.parse_args()), default)))
        return {name for name, value in vars(found).items() if value is not default}


def value_of(flag, default=None):
    """What the command line has for a flag on which the defaults of others depend."""
    parser = CommandLine(add_help=False)
    parser.add_argument(flag, dest="value", default=default)
    return parser.parse_known_args()[0].value


def add_run_flags(parser, out):
    """The flags of every script's run that do not touch its weights."""
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--out", type=named, default=Path(out), help="folder of the run, default %(default)s")
    add("--json", type=named, help="write the figures to this file as well")
    either = group.add_mutually_exclusive_group().add_argument
    either("--resume", action="store_true", help="go on with the run in --out")
    either("--force", action="store_true", help="start over in a folder that holds a run")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or (not tested) mps")


def add_flags(parser, settings, **defaults):
    """A flag for each field of a dataclass of Settings, some with other defaults."""
    add = parser.add_argument_group(settings.__name__.lower()).add_argument
    for each in filter(lambda each: each.metadata["help"], fields(settings)):
        default = getattr(settings(**defaults), each.name)
        options = {"default": default, "help": each.metadata["help"]}
        if default is not None:
            options["help"] += "; default %(default)s"
        if each.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": kind_of(each), "choices": each.metadata["check"]["choices"]}
        if get_origin(each.type) is tuple:
            options["nargs"] = "+"
        add(f"--{each.name.replace('_', '-')}", **options)


def settings_from(arguments, settings):
    """The dataclass of Settings whose flags were given."""
    values = {each.name: getattr(arguments, each.name) for each in fields(settings) if each.metadata["help"]}
    return settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def named(text):
    """An argparse type: a path; an empty one, such as that of a variable that is not set, would be this folder."""
    if not text:
        raise argparse.ArgumentTypeError("a name is empty")
    return Path(text)


def at_least(low):
    """An argparse type: an integer that is not below `low`."""

    def number(text):
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is below {low}")
        return int(text)

    return number


def run_as_script(main):
    """Call main(). Bad input (ValueError, OSError) and too little memory end in one line on stderr and exit code 2,
    Ctrl-C in 130. Of several processes the first alone writes to the screen."""
    keep_freed_memory()
    if process_rank()[0] > 0:
        sys.stdout = None  # print() then does nothing
    try:
        main()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        lacking = f"not enough memory: {error}".splitlines()[0]
        print(f"error: {error if isinstance(error, (ValueError, OSError)) else lacking}", file=sys.stderr)
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
    """The torch.device for "auto" (CUDA where there is one, else CPU), "cpu", "cuda", "cuda:N" or "mps"."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises all three
        raise ValueError(f"device {name!r} cannot be used: {error}".splitlines()[0]) from None


def open_run(arguments):
    """The device of a script's run; ValueError if its folder holds a run that it would overwrite."""
    require_no_run(arguments.out, arguments.resume, arguments.force)
    return pick_device(arguments.device)


CPU_LIMITS = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")  # in the environment


def run_record():
    """Where a number comes from: command, commit, digests of the project's files that are in use, machine, versions and
    date, as plain values, and for write_figures when it started. To be asked at the start of a run, since the code may
    change while it runs."""
    here = Path(__file__).resolve().parent
    script = Path(sys.argv[0]).resolve()
    script = script.relative_to(here) if script.is_relative_to(here) else script.name
    limits = [f"{name}={os.environ[name]}" for name in CPU_LIMITS if name in os.environ]
    failed, commit = subprocess.getstatusoutput(f"git -C {shlex.quote(str(here))} rev-parse --short HEAD")
    loaded = {Path(module.__file__) for module in list(sys.modules.values()) if getattr(module, "__file__", None)}
    ours = sorted(path for path in loaded if path.parent in (here, here / "benchmarks", here / "extras"))
    info = Path("/proc/cpuinfo")
    cpu = re.search("model name.*: (.*)", info.read_text() if info.exists() else "")
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return {
        "command": shlex.join([*limits, "python", str(script), *sys.argv[1:]]),
        "commit": "unknown" if failed else commit,
        "code": {str(path.relative_to(here)): file_digest(path)[:12] for path in ours},
        "machine": f"{cpu[1] if cpu else platform.processor()}, {os.cpu_count()} cores, {platform.system()}{gpu}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "started": time.monotonic(),
    }


def file_digest(path):
    """SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write_figures(record, settings, figures, *paths):
    """The figures, the settings (a dict), where they come from and how many minutes they took, as JSON to each of the
    paths that is not None."""
    settings = {name: str(value) if value == math.inf else value for name, value in settings.items()}
    record = record | {"minutes": round((time.monotonic() - record["started"]) / 60, 1)}
    del record["started"]
    text = json.dumps({**record, "settings": settings, **figures}, indent=1, default=str) + "\n"
    for path in filter(None, paths):
        with whole_file(path) as file:
            file.write(text.encode())


def print_table(head, rows):
    """Text in columns: the first one to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for first, *others in [head, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))
    print()


INK = (40, 40, 40)
FAINT = (225, 225, 225)
FRAME = (170, 190, 215)
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
COLOURS += ["#000000", "#999933", "#882255", "#44aa99", "#aa4499", "#888888", "#661100"]


def image_grid(images, columns, *, scale=1, gap=4, titles=()):
    """Images (B, H, W, C), float in [0, 1], C 1 or 3, in rows of `columns` with titles above them, each pixel `scale`
    wide: a PIL image."""
    pixels = (np.asarray(images).clip(0, 1) * 255).round().astype(np.uint8).repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = pixels.shape
    rows = math.ceil(count / columns)
    top = 22 if titles else 0
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
    font = ImageFont.load_default(26)
    levels = {label: y for label, y in (references or {}).items() if y > 0 or not log_y}
    lines = {}
    for label, curve in curves.items():
        points = [(float(x), float(y)) for x, y in zip(*curve, strict=True) if math.isfinite(x + y)]
        if shown := [(x, y) for x, y in points if (x > 0 or not log_x) and (y > 0 or not log_y)]:
            lines[label] = shown
    if not lines:
        raise ValueError(f"nothing to plot in {title!r}")
    xs, ys = zip(*sum(lines.values(), []), strict=True)
    left, top, bottom = 160, 120, 960  # twice the size of the picture, for smooth lines
    right = min(1300, 1680 - max(map(font.getlength, [*lines, *levels])))
    x_at, x_ticks = axis(xs, left, right, log_x)
    y_at, y_ticks = axis([*ys, *levels.values()], bottom - 24, top, log_y)
    lines |= {label: [(min(xs), y), (max(xs), y)] for label, y in levels.items()}
    sheet = Image.new("RGB", (1800, 1100), "white")
    pen = ImageDraw.Draw(sheet)
    for tick in x_ticks:
        pen.line([(x_at(tick), bottom), (x_at(tick), top)], fill=FAINT, width=2)
        pen.text((x_at(tick), bottom + 14), f"{tick:g}", fill=INK, font=font, anchor="mt")
    for tick in y_ticks:
        pen.line([(left, y_at(tick)), (right, y_at(tick))], fill=FAINT, width=2)
        pen.text((left - 14, y_at(tick)), f"{tick:g}", fill=INK, font=font, anchor="rm")
    pen.line([(left, top), (left, bottom), (right, bottom)], fill=INK, width=3)
    pen.text((left, 36), title, fill=INK, font=ImageFont.load_default(34), anchor="lm")
    pen.text((left, 90), y_label, fill=INK, font=font, anchor="lm")
    pen.text((right, bottom + 70), x_label, fill=INK, font=font, anchor="rm")
    for i, (label, line) in enumerate(lines.items()):
        style = {"fill": COLOURS[i % len(COLOURS)], "width": 3 if label in levels else 5}
        legend = top + 20 + 44 * i
        pen.line([(x_at(x), y_at(y)) for x, y in line], joint="curve", **style)
        pen.line([(right + 30, legend), (right + 90, legend)], **style)
        pen.text((right + 104, legend), label, fill=INK, font=font, anchor="lm")
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
