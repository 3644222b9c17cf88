"""Loaders made resumable: every sampler, random samples and collate functions, workers or none."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import data as d
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset, default_collate

from shapes.base import BATCH, TRAIN, VAL, Data, Samples, Shape, data, resumable, shuffled, tensors


class Globally(Sampler[int]):
    """Draws from torch's global generator."""

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(TRAIN).tolist()

    def __len__(self) -> int:
        return TRAIN


class Own(Globally):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(TRAIN, generator=self.generator).tolist()


class NumpyOwn(Globally):
    def __init__(self) -> None:
        self.rng = np.random.default_rng(4)

    def __iter__(self) -> Iterator[int]:
        yield from self.rng.permutation(TRAIN).tolist()


class ByEpoch(Globally):
    """As DistributedSampler does: the order is one of the epoch that it is told."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        yield from np.random.default_rng(self.epoch).permutation(TRAIN).tolist()


class HardFirst(Globally):
    """Curriculum: grows with the number of times it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __iter__(self) -> Iterator[int]:
        self.asked += 1
        yield from sorted(range(TRAIN), key=lambda i: (i * self.asked) % 7)


class Buckets(Sampler[list[int]]):
    """A batch sampler of its own, whose batches are of different sizes."""

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(TRAIN).tolist()
        yield from (order[:6], order[6:8], *(order[i : i + 4] for i in range(8, TRAIN, 4)))

    def __len__(self) -> int:
        return 10


class Noisy(Samples):
    """Each sample is random, by `draw`."""

    def __init__(self, draw: Callable[[], float], count: int = TRAIN) -> None:
        super().__init__(count, 0 if count == TRAIN else 1)
        self.draw = draw

    def __getitem__(self, index: int) -> Any:
        return self.x[index] + 0.1 * self.draw(), self.y[index]


class OwnNumpy(Samples):
    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(0)

    def __getitem__(self, index: int) -> Any:
        return self.x[index] + 0.1 * float(self.rng.normal()), self.y[index]


class OwnTorch(OwnNumpy):
    def __init__(self) -> None:
        super().__init__()
        self.rng = torch.Generator().manual_seed(0)

    def __getitem__(self, index: int) -> Any:
        return self.x[index] + 0.1 * torch.randn(4, generator=self.rng), self.y[index]


class OwnRandom(OwnNumpy):
    def __init__(self) -> None:
        super().__init__()
        self.rng = random.Random(0)

    def __getitem__(self, index: int) -> Any:
        return self.x[index] + 0.1 * self.rng.gauss(0, 1), self.y[index]


class Jitter:
    """A transform with a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)

    def __call__(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn(x.shape, generator=self.generator)


class Transformed(Samples):
    def __init__(self, *transforms: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.transforms = transforms

    def __getitem__(self, index: int) -> Any:
        x = self.x[index]
        for transform in self.transforms:
            x = transform(x)
        return x, self.y[index]


class Counting(Samples):
    """Changes with each sample that was read."""

    reads = 0

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        return self.x[index] * (1 + 0.01 * self.reads), self.y[index]


def mix_up(samples: list[Any]) -> Any:
    x, y = default_collate(samples)
    share, other = float(np.random.beta(0.4, 0.4)), torch.randperm(len(x))
    return share * x + (1 - share) * x[other], share * y + (1 - share) * y[other]


def cut_off(samples: list[Any]) -> Any:
    x, y = default_collate(samples)
    return x * (torch.rand(4) > 0.2), y + random.random() * 0.1


class MixUp:
    """A collate function with a generator of its own."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def __call__(self, samples: list[Any]) -> Any:
        x, y = default_collate(samples)
        share = float(self.rng.beta(0.4, 0.4))
        return share * x + (1 - share) * x.flip(0), share * y + (1 - share) * y.flip(0)


def sampled(sampler: Callable[[Any], Any], **arguments: Any) -> Shape:
    def train() -> Any:
        samples = TensorDataset(*tensors())
        return resumable(DataLoader(samples, BATCH, sampler=sampler(samples), **arguments))

    return Shape(data=data(train), slow="num_workers" in arguments)


def read(samples: Callable[[], Dataset[Any]], trainer: Any = None, **arguments: Any) -> Shape:
    make = data(lambda: resumable(DataLoader(samples(), BATCH, shuffle=True, **arguments)))
    return Shape(data=make, trainer=trainer or {}, slow="num_workers" in arguments)


def in_batches(batches: Callable[[], Any]) -> Shape:
    def train() -> Any:
        return resumable(DataLoader(TensorDataset(*tensors()), batch_sampler=batches()))

    return Shape(data=data(train))


def noisy_val(draw: Callable[[], float], **arguments: Any) -> Shape:
    val = lambda: DataLoader(Noisy(draw, VAL), BATCH, **arguments)  # noqa: E731
    return Shape(data=lambda: Data(shuffled, val), trainer=TWO_EPOCHS, slow=bool(arguments))


def by_torch() -> float:
    return float(torch.randn(()))


