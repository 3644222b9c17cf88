"""Batches whose order is a function of (seed, epoch) and whose position is state.

Two loaders keep the same promises, `Batches` (tensors held whole) and `ResumableLoader` (a
DataLoader with workers):

- Nothing happens before the first `next()`. Lightning calls `iter()` before `set_epoch()` and not
  again on a resume, so an order fixed in `iter()` would replay epoch 0.
- `state_dict()` is the epoch and the number of batches handed out; `load_state_dict()` goes on
  behind them.
- No draw from a generator of the training, so that building an iterator anew after a resume shifts
  nothing. What a sampler, a sample or a collate function draws comes from generators that are
  seeded from (seed, epoch), (seed, epoch, index) and (seed, epoch, first index of the batch): the
  global ones, and those that they own.

`len()` is that of the whole epoch, also after a resume.
"""

import copy
import math
import os
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
    default_convert,
)

from savepoint.errors import ConfigError
from savepoint.look.classes import is_library, names_in, slots_of, wrapped_functions_of
from savepoint.look.generators import (
    generator_state,
    is_generator,
    restore_generator,
    seed_generator,
)

Augment = Callable[[Tensor, torch.Generator], Tensor]
_PLAIN_COLLATE = (default_collate, default_convert)
# Samplers whose order is a function of their arguments and the generator. Any other sampler may
# depend on more.
_DERIVED = (
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    DistributedSampler,
)


# Objects that are not searched for generators; those of a module belong to everybody.
_NO_OWNERS = (Tensor, np.ndarray, nn.Module, ModuleType, type, str, bytes)


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


class _Randomness:
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


