"""S2's rectangles (sources: see maskgit.py): black and white images of one filled rectangle, as tokens of 4x4 patches.

    python train_rectangles.py --task grid        all 169 overlapping patches of a 16x16 image
    python train_rectangles.py --task sparse      24 patches at continuous coordinates
    python train_rectangles.py --task sparse --rectangles 100 --fixed-points --out runs/rectangles_100    S2's failure

A run is scored on rectangles that training never saw, the sparse task also on those of --rectangles, beside the
posterior: the chance of each token given the visible ones, counted in exact draws of rectangles that agree with them.
A run leaves model.pt, log.csv, metrics.json and its pictures in runs/rectangles_grid or runs/rectangles_sparse (--out).
"""

import functools
import itertools
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import maskgit
import numpy as np
import torch
from maskgit import InputError, setting
from PIL import Image, ImageDraw

SIZE = 16  # cells per side of an image
PATCH = 4  # cells per side of a patch
MIN_SIDE = 2  # cells per side of the smallest rectangle
PIXELS = 16  # pixels of S2's 256x256 images per side of a cell
CODES = 20  # S2's
GRID_SIDE = SIZE - PATCH + 1
GRID_POINTS = maskgit.grid_coords(GRID_SIDE, GRID_SIDE).numpy()  # (169, 2)
# Rectangles that no training run draws, unless its seed is as large.
VALIDATION_SEED = 10**9
TEST_SEED = 10**9 + 1
VALIDATION_COUNT = {"grid": 64, "sparse": 500}
# On validation rectangles a larger budget than decode's own completed more grids to rectangles, in fewer calls.
ORDER = functools.partial(maskgit.by_entropy, budget=0.3)
SCALE = 12  # pixels per side of a cell in samples.png
GREY = 0.7
RED = (220, 40, 40)
ORANGE = (240, 150, 20)


@dataclass(frozen=True)
class Rectangles(maskgit.Experiment):
    """All that decides the weights of a run."""

    task: str = setting("grid", "all patches of a grid, or some anywhere", choices=("grid", "sparse"))
    rectangles: int = setting(0, "train on so many (S2: 100); 0: on fresh ones at every step", low=0)
    fixed_points: bool = setting(False, "each of those always with the same points (S2)")
    points: int = setting(24, "patches of a training image in the sparse task", low=2)

    def __post_init__(self):
        super().__post_init__()
        if self.fixed_points and not self.rectangles:
            raise InputError("fixed points need a number of rectangles")
        if self.task == "grid" and (self.fixed_points or self.points != 24):
            raise InputError("points and fixed points are for the sparse task")


# ---------------------------------------------------------------------------------------------------
# Rectangles and their patches. A rectangle is x0, y0, x1, y1 in cells.


def draw_rectangles(count, seed, task):
    """Rectangles (count, 4) from two uniform corners, those less than MIN_SIDE apart on an axis drawn again. The
    corners of the grid task lie on pixels, those of the sparse task anywhere. seed may be a numpy generator."""
    rng = np.random.default_rng(seed)
    shape = (2 * count, 2, 2)  # two corners each; about 59 % are kept
    kept = np.empty((0, 4))
    while len(kept) < count:
        if task == "grid":
            corners = rng.integers(SIZE * PIXELS, size=shape, endpoint=True) / PIXELS
        else:
            corners = SIZE * rng.random(shape)
        rectangles = np.sort(corners, axis=1).reshape(-1, 4)
        kept = np.concatenate([kept, rectangles[possible(rectangles)]])
    return kept[:count]


def possible(rectangles):
    """Whether rectangles (B, 4) lie in the image, corners in order and sides long enough: (B,)."""
    low, high = rectangles[:, :2], rectangles[:, 2:]
    return ((low >= 0) & (high <= SIZE) & (high - low >= MIN_SIDE)).all(axis=1)


