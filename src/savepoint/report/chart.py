"""The positions of curves, marks and names in an SVG that is as wide as its place.

Horizontal positions are in percent, vertical ones in pixels: letters and dots keep their size on
any screen, without a script. Only the lines lie in a stretched system; their strokes are not
stretched.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from math import isnan
from typing import Any, NamedTuple

from savepoint.report.curves import Chart, Point, Series, means, thinned
from savepoint.report.gather import Mark

HEIGHT = 190
WIDE = 1000
LETTER = 14  # pixels from one label at the end of a line to the next
LETTERS = 7  # of a name that has room beside the chart
POINTS = 1000  # of a series
MOST_POINTS = 40_000  # of the page


class Axis(NamedTuple):
    low: float
    high: float
    ticks: list[float]

    def share(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)

    def down(self, value: float) -> float:
        return round(HEIGHT * (1 - self.share(value)), 1)

    def across(self, value: float) -> str:
        return f"{100 * self.share(value):.2f}%"

    def side(self, value: float) -> str:
        """The anchor of a name that must stay inside the picture."""
        if self.share(value) > 0.8:
            return "end"
        return "middle" if self.share(value) > 0.1 else "start"

    def text(self, value: float) -> str:
        """A tick as text, with enough digits to tell it from its neighbours."""
        spacing = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else 1.0
        largest = max(map(abs, self.ticks))
        finest = math.floor(math.log10(spacing) + 1e-9)
        if largest >= 1e6 or finest < -5:
            return f"{value:.{math.floor(math.log10(largest)) - finest + 1}g}"
        return f"{value:,.{max(0, -finest)}f}"


class Drawn:
    """A chart with its axis and all that is placed on it.

    Attributes:
        styles: The classes of each series.
        lines: (path, classes).
        names: (label, step, height).
        gaps: Steps without a value, of which none hides another.
        data: For the script.
    """

    def __init__(self, chart: Chart, steps: Axis, most: int) -> None:
        self.chart = chart
        self.axis = _value_axis(chart)
        self.styles = _styles(chart)
        self.lines = list[tuple[str, str]]()
        rows = []
        for series, style in zip(chart.series, self.styles, strict=True):
            points = thinned(series.points, most)
            mean = [] if _is_fine(chart, series) else means(series.points)
            pale = f"line {series.role} fine" if mean else style
            drawn = [(points, pale), (mean, style)] if len(points) > 1 else []
            self.lines += [(_path(some, steps, self.axis), of) for some, of in drawn if some]
            values = [point for point in points if not isnan(point[1])]
            row: dict[str, Any] = {"role": series.role}
            row["steps"] = [_short(step) for step, _ in values]
            row["values"] = [_short(value) for _, value in values]
            rows.append(row)
        ends = {"low": self.axis.low, "high": self.axis.high}
        self.data = {**ends, "unit": chart.unit, "series": rows}
        self.names = _names(chart, self.axis)
        broken = [step for series in chart.series for step in series.gaps()]
        self.gaps = list({round(steps.share(step), 2): step for step in broken}.values())


def drawn(charts: Sequence[Chart], steps: Axis) -> list[Drawn]:
    lines = sum(len(chart.series) for chart in charts)
    most = max(100, min(POINTS, MOST_POINTS // max(1, lines)))
    return [Drawn(chart, steps, most) for chart in charts]


def flags(marks: Sequence[Mark], steps: Axis) -> list[tuple[float, str, str, list[int]]]:
    """(step, kind, label, numbers) of each flag; marks that would overlap share one."""
    placed: list[tuple[float, str, str, list[int]]] = []
    for number, mark in sorted(enumerate(marks, 1), key=lambda pair: pair[1].step):
        step = float(mark.step)
        kind = mark.kind
        numbers = [number]
        if placed and steps.share(step) - steps.share(placed[-1][0]) < 0.05:
            step, kinds, _, others = placed.pop()
            kind = min(kind, kinds)  # "fault" before "resume"
            numbers = sorted([*others, number])
        placed.append((step, kind, _numbers(numbers), numbers))
    return placed


def step_axis(last: float) -> Axis:
    high = max(1.0, last)
    ticks = _ticks(0.0, high, 5.5, (1, 2, 2.5, 5, 10))
    return Axis(0.0, high, [tick for tick in ticks if tick == round(tick)])


def _value_axis(chart: Chart) -> Axis:
    low = min(chart.values, default=0.0)
    high = max(chart.values, default=1.0)
    spread = high - low
    size = max(abs(low), abs(high))
    room = 0.06 * spread
    if spread < max(1e-9 * size, 1e-290):
        room = 0.05 * size if size > 1e-290 else 0.5
    bottom = max(0.0, low - room) if low >= 0 else low - room
    top = min(100.0, high + room) if chart.unit and low < 100 else high + room
    return Axis(bottom, top, _ticks(bottom, top, 4, (1, 2, 5, 10)))


def _ticks(low: float, high: float, at_most: float, factors: Sequence[float]) -> list[float]:
    """Round numbers with `at_most` spaces between them, each a factor times a power of ten."""
    rough = (high - low) / at_most
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    spacing = next(power * factor for factor in factors if power * factor >= rough * 0.99)
    first = math.ceil(low / spacing - 1e-9)
    last = math.floor(high / spacing + 1e-9)
    return [spacing * number for number in range(first, last + 1)]


def _is_fine(chart: Chart, series: Series) -> bool:
    """Whether a series is pale: values of single steps beside those of whole epochs."""
    return series.label.endswith(" each step") and len(chart.series) > 1


def _styles(chart: Chart) -> list[str]:
    """A colour for each role, a thin line for single steps, dashes where a colour repeats."""
    fine = {True: " fine", False: ""}
    plain = [f"line {one.role}{fine[_is_fine(chart, one)]}" for one in chart.series]
    again = [min(2, plain[:place].count(style)) for place, style in enumerate(plain)]
    dashes = {0: "", 1: " dashed1", 2: " dashed2"}
    return [style + dashes[times] for style, times in zip(plain, again, strict=True)]


def _path(points: Sequence[Point], steps: Axis, axis: Axis) -> str:
    return "".join(
        f"{'M' if isnan(before) else 'L'}{WIDE * steps.share(step):.1f} {axis.down(value)}"
        for (_, before), (step, value) in pairwise([(0.0, math.nan), *points])
        if not isnan(value)
    )


def _names(chart: Chart, axis: Axis) -> list[tuple[str, float, float]]:
    """(label, step, height) at the end of each line; overlapping labels are moved apart."""
    lines = [one for one in chart.series if len(one.points) > 1]
    several = [one for one in lines if len(chart.series) > 1 and one.finite()]
    ends = [(*one.finite()[-1], one.label) for one in several if len(one.label) <= LETTERS]
    ends.sort(key=lambda end: -end[1])
    downs = list[float]()
    below = float(HEIGHT)
    for _, value, _ in ends:
        downs.append(max([axis.down(value), *(down + LETTER for down in downs[-1:])]))
    for place in reversed(range(len(downs))):
        downs[place] = min(downs[place], below)
        below = downs[place] - LETTER
    return [(label, step, down) for (step, _, label), down in zip(ends, downs, strict=True)]


def _short(value: float) -> float:
    rounded = float(f"{value:.7g}")
    return int(rounded) if abs(rounded) < 1e15 and rounded == int(rounded) else rounded


def _numbers(numbers: Sequence[int]) -> str:
    """`3-5`; `2,4` where the numbers have gaps."""
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(map(str, numbers[:3])) + ("…" if len(numbers) > 3 else "")
