"""How to fill with one model: orders, temperatures, schedules and numbers of steps, judged by error and by realism.

    python benchmarks/filling.py --checkpoint runs/cats64/model.pt --part validation --json figures.json
    python benchmarks/filling.py --checkpoint runs/cats64/model.pt --ways "as set" OpenCV --pictures 400 --json f.json
    python benchmarks/filling.py --checkpoint runs/inpaint/model.pt --ways "as set" --size 256 --json figures.json
    python benchmarks/filling.py --checkpoint runs/inpaint/model.pt --ways reports --holes brush --json figures.json

The pictures are those of the run: the drawn cats, or the folder that it was trained on (--data). With a larger --size
they are larger than the model's: cats drawn anew from the number on at which the run's end, or the folder's.

Realism is a Frechet distance between the true pictures and the filled ones, by the 128 features of a small network,
which is trained here, on the training pictures, to tell by which of four right angles a picture was turned; with
--weights by Inception's (FID). Of larger pictures it sees the 64x64 around the middle of the hole.

A way is a model's, with and without grain, or "OpenCV": its three methods, which need no model (python -m pip install
-r benchmarks/requirements.txt). "reports" are R1 and R2's schedules and numbers of steps, with what else they set: no
evidence, no painter, no grain. A picture of what they fill in, step by step, lies beside the JSON. --shapes adds what
pictures of 2:1 and 4:3 lose.
"""

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
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
WAYS |= {"likeliest": {"sample": "argmax", "decode_steps": 1}}
WAYS |= {f"order {order}": {"order": order} for order in ("random", "entropy")}
WAYS |= {f"temperature {temperature}": {"temperature": temperature} for temperature in (0.2, 0.7, 1.0)}
WAYS |= {f"steps {steps}": {"decode_steps": steps} for steps in (4, 20)}
STUDY = ("linear", "cosine", "square"), (1, 4, 8, 10, 20)
WAYS |= {f"reports {s}, T={t}": REPORTS | {"schedule": s, "decode_steps": t} for s, t in itertools.product(*STUDY)}
OPENCV = {"OpenCV, Telea": "INPAINT_TELEA", "OpenCV, Navier-Stokes": "INPAINT_NS", "OpenCV, shift map": None}
RADIUS = 3  # pixels around the hole that the first two look at, their usual value
OBSERVED = 2000  # larger cats that the observer learns from
SEEN = 64  # pixels per side of what the observer is shown
KINDS = ["as set", "neither", "likeliest", "order", "temperature", "steps"]


def fill(way, inpainter, size, images, holes, seed):
    """{row: filled pictures} of a way, with and without grain where a model of pictures of `size` fills and paints."""
    if way in OPENCV:
        return {way: np.stack([fill_by_opencv(OPENCV[way], *each) for each in zip(images, holes, strict=True)])}
    plain = replace(inpaint.Filling(), **WAYS[way], grain=False)
    if way.startswith(AS_DECODED):
        return {way: fill_all(inpainter._replace(painter=None), size, images, holes, plain, seed)}
    filled = fill_all(inpainter, size, images, holes, plain, seed)
    if images.shape[1] == size:
        return {f"{way}, no grain": filled, way: with_grain(filled, holes)}
    return {f"{way}, no grain": filled, way: fill_all(inpainter, size, images, holes, replace(plain, grain=True), seed)}


def fill_all(inpainter, size, images, holes, filling, seed):
    """Pictures of the model's size at once, larger ones one by one."""
    if images.shape[1] == size:
        return inpaint.fill_in_batches(inpainter, images, holes, filling, seed)
    pairs = zip(images, holes, strict=True)
    return np.stack([inpaint.fill_picture(inpainter, size, *pair, filling, seed) for pair in pairs])


def with_grain(filled, holes):
    return np.stack([inpaint.grained(*each) for each in zip(filled, holes, strict=True)])


def fill_by_opencv(method, image, hole):
    """The image (S, S, 3) uint8, filled by the method of this name, or by the shift map."""
    import cv2  # nothing else needs it

    if method:
        return cv2.inpaint(image, hole.astype(np.uint8), RADIUS, getattr(cv2, method))
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
    filled = np.zeros_like(lab)
    cv2.xphoto.inpaint(lab, (~hole).astype(np.uint8), filled, cv2.xphoto.INPAINT_SHIFTMAP)
    return cv2.cvtColor(filled, cv2.COLOR_LAB2RGB)


