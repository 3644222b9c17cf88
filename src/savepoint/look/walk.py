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
import dataclasses
import datetime
import functools
import io
import itertools
import operator
import queue
import types
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric

from savepoint.look.classes import (
    is_library,
    left_out_of,
    names_in,
    own_attributes,
    stored_by,
    wrapped_functions_of,
)
from savepoint.look.generators import is_generator
from savepoint.look.kinds import has_notes, is_atom, is_raw, keys_of, values_of
from savepoint.look.marks import mark
from savepoint.look.pack import MOST_BYTES
from savepoint.look.places import Path, Place, packed_path, path_below, storage_of
from savepoint.look.seen import Seen, is_hidden_iterator, is_settled
from savepoint.look.shared import ENTERED, IGNORED, ITSELF, GoneThrough, Shared

_THIRD_PARTY_VALUES = 500  # how far an object of a library is entered
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_POINTERS = (weakref.ReferenceType, contextvars.ContextVar)
_ONE_VALUE = (Tensor, np.ndarray, np.generic, PurePath)
_PLAIN = (int, float, complex, str, bytes, datetime.date, datetime.time, datetime.timedelta)
_NO_HOOKS = Place(0, what="other hooks than at the start")
# What spreads a model over ranks: buffers that each step fills and empties.
_MACHINERY = ("FSDPState", "FSDPParamGroup", "FSDPParam", "DeviceMesh")


class Settled(NamedTuple):
    """Attributes of which none can change without another object in its place."""

    names: list[str]
    values: list[Any]
    places: dict[Path, Place]

    def still(self, names: list[str], values: list[Any]) -> bool:
        return self.names == names and all(map(operator.is_, self.values, values))


class Before(NamedTuple):
    """Of one look, what spares the next one the way through what cannot have changed."""

    settled: Mapping[Path, Settled] = types.MappingProxyType({})
    gone_through: GoneThrough | None = None


