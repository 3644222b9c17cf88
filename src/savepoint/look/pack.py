"""Plain values as a checkpoint can hold them. Torch and NumPy, no Lightning.

A packed value is made of tensors and plain values only (`weights_only=True` reads it). What
JSON-like values cannot say stands in a dict with the key "!" (its kind), so every dict of a user is
packed as one of these too:

    {"!": "dict", "keys": [...], "values": [...]}     {"!": "array", "dtype": "<f4", "shape": [3],
                                                      "bytes": tensor}

What is of a class of its own says its name under "kind" (a named tuple, an OrderedDict): no class
is imported for it, it is found among those that the process has. Long lists of one kind are packed
as a whole: the look at a data set's list of files must not hold up a save.
"""

import collections
import enum
import random
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from savepoint.look.generators import generator_state, is_generator, seeds_of
from savepoint.look.histories import is_spent
from savepoint.look.kinds import (
    ATOMS,
    FACTORIES,
    WRITTEN_TO,
    Unpackable,
    has_notes,
    is_atom,
    is_raw,
    keys_of,
    values_of,
)

MOST_VALUES = 100_000  # in one attribute: above it, packing would hold up the training
MOST_BYTES = 256 * 2**20
_LONG = 64  # values of one kind, from which on they are packed as a whole
_AS_IT_IS = (type(None), bool, float, complex, str)
_SEQUENCES = (list, tuple, set, frozenset, collections.deque)
# What is written to where it is.
_SHARED = frozenset((
    list, dict, set, bytearray, collections.deque, collections.OrderedDict,
    collections.defaultdict, collections.Counter,
))  # fmt: skip
_INNER = (Tensor, np.ndarray)
_UNFINISHED = object()
_PLAIN = frozenset((list, tuple, dict, set, frozenset, collections.deque, np.ndarray))

Packed = dict[int, tuple[Any, Any]]  # by address: the value, so that it stays alive, and its packed


