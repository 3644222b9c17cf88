"""The lower half of the page: the checkpoints, the starts, the environment, the config."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from savepoint import words
from savepoint.report import chart
from savepoint.report.chart import Dot
from savepoint.report.gather import File, Report, Start
from savepoint.report.markup import Markup, command, element, facts, folded, section
from savepoint.words import plural

AT_ONCE = 12
"""Starts that are shown before those that came earlier are folded away."""


def checkpoints(report: Report) -> Markup:
    if not report.files:
        return section("Checkpoints", element("p", "There is no checkpoint.", class_="quiet"))
    names = ("file", "step", "epoch", report.monitor, "size", "saved", "state")
    head = [
        element("th", name, scope="col", class_="num" if 0 < place < 5 else None) for place, name in enumerate(names)
    ]
    table = element(
        "table",
        element("thead", element("tr", *head)),
        element("tbody", *(_row(file, report.monitor) for file in report.files)),
    )
    return section(
        "Checkpoints",
        element("div", chart.time_line(_lanes(report.files), chart.step_axis(report.last_step)), class_="plot wide"),
        element("div", table, class_="scroll", role="region", aria_label="Table of checkpoints", tabindex="0"),
        element("p", _rules(report.rules), class_="note"),
    )


def _lanes(files: Sequence[File]) -> list[tuple[str, list[Dot]]]:
    lanes: dict[str, list[Dot]] = {}
    for file in files:
        if file.step is not None:
            kind = "best" if file.best else {"in the run": "kept", "damaged": "damaged", "rewound": "aside"}[file.place]
            best, latest = "best" if file.best else "", "latest" if file.latest else ""
            title = ", ".join(word for word in (f"step {file.step:,}", best, latest) if word)
            lanes.setdefault(file.place, []).append(Dot(file.step, kind, title, best, latest))  # type: ignore[arg-type]
    return list(lanes.items())


def _row(file: File, monitor: str) -> Markup:
    badges = [element("span", mark, class_="badge") for mark in ("latest", "best") if getattr(file, mark)]
    time, _, reason = file.saved.partition(" · ")
    numbers = {
        "step": "" if file.step is None else f"{file.step:,}",
        "epoch": "" if file.epoch is None else str(file.epoch),
        monitor: "" if file.score is None else words.metric(monitor, file.score),
        "size": "" if file.size_bytes is None else words.megabytes(file.size_bytes),
    }
    return element(
        "tr",
        element("td", element("code", file.name), *badges, class_="file"),
        *(
            element("td", text or "-", class_="num" if text else "num none", data_name=name)
            for name, text in numbers.items()
        ),
        element("td", " · ".join(word for word in (words.moment(time), reason) if word), class_="when"),
        element("td", file.fate, class_="why bad" if file.place == "damaged" else "why"),
    )


def _rules(rules: Mapping[str, int] | None) -> str:
    judged = "Files are judged by structure and seal; savepoint verify looks at every byte."
    if rules is None:
        return f"What retention keeps is not known: config.yaml does not say it. {judged}"
    said = ", ".join(f"{name} {value}" for name, value in rules.items()) or "the defaults"
    return f"Retention: {said}. What it let go is deleted and not listed. {judged}"


def starts(found: Sequence[Start]) -> Markup | None:
    blocks = [_start(start) for start in found]
    if not blocks:
        return None
    older, newer = blocks[:-AT_ONCE], blocks[-AT_ONCE:]
    return section(
        "Starts",
        folded(f"{len(older)} before these", element("div", *older)) if older else None,
        element("div", *newer),
    )


def _start(start: Start) -> Markup:
    said = [
        words.moment(start.time),
        f"from {start.checkpoint}" if start.checkpoint else "from the beginning",
        f"on {start.host}" if start.host else "",
        f"{start.processes} processes" if (start.processes or 1) > 1 else "",
    ]
    changes = ", ".join(f"{key}: {_pair(pair)}" for key, pair in start.changed.items())
    return element(
        "div",
        element("h3", f"Start {start.number}"),
        element("p", " · ".join(one for one in said if one), class_="quiet"),
        command(shlex.join(["python", *start.argv])) if start.argv else None,
        element("p", f"Changed {changes}") if changes else None,
        class_="began",
    )


def _pair(pair: Any) -> str:
    return f"{pair[0]} → {pair[1]}" if isinstance(pair, list) and len(pair) == 2 else str(pair)


def environment(report: Report) -> Markup | None:
    if not report.starts:
        return None
    last = report.starts[-1]
    uncommitted = ", with changes that are not committed" if last.dirty else ""
    found = {
        "host": last.host,
        "hardware": last.hardware,
        "processes": str(last.processes or ""),
        "code": f"commit {last.commit[:12]}{uncommitted}" if last.commit else "not under git",
        "data": ", ".join(str(value) for value in report.dataset.values() if value),
        **{name: f"{version}{_before(report.starts, name)}" for name, version in last.versions.items()},
    }
    return section("Environment of the last start", facts((name, value) for name, value in found.items() if value))


def _before(found: Sequence[Start], name: str) -> str:
    """` (2.14.0 before)` where an earlier start had another version."""
    others = dict.fromkeys(start.versions[name] for start in found if name in start.versions)
    del others[found[-1].versions[name]]
    return f" ({', '.join(others)} before)" if others else ""


def config(text: str | None) -> Markup | None:
    if text is None:
        return None
    title = f"config.yaml of the last start, {plural(len(text.splitlines()), 'line')}"
    return section("Config", folded(title, element("pre", text)))
