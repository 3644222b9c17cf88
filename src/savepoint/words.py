"""Words for people: how numbers, sizes, times, paths and tables are printed, as plain text that
reads the same in a pipe.
"""

import contextlib
import difflib
import html
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_NUMBER = re.compile(r"[-+]?(\d.*|inf|nan)")
_UNITS = (("d", 86400), ("h", 3600), ("min", 60))
SHARE = re.compile(r"(?:.*[^a-z])?acc(?:uracy)?(?:[^a-z].*)?")
"""The names of metrics that are printed as percentages where they lie in 0..1."""


def plural(number: int, word: str, ending: str = "s") -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}{ending}"


def nearest(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """A sentence with up to three known names that are like `name`; empty where none is."""
    by_fold = {one.lower(): one for one in sorted(set(known), reverse=True)}
    folds = difflib.get_close_matches(name.lower(), by_fold, n=3, cutoff=0.6)
    close = [prefix + by_fold[fold] for fold in folds]
    return f" Did you mean {' or '.join(close)}?" if close else ""


def printable(text: str) -> str:
    """The text with every unprintable character escaped (in a file's name, say), so that none acts
    on a terminal.
    """
    return text if text.isprintable() else "\n".join(map(_escaped, text.split("\n")))


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    if len(text) > 1:
        return "".join(map(_escaped, text))
    return text.encode("unicode_escape", "surrogatepass").decode()


class Table(str):
    """The text of a table, which a notebook shows as HTML."""

    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()

    def _repr_html_(self) -> str:
        lines = [*([self.header] if self.header else []), *self.rows]
        kinds = ["th" if place == 0 and self.header else "td" for place in range(len(lines))]
        marked = (
            "".join(f"<{kind}>{html.escape(printable(cell))}</{kind}>" for cell in line)
            for kind, line in zip(kinds, lines, strict=True)
        )
        return f"<table>{''.join(f'<tr>{line}</tr>' for line in marked)}</table>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, numbers to the right. An empty header is left out."""
    every = [header, *rows] if header else rows
    lines = [[printable(cell).replace("\n", "\\n") for cell in row] for row in every]
    columns = []
    for place, cells in enumerate(zip(*lines, strict=True)):
        width = max(map(len, cells))
        values = [cell for cell in cells[bool(header) :] if cell not in ("", "-")]
        right = place > 0 and values and all(map(_NUMBER.fullmatch, values))
        columns.append([cell.rjust(width) if right else cell.ljust(width) for cell in cells])
    text = "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))
    made = Table(text)
    made.header = header
    made.rows = rows
    return made


# -- JSON ----------------------------------------------------------------------------------------


def plain(data: Any) -> Any:
    """As JSON has it. NaN and infinities, which it lacks, become the texts "nan", "inf" and "-inf",
    as in a manifest.
    """
    if isinstance(data, Mapping):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [plain(value) for value in data]
    if isinstance(data, Path) or (isinstance(data, float) and not math.isfinite(data)):
        return str(data)
    return data


# -- paths ---------------------------------------------------------------------------------------


def show(path: Path) -> str:
    """The path as a person would type it here."""
    # Somebody may delete the working directory while a run trains.
    with contextlib.suppress(FileNotFoundError):
        return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    return str(path)


def python() -> str:
    """The interpreter of this process as a person would type it here: `.venv/bin/python`, say."""
    executable = Path(sys.executable)
    shown = show(executable)
    if shown != str(executable):
        return shown
    on_path = shutil.which("python")
    is_this = on_path is not None and Path(on_path).parent == executable.parent
    return "python" if is_this else str(executable)


# -- numbers -------------------------------------------------------------------------------------


def number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.3g}"
    return "-" if value is None else str(value)


def measured(value: float, unit: str = "") -> str:
    if unit and math.isfinite(value):
        return f"{value:.2f}{unit}"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.4f}" if abs(value) < 1000 else f"{value:,.1f}"
    return f"{value:.3g}"


def metric(name: str, value: float) -> str:
    """The value of a metric: an accuracy as a percentage."""
    is_share = SHARE.fullmatch(name.split("/")[-1]) and 0 <= value <= 1
    return measured(100 * value, " %") if is_share else measured(value)


def metrics(values: Iterable[tuple[str, float]]) -> list[tuple[str, str]]:
    """Rows of a table: `test/accuracy` is "test accuracy"."""
    return [(name.replace("/", " "), metric(name, value)) for name, value in values]


def count(steps: float) -> str:
    """A number of steps, short enough for a tick of an axis: 1,290, 40k, 2.5M."""
    if steps < 20_000:
        return f"{steps:,.0f}"
    return f"{steps / 1e6:g}M" if steps >= 1e6 else f"{steps / 1e3:g}k"


def megabytes(size: float) -> str:
    return f"{size / 1e6:.2f} MB"


def size(value: float) -> str:
    """In the unit that fits."""
    unit = "bytes"
    for larger in ("kB", "MB", "GB"):
        if value < 1000:
            break
        value /= 1000
        unit = larger
    return f"{value:.0f} {unit}" if value >= 100 or unit == "bytes" else f"{value:.1f} {unit}"


# -- times ---------------------------------------------------------------------------------------


def age(when: str | None) -> str:
    """How long ago an ISO time with a zone was: "5 min"."""
    try:
        secs = (datetime.now(UTC) - datetime.fromisoformat(when or "")).total_seconds()
    except (ValueError, TypeError):
        return "-"
    unit, length = next(((unit, length) for unit, length in _UNITS if secs >= length), ("s", 1))
    return f"{max(0, int(secs // length))} {unit}"


def moment(time: str) -> str:
    """An ISO time, in UTC, to the minute; any other text as it is."""
    try:
        return datetime.fromisoformat(time).astimezone(UTC).strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError):
        return time


def duration(secs: float) -> str:
    if secs < 60 or not math.isfinite(secs):
        return f"{secs:.1f} s"
    minutes, seconds = divmod(round(secs), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {seconds} s"
