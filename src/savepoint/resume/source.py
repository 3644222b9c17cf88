"""The checkpoint that a run goes on from: chosen, verified whole, loaded to the CPU."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from savepoint.checkpoint import store
from savepoint.errors import CheckpointNotFoundError, ConfigError, ConfigMismatchError
from savepoint.job import rank
from savepoint.resume.request import Request
from savepoint.run import resume_command
from savepoint.words import show

# The checkpoint of this start, for the ranks that the launcher starts later.
ENVIRONMENT_KEY = "SAVEPOINT_CHECKPOINT"


@dataclass
class Source:
    """The checkpoint to continue from, in memory: of one in parts, what all ranks share."""

    path: Path
    state: Mapping[str, Any]
    manifest: Mapping[str, Any]
    newest_step: int = 0  # of its run, where a file was named


def choose(request: Request, *, may_rename: bool) -> Source:
    """Verifies the checkpoint of a request whole, and loads it to the CPU."""
    if rank() and (inherited := os.environ.get(ENVIRONMENT_KEY)):
        request = Request(run_dir=request.run_dir, file=Path(inherited), rewind=True)
    if request.run_dir is None:
        assert request.file is not None
        return Source(request.file, *store.load(request.file, whole=False))
    checkpoints = store.CheckpointStore(request.run_dir / "checkpoints")
    if request.best:
        best = checkpoints.best()
        if best is None:
            raise CheckpointNotFoundError(
                f"No best checkpoint in {show(request.run_dir)}: none has a value of the "
                "monitored metric at its own step. Only such values are ranked. Leave --best away "
                "to take the latest.",
                request.run_dir,
            )
        request.file = best.path
    if request.file is None:
        chosen, state, lines = checkpoints.load_latest(lock_holder=may_rename, whole=False)
        print("\n".join(lines), end="\n" if lines else "", flush=True)
        source = Source(chosen.path, state, chosen.manifest)
    else:
        source = Source(request.file, *store.load(request.file, whole=False))
        latest = checkpoints.latest()
        source.newest_step = latest.step if latest else 0
        may_be_older = request.fork is not None or request.rewind or request.plan
        if source.newest_step > source.manifest["step"] and not may_be_older:
            here = show(request.file.absolute())
            raise ConfigMismatchError(
                f"Not the newest checkpoint of its run: {here} is of step "
                f"{source.manifest['step']}, the run is at {source.newest_step}. Its later steps "
                "would be trained twice.\n"
                f"  a new run from there:                 {resume_command(request.file)} --fork "
                "NAME\n"
                f"  the same run, later files set aside:  {resume_command(request.file)} --rewind"
            )
    os.environ[ENVIRONMENT_KEY] = str(source.path.absolute())
    return source


def require_facts(source: Source) -> None:
    """Raises ConfigError where the manifest lacks a fact that a resume compares: some other program
    may have sealed the file.
    """
    needed = ("epoch", "at", "exact", "dataset", "world_size", "device")
    if lacking := [key for key in needed if source.manifest.get(key) is None]:
        raise ConfigError(
            f"Not saved by a training of Savepoint: {source.path}. Its manifest does not say "
            f"{', '.join(lacking)}; a resume compares these. To start from its weights: python "
            f"train.py --init_from {source.path}"
        )
