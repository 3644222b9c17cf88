"""The run directory: its name, its lock, what is recorded in it. Every rank agrees on it; rank 0 alone writes.

config.yaml    the resolved config of the last start
run.json       id and created, then one entry a start: argv, git, versions, host, hardware, checkpoint it began from
summary.json   the result
lock           held while a process trains here
"""

import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import savepoint
from savepoint import files
from savepoint.errors import ConfigError, RunExistsError, SavepointError
from savepoint.job import rank, scheduled
from savepoint.lock import LockedDirectory, unwritable
from savepoint.words import python, show

# Set by rank 0 before the launcher starts the other ranks, which inherit it.
ENVIRONMENT_KEY = "SAVEPOINT_RUN_DIR"

LOST_AND_FOUND = "lost+found"


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


class Run(LockedDirectory):
    """One run directory."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._created = False
        self._filled = False  # it was there, and empty

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
            raise unwritable(directory, error) from error
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
                raise unwritable(directory, error) from error
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

    def taken(self, shown: Path) -> SavepointError:
        """What to say of a directory that is there, where a new one was to be made."""
        until = time.monotonic() + 1
        while not (holder := self.holder()) and not (self.directory / "run.json").exists() and time.monotonic() < until:
            time.sleep(0.01)  # without a record it may be a moment old: its maker is about to take the lock
        if holder:
            return self.in_use(holder)
        go_on = resume_command(self.directory)
        if not any((shown / "checkpoints").glob("step-*.ckpt")):
            go_on = "the same command with --resume auto (it has no checkpoint yet)"
        return RunExistsError(
            f"The run name is taken: {shown}. Expected a new one. Choose another --run_name, "
            f"or continue that run: {go_on}"
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
            raise unwritable(path, error) from error
        print(f"Damaged, set aside as run.json.corrupt: {path} ({damage}). A new record begins.")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self._write("summary.json", json.dumps(summary, indent=2) + "\n")
        try:
            (self.directory / "RESUME.txt").unlink(missing_ok=True)  # there is nothing left to continue
        except OSError as error:
            raise unwritable(self.directory / "RESUME.txt", error) from error

    def write_resume_command(self, command: str) -> None:
        self._write("RESUME.txt", command + "\n")

    def _write(self, name: str, text: str) -> None:
        path = self.directory / name
        try:
            with files.rewriting(path) as file:
                file.write(text.encode())
        except OSError as error:
            raise unwritable(path, error) from error


def resume_command(directory: Path) -> str:
    """What continues a run, to be pasted where this process was started."""
    return shlex.join([python(), show(Path(__file__).resolve().parents[2] / "resume.py"), show(directory)])


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
