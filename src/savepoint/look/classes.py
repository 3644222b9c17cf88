"""What a class is: which attributes a framework assigns, whose code it is."""

import contextlib
import dis
import functools
import inspect
import itertools
import os
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torchmetrics import Metric, MetricCollection

# What these assign is saved by other means, or is no state.
_FRAMEWORK = ("lightning.", "lightning_fabric.", "pytorch_lightning.", "savepoint.")
_FRAMEWORK_CLASSES = (nn.Module, Metric, Optimizer, ZeroRedundancyOptimizer, DataLoader, object)
_OPEN = "lightning.pytorch.callbacks."  # its concrete classes keep state that no state_dict has
_STORE_ATTR = dis.opmap["STORE_ATTR"]
_CALLBACK = "lightning.pytorch.callbacks.callback"
_PARTS = ("fget", "fset", "__func__", "func")  # of properties, methods, cached properties
# Caches, and what metric states bring along by themselves. Of these classes only: a user's own
# `_cache` is state.
NO_STATE = frozenset({"__orig_class__", "savepoint_skip", "_hparams_initial", "_hparams_name"})
_NO_STATE_OF: tuple[tuple[Any, frozenset[str]], ...] = (
    (nn.Module, frozenset({
        "_orig_mod", "training", "_compiled_call_impl", "_flat_weight_refs", "_flat_weights",
    })),
    (Optimizer, frozenset({"_opt_called"})),  # for a warning of a schedule's
    (Metric, frozenset({"_update_called", "_computed", "_update_signature", "update", "compute"})),
    (MetricCollection, frozenset({
        "_groups", "_groups_checked", "_state_is_copy", "_compute_groups_create_state_ref",
    })),
)  # fmt: skip


@functools.cache
def left_out_of(kind: type) -> frozenset[str]:
    skipped = getattr(kind, "savepoint_skip", ())
    no_state = [names for base, names in _NO_STATE_OF if issubclass(kind, base)]
    return assigned_by_frameworks(kind).union(skipped, NO_STATE, {"_hparams"}, *no_state)


@functools.cache
def assigned_by_frameworks(kind: type) -> frozenset[str]:
    """The names of attributes that the frameworks' classes among its bases assign to `self`
    anywhere in their code.
    """
    names: set[str] = set()
    if any(base.__module__ == _CALLBACK for base in kind.__mro__):
        names |= {"log", "log_dict"}  # the module's own, given to each callback by the Trainer
    for base in kind.__mro__:
        framework = base.__module__.startswith(_FRAMEWORK) or base in _FRAMEWORK_CLASSES
        if framework and (not base.__module__.startswith(_OPEN) or base.__module__ == _CALLBACK):
            names |= _assigned_by(base)
    return frozenset(names)


@functools.cache
def _assigned_by(base: type) -> frozenset[str]:
    names = set(inspect.get_annotations(base))
    for function in functions_of(base):
        names.update(_assigned(function.__code__))
    return frozenset(names)


def functions_of(kind: type) -> list[types.FunctionType]:
    found = []
    for member in vars(kind).values():
        for part in (member, *(getattr(member, name, None) for name in _PARTS)):
            while hasattr(part, "__wrapped__"):
                part = part.__wrapped__
            if isinstance(part, types.FunctionType):
                found.append(part)
    return found


@functools.cache
def wrapped_functions_of(kind: type) -> tuple[types.FunctionType, ...]:
    """With what decorators have put around them."""
    found = list(functions_of(kind))
    for member in vars(kind).values():
        for part in (member, *(getattr(member, name, None) for name in _PARTS)):
            while hasattr(part, "__wrapped__"):
                if isinstance(part, types.FunctionType):
                    found.append(part)
                part = part.__wrapped__
    return tuple(found)


def _assigned(
    code: types.CodeType, loads: tuple[str, ...] = ("LOAD_FAST", "LOAD_DEREF")
) -> Iterator[str]:
    """Of `self` alone: `parameter.data = ...` in a framework's code is no reason to leave out a
    user's `self.data`.
    """
    for before, instruction in itertools.pairwise(_instructions(code)):
        of_self = before.opname.startswith(loads) and _last(before.argval) == "self"
        if instruction.opname == "STORE_ATTR" and of_self:
            yield instruction.argval
    for constant in code.co_consts:
        # An inner class has another `self`, an inner function this one.
        if isinstance(constant, types.CodeType):
            yield from _assigned(constant, ("LOAD_DEREF",))


def _instructions(code: types.CodeType) -> Iterable[dis.Instruction]:
    """None where it assigns no attribute: most code does not, and `dis` takes its time."""
    return dis.get_instructions(code) if _STORE_ATTR in code.co_code[::2] else ()


def _last(loaded: Any) -> Any:
    # Newer Pythons load two with one instruction.
    return loaded[-1] if isinstance(loaded, tuple) else loaded


@functools.cache
def names_in(code: types.CodeType) -> frozenset[str]:
    """The global names that a function's code mentions, inner functions included."""
    inner = [
        names_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)
    ]
    texts = code.co_consts if "globals" in code.co_names else ()
    named = {text for text in texts if type(text) is str}  # globals()["name"]
    return frozenset(named).union(code.co_names, *inner)


@functools.cache
def stored_by(code: types.CodeType) -> frozenset[str]:
    """The attributes that a function writes, of whatever object."""
    inner = [stored_by(part) for part in code.co_consts if isinstance(part, types.CodeType)]
    own = [one.argval for one in _instructions(code) if one.opname == "STORE_ATTR"]
    texts = code.co_consts if "setattr" in code.co_names else ()
    return frozenset(own).union([text for text in texts if type(text) is str], *inner)


def own_attributes(value: Any) -> dict[str, Any]:
    """Those of the object itself, in its `__dict__` and in slots, as far as they are set."""
    own = dict(getattr(value, "__dict__", {}))
    kind: Any = type(value)
    for name in slots_of(kind):
        with contextlib.suppress(AttributeError):
            own[name] = getattr(value, name)
    return own


@functools.cache
def slots_of(kind: type) -> tuple[str, ...]:
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
