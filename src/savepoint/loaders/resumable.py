"""A DataLoader with a position."""

import copy
import math
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from savepoint.errors import ConfigError
from savepoint.loaders.position import Resumable
from savepoint.loaders.randomness import Randomness, derive, generators_of
from savepoint.loaders.seeded import PLAIN_COLLATE, SeededByIndex, SeededCollate

# Samplers whose order is a function of their arguments and the generator. Any other sampler may
# depend on more.
_DERIVED = (
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    DistributedSampler,
)


class _Keys:
    """The batch sampler of the inner DataLoader: the batches that are left in this epoch."""

    def __init__(self) -> None:
        self.batches: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class ResumableLoader(Resumable):
    """A map-style DataLoader whose order derives from (seed, epoch) and whose samples derive from
    (seed, epoch, index).

    Any number of workers gives the same batches. A resume in the middle of an epoch reads no sample
    twice: the inner DataLoader gets only the batches that are left. `resumable` makes one of a
    DataLoader, whose attributes are attributes of this loader too.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        *,
        seed: int | None,
        rank: int | None,
        world_size: int | None,
        global_batch_size: int | None = None,
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
        super().__init__(
            seed=seed,
            shuffle=shuffle,
            rank=rank,
            world_size=world_size,
            global_batch_size=global_batch_size,
        )
        # A batch_sampler that was given leaves these None on the loader.
        self._size = loader.batch_size
        self._drops_last = loader.drop_last
        if self._own_batches is None and isinstance(own, BatchSampler):
            self._indices = own.sampler
            self._size = own.batch_size
            self._drops_last = own.drop_last
        self.num_workers = loader.num_workers
        self.persistent_workers = loader.persistent_workers
        self._order: list[Any] | None = None  # of this epoch; None until it begins
        self._keys = _Keys()
        self._inner: DataLoader[Any] | None = None
        if global_batch_size is not None:
            self._refuse_global()
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
        return {**super().__getstate__(), "_inner": None, "_order": None}

    @property
    def _source(self) -> Any:
        return self._own_batches if self._own_batches is not None else self._indices

    def _ranks(self) -> tuple[int, int]:
        sharded = isinstance(self._source, DistributedSampler)  # already, by the user
        return (0, 1) if sharded else (self.rank, self.world_size)

    def _refuse_global(self) -> None:
        """Raises ConfigError where no global batch can be cut."""
        source = type(self._source).__name__
        why = ""
        if self._own_batches is not None:
            why = f"{source} makes the batches"
        elif self._size is None:
            why = "the DataLoader makes no batches (batch_size is None)"
        elif isinstance(self._source, DistributedSampler):
            why = f"{source} shares the samples among the ranks already"
        elif _length(self._source) is None:
            why = f"{source} has no length"
        if why:
            raise ConfigError(
                f"global_batch_size cannot be kept: {why}. The loader itself shares a global batch "
                "among the ranks. Give a DataLoader with a batch_size and a plain sampler."
            )

    @property
    def micro_batch_size(self) -> int | None:
        return self._size

    def __len__(self) -> int:
        number = _length(self._source)
        if number is None:
            raise TypeError(f"{type(self._source).__name__} has no length")
        if self.global_batch_size is not None:
            return self._steps(number) * self.accumulation()
        _, world_size = self._ranks()
        share = self._share(number) if world_size > 1 else number
        if self._size is None:
            return share
        if self._drops_last:
            return share // self._size
        return math.ceil(share / self._size)

    def indices(self, batch: int) -> list[Any] | None:
        if self._order is None:
            return None
        found = next(islice(self._cut(iter(self._own_order(self._order))), batch, None), None)
        return found if isinstance(found, list | None) else [found]

    def user_parts(self) -> dict[str, Any]:
        return {
            "dataset": self.loader.dataset,
            "sampler": self._source,
            "collate_fn": self.loader.collate_fn,
        }

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self._order is not None and not self._would_be_the_same(self._order):
            state["order"] = self._order
        return state

    def _would_be_the_same(self, order: list[Any]) -> bool:
        """Whether a resume would come to this order of the running epoch by itself.

        That of a user's sampler may depend on anything. The weights of one of torch's, or the
        number of samples, may have changed since the epoch began.
        """
        if not self._is_derived():
            return False
        if self._goes_by_its_length():
            return len(order) == self._length_to_keep()
        return self._order_to_keep() == order

    def _length_to_keep(self) -> int:
        samples = _length(self._source) or 0
        _, world_size = self._ranks()
        whole = self.global_batch_size is not None or world_size == 1
        return samples if whole else self._share(samples)

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
        """Whether the rest of an epoch is what the sampler says, and not an order that is known."""
        return _length(self._source) is None

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

    def batches_from(self, start: int) -> Iterator[Any]:
        yield from self._read(start)

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
            self._order = self._order_to_keep()
        return self._cut(iter(self._own_order(self._order)))

    def _order_to_keep(self) -> list[Any]:
        """Of this rank; with a global batch of all ranks, so that any number of them goes on."""
        whole = self._whole_order()
        _, world_size = self._ranks()
        if self.global_batch_size is not None or world_size == 1:
            return whole
        own: list[Any] = self._of_rank(whole)
        return own

    def _own_order(self, kept: list[Any]) -> list[Any]:
        return kept if self.global_batch_size is None else self._of_rank(kept)

    def _whole_order(self) -> list[Any]:
        if self._goes_by_its_length():
            order: list[Any] = self._shuffled(_length(self._source) or 0).tolist()
        else:
            with Randomness(generators_of(self._source)).seeded(derive(self.seed, self.epoch)):
                order = list(self._begun())
        return order

    def _goes_by_its_length(self) -> bool:
        in_order = not self.shuffle and self._own_batches is None
        return in_order or self._is_plain_shuffle()

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
        randomness = Randomness(generators_of(self._source))
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
        keyed = like.collate_fn not in PLAIN_COLLATE
        collate = like.collate_fn
        if keyed:
            collate = SeededCollate(like.collate_fn, self.seed, batched)
        keys = (
            {"batch_sampler": self._keys}
            if batched
            else {"sampler": self._keys, "batch_size": None}
        )
        return DataLoader(
            SeededByIndex(like.dataset, self.seed, keyed),
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
    global_batch_size: int | None = None,
) -> ResumableLoader:
    """Makes a map-style DataLoader resumable: its order derives from the seed, and its position is
    state.

    Args:
        loader: Its sampler or batch sampler runs under a seed that derives from (seed, epoch). The
            order of a sampler that is no class of torch may depend on more: it is saved for the
            running epoch.
        seed: Of the order and of every sample's randomness; by default that of `seed_everything`.
        rank: Of this process, and `world_size`: by default those of the process group.
        global_batch_size: Samples of an optimizer step on all ranks together, in batches of the
            loader's own size. Each step sees the same samples on any number of ranks that divides
            it; `CheckpointCallback` sets `accumulate_grad_batches`. What is left at the end of an
            epoch, less than a global batch, is left out.

    Raises:
        ConfigError: an iterable data set, or a global batch that cannot be shared.
    """
    return ResumableLoader(
        copy.copy(loader),
        seed=seed,
        rank=rank,
        world_size=world_size,
        global_batch_size=global_batch_size,
    )
