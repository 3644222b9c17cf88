"""One training: from a config to model, data and trainer, through fit and test, to a summary."""

import logging
import shlex
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.model_helpers import is_overridden

import savepoint
from savepoint import cli, compose, weights
from savepoint.checkpoint import store
from savepoint.checkpoint.callback import CheckpointCallback
from savepoint.checkpoint.facts import Provenance
from savepoint.checkpoint.manifest import step_in_name
from savepoint.checkpoint.state import capture_rng, isolated_rng, restore_rng
from savepoint.errors import RunDirectoryError
from savepoint.job import rank
from savepoint.logs import RunCSVLogger, RunTensorBoardLogger, last_step
from savepoint.preemption import Preempted
from savepoint.progress import Meter, display
from savepoint.run import Run, resume_command
from savepoint.words import metrics, plural, python, show

_CPU = torch.device("cpu")


@dataclass
class Start:
    """Where a training begins: from nothing, or from a checkpoint of a run."""

    checkpoint: Path | None = None
    digest: str | None = None
    run: Mapping[str, Any] | None = None  # id and name of the run that made it
    keep_rows: int = 0
    purge_step: int | None = None
    changed: Mapping[str, tuple[Any, Any]] | None = None  # config key -> (was, is)
    callbacks: Sequence[Callback] = ()
    begun: Sequence[Callback] = ()  # called last, once it is sure that the training begins
    state: tuple[Path, Any] | None = None  # the checkpoint as it was read and verified


@dataclass
class Training:
    """What `build` makes."""

    run: Run
    model: LightningModule
    data: LightningDataModule
    trainer: Trainer
    checkpointing: CheckpointCallback
    meter: Meter
    last: Mapping[str, Any] | None = None  # the newest checkpoint, where there is nothing to fit


class RepeatedSetup:
    """Each call of a data module's `setup` finds the random generators as the first did: where it splits at random, the
    parts of the test are those of the fit, and an evaluation's those of the training.
    """

    def __init__(self, data: LightningDataModule) -> None:
        self.data, self.rng, self.called = data, capture_rng(_CPU), False

    def __call__(self, *arguments: Any, **named: Any) -> None:
        setup = type(self.data).setup
        if not self.called:
            self.called = True
            restore_rng(self.rng, _CPU)
            setup(self.data, *arguments, **named)
            return
        with isolated_rng(_CPU):
            restore_rng(self.rng, _CPU)
            setup(self.data, *arguments, **named)


class _Recorder(Checkpoint):
    """Writes run.json and config.yaml once training begins: a start that fails before leaves the directory as it was.

    A Checkpoint by name, as Lightning calls those last, in their order: after the preflight of the one that saves.
    """

    def __init__(self, run: Run, record: Mapping[str, Any], config: str, start: Start) -> None:
        self.run, self.record, self.config, self.start = run, record, config, start
        self.reached = last_step(
            run.directory / "metrics.csv"
        )  # as the log stood: what comes after the checkpoint is cut

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.run.record_start(
                self.record,
                self.config,
                checkpoint=self.start.checkpoint and self.start.checkpoint.name,
                step=trainer.global_step,
                parent=dict(self.start.run) if self.start.run else None,
                changed={key: list(pair) for key, pair in (self.start.changed or {}).items()},
                world_size=trainer.world_size,
                took_over=self.run.took_over,
                reached=self.reached,
            )


