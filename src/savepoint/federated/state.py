"""What a strategy has come to have since it was made, as a checkpoint can hold it; and back.

Only attributes that have changed are saved, so that what a config overrides on a resume is taken
from the config. One that no checkpoint can hold is named in words before the first round;
`savepoint_skip = frozenset({"name"})` in its class says that it is no state.
"""

# mypy: disable-error-code="import-not-found,misc,no-any-return,unused-ignore,untyped-decorator"
# Without Flower, which is optional, its types are Any.

import logging
import types
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from savepoint.checkpoint.format import fingerprint
from savepoint.errors import ConfigError
from savepoint.look.classes import left_out_of
from savepoint.look.kinds import Unpackable
from savepoint.look.pack import Packer
from savepoint.look.unpack import unpack

_CONSTANT = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, PurePath,
             logging.Logger)  # fmt: skip
_RECORDS = {"MetricRecord": MetricRecord, "ConfigRecord": ConfigRecord}


class StrategyState:
    """The state of a strategy that was just made.

    Raises:
        ConfigError: An attribute cannot be saved.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self._fresh = {name: fingerprint(one) for name, one in _packed(strategy).items()}

    def capture(self) -> dict[str, Any]:
        """The attributes that have changed."""
        now = _packed(self.strategy)
        changed = {
            name: one for name, one in now.items() if fingerprint(one) != self._fresh.get(name)
        }
        return {"class": type(self.strategy).__qualname__, "changed": changed}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name, packed in state["changed"].items():
            owner: Any = self.strategy
            *inner, last = name.split(".")
            for one in inner:
                owner = getattr(owner, one)
            setattr(owner, last, _unpacked(packed))


def _packed(strategy: Strategy, prefix: str = "") -> dict[str, Any]:
    """Each attribute; those of a strategy inside under `strategy.NAME`."""
    found: dict[str, Any] = {}
    unsaved = []
    kind: Any = type(strategy)
    for name, value in vars(strategy).items():
        if name in left_out_of(kind):
            continue
        if isinstance(value, Strategy):
            found |= _packed(value, f"{prefix}{name}.")
            continue
        try:
            found[prefix + name] = _pack(value)
        except Unpackable:
            unsaved.append(f"{prefix}{name} (a {type(value).__name__})")
    if unsaved:
        named = kind.__name__
        raise ConfigError(
            f"A strategy whose state cannot be saved: {named} has {', '.join(unsaved)}. A run that "
            "is resumed needs all of it: numbers, texts, arrays, Flower's records and containers "
            f"of these. What is no state can be named in the class {named}: "
            'savepoint_skip = frozenset({"NAME"})'
        )
    return found


def _pack(value: Any) -> Any:
    if isinstance(value, (_CONSTANT, types.MethodType)):
        return {"!": "constant", "of": getattr(value, "__qualname__", str(value))}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {"!": "array", "of": torch.from_numpy(np.array(value))}
    if isinstance(value, ArrayRecord):
        arrays = {name: torch.from_numpy(np.array(one.numpy())) for name, one in value.items()}
        return {"!": "ArrayRecord", "of": arrays}
    for name, kind in _RECORDS.items():
        if isinstance(value, kind):
            return {"!": name, "of": dict(value)}
    if type(value) in (list, tuple):
        return {"!": type(value).__name__, "of": [_pack(one) for one in value]}
    if type(value) is dict:
        return {
            "!": "dict",
            "keys": [_pack(one) for one in value],
            "values": [_pack(one) for one in value.values()],
        }
    return {"!": "look", "of": Packer().pack(value)}


def _unpacked(packed: Mapping[str, Any]) -> Any:
    return _UNPACK[packed["!"]](packed)


def _constant(packed: Mapping[str, Any]) -> Any:
    raise ConfigError(
        f"A strategy's attribute was {packed['of']} when it was saved, and is made anew otherwise. "
        "Set it in the strategy's `__init__`."
    )


def _record(packed: Mapping[str, Any]) -> Any:
    return _RECORDS[packed["!"]](dict(packed["of"]))


def _numpy(tensor: Tensor) -> Any:
    return tensor.numpy().copy()


_UNPACK: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "constant": _constant,
    "array": lambda packed: _numpy(packed["of"]),
    "ArrayRecord": lambda packed: ArrayRecord(
        {name: Array(_numpy(one)) for name, one in packed["of"].items()}
    ),
    "MetricRecord": _record,
    "ConfigRecord": _record,
    "list": lambda packed: [_unpacked(one) for one in packed["of"]],
    "tuple": lambda packed: tuple(_unpacked(one) for one in packed["of"]),
    "dict": lambda packed: dict(
        zip(map(_unpacked, packed["keys"]), map(_unpacked, packed["values"]), strict=True)
    ),
    "look": lambda packed: unpack(packed["of"]),
}
