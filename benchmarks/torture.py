"""What killed runs, failing disks and damaged input do to the scripts: every outcome is counted.

    python benchmarks/torture.py --json results/reliability.json

Runs are killed at random moments and resumed, and must end with the weights of an undisturbed one. The disk fills up,
the folder vanishes, two runs want the same one, Ctrl-C is pressed. Each script runs twice with one seed. Then files are
truncated, changed or of the wrong kind, and options out of range: each call must succeed, or end in one line and exit
code 2, in reasonable time, with nothing overwritten and no foreign code run. Every random choice follows from --seed.
"""

import contextlib
import functools
import io
import json
import os
import random
import resource
import shutil
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
import maskgit
import train_rectangles
import train_squares
from maskgit import CommandLine, at_least, load_checkpoint, print_table, run_as_script, run_record, write_figures

SCRIPTS = {"train_squares": train_squares, "train_rectangles": train_rectangles, "inpaint": inpaint, "fid": fid}
SMALL = ["--dim", "16", "--heads", "2", "--layers", "1", "--device", "cpu", "--precision", "float32"]
SQUARES = [*SMALL, "--batch-size", "16"]
RECTANGLES = [*SMALL, "--batch-size", "4", "--test-images", "8"]
CATS = [*SMALL, "--cartoons", "150", "--size", "16", "--codes", "16", "--batch-size", "4", "--test-images", "8"]
CATS += ["--steps", "2", "--painter-steps", "2"]
HANGS_AFTER = 60  # seconds
train_squares.EXACT_DRAWS = 20  # here and in what command() starts: to count more takes longer than such a training
train_squares.MODEL_DRAWS = 20

# ---------------------------------------------------------------------------------------------------
# Runs that are disturbed


def command(script, *arguments, seconds=maskgit.CHECKPOINT_SECONDS):
    """A script's call that writes a checkpoint every so many seconds, with 0 after every step."""
    here = str(Path(__file__).resolve().parent)
    call = f"import sys; sys.path.insert(0, {here!r}); import torture; torture.start({script!r}, {seconds})"
    return [sys.executable, "-c", call, *map(str, arguments)]


def start(script, seconds):
    maskgit.CHECKPOINT_SECONDS = seconds
    run_as_script(SCRIPTS[script].main)


def finished(call, **options):
    """A call of command() that has ended: its returncode and what it printed."""
    return subprocess.run(call, capture_output=True, text=True, **options)


def weights(folder):
    return list(load_checkpoint(folder / "model.pt")["model"].state_dict().values())


def equal_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def ends_in_one_line(call):
    lines = [line for line in call.stderr.splitlines() if not line.startswith("step ")]
    return call.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ")


def kill_and_resume(folder, kills, rng):
    """Runs that write a checkpoint after every step, each killed at a random moment, every third one as soon as it
    writes after that: how many end as they should."""
    squares = functools.partial(command, "train_squares", *SQUARES, "--steps", 60, seconds=0)
    found = Counter()
    started = time.monotonic()
    finished(squares("--out", folder / "whole"), check=True)
    duration = time.monotonic() - started
    for i in range(kills):
        out = folder / f"killed{i}"
        waits = i % 3 == 0
        process = subprocess.Popen(squares("--out", out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0, duration / 2 if waits else duration))
        while waits and process.poll() is None and not (out / "model.pt.partial").exists():
            pass
        process.kill()
        process.wait()
        found["killed in mid-writing"] += (out / "model.pt.partial").exists()
        found["killed after the first checkpoint"] += (out / "model.pt").exists()
        finished(squares("--out", out, *["--resume"] * (out / "model.pt").exists()), check=True)
        found["bit-identical"] += equal_weights(out, folder / "whole")
        show_progress("killed runs", i + 1, kills)
    return {"kills": kills, **found}