class Packer:
    """Packs one attribute; counts what it has met.

    Args:
        packed: What other attributes hold, by address, with what was packed of it: what stands in
            two attributes is packed once.
        most_bytes: Of one attribute.

    Attributes:
        inner: The containers, tensors and arrays inside: others may hold them too.
        stacked: The addresses of tensors that are packed as one.
        needs_live: How many of its values can only be put into one that is there.
    """

    def __init__(self, packed: Packed | None = None, most_bytes: float = MOST_BYTES) -> None:
        self.values = self.bytes = self.needs_live = 0
        self.most_bytes = most_bytes
        self.inner: list[Any] = []
        self.stacked: set[int] = set()
        self._packed: Packed = {} if packed is None else packed

    def pack(self, value: Any) -> Any:
        """`value` with its tensors themselves: a copy is the caller's business.

        What can be written to and stands twice is packed once. In a file it stays one, so that
        `unpack` makes one of it again: a write to it is seen at both places.

        Raises:
            Unpackable: something in it is no plain value, or there is too much of it.
        """
        self._count(1, 0)
        kind = type(value)
        if kind in _AS_IT_IS or (kind is int and value.bit_length() < 64):
            return value
        if not isinstance(value, WRITTEN_TO):
            return self._pack(value, kind)
        seen = self._packed.get(id(value))
        if seen is None:
            return self._pack_once(value, kind)
        if seen[1] is _UNFINISHED:
            raise Unpackable("a container that holds itself")
        return seen[1]

    def _pack_once(self, value: Any, kind: type[Any]) -> Any:
        self._packed[id(value)] = (value, _UNFINISHED)
        try:
            packed = self._pack(value, kind)
        except Unpackable:
            del self._packed[id(value)]
            raise
        self._packed[id(value)] = (value, packed)
        return packed

    def _pack(self, value: Any, kind: type[Any]) -> Any:
        if kind is int:
            return {"!": "int", "text": str(value)}
        if kind is bytes:
            return {"!": "bytes", "of": _bytes(value)}
        if kind not in _PLAIN and self.values > 1 and has_notes(value):
            raise Unpackable(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, np.ndarray | np.generic):
            return self._array(value)
        if kind in _SEQUENCES or isinstance(value, tuple | list):
            return self._sequence(value)
        if isinstance(value, dict):
            return self._dict(value)
        if kind in (torch.device, torch.dtype, torch.Size):
            return value
        if isinstance(value, enum.Enum):
            return {"!": "enum", "name": value.name} | _kind(value, enum.Enum)
        if is_atom(value):
            return {"!": "atom", "type": kind.__name__, "of": self.pack(ATOMS[kind][0](value))}
        if isinstance(value, PurePath):
            return {"!": "path", "text": str(value)}
        if is_generator(value):
            self.needs_live += 1
            return _packed_generator(value)
        if is_raw(value):
            self.needs_live += 1
            return {"!": "raw", "of": _bytes(bytes(value))}
        raise Unpackable(value)

    def _dict(self, value: dict[Any, Any]) -> Any:
        keys = keys_of(value)
        # Tensors, which are keys by what they are, not by their values.
        kinds = set(map(type, keys)).difference(_AS_IT_IS)
        if kinds and any(issubclass(kind, Tensor) for kind in kinds):
            raise Unpackable(value)
        if isinstance(value, collections.defaultdict):
            factory: Any = value.default_factory
            self.needs_live += factory is not None and factory not in FACTORIES.values()
        packed = {"!": "dict", "keys": self.pack(keys), "values": self.pack(values_of(value))}
        return packed | _kind(value, dict)

    def _count(self, values: int, size: int) -> None:
        self.values += values
        self.bytes += size
        if self.values > MOST_VALUES or self.bytes > self.most_bytes:
            raise Unpackable(f"more than {MOST_VALUES} values or {MOST_BYTES >> 20} MB")

    def _tensor(self, value: Tensor) -> Any:
        if value.is_nested:
            raise Unpackable("a nested tensor")
        if value.grad_fn is not None and not is_spent(value):
            raise Unpackable("a tensor with a gradient's history, kept without .detach()")
        self._count(0, value.nbytes if value.layout is torch.strided else 0)
        plain = value.detach()
        own = type(value) not in (Tensor, nn.Parameter, nn.Buffer)
        if own and is_traceable_wrapper_subclass(value):
            raise Unpackable(value)
        if own:
            plain = plain.as_subclass(Tensor)
        packed = plain if plain.device.type == "cpu" else {"!": "on the device", "of": plain}
        if own:
            packed = {"!": "of a class", "of": packed} | _kind(value, Tensor)
        if not value.requires_grad or value.grad_fn is not None:
            return packed
        return {
            "!": "leaf",
            "of": packed,
            "grad": self.pack(value.grad),
            "weight": isinstance(value, nn.Parameter),
        }

    def _array(self, value: Any) -> Any:
        if isinstance(value, np.ma.MaskedArray):
            return {
                "!": "masked",
                "data": self.pack(value.data),
                "mask": self.pack(np.ma.getmaskarray(value)),
            }
        if value.dtype.names is None and value.dtype.hasobject and isinstance(value, np.ndarray):
            return {"!": "objects", "shape": list(value.shape), "of": self.pack(list(value.flat))}
        if value.dtype.hasobject:
            raise Unpackable(value)
        self._count(0, value.nbytes)
        whole = np.ascontiguousarray(value)
        kind = "array" if isinstance(value, np.ndarray) else "number"
        order = {}
        if value.ndim > 1 and value.flags.f_contiguous and not value.flags.c_contiguous:
            order = {"order": "F"}  # sums go by it
        data = _bytes(whole.tobytes())
        dtype = whole.dtype.str if whole.dtype.names is None else repr(whole.dtype.descr)
        return {"!": kind, "dtype": dtype, "shape": list(value.shape), "bytes": data} | order

    def _sequence(self, value: Any) -> Any:
        kind = type(value)
        items = list.__getitem__(value, slice(None)) if isinstance(value, list) else list(value)
        if issubclass(kind, tuple) and kind is not tuple and not hasattr(kind, "_fields"):
            raise Unpackable(value)
        name = kind.__name__ if kind in _SEQUENCES else "list"
        if hasattr(kind, "_fields"):
            name = "tuple"
        packed = self._stacked(items)
        if packed is None or packed["!"] == "stack":
            self.inner += [one for one in items if type(one) in _SHARED or isinstance(one, _INNER)]
        if packed is None:
            packed = [self.pack(item) for item in items]
        base = tuple if name == "tuple" else list
        own = {} if kind in _SEQUENCES else _kind(value, base)
        if name == "list" and isinstance(packed, list) and not own:
            return packed
        more = {"maxlen": value.maxlen} if kind is collections.deque else {}
        return {"!": name, "of": packed} | more | own

    def _numbers_or_texts(self, items: Sequence[Any]) -> Any:
        if len(items) > MOST_VALUES * (1 if type(items[0]) is str else _LONG):
            self._count(len(items), 0)
        kinds = set(map(type, items))
        if kinds == {str}:
            self._count(len(items), sum(map(len, items)))
            return {"!": "texts", "of": list(items)}
        if kinds not in ({int}, {float}):
            return None
        try:
            numbers = np.array(items, np.int64 if kinds == {int} else np.float64)
        except OverflowError:
            return None
        self._count(len(items) // _LONG, numbers.nbytes)
        return {"!": "numbers", "of": torch.from_numpy(numbers)}

    def _stacked(self, items: Sequence[Any]) -> Any:
        """Many values alike as one, many tuples alike as columns: a replay buffer is no ten
        thousand records.
        """
        if len(items) < 16:
            return None
        first = items[0]
        if len(items) >= _LONG and type(first) in (int, float, str):
            return self._numbers_or_texts(items)
        if type(first) is Tensor and first.layout is torch.strided and first.grad_fn is None:
            alike = (first.shape, first.dtype, first.device)
            addresses = set(map(id, items))
            once = len(addresses) == len(items) and addresses.isdisjoint(self._packed)
            if once and all(
                type(t) is Tensor and (t.shape, t.dtype, t.device) == alike for t in items
            ):
                self.stacked |= addresses
                self._count(len(items), first.nbytes * len(items))
                stacked = torch.stack([item.detach() for item in items])
                return {"!": "stack", "of": self._tensor(stacked)}
        kind = type(first)
        if not (kind is tuple or hasattr(kind, "_fields")) or not first:
            return None
        if any(type(item) is not kind or len(item) != len(first) for item in items):
            return None
        columns = zip(*items, strict=True)
        return {"!": "columns", "of": [self.pack(list(column)) for column in columns]} | _kind(
            first, tuple
        )


def _kind(value: Any, base: type) -> dict[str, Any]:
    kind = type(value)
    if kind is base:
        return {}
    factory: Any = getattr(value, "default_factory", None)
    own = {"factory": factory.__name__} if factory in FACTORIES.values() else {}
    return {"kind": [kind.__module__, kind.__qualname__]} | own


def pack(value: Any) -> Any:
    """A packed copy of a small value."""
    if type(value) is int and value.bit_length() < 64:
        return value
    return Packer().pack(value)


def _packed_generator(generator: Any) -> Any:
    state = generator_state(generator)
    if isinstance(generator, random.Random):
        version, words, gauss = state
        state = {"version": version, "words": np.array(words), "gauss": gauss}
    return {
        "!": "generator",
        "of": pack(state),
        "spawned": getattr(seeds_of(generator), "n_children_spawned", 0),
    }


def _bytes(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())
