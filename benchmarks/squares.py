"""The project's speed record: how long the squares take to come within 0.01 and 0.005 nats of the exact posterior.

    python benchmarks/squares.py --json results/squares_speed.json

For each target the whole training is as short as it may be: its learning rate falls to 0 in just so many steps. KL is
that of the default run's score, cosine masking, on masks that no training sees. Seeds and variants take turns.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_squares
from maskgit import (
    CommandLine,
    at_least,
    fast_precision,
    pick_device,
    print_table,
    run_as_script,
    write_figures,
)

VARIANTS = [  # name, target, options of train_squares.py
    ("as it is", 0.01, ["--steps", "400"]),
    ("as it is", 0.005, ["--steps", "720"]),
    ("before rotary attention", 0.01, ["--steps", "600", "--no-rotary"]),
]


def race(options, seed, device):
    """Seconds of training and the KL that it ends at."""
    random_masks = ["--mask", "cosine", "--on-policy", "0"]
    sys.argv = ["train_squares.py", *options, *random_masks, "--seed", str(seed)]
    settings = train_squares.parse_arguments()
    settings.precision = fast_precision(device)
    prior = train_squares.all_squares(settings.grid, settings.min_side, settings.max_side)
    model, history = train_squares.train_model(settings, prior, device)
    result = train_squares.score(model, prior, settings.mask, train_squares.TEST_COUNT, train_squares.TEST_SEED)
    return history[-1]["seconds"], result["kl"]


def main():
    parser = CommandLine(__doc__)
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    settings = parser.parse_args()
    device, rows = pick_device(settings.device), []
    for seed in range(settings.seeds):
        for name, target, options in VARIANTS:
            seconds, kl = race(options, seed, device)
            steps = int(options[1])
            rows.append(dict(variant=name, target=target, steps=steps, seed=seed, seconds=seconds, kl=kl))
    write_figures(settings, {"rows": rows}, settings.json)
    table = [[*map(str, list(row.values())[:4]), f"{row['seconds']:.1f}", f"{row['kl']:.4f}"] for row in rows]
    print_table(["variant", "target", "steps", "seed", "seconds", "KL"], table)


if __name__ == "__main__":
    run_as_script(main)
