"""S2's rectangles: black and white images with one filled rectangle, as tokens of 4x4 patches.

    python train_rectangles.py --task grid        all 169 overlapping patches of a 16x16 image, a fifth hidden
    python train_rectangles.py --task sparse      24 patches at continuous coordinates, a fifth hidden
    python train_rectangles.py --task sparse --rectangles 100 --fixed-points --out runs/rectangles_100    S2's failure
    python train_rectangles.py --remedies         what S2 proposed against it and did not try, three seeds each

Everything is scored on rectangles that training never saw, beside the exact posterior: the chance of each token given
the visible ones, over all rectangles that agree with them.

On 24 sparse points, 91.0 % of the hidden tokens are right where the posterior gets 91.4 %, after 19 minutes on one core
of an AMD EPYC server (results/rectangles_sparse.json); on the grid 98.6 % of 99.0 %, after 7.3 minutes on two cores
(results/rectangles_grid.json).

A run leaves model.pt, log.csv, metrics.json and its pictures in runs/rectangles_grid or runs/rectangles_sparse (--out).
"""

import argparse
import functools
import itertools
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import maskgit

SIZE, PATCH, MIN_SIDE = 16, 4, 2  # cells per side of an image, of a patch, and at least of a rectangle
CODES, PIXELS = 20, 16  # S2's number of codes; the pixels of its 256x256 images per cell and axis
GRID_SIDE = SIZE - PATCH + 1
GRID_POINTS = maskgit.grid_coords(GRID_SIDE, GRID_SIDE).numpy()  # (169, 2)
# Rectangles that no training run draws, unless its seed is as large.
VALIDATION_SEED, TEST_SEED = 10**9, 10**9 + 1
VALIDATION_COUNT = {"grid": 64, "sparse": 500}
# On validation rectangles a larger budget than decode's default completed more grids to rectangles, in fewer calls.
ORDER = functools.partial(maskgit.by_entropy, budget=0.3)
CELL, GREY, RED, ORANGE = 12, 0.7, (220, 40, 40), (240, 150, 20)  # pixels of a cell in samples.png, and its colours

# ---------------------------------------------------------------------------------------------------
# Rectangles and their patches. A rectangle is x0, y0, x1, y1 in cells.


def draw_rectangles(count, seed, task="grid"):
    """Rectangles (count, 4) from two uniform corners, those less than MIN_SIDE apart on an axis drawn again. The
    corners of the grid task lie on pixels, those of the sparse task anywhere. seed may be a numpy generator."""
    rng, kept, shape = np.random.default_rng(seed), np.empty((0, 4)), (2 * count, 2, 2)
    while len(kept) < count:
        corners = rng.integers(SIZE * PIXELS + 1, size=shape) / PIXELS if task == "grid" else SIZE * rng.random(shape)
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


def draw_images(rectangles, size=SIZE):
    """Rectangles (B, 4) as images of size x size cells: (B, size, size, 1)."""
    return coverage(rectangles, np.zeros((1, 2)), size).reshape(-1, size, size, 1)


def fit_tokenizer(seed):
    """S2's codebook: the overlapping patches of 100 rectangles, in 20 clusters."""
    images = draw_images(draw_rectangles(100, [seed, 0]))
    return maskgit.PatchTokenizer.fit(images, CODES, PATCH, stride=1, seed=seed, restarts=5)


# ---------------------------------------------------------------------------------------------------
# Training data, and the exact posterior


