"""S1's and S2's squares: black and white 8x8 images with one filled square, and a prior so small that the
best possible answer to every question can be computed.

    python train_squares.py                                  about 4 minutes on 2 CPU cores
    python train_squares.py --preset post2 --device cuda     S2's sizes (post1: S1's), for a GPU
    python train_squares.py --resume                         go on with an interrupted run
    python train_squares.py --completions                    every order and schedule, with the trained model
    python train_squares.py --ablation                       why S1's recipe failed, suspect by suspect

A run leaves model.pt, log.csv, metrics.json and its pictures in runs/squares (--out).
"""

import functools
import json
import math
import time
from pathlib import Path

import numpy as np
import torch

from maskgit import (
    SCHEDULES,
    CommandLine,
    MaskGIT,
    cosine_floor,
    decode,
    fast_precision,
    grid_coords,
    image_grid,
    line_plot,
    load_checkpoint,
    pick_device,
    process_rank,
    random_mask,
    run_as_script,
    run_record,
    save_gif,
    seed_everything,
    step_seed,
    train,
)

BLACK, WHITE, MASK_ID = 0, 1, 2
TASKS = {"cosine": "cosine masking", "single": "one masked pixel", "0.2": "20 % masked"}

# ---------------------------------------------------------------------------------------------------
# The prior and its exact posterior


def all_squares(grid, min_side, max_side):
    """Every image with one filled square of side min_side .. max_side: int64 (M, grid * grid)."""
    if not 1 <= min_side <= max_side <= grid:
        raise ValueError(f"sides {min_side} to {max_side} do not fit a grid of {grid}; need 1 <= min <= max <= grid")
    images = []
    for side in range(min_side, max_side + 1):
        for top in range(grid - side + 1):
            for left in range(grid - side + 1):
                image = torch.zeros(grid, grid, dtype=torch.int64)
                image[top : top + side, left : left + side] = WHITE
                images.append(image.flatten())
    return torch.stack(images)


def consistent(prior, tokens, mask):
    """Which images of the prior (M, T) agree with every visible pixel: bool (B, M)."""
    white, black = ((tokens == WHITE) & ~mask).float(), ((tokens == BLACK) & ~mask).float()
    disagreeing = black @ prior.T.float() + white @ (1 - prior).T.float()
    return disagreeing == 0


def posterior(prior, tokens, mask):
    """The exact probability of white at every pixel, given the visible ones: (B, T).

    The mean of all images of the prior that agree with them; 0 where none does.
    """
    agree = consistent(prior, tokens, mask).float()
    return agree @ prior.float() / agree.sum(dim=1, keepdim=True).clamp(min=1)


class ExactModel:
    """The posterior's marginals in the place of a trained network: what is wrong then is the sampler's fault."""

    mask_id = MASK_ID

    def __init__(self, prior):
        self.prior = prior

    def __call__(self, tokens, coords):
        white = posterior(self.prior, tokens, tokens == MASK_ID)
        return torch.stack([1 - white, white], dim=-1).log().clamp(min=-1e4)


# ---------------------------------------------------------------------------------------------------
# Training data


def draw_mask(kind, shape, generator):
    """Hidden pixels (B, T): kind is "cosine" (S1), "single" (one pixel, S2) or a fraction such as "0.2" (S2)."""
    if kind == "cosine":
        # One ratio from each B-th of [0, 1): the mean loss of a batch then depends less on luck.
        r = (torch.arange(shape[0]) + torch.rand(shape[0], generator=generator)) / shape[0]
        return random_mask(shape, SCHEDULES["cosine"](r.numpy()), generator)
    return random_mask(shape, 0.0 if kind == "single" else float(kind), generator)


