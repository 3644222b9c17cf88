"""metrics.csv as charts: read row by row, so that a damaged file shows its whole rows."""

import csv
import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from math import isnan, nan
from operator import itemgetter
from pathlib import Path
from statistics import fmean

from savepoint.words import SHARE, measured, plural

LOADER = re.compile(r"(.+?)(?:/dataloader_idx_(\d+))?")
SEPARATOR = re.compile(r"([/_.\-])")
ROLES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "eval", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
EVERY = ("step", "epoch")
CLIENTS = "clients/"
CLOCK = "time/"
NO_METRICS = ("step", "epoch", "time/secs", "", None)
ORDER = ("train", "val", "test", "clients", "other")
LARGEST = 1e200  # a larger value has no place in a chart, like NaN
LONG = 300  # points; longer series get a line of their mean too

Point = tuple[float, float]


@dataclass
class Series:
    """The values of one column: NaN is a gap, and the role is the colour."""

    name: str
    quantity: str
    label: str
    role: str
    points: list[Point] = field(default_factory=list)

    def add(self, step: float, text: str) -> bool:
        """Returns False for text that is no number."""
        value = _number(text)
        if value is not None:
            self.points.append((step, value))
        return value is not None or not text

    def measured_at(self, step: float) -> None:
        """The newest value was measured at that step, and logged later."""
        if self.points:
            self.points[-1] = (step, self.points[-1][1])

    def finite(self) -> list[Point]:
        return [point for point in self.points if not isnan(point[1])]

    def gaps(self) -> list[float]:
        """The steps at which the value was NaN or infinite."""
        return [step for step, value in self.points if isnan(value)]


class Chart:
    """The series of one quantity: `loss` of train/loss and val/loss, or of loss and val_loss.
    Shares become percentages.
    """

    def __init__(self, quantity: str, series: Iterable[Series]) -> None:
        self.quantity = quantity
        self.unit = ""
        series = list(series)
        roles = {one.role for one in series}
        for one in series:
            if one.role == "other" and len(roles) > 1 and "train" not in roles:
                one.role = "train"
        self.series = sorted(series, key=lambda one: (ORDER.index(one.role), one.label))
        self.values = [value for one in self.series for _, value in one.finite()]
        if SHARE.fullmatch(quantity) and all(0 <= value <= 1 for value in self.values):
            self.unit = " %"
            self.values = [100 * value for value in self.values]
            for one in self.series:
                one.points = [(step, 100 * value) for step, value in one.points]
        longest = max(len(one.points) for one in self.series)
        self.is_curve = longest > 1
        self.is_long = longest > LONG
        self.by_the_clock = quantity.startswith(CLOCK)

    def last(self, series: Series) -> str:
        points = series.finite()
        return measured(points[-1][1], self.unit) if points else "none"


class Curves:
    """The content of metrics.csv.

    Args:
        monitor: The metric whose chart comes first.
        to_step: From the step of a row, as Lightning logs it, to a step of the optimizers.

    Attributes:
        charts: The monitored quantity first, values of the clock last.
        missing: One sentence for each fault of the file.
        secs: Time in training by the rows, whose clock begins anew at each start.
    """

    def __init__(
        self,
        path: Path,
        monitor: str | None = None,
        to_step: Callable[[float], float] = lambda logged: logged,
    ) -> None:
        self.missing = list[str]()
        self.last_step = 0.0
        columns = dict[str, Series]()
        clock = series_of("time/secs")
        unread = Counter[str]()
        for row in _rows(path, self.missing):
            columns = columns or {name: series_of(name) for name in row if name not in NO_METRICS}
            step = _number(row["step"])
            if step is None or isnan(step):
                unread["row has no step"] += 1
                continue
            step = to_step(step)
            self.last_step = max(self.last_step, step)
            clock.add(step, row.get("time/secs", ""))
            bad = [name for name, one in columns.items() if not one.add(step, row[name])]
            unread["value is no number"] += len(bad)
        faults = [plural(times, what) for what, times in unread.items() if times]
        self.missing += [f"metrics.csv is damaged: {fault}." for fault in faults]
        secs = pairwise([0.0, *(secs for _, secs in clock.finite())])
        self.secs = sum(now - before if now >= before else now for before, now in secs)
        self.charts = _charts(columns.values(), series_of(monitor or "").quantity)


