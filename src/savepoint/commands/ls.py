"""`savepoint ls [RUN_DIR]`: exit code 1 if a file that is named as a checkpoint is none, or none is left."""

import argparse
from pathlib import Path
from typing import Any

from savepoint import find, words
from savepoint.checkpoint import manifest
from savepoint.checkpoint.store import Checkpoint
from savepoint.commands import output
from savepoint.run import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_dir",
        metavar="RUN_DIR",
        nargs="?",
        help="a run directory, or its checkpoints/; the newest run under outputs/",
    )


def main(arguments: argparse.Namespace) -> int:
    run = find.run(arguments.run_dir)
    rows = listing(run)
    if arguments.json:
        output.put_json({"run_dir": run.directory, "checkpoints": rows})
    else:
        output.put(_text(run, rows))
    wrong = any(not row["verifies"] and not row["set_aside"] for row in rows)
    return 1 if wrong or not any(row["verifies"] for row in rows) else 0


def listing(run: Run) -> list[dict[str, Any]]:
    """Checkpoints by step, judged by structure and seal; then what does not verify, with the reason."""
    store = run.store
    listed, best = store.checkpoints(), store.best()
    monitor = listed[-1].manifest.get("monitor") if listed else None
    rows = [
        _row(one.path, size)
        | {"step": one.step, "epoch": one.epoch, "monitor": monitor, "score": one.score_of(monitor)}
        | {"created": one.manifest.get("created"), "latest": one is listed[-1], "best": _is(one, best)}
        for one in listed
        if (size := find.size(one.path)) is not None
    ]
    rows += [_row(path, find.size(path), reason) for path, reason in store.rejected()]
    return rows + [_row(path, find.size(path), manifest.diagnose(path), set_aside=True) for path in run.corrupt()]


def _row(path: Path, size: int | None, reason: str | None = None, set_aside: bool = False) -> dict[str, Any]:
    row: dict[str, Any] = {"file": path.name, "bytes": size}
    row |= dict.fromkeys(("epoch", "monitor", "score", "created")) | {"step": manifest.step_in_name(path.name)}
    row |= {"latest": False, "best": False}
    return row | {"verifies": reason is None, "reason": reason, "set_aside": set_aside}


def _is(one: Checkpoint, best: Checkpoint | None) -> bool:
    return best is not None and one.path == best.path


def _text(run: Run, rows: list[dict[str, Any]]) -> str:
    if not rows:
        return f"{run.shown}: no checkpoints"
    monitor = next((row["monitor"] for row in rows if row["monitor"]), "score")
    lines = [
        (
            row["file"], words.number(row["step"]), words.number(row["epoch"]), words.number(row["score"]),
            "-" if row["bytes"] is None else words.megabytes(row["bytes"]), words.age(row["created"]),
            " ".join(mark for mark in ("latest", "best") if row[mark]), _verdict(row),
        )
        for row in rows
    ]  # fmt: skip
    return words.table(("file", "step", "epoch", monitor, "size", "age", "mark", "verified"), lines)


def _verdict(row: dict[str, Any]) -> str:
    return "yes" if row["verifies"] else f"{'set aside' if row['set_aside'] else 'NO'}: {row['reason']}"
