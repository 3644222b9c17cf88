"""The state of all ranks, for another number of them.

With a global batch the place in the data is one for all, and what is drawn derives from it. Left
are sums: the first rank gets those of all, and every rank gets what is the first one's otherwise.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_max, dim_zero_mean, dim_zero_min, dim_zero_sum

from savepoint.checkpoint.state.capture import metrics_of

# Of the state of a rank, what all ranks have alike, or what no other number of them can be given.
_ALIKE = ("attributes", "loaders_made", "settings", "found", "groups", "trackers", "toggled")
_IN_BATCHES = ("accumulate_grad_batches", "val_check_batch", "max_batches")
_COUNTED = ("ready", "started", "processed", "completed", "fetched", "index", "batch")
_EXTREMES: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    dim_zero_max: torch.maximum,
    dim_zero_min: torch.minimum,
}


def merged(
    owns: Sequence[Mapping[str, Any]], module: LightningModule, rank: int, ranks: int
) -> tuple[dict[str, Any], list[str]]:
    """The state for one of `ranks` ranks, of what each rank had when a checkpoint was made.

    Returns:
        That state, and words for what could not be merged.
    """
    first = dict(owns[0])
    unmerged = [
        f"the ranks had different {name}"
        for name in _ALIKE
        if any(not same(first.get(name), own.get(name)) for own in owns[1:])
    ]
    unmerged += [
        f"trainer.{name} was changed in the training"
        for name in _IN_BATCHES
        if name in first.get("settings", {})
    ]
    first["metric_states"] = {}
    for name, metric in metrics_of(module).items():
        states = [own["metric_states"].get(name) for own in owns]
        there = [state for state in states if state is not None]
        if not there:
            continue
        try:
            first["metric_states"][name] = _metric(metric, there, rank)
        except _NoSumError as error:
            unmerged.append(f"model.{name} has a state that cannot be merged ({error})")
    rows = [_by_name(own["logged"]) for own in owns]
    first["logged"] = [
        _row(row, [other[name] for other in rows if name in other], rank, ranks)
        for name, row in rows[0].items()
    ]
    if any(other.keys() - rows[0].keys() for other in rows[1:]):
        unmerged.append("the ranks have logged different values")
    scale(first["fetching"], len(owns), ranks)
    return first, unmerged


class _NoSumError(Exception): ...


def _metric(metric: Metric, states: Sequence[Mapping[str, Any]], rank: int) -> dict[str, Any]:
    whole: dict[str, Any] = {"updates": sum(state["updates"] for state in states)}
    for name in metric._defaults:
        how = metric._reductions[name]
        values = [state[name] for state in states]
        if not all(isinstance(value, Tensor) for value in values):
            raise _NoSumError(f"{name} is a list")
        if how in _EXTREMES:
            whole[name] = reduce(_EXTREMES[how], values)
        elif how is dim_zero_sum:
            whole[name] = torch.zeros_like(values[0]) if rank else _total(values)
        elif how is dim_zero_mean:
            weighed = [
                value * state["updates"] for value, state in zip(values, states, strict=True)
            ]
            whole[name] = _total(weighed) / whole["updates"] if whole["updates"] else values[0]
        else:
            raise _NoSumError(f"{name} has no sum or mean")
    return whole


def _total(values: Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, values)


def _by_name(rows: Sequence[Mapping[str, Any]]) -> dict[Any, Mapping[str, Any]]:
    return {(row["log"]["fx"], row["log"]["name"], row["dataloader_idx"]): row for row in rows}


def _row(
    row: Mapping[str, Any], all_of_it: Sequence[Mapping[str, Any]], rank: int, ranks: int
) -> dict[str, Any]:
    """One logged value: a mean is shared out, as each rank may read its own; a sum is the first
    rank's.
    """
    whole = dict(row)
    values = [one["value"] for one in all_of_it]
    if row["value"] is None or not row["log"]["on_epoch"]:
        return whole  # a metric has its own state; of a value for the step there is no sum
    if row["size"] is not None:
        sizes = _total([one["size"] for one in all_of_it])
        own = sizes // ranks + (rank < sizes % ranks)
        whole["size"] = own
        whole["value"] = _total(values) * own / sizes if sizes else row["value"]
    elif row["log"]["reduce_fx"] in ("max", "min", "amax", "amin"):
        extreme = torch.maximum if "max" in row["log"]["reduce_fx"] else torch.minimum
        whole["value"] = reduce(extreme, values)
    else:
        whole["value"] = torch.zeros_like(row["value"]) if rank else _total(values)
    return whole


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def scale(counts: dict[str, Any], was: int, now: int) -> None:
    """Batches that each of `was` ranks has counted, as each of `now` ranks counts them."""
    for name, value in counts.items():
        if name in _COUNTED:
            counts[name] = value * was // now


def scale_loops(fit_loop: dict[str, Any], was: int, now: int) -> None:
    """The counters of Lightning's loops in a file."""
    for counts in fit_loop["epoch_loop.batch_progress"].values():
        if isinstance(counts, dict):
            scale(counts, was, now)
