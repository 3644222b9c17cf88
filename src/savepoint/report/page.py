"""The page: one HTML document with its style, its script and its pictures inside."""

import base64
import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from savepoint import words
from savepoint.report import chart
from savepoint.report.gather import Report

GENERATOR = "savepoint report"
"""By which a report is known again."""
AT_ONCE = 12
"""Charts, and starts, that are shown before the rest is folded away."""
HERE = Path(__file__).parent


def page(report: Report) -> str:
    steps, style, script = chart.step_axis(report.last_step), _own("page.css"), _own("page.js")
    charts = chart.drawn([one for one in report.curves.charts if one.is_curve], steps)
    return (
        _templates()
        .get_template("page.html")
        .render(
            vars(report),
            generator=GENERATOR,
            policy=_policy(script),
            style=style,
            script=script,
            steps=steps,
            charts=charts,
            flags=chart.flags(report.marks, steps),
            environment=_environment(report),
            now=words.moment(datetime.now(UTC).isoformat()),
        )
    )


def _templates() -> Environment:
    found = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["thousands"] = "{:,.0f}".format
    found.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    found.globals |= {"words": words, "high": chart.HEIGHT, "wide": chart.WIDE, "at_once": AT_ONCE}
    return found


def _own(name: str) -> Markup:
    return Markup((HERE / name).read_text(encoding="utf-8"))


def _policy(script: str) -> str:
    """The one script that may run is ours, and nothing is fetched, whatever a name in a log says."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    ours = f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"default-src 'none'; img-src data:; {ours}"


def _environment(report: Report) -> Iterator[tuple[str, Any]]:
    if not report.starts:
        return
    last, git = report.starts[-1], report.starts[-1]["git"] or {}
    uncommitted = ", with changes that are not committed" if git.get("dirty") else ""
    commit = f"commit {str(git.get('commit'))[:12]}{uncommitted}"
    yield "host", last["host"]
    yield "hardware", last["hardware"]
    yield "processes", last["world_size"]
    yield "code", commit if git.get("commit") else "not under git"
    yield "data", ", ".join(str(value) for value in report.dataset.values() if value)
    for name, version in (last["versions"] or {}).items():
        found = dict.fromkeys(str((one["versions"] or {}).get(name, "")) for one in report.starts)
        others = ", ".join(one for one in found if one not in ("", str(version)))
        yield name, f"{version} ({others} before)" if others else version