def build(config: Any, run: Run, start: Start | None = None) -> Training:
    """Model, data and trainer of a config, wired to a run directory. Nothing is written yet.

    Raises:
        ConfigError: Lightning refuses a value of the config.
    """
    start = start or Start()
    quieten()
    text, record, meter = cli.dump(config), run.record, Meter()
    loggers: list[Logger] = [
        RunCSVLogger(run.directory / "metrics.csv", start.keep_rows),
        RunTensorBoardLogger(run.directory, start.purge_step),
    ]
    shown = display(meter)
    callbacks = [*shown.pop("callbacks"), *start.callbacks]
    model, data, trainer = cli.instantiate(
        config, callbacks=callbacks, logger=loggers, default_root_dir=str(run.directory), **shown
    )
    data.setup = RepeatedSetup(data)  # type: ignore[method-assign]
    trainer.callbacks += [*start.begun, _Recorder(run, record, text, start)]  # type: ignore[attr-defined]
    for logger in trainer.loggers:
        if hasattr(logger, "join"):
            logger.join(record["id"], run.directory)
    checkpointing = next(c for c in trainer.callbacks if isinstance(c, CheckpointCallback))  # type: ignore[attr-defined]
    checkpointing.use(run.directory / "checkpoints")
    checkpointing.alone, checkpointing.before_save, checkpointing.preloaded = True, run.check, start.state
    checkpointing.provenance = Provenance(
        config=cli.dump(portable(config)),
        parent=start.digest,
        run={"id": record["id"], "name": run.directory.name},
    )
    return Training(run, model, data, trainer, checkpointing, meter)


def train(config: Any, argv: Sequence[str], *, reuse: Path | None = None) -> int:
    """A new run. `reuse` is a directory that may be there already, without a checkpoint: it was killed before its first."""
    exists = reuse is not None and reuse.is_dir()
    run = (
        Run.open(reuse)
        if reuse and exists
        else Run.create(config.output_dir, config.run_name, compose.config_name(argv))
    )
    try:
        training = build(config, run)
        if config.init_from:
            path, strict = config.init_from, config.init_strict
            weights.when_made(
                training.trainer, training.model, lambda model: weights.initialise(model, path, strict=strict)
            )
        if rank() == 0:
            print(f"Run {show(run.directory)}", flush=True)
        return execute(training)
    except BaseException:
        run.discard()
        raise


def portable(config: Any) -> Any:
    """The config without what says where and how this start was made: the same in every checkpoint of equal runs."""
    config = config.clone()
    config.run_name, config.output_dir, config.resume = None, "outputs", None
    return config


def execute(training: Training, checkpoint: Path | None = None, trained: tuple[int, int] | None = None) -> int:
    """Fit, test, summarise. Returns the exit code: 1 where the newest state could not be saved.

    Args:
        trained: Step and epoch of a run whose training has ended and that was killed in its test: there is nothing to fit.
    """
    trainer = training.trainer
    try:
        if trained is None:
            trainer.fit(training.model, datamodule=training.data, ckpt_path=checkpoint)
        return _finish(training, *(trained or (trainer.global_step, trainer.current_epoch)))
    except Preempted:
        if trainer.is_global_zero and (latest := training.checkpointing.store.latest()):
            command = resume_command(training.run.directory)
            try:
                training.run.write_resume_command(command)
            except RunDirectoryError as error:  # the code that says who stopped the run matters more
                print(error, file=sys.stderr)
            lost = max(0, trainer.global_step - latest.step)
            without = f", {plural(lost, 'step')} lost" if lost else ""
            saved = f"Saved at step {latest.step}{without}"
            print(f"{saved}. Continue with: {command}", flush=True)
        raise
    finally:
        training.run.unlock()


def _finish(training: Training, step: int, epoch: int) -> int:
    """Test the best weights, write summary.json, print the table."""
    failure = training.checkpointing.failure
    if failure is not None:  # said before the test, which a full disk may end
        print(f"The newest state of this run is not saved. {failure}", file=sys.stderr, flush=True)
    try:
        training.run.check()  # or the test would look at, and write to, whatever lies there now
        summary = summarise(training, step, epoch)
        if training.trainer.is_global_zero:
            print(table(training, summary), flush=True)
            if not training.trainer.fast_dev_run:  # type: ignore[attr-defined]
                training.run.write_summary(summary)
    except (OSError, ValueError) as error:
        if failure is None:
            raise
        print(f"Not tested: {error}", file=sys.stderr)
    if waiting := [logger for logger in training.trainer.loggers if getattr(logger, "failure", None)]:
        names = ", ".join(type(logger).__name__ for logger in waiting)
        print(f"The log of this run is not whole: {names} ({waiting[0].failure}).", file=sys.stderr)  # type: ignore[attr-defined]
    return 1 if failure or waiting else 0


