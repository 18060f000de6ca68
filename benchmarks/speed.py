"""maskgit.py beside a plain implementation of what R1 and R2 describe, at their size: 256 tokens, 768 wide, 15 blocks.

    python benchmarks/speed.py --json results/speed.json

The plain one has separate q, k and v, an explicit softmax, float32, no dropout, and a logit for [MASK] too, and is
scored on every position. The variants take turns, each in a process of its own, since whether freed memory is kept
(keep_freed_memory) holds for a whole process: medians of three steps after one untimed, and of those. Besides:
images filled one at a time, as the reports do, and 64 at once; patches encoded; how long the scripts' --help takes.

--waiting only measures a training step of the squares' size, by how the threads wait for each other.

On a CPU also how time and memory grow with tokens, batch, codes and images, of a model of 192 dimensions and 6 blocks
and of random data: each figure from a process of its own, the best time of up to ten, and the peak of the process less
what it held before.
"""

import functools
import os
import re
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
import fid
from maskgit import (
    CommandLine,
    MaskGIT,
    PatchTokenizer,
    Recipe,
    at_least,
    decode,
    fast_precision,
    grid_coords,
    keep_freed_memory,
    kmeans,
    masked_cross_entropy,
    pick_device,
    precision_context,
    print_table,
    run_as_script,
    run_record,
    train,
    training_mask,
    write_figures,
)

ROOT = Path(__file__).resolve().parents[1]
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


def matrix_rate(device):
    """Multiplications and additions per second in a product of 2,048 x 2,048 matrices, by precision."""
    rates = {}
    for name, kind in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.randn(2, 2048, 2048, device=device, dtype=kind)
        rates[name] = 2 * 2048**3 / by_turns({name: lambda a=a, b=b: a @ b}, 9, device)[name]
    return rates


VARIANTS = {  # implementation, precision, whether freed memory is kept
    "plain, float32": (Plain, "float32", False),
    "plain, float32, memory kept": (Plain, "float32", True),
    "plain, bf16": (Plain, "bf16", False),
    "maskgit.py, float32": (MaskGIT, "float32", True),
    "maskgit.py, bf16": (MaskGIT, "bf16", True),
}
ARCHITECTURE = dict(codes=CODES, dim=DIM, heads=HEADS, layers=LAYERS, hidden=HIDDEN, rotary=False)


def random_batch(size, device, side=SIDE):
    tokens = torch.randint(CODES, (size, side * side), generator=torch.Generator().manual_seed(0))
    mask = training_mask(tokens.shape, "cosine", torch.Generator().manual_seed(0))
    return tokens.to(device), mask.to(device), grid_coords(side, side).to(device)


def in_a_process(function, *arguments, **environment):
    """The numbers that a function of this file prints, with some more variables of the environment."""
    command = [sys.executable, "-c", f"import sys, speed; speed.{function}(*sys.argv[1:])", *map(str, arguments)]
    options = dict(cwd=ROOT / "benchmarks", env=os.environ | environment, text=True, check=True)
    run = subprocess.run(command, stdout=subprocess.PIPE, **options)
    return [float(number) for number in run.stdout.split()]