def coverage(rectangles, points, size=PATCH):
    """The covered share of each cell of the size x size patches with their top left corners at `points`, exactly:
    rectangles (B, 4), points (T, 2) or (B, T, 2), any real numbers -> (B, T, size * size) float32, row by row."""
    cells = points[..., None, :] + np.arange(size)[:, None]  # (T or B, T, size, 2): their lower edges on both axes
    low = np.maximum(cells, rectangles[:, None, None, :2])
    high = np.minimum(cells + 1, rectangles[:, None, None, 2:])
    covered = (high - low).clip(min=0).astype(np.float32)  # (B, T, size, 2)
    return (covered[..., :, None, 1] * covered[..., None, :, 0]).reshape(*covered.shape[:2], size * size)


def paint_rectangles(rectangles, size=SIZE):
    """Rectangles (B, 4) as images of size x size cells: (B, size, size, 1)."""
    return coverage(rectangles, np.zeros((1, 2)), size).reshape(-1, size, size, 1)


def fit_tokenizer(seed):
    """S2's codebook: the overlapping patches of 100 rectangles, in 20 clusters."""
    images = paint_rectangles(draw_rectangles(100, seed, "grid"))
    return maskgit.PatchTokenizer.fit(images, CODES, PATCH, stride=1, seed=seed, restarts=5)


# ---------------------------------------------------------------------------------------------------
# Training data, and the exact posterior


def draw_points(task, rectangles, count, rng):
    """Top left corners (B, T, 2) of patches inside the image: all of the grid, or `count` that are uniform (S2)."""
    if task == "grid":
        return np.tile(GRID_POINTS, (len(rectangles), 1, 1))
    return rng.random((len(rectangles), count, 2)) * (SIZE - PATCH)


def make_batch(tokenizer, recipe):
    """batch(step) for train(): fresh rectangles at every step, or so many that are always the same; fresh points, or
    fixed ones of each rectangle; fresh masks in any case."""
    if recipe.rectangles:  # 100 are those of the codebook (S2); the points come from a stream of their own
        known = draw_rectangles(recipe.rectangles, recipe.seed, "grid")
        known_points = draw_points(recipe.task, known, recipe.points, np.random.default_rng([recipe.seed, 2]))

    def batch(step):
        seed = maskgit.step_seed(recipe.seed, step)
        rng = np.random.default_rng(seed)
        if recipe.rectangles:
            rows = rng.integers(len(known), size=recipe.batch_size)
            rectangles = known[rows]
        else:
            rectangles = draw_rectangles(recipe.batch_size, rng, recipe.task)
        points = known_points[rows] if recipe.fixed_points else draw_points(recipe.task, rectangles, recipe.points, rng)
        tokens = torch.from_numpy(tokenizer.nearest(coverage(rectangles, points)))
        coords = torch.from_numpy(GRID_POINTS if recipe.task == "grid" else points).float()
        mask = maskgit.training_mask(tokens.shape, recipe.mask, torch.Generator().manual_seed(seed), coords)
        return tokens, mask, coords

    return batch


def posterior_chain(rectangles, points, mask, tokenizer, rng, task):
    """An endless chain of rectangles (B, 4) and their tokens (B, T), which agree with those of the given rectangles
    wherever mask is False. A rectangle is itself an exact draw from the posterior given its own visible tokens.
    Starting there, symmetric proposals, kept if all visible tokens stay as they are (Metropolis, uniform prior), leave
    every state such a draw. A proposal moves some sides by up to a distance between SIZE and a thousandth of it."""
    tokens = observed = tokenizer.nearest(coverage(rectangles, points))
    while True:
        reach = SIZE * 2.0 ** -rng.uniform(0, 10, size=(len(rectangles), 1))
        moves = rng.uniform(-reach, reach, size=rectangles.shape) * (rng.random(rectangles.shape) < 0.4)
        if task == "grid":
            moves = np.round(moves * PIXELS) / PIXELS
        proposal = rectangles + moves
        proposed = tokenizer.nearest(coverage(proposal, points))
        agrees = possible(proposal) & ((proposed == observed) | mask).all(axis=1)
        rectangles = np.where(agrees[:, None], proposal, rectangles)
        tokens = np.where(agrees[:, None], proposed, tokens)
        yield rectangles, tokens