def summarise(training: Training, steps: int, epochs: int) -> dict[str, Any]:
    trainer, checkpointing = training.trainer, training.checkpointing
    best_score, best_step = checkpointing.scores.best, checkpointing.scores.best_step
    tested, state = _best(training)
    results: dict[str, Any] = {}
    if is_overridden("test_step", training.model) and is_overridden("test_dataloader", training.data):
        if state is not None:
            trainer.callbacks.append(weights.Once(lambda model: weights.restore(model, state)))  # type: ignore[attr-defined]
        results = dict(trainer.test(training.model, datamodule=training.data, verbose=False)[0])
        limit = trainer.limit_test_batches
        if isinstance(limit, int) or limit != 1.0:  # 1 is a single batch, 1.0 all of them
            results["limit_test_batches"] = limit
    return {
        **results,
        checkpointing.scores.key: best_score,
        "best_step": best_step,
        "epochs": epochs,
        "steps": steps,
        "fit_secs": round(training.meter.fit_secs, 2),
        "wall_secs": round(time.monotonic() - savepoint.STARTED, 2),
        "images_per_sec": round(training.meter.overall_samples_per_sec),
        "dataset": getattr(training.data, "name", None) or type(training.data).__name__,
        "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
        "tested_checkpoint": tested,
        "checkpoints": sorted(path.name for path in (training.run.directory / "checkpoints").glob("*.ckpt")),
    }


def _best(training: Training) -> tuple[str | None, Mapping[str, Any] | None]:
    """Name and state of the best checkpoint, which is tested; where nothing was ranked, the last weights are."""
    best = None if training.trainer.fast_dev_run else training.checkpointing.store.best()  # type: ignore[attr-defined]
    if best is None:
        return None, training.last
    return best.path.name, store.load(best.path)[0]


def table(training: Training, summary: Mapping[str, Any]) -> str:
    directory = show(training.run.directory)
    rows = metrics((name, value) for name, value in summary.items() if name.startswith("test/"))
    if "limit_test_batches" in summary:
        rows.append(
            ("tested on", f"a part of the test data: trainer.limit_test_batches {summary['limit_test_batches']}")
        )
    scores = training.checkpointing.scores
    starts = " over all starts" if training.meter.goes_on else ""
    tested = summary["tested_checkpoint"]
    if (
        tested and scores.best_step is not None and step_in_name(tested) != scores.best_step
    ):  # in a fork, its parent has it
        rows.append(("tested", f"{tested}: the best that is in this run"))
    if scores.best is not None:
        rows.append((f"best {scores.monitor}", f"{scores.best:.4f} at step {scores.best_step}"))
    rows += [
        ("data", str(summary["dataset"])),
        ("trained", f"{plural(summary['epochs'], 'epoch')}, {plural(summary['steps'], 'step')} "
                    f"in {summary['fit_secs']:.1f} s{starts} "
                    f"({summary['images_per_sec']} images/s), this process {summary['wall_secs']:.1f} s"),
        ("run directory", directory),
        ("train longer", f"{resume_command(training.run.directory)} --trainer.max_epochs {2 * max(summary['epochs'], 1)}"),
        ("look at it", f"{python()} -m tensorboard.main --logdir {shlex.quote(directory)}"),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    return "\n".join(["", *(f"{name:<{width}}  {value}" for name, value in rows)])


def quieten() -> None:
    """Lightning's chatter about devices and other products; warnings that a user of this project cannot act on."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", module="lightning")
