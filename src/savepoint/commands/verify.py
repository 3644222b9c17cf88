"""`savepoint verify FILE|RUN_DIR`: exit code 0 if all verify, 1 if one does not, 2 if there is nothing to look at."""

import argparse
from pathlib import Path

from savepoint.checkpoint import manifest
from savepoint.errors import CheckpointError, CheckpointNotFoundError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", metavar="FILE|RUN_DIR", help="a checkpoint, a run directory or a directory of checkpoints"
    )


def run(arguments: argparse.Namespace) -> int:
    path = manifest.local_path(arguments.path)
    return max([_verify(file) for file in _files(path)])


def _verify(path: Path) -> int:
    try:
        facts = manifest.verify(path)
    except CheckpointNotFoundError:
        raise
    except (CheckpointError, OSError) as error:
        reason = manifest.diagnose(path) if isinstance(error, CheckpointError) else error.strerror
        print(f"{path}: does not verify: {reason}")
        return 1
    print(f"{path}: verifies: step {facts.get('step')}, epoch {facts.get('epoch')}, {path.stat().st_size} bytes")
    return 0


def _files(path: Path) -> list[Path]:
    """The checkpoints to look at: `last` and `best` count only where they are files of their own."""
    if not path.is_dir():
        return [path]
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    files = manifest.step_files(directory)
    for pointer in (directory / "last.ckpt", directory / "best.ckpt"):
        if pointer.exists() and not any(pointer.samefile(file) for file in files):
            files.append(pointer)
    if not files:
        raise CheckpointNotFoundError(
            f"No checkpoints there: {path}. A checkpoint, or a directory with checkpoints/step-*.ckpt, was expected. "
            "Check the path.",
            path,
        )
    return files
