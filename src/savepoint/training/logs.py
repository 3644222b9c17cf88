"""Loggers that continue: after a resume, metrics.csv and TensorBoard show one curve, without a gap
or a doubled row.

A full disk ends no training: rows wait in memory until there is room. A checkpoint never counts a
row that is not on disk: `sync` raises, and the save fails with a message.
"""

import csv
import io
import os
import socket
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
from torch.utils.tensorboard.writer import FileWriter, SummaryWriter

from savepoint import files, tail

"""Bytes at the end of metrics.csv that hold its last row."""
OURS = ".savepoint"
"""The end of the names of a run's own event files."""


class Appender:
    """A file that only grows; bytes wait in memory while it cannot be written.

    Attributes:
        failure: The last error; None while no bytes wait.
        size: Of the file with the bytes that wait.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.failure: OSError | None = None
        self.waiting = bytearray()
        self._descriptor: int | None = None

    def write(self, data: bytes) -> None:
        self.waiting += data
        self.size += len(data)

    def flush(self) -> None:
        """Raises OSError where not all could be written; the rest waits."""
        if self._descriptor is None:
            self._descriptor = os.open(
                self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666
            )
        while self.waiting:
            written = os.write(self._descriptor, self.waiting)  # on a full disk, a part of it
            del self.waiting[:written]

    def sync(self) -> None:
        """All bytes are on disk when this returns. Raises OSError."""
        self.flush()
        assert self._descriptor is not None
        os.fsync(self._descriptor)

    def close(self) -> None:
        """The next `flush` opens the file again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def attempt(self, job: Callable[[], None]) -> None:
        """Calls `job`, which writes. Prints its first failure, and lets the training go on."""
        try:
            job()
        except OSError as error:
            if self.failure is None:
                print(
                    f"Cannot be written: {self.path} ({error.strerror}). Rows wait in memory until "
                    "there is room and permission to write. Look at that disk.",
                    file=sys.stderr,
                    flush=True,
                )
            self.failure = error
        else:
            if self.failure is not None:
                print(f"Written again, whole: {self.path}", file=sys.stderr, flush=True)
            self.failure = None


