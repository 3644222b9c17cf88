"""The run directory: its name, its lock, what is recorded in it. Every rank agrees on it; rank 0
alone writes.

config.yaml    the resolved config of the last start
run.json       id and created, then one entry a start: argv, git, versions, host, hardware,
               checkpoint it began from
summary.json   the result
lock           held while a process trains here
"""

import json
import os
import shlex
import shutil
import time
from collections.abc import Mapping
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from savepoint import files, record
from savepoint.checkpoint.manifest import step_files
from savepoint.checkpoint.store import Checkpoint, CheckpointStore
from savepoint.errors import ConfigError, RunExistsError, SavepointError
from savepoint.job import rank, scheduled
from savepoint.lock import LockedDirectory, unwritable
from savepoint.words import python, show
from savepoint.workspace import project

# Set by rank 0 before the launcher starts the other ranks, which inherit it.
ENVIRONMENT_KEY = "SAVEPOINT_RUN_DIR"

LOST_AND_FOUND = "lost+found"


def default_name(config_name: str) -> str:
    """`<config>-<job id>` under a launcher that starts every rank by itself, else
    `<config>-<yyyymmdd-hhmmss>`.
    """
    job = scheduled()
    if job == "none":
        raise ConfigError(
            "The ranks cannot agree on a run name: torchrun was given no --rdzv-id. Expected one "
            "name for all. Give --run_name NAME."
        )
    own = f"{project().name}-" if project().name else ""
    return f"{own}{config_name}-{job or datetime.now().strftime('%Y%m%d-%H%M%S')}"


def check_name(name: str) -> None:
    """Raises ConfigError where it cannot be that of a directory beside others."""
    if (
        Path(name).name != name
        or name.startswith(".")
        or "\0" in name
        or len(os.fsencode(name)) > 200
    ):
        shown = repr(name if len(name) < 80 else f"{name[:80]}...")
        raise ConfigError(
            f"Not a run name: {shown}. Expected a plain file name, 200 bytes at most. Give another "
            "one."
        )


def is_empty(directory: Path) -> bool:
    """Whether nobody has put anything there: a mounted volume, say, with no more than its file
    system's own.
    """
    try:
        return set(os.listdir(directory)) <= {LOST_AND_FOUND}
    except OSError:
        return False


State = Literal["running", "finished", "stopped", "broken"]


