"""Time and memory of the reports' VQGAN and transformer: encode, decode, and fill in 10 steps.

    python benchmarks/vqgan.py --json results/vqgan.json
    python benchmarks/vqgan.py --vqgan VQGAN.pt --transformer best_val.pth --json figures.json

Without files the weights are random, which changes neither time nor memory. Every measurement is a process of its own,
so that its memory can be told: the peak, with the weights and what torch itself takes. Then the share of visible tokens
that differ from those of the whole picture, once with grey holes, as the reports encode them, and once with a membrane
in the holes, as extras/vqgan.py does: only real weights can say which is better.
"""

import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import inpaint
from extras import vqgan
from maskgit import CommandLine, at_least, pick_device, print_table, run_as_script, run_record, write_figures

FILLING = inpaint.Filling(decode_steps=10, evidence=False)


def random_file(path, network):
    torch.manual_seed(0)
    weights = network().state_dict()
    torch.save({name.replace("Attention.out", "Attention.proj"): tensor for name, tensor in weights.items()}, path)
    return path


def measure(what, count, tokenizer_file, transformer_file):
    """A row: seconds per picture, the best of three, and the peak of this process in GB."""
    tokenizer = vqgan.load_vqgan(tokenizer_file, pick_device(), "filling")
    images, holes = inpaint.with_holes(inpaint.cartoon_cats(count, 64), "brush", seed=0)
    tokens = np.random.default_rng(0).integers(1024, size=(count, 16, 16))
    if what == "fill":
        checkpoint = {"model": vqgan.load_transformer(transformer_file, pick_device())}
        checkpoint |= {"tokenizer": tokenizer, "painter": tokenizer}
    times = []
    for _ in range(3):
        start = time.perf_counter()
        if what == "encode":
            tokenizer.encode(images / np.float32(255))
        elif what == "decode":
            tokenizer.decode(tokens)
        else:
            inpaint.fill(checkpoint, images, holes, FILLING)
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"what": what, "pictures": count, "seconds_per_picture": min(times) / count, "peak_gb": peak}


def changed_tokens(count, tokenizer_file):
    """{what is in the holes: share of the visible tokens that differ from those of the whole picture}."""
    tokenizer = vqgan.load_vqgan(tokenizer_file, pick_device(), "filling")
    images, holes = inpaint.with_holes(inpaint.cartoon_cats(count, 64), "brush", seed=0)
    visible = ~holes.reshape(count, 16, 4, 16, 4).any(axis=(2, 4))
    pixels = images / np.float32(255)
    covers = {"grey": inpaint.GREY / 255, "membrane": np.nan}  # encode covers nan by one
    whole = tokenizer.encode(pixels)
    views = {name: inpaint.paste(pixels, holes, np.float32(cover)) for name, cover in covers.items()}
    return {name: float((tokenizer.encode(view) != whole)[visible].mean()) for name, view in views.items()}


def main():
    record = run_record()
    parser = CommandLine(__doc__)
    parser.add_argument("--vqgan", type=Path, help="default: random weights")
    parser.add_argument("--transformer", type=Path, help="default: random weights")
    parser.add_argument("--pictures", type=at_least(1), nargs="+", default=[1, 8], help="default %(default)s")
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    arguments = parser.parse_args()
    rows = []
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes,
    ):
        tokenizer = arguments.vqgan or random_file(Path(folder, "VQGAN.pt"), vqgan.VQGAN)
        transformer = arguments.transformer or random_file(Path(folder, "best.pth"), vqgan.ReportTransformer)
        for what in ("encode", "decode", "fill"):
            for count in arguments.pictures:
                rows.append(processes.submit(measure, what, count, tokenizer, transformer).result())
        changed = processes.submit(changed_tokens, max(arguments.pictures), tokenizer).result()
    figures = {"threads": torch.get_num_threads(), "rows": rows, "changed": changed}
    write_figures(record, vars(arguments), figures, arguments.json)
    table = [[r["what"], str(r["pictures"]), f"{r['seconds_per_picture']:.2f}", f"{r['peak_gb']:.2f}"] for r in rows]
    print_table(["work", "pictures", "seconds per picture", "peak, GB"], table)
    print("visible tokens that change:", ", ".join(f"{name} {share:.1%}" for name, share in changed.items()))


if __name__ == "__main__":
    run_as_script(main)
