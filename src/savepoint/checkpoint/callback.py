"""The Lightning callback that saves a training where nothing is half done, and resumes it exactly.

What is saved and put back is `state.training`'s, when it is due and what a failed save means are
`saver`'s: here stand Lightning's hooks.
"""

import warnings
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from savepoint import files, preemption
from savepoint.checkpoint import facts, watched
from savepoint.checkpoint.ckpt_path import load_last, running_call
from savepoint.checkpoint.finite import loss_of
from savepoint.checkpoint.io import CheckpointIO
from savepoint.checkpoint.retention import Retention
from savepoint.checkpoint.scores import Scores
from savepoint.checkpoint.state import elastic, exactness, loops, ranks, start, validation
from savepoint.checkpoint.state.points import Points
from savepoint.checkpoint.state.training import TrainingState
from savepoint.checkpoint.store import CheckpointStore
from savepoint.checkpoint.trainer_saver import TrainerSaver
from savepoint.errors import CheckpointNotFoundError, ConfigError
from savepoint.mirror.settings import Mirroring
from savepoint.sharded.strategy import Sharding


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
        mirror: URL below which a thread keeps a copy of the run, such as s3://BUCKET/PREFIX; null
            for none.
        mirror_every: Upload every n-th checkpoint that is saved; the last one in any case.
        mirror_keep_last: Newest checkpoints to keep in the mirror.
        mirror_keep_best: Best checkpoints to keep in the mirror.
        mirror_grace_secs: Seconds that the end of a run waits for the last upload.
        sharded: Whether each rank writes its part of a checkpoint, which is a directory then: auto,
            where the strategy spreads the state over the ranks (ModelParallelStrategy); true, under
            DDP as well; false gathers it for one file.
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
        mirror: str | None = None,
        mirror_every: int = 1,
        mirror_keep_last: int = 2,
        mirror_keep_best: int = 1,
        mirror_grace_secs: float = 90.0,
        sharded: Literal["auto"] | bool = "auto",
    ) -> None:
        # `load_last` finds it then.
        warnings.filterwarnings(
            "ignore", message=r'\.\w+\(ckpt_path="last"\) is set, but there is no last checkpoint'
        )
        self.monitor = monitor
        self.mode = mode
        self.async_save = async_save
        self.sharded = sharded
        self.retention = Retention(
            keep_last=keep_last,
            keep_best=keep_best,
            keep_every_n_epochs=keep_every_n_epochs,
            keep_every_n_steps=keep_every_n_steps,
        )
        self.mirroring: Mirroring | None = None  # `training.build` sees to it
        if mirror is not None:
            self.mirroring = Mirroring(
                mirror, mirror_every, mirror_keep_last, mirror_keep_best, mirror_grace_secs
            )
        self.scores = Scores(monitor, mode)
        self.saver = TrainerSaver(
            self._store(Path("checkpoints")),
            self.scores,
            save_every_epochs=save_every_epochs,
            save_every_steps=save_every_steps,
            save_every_secs=save_every_secs,
            on_nan=on_nan,
        )
        self.preloaded: tuple[Path, Any] | None = None  # what `fit(ckpt_path=)` need not read again
        self._has_directory = False
        self._points: Points | None = None
        self._began = 0  # the step that this process began with
        self._before_validation: dict[str, Tensor] = {}
        self._best_elsewhere = ""

    # -- setting up -------------------------------------------------------------------------------

    @property
    def store(self) -> CheckpointStore:
        return self.saver.store

    @property
    def training(self) -> TrainingState | None:
        """None in a fast_dev_run: nothing is saved."""
        return self.saver.training

    def use(self, directory: Path) -> None:
        """Keeps the checkpoints in `directory`; `setup` does it with the Trainer's."""
        self.saver.store = self._store(directory)
        self._has_directory = True

    def _store(self, directory: Path) -> CheckpointStore:
        return CheckpointStore(
            directory, retention=self.retention, monitor=self.monitor, mode=self.mode
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            files.refuse_url(trainer.default_root_dir, "trainer.default_root_dir")
            ranks.refuse_shards(trainer)
            ranks.refuse_different_starts(trainer)
            self._refuse_lone_mirror(trainer)
            ranks.refuse_with_shards(trainer, self.sharded)
        if stage == "fit" or not self._has_directory:
            self.use(trainer.strategy.broadcast(Path(trainer.default_root_dir) / "checkpoints"))
        if not isinstance(trainer.strategy.checkpoint_io, CheckpointIO):
            trainer.strategy.checkpoint_io = CheckpointIO(async_save=self.async_save)
        trainer.strategy.checkpoint_io.store = self.store
        known = self.saver.sharding
        if self._saves_together(trainer) and (known is None or known.trainer is not trainer):
            self.saver.sharding = Sharding(trainer, in_parts=self.sharded is not False)
        load_last(trainer, self.store)
        if stage != "fit":
            return
        elastic.follow(trainer)
        trainer.strategy.checkpoint_io.preloaded = self.preloaded
        self.preloaded = None
        self.saver.training = None
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            in_parts = self.saver.sharding is not None and self.saver.sharding.in_parts
            self.saver.training = TrainingState(trainer, in_parts=in_parts)

    def _saves_together(self, trainer: Trainer) -> bool:
        """Whether all ranks write a checkpoint, not the first one alone."""
        return ranks.is_spread(trainer) or (self.sharded is True and trainer.world_size > 1)

    def _refuse_lone_mirror(self, trainer: Trainer) -> None:
        if self.mirroring and self.saver.committed is None and trainer.is_global_zero:
            raise ConfigError(
                f"Nothing would be uploaded to {self.mirroring.url}: checkpoint.mirror is for runs "
                "of train.py, which have a name and an id. Leave it out in a Trainer of your own."
            )

    @property
    def best_model_path(self) -> str:
        """Where `Trainer.fit(ckpt_path="best")` looks, and `test`, `validate` and `predict`: before
        any `setup`.
        """
        call = running_call()
        if not self._has_directory and call is not None:
            self.use(Path(call[0].default_root_dir) / "checkpoints")
        best = self.store.best() if self._has_directory else None
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
            "saved_step": self.saver.saved_step,
            "ranks_changed": self.training.ranks_changed if self.training is not None else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.saver.saved_step = state_dict["saved_step"]
        if self.training is not None:
            self.training.add_reasons(state_dict.get("ranks_changed", []))
        if not self.scores.load_state_dict(state_dict["scores"]) and self._has_directory:
            # Another metric ranks now: each manifest holds all metrics of its step, so the files
            # are ranked again.
            self.scores.begin_with(self.store.best())

    # -- the start --------------------------------------------------------------------------------

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        start.load_in_precision(trainer, pl_module, checkpoint)
        if checkpoint.get("at") and self.training:
            self.training.load(checkpoint)
            if ranks.is_spread(trainer):
                self.training.prepare_late()
        if self.saver.sharding is not None:
            self.saver.sharding.load_optimizers(checkpoint)

    def keep_rates(self) -> None:
        """The user has overridden rates on this resume: those of the file are not put back."""
        if self.training:
            self.training.rates_are_overridden = True

    # Lightning has just put its handlers in the place of ours. Where there are several ranks, its
    # own waits for all of them within the handler: for ever, if the signal came to one.
    # `on_train_start` is the third of these places.

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        preemption.install()
        if self.training:
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
            self.training.see()
            validation.seed_validation(trainer)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        watched.check_validation(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        preemption.install()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.training:
            self.training.prepare()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.training:
            return
        preemption.arm()
        self._began = trainer.global_step
        self.saver.begin()
        self.saver.watch.begin(pl_module.device)
        self.saver.look_ahead(trainer)
        self._points = Points(
            trainer,
            epoch=lambda: self._on_epoch(trainer),
            batch=lambda: self._before_batch(trainer),
            validation=lambda: self._on_validation(trainer),
            end=lambda: self._running.keep_end(),
        )
        self.training.begin()
        if trainer.is_global_zero:
            self.saver.say_inexact(exactness.inexact(trainer, "batch"))

    # -- the points -------------------------------------------------------------------------------

    @property
    def _running(self) -> TrainingState:
        assert self.training is not None  # the points are reached in a training alone
        return self.training

    def _on_epoch(self, trainer: Trainer) -> None:
        training = self._running
        if not training.begin_epoch() and trainer.global_step > self._began:
            self.scores.measure_training(trainer.callback_metrics, trainer.global_step)
            self.saver.poll_at(trainer, "epoch")
            self.scores.require_monitor()
        elastic.seed_epoch(trainer)

    def _before_batch(self, trainer: Trainer) -> bool:
        goes_on = self._on_batch(trainer)
        elastic.seed_batch(trainer)
        return goes_on

    def _on_batch(self, trainer: Trainer) -> bool:
        """False where the batch is left out, as the validation before it is to be run again."""
        training = self._running
        loop = trainer.fit_loop.epoch_loop
        loops.follow_training(trainer)
        if training.arrive("validation"):
            validation.pass_over_hook(trainer.lightning_module)
            return False
        # While gradients are pending there is no safe point: they are not in the file.
        first = not loop.batch_progress.current.ready
        pending_gradients = loops.accumulates(trainer)
        self.saver.raise_pending(trainer)
        if loop.restarting and not training.is_resuming:
            # A resume as Lightning's own: it may leave out a validation here, and ask again.
            return True
        arrived = training.arrive("batch")
        if first or arrived:
            training.begin_pass()
        if not arrived and not first and not pending_gradients:
            self.saver.poll_at(trainer, "batch")
        training.fetch_next()
        return True

    def _on_validation(self, trainer: Trainer) -> None:
        if trainer.sanity_checking:
            return
        validation.end_passing_over(trainer.lightning_module)
        self._running.begin_validation()
        elastic.seed_validation(trainer)
        self._before_validation = dict(loops.measured(trainer))

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if not self._in_validation or loops.accumulates(trainer):
            return
        stop, save = self.saver.agree(trainer)
        if stop or save:
            with validation.current_weights(trainer):
                self.saver.save(trainer, "validation", reason=self.saver.reason(stop, save))
        if stop:
            self.saver.leave(trainer, stop)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._in_validation:
            return
        self._running.captured = None
        before = self._before_validation
        now = loops.measured(trainer)
        # Whatever the number of loaders: what is another object now was measured by this
        # validation.
        metrics = {name: value for name, value in now.items() if value is not before.get(name)}
        self.scores.measure_validation(metrics, trainer.global_step)

    @property
    def _in_validation(self) -> bool:
        return self.training is not None and self.training.captured is not None

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        loss = loss_of(outputs)
        if self.training and isinstance(loss, Tensor):
            # The step that the batch is part of: with gradients that accumulate, the coming one.
            self.saver.watch.see(loss, trainer.global_step + loops.accumulates(trainer))

    # -- the end ----------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.training:
            return
        self.scores.measure_training(trainer.callback_metrics, trainer.global_step)
        self.saver.save(trainer, "epoch", reason="end", ended=facts.why_ended(trainer))
        self.training.captured = None
        self._release(trainer)
        self.saver.finish_writing(trainer)
        preemption.disarm()
        stop, _ = self.saver.agree(trainer)
        if stop:
            self.saver.leave(trainer, stop)
        self.scores.require_monitor()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._release(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release(trainer)

    def _release(self, trainer: Trainer) -> None:
        elastic.release(trainer)
        if self._points:
            self._points.remove()
            self._points = None
        if self.training:
            self.training.release()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.saver.fill(trainer, pl_module, checkpoint)