class Run(LockedDirectory):
    """One run directory."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._created = False
        self._filled = False  # it was there, and empty

    # -- making one -------------------------------------------------------------------------------

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
                # Without this a power cut can take the whole run, and every save that was reported
                # with it.
                files.sync_directory(run.directory.parent)
                break
            except FileExistsError:
                if run_name and is_empty(run.directory):
                    run._filled = True
                    break
                if run_name or not run.directory.is_dir():
                    raise run.taken(directory) from None
                # Two runs that started in the same second.
                run = cls(directory.with_name(f"{name}-{attempt}"))
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
        """Removes a directory that this process made and in which no training began; one that was
        empty is so again.
        """
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
        while (
            not (holder := self.holder())
            and not (self.directory / "run.json").exists()
            and time.monotonic() < until
        ):
            # Without a record it may be a moment old: its maker is about to take the lock.
            time.sleep(0.01)
        if holder:
            return self.in_use(holder)
        go_on = resume_command(self.directory)
        if not step_files(shown / "checkpoints"):
            go_on = "the same command with --resume auto (it has no checkpoint yet)"
        return RunExistsError(
            f"The run name is taken: {shown}. Expected a new one. Choose another --run_name, "
            f"or continue that run: {go_on}"
        )

    # -- looking: nothing in it is created, renamed or opened for writing -------------------------

    @cached_property
    def checkpoints(self) -> Path:
        """A directory that holds checkpoints and no run has no record; it is looked at as well."""
        below = self.directory / "checkpoints"
        return (
            below
            if os.path.isdir(below) or (self.directory / record.NAME).exists()
            else self.directory
        )

    @cached_property
    def store(self) -> CheckpointStore:
        return CheckpointStore(self.checkpoints)

    @property
    def shown(self) -> str:
        return show(self.directory)

    @property
    def name(self) -> str:
        return self.directory.name

    def is_begun(self) -> bool:
        names = (record.NAME, f"{record.NAME}.corrupt", "checkpoints", "lock")
        return any(os.path.exists(self.directory / name) for name in names)

    def is_readable(self) -> bool:
        return os.access(self.directory, os.R_OK | os.X_OK)

    @cached_property
    def latest(self) -> Checkpoint | None:
        """As it was when it was first asked for: for those who look."""
        return self.store.latest()

    def corrupt(self) -> list[Path]:
        """The checkpoints that were set aside, by name."""
        return sorted(self.checkpoints.glob("*.corrupt"))

    def state(self) -> State:
        if self.holder():
            return "running"
        if self.latest is None:
            return "broken"
        return (
            "finished" if self.latest.manifest.get("ended") and self.is_summarised() else "stopped"
        )

    def command(self, *words: str) -> str:
        """`python WORDS`, the last of them this directory."""
        return shlex.join([python(), *words, self.shown])

    # -- what is recorded -------------------------------------------------------------------------

    @property
    def record(self) -> dict[str, Any]:
        """run.json; a fresh one where there is none, or one that is damaged."""
        return record.read(self.directory)[0] or record.new(self.name)

    def record_damage(self) -> str:
        """What is wrong with run.json; "" where it is whole, or not there."""
        return record.read(self.directory)[1]

    def id(self) -> str | None:
        """None where no record says it."""
        found = record.read(self.directory)[0]
        return found["id"] if found else None

    def starts(self) -> list[dict[str, Any]]:
        return record.starts(record.read(self.directory)[0])

    def last_start(self) -> str:
        """When it was started or resumed last, as an ISO time; "" where no record says it."""
        found = record.read(self.directory)[0]
        if found is None:
            return ""
        return str([found["created"], *(start["time"] for start in record.starts(found))][-1])

    def record_start(self, before: Mapping[str, Any], config: str, **facts: Any) -> None:
        """Adds an entry to the record and writes it, with the config of this start. For the holder
        of the lock.
        """
        # From here on it is never removed, whatever becomes of its files.
        self._created = self._filled = False
        if damage := self.record_damage():  # the checkpoints hold all that a resume needs
            self._set_record_aside(damage)
        self._write(record.NAME, json.dumps(record.with_start(before, **facts), indent=2) + "\n")
        self._write("config.yaml", config)

    def _set_record_aside(self, damage: str) -> None:
        path = self.directory / record.NAME
        try:
            # A crash here leaves no record, as damage did.
            os.replace(path, path.with_name(f"{record.NAME}.corrupt"))
        except OSError as error:
            raise unwritable(path, error) from error
        print(
            f"Damaged, set aside as {record.NAME}.corrupt: {path} ({damage}). A new record begins."
        )

    def summary(self) -> dict[str, Any]:
        """summary.json; nothing where it is missing or damaged."""
        try:
            found = json.loads((self.directory / "summary.json").read_text())
        except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def is_summarised(self) -> bool:
        """Whether summary.json speaks of the newest checkpoint, not of an earlier end of this run."""
        return self.latest is not None and self.summary().get("steps") == self.latest.step

    def is_summary_damaged(self) -> bool:
        return (self.directory / "summary.json").exists() and not isinstance(
            self.summary().get("steps"), int
        )

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self._write("summary.json", json.dumps(summary, indent=2) + "\n")
        try:
            # There is nothing left to continue.
            (self.directory / "RESUME.txt").unlink(missing_ok=True)
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
    return shlex.join([python(), show(project().root / "resume.py"), show(directory)])
