"""The kinds of values that a checkpoint can hold, beside numbers, texts and tensors."""

import array
import collections
import ctypes
import datetime
import decimal
import fractions
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from savepoint.look.classes import is_library

SCALARS = (type(None), bool, int, float, complex, str, bytes)

# Values without attributes: what they are made of, as plain values, and back.
ATOMS: dict[type, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    range: (lambda v: [v.start, v.stop, v.step], lambda of: range(*of)),
    slice: (lambda v: [v.start, v.stop, v.step], lambda of: slice(*of)),
    bytearray: (bytes, bytearray),
    array.array: (lambda v: [v.typecode, v.tobytes()], lambda of: array.array(*of)),
    fractions.Fraction: (str, fractions.Fraction),
    decimal.Decimal: (str, decimal.Decimal),
    uuid.UUID: (str, uuid.UUID),
    datetime.date: (str, datetime.date.fromisoformat),
    datetime.time: (str, datetime.time.fromisoformat),
    datetime.datetime: (str, datetime.datetime.fromisoformat),
    datetime.timedelta: (
        lambda v: [v.days, v.seconds, v.microseconds],
        lambda of: datetime.timedelta(*of),
    ),
    np.random.SeedSequence: (
        lambda v: [v.entropy, list(v.spawn_key), v.pool_size, v.n_children_spawned],
        lambda of: np.random.SeedSequence(
            of[0], spawn_key=of[1], pool_size=of[2], n_children_spawned=of[3]
        ),
    ),
}
WRITTEN_TO = (
    list, dict, set, bytearray, collections.deque, np.ndarray, array.array, Tensor,
)  # fmt: skip
FACTORIES = {kind.__name__: kind for kind in (int, float, bool, str, list, dict, set, tuple)}


def is_atom(value: Any) -> bool:
    return type(value) in ATOMS


class Unpackable(Exception):
    """Carries the value that no checkpoint can hold, or why there are too many."""


def base_of(value: Any) -> Any:
    """The class whose methods read and write a dict or a list, whatever a user's own does there."""
    kinds = (collections.OrderedDict, dict, list)
    return next(kind for kind in kinds if isinstance(value, kind))


def keys_of(value: dict[Any, Any]) -> list[Any]:
    return list(value) if type(value) is dict else list(base_of(value).keys(value))


def values_of(value: dict[Any, Any]) -> list[Any]:
    return list(value.values()) if type(value) is dict else list(base_of(value).values(value))


def is_raw(value: Any) -> bool:
    """Numbers of C, which other processes may share: no pointers, which are addresses."""
    kind: Any = type(value)
    if isinstance(value, ctypes.Array):
        kind = kind._type_
    return ctypes._SimpleCData in kind.__mro__ and kind._type_ in "?bBhHiIlLqQfdgcu"


def has_notes(value: Any) -> bool:
    """Attributes beside what it is a value of: a list of a class of the user's, a tensor with
    something written on it.
    """
    notes = getattr(value, "__dict__", None)
    return bool(notes) and (isinstance(value, Tensor) or not is_library(type(value).__module__))
