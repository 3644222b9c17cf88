"""Plain values as a checkpoint can hold them, and back into the objects that are there. Torch and
NumPy, no Lightning.

A packed value is made of tensors and plain values only (`weights_only=True` reads it). What
JSON-like values cannot say stands in a dict with the key "!" (its kind), so every dict of a user is
packed as one of these too:

    {"!": "dict", "keys": [...], "values": [...]}     {"!": "array", "dtype": "<f4", "shape": [3],
                                                      "bytes": tensor}

What is of a class of its own says its name under "kind" (a named tuple, an OrderedDict): no class
is imported for it, it is found among those that the process has. Long lists of one kind are packed
as a whole: the look at a data set's list of files must not hold up a save.
"""

import array
import ast
import collections
import contextlib
import ctypes
import datetime
import decimal
import enum
import fractions
import random
import types
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from savepoint.look.classes import is_library

MOST_VALUES = 100_000  # in one attribute: above it, packing would hold up the training
MOST_BYTES = 256 * 2**20
_LONG = 64  # values of one kind, from which on they are packed as a whole
# Up to here every byte of a tensor is compared, above it its version and a sample.
_WHOLE_BYTES = 2**20

SCALARS = (type(None), bool, int, float, complex, str, bytes)
_AS_IT_IS = (type(None), bool, float, complex, str)
_SEQUENCES = (list, tuple, set, frozenset, collections.deque)
# What is written to where it is.
_SHARED = frozenset((
    list, dict, set, bytearray, collections.deque, collections.OrderedDict,
    collections.defaultdict, collections.Counter,
))  # fmt: skip
_PLAIN = frozenset((list, tuple, dict, set, frozenset, collections.deque, np.ndarray))


