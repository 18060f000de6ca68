"""S2's rectangles: black and white images with one filled rectangle, as tokens of 4x4 patches.

    python train_rectangles.py --task grid        all 169 overlapping patches of a 16x16 image, a fifth hidden
    python train_rectangles.py --task sparse      24 patches at continuous coordinates, a fifth hidden
    python train_rectangles.py --task sparse --rectangles 100 --fixed-points --out runs/rectangles_100    S2's failure
    python train_rectangles.py --remedies         what S2 proposed against it and did not try, three seeds each

Everything is scored on rectangles that training never saw, beside the exact posterior: the chance of each token given
the visible ones, over all rectangles that agree with them.

On 24 sparse points, 91.0 % of the hidden tokens are right where the posterior gets 91.4 %, after 19 minutes on one core
of an AMD EPYC server (results/rectangles_sparse.json); on the grid 98.6 % of 99.0 %, after 9.4 minutes on two cores
(results/rectangles_grid.json).

A run leaves model.pt, log.csv, metrics.json and its pictures in runs/rectangles_grid or runs/rectangles_sparse (--out).
"""

import argparse
import itertools
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from maskgit import (
    CommandLine,
    PatchTokenizer,
    at_least,
    decode,
    grid_coords,
    image_grid,
    line_plot,
    load_checkpoint,
    mask_kind,
    open_run,
    print_table,
    process_rank,
    run_as_script,
    run_record,
    step_seed,
    train_as_set,
    training_mask,
    write_figures,
)

SIZE, PATCH, CODES = 16, 4, 20  # cells per side of an image and of a patch; S2's number of codes
MIN_SIDE = 2  # of a rectangle, in cells
PIXELS = 16  # of S2's 256x256 image, per cell and axis
PIXELS_OF = {"grid": PIXELS, "sparse": None}  # the grid task's corners lie on pixels, the sparse task's anywhere
CODEBOOK_RECTANGLES = 100  # S2's
GRID_POINTS = grid_coords(SIZE - PATCH + 1, SIZE - PATCH + 1).numpy()  # (169, 2)
# Rectangles that no training run draws, unless its seed is as large.
VALIDATION_SEED, TEST_SEED = 10**9, 10**9 + 1
VALIDATION_COUNT = {"grid": 64, "sparse": 500}

# ---------------------------------------------------------------------------------------------------
# Rectangles and their patches. A rectangle is x0, y0, x1, y1 in cells.


def draw_rectangles(count, rng, pixels=None):
    """Rectangles (count, 4) from two uniform corners, those less than MIN_SIDE apart on an axis drawn again.

    pixels=16 puts the corners on the pixels of S2's 256x256 image; None draws real numbers.
    """
    kept = np.empty((0, 4))
    while len(kept) < count:
        shape = (2 * count, 2, 2)
        corners = rng.integers(SIZE * pixels + 1, size=shape) / pixels if pixels else SIZE * rng.random(shape)
        rectangles = np.sort(corners, axis=1).reshape(-1, 4)
        kept = np.concatenate([kept, rectangles[possible(rectangles)]])
    return kept[:count]


def possible(rectangles):
    """Whether rectangles (B, 4) lie in the image, corners in order and sides long enough: (B,)."""
    low, high = rectangles[:, :2], rectangles[:, 2:]
    return ((low >= 0) & (high <= SIZE) & (high - low >= MIN_SIDE)).all(axis=1)


def coverage(rectangles, points, size=PATCH):
    """The covered share of each cell of the size x size patches with their top left corners at `points`, exactly.

    rectangles (B, 4), points (T, 2) or (B, T, 2), any real numbers -> (B, T, size * size) float32, row by row.
    """
    cells = points[..., None, :] + np.arange(size)[:, None]  # (T or B, T, size, 2): their lower edges on both axes
    low = np.maximum(cells, rectangles[:, None, None, :2])
    high = np.minimum(cells + 1, rectangles[:, None, None, 2:])
    covered = (high - low).clip(min=0).astype(np.float32)  # (B, T, size, 2)
    patches = covered[..., :, None, 1] * covered[..., None, :, 0]
    return patches.reshape(*patches.shape[:2], size * size)


def draw_images(rectangles):
    """The 16x16 versions of rectangles (B, 4): (B, 16, 16, 1)."""
    return coverage(rectangles, np.zeros((1, 2)), SIZE).reshape(-1, SIZE, SIZE, 1)


