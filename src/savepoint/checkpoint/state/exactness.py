"""What cannot be exact, in words."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    StochasticWeightAveraging,
)
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, IterableDataset

from savepoint.checkpoint.state.loops import (
    by_the_clock,
    is_stateful,
    length,
    train_loaders,
    validation_loaders,
)
from savepoint.look.marks import fingerprint


def versions(module: LightningModule) -> dict[str, Any]:
    """Of each weight and buffer what changes when it is written to, without a look at all its
    values.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {
        name: (id(tensor), None if is_lazy(tensor) else tensor.shape, fingerprint(tensor))
        for name, tensor in tensors
        if not tensor.is_inference()
    }


def left_out(
    module: LightningModule, weights: Mapping[str, Any], at_start: Mapping[str, Any]
) -> list[str]:
    """Words for weights that have changed and that the user's own code has taken out of the file,
    and for new ones.
    """
    tensors = dict((*module.named_parameters(), *module.named_buffers()))
    names = set(tensors)
    shapes = {name: then[1] for name, then in at_start.items() if then[1] is not None}
    words = [
        f"model.{name} (of another shape than at the start)"
        for name, tensor in tensors.items()
        if name in weights
        and not is_lazy(tensor)
        and tensor.shape != shapes.get(name, tensor.shape)
        and not _loads_by_itself(module, name)
    ]
    if names == at_start.keys() and names == weights.keys():
        return words
    gone = names.intersection(module.state_dict()).difference(weights)
    now = versions(module) if gone else {}
    words += [
        f"model.{name} (left out of the file)"
        for name in sorted(gone)
        if now.get(name) != at_start.get(name)
    ]
    made = sorted(names.intersection(weights).difference(at_start))
    return words + [f"model.{name} (made in mid-training)" for name in made]


def _loads_by_itself(module: LightningModule, name: str) -> bool:
    """Whether the owner of a tensor has code of its own to load it, as observers have."""
    owner = module.get_submodule(name.rpartition(".")[0])
    loads = type(owner)._load_from_state_dict
    return loads is not nn.Module._load_from_state_dict


def inexact(trainer: Trainer, at: str | None) -> list[str]:
    """Why a resume from this point would not equal the straight run, as far as no look is needed to
    know.
    """
    if at is None:
        return ["saved elsewhere than at a safe point"]
    reasons = [_without_position(loader, at, trainer) for loader in train_loaders(trainer)]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging):
            reasons.append(f"{type(callback).__name__} does not save all it changes")
    if by_the_clock(trainer):
        reasons.append("validations go by the clock (val_check_interval)")
    for loader in validation_loaders(trainer):
        if isinstance(loader, DataLoader) and loader.num_workers and loader.persistent_workers:
            reasons.append(
                "the validation loader keeps its workers, and what they have drawn with them; "
                "wrap it: savepoint.resumable(loader)"
            )
    return [reason for reason in dict.fromkeys(reasons) if reason]


def _without_position(loader: Any, at: str, trainer: Trainer) -> str:
    if is_stateful(loader):
        if at != "epoch" or hasattr(loader, "user_parts"):
            return ""
        if trainer.num_training_batches < (length(loader) or 0):
            return "the training loader is left in the middle of its own epoch"
        return ""
    if at != "epoch":
        remedy = "wrap it: savepoint.resumable(loader)"
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            remedy = "a stream says its own: give the loader state_dict() and load_state_dict()"
        return f"the training loader keeps no position; {remedy}"
    if isinstance(loader, DataLoader) and loader.num_workers and loader.persistent_workers:
        return "the training loader keeps its workers, and what they have drawn with them"
    return ""