def disturb(folder):
    """{what happens to a run: whether it ends as it should}."""
    squares = functools.partial(command, "train_squares", *SQUARES)
    out = folder / "run"
    run = squares("--steps", 20, "--out", out)
    finished(run, check=True)
    checkpoint = (out / "model.pt").read_bytes()
    found = {}

    def unharmed():
        return (out / "model.pt").read_bytes() == checkpoint and not (out / "model.pt.partial").exists()

    def small_files_only():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    call = finished([*run, "--force"], preexec_fn=small_files_only)
    found["no space for a checkpoint: one line, the old one unharmed"] = ends_in_one_line(call) and unharmed()
    call = finished(run)
    found["a folder that holds a run: one line, unharmed"] = ends_in_one_line(call) and unharmed()
    (folder / "file").touch()
    call = finished(squares("--steps", 5, "--out", folder / "file" / "run"))
    found["a folder that cannot be made: one line"] = ends_in_one_line(call)

    long = squares("--steps", 100_000, "--out", folder / "long", seconds=0.5)
    process = subprocess.Popen(long, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(folder / "long" / "model.pt")
    call = finished(squares("--steps", 2000, "--out", folder / "long", "--force"))
    found["a folder that a run is writing to, --force: one line"] = ends_in_one_line(call)
    shutil.rmtree(folder / "long")
    wait_for(folder / "long" / "model.pt")
    found["its folder vanishes: made again"] = process.poll() is None
    process.send_signal(signal.SIGINT)
    line = process.communicate()[1].splitlines()[-1]
    step = load_checkpoint(folder / "long" / "model.pt")["step"]
    found["Ctrl-C: one line, exit code 130, resumable"] = process.returncode == 130 and step > 0 and "--resume" in line
    return found


def wait_for(file):
    deadline = time.monotonic() + HANGS_AFTER
    while not file.exists():
        if time.monotonic() > deadline:
            raise ValueError(f"{file} was not written in {HANGS_AFTER} seconds")
        time.sleep(0.01)


def repeat(folder):
    """{script: whether a second run with the same seed leaves the same weights, pictures and figures}."""
    runs = {
        "train_squares": [*SQUARES, "--steps", 20],
        "train_rectangles": ["--task", "grid", *RECTANGLES, "--steps", 5],
        "inpaint": CATS,
    }
    found = {}
    for script, arguments in runs.items():
        first, second = (folder / f"{script}{i}" for i in (1, 2))
        for out in (first, second):
            finished(command(script, *arguments, "--out", out), check=True)
        pictures = [file.name for file in first.iterdir() if file.suffix in (".png", ".gif")]
        same = all((first / name).read_bytes() == (second / name).read_bytes() for name in pictures)
        found[script] = same and equal_weights(first, second) and timeless(first) == timeless(second)
    return found


def timeless(out):
    """The figures of a run without what differs from run to run."""

    def strip(value):
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in ("minutes", "seconds", "command", "out", "date")}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return strip(json.loads((out / "metrics.json").read_text()))


# ---------------------------------------------------------------------------------------------------
# Damaged input


class HangError(BaseException):
    """Not an Exception, so that nothing takes it for bad input."""


def outcome_of(script, arguments):
    """How a call ends, and its text. Calls are made in this process: hundreds of them need no new start."""

    def hang(*_):
        raise HangError

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(HANGS_AFTER)
    sys.argv = [f"{script}.py", *map(str, arguments)]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(complaint):
            run_as_script(SCRIPTS[script].main)
        return "succeeds", ""
    except SystemExit as stop:
        lines = [line for line in complaint.getvalue().splitlines() if line.startswith("error: ")]
        in_one_line = stop.code == 2 and len(lines) == 1 and complaint.getvalue().endswith(f"{lines[0]}\n")
        return "one line" if in_one_line else "several lines", complaint.getvalue()
    except HangError:
        return "hangs", ""
    except BaseException:
        return "traceback", traceback.format_exc()
    finally:
        signal.alarm(0)


def damaged(content, rng):
    """The bytes of a file: truncated, with bits flipped, with a part overwritten, or replaced."""
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
    return bytes(data)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


