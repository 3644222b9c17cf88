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
import dis
import enum
import functools
import inspect
import io
import itertools
import logging
import os
import sys
import sysconfig
import threading
import types
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from torchmetrics import Metric, MetricCollection

from savepoint.checkpoint.pack import Packer, Unpackable, is_atom, is_generator, mark, pack, unpack

# How to go on from an object: ("attr", name), ("item", key), ("nth", place), ("cell", place),
# ("module", name), ("buffer", name), ("parameter", name), ("requires_grad", name), ("state", "").
Step = tuple[str, Any]
Path = tuple[Step, ...]

_SMALL_VALUES, _SMALL_BYTES = 1_000, 64 * 1024  # of what the first look keeps a copy
_SHARED_DEPTH = 5  # how far an object that a class or a module holds is entered
_THIRD_PARTY_VALUES = 500  # how far an object of a library is entered

# What these assign is saved by other means, or is no state.
_FRAMEWORK = ("lightning.", "lightning_fabric.", "pytorch_lightning.", "savepoint.")
_FRAMEWORK_CLASSES = (nn.Module, Metric, Optimizer, DataLoader, object)
_OPEN = "lightning.pytorch.callbacks."  # its concrete classes keep state that no state_dict has
_CALLBACK = "lightning.pytorch.callbacks.callback"

# Caches, and what metric states bring along by themselves. Of these classes only: a user's own
# `_cache` is state.
_NO_STATE = frozenset({"__orig_class__", "savepoint_skip"})
_NO_STATE_OF: tuple[tuple[Any, frozenset[str]], ...] = (
    (nn.Module, frozenset({"_orig_mod", "training", "_compiled_call_impl", "_flat_weight_refs", "_flat_weights"})),
    (Metric, frozenset({"_update_called", "_computed", "_update_signature", "update", "compute"})),
    (MetricCollection, frozenset({
        "_groups", "_groups_checked", "_state_is_copy", "_compute_groups_create_state_ref",
    })),
)  # fmt: skip
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_IGNORED = (
    weakref.ReferenceType, weakref.ProxyType, weakref.CallableProxyType, logging.Logger, threading.Thread,
    type(threading.Lock()), type(threading.RLock()), threading.local, threading.Event, threading.Condition,
)  # fmt: skip
_ITSELF = (type, types.ModuleType, types.BuiltinFunctionType, types.MethodWrapperType)
_SEQUENCES = (list, tuple, collections.deque)
_SCALARS = (type(None), bool, int, float, complex, str, bytes)


@dataclass(slots=True)
class _Place:
    """What stands at a path.

    Attributes:
        mark: Equal to that of an earlier look if nothing has changed.
        packed: What a checkpoint would hold; meaningless where `what` is given.
        what: Words for a value that no checkpoint can hold, else "".
        small: Whether the first look keeps a copy.
        shares: The place that was seen first of those that hold this very memory, as a view and its
            base do.
    """

    mark: Any
    packed: Any = None
    what: str = ""
    small: bool = False
    shares: Path | None = None

    @property
    def is_alias(self) -> bool:
        return isinstance(self.mark, tuple) and self.mark[:1] in (("same",), ("view",))


_TRUE, _FALSE = (_Place(("bool", value), value, small=True) for value in (True, False))


