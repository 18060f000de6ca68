"""R1 and R2's experiment: photographs with holes, filled in by MaskGIT on k-means tokens.

    python inpaint.py                                   drawn cartoon cats: train, fill, score; nothing to download
    python inpaint.py --data FOLDER --out runs/mine     the same on your own pictures
    python inpaint.py --checkpoint runs/inpaint/model.pt --images DIR --masks DIR --out DIR      fill holes
    python inpaint.py --vqgan VQGAN.pt --transformer best_val.pth --images DIR --masks DIR --out DIR      by R1 and R2's

A mask has its image's size: 255 (white) is visible, 0 is the hole. A token with any hole pixel is hidden, and predicted
from the others; the pixels that were visible come back as they were.

The cats: 23.7 dB inside the holes after 14 minutes on one core of an AMD EPYC server, where the codebook allows
26.6 (results/inpaint.json); two cores take 9. Photographs, 90 minutes: 21.3 of 25.5 dB (results/inpaint_cats64.json).

A run leaves model.pt, log.csv, metrics.json and its pictures in runs/inpaint (--out).
"""

import argparse
import functools
import hashlib
import itertools
import math
import pickle
import re
import sys
import tempfile
import time
from collections import OrderedDict, namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn

import maskgit

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
PART_ENDS = (0.843, 0.843 + 0.060)  # of training and validation, in the range of the images' hashes, [0, 1)
CODEBOOK_IMAGES = 1200  # whose patches the codebook is fitted to
NOISES, LEAST_NOISE, CORRELATED = 6, (4 / 255) ** 2, 4  # of pixel_evidence, by validation pictures
HOLE_SHARE = 0.24  # of the pixels, as in R1 and R2's masks
TRAINING_SEED, VALIDATION_SEED, TEST_SEED = 3, 1, 2  # of the holes
GREY = 128  # what R1 and R2 paint the hole with
AT_ONCE = 64  # pictures that the model is given, whatever their number

# ---------------------------------------------------------------------------------------------------
# Pictures


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


Split = namedtuple("Split", ("training", "validation", "test"))  # pictures (N, size, size, 3) uint8 each


def open_pictures(folder, cartoons, size, seed):
    """A Split of a folder's distinct pictures, centre-cropped and resized, or without a folder of so many drawn cats.
    The part of a picture depends on its pixels alone, so that adding others never moves it from test to training. All
    lie in temporary files (TMPDIR says where), so that memory does not limit them."""
    sources = picture_files(Path(folder)) if folder else cartoon_cats(cartoons, size, seed)
    files = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115  they are closed with the arrays
    digests, duplicates = [set(), set(), set()], 0
    for source in sources:
        try:
            image = read_picture(source, "RGB") if folder else Image.fromarray(source)
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
            files[part].write(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS).tobytes())
    distinct = sum(map(len, digests))
    if folder:
        print(f"{folder}: {distinct} distinct pictures, {duplicates} duplicates left out")
    if min(map(len, digests)) < 2:
        raise ValueError(f"{distinct} distinct pictures are too few for training, validation and test")
    return Split(*(np.memmap(file, np.uint8, "r+").reshape(-1, size, size, 3) for file in files))


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
    """A cat's face that is drawn by the numbers of `rng`: uint8 (size, size, 3)."""
    wall = np.array(WALLS[rng.integers(len(WALLS))])
    canvas = Image.new("RGB", (256, 256), colour(wall))
    draw = ImageDraw.Draw(canvas)

    def ellipse(x, y, width, height, fill):
        draw.ellipse([x - width, y - height, x + width, y + height], fill)

    if rng.random() < 0.4:
        step = rng.integers(28, 52)
        for left in range(-step, 256, step):
            draw.rectangle([left, 0, left + step // 2, 256], fill=colour(wall * 0.9))
    if rng.random() < 0.5:  # the floor
        draw.rectangle([0, rng.integers(180, 225), 256, 256], fill=colour(wall * 0.7))

    x, y = 128 + rng.normal(0, 8, 2) + (0, 8)
    width, height = rng.uniform(70, 92), rng.uniform(60, 78)
    fur, second = (np.array(FUR[i]) for i in rng.choice(len(FUR), 2, replace=False))
    dark, light = colour(fur * 0.72), colour(fur * 0.4 + np.array([255, 250, 240]) * 0.6)
    pattern = rng.choice(["plain", "tabby", "mask", "patch", "siamese"])
    ellipse(x, y + 130, width * 1.05, 80, colour(fur * 0.9))  # the body
    ear, lean = rng.uniform(46, 66), rng.choice((0.55, 0.8))
    for side in (-1, 1):
        tip = (x + side * width * (lean + 0.22), y - height * 0.55 - ear)
        outer = [tip, (x + side * width * 0.96, y - height * 0.15), (x + side * width * 0.22, y - height * 0.85)]
        inner = [tuple(0.58 * np.array(corner) + 0.42 * np.mean(outer, axis=0)) for corner in outer]
        draw.polygon(outer, fill=dark if pattern == "siamese" else colour(fur))
        draw.polygon(inner, fill=(230, 160, 160))
    ellipse(x, y, width, height, colour(fur))

    if pattern == "tabby":
        for shift in (-0.24, 0, 0.24):
            draw.line([(x + shift * width, y - height * 0.93), (x + shift * width * 0.8, y - height * 0.5)], dark, 9)
        for side, row in itertools.product((-1, 1), (0.1, 0.35)):
            start = (x + side * width * 0.97, y + height * row)
            draw.line([start, (x + side * width * 0.62, y + height * (row + 0.06))], dark, 8)
    elif pattern == "mask":
        cheeks = [(x - width * 0.5, y + height * 0.75), (x + width * 0.5, y + height * 0.75)]
        draw.polygon([(x, y - height * 0.7), *cheeks], light)
    elif pattern == "patch":
        draw.pieslice([x - width, y - height, x + width, y + height], 265, 20, fill=colour(second))
    elif pattern == "siamese":
        ellipse(x, y + height * 0.2, width * 0.62, height * 0.68, dark)

    apart, level, radius = width * rng.uniform(0.42, 0.48), y - height * rng.uniform(0.05, 0.1), rng.uniform(18, 22)
    iris, slit = EYES[rng.integers(len(EYES))], rng.choice((0.3, 0.8))
    closed, nose = rng.random() < 0.1, y + height * 0.32
    for side in (-1, 1):
        ellipse(x + side * width * 0.2, nose + 18, width * 0.26, height * 0.22, dark if pattern == "siamese" else light)
        centre = x + side * apart
        if closed:
            draw.arc([centre - radius, level - radius, centre + radius, level + radius], 20, 160, (30, 25, 25), 6)
            continue
        ellipse(centre, level, radius + 3, radius + 1, (30, 25, 25))
        ellipse(centre, level, radius, radius - 2, iris)
        ellipse(centre, level, radius * slit * 0.7, radius * 0.85, (15, 12, 12))
        ellipse(centre - radius * 0.3, level - radius * 0.35, 5, 5, (255, 255, 255))
    pink = (225, 130, 140) if rng.random() < 0.7 else (70, 50, 50)
    draw.polygon([(x - 12, nose - 7), (x + 12, nose - 7), (x, nose + 8)], fill=pink)
    for side in (-1, 1):
        left = x - 20 if side < 0 else x
        draw.arc([left, nose + 2, left + 20, nose + 22], 10, 170, (50, 35, 35), 4)
        for tilt in (-10, 0, 10):
            start = (x + side * width * 0.38, nose + 14 + tilt / 2)
            draw.line([start, (x + side * width * 1.15, nose + 10 + tilt * 1.8)], (250, 250, 250), 3)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX))


