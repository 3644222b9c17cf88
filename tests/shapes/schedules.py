"""Every schedule of torch, by step and by epoch, and plateau schedules around validations."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim import lr_scheduler as s

from shapes.base import Net, Shape, data


class Scheduled(Net):
    """SGD with momentum under the schedules that `make` gives for it."""

    def __init__(self, make: Callable[[Optimizer], Any], **config: Any) -> None:
        super().__init__()
        self.make, self.config = make, config

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        config = {"scheduler": self.make(optimizer), **self.config}
        return {"optimizer": optimizer, "lr_scheduler": config}


def scheduled(make: Callable[[Optimizer], Any], trainer: Any = None, **config: Any) -> Shape:
    return Shape(model=lambda: Scheduled(make, **config), trainer=trainer or {})


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda o: s.LambdaLR(o, lambda step: 1 / (1 + step)),
    "multiplicative": lambda o: s.MultiplicativeLR(o, lambda step: 0.9),
    "step": lambda o: s.StepLR(o, 2, gamma=0.5),
    "multi_step": lambda o: s.MultiStepLR(o, [1, 2, 14], gamma=0.5),
    "constant": lambda o: s.ConstantLR(o, factor=0.1, total_iters=2),
    "linear": lambda o: s.LinearLR(o, start_factor=0.1, total_iters=9),
    "exponential": lambda o: s.ExponentialLR(o, 0.8),
    "polynomial": lambda o: s.PolynomialLR(o, total_iters=20, power=2.0),
    "cosine": lambda o: s.CosineAnnealingLR(o, T_max=12),
    "warm_restarts": lambda o: s.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
    "cyclic": lambda o: s.CyclicLR(o, 0.01, 0.1, step_size_up=4, mode="exp_range", gamma=0.9),
    "one_cycle": lambda o: s.OneCycleLR(o, 0.1, total_steps=40),
    "chained": lambda o: s.ChainedScheduler([s.ConstantLR(o, 0.1, 3), s.ExponentialLR(o, 0.9)]),
    "sequential": lambda o: s.SequentialLR(
        o,
        [s.LinearLR(o, 0.1, total_iters=2), s.CosineAnnealingLR(o, 10)],
        milestones=[2],
    ),
}


def plateau(optimizer: Optimizer) -> Any:
    return s.ReduceLROnPlateau(optimizer, patience=0, factor=0.7, threshold=0.3)


class RateOfTheStart(Scheduled):
    """A hook of the start sets the rate, and the schedule goes on from there."""

    def on_train_start(self) -> None:
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = 0.2


class EstimatedSteps(Net):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        total = self.trainer.estimated_stepping_batches
        schedule = s.OneCycleLR(optimizer, 0.1, total_steps=int(total))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class OwnStep(Scheduled):
    """Steps its schedule with the number of the epoch."""

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step(epoch=self.current_epoch)


class TwoPlateaus(Net):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        by_step = {"scheduler": plateau(optimizer), "interval": "step", "monitor": "train/loss"}
        return [optimizer], [by_step, {"scheduler": plateau(optimizer), "monitor": "val/loss"}]


VAL = {"monitor": "val/loss"}
LOOSE = {"monitor": "val/loss", "strict": False}
TRAIN = {"monitor": "train/loss"}
SHAPES = {
    f"{name}_by_{interval}": scheduled(make, interval=interval)
    for name, make in SCHEDULES.items()
    for interval in ("step", "epoch")
}
SHAPES |= {
    "step_frequency_2": scheduled(SCHEDULES["exponential"], interval="step", frequency=2),
    "epoch_frequency_2": scheduled(SCHEDULES["exponential"], interval="epoch", frequency=2),
    "step_accumulate": scheduled(
        SCHEDULES["cosine"],
        {"accumulate_grad_batches": 3},
        interval="step",
    ),
    "step_frequency_accumulate": scheduled(
        SCHEDULES["step"],
        {"accumulate_grad_batches": 2},
        interval="step",
        frequency=2,
    ),
    "step_val_interval": scheduled(SCHEDULES["linear"], {"val_check_interval": 3}, interval="step"),
    "plateau_epoch_val": scheduled(plateau, **VAL),
    "plateau_epoch_train": scheduled(plateau, **TRAIN),
    "plateau_epoch_val_interval": scheduled(plateau, {"val_check_interval": 4}, **VAL),
    "plateau_step_train": scheduled(plateau, interval="step", **TRAIN),
    "plateau_step_val": scheduled(plateau, {"val_check_interval": 3}, interval="step", **LOOSE),
    "plateau_step_train_val_interval": scheduled(
        plateau,
        {"val_check_interval": 4},
        interval="step",
        **TRAIN,
    ),
    "plateau_step_frequency_5": scheduled(
        plateau,
        {"val_check_interval": 5},
        interval="step",
        frequency=5,
        **VAL,
    ),
    "plateau_step_across_epochs": scheduled(
        plateau,
        {"val_check_interval": 7, "check_val_every_n_epoch": None},
        interval="step",
        **LOOSE,
    ),
    "plateau_step_accumulate": scheduled(
        plateau,
        {"val_check_interval": 4, "accumulate_grad_batches": 2},
        interval="step",
        **LOOSE,
    ),
    "plateau_step_monitored": Shape(
        model=lambda: Scheduled(plateau, interval="step", **LOOSE),
        trainer={"val_check_interval": 3},
        checkpointing={"monitor": "val/loss", "mode": "min"},
    ),
    "plateau_epoch_every_2": scheduled(
        plateau,
        {"check_val_every_n_epoch": 2, "max_epochs": 4},
        frequency=2,
        **VAL,
    ),
    "two_plateaus": Shape(model=TwoPlateaus, trainer={"val_check_interval": 5}),
    "estimated_steps": Shape(model=EstimatedSteps),
    "estimated_steps_accumulate": Shape(
        model=EstimatedSteps,
        trainer={"accumulate_grad_batches": 4},
    ),
    "own_scheduler_step": Shape(model=lambda: OwnStep(SCHEDULES["exponential"])),
    "plateau_without_val": Shape(model=lambda: Scheduled(plateau, **TRAIN), data=data(val=list)),
    "rate_of_the_start": Shape(model=lambda: RateOfTheStart(SCHEDULES["exponential"])),
}
