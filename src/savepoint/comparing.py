"""Two states of a training, compared: every plain value and every bit of every tensor, but for the
facts of time and place (the manifest, `run`) and the duration (the callback `Meter`).
"""

from collections.abc import Mapping
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MAY_DIFFER = ("manifest", "run", "events")
CLOCK = "Meter"


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """`parts`: the keys of the state that differ; then the differences of config, weights and
    optimizers.
    """
    from savepoint.checkpoint.format import fingerprint
    from savepoint.config.compose import flatten

    a = comparable(a)
    b = comparable(b)
    both = a.keys() & b.keys()
    equal = {key for key in both if fingerprint(a[key]) == fingerprint(b[key])}
    parts = [key for key in {**a, **b} if key not in equal]
    config = differences(flatten(a.get("config") or "{}"), flatten(b.get("config") or "{}"))
    weights = _weights(_uncompiled(a.get("state_dict", {})), _uncompiled(b.get("state_dict", {})))
    optimizers = _optimizers(a.get("optimizer_states", []), b.get("optimizer_states", []))
    return {"parts": parts, "config": config, "weights": weights, "optimizers": optimizers}


def comparable(state: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a state that is equal in equal runs, however often they were resumed."""
    kept = {key: value for key, value in state.items() if key not in MAY_DIFFER}
    callbacks = {key: value for key, value in state.get("callbacks", {}).items() if key != CLOCK}
    return kept | {"callbacks": callbacks}


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Key -> [value in A, value in B], for the values that differ; None for an absent key."""
    from savepoint.config.compose import same

    both = a.keys() & b.keys()
    equal = {key for key in both if same(a[key], b[key])}
    return {key: [a.get(key), b.get(key)] for key in {**a, **b} if key not in equal}


def _uncompiled(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights under plain names: `torch.compile` changes the names, not the weights."""
    return {name.replace("_orig_mod.", ""): value for name, value in weights.items()}


def _weights(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The weights that differ, in the order of the model; also values of a `get_extra_state`."""
    from torch import Tensor

    from savepoint.checkpoint.format import fingerprint

    rows: list[dict[str, Any]] = []
    for name in {**a, **b}:
        change = None
        why = None
        if name not in a or name not in b:
            why = f"only in {'A' if name in a else 'B'}"
        elif not isinstance(a[name], Tensor) or not isinstance(b[name], Tensor):
            why = "other values" if fingerprint(a[name]) != fingerprint(b[name]) else None
        elif a[name].shape != b[name].shape:
            why = f"{list(a[name].shape)} and {list(b[name].shape)}"
        else:
            change = relative_change(a[name], b[name])
        if change is not None or why is not None:
            rows.append({"name": name, "change": change, "why": why})
    return rows


def relative_change(a: "Tensor", b: "Tensor") -> float | None:
    """||a - b|| / ||a||; None where they are equal bit for bit."""
    import torch

    from savepoint.checkpoint.format import dense, fingerprint

    if fingerprint(a) == fingerprint(b):
        return None
    kind = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    distance = norm(dense(b).to(kind) - dense(a).to(kind))
    length = norm(a)
    if not length:
        return float("inf") if distance else 0.0
    return distance / length


def _optimizers(a: list[Any], b: list[Any]) -> list[dict[str, Any]]:
    """For each optimizer that differs: its kind of state, step counts and hyper-parameters."""
    rows = []
    for place, (one, other) in enumerate(zip_longest(a, b)):
        changed = differences(_optimizer(one), _optimizer(other))
        rows += [{"optimizer": place, "changed": changed}] if changed else []
    return rows


def _optimizer(state: Mapping[str, Any] | None) -> dict[str, Any]:
    """Keys of its state, step counts, hyper-parameters: `lr` of the first group, `[1].lr` of the
    second.
    """
    if state is None:
        return {}
    of_parameters = list(state["state"].values())
    facts: dict[str, Any] = {
        "state": sorted({key for one in of_parameters for key in one}),
        "steps": sorted({float(one["step"]) for one in of_parameters if "step" in one}),
    }
    for place, group in enumerate(state["param_groups"]):
        prefix = f"[{place}]." if place else ""
        options = {key: value for key, value in group.items() if value is not None}
        facts |= {f"{prefix}{key}": value for key, value in options.items() if key != "params"}
        facts[f"{prefix}number of parameters"] = len(group["params"])
    return facts


def norm(tensor: "Tensor") -> float:
    """The Euclidean norm, in double precision."""
    import torch

    from savepoint.checkpoint import format

    kind = torch.complex128 if tensor.is_complex() else torch.float64
    return float(format.dense(tensor).to(kind).norm())
