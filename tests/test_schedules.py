import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import LambdaLR

from savepoint.schedules import SCHEDULES, Schedule, cosine, one_cycle, step

EACH = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


@EACH
@given(now=st.integers(0, 10**6), total=st.integers(1, 10**6))
def test_a_factor_is_above_0_and_at_most_1(schedule: Schedule, now: int, total: int) -> None:
    assert 0 < schedule(now, total) <= 1


@EACH
@pytest.mark.parametrize("total", [1, 7, 2150])
def test_past_its_end_a_schedule_stays_where_it_ended(schedule: Schedule, total: int) -> None:
    assert {schedule(now, total) for now in (total, total + 1, 10 * total)} == {
        schedule(total, total)
    }


@EACH
def test_a_training_of_no_steps_has_a_schedule(schedule: Schedule) -> None:
    assert schedule(0, 0) > 0


def test_one_cycle_rises_straight_to_1_and_falls_to_its_end() -> None:
    factors = [one_cycle(now, 100, warmup=0.2, start=0.1, end=0.01) for now in range(101)]
    assert factors[0] == 0.1
    assert factors[10] == pytest.approx(0.55)
    assert factors[20] == 1
    assert factors[60] == pytest.approx(0.505)
    assert factors[100] == 0.01
    assert factors[:21] == sorted(factors[:21])
    assert factors[20:] == sorted(factors[20:], reverse=True)


def test_one_cycle_may_be_all_warm_up_or_none() -> None:
    assert [one_cycle(now, 4, warmup=1, start=0) for now in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert [one_cycle(now, 4, warmup=0) for now in range(5)] == [cosine(now, 4) for now in range(5)]


def test_step_drops_at_its_shares_of_the_training() -> None:
    factors = [step(now, 8, drops=(0.5, 0.75), gamma=0.5) for now in range(9)]
    assert factors == [1, 1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25]


def test_a_scheduler_on_a_lambda_saves_plain_values_only() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    state = LambdaLR(optimizer, lambda now: one_cycle(now, 10)).state_dict()
    assert state["lr_lambdas"] == [None]
