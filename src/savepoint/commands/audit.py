"""`savepoint audit [RUN]`: train each part between two kept checkpoints again, and compare its end
with the next checkpoint: all values, and the log.

The run is only read. Exit code 1 where a part comes out differently here.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from savepoint import entry, find, words
from savepoint.checkpoint.manifest import step_in_name
from savepoint.commands import output
from savepoint.commands.replay import add_allow
from savepoint.errors import CheckpointCorruptError, ConfigError
from savepoint.run import Run
from savepoint.words import plural, show

if TYPE_CHECKING:
    from savepoint.checkpoint.store import Checkpoint

# Of a part whose checkpoints are not read.
UNKNOWN: Mapping[str, Any] = {
    "ended": None,
    "state": [],
    "row": None,
    "missing_rows": 0,
    "notes": [],
    "damaged": "",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run = "a run directory; default: the newest run"
    parser.add_argument("run", metavar="RUN", nargs="?", help=run)
    sample = "K parts, 1 at least, that are drawn, in place of all"
    parser.add_argument("--sample", metavar="K", type=int, help=sample)
    add_allow(parser)


def main(arguments: argparse.Namespace) -> int:
    run = find.run(arguments.run)
    if arguments.sample is not None and arguments.sample < 1:
        raise ConfigError(
            f"Nothing to audit: --sample {arguments.sample}. A number of parts was expected, 1 at "
            "least. Give another."
        )
    checkpoints = run.store.checkpoints()
    rejected = run.store.rejected()
    # One that was made inside a validation is of no place where a training passes by itself.
    parts = [
        (one, other)
        for one, other in pairwise(checkpoints)
        if other.manifest.get("at") in ("batch", "epoch")
    ]
    if not parts:
        unread = f", and {len(rejected)} that cannot be read" if rejected else ""
        raise ConfigError(
            f"Nothing to audit: {show(run.directory)} has {plural(len(checkpoints), 'checkpoint')}"
            f"{unread}. Two of a training were expected, between which it is trained again. Let a "
            "run keep more: --checkpoint.keep_last 5"
        )
    if arguments.sample is not None and arguments.sample < len(parts):
        parts = sorted(random.sample(parts, arguments.sample), key=lambda one: one[0].step)

    with entry.importing():
        import savepoint.replay.playing  # noqa: F401

    rows = []
    for number, (one, other) in enumerate(parts, 1):
        print(f"part {number} of {len(parts)}", file=sys.stderr, flush=True)
        try:
            found = _audited(run, one, other, arguments)
        except CheckpointCorruptError as error:  # what was seen of the other parts still holds
            found = {"equal": False, "damaged": f"{error.path.name}: {error.reason}"}
        rows.append({"from": one.step, "to": other.step, **UNKNOWN, **found})
    for path, reason in rejected:
        found = {"equal": False, "damaged": f"{path.name}: {reason}"}
        rows.append({"from": None, "to": step_in_name(path.name), **UNKNOWN, **found})
    equal = sum(row["equal"] for row in rows)
    if arguments.json:
        output.put_json({"run": run.directory, "equal": equal == len(rows), "parts": rows})
    else:
        output.put(_text(rows, equal))
    return 0 if equal == len(rows) else 1


def _audited(
    run: Run, one: "Checkpoint", other: "Checkpoint", arguments: argparse.Namespace
) -> dict[str, Any]:
    from savepoint.comparing import compare
    from savepoint.replay import choice, playing
    from savepoint.replay import rows as logs

    source = choice.load(one.path, None if arguments.allow_code else run)
    config = choice.config_after(run, one)
    notes = list(choice.reservations(run, source, other.step, resumed=config is not None))
    skip = source.state.get("logged_rows") or 0
    was, facts = find.load(other.path)
    goal = playing.Goal(other.step, facts["at"], saves=True)
    with redirect_stdout(sys.stderr), tempfile.TemporaryDirectory(prefix="audit-") as scratch:
        played = playing.play(
            source, Path(scratch), "replay", goal, allow=arguments.allow, config=config
        )
        made = played.run.store.latest()
        now = find.load(made.path)[0] if made else {}
        if "logged_rows" in now:
            now["logged_rows"] += skip  # its log begins at the checkpoint
        log = run.directory / "metrics.csv"
        compared = logs.compare(log, skip, played.run.directory / "metrics.csv")
    parts = compare(was, now)["parts"] if made else []
    return {
        "equal": compared.is_equal and not compared.missing and bool(made) and not parts,
        "ended": None if made else played.step,
        "state": parts,
        "row": compared.differing,
        "missing_rows": compared.missing,
        "notes": notes,
    }


def _text(rows: list[dict[str, Any]], equal: int) -> str:
    lines = []
    for row in rows:
        verdict = "equal" if row["equal"] else "DIFFERENT"
        if row["damaged"]:
            verdict = "not read"
        begin = "?" if row["from"] is None else row["from"]
        lines.append((f"{begin} to {row['to']}", verdict, _why(row)))
    notes = dict.fromkeys(note for row in rows for note in row["notes"])
    text = [words.table(("steps", "end and log", ""), lines), ""]
    text += [f"note: {note}" for note in notes]
    damaged = sum(bool(row["damaged"]) for row in rows)
    is_equal = "is" if 0 < equal == len(rows) - damaged else "is not"
    text.append(
        f"This run {is_equal} reproducible here: {equal} of {plural(len(rows), 'part')} equal"
        f"{f', {damaged} not read' if damaged else ''}."
    )
    return "\n".join(text)


def _why(row: dict[str, Any]) -> str:
    if row["equal"]:
        return ""
    if row["damaged"]:
        return str(row["damaged"])
    reasons = []
    if row["ended"] is not None:
        reasons.append(f"ended at step {row['ended']}, by the limits of its config")
    if row["row"] is not None:
        name, (was, now) = next(iter(row["row"]["values"].items()), ("?", (None, None)))
        reasons.append(f"row of step {row['row']['step']}: {name} {was} then, {now} now")
    if row["missing_rows"]:
        reasons.append(f"{plural(row['missing_rows'], 'row')} the log does not have")
    if row["state"]:
        reasons.append(f"state: {', '.join(row['state'][:5])}")
    return "; ".join(reasons)
