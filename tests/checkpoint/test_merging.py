"""What each rank has summed up, for another number of ranks."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import CatMetric, MaxMetric, MeanMetric, Metric, MinMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from savepoint.checkpoint.state import merging
from savepoint.checkpoint.state.capture import _metric_state

VALUES = [[1.0, 2.0], [3.0], [8.0, 9.0, 4.0]]  # of three ranks


class Meaning(Metric):
    """Its state is a mean, of as many values as there were updates."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("mean", torch.tensor(0.0), dist_reduce_fx="mean")

    def update(self, value: Tensor) -> None:
        self.mean = (self.mean * (self._update_count - 1) + value) / self._update_count

    def compute(self) -> Tensor:
        return self.mean


class Module(LightningModule):
    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self.metric = metric


def own(metric: Metric | None = None, **more: Any) -> dict[str, Any]:
    states = {} if metric is None else {"metric": _metric_state(metric)}
    return {"metric_states": states, "logged": [], "fetching": {"fetched": 6, "index": 6}} | more


def row(value: float, size: int | None, reduce_fx: str = "mean") -> dict[str, Any]:
    return {
        "log": {"fx": "training_step", "name": "x", "on_epoch": True, "reduce_fx": reduce_fx},
        "dataloader_idx": None,
        "value": torch.tensor(value),
        "size": None if size is None else torch.tensor(size),
    }


@pytest.mark.parametrize("kind", [MeanMetric, SumMetric, MaxMetric, MinMetric, Meaning])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_metric_of_three_ranks_goes_on_on_any_number(kind: type[Metric], ranks: int) -> None:
    owns = []
    for values in VALUES:
        metric = kind()
        for value in values:
            metric.update(torch.tensor(value))
        owns.append(own(metric))
    parts = []
    for rank in range(ranks):
        found, unmerged = merging.merged(owns, Module(kind()), rank, ranks)
        assert unmerged == []
        parts.append(found["metric_states"]["metric"])
    name = next(iter(kind()._defaults))
    if kind in (MeanMetric, SumMetric):
        assert sum(part[name] for part in parts) == 27
        values = [1.0]
    else:  # every rank has the whole: that of all ranks is the same
        assert len({float(part[name]) for part in parts}) == 1
        values = [float(part[name]) for part in parts]
    expected = {MaxMetric: 9.0, MinMetric: 1.0, Meaning: 4.5}
    assert values[0] == expected.get(kind, 1.0)
    assert [part["updates"] for part in parts] == [6] * ranks


def test_a_metric_that_one_rank_has_not_used_counts_as_nothing() -> None:
    used = SumMetric()
    used.update(torch.tensor(5.0))
    found, unmerged = merging.merged([own(), own(used)], Module(SumMetric()), 0, 1)
    assert (found["metric_states"]["metric"]["sum_value"], unmerged) == (5.0, [])


def test_a_metric_that_keeps_a_list_is_named() -> None:
    metric = CatMetric()
    metric.update(torch.tensor([1.0, 2.0]))
    found, unmerged = merging.merged([own(metric), own(metric)], Module(CatMetric()), 0, 1)
    assert unmerged == ["model.metric has a state that cannot be merged (value is a list)"]
    assert found["metric_states"] == {}


def test_a_counted_metric_stays_whole_numbers() -> None:
    metric = MulticlassAccuracy(3, average="micro")
    metric.update(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]))
    found, _ = merging.merged([own(metric)] * 2, Module(MulticlassAccuracy(3)), 0, 4)
    state = found["metric_states"]["metric"]
    assert int(state["tp"].sum()) == 4
    assert state["tp"].dtype == metric.tp.dtype


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_logged_mean_is_shared_out(ranks: int) -> None:
    owns = [own(logged=[row(12.0, 4)]), own(logged=[row(24.0, 8)])]
    shares = [merging.merged(owns, Module(SumMetric()), rank, ranks)[0] for rank in range(ranks)]
    rows = [share["logged"][0] for share in shares]
    assert sum(int(one["size"]) for one in rows) == 12
    assert sum(float(one["value"]) for one in rows) == 36
    assert {float(one["value"] / one["size"]) for one in rows} == {3.0}


@pytest.mark.parametrize(
    ("reduce_fx", "whole"), [("sum", [5.0, 0.0]), ("max", [4.0, 4.0]), ("min", [1.0, 1.0])]
)
def test_other_logged_values_are_those_of_all(reduce_fx: str, whole: list[float]) -> None:
    owns = [own(logged=[row(value, None, reduce_fx)]) for value in (1.0, 4.0)]
    found = [merging.merged(owns, Module(SumMetric()), rank, 2)[0] for rank in (0, 1)]
    assert [float(one["logged"][0]["value"]) for one in found] == whole


def test_what_differs_by_rank_is_named() -> None:
    owns = [own(attributes=[["seen", [1, 2]]]), own(attributes=[["seen", [1, 3]]])]
    assert merging.merged(owns, Module(SumMetric()), 0, 1)[1] == [
        "the ranks had different attributes"
    ]
    owns = [own(attributes=[["seen", torch.ones(2)]]), own(attributes=[["seen", torch.ones(2)]])]
    assert merging.merged(owns, Module(SumMetric()), 0, 1)[1] == []


def test_batches_are_counted_as_each_of_the_ranks_counts_them() -> None:
    found, _ = merging.merged([own(), own()], Module(SumMetric()), 0, 4)
    assert found["fetching"] == {"fetched": 3, "index": 3}
