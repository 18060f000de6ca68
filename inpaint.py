"""R1 and R2's experiment: photographs with holes, filled in by MaskGIT on k-means tokens.

    python inpaint.py                                   drawn cartoon cats: train, fill, score; nothing to download
    python inpaint.py --data FOLDER --out runs/mine     the same on your own pictures
    python inpaint.py --checkpoint runs/inpaint/model.pt --images DIR --masks DIR --out DIR      fill holes

A mask has its image's size: 255 (white) is visible, 0 is the hole. A token with any hole pixel is hidden, and predicted
from the others; the pixels that were visible come back as they were.

The cats: 21.5 dB inside the holes after nine minutes on two cores of an AMD EPYC server, where the codebook allows 26.1
(results/inpaint.json). Photographs, 54 minutes: 20.4 of 24.7 dB (results/inpaint_cats64.json).

A run leaves model.pt, log.csv, metrics.json and its pictures in runs/inpaint (--out).
"""

import argparse
import hashlib
import itertools
import math
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

import fid
from maskgit import (
    SCHEDULES,
    CommandLine,
    PatchTokenizer,
    at_least,
    decode,
    fast_precision,
    grid_coords,
    image_grid,
    image_patches,
    line_plot,
    load_checkpoint,
    mask_kind,
    masked_cross_entropy,
    open_run,
    pick_device,
    precision_context,
    print_table,
    process_rank,
    run_as_script,
    run_record,
    save_gif,
    share,
    step_seed,
    train_as_set,
    training_mask,
    write_figures,
)

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
# Shares of the images by their content's hash; of the 8,303 photographs these are about 7,000, 500 and 803.
TRAINING_SHARE, VALIDATION_SHARE = 0.843, 0.060
CODEBOOK_IMAGES = 1200  # whose patches the codebook is fitted to
RIM_NOISE = 3.5  # more than 1, since pixels are correlated; the best of 2, 3, 3.5, 4 and 5 on validation photographs
HOLE_SHARE = 0.24  # of the pixels, as in R1 and R2's masks
VALIDATION_SEED, TEST_SEED = 1, 2  # of the holes
GREY = 128  # what R1 and R2 paint the hole with

# ---------------------------------------------------------------------------------------------------
# Pictures from a folder


def picture_files(path):
    """The picture files of a folder in the order of their names, or the file itself."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"there is no folder or file {path}")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{path} holds no pictures ({' '.join(sorted(SUFFIXES))})")
    return files


def read_picture(file, mode):
    """A picture in "RGB" or "L"; ValueError if it cannot be read."""
    try:
        image = Image.open(file)
        if image.mode.startswith("I;16"):  # Pillow would cut 16-bit values off at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert(mode)
    except Exception as error:  # Pillow raises many types
        raise ValueError(f"{file} cannot be read: {error}") from None


def load_pictures(folder, size):
    """The distinct pictures of a folder, centre-cropped and resized: uint8 (N, size, size, 3), hashes (N,) in [0, 1).

    What cannot be read is named and left out; what repeats an earlier picture pixel by pixel is counted and left out.
    """
    files, hashes, duplicates = picture_files(folder), {}, 0
    pictures = on_disk((len(files), size, size, 3), np.uint8)
    for file in files:
        try:
            image = read_picture(file, "RGB")
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        digest = content_hash(np.asarray(image))
        if digest in hashes:
            duplicates += 1
            continue
        pictures[len(hashes)] = np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))
        hashes[digest] = None
    print(f"{folder}: {len(hashes)} distinct pictures, {duplicates} duplicates left out")
    return pictures[: len(hashes)], np.array([*hashes])


def on_disk(shape, dtype):
    """An array in a temporary file (TMPDIR says where), so that memory does not limit it."""
    return np.memmap(tempfile.TemporaryFile(), dtype, "w+", shape=shape)


def content_hash(pixels):
    """A number in [0, 1) that depends on the pixels (H, W, 3) alone."""
    digest = hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


class Pictures:
    """Some of the pictures (N, size, size, 3) of an array, uint8; a slice of them is read when it is asked for."""

    def __init__(self, images, rows):
        self.images, self.rows = images, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, part):
        return np.asarray(self.images[self.rows[part]])


class Split(NamedTuple):
    training: Pictures
    validation: Pictures
    test: Pictures


def split_by_content(images, hashes):
    """A Split by the hashes alone, so that adding pictures never moves one from test to training."""
    edges = (0, TRAINING_SHARE, TRAINING_SHARE + VALIDATION_SHARE, 1)
    rows = [np.flatnonzero((hashes >= low) & (hashes < high)) for low, high in itertools.pairwise(edges)]
    if min(map(len, rows)) < 2:
        raise ValueError(f"{len(images)} distinct pictures are too few for training, validation and test")
    return Split(*(Pictures(images, part) for part in rows))


# ---------------------------------------------------------------------------------------------------
# Cartoon cats

FUR = [(232, 158, 70), (120, 118, 122), (60, 56, 60), (222, 205, 180), (150, 100, 62), (245, 240, 232), (182, 140, 98)]
EYES = [(108, 178, 74), (238, 184, 48), (82, 150, 210), (176, 200, 80), (206, 122, 40)]
WALLS = [(150, 190, 220), (235, 200, 190), (190, 215, 170), (240, 225, 170), (200, 185, 225), (120, 145, 150)]
DRAWN = 4  # times the size a cat is drawn in, before it is reduced


def cartoon_cat(rng, size=64):
    """A cat's face that is drawn by the numbers of `rng`: uint8 (size, size, 3)."""
    canvas = Image.new("RGB", (256, 256))
    draw = ImageDraw.Draw(canvas)
    draw_wall(draw, rng)
    x, y = 128 + rng.normal(0, 8, 2) + (0, 8)
    width, height = rng.uniform(70, 92), rng.uniform(60, 78)
    fur, second = (np.array(FUR[i]) for i in rng.choice(len(FUR), 2, replace=False))
    dark, light = colour(fur * 0.72), colour(fur * 0.4 + np.array([255, 250, 240]) * 0.6)
    pattern = rng.choice(["plain", "tabby", "mask", "patch", "siamese"])
    ellipse(draw, x, y + 130, width * 1.05, 80, colour(fur * 0.9))  # the body

    ear, lean = rng.uniform(46, 66), rng.choice((0.55, 0.8))
    for side in (-1, 1):
        tip = (x + side * width * (lean + 0.22), y - height * 0.55 - ear)
        base = [(x + side * width * 0.96, y - height * 0.15), (x + side * width * 0.22, y - height * 0.85)]
        draw.polygon([tip, *base], fill=dark if pattern == "siamese" else colour(fur))
        inner = [tuple(0.58 * np.array(p) + 0.42 * np.mean([tip, *base], axis=0)) for p in (tip, *base)]
        draw.polygon(inner, fill=(230, 160, 160))
    ellipse(draw, x, y, width, height, colour(fur))
    draw_pattern(draw, pattern, x, y, width, height, dark, colour(second), light)
    draw_face(draw, rng, x, y, width, height, light if pattern != "siamese" else dark)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX))


