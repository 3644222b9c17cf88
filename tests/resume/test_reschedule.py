"""Overrides of a resume reach each of torch's schedules: as a fresh one after the same number of
steps, to the end.
"""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from support.small import difference
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR
from torch.utils.data import DataLoader, TensorDataset

from savepoint.checkpoint import store
from savepoint.checkpoint.callback import CheckpointCallback
from savepoint.errors import ConfigMismatchError
from savepoint.resume.overrides import ApplyOverrides

BATCHES = 5
Made = Callable[[Optimizer, int, float], Any]

# Of an optimizer, the length of the training in the scheduler's own steps, and a hyper-parameter in
# 0..1.
SCHEDULES: dict[str, Made] = {
    "lambda": lambda o, n, g: schedulers.LambdaLR(o, lambda step: g * (1 - step / (n + 1))),
    "multiplicative": lambda o, n, g: schedulers.MultiplicativeLR(
        o, lambda step: 1 - g / (n + step)
    ),
    "step": lambda o, n, g: schedulers.StepLR(o, step_size=max(1, n // 3), gamma=g),
    "multi_step": lambda o, n, g: schedulers.MultiStepLR(o, milestones=[n // 3, n // 2], gamma=g),
    "constant": lambda o, n, g: schedulers.ConstantLR(o, factor=g, total_iters=n // 2),
    "linear": lambda o, n, g: schedulers.LinearLR(
        o, start_factor=1.0, end_factor=g / 10, total_iters=n
    ),
    "exponential": lambda o, n, g: schedulers.ExponentialLR(o, gamma=g),
    "sequential": lambda o, n, g: schedulers.SequentialLR(
        o,
        [
            schedulers.LinearLR(o, start_factor=g / 2, total_iters=n // 3),
            schedulers.CosineAnnealingLR(o, n - n // 3),
        ],
        milestones=[n // 3],
    ),
    "polynomial": lambda o, n, g: schedulers.PolynomialLR(o, total_iters=n, power=1 + g),
    "cosine": lambda o, n, g: schedulers.CosineAnnealingLR(o, T_max=n, eta_min=g / 100),
    "chained": lambda o, n, g: schedulers.ChainedScheduler(
        [
            schedulers.ConstantLR(o, factor=g, total_iters=n // 2),
            schedulers.ExponentialLR(o, gamma=0.9),
        ]
    ),
    "cyclic": lambda o, n, g: schedulers.CyclicLR(
        o,
        base_lr=0.01,
        max_lr=g,
        step_size_up=max(1, n // 3),
        cycle_momentum="momentum" in o.defaults,
    ),
    "one_cycle": lambda o, n, g: schedulers.OneCycleLR(o, max_lr=g, total_steps=n + 1),
    "warm_restarts": lambda o, n, g: schedulers.CosineAnnealingWarmRestarts(
        o, T_0=max(1, n // 3), eta_min=g / 100
    ),
    "swa": lambda o, n, g: SWALR(o, swa_lr=g / 10, anneal_epochs=n),
}


class Scheduled(LightningModule):
    """One schedule on each of its optimizers; the second has two groups."""

    def __init__(
        self, schedule: Made, interval: str = "step", frequency: int = 1, gamma: float = 0.5
    ) -> None:
        super().__init__()
        self.schedule, self.interval, self.frequency, self.gamma = (
            schedule,
            interval,
            frequency,
            gamma,
        )
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        loss: Tensor = self.net(batch[0]).square().mean() * 0.01
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        if self.interval == "step" and (batch_idx + 1) % self.frequency == 0:
            for scheduler in self.lr_schedulers():
                scheduler.step()
        return loss

    def on_train_epoch_end(self) -> None:
        if self.interval == "epoch" and (self.current_epoch + 1) % self.frequency == 0:
            for scheduler in self.lr_schedulers():
                scheduler.step()

    def made(self, length: int) -> tuple[list[Optimizer], list[Any]]:
        first, last = self.net[0], self.net[2]
        optimizers = [
            SGD(first.parameters(), lr=0.1, momentum=0.9),
            AdamW(
                [{"params": [last.weight], "lr": 0.05}, {"params": [last.bias], "lr": 0.02}],
                weight_decay=0.1,
            ),
        ]
        return optimizers, [
            self.schedule(optimizer, length, self.gamma) for optimizer in optimizers
        ]

    def length(self, epochs: int) -> int:
        steps = epochs * BATCHES if self.interval == "step" else epochs
        return steps // self.frequency

    def configure_optimizers(self) -> Any:
        optimizers, made = self.made(self.length(self.trainer.max_epochs))
        return optimizers, [
            {"scheduler": one, "interval": self.interval, "frequency": self.frequency}
            for one in made
        ]


class Automatic(Scheduled):
    """The same with Lightning's own steps, and one optimizer of three groups."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.automatic_optimization = True

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean() * 0.01

    def on_train_epoch_end(self) -> None:
        pass

    def made(self, length: int) -> tuple[list[Optimizer], list[Any]]:
        groups = [{"params": [p], "lr": 0.1 / (i + 1)} for i, p in enumerate(self.net.parameters())]
        optimizer = SGD(groups, lr=0.1, momentum=0.9)
        return [optimizer], [self.schedule(optimizer, length, self.gamma)]


def fit(
    directory: Path, model: LightningModule, epochs: int, file: Path | None = None, **changed: Any
) -> Trainer:
    seed_everything(1, verbose=False)
    callbacks: list[Any] = [CheckpointCallback(monitor=None, keep_last=99)]
    if file is not None:
        state, facts = store.load(file)
        callbacks.insert(
            0,
            ApplyOverrides(state, facts, {k.replace("__", "."): v for k, v in changed.items()}, []),
        )
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=callbacks, default_root_dir=str(directory), logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = DataLoader(TensorDataset(torch.ones(BATCHES * 2, 4)), batch_size=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*")
        trainer.fit(model, data, ckpt_path=file, weights_only=True)
    return trainer


def rates(trainer: Trainer) -> list[Any]:
    wanted = (
        "lr",
        "initial_lr",
        "momentum",
        "betas",
        "max_lr",
        "min_lr",
        "base_momentum",
        "max_momentum",
        "swa_lr",
    )
    return [
        {key: group[key] for key in wanted if key in group}
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
    ]


def fresh(model: Scheduled, epochs: int, steps: int) -> list[Any]:
    """What the module's schedules give that are made for so many epochs and have made so many
    steps.
    """
    optimizers, made = model.made(model.length(epochs))
    with warnings.catch_warnings(action="ignore"):
        for _ in range(steps):
            for scheduler in made:
                scheduler.step()
    trainer: Any = type("Holder", (), {"optimizers": optimizers})
    return rates(trainer)


def newest(directory: Path) -> Path:
    latest = store.CheckpointStore(directory / "checkpoints").latest()
    assert latest is not None
    return latest.path


EACH = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
KINDS = pytest.mark.parametrize(
    ("kind", "interval", "frequency"),
    [
        pytest.param(Scheduled, "step", 1, id="two optimizers"),
        pytest.param(Automatic, "epoch", 2, id="every second epoch"),
        pytest.param(Automatic, "step", 1, id="step", marks=pytest.mark.slow),
        pytest.param(Automatic, "step", 2, id="every second step", marks=pytest.mark.slow),
        pytest.param(Automatic, "epoch", 1, id="epoch", marks=pytest.mark.slow),
    ],
)


@EACH
@KINDS
def test_training_longer_goes_on_as_the_schedule_of_that_length(
    schedule: Made, kind: type[Scheduled], interval: str, frequency: int, tmp_path: Path
) -> None:
    def model() -> Scheduled:
        return kind(schedule, interval, frequency)

    fit(tmp_path / "first", model(), 4)
    longer = fit(
        tmp_path / "longer", model(), 8, newest(tmp_path / "first"), trainer__max_epochs=(4, 8)
    )
    steps = (8 * (BATCHES // frequency)) if interval == "step" else 8 // frequency
    assert rates(longer) == fresh(model(), 8, steps)
    assert all(math.isfinite(group["lr"]) for group in rates(longer))


@EACH
@KINDS
def test_a_new_hyper_parameter_gives_the_rates_of_a_fresh_schedule(
    schedule: Made, kind: type[Scheduled], interval: str, frequency: int, tmp_path: Path
) -> None:
    fit(tmp_path / "first", kind(schedule, interval, frequency), 4)
    file = next(
        p for p in (tmp_path / "first/checkpoints").glob("step-*") if store.load(p)[1]["epoch"] == 2
    )
    model = kind(schedule, interval, frequency, gamma=0.25)
    end = fit(tmp_path / "other", model, 4, file, model__gamma=(0.5, 0.25))
    steps = (4 * (BATCHES // frequency)) if interval == "step" else 4 // frequency
    assert rates(end) == fresh(kind(schedule, interval, frequency, gamma=0.25), 4, steps)


@EACH
@pytest.mark.parametrize("key", ["trainer.log_every_n_steps", "model.dropout"])
def test_overrides_of_something_else_change_no_bit(
    schedule: Made, key: str, tmp_path: Path
) -> None:
    fit(tmp_path / "first", Scheduled(schedule), 4)
    file = next(
        p for p in (tmp_path / "first/checkpoints").glob("step-*") if store.load(p)[1]["epoch"] == 2
    )
    fit(tmp_path / "again", Scheduled(schedule), 4, file, **{key.replace(".", "__"): (1, 2)})
    ends = [store.load(newest(tmp_path / name))[0] for name in ("first", "again")]
    for part in ("optimizer_states", "lr_schedulers", "state_dict"):
        assert not list(difference(ends[0][part], ends[1][part])), part


class Warmed(Automatic):
    """A warm-up by step and a decay by epoch on the same optimizer."""

    def __init__(self, gamma: float = 0.5) -> None:
        super().__init__(SCHEDULES["step"], gamma=gamma)

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.1)
        warm = schedulers.LinearLR(optimizer, start_factor=self.gamma, total_iters=7)
        decay = schedulers.ExponentialLR(optimizer, gamma=0.9)
        return [optimizer], [
            {"scheduler": warm, "interval": "step"},
            {"scheduler": decay, "interval": "epoch"},
        ]


def test_two_schedules_of_one_optimizer_take_their_turns(tmp_path: Path) -> None:
    fit(tmp_path / "first", Warmed(), 4)
    file = next(
        p for p in (tmp_path / "first/checkpoints").glob("step-*") if store.load(p)[1]["epoch"] == 2
    )
    changed = fit(tmp_path / "changed", Warmed(gamma=0.25), 4, file, model__gamma=(0.5, 0.25))
    straight = fit(tmp_path / "straight", Warmed(gamma=0.25), 4)
    assert rates(changed) == rates(straight)


class Plateau(Automatic):
    """Its metric never improves: the rate falls each epoch past the patience."""

    def __init__(self, lr: float = 0.1, patience: int = 0, factor: float = 0.5) -> None:
        super().__init__(SCHEDULES["step"])
        self.lr, self.patience, self.factor = lr, patience, factor

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        self.log("metric", 1.0, on_epoch=True, on_step=False)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=self.lr)
        plateau = schedulers.ReduceLROnPlateau(
            optimizer, patience=self.patience, factor=self.factor
        )
        return [optimizer], [{"scheduler": plateau, "monitor": "metric"}]


@pytest.mark.parametrize(
    ("arguments", "changed", "rate"),
    [
        ({}, {"trainer__log_every_n_steps": (1, 2)}, 0.1 * 0.5**3),
        ({"patience": 9}, {"model__patience": (0, 9)}, 0.1 * 0.5),
        ({"factor": 0.1}, {"model__factor": (0.5, 0.1)}, 0.1 * 0.5 * 0.1**2),
        ({"lr": 0.2}, {"model__lr": (0.1, 0.2)}, 0.2 * 0.5**3),
    ],
)
def test_a_plateau_keeps_what_it_measured_and_takes_new_arguments(
    arguments: dict[str, Any], changed: dict[str, Any], rate: float, tmp_path: Path
) -> None:
    fit(tmp_path / "first", Plateau(), 2)
    end = fit(tmp_path / "other", Plateau(**arguments), 4, newest(tmp_path / "first"), **changed)
    assert rates(end)[0]["lr"] == pytest.approx(rate)
    assert end.lr_scheduler_configs[0].scheduler.last_epoch == 4


class Halving:
    """A user's own scheduler: nothing of torch's."""

    def __init__(self, optimizer: Optimizer, factor: float) -> None:
        self.optimizer, self.factor, self.steps = optimizer, factor, 0

    def step(self) -> None:
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 0.1 * self.factor**self.steps

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.factor, self.steps = state["factor"], state["steps"]


class Own(Automatic):
    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": Halving(optimizer, self.gamma), "interval": "epoch"}]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()


def test_a_scheduler_of_the_user_goes_on_as_it_was_saved_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path / "first", Own(SCHEDULES["step"]), 2)
    other = Own(SCHEDULES["step"], gamma=0.1)
    end = fit(tmp_path / "other", other, 4, newest(tmp_path / "first"), model__gamma=(0.5, 0.1))
    assert rates(end)[0]["lr"] == 0.1 * 0.5**4
    assert "Halving of optimizer 0 goes on as it was saved" in capsys.readouterr().out


def test_the_rates_of_three_groups_are_said_at_most(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path / "first", Automatic(SCHEDULES["cosine"]), 2)
    model = Automatic(SCHEDULES["cosine"])
    fit(tmp_path / "longer", model, 4, newest(tmp_path / "first"), trainer__max_epochs=(2, 4))
    said = "learning rate at step 10: 0.005 -> 0.0525, 0.005 -> 0.0275, 0.005 -> 0.01917 and 1 more groups"
    assert said in capsys.readouterr().out


def test_a_schedule_that_is_shorter_than_what_is_trained_is_refused(tmp_path: Path) -> None:
    fit(tmp_path / "first", Automatic(SCHEDULES["exponential"]), 4)
    file = newest(tmp_path / "first")
    model = Automatic(lambda o, n, g: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=3))
    with pytest.raises(
        ConfigMismatchError, match="The schedule ends before the checkpoint: OneCycleLR"
    ):
        fit(tmp_path / "other", model, 8, file, model__schedule=("exponential", "one_cycle"))
