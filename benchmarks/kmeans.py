"""maskgit.kmeans beside scikit-learn's and faiss's: the same points, the same start, the same number of iterations.

    python -m pip install -r benchmarks/requirements.txt
    python benchmarks/kmeans.py --images FOLDER --json results/kmeans.json

Points are the 4x4 patches of the folder's photographs (RGB, in [0, 1]). They take turns, once for each start. A
rounding difference in one iteration may move a point to another cluster, and k-means amplifies that, so the inertias
differ a little in either direction; the same iterations in float64 show by how much.
"""

import statistics
import sys
import time
from pathlib import Path

import faiss
import numpy as np
import sklearn
from PIL import Image
from sklearn.cluster import KMeans

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from maskgit import (
    CommandLine,
    InputError,
    at_least,
    image_patches,
    kmeans,
    plus_plus,
    print_table,
    run_as_script,
    run_record,
    write_figures,
)


def photo_patches(folder, count):
    """`count` random 4x4 patches of the photographs in a folder: (count, 48) float32."""
    files = sorted(path for path in Path(folder).iterdir() if path.suffix in (".jpg", ".png"))
    images = [np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255 for path in files]
    patches = np.concatenate([image_patches(image[None], 4, 4).reshape(-1, 48) for image in images])
    if len(patches) < count:
        raise InputError(f"{folder} holds {len(patches)} patches of 4x4, fewer than --points {count}")
    return patches[np.random.default_rng(0).permutation(len(patches))[:count]]


def lloyd_float64(points, centroids, iterations):
    """The inertia that plain Lloyd's iterations reach in float64."""
    points = points.astype(np.float64)
    centroids = centroids.astype(np.float64)
    blocks = range(0, len(points), 4096)
    for iteration in range(iterations + 1):
        squares = np.square(centroids).sum(axis=1)
        scores = (squares - 2 * points[start : start + 4096] @ centroids.T for start in blocks)
        labels = np.concatenate([score.argmin(axis=1) for score in scores])
        if iteration == iterations:
            return np.square(points - centroids[labels]).sum()
        sums = np.stack([np.bincount(labels, column, minlength=len(centroids)) for column in points.T], axis=1)
        centroids = sums / np.bincount(labels, minlength=len(centroids))[:, None]


def faiss_kmeans(points, codes, init, max_iter, tol):
    """faiss takes no tolerance; it is given none."""
    clusters = faiss.Kmeans(points.shape[1], codes, niter=max_iter, max_points_per_centroid=len(points))
    clusters.train(points, init_centroids=init)
    return clusters.index.search(points, 1)[0].sum(dtype=np.float64)  # faiss leaves labels and inertia to the user


def timed(function, *arguments, **options):
    start = time.perf_counter()
    return function(*arguments, **options), time.perf_counter() - start


def main():
    record = run_record() | {"scikit-learn": sklearn.__version__, "faiss": faiss.__version__}
    parser = CommandLine(__doc__)
    count = at_least(1)
    parser.add_argument("--images", type=Path, required=True, help="a folder of photographs")
    parser.add_argument("--points", type=count, default=300_000)
    parser.add_argument("--codes", type=count, default=1024)
    parser.add_argument("--iterations", type=count, default=20)
    parser.add_argument("--starts", type=count, default=5)
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    arguments = parser.parse_args()
    points = photo_patches(arguments.images, arguments.points)
    rows = []
    for seed in range(arguments.starts):
        start, start_seconds = timed(plus_plus, points, arguments.codes, np.random.default_rng(seed))
        common = dict(init=start, max_iter=arguments.iterations, tol=0)
        ours, seconds = timed(kmeans, points, arguments.codes, **common)
        theirs, their_seconds = timed(KMeans(arguments.codes, n_init=1, **common).fit, points)
        faiss_inertia, faiss_seconds = timed(faiss_kmeans, points, arguments.codes, **common)
        exact = lloyd_float64(points, start, arguments.iterations)
        row = dict(start=seed, start_seconds=start_seconds, seconds=seconds, scikit_learn_seconds=their_seconds)
        row |= dict(ratio=seconds / their_seconds, inertia=ours.inertia, scikit_learn_inertia=float(theirs.inertia_))
        row |= dict(faiss_seconds=faiss_seconds, faiss_ratio=seconds / faiss_seconds)
        row |= dict(faiss_inertia=float(faiss_inertia), float64_inertia=exact)
        rows.append(row | dict(excess=ours.inertia / theirs.inertia_ - 1))
    median = {name: statistics.median(row[name] for row in rows) for name in rows[0] if name != "start"}
    write_figures(record, vars(arguments), {"median": median, "starts": rows}, arguments.json)
    names = ("seconds", "scikit_learn_seconds", "faiss_seconds", "inertia", "scikit_learn_inertia", "faiss_inertia")
    shown = [*rows, {"start": "median"} | median]
    table = [[str(row["start"]), *(f"{row[name]:.2f}" for name in names)] for row in shown]
    print_table(["start", "seconds", "scikit-learn", "faiss", "inertia", "scikit-learn", "faiss"], table)


if __name__ == "__main__":
    run_as_script(main)
