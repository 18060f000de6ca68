"""R1 and R2's own files: their VQGAN as the tokenizer of inpaint.py, and their transformer. 64x64 pictures.

    python extras/vqgan.py --vqgan VQGAN.pt --transformer best_val.pth --images DIR --masks DIR --out DIR    fill
    python extras/vqgan.py --vqgan VQGAN.pt --data FOLDER                                                    train
    python extras/vqgan.py --vqgan VQGAN.pt --checkpoint runs/vqgan/model.pt --images DIR --masks DIR --out DIR

The VQGAN is frozen. It sees the whole picture, so the hole is covered before it is encoded, and nothing of what is in
it reaches the model. Its codes have no centroids in pixels: neither --evidence nor --sample mean is possible. A model
that is trained here belongs to its VQGAN, whose weights model.pt names by their SHA-256.

Written from a description of the files, and checked with random weights only (results/vqgan.json).
"""

import argparse
import itertools
import pickle
import re
import sys
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

AT_ONCE = 16  # pictures that the VQGAN is given: 1 GB
PIXELS = {  # mean and deviation of red, green and blue: those that the reports train by, and those they fill by
    "training": ((0.4816, 0.4324, 0.3845), (0.2602, 0.2518, 0.2537)),
    "filling": ((0.4868, 0.4341, 0.3844), (0.2620, 0.2527, 0.2543)),
}

# ---------------------------------------------------------------------------------------------------
# The VQGAN (Esser et al., Taming Transformers, CVPR 2021); the attributes of the modules are the names in its file


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
    """The reports' tokenizer: 64x64 pictures as 16x16 tokens of 1024 codes, from and to numpy as PatchTokenizer has
    them. A token depends on the whole picture, and a picture on all tokens."""

    patch = 4
    centroids = None  # in pixels: there are none

    def __init__(self, width=128, pixels="training"):
        super().__init__()
        self.mean, self.std = np.array(PIXELS[pixels], np.float32)
        a, b, c = width, 2 * width, 4 * width
        down = [named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(w, w, 3, stride=2)) for w in (b, c)]  # half a side
        up = [named(nearest=nn.Upsample(scale_factor=2), conv=conv3(w, w)) for w in (c, b)]  # a side twice as long
        encoder = [conv3(3, a), *residuals(a, a, a, a, a, b, b), down[0], *residuals(b, b, b, c, c), down[1]]
        encoder += [Residual(c, c), NonLocal(c), Residual(c, c), group_norm(c), nn.SiLU(), conv3(c, b)]
        decoder = [conv3(b, c), Residual(c, c), NonLocal(c), Residual(c, c)]
        decoder += [layer for _ in range(3) for layer in (Residual(c, c), NonLocal(c))]
        decoder += [up[0], *residuals(c, b, b, b, b, b, b), up[1], *residuals(b, a, a, a, a, a, a)]
        decoder += [group_norm(a), conv3(a, 3)]
        self.encoder, self.decoder = (named(model=nn.Sequential(*layers)) for layers in (encoder, decoder))
        self.codebook = named(embedding=nn.Embedding(1024, b))
        self.quant_conv = nn.Conv2d(b, b, 1)
        self.post_quant_conv = nn.Conv2d(b, b, 1)

    @torch.inference_mode()
    def encode(self, images):
        """Images (B, 64, 64, 3) in [0, 1] -> tokens (B, 16, 16). What is nan is covered by a membrane."""
        codebook = self.codebook.embedding.weight.detach().cpu().numpy()  # (1024, 256)
        tokens = []
        for start in range(0, len(images), AT_ONCE):
            pixels = torch.from_numpy((images[start : start + AT_ONCE] - self.mean) / self.std)
            pixels = pixels.permute(0, 3, 1, 2).to(self.quant_conv.weight)  # (b, 3, 64, 64)
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
        """Decoded pictures shifted to join images uint8 at the rim of their holes."""
        pictures = (torch.from_numpy(each).permute(0, 3, 1, 2) for each in (decoded, images / np.float32(255)))
        return inpaint.joined(*pictures, torch.from_numpy(holes)[:, None]).permute(0, 2, 3, 1).numpy()


# ---------------------------------------------------------------------------------------------------
# The transformer


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
    """The reports' transformer, for decode: tokens (B, 256) -> logits (B, 256, 1024), without that of [MASK]. It knows
    its positions, whatever the coordinates."""

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


def load_vqgan(path, device, pixels="training"):
    """The VQGAN in a file, with the SHA-256 of its weights."""
    with torch.device("meta"):
        network = VQGAN(pixels=pixels)
    network.sha256 = inpaint.weights_digest(load_weights(network, path, "vqgan"))
    return network.to(device, memory_format=torch.channels_last)


