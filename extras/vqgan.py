"""R1 and R2's own files (two reports of a course): their VQGAN as the tokenizer of inpaint.py, and their transformer.

    python extras/vqgan.py --vqgan VQGAN.pt --transformer best_val.pth --images DIR --masks DIR --out DIR    fill
    python extras/vqgan.py --vqgan VQGAN.pt --data FOLDER                                                    train
    python extras/vqgan.py --vqgan VQGAN.pt --checkpoint runs/vqgan/model.pt --images DIR --masks DIR --out DIR

Pictures are 64x64. The VQGAN is frozen. It sees the whole picture, so a hole is covered by a membrane before it is
encoded (the reports paint it grey), and nothing of what is in it reaches the model. Its codes have no centroids in
pixels, so --evidence is not possible. A model that is trained here belongs to its VQGAN, whose
weights model.pt names by their SHA-256. Written from a description of the files, and checked with random weights only:
no real file was at hand.
"""

import argparse
import hashlib
import itertools
import pickle
import re
import sys
import textwrap
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import inpaint
import maskgit
from maskgit import InputError

AT_ONCE = 16  # pictures that the VQGAN is given, in 1 GB of memory
MOMENTS = {  # mean and deviation of red, green and blue: the reports train by others than they fill by
    "training": ((0.4816, 0.4324, 0.3845), (0.2602, 0.2518, 0.2537)),
    "filling": ((0.4868, 0.4341, 0.3844), (0.2620, 0.2527, 0.2543)),
}

# ---------------------------------------------------------------------------------------------------
# The VQGAN (Esser et al., Taming Transformers, CVPR 2021); the attributes of the modules are the names in its file


def named(**modules):
    """A sequence of modules that are attributes of these names."""
    return nn.Sequential(OrderedDict(modules))


def group_norm(width):
    return named(gn=nn.GroupNorm(32, width, eps=1e-6))


def conv3(width, out):
    return nn.Conv2d(width, out, 3, padding=1)


def down(width):
    """To half the side. The border is at the right and at the bottom alone."""
    return named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(width, width, 3, stride=2))


def up(width):
    """To twice the side."""
    return named(nearest=nn.Upsample(scale_factor=2), conv=conv3(width, width))


def residuals(*widths):
    """Blocks from each width to the next."""
    return [Residual(width, out) for width, out in itertools.pairwise(widths)]


class Residual(nn.Module):
    """(B, width, H, W) -> (B, out, H, W)."""

    def __init__(self, width, out):
        super().__init__()
        first = [group_norm(width), nn.SiLU(), conv3(width, out)]
        second = [group_norm(out), nn.SiLU(), conv3(out, out)]
        self.block = nn.Sequential(*first, *second)
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
        attended = F.scaled_dot_product_attention(*qkv).transpose(1, 2)  # (B, width, H * W)
        return x + self.proj_out(attended.reshape(x.shape))