def fit_tokenizer(seed):
    """S2's codebook: the overlapping patches of 100 rectangles, in 20 clusters."""
    rectangles = draw_rectangles(CODEBOOK_RECTANGLES, np.random.default_rng([seed, 0]), PIXELS)
    return PatchTokenizer.fit(draw_images(rectangles), CODES, PATCH, stride=1, seed=seed, restarts=5)


def encode(rectangles, points, tokenizer):
    """Tokens (B, T) of the patches at `points`."""
    return tokenizer.nearest(coverage(rectangles, points))


# ---------------------------------------------------------------------------------------------------
# Training data


def draw_points(sampling, rectangles, count, rng):
    """Top left corners (B, count, 2) of patches inside the image: "uniform" (S2), "edges" (every other patch crosses an
    edge of its rectangle) or "cornerless" (no patch contains a corner)."""
    points = rng.random((len(rectangles), count, 2)) * (SIZE - PATCH)
    for _ in range(100):  # a rectangle as large as the image may leave no patch that would do
        wrong = unwanted(sampling, rectangles, points)
        if not wrong.any():
            break
        points[wrong] = rng.random((wrong.sum(), 2)) * (SIZE - PATCH)
    return points


def unwanted(sampling, rectangles, points):
    """Which of the points (B, T, 2) the sampling does not allow: (B, T)."""
    if sampling == "edges":
        covered = coverage(rectangles, points).mean(axis=-1)
        every_other = np.arange(points.shape[1]) % 2 == 0
        return ((covered == 0) | (covered == 1)) & every_other
    if sampling == "cornerless":
        edges = rectangles.reshape(-1, 1, 2, 2)  # (B, 1, lower or upper edge, axis)
        inside = (points[:, :, None] < edges) & (edges < points[:, :, None] + PATCH)
        return inside.any(axis=2).all(axis=2)  # an edge on both axes
    return np.zeros(points.shape[:2], dtype=bool)


def make_batch(tokenizer, settings):
    """batch(step) for train(): fresh rectangles at every step, or --rectangles that are always the same; fresh points,
    or with --fixed-points those of each rectangle; fresh masks in any case."""
    if settings.rectangles:
        fixed, rng = training_rectangles(settings), np.random.default_rng([settings.seed, 2])
        fixed_points = draw_points(settings.sampling, fixed, settings.points, rng)

    def batch(step):
        rng = np.random.default_rng(step_seed(settings.seed, step))
        if settings.rectangles:
            rows = rng.integers(len(fixed), size=settings.batch_size)
            rectangles = fixed[rows]
        else:
            rectangles = draw_rectangles(settings.batch_size, rng, PIXELS_OF[settings.task])
        if settings.task == "grid":
            points = GRID_POINTS
        elif settings.fixed_points:
            points = fixed_points[rows]
        else:
            points = draw_points(settings.sampling, rectangles, settings.points, rng)
        tokens = torch.from_numpy(encode(rectangles, points, tokenizer))
        mask = training_mask(tokens.shape, settings.mask, torch.Generator().manual_seed(step_seed(settings.seed, step)))
        return tokens, mask, torch.from_numpy(points).float()

    return batch


def training_rectangles(settings):
    """The --rectangles of a run that always shows the same ones; 100 are those of the codebook (S2)."""
    return draw_rectangles(settings.rectangles, np.random.default_rng([settings.seed, 0]), PIXELS)


def soft_targets(tokenizer, width):
    """What to predict in place of each code: the codes weighted by exp(-(d / width)^2), where d is the distance
    between the centroids: (K, K)."""
    centroids = torch.from_numpy(tokenizer.centroids)
    return (-(torch.cdist(centroids, centroids) / width).square()).softmax(dim=-1)


# ---------------------------------------------------------------------------------------------------
# The exact posterior