def by_numpy() -> float:
    return float(np.random.normal())


TWO_EPOCHS = {"max_epochs": 2}
WORKERS: dict[str, Any] = {"num_workers": 2}
KEPT: dict[str, Any] = {"num_workers": 2, "persistent_workers": True}
SHAPES = {
    "random": sampled(d.RandomSampler),
    "random_replacement": sampled(lambda s: d.RandomSampler(s, replacement=True)),
    "random_fewer": sampled(lambda s: d.RandomSampler(s, num_samples=24)),
    "random_more": sampled(lambda s: d.RandomSampler(s, replacement=True, num_samples=56)),
    "random_generator": sampled(
        lambda s: d.RandomSampler(s, generator=torch.Generator().manual_seed(9)),
    ),
    "sequential": sampled(d.SequentialSampler),
    "weighted": sampled(lambda s: d.WeightedRandomSampler(torch.arange(40.0) + 1, 40)),
    "weighted_fewer": sampled(lambda s: d.WeightedRandomSampler([1.0] * 40, 28, replacement=False)),
    "subset": sampled(lambda s: d.SubsetRandomSampler(range(0, 40, 2))),
    "global": sampled(lambda s: Globally()),
    "own_generator": sampled(lambda s: Own()),
    "own_numpy": sampled(lambda s: NumpyOwn()),
    "by_epoch": sampled(lambda s: ByEpoch()),
    "counts_epochs": sampled(lambda s: HardFirst()),
    "weighted_workers": sampled(
        lambda s: d.WeightedRandomSampler(torch.arange(40.0) + 1, 40),
        **WORKERS,
    ),
    "batch_sampler": in_batches(
        lambda: d.BatchSampler(d.RandomSampler(range(TRAIN)), BATCH, drop_last=False),
    ),
    "batch_sampler_weighted": in_batches(
        lambda: d.BatchSampler(d.WeightedRandomSampler([1.0, 3.0] * 20, 40), 3, drop_last=True),
    ),
    "batch_sampler_own": in_batches(Buckets),
    "drop_last": read(lambda: Samples(38), drop_last=True),
    "rest_kept": read(lambda: Samples(38)),
    "generator_given": Shape(
        data=data(
            lambda: resumable(
                DataLoader(
                    Samples(),
                    BATCH,
                    shuffle=True,
                    generator=torch.Generator().manual_seed(11),
                )
            )
        )
    ),
    "noise_torch": read(lambda: Noisy(by_torch)),
    "noise_numpy": read(lambda: Noisy(by_numpy)),
    "noise_random": read(lambda: Noisy(random.random)),
    "noise_own_numpy": read(OwnNumpy),
    "noise_own_torch": read(OwnTorch),
    "noise_own_random": read(OwnRandom),
    "noise_transform": read(lambda: Transformed(Jitter())),
    "noise_two_transforms": read(lambda: Transformed(Jitter(), lambda x: x + by_numpy(), Jitter())),
    "noise_subset": read(lambda: d.Subset(OwnNumpy(), range(32))),
    "noise_concatenated": read(lambda: d.ConcatDataset([OwnNumpy(), OwnTorch()])),
    "counts_reads": read(Counting),
    "mix_up": read(Samples, collate_fn=mix_up),
    "cut_off": read(Samples, collate_fn=cut_off),
    "mix_up_own": Shape(
        data=data(
            lambda: resumable(
                DataLoader(Samples(), BATCH, shuffle=True, collate_fn=MixUp()),
            ),
        ),
    ),
    "mix_up_val_interval": read(Samples, {"val_check_interval": 3}, collate_fn=mix_up),
    "workers": read(Samples, TWO_EPOCHS, **WORKERS),
    "workers_noise": read(lambda: Noisy(by_numpy), TWO_EPOCHS, **WORKERS),
    "workers_own_numpy": read(OwnNumpy, TWO_EPOCHS, **WORKERS),
    "workers_mix_up": read(Samples, TWO_EPOCHS, collate_fn=mix_up, **WORKERS),
    "persistent_own_torch": read(OwnTorch, TWO_EPOCHS, **KEPT),
    "val_noise": noisy_val(by_torch),
    "val_noise_shuffled": noisy_val(by_numpy, shuffle=True),
    "val_workers_noise": noisy_val(by_torch, **WORKERS),
    "val_persistent": Shape(
        data=lambda: Data(shuffled, lambda: DataLoader(Samples(VAL, 1), BATCH, **KEPT)),
        trainer=TWO_EPOCHS,
        slow=True,
    ),
    "val_persistent_noise": noisy_val(by_numpy, **KEPT),
    "unseeded": Shape(seeded=False),
    "unseeded_noise": Shape(
        data=data(lambda: resumable(DataLoader(Noisy(by_numpy), BATCH, shuffle=True))),
        seeded=False,
    ),
    "unseeded_val_shuffled": Shape(
        data=lambda: Data(shuffled, lambda: DataLoader(Samples(VAL, 1), BATCH, shuffle=True)),
        seeded=False,
    ),
}
