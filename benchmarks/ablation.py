"""Why S1's squares did not converge: its recipe, one repair at a time, all of them, and all but one; three seeds each.

    python benchmarks/ablation.py --json results/squares_ablation.json
    python benchmarks/ablation.py --draw results/squares_ablation.json      paints squares_ablation.png again

S1's block, head and positions at a width that a CPU manages.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import maskgit
import train_squares
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


def paint(figures, path):
    """A bar for each variant, from the posterior's cross-entropy on: what could be learned and was not."""
    from matplotlib.figure import Figure  # nothing else needs it

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    limit = figures["references"]["exact posterior"]
    for name in reversed(variants()):
        found = [run["cross_entropy"] - limit for run in figures["runs"] if run["variant"] == name]
        bars = axes.barh(name, np.mean(found), left=limit, color="C0" if name.startswith("S1") else "C2")
        axes.bar_label(bars, [f"{limit + np.mean(found):.3f}"], padding=4)
    for i, (name, level) in enumerate(figures["references"].items()):
        axes.axvline(level, color="black", linestyle=":-"[i], label=f"{name}, {level:.3f}")
    axes.set(title="S1's recipe, repaired one by one", xlim=(limit - 0.005, 0.45))
    axes.set_xlabel("cross-entropy on unseen masks, nats per hidden pixel (mean of three seeds)")
    axes.legend(loc="lower right")
    figure.savefig(path)


def train_variants(recipe, prior, device):
    """The figures of each variant and seed."""
    rows = []
    for name, repair in variants().items():
        for seed in range(3):
            model, history = train_squares.train_model(replace(recipe, **repair, seed=seed), prior, device)
            result = train_squares.score(model, prior, "cosine", TEST_COUNT, TEST_SEED)
            rows.append({"variant": name, "seed": seed, **result, "curve": [row["cross_entropy"] for row in history]})
            print(f"{name}, seed {seed}: {result['cross_entropy']:.4f}", flush=True)
    references = {"cosine head's best": cosine_head_limit(prior, "cosine", TEST_COUNT)}
    references["exact posterior"] = rows[0]["limit"]
    return {"logged_steps": [row["step"] for row in history], "references": references, "runs": rows}


def main():
    record = maskgit.run_record()
    parser = maskgit.CommandLine(__doc__)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="only paint a picture from this file, beside it")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=maskgit.at_least(1), default=500, help="of each training")
    arguments = parser.parse_args()
    if arguments.draw:
        paint(json.loads(arguments.draw.read_text()), arguments.draw.with_suffix(".png"))
        return
    recipe = train_squares.Squares(steps=arguments.steps, **ALIKE | S1_RECIPE)
    prior = train_squares.all_squares(recipe.grid, recipe.min_side, recipe.max_side)
    figures = train_variants(recipe, prior, maskgit.pick_device(arguments.device))
    maskgit.write_figures(record, vars(arguments), figures, arguments.json)
    table = []
    for name in variants():
        found = [run["cross_entropy"] for run in figures["runs"] if run["variant"] == name]
        table.append([name, *(f"{value:.4f}" for value in (np.mean(found), min(found), max(found)))])
    maskgit.print_table(["variant", "cross-entropy", "lowest", "highest"], table)


if __name__ == "__main__":
    maskgit.run_as_script(main)
