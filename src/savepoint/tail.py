"""The end of a metrics.csv, which may be long, damaged, or being written. Standard library only."""

import csv
import os
from pathlib import Path

_BYTES = 1 << 16


def columns(line: str) -> list[str]:
    """The names in the first line; none where it is damaged."""
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        return []


def rows(path: Path) -> list[dict[str, str]]:
    """The last whole rows; none where the file is missing."""
    try:
        with path.open("rb") as file:
            names = columns(file.readline().decode(errors="replace"))
            begin = file.tell()
            start = max(begin, file.seek(0, os.SEEK_END) - _BYTES)
            file.seek(start)
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = text.split("\n")[:-1]  # what has no end yet is being written
    if start > begin:
        lines = lines[1:]
    return [dict(zip(names, line.split(","), strict=False)) for line in lines]


def last_step(path: Path) -> int | None:
    """The step in the last row; None where no step can be read."""
    try:
        return int(rows(path)[-1]["step"])
    except (LookupError, ValueError):
        return None
