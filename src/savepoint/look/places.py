"""A place in the tree of objects: its path, what stands there, how it is put back."""

import collections
import contextlib
import functools
import inspect
import types
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from savepoint.look.kinds import base_of, keys_of, values_of
from savepoint.look.marks import own_part
from savepoint.look.unpack import unpack

# How to go on from an object: ("attr", name), ("item", key), ("nth", place), ("cell", place),
# ("module", name), ("buffer", name), ("parameter", name), ("requires_grad", name), ("state", "").
Step = tuple[str, Any]
Path = tuple[Step, ...]


class Memory(NamedTuple):
    """With whom a place has its memory.

    Attributes:
        shares: The place that was seen first of those that hold this very memory.
        one_with: Places that hold the same container, tensor or array, here or inside.
        overlaps: Places where a view of this memory stands, here or inside, and whether one of the
            two was written to.
    """

    shares: Path | None = None
    one_with: frozenset[Path] = frozenset()
    overlaps: frozenset[tuple[Path, bool]] = frozenset()


_OF_ITS_OWN = Memory()


@dataclass(slots=True)
class Place:
    """What stands at a path.

    Attributes:
        mark: Equal to that of an earlier look if nothing has changed.
        packed: What a checkpoint would hold; meaningless where `what` is given.
        what: Words for a value that no checkpoint can hold, else "".
        small: Whether the first look keeps a copy.
        needs_live: How many of its values can only be put into one that is there.
    """

    mark: Any
    packed: Any = None
    what: str = ""
    small: bool = False
    needs_live: int = 0
    memory: Memory = _OF_ITS_OWN

    @property
    def is_alias(self) -> bool:
        return isinstance(self.mark, tuple) and self.mark[:1] in (("same",), ("view",))


def packed_path(path: Path) -> list[Any]:
    return [list(step) for step in path]


def path_of(packed: Iterable[Any]) -> Path:
    return tuple((kind, key) for kind, key in packed)


def in_words(path: Path) -> str:
    """`model.net.history[3]`."""
    words = str(path[0][1])
    for kind, key in path[1:]:
        if kind in ("item", "nth", "cell"):
            words += f"[{key!r}]"
        elif key:
            words += f".{key}"
    return words


def path_below(path: Path, name: str) -> Path:
    """Of a sub-module. That of a compiled one has the place of what was compiled: compiling is no
    change.
    """
    return path if name == "_orig_mod" else (*path, ("module", name))


def value_at(owner: Any, step: Step) -> Any:
    kind, key = step
    if kind == "attr":
        return _raw_attribute(owner, key)
    if kind == "item":
        return dict.__getitem__(owner, key) if isinstance(owner, dict) else owner[key]
    if kind == "nth":
        return values_of(owner)[key]
    if kind == "cell":
        return owner.__closure__[key].cell_contents
    if kind == "state":
        return owner
    if kind == "requires_grad":
        return owner._parameters[key].requires_grad
    members = {"module": "_modules", "buffer": "_buffers", "parameter": "_parameters"}[kind]
    while key not in getattr(owner, members) and "_orig_mod" in owner._modules:
        owner = owner._modules["_orig_mod"]
    return getattr(owner, members)[key]


def _raw_attribute(owner: Any, name: str) -> Any:
    """As it lies there: a descriptor of the user's own may give another value."""
    if isinstance(owner, types.MethodType | types.FunctionType | functools.partial):
        return getattr(owner, name)
    own = getattr(owner, "__dict__", {})
    return own[name] if name in own else getattr(owner, name)


def _is_described(owner: Any, name: str) -> bool:
    """Whether a descriptor of its class would write something else than the value."""
    descriptor = inspect.getattr_static(type(owner), name, None)
    own = getattr(owner, "__dict__", {})
    return name in own and hasattr(type(descriptor), "__set__")


def resolve(roots: Mapping[str, Any], path: Path) -> Any:
    value = roots[path[0][1]]
    for step in path[1:]:
        if isinstance(value, nn.Module) and "_orig_mod" in value._modules:
            value = value._modules["_orig_mod"]
        value = value_at(value, step)
    return value


