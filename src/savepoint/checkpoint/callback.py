"""When to save: at the three points of a training where nothing is half done, and how a resume goes
on from there.

    batch        the train loader is about to be asked for its next batch
    epoch        an epoch is about to begin, or the last one has ended
    validation   inside a validation (signals, saves on demand): the state is that of its start, and
                 a resume runs it again

At Lightning's own hooks a log row, a plateau step or a validation of the same step is still to
come, or the hooks of other callbacks have half run, so a file made there resumes short of them.
What is due there waits for the next point.
"""

import copy
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from savepoint import files, preemption
from savepoint.checkpoint import facts, format, state
from savepoint.checkpoint.canary import canary
from savepoint.checkpoint.facts import Provenance
from savepoint.checkpoint.finite import FiniteWatch
from savepoint.checkpoint.io import CheckpointIO
from savepoint.checkpoint.look import Baseline, Look, changed_since
from savepoint.checkpoint.retention import Retention
from savepoint.checkpoint.scores import Scores
from savepoint.checkpoint.store import CheckpointStore
from savepoint.errors import (
    CheckpointContentError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    ConfigError,
)
from savepoint.preemption import Preempted
from savepoint.words import megabytes

Point = Literal["batch", "epoch", "validation"]
RETRY_SECS = 60.0  # after a save that failed: an interval may be hours


