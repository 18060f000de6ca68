"""R1 and R2's experiment: photographs with holes, filled in by MaskGIT on k-means tokens.

    python inpaint.py                                   drawn cartoon cats: train, fill, score; nothing to download
    python inpaint.py --data FOLDER --out runs/mine     the same on your own pictures
    python inpaint.py --checkpoint runs/inpaint/model.pt --images DIR --masks DIR --out DIR      fill holes

A mask has its image's size: white is visible, black is the hole (--invert-masks: the other way round), and the name of
its image, with "mask" or a number added, or its number. A token with any hole pixel is hidden, and predicted from the
others; a small network, the painter, then corrects its pixels by what is visible. This comes back as it was. Files are
of any format that Pillow reads.

A run leaves model.pt, log.csv, metrics.json and its pictures in runs/inpaint (--out).
"""

import collections
import functools
import hashlib
import itertools
import math
import re
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import maskgit
import numpy as np
import torch
import torch.nn.functional as F
from maskgit import setting
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from torch import nn

NO_PIXELS = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow knows, but cannot decode
# What may be white in a file of more than 8 bits, by its mode: the first that is not too dark for its values.
WHITE = {"F": (1, 255, 65535), "I": (255, 65535)} | dict.fromkeys(("I;16", "I;16L", "I;16B", "I;16N"), (65535,))
# Where training and validation end in the range of the images' hashes, [0, 1). Of 8,303 distinct photographs they leave
# 517 for validation and 785 for the test, which is about as many as R1 and R2 had (747).
PART_ENDS = (0.843, 0.903)
MASK = re.compile("masks?")
CODEBOOK_IMAGES = 1200  # whose patches the codebook is fitted to
NOISES = 6  # of pixel_evidence; this and the next two by validation pictures
LEAST_NOISE = (4 / 255) ** 2
CORRELATED = 4
PAINTER_SEED = 4
PAINTER_BATCH = 16
PAINTER_RATE = 3e-3
PAINTER_NOISE = 0.15  # the most, of pixels in [0, 1]
HOLE_SHARE = 0.24  # of the pixels, as in R1 and R2's masks
TRAINING_SEED = 3  # of the holes
VALIDATION_SEED = 1
TEST_SEED = 2
VALIDATION_IMAGES = 200
GREY = 128  # what R1 and R2 paint the hole with
AT_ONCE = 64  # pictures that the model is given, whatever their number


def brush_hole(rng, size):
    """Strokes of a brush 3 pixels wide that wanders until HOLE_SHARE of the pixels is gone, like the reports' masks."""
    canvas = Image.new("1", (size, size))
    pen = ImageDraw.Draw(canvas)
    while np.asarray(canvas).mean() < HOLE_SHARE:
        x, y = rng.uniform(0, size, 2)
        for dx, dy in rng.normal(0, size / 32, (size, 2)):
            pen.line([(x, y), (x + dx, y + dy)], fill=1, width=max(1, round(3 * size / 64)))
            x = min(max(x + dx, 0), size)
            y = min(max(y + dy, 0), size)
    return np.asarray(canvas)


def box_hole(rng, size):
    """A square of HOLE_SHARE of the pixels."""
    hole = np.zeros((size, size), bool)
    side = round(size * HOLE_SHARE**0.5)
    y, x = rng.integers(size - side + 1, size=2)
    hole[y : y + side, x : x + side] = True
    return hole


