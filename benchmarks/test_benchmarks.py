"""Tests of the benchmarks on a small scale, of reproduce.py, and of the figures in README.md.

python -m pytest benchmarks/test_benchmarks.py
"""

import functools
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, which has a fid.py of its own
import inpaint
import maskgit
import train_rectangles
import train_squares
from benchmarks import ablation, filling, remedies, reproduce, samplers

from test_maskgit import SMALL, SQUARES, TINY, TINY_CATS, call, committed_first, decode_from_nothing, readme_examples

ROOT = Path(__file__).resolve().parents[1]


def result(name, folder=ROOT / "results"):
    return json.loads(Path(folder, f"{name}.json").read_text())


def test_samplers_of_the_literature_by_hand():
    # Entropies of 0.673, 0.0079, 0.611, 0.0010 and 0.500 nats.
    probabilities = [[0.6, 0.4], [0.999, 0.001], [0.3, 0.7], [0.0001, 0.9999], [0.2, 0.8]]
    for order, committed in {
        samplers.each_below: [[0, 1, 3], [2], [4]],
        samplers.entropy_bounded: [[1, 3, 4], [2], [0]],
        samplers.margin: [[3], [1], [4], [2], [0]],
        samplers.threshold: [[1, 3], [4], [2], [0]],
        functools.partial(samplers.threshold, probability=0.75): [[1, 3, 4], [2], [0]],
        samplers.Klass(): [[3], [1], [4], [2], [0]],  # at first nothing is known to be stable
    }.items():
        for _ in range(2):  # what it remembers of one decoding is not known in the next
            assert committed_first(order, probabilities) == committed
    trace = []
    a, b = (sum(p ** (1 + 1 / 2.25) for p in pair) for pair in ((0.9, 0.1), (0.5, 0.5)))
    decode_from_nothing([[0.9, 0.1], [0.5, 0.5]], 20000, order=samplers.moment, steps=2, trace=trace)
    assert (~trace[0][1]).float().mean(dim=0).tolist() == pytest.approx([a / (a + b), b / (a + b)], abs=0.015)


def test_halton_visits_the_quarters_in_turn():
    coords = maskgit.grid_coords(8, 8)
    options = {"coords": coords, "steps": 64, "schedule": "linear"}
    orders = samplers.Halton(), samplers.Halton(rolled=True)
    visited, rolled = (sum(committed_first(order, [[0.5, 0.5]] * 64, **options), []) for order in orders)
    assert sorted(visited) == list(range(64))
    # By hand: radical inverses (0, 0), (1/2, 1/3), (1/4, 2/3), (3/4, 1/9) of a 7 x 7 box.
    assert coords[visited[:4]].tolist() in ([[0, 0], [x, 2], [2, 5], [5, 1]] for x in (3, 4))
    assert rolled != visited and rolled in [visited[start:] + visited[:start] for start in range(64)]


def test_a_grid_is_explained_by_its_rectangle_alone():
    tokenizer = train_rectangles.fit_tokenizer(0)
    images = train_rectangles.paint_rectangles(train_rectangles.draw_rectangles(6, 1, "grid"))
    tokens = tokenizer.encode(images).reshape(6, 169)
    broken = tokens.copy()
    broken[:, 80] = (broken[:, 80] + 1) % 20
    assert samplers.explained(tokens, tokenizer).mean() > 0.8 and not samplers.explained(broken, tokenizer, 300).any()


def test_the_mean_of_eight_turns_turns_with_the_image():
    """Of a model that does not; and that of one image is the mean of eight answers."""
    torch.manual_seed(0)
    model = maskgit.MaskGIT(2, dim=16, heads=2, layers=2).requires_grad_(False)
    tokens = torch.randint(3, (5, 4, 4))
    answers = {"mean": [], "single": []}
    for quarters, transposed in itertools.product(range(4), (False, True)):
        turned = (tokens.transpose(1, 2) if transposed else tokens).rot90(quarters, (1, 2)).flatten(1)
        for name, each in (("mean", samplers.TurnedModel(model)), ("single", model)):
            found = each(turned, maskgit.grid_coords(4, 4)).softmax(dim=-1).view(5, 4, 4, 2).rot90(-quarters, (1, 2))
            answers[name].append(found.transpose(1, 2) if transposed else found)
    mean, single = map(torch.stack, answers.values())
    torch.testing.assert_close(mean, single.mean(dim=0).expand_as(mean))
    assert not torch.allclose(single[2], single[0])