def draw_points(sampling, rectangles, count, rng):
    """Top left corners (B, T, 2) of patches inside the image: all of the "grid", or `count` that are "uniform" (S2),
    "edges" (every other patch crosses an edge of its rectangle) or "cornerless" (no patch contains a corner)."""
    if sampling == "grid":
        return np.tile(GRID_POINTS, (len(rectangles), 1, 1))
    points = rng.random((len(rectangles), count, 2)) * (SIZE - PATCH)
    for _ in range(100):  # a rectangle as large as the image may leave no patch that would do
        wrong = np.zeros(points.shape[:2], dtype=bool)
        if sampling == "edges":
            covered = coverage(rectangles, points).mean(axis=-1)[:, ::2]
            wrong[:, ::2] = (covered == 0) | (covered == 1)
        if sampling == "cornerless":
            edges = rectangles.reshape(-1, 1, 2, 2)  # (B, 1, lower or upper edge, axis)
            inside = (points[:, :, None] < edges) & (edges < points[:, :, None] + PATCH)
            wrong = inside.any(axis=2).all(axis=2)  # an edge on both axes
        if not wrong.any():
            break
        points[wrong] = rng.random((wrong.sum(), 2)) * (SIZE - PATCH)
    return points


def make_batch(tokenizer, settings):
    """batch(step) for train(): fresh rectangles at every step, or --rectangles that are always the same; fresh points,
    or with --fixed-points those of each rectangle; fresh masks in any case."""
    sampling = "grid" if settings.task == "grid" else settings.sampling
    fewest, most = settings.points[0], settings.points[-1]
    if settings.rectangles:  # 100 are those of the codebook (S2)
        fixed = draw_rectangles(settings.rectangles, [settings.seed, 0])
        fixed_points = draw_points(sampling, fixed, fewest, np.random.default_rng([settings.seed, 2]))

    def batch(step):
        seed = maskgit.step_seed(settings.seed, step)
        rng = np.random.default_rng(seed)
        rows = rng.integers(len(fixed), size=settings.batch_size) if settings.rectangles else None
        rectangles = fixed[rows] if settings.rectangles else draw_rectangles(settings.batch_size, rng, settings.task)
        count = round(fewest * (most / fewest) ** rng.random())
        points = fixed_points[rows] if settings.fixed_points else draw_points(sampling, rectangles, count, rng)
        tokens = torch.from_numpy(tokenizer.nearest(coverage(rectangles, points)))
        coords = torch.from_numpy(GRID_POINTS if sampling == "grid" else points).float()
        mask = maskgit.training_mask(tokens.shape, settings.mask, torch.Generator().manual_seed(seed), coords)
        return tokens, mask, coords

    return batch


def soft_targets(tokenizer, width):
    """What to predict in place of each code: all, weighted by exp(-(distance of the centroids / width)^2). (K, K)"""
    centroids = torch.from_numpy(tokenizer.centroids)
    return (-(torch.cdist(centroids, centroids) / width).square()).softmax(dim=-1)


def posterior_chain(rectangles, points, mask, tokenizer, rng, task):
    """An endless chain of rectangles (B, 4) and their tokens (B, T) that agree with the visible tokens; the two arrays
    yielded are the same ones every time, changed in place.

    A rectangle is itself an exact draw from the posterior given its own visible tokens. Starting there, symmetric
    proposals that are kept when all visible tokens stay as they are (Metropolis, uniform prior) leave every state such
    a draw. A proposal moves some of the four sides, by up to a distance between the image's size and a thousandth."""
    state, tokens = rectangles.copy(), tokenizer.nearest(coverage(rectangles, points))
    observed = tokens.copy()
    while True:
        reach = SIZE * 2.0 ** -rng.uniform(0, 10, size=(len(state), 1))
        moves = rng.uniform(-reach, reach, size=state.shape) * (rng.random(state.shape) < 0.4)
        proposal = state + (np.round(moves * PIXELS) / PIXELS if task == "grid" else moves)
        proposed = tokenizer.nearest(coverage(proposal, points))
        agrees = possible(proposal) & ((proposed == observed) | mask).all(axis=1)
        state[agrees], tokens[agrees] = proposal[agrees], proposed[agrees]
        yield state, tokens


# Arrays: rectangles (B, 4), points (B, T, 2), tokens (B, T), mask (B, T), draws (B, 4): a rectangle drawn from the
# posterior; and the tensor posterior (hidden tokens, K): the probability of each code.
TestSet = namedtuple("TestSet", "rectangles points tokens mask draws posterior")