class Look(Seen):
    """One walk over everything that is reachable from the roots.

    Args:
        roots: Name and object, in an order that stays: the first path to an object names it.
        known: What is never entered, such as the Trainer and its optimizers: id and a name.
        persisted: Names in the model's state_dict: those weights are saved by Lightning.
        noted: Objects of a framework that are not entered: of these, only what the user's own code
            has written on them.
        before: Of an earlier look at the same training.
        most_bytes: Of one attribute: above it, it is named and not saved.

    Attributes:
        objects: The class of each object that was entered.
        dicts: That are seen key by key.
    """

    def __init__(
        self,
        roots: Mapping[str, Any],
        known: Mapping[int, str],
        persisted: Iterable[str],
        noted: Mapping[str, Any] = types.MappingProxyType({}),
        before: Before = Before(),  # noqa: B008 - it cannot be changed
        most_bytes: float = MOST_BYTES,
    ) -> None:
        super().__init__(most_bytes)
        self.roots = {**roots, **noted}
        self.objects: dict[Path, type] = {}
        self.visited: set[Path] = set()
        self.dicts: set[Path] = set()
        self._known = known
        self._persisted = frozenset(persisted)
        self._settled_before = before.settled
        self._settled: dict[Path, Settled] = {}
        self._met = GoneThrough()
        self._entered: set[int] = set()
        self._library_values = 0
        self._registered: set[int] = set()
        for name, root in roots.items():
            if isinstance(root, nn.Module):
                self._register((("root", name),), root)
        for name, root in roots.items():
            self._root((("root", name),), root)
        self._met = Shared(self, self._met, self._entered).look(before.gone_through)
        for name, holder in noted.items():
            self._notes((("root", name),), holder)
        self.see_overlaps()

    @property
    def owners(self) -> set[Path]:
        """Classes, functions and what they share."""
        return self._met.owners

    @property
    def absent(self) -> set[Path]:
        """Globals that the user's functions name and that are not there."""
        return self._met.absent

    @property
    def for_next(self) -> Before:
        return Before(self._settled, self._met)

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
        return frozenset().union(*(stored_by(one.__code__) for one in self._met.functions))

    def marks_below(self, value: Any) -> dict[Path, Any]:
        """The marks of everything that `value` holds."""
        top = self.first.get(id(value))
        if top is None:
            return {}
        length = len(top)
        return {path: place.mark for path, place in self.places.items() if path[:length] == top}

    def mentioned_below(self, value: Any, name: str) -> bool:
        """Whether a class of the user's own, of an object that `value` holds, mentions a name."""
        top = self.first.get(id(value), ())
        kinds = {kind for path, kind in self.objects.items() if path[: len(top)] == top}
        bases: set[Any] = {base for kind in kinds for base in kind.__mro__}
        return any(
            name in names_in(function.__code__)
            for base in bases
            if not is_library(base.__module__)
            for function in wrapped_functions_of(base)
        )

    def path_to(self, value: Any) -> Path | None:
        return self.first.get(id(value))

    def mentions(self, names: Collection[str], but_in: Collection[str]) -> bool:
        """Whether the user's own code mentions one of these names, in other functions than those
        left out.
        """
        return any(
            not names_in(one.__code__).isdisjoint(names)
            for one in self._met.functions
            if one.__name__ not in but_in
        )

    def weight_marks(self) -> set[Any]:
        modules = [root for root in self.roots.values() if isinstance(root, nn.Module)]
        weights = [t for module in modules for t in module.parameters() if not is_lazy(t)]
        return {mark(weight.detach()) for weight in weights}

    # -- modules ----------------------------------------------------------------------------------

    def _register(self, path: Path, module: nn.Module) -> None:
        """The places of a registered module and its weights, before any attribute that also holds
        them.
        """
        if id(module) in self.first:
            return
        self.first[id(module)] = path
        self._registered.add(id(module))
        for kind, tensors in (("parameter", module._parameters), ("buffer", module._buffers)):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                self.first.setdefault(id(tensor), (*path, (kind, name)))
                memory = None if is_lazy(tensor) else storage_of(tensor)
                if memory is not None:
                    self.weights.setdefault(memory, (*path, (kind, name)))
        for name, child in module._modules.items():
            if child is not None:
                self._register(path_below(path, name), child)

    def _root(self, path: Path, root: Any) -> None:
        if isinstance(root, nn.Module):
            self._module(path, root, prefix="", persisted=self._persisted)
        elif isinstance(root, Optimizer):  # what its state_dict holds, Lightning saves
            self.first[id(root)] = path
            self._object(path, root)
        elif id(root) not in self.first:
            self._visit(path, root)

    def _module(
        self, path: Path, module: nn.Module, prefix: str, persisted: frozenset[str]
    ) -> None:
        """A module, its weights as far as they are in no state_dict, and its sub-modules."""
        self.objects[path] = type(module)
        self.alive.append(module)
        compiled = "_orig_mod" in module._modules
        if not compiled:
            self.put((*path, ("attr", "training")), module.training)
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
            if self.first.get(id(child), at) == at:
                self.first[id(child)] = at
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
        self.places[(*path, ("hooks", ""))] = (
            dataclasses.replace(_NO_HOOKS, mark=number) if number else _NO_HOOKS
        )

    def _weight(self, path: Path, tensor: Tensor | None, persisted: bool) -> None:
        if tensor is None:
            return
        if path[-1][0] == "parameter":
            self.put((*path[:-1], ("requires_grad", path[-1][1])), tensor.requires_grad)
        if tensor.__dict__:
            self._attributes_of(path, tensor, tensor.__dict__)
        if not persisted and not is_lazy(tensor):
            self.first.setdefault(id(tensor), path)
            self.put_packed(path, tensor.detach() if tensor.requires_grad else tensor)

    # -- everything else --------------------------------------------------------------------------

    def _visit(self, path: Path, value: Any) -> None:
        self.visited.add(path)
        if is_settled(value):
            self.put(path, value)
        elif isinstance(value, _POINTERS):
            self.put_pointer(path, value)
        elif not _is_ignored(value) and not self._is_seen(path, value):
            self.alive.append(value)
            if id(value) in self._known:
                self.places[path] = Place(self._known[id(value)], what=self._known[id(value)])
            else:
                self._enter(path, value)

    def _is_seen(self, path: Path, value: Any) -> bool:
        first = self.first.get(id(value), path)
        if first == path:
            return False
        packed = {"!": "same", "of": packed_path(first)}
        self.places[path] = Place(("same", first), packed, small=True)
        return True

    def _enter(self, path: Path, value: Any) -> None:
        if not isinstance(value, ITSELF):
            self.first[id(value)] = path
        if storage_of(value) in self.weights:
            self.places[path] = Place(("view", tuple(value.shape)), what="a view of a weight")
        elif (
            isinstance(value, _ONE_VALUE) or is_generator(value) or is_atom(value) or is_raw(value)
        ):
            self.put_packed(path, value)
            if has_notes(value):
                self._attributes_of(path, value, vars(value))
        else:
            kinds = (enter for kind, enter in _BY_KIND if isinstance(value, kind))
            next(kinds, Look._object)(self, path, value)

    def _plain_value(self, path: Path, value: Any) -> None:
        """Of a class of the user's own, say."""
        self.places[path] = Place((type(value), str(value)), what=f"a {type(value).__name__}")
        if has_notes(value):
            self._attributes_of(path, value, vars(value))

    def _unregistered(self, path: Path, value: nn.Module) -> None:
        """A module that stands in a list, say: no state_dict has its weights."""
        self._module(path, value, "", frozenset())

    def _by_state_dict(self, path: Path, value: Any) -> None:
        """An optimizer or a schedule that a training has made: no start makes it."""
        self.objects[path] = type(value)
        self.put_packed((*path, ("state", "")), value.state_dict())

    def _itself(self, path: Path, value: Any) -> None:
        self.put_opaque(path, value, "another object than at the start")

    def _queue(self, path: Path, value: Any) -> None:
        self.put_opaque(path, value, "a queue", always=bool(value.qsize()))

    def _memory_view(self, path: Path, value: memoryview) -> None:
        self._visit((*path, ("attr", "obj")), value.obj)

    def _container(self, path: Path, value: Any) -> None:
        refused = self.put_container(path, value)
        if refused is not None:
            if isinstance(refused.args[0], str):
                self.put_size(path, value, refused.args[0])
            else:
                self._items(path, value)
        if hasattr(value, "__dict__"):
            self._attributes_of(path, value, vars(value))

    def _items(self, path: Path, value: Any) -> None:
        """Item by item, where objects stand among the values."""
        if isinstance(value, set | frozenset):
            self.put_members(path, value, "a set of objects")
            return
        if isinstance(value, dict):
            self.dicts.add(path)
            keys = keys_of(value)
            plain = [type(key) in (str, int, bool, float, type(None)) for key in keys]
            for place, item in enumerate(values_of(value)):
                step = ("item", keys[place]) if plain[place] else ("nth", place)
                self._visit((*path, step), item)
            if not all(plain):
                self.alive += keys
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
            self.first.pop(id(value), None)
            self._visit((*path, ("attr", "__self__")), value.__self__)
            return
        self.put_opaque(path, value, "another function than at the start")
        self._entered.add(id(value))
        if isinstance(value, functools.partial):
            self._visit((*path, ("attr", "func")), value.func)
            self._visit((*path, ("attr", "args")), value.args)
            self._visit((*path, ("attr", "keywords")), value.keywords)
            return
        if is_library(value.__module__):
            return
        self._met.functions.append(value)
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
        places = len(self.places)
        objects = len(self.objects)
        if is_hidden_iterator(value):
            # How far it has come cannot be seen, and asking it would move it.
            self.put_opaque(path, value, f"an iterator ({type(value).__name__})", always=True)
            return
        self.objects[path] = type(value)
        library = is_library(type(value).__module__) and not isinstance(value, ENTERED)
        if library:
            if self._library_values > _THIRD_PARTY_VALUES:
                return
            self._library_values += 1
        self._attributes(path, value)
        if library:
            self._forgive(path, places, objects)

    def _forgive(self, path: Path, places: int, objects: int) -> None:
        """A library's own unsavable parts (windows, sockets, caches) do not make a training
        inexact.

        Args:
            places: How many were seen before this object.
            objects: As `places`.
        """
        own = list(itertools.islice(self.places, places, None))
        forgiven = [at for at in own if self._is_unsavable(self.places[at])]
        for at in forgiven:
            del self.places[at]
        # One that a training has made, no start makes.
        holds = len(own) > len(forgiven)
        for at in list(itertools.islice(self.objects, objects, None)):
            if not (holds and at == path):
                del self.objects[at]

    @staticmethod
    def _is_unsavable(place: Place) -> bool:
        return bool(place.what) and "iterator" not in place.what

    def _attributes(self, path: Path, value: Any, derived: frozenset[str] = frozenset()) -> None:
        kind: Any = type(value)
        self._met.classes.add(kind)
        own = own_attributes(value)
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
        names = [name for name in own if name not in left_out]
        values = [own[name] for name in names]
        settled = self._settled_before.get(path)
        if settled is not None and settled.still(names, values):
            self._settled[path] = settled
            self.places.update(settled.places)
            self.visited.update(settled.places)
        else:
            self._visit_attributes(path, names, values)
        if own.get("_hparams"):  # assigned by Lightning, and the user's own
            self._visit((*path, ("attr", "_hparams")), own["_hparams"])

    def _visit_attributes(self, path: Path, names: list[str], values: list[Any]) -> None:
        paths = [(*path, ("attr", name)) for name in names]
        for at, value in zip(paths, values, strict=True):
            self._visit(at, value)
        if all(map(is_settled, values)):
            self._settled[path] = Settled(names, values, {at: self.places[at] for at in paths})


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


# How each kind of value is entered; any other is an object with attributes.
_BY_KIND: tuple[tuple[Any, Callable[[Look, Path, Any], None]], ...] = (
    (_PLAIN, Look._plain_value),
    ((list, tuple, collections.deque, set, frozenset, dict), Look._container),
    (nn.Module, Look._unregistered),
    ((Optimizer, LRScheduler), Look._by_state_dict),
    ((types.FunctionType, types.MethodType, functools.partial), Look._function),
    (ITSELF, Look._itself),
    (io.IOBase, Look._file),
    (queue.SimpleQueue, Look._queue),
    (memoryview, Look._memory_view),
)


def _is_ignored(value: Any) -> bool:
    kind = type(value)
    if kind.__name__ in _MACHINERY and kind.__module__.startswith("torch.distributed."):
        return True
    return isinstance(value, IGNORED)
