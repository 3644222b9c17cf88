"""What reads samples, with draws that are functions of (seed, epoch) and of what is read."""

import zlib
from collections.abc import Callable
from typing import Any

from torch.utils.data import (
    Dataset,
    default_collate,
    default_convert,
)

from savepoint.loaders.randomness import Randomness, derive, generators_of

PLAIN_COLLATE = (default_collate, default_convert)


class SeededByIndex(Dataset[Any]):
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
        self._randomness: Randomness | None = None

    def __getitem__(self, key: tuple[int, Any]) -> Any:
        epoch, index = key
        if self._randomness is None:
            self._randomness = Randomness(generators_of(self.dataset))
        with self._randomness.seeded(derive(self.seed, epoch, number_of(index))):
            sample = self.dataset[index]
        return (key, sample) if self.keyed else sample

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_randomness": None}


class SeededCollate:
    """Collates with every generator seeded from (seed, epoch, first index of the batch), as MixUp
    needs it.
    """

    def __init__(self, collate: Callable[[Any], Any], seed: int, batched: bool) -> None:
        self.collate = collate
        self.seed = seed
        self.batched = batched
        self._randomness: Randomness | None = None  # as in SeededByIndex

    def __call__(self, keyed: Any) -> Any:
        if not self.batched:
            (epoch, index), samples = keyed
        else:
            (epoch, index), _ = keyed[0]
            samples = [sample for _, sample in keyed]
        seed = derive(self.seed, epoch, number_of(index), len(samples) if self.batched else 0, 1)
        if self._randomness is None:
            self._randomness = Randomness(generators_of(self.collate))
        with self._randomness.seeded(seed):
            return self.collate(samples)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_randomness": None}


def number_of(index: Any) -> int:
    """A number for an index, which may be any object that the data set takes."""
    return index if isinstance(index, int) else zlib.crc32(repr(index).encode())
