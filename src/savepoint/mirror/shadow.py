"""What a mirror holds, as a directory: the commands that only look read it like any other.

A checkpoint in it has its size and its end, which is what a listing reads; the rest are holes. A
command that looks at every byte asks for whole ones.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from savepoint import record
from savepoint.checkpoint.claims import SHARD_NAME
from savepoint.checkpoint.manifest import COMMON, STEP_NAME
from savepoint.errors import CheckpointCorruptError, CheckpointNotFoundError
from savepoint.mirror import held
from savepoint.mirror.remote import Ranged, Remote, connect

_RECORDS = (record.NAME, "config.yaml", "summary.json", "metrics.csv")


@dataclass(frozen=True)
class Shadow:
    """The copy of what a URL names.

    Attributes:
        path: Of the copy.
        directory: Stands for `url`, and so does all below it.
    """

    path: Path
    directory: Path
    url: str


def shadow(
    url: str, directory: Path, *, whole: bool = False, records: bool = True, beside: bool = False
) -> Shadow:
    """Copies what a URL names into an empty directory: a mirror, a run in it, or a checkpoint.

    Args:
        whole: The checkpoints with all their bytes.
        records: The other files of a run too.
        beside: The other runs of the mirror too, without their bytes.

    Raises:
        CheckpointNotFoundError: nothing there.
        MirrorError: the mirror cannot be reached.
    """
    url = url.rstrip("/").removesuffix(f"/{held.CHECKPOINTS}")
    place, _, name = url.rpartition("/")
    if STEP_NAME.fullmatch(name):
        return Shadow(_file(url, directory, whole=whole), directory, place)
    remote = connect(place, "the path")
    inside = remote.names(name)
    if not inside:
        raise CheckpointNotFoundError(
            f"Nothing there: {url}. A mirror, a run in it, or one of its checkpoints was "
            "expected. Check the URL.",
            directory,
        )
    if held.CHECKPOINTS not in inside:
        remote = connect(url, "the path")
        for one in inside:
            _run(remote, one, directory, whole=whole, records=records)
        return Shadow(directory, directory, url)
    _run(remote, name, directory, whole=whole, records=records)
    for one in remote.names() if beside else ():
        if one != name:
            _run(remote, one, directory, whole=False, records=records)
    return Shadow(directory / name, directory, place)


def _run(remote: Remote, name: str, into: Path, *, whole: bool, records: bool) -> None:
    files = remote.names(f"{name}/{held.CHECKPOINTS}")
    if not files:
        return
    directory = into / name
    (directory / held.CHECKPOINTS).mkdir(parents=True)
    for file in _RECORDS if records else ():
        with contextlib.suppress(FileNotFoundError):
            (directory / file).write_bytes(remote.read(f"{name}/{file}"))
    for file, size in files.items():
        if STEP_NAME.fullmatch(file):
            path = directory / held.CHECKPOINTS / file
            _checkpoint(remote, held.key(name, file), size, path, whole=whole)


def _file(url: str, directory: Path, *, whole: bool) -> Path:
    place, _, name = url.rpartition("/")
    remote = connect(place, "the path")
    there = remote.names()
    if name not in there:
        raise CheckpointNotFoundError(
            f"Nothing there: {url}. A checkpoint was expected. Check the URL.", directory
        )
    _checkpoint(remote, name, there[name], directory / name, whole=whole)
    return directory / name


def _checkpoint(remote: Remote, key: str, size: int | None, path: Path, *, whole: bool) -> None:
    if size is not None:
        _copy(remote, key, size, path, whole=whole)
        return
    inside = remote.names(key)
    if COMMON not in inside:  # it is being uploaded, or that was cut off
        return
    path.mkdir()
    for part, bytes_of_part in inside.items():
        if bytes_of_part is not None and (part == COMMON or SHARD_NAME.fullmatch(part)):
            _copy(remote, f"{key}/{part}", bytes_of_part, path / part, whole=whole)


def _copy(remote: Remote, key: str, size: int, path: Path, *, whole: bool) -> None:
    path.touch()
    if whole:
        remote.download(key, size, path)
        return
    there = Ranged(remote, key, size)
    with contextlib.suppress(CheckpointCorruptError):  # the copy is found out in the same way
        held.sealed(there, key)
    with path.open("r+b") as file:
        file.truncate(size)
        for start, data in there.seen:
            file.seek(start)
            file.write(data)