def posterior_chain(rectangles, points, mask, tokenizer, rng, pixels=None):
    """An endless chain of rectangles (B, 4) and their tokens (B, T) that agree with the visible tokens.

    A rectangle is itself an exact draw from the posterior given its own visible tokens. Starting there, symmetric
    proposals that are kept when all visible tokens stay as they are (Metropolis, uniform prior) leave every state
    such a draw. A proposal moves some of the four sides, by up to a distance between the image's size and a
    thousandth of it. The two arrays yielded are the same ones every time, changed in place.
    """
    state, tokens = rectangles.copy(), encode(rectangles, points, tokenizer)
    observed = tokens.copy()
    while True:
        reach = SIZE * 2.0 ** -rng.uniform(0, 10, size=(len(state), 1))
        moves = rng.uniform(-reach, reach, size=state.shape) * (rng.random(state.shape) < 0.4)
        proposal = state + (np.round(moves * pixels) / pixels if pixels else moves)
        proposed = encode(proposal, points, tokenizer)
        agrees = possible(proposal) & ((proposed == observed) | mask).all(axis=1)
        state[agrees], tokens[agrees] = proposal[agrees], proposed[agrees]
        yield state, tokens


class TestSet(NamedTuple):
    """Rectangles with hidden tokens, and the exact answer."""

    rectangles: np.ndarray  # (B, 4)
    points: np.ndarray  # (B, T, 2)
    tokens: np.ndarray  # (B, T)
    mask: np.ndarray  # (B, T), True = hidden
    posterior: torch.Tensor  # (hidden tokens, K): the probability of each code
    draws: np.ndarray  # (B, 4): a rectangle drawn from the posterior

    def rows(self, rows):
        """Some of the images, without their posterior."""
        return TestSet(*(None if field is self.posterior else field[rows] for field in self))


def make_test(settings, rectangles, tokenizer, *, points=24, mask="0.2", proposals=1, seed=TEST_SEED):
    """The task's tokens of these rectangles (B, 4), and the posterior of the hidden ones from a chain of so many
    proposals. mask: a kind of training_mask, or "half" for the patches centred in the left half of the image."""
    rng = np.random.default_rng([seed, 1])
    if settings.task == "grid":
        positions = np.tile(GRID_POINTS, (len(rectangles), 1, 1))
    else:
        positions = draw_points("uniform", rectangles, points, rng)
    tokens = encode(rectangles, positions, tokenizer)
    if mask == "half":
        hidden = positions[..., 0] + PATCH / 2 < SIZE / 2
    else:
        hidden = training_mask(tokens.shape, mask, torch.Generator().manual_seed(seed)).numpy()
    counts = np.zeros((*tokens.shape, CODES), dtype=np.int32)
    image, position = np.indices(tokens.shape)
    chain = posterior_chain(rectangles, positions, hidden, tokenizer, rng, PIXELS_OF[settings.task])
    for state, drawn in itertools.islice(chain, proposals):
        counts[image, position, drawn] += 1
        draws = state
    posterior = torch.from_numpy(counts[hidden] / proposals).float()
    return TestSet(rectangles, positions, tokens, hidden, posterior, draws)


def unseen_rectangles(settings, count, seed):
    """`count` rectangles of the task that no training run draws, unless its seed is as large."""
    return draw_rectangles(count, np.random.default_rng(seed), PIXELS_OF[settings.task])


# ---------------------------------------------------------------------------------------------------
# Scores


@torch.no_grad()
def hidden_log_probs(model, points, tokens, mask):
    """The model's log-probabilities at the hidden tokens: (hidden tokens, K)."""
    device, mask = next(model.parameters()).device, torch.from_numpy(mask)
    inputs, coords = torch.from_numpy(tokens).masked_fill(mask, model.mask_id), torch.from_numpy(points).float()
    parts = zip(inputs.split(128), coords.split(128), strict=True)
    logits = torch.cat([model(part.to(device), at.to(device)).float().cpu() for part, at in parts])
    return logits.log_softmax(dim=-1)[mask]


def score(model, test):
    """Cross-entropy and accuracy on the hidden tokens, beside the posterior's own.

    Both are expectations over the posterior. hits counts the tokens that were really there; posterior_accuracy and
    posterior_hits agree, up to chance, if the chain has mixed. commonest: of always answering the commonest token.
    """
    log_probs, truth = hidden_log_probs(model, test.points, test.tokens, test.mask), test.posterior
    codes, answers = torch.from_numpy(test.tokens[test.mask]), log_probs.argmax(dim=-1)
    limit, cross_entropy = torch.special.entr(truth).sum(dim=-1).mean(), -(truth * log_probs).sum(dim=-1).mean()
    figures = {
        "cross_entropy": cross_entropy,
        "limit": limit,
        "ratio": cross_entropy / limit,
        "accuracy": truth.gather(-1, answers[:, None]).mean(),
        "posterior_accuracy": truth.amax(dim=-1).mean(),
        "hits": (answers == codes).double().mean(),
        "posterior_hits": (truth.argmax(dim=-1) == codes).double().mean(),
        "commonest": codes.bincount().max() / len(codes),
    }
    return {name: value.item() for name, value in figures.items()}