class TestSet(NamedTuple):
    """Rectangles as tokens, some of them hidden, and the posterior of those."""

    rectangles: np.ndarray  # (B, 4)
    points: np.ndarray  # (B, T, 2)
    tokens: np.ndarray  # (B, T)
    mask: np.ndarray  # (B, T)
    draws: np.ndarray  # (B, 4): a rectangle each, drawn from the posterior
    posterior: np.ndarray  # (B, T, K): the probability of each code


def make_test(task, rectangles, tokenizer, *, proposals, point_count=24, mask="0.2", seed=TEST_SEED):
    """A TestSet: the task's tokens of these rectangles, and the posterior of the hidden ones from a chain of so many
    proposals. mask: a kind of training_mask, or "left half" for the patches whose centres lie there."""
    rng = np.random.default_rng([seed, 1])  # a stream of its own
    points = draw_points(task, rectangles, point_count, rng)
    tokens = tokenizer.nearest(coverage(rectangles, points))
    if mask == "left half":
        hidden = points[..., 0] + PATCH / 2 < SIZE / 2
    else:
        hidden = maskgit.training_mask(tokens.shape, mask, torch.Generator().manual_seed(seed)).numpy()
    counts = np.zeros((*tokens.shape, CODES), dtype=np.int32)
    image, place = np.indices(tokens.shape)
    chain = posterior_chain(rectangles, points, hidden, tokenizer, rng, task)
    for _ in range(proposals):
        draws, drawn = next(chain)
        counts[image, place, drawn] += 1
    return TestSet(rectangles, points, tokens, hidden, draws, (counts / proposals).astype(np.float32))


# ---------------------------------------------------------------------------------------------------
# Scores and pictures


@torch.no_grad()
def hidden_log_probs(model, test):
    """The model's log-probabilities at the hidden tokens: (hidden tokens, K)."""
    device = next(model.parameters()).device
    mask = torch.from_numpy(test.mask)
    inputs = torch.from_numpy(test.tokens).masked_fill(mask, model.mask_id)
    parts = zip(inputs.split(128), torch.from_numpy(test.points).float().split(128), strict=True)
    logits = torch.cat([model(part.to(device), at.to(device)).float().cpu() for part, at in parts])
    return logits.log_softmax(dim=-1)[mask]


def score(model, test):
    """Cross-entropy and accuracy on the hidden tokens, beside the posterior's own: expectations over the posterior.
    hits: the share of answers that are the true token; posterior_accuracy and posterior_hits agree, up to chance, if
    the chain has mixed. commonest: the hits of always answering the commonest token."""
    log_probs = hidden_log_probs(model, test)
    truth = torch.from_numpy(test.posterior[test.mask])
    tokens = torch.from_numpy(test.tokens[test.mask])
    answers = log_probs.argmax(dim=-1)
    limit = torch.special.entr(truth).sum(dim=-1).mean()
    cross_entropy = -(truth * log_probs).sum(dim=-1).mean()
    figures = {"cross_entropy": cross_entropy, "limit": limit, "ratio": cross_entropy / limit}
    figures |= {"accuracy": truth.gather(-1, answers[:, None]).mean(), "posterior_accuracy": truth.amax(dim=-1).mean()}
    figures["hits"] = (answers == tokens).double().mean()
    figures["posterior_hits"] = (truth.argmax(dim=-1) == tokens).double().mean()
    figures["commonest"] = tokens.bincount().max() / len(tokens)
    return {name: value.item() for name, value in figures.items()}


def fill(model, test, order=ORDER, **options):
    """The test's tokens with the hidden ones filled in by decode: (B, T)."""
    device = next(model.parameters()).device
    start = [torch.from_numpy(array).to(device) for array in (test.tokens, test.mask, test.points.astype(np.float32))]
    generator = torch.Generator(device).manual_seed(TEST_SEED)
    return maskgit.decode(model, *start, order=order, generator=generator, **options).cpu().numpy()


