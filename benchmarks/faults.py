"""Do the tests notice a mistake? Deliberate faults, planted one at a time in a copy: each must be caught.

    python benchmarks/faults.py --json results/faults.json
    python benchmarks/faults.py --json inpaint_faults.json --only inpaint.py

A fault is a piece of one line, found once in its file, and what takes its place. The tests of the section that it lies
in run first, those of the scripts are all of the script's; if they pass, so do all the others before the fault counts
as survived. The exit code is then 1.
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
from maskgit import CommandLine, at_least, print_table, run_as_script, run_record, write_figures

ROOT = Path(__file__).resolve().parents[1]
TESTS = "test_maskgit.py"
FAULTS = {  # file: [(piece of a line, replacement)], in the order of the code
    "maskgit.py": [
        ("key=lambda run: run.inertia", "key=lambda run: -run.inertia"),
        ("np.minimum(closest, distances.clip(min=0))", "distances.clip(min=0)"),
        (".argsort()[-len(empty) :]", ".argsort()[: len(empty)]"),
        ("[-2 * centred.T,", "[-centred.T,"),
        ("count[rows, columns] += 1", "count[rows, columns] = 1"),
        ("windows.transpose(0, 1, 2, 4, 5, 3)", "windows.transpose(0, 1, 2, 5, 4, 3)"),
        ("torch.stack([x, y], dim=-1)", "torch.stack([y, x], dim=-1)"),
        ("// 2 * 2 / (dim / 2)", "// 2 * 2 / dim"),
        ("first * sin + second * cos]", "first * sin - second * cos]"),
        ("F.scaled_dot_product_attention(query, key, value)",
         "F.scaled_dot_product_attention(query, key, value, is_causal=True)"),
        (".softmax(dim=-1) @ value", ".softmax(dim=-2) @ value"),
        ("self.embedding(tokens) * math.sqrt(dim)", "self.embedding(tokens)"),
        ("self.embedding.weight[: self.mask_id]", "self.embedding.weight"),
        ("np.cos(r * (math.pi / 2))", "np.sin(r * (math.pi / 2))"),
        ("(ratio * tokens - ROUNDING).ceil()", "(ratio * tokens).ceil()"),
        ("return rank < count[:, None]", "return rank <= count[:, None]"),
        ("torch.where(half.any(dim=1, keepdim=True), half, across)", "half"),
        ("share * count + ROUNDING)", "share * count)"),
        ("if logits.shape != (*tokens[rows].shape, model.mask_id):", "if False:"),
        ("if not mask.any():", "if False:"),
        ("    model = unwrapped(model)\n    if not all", "    if not all"),
        ('store = torch.distributed.PrefixStore(f"group {next(GROUPS)}", store)', "pass"),
        ("group = world > 1 and not in_group()", "group = world > 1"),
        ("figure for figure in figures if not math.isnan(figure)", "figure for figure in figures"),
        ("points[start : start + 4096] + 0.0", "points[start : start + 4096]"),
        ("positions.to(x.dtype)", "positions"),
        ("torch.cat([beyond, -beyond], dim=-1)", "torch.cat([beyond, beyond], dim=-1)"),
        ("((low <= coords) & (coords <= high)).all(dim=-1)", "((low <= coords) & (coords <= high)).any(dim=-1)"),
        ("return (loss * mask).sum() /", "return loss.sum() /"),
        ("tokens = tokens.long().masked_fill(mask, model.mask_id)", "tokens = tokens.long()"),
        ('if getattr(model, "training", False):', "if False:"),
        ('with WithoutBf16() if self.recipe.precision == "float32"', "with WithoutBf16() if optimizer is None"),
        ("(logits / temperature).log_softmax(dim=-1)", "(logits / temperature).log_softmax(dim=0)"),
        (".masked_fill(~commits, model.mask_id)", ".masked_fill(commits, model.mask_id)"),
        ("share * count + ROUNDING", "share * max(at_start) + ROUNDING"),
        ("rank = ascending.argsort() -", "rank = ascending -"),
        ("(1 - state.step / state.steps) * gumbel", "(state.step / state.steps) * gumbel"),
        ("(ascending.cumsum(dim=1) > budget)", "(ascending > budget)"),
        ("masked_fill(most_uncertain, math.inf)", "masked_fill(most_uncertain, -math.inf)"),
        ("return choice | (most_certain & (chosen[image] == 0))", "return choice | most_certain"),
        ("not isinstance(value, (int, float) if kind is float else kind)", "value is None"),
        ("(low is None or value >= low)", "(low is None or value > low)"),
        ("len(value) != len(kinds)", "len(value) > len(kinds)"),
        ("step_seed(recipe.seed, run.step, rank)", "step_seed(0, run.step, rank)"),
        ("if self.written() > self.last_written + 2:", "if False:"),
        ("CHECKPOINT_SECONDS = 120", "CHECKPOINT_SECONDS = 300"),
        ('"loss_sum", "history")', '"history")'),
        ("now = asdict(self.recipe) | self.model.config", "now = dict(before)"),
        ("(self.model.parameters(), self.recipe.clip)", "(self.model.parameters(), math.inf)"),
        ("/ max(1, recipe.steps - recipe.warmup)", "/ max(1, recipe.steps)"),
        ("for part, state in zip([self.model, *self.optimizers], states, strict=True)",
         "for part, state in zip([self.model], states)"),
        ("counted[rows], count=counted.sum())", "counted[rows])"),
        ("os.replace(partial, path)", "path.write_bytes(partial.read_bytes())"),
        ("partial.unlink(missing_ok=True)", "pass"),
        ("map_location=device, weights_only=True)", "map_location=device, weights_only=False)"),
        ("sys.exit(2)", "sys.exit(1)"),
    ],
    "train_squares.py": [
        ("range(grid - side + 1), repeat=2)", "range(grid - side), repeat=2)"),
        ("white = (shown == WHITE)", "white = (shown != BLACK)"),
        ("agree = agreeing(prior, shown).float()", "agree = torch.ones(len(shown), len(prior))"),
        ("torch.randperm(length, generator=generator)", "torch.randperm(length)"),
        ("maskgit.step_seed(recipe.seed, -1 - epoch)", "maskgit.step_seed(0, -1 - epoch)"),
        ("tokens.masked_fill(mask, MASK_ID).split(1024)", "tokens.split(1024)"),
        ('"left half": x < middle', '"left half": y < middle'),
        ("return found[which], calls[which]", "return found[which * 0], calls[which]"),
        (".mean(dim=1)[which]", ".mean(dim=1)[which * 0]"),
        ("tokens=None, generator=", "generator="),
        ("tokens=None, generator=\"none\"", "tokens=None"),
        ("log_probs[state.row, state.place] = ", "log_probs[state.row, state.place] += "),
        ("(found - truth).abs().sum(dim=-1) + 1 - found.sum(dim=-1)", "(found - truth).abs().sum(dim=-1)"),
        ("posterior(self.prior, tokens)", "posterior(self.prior, tokens.clamp(max=WHITE))"),
        ("for _, mask in states])", "for _, mask in states[1:]])"),
    ],
    "train_rectangles.py": [
        ("(high - low >= MIN_SIDE)", "(high >= low)"),
        ("(high - low).clip(min=0)", "(high - low)"),
        ("covered[..., :, None, 1] * covered[..., None, :, 0]", "covered[..., :, None, 0] * covered[..., None, :, 1]"),
        ("seed = maskgit.step_seed(recipe.seed, step)", "seed = recipe.seed"),
        ("possible(proposal) & ((proposed == observed) | mask).all(axis=1)", "possible(proposal)"),
        ("torch.from_numpy(test.tokens).masked_fill(mask, model.mask_id)", "torch.from_numpy(test.tokens)"),
        ("points[..., 0] + PATCH / 2 < SIZE / 2", "points[..., 0] < SIZE / 2"),
    ],
    "benchmarks/remedies.py": [
        ("(covered == 0) | (covered == 1)", "(covered == 0)"),
        ("/ width).square())", "/ width))"),
    ],
    "benchmarks/reproduce.py": [
        ('isinstance(child, dict) and "seed" in child', "False"),
        ("(seed|out|json|weights)", "(out|json|weights)"),
        ("explained = 2 * (", "explained = 9 * ("),
        ("off = len(stored[path]) != len(new[path]) or", "off ="),
        ("[:12] != code[path]", "[:12] == code[path]"),
    ],
    "inpaint.py": [
        ("if digest in digests[part]:", "if part in digests[part]:"),
        ("patches.any(axis=-1)", "patches.all(axis=-1)"),
        ("left = 2 * torch.rand(", "left = torch.rand("),
        ("- 2 * shown @ centroids.T", "- shown @ centroids.T"),
        ("clip(min=LEAST_NOISE)", "clip(min=0)"),
        ("values = values.masked_fill(holes, 0)", "values = values.clone()"),
        ("F.avg_pool2d(values, 2) / visible.clamp(min=1 / 4)", "F.avg_pool2d(values, 2)"),
        ("far = far + convolution(F.gelu(far))", "far = convolution(F.gelu(far))"),
        ("noise * holes[..., None]", "noise"),
        ("nn.init.zeros_(self.last.weight)", "nn.init.ones_(self.last.weight)"),
        ("np.where(holes[..., None], filled, images)", "np.where(holes[..., None], images, filled)"),
        ("(pictures, pictures[:, :, ::-1])", "(pictures, pictures[:, ::-1])"),
        ("c1, c2 = 0.01**2, 0.03**2", "c1, c2 = 0.01, 0.03"),
        ("tokenizer.encode(paste(pixels, holes, np.float32(np.nan)))", "tokenizer.encode(pixels)"),
        ("filling, maskgit.step_seed(seed, start))", "filling, seed)"),
        ("logits.softmax(dim=-1) @ centroids", "logits.softmax(dim=-2) @ centroids"),
        ('"best_by": "validation"', '"best_by": None'),
        ("ImageOps.exif_transpose(image)", "image.copy()"),
        ("white_pixels) == invert", "white_pixels) != invert"),
        ("if one_sided or np.mean", "if np.mean"),
        ("zeros[0] < ones[0]", "zeros[0] > ones[0]"),
        ("if image.has_transparency_data and", "if False and"),
        ("if len(some | theirs) > 2", "if len(some) > 1"),
        ("without = {\"_\".join(filter(None, both)) for both in parts}", "without = {plain}"),
        ("if file.exists() and not overwrite:", "if file.exists() and overwrite:"),
        ("if file.resolve() in given:", "if file in given:"),
        ("rows.start]) for rows in batches]", "0]) for rows in batches[:1] * len(batches)]"),
        ("out / \"rows\" /", "out /"),
        ("together.update(digest)", "pass"),
    ],
    "extras/vqgan.py": [
        ("inpaint.membrane(pixels, pixels[:, :1].isnan())", "pixels.nan_to_num()"),
        ("inpaint.joined(*pictures, ", "sum(pictures) / 2 + 0 * ("),
        ("if trained != vqgan.sha256:", "if not trained:"),
        ('"filling" if arguments.transformer else "training"', '"training"'),
        ("nn.ZeroPad2d((0, 1, 0, 1))", "nn.ZeroPad2d((1, 0, 1, 0))"),
        ("return x + self.proj_out(", "return normed + self.proj_out("),
        ("self.tok_emb(tokens) + self.pos_emb)", "self.tok_emb(tokens))"),
        ("torch.cat([matrices[name] for name in theirs])", "torch.cat([matrices[name] for name in sorted(theirs)])"),
        ("return triples[0] if len(triples) == 1 else ()", "return triples[0] if triples else ()"),
        ("if part in where.split(\".\")} or found", "if where} or found"),
    ],
    "fid.py": [
        ("nn.BatchNorm2d(width, eps=0.001)", "nn.BatchNorm2d(width)"),
        ("count_include_pad=False", "count_include_pad=True"),
        ('map_location="cpu", weights_only=True))', 'map_location="cpu", weights_only=False))'),
        ("if not found.startswith(named[1]):", "if not found:"),
        ("np.square(root2).sum() - 2 * cross", "np.square(root2).sum() - cross"),
        ("np.sqrt(len(features) - 1)", "np.sqrt(len(features))"),
        ("len(images.features) == images.count", "len(images.features) <= images.count"),
        ("aa.sum() - np.trace(aa) + bb.sum() - np.trace(bb)", "aa.sum() + bb.sum()"),
        ("align_corners=False", "align_corners=True"),
        ("high > white / 100", "high > 0"),
        ("partial.touch(exist_ok=False)", "partial.touch()"),
        ("else shrink(image)", "else image"),
        ("sys.exit(2)", "sys.exit(1)"),
    ],
}  # fmt: skip


def require_fit(faults):
    """ValueError unless the piece of every fault is found once in its file."""
    found = [((ROOT / file).read_text().count(piece), file, piece) for file, piece, _ in faults]
    wrong = [f"{file} has {piece!r} {count} times" for count, file, piece in found if count != 1]
    if wrong:
        raise ValueError(f"a fault needs a piece of a line that is there once: {'; '.join(wrong)}")


def section_titles(source):
    """For each line of a file the title under the last banner before it."""
    titles = [""]
    for before, line in itertools.pairwise(source.splitlines()):
        titles.append(line.removeprefix("# ") if before.startswith("# -----") else titles[-1])
    return titles


def tests_of(file, piece):
    """The tests of the sections named after the file, or after its section in maskgit.py; and all the others."""
    source = (ROOT / file).read_text()
    tests = (ROOT / TESTS).read_text()
    section = section_titles(source)[source[: source.index(piece)].count("\n")]
    titles = section_titles(tests)
    own = []
    others = []
    for node in ast.parse(tests).body:
        if getattr(node, "name", "").startswith("test_"):
            title = titles[node.lineno - 1]
            touches = title == section if file == "maskgit.py" else title.startswith(file)
            (own if touches else others).append(f"{TESTS}::{node.name}")
    return own, others


def copy_of_project(folder):
    """The folder, with copies of benchmarks, extras, results and the files that git tracks beside this README."""
    for name in ("benchmarks", "extras", "results"):
        shutil.copytree(ROOT / name, folder / name)
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True).stdout
    for name in listed.splitlines():
        if "/" not in name:
            shutil.copy(ROOT / name, folder)
    return folder


def failing_test(copy, tests, limit):
    """The name of the first test that fails in a copy of the project, or that runs when `limit` seconds are over; None
    if all pass."""
    command = [sys.executable, "-u", "-m", "pytest", "-x", "-v", "--tb=no", "--disable-warnings"]
    command += ["-p", "no:cacheprovider", f"--basetemp={copy}_tests", *tests]
    with open(f"{copy}.log", "w") as log:
        process = subprocess.Popen(command, cwd=copy, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            failed = process.wait(limit) != 0
        except subprocess.TimeoutExpired:
            failed = True
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # and what the tests have started
                process.wait()
    shutil.rmtree(f"{copy}_tests", ignore_errors=True)  # some are large
    text = Path(f"{copy}.log").read_text()
    begun = re.findall(rf"^{TESTS}::(\w+)", text, re.MULTILINE)
    if not begun:
        raise ValueError(f"no test runs in the copy: {text.strip().splitlines()[-1:]}")
    return begun[-1] if failed else None


def try_fault(file, piece, replacement, folder, limit):
    """A row: the fault, whether it was caught, by which test, whether that is of its own section, and the seconds."""
    start = time.monotonic()
    own, others = tests_of(file, piece)
    faulty = copy_of_project(folder) / file
    faulty.write_text(faulty.read_text().replace(piece, replacement))
    by_own = failing_test(folder, own, limit) if own else None
    test = by_own or failing_test(folder, others, limit)
    row = dict(file=file, piece=piece, replacement=replacement, caught=bool(test), test=test, by_own=bool(by_own))
    return row | {"seconds": round(time.monotonic() - start, 1)}


def main():
    record = run_record()
    parser = CommandLine(__doc__)
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    parser.add_argument("--only", default="", metavar="TEXT", help="the faults whose file or text contains TEXT")
    parser.add_argument("--skip-check", action="store_true", help="do not run all tests without a fault first")
    parser.add_argument("--limit", type=at_least(60), default=900, help="seconds of one run of the tests")
    arguments = parser.parse_args()
    rows = []

    faults = [(file, *fault) for file, listed in FAULTS.items() for fault in listed]
    faults = [fault for fault in faults if any(arguments.only in text for text in fault)]
    if not faults:
        parser.error(f"no fault contains {arguments.only!r}")
    require_fit(faults)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        if not arguments.skip_check:
            undisturbed = copy_of_project(Path(scratch, "undisturbed"))
            if failed := failing_test(undisturbed, [TESTS], arguments.limit):
                raise ValueError(f"{failed} fails without a fault")
        for i, fault in enumerate(faults):
            rows.append(row := try_fault(*fault, Path(scratch, f"fault{i}"), arguments.limit))
            end = f"caught by {row['test']}" if row["caught"] else "SURVIVED"
            print(f"{fault[0]}: {fault[1]} -> {fault[2]}: {end} ({row['seconds']:.0f} s)", flush=True)
    write_figures(record, vars(arguments), {"faults": rows}, arguments.json)
    names = ("caught", "by_own", "seconds")
    table = []
    for file in dict.fromkeys(row["file"] for row in rows):
        of_file = [row for row in rows if row["file"] == file]
        table.append([file, str(len(of_file)), *(f"{sum(row[name] for row in of_file):.0f}" for name in names)])
    print_table(["faults in", "planted", "caught", "by own section", "seconds"], table)
    if not all(row["caught"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    run_as_script(main)
