"""How a Trainer is saved: all its ranks together, at a point of its training."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from savepoint import preemption
from savepoint.checkpoint import facts, format
from savepoint.checkpoint.canary import canary
from savepoint.checkpoint.facts import Provenance
from savepoint.checkpoint.io import CheckpointIO
from savepoint.checkpoint.saver import Saver
from savepoint.checkpoint.scores import Scores
from savepoint.checkpoint.state import loops
from savepoint.checkpoint.state.points import Point
from savepoint.checkpoint.state.process import isolated_rng
from savepoint.checkpoint.state.training import TrainingState
from savepoint.checkpoint.store import CheckpointStore
from savepoint.errors import CheckpointSaveError
from savepoint.look.marks import own_part
from savepoint.preemption import Preempted
from savepoint.sharded import saving
from savepoint.sharded.strategy import Sharding


class TrainerSaver(Saver):
    """A `Saver` of a Trainer, which `CheckpointCallback` calls at each point.

    Attributes:
        training: The state of the training; None in a fast_dev_run: nothing is saved.
        provenance: What a run knows of itself; `training.build` sets it.
        before_save: Raises OSError where nothing must be saved.
        alone: Whether a lock keeps all others out of the directory.
        sharding: How all ranks save together, where the strategy spreads the state over them.
    """

    def __init__(self, store: CheckpointStore, scores: Scores, **intervals: Any) -> None:
        super().__init__(store, **intervals)
        self.scores = scores
        self.training: TrainingState | None = None
        self.provenance = Provenance()
        self.before_save: Callable[[], None] | None = None
        self.alone = False
        self.sharding: Sharding | None = None
        # Of the save that is being made: the point, why, and how the training ended.
        self._at: Point | None = None
        self._why: dict[str, Any] = {}

    def look_ahead(self, trainer: Trainer) -> None:
        """The preflight of what Lightning would save now."""
        with isolated_rng(trainer.lightning_module.device):
            checkpoint = loops.as_lightning_saves(trainer)
        if self.sharding is not None:
            saving.require_shared(self.sharding.ranks, self.store.directory)
        parameters = [p for p in trainer.lightning_module.parameters() if p.requires_grad]
        # Before its first step an optimizer has no state. Most keep two numbers for each of the
        # model's.
        fresh = not any(optimizer.get("state") for optimizer in checkpoint["optimizer_states"])
        self.preflight(
            checkpoint,
            2 * format.size_bytes(parameters) * fresh,
            alone=self.alone,
            writes=trainer.is_global_zero,
        )

    # -- deciding ---------------------------------------------------------------------------------

    def poll_at(self, trainer: Trainer, at: Point) -> None:
        """At a point: saves where that is due or asked for, and stops where a signal has asked."""
        stop, save = self.agree(trainer)
        reason = self.reason(stop, save) or self._due_at(trainer, at)
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.watch.check_loss(self.store, _smallest(trainer), trainer.is_global_zero)
        if reason:
            self.save(trainer, at, reason=reason)
        if stop:
            self.leave(trainer, stop)

    def agree(self, trainer: Trainer) -> tuple[int, bool]:
        """(signal to stop or 0, save now): the same on every rank, or one would save and stop while
        others train on.
        """
        stop, now = self.requests()
        if trainer.world_size > 1:
            flags = torch.tensor([stop, int(now)], device=trainer.strategy.root_device)
            stop, now = trainer.strategy.reduce(flags, reduce_op="max").tolist()
        return stop, bool(now)

    def _due_at(self, trainer: Trainer, at: Point) -> str:
        ended = trainer.current_epoch if at == "epoch" else None
        due = self.due(trainer.global_step, ended)
        ranks = self.store.retention.keep_best
        if due or not ranks or self.scores.best_step != trainer.global_step:
            return due
        return "best"

    def leave(self, trainer: Trainer, stop: int) -> None:
        """Raises Preempted, once everything is written."""
        self.finish_writing(trainer)
        preemption.disarm()
        preempted = Preempted(stop)
        if not trainer.is_global_zero:
            # Or the launcher would take this rank for a crashed one, and kill the one that saves.
            preempted.code = 0
        raise preempted

    # -- saving -----------------------------------------------------------------------------------

    def save(self, trainer: Trainer, at: Point, *, reason: str, ended: str | None = None) -> None:
        step = trainer.global_step
        module = trainer.lightning_module
        started = time.perf_counter()
        # One save at a time; what failed in the one before is said before this one.
        self.finish_writing(trainer)
        if self.is_saved(step, at) and ended is None:
            return
        where = f"epoch {trainer.current_epoch}" if at == "epoch" else f"step {step}"
        said = f"{where}: {self.scores.sentence(step)}"
        path = self.store.path(step)

        def write() -> None:
            if self.sharding is not None:  # or the others would save without the first
                self.sharding.ranks.first(lambda: self._sync_logs(trainer, path))
            elif trainer.is_global_zero:
                self._sync_logs(trainer, path)
            with isolated_rng(module.device):
                # As by default, without Lightning's line about it.
                trainer.save_checkpoint(path, weights_only=False)
            if trainer.is_global_zero:
                writer_of(trainer).submit(lambda: self._commit(path, said, started))
            elif self.sharding is not None:  # of a failure all ranks have heard
                writer_of(trainer).submit(self.forget_failure)

        weights = (map(own_part, module.parameters()), map(own_part, module.buffers()))
        self._at = at
        self._why = {"reason": reason, "ended": ended}
        try:
            speaks = trainer.is_global_zero
            if not self.attempt(step, at, write, weights, _smallest(trainer), speaks):
                trainer.strategy.barrier("Trainer.save_checkpoint")  # where the other ranks wait
        finally:
            self._at = None
            self._why = {}

    def _sync_logs(self, trainer: Trainer, path: Path) -> None:
        """The rows that a checkpoint counts are on disk before it.

        A crash between the two leaves rows too many, which a resume cuts, never a gap.
        """
        if self.before_save:
            self.before_save()
        try:
            self.take_request()
            for logger in trainer.loggers:
                if hasattr(logger, "sync"):
                    logger.sync()
        except OSError as error:
            raise CheckpointSaveError(
                f"The log could not be written before the save: {path} ({error}).", path
            ) from error

    def _commit(self, path: Path, said: str, started: float) -> None:
        self.store.commit()
        self.succeed(path, said, started)

    def fill(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Puts into Lightning's checkpoint what it leaves out, and the manifest's facts."""
        if not self.training:
            return
        unsaved = self.training.fill(checkpoint, self._at, self._why.get("ended"))
        checkpoint["config"] = self.provenance.config
        checkpoint["run"] = dict(self.provenance.run)
        checkpoint["optimizer"] = next(iter(checkpoint["optimizer_states"]), None)
        checkpoint[self.scores.key] = self.scores.best
        checkpoint["canary"] = canary(module, checkpoint["state_dict"])
        checkpoint["manifest"] = (
            facts.gather(trainer, self.provenance)
            | {"at": self._at, "exact": not unsaved, "unsaved": unsaved[:20]}
            | (self._why or {"reason": "user", "ended": None})
            | self.scores.facts(trainer.global_step)
        )
        writer_of(trainer).finish = lambda whole: self._finish(trainer, whole)

    def _finish(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Once the module's own on_save_checkpoint has had its word, which comes after that of
        callbacks.
        """
        assert self.training is not None  # `fill` has set this hook
        known = checkpoint["manifest"]
        known["unsaved"] += self.training.left_out(checkpoint["state_dict"])
        known["exact"] = not known["unsaved"]
        if known["at"] is not None and trainer.is_global_zero:
            self.say_inexact(known["unsaved"])

    def raise_pending(self, trainer: Trainer) -> None:
        """What failed in a thread is said."""
        self._say_failure(trainer, writer_of(trainer).raise_pending)

    def finish_writing(self, trainer: Trainer) -> None:
        self._say_failure(trainer, writer_of(trainer).wait)

    def _say_failure(self, trainer: Trainer, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self.fail(error, trainer.is_global_zero)


def writer_of(trainer: Trainer) -> CheckpointIO:
    return cast(CheckpointIO, trainer.strategy.checkpoint_io)


def _smallest(trainer: Trainer) -> Callable[[Tensor], Tensor]:
    return lambda number: cast(Tensor, trainer.strategy.reduce(number, reduce_op="min"))
