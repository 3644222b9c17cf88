"""`savepoint diff A B`: exit code 0 if the two are equal, 1 if they differ, 2 if one cannot be
read, like diff(1).

Equal means: every plain value and every bit of every tensor, but for the facts of time and place
(the manifest, `run`) and the duration (the callback `Meter`).
"""

import argparse
from collections.abc import Mapping
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from savepoint import find, words
from savepoint.checkpoint import manifest
from savepoint.commands import output
from savepoint.commands.show import norm

if TYPE_CHECKING:
    from torch import Tensor

MAY_DIFFER = ("manifest", "run", "events")
CLOCK = "Meter"
FACTS = (
    "step",
    "epoch",
    "exact",
    "dataset",
    "world_size",
    "versions",
    "threads",
    "processor",
    "device",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name in "ab":
        parser.add_argument(
            name, metavar=f"{name.upper()}", help="a checkpoint, or a run directory: its newest one"
        )


def main(arguments: argparse.Namespace) -> int:
    paths = [find.file_or_latest(arguments.a), find.file_or_latest(arguments.b)]
    for path in paths:
        manifest.read(path)  # what is no checkpoint is said before the slow imports
    (state, facts), (other_state, other_facts) = map(find.load, paths)
    changes = compare(state, other_state)
    changes = {"a": paths[0], "b": paths[1], "equal": not changes["parts"], **changes}
    changes["facts"] = _differences(
        {key: facts.get(key) for key in FACTS}, {key: other_facts.get(key) for key in FACTS}
    )
    changes["metrics"] = _differences(facts.get("metrics", {}), other_facts.get("metrics", {}))
    if arguments.json:
        output.put_json(changes)
    else:
        output.put(_text(changes))
    return 0 if changes["equal"] else 1


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
    config = _differences(flatten(a.get("config") or "{}"), flatten(b.get("config") or "{}"))
    weights = _weights(_uncompiled(a.get("state_dict", {})), _uncompiled(b.get("state_dict", {})))
    optimizers = _optimizers(a.get("optimizer_states", []), b.get("optimizer_states", []))
    return {"parts": parts, "config": config, "weights": weights, "optimizers": optimizers}


def comparable(state: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a state that is equal in equal runs, however often they were resumed."""
    kept = {key: value for key, value in state.items() if key not in MAY_DIFFER}
    callbacks = {key: value for key, value in state.get("callbacks", {}).items() if key != CLOCK}
    return kept | {"callbacks": callbacks}


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
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
        changed = _differences(_optimizer(one), _optimizer(other))
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


def _text(changes: Mapping[str, Any]) -> str:
    if changes["equal"]:
        last = f"Equal: every value and every bit, but for {', '.join(MAY_DIFFER)} and the clock."
    else:
        last = f"Different in: {', '.join(changes['parts'])}"
    metrics = {name: list(map(_metric, pair)) for name, pair in changes["metrics"].items()}
    weights = [
        (one["name"], one["why"] or words.number(one["change"])) for one in changes["weights"]
    ]
    sections = [
        words.table((), [("A", str(changes["a"])), ("B", str(changes["b"]))]),
        _section("fact", changes["facts"]),
        _section("config", changes["config"]),
        _section("metric", metrics),
        words.table(("weights", "relative change"), weights) if weights else "",
        *(
            _section(f"optimizer {one['optimizer']}", one["changed"])
            for one in changes["optimizers"]
        ),
        last,
    ]
    return "\n\n".join(section for section in sections if section)


def _section(title: str, changed: Mapping[str, list[Any]]) -> str:
    rows = [(key, _value(was), _value(now)) for key, (was, now) in changed.items()]
    return words.table((title, "A", "B"), rows) if rows else ""


def _metric(one: Mapping[str, Any] | None) -> str:
    return "-" if one is None else f"{words.number(one['value'])} at step {one['step']}"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return "-" if value is None or value == [] else str(value)
