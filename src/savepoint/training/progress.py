"""The display while a run trains: a bar on a terminal, one line for each epoch in a log file."""

import math
import sys
import time
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, RichProgressBar
from torch import Tensor

from savepoint.words import plural

QUIET_SECS = 30.0  # after this time without a line, a line shows that the training is alive


class Meter(Callback):
    """Counts samples and seconds of training, over all starts of the run. All values depend on the
    clock.
    """

    def __init__(self) -> None:
        # Of earlier starts.
        self._samples = 0
        self._secs = 0.0
        # Of this start.
        self._samples_now = 0
        self._began = 0.0
        self._ended = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self._samples + self._samples_now, "secs": self.fit_secs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._samples = state_dict["samples"]
        self._secs = state_dict["secs"]

    @property
    def fit_secs(self) -> float:
        """Of all starts."""
        return self._secs + self._passed

    @property
    def goes_on(self) -> bool:
        """Whether there were starts before this one."""
        return self._secs > 0

    @property
    def samples_per_sec(self) -> float:
        """Of this start, validation included."""
        return self._samples_now / self._passed if self._passed else 0.0

    @property
    def speed(self) -> str:
        return f"{self.samples_per_sec:.0f} samples/s"

    @property
    def overall_samples_per_sec(self) -> float:
        """Of all starts, as `fit_secs` is."""
        return (self._samples + self._samples_now) / self.fit_secs if self.fit_secs else 0.0

    @property
    def _passed(self) -> float:
        return (self._ended or time.monotonic()) - self._began if self._began else 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples_now += self.samples_in(batch) * trainer.world_size

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = time.monotonic()

    @staticmethod
    def samples_in(batch: Any) -> int:
        first = batch[0] if isinstance(batch, Sequence) and batch else batch
        return len(first) if isinstance(first, Tensor) and first.ndim else 0


class Bar(RichProgressBar):
    """Lightning's rich bar with samples/s."""

    def __init__(self, meter: Meter) -> None:
        super().__init__(leave=False)
        self.meter = meter

    def _get_train_description(self, current_epoch: int) -> str:
        # From 1, as the lines beside the bar count.
        return f"Epoch {current_epoch + 1}{_of(self.trainer.max_epochs)}"

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        number, unit = self.meter.speed.split()
        return metrics | {unit: number}


class Lines(Callback):
    """Prints one line for each epoch, where the output is no terminal."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self._epoch = -1
        self._spoke = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch = trainer.current_epoch
        self._first = trainer.current_epoch
        self._started = time.monotonic()
        self._spoke = self._started
        if trainer.is_global_zero:
            place = f"step {trainer.global_step}, epoch {trainer.current_epoch}"
            number = trainer.num_training_batches
            batches = "a stream" if number == math.inf else plural(int(number), "batch", "es")
            print(f"training from {place}: {batches} an epoch", flush=True)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._say(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero and time.monotonic() - self._spoke > QUIET_SECS:
            self._spoke = time.monotonic()
            number = trainer.num_training_batches
            batch = f"batch {batch_idx + 1}"
            if number != math.inf:
                batch += f" of {number}"
            place = f"{batch} in epoch {trainer.current_epoch + 1}"
            print(f"step {trainer.global_step}: {place}, {self.meter.speed}", flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._say(trainer)

    def _say(self, trainer: Trainer) -> None:
        done = trainer.current_epoch
        if done == self._epoch or not trainer.is_global_zero:
            return
        self._epoch = done
        self._spoke = time.monotonic()
        left = ""
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            per_epoch = (time.monotonic() - self._started) / (done - self._first)
            minutes, seconds = divmod(round(per_epoch * (trainer.max_epochs - done)), 60)
            left = f"/{trainer.max_epochs} ({minutes}:{seconds:02d} left)"
        metrics = sorted(trainer.callback_metrics.items())
        shown = [f"{name} {float(value):.4f}" for name, value in metrics if "_step" not in name]
        values = ", ".join([*shown, self.meter.speed])
        print(f"epoch {done}{left}: step {trainer.global_step}, {values}", flush=True)


def _of(limit: int | None) -> str:
    """`/20`; nothing where epochs have no limit."""
    return f"/{limit}" if limit is not None and limit >= 0 else ""


def display(meter: Meter) -> dict[str, Any]:
    """Arguments of a Trainer: a bar where the output is a terminal, else lines."""
    if sys.stdout is not None and sys.stdout.isatty():
        return {"callbacks": [meter, Bar(meter)]}
    return {
        "callbacks": [meter, Lines(meter)],
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
