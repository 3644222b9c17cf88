"""A validation changes what a file made inside it must not hold."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from savepoint.checkpoint.state.capture import own_buffers
from savepoint.checkpoint.state.exactness import versions
from savepoint.checkpoint.state.loops import averaging, validation_loaders
from savepoint.loaders.randomness import derive

_BEFORE_IT = "on_validation_model_zero_grad"


def before_validation(trainer: Trainer) -> dict[str, Any]:
    """What a file made inside the validation takes from its start: counters, and buffers that its
    hooks may change.
    """
    module = trainer.lightning_module
    return {
        "fit_loop": trainer.fit_loop.state_dict(),
        "buffers": {name: buffer.detach().clone() for name, buffer in own_buffers(module).items()},
        "versions": versions(module),
        "rates": _rates(trainer),
    }


def as_before_validation(
    trainer: Trainer, checkpoint: dict[str, Any], before: Mapping[str, Any]
) -> list[str]:
    """Puts into `checkpoint` what `before_validation` gave; returns words for weights that the
    validation has changed.
    """
    checkpoint["loops"]["fit_loop"] = before["fit_loop"]
    _put_rates(checkpoint, before["rates"])
    if averaging(trainer):  # it exchanges the weights for the validation, and back for this file
        return []
    weights: dict[str, Any] = checkpoint["state_dict"]
    weights |= {name: value for name, value in before["buffers"].items() if name in weights}
    now = versions(trainer.lightning_module)
    changed = [name for name in now if now[name] != before["versions"].get(name)]
    return [
        f"model.{name} (changed inside a validation)"
        for name in changed
        if name not in before["buffers"]
    ]


def _rates(trainer: Trainer) -> tuple[list[Any], list[Any]]:
    """What hooks of a validation change by hand: learning rates, and schedules that they step."""
    groups = [
        [_settings_of(group) for group in optimizer.param_groups]
        for optimizer in trainer.optimizers
    ]
    return groups, [
        copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs
    ]


def _settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}


def _put_rates(checkpoint: dict[str, Any], rates: tuple[list[Any], list[Any]]) -> None:
    groups, checkpoint["lr_schedulers"] = rates
    for state, settings_then in zip(checkpoint["optimizer_states"], groups, strict=True):
        for group, then in zip(state.get("param_groups", []), settings_then, strict=False):
            for name in [name for name in group if name != "params" and name not in then]:
                del group[name]
            group.update(then)


def seed_validation(trainer: Trainer) -> None:
    """What the workers of a validation draw is a function of (seed, step, loader), and shifts no
    generator of the training.

    A stock loader would draw the seed of its workers from the global generator, as often as it is
    iterated: after a resume once more, where its workers stay.
    """
    for number, loader in enumerate(validation_loaders(trainer)):
        own = getattr(loader, "_savepoint_generator", None)
        if isinstance(loader, DataLoader) and loader.generator is own:
            seed = derive(torch.initial_seed(), trainer.global_step, number)
            loader.generator = loader._savepoint_generator = torch.Generator().manual_seed(seed)


def pass_over_hook(module: LightningModule) -> None:
    """Of a validation that is run again, the hook that comes before its point has run already."""
    vars(module)[_BEFORE_IT] = partial(end_passing_over, module)


def end_passing_over(module: LightningModule) -> None:
    vars(module).pop(_BEFORE_IT, None)


def copied_weights(module: LightningModule) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@contextmanager
def current_weights(trainer: Trainer) -> Iterator[None]:
    """Inside a validation, weight averaging holds the averaged weights in the module: a save needs
    the current ones there.
    """
    callbacks = averaging(trainer)
    for callback in callbacks:
        callback.on_validation_epoch_end(trainer, trainer.lightning_module)
    try:
        yield
    finally:
        for callback in callbacks:
            callback.on_validation_epoch_start(trainer, trainer.lightning_module)
