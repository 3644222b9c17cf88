"""`savepoint sweep FILE`: exit code 1 if a trial failed; the same command tries it again."""

import argparse
import sys
from pathlib import Path
from typing import Any

from savepoint import preemption, sweep, words
from savepoint.commands import output
from savepoint.words import plural, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="such as configs/sweep/lr.yaml")
    parser.add_argument("--output_dir", metavar="DIR", default="outputs", help="default: outputs")


def main(arguments: argparse.Namespace) -> int:
    preemption.install()
    progress = sys.stderr if arguments.json else sys.stdout
    try:
        results = sweep.run(
            arguments.file,
            arguments.output_dir,
            lambda line: print(line, file=progress, flush=True),
        )
    except preemption.Preempted as stopped:
        print(f"Stopped by {stopped.name}. The same command goes on.", file=sys.stderr)
        raise
    if arguments.json:
        output.put_json(results)
    else:
        output.put(_text(results))
    return 1 if results["failed"] else 0


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
