"""S1's and S2's squares (sources: see maskgit.py): black and white 8x8 images with one filled square, and a prior so
small that the best possible answer to every question can be computed.

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

import maskgit
import numpy as np
import torch
from maskgit import setting

BLACK = 0
WHITE = 1
MASK_ID = 2
TASKS = {"cosine": "cosine masking", "single": "one masked pixel", "0.2": "20 % masked"}
REPORTS = {"cosine": "S1: does not seem to work", "single": "S2: essentially perfect", "0.2": "S2: solved"}


@dataclass(frozen=True)
class Squares(maskgit.Experiment):
    """All that decides the weights of a run."""

    grid: int = setting(8, "pixels per side of an image", low=1)
    min_side: int = setting(2, "of a square", low=1)
    max_side: int = setting(5, "included: 2 to 5 are S1's 126 images", low=1)
    presentations: int = setting(1, "how often an epoch shows every image", low=1)


# ---------------------------------------------------------------------------------------------------
# The prior and its exact posterior


def all_squares(grid, min_side, max_side):
    """Every image with one filled square of side min_side .. max_side: int64 (M, grid * grid)."""
    if not 1 <= min_side <= max_side <= grid:
        raise maskgit.InputError(f"need 1 <= min side <= max side <= grid, not {min_side}, {max_side} and {grid}")
    images = []
    for side in range(min_side, max_side + 1):
        for top, left in itertools.product(range(grid - side + 1), repeat=2):
            images.append(torch.zeros(grid, grid, dtype=torch.int64))
            images[-1][top : top + side, left : left + side] = WHITE
    return torch.stack(images).flatten(1)


def agreeing(prior, shown):
    """Which images of the prior (M, T) agree with all that is shown (B, T), MASK_ID where hidden: bool (B, M)."""
    white = (shown == WHITE).float()
    black = (shown == BLACK).float()
    disagreeing = black @ prior.T.float() + white @ (1 - prior).T.float()
    return disagreeing == 0


def posterior(prior, shown):
    """The exact probability of white at every pixel: the mean of all images of the prior that agree with what is shown,
    or 0 if none does, as after a wrong draw. (B, T)"""
    agree = agreeing(prior, shown).float()
    return agree @ prior.float() / agree.sum(dim=1, keepdim=True).clamp(min=1)


def image_posterior(prior, shown):
    """The exact probability of every image of the prior, some of which agree with what is shown: (B, M)."""
    agree = agreeing(prior, shown).double()
    return agree / agree.sum(dim=1, keepdim=True)


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
        white = posterior(self.prior, tokens)
        return torch.stack([1 - white, white], dim=-1).log()


# ---------------------------------------------------------------------------------------------------
# Training data, and scores against the posterior

# No training run draws its masks from these seeds.
VALIDATION_SEED = 10**9
VALIDATION_COUNT = 256
TEST_SEED = 10**9 + 1
TEST_COUNT = 4096


def make_batch(prior, recipe):
    """batch(step) for train(): each epoch shows every image `presentations` times in a random order."""
    coords = pixel_coords(prior)
    length = len(prior) * recipe.presentations  # of an epoch

    @functools.lru_cache(maxsize=4)
    def epoch_order(epoch):
        generator = torch.Generator().manual_seed(maskgit.step_seed(recipe.seed, -1 - epoch))  # -1, -2, ...: no step's
        return (torch.randperm(length, generator=generator) % len(prior)).tolist()

    def batch(step):
        places = range(step * recipe.batch_size, (step + 1) * recipe.batch_size)  # in the sequence of all epochs
        tokens = prior[[epoch_order(i // length)[i % length] for i in places]]
        generator = torch.Generator().manual_seed(maskgit.step_seed(recipe.seed, step))
        return tokens, maskgit.training_mask(tokens.shape, recipe.mask, generator, coords), coords

    return batch


def test_set(prior, kind, count, seed):
    """Tokens (count, T), mask (count, T), and the exact probability of white at each hidden pixel."""
    generator = torch.Generator().manual_seed(seed)
    tokens = prior[torch.randint(len(prior), (count,), generator=generator)]
    mask = maskgit.training_mask(tokens.shape, kind, generator, pixel_coords(prior))
    return tokens, mask, posterior(prior, tokens.masked_fill(mask, MASK_ID))[mask]


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


def fill(model, shown, device, **options):
    """Fill in, by decode, what is hidden; returns [(tokens, mask)] before the first step and after each: (B, T) all."""
    tokens = shown.to(device)
    mask = tokens == MASK_ID
    states = [(tokens, mask)]
    generator = torch.Generator(device).manual_seed(TEST_SEED)
    maskgit.decode(model, tokens, mask, pixel_coords(tokens).to(device), generator=generator, trace=states, **options)
    return [(tokens.cpu(), mask.cpu()) for tokens, mask in states]


def network_calls(states):
    """How many decode made for each image on the way through these states: (B,)."""
    return torch.stack([mask.any(dim=1) for _, mask in states]).sum(dim=0).double()


def completion_inputs(prior):
    """{what is shown: every image of the prior, with MASK_ID where hidden}, of (M, T) each."""
    x, y = pixel_coords(prior).T
    middle = math.isqrt(prior.shape[1]) / 2
    visible = {"nothing": torch.zeros_like(x, dtype=torch.bool), "left half": x < middle, "right half": x >= middle}
    visible |= {"top half": y < middle, "bottom half": y >= middle}
    visible["random half"] = ~maskgit.random_mask(prior.shape, 0.5, torch.Generator().manual_seed(TEST_SEED))
    return {name: prior.masked_fill(~region, MASK_ID) for name, region in visible.items()}


def follow_images(model, prior, shown, device, order, **options):
    """The probability with which decode completes each input to each image of the prior, exactly and without drawing
    one; and the network calls on the way there: (B, M) both. Every image that agrees with an input is followed:
    whatever the order commits takes the image's value, and the probabilities of these values multiply. The order may
    neither look at drawn tokens nor draw numbers."""
    distinct, which = shown.unique(dim=0, return_inverse=True)
    given, image = agreeing(prior, distinct).nonzero(as_tuple=True)
    truth = prior[image].to(device)  # (n, T): where each of the n pairs of input and image ends
    log_probs = torch.zeros(truth.shape, device=device)

    def follow(state):
        tokens = truth[state.row, state.place]
        # A later step overwrites those that are not committed in this one.
        log_probs[state.row, state.place] = state.log_probs.gather(-1, tokens[:, None])[:, 0]
        return tokens

    def blind_order(state):
        return order(state._replace(tokens=None, generator="none"))  # using either fails; None is the global generator

    states = fill(model, distinct[given], device, order=blind_order, sample=follow, **options)
    found, calls = torch.zeros(2, len(distinct), len(prior), dtype=torch.float64)
    found[given, image] = log_probs.cpu().double().sum(dim=1).exp()
    calls[given, image] = network_calls(states)
    return found[which], calls[which]


def total_variation(found, truth):
    """Half the summed difference of the probabilities (..., B, M) of the images and of one more outcome, a completion
    that is none of them. Mean over the inputs."""
    return float(((found - truth).abs().sum(dim=-1) + 1 - found.sum(dim=-1)).mean()) / 2


def judge(found, truth, calls, weights):
    """Completions beside the posterior, both (B, M): valid, the share of those that are an image of the prior; total
    variation; and network calls, averaged by `weights`: a followed completion's probability, or 1 for a counted one."""
    result = {"valid": float(found.sum(dim=1).mean()), "total_variation": total_variation(found, truth)}
    return result | {"calls": float((calls * weights).sum() / weights.sum()), "most_calls": int(calls.max())}


