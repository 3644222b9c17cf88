"""A global batch on any number of ranks: what of it the Trainer and its loops have to know.

A loader with a `global_batch_size` gives each rank its part of it, in batches of its own size;
`accumulate_grad_batches` follows. What counts batches in the Trainer's arguments counts global ones
then, so that a step is a step on any number of ranks.
"""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
)

from savepoint.checkpoint.promises import SAME_BITS, SAME_SAMPLES
from savepoint.checkpoint.state.loops import train_loaders
from savepoint.elastic_ddp import ElasticDDP
from savepoint.errors import ConfigError
from savepoint.loaders.position import Resumable
from savepoint.loaders.randomness import derive
from savepoint.words import plural

# What a point's random numbers derive from, besides the seed and its own number.
_EPOCH = 1
_BATCH = 2
_VALIDATION = 3


def follow(trainer: Trainer) -> None:
    """Has the Trainer follow its loaders from now on: each time it has made them."""
    fit = trainer.fit_loop
    release(trainer)
    set_up = fit.setup_data
    followed: Any = None

    def set_up_and_follow() -> None:
        nonlocal followed
        set_up()
        if fit._combined_loader is not followed:
            followed = fit._combined_loader
            _accumulate(trainer)

    setattr(fit, "setup_data", set_up_and_follow)  # noqa: B010 - as in points.Points


def release(trainer: Trainer) -> None:
    vars(trainer.fit_loop).pop("setup_data", None)


def loader_of(trainer: Trainer) -> Resumable | None:
    """The first training loader with a global batch."""
    loaders = train_loaders(trainer)
    return next((one for one in loaders if getattr(one, "global_batch_size", None)), None)


def promise(trainer: Trainer) -> str | None:
    """What holds on another number of ranks."""
    if loader_of(trainer) is None:
        return None
    return SAME_BITS if isinstance(trainer.strategy, ElasticDDP) else SAME_SAMPLES


def reasons(trainer: Trainer, checkpoint: Mapping[str, Any], was: int) -> list[str]:
    """Why a training that goes on from a checkpoint of `was` ranks has other bits."""
    in_tree = isinstance(trainer.strategy, ElasticDDP)
    if in_tree != (checkpoint["elastic"] == SAME_BITS):
        return ["gradients were added up in another order when this epoch began (elastic_ddp)"]
    if was == trainer.world_size:
        return []
    if not in_tree:
        return ["this epoch was begun by another number of processes, whose sums have other bits"]
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    measured = [type(one).__name__ for one in callbacks if isinstance(one, EarlyStopping)]
    if any("num_bad_epochs" in state for state in checkpoint["lr_schedulers"]):
        measured.append("ReduceLROnPlateau")
    return [
        f"{name} goes by logged values, whose sums have other bits on another number of processes"
        for name in measured
    ]


def _accumulate(trainer: Trainer) -> None:
    loader = loader_of(trainer)
    if loader is None:
        _refuse_without(trainer)
        return
    each = loader.accumulation()
    _refuse(trainer, each)
    trainer.accumulate_grad_batches = each
    _count_global_batches(trainer, each)


def _refuse_without(trainer: Trainer) -> None:
    if isinstance(trainer.strategy, ElasticDDP):
        raise ConfigError(
            "Nothing to add in a tree: trainer.strategy is elastic_ddp, and no training loader has "
            "a global_batch_size. Set --data.global_batch_size, or use --trainer.strategy ddp."
        )
    data = trainer.datamodule  # type: ignore[attr-defined]
    size = getattr(data, "global_batch_size", None)
    if size is not None and train_loaders(trainer):
        kinds = ", ".join(type(one).__name__ for one in train_loaders(trainer))
        raise ConfigError(
            f"data.global_batch_size is {size}, and the training loader of {type(data).__name__} "
            f"does not know it: {kinds}. It must share each global batch among the processes. Make "
            "it with savepoint.Batches(..., global_batch_size=...) or savepoint.resumable(loader, "
            "global_batch_size=...); a stream cannot."
        )


