"""What damaged or odd input, signals, a full disk and a closed screen do to the scripts: every outcome is counted.

    python benchmarks/torture.py --json results/reliability.json

Each input of a table is laid out beside good files, and a script is called there. It must succeed, or end in one line
and exit code 2, in reasonable time, with nothing overwritten or half written. Then runs are stopped at random moments
and resumed, and must end with the weights of an undisturbed one.
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
from subprocess import Popen

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fid
import inpaint
import maskgit
import train_rectangles
import train_squares

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
    for name, image in (("images/a", PICTURE), ("masks/m", Image.new("L", (16, 16), 255))):
        (folder / name).parent.mkdir(parents=True)
        for i in (1, 2):  # a distance needs two
            image.save(folder / f"{name}{i}.png")
    np.savez(folder / "statistics.npz", mu=np.zeros(64), sigma=np.eye(64))
    torch.save(fid.Inception().state_dict(), folder / "weights.pth")  # large: never copied
    assert end_of(CATS.replace("--out out", f"--out {folder}/../run"))[0] == "succeeds"
    shutil.move(folder.with_name("run") / "model.pt", folder)


def damage(path, good=None):
    """The bytes of a file, or in its place of a good one: cut off, or with other bits in 20 places or 50 bytes."""

    def lay_out(rng):
        data = bytearray(Path(good or path).read_bytes())
        start = rng.randrange(len(data))
        places = [rng.randrange(len(data)) for _ in range(20)]
        wrong = rng.choice([[], places, range(start, min(start + 50, len(data)))])
        for i in wrong:
            data[i] ^= 1 << rng.randrange(8)
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(data if wrong else data[:start])

    return lay_out


def damage_picture(rng):
    mode, suffix = rng.choice([("RGB", "png"), ("RGB", "jpg"), ("RGB", "webp"), ("RGB", "bmp"), ("P", "png")])
    put(f"images/a1.{suffix}", PICTURE.convert(mode))(rng)
    damage(f"images/a1.{suffix}")(rng)


def put(path, image, **options):
    return lambda rng: (Path(path).with_suffix(".png").unlink(missing_ok=True), image.save(path, **options))


def names(*stems):
    good = [Path(name) for name in ("images/a1.png", "images/a2.png", "masks/m1.png", "masks/m2.png")]
    return lambda rng: [old.rename(old.with_stem(stem)) for old, stem in zip(good, stems, strict=True)]


def earlier_run(rng, room=None):
    Path("out").mkdir()
    shutil.copy("model.pt", "out/model.pt")
    if room:  # on a full disk, where no file may become larger than a part of it
        resource.setrlimit(resource.RLIMIT_FSIZE, (rng.randrange(room), resource.RLIM_INFINITY))


PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
PICTURE, DARK = Image.fromarray(PIXELS), Image.fromarray(PIXELS[..., 0].astype(np.uint16))
CLEAR = Image.fromarray(np.dstack([PIXELS, PIXELS[..., 0]]))
FRAMES = {"save_all": True, "append_images": [PICTURE.rotate(90)]}
EITHER, ONE_LINE = ("succeeds", "one line"), ("one line",)
KEPT = ("keeps pictures",)  # it succeeds, with results that are their pictures, since no mask has a hole
DAMAGED = [  # name, what is laid out, call, what may come of it; these many times, with other random numbers
    ("damaged picture to fill", damage_picture, FILL, EITHER),
    ("damaged picture to train on", damage_picture, f"{CATS} --data images", EITHER),
    ("damaged picture for FID", damage_picture, f"{FEATURES} ../good/weights.pth", EITHER),
    ("damaged mask", damage("masks/m1.png"), FILL, EITHER),
    ("damaged checkpoint", damage("model.pt"), FILL, ONE_LINE),
    ("damaged checkpoint to resume", damage("out/model.pt", "model.pt"), f"{CATS} --resume", ONE_LINE),
    ("damaged statistics", damage("statistics.npz"), STATISTICS, ONE_LINE),
    ("damaged weights", damage("weights.pth", "../good/weights.pth"), f"{FEATURES} weights.pth", EITHER),
    ("full disk in training", lambda rng: earlier_run(rng, room=880_000), f"{CATS} --force", ONE_LINE),
    ("full disk in filling", lambda rng: earlier_run(rng, room=700), FILL, ONE_LINE),
]
ONCE = [
    ("checkpoint of Git LFS", lambda rng: Path("model.pt").write_text("version https://git"), FILL, ONE_LINE),
    ("weights of a page", lambda rng: Path("weights.pth").write_text("<html>"), f"{FEATURES} weights.pth", ONE_LINE),
    ("figures below a file", earlier_run, f"{RECTANGLES} --json model.pt/figures.json", ONE_LINE),
    ("weights in place of a folder", earlier_run, f"{SQUARES} --force --weights masks", ONE_LINE),
    ("result in place of a folder", lambda rng: Path("out/a1.png").mkdir(parents=True), f"{FILL} --force", ONE_LINE),
    ("names of 250 bytes", names("é" * 122 + "_1", "é" * 122 + "_2", "m1", "m2"), FILL, KEPT),
    ("link in a circle", lambda rng: Path("images/again").symlink_to(".."), FILL, KEPT),
    ("link to nothing", lambda rng: Path("images/a3.png").symlink_to("nothing"), FILL, ONE_LINE),
    ("picture too large to open", put("images/a1.png", Image.new("1", (30_000, 30_000))), FILL, ONE_LINE),
    ("dark JPEG 2000", put("images/a1.jp2", DARK), FILL, ONE_LINE),
    ("dark PGM", put("images/a1.pgm", DARK), FILL, ONE_LINE),
    ("photograph as mask", put("masks/m1.webp", PICTURE), FILL, ONE_LINE),
    ("transparent mask", put("masks/m1.webp", CLEAR), FILL, ONE_LINE),
    ("animated AVIF", put("images/a1.avif", PICTURE, **FRAMES), FILL, ONE_LINE),
    ("mask of two pages", put("masks/m1.tif", PICTURE, **FRAMES), FILL, ONE_LINE),
    ("JPEG whose EXIF is cut off", put("images/a1.jpg", PICTURE, exif=b"Exif\0\0II*\0"), FILL, KEPT),
    ("AVIF whose EXIF is another", put("images/a1.avif", PICTURE, exif=b"Exif\0\0MM\0*\0\0\0\x08"), FILL, KEPT),
    ("clear WebP with a profile", put("images/a1.webp", CLEAR, lossless=True, icc_profile=b"P3"), FILL, KEPT),
    ("clear TIFF with a profile", put("images/a1.tif", CLEAR.convert("LA"), icc_profile=b"grey"), FILL, KEPT),
    ("Hangul in parts", names("각", "간", "\u1100\u1161\u11a8-mask", "\u1100\u1161\u11ab mask2"), FILL, KEPT),
    ("names of other letters", names("は", "ば", "ぱ_mask", "は_mask"), FILL, ONE_LINE),
    ("names that are not UTF-8", names("\udcff1", "\udcfe2", "m1", "m2"), FILL, KEPT),
]


def end_of(call):
    """How a call ends, and what it prints. It is made in this process: hundreds of them need no new start."""
    script, *sys.argv[1:] = call.split()
    said = io.StringIO()
    code = 0
    signal.setitimer(signal.ITIMER_REAL, 60, 60)  # seconds
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            maskgit.run_as_script(SCRIPTS[script])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        return "traceback", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    text = said.getvalue()
    if code == 2 and not (text.count("error: ") == 1 and re.search(r"^error: .*\n\Z", text, re.MULTILINE)):
        return "several lines", text
    return {0: "succeeds", 2: "one line", 128 + signal.SIGALRM: "hangs"}[code], text


def is_kept(picture):
    before, after = (inpaint.read_picture(file) for file in (picture, Path("out", f"{picture.stem}.png")))
    return before.info["icc_profile"] == after.info["icc_profile"] and np.array_equal(before, after)


def outcome_of(lay_out, call, allowed, good, rng):
    place = good.with_name("place")
    shutil.copytree(good, place, ignore=shutil.ignore_patterns("weights.pth"))
    with contextlib.chdir(place):
        lay_out(rng)
        before = {path: path.read_bytes() for path in Path().rglob("*.*") if path.is_file()}
        outcome, text = end_of(call)
        kept = outcome != "one line" or all(path.read_bytes() == content for path, content in before.items())
        if list(Path().rglob(".*")) or not kept:
            outcome = "half written or overwritten"
        elif outcome == "succeeds" and allowed == KEPT and all(map(is_kept, Path("images").glob("*.*"))):
            outcome = "keeps pictures"
    shutil.rmtree(place)
    return outcome, text


# A run that writes a checkpoint after every step, and screens that are closed, left, full, and good.
RUN = "import maskgit, train_squares as squares; maskgit.CHECKPOINT_SECONDS = 0; "
RUN += "squares.EXACT_DRAWS = squares.MODEL_DRAWS = 20; maskgit.run_as_script(squares.main)"
SCREENS = (">&- 2>&-", "2>&1 | true", ">/dev/full 2>&1", ">/dev/null 2>&1")


def start(out, *options, screen=SCREENS[-1]):
    command = [sys.executable, "-c", RUN, *SQUARES.split()[1:], "--steps", "60", "--out", out, *options]
    return Popen(["bash", "-o", "pipefail", "-c", f'exec "$0" "$@" {screen}', *command], cwd=Path(fid.__file__).parent)


def stop_and_resume(folder, kills, rng):
    """Runs that get signals, every third one while it writes, and go on with other screens: how many end well."""
    found = Counter(kills=kills)
    started = time.monotonic()
    start(folder / "whole").wait()
    duration = time.monotonic() - started
    for i in range(kills):
        out = folder / f"stopped{i}"
        process = start(out)
        time.sleep(rng.uniform(0, duration / 2 if i % 3 == 0 else duration))
        while i % 3 == 0 and process.poll() is None and not list(out.glob(".*")):
            pass
        process.send_signal(number := rng.choice([1, 2, 9, 15]))  # HUP, INT, KILL, TERM
        found["ended by the signal"] += process.wait() in (0, -number, 128 + number)
        found["killed in mid-writing"] += bool(list(out.glob(".*")))
        resumed = start(out, *["--resume"] * (out / "model.pt").exists(), screen=SCREENS[i % len(SCREENS)])
        found["resumed to the end"] += resumed.wait() == 0
        models = [maskgit.load_checkpoint(run / "model.pt")["model"] for run in (out, folder / "whole")]
        found["bit-identical"] += all(map(torch.equal, *(model.parameters() for model in models)))
    return found


def main():
    record = maskgit.run_record()
    parser = maskgit.CommandLine(__doc__)
    parser.add_argument("--times", type=maskgit.at_least(1), default=36, help="that a file of each kind is damaged")
    parser.add_argument("--kills", type=maskgit.at_least(1), default=30)
    parser.add_argument("--json", type=maskgit.new_file, required=True, help="file for the figures")
    arguments = parser.parse_args()
    rng = random.Random(0)
    signal.signal(signal.SIGALRM, maskgit.stop)  # too late an end is like Ctrl-C
    train_squares.EXACT_DRAWS = train_squares.MODEL_DRAWS = 20  # more would take longer than such a training
    counts, bad = Counter(), []
    with tempfile.TemporaryDirectory() as scratch:
        good = Path(scratch, "good")
        make_good_files(good)
        inputs = DAMAGED * arguments.times + ONCE
        for call in (SQUARES, RECTANGLES, CATS, STATISTICS):
            script = call.split()[0]
            for option in re.findall(r"\[(--[\w-]+) [^|]", end_of(f"{script} --help")[1]):  # those that take a value
                wrong = [f"{call} {option}={value}" for value in ("-1", "nan", "1e400", "nonsense", "")]
                inputs += [(f"option of {script}.py", lambda rng: None, each, EITHER) for each in wrong]
        for name, lay_out, call, allowed in inputs:
            outcome, text = outcome_of(lay_out, call, allowed, good, rng)
            counts[f"{name}: {outcome}"] += 1
            if outcome not in allowed:
                bad.append({"input": name, "call": call, "outcome": outcome, "text": text[-1500:]})
        killed = stop_and_resume(Path(scratch), arguments.kills, rng)
    maskgit.write_figures(record, vars(arguments), dict(outcomes=counts, killed=killed, wrong=bad), arguments.json)
    print(*counts.items(), *killed.items(), *bad, sep="\n")
    sys.exit(f"{len(bad)} outcomes should not have happened" if bad else 0)


if __name__ == "__main__":
    maskgit.run_as_script(main)