def judge_followed(model, prior, shown, device, **options):
    """judge's figures, exact, of an order that can be followed; and the KL divergence from the posterior."""
    truth = image_posterior(prior, shown)
    found, calls = follow_images(model, prior, shown, device, **options)
    ratio = torch.where(truth > 0, truth / found, 1)
    kl = (truth * ratio.log()).sum(dim=1).mean().clamp(min=0)  # rounding
    return {"kl": float(kl)} | judge(found, truth, calls, found)


# Completions drawn where they cannot be followed, with exact marginals and with the model.
EXACT_DRAWS = 20_000
MODEL_DRAWS = 1000


def judge_counted(model, prior, shown, device, draws, **options):
    """judge's figures from about `draws` completions, as many of each distinct input; and exact_sampling, the total
    variation that as many draws from the posterior itself would show, on average over 100 tries."""
    distinct, which = shown.unique(dim=0, return_inverse=True)
    each = math.ceil(draws / len(distinct))
    states = fill(model, distinct.repeat_interleave(each, dim=0), device, **options)
    filled = states[-1][0].view(len(distinct), each, 1, -1)
    found = (filled == prior).all(dim=-1).double().mean(dim=1)[which]  # (B, M): shares
    calls = network_calls(states).view(len(distinct), each)[which]
    truth = image_posterior(prior, shown)
    tries = np.random.default_rng(0).multinomial(each, image_posterior(prior, distinct), size=(100, len(distinct)))
    exact = torch.from_numpy(tries / each)[:, which]  # (100, B, M): shares
    result = {"draws": each * len(distinct), "exact_sampling": total_variation(exact, truth)}
    return result | judge(found, truth, calls, torch.ones_like(calls))