def make_test(task, rectangles, tokenizer, *, points=24, mask="0.2", proposals=1, seed=TEST_SEED):
    """A TestSet: the task's tokens of these rectangles, and the posterior of the hidden ones from a chain of so many
    proposals. mask: a kind of training_mask, or "half" for the patches centred in the left half of the image."""
    rng, generator = np.random.default_rng([seed, 1]), torch.Generator().manual_seed(seed)
    points = draw_points("grid" if task == "grid" else "uniform", rectangles, points, rng)
    tokens = tokenizer.nearest(coverage(rectangles, points))
    left = points[..., 0] + PATCH / 2 < SIZE / 2
    hidden = left if mask == "half" else maskgit.training_mask(tokens.shape, mask, generator).numpy()
    counts, every_token = np.zeros((*tokens.shape, CODES), dtype=np.int32), tuple(np.indices(tokens.shape))
    chain = posterior_chain(rectangles, points, hidden, tokenizer, rng, task)
    for _ in range(proposals):
        draws, drawn = next(chain)
        counts[*every_token, drawn] += 1
    posterior = torch.from_numpy(counts[hidden] / proposals).float()
    return TestSet(rectangles, points, tokens, hidden, draws, posterior)


# ---------------------------------------------------------------------------------------------------
# Scores and pictures


@torch.no_grad()
def hidden_log_probs(model, test):
    """The model's log-probabilities at the hidden tokens: (hidden tokens, K)."""
    device, mask = next(model.parameters()).device, torch.from_numpy(test.mask)
    inputs = torch.from_numpy(test.tokens).masked_fill(mask, model.mask_id)
    parts = zip(inputs.split(128), torch.from_numpy(test.points).float().split(128), strict=True)
    logits = torch.cat([model(part.to(device), at.to(device)).float().cpu() for part, at in parts])
    return logits.log_softmax(dim=-1)[mask]


def score(model, test):
    """Cross-entropy and accuracy on the hidden tokens, beside the posterior's own: expectations over the posterior.
    hits counts the tokens that were really there; posterior_accuracy and posterior_hits agree, up to chance, if the
    chain has mixed. commonest: of always answering the commonest token."""
    log_probs, truth = hidden_log_probs(model, test), test.posterior
    codes, answers = torch.from_numpy(test.tokens[test.mask]), log_probs.argmax(dim=-1)
    limit, cross_entropy = torch.special.entr(truth).sum(dim=-1).mean(), -(truth * log_probs).sum(dim=-1).mean()
    figures = {"cross_entropy": cross_entropy, "limit": limit, "ratio": cross_entropy / limit}
    figures |= {"accuracy": truth.gather(-1, answers[:, None]).mean(), "posterior_accuracy": truth.amax(dim=-1).mean()}
    hits, posterior_hits = answers == codes, truth.argmax(dim=-1) == codes
    figures |= {"hits": hits.double().mean(), "posterior_hits": posterior_hits.double().mean()}
    figures["commonest"] = codes.bincount().max() / len(codes)
    return {name: value.item() for name, value in figures.items()}


def fill(model, test, **options):
    """The test's tokens with the hidden ones filled in by decode: (B, T)."""
    options = {"order": ORDER} | options
    device = next(model.parameters()).device
    tokens, mask, coords = (torch.from_numpy(array).to(device) for array in (test.tokens, test.mask, test.points))
    generator = torch.Generator(device).manual_seed(TEST_SEED)
    return maskgit.decode(model, tokens, mask, coords.float(), generator=generator, **options).cpu().numpy()


