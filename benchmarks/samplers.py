"""Samplers of the literature as orders of decode, a few lines each, beside maskgit.py's own and yours.

    python benchmarks/samplers.py FILE                                       your orders on the squares, in a minute
    python benchmarks/samplers.py --json results/samplers_squares.json       all of these: 70 minutes
    python benchmarks/samplers.py --grid --json results/samplers_grid.json   on the rectangles' grid

FILE has a dict ORDERS: name -> an order, or a dict of an order's settings. Those that neither look at drawn tokens nor
draw numbers may be named in a set EXACT: on the squares these are scored exactly, the others by counting. Its orders
alone are scored, and printed between the rows of `entropy` and `confidence` that samplers_squares.json has of
results/squares.pt.

On the squares all is hidden, or the right half of an image, and exact marginals stand beside the model. On the grid 169
tokens are filled in, with the left half of them hidden and with all; a completed grid is explained if some rectangle
has just these tokens. Samplers that take tokens back (ReMDM, P2) are left out: they ask the model about states that no
image agrees with, where exact marginals are not defined.
"""

import functools
import itertools
import json
import math
import runpy
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_rectangles
import train_squares
from maskgit import (
    CommandLine,
    InputError,
    all_but_lowest,
    at_random,
    by_confidence,
    by_entropy,
    load_checkpoint,
    pick_device,
    print_table,
    run_as_script,
    run_record,
    write_figures,
)

# ---------------------------------------------------------------------------------------------------
# Orders: functions of a maskgit.Step; those that remember something start over at step 1. Thresholds are the papers'.


def entropies(state):
    return torch.special.entr(state.log_probs.exp()).sum(dim=-1)


def each_below(state, certain=0.05):
    """Every token whose own entropy is below `certain` nats, and of the others the most uncertain: as by_entropy, but
    without a bound on the sum."""
    entropy = entropies(state)
    sure = entropy < certain
    unsure = torch.zeros_like(state.left).index_add(0, state.row, (~sure).long())
    return all_but_lowest(entropy.masked_fill(sure, math.inf), state.row, state.left.minimum(unsure - 1))


def entropy_bounded(state, gamma=0.1):
    """EB-Sampler (Ben-Hamu et al. 2025, arXiv 2505.24857): the most certain tokens, as many as sum H - max H <= gamma
    allows."""
    entropy = entropies(state)
    of_image = entropy.new_zeros(state.coords.shape[:2]).index_put((state.row, state.place), entropy)  # (B, T)
    ascending, place = of_image.sort(dim=1, stable=True)
    within = ascending.cumsum(dim=1) - ascending <= gamma
    return torch.zeros_like(within).scatter(1, place, within)[state.row, state.place]


def margin(state):
    """Top-k probability margin (Kim et al. 2025, arXiv 2502.06768): the two likeliest codes lie farthest apart."""
    best, second = state.log_probs.exp().topk(2).values.unbind(dim=-1)
    return best - second


def moment(state, choice_temperature=4.5):
    """Moment sampler (Hayakawa et al. 2025, arXiv 2510.04525): MaskGIT's positions, chosen before any value is drawn,
    with a chance proportional to sum p^beta, beta = 1 + 1 / noise. The paper draws the values from p^beta, too, as
    MaskGIT does in effect; here they are drawn from p."""
    noise = choice_temperature * max(1 - state.step / state.steps, 1e-3)
    weight = (state.log_probs * (1 + 1 / noise)).logsumexp(dim=-1)
    return weight - torch.empty_like(weight).exponential_(generator=state.generator).log()


class Halton:
    """Halton (Besnier et al. 2025), evenly over the image: the k-th point of the sequence (bases 2 and 3, stretched
    over the tokens' bounding box) takes the nearest token not yet taken. rolled: with a start of its own for each
    image, as in valeoai's code."""

    def __init__(self, rolled=False):
        self.rolled = rolled

    def __call__(self, state):
        if state.step == 1:
            visit = halton_visits(state.coords)
            if self.rolled:
                b, t = visit.shape
                start = torch.randint(t, (b, 1), generator=state.generator, device=visit.device)
                visit = (visit - start) % t
            self.visit = visit
        return -self.visit[state.row, state.place].float()


def halton_visits(coords):
    """When the sequence comes to each token at coords (B, T, 2): 0 .. T-1, (B, T)."""
    b, t, _ = coords.shape
    low, high = coords.aminmax(dim=1, keepdim=True)
    k = torch.arange(t, dtype=torch.float64, device=coords.device)
    points = torch.stack([radical_inverse(k, 2), radical_inverse(k, 3)], dim=-1).to(coords.dtype)  # (T, 2)
    visit = torch.full((b, t), -1, device=coords.device)
    for i, point in enumerate(points):
        distance = (coords - (low + (high - low) * point)).square().sum(dim=-1)
        nearest = distance.masked_fill(visit >= 0, math.inf).argmin(dim=1, keepdim=True)
        visit.scatter_(1, nearest, i)
    return visit