def half_hole(rng, size):
    """One of the four halves."""
    hole = np.zeros((size, size), bool)
    hole[:, : size // 2] = True
    return np.rot90(hole, rng.integers(4))


HOLES = {"brush": brush_hole, "box": box_hole, "half": half_hole}


@dataclass(frozen=True)
class Inpainting(maskgit.Experiment):
    """All that decides the weights of a run."""

    pictures_sha256: str = setting("", "")
    cartoons: int = setting(6000, "number of cats, without --data", low=1)
    size: int = setting(64, "pixels per side of a picture; SSIM needs 11", low=11)
    patch: int = setting(4, "pixels per side of a token", low=1)
    codes: int = setting(1024, "of the codebook", low=2)
    mirror: bool = setting(True, "train on mirrored pictures as well")
    hole: str = setting("brush", "of validation and scores", choices=HOLES)
    hole_rows: float = setting(0.5, "share of a batch that hides holes; the rest hides --mask", low=0.0, below=1.0)
    painter_steps: int = setting(1000, "updates of the painter", low=1)

    def __post_init__(self):
        super().__post_init__()
        if self.size % self.patch:
            raise maskgit.InputError(f"size {self.size} is not divisible by patch {self.patch}")


@dataclass(frozen=True)
class Filling:
    """How the holes are filled."""

    decode_steps: int = setting(10, "network calls", low=1)
    schedule: str = setting("cosine", "of decode", choices=maskgit.SCHEDULES)
    order: str = setting("confidence", "of decode", choices=maskgit.ORDERS)
    sample: str = setting("categorical", "mean: the least error", choices=("categorical", "argmax", "mean"))
    temperature: float = setting(0.4, "of the samples", low=1e-6)
    choice_temperature: float = setting(1.0, "of the order by confidence", low=0.0)
    evidence: bool = setting(True, "use the visible pixels of tokens that lie partly in a hole")

    def __post_init__(self):
        maskgit.check_settings(self)


# ---------------------------------------------------------------------------------------------------
# Pictures


def picture_files(path, apart=()):
    """The picture files of a folder in the order of their names, or the file itself. Hidden ones are none, nor what is
    `apart`: some of its files or folders. How many others are left out is printed by suffix."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise maskgit.InputError(f"there is no folder or file {path}")
    root = path.resolve()
    apart = {each.resolve() for each in apart if each}
    if root in apart:
        raise maskgit.InputError(f"{path} cannot be read from and written to: --out renames")
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN.keys() - NO_PIXELS}
    files = []
    others = collections.Counter()
    for file in sorted(path.rglob("*")):
        inside = file.relative_to(path)
        hidden = any(part.startswith(".") for part in inside.parts)
        if hidden or not apart.isdisjoint([root / inside, *(root / part for part in inside.parents[:-1])]):
            continue
        if file.is_dir():
            others["linked folder"] += file.is_symlink()  # Python does not look into it
        elif file.suffix.lower() in known:
            files.append(file)
        else:
            others[file.suffix.lower() or "no suffix"] += 1
    if left_out := [f"{count} {suffix}" for suffix, count in sorted(others.items()) if count]:
        print(f"{path}: left out as no pictures: {', '.join(left_out)}")
    if not files:
        raise maskgit.InputError(f"{path} holds no pictures")
    return files


def read_image(file, prepare):
    """prepare(image) of the image in a file, upright as its EXIF says; ValueError if one of the two fails."""
    try:
        with Image.open(file) as image:
            return prepare(ImageOps.exif_transpose(image))
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many types
        raise maskgit.InputError(f"{file} cannot be read: {error}") from None


def eight_bits(image):
    """The image, with levels of more than 8 bits or of floats brought to 8."""
    if image.mode not in WHITE:
        return image
    values = np.asarray(image).astype(np.float32)
    low, high = values.min(), values.max()
    scales = WHITE[image.mode]
    white = next((white for white in scales if high <= 1.01 * white and (high > white / 100 or white == scales[0])), 0)
    if not low >= -0.01 * white or not white:
        raise maskgit.InputError(f"its values, {low:g} to {high:g}, are no brightness; save it with 8 bits")
    return Image.fromarray((values / white * 255).round().clip(0, 255).astype(np.uint8))


def read_picture(file):
    """The picture in a file, in RGB."""
    return read_image(file, lambda image: eight_bits(image).convert("RGB"))


class Split(NamedTuple):
    """Pictures (N, size, size, 3) uint8 each, in files."""

    training: np.memmap
    validation: np.memmap
    test: np.memmap


def open_pictures(folder, cartoons, size, seed, out=None):
    """A Split of a folder's distinct pictures, centre-cropped and resized, or without a folder of so many cartoon cats;
    and the SHA-256 of them all. What is in `out` is no picture. The part of a picture depends on its pixels alone, so
    that adding others never moves it from test to training. All lie in temporary files (TMPDIR says where), so that
    memory does not limit them."""
    sources = picture_files(folder, [out]) if folder else cartoon_cats(cartoons, size, seed)
    files = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115  they are closed with the arrays
    digests = [set(), set(), set()]
    together = hashlib.sha256()
    duplicates = 0
    for source in sources:
        try:
            image = read_picture(source) if folder else Image.fromarray(source)
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        pixels = np.asarray(image)
        digest = hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).digest()
        part = np.searchsorted(PART_ENDS, int.from_bytes(digest[:6], "big") / 2**48, side="right")
        if digest in digests[part]:
            duplicates += 1
        else:
            digests[part].add(digest)
            together.update(digest)
            files[part].write(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS).tobytes())
    distinct = sum(map(len, digests))
    if folder:
        print(f"{folder}: {distinct} distinct pictures, {duplicates} duplicates left out")
    if min(map(len, digests)) < 2:
        raise maskgit.InputError(f"{distinct} distinct pictures are too few for training, validation and test")
    split = Split(*(np.memmap(file, np.uint8, "r+").reshape(-1, size, size, 3) for file in files))
    return split, together.hexdigest()


# ---------------------------------------------------------------------------------------------------
# Cartoon cats

FUR = [(232, 158, 70), (120, 118, 122), (60, 56, 60), (222, 205, 180), (150, 100, 62), (245, 240, 232), (182, 140, 98)]
EYES = [(108, 178, 74), (238, 184, 48), (82, 150, 210), (176, 200, 80), (206, 122, 40)]
WALLS = [(150, 190, 220), (235, 200, 190), (190, 215, 170), (240, 225, 170), (200, 185, 225), (120, 145, 150)]


def cartoon_cats(count, size, seed=0):
    """The first `count` cats of an endless series: uint8 (count, size, size, 3)."""
    return np.stack([cartoon_cat(np.random.default_rng([seed, i]), size) for i in range(count)])


def colour(values):
    return tuple(int(value) for value in values)


def cartoon_cat(rng, size):
    """A cat's face by the numbers of `rng`: uint8 (size, size, 3)."""
    canvas = Image.new("RGB", (256, 256))
    pen = ImageDraw.Draw(canvas)
    paint_room(pen, rng)
    x, y = 128 + rng.normal(0, 8, 2) + (0, 8)
    width = rng.uniform(70, 92)
    height = rng.uniform(60, 78)
    fur, second = (np.array(FUR[i]) for i in rng.choice(len(FUR), 2, replace=False))
    dark = colour(fur * 0.72)
    light = colour(fur * 0.4 + np.array([255, 250, 240]) * 0.6)
    pattern = rng.choice(["plain", "tabby", "mask", "patch", "siamese"])
    ellipse(pen, x, y + 130, width * 1.05, 80, colour(fur * 0.9))  # the body
    paint_ears(pen, rng, x, y, width, height, dark if pattern == "siamese" else colour(fur))
    ellipse(pen, x, y, width, height, colour(fur))
    paint_pattern(pen, pattern, x, y, width, height, dark, light, colour(second))
    for side in (-1, 1):  # the muzzle
        muzzle = dark if pattern == "siamese" else light
        ellipse(pen, x + side * width * 0.2, y + height * 0.32 + 18, width * 0.26, height * 0.22, muzzle)
    paint_eyes(pen, rng, x, y, width, height)
    paint_nose(pen, rng, x, y + height * 0.32, width)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX))


def ellipse(pen, x, y, width, height, fill):
    pen.ellipse([x - width, y - height, x + width, y + height], fill)


