"""A run directory as others look at it: nothing in it is created, renamed or opened for writing."""

import difflib
import json
import os
import shlex
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from savepoint.checkpoint import manifest
from savepoint.checkpoint.store import Checkpoint, CheckpointStore
from savepoint.errors import CheckpointNotFoundError
from savepoint.run import Run
from savepoint.words import python, show

State = Literal["running", "finished", "stopped", "broken"]


class RunDir:
    """One run directory; or a directory that holds checkpoints and no run, which then has no record."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints" if os.path.isdir(path / "checkpoints") else path
        self.store = CheckpointStore(self.checkpoints)

    @property
    def shown(self) -> str:
        return show(self.path.absolute())

    @property
    def name(self) -> str:
        return self.path.absolute().name

    def is_begun(self) -> bool:
        return any(os.path.exists(self.path / name) for name in ("run.json", "run.json.corrupt", "checkpoints", "lock"))

    def is_readable(self) -> bool:
        return os.access(self.path, os.R_OK | os.X_OK)

    @cached_property
    def latest(self) -> Checkpoint | None:
        return self.store.latest()

    def corrupt(self) -> list[Path]:
        """What was set aside, by name."""
        return sorted(self.checkpoints.glob("*.corrupt"))

    # -- what is recorded --------------------------------------------------------------------------------------------

    def facts(self, name: str) -> dict[str, Any]:
        """What stands in run.json or summary.json; nothing where it is missing or damaged."""
        try:
            found = json.loads((self.path / name).read_text())
        except (FileNotFoundError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def starts(self) -> list[dict[str, Any]]:
        found = self.facts("run.json").get("starts")
        return [start for start in found if _is_start(start)] if isinstance(found, list) else []

    def is_summarised(self) -> bool:
        """Whether summary.json speaks of the newest checkpoint, not of an earlier end of this run."""
        return self.latest is not None and self.facts("summary.json").get("steps") == self.latest.step

    def is_summary_damaged(self) -> bool:
        return (self.path / "summary.json").exists() and not isinstance(self.facts("summary.json").get("steps"), int)

    def state(self) -> State:
        if self.holder():
            return "running"
        if self.latest is None:
            return "broken"
        return "finished" if self.latest.manifest.get("ended") and self.is_summarised() else "stopped"

    # -- the lock ----------------------------------------------------------------------------------------------------

    def holder(self) -> str | None:
        """The process that trains here: `pid 5 on host`; None where none does."""
        return Run(self.path).holder()

    def left_by(self) -> str:
        return Run(self.path).left_by()

    # -- what to type ------------------------------------------------------------------------------------------------

    def command(self, *words: str) -> str:
        """`python WORDS`, the last of them this directory."""
        return shlex.join([python(), *words, self.shown])


def _is_start(found: Any) -> bool:
    """Whether an entry of run.json is as `Run.record_start` wrote it; anybody may have edited it."""
    kinds = {"time": str, "argv": list, "changed": dict, "git": dict | None}
    return isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in kinds.items())


def find(argument: str | None) -> RunDir:
    """The run that is meant by the argument of a command: a run directory, its checkpoints/, or the newest run.

    Raises:
        CheckpointNotFoundError: nothing there, or no run.
    """
    if argument is None:
        from savepoint.choose import newest_run  # yaml, which those who name a run do not wait for

        return RunDir(newest_run(Path("outputs")))
    path = manifest.local_path(argument)
    if not path.is_dir():
        raise missing(path)
    is_run = path.absolute().name != "checkpoints" or (path / "checkpoints").is_dir()  # a run may be called so
    run = RunDir(path if is_run else path.absolute().parent)
    if not run.is_begun() and not manifest.step_files(path):
        held = [show(one.path.absolute()) for one in runs_in(path)]
        hint = f"It holds runs: {', '.join(held[:3])}. Name one of them." if held else "Check the path."
        raise CheckpointNotFoundError(
            f"Not a run directory: {path}. One with run.json or checkpoints/ was expected. {hint}", path
        )
    return run


def file_or_latest(argument: str | None) -> Path:
    """The checkpoint that is meant: a file, or the newest of a run."""
    if argument is not None and not (path := manifest.local_path(argument)).is_dir():
        if not path.exists():
            raise missing(path, "a checkpoint or a run directory")
        return path
    run = find(argument)
    if run.latest is None:
        raise CheckpointNotFoundError(
            f"No checkpoint that verifies: {run.checkpoints}. One was expected. "
            f"See: {run.command('-m', 'savepoint', 'doctor')}",
            run.checkpoints,
        )
    return run.latest.path


def runs_in(directory: Path) -> list[RunDir]:
    """The runs that lie in a directory, by name; also what cannot be looked into, as it may be one."""
    found = [RunDir(path) for path in sorted(directory.iterdir()) if not path.name.startswith(".") and path.is_dir()]
    return [run for run in found if not run.is_readable() or run.is_begun()]


def run_of(file: Path) -> RunDir | None:
    """The run that a checkpoint lies in."""
    directory = file.absolute().parent
    return RunDir(directory.parent) if directory.name == "checkpoints" else None


def size(path: Path) -> int | None:
    """In bytes; None where the run has deleted it since the listing."""
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return None


def missing(path: Path, expected: str = "a run directory") -> CheckpointNotFoundError:
    if path.exists():
        return CheckpointNotFoundError(
            f"A file, not a run directory: {path}. {expected.capitalize()} was expected. "
            f"To look at it: {shlex.join([python(), '-m', 'savepoint', 'show', str(path)])}",
            path,
        )
    known = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
    near = [path.parent / name for name in difflib.get_close_matches(path.name, known, n=2)]
    if (run := Path("outputs", path)).exists():
        near = [run]
    near = [one for one in near if one != path]  # a link that leads nowhere has the very name
    hint = f"Did you mean {' or '.join(map(str, near))}?" if near else "Check the path."
    return CheckpointNotFoundError(f"Nothing there: {path}. {expected.capitalize()} was expected. {hint}", path)