# Values without attributes: what they are made of, as plain values, and back.
_ATOMS: dict[type, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
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
_FACTORIES = {kind.__name__: kind for kind in (int, float, bool, str, list, dict, set, tuple)}


def is_atom(value: Any) -> bool:
    return type(value) in _ATOMS


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


class Packer:
    """Packs one attribute; counts what it has met.

    Attributes:
        inner: The addresses of the containers inside: others may hold them too.
        needs_live: How many of its values can only be put into one that is there.
    """

    def __init__(self) -> None:
        self.values = self.bytes = self.needs_live = 0
        self.inner: list[int] = []
        self._tensors: dict[int, tuple[Tensor, Any]] = {}

    def pack(self, value: Any) -> Any:
        """`value` with its tensors themselves: a copy is the caller's business.

        Raises:
            Unpackable: something in it is no plain value, or there is too much of it.
        """
        self._count(1, 0)
        kind = type(value)
        if kind in _AS_IT_IS or (kind is int and value.bit_length() < 64):
            return value
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
            return {"!": "atom", "type": kind.__name__, "of": self.pack(_ATOMS[kind][0](value))}
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
            self.needs_live += factory is not None and factory not in _FACTORIES.values()
        packed = {"!": "dict", "keys": self.pack(keys), "values": self.pack(values_of(value))}
        return packed | _kind(value, dict)

    def _count(self, values: int, size: int) -> None:
        self.values += values
        self.bytes += size
        if self.values > MOST_VALUES or self.bytes > MOST_BYTES:
            raise Unpackable(f"more than {MOST_VALUES} values or {MOST_BYTES >> 20} MB")

    def _tensor(self, value: Tensor) -> Any:
        """One that stands twice is packed once, and the copies of a file are one again: a write to
        it is seen at both places.
        """
        seen = self._tensors.get(id(value))
        if seen is None:
            seen = (value, self._packed_tensor(value))
            self._tensors[id(value)] = seen
        return seen[1]

    def _packed_tensor(self, value: Tensor) -> Any:
        if value.is_nested:
            raise Unpackable("a nested tensor")
        if value.grad_fn is not None:
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
        if not value.requires_grad:
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
        array = np.ascontiguousarray(value)
        kind = "array" if isinstance(value, np.ndarray) else "number"
        order = {}
        if value.ndim > 1 and value.flags.f_contiguous and not value.flags.c_contiguous:
            order = {"order": "F"}  # sums go by it
        data = _bytes(array.tobytes())
        dtype = array.dtype.str if array.dtype.names is None else repr(array.dtype.descr)
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
        if packed is None:
            self.inner += [id(item) for item in items if type(item) in _SHARED]
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
            if all(type(t) is Tensor and (t.shape, t.dtype, t.device) == alike for t in items):
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
    own = {"factory": factory.__name__} if factory in _FACTORIES.values() else {}
    return {"kind": [kind.__module__, kind.__qualname__]} | own


def _kind_of(packed: Any, base: type, live: Any) -> type:
    """The class of a packed value, among those of this process."""
    name = packed.get("kind")
    there = type(live) if isinstance(live, base) else base
    if name is None or [there.__module__, there.__qualname__] == name:
        return there
    waiting = [base]
    while waiting:
        kind = waiting.pop()
        if [kind.__module__, kind.__qualname__] == name:
            return kind
        waiting += type.__subclasses__(kind)
    raise Unpackable(f"a {name[1]}, and there is no such class")


def _new(kind: type) -> Any:
    """An empty list or dict; no code of a user's class runs."""
    if not isinstance(kind.__new__, types.BuiltinFunctionType):
        raise Unpackable(f"a {kind.__qualname__}, and none is there")
    return kind.__new__(kind)


def pack(value: Any) -> Any:
    """A packed copy of a small value."""
    if type(value) is int and value.bit_length() < 64:
        return value
    return Packer().pack(value)


def unpack(packed: Any, live: Any = None, device: torch.device | str = "cpu") -> Any:
    """The value of `packed`, put into `live` in place wherever that is of the same kind.

    In place, because others may hold the very list or tensor: an optimizer its parameters, say.
    """
    if isinstance(packed, Tensor):
        return _into_tensor(packed, live)
    if isinstance(packed, list):
        return _into_list(_items(packed, live, device), live)
    if not isinstance(packed, dict):
        return packed
    return _UNPACK[packed["!"]](packed, live, device)


def _items(packed: Any, live: Any, device: Any) -> list[Any]:
    if isinstance(packed, list):
        there = list(live) if isinstance(live, list | tuple | collections.deque) else []
        there += [None] * (len(packed) - len(there))
        return [unpack(item, old, device) for item, old in zip(packed, there, strict=False)]
    if packed["!"] == "stack":
        return [part.clone() for part in unpack(packed["of"], None, device)]
    if packed["!"] == "numbers":
        numbers: list[Any] = packed["of"].tolist()
        return numbers
    if packed["!"] == "texts":
        return list(packed["of"])
    columns = [unpack(column, None, device) for column in packed["of"]]
    kind = _kind_of(packed, tuple, None)
    return [tuple.__new__(kind, row) for row in zip(*columns, strict=True)]


def _into_list(items: list[Any], live: Any) -> Any:
    if isinstance(live, list):
        list.__setitem__(live, slice(None), items)
        return live
    return items


def _into_list_of_kind(packed: Any, live: Any, device: Any) -> Any:
    kind = _kind_of(packed, list, live)
    return _into_list(
        _items(packed["of"], live, device), live if type(live) is kind else _new(kind)
    )


_unpacked: dict[int, Tensor] | None = None


@contextlib.contextmanager
def tensors_once() -> Iterator[None]:
    """Inside, a packed tensor that stands twice is unpacked once. All that is unpacked must live as
    long, as it is known by its address.
    """
    global _unpacked
    _unpacked = {}
    try:
        yield
    finally:
        _unpacked = None


def _into_tensor(packed: Tensor, live: Any) -> Any:
    if _unpacked is None:
        return _into_tensor_once(packed, live)
    if id(packed) not in _unpacked:
        _unpacked[id(packed)] = _into_tensor_once(packed, live)
    return _unpacked[id(packed)]


def _into_tensor_once(packed: Tensor, live: Any) -> Any:
    same = isinstance(live, Tensor) and (live.shape, live.dtype) == (packed.shape, packed.dtype)
    if same and live.layout is torch.strided and not live.is_inference():
        with torch.no_grad():
            live.copy_(packed)
        return live
    return packed.clone()


def _on_device(packed: Any, live: Any, device: Any) -> Any:
    if isinstance(live, Tensor) and live.shape == packed["of"].shape:
        return _into_tensor_once(packed["of"].to(live.device), live)
    return packed["of"].to(device)


def _into_tensor_of_a_class(packed: Any, live: Any, device: Any) -> Any:
    value = unpack(packed["of"], live, device)
    return value if value is live else value.as_subclass(_kind_of(packed, Tensor, live))


def _into_leaf(packed: Any, live: Any, device: Any) -> Any:
    value = unpack(packed["of"], live, device)
    if value is not live:
        value = nn.Parameter(value) if packed["weight"] else value.requires_grad_()
    value.grad = unpack(packed["grad"], None, device)
    return value


def _into_masked(packed: Any, live: Any, device: Any) -> Any:
    return np.ma.MaskedArray(unpack(packed["data"]), unpack(packed["mask"]))


def _into_objects(packed: Any, live: Any, device: Any) -> Any:
    array = np.empty(packed["shape"], object)
    array.reshape(-1)[:] = [*_items(_inside(packed["of"]), None, device), None][:-1]
    return array


def _into_atom(packed: Any, live: Any, device: Any) -> Any:
    kind = next(kind for kind in _ATOMS if kind.__name__ == packed["type"])
    value = _ATOMS[kind][1](unpack(packed["of"]))
    if type(live) is kind and isinstance(live, bytearray | array.array):
        live[:] = value
        return live
    return value


def _into_array(packed: Any, live: Any, device: Any) -> Any:
    text = packed["dtype"]
    dtype = np.dtype(ast.literal_eval(text) if text.startswith("[") else text)
    array = np.frombuffer(packed["bytes"].numpy().tobytes(), dtype).reshape(packed["shape"])
    if "order" in packed:
        array = np.asfortranarray(array)
    same = isinstance(live, np.ndarray) and (live.dtype, live.shape) == (dtype, array.shape)
    other_order = same and live.base is None and live.strides != array.strides
    if not same or not live.flags.writeable or other_order:
        return array.copy("K")
    live[...] = array
    return live


def _into_tuple(packed: Any, live: Any, device: Any) -> Any:
    return tuple.__new__(_kind_of(packed, tuple, live), _items(packed["of"], live, device))


def _into_set(packed: Any, live: Any, device: Any) -> Any:
    items = _items(packed["of"], None, device)
    if not isinstance(live, set):
        return set(items)
    live.clear()
    live.update(items)
    return live


def _into_deque(packed: Any, live: Any, device: Any) -> Any:
    items = _items(packed["of"], live, device)
    if not isinstance(live, collections.deque) or live.maxlen != packed["maxlen"]:
        return collections.deque(items, packed["maxlen"])
    live.clear()
    live.extend(items)
    return live


def _into_dict(packed: Any, live: Any, device: Any) -> Any:
    kind = _kind_of(packed, dict, live)
    there: Any = live if type(live) is kind else _new(kind)
    if there is not live and issubclass(kind, collections.defaultdict):
        there.default_factory = _FACTORIES.get(
            packed.get("factory", ""), getattr(live, "default_factory", None)
        )
        if there.default_factory is None:
            raise Unpackable("a defaultdict with a function of its own, and none is there")
    keys = unpack(packed["keys"], None, device)
    values = _items(_inside(packed["values"]), [_value_for(there, key) for key in keys], device)
    base = base_of(there)
    base.clear(there)
    for key, value in zip(keys, values, strict=True):
        base.__setitem__(there, key, value)  # not by update(), with which a Counter counts
    return there


def _value_for(there: dict[Any, Any], key: Any) -> Any:
    """What a value is put into: a function of the user's own that makes missing ones knows of what
    kind they are.
    """
    factory = getattr(there, "default_factory", None)
    if dict.__contains__(there, key) or factory is None or factory in _FACTORIES.values():
        return dict.get(there, key)
    return factory()


def _inside(packed: Any) -> Any:
    """Of a packed list, what `_items` takes."""
    return packed["of"] if isinstance(packed, dict) and packed["!"] == "list" else packed


def _into_enum(packed: Any, live: Any, device: Any) -> Any:
    kind = _kind_of(packed, enum.Enum, live)
    if kind is enum.Enum:
        raise Unpackable("an enum's member, and none of its kind is there")
    return kind[packed["name"]]  # type: ignore[index]


def _into_path(packed: Any, live: Any, device: Any) -> Any:
    return (type(live) if isinstance(live, PurePath) else PurePath)(packed["text"])


def _into_generator(packed: Any, live: Any, device: Any) -> Any:
    if not is_generator(live):
        raise Unpackable("a random generator, and none is there")
    set_generator(live, packed)
    return live


def _into_raw(packed: Any, live: Any, device: Any) -> Any:
    if not is_raw(live):
        raise Unpackable("numbers of C, and none are there")
    memoryview(live).cast("B")[:] = packed["of"].numpy().tobytes()
    return live


_UNPACK: dict[str, Callable[[Any, Any, Any], Any]] = {
    "int": lambda packed, live, device: int(packed["text"]),
    "bytes": lambda packed, live, device: packed["of"].numpy().tobytes(),
    "on the device": _on_device,
    "of a class": _into_tensor_of_a_class,
    "array": _into_array,
    "number": lambda packed, live, device: _into_array(packed, None, device)[()],
    "tuple": _into_tuple,
    "set": _into_set,
    "frozenset": lambda packed, live, device: frozenset(_items(packed["of"], None, device)),
    "deque": _into_deque,
    "list": lambda packed, live, device: _into_list_of_kind(packed, live, device),
    "leaf": _into_leaf,
    "masked": _into_masked,
    "objects": _into_objects,
    "atom": _into_atom,
    "dict": _into_dict,
    "enum": _into_enum,
    "path": _into_path,
    "generator": _into_generator,
    "raw": _into_raw,
}


def _bytes(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


# -- generators ----------------------------------------------------------------------------------

GENERATORS = (
    random.Random,
    np.random.Generator,
    np.random.BitGenerator,
    np.random.RandomState,
    torch.Generator,
)


def is_generator(value: Any) -> bool:
    return isinstance(value, GENERATORS) and not isinstance(value, random.SystemRandom)


def generator_state(generator: Any) -> Any:
    """The state as the generator's own module gives it."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.BitGenerator):
        return generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.get_state()


def restore_generator(generator: Any, state: Any) -> None:
    """Takes back what `generator_state` gave."""
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.BitGenerator):
        generator.state = state
    else:
        generator.set_state(state)


def seed_generator(generator: Any, seed: int) -> None:
    """A state that is a function of `seed` alone, whatever the generator has drawn."""
    if isinstance(generator, random.Random):
        generator.seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    elif isinstance(generator, np.random.BitGenerator):
        generator.state = type(generator)(seed).state
    elif isinstance(generator, np.random.RandomState):
        generator.seed(seed % 2**32)
    else:
        generator.manual_seed(seed)


def _packed_generator(generator: Any) -> Any:
    state = generator_state(generator)
    if isinstance(generator, random.Random):
        version, words, gauss = state
        state = {"version": version, "words": np.array(words), "gauss": gauss}
    return {
        "!": "generator",
        "of": pack(state),
        "spawned": getattr(_seeds(generator), "n_children_spawned", 0),
    }


def _seeds(generator: Any) -> Any:
    """What counts the children that NumPy's generators have spawned."""
    return getattr(getattr(generator, "bit_generator", generator), "seed_seq", None)


def set_generator(generator: Any, packed: Any) -> None:
    state = unpack(packed["of"])
    if isinstance(generator, random.Random):
        state = (state["version"], tuple(state["words"].tolist()), state["gauss"])
    restore_generator(generator, state)
    seeds = _seeds(generator)
    missing = packed.get("spawned", 0) - getattr(seeds, "n_children_spawned", 0)
    if missing > 0:
        seeds.spawn(missing)


# -- comparing -----------------------------------------------------------------------------------


def mark(packed: Any) -> Any:
    """What is equal for two packed values if, and but for huge ones only if, they are equal."""
    kind = type(packed)
    if kind is int or kind is str or packed is None:
        return (kind.__name__, packed)
    if isinstance(packed, Tensor):
        return _tensor_mark(packed)
    if isinstance(packed, list):
        return tuple([mark(item) for item in packed])
    if isinstance(packed, dict):
        if packed["!"] == "texts":
            return len(packed["of"]), zlib.crc32(
                "\0".join(packed["of"]).encode("utf-8", "surrogatepass")
            )
        if packed["!"] in _COPIED:  # made for this look: neither version nor address say anything
            return tuple([(key, _copy_mark(item)) for key, item in packed.items()])
        return tuple([(key, mark(item)) for key, item in packed.items()])
    if isinstance(packed, float):
        return repr(packed)  # one NaN is like another, and 0.0 unlike -0.0
    return (kind.__name__, packed)


_COPIED = ("array", "number", "stack", "numbers", "bytes", "raw")


def _copy_mark(packed: Any) -> Any:
    if isinstance(packed, Tensor) and packed.device.type == "cpu" and not packed.is_quantized:
        return (
            str(packed.dtype),
            tuple(packed.shape),
            _sum(packed.resolve_conj().resolve_neg().reshape(-1)),
        )
    return mark(packed)


def _tensor_mark(tensor: Tensor) -> Any:
    head = (str(tensor.dtype), tuple(tensor.shape))
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return (*head, _version(tensor), id(tensor))
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    if tensor.nbytes <= _WHOLE_BYTES:
        return (*head, _sum(flat))
    return (*head, _version(tensor), tensor.data_ptr(), _sum(flat[:: len(flat) // 4096]))


def fingerprint(tensor: Tensor) -> Any:
    """Differs once a tensor was written to: by a sample too, as writing through `.data` leaves its
    version as it is.
    """
    if (
        tensor.layout is not torch.strided
        or is_lazy(tensor)
        or tensor.is_quantized
        or tensor.is_meta
    ):
        return _version(tensor)
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    return _version(tensor), tensor.data_ptr(), _sum(flat[:: max(1, len(flat) // 4096)].cpu())


def sample_sum(tensor: Tensor, total: int = 0) -> int:
    """A sum over a sample of a tensor's values, wherever it is, added to `total`."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        return total
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    return _sum(flat[:: max(1, len(flat) // 4096)].cpu(), total)


def _sum(flat: Tensor, total: int = 0) -> int:
    if not flat.numel():
        return total
    whole = flat.contiguous()
    # Not by `numpy()`, which lets nobody resize the tensor any more.
    return zlib.crc32((ctypes.c_char * whole.nbytes).from_address(whole.data_ptr()), total)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
