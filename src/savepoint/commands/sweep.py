"""`savepoint sweep FILE`: exit code 1 if a trial failed; the same command tries that one again."""

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
        told = sweep.run(
            arguments.file,
            arguments.output_dir,
            lambda line: print(line, file=progress, flush=True),
        )
    except preemption.Preempted as stopped:
        print(f"Stopped by {stopped.name}. The same command goes on.", file=sys.stderr)
        raise
    if arguments.json:
        output.put_json(told)
    else:
        output.put(_text(told))
    return 1 if told["failed"] else 0


def _text(told: dict[str, Any]) -> str:
    keys = list(told["trials"][0]["parameters"])
    rows = [
        (
            one["trial"],
            *map(sweep.short, one["parameters"].values()),
            words.number(one["value"]),
            one["state"],
        )
        for one in told["trials"]
    ]
    lines = [words.table(("trial", *keys, told["monitor"], "state"), rows)]
    best = told["trials"][0]
    if best["state"] == "complete":
        flags = " ".join(
            f"--{key} {sweep.short(value)}" for key, value in best["parameters"].items()
        )
        lines.append(
            f"best: {best['trial']}, {told['monitor']} {words.number(best['value'])}: {flags}"
        )
        lines.append(f"plot: {show(told['plot'])}")
    if told["failed"]:
        logs = f"{show(told['directory'])}/trial-*.log"
        lines.append(
            f"{plural(told['failed'], 'trial')} failed: see {logs}. The same command tries again."
        )
    return "\n".join(lines)
