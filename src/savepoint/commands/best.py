"""What CKPT means to those who use a trained model: a file, or a run's best checkpoint, the one that its test looked at."""

from pathlib import Path

from savepoint.checkpoint import manifest
from savepoint.commands import rundir


def file_or_best(argument: str | None) -> tuple[Path, str]:
    """The checkpoint, and in words which one it is. Its seal is looked at, every byte when it is loaded.

    Raises:
        CheckpointNotFoundError, CheckpointCorruptError, CheckpointForeignError, CheckpointVersionError: about CKPT.
    """
    if argument is not None and not manifest.local_path(argument).is_dir():
        path, which = rundir.file_or_latest(argument), ""
    else:
        run = rundir.find(argument)
        if best := run.store.best():
            path, which = best.path, f"best of the run: {best.manifest.get('monitor')} {best.score:.4f}"
        else:
            path, which = rundir.file_or_latest(argument), "latest of the run: none has a value of its metric"
    facts = manifest.read(path)
    said = f"{path}: step {facts['step']}, epoch {facts.get('epoch')}"
    return path, f"{said} ({which})" if which else said


def beside(path: Path, name: str) -> Path:
    """Where something made from a checkpoint goes: into its run directory, beside a file that lies in none."""
    run = rundir.run_of(path)
    return (run.path if run else path.absolute().parent) / name