def score_completions(model, prior, device):
    """A row per input, and one for the paper's order from nothing: with exact marginals, and with the model's."""
    rows = []
    exact = ExactModel(prior.to(device))
    inputs = completion_inputs(prior)
    order = functools.partial(maskgit.by_entropy, budget=0.001)
    for given, shown in inputs.items():
        row = {"given": given, "order": "entropy", "setting": "budget 0.001"}
        row["exact"] = judge_followed(exact, prior, shown, device, order=order)
        row["model"] = judge_followed(model, prior, shown, device, order=order)
        rows.append(row)
    row = {"given": "nothing", "order": "confidence", "setting": "16 steps"}
    papers = dict(order=maskgit.by_confidence, steps=16)
    row["exact"] = judge_counted(exact, prior, inputs["nothing"], device, EXACT_DRAWS, **papers)
    row["model"] = judge_counted(model, prior, inputs["nothing"], device, MODEL_DRAWS, **papers)
    return [*rows, row]


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
    """Masked, filled, truth: four images in a row, and a row for each kind of mask: S2's 20 %, cosine masking, any half
    of the pixels, all of one side."""
    generator = torch.Generator().manual_seed(TEST_SEED)
    truth = prior[torch.randint(len(prior), (16,), generator=generator)]
    mask = maskgit.training_mask(truth.shape, "0.2+cosine+0.5+half", generator, pixel_coords(prior))
    states = fill(model, truth.masked_fill(mask, MASK_ID), device)
    columns = torch.stack([states[0][0], states[-1][0], truth], dim=1)  # (16, 3, T)
    return maskgit.image_grid(as_images(columns.flatten(0, 1)), 12, scale=8, titles=["masked", "filled", "truth"] * 4)


def paint_generation(model, prior, device):
    """Frames of 12 images that are filled in from nothing."""
    states = fill(model, torch.full((12, prior.shape[1]), MASK_ID), device)
    return [maskgit.image_grid(as_images(tokens), 6, scale=12) for tokens, _ in states]


