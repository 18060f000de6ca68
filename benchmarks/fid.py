"""fid.py beside pytorch-fid: the same random weights, the same images, results and speed.

    python -m pip install -r benchmarks/requirements.txt
    python benchmarks/fid.py --images FOLDER --json results/fid.json

The photographs are put into two folders as png, jpg, greyscale, alpha and CMYK images by turns, more of them than a
layer has features, since pytorch-fid needs that. Everything is called as its command line calls it.
"""

import contextlib
import io
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image

# torchvision refuses to be imported where its compiled operators do not fit the build of torch; pytorch-fid uses none.
operators = torch.library.Library("torchvision", "FRAGMENT")
for operator in ("nms", "qnms"):
    with contextlib.suppress(RuntimeError):
        operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import pytorch_fid.fid_score as theirs  # noqa: E402
import pytorch_fid.inception  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fid as ours  # noqa: E402
from maskgit import CommandLine, at_least, print_table, run_as_script, run_record, write_figures  # noqa: E402

FORMS = {
    "png": lambda image: (image, "png"),
    "jpg": lambda image: (image, "jpg"),
    "grey": lambda image: (image.convert("L"), "png"),
    "alpha": lambda image: (Image.merge("RGBA", (*image.split(), image.convert("L"))), "png"),
    "cmyk": lambda image: (image.convert("CMYK"), "jpg"),
}


def random_weights(path):
    """Write Inception weights under which signals neither fade nor grow."""
    torch.manual_seed(0)
    network = ours.Inception()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
    torch.save(network.state_dict(), path)


def mixed_folder(files, folder):
    """The files, each in the next of the FORMS."""
    folder.mkdir()
    for number, (file, form) in enumerate(zip(files, list(FORMS) * len(files), strict=False)):
        image, suffix = FORMS[form](Image.open(file).convert("RGB"))
        image.save(folder / f"{number:05d}_{form}.{suffix}")
    return folder


def their_features(folder, dims, count):
    network = pytorch_fid.inception.InceptionV3([pytorch_fid.inception.InceptionV3.BLOCK_INDEX_BY_DIM[dims]])
    return theirs.get_activations(sorted(folder.iterdir())[:count], network, 50, dims, "cpu", 2)


def our_features(folder, dims, count, weights):
    images = ours.ImageFolder(folder)
    images.files = images.files[:count]
    return np.concatenate(list(ours.folder_features(images, ours.load_inception(dims, weights), 50, 2)))


def timed(function, *arguments):
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def relative(value, reference):
    return float(np.linalg.norm(np.asarray(value) - reference) / np.linalg.norm(reference))


def agreement(a, b, dims, weights, folder):
    """Both programs' features and distances at one layer, for more images than it has features."""
    count = min(dims + 100, len(list(a.iterdir())))
    found = [our_features(folder, dims, count, weights) for folder in (a, b)]
    expected = [their_features(folder, dims, count) for folder in (a, b)]
    their_statistics = [(np.mean(f, axis=0), np.cov(f, rowvar=False)) for f in expected]
    their_fid = theirs.calculate_frechet_distance(*their_statistics[0], *their_statistics[1])
    our_statistics = [ours.statistics_of(iter(np.array_split(f, 7)), count) for f in found]
    our_file = folder / f"ours_{dims}.npz"
    their_file = folder / f"theirs_{dims}.npz"
    np.savez_compressed(our_file, mu=our_statistics[0].mu, sigma=our_statistics[0].sigma)
    np.savez_compressed(their_file, mu=their_statistics[0][0], sigma=their_statistics[0][1])
    read_by_them = theirs.compute_statistics_of_path(str(our_file), None, 50, dims, "cpu")
    read_by_us = ours.read_statistics(their_file)
    fid = ours.fid_of(*our_statistics)
    fid_by_them = theirs.calculate_frechet_distance(*read_by_them, *their_statistics[1])
    return {
        "dims": dims,
        "images": count,
        "features": relative(np.concatenate(found), np.concatenate(expected)),
        "fid": fid,
        "their_fid": float(their_fid),
        "fid_difference": relative(fid, their_fid),
        "our_file_read_by_them": relative(fid_by_them, their_fid),
        "their_file_read_by_us": relative(ours.fid_of(read_by_us, our_statistics[1]), their_fid),
    }


