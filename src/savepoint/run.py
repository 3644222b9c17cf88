"""The run directory: its name, its lock, what is recorded in it. Every rank agrees on it; rank 0 alone writes.

config.yaml    the resolved config of the last start
run.json       id and created, then one entry a start: argv, git, versions, host, hardware, checkpoint it began from
summary.json   the result
lock           held while a process trains here
"""

import contextlib
import fcntl
import json
import os
import platform
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import savepoint
from savepoint.checkpoint import files
from savepoint.errors import ConfigError, RunDirectoryError, RunExistsError, RunLockedError, SavepointError

# Set by rank 0 before the launcher starts the other ranks, which inherit it.
ENVIRONMENT_KEY = "SAVEPOINT_RUN_DIR"

LOST_AND_FOUND = "lost+found"

# C's struct flock, and which of its fields is the kind of the lock; all others are 0 for the whole file.
_FLOCK, _KIND = ("qqihh", 3) if sys.platform == "darwin" else ("hhqqi0q", 0)


def rank() -> int:
    """Of this process, as its launcher says; 0 where there is none."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_PROCID") or 0)


def scheduled() -> str | None:
    """The id of the job, where a scheduler or torchrun starts this process: the same on every rank and after a requeue."""
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")


def requeued() -> bool:
    """Whether SLURM has started this very job before: the same command is to go on, not to begin again."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def default_name(config_name: str) -> str:
    """`<config>-<job id>` under a launcher that starts every rank by itself, else `<config>-<yyyymmdd-hhmmss>`."""
    job = scheduled()
    if job == "none":
        raise ConfigError(
            "The ranks cannot agree on a run name: torchrun was given no --rdzv-id. Expected one name for all. "
            "Give --run_name NAME."
        )
    return f"{_project()}{config_name}-{job or datetime.now().strftime('%Y%m%d-%H%M%S')}"


def check_name(name: str) -> None:
    """Raises ConfigError where it cannot be that of a directory beside others."""
    if Path(name).name != name or name.startswith(".") or "\0" in name or len(os.fsencode(name)) > 200:
        shown = repr(name if len(name) < 80 else f"{name[:80]}...")
        raise ConfigError(f"Not a run name: {shown}. Expected a plain file name, 200 bytes at most. Give another one.")


def is_empty(directory: Path) -> bool:
    """Whether nobody has put anything there: a mounted volume, say, with no more than its file system's own."""
    try:
        return set(os.listdir(directory)) <= {LOST_AND_FOUND}
    except OSError:
        return False


def _project() -> str:
    """`cats-` in a copy of that name, as `make new` stamped it; empty in the template."""
    try:
        return f"{json.loads((Path(__file__).parents[2] / '.template.json').read_text())['name']}-"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


