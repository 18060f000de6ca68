"""What on-policy rows and holes do to the squares, beside weights on the loss; three seeds each.

    python benchmarks/on_policy.py --json results/squares_on_policy.json
    python benchmarks/on_policy.py --json results/squares_on_policy.json --variants "random masks" "share 0.5"

The training masks of the default run with shares of 0 to 3/4 of the rows on-policy, and random masks alone. In place
of on-policy rows the loss may be weighted, after PAPL (arXiv 2509.23405): in each row by 1 + T softmax(log-probability
of the true token), where T is the number of its hidden tokens, which stresses what a confident order commits first; and
the inverse, with the sign changed.

Beside the scores of completions it measures their error step by step: the divergence between what the posterior and the
model say of the tokens that a step commits, in nats per image. They add up to the KL divergence of all completions.
And it counts the inputs that one square agrees with but four rectangles or more: equal sides alone decide. One model
goes on to learn by heart the states that it visits, without any chance: is rarity all that it lacks? All variants take
one and a half hours on two cores.
"""

import itertools
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import maskgit
import train_squares

MASK = "cosine+cosine+half+1"
VARIANTS = {"random masks": ("cosine", 0, 0)} | {f"share {s:g}": (MASK, s, 0) for s in (0, 0.25, 0.5, 0.75)}
VARIANTS |= {"PAPL": ("cosine", 0, 1), "inverse PAPL": ("cosine", 0, -1)}
plain_cross_entropy = maskgit.masked_cross_entropy


def weighted_cross_entropy(sign):
    """masked_cross_entropy with weights on the hidden tokens: in each row they add up to twice their number."""

    def loss(logits, targets, mask, *, count):
        log_probs = logits.log_softmax(dim=-1).gather(-1, targets[..., None])[..., 0]  # (B, T)
        share = (sign * log_probs.detach()).masked_fill(~mask, -math.inf).softmax(dim=-1).nan_to_num()
        return -(log_probs * (mask + mask.sum(dim=1, keepdim=True) * share)).sum() / (2 * count)

    return loss


def visited(model, tokens, mask, device):
    """What is hidden before and after each step of decode, which is told the true values: [(mask, mask)]."""

    def follow(step):
        step.values.copy_(tokens.to(device)[step.image, step.place])
        return maskgit.by_entropy(step)

    trace = []
    train_squares.fill(model, tokens, mask, device, order=follow, steps=64, trace=trace)
    return list(itertools.pairwise([mask, *(hidden.cpu() for _, hidden in trace)]))


@torch.no_grad()
def error_by_step(model, prior, tokens, steps, device):
    """Nats per image of each of the steps that visited gives; those from the 20th on are one."""
    errors, coords = [0.0] * 20, train_squares.pixel_coords(prior).to(device)
    for i, (before, after) in enumerate(steps):
        agree, fewer = (train_squares.consistent(prior, tokens, hidden).sum(dim=1) for hidden in (before, after))
        log_probs = model(tokens.masked_fill(before, model.mask_id).to(device), coords).log_softmax(dim=-1).cpu()
        found = (log_probs.gather(-1, tokens[..., None])[..., 0] * (before & ~after)).sum(dim=1)
        errors[min(i, 19)] += ((fewer / agree).log() - found).mean().item()
    return errors


def learn_by_heart(model, prior, device, steps):
    """Train on nothing but the states that the model visits from nothing, all at once, so that no chance is left. The
    error of all steps together: before; after, in these same states; and after, in those it visits then."""
    everything = torch.ones_like(prior, dtype=torch.bool)
    states = visited(model, prior, everything, device)
    mask = torch.cat([before for before, _ in states])
    unfinished, coords = mask.any(dim=1), train_squares.pixel_coords(prior)
    tokens, mask = prior.repeat(len(states), 1)[unfinished], mask[unfinished]
    result = {"states": len(tokens.masked_fill(mask, model.mask_id).unique(dim=0))}
    result["before"] = sum(error_by_step(model, prior, prior, states, device))
    options = {"lr": 4e-3, "optimizer": "muon", "weight_decay": 0.0, "warmup": 10, "log_steps": steps}
    options["precision"] = maskgit.fast_precision(device)
    maskgit.train(model, lambda step: (tokens, mask, coords), steps=steps, **options)
    result["after"] = sum(error_by_step(model, prior, prior, states, device))
    now = visited(model, prior, everything, device)
    return result | {"after, where decode now goes": sum(error_by_step(model, prior, prior, now, device))}


