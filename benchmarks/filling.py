"""How to fill with one model: orders, temperatures, schedules and numbers of steps, judged by error and by realism.

    python benchmarks/filling.py --checkpoint runs/cats64/model.pt --part validation --json figures.json
    python benchmarks/filling.py --checkpoint runs/cats64/model.pt --ways "as set" --pictures 700 --json figures.json
    python benchmarks/filling.py --checkpoint runs/cats64/model.pt --ways reports --holes brush --json figures.json
    python benchmarks/filling.py --checkpoint runs/cats64/model.pt --ways OpenCV --pictures 64 --json figures.json

The pictures are those of the run: the drawn cats, or the folder that it was trained on. Realism is a Frechet distance
between the true pictures and the filled ones, by the 128 features of a small network, which is trained here, on the
training pictures, to tell by which of four right angles a picture was turned; with --weights by Inception's (FID).

"OpenCV" are its two methods, which need no model (python -m pip install -r benchmarks/requirements.txt).
"reports" are R1 and R2's schedules and numbers of steps, with what else they set: no evidence, no painter. A picture
of what they fill in, step by step, lies beside the JSON.
"""

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fid
import inpaint
from maskgit import (
    CommandLine,
    InputError,
    at_least,
    fast_precision,
    pick_device,
    print_table,
    run_as_script,
    run_record,
    write_figures,
)

REPORTS = {"temperature": 1.0, "choice_temperature": 4.5, "evidence": False}
AS_DECODED = ("neither", "reports")  # ways without the painter
# What each changes in an inpaint.Filling.
WAYS = {"as set": {}, "neither": {"evidence": False}}
WAYS |= {"likeliest": {"sample": "argmax", "decode_steps": 1}, "expected": {"sample": "mean"}}
WAYS |= {f"order {order}": {"order": order} for order in ("random", "entropy")}
WAYS |= {f"temperature {temperature}": {"temperature": temperature} for temperature in (0.2, 0.7, 1.0)}
WAYS |= {f"steps {steps}": {"decode_steps": steps} for steps in (4, 20)}
STUDY = ("linear", "cosine", "square"), (1, 4, 8, 10, 20)
WAYS |= {f"reports {s}, T={t}": REPORTS | {"schedule": s, "decode_steps": t} for s, t in itertools.product(*STUDY)}
OPENCV = {"OpenCV, Telea": "INPAINT_TELEA", "OpenCV, Navier-Stokes": "INPAINT_NS"}
RADIUS = 3  # pixels around the hole that OpenCV looks at, its usual value
KINDS = ["as set", "neither", "likeliest", "expected", "order", "temperature", "steps"]


def fill(way, inpainter, images, holes, seed):
    if way.startswith(AS_DECODED):
        inpainter = inpainter._replace(painter=None)
    if way not in OPENCV:
        return inpaint.fill_in_batches(inpainter, images, holes, replace(inpaint.Filling(), **WAYS[way]), seed)
    import cv2  # nothing else needs it

    method = getattr(cv2, OPENCV[way])
    pairs = zip(images, holes.astype(np.uint8), strict=True)
    return np.stack([cv2.inpaint(image, hole, RADIUS, method) for image, hole in pairs])


def train_observer(pictures, steps, device, batch_size=64):
    """A network from pictures (B, 3, S, S) in [0, 1] to features (B, 128), and how often it told the turn at last."""
    torch.manual_seed(0)
    layers = []
    for width, out in itertools.pairwise((3, 32, 64, 128, 128)):
        layers += [nn.Conv2d(width, out, 3, stride=2, padding=1), nn.GroupNorm(8, out), nn.GELU()]
    features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = nn.Sequential(features, nn.Linear(128, 4)).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    right = []
    for _ in range(steps):
        rows = torch.randint(len(pictures), (batch_size,))
        turns = torch.randint(4, (batch_size,))
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


def paint_reports(inpainter, image, hole):
    """Eight steps of the reports' way to fill a picture (1, S, S, 3), a row for each of their schedules."""
    rows = []
    for schedule in STUDY[0]:
        filling = replace(inpaint.Filling(), **REPORTS, decode_steps=8, schedule=schedule)
        trace = inpaint.trace_pictures(inpainter._replace(painter=None), image, hole, filling)
        rows.append(trace + trace[-1:] * (8 - len(trace)))  # a small hole takes fewer steps
    return inpaint.sheet(np.array(rows), [f"step {t}" for t in range(1, 9)])


