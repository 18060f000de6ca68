"""What damaged input, killed runs and a full disk do to the scripts: every outcome is counted.

    python benchmarks/torture.py --json results/reliability.json

Each input of a table is laid out in a folder beside good files, and a script is called there. It must succeed, or end
in one line and exit code 2, in reasonable time, with nothing overwritten or half written and no foreign code run. Then
runs are killed at random moments and resumed, and must end with the weights of an undisturbed one.
"""

import contextlib
import io
import random
import re
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from subprocess import DEVNULL, Popen

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fid
import inpaint
import train_rectangles
import train_squares
from maskgit import CommandLine, at_least, load_checkpoint, print_table, run_as_script, run_record, write_figures

SCRIPTS = {module.__name__: module.main for module in (train_squares, train_rectangles, inpaint)}
SCRIPTS["fid"] = lambda: runpy.run_path(fid.__file__, run_name="__main__")  # which names its errors by itself
SMALL = "--dim 16 --heads 2 --layers 1 --device cpu --precision float32"
SQUARES = f"train_squares {SMALL} --batch-size 16 --steps 1 --out out"
RECTANGLES = f"train_rectangles {SMALL} --batch-size 4 --test-images 8 --steps 1 --out out"
CATS = f"inpaint {SMALL} --cartoons 150 --size 16 --codes 16 --test-images 8 --steps 2 --painter-steps 2 --out out"
FILL = "inpaint --checkpoint model.pt --images images --masks masks --out out --device cpu"
STATISTICS = "fid --dims 64 --device cpu statistics.npz statistics.npz"
FEATURES = "fid --dims 64 --device cpu --num-workers 0 images statistics.npz --weights"


