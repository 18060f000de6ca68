"""R1 and R2's experiment: photographs with holes, filled in by MaskGIT on k-means tokens.

    python inpaint.py                                   drawn cartoon cats: train, fill, score; nothing to download
    python inpaint.py --data FOLDER --out runs/mine     the same on your own pictures
    python inpaint.py --checkpoint runs/inpaint/model.pt --images DIR --masks DIR --out DIR      fill holes

A token with any hole pixel is hidden, and predicted from the others; a small network, the painter, then corrects its
pixels by those that are visible. A run leaves model.pt, log.csv, metrics.json and its pictures in runs/inpaint (--out).

Pictures   are what Pillow reads in 8 bits, or grey in 16 if their brightest pixel has a tenth of white, 65535. Training
           cuts squares out of their middles; any shape is filled, in squares of its shorter side that cover the holes.
Masks      have their picture's size. Brighter than half of white is visible, the rest is the hole (--invert-masks: the
           other way round); of 0 and 1 alone, 1 is white. They are black and white, without transparency.
Files      hold one image each, turned as their EXIF says. What begins with a dot is left out.
Names      are compared without case: a mask has (a) its picture's name, (b) this with "mask" or "masks", digits right
           after that and any of " _-." around it, as cat_mask2 for cat, or (c) the same last number. The first rule by
           which each picture has one mask and each mask one picture is taken for all. In a folder of both, masks have
           "mask" in their names. A picture given as a file may leave masks over; a single mask serves all pictures.
Results    are PNGs of their pictures' names. What was visible is unchanged, as are transparency and colour profile;
           what is neither grey nor RGB of 8 bits becomes that. Nothing is overwritten without --force.
"""

import collections
import functools
import hashlib
import io
import itertools
import math
import os
import re
import sys
import tempfile
import time
import unicodedata
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import maskgit
import numpy as np
import torch
import torch.nn.functional as F
from maskgit import InputError, setting
from numpy.lib.stride_tricks import sliding_window_view
from PIL import ExifTags, Image, ImageDraw, ImageFilter, ImageOps
from torch import nn

HOLE_SHARE = 0.24  # of the pixels, as in R1 and R2's masks


