"""Which run or checkpoint the argument of a command means: a file, a run directory, its
checkpoints/, or the newest run.
"""

import difflib
import shlex
from pathlib import Path

from savepoint import record
from savepoint.checkpoint import manifest
from savepoint.errors import CheckpointNotFoundError
from savepoint.run import Run
from savepoint.words import python, show


def run(argument: str | Path | None) -> Run:
    """The run that is meant by the argument of a command: a run directory, its checkpoints/, or the
    newest run.

    Raises:
        CheckpointNotFoundError: nothing there, or no run.
    """
    if argument is None:
        return Run(newest_run(Path("outputs")))
    path = manifest.local_path(argument)
    if not path.is_dir():
        raise missing(path)
    # A run may be called so.
    is_run = path.absolute().name != "checkpoints" or (path / "checkpoints").is_dir()
    found = Run(path if is_run else path.absolute().parent)
    if not found.is_begun() and not manifest.step_files(path):
        raise CheckpointNotFoundError(
            f"Not a run directory: {path}. One with run.json or checkpoints/ was expected. "
            f"{instead(path)}",
            path,
        )
    return found


def run_at(path: Path) -> Run | None:
    """None of a file, and of a directory of runs, even where one of them is called checkpoints."""
    try:
        found = run(path)
    except CheckpointNotFoundError:
        return None
    has_record = (found.directory / record.NAME).exists()
    return found if has_record or not runs_in(path) else None


def instead(directory: Path) -> str:
    """What to do where this directory was named as a run, and is none."""
    held = [show(one.directory) for one in runs_in(directory)]
    return f"It holds runs: {', '.join(held[:3])}. Name one of them." if held else "Check the path."


def file_or_latest(argument: str | None) -> Path:
    """The checkpoint that is meant: a file, or the newest of a run."""
    if argument is not None and not (path := manifest.local_path(argument)).is_dir():
        if not path.exists():
            raise missing(path, "a checkpoint or a run directory")
        return path
    return latest(run(argument))


def latest(found: Run) -> Path:
    """The newest checkpoint of a run."""
    if found.latest is None:
        raise CheckpointNotFoundError(
            f"No checkpoint that verifies: {found.checkpoints}. One was expected. "
            f"See: {found.command('-m', 'savepoint', 'verify')}",
            found.checkpoints,
        )
    return found.latest.path


def runs_in(directory: Path) -> list[Run]:
    """The runs that lie in a directory, by name; also what cannot be looked into, as it may be one."""
    found = [
        Run(path)
        for path in sorted(directory.iterdir())
        if not path.name.startswith(".") and path.is_dir()
    ]
    return [one for one in found if not one.is_readable() or one.is_begun()]


def run_of(file: Path) -> Run | None:
    """The run that a checkpoint lies in."""
    directory = file.absolute().parent
    return Run(directory.parent) if directory.name == "checkpoints" else None


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
    by_name = Path("outputs", path)
    if by_name.exists():
        near = [by_name]
    near = [one for one in near if one != path]  # a link that leads nowhere has the very name
    hint = f"Did you mean {' or '.join(map(str, near))}?" if near else "Check the path."
    return CheckpointNotFoundError(
        f"Nothing there: {path}. {expected.capitalize()} was expected. {hint}", path
    )


def newest_run(output_dir: Path) -> Path:
    """The run that was started or resumed last, by what its run.json says."""
    found = [path.parent for path in sorted(output_dir.glob(f"*/{record.NAME}"))]
    runs = [
        (Run(run_dir).last_start(), run_dir)
        for run_dir in found
        if manifest.step_files(run_dir / "checkpoints")
    ]
    if not runs:
        raise CheckpointNotFoundError(
            f"No run with a checkpoint under: {output_dir}. Expected one to continue. Start one: "
            "python train.py",
            output_dir,
        )
    return max(runs)[1]


def file_or_best(argument: str | None) -> tuple[Path, str]:
    """The checkpoint, and in words which one it is. Its seal is looked at, every byte when it is
    loaded.

    Raises:
        CheckpointNotFoundError, CheckpointCorruptError, CheckpointForeignError,
            CheckpointVersionError: about CKPT.
    """
    if argument is not None and not manifest.local_path(argument).is_dir():
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
    said = f"{path}: step {facts['step']}, epoch {facts.get('epoch')}"
    return path, f"{said} ({which})" if which else said


def beside(path: Path, name: str) -> Path:
    """Where something made from a checkpoint goes: into its run directory, beside a file that lies
    in none.
    """
    found = run_of(path)
    return (found.directory if found else path.absolute().parent) / name
