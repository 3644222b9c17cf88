"""`savepoint ls [PATH]`: the checkpoints of a run, or the runs in any other directory.

Exit code 1 if a run is broken or unreadable, if a file with a checkpoint's name does not verify, or
if a run has no checkpoint left.
"""

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from savepoint import find, words
from savepoint.checkpoint import manifest
from savepoint.commands import output
from savepoint.errors import CheckpointNotFoundError
from savepoint.federated import listing as clients
from savepoint.run import Run, test_metrics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    place = "a directory of runs, a run directory, or its checkpoints/; default: outputs"
    parser.add_argument("path", metavar="PATH", nargs="?", help=place)


def main(arguments: argparse.Namespace) -> int:
    path = directory(arguments.path)
    run = find.run_at(path)
    gc.disable()  # of thousands of manifests none is garbage, and each look for some takes time
    try:
        data, text, is_well = _checkpoints(run) if run else _runs(path)
    finally:
        gc.enable()
    if arguments.json:
        output.put_json(data)
    else:
        output.put(text)
    return 0 if is_well else 1


def directory(argument: str | None) -> Path:
    path = manifest.local_path("outputs" if argument is None else argument)
    if argument is None and not path.exists():
        hint = f"Start one: {words.python()} train.py"
        what = f"No runs yet: {path.absolute()}. The first run makes this directory. {hint}"
        raise CheckpointNotFoundError(what, path)
    if not find.is_folder(path):
        raise find.missing(path, "a run directory or a directory of runs")
    return path


# -- runs ----------------------------------------------------------------------------------------


def _runs(directory: Path) -> tuple[Any, str, bool]:
    """Data for JSON, the text, and whether all is well."""
    rows = sorted(map(_run_facts, find.runs_in(directory)), key=lambda row: str(row["last"]))
    is_well = not any(row["state"] in ("broken", "unreadable") for row in rows)
    return rows, _runs_text(rows) if rows else f"{directory}: no runs", is_well


def _run_facts(run: Run) -> dict[str, Any]:
    row: dict[str, Any] = {"run": run.name, "path": run.directory, "state": "unreadable"}
    row |= {"test": {}, "last": ""}
    row |= dict.fromkeys(("config", "monitor", "best", "step", "epoch", "reason"))
    try:
        row["config"] = _config(run)
        row["state"] = run.state()
        times = [start["time"] for start in run.starts()]
        if run.latest is not None:
            facts = run.latest.manifest
            row |= {"monitor": facts.get("monitor"), "best": facts.get("best_score")}
            row |= {"step": run.latest.step, "epoch": run.latest.epoch}
            times.append(facts.get("created") or "")
        row["last"] = max(times, default="")
        if run.is_summarised():
            row["test"] = test_metrics(run.summary())
    except OSError as error:
        row["reason"] = f"{error.filename}: {error.strerror}"
    return row


def _config(run: Run) -> str | None:
    """The name of the first start's config file; for a fork the name of its parent."""
    from savepoint.config.compose import config_name

    first = next(iter(run.starts()), None)
    if first is None:
        return None
    if not first.get("checkpoint"):
        return config_name(
            [str(word) for word in first["argv"]], str(first.get("default_config", ""))
        )
    parent = first.get("parent")
    name = parent.get("name") if isinstance(parent, dict) else None
    return f"fork of {name}" if name else "a fork"


def _runs_text(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        best = "-"
        if row["best"] is not None:
            best = f"{row['monitor'] or ''} {words.number(row['best'])}".strip()
        line = [row["run"], row["config"] or "-", best, _test(row["test"])]
        line += [words.number(row["step"]), row["state"], words.age(row["last"])]
        lines.append(line)
    text = [words.table(("run", "config", "best", "test", "steps", "state", "age"), lines)]
    text += [f"{row['run']} cannot be read: {row['reason']}" for row in rows if row["reason"]]
    for row in rows:
        if row["state"] == "broken":
            text.append(f"{row['run']}: {Run(row['path']).command('-m', 'savepoint', 'verify')}")
    return "\n".join(text)


def _test(measured: dict[str, Any]) -> str:
    """The accuracy where there is one; else the first metric."""
    if not measured:
        return "-"
    named = (name for name, value in measured.items() if name.endswith("accuracy"))
    name = next(named, next(iter(measured)))
    value = measured[name]
    said = words.metric(name, value) if isinstance(value, float) else words.number(value)
    return f"{name.removeprefix('test/')} {said}"


# -- checkpoints ---------------------------------------------------------------------------------


def _checkpoints(run: Run) -> tuple[Any, str, bool]:
    """Data for JSON, the text, and whether all is well."""
    rows = listing(run)
    is_wrong = any(not row["verifies"] and not row["set_aside"] for row in rows)
    is_well = not is_wrong and any(row["verifies"] for row in rows)
    text = _checkpoints_text(rows) if rows else f"{run.shown}: no checkpoints"
    data: dict[str, Any] = {"run_dir": run.directory, "checkpoints": rows}
    if found := clients.summary(run.directory):
        data["clients"] = found
        states = words.plural(found["states"], "state")
        many = words.plural(found["clients"], "client")
        text += f"\nclients: {states} of {many}, newest round {found['newest_round']}"
    return data, text, is_well


def listing(run: Run) -> list[dict[str, Any]]:
    """Checkpoints by step, judged by structure and seal; then the files that do not verify."""
    listed, rejected = run.store.listing()
    best = run.store.best_of(listed)
    monitor = listed[-1].manifest.get("monitor") if listed else None
    rows = [
        _row(one.path, verifies=True, step=one.step, epoch=one.epoch, monitor=monitor)
        | {"score": one.score_of(monitor), "created": one.manifest.get("created")}
        | {"latest": one is listed[-1], "best": one == best}
        | {"shards": len(one.manifest.get("shards", ()))}
        for one in listed
    ]
    rows += [_row(path, reason=reason) for path, reason in rejected]
    rows += [_row(one, reason=manifest.diagnose(one), set_aside=True) for one in run.corrupt()]
    return [row for row in rows if row["bytes"] is not None]  # others the run has just deleted


def _row(path: Path, **more: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"file": path.name, "bytes": find.size(path)}
    row |= dict.fromkeys(("epoch", "monitor", "score", "created"))
    row |= {"step": manifest.step_in_name(path.name), "latest": False, "best": False, "shards": 0}
    return row | {"verifies": False, "reason": None, "set_aside": False} | more


def _checkpoints_text(rows: Sequence[dict[str, Any]]) -> str:
    monitor = next((row["monitor"] for row in rows if row["monitor"]), "score")
    # Where nothing is ranked, a column of dashes says nothing.
    columns = {"step": "step", "epoch": "epoch", "score": monitor}
    if all(row["score"] is None for row in rows):
        del columns["score"]
    lines = []
    for row in rows:
        marks = [mark for mark in ("latest", "best") if row[mark]]
        line = [row["file"], *(words.number(row[key]) for key in columns)]
        line += [words.megabytes(row["bytes"]), words.age(row["created"])]
        lines.append([*line, " ".join(marks), _verdict(row)])
    head = ("file", *columns.values(), "size", "age", "mark", "verified")
    return words.table(head, lines)


def _verdict(row: dict[str, Any]) -> str:
    if row["verifies"]:
        return f"yes, {words.plural(row['shards'], 'shard')}" if row["shards"] else "yes"
    return f"{'quarantined' if row['set_aside'] else 'NO'}: {row['reason']}"
