"""Mutation testing: do the tests notice a mistake? Faults are planted one at a time in a copy: each must be caught.

    python benchmarks/faults.py --json results/faults.json
    python benchmarks/faults.py --json inpaint_faults.json --only inpaint.py

A fault is a piece of code, found once in its file, and what takes its place. It is caught if one of the tests beside
that file fails: for a script the tests in its sections of test_maskgit.py, for maskgit.py those of all other sections.
The exit code is 1 if one survives.
"""

import ast
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from maskgit import CommandLine, InputError, print_table, run_as_script, run_record, write_figures

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train_squares.py", "train_rectangles.py", "inpaint.py", "fid.py")
LIMIT = 900  # seconds: tests that take longer have noticed the fault
FAULTS = {  # file: [(piece of code, replacement)], in the order of the code
    "maskgit.py": [
        ("key=lambda run: run.inertia", "key=lambda run: -run.inertia"),
        ("np.minimum(closest, distances.clip(min=0))", "distances.clip(min=0)"),
        ("[-2 * centred.T,", "[-centred.T,"),
        ("count[rows, columns] += 1", "count[rows, columns] = 1"),
        ("first * sin + second * cos]", "first * sin - second * cos]"),
        (".softmax(dim=-1) @ value", ".softmax(dim=-2) @ value"),
        ("self.embedding.weight[: self.mask_id]", "self.embedding.weight"),
        ("(ratio.expand(rows) * tokens - ROUNDING)", "(ratio.expand(rows) * tokens)"),
        ("return rank < count[:, None]", "return rank <= count[:, None]"),
        ("torch.where(half.any(dim=1, keepdim=True), half, across)", "half"),
        ("generator=generator, dtype=torch.float32).argsort", "generator=generator).argsort"),
        ("return (loss * mask).sum() /", "return loss.sum() /"),
        ("(1 - state.step / state.steps) * gumbel", "(state.step / state.steps) * gumbel"),
        ("(ascending.cumsum(dim=1) > budget)", "(ascending > budget)"),
        ("if log_probs.isnan().any():", "if False:"),
        ("share * count + ROUNDING", "share * max(at_start) + ROUNDING"),
        ("(had - chosen.clamp(min=1))", "(had - chosen)"),
        (".masked_fill(~commits, model.mask_id)", ".masked_fill(commits, model.mask_id)"),
        ("DROPOUT + rank", "rank"),
        ("if not mask.any():", "if False:"),
        ("np.fmin.reduce([past[best_by]", "np.fmax.reduce([past[best_by]"),
        ("last or stopped or time", "last or time"),
        ("counted[rows], count=counted.sum())", "counted[rows])"),
        ("now = plain(asdict(recipe) | model.config)", "now = before"),
        ("state.update(training[\"progress\"])", "pass"),
        ("os.replace(temporary, path)", "path.write_bytes(data)"),
        ("if broken := archive.testzip():", "if broken := None:"),
        ("map_location=\"cpu\", weights_only=True)", "map_location=\"cpu\", weights_only=False)"),
        ("        except OSError:\n            os.dup2", "        except SyntaxError:\n            os.dup2"),
        ("sys.exit(2)", "sys.exit(1)"),
    ],
    "train_squares.py": [
        ("white = (shown == WHITE)", "white = (shown != BLACK)"),
        ("agree = agreeing(prior, shown).float()", "agree = torch.ones(len(shown), len(prior))"),
        ("return found[which], calls[which]", "return found[which * 0], calls[which]"),
        ("(found - truth).abs().sum(dim=-1) + 1 - found.sum(dim=-1)", "(found - truth).abs().sum(dim=-1)"),
        ("for _, mask in states])", "for _, mask in states[1:]])"),
    ],
    "train_rectangles.py": [
        ("(high - low).clip(min=0)", "(high - low)"),
        ("seed = maskgit.step_seed(recipe.seed, step)", "seed = recipe.seed"),
        ("possible(proposal) & ((proposed == observed) | mask).all(axis=1)", "possible(proposal)"),
        ("torch.from_numpy(test.tokens).masked_fill(mask, model.mask_id)", "torch.from_numpy(test.tokens)"),
    ],
    "inpaint.py": [
        ("if digest in distinct:", "if False:"),
        ("patches.any(axis=-1)", "patches.all(axis=-1)"),
        ("- 2 * shown @ centroids.T", "- shown @ centroids.T"),
        ("values = values.masked_fill(holes, 0)", "values = values.clone()"),
        ("np.where(holes[..., None], filled, images)", "np.where(holes[..., None], images, filled)"),
        ("if own < energy / 2:", "if True:"),
        ("best_by=\"validation\"", "best_by=None"),
        ("if frames > 1:", "if False:"),
        ("if orientation in FLIPS else image", "if False else image"),
        ("unicodedata.normalize(\"NFC\", file.stem.casefold())", "file.stem.casefold()"),
        ("len(pairs) == len(set(pairs.values())) == len(pictures)", "len(pairs) == len(pictures)"),
        ("return bright if invert else ~bright", "return ~bright if invert else bright"),
        ("if one_sided or np.mean", "if np.mean"),
        ("if file.exists() and not overwrite:", "if False:"),
        ("result.putalpha(picture.getchannel(\"A\"))", "pass"),
        ("icc_profile=picture.info[\"icc_profile\"]", "icc_profile=None"),
    ],
    "extras/vqgan.py": [
        ("inpaint.membrane(pixels, pixels[:, :1].isnan())", "pixels.nan_to_num()"),
        (".get(\"vqgan_sha256\") != vqgan.sha256", ".get(\"vqgan_sha256\") is None"),
        ("nn.ZeroPad2d((0, 1, 0, 1))", "nn.ZeroPad2d((1, 0, 1, 0))"),
    ],
    "fid.py": [
        ("count_include_pad=False", "count_include_pad=True"),
        ("np.square(root2).sum() - 2 * cross", "np.square(root2).sum() - cross"),
        ("np.sqrt(len(features) - 1)", "np.sqrt(len(features))"),
        ("aa.sum() - np.trace(aa) + bb.sum() - np.trace(bb)", "aa.sum() + bb.sum()"),
        ("align_corners=False", "align_corners=True"),
    ],
    "benchmarks/reproduce.py": [
        ("explained = 2 * (", "explained = 9 * ("),
        ("off = len(stored[path]) != len(new[path]) or", "off ="),
    ],
}  # fmt: skip


