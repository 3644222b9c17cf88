"""Curves and the time line of checkpoints as SVG that is as wide as its place: across in percent, down in pixels.

So lines, letters and dots keep their size from a telephone to a wide screen, without a script. Only the lines themselves
lie in a coordinate system that is stretched; their strokes are not.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from savepoint import words
from savepoint.report.curves import Chart, Series, means, thinned
from savepoint.report.markup import Markup, element, joined

HEIGHT, WIDE = 190, 1000
LETTER = 14
"""Pixels from one label at the end of a line to the next."""
LETTERS = 7
"""Of a name that has room beside the chart."""
LANE = 46
CROSS = element("path", d="M-5-5 5 5M5-5-5 5", class_="cross")


@dataclass(frozen=True)
class Mark:
    """Something that happened to the run, at a step: `text` is told in the list that `number` points to."""

    number: int
    step: float
    kind: Literal["resume", "fault"]
    text: str


class Dot(NamedTuple):
    """A checkpoint on the time line."""

    step: float
    kind: Literal["kept", "best", "damaged", "aside"]
    title: str
    above: str = ""
    below: str = ""


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

    def said(self, value: float) -> str:
        """A tick as text, with as many digits as tell it from its neighbours."""
        spacing = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else 1.0
        largest, finest = max(map(abs, self.ticks)), math.floor(math.log10(spacing) + 1e-9)
        if largest >= 1e6 or finest < -5:
            return f"{value:.{math.floor(math.log10(largest)) - finest + 1}g}"
        return f"{value:,.{max(0, -finest)}f}"


def plot(chart: Chart, steps: Axis, marks: Sequence[Mark], number_of_series: int) -> Markup:
    """The picture of one chart. What it shows is told beside it, in the legend."""
    values, classes = value_axis(chart), styled(chart)
    lines: list[Markup] = []
    for series in (one for one in chart.series if len(one.steps) > 1):
        every, mean = thinned(series, number_of_series), means(series) if not is_fine(chart, series) else []
        pale = f"line {series.role} fine" if mean else classes[series.name]
        lines.append(element("path", d=_path(every, steps, values), class_=pale))
        if mean:
            lines.append(element("path", d=_path(mean, steps, values), class_=classes[series.name]))
    stretched = {"viewBox": f"0 0 {WIDE} {HEIGHT}", "preserveAspectRatio": "none", "class_": "stretched"}
    return element(
        "svg",
        *_grid(steps, values, chart.unit),
        *_flags(marks, steps),
        element("svg", *lines, width="100%", height=HEIGHT, **stretched),
        *_points(chart, steps, values),
        *_names(chart, steps, values),
        width="100%", height=HEIGHT, role="img", aria_label=_in_words(chart, steps),
    )  # fmt: skip


def time_line(lanes: Sequence[tuple[str, Sequence[Dot]]], steps: Axis) -> Markup:
    """One line for what is kept, what is damaged, what was rewound; over the steps of the curves."""
    height = LANE * len(lanes)
    parts = []
    for place, (name, dots) in enumerate(lanes):
        middle = LANE * place + 22
        parts.append(element("text", name, x="0", y=middle, dx="-14", dy="4", class_="lane end"))
        parts.append(element("line", x1="0", x2="100%", y1=middle, y2=middle, class_="rule"))
        parts += [_dot(dot, middle, steps) for dot in dots]
    for tick in steps.ticks:
        side = "middle" if tick else "start"
        parts.append(element("text", _step(tick), x=steps.across(tick), y=height + 14, class_=f"tick {side}"))
    said = "; ".join(f"{name}: {', '.join(dot.title for dot in dots)}" for name, dots in lanes)
    return element("svg", *parts, width="100%", height=height, role="img", aria_label=f"Checkpoints by step. {said}")


def key(chart: Chart, series: Series) -> Markup:
    """The piece of line that stands before a series' name."""
    line = element("line", x1="1", x2="21", y1="5", y2="5", class_=styled(chart)[series.name])
    dot = element("circle", cx="11", cy="5", r="4", class_=f"dot {series.role}")
    return element("svg", dot if len(series.steps) == 1 else line, width="22", height="10", aria_hidden="true")


def styled(chart: Chart) -> dict[str, str]:
    """The classes of each line: a colour a role, a thin line for single steps, dashes where a colour comes again."""
    found, drawn = dict[str, str](), Counter[str]()
    for series in chart.series:
        classes = f"line {series.role} fine" if is_fine(chart, series) else f"line {series.role}"
        found[series.name] = f"{classes} dashed{min(drawn[classes], 2)}" if drawn[classes] else classes
        drawn[classes] += 1
    return found


def is_fine(chart: Chart, series: Series) -> bool:
    """Whether it is drawn pale: single steps beside the same value of whole epochs."""
    return series.label.endswith(" each step") and len(chart.series) > 1


def step_axis(last: float) -> Axis:
    high = max(1.0, last)
    return Axis(0.0, high, [tick for tick in _ticks(0.0, high, 5.5, (1, 2, 2.5, 5, 10)) if tick == round(tick)])


def value_axis(chart: Chart) -> Axis:
    values = [value for series in chart.series for _, value in series.finite()]
    low, high = min(values, default=0.0), max(values, default=1.0)
    spread, size = high - low, max(abs(low), abs(high))
    flat = spread < max(1e-9 * size, 1e-290)
    room = 0.06 * spread if not flat else 0.05 * size if size > 1e-290 else 0.5
    bottom = max(0.0, low - room) if low >= 0 else low - room
    top = min(100.0, high + room) if chart.unit and low < 100 else high + room
    return Axis(bottom, top, _ticks(bottom, top, 4))


def _step(tick: float) -> str:
    return words.count(tick) if tick else "step 0"