def test_orders_on_both_fields(tmp_path, monkeypatch):
    """All of them, and README's own alone."""
    small = {"ORDERS": {name: samplers.ORDERS[name] for name in ("entropy", "random")}, "SQUARES_STEPS": (2, 16)}
    small |= {"GRID_STEPS": (2, 4), "GRID_DRAWS": 4, "GRID_PROPOSALS": 10}
    small |= {"explained": functools.partial(samplers.explained, proposals=20)}
    for name, value in small.items():
        monkeypatch.setattr(samplers, name, value)
    monkeypatch.chdir(tmp_path)
    assert call(train_squares, *TINY, "--steps", 2) == call(train_rectangles, *SMALL) == 0
    Path("ask.py").write_text(readme_examples()[1])
    command = re.search(r"python benchmarks/samplers.py (ask.py)", (ROOT / "README.md").read_text())[1].split()
    assert call(samplers, "--checkpoint", "runs/squares/model.pt", "--json", "found.json") == 0
    rows = result("found", ".")["completions"]
    assert len(rows) == len({(row["given"], row["order"], row["setting"]) for row in rows}) == 2 * (5 + 2) + 1
    for file, orders in (([], 5 + 2), (command, 2)):
        assert call(samplers, *file, "--grid", "--json", "found.json") == 0
        rows = result("found", ".")["rows"]
        assert len(rows) == len({(row["hidden"], row["order"], row["setting"]) for row in rows}) == 2 * (1 + orders)
        assert all(0 <= row["explained"] <= 1 and row["calls"] <= 4 for row in rows)


