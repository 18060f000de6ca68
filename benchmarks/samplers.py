"""Samplers of the literature as orders of decode, a few lines each, and their second field: the rectangles' grid.

    python train_squares.py --completions benchmarks/samplers.py       on the squares, where the truth is known
    python benchmarks/samplers.py --json results/samplers_grid.json    on the grid's model, in runs/rectangles_grid

On the grid 169 tokens are filled in, with the left half of them hidden and with all. A completed grid is explained if
some rectangle has just these tokens. Samplers that take tokens back (ReMDM, P2) are left out: they ask the
model about states that no image agrees with, where exact marginals are not defined.
"""

import functools
import math
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_rectangles
from maskgit import (
    CommandLine,
    at_least,
    at_random,
    by_confidence,
    by_entropy,
    by_halton,
    highest,
    load_checkpoint,
    pick_device,
    print_table,
    run_as_script,
    write_figures,
)

# ---------------------------------------------------------------------------------------------------
# Orders: functions of a maskgit.Step. Thresholds are those of the papers.


def entropies(step):
    return torch.special.entr(step.log_probs.exp()).sum(dim=-1)


def each_below(step, certain=0.05):
    """Every token whose own entropy is below `certain` nats, and of the others the most uncertain: as by_entropy, but
    without a bound on the sum."""
    entropy = entropies(step)
    sure = entropy < certain
    unsure = torch.zeros_like(step.left).index_add(0, step.image, (~sure).long())
    return highest(entropy.masked_fill(sure, math.inf), step.image, step.left.minimum(unsure - 1))


def entropy_bounded(step, gamma=0.1):
    """EB-Sampler (Ben-Hamu et al. 2025, arXiv 2505.24857): the most certain tokens, as many as sum H - max H <= gamma
    allows."""
    entropy = entropies(step)
    of_all = entropy.new_zeros(step.coords.shape[:2]).index_put((step.image, step.place), entropy)  # (B, T)
    ascending, token = of_all.sort(dim=1, stable=True)
    within = ascending.cumsum(dim=1) - ascending <= gamma
    return torch.zeros_like(within).scatter(1, token, within)[step.image, step.place]


def margin(step):
    """Top-k probability margin (Kim et al. 2025, arXiv 2502.06768): the two likeliest codes lie farthest apart."""
    best, second = step.log_probs.exp().topk(2).values.unbind(dim=-1)
    return best - second


def moment(step, choice_temperature=4.5):
    """Moment sampler (Hayakawa et al. 2025, arXiv 2510.04525): MaskGIT's positions, chosen before any value is drawn,
    with a chance proportional to sum p^beta, beta = 1 + 1 / noise. The paper draws the values from p^beta, too, as
    MaskGIT does in effect; here they are drawn from p."""
    noise = choice_temperature * max(1 - step.step / step.steps, 1e-3)
    weight = (step.log_probs * (1 + 1 / noise)).logsumexp(dim=-1)
    return weight - torch.empty_like(weight).exponential_(generator=step.generator).log()


def rolled_halton(step):
    """Halton (Besnier et al. 2025) with a start of its own for each image, as in valeoai's code."""
    if "start" not in step.memory:
        b, t = step.coords.shape[:2]
        step.memory["start"] = torch.randint(t, (b,), generator=step.generator, device=step.coords.device)
    tokens = step.coords.shape[1]
    return -((-by_halton(step) - step.memory["start"][step.image]) % tokens)


def threshold(step, probability=0.9):
    """Fast-dLLM (Wu et al. 2025, arXiv 2505.22618): all that are as probable as this, else the most probable one."""
    return step.log_probs.amax(dim=-1).exp() >= probability


def klass(step, probability=0.9, divergence=0.01):
    """KLASS (Kim et al. 2025, arXiv 2511.05664): those so probable whose distribution has moved by less than so many
    nats since the last step, else the most probable one."""
    log_probs, shape = step.log_probs.clamp(min=-1e9), step.coords.shape[:2]
    last = step.memory.setdefault("last", log_probs.new_full((*shape, log_probs.shape[1]), -1e9))  # (B, T, K)
    moved = (log_probs.exp() * (log_probs - last[step.image, step.place])).sum(dim=-1)
    last[step.image, step.place] = log_probs
    return (log_probs.amax(dim=-1).exp() > probability) & (moved < divergence)


def settings_of(order, name, values):
    return {f"{name} {value}": functools.partial(order, **{name: value}) for value in values}


ORDERS = {
    "entropy, each below": settings_of(each_below, "certain", (0.02, 0.05, 0.1, 0.15, 0.2)),
    "entropy-bounded": settings_of(entropy_bounded, "gamma", (0.01, 0.1, 0.2, 0.5, 1.0)),
    "margin": margin,
    "moment": moment,
    "halton, rolled": rolled_halton,
    "threshold": settings_of(threshold, "probability", (0.8, 0.9, 0.95, 0.99)),
    "KLASS": settings_of(klass, "probability", (0.6, 0.9, 0.99)),
}