def make_batch(prior, settings):
    """batch(step) for train(): each epoch shows every image `presentations` times in a random order."""
    coords = grid_coords(settings.grid, settings.grid)
    seed, size, epoch_length = settings.seed, settings.batch_size, len(prior) * settings.presentations

    @functools.lru_cache(maxsize=4)
    def epoch_order(epoch):
        generator = torch.Generator().manual_seed(step_seed(seed, -1 - epoch))
        return torch.randperm(epoch_length, generator=generator) % len(prior)

    def batch(step):
        first = step * size
        epochs = range(first // epoch_length, (first + size - 1) // epoch_length + 1)
        stream = torch.cat([epoch_order(epoch) for epoch in epochs])
        start = first - epochs[0] * epoch_length
        tokens = prior[stream[start : start + size]]
        mask = draw_mask(settings.mask, tokens.shape, torch.Generator().manual_seed(step_seed(seed, step)))
        return tokens, mask, coords

    return batch


# ---------------------------------------------------------------------------------------------------
# Scores against the posterior


@torch.no_grad()
def score(model, prior, kind, count, seed):
    """Cross-entropy and accuracy on hidden pixels, and the posterior's own, over `count` images.

    Both are expectations over everything the hidden pixels can be, so cross_entropy - limit is exactly the
    mean KL divergence from the posterior, in nats per hidden pixel.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = prior[torch.randint(len(prior), (count,), generator=generator)]
    mask = draw_mask(kind, tokens.shape, generator)
    device, side = next(model.parameters()).device, math.isqrt(tokens.shape[1])
    coords = grid_coords(side, side).to(device)
    inputs = tokens.masked_fill(mask, MASK_ID).split(1024)
    log_probs = torch.cat([model(part.to(device), coords).float().log_softmax(dim=-1).cpu() for part in inputs])[mask]
    white = posterior(prior, tokens, mask)[mask]
    truth = torch.stack([1 - white, white], dim=-1)  # (hidden pixels, 2)
    limit = -torch.xlogy(truth, truth).sum(dim=-1).mean().item()
    cross_entropy = -(truth * log_probs).sum(dim=-1).mean().item()
    accuracy = truth.gather(-1, log_probs.argmax(dim=-1, keepdim=True)).mean().item()
    result = {"cross_entropy": cross_entropy, "limit": limit, "kl": cross_entropy - limit}
    return result | {"accuracy": accuracy, "posterior_accuracy": truth.amax(dim=-1).mean().item()}


# ---------------------------------------------------------------------------------------------------
# Completions: is the filled image a square, and are all the right ones equally likely?


def completion_inputs(prior, draws, seed):
    """{name: (tokens, mask)} with `draws` rows each: nothing visible; half of the pixels of 20 images."""
    hidden = torch.ones(draws, prior.shape[1], dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    images = prior[torch.randint(len(prior), (20,), generator=generator)]
    half = random_mask(images.shape, 0.5, generator)
    rows = torch.arange(draws) * 20 // draws
    return {"all masked": (prior[:1].expand(draws, -1), hidden), "half masked": (images[rows], half[rows])}


def total_variation(prior, tokens, mask, completed):
    """Half the summed difference between the frequencies of the completions and the posterior's probabilities,
    averaged over the different inputs; and what exact sampling would show with as many draws."""
    group = torch.unique(torch.cat([tokens.masked_fill(mask, MASK_ID)], dim=1), dim=0, return_inverse=True)[1]
    matches = (completed[:, None] == prior[None]).all(dim=-1)  # (B, M)
    rng, found, floor = np.random.default_rng(0), [], []
    for g in range(int(group.max()) + 1):
        rows = group == g
        agree = consistent(prior, tokens[rows][:1], mask[rows][:1])[0].double()
        truth, draws = (agree / agree.sum()).numpy(), int(rows.sum())
        counts = matches[rows].sum(dim=0).numpy()
        outside = 1 - counts.sum() / draws  # completions that are no image of the prior
        found.append((np.abs(counts / draws - truth).sum() + outside) / 2)
        exact = rng.multinomial(draws, truth, size=200) / draws
        floor.append(np.abs(exact - truth).sum(axis=1).mean() / 2)
    return float(np.mean(found)), float(np.mean(floor))


def judge(model, prior, tokens, mask, seed, device, **options):
    """Decode and say how good the completions are: valid share, total variation, its floor, network calls."""
    side, trace = math.isqrt(prior.shape[1]), []
    completed = decode(
        model,
        tokens.to(device),
        mask.to(device),
        grid_coords(side, side).to(device),
        generator=torch.Generator(device).manual_seed(seed),
        trace=trace,
        **options,
    ).cpu()
    matches = (completed[:, None] == prior[None]).all(dim=-1)
    valid = (matches & consistent(prior, tokens, mask)).any(dim=1)
    still_hidden = torch.stack([hidden.any(dim=1) for _, hidden in trace[:-1]] or [torch.zeros(len(mask), dtype=bool)])
    calls = mask.any(dim=1).float().cpu() + still_hidden.float().sum(dim=0).cpu()
    found, floor = total_variation(prior, tokens, mask, completed)
    result = {"valid": valid.float().mean().item(), "total_variation": found, "floor": floor}
    return result | {"calls": calls.mean().item(), "most_calls": int(calls.max())}