def test_readme_shows_what_its_order_scores(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(samplers, "SQUARES_STEPS", (64,))
    (tmp_path / "ask.py").write_text(readme_examples()[1])
    assert call(samplers, tmp_path / "ask.py") == 0
    shown = re.search("(completions .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    rows, printed = ([line.split() for line in text.splitlines()] for text in (shown, capsys.readouterr().out))
    assert len(rows) == 3 and all(row in printed for row in rows)
    assert [row[0] for row in printed[1:-1]] == ["entropy"] * 5 + ["ask"] + ["confidence"] * 5


def test_files_without_orders_are_refused(tmp_path, capsys):
    for text in ("in the way", "A = 1", "ORDERS = {}\nEXACT = {'mine'}"):
        (tmp_path / "file.py").write_text(text)
        assert call(samplers, tmp_path / "file.py") == 2
        assert re.fullmatch("error: .*/file.py .*(no dict|in EXACT, but not in) ORDERS.*\n", capsys.readouterr().err)


def test_the_ablation_on_a_small_scale(tmp_path, monkeypatch):
    """Each variant repairs what its name says; and no pair of similarities in [-1, 1] beats the cosine head's limit."""
    monkeypatch.setattr(train_squares, "VALIDATION_COUNT", 16)
    monkeypatch.setattr(ablation, "TEST_COUNT", 16)
    variants = ablation.variants()
    changed = {name: sum(ablation.S1_RECIPE[key] != value for key, value in v.items()) for name, v in variants.items()}
    assert changed["S1"] == 0 and changed["S1 + temperature"] == changed["S1 + linear head"] == 1
    assert changed["all repairs"] == 4 and changed["all but pre-norm, warm-up"] == 2
    white = train_squares.test_set(SQUARES, "cosine", 200, train_squares.TEST_SEED)[2]
    difference = torch.linspace(-2, 2, 401)[:, None]
    best = (white * F.softplus(-difference) + (1 - white) * F.softplus(difference)).amin(dim=0).mean().item()
    assert ablation.cosine_head_limit(SQUARES, "cosine", 200) == pytest.approx(best, abs=1e-4)
    monkeypatch.setattr(ablation, "ALIKE", ablation.ALIKE | dict(dim=8, hidden=32, layers=1, batch_size=9))
    assert call(ablation, "--steps", 2, "--json", tmp_path / "found.json") == 0
    assert len(result("found", tmp_path)["runs"]) == 3 * 9


def test_points_near_edges_and_without_corners():
    rng = np.random.default_rng(0)
    rectangles = train_rectangles.draw_rectangles(300, rng, "sparse")
    draws = [remedies.points_without(wrong) for wrong in (remedies.off_edges, remedies.on_corners)]
    edges, cornerless = (draw("sparse", rectangles, 8, rng) for draw in draws)
    mixed = np.abs(train_rectangles.coverage(rectangles, edges).mean(axis=-1) - 0.5) < 0.5  # neither 0 nor 1
    assert mixed[:, ::2].mean() > 0.99 and mixed[:, 1::2].mean() < 0.7
    for (x0, y0, x1, y1), points in zip(rectangles, cornerless, strict=True):
        for (x, y), corner_x, corner_y in itertools.product(points, (x0, x1), (y0, y1)):
            assert not (x < corner_x < x + 4 and y < corner_y < y + 4)
    assert np.minimum(edges, cornerless).min() >= 0 and np.maximum(edges, cornerless).max() <= 12


def test_soft_targets_weigh_codes_by_distance():
    centroids = np.array([0.0, 0.3, 2.0])
    weights = np.exp(-(((centroids[:, None] - centroids) / 0.5) ** 2))
    targets = remedies.soft_targets(maskgit.PatchTokenizer(centroids[:, None], patch=1), 0.5)
    np.testing.assert_allclose(targets, weights / weights.sum(axis=1, keepdims=True), atol=1e-6)
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 3)
    tokens = torch.randint(3, (2, 4))
    mask = maskgit.random_mask((2, 4), 0.5)
    loss = remedies.soft_cross_entropy(targets)(logits, tokens, mask, count=7)
    by_hand = -sum(targets[tokens[b, t]] @ logits[b, t].log_softmax(dim=-1) for b, t in mask.nonzero().tolist()) / 7
    torch.testing.assert_close(loss, by_hand)


def test_remedies_on_a_small_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(remedies, "RECIPE", remedies.RECIPE | dict(dim=16, batch_size=8, layers=1))
    monkeypatch.setattr(train_rectangles, "VALIDATION_COUNT", {"sparse": 20})
    tokenizer = train_rectangles.fit_tokenizer(0)
    monkeypatch.setattr(train_rectangles, "fit_tokenizer", lambda seed: tokenizer)
    small = ["--steps", 2, "--test-images", 8, "--proposals", 10]
    assert call(remedies, *small, "--json", tmp_path / "found.json") == 0
    runs = result("found", tmp_path)["runs"]
    assert len(runs) == len({(row["variant"], row["seed"]) for row in runs}) == 2 * 4 * 3
    assert len({tuple(row["curve"]) for row in runs if row["seed"] == 0}) == 8  # each trains in a way of its own


def test_ways_to_fill_are_judged(tmp_path, capsys):
    """By error and by realism; the true tokens are the best by both. Other pictures than the model's are refused."""
    data = ["--data", tmp_path / "cats"]
    data[1].mkdir()
    for i, cat in enumerate(inpaint.cartoon_cats(150, 16)):
        Image.fromarray(cat).save(data[1] / f"{i}.png")
    assert call(inpaint, *TINY_CATS, *data, "--out", tmp_path / "run") == 0
    options = ["--checkpoint", tmp_path / "run" / "model.pt", "--ways", "likeliest", "reports", "--holes", "box"]
    options += ["--observer-steps", 9, "--shapes", "--json", tmp_path / "found.json"]
    assert call(filling, *options) == 2 and "trained on other pictures" in capsys.readouterr().err
    assert call(filling, *options, *data) == 0
    rows = {row["way"]: row for row in result("found", tmp_path)["rows"]}
    studied = [f"reports {schedule}, T={t}" for schedule in ("linear", "cosine", "square") for t in (1, 4, 8, 10, 20)]
    assert [*rows] == ["true tokens, no grain", "true tokens", "likeliest, no grain", "likeliest", *studied]
    assert Image.open(tmp_path / "found.png").size[0] > 8 * 128
    for name, sign in {"psnr": -1, "frechet": 1}.items():
        limit, _, *others = (sign * row[name] for row in rows.values())
        assert limit < min(others)
    shapes = ["4:3 around one", "4:3 around one, squashed", "4:3 inside one", "4:3 inside one, squashed"]
    assert [*result("found", tmp_path)["shapes"]] == ["2:1", "one by one", *shapes]
    larger = ["--size", 20, "--ways", "likeliest", "--json", tmp_path / "larger.json"]
    assert call(filling, *options, *data, *larger) == 0
    assert [row["way"] for row in result("larger", tmp_path)["rows"]] == ["likeliest, no grain", "likeliest"]


@pytest.mark.parametrize("script, name", [(samplers, "samplers_squares"), (ablation, "squares_ablation")])
def test_pictures_are_drawn_from_a_json(script, name, tmp_path):
    """They are those that README.md and the notebook show, and its figures stay."""
    pytest.importorskip("matplotlib")
    shutil.copy(ROOT / "results" / f"{name}.json", tmp_path)
    assert call(script, "--draw", tmp_path / f"{name}.json") == 0
    drawn, shown = (np.asarray(Image.open(Path(folder, f"{name}.png"))) for folder in (tmp_path, ROOT / "results"))
    assert drawn.shape == shown.shape and np.abs(drawn.astype(int) - shown).mean() < 2  # of 255: fonts may differ
    assert result(name, tmp_path) == result(name)


TOY = """
import sys
from pathlib import Path
from maskgit import run_record, write_figures
write_figures(run_record(), {}, {"figure": 0.5}, Path(sys.argv[2]))
"""
AGAIN = """import os; os.mkdir("results"); print('{"figure": 0.5}', file=open("results/a.json", "w"))"""


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_figures_made_again(tmp_path, monkeypatch, capfd):
    """In a project in "a folder": the same figure or another, by a script that has changed."""
    project = tmp_path / "a folder"
    project.mkdir()
    shutil.copy(ROOT / "maskgit.py", project)
    script = project / "toy.py"
    script.write_text(TOY)
    for command in ("init -q", "add .", "-c user.name=n -c user.email=e commit -q -m toy"):
        subprocess.run(["git", *command.split()], cwd=project, check=True)
    monkeypatch.setattr(reproduce, "ROOT", project)
    with monkeypatch.context() as patch:
        patch.setenv("ATEN_CPU_CAPABILITY", "default")
        subprocess.run([sys.executable, "toy.py", "--json", "results/a.json"], cwd=project, check=True)
    record = result("a", project / "results")
    command = "ATEN_CPU_CAPABILITY=default python toy.py --json results/a.json"
    assert record["command"] == command and 0 <= record["minutes"] < 1
    listed = f"a, {record['minutes']} min at {record['commit']}; changed since: {{}}\n  {command}\n"
    assert call(reproduce, "--list") == 0 and capfd.readouterr().out == listed.format("nothing")
    script.write_text(AGAIN)
    assert call(reproduce, "a") == 0 and "TOO FAR" not in capfd.readouterr().out
    script.write_text(AGAIN.replace("0.5", "0.6"))
    assert call(reproduce, "a") == "1 figures are too far off"
    assert re.search("1 figures.*\na figure +0.5 +0.6 +0.05 +TOO FAR", capfd.readouterr().out)
    assert call(reproduce, "--list") == 0 and capfd.readouterr().out == listed.format("toy.py")
    for wrong in (["b"], [], ["--list", "a"]):
        assert call(reproduce, *wrong) == 2
        assert capfd.readouterr().err == "error: either --list, or some of a (see --help)\n"


def test_what_seeds_explain(capsys):
    """Twice the range of JSONs, or rows, that differ by the seed alone; else a tenth; nothing one missing."""

    def record(seed, figure, *psnr, other="a.py", **more):
        command = f"python {other} --seed {seed} --json {seed}.json"
        rows = [{"name": "x", "seed": i, "psnr": each} for i, each in enumerate(psnr)]
        return {"command": command, "settings": {"n": seed}, "kl": figure, "rows": rows} | more

    stored = record(0, 1.0, 10.0, 20.0)
    others = {"a": stored, "b": record(1, 1.2), "c": record(2, 7.0, other="b.py")}
    for numbers, too_far in {(1.39, 10, 20): 0, (1.41, 10, 20): 1, (1, 34, 34): 0, (1, 36, 36): 1, (1, 10): 1}.items():
        assert reproduce.compare("a", others, record(0, *numbers)) == too_far
        assert capsys.readouterr().out.count("TOO FAR") == too_far
    assert reproduce.compare("a", others, record(0, 1.41, 20, 10, tv=1)) == 2
    for name, figure, too_far in (("a", 1.09, 0), ("a", 1.11, 1), ("speed", 1.11, 0)):
        assert reproduce.compare(name, {name: stored}, record(0, figure, 10.0, 20.0)) == too_far


def test_each_json_is_what_its_command_writes():
    for file in (ROOT / "results").glob("*.json"):
        record = result(file.stem)
        command = record["command"]
        assert f" --json results/{file.name}" in command and "--force" not in command
        assert record["minutes"] > 0 and (ROOT / re.search(r"python (\S+)", command)[1]).exists()


def percent(share, digits=2):
    return f"{100 * share:.{digits}f} %"


def test_figures_of_the_readme():
    """Each sentence and row as its JSONs give it."""
    readme = " ".join((ROOT / "README.md").read_text().split())
    squares = [result(f"squares{seed}") for seed in ("", "_seed1", "_seed2", "_seed3", "_seed4")]
    entropy, paper = (squares[0]["completions"][i]["model"] for i in (0, -1))
    new, old = (sum(run["seconds"].values()) / 60 for run in (squares[0], result("squares_avx2")))
    task = squares[0]["tasks"]["cosine"]
    kl, loss, limit = f"{task['kl']:.5f}", f"{task['cross_entropy']:.4f}", f"{task['limit']:.4f}"
    divergences = [run["tasks"]["cosine"]["kl"] for run in squares]
    runs = result("squares_ablation")["runs"]
    names = "S1", "S1 + positions"
    before, after = (np.mean([run["accuracy"] for run in runs if run["variant"] == name]) for name in names)
    sparse = result("rectangles_sparse")["scores"]["unseen rectangles"]
    fewer = [result(f"inpaint_cats64_{count}")["scores"]["thick"]["dB, test"] for count in (500, 2000, 7001)]
    said = [
        f"A run of {new:.1f} minutes (two CPU cores) ends {percent(task['kl'] / task['limit'], 1)} above it",
        f"else in {new:.1f} minutes on two CPU cores with bf16 (short numbers that newer processors multiply fast)",
        f"multiply fast), in {old:.1f} on two older ones",
        f"{percent(entropy['valid'], 0)} of the toy's images are valid squares after {entropy['calls']:.0f} calls",
        f"as in the paper, {percent(paper['valid'], 0)} after {paper['calls']:.0f}",
        f"masking {kl} {loss} {limit} {task['accuracy']:.2%} {task['posterior_accuracy']:.2%} S1: does not seem",
        f"posterior has {limit} nats per hidden pixel, and we reach {loss}",
        f"KL of five seeds: {min(divergences):.4f} to {max(divergences):.4f}",
        f"{percent(after, 1)} of the pixels are right instead of {percent(before, 1)}",
        f"at most 64 calls (by default 20: {percent(entropy['valid'], 1)}) |",
        f"gets {percent(sparse['accuracy'])} of the hidden tokens right",
        f"right, the posterior {percent(sparse['posterior_accuracy'])}",
        f"holes in them, in {result('inpaint')['seconds']['trained'] / 60:.0f} minutes on one",
        "give {:.1f}, {:.1f} and {:.1f} dB".format(*fewer),
    ]
    completions = [row for row in result("samplers_squares")["completions"] if row["given"] == "nothing"]
    orders = {(row["order"], row["setting"]): row for row in completions}
    for words, order, setting in (
        ("`entropy`", "entropy", "budget 0.001"),
        ("[the paper's](https://arxiv.org/abs/2202.04200)", "confidence", "16 steps"),
        ("`random`", "random", "16 steps"),
        ("evenly spread over the image", "halton", "16 steps"),
        ("a code of probability 0.95 or more", "threshold", "probability 0.95"),
        ("likewise 0.99, and little changed since the last call", "KLASS", "probability 0.99"),
    ):
        exact, model = (orders[order, setting][name] for name in ("exact", "model"))
        cells = f"{percent(exact['valid'], 1)} | {percent(model['valid'], 1)}"
        row = re.search(rf"{re.escape(words)} \| {re.escape(cells)}[^|]* \| ([\d.]+) \|", readme)
        assert row and row[1] == f"{model['calls']:.1f}", words
    ways = {"OpenCV, Telea": "", "OpenCV, Navier-Stokes": "OpenCV's best, Navier-Stokes", "OpenCV, shift map": ""}
    ways |= {"as set, no grain": "the model, without grain", "as set": "the model"}
    ways |= {"true tokens": "the best that these tokens allow"}
    runs = [result(f"filling_{name}")["rows"] for name in ("cats", "cats64")]
    distances = {}
    for way, words in ways.items():
        rows = [[row for row in run if row["way"] == way and row["holes"] == "thick"] for run in runs]
        means = [np.mean([[row["psnr"], row["frechet"]] for row in each], axis=0) for each in rows]
        distances[way] = means[1][1]
        said += [" | ".join([words, *("{:.1f} | {:.3f}".format(*each) for each in means)])] if words else []
    opencv = min(distance for way, distance in distances.items() if "OpenCV" in way)
    said.append(f"from real ones (0 is best), at 64x64: {distances['as set']:.2f}; OpenCV: {opencv:.2f} or more")
    for script, lines in re.findall(r"`(\w+\.py)` \(([\d,]+)(?: lines)?\)", readme):
        assert abs(len((ROOT / script).read_text().splitlines()) / int(lines.replace(",", "")) - 1) < 0.02
    assert [each for each in said if each not in readme] == []
