"""S1's and S2's squares: black and white 8x8 images with one filled square, and a prior so small that the
best possible answer to every question can be computed.

    python train_squares.py                                  the default: 4 minutes on 2 CPU cores
    python train_squares.py --preset post2 --device cuda     S2's sizes (post1: S1's), for a GPU
    python train_squares.py --resume                         go on with an interrupted run
    python train_squares.py --completions                    every order of decoding, with the trained model; and with
                                                             a FILE of your own: README.md, "Your own order"

The default run ends 0.0011 to 0.0012 nats per hidden pixel from the exact posterior (five seeds), after 4 minutes on
two cores of an AMD EPYC server (results/squares.json).

A run leaves model.pt, log.csv, metrics.json and its pictures in runs/squares (--out).
"""

import functools
import itertools
import math
import runpy
import sys
import time

import numpy as np
import torch

import maskgit

BLACK, WHITE, MASK_ID = 0, 1, 2
TASKS = {"cosine": "cosine masking", "single": "one masked pixel", "0.2": "20 % masked"}
SOURCES = {"cosine": "S1: does not converge", "single": "S2: essentially perfect", "0.2": "S2: solved"}

# ---------------------------------------------------------------------------------------------------
# The prior and its exact posterior


def all_squares(grid, min_side, max_side):
    """Every image with one filled square of side min_side .. max_side: int64 (M, grid * grid)."""
    if not 1 <= min_side <= max_side <= grid:
        raise ValueError(f"sides {min_side} to {max_side} do not fit a grid of {grid}; need 1 <= min <= max <= grid")
    images = []
    for side in range(min_side, max_side + 1):
        for top, left in itertools.product(range(grid - side + 1), repeat=2):
            images.append(torch.zeros(grid, grid, dtype=torch.int64))
            images[-1][top : top + side, left : left + side] = WHITE
    return torch.stack(images).flatten(1)


def consistent(prior, tokens, mask):
    """Which images of the prior (M, T) agree with every visible pixel: bool (B, M)."""
    white, black = ((tokens == WHITE) & ~mask).float(), ((tokens == BLACK) & ~mask).float()
    disagreeing = black @ prior.T.float() + white @ (1 - prior).T.float()
    return disagreeing == 0


def posterior(prior, tokens, mask):
    """The exact probability of white at every pixel: the mean of all images of the prior that agree with the visible
    ones, 0 where none does. (B, T)"""
    agree = consistent(prior, tokens, mask).float()
    return agree @ prior.float() / agree.sum(dim=1, keepdim=True).clamp(min=1)


def pixel_coords(images):
    """Of images (B, T): (T, 2)."""
    side = math.isqrt(images.shape[1])
    return maskgit.grid_coords(side, side)


class ExactModel:
    """The posterior's marginals in the place of a trained network: what is wrong then is the sampler's fault."""

    mask_id = MASK_ID

    def __init__(self, prior):
        self.prior = prior

    def __call__(self, tokens, coords):
        white = posterior(self.prior, tokens, tokens == MASK_ID)
        return torch.stack([1 - white, white], dim=-1).log()


# ---------------------------------------------------------------------------------------------------
# Training data, and scores against the posterior

# Images and masks that no training run draws, unless its seed is as large.
VALIDATION_SEED, TEST_SEED = 10**9, 10**9 + 1
VALIDATION_COUNT, TEST_COUNT = 256, 4096