def paint_loss(history, limit):
    """The loss in training, and the expected cross-entropy on unseen masks beside the posterior's."""
    steps = [row["step"] for row in history]
    curves = {"training batches": (steps, [row["loss"] for row in history])}
    curves["unseen masks"] = (steps, [row["cross_entropy"] for row in history])
    curves["posterior, unseen masks"] = (steps, [limit] * len(steps))
    labels = dict(title="Squares: loss", y_label="cross-entropy, nats per hidden pixel")
    return maskgit.line_plot(curves, **labels)


def train_model(recipe, prior, device, **options):
    """A trained MaskGIT, and the rows of its log with the expected cross-entropy on unseen masks in each."""

    def validate(model):
        return {"cross_entropy": score(model, prior, recipe.mask, VALIDATION_COUNT, VALIDATION_SEED)["cross_entropy"]}

    model = recipe.new_model(2, device)
    return model, maskgit.train(model, make_batch(prior, recipe), recipe, validate=validate, **options)


DEFAULTS = dict(steps=1500, batch_size=126, layers=8, hidden=64, mask="cosine+cosine+cosine+half", lr=6e-3)

# What S1 and S2 report. S1 gives no batch size, learning rate or number of epochs; S2 no batch size, norm, head or
# positions. So a batch is each image once, S1 takes its rate and epochs (300) from S2, and S2 takes S1's block but a
# head and positions that can tell the pixels apart. Neither mentions warm-up, decay, clipping or weight decay.
REPORTED = dict(layers=6, heads=8, dropout=0.1, norm="post", optimizer="adamw", lr=1e-5)
REPORTED |= dict(warmup=0, decay="constant", clip=math.inf, rotary=False)
POST1 = dict(dim=768, hidden=3072, head="cosine", positions="printed", mask="cosine", steps=300, batch_size=126)
POST2 = dict(dim=640, hidden=1600, mask="0.2", steps=300 * 40, batch_size=174)
POST2 |= dict(min_side=1, max_side=4, presentations=40)
PRESETS = {"post1": REPORTED | POST1, "post2": REPORTED | POST2}


def parse_arguments():
    """The command line, and the recipe in it."""
    parser = maskgit.CommandLine(__doc__)
    parser.add_argument("--preset", choices=PRESETS, help="S1's or S2's hyper-parameters; flags given beside it win")
    maskgit.add_run_flags(parser, "runs/squares")
    parser.add_argument("--weights", type=maskgit.new_file, help="write the model to this file, without its training")
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

    limit = score(model, prior, recipe.mask, VALIDATION_COUNT, VALIDATION_SEED)["limit"]
    paint_loss(history, limit).save(out / "loss.png")
    maskgit.image_grid(as_images(prior), 18, scale=4).save(out / "prior.png")
    paint_samples(model, prior, device).save(out / "samples.png")
    maskgit.save_gif(out / "decode.gif", paint_generation(model, prior, device))

    table = []
    for kind, row in tasks.items():
        name = TASKS.get(kind, "as in training")
        table.append([name, f"{row['kl']:.5f}", f"{row['cross_entropy']:.4f}", f"{row['limit']:.4f}"])
        table[-1] += [f"{row['accuracy']:.2%}", f"{row['posterior_accuracy']:.2%}", REPORTS.get(kind, "")]
    maskgit.print_table(["task", "KL", "cross-entropy", "limit", "accuracy", "limit", "reported"], table)
    print_completions(completions)
    print(f"trained in {seconds['train']} s, scored in {seconds['scores']} s")
    print("pictures:", *(str(out / name) for name in ("samples.png", "decode.gif", "loss.png", "prior.png")))
    if arguments.weights:
        maskgit.save_checkpoint(arguments.weights, model, config=asdict(recipe), step=recipe.steps)
        figures["weights_sha256"] = hashlib.sha256(arguments.weights.read_bytes()).hexdigest()  # a test compares them
    maskgit.write_figures(record, vars(arguments) | asdict(recipe), figures, out / "metrics.json", arguments.json)


if __name__ == "__main__":
    maskgit.run_as_script(main)