def radical_inverse(k, base):
    """The digits of numbers k (T,) in `base`, mirrored at the point: 6 = 110 in base 2 gives 0.011 = 0.375. (T,)"""
    return sum(k.div(base**i, rounding_mode="floor") % base / base ** (i + 1) for i in range(24))


def threshold(state, probability=0.9):
    """Fast-dLLM (Wu et al. 2025, arXiv 2505.22618): all that are as probable as this, else the most probable one."""
    return state.log_probs.amax(dim=-1).exp() >= probability


class Klass:
    """KLASS (Kim et al. 2025, arXiv 2511.05664): those so probable whose distribution has moved by less than so many
    nats since the last step, else the most probable one."""

    def __init__(self, probability=0.9, divergence=0.01):
        self.probability = probability
        self.divergence = divergence

    def __call__(self, state):
        log_probs = state.log_probs.clamp(min=-1e9)
        if state.step == 1:
            self.last = log_probs.new_full((*state.coords.shape[:2], log_probs.shape[1]), -1e9)  # (B, T, K)
        moved = (log_probs.exp() * (log_probs - self.last[state.row, state.place])).sum(dim=-1)
        self.last[state.row, state.place] = log_probs
        return (log_probs.amax(dim=-1).exp() > self.probability) & (moved < self.divergence)


def settings_of(order, name, values):
    return {f"{name} {value}": functools.partial(order, **{name: value}) for value in values}


ORDERS = {
    "entropy": settings_of(by_entropy, "budget", (0.0001, 0.001, 0.1, 0.2, 0.5)),
    "confidence": by_confidence,
    "confidence, log prob.": functools.partial(by_confidence, log_probability=True),
    "confidence, no noise": functools.partial(by_confidence, choice_temperature=0.0),
    "random": at_random,
    "halton": Halton(),
    "halton, rolled": Halton(rolled=True),
    "entropy, each below": settings_of(each_below, "certain", (0.02, 0.05, 0.1, 0.15, 0.2)),
    "entropy-bounded": settings_of(entropy_bounded, "gamma", (0.01, 0.1, 0.2, 0.5, 1.0)),
    "margin": margin,
    "moment": moment,
    "threshold": settings_of(threshold, "probability", (0.8, 0.9, 0.95, 0.99)),
    "KLASS": {f"probability {least}": Klass(least) for least in (0.6, 0.9, 0.99)},
}
EXACT = {"entropy", "halton", "entropy, each below", "entropy-bounded", "margin", "threshold", "KLASS"}


def orders_of(path):
    """ORDERS and EXACT, or those of a Python file."""
    if not path:
        return ORDERS, EXACT
    try:
        found = runpy.run_path(path)
        orders = found["ORDERS"]
        exact = found.get("EXACT", set())
        unknown = exact - orders.keys()
    except Exception as error:  # whatever the file raises
        raise InputError(f"{path} gives no dict ORDERS: {type(error).__name__}: {error}") from None
    if unknown:
        raise InputError(f"{path} has {unknown} in EXACT, but not in ORDERS")
    return orders, exact


def decodings(orders, many_steps):
    """[(order, setting, decode's arguments)]: an order by itself is tried with each of these numbers of steps, of a
    dict each setting with as many steps as it likes."""
    rows = []
    for name, order in orders.items():
        if callable(order):
            rows += [(name, f"{steps} steps", {"order": order, "steps": steps}) for steps in many_steps]
        else:
            rows += [(name, setting, {"order": each, "steps": max(many_steps)}) for setting, each in order.items()]
    return rows


# ---------------------------------------------------------------------------------------------------
# The squares

SQUARES_STEPS = (4, 8, 16, 32, 64)
TABLE = Path(__file__).resolve().parents[1] / "results" / "samplers_squares.json"
TURNS = tuple(itertools.product(range(4), (False, True)))


class TurnedModel:
    """The mean of a model's probabilities for the eight turns and mirror images of square images."""

    def __init__(self, model):
        self.model = model
        self.mask_id = model.mask_id

    def __call__(self, tokens, coords):
        side = math.isqrt(tokens.shape[1])
        images = tokens.view(-1, side, side)
        total = 0
        for quarters, mirrored in TURNS:
            turned = images.rot90(quarters, (1, 2))
            turned = turned.flip(2) if mirrored else turned
            probs = self.model(turned.flatten(1), coords).float().softmax(dim=-1).unflatten(1, (side, side))
            probs = probs.flip(2) if mirrored else probs
            total = total + probs.rot90(-quarters, (1, 2))
        return (total / len(TURNS)).log().flatten(1, 2)


