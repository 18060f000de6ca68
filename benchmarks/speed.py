"""maskgit.py beside a plain implementation of what R1 and R2 describe, at their size: 256 tokens, 768 wide, 15 blocks.

    python benchmarks/speed.py --json results/speed.json

The plain one has separate q, k and v, an explicit softmax, float32, dropout nowhere and a logit for [MASK] too, and is
scored on every position. All variants of a table take turns in one process; medians are shown.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from maskgit import (
    CommandLine,
    MaskGIT,
    PatchTokenizer,
    at_least,
    decode,
    fast_precision,
    grid_coords,
    masked_cross_entropy,
    pick_device,
    precision_context,
    print_table,
    run_as_script,
    run_record,
    training_mask,
    write_figures,
)

HERE = Path(__file__).resolve().parents[1]
SIDE, CODES, LAYERS, HEADS, DIM, HIDDEN = 16, 1024, 15, 16, 768, 1536  # R1 and R2's


class PlainAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, HEADS, DIM // HEADS).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(-2, -1) / (DIM // HEADS) ** 0.5, dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, t, DIM))


class PlainBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(DIM), nn.LayerNorm(DIM), PlainAttention()
        self.mlp = nn.Sequential(nn.Linear(DIM, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIM))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(CODES + 1, DIM)
        self.positions = nn.Parameter(torch.randn(SIDE * SIDE, DIM) * 0.02)
        self.blocks = nn.Sequential(*(PlainBlock() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, CODES + 1)

    def forward(self, tokens, coords):
        return self.head(self.norm(self.blocks(self.embedding(tokens) + self.positions)))


def train_step(model, optimizer, tokens, mask, coords, precision):
    inputs = tokens.masked_fill(mask, CODES)
    with precision_context(tokens.device, precision):
        logits = model(inputs, coords)
    if isinstance(model, Plain):
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    else:
        loss = masked_cross_entropy(logits.float(), tokens, mask)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def forward_pass(model, optimizer, tokens, mask, coords, precision):
    with precision_context(tokens.device, precision):
        model(tokens.masked_fill(mask, CODES), coords)


def seconds_of(function, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def by_turns(functions, rounds, device):
    """Median seconds of each function, which take turns; a first round is not counted."""
    taken = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            taken[name].append(seconds_of(function, device))
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


def main():
    parser = CommandLine(__doc__)
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--batch-size", type=at_least(1), default=10, help="R1 and R2's: 10")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    settings = parser.parse_args()
    settings.record, device = run_record(), pick_device(settings.device)
    torch.manual_seed(0)
    coords = grid_coords(SIDE, SIDE).to(device)
    tokens = torch.randint(CODES, (settings.batch_size, SIDE * SIDE), device=device)
    mask = training_mask(tokens.shape, "cosine").to(device)
    ours = MaskGIT(CODES, DIM, HEADS, LAYERS, HIDDEN, dropout=0.0, head="linear").to(device)
    models = {"plain, float32": (Plain().to(device), "float32"), "maskgit.py, float32": (ours, "float32")}
    if fast_precision(device) == "bf16":
        models["maskgit.py, bf16"] = (ours, "bf16")
    optimizers = {model: torch.optim.Adam(model.parameters(), lr=1e-4, fused=True) for model, _ in models.values()}
    figures = {}
    for work in (train_step, forward_pass):
        figures[work.__name__] = by_turns(
            {
                name: lambda model=model, precision=precision, work=work: work(
                    model, optimizers[model], tokens, mask, coords, precision
                )
                for name, (model, precision) in models.items()
            },
            settings.rounds,
            device,
        )
    many = tokens[:1].expand(64, -1)
    hidden = training_mask(many.shape, "0.4").to(device)
    options = {"steps": 8, "order": "confidence"}

    def decode_all(at_once):
        with precision_context(device, fast_precision(device)):
            for start in range(0, 64, at_once):
                decode(ours, many[start : start + at_once], hidden[start : start + at_once], coords, **options)

    figures["decode_64"] = by_turns({f"{n} at a time": lambda n=n: decode_all(n) for n in (1, 64)}, 1, device)
    images = np.random.default_rng(0).random((1000, 64, 64, 3), dtype=np.float32)
    tokenizer = PatchTokenizer.fit(images[:100], CODES, 4)
    seconds = by_turns({"encode": lambda: tokenizer.encode(images)}, settings.rounds, device)["encode"]
    figures["encode"] = {"seconds": seconds, "megabytes_per_second": images.size / 1e6 / seconds}
    scripts = ("train_squares", "train_rectangles", "inpaint", "fid")
    shown = {
        s: lambda s=s: subprocess.run([sys.executable, HERE / f"{s}.py", "--help"], capture_output=True)
        for s in scripts
    }
    figures["help"] = by_turns(shown, settings.rounds, device)
    write_figures(settings, figures, settings.json)
    for name, row in figures.items():
        first = next(iter(row.values()))
        print_table(
            [name, "", "first / this"], [[n, f"{value:.4g}", f"{first / value:.2f}"] for n, value in row.items()]
        )


if __name__ == "__main__":
    run_as_script(main)
