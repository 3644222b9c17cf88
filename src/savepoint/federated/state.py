"""What a strategy has come to have since it was made, as a checkpoint can hold it; and back.

It is looked at as a training is (`savepoint.look`): attributes, the objects and functions below
them, what these share. Only what has changed is saved, so that what a config overrides on a resume
is taken from the config. Flower's records are shown to the look as plain containers:

    {"flower": "ArrayRecord", "of": {"weight": array}}
"""

# mypy: disable-error-code="import-not-found,misc,no-any-return,unused-ignore,untyped-decorator"
# Without Flower, which is optional, its types are Any.

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy

from savepoint.errors import ConfigMismatchError
from savepoint.look.baseline import Baseline
from savepoint.look.places import in_words, path_of
from savepoint.look.walk import Look

_MARK = "flower"
_CONTENT: dict[type, Callable[[Any], Any]] = {
    Array: lambda one: np.array(one.numpy()),
    ArrayRecord: lambda one: {name: np.array(array.numpy()) for name, array in one.items()},
    MetricRecord: dict,
    ConfigRecord: dict,
    RecordDict: lambda one: {name: _shown(record) for name, record in one.items()},
}
_MADE_OF: dict[str, Callable[[Any], Any]] = {
    "Array": Array,
    "ArrayRecord": lambda of: ArrayRecord({name: Array(one) for name, one in of.items()}),
    "MetricRecord": MetricRecord,
    "ConfigRecord": ConfigRecord,
    "RecordDict": lambda of: RecordDict({name: _as_made(one) for name, one in of.items()}),
}


class StrategyState:
    """The state of a strategy that was just made."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        with _records_shown(strategy):
            self._start = Baseline(self._look())

    def _look(self) -> Look:
        return Look({"strategy": self.strategy}, {}, (), most_bytes=math.inf)

    def capture(self) -> dict[str, Any]:
        """What has changed; under `unsaved` words for what no checkpoint can hold of that."""
        with _records_shown(self.strategy):
            changed, unsaved = self._start.changes(self._look())
        name = type(self.strategy).__qualname__
        return {"class": name, "changed": changed, "unsaved": unsaved}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Of a strategy of another class, which the user has allowed, nothing is put back.

        Raises:
            ConfigMismatchError: This strategy has no place for something.
        """
        if state["class"] != type(self.strategy).__qualname__:
            return
        with _records_shown(self.strategy, keep=True):
            cpu = torch.device("cpu")
            lost = self._start.restore(self._look(), state["changed"], cpu, alone=True)
        if lost and not state["unsaved"]:
            raise ConfigMismatchError(
                f"Another strategy: {state['class']} has no place for {', '.join(lost[:5])}, which "
                "the checkpoint holds. Expected the code that the run began with."
            )


def changed_names(state: Mapping[str, Any]) -> list[str]:
    """What a saved state holds, in words."""
    places = (in_words(path_of(place)) for place, _ in state["changed"])
    return sorted(name.removeprefix("strategy.") for name in places)


@contextmanager
def _records_shown(strategy: Strategy, keep: bool = False) -> Iterator[None]:
    """The strategy, and those inside, with plain containers in the place of Flower's records.

    Args:
        keep: Make records again of what is there at the end, as something was put back.
    """
    inner = list(_with_those_inside(strategy))
    before = [dict(vars(one)) for one in inner]
    for one in inner:
        vars(one).update({name: _shown(value) for name, value in vars(one).items()})
    try:
        yield
    finally:
        for one, attributes in zip(inner, before, strict=True):
            if keep:
                attributes = {name: _as_made(value) for name, value in vars(one).items()}
            vars(one).update(attributes)


def _with_those_inside(strategy: Strategy) -> Iterator[Strategy]:
    yield strategy
    for value in vars(strategy).values():
        if isinstance(value, Strategy):
            yield from _with_those_inside(value)


def _shown(value: Any) -> Any:
    """The value itself where no record is in it: an array that stands in two attributes is one."""
    if type(value) in _CONTENT:
        return {_MARK: type(value).__name__, "of": _CONTENT[type(value)](value)}
    return _rebuilt(value, _shown)


def _as_made(value: Any) -> Any:
    if type(value) is dict and value.get(_MARK) in _MADE_OF:
        return _MADE_OF[value[_MARK]](value["of"])
    return _rebuilt(value, _as_made)


def _rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    """A plain container with changed items; itself where none has changed."""
    kind = type(value)
    if kind is dict:
        items = {key: change(item) for key, item in value.items()}
        is_same = all(items[key] is item for key, item in value.items())
        return value if is_same else items
    if kind in (list, tuple):
        made = [change(item) for item in value]
        is_same = all(one is other for one, other in zip(made, value, strict=True))
        return value if is_same else kind(made)
    return value
