"""The fewest network calls that a sampler needs for a square if it asks one pixel at a time, proved.

    python benchmarks/questions.py --json results/squares_questions.json

With exact marginals a sampler that draws one pixel per call plays twenty questions: each answer leaves the images that
agree with it, and when one is left a last call fills in the rest. The best plan is a binary tree over the images whose
leaves lie as near to the root as the pixels allow: plans of the few most even questions, then the best of all, by
depth-first search with bounds. 3 minutes on one core.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_squares
from maskgit import CommandLine, run_as_script, run_record, write_figures


def even_tree(n):
    """The summed depth of n leaves if every question halves them: no plan is shorter."""
    k = n.bit_length() - 1
    return n * k + 2 * (n - 2**k)


class Plans:
    """The summed number of questions of the best plan for each set of images; a set is an integer, a bit per image."""

    def __init__(self, prior, width=None):
        self.white = [sum(int(bit) << i for i, bit in enumerate(pixel)) for pixel in prior.T.tolist()]
        self.width = width  # of the questions for a set so many most even ones are tried; None: all
        self.bound = {}  # set: no plan has fewer questions
        self.solved = set()  # sets with a plan that has just as many

    def questions(self, images):
        """The ways to split a set, the most even one first."""
        parts = {min(images & white, images & ~white) for white in self.white} - {0}
        return sorted(parts, key=lambda part: (abs(2 * part.bit_count() - images.bit_count()), part))[: self.width]

    def at_least(self, images):
        return self.bound.get(images, even_tree(images.bit_count()))

    def search(self, images, limit):
        """The best plan's number of questions if that is at most `limit`, else a bound above it."""
        n = images.bit_count()
        if n < 3 or images in self.solved or self.at_least(images) > limit:
            return self.at_least(images)
        best = limit + 1
        bound = float("inf")
        for part in self.questions(images):
            rest = images ^ part
            total = n + self.at_least(part) + self.at_least(rest)
            if total < best:
                total = n + self.search(part, best - 1 - n - self.at_least(rest)) + self.at_least(rest)
            if total < best:
                total = n + self.at_least(part) + self.search(rest, best - 1 - n - self.at_least(part))
            bound = min(bound, total)
            best = min(best, total)
        self.bound[images] = bound
        if bound <= limit:
            self.solved.add(images)
        return bound


def main():
    record = run_record()
    parser = CommandLine(__doc__)
    parser.add_argument("--widths", type=int, nargs="*", default=[1, 2, 3], help="even questions tried for a plan")
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    arguments = parser.parse_args()
    started = time.monotonic()
    prior = train_squares.all_squares(8, 2, 5)
    count = len(prior)
    everything = 2**count - 1
    rows = []
    for width in arguments.widths:
        rows.append({"width": width, "questions": Plans(prior, width).search(everything, float("inf"))})
        print(f"the {width} most even questions: {rows[-1]['questions'] / count + 1:.4f} calls", flush=True)
    limit = min([row["questions"] for row in rows], default=float("inf"))
    best = Plans(prior).search(everything, limit)
    figures = {"images": count, "plans": rows, "best": best, "calls": best / count + 1, "even_tree": even_tree(count)}
    figures["seconds"] = time.monotonic() - started
    write_figures(record, vars(arguments), figures, arguments.json)
    print(f"all questions: {best / count + 1:.4f} calls, the fewest")


if __name__ == "__main__":
    run_as_script(main)
