"""How many threads PyTorch computes with: never more than the cores that this process may use."""

import os
import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from savepoint import job
from savepoint.errors import ConfigError

SLOW_SECS = 0.2  # a step that is no reason to look further
LOOK_SECS = 20.0
_WAITED = 0.25  # of the time; a process that computes alone waits for no core


def usable(processes: int = 1) -> int:
    """PyTorch's own choice, or this process's share of the cores where that is less."""
    return max(1, min(torch.get_num_threads(), job.cores() // processes))


def chosen(threads: int | None, saved: int | None = None, processes: int = 1) -> int:
    """The number for a training: what the user has said, else the checkpoint's, as another number
    gives other bits, else `usable`.

    Args:
        threads: `--threads`.
        saved: Of the checkpoint that is resumed: taken where there are so many cores.

    Raises:
        ConfigError: Less than one.
    """
    if threads is not None and threads < 1:
        raise ConfigError(
            f"threads is {threads}. PyTorch computes with at least 1. Give null for its own choice."
        )
    if threads is not None:
        return threads
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    if saved is not None and saved * processes <= job.cores():
        return saved
    return usable(processes)


def use(number: int, processes: int = 1) -> None:
    torch.set_num_threads(number)
    if processes > 1:  # for the ranks that this process starts: Lightning knows no quota
        os.environ.setdefault("OMP_NUM_THREADS", str(number))


class WaitWatch(Callback):
    """Says once where steps are slow and the process waits for its turn: others use its cores, or
    a quota holds it. It looks every 20 seconds, as others may come later.
    """

    def __init__(self) -> None:
        self._since: list[float] | None = None  # secs, steps, waited, throttled
        self._validated: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = self._now(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = self._now(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._since is not None:  # else it is the sanity check, or said
            own = zip(self._since, self._validated, self._now(trainer), strict=True)
            self._since = [since + end - start for since, start, end in own]

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self._since is None or time.monotonic() - self._since[0] < LOOK_SECS:
            return
        now = self._now(trainer)
        secs, steps, waited, throttled = (b - a for a, b in zip(self._since, now, strict=True))
        self._since = now
        slow = secs > SLOW_SECS * max(1, steps)
        if not slow or not trainer.is_global_zero:
            return
        threads = torch.get_num_threads()
        if throttled > secs and threads > 1:  # a quota that binds stops it ten times a second
            why = f"a CPU quota has stopped it {throttled:.0f} times"
        elif waited > _WAITED * secs and threads > 1:
            why = f"it waited {waited / secs:.0%} of the time for a core: others use its cores"
        else:
            return
        self._since = None
        print(
            f"Slow: {steps / secs:.2f} batches/s with {threads} threads, and {why}. Fewer threads "
            f"may be faster: --threads {max(1, threads // 2)}",
            flush=True,
        )

    @staticmethod
    def _now(trainer: Trainer) -> list[float]:
        steps = trainer.fit_loop.total_batch_idx
        return [time.monotonic(), steps, job.waited(), job.throttled()]