def series_of(name: str) -> Series:
    """An empty series. `train/loss_step`, `loss_train_step` and `Train.Loss_step` measure "loss",
    and have the label "train each step"; with two such words, or none, a name is its own label.
    """
    if name.startswith(CLIENTS):  # the mean of what clients of a federated run have measured
        own = series_of(name.removeprefix(CLIENTS))
        return Series(name, own.quantity, "clients", "clients")
    if name.startswith(CLOCK):
        return Series(name, name, name, "other")
    match = LOADER.fullmatch(name)
    stem, number = match.groups() if match else (name, None)
    pieces = SEPARATOR.split(stem)
    words = [word.lower() for word in pieces[::2]]
    splits = [place for place, word in enumerate(words) if _is_split(word, place)]
    split = splits[0] if len(splits) == 1 else None
    ends = {len(words) - 1} if split is None else {len(words) - 1, split + 1}
    every = [place for place in sorted(ends) if place < len(words) and words[place] in EVERY]
    kept = [place for place in range(len(words)) if place not in (split, *every)]
    quantity = "".join(
        pieces[2 * place] if place == kept[0] else "".join(pieces[2 * place - 1 : 2 * place + 1])
        for place in kept
    )
    if split is None or not kept:
        return Series(name, quantity or name, name, "other")
    each = " each step" if "step" in (words[place] for place in every) else ""
    loader = f" {number}" if number else ""
    return Series(name, quantity, f"{words[split]}{each}{loader}", ROLES[words[split]])


def _is_split(word: str, place: int) -> bool:
    """Whether a word of a name says on which part of the data it was measured."""
    return word in ROLES and (word != "dev" or place == 0)  # of std_dev it does not


def steps_by(pairs: Iterable[tuple[int, int]]) -> Callable[[float], float]:
    """From the step of a log row to one of the optimizers, by pairs of both: with several
    optimizers these are not the same number.
    """
    known = sorted({(0, 0), *pairs})
    if all(logged == step for logged, step in known):
        return lambda logged: logged

    def to_step(logged: float) -> float:
        place = max(1, min(len(known) - 1, bisect_left(known, (logged, 0))))
        before, low = known[place - 1]
        after, high = known[place]
        return float(round(low + (logged - before) * (high - low) / max(1, after - before)))

    return to_step


def thinned(points: list[Point], most: int) -> list[Point]:
    """About `most` points that look the same: the lowest and the highest of each stretch."""
    if len(points) <= most:
        return points
    kept = [points[0]]
    for stretch in _stretches(points, most / 2):
        numbers = [point for point in stretch if not isnan(point[1])]
        gap = [point for point in stretch if isnan(point[1])][:1]
        ends = [pick(numbers, key=itemgetter(1)) for pick in (min, max) if numbers]
        kept += sorted({*ends, *gap}, key=stretch.index)
    return [*kept, points[-1]]


def means(points: list[Point]) -> list[Point]:
    """The mean of each hundredth of a long series, whose points alone look like a band."""
    kept: list[Point] = []
    if len(points) <= LONG:
        return kept
    for stretch in _stretches(points, 100):
        values = [value for _, value in stretch if not isnan(value)]
        kept.append((fmean(step for step, _ in stretch), fmean(values) if values else nan))
    return kept


def _stretches(points: list[Point], number: float) -> Iterator[list[Point]]:
    size = math.ceil(len(points) / number)
    return (points[begin : begin + size] for begin in range(0, len(points), size))


def _rows(path: Path, missing: list[str]) -> Iterator[dict[str, str]]:
    """The readable rows. Adds the faults of the file to `missing`."""
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


def _charts(columns: Iterable[Series], first: str) -> list[Chart]:
    groups: dict[str, list[Series]] = {}
    for series in filter(lambda one: one.points, columns):
        groups.setdefault(series.quantity.lower(), []).append(series)
    charts = [Chart(series[0].quantity, series) for series in groups.values()]
    first = first.lower()
    return sorted(charts, key=lambda one: (one.by_the_clock, one.quantity.lower() != first))