def main():
    record = run_record()
    parser = CommandLine(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="the folder it was trained on; if it is not given, cartoon cats")
    parser.add_argument("--part", choices=("validation", "test"), default="test")
    parser.add_argument("--holes", nargs="+", choices=inpaint.HOLES, default=[*inpaint.HOLES])
    begin = f"that begin so: {', '.join([*KINDS, 'reports', 'OpenCV'])}, or one whole"
    parser.add_argument("--ways", nargs="+", default=KINDS, help=begin)
    parser.add_argument("--pictures", type=at_least(8), default=200, help="at most so many")
    parser.add_argument("--seeds", type=at_least(1), default=1, help="of holes and draws")
    parser.add_argument("--observer-steps", type=at_least(1), default=1500)
    parser.add_argument("--weights", type=Path, help="Inception's, for FID")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    ways = [name for name in [*WAYS, *OPENCV] if name.startswith(tuple(arguments.ways))]
    if not ways:
        parser.error(f"--ways {' '.join(arguments.ways)}: none begins so")
    device = pick_device(arguments.device)
    inpainter, run = inpaint.open_model(arguments.checkpoint, device, fast_precision(device))
    out = arguments.checkpoint.parent  # the run's own pictures are none of its data
    split, digest = inpaint.open_pictures(arguments.data, run["cartoons"], run["size"], run["seed"], out)
    if digest != run["pictures_sha256"]:
        raise InputError(f"{arguments.checkpoint} was trained on other pictures: --data names them")
    images = getattr(split, arguments.part)[: arguments.pictures]
    figures = {"scored": len(images)}
    rows = []
    table = {}
    if arguments.weights:
        see = fid.load_inception(weights=arguments.weights, device=device), fid.network_input
    else:
        observer, figures["turns told"] = train_observer(split.training, arguments.observer_steps, device)
        see = observer, as_input
    true = features_of(images, *see, device)
    figures["two halves of the true pictures"] = fid.frechet_distance_from_features(true[::2], true[1::2])

    def judge(kind, way, filled, holes, seed):
        distance = fid.frechet_distance_from_features(true, features_of(filled, *see, device))
        row = {"holes": kind, "way": way, "seed": seed, "frechet": distance}
        rows.append(row | inpaint.picture_scores(images, holes, filled))
        print(kind, way, f"{rows[-1]['psnr']:.2f} dB, Frechet {distance:.4f}", file=sys.stderr, flush=True)
        table.setdefault(way, []).append(rows[-1])

    seed = inpaint.TEST_SEED if arguments.part == "test" else inpaint.VALIDATION_SEED
    for kind, draw in itertools.product(arguments.holes, range(arguments.seeds)):
        holes = inpaint.make_holes(kind, len(images), run["size"], seed + 10 * draw)  # 0: those of the run's scores
        decoded = inpainter.tokenizer.decode(inpainter.tokenizer.encode(images / np.float32(255)))
        judge(kind, "true tokens", inpaint.into_holes(decoded, images, holes, inpainter.painter), holes, draw)
        for way in ways:
            judge(kind, way, fill(way, inpainter, images, holes, draw), holes, draw)
    write_figures(record, vars(arguments), figures | {"rows": rows}, arguments.json)
    names = ("psnr", "l1", "ssim", "frechet")
    lines = []
    for way, found in table.items():
        lines.append([way])
        for kind, name in itertools.product(arguments.holes, names):
            lines[-1].append(f"{np.mean([row[name] for row in found if row['holes'] == kind]):.4g}")
    print_table(["filled by", *(f"{kind}: {name}" for kind in arguments.holes for name in names)], lines)
    print(*(f"{name}: {value:.4g}" for name, value in figures.items()), sep="\n")
    if arguments.json and "reports" in arguments.ways:
        paint_reports(inpainter, images[:1], holes[:1]).save(arguments.json.with_suffix(".png"))


if __name__ == "__main__":
    run_as_script(main)