def paint_room(pen, rng):
    wall = np.array(WALLS[rng.integers(len(WALLS))])
    pen.rectangle([0, 0, 256, 256], fill=colour(wall))
    if rng.random() < 0.4:
        step = rng.integers(28, 52)
        for left in range(-step, 256, step):
            pen.rectangle([left, 0, left + step // 2, 256], fill=colour(wall * 0.9))
    if rng.random() < 0.5:  # the floor
        pen.rectangle([0, rng.integers(180, 225), 256, 256], fill=colour(wall * 0.7))


def paint_ears(pen, rng, x, y, width, height, fill):
    ear = rng.uniform(46, 66)
    lean = rng.choice((0.55, 0.8))
    for side in (-1, 1):
        tip = (x + side * width * (lean + 0.22), y - height * 0.55 - ear)
        outer = [tip, (x + side * width * 0.96, y - height * 0.15), (x + side * width * 0.22, y - height * 0.85)]
        inner = [tuple(0.58 * np.array(corner) + 0.42 * np.mean(outer, axis=0)) for corner in outer]
        pen.polygon(outer, fill=fill)
        pen.polygon(inner, fill=(230, 160, 160))


def paint_pattern(pen, pattern, x, y, width, height, dark, light, second):
    if pattern == "tabby":
        for shift in (-0.24, 0, 0.24):
            pen.line([(x + shift * width, y - height * 0.93), (x + shift * width * 0.8, y - height * 0.5)], dark, 9)
        for side, row in itertools.product((-1, 1), (0.1, 0.35)):
            start = (x + side * width * 0.97, y + height * row)
            pen.line([start, (x + side * width * 0.62, y + height * (row + 0.06))], dark, 8)
    elif pattern == "mask":
        cheeks = [(x - width * 0.5, y + height * 0.75), (x + width * 0.5, y + height * 0.75)]
        pen.polygon([(x, y - height * 0.7), *cheeks], light)
    elif pattern == "patch":
        pen.pieslice([x - width, y - height, x + width, y + height], 265, 20, fill=second)
    elif pattern == "siamese":
        ellipse(pen, x, y + height * 0.2, width * 0.62, height * 0.68, dark)


def paint_eyes(pen, rng, x, y, width, height):
    apart = width * rng.uniform(0.42, 0.48)
    level = y - height * rng.uniform(0.05, 0.1)
    radius = rng.uniform(18, 22)
    iris = EYES[rng.integers(len(EYES))]
    slit = rng.choice((0.3, 0.8))
    closed = rng.random() < 0.1
    for centre in (x - apart, x + apart):
        if closed:
            pen.arc([centre - radius, level - radius, centre + radius, level + radius], 20, 160, (30, 25, 25), 6)
            continue
        ellipse(pen, centre, level, radius + 3, radius + 1, (30, 25, 25))
        ellipse(pen, centre, level, radius, radius - 2, iris)
        ellipse(pen, centre, level, radius * slit * 0.7, radius * 0.85, (15, 12, 12))
        ellipse(pen, centre - radius * 0.3, level - radius * 0.35, 5, 5, (255, 255, 255))


def paint_nose(pen, rng, x, nose, width):
    """With the mouth and the whiskers."""
    pink = (225, 130, 140) if rng.random() < 0.7 else (70, 50, 50)
    pen.polygon([(x - 12, nose - 7), (x + 12, nose - 7), (x, nose + 8)], fill=pink)
    for side in (-1, 1):
        left = x - 20 if side < 0 else x
        pen.arc([left, nose + 2, left + 20, nose + 22], 10, 170, (50, 35, 35), 4)
        for tilt in (-10, 0, 10):
            start = (x + side * width * 0.38, nose + 14 + tilt / 2)
            pen.line([start, (x + side * width * 1.15, nose + 10 + tilt * 1.8)], (250, 250, 250), 3)


# ---------------------------------------------------------------------------------------------------
# Holes and what fills them


def make_holes(kind, count, size, seed):
    """Random holes: bool (count, size, size), True = to be filled."""
    return np.stack([HOLES[kind](np.random.default_rng([seed, i]), size) for i in range(count)])


def with_holes(images, kind, seed):
    """The images and random holes of a kind in them."""
    return images, make_holes(kind, len(images), images.shape[1], seed)


def hidden_tokens(tokenizer, holes):
    """The tokens (B, T) with any pixel in holes (B, S, S)."""
    patches = maskgit.image_patches(holes[..., None], tokenizer.patch, tokenizer.patch)
    return torch.from_numpy(patches.any(axis=-1)).flatten(1)


def model_input(checkpoint, images, holes, informed, targets=True):
    """What decode takes, on the model's device: tokens (B, T), mask (B, T), coords (T, 2) and evidence, or without
    being `informed` None. A token with any hole pixel is hidden; with `targets` it is the true one, or else any. Images
    are uint8 (B, S, S, 3), holes (B, S, S)."""
    tokenizer = checkpoint["tokenizer"]
    device = next(checkpoint["model"].parameters()).device
    pixels = images / np.float32(255)
    hidden = hidden_tokens(tokenizer, holes)
    tokens = tokenizer.encode(paste(pixels, holes, np.float32(np.nan)))  # one may see the whole picture, but no hole
    if targets:
        tokens = np.where(hidden.view(tokens.shape), tokenizer.encode(pixels), tokens)
    tokens = torch.from_numpy(tokens)  # (B, h, w)
    tensors = tokens.flatten(1), hidden, maskgit.grid_coords(*tokens.shape[1:])
    evidence = pixel_evidence(tokenizer, images, holes).to(device) if informed else None
    return *(tensor.to(device) for tensor in tensors), evidence


def fill(checkpoint, images, holes, filling, seed=0, trace=None, whole=False):
    """Images (B, S, S, 3) uint8 whose holes (B, S, S) are filled by the model of a checkpoint of open_model, in
    the way of a Filling; trace goes to decode. `whole` shows the tokens of what is visible, too. The sample "mean" is
    what is expected in the holes: of all fillings that of the least squared error. It takes no evidence, by which
    strokes in photographs would lose."""
    tokenizer = checkpoint["tokenizer"]
    informed = filling.evidence and filling.sample != "mean"
    tokens, mask, coords, evidence = model_input(checkpoint, images, holes, informed, targets=False)
    if filling.sample == "mean":
        decoded = expected_pictures(checkpoint, tokens, mask, coords)
    else:
        order = filling.order
        if order == "confidence":
            order = functools.partial(maskgit.by_confidence, choice_temperature=filling.choice_temperature)
        options = dict(steps=filling.decode_steps, schedule=filling.schedule, order=order, sample=filling.sample)
        options |= dict(temperature=filling.temperature, evidence=evidence, trace=trace)
        generator = torch.Generator(tokens.device).manual_seed(seed)
        with maskgit.precision_context(tokens.device, maskgit.fast_precision(tokens.device)):
            tokens = maskgit.decode(checkpoint["model"], tokens, mask, coords, generator=generator, **options)
        decoded = decode_tokens(tokenizer, tokens)
    return into_holes(decoded, images, holes | whole, None if whole else checkpoint["painter"])


@torch.no_grad()
def expected_pictures(checkpoint, tokens, mask, coords):
    """Pictures (B, S, S, 3) of tokens (B, T), where a hidden one is the mean of the centroids by the probabilities that
    one pass gives."""
    model = checkpoint["model"]
    tokenizer = checkpoint["tokenizer"]
    with maskgit.precision_context(tokens.device, maskgit.fast_precision(tokens.device)):
        logits = model(tokens.masked_fill(mask, model.mask_id), coords).float()
    centroids = torch.from_numpy(tokenizer.centroids).to(tokens.device)
    patches = torch.where(mask[..., None], logits.softmax(dim=-1) @ centroids, centroids[tokens])  # (B, T, D)
    side = math.isqrt(patches.shape[1])
    return maskgit.stitch_patches(patches.unflatten(1, (side, side)).cpu().numpy(), tokenizer.patch, tokenizer.patch)


def fill_in_batches(checkpoint, images, holes, filling, seed=0):
    """Likewise, AT_ONCE at a time."""
    parts = []
    for start in range(0, len(images), AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        parts.append(fill(checkpoint, images[rows], holes[rows], filling, maskgit.step_seed(seed, start)))
    return np.concatenate(parts)


def pixel_evidence(tokenizer, images, holes):
    """Log-likelihood (B, h * w, K) of each token's visible pixels under each code, up to a term without the code.
    Most hidden tokens lie on the rim of a hole and show some of their pixels, which the transformer does not see. They
    are taken as normal around the code's centroid. The variance may be that of any wholly visible token of the picture,
    since flat patches have hardly any and edges have much: a mixture, each of its NOISES one of their quantiles. The
    log-likelihood is divided by CORRELATED. A token that is wholly hidden has the same for every code."""
    pixels = maskgit.image_patches(images / np.float32(255), tokenizer.patch, tokenizer.patch)
    visible = ~maskgit.image_patches(holes[..., None], tokenizer.patch, tokenizer.patch).repeat(3, axis=-1)
    pixels, visible = (values.reshape(len(images), -1, values.shape[-1]) for values in (pixels, visible))
    whole = visible.all(axis=-1)  # (B, h * w)
    errors = np.square(pixels - tokenizer.centroids[tokenizer.nearest(pixels)]).mean(axis=-1)
    errors[~whole] = np.nan
    errors[~whole.any(axis=1)] = 0.01  # nothing to measure it on
    noises = np.nanquantile(errors, (np.arange(NOISES) + 0.5) / NOISES, axis=1).clip(min=LEAST_NOISE)  # (NOISES, B)
    pixels, visible, centroids = map(torch.from_numpy, (pixels, visible.astype(np.float32), tokenizer.centroids))
    shown = visible * pixels
    count = visible.sum(dim=-1, keepdim=True)
    distances = shown.square().sum(dim=-1, keepdim=True) + visible @ centroids.T.square() - 2 * shown @ centroids.T
    densities = (-distances / v - count * v.log() for v in torch.from_numpy(noises).float()[..., None, None])
    return functools.reduce(torch.logaddexp, (density / (2 * CORRELATED) for density in densities))  # (B, h * w, K)


def decode_tokens(tokenizer, tokens):
    """Tokens (B, T) of square pictures -> (B, S, S, 3)."""
    side = math.isqrt(tokens.shape[1])
    return tokenizer.decode(tokens.cpu().numpy().reshape(-1, side, side))


def true_tokens(tokenizer, images):
    """The pictures that the tokens of images (B, S, S, 3) uint8 stand for."""
    return tokenizer.decode(tokenizer.encode(images / np.float32(255)))


def into_holes(decoded, images, holes, painter=None):
    """Images (B, S, S, 3) uint8 with decoded pictures in their holes, or with what a painter makes of them."""
    if painter:
        decoded = painter.paint(decoded, images, holes)
    return paste(images, holes, (decoded * 255).round().clip(0, 255).astype(np.uint8))


def paste(images, holes, filled):
    """The images, with the pixels of their holes from others."""
    return np.where(holes[..., None], filled, images)


# ---------------------------------------------------------------------------------------------------
# Painter


def membrane(values, holes, sweeps=4):
    """Values (B, C, H, W), where those in the holes (B, 1, H, W) become a membrane stretched over the others, as in
    Poisson image editing (Pérez et al. 2003). Each hidden value is then the mean of its four neighbours, up to what
    `sweeps` at each size leave; where all is hidden it is 0."""
    values = values.masked_fill(holes, 0)
    if holes.any() and values.shape[-2] % 2 == values.shape[-1] % 2 == 0:  # start from the membrane of half the size
        visible = F.avg_pool2d(1 - holes.float(), 2)
        coarse = membrane(F.avg_pool2d(values, 2) / visible.clamp(min=1 / 4), visible == 0, sweeps)
        values = torch.where(holes, F.interpolate(coarse, scale_factor=2, mode="bilinear"), values)
    for _ in range(sweeps):
        near = F.pad(values, (1, 1, 1, 1), mode="replicate")
        mean = near[..., :-2, 1:-1] + near[..., 2:, 1:-1] + near[..., 1:-1, :-2] + near[..., 1:-1, 2:]
        values = torch.where(holes, mean / 4, values)
    return values


def joined(decoded, pixels, holes):
    """Decoded pictures (B, C, H, W) shifted to join given ones at the rim of their holes (B, 1, H, W): what the decoded
    ones are off by, where that is visible, is continued as a membrane."""
    return decoded + membrane(pixels - decoded, holes)


class Painter(nn.Module):
    """The second half of the tokenizer's decode, which sees what tokens do not say: what is visible and where the hole
    is. Residual convolutions correct the joined picture, some of them from afar, on a grid of a quarter of its side.
    The last one starts at zero."""

    def __init__(self, width=48, far_width=64):
        super().__init__()
        conv = functools.partial(nn.Conv2d, kernel_size=3, padding=1)
        self.first = conv(4, width)
        self.down = nn.Conv2d(width, far_width, kernel_size=4, stride=4)
        self.far = nn.ModuleList(conv(far_width, far_width) for _ in range(2))
        self.up = nn.Conv2d(far_width, width, kernel_size=1)
        self.near = nn.ModuleList(conv(width, width) for _ in range(3))
        self.last = conv(width, 3)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, decoded, pixels, holes):
        """Decoded and given pictures (B, S, S, 3) in [0, 1], and holes (B, S, S) -> pictures (B, S, S, 3). What the
        given ones have in the holes is not used."""
        decoded, pixels = (each.permute(0, 3, 1, 2) for each in (decoded, pixels))
        holes = holes[:, None]
        start = joined(decoded, pixels, holes)  # (B, 3, S, S)
        x = self.first(torch.cat([start, holes], dim=1))  # (B, width, S, S)
        far = self.down(F.gelu(x))  # (B, far_width, S // 4, S // 4)
        for convolution in self.far:
            far = far + convolution(F.gelu(far))
        x = x + F.interpolate(self.up(F.gelu(far)), size=x.shape[-2:], mode="bilinear")
        for convolution in self.near:
            x = x + convolution(F.gelu(x))
        return (start + self.last(F.gelu(x))).permute(0, 2, 3, 1)

    @torch.no_grad()
    def paint(self, decoded, images, holes):
        """Likewise of arrays, the images as uint8, AT_ONCE at a time."""
        device = self.first.weight.device
        tensors = map(torch.from_numpy, (decoded, images / np.float32(255), holes))
        batches = zip(*(tensor.to(device).split(AT_ONCE) for tensor in tensors), strict=True)
        return torch.cat([self(*batch) for batch in batches]).cpu().numpy()


def train_painter(recipe, tokenizer, pictures, device):
    """A Painter that has learnt the least squared error in holes of pictures (N, S, S, 3) uint8. The tokens there are
    those of the picture with noise: about as wrong as the transformer's."""
    torch.manual_seed(recipe.seed)
    painter = Painter().to(device)
    optimizer = torch.optim.AdamW(painter.parameters(), lr=PAINTER_RATE, betas=(0.9, 0.95))  # 0.999 is unstable
    steps = recipe.painter_steps
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 30) * (1 - step / steps))
    for step in range(steps):
        rng = np.random.default_rng([recipe.seed, PAINTER_SEED, step])
        pixels = pictures[np.sort(rng.integers(len(pictures), size=PAINTER_BATCH))] / np.float32(255)
        if recipe.mirror and rng.random() < 0.5:
            pixels = pixels[:, :, ::-1].copy()
        holes = np.stack([HOLES[kind](rng, recipe.size) for kind in rng.choice(list(HOLES), len(pixels))])
        noise = rng.normal(0, rng.uniform(0, PAINTER_NOISE, (len(pixels), 1, 1, 1)), pixels.shape)
        decoded = tokenizer.decode(tokenizer.encode((pixels + noise * holes[..., None]).astype(np.float32)))
        decoded, pixels, holes = (torch.from_numpy(each).to(device) for each in (decoded, pixels, holes))
        with maskgit.precision_context(device, recipe.precision):
            painted = painter(decoded, pixels, holes).float()
        loss = (painted - pixels)[holes].square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        if step % max(1, steps // 10) == 0:
            print(f"painter: step {step}/{steps}  squared error {loss:.5f}", file=sys.stderr, flush=True)
    return painter.eval()


# ---------------------------------------------------------------------------------------------------
# Training, scores and pictures of a run


def encode_training(tokenizer, pictures, mirror):
    """The tokens of pictures (N, S, S, 3), and of their mirror images: (N or 2 N, h, w)."""
    views = (pictures, pictures[:, :, ::-1]) if mirror else (pictures,)
    parts = [view[start : start + 256] for view in views for start in range(0, len(view), 256)]
    return np.concatenate([tokenizer.encode(part / np.float32(255)).astype(np.int32) for part in parts])


def make_batch(recipe, tokenizer, pictures):
    """batch(step) for train(): some rows hide what the recipe says, the others holes, half of them filled in part."""
    grids = encode_training(tokenizer, pictures, recipe.mirror)  # (N, h, w)
    coords = maskgit.grid_coords(*grids.shape[1:])
    # Never all of them: a row with a hole may have nothing left to fill, one at random has.
    with_hole = int(recipe.hole_rows * recipe.batch_size)
    of_each = min(1000, 1 + recipe.steps * with_hole)
    holes = np.concatenate([make_holes(kind, of_each, recipe.size, TRAINING_SEED) for kind in HOLES])
    holes = hidden_tokens(tokenizer, holes)

    def batch(step):
        generator = torch.Generator().manual_seed(maskgit.step_seed(recipe.seed, step))
        rows = torch.randint(len(grids), (recipe.batch_size,), generator=generator)
        tokens = torch.from_numpy(grids[rows.numpy()].astype(np.int64)).flatten(1)
        at_random = (len(rows) - with_hole, tokens.shape[1])
        mask = maskgit.training_mask(at_random, recipe.mask, generator, coords)
        hole = holes[torch.randint(len(holes), (with_hole,), generator=generator)]
        left = 2 * torch.rand(with_hole, 1, generator=generator)  # of each token; a half of the holes is whole
        hole &= torch.rand(hole.shape, generator=generator) < left
        return tokens, torch.cat([mask, hole]), coords

    return batch


def train_model(recipe, tokenizer, painter, split, device, **options):
    """The model with the lowest cross-entropy on the validation pictures' holes, and the rows of its log."""
    batch = make_batch(recipe, tokenizer, split.training)
    validation = with_holes(split.validation[:VALIDATION_IMAGES], recipe.hole, VALIDATION_SEED)
    model = recipe.new_model(recipe.codes, device)
    inputs = list(input_batches({"model": model, "tokenizer": tokenizer}, *validation))

    def validate(model):
        return {"validation": cross_entropy(model, inputs)}

    options |= {"best_by": "validation", "validate": validate}
    if painter is not tokenizer:  # which would be a VQGAN's whole file
        options |= {"tokenizer": tokenizer, "extra": painter.state_dict()}
    return model, maskgit.train(model, batch, recipe, **options)


def input_batches(checkpoint, images, holes, informed=False):
    """model_input of AT_ONCE pictures at a time."""
    for start in range(0, len(images), AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        yield model_input(checkpoint, images[rows], holes[rows], informed)


@torch.no_grad()
def cross_entropy(model, inputs):
    """Nats per hidden token of input_batches, all of them hidden at once."""
    total = 0.0
    count = 0
    for tokens, mask, coords, evidence in inputs:
        with maskgit.precision_context(tokens.device, maskgit.fast_precision(tokens.device)):
            logits = model(tokens.masked_fill(mask, model.mask_id), coords).float()
        logits = logits if evidence is None else logits + evidence
        hidden = int(mask.sum())
        total += float(maskgit.masked_cross_entropy(logits, tokens, mask)) * hidden
        count += hidden
    return total / count


def picture_scores(images, holes, filled):
    """PSNR (dB) and mean absolute error (of 255) inside the holes, SSIM of the whole, means over the pictures."""
    errors = filled.astype(np.float64) - images
    inside = [error[hole] for error, hole in zip(errors, holes, strict=True)]
    psnr = np.mean([10 * math.log10(255**2 / max(np.square(error).mean(), 1e-9)) for error in inside])
    l1 = np.mean([np.abs(error).mean() for error in inside])
    return {"psnr": float(psnr), "l1": float(l1), "ssim": structural_similarity(images, filled)}


def structural_similarity(x, y):
    """SSIM (Wang et al. 2004): Gaussian windows of 11x11 with sigma 1.5 that fit inside, mean over all channels."""
    bell = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    down, across = ((bell / bell.sum()).reshape(1, 1, *sides) for sides in ((11, 1), (1, 11)))
    x, y = (torch.from_numpy(images).double().permute(0, 3, 1, 2).flatten(0, 1)[:, None] / 255 for images in (x, y))
    # Each (B * C, 1, H, W) becomes (B * C, 1, H - 10, W - 10).
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = (
        F.conv2d(F.conv2d(v, down), across) for v in (x, y, x * x, y * y, x * y)
    )
    variances = mean_xx - mean_x**2 + mean_yy - mean_y**2
    covariance = mean_xy - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((similarity / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))).mean())