def _refuse(trainer: Trainer, each: int) -> None:
    own = trainer.accumulate_grad_batches
    if own not in (1, each):
        raise ConfigError(
            f"trainer.accumulate_grad_batches is {own}, and the global batch makes it {each} on "
            f"{plural(trainer.world_size, 'process', 'es')}: it follows from global_batch_size, "
            "batch_size and the number of processes. Leave it at 1."
        )
    loaders = train_loaders(trainer)
    if any(getattr(one, "global_batch_size", None) is None for one in loaders) or any(
        one.accumulation() != each for one in loaders
    ):
        raise ConfigError(
            f"Of {len(loaders)} training loaders, some give another number of batches to a global "
            f"batch than {each}. A step takes as many of each. Give all of them a "
            "global_batch_size that is as many batches."
        )
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    finders = (BatchSizeFinder, GradientAccumulationScheduler)
    names = [type(one).__name__ for one in callbacks if isinstance(one, finders)]
    why = [f"{name} changes what a step is" for name in names]
    if not trainer.lightning_module.automatic_optimization:
        why.append("in manual optimization the module itself steps, at each batch")
    if why:
        raise ConfigError(f"Not with a global_batch_size: {why[0]}. Leave one of the two out.")
    if isinstance(trainer.strategy, ElasticDDP):
        _refuse_other_trees(trainer.world_size, each)


def _refuse_other_trees(ranks: int, each: int) -> None:
    for number, what in ((ranks, "processes"), (each, "batches on each process")):
        if number & (number - 1):
            raise ConfigError(
                f"Not a binary tree: elastic_ddp with {number} {what}. Expected 1, 2, 4, 8, ... of "
                "both: processes, and batches (global_batch_size / batch_size) on each. Change "
                "one, or use --trainer.strategy ddp."
            )


def _count_global_batches(trainer: Trainer, each: int) -> None:
    fit = trainer.fit_loop
    combined = fit._combined_loader
    assert combined is not None
    combined.limits = [
        each * _limited(len(one) // each, trainer.limit_train_batches, "limit_train_batches")
        for one in combined.flattened
    ]
    # Lightning has begun this epoch, with other limits: it begins again, and in a resume where it
    # was, which the loaders have given up to the iterators that are gone.
    combined._load_state_dicts(combined._state_dicts())
    iter(fit._data_fetcher)  # type: ignore[arg-type]
    fit.max_batches = len(combined)
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        return
    interval = trainer.val_check_interval
    steps = int(fit.max_batches) // each
    across = trainer.check_val_every_n_epoch is None
    if isinstance(interval, int):
        if interval > steps and not across and trainer.limit_val_batches:
            raise ConfigError(
                f"trainer.val_check_interval is {interval}, and an epoch has {steps} steps: with a "
                "global_batch_size it counts global batches. Give a smaller one."
            )
        trainer.val_check_batch = each * interval
    else:
        trainer.val_check_batch = each * max(1, int(steps * interval))


def _limited(steps: int, limit: float | int | None, name: str) -> int:
    if isinstance(limit, int):
        return min(steps, limit)
    share = int(steps * (1.0 if limit is None else limit))
    if not share:
        raise ConfigError(
            f"trainer.{name} is {limit}, of {steps} global batches: less than one. Give more."
        )
    return share


def stretch_schedules(trainer: Trainer) -> None:
    """Once a start: a schedule that steps with every n-th batch does so with every n-th step."""
    if loader_of(trainer) is None:
        return
    for config in trainer.lr_scheduler_configs:
        if config.interval == "step":
            config.frequency *= trainer.accumulate_grad_batches


# -- random numbers -------------------------------------------------------------------------------


def seed_epoch(trainer: Trainer) -> None:
    _seed(trainer, _EPOCH, trainer.current_epoch)


def seed_batch(trainer: Trainer) -> None:
    """What the next batch draws, dropout as well, is a function of its number on all ranks."""
    loader = loader_of(trainer)
    if loader is not None:
        number = loader.number_of_batch(loader.position)
        _seed(trainer, _BATCH, trainer.current_epoch, number)


def seed_validation(trainer: Trainer) -> None:
    _seed(trainer, _VALIDATION, trainer.global_step)


def _seed(trainer: Trainer, *numbers: int) -> None:
    loader = loader_of(trainer)
    if loader is None:
        return
    seed = derive(loader.seed, *numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
