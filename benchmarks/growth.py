"""How time and memory grow with tokens, batch, codes and images: a table and a plot of each.

    python benchmarks/growth.py --json results/growth.json

Every measurement is a process of its own, so that its memory can be told: the peak of the process, less what it held
before the work began. Times are the best of up to 20 repetitions, begun within 20 seconds. Data are random numbers.
"""

import functools
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fid
from maskgit import (
    CommandLine,
    MaskGIT,
    PatchTokenizer,
    decode,
    fast_precision,
    grid_coords,
    kmeans,
    line_plot,
    masked_cross_entropy,
    pick_device,
    precision_context,
    print_table,
    run_as_script,
    training_mask,
    write_figures,
)

DIM, HEADS, LAYERS, BATCH, SIDE, CODES = 192, 6, 6, 1, 16, 1024


def transformer(side=SIDE, batch=BATCH, codes=CODES):
    """The model on random tokens, half of them hidden: (model, tokens, mask, coords)."""
    torch.manual_seed(0)
    device = pick_device()
    model = MaskGIT(codes, DIM, HEADS, LAYERS, dropout=0.0, head="linear", rotary=True).to(device)
    tokens = torch.randint(codes, (batch, side * side), device=device)
    return model, tokens, training_mask(tokens.shape, "0.5").to(device), grid_coords(side, side).to(device)


def training_step(**size):
    model, tokens, mask, coords = transformer(**size)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        with precision_context(tokens.device, fast_precision(tokens.device)):
            logits = model(tokens.masked_fill(mask, model.mask_id), coords).float()
        masked_cross_entropy(logits, tokens, mask).backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(logits[0, 0, 0].detach())  # waits for the device

    return step


def decoding(**size):
    model, tokens, mask, coords = transformer(**size)

    def eight_steps():
        with precision_context(tokens.device, fast_precision(tokens.device)):
            return decode(model.eval(), tokens, mask, coords, steps=8, order="confidence").sum().item()

    return eight_steps


def codebook(points=100_000, codes=CODES):
    patches = np.random.default_rng(0).random((points, 48), dtype=np.float32)
    return functools.partial(kmeans, patches, codes, max_iter=5, tol=0)


def encoding(images=1000, codes=CODES):
    """Photographs of 64x64, made a thousand at a time."""
    rng = np.random.default_rng(0)
    tokenizer = PatchTokenizer(rng.random((codes, 48), dtype=np.float32), 4)
    part = rng.random((1000, 64, 64, 3), dtype=np.float32)

    def encode():
        for _ in range(0, images, 1000):
            tokenizer.encode(part)

    return encode


def distance(images=10_000):
    """FID of two sets whose features come in parts, of 2,048 dimensions."""
    rng = np.random.default_rng(0)

    def statistics():
        parts = (rng.standard_normal((1000, 2048), dtype=np.float32) for _ in range(0, images, 1000))
        return fid.statistics_of(parts, images)

    return lambda: fid.fid_of(statistics(), statistics())


GROWTH = {
    "tokens": {
        "training step": (training_step, "side", (8, 16, 32, 64)),
        "decoding, 8 steps": (decoding, "side", (8, 16, 32, 64)),
    },
    "batch": {
        "training step": (training_step, "batch", (1, 4, 16, 64)),
        "decoding, 8 steps": (decoding, "batch", (1, 4, 16, 64)),
    },
    "codes": {
        "training step": (training_step, "codes", (16, 128, 1024, 4096, 16384)),
        "k-means, 100,000 points, 5 iterations": (codebook, "codes", (16, 128, 1024, 4096, 16384)),
        "encoding 1,000 images": (encoding, "codes", (16, 128, 1024, 4096, 16384)),
    },
    "images": {
        "k-means, a patch of each, 5 iterations": (codebook, "points", (2000, 10_000, 100_000, 1_000_000)),
        "encoding": (encoding, "images", (1000, 10_000, 100_000, 1_000_000)),
        "FID from features": (distance, "images", (1000, 10_000, 100_000, 1_000_000)),
    },
}


def peak_megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(quantity, work, value):
    """Seconds and megabytes of a piece of work, printed for the process that asked."""
    make, argument, _ = GROWTH[quantity][work]
    before, function, taken = peak_megabytes(), make(**{argument: value}), []
    while sum(taken) < 20 and len(taken) < 20:
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    print(min(taken), peak_megabytes() - before)


def main():
    parser = CommandLine(__doc__)
    parser.add_argument("--measure", nargs=3, metavar=("QUANTITY", "WORK", "VALUE"), help="one of them only")
    parser.add_argument("--json", type=Path, default=Path("results/growth.json"), help="file for the figures and plots")
    settings = parser.parse_args()
    if settings.measure:
        quantity, work, value = settings.measure
        return measure(quantity, work, int(value))
    rows = []
    for quantity, works in GROWTH.items():
        curves = {}
        for work, (_, argument, values) in works.items():
            found = []
            for value in values:
                command = [sys.executable, __file__, "--measure", quantity, work, str(value)]
                printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                seconds, megabytes = map(float, printed.split())
                amount = value**2 if argument == "side" else value
                found.append(dict(quantity=quantity, work=work, amount=amount, seconds=seconds, megabytes=megabytes))
                print(f"{quantity} {amount}, {work}: {seconds:.3g} s, {megabytes:.0f} MB", file=sys.stderr)
            rows += found
            curves[work] = ([row["amount"] for row in found], [row["seconds"] for row in found])
        line_plot(
            curves,
            title=f"Seconds by {quantity}",
            x_label="images in a batch" if quantity == "batch" else f"number of {quantity}",
            y_label="seconds",
            log_x=True,
            log_y=True,
        ).save(settings.json.with_name(f"{settings.json.stem}_{quantity}.png"))
    write_figures(settings, {"rows": rows}, settings.json)
    table = [[*map(str, list(row.values())[:3]), f"{row['seconds']:.3g}", f"{row['megabytes']:.0f}"] for row in rows]
    print_table(["grows", "work", "number", "seconds", "MB"], table)


if __name__ == "__main__":
    run_as_script(main)
