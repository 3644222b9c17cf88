"""The clients of a federated run on its page: which labels each has, how well the model does there,
and what failed.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from savepoint import words

MOST = 100
"""Clients in the picture and in the table: of more, those with the most samples."""
HIGH = 150


class Part(NamedTuple):
    """One label of one client in the picture, in pixels and in percent of the width."""

    x: float
    y: float
    wide: float
    high: float
    hue: int
    title: str


class Clients:
    """What clients.json and results.json say.

    Attributes:
        labels: (name, hue).
        rows: (client, samples, round, metrics as text).
        failures: (round, client, reason).
        parts: Of the picture: a column a client, a colour a label.
        left_out: How many clients are not shown.
    """

    def __init__(self, described: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> None:
        every = described["clients"]
        shown = sorted(every, key=lambda one: -one["samples"])[:MOST]
        shown.sort(key=lambda one: one["client"])
        self.number = len(every)
        self.left_out = len(every) - len(shown)
        names = described["labels"]
        self.labels = [(name, _hue(place, len(names))) for place, name in enumerate(names)]
        self.rows = [
            (one["client"], one["samples"], one["round"], _metrics(one["metrics"])) for one in shown
        ]
        self.failures = [
            (row["round"], client, why)
            for row in results
            for client, why in row.get("failures", {}).items()
        ]
        self.most = max((one["samples"] for one in shown), default=1)
        self.parts = [part for place, one in enumerate(shown) for part in self._column(place, one)]

    def _column(self, place: int, one: Mapping[str, Any]) -> list[Part]:
        wide = 100 / max(1, min(self.number, MOST))
        y = float(HIGH)
        parts = []
        for (name, hue), number in zip(self.labels, one["labels"], strict=False):
            high = HIGH * number / self.most
            y -= high
            title = f"client {one['client']}: {number} of label {name}"
            if number:
                parts.append(Part(place * wide, y, wide * 0.86, high, hue, title))
        return parts


def read(directory: Path) -> Clients | None:
    """None for a run that is not federated, or whose files are damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        described = json.loads((directory / "clients.json").read_text())
        results = json.loads((directory / "results.json").read_text())
        return Clients(described, results)
    return None


def _hue(place: int, number: int) -> int:
    return round(360 * place / max(1, number))


def _metrics(measured: Mapping[str, Any]) -> str:
    pairs = [(name, one) for name, one in measured.items() if isinstance(one, int | float)]
    return ", ".join(f"{name} {words.metric(name, one)}" for name, one in pairs)
