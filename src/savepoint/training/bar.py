"""The bar of a terminal: one line, however narrow, below all that is printed while a run trains. In
a notebook an element below the cell stands for the line.
"""

import os
import sys
import threading
import time
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from savepoint.training import notebook
from savepoint.training.progress import Clock, Lines, Meter, of
from savepoint.words import number, printable

EVERY_SECS = 0.1
SPARE = 3  # columns that stay free: for the ^C that a terminal shows where somebody types it
WIDEST = 30  # of the bar itself
NARROWEST = 8
LONGEST_NAME = 24
CLEAR = "\r\x1b[K"


def display(meter: Meter, *, wants_bar: bool = True) -> dict[str, Any]:
    """Arguments of a Trainer: a bar where the output is a terminal or a notebook, else lines."""
    if wants_bar and notebook.is_attached():
        return {"callbacks": [meter, Bar(meter, notebook.Element())], "enable_model_summary": False}
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    if wants_bar and is_terminal and os.environ.get("TERM") != "dumb":
        return {"callbacks": [meter, Bar(meter)]}
    return {
        "callbacks": [meter, Lines(meter)],
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


class Bar(ProgressBar):
    """Where the training is, the time that is left, metrics with `prog_bar`, samples/s: as much as
    fits, in this order.
    """

    def __init__(self, meter: Meter, line: "StatusLine | notebook.Element | None" = None) -> None:
        super().__init__()
        self.meter = meter
        self.clock = Clock()
        self._line = line or StatusLine()
        self._is_enabled = True
        self._drawn = 0.0
        self._metrics: list[str] = []

    def enable(self) -> None:
        self._is_enabled = True

    def disable(self) -> None:
        self._is_enabled = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self._is_enabled:
            self._line.open()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._line.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._line.close()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.begin(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show_training(trainer, 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._is_due():
            shown = self.get_metrics(trainer, pl_module).items()
            self._metrics = [f"{shortened(name)} {_value(value)}" for name, value in shown]
            self._show_training(trainer, batch_idx + 1)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not self._is_due():
            return
        totals: Any = trainer.num_val_batches
        what = ["validation"]
        if trainer.sanity_checking:
            totals = trainer.num_sanity_val_batches
            what = ["sanity check"]
        elif trainer.state.fn == "fit":
            what = [self._epoch(trainer), "validation"]
        self._show(what, batch_idx + 1, totals[dataloader_idx], self._metrics)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._is_due():
            totals: Any = trainer.num_test_batches
            self._show(["test"], batch_idx + 1, totals[dataloader_idx])

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._is_due():
            totals: Any = trainer.num_predict_batches
            self._show(["predict"], batch_idx + 1, totals[dataloader_idx])

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    def _is_due(self) -> bool:
        return self._is_enabled and time.monotonic() - self._drawn >= EVERY_SECS

    def _epoch(self, trainer: Trainer) -> str:
        # From 1, as the lines beside the bar count.
        return f"epoch {trainer.current_epoch + 1}{of(trainer.max_epochs)}"

    def _show_training(self, trainer: Trainer, done: int) -> None:
        facts = [self.clock.left(trainer, done), *self._metrics]
        if self.meter.samples_per_sec:
            facts.append(self.meter.speed)
        self._show([self._epoch(trainer)], done, trainer.num_training_batches, facts)

    def _show(
        self, what: Sequence[str], done: int, total: float, facts: Sequence[str] = ()
    ) -> None:
        self._drawn = time.monotonic()
        self._line.draw(what, done, total, facts)


def line(what: Sequence[str], done: int, total: float, facts: Sequence[str], columns: int) -> str:
    """`what` and the number of batches, a bar in the room that is left over, and of the facts those
    that fit: the first before the others.
    """
    digits = len(str(total))
    batches = f"{done:>{digits}}/{total}"
    if total == float("inf"):
        batches = f"batch {done}"
    kept = [*what, batches]
    used = width("  ".join(kept))
    for fact in filter(None, map(_in_a_line, facts)):
        if used + 2 + width(fact) <= columns:
            kept.append(fact)
            used += 2 + width(fact)
    room = min(WIDEST, columns - used - 2)
    if room >= NARROWEST and total and total != float("inf"):
        kept.insert(len(what) + 1, _bar(done / total, room))
    return cut("  ".join(kept), columns)


def _bar(share: float, columns: int) -> str:
    full = round(columns * min(1.0, share))
    return "#" * full + "-" * (columns - full)


def _in_a_line(text: str) -> str:
    return printable(text).replace("\n", " ")


def _value(value: Any) -> str:
    return number(value) if isinstance(value, int | float) else str(value)


def shortened(name: str) -> str:
    """A name of a metric by its end, which tells it from others."""
    return name if len(name) <= LONGEST_NAME else f"..{name[2 - LONGEST_NAME :]}"


def width(text: str) -> int:
    """In columns of a terminal, where letters of the East take two."""
    return sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text)


def cut(text: str, columns: int) -> str:
    while width(text) > columns:
        text = text[:-1]
    return text


# -- a line below others -------------------------------------------------------------------------


class StatusLine:
    """The last line of the terminal. While it is open, what is printed to standard output and
    error goes above it.
    """

    def __init__(self) -> None:
        self.text = ""
        self.lock = threading.RLock()  # a thread may write a checkpoint, and say so
        self._owner = 0  # the process; a worker of a loader inherits these objects
        self._terminal = sys.stdout
        self._is_shown = False
        self._is_free = True  # whether others have ended their last line

    def open(self) -> None:
        if self._owner:
            return
        self._owner = os.getpid()
        self._terminal = sys.stdout
        self._is_free = True
        sys.stdout = _Above(sys.stdout, self)
        if sys.stderr is not None and sys.stderr.isatty():
            sys.stderr = _Above(sys.stderr, self)

    def close(self) -> None:
        if not self._owner:
            return
        with self.lock:
            self.clear()
            self.text = ""
        self._owner = 0
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if isinstance(stream, _Above) and stream.line is self:
                setattr(sys, name, stream.stream)

    def is_mine(self) -> bool:
        return self._owner == os.getpid()

    def columns(self) -> int:
        try:
            return os.get_terminal_size(self._terminal.fileno()).columns or 80
        except OSError:  # it is gone
            return 80

    def draw(self, what: Sequence[str], done: int, total: float, facts: Sequence[str]) -> None:
        self.show(line(what, done, total, facts, self.columns() - SPARE))

    def show(self, text: str) -> None:
        if not self.is_mine():
            return
        with self.lock:
            self.text = text
            self._draw()

    def clear(self) -> None:
        if self._is_shown:
            self._terminal.write(CLEAR)
            self._terminal.flush()
            self._is_shown = False

    def written(self, text: str) -> None:
        """Others have written `text`."""
        self._is_free = text.endswith("\n") if text else self._is_free
        self._draw()

    def _draw(self) -> None:
        if self._is_free and self.text:
            self._terminal.write(CLEAR + self.text)
            self._terminal.flush()
            self._is_shown = True


class _Above:
    """A stream of text to the terminal of a status line."""

    def __init__(self, stream: TextIO, line: StatusLine) -> None:
        self.stream = stream
        self.line = line

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stream)

    def write(self, text: str) -> int:
        if not self.line.is_mine():
            return self.stream.write(text)
        with self.line.lock:
            self.line.clear()
            written = self.stream.write(text)
            self.stream.flush()
            self.line.written(text)
        return written

    def writelines(self, lines: Sequence[str]) -> None:
        for one in lines:
            self.write(one)
