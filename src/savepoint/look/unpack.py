"""Packed values back into the objects that are there."""

import array
import ast
import collections
import contextlib
import copy
import enum
import random
import types
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from savepoint.look.generators import is_generator, restore_generator, seeds_of
from savepoint.look.kinds import ATOMS, FACTORIES, WRITTEN_TO, Unpackable, base_of, is_raw


def unpack(packed: Any, live: Any = None, device: torch.device | str = "cpu") -> Any:
    """The value of `packed`, put into `live` in place wherever that is of the same kind.

    In place, because others may hold the very list or tensor: an optimizer its parameters, say.
    """
    if not isinstance(packed, Tensor | list | dict):
        return packed
    if _unpacked is None:
        return _unpack(packed, live, device)
    if id(packed) not in _unpacked:
        _unpacked[id(packed)] = _unpack(packed, _not_yet_filled(live), device)
    return _unpacked[id(packed)]


def _not_yet_filled(live: Any) -> Any:
    """What stood twice, as all of `[zeros] * 4` does, takes one value only: the second one is
    another object now.
    """
    if _filled is None or not isinstance(live, WRITTEN_TO):
        return live
    if id(live) not in _filled:
        _filled[id(live)] = live
        return live
    # Which may have a function of its own for what is missing.
    return copy.copy(live) if isinstance(live, collections.defaultdict) else None


def _unpack(packed: Any, live: Any, device: torch.device | str) -> Any:
    if isinstance(packed, Tensor):
        return _into_tensor(packed, live)
    if isinstance(packed, list):
        return _into_list(_items(packed, live, device), live)
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


_unpacked: dict[int, Any] | None = None
_filled: dict[int, Any] | None = None  # alive, as they are known by their addresses


@contextlib.contextmanager
def each_once() -> Iterator[None]:
    """Inside, a packed value that stands twice is unpacked once, and two are not put into one
    object. All that is unpacked must live as long, as it is known by its address.
    """
    global _unpacked, _filled
    _unpacked = {}
    _filled = {}
    try:
        yield
    finally:
        _unpacked = _filled = None


def _into_tensor(packed: Tensor, live: Any) -> Any:
    same = isinstance(live, Tensor) and (live.shape, live.dtype) == (packed.shape, packed.dtype)
    if same and live.layout is torch.strided and not live.is_inference():
        with torch.no_grad():
            live.copy_(packed)
        return live
    return packed.clone()


def _on_device(packed: Any, live: Any, device: Any) -> Any:
    if isinstance(live, Tensor) and live.shape == packed["of"].shape:
        return _into_tensor(packed["of"].to(live.device), live)
    return packed["of"].to(device)


def _into_tensor_of_a_class(packed: Any, live: Any, device: Any) -> Any:
    value = _unpack(packed["of"], live, device)
    return value if value is live else value.as_subclass(_kind_of(packed, Tensor, live))


def _into_leaf(packed: Any, live: Any, device: Any) -> Any:
    value = _unpack(packed["of"], live, device)
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
    kind = next(kind for kind in ATOMS if kind.__name__ == packed["type"])
    value = ATOMS[kind][1](unpack(packed["of"]))
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
        there.default_factory = FACTORIES.get(
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
    if dict.__contains__(there, key) or factory is None or factory in FACTORIES.values():
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


def set_generator(generator: Any, packed: Any) -> None:
    state = unpack(packed["of"])
    if isinstance(generator, random.Random):
        state = (state["version"], tuple(state["words"].tolist()), state["gauss"])
    restore_generator(generator, state)
    seeds = seeds_of(generator)
    missing = packed.get("spawned", 0) - getattr(seeds, "n_children_spawned", 0)
    if missing > 0:
        seeds.spawn(missing)


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
