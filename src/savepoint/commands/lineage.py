"""`savepoint lineage [RUN_DIR|FILE]`: from run.json, and from the digests by which checkpoints name their parents.

A parent is looked for in the runs of the same output directory; retention may have deleted it.
"""

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from savepoint import find, words
from savepoint.checkpoint import manifest
from savepoint.checkpoint.store import Checkpoint
from savepoint.commands import output
from savepoint.run import Run


class Place(NamedTuple):
    """A checkpoint and the run directory it lies in."""

    run: Run
    checkpoint: Checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="RUN_DIR|FILE", nargs="?", help="default: the newest run under outputs/")


def main(arguments: argparse.Namespace) -> int:
    run, file = _target(arguments.path)
    family = [Place(one, checkpoint) for one in _family(run) for checkpoint in one.store.checkpoints()]
    found: dict[str, Any] = {
        "run": run.name, "path": run.directory, "id": run.id(),
        "ancestors": _ancestors(run, family), "starts": run.starts(), "forks": _forks(run, family),
    }  # fmt: skip
    if file:
        found["file"] = {"path": file, **_origin(manifest.read(file), family)}
    if arguments.json:
        output.put_json(found)
    else:
        output.put(_text(found))
    return 0


def _target(argument: str | None) -> tuple[Run, Path | None]:
    if argument is None or manifest.local_path(argument).is_dir():
        return find.run(argument), None
    file = find.file_or_latest(argument)
    return find.run_of(file) or Run(file.absolute().parent), file


def _family(run: Run) -> list[Run]:
    """The runs beside this one, itself the first."""
    others = [one for one in find.runs_in(run.directory.parent) if one.is_readable()]
    return [run, *(one for one in others if one.directory != run.directory)]


def _origin(facts: Mapping[str, Any], family: list[Place]) -> dict[str, Any]:
    """What the process that made a checkpoint started from."""
    parent = facts.get("parent")
    where = next((place for place in family if place.checkpoint.manifest.get("digest") == parent), None)
    found = {"step": facts["step"], "parent": parent, "parent_run": None, "parent_step": None}
    return found | ({"parent_run": where.run.name, "parent_step": where.checkpoint.step} if where else {})


def _ancestors(run: Run, family: list[Place]) -> list[dict[str, Any]]:
    """The checkpoints of other runs that this run, the run of that one and so on were forked from; nearest first."""
    found: list[dict[str, Any]] = []
    seen = {run.directory}
    while place := _forked_from(run, family):
        if place.run.directory in seen:
            break
        seen.add(place.run.directory)
        found.append({"run": place.run.name, "step": place.checkpoint.step, "path": place.checkpoint.path})
        run = place.run
    return found


def _forked_from(run: Run, family: list[Place]) -> Place | None:
    own = [one.manifest for one in run.store.checkpoints()]
    ids, parents = {facts.get("run_id") for facts in own}, {facts.get("parent") for facts in own}
    others = [place for place in family if place.checkpoint.manifest.get("run_id") not in ids]
    return next((place for place in others if place.checkpoint.manifest["digest"] in parents), None)


def _forks(run: Run, family: list[Place]) -> list[dict[str, Any]]:
    others = {place.run.directory: place.run for place in family if place.run is not run}
    origins = [(one, _forked_from(one, family)) for one in others.values()]
    return [
        {"run": one.name, "path": one.directory, "step": place.checkpoint.step}
        for one, place in origins
        if place and place.run.directory == run.directory
    ]


def _text(found: Mapping[str, Any]) -> str:
    first: dict[str, Any] = next(iter(found["starts"]), {})
    origin = [f"step {one['step']} of {one['run']} ({one['path']})" for one in found["ancestors"]]
    if not origin and first.get("checkpoint"):
        parent = first.get("parent") or {}
        name = f"{parent['name']}, id {parent['id']}, " if parent.get("id") else "a run "
        origin = [f"step {first.get('step')} of {name}whose checkpoint is not here ({first['checkpoint']})"]
    lines = [("run", f"{found['run']}, id {found['id'] or 'unknown'}")]
    lines += [("forked from", text) for text in origin]
    lines += [("forked into", f"{one['run']}, at step {one['step']} ({one['path']})") for one in found["forks"]]
    if file := found.get("file"):
        lines.append(("file", f"step {file['step']}, by a process that began from {_began(file)}"))
    starts = [_start(start) for start in found["starts"]]
    text = words.table((), lines)
    if not starts:
        return f"{text}\n\nNo record of its starts: run.json is missing or damaged."
    return f"{text}\n\n{words.table(('start', 'host', 'commit', 'from', 'changed', 'command'), starts)}"


def _began(file: Mapping[str, Any]) -> str:
    if file["parent"] is None:
        return "nothing"
    if file["parent_run"] is None:
        return f"a checkpoint that is not here (digest {file['parent'][:12]})"
    return f"step {file['parent_step']} of {file['parent_run']}"


def _start(start: Mapping[str, Any]) -> tuple[str, ...]:
    git = start["git"]
    commit = f"{str(git.get('commit'))[:7]}{'+' if git.get('dirty') else ''}" if git else "-"
    begin = f"step {start.get('step')}" if start.get("checkpoint") else "nothing"
    changes = ", ".join(f"{key} {' -> '.join(map(str, pair))}" for key, pair in start["changed"].items())
    when = start["time"][:19].replace("T", " ")
    return when, str(start.get("host")), commit, begin, changes or "-", shlex.join(map(str, start["argv"]))
