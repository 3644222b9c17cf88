"""What classes, functions and modules hold for all that use them: seen, and named when it has
changed, but never put back, as others may go by it.
"""

import collections
import contextlib
import contextvars
import dataclasses
import functools
import itertools
import logging
import operator
import os
import sys
import threading
import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from savepoint.look.classes import (
    NO_STATE,
    is_library,
    names_in,
    own_attributes,
    wrapped_functions_of,
)
from savepoint.look.kinds import SCALARS, Unpackable, has_notes, values_of
from savepoint.look.marks import fingerprint, mark
from savepoint.look.pack import Packer
from savepoint.look.places import Path, Place
from savepoint.look.seen import Seen, is_hidden_iterator, is_settled

ITSELF = (type, types.ModuleType, types.BuiltinFunctionType, types.MethodWrapperType)
ENTERED = (
    types.SimpleNamespace, collections.UserDict, collections.UserList, collections.ChainMap,
    weakref.WeakKeyDictionary, weakref.WeakValueDictionary, threading.local,
)  # fmt: skip
IGNORED = (
    weakref.ProxyType, weakref.CallableProxyType, logging.Logger, threading.Thread,
    type(threading.Lock()), type(threading.RLock()), threading.Event, threading.Condition,
)  # fmt: skip
# What is read as code, not as a value.
_STANDING = (types.FunctionType, property, classmethod, staticmethod, *ITSELF)
_MOST_VALUES = 2_000  # how many objects of classes and modules are entered
_DEPTH = 5  # how far an object that a class or a module holds is entered
_WHAT = "shared by all that use it"
# What a process has one of, and the name of what changes it.
_SWITCHES: dict[str, Callable[[], Any]] = {
    "environ": lambda: tuple(os.environb.items()),
    "putenv": lambda: tuple(os.environb.items()),
    "set_default_dtype": torch.get_default_dtype,
    "set_num_threads": torch.get_num_threads,
    "set_float32_matmul_precision": torch.get_float32_matmul_precision,
    "use_deterministic_algorithms": torch.are_deterministic_algorithms_enabled,
    "seterr": lambda: tuple(np.geterr().items()),
}


class Read(NamedTuple):
    """Names that were looked up in a namespace, and what stood there; None where nothing did."""

    namespace: Mapping[str, Any]
    values: dict[str, Any]
    size: int | None  # of a namespace that was read whole

    def still(self) -> bool:
        if self.size is not None and len(self.namespace) != self.size:
            return False
        return all(map(operator.is_, self.values.values(), map(self.namespace.get, self.values)))


@dataclass
class GoneThrough:
    """What a look has gone through, for the next one.

    Attributes:
        met: The classes and functions that it began with.
        classes: Of the objects that were met, and those that functions name.
        functions: That were met, and those that they name.
        plain: Functions that carry nothing along.
        owners: Classes, functions and what they share.
        absent: Globals that functions name and that are not there.
        unsettled: Values of classes and modules that may change in place.
    """

    met: tuple[set[type], list[types.FunctionType]] = (set(), [])
    classes: set[type] = field(default_factory=set)
    read_classes: set[type] = field(default_factory=set)
    functions: list[types.FunctionType] = field(default_factory=list)
    read_functions: int = 0
    followed: set[int] = field(default_factory=set)
    plain: list[types.FunctionType] = field(default_factory=list)
    closures: list[types.FunctionType] = field(default_factory=list)
    owners: set[Path] = field(default_factory=set)
    absent: set[Path] = field(default_factory=set)
    reads: dict[int, Read] = field(default_factory=dict)
    settled: dict[Path, Place] = field(default_factory=dict)
    unsettled: list[tuple[Path, Any]] = field(default_factory=list)
    switches: set[str] = field(default_factory=set)

    def still(self, classes: set[type], functions: list[types.FunctionType]) -> bool:
        """Whether a look that begins with these would find the same."""
        before, called = self.met
        return (
            before == classes
            and len(called) == len(functions)
            and all(map(operator.is_, called, functions))
            and all(read.still() for read in self.reads.values())
            and not any(function.__dict__ for function in self.plain)
        )