def judge_on_squares(model, prior, device, orders, exact_orders, shown):
    """A row for each of the inputs that are `shown` and each decoding, with the exact posterior's marginals in the
    model's place, and with the model's."""
    rows = []
    inputs = train_squares.completion_inputs(prior)
    marginals = {"exact": train_squares.ExactModel(prior.to(device)), "model": model}
    draws = {"exact": train_squares.EXACT_DRAWS, "model": train_squares.MODEL_DRAWS}
    tried = decodings(orders, SQUARES_STEPS)
    for given, (order, setting, options) in itertools.product(shown, tried):
        row = {"given": given, "order": order, "setting": setting}
        for name in marginals:
            start = (marginals[name], prior, inputs[given], device)
            if order in exact_orders:
                row[name] = train_squares.judge_followed(*start, **options)
            else:
                row[name] = train_squares.judge_counted(*start, draws[name], **options)
        rows.append(row)
        print(f"{given}, {order}, {setting}: {row['model']['valid']:.1%} valid", file=sys.stderr, flush=True)
    return rows


def judge_averaged(model, prior, device):
    """A row of such with eight answers averaged for each."""
    row = {"given": "nothing", "order": "entropy, 8 turns averaged", "setting": "budget 0.001"}
    nothing = train_squares.completion_inputs(prior)["nothing"]
    for name, each in {"exact": train_squares.ExactModel(prior.to(device)), "model": model}.items():
        start = (TurnedModel(each), prior, nothing, device)
        row[name] = train_squares.judge_followed(*start, order=by_entropy, steps=max(SQUARES_STEPS))
        row[name]["calls"] *= len(TURNS)
        row[name]["most_calls"] *= len(TURNS)
    return row


def run_on_squares(record, arguments, checkpoint):
    orders, exact_orders = orders_of(arguments.file)
    started = time.monotonic()
    prior = train_squares.all_squares(*(checkpoint["config"][name] for name in ("grid", "min_side", "max_side")))
    model = checkpoint["model"]
    start = model, prior, next(model.parameters()).device
    if arguments.file:
        rows = judge_on_squares(*start, orders, exact_orders, ["nothing"])
        known = [row for row in json.loads(TABLE.read_text())["completions"] if row["given"] == "nothing"]
        ours, papers = ([row for row in known if row["order"] == order] for order in ("entropy", "confidence"))
        train_squares.print_completions(ours + rows + papers)
    else:
        rows = judge_on_squares(*start, orders, exact_orders, ["nothing", "left half"])
        rows.append(judge_averaged(*start))
        train_squares.print_completions([row for row in rows if row["given"] == "nothing"])
    if arguments.json:
        figures = {"completions": rows, "seconds": round(time.monotonic() - started)}
        write_figures(record, vars(arguments), figures, arguments.json)


PAINTED = {"entropy": "entropy (default)", "confidence": "confidence (paper)", "random": "random"}
PAINTED |= {"halton": "Halton", "threshold": "Fast-dLLM", "KLASS": "KLASS"}