def score_pictures(model, test, tokenizer):
    """The errors of four stitched pictures: what decode draws, beside a draw from the posterior; and what it finds
    likeliest, beside the true tokens, whose error is the tokenizer's own. Each excess: its mean and standard error."""
    grids = {"drawn": fill(model, test), "posterior": tokenizer.nearest(coverage(test.draws, test.points))}
    grids |= {"likeliest": fill(model, test, sample="argmax"), "tokenizer": test.tokens}
    truth = paint_rectangles(test.rectangles)
    pictures = {name: tokenizer.decode(tokens.reshape(-1, GRID_SIDE, GRID_SIDE)) for name, tokens in grids.items()}
    errors = {name: np.abs(picture - truth).mean(axis=(1, 2, 3)) for name, picture in pictures.items()}  # (B,) each
    result = {name: float(error.mean()) for name, error in errors.items()}
    for name, other in (("drawn", "posterior"), ("likeliest", "tokenizer")):
        excess = errors[name] - errors[other]
        result[f"{name}_excess"] = [float(excess.mean()), float(excess.std() / len(excess) ** 0.5)]
    return result


def paint_patches(points, tokens, tokenizer):
    """The centroids of tokens (T,) pasted at points (T, 2), averaged where they overlap, grey where none is: (H, W)."""
    total, count = np.zeros((2, SIZE * SCALE, SIZE * SCALE))
    for (x, y), token in zip(np.rint(points * SCALE).astype(int), tokens, strict=True):
        area = slice(y, y + PATCH * SCALE), slice(x, x + PATCH * SCALE)
        total[area] += tokenizer.centroids[token].reshape(PATCH, PATCH).repeat(SCALE, axis=0).repeat(SCALE, axis=1)
        count[area] += 1
    return np.where(count > 0, total / count.clip(min=1), GREY)


def paint_boxes(picture, boxes):
    """A grey picture (H, W) with boxes on it, filled if orange: (H, W, 3). boxes: (x0, y0, x1, y1 in cells, colour)."""
    image = Image.fromarray((picture * 255).round().astype(np.uint8)).convert("RGB")
    pen = ImageDraw.Draw(image)
    for *corners, colour in boxes:
        x0, y0, x1, y1 = (round(corner * SCALE) for corner in corners)
        pen.rectangle((x0, y0, x1 - 1, y1 - 1), colour if colour == ORANGE else None, colour, width=2)
    return np.asarray(image, dtype=np.float32) / 255


