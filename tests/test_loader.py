"""Order is a function of (seed, epoch), position is state."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

from savepoint.errors import ConfigError
from savepoint.loader import Batches, ResumableLoader, resumable


class Noisy(Dataset[tuple[Tensor, int]]):
    """Sample i is i, with noise from every global generator."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(2) + random.random() + np.random.rand(), index


def batches(**arguments: Any) -> Batches:
    return Batches(torch.arange(23), **({"batch_size": 5, "seed": 1} | arguments))


def map_style(workers: int = 0, **arguments: Any) -> ResumableLoader:
    return resumable(DataLoader(Noisy(), 5, shuffle=True, num_workers=workers), seed=1, **arguments)


def samples(loader: Any, epoch: int = 0) -> list[int]:
    loader.sampler.set_epoch(epoch)
    return [int(i) for batch in loader for i in batch[-1]]


@pytest.mark.parametrize("make", [batches, map_style])
class TestBoth:
    def test_an_epoch_holds_every_sample_once(self, make: Any) -> None:
        assert sorted(samples(make())) == list(range(23))
        assert len(make()) == 5

    def test_epochs_differ_and_return(self, make: Any) -> None:
        loader = make()
        first, second = samples(loader, 0), samples(loader, 1)
        assert first != second
        assert samples(loader, 0) == first == samples(make(), 0)

    def test_a_set_position_gives_the_rest_of_the_epoch(self, make: Any) -> None:
        whole = make()
        whole.set_epoch(3)
        iterator = iter(whole)
        expected = [next(iterator) for _ in range(5)]
        part = make()
        part.load_state_dict({"epoch": 3, "position": 2})
        rest = iter(part)
        part.set_epoch(3)  # as Lightning does: iter() first, and the epoch that was restored
        for before, after in zip(expected[2:], rest, strict=True):
            assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(before, after, strict=True))

    def test_nothing_happens_before_the_first_batch_is_asked_for(self, make: Any) -> None:
        loader = make()
        iterator = iter(loader)
        loader.set_epoch(2)
        assert [int(i) for batch in iterator for i in batch[-1]] == samples(make(), 2)

    def test_the_boundary_is_called_with_the_number_of_batches_that_are_complete(self, make: Any) -> None:
        loader, seen = make(), []
        loader.at_boundary = lambda: seen.append(loader.state_dict()["position"])
        for number, _ in enumerate(loader, 1):
            assert loader.state_dict()["position"] == number
        assert seen == [0, 1, 2, 3, 4]

    def test_ranks_share_an_epoch_in_batches_of_equal_number(self, make: Any) -> None:
        ranks = [make(rank=rank, world_size=2) for rank in (0, 1)]
        parts = [samples(loader) for loader in ranks]
        assert [len(part) for part in parts] == [11, 11]
        assert len({*parts[0], *parts[1]}) == 22
        assert len(ranks[0]) == len(ranks[1]) == 3

    def test_iterating_draws_nothing_from_the_global_generators(self, make: Any) -> None:
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        samples(make())
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]


def test_zero_and_two_workers_give_the_same_batches_from_the_middle_of_an_epoch_too() -> None:
    given = []
    for workers in (0, 2):
        loader = map_style(workers)
        loader.load_state_dict({"epoch": 1, "position": 2})
        given.append(list(loader))
    assert len(given[0]) == 3
    for one, other in zip(*given, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_augmentation_is_a_function_of_seed_epoch_and_batch() -> None:
    def noise(first: Tensor, generator: torch.Generator) -> Tensor:
        return first + torch.rand(len(first), generator=generator)

    loader = batches(augment=noise)
    whole = list(loader)
    loader.load_state_dict({"epoch": 0, "position": 3})
    torch.rand(7)  # whatever else draws
    assert [batch[0].tolist() for batch in loader] == [batch[0].tolist() for batch in whole[3:]]
    loader.set_epoch(1)
    assert next(iter(loader))[0].frac().tolist() != whole[0][0].frac().tolist()


def test_an_order_that_cannot_be_derived_is_refused() -> None:
    with pytest.raises(ConfigError, match="WeightedRandomSampler"):
        resumable(DataLoader(Noisy(), 5, sampler=WeightedRandomSampler([1.0] * 23, 23)))
    with pytest.raises(ConfigError, match="batch_size"):
        resumable(DataLoader(Noisy(), batch_size=None))


def test_more_processes_than_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="23 for 24"):
        batches(world_size=24)