def require_fit(faults):
    """InputError unless the piece of every fault is found once in its file."""
    found = [((ROOT / file).read_text().count(piece), file, piece) for file, piece, _ in faults]
    if wrong := [f"{file} has {piece!r} {count} times" for count, file, piece in found if count != 1]:
        raise InputError(f"a fault needs a piece of code that is there once: {'; '.join(wrong)}")


def tests_beside(file):
    """What pytest is to run for a fault in a file."""
    if "/" in file:
        return [{"extras": "extras/test_vqgan.py", "benchmarks": "benchmarks/test_benchmarks.py"}[file.split("/")[0]]]
    source = (ROOT / "test_maskgit.py").read_text()
    lines = source.splitlines()
    titles = {i: line for i, (before, line) in enumerate(itertools.pairwise(lines), 2) if before.startswith("# ----")}
    selected = []
    for test in ast.parse(source).body:
        if getattr(test, "name", "").startswith("test_"):
            title = titles[max(line for line in titles if line < test.lineno)]
            of_script = [script for script in SCRIPTS if title.startswith(f"# {script}")]
            if (of_script or ["maskgit.py"]) == [file]:
                selected.append(f"test_maskgit.py::{test.name}")
    return selected


def copy_of_project(folder):
    ignored = shutil.ignore_patterns(".git", ".*_cache", ".venv", "__pycache__", "runs", "data")
    return shutil.copytree(ROOT, folder, ignore=ignored)


def failing_test(copy, tests):
    """The name of the first test that fails in a copy of the project, or that runs when the time is over; None if all
    pass."""
    command = [sys.executable, "-u", "-m", "pytest", "-x", "-v", "--tb=no", "-p", "no:cacheprovider"]
    command += [f"--basetemp={copy}_tests", *tests]
    with open(f"{copy}.log", "w") as log:
        process = subprocess.Popen(command, cwd=copy, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            failed = process.wait(LIMIT) != 0
        except subprocess.TimeoutExpired:
            failed = True
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # and what the tests have started
                process.wait()
    shutil.rmtree(f"{copy}_tests", ignore_errors=True)  # some are large
    text = Path(f"{copy}.log").read_text()
    begun = re.findall(r"^\S+::(test_\w+)", text, re.MULTILINE)
    if not begun:
        raise InputError(f"no test runs in the copy: {text.strip().splitlines()[-1:]}")
    return begun[-1] if failed else None


def main():
    record = run_record()
    parser = CommandLine(__doc__)
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    parser.add_argument("--only", default="", metavar="TEXT", help="the faults whose file or text contains TEXT")
    arguments = parser.parse_args()
    faults = [(file, *fault) for file, listed in FAULTS.items() for fault in listed]
    faults = [fault for fault in faults if any(arguments.only in text for text in fault)]
    require_fit(faults)
    rows = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        undisturbed = copy_of_project(Path(scratch, "undisturbed"))
        for file in dict.fromkeys(fault[0] for fault in faults):
            if failed := failing_test(undisturbed, tests_beside(file)):
                raise InputError(f"{failed} fails without a fault")
        for i, (file, piece, replacement) in enumerate(faults):
            started = time.monotonic()
            faulty = copy_of_project(Path(scratch, f"fault{i}"))
            source = (faulty / file).read_text()
            (faulty / file).write_text(source.replace(piece, replacement))
            test = failing_test(faulty, tests_beside(file))
            rows.append(dict(file=file, piece=piece, replacement=replacement, caught=bool(test), test=test))
            rows[-1]["seconds"] = round(time.monotonic() - started, 1)
            print(f"{file}: {piece} -> {replacement}: {test or 'SURVIVED'} ({rows[-1]['seconds']:.0f} s)", flush=True)
    write_figures(record, vars(arguments), {"faults": rows}, arguments.json)
    table = []
    for file in dict.fromkeys(row["file"] for row in rows):
        of_file = [row for row in rows if row["file"] == file]
        sums = [sum(row[name] for row in of_file) for name in ("caught", "seconds")]
        table.append([file, str(len(of_file)), *(f"{value:.0f}" for value in sums)])
    print_table(["faults in", "planted", "caught", "seconds"], table)
    if not all(row["caught"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    run_as_script(main)