def paint(rows, path):
    """Total variation by calls, of the orders in PAINTED: a plot for exact marginals, one for the trained model."""
    from matplotlib.figure import Figure  # nothing else needs it

    figure = Figure(figsize=(13, 5), layout="constrained")
    titles = {"exact": "If each token's probabilities were exact", "model": "With the trained model"}
    for axes, (marginals, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        for i, (order, label) in enumerate(PAINTED.items()):
            found = [row[marginals] for row in rows if (row["given"], row["order"]) == ("nothing", order)]
            points = sorted((each["calls"], each["total_variation"]) for each in found)
            axes.plot(*zip(*points, strict=True), "o-", color=f"C{i}", linewidth=1 + 2 * (i == 0))
            side = {"xytext": (-8, -3), "ha": "right"} if order != "KLASS" else {"xytext": (8, 0)}  # the lines cross
            axes.annotate(label, points[order == "KLASS"], color=f"C{i}", textcoords="offset points", **side)
        axes.set(title=title, xlabel="network calls per image", xscale="log", xlim=(1.6, 72))
        axes.set_xticks(SQUARES_STEPS, map(str, SQUARES_STEPS))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.supylabel("total variation from 126 equally likely squares")
    figure.savefig(path)


# ---------------------------------------------------------------------------------------------------
# The grid

GRID_STEPS = (8, 16, 32)
GRID_DRAWS = 200
GRID_PROPOSALS = 3000  # for each posterior


def explained(tokens, tokenizer, proposals=2000):
    """Which token grids (B, 169) are those of a rectangle with corners on pixels: bool (B,). A search downhill by the
    number of wrong tokens, from where the decoded picture is bright; it misses a few, see the posterior's draws."""
    side = train_rectangles.GRID_SIDE
    size = train_rectangles.SIZE
    rng = np.random.default_rng(0)
    bright = tokenizer.decode(tokens.reshape(-1, side, side))[..., 0] > 0.5

    def wrong_tokens(rectangles, tokens):
        patches = train_rectangles.coverage(rectangles, train_rectangles.GRID_POINTS)
        return (tokenizer.nearest(patches) != tokens).sum(axis=1)

    # The box around all that is bright, of which columns and rows say where it is.
    columns = bright.any(axis=1)
    rows = bright.any(axis=2)
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
        proposal = state[rest] + np.round(moves * train_rectangles.PIXELS) / train_rectangles.PIXELS
        errors = wrong_tokens(proposal, tokens[rest])
        better = train_rectangles.possible(proposal) & (errors <= wrong[rest])
        state[rest[better]] = proposal[better]
        wrong[rest[better]] = errors[better]
    return wrong == 0


def judge_on_grid(tokens, test, tokenizer):
    """The share of token grids that a rectangle explains, and the mean error of a cell of their pictures."""
    pictures = tokenizer.decode(tokens.reshape(-1, train_rectangles.GRID_SIDE, train_rectangles.GRID_SIDE))
    error = np.abs(pictures - train_rectangles.paint_rectangles(test.rectangles)).mean()
    return {"explained": float(explained(tokens, tokenizer).mean()), "error": float(error)}


def run_on_grid(record, arguments, checkpoint):
    rows = []
    orders, _ = orders_of(arguments.file)
    model = checkpoint["model"]
    tokenizer = checkpoint["tokenizer"]
    rectangles = train_rectangles.draw_rectangles(GRID_DRAWS, train_rectangles.TEST_SEED, "grid")
    for hidden, mask in (("left half", "left half"), ("all", "1.0")):
        test = train_rectangles.make_test("grid", rectangles, tokenizer, mask=mask, proposals=GRID_PROPOSALS)
        drawn = tokenizer.nearest(train_rectangles.coverage(test.draws, test.points))
        posterior = judge_on_grid(np.where(test.mask, drawn, test.tokens), test, tokenizer)
        rows.append({"hidden": hidden, "order": "draws from the posterior", "setting": "", "calls": 0.0, **posterior})
        for order, setting, options in decodings(orders, GRID_STEPS):
            trace = []
            filled = train_rectangles.fill(model, test, **options | {"trace": trace})
            calls = 1 + sum(left.any(dim=1).double().mean().item() for _, left in trace[:-1])
            row = {"hidden": hidden, "order": order, "setting": setting, "calls": calls}
            rows.append(row | judge_on_grid(filled, test, tokenizer))
            print(f"{hidden} hidden, {order}, {setting}: {rows[-1]['explained']:.1%}", file=sys.stderr, flush=True)
    write_figures(record, vars(arguments), {"rows": rows}, arguments.json)
    table = []
    for row in rows:
        table.append([row["hidden"], row["order"], row["setting"]])
        table[-1] += [f"{row['explained']:.1%}", f"{row['error']:.4f}", f"{row['calls']:.1f}"]
    print_table(["hidden", "order", "setting", "explained", "error of a cell", "calls"], table)


def main():
    record = run_record()
    parser = CommandLine(__doc__)
    parser.add_argument("file", metavar="FILE", nargs="?", help="a Python file with a dict ORDERS of your own")
    parser.add_argument("--grid", action="store_true", help="on the rectangles' grid instead of the squares")
    parser.add_argument("--checkpoint", type=Path, help="results/squares.pt, or runs/rectangles_grid/model.pt")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="only paint a picture from this file, beside it")
    arguments = parser.parse_args()
    if arguments.draw:
        paint(json.loads(arguments.draw.read_text())["completions"], arguments.draw.with_suffix(".png"))
        return
    checkpoint = Path("runs/rectangles_grid/model.pt") if arguments.grid else TABLE.with_name("squares.pt")
    run = run_on_grid if arguments.grid else run_on_squares
    run(record, arguments, load_checkpoint(arguments.checkpoint or checkpoint, pick_device(arguments.device)))


if __name__ == "__main__":
    run_as_script(main)