# ---------------------------------------------------------------------------------------------------
# The reports' VQGAN and transformer
#
# R1 and R2 share a frozen VQGAN (Esser et al., Taming Transformers, CVPR 2021). Written from a description of its
# file; the attributes of the modules are the names in it.

VQGAN_AT_ONCE = 16  # pictures: 1 GB
PIXELS = {  # mean and deviation of red, green and blue: those that the reports train by, and those they fill by
    "training": ((0.4816, 0.4324, 0.3845), (0.2602, 0.2518, 0.2537)),
    "filling": ((0.4868, 0.4341, 0.3844), (0.2620, 0.2527, 0.2543)),
}
# Query, key and value, in one matrix or three, then the output: each student's own names.
ATTENTION_NAMES = ["qkv proj", "to_qkv proj", "q_linear k_linear v_linear out_linear"]
ATTENTION_NAMES += ["query key value output_layer", "Wq Wk Wv out"]


def named(**modules):
    return nn.Sequential(OrderedDict(modules))


def group_norm(width):
    return named(gn=nn.GroupNorm(32, width, eps=1e-6))


def conv3(width, out):
    return nn.Conv2d(width, out, 3, padding=1)


def residuals(*widths):
    return [Residual(width, out) for width, out in itertools.pairwise(widths)]


class Residual(nn.Module):
    """(B, width, H, W) -> (B, out, H, W)."""

    def __init__(self, width, out):
        super().__init__()
        halves = [[group_norm(a), nn.SiLU(), conv3(a, out)] for a in (width, out)]
        self.block = nn.Sequential(*halves[0], *halves[1])
        self.channel_up = nn.Identity() if width == out else nn.Conv2d(width, out, 1)

    def forward(self, x):
        return self.channel_up(x) + self.block(x)


class NonLocal(nn.Module):
    """Attention of one head over all positions: (B, width, H, W) -> (B, width, H, W)."""

    def __init__(self, width):
        super().__init__()
        self.norm = group_norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        normed = self.norm(x)
        qkv = (layer(normed).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))  # (B, H * W, width) each
        return x + self.proj_out(F.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(x.shape))


class VQGAN(nn.Module):
    """The reports' tokenizer: 64x64 pictures as 16x16 of 1024 codes, from and to numpy as PatchTokenizer has them. A
    code depends on the whole picture, and a picture on all codes."""

    patch = 4

    def __init__(self, width=128, pixels="training"):
        super().__init__()
        self.mean, self.std = np.array(PIXELS[pixels], np.float32)
        a, b, c = width, 2 * width, 4 * width
        down, up = (  # they halve and double the sides
            [named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(w, w, 3, stride=2)) for w in (b, c)],
            [named(nearest=nn.Upsample(scale_factor=2), conv=conv3(w, w)) for w in (c, b)],
        )
        encoder = [conv3(3, a), *residuals(a, a, a, a, a, b, b), down[0], *residuals(b, b, b, c, c), down[1]]
        encoder += [Residual(c, c), NonLocal(c), Residual(c, c), group_norm(c), nn.SiLU(), conv3(c, b)]
        decoder = [conv3(b, c), Residual(c, c), NonLocal(c), Residual(c, c)]
        decoder += [layer for _ in range(3) for layer in (Residual(c, c), NonLocal(c))]
        decoder += [up[0], *residuals(c, b, b, b, b, b, b), up[1], *residuals(b, a, a, a, a, a, a)]
        decoder += [group_norm(a), conv3(a, 3)]
        self.encoder, self.decoder = (named(model=nn.Sequential(*layers)) for layers in (encoder, decoder))
        self.codebook = named(embedding=nn.Embedding(1024, b))
        self.quant_conv, self.post_quant_conv = nn.Conv2d(b, b, 1), nn.Conv2d(b, b, 1)

    @property
    def centroids(self):
        """The codebook (1024, 256), in the space of latents."""
        return self.codebook.embedding.weight.detach().cpu().numpy()

    @torch.inference_mode()
    def encode(self, images):
        """Images (B, 64, 64, 3) in [0, 1] -> codes (B, 16, 16)."""
        codes = []
        for start in range(0, len(images), VQGAN_AT_ONCE):
            pixels = torch.from_numpy((images[start : start + VQGAN_AT_ONCE] - self.mean) / self.std)
            pixels = pixels.permute(0, 3, 1, 2).to(self.quant_conv.weight)  # (b, 3, 64, 64)
            latents = self.quant_conv(self.encoder(pixels)).permute(0, 2, 3, 1).cpu().numpy()  # (b, 16, 16, 256)
            nearest = maskgit.nearest_centroid(latents.reshape(-1, latents.shape[-1]), self.centroids)
            codes.append(nearest.reshape(latents.shape[:3]))
        return np.concatenate(codes)

    @torch.inference_mode()
    def decode(self, ids):
        """Codes (B, 16, 16) -> images (B, 64, 64, 3) in [0, 1]."""
        images = []
        for part in torch.from_numpy(ids).to(self.quant_conv.weight.device).split(VQGAN_AT_ONCE):
            latents = self.codebook.embedding(part).permute(0, 3, 1, 2)  # (b, 256, 16, 16)
            pixels = self.decoder(self.post_quant_conv(latents)).permute(0, 2, 3, 1).cpu().numpy()
            images.append((pixels * self.std + self.mean).clip(0, 1))
        return np.concatenate(images)