def score_pictures(model, test, tokenizer):
    """The errors of four stitched pictures: what decode draws, beside a draw from the posterior; and what it finds
    likeliest, beside the true tokens, whose error is the tokenizer's own. Each excess: its mean and standard error."""
    candidates = {"drawn": fill(model, test), "likeliest": fill(model, test, sample="argmax"), "tokenizer": test.tokens}
    candidates["posterior"] = np.where(test.mask, tokenizer.nearest(coverage(test.draws, test.points)), test.tokens)
    truth = draw_images(test.rectangles)
    pictures = {name: tokenizer.decode(tokens.reshape(-1, GRID_SIDE, GRID_SIDE)) for name, tokens in candidates.items()}
    errors = {name: np.abs(picture - truth).mean(axis=(1, 2, 3)) for name, picture in pictures.items()}  # (B,) each
    result = {name: float(error.mean()) for name, error in errors.items()}
    for name, other in (("drawn", "posterior"), ("likeliest", "tokenizer")):
        excess = errors[name] - errors[other]
        result[f"{name}_excess"] = [float(excess.mean()), float(excess.std() / len(excess) ** 0.5)]
    return result


def draw_patches(points, tokens, tokenizer):
    """The centroids of tokens (T,) pasted at points (T, 2), averaged where they overlap, grey where none is: (H, W)."""
    total, count = np.zeros((2, SIZE * CELL, SIZE * CELL))
    for (x, y), code in zip(np.rint(points * CELL).astype(int), tokens, strict=True):
        area = slice(y, y + PATCH * CELL), slice(x, x + PATCH * CELL)
        total[area] += tokenizer.centroids[code].reshape(PATCH, PATCH).repeat(CELL, axis=0).repeat(CELL, axis=1)
        count[area] += 1
    return np.where(count > 0, total / count.clip(min=1), GREY)


def draw_boxes(picture, boxes):
    """A grey picture (H, W) with boxes outlined on it: (H, W, 3). boxes: (x0, y0, x1, y1 in cells, colour)."""
    image = Image.fromarray((picture * 255).round().astype(np.uint8)).convert("RGB")
    draw = ImageDraw.Draw(image)
    for *corners, colour in boxes:
        x0, y0, x1, y1 = (round(corner * CELL) for corner in corners)
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=colour, width=2)
    return np.asarray(image, dtype=np.float32) / 255