class VQGAN(nn.Module):
    """The reports' tokenizer, used as a PatchTokenizer: 64x64 pictures as 16x16 tokens of 1024 codes, both as arrays. A
    token depends on the whole picture, and a picture on all tokens. It also serves as inpaint.py's painter."""

    patch = 4
    centroids = None  # in pixels: there are none

    def __init__(self, width=128, moments="training"):
        super().__init__()
        self.mean, self.std = np.array(MOMENTS[moments], np.float32)
        a, b, c = width, 2 * width, 4 * width
        encoder = [conv3(3, a), *residuals(a, a, a, a, a, b, b), down(b)]  # 64x64 -> 32x32
        encoder += [*residuals(b, b, b, c, c), down(c)]  # -> 16x16
        encoder += [Residual(c, c), NonLocal(c), Residual(c, c), group_norm(c), nn.SiLU(), conv3(c, b)]
        decoder = [conv3(b, c), Residual(c, c), NonLocal(c), Residual(c, c)]
        decoder += [Residual(c, c), NonLocal(c), Residual(c, c), NonLocal(c), Residual(c, c), NonLocal(c)]
        decoder += [up(c), *residuals(c, b, b, b, b, b, b)]  # 16x16 -> 32x32
        decoder += [up(b), *residuals(b, a, a, a, a, a, a)]  # -> 64x64
        decoder += [group_norm(a), conv3(a, 3)]
        self.encoder = named(model=nn.Sequential(*encoder))
        self.decoder = named(model=nn.Sequential(*decoder))
        self.codebook = named(embedding=nn.Embedding(1024, b))
        self.quant_conv = nn.Conv2d(b, b, 1)
        self.post_quant_conv = nn.Conv2d(b, b, 1)

    @torch.inference_mode()
    def encode(self, images):
        """Images (B, 64, 64, 3) in [0, 1], nan in a hole -> tokens (B, 16, 16)."""
        codebook = self.codebook.embedding.weight.detach().cpu().numpy()  # (1024, 256)
        tokens = []
        for part in torch.from_numpy((images - self.mean) / self.std).split(AT_ONCE):
            pixels = part.permute(0, 3, 1, 2).to(self.quant_conv.weight)  # (b, 3, 64, 64)
            covered = inpaint.membrane(pixels, pixels[:, :1].isnan())
            latents = self.quant_conv(self.encoder(covered)).permute(0, 2, 3, 1).cpu().numpy()  # (b, 16, 16, 256)
            nearest = maskgit.nearest_centroid(latents.reshape(-1, latents.shape[-1]), codebook)
            tokens.append(nearest.reshape(latents.shape[:3]))
        return np.concatenate(tokens)

    @torch.inference_mode()
    def decode(self, tokens):
        """Tokens (B, 16, 16) -> images (B, 64, 64, 3) in [0, 1]."""
        images = []
        for part in torch.from_numpy(tokens).to(self.quant_conv.weight.device).split(AT_ONCE):
            latents = self.codebook.embedding(part).permute(0, 3, 1, 2)  # (b, 256, 16, 16)
            pixels = self.decoder(self.post_quant_conv(latents)).permute(0, 2, 3, 1).cpu().numpy()
            images.append((pixels * self.std + self.mean).clip(0, 1))
        return np.concatenate(images)

    def paint(self, decoded, images, holes):
        """As a Painter that has learnt nothing: decoded pictures shifted to join images uint8 at the rim of holes."""
        errors = torch.from_numpy(images / np.float32(255) - decoded).permute(0, 3, 1, 2)
        return decoded + inpaint.membrane(errors, torch.from_numpy(holes)[:, None]).permute(0, 2, 3, 1).numpy()


# ---------------------------------------------------------------------------------------------------
# The transformer; here, too, the attributes are the names in the file, but for those of the attention


class ReportBlock(nn.Module):
    """(B, T, 768) -> (B, T, 768), normalised after each sum."""

    def __init__(self):
        super().__init__()
        self.Attention = maskgit.Attention(768, 16)
        self.LayerNorm1 = nn.LayerNorm(768, eps=1e-12)
        self.LayerNorm2 = nn.LayerNorm(768, eps=1e-12)
        self.MLP = nn.Sequential(nn.Linear(768, 1536), nn.GELU(), nn.Linear(1536, 768))

    def forward(self, x):
        x = self.LayerNorm1(x + self.Attention(x))
        return self.LayerNorm2(x + self.MLP(x))


class ReportTransformer(nn.Module):
    """The reports' transformer, for decode: tokens (B, 256) -> logits (B, 256, 1024), without that of [MASK]. It has
    learnt its positions and does not use the coordinates."""

    mask_id = 1024

    def __init__(self):
        super().__init__()
        self.tok_emb = nn.Embedding(1025, 768)
        self.pos_emb = nn.Parameter(torch.zeros(256, 768))
        self.LN = nn.LayerNorm(768, eps=1e-12)
        self.blocks = nn.Sequential(*(ReportBlock() for _ in range(15)))
        self.Token_Prediction = nn.Sequential(nn.Linear(768, 768), nn.GELU(), nn.LayerNorm(768, eps=1e-12))
        self.bias = nn.Parameter(torch.zeros(256, 1025))

    def forward(self, tokens, coords=None):
        x = self.blocks(self.LN(self.tok_emb(tokens) + self.pos_emb))  # (B, 256, 768)
        return (F.linear(self.Token_Prediction(x), self.tok_emb.weight) + self.bias)[..., : self.mask_id]


