"""Metrics that something waits for and that nothing logs."""

from collections.abc import Iterator

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint

from savepoint.checkpoint.scores import never_logged


def check_validation(trainer: Trainer) -> None:
    """At the end of the few batches that are validated before the first epoch: what is wrong is
    said before an epoch is spent. A metric of another name may come from the training.

    Raises:
        ConfigError: a metric named `val...` is none of those that the validation has logged.
    """
    logged = trainer.callback_metrics
    for place, name in missing(trainer):
        if logged and name.startswith("val"):
            only_whole = " Where only a whole validation logs it: --trainer.num_sanity_val_steps 0"
            raise never_logged(place, name, logged, hint=only_whole)


def missing(trainer: Trainer) -> Iterator[tuple[str, str]]:
    """Place and name of each metric that is waited for and was not logged so far."""
    logged = trainer.callback_metrics
    return ((place, name) for place, name in _watched(trainer) if name not in logged)


def _watched(trainer: Trainer) -> Iterator[tuple[str, str]]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = getattr(callback, "monitor", None)
        if not name or not getattr(callback, "strict", True):
            continue
        if isinstance(callback, EarlyStopping | ModelCheckpoint):
            yield f"{type(callback).__name__}(monitor=...)", name
        elif isinstance(callback, Checkpoint):
            yield "checkpoint.monitor", name
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and config.strict and config.monitor:
            yield f"{type(config.scheduler).__name__} in configure_optimizers", config.monitor
