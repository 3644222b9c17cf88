"""The run directory: its name, its lock, its records. All ranks agree on it; rank 0 alone writes.

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

# Rank 0 sets it before the launcher starts the other ranks, which inherit it.
ENVIRONMENT_KEY = "SAVEPOINT_RUN_DIR"

LOST_AND_FOUND = "lost+found"


def default_name(config_name: str) -> str:
    """`<config>-<job id>` under a launcher that starts every rank by itself, else
    `<config>-<yyyymmdd-hhmmss>`.
    """
    job = scheduled()
    if job == "none":
        raise ConfigError(
            "The ranks cannot agree on a run name: torchrun was given no --rdzv-id. All ranks "
            "train in one directory. Give --run_name NAME."
        )
    own = f"{project().name}-" if project().name else ""
    return f"{own}{config_name}-{job or datetime.now().strftime('%Y%m%d-%H%M%S')}"


def check_name(name: str) -> None:
    """Raises ConfigError for a name that no directory beside others can have."""
    is_plain = Path(name).name == name and not name.startswith(".") and "\0" not in name
    if not is_plain or len(os.fsencode(name)) > 200:
        shown = repr(name if len(name) < 80 else f"{name[:80]}...")
        raise ConfigError(
            f"Not a run name: {shown}. Expected a plain file name, 200 bytes at most. Give another "
            "one."
        )


def is_empty(directory: Path) -> bool:
    """Whether a directory holds nothing, or only what the file system of a mounted volume puts
    there.
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
        self._filled = False  # the directory existed, and was empty

    # -- making one -------------------------------------------------------------------------------

    @classmethod
    def create(cls, output_dir: str, run_name: str | None, config_name: str) -> "Run":
        """A new directory, made and locked by rank 0; the other ranks use the same one."""
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
                # Without this a power cut can take the whole run, with every save that was
                # reported.
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
        """Removes a directory that this process made and in which no training began, or empties
        one that was empty before.
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
        """The error for a run directory that exists already."""
        until = time.monotonic() + 1
        holder = self.holder()
        # Without a record it may be a moment old: the process that made it is about to lock it.
        while not holder and not (self.directory / record.NAME).exists():
            if time.monotonic() >= until:
                break
            time.sleep(0.01)
            holder = self.holder()
        if holder:
            return self.in_use(holder)
        go_on = resume_command(self.directory)
        if not step_files(shown / "checkpoints"):
            go_on = "the same command with --resume auto (it has no checkpoint yet)"
        return RunExistsError(
            f"The run name is taken: {shown}. A new run never writes into another's directory. "
            f"Choose another --run_name, or continue that run: {go_on}"
        )

    # -- looking: nothing in it is created, renamed or opened for writing -------------------------

    @cached_property
    def checkpoints(self) -> Path:
        """The directory of the checkpoints; a directory without a record may itself be one."""
        below = self.directory / "checkpoints"
        is_run = os.path.isdir(below) or (self.directory / record.NAME).exists()
        return below if is_run else self.directory

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
        """The newest checkpoint at the first call, for commands that only look."""
        return self.store.latest()

    def corrupt(self) -> list[Path]:
        """The quarantined checkpoints, by name."""
        return sorted(self.checkpoints.glob("*.corrupt"))

    def state(self) -> State:
        if self.holder():
            return "running"
        if self.latest is None:
            return "broken"
        is_finished = self.latest.manifest.get("ended") and self.is_summarised()
        return "finished" if is_finished else "stopped"

    def command(self, *words: str) -> str:
        """`python WORDS RUN_DIR`."""
        return shlex.join([python(), *words, self.shown])

    # -- what is recorded -------------------------------------------------------------------------

    @property
    def record(self) -> dict[str, Any]:
        """run.json; a fresh record where the file is missing or damaged."""
        return record.read(self.directory)[0] or record.new(self.name)

    def record_damage(self) -> str:
        """The damage of run.json, in words; "" where it is whole or missing."""
        return record.read(self.directory)[1]

    def id(self) -> str | None:
        """None without a record."""
        content = record.read(self.directory)[0]
        return content["id"] if content else None

    def starts(self) -> list[dict[str, Any]]:
        return record.starts(record.read(self.directory)[0])

    def last_start(self) -> str:
        """The ISO time of the last start or resume; "" without a record."""
        content = record.read(self.directory)[0]
        if content is None:
            return ""
        return str([content["created"], *(start["time"] for start in record.starts(content))][-1])

    def record_start(self, before: Mapping[str, Any], config: str, **facts: Any) -> None:
        """Adds an entry to the record, and writes it and the config of this start. Only the holder
        of the lock may call this.
        """
        # From here on `discard` removes nothing.
        self._created = False
        self._filled = False
        if damage := self.record_damage():  # the checkpoints hold all that a resume needs
            self._quarantine_record(damage)
        self._write(record.NAME, json.dumps(record.with_start(before, **facts), indent=2) + "\n")
        self._write("config.yaml", config)

    def _quarantine_record(self, damage: str) -> None:
        path = self.directory / record.NAME
        try:
            # A crash here leaves no record, as damage did.
            os.replace(path, path.with_name(f"{record.NAME}.corrupt"))
        except OSError as error:
            raise unwritable(path, error) from error
        print(f"Damaged, renamed to {record.NAME}.corrupt: {path} ({damage}). A new record begins.")

    def summary(self) -> dict[str, Any]:
        """summary.json; empty where the file is missing or damaged."""
        try:
            content = json.loads((self.directory / "summary.json").read_text())
        except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}

    def is_summarised(self) -> bool:
        """Whether summary.json is about the newest checkpoint, not an earlier end of this run."""
        return self.latest is not None and self.summary().get("steps") == self.latest.step

    def is_summary_damaged(self) -> bool:
        return (self.directory / "summary.json").exists() and not isinstance(
            self.summary().get("steps"), int
        )

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self._write("summary.json", json.dumps(summary, indent=2) + "\n")
        try:
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


def test_metrics(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the test has logged, under whatever names; older summaries name `test/...` alone."""
    older = [name for name in summary if name.startswith("test/")]
    return {name: summary[name] for name in summary.get("test_metrics", older) if name in summary}


def resume_command(directory: Path | str) -> str:
    """The command that continues a run, from the working directory of this process; a text is a
    URL.
    """
    named = directory if isinstance(directory, str) else show(directory)
    return shlex.join([python(), show(project().root / "resume.py"), named])
