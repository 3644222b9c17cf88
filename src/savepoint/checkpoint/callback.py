"""When to save: at the three points of a training where nothing is half done, and how a resume goes on from there.

    batch        the train loader is asked for its next batch
    epoch        an epoch begins, or the last one has ended
    validation   inside a validation (signals, saves on demand): the state is that of its start, and a resume runs it again

At Lightning's other hooks a log row, a plateau step or a validation of the same step is still to come, so a file made
there resumes one of them short. What is due there waits for the next point.
"""

import copy
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from savepoint import preemption
from savepoint.checkpoint import facts, files, format, state
from savepoint.checkpoint.facts import Provenance
from savepoint.checkpoint.finite import FiniteWatch
from savepoint.checkpoint.io import CheckpointIO
from savepoint.checkpoint.retention import Retention
from savepoint.checkpoint.scores import Scores
from savepoint.checkpoint.store import CheckpointStore
from savepoint.errors import CheckpointContentError, CheckpointSaveError, ConfigError
from savepoint.preemption import Preempted

Point = Literal["batch", "epoch", "validation"]
RETRY_SECS = 60.0  # after a save that failed: an interval may be hours


class CheckpointCallback(Checkpoint):
    """Saves the whole state of a training to `<default_root_dir>/checkpoints`, and resumes it exactly.

    Args:
        save_every_epochs: Epochs between saves, at the end of an epoch; null for none.
        save_every_steps: Optimizer steps between saves; null for none.
        save_every_secs: Seconds between saves; null for none.
        monitor: Metric that ranks checkpoints; null for none. A checkpoint counts only with a value measured at its own step.
        mode: Whether the best value of `monitor` is the smallest (min) or the largest (max).
        keep_last: Newest checkpoints to keep. With one alone that is the best too, rot in it leaves nothing to go on from.
        keep_best: Best checkpoints to keep.
        keep_every_n_epochs: Keep the end of every n-th epoch for good.
        keep_every_n_steps: Keep every n-th step, of those that were saved, for good.
        async_save: Write in a thread while training goes on, from a copy of the state in main memory.
        on_nan: What a NaN or infinite training loss does: stop the run, or warn and save nothing until the weights are finite.
    """

    def __init__(
        self,
        save_every_epochs: int | None = 1,
        save_every_steps: int | None = None,
        save_every_secs: float | None = None,
        monitor: str | None = "val/accuracy",
        mode: Literal["min", "max"] = "max",
        keep_last: int = 2,
        keep_best: int = 1,
        keep_every_n_epochs: int | None = None,
        keep_every_n_steps: int | None = None,
        async_save: bool = False,
        on_nan: Literal["stop", "warn"] = "stop",
    ) -> None:
        for name, every in (("epochs", save_every_epochs), ("steps", save_every_steps), ("secs", save_every_secs)):
            if every is not None and every <= 0:
                raise ConfigError(
                    f"checkpoint.save_every_{name} is {every}. Expected more than 0. Give null to save without this interval."
                )
        self.save_every_epochs, self.save_every_steps = save_every_epochs, save_every_steps
        self.save_every_secs, self.monitor, self.mode = save_every_secs, monitor, mode
        self.retention = Retention(
            keep_last=keep_last,
            keep_best=keep_best,
            keep_every_n_epochs=keep_every_n_epochs,
            keep_every_n_steps=keep_every_n_steps,
        )
        self.async_save, self.on_nan = async_save, on_nan
        self._watch = FiniteWatch(on_nan)
        self.provenance = Provenance()
        self.before_save: Callable[[], None] = lambda: None  # raises OSError where nothing must be saved
        self.alone = False  # whether a lock keeps all others out of the directory
        self.preloaded: tuple[Path, Any] | None = None  # what `fit(ckpt_path=)` need not read again
        self.failure: Exception | None = None  # of the newest save; None once a later one succeeded
        self.scores = Scores(monitor, mode)
        self._enabled = False
        self._saved: tuple[int, Point] | None = None
        self._saved_step = 0
        self._at: Point | None = None
        self._facts: dict[str, Any] = {}
        self._pending: dict[str, Any] | None = None
        self._ranks_changed = False  # in the epoch that now runs: its files are not exact
        self._at_validation: dict[str, Any] | None = None
        self._last_weights: dict[str, Tensor] | None = None
        self._before_validation: dict[str, Tensor] = {}

    # -- setting up --------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_last(trainer)
        files.refuse_url(trainer.default_root_dir, "trainer.default_root_dir")
        state.refuse_shards(trainer)
        state.refuse_different_starts(trainer)
        self.use(trainer.strategy.broadcast(Path(trainer.default_root_dir) / "checkpoints"))
        if not isinstance(trainer.strategy.checkpoint_io, CheckpointIO):
            trainer.strategy.checkpoint_io = CheckpointIO(async_save=self.async_save)
        trainer.strategy.checkpoint_io.store = self.store
        trainer.strategy.checkpoint_io.preloaded, self.preloaded = self.preloaded, None
        self._pending, self._ranks_changed = None, False
        self._enabled = not trainer.fast_dev_run  # type: ignore[attr-defined]

    def use(self, directory: Path) -> None:
        """Keeps the checkpoints in `directory`; `setup` does it with the Trainer's."""
        self.store = CheckpointStore(directory, retention=self.retention, monitor=self.monitor, mode=self.mode)

    @property
    def best_model_path(self) -> str:
        """Where `Trainer.fit(ckpt_path="best")` looks."""
        best = self.store.best() if hasattr(self, "store") else None
        return str(best.path) if best else ""

    @property
    def state_key(self) -> str:
        return "CheckpointCallback"  # whatever a subclass is called, and whatever its settings are

    def state_dict(self) -> dict[str, Any]:
        return {
            "scores": self.scores.state_dict(),
            "saved_step": self._saved_step,
            "ranks_changed": self._ranks_changed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved_step = state_dict["saved_step"]
        self._ranks_changed |= state_dict.get("ranks_changed", False)
        if not self.scores.load_state_dict(state_dict["scores"]) and hasattr(self, "store"):
            # Another metric ranks now: each manifest holds all metrics of its step, so the files are ranked again.
            self.scores.begin_with(self.store.best())

    # Lightning has just put its handlers in the place of ours. Where there are several ranks, its own waits for all of them
    # within the handler: for ever, if the signal came to one. `on_train_start` is the third of these places.

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        preemption.install()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        preemption.install()

    # -- going on from a checkpoint ----------------------------------------------------------------------------------

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not checkpoint.get("at"):
            return
        rank, others = trainer.global_rank, checkpoint.get("other_ranks", [])
        if len(others) + 1 == trainer.world_size:
            self._pending = checkpoint | (others[rank - 1] if rank else {})
            return
        # Until an epoch begins anew by (seed, epoch) alone, nobody can make this training again, from no file of it.
        self._ranks_changed = True
        if trainer.is_global_zero:
            print(state.ranks_changed(len(others) + 1, trainer.world_size), flush=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._enabled:
            return
        preemption.arm()
        self._attach(trainer)
        if not self._exact and trainer.is_global_zero:
            print(state.why_not_exact(trainer), flush=True)
        self._began, self._saved_at = trainer.global_step, time.monotonic()
        self._watch.begin(pl_module.device)
        self._preflight(trainer)
        state.lay_buckets(trainer)
        if self._pending:
            state.reenter(trainer, pl_module, self._pending)

    def _preflight(self, trainer: Trainer) -> None:
        """What would make the first save fail is told before the first step."""
        with state.isolated_rng(trainer.lightning_module.device):
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        format.check_readable(checkpoint)
        if not trainer.is_global_zero:
            return
        least = format.size_bytes(checkpoint)
        parameters = format.size_bytes([p for p in trainer.lightning_module.parameters() if p.requires_grad])
        # Before its first step an optimizer has no state. Most keep two numbers for each of the model's.
        fresh = not any(optimizer["state"] for optimizer in checkpoint["optimizer_states"])
        warning = self.store.preflight(least, least + 2 * parameters * fresh, alone=self.alone)
        if warning:
            print(warning, file=sys.stderr, flush=True)

    def _attach(self, trainer: Trainer) -> None:
        loaders = trainer.fit_loop._combined_loader.flattened  # type: ignore[union-attr]
        self._exact = state.why_not_exact(trainer) is None
        if len(loaders) == 1 and hasattr(loaders[0], "at_boundary"):
            loaders[0].at_boundary = lambda: self._boundary(trainer)

    def _arrived(self, module: LightningModule, at: Point) -> bool:
        """Whether this is the very point of the checkpoint. Random states come last: nothing may draw after them."""
        if not self._pending or self._pending["at"] != at:
            return False
        state.restore_rng(self._pending["rng"], module.device)
        self._pending = None
        return True

    # -- the safe points ---------------------------------------------------------------------------------------------

    def _boundary(self, trainer: Trainer) -> None:
        loop = trainer.fit_loop.epoch_loop
        # While gradients are pending there is no safe point: they are not in the file.
        first, pending_gradients = not loop.batch_progress.current.ready, loop._should_accumulate()
        self._raise_pending(trainer)
        if not self._arrived(trainer.lightning_module, "batch") and not first and not pending_gradients:
            self._poll(trainer, "batch")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._enabled:
            return
        self._ranks_changed = False
        self._attach(trainer)  # Lightning may have made the loader anew (reload_dataloaders_every_n_epochs)
        if not self._arrived(pl_module, "epoch") and trainer.global_step > self._began:
            self.scores.measure_training(trainer.callback_metrics, trainer.global_step)
            self._poll(trainer, "epoch")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before our on_train_end, weight averaging overwrites these for good: training longer would not be exact.
        self._last_weights = state.copied_weights(pl_module) if state.averaging(trainer) else None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._enabled:
            return
        self.scores.measure_training(trainer.callback_metrics, trainer.global_step)
        self._save(trainer, "epoch", reason="end", ended=facts.why_ended(trainer))
        self._finish_writing(trainer)
        preemption.disarm()
        if stop := self._agree(trainer)[0]:
            self._leave(trainer, stop)
        self.scores.require_monitor()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._enabled and not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING:
            self._arrived(pl_module, "validation")
            # A copy: the validation that begins here changes it.
            self._at_validation = copy.deepcopy(self._capture(trainer)) | {"fit_loop": trainer.fit_loop.state_dict()}
            self._before_validation = dict(trainer._logger_connector._callback_metrics)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self._at_validation is None or trainer.fit_loop.epoch_loop._should_accumulate():
            return
        stop, save = self._agree(trainer)
        if stop or save:
            with state.current_weights(trainer):
                self._save(trainer, "validation", reason=self._reason(stop, save))
        if stop:
            self._leave(trainer, stop)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._at_validation is None:
            return
        self._at_validation = None
        before, now = self._before_validation, trainer._logger_connector._callback_metrics
        # Whatever the number of loaders: what is another object now was measured by this validation.
        metrics = {name: value for name, value in now.items() if value is not before.get(name)}
        self.scores.measure_validation(metrics, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if self._enabled and isinstance(loss, Tensor):
            self._watch.see(loss, trainer.global_step)

    # -- deciding ----------------------------------------------------------------------------------------------------

    def _poll(self, trainer: Trainer, at: Point) -> None:
        stop, save = self._agree(trainer)
        reason = self._reason(stop, save) or self._due(trainer, at)
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._watch.check_loss(trainer, self.store)
        if reason:
            self._save(trainer, at, reason=reason)
        if stop:
            self._leave(trainer, stop)
        if at == "epoch":
            self.scores.require_monitor()

    def _agree(self, trainer: Trainer) -> tuple[int, bool]:
        """(signal to stop or 0, save now): the same on every rank, or one would save and stop while others train on."""
        since = time.monotonic() - self._saved_at
        now = self.save_every_secs is not None and since >= self.save_every_secs
        now = now or (self.failure is not None and since >= RETRY_SECS)
        now = now or preemption.requests.save or self._save_now.is_file()
        stop = preemption.requests.stop
        if trainer.world_size > 1:
            flags = torch.tensor([stop, int(now)], device=trainer.strategy.root_device)
            stop, now = trainer.strategy.reduce(flags, reduce_op="max").tolist()
        return stop, bool(now)

    @property
    def _save_now(self) -> Path:
        return self.store.directory.parent / "save-now"

    def _reason(self, stop: int, save: bool) -> str:
        return f"signal {stop}" if stop else "request or time" if save else ""

    def _due(self, trainer: Trainer, at: Point) -> str:
        step, every = trainer.global_step, self.save_every_steps
        if every and step // every > self._saved_step // every:
            return "steps"
        if at == "epoch" and self.save_every_epochs and trainer.current_epoch % self.save_every_epochs == 0:
            return "epochs"
        return "best" if self.retention.keep_best and self.scores.best_step == step else ""

    # -- saving ------------------------------------------------------------------------------------------------------

    def _save(self, trainer: Trainer, at: Point, *, reason: str, ended: str | None = None) -> None:
        step = trainer.global_step
        self._finish_writing(trainer)  # one save at a time; what failed in the one before is said before this one
        if self._saved == (step, at) and ended is None:
            return
        if unsound := self._watch.check_weights(trainer, self.store):
            self._fail(unsound)
            return
        self._saved, self._saved_step = (step, at), step
        self._at, self._facts = at, self._make_facts(trainer, at, reason, ended)
        said, started = self._when(trainer, at) + self.scores.sentence(step), time.perf_counter()
        path = self.store.path(step)
        preemption.requests.save = False
        try:
            if trainer.is_global_zero:
                self._sync_logs(trainer, path)
            with state.isolated_rng(trainer.lightning_module.device):
                trainer.save_checkpoint(path, weights_only=False)  # as by default, without Lightning's line about it
            if trainer.is_global_zero:
                self._writer(trainer).submit(lambda: self._commit(path, said, started))
        except (OSError, CheckpointContentError) as error:
            self._fail(error)
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the other ranks wait
        finally:
            self._at, self._facts = None, {}
        self._saved_at = time.monotonic()

    def _sync_logs(self, trainer: Trainer, path: Path) -> None:
        """The rows that a checkpoint counts are on disk before it.

        A crash between the two leaves rows too many, which a resume cuts, never a gap.
        """
        self.before_save()
        try:
            if self._save_now.is_file():
                self._save_now.unlink(missing_ok=True)
            for logger in trainer.loggers:
                if hasattr(logger, "sync"):
                    logger.sync()
        except OSError as error:
            raise CheckpointSaveError(
                f"The log could not be written before the save: {path} ({error}).", path
            ) from error

    def _writer(self, trainer: Trainer) -> CheckpointIO:
        return cast(CheckpointIO, trainer.strategy.checkpoint_io)

    def _commit(self, path: Path, said: str, started: float) -> None:
        self.store.commit()
        self.failure = None
        milliseconds = 1000 * (time.perf_counter() - started)
        print(f"{said}saved {path.name} ({path.stat().st_size / 1e6:.2f} MB, {milliseconds:.0f} ms)", flush=True)

    def _when(self, trainer: Trainer, at: Point) -> str:
        return f"epoch {trainer.current_epoch}: " if at == "epoch" else f"step {trainer.global_step}: "

    def _fail(self, error: Exception) -> None:
        self.failure, self._saved, self._saved_at = error, None, time.monotonic()
        print(f"{error} Training goes on; the checkpoints before it are intact.", file=sys.stderr, flush=True)

    def _raise_pending(self, trainer: Trainer) -> None:
        try:
            self._writer(trainer).raise_pending()
        except OSError as error:
            self._fail(error)

    def _finish_writing(self, trainer: Trainer) -> None:
        try:
            self._writer(trainer).wait()
        except OSError as error:
            self._fail(error)

    def _leave(self, trainer: Trainer, stop: int) -> None:
        self._finish_writing(trainer)
        preemption.disarm()
        preempted = Preempted(stop)
        if not trainer.is_global_zero:
            preempted.code = 0  # or the launcher would take this rank for a crashed one, and kill the one that saves
        raise preempted

    def _capture(self, trainer: Trainer) -> dict[str, Any]:
        rows = [logger.rows for logger in trainer.loggers if hasattr(logger, "rows")]
        return state.capture(trainer, trainer.lightning_module) | {
            "logged_rows": rows[0] if rows and trainer.is_global_zero else None
        }

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self._enabled:
            return
        own = self._capture(trainer)
        if self._at == "validation":
            own = dict(self._at_validation or {})
            checkpoint["loops"]["fit_loop"] = own.pop("fit_loop")
        if self._at == "epoch":
            # At an epoch's start Lightning counts it as begun: the resume would leave out its first hooks.
            for progress in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
                progress["ready"] = progress["completed"]
        if self._facts.get("ended") and self._last_weights is not None:
            checkpoint["current_model_state"] = self._last_weights
        checkpoint.update(own)
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, own)
            checkpoint.update(gathered[0])
            checkpoint["other_ranks"] = gathered[1:]
        checkpoint["at"] = self._at
        # Lightning logs every step while it is set. Of a run that has ended it is no state: it may be asked to go on.
        checkpoint["should_stop"] = trainer.should_stop and not self._facts.get("ended")
        checkpoint["config"], checkpoint["run"] = self.provenance.config, dict(self.provenance.run)
        checkpoint["optimizer"] = next(iter(checkpoint["optimizer_states"]), None)
        checkpoint[self.scores.key] = self.scores.best
        checkpoint["canary"] = state.canary(pl_module, checkpoint["state_dict"])
        checkpoint["manifest"] = self._facts or self._make_facts(trainer, None, "user", None)

    def _make_facts(self, trainer: Trainer, at: Point | None, reason: str, ended: str | None) -> dict[str, Any]:
        exact = at is not None and self._exact and not self._ranks_changed
        own = {"at": at, "exact": exact, "reason": reason, "ended": ended}
        return facts.gather(trainer, self.provenance) | own | self.scores.facts(trainer.global_step)


def refuse_last(trainer: Trainer) -> None:
    """`Trainer.fit(ckpt_path="last")` looks at Lightning's ModelCheckpoint only; finding none, it trains from scratch.

    By the time a callback is asked, Lightning has forgotten the word: it stands only in the frame of `fit`.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "fit" and frame.f_locals.get("self") is trainer:
            if frame.f_locals.get("ckpt_path") == "last" and not trainer.ckpt_path:
                raise ConfigError(
                    'Trainer.fit(ckpt_path="last") finds no checkpoint of this callback. Expected a path or "best". '
                    "Continue the newest checkpoint of a run with: python resume.py RUN_DIR"
                )
            return