class Originals:
    """Good files, to be damaged."""

    def __init__(self, folder):
        folder.mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        for mode, suffix in (("RGB", "png"), ("RGB", "jpg"), ("RGB", "webp"), ("RGB", "bmp"), ("P", "png")):
            Image.fromarray(pixels).convert(mode).save(folder / f"{mode}.{suffix}")
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 256).save(folder / "I16.png")
        Image.new("1", (30_000, 30_000)).save(folder / "bomb.png")
        self.pictures = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
        Image.new("L", (16, 16), 255).save(folder / "mask.png")
        self.mask = (folder / "mask.png").read_bytes()
        outcome, text = outcome_of("inpaint", [*CATS, "--out", folder / "run"])
        if outcome != "succeeds":
            raise ValueError(f"the undamaged run fails: {text}")
        self.checkpoint = (folder / "run" / "model.pt").read_bytes()
        torch.save(fid.Inception().state_dict(), folder / "weights.pth")
        self.weights = (folder / "weights.pth").read_bytes()
        np.savez(folder / "statistics.npz", mu=np.zeros(64), sigma=np.eye(64))
        self.statistics = (folder / "statistics.npz").read_bytes()

    def any_picture(self, rng):
        """(suffix, bytes) of a damaged picture, or of one that is too large to be opened."""
        name = rng.choice(sorted(self.pictures))
        content = self.pictures[name] if name == "bomb.png" else damaged(self.pictures[name], rng)
        return Path(name).suffix, content


CASES = ("picture to fill", "mask", "picture to train on", "picture for FID", "checkpoint", "malicious checkpoint")
CASES += ("checkpoint to resume", "statistics", "weights", "file as people have it")