# ---------------------------------------------------------------------------------------------------
# The grid

STEPS = (8, 16, 32)
GRID_ORDERS = {
    "entropy": settings_of(by_entropy, "budget", (0.001, 0.1, 0.5)),
    "confidence": by_confidence,
    "confidence, no noise": functools.partial(by_confidence, choice_temperature=0.0),
    "random": at_random,
    "halton": by_halton,
} | ORDERS


def explained(tokens, tokenizer, proposals=2000):
    """Which token grids (B, 169) are those of a rectangle with corners on pixels: bool (B,). A search downhill by the
    number of wrong tokens, from where the decoded picture is bright; it misses a few, see the posterior's draws."""
    side, size, pixels = train_rectangles.GRID_SIDE, train_rectangles.SIZE, train_rectangles.PIXELS
    rng, bright = np.random.default_rng(0), tokenizer.decode(tokens.reshape(-1, side, side))[..., 0] > 0.5

    def wrong_tokens(rectangles, tokens):
        patches = train_rectangles.coverage(rectangles, train_rectangles.GRID_POINTS)
        return (tokenizer.nearest(patches) != tokens).sum(axis=1)

    columns, rows = bright.any(axis=1), bright.any(axis=2)
    low = np.stack([columns.argmax(axis=1), rows.argmax(axis=1)], axis=1).clip(max=size - train_rectangles.MIN_SIDE)
    high = size - np.stack([columns[:, ::-1].argmax(axis=1), rows[:, ::-1].argmax(axis=1)], axis=1)
    state = np.concatenate([low, np.maximum(high, low + train_rectangles.MIN_SIDE)], axis=1).astype(float)
    wrong = wrong_tokens(state, tokens)
    for _ in range(proposals):
        rest = np.flatnonzero(wrong)
        if not len(rest):
            break
        reach = size * 2.0 ** -rng.uniform(0, 8, size=(len(rest), 1))
        moves = rng.uniform(-reach, reach, size=(len(rest), 4)) * (rng.random((len(rest), 4)) < 0.4)
        proposal = state[rest] + np.round(moves * pixels) / pixels
        errors = wrong_tokens(proposal, tokens[rest])
        better = train_rectangles.possible(proposal) & (errors <= wrong[rest])
        state[rest[better]], wrong[rest[better]] = proposal[better], errors[better]
    return wrong == 0


def judge(tokens, test, tokenizer):
    """The share of token grids that a rectangle explains, and the mean error of a cell of their pictures."""
    pictures = tokenizer.decode(tokens.reshape(-1, train_rectangles.GRID_SIDE, train_rectangles.GRID_SIDE))
    error = np.abs(pictures - train_rectangles.draw_images(test.rectangles)).mean()
    return {"explained": float(explained(tokens, tokenizer).mean()), "error": float(error)}


def main():
    parser = CommandLine(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/rectangles_grid"), help="folder of the model's run")
    parser.add_argument("--draws", type=at_least(1), default=200)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    settings, rows = parser.parse_args(), []
    checkpoint = load_checkpoint(settings.out / "model.pt", pick_device(settings.device))
    model, tokenizer = checkpoint["model"], checkpoint["tokenizer"]
    rectangles = train_rectangles.draw_rectangles(settings.draws, train_rectangles.TEST_SEED)
    for hidden, mask in (("left half", "half"), ("all", "1.0")):
        test = train_rectangles.make_test("grid", rectangles, tokenizer, mask=mask, proposals=3000)
        drawn = tokenizer.nearest(train_rectangles.coverage(test.draws, test.points))
        posterior = judge(np.where(test.mask, drawn, test.tokens), test, tokenizer)
        rows.append({"hidden": hidden, "order": "draws from the posterior", "setting": "", "calls": 0.0, **posterior})
        for name, order in GRID_ORDERS.items():
            many = order if isinstance(order, dict) else {f"{steps} steps": order for steps in STEPS}
            for setting, function in many.items():
                steps, trace = int(setting.split()[0]) if callable(order) else 2 * STEPS[-1], []
                filled = train_rectangles.fill(model, test, order=function, steps=steps, trace=trace)
                calls = 1 + sum(left.any(dim=1).double().mean().item() for _, left in trace[:-1])
                row = {"hidden": hidden, "order": name, "setting": setting, "calls": calls}
                rows.append(row | judge(filled, test, tokenizer))
    write_figures(settings, {"rows": rows}, settings.json)
    cells = [
        [*list(row.values())[:3], f"{row['explained']:.1%}", f"{row['error']:.4f}", f"{row['calls']:.1f}"]
        for row in rows
    ]
    print_table(["hidden", "order", "setting", "explained", "error of a cell", "calls"], cells)


if __name__ == "__main__":
    run_as_script(main)