class Look:
    """One walk over everything that is reachable from the roots.

    Args:
        roots: Name and object, in an order that stays: the first path to an object names it.
        known: What is never entered, such as the Trainer and its optimizers: id and a name.
        persisted: Names in the model's state_dict: those weights are saved by Lightning.
    """

    def __init__(
        self, roots: Mapping[str, Any], known: Mapping[int, str], persisted: Iterable[str]
    ) -> None:
        self.roots, self._known, self._persisted = roots, known, frozenset(persisted)
        self.places: dict[Path, _Place] = {}
        self.objects: dict[Path, type] = {}
        self.visited: set[Path] = set()
        self._first: dict[int, Path] = {}
        self._alive: list[Any] = []  # so that no id is given to a second object while marks hold it
        self._library_values = 0
        self._classes: set[type] = set()
        self._codes: list[types.FunctionType] = []
        self._followed: set[int] = set()
        self._memory: dict[int, Path] = {}
        self._registered: set[int] = set()
        for name, root in roots.items():
            if isinstance(root, nn.Module):
                self._register((("root", name),), root)
                self._registered |= set(map(id, root.modules()))
        self.weights = self._weight_storages()
        for name, root in roots.items():
            self._root((("root", name),), root)
        self._look_at_classes()

    def marks_below(self, value: Any) -> dict[Path, Any]:
        """The marks of everything that `value` holds."""
        top = self._first.get(id(value))
        if top is None:
            return {}
        length = len(top)
        return {path: place.mark for path, place in self.places.items() if path[:length] == top}

    def mentions(self, names: Collection[str], but_in: Collection[str]) -> bool:
        """Whether the user's own code mentions one of these names, in other functions than those
        left out.
        """
        return any(
            not _names(one.__code__).isdisjoint(names)
            for one in self._codes
            if one.__name__ not in but_in
        )

    def _weight_storages(self) -> set[int | None]:
        """The memory of the weights that Lightning restores: an attribute may be a view of it."""
        modules = [root for root in self.roots.values() if isinstance(root, nn.Module)]
        tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        return {_storage(t) for t in tensors if not is_lazy(t)} - {None}

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
                self._register(_below(path, name), child)

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
            at = _below(path, name)
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
        self.places[(*path, ("hooks", ""))] = _Place(number, what="other hooks than at the start")

    def _weight(self, path: Path, tensor: Tensor | None, persisted: bool) -> None:
        if tensor is None:
            return
        if path[-1][0] == "parameter":
            self._put((*path[:-1], ("requires_grad", path[-1][1])), tensor.requires_grad)
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
        first = self._first.get(id(value))
        if first is not None and first != path:
            packed = {"!": "same", "of": packed_path(first)}
            self.places[path] = _Place(("same", first), packed, small=True)
            return
        self._alive.append(value)
        if id(value) in self._known:
            self.places[path] = _Place(self._known[id(value)], what=self._known[id(value)])
            return
        if not isinstance(value, _ITSELF):
            self._first[id(value)] = path
        if _storage(value) in self.weights:
            self.places[path] = _Place(("view", tuple(value.shape)), what="a view of a weight")
        elif (
            isinstance(value, Tensor | np.ndarray | np.generic)
            or is_generator(value)
            or is_atom(value)
        ):
            self._packed(path, value)
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
        elif hasattr(type(value), "__next__"):
            # How far it has come cannot be seen, and asking it would move it.
            self._opaque(path, value, f"an iterator ({type(value).__name__})", always=True)
        else:
            self._object(path, value)

    def _put(self, path: Path, value: Any) -> None:
        if value is True or value is False:
            self.places[path] = _TRUE if value else _FALSE
            return
        packed = value if value is None or type(value) is str else pack(value)
        self.places[path] = _Place(mark(packed), packed, small=True)

    def _packed(self, path: Path, value: Any) -> None:
        packer = Packer()
        try:
            packed = packer.pack(value)
        except Unpackable as error:
            self._opaque(path, value, _words(error.args[0]))
            return
        small = packer.values <= _SMALL_VALUES and packer.bytes <= _SMALL_BYTES
        self.places[path] = _Place(
            mark(packed), packed, small=small, shares=self._shares(path, value)
        )

    def _shares(self, path: Path, value: Any) -> Path | None:
        memory = _memory(value)
        first = path if memory is None else self._memory.setdefault(memory, path)
        return None if first == path else first

    def _opaque(self, path: Path, value: Any, what: str, always: bool = False) -> None:
        self.places[path] = _Place(object() if always else id(value), what=what)

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
            small = packer.values <= _SMALL_VALUES and packer.bytes <= _SMALL_BYTES
            self.places[path] = _Place(mark(packed), packed, small=small)
        if hasattr(value, "__dict__"):
            self._attributes_of(path, value, vars(value))

    def _opaque_size(self, path: Path, value: Any, what: str) -> None:
        """Too much to compare: its length and a sample of its values."""
        items = list(value.items()) if isinstance(value, dict) else list(value)
        sample = items[:: max(1, len(items) // 500)]
        try:
            seen = mark(Packer().pack(sample))
        except Unpackable:
            seen = id(value)
        self.places[path] = _Place((len(items), seen), what=what)

    def _items(self, path: Path, value: Any) -> None:
        """Item by item, where objects stand among the values."""
        if isinstance(value, set | frozenset):
            self.places[path] = _Place((id(value), len(value)), what="a set of objects")
            return
        if isinstance(value, dict):
            for place, (key, item) in enumerate(list(value.items())):
                plain = type(key) in (str, int, bool, float, type(None))
                self._visit((*path, ("item", key) if plain else ("nth", place)), item)
            return
        self.places[path] = _Place(
            (type(value).__name__, len(value)), what=f"a {type(value).__name__} of objects"
        )
        for place, item in enumerate(value):
            self._visit((*path, ("item", place)), item)

    def _function(self, path: Path, value: Any) -> None:
        """A function is itself; what it carries along (closure, bound object, arguments) may
        change.
        """
        if isinstance(value, types.MethodType):
            self.places[path] = _Place(
                id(value.__func__), what="another function than at the start"
            )
            # A bound method is made anew each time it is asked for.
            self._first.pop(id(value), None)
            self._visit((*path, ("attr", "__self__")), value.__self__)
            return
        self._opaque(path, value, "another function than at the start")
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
        self.places[path] = _Place((id(value), where), what="a file handle")

    def _object(self, path: Path, value: Any) -> None:
        self.objects[path] = type(value)
        library = is_library(type(value).__module__)
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
        for name in _slots(kind):
            with contextlib.suppress(AttributeError):
                own[name] = getattr(value, name)
        for name in derived:
            own.pop(name, None)
        self._attributes_of(path, value, own)

    def _attributes_of(self, path: Path, value: Any, own: Mapping[str, Any]) -> None:
        kind: Any = type(value)
        left_out = _left_out(kind)
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
        bases = {base for kind in self._classes for base in kind.__mro__}
        for kind in sorted(bases, key=lambda base: (base.__module__, base.__qualname__)):
            if not is_library(kind.__module__):
                self._class(kind)
                self._codes += _functions(kind)
        for function in self._codes:  # grows: functions that they call
            self._shared_by(function)

    def _class(self, kind: type) -> None:
        for name, value in list(vars(kind).items()):
            if name.startswith("__") or name in _NO_STATE:
                continue
            self._shared(
                (("class", f"{kind.__module__}.{kind.__qualname__}"), ("attr", name)), value
            )

    def _shared_by(self, function: types.FunctionType) -> None:
        """What a function keeps for all calls: attributes, defaults that can change, globals."""
        path = (("function", f"{function.__module__}.{function.__qualname__}"),)
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        for place, value in enumerate(defaults):
            if not isinstance(value, _SCALARS):
                self._shared((*path, ("default", place)), value)
        for name, value in vars(function).items():
            if name != "__wrapped__":
                self._shared((*path, ("attr", name)), value)
        names = _names(function.__code__)
        for name in names:
            if name in function.__globals__:
                self._global(function.__module__, name, function.__globals__[name], names)

    def _global(self, module: str, name: str, value: Any, names: frozenset[str]) -> None:
        if isinstance(value, types.ModuleType):
            if not is_library(value.__name__):
                for inner in [inner for inner in names if inner in vars(value)]:
                    self._global(value.__name__, inner, vars(value)[inner], frozenset())
        elif isinstance(value, type):
            if not is_library(value.__module__):
                self._class(value)
        elif isinstance(value, types.FunctionType):
            if not is_library(value.__module__) and id(value) not in self._followed:
                self._followed.add(id(value))
                self._codes.append(value)
        elif not isinstance(value, _ITSELF):
            self._shared((("module", module), ("attr", name)), value)

    def _shared(self, path: Path, value: Any) -> None:
        """Of a class or a module: others may share it, so a change is named, and nobody's else is
        put back.
        """
        if path in self.places or isinstance(value, types.FunctionType | property):
            return
        if id(value) in self._first:
            return
        try:
            packed = Packer().pack(value)
        except Unpackable:
            if hasattr(type(value), "__next__"):
                self._opaque(path, value, "an iterator", always=True)
            elif not is_library(type(value).__module__) and len(path) < _SHARED_DEPTH:
                for name, inner in list(getattr(value, "__dict__", {}).items()):
                    self._shared((*path, ("attr", name)), inner)
            return
        self.places[path] = _Place(mark(packed), what="shared by all that use it")


class Baseline:
    """How everything looked before the first step of this process, and what has changed since.

    Only what a fresh start of the same code would not come to by itself is saved.
    """

    def __init__(self, first: Look) -> None:
        self.places: dict[Path, _Place] = {}
        self.objects: dict[Path, type] = {}
        self._roots: set[str] = set()
        self._alive: list[Any] = []
        self.meet(first)

    def begin(self, look: Look) -> None:
        """After the hooks that set up: what they have made is as it was at the start.

        What they have changed counts as changed, if it is small: a resume may set up other values
        (a finder, say). So do copies of the weights: a resume makes them of the weights that it has
        loaded.
        """
        weights = look.weight_marks()
        for path, place in look.places.items():
            before = self.places.get(path)
            if before is None or not (before.small and place.small):
                self.places[path] = _without_large(place)
            if before is None and any(mark(tensor) in weights for tensor in _tensors(place.packed)):
                self.places[path].mark = object()
        for path in [path for path in self.places if path not in look.places]:
            del self.places[path]
        self.objects = dict(look.objects)
        self._roots = set(look.roots)
        self._alive += look._alive

    def meet(self, look: Look) -> None:
        """Roots that were not there before, such as a loader that has just been made, are as they
        were at the start.
        """
        new = set(look.roots) - self._roots
        if not new:
            return
        self._roots |= new
        for path, place in look.places.items():
            if path[0][1] in new or path[0][0] != "root":
                self.places.setdefault(path, _without_large(place))
        self.objects |= {path: kind for path, kind in look.objects.items() if path[0][1] in new}
        self._alive += look._alive

    def accept(self, look: Look) -> None:
        """Objects that the hooks before the first batch have made: a resumed process makes them
        too.
        """
        self.objects |= look.objects
        self._alive += look._alive
        for path, place in look.places.items():
            if place.what and path not in self.places:
                self.places[path] = _without_large(place)

    def changes(self, look: Look) -> tuple[list[Any], list[str]]:
        """What has changed: [packed path, packed value] of each place, and words for what is no
        value.
        """
        saved, named = [], []
        for path, place in look.places.items():
            before = self.places.get(path)
            if before is not None and before.mark == place.mark:
                continue
            if not place.what:
                saved.append([packed_path(path), place.packed])
                if place.shares and (before is None or before.shares != place.shares):
                    named.append(
                        f"{in_words(path)} (shares its memory with {in_words(place.shares)})"
                    )
            elif before is not None or (path[0][0] == "root" and path[-1][0] != "hooks"):
                named.append(f"{in_words(path)} ({place.what})")
        for path in self.places:
            gone = path[-1][0] == "attr" and path not in look.visited and path[:-1] in look.objects
            if gone and path not in look.places:
                saved.append([packed_path(path), {"!": "gone"}])
        for path, kind in look.objects.items():
            if self.objects.get(path) is not kind and path[-1][0] != "root":
                named.append(f"{in_words(path)} (a new {kind.__name__})")
        return saved, named

    def restore(
        self,
        look: Look,
        saved: Iterable[Any],
        device: torch.device,
        loaded: Iterable[str] = (),
        alone: bool = False,
    ) -> list[str]:
        """Puts every place where it was when `saved` was made; returns words for what has no place
        here.

        Args:
            look: At the objects as they are now: what the hooks of this start have changed is taken
                back too.
            loaded: Roots that have loaded a state of their own since the first look: what that
                changed stays.
            alone: Put back what was saved, and nothing else.
        """
        loaded = set(loaded)
        meant = {path_of(packed): value for packed, value in saved}
        for path, place in look.places.items() if not alone else ():
            before = self.places.get(path)
            if path in meant or before is None or before.mark == place.mark or place.what:
                continue
            if before.small and path[0][1] not in loaded:
                meant[path] = before.packed
        # What was the same object as at another place, and no more is, is not written into that
        # one.
        aliases = {path for path in meant if path in self.places and self.places[path].is_alias}
        return _put_all_back(look, meant, device, aliases)


def _put_all_back(
    look: Look, meant: Mapping[Path, Any], device: torch.device, aliases: Collection[Path] = ()
) -> list[str]:
    """Returns words for the places that are no more, or hold another kind of value now."""
    failed = []
    for path, packed in meant.items():
        try:
            _put_back(look, path, packed, device, in_place=path not in aliases)
        except (LookupError, AttributeError, TypeError, ValueError, RuntimeError, Unpackable):
            failed.append(in_words(path))
    return failed


def changed_since(marks: Mapping[Path, Any], look: Look) -> list[str]:
    """Words for what is another one than when `marks` were taken: the running epoch goes by what
    they were.
    """
    now = {path: look.places[path].mark for path in marks if path in look.places}
    changed = [path for path, mark in marks.items() if now.get(path) != mark]
    return [f"{in_words(path)} (changed while the epoch goes by what it was)" for path in changed]


def put_back_into_model(module: nn.Module, saved: Iterable[Any], device: torch.device) -> list[str]:
    """Of what a training has changed, that of the model: for a model that is used and not trained
    on.

    What belongs to an object that only a training makes, such as a teacher of `on_fit_start`, is
    left out.

    Returns:
        Words for what is of another kind in this model.
    """
    look = Look({"model": module}, {}, module.state_dict().keys())
    meant = {}
    for packed_path, value in saved:
        path = path_of(packed_path)
        of_training = path[-1] == ("attr", "training") or path[-1][0] == "requires_grad"
        if path[0] == ("root", "model") and not of_training and _can_be_had(look, path[:-1]):
            same_as = isinstance(value, dict) and value["!"] == "same" and path_of(value["of"])
            if not same_as or _can_be_had(look, same_as):
                meant[path] = value
    return _put_all_back(look, meant, device)


def _can_be_had(look: Look, path: Path) -> bool:
    try:
        _resolve(look.roots, path)
    except (LookupError, AttributeError, TypeError):
        return False
    return True


def _made_of_weights(module: nn.Module) -> frozenset[str]:
    """What the hooks of `spectral_norm`, `weight_norm` and `prune` set anew from parameters, before
    each forward.
    """
    names = module._parameters
    if not any(name.endswith(("_orig", "_g")) for name in names):
        return frozenset()
    derived = {name.removesuffix("_orig") for name in names if name.endswith("_orig")}
    derived |= {name.removesuffix("_g") for name in names if name.endswith("_g")}
    return frozenset(derived)


def _without_large(place: _Place) -> _Place:
    if place.small:
        return _Place(
            place.mark, _copied(place.packed), place.what, small=True, shares=place.shares
        )
    return _Place(place.mark, None, place.what, shares=place.shares)


def _tensors(packed: Any) -> Iterator[Tensor]:
    if isinstance(packed, Tensor):
        yield packed
    elif isinstance(packed, list | dict):
        for item in packed.values() if isinstance(packed, dict) else packed:
            yield from _tensors(item)


def _copied(packed: Any) -> Any:
    if isinstance(packed, Tensor):
        return packed.detach().clone()
    if isinstance(packed, list):
        return [_copied(item) for item in packed]
    if isinstance(packed, dict):
        return {key: _copied(item) for key, item in packed.items()}
    return packed


# -- paths ---------------------------------------------------------------------------------------


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


def _below(path: Path, name: str) -> Path:
    """Of a sub-module. That of a compiled one has the place of what was compiled: compiling is no
    change.
    """
    return path if name == "_orig_mod" else (*path, ("module", name))


def _get(owner: Any, step: Step) -> Any:
    kind, key = step
    if kind == "attr":
        return getattr(owner, key)
    if kind == "item":
        return owner[key]
    if kind == "nth":
        return list(owner.values())[key]
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


def _resolve(roots: Mapping[str, Any], path: Path) -> Any:
    value = roots[path[0][1]]
    for step in path[1:]:
        if isinstance(value, nn.Module) and "_orig_mod" in value._modules:
            value = value._modules["_orig_mod"]
        value = _get(value, step)
    return value


def _put_back(look: Look, path: Path, packed: Any, device: torch.device, in_place: bool) -> None:
    roots = look.roots
    if any(type(key) is str and key.startswith("__") and key != "__self__" for _, key in path):
        raise ValueError(f"no place for a checkpoint to change: {in_words(path)}")
    owner, step = _resolve(roots, path[:-1]), path[-1]
    if isinstance(owner, nn.Module) and "_orig_mod" in owner._modules:
        owner = owner._modules["_orig_mod"]
    if isinstance(packed, dict) and packed["!"] == "gone":
        _remove(owner, step)
        return
    live = None
    with contextlib.suppress(LookupError, AttributeError, ValueError):
        live = _get(owner, step)
    if not in_place or (step[0] == "attr" and _storage(live) in look.weights):
        live = None  # written in place, it would change a weight, or what another attribute holds
    if isinstance(packed, dict) and packed["!"] == "same":
        value = _resolve(roots, path_of(packed["of"]))
    else:
        value = unpack(packed, live, device)
    if value is not live:
        _refuse_another_kind(live, value)
        _set(roots, path, owner, value)


def _storage(value: Any) -> int | None:
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    return value.untyped_storage().data_ptr() or None  # 0 where there is none: of an empty tensor


def _memory(value: Any) -> int | None:
    """The same number for all tensors or arrays that lie in the same memory."""
    if isinstance(value, Tensor):
        return _storage(value)
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


def _set(roots: Mapping[str, Any], path: Path, owner: Any, value: Any) -> None:
    kind, key = path[-1]
    if kind == "attr":
        try:
            setattr(owner, key, value)
        # A frozen dataclass, say, that its own code has changed.
        except (AttributeError, TypeError):
            object.__setattr__(owner, key, value)
    elif kind in ("item", "nth") and isinstance(owner, tuple):
        items = [value if place == key else item for place, item in enumerate(owner)]
        whole = type(owner)(*items) if hasattr(owner, "_fields") else tuple(items)
        _set(roots, path[:-1], _resolve(roots, path[:-2]), whole)
    elif kind == "item":
        owner[key] = value
    elif kind == "nth":
        owner[list(owner)[key]] = value
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


# -- what a class is -----------------------------------------------------------------------------


@functools.cache
def _left_out(kind: type) -> frozenset[str]:
    skipped = getattr(kind, "savepoint_skip", ())
    no_state = [names for base, names in _NO_STATE_OF if issubclass(kind, base)]
    return assigned_by_frameworks(kind).union(skipped, _NO_STATE, {"_hparams"}, *no_state)


@functools.cache
def assigned_by_frameworks(kind: type) -> frozenset[str]:
    """The names of attributes that the frameworks' classes among its bases assign to `self`
    anywhere in their code.
    """
    names: set[str] = set()
    for base in kind.__mro__:
        framework = base.__module__.startswith(_FRAMEWORK) or base in _FRAMEWORK_CLASSES
        if framework and (not base.__module__.startswith(_OPEN) or base.__module__ == _CALLBACK):
            names |= set(inspect.get_annotations(base))
            for function in _functions(base):
                names |= set(_assigned(function.__code__))
    return frozenset(names)


def _functions(kind: type) -> list[types.FunctionType]:
    found = []
    for member in vars(kind).values():
        for part in (
            member,
            *(getattr(member, name, None) for name in ("fget", "fset", "__func__")),
        ):
            while hasattr(part, "__wrapped__"):
                part = part.__wrapped__
            if isinstance(part, types.FunctionType):
                found.append(part)
    return found


def _assigned(
    code: types.CodeType, loads: tuple[str, ...] = ("LOAD_FAST", "LOAD_DEREF")
) -> Iterator[str]:
    """Of `self` alone: `parameter.data = ...` in a framework's code is no reason to leave out a
    user's `self.data`.
    """
    for before, instruction in itertools.pairwise(dis.get_instructions(code)):
        of_self = before.opname.startswith(loads) and _last(before.argval) == "self"
        if instruction.opname == "STORE_ATTR" and of_self:
            yield instruction.argval
    for constant in code.co_consts:
        # An inner class has another `self`, an inner function this one.
        if isinstance(constant, types.CodeType):
            yield from _assigned(constant, ("LOAD_DEREF",))


def _last(loaded: Any) -> Any:
    # Newer Pythons load two with one instruction.
    return loaded[-1] if isinstance(loaded, tuple) else loaded


@functools.cache
def _names(code: types.CodeType) -> frozenset[str]:
    """The global names that a function's code mentions, inner functions included."""
    inner = [
        _names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)
    ]
    return frozenset(code.co_names).union(*inner)


@functools.cache
def _slots(kind: type) -> tuple[str, ...]:
    return tuple(name for base in kind.__mro__ for name in _own_slots(base))


def _own_slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    private = kind.__name__.lstrip("_")
    mangled = [
        f"_{private}{name}" if name[:2] == "__" and name[-2:] != "__" else name for name in names
    ]
    return tuple(name for name in mangled if name not in ("__dict__", "__weakref__"))


@functools.cache
def is_library(module: str | None) -> bool:
    """Installed code, as against the user's own."""
    if module is None or module == "builtins":
        return True
    if module == "savepoint" or module.startswith("savepoint."):
        return True
    found = sys.modules.get(module)
    file = getattr(found, "__file__", None)
    if module == "__main__":
        return False
    if file is None:
        return found is not None
    paths = sysconfig.get_paths()
    installed = (paths["stdlib"], paths["purelib"], paths["platlib"])
    # An environment may see the packages of another one, whose paths are not its own.
    shared = {"site-packages", "dist-packages"}.intersection(str(file).split(os.sep))
    return str(file).startswith(installed) or bool(shared)


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
