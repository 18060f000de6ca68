"""maskgit.py beside a plain implementation of what R1 and R2 describe, at their size: 256 tokens, 768 wide, 15 blocks.

    python benchmarks/speed.py --json results/speed.json

The plain one has separate q, k and v, an explicit softmax, float32, no dropout, and a logit for [MASK] too, and is
scored on every position. They take turns, each in float32 and where it is fast in bf16: medians of three steps after
one untimed, and of the rounds. Besides: images filled one at a time, as the reports do, and 64 at once.
"""

import functools
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from maskgit import (
    CommandLine,
    MaskGIT,
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

# R1 and R2's sizes.
SIDE = 16
CODES = 1024
LAYERS = 15
HEADS = 16
DIM = 768
HIDDEN = 1536


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
        self.norm1 = nn.LayerNorm(DIM)
        self.norm2 = nn.LayerNorm(DIM)
        self.attention = PlainAttention()
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
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, CODES + 1)

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


def median_seconds(function, calls, device):
    """Of so many calls, after one that is not counted."""
    taken = []
    for _ in range(calls + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def matrix_rate(device, kind):
    """Multiplications and additions per second in a product of 2,048 x 2,048 matrices."""
    a, b = torch.randn(2, 2048, 2048, device=device, dtype=kind)
    return 2 * 2048**3 / median_seconds(lambda: a @ b, 9, device)


ARCHITECTURE = dict(codes=CODES, dim=DIM, heads=HEADS, layers=LAYERS, hidden=HIDDEN, rotary=False)
VARIANTS = {  # implementation and precision
    "plain, float32": (Plain, "float32"),
    "plain, bf16": (Plain, "bf16"),
    "maskgit.py, float32": (functools.partial(MaskGIT, **ARCHITECTURE), "float32"),
    "maskgit.py, bf16": (functools.partial(MaskGIT, **ARCHITECTURE), "bf16"),
}


def random_batch(size, device):
    tokens = torch.randint(CODES, (size, SIDE * SIDE), generator=torch.Generator().manual_seed(0))
    mask = training_mask(tokens.shape, "cosine", torch.Generator().manual_seed(0))
    return tokens.to(device), mask.to(device), grid_coords(SIDE, SIDE).to(device)


def measure(variant, batch_size, device):
    """{"train_step": seconds, "forward_pass": seconds}."""
    implementation, precision = VARIANTS[variant]
    model = implementation().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    arguments = model, optimizer, *random_batch(batch_size, device), precision
    works = {work.__name__: functools.partial(work, *arguments) for work in (train_step, forward_pass)}
    return {name: median_seconds(work, 3, device) for name, work in works.items()}


def measure_variants(batch_size, rounds, device):
    """Medians: {"train_step": {variant: seconds}, "forward_pass": {variant: seconds}}."""
    names = [name for name, (_, precision) in VARIANTS.items() if precision in ("float32", fast_precision(device))]
    rows = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            rows[name].append(measure(name, batch_size, device))
    medians = {}
    for work in ("train_step", "forward_pass"):
        medians[work] = {name: statistics.median(row[work] for row in rows[name]) for name in names}
    return medians


def images_per_second(model, tokens, coords, at_once, count):
    """Decoded in 8 steps, `at_once` in each batch."""
    device = tokens.device
    many = tokens[:1].expand(count, -1)
    hidden = training_mask(many.shape, "0.4", torch.Generator().manual_seed(0)).to(device)

    def decode_all():
        with precision_context(device, fast_precision(device)):
            for rows in torch.arange(count, device=device).split(at_once):
                decode(model, many[rows], hidden[rows], coords, steps=8, order="confidence")

    return count / median_seconds(decode_all, 1, device)


def main():
    record = run_record()
    parser = CommandLine(__doc__)
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument("--batch-size", type=at_least(1), default=10, help="R1 and R2's: 10")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    torch.manual_seed(0)
    tokens, _, coords = random_batch(arguments.batch_size, device)
    ours = MaskGIT(**ARCHITECTURE).to(device).eval()
    rates = {"float32": matrix_rate(device, torch.float32), "bf16": matrix_rate(device, torch.bfloat16)}
    figures = {"matrix_rate": rates} | measure_variants(arguments.batch_size, arguments.rounds, device)
    # A multiplication and an addition for each weight and token, and twice that again for the gradients.
    weights = sum(p.numel() for p in ours.parameters() if p.ndim == 2) - ours.embedding.weight.numel()
    attention = LAYERS * 2 * SIDE * SIDE * DIM  # of each token
    work = 6 * (weights + attention) * tokens.numel()
    figures["share_of_matrix_rate"] = {}
    for name, seconds in figures["train_step"].items():
        figures["share_of_matrix_rate"][name] = work / seconds / rates[VARIANTS[name][1]]
    decoded = {f"{n} at a time": images_per_second(ours, tokens, coords, n, count) for n, count in ((1, 4), (64, 64))}
    figures["images decoded per second, 8 steps"] = decoded
    write_figures(record, vars(arguments), figures, arguments.json)
    for name, row in figures.items():
        print_table([name, ""], [[label, f"{value:.4g}"] for label, value in row.items()])


if __name__ == "__main__":
    run_as_script(main)