def put_back(
    roots: Mapping[str, Any],
    path: Path,
    packed: Any,
    device: torch.device,
    weights: Collection[int | None] = (),
    in_place: bool = True,
) -> None:
    """Puts what `packed` holds at the path.

    Args:
        weights: The memory of the weights: an attribute may be a view of one.
        in_place: Whether the object that is there is written to, where it is of the same kind.

    Raises:
        LookupError, AttributeError, TypeError, ValueError, RuntimeError, Unpackable: the place is
            no more, or is of another kind.
    """
    if any(type(key) is str and key.startswith("__") and key != "__self__" for _, key in path):
        raise ValueError(f"no place for a checkpoint to change: {in_words(path)}")
    owner = resolve(roots, path[:-1])
    step = path[-1]
    if isinstance(owner, nn.Module) and "_orig_mod" in owner._modules:
        owner = owner._modules["_orig_mod"]
    if isinstance(packed, dict) and packed["!"] == "gone":
        _remove(owner, step)
        return
    live = None
    with contextlib.suppress(LookupError, AttributeError, ValueError):
        live = value_at(owner, step)
    if not in_place or (step[0] == "attr" and storage_of(live) in weights):
        live = None  # written in place, it would change a weight, or what another attribute holds
    if isinstance(packed, dict) and packed["!"] == "same":
        value = resolve(roots, path_of(packed["of"]))
    else:
        value = unpack(packed, live, device)
    if value is not live:
        _refuse_another_kind(live, value)
        set_value(roots, path, owner, value)


def storage_of(value: Any) -> int | None:
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    storage = own_part(value).untyped_storage()
    return storage.data_ptr() or None  # 0 where there is none: of an empty tensor


def memory_of(value: Any) -> int | None:
    """The same number for all tensors or arrays that lie in the same memory."""
    if isinstance(value, Tensor):
        return storage_of(value)
    base = value
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    return id(base) if isinstance(value, np.ndarray) else None


def _refuse_another_kind(live: Any, value: Any) -> None:
    """A list that the code of today calls a set: neither would be what the code expects."""
    containers = (list, tuple, dict, set, collections.deque, Tensor, np.ndarray)
    if not isinstance(live, containers) or not isinstance(value, containers):
        return
    if not isinstance(value, type(live)) and not isinstance(live, type(value)):
        raise TypeError(f"{type(live).__name__} now, {type(value).__name__} in the checkpoint")


def _remove(owner: Any, step: Step) -> None:
    with contextlib.suppress(AttributeError, KeyError):
        if step[0] == "attr":
            delattr(owner, step[1])
        elif isinstance(owner, dict):
            del owner[step[1]]


def set_value(roots: Mapping[str, Any], path: Path, owner: Any, value: Any) -> None:
    kind, key = path[-1]
    if kind == "attr" and _is_described(owner, key):
        owner.__dict__[key] = value
    elif kind == "attr":
        try:
            setattr(owner, key, value)
        # A frozen dataclass, say, that its own code has changed.
        except (AttributeError, TypeError):
            object.__setattr__(owner, key, value)
    elif kind in ("item", "nth") and isinstance(owner, tuple):
        items = [value if place == key else item for place, item in enumerate(owner)]
        whole = type(owner)(*items) if hasattr(owner, "_fields") else tuple(items)
        set_value(roots, path[:-1], resolve(roots, path[:-2]), whole)
    elif kind in ("item", "nth") and isinstance(owner, dict):
        base_of(owner).__setitem__(owner, keys_of(owner)[key] if kind == "nth" else key, value)
    elif kind == "item":
        owner[key] = value
    elif kind == "cell":
        owner.__closure__[key].cell_contents = value
    elif kind == "buffer":
        # Made in mid-training; of a state_dict it would be no place of the look.
        if key not in owner._buffers:
            owner._non_persistent_buffers_set.add(key)
        owner._buffers[key] = value
    elif kind == "parameter":
        owner._parameters[key].data = value
    elif kind == "requires_grad":
        owner._parameters[key].requires_grad_(value)
    elif kind == "state":
        owner.load_state_dict(value)
