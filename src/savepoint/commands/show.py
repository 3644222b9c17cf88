"""`savepoint show [RUN_DIR|FILE]`: content and lineage of a checkpoint, or of a run's newest.

Facts, metrics and lineage come from the manifests and run.json, without torch. The parent is
searched in the runs of the same output directory; retention may have deleted it.
"""

import argparse
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from savepoint import files, find, words
from savepoint.checkpoint import manifest
from savepoint.checkpoint.promises import ELSEWHERE
from savepoint.checkpoint.store import Checkpoint
from savepoint.commands import output
from savepoint.comparing import norm
from savepoint.run import Run

PARTS = ("facts", "metrics", "config", "tensors", "clients", "lineage")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    newest = "default: the newest run under outputs/"
    parser.add_argument("path", metavar="RUN_DIR|FILE", nargs="?", help=newest)
    example = "one part, as in: savepoint show FILE --only config > config.yaml"
    parser.add_argument("--only", choices=PARTS, help=example)


def main(arguments: argparse.Namespace) -> int:
    run, file = _target(arguments.path)
    parts = [arguments.only] if arguments.only else list(PARTS)
    content: dict[str, Any] = {"file": file}
    if parts != ["lineage"]:  # a run without a checkpoint has a lineage too
        content["file"] = file or find.latest(run)
        content |= _contents(content["file"], parts)
    if "lineage" in parts:
        content["lineage"] = _lineage(run, file)
    if arguments.json:
        output.put_json(content)
    elif arguments.only:
        output.put(_text(arguments.only, content[arguments.only]))
    else:
        shown = [_text(part, content[part]) for part in parts if content[part] is not None]
        output.put("\n\n".join([words.show(content["file"]), *shown]))
    return 0


def _target(argument: str | None) -> tuple[Run, Path | None]:
    if argument is None or find.is_folder(manifest.local_path(argument)):
        return find.run(argument), None
    file = find.file_or_latest(argument)
    return find.run_of(file) or Run(file.absolute().parent), file


def _text(part: str, content: Any) -> str:
    if part == "facts":
        return words.table((), [(key, _fact(value, key)) for key, value in content.items()])
    if part == "metrics":
        rows = [(key, words.number(one["value"]), str(one["step"])) for key, one in content.items()]
        return words.table(("metric", "value", "measured at step"), rows)
    if part == "clients":
        return _clients_text(content)
    if part == "config":
        return str(content).rstrip()
    return _tensors_text(content) if part == "tensors" else _lineage_text(content)


# -- a checkpoint --------------------------------------------------------------------------------


def _contents(path: Path, parts: list[str]) -> dict[str, Any]:
    facts = manifest.read(path)
    state = dict[str, Any]()
    if {"config", "tensors", "clients"} & set(parts):
        state, facts = find.load(path)
    plain = {key: value for key, value in facts.items() if key != "metrics"}
    content = {"facts": {"bytes": files.size(path)} | plain, "metrics": facts.get("metrics", {})}
    content["config"] = state.get("config", "")
    content["clients"] = _clients(state)
    if "tensors" in parts:
        content["tensors"] = tensors(state)
    return {part: content[part] for part in parts if part in content}


