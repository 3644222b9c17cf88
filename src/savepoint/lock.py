"""The lock of a directory: one process writes there, and the kernel says which. Standard library
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

# C's struct flock, and which of its fields is the kind of the lock. Zero in all others means the
# whole file.
_FLOCK, _KIND = ("qqihh", 3) if sys.platform == "darwin" else ("hhqqi0q", 0)


class LockedDirectory:
    """A directory in which at most one process trains.

    Attributes:
        took_over: Whoever was killed while it held the lock.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self._lock: int | None = None
        self._place: os.stat_result | None = None  # of the directory, as it was locked
        self.took_over: str | None = None

    def lock(self) -> None:
        """Takes the lock for the life of this process, or raises RunLockedError naming the holder.

        A POSIX lock: the kernel drops it when the process dies, whatever its data workers do. It is
        also dropped when any descriptor of the file is closed in this process, so the file is
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
            holder = _holder(_said(descriptor, wait_secs=1))
            os.close(descriptor)
            raise self.in_use(holder) from None
        except OSError as error:  # a file system without locks
            os.close(descriptor)
            raise unwritable(path, error) from error
        said = _said(descriptor)
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "boot_id": _boot_id()}
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
        if said.strip():
            self.took_over = _holder(said)
            print(f"Taking over the lock of {self.took_over}, which is no longer running.")

    def unlock(self) -> None:
        if self._lock is not None:
            # The lock goes all the same: only the next start says one line too many.
            with contextlib.suppress(OSError):
                os.ftruncate(self._lock, 0)  # an empty file says that nobody died here
            _locked.discard(_identity(os.fstat(self._lock)))
            os.close(self._lock)
            self._lock = None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """The lock, for a command; what is said of a holder that died goes to stderr, as its output
        may be JSON.
        """
        with contextlib.redirect_stdout(sys.stderr):
            self.lock()
        try:
            yield
        finally:
            self.unlock()

    def check(self) -> None:
        """Before each save: this is still the directory that was locked.

        Raises:
            RunDirectoryError: it was moved, deleted or taken over. What was saved now would be in
                nobody's run.
        """
        if self._place is None or (
            self._lock is not None and self._is_there("lock", os.fstat(self._lock))
        ):
            return
        lost = self._lock is None or not (self.directory / "lock").exists()
        if lost and self._is_there("", self._place):
            # Somebody took a lock that is held for a stale one; where this fails, the next save
            # asks again.
            self.unlock()
            with contextlib.suppress(RunLockedError):
                self.lock()
                return
        raise RunDirectoryError(
            f"Not the run directory that this process began in any more: {self.directory} (moved, "
            "deleted or taken over). Expected it in its place. Move it back: until then nothing "
            "is saved."
        )

    def _is_there(self, name: str, was: os.stat_result) -> bool:
        try:
            return _identity((self.directory / name).stat()) == _identity(was)
        except OSError:
            return False

    def holder(self) -> str | None:
        """The process that trains here: `pid 5 on host`; None where none does.

        The kernel is asked who holds the lock; none is taken, so a training that starts now is not
        disturbed.
        """
        try:
            if _identity((self.directory / "lock").stat()) in _locked:
                return "this very process"
            descriptor = os.open(self.directory / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            asked = [0] * 5
            asked[_KIND] = fcntl.F_WRLCK
            answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, struct.pack(_FLOCK, *asked))
            held = struct.unpack(_FLOCK, answer)[_KIND] != fcntl.F_UNLCK
            return _holder(_said(descriptor, wait_secs=1)) if held else None
        finally:
            os.close(descriptor)

    def left_by(self) -> str:
        """Whoever took the lock and did not give it back, alive or dead: `pid 5 on host`; "" where
        the last one did.
        """
        path = self.directory / "lock"
        try:
            if _identity(path.stat()) in _locked:  # closing it here would drop the lock
                return "this very process"
            said = path.read_text(errors="replace")
        except OSError:
            return ""
        return _holder(said) if said.strip() else ""

    def refuse_if_held(self) -> None:
        """Before the slow imports. Whoever comes between this look and `lock` is refused there."""
        if rank() == 0 and (holder := self.holder()):
            raise self.in_use(holder)

    def in_use(self, holder: str) -> RunLockedError:
        return RunLockedError(
            f"Another process trains in this run directory: {self.directory}, held by {holder}. "
            "Expected it free. Wait for it or stop it, or start a run of another name."
        )


def unwritable(path: Path, error: OSError) -> RunDirectoryError:
    return RunDirectoryError(
        f"Cannot write the run directory: {path} ({error.strerror}). Expected a directory that "
        "this user may write, with room in it. Make it so, or begin a run in another one: "
        "--output_dir DIR"
    )


# The lock files that this process has open. A forked one inherits the list and none of the locks:
# hence its number.
_locked: set[tuple[int, int, int]] = set()


def _identity(lock: os.stat_result) -> tuple[int, int, int]:
    return os.getpid(), lock.st_dev, lock.st_ino


def _said(lock: int, *, wait_secs: float = 0) -> str:
    """What stands in a lock file. Whoever has just taken it is about to write its name."""
    until = time.monotonic() + wait_secs
    while (
        not (said := os.pread(lock, 4096, 0).decode(errors="replace")) and time.monotonic() < until
    ):
        time.sleep(0.01)
    return said


def _holder(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"pid {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "a process that left no name"


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""
