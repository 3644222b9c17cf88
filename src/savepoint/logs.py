"""Loggers that continue: after a resume, metrics.csv and TensorBoard show one curve, without a gap or a doubled row."""

import csv
import io
import os
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only


class RunCSVLogger(Logger):
    """`metrics.csv`: one row a log call, in the order of the calls; values in full precision.

    Args:
        path: Continued if it is there.
        keep_rows: Rows to keep of it: those that the checkpoint counts. What a run logged after its last checkpoint is
            logged again by the resume.
    """

    def __init__(self, path: Path, keep_rows: int = 0) -> None:
        super().__init__()
        self.path, self._keep = path, keep_rows
        self._columns: list[str] = []
        self._file: io.TextIOWrapper | None = None
        self.rows = keep_rows
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

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None: ...

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": step, "time/secs": round(time.monotonic() - self._started, 3), **metrics}
        file = self._open([name for name in row if name not in self._columns])
        csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)
        self.rows += 1

    def sync(self) -> None:
        """Everything logged so far is on disk when this returns."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def save(self) -> None:
        if self._file is not None:
            self._file.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.sync()
        if self._file is not None:
            self._file.close()
        self._file, self._columns, self._keep = None, [], self.rows  # the test after a training logs again

    def _open(self, new: list[str]) -> io.TextIOWrapper:
        """The file with its header: written anew where rows are cut or a column appears, else appended to."""
        first = self._file is None
        if not first and not new:
            assert self._file is not None
            return self._file
        kept: list[dict[str, str]] = []
        if self._file is not None:
            self._file.close()
        if self.path.exists():
            with self.path.open(newline="", errors="replace") as file:
                reader = csv.DictReader(file)
                kept = [{k: v for k, v in row.items() if k is not None} for row in reader][
                    : self._keep if first else None
                ]
                self._columns = list(reader.fieldnames or [])
        if first and len(kept) < self._keep:
            print(
                f"{self.path} has {len(kept)} of the {self._keep} rows that the checkpoint counts: the others are lost."
            )
        self._columns += [name for name in new if name not in self._columns]
        self.rows = len(kept)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n", restval="")
            writer.writeheader()
            writer.writerows(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)  # a crash before this line leaves the old file whole, one after it the new one
        self._file = self.path.open("a", newline="")
        return self._file


class RunTensorBoardLogger(TensorBoardLogger):
    """TensorBoard events beside the run's other files; `purge_step` hides what a resume logs again."""

    def __init__(self, directory: Path, purge_step: int | None = None) -> None:
        super().__init__(
            directory.parent, name=directory.name, version="", purge_step=purge_step, default_hp_metric=False
        )

    @rank_zero_only
    def save(self) -> None:
        """Nothing at each log call: the config stands in config.yaml, and `sync` flushes before a checkpoint."""

    @rank_zero_only
    def sync(self) -> None:
        if self._experiment is not None:
            self._experiment.flush()