class Run:
    """One run directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self._lock: int | None = None
        self._place: os.stat_result | None = None  # of the directory, as it was locked
        self._created = False
        self._filled = False  # it was there, and empty
        self.took_over: str | None = None  # whoever was killed while it held the lock

    # -- making one --------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, output_dir: str, run_name: str | None, config_name: str) -> "Run":
        """A new directory, made by rank 0 and locked; the other ranks take the one that it made."""
        if rank() and (inherited := os.environ.get(ENVIRONMENT_KEY)):
            return cls(Path(inherited))
        files.refuse_url(output_dir, "output_dir")
        name = run_name or default_name(config_name)
        check_name(name)
        directory = Path(output_dir) / name
        run = cls(directory)
        if rank():
            return run
        try:
            files.make_directory(run.directory.parent)
        except OSError as error:
            raise _unwritable(directory, error) from error
        for attempt in range(2, 100):
            try:
                run.directory.mkdir()
                # Without this a power cut can take the whole run, and every save that was reported with it.
                files.sync_directory(run.directory.parent)
                break
            except FileExistsError:
                if run_name and is_empty(run.directory):
                    run._filled = True
                    break
                if run_name or not run.directory.is_dir():
                    raise run.taken(directory) from None
                run = cls(directory.with_name(f"{name}-{attempt}"))  # two runs that started in the same second
            except OSError as error:
                raise _unwritable(directory, error) from error
        run._created = not run._filled
        run.lock()
        os.environ[ENVIRONMENT_KEY] = str(run.directory)
        return run

    @classmethod
    def open(cls, directory: Path) -> "Run":
        """An existing directory, locked by rank 0."""
        run = cls(directory)
        if rank() == 0:
            run.lock()
            os.environ[ENVIRONMENT_KEY] = str(run.directory)
        return run

    def discard(self) -> None:
        """Removes a directory that this process made and in which no training began; one that was empty is so again."""
        if self._created:
            shutil.rmtree(self.directory, ignore_errors=True)
        elif self._filled:
            for path in [path for path in self.directory.iterdir() if path.name != LOST_AND_FOUND]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            return
        os.environ.pop(ENVIRONMENT_KEY, None)

    # -- the lock ----------------------------------------------------------------------------------------------------

    def lock(self) -> None:
        """Takes the lock for the life of this process, or raises RunLockedError naming the holder.

        A POSIX lock: the kernel drops it when the process dies, whatever its data workers do. It is also dropped when
        any descriptor of the file is closed in this process, so the file is opened here, once, and never again.
        """
        path = self.directory / "lock"
        with contextlib.suppress(OSError):
            if _identity(path.stat()) in _locked:
                raise self._in_use("this very process")
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise _unwritable(self.directory, error) from error
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = _holder(_said(descriptor, wait_secs=1))
            os.close(descriptor)
            raise self._in_use(holder) from None
        except OSError as error:  # a file system without locks
            os.close(descriptor)
            raise _unwritable(path, error) from error
        said = _said(descriptor)
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "boot_id": _boot_id()}
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(mine).encode(), 0)
            for stale in self.directory.glob(".*.tmp"):  # of a process that died here; we hold the lock
                stale.unlink(missing_ok=True)
        except OSError as error:
            os.close(descriptor)
            raise _unwritable(self.directory, error) from error
        self._lock, self._place = descriptor, self.directory.stat()
        _locked.add(_identity(os.fstat(descriptor)))
        if said.strip():
            self.took_over = _holder(said)
            print(f"Taking over the lock of {self.took_over}, which is no longer running.")

    def unlock(self) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):  # the lock goes all the same: only the next start says one line too many
                os.ftruncate(self._lock, 0)  # an empty file says that nobody died here
            _locked.discard(_identity(os.fstat(self._lock)))
            os.close(self._lock)
            self._lock = None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """The lock, for a command; what is said of a holder that died goes to stderr, as its output may be JSON."""
        with contextlib.redirect_stdout(sys.stderr):
            self.lock()
        try:
            yield
        finally:
            self.unlock()

    def check(self) -> None:
        """Before each save: this is still the directory that was locked.

        Raises:
            RunDirectoryError: it was moved, deleted or taken over. What was saved now would be in nobody's run.
        """
        if self._place is None or (self._lock is not None and self._is_there("lock", os.fstat(self._lock))):
            return
        lost = self._lock is None or not (self.directory / "lock").exists()
        if lost and self._is_there("", self._place):
            self.unlock()  # somebody took a lock that is held for a stale one; where this fails, the next save asks again
            with contextlib.suppress(RunLockedError):
                self.lock()
                return
        raise RunDirectoryError(
            f"Not the run directory that this process began in any more: {self.directory} (moved, deleted or taken over). "
            "Expected it in its place. Move it back: until then nothing is saved."
        )

    def _is_there(self, name: str, was: os.stat_result) -> bool:
        try:
            return _identity((self.directory / name).stat()) == _identity(was)
        except OSError:
            return False

    def holder(self) -> str | None:
        """The process that trains here: `pid 5 on host`; None where none does.

        The kernel is asked who holds the lock; none is taken, so a training that starts now is not disturbed.
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
        """Whoever took the lock and did not give it back, alive or dead: `pid 5 on host`; "" where the last one did."""
        path = self.directory / "lock"
        try:
            if _identity(path.stat()) in _locked:  # closing it here would drop the lock
                return "this very process"
            said = path.read_text(errors="replace")
        except OSError:
            return ""
        return _holder(said) if said.strip() else ""

    def taken(self, shown: Path) -> SavepointError:
        """What to say of a directory that is there, where a new one was to be made."""
        until = time.monotonic() + 1
        while not (holder := self.holder()) and not (self.directory / "run.json").exists() and time.monotonic() < until:
            time.sleep(0.01)  # without a record it may be a moment old: its maker is about to take the lock
        if holder:
            return self._in_use(holder)
        go_on = resume_command(self.directory)
        if not any((shown / "checkpoints").glob("step-*.ckpt")):
            go_on = "the same command with --resume auto (it has no checkpoint yet)"
        return RunExistsError(
            f"The run name is taken: {shown}. Expected a new one. Choose another --run_name, "
            f"or continue that run: {go_on}"
        )

    def refuse_if_held(self) -> None:
        """Before the slow imports. Whoever comes between this look and `lock` is refused there."""
        if rank() == 0 and (holder := self.holder()):
            raise self._in_use(holder)

    def _in_use(self, holder: str) -> RunLockedError:
        return RunLockedError(
            f"Another process trains in this run directory: {self.directory}, held by {holder}. "
            "Expected it free. Wait for it or stop it, or start a run of another name."
        )

    # -- what is recorded --------------------------------------------------------------------------------------------

    @property
    def record(self) -> dict[str, Any]:
        """run.json; a fresh one where there is none, or one that is damaged."""
        new = {"id": uuid.uuid4().hex, "name": self.directory.name, "created": _now(), "starts": []}
        return self._read_record()[0] or new

    def record_damage(self) -> str:
        """What is wrong with run.json; "" where it is whole, or not there."""
        return self._read_record()[1]

    def made(self, run_id: str | None) -> bool | None:
        """Whether a checkpoint that names this id is of this run; None where no record says so."""
        found = self._read_record()[0]
        return None if found is None else bool(found["id"] == run_id)

    def _read_record(self) -> tuple[dict[str, Any] | None, str]:
        try:
            found = json.loads((self.directory / "run.json").read_text())
            if not isinstance(found, dict) or not {"id", "name", "created", "starts"} <= found.keys():
                raise ValueError("not a record of a run")
            if not isinstance(found["starts"], list):
                raise ValueError("its starts are no list")
        except FileNotFoundError:
            return None, ""
        except (ValueError, RecursionError, IsADirectoryError) as error:
            return None, str(error)
        return found, ""

    def record_start(self, record: Mapping[str, Any], config: str, **facts: Any) -> None:
        """Adds an entry to `record` and writes it, with the config of this start. For the holder of the lock."""
        self._created = self._filled = False  # from here on it is never removed, whatever becomes of its files
        if damage := self.record_damage():  # the checkpoints hold all that a resume needs
            self._set_record_aside(damage)
        entry = {"time": _now(), "argv": sys.argv, "git": _git(), "versions": _versions(), "host": socket.gethostname()}
        entry |= {"hardware": f"{platform.machine()}, {os.cpu_count()} cores"} | facts
        self._write("run.json", json.dumps({**record, "starts": [*record["starts"], entry]}, indent=2) + "\n")
        self._write("config.yaml", config)

    def _set_record_aside(self, damage: str) -> None:
        path = self.directory / "run.json"
        try:
            os.replace(
                path, path.with_name("run.json.corrupt")
            )  # a crash after this line leaves no record, as damage did
        except OSError as error:
            raise _unwritable(path, error) from error
        print(f"Damaged, set aside as run.json.corrupt: {path} ({damage}). A new record begins.")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self._write("summary.json", json.dumps(summary, indent=2) + "\n")
        try:
            (self.directory / "RESUME.txt").unlink(missing_ok=True)  # there is nothing left to continue
        except OSError as error:
            raise _unwritable(self.directory / "RESUME.txt", error) from error

    def write_resume_command(self, command: str) -> None:
        self._write("RESUME.txt", command + "\n")

    def _write(self, name: str, text: str) -> None:
        path = self.directory / name
        temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)  # a crash before this line leaves the old file, one after it the new one
        except OSError as error:
            with contextlib.suppress(OSError):  # what stays is swept at the next start; the first error matters more
                temporary.unlink()
            raise _unwritable(path, error) from error


