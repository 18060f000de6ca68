"""Computes numbers again, and compares them: a JSON in results/ holds the command that wrote it.

    python benchmarks/reproduce.py --list                        all of them: commit, minutes, which code has changed
    python benchmarks/reproduce.py inpaint_cats64 filling_cats64 --photographs DIR           these again, in order

The commands run in one new folder; one with --resume, which scored a finished run anew, trains it first. Another kind
of machine explains a figure that is off by twice its range over seeds, of JSONs or of rows, or by a tenth where there
is one seed. Times are not compared.
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
from maskgit import CommandLine, InputError, print_table, run_as_script

ROOT = Path(__file__).resolve().parents[1]
NOT_COMPARED = re.compile("^speed|second| (settings|changed|minutes|seed)( |$)")


def changed_code(record):
    """The scripts that differ from those of the commit at which the figures were made."""
    script = re.search(r"python (\S+)", record["command"])[1]
    command = ["git", "-C", ROOT, "diff", "--name-only", record["commit"], "--", ":(glob)*.py", ":!test_*", script]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.split() if found.returncode == 0 else ["(git cannot say)"]


def figures(records, path):
    """{path: its numbers} in JSONs. Rows of a list that differ by their seed alone have the same path."""
    found = defaultdict(list)

    def collect(node, path):
        if isinstance(node, dict):
            for key, child in node.items():
                collect(child, f"{path} {key}")
        elif isinstance(node, list):
            for key, child in enumerate(node):
                if isinstance(child, dict) and "seed" in child:
                    key = " ".join(value for value in child.values() if isinstance(value, str))
                collect(child, f"{path} {key}")
        elif isinstance(node, int | float) and not NOT_COMPARED.search(path):
            found[path].append(node)

    for record in records:
        collect(record, path)
    return found


def compare(name, records, again):
    """How many figures are off by more than is explained; all that are off are printed."""
    stored = figures([records[name]], name)
    new = figures([again], name)
    recipes = {key: re.sub(r" --(seed|out|json|weights) \S+", "", each["command"]) for key, each in records.items()}
    seeds = figures([records[key] for key in records if recipes[key] == recipes[name]], name)
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
    parser.add_argument("--photographs", type=Path, default=Path("FOLDER"), help="for %(default)s in commands")
    arguments = parser.parse_args()
    if arguments.list == bool(arguments.names) or set(arguments.names) - records.keys():
        parser.error(f"either --list, or some of {', '.join(records)}")
    if arguments.list:
        for name, record in records.items():
            commit = f"{record['commit']} and changes" if record.get("changed") else record["commit"]
            print(
                f"{name}, {record['minutes']} min at {commit}; changed since:", *(changed_code(record) or ["nothing"])
            )
            print(f"  {record['command']}")
        return
    too_far = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.names:
            python = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT))}/"
            command = records[name]["command"].replace("python ", python, 1).replace(" --resume", "")
            command = command.replace(" FOLDER", f" {shlex.quote(str(arguments.photographs.resolve()))}")
            if subprocess.run(command, shell=True, cwd=folder).returncode:
                raise InputError(f"{name} cannot be made again by {command}")
            too_far += compare(name, records, json.loads(Path(folder, "results", f"{name}.json").read_text()))
    sys.exit(f"{too_far} figures are too far off" if too_far else 0)


if __name__ == "__main__":
    run_as_script(main)
