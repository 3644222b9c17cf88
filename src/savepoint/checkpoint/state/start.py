"""What a start prepares before the loops run, so that a resume can reach its point."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    LearningRateFinder,
)
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from lightning.pytorch.utilities.parsing import (
    lightning_hasattr,
    lightning_setattr,
)

from savepoint.checkpoint.state.capture import finders
from savepoint.checkpoint.state.loops import BOUNDS, put_settings


def add_groups(trainer: Trainer, grown: Mapping[int, list[list[str]]]) -> None:
    """Before Lightning restores the optimizers: what a group holds besides its parameters is in
    their state.
    """
    parameters = dict(trainer.lightning_module.named_parameters())
    for number, groups in grown.items():
        there = {
            id(p) for group in trainer.optimizers[number].param_groups for p in group["params"]
        }
        for names in groups:
            new = [parameters[name] for name in names if name in parameters]
            if new and not there.intersection(map(id, new)):
                trainer.optimizers[number].add_param_group({"params": new})


def prepare(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Before the loops run, on a resume: what decides whether they run at all."""
    loop = trainer.fit_loop.epoch_loop
    changed = saved.get("settings", {})
    put_settings(trainer, {name: changed[name] for name in BOUNDS if name in changed})
    saved["max_steps"] = loop.max_steps
    if saved["at"] == "validation" and 0 <= loop.max_steps <= saved["global_step"]:
        # The last step is done, the validation after it is not: Lightning would take the training
        # for done.
        loop.max_steps = saved["global_step"] + 1


def load_in_precision(
    trainer: Trainer, module: LightningModule, checkpoint: Mapping[str, Any]
) -> None:
    """Weights of `64-true` or `bf16-true`: Lightning loads them before the module has that type."""
    if not isinstance(trainer.precision_plugin, DoublePrecision | HalfPrecision):
        return
    trainer.precision_plugin.convert_module(module)
    module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)


def skip_finders(trainer: Trainer, values: Mapping[str, Any]) -> None:
    """Until `wake_finders`: a search would start from the weights of a training in progress, and
    end it.
    """
    for name, callback in finders(trainer).items():
        search = "lr_find" if isinstance(callback, LearningRateFinder) else "scale_batch_size"
        vars(callback)[search] = _search_nothing
        if name in values and lightning_hasattr(trainer.lightning_module, name):
            lightning_setattr(trainer.lightning_module, name, values[name])


def wake_finders(trainer: Trainer) -> None:
    for callback in finders(trainer).values():
        for search in ("lr_find", "scale_batch_size"):
            vars(callback).pop(search, None)


def _search_nothing(*args: Any, **kwargs: Any) -> None: ...
