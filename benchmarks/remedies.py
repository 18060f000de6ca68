"""What S2 proposed against its failure on unseen rectangles and did not try: four remedies, three seeds each.

    python benchmarks/remedies.py --json results/rectangles_remedies.json

Each remedy on the sparse task, with 100 rectangles and with fresh ones at every step. A plot lies beside the figures.
"""

import functools
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_rectangles
from maskgit import CommandLine, at_least, line_plot, pick_device, print_table, run_as_script, run_record, write_figures

SOURCES = {"100 rectangles": 100, "fresh ones": None}
REMEDIES = {
    "as it is": {},
    "soft targets": {"soft_targets": 0.5},
    "points near edges": {"sampling": "edges"},
    "no corners": {"sampling": "cornerless"},
}


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
    recipe = train_rectangles.Rectangles(**train_rectangles.SPARSE | {"steps": arguments.steps}).on(device)
    unseen = train_rectangles.draw_rectangles(arguments.test_images, train_rectangles.TEST_SEED, "sparse")
    rows = []
    for seed in range(3):
        tokenizer = train_rectangles.fit_tokenizer(seed)
        make = functools.partial(
            train_rectangles.make_test, "sparse", tokenizer=tokenizer, proposals=arguments.proposals
        )
        tests = {"unseen": make(unseen), "seen": make(train_rectangles.draw_rectangles(100, [seed, 0]))}
        for (source, count), (remedy, change) in itertools.product(SOURCES.items(), REMEDIES.items()):
            varied = replace(recipe, seed=seed, rectangles=count, **change)
            model, history = train_rectangles.train_model(varied, tokenizer, device)
            row = {"variant": f"{source}, {remedy}", "seed": seed, "curve": [row["unseen"] for row in history]}
            rows.append(row | {name: train_rectangles.score(model, test) for name, test in tests.items()})
            print(f"{row['variant']}, seed {seed}: accuracy {rows[-1]['unseen']['accuracy']:.4f}", flush=True)

    steps = [row["step"] for row in history]
    curves = {}
    table = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        runs = [row for row in rows if row["variant"] == variant]
        curves[variant] = (steps, np.mean([row["curve"] for row in runs], axis=0))
        table.append([variant])
        for name, figure in (("unseen", "cross_entropy"), ("unseen", "accuracy"), ("seen", "accuracy")):
            values = [row[name][figure] for row in runs]
            table[-1].append(f"{np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})")
    limit = {name: float(np.mean([row["unseen"][name] for row in rows])) for name in ("limit", "posterior_accuracy")}
    table.append(["posterior", f"{limit['limit']:.4f}", f"{limit['posterior_accuracy']:.4f}", ""])
    write_figures(record, vars(arguments), {"posterior": limit, "logged_steps": steps, "runs": rows}, arguments.json)
    labels = {"x_label": "step", "y_label": "cross-entropy on unseen rectangles, nats per hidden token"}
    labels |= {"title": "S2's remedies, mean of three seeds", "references": {"posterior": limit["limit"]}}
    line_plot(curves, **labels, log_y=True).save(arguments.json.with_suffix(".png"))
    print_table(["rectangles, remedy", "unseen: cross-entropy", "accuracy", "the 100: accuracy"], table)


if __name__ == "__main__":
    run_as_script(main)
