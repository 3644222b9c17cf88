"""metrics.csv as charts: read row by row, as a damaged file still shows what it has; thinned, as a page stays small."""

import csv
import math
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from savepoint.words import SHARE, plural

PREFIX = re.compile(r"(train|training|val|valid|validation|test)[/_](.+)")
SUFFIX = re.compile(r"(?:_(step|epoch))?(?:/dataloader_idx_(\d+))?$")
NO_METRICS = ("step", "epoch", "time/secs")
ROLES = {"train": "train", "training": "train", "test": "test"}
POINTS, MOST_POINTS, LONG = 1000, 40_000, 300
LARGEST = 1e200
"""A value beyond it has no place in a chart, as NaN has none."""


@dataclass
class Series:
    """The values of one column.

    Attributes:
        label: What it is called in its chart: `val`, `train each step`.
        role: train, val, test or other: its colour.
    """

    name: str
    label: str
    role: str
    steps: "array[float]" = field(default_factory=lambda: array("d"))
    values: "array[float]" = field(default_factory=lambda: array("d"))

    def finite(self) -> list[tuple[float, float]]:
        return [(step, value) for step, value in zip(self.steps, self.values, strict=True) if _is_finite(value)]

    def not_finite(self) -> list[float]:
        """The steps at which it was NaN or infinite."""
        return [step for step, value in zip(self.steps, self.values, strict=True) if not _is_finite(value)]


@dataclass
class Chart:
    """The series of one quantity: `loss` of train/loss and val/loss.

    Attributes:
        unit: " %" where shares are shown as percentages; the values are multiplied already.
    """

    quantity: str
    series: list[Series]
    unit: str = ""

    @property
    def by_the_clock(self) -> bool:
        return self.quantity.startswith("time/")


@dataclass
class Curves:
    """What metrics.csv holds.

    Attributes:
        missing: What is wrong with the file or not in it, one sentence each.
        secs: Time in training, as far as the rows tell: the clock of a row begins anew at each start.
    """

    charts: list[Chart] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    rows: int = 0
    last_step: float = 0
    secs: float = 0


def read(path: Path, monitor: str | None = None) -> Curves:
    """The charts of a metrics.csv, that of `monitor` first, those by the clock last."""
    curves, columns = Curves(), dict[str, Series]()
    try:
        with path.open(newline="", errors="replace") as file:
            _read_rows(csv.reader(file), curves, columns)
    except FileNotFoundError:
        curves.missing.append("metrics.csv is missing: there are no curves.")
        return curves
    except csv.Error as error:
        curves.missing.append(f"metrics.csv is damaged after row {curves.rows}: {error}.")
    if not curves.rows and not curves.missing:
        curves.missing.append("metrics.csv has no row yet: there are no curves.")
    found = [chart for chart in _grouped(columns).values() if chart.series]
    first = monitor and _quantity(monitor)[0]
    curves.charts = sorted(found, key=lambda chart: (chart.by_the_clock, chart.quantity != first))
    for chart in curves.charts:
        _as_percentages(chart)
    return curves