class Shared:
    """The part of a look that goes through classes and functions, from those that were met.

    While every name that was looked up leads to the same object, the next look goes through none of
    them again: only what may have changed in place is seen anew.

    Args:
        seen: What the look has seen so far.
        met: The classes and functions that it has met.
        entered: Functions whose cells were seen already.
    """

    def __init__(self, seen: Seen, met: GoneThrough, entered: set[int]) -> None:
        self.gone_through = met
        self.entered = entered
        self._seen = seen
        self._places = seen.places
        self._values: set[int] = set()

    @property
    def functions(self) -> list[types.FunctionType]:
        return self.gone_through.functions

    @property
    def classes(self) -> set[type]:
        return self.gone_through.classes

    @property
    def owners(self) -> set[Path]:
        return self.gone_through.owners

    def look(self, before: GoneThrough | None) -> GoneThrough:
        """At the classes and functions that were met, and those that they name."""
        met = (set(self.classes), list(self.functions))
        if before is not None and before.still(*met):
            self._take_over(before)
        self.gone_through.met = met
        while self._read_next():
            pass
        for name in self.gone_through.switches:
            at = (("module", "this process"), ("attr", name))
            self._places[at] = Place(_SWITCHES[name](), what=_WHAT)
        return self.gone_through

    def _take_over(self, before: GoneThrough) -> None:
        self.gone_through = dataclasses.replace(
            before,
            classes=set(before.classes),
            functions=list(before.functions),
            owners=set(before.owners),
            absent=set(before.absent),
            unsettled=[],
            closures=[],
        )
        self._places.update(before.settled)
        for path, value in before.unsettled:
            self._value(path, value)
        for function in before.closures:
            self._carried_along(function)

    def _read_next(self) -> bool:
        """Reads what was met since the last call; whether there was anything."""
        through = self.gone_through
        bases = {base for kind in self.classes for base in kind.__mro__} - through.read_classes
        if not bases and through.read_functions == len(self.functions):
            return False
        through.read_classes = through.read_classes | bases
        for kind in sorted(bases, key=lambda base: (base.__module__, base.__qualname__)):
            if not is_library(kind.__module__):
                self._class(kind)
                through.functions += wrapped_functions_of(kind)
        while through.read_functions < len(self.functions):
            through.read_functions += 1
            self._function(self.functions[through.read_functions - 1])
        return True

    def _class(self, kind: type) -> None:
        owner: Path = (("class", f"{kind.__module__}.{kind.__qualname__}"),)
        self.owners.add(owner)
        there = vars(kind)
        self.gone_through.reads[id(kind)] = Read(there, dict(there), len(there))
        for name, value in list(there.items()):
            if not name.startswith("__") and name not in NO_STATE:
                self._value((*owner, ("attr", name)), value)

    # -- functions --------------------------------------------------------------------------------

    def _function(self, function: types.FunctionType) -> None:
        """What a function keeps for all calls: attributes, defaults that can change, globals."""
        self._carried_along(function)
        names = names_in(function.__code__)
        there = function.__globals__
        for name, value in self._read(there, names).items():
            self._global(function.__module__, name, value, names)
        module = ("module", function.__module__)
        self.gone_through.absent |= {(module, ("attr", name)) for name in names - there.keys()}
        # Imported inside of the function.
        for name, value in self._read(sys.modules, names - there.keys()).items():
            self._global(function.__module__, name, value, names)
        self.gone_through.switches |= names & _SWITCHES.keys()

    def _read(self, namespace: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
        """Those of the names that are there."""
        read = self.gone_through.reads.setdefault(id(namespace), Read(namespace, {}, None))
        read.values.update(zip(names, map(namespace.get, names), strict=True))
        return {name: namespace[name] for name in names & namespace.keys()}

    def _carried_along(self, function: types.FunctionType) -> None:
        path: Path = (("function", f"{function.__module__}.{function.__qualname__}"),)
        self.owners.add(path)
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        changing = [(i, one) for i, one in enumerate(defaults) if not isinstance(one, SCALARS)]
        if not (changing or vars(function) or function.__closure__):
            self.gone_through.plain.append(function)
            return
        self.gone_through.closures.append(function)
        for place, value in changing:
            self._shared((*path, ("default", place)), value)
        for name, value in vars(function).items():
            if name != "__wrapped__":
                self._shared((*path, ("attr", name)), value)
        if id(function) not in self.entered and not is_library(function.__globals__["__name__"]):
            self.entered.add(id(function))
            for place, cell in enumerate(function.__closure__ or ()):
                with contextlib.suppress(ValueError):  # an empty cell
                    self._cell(path, place, cell)

    def _cell(self, path: Path, place: int, cell: Any) -> None:
        value = cell.cell_contents
        at = (*path, ("cell", place))
        numbered = ((*at, ("nth", number)) for number in itertools.count(1))
        if at in self._places:  # of another function of this name
            at = next(one for one in numbered if one not in self._places)
        if isinstance(value, types.FunctionType):
            self._follow(value)
        else:
            self._shared(at, value)

    def _follow(self, function: types.FunctionType) -> None:
        if not is_library(function.__module__) and id(function) not in self.gone_through.followed:
            self.gone_through.followed.add(id(function))
            self.functions.append(function)

    def _global(self, module: str, name: str, value: Any, names: frozenset[str]) -> None:
        if isinstance(value, types.ModuleType):
            if not is_library(value.__name__):
                for inner, found in self._read(vars(value), names).items():
                    self._global(value.__name__, inner, found, names - {name})
        elif isinstance(value, type):
            if not is_library(value.__module__):
                self.classes.add(value)
        elif isinstance(value, types.FunctionType):
            self._follow(value)
        if not isinstance(value, types.ModuleType):
            self._value((("module", module), ("attr", name)), value)

    # -- values -----------------------------------------------------------------------------------

    def _value(self, path: Path, value: Any) -> None:
        """Of a class or a module."""
        self._shared(path, value)
        if path not in self._places and not isinstance(value, IGNORED):
            # Seen elsewhere, or of a library, say: another one in its place would go unseen.
            self._places[path] = Place(("itself", id(value)), what=_WHAT)
            self._seen.alive.append(value)
        if not isinstance(value, _STANDING) and not is_settled(value):
            self.gone_through.unsettled.append((path, value))
        elif path in self._places:
            self.gone_through.settled[path] = self._places[path]

    def _shared(self, path: Path, value: Any) -> None:
        seen_before = path in self._places or id(value) in self._seen.first
        if seen_before or isinstance(value, (property, *ITSELF)):
            return
        if isinstance(value, types.FunctionType):
            self._follow(value)
            return
        try:
            packed = Packer().pack(value)
        except Unpackable as error:
            self._object(path, value, error.args[0])
            return
        self._places[path] = Place(mark(packed), what=_WHAT)
        if has_notes(value):
            self._parts(path, vars(value))

    def _object(self, path: Path, value: Any, unpackable: Any) -> None:
        if id(value) in self._values or len(path) >= _DEPTH or len(self._values) >= _MOST_VALUES:
            return
        self._values.add(id(value))
        self._seen.alive.append(value)
        if isinstance(value, contextvars.ContextVar):
            self._seen.put_pointer(path, value)
        elif is_hidden_iterator(value):
            self._seen.put_opaque(path, value, "an iterator", always=True)
        elif isinstance(value, list | tuple | dict | collections.deque):
            if isinstance(unpackable, str):
                self._seen.put_size(path, value, unpackable)
                return
            self._places[path] = Place(len(value), what=_WHAT)
            items = values_of(value) if isinstance(value, dict) else list(value)
            for place, item in enumerate(items[:_MOST_VALUES]):
                self._shared((*path, ("nth", place)), item)
        elif isinstance(value, set | frozenset):
            self._seen.put_members(path, value, _WHAT)
        elif isinstance(value, functools.partial):
            parts = {"func": value.func, "args": value.args, "keywords": value.keywords}
            self._parts(path, parts)
        elif isinstance(value, nn.Module):
            for name, tensor in (*value.named_parameters(), *value.named_buffers()):
                self._places[(*path, ("attr", name))] = Place(fingerprint(tensor), what=_WHAT)
        elif isinstance(value, ENTERED) or not is_library(type(value).__module__):
            self._attributes(path, value)
        else:
            wrapped = getattr(value, "__wrapped__", None)  # by functools.lru_cache, say
            if isinstance(wrapped, types.FunctionType):
                self._follow(wrapped)

    def _attributes(self, path: Path, value: Any) -> None:
        kind: Any = type(value)
        if not is_library(kind.__module__):
            self.classes.add(kind)
        self._parts(path, own_attributes(value))

    def _parts(self, path: Path, parts: Mapping[str, Any]) -> None:
        self.owners.add(path)
        for name, part in list(parts.items()):
            if not isinstance(part, ITSELF):
                self._shared((*path, ("attr", name)), part)
