"""How a file gets its name, durably: temporary names, renames, links, and the errors of saving.

Whenever the process dies, each function leaves under the final name either the old content or the
whole new content.
"""

import contextlib
import errno
import itertools
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from savepoint.errors import CheckpointSaveError, ConfigError

FULL = {errno.ENOSPC, errno.EDQUOT}
_ADVICE: dict[int | None, str] = {
    **dict.fromkeys(FULL, "Free some space there, or keep fewer checkpoints."),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS), "Make that directory writable, or choose another."
    ),
}
_HOST = re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())
_TEMP_NAME = re.compile(r"\..+\.tmp-(?P<host>[^-]+)-(?P<pid>\d+)-[0-9a-f]+")
# This process's own: in a container the process before may have had the same pid.
_temps_in_use: set[str] = set()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file, open for writing and reading, that becomes `path` when the block ends. If that
    fails, nothing has changed.

    Raises:
        CheckpointSaveError: the file system refuses.
    """
    with saving(path), rewriting(path) as file:
        yield file


@contextlib.contextmanager
def rewriting(path: Path) -> Iterator[BinaryIO]:
    """As `replacing`, for callers with words of their own: raises the OSError itself."""
    make_directory(path.parent)
    with _temp_for(path) as temp:
        # 0o666 less the umask, as any file of a user. A crash in here leaves a temp, which the next
        # sweep deletes.
        descriptor = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            # Without this, a power cut after the rename can leave the new name without bytes and
            # the old file gone.
            os.fsync(file.fileno())
        # A crash before this line costs the new file: the old one stands, a temp is left for the
        # next sweep. The name changes in one step, and only ever to bytes that are on disk.
        os.replace(temp, path)
    # A crash before this line costs, at a power cut only, the new name: the directory shows the old
    # file again.
    sync_directory(path.parent)


@contextlib.contextmanager
def arriving(path: Path) -> Iterator[Path]:
    """As `rewriting`, for what is looked at before it gets its name: an empty temporary file."""
    make_directory(path.parent)
    with _temp_for(path) as temp:
        temp.touch(exist_ok=False)
        yield temp
        with temp.open("rb") as file:
            os.fsync(file.fileno())
        # A crash before this line costs the new file: a temp is left for the next sweep.
        os.replace(temp, path)
    sync_directory(path.parent)


@contextlib.contextmanager
def filling(path: Path) -> Iterator[Path]:
    """As `arriving`, for a directory: an empty one, whose files are synced by those who write them.
    There is nothing at `path`, or a file.
    """
    make_directory(path.parent)
    with _temp_for(path) as temp:
        temp.mkdir()
        try:
            yield temp
            sync_directory(temp)
            # A crash before this line costs the new directory: a temp is left for the next sweep.
            if path.exists():
                _put_in_place_of_file(temp, path)
            else:
                os.rename(temp, path)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise
    sync_directory(path.parent)


def _put_in_place_of_file(directory: Path, path: Path) -> None:
    """No one system call does it."""
    with _temp_for(path) as aside:
        # A crash between these two lines costs the file too: what was saved before it is there.
        os.replace(path, aside)
        try:
            os.rename(directory, path)
        except OSError:
            os.replace(aside, path)
            raise


@contextlib.contextmanager
def shown(directory: Path) -> Iterator[Path]:
    """A file in `directory` while the block runs, for other hosts to see."""
    make_directory(directory)
    with _temp_for(directory / "shown") as temp:
        temp.touch()
        yield temp


def size(path: Path) -> int:
    """The bytes of a file, or of the files in a directory."""
    if not path.is_dir():
        return path.stat().st_size
    return sum(one.lstat().st_size for one in path.iterdir())


def delete(path: Path) -> None:
    """Deletes a file, a link or a whole directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """As `delete`; a directory goes in one step for those who look."""
    if not path.is_dir() or path.is_symlink():
        delete(path)
        return
    with _temp_for(path) as temp:
        # A crash after this line leaves a temp for the next sweep, never half of a directory under
        # its name.
        os.rename(path, temp)
        shutil.rmtree(temp)


def is_url(path: Path | str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)) is not None


def refuse_url(path: Path | str, given: str) -> None:
    """Raises ConfigError where `path`, the value of the key `given`, is a URL to save to."""
    if is_url(path):
        raise ConfigError(
            f"Nothing is saved to a URL: {given} is {path}. A directory on this machine was "
            "expected, as a save must be synced and renamed there. Give a local or a mounted one."
        )