class _Resumable:
    """The position in an epoch, and what Lightning and the checkpoint callback call on a loader."""

    batch_sampler = None  # Lightning checks whether it shuffles
    num_workers = 0
    persistent_workers = False

    def __init__(
        self, *, seed: int | None, shuffle: bool, rank: int | None, world_size: int | None
    ) -> None:
        self.shuffle = shuffle
        self._seed = seed
        self._given = seed is not None
        self._rank = rank
        self._world_size = world_size
        self.epoch = self.position = self._start = 0

    @property
    def seed(self) -> int:
        """By default the seed of `seed_everything`, read when the first batch is requested."""
        if self._seed is None:
            common = _common_seed() if self.world_size > 1 else torch.initial_seed()
            self._seed = common % 2**63  # so that a checkpoint holds it as a plain number
        return self._seed

    @property
    def rank(self) -> int:
        if self._rank is not None:
            return self._rank
        return torch.distributed.get_rank() if _distributed() else 0

    @property
    def world_size(self) -> int:
        if self._world_size is not None:
            return self._world_size
        return torch.distributed.get_world_size() if _distributed() else 1

    @property
    def sampler(self) -> "_Resumable | _InOrder":
        """Lightning calls `loader.sampler.set_epoch(epoch)`, and knows by the sampler's class
        whether it shuffles.
        """
        return self if self.shuffle else _InOrder(self)

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch = epoch
            self.position = 0
            self._start = 0

    def state_dict(self) -> dict[str, Any]:
        own = {} if self._given or self._seed is None else {"seed": self._seed}
        return {"epoch": self.epoch, "position": self.position, **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.position = state["position"]
        self._start = state["position"]
        if not self._given:
            self._seed = state.get("seed", self._seed)

    def user_parts(self) -> dict[str, Any]:
        """The user's objects, which `look` watches for changes during a training."""
        return {}

    def _share(self, samples: int) -> int:
        """The number of samples for each rank. All ranks get the same number, and the remainder is
        left out of this epoch: with one batch more on one rank, the others would wait for ever.
        """
        if samples < self.world_size:
            raise ConfigError(
                f"Too few samples to share: {samples} for {self.world_size} processes. Each needs "
                "at least one. Start fewer processes or give more data."
            )
        return samples // self.world_size

    def _shuffled(self, samples: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(samples)
        generator = torch.Generator().manual_seed(derive(self.seed, self.epoch))
        return torch.randperm(samples, generator=generator)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _common_seed() -> int:
    """The seed of all ranks. Each rank's own initial seed may be another one, and the ranks share
    one order.
    """
    return int(os.environ.get("PL_GLOBAL_SEED") or 0)


class _InOrder(SequentialSampler):
    def __init__(self, loader: _Resumable) -> None:
        super().__init__(range(len(loader)))  # type: ignore[arg-type]
        self.set_epoch = loader.set_epoch


class Batches(_Resumable):
    """Batches cut from whole tensors, on the device that holds them.

    Args:
        tensors: Of equal first dimension; a batch is a tuple of one slice of each.
        augment: Applied to the first tensor's batch, with a CPU generator seeded from (seed, epoch,
            batch, rank).
        rank: Of this process, and `world_size`: by default those of the process group. Lightning
            shards DataLoaders only, so this loader takes every `world_size`-th sample itself.
    """

    def __init__(
        self,
        *tensors: Tensor,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        augment: Augment | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__(seed=seed, shuffle=shuffle, rank=rank, world_size=world_size)
        self.tensors = tensors
        self.augment = augment
        self.samples = len(tensors[0])
        self.batch_size = batch_size
        self._share(self.samples)

    def __len__(self) -> int:
        return math.ceil(self._share(self.samples) / self.batch_size)

    def order(self) -> Tensor:
        """The samples of this epoch and rank, in order: int64."""
        share = self._share(self.samples)
        return self._shuffled(self.samples)[self.rank : share * self.world_size : self.world_size]

    def user_parts(self) -> dict[str, Any]:
        return {"augment": self.augment}

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        start = self._start
        self._start = 0
        order = self.order().to(self.tensors[0].device)
        for i in range(start, len(self)):
            self.position = i + 1
            pick = order[i * self.batch_size : (i + 1) * self.batch_size]
            first, *rest = (tensor[pick] for tensor in self.tensors)
            if self.augment is not None:
                generator = torch.Generator().manual_seed(
                    derive(self.seed, self.epoch, i, self.rank)
                )
                first = self.augment(first, generator)
            yield first, *rest


class _SeededByIndex(Dataset[Any]):
    """Reads sample `index` with every generator seeded from (seed, epoch, index), so that any
    worker gives the same sample.

    Args:
        keyed: Return (key, sample), for a collate function that the first key of a batch seeds.
    """

    def __init__(self, dataset: Dataset[Any], seed: int, keyed: bool) -> None:
        self.dataset = dataset
        self.seed = seed
        self.keyed = keyed
        # One for each process: a worker has a copy of the data set.
        self._randomness: _Randomness | None = None

    def __getitem__(self, key: tuple[int, Any]) -> Any:
        epoch, index = key
        if self._randomness is None:
            self._randomness = _Randomness(generators_of(self.dataset))
        with self._randomness.seeded(derive(self.seed, epoch, _number(index))):
            sample = self.dataset[index]
        return (key, sample) if self.keyed else sample

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_randomness": None}


class _SeededCollate:
    """Collates with every generator seeded from (seed, epoch, first index of the batch), as MixUp
    needs it.
    """

    def __init__(self, collate: Callable[[Any], Any], seed: int, batched: bool) -> None:
        self.collate = collate
        self.seed = seed
        self.batched = batched
        self._randomness: _Randomness | None = None  # as in _SeededByIndex

    def __call__(self, keyed: Any) -> Any:
        if not self.batched:
            (epoch, index), samples = keyed
        else:
            (epoch, index), _ = keyed[0]
            samples = [sample for _, sample in keyed]
        seed = derive(self.seed, epoch, _number(index), len(samples) if self.batched else 0, 1)
        if self._randomness is None:
            self._randomness = _Randomness(generators_of(self.collate))
        with self._randomness.seeded(seed):
            return self.collate(samples)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_randomness": None}


def _number(index: Any) -> int:
    """A number for an index, which may be any object that the data set takes."""
    return index if isinstance(index, int) else zlib.crc32(repr(index).encode())


class _Keys:
    """The batch sampler of the inner DataLoader: the batches that are left in this epoch."""

    def __init__(self) -> None:
        self.batches: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class ResumableLoader(_Resumable):
    """A map-style DataLoader whose order derives from (seed, epoch) and whose samples derive from
    (seed, epoch, index).

    Any number of workers gives the same batches. A resume in the middle of an epoch reads no sample
    twice: the inner DataLoader gets only the batches that are left. `resumable` makes one of a
    DataLoader, whose attributes are attributes of this loader too.
    """

    def __init__(
        self, loader: DataLoader[Any], *, seed: int | None, rank: int | None, world_size: int | None
    ) -> None:
        if isinstance(loader.dataset, IterableDataset):
            raise ConfigError(
                f"This DataLoader cannot be resumed: {type(loader.dataset).__name__}. Expected a "
                "map-style data set, as only an iterable one itself knows its place. Give the "
                "loader a state_dict() and a load_state_dict()."
            )
        own = loader.batch_sampler
        self.loader = loader
        self._own_batches = own if own is not None and type(own) is not BatchSampler else None
        self._indices = loader.sampler if self._own_batches is None else None
        shuffle = not isinstance(self._indices, SequentialSampler)
        super().__init__(seed=seed, shuffle=shuffle, rank=rank, world_size=world_size)
        # A batch_sampler that was given leaves these None on the loader.
        self._size = loader.batch_size
        self._drops_last = loader.drop_last
        if self._own_batches is None and isinstance(own, BatchSampler):
            self._indices = own.sampler
            self._size = own.batch_size
            self._drops_last = own.drop_last
        self.num_workers = loader.num_workers
        self.persistent_workers = loader.persistent_workers
        self._order: list[Any] | None = None  # of this epoch and rank; None until it begins
        self._keys = _Keys()
        self._inner: DataLoader[Any] | None = None
        if _length(self._source) is not None:
            len(self)

    def __getattr__(self, name: str) -> Any:
        # Lightning takes a loader with a data set for a DataLoader, and may give it another sampler
        # (overfit_batches).
        if name == "dataset":
            raise AttributeError(
                "A resumable loader has no attribute dataset: its DataLoader has it, "
                "loader.loader.dataset."
            )
        if name.startswith("__") or name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_inner": None, "_order": None}

    @property
    def _source(self) -> Any:
        return self._own_batches if self._own_batches is not None else self._indices

    def _ranks(self) -> tuple[int, int]:
        sharded = isinstance(self._source, DistributedSampler)  # already, by the user
        return (0, 1) if sharded else (self.rank, self.world_size)

    def __len__(self) -> int:
        number = _length(self._source)
        if number is None:
            raise TypeError(f"{type(self._source).__name__} has no length")
        _, world_size = self._ranks()
        share = self._share(number) if world_size > 1 else number
        if self._size is None:
            return share
        if self._drops_last:
            return share // self._size
        return math.ceil(share / self._size)

    def user_parts(self) -> dict[str, Any]:
        return {
            "dataset": self.loader.dataset,
            "sampler": self._source,
            "collate_fn": self.loader.collate_fn,
        }

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self._order is not None and not self._is_derived():
            # The order of a user's sampler may depend on anything: it is saved.
            state["order"] = self._order
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._order = state.get("order")

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self._order = None
        super().set_epoch(epoch)
        if hasattr(self._source, "set_epoch"):
            self._source.set_epoch(epoch)

    @property
    def goes_by_its_sampler(self) -> bool:
        """Whether the rest of an epoch is what the sampler says, and not an order that is saved."""
        return self._is_derived()

    def keep_workers(self) -> None:
        """Starts those that persist, if this training had them already: they hold the data set as
        it is now, and not as the hooks of an epoch to come make it.
        """
        if self.persistent_workers and self.position and self._inner is None:
            self._keys.batches = ()
            self._inner = self._make_inner()
            iter(self._inner)

    def _is_derived(self) -> bool:
        return type(self._source) in _DERIVED or _length(self._source) is None

    def __iter__(self) -> Iterator[Any]:
        start = self._start
        self._start = 0
        self.position = start
        for batch in self._read(start):
            self.position += 1
            yield batch

    def _read(self, start: int) -> Iterator[Any]:
        batches = islice(self._batches(), start, None)
        if self._size is None and self._own_batches is None:
            keys: Iterator[Any] = ((self.epoch, index) for index in batches)
        else:
            keys = ([(self.epoch, index) for index in batch] for batch in batches)
        self._keys.batches = keys
        if self._inner is None or not self.persistent_workers:
            self._inner = self._make_inner()
        return iter(self._inner)

    def _batches(self) -> Iterator[Any]:
        """The batches of this epoch and rank, as lists of indices; single indices where the loader
        makes no batches.
        """
        if _length(self._source) is None:
            return self._cut(self._endless())
        if self._order is None:
            self._order = self._whole_order()
        return self._cut(iter(self._order))

    def _whole_order(self) -> list[Any]:
        rank, world_size = self._ranks()
        if (not self.shuffle and self._own_batches is None) or self._is_plain_shuffle():
            order: list[Any] = self._shuffled(_length(self._source) or 0).tolist()
        else:
            with _Randomness(generators_of(self._source)).seeded(derive(self.seed, self.epoch)):
                order = list(self._begun())
        if world_size == 1:
            return order
        return order[rank : self._share(len(order)) * world_size : world_size]

    def _is_plain_shuffle(self) -> bool:
        source = self._source
        if type(source) is not RandomSampler or source.replacement:
            return False
        return source.num_samples == len(source.data_source)

    def _begun(self) -> Iterator[Any]:
        if hasattr(self._source, "set_epoch"):
            self._source.set_epoch(self.epoch)
        return iter(self._source)

    def _endless(self) -> Iterator[Any]:
        rank, world_size = self._ranks()
        randomness = _Randomness(generators_of(self._source))
        with randomness.seeded(derive(self.seed, self.epoch), keep=True):
            source = self._begun()
        number = 0
        while True:
            with randomness.continued():
                try:
                    index = next(source)
                except StopIteration:
                    return
            if number % world_size == rank:
                yield index
            number += 1

    def _cut(self, order: Iterator[Any]) -> Iterator[Any]:
        if self._size is None:
            yield from order
            return
        while True:
            batch = list(islice(order, self._size))
            if not batch or (len(batch) < self._size and self._drops_last):
                return
            yield batch

    def _make_inner(self) -> DataLoader[Any]:
        like = self.loader
        batched = self._size is not None or self._own_batches is not None
        keyed = like.collate_fn not in _PLAIN_COLLATE
        collate = like.collate_fn
        if keyed:
            collate = _SeededCollate(like.collate_fn, self.seed, batched)
        keys = (
            {"batch_sampler": self._keys}
            if batched
            else {"sampler": self._keys, "batch_size": None}
        )
        return DataLoader(
            _SeededByIndex(like.dataset, self.seed, keyed),
            **keys,
            num_workers=like.num_workers,
            collate_fn=collate,
            pin_memory=like.pin_memory,
            timeout=like.timeout,
            worker_init_fn=like.worker_init_fn,
            multiprocessing_context=like.multiprocessing_context,
            prefetch_factor=like.prefetch_factor if like.num_workers else None,
            persistent_workers=like.persistent_workers,
            # Without this, every iterator draws a base seed from the global generator.
            generator=torch.Generator().manual_seed(derive(self.seed, self.epoch)),
        )


def _length(source: Any) -> int | None:
    try:
        return len(source)
    except (TypeError, NotImplementedError):
        return None


def resumable(
    loader: DataLoader[Any],
    *,
    seed: int | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> ResumableLoader:
    """Makes a map-style DataLoader resumable: its order derives from the seed, and its position is
    state.

    Args:
        loader: Its sampler or batch sampler runs under a seed that derives from (seed, epoch). The
            order of a sampler that is no class of torch may depend on more: it is saved for the
            running epoch.
        seed: Of the order and of every sample's randomness; by default that of `seed_everything`.
        rank: Of this process, and `world_size`: by default those of the process group.

    Raises:
        ConfigError: an iterable data set.
    """
    return ResumableLoader(copy.copy(loader), seed=seed, rank=rank, world_size=world_size)
