"""What S2 proposed against its failure on unseen rectangles and did not try: four remedies, three seeds each.

    python benchmarks/remedies.py --json results/rectangles_remedies.json

Each remedy on the sparse task, with 100 rectangles and with fresh ones at every step.
"""

import functools
import itertools
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import maskgit
import train_rectangles
from maskgit import CommandLine, at_least, pick_device, print_table, run_as_script, run_record, write_figures
from train_rectangles import PATCH, SIZE, VALIDATION_SEED, coverage, draw_points

RECIPE = dict(task="sparse", batch_size=256, lr=6e-3, mask="0.35")  # that of train_rectangles.py, but for the steps
SOURCES = {"100 rectangles": 100, "fresh ones": 0}
REMEDIES = ("as it is", "soft targets", "points near edges", "no corners")
WIDTH = 0.5  # of the soft targets


def draw_again(wrong, rectangles, points, rng):
    """The points (B, T, 2), those that are wrong (rectangles, points) -> (B, T) drawn again, in place."""
    for _ in range(100):  # a rectangle as large as the image may leave no patch that would do
        found = wrong(rectangles, points)
        if not found.any():
            break
        points[found] = rng.random((found.sum(), 2)) * (SIZE - PATCH)
    return points


def off_edges(rectangles, points):
    """Every other patch, where it crosses no edge of its rectangle."""
    covered = coverage(rectangles, points).mean(axis=-1)
    return ((covered == 0) | (covered == 1)) & (np.arange(points.shape[1]) % 2 == 0)


def on_corners(rectangles, points):
    """The patches that contain a corner."""
    edges = rectangles.reshape(-1, 1, 2, 2)  # (B, 1, lower or upper edge, axis)
    inside = (points[:, :, None] < edges) & (edges < points[:, :, None] + PATCH)
    return inside.any(axis=2).all(axis=2)  # an edge on both axes


def points_without(wrong):
    """draw_points of train_rectangles.py, without those that are wrong."""

    def draw(task, rectangles, count, rng):
        return draw_again(wrong, rectangles, draw_points(task, rectangles, count, rng), rng)

    return draw


def soft_targets(tokenizer, width):
    """What to predict in place of each code: all, weighted by exp(-(distance of the centroids / width)^2). (K, K)"""
    centroids = torch.from_numpy(tokenizer.centroids)
    return (-(torch.cdist(centroids, centroids) / width).square()).softmax(dim=-1)


def soft_cross_entropy(targets):
    """masked_cross_entropy towards the distributions (K, K) of the codes."""

    def loss(logits, tokens, mask, *, count):
        soft = targets.to(logits.device)[tokens]  # (B, T, K)
        return (F.cross_entropy(logits.transpose(1, 2), soft.transpose(1, 2), reduction="none") * mask).sum() / count

    return loss


def train_with(remedy, recipe, tokenizer, device):
    """train_rectangles.train_model with one of the REMEDIES."""
    count = train_rectangles.VALIDATION_COUNT["sparse"]
    rectangles = train_rectangles.draw_rectangles(count, VALIDATION_SEED, "sparse")
    unseen = train_rectangles.make_test("sparse", rectangles, tokenizer, proposals=1, seed=VALIDATION_SEED)
    draw = {"points near edges": points_without(off_edges), "no corners": points_without(on_corners)}
    draw = draw.get(remedy, draw_points)
    loss = maskgit.masked_cross_entropy
    if remedy == "soft targets":
        loss = soft_cross_entropy(soft_targets(tokenizer, WIDTH))
    with patch.object(maskgit, "masked_cross_entropy", loss), patch.object(train_rectangles, "draw_points", draw):
        return train_rectangles.train_model(recipe, tokenizer, unseen, device)


def main():
    record = run_record()
    parser = CommandLine(__doc__)
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=at_least(1), default=400, help="of each training, default %(default)s")
    parser.add_argument("--test-images", type=at_least(8), default=1000, help="default %(default)s")
    parser.add_argument("--proposals", type=at_least(1), default=8000, help="for each posterior; default %(default)s")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    recipe = train_rectangles.Rectangles(**RECIPE, steps=arguments.steps).for_device(device)
    unseen = train_rectangles.draw_rectangles(arguments.test_images, train_rectangles.TEST_SEED, "sparse")
    rows = []
    for seed in range(3):
        tokenizer = train_rectangles.fit_tokenizer(seed)
        make = functools.partial(
            train_rectangles.make_test, "sparse", tokenizer=tokenizer, proposals=arguments.proposals
        )
        tests = {"unseen": make(unseen), "seen": make(train_rectangles.draw_rectangles(100, seed, "grid"))}
        for (source, count), remedy in itertools.product(SOURCES.items(), REMEDIES):
            varied = replace(recipe, seed=seed, rectangles=count)
            model, history = train_with(remedy, varied, tokenizer, device)
            row = {"variant": f"{source}, {remedy}", "seed": seed, "curve": [row["unseen"] for row in history]}
            rows.append(row | {name: train_rectangles.score(model, test) for name, test in tests.items()})
            print(f"{row['variant']}, seed {seed}: accuracy {rows[-1]['unseen']['accuracy']:.4f}", flush=True)

    steps = [row["step"] for row in history]
    table = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        runs = [row for row in rows if row["variant"] == variant]
        table.append([variant])
        for name, figure in (("unseen", "cross_entropy"), ("unseen", "accuracy"), ("seen", "accuracy")):
            values = [row[name][figure] for row in runs]
            table[-1].append(f"{np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})")
    limit = {name: float(np.mean([row["unseen"][name] for row in rows])) for name in ("limit", "posterior_accuracy")}
    table.append(["posterior", f"{limit['limit']:.4f}", f"{limit['posterior_accuracy']:.4f}", ""])
    write_figures(record, vars(arguments), {"posterior": limit, "logged_steps": steps, "runs": rows}, arguments.json)
    print_table(["rectangles, remedy", "unseen: cross-entropy", "accuracy", "the 100: accuracy"], table)


if __name__ == "__main__":
    run_as_script(main)
