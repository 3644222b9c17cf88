"""A global batch: any number of ranks that divides it makes the same steps, and with the tree the
same bits.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from support.elastic_ranks import (
    EACH,
    GLOBAL,
    KINDS,
    SAMPLES,
    Model,
    Numbered,
    steps,
    validated,
)
from support.ranks import run_ranks
from support.small import SmallData, fit, rows
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from savepoint import resumable
from savepoint.checkpoint import manifest, store
from savepoint.errors import ConfigError
from savepoint.testing import difference, final_state


@pytest.fixture(autouse=True)
def alone_again() -> Iterator[None]:
    """A training of one process has a group, which the tests after it would find."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def straight(directory: Path, ranks: int, kind: str) -> Path:
    run_ranks("elastic_ranks", ranks, directory, ranks, kind)
    return directory


def points(directory: Path) -> list[Path]:
    """All but the last, at which all is done."""
    return sorted((directory / "points").glob("*.ckpt"))[:-1]


def unequal(whole: Path, resumed: Path, file: Path) -> list[str]:
    """What differs between the steps of a straight run and of one that went on from `file`."""
    begun = manifest.read(file)["step"]
    expected = {step: what for step, what in steps(whole).items() if step >= begun}
    found = steps(resumed)
    words = [] if found == expected else [f"steps: {sorted(found)} and {sorted(expected)}"]
    if not set(validated(resumed)) <= set(validated(whole)):
        words.append(f"validated at {validated(resumed)}, not {validated(whole)}")
    return words


def bits(directory: Path) -> dict[str, Any]:
    state = final_state(directory)
    return {key: state[key] for key in ("state_dict", "optimizer_states", "lr_schedulers")}


def resume(work: Path, ranks: int, kind: str, files: list[Path]) -> None:
    work.mkdir()
    run_ranks("elastic_ranks", ranks, work, ranks, kind, *files)


def same_log(one: Path, other: Path) -> None:
    """Counts are equal; of other numbers the last digit may differ, as ranks are summed up."""
    pairs = zip(rows(one), rows(other), strict=True)
    for first, second in pairs:
        assert first.keys() == second.keys()
        assert first.get("train/accuracy") == second.get("train/accuracy")
        for name in {"train/loss_epoch", "train/losses", "val/loss"} & first.keys():
            assert float(first[name]) == pytest.approx(float(second[name]), rel=1e-5)


@pytest.mark.slow
def test_two_ranks_make_the_steps_of_one(tmp_path: Path) -> None:
    one = straight(tmp_path / "one", 1, "plain")
    two = straight(tmp_path / "two", 2, "plain")
    assert steps(one) == steps(two)
    assert validated(one) == validated(two)
    of_epoch = [
        [number for what in steps(one).values() if what["epoch"] == epoch
         for number, _ in what["samples"]] for epoch in (0, 1)
    ]  # fmt: skip
    assert [len(set(seen)) for seen in of_epoch] == [SAMPLES // GLOBAL * GLOBAL] * 2
    assert of_epoch[0] != of_epoch[1]


def test_the_tree_gives_two_ranks_the_bits_of_one_from_any_point(tmp_path: Path) -> None:
    one = straight(tmp_path / "one", 1, "tree")
    files = points(one)[::4]
    resume(tmp_path / "two", 2, "tree", files)
    for file in files:
        work = tmp_path / "two" / file.stem
        assert unequal(one, work, file) == []
        assert list(difference(bits(one), bits(work))) == []
        assert store.load(points(work)[0])[1]["exact"]
        same_log(one, work)


def test_a_training_that_asks_for_no_number_of_steps_goes_on_where_it_was(tmp_path: Path) -> None:
    """Its loaders are made later than others'."""
    kind = "every second step"
    one = straight(tmp_path / "one", 1, kind)
    files = points(one)[1::4]
    for ranks in (1, 2):
        resume(tmp_path / f"on {ranks}", ranks, kind, files)
        assert [unequal(one, tmp_path / f"on {ranks}" / file.stem, file) for file in files] == [
            [] for _ in files
        ]


def test_another_number_of_ranks_is_not_exact_without_the_tree(tmp_path: Path) -> None:
    one = straight(tmp_path / "one", 1, "plain")
    middle = next(file for file in points(one) if "batch-2" in file.name)
    resume(tmp_path / "two", 2, "plain", [middle])
    work = tmp_path / "two" / middle.stem
    assert unequal(one, work, middle) == []
    first = manifest.read(points(work)[0])
    assert (first["exact"], first["elastic"]) == (False, "same samples")
    assert first["unsaved"] == [
        "this epoch was begun by another number of processes, whose sums have other bits"
    ]
    assert manifest.read(points(work)[-1])["exact"]
    weights = [final_state(directory)["state_dict"] for directory in (one, work)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=1e-5)


def test_ranks_that_share_a_model_hand_it_to_one_process_and_take_it_back(tmp_path: Path) -> None:
    two = straight(tmp_path / "two", 2, "shards")
    begun = points(two)[1]
    resume(tmp_path / "one", 1, "shards", [begun])
    one = tmp_path / "one" / begun.stem
    assert unequal(two, one, begun) == []
    handed_back = points(one)[0]
    resume(tmp_path / "again", 2, "shards", [handed_back])
    assert unequal(two, tmp_path / "again" / handed_back.stem, handed_back) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_makes_the_same_steps_at_four_ranks_from_any_point(
    tmp_path: Path, kind: str
) -> None:
    one = straight(tmp_path / "one", 1, kind)
    four = straight(tmp_path / "four", 4, kind)
    assert steps(one) == steps(four)
    assert validated(one) == validated(four)
    for begun, ranks in ((four, 2), (four, 1), (one, 4)):
        files = points(begun)[::3]
        resume(tmp_path / f"{begun.name}-{ranks}", ranks, kind, files)
        for file in files:
            work = tmp_path / f"{begun.name}-{ranks}" / file.stem
            assert unequal(begun, work, file) == []
            if "tree" in KINDS[kind]:
                assert list(difference(bits(begun), bits(work))) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "shares of ddp, in a tree"])
