"""The page: one HTML document with its style, its script and its pictures inside."""

import base64
import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeGuard

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from savepoint import words
from savepoint.report import chart, clients
from savepoint.report.curves import series_of
from savepoint.report.gather import Report

GENERATOR = "savepoint report"
"""Marks a file as a report."""
AT_ONCE = 12
"""Charts, and starts, that are shown before the others are folded away."""
HERE = Path(__file__).parent


def page(report: Report) -> str:
    steps = chart.step_axis(report.last_step)
    style = _own("page.css")
    script = _own("page.js")
    own = {"generator": GENERATOR, "policy": _policy(script), "style": style, "script": script}
    shown = {
        "charts": chart.drawn([one for one in report.curves.charts if one.is_curve], steps),
        "flags": chart.flags(report.marks, steps),
        "steps": steps,
        "numbers": list(_numbers(report)),
        "environment": list(_environment(report)),
        "client_height": clients.HIGH,
        "now": words.moment(datetime.now(UTC).isoformat()),
    }
    return _templates().get_template("page.html").render(vars(report) | own | shown)


def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["thousands"] = "{:,.0f}".format
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.globals |= {
        "words": words,
        "high": chart.HEIGHT,
        "wide": chart.WIDE,
        "at_once": AT_ONCE,
    }
    return environment


def _own(name: str) -> Markup:
    return Markup((HERE / name).read_text(encoding="utf-8"))


def _policy(script: str) -> str:
    """Only our script may run and nothing is fetched, whatever text a log holds."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    ours = f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"default-src 'none'; img-src data:; {ours}"


def _numbers(report: Report) -> Iterator[tuple[str, str, str]]:
    """(name, value, note) of the results."""
    summary = report.summary
    latest = report.latest
    monitor = report.monitor
    tests = [pair for pair in summary.items() if series_of(pair[0]).role == "test"]
    results = [pair for pair in tests if _is_number(pair[1])]
    for name, value in words.metrics(sorted(results, key=lambda pair: "acc" not in pair[0])):
        yield name, value, f"of {summary.get('tested_checkpoint') or 'the last weights'}"
    if _is_number(best := latest.get("best_score")):
        same = [file for file in report.files if file.checkpoint and file.checkpoint.score == best]
        steps = [f"at step {file.step:,}" for file in same if "best" in file.marks]
        yield f"best {monitor}", words.metric(monitor, best), "".join(steps)
    if latest:
        epochs = words.plural(int(latest.get("epoch") or 0), "epoch")
        yield "steps", f"{latest['step']:,}", epochs
    if _is_number(secs := summary.get("fit_secs")):
        # Runs before version 0.3 say images.
        rate = summary.get("samples_per_sec", summary.get("images_per_sec"))
        note = f"{rate:,.0f} samples/s" if _is_number(rate) else ""
        yield "time in training", words.duration(secs), note
    elif report.curves.secs:
        about = f"about {words.duration(report.curves.secs)}"
        yield "time in training", about, "by the clock of the log"


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float)


def _environment(report: Report) -> Iterator[tuple[str, Any]]:
    last = report.starts[-1] if report.starts else {}
    git = last.get("git") or {}
    versions = last.get("versions") or {}
    commit = git.get("commit") or None
    uncommitted = ", with changes that are not committed" if git.get("dirty") else ""
    yield "host", last.get("host")
    yield "hardware", last.get("hardware")
    yield "processes", last.get("world_size")
    code = f"commit {commit[:12]}{uncommitted}" if isinstance(commit, str) else ""
    yield "code", code or "not under git"
    yield "data", ", ".join(str(value) for value in report.dataset.values() if value)
    for name, version in versions.items():
        every = [str((start["versions"] or {}).get(name, version)) for start in report.starts]
        others = ", ".join(one for one in dict.fromkeys(every) if one != str(version))
        yield name, f"{version} ({others} before)" if others else str(version)
