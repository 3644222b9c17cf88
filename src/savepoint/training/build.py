"""A config, wired to a run directory: model, data, trainer, logs and the callback that saves."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import Logger

from savepoint.checkpoint.callback import CheckpointCallback
from savepoint.checkpoint.facts import Provenance
from savepoint.checkpoint.state.process import capture_rng, isolated_rng, restore_rng
from savepoint.config import typed
from savepoint.job import rank
from savepoint.mirror.uploader import Uploader
from savepoint.run import Run, resume_command
from savepoint.tail import last_step
from savepoint.training import threads
from savepoint.training.bar import display
from savepoint.training.logs import RunCSVLogger, RunTensorBoardLogger
from savepoint.training.progress import Meter

_CPU = torch.device("cpu")


@dataclass
class Start:
    """Where a training begins: from nothing, or from a checkpoint of a run."""

    checkpoint: Path | None = None
    digest: str | None = None
    run: Mapping[str, Any] | None = None  # id and name of the run that made it
    keep_rows: int = 0
    keep_events: Mapping[str, Any] | None = None
    threads: int | None = None  # of the checkpoint
    purge_step: int | None = None  # where the checkpoint does not count events
    changed: Mapping[str, tuple[Any, Any]] | None = None  # config key -> (was, is)
    callbacks: Sequence[Callback] = ()
    begun: Sequence[Callback] = ()  # called last, when nothing can refuse the training any more
    state: tuple[Path, Any] | None = None  # path and content of the verified checkpoint


@dataclass
class Training:
    """All parts of a training, wired to its run directory."""

    run: Run
    model: LightningModule
    data: LightningDataModule
    trainer: Trainer
    checkpointing: CheckpointCallback
    meter: Meter
    record: Mapping[str, Any]  # run.json, before this start
    uploader: Uploader | None = None
    last: Mapping[str, Any] | None = None  # the newest checkpoint, where there is nothing to fit


class RepeatedSetup:
    """Gives each call of a data module's `setup` the same random states: a random split is the same
    in the fit, the test and an evaluation.
    """

    savepoint_skip = frozenset({"data", "rng", "called"})

    def __init__(self, data: LightningDataModule) -> None:
        self.data = data
        self.rng = capture_rng(_CPU)
        self.called = False

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
    """Writes run.json and config.yaml when the training begins: a start that fails earlier leaves
    the directory as it was.

    A subclass of Checkpoint, as Lightning calls those last and in their order: after the preflight
    of the CheckpointCallback.
    """

    def __init__(self, run: Run, record: Mapping[str, Any], config: str, start: Start) -> None:
        self.run = run
        self.record = record
        self.config = config
        self.start = start
        # Read now: rows after the checkpoint are cut when the training begins.
        self.reached = last_step(run.directory / "metrics.csv")

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


class _CatchUp(Checkpoint):
    """Has what was saved before this start uploaded. After `_Rewind` and `_Recorder`."""

    def __init__(self, uploader: Uploader) -> None:
        self.uploader = uploader

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.uploader.catch_up()


def build(config: Any, run: Run, start: Start | None = None) -> Training:
    """Model, data and trainer of a config, wired to a run directory. Nothing is written yet.

    Raises:
        ConfigError: Lightning refuses a value of the config.
    """
    start = start or Start()
    quieten()
    text = typed.dump(config)
    record = run.record
    meter = Meter()
    loggers: list[Logger] = [  # the first is `self.logger`, as in a Trainer that makes its own
        RunTensorBoardLogger(run.directory, start.keep_events, start.purge_step),
        RunCSVLogger(run.directory / "metrics.csv", start.keep_rows),
    ]
    shown = display(meter, wants_bar=config.trainer.enable_progress_bar is not False)
    callbacks = [*shown.pop("callbacks"), threads.WaitWatch(), *start.callbacks]
    model, data, trainer = typed.instantiate(
        config, callbacks=callbacks, logger=loggers, default_root_dir=str(run.directory), **shown
    )
    processes = trainer.num_devices
    threads.use(threads.chosen(config.threads, start.threads, processes), processes)
    data.setup = RepeatedSetup(data)  # type: ignore[method-assign]
    every: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    every += [*start.begun, _Recorder(run, record, text, start)]
    for logger in trainer.loggers:
        if hasattr(logger, "join"):
            logger.join(record["id"], run.directory)
    checkpointing = next(one for one in every if isinstance(one, CheckpointCallback))
    checkpointing.use(run.directory / "checkpoints")
    checkpointing.saver.alone = True
    checkpointing.saver.before_save = run.check
    checkpointing.preloaded = start.state
    checkpointing.saver.provenance = Provenance(
        config=typed.dump(portable(config)),
        parent=start.digest,
        run={"id": record["id"], "name": run.directory.name},
    )
    uploader = _uploader(run, record["id"], start, checkpointing)
    if uploader is not None:
        checkpointing.saver.committed = uploader.take
        every.append(_CatchUp(uploader))
    return Training(run, model, data, trainer, checkpointing, meter, record, uploader=uploader)


def _uploader(
    run: Run, run_id: str, start: Start, checkpointing: CheckpointCallback
) -> Uploader | None:
    if checkpointing.mirroring is None or rank():
        return None
    return Uploader(
        checkpointing.mirroring,
        run.directory,
        run_id,
        resumed=start.digest,
        rewinds=bool(start.begun),
        resume_from=resume_command,
    )


def portable(config: Any) -> Any:
    """The config without the keys of this start, so that the checkpoints of equal runs have equal
    configs.
    """
    config = config.clone()
    config.run_name = None
    config.output_dir = "outputs"
    config.resume = None
    config.threads = None
    if "federated" in config:
        config.federated.runtime = "local"
        config.federated.client_state_dir = "client-states"
    return config


def quieten() -> None:
    """Switches off Lightning's lines about devices and other products, and a warning that no user
    can act on.
    """
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", module="lightning")