def score(checkpoint, test, seen, filling, seeds):
    """All scores of a run: of test images with holes, so many draws of each, and for comparison of some that were seen
    in training."""
    images, holes = test
    model = checkpoint["model"]
    tokenizer = checkpoint["tokenizer"]
    true = true_tokens(tokenizer, images)

    def scored(name, filled, **more):
        return {"name": name} | more | picture_scores(images, holes, filled)

    rows = [scored("true tokens", into_holes(true, images, holes, checkpoint["painter"]))]
    rows.append(scored("true tokens, as decoded", into_holes(true, images, holes)))
    for name, (way, painter) in ways_to_fill(checkpoint, filling).items():
        for seed in range(seeds if way.sample == "categorical" else 1):
            filled = fill_in_batches(checkpoint | {"painter": painter}, images, holes, way, seed)
            rows.append(scored(name, filled, seed=seed, **asdict(way)))
        print(f"{name}: {rows[-1]['psnr']:.2f} dB", file=sys.stderr)
    as_set = {"seen": seen} | {kind: with_holes(images, kind, TEST_SEED) for kind in HOLES}
    for name, other in as_set.items():
        as_set[name] = picture_scores(*other, fill_in_batches(checkpoint, *other, filling))
    entropies = {"test": cross_entropy(model, input_batches(checkpoint, *test))}
    entropies["seen"] = cross_entropy(model, input_batches(checkpoint, *seen))
    if tokenizer.centroids is not None:
        entropies["with evidence"] = cross_entropy(model, input_batches(checkpoint, *test, informed=True))
    hidden = {"pixels": float(holes.mean()), "tokens": float(hidden_tokens(tokenizer, holes).float().mean())}
    return {"scored": len(images), "hidden": hidden, "cross_entropy": entropies, "as set": as_set, "rows": rows}


