"""Where two trainings differ first, and by how much."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from savepoint import find
from savepoint.checkpoint.format import dense, fingerprint
from savepoint.comparing import compare, relative_change
from savepoint.replay.side import KINDS, Recorded
from savepoint.replay.stretch import Pair

SHOWN = 12
# Config and log of two runs are compared by themselves.
OWN = ("config", "hyper_parameters", "datamodule_hyper_parameters", "logged_rows")


def parts(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys of the state in which two runs differ."""
    return [part for part in compare(one, other)["parts"] if part not in OWN]


@dataclass(frozen=True)
class First:
    """The first batch in which two records differ, and where: kind -> names.

    `line` is its place in the records.
    """

    line: int
    step: int
    epoch: int
    batch: int
    places: dict[str, list[str]]


def first(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> First | None:
    for line, (one, other) in enumerate(zip(a, b, strict=False)):
        places = {}
        for kind in KINDS:
            was = one["values"][kind]
            now = other["values"][kind]
            if names := [name for name in {**was, **now} if was.get(name) != now.get(name)]:
                places[kind] = names
        if places:
            return First(line, one["step"], one["epoch"], one["batch"], places)
    return None


def ends(sides: Sequence[Recorded], end: Pair | None) -> dict[str, list[str]]:
    """The parts in which the states at the end differ: from each other, and from the checkpoints of
    the runs there.
    """
    states = [find.load(side.end.path)[0] if side.end else None for side in sides]
    one, other = states
    found = {"each other": parts(one, other) if one and other else []}
    for name, state, was in zip("AB", states, end or (), strict=False):
        if state:
            found[name] = parts(find.load(was.path)[0], state)
    return found


def sizes(where: First, one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Kind -> how far its first place is apart; {} where it was equal this time."""
    found: dict[str, dict[str, Any]] = {}
    for kind, names in where.places.items():
        sides = [side.get(kind, {}) for side in (one, other)]
        if kind == "random state":
            found[kind] = {"values": [None, None]}
        elif lacking := [
            name for name, side in zip("AB", sides, strict=True) if names[0] not in side
        ]:
            found[kind] = {"missing": lacking[0]}
        else:
            found[kind] = _size(*(side[names[0]] for side in sides))
    return found


def _size(one: Any, other: Any) -> dict[str, Any]:
    if fingerprint(one) == fingerprint(other):
        return {}
    both = (one, other)
    if not all(isinstance(side, torch.Tensor) and side.numel() != 1 for side in both):
        return {"values": [_plain(side) for side in both]}
    if one.shape != other.shape or one.dtype != other.dtype:
        return {"values": [f"{list(side.shape)} {side.dtype}" for side in both]}
    distance = (dense(one).double() - dense(other).double()).abs()
    return {
        "largest": float(distance.max()) if distance.numel() else 0.0,
        "relative": relative_change(one, other),
        "differing": int((distance != 0).sum()),
        "of": one.numel(),
    }


def _plain(value: Any) -> Any:
    """A value that a line has room for; else None."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, int | float | None):
        return value
    if isinstance(value, list) and all(isinstance(one, int | float) for one in value):
        more = ", ..." if len(value) > SHOWN else ""
        return ", ".join(map(str, value[:SHOWN])) + more
    text = str(value)
    return text if len(text) < 80 else None