def run(settings, prior, name, seed):
    """The figures of one training."""
    mask, share, sign = VARIANTS[name]
    sys.argv = ["train_squares.py", "--mask", mask, "--on-policy", str(share), "--seed", str(seed)]
    training = train_squares.parse_arguments()
    training.steps, training.precision = settings.steps, maskgit.fast_precision(settings.device)
    maskgit.masked_cross_entropy = weighted_cross_entropy(sign) if sign else plain_cross_entropy
    out = settings.out / f"{name}, seed {seed}, {settings.steps} steps"
    training.resume = (out / "model.pt").exists()
    model, _ = train_squares.train_model(training, prior, settings.device, out)
    row = {"variant": name, "seed": seed}
    row["kl"] = train_squares.score(model, prior, "cosine", train_squares.TEST_COUNT, train_squares.TEST_SEED)["kl"]
    for given, (tokens, mask) in train_squares.completion_inputs(prior).items():
        order = {"order": maskgit.by_entropy}
        row[given] = train_squares.judge(model, prior, tokens, mask, settings.device, order, 20)
        states = visited(model, tokens, mask, settings.device)
        row[given]["error_by_step"] = error_by_step(model, prior, tokens, states, settings.device)
    if name == "share 0.5" and seed == 0:
        maskgit.masked_cross_entropy = plain_cross_entropy
        row["by_heart"] = learn_by_heart(model, prior, settings.device, max(1, settings.steps // 20))
        print("by heart:", row["by_heart"], file=sys.stderr, flush=True)
    return row


def all_rectangles(grid, min_side, max_side):
    """Every image with one filled rectangle: (M, grid * grid)."""
    images, sides = [], range(min_side, max_side + 1)
    for height, width in itertools.product(sides, repeat=2):
        for top, left in itertools.product(range(grid - height + 1), range(grid - width + 1)):
            images.append(torch.zeros(grid, grid, dtype=torch.int64))
            images[-1][top : top + height, left : left + width] = train_squares.WHITE
    return torch.stack(images).flatten(1)


def share_by_equal_sides(prior, kind):
    """The share of inputs that one square agrees with, but at least four rectangles."""
    tokens, mask, _ = train_squares.test_set(prior, kind, 20_000, train_squares.VALIDATION_SEED)
    squares, rectangles = (
        train_squares.consistent(images, tokens, mask).sum(dim=1) for images in (prior, all_rectangles(8, 2, 5))
    )
    return ((squares == 1) & (rectangles >= 4)).double().mean().item()


def main():
    parser = maskgit.CommandLine(__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file, and a plot beside it")
    parser.add_argument("--out", type=Path, default=Path("runs/on_policy"), help="of the models; if broken off, go on")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=maskgit.at_least(1), default=3400, help="of each training")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    settings, prior = parser.parse_args(), train_squares.all_squares(8, 2, 5)
    settings.device = maskgit.pick_device(settings.device)
    rows, table, curves = [], [], {}
    for name in settings.variants:
        rows += [run(settings, prior, name, seed) for seed in range(3)]
        found = rows[-3:]
        line = [" ".join(f"{row['kl']:.4f}" for row in found)]
        line += [" ".join(f"{row['nothing']['total_variation']:.3f}" for row in found)]
        line += [
            " ".join(f"{row[given]['valid']:.1%}" for row in found) for given in train_squares.completion_inputs(prior)
        ]
        table.append([name, *line])
        print(*table[-1], sep="  ", file=sys.stderr, flush=True)
    head = [
        "training",
        "KL, cosine masks",
        "TV from nothing",
        *(f"valid, given {given}" for given in train_squares.completion_inputs(prior)),
    ]
    maskgit.print_table(head, table)
    kinds = {kind: share_by_equal_sides(prior, kind) for kind in ("cosine", "half")}
    print("certain by equal sides alone:", ", ".join(f"{share:.2%} of {kind} masks" for kind, share in kinds.items()))
    for name, given in itertools.product(settings.variants, ("nothing", "left half")):
        steps = [row[given]["error_by_step"] for row in rows if row["variant"] == name]
        curves[f"{name}, {given} given"] = (range(1, 21), torch.tensor(steps).mean(dim=0).tolist())
    labels = {"x_label": "step of decode", "y_label": "nats per image, mean of three seeds"}
    plot = maskgit.line_plot(curves, title="Error of what each step commits", **labels)
    settings.device = str(settings.device)
    maskgit.write_figures(settings, {"certain_by_equal_sides": kinds, "runs": rows}, settings.json)
    if settings.json:
        plot.save(settings.json.with_suffix(".png"))


if __name__ == "__main__":
    maskgit.run_as_script(main)