def picture_errors(tokens, tokenizer, rectangles):
    """How far the pictures stitched from grid tokens (B, 169) are from the true ones: mean absolute error of a cell,
    (B,)."""
    side = SIZE - PATCH + 1
    return np.abs(tokenizer.decode(tokens.reshape(-1, side, side)) - draw_images(rectangles)).mean(axis=(1, 2, 3))


def fill(model, test, **options):
    """The test's tokens with the hidden ones filled in by decode: (B, T)."""
    device = next(model.parameters()).device
    tokens, mask, coords = (torch.from_numpy(array).to(device) for array in (test.tokens, test.mask, test.points))
    generator = torch.Generator(device).manual_seed(TEST_SEED)
    return decode(model, tokens, mask, coords.float(), generator=generator, **options).cpu().numpy()


def score_pictures(model, test, tokenizer):
    """The errors of four stitched pictures: what decode draws, beside a draw from the posterior; and what it finds
    likeliest, beside the true tokens, whose error is the tokenizer's own. Each excess: its mean and standard error."""
    candidates = {
        "drawn": fill(model, test),
        "posterior": np.where(test.mask, encode(test.draws, test.points, tokenizer), test.tokens),
        "likeliest": fill(model, test, sample="argmax"),
        "tokenizer": test.tokens,
    }
    errors = {name: picture_errors(tokens, tokenizer, test.rectangles) for name, tokens in candidates.items()}
    result = {name: float(error.mean()) for name, error in errors.items()}
    for name, other in (("drawn", "posterior"), ("likeliest", "tokenizer")):
        excess = errors[name] - errors[other]
        result[f"{name}_excess"] = [float(excess.mean()), float(excess.std() / len(excess) ** 0.5)]
    return result


# ---------------------------------------------------------------------------------------------------
# Pictures

CELL = 12  # pixels
GREY, RED, ORANGE = 0.7, (220, 40, 40), (240, 150, 20)


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


def draw_versions(rectangles):
    """S2's first picture: each rectangle in 256x256 pixels, and in 16x16."""
    side = SIZE * PIXELS
    large = coverage(rectangles * PIXELS, np.zeros((1, 2)), side).reshape(-1, side, side, 1)
    small = draw_images(rectangles).repeat(PIXELS, axis=1).repeat(PIXELS, axis=2)
    pairs = np.stack([large, small], axis=1).reshape(-1, side, side, 1)
    return image_grid(pairs, len(pairs), titles=["256x256", "16x16"] * len(rectangles))


def draw_grid_samples(model, tests, tokenizer):
    """Truth, masked, filled: a row for each kind of mask. A dot marks the centre of a hidden patch."""
    cells = []
    for test in tests:
        centre = GRID_POINTS + PATCH / 2
        for tokens, mask, answer in zip(test.tokens, test.mask, fill(model, test), strict=True):
            dots = [(x - 0.2, y - 0.2, x + 0.2, y + 0.2, ORANGE) for x, y in centre[mask]]
            cells.append(draw_boxes(draw_patches(GRID_POINTS, tokens, tokenizer), []))
            cells.append(draw_boxes(draw_patches(GRID_POINTS[~mask], tokens[~mask], tokenizer), dots))
            cells.append(draw_boxes(draw_patches(GRID_POINTS, answer, tokenizer), []))
    images = len(cells) // (3 * len(tests))
    return image_grid(np.stack(cells), 3 * images, titles=["truth", "masked", "filled"] * images)


