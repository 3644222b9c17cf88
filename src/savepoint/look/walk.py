"""What a training changes beside its state_dicts, found by looking at its objects: saved where it
is plain, else named.

A `Look` walks from a few roots (the model, the callbacks, the data) over attributes, containers and
helper objects. Of each place it keeps a mark that is equal as long as nothing there has changed.
Two looks give the difference: what a checkpoint must hold, and what it cannot. Only differences are
saved, so that what a config overrides and a training never changes is taken from the config.

An attribute counts unless a base class of a framework assigns it: those names are read from the
classes' byte code.
"""

import collections
import contextlib
import contextvars
import datetime
import enum
import functools
import io
import logging
import os
import queue
import sys
import threading
import types
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric

from savepoint.look.classes import (
    NO_STATE,
    is_library,
    left_out_of,
    names_in,
    slots_of,
    stored_by,
    wrapped_functions_of,
)
from savepoint.look.pack import (
    Packer,
    Unpackable,
    fingerprint,
    has_notes,
    is_atom,
    is_generator,
    is_raw,
    keys_of,
    mark,
    pack,
    values_of,
)
from savepoint.look.places import Path, Place, memory_of, packed_path, path_below, storage_of

_SMALL_VALUES = 1_000  # of what the first look keeps a copy
_SMALL_BYTES = 64 * 1024
_SHARED_VALUES = 2_000  # how many objects of classes and modules are entered
_SHARED_DEPTH = 5  # how far an object that a class or a module holds is entered
_THIRD_PARTY_VALUES = 500  # how far an object of a library is entered
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_IGNORED = (
    weakref.ProxyType, weakref.CallableProxyType, logging.Logger, threading.Thread,
    type(threading.Lock()), type(threading.RLock()), threading.Event, threading.Condition,
)  # fmt: skip
_ITSELF = (type, types.ModuleType, types.BuiltinFunctionType, types.MethodWrapperType)
_SEQUENCES = (list, tuple, collections.deque)
_SCALARS = (type(None), bool, int, float, complex, str, bytes)
_VALUES = (int, float, complex, str, bytes, datetime.date, datetime.time, datetime.timedelta)
_ENTERED = (types.SimpleNamespace, collections.UserDict, collections.UserList, collections.ChainMap,
            weakref.WeakKeyDictionary, weakref.WeakValueDictionary, threading.local)  # fmt: skip
# What a process has one of, and the name of what changes it.
_SWITCHES: dict[str, Callable[[], Any]] = {
    "environ": lambda: tuple(sorted(os.environ.items())),
    "putenv": lambda: tuple(sorted(os.environ.items())),
    "set_default_dtype": torch.get_default_dtype,
    "set_num_threads": torch.get_num_threads,
    "set_float32_matmul_precision": torch.get_float32_matmul_precision,
    "use_deterministic_algorithms": torch.are_deterministic_algorithms_enabled,
    "seterr": lambda: tuple(np.geterr().items()),
}
_TRUE, _FALSE = (Place(("bool", value), value, small=True) for value in (True, False))