def test_eight_ranks_become_four_two_one_and_eight_again_in_mid_epoch(
    tmp_path: Path, kind: str
) -> None:
    eight = straight(tmp_path / "eight", 8, kind)
    work = eight
    for ranks, step in ((4, 1), (2, 2), (1, 3), (8, 5)):
        file = next(one for one in points(work) if f"batch-{step}" in one.name)
        resume(tmp_path / f"{ranks}-from-{step}", ranks, kind, [file])
        work = tmp_path / f"{ranks}-from-{step}" / file.stem
        assert unequal(eight, work, file) == []
        if "tree" in KINDS[kind]:
            assert list(difference(bits(eight), bits(work))) == []
            assert manifest.read(points(work)[0])["exact"]


class Data(Numbered):
    """As a user's own, with any loader."""

    def __init__(self, make: Callable[[TensorDataset], Any]) -> None:
        super().__init__()
        self.make = make
        self.global_batch_size = GLOBAL

    def train_dataloader(self) -> Any:
        return self.make(TensorDataset(self.x, self.y, self.number))


class Stream:
    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return iter(DataLoader(self.data, EACH))


class Manual(Model):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Normed(Model):
    def __init__(self) -> None:
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(16))


class Skipping(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss if batch_idx % 2 else None


class Twice(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


class ByTwice(Model):
    def configure_optimizers(self) -> Any:
        return Twice(self.parameters(), lr=0.1)


def shared(data: TensorDataset, **arguments: Any) -> Any:
    return resumable(DataLoader(data, EACH), seed=1, **{"global_batch_size": GLOBAL} | arguments)


@pytest.mark.parametrize(
    ("said", "given"),
    [
        ("accumulate_grad_batches is 3, and the global batch makes it 8", {"accumulate_grad_batches": 3}),
        ("does not know it: DataLoader", {"make": lambda data: DataLoader(data, EACH)}),
        ("does not know it: Stream", {"make": Stream}),
        ("does not know it: ResumableLoader", {"make": lambda data: shared(data, global_batch_size=None)}),
        ("some give another number", {"make": lambda data: [shared(data), shared(data, global_batch_size=4)]}),
        ("some give another number", {"make": lambda data: [shared(data), shared(data, global_batch_size=None)]}),
        ("the module itself steps", {"model": Manual}),
        ("changes what a step is", {"callbacks": lambda: [GradientAccumulationScheduler({0: 1})]}),
        ("has 5 steps", {"val_check_interval": 6}),
        ("less than one", {"limit_train_batches": 0.1}),
        ("elastic_ddp, and no training loader", {"data": SmallData, "strategy": "elastic_ddp"}),
        ("model.net.1.* is changed by a training step", {"model": Normed, "strategy": "elastic_ddp"}),
        ("training_step returned nothing", {"model": Skipping, "strategy": "elastic_ddp"}),
        ("Not a tree of 8 batches: 1 gave", {"model": ByTwice, "strategy": "elastic_ddp"}),
        ("elastic_ddp with 6 batches", {"make": lambda data: shared(data, global_batch_size=12), "strategy": "elastic_ddp"}),
    ],
)  # fmt: skip
def test_what_goes_with_no_global_batch_is_refused(
    tmp_path: Path, said: str, given: dict[str, Any]
) -> None:
    make = given.pop("make", shared)
    with pytest.raises(ConfigError, match=said) as raised:
        fit(tmp_path, **{"model": Model, "data": lambda: Data(make), "max_epochs": 1} | given)
    assert len(str(raised.value)) < 500
