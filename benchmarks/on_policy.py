"""What a share of on-policy rows does to the squares, beside weights on the loss; three seeds each.

    python benchmarks/on_policy.py --json results/squares_on_policy.json

Shares of 0 to 3/4 of the default run's batch, in a smaller budget of steps. In place of on-policy rows the loss may be
weighted, after PAPL (arXiv 2509.23405): in each row by 1 + T softmax(log-probability of the true token), where T is the
number of its hidden tokens, which stresses what a confident order would commit first; and its inverse, by the same with
the sign changed. 20 minutes on two cores.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import maskgit
import train_squares

VARIANTS = {f"share {share:g}": (share, 0) for share in (0, 0.25, 0.5, 0.75)} | {"PAPL": (0, 1), "inverse": (0, -1)}
plain_cross_entropy = maskgit.masked_cross_entropy


def weighted_cross_entropy(sign):
    """masked_cross_entropy with weights on the hidden tokens: in each row they add up to twice their number."""

    def loss(logits, targets, mask, *, count):
        log_probs = logits.log_softmax(dim=-1).gather(-1, targets[..., None])[..., 0]  # (B, T)
        share = (sign * log_probs.detach()).masked_fill(~mask, -torch.inf).softmax(dim=-1).nan_to_num()
        return -(log_probs * (mask + mask.sum(dim=1, keepdim=True) * share)).sum() / (2 * count)

    return loss


def run(settings, prior, name, seed):
    """The figures of one training."""
    share, sign = VARIANTS[name]
    sys.argv = ["train_squares.py", "--on-policy", str(share), "--steps", str(settings.steps), "--seed", str(seed)]
    training = train_squares.parse_arguments()
    training.precision = maskgit.fast_precision(settings.device)
    maskgit.masked_cross_entropy = weighted_cross_entropy(sign) if sign else plain_cross_entropy
    model, history = train_squares.train_model(training, prior, settings.device)
    row = {"variant": name, "seed": seed, "seconds": history[-1]["seconds"]}
    row["kl"] = train_squares.score(model, prior, "cosine", train_squares.TEST_COUNT, train_squares.TEST_SEED)["kl"]
    for given, start in train_squares.completion_inputs(prior).items():
        options = {"order": maskgit.by_entropy}
        row[given] = train_squares.judge(model, prior, *start, settings.device, options, 20)
    return row


def main():
    parser = maskgit.CommandLine(__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--device", type=maskgit.pick_device, default="auto")
    parser.add_argument("--steps", type=maskgit.at_least(1), default=900, help="of each training")
    settings, prior = parser.parse_args(), train_squares.all_squares(8, 2, 5)
    rows, table = [], []
    for name in VARIANTS:
        rows += [run(settings, prior, name, seed) for seed in range(3)]
        found = rows[-3:]
        cells = [" ".join(f"{row['kl']:.4f}" for row in found)]
        for given in train_squares.completion_inputs(prior):
            cells.append(" ".join(f"{row[given]['valid']:.1%}" for row in found))
        cells.insert(2, " ".join(f"{row['nothing']['total_variation']:.3f}" for row in found))
        table.append([name, *cells])
        print(*table[-1], sep="  ", file=sys.stderr, flush=True)
    head = ["rows", "KL, cosine masks", "nothing: valid", "its total variation"]
    maskgit.print_table([*head, *list(train_squares.completion_inputs(prior))[1:]], table)
    settings.device = str(settings.device)
    maskgit.write_figures(settings, {"runs": rows}, settings.json)


if __name__ == "__main__":
    maskgit.run_as_script(main)
