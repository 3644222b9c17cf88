"""metrics.csv as charts: read row by row, as a damaged file still shows what it has."""

import csv
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import isnan, nan
from operator import itemgetter
from pathlib import Path
from statistics import fmean

from savepoint.words import SHARE, measured, plural

NAME = re.compile(
    r"(?:(?P<word>train|training|val|valid|validation|test)[/_])?(?P<quantity>.+?)"
    r"(?P<suffix>(?:_(?P<every>step|epoch))?(?:/dataloader_idx_(?P<loader>\d+))?)"
)
NO_METRICS = ("step", "epoch", "time/secs", "", None)
ROLES = {"train": "train", "training": "train", "test": "test"}
ORDER = ("train", "val", "test", "other")
LARGEST = 1e200  # a value beyond it has no place in a chart, as NaN has none
LONG = 300  # points of which the mean is drawn too

Point = tuple[float, float]


@dataclass
class Series:
    """The values of one column: NaN is a gap, and the role is the colour."""

    name: str
    quantity: str
    label: str
    role: str
    points: list[Point] = field(default_factory=list)

    def finite(self) -> list[Point]:
        return [point for point in self.points if not isnan(point[1])]

    def gaps(self) -> list[float]:
        """The steps at which it was NaN or infinite."""
        return [step for step, value in self.points if isnan(value)]


@dataclass
class Chart:
    """The series of one quantity: `loss` of train/loss and val/loss. Percentages have a unit."""

    quantity: str
    series: list[Series] = field(default_factory=list)
    unit: str = ""

    def values(self) -> list[float]:
        return [value for series in self.series for _, value in series.finite()]

    @property
    def is_curve(self) -> bool:
        return any(len(series.points) > 1 for series in self.series)

    @property
    def is_long(self) -> bool:
        return any(len(series.points) > LONG for series in self.series)

    def last(self, series: Series) -> str:
        found = series.finite()
        return measured(found[-1][1], self.unit) if found else "none"

    @property
    def by_the_clock(self) -> bool:
        return self.quantity.startswith("time/")


class Curves:
    """What metrics.csv holds.

    Attributes:
        charts: That of the monitored quantity first, those by the clock last.
        missing: What is wrong with the file or not in it, one sentence each.
        secs: Time in training, as far as the rows tell.
    """

    def __init__(self, path: Path, monitor: str | None = None) -> None:
        self.missing, self.last_step, self.secs = list[str](), 0.0, 0.0
        columns, unread = dict[str, Series](), Counter[str]()
        clock = 0.0
        for row in _rows(path, self.missing):
            columns = columns or {name: series_of(name) for name in row if name not in NO_METRICS}
            step = _number(row["step"])
            if step is None or isnan(step):
                unread["row has no step"] += 1
                continue
            self.last_step = max(self.last_step, step)
            for name, series in columns.items():
                value = _number(row[name])
                if value is not None:
                    series.points.append((step, value))
                elif row[name]:
                    unread["value is no number"] += 1
            secs = _number(row.get("time/secs", ""))
            if secs is not None and not isnan(secs):  # it begins anew at each start
                self.secs += secs - clock if secs >= clock else secs
                clock = secs
        told = [plural(times, what) for what, times in unread.items()]
        self.missing += [f"metrics.csv is damaged: {one}." for one in told]
        first = series_of(monitor or "").quantity
        charts = _grouped(columns.values())
        self.charts = sorted(charts, key=lambda one: (one.by_the_clock, one.quantity != first))


def series_of(name: str) -> Series:
    """An empty one: `train/loss_step` measures "loss" and is called "train each step"."""
    match = NAME.fullmatch(name)
    if match is None or match["word"] is None:
        return Series(name, name.removesuffix(match["suffix"] if match else ""), name, "other")
    each = " each step" if match["every"] == "step" else ""
    loader = f" {match['loader']}" if match["loader"] else ""
    role = ROLES.get(match["word"], "val")
    return Series(name, match["quantity"], f"{match['word']}{each}{loader}", role)


def thinned(points: list[Point], most: int) -> list[Point]:
    """About so many points that look the same: of each stretch the lowest and the highest."""
    if len(points) <= most:
        return points
    found = [points[0]]
    for stretch in _stretches(points, most / 2):
        numbers = [point for point in stretch if not isnan(point[1])]
        gap = [point for point in stretch if isnan(point[1])][:1]
        ends = [pick(numbers, key=itemgetter(1)) for pick in (min, max) if numbers]
        found += sorted({*ends, *gap}, key=stretch.index)
    return [*found, points[-1]]


def means(points: list[Point]) -> list[Point]:
    """The mean of each hundredth of many points, which alone would be a band."""
    found = []
    for stretch in _stretches(points, 100) if len(points) > LONG else ():
        values = [value for _, value in stretch if not isnan(value)]
        found.append((fmean(step for step, _ in stretch), fmean(values) if values else nan))
    return found


def _stretches(points: list[Point], number: float) -> Iterator[list[Point]]:
    size = math.ceil(len(points) / number)
    return (points[begin : begin + size] for begin in range(0, len(points), size))


def _rows(path: Path, missing: list[str]) -> Iterator[dict[str, str]]:
    """Its rows, as far as they can be read; `missing` says what is wrong with the file."""
    number = 0
    try:
        with path.open(newline="", errors="replace") as file:
            rows = csv.DictReader(file, restval="")
            if "step" not in (rows.fieldnames or ["step"]):
                missing.append("metrics.csv has no column `step`: there are no curves.")
                return
            for row in rows:
                number += 1
                yield row
    except FileNotFoundError:
        missing.append("metrics.csv is missing: there are no curves.")
    except csv.Error as error:
        missing.append(f"metrics.csv is damaged after row {number}: {error}.")
    if not number and not missing:
        missing.append("metrics.csv has no row yet: there are no curves.")


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) < LARGEST else nan


def _grouped(columns: Iterable[Series]) -> Iterable[Chart]:
    charts: dict[str, Chart] = {}
    for series in filter(lambda one: one.points, columns):
        charts.setdefault(series.quantity, Chart(series.quantity)).series.append(series)
    for chart in charts.values():
        chart.series.sort(key=lambda one: (ORDER.index(one.role), one.label))
        if SHARE.fullmatch(chart.quantity) and all(0 <= value <= 1 for value in chart.values()):
            chart.unit = " %"
            for series in chart.series:
                series.points = [(step, 100 * value) for step, value in series.points]
    return charts.values()
