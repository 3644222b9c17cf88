"""Batches whose order is a function of (seed, epoch) and whose position is state.

Two loaders keep the same four promises, `Batches` (tensors held whole) and `ResumableLoader` (a DataLoader with workers):

- Nothing happens before the first `next()`. Lightning calls `iter()` before `set_epoch()` and not again on a resume, so
  an order fixed in `iter()` would replay epoch 0.
- `at_boundary()` is called when the next batch is asked for: there the last one is complete, and a checkpoint is exact.
- `state_dict()` is the epoch and the number of batches handed out; `load_state_dict()` goes on behind them.
- No draw from the global random state, so that building an iterator anew after a resume shifts nothing.

`len()` is that of the whole epoch, also after a resume: without it Lightning prefetches, and the boundary comes a batch early.
"""

import copy
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler

from savepoint.errors import ConfigError

Augment = Callable[[Tensor, torch.Generator], Tensor]


def derive(*numbers: int) -> int:
    """One 63-bit seed from several numbers, such as (seed, epoch, index): neighbours give unrelated streams."""
    return int(np.random.SeedSequence([n % 2**64 for n in numbers]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _nothing() -> None: ...


class _Resumable:
    """The position in an epoch, and what Lightning and the checkpoint callback call on a loader."""

    batch_sampler = None  # Lightning asks whether it shuffles

    def __init__(self, samples: int, *, batch_size: int, seed: int, shuffle: bool, rank: int, world_size: int) -> None:
        if samples < world_size:
            raise ConfigError(
                f"Too few samples to share: {samples} for {world_size} processes. Expected one for each at least. "
                "Start fewer processes or give more data."
            )
        self.samples, self.batch_size, self.seed, self.shuffle = samples, batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.epoch = self.position = self._start = 0
        self.at_boundary: Callable[[], None] = _nothing

    @property
    def sampler(self) -> "_Resumable | _InOrder":
        """Lightning calls `loader.sampler.set_epoch(epoch)`, and asks whether it shuffles by the sampler's class."""
        return self if self.shuffle else _InOrder(self)

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.position, self._start = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position, self._start = state["epoch"], state["position"], state["position"]

    def __len__(self) -> int:
        # Every rank gets the same number of samples (the remainder of at most world_size - 1 is left out of this epoch):
        # with one batch more on one rank, the others would wait for it for ever.
        return math.ceil(self.samples // self.world_size / self.batch_size)

    def order(self) -> Tensor:
        """The samples of this epoch and rank, in order: int64."""
        if self.shuffle:
            order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(derive(self.seed, self.epoch)))
        else:
            order = torch.arange(self.samples)
        return order[self.rank : self.samples - self.samples % self.world_size : self.world_size]

    def steps(self) -> Iterator[int]:
        """The numbers of the batches that are left, with the boundary called before each."""
        start, self._start = self._start, 0
        for i in range(start, len(self)):
            self.position = i
            self.at_boundary()
            self.position = i + 1
            yield i


class _InOrder(SequentialSampler):
    def __init__(self, loader: _Resumable) -> None:
        super().__init__(range(loader.samples))
        self.set_epoch = loader.set_epoch


class Batches(_Resumable):
    """Batches cut at once from tensors held whole, where these are: CPU or accelerator.

    Args:
        tensors: Of equal first dimension; a batch is a tuple of one slice of each.
        augment: Applied to the first tensor's batch, with a CPU generator seeded from (seed, epoch, batch, rank).
        rank: Of this process. Lightning shards DataLoaders only, so this loader takes every `world_size`-th sample itself.
    """

    def __init__(
        self,
        *tensors: Tensor,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        augment: Augment | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(
            len(tensors[0]), batch_size=batch_size, seed=seed, shuffle=shuffle, rank=rank, world_size=world_size
        )
        self.tensors, self.augment = tensors, augment

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order: Tensor | None = None
        for i in self.steps():
            if order is None:
                order = self.order().to(self.tensors[0].device)
            pick = order[i * self.batch_size : (i + 1) * self.batch_size]
            first, *rest = (tensor[pick] for tensor in self.tensors)
            if self.augment is not None:
                generator = torch.Generator().manual_seed(derive(self.seed, self.epoch, i, self.rank))
                first = self.augment(first, generator)
            yield first, *rest


class _SeededByIndex(Dataset[Any]):
    """Reads sample `index` with every global generator seeded from (seed, epoch, index): any worker gives the same sample."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        seed = derive(self.seed, epoch, index)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        try:
            return self.dataset[index]
        finally:
            # Without workers these are the generators of the training process: dropout must not notice the reading.
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])


class ResumableLoader(_Resumable):
    """A map-style DataLoader whose order derives from (seed, epoch) and whose samples derive from (seed, epoch, index).

    0 and 2 workers give the same batches. A resume in the middle of an epoch reads no sample twice: the inner
    DataLoader gets only the batches that are left. Make one with `resumable`.
    """

    def __init__(
        self, loader: DataLoader[Any], *, seed: int, shuffle: bool, rank: int = 0, world_size: int = 1
    ) -> None:
        if loader.batch_size is None or isinstance(loader.dataset, torch.utils.data.IterableDataset):
            raise ConfigError(
                f"This DataLoader cannot be resumed: {type(loader.dataset).__name__}. Expected a map-style data set and a "
                "batch_size. An iterable data set must keep its own position (state_dict / load_state_dict)."
            )
        samples = len(loader.dataset)  # type: ignore[arg-type]
        super().__init__(
            samples, batch_size=loader.batch_size, seed=seed, shuffle=shuffle, rank=rank, world_size=world_size
        )
        self.loader, self.drop_last = loader, loader.drop_last

    def __len__(self) -> int:
        return self.samples // self.world_size // self.batch_size if self.drop_last else super().__len__()

    def __iter__(self) -> Iterator[Any]:
        batches: Iterator[Any] | None = None
        for i in self.steps():
            if batches is None:
                batches = iter(self._inner(first=i))
            yield next(batches)

    def _inner(self, first: int) -> DataLoader[Any]:
        keys = [(self.epoch, index) for index in self.order().tolist()]
        cuts = range(first * self.batch_size, len(self) * self.batch_size, self.batch_size)
        like = self.loader
        return DataLoader(
            _SeededByIndex(like.dataset, self.seed),
            batch_sampler=[keys[cut : cut + self.batch_size] for cut in cuts],
            num_workers=like.num_workers,
            collate_fn=like.collate_fn,
            pin_memory=like.pin_memory,
            timeout=like.timeout,
            worker_init_fn=like.worker_init_fn,
            multiprocessing_context=like.multiprocessing_context,
            prefetch_factor=like.prefetch_factor if like.num_workers else None,
            # Without a generator of its own, every iterator draws a base seed from the global one.
            generator=torch.Generator().manual_seed(derive(self.seed, self.epoch)),
        )


def resumable(
    loader: DataLoader[Any], *, seed: int | None = None, rank: int = 0, world_size: int = 1
) -> ResumableLoader:
    """Gives a user's own map-style DataLoader an order that is derived and a position that is state.

    Args:
        loader: Whether it shuffles is read from its sampler; a sampler other than torch's random and sequential one is
            refused, since its order could not be derived.
        seed: Of the order and of every sample's randomness; by default the one `seed_everything` set.
    """
    samplers = {RandomSampler: True, SequentialSampler: False}
    shuffle = samplers.get(type(loader.sampler))
    if shuffle is None:
        raise ConfigError(
            f"This DataLoader cannot be resumed: its sampler is a {type(loader.sampler).__name__}. Expected shuffle=True "
            "or shuffle=False, whose order derives from the seed and the epoch. Put the order into the data set."
        )
    seed = torch.initial_seed() if seed is None else seed
    return ResumableLoader(copy.copy(loader), seed=seed, shuffle=shuffle, rank=rank, world_size=world_size)
