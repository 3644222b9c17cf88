"""The classes that a config names, and what they take."""

from __future__ import annotations

import importlib
import inspect
import sys
from argparse import ArgumentError
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, get_args, get_type_hints

from jsonargparse import ArgumentParser
from lightning.pytorch import (
    Callback,
    LightningDataModule,
    LightningModule,
    Trainer,
)
from lightning.pytorch.loggers import Logger
from torch import nn

from savepoint.checkpoint.callback import CheckpointCallback
from savepoint.config import compose
from savepoint.federated.federation import Federation

_LIBRARIES = ("torch", "torchvision", "torchmetrics", "lightning", "jsonargparse", "savepoint")


@dataclass
class Argument:
    name: str
    type: Any
    default: Any
    required: bool


def arguments_of(chosen: type | None) -> dict[str, Argument]:
    if chosen is None:
        return {}
    parser = ArgumentParser(exit_on_error=False)
    names = [
        name.removeprefix("x.")
        for name in parser.add_class_arguments(chosen, "x", fail_untyped=False)
    ]
    defaults = parser.get_defaults(skip_validation=True)
    parameters = inspect.signature(chosen).parameters.values()
    required = {parameter.name for parameter in parameters if parameter.default is parameter.empty}
    kinds = _kinds(chosen)
    return {
        name: Argument(name, kinds.get(name, ""), defaults.get(f"x.{name}"), name in required)
        for name in names
    }


def _kinds(chosen: type) -> dict[str, Any]:
    """The type of each argument of a class and of those that it inherits from; as text where its
    names are not known here.
    """
    kinds: dict[str, Any] = {}
    for owner in reversed(chosen.__mro__):
        init = vars(owner).get("__init__", object.__init__)
        try:
            kinds |= get_type_hints(init)
        except Exception:  # noqa: BLE001 - a name that only a type checker imports, say
            kinds |= inspect.get_annotations(init)
    return kinds


def takes_any_name(owner: type) -> bool:
    kinds = [parameter.kind for parameter in inspect.signature(owner).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def components_in(kind: Any) -> tuple[type, ...]:
    """The classes in a type that a config names by `class_path`."""
    if isinstance(kind, type) and not get_args(kind):
        is_plain = kind.__module__.split(".")[0] in sys.stdlib_module_names
        return () if is_plain or issubclass(kind, Enum) else (kind,)
    return tuple(component for inner in get_args(kind) for component in components_in(inner))


def base_at(key: str) -> type:
    """The base of a class at `key`: a guess from the name, good enough for a hint."""
    bases: dict[str, type] = {"model": LightningModule, "data": LightningDataModule}
    bases |= {"trainer.callbacks": Callback, "trainer.logger": Logger}
    return bases.get(key, nn.Module)


def class_at(key: str, composed: compose.Composed) -> type | None:
    """The class that is chosen at `key`, by a flag or a file."""
    if key in FIXED:
        return FIXED[key]
    name = dict(composed.flags).get(key) or dict(compose.leaves(composed.config)).get(key)
    return resolve_class(name, key) if isinstance(name, str) else None


def resolve_class(name: str, key: str) -> type | None:
    module, _, short = name.rpartition(".")
    if not module:
        return next((c for c in below(base_at(key)) if c.__name__ == name), None)
    try:
        chosen = getattr(importlib.import_module(module), short, None)
    except Exception:  # noqa: BLE001 - a module of the user may raise anything
        return None
    return chosen if isinstance(chosen, type) else None


def below(base: type) -> set[type]:
    direct: list[type] = base.__subclasses__()
    return set(direct).union(*map(below, direct))


class Scalars:
    """The keys of a config that belong to no group.

    Args:
        seed_everything: Of every random number of the run.
        output_dir: The folder that run directories go to.
        run_name: Default: <config>-<date>-<time>.
        init_from: A checkpoint whose weights to start from.
        init_strict: Whether these must fit the model exactly.
        resume: What a run directory that exists means: an error, a run to continue, or the only
            thing accepted. Null: auto in a job that SLURM requeued, else never.
        threads: That PyTorch computes with. Null: its own choice, at most the cores that this
            process may use; on a resume the checkpoint's, where there are so many.
    """

    def __init__(
        self,
        seed_everything: int = 0,
        output_dir: str = "outputs",
        run_name: str | None = None,
        init_from: str | None = None,
        init_strict: bool = True,
        resume: Literal["never", "auto", "must"] | None = None,
        threads: int | None = None,
    ) -> None: ...


# The groups whose class is not chosen.


FIXED: dict[str, type] = {
    "": Scalars,
    "trainer": Trainer,
    "checkpoint": CheckpointCallback,
    "federated": Federation,
}


def own_classes(key: str) -> set[str]:
    return {c.__name__ for c in below(base_at(key)) if c.__module__.split(".")[0] not in _LIBRARIES}


def fits(owner: type, name: str, value: Any) -> bool:
    """Whether jsonargparse takes a value for one argument of a class."""
    parser = ArgumentParser(exit_on_error=False)
    others = arguments_of(owner).keys() - {name}
    parser.add_class_arguments(owner, "x", skip=set(others), fail_untyped=False)
    try:
        if isinstance(value, str):
            parser.parse_args([f"--x.{name}={value}"])
        else:
            parser.parse_object({"x": {name: value}})
    except ArgumentError:
        return False
    return True
