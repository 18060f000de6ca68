"""OpenCV's two inpainting methods on the holes that inpaint.py scores itself on.

    python -m pip install -r benchmarks/requirements.txt
    python benchmarks/opencv.py --checkpoint runs/inpaint/model.pt --json results/inpaint_opencv.json

The pictures are those of the run: the drawn cats, or the folder that it was trained on.
"""

import sys
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import inpaint as ours
from maskgit import CommandLine, at_least, load_checkpoint, print_table, run_as_script, write_figures

METHODS = {"Telea": cv2.INPAINT_TELEA, "Navier-Stokes": cv2.INPAINT_NS}
RADIUS = 3  # pixels around the hole that are looked at, OpenCV's usual value


def main():
    parser = CommandLine(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--test-images", type=at_least(1), default=100)
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    settings = parser.parse_args()
    settings.record |= {"opencv": cv2.__version__}
    run = load_checkpoint(settings.checkpoint)["config"]
    images = ours.open_pictures(run["data"], run["cartoons"], run["size"], run["seed"]).test[: settings.test_images]
    rows = []
    for kind in ours.HOLES:
        holes = ours.make_holes(kind, len(images), run["size"], ours.TEST_SEED)
        for name, method in METHODS.items():
            pairs = zip(images, holes.astype(np.uint8), strict=True)
            filled = np.stack([cv2.inpaint(image, hole, RADIUS, method) for image, hole in pairs])
            rows.append({"holes": kind, "method": name} | ours.picture_scores(images, holes, filled))
    write_figures(settings, {"scored": len(images), "rows": rows}, settings.json)
    names = ("psnr", "l1", "ssim")
    print_table(["holes", "method", *names], [[r["holes"], r["method"], *(f"{r[n]:.4g}" for n in names)] for r in rows])


if __name__ == "__main__":
    run_as_script(main)
