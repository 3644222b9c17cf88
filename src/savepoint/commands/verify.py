"""`savepoint verify PATH...`: exit code 0 if all verify, 1 if one does not or a directory holds none, 2 for a wrong path."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from savepoint.checkpoint import manifest
from savepoint.commands import output
from savepoint.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from savepoint.words import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", metavar="FILE|RUN_DIR", nargs="+", help="checkpoints, run directories, directories of checkpoints"
    )
    parser.add_argument(
        "--deep",
        action="store_true",
        help="load each, too, and look for weights or optimizer states that are not finite",
    )


def main(arguments: argparse.Namespace) -> int:
    results: list[dict[str, Any]] = []
    empty = False
    for path in map(manifest.local_path, arguments.paths):
        before = len(results)
        for file in _files(path):
            try:
                result = check(file, deep=arguments.deep)
            except CheckpointNotFoundError:
                if file == path:
                    raise
                continue  # deleted by the run since the listing
            results.append(result)
            if not arguments.json:
                output.put(_line(result))
        if len(results) == before:
            empty = True
            print(
                printable(
                    f"savepoint verify: No checkpoint there: {path}. A directory with checkpoints/step-*.ckpt was expected. "
                    "Check the path."
                ),
                file=sys.stderr,
            )
    if arguments.json:
        output.put_json(results)
    well = all(result["verifies"] and result["finite"] is not False for result in results)
    return 0 if well and not empty else 1


def check(path: Path, *, deep: bool = False) -> dict[str, Any]:
    """What a look at every byte finds. `finite`: None where it was not looked at, or cannot be.

    Raises:
        CheckpointNotFoundError: no such file.
    """
    result: dict[str, Any] = {"file": path, "verifies": False, "not_finite": []}
    result |= dict.fromkeys(("step", "epoch", "bytes", "finite", "reason"))
    if path.is_dir():
        return result | {"reason": "a directory, not a file"}
    try:
        facts = manifest.verify(path)
        result |= {"step": facts.get("step"), "epoch": facts.get("epoch"), "bytes": path.stat().st_size}
        if deep:
            from savepoint.checkpoint import format  # torch

            result["not_finite"] = not_finite(format.decode(path))
            result["finite"] = not result["not_finite"]
        result["verifies"] = True
    except CheckpointNotFoundError:
        raise
    except CheckpointCorruptError as error:
        result["reason"] = error.reason
    except CheckpointError:
        result["reason"] = manifest.diagnose(path)
    except OSError as error:
        result["reason"] = f"cannot be read: {error.strerror}"
    return result


def not_finite(state: Mapping[str, Any]) -> list[str]:
    """The weights and optimizer states that hold a NaN or an infinity."""
    import torch

    from savepoint.checkpoint import format

    parts = {key: state.get(key) for key in ("state_dict", "optimizer_states")}
    tensors = [(key, leaf) for key, leaf in format.leaves(parts) if isinstance(leaf, torch.Tensor)]
    return [key for key, tensor in tensors if not bool(torch.isfinite(format.numbers(tensor)).all())]


def _line(result: Mapping[str, Any]) -> str:
    if not result["verifies"]:
        return f"{result['file']}: does not verify: {result['reason']}"
    if result["not_finite"]:
        first = ", ".join(result["not_finite"][:3]) + (", ..." if len(result["not_finite"]) > 3 else "")
        return f"{result['file']}: verifies, but {len(result['not_finite'])} tensors are not finite: {first}"
    finite = ", loads, is finite" if result["finite"] else ""
    return (
        f"{result['file']}: verifies: step {result['step']}, epoch {result['epoch']}, {result['bytes']} bytes{finite}"
    )


def _files(path: Path) -> list[Path]:
    """The checkpoints to look at, none in an empty directory: `last` and `best` count only as files of their own."""
    if not path.is_dir():
        return [path]
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    files = manifest.step_files(directory)
    for pointer in (directory / "last.ckpt", directory / "best.ckpt"):
        if pointer.exists() and not any(_is_same(pointer, file) for file in files):
            files.append(pointer)
    return files


def _is_same(pointer: Path, file: Path) -> bool:
    try:
        return pointer.samefile(file)
    except FileNotFoundError:  # deleted by the run since the listing
        return False
