"""What killed runs and damaged input do to the scripts: every outcome is counted, and none may be a traceback.

    python benchmarks/torture.py --json results/reliability.json

A run is killed at random moments and resumed, and must end with the weights of an undisturbed one. Then files are
truncated, changed bit by bit or of the wrong kind, and options out of range: each call must succeed or end in one line
and exit code 2, in reasonable time, with nothing overwritten.
"""

import contextlib
import io
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fid
import inpaint
import train_rectangles
import train_squares
from maskgit import CommandLine, at_least, load_checkpoint, print_table, run_as_script, run_record, write_figures

HERE = Path(__file__).resolve().parents[1]
SCRIPTS = {"train_squares": train_squares, "train_rectangles": train_rectangles, "inpaint": inpaint, "fid": fid}
SMALL = ["--dim", "16", "--heads", "2", "--layers", "1", "--device", "cpu", "--precision", "float32"]
SECONDS = 60  # after which a call counts as hanging


class HangError(BaseException):
    """Not an Exception, so that nothing takes it for bad input."""


def outcome_of(script, arguments):
    """How a call ends: "succeeds", "one line", "several lines", "hangs" or "traceback"; and its text."""

    def hang(*_):
        raise HangError

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    sys.argv, screen, complaint = [f"{script}.py", *map(str, arguments)], io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(complaint):
            SCRIPTS[script].main()
        return "succeeds", ""
    except (ValueError, OSError) as error:  # what run_as_script makes one line of
        return ("one line" if "\n" not in str(error) else "several lines"), str(error)
    except SystemExit as error:
        lines = complaint.getvalue().count("error: ")
        return ("one line" if error.code == 2 and lines == 1 else "several lines"), complaint.getvalue()
    except HangError:
        return "hangs", ""
    except BaseException:
        return "traceback", traceback.format_exc()
    finally:
        signal.alarm(0)


# ---------------------------------------------------------------------------------------------------
# Killed runs


def killed_and_resumed(folder, kills, rng):
    """How many of `kills` runs, each killed at a random moment and resumed, end as the undisturbed one does."""
    command = [
        sys.executable,
        HERE / "train_squares.py",
        *SMALL,
        "--steps",
        "60",
        "--batch-size",
        "16",
        "--draws",
        "20",
    ]
    command += ["--checkpoint-steps", "1"]  # so that many kills come while a checkpoint is written
    start = time.monotonic()
    subprocess.run([*command, "--out", folder / "whole"], check=True, capture_output=True)
    duration = time.monotonic() - start
    expected, found = weights(folder / "whole"), Counter()
    for i in range(kills):
        out = folder / f"killed{i}"
        process = subprocess.Popen([*command, "--out", out], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0, duration))
        process.kill()
        process.wait()
        begun = (out / "model.pt").exists()
        finished = subprocess.run(
            [*command, "--out", out, *["--resume"] * begun, *["--force"] * (not begun)], capture_output=True
        )
        same = finished.returncode == 0 and all(torch.equal(a, b) for a, b in zip(weights(out), expected, strict=True))
        found["bit-identical" if same else "different"] += 1
        found["killed after the first checkpoint"] += begun
    return dict(found)


def weights(folder):
    return list(load_checkpoint(folder / "model.pt")["model"].state_dict().values())


def write_failures(folder):
    """No space, a folder that cannot be made, one that is taken: [(what, how it ends, is the checkpoint whole)]."""
    command = [sys.executable, HERE / "train_squares.py", *SMALL, "--batch-size", "16", "--draws", "20"]
    command += ["--checkpoint-steps", "5", "--out", folder / "run"]
    subprocess.run([*command, "--steps", "20"], check=True, capture_output=True)
    before, rows = (folder / "run" / "model.pt").read_bytes(), []

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    failed = subprocess.run(
        [*command, "--steps", "20", "--force"], capture_output=True, text=True, preexec_fn=small_files
    )
    rows.append(["no space for a checkpoint", one_line(failed), (folder / "run" / "model.pt").read_bytes() == before])
    (folder / "file").write_text("")
    failed = subprocess.run([*command[:-1], folder / "file" / "run", "--steps", "5"], capture_output=True, text=True)
    rows.append(["a folder that cannot be made", one_line(failed), True])
    failed = subprocess.run([*command, "--steps", "5"], capture_output=True, text=True)
    rows.append(
        ["a second run into the same folder", one_line(failed), (folder / "run" / "model.pt").read_bytes() == before]
    )
    return rows