class ReportBlock(nn.Module):
    """(B, T, 768) -> (B, T, 768), normalised after each sum."""

    def __init__(self):
        super().__init__()
        self.Attention = maskgit.Attention(768, 16)
        self.LayerNorm1, self.LayerNorm2 = nn.LayerNorm(768, eps=1e-12), nn.LayerNorm(768, eps=1e-12)
        self.MLP = nn.Sequential(nn.Linear(768, 1536), nn.GELU(), nn.Linear(1536, 768))

    def forward(self, x):
        x = self.LayerNorm1(x + self.Attention(x))
        return self.LayerNorm2(x + self.MLP(x))


class ReportTransformer(nn.Module):
    """The reports' transformer, for decode: tokens (B, 256) -> logits (B, 256, 1024), without that of [MASK]. It knows
    its positions, whatever the coordinates."""

    mask_id = 1024

    def __init__(self):
        super().__init__()
        self.tok_emb, self.pos_emb = nn.Embedding(1025, 768), nn.Parameter(torch.zeros(256, 768))
        self.LN = nn.LayerNorm(768, eps=1e-12)
        self.blocks = nn.Sequential(*(ReportBlock() for _ in range(15)))
        self.Token_Prediction = nn.Sequential(nn.Linear(768, 768), nn.GELU(), nn.LayerNorm(768, eps=1e-12))
        self.bias = nn.Parameter(torch.zeros(256, 1025))

    def forward(self, tokens, coords=None):
        x = self.blocks(self.LN(self.tok_emb(tokens) + self.pos_emb))  # (B, 256, 768)
        return (F.linear(self.Token_Prediction(x), self.tok_emb.weight) + self.bias)[..., : self.mask_id]


def load_vqgan(path, device, pixels="training"):
    """The VQGAN in a file, with the SHA-256 of its weights."""
    with torch.device("meta"):
        network = VQGAN(pixels=pixels)
    digest = hashlib.sha256()
    for tensor in load_weights(network, path, "vqgan").state_dict().values():
        digest.update(tensor.contiguous().numpy())
    network.sha256 = digest.hexdigest()
    return network.to(device, memory_format=torch.channels_last)


def load_transformer(path, device):
    with torch.device("meta"):
        network = ReportTransformer()
    return load_weights(network, path, "transformer", one_attention).to(device)


def load_weights(network, path, part, adapt=dict):
    """The network with the weights of a stranger's file: they are the whole of it, lie under "model", or are that part
    of a whole MaskGIT whose names begin with "vqgan." or "transformer."; adapt(weights) gives them the network's names.
    ValueError if they are of anything else."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        weights = maskgit.read_tensors(path, "cpu")
        if isinstance(weights.get("model"), dict) and not any("." in name for name in weights):
            weights = weights["model"]
        if {name.partition(".")[0] for name in weights} <= {"vqgan", "transformer"}:
            weights = {name.partition(".")[2]: weights[name] for name in weights if name.startswith(part)}
        weights = adapt(weights)
        shapes = [{n: tuple(getattr(w, "shape", ())) for n, w in s.items()} for s in (network.state_dict(), weights)]
        if wrong := [n for n in sorted(shapes[0] | shapes[1]) if shapes[0].get(n) != shapes[1].get(n)]:
            want, have = shapes[0].get(wrong[0], "nothing"), shapes[1].get(wrong[0], "missing")
            first = f"{wrong[0]!r} is {have} where {want} is expected"
            raise ValueError(f"{len(wrong)} keys do not fit: {first}; {keys_of(weights)}")
        if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
            raise ValueError("some of its weights are no numbers")
        network.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    except Exception as error:  # torch.load raises half a dozen types on damaged files
        reason = "it is damaged or asks to run code" if isinstance(error, pickle.UnpicklingError) else error
        raise ValueError(f"{path} does not hold the reports' {part}: {reason}".splitlines()[0]) from None
    return network.eval()


def one_attention(weights):
    """A transformer's weights whose attention has one of ATTENTION_NAMES, by the names of maskgit.Attention."""
    found = {match[1] for name in weights if (match := re.match(r"blocks\.\d+\.Attention\.(\w+)", name))}
    known = next((names.split() for names in ATTENTION_NAMES if set(names.split()) == found), None)
    if not known:
        raise ValueError(f"its attention has {', '.join(sorted(found)) or 'no names'}; {keys_of(weights)}")
    *inputs, output = known
    weights = {name.replace(f".Attention.{output}.", ".Attention.out."): weights[name] for name in weights}
    for i, kind in itertools.product(range(15), ("weight", "bias")):
        names = [f"blocks.{i}.Attention.{name}.{kind}" for name in inputs]
        parts = [weights.pop(name) for name in names if name in weights]
        if len(parts) == len(inputs):
            weights[f"blocks.{i}.Attention.qkv.{kind}"] = torch.stack(parts).flatten(0, 1)
        elif kind == "bias" and not parts:
            weights[f"blocks.{i}.Attention.qkv.bias"] = torch.zeros(3 * 768)  # R1 has none
    return weights


def keys_of(weights):
    return f"its {len(weights)} keys are {', '.join(map(repr, list(weights)[:6]))}" + ", ..." * (len(weights) > 6)


# ---------------------------------------------------------------------------------------------------
# Holes and what fills them


def make_holes(kind, count, size, seed):
    """Random holes: bool (count, size, size), True = to be filled."""
    return np.stack([HOLES[kind](np.random.default_rng([seed, i]), size) for i in range(count)])


