"""`savepoint runs [OUTPUT_DIR]`: exit code 1 if a run is broken or cannot be read."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from savepoint import find, words
from savepoint.checkpoint import manifest
from savepoint.commands import output
from savepoint.errors import CheckpointNotFoundError
from savepoint.run import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", nargs="?", default="outputs", help="default: outputs")


def main(arguments: argparse.Namespace) -> int:
    rows = [_facts(one) for one in _runs(manifest.local_path(arguments.output_dir))]
    rows.sort(key=lambda row: str(row["last"]))
    if arguments.json:
        output.put_json(rows)
    else:
        output.put(_text(rows) if rows else f"{arguments.output_dir}: no runs")
    return 1 if any(row["state"] in ("broken", "unreadable") for row in rows) else 0


def _runs(directory: Path) -> list[Run]:
    if not directory.is_dir():
        what = "A file, not a directory of runs" if directory.exists() else "No such directory"
        hint = "Name another one, or start a run: python train.py"
        raise CheckpointNotFoundError(f"{what}: {directory}. A directory with runs was expected. {hint}", directory)
    if (directory / "run.json").exists():
        raise CheckpointNotFoundError(
            f"A run, not a directory of runs: {directory}. The directory above it was expected. "
            f"To list its checkpoints: {Run(directory).command('-m', 'savepoint', 'ls')}",
            directory,
        )
    return find.runs_in(directory)


def _facts(one: Run) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(("config", "monitor", "best", "step", "epoch", "reason"))
    row = {"run": one.name, "path": one.directory, "state": "unreadable", "test": {}, "last": ""} | row
    try:
        row["config"], row["state"] = _config(one), one.state()
        times = [start["time"] for start in one.starts()]
        if one.latest is not None:
            facts = one.latest.manifest
            row |= {"monitor": facts.get("monitor"), "best": facts.get("best_score"), "step": one.latest.step}
            row["epoch"] = one.latest.epoch
            times.append(facts.get("created") or "")
        row["last"] = max(times, default="")
        if one.is_summarised():
            summary = one.summary()
            row["test"] = {key: value for key, value in summary.items() if key.startswith("test/")}
    except OSError as error:
        row["reason"] = f"{error.filename}: {error.strerror}"
    return row


def _config(one: Run) -> str | None:
    """The name of the config file of the first start; a fork has none, but a parent."""
    from savepoint.config.compose import config_name

    first = next(iter(one.starts()), None)
    if first is None:
        return None
    if not first.get("checkpoint"):
        return config_name([str(word) for word in first["argv"]])
    parent = first.get("parent")
    return f"fork of {parent['name']}" if isinstance(parent, dict) and parent.get("name") else "a fork"


def _text(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        (
            row["run"], row["config"] or "-", f"{row['monitor'] or ''} {words.number(row['best'])}".strip(),
            _test(row["test"]), words.number(row["step"]), row["state"], words.age(row["last"]),
        )
        for row in rows
    ]  # fmt: skip
    text = [words.table(("run", "config", "best", "test", "steps", "state", "age"), lines)]
    text += [f"{row['run']} cannot be read: {row['reason']}" for row in rows if row["reason"]]
    text += [
        f"{row['run']}: {Run(row['path']).command('-m', 'savepoint', 'doctor')}"
        for row in rows
        if row["state"] == "broken"
    ]
    return "\n".join(text)


def _test(measured: dict[str, Any]) -> str:
    """The accuracy where there is one; else the first that was measured."""
    if isinstance(accuracy := measured.get("test/accuracy"), float):
        return words.metric("accuracy", accuracy)
    return next((f"{key.removeprefix('test/')} {words.number(value)}" for key, value in measured.items()), "-")
