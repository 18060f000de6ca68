"""S1's and S2's squares: black and white 8x8 images with one filled square, and a prior so small that the
best possible answer to every question can be computed.

    python train_squares.py                                  the default: 4 minutes on 2 CPU cores
    python train_squares.py --preset post2 --device cuda     S2's sizes (post1: S1's), for a GPU
    python train_squares.py --resume                         go on with an interrupted run

A run leaves model.pt, log.csv, metrics.json and its pictures in runs/squares (--out).
"""

import functools
import hashlib
import itertools
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import maskgit
import numpy as np
import torch
from maskgit import setting

BLACK = 0
WHITE = 1
MASK_ID = 2
TASKS = {"cosine": "cosine masking", "single": "one masked pixel", "0.2": "20 % masked"}
SOURCES = {"cosine": "S1: does not converge", "single": "S2: essentially perfect", "0.2": "S2: solved"}


@dataclass(frozen=True)
class Squares(maskgit.Experiment):
    """All that decides the weights of a run."""

    grid: int = setting(8, "pixels per side of an image", low=1)
    min_side: int = setting(2, "of a square", low=1)
    max_side: int = setting(5, "included: 2 to 5 are S1's 126 images, 2 to 6 are 135", low=1)
    presentations: int = setting(1, "how often an epoch shows every image", low=1)


# ---------------------------------------------------------------------------------------------------
# The prior and its exact posterior


def all_squares(grid, min_side, max_side):
    """Every image with one filled square of side min_side .. max_side: int64 (M, grid * grid)."""
    if not 1 <= min_side <= max_side <= grid:
        raise maskgit.InputError(f"sides {min_side} to {max_side} do not fit a grid of {grid}; need 1 <= min <= max <= grid")
    images = []
    for side in range(min_side, max_side + 1):
        for top, left in itertools.product(range(grid - side + 1), repeat=2):
            images.append(torch.zeros(grid, grid, dtype=torch.int64))
            images[-1][top : top + side, left : left + side] = WHITE
    return torch.stack(images).flatten(1)


def consistent(prior, tokens, mask):
    """Which images of the prior (M, T) agree with every visible pixel: bool (B, M)."""
    white = ((tokens == WHITE) & ~mask).float()
    black = ((tokens == BLACK) & ~mask).float()
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
VALIDATION_SEED = 10**9
VALIDATION_COUNT = 256
TEST_SEED = 10**9 + 1
TEST_COUNT = 4096


