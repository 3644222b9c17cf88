"""Callbacks that a config can switch on: an early end, the gradients, the machine, a first learning
rate.

Each of them goes on over a resume. Values of the clock and the machine go to columns time/*.
"""

import resource
import sys
import time
from itertools import chain
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.callbacks import LearningRateFinder as LightningLearningRateFinder
from lightning.pytorch.utilities.parsing import lightning_hasattr, lightning_setattr
from torch.optim import Optimizer

from savepoint.checkpoint.callback import CheckpointCallback
from savepoint.errors import ConfigError
from savepoint.training.progress import Meter


class GradientNorm(Callback):
    """Logs `train/grad_norm`: the 2-norm of all gradients together, before they are clipped."""

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        name = "train/grad_norm"
        if len(trainer.optimizers) > 1:
            name += f"_{trainer.optimizers.index(optimizer)}"
        pl_module.log(name, torch.nn.utils.get_total_norm(gradients), on_step=True, on_epoch=False)


class StopEarly(EarlyStopping):
    """Lightning's EarlyStopping. Unless a metric is named, it watches what ranks the checkpoints.

    Args:
        monitor: The metric; null for that of `checkpoint.monitor`, with its mode.
        mode: Whether the best value of `monitor` is the smallest (min) or the largest (max).
        patience: Validations without an improvement before the training ends.
        min_delta: The smallest change that counts as an improvement.
    """

    def __init__(
        self,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        min_delta: float = 0.0,
    ) -> None:
        super().__init__(monitor or "", mode=mode, patience=patience, min_delta=min_delta)
        self._smallest = min_delta

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not self.monitor:
            self._watch_what_ranks(trainer)
        super().setup(trainer, pl_module, stage)

    def _watch_what_ranks(self, trainer: Trainer) -> None:
        every = trainer.callbacks  # type: ignore[attr-defined]
        ranking = next(one for one in every if isinstance(one, CheckpointCallback))
        if ranking.monitor is None:
            raise ConfigError(
                "Nothing to wait for: StopEarly names no monitor, and checkpoint.monitor is "
                "null. It stops when a metric has not improved. Give it a monitor and a mode, or "
                "leave it out."
            )
        super().__init__(ranking.monitor, self._smallest, patience=self.patience, mode=ranking.mode)


class Resources(Callback):
    """Logs time/samples_per_sec, time/step_ms and the peak memory, time/memory_mb and
    time/accelerator_memory_mb.

    Once every `log_every_n_steps` steps, over the steps since the last time.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self._since = time.monotonic()
        self._samples = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples += Meter.samples_in(batch) * trainer.world_size
        steps = trainer.global_step - self._step
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not steps or not every or trainer.global_step % every:
            return
        secs = time.monotonic() - self._since
        # Not self.log: that would put the clock among the metrics, and so into every checkpoint.
        row = {
            "time/samples_per_sec": round(self._samples / secs, 1),
            "time/step_ms": round(1000 * secs / steps, 3),
            "time/memory_mb": round(_peak_memory_bytes() / 1e6, 1),
        }
        if pl_module.device.type != "cpu":
            device = torch.get_device_module(pl_module.device)
            row["time/accelerator_memory_mb"] = round(device.max_memory_allocated() / 1e6, 1)
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step)
        self.on_train_start(trainer, pl_module)


class LearningRateFinder(LightningLearningRateFinder):
    """Lightning's search: tries rising learning rates before the training, and takes the one at
    which the loss falls fastest.

    Lightning sets the rate of the optimizer alone: a schedule that multiplies a base rate undoes
    that at its first step, and a resume searches again, from weights in the middle of a training.
    This class sets the base rates of the schedules too, and a resume keeps the rate. A schedule
    with rates of its own (OneCycleLR, CyclicLR) keeps those: use one that multiplies, such as
    `model.schedule`.
    """

    found: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"found": self.found}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.found = state_dict["found"]

    def lr_find(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path:  # a resume: optimizer and schedule have the rate already
            if self.found is not None and self._update_attr:
                name = self._attr_name or (
                    "lr" if lightning_hasattr(pl_module, "lr") else "learning_rate"
                )
                lightning_setattr(pl_module, name, self.found)
            return
        super().lr_find(trainer, pl_module)
        rate = self.optimal_lr.suggestion() if self.optimal_lr else None
        if rate is None:
            raise ConfigError(
                "No learning rate found: too few steps, or the loss falls nowhere between "
                f"{self._min_lr:g} and {self._max_lr:g}. The rate is taken where the loss falls "
                "fastest. Give more num_training_steps or another range, or a model.lr without "
                "the finder."
            )
        if not self._update_attr:
            return
        self.found = rate
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] = rate
        for scheduler in (config.scheduler for config in trainer.lr_scheduler_configs):
            if hasattr(scheduler, "base_lrs"):
                scheduler.base_lrs = [rate] * len(scheduler.base_lrs)
                for group, rate in zip(
                    scheduler.optimizer.param_groups, _rates(scheduler), strict=True
                ):
                    group["lr"] = rate
        if trainer.is_global_zero:
            print(f"learning rate found: {rate:.3g}", flush=True)


def _rates(scheduler: Any) -> list[float]:
    """The rates of a schedule at its current step, from its base rates."""
    if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        return [
            float(base * f(scheduler.last_epoch))
            for base, f in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
    return list(scheduler.base_lrs)


def _peak_memory_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