def brush_hole(rng, size, width=3):
    """Strokes of a wandering brush, 3 of 64 pixels wide, until HOLE_SHARE of the pixels is gone, as in R1 and R2."""
    canvas = Image.new("1", (size, size))
    pen = ImageDraw.Draw(canvas)
    while np.asarray(canvas).mean() < HOLE_SHARE:
        x, y = rng.uniform(0, size, 2)
        for dx, dy in rng.normal(0, width * size / 96, (3 * size // width, 2)):
            pen.line([(x, y), (x + dx, y + dy)], fill=1, width=max(1, round(width * size / 64)))
            x = min(max(x + dx, 0), size)
            y = min(max(y + dy, 0), size)
    return np.asarray(canvas)


def thick_hole(rng, size):
    """The same of a brush that is 6 to 10 pixels wide."""
    return brush_hole(rng, size, width=int(rng.integers(6, 11)))


def box_hole(rng, size):
    """A square of HOLE_SHARE of the pixels."""
    hole = np.zeros((size, size), bool)
    side = round(size * HOLE_SHARE**0.5)
    y, x = rng.integers(size - side + 1, size=2)
    hole[y : y + side, x : x + side] = True
    return hole


def half_hole(rng, size):
    """All that lies on one of four sides of the middle."""
    left = np.tile(np.arange(size) < size // 2, (size, 1))
    return np.rot90(left, rng.integers(4))


HOLES = {"brush": brush_hole, "thick": thick_hole, "box": box_hole, "half": half_hole}


@dataclass(frozen=True)
class Inpainting(maskgit.Experiment):
    """All that decides the weights of a run."""

    pictures_sha256: str = setting("", "")  # no flag: open_pictures finds it
    cartoons: int = setting(6000, "number of cats, without --data", low=1)
    training_images: int = setting(0, "train on at most so many pictures; 0: all", low=0)
    size: int = setting(64, "pixels per side of a picture", low=8)
    patch: int = setting(4, "pixels per side of a token", low=1)
    codes: int = setting(1024, "of the codebook", low=2)
    mirror: bool = setting(True, "train on mirrored pictures as well")
    hole: str = setting("brush", "of validation and samples.png", choices=HOLES)
    hole_rows: float = setting(0.5, "share of a batch that hides holes; the rest hides --mask", low=0.0, below=1.0)
    painter_steps: int = setting(1000, "updates of the painter", low=1)


@dataclass(frozen=True)
class Filling:
    """How the holes are filled."""

    decode_steps: int = setting(10, "network calls", low=1)
    schedule: str = setting("cosine", "of decode", choices=maskgit.SCHEDULES)
    order: str = setting("confidence", "of decode", choices=maskgit.ORDERS)
    sample: str = setting("categorical", "argmax: the likeliest code", choices=("categorical", "argmax"))
    temperature: float = setting(0.4, "of the samples", low=1e-6)
    choice_temperature: float = setting(1.0, "of the order by confidence", low=0.0)
    evidence: bool = setting(True, "use the visible pixels of tokens that lie partly in a hole")
    grain: bool = setting(True, "borrow from what is visible the fine structure that a filled hole lacks")

    def __post_init__(self):
        maskgit.check_settings(self)


# ---------------------------------------------------------------------------------------------------
# Pictures


def picture_files(path, apart=()):
    """The picture files in a folder and its folders, in the order of their names, or the file itself; but for hidden
    ones, and for what is `apart`: some files or folders. How many others are left out is printed by suffix."""
    if path.is_file():
        return [path]
    apart = {each.resolve() for each in apart if each}
    if path.resolve() in apart:
        raise InputError(f"{path} cannot be read from and written to: --out renames")
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    files = []
    others = collections.Counter()

    def fail(error):
        raise error

    for folder, folders, names in os.walk(path, onerror=fail):
        wanted = [Path(folder, name) for name in folders + names if not name.startswith(".")]
        wanted = [each for each in wanted if each.resolve() not in apart]
        folders[:] = [each.name for each in wanted if each.is_dir()]
        for each in wanted:
            if each.is_dir():
                others["linked folder"] += each.is_symlink()  # os.walk does not look into it
            elif each.suffix.lower() in known:
                files.append(each)
            else:
                others[each.suffix.lower() or "no suffix"] += 1
    if left_out := [f"{count} {suffix}" for suffix, count in sorted(others.items()) if count]:
        print(f"{path}: left out as no pictures: {', '.join(left_out)}")
    if not files:
        raise InputError(f"{path} holds no pictures")
    return sorted(files)


FLIPS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
FLIPS |= {6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}  # by EXIF's orientation

READ = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16L", "I;16B", "I;16N")  # modes


def read_image(file):
    """The only image in a file, upright as its EXIF says, of 8 bits or grey of 16; or InputError."""
    try:
        with Image.open(file) as image:
            image.load()
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # an MPO is a telephone's JPEG
    except Exception as error:  # Pillow raises many types
        raise InputError(f"{file} cannot be read: {str(error) or type(error).__name__}") from None
    if frames > 1:
        raise InputError(f"{file} holds {frames} images: save the one that is meant")
    if image.mode not in READ or (image.mode == "P" and not image.palette):
        raise InputError(f"{file} has the mode {image.mode}: save it as RGB with 8 bits")
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # a broken EXIF counts as none
        orientation = 1
    return image.transpose(Image.Transpose[FLIPS[orientation]]) if orientation in FLIPS else image


def read_picture(file):
    """The picture in a file, of mode L, LA, RGB or RGBA, with its colour profile."""
    image = read_image(file)
    profile = None if image.mode in ("CMYK", "YCbCr") else image.info.get("icc_profile")
    grey = image.mode[0] in "1LI"
    if image.mode.startswith("I;16"):
        levels = np.asarray(image)
        if levels.max() < 65535 / 10 or image.has_transparency_data:
            dark = f"up to {levels.max()}, or transparent ones"
            raise InputError(f"{file} has values of 16 bits {dark}: save it with 8 bits")
        image = Image.fromarray((levels / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = image.convert("LA") if grey else image
    else:
        image = image.convert("L" if grey else "RGB")
    image.info["icc_profile"] = profile
    return image


Split = collections.namedtuple("Split", "training validation test")  # pictures (N, size, size, 3) uint8 each

# A picture is for training if its digest, read as a number in [0, 1), is below the first, and for the test from the
# second on. Of 8,303 photographs 517 are for validation and 785 for the test, about as many as R1 and R2 had (747).
PART_ENDS = (0.843, 0.903)


def open_pictures(folder, cartoons, size, seed, out=None):
    """A Split of a folder's distinct pictures but for those in `out`, cropped at the centre and resized; without a
    folder, of cartoon cats. And the SHA-256 of all. The part of a picture depends on its pixels alone, so that others
    never move it from test to training. Temporary files hold them (TMPDIR says where), not the memory."""
    sources = picture_files(folder, [out]) if folder else cartoon_cats(cartoons, size, seed)
    if folder:  # codebook and scores take the first ones, which must not all be of one subfolder
        np.random.default_rng(0).shuffle(sources)
    files = [tempfile.TemporaryFile() for _ in Split._fields]  # noqa: SIM115  they are closed with the arrays
    distinct = {}  # digest: part
    duplicates = transparent = 0
    for source in sources:
        try:
            image = read_picture(source) if folder else Image.fromarray(source)
        except InputError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        transparent += image.has_transparency_data
        image = image.convert("RGB")
        pixels = np.asarray(image)
        digest = hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).digest()
        if digest in distinct:
            duplicates += 1
            continue
        number = int.from_bytes(digest[:6], "big") / 2**48  # in [0, 1)
        distinct[digest] = np.searchsorted(PART_ENDS, number, side="right")  # 0, 1 or 2
        small = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        try:
            files[distinct[digest]].write(small.tobytes())
            files[distinct[digest]].flush()
        except OSError as error:
            raise InputError(f"{tempfile.gettempdir()} (TMPDIR) cannot hold the pictures: {error.strerror}") from None
    if folder:
        counts = f"{len(distinct)} distinct pictures, {duplicates} duplicates left out"
        print(f"{folder}: {counts}, {transparent} lost their transparency")
    if len(set(distinct.values())) < 3:
        raise InputError(f"{len(distinct)} distinct pictures are too few for training, validation and test")
    split = Split(*(np.memmap(file, np.uint8, "r+").reshape(-1, size, size, 3) for file in files))
    return split, hashlib.sha256(b"".join(distinct)).hexdigest()


# ---------------------------------------------------------------------------------------------------
# Cartoon cats

FUR = [(232, 158, 70), (120, 118, 122), (60, 56, 60), (222, 205, 180), (150, 100, 62), (245, 240, 232), (182, 140, 98)]
EYES = [(108, 178, 74), (238, 184, 48), (82, 150, 210), (176, 200, 80), (206, 122, 40)]
WALLS = [(150, 190, 220), (235, 200, 190), (190, 215, 170), (240, 225, 170), (200, 185, 225), (120, 145, 150)]


def cartoon_cats(count, size, seed=0):
    """The first `count` cats of an endless series: uint8 (count, size, size, 3)."""
    return np.stack([cartoon_cat(np.random.default_rng([seed, i]), size) for i in range(count)])


def cartoon_cat(rng, size):
    """A cat's face by the numbers of `rng`: uint8 (size, size, 3)."""
    canvas = Image.new("RGB", (256, 256))
    pen = ImageDraw.Draw(canvas)
    wall = np.array(WALLS[rng.integers(len(WALLS))])
    pen.rectangle([0, 0, 256, 256], fill=colour(wall))
    if rng.random() < 0.4:  # stripes
        step = rng.integers(28, 52)
        for left in range(-step, 256, step):
            pen.rectangle([left, 0, left + step // 2, 256], fill=colour(wall * 0.9))
    if rng.random() < 0.5:  # the floor
        pen.rectangle([0, rng.integers(180, 225), 256, 256], fill=colour(wall * 0.7))
    x, y = 128 + rng.normal(0, 8, 2) + (0, 8)
    width = rng.uniform(70, 92)
    height = rng.uniform(60, 78)
    fur, second = (np.array(FUR[i]) for i in rng.choice(len(FUR), 2, replace=False))
    dark = colour(fur * 0.72)
    light = colour(fur * 0.4 + np.array([255, 250, 240]) * 0.6)
    pattern = rng.choice(["plain", "tabby", "mask", "patch", "siamese"])
    ellipse(pen, x, y + 130, width * 1.05, 80, colour(fur * 0.9))  # the body
    ear = rng.uniform(46, 66)
    lean = rng.choice((0.55, 0.8))
    for side in (-1, 1):  # the ears
        tip = (x + side * width * (lean + 0.22), y - height * 0.55 - ear)
        outer = [tip, (x + side * width * 0.96, y - height * 0.15), (x + side * width * 0.22, y - height * 0.85)]
        inner = [tuple(0.58 * np.array(corner) + 0.42 * np.mean(outer, axis=0)) for corner in outer]
        pen.polygon(outer, fill=dark if pattern == "siamese" else colour(fur))
        pen.polygon(inner, fill=(230, 160, 160))
    ellipse(pen, x, y, width, height, colour(fur))
    paint_pattern(pen, pattern, x, y, width, height, dark, light, colour(second))
    muzzle = dark if pattern == "siamese" else light
    for side in (-1, 1):
        ellipse(pen, x + side * width * 0.2, y + height * 0.32 + 18, width * 0.26, height * 0.22, muzzle)
    paint_features(pen, rng, x, y, width, height)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX))


def colour(values):
    return tuple(int(value) for value in values)


def ellipse(pen, x, y, width, height, fill):
    pen.ellipse([x - width, y - height, x + width, y + height], fill)


def paint_pattern(pen, pattern, x, y, width, height, dark, light, second):
    if pattern == "tabby":
        for shift in (-0.24, 0, 0.24):
            pen.line([(x + shift * width, y - height * 0.93), (x + shift * width * 0.8, y - height * 0.5)], dark, 9)
        for side, row in itertools.product((-1, 1), (0.1, 0.35)):
            start = (x + side * width * 0.97, y + height * row)
            pen.line([start, (x + side * width * 0.62, y + height * (row + 0.06))], dark, 8)
    elif pattern == "mask":
        cheek = y + height * 0.75
        pen.polygon([(x, y - height * 0.7), (x - width * 0.5, cheek), (x + width * 0.5, cheek)], light)
    elif pattern == "patch":
        pen.pieslice([x - width, y - height, x + width, y + height], 265, 20, fill=second)
    elif pattern == "siamese":
        ellipse(pen, x, y + height * 0.2, width * 0.62, height * 0.68, dark)


def paint_features(pen, rng, x, y, width, height):
    """Eyes, nose, mouth and whiskers."""
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
    nose = y + height * 0.32
    pink = (225, 130, 140) if rng.random() < 0.7 else (70, 50, 50)
    pen.polygon([(x - 12, nose - 7), (x + 12, nose - 7), (x, nose + 8)], fill=pink)
    for side, left in ((-1, x - 20), (1, x)):
        pen.arc([left, nose + 2, left + 20, nose + 22], 10, 170, (50, 35, 35), 4)
        for tilt in (-10, 0, 10):
            start = (x + side * width * 0.38, nose + 14 + tilt / 2)
            pen.line([start, (x + side * width * 1.15, nose + 10 + tilt * 1.8)], (250, 250, 250), 3)


# ---------------------------------------------------------------------------------------------------
# Filling

AT_ONCE = 64  # the most pictures that a network is given in one call
GREY = 128  # what R1 and R2 paint the hole with
VALIDATION_SEED, TEST_SEED, TRAINING_SEED = 1, 2, 3  # of the holes: whatever the seed of a run, they are the same


def make_holes(kind, count, size, seed):
    """Random holes: bool (count, size, size), True = to be filled."""
    return np.stack([HOLES[kind](np.random.default_rng([seed, i]), size) for i in range(count)])


def with_holes(images, kind, seed):
    """The images and random holes of a kind in them."""
    return images, make_holes(kind, len(images), images.shape[1], seed)


def paste(images, holes, filled):
    """The images, with the pixels of their holes from others."""
    return np.where(holes[..., None], filled, images)


class Inpainter(NamedTuple):
    """What it takes to fill holes."""

    model: nn.Module
    tokenizer: maskgit.PatchTokenizer  # or another script's VQGAN, which is a painter as well and has no centroids
    painter: nn.Module | None  # None leaves pictures as they are decoded
    precision: str  # of the model's answers


def token_mask(tokenizer, holes):
    """Which tokens have any pixel in holes (B, S, S), and are hidden: bool (B, T)."""
    patches = maskgit.image_patches(holes[..., None], tokenizer.patch, tokenizer.patch)
    return torch.from_numpy(patches.any(axis=-1)).flatten(1)


def model_input(inpainter, images, holes):
    """Tokens (B, T), mask (B, T) and coords (T, 2), for decode, of images (B, S, S, 3) uint8 with holes (B, S, S)."""
    tokenizer = inpainter.tokenizer
    # A tokenizer that looks at the whole picture for each token must not see into holes; tokens there do not matter.
    visible = paste(images / np.float32(255), holes, np.float32(np.nan))
    tokens = torch.from_numpy(tokenizer.encode(visible))  # (B, h, w)
    tensors = tokens.flatten(1), token_mask(tokenizer, holes), maskgit.grid_coords(*tokens.shape[1:])
    return [tensor.to(next(inpainter.model.parameters()).device) for tensor in tensors]


def fill(inpainter, images, holes, filling, seed=0, trace=None):
    """Images (B, S, S, 3) uint8 whose holes (B, S, S) are filled in the way of a Filling; trace goes to decode."""
    tokenizer = inpainter.tokenizer
    tokens, mask, coords = model_input(inpainter, images, holes)
    order = filling.order
    if order == "confidence":
        order = functools.partial(maskgit.by_confidence, choice_temperature=filling.choice_temperature)
    options = dict(steps=filling.decode_steps, schedule=filling.schedule, order=order, sample=filling.sample)
    options |= dict(temperature=filling.temperature, generator=torch.Generator(tokens.device).manual_seed(seed))
    if filling.evidence:
        options["evidence"] = pixel_evidence(tokenizer, images, holes).to(tokens.device)
    with maskgit.precision_context(tokens.device, inpainter.precision):
        tokens = maskgit.decode(inpainter.model, tokens, mask, coords, trace=trace, **options)
    filled = into_holes(decode_tokens(tokenizer, tokens), images, holes, inpainter.painter)
    return np.stack([grained(*each) for each in zip(filled, holes, strict=True)]) if filling.grain else filled


def fill_in_batches(inpainter, images, holes, filling, seed=0):
    """Likewise, AT_ONCE at a time."""
    parts = []
    for start in range(0, len(images), AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        parts.append(fill(inpainter, images[rows], holes[rows], filling, maskgit.step_seed(seed, start)))
    return np.concatenate(parts)


def decode_tokens(tokenizer, tokens):
    """Tokens (B, T) of square pictures -> (B, S, S, 3)."""
    side = math.isqrt(tokens.shape[1])
    return tokenizer.decode(tokens.cpu().numpy().reshape(-1, side, side))


def into_holes(decoded, images, holes, painter=None):
    """Images (B, S, S, 3) uint8 with decoded pictures in their holes, or with what a painter makes of them."""
    if painter:
        decoded = painter.paint(decoded, images, holes)
    return paste(images, holes, (decoded * 255).round().clip(0, 255).astype(np.uint8))


def pixel_evidence(tokenizer, images, holes, levels=6, least_noise=(4 / 255) ** 2, correlated=4):
    """Log-likelihood (B, T, K) of each token's visible pixels under each code, up to a term that all codes share. Most
    hidden tokens lie on the rim of a hole and show some of their pixels, which the transformer does not see.

    Pixels are taken as normal around those of the code. Flat patches have hardly any noise and edges have much, so the
    variance may be any of `levels` quantiles of the errors of the picture's wholly visible tokens. As neighbours are
    alike, `correlated` pixels count as one. (All three were chosen on validation pictures.)"""
    pixels = maskgit.image_patches(images / np.float32(255), tokenizer.patch, tokenizer.patch)
    visible = ~maskgit.image_patches(holes[..., None].repeat(3, axis=-1), tokenizer.patch, tokenizer.patch)
    pixels, visible = (each.reshape(len(images), -1, each.shape[-1]) for each in (pixels, visible))  # (B, T, D)
    errors = np.square(pixels - tokenizer.centroids[tokenizer.nearest(pixels)]).mean(axis=-1)  # (B, T)
    whole = visible.all(axis=-1)
    errors[~whole] = np.nan
    errors[~whole.any(axis=1)] = 0.01  # a guess, with no token to measure
    variances = np.nanquantile(errors, (np.arange(levels) + 0.5) / levels, axis=1).clip(min=least_noise)  # (levels, B)
    pixels, visible, centroids = map(torch.from_numpy, (pixels, visible.astype(np.float32), tokenizer.centroids))
    shown = visible * pixels
    count = visible.sum(dim=-1, keepdim=True)  # (B, T, 1)
    # The sum of (pixel - centroid)^2 over the visible ones, multiplied out: (B, T, K).
    distances = shown.square().sum(dim=-1, keepdim=True) + visible @ centroids.T.square() - 2 * shown @ centroids.T
    log_densities = []
    for variance in torch.from_numpy(variances).float()[..., None, None]:  # (B, 1, 1)
        log_densities.append((-distances / variance - count * variance.log()) / 2 / correlated)
    return functools.reduce(torch.logaddexp, log_densities)


# ---------------------------------------------------------------------------------------------------
# Larger pictures, and their grain


def fill_picture(inpainter, size, pixels, hole, filling, seed=0, sample=0):
    """A picture (H, W, 3) uint8 of any size whose hole (H, W) is filled by a model of pictures of `size`, one square
    after the other; a later one sees what an earlier one has filled."""
    pixels, hole = pixels.copy(), hole.copy()
    for number in itertools.count():
        if not hole.any():
            return pixels
        window = next_window(hole)
        window_seed = maskgit.step_seed(seed, number, sample)
        pixels[window] = fill_square(inpainter, size, pixels[window], hole[window], filling, window_seed)
        hole[window] = False


def next_window(hole):
    """The index of a square of the shorter side, where to fill a hole (H, W) next. From the left or top on it takes as
    much of the hole as it can, in its middle. If it saw less than a quarter, that is taken which sees about a half."""
    if hole.shape[0] > hole.shape[1]:
        return next_window(hole.T)[::-1]
    side, length = hole.shape
    along = np.flatnonzero(hole.any(axis=0))
    part = along[along < along[0] + side]
    start = int(np.clip((part[0] + part[-1] + 1 - side) // 2, 0, length - side))
    hidden = np.convolve(hole.sum(axis=0), np.ones(side, int), "valid")  # pixels of the square at each column
    if hidden[start] > 3 / 4 * side**2:
        start = int(np.abs(2 * hidden - side**2 - 1).argmin())  # -1: rather all than nothing
    return slice(None), slice(start, start + side)


def fill_square(inpainter, size, pixels, hole, filling, seed):
    """A square picture (N, N, 3) uint8 whose hole (N, N) is filled at the model's size. Then it is enlarged to its own,
    by at most an octave (2 x) at a time; each time what is visible is put back."""
    side = len(hole)
    filled = fill(inpainter, *(each[None] for each in shrunk(pixels, hole, size)), filling, seed)[0]
    octaves = max(1, math.ceil(math.log2(side / size)))
    for i in range(1, octaves + 1):
        small, small_hole = shrunk(pixels, hole, round(size * (side / size) ** (i / octaves)))
        low = np.asarray(Image.fromarray(filled).resize(small_hole.shape, Image.Resampling.BICUBIC))
        filled = paste(small, small_hole, low)
        if filling.grain and side > size:
            filled = with_grain(filled, low, small_hole)
    return filled


def shrunk(pixels, hole, size):
    """A picture (N, N, 3) and its hole (N, N) in size x size: a pixel with any part of the hole belongs to it."""
    arrays = map(Image.fromarray, (pixels, hole.astype(np.float32)))
    small, share = (np.asarray(each.resize((size, size), Image.Resampling.BOX)) for each in arrays)
    return small, share > 0


def grained(pixels, hole):
    """With grain at the model's size, beside a blur (0.8 pixels): a painter leaves out what is finer."""
    return with_grain(pixels, np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(0.8))), hole)


GRAIN_PATCH = 4  # pixels per side of what is borrowed; patches lie half as far apart
GRAIN_SOURCES = 10_000  # the most visible patches that are looked at, drawn at random


def with_grain(pixels, low, hole):
    """A picture (H, W, 3) uint8 with grain, its fine structure, in the hole (H, W). What a model cannot say is borrowed
    from what is visible. `low` is the picture without grain, and high = pixels - low is the grain.

    Each patch q of a grid over the hole borrows the grain of that wholly visible patch p that looks most like it:
    b(q) = high(argmin_p |low(p) - low(q)|^2). Overlapping ones are averaged by a window w, b = sum w b(q) / sum w. This
    weakens them, so b is scaled back to E, the mean square of all b(q) in the hole. If e, that of the hole's own grain,
    is less than E / 2, sqrt(1 - e / E) b is added; otherwise the hole is sharp enough, as in most cartoons. (Efros and
    Leung 1999 copy pixels by what surrounds them; Freeman et al. 2002 find high frequencies by low ones; Hertzmann et
    al., Image Analogies, 2001.)"""
    high = pixels.astype(np.int16) - low
    square = (GRAIN_PATCH, GRAIN_PATCH)
    hidden = sliding_window_view(hole, square).any(axis=(2, 3))  # (H - 3, W - 3)
    sources = np.random.default_rng(0).permutation(np.argwhere(~hidden))[:GRAIN_SOURCES].copy()  # frees the rest
    if not len(sources) or not hole.any():
        return pixels
    grid = [(at % (GRAIN_PATCH // 2) == 0) | (at == at[-1]) for at in map(np.arange, hidden.shape)]  # up to the edge
    targets = np.argwhere(hidden & np.logical_and.outer(*grid))

    def patches(values, corners):
        return sliding_window_view(values, square, axis=(0, 1))[*corners.T].astype(np.float32)  # (N, 3, 4, 4)

    looks = [patches(low, corners).reshape(len(corners), -1) for corners in (targets, sources)]
    borrowed = patches(high, sources[maskgit.nearest_centroid(*looks)])
    ramp = np.minimum(np.arange(GRAIN_PATCH), np.arange(GRAIN_PATCH)[::-1]) + 1
    total, weight = np.zeros((2, *pixels.shape), np.float32)
    for y, x in np.ndindex(square):  # one pixel of all patches at once, as no two share it
        rows, columns = targets.T + [[y], [x]]
        total[rows, columns] += ramp[y] * ramp[x] * borrowed[:, :, y, x]
        weight[rows, columns] += ramp[y] * ramp[x]
    found = total[hole] / weight[hole]  # (pixels of the hole, 3)
    parts = borrowed.swapaxes(0, 1)[:, sliding_window_view(hole, square)[*targets.T]], high[hole], found
    energy, own, averaged = (float(np.square(part, dtype=np.float32).mean()) for part in parts)
    result = pixels.copy()
    if own < energy / 2:
        result[hole] = (pixels[hole] + math.sqrt((energy - own) / max(averaged, 1e-9)) * found).round().clip(0, 255)
    return result


# ---------------------------------------------------------------------------------------------------
# Painter


def membrane(values, holes, sweeps=4):
    """Values (B, C, H, W), where those in the holes (B, 1, H, W) become a membrane stretched over the others, as in
    Poisson image editing (Pérez et al. 2003): each is about the mean of its four neighbours; if all is hidden, it is 0.
    Sweeps that take these means do not reach far, so they start from the membrane of half the width and height."""
    values = values.masked_fill(holes, 0)
    if holes.any() and values.shape[-2] % 2 == values.shape[-1] % 2 == 0:
        visible = F.avg_pool2d(1 - holes.float(), 2)  # the share of each 2x2
        small = F.avg_pool2d(values, 2) / visible.clamp(min=1 / 4)  # the mean of what is visible
        small = membrane(small, visible == 0, sweeps)
        values = torch.where(holes, F.interpolate(small, scale_factor=2, mode="bilinear"), values)
    for _ in range(sweeps):
        near = F.pad(values, (1, 1, 1, 1), mode="replicate")
        total = near[..., :-2, 1:-1] + near[..., 2:, 1:-1] + near[..., 1:-1, :-2] + near[..., 1:-1, 2:]
        values = torch.where(holes, total / 4, values)
    return values


class Painter(nn.Module):
    """Corrects decoded pictures by what tokens do not say: what is visible, and where the hole is. What they are off by
    at the rim of the hole is interpolated smoothly into it. Residual convolutions are added, some of them with a wide
    view, on a grid of a quarter of the side; the last one starts at zero."""

    def __init__(self, width=48, far_width=64):
        super().__init__()
        conv = functools.partial(nn.Conv2d, kernel_size=3, padding=1)
        self.first = conv(4, width)  # red, green, blue and the hole
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
        start = decoded + membrane(pixels - decoded, holes)  # (B, 3, S, S)
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
        """The same of arrays, the images as uint8, AT_ONCE at a time."""
        tensors = map(torch.from_numpy, (decoded, images / np.float32(255), holes))
        parts = (tensor.to(self.first.weight.device).split(AT_ONCE) for tensor in tensors)
        return torch.cat([self(*batch) for batch in zip(*parts, strict=True)]).cpu().numpy()


def train_painter(recipe, tokenizer, pictures, device):
    """A Painter that has learnt the least squared error in holes of pictures (N, S, S, 3) uint8. It is shown the tokens
    of the picture with noise in the hole: about as wrong as the transformer's."""
    torch.manual_seed(recipe.seed)
    painter = Painter().to(device)
    optimizer = torch.optim.AdamW(painter.parameters(), lr=3e-3, betas=(0.9, 0.95))  # 0.999 is unstable
    steps = recipe.painter_steps
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 30) * (1 - step / steps))
    for step in range(steps):
        rng = np.random.default_rng([recipe.seed, 4, step])  # with a 4, as cats have [seed, i]
        pixels = pictures[np.sort(rng.integers(len(pictures), size=16))] / np.float32(255)
        if recipe.mirror and rng.random() < 0.5:
            pixels = pixels[:, :, ::-1].copy()
        holes = np.stack([HOLES[kind](rng, recipe.size) for kind in rng.choice(list(HOLES), len(pixels))])
        strength = rng.uniform(0, 0.15, (len(pixels), 1, 1, 1))  # of the noise in each picture
        noise = rng.normal(0, strength, pixels.shape)
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
# Training


def make_batch(recipe, tokenizer, pictures):
    """batch(step) for train(): some rows hide recipe.mask, the others what lies in holes."""
    views = (pictures, pictures[:, :, ::-1]) if recipe.mirror else (pictures,)
    parts = [view[start : start + 256] for view in views for start in range(0, len(view), 256)]
    grids = np.concatenate([tokenizer.encode(part / np.float32(255)) for part in parts]).astype(np.int32)  # (N, h, w)
    coords = maskgit.grid_coords(*grids.shape[1:])
    with_hole = int(recipe.hole_rows * recipe.batch_size)  # never all rows: a batch must not come to hide nothing
    of_each = min(1000, 1 + recipe.steps * with_hole)  # holes of each kind: few for a short run
    holes = [make_holes(kind, of_each, recipe.size, TRAINING_SEED) for kind in HOLES]
    holes = token_mask(tokenizer, np.concatenate(holes))  # (4 * of_each, T)

    def batch(step):
        generator = torch.Generator().manual_seed(maskgit.step_seed(recipe.seed, step))
        rows = torch.randint(len(grids), (recipe.batch_size,), generator=generator)
        tokens = torch.from_numpy(grids[rows.numpy()].astype(np.int64)).flatten(1)
        mask = maskgit.training_mask((len(rows) - with_hole, tokens.shape[1]), recipe.mask, generator, coords)
        hole = holes[torch.randint(len(holes), (with_hole,), generator=generator)]
        # As in decoding, some tokens of a hole may be known: of every second one all are hidden, of the others a share.
        share = 2 * torch.rand(with_hole, 1, generator=generator)
        hole &= torch.rand(hole.shape, generator=generator) < share
        return tokens, torch.cat([mask, hole]), coords

    return batch


def train_model(recipe, tokenizer, painter, split, device, **options):
    """An Inpainter whose model did best in the holes of validation pictures, and the rows of its log."""
    inpainter = Inpainter(recipe.new_model(recipe.codes, device), tokenizer, painter, recipe.precision)
    inputs = list(input_batches(inpainter, *with_holes(split.validation[:200], recipe.hole, VALIDATION_SEED)))
    options |= dict(best_by="validation", validate=lambda _: {"validation": cross_entropy(inpainter, inputs)})
    if painter is not tokenizer:  # a VQGAN, which is both, stays in its own file
        options |= dict(tokenizer=tokenizer, extra=painter.state_dict())
    return inpainter, maskgit.train(inpainter.model, make_batch(recipe, tokenizer, split.training), recipe, **options)


def input_batches(inpainter, images, holes, informed=False):
    """AT_ONCE pictures at a time: what model_input gives, the true tokens (B, T), and the evidence if `informed`."""
    tokenizer = inpainter.tokenizer
    for start in range(0, len(images), AT_ONCE):
        part, hole = images[start : start + AT_ONCE], holes[start : start + AT_ONCE]
        tokens, mask, coords = model_input(inpainter, part, hole)
        true = torch.from_numpy(tokenizer.encode(part / np.float32(255))).flatten(1).to(tokens.device)
        evidence = pixel_evidence(tokenizer, part, hole).to(tokens.device) if informed else 0
        yield tokens, mask, coords, true, evidence


@torch.no_grad()
def cross_entropy(inpainter, inputs):
    """Nats per hidden token of input_batches, all of them hidden at once."""
    model = inpainter.model
    total, count = 0.0, 0
    for tokens, mask, coords, true, evidence in inputs:
        with maskgit.precision_context(tokens.device, inpainter.precision):
            logits = model(tokens.masked_fill(mask, model.mask_id), coords).float()
        hidden = int(mask.sum())
        total += float(maskgit.masked_cross_entropy(logits + evidence, true, mask)) * hidden
        count += hidden
    return total / count


# ---------------------------------------------------------------------------------------------------
# Scores and pictures of a run


def psnr(images, holes, filled):
    """The peak signal-to-noise ratio inside the holes, in dB: the mean over the pictures."""
    errors = [error[hole] for error, hole in zip(filled.astype(float) - images, holes, strict=True)]
    return float(np.mean([10 * math.log10(255**2 / max(np.square(error).mean(), 1e-9)) for error in errors]))


def score(inpainter, images, seen, filling):
    """Of test images and of some seen in training, in each kind of holes: nats per hidden token, dB in the holes."""
    tokenizer, scores = inpainter.tokenizer, {}
    true = tokenizer.decode(tokenizer.encode(images / np.float32(255)))
    for kind in HOLES:
        test = with_holes(images, kind, TEST_SEED)
        old = with_holes(seen, kind, TEST_SEED)
        entropies = {"test": input_batches(inpainter, *test), "seen": input_batches(inpainter, *old)}
        if tokenizer.centroids is not None:  # as a VQGAN has none
            entropies["with evidence"] = input_batches(inpainter, *test, informed=True)
        scores[kind] = {f"nats, {name}": cross_entropy(inpainter, batches) for name, batches in entropies.items()}
        scores[kind]["dB, test"] = psnr(*test, fill_in_batches(inpainter, *test, filling))
        scores[kind]["dB, seen"] = psnr(*old, fill_in_batches(inpainter, *old, filling))
        scores[kind]["dB, true tokens"] = psnr(*test, into_holes(true, *test, inpainter.painter))
    return {"scored": len(images), "scores": scores}


def save_pictures(out, inpainter, images, holes, filling, history):
    """samples.png, of the first four images; decode.gif; and loss.png."""
    grey = paste(images, holes, np.uint8(GREY))
    filled = [fill(inpainter, images[:4], holes[:4], filling, seed) for seed in range(3)]
    sheet(np.stack([grey[:4], *filled, images[:4]], 1), ["hole", *["filled"] * 3, "truth"]).save(out / "samples.png")
    frames = [grey, *trace_pictures(inpainter, images, holes, filling)]
    maskgit.save_gif(out / "decode.gif", [sheet(pictures) for pictures in frames])
    steps, training, validation = ([row[name] for row in history] for name in ("step", "loss", "validation"))
    curves = {"training": (steps, training), "holes of validation": (steps, validation)}
    maskgit.line_plot(curves, title="Inpainting: loss", y_label="nats per hidden token").save(out / "loss.png")


def trace_pictures(inpainter, images, holes, filling):
    """The pictures after each step of filling, with what is still hidden in grey."""
    tokenizer = inpainter.tokenizer
    side = images.shape[1] // tokenizer.patch
    trace, shown = [], []
    fill(inpainter, images, holes, replace(filling, grain=False), trace=trace)
    for tokens, mask in trace:
        hidden = mask.cpu().numpy().reshape(-1, side, side)
        hidden = hidden.repeat(tokenizer.patch, axis=1).repeat(tokenizer.patch, axis=2)  # (B, S, S)
        decoded = decode_tokens(tokenizer, tokens.masked_fill(mask, 0))
        # Hidden tokens reach beyond the hole: what stands for them there must not mislead the painter.
        pictures = into_holes(decoded, images, holes | hidden, inpainter.painter)
        shown.append(paste(paste(images, holes, pictures), holes & hidden, np.uint8(GREY)))
    return shown


def sheet(pictures, titles=()):
    """Pictures (..., S, S, 3) uint8 as one, in columns with titles or four in a row."""
    pictures = pictures.reshape(-1, *pictures.shape[-3:])
    return maskgit.image_grid(pictures / 255, len(titles) or 4, scale=max(1, 128 // pictures.shape[1]), titles=titles)


# ---------------------------------------------------------------------------------------------------
# Filling files

AROUND_MASK = " _-."  # separators


def name_keys(file, is_mask):
    """By each of the three rules what a picture and its mask have in common: the name; the mask's without "mask"; the
    last number, or None."""
    name = unicodedata.normalize("NFC", file.stem.casefold())
    without = name
    if is_mask and (words := list(re.finditer(r"masks?\d*", name))):
        last = words[-1]
        without = name[: last.start()].rstrip(AROUND_MASK) + name[last.end() :].lstrip(AROUND_MASK)
    numbers = re.findall(r"\d+", name)
    return name, without, int(numbers[-1]) if numbers else None


def pair_by_name(pictures, masks, may_leave_masks):
    """{picture: mask} by the first rule that gives each picture a mask of its own and leaves none over, or may."""
    for rule in range(3):
        by_key = collections.defaultdict(list)
        for mask in masks:
            by_key[name_keys(mask, True)[rule]].append(mask)
        by_key.pop(None, None)  # a name without a number
        found = {picture: by_key[name_keys(picture, False)[rule]] for picture in pictures}
        pairs = {picture: theirs[0] for picture, theirs in found.items() if len(theirs) == 1}
        if len(pairs) == len(set(pairs.values())) == len(pictures) and (may_leave_masks or len(pairs) == len(masks)):
            return pairs
    shown = [listed(file.name for file in files) for files in (pictures, masks)]
    both = f"{len(pictures)} pictures ({shown[0]}) and {len(masks)} masks ({shown[1]})"
    raise InputError(f"by their names {both} do not belong together one by one; --help has the rules")


def listed(names):
    """Some of them, and how many more there are."""
    names = list(names)
    return ", ".join(names[:4]) + f" and {len(names) - 4} more" * (len(names) > 4)


def pair_files(images, masks, out):
    """[(picture, mask)] of two folders, of one that holds both, or of single files; one mask serves all pictures."""
    together = images.is_dir() and images.resolve() == masks.resolve()
    pictures = picture_files(images, [out] if together else [out, masks])
    if masks.is_file():
        return [(picture, masks) for picture in pictures]
    if together:
        holes = [file for file in pictures if "mask" in file.stem.lower()]
        pictures = [file for file in pictures if file not in holes]
    else:
        holes = picture_files(masks, [out, images])
    return sorted(pair_by_name(pictures, holes, images.is_file()).items())


def read_mask(file, invert):
    """The hole that a mask leaves: bool (H, W)."""
    image = read_image(file)
    if image.has_transparency_data and np.ptp(image.convert("RGBA").getchannel("A").getextrema()):
        raise InputError(f"{file} is transparent in part: save it without, the hole in black, the rest in white")
    levels = np.asarray(image if image.mode.startswith("I;16") else image.convert("RGB").convert("L"))
    white = 65535 if image.mode.startswith("I;16") else 255
    if levels.max() <= 1:  # of 0 and 1 alone
        white = 1
    low, high = levels.min(), levels.max()
    one_sided = low < high and (low > white / 2 or high <= white / 2)
    if one_sided or np.mean((levels > white / 8) & (levels < white * 7 / 8)) >= 0.5:
        raise InputError(f"{file} is no mask in black and white: its values are {low} to {high}, and white is {white}")
    bright = levels > white / 2
    return bright if invert else ~bright


def read_pair(picture, mask, invert):
    """A picture of read_picture, and its hole (H, W)."""
    image = read_picture(picture)
    hole = read_mask(mask, invert)
    if image.size != hole.shape[::-1]:
        sizes = f"{mask} is {hole.shape[1]}x{hole.shape[0]}, {picture} is {image.width}x{image.height}"
        raise InputError(f"{sizes}; a mask has its image's size")
    return image, hole


def open_model(path, device, precision):
    """The Inpainter that a run of this script has left, and the run's settings."""
    checkpoint = maskgit.load_checkpoint(path, device)
    painter = Painter().to(device).eval()
    try:
        painter.load_state_dict(checkpoint["extra"])
    except (RuntimeError, TypeError):
        raise InputError(f"{path} is no checkpoint of inpaint.py, or an old one: it holds no painter") from None
    return Inpainter(checkpoint["model"], checkpoint["tokenizer"], painter, precision), checkpoint["config"]


def require_free(results, pairs, overwrite):
    """InputError if one of the files is another result, what is to be filled, or there already."""
    given = {file.resolve() for pair in pairs for file in pair}
    for file, count in collections.Counter(results).items():
        if count > 1:
            raise InputError(f"two pictures would become {file}; rename one, or fill them apart")
        if file.resolve() in given:
            raise InputError(f"{file} is read from and would be written to; --out renames")
        if file.exists() and not overwrite:
            raise InputError(f"{file} exists; --force overwrites, --out renames")


def write_result(file, picture, pixels):
    """A PNG of RGB pixels (H, W, 3), with the mode, the transparency and the colour profile of a picture."""
    result = Image.fromarray(pixels).convert(picture.mode.rstrip("A"))
    if picture.mode.endswith("A"):
        result.putalpha(picture.getchannel("A"))
    buffer = io.BytesIO()
    result.save(buffer, "PNG", icc_profile=picture.info["icc_profile"])
    maskgit.write_whole(file, buffer.getbuffer())


def fill_files(inpainter, size, filling, arguments, seed):
    """Fill the holes of files by a model of pictures of that size: a PNG for each, or for each of --samples. All files
    are read before one is written."""
    pairs = pair_files(arguments.images, arguments.masks, arguments.out)
    endings = [""] if arguments.samples == 1 else [f"_{i}" for i in range(1, arguments.samples + 1)]
    results = [[arguments.out / f"{picture.stem}{ending}.png" for ending in endings] for picture, _ in pairs]
    require_free(itertools.chain(*results), pairs, arguments.force)
    for picture, mask in pairs:
        _, hole = read_pair(picture, mask, arguments.invert_masks)
        if hole.all() or not hole.any():
            print(f"{picture}: by {mask} {'nothing is visible' if hole.all() else 'there is no hole'}")
    for pair, files in zip(pairs, results, strict=True):
        picture, hole = read_pair(*pair, arguments.invert_masks)
        pixels = np.asarray(picture.convert("RGB"))
        for i, file in enumerate(files):
            filled = fill_picture(inpainter, size, pixels, hole, filling, seed, i)
            write_result(file, picture, filled)
    print(f"pictures filled: {len(pairs)}, in {arguments.out}")


# ---------------------------------------------------------------------------------------------------
# One run

DEFAULTS = dict(dim=128, layers=4, hidden=128, batch_size=16, steps=5000)
# R1 and R2's sizes and optimiser; as many steps as 100 epochs of their 12,000 pictures take.
REPORT = dict(dim=768, heads=16, layers=15, hidden=1536, rotary=False, batch_size=10, lr=1e-4, optimizer="adamw")
REPORT |= dict(betas=(0.9, 0.96), decay="constant", warmup=0, steps=100 * 12_000 // 10, loss="all", mirror=False)
REPORT |= dict(dropout=0.1, hole_rows=0.0)
PRESETS = {"report": REPORT}


def command_line(description, recipe, filling, out):
    """The parser of a script that trains, or fills files, with defaults for a recipe and a filling."""
    parser = maskgit.CommandLine(description)
    parser.add_argument("--preset", choices=PRESETS, help="R1 and R2's sizes, optimiser and loss")
    maskgit.add_run_flags(parser, out)
    add = parser.add_argument_group("files to fill, instead of a training").add_argument
    add("--checkpoint", type=Path, help="fill by this model")
    add("--images", type=Path, help="folder of pictures, or one file")
    add("--masks", type=Path, help="folder of their masks, or one file for all")
    add("--invert-masks", action="store_true", help="white is the hole, not black")
    add("--samples", type=maskgit.at_least(1), default=1, help="different results for each picture")
    add = parser.add_argument_group("pictures and scores of a training").add_argument
    add("--data", type=Path, help="folder of pictures, kept in TMPDIR meanwhile; if not given, cartoon cats")
    add("--test-images", type=maskgit.at_least(8), default=48, help="default %(default)s")
    add("--weights", type=maskgit.new_file, help="write the model to this file in bf16, without its training")
    maskgit.add_flags(parser, type(filling), **asdict(filling))
    maskgit.add_flags(parser, recipe, **DEFAULTS)
    return parser


def defaults_of(arguments):
    """What --preset and --images change."""
    return PRESETS.get(arguments.preset, {}) | ({"out": Path("runs/filled")} if arguments.images else {})


FILLS_ONLY = {"invert_masks", "samples"}
TRAINS_ONLY = {"preset", "data", "test_images", "weights", "json", "resume", *asdict(Inpainting())}
TRAINS_ONLY -= {"seed", "precision"}


def require_flags(parser, arguments, model):
    """Refuse a filling without one of the three that it needs, and flags that would be ignored."""
    needed = [model, arguments.images, arguments.masks]
    if any(needed) and not all(needed):
        parser.error("filling needs a model, --images and --masks: name all three")
    useless, purpose = (TRAINS_ONLY, "a training") if model else (FILLS_ONLY, "filling files")
    for name in sorted(useless & vars(arguments).keys()):
        if getattr(arguments, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is only for {purpose}")


def parse_arguments():
    """The command line, with the recipe and the filling in it."""
    parser = command_line(__doc__, Inpainting, Filling(), "runs/inpaint")
    arguments = parser.parse_with(defaults_of)
    require_flags(parser, arguments, arguments.checkpoint)
    return arguments, maskgit.settings_from(arguments, Inpainting), maskgit.settings_from(arguments, Filling)


def tokenizer_and_painter(arguments, recipe, pictures, device):
    """Those of the run that is resumed, or new ones."""
    if arguments.resume:
        before, _ = open_model(arguments.out / "model.pt", device, recipe.precision)
        return before.tokenizer, before.painter
    arguments.out.mkdir(parents=True, exist_ok=True)  # now, since it may be impossible
    some = pictures[:1200] / np.float32(255)
    tokenizer = maskgit.PatchTokenizer.fit(some, recipe.codes, recipe.patch, seed=recipe.seed)
    return tokenizer, train_painter(recipe, tokenizer, pictures, device)


def train_and_score(record, arguments, recipe, filling, vqgan=None):
    """A whole run. A VQGAN is tokenizer and painter in one."""
    maskgit.require_no_run(arguments.out, arguments.resume, arguments.force)
    device = maskgit.pick_device(arguments.device)
    recipe = recipe.for_device(device)
    out = arguments.out
    started = time.monotonic()
    split, digest = open_pictures(arguments.data, recipe.cartoons, recipe.size, recipe.seed, out)
    recipe = replace(recipe, pictures_sha256=digest)
    split = split._replace(training=split.training[: recipe.training_images or None])
    counts = {name: len(part) for name, part in split._asdict().items()}
    print("pictures:", ", ".join(f"{count} {name}" for name, count in counts.items()))
    pair = (vqgan, vqgan) if vqgan else tokenizer_and_painter(arguments, recipe, split.training, device)
    prepared = time.monotonic()
    options = dict(out=out, resume=arguments.resume, force=arguments.force)
    inpainter, history = train_model(recipe, *pair, split, device, **options)
    if maskgit.process_rank()[0] > 0:
        return
    trained = time.monotonic()
    test, seen = (part[: arguments.test_images] for part in (split.test, split.training))
    figures = {"pictures": counts} | score(inpainter, test, seen, replace(filling, grain=False))
    figures["parameters"] = sum(p.numel() for p in inpainter.model.parameters())
    figures["validation"] = min(row["validation"] for row in history)
    seconds = {"prepared": prepared - started, "trained": history[-1]["seconds"], "scored": time.monotonic() - trained}
    figures["seconds"] = {name: round(value) for name, value in seconds.items()}
    rows = [[kind, *(f"{value:.4g}" for value in scores.values())] for kind, scores in figures["scores"].items()]
    maskgit.print_table(["holes", *figures["scores"][recipe.hole]], rows)
    save_pictures(out, inpainter, *with_holes(test[:8], recipe.hole, TEST_SEED), filling, history)
    print("pictures:", *sorted(out.glob("*.png")), out / "decode.gif")
    if arguments.weights:
        save_weights(arguments.weights, maskgit.load_checkpoint(out / "model.pt"))
    settings = vars(arguments) | asdict(recipe) | asdict(filling)
    maskgit.write_figures(record, settings, figures, out / "metrics.json", arguments.json)


def save_weights(path, run):
    """What fills, but cannot go on: model and painter in bf16, which loading makes float32, and the tokenizer."""
    painter = {name: tensor.bfloat16() for name, tensor in (run["extra"] or {}).items()}
    kept = {name: run[name] for name in ("tokenizer", "config", "step")}
    maskgit.save_checkpoint(path, run["model"].bfloat16(), extra=painter, **kept)


def main():
    record = maskgit.run_record()
    arguments, recipe, filling = parse_arguments()
    if arguments.checkpoint:
        device = maskgit.pick_device(arguments.device)
        inpainter, run = open_model(arguments.checkpoint, device, recipe.for_device(device).precision)
        fill_files(inpainter, run["size"], filling, arguments, recipe.seed)
    else:
        train_and_score(record, arguments, recipe, filling)
        print(f"to fill: python inpaint.py --checkpoint {arguments.out}/model.pt --images DIR --masks DIR --out DIR")


if __name__ == "__main__":
    maskgit.run_as_script(main)