def make_batch(prior, settings):
    """batch(step) for train(): each epoch shows every image `presentations` times in a random order."""
    coords = pixel_coords(prior)
    size, epoch_length = settings.batch_size, len(prior) * settings.presentations

    @functools.lru_cache(maxsize=4)
    def epoch_order(epoch):
        generator = torch.Generator().manual_seed(maskgit.step_seed(settings.seed, -1 - epoch))
        return torch.randperm(epoch_length, generator=generator) % len(prior)

    def batch(step):
        first = step * size
        epochs = range(first // epoch_length, (first + size - 1) // epoch_length + 1)
        order = torch.cat([epoch_order(epoch) for epoch in epochs])[first % epoch_length :]
        tokens = prior[order[:size]]
        generator = torch.Generator().manual_seed(maskgit.step_seed(settings.seed, step))
        return tokens, maskgit.training_mask(tokens.shape, settings.mask, generator, coords), coords

    return batch


def test_set(prior, kind, count, seed):
    """Tokens (count, T), mask (count, T), and the exact probability of white at each hidden pixel."""
    generator = torch.Generator().manual_seed(seed)
    tokens = prior[torch.randint(len(prior), (count,), generator=generator)]
    mask = maskgit.training_mask(tokens.shape, kind, generator, pixel_coords(prior))
    return tokens, mask, posterior(prior, tokens, mask)[mask]


@torch.no_grad()
def score(model, prior, kind, count, seed):
    """Cross-entropy and accuracy on hidden pixels, and the posterior's own, over `count` images: expectations over
    everything the hidden pixels can be, so cross_entropy - limit is exactly the mean KL divergence from the
    posterior, in nats per hidden pixel."""
    tokens, mask, white = test_set(prior, kind, count, seed)
    device = next(model.parameters()).device
    coords, inputs = pixel_coords(prior).to(device), tokens.masked_fill(mask, MASK_ID).split(1024)
    log_probs = torch.cat([model(part.to(device), coords).float().log_softmax(dim=-1).cpu() for part in inputs])[mask]
    truth = torch.stack([1 - white, white], dim=-1)  # (hidden pixels, 2)
    limit = torch.special.entr(truth).sum(dim=-1).mean().item()
    cross_entropy = -(truth * log_probs).sum(dim=-1).mean().item()
    accuracy = truth.gather(-1, log_probs.argmax(dim=-1, keepdim=True)).mean().item()
    result = {"cross_entropy": cross_entropy, "limit": limit, "kl": cross_entropy - limit}
    return result | {"accuracy": accuracy, "posterior_accuracy": truth.amax(dim=-1).mean().item()}


# ---------------------------------------------------------------------------------------------------
# Completions: is the filled image a square, and are all the right ones equally likely?

# An order by itself is tried with several numbers of steps; of a dict each setting, with as many steps as it likes.
ORDERS = {
    "entropy": {f"budget {b}": functools.partial(maskgit.by_entropy, budget=b) for b in (0.0001, 0.001, 0.1, 0.2, 0.5)},
    "confidence": maskgit.by_confidence,
    "confidence, log prob.": functools.partial(maskgit.by_confidence, log_probability=True),
    "confidence, no noise": functools.partial(maskgit.by_confidence, choice_temperature=0.0),
    "random": maskgit.at_random,
    "halton": maskgit.by_halton,
}
STEPS = (4, 8, 16, 32, 64)
EXACT_DRAWS = 20_000  # with exact marginals, of an order that depends on drawn numbers


def decodings(path):
    """[(order, setting, decode's arguments)] of ORDERS, and of a dict of that name in a Python file, if any."""
    try:
        orders, rows = ORDERS | (runpy.run_path(path)["ORDERS"] if path else {}), []
    except Exception as error:  # whatever the file raises
        raise ValueError(f"{path} gives no dict ORDERS: {type(error).__name__}: {error}") from None
    for name, order in orders.items():
        if callable(order):
            rows += [(name, f"{steps} steps", {"order": order, "steps": steps}) for steps in STEPS]
        else:
            rows += [(name, setting, {"order": each, "steps": STEPS[-1]}) for setting, each in order.items()]
    return rows


def fill(model, tokens, mask, device, **options):
    """The tokens with the hidden ones filled in by decode: (B, T)."""
    generator = torch.Generator(device).manual_seed(TEST_SEED)
    tokens, mask, coords = tokens.to(device), mask.to(device), pixel_coords(tokens).to(device)
    return maskgit.decode(model, tokens, mask, coords, **{"generator": generator} | options).cpu()


def completion_inputs(prior):
    """{name: (tokens, mask)} of every image of the prior: nothing is visible, half of the pixels, or a half."""
    (x, y), side = pixel_coords(prior).T, math.isqrt(prior.shape[1])
    hidden = {"nothing": x >= 0, "left half": x >= side / 2, "right half": x < side / 2}
    hidden |= {"top half": y >= side / 2, "bottom half": y < side / 2}
    masks = {name: mask.expand(prior.shape) for name, mask in hidden.items()}
    masks["random half"] = maskgit.random_mask(prior.shape, 0.5, torch.Generator().manual_seed(TEST_SEED))
    return {name: (prior, mask) for name, mask in masks.items()}


def alike(tokens, mask):
    """What averages over inputs (B, T) that show the same: (B, B), rows that add up to 1."""
    shown = tokens.masked_fill(mask, MASK_ID)
    same = (shown[:, None] == shown).all(dim=-1).double()
    return same / same.sum(dim=1)


def follow_images(model, prior, tokens, mask, device, options):
    """How likely decode completes each input to each image of the prior, exactly and without drawing one: (B, M); and
    the mean and largest number of network calls.

    Every image that agrees with its input is followed: whatever the order commits takes the image's value, and the
    probabilities of these values multiply. It ends in an error if the order looks at step.values, which are not there
    yet, or draws numbers itself."""
    shown, which = tokens.masked_fill(mask, MASK_ID).unique(dim=0, return_inverse=True)  # each input once
    row, image = consistent(prior, shown, shown == MASK_ID).nonzero(as_tuple=True)
    truth, hidden, chances, trace = prior[image].to(device), (shown == MASK_ID)[row], [], []

    def follow(step):
        choice = options["order"](step._replace(values=None))
        step.values.copy_(truth[step.image, step.place])
        chance = step.log_probs.gather(-1, step.values[:, None])[:, 0].double()
        chances.append(torch.zeros_like(truth, dtype=torch.float64).index_put((step.image, step.place), chance))
        return choice

    generator = torch.Generator(device).manual_seed(TEST_SEED)
    untouched, followed = generator.get_state(), {"order": follow, "sample": "argmax", "generator": generator}
    fill(model, truth, hidden, device, **options | followed, trace=trace)
    if not torch.equal(untouched, generator.get_state()):
        raise ValueError("the order draws numbers itself")
    committed = [chance.masked_fill(left, 0) for chance, (_, left) in zip(chances, trace, strict=True)]
    p, calls = torch.stack(committed).sum(dim=(0, 2)).exp().cpu(), network_calls(hidden, trace)
    found = torch.zeros(len(shown), len(prior), dtype=torch.float64).index_put((row, image), p)
    weighted = p * which.bincount()[row]
    return found[which], ((weighted * calls).sum() / weighted.sum()).item(), int(calls.max())


def network_calls(mask, trace):
    """So many decode has made for each image: (B,)."""
    before = [mask.any(dim=1), *(hidden.any(dim=1).cpu() for _, hidden in trace[:-1])]
    return torch.stack(before).sum(dim=0).double()


def count_images(model, prior, tokens, mask, device, options, draws):
    """Likewise, as shares of so many completions."""
    repeats, trace = math.ceil(draws / len(tokens)), []
    tokens, mask = (part.repeat_interleave(repeats, dim=0) for part in (tokens, mask))
    matches = (fill(model, tokens, mask, device, **options, trace=trace)[:, None] == prior).all(dim=-1)
    found, calls = matches.view(-1, repeats, len(prior)).double().mean(dim=1), network_calls(mask, trace)
    return found, calls.mean().item(), int(calls.max())


def total_variation(found, truth):
    """Half the summed difference of probabilities (B, M), and of what is left to 1: completions that are no image of
    the prior. Mean over the inputs."""
    return float(((found - truth).abs().sum(dim=1) + 1 - found.sum(dim=1)).mean()) / 2


def judge(model, prior, tokens, mask, device, options, draws):
    """Completions beside the posterior: valid, the share of those that are an image of the prior; total variation and
    KL divergence; and network calls. An order that depends on drawn numbers has to be counted: then, in place of KL,
    exact_sampling is the total variation that so many draws from the posterior itself would show."""
    agree = consistent(prior, tokens, mask).double()
    truth = agree / agree.sum(dim=1, keepdim=True)
    try:
        found, calls, most = follow_images(model, prior, tokens, mask, device, options)
        result = {"kl": float((truth * (truth / found).log()).nansum(dim=1).mean().clamp(min=0))}
    except (AttributeError, TypeError, ValueError):
        found, calls, most = count_images(model, prior, tokens, mask, device, options, draws)
        average, repeats = alike(tokens, mask), math.ceil(draws / len(tokens))
        exact = np.random.default_rng(0).multinomial(repeats, truth, size=(100, len(truth))) / repeats
        exact = (average @ torch.from_numpy(exact)).flatten(0, 1)
        result = {"draws": repeats * len(tokens), "exact_sampling": total_variation(exact, truth.repeat(100, 1))}
        found = average @ found
    result |= {"valid": float(found.sum(dim=1).mean()), "total_variation": total_variation(found, truth)}
    return result | {"calls": calls, "most_calls": most}


def compare_orders(model, prior, device, inputs, decoders, draws):
    """A row per input and decoder, with both marginals: the exact posterior's in the model's place, and the model's."""
    rows, exact = [], ExactModel(prior.to(device))
    for (given, start), (order, setting, options) in itertools.product(inputs.items(), decoders):
        print(f"completions: {given}, {order}, {setting}", file=sys.stderr, flush=True)
        rows.append({"given": given, "order": order, "setting": setting})
        rows[-1]["exact"] = judge(exact, prior, *start, device, options, EXACT_DRAWS)
        rows[-1]["model"] = judge(model, prior, *start, device, options, draws)
    return rows


def print_completions(rows):
    """Exact marginals, then the trained model's. KL is nan where completions were counted."""
    columns, line = ["total variation", "KL", "calls"], "{valid:.1%}|{total_variation:.3f}|{kl:.3f}|{calls:.1f}"
    table = [[row["order"], row["setting"], row["given"]] for row in rows]
    for cells, row in zip(table, rows, strict=True):
        for result in (row["exact"], row["model"]):
            cells += line.format(**{"kl": math.nan} | result).split("|")
    maskgit.print_table(["completions", "setting", "given", "exact: valid", *columns, "model: valid", *columns], table)


# ---------------------------------------------------------------------------------------------------
# One run, and its pictures


def as_images(tokens):
    """Tokens (B, T) as images (B, side, side, 1): black, white, and grey where hidden."""
    side = math.isqrt(tokens.shape[1])
    return np.array([0.0, 1.0, 0.5], dtype=np.float32)[tokens.cpu().numpy()].reshape(-1, side, side, 1)


def draw_samples(model, prior, device):
    """Masked, filled, truth: a row each for S2's 20 %, cosine masking, half of the pixels, a half."""
    generator = torch.Generator().manual_seed(TEST_SEED)
    truth = prior[torch.randint(len(prior), (16,), generator=generator)]
    mask = maskgit.training_mask(truth.shape, "0.2+cosine+0.5+half", generator, pixel_coords(prior))
    filled = fill(model, truth, mask, device)
    columns = torch.stack([truth.masked_fill(mask, MASK_ID), filled, truth], dim=1)  # (16, 3, T)
    return maskgit.image_grid(as_images(columns.flatten(0, 1)), 12, scale=8, titles=["masked", "filled", "truth"] * 4)


def draw_generation(model, prior, device):
    """Frames of 12 images that are filled in from nothing."""
    nothing = torch.full((12, prior.shape[1]), MASK_ID)
    trace = [(nothing, nothing == MASK_ID)]
    fill(model, *trace[0], device, trace=trace)
    return [maskgit.image_grid(as_images(tokens), 6, scale=12) for tokens, _ in trace]


def train_model(settings, prior, device, out=None):
    """A trained MaskGIT, and the rows of its log with the expected cross-entropy on unseen masks in each."""

    def validate(model):
        result = score(model, prior, settings.mask, VALIDATION_COUNT, VALIDATION_SEED)
        return {"cross_entropy": result["cross_entropy"]}

    batch, may_change = make_batch(prior, settings), ("preset", "completions", "draws")
    return maskgit.train_as_set(settings, 2, batch, device, out=out, may_change=may_change, validate=validate)


def run(settings):
    device, out = maskgit.open_run(settings), settings.out
    prior = all_squares(settings.grid, settings.min_side, settings.max_side)
    model, history = train_model(settings, prior, device, out)
    if maskgit.process_rank()[0] > 0:
        return
    trained = time.monotonic()
    tasks = {kind: score(model, prior, kind, TEST_COUNT, TEST_SEED) for kind in dict.fromkeys([settings.mask, *TASKS])}
    inputs, compare = completion_inputs(prior), functools.partial(compare_orders, model, prior, device)
    completions = compare(inputs, [("entropy", "budget 0.001", {"order": maskgit.by_entropy})], settings.draws)
    papers = ("confidence", "16 steps", {"order": maskgit.by_confidence, "steps": 16})
    completions += compare({"nothing": inputs["nothing"]}, [papers], settings.draws)

    names = {"training batches": "loss", "unseen masks": "cross_entropy"}
    curves = {name: ([row["step"] for row in history], [row[key] for row in history]) for name, key in names.items()}
    limit = score(model, prior, settings.mask, VALIDATION_COUNT, VALIDATION_SEED)["limit"]
    labels = {"x_label": "step", "y_label": "cross-entropy, nats per hidden pixel"}
    labels |= {"title": f"Squares, {TASKS.get(settings.mask, settings.mask)}"}
    plot = maskgit.line_plot(curves, **labels, references={"posterior, unseen masks": limit}, log_y=True)
    plot.save(out / "loss.png")
    maskgit.image_grid(as_images(prior), 18, scale=4).save(out / "prior.png")
    draw_samples(model, prior, device).save(out / "samples.png")
    maskgit.save_gif(out / "decode.gif", draw_generation(model, prior, device))
    seconds = {"train": round(history[-1]["seconds"], 1), "scores": round(time.monotonic() - trained, 1)}
    figures = {"seconds": seconds, "images": len(prior), "parameters": sum(p.numel() for p in model.parameters())}
    figures |= {"tasks": tasks, "completions": completions}
    maskgit.write_figures(settings, figures, out / "metrics.json", settings.json)

    head = ["task", "KL", "cross-entropy", "limit", "accuracy", "limit", "source"]
    line = "{kl:.5f}|{cross_entropy:.4f}|{limit:.4f}|{accuracy:.2%}|{posterior_accuracy:.2%}"
    rows = [
        [TASKS.get(kind, kind), *line.format(**row).split("|"), SOURCES.get(kind, "")] for kind, row in tasks.items()
    ]
    maskgit.print_table(head, rows)
    print_completions(completions)
    print(f"trained in {seconds['train']} s, scored in {seconds['scores']} s")
    print("pictures:", *(str(out / name) for name in ("samples.png", "decode.gif", "loss.png", "prior.png")))


# ---------------------------------------------------------------------------------------------------
# All orders compared


def run_completions(settings):
    """Every order and setting with the model in --out, beside exact marginals; writes completions.json and .png."""
    decoders, device, started = decodings(settings.completions), maskgit.pick_device(settings.device), time.monotonic()
    checkpoint = maskgit.load_checkpoint(settings.out / "model.pt", device)
    prior = all_squares(*(checkpoint["config"][name] for name in ("grid", "min_side", "max_side")))
    inputs = {name: completion_inputs(prior)[name] for name in ("nothing", "left half")}
    rows = compare_orders(checkpoint["model"], prior, device, inputs, decoders, settings.draws)
    figures = {"completions": rows, "seconds": round(time.monotonic() - started)}
    maskgit.write_figures(settings, figures, settings.out / "completions.json", settings.json)
    shown, plots = [row for row in rows if row["given"] == "nothing"], []
    labels = {"x_label": "network calls per image", "y_label": "total variation from the uniform prior"}
    for marginals in ("exact", "model"):
        curves = {}
        for order, each in itertools.groupby(shown, lambda row: row["order"]):
            points = sorted((row[marginals]["calls"], row[marginals]["total_variation"]) for row in each)
            curves[order] = zip(*points, strict=True)
        plot = maskgit.line_plot(curves, title=f"Squares from nothing, {marginals} marginals", **labels, log_x=True)
        plots.append(np.asarray(plot) / 255)
    maskgit.image_grid(np.stack(plots), 2).save(settings.out / "completions.png")
    print_completions(shown)


# ---------------------------------------------------------------------------------------------------
# Settings

# S1 gives no batch size, learning rate or number of epochs; S2 no batch size, norm, head or positions.
# A batch here is each image once, S1 takes its rate and epochs from S2, and S2 takes S1's block but a head
# and positions that can tell the pixels apart. Neither mentions warm-up, decay, clipping or weight decay.
REPORTED = dict(layers=6, heads=8, dropout=0.1, norm="post", optimizer="adamw", lr=1e-5, epochs=300)
REPORTED |= dict(warmup=0, decay="constant", clip=math.inf, weight_decay=0.0, rotary=False, on_policy=0.0)
POST1 = dict(dim=768, hidden=3072, head="cosine", positions="printed", mask="cosine")
POST1 |= dict(min_side=2, max_side=5, presentations=1, batch_size=126)
POST2 = dict(dim=640, hidden=1600, head="linear", positions="split", mask="0.2")
POST2 |= dict(min_side=1, max_side=4, presentations=40, batch_size=174)
PRESETS = {"post1": REPORTED | POST1, "post2": REPORTED | POST2}


def parse_arguments():
    parser, count = maskgit.CommandLine(__doc__), maskgit.at_least(1)
    add = parser.add_argument_group("what to do").add_argument
    add("--preset", choices=PRESETS, help="S1's or S2's hyper-parameters; flags given beside it win")
    help = "compare all decoding orders with the model in --out, and those of a Python file's dict ORDERS"
    add("--completions", metavar="FILE", nargs="?", const="", help=help)
    add("--draws", type=maskgit.at_least(20), default=1000, help="completions behind a count, default %(default)s")
    add = parser.add_argument_group("images").add_argument
    add("--grid", type=count, default=8, help="pixels per side")
    add("--min-side", type=count, default=2)
    add("--max-side", type=count, default=5, help="included: 2 to 5 are S1's 126 images, 2 to 6 are 135")
    add("--epochs", type=count, help="instead of --steps; one epoch shows every image --presentations times")
    add("--presentations", type=count, default=1)
    parser.add_shared_options("runs/squares")
    parser.set_defaults(mask="cosine+cosine+half+1", on_policy=0.5)
    parser.set_defaults(dim=64, heads=4, layers=4, hidden=256, batch_size=126, lr=6e-3)
    parser.set_defaults(**PRESETS.get(parser.parse_known_args()[0].preset, {}))
    settings = parser.parse_args()
    if settings.steps is None:
        images = len(all_squares(settings.grid, settings.min_side, settings.max_side))
        shown = (settings.epochs or 0) * settings.presentations * images
        settings.steps = math.ceil(shown / settings.batch_size) or 3400
    return settings


def main():
    settings = parse_arguments()
    (run if settings.completions is None else run_completions)(settings)


if __name__ == "__main__":
    maskgit.run_as_script(main)
