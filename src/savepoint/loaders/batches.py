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

    def indices(self, batch: int) -> list[Any]:
        samples: list[Any] = self.order()[batch * self.batch_size :][: self.batch_size].tolist()
        return samples

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