def make_batch(prior, recipe):
    """batch(step) for train(): each epoch shows every image `presentations` times in a random order."""
    coords = pixel_coords(prior)
    size = recipe.batch_size
    epoch_length = len(prior) * recipe.presentations

    @functools.lru_cache(maxsize=4)
    def epoch_order(epoch):
        generator = torch.Generator().manual_seed(maskgit.step_seed(recipe.seed, -1 - epoch))
        return torch.randperm(epoch_length, generator=generator) % len(prior)

    def batch(step):
        first = step * size
        epochs = range(first // epoch_length, (first + size - 1) // epoch_length + 1)
        order = torch.cat([epoch_order(epoch) for epoch in epochs])[first % epoch_length :]
        tokens = prior[order[:size]]
        generator = torch.Generator().manual_seed(maskgit.step_seed(recipe.seed, step))
        return tokens, maskgit.training_mask(tokens.shape, recipe.mask, generator, coords), coords

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
    coords = pixel_coords(prior).to(device)
    inputs = tokens.masked_fill(mask, MASK_ID).split(1024)
    log_probs = torch.cat([model(part.to(device), coords).float().log_softmax(dim=-1).cpu() for part in inputs])[mask]
    truth = torch.stack([1 - white, white], dim=-1)  # (hidden pixels, 2)
    limit = torch.special.entr(truth).sum(dim=-1).mean().item()
    cross_entropy = -(truth * log_probs).sum(dim=-1).mean().item()
    accuracy = truth.gather(-1, log_probs.argmax(dim=-1, keepdim=True)).mean().item()
    result = {"cross_entropy": cross_entropy, "limit": limit, "kl": cross_entropy - limit}
    return result | {"accuracy": accuracy, "posterior_accuracy": truth.amax(dim=-1).mean().item()}


# ---------------------------------------------------------------------------------------------------
# Completions: is the filled image a square, and are all the right ones equally likely?

# Orders that depend on drawn tokens or numbers, such as the paper's, have to be counted: in so many completions.
EXACT_DRAWS = 20_000
MODEL_DRAWS = 1000


def fill(model, tokens, mask, device, **options):
    """The tokens with the hidden ones filled in by decode: (B, T)."""
    options = {"generator": torch.Generator(device).manual_seed(TEST_SEED)} | options
    coords = pixel_coords(tokens).to(device)
    return maskgit.decode(model, tokens.to(device), mask.to(device), coords, **options).cpu()


def completion_inputs(prior):
    """{name: (tokens, mask)} of every image of the prior: nothing is visible, half of the pixels, or a half."""
    x, y = pixel_coords(prior).T
    middle = math.isqrt(prior.shape[1]) / 2
    hidden = {"nothing": x >= 0, "left half": x >= middle, "right half": x < middle}
    hidden |= {"top half": y >= middle, "bottom half": y < middle}
    masks = {name: mask.expand(prior.shape) for name, mask in hidden.items()}
    masks["random half"] = maskgit.random_mask(prior.shape, 0.5, torch.Generator().manual_seed(TEST_SEED))
    return {name: (prior, mask) for name, mask in masks.items()}


def distinct_inputs(tokens, mask):
    """What is shown of each, (b, T) with MASK_ID where hidden, and which of these every input is: (B,)."""
    return tokens.masked_fill(mask, MASK_ID).unique(dim=0, return_inverse=True)


def follow_images(model, prior, tokens, mask, device, order, **options):
    """How likely decode completes each input to each image of the prior, exactly and without drawing one: (B, M); and
    the network calls for each input and image, (B, M).

    For orders that neither look at drawn tokens nor draw numbers themselves. Every image that agrees with its input is
    followed: whatever the order commits takes the image's value, and the probabilities of these multiply."""
    shown, which = distinct_inputs(tokens, mask)
    row, image = consistent(prior, shown, shown == MASK_ID).nonzero(as_tuple=True)
    truth = prior[image].to(device)
    hidden = (shown == MASK_ID)[row]
    chances = []
    trace = []

    def true_tokens(state):
        tokens = truth[state.row, state.place]
        chance = state.log_probs.gather(-1, tokens[:, None])[:, 0].cpu().double()
        at = (state.row.cpu(), state.place.cpu())
        chances.append(torch.zeros(truth.shape, dtype=torch.float64).index_put(at, chance))
        return tokens

    def blind(state):
        try:
            return order(state._replace(tokens=None))
        except (AttributeError, TypeError) as error:
            raise maskgit.InputError(f"an order that looks at drawn tokens cannot be followed: {error}") from None

    generator = torch.Generator(device).manual_seed(TEST_SEED)
    untouched = generator.get_state()
    options |= {"order": blind, "sample": true_tokens, "generator": generator, "trace": trace}
    fill(model, truth, hidden, device, **options)
    if not torch.equal(untouched, generator.get_state()):
        raise maskgit.InputError("an order that draws numbers cannot be followed")
    committed = [chance.masked_fill(left.cpu(), 0) for chance, (_, left) in zip(chances, trace, strict=True)]
    table = torch.zeros(2, len(shown), len(prior), dtype=torch.float64)
    table[0, row, image] = torch.stack(committed).sum(dim=(0, 2)).exp()
    table[1, row, image] = network_calls(hidden, trace)
    found, calls = table[:, which]
    return found, calls


def network_calls(mask, trace):
    """So many decode has made for each image: (B,)."""
    before = [mask.any(dim=1), *(hidden.any(dim=1).cpu() for _, hidden in trace[:-1])]
    return torch.stack(before).sum(dim=0).double()


def count_images(model, prior, tokens, mask, device, draws, **options):
    """The share of each image of the prior in `draws` completions of each distinct input: (B, M); and the network calls
    of each, (B, draws)."""
    shown, which = distinct_inputs(tokens, mask)
    inputs = shown.repeat_interleave(draws, dim=0)
    trace = []
    filled = fill(model, inputs, inputs == MASK_ID, device, **options, trace=trace)
    found = (filled[:, None] == prior).all(dim=-1).double().view(len(shown), draws, len(prior)).mean(dim=1)
    calls = network_calls(inputs == MASK_ID, trace).view(len(shown), draws)
    return found[which], calls[which]


def total_variation(found, truth):
    """Half the summed difference of probabilities (B, M), and of what is left to 1: completions that are no image of
    the prior. Mean over the inputs."""
    return float(((found - truth).abs().sum(dim=1) + 1 - found.sum(dim=1)).mean()) / 2


def agreement(prior, tokens, mask):
    """The exact posterior of the images: (B, M)."""
    agree = consistent(prior, tokens, mask).double()
    return agree / agree.sum(dim=1, keepdim=True)


def judge(found, truth, calls, weights):
    """Completions beside the posterior, both (B, M): valid, the share of those that are an image of the prior; total
    variation; and network calls, whose mean is weighted."""
    result = {"valid": float(found.sum(dim=1).mean()), "total_variation": total_variation(found, truth)}
    return result | {"calls": float((calls * weights).sum() / weights.sum()), "most_calls": int(calls.max())}


def judge_followed(model, prior, tokens, mask, device, **options):
    """Exactly, of an order that can be followed; with the KL divergence of the completions from the posterior."""
    truth = agreement(prior, tokens, mask)
    found, calls = follow_images(model, prior, tokens, mask, device, **options)
    kl = float((truth * (truth / found).log()).nansum(dim=1).mean().clamp(min=0))
    return {"kl": kl} | judge(found, truth, calls, found)


def judge_counted(model, prior, tokens, mask, device, draws, **options):
    """By so many completions, spread over the distinct inputs; with exact_sampling, the total variation that as many
    draws from the posterior itself would show."""
    shown, which = distinct_inputs(tokens, mask)
    each = math.ceil(draws / len(shown))
    found, calls = count_images(model, prior, tokens, mask, device, each, **options)
    truth = agreement(prior, tokens, mask)
    exact = np.random.default_rng(0).multinomial(
        each, agreement(prior, shown, shown == MASK_ID), size=(100, len(shown))
    )
    exact = torch.from_numpy(exact / each)[:, which].flatten(0, 1)
    result = {"draws": each * len(shown), "exact_sampling": total_variation(exact, truth.repeat(100, 1))}
    return result | judge(found, truth, calls, torch.ones_like(calls))


def score_completions(model, prior, device):
    """A row per input, and one for the paper's order from nothing: with the exact posterior's marginals in the model's
    place, and with the model's."""
    rows = []
    exact = ExactModel(prior.to(device))
    inputs = completion_inputs(prior)
    for given, start in inputs.items():
        row = {"given": given, "order": "entropy", "setting": "budget 0.001"}
        for name, marginals in (("exact", exact), ("model", model)):
            row[name] = judge_followed(marginals, prior, *start, device, order=maskgit.by_entropy)
        rows.append(row)
    papers = {"given": "nothing", "order": "confidence", "setting": "16 steps"}
    for name, marginals, draws in (("exact", exact, EXACT_DRAWS), ("model", model, MODEL_DRAWS)):
        options = dict(order=maskgit.by_confidence, steps=16)
        papers[name] = judge_counted(marginals, prior, *inputs["nothing"], device, draws, **options)
    return [*rows, papers]


def print_completions(rows):
    """Exact marginals, then the trained model's. KL is nan where completions were counted."""
    table = []
    for row in rows:
        table.append([row["order"], row["setting"], row["given"]])
        for found in (row["exact"], row["model"]):
            table[-1] += [f"{found['valid']:.1%}", f"{found['total_variation']:.3f}"]
            table[-1] += [f"{found.get('kl', math.nan):.3f}", f"{found['calls']:.1f}"]
    columns = ["total variation", "KL", "calls"]
    maskgit.print_table(["completions", "setting", "given", "exact: valid", *columns, "model: valid", *columns], table)


# ---------------------------------------------------------------------------------------------------
# One run, and its pictures


def as_images(tokens):
    """Tokens (B, T) as images (B, side, side, 1): black, white, and grey where hidden."""
    side = math.isqrt(tokens.shape[1])
    return np.array([0.0, 1.0, 0.5], dtype=np.float32)[tokens.cpu().numpy()].reshape(-1, side, side, 1)


def paint_samples(model, prior, device):
    """Masked, filled, truth: a row each for S2's 20 %, cosine masking, half of the pixels, a half."""
    generator = torch.Generator().manual_seed(TEST_SEED)
    truth = prior[torch.randint(len(prior), (16,), generator=generator)]
    mask = maskgit.training_mask(truth.shape, "0.2+cosine+0.5+half", generator, pixel_coords(prior))
    filled = fill(model, truth, mask, device)
    columns = torch.stack([truth.masked_fill(mask, MASK_ID), filled, truth], dim=1)  # (16, 3, T)
    return maskgit.image_grid(as_images(columns.flatten(0, 1)), 12, scale=8, titles=["masked", "filled", "truth"] * 4)


def paint_generation(model, prior, device):
    """Frames of 12 images that are filled in from nothing."""
    nothing = torch.full((12, prior.shape[1]), MASK_ID)
    trace = [(nothing, nothing == MASK_ID)]
    fill(model, *trace[0], device, trace=trace)
    return [maskgit.image_grid(as_images(tokens), 6, scale=12) for tokens, _ in trace]


def paint_loss(history, limit, mask):
    """The loss in training, and the expected cross-entropy on unseen masks beside the posterior's."""
    steps = [row["step"] for row in history]
    curves = {"training batches": (steps, [row["loss"] for row in history])}
    curves["unseen masks"] = (steps, [row["cross_entropy"] for row in history])
    labels = {"title": f"Squares, {TASKS.get(mask, mask)}", "x_label": "step"}
    labels["y_label"] = "cross-entropy, nats per hidden pixel"
    return maskgit.line_plot(curves, **labels, references={"posterior, unseen masks": limit}, log_y=True)


def train_model(recipe, prior, device, **options):
    """A trained MaskGIT, and the rows of its log with the expected cross-entropy on unseen masks in each."""

    def validate(model):
        result = score(model, prior, recipe.mask, VALIDATION_COUNT, VALIDATION_SEED)
        return {"cross_entropy": result["cross_entropy"]}

    model = recipe.new_model(2, device)
    return model, maskgit.train(model, make_batch(prior, recipe), recipe, validate=validate, **options)


DEFAULTS = dict(steps=1500, batch_size=126, layers=8, hidden=64, mask="cosine+cosine+cosine+half", lr=6e-3)
# S1 gives no batch size, learning rate or number of epochs; S2 no batch size, norm, head or positions.
# A batch here is each image once, S1 takes its rate and epochs (300) from S2, and S2 takes S1's block but a head
# and positions that can tell the pixels apart. Neither mentions warm-up, decay, clipping or weight decay.
REPORTED = dict(layers=6, heads=8, dropout=0.1, norm="post", optimizer="adamw", lr=1e-5)
REPORTED |= dict(warmup=0, decay="constant", clip=math.inf, rotary=False)
POST1 = dict(dim=768, hidden=3072, head="cosine", positions="printed", mask="cosine")
POST1 |= dict(steps=300, batch_size=126)
POST2 = dict(dim=640, hidden=1600, mask="0.2")
POST2 |= dict(min_side=1, max_side=4, presentations=40, steps=300 * 40, batch_size=174)
PRESETS = {"post1": REPORTED | POST1, "post2": REPORTED | POST2}


def parse_arguments():
    """The command line, and the recipe in it."""
    parser = maskgit.CommandLine(__doc__)
    parser.add_argument("--preset", choices=PRESETS, help="S1's or S2's hyper-parameters; flags given beside it win")
    maskgit.add_run_flags(parser, "runs/squares")
    parser.add_argument("--weights", type=Path, help="write the model to this file, without its training")
    maskgit.add_flags(parser, Squares, **DEFAULTS)
    arguments = parser.parse_with(lambda given: PRESETS.get(given.preset, {}))
    return arguments, maskgit.settings_from(arguments, Squares)


def main():
    record = maskgit.run_record()
    arguments, recipe = parse_arguments()
    maskgit.require_no_run(arguments.out, arguments.resume, arguments.force)
    device = maskgit.pick_device(arguments.device)
    recipe = recipe.for_device(device)
    out = arguments.out
    prior = all_squares(recipe.grid, recipe.min_side, recipe.max_side)
    model, history = train_model(recipe, prior, device, out=out, resume=arguments.resume, force=arguments.force)
    if maskgit.process_rank()[0] > 0:
        return
    trained = time.monotonic()
    tasks = {kind: score(model, prior, kind, TEST_COUNT, TEST_SEED) for kind in dict.fromkeys([recipe.mask, *TASKS])}
    completions = score_completions(model, prior, device)
    seconds = {"train": round(history[-1]["seconds"], 1), "scores": round(time.monotonic() - trained, 1)}
    figures = {"seconds": seconds, "images": len(prior), "parameters": sum(p.numel() for p in model.parameters())}
    figures |= {"tasks": tasks, "completions": completions}
    if arguments.weights:
        maskgit.save_checkpoint(arguments.weights, model, config=asdict(recipe), step=recipe.steps)
        figures["weights_sha256"] = hashlib.sha256(arguments.weights.read_bytes()).hexdigest()
    maskgit.write_figures(record, vars(arguments) | asdict(recipe), figures, out / "metrics.json", arguments.json)

    limit = score(model, prior, recipe.mask, VALIDATION_COUNT, VALIDATION_SEED)["limit"]
    paint_loss(history, limit, recipe.mask).save(out / "loss.png")
    maskgit.image_grid(as_images(prior), 18, scale=4).save(out / "prior.png")
    paint_samples(model, prior, device).save(out / "samples.png")
    maskgit.save_gif(out / "decode.gif", paint_generation(model, prior, device))

    table = []
    for kind, row in tasks.items():
        table.append([TASKS.get(kind, kind), f"{row['kl']:.5f}", f"{row['cross_entropy']:.4f}", f"{row['limit']:.4f}"])
        table[-1] += [f"{row['accuracy']:.2%}", f"{row['posterior_accuracy']:.2%}", SOURCES.get(kind, "")]
    maskgit.print_table(["task", "KL", "cross-entropy", "limit", "accuracy", "limit", "source"], table)
    print_completions(completions)
    print(f"trained in {seconds['train']} s, scored in {seconds['scores']} s")
    print("pictures:", *(str(out / name) for name in ("samples.png", "decode.gif", "loss.png", "prior.png")))


if __name__ == "__main__":
    maskgit.run_as_script(main)
