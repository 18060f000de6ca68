"""How to fill with one model: orders, temperatures, schedules and numbers of steps, judged by error and by realism.

    python benchmarks/filling.py --checkpoint runs/cats64/model.pt --part validation --json figures.json
    python benchmarks/filling.py --checkpoint runs/cats64/model.pt --ways "as set" --pictures 700 --json figures.json
    python benchmarks/filling.py --checkpoint runs/cats64/model.pt --ways reports --holes brush --json figures.json

The pictures are those of the run: the drawn cats, or the folder that it was trained on. Realism is a Frechet distance
between the true pictures and the filled ones, by the 128 features of a small network, which is trained here, on the
training pictures, to tell by which of four right angles a picture was turned; with --weights by Inception's (FID).

"reports" are R1 and R2's schedules and numbers of steps, with what else they set: no evidence, not blended. A picture
of what they fill in, step by step, lies beside the JSON.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fid
import inpaint
from maskgit import CommandLine, at_least, pick_device, print_table, run_as_script, write_figures

AS_SET = inpaint.FILLING | {"steps": 10, "evidence": True}
REPORTS = {"temperature": 1.0, "choice_temperature": 4.5, "evidence": False, "blend": False}
WAYS = {"as set": {}, "neither": {"evidence": False, "blend": False}, "likeliest": {"sample": "argmax", "steps": 1}}
WAYS |= {"expected": {"sample": "mean"}}
WAYS |= {f"order {order}": {"order": order} for order in ("random", "halton", "entropy")}
WAYS |= {f"temperature {temperature}": {"temperature": temperature} for temperature in (0.2, 0.7, 1.0)}
WAYS |= {f"steps {steps}": {"steps": steps} for steps in (4, 20)}
STUDY = ("linear", "cosine", "square"), (1, 4, 8, 10, 20)
WAYS |= {f"reports {s}, T={t}": REPORTS | {"schedule": s, "steps": t} for s, t in itertools.product(*STUDY)}
KINDS = ["as set", "neither", "likeliest", "expected", "order", "temperature", "steps", "reports"]


def train_observer(pictures, steps, device, batch_size=64):
    """A network from pictures (B, 3, S, S) in [0, 1] to features (B, 128), and how often it told the turn at last."""
    torch.manual_seed(0)
    layers = []
    for width, out in itertools.pairwise((3, 32, 64, 128, 128)):
        layers += [nn.Conv2d(width, out, 3, stride=2, padding=1), nn.GroupNorm(8, out), nn.GELU()]
    features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network, right = nn.Sequential(features, nn.Linear(128, 4)).to(device), []
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        rows, turns = torch.randint(len(pictures), (batch_size,)), torch.randint(4, (batch_size,))
        turned = [np.rot90(pictures[row], turn) for row, turn in zip(rows.tolist(), turns.tolist(), strict=True)]
        logits = network(as_input(np.stack(turned), device))
        F.cross_entropy(logits, turns.to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        right.append((logits.argmax(dim=1).cpu() == turns).float().mean().item())
    return features.eval(), float(np.mean(right[-max(1, steps // 10) :]))


def as_input(pictures, device):
    """Pictures (B, S, S, 3) uint8 as (B, 3, S, S) in [0, 1]."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2) / 255


@torch.no_grad()
def features_of(pictures, observer, prepare, device):
    """The features (N, F) of pictures (N, S, S, 3), by an observer of what `prepare` makes of them."""
    parts = [prepare(pictures[i : i + 16], device) for i in range(0, len(pictures), 16)]
    return np.concatenate([observer(part).cpu().numpy() for part in parts])


def main():
    parser = CommandLine(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--part", choices=("validation", "test"), default="test")
    parser.add_argument("--holes", nargs="+", choices=inpaint.HOLES, default=[*inpaint.HOLES])
    parser.add_argument(
        "--ways", nargs="+", default=KINDS[:-1], help=f"that begin so: {', '.join(KINDS)}, or one whole"
    )
    parser.add_argument("--pictures", type=at_least(8), default=200, help="at most so many")
    parser.add_argument("--seeds", type=at_least(1), default=1, help="of holes and draws")
    parser.add_argument("--observer-steps", type=at_least(1), default=1500)
    parser.add_argument("--weights", type=Path, help="Inception's, for FID")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.set_defaults(vqgan=None, transformer=None)
    settings = parser.parse_args()
    ways = {name: way for name, way in WAYS.items() if name.startswith(tuple(settings.ways))}
    if not ways:
        parser.error(f"--ways {' '.join(settings.ways)}: none begins so")
    device = pick_device(settings.device)
    checkpoint, _ = inpaint.open_model(settings)
    run = checkpoint["config"]
    split = inpaint.open_pictures(run["data"], run["cartoons"], run["size"], run["seed"])
    images = getattr(split, settings.part)[: settings.pictures]
    figures, rows, table = {"scored": len(images)}, [], {}
    if settings.weights:
        see = fid.load_inception(weights=settings.weights, device=device), fid.network_input
    else:
        observer, figures["turns told"] = train_observer(split.training, settings.observer_steps, device)
        see = observer, as_input
    true = features_of(images, *see, device)
    figures["two halves of the true pictures"] = fid.frechet_distance_from_features(true[::2], true[1::2])

    def judge(kind, way, filled, holes, seed):
        distance = fid.frechet_distance_from_features(true, features_of(filled, *see, device))
        row = {"holes": kind, "way": way, "seed": seed, "frechet": distance}
        rows.append(row | inpaint.picture_scores(images, holes, filled))
        print(kind, way, f"{rows[-1]['psnr']:.2f} dB, Frechet {distance:.4f}", file=sys.stderr, flush=True)
        table.setdefault(way, []).append(rows[-1])

    seed = inpaint.TEST_SEED if settings.part == "test" else inpaint.VALIDATION_SEED
    for kind, draw in itertools.product(settings.holes, range(settings.seeds)):
        holes = inpaint.make_holes(kind, len(images), run["size"], seed + 10 * draw)  # 0: those of the run's scores
        tokens, *_ = inpaint.model_input(checkpoint, images, holes, informed=False)
        true_tokens = inpaint.to_pictures(checkpoint["tokenizer"], tokens, images, holes, True)
        judge(kind, "true tokens", true_tokens, holes, draw)
        for way in ways:
            filled = inpaint.fill_in_batches(checkpoint, images, holes, AS_SET | ways[way], draw)
            judge(kind, way, filled, holes, draw)
    settings.device = str(device)
    write_figures(settings, figures | {"rows": rows}, settings.json)
    names = ("psnr", "ssim", "frechet")
    lines = [
        [way, *(f"{np.mean([r[n] for r in found if r['holes'] == k]):.4g}" for k in settings.holes for n in names)]
        for way, found in table.items()
    ]
    print_table(["filled by", *(f"{kind}: {name}" for kind in settings.holes for name in names)], lines)
    print(*(f"{name}: {value:.4g}" for name, value in figures.items()), sep="\n")
    if settings.json and "reports" in settings.ways:
        options = [AS_SET | REPORTS | {"schedule": schedule, "steps": 8} for schedule in STUDY[0]]
        traces = [inpaint.trace_pictures(checkpoint, images[:1], holes[:1], way) for way in options]
        shown = np.array([trace + trace[-1:] * (8 - len(trace)) for trace in traces])  # a small hole takes fewer steps
        inpaint.sheet(shown, [f"step {t}" for t in range(1, 9)]).save(settings.json.with_suffix(".png"))


if __name__ == "__main__":
    run_as_script(main)