def paint_grid_samples(model, tests, tokenizer):
    """Truth, masked, filled, of two images: a row for each test. A dot marks the centre of a hidden patch."""
    pictures = []
    for whole in tests.values():
        test = TestSet(*(array[[len(array) // 2, -1]] for array in whole))  # much hidden by the cosine, and little
        for tokens, mask, answer in zip(test.tokens, test.mask, fill(model, test), strict=True):
            dots = [(x - 0.2, y - 0.2, x + 0.2, y + 0.2, ORANGE) for x, y in GRID_POINTS[mask] + PATCH / 2]
            pasted = [(GRID_POINTS, tokens, []), (GRID_POINTS[~mask], tokens[~mask], dots), (GRID_POINTS, answer, [])]
            pictures += [paint_boxes(paint_patches(points, each, tokenizer), boxes) for points, each, boxes in pasted]
    return maskgit.image_grid(np.stack(pictures), 6, titles=["truth", "masked", "filled"] * 2)


def paint_sparse_samples(model, tests, tokenizer, proposals):
    """A row for each of two images: the visible patches, hidden ones in orange; with the predicted ones; with the true
    ones; and the mean of every tenth draw from the posterior. The true rectangle is framed in red."""
    test = TestSet(*(array[:2] for array in tests["unseen rectangles"]))
    predicted = test.tokens.copy()
    predicted[test.mask] = hidden_log_probs(model, test).argmax(dim=-1).numpy()
    rng = np.random.default_rng(TEST_SEED)
    chain = posterior_chain(test.rectangles, test.points, test.mask, tokenizer, rng, "sparse")
    mean = np.zeros((len(test.rectangles), SIZE * SCALE, SIZE * SCALE), dtype=np.float32)
    draws = proposals // 10
    for rectangles, _ in itertools.islice(chain, 0, 10 * draws, 10):
        mean += paint_rectangles(rectangles * SCALE, SIZE * SCALE)[..., 0] / draws
    pictures = []
    for i, (points, mask) in enumerate(zip(test.points, test.mask, strict=True)):
        pasted = [(points[~mask], test.tokens[i][~mask]), (points, predicted[i]), (points, test.tokens[i])]
        visible, *others = [paint_patches(*patches, tokenizer) for patches in pasted]
        hidden, frame = [(x, y, x + PATCH, y + PATCH, ORANGE) for x, y in points[mask]], [(*test.rectangles[i], RED)]
        pictures += [paint_boxes(visible, hidden + frame), *(paint_boxes(each, frame) for each in (*others, mean[i]))]
    return maskgit.image_grid(np.stack(pictures), 4, titles=["visible", "predicted", "true tokens", "posterior's mean"])


# ---------------------------------------------------------------------------------------------------
# One run


def train_model(recipe, tokenizer, unseen, device, **options):
    """A trained MaskGIT, and the rows of its log with the cross-entropy on a TestSet of unseen rectangles in each."""
    tokens = torch.from_numpy(unseen.tokens[unseen.mask])

    def validate(model):
        return {"unseen": torch.nn.functional.nll_loss(hidden_log_probs(model, unseen), tokens).item()}

    model = recipe.new_model(CODES, device)
    batch = make_batch(tokenizer, recipe)
    return model, maskgit.train(model, batch, recipe, tokenizer=tokenizer, validate=validate, **options)


def make_tests(recipe, tokenizer, test_images, proposals):
    """{name: TestSet} of what a run is scored on; the first are unseen rectangles with a fifth of the tokens hidden."""
    unseen = draw_rectangles(test_images, TEST_SEED, recipe.task)
    make = functools.partial(make_test, recipe.task, tokenizer=tokenizer, proposals=proposals)
    if recipe.task == "grid":
        masks = {"unseen rectangles": "0.2", "cosine masking": "cosine", "left half hidden": "left half"}
        return {name: make(unseen, mask=mask) for name, mask in masks.items()}
    tests = {"unseen rectangles": make(unseen)}
    if recipe.rectangles:
        tests["training rectangles"] = make(draw_rectangles(recipe.rectangles, recipe.seed, "grid"))
    return tests | {f"{t} points": make(unseen[: len(unseen) // 4], point_count=t) for t in (6, 12, 48, 96)}


def save_pictures(out, recipe, tokenizer, history, limit):
    """All but the samples: rectangles.png, centroids.png and loss.png."""
    rectangles = draw_rectangles(3, TEST_SEED, "grid")
    fine = paint_rectangles(rectangles * PIXELS, SIZE * PIXELS)
    coarse = paint_rectangles(rectangles).repeat(PIXELS, axis=1).repeat(PIXELS, axis=2)
    pairs = np.stack([fine, coarse], axis=1).reshape(-1, *fine.shape[1:])
    maskgit.image_grid(pairs, 6, titles=["256x256", "16x16"] * 3).save(out / "rectangles.png")
    centroids = tokenizer.centroids[tokenizer.centroids.mean(axis=1).argsort()].reshape(CODES, PATCH, PATCH, 1)
    maskgit.image_grid(centroids, CODES // 2, scale=16).save(out / "centroids.png")
    steps = [row["step"] for row in history]
    curves = {"training batches": (steps, [row["loss"] for row in history])}
    curves["unseen, a fifth hidden"] = (steps, [row["unseen"] for row in history])
    curves["posterior, likewise"] = (steps, [limit] * len(steps))
    labels = dict(title="Rectangles: loss", y_label="cross-entropy, nats per hidden token")
    maskgit.line_plot(curves, **labels).save(out / "loss.png")


def print_results(scores, pictures):
    table = []
    for name, row in scores.items():
        table.append([name, f"{row['cross_entropy']:.4f}", f"{row['limit']:.4f}", f"{row['ratio']:.3f}"])
        table[-1] += [f"{row['accuracy']:.2%}", f"{row['posterior_accuracy']:.2%}"]
        table[-1] += [f"{row['accuracy'] / row['posterior_accuracy']:.1%}", f"{row['commonest']:.1%}"]
    head = ["hidden tokens", "cross-entropy", "posterior", "ratio", "accuracy", "posterior", "share", "commonest token"]
    maskgit.print_table(head, table)
    table = []
    for name, row in pictures.items():
        table.append([name])
        for ours, other in (("drawn", "posterior"), ("likeliest", "tokenizer")):
            mean, error = row[f"{ours}_excess"]
            table[-1] += [f"{row[ours]:.5f}", f"{row[other]:.5f}", f"{mean:+.5f} (s.e. {error:.5f})"]
    head = ["mean error of a cell", "drawn", "posterior draw", "excess", "likeliest", "true tokens", "excess"]
    if pictures:
        maskgit.print_table(head, table)


GRID = dict(steps=7000, batch_size=32, heads=2, lr=1e-2, mask="0.3+0.4+0.5+cosine")
SPARSE = dict(steps=7500, batch_size=256, heads=4, lr=6e-3, mask="0.35")
SPARSE |= dict(test_images=1000, proposals=8000, out=Path("runs/rectangles_sparse"))
REPORTS = {"grid": "works well", "sparse": "decent in training, does not work well at all on unseen rectangles"}


def parse_arguments():
    """The command line, and the recipe in it."""
    parser = maskgit.CommandLine(__doc__)
    maskgit.add_run_flags(parser, "runs/rectangles_grid")
    add = parser.add_argument_group("scores").add_argument
    add("--test-images", type=maskgit.at_least(8), default=200, help="default %(default)s")
    add("--proposals", type=maskgit.at_least(10), default=3000, help="for each posterior; default %(default)s")
    maskgit.add_flags(parser, Rectangles, **GRID)
    arguments = parser.parse_with(lambda given: SPARSE if given.task == "sparse" else {})
    return arguments, maskgit.settings_from(arguments, Rectangles)


def main():
    record = maskgit.run_record()
    arguments, recipe = parse_arguments()
    maskgit.require_no_run(arguments.out, arguments.resume, arguments.force)
    device = maskgit.pick_device(arguments.device)
    recipe = recipe.for_device(device)
    out = arguments.out
    if arguments.resume:
        tokenizer = maskgit.load_checkpoint(out / "model.pt")["tokenizer"]  # k-means may round otherwise now
    else:
        tokenizer = fit_tokenizer(recipe.seed)
    rectangles = draw_rectangles(VALIDATION_COUNT[recipe.task], VALIDATION_SEED, recipe.task)
    unseen = make_test(recipe.task, rectangles, tokenizer, proposals=1, seed=VALIDATION_SEED)  # no posterior needed
    options = dict(out=out, resume=arguments.resume, force=arguments.force)
    model, history = train_model(recipe, tokenizer, unseen, device, **options)
    if maskgit.process_rank()[0] > 0:
        return
    trained = time.monotonic()
    tests = make_tests(recipe, tokenizer, arguments.test_images, arguments.proposals)
    figures = {"scores": {name: score(model, test) for name, test in tests.items()}}
    if recipe.task == "grid":
        figures["pictures"] = {name: score_pictures(model, test, tokenizer) for name, test in tests.items()}
        paint_grid_samples(model, tests, tokenizer).save(out / "samples.png")
    else:
        paint_sparse_samples(model, tests, tokenizer, arguments.proposals).save(out / "samples.png")
    save_pictures(out, recipe, tokenizer, history, figures["scores"]["unseen rectangles"]["limit"])
    seconds = {"train": round(history[-1]["seconds"], 1), "scores": round(time.monotonic() - trained, 1)}
    figures |= {"log": history[-1], "seconds": seconds, "parameters": sum(p.numel() for p in model.parameters())}
    print_results(figures["scores"], figures.get("pictures", {}))
    print(f"S2, without figures: {REPORTS[recipe.task]}")
    print(f"trained in {seconds['train']} s, scored in {seconds['scores']} s")
    print("pictures:", *(str(out / f"{name}.png") for name in ("samples", "loss", "rectangles", "centroids")))
    maskgit.write_figures(record, vars(arguments) | asdict(recipe), figures, out / "metrics.json", arguments.json)


if __name__ == "__main__":
    maskgit.run_as_script(main)
