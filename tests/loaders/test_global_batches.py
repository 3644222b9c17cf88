"""A global batch holds the same samples on any number of ranks that divides it."""

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Sampler, TensorDataset

from savepoint import Batches, ResumableLoader, resumable
from savepoint.errors import ConfigError

SAMPLES = 45
GLOBAL = 12
EACH = 2


class Backwards(Sampler[int]):
    """No class of torch: its order is saved."""

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(SAMPLES).tolist())


def whole(rank: int, ranks: int) -> Batches:
    return Batches(
        torch.arange(SAMPLES),
        torch.arange(SAMPLES),
        batch_size=EACH,
        seed=1,
        augment=lambda x, generator: x + torch.rand(x.shape, generator=generator),
        rank=rank,
        world_size=ranks,
        global_batch_size=GLOBAL,
    )


def map_style(rank: int, ranks: int, **arguments: Any) -> ResumableLoader:
    data = TensorDataset(torch.arange(SAMPLES).float(), torch.arange(SAMPLES))
    loader = DataLoader(data, EACH, **({"shuffle": True, "collate_fn": noisy} | arguments))
    return resumable(loader, seed=1, rank=rank, world_size=ranks, global_batch_size=GLOBAL)


def own_sampler(rank: int, ranks: int) -> ResumableLoader:
    return map_style(rank, ranks, shuffle=False, sampler=Backwards())


def noisy(samples: Iterable[Any]) -> tuple[Tensor, Tensor]:
    values, numbers = zip(*samples, strict=True)
    return torch.stack(values) + torch.rand(EACH), torch.stack(numbers)


def steps(loaders: list[Any], epoch: int = 0) -> list[list[tuple[float, int]]]:
    """Of each step, value and number of its samples, over all ranks."""
    of_ranks = []
    for loader in loaders:
        loader.set_epoch(epoch)
        batches = [list(zip(x.tolist(), y.tolist(), strict=True)) for x, y in loader]
        each = loader.accumulation()
        of_ranks.append([joined(batches[i : i + each]) for i in range(0, len(batches), each)])
    return [joined(parts) for parts in zip(*of_ranks, strict=True)]


def joined(lists: Iterable[list[Any]]) -> list[Any]:
    return [one for part in lists for one in part]


MAKE = [whole, map_style, own_sampler]


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_any_number_of_ranks_gives_the_same_steps(make: Any, ranks: int) -> None:
    assert len(make(0, ranks)) == 18 // ranks
    for epoch in (0, 1):
        alone = steps([make(0, 1)], epoch)
        assert steps([make(rank, ranks) for rank in range(ranks)], epoch) == alone
        numbers = [number for step in alone for _, number in step]
        assert len(numbers) == len(set(numbers)) == SAMPLES // GLOBAL * GLOBAL


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize(("was", "now"), [(3, 1), (1, 6), (6, 2), (2, 3)])
def test_another_number_of_ranks_goes_on_behind_the_steps_that_are_done(
    make: Any, was: int, now: int
) -> None:
    alone = steps([make(0, 1)], 1)
    begun = make(0, was)
    begun.set_epoch(1)
    rest = iter(begun)
    for _ in range(begun.accumulation()):  # one step
        next(rest)
    others = [make(rank, now) for rank in range(now)]
    for other in others:
        other.load_state_dict(begun.state_dict())
    assert steps(others, 1) == alone[1:]


def test_one_rank_with_its_batch_as_the_global_one_sees_what_it_would_see_without() -> None:
    plain, of_all = (
        Batches(torch.arange(20), batch_size=4, seed=1, global_batch_size=size)
        for size in (None, 4)
    )
    assert [x.tolist() for (x,) in plain] == [x.tolist() for (x,) in of_all]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: whole(0, 4), "on 4 processes.*Expected 1, 2, 3, 6 processes"),
        (lambda: map_style(0, 4), "on 4 processes.*Expected 1, 2, 3, 6 processes"),
        (lambda: Batches(torch.arange(20), batch_size=5, seed=1, global_batch_size=12), "batch_size that divides 12"),
        (lambda: Batches(torch.arange(8), batch_size=2, seed=1, global_batch_size=12), "Too few samples"),
        (lambda: own(batch_sampler=BatchSampler(range(9), 3, False)), None),
        (lambda: own(batch_sampler=[[1, 2], [3]]), "makes the batches"),
        (lambda: own(batch_size=None), "makes no batches"),
        (lambda: own(batch_size=2, sampler=DistributedSampler(DATA, 2, 0)), "among the ranks already"),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_is_refused(make: Any, said: str | None) -> None:
    if said is None:
        make()
        return
    with pytest.raises(ConfigError, match=said):
        make()


DATA = TensorDataset(torch.arange(24))


def own(**arguments: Any) -> ResumableLoader:
    return resumable(DataLoader(DATA, **arguments), seed=1, global_batch_size=6)