class RunCSVLogger(Logger):
    """`metrics.csv`: one row a log call, in the order of the calls; values in full precision.

    Args:
        path: Continued if it is there.
        keep_rows: The number of rows that the checkpoint counts. Later rows are cut, as the resume
            logs them again.
    """

    def __init__(self, path: Path, keep_rows: int = 0) -> None:
        super().__init__()
        self.path = path
        self._keep = keep_rows
        self.rows = keep_rows
        self._file: Appender = Appender(path)
        self._columns: list[str] = []  # of the file
        self._waiting: list[dict[str, Any]] = []
        self._started = time.monotonic()

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)  # and so `trainer.log_dir`, where profilers write

    @property
    def experiment(self) -> "RunCSVLogger":
        """What writes, as each of Lightning's loggers has it."""
        return self

    def __getattr__(self, name: str) -> Callable[..., None]:
        """A model may add its pictures to each of `self.loggers`, as Lightning's example of a GAN
        does: they are TensorBoard's matter.
        """
        if name.startswith("add_") and hasattr(SummaryWriter, name):
            return lambda *args, **kwargs: None
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def failure(self) -> OSError | None:
        """Why rows are waiting."""
        return self._file.failure

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None: ...

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._waiting.append(
            {"step": step, "time/secs": round(time.monotonic() - self._started, 3), **metrics}
        )
        self.rows += 1

    @rank_zero_only
    def save(self) -> None:
        if self._waiting or self._file.waiting:
            self._file.attempt(self._write)

    def sync(self) -> None:
        """All rows so far are on disk when this returns. Raises OSError."""
        if not self._waiting and not self._columns:
            return
        self._file.attempt(self._write_and_sync)
        if self._file.failure:
            raise self._file.failure

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._waiting or self._columns:
            self._file.attempt(self._write_and_sync)
        self._file.close()  # the test after a training logs again, and opens it

    def _write_and_sync(self) -> None:
        self._write()
        self._file.sync()

    def _write(self) -> None:
        names = chain(self._columns, *self._waiting)
        columns = list(dict.fromkeys(names))
        if not self._columns or columns != self._columns:
            self._rewrite(columns)
        text = io.StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerows(self._waiting)
        self._waiting.clear()
        self._file.write(text.getvalue().encode())
        self._file.flush()

    def _rewrite(self, columns: list[str]) -> None:
        """Writes the file anew: to cut rows, or to add a column."""
        self._file.flush()
        self._file.close()
        first = not self._columns
        kept: list[dict[str, str]] = []
        if self.path.exists():
            names, kept = read_rows(self.path)
            columns = list(dict.fromkeys([*names, *columns]))
        if first:
            kept = kept[: self._keep]
            if lost := self._keep - len(kept):
                print(
                    f"{self.path} has {len(kept)} of the {self._keep} rows that the checkpoint "
                    f"counts: {lost} are lost."
                )
                self.rows -= lost
                self._keep = len(kept)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(kept)
        # Synced, or a power cut could leave a checkpoint that counts rows of no file.
        with files.rewriting(self.path) as file:
            file.write(text.getvalue().encode())
        self._columns = columns


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and the rows of a metrics.csv."""
    with path.open(newline="", errors="replace") as file:
        names = tail.columns(file.readline())
        # A row holds only numbers, so a quote is a damaged byte. It damages no more than its row,
        # as does a cell that is longer than csv takes.
        cells = [line.rstrip("\r\n").split(",") for line in file if line.rstrip("\r\n")]
    empty: dict[str, Any] = dict.fromkeys(names)
    return names, [empty | dict(zip(names, row, strict=False)) for row in cells]


class RunTensorBoardLogger(TensorBoardLogger):
    """TensorBoard events beside the run's other files; `experiment` is torch's SummaryWriter.

    Args:
        directory: Of the run.
        keep: What `counted` gave for the checkpoint. Events beyond it are cut before the first
            write, as the resume logs them again, whatever step they were logged under.
        purge_step: In place of `keep`, for a checkpoint that does not count events: TensorBoard
            hides those of this step and later ones.
    """

    def __init__(
        self,
        directory: Path,
        keep: Mapping[str, Any] | None = None,
        purge_step: int | None = None,
    ) -> None:
        super().__init__(directory.parent, name=directory.name, version="", default_hp_metric=False)
        self._directory = directory
        self._kept: dict[str, int] = dict((keep or {}).get("files", {}))
        self._is_cut = purge_step is not None
        if purge_step is not None:
            self._kept = {
                self._relative(path): path.stat().st_size for path in event_files(directory)
            }
        self.last_step: int = (keep or {}).get("last_step", (purge_step or 0) - 1)
        self.muted = False

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        if self._experiment is None:
            self._experiment = _SummaryWriter(self)
        return self._experiment

    @property
    def failure(self) -> OSError | None:
        """Why events are waiting."""
        return next((one.file.failure for one in self._events() if one.file.failure), None)

    @rank_zero_only
    def save(self) -> None:
        """Writes only the events: config.yaml has the config."""
        if self._experiment is not None:
            self._experiment.flush()

    def sync(self) -> None:
        """Writes what it can, and raises nothing: metrics.csv is the record."""
        self.save()

    def counted(self) -> dict[str, Any]:
        """What was logged so far: the bytes of each file, and the largest step."""
        own = {self._relative(one.file.path): one.file.size for one in self._events()}
        return {"files": self._kept | own, "last_step": self.last_step}

    def cut(self) -> None:
        """Raises OSError. A crash in here costs nothing: the next resume cuts the rest."""
        if self._is_cut:
            return
        for path in event_files(self._directory):
            size = self._kept.get(self._relative(path))
            if size is None:
                path.unlink()
            elif path.stat().st_size > size:
                os.truncate(path, size)
        self._is_cut = True

    def _events(self) -> "list[_Events]":
        writer = self._experiment
        return writer.events() if isinstance(writer, _SummaryWriter) else []

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._directory).as_posix()


def event_files(directory: Path) -> list[Path]:
    """Those that a run has written, also for `add_scalars`, which makes a folder for each curve.
    Files of other writers are theirs.
    """
    found = directory.rglob(f"events.out.tfevents.*{OURS}")
    return sorted(path for path in found if path.relative_to(directory).parts[0] != "rewound")


class _Events:
    """An event file that is written at once. TensorBoard's own writer stops for ever at a full
    disk.
    """

    def __init__(self, directory: Path, logger: RunTensorBoardLogger) -> None:
        self.logger = logger
        self.file = Appender(_new_file(directory))
        self._records = RecordWriter(self.file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # A TensorBoard that has been watching hides what was cut. It takes the first START for the
        # beginning of the run, and hides nothing: a new run has one too.
        begin = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=logger.last_step + 1, session_log=begin))

    def get_logdir(self) -> str:
        return str(self.file.path.parent)

    def add_event(self, event: Event) -> None:
        if not self.logger.muted:
            self.logger.last_step = max(self.logger.last_step, event.step)
            self._write(event)

    def flush(self) -> None:
        self.file.attempt(self._flush)

    def close(self) -> None:
        self.flush()
        self.file.close()

    def _flush(self) -> None:
        self.logger.cut()
        self.file.path.parent.mkdir(parents=True, exist_ok=True)  # of add_scalars
        self.file.flush()

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())


def _new_file(directory: Path) -> Path:
    name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
    # Two starts may be of the same second, and in containers of the same pid.
    paths = (directory / f"{name}.{number}{OURS}" for number in count())
    return next(path for path in paths if not path.exists())


class _FileWriter(FileWriter):
    def __init__(self, events: _Events) -> None:
        self.event_writer = events


class _SummaryWriter(SummaryWriter):
    def __init__(self, logger: RunTensorBoardLogger) -> None:
        self._logger = logger
        self._ours: dict[str, _FileWriter] = {}
        super().__init__(str(Path(logger.log_dir)))

    def events(self) -> list[_Events]:
        return [writer.event_writer for writer in self._ours.values()]

    def add_scalars(
        self, main_tag: str, tag_scalar_dict: Mapping[str, Any], *args: Any, **more: Any
    ) -> None:
        for tag in tag_scalar_dict:  # each has a writer in a folder that torch names so
            self._writer(f"{self.log_dir}/{main_tag.replace('/', '_')}_{tag}")
        super().add_scalars(main_tag, tag_scalar_dict, *args, **more)

    def _get_file_writer(self) -> FileWriter:
        writer = self._writer(self.log_dir)
        self.file_writer = writer  # type: ignore[assignment]
        return writer

    def _writer(self, directory: str) -> _FileWriter:
        if directory not in self._ours:
            self._ours[directory] = _FileWriter(_Events(Path(directory), self._logger))
        self.all_writers = self._ours  # type: ignore[assignment]  # `close` took it away
        return self._ours[directory]