def load_transformer(path, device):
    with torch.device("meta"):
        network = ReportTransformer()
    return load_weights(network, path, "transformer", one_attention).to(device)


# What else students save: arguments, and a loss as a number of numpy. None of it runs code of the file.
SCALAR = np.float64(0).__reduce__()[0]
BESIDE = [argparse.Namespace, np.dtype, SCALAR, (SCALAR, "numpy.core.multiarray.scalar")]
BESIDE += [type(np.dtype(kind)) for kind in ("f4", "f8", "i8")]


def load_weights(network, path, part, adapt=dict):
    """The network with the weights that a stranger's file has of that part of a MaskGIT, "vqgan" or "transformer";
    adapt(weights) gives them the network's names. ValueError if they are of anything else."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        with torch.serialization.safe_globals(BESIDE):
            weights = adapt(weights_of(maskgit.read_tensors(path, "cpu"), part))
        shapes = [{n: tuple(w.shape) for n, w in s.items()} for s in (network.state_dict(), weights)]
        if wrong := [n for n in sorted(shapes[0] | shapes[1]) if shapes[0].get(n) != shapes[1].get(n)]:
            want = shapes[0].get(wrong[0], "nothing")
            have = shapes[1].get(wrong[0], "missing")
            first = f"{wrong[0]!r} is {have} where {want} is expected"
            raise ValueError(f"{len(wrong)} keys do not fit: {first}; {keys_of(weights)}")
        if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
            raise ValueError("some of its weights are no numbers")
        network.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    except Exception as error:  # torch.load raises half a dozen types on damaged files
        code = "it is damaged or asks to run code; torch.save(model.state_dict(), FILE) asks for none"
        reason = code if isinstance(error, pickle.UnpicklingError) else error
        raise ValueError(f"{path} does not hold the reports' {part}: {reason}".splitlines()[0]) from None
    return network.eval()


def weights_of(saved, part):
    """The weights {name: tensor} of that part in what students save: bare, or with an epoch, an optimiser and the like
    around them; alone or of a whole MaskGIT; as they are, or in the wrappers of torch.compile, of
    DistributedDataParallel or of Lightning. ValueError if there are none, or several that may be meant."""
    found = dict(state_dicts(saved))
    found = {where: found[where] for where in found if part in where.split(".")} or found
    if len(found) != 1:
        raise ValueError(f"it has weights under {', '.join(map(repr, found)) or 'no key'}; {keys_of(saved)}")
    ((_, weights),) = found.items()
    while heads := {name.partition(".")[0] for name in weights}:
        whole = heads <= {"vqgan", "transformer"}
        if not whole and heads not in ({"module"}, {"_orig_mod"}, {"model"}):
            break
        weights = {name.partition(".")[2]: w for name, w in weights.items() if not whole or name.startswith(f"{part}.")}
    return weights


def state_dicts(saved, where=""):
    """Yield the key and the tensors of every dict of weights in what was saved."""
    tensors = {name: value for name, value in saved.items() if isinstance(value, torch.Tensor)}
    if any("." in str(name) for name in tensors):
        yield where, tensors
    for name, value in saved.items():
        if isinstance(value, dict):
            yield from state_dicts(value, f"{where}.{name}".strip("."))


def one_attention(weights):
    """A transformer's weights, those of its attention by the names of maskgit.Attention, whatever each student calls
    query, key, value, in one matrix or three, and the output."""
    found = {name: w for name, w in weights.items() if ".Attention." not in name}
    for i in range(15):
        at = f"blocks.{i}.Attention."
        own = {name.removeprefix(at): w for name, w in weights.items() if name.startswith(at)}
        matrices = {name.removesuffix("weight"): w for name, w in own.items() if name.endswith("weight")}
        inputs = query_key_value(matrices)
        others = matrices.keys() - set(inputs)
        known = {f"{name}{kind}" for name in matrices for kind in ("weight", "bias")}
        if not inputs or len(others) != 1 or own.keys() - known:
            raise ValueError(f"its attention has {', '.join(sorted(own)) or 'no names'}; {keys_of(weights)}")
        for ours, theirs in (("qkv", inputs), ("out", others)):
            found[f"{at}{ours}.weight"] = torch.cat([matrices[name] for name in theirs])
            biases = [own.get(f"{name}bias", torch.zeros(len(matrices[name]))) for name in theirs]  # R1 has none
            found[f"{at}{ours}.bias"] = torch.cat(biases)
    return found


MENTIONS = (r"quer(?:y|ies)|q", "keys?|k", r"val(?:ues?)?|v")


def query_key_value(matrices):
    """The names of the matrix (2304, 768) of all three, or of those whose names differ in nothing but the mention of
    one of them; () where that is not clear."""
    if together := [name for name, w in matrices.items() if len(w) == 3 * 768]:
        orders = ["".join(order) for order in itertools.permutations("qkv") if order != ("q", "k", "v")]
        return together if not any(order in name.lower() for name in together for order in orders) else ()
    triples = []
    for names in itertools.permutations(matrices, 3):
        blanked = []
        for name, mention in zip(names, MENTIONS, strict=True):
            found = re.finditer(mention, name.lower())
            blanked.append({name.lower()[: one.start()] + "#" + name.lower()[one.end() :] for one in found})
        if set.intersection(*blanked):
            triples.append(names)
    return triples[0] if len(triples) == 1 else ()


def keys_of(weights):
    return f"its {len(weights)} keys are {', '.join(map(repr, list(weights)[:6]))}" + ", ..." * (len(weights) > 6)


# ---------------------------------------------------------------------------------------------------
# Filling and training


@dataclass(frozen=True)
class OnVQGAN(inpaint.Inpainting):
    """All that decides the weights of a run on the tokens of a VQGAN."""

    vqgan_sha256: str = maskgit.setting("", None)
    painter_steps: int = maskgit.setting(0, None)  # a VQGAN's decoder paints

    def __post_init__(self):
        super().__post_init__()
        if (self.size, self.patch, self.codes) != (64, 4, 1024):
            raise ValueError("a VQGAN has pictures of 64x64, patches of 4x4 and 1024 codes: leave these as they are")


def require_vqgan(path, config, vqgan):
    """ValueError unless the checkpoint with that config was trained on the tokens of this VQGAN."""
    trained = (config or {}).get("vqgan_sha256")
    if not trained:
        raise ValueError(f"{path} was trained without a VQGAN: it is for inpaint.py")
    if trained != vqgan.sha256:
        raise ValueError(f"{path} was trained with another VQGAN than --vqgan names")


def parse_arguments():
    """The command line, with the recipe and the filling in it."""
    filling = inpaint.Filling(evidence=False)
    parser = inpaint.command_line(__doc__, OnVQGAN, filling, "runs/vqgan", ["--checkpoint", "--transformer"])
    parser.add_argument("--vqgan", type=Path, required=True, metavar="FILE", help="the weights of the VQGAN")
    parser.add_argument("--transformer", type=Path, metavar="FILE", help="fill by this transformer of the reports")
    arguments = parser.parse_args()
    filling = maskgit.settings_from(arguments, inpaint.Filling)
    if arguments.transformer and arguments.checkpoint:
        parser.error("--transformer is the reports', --checkpoint one of this script: fill by one of them")
    given = [arguments.transformer or arguments.checkpoint, arguments.images, arguments.masks]
    if any(given) and not all(given):
        parser.error("--transformer or --checkpoint fills --images by their --masks: name all three")
    inpaint.require_flags(parser, any(given))
    if filling.evidence or filling.sample == "mean":
        parser.error(
            "--evidence and --sample mean need a centroid in pixels for each code, which a VQGAN does not have"
        )
    return arguments, maskgit.settings_from(arguments, OnVQGAN), filling


def main():
    record = maskgit.run_record()
    arguments, recipe, filling = parse_arguments()
    device = maskgit.pick_device(arguments.device)
    vqgan = load_vqgan(arguments.vqgan, device, "filling" if arguments.transformer else "training")
    parts = {"tokenizer": vqgan, "painter": vqgan}
    if arguments.transformer:
        checkpoint = parts | {"model": load_transformer(arguments.transformer, device)}
        inpaint.fill_files(checkpoint, recipe.size, filling, arguments, recipe.seed)
    elif arguments.checkpoint:
        checkpoint = maskgit.load_checkpoint(arguments.checkpoint, device)
        require_vqgan(arguments.checkpoint, checkpoint["config"], vqgan)
        inpaint.fill_files(checkpoint | parts, recipe.size, filling, arguments, recipe.seed)
    else:
        if arguments.resume:
            path = arguments.out / "model.pt"
            require_vqgan(path, maskgit.load_checkpoint(path)["config"], vqgan)
        recipe = replace(recipe, vqgan_sha256=vqgan.sha256)
        inpaint.train_and_score(record, arguments, recipe, filling, vqgan)


if __name__ == "__main__":
    maskgit.run_as_script(main)