def with_holes(images, kind, seed):
    """The images and random holes of a kind in them."""
    return images, make_holes(kind, len(images), images.shape[1], seed)


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


HOLES = {"brush": brush_hole, "box": box_hole, "half": half_hole}


def hidden_tokens(tokenizer, holes):
    """The tokens (B, T) with any pixel in holes (B, S, S)."""
    patches = maskgit.image_patches(holes[..., None], tokenizer.patch, tokenizer.patch)
    return torch.from_numpy(patches.any(axis=-1)).flatten(1)


def model_input(checkpoint, images, holes, informed, targets=True):
    """What decode takes, on the model's device: tokens (B, T), mask (B, T), coords (T, 2) and evidence, or without
    being `informed` None. A token with any hole pixel is hidden; with `targets` it is the true one, or else any. Images
    are uint8 (B, S, S, 3), holes (B, S, S). A VQGAN's tokens depend on the hole, which a membrane covers for it."""
    tokenizer, device = checkpoint["tokenizer"], next(checkpoint["model"].parameters()).device
    pixels = images / np.float32(255)
    hidden = hidden_tokens(tokenizer, holes)
    shown = membrane(pixels, holes) if isinstance(tokenizer, VQGAN) else pixels
    codes = tokenizer.encode(shown)
    if targets and shown is not pixels:
        codes = np.where(hidden.view(codes.shape), tokenizer.encode(pixels), codes)
    codes = torch.from_numpy(codes)  # (B, h, w)
    tensors = codes.flatten(1), hidden, maskgit.grid_coords(*codes.shape[1:])
    evidence = pixel_evidence(tokenizer, images, holes).to(device) if informed else None
    return *(tensor.to(device) for tensor in tensors), evidence


def fill(checkpoint, images, holes, options, seed=0, trace=None, whole=False):
    """Images (B, S, S, 3) uint8 whose holes (B, S, S) are filled by the model of a checkpoint of load_checkpoint.
    Of the options "evidence" says whether the visible pixels of hidden tokens count as well, "blend" is for
    to_pictures; the others go to decode, and so does trace. `whole` shows the tokens of what is visible, too. The
    sample "mean" is what is expected in the holes: of all fillings that of the least squared error. It takes no
    evidence, by which strokes in photographs would lose."""
    tokenizer, mean = checkpoint["tokenizer"], options.get("sample") == "mean"
    informed = options["evidence"] and not mean
    tokens, mask, coords, evidence = model_input(checkpoint, images, holes, informed, targets=False)
    if mean:
        tokenizer, tokens = expected_patches(checkpoint, tokens, mask, coords)
    else:
        own = ("evidence", "blend", "choice_temperature")
        decoding = {name: value for name, value in options.items() if name not in own}
        if options["order"] == "confidence":
            noise = options["choice_temperature"]
            decoding["order"] = functools.partial(maskgit.by_confidence, choice_temperature=noise)
        decoding |= {"trace": trace, "generator": torch.Generator(tokens.device).manual_seed(seed)}
        with maskgit.precision_context(tokens.device, maskgit.fast_precision(tokens.device)):
            tokens = maskgit.decode(checkpoint["model"], tokens, mask, coords, evidence=evidence, **decoding)
    return to_pictures(tokenizer, tokens, images, holes | whole, options["blend"] and not whole)


@torch.no_grad()
def expected_patches(checkpoint, tokens, mask, coords):
    """A tokenizer with a patch for each of the tokens (B, T), and their codes in it (B, T). A hidden token's patch is
    the mean of the centroids by the probabilities that one pass gives."""
    model, tokenizer = checkpoint["model"], checkpoint["tokenizer"]
    with maskgit.precision_context(tokens.device, maskgit.fast_precision(tokens.device)):
        logits = model(tokens.masked_fill(mask, model.mask_id), coords).float()
    centroids = torch.from_numpy(tokenizer.centroids).to(tokens.device)
    patches = torch.where(mask[..., None], logits.softmax(dim=-1) @ centroids, centroids[tokens])  # (B, T, D)
    of_each = maskgit.PatchTokenizer(patches.flatten(0, 1).cpu().numpy(), tokenizer.patch)
    return of_each, torch.arange(mask.numel()).view(mask.shape)


