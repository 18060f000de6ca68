"""Figures against how many images a training saw: one point for each length, the mean of its runs.

    python benchmarks/curve.py results/squares.json results/squares_3000.json --figure tasks.cosine.kl --out law.png

A figure is named by the way to it in the JSON files of a script. --out is a plot with both axes logarithmic.
"""

import collections
import json
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from maskgit import CommandLine, line_plot, named, print_table, run_as_script


def figure_of(path, record, name):
    """What lies at "a.b.0" in the nested dicts and lists of a file."""
    try:
        for part in name.split("."):
            record = record[int(part)] if isinstance(record, list) else record[part]
        return float(record)
    except (KeyError, IndexError, TypeError, ValueError):
        raise ValueError(f"{path} has no figure {name!r}: there is no number at {part!r}") from None


def main():
    parser = CommandLine(__doc__)
    parser.add_argument("files", metavar="JSON", nargs="+", type=named, help="written by a script's --json")
    parser.add_argument("--figure", action="append", required=True, help="such as tasks.cosine.kl; may be repeated")
    parser.add_argument("--out", type=named, required=True, help="PNG for the plot")
    arguments = parser.parse_args()
    runs = collections.defaultdict(list)
    for path in arguments.files:
        record = json.loads(path.read_text())
        images = math.prod(figure_of(path, record, f"settings.{name}") for name in ("steps", "batch_size"))
        runs[images].append([figure_of(path, record, name) for name in arguments.figure])
    lengths = sorted(runs)
    means = {name: [] for name in arguments.figure}
    for images in lengths:
        for name, values in zip(arguments.figure, zip(*runs[images], strict=True), strict=True):
            means[name].append(statistics.fmean(values))
    curves = {name: (lengths, values) for name, values in means.items()}
    labels = dict(title="More training", x_label="images seen", y_label="figures, mean of the runs of a length")
    line_plot(curves, **labels, log_x=True, log_y=True).save(arguments.out)
    rows = []
    for i, images in enumerate(lengths):
        rows.append([f"{images:,.0f}", str(len(runs[images])), *(f"{values[i]:.4f}" for values in means.values())])
    print_table(["images seen", "runs", *arguments.figure], rows)


if __name__ == "__main__":
    run_as_script(main)
