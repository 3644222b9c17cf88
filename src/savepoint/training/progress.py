"""What a run shows while it trains: lines for a log file, and the numbers that the bar of a
terminal shows too.
"""

import math
import time
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
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


class Clock:
    """The time that a training still takes, by its pace since `begin`."""

    def begin(self, trainer: Trainer) -> None:
        self._began = time.monotonic()
        self._first = self._share(trainer, 0)

    def left(self, trainer: Trainer, batches: int = 0) -> str:
        """`1:05 left`, `batches` into an epoch; empty where no limit or no pace is known yet."""
        share = self._share(trainer, batches)
        if share <= self._first:
            return ""
        secs = (time.monotonic() - self._began) * (1 - share) / (share - self._first)
        minutes, seconds = divmod(round(max(0.0, secs)), 60)
        hours, minutes = divmod(minutes, 60)
        if hours:
            return f"{hours}:{minutes:02d}:{seconds:02d} left"
        return f"{minutes}:{seconds:02d} left"

    @staticmethod
    def _share(trainer: Trainer, batches: int) -> float:
        """How much of the training is done, of the limit that comes first."""
        shares = [0.0]
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            epochs = trainer.current_epoch + batches / max(1, trainer.num_training_batches)
            shares.append(epochs / trainer.max_epochs)
        if trainer.max_steps > 0:
            shares.append(trainer.global_step / trainer.max_steps)
        return max(shares)


class Lines(Callback):
    """Prints one line for each epoch, where the output is no terminal."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.clock = Clock()
        self._epoch = -1
        self._spoke = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch = trainer.current_epoch
        self.clock.begin(trainer)
        self._spoke = time.monotonic()
        if trainer.is_global_zero:
            place = f"step {trainer.global_step}, epoch {trainer.current_epoch}"
            number = trainer.num_training_batches
            length = "a stream of batches without an end"
            if number != math.inf:
                length = f"{plural(int(number), 'batch', 'es')} an epoch"
            print(f"training from {place}: {length}", flush=True)

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
        left = self.clock.left(trainer)
        place = f"epoch {done}{of(trainer.max_epochs)}{f' ({left})' if left else ''}"
        metrics = sorted(trainer.callback_metrics.items())
        shown = [f"{name} {float(value):.4f}" for name, value in metrics if "_step" not in name]
        values = ", ".join([*shown, self.meter.speed])
        print(f"{place}: step {trainer.global_step}, {values}", flush=True)


def of(limit: int | None) -> str:
    """`/20`; nothing where epochs have no limit."""
    return f"/{limit}" if limit is not None and limit >= 0 else ""