def _clients(state: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Of a federated run: the newest state and metrics of each client; None for any other."""
    saved = state.get("federated")
    if saved is None:
        return None
    nothing: dict[str, Any] = {"round": None, "digest": None, "metrics": {}}
    rows = []
    for client in sorted({*saved["clients"], *saved["measured"]}):
        kept = saved["clients"].get(client, nothing)
        measured = saved["measured"].get(client, nothing)
        row = {"client": client, "state_round": kept["round"], "digest": kept["digest"]}
        rows.append(row | {"measured_in": measured["round"], "metrics": measured["metrics"]})
    return rows


def _clients_text(rows: list[dict[str, Any]] | None) -> str:
    lines = []
    for row in rows or ():
        metrics = ", ".join(f"{name} {words.number(one)}" for name, one in row["metrics"].items())
        line = [row["client"], row["state_round"], (row["digest"] or "-")[:12], row["measured_in"]]
        lines.append([*map(words.number, line), metrics or "-"])
    return words.table(("client", "state of round", "digest", "measured in", "metrics"), lines)


def tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """`weights`: each tensor of the model; `others`: the sizes of all other tensors, by key."""
    from torch import Tensor

    from savepoint.checkpoint.format import leaves, size_bytes

    weights = []
    others = []
    for name, value in state.get("state_dict", {}).items():
        if isinstance(value, Tensor):
            kind = str(value.dtype).removeprefix("torch.")
            row = {"name": name, "shape": list(value.shape), "dtype": kind, "norm": norm(value)}
            weights.append(row | {"bytes": size_bytes(value)})
    for key, value in state.items():
        size = 0 if key in ("state_dict", "optimizer") else size_bytes(value)
        if size:
            number = sum(isinstance(leaf, Tensor) for _, leaf in leaves(value))
            others.append({"name": key, "tensors": number, "bytes": size})
    return {"weights": weights, "others": others}


def _fact(value: Any, key: str = "") -> str:
    if key == "elastic":
        return ELSEWHERE.get(value, str(value))
    if key == "shards":
        sizes = [f"{name} {words.megabytes(one['bytes'])}" for name, one in value.items()]
        return ", ".join(sizes) or "none: all is in common.ckpt"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return words.number(value)


def _tensors_text(content: Mapping[str, Any]) -> str:
    weights = []
    for one in content["weights"]:
        shape = str(tuple(one["shape"]))
        norm = words.number(one["norm"])
        weights.append((one["name"], shape, one["dtype"], norm, str(one["bytes"])))
    text = words.table(("weights", "shape", "dtype", "norm", "bytes"), weights)
    others = [(one["name"], str(one["tensors"]), str(one["bytes"])) for one in content["others"]]
    if not others:
        return text
    return f"{text}\n\n{words.table(('beside them', 'tensors', 'bytes'), others)}"


# -- where it comes from -------------------------------------------------------------------------


class Place(NamedTuple):
    """A checkpoint and the run directory it lies in."""

    run: Run
    checkpoint: Checkpoint

    @property
    def facts(self) -> dict[str, Any]:
        return self.checkpoint.manifest


def _lineage(run: Run, file: Path | None) -> dict[str, Any]:
    family = [place for one in _family(run) for place in _places(one)]
    lineage: dict[str, Any] = {"run": run.name, "path": run.directory, "id": run.id()}
    lineage |= {"ancestors": _ancestors(run, family), "starts": run.starts()}
    lineage["forks"] = _forks(run, family)
    if file:
        lineage["file"] = {"path": file, **_origin(manifest.read(file), family)}
    return lineage


def _family(run: Run) -> list[Run]:
    """The runs beside this one, itself the first."""
    beside = run.directory.parent
    runs = find.runs_in(beside) if os.access(beside, os.R_OK | os.X_OK) else []
    others = [one for one in runs if one.directory != run.directory and one.is_readable()]
    return [run, *others]


def _places(run: Run) -> list[Place]:
    try:
        return [Place(run, one) for one in run.store.checkpoints()]
    except PermissionError:  # a run of another user
        return []


def _origin(facts: Mapping[str, Any], family: list[Place]) -> dict[str, Any]:
    """The checkpoint from which the process that made this one started."""
    parent = facts.get("parent")
    where = next((one for one in family if one.facts.get("digest") == parent), None)
    origin = {"step": facts["step"], "parent": parent, "parent_run": None, "parent_step": None}
    if where:
        origin |= {"parent_run": where.run.name, "parent_step": where.checkpoint.step}
    return origin


def _ancestors(run: Run, family: list[Place]) -> list[dict[str, Any]]:
    """The checkpoint that this run was forked from, and those before it; nearest first."""
    ancestors: list[dict[str, Any]] = []
    seen = {run.directory}
    while (place := _forked_from(run, family)) and place.run.directory not in seen:
        run, one = place
        seen.add(run.directory)
        ancestors.append({"run": run.name, "step": one.step, "path": one.path})
    return ancestors


def _forked_from(run: Run, family: list[Place]) -> Place | None:
    own = [one.manifest for one in run.store.checkpoints()]
    ids = {facts.get("run_id") for facts in own}
    parents = {facts.get("parent") for facts in own}
    others = [one for one in family if one.facts.get("run_id") not in ids]
    return next((one for one in others if one.facts["digest"] in parents), None)


def _forks(run: Run, family: list[Place]) -> list[dict[str, Any]]:
    others = {place.run.directory: place.run for place in family if place.run is not run}
    origins = [(one, _forked_from(one, family)) for one in others.values()]
    return [
        {"run": one.name, "path": one.directory, "step": place.checkpoint.step}
        for one, place in origins
        if place and place.run.directory == run.directory
    ]


def _lineage_text(lineage: Mapping[str, Any]) -> str:
    lines = [("run", f"{lineage['run']}, id {lineage['id'] or 'unknown'}")]
    lines += [("forked from", text) for text in _forked_text(lineage)]
    for one in lineage["forks"]:
        lines.append(("forked into", f"{one['run']}, at step {one['step']} ({one['path']})"))
    if file := lineage.get("file"):
        began = _began(file)
        lines.append(("file", f"step {file['step']}, by a process that began from {began}"))
    text = words.table((), lines)
    starts = [_start(start) for start in lineage["starts"]]
    if not starts:
        return f"{text}\n\nNo record of its starts: run.json is missing or damaged."
    head = ("start", "host", "commit", "from", "changed", "command")
    return f"{text}\n\n{words.table(head, starts)}"


def _forked_text(lineage: Mapping[str, Any]) -> list[str]:
    if lineage["ancestors"]:
        return [
            f"step {one['step']} of {one['run']} ({one['path']})" for one in lineage["ancestors"]
        ]
    first: dict[str, Any] = next(iter(lineage["starts"]), {})
    if not first.get("checkpoint"):
        return []
    parent = first.get("parent") or {}
    name = f"{parent['name']}, id {parent['id']}, " if parent.get("id") else "a run "
    lost = f"whose checkpoint is not here ({first['checkpoint']})"
    return [f"step {first.get('step')} of {name}{lost}"]


def _began(file: Mapping[str, Any]) -> str:
    if file["parent"] is None:
        return "nothing"
    if file["parent_run"] is None:
        return f"a checkpoint that is not here (digest {file['parent'][:12]})"
    return f"step {file['parent_step']} of {file['parent_run']}"


def _start(start: Mapping[str, Any]) -> tuple[str, ...]:
    git = start["git"] or {}
    commit = f"{str(git.get('commit'))[:7]}{'+' if git.get('dirty') else ''}"
    begin = f"step {start.get('step')}" if start.get("checkpoint") else "nothing"
    pairs = start["changed"].items()
    changes = ", ".join(f"{key} {' -> '.join(map(str, pair))}" for key, pair in pairs)
    when = start["time"][:19].replace("T", " ")
    command = shlex.join(map(str, start["argv"]))
    return when, str(start.get("host")), commit if git else "-", begin, changes or "-", command