def measure(variant, batch_size, device):
    """Seconds of a training step and of a forward pass, printed for the process that asked."""
    implementation, precision, keeps_memory = VARIANTS[variant]
    if keeps_memory:
        keep_freed_memory()
    device = torch.device(device)
    model = (Plain() if implementation is Plain else MaskGIT(**ARCHITECTURE)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    arguments = model, optimizer, *random_batch(int(batch_size), device), precision
    for work in (train_step, forward_pass):
        print(by_turns({work: functools.partial(work, *arguments)}, 3, device)[work])


def measure_variants(batch_size, rounds, device):
    """Medians: {"train_step": {variant: seconds}, "forward_pass": {variant: seconds}}."""
    names = [name for name, (_, precision, _) in VARIANTS.items() if precision in ("float32", fast_precision(device))]
    taken = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            taken[name].append(in_a_process("measure", name, batch_size, device))
    medians = {
        name: [statistics.median(seconds) for seconds in zip(*rows, strict=True)] for name, rows in taken.items()
    }
    return {work: {name: medians[name][i] for name in names} for i, work in enumerate(("train_step", "forward_pass"))}


def measure_small_step():
    """Milliseconds of a training step of the squares' size, printed for the process that asked."""
    tokens, mask, coords = random_batch(126, torch.device("cpu"), side=8)
    rows = train(MaskGIT(2, 64, 4, 8, 64), lambda step: (tokens % 2, mask, coords), Recipe(steps=20, log_rows=2))
    print((rows[1]["seconds"] - rows[0]["seconds"]) / 10 * 1000)


# maskgit.py, imported above, has set the variable for the processes started here.
WAITING = {"as torch has it": {"GOMP_SPINCOUNT": "300000"}, "OMP_WAIT_POLICY=passive": {"GOMP_SPINCOUNT": "0"}}
WAITING["as maskgit.py has it"] = {}


def measure_waiting(beside, rounds):
    """Median milliseconds of that step beside some busy processes, by how threads wait."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(beside)]
    taken = {name: [] for name in WAITING}
    try:
        for _ in range(rounds):
            for name, environment in WAITING.items():
                taken[name] += in_a_process("measure_small_step", **environment)
    finally:
        for other in others:
            other.kill()
    return {name: statistics.median(milliseconds) for name, milliseconds in taken.items()}


STARTS = {f"{script} --help": [f"{script}.py", "--help"] for script in ("train_squares", "train_rectangles")}
STARTS |= {f"{script} --help": [f"{script}.py", "--help"] for script in ("inpaint", "fid")}
STARTS["import torch alone"] = ["-c", "import torch"]


def start_up(arguments):
    subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, check=True)


def growing_step(side=SIDE, batch=1):
    device = torch.device("cpu")
    model = MaskGIT(CODES, 192, 6, 6)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    return functools.partial(train_step, model, optimizer, *random_batch(batch, device, side), fast_precision(device))


def growing_codebook(codes):
    return functools.partial(kmeans, np.random.default_rng(0).random((100_000, 48)), codes, max_iter=5, tol=0)


def growing_pictures(images=1000, codes=CODES):
    """Pictures of 64x64, a thousand at a time."""
    rng = np.random.default_rng(0)
    tokenizer = PatchTokenizer(rng.random((codes, 48)), 4)
    part = rng.random((1000, 64, 64, 3), dtype=np.float32)
    return lambda: [tokenizer.encode(part) for _ in range(0, images, 1000)]


def growing_distance(images):
    """FID of two sets, from 2,048 features of each image."""
    rng = np.random.default_rng(0)

    def statistics_of_a_set():
        parts = (rng.standard_normal((1000, 2048), dtype=np.float32) for _ in range(0, images, 1000))
        return fid.statistics_of(parts, images)

    return lambda: fid.fid_of(statistics_of_a_set(), statistics_of_a_set())


GROWTH = {  # what grows and the work: a function that prepares it, its argument, and values of that
    "tokens (side of the grid): training step": (growing_step, "side", (8, 16, 32, 64)),
    "batch: training step": (growing_step, "batch", (1, 4, 16, 64)),
    "codes: k-means of 100,000 patches": (growing_codebook, "codes", (128, 1024, 4096)),
    "codes: encoding 1,000 images": (growing_pictures, "codes", (128, 1024, 4096)),
    "images: encoding": (growing_pictures, "images", (1000, 10_000, 100_000)),
    "images: FID from features": (growing_distance, "images", (1000, 10_000, 100_000)),
}


def peak_megabytes():
    """Of this process, by Linux: getrusage would begin with the peak of the process that started it."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def measure_growth(name, value):
    """Seconds, and MB at the peak, printed for the process that asked."""
    prepare, argument, _ = GROWTH[name]
    work = prepare(**{argument: int(value)})
    before = peak_megabytes()
    taken = [seconds_of(work, torch.device("cpu"))]
    while sum(taken) < 5 and len(taken) < 10:
        taken.append(seconds_of(work, torch.device("cpu")))
    print(min(taken), peak_megabytes() - before)


def main():
    record = run_record()
    parser = CommandLine(__doc__)
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument("--batch-size", type=at_least(1), default=10, help="R1 and R2's: 10")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--waiting", action="store_true", help="only how threads wait")
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    arguments = parser.parse_args()
    if arguments.waiting:
        if parser.given() & {"batch_size", "device"}:
            parser.error("--waiting measures a batch of its own on the CPU: leave out --batch-size and --device")
        beside = {"alone": 0, "beside two busy processes": 2}
        figures = {f"ms of a small step, {name}": measure_waiting(n, arguments.rounds) for name, n in beside.items()}
        return report(record, arguments, figures)
    device = pick_device(arguments.device)
    torch.manual_seed(0)
    tokens, _, coords = random_batch(arguments.batch_size, device)
    ours = MaskGIT(**ARCHITECTURE).to(device).eval()
    figures = {"matrix_rate": matrix_rate(device)} | measure_variants(arguments.batch_size, arguments.rounds, device)
    # A multiplication and an addition for each weight and token, and twice that again for the gradients.
    weights = sum(p.numel() for p in ours.parameters() if p.ndim == 2) - ours.embedding.weight.numel()
    attention = LAYERS * 2 * SIDE * SIDE * DIM  # of each token
    work = 6 * (weights + attention) * tokens.numel()
    figures["share_of_matrix_rate"] = {
        name: work / seconds / figures["matrix_rate"][VARIANTS[name][1]]
        for name, seconds in figures["train_step"].items()
    }

    def decode_some(count, at_once):
        many = tokens[:1].expand(count, -1)
        hidden = training_mask(many.shape, "0.4", torch.Generator().manual_seed(0)).to(device)
        with precision_context(device, fast_precision(device)):
            for rows in torch.arange(count, device=device).split(at_once):
                decode(ours, many[rows], hidden[rows], coords, steps=8, order="confidence")

    turns = {n: functools.partial(decode_some, count, n) for count, n in ((4, 1), (64, 64))}
    seconds = by_turns(turns, 1, device)
    figures["images decoded per second, 8 steps"] = {"1 at a time": 4 / seconds[1], "64 at a time": 64 / seconds[64]}
    images = np.random.default_rng(0).random((1000, 64, 64, 3), dtype=np.float32)
    tokenizer = PatchTokenizer.fit(images[:100], CODES, 4, max_iter=3)
    seconds = by_turns({"encode": lambda: tokenizer.encode(images)}, arguments.rounds, device)["encode"]
    figures["encode"] = {"seconds": seconds, "megabytes_per_second": images.size / 1e6 / seconds}
    if device.type == "cpu":
        starts = {name: functools.partial(start_up, command) for name, command in STARTS.items()}
        figures["help"] = by_turns(starts, arguments.rounds, device)
        for name, (_, _, values) in GROWTH.items():
            figures[name] = {}
            for value in values:
                seconds, megabytes = in_a_process("measure_growth", name, value)
                figures[name] |= {f"{value}: seconds": seconds, f"{value}: MB": megabytes}
    report(record, arguments, figures)


def report(record, arguments, figures):
    write_figures(record, vars(arguments), figures, arguments.json)
    for name, row in figures.items():
        print_table([name, ""], [[label, f"{value:.4g}"] for label, value in row.items()])


if __name__ == "__main__":
    run_as_script(main)
