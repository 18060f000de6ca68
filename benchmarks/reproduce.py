"""Makes figures again, and compares them: a JSON in results/ holds the command that wrote it.

    python benchmarks/reproduce.py --list                               which code made what, in how many minutes
    python benchmarks/reproduce.py inpaint_cats64 filling_cats64 --photographs DIR           these again, in order

The commands run in one new folder. Another kind of machine explains a figure that is off by twice its range over seeds,
of JSONs or of rows, or by a tenth where there is one seed. Times and memory are not compared.
"""

import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from maskgit import CommandLine, file_digest, named, print_table, run_as_script

ROOT = Path(__file__).resolve().parents[1]
NOT_COMPARED = re.compile("^speed|^waiting|second|peak_gb| (settings|code|minutes|seed)( |$)")


def figures(*nodes, path="", found=None):
    """{path: its numbers} in JSONs. Rows of a list that differ by their seed alone have the same path."""
    found = defaultdict(list) if found is None else found
    for node in nodes:
        if isinstance(node, int | float) and not NOT_COMPARED.search(path):
            found[path].append(node)
        for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            if isinstance(node, list) and isinstance(child, dict) and "seed" in child:
                key = " ".join(value for value in child.values() if isinstance(value, str))
            figures(child, path=f"{path} {key}", found=found)
    return found


def compare(name, records, again):
    """How many figures are off by more than is explained; all that are off are printed."""
    stored, new = figures(records[name], path=name), figures(again, path=name)
    recipes = {key: re.sub(r" --(seed|out|json|weights) \S+", "", each["command"]) for key, each in records.items()}
    seeds = figures(*(records[key] for key in records if recipes[key] == recipes[name]), path=name)
    table = []
    for path in sorted(path for path in stored.keys() | new.keys() if stored[path] != new[path]):
        means = [sum(numbers) / max(1, len(numbers)) for numbers in (stored[path], new[path])]
        explained = 2 * (max(seeds[path]) - min(seeds[path])) if len(seeds[path]) > 1 else abs(means[0]) / 10
        off = len(stored[path]) != len(new[path]) or abs(means[1] - means[0]) > explained
        table.append([path, *(f"{number:.5g}" for number in (*means, explained)), "TOO FAR" if off else ""])
    print_table([f"{len(stored)} figures, of which differ", "stored", "new", "explained", ""], table)
    return sum(row[-1] != "" for row in table)


def main():
    records = {path.stem: json.loads(path.read_text()) for path in sorted(ROOT.glob("results/*.json"))}
    parser = CommandLine(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="JSONs of results/, as --list names them")
    parser.add_argument("--list", action="store_true", help="show their commands")
    parser.add_argument("--photographs", type=named, default=Path("FOLDER"), help="for %(default)s in commands")
    arguments = parser.parse_args()
    if arguments.list == bool(arguments.names) or set(arguments.names) - records.keys():
        parser.error(f"either --list, or some of {', '.join(records)}")
    for name, record in records.items() if arguments.list else ():
        now = {path: file_digest(ROOT / path)[:12] for path in record["code"] if (ROOT / path).exists()}
        changed = [path for path, digest in record["code"].items() if now.get(path) != digest]
        print(name, record["commit"], record["minutes"], "min; changed:", *changed, f"\n  {record['command']}")
    with tempfile.TemporaryDirectory() as folder:
        too_far = 0
        for name in arguments.names:
            python = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT))}/"
            command = records[name]["command"].replace("python ", python, 1)
            command = command.replace(" FOLDER", f" {shlex.quote(str(arguments.photographs.resolve()))}")
            if subprocess.run(command, shell=True, cwd=folder).returncode:
                raise ValueError(f"{name} cannot be made again by {command}")
            too_far += compare(name, records, json.loads(Path(folder, "results", f"{name}.json").read_text()))
    sys.exit(f"{too_far} figures are too far off" if too_far else 0)


if __name__ == "__main__":
    run_as_script(main)
