"""The lock of a directory: one process writes there, and the kernel knows which. Standard library
only.
"""

import contextlib
import fcntl
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from savepoint import files
from savepoint.errors import RunDirectoryError, RunLockedError
from savepoint.job import rank

# The layout of C's struct flock, and the field of it that holds the kind of the lock. Zeros in all
# other fields mean the whole file.
_FLOCK, _KIND = ("qqihh", 3) if sys.platform == "darwin" else ("hhqqi0q", 0)


class LockedDirectory:
    """A directory in which at most one process trains.

    Attributes:
        took_over: The process that was killed while it held the lock.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self._lock: int | None = None
        self._place: os.stat_result | None = None  # of the directory, as it was locked
        self.took_over: str | None = None

    def lock(self) -> None:
        """Takes the lock for the life of this process, or raises RunLockedError naming the holder.

        A POSIX lock: the kernel drops it when the process dies, whatever its data workers do. The
        kernel also drops it when this process closes any descriptor of the file, so the file is
        opened here, once, and never again.
        """
        path = self.directory / "lock"
        with contextlib.suppress(OSError):
            if _identity(path.stat()) in _locked:
                raise self.in_use("this very process")
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise unwritable(self.directory, error) from error
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = _holder(_content(descriptor, wait_secs=1))
            os.close(descriptor)
            raise self.in_use(holder) from None
        except OSError as error:  # a file system without locks
            os.close(descriptor)
            raise unwritable(path, error) from error
        before = _content(descriptor)
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "boot_id": boot_id()}
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(mine).encode(), 0)
            for stale in files.stale_temps(self.directory):
                stale.unlink(missing_ok=True)
        except OSError as error:
            os.close(descriptor)
            raise unwritable(self.directory, error) from error
        self._lock = descriptor
        self._place = self.directory.stat()
        _locked.add(_identity(os.fstat(descriptor)))
        if before.strip():
            self.took_over = _holder(before)
            print(f"Taking over the lock of {self.took_over}, which is no longer running.")

    def unlock(self) -> None:
        if self._lock is not None:
            # The lock is released all the same: only the next start prints a needless line.
            with contextlib.suppress(OSError):
                os.ftruncate(self._lock, 0)  # an empty file says that nobody died here
            _locked.discard(_identity(os.fstat(self._lock)))
            os.close(self._lock)
            self._lock = None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the lock for a command. The line about a holder that died goes to stderr, as the
        command's output may be JSON.
        """
        with contextlib.redirect_stdout(sys.stderr):
            self.lock()
        try:
            yield
        finally:
            self.unlock()

    def check(self) -> None:
        """Called before each save: is this still the directory that was locked?

        Raises:
            RunDirectoryError: it was moved, deleted or taken over. A save would go to no run.
        """
        if self._place is None or (
            self._lock is not None and self._is_there("lock", os.fstat(self._lock))
        ):
            return
        lost = self._lock is None or not (self.directory / "lock").exists()
        if lost and self._is_there("", self._place):
            # Somebody deleted the lock file as a stale one. Where this fails, the next save tries
            # again.
            self.unlock()
            with contextlib.suppress(RunLockedError):
                self.lock()
                return
        raise RunDirectoryError(
            f"Not the run directory that this process began in any more: {self.directory} (moved, "
            "deleted or taken over). A checkpoint saved there would be in no run. Move it back: "
            "until then nothing is saved."
        )

    def _is_there(self, name: str, was: os.stat_result) -> bool:
        try:
            return _identity((self.directory / name).stat()) == _identity(was)
        except OSError:
            return False

    def holder(self) -> str | None:
        """The process that trains here: `pid 5 on host`; None where none does.

        The kernel names the holder without a lock being taken, so a training that starts at this
        moment is not disturbed.
        """
        try:
            if _identity((self.directory / "lock").stat()) in _locked:
                return "this very process"
            descriptor = os.open(self.directory / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            query = [0] * 5
            query[_KIND] = fcntl.F_WRLCK
            answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, struct.pack(_FLOCK, *query))
            held = struct.unpack(_FLOCK, answer)[_KIND] != fcntl.F_UNLCK
            return _holder(_content(descriptor, wait_secs=1)) if held else None
        finally:
            os.close(descriptor)

    def left_by(self) -> str:
        """The process that took the lock and did not release it, alive or dead: `pid 5 on host`;
        "" where the last one released it.
        """
        path = self.directory / "lock"
        try:
            if _identity(path.stat()) in _locked:  # closing it here would drop the lock
                return "this very process"
            text = path.read_text(errors="replace")
        except OSError:
            return ""
        return _holder(text) if text.strip() else ""

    def refuse_if_held(self) -> None:
        """Called before the slow imports; `lock` itself decides between processes that start
        together.
        """
        if rank() == 0 and (holder := self.holder()):
            raise self.in_use(holder)

    def in_use(self, holder: str) -> RunLockedError:
        return RunLockedError(
            f"Another process trains in this run directory: {self.directory}, held by {holder}. "
            "Two would overwrite each other's files. Wait for it or stop it, or start a run of "
            "another name."
        )


def unwritable(path: Path, error: OSError) -> RunDirectoryError:
    return RunDirectoryError(
        f"Cannot write the run directory: {path} ({error.strerror}). A run writes its log and "
        "checkpoints there. Make it writable, with room in it, or begin a run in another one: "
        "--output_dir DIR"
    )


# The lock files that this process has open, each with the pid: a forked process inherits this set
# and none of the locks.
_locked: set[tuple[int, int, int]] = set()


def _identity(lock: os.stat_result) -> tuple[int, int, int]:
    return os.getpid(), lock.st_dev, lock.st_ino


def _content(lock: int, *, wait_secs: float = 0) -> str:
    """The text of a lock file. A process that has just taken the lock is about to write it."""
    until = time.monotonic() + wait_secs
    while True:
        text = os.pread(lock, 4096, 0).decode(errors="replace")
        if text or time.monotonic() >= until:
            return text
        time.sleep(0.01)


def _holder(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"pid {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "a process that left no name"


def boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""
