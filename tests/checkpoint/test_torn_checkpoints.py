"""Every part of a signal's checkpoint is of one step, also where the signal falls into the middle
of an optimizer's step.
"""

import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from support.small import fit
from support.stopping import STOPPING, handlers  # noqa: F401  (handlers is a fixture)
from torch import Tensor, nn

from savepoint import Batches, preemption
from savepoint.checkpoint import store
from savepoint.checkpoint.callback import CheckpointCallback
from savepoint.checkpoint.store import CheckpointStore
from savepoint.preemption import Preempted

PARAMETERS = 80


class OneMore(torch.optim.Optimizer):
    """Adds one to every parameter, one after the other. Between two of them it may send its process
    a signal.
    """

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self.send: dict[int, int] = {}  # before which parameter of the next step -> which signal

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for place, parameter in enumerate(self.param_groups[0]["params"]):
            if signum := self.send.pop(place, 0):
                os.kill(os.getpid(), signum)
            state = self.state[parameter]
            parameter += 1
            state["step"] = state.get("step", 0) + 1
        return loss


class Counting(LightningModule):
    """After n steps every number in it is n."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = nn.ParameterList([torch.zeros(1) for _ in range(PARAMETERS)])
        self.register_buffer("forwards", torch.zeros(1))  # as batch norm counts its batches

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        self.forwards += 1
        return sum(number.sum() for number in self.numbers) * batch[0].mean()

    def configure_optimizers(self) -> OneMore:
        return OneMore(self.parameters())


class Data(LightningDataModule):
    def train_dataloader(self) -> Batches:
        return Batches(torch.ones(500, 1), batch_size=1, seed=0)


class Signals(Callback):
    """First one that asks for a save, then one that stops: from another thread at a random time, or
    within a step.
    """

    savepoint_skip = frozenset(
        {"randoms", "signals", "within_a_step", "left", "began"}
    )  # each start has signals of its own

    def __init__(self, randoms: random.Random, *signals: int) -> None:
        self.randoms, self.signals = randoms, list(signals)
        self.within_a_step = randoms.random() < 0.5
        self.left = threading.Event()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = trainer.global_step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self.signals or trainer.global_step < self.began + 2:
            return
        if self.within_a_step:
            trainer.optimizers[0].send = {
                self.randoms.randrange(1, PARAMETERS): self.signals.pop(0)
            }
            self.began = trainer.global_step
        else:
            threading.Thread(target=self._send, args=(self.signals,)).start()
            self.signals = []

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.left.set()

    def _send(self, signals: list[int]) -> None:
        for signum in signals:
            self.left.wait(self.randoms.uniform(0.002, 0.02))
            os.kill(os.getpid(), signum)


def steps_in(state: dict[str, Any]) -> set[int]:
    """Of every parameter, of the buffer, of the optimizer's counts and of Lightning's own."""
    numbers = [int(value) for value in state["state_dict"].values()]
    counts = [one["step"] for one in state["optimizer_states"][0]["state"].values()]
    assert len(numbers) == PARAMETERS + 1
    assert len(counts) == PARAMETERS
    return {state["global_step"], *numbers, *counts}


def train(directory: Path, signals: Signals, **arguments: Any) -> None:
    checkpointing = CheckpointCallback(
        monitor=None,
        save_every_epochs=None,
        keep_last=999,
        keep_best=0,
        async_save=arguments.pop("async_save", False),
    )
    fit(directory, checkpointing=checkpointing, model=Counting, data=Data, callbacks=lambda: [signals],
        max_epochs=-1, limit_val_batches=0, **arguments)  # fmt: skip


@pytest.mark.parametrize("async_save", [False, True], ids=["at once", "in a thread"])
def test_of_sixty_signal_checkpoints_none_holds_two_steps(async_save: bool, tmp_path: Path) -> None:
    preemption.install()
    randoms, found = random.Random(7), CheckpointStore(tmp_path / "checkpoints")
    for nth in range(99):
        latest, signals = found.latest(), Signals(randoms, signal.SIGUSR1, STOPPING[nth % 3])
        with pytest.raises(Preempted):
            train(
                tmp_path,
                signals,
                async_save=async_save,
                ckpt_path=latest and latest.path,
                max_steps=9999,
            )
        if len(found.checkpoints()) >= 60:
            break
    files = found.checkpoints()
    assert len(files) >= 60
    assert {one.manifest["reason"] for one in files} == {
        "request or time",
        "signal 15",
        "signal 2",
        "signal 1",
    }
    assert [one.step for one in files if steps_in(store.load(one.path)[0]) != {one.step}] == []
    print(f"{len(files)} signal checkpoints, none of two steps")


def test_a_save_inside_the_handler_would_hold_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above would see if a handler did more than to note the signal."""
    files: list[Path] = []

    class Saving(Signals):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            super().on_train_start(trainer, pl_module)

            def save(*_: Any) -> None:
                files.append(tmp_path / f"{len(files)}.ckpt")
                trainer.save_checkpoint(files[-1])

            monkeypatch.setattr(preemption, "_on_save", save)

    signals = Saving(random.Random(7), *[signal.SIGUSR1] * 9)
    signals.within_a_step = True
    train(tmp_path / "run", signals, max_steps=30)
    assert [len(steps_in(store.load(file)[0])) for file in files] == [2] * 9
