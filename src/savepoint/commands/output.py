"""How the commands print: aligned plain text that reads the same in a pipe, and JSON. No colours, no terminal needed."""

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from savepoint.entry import printable

_NUMBER = re.compile(r"[-+]?(\d.*|inf|nan)")
_UNITS = (("d", 86400), ("h", 3600), ("min", 60))


def put(text: str) -> None:
    sys.stdout.write(printable(text) + "\n")


def put_json(data: Any) -> None:
    """NaN and infinities, which JSON does not know, become the texts "nan", "inf" and "-inf", as in a manifest."""
    sys.stdout.write(json.dumps(_plain(data), indent=2, allow_nan=False) + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need; those of numbers to the right. Without a header where it is empty."""
    lines = [[printable(cell).replace("\n", "\\n") for cell in row] for row in ([header, *rows] if header else rows)]
    columns = []
    for place, cells in enumerate(zip(*lines, strict=True)):
        width = max(map(len, cells))
        said = [cell for cell in cells[bool(header) :] if cell not in ("", "-")]
        right = place > 0 and said and all(map(_NUMBER.fullmatch, said))
        columns.append([cell.rjust(width) if right else cell.ljust(width) for cell in cells])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.3g}"
    return "-" if value is None else str(value)


def megabytes(size: float) -> str:
    return f"{size / 1e6:.2f} MB"


def age(when: str | None) -> str:
    """How long ago an ISO time with a zone was: "5 min"."""
    try:
        secs = (datetime.now(UTC) - datetime.fromisoformat(when or "")).total_seconds()
    except (ValueError, TypeError):
        return "-"
    unit, length = next(((unit, length) for unit, length in _UNITS if secs >= length), ("s", 1))
    return f"{max(0, int(secs // length))} {unit}"


def _plain(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    if isinstance(data, Path) or (isinstance(data, float) and not math.isfinite(data)):
        return str(data)
    return data