class Look:
    """One walk over everything that is reachable from the roots.

    Args:
        roots: Name and object, in an order that stays: the first path to an object names it.
        known: What is never entered, such as the Trainer and its optimizers: id and a name.
        persisted: Names in the model's state_dict: those weights are saved by Lightning.
        noted: Objects of a framework that are not entered: of these, only what the user's own code
            has written on them.
    """

    def __init__(
        self,
        roots: Mapping[str, Any],
        known: Mapping[int, str],
        persisted: Iterable[str],
        noted: Mapping[str, Any] = types.MappingProxyType({}),
    ) -> None:
        self.roots = {**roots, **noted}
        self._known = known
        self._persisted = frozenset(persisted)
        self.places: dict[Path, Place] = {}
        self.objects: dict[Path, type] = {}
        self.visited: set[Path] = set()
        self.owners: set[Path] = set()  # classes, functions and what they share
        self.dicts: set[Path] = set()  # that are seen key by key
        self._first: dict[int, Path] = {}
        self._alive: list[Any] = []  # so that no id is given to a second object while marks hold it
        self._library_values = 0
        self._classes: set[type] = set()
        self._codes: list[types.FunctionType] = []
        self._followed: set[int] = set()
        self._memory: dict[int, Path] = {}
        self._inner: dict[int, Path] = {}  # containers inside of others, which are packed whole
        self._entered: set[int] = set()  # functions whose cells belong to a root
        self._shared_values: set[int] = set()
        self._registered: set[int] = set()
        for name, root in roots.items():
            if isinstance(root, nn.Module):
                self._register((("root", name),), root)
                self._registered |= set(map(id, root.modules()))
        self.weights = self._weight_storages()
        for name, root in roots.items():
            self._root((("root", name),), root)
        self._look_at_classes()
        for name, holder in noted.items():
            self._notes((("root", name),), holder)

    def _notes(self, path: Path, holder: Any) -> None:
        kind: Any = type(holder)
        left_out = left_out_of(kind)
        notes = [name for name in vars(holder) if name not in left_out and name[0] != "_"]
        if notes:
            for name in self._written.intersection(notes):
                self._visit((*path, ("attr", name)), vars(holder)[name])

    @cached_property
    def _written(self) -> frozenset[str]:
        """The names of attributes that the user's own code writes."""
        return frozenset().union(*(stored_by(one.__code__) for one in self._codes))

    def marks_below(self, value: Any) -> dict[Path, Any]:
        """The marks of everything that `value` holds."""
        top = self._first.get(id(value))
        if top is None:
            return {}
        length = len(top)
        return {path: place.mark for path, place in self.places.items() if path[:length] == top}

    def mentioned_below(self, value: Any, name: str) -> bool:
        """Whether a class of the user's own, of an object that `value` holds, mentions a name."""
        top = self._first.get(id(value), ())
        kinds = {kind for path, kind in self.objects.items() if path[: len(top)] == top}
        bases: set[Any] = {base for kind in kinds for base in kind.__mro__}
        return any(
            name in names_in(function.__code__)
            for base in bases
            if not is_library(base.__module__)
            for function in wrapped_functions_of(base)
        )

    def path_to(self, value: Any) -> Path | None:
        return self._first.get(id(value))

    def mentions(self, names: Collection[str], but_in: Collection[str]) -> bool:
        """Whether the user's own code mentions one of these names, in other functions than those
        left out.
        """
        return any(
            not names_in(one.__code__).isdisjoint(names)
            for one in self._codes
            if one.__name__ not in but_in
        )

    def _weight_storages(self) -> set[int | None]:
        """The memory of the weights that Lightning restores: an attribute may be a view of it."""
        modules = [root for root in self.roots.values() if isinstance(root, nn.Module)]
        tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        return {storage_of(t) for t in tensors if not is_lazy(t)} - {None}

    def weight_marks(self) -> set[Any]:
        modules = [root for root in self.roots.values() if isinstance(root, nn.Module)]
        weights = [t for module in modules for t in module.parameters() if not is_lazy(t)]
        return {mark(weight.detach()) for weight in weights}

    # -- modules ----------------------------------------------------------------------------------

    def _register(self, path: Path, module: nn.Module) -> None:
        """The places of a registered module and its weights, before any attribute that also holds
        them.
        """
        if id(module) in self._first:
            return
        self._first[id(module)] = path
        for name, parameter in module._parameters.items():
            if parameter is not None:
                self._first.setdefault(id(parameter), (*path, ("parameter", name)))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                self._first.setdefault(id(buffer), (*path, ("buffer", name)))
        for name, child in module._modules.items():
            if child is not None:
                self._register(path_below(path, name), child)

    def _root(self, path: Path, root: Any) -> None:
        if isinstance(root, nn.Module):
            self._module(path, root, prefix="", persisted=self._persisted)
        elif isinstance(root, Optimizer):  # what its state_dict holds, Lightning saves
            self._first[id(root)] = path
            self._object(path, root)
        elif id(root) not in self._first:
            self._visit(path, root)

    def _module(
        self, path: Path, module: nn.Module, prefix: str, persisted: frozenset[str]
    ) -> None:
        """A module, its weights as far as they are in no state_dict, and its sub-modules."""
        self.objects[path] = type(module)
        self._alive.append(module)
        compiled = "_orig_mod" in module._modules
        if not compiled:
            self._put((*path, ("attr", "training")), module.training)
            self._hooks(path, module)
            for name, parameter in module._parameters.items():
                self._weight((*path, ("parameter", name)), parameter, prefix + name in persisted)
            for name, buffer in module._buffers.items():
                self._weight((*path, ("buffer", name)), buffer, prefix + name in persisted)
            self._attributes(path, module, _made_of_weights(module))
        for name, child in module._modules.items():
            if child is None:
                continue
            at = path_below(path, name)
            if self._first.get(id(child), at) == at:
                self._first[id(child)] = at
                self._module(at, child, f"{prefix}{name}.", persisted)

    def _hooks(self, path: Path, module: nn.Module) -> None:
        """How many there are, and what they carry along: nothing else may hold it."""
        hooks: list[tuple[Any, ...]] = []
        for name in _HOOKS:
            functions = module.__dict__.get(name)
            if functions:
                hooks.append((("attr", name), functions))
        for name, parameter in module._parameters.items():
            for kind in _TENSOR_HOOKS if parameter is not None and parameter.is_leaf else ():
                functions = getattr(parameter, kind)
                if functions:
                    hooks.append((("parameter", name), ("attr", kind), functions))
        number = 0
        for *steps, functions in hooks:
            for place, function in enumerate(functions.values()):
                number += 1
                self._visit((*path, *steps, ("nth", place)), function)
        self.places[(*path, ("hooks", ""))] = Place(number, what="other hooks than at the start")

    def _weight(self, path: Path, tensor: Tensor | None, persisted: bool) -> None:
        if tensor is None:
            return
        if path[-1][0] == "parameter":
            self._put((*path[:-1], ("requires_grad", path[-1][1])), tensor.requires_grad)
        if tensor.__dict__:
            self._attributes_of(path, tensor, tensor.__dict__)
        if not persisted and not is_lazy(tensor):
            self._first.setdefault(id(tensor), path)
            self._packed(path, tensor.detach())

    # -- everything else --------------------------------------------------------------------------

    def _visit(self, path: Path, value: Any) -> None:
        self.visited.add(path)
        if type(value) in _SCALARS or isinstance(value, enum.Enum):
            self._put(path, value)
            return
        if isinstance(value, _IGNORED):
            return
        if isinstance(value, weakref.ReferenceType | contextvars.ContextVar):
            self._pointer(path, value)
            return
        first = self._first.get(id(value))
        if first is not None and first != path:
            packed = {"!": "same", "of": packed_path(first)}
            self.places[path] = Place(("same", first), packed, small=True)
            return
        self._alive.append(value)
        if id(value) in self._known:
            self.places[path] = Place(self._known[id(value)], what=self._known[id(value)])
            return
        if not isinstance(value, _ITSELF):
            self._first[id(value)] = path
        if storage_of(value) in self.weights:
            self.places[path] = Place(("view", tuple(value.shape)), what="a view of a weight")
        elif (
            isinstance(value, Tensor | np.ndarray | np.generic)
            or is_generator(value)
            or is_atom(value)
            or is_raw(value)
        ):
            self._packed(path, value)
            if has_notes(value):
                self._attributes_of(path, value, vars(value))
        elif isinstance(value, _VALUES):
            self.places[path] = Place((type(value), str(value)), what=f"a {type(value).__name__}")
        elif isinstance(value, list | tuple | collections.deque | set | frozenset | dict):
            self._container(path, value)
        elif isinstance(value, nn.Module):
            self._register(path, value)
            self._module(path, value, "", frozenset())
        elif isinstance(value, Optimizer | LRScheduler):
            self.objects[path] = type(value)  # one that a training has made, no start makes
            self._packed((*path, ("state", "")), value.state_dict())
        elif isinstance(value, types.FunctionType | types.MethodType | functools.partial):
            self._function(path, value)
        elif isinstance(value, _ITSELF):
            self._opaque(path, value, "another object than at the start")
        elif isinstance(value, io.IOBase):
            self._file(path, value)
        elif isinstance(value, queue.SimpleQueue):
            self._opaque(path, value, "a queue", always=bool(value.qsize()))
        elif _is_hidden_iterator(value):
            # How far it has come cannot be seen, and asking it would move it.
            self._opaque(path, value, f"an iterator ({type(value).__name__})", always=True)
        elif isinstance(value, memoryview):
            self._visit((*path, ("attr", "obj")), value.obj)
        else:
            self._object(path, value)

    def _pointer(self, path: Path, value: Any) -> None:
        """What it leads to, which it does not hold."""
        if isinstance(value, contextvars.ContextVar):
            target = value.get(None)
            what = "a context variable"
        else:
            target = value()
            what = "a weak reference"
        seen = id(target)
        with contextlib.suppress(Unpackable):
            if isinstance(target, _SCALARS):
                seen = mark(pack(target))
        self.places[path] = Place((what, seen), what=what)

    def _put(self, path: Path, value: Any) -> None:
        if value is True or value is False:
            self.places[path] = _TRUE if value else _FALSE
            return
        packed = value if value is None or type(value) is str else pack(value)
        self.places[path] = Place(mark(packed), packed, small=True)

    def _packed(self, path: Path, value: Any) -> None:
        packer = Packer()
        try:
            packed = packer.pack(value)
        except Unpackable as error:
            self._opaque(path, value, _words(error.args[0]))
            return
        self._holds(path, packer, packed, self._shares(path, value))

    def _holds(self, path: Path, packer: Packer, packed: Any, shares: Path | None) -> None:
        self.places[path] = Place(
            mark(packed),
            packed,
            small=packer.values <= _SMALL_VALUES and packer.bytes <= _SMALL_BYTES,
            shares=shares,
            needs_live=packer.needs_live,
        )

    def _shares(self, path: Path, value: Any) -> Path | None:
        memory = memory_of(value)
        first = path if memory is None else self._memory.setdefault(memory, path)
        return None if first == path else first

    def _shares_inside(self, path: Path, value: Any, inner: Iterable[int]) -> Path | None:
        """Another place that holds this container too, or one that is inside: put back, they would
        be two.
        """
        shares = self._inner.get(id(value))
        firsts = self._first
        inners = self._inner
        for one in inner:
            first = firsts.get(one) or inners.setdefault(one, path)
            if first is not path and shares is None:
                shares = first
        return shares

    def _opaque(self, path: Path, value: Any, what: str, always: bool = False) -> None:
        self.places[path] = Place(object() if always else id(value), what=what)

    def _container(self, path: Path, value: Any) -> None:
        packer = Packer()
        try:
            packed = packer.pack(value)
        except Unpackable as error:
            if isinstance(error.args[0], str):
                self._opaque_size(path, value, error.args[0])
            else:
                self._items(path, value)
        else:
            self._holds(path, packer, packed, self._shares_inside(path, value, packer.inner))
            if isinstance(value, dict) and any(key in self._first for key in _first_number(value)):
                self.places[path].what = "a dict that goes by the addresses of objects"
        if hasattr(value, "__dict__"):
            self._attributes_of(path, value, vars(value))

    def _opaque_size(self, path: Path, value: Any, what: str) -> None:
        """Too much to compare: its length and a sample of its values."""
        items = list(value)
        if isinstance(value, dict):
            items = list(zip(keys_of(value), values_of(value), strict=True))
        sample = items[:: max(1, len(items) // 500)]
        try:
            seen = mark(Packer().pack(sample))
        except Unpackable:
            seen = id(value)
        self.places[path] = Place((len(items), seen), what=what)

    def _items(self, path: Path, value: Any) -> None:
        """Item by item, where objects stand among the values."""
        if isinstance(value, set | frozenset):
            self.places[path] = Place((id(value), len(value)), what="a set of objects")
            return
        if isinstance(value, dict):
            self.dicts.add(path)
            keys = keys_of(value)
            plain = [type(key) in (str, int, bool, float, type(None)) for key in keys]
            for place, item in enumerate(values_of(value)):
                step = ("item", keys[place]) if plain[place] else ("nth", place)
                self._visit((*path, step), item)
            if not all(plain):
                self._alive += keys
                others = tuple([id(key) for key in keys if type(key) is not weakref.ref])
                seen = (len(keys), others)
                self.places[path] = Place(seen, what="a dict with objects as its keys")
            return
        self.places[path] = Place(
            (type(value).__name__, len(value)), what=f"a {type(value).__name__} of objects"
        )
        for place, item in enumerate(value):
            self._visit((*path, ("item", place)), item)

    def _function(self, path: Path, value: Any) -> None:
        """A function is itself; what it carries along (closure, bound object, arguments) may
        change.
        """
        if isinstance(value, types.MethodType):
            self.places[path] = Place(id(value.__func__), what="another function than at the start")
            # A bound method is made anew each time it is asked for.
            self._first.pop(id(value), None)
            self._visit((*path, ("attr", "__self__")), value.__self__)
            return
        self._opaque(path, value, "another function than at the start")
        self._entered.add(id(value))
        if isinstance(value, functools.partial):
            self._visit((*path, ("attr", "func")), value.func)
            self._visit((*path, ("attr", "args")), value.args)
            self._visit((*path, ("attr", "keywords")), value.keywords)
            return
        if is_library(value.__module__):
            return
        self._codes.append(value)
        for place, cell in enumerate(value.__closure__ or ()):
            with contextlib.suppress(ValueError):  # an empty cell
                self._visit((*path, ("cell", place)), cell.cell_contents)

    def _file(self, path: Path, value: Any) -> None:
        try:
            where: Any = value.tell()
        except (OSError, ValueError):
            where = None
        self.places[path] = Place((id(value), where), what="a file handle")

    def _object(self, path: Path, value: Any) -> None:
        self.objects[path] = type(value)
        library = is_library(type(value).__module__) and not isinstance(value, _ENTERED)
        if library:
            if self._library_values > _THIRD_PARTY_VALUES:
                return
            self._library_values += 1
        self._attributes(path, value)
        if library:
            self._forgive(path)

    def _forgive(self, path: Path) -> None:
        """A library's own unsavable parts (windows, sockets, caches) do not make a training
        inexact.
        """
        for at in [at for at in self.places if at[: len(path)] == path]:
            place = self.places[at]
            if place.what and "iterator" not in place.what:
                del self.places[at]
        # One that a training has made, no start makes.
        holds = any(at[: len(path)] == path for at in self.places)
        for at in [
            at for at in self.objects if at[: len(path)] == path and not (holds and at == path)
        ]:
            del self.objects[at]

    def _attributes(self, path: Path, value: Any, derived: frozenset[str] = frozenset()) -> None:
        kind: Any = type(value)
        self._classes.add(kind)
        own = dict(getattr(value, "__dict__", {}))
        for name in slots_of(kind):
            with contextlib.suppress(AttributeError):
                own[name] = getattr(value, name)
        for name in derived:
            own.pop(name, None)
        self._attributes_of(path, value, own)

    def _attributes_of(self, path: Path, value: Any, own: Mapping[str, Any]) -> None:
        kind: Any = type(value)
        left_out = left_out_of(kind)
        if isinstance(value, Metric):
            if id(value) in self._registered:  # its states are always saved, whatever they are
                left_out = left_out.union(value._defaults)
            else:
                self._visit((*path, ("attr", "_update_count")), value._update_count)
        for name in list(own):
            if name not in left_out:
                self._visit((*path, ("attr", name)), own[name])
        if own.get("_hparams"):  # assigned by Lightning, and the user's own
            self._visit((*path, ("attr", "_hparams")), own["_hparams"])

    # -- classes and modules, seen but never put back ---------------------------------------------

    def _look_at_classes(self) -> None:
        """Of those that were met, and of those that their functions name."""
        seen: set[type] = set()
        done = 0
        while True:
            bases = {base for kind in self._classes for base in kind.__mro__} - seen
            if not bases and done == len(self._codes):
                return
            seen |= bases
            for kind in sorted(bases, key=lambda base: (base.__module__, base.__qualname__)):
                if not is_library(kind.__module__):
                    self._class(kind)
                    self._codes += wrapped_functions_of(kind)
            while done < len(self._codes):
                done += 1
                self._shared_by(self._codes[done - 1])

    def _class(self, kind: type) -> None:
        self.owners.add((("class", f"{kind.__module__}.{kind.__qualname__}"),))
        for name, value in list(vars(kind).items()):
            if name.startswith("__") or name in NO_STATE:
                continue
            self._shared(
                (("class", f"{kind.__module__}.{kind.__qualname__}"), ("attr", name)), value
            )

    def _shared_by(self, function: types.FunctionType) -> None:
        """What a function keeps for all calls: attributes, defaults that can change, globals."""
        path = (("function", f"{function.__module__}.{function.__qualname__}"),)
        self.owners.add(path)
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        for place, value in enumerate(defaults):
            if not isinstance(value, _SCALARS):
                self._shared((*path, ("default", place)), value)
        for name, value in vars(function).items():
            if name != "__wrapped__":
                self._shared((*path, ("attr", name)), value)
        if id(function) not in self._entered and not is_library(function.__globals__["__name__"]):
            self._entered.add(id(function))
            for place, cell in enumerate(function.__closure__ or ()):
                with contextlib.suppress(ValueError):  # an empty cell
                    self._cell(path, place, cell)
        names = names_in(function.__code__)
        for name in names:
            if name in function.__globals__:
                self._global(function.__module__, name, function.__globals__[name], names)
            elif name in sys.modules:  # imported inside of the function
                self._global(function.__module__, name, sys.modules[name], names)
            if name in _SWITCHES:
                at = (("module", "this process"), ("attr", name))
                self.places[at] = Place(_SWITCHES[name](), what="shared by all that use it")

    def _cell(self, path: Path, place: int, cell: Any) -> None:
        value = cell.cell_contents
        at = (*path, ("cell", place))
        if at in self.places:  # of another function of this name
            at = (*at, ("nth", len(self._entered)))
        if isinstance(value, types.FunctionType):
            self._follow(value)
        else:
            self._shared(at, value)

    def _follow(self, function: types.FunctionType) -> None:
        if not is_library(function.__module__) and id(function) not in self._followed:
            self._followed.add(id(function))
            self._codes.append(function)

    def _global(self, module: str, name: str, value: Any, names: frozenset[str]) -> None:
        if isinstance(value, types.ModuleType):
            if not is_library(value.__name__):
                for inner in [inner for inner in names if inner in vars(value)]:
                    self._global(value.__name__, inner, vars(value)[inner], names - {name})
        elif isinstance(value, type):
            if not is_library(value.__module__):
                self._classes.add(value)
        elif isinstance(value, types.FunctionType):
            self._follow(value)
        elif not isinstance(value, _ITSELF):
            self._shared((("module", module), ("attr", name)), value)

    def _shared(self, path: Path, value: Any) -> None:
        """Of a class or a module: others may share it, so a change is named, and nobody's else is
        put back.
        """
        if path in self.places or isinstance(value, property) or id(value) in self._first:
            return
        if isinstance(value, types.FunctionType):
            self._follow(value)
            return
        try:
            packed = Packer().pack(value)
        except Unpackable as error:
            self._shared_object(path, value, error.args[0])
            return
        self.places[path] = Place(mark(packed), what="shared by all that use it")
        if has_notes(value):
            self._shared_parts(path, vars(value))

    def _shared_object(self, path: Path, value: Any, unpackable: Any) -> None:
        if id(value) in self._shared_values or len(path) >= _SHARED_DEPTH:
            return
        if len(self._shared_values) >= _SHARED_VALUES:
            return
        self._shared_values.add(id(value))
        self._alive.append(value)
        if isinstance(value, contextvars.ContextVar):
            self._pointer(path, value)
        elif _is_hidden_iterator(value):
            self._opaque(path, value, "an iterator", always=True)
        elif isinstance(value, list | tuple | dict | collections.deque):
            if isinstance(unpackable, str):
                self._opaque_size(path, value, unpackable)
                return
            self.places[path] = Place(len(value), what="shared by all that use it")
            items = values_of(value) if isinstance(value, dict) else list(value)
            for place, item in enumerate(items[:_SHARED_VALUES]):
                self._shared((*path, ("nth", place)), item)
        elif isinstance(value, functools.partial):
            parts = {"func": value.func, "args": value.args, "keywords": value.keywords}
            self._shared_parts(path, parts)
        elif isinstance(value, nn.Module):
            for name, tensor in (*value.named_parameters(), *value.named_buffers()):
                seen = fingerprint(tensor)
                self.places[(*path, ("attr", name))] = Place(seen, what="shared by all that use it")
        elif isinstance(value, _ENTERED) or not is_library(type(value).__module__):
            kind: Any = type(value)
            if not is_library(kind.__module__):
                self._classes.add(kind)
            own = dict(getattr(value, "__dict__", {}))
            for name in slots_of(kind):
                with contextlib.suppress(AttributeError):
                    own[name] = getattr(value, name)
            self._shared_parts(path, own)
        else:
            wrapped = getattr(value, "__wrapped__", None)  # by functools.lru_cache, say
            if isinstance(wrapped, types.FunctionType):
                self._follow(wrapped)

    def _shared_parts(self, path: Path, parts: Mapping[str, Any]) -> None:
        self.owners.add(path)
        for name, part in list(parts.items()):
            if not isinstance(part, _ITSELF):
                self._shared((*path, ("attr", name)), part)


def _first_number(value: dict[Any, Any]) -> list[int]:
    return [key for key in keys_of(value)[:1] if type(key) is int]


def _is_hidden_iterator(value: Any) -> bool:
    """One whose place is no attribute, as that of an object of the user's own may be."""
    kind = type(value)
    if not hasattr(kind, "__next__"):
        return False
    return any(is_library(base.__module__) for base in kind.__mro__ if hasattr(base, "__next__"))


def _made_of_weights(module: nn.Module) -> frozenset[str]:
    """What the hooks of `spectral_norm`, `weight_norm` and `prune` set anew from parameters, before
    each forward.
    """
    names = module._parameters
    if not any(name.endswith(("_orig", "_g")) for name in names.keys()):  # noqa: SIM118
        return frozenset()
    derived = {name.removesuffix("_orig") for name in names if name.endswith("_orig")}
    derived |= {name.removesuffix("_g") for name in names if name.endswith("_g")}
    return frozenset(derived)


def _words(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, io.IOBase):
        return "a file handle"
    kind = type(value)
    return (
        f"a {kind.__name__}"
        if kind.__module__ == "builtins"
        else f"a {kind.__module__}.{kind.__name__}"
    )