def shapes(inpainter, size, images, holes):
    """PSNR of pictures side by side, 2:1, and of each by itself; of two kinds of 4:3, and of these squashed to squares:
    one of such a pair and a third of the other, and what is inside of one."""
    side = images.shape[1]

    def filled(images, holes):
        pairs = zip(images, holes, strict=True)
        return np.stack([inpaint.fill_picture(inpainter, size, *pair, inpaint.Filling()) for pair in pairs])

    def squash(arrays, height, width):
        return np.stack([np.asarray(Image.fromarray(array).resize((width, height))) for array in arrays])

    half = len(images) // 2
    pairs = [np.concatenate([each[:half], each[half : 2 * half]], axis=2) for each in (images, holes)]
    apart = [np.concatenate(np.split(pair, 2, axis=2)) for pair in pairs]
    found = {"2:1": inpaint.psnr(*apart, np.concatenate(np.split(filled(*pairs), 2, axis=2)))}
    found["one by one"] = inpaint.psnr(*apart, filled(*apart))
    around = [pair[:, :, : side * 4 // 3] for pair in pairs]
    inside = [each[:, side // 8 : side - side // 8] for each in (images, holes)]
    for name, crops in (("4:3 around one", around), ("4:3 inside one", inside)):
        found[name] = inpaint.psnr(*crops, filled(*crops))
        squashed = squash(filled(*(squash(each, side, side) for each in crops)), *crops[1].shape[1:])
        found[f"{name}, squashed"] = inpaint.psnr(*crops, squashed)
    return found


def around(images, holes):
    """What the observer is shown of images (B, S, S, 3): at most SEEN pixels around the middle of a hole."""
    parts = []
    for image, hole in zip(images, holes, strict=True):
        middle = [np.median(each) - SEEN / 2 for each in np.nonzero(hole)]
        y, x = (int(np.clip(each, 0, max(0, len(image) - SEEN))) for each in middle)
        parts.append(image[y : y + SEEN, x : x + SEEN])
    return np.stack(parts)


def open_pictures(arguments, run, size):
    """The training pictures and those to fill, at a size."""
    if size > run["size"] and not arguments.data:
        numbers = [*range(OBSERVED), *range(run["cartoons"], run["cartoons"] + arguments.pictures)]
        cats = np.stack([inpaint.cartoon_cat(np.random.default_rng([run["seed"], i]), size) for i in numbers])
        return cats[:OBSERVED], cats[OBSERVED:]
    out = arguments.checkpoint.parent  # the run's own pictures are none of its data
    split, digest = inpaint.open_pictures(arguments.data, run["cartoons"], size, run["seed"], out)
    if digest != run["pictures_sha256"]:
        raise InputError(f"{arguments.checkpoint} was trained on other pictures: --data names them")
    return split.training, getattr(split, arguments.part)[: arguments.pictures]


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
    """The hole and eight steps of the reports' way to fill a picture (1, S, S, 3), a row for each schedule."""
    rows = []
    for schedule in STUDY[0]:
        filling = replace(inpaint.Filling(), **REPORTS, decode_steps=8, schedule=schedule)
        trace = inpaint.trace_pictures(inpainter._replace(painter=None), image, hole, filling)
        grey = inpaint.paste(image, hole, np.uint8(inpaint.GREY))
        rows.append([grey, *trace, *trace[-1:] * (8 - len(trace))])  # a small hole takes fewer steps
    sheet = inpaint.sheet(np.array(rows), ["the hole", *(f"step {t}" for t in range(1, 9))])
    for i, schedule in enumerate(STUDY[0]):
        ImageDraw.Draw(sheet).text((10, 30 + i * (sheet.height - 26) // 3), schedule, fill="black", font_size=14)
    return sheet


def main():
    record = run_record()
    parser = CommandLine(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="the folder it was trained on; if it is not given, cartoon cats")
    parser.add_argument("--size", type=at_least(1), help="pixels per side of the pictures; if not given, the model's")
    parser.add_argument("--shapes", action="store_true", help="score pictures that are not square, too")
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
    size = arguments.size or run["size"]
    if size < run["size"]:
        parser.error(f"--size {size} is less than the model's, {run['size']}")
    training, images = open_pictures(arguments, run, size)
    figures = {"scored": len(images)}
    rows = []
    table = {}
    if arguments.weights:
        see = fid.load_inception(weights=arguments.weights, device=device), fid.network_input
    else:
        parts = around(training, inpaint.make_holes("box", len(training), size, 0))
        observer, figures["turns told"] = train_observer(parts, arguments.observer_steps, device)
        see = observer, as_input

    def judge(kind, way, filled, holes, seed):
        pair = (features_of(around(each, holes), *see, device) for each in (images, filled))
        row = {"holes": kind, "way": way, "seed": seed, "frechet": fid.frechet_distance_from_features(*pair)}
        rows.append(row | {"psnr": inpaint.psnr(images, holes, filled)})
        print(kind, way, f"{rows[-1]['psnr']:.2f} dB, Frechet {row['frechet']:.4f}", file=sys.stderr, flush=True)
        table.setdefault(way, []).append(rows[-1])

    seed = inpaint.TEST_SEED if arguments.part == "test" else inpaint.VALIDATION_SEED
    for kind, draw in itertools.product(arguments.holes, range(arguments.seeds)):
        holes = inpaint.make_holes(kind, len(images), size, seed + 10 * draw)  # 0: those of the run's scores
        if size == run["size"]:
            decoded = inpainter.tokenizer.decode(inpainter.tokenizer.encode(images / np.float32(255)))
            true = inpaint.into_holes(decoded, images, holes, inpainter.painter)
            judge(kind, "true tokens, no grain", true, holes, draw)
            judge(kind, "true tokens", with_grain(true, holes), holes, draw)
        for way in ways:
            for row, filled in fill(way, inpainter, run["size"], images, holes, draw).items():
                judge(kind, row, filled, holes, draw)
    if arguments.shapes:
        holes = inpaint.make_holes("brush", len(images), size, seed)
        figures["shapes"] = shapes(inpainter, run["size"], images, holes)
    write_figures(record, vars(arguments), figures | {"rows": rows}, arguments.json)
    names = ("psnr", "frechet")
    lines = []
    for way, found in table.items():
        lines.append([way])
        for kind, name in itertools.product(arguments.holes, names):
            lines[-1].append(f"{np.mean([row[name] for row in found if row['holes'] == kind]):.4g}")
    print_table(["filled by", *(f"{kind}: {name}" for kind in arguments.holes for name in names)], lines)
    print(*(f"{name}: {value}" for name, value in figures.items()), sep="\n")
    if arguments.json and "reports" in arguments.ways:
        paint_reports(inpainter, images[:1], holes[:1]).save(arguments.json.with_suffix(".png"))


if __name__ == "__main__":
    run_as_script(main)