def one_line(finished):
    errors = [line for line in finished.stderr.splitlines() if not line.startswith("step ")]
    return "one line" if finished.returncode == 2 and len(errors) == 1 else f"{finished.returncode}: {finished.stderr}"


# ---------------------------------------------------------------------------------------------------
# Damaged files


def damaged(content, rng):
    """The bytes of a file, truncated, with bits flipped, with a part overwritten, or replaced."""
    kind = rng.choice(["truncated", "flipped", "overwritten", "empty", "text"])
    data = bytearray(content)
    if kind == "truncated":
        data = data[: rng.randrange(1, len(data))]
    elif kind == "flipped":
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "overwritten":
        start = rng.randrange(len(data))
        data[start : start + 50] = rng.randbytes(50)
    else:
        data = b"" if kind == "empty" else b"this is not the file that you are looking for"
    return kind, bytes(data)


def sample_images(folder, rng):
    """A few images of each kind: {name: bytes}."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for mode, suffix in (("RGB", "png"), ("RGB", "jpg"), ("RGB", "webp"), ("RGB", "bmp"), ("P", "png"), ("LA", "png")):
        image.convert(mode).save(folder / f"{mode}.{suffix}")
    Image.new("1", (30_000, 30_000)).save(folder / "bomb.png")
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def fuzz_files(folder, count, rng):
    """Calls with a damaged file among good ones: Counter of (what was damaged, outcome), and texts of the bad ones."""
    found, bad = Counter(), []
    (folder / "kinds").mkdir(parents=True)
    images = sample_images(folder / "kinds", rng)
    run, weights = folder / "run", folder / "weights.pth"
    tiny = [*SMALL, "--cartoons", "150", "--size", "16", "--codes", "16", "--steps", "2", "--batch-size", "4"]
    outcome, text = outcome_of("inpaint", [*tiny, "--test-images", "8", "--schedules", "cosine", "--out", run])
    assert outcome == "succeeds", text
    torch.save(fid.Inception().state_dict(), weights)
    checkpoint, weight_bytes = (run / "model.pt").read_bytes(), weights.read_bytes()
    np.savez(folder / "good.npz", mu=np.zeros(64), sigma=np.eye(64))
    stats = (folder / "good.npz").read_bytes()
    white = io.BytesIO()
    Image.new("L", (16, 16), 255).save(white, "png")
    for i in range(count):
        place = folder / f"case{i}"
        for name in ("images", "masks"):
            (place / name).mkdir(parents=True)
        (place / "images" / "a1.png").write_bytes(images["RGB.png"])
        (place / "masks" / "m1.png").write_bytes(white.getvalue())
        what = (
            "image",
            "mask",
            "image for fid",
            "checkpoint",
            "checkpoint to resume",
            "statistics",
            "weights",
            "training picture",
        )[i % 8]
        fill = ["--images", place / "images", "--masks", place / "masks", "--out", place / "out", "--device", "cpu"]
        fid_options = ["--dims", "64", "--num-workers", "0", "--device", "cpu", "--weights"]
        if what in ("image", "mask"):
            name = rng.choice(sorted(images)) if what == "image" else "RGB.png"
            kind, data = damaged(images[name] if what == "image" else white.getvalue(), rng)
            if name == "bomb.png":
                kind, data = "bomb", images[name]
            target = (
                place
                / ("images" if what == "image" else "masks")
                / f"{'a' if what == 'image' else 'm'}1{Path(name).suffix}"
            )
            if what == "image":
                (place / "images" / "a1.png").unlink()
            target.write_bytes(data)
            call = ("inpaint", ["--checkpoint", run / "model.pt", *fill])
        elif what in ("image for fid", "training picture"):
            name = rng.choice(sorted(images))
            kind, data = damaged(images[name], rng)
            if name == "bomb.png":
                kind, data = "bomb", images[name]
            (place / "images" / f"b{Path(name).suffix}").write_bytes(data)
            call = ("fid", [*fid_options, weights, place / "images", place / "images"])
            if what == "training picture":
                call = ("inpaint", [*tiny, "--data", place / "images", "--out", place / "out"])
        elif what == "checkpoint":
            kind, data = damaged(checkpoint, rng)
            (place / "model.pt").write_bytes(data)
            if i % 5 == 0:
                kind = "malicious"
                torch.save(Malicious(str(place / "ran")), place / "model.pt")
            call = ("inpaint", ["--checkpoint", place / "model.pt", *fill])
        elif what == "checkpoint to resume":
            kind, data = damaged(checkpoint, rng)
            (place / "out").mkdir()
            (place / "out" / "model.pt").write_bytes(data)
            call = (
                "inpaint",
                [*tiny, "--test-images", "8", "--schedules", "cosine", "--out", place / "out", "--resume"],
            )
        elif what == "statistics":
            kind, data = damaged(stats, rng)
            (place / "a.npz").write_bytes(data)
            call = ("fid", [*fid_options, weights, place / "a.npz", folder / "good.npz"])
        else:
            kind, data = damaged(weight_bytes, rng)
            (place / "w.pth").write_bytes(data)
            (place / "images" / "b.png").write_bytes(images["RGB.png"])
            call = ("fid", [*fid_options, place / "w.pth", place / "images", place / "images"])
        outcome, text = outcome_of(*call)
        if (place / "ran").exists():
            outcome = "ran foreign code"
        found[(what, outcome)] += 1
        if outcome not in ("succeeds", "one line"):
            bad.append({"case": i, "what": what, "kind": kind, "outcome": outcome, "text": text[-1500:]})
        print(f"\r{i + 1}/{count} damaged files", end="", file=sys.stderr)
    print(file=sys.stderr)
    return found, bad


def fuzz_options(folder):
    """Every option of every script with values out of range or of the wrong kind."""
    found, bad = Counter(), []
    (folder / "empty").mkdir(parents=True)
    base = {
        name: [*SMALL, "--steps", "1", "--out", folder / "out"]
        for name in ("train_squares", "train_rectangles", "inpaint")
    }
    base["inpaint"] += ["--cartoons", "10"]
    base["fid"] = [folder / "empty", folder / "empty"]
    for script in SCRIPTS:
        shown = subprocess.run([sys.executable, HERE / f"{script}.py", "--help"], capture_output=True, text=True).stdout
        options = sorted(
            set(word.strip(",[]") for word in shown.split() if word.startswith(("--", "[--"))) - {"--help"}
        )
        valued = [option for option in options if f"{option} " in shown and option not in ("--json", "--out")]
        for option in valued:
            for value in ("-1", "nan", "x", ""):
                outcome, text = outcome_of(script, [*base[script], option, value])
                found[(f"{script} options", outcome)] += 1
                if outcome not in ("succeeds", "one line"):
                    bad.append(
                        {"script": script, "option": option, "value": value, "outcome": outcome, "text": text[-1500:]}
                    )
    return found, bad


def main():
    parser = CommandLine(__doc__)
    parser.add_argument("--kills", type=at_least(1), default=30)
    parser.add_argument("--files", type=at_least(1), default=320)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    settings = parser.parse_args()
    settings.record, rng = run_record(), random.Random(settings.seed)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        options, bad_options = fuzz_options(scratch / "options")
        files, bad_files = fuzz_files(scratch / "files", settings.files, rng)
        failures = write_failures(scratch / "writing")
        kills = killed_and_resumed(scratch / "kills", settings.kills, rng)
    counts = options + files
    figures = {"kills": kills, "writing": failures, "bad": bad_options + bad_files}
    figures["outcomes"] = {f"{what}: {outcome}": count for (what, outcome), count in sorted(counts.items())}
    write_figures(settings, figures, settings.json)
    kinds = sorted({what for what, _ in counts})
    outcomes = sorted({outcome for _, outcome in counts})
    print_table(
        ["damaged", *outcomes], [[kind, *(str(counts[(kind, outcome)]) for outcome in outcomes)] for kind in kinds]
    )
    print_table(["writing", "ends in", "checkpoint whole"], [[str(cell) for cell in row] for row in failures])
    print("killed and resumed:", kills)
    for case in figures["bad"]:
        print(case)


if __name__ == "__main__":
    run_as_script(main)