# ---------------------------------------------------------------------------------------------------
# Their files


def load_vqgan(path, device, moments="training"):
    """The VQGAN in a file, with the SHA-256 of its weights."""
    with torch.device("meta"):
        network = VQGAN(moments=moments)
    load_weights(network, path, "vqgan")
    weights = [tensor.flatten().view(torch.uint8).numpy() for tensor in network.state_dict().values()]
    network.sha256 = hashlib.sha256(b"".join(weights)).hexdigest()
    return network.to(device, memory_format=torch.channels_last)


def load_transformer(path, device):
    with torch.device("meta"):
        network = ReportTransformer()
    load_weights(network, path, "transformer")
    return network.to(device)


# What else students save, none of which runs code of the file: arguments, and numbers of numpy.
SCALAR = np.float64(0).__reduce__()[0]  # what makes a number again; numpy 1 had it elsewhere
BESIDE = [argparse.Namespace, np.dtype, SCALAR, (SCALAR, "numpy.core.multiarray.scalar")]
BESIDE += [type(np.dtype(kind)) for kind in ("f4", "f8", "i8")]
ANCHORS = {"vqgan": "codebook.embedding.weight", "transformer": "tok_emb.weight"}  # a name in each


def load_weights(network, path, part):
    """Give the network the weights that a stranger's file has of that part of a MaskGIT, "vqgan" or "transformer".
    InputError if they are of anything else."""
    try:
        with torch.serialization.safe_globals(BESIDE):
            saved = maskgit.read_tensors(path)
        found = list(weights_beside(ANCHORS[part], saved))
        if len(found) != 1:
            raise InputError(f"it has {ANCHORS[part]!r} {len(found)} times; its keys are {inpaint.listed(saved)}")
        weights = one_attention(found[0]) if part == "transformer" else found[0]
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise InputError("some of its weights are no numbers")
        network.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    except Exception as error:  # torch.load raises half a dozen types on damaged files
        reason = textwrap.shorten(str(error), 300)
        if isinstance(error, pickle.UnpicklingError):  # whose own words advise to run the code
            reason = "it is damaged or asks to run code; torch.save(model.state_dict(), FILE) asks for none"
        raise InputError(f"{path} does not hold the reports' {part}: {reason}") from None
    network.eval()


