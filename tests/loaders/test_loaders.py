"""Order is a function of (seed, epoch), position is state."""

import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from savepoint import Batches, ResumableLoader, resumable
from savepoint.errors import ConfigError
from savepoint.loaders.randomness import generators_of


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
            assert all(
                torch.equal(torch.as_tensor(a), torch.as_tensor(b))
                for a, b in zip(before, after, strict=True)
            )

    def test_nothing_happens_before_the_first_batch_is_asked_for(self, make: Any) -> None:
        loader = make()
        iterator = iter(loader)
        loader.set_epoch(2)
        assert [int(i) for batch in iterator for i in batch[-1]] == samples(make(), 2)

    def test_the_position_is_the_number_of_batches_that_were_handed_out(self, make: Any) -> None:
        loader = make()
        for number, _ in enumerate(loader, 1):
            assert loader.state_dict()["position"] == number

    def test_a_pass_begun_in_one_epoch_and_asked_in_another_begins_at_its_first_batch(
        self, make: Any
    ) -> None:
        loader = make()
        loader.load_state_dict({"epoch": 0, "position": 3})
        iterator = iter(loader)
        loader.set_epoch(2)
        assert [int(i) for batch in iterator for i in batch[-1]] == samples(make(), 2)

    def test_a_hook_that_goes_through_the_loader_meanwhile_moves_no_position(
        self, make: Any
    ) -> None:
        loader = make()
        own = iter(loader)
        loader.follow(own)
        next(own)
        next(own)
        assert [int(i) for batch in loader for i in batch[-1]] == samples(make())
        assert loader.state_dict()["position"] == 2
        next(own)
        assert loader.state_dict()["position"] == 3

    def test_a_hook_that_comes_first_after_a_resume_leaves_the_rest_to_the_training(
        self, make: Any
    ) -> None:
        expected = [batch[-1].tolist() for batch in make()]
        loader = make()
        loader.load_state_dict({"epoch": 0, "position": 3})
        own = iter(loader)  # as Lightning does, when it sets up its data
        loader.follow(own)
        assert [batch[-1].tolist() for batch in loader] == expected
        assert loader.state_dict()["position"] == 3
        assert [batch[-1].tolist() for batch in own] == expected[3:]

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


class EveryOther(Sampler[int]):
    """Goes by a count of its own, and draws from the global generator and from one of its own."""

    def __init__(self) -> None:
        self.passes, self.generator = 0, np.random.default_rng(5)

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        first = int(torch.randint(2, ())) + int(self.generator.integers(2))
        return iter([(first + self.passes + 2 * i) % 23 for i in range(12)])


