"""`savepoint sweep FILE`, or with flags that have several values: exit code 1 if a trial failed.
The same command tries it again.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from savepoint import preemption, sweep, sweep_file, words
from savepoint.commands import output
from savepoint.errors import ConfigError
from savepoint.sweep_file import Sweep
from savepoint.words import plural, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "savepoint sweep (FILE | --KEY VALUE,VALUE...) [--output_dir DIR] [--json]"
    parser.epilog = (
        "FILE is one such as configs/sweep/lr.yaml. --KEY VALUE,VALUE stands for any key of the "
        "config, as for train.py: --config configs/fast.yaml --model.lr 0.01,0.003 tries both, "
        "and each with each of another key. One value holds for every trial."
    )
    parser.set_defaults(words=[])
    parser.add_argument("--output_dir", metavar="DIR", default="outputs", help="default: outputs")


def main(arguments: argparse.Namespace) -> int:
    preemption.install()
    progress = sys.stderr if arguments.json else sys.stdout
    try:
        asked, name = _asked(arguments.words)
        results = sweep.run(
            asked, name, arguments.output_dir, lambda line: print(line, file=progress, flush=True)
        )
    except preemption.Preempted as stopped:
        print(f"Stopped by {stopped.name}. The same command goes on.", file=sys.stderr)
        raise
    if arguments.json:
        output.put_json(results)
    else:
        output.put(_text(results))
    return 1 if results["failed"] else 0


def _asked(given: Sequence[str]) -> tuple[Sweep, str]:
    """What to try, and the name of the sweep."""
    sweep.require_optuna()
    if not given or given[0].startswith("-"):
        return sweep_file.of_flags(given)
    if len(given) > 1:
        raise ConfigError(
            f"A sweep file and more: {given[0]} {given[1]}. The file says what is tried "
            "(`parameters`) and what is the same in every trial (`overrides`). Write it there, or "
            "give flags alone."
        )
    return sweep_file.read(Path(given[0])), Path(given[0]).stem


def _text(results: dict[str, Any]) -> str:
    best = results["trials"][0]
    rows = []
    for trial in results["trials"]:
        values = map(sweep.short, trial["parameters"].values())
        rows.append((trial["trial"], *values, words.number(trial["value"]), trial["state"]))
    lines = [words.table(("trial", *best["parameters"], results["monitor"], "state"), rows)]
    if best["state"] == "complete":
        flags = [f"--{key} {sweep.short(value)}" for key, value in best["parameters"].items()]
        score = f"{results['monitor']} {words.number(best['value'])}"
        lines.append(f"best: {best['trial']}, {score}: {' '.join(flags)}")
        lines.append(f"plot: {show(results['plot'])}")
    if results["failed"]:
        logs = f"{show(results['directory'])}/trial-*.log"
        failed = plural(results["failed"], "trial")
        lines.append(f"{failed} failed: see {logs}. The same command tries again.")
    return "\n".join(lines)