class CheckpointCallback(Checkpoint):
    """Saves the whole state of a training to `<default_root_dir>/checkpoints`, and resumes it
    exactly.

    Args:
        save_every_epochs: Epochs between saves, at the end of an epoch; null for none.
        save_every_steps: Optimizer steps between saves; null for none.
        save_every_secs: Seconds between saves; null for none.
        monitor: Metric that ranks checkpoints; null for none. A checkpoint counts only with a value
            measured at its own step.
        mode: Whether the best value of `monitor` is the smallest (min) or the largest (max).
        keep_last: Newest checkpoints to keep. With one alone that is the best too, rot in it leaves
            nothing to go on from.
        keep_best: Best checkpoints to keep.
        keep_every_n_epochs: Keep the end of every n-th epoch for good.
        keep_every_n_steps: Keep every n-th step, of those that were saved, for good.
        async_save: Write in a thread while training goes on, from a copy of the state in main
            memory.
        on_nan: What a NaN or infinite training loss does: stop the run, or warn and save nothing
            until the weights are finite.
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
        for name, every in (
            ("epochs", save_every_epochs),
            ("steps", save_every_steps),
            ("secs", save_every_secs),
        ):
            if every is not None and every <= 0:
                raise ConfigError(
                    f"checkpoint.save_every_{name} is {every}. Expected more than 0. Give null to "
                    "save without this interval."
                )
        # `load_last` finds it then.
        warnings.filterwarnings(
            "ignore", message=r'\.\w+\(ckpt_path="last"\) is set, but there is no last checkpoint'
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
        # Raises OSError where nothing must be saved.
        self.before_save: Callable[[], None] | None = None
        self.alone = False  # whether a lock keeps all others out of the directory
        self.preloaded: tuple[Path, Any] | None = None  # what `fit(ckpt_path=)` need not read again
        self.rates_are_overridden = False  # by the user, on this resume
        self.failure: Exception | None = None  # of the newest save; None once a later one succeeded
        self.scores = Scores(monitor, mode)
        self._enabled = False
        self._saved: tuple[int, Point] | None = None
        self._saved_step = 0
        self._at: Point | None = None
        # Of the save that is being made: reason, and how the training ended.
        self._why: dict[str, Any] = {}
        self._pending: dict[str, Any] | None = None
        self._ranks_changed = False  # in the epoch that now runs: its files are not exact
        # At the start of a validation, or at the end of the training.
        self._captured: dict[str, Any] | None = None
        self._last_weights: dict[str, Tensor] | None = None
        self._before_validation: dict[str, Tensor] = {}
        self._points: state.Points | None = None
        self._baseline: Baseline | None = None
        self._accepted = False  # whether the hooks before the first batch have been looked at
        self._settings: dict[str, Any] = {}
        self._bounds: dict[str, Any] = {}
        self._kinds: dict[str, Any] = {}
        self._shared: list[tuple[Any, Any, str]] = []  # of optimizers that wrap others
        self._reads_gradients = False
        # Of the data module: by what the loaders of this epoch were made.
        self._made_by: list[Any] = []
        self._versions: dict[str, Any] = {}
        self._groups: list[int] = []  # of each optimizer, at the start
        self._before: dict[str, Any] = {}  # what a save inside a validation takes from its start
        self._held: dict[Any, Any] = {}  # what the running epoch goes by
        self._loader_states: list[Any] | None = None  # before the batch that was fetched in advance
        self._said_inexact: set[str] = set()
        self._best_elsewhere = ""

    # -- setting up -------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            files.refuse_url(trainer.default_root_dir, "trainer.default_root_dir")
            state.refuse_shards(trainer)
            state.refuse_different_starts(trainer)
        if stage == "fit" or not hasattr(self, "store"):
            self.use(trainer.strategy.broadcast(Path(trainer.default_root_dir) / "checkpoints"))
        if not isinstance(trainer.strategy.checkpoint_io, CheckpointIO):
            trainer.strategy.checkpoint_io = CheckpointIO(async_save=self.async_save)
        trainer.strategy.checkpoint_io.store = self.store
        load_last(trainer, self.store)
        if stage != "fit":
            return
        trainer.strategy.checkpoint_io.preloaded, self.preloaded = self.preloaded, None
        self._pending, self._ranks_changed = None, False
        self._enabled = not trainer.fast_dev_run  # type: ignore[attr-defined]
        self._baseline = Baseline(state.look(trainer))

    def use(self, directory: Path) -> None:
        """Keeps the checkpoints in `directory`; `setup` does it with the Trainer's."""
        self.store = CheckpointStore(
            directory, retention=self.retention, monitor=self.monitor, mode=self.mode
        )

    @property
    def best_model_path(self) -> str:
        """Where `Trainer.fit(ckpt_path="best")` looks, and `test`, `validate` and `predict`: before
        any `setup`.
        """
        call = _call_of_trainer()
        if not hasattr(self, "store") and call is not None:
            self.use(Path(call[0].default_root_dir) / "checkpoints")
        best = self.store.best() if hasattr(self, "store") else None
        if best is None and call is not None and call[2] == "best":
            raise CheckpointNotFoundError(
                f'No best checkpoint for Trainer.{call[1]}(ckpt_path="best"): '
                f"{self.store.directory}. Only those with a value of {self.monitor} at their own "
                "step are ranked. Train first, or name a file.",
                self.store.directory,
            )
        return str(best.path) if best else self._best_elsewhere

    @best_model_path.setter
    def best_model_path(self, path: str) -> None:
        """Lightning brings it back from the processes that `ddp_spawn` and `ddp_notebook` have
        trained in.
        """
        self._best_elsewhere = path

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
            # Another metric ranks now: each manifest holds all metrics of its step, so the files
            # are ranked again.
            self.scores.begin_with(self.store.best())

    # Lightning has just put its handlers in the place of ours. Where there are several ranks, its
    # own waits for all of them within the handler: for ever, if the signal came to one.
    # `on_train_start` is the third of these places.

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        preemption.install()
        if self._enabled:
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
            self._see(trainer)
            state.seed_validation(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        preemption.install()

    # -- going on from a checkpoint ---------------------------------------------------------------

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        state.load_in_precision(trainer, pl_module, checkpoint)
        if not checkpoint.get("at") or not self._enabled:
            return
        rank, others = trainer.global_rank, checkpoint.get("other_ranks", [])
        if len(others) + 1 != trainer.world_size:
            # Until an epoch begins anew by (seed, epoch) alone, nobody can make this training
            # again, from no file of it.
            self._ranks_changed = True
            if trainer.is_global_zero:
                print(state.ranks_changed(len(others) + 1, trainer.world_size), flush=True)
            return
        self._pending = checkpoint | (others[rank - 1] if rank else {})
        self._pending["versions"] = state.versions(pl_module)
        if self._pending.get("loaders") is not None:  # each rank has its own
            checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = self._pending[
                "loaders"
            ]
        state.skip_finders(trainer, self._pending.get("found", {}))
        # Up to the point of the checkpoint, whatever is logged stands in the log of the start
        # before.
        self._mute(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._enabled:
            return
        self._bounds = state.bounds(trainer)
        self._groups, self._shared = state.group_counts(trainer), state.shared_groups(trainer)
        if self._pending:
            state.prepare(trainer, self._pending)
            state.add_groups(trainer, self._pending.get("groups", {}))
        state.wake_finders(trainer)
        assert self._baseline is not None
        self._baseline.begin(state.look(trainer))
        if self._pending:
            state.put_data_back(trainer, self._pending, self._baseline)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._enabled:
            return
        preemption.arm()
        self._versions = state.versions(pl_module)
        self._began, self._saved_at = trainer.global_step, time.monotonic()
        self._watch.begin(pl_module.device)
        self._preflight(trainer)
        state.lay_buckets(trainer)
        self._points = state.Points(
            trainer,
            epoch=lambda: self._on_epoch(trainer),
            batch=lambda: self._on_batch(trainer),
            validation=lambda: self._on_validation(trainer),
            end=lambda: self._on_end(trainer),
        )
        if self._pending:
            state.load_waiting_states(trainer)
        state.run_in_order(trainer)
        self._accepted = False
        self._say_inexact(trainer, state.inexact(trainer, "batch"))

    def _preflight(self, trainer: Trainer) -> None:
        """What would make the first save fail is told before the first step."""
        with state.isolated_rng(trainer.lightning_module.device):
            checkpoint = state.as_lightning_saves(trainer)
        format.check_readable(checkpoint)
        if not trainer.is_global_zero:
            return
        least = format.size_bytes(checkpoint)
        parameters = format.size_bytes(
            [p for p in trainer.lightning_module.parameters() if p.requires_grad]
        )
        # Before its first step an optimizer has no state. Most keep two numbers for each of the
        # model's.
        fresh = not any(optimizer.get("state") for optimizer in checkpoint["optimizer_states"])
        warning = self.store.preflight(least, least + 2 * parameters * fresh, alone=self.alone)
        if warning:
            print(warning, file=sys.stderr, flush=True)

    def _see(self, trainer: Trainer) -> Look:
        """Looks; what is seen for the first time is as it was at the start."""
        now = state.look(trainer)
        assert self._baseline is not None
        self._baseline.meet(now)
        return now

    def _accept(self, trainer: Trainer) -> None:
        """All hooks that run before the first batch have run: what they have made, a resumed
        process makes too.
        """
        if self._accepted:
            return
        self._accepted = True
        self._settings, self._kinds = state.settings(trainer) | self._bounds, state.kinds(trainer)
        now = self._see(trainer)
        self._reads_gradients = state.reads_gradients(now)
        assert self._baseline is not None
        self._baseline.accept(now)

    def _arrived(self, trainer: Trainer, at: Point) -> bool:
        """Whether this is the very point of the checkpoint; then everything is put back."""
        if not self._pending or self._pending["at"] != at:
            return False
        saved, self._pending = self._pending, None
        assert self._baseline is not None
        state.set_up_validation(trainer)
        failed = state.reenter(trainer, saved, self._baseline, self._see(trainer))
        if not self.rates_are_overridden:
            state.put_groups_back(trainer, saved)
        state.share_again(self._shared)
        self._made_by = saved.get("made_by", [])
        self._unmute(trainer)
        if failed and trainer.is_global_zero:
            print(
                f"Not restored: {', '.join(failed)}. The code that made the checkpoint kept "
                "another kind of value there.",
                file=sys.stderr,
                flush=True,
            )
        return True

    def _mute(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            vars(logger)["log_metrics"] = _log_nothing

    def _unmute(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            vars(logger).pop("log_metrics", None)

    # -- the safe points --------------------------------------------------------------------------

    def _on_epoch(self, trainer: Trainer) -> None:
        if not trainer.fit_loop.restarted_mid_epoch:
            self._ranks_changed = False
        self._accept(trainer)
        arrived = self._arrived(trainer, "epoch")
        if not self._pending and self._baseline is not None:
            self._made_by = state.data_as_loaders_are_made(trainer, self._baseline)
        if not arrived and trainer.global_step > self._began:
            self.scores.measure_training(trainer.callback_metrics, trainer.global_step)
            self._poll(trainer, "epoch")

    def _on_batch(self, trainer: Trainer) -> bool:
        """False where the batch is left out, as the validation before it is to be run again."""
        if self._arrived(trainer, "validation"):
            return False
        loop = trainer.fit_loop.epoch_loop
        # While gradients are pending there is no safe point: they are not in the file.
        first, pending_gradients = not loop.batch_progress.current.ready, state.accumulates(trainer)
        self._raise_pending(trainer)
        if loop.restarting and not self._pending:
            # A resume as Lightning's own: it may leave out a validation here, and ask again.
            return True
        arrived = self._arrived(trainer, "batch")
        if first or arrived:
            self._held = state.held(trainer, self._held)
        if not arrived and not first and not pending_gradients:
            self._poll(trainer, "batch")
        self._loader_states = state.states_before_prefetching(trainer)
        return True

    def _on_end(self, trainer: Trainer) -> None:
        # Before the hooks of others at the end of the training: one that goes on longer never had
        # them here.
        self._captured = copy.deepcopy(self._capture(trainer, "epoch"))
        # And before weight averaging overwrites these for good.
        self._last_weights = (
            state.copied_weights(trainer.lightning_module) if state.averaging(trainer) else None
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._enabled:
            return
        self.scores.measure_training(trainer.callback_metrics, trainer.global_step)
        self._save(trainer, "epoch", reason="end", ended=facts.why_ended(trainer))
        self._captured = None
        self._release(trainer)
        self._finish_writing(trainer)
        preemption.disarm()
        if stop := self._agree(trainer)[0]:
            self._leave(trainer, stop)
        self.scores.require_monitor()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._release(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release(trainer)

    def _release(self, trainer: Trainer) -> None:
        if self._points:
            self._points.remove()
        self._points = self._baseline = None
        self._unmute(trainer)

    def _on_validation(self, trainer: Trainer) -> None:
        if trainer.sanity_checking:
            return
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
        state.seed_validation(trainer)
        # A copy: the validation that begins here changes it.
        self._captured = copy.deepcopy(self._capture(trainer, "validation"))
        self._before = state.before_validation(trainer)
        if self._loader_states is not None:
            self._before["fit_loop"]["state_dict"]["combined_loader"] = self._loader_states
        self._before_validation = dict(state.measured(trainer))

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self._captured is None or state.accumulates(trainer):
            return
        stop, save = self._agree(trainer)
        if stop or save:
            with state.current_weights(trainer):
                self._save(trainer, "validation", reason=self._reason(stop, save))
        if stop:
            self._leave(trainer, stop)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._captured is None:
            return
        self._captured = None
        before, now = self._before_validation, state.measured(trainer)
        # Whatever the number of loaders: what is another object now was measured by this
        # validation.
        metrics = {name: value for name, value in now.items() if value is not before.get(name)}
        self.scores.measure_validation(metrics, trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # A training_step may return nothing, a dict without a loss or, under manual optimization,
        # anything.
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if self._enabled and isinstance(loss, Tensor):
            self._watch.see(loss, trainer.global_step)

    # -- deciding ---------------------------------------------------------------------------------

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
        """(signal to stop or 0, save now): the same on every rank, or one would save and stop while
        others train on.
        """
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
        if (
            at == "epoch"
            and self.save_every_epochs
            and trainer.current_epoch % self.save_every_epochs == 0
        ):
            return "epochs"
        return "best" if self.retention.keep_best and self.scores.best_step == step else ""

    # -- saving -----------------------------------------------------------------------------------

    def _save(self, trainer: Trainer, at: Point, *, reason: str, ended: str | None = None) -> None:
        step = trainer.global_step
        # One save at a time; what failed in the one before is said before this one.
        self._finish_writing(trainer)
        if self._saved == (step, at) and ended is None:
            return
        if unsound := self._watch.check_weights(trainer, self.store):
            self._fail(unsound)
            return
        self._saved, self._saved_step = (step, at), step
        self._at, self._why = at, {"reason": reason, "ended": ended}
        said, started = self._when(trainer, at) + self.scores.sentence(step), time.perf_counter()
        path = self.store.path(step)
        preemption.requests.save = False
        try:
            if trainer.is_global_zero:
                self._sync_logs(trainer, path)
            with state.isolated_rng(trainer.lightning_module.device):
                # As by default, without Lightning's line about it.
                trainer.save_checkpoint(path, weights_only=False)
            if trainer.is_global_zero:
                self._writer(trainer).submit(lambda: self._commit(path, said, started))
        except (OSError, CheckpointContentError) as error:
            self._fail(error)
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the other ranks wait
        finally:
            self._at, self._why = None, {}
        self._saved_at = time.monotonic()

    def _sync_logs(self, trainer: Trainer, path: Path) -> None:
        """The rows that a checkpoint counts are on disk before it.

        A crash between the two leaves rows too many, which a resume cuts, never a gap.
        """
        if self.before_save:
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
        print(
            f"{said}saved {path.name} ({megabytes(path.stat().st_size)}, {milliseconds:.0f} ms)",
            flush=True,
        )

    def _when(self, trainer: Trainer, at: Point) -> str:
        return (
            f"epoch {trainer.current_epoch}: " if at == "epoch" else f"step {trainer.global_step}: "
        )

    def _fail(self, error: Exception) -> None:
        self.failure, self._saved, self._saved_at = error, None, time.monotonic()
        print(
            f"{error} Training goes on; the checkpoints before it are intact.",
            file=sys.stderr,
            flush=True,
        )

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
            # Or the launcher would take this rank for a crashed one, and kill the one that saves.
            preempted.code = 0
        raise preempted

    def _capture(self, trainer: Trainer, at: Point | None) -> dict[str, Any]:
        rows = [logger.rows for logger in trainer.loggers if hasattr(logger, "rows")]
        own = state.capture(trainer, trainer.lightning_module, self._reads_gradients)
        own["logged_rows"] = rows[0] if rows and trainer.is_global_zero else None
        own["unsaved"] = state.inexact(trainer, at)
        if self._ranks_changed:
            own["unsaved"].append("this epoch was begun by another number of processes")
        own["attributes"], own["settings"] = [], {}
        if self._baseline is not None:
            now = self._see(trainer)
            own["attributes"], named = self._baseline.changes(now)
            own["unsaved"] += [*named, *changed_since(self._held, now)]
            before = self._settings
            own["unsaved"] += state.other_kinds(trainer, self._kinds) if self._accepted else []
            own["settings"] = {
                k: v for k, v in state.settings(trainer).items() if v != before.get(k, v)
            }
        if trainer.world_size > 1:
            ahead = at != "epoch" and self._loader_states is not None
            own["loaders"] = self._loader_states if ahead else state.loader_states(trainer)
            own |= state.own_rank(trainer)
        own["found"], own["made_by"] = state.found(trainer), self._made_by
        own["groups"] = state.grown_groups(trainer, self._groups)
        return own

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not self._enabled:
            return
        ended, loops = self._why.get("ended"), checkpoint["loops"]["fit_loop"]
        if self._captured is not None and (self._at == "validation" or ended):
            own = {**self._captured, "unsaved": list(self._captured["unsaved"])}
        else:
            own = self._capture(trainer, self._at)
        if self._at == "validation":
            own["unsaved"] += state.as_before_validation(trainer, checkpoint, self._before)
        elif self._at == "batch" and self._loader_states is not None:
            loops["state_dict"]["combined_loader"] = self._loader_states
        if ended and not state.at_end_of_epoch(trainer):
            own["unsaved"].append(f"ended by {ended} inside an epoch, which counts as done")
        if ended and self._last_weights is not None:
            checkpoint["current_model_state"] = self._last_weights
        ranks = [own]
        if trainer.world_size > 1:
            ranks = [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(ranks, own)
            checkpoint["other_ranks"] = ranks[1:]
            del ranks[0]["buffers"]  # they stand in its state_dict
        unsaved = list(dict.fromkeys(reason for rank in ranks for reason in rank.pop("unsaved")))
        checkpoint.update(ranks[0])
        checkpoint["at"] = self._at
        # Lightning logs every step while it is set. Of a run that has ended it is no state: it may
        # be asked to go on.
        checkpoint["should_stop"] = trainer.should_stop and not ended
        checkpoint["config"], checkpoint["run"] = self.provenance.config, dict(self.provenance.run)
        checkpoint["optimizer"] = next(iter(checkpoint["optimizer_states"]), None)
        checkpoint[self.scores.key] = self.scores.best
        checkpoint["canary"] = canary(pl_module, checkpoint["state_dict"])
        checkpoint["manifest"] = self._make_facts(trainer, unsaved)
        self._writer(trainer).finish = lambda whole: self._finish(trainer, whole)

    def _finish(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Once the module's own on_save_checkpoint has had its word, which comes after that of
        callbacks.
        """
        facts = checkpoint["manifest"]
        facts["unsaved"] += state.left_out(
            trainer.lightning_module, checkpoint["state_dict"], self._versions
        )
        facts["exact"] = not facts["unsaved"]
        if facts["at"] is not None:
            self._say_inexact(trainer, facts["unsaved"])

    def _make_facts(self, trainer: Trainer, unsaved: list[str]) -> dict[str, Any]:
        why = self._why or {"reason": "user", "ended": None}
        own = {"at": self._at, "exact": not unsaved, "unsaved": unsaved[:20]}
        return (
            facts.gather(trainer, self.provenance)
            | own
            | why
            | self.scores.facts(trainer.global_step)
        )

    def _say_inexact(self, trainer: Trainer, reasons: list[str]) -> None:
        """Each reason once a run."""
        new = [reason for reason in reasons if reason not in self._said_inexact]
        self._said_inexact |= set(new)
        if new and trainer.is_global_zero:
            print(f"A resume will not be exact: {'; '.join(new[:5])}.", flush=True)


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """In a logger's place until a resume has reached the point of its checkpoint."""


def load_last(trainer: Trainer, store: CheckpointStore) -> None:
    """Makes `ckpt_path="last"` the newest checkpoint that verifies: Lightning looks at its own
    ModelCheckpoint only.

    Finding none, it would go on with untrained weights. What lies ready where it puts a file that
    it has read, it restores.

    Raises:
        CheckpointNotFoundError: to test, validate or predict there must be one; a fit may begin
            without.
    """
    call = _call_of_trainer()
    if call is None or call[0] is not trainer or call[2] != "last" or call[3]:
        return
    if call[1] == "fit" and not any(store.directory.glob("step-*")):
        if trainer.is_global_zero:
            print(
                f'No checkpoint yet in {store.directory}: ckpt_path="last" begins a new training.',
                flush=True,
            )
        return
    chosen, checkpoint, lines = store.load_latest(lock_holder=False)
    if trainer.is_global_zero:
        print("\n".join([*lines, f"From {chosen.path}: step {chosen.step}"]), flush=True)
    state.give_loaded(trainer, checkpoint)


def _call_of_trainer() -> tuple[Trainer, str, Any, Any] | None:
    """The running call of `fit`, `validate`, `test` or `predict`: of which trainer, which, its
    ckpt_path, the path found.

    By the time a callback is asked, Lightning has forgotten the word: it stands only in the frame
    of the call.
    """
    frame, found = sys._getframe(), None
    while frame.f_back is not None:
        frame = frame.f_back
        own, values = frame.f_locals.get("self"), frame.f_locals
        if isinstance(own, Trainer) and frame.f_code.co_name == "_run":
            found = values.get("ckpt_path")
        if isinstance(own, Trainer) and frame.f_code.co_name in (
            "fit",
            "validate",
            "test",
            "predict",
        ):
            return own, frame.f_code.co_name, values.get("ckpt_path"), found
    return None
