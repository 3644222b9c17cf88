"""Trainings of many kinds, stopped and resumed: equal bit for bit, or said not exact."""

import pytest
from shapes.runner import FEW, POINTS, all_shapes, judge

CUT = [
    "callbacks/backbone", "callbacks/rate_by_count", "flags/accumulate_3", "flags/max_steps_inside",
    "loaders/combined_max_size", "loaders/keeps_position", "loaders/stock_shuffled",
    "logs/rank_zero_only", "manual/fetches", "manual/gan_dict", "metrics/running_mean",
    "optimizers/lbfgs", "samplers/noise_own_numpy", "schedules/plateau_step_val",
    "seventh/appended", "seventh/drawn_validation_both_sanity", "seventh/draws_everywhere",
    "seventh/feature_bank_interval", "seventh/folds_every_2", "seventh/hard_samples",
    "seventh/random_sizes", "state/buffer_left_out", "state/held_nested",
]  # fmt: skip


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