def make_directory(directory: Path) -> None:
    """Makes a directory and its parents, and syncs their names: a power cut that loses a directory
    loses the files in it.
    """
    if not directory.is_dir():
        make_directory(directory.parent)
        directory.mkdir(exist_ok=True)
        sync_directory(directory.parent)


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a directory.
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _temp_for(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, gone at the end, renamed or not. It never ends in .ckpt."""
    temp = path.with_name(f".{path.name[:60]}.tmp-{_HOST}-{os.getpid()}-{secrets.token_hex(4)}")
    _temps_in_use.add(temp.name)
    try:
        yield temp
    finally:
        # A temp that stays is swept at the next start; the first error matters more.
        with contextlib.suppress(OSError):
            temp.unlink()
        _temps_in_use.discard(temp.name)


def is_stale_temp(path: Path, *, alone: bool) -> bool:
    """Whether `path` is a temp of a process that is dead.

    Args:
        alone: Only this process writes here. Without a lock that says so, the host and pid in the
            name decide.
    """
    match = _TEMP_NAME.fullmatch(path.name)
    if not match:
        return False
    if alone:
        return path.name not in _temps_in_use
    # The host name of a container changes at each start; a live writer wrote within the hour.
    if match["host"] != _HOST:
        return time.time() - path.stat().st_mtime > 3600
    if int(match["pid"]) == os.getpid():
        return path.name not in _temps_in_use
    try:
        os.kill(int(match["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # someone else's process: it lives
        return False
    return False


def stale_temps(directory: Path) -> list[Path]:
    """The temps of dead processes, in a directory whose lock this process holds."""
    earlier = directory.glob(".*.tmp")  # the names of earlier versions
    return [*earlier, *(path for path in directory.iterdir() if is_stale_temp(path, alone=True))]


def point(pointer: Path, target: Path, is_copy: Callable[[Path, Path], bool]) -> None:
    """Make `pointer` another name of `target`, in one step: it exists at every moment.

    Args:
        is_copy: Whether two files have the same content; called where a file system has no links.
    """
    if pointer.exists() and pointer.samefile(target):
        return
    with _temp_for(pointer) as temp:
        if not _link(target, temp):
            if is_copy(pointer, target):
                return
            if target.is_dir():  # a second copy of what may be hundreds of gigabytes
                pointer.unlink(missing_ok=True)
                return
            _copy(target, temp)
        # A crash before this line costs a pointer to an earlier checkpoint, which still exists:
        # deletions come later, and the next commit points again.
        os.replace(temp, pointer)


def try_out(directory: Path) -> None:
    """Do in `directory`, with a few bytes, all that a save will do there; no file is left.

    Raises:
        OSError: the file system refuses.
    """
    make_directory(directory)
    with _temp_for(directory / "last.ckpt") as first, _temp_for(directory / "last.ckpt") as second:
        descriptor = os.open(first, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            os.write(descriptor, b"a trial")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(first, second)
        if not _link(second, first):
            _copy(second, first)
        sync_directory(directory)


def _link(target: Path, name: Path) -> bool:
    """Make the free `name` a hard link to `target`, or a symlink where links fail. False where both
    fail.
    """
    makers: list[Callable[[Path, Path], None]] = [os.link, _symlink]
    for make in makers:
        with contextlib.suppress(OSError):
            make(target, name)
            return True
    return False


def _symlink(target: Path, link: Path) -> None:
    link.symlink_to(target.name)  # relative: the directory can be moved


def _copy(source: Path, copy: Path) -> None:
    with source.open("rb") as reader, copy.open("xb") as writer:
        shutil.copyfileobj(reader, writer)
        writer.flush()
        os.fsync(writer.fileno())


def move(path: Path, target: Path) -> Path:
    """Rename `path`, never onto a file: a name that is taken gets a number."""
    free = target
    for number in itertools.count(2):
        if not os.path.lexists(free):
            break
        free = target.with_name(f"{target.stem}.{number}{target.suffix}")
    with saving(path):
        try:
            os.replace(path, free)
        except OSError as error:
            if error.errno != errno.EXDEV:  # the directory may be a link to another disk
                raise
            # A crash in here leaves the file where it was, and perhaps a whole copy.
            if path.is_dir():
                _copy_directory(path, free)
            else:
                with replacing(free) as copy, path.open("rb") as source:
                    shutil.copyfileobj(source, copy)
            remove(path)
    return free


def _copy_directory(path: Path, copy: Path) -> None:
    with filling(copy) as directory:
        for one in path.iterdir():
            _copy(one, directory / one.name)


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turn an OSError into a CheckpointSaveError with the path, the reason and `errno`."""
    try:
        yield
    except OSError as error:
        failure = CheckpointSaveError(
            f"Saving failed: {path}: {error.strerror or error}. A save writes, renames and deletes "
            f"in {path.parent}; what was there is intact. "
            f"{_ADVICE.get(error.errno, 'Look at the disk.')}",
            path,
        )
        failure.errno = error.errno
        raise failure from error
