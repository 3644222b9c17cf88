"""`savepoint watch [OUTPUT_DIR]`: all runs of a directory, live in the terminal.

Files alone are read, and none of the runs knows of it.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from savepoint import files, find, tail, words
from savepoint.checkpoint.store import Checkpoint
from savepoint.commands import ls, output
from savepoint.run import Run

if TYPE_CHECKING:
    from rich.table import Table

HEAD = ("run", "state", "step", "steps/s", "left", "checkpoint", "best", "last", "room for")
GONE = "gone"
"""The state of a run whose process ended without a word: killed, or with an error."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    directory = "a directory of runs; default: outputs/"
    parser.add_argument("directory", metavar="OUTPUT_DIR", nargs="?", help=directory)
    once = "print one look and end, as where the output is no terminal"
    parser.add_argument("--once", action="store_true", help=once)
    secs = "seconds between two looks (2)"
    parser.add_argument("--every", metavar="SECS", type=float, default=2.0, help=secs)


def main(arguments: argparse.Namespace) -> int:
    directory = ls.directory(arguments.directory)
    if arguments.json:
        output.put_json(look(directory))
        return 0
    if arguments.once or not sys.stdout.isatty():
        rows = look(directory)
        output.put(words.table(HEAD, lines(rows)) if rows else f"{directory}: no runs")
        return 0
    _watch(directory, min(max(0.1, arguments.every), 3600.0))
    return 0


def _watch(directory: Path, every: float) -> None:
    """Until Ctrl-C."""
    from rich.live import Live

    with Live(drawn(directory), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(every)
            live.update(drawn(directory), refresh=True)


def drawn(directory: Path) -> "Table":
    from rich.table import Table

    table = Table(*HEAD, title=words.show(directory.absolute()), box=None)
    table.columns[0].no_wrap = True  # a name that is cut may stand for two runs
    for line in lines(look(directory)):
        table.add_row(*map(words.printable, line))
    return table


def lines(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [_line(row) for row in rows]


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    monitor = row["monitor"] or ""
    return (
        row["run"],
        row["state"],
        words.number(row["step"]),
        _or_none(row["rate"], "{:.3g}".format),
        _or_none(row["left"], words.duration),
        _or_none(row["saved"], lambda step: f"{step}, {words.age(row['saved_at'])}"),
        _or_none(row["best"], lambda best: f"{monitor} {words.number(best)}".strip()),
        row["last"] or "-",
        _or_none(row["room"], "{} more".format),
    )


def _or_none(value: Any, text: Callable[[Any], str]) -> str:
    return "-" if value is None else text(value)


def look(directory: Path) -> list[dict[str, Any]]:
    """A row for each run; those that train now stand first, then by their last start. Of a run's
    own directory that run's.
    """
    alone = Run(directory)
    found = [alone] if alone.is_begun() else find.runs_in(directory)
    runs = sorted(found, key=Run.last_start, reverse=True)
    rows = [_row(run) for run in runs]
    return sorted(rows, key=lambda row: row["state"] != "running")


def _row(run: Run) -> dict[str, Any]:
    names = (
        "state",
        "step",
        "rate",
        "left",
        "saved",
        "saved_at",
        "monitor",
        "best",
        "last",
        "room",
    )
    row: dict[str, Any] = {"run": run.name, "path": run.directory} | dict.fromkeys(names)
    try:
        latest = run.latest
        row["state"] = _state(run)
        logged = tail.rows(run.directory / "metrics.csv")
        row["step"] = max([_step(one) for one in logged], default=None)
        if latest is not None:
            row |= _of_checkpoint(latest)
            row["room"] = _room(latest.path)
        if row["state"] == "running":
            row["rate"] = rate(logged)
            row["left"] = _left(run, latest, row)
        if row["state"] == GONE:
            row["last"] = "its process ended without a word"
    except OSError as error:
        row |= {"state": "unreadable", "last": error.strerror}
    return row


def _state(run: Run) -> str:
    state = run.state()
    if state != "stopped" or (run.directory / "RESUME.txt").exists():
        return state
    return GONE


def _of_checkpoint(latest: Checkpoint) -> dict[str, Any]:
    facts = latest.manifest
    ended = facts.get("ended")
    return {
        "saved": latest.step,
        "saved_at": facts.get("created"),
        "monitor": facts.get("monitor"),
        "best": facts.get("best_score"),
        "last": f"ended by {ended}" if ended else f"saved: {facts.get('reason')}",
    }


def _room(checkpoint: Path) -> int:
    """How many more checkpoints like this one the disk has room for."""
    disk = os.statvfs(checkpoint.parent)
    return disk.f_bavail * disk.f_frsize // max(1, files.size(checkpoint))


def _step(row: dict[str, str]) -> int:
    try:
        return int(row.get("step") or 0)
    except ValueError:  # a damaged row
        return 0


def rate(logged: Sequence[dict[str, str]]) -> float | None:
    """Steps a second over the last rows of one start: its clock begins at 0."""
    points: list[tuple[float, int]] = []
    for row in logged:
        try:
            secs = float(row.get("time/secs", ""))
        except ValueError:  # a damaged row
            continue
        if not math.isfinite(secs):
            continue
        if points and secs < points[-1][0]:
            points.clear()
        points.append((secs, _step(row)))
    if len(points) < 2 or points[-1][0] <= points[0][0]:
        return None
    return (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])


def _left(run: Run, latest: Checkpoint | None, row: dict[str, Any]) -> float | None:
    """Seconds to the end that the config plans; None while that is not known."""
    from savepoint.config.compose import parse_yaml

    if not row["rate"] or row["step"] is None:
        return None
    try:
        trainer = parse_yaml((run.directory / "config.yaml").read_text(), "config.yaml")["trainer"]
        planned = [trainer["max_steps"]] if trainer["max_steps"] > 0 else []
        epochs = trainer["max_epochs"]
        if latest is not None and latest.epoch and epochs and epochs > 0:
            planned.append(round(latest.step / latest.epoch * epochs))
    except (ValueError, TypeError, KeyError, FileNotFoundError):
        return None
    if not planned:
        return None
    steps: int = min(planned) - row["step"]
    return max(0.0, steps / float(row["rate"]))