def ways_to_fill(checkpoint, filling):
    """{name: (Filling, painter)}: as set, without what is done about the rim, and twice without chance."""
    painter = checkpoint["painter"]
    ways = {"as set": (filling, painter), "as decoded": (filling, None)}
    if filling.evidence:
        ways["as decoded, without evidence"] = (replace(filling, evidence=False), None)
    ways["likeliest, T=1"] = (replace(filling, sample="argmax", decode_steps=1), painter)
    if checkpoint["tokenizer"].centroids is not None:
        ways["expected"] = (replace(filling, sample="mean"), painter)
    return ways


def print_scores(figures):
    """Means of each way's draws."""
    names = ("psnr", "l1", "ssim")
    table = []
    for way, rows in itertools.groupby(figures["rows"], lambda row: row["name"]):
        values = np.mean([[row[name] for name in names] for row in rows], axis=0)
        table.append([way, *(f"{value:.4g}" for value in values)])
    maskgit.print_table(["filled by", *names], table)
    table = [[name, *(f"{value:.4g}" for value in scores.values())] for name, scores in figures["as set"].items()]
    maskgit.print_table(["as set, on", "psnr", "l1", "ssim"], table)
    entropies = ", ".join(f"{name} {value:.3f}" for name, value in figures["cross_entropy"].items())
    print(f"cross-entropy, nats per hidden token: {entropies}; seen: on pictures of the training")


