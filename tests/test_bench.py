"""How a row of `make bench` reads: what is divided by what, and when an aim is missed."""

import sys

import pytest
from support.programs import ROOT

sys.path.append(str(ROOT / "benchmarks"))
from bench import Row


@pytest.mark.parametrize(("ours", "theirs", "aim", "unit", "read"), [
    (2.0, 6.0, ">= 3", "s", ["3.00x", ">= 3.00x", ""]),
    (2.0, 5.0, ">= 3", "s", ["2.50x", ">= 3.00x", "missed"]),
    (6.0, 5.0, "<= 1.2", "s", ["1.20x", "<= 1.20x", ""]),
    (7.0, 5.0, "<= 1.2", "s", ["1.40x", "<= 1.20x", "missed"]),
    (90.0, 100.0, ">= 0.95", "/s", ["0.90x", ">= 0.95x", "missed"]),
    (80.0, 100.0, "<= 1.02", "/s", ["1.25x", "<= 1.02x", "missed"]),
    (133.0, 100.0, "<= 1.1", "MB", ["1.33x", "<= 1.10x", "missed"]),
    (0.0, 100.0, "<= 0.02", "MB", ["0.00x", "<= 0.02x", ""]),
    (2.0, 5.0, ">=", "s", ["2.50x", "-", ""]),
    (2.0, 5.0, "<=", "s", ["0.40x", "-", ""]),
])  # fmt: skip
def test_more_is_better_at_an_aim_from_below_and_less_at_one_from_above(
    ours: float, theirs: float, aim: str, unit: str, read: list[str]
) -> None:
    assert Row("a question", ours, "theirs", theirs, aim, unit).cells[4:] == read
