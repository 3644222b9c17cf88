"""Seeds that are derived from numbers, and generators that are seeded for a block."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from savepoint.look.classes import is_library, names_in, slots_of, wrapped_functions_of
from savepoint.look.generators import (
    generator_state,
    is_generator,
    restore_generator,
    seed_generator,
)

# Objects that are not searched for generators; those of a module belong to everybody.
_NO_OWNERS = (Tensor, np.ndarray, nn.Module, ModuleType, type, str, bytes)
_PLAIN = frozenset({type(None), bool, int, float, str, bytes, torch.dtype, torch.device})


def derive(*numbers: int) -> int:
    """One 63-bit seed from several numbers, such as (seed, epoch, index): neighbours give unrelated
    streams.
    """
    entropy = [number % 2**64 for number in numbers]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generators_of(value: Any) -> list[Any]:
    """Every random generator that an object owns, in attributes, containers and objects below it,
    always in one order.
    """
    generators: list[Any] = []
    seen: set[int] = set()
    waiting = [value]
    while waiting and len(seen) < 10_000:
        part = waiting.pop()
        if id(part) in seen or isinstance(part, _NO_OWNERS):
            continue
        seen.add(id(part))
        if type(part) in _PLAIN:
            continue
        if is_generator(part):
            generators.append(part)
        elif isinstance(part, dict):
            waiting += list(part.values())[:1000]
        elif isinstance(part, list | tuple | set):
            waiting += list(part)[:1000]
        else:
            waiting += list(getattr(part, "__dict__", {}).values())
            for cell in getattr(part, "__closure__", None) or ():
                with suppress(ValueError):  # an empty cell
                    waiting.append(cell.cell_contents)
            kind: Any = type(part)
            names = ("__self__", "func", "args", "keywords", *slots_of(kind))
            waiting += [getattr(part, name) for name in names if hasattr(part, name)]
            waiting += _shared_generators(part)
    return generators


def _shared_generators(value: Any) -> list[Any]:
    """Those of its class, of its functions' defaults and of their modules: a worker has a copy of
    them too.
    """
    if isinstance(value, FunctionType):
        functions: Sequence[FunctionType] = (value,)
        found = []
    elif not is_library(type(value).__module__):
        bases: list[Any] = [kind for kind in type(value).__mro__ if not is_library(kind.__module__)]
        functions = [function for kind in bases for function in wrapped_functions_of(kind)]
        found = [member for kind in bases for member in vars(kind).values()]
    else:
        return []
    for function in functions:
        found += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        names = names_in(function.__code__)
        found += [function.__globals__[name] for name in names if name in function.__globals__]
    return [member for member in found if is_generator(member)]


class Randomness:
    """Seeds the global generators and some owned ones for a block, and restores them after it.

    Without workers these are the generators of the training: reading a sample must not change what
    dropout draws.
    """

    def __init__(self, owned: Sequence[Any] = ()) -> None:
        self._owned = owned
        self._private: Any = None

    def _now(self) -> Any:
        own = [generator_state(generator) for generator in self._owned]
        return random.getstate(), np.random.get_state(), torch.get_rng_state(), own

    def _put(self, states: Any) -> None:
        python, numpy, torch_state, own = states
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)
        for generator, state in zip(self._owned, own, strict=True):
            restore_generator(generator, state)

    @contextmanager
    def seeded(self, seed: int, *, keep: bool = False) -> Iterator[None]:
        # `keep` is for `continued`, which goes on from the end of this block: reading the states
        # costs as much as all the rest.
        before = self._now()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        for number, generator in enumerate(self._owned):
            seed_generator(generator, derive(seed, number))
        try:
            yield
        finally:
            if keep:
                self._private = self._now()
            self._put(before)

    @contextmanager
    def continued(self) -> Iterator[None]:
        """A block that begins with the generators as the last block of this object left them."""
        before = self._now()
        self._put(self._private)
        try:
            yield
        finally:
            self._private = self._now()
            self._put(before)
