"""Batches of data that are held whole."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from savepoint.loaders.position import Resumable
from savepoint.loaders.randomness import derive

Augment = Callable[[Tensor, torch.Generator], Tensor]


class Batches(Resumable):
    """Batches cut from whole tensors, on the device that holds them.

    Args:
        tensors: Of equal first dimension; a batch is a tuple of one slice of each.
        augment: Applied to the first tensor's batch, with a CPU generator seeded from (seed, epoch,
            batch, rank), or from the number of the batch on all ranks with `global_batch_size`.
        rank: Of this process, and `world_size`: by default those of the process group. Lightning
            shards DataLoaders only, so this loader takes every `world_size`-th sample itself.
        global_batch_size: Samples of an optimizer step on all ranks together: as `resumable`'s.
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
        global_batch_size: int | None = None,
    ) -> None:
        super().__init__(
            seed=seed,
            shuffle=shuffle,
            rank=rank,
            world_size=world_size,
            global_batch_size=global_batch_size,
        )
        self.tensors = tensors
        self.augment = augment
        self.samples = len(tensors[0])
        self.batch_size = batch_size
        len(self)

    @property
    def micro_batch_size(self) -> int:
        return self.batch_size

    def __len__(self) -> int:
        if self.global_batch_size is not None:
            return self._steps(self.samples) * self.accumulation()
        return math.ceil(self._share(self.samples) / self.batch_size)

    def order(self) -> Tensor:
        """The samples of this epoch and rank, in order: int64."""
        order: Tensor = self._of_rank(self._shuffled(self.samples))
        return order

    def indices(self, batch: int) -> list[Any]:
        samples: list[Any] = self.order()[batch * self.batch_size :][: self.batch_size].tolist()
        return samples

    def user_parts(self) -> dict[str, Any]:
        return {"augment": self.augment}

    def batches_from(self, start: int) -> Iterator[tuple[Tensor, ...]]:
        order = self.order().to(self.tensors[0].device)
        for i in range(start, len(self)):
            pick = order[i * self.batch_size : (i + 1) * self.batch_size]
            first, *rest = (tensor[pick] for tensor in self.tensors)
            if self.augment is not None:
                generator = torch.Generator().manual_seed(self._seed_of(i))
                first = self.augment(first, generator)
            yield first, *rest

    def _seed_of(self, batch: int) -> int:
        if self.global_batch_size is None:
            return derive(self.seed, self.epoch, batch, self.rank)
        return derive(self.seed, self.epoch, self.number_of_batch(batch), 0)