def draw_grid_samples(model, tests, tokenizer):
    """Truth, masked, filled: a row for each kind of mask. A dot marks the centre of a hidden patch."""
    cells = []
    for whole in tests:
        test = TestSet(*(field[[len(whole.tokens) // 2, -1]] for field in whole[:-1]), None)
        for tokens, mask, answer in zip(test.tokens, test.mask, fill(model, test), strict=True):
            dots = [(x - 0.2, y - 0.2, x + 0.2, y + 0.2, ORANGE) for x, y in GRID_POINTS[mask] + PATCH / 2]
            cells.append(draw_boxes(draw_patches(GRID_POINTS, tokens, tokenizer), []))
            cells.append(draw_boxes(draw_patches(GRID_POINTS[~mask], tokens[~mask], tokenizer), dots))
            cells.append(draw_boxes(draw_patches(GRID_POINTS, answer, tokenizer), []))
    return maskgit.image_grid(np.stack(cells), 6, titles=["truth", "masked", "filled"] * 2)


def draw_sparse_samples(model, whole, tokenizer, draws):
    """A row for each of four images: the visible patches; with the predicted ones; with the true ones; and the mean of
    so many draws from the posterior. Hidden patches are framed in orange, the true rectangle in red."""
    test, cells = TestSet(*(field[:4] for field in whole[:-1]), None), []
    predicted = test.tokens.copy()
    predicted[test.mask] = hidden_log_probs(model, test).argmax(dim=-1).numpy()
    rng = np.random.default_rng(TEST_SEED)
    chain = posterior_chain(test.rectangles, test.points, test.mask, tokenizer, rng, "sparse")
    chain = itertools.islice(chain, 0, 10 * draws, 10)
    spread = sum(draw_images(rectangles * CELL, SIZE * CELL)[..., 0] / draws for rectangles, _ in chain)
    for i, (points, mask) in enumerate(zip(test.points, test.mask, strict=True)):
        boxes = [(x, y, x + PATCH, y + PATCH, ORANGE) for x, y in points[mask]] + [(*test.rectangles[i], RED)]
        visible = draw_patches(points[~mask], test.tokens[i][~mask], tokenizer)
        completed = [draw_patches(points, tokens[i], tokenizer) for tokens in (predicted, test.tokens)]
        cells += [draw_boxes(picture, boxes) for picture in (visible, *completed, spread[i])]
    return maskgit.image_grid(np.stack(cells), 4, titles=["visible", "predicted", "true tokens", "posterior's mean"])


# ---------------------------------------------------------------------------------------------------
# Runs


def train_model(settings, tokenizer, device, out=None):
    """A trained MaskGIT, and the rows of its log with the cross-entropy on unseen rectangles in each."""
    rectangles = draw_rectangles(VALIDATION_COUNT[settings.task], VALIDATION_SEED, settings.task)
    unseen = make_test(settings.task, rectangles, tokenizer, seed=VALIDATION_SEED)
    codes = torch.from_numpy(unseen.tokens[unseen.mask])

    def validate(model):
        return {"unseen": torch.nn.functional.nll_loss(hidden_log_probs(model, unseen), codes).item()}

    soft = soft_targets(tokenizer, settings.soft_targets) if settings.soft_targets else None
    options = {"out": out, "tokenizer": tokenizer, "soft_targets": soft, "validate": validate, "policy": ORDER}
    options["may_change"] = ("remedies", "test_images", "proposals")
    return maskgit.train_as_set(settings, CODES, make_batch(tokenizer, settings), device, **options)


def run(settings):
    device, out, saved = maskgit.open_run(settings), settings.out, settings.out / "model.pt"
    tokenizer = maskgit.load_checkpoint(saved)["tokenizer"] if settings.resume else fit_tokenizer(settings.seed)
    if tokenizer is None:
        raise ValueError(f"{saved} holds no tokenizer: it is a run of another script")
    model, history = train_model(settings, tokenizer, device, out)
    if maskgit.process_rank()[0] > 0:
        return
    trained = time.monotonic()
    unseen = draw_rectangles(settings.test_images, TEST_SEED, settings.task)
    make = functools.partial(make_test, settings.task, tokenizer=tokenizer, proposals=settings.proposals)
    tests, figures = {"unseen rectangles": make(unseen)}, {}
    if settings.task == "grid":
        tests |= {"cosine masking": make(unseen, mask="cosine"), "left half hidden": make(unseen, mask="half")}
        figures["pictures"] = {name: score_pictures(model, test, tokenizer) for name, test in tests.items()}
        samples, report = draw_grid_samples(model, tests.values(), tokenizer), "works well (no figures)"
    else:
        if settings.rectangles:
            tests["training rectangles"] = make(draw_rectangles(settings.rectangles, [settings.seed, 0]))
        tests |= {f"{t} points": make(unseen[: len(unseen) // 4], points=t) for t in (6, 12, 48, 96)}
        samples = draw_sparse_samples(model, tests["unseen rectangles"], tokenizer, settings.proposals // 10)
        report = "training accuracy is decent, unseen rectangles do not work well at all (no figures)"
    figures["scores"] = scores = {name: score(model, test) for name, test in tests.items()}
    samples.save(out / "samples.png")
    rectangles = draw_rectangles(3, TEST_SEED)
    coarse = draw_images(rectangles).repeat(PIXELS, axis=1).repeat(PIXELS, axis=2)
    versions = np.concatenate(np.stack([draw_images(rectangles * PIXELS, SIZE * PIXELS), coarse], axis=1))
    maskgit.image_grid(versions, 6, titles=["256x256", "16x16"] * 3).save(out / "rectangles.png")
    centroids = tokenizer.centroids[tokenizer.centroids.mean(axis=1).argsort()].reshape(CODES, PATCH, PATCH, 1)
    maskgit.image_grid(centroids, CODES // 2, scale=16).save(out / "centroids.png")
    names = {f"training, mask {settings.mask}": "loss", "unseen, mask 0.2": "unseen"}
    curves = {name: ([row["step"] for row in history], [row[key] for row in history]) for name, key in names.items()}
    labels = {"x_label": "step", "y_label": "cross-entropy, nats per hidden token"}
    labels |= {"title": f"Rectangles, {settings.task} task"}
    limit = {"posterior, mask 0.2": scores["unseen rectangles"]["limit"]}
    maskgit.line_plot(curves, **labels, references=limit, log_y=True).save(out / "loss.png")
    seconds = {"train": round(history[-1]["seconds"], 1), "scores": round(time.monotonic() - trained, 1)}
    figures |= {"log": history[-1], "seconds": seconds, "parameters": sum(p.numel() for p in model.parameters())}
    maskgit.write_figures(settings, figures, out / "metrics.json", settings.json)

    head = ["hidden tokens", "cross-entropy", "posterior", "ratio", "accuracy", "posterior", "share", "commonest token"]
    line = "{cross_entropy:.4f}|{limit:.4f}|{ratio:.3f}|{accuracy:.2%}|{posterior_accuracy:.2%}|"
    line += "{share:.1%}|{commonest:.1%}"
    shown = {name: row | {"share": row["accuracy"] / row["posterior_accuracy"]} for name, row in scores.items()}
    rows = [[name, *line.format(**row).split("|")] for name, row in shown.items()]
    maskgit.print_table(head, rows)
    if settings.task == "grid":
        head = ["mean error of a cell", "drawn", "posterior draw", "excess", "likeliest", "true tokens", "excess"]
        line = "{drawn:.5f}|{posterior:.5f}|{drawn_excess[0]:+.5f} (s.e. {drawn_excess[1]:.5f})|"
        line += "{likeliest:.5f}|{tokenizer:.5f}|{likeliest_excess[0]:+.5f} (s.e. {likeliest_excess[1]:.5f})"
        rows = [[name, *line.format(**row).split("|")] for name, row in figures["pictures"].items()]
        maskgit.print_table(head, rows)
    print(f"S2: {report}")
    print(f"trained in {seconds['train']} s, scored in {seconds['scores']} s")
    print("pictures:", *(str(out / f"{name}.png") for name in ("samples", "loss", "rectangles", "centroids")))


SOURCES = {"100 rectangles": 100, "fresh ones": None}
REMEDIES = {
    "as it is": {},
    "soft targets": {"soft_targets": 0.5},
    "points near edges": {"sampling": "edges"},
    "no corners": {"sampling": "cornerless"},
}


def run_remedies(settings):
    """Each remedy with 100 rectangles and with fresh ones, three seeds each; writes remedies.json and remedies.png."""
    device, rows, curves, table = maskgit.open_run(settings), [], {}, []
    unseen = draw_rectangles(settings.test_images, TEST_SEED, "sparse")
    for seed in range(settings.seed, settings.seed + 3):
        tokenizer = fit_tokenizer(seed)
        make = functools.partial(make_test, "sparse", tokenizer=tokenizer, proposals=settings.proposals)
        tests = {"unseen": make(unseen), "seen": make(draw_rectangles(100, [seed, 0]))}
        for (source, count), (remedy, change) in itertools.product(SOURCES.items(), REMEDIES.items()):
            varied = argparse.Namespace(**vars(settings) | {"seed": seed, "rectangles": count} | change)
            model, history = train_model(varied, tokenizer, device)
            row = {"variant": f"{source}, {remedy}", "seed": seed, "curve": [row["unseen"] for row in history]}
            rows.append(row | {name: score(model, test) for name, test in tests.items()})
            print(f"{row['variant']}, seed {seed}: accuracy {rows[-1]['unseen']['accuracy']:.4f}", flush=True)
    steps = [row["step"] for row in history]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        runs = [row for row in rows if row["variant"] == variant]
        curves[variant] = (steps, np.mean([row["curve"] for row in runs], axis=0))
        table.append([variant])
        for name, figure in (("unseen", "cross_entropy"), ("unseen", "accuracy"), ("seen", "accuracy")):
            values = [row[name][figure] for row in runs]
            table[-1].append(f"{np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})")
    limit = {name: float(np.mean([row["unseen"][name] for row in rows])) for name in ("limit", "posterior_accuracy")}
    table.append(["posterior", f"{limit['limit']:.4f}", f"{limit['posterior_accuracy']:.4f}", ""])
    figures = {"posterior": limit, "logged_steps": steps, "runs": rows}
    maskgit.write_figures(settings, figures, settings.out / "remedies.json", settings.json)
    labels = {"x_label": "step", "y_label": "cross-entropy on unseen rectangles, nats per hidden token"}
    labels |= {"title": "S2's remedies, mean of three seeds", "references": {"posterior": limit["limit"]}}
    maskgit.line_plot(curves, **labels, log_y=True).save(settings.out / "remedies.png")
    maskgit.print_table(["rectangles, remedy", "unseen: cross-entropy", "accuracy", "the 100: accuracy"], table)


# ---------------------------------------------------------------------------------------------------
# Settings

GRID = dict(steps=7000, batch_size=32, heads=2, lr=1e-2, mask="0.3+0.4+0.5+cosine", test_images=200, proposals=3000)
SPARSE = dict(steps=7500, batch_size=256, heads=4, lr=6e-3, mask="0.35", test_images=1000, proposals=8000)


def parse_arguments():
    parser, count = maskgit.CommandLine(__doc__), maskgit.at_least(1)
    add = parser.add_argument_group("what to do").add_argument
    add("--task", choices=("grid", "sparse"), default="grid")
    add("--remedies", action="store_true", help="S2's four remedies on the sparse task, three seeds each")
    add("--test-images", type=maskgit.at_least(8), help="default 1000, of the grid task 200")
    add("--proposals", type=count, help="of the chain behind each posterior; default 8000, of the grid task 3000")
    add = parser.add_argument_group("images").add_argument
    add("--rectangles", type=count, help="train on so many rectangles (S2: 100); default: fresh ones at every step")
    add("--fixed-points", action="store_true", help="each of the --rectangles always with the same points (S2)")
    help = "patches per image of the sparse task: one number, or the fewest and the most, drawn for each batch"
    add("--points", type=maskgit.at_least(2), nargs="+", default=[24], help=help)
    add("--sampling", choices=("uniform", "edges", "cornerless"), default="uniform", help="where the points lie")
    add("--soft-targets", type=maskgit.at_least(0.0, float), default=0.0, help="width; near codes are nearly right")
    parser.add_shared_options("runs/rectangles_TASK")
    known = parser.parse_known_args()[0]
    task = "sparse" if known.remedies else known.task
    parser.set_defaults(task=task, out=Path(f"runs/rectangles_{task}"), dim=64, layers=4)
    parser.set_defaults(**GRID if task == "grid" else SPARSE)
    if known.remedies:  # one budget for all
        parser.set_defaults(steps=400, out=Path("runs/rectangles_remedies"))
    settings = parser.parse_args()
    if settings.remedies and settings.task != "sparse":
        parser.error("--remedies are those of the sparse task")
    if len(settings.points) > 2 or settings.points[-1] < settings.points[0]:
        parser.error("--points takes one number, or the fewest and the most")
    if settings.fixed_points and not settings.rectangles:
        parser.error("--fixed-points needs a number of --rectangles")
    return settings


def main():
    settings = parse_arguments()
    (run_remedies if settings.remedies else run)(settings)


if __name__ == "__main__":
    maskgit.run_as_script(main)
