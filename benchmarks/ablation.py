"""Why S1's squares did not converge: its recipe, one repair at a time, all of them, and all but one; three seeds each.

    python benchmarks/ablation.py --json results/squares_ablation.json

S1's block, head and positions at a width that a CPU manages. A plot is written beside the figures.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import maskgit
import train_squares
from benchmarks.pictures import save_curves
from train_squares import TEST_COUNT, TEST_SEED

# The size and budget of all variants. An epoch of S1, each image once, is one update.
ALIKE = train_squares.REPORTED | dict(dim=64, hidden=256, layers=4, heads=4, lr=1e-3, batch_size=126, mask="cosine")
S1_RECIPE = {"norm": "post", "warmup": 0, "head": "cosine", "learn_temperature": False, "positions": "printed"}
REPAIRS = {
    "temperature": {"learn_temperature": True},
    "linear head": {"head": "linear"},
    "positions": {"positions": "split"},
    "pre-norm, warm-up": {"norm": "pre", "warmup": 100},
}


def variants():
    """{name: settings}: S1's recipe, each repair alone, all of them but the linear head, which has no temperature to
    learn, and all but one more."""
    together = [name for name in REPAIRS if name != "linear head"]
    every = dict(setting for name in together for setting in REPAIRS[name].items())
    found = {"S1": {}} | {f"S1 + {name}": repair for name, repair in REPAIRS.items()} | {"all repairs": every}
    for name in together:
        found[f"all but {name}"] = {key: value for key, value in every.items() if key not in REPAIRS[name]}
    return found


def cosine_head_limit(prior, kind, count):
    """The lowest expected cross-entropy that two cosine similarities allow. They differ by at most 2, so the best
    is the posterior kept within sigmoid(-2) .. sigmoid(2)."""
    white = train_squares.test_set(prior, kind, count, TEST_SEED)[2]
    least = torch.sigmoid(torch.tensor(-2.0))
    return torch.nn.functional.binary_cross_entropy(white.clamp(least, 1 - least), white).item()


def main():
    record = maskgit.run_record()
    parser = maskgit.CommandLine(__doc__)
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=maskgit.at_least(1), default=500, help="of each training")
    arguments = parser.parse_args()
    device = maskgit.pick_device(arguments.device)
    recipe = train_squares.Squares(steps=arguments.steps, **ALIKE | S1_RECIPE)
    prior = train_squares.all_squares(recipe.grid, recipe.min_side, recipe.max_side)
    rows = []
    curves = {}
    table = []
    for name, repair in variants().items():
        runs = []
        for seed in range(3):
            model, history = train_squares.train_model(replace(recipe, **repair, seed=seed), prior, device)
            result = train_squares.score(model, prior, "cosine", TEST_COUNT, TEST_SEED)
            curve = [row["cross_entropy"] for row in history]
            runs.append({"variant": name, "seed": seed, **result, "curve": curve})
            print(f"{name}, seed {seed}: {result['cross_entropy']:.4f}", flush=True)
        rows += runs
        steps = [row["step"] for row in history]
        found = [run["cross_entropy"] for run in runs]
        curves[name] = (steps, np.mean([run["curve"] for run in runs], axis=0))
        table.append([name, *(f"{value:.4f}" for value in (np.mean(found), min(found), max(found)))])
    limit = cosine_head_limit(prior, "cosine", TEST_COUNT)
    references = {"cosine head's best": limit, "exact posterior": rows[0]["limit"]}
    figures = {"logged_steps": steps, "references": references, "runs": rows}
    maskgit.write_figures(record, vars(arguments), figures, arguments.json)
    plots = {"S1's recipe and its repairs, mean of three seeds": curves}
    labels = {"x_label": "updates", "y_label": "cross-entropy on unseen masks, nats per hidden pixel"}
    save_curves(arguments.json.with_suffix(".png"), plots, **labels, references=references, log_y=True)
    maskgit.print_table(["variant", "cross-entropy", "lowest", "highest"], table)


if __name__ == "__main__":
    maskgit.run_as_script(main)
