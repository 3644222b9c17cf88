"""Loads weights into a model: from any file that can be read safely (`--init_from`), or from a
checkpoint of the run.

A model may make its layers in `setup` or `configure_model`, which Lightning calls at the start of
each stage: weights that are loaded earlier are lost. Such a model gets its weights after both.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from savepoint import layouts, words
from savepoint.checkpoint import arrays, foreign
from savepoint.errors import ConfigMismatchError
from savepoint.job import rank
from savepoint.resume.overrides import (
    check_shapes,
    mismatches,
    plain_name,
    shapes,
    shortened,
    under_names_of,
)


class Once(Callback):
    """Calls `load` with the model once, after Lightning has made its layers and before a stage
    begins.
    """

    def __init__(self, load: Callable[[LightningModule], None]) -> None:
        self._load: Callable[[LightningModule], None] | None = load

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        load = self._load
        self._load = None
        if load is not None:
            load(pl_module)

    on_fit_start = on_validation_start = on_test_start = _begin


def makes_layers_late(model: LightningModule) -> bool:
    return is_overridden("setup", model) or is_overridden("configure_model", model)


def when_made(
    trainer: Trainer, model: LightningModule, load: Callable[[LightningModule], None]
) -> None:
    """Calls `load` now or, for a model that makes its layers late, at the start of the fit."""
    if makes_layers_late(model):
        trainer.callbacks.insert(0, Once(load))  # type: ignore[attr-defined]
    else:
        load(model)


def restore(model: LightningModule, state: Mapping[str, Any]) -> None:
    """Loads the weights of a checkpoint into a model that has its layers, as Lightning does.

    Raises:
        ConfigMismatchError: they do not fit.
    """
    state = dict(state)
    model.on_load_checkpoint(state)
    target = model.state_dict()
    load_fitting(model, under_names_of(state["state_dict"], target))


def load_fitting(model: LightningModule, weights: Mapping[str, Any]) -> None:
    """Raises ConfigMismatchError with a table where the weights do not fit the model."""
    check_shapes(shapes(weights), model.state_dict(), strict=model.strict_loading)
    model.load_state_dict(weights, strict=model.strict_loading)


def of_model(content: Mapping[str, Any], model: LightningModule) -> tuple[dict[str, Any], str]:
    """The weights in what `foreign.read` gives, under the model's names; and of arrays of another
    framework a table of what was mapped where.
    """
    target = model.state_dict()
    weights = under_names_of(fit_names(content["state_dict"], target), target)
    if content["kind"] not in arrays.KINDS or any(name in target for name in weights):
        return weights, ""
    mapped = layouts.onto(model, content["state_dict"])
    header = ("in the file", "", "in the model", "", "")
    return mapped.weights, words.table(header, mapped.rows) if mapped.rows else ""


def fit_names(weights: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the model's names: a file of the bare network lacks the prefix that the
    LightningModule adds.
    """
    model = {plain_name(name): value for name, value in model.items()}
    prefixes = {name.split(".")[0] for name in model}
    for prefix in sorted(prefixes):
        renamed = {f"{prefix}.{name}": value for name, value in weights.items()}
        if sum(name in model for name in renamed) > sum(name in model for name in weights):
            return renamed
    return dict(weights)


def initialise(model: LightningModule, path: str | Path, *, strict: bool) -> None:
    """Copies the weights of a file into the model.

    Args:
        strict: All weights must fit. False: loads those that fit, and prints a table of the rest.

    Raises:
        ConfigMismatchError: no weight fits or, with `strict`, not all.
    """
    target = model.state_dict()
    weights, mapping = of_model(foreign.read(path), model)
    given = shapes(weights)
    wanted = shapes(target)
    names = [name for name in given if name in target and given[name] == wanted[name]]
    fits = {name: weights[name] for name in names}
    lines = mismatches(given, target)
    if not fits or (strict and lines):
        advice = " Take what fits: --init_strict false" if fits else ""
        raise ConfigMismatchError(
            f"The weights do not fit the model: {path}. Expected the same names and "
            f"shapes.{advice}\n{shortened(lines)}"
        )
    model.load_state_dict(fits, strict=False)
    if rank() == 0:
        print(f"Weights from {path}: {len(fits)} of {len(target)} tensors")
        if mapping:
            print(mapping)
        if lines:
            print("\n".join(["not loaded:", *lines]), flush=True)
