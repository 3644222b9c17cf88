"""`savepoint diff A B`: exit code 0 if the two are equal, 1 if they differ, 2 if one cannot be
read, like diff(1).

Equal means: every plain value and every bit of every tensor, but for what says when and where a
checkpoint was made (the manifest, `run`) and how long it took (the callback `Meter`).
"""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from savepoint import find, words
from savepoint.commands import output
from savepoint.commands.show import norm

if TYPE_CHECKING:
    from torch import Tensor

MAY_DIFFER = ("manifest", "run")
CLOCK = "Meter"
FACTS = ("step", "epoch", "exact", "dataset", "world_size", "versions", "threads", "device")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name in "ab":
        parser.add_argument(
            name, metavar=f"{name.upper()}", help="a checkpoint, or a run directory: its newest one"
        )


def main(arguments: argparse.Namespace) -> int:
    paths = [find.file_or_latest(arguments.a), find.file_or_latest(arguments.b)]
    from savepoint.checkpoint import store  # and with its load, torch

    (state, facts), (other_state, other_facts) = map(store.load, paths)
    found = compare(state, other_state)
    found = {"a": paths[0], "b": paths[1], "equal": not found["parts"], **found}
    found["facts"] = {
        k: [facts.get(k), other_facts.get(k)] for k in FACTS if facts.get(k) != other_facts.get(k)
    }
    found["metrics"] = _metrics(facts, other_facts)
    if arguments.json:
        output.put_json(found)
    else:
        output.put(_text(found))
    return 0 if found["equal"] else 1


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """`parts`: the keys of the state that differ, in whatever; then what of config, weights and
    optimizers.
    """
    from savepoint.checkpoint.format import fingerprint
    from savepoint.config.compose import flatten, same

    a = comparable(a)
    b = comparable(b)
    keys = list({**a, **b})
    parts = [
        key
        for key in keys
        if key not in a or key not in b or fingerprint(a[key]) != fingerprint(b[key])
    ]
    old = flatten(a.get("config") or "{}")
    new = flatten(b.get("config") or "{}")
    config = {
        k: [old.get(k), new.get(k)]
        for k in {**old, **new}
        if k not in old or k not in new or not same(old[k], new[k])
    }
    weights = _weights(*(_uncompiled(one.get("state_dict", {})) for one in (a, b)))
    optimizers = _optimizers(a.get("optimizer_states", []), b.get("optimizer_states", []))
    return {"parts": parts, "config": config, "weights": weights, "optimizers": optimizers}


def comparable(state: Mapping[str, Any]) -> dict[str, Any]:
    """What is the same in the checkpoints of equal runs, however often they were killed and
    resumed.
    """
    kept = {key: value for key, value in state.items() if key not in MAY_DIFFER}
    callbacks = {key: value for key, value in state.get("callbacks", {}).items() if key != CLOCK}
    return kept | {"callbacks": callbacks}


def _metrics(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> [(value, step) in A, in B], for those that differ."""
    old = a.get("metrics", {})
    new = b.get("metrics", {})
    pairs = {name: [old.get(name), new.get(name)] for name in {**old, **new}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _uncompiled(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Under plain names: those of a part that went through `torch.compile` differ, its weights do
    not.
    """
    return {name.replace("_orig_mod.", ""): value for name, value in weights.items()}


def _weights(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those that differ, in the order of the model; beside tensors, what a part's `get_extra_state`
    gave.
    """
    from torch import Tensor

    from savepoint.checkpoint.format import fingerprint

    rows: list[dict[str, Any]] = []
    for name in {**a, **b}:
        if name not in a or name not in b:
            rows.append(
                {"name": name, "change": None, "why": f"only in {'A' if name in a else 'B'}"}
            )
        elif not isinstance(a[name], Tensor) or not isinstance(b[name], Tensor):
            if fingerprint(a[name]) != fingerprint(b[name]):
                rows.append({"name": name, "change": None, "why": "other values"})
        elif a[name].shape != b[name].shape:
            rows.append(
                {
                    "name": name,
                    "change": None,
                    "why": f"{list(a[name].shape)} and {list(b[name].shape)}",
                }
            )
        elif (change := relative_change(a[name], b[name])) is not None:
            rows.append({"name": name, "change": change, "why": None})
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
    return distance / length if length else float("inf") if distance else 0.0


def _optimizers(a: list[Any], b: list[Any]) -> list[dict[str, Any]]:
    """Of each optimizer, what it is and how far it is, where the two differ."""
    from savepoint.config.compose import same

    rows = []
    for place in range(max(len(a), len(b))):
        old, new = (_optimizer(one[place]) if place < len(one) else {} for one in (a, b))
        changed = {
            k: [old.get(k), new.get(k)] for k in {**old, **new} if not same(old.get(k), new.get(k))
        }
        rows += [{"optimizer": place, "changed": changed}] if changed else []
    return rows


def _optimizer(state: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of its state, step counts, hyper-parameters: `lr` of the first group, `[1].lr` of the
    second.
    """
    of_parameters = list(state["state"].values())
    steps = sorted({float(one["step"]) for one in of_parameters if "step" in one})
    found: dict[str, Any] = {
        "state": sorted({key for one in of_parameters for key in one}),
        "steps": steps,
    }
    for place, group in enumerate(state["param_groups"]):
        prefix = f"[{place}]." if place else ""
        found |= {f"{prefix}{key}": value for key, value in group.items() if key != "params"}
        found[f"{prefix}number of parameters"] = len(group["params"])
    return found


def _text(found: Mapping[str, Any]) -> str:
    if found["equal"]:
        same = f"Equal: every value and every bit, but for {', '.join(MAY_DIFFER)} and the clock."
    else:
        same = f"Different in: {', '.join(found['parts'])}"
    sections = [
        words.table((), [("A", str(found["a"])), ("B", str(found["b"]))]),
        _section("fact", found["facts"]),
        _section("config", found["config"]),
        _section(
            "metric",
            {name: [_metric(one) for one in pair] for name, pair in found["metrics"].items()},
        ),
        words.table(
            ("weights", "relative change"),
            [(one["name"], one["why"] or words.number(one["change"])) for one in found["weights"]],
        )
        if found["weights"]
        else "",
        *(_section(f"optimizer {one['optimizer']}", one["changed"]) for one in found["optimizers"]),
        same,
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