def show(directory: Path) -> str:
    """The directory as a person would type it here."""
    with contextlib.suppress(FileNotFoundError):  # the working directory may be deleted while a run trains
        return os.path.relpath(directory) if directory.is_relative_to(Path.cwd()) else str(directory)
    return str(directory)


def python() -> str:
    """The interpreter of this process as a person would type it here: `.venv/bin/python` after a `make train`."""
    executable = Path(sys.executable)
    if (shown := show(executable)) != str(executable):
        return shown
    found = shutil.which("python")  # which may be another one
    return "python" if found and Path(found).parent == executable.parent else str(executable)


def resume_command(directory: Path) -> str:
    """What continues a run, to be pasted where this process was started."""
    return shlex.join([python(), show(Path(__file__).resolve().parents[2] / "resume.py"), show(directory)])


def plural(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _unwritable(path: Path, error: OSError) -> RunDirectoryError:
    return RunDirectoryError(
        f"Cannot write the run directory: {path} ({error.strerror}). Expected a directory that this user may write, "
        "with room in it. Make it so, or begin a run in another one: --output_dir DIR"
    )


# The lock files that this process has open. A forked one inherits the list and none of the locks: hence its number.
_locked: set[tuple[int, int, int]] = set()


def _identity(lock: os.stat_result) -> tuple[int, int, int]:
    return os.getpid(), lock.st_dev, lock.st_ino


def _said(lock: int, *, wait_secs: float = 0) -> str:
    """What stands in a lock file. Whoever has just taken it is about to write its name."""
    until = time.monotonic() + wait_secs
    while not (said := os.pread(lock, 4096, 0).decode(errors="replace")) and time.monotonic() < until:
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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git() -> dict[str, Any] | None:
    def ask(*arguments: Sequence[str] | str) -> str | None:
        here = Path(__file__).parent
        try:
            done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10)  # type: ignore[list-item]
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    return None if commit is None else {"commit": commit, "dirty": bool(ask("status", "--porcelain"))}


def _versions() -> dict[str, str]:
    names = ("torch", "torchvision", "lightning", "torchmetrics", "numpy")
    found = {"python": platform.python_version(), "savepoint": savepoint.__version__}
    for distribution in names:
        try:
            found[distribution] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return found