def thinned(series: Series, number_of_series: int) -> list[tuple[float, float | None]]:
    """About a thousand points that look the same: of each stretch the lowest and the highest. None breaks the line."""
    points = list(zip(series.steps, series.values, strict=True))
    limit = max(100, min(POINTS, MOST_POINTS // max(1, number_of_series)))
    if len(points) <= limit:
        return [(step, value if _is_finite(value) else None) for step, value in points]
    size = math.ceil(2 * len(points) / limit)
    found: list[tuple[float, float | None]] = []
    for begin in range(0, len(points), size):
        found += _extremes(points[begin : begin + size])
    return [points[0], *found, points[-1]] if _is_finite(points[0][1]) and _is_finite(points[-1][1]) else found


def means(series: Series) -> list[tuple[float, float | None]]:
    """The mean of each hundredth of a long series, which alone would be a band; of a short one nothing."""
    points = list(zip(series.steps, series.values, strict=True))
    if len(points) <= LONG:
        return []
    size, found = math.ceil(len(points) / 100), list[tuple[float, float | None]]()
    for begin in range(0, len(points), size):
        stretch = points[begin : begin + size]
        values = [value for _, value in stretch if _is_finite(value)]
        step = sum(step for step, _ in stretch) / len(stretch)
        found.append((step, sum(values) / len(values) if values else None))
    return found


def _extremes(points: list[tuple[float, float]]) -> list[tuple[float, float | None]]:
    places = [place for place, (_, value) in enumerate(points) if _is_finite(value)]
    shown: dict[int, float | None] = {}
    if places:
        for pick in (min, max):
            place = pick(places, key=lambda place: points[place][1])
            shown[place] = points[place][1]
    if len(places) < len(points):
        shown[next(place for place, (_, value) in enumerate(points) if not _is_finite(value))] = None
    return [(points[place][0], shown[place]) for place in sorted(shown)]


def _read_rows(rows: Iterator[list[str]], curves: Curves, columns: dict[str, Series]) -> None:
    header = next(rows, [])
    names = {name: place for place, name in enumerate(header) if name}
    clock, before, unread = names.get("time/secs"), 0.0, Counter[str]()
    columns.update({name: Series(name, *_quantity(name)[1:]) for name in names if name not in NO_METRICS})
    if header and "step" not in names:
        curves.missing.append("metrics.csv has no column `step`: there are no curves.")
        return
    for row in rows:
        curves.rows += 1
        step = _number(_cell(row, names["step"]))
        if step is None or not _is_finite(step):
            unread["row has no step"] += 1
            continue
        curves.last_step = max(curves.last_step, step)
        for name, series in columns.items():
            if text := _cell(row, names[name]):
                if (value := _number(text)) is None:
                    unread["value is no number"] += 1
                    continue
                series.steps.append(step)
                series.values.append(value)
        secs = _number(_cell(row, clock)) if clock is not None else None
        if secs is not None and _is_finite(secs):
            curves.secs += secs - before if secs >= before else secs
            before = secs
    for what, times in unread.items():
        curves.missing.append(f"metrics.csv is damaged: {plural(times, what)}.")


def _cell(row: list[str], place: int) -> str:
    return row[place] if place < len(row) else ""


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _is_finite(value: float) -> bool:
    return abs(value) < LARGEST  # False for NaN too


def _grouped(columns: Mapping[str, Series]) -> dict[str, Chart]:
    charts: dict[str, Chart] = {}
    for name in columns:
        quantity = _quantity(name)[0]
        charts.setdefault(quantity, Chart(quantity, []))
        if columns[name].steps:
            charts[quantity].series.append(columns[name])
    for chart in charts.values():
        chart.series.sort(key=lambda one: (("train", "val", "test", "other").index(one.role), one.label))
    return charts


def _quantity(name: str) -> tuple[str, str, str]:
    """(what it measures, what it is called among others that measure it, role): ("loss", "train each step", "train")."""
    match = PREFIX.fullmatch(name)
    word, rest = match.groups() if match else (name, name)
    suffix = SUFFIX.search(rest)
    assert suffix is not None  # it matches nothing too
    quantity = rest[: suffix.start()] or rest
    kind, loader = suffix.groups()
    extra = (" each step" if kind == "step" else "") + (f" {loader}" if loader else "")
    if match is None:
        return quantity, name, "other"
    return quantity, word + extra, ROLES.get(word, "val")


def _as_percentages(chart: Chart) -> None:
    values = [value for series in chart.series for _, value in series.finite()]
    if not SHARE.fullmatch(chart.quantity) or not all(0 <= value <= 1 for value in values):
        return
    chart.unit = " %"
    for series in chart.series:
        series.values = array("d", (100 * value for value in series.values))