def _ticks(low: float, high: float, at_most: float, factors: Sequence[float] = (1, 2, 5, 10)) -> list[float]:
    """Round numbers from low to high: so many spaces or fewer, each a factor times a power of ten."""
    rough = (high - low) / at_most
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    spacing = next(power * factor for factor in factors if power * factor >= rough * 0.99)
    first = math.ceil(low / spacing - 1e-9)
    return [spacing * n for n in range(first, math.floor(high / spacing + 1e-9) + 1)]


def _grid(steps: Axis, values: Axis, unit: str) -> list[Markup]:
    parts = []
    for tick in values.ticks:
        y = values.down(tick)
        parts.append(element("line", x1="0", x2="100%", y1=y, y2=y, class_="rule"))
        parts.append(element("text", values.said(tick) + unit, x="0", y=y, dx="-8", dy="4", class_="tick end"))
    for tick in steps.ticks:
        x = steps.across(tick)
        parts.append(element("line", x1=x, x2=x, y1=HEIGHT, y2=HEIGHT + 4, class_="rule"))
        parts.append(element("text", _step(tick), x=x, y=HEIGHT + 17, class_="tick middle"))
    return parts


def _flags(marks: Sequence[Mark], steps: Axis) -> list[Markup]:
    """A line a mark; its number above, those of neighbours together, as they would run into each other."""
    parts, flags = [], list[list[Mark]]()
    for mark in sorted(marks, key=lambda mark: mark.step):
        x = steps.across(mark.step)
        parts.append(element("line", x1=x, x2=x, y1="-4", y2=HEIGHT, class_=f"mark {mark.kind}"))
        if flags and steps.share(mark.step) - steps.share(flags[-1][0].step) < 0.05:
            flags[-1].append(mark)
        else:
            flags.append([mark])
    for together in flags:
        first, label = together[0], _numbers(sorted(mark.number for mark in together))
        kind = "fault" if any(mark.kind == "fault" for mark in together) else "resume"
        title = element("title", "\n".join(f"{mark.number}: {mark.text}" for mark in together))
        parts.append(element("text", label, title, x=steps.across(first.step), y="-8", class_=f"flag middle {kind}"))
    return parts


def _numbers(numbers: Sequence[int]) -> str:
    """`3-5`; `2,4` where others stand elsewhere."""
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(map(str, numbers[:3])) + ("…" if len(numbers) > 3 else "")


def _path(points: Sequence[tuple[float, float | None]], steps: Axis, values: Axis) -> str:
    found, pen = [], "M"
    for step, value in points:
        if value is None:
            pen = "M"
            continue
        found.append(f"{pen}{WIDE * steps.share(step):.1f} {values.down(value)}")
        pen = "L"
    return "".join(found)


def _points(chart: Chart, steps: Axis, values: Axis) -> list[Markup]:
    """What is no line: a series of one value, and a cross at the bottom where a value was none."""
    parts = [
        element("circle", cx=steps.across(step), cy=values.down(value), r="4", class_=f"dot {series.role}")
        for series in chart.series
        if len(series.steps) == 1
        for step, value in series.finite()
    ]
    broken = {round(steps.share(step), 2): step for series in chart.series for step in series.not_finite()}
    for step in broken.values():
        title = element("title", f"NaN or infinite at step {step:,.0f}")
        parts.append(_at(steps.across(step), HEIGHT - 8, title, CROSS))
    return parts


def _names(chart: Chart, steps: Axis, values: Axis) -> list[Markup]:
    """Each line's name at its end; those of lines that end together are moved apart."""
    if len(chart.series) < 2:
        return []
    short = [series for series in chart.series if len(series.label) <= LETTERS]  # the legend has the others
    ends = [(series, *series.finite()[-1]) for series in short if series.finite()]
    places = {series.name: values.down(value) for series, _, value in ends}
    together = sorted(
        (series.name for series, step, _ in ends if steps.share(step) > 0.9), key=lambda name: places[name]
    )
    for above, below in pairwise(together):
        places[below] = max(places[below], places[above] + LETTER)
    for below, above in pairwise(reversed(together)):
        places[below] = min(places[below], HEIGHT)
        places[above] = min(places[above], places[below] - LETTER)
    return [
        element("text", series.label, x=steps.across(step), y=places[series.name], dx="9", dy="4", class_="name start")
        for series, step, _ in ends
    ]


def _in_words(chart: Chart, steps: Axis) -> str:
    ends = [
        f"{one.label} ends at {words.measured(one.finite()[-1][1], chart.unit)}" for one in chart.series if one.finite()
    ]
    return f"{chart.quantity}, step 0 to {steps.high:,.0f}: {', '.join(ends) or 'no finite value'}"


def _dot(dot: Dot, middle: int, steps: Axis) -> Markup:
    x = steps.across(dot.step)
    side = "end" if steps.share(dot.step) > 0.8 else "middle" if steps.share(dot.step) > 0.1 else "start"
    shape = {
        "kept": element("circle", r="5", class_="dot kept"),
        "best": element("path", d="M0-8 8 0 0 8-8 0Z", class_="dot kept"),
        "damaged": CROSS,
        "aside": element("circle", r="4.5", class_="dot hollow"),
    }[dot.kind]
    here = _at(x, middle, element("title", dot.title), shape)
    names = [
        element("text", text, x=x, y=y, class_=f"name {side}")
        for text, y in ((dot.above, middle - 12), (dot.below, middle + 20))
        if text
    ]
    return joined(here, *names)


def _at(x: str, y: float, *drawn: Markup) -> Markup:
    """An svg of no size is a place: what is drawn there keeps its own."""
    return element("svg", *drawn, x=x, y=y, width="1", height="1")
