"""R1 and R2's VQGAN and transformer, for the files that their course handed out and its students trained.

`python inpaint.py --vqgan VQGAN.pt` uses them: the VQGAN in place of k-means tokens, the transformer to fill holes.
Written from a description of these files; no real one was at hand. The attributes of the modules are the files' names.

VQGAN: Esser et al., Taming Transformers for High-Resolution Image Synthesis, CVPR 2021.
"""

import hashlib
import itertools
import pickle
import re
import zipfile
from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import maskgit

PIXELS = {  # mean and deviation of red, green and blue: those that the reports train by, and those they fill by
    "training": ((0.4816, 0.4324, 0.3845), (0.2602, 0.2518, 0.2537)),
    "filling": ((0.4868, 0.4341, 0.3844), (0.2620, 0.2527, 0.2543)),
}
VQGAN_AT_ONCE = 16  # pictures: 1 GB
ATTENTION_NAMES = (  # query, key and value, in one matrix or three, then the output: each student's own
    ("qkv", "proj"),
    ("to_qkv", "proj"),
    ("q_linear", "k_linear", "v_linear", "out_linear"),
    ("query", "key", "value", "output_layer"),
    ("Wq", "Wk", "Wv", "out"),
)


def named(**modules):
    return nn.Sequential(OrderedDict(modules))


def group_norm(width):
    return named(gn=nn.GroupNorm(32, width, eps=1e-6))


def conv3(width, out):
    return nn.Conv2d(width, out, 3, padding=1)


def halve(width):
    return named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(width, width, 3, stride=2))


def double(width):
    return named(nearest=nn.Upsample(scale_factor=2), conv=conv3(width, width))


def residuals(*widths):
    return [Residual(width, out) for width, out in itertools.pairwise(widths)]


class Residual(nn.Module):
    """(B, width, H, W) -> (B, out, H, W)."""

    def __init__(self, width, out):
        super().__init__()
        first, second = (group_norm(width), nn.SiLU(), conv3(width, out)), (group_norm(out), nn.SiLU(), conv3(out, out))
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
        return x + self.proj_out(F.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(x.shape))


class VQGAN(nn.Module):
    """The reports' tokenizer: 64x64 pictures as 16x16 of 1024 codes, from and to numpy as PatchTokenizer has them. A
    code depends on the whole picture, and each pixel on all codes. `width` is 128 in the reports' file; `pixels` names
    one of PIXELS: "filling" goes with the reports' transformer, as in their script."""

    patch = 4  # pixels per side that a code has its place at

    def __init__(self, width=128, pixels="training"):
        super().__init__()
        self.mean, self.std = np.array(PIXELS[pixels], np.float32)
        a, b, c = width, 2 * width, 4 * width
        encoder = [conv3(3, a), *residuals(a, a, a, a, a, b, b), halve(b), *residuals(b, b, b, c, c), halve(c)]
        encoder += [Residual(c, c), NonLocal(c), Residual(c, c), group_norm(c), nn.SiLU(), conv3(c, b)]
        decoder = [conv3(b, c), Residual(c, c), NonLocal(c), Residual(c, c)]
        decoder += [layer for _ in range(3) for layer in (Residual(c, c), NonLocal(c))]
        decoder += [double(c), *residuals(c, b, b, b, b, b, b), double(b), *residuals(b, a, a, a, a, a, a)]
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
        if images.shape[1:] != (64, 64, 3):
            raise ValueError(f"the VQGAN takes images (B, 64, 64, 3), not {images.shape}")
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
        if tokens.shape[1] != 256:
            raise ValueError(f"the reports' transformer takes 256 tokens, not {tokens.shape[1]}")
        x = self.blocks(self.LN(self.tok_emb(tokens) + self.pos_emb))  # (B, 256, 768)
        return (F.linear(self.Token_Prediction(x), self.tok_emb.weight) + self.bias)[..., : self.mask_id]


# ---------------------------------------------------------------------------------------------------
# Their files


def load_vqgan(path, device, pixels="training"):
    """The VQGAN in a file, with the SHA-256 of its weights."""
    with torch.device("meta"):
        vqgan = VQGAN(pixels=pixels)
    digest = hashlib.sha256()
    for tensor in load_weights(vqgan, path, "vqgan").state_dict().values():
        digest.update(tensor.contiguous().numpy())
    vqgan.sha256 = digest.hexdigest()
    return vqgan.to(device, memory_format=torch.channels_last)


def load_transformer(path, device):
    with torch.device("meta"):
        transformer = ReportTransformer()
    return load_weights(transformer, path, "transformer", one_attention).to(device)


def load_weights(network, path, part, adapt=dict):
    """The network with the weights of a stranger's file, on the CPU and ready; ValueError if they are of anything else.
    adapt(weights) gives them the network's names."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        weights = adapt(read_weights(path, part))
        require_shapes(network, weights)
        network.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    except Exception as error:  # torch.load raises half a dozen types on damaged files
        reason = "it is damaged or asks to run code" if isinstance(error, pickle.UnpicklingError) else error
        raise ValueError(f"{path} does not hold the reports' {part}: {reason}".splitlines()[0]) from None
    return network.eval()


def read_weights(path, part):
    """{name: tensor}, which is the whole file, lies under "model" in it, or is that part of a whole MaskGIT whose names
    begin with "vqgan." or "transformer."."""
    with zipfile.ZipFile(path) as archive:
        if broken := archive.testzip():  # torch.load does not compare the checksums
            raise ValueError(f"{broken} has another checksum")
    weights = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(weights.get("model"), dict) and not any("." in name for name in weights):
        weights = weights["model"]
    if {name.partition(".")[0] for name in weights} <= {"vqgan", "transformer"}:
        weights = {name.partition(".")[2]: weights[name] for name in weights if name.startswith(part)}
    return weights


def one_attention(weights):
    """A transformer's weights whose attention has one of ATTENTION_NAMES, by the names of maskgit.Attention."""
    found = {match[1] for name in weights if (match := re.match(r"blocks\.\d+\.Attention\.(\w+)", name))}
    known = next((names for names in ATTENTION_NAMES if set(names) == found), None)
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


def require_shapes(network, weights):
    """ValueError unless the weights have the network's names and shapes, and are finite."""
    want, have = ({k: tuple(getattr(v, "shape", ())) for k, v in w.items()} for w in (network.state_dict(), weights))
    wrong = sorted(name for name in want | have if want.get(name) != have.get(name))
    if wrong:
        first = f"{wrong[0]!r} is {have.get(wrong[0], 'missing')} where {want.get(wrong[0], 'nothing')} is expected"
        raise ValueError(f"{len(wrong)} keys do not fit: {first}; {keys_of(weights)}")
    if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
        raise ValueError("some of its weights are no numbers")


def keys_of(weights):
    return f"its {len(weights)} keys are {', '.join(map(repr, list(weights)[:6]))}" + ", ..." * (len(weights) > 6)
