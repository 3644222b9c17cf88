"""The page: one HTML document with its style, its script and its pictures inside."""

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from typing import Any

from savepoint import words
from savepoint.report import chart, record
from savepoint.report.chart import Mark
from savepoint.report.curves import Chart, Series, means, thinned
from savepoint.report.gather import Report
from savepoint.report.markup import Markup, command, element, facts, folded, section
from savepoint.report.pictures import Picture
from savepoint.words import plural

GENERATOR = "savepoint report"
"""By which a report is known again."""
AT_ONCE = 12
"""Charts that are shown before the rest is folded away."""


def page(report: Report) -> str:
    style, script = _own("page.css"), _own("page.js")
    charts = [one for one in report.curves.charts if _is_curve(one)]
    # The one script that may run is ours, and nothing is fetched, whatever a name in a log says.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src '{_hash(script)}'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="generator", content=GENERATOR),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{report.name}: {report.state}"),
        element("style", Markup(style)),
    )
    now = words.moment(datetime.now(UTC).isoformat())
    body = element(
        "body",
        _header(report),
        element(
            "main",
            _curves(report, charts),
            _events(report.marks),
            _pictures(report.pictures),
            record.checkpoints(report),
            record.starts(report.starts),
            record.environment(report),
            record.config(report.config),
        ),
        element("footer", f"Written {now} by savepoint report from {report.shown}. Times are UTC."),
        element("script", Markup(_values(report, charts)), type="application/json", id="values"),
        element("script", Markup(script)),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _own(name: str) -> str:
    return resources.files("savepoint.report").joinpath(name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


# -- the head --------------------------------------------------------------------------------------------------------


def _header(report: Report) -> Markup:
    state = f"{report.state}: {report.holder}" if report.holder else report.state
    missing = [element("li", line) for line in report.missing]
    return element(
        "header",
        element(
            "div", element("h1", report.name), element("span", state, class_=f"state {report.state}"), class_="title"
        ),
        element("p", _about(report), class_="about"),
        _figures(report),
        *(
            element("p", element("span", what, class_="quiet"), command(text), class_="type")
            for what, text in report.commands
        ),
        element("ul", *missing, class_="missing") if missing else None,
    )


def _about(report: Report) -> str:
    parameters, ended = report.summary.get("parameters"), report.latest.get("ended")
    said = [
        str(report.summary.get("dataset") or report.dataset.get("name") or ""),
        f"{parameters:,} parameters" if isinstance(parameters, int) else "",
        f"begun {words.moment(report.starts[0].time)}" if report.starts else "",
        plural(len(report.starts), "start") if report.starts else "",
        f"ended by {ended}" if ended else "",
    ]
    return " · ".join(one for one in said if one)


def _figures(report: Report) -> Markup | None:
    """The numbers that are looked for first."""
    found = [*_tested(report), *_best(report)]
    if report.latest:
        epochs = plural(int(report.latest.get("epoch") or 0), "epoch")
        found.append(("steps", f"{report.latest['step']:,}", epochs))
    secs, rate = report.summary.get("fit_secs"), report.summary.get("images_per_sec")
    if isinstance(secs, int | float):
        rate = f"{rate:,.0f} samples/s" if isinstance(rate, int | float) else ""
        found.append(("time in training", words.duration(secs), rate))
    elif report.curves.secs:
        found.append(("time in training", f"about {words.duration(report.curves.secs)}", "by the clock of the log"))
    boxes = [
        element("div", element("dt", name), element("dd", value), element("dd", note, class_="note"))
        for name, value, note in found
    ]
    return element("dl", *boxes, class_="figures") if boxes else None


def _tested(report: Report) -> list[tuple[str, str, str]]:
    of = f"of {report.summary.get('tested_checkpoint') or 'the last weights'}"
    values = {
        name: value
        for name, value in report.summary.items()
        if name.startswith("test/") and isinstance(value, int | float)
    }
    return [
        (name.replace("/", " "), words.metric(name, values[name]), of)
        for name in sorted(values, key=lambda name: "acc" not in name)
    ]


def _best(report: Report) -> list[tuple[str, str, str]]:
    best = report.latest.get("best_score")
    if not isinstance(best, int | float):
        return []
    steps = [f"at step {file.step:,}" for file in report.files if file.best and file.score == best]
    return [(f"best {report.monitor}", words.metric(report.monitor, best), steps[0] if steps else "")]


# -- curves ----------------------------------------------------------------------------------------------------------


def _is_curve(one: Chart) -> bool:
    return any(len(series.steps) > 1 for series in one.series)


def _curves(report: Report, charts: Sequence[Chart]) -> Markup:
    figures = [_figure(report, place, charts) for place in range(len(charts))]
    first_clock = next((place for place, one in enumerate(charts) if one.by_the_clock), len(charts))
    metrics, clock = figures[:first_clock], figures[first_clock:]
    long = any(means(series) for one in charts for series in one.series)
    hidden = [("more charts", metrics[AT_ONCE:]), ("by the clock", clock)]
    return section(
        "Curves",
        *(element("p", line, class_="quiet") for line in report.curves.missing),
        element("div", *metrics[:AT_ONCE], class_="charts") if metrics else None,
        element(
            "p",
            "Pale: from the lowest to the highest value. Strong: the mean of each hundredth of the values.",
            class_="note",
        )
        if long
        else None,
        *(folded(f"{len(some)} {name}", element("div", *some, class_="charts")) for name, some in hidden if some),
        _measured_once(report),
    )


def _figure(report: Report, place: int, charts: Sequence[Chart]) -> Markup:
    one = charts[place]
    legend = [
        element("li", chart.key(one, series), f"{series.label} ", element("b", _last(one, series)))
        for series in one.series
    ]
    broken = [
        f"{series.name} was NaN or infinite {plural(len(steps), 'time')}, first at step {steps[0]:,.0f}."
        for series in one.series
        if (steps := series.not_finite())
    ]
    return element(
        "figure",
        element(
            "figcaption",
            element("h3", one.quantity),
            element("span", "last values", class_="at"),
            element("ul", *legend, class_="legend"),
        ),
        element("div", chart.plot(one, chart.step_axis(report.last_step), report.marks, _lines(charts)), class_="plot"),
        element("div", *(element("p", line, class_="note") for line in broken)),
        data_chart=place,
    )


def _last(one: Chart, series: Series) -> str:
    found = series.finite()
    return words.measured(found[-1][1], one.unit) if found else "none"


def _lines(charts: Sequence[Chart]) -> int:
    return sum(len(one.series) for one in charts)


def _measured_once(report: Report) -> Markup | None:
    """What has one value, and so no curve."""
    found = [
        (series.name, f"{_last(one, series)} at step {series.steps[-1]:,.0f}")
        for one in report.curves.charts
        if not _is_curve(one)
        for series in one.series
    ]
    return element("div", element("h3", "Measured once"), facts(found), class_="once") if found else None


def _values(report: Report, charts: Sequence[Chart]) -> str:
    """The points of each chart, for the script. Numbers and our own words only: nothing in it ends the element."""
    found = []
    for one in charts:
        axis = chart.value_axis(one)
        series = [_points(of, _lines(charts)) for of in one.series]
        found.append({"low": axis.low, "high": axis.high, "unit": one.unit, "series": series})
    return json.dumps({"end": chart.step_axis(report.last_step).high, "charts": found}, separators=(",", ":"))


def _points(series: Series, lines: int) -> dict[str, Any]:
    points = [(step, value) for step, value in thinned(series, lines) if value is not None]
    return {
        "role": series.role,
        "steps": [_short(step) for step, _ in points],
        "values": [_short(value) for _, value in points],
    }


def _short(value: float) -> float | int:
    rounded = float(f"{value:.7g}")
    return int(rounded) if abs(rounded) < 1e15 and rounded == int(rounded) else rounded


# -- events and pictures ---------------------------------------------------------------------------------------------


def _events(marks: Sequence[Mark]) -> Markup | None:
    items = [
        element(
            "li",
            element("span", str(mark.number), class_="number"),
            element("span", f"step {mark.step:,.0f}", class_="quiet"),
            element("span", mark.text),
            class_=mark.kind,
        )
        for mark in marks
    ]
    return section("What happened", element("ol", *items, class_="events")) if items else None


def _pictures(pictures: Sequence[Picture]) -> Markup | None:
    figures = [_picture(one) for one in pictures]
    return section("Pictures", element("div", *figures, class_="pictures")) if figures else None


def _picture(one: Picture) -> Markup:
    title = one.tag.replace("/", " ").replace("_", " ")
    data = f"data:image/{one.kind};base64,{base64.b64encode(one.data).decode()}"
    return element(
        "figure",
        element(
            "figcaption",
            element("h3", f"{title[:1].upper()}{title[1:]}"),
            element("span", f"step {one.step:,}", class_="at"),
        ),
        element("img", src=data, alt=title, width=one.width or None, height=one.height or None),
    )