def few_images(features, counts):
    """Both distances where there are fewer images than dimensions."""
    rows = []
    for count in counts:
        x, y = (f[:count] for f in features)
        covariances = [(np.mean(f, axis=0), np.cov(f, rowvar=False)) for f in (x, y)]
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            try:
                their_fid = float(theirs.calculate_frechet_distance(*covariances[0], *covariances[1]))
            except ValueError as error:
                their_fid = str(error)
        fid = ours.frechet_distance_from_features(x, y)
        rows.append({"images": count, "fid": fid, "their_fid": their_fid, "said": output.getvalue().strip()})
        rows[-1]["from_covariances"] = ours.frechet_distance(*covariances[0], *covariances[1])
    return rows


def speed(a, weights, rounds, count):
    """Images per second from folder to features, and seconds per distance at 2,048 dimensions; by turns."""
    images = []
    distances = []
    x, y = np.random.default_rng(0).standard_normal((2, 4000, 2048)) / np.sqrt(np.arange(1, 2049))
    gaussians = [value for f in (x, y) for value in (f.mean(axis=0), np.cov(f, rowvar=False))]
    for _ in range(rounds):
        seconds, _ = timed(our_features, a, 2048, count, weights)
        their_seconds, _ = timed(their_features, a, 2048, count)
        images.append({"images_per_second": count / seconds, "their_images_per_second": count / their_seconds})
        images[-1]["ratio"] = their_seconds / seconds
        seconds, fid = timed(ours.frechet_distance, *gaussians)
        their_seconds, their_fid = timed(theirs.calculate_frechet_distance, *gaussians)
        distances.append({"seconds": seconds, "their_seconds": their_seconds, "ratio": their_seconds / seconds})
        distances[-1]["difference"] = relative(fid, their_fid)
    return images, distances


def median(rows):
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def main():
    record = run_record() | {"pytorch-fid": version("pytorch-fid"), "scipy": version("scipy")}
    parser = CommandLine(__doc__)
    parser.add_argument("--images", type=Path, required=True, help="a folder of photographs of one size, 4,296 or more")
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    arguments = parser.parse_args()
    files = sorted(path for path in arguments.images.iterdir() if path.suffix in (".jpg", ".png"))
    count = min(max(ours.DIMS) + 100, len(files) // 2)
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch, "weights.pth")
        random_weights(weights)
        pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: torch.load(weights, weights_only=True)
        a = mixed_folder(files[:count], Path(scratch, "a"))
        b = mixed_folder(files[count : 2 * count], Path(scratch, "b"))
        images, distances = speed(a, weights, arguments.rounds, 200)
        rows = [agreement(a, b, dims, weights, Path(scratch)) for dims in ours.DIMS]
        few = few_images([our_features(folder, 2048, 747, weights) for folder in (a, b)], (100, 747))
    figures = {"images": median(images), "distance": median(distances), "agreement": rows, "few_images": few}
    figures |= {"rounds": {"images": images, "distance": distances}}
    write_figures(record, vars(arguments), figures, arguments.json)
    head = ["dims", "images", "features", "FID", "pytorch-fid's", "difference"]
    names = ("features", "fid", "their_fid", "fid_difference")
    print_table(head, [[str(r["dims"]), str(r["images"]), *(f"{r[name]:.6g}" for name in names)] for r in rows])
    head = ["median of turns", "ours", "pytorch-fid", "ratio"]
    rows = [("images per second", *median(images).values()), ("seconds per distance", *median(distances).values())]
    print_table(head, [[row[0], *(f"{value:.2f}" for value in row[1:4])] for row in rows])
    head = ["images, 2,048 dims", "FID", "from covariances", "pytorch-fid's"]
    print_table(head, [[str(r["images"]), *(str(r[n]) for n in ("fid", "from_covariances", "their_fid"))] for r in few])


if __name__ == "__main__":
    run_as_script(main)
