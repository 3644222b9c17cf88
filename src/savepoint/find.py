"""The run or checkpoint that an argument names: a file, a run directory, its checkpoints/, or
nothing for the newest run.
"""

import difflib
import importlib
import shlex
import stat
from pathlib import Path
from typing import Any

from savepoint import entry, files, record
from savepoint.checkpoint import manifest, store
from savepoint.errors import CheckpointNotFoundError, ConfigError
from savepoint.run import Run
from savepoint.words import python, show


def run(argument: str | Path | None) -> Run:
    """The run that an argument names: a run directory, its checkpoints/, or nothing for the newest
    run.

    Raises:
        CheckpointNotFoundError: nothing there, or no run.
    """
    if argument is None:
        return Run(newest_run(Path("outputs")))
    path = manifest.local_path(argument)
    if not is_folder(path):
        raise missing(path)
    named = Run(run_directory(path))
    if not named.is_begun() and not manifest.step_files(path):
        raise CheckpointNotFoundError(
            f"Not a run directory: {path}. One with run.json or checkpoints/ was expected. "
            f"{instead(path)}",
            path,
        )
    return named


def is_folder(path: Path) -> bool:
    """Whether `path` is a directory that is no checkpoint by itself."""
    return path.is_dir() and not manifest.has_parts(path)


def run_directory(path: Path) -> Path:
    """A run directory, of which `path` may be the checkpoints/; a run may have that name too."""
    path = path.absolute()
    is_run = path.name != "checkpoints" or (path / "checkpoints").is_dir()
    return path if is_run else path.parent


def run_at(path: Path) -> Run | None:
    """The run at a path; None for a file, and for a directory of runs, even where a run in it has
    the name checkpoints.
    """
    try:
        named = run(path)
    except CheckpointNotFoundError:
        return None
    has_record = (named.directory / record.NAME).exists()
    return named if has_record or not runs_in(path) else None


def instead(directory: Path) -> str:
    """The advice for a directory that was named as a run and is not one."""
    runs = [show(run.directory) for run in runs_in(directory)]
    return f"It holds runs: {', '.join(runs[:3])}. Name one of them." if runs else "Check the path."


def file_or_latest(argument: str | None) -> Path:
    """The checkpoint that an argument names: a file, or the newest of a run."""
    if argument is not None and not is_folder(path := manifest.local_path(argument)):
        if not path.exists():
            raise missing(path, "a checkpoint or a run directory")
        return path
    return latest(run(argument))


def two_checkpoints(one: str, other: str) -> ConfigError:
    return ConfigError(
        f"Two checkpoints: {one} and {other}. A command takes one. Name one of them."
    )


def latest(run: Run) -> Path:
    """The newest checkpoint of a run."""
    if run.latest is None:
        raise CheckpointNotFoundError(
            f"No checkpoint that verifies: {run.checkpoints}. A damaged file is never loaded. "
            f"See: {run.command('-m', 'savepoint', 'verify')}",
            run.checkpoints,
        )
    return run.latest.path


def runs_in(directory: Path) -> list[Run]:
    """The runs in a directory, by name; an unreadable directory counts, as it may be a run."""
    paths = [path for path in sorted(directory.iterdir()) if not path.name.startswith(".")]
    runs = [Run(path) for path in paths if is_folder(path)]
    return [run for run in runs if not run.is_readable() or run.is_begun()]


def run_of(file: Path) -> Run | None:
    """The run that a checkpoint lies in."""
    directory = file.absolute().parent
    return Run(directory.parent) if directory.name == "checkpoints" else None


def size(path: Path) -> int | None:
    """In bytes; None where the run has deleted it since the listing."""
    try:
        found = path.lstat()
        return found.st_size if stat.S_ISREG(found.st_mode) else files.size(path)
    except FileNotFoundError:
        return None


def missing(path: Path, expected: str = "a run directory") -> CheckpointNotFoundError:
    if path.exists():
        show_it = shlex.join([python(), "-m", "savepoint", "show", str(path)])
        kind = "A checkpoint" if path.is_dir() else "A file"
        is_ours = manifest.step_in_name(path.name) is not None or path.suffix == ".ckpt"
        return CheckpointNotFoundError(
            f"{kind}, not a run directory: {path}. {expected.capitalize()} was expected. "
            f"{f'To look at it: {show_it}' if is_ours else 'Name one.'}",
            path,
        )
    known = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    near = [path.parent / name for name in difflib.get_close_matches(path.name, known, n=2)]
    by_name = Path("outputs", path)
    if by_name.exists():
        near = [by_name]
    near = [other for other in near if other != path]  # a broken link has the very name
    hint = f"Did you mean {' or '.join(map(str, near))}?" if near else "Check the path."
    return CheckpointNotFoundError(
        f"Nothing there: {path}. {expected.capitalize()} was expected. {hint}", path
    )


def newest_run(output_dir: Path) -> Path:
    """The run that was started or resumed last, by what its run.json says."""
    run_dirs = [path.parent for path in sorted(output_dir.glob(f"*/{record.NAME}"))]
    run_dirs = [path for path in run_dirs if manifest.step_files(path / "checkpoints")]
    if not run_dirs:
        raise CheckpointNotFoundError(
            f"No run with a checkpoint under: {output_dir.absolute()}. Without a path the newest "
            f"of them is meant. Name one, or start one: {python()} train.py",
            output_dir,
        )
    return max(run_dirs, key=lambda path: (Run(path).last_start(), path))


def file_or_best(argument: str | None) -> tuple[Path, str]:
    """A checkpoint file or the best one of a run, and a line that describes it. Only the seal is
    verified here; `load` verifies every byte.

    Raises:
        CheckpointNotFoundError, CheckpointCorruptError, CheckpointForeignError,
            CheckpointVersionError: about CKPT.
    """
    if argument is not None and not is_folder(manifest.local_path(argument)):
        path = file_or_latest(argument)
        which = ""
    else:
        best = run(argument).store.best()
        if best is not None:
            path = best.path
            which = f"best of the run: {best.manifest.get('monitor')} {best.score:.4f}"
        else:
            path = file_or_latest(argument)
            which = "latest of the run: none has a value of its metric"
    facts = manifest.read(path)
    line = f"{show(path)}: step {facts['step']}, epoch {facts.get('epoch')}"
    return path, f"{line} ({which})" if which else line


def load(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`store.load`, for a command that has imported no torch before."""
    with entry.importing():
        importlib.import_module("savepoint.checkpoint.format")
    return store.load(path)


def beside(path: Path, name: str) -> Path:
    """The place of what is made from a checkpoint: its run directory, or the folder of a file that
    lies in no run.
    """
    run = run_of(path)
    return (run.directory if run else path.absolute().parent) / name