def paint_pictures(out, checkpoint, images, holes, filling):
    """samples.png and decode.gif."""
    grey = paste(images, holes, np.uint8(GREY))
    filled = [fill_in_batches(checkpoint, images, holes, filling, seed) for seed in range(3)]
    columns = np.stack([grey, *filled, images], axis=1)
    sheet(columns, ["hole", "filled", "another", "another", "truth"]).save(out / "samples.png")
    frames = [grey, *trace_pictures(checkpoint, images, holes, replace(filling, sample="categorical"))]
    maskgit.save_gif(out / "decode.gif", [sheet(pictures) for pictures in frames])


def paint_loss(history):
    steps = [row["step"] for row in history]
    curves = {"training": (steps, [row["loss"] for row in history])}
    curves["validation"] = (steps, [row["validation"] for row in history])
    labels = {"title": "Inpainting: loss in training, and on the holes of validation pictures", "x_label": "step"}
    return maskgit.line_plot(curves, **labels, y_label="cross-entropy, nats per hidden token")


def sheet(pictures, titles=()):
    """Pictures (..., S, S, 3) uint8 as one, in columns with titles or four in a row."""
    pictures = pictures.reshape(-1, *pictures.shape[-3:])
    scale = max(1, 128 // pictures.shape[1])
    return maskgit.image_grid(pictures / 255, len(titles) or 4, scale=scale, titles=titles)


def trace_pictures(checkpoint, images, holes, filling):
    """The pictures after each step of filling, with what is still hidden in grey."""
    tokenizer = checkpoint["tokenizer"]
    side = images.shape[1] // tokenizer.patch
    trace = []
    shown = []
    fill(checkpoint, images, holes, filling, trace=trace)
    for tokens, hidden in trace:
        masks = hidden.cpu().numpy().reshape(-1, side, side)
        masks = masks.repeat(tokenizer.patch, axis=1).repeat(tokenizer.patch, axis=2)
        decoded = decode_tokens(tokenizer, tokens.masked_fill(hidden, 0))
        pictures = into_holes(decoded, images, holes | masks, checkpoint["painter"])
        shown.append(paste(paste(images, holes, pictures), holes & masks, np.uint8(GREY)))
    return shown


# ---------------------------------------------------------------------------------------------------
# Filling files


def name_keys(name, is_mask):
    """For each rule by which the names of a picture and its mask agree the keys of which they share one, the strictest
    rule first: the same name; that without the mask's word; that without the word and a number beyond it; all numbers;
    the last one."""
    plain = re.sub(r"[\W_]+", "_", name.lower()).strip("_")
    without = {plain}
    uncounted = plain
    if is_mask:
        parts = [(plain[: word.start()].strip("_"), plain[word.end() :].strip("_")) for word in MASK.finditer(plain)]
        without = {"_".join(filter(None, both)) for both in parts}
        uncounted = re.sub(rf"_?{MASK.pattern}_?\d+$|^\d+_?{MASK.pattern}_?", "", plain)
    numbers = tuple(map(int, re.findall(r"\d+", name)))
    return [{name}, without, {uncounted}, {numbers} - {()}, {numbers[-1:]} - {()}]


def pair_by_name(pictures, masks):
    """{picture: mask} of those that belong together; ValueError where their names leave that open."""
    pairs = {}
    taken = set()
    for rule in range(5):
        groups = collections.defaultdict(lambda: (set(), set()))  # of each key its pictures and its masks
        for file in (pictures | masks).difference(pairs, taken):
            for key in name_keys(file.stem, file in masks)[rule]:
                groups[key][file in masks].add(file)
        for some, theirs in groups.values():
            if some and theirs:
                if len(some | theirs) > 2 or theirs <= taken:
                    raise maskgit.InputError(f"their names leave open which belong together: {listed(sorted(some | theirs))}")
                pairs[min(some)] = min(theirs)
                taken |= theirs
    return pairs


def listed(things):
    """Some of them, and how many more there are."""
    names = list(map(str, things))
    return ", ".join(names[:4]) + f" and {len(names) - 4} more" * (len(names) > 4)


def pair_files(images, masks, out):
    """[(picture, mask)] of two folders, of one that holds both, or of single files; one mask serves all pictures."""
    together = images.is_dir() and images.resolve() == masks.resolve()
    pictures = set(picture_files(images, [out] if together else [out, masks]))
    if masks.is_file():
        return [(picture, masks) for picture in sorted(pictures)]
    if together:
        holes = {file for file in pictures if MASK.search(file.stem.lower())}
        pictures -= holes
        if not holes or not pictures:
            raise maskgit.InputError(f"{images} is for pictures and masks, but has no names with and without 'mask'")
    else:
        holes = set(picture_files(masks, [out, images]))
    pairs = pair_by_name(pictures, holes)
    if lonely := pictures - pairs.keys():
        raise maskgit.InputError(f"no mask has the name or the number of {listed(sorted(lonely))}")
    if (lonely := holes.difference(pairs.values())) and not images.is_file():
        raise maskgit.InputError(f"no picture has the name or the number of {listed(sorted(lonely))}")
    return sorted(pairs.items())


def white_pixels(image):
    """Which pixels of a mask are white: bool (H, W). In a file that has only 0 and 1, those of 1; in a palette, if that
    is the lighter one. ValueError if they are transparent in part, or most of them neither black nor white, or if all
    that differ are on one side of the middle."""
    if image.has_transparency_data and np.ptp(image.convert("RGBA").getchannel("A").getextrema()):
        raise maskgit.InputError("what its transparency means is open; save it without, the hole in black, the rest in white")
    grey = eight_bits(image.convert("RGB") if len(image.getbands()) > 1 else image).convert("L")
    levels = np.asarray(grey)
    values = np.asarray(image if len(image.getbands()) == 1 else grey)
    if np.isin(values, (0, 1)).all():
        zeros = levels[values == 0]
        ones = levels[values == 1]
        if image.mode != "P" or (zeros.size and ones.size and zeros[0] < ones[0]):
            return values == 1
    low, high = levels.min(), levels.max()
    one_sided = low < high and (low > 127 or high <= 127)
    if one_sided or np.mean((levels < 32) | (levels > 223)) <= 0.5:
        few = listed(f"{value:g}" for value in np.unique(values))
        raise maskgit.InputError(f"it is no mask in black and white: its values are {few}")
    return levels > 127


def read_pair(picture, mask, invert):
    """A picture (H, W, 3) uint8 and its hole (H, W)."""
    image = np.asarray(read_picture(picture))
    hole = read_image(mask, white_pixels) == invert
    if image.shape[:2] != hole.shape:
        sizes = [f"{file} is {array.shape[1]}x{array.shape[0]}" for file, array in ((mask, hole), (picture, image))]
        raise maskgit.InputError(f"{', '.join(sizes)}; a mask has its image's size")
    return image, hole


def shrunk(image, hole, size):
    """Both in size x size: a pixel with any part of the hole belongs to it."""
    arrays = (image, hole.astype(np.float32))
    small = [np.asarray(Image.fromarray(a).resize((size, size), Image.Resampling.BOX)) for a in arrays]
    return small[0], small[1] > 0


def open_model(path, device):
    """The checkpoint of a run of this script."""
    checkpoint = maskgit.load_checkpoint(path, device)
    if checkpoint["tokenizer"] is None or "size" not in (checkpoint["config"] or {}):
        raise maskgit.InputError(f"{path} is no checkpoint of inpaint.py")
    painter = Painter().to(device).eval()
    try:
        painter.load_state_dict(checkpoint["extra"])
    except (RuntimeError, TypeError):
        raise maskgit.InputError(f"{path} holds no painter, so an earlier version wrote it; train it anew") from None
    return checkpoint | {"painter": painter}


def weights_digest(network):
    """SHA-256 of the weights of a network."""
    digest = hashlib.sha256()
    for tensor in network.state_dict().values():
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def result_files(picture, out, samples):
    """What filling a picture writes: a file, or one for each sample and, where nobody takes it for another result, one
    with all in a row."""
    if samples == 1:
        return [out / f"{picture.stem}.png"]
    return [*(out / f"{picture.stem}_{i}.png" for i in range(1, samples + 1)), out / "rows" / f"{picture.stem}.png"]


def require_free(files, pairs, overwrite):
    """ValueError if one of the files is another result, what is to be filled, or there already."""
    given = {file.resolve() for pair in pairs for file in pair}
    for file, count in collections.Counter(files).items():
        if count > 1:
            raise maskgit.InputError(f"two pictures would become {file}; fill their folders one at a time")
        if file.resolve() in given:
            raise maskgit.InputError(f"{file} is read from and would be written to; --out renames")
        if file.exists() and not overwrite:
            raise maskgit.InputError(f"{file} exists; --resume fills what is missing, --force overwrites, --out renames")


def examine(pairs, invert, way):
    """A digest of pictures, their masks and the way to fill them."""
    digest = hashlib.sha256(repr(way).encode())
    for picture, mask in pairs:
        image, hole = read_pair(picture, mask, invert)
        if hole.all() or not hole.any():
            print(f"{picture}: by {mask} {'nothing is visible' if hole.all() else 'there is no hole'}")
        digest.update(image.tobytes() + hole.tobytes())
    return digest.hexdigest()


def require_results(files, digest):
    """ValueError if one of the files is there, but not a result of what has that digest."""
    for file in files:
        if file.exists() and read_image(file, lambda image: image.info.get("filling")) != digest:
            raise maskgit.InputError(f"{file} is the result of other pictures or another way to fill; --force overwrites")


def write_results(results, image, hole, filled, digest):
    """The picture (H, W, 3) with its hole (H, W) from each of the smaller ones, and if these are several all in a row;
    of the files of results {file: whether it is missing} those that are."""
    pictures = []
    for small in filled:
        large = Image.fromarray(small).resize(hole.shape[::-1], Image.Resampling.BICUBIC)
        pictures.append(paste(image, hole, np.asarray(large)))
    if len(results) > 1:
        pictures.append(np.concatenate([image, *pictures], axis=1))
    header = PngImagePlugin.PngInfo()
    header.add_text("filling", digest)
    for (file, missing), pixels in zip(results.items(), pictures, strict=True):
        if missing:
            with maskgit.whole_file(file) as whole:
                Image.fromarray(pixels).save(whole, format="PNG", pnginfo=header)


def fill_files(checkpoint, size, filling, arguments, seed):
    """Fill the holes of files by a model of pictures of that size: a PNG for each; with --samples a PNG for each of
    those, and all in a row. All files are read before one is written. Results carry a digest of what they were made
    of, by which --resume knows them."""
    pairs = pair_files(arguments.images, arguments.masks, arguments.out)
    results = [result_files(picture, arguments.out, arguments.samples) for picture, _ in pairs]
    require_free(itertools.chain(*results), pairs, arguments.force or arguments.resume)
    networks = [weights_digest(checkpoint[name]) for name in ("model", "painter")]
    way = [asdict(filling), seed, arguments.samples, arguments.whole, size, networks]
    batches = [slice(start, start + AT_ONCE) for start in range(0, len(pairs), AT_ONCE)]
    digests = [examine(pairs[rows], arguments.invert_masks, [way, rows.start]) for rows in batches]
    if arguments.resume:
        for rows, digest in zip(batches, digests, strict=True):
            require_results(itertools.chain(*results[rows]), digest)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for rows, digest in zip(batches, digests, strict=True):
        missing = [{file: arguments.force or not file.exists() for file in files} for files in results[rows]]
        if not any(any(files.values()) for files in missing):
            continue
        small = [shrunk(*read_pair(*pair, arguments.invert_masks), size) for pair in pairs[rows]]
        images, holes = map(np.stack, zip(*small, strict=True))
        seeds = [maskgit.step_seed(seed, rows.start, i) for i in range(arguments.samples)]
        samples = [fill(checkpoint, images, holes, filling, each, whole=arguments.whole) for each in seeds]
        for pair, files, *filled in zip(pairs[rows], missing, *samples, strict=True):
            image, hole = read_pair(*pair, arguments.invert_masks)
            write_results(files, image, hole | arguments.whole, filled, digest)
    print(f"{len(pairs)} pictures filled at the model's {size}x{size}, only their holes pasted back: {arguments.out}")


# ---------------------------------------------------------------------------------------------------
# One run

DEFAULTS = dict(dim=128, layers=4, hidden=128, batch_size=16, steps=5000)
# R1 and R2's sizes and optimiser; their training set is three times ours, so an epoch has 12,000 pictures here, too.
REPORT = dict(dim=768, heads=16, layers=15, hidden=1536, rotary=False, batch_size=10, lr=1e-4, optimizer="adamw")
REPORT |= dict(betas=(0.9, 0.96), decay="constant", warmup=0, steps=100 * 12_000 // 10, loss="all", mirror=False)
REPORT |= dict(dropout=0.1, hole_rows=0.0)
PRESETS = {"report": REPORT}


def command_line(description, recipe, filling, out, fills):
    """The parser of a script that fills files if one of the flags `fills` is given, and else trains, with defaults for
    a recipe and a filling."""
    parser = maskgit.CommandLine(description)
    parser.add_argument("--preset", choices=PRESETS, help="R1 and R2's sizes, optimiser and loss")
    maskgit.add_run_flags(parser, out)
    add = parser.add_argument_group("files to fill, instead of a training").add_argument
    add("--checkpoint", type=Path, help="fill by this model")
    add("--images", type=Path, help="folder of pictures, or one file")
    add("--masks", type=Path, help="of their masks, of the same names or numbers; or one file for all")
    add("--invert-masks", action="store_true", help="white is the hole, not black")
    add("--whole", action="store_true", help="decode the visible pixels, too, as the reports do")
    add("--samples", type=maskgit.at_least(1), default=1, help="different results for each picture")
    add = parser.add_argument_group("pictures and scores of a training").add_argument
    add("--data", type=Path, help="folder of pictures; if it is not given, cartoon cats")
    add("--test-images", type=maskgit.at_least(8), default=48, help="default %(default)s")
    add("--score-seeds", type=maskgit.at_least(1), default=1, help="draws behind each row of the table")
    maskgit.add_flags(parser, type(filling), **asdict(filling))
    maskgit.add_flags(parser, recipe, **DEFAULTS)

    def defaults_of(given):
        out = {"out": Path("runs/filled")} if any(getattr(given, name) for name in fills) else {}
        return out | PRESETS.get(given.preset, {})

    arguments = parser.parse_with(defaults_of)
    return parser, arguments


FILES = {"checkpoint", "vqgan", "transformer", "images", "masks", "invert_masks", "whole", "samples"}
EITHER = {"out", "resume", "force", "device", "seed"} | set(asdict(Filling()))


def require_flags(parser, arguments, fills):
    """Refuse flags that would be ignored."""
    given = {name for name, value in vars(arguments).items() if value != parser.get_default(name)}
    ignored = given - EITHER - FILES if fills else given & {"invert_masks", "whole", "samples"}
    if ignored:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(ignored))
        parser.error(f"{flags}: only for {'a training, not for' if fills else 'filling files, not for a training'}")


def parse_arguments():
    """The command line, with the recipe and the filling in it."""
    parser, arguments = command_line(__doc__, Inpainting, Filling(), "runs/inpaint", ["checkpoint"])
    given = [arguments.checkpoint, arguments.images, arguments.masks]
    if any(given) and not all(given):
        parser.error("--checkpoint fills --images by their --masks: name all three")
    require_flags(parser, arguments, bool(arguments.checkpoint))
    return arguments, maskgit.settings_from(arguments, Inpainting), maskgit.settings_from(arguments, Filling)


def train_and_score(record, arguments, recipe, filling, tokenizer=None):
    """A whole run, with a tokenizer at hand that paints, too, with those of the run which is resumed, or new ones."""
    maskgit.require_no_run(arguments.out, arguments.resume, arguments.force)
    device = maskgit.pick_device(arguments.device)
    recipe = recipe.for_device(device)
    out = arguments.out
    started = time.monotonic()
    painter = tokenizer
    if arguments.resume and not tokenizer:
        before = open_model(out / "model.pt", device)
        tokenizer, painter = before["tokenizer"], before["painter"]
    split, digest = open_pictures(arguments.data, recipe.cartoons, recipe.size, recipe.seed, out)
    recipe = replace(recipe, pictures_sha256=digest)
    counts = {name: len(part) for name, part in split._asdict().items()}
    print("pictures:", ", ".join(f"{count} {name}" for name, count in counts.items()))
    if not tokenizer:
        out.mkdir(parents=True, exist_ok=True)  # now, since it may be impossible
        images = split.training[:CODEBOOK_IMAGES] / np.float32(255)
        tokenizer = maskgit.PatchTokenizer.fit(images, recipe.codes, recipe.patch, seed=recipe.seed)
        painter = train_painter(recipe, tokenizer, split.training, device)
    prepared = time.monotonic()
    options = dict(out=out, resume=arguments.resume, force=arguments.force)
    model, history = train_model(recipe, tokenizer, painter, split, device, **options)
    if maskgit.process_rank()[0] > 0:
        return
    trained = time.monotonic()
    checkpoint = {"model": model, "tokenizer": tokenizer, "painter": painter}
    images, holes = with_holes(split.test[: arguments.test_images], recipe.hole, TEST_SEED)
    seen = with_holes(split.training[: arguments.test_images], recipe.hole, TEST_SEED)
    figures = {"pictures": counts} | score(checkpoint, (images, holes), seen, filling, arguments.score_seeds)
    figures["parameters"] = sum(p.numel() for p in model.parameters())
    figures["validation"] = min(row["validation"] for row in history)
    seconds = {"prepared": prepared - started, "trained": history[-1]["seconds"], "scored": time.monotonic() - trained}
    figures["seconds"] = {name: round(value) for name, value in seconds.items()}
    settings = vars(arguments) | asdict(recipe) | asdict(filling)
    maskgit.write_figures(record, settings, figures, out / "metrics.json", arguments.json)
    print_scores(figures)
    paint_pictures(out, checkpoint, images[:8], holes[:8], filling)
    paint_loss(history).save(out / "loss.png")
    print("seconds: " + ", ".join(f"{name} {value}" for name, value in figures["seconds"].items()))
    print("pictures:", *sorted(out.glob("*.png")), out / "decode.gif")


def main():
    record = maskgit.run_record()
    arguments, recipe, filling = parse_arguments()
    if arguments.checkpoint:
        checkpoint = open_model(arguments.checkpoint, maskgit.pick_device(arguments.device))
        fill_files(checkpoint, checkpoint["config"]["size"], filling, arguments, recipe.seed)
    else:
        train_and_score(record, arguments, recipe, filling)
        model = arguments.out / "model.pt"
        print(f"fill your own: python inpaint.py --checkpoint {model} --images DIR --masks DIR --out DIR")


if __name__ == "__main__":
    maskgit.run_as_script(main)