def draw_sparse_samples(model, test, tokenizer, draws):
    """A row per image: the visible patches; with the predicted ones; with the true ones; and the mean of so many
    draws from the posterior. Hidden patches are framed in orange, the true rectangle in red."""
    predicted = test.tokens.copy()
    predicted[test.mask] = hidden_log_probs(model, test.points, test.tokens, test.mask).argmax(dim=-1).numpy()
    chain = posterior_chain(test.rectangles, test.points, test.mask, tokenizer, np.random.default_rng(TEST_SEED))
    side, spread = SIZE * CELL, 0
    for rectangles, _ in itertools.islice(chain, 0, 10 * draws, 10):
        spread += coverage(rectangles * CELL, np.zeros((1, 2)), side).reshape(-1, side, side) / draws
    cells = []
    for i, (points, mask) in enumerate(zip(test.points, test.mask, strict=True)):
        boxes = [(x, y, x + PATCH, y + PATCH, ORANGE) for x, y in points[mask]] + [(*test.rectangles[i], RED)]
        visible = draw_patches(points[~mask], test.tokens[i][~mask], tokenizer)
        completed = [draw_patches(points, tokens[i], tokenizer) for tokens in (predicted, test.tokens)]
        cells += [draw_boxes(picture, boxes) for picture in (visible, *completed, spread[i])]
    return image_grid(np.stack(cells), 4, titles=["visible", "predicted", "true tokens", "posterior's mean"])


# ---------------------------------------------------------------------------------------------------
# One run


def train_model(settings, tokenizer, device, out=None):
    """A trained MaskGIT, and the rows of its log with the cross-entropy on unseen rectangles in each."""
    rectangles = unseen_rectangles(settings, VALIDATION_COUNT[settings.task], VALIDATION_SEED)
    unseen = make_test(settings, rectangles, tokenizer, seed=VALIDATION_SEED)
    codes = torch.from_numpy(unseen.tokens[unseen.mask])

    def validate(model):
        log_probs = hidden_log_probs(model, unseen.points, unseen.tokens, unseen.mask)
        return {"unseen": torch.nn.functional.nll_loss(log_probs, codes).item()}

    return train_as_set(
        settings,
        CODES,
        make_batch(tokenizer, settings),
        device,
        out=out,
        may_change=("remedies", "test_images", "proposals"),
        tokenizer=tokenizer,
        soft_targets=soft_targets(tokenizer, settings.soft_targets) if settings.soft_targets else None,
        validate=validate,
    )


