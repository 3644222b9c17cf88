"""What the Trainer and its loops know, behind plain names."""

import copy
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    WeightAveraging,
)
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from torch import Tensor

# Of the Trainer, what callbacks change in mid-training.
_SETTINGS = (
    "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "limit_val_batches",
    "check_val_every_n_epoch", "val_check_interval", "val_check_batch", "log_every_n_steps",
    "limit_train_batches", "reload_dataloaders_every_n_epochs", "max_batches",
)  # fmt: skip
# Of its loops, and needed before these run.
BOUNDS = ("max_epochs", "min_epochs", "max_steps")


def bounds(trainer: Trainer) -> dict[str, Any]:
    return {name: getattr(_owner(trainer, name), name) for name in BOUNDS}


def settings(trainer: Trainer) -> dict[str, Any]:
    return {name: getattr(_owner(trainer, name), name, None) for name in (*_SETTINGS, *BOUNDS)}


def put_settings(trainer: Trainer, saved: Mapping[str, Any]) -> None:
    for name, value in saved.items():
        setattr(_owner(trainer, name), name, value)


def _owner(trainer: Trainer, setting: str) -> Any:
    if setting == "max_steps":
        return trainer.fit_loop.epoch_loop
    return trainer.fit_loop if setting in ("max_epochs", "min_epochs", "max_batches") else trainer


def train_loaders(trainer: Trainer) -> list[Any]:
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def follow_training(trainer: Trainer) -> None:
    """Tells the training's loaders which way through them is its own: hooks may go through them,
    too.
    """
    combined = trainer.fit_loop._combined_loader
    if combined is None or combined._iterator is None:
        return
    for loader, iterator in zip(combined.flattened, combined._iterator.iterators, strict=False):
        if hasattr(loader, "follow"):
            loader.follow(iterator)


def validation_loaders(trainer: Trainer) -> list[Any]:
    combined = trainer.fit_loop.epoch_loop.val_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def as_lightning_saves(trainer: Trainer) -> dict[str, Any]:
    """What `Trainer.save_checkpoint` would write, with what callbacks add."""
    return dict(trainer._checkpoint_connector.dump_checkpoint(weights_only=False))


def give_loaded(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Where Lightning puts a file that it has read: from there it restores."""
    trainer._checkpoint_connector._loaded_checkpoint = checkpoint


def accumulates(trainer: Trainer) -> bool:
    """Whether the gradients of the batch that was trained last wait for more."""
    return bool(trainer.fit_loop.epoch_loop._should_accumulate())


def measured(trainer: Trainer) -> dict[str, Tensor]:
    """Each metric that was logged, the object as it was reduced: another object means that it was
    measured again.
    """
    return trainer._logger_connector._callback_metrics


def logged_step(trainer: Trainer) -> int:
    """The step under which Lightning logs: batches that ended in a step, however many optimizers
    each of them has stepped.
    """
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def set_steps(trainer: Trainer, batches: int) -> None:
    """For the logs of a training that goes on from a file of another program."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = batches


def run_in_order(trainer: Trainer) -> None:
    """Lightning overfits on the same batches by a sequential sampler, which it knows how to give a
    DataLoader only.
    """
    for loader in train_loaders(trainer):
        if trainer.overfit_batches and hasattr(loader, "shuffle"):  # type: ignore[attr-defined]
            loader.shuffle = False


def set_up_validation(trainer: Trainer) -> None:
    """Makes the validation's loaders, for a resume to put their state back before the first one."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    if loop._combined_loader is not None or not trainer.enable_validation:
        return
    trainer.validating = True
    loop.setup_data()
    trainer.training = True


def states_before_prefetching(trainer: Trainer) -> list[Any] | None:
    """Of loaders without a length Lightning fetches one batch in advance: their states before they
    give the next one.

    None where nothing is fetched in advance.
    """
    fetcher = trainer.fit_loop._data_fetcher
    combined = trainer.fit_loop._combined_loader
    if (
        not isinstance(fetcher, _PrefetchDataFetcher)
        or fetcher.length is not None
        or combined is None
    ):
        return None
    return copy.deepcopy(combined._state_dicts())


def loader_states(trainer: Trainer) -> list[Any]:
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else combined._state_dicts()


def at_end_of_epoch(trainer: Trainer) -> bool:
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def keep_workers(trainer: Trainer) -> None:
    for loader in train_loaders(trainer):
        if hasattr(loader, "keep_workers"):
            loader.keep_workers()


def by_the_clock(trainer: Trainer) -> bool:
    return getattr(trainer, "_val_check_time_interval", None) is not None


def is_stateful(loader: Any) -> bool:
    """Whether a loader answers for its own position. Asked at each save: the protocol of Lightning
    takes ten times as long to ask.
    """
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def averaging(trainer: Trainer) -> list[WeightAveraging]:
    return [callback for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]  # type: ignore[attr-defined]