def weights_beside(anchor, saved):
    """Yield the weights {name: tensor} of each network that has one named `anchor`, in what was saved: wherever that is
    found, in a dict of any depth and behind any prefix, such as "module." or "transformer.", which all others share."""
    tensors = {name: value for name, value in saved.items() if isinstance(value, torch.Tensor)}
    for prefix in [name.removesuffix(anchor) for name in tensors if f".{name}".endswith(f".{anchor}")]:
        yield {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
    for value in saved.values():
        if isinstance(value, dict):
            yield from weights_beside(anchor, value)


def one_attention(weights):
    """A transformer's weights, those of its attention by the names of maskgit.Attention: `qkv`, one matrix, and `out`.
    Students call these otherwise, and some have a matrix each for query, key and value."""
    found = {name: tensor for name, tensor in weights.items() if ".Attention." not in name}
    for i in range(15):
        at = f"blocks.{i}.Attention."
        own = {name.removeprefix(at): tensor for name, tensor in weights.items() if name.startswith(at)}
        matrices = {name.removesuffix("weight"): own[name] for name in own if name.endswith("weight")}  # {"q.": ...}
        inputs = query_key_value(matrices)
        outputs = matrices.keys() - set(inputs)
        known = {f"{name}{kind}" for name in matrices for kind in ("weight", "bias")}
        if not inputs or len(outputs) != 1 or own.keys() - known:
            raise InputError(f"its attention has {', '.join(sorted(own)) or 'no names'}")
        for ours, theirs in (("qkv", inputs), ("out", outputs)):
            found[f"{at}{ours}.weight"] = torch.cat([matrices[name] for name in theirs])
            biases = [own.get(f"{name}bias", torch.zeros(len(matrices[name]))) for name in theirs]  # some have none
            found[f"{at}{ours}.bias"] = torch.cat(biases)
    return found


def query_key_value(matrices):
    """The name of the matrix (2304, 768) of all three, or the names of those that differ in nothing but the mention of
    query, key or value; () where that is not clear."""
    together = [name for name, matrix in matrices.items() if len(matrix) == 3 * 768]
    if together:
        return () if re.search("qvk|kqv|kvq|vqk|vkq", " ".join(together).lower()) else together
    # Such as "to_q. to_k. to_v.": what stands before and after the mention is the same.
    mentions = re.compile(r"(.*)(?:query|queries|q)(.*) \1(?:keys?|k)\2 \1(?:values?|val|v)\2")
    triples = [names for names in itertools.permutations(matrices, 3) if mentions.fullmatch(" ".join(names).lower())]
    return triples[0] if len(triples) == 1 else ()


# ---------------------------------------------------------------------------------------------------
# Filling and training


@dataclass(frozen=True)
class OnVQGAN(inpaint.Inpainting):
    """All that decides the weights of a run on the tokens of a VQGAN."""

    vqgan_sha256: str = maskgit.setting("", "")
    size: int = maskgit.setting(64, "")
    patch: int = maskgit.setting(4, "")
    codes: int = maskgit.setting(1024, "")
    painter_steps: int = maskgit.setting(0, "")  # a VQGAN's decoder paints


def load_own(path, vqgan, device):
    """The model in a checkpoint of this script; InputError unless it was trained on the tokens of this VQGAN."""
    checkpoint = maskgit.load_checkpoint(path, device)
    if (checkpoint["config"] or {}).get("vqgan_sha256") != vqgan.sha256:
        raise InputError(f"{path} was not trained on the tokens of the VQGAN that --vqgan names")
    return checkpoint["model"]


def parse_arguments():
    """The command line, with the recipe and the filling in it."""
    parser = inpaint.command_line(__doc__, OnVQGAN, inpaint.Filling(evidence=False), "runs/vqgan")
    parser.add_argument("--vqgan", type=Path, metavar="FILE", help="the weights of the VQGAN; always needed")
    parser.add_argument("--transformer", type=Path, metavar="FILE", help="fill by this transformer of the reports")
    arguments = parser.parse_with(inpaint.defaults_of)
    if not arguments.vqgan:
        parser.error("--vqgan is needed: the weights of the VQGAN")
    if arguments.transformer and arguments.checkpoint:
        parser.error("--transformer is the reports', --checkpoint one of this script: fill by one of them")
    inpaint.require_flags(parser, arguments, arguments.transformer or arguments.checkpoint)
    filling = maskgit.settings_from(arguments, inpaint.Filling)
    if filling.evidence:
        parser.error("--evidence needs a centroid in pixels for each code; a VQGAN has none")
    return arguments, maskgit.settings_from(arguments, OnVQGAN), filling


def main():
    record = maskgit.run_record()
    arguments, recipe, filling = parse_arguments()
    device = maskgit.pick_device(arguments.device)
    vqgan = load_vqgan(arguments.vqgan, device, "filling" if arguments.transformer else "training")
    if arguments.transformer:
        model = load_transformer(arguments.transformer, device)
    elif arguments.checkpoint:
        model = load_own(arguments.checkpoint, vqgan, device)
    else:
        recipe = replace(recipe, vqgan_sha256=vqgan.sha256)
        return inpaint.train_and_score(record, arguments, recipe, filling, vqgan)
    inpainter = inpaint.Inpainter(model, vqgan, vqgan, recipe.for_device(device).precision)
    inpaint.fill_files(inpainter, recipe.size, filling, arguments, recipe.seed)


if __name__ == "__main__":
    maskgit.run_as_script(main)