WEIGHTS = [float(i % 3 + 1) for i in range(23)]
SAMPLERS: dict[str, Callable[[], dict[str, Any]]] = {
    "replacement": lambda: {"sampler": RandomSampler(range(23), replacement=True, num_samples=17)},
    "weighted": lambda: {"sampler": WeightedRandomSampler(WEIGHTS, 15)},
    "subset": lambda: {"sampler": SubsetRandomSampler([1, 3, 5, 7, 9, 11])},
    "own": lambda: {"sampler": EveryOther()},
    "batches of a random one": lambda: {
        "batch_sampler": BatchSampler(RandomSampler(range(23)), 5, True)
    },
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_any_sampler_runs_under_a_seed_that_is_derived(name: str) -> None:
    def make() -> ResumableLoader:
        given = SAMPLERS[name]()
        size = {} if "batch_sampler" in given else {"batch_size": 4}
        return resumable(DataLoader(Noisy(), **size, **given), seed=1)

    whole = make()
    whole.set_epoch(2)
    iterator = iter(whole)
    expected = [batch[1].tolist() for batch in islice(iterator, 2)]
    position = whole.state_dict()
    expected_rest = [batch[1].tolist() for batch in iterator]
    torch.rand(3)
    rest = make()
    rest.load_state_dict(position)
    assert [batch[1].tolist() for batch in rest] == expected_rest
    again = make()
    again.set_epoch(2)
    assert [batch[1].tolist() for batch in again] == expected + expected_rest


def weighted(weights: Tensor) -> ResumableLoader:
    sampler = WeightedRandomSampler(weights, 23)
    return resumable(DataLoader(Noisy(), 5, sampler=sampler), seed=1)


def test_weights_that_change_in_mid_epoch_change_the_order_of_the_next_one_alone() -> None:
    weights = torch.ones(23, dtype=torch.double)
    loader = weighted(weights)
    iterator = iter(loader)
    next(iterator)
    assert "order" not in loader.state_dict()  # it derives from the seed
    weights[:20] = 0
    state = loader.state_dict()
    expected = [batch[-1].tolist() for batch in iterator]
    resumed = weighted(weights)
    resumed.load_state_dict(state)
    assert [batch[-1].tolist() for batch in resumed] == expected


def test_samples_that_are_added_in_mid_epoch_come_in_the_next_one() -> None:
    rows = list(range(12))
    loader = resumable(DataLoader(rows, 4, shuffle=True), seed=1)  # type: ignore[arg-type]
    iterator = iter(loader)
    next(iterator)
    rows.append(12)
    state = loader.state_dict()
    expected = [batch.tolist() for batch in iterator]
    resumed = resumable(DataLoader(rows, 4, shuffle=True), seed=1)  # type: ignore[arg-type]
    resumed.load_state_dict(state)
    assert [batch.tolist() for batch in resumed] == expected


class Owning(Noisy):
    """Draws from generators of its own."""

    def __init__(self) -> None:
        self.generator, self.transforms = np.random.default_rng(3), [random.Random(4)]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        drawn = float(self.generator.normal()) + self.transforms[0].random()
        return torch.full((2,), drawn), index


def mixed(samples: list[Any]) -> tuple[Tensor, Tensor]:
    xs, indices = default_collate(samples)
    return xs + torch.rand(()) + float(np.random.rand()), indices


@pytest.mark.parametrize("arguments", [{}, {"collate_fn": mixed}], ids=["samples", "batches"])
def test_what_samples_and_batches_draw_is_the_same_with_workers_that_stay_or_go_and_without(
    arguments: dict[str, Any],
) -> None:
    given = []
    for workers in ({}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}):
        loader = resumable(DataLoader(Owning(), 5, shuffle=True, **workers, **arguments), seed=1)
        found = []
        for epoch in (0, 1):
            loader.set_epoch(epoch)
            found.append([batch[0].tolist() for batch in loader])
        given.append(found)
    assert given[0] == given[1] == given[2]
    assert given[0][0] != given[0][1]


def test_generators_are_found_beside_modules_and_empty_cells() -> None:
    def holding() -> Any:
        def transform() -> Any:
            return late

        owner = Noisy()
        owner.library, owner.transform, owner.own = np, transform, random.Random(3)  # type: ignore[attr-defined]
        if owner is None:
            late = 1  # never bound: its cell stays empty
        return owner

    owner = holding()
    assert generators_of(owner) == [owner.own]


def test_without_a_seed_the_order_is_state() -> None:
    torch.manual_seed(8)
    straight = resumable(DataLoader(Noisy(), 5, shuffle=True))
    iterator = iter(straight)
    next(iterator)
    state = straight.state_dict()
    torch.manual_seed(9)  # another process
    resumed = resumable(DataLoader(Noisy(), 5, shuffle=True))
    resumed.load_state_dict(state)
    assert [b[1].tolist() for b in resumed] == [b[1].tolist() for b in iterator]


def test_an_iterable_data_set_is_refused_as_nobody_else_knows_its_place() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(4))

    with pytest.raises(ConfigError, match=r"Stream.*state_dict"):
        resumable(DataLoader(Stream()))


def test_more_processes_than_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="23 for 24"):
        batches(world_size=24)
