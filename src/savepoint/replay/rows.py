"""What a replay has logged, beside what the run has logged."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from savepoint.training.logs import read_rows

CLOCK = "time/"


@dataclass(frozen=True)
class Compared:
    """Two logs side by side.

    Attributes:
        equal: How many rows are equal, up to the first that is not.
        first: The step in the first row that was compared; None where there is none.
        last: As `first`.
        differing: Of the first row that is not equal: its step, and [logged, replayed] by name.
        missing: How many rows the run's log does not have.
    """

    equal: int
    first: int | None
    last: int | None
    differing: dict[str, Any] | None
    missing: int

    @property
    def is_equal(self) -> bool:
        return self.differing is None


def compare(log: Path, skip: int, replayed: Path, skip_replayed: int = 0) -> Compared:
    """Row by row, values of the clock left out.

    Args:
        log: The run's metrics.csv, and `skip`: its rows up to the checkpoint.
        skip_replayed: As `skip`, of the other log.
    """
    was = [_values(row) for row in read_rows(log)[1][skip:]] if log.is_file() else []
    now = (
        [_values(row) for row in read_rows(replayed)[1][skip_replayed:]]
        if replayed.is_file()
        else []
    )
    both = list(zip(was, now, strict=False))
    wrong = next((number for number, (one, other) in enumerate(both) if one != other), None)
    equal = len(both) if wrong is None else wrong
    steps = [_step(one) for one, _ in both]
    differing = None
    if wrong is not None:
        one, other = both[wrong]
        names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
        values = {name: [one.get(name), other.get(name)] for name in names}
        differing = {"step": _step(one), "values": values}
    first, last = (steps[0], steps[-1]) if steps else (None, None)
    return Compared(equal, first, last, differing, max(0, len(now) - len(was)))


def _values(row: Mapping[str, str]) -> dict[str, str]:
    """Without empty cells: a column may have come later."""
    return {name: value for name, value in row.items() if value and not name.startswith(CLOCK)}


def _step(row: Mapping[str, str]) -> int:
    try:
        return int(row.get("step", ""))
    except ValueError:  # a damaged row
        return -1
