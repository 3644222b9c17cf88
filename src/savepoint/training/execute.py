"""Fits, tests and sums up a training that was built; returns the exit code."""

import sys
import traceback
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from savepoint import preemption, weights
from savepoint.checkpoint import watched
from savepoint.checkpoint.scores import never_logged
from savepoint.errors import ConfigError, RunDirectoryError, SavepointError
from savepoint.job import rank
from savepoint.preemption import Preempted
from savepoint.run import Run, resume_command
from savepoint.training.build import Training, build
from savepoint.training.summary import summarise, table
from savepoint.words import plural, show


def train(config: Any, config_name: str, *, reuse: Path | None = None) -> int:
    """Trains a new run. `reuse` is a directory that may exist already, of a run that was killed
    before its first checkpoint.
    """
    run = Run.open(reuse) if reuse and reuse.is_dir() else None
    run = run or Run.create(config.output_dir, config.run_name, config_name)
    try:
        training = build(config, run)
        take_weights(training, config)
        if rank() == 0:
            print(f"Run {show(run.directory)}", flush=True)
        return execute(training)
    except BaseException:
        run.discard()
        raise


def take_weights(training: Training, config: Any) -> None:
    """Those of `init_from`, where the config names a file."""
    if config.init_from:
        path = config.init_from
        strict = config.init_strict
        weights.when_made(
            training.trainer,
            training.model,
            lambda model: weights.initialise(model, path, strict=strict),
        )


def execute(
    training: Training, checkpoint: Path | None = None, trained: tuple[int, int] | None = None
) -> int:
    """Fit, test, summarise. Returns the exit code: 1 where the newest state could not be saved.

    Args:
        trained: Step and epoch of a run that has ended and was killed in its test: there is
            nothing to fit.
    """
    trainer = training.trainer
    try:
        if training.uploader is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            training.uploader.begin(is_new=checkpoint is None and trained is None)
        if trained is None:
            trainer.fit(training.model, datamodule=training.data, ckpt_path=checkpoint)
        return _finish(training, *(trained or (trainer.global_step, trainer.current_epoch)))
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        refused = _refusal(training, error)
        if refused is None:
            raise
        raise refused from error
    except Preempted:
        if trainer.is_global_zero and (latest := training.checkpointing.store.latest()):
            command = resume_command(training.run.directory)
            try:
                training.run.write_resume_command(command)
            # The exit code, which names the signal, matters more.
            except RunDirectoryError as error:
                print(error, file=sys.stderr)
            lost = max(0, trainer.global_step - latest.step)
            without = f", {plural(lost, 'step')} lost" if lost else ""
            saved = f"Saved at step {latest.step}{without}"
            print(f"{saved}. Continue with: {command}", flush=True)
        raise
    finally:
        if training.uploader is not None:
            training.uploader.close(preemption.requests.since or None)
        training.run.unlock()


def _refusal(training: Training, error: Exception) -> ConfigError | None:
    """What Lightning refuses, in words for the command line; None for a failure of another kind."""
    text = " ".join(str(error).split())
    if " conditioned on metric " in text:  # by early stopping, or a schedule that waits for one
        for place, name in watched.missing(training.trainer):
            return never_logged(place, name, training.trainer.callback_metrics)
    if isinstance(error, MisconfigurationException) or _is_raised_by_lightning(error):
        return ConfigError(f"Lightning refuses this training: {text}")
    return None


def _is_raised_by_lightning(error: Exception) -> bool:
    """Whether Lightning's own line refuses a value: an interval of validations longer than the
    epoch, say.
    """
    if not isinstance(error, ValueError) or isinstance(error, SavepointError):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("lightning.")


def _finish(training: Training, step: int, epoch: int) -> int:
    """Test the best weights, write summary.json, print the table."""
    failure = training.checkpointing.saver.failure
    # Printed before the test, which a full disk may end.
    if failure is not None and training.trainer.is_global_zero:
        print(f"The newest state of this run is not saved. {failure}", file=sys.stderr, flush=True)
    try:
        training.run.check()  # or the test would read and write whatever lies there now
        summary = summarise(training, step, epoch)
        if training.trainer.is_global_zero:
            print(table(training, summary), flush=True)
            if not training.trainer.fast_dev_run:  # type: ignore[attr-defined]
                training.run.write_summary(summary)
    except (OSError, ValueError) as error:
        if failure is None:
            raise
        print(f"Not tested: {error}", file=sys.stderr)
    loggers: list[Any] = training.trainer.loggers
    # The logger of a fast_dev_run has every attribute.
    waiting = [one for one in loggers if isinstance(getattr(one, "failure", None), OSError)]
    if waiting:
        names = ", ".join(type(logger).__name__ for logger in waiting)
        print(f"The log of this run is not whole: {names} ({waiting[0].failure}).", file=sys.stderr)
    return 1 if failure or waiting else 0