def fill_in_batches(checkpoint, images, holes, options, seed=0):
    """Likewise, AT_ONCE at a time."""
    parts = []
    for start in range(0, len(images), AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        parts.append(fill(checkpoint, images[rows], holes[rows], options, maskgit.step_seed(seed, start)))
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
    shown, count = visible * pixels, visible.sum(dim=-1, keepdim=True)
    distances = shown.square().sum(dim=-1, keepdim=True) + visible @ centroids.T.square() - 2 * shown @ centroids.T
    densities = (-distances / v - count * v.log() for v in torch.from_numpy(noises).float()[..., None, None])
    return functools.reduce(torch.logaddexp, (density / (2 * CORRELATED) for density in densities))  # (B, h * w, K)


def to_pictures(tokenizer, tokens, images, holes, blend):
    """Tokens (B, T) in the holes of images (B, S, S, 3): uint8. `blend` softens the borders between k-means tokens, and
    shifts them to join what is visible: there the picture shows by how much the decoded one is off; into the hole this
    error is continued as a membrane (Pérez et al., Poisson image editing, 2003)."""
    side = images.shape[1] // tokenizer.patch
    decoded = tokenizer.decode(tokens.cpu().numpy().reshape(-1, side, side))
    if blend:
        if not isinstance(tokenizer, VQGAN):
            decoded = soften_borders(decoded, tokenizer.patch)
        decoded = decoded + membrane(images / np.float32(255) - decoded, holes)
    return paste(images, holes, (decoded * 255).round().clip(0, 255).astype(np.uint8))


def soften_borders(pictures, patch):
    """Pictures (B, S, S, C) where the pixels on both sides of each border of two tokens come nearer to each other."""
    share = min(0.2, patch / 20)  # of a step, from each side; good for patches of 2, 4 and 8 on validation pictures
    pictures, first = pictures.copy(), np.arange(patch, pictures.shape[1], patch)
    for lines in (pictures, pictures.swapaxes(1, 2)):
        step = share * (lines[:, first] - lines[:, first - 1])
        lines[:, first] -= step
        lines[:, first - 1] += step
    return pictures


def membrane(values, holes, sweeps=16):
    """Values (B, H, W, C), where those in the holes (B, H, W) become a membrane stretched over the others.
    Each hidden value is then the mean of its four neighbours, up to what `sweeps` at each size leave; where all is
    hidden it is 0."""
    b, height, width, channels = values.shape
    hidden = holes[..., None]
    values = np.where(hidden, 0, values)
    if holes.any() and height % 2 == width % 2 == 0:  # start from the membrane of half the size
        sums = values.reshape(b, height // 2, 2, width // 2, 2, channels).sum(axis=(2, 4))
        known = (~holes).reshape(b, height // 2, 2, width // 2, 2).sum(axis=(2, 4))
        coarse = membrane(sums / known.clip(min=1)[..., None], known == 0)
        values = np.where(hidden, coarse.repeat(2, axis=1).repeat(2, axis=2), values)
    for _ in range(sweeps):
        padded = np.pad(values, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        mean = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
        values = np.where(hidden, mean / 4, values)
    return values


def paste(images, holes, filled):
    """The images, with the pixels of their holes from others."""
    return np.where(holes[..., None], filled, images)


# ---------------------------------------------------------------------------------------------------
# Training, scores and pictures of a run


def encode_training(tokenizer, pictures, mirror):
    """The codes of pictures (N, S, S, 3), and of their mirror images: (N or 2 N, h, w), in a temporary file."""
    smallest = np.min_scalar_type(len(tokenizer.centroids) - 1)
    with tempfile.TemporaryFile() as file:
        for view in (pictures, pictures[:, :, ::-1]) if mirror else (pictures,):
            for start in range(0, len(pictures), 256):
                codes = tokenizer.encode(view[start : start + 256] / np.float32(255))
                file.write(codes.astype(smallest).tobytes())
        return np.memmap(file, smallest, "r+").reshape(-1, *codes.shape[1:])


def train_model(settings, tokenizer, split, device, may_change):
    """The model with the lowest cross-entropy on the validation pictures' holes, and the rows of its log."""
    codes = encode_training(tokenizer, split.training, settings.mirror)
    coords, size = maskgit.grid_coords(*codes.shape[1:]), codes[0].size
    # Never all of them: a row with a hole may have nothing left to fill, one at random has.
    with_hole = int(settings.hole_rows * settings.batch_size)
    of_each = min(1000, 1 + settings.steps * with_hole)
    holes = np.concatenate([make_holes(kind, of_each, settings.size, TRAINING_SEED) for kind in HOLES])
    holes = hidden_tokens(tokenizer, holes)

    def batch(step):
        generator = torch.Generator().manual_seed(maskgit.step_seed(settings.seed, step))
        rows = torch.randint(len(codes), (settings.batch_size,), generator=generator)
        tokens = torch.from_numpy(codes[rows.numpy()].astype(np.int64).reshape(-1, size))
        mask = maskgit.training_mask((len(rows) - with_hole, size), settings.mask, generator, coords)
        hole = holes[torch.randint(len(holes), (with_hole,), generator=generator)]
        left = 2 * torch.rand(with_hole, 1, generator=generator)  # half of the holes are whole, others filled in part
        hole &= torch.rand(hole.shape, generator=generator) < left
        return tokens, torch.cat([mask, hole]), coords

    test = with_holes(split.validation[: settings.validation_images], settings.hole, VALIDATION_SEED)
    inputs = []

    def validate(model):
        if not inputs:
            inputs.extend(input_batches({"model": model, "tokenizer": tokenizer}, *test))
        return {"validation": cross_entropy(model, inputs)}

    options = {"out": settings.out, "may_change": may_change, "best_by": "validation", "validate": validate}
    options["tokenizer"] = None if isinstance(tokenizer, VQGAN) else tokenizer
    options |= {"betas": tuple(settings.betas), "every_position": settings.loss == "all"}
    return maskgit.train_as_set(settings, settings.codes, batch, device, **options)


def input_batches(checkpoint, images, holes, informed=False):
    """model_input of AT_ONCE pictures at a time."""
    for start in range(0, len(images), AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        yield model_input(checkpoint, images[rows], holes[rows], informed)


@torch.no_grad()
def cross_entropy(model, inputs):
    """Nats per hidden token of input_batches, all of them hidden at once."""
    total, count = 0.0, 0
    for tokens, mask, coords, evidence in inputs:
        with maskgit.precision_context(tokens.device, maskgit.fast_precision(tokens.device)):
            logits = model(tokens.masked_fill(mask, model.mask_id), coords).float()
        logits = logits if evidence is None else logits + evidence
        hidden = int(mask.sum())
        total, count = total + float(maskgit.masked_cross_entropy(logits, tokens, mask)) * hidden, count + hidden
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
    window = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = (window[:, None] * window / window.sum() ** 2)[None, None]
    x, y = (torch.from_numpy(images).double().permute(0, 3, 1, 2).flatten(0, 1)[:, None] / 255 for images in (x, y))
    # Each (B * C, 1, H, W) becomes (B * C, 1, H - 10, W - 10).
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = (F.conv2d(v, window) for v in (x, y, x * x, y * y, x * y))
    variances, covariance = mean_xx - mean_x**2 + mean_yy - mean_y**2, mean_xy - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((similarity / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))).mean())


def mean_colour(images, holes):
    """The holes in the mean of what is visible."""
    filled = images.copy()
    for image, hole in zip(filled, holes, strict=True):
        image[hole] = GREY if hole.all() else image[~hole].mean(axis=0).round()
    return filled


def score(checkpoint, test, seen, settings):
    """All scores of a run: of test images with holes, and for comparison of some that were seen in training."""
    (images, holes), model, tokenizer = test, checkpoint["model"], checkpoint["tokenizer"]
    tokens, mask, *_ = model_input(checkpoint, images, holes, informed=False)

    def scored(name, filled, **more):
        return {"name": name} | more | picture_scores(images, holes, filled)

    rows = [scored("mean colour", mean_colour(images, holes))]
    for name, blend in (("true tokens", settings.blend), ("true tokens, as decoded", False)):
        rows.append(scored(name, to_pictures(tokenizer, tokens, images, holes, blend)))
    for name, options in ways_to_fill(settings):
        for seed in range(settings.score_seeds if options["sample"] == "categorical" else 1):
            start = time.perf_counter()
            filled = fill_in_batches(checkpoint, images, holes, options, seed)
            seconds = (time.perf_counter() - start) / len(filled)
            rows.append(scored(name, filled, seed=seed, seconds=seconds, **options))
        print(f"{name}: {rows[-1]['psnr']:.2f} dB", file=sys.stderr)
    as_set = {"seen": seen} | {kind: with_holes(images, kind, TEST_SEED) for kind in HOLES}
    for name, other in as_set.items():
        as_set[name] = picture_scores(*other, fill_in_batches(checkpoint, *other, options_of(settings)))
    entropies = {
        name: cross_entropy(model, input_batches(checkpoint, *of)) for name, of in (("test", test), ("seen", seen))
    }
    if not isinstance(tokenizer, VQGAN):
        entropies["with evidence"] = cross_entropy(model, input_batches(checkpoint, *test, informed=True))
    hidden = {"pixels": float(holes.mean()), "tokens": float(mask.float().mean())}
    return {"scored": len(images), "hidden": hidden, "cross_entropy": entropies, "as set": as_set, "rows": rows}


def options_of(settings):
    """How to fill, as set on the command line."""
    return {name: getattr(settings, name) for name in (*FILLING, "evidence")} | {"steps": settings.decode_steps}


def ways_to_fill(settings):
    """[(name, options of fill)]: as set, without what is done about the rim, and twice without chance."""
    chosen = options_of(settings)
    ways = [("as set", chosen), ("as set, not blended", chosen | {"blend": False})]
    if chosen["evidence"]:
        ways += [("as set, neither evidence nor blended", chosen | {"evidence": False, "blend": False})]
    ways += [("likeliest, T=1", chosen | {"sample": "argmax", "steps": 1})]
    return ways if settings.vqgan else [*ways, ("expected", chosen | {"sample": "mean"})]


def print_scores(figures):
    """Means of each way's draws, with the lowest and highest where there are several."""

    def shown(values):
        spread = f" ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else ""
        return f"{np.mean(values):.4g}{spread}" if values else ""

    names, table = ("psnr", "l1", "ssim", "seconds"), []
    for way, rows in itertools.groupby(figures["rows"], lambda row: row["name"]):
        rows = list(rows)
        table.append([way, *(shown([row[name] for row in rows if name in row]) for name in names)])
    maskgit.print_table(["filled by", *names], table)
    table = [[name, *(f"{value:.4g}" for value in scores.values())] for name, scores in figures["as set"].items()]
    maskgit.print_table(["as set, on", "psnr", "l1", "ssim"], table)
    entropies = ", ".join(f"{name} {value:.3f}" for name, value in figures["cross_entropy"].items())
    print(f"cross-entropy, nats per hidden token: {entropies}; seen: on pictures of the training")


def draw_pictures(checkpoint, images, holes, history, settings):
    """samples.png, reconstruction.png, loss.png and decode.gif."""
    out, tokenizer, options = settings.out, checkpoint["tokenizer"], options_of(settings)
    grey = paste(images, holes, np.uint8(GREY))
    filled = [fill_in_batches(checkpoint, images, holes, options, seed) for seed in range(3)]
    columns = np.stack([grey, *filled, images], axis=1)
    sheet(columns, ["hole", "filled", "another", "another", "truth"]).save(out / "samples.png")
    tokens, *_ = model_input(checkpoint, images, holes, informed=False)
    everywhere = to_pictures(tokenizer, tokens, images, np.ones_like(holes), blend=False)
    in_holes = to_pictures(tokenizer, tokens, images, holes, settings.blend)
    columns = np.stack([images, everywhere, in_holes], axis=1)
    sheet(columns, ["truth", "tokens", "in the hole"]).save(out / "reconstruction.png")

    frames = [grey, *trace_pictures(checkpoint, images, holes, options | {"sample": "categorical"})]
    maskgit.save_gif(out / "decode.gif", [sheet(pictures) for pictures in frames])
    names = {"training": "loss", "validation": "validation"}
    curves = {name: ([row["step"] for row in history], [row[key] for row in history]) for name, key in names.items()}
    labels = {"x_label": "step", "y_label": "cross-entropy, nats per hidden token"}
    title = "Inpainting: loss in training, and on the holes of validation pictures"
    maskgit.line_plot(curves, title=title, **labels).save(out / "loss.png")


def sheet(pictures, titles=()):
    """Pictures (..., S, S, 3) uint8 as one, in columns with titles or four in a row."""
    pictures = pictures.reshape(-1, *pictures.shape[-3:])
    scale = max(1, 128 // pictures.shape[1])
    return maskgit.image_grid(pictures / 255, len(titles) or 4, scale=scale, titles=titles)


def trace_pictures(checkpoint, images, holes, options):
    """The pictures after each step of filling, with what is still hidden in grey."""
    tokenizer, trace, shown = checkpoint["tokenizer"], [], []
    side = images.shape[1] // tokenizer.patch
    fill(checkpoint, images, holes, options, trace=trace)
    for tokens, hidden in trace:
        masks = hidden.cpu().numpy().reshape(-1, side, side)
        masks = masks.repeat(tokenizer.patch, axis=1).repeat(tokenizer.patch, axis=2)
        tokens = tokens.masked_fill(hidden, 0)
        pictures = to_pictures(tokenizer, tokens, images, holes | masks, options["blend"])
        shown.append(paste(paste(images, holes, pictures), holes & masks, np.uint8(GREY)))
    return shown


# ---------------------------------------------------------------------------------------------------
# Filling files


def pair_files(images, masks):
    """[(picture, mask)] by the order of their names; one mask file serves all pictures."""
    pictures, holes = picture_files(images), picture_files(masks)
    if masks.is_file():
        return [(picture, masks) for picture in pictures]
    if len(pictures) != len(holes):
        raise ValueError(f"{images} holds {len(pictures)} pictures, {masks} {len(holes)} masks; each picture needs one")
    pairs = list(zip(pictures, holes, strict=True))
    for picture, mask in pairs:
        numbers = [re.findall(r"\d+", file.stem)[-1:] for file in (picture, mask)]
        if numbers[0] != numbers[1] and all(numbers):
            raise ValueError(f"{picture.name} and {mask.name} come together, but their numbers differ")
    return pairs


def read_pair(picture, mask, size):
    """A picture (H, W, 3) uint8, its hole (H, W), and both in size x size: there a pixel with any part of the hole
    belongs to it."""
    image, visible = np.asarray(read_picture(picture, "RGB")), np.asarray(read_picture(mask, "L"))
    if image.shape[:2] != visible.shape:
        sizes = [f"{file} is {array.shape[1]}x{array.shape[0]}" for file, array in ((mask, visible), (picture, image))]
        raise ValueError(f"{', '.join(sizes)}; a mask has its image's size")
    hole = visible < 128
    arrays = (image, hole.astype(np.float32))
    small = [np.asarray(Image.fromarray(a).resize((size, size), Image.Resampling.BOX)) for a in arrays]
    return image, hole, small[0], small[1] > 0


def tokenizer_of(checkpoint, path, at_hand):
    """What the model of a checkpoint was trained with: its k-means tokens, or the VQGAN at hand if it is the same."""
    trained, given = (checkpoint["config"] or {}).get("vqgan_sha256"), at_hand and at_hand.sha256
    if trained and trained != given:
        remedy = "another VQGAN than --vqgan names" if given else "a VQGAN: name its file by --vqgan"
        raise ValueError(f"{path} was trained with {remedy}")
    if given and not trained:
        raise ValueError(f"{path} was trained without a VQGAN: leave out --vqgan")
    return at_hand or checkpoint["tokenizer"]


def open_model(settings):
    """The model that fills with its tokenizer, and the size of its pictures: the reports', or those of a checkpoint."""
    device, pixels = maskgit.pick_device(settings.device), "filling" if settings.transformer else "training"
    tokenizer = settings.vqgan and load_vqgan(settings.vqgan, device, pixels)
    if settings.transformer:
        return {"model": load_transformer(settings.transformer, device), "tokenizer": tokenizer}, settings.size
    checkpoint = maskgit.load_checkpoint(settings.checkpoint, device)
    tokenizer = tokenizer_of(checkpoint, settings.checkpoint, tokenizer)
    if tokenizer is None or "size" not in (checkpoint["config"] or {}):
        raise ValueError(f"{settings.checkpoint} is no checkpoint of inpaint.py")
    return checkpoint | {"tokenizer": tokenizer}, checkpoint["config"]["size"]


def fill_files(settings):
    """Fill the holes of files: a PNG for each; with --samples a PNG for each of those, and all in a row."""
    pairs = pair_files(settings.images, settings.masks)
    targets = [settings.out / f"{picture.stem}.png" for picture, _ in pairs]
    if len(set(targets)) < len(targets):
        raise ValueError("two pictures have the same name; fill their folders one at a time")
    for target in targets:
        if target.exists() and not settings.force:
            raise ValueError(f"{target} exists; --force overwrites, --out renames")
    checkpoint, size = open_model(settings)
    shapes = [read_pair(*pair, size)[1].shape for pair in pairs]  # all are read before one is written
    resized = sum(shape != (size, size) for shape in shapes)
    settings.out.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(pairs), AT_ONCE):
        read = [read_pair(*pair, size) for pair in pairs[start : start + AT_ONCE]]
        images, holes = (np.stack([arrays[i] for arrays in read]) for i in (2, 3))
        samples = []
        for i in range(settings.samples):
            seed = maskgit.step_seed(settings.seed, start, i)
            samples.append(fill(checkpoint, images, holes, options_of(settings), seed, whole=settings.whole))
        for target, (image, hole, *_), *filled in zip(targets[start : start + AT_ONCE], read, *samples, strict=True):
            filled = [Image.fromarray(pixels).resize(hole.shape[::-1], Image.Resampling.BICUBIC) for pixels in filled]
            filled = [paste(image, hole | settings.whole, np.asarray(pixels)) for pixels in filled]
            if settings.samples > 1:
                for i, sample in enumerate(filled, start=1):
                    Image.fromarray(sample).save(target.with_name(f"{target.stem}_{i}.png"))
                filled = [np.concatenate([image, *filled], axis=1)]
            Image.fromarray(filled[0]).save(target)
    if resized:
        print(f"{resized} pictures were filled at the model's {size}x{size}; only their holes were pasted back")
    print(f"{len(pairs)} pictures filled: {settings.out}")


# ---------------------------------------------------------------------------------------------------
# Settings

# How holes are filled, unless a flag says otherwise.
FILLING = {"schedule": "cosine", "order": "confidence", "sample": "categorical", "temperature": 0.4}
FILLING |= {"choice_temperature": 1.0, "stop_after": None, "blend": True}
DEFAULTS = {"dim": 128, "heads": 4, "layers": 3, "batch_size": 8, "lr": 4e-3, "steps": 10_000, "mask": "cosine"}
# R1 and R2's sizes and optimiser; their training set is three times ours, so an epoch has 12,000 pictures here, too.
REPORT = {"dim": 768, "heads": 16, "layers": 15, "hidden": 1536, "rotary": False, "batch_size": 10, "lr": 1e-4}
REPORT |= {"optimizer": "adamw", "betas": (0.9, 0.96), "decay": "constant", "warmup": 0, "steps": 100 * 12_000 // 10}
REPORT |= {"loss": "all", "mirror": False, "dropout": 0.1, "hole_rows": 0.0}


def parse_arguments():
    """The settings, and the names of those that --resume may change, since they do not touch the weights."""
    parser, count, yes_no = maskgit.CommandLine(__doc__), maskgit.at_least(1), argparse.BooleanOptionalAction
    add = parser.add_argument_group("pictures, holes and loss").add_argument
    add("--data", help="folder of pictures; default: drawn cartoon cats")
    add("--cartoons", type=count, default=6000, help="number of cats to draw, default %(default)s")
    add("--size", type=count, default=64, help="pixels per side, default %(default)s")
    add("--patch", type=count, default=4, help="pixels per side of a token, default %(default)s")
    add("--codes", type=maskgit.at_least(2), default=1024, help="of the codebook, default %(default)s")
    add("--mirror", action=yes_no, default=True, help="train on mirrored pictures as well")
    add("--hole", choices=HOLES, default="brush", help="of validation and scores, default %(default)s")
    share = maskgit.at_least(0.0, float, below=1.0)
    add("--hole-rows", type=share, default=0.5, help="share of a batch that hides holes; the rest hides --mask")
    add("--validation-images", type=count, default=200, help="default %(default)s")
    add("--preset", choices=("report",), help="R1 and R2's sizes, optimiser and loss")
    add("--loss", choices=("masked", "all"), default="masked", help="tokens that count (reports: all)")
    add("--betas", type=share, nargs=2, default=(0.9, 0.95), help="of AdamW")
    parser.add_shared_options("runs/inpaint")
    for_training = vars(parser.parse_args([]))

    add = parser.add_argument_group("filling and scores").add_argument
    add("--vqgan", type=Path, metavar="FILE", help="the reports' VQGAN in place of k-means tokens, at 64x64 only")
    add("--transformer", type=Path, metavar="FILE", help="fill files by a transformer of the reports, with --vqgan")
    add("--checkpoint", type=Path, help="fill files by this model instead of training one")
    add("--images", type=Path, help="folder of pictures to fill, or one file")
    add("--masks", type=Path, help="their masks, in the same order: 255 = visible, 0 = hole; or one for all")
    add("--whole", action="store_true", help="decode the visible pixels, too, as the reports do")
    add("--samples", type=count, default=1, help="different results for each picture")
    add("--decode-steps", type=count, default=10)
    add("--schedule", choices=maskgit.SCHEDULES)
    add("--order", choices=maskgit.ORDERS)
    add("--sample", choices=("categorical", "argmax", "mean"), help="mean: the least error")
    add("--temperature", type=maskgit.at_least(1e-6, float))
    add("--choice-temperature", type=maskgit.at_least(0.0, float))
    add("--evidence", action=yes_no, help="use the visible pixels of tokens partly in a hole; not with --vqgan")
    add("--blend", action=yes_no, help="soften the tokens' borders, and shift what is filled in to join its rim")
    add("--stop-after", type=count, help="commit all that is left after this many steps")
    add("--test-images", type=maskgit.at_least(8), default=48, help="default %(default)s")
    add("--score-seeds", type=count, default=1, help="draws behind each row of the table")

    known = parser.parse_known_args()[0]
    out = {"out": Path("runs/filled")} if known.checkpoint or known.transformer else {}
    parser.set_defaults(**DEFAULTS | FILLING | (REPORT if known.preset else {}) | out)
    settings = parser.parse_args()
    if bool(settings.checkpoint or settings.transformer) != bool(settings.images and settings.masks):
        parser.error("--checkpoint or --transformer fills --images by their --masks: name all three")
    if settings.transformer and (settings.checkpoint or not settings.vqgan):
        parser.error("--transformer is the reports': it takes their --vqgan, and no --checkpoint")
    if settings.vqgan and (settings.size, settings.patch, settings.codes) != (64, 4, 1024):
        parser.error("--vqgan has pictures of 64x64, patches of 4x4 and 1024 codes: leave out --size, --patch, --codes")
    if settings.vqgan and (settings.evidence or settings.sample == "mean"):
        option = "--evidence" if settings.evidence else "--sample mean"
        parser.error(f"{option} needs a centroid in pixels for each code, which --vqgan does not have")
    if settings.evidence is None:
        settings.evidence = not settings.vqgan
    if settings.size % settings.patch:
        parser.error(f"--size {settings.size} is not divisible by --patch {settings.patch}")

    return settings, vars(settings).keys() - for_training.keys()


def main():
    settings, may_change = parse_arguments()
    if settings.checkpoint or settings.transformer:
        fill_files(settings)
        return
    device, started = maskgit.open_run(settings), time.monotonic()
    tokenizer = settings.vqgan and load_vqgan(settings.vqgan, device)
    settings.vqgan_sha256 = tokenizer and tokenizer.sha256
    if settings.resume:
        path = settings.out / "model.pt"
        tokenizer = tokenizer_of(maskgit.load_checkpoint(path), path, tokenizer)
    split = open_pictures(settings.data, settings.cartoons, settings.size, settings.seed)
    counts = {name: len(part) for name, part in split._asdict().items()}
    print("pictures:", ", ".join(f"{count} {name}" for name, count in counts.items()))
    if not tokenizer:
        images = split.training[:CODEBOOK_IMAGES] / np.float32(255)
        tokenizer = maskgit.PatchTokenizer.fit(images, settings.codes, settings.patch, seed=settings.seed)
    prepared = time.monotonic()
    model, history = train_model(settings, tokenizer, split, device, may_change)
    if maskgit.process_rank()[0] > 0:
        return
    trained = time.monotonic()
    checkpoint = {"model": model, "tokenizer": tokenizer}
    images, holes = with_holes(split.test[: settings.test_images], settings.hole, TEST_SEED)
    seen = with_holes(split.training[: settings.test_images], settings.hole, TEST_SEED)
    figures = {"pictures": counts} | score(checkpoint, (images, holes), seen, settings)
    figures["parameters"] = sum(p.numel() for p in model.parameters())
    figures["validation"] = min(row["validation"] for row in history)
    seconds = {"prepared": prepared - started, "trained": history[-1]["seconds"], "scored": time.monotonic() - trained}
    figures["seconds"] = {name: round(value) for name, value in seconds.items()}
    maskgit.write_figures(settings, figures, settings.out / "metrics.json", settings.json)
    print_scores(figures)
    draw_pictures(checkpoint, images[:8], holes[:8], history, settings)
    print("seconds: " + ", ".join(f"{name} {value}" for name, value in figures["seconds"].items()))
    print("pictures:", *sorted(settings.out.glob("*.png")), settings.out / "decode.gif")
    model = f"{settings.out}/model.pt" + (f" --vqgan {settings.vqgan}" if settings.vqgan else "")
    print(f"fill your own: python inpaint.py --checkpoint {model} --images DIR --masks DIR --out DIR")


if __name__ == "__main__":
    maskgit.run_as_script(main)