def run(settings):
    device, out = open_run(settings), settings.out
    tokenizer = load_checkpoint(out / "model.pt")["tokenizer"] if settings.resume else fit_tokenizer(settings.seed)
    if tokenizer is None:
        raise ValueError(f"{out / 'model.pt'} holds no tokenizer: it is a run of another script")
    model, history = train_model(settings, tokenizer, device, out)
    if process_rank()[0] > 0:
        return

    trained = time.monotonic()
    draw_versions(draw_rectangles(3, np.random.default_rng(TEST_SEED), PIXELS)).save(out / "rectangles.png")
    by_brightness = tokenizer.centroids[tokenizer.centroids.mean(axis=1).argsort()]
    image_grid(by_brightness.reshape(CODES, PATCH, PATCH, 1), CODES // 2, scale=16).save(out / "centroids.png")
    figures = (score_grid if settings.task == "grid" else score_sparse)(model, tokenizer, settings)
    column = {name: [row[name] for row in history] for name in history[0]}
    line_plot(
        {
            f"training, mask {settings.mask}": (column["step"], column["loss"]),
            "unseen, mask 0.2": (column["step"], column["unseen"]),
        },
        title=f"Rectangles, {settings.task} task",
        x_label="step",
        y_label="cross-entropy, nats per hidden token",
        references={"posterior, mask 0.2": figures["scores"]["unseen rectangles"]["limit"]},
        log_y=True,
    ).save(out / "loss.png")
    seconds = {"train": round(history[-1]["seconds"], 1), "scores": round(time.monotonic() - trained, 1)}
    figures |= {"log": history[-1], "seconds": seconds, "parameters": sum(p.numel() for p in model.parameters())}
    write_figures(settings, figures, out / "metrics.json", settings.json)
    print(S2_REPORTS[settings.task])
    print(f"trained in {seconds['train']} s, scored in {seconds['scores']} s")
    print("pictures:", *(str(out / f"{name}.png") for name in ("samples", "loss", "rectangles", "centroids")))


def score_grid(model, tokenizer, settings):
    """20 % hidden, and the harder masks: one forward pass, and the pictures that decode fills in."""
    rectangles = unseen_rectangles(settings, settings.test_images, TEST_SEED)
    scores, pictures, shown = {}, {}, []
    for mask, name in (("0.2", "unseen rectangles"), ("cosine", "cosine masking"), ("half", "left half hidden")):
        test = make_test(settings, rectangles, tokenizer, mask=mask, proposals=settings.proposals)
        scores[name], pictures[name] = score(model, test), score_pictures(model, test, tokenizer)
        shown.append(test.rows([len(rectangles) // 2, -1]))
    draw_grid_samples(model, shown, tokenizer).save(settings.out / "samples.png")
    print_scores(scores)
    print_pictures(pictures)
    return {"scores": scores, "pictures": pictures}


def score_sparse(model, tokenizer, settings):
    """One forward pass on unseen rectangles, on those of the training where there are such, and with other numbers of
    points."""
    rectangles = unseen_rectangles(settings, settings.test_images, TEST_SEED)
    tests = {"unseen rectangles": (rectangles, 24)}
    if settings.rectangles:
        tests["training rectangles"] = (training_rectangles(settings), 24)
    tests |= {f"{points} points": (rectangles[: len(rectangles) // 4], points) for points in (6, 12, 48, 96)}
    tests = {
        name: make_test(settings, images, tokenizer, points=points, proposals=settings.proposals)
        for name, (images, points) in tests.items()
    }
    scores = {name: score(model, test) for name, test in tests.items()}
    shown = tests["unseen rectangles"].rows(slice(4))
    draw_sparse_samples(model, shown, tokenizer, settings.proposals // 10).save(settings.out / "samples.png")
    print_scores(scores)
    return {"scores": scores}


def print_scores(scores):
    head = ["hidden tokens", "cross-entropy", "posterior", "ratio", "accuracy", "posterior", "share", "commonest token"]
    rows = []
    for name, row in scores.items():
        figures = [
            f"{row['cross_entropy']:.4f}",
            f"{row['limit']:.4f}",
            f"{row['ratio']:.3f}",
            f"{row['accuracy']:.2%}",
        ]
        figures += [f"{row['posterior_accuracy']:.2%}", f"{row['accuracy'] / row['posterior_accuracy']:.1%}"]
        rows.append([name, *figures, f"{row['commonest']:.1%}"])
    print_table(head, rows)


def print_pictures(pictures):
    head = ["mean error of a cell", "drawn", "posterior draw", "excess", "likeliest", "true tokens", "excess"]
    rows = []
    for name, row in pictures.items():
        line = [name]
        for kind, other in (("drawn", "posterior"), ("likeliest", "tokenizer")):
            mean, error = row[f"{kind}_excess"]
            line += [f"{row[kind]:.5f}", f"{row[other]:.5f}", f"{mean:+.5f} (s.e. {error:.5f})"]
        rows.append(line)
    print_table(head, rows)


# ---------------------------------------------------------------------------------------------------
# S2's remedies

REMEDIES = {
    "as it is": {},
    "soft targets": {"soft_targets": 0.5},
    "points near edges": {"sampling": "edges"},
    "no corners": {"sampling": "cornerless"},
}


def run_remedies(settings):
    """Each remedy with 100 rectangles and with fresh ones, three seeds each; writes remedies.json and remedies.png."""
    device, rows, curves = open_run(settings), [], {}
    for seed in range(settings.seed, settings.seed + 3):
        tokenizer, fixed = fit_tokenizer(seed), argparse.Namespace(seed=seed, rectangles=100)
        shown = {
            "unseen": unseen_rectangles(settings, settings.test_images, TEST_SEED),
            "seen": training_rectangles(fixed),
        }
        tests = {
            name: make_test(settings, rectangles, tokenizer, proposals=settings.proposals)
            for name, rectangles in shown.items()
        }
        for (source, count), (remedy, change) in itertools.product(SOURCES.items(), REMEDIES.items()):
            varied = argparse.Namespace(**vars(settings) | {"seed": seed, "rectangles": count} | change)
            model, history = train_model(varied, tokenizer, device)
            row = {"variant": f"{source}, {remedy}", "seed": seed, "curve": [row["unseen"] for row in history]}
            rows.append(row | {name: score(model, test) for name, test in tests.items()})
            print(f"{row['variant']}, seed {seed}: accuracy {rows[-1]['unseen']['accuracy']:.4f}", flush=True)
    table, steps = [], [row["step"] for row in history]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        runs = [row for row in rows if row["variant"] == variant]
        curves[variant] = (steps, np.mean([row["curve"] for row in runs], axis=0))
        line = [variant]
        for name, figure in (("unseen", "cross_entropy"), ("unseen", "accuracy"), ("seen", "accuracy")):
            values = [row[name][figure] for row in runs]
            line.append(f"{np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})")
        table.append(line)
    limit = {name: float(np.mean([row["unseen"][name] for row in rows])) for name in ("limit", "posterior_accuracy")}
    table.append(["posterior", f"{limit['limit']:.4f}", f"{limit['posterior_accuracy']:.4f}", ""])
    figures = {"posterior": limit, "logged_steps": steps, "runs": rows}
    write_figures(settings, figures, settings.out / "remedies.json", settings.json)
    line_plot(
        curves,
        title="S2's remedies, mean of three seeds",
        x_label="step",
        y_label="cross-entropy on unseen rectangles, nats per hidden token",
        references={"posterior": limit["limit"]},
        log_y=True,
    ).save(settings.out / "remedies.png")
    print_table(["rectangles, remedy", "unseen: cross-entropy", "accuracy", "the 100: accuracy"], table)


# ---------------------------------------------------------------------------------------------------
# Settings

SOURCES = {"100 rectangles": 100, "fresh ones": None}
DEFAULTS = {
    "grid": {"steps": 7000, "batch_size": 32, "heads": 2, "lr": 1e-2, "mask": "0.3+0.4+0.5+cosine"},
    "sparse": {"steps": 7500, "batch_size": 256, "heads": 4, "lr": 6e-3, "mask": "0.35"},
}
S2_REPORTS = {
    "grid": "S2: works well (no figures)",
    "sparse": "S2: training accuracy is decent, unseen rectangles do not work well at all (no figures)",
}
# One budget for all remedies.
REMEDY_DEFAULTS = {"steps": 400, "out": Path("runs/rectangles_remedies")}


def parse_arguments():
    parser, count = CommandLine(__doc__), at_least(1)
    add = parser.add_argument_group("what to do").add_argument
    add("--task", choices=DEFAULTS, default="grid")
    add("--remedies", action="store_true", help="S2's four remedies on the sparse task, three seeds each")
    add("--test-images", type=at_least(8), help="default 1000, of the grid task 200")
    add("--proposals", type=count, help="of the chain behind each posterior; default 8000, of the grid task 3000")
    parser.add_run_options("runs/rectangles_TASK")
    add = parser.add_argument_group("images").add_argument
    add("--rectangles", type=count, help="train on so many rectangles (S2: 100); default: fresh ones at every step")
    add("--fixed-points", action="store_true", help="each of the --rectangles always with the same points (S2)")
    add("--points", type=at_least(2), default=24, help="patches per training image of the sparse task")
    add(
        "--sampling",
        choices=("uniform", "edges", "cornerless"),
        default="uniform",
        help="where training has its points",
    )
    add("--mask", type=mask_kind, help="a schedule, a fraction, or several that share each batch: 0.2+cosine")
    add("--soft-targets", type=at_least(0.0, float), default=0.0, help="width; near codes are nearly right")
    parser.add_model_options()
    parser.add_training_options()
    known = parser.parse_known_args()[0]
    task = "sparse" if known.remedies else known.task
    defaults = {"task": task, "out": Path(f"runs/rectangles_{task}"), "test_images": 200 if task == "grid" else 1000}
    defaults |= {"proposals": 3000 if task == "grid" else 8000, "dim": 64, "layers": 4, "rotary": True}
    parser.set_defaults(**defaults | DEFAULTS[task] | (REMEDY_DEFAULTS if known.remedies else {}))
    settings = parser.parse_args()
    if settings.remedies and settings.task != "sparse":
        parser.error("--remedies are those of the sparse task")
    if settings.fixed_points and not settings.rectangles:
        parser.error("--fixed-points needs a number of --rectangles")
    return settings


def main():
    settings = parse_arguments()
    settings.record = run_record()  # now: the code may change while it runs
    (run_remedies if settings.remedies else run)(settings)


if __name__ == "__main__":
    run_as_script(main)