def as_people_have_it(place, rng):
    """Put a file of another kind in place of a picture or its mask, 16x16 both, or beside it."""
    image = Image.open(place / "images" / "a1.png")
    levels = np.eye(16, dtype=np.uint8) * 255
    sideways = Image.Exif()
    sideways[0x0112] = 6
    clear = Image.fromarray(np.dstack([np.asarray(image), levels]))
    files = {
        "images/a1.png": [(image, dict(exif=sideways)), (image.convert("P"), {}), (clear, {})],
        "images/a1.tif": [(image.convert("CMYK"), {}), (Image.fromarray(np.float32(levels) / 255), {})],
        "images/._a1.png": [(Image.new("RGB", (3, 3)), {})],
        "masks/m1.png": [(clear, {}), (Image.fromarray(levels // 255), {}), (Image.fromarray(levels[:8, :8]), {})],
        "masks/mask_1.png": [(Image.fromarray(levels), {})],
    }
    files["masks/m1.png"] += [(Image.fromarray(np.uint16(levels) * 257), {}), (Image.new("L", (16, 16), 90), {})]
    name = rng.choice(sorted(files))
    changed, options = rng.choice(files[name])
    changed.save(place / name, **options)
    if name == "images/a1.tif":
        (place / "images" / "a1.png").unlink()


def damage(case, good, place, rng):
    """Lay out the files of a case in the folder `place`, one of them damaged: (script, arguments)."""
    for name in ("images", "masks", "out"):
        (place / name).mkdir(parents=True)
    picture = place / "images" / "a1.png"
    mask = place / "masks" / "m1.png"
    picture.write_bytes(good.pictures["RGB.png"])
    mask.write_bytes(good.mask)
    (place / "model.pt").write_bytes(good.checkpoint)
    (place / "weights.pth").write_bytes(good.weights)
    (place / "good.npz").write_bytes(good.statistics)
    filling = ["--checkpoint", place / "model.pt", "--images", place / "images", "--masks", place / "masks"]
    filling = ("inpaint", [*filling, "--out", place / "out", "--device", "cpu"])
    measuring = ["--dims", "64", "--num-workers", "0", "--device", "cpu", "--weights", place / "weights.pth"]
    if "picture" in case:
        suffix, content = good.any_picture(rng)
        picture.unlink()
        picture.with_suffix(suffix).write_bytes(content)
        if case == "picture to train on":
            return "inpaint", [*CATS, "--data", place / "images", "--out", place / "out"]
        return filling if case == "picture to fill" else ("fid", [*measuring, place / "images", place / "images"])
    if case == "file as people have it":
        as_people_have_it(place, rng)
        return filling
    if case == "mask":
        mask.write_bytes(damaged(good.mask, rng))
        return filling
    if case == "checkpoint":
        (place / "model.pt").write_bytes(damaged(good.checkpoint, rng))
        return filling
    if case == "malicious checkpoint":
        torch.save(Malicious(str(place / "foreign code ran")), place / "model.pt")
        return filling
    if case == "checkpoint to resume":
        (place / "out" / "model.pt").write_bytes(damaged(good.checkpoint, rng))
        return "inpaint", [*CATS, "--out", place / "out", "--resume"]
    if case == "statistics":
        (place / "bad.npz").write_bytes(damaged(good.statistics, rng))
        return "fid", [*measuring, place / "bad.npz", place / "good.npz"]
    (place / "weights.pth").write_bytes(damaged(good.weights, rng))
    return "fid", [*measuring, place / "images", place / "good.npz"]


def fuzz_files(folder, count, rng):
    """(Counter of (case, outcome), what should not have happened)."""
    good = Originals(folder / "originals")
    found = Counter()
    bad = []
    for i in range(count):
        case = CASES[i % len(CASES)]
        place = folder / f"case{i}"
        outcome, text = outcome_of(*damage(case, good, place, rng))
        if (place / "foreign code ran").exists():
            outcome = "foreign code ran"
        found[(case, outcome)] += 1
        if outcome not in ("succeeds", "one line"):
            bad.append({"case": case, "number": i, "outcome": outcome, "text": text[-1500:]})
        shutil.rmtree(place)
        show_progress("damaged files", i + 1, count)
    return found, bad


def fuzz_options(folder):
    """Every option that takes a value, with values out of range or of the wrong kind; like fuzz_files."""
    found = Counter()
    bad = []
    (folder / "empty").mkdir(parents=True)
    common = {
        "train_squares": [*SQUARES, "--steps", "1", "--force", "--out", folder / "squares"],
        "train_rectangles": [*RECTANGLES, "--steps", "1", "--force", "--out", folder / "rectangles"],
        "inpaint": [*CATS, "--force", "--out", folder / "cats"],
        "fid": [folder / "empty", folder / "empty"],
    }
    for script, arguments in common.items():
        options = options_with_a_value(script)
        for i, option in enumerate(options, start=1):
            for value in ("-1", "nan", "1e400", "nonsense", ""):
                outcome, text = outcome_of(script, [*arguments, option, value])
                found[(f"{script}.py's options", outcome)] += 1
                if outcome not in ("succeeds", "one line"):
                    bad.append({"case": f"{script} {option} {value!r}", "outcome": outcome, "text": text[-1500:]})
            show_progress(f"options of {script}.py", i, len(options))
    return found, bad


def options_with_a_value(script):
    """From its --help; without those whose value is a name that the caller is free to choose."""
    usage = finished(command(script, "--help")).stdout.split("\n\n")[0].replace("\n", " ")
    parts = [part.strip("[] ").split() for part in usage.split("[")]
    with_value = [part[0] for part in parts if len(part) > 1 and part[0][:2] == "--" and part[1] != "|"]
    return [option for option in with_value if option not in FREE]


FREE = {"--out", "--json", "--save-stats", "--weights"}


def show_progress(what, done, count):
    if done == count or done % 20 == 0:
        print(f"{what}: {done}/{count}", file=sys.stderr, flush=True)


def main():
    record = run_record()
    parser = CommandLine(__doc__)
    parser.add_argument("--kills", type=at_least(1), default=30)
    parser.add_argument("--files", type=at_least(1), default=360)
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background, and what it starts, ignores it
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        files, bad_files = fuzz_files(scratch / "files", arguments.files, rng)
        options, bad_options = fuzz_options(scratch / "options")
        figures = {"disturbed": disturb(scratch / "disturbed"), "same bytes twice": repeat(scratch / "twice")}
        figures["killed"] = kill_and_resume(scratch / "kills", arguments.kills, rng)
    counts = files + options
    figures["outcomes"] = [dict(input=case, outcome=o, count=n) for (case, o), n in sorted(counts.items())]
    figures["should not have happened"] = bad_files + bad_options
    write_figures(record, vars(arguments), figures, arguments.json)
    outcomes = sorted({outcome for _, outcome in counts})
    rows = [[case, *(str(counts[(case, o)]) for o in outcomes)] for case in dict.fromkeys(case for case, _ in counts)]
    print_table([f"{sum(counts.values())} damaged inputs", *outcomes], rows)
    for name in ("disturbed", "same bytes twice", "killed"):
        print_table([name, ""], [[what, str(value)] for what, value in figures[name].items()])
    for case in figures["should not have happened"]:
        print(case)


if __name__ == "__main__":
    run_as_script(main)
