"""What every loader of ours has: its position, its seed, its share among the ranks."""

import os
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    SequentialSampler,
)

from savepoint.errors import ConfigError
from savepoint.loaders.randomness import derive
from savepoint.words import plural


class Pass:
    """One way through the batches of the epoch in which its first batch is asked for."""

    def __init__(self, loader: "Resumable", start: int) -> None:
        self._loader = loader
        self._epoch = loader.epoch
        self._batches: Iterator[Any] | None = None
        self.position = start
        self.ended = False

    def __iter__(self) -> "Pass":
        return self

    def __next__(self) -> Any:
        if self._batches is None:
            if self._loader.epoch != self._epoch:
                self.position = 0
            self._batches = self._loader.batches_from(self.position)
        try:
            batch = next(self._batches)
        except StopIteration:
            self.ended = True
            raise
        self.position += 1
        self._loader.moved(self)
        return batch


class Resumable:
    """The position in an epoch, and what Lightning and the checkpoint callback call on a loader.

    The position is that of the training: a hook that goes through the same loader meanwhile, for
    statistics of its batches, say, has a way of its own, from the first batch on.
    """

    batch_sampler = None  # Lightning checks whether it shuffles
    num_workers = 0
    persistent_workers = False

    def __init__(
        self,
        *,
        seed: int | None,
        shuffle: bool,
        rank: int | None,
        world_size: int | None,
        global_batch_size: int | None = None,
    ) -> None:
        self.shuffle = shuffle
        self.global_batch_size = global_batch_size
        self._seed = seed
        self._given = seed is not None
        self._rank = rank
        self._world_size = world_size
        self.epoch = self.position = self._start = 0
        # Weak references: to the pass whose position counts, and to it if it is the training's own.
        self._pass: Any = _nothing
        self._followed: Any = _nothing

    def __iter__(self) -> Iterator[Any]:
        start, self._start = self._start, 0
        begun = Pass(self, start)
        followed = self._followed()
        if followed is None or followed.ended:
            self._pass = weakref.ref(begun)
            self.position = start
        return begun

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_pass": _nothing, "_followed": _nothing}

    def follow(self, iterator: Any) -> None:
        """Only what `iterator`, one of this loader, reads is counted until the epoch ends."""
        if isinstance(iterator, Pass) and iterator is not self._followed():
            self._pass = self._followed = weakref.ref(iterator)
            self.position = iterator.position

    def batches_from(self, start: int) -> Iterator[Any]:
        """Those of the running epoch that are left after the first `start`."""
        raise NotImplementedError

    def moved(self, by: Pass) -> None:
        if self._pass() is by:
            self.position = by.position

    @property
    def seed(self) -> int:
        """By default the seed of `seed_everything`, read when the first batch is requested."""
        if self._seed is None:
            # Before each batch of a global one, the initial seed of this process is set anew.
            is_global = self.global_batch_size is not None and "PL_GLOBAL_SEED" in os.environ
            is_common = self.world_size > 1 or is_global
            common = _common_seed() if is_common else torch.initial_seed()
            self._seed = common % 2**63  # so that a checkpoint holds it as a plain number
        return self._seed

    @property
    def rank(self) -> int:
        if self._rank is not None:
            return self._rank
        return torch.distributed.get_rank() if is_distributed() else 0

    @property
    def world_size(self) -> int:
        if self._world_size is not None:
            return self._world_size
        return torch.distributed.get_world_size() if is_distributed() else 1

    @property
    def sampler(self) -> "Resumable | _InOrder":
        """Lightning calls `loader.sampler.set_epoch(epoch)`, and knows by the sampler's class
        whether it shuffles.
        """
        return self if self.shuffle else _InOrder(self)

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch = epoch
            self.position = 0
            self._start = 0
            self._pass = self._followed = _nothing

    def state_dict(self) -> dict[str, Any]:
        own = {} if self._given or self._seed is None else {"seed": self._seed}
        ranks = {} if self.global_batch_size is None else {"ranks": self.world_size}
        return {"epoch": self.epoch, "position": self.position, **own, **ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._pass = self._followed = _nothing
        self.epoch = state["epoch"]
        self.position = state["position"]
        if self.global_batch_size is not None:
            # As many batches of all ranks together, shared out among those that are here.
            self.position = self.position * state.get("ranks", self.world_size) // self.world_size
        self._start = self.position
        if not self._given:
            self._seed = state.get("seed", self._seed)

    def indices(self, batch: int) -> list[Any] | None:
        """Of the samples in a batch of the running epoch; None where nobody knows them."""
        return None

    def user_parts(self) -> dict[str, Any]:
        """The user's objects, which `look` watches for changes during a training."""
        return {}

    @property
    def micro_batch_size(self) -> int | None:
        """The samples in a batch of this loader; None where they differ."""
        raise NotImplementedError

    def accumulation(self) -> int:
        """How many batches each rank gives to a global batch.

        Raises:
            ConfigError: a number that does not divide.
        """
        size = self.micro_batch_size
        whole = self.global_batch_size
        assert size is not None  # checked when the loader was made
        assert whole is not None
        if whole % (size * self.world_size):
            can = [str(ranks) for ranks in range(1, whole + 1) if whole % (size * ranks) == 0]
            what = f"a batch_size that divides {whole}"
            if can:
                what = f"{', '.join(can[:8])} processes, or another batch_size"
            raise ConfigError(
                f"A global batch cannot be shared: global_batch_size {whole}, in batches of {size} "
                f"on {plural(self.world_size, 'process', 'es')}. Each process must get equally "
                f"many whole batches. Expected {what}."
            )
        return whole // (size * self.world_size)

    def number_of_batch(self, batch: int) -> int:
        """The number of this rank's `batch` among those of all ranks, in the epoch."""
        each = self.accumulation()
        step, within = divmod(batch, each)
        return (step * self.world_size + self.rank) * each + within

    def _of_rank(self, order: Any) -> Any:
        """This rank's part of the samples of an epoch, a tensor or a list.

        Of a global batch each rank has consecutive ones, so that any number of ranks cuts it into
        the same batches. The last incomplete one is left out.
        """
        if self.global_batch_size is None:
            share = self._share(len(order))
            return order[self.rank : share * self.world_size : self.world_size]
        steps = self._steps(len(order))
        places = torch.arange(steps * self.global_batch_size)
        own = places.view(steps, self.world_size, -1)[:, self.rank].flatten()
        return order[own] if isinstance(order, Tensor) else [order[i] for i in own.tolist()]

    def _steps(self, samples: int) -> int:
        """The whole global batches in an epoch."""
        assert self.global_batch_size is not None
        if samples < self.global_batch_size:
            raise ConfigError(
                f"Too few samples for a global batch: {samples}, and global_batch_size is "
                f"{self.global_batch_size}. An epoch needs one whole batch at least. Give a "
                "smaller one or more data."
            )
        return samples // self.global_batch_size

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


def _nothing() -> None: ...


def is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _common_seed() -> int:
    """The seed of all ranks. Each rank's own initial seed may be another one, and the ranks share
    one order.
    """
    return int(os.environ.get("PL_GLOBAL_SEED") or 0)


class _InOrder(SequentialSampler):
    def __init__(self, loader: Resumable) -> None:
        super().__init__(range(len(loader)))  # type: ignore[arg-type]
        self.set_epoch = loader.set_epoch