def colour(values):
    return tuple(int(v) for v in np.clip(values, 0, 255))


def ellipse(draw, x, y, width, height, fill):
    draw.ellipse([x - width, y - height, x + width, y + height], fill=fill)


def draw_wall(draw, rng):
    """A background: a wall, perhaps with stripes, perhaps with a floor."""
    wall = np.array(WALLS[rng.integers(len(WALLS))])
    draw.rectangle([0, 0, 256, 256], fill=colour(wall))
    if rng.random() < 0.4:
        step = rng.integers(28, 52)
        for x in range(-step, 256, step):
            draw.rectangle([x, 0, x + step // 2, 256], fill=colour(wall * 0.9))
    if rng.random() < 0.5:
        draw.rectangle([0, rng.integers(180, 225), 256, 256], fill=colour(wall * 0.7))


def draw_pattern(draw, pattern, x, y, width, height, dark, second, light):
    """What is on the fur: stripes, a light mask, a patch of a second colour, or a dark face."""
    if pattern == "tabby":
        for shift in (-0.24, 0, 0.24):
            draw.line([(x + shift * width, y - height * 0.93), (x + shift * width * 0.8, y - height * 0.5)], dark, 9)
        for side, row in itertools.product((-1, 1), (0.1, 0.35)):
            start, end = (
                (x + side * width * 0.97, y + height * row),
                (x + side * width * 0.62, y + height * (row + 0.06)),
            )
            draw.line([start, end], dark, 8)
    elif pattern == "mask":
        draw.polygon(
            [(x, y - height * 0.7), (x - width * 0.5, y + height * 0.75), (x + width * 0.5, y + height * 0.75)], light
        )
    elif pattern == "patch":
        draw.pieslice([x - width, y - height, x + width, y + height], 265, 20, fill=second)
    elif pattern == "siamese":
        ellipse(draw, x, y + height * 0.2, width * 0.62, height * 0.68, dark)


def draw_face(draw, rng, x, y, width, height, muzzle):
    apart, level, radius = width * rng.uniform(0.42, 0.48), y - height * rng.uniform(0.05, 0.1), rng.uniform(18, 22)
    iris, slit = EYES[rng.integers(len(EYES))], rng.choice((0.3, 0.8))
    closed = rng.random() < 0.1
    for side in (-1, 1):
        centre = x + side * apart
        if closed:
            draw.arc([centre - radius, level - radius, centre + radius, level + radius], 20, 160, (30, 25, 25), 6)
            continue
        ellipse(draw, centre, level, radius + 3, radius + 1, (30, 25, 25))
        ellipse(draw, centre, level, radius, radius - 2, iris)
        ellipse(draw, centre, level, radius * slit * 0.7, radius * 0.85, (15, 12, 12))
        ellipse(draw, centre - radius * 0.3, level - radius * 0.35, 5, 5, (255, 255, 255))
    nose = y + height * 0.32
    for side in (-1, 1):
        ellipse(draw, x + side * width * 0.2, nose + 18, width * 0.26, height * 0.22, muzzle)
    pink = (225, 130, 140) if rng.random() < 0.7 else (70, 50, 50)
    draw.polygon([(x - 12, nose - 7), (x + 12, nose - 7), (x, nose + 8)], fill=pink)
    for side in (-1, 1):
        left = x - 20 if side < 0 else x
        draw.arc([left, nose + 2, left + 20, nose + 22], 10, 170, (50, 35, 35), 4)
        for tilt in (-10, 0, 10):
            start = (x + side * width * 0.38, nose + 14 + tilt / 2)
            draw.line([start, (x + side * width * 1.15, nose + 10 + tilt * 1.8)], (250, 250, 250), 3)


def cartoon_cats(count, size, seed=0):
    """The first `count` cats of an endless series: uint8 (count, size, size, 3)."""
    return np.stack([cartoon_cat(np.random.default_rng([seed, i]), size) for i in range(count)])


def open_pictures(folder, cartoons, size, seed):
    """The Split of a folder's pictures, or without a folder of so many drawn cats."""
    if folder:
        return split_by_content(*load_pictures(Path(folder), size))
    cats = cartoon_cats(cartoons, size, seed)
    return split_by_content(cats, np.array([content_hash(cat) for cat in cats]))


# ---------------------------------------------------------------------------------------------------
# Holes


def make_holes(kind, count, size, seed):
    """Random holes: bool (count, size, size), True = to be filled."""
    return np.stack([HOLES[kind](np.random.default_rng([seed, i]), size) for i in range(count)])


def brush_hole(rng, size):
    """Strokes of a brush 3 pixels wide that wanders until HOLE_SHARE of the pixels is gone, like the reports' masks."""
    canvas = Image.new("1", (size, size))
    draw = ImageDraw.Draw(canvas)
    while np.asarray(canvas).mean() < HOLE_SHARE:
        x, y = rng.uniform(0, size, 2)
        for dx, dy in rng.normal(0, size / 32, (size, 2)):
            draw.line([(x, y), (x + dx, y + dy)], fill=1, width=max(1, round(3 * size / 64)))
            x, y = min(max(x + dx, 0), size), min(max(y + dy, 0), size)
    return np.asarray(canvas)


def box_hole(rng, size):
    hole, side = np.zeros((size, size), bool), round(size * HOLE_SHARE**0.5)
    y, x = rng.integers(size - side + 1, size=2)
    hole[y : y + side, x : x + side] = True
    return hole


def half_hole(rng, size):
    """One of the four halves."""
    hole = np.zeros((size, size), bool)
    hole[:, : size // 2] = True
    return np.rot90(hole, rng.integers(4))


ORDERS = ("confidence", "random", "halton", "entropy")
HOLES = {"brush": brush_hole, "box": box_hole, "half": half_hole}


def hidden_tokens(holes, patch):
    """Holes (B, H, W) -> bool (B, h, w): a token with any hole pixel is hidden."""
    b, height, width = holes.shape
    return holes.reshape(b, height // patch, patch, width // patch, patch).any(axis=(2, 4))


# ---------------------------------------------------------------------------------------------------
# Filling


def pixel_evidence(tokenizer, images, holes):
    """Log-likelihood (B, h * w, K) of each token's visible pixels under each code, up to a term without the code.

    Most hidden tokens lie on the rim of a hole and show some of their pixels, which the transformer does not see. They
    are taken as normal around the code's centroid; the variance is that of the picture's wholly visible tokens, times
    RIM_NOISE. A token that is wholly hidden gets 0 for every code.
    """
    patch, b = tokenizer.patch, len(images)
    pixels = image_patches(images / np.float32(255), patch, patch).reshape(b, -1, tokenizer.centroids.shape[1])
    visible = image_patches(~holes[..., None].repeat(images.shape[-1], axis=-1), patch, patch).reshape(pixels.shape)
    whole = visible.all(axis=-1)  # (B, h * w)
    errors = np.square(pixels - tokenizer.centroids[tokenizer.nearest(pixels)]).mean(axis=-1)
    noise = (errors * whole).sum(axis=1) / whole.sum(axis=1).clip(min=1)
    noise[~whole.any(axis=1)] = 0.01  # nothing to measure it on
    noise = torch.from_numpy(RIM_NOISE * noise.clip(min=255**-2))[:, None, None]  # 8 bits leave no less
    pixels, visible, centroids = map(torch.from_numpy, (pixels, visible.astype(np.float32), tokenizer.centroids))
    distances = visible @ centroids.T.square() - 2 * (visible * pixels) @ centroids.T  # (B, h * w, K)
    return -distances / (2 * noise).float()


def fill(checkpoint, images, holes, options, seed=0, trace=None):
    """Codes (B, h, w) of images (B, S, S, 3) uint8, whose tokens under the holes (B, S, S) are predicted.

    checkpoint is that of load_checkpoint; trace and options other than these go to decode: with "evidence" the visible
    pixels of hidden tokens count as well, "blend" is for to_pictures.
    """
    model, tokenizer = checkpoint["model"], checkpoint["tokenizer"]
    device = next(model.parameters()).device
    codes = torch.from_numpy(encode(tokenizer, images)).to(device)  # (B, h, w)
    mask = torch.from_numpy(hidden_tokens(holes, tokenizer.patch)).to(device).flatten(1)
    evidence = pixel_evidence(tokenizer, images, holes).to(device) if options["evidence"] else None
    decoding = {name: value for name, value in options.items() if name not in ("evidence", "blend")}
    with precision_context(device, fast_precision(device)):
        filled = decode(
            model,
            codes.flatten(1),
            mask,
            grid_coords(*codes.shape[1:]).to(device),
            evidence=evidence,
            generator=torch.Generator(device).manual_seed(seed),
            trace=trace,
            **decoding,
        )
    return filled.view_as(codes).cpu().numpy()


def to_uint8(pixels):
    return (pixels * 255).round().clip(0, 255).astype(np.uint8)


def to_pictures(tokenizer, codes, images, holes, blend):
    """Codes (B, h, w) in the holes of images (B, S, S, 3): uint8. `blend` shifts them to join what is visible.

    What is visible shows by how much the decoded picture is off there; into the hole this error is continued as a
    membrane (Pérez et al., Poisson image editing, 2003).
    """
    decoded = tokenizer.decode(codes)
    if blend:
        decoded = decoded + membrane(images / np.float32(255) - decoded, holes)
    return paste(images, holes, to_uint8(decoded))


def membrane(values, holes, sweeps=16):
    """Values (B, H, W, C), where those in the holes (B, H, W) become a membrane stretched over the others.

    Each hidden value is then the mean of its four neighbours, up to what `sweeps` at each size leave; where all is
    hidden it is 0.
    """
    b, height, width, channels = values.shape
    hidden = holes[..., None]
    values = np.where(hidden, 0, values)
    if holes.any() and height % 2 == width % 2 == 0:  # start from the membrane of half the size
        quads = (b, height // 2, 2, width // 2, 2, channels)
        known = (~hidden).repeat(channels, axis=-1).reshape(quads).sum(axis=(2, 4))
        coarse = membrane(values.reshape(quads).sum(axis=(2, 4)) / known.clip(min=1), known[..., 0] == 0)
        values = np.where(hidden, coarse.repeat(2, axis=1).repeat(2, axis=2), values)
    for _ in range(sweeps):
        padded = np.pad(values, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        mean = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
        values = np.where(hidden, mean / 4, values)
    return values


def paste(images, holes, filled):
    """The images, with the pixels of their holes from others."""
    return np.where(holes[..., None], filled, images)


def fill_in_batches(checkpoint, images, holes, options, seed=0, at_once=64):
    """Images (B, S, S, 3) with their holes filled, uint8."""
    parts = []
    for start in range(0, len(images), at_once):
        part = images[start : start + at_once], holes[start : start + at_once]
        codes = fill(checkpoint, *part, options, step_seed(seed, start))
        parts.append(to_pictures(checkpoint["tokenizer"], codes, *part, options["blend"]))
    return np.concatenate(parts)


# ---------------------------------------------------------------------------------------------------
# Training


def fit_tokenizer(images, settings):
    """Codebook of the patches of the first CODEBOOK_IMAGES pictures."""
    return PatchTokenizer.fit(
        images[:CODEBOOK_IMAGES] / np.float32(255), settings.codes, settings.patch, seed=settings.seed
    )


def encode(tokenizer, images):
    """Images (N, S, S, 3) uint8 -> codes (N, h, w)."""
    return tokenizer.encode(images / np.float32(255))


def encode_training(tokenizer, pictures, mirror):
    """The codes of Pictures, and of their mirror images: (N or 2 N, h, w) in the smallest type that holds them."""
    views, shape = (1, -1) if mirror else (1,), encode(tokenizer, pictures[:1]).shape[1:]
    codes = on_disk((len(views) * len(pictures), *shape), np.min_scalar_type(len(tokenizer.centroids) - 1))
    for i, view in enumerate(views):
        for start in range(0, len(pictures), 256):
            part = encode(tokenizer, pictures[start : start + 256][:, :, ::view])
            codes[i * len(pictures) + start :][: len(part)] = part
    return codes


def train_model(settings, tokenizer, split, device, **options):
    """The model with the lowest cross-entropy on the validation pictures' holes, and the rows of its log."""
    codes = encode_training(tokenizer, split.training, settings.mirror)
    coords, shape = grid_coords(*codes.shape[1:]).to(device), (settings.batch_size, codes[0].size)

    def batch(step):
        generator = torch.Generator().manual_seed(step_seed(settings.seed, step))
        rows = torch.randint(len(codes), (settings.batch_size,), generator=generator)
        tokens = torch.from_numpy(codes[rows.numpy()].astype(np.int64).reshape(shape))
        return tokens, training_mask(shape, settings.mask, generator), coords

    validation = make_test(split.validation[: settings.validation_images], tokenizer, settings, VALIDATION_SEED)

    def validate(model):
        return {"validation": validation.cross_entropy(model)}

    return train_as_set(
        settings,
        settings.codes,
        batch,
        device,
        betas=tuple(settings.betas),
        every_position=settings.loss == "all",
        may_change=ONLY_AFTER_TRAINING,
        tokenizer=tokenizer,
        validate=validate,
        best_by="validation",
        **options,
    )


# ---------------------------------------------------------------------------------------------------
# Scores


class Test(NamedTuple):
    """Pictures with holes and their true codes."""

    images: np.ndarray  # uint8 (B, S, S, 3)
    holes: np.ndarray  # bool (B, S, S)
    codes: torch.Tensor  # (B, h, w)
    mask: torch.Tensor  # bool (B, h * w)

    @torch.no_grad()
    def cross_entropy(self, model, tokenizer=None):
        """Nats per hidden token, all of them hidden at once; with a tokenizer their visible pixels count too."""
        device, total = next(model.parameters()).device, 0.0
        coords = grid_coords(*self.codes.shape[1:]).to(device)
        for start in range(0, len(self.images), 64):
            rows = slice(start, start + 64)
            codes, mask = self.codes[rows].flatten(1).to(device), self.mask[rows].to(device)
            with precision_context(device, fast_precision(device)):
                logits = model(codes.masked_fill(mask, model.mask_id), coords).float()
            if tokenizer:
                logits += pixel_evidence(tokenizer, self.images[rows], self.holes[rows]).to(device)
            total += float(masked_cross_entropy(logits, codes, mask)) * int(mask.sum())
        return total / int(self.mask.sum())


def make_test(images, tokenizer, settings, seed, kind=None):
    """A Test with holes of the kind that is set, or another."""
    holes = make_holes(kind or settings.hole, len(images), settings.size, seed)
    mask = torch.from_numpy(hidden_tokens(holes, tokenizer.patch)).flatten(1)
    return Test(images, holes, torch.from_numpy(encode(tokenizer, images)), mask)


def picture_scores(images, holes, filled):
    """PSNR (dB) and mean absolute error (of 255) inside the holes, SSIM of the whole, means over the pictures."""
    errors = filled.astype(np.float64) - images
    inside = [error[hole] for error, hole in zip(errors, holes, strict=True)]
    psnr = np.mean([10 * math.log10(255**2 / max(np.square(error).mean(), 1e-9)) for error in inside])
    l1 = np.mean([np.abs(error).mean() for error in inside])
    return {"psnr": float(psnr), "l1": float(l1), "ssim": structural_similarity(images, filled)}


def structural_similarity(x, y):
    """SSIM (Wang et al. 2004): Gaussian windows of 11x11 with sigma 1.5 that fit inside, mean over all channels."""
    window = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = (window[:, None] * window / window.sum() ** 2)[None, None]
    x, y = (torch.from_numpy(images).double().permute(0, 3, 1, 2).flatten(0, 1)[:, None] / 255 for images in (x, y))

    def mean(values):  # (B * C, 1, H, W) -> (B * C, 1, H - 10, W - 10)
        return F.conv2d(values, window)

    mean_x, mean_y = mean(x), mean(y)
    variances = mean(x * x) - mean_x**2 + mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((similarity / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))).mean())


def mean_colour(images, holes):
    """The holes in the mean of what is visible."""
    filled = [
        np.broadcast_to(image[~hole].mean(axis=0) if not hole.all() else GREY, image.shape)
        for image, hole in zip(images, holes, strict=True)
    ]
    return paste(images, holes, np.stack(filled).round().astype(np.uint8))


class Inception:
    """FID and KID of pictures against those of a test, where the Inception weights are at hand."""

    def __init__(self, weights, device):
        self.device, self.network, path = device, None, weights or fid.release_path()
        if weights or path.exists():
            self.network = fid.load_inception(weights=path, device=device)
        else:
            print(f"no FID and KID: the Inception weights are not at {path}; python fid.py fetches them, see --help")

    @torch.inference_mode()
    def features(self, images):
        parts = (fid.network_input(images[i : i + 8], self.device) for i in range(0, len(images), 8))
        return np.concatenate([self.network(part).cpu().numpy() for part in parts])

    def scores(self, images, filled):
        if self.network is None:
            return {}
        x, y = self.features(images), self.features(filled)
        return {"fid": fid.frechet_distance_from_features(x, y), "kid": fid.kernel_distance(x, y)[0]}


def score(checkpoint, split, settings):
    """All scores of a run: on test pictures, and for comparison on as many that were trained on."""
    count = settings.test_images
    test = make_test(split.test[:count], checkpoint["tokenizer"], settings, TEST_SEED)
    seen = make_test(split.training[:count], checkpoint["tokenizer"], settings, TEST_SEED)
    inception = Inception(settings.weights, next(checkpoint["model"].parameters()).device)

    def scored(name, filled, **more):
        return (
            {"name": name}
            | more
            | picture_scores(test.images, test.holes, filled)
            | inception.scores(test.images, filled)
        )

    rows = [scored("mean colour", mean_colour(test.images, test.holes))]
    for name, blend in (("true tokens", settings.blend), ("true tokens, as decoded", False)):
        truth = to_pictures(checkpoint["tokenizer"], test.codes.numpy(), test.images, test.holes, blend)
        rows.append(scored(name, truth))
    for name, options in ways_to_fill(settings):
        for seed in range(settings.score_seeds if options["sample"] == "categorical" else 1):
            start = time.perf_counter()
            filled = fill_in_batches(checkpoint, test.images, test.holes, options, seed)
            seconds = (time.perf_counter() - start) / len(filled)
            rows.append(scored(name, filled, seed=seed, seconds=seconds, **options))
        print(f"{name}: {rows[-1]['psnr']:.2f} dB", file=sys.stderr)
    entropies = {name: t.cross_entropy(checkpoint["model"]) for name, t in (("test", test), ("seen", seen))}
    entropies["with evidence"] = test.cross_entropy(checkpoint["model"], checkpoint["tokenizer"])
    others = {"seen": seen}
    for kind in HOLES:
        others[kind] = make_test(test.images, checkpoint["tokenizer"], settings, TEST_SEED, kind)
    for name, other in others.items():
        filled = fill_in_batches(checkpoint, other.images, other.holes, options_of(settings))
        others[name] = picture_scores(other.images, other.holes, filled)
    return {
        "pictures": {"training": len(split.training), "validation": len(split.validation), "test": len(split.test)},
        "scored": len(test.images),
        "hidden": {"pixels": float(test.holes.mean()), "tokens": float(test.mask.float().mean())},
        "cross_entropy": entropies,
        "as set": others,
        "rows": rows,
    }


def options_of(settings):
    """decode's arguments as set on the command line."""
    names = ("schedule", "order", "sample", "temperature", "choice_temperature", "stop_after", "evidence", "blend")
    return {name: getattr(settings, name) for name in names} | {"steps": settings.decode_steps}


def ways_to_fill(settings):
    """[(name, options of fill)]: as set, by other orders, and as the reports do by schedule and number of steps."""
    chosen = options_of(settings)
    reports = {"order": "confidence", "sample": "categorical", "temperature": 1.0, "choice_temperature": 4.5}
    reports |= {"stop_after": None, "evidence": False, "blend": False}
    ways = [("as set", chosen), ("as set, not blended", chosen | {"blend": False})]
    ways += [("as set, neither evidence nor blended", chosen | {"evidence": False, "blend": False})]
    ways += [("likeliest, T=1", chosen | {"sample": "argmax", "steps": 1})]
    ways += [(f"order {order}", chosen | {"order": order}) for order in ORDERS if order != chosen["order"]]
    for schedule, steps in itertools.product(settings.schedules.split(","), (1, 4, 8, 10, 20)):
        ways.append((f"{schedule}, T={steps}", reports | {"schedule": schedule, "steps": steps}))
    return ways


def print_scores(figures):
    names = [
        name for name in ("psnr", "l1", "ssim", "fid", "kid", "seconds") if any(name in r for r in figures["rows"])
    ]
    table = []
    for name in dict.fromkeys(row["name"] for row in figures["rows"]):
        rows = [row for row in figures["rows"] if row["name"] == name]
        table.append([name, *(spread([row[n] for row in rows if n in row]) for n in names)])
    print_table(["filled by", *names], table)
    rows = [[name, *(f"{value:.4g}" for value in row.values())] for name, row in figures["as set"].items()]
    print_table(["as set, on", "psnr", "l1", "ssim"], rows)
    shown = ", ".join(f"{name} {value:.3f}" for name, value in figures["cross_entropy"].items())
    print(f"cross-entropy, nats per hidden token: {shown}; seen: on pictures of the training")


def spread(values):
    """The mean of some figures, and the lowest and highest where there are several."""
    if not values:
        return ""
    text = f"{np.mean(values):.4g}"
    return text if len(values) == 1 else f"{text} ({min(values):.4g} to {max(values):.4g})"


# ---------------------------------------------------------------------------------------------------
# Pictures of a run


def draw_pictures(checkpoint, split, history, settings):
    """samples.png, steps.png, reconstruction.png, loss.png and decode.gif."""
    out, tokenizer = settings.out, checkpoint["tokenizer"]
    test = make_test(split.test[:8], tokenizer, settings, TEST_SEED)
    images, holes = test.images, test.holes
    grey = paste(images, holes, np.uint8(GREY))
    filled = [fill_in_batches(checkpoint, images, holes, options_of(settings), seed) for seed in range(3)]
    columns = np.stack([grey, *filled, images], axis=1)  # (8, 5, S, S, 3)
    titles = ["hole", "filled", "another", "another", "truth"]
    sheet(columns, settings, titles).save(out / "samples.png")
    codes = test.codes.numpy()
    pixels = to_uint8(tokenizer.decode(codes))
    columns = np.stack([images, pixels, to_pictures(tokenizer, codes, images, holes, settings.blend)], axis=1)
    sheet(columns, settings, ["truth", "tokens", "in the hole"]).save(out / "reconstruction.png")

    rows, frames = [], []
    for schedule in ("linear", "cosine", "square"):
        trace, options = [], options_of(settings) | {"schedule": schedule, "steps": 8, "order": "confidence"}
        fill(checkpoint, images[:1], holes[:1], options, trace=trace)
        shown = [trace_pictures(tokenizer, images[:1], holes[:1], *step, settings.blend) for step in trace]
        shown += shown[-1:] * (8 - len(shown))  # a small hole is filled in fewer steps
        rows += [[step[0][0] for step in shown], [step[1][0] for step in shown]]
    sheet(np.array(rows), settings, [f"step {t}" for t in range(1, len(rows[0]) + 1)]).save(out / "steps.png")
    trace = []
    fill(checkpoint, images, holes, options_of(settings), trace=trace)
    for step in [None, *trace]:
        shown = grey if step is None else trace_pictures(tokenizer, images, holes, *step, settings.blend)[1]
        frames.append(image_grid(shown / 255, 4, scale=scale_of(settings)))
    save_gif(out / "decode.gif", frames)
    steps = [row["step"] for row in history]
    curves = {
        name: (steps, [row[key] for row in history])
        for name, key in (("training", "loss"), ("validation", "validation"))
    }
    line_plot(
        curves,
        title="Inpainting: loss in training, and on the holes of validation pictures",
        x_label="step",
        y_label="cross-entropy, nats per hidden token",
    ).save(out / "loss.png")


def sheet(pictures, settings, titles):
    """Rows of pictures (R, C, S, S, 3) uint8 as one."""
    return image_grid(
        pictures.reshape(-1, *pictures.shape[2:]) / 255, len(titles), scale=scale_of(settings), titles=titles
    )


def scale_of(settings):
    return max(1, 128 // settings.size)


def trace_pictures(tokenizer, images, holes, codes, hidden, blend):
    """After one step of decode: the hidden tokens in white, and the picture with what is still hidden in grey."""
    b, size, patch = len(images), images.shape[1], tokenizer.patch
    grid = (b, size // patch, size // patch)
    masks = hidden.cpu().numpy().reshape(grid).repeat(patch, axis=1).repeat(patch, axis=2)
    codes = codes.masked_fill(hidden, 0).cpu().numpy().reshape(grid)
    pictures = paste(images, holes, to_pictures(tokenizer, codes, images, holes | masks, blend))
    pictures = paste(pictures, holes & masks, np.uint8(GREY))
    return (masks[..., None] * np.uint8(255)).repeat(3, axis=-1), pictures


# ---------------------------------------------------------------------------------------------------
# The experiment


def run_experiment(settings):
    """Codebook, training, scores and pictures."""
    device = open_run(settings)
    settings.record, started = run_record(), time.monotonic()
    split = open_pictures(settings.data, settings.cartoons, settings.size, settings.seed)
    print("pictures:", ", ".join(f"{len(part)} {name}" for name, part in split._asdict().items()))
    resumed = settings.resume and load_checkpoint(settings.out / "model.pt")
    tokenizer = resumed["tokenizer"] if resumed else fit_tokenizer(split.training, settings)
    prepared = time.monotonic()
    model, history = train_model(settings, tokenizer, split, device, out=settings.out)
    if process_rank()[0] > 0:
        return
    trained = time.monotonic()
    checkpoint = {"model": model, "tokenizer": tokenizer}
    figures = score(checkpoint, split, settings)
    figures["parameters"] = sum(p.numel() for p in model.parameters())
    figures["validation"] = min(row["validation"] for row in history)
    figures["seconds"] = {"prepared": round(prepared - started), "trained": round(history[-1]["seconds"])}
    figures["seconds"]["scored"] = round(time.monotonic() - trained)
    write_figures(settings, figures, settings.out / "metrics.json", settings.json)
    print_scores(figures)
    draw_pictures(checkpoint, split, history, settings)
    print("seconds: " + ", ".join(f"{name} {value}" for name, value in figures["seconds"].items()))
    names = ("samples.png", "steps.png", "reconstruction.png", "loss.png", "decode.gif")
    print("pictures:", *(settings.out / name for name in names))
    print(
        f"fill your own: python inpaint.py --checkpoint {settings.out / 'model.pt'} --images DIR --masks DIR --out DIR"
    )


# ---------------------------------------------------------------------------------------------------
# Filling files


def pair_files(images, masks):
    """[(picture, mask)] by the order of their names; one mask file serves all pictures."""
    pictures, holes = picture_files(images), picture_files(masks)
    holes = holes * len(pictures) if masks.is_file() else holes
    if len(pictures) != len(holes):
        raise ValueError(f"{images} holds {len(pictures)} pictures, {masks} {len(holes)} masks; each picture needs one")
    for picture, hole in zip(pictures, holes, strict=True):
        numbers = [re.findall(r"\d+", file.stem)[-1:] for file in (picture, hole)]
        if numbers[0] != numbers[1] and all(numbers) and masks.is_dir():
            raise ValueError(f"{picture.name} and {hole.name} come together, but their numbers differ")
    return list(zip(pictures, holes, strict=True))


def read_pair(picture, mask):
    """A picture (H, W, 3) uint8 and its hole (H, W)."""
    image, visible = np.asarray(read_picture(picture, "RGB")), np.asarray(read_picture(mask, "L"))
    if image.shape[:2] != visible.shape:
        sizes = [f"{file} is {array.shape[1]}x{array.shape[0]}" for file, array in ((mask, visible), (picture, image))]
        raise ValueError(f"{', '.join(sizes)}; a mask has its image's size")
    return image, visible < 128


def to_model_size(image, hole, size):
    """Both in size x size; a pixel that holds any part of the hole belongs to it."""
    if hole.shape == (size, size):
        return image, hole
    shrunk = Image.fromarray(image).resize((size, size), Image.Resampling.BOX)
    part = Image.fromarray(hole.astype(np.float32)).resize((size, size), Image.Resampling.BOX)
    return np.asarray(shrunk), np.asarray(part) > 0


def fill_files(settings):
    """Fill the holes of files: a PNG for each; with --samples a PNG for each of those, and all in a row."""
    pairs = pair_files(settings.images, settings.masks)
    targets = [settings.out / f"{picture.stem}.png" for picture, _ in pairs]
    if len(set(targets)) < len(targets):
        raise ValueError("two pictures have the same name; fill their folders one at a time")
    for target in targets:
        if target.exists() and not settings.force:
            raise ValueError(f"{target} exists; --force overwrites, --out renames")
    checkpoint = load_checkpoint(settings.checkpoint, pick_device(settings.device))
    if checkpoint["tokenizer"] is None or "size" not in (checkpoint["config"] or {}):
        raise ValueError(f"{settings.checkpoint} is no checkpoint of inpaint.py")
    size = checkpoint["config"]["size"]
    resized = sum(read_pair(*pair)[1].shape != (size, size) for pair in pairs)  # all are read before one is written
    settings.out.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(pairs), 64):
        originals = [read_pair(*pair) for pair in pairs[start : start + 64]]
        results = [fill_originals(checkpoint, originals, settings, (start, i)) for i in range(settings.samples)]
        for target, (image, _), *samples in zip(targets[start : start + 64], originals, *results, strict=True):
            if settings.samples > 1:
                for i, sample in enumerate(samples, start=1):
                    Image.fromarray(sample).save(target.with_name(f"{target.stem}_{i}.png"))
                samples = [np.concatenate([image, *samples], axis=1)]
            Image.fromarray(samples[0]).save(target)
    if resized:
        print(f"{resized} pictures were filled at the model's {size}x{size}; only their holes were pasted back")
    print(f"{len(pairs)} pictures filled: {settings.out}")


def fill_originals(checkpoint, originals, settings, draw):
    """Pictures (H, W, 3) of any sizes and their holes, filled; `draw` numbers the draw."""
    size = checkpoint["config"]["size"]
    images, holes = (np.stack(part) for part in zip(*(to_model_size(*pair, size) for pair in originals), strict=True))
    codes = fill(checkpoint, images, holes, options_of(settings), step_seed(settings.seed, *draw))
    if settings.whole:
        filled = to_uint8(checkpoint["tokenizer"].decode(codes))
    else:
        filled = to_pictures(checkpoint["tokenizer"], codes, images, holes, settings.blend)
    results = []
    for (image, hole), pixels in zip(originals, filled, strict=True):
        pixels = np.asarray(Image.fromarray(pixels).resize(image.shape[1::-1], Image.Resampling.BICUBIC))
        results.append(pixels if settings.whole else paste(image, hole, pixels))
    return results


# ---------------------------------------------------------------------------------------------------
# Settings

# Settings that --resume may change: they do not touch the weights.
ONLY_AFTER_TRAINING = {
    "checkpoint",
    "images",
    "masks",
    "whole",
    "samples",
    "decode_steps",
    "schedule",
    "order",
    "sample",
}
ONLY_AFTER_TRAINING |= {"temperature", "choice_temperature", "stop_after", "test_images", "score_seeds", "schedules"}
ONLY_AFTER_TRAINING |= {"weights", "evidence", "blend"}
DEFAULTS = {"dim": 128, "heads": 4, "layers": 6, "rotary": True, "batch_size": 8, "lr": 4e-3, "steps": 3300}
# R1 and R2's sizes and optimiser; their training set is three times ours, so an epoch has 12,000 pictures here, too.
REPORT = {"dim": 768, "heads": 16, "layers": 15, "hidden": 1536, "rotary": False, "batch_size": 10, "lr": 1e-4}
REPORT |= {"optimizer": "adamw", "betas": (0.9, 0.96), "decay": "constant", "warmup": 0, "steps": 100 * 12_000 // 10}
REPORT |= {"loss": "all", "mirror": False, "dropout": 0.1}


def parse_arguments():
    parser, count = CommandLine(__doc__), at_least(1)
    add = parser.add_argument_group("what to do").add_argument
    add("--checkpoint", type=Path, help="fill files by this model instead of training one")
    add("--preset", choices=("report",), help="R1 and R2's sizes, optimiser and loss")
    parser.add_run_options("runs/inpaint")
    add = parser.add_argument_group("pictures").add_argument
    add("--data", help="folder of pictures; default: drawn cartoon cats")
    add("--cartoons", type=count, default=6000, help="number of cats to draw, default %(default)s")
    add("--size", type=count, default=64, help="pixels per side, default %(default)s")
    add("--patch", type=count, default=4, help="pixels per side of a token, default %(default)s")
    add("--codes", type=at_least(2), default=1024, help="of the codebook, default %(default)s")
    add("--mirror", action=argparse.BooleanOptionalAction, default=True, help="train on mirrored pictures as well")
    add = parser.add_argument_group("holes").add_argument
    add("--hole", choices=HOLES, default="brush", help="of validation and scores, default %(default)s")
    add("--mask", type=mask_kind, default="cosine", help="hidden tokens in training, default %(default)s")
    add = parser.add_argument_group("filling").add_argument
    add("--images", type=Path, help="folder of pictures to fill, or one file")
    add("--masks", type=Path, help="their masks, in the same order: 255 = visible, 0 = hole; or one for all")
    add("--whole", action="store_true", help="decode the visible pixels, too, as the reports do")
    add("--samples", type=count, default=1, help="different results for each picture")
    add("--decode-steps", type=count, default=10)
    add("--schedule", choices=SCHEDULES, default="cosine")
    add("--order", choices=ORDERS, default="confidence")
    add("--sample", choices=("categorical", "argmax"), default="categorical")
    add("--temperature", type=at_least(1e-6, float), default=0.7)
    add("--choice-temperature", type=at_least(0.0, float), default=1.0)
    add(
        "--evidence",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="use the visible pixels of tokens that are partly in a hole",
    )
    add("--blend", action=argparse.BooleanOptionalAction, default=True, help="shift what is filled in to join its rim")
    add("--stop-after", type=count, help="commit all that is left after this many steps")
    add = parser.add_argument_group("scores").add_argument
    add("--test-images", type=at_least(8), default=48, help="default %(default)s")
    add("--validation-images", type=count, default=200, help="default %(default)s")
    add("--score-seeds", type=count, default=1, help="draws behind each row of the table")
    add("--schedules", default="linear,cosine,square", help="of the table, default %(default)s")
    add("--weights", type=Path, help="Inception weights for FID and KID; default: those that fid.py has fetched")
    parser.add_model_options()
    parser.add_training_options()
    parser.add_argument("--loss", choices=("masked", "all"), default="masked", help="tokens that count (reports: all)")
    parser.add_argument("--betas", type=share, nargs=2, default=(0.9, 0.95), help="of AdamW")
    known = parser.parse_known_args()[0]
    parser.set_defaults(**DEFAULTS | (REPORT if known.preset else {}))
    if known.checkpoint:
        parser.set_defaults(out=Path("runs/filled"))
    settings = parser.parse_args()
    if settings.checkpoint and not (settings.images and settings.masks):
        parser.error("--checkpoint fills --images by their --masks: name both")
    if settings.size % settings.patch:
        parser.error(f"--size {settings.size} is not divisible by --patch {settings.patch}")
    unknown = set(settings.schedules.split(",")) - set(SCHEDULES)
    if unknown:
        parser.error(f"unknown schedules {', '.join(unknown)}; choose from {', '.join(SCHEDULES)}")
    return settings


def main():
    settings = parse_arguments()
    if settings.checkpoint:
        fill_files(settings)
    else:
        run_experiment(settings)


if __name__ == "__main__":
    run_as_script(main)
