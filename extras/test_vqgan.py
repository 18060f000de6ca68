"""Both networks beside others, which are written here by functions alone; then the files, and a run."""

import argparse
import hashlib
import math
import re
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import inpaint
from extras import vqgan

from test_maskgit import Malicious, call, filled_pairs, paths_of, refusal, saved, seeded, tiny_model, write_pairs

LAYERS = {  # kind and channels that come out: 0, 1, 2 ... in the description
    "encoder": "conv 128," + 4 * "res 128," + 2 * "res 256," + "down 256," + 2 * "res 256," + 2 * "res 512,"
    + "down 512,res 512,att 512,res 512,norm 512,swish 512,conv 256",
    "decoder": "conv 512,res 512,att 512,res 512," + 3 * "res 512,att 512," + "up 512," + 6 * "res 256,"
    + "up 256," + 6 * "res 128," + "norm 128,conv 3",
}  # fmt: skip


class Take(dict):
    def __call__(self, name, *shape):
        """The weight of that name and shape, which is used up."""
        assert self[name].shape == shape, name
        return self.pop(name)


def by_its_layers(take, part, x, scale=1):
    """The encoder or decoder of images (B, C, H, W), layer by layer; `scale` divides the channels."""

    def conv(x, name, out, side=3):
        weight = take(f"{at}{name}.weight", out, x.shape[1], side, side)
        return F.conv2d(F.pad(x, [side // 2] * 4), weight, take(f"{at}{name}.bias", out))

    def norm(x, name):
        weight, bias = (take(f"{at}{name}.gn.{end}", x.shape[1]) for end in ("weight", "bias"))
        return F.group_norm(x, 32, weight, bias, 1e-6)

    for i, (kind, channels) in enumerate(layer.split() for layer in LAYERS[part].split(",")):
        at = f"{part}.model.{i}"
        out = 3 if channels == "3" else int(channels) // scale
        if kind == "res":
            branch = conv(F.silu(norm(x, ".block.0")), ".block.2", out)
            branch = conv(F.silu(norm(branch, ".block.3")), ".block.5", out)
            x = branch + (x if x.shape[1] == out else conv(x, ".channel_up", out, 1))
        elif kind == "att":
            normed = norm(x, ".norm")
            q, k, v = (conv(normed, name, out, 1).flatten(2) for name in (".q", ".k", ".v"))  # (B, C, H * W)
            shares = (torch.einsum("bcq,bck->bqk", q, k) / math.sqrt(out)).softmax(dim=2)
            x = x + conv(torch.einsum("bqk,bck->bcq", shares, v).view(x.shape), ".proj_out", out, 1)
        elif kind == "down":  # with a border at the right and bottom alone the windows begin one pixel further on
            x = conv(x, ".conv", out)[:, :, 1::2, 1::2]
        elif kind == "up":
            x = conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), ".conv", out)
        elif kind == "swish":
            x = F.silu(x)
        else:
            x = norm(x, "") if kind == "norm" else conv(x, "", out)
    return x


def random_weights(network):
    """Pieces of one tensor, so that a file stays small."""
    pool = torch.randn(2**22, generator=seeded()) / 20
    pieces = {n: pool[997 * i :][: w.numel()].view(w.shape) for i, (n, w) in enumerate(network.state_dict().items())}
    return {n: piece + 1 if n.endswith("weight") and piece.ndim == 1 else piece for n, piece in pieces.items()}


def test_vqgan_has_the_names_and_shapes_of_its_file():
    with torch.device("meta"):
        take = Take(vqgan.VQGAN().state_dict())
        assert len(take) == 315 and sum(w.numel() for w in take.values()) == 70_775_299
        assert by_its_layers(take, "encoder", torch.empty(1, 3, 64, 64)).shape == (1, 256, 16, 16)
        assert by_its_layers(take, "decoder", torch.empty(1, 256, 16, 16)).shape == (1, 3, 64, 64)
    rest = "codebook.embedding.weight quant_conv.weight quant_conv.bias post_quant_conv.weight post_quant_conv.bias"
    assert take.keys() == set(rest.split())


@pytest.mark.parametrize(
    ("moments", "mean", "std"),
    [
        ("training", torch.tensor([0.4816, 0.4324, 0.3845]), torch.tensor([0.2602, 0.2518, 0.2537])),
        ("filling", torch.tensor([0.4868, 0.4341, 0.3844]), torch.tensor([0.2620, 0.2527, 0.2543])),
    ],
)
def test_tokens_and_pictures_of_a_vqgan(moments, mean, std, monkeypatch):
    """A quarter of the channels, one picture at a time: the nearest rows of the codebook, and what they decode to."""
    monkeypatch.setattr(vqgan, "AT_ONCE", 1)
    network = vqgan.VQGAN(32, moments)
    images = torch.from_numpy(inpaint.cartoon_cats(2, 64)) / 255
    state = random_weights(network)
    take = Take(state)
    latents = by_its_layers(take, "encoder", ((images - mean) / std).permute(0, 3, 1, 2), scale=4)
    latents = F.conv2d(latents, take["quant_conv.weight"], take["quant_conv.bias"]).permute(0, 2, 3, 1)
    near = latents.reshape(512, 64)[torch.randperm(512, generator=seeded())].repeat(2, 1)
    codebook = near + state["codebook.embedding.weight"]
    network.load_state_dict(state | {"codebook.embedding.weight": codebook})
    tokens = network.encode(images.numpy())
    distances = (latents.double()[..., None, :] - codebook).square().sum(dim=-1)  # (2, 16, 16, 1024)
    assert (tokens == distances.argmin(dim=-1).numpy()).all() and len(np.unique(tokens)) > 100
    latents = codebook[tokens].permute(0, 3, 1, 2)
    latents = F.conv2d(latents, take["post_quant_conv.weight"], take["post_quant_conv.bias"])
    expected = (by_its_layers(take, "decoder", latents, scale=4).permute(0, 2, 3, 1) * std + mean).clip(0, 1)
    np.testing.assert_allclose(network.decode(tokens), expected, atol=1e-4)
    assert expected.std() > 0.1


def test_a_vqgan_paints_as_a_painter_that_has_learnt_nothing():
    images, holes = inpaint.with_holes(inpaint.cartoon_cats(2, 16), "brush", seed=0)
    decoded = np.sqrt(images / np.float32(255))
    painted = vqgan.VQGAN.paint(None, decoded, images, holes)
    np.testing.assert_allclose(painted, inpaint.Painter().paint(decoded, images, holes), atol=1e-6)


def transformer_by_its_formulas(take, tokens):
    """Logits (B, 256, 1025) of tokens (B, 256)."""

    def norm(x, name):
        return F.layer_norm(x, (768,), take(f"{name}.weight", 768), take(f"{name}.bias", 768), 1e-12)

    def linear(x, name, out):
        return x @ take(f"{name}.weight", out, x.shape[-1]).T + take(f"{name}.bias", out)

    table = take("tok_emb.weight", 1025, 768)
    x = norm(table[tokens] + take("pos_emb", 256, 768), "LN")
    for at in (f"blocks.{i}." for i in range(15)):
        q, k, v = linear(x, f"{at}Attention.qkv", 2304).view(-1, 256, 3, 16, 48).unbind(2)
        shares = (torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(48)).softmax(dim=3)
        heads = torch.einsum("bhqk,bkhd->bqhd", shares, v).flatten(2)
        x = norm(x + linear(heads, f"{at}Attention.proj", 768), f"{at}LayerNorm1")
        x = norm(x + linear(F.gelu(linear(x, f"{at}MLP.0", 1536)), f"{at}MLP.2", 768), f"{at}LayerNorm2")
    x = norm(F.gelu(linear(x, "Token_Prediction.0", 768)), "Token_Prediction.2")
    return x @ table.T + take("bias", 256, 1025)


@pytest.fixture(scope="module")
def reports():
    """Random weights of both, by the names in the files."""
    with torch.device("meta"):
        networks = [vqgan.VQGAN(), vqgan.ReportTransformer()]
    tokenizer, transformer = map(random_weights, networks)
    return tokenizer, {n.replace("Attention.out", "Attention.proj"): w for n, w in transformer.items()}


def whole_maskgit(tokenizer, transformer, wrapper=""):
    whole = {f"{wrapper}vqgan.{n}": w for n, w in tokenizer.items()}
    return whole | {f"{wrapper}transformer.{n}": w for n, w in transformer.items()}


def with_attention(state, *names):
    """With another student's names of query, key and value, in one or three, and of the output."""
    *inputs, output = names
    found = {}
    for n, w in state.items():
        parts = zip(inputs, w.chunk(len(inputs)), strict=True) if "qkv." in n else [("qkv.", w)]
        found |= {n.replace("qkv.", each).replace("n.proj.", f"n.{output}"): part for each, part in parts}
    return found


STUDENTS = [
    ("to_qkv.", "proj."),
    ("in_proj_", "out_proj."),
    ("Wq.", "Wk.", "Wv.", "out."),
    ("linear_query.", "linear_key.", "linear_val.", "linear."),
    ("qkv_queries.", "qkv_keys.", "qkv_values.", "qkv_out."),
]


@pytest.mark.parametrize("names", STUDENTS)
def test_each_students_names_and_wrappers_are_the_same_weights(names, reports):
    tokenizer, state = reports
    bare = dict(reversed(with_attention(state, *names).items()))
    whole = whole_maskgit(tokenizer, bare, "module._orig_mod.")
    expected = {n.replace("Attention.proj", "Attention.out"): w for n, w in state.items()}
    for content in (bare, {"epoch": 3, "model": whole, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}):
        [weights] = vqgan.weights_beside("tok_emb.weight", content)
        found = vqgan.one_attention(weights)
        assert found.keys() == expected.keys() and all(torch.equal(found[n], w) for n, w in expected.items())


def test_a_transformer_by_its_formulas(reports, tmp_path):
    """Its attention without a bias, as one student's."""
    state = {n: 0 * w if n.endswith("qkv.bias") else w for n, w in reports[1].items()}
    assert len(state) == 189 and sum(w.numel() for w in state.values()) == 72_745_472
    tokens = torch.arange(1024, 0, -4)[None]  # with [MASK]
    take = Take(state)
    logits = transformer_by_its_formulas(take, tokens)[..., :1024]
    assert not take and logits.std() > 0.5
    beside = {"args": argparse.Namespace(lr=0.1), "losses": [np.float64(0.5), np.float32(0.5)], "epoch": np.int64(3)}
    some = {n: w for n, w in state.items() if not n.endswith("qkv.bias")}
    torch.save({"model": some} | beside, tmp_path / "best.pth")
    model = vqgan.load_transformer(tmp_path / "best.pth", "cpu")
    np.testing.assert_allclose(model(tokens).detach(), logits, atol=1e-3)


def test_files_of_anything_else_are_refused(reports, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer, state = reports
    load_vqgan, load_transformer = vqgan.load_vqgan, vqgan.load_transformer
    three = torch.ones(3)
    path = tmp_path / "file.pt"
    for load, content, said in [
        (load_vqgan, Malicious(), "file.pt does not hold the reports' vqgan: it is damaged or asks to run code"),
        (load_vqgan, state, "'codebook.embedding.weight' 0 times; its keys are pos_emb, .* and 185 more"),
        (load_vqgan, {"model": tokenizer, "ema": tokenizer}, "2 times; its keys are model, ema"),
        (load_vqgan, tokenizer | {"quant_conv.bias": three}, "size mismatch for quant_conv.bias"),
        (load_vqgan, tokenizer | {"quant_conv.bias": torch.full((256,), math.nan)}, "no numbers"),
        (load_transformer, with_attention(state, "kqv.", "proj."), "its attention has kqv.bias, kqv.weight, proj"),
        (load_transformer, with_attention(state, "q.", "k.", "v.", "query."), "its attention has k.bias, k.weight"),
        (load_transformer, state | {"blocks.0.Attention.Wq.weight": three}, "its attention has Wq.weight, proj.bias"),
        (load_transformer, state | {"blocks.0.Attention.scale": three}, "its attention has proj.bias, .*, scale"),
    ]:
        torch.save(content, path)
        assert re.search(said, refusal(load, path, "cpu")) and not Path("owned").exists()


@pytest.fixture
def small_vqgan(monkeypatch):
    monkeypatch.setattr(vqgan.VQGAN.__init__, "__defaults__", (32, "training"))
    network = vqgan.VQGAN()
    network.load_state_dict(random_weights(network))
    return network


def test_the_reports_files_fill_a_picture(reports, small_vqgan, tmp_path, monkeypatch):
    whole = tmp_path / "whole.pth"
    torch.save(whole_maskgit(small_vqgan.state_dict(), reports[1]), whole)
    [(image, hole)] = write_pairs(tmp_path, 64)
    monkeypatch.delitem(vqgan.MOMENTS, "training")
    options = [*paths_of(tmp_path), "--decode-steps", 2]
    assert call(vqgan, "--vqgan", whole, "--transformer", whole, *options) == 0
    [filled] = (np.asarray(Image.open(file)) for file in (tmp_path / "out").glob("*.png"))
    assert (filled[~hole] == image[~hole]).all() and (filled[hole] != 128).any()


def test_the_model_sees_a_membrane_in_a_hole(small_vqgan):
    """By its visible tokens, which are others than those of the whole picture."""
    images, holes = inpaint.with_holes(inpaint.cartoon_cats(1, 64), "box", seed=0)
    pixels = torch.from_numpy(images / np.float32(255))
    covered = inpaint.membrane(pixels.permute(0, 3, 1, 2), torch.from_numpy(holes)[:, None]).permute(0, 2, 3, 1)
    true, covered = (torch.from_numpy(small_vqgan.encode(each.numpy())).flatten(1) for each in (pixels, covered))
    inpainter = inpaint.Inpainter(tiny_model(), small_vqgan, small_vqgan, "float32")
    tokens, mask, _ = inpaint.model_input(inpainter, images, holes)
    assert torch.equal(tokens[~mask], covered[~mask]) and (covered != true)[~mask].any()
    [(tokens, _, _, targets, _)] = inpaint.input_batches(inpainter, images, holes)
    assert torch.equal(tokens[~mask], covered[~mask]) and torch.equal(targets, true)


def test_a_run_on_a_vqgans_tokens(small_vqgan, tmp_path, monkeypatch, capsys):
    """Its model.pt does not hold the VQGAN, but belongs to it, by the SHA-256 of the weights. It resumes to scores."""
    monkeypatch.setattr(inpaint, "HOLES", {"brush": inpaint.brush_hole})
    monkeypatch.setattr(inpaint, "save_pictures", lambda *_: None)
    state = small_vqgan.state_dict()
    run, out, file, other = (tmp_path / name for name in ("run", "no", "VQGAN.pt", "other.pt"))
    torch.save(state, file)
    torch.save(state | {"quant_conv.bias": torch.ones(64)}, other)
    small = ["--cartoons", 6, "--seed", 220, "--no-mirror", "--test-images", 8, "--device", "cpu", "--out", run]
    small += ["--dim", 16, "--heads", 2, "--layers", 1, "--batch-size", 4, "--steps", 2]
    with monkeypatch.context() as patch:
        patch.setattr(inpaint, "score", Mock(side_effect=OSError))
        assert call(vqgan, "--vqgan", file, *small) == 2
    assert call(vqgan, "--vqgan", file, *small, "--resume") == 0
    digest = hashlib.sha256(b"".join(w.numpy() for w in state.values()))
    assert saved(run)["tokenizer"] is None and saved(run)["config"]["vqgan_sha256"] == digest.hexdigest()
    [(image, hole)] = write_pairs(tmp_path, 64)
    [filled] = filled_pairs(run, tmp_path, "--vqgan", file, script=vqgan).values()
    assert (filled[~hole] == image[~hole]).all() and (filled[hole] != 128).any()
    files = [*paths_of(tmp_path), "--out", out]
    by_run = [*files, "--checkpoint", run / "model.pt"]
    capsys.readouterr()
    for script, *arguments, said in [
        (inpaint, *by_run, "no checkpoint of inpaint.py"),
        (vqgan, "--vqgan", other, *by_run, "was not trained on the tokens of the VQGAN that --vqgan names"),
        (vqgan, "--vqgan", other, *small, "--resume", "was trained with vqgan_sha256="),
        (vqgan, "--vqgan", file, *by_run, "--evidence", "--evidence needs a centroid in pixels"),
        (vqgan, "--vqgan", file, *by_run, "--transformer", other, "fill by one of them"),
        (vqgan, "--vqgan", file, *files, "name all three"),
        (vqgan, "--vqgan", file, *small, "--out", out, "--size", 32, "unrecognized arguments: --size 32"),
    ]:
        assert call(script, *arguments) == 2, said
        assert re.fullmatch(f"error: .*{said}.*\n", capsys.readouterr().err), said
    assert not out.exists()


def test_help_names_every_flag(capsys):
    assert call(vqgan, "--help") == 0
    shown = capsys.readouterr().out
    flags = "--vqgan --transformer --checkpoint --images --masks --data --preset --device --seed --resume --force --out"
    assert all(flag in shown for flag in flags.split())
