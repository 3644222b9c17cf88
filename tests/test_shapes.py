"""Trainings of many kinds, stopped and resumed: equal bit for bit, or said not exact."""

import pytest
from shapes.runner import POINTS, all_shapes, judge

CUT = [
    "flags/base", "flags/val_interval_3", "flags/accumulate_3", "flags/precision_64",
]  # fmt: skip
FEW = {"batch": 2, "epoch": 1, "validation": 1}


def check(name: str, points: dict[str, int]) -> None:
    verdict = judge(name, all_shapes()[name], points)
    assert not verdict.faults, "\n".join(verdict.told())


@pytest.mark.parametrize("name", CUT)
def test_a_training_of_a_stranger_resumes_as_it_says(name: str) -> None:
    check(name, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(all_shapes()))
def test_every_training_resumes_as_it_says_from_every_kind_of_point(name: str) -> None:
    check(name, POINTS)