def make_good_files(folder):
    """Of each kind one; a copy of this folder, but for what is laid out in it, is the current one of each call."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for i in (1, 2):  # a distance needs two
        PICTURE.save(folder / "images" / f"a{i}.png")
        Image.new("L", (16, 16), 255).save(folder / "masks" / f"m{i}.png")
    np.savez(folder / "statistics.npz", mu=np.zeros(64), sigma=np.eye(64))
    torch.save(fid.Inception().state_dict(), folder / "weights.pth")  # large: never copied
    with contextlib.chdir(folder):
        outcome, text = end_of(CATS)
        assert outcome == "succeeds", text
        shutil.move("out/model.pt", "model.pt")
        shutil.rmtree("out")


def damage(path, good=None):
    """The bytes of a file, or in its place of a good one: cut off, some flipped, or some overwritten."""

    def lay_out(rng):
        data = bytearray(Path(good or path).read_bytes())
        start = rng.randrange(len(data))
        kind = rng.choice(["cut off", "flipped", "overwritten"])
        if kind == "cut off":
            del data[start:]
        elif kind == "flipped":
            for _ in range(20):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            data[start : start + 50] = rng.randbytes(50)
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(data)

    return lay_out


def damage_picture(rng):
    mode, suffix = rng.choice([("RGB", "png"), ("RGB", "jpg"), ("RGB", "webp"), ("RGB", "bmp"), ("P", "png")])
    Path("images/a1.png").unlink()
    PICTURE.convert(mode).save(f"images/a1.{suffix}")
    damage(f"images/a1.{suffix}")(rng)


class Malicious:
    def __reduce__(self):  # what to call when it is unpickled
        return open, ("foreign code ran", "w")


def earlier_run(rng):
    Path("out").mkdir()
    shutil.copy("model.pt", "out/model.pt")


def full_disk(rng):
    earlier_run(rng)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
HUGE = Image.new("1", (30_000, 30_000))
EITHER = ("succeeds", "one line")
ONE_LINE = ("one line",)
DAMAGED = [  # name, what is laid out, call, what may come of it; these many times, with other random numbers
    ("damaged picture to fill", damage_picture, FILL, EITHER),
    ("damaged picture to train on", damage_picture, f"{CATS} --data images", EITHER),
    ("damaged picture for FID", damage_picture, f"{FEATURES} ../good/weights.pth", EITHER),
    ("damaged mask", damage("masks/m1.png"), FILL, EITHER),
    ("damaged checkpoint", damage("model.pt"), FILL, ONE_LINE),
    ("damaged checkpoint to resume", damage("out/model.pt", "model.pt"), f"{CATS} --resume", ONE_LINE),
    ("damaged statistics", damage("statistics.npz"), STATISTICS, ONE_LINE),
    ("damaged weights", damage("weights.pth", "../good/weights.pth"), f"{FEATURES} weights.pth", EITHER),
]
ONCE = [
    ("checkpoint with code in it", lambda rng: torch.save(Malicious(), "model.pt"), FILL, ONE_LINE),
    ("picture too large to open", lambda rng: HUGE.save("images/a1.png"), FILL, ONE_LINE),
    ("earlier run", earlier_run, CATS, ONE_LINE),
    ("full disk", full_disk, f"{CATS} --force", ONE_LINE),
    ("folder that cannot be made", lambda rng: None, f"{SQUARES} --out model.pt/run", ONE_LINE),
]


def options_out_of_range():
    """Every option that takes a value, with some that are wrong or extreme."""
    rows = []
    for call in (SQUARES, RECTANGLES, CATS, STATISTICS):
        script = call.split()[0]
        for option in re.findall(r"\[(--[\w-]+) [^|]", end_of(f"{script} --help")[1]):
            for value in ("-1", "nan", "1e400", "nonsense", ""):
                rows.append((f"option of {script}.py", lambda rng: None, f"{call} {option}={value}", EITHER))
    return rows


def end_of(call):
    """How a call ends, and what it prints. It is made in this process: hundreds of them need no new start."""
    script, *sys.argv[1:] = call.split()
    said = io.StringIO()
    code = 0
    signal.alarm(60)  # seconds
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            run_as_script(SCRIPTS[script])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        return "traceback", traceback.format_exc()
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    text = said.getvalue()
    if code == 2 and not (text.count("error: ") == 1 and re.search(r"^error: .*\n\Z", text, re.MULTILINE)):
        return "several lines", text
    return {0: "succeeds", 2: "one line", 130: "hangs"}[code], text


def outcome_of(lay_out, call, good, rng):
    """What comes of an input, and what is printed."""
    place = good.with_name("place")
    shutil.copytree(good, place, ignore=shutil.ignore_patterns("weights.pth"))
    with contextlib.chdir(place):
        lay_out(rng)
        before = {path: path.read_bytes() for path in Path().rglob("*.*")}
        outcome, text = end_of(call)
        kept = outcome != "one line" or all(path.read_bytes() == content for path, content in before.items())
        if Path("foreign code ran").exists():
            outcome = "foreign code ran"
        elif list(Path().rglob("*.partial")) or not kept:
            outcome = "half written or overwritten"
    shutil.rmtree(place)
    return outcome, text


RUN = """
import maskgit, train_squares
maskgit.CHECKPOINT_SECONDS = 0
train_squares.EXACT_DRAWS = train_squares.MODEL_DRAWS = 20
maskgit.run_as_script(train_squares.main)
"""


def kill_and_resume(folder, kills, rng):
    """Runs that write a checkpoint after every step, each killed at a random moment, every third one as soon as it
    writes after that: how many end as they should."""

    def start(out, *options):
        command = [sys.executable, "-c", RUN, *SQUARES.split()[1:], "--steps", "60", "--out", out, *options]
        return Popen(command, cwd=Path(fid.__file__).parent, stdout=DEVNULL, stderr=DEVNULL)

    def weights(out):
        return torch.cat([p.flatten() for p in load_checkpoint(out / "model.pt")["model"].parameters()])

    found = Counter(kills=kills)
    started = time.monotonic()
    start(folder / "whole").wait()
    duration = time.monotonic() - started
    for i in range(kills):
        out = folder / f"killed{i}"
        waits = i % 3 == 0
        process = start(out)
        time.sleep(rng.uniform(0, duration / 2 if waits else duration))
        while waits and process.poll() is None and not (out / "model.pt.partial").exists():
            pass
        process.kill()
        process.wait()
        found["killed in mid-writing"] += (out / "model.pt.partial").exists()
        found["killed after the first checkpoint"] += (out / "model.pt").exists()
        start(out, *["--resume"] * (out / "model.pt").exists()).wait()
        found["bit-identical"] += torch.equal(weights(out), weights(folder / "whole"))
    return found


def main():
    record = run_record()
    parser = CommandLine(__doc__)
    parser.add_argument("--times", type=at_least(1), default=36, help="that a file of each kind is damaged")
    parser.add_argument("--kills", type=at_least(1), default=30)
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    arguments = parser.parse_args()
    rng = random.Random(0)
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # too late an end is like Ctrl-C
    train_squares.EXACT_DRAWS = train_squares.MODEL_DRAWS = 20  # more would take longer than such a training
    counts = Counter()
    bad = []
    with tempfile.TemporaryDirectory() as scratch:
        good = Path(scratch, "good")
        make_good_files(good)
        inputs = DAMAGED * arguments.times + ONCE + options_out_of_range()
        for i, (name, lay_out, call, allowed) in enumerate(inputs, start=1):
            outcome, text = outcome_of(lay_out, call, good, rng)
            counts[name, outcome] += 1
            if outcome not in allowed:
                bad.append({"input": name, "call": call, "outcome": outcome, "text": text[-1500:]})
            if i % 20 == 0:
                print(f"inputs: {i}/{len(inputs)}", file=sys.stderr, flush=True)
        killed = kill_and_resume(Path(scratch), arguments.kills, rng)
    rows = [dict(input=name, outcome=outcome, count=count) for (name, outcome), count in sorted(counts.items())]
    write_figures(record, vars(arguments), dict(outcomes=rows, killed=killed, wrong=bad), arguments.json)
    print_table(["input", "outcome", "count"], [[str(value) for value in row.values()] for row in rows])
    print(*killed.items(), *bad, sep="\n")
    sys.exit(f"{len(bad)} outcomes should not have happened" if bad else 0)


if __name__ == "__main__":
    run_as_script(main)
