import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from savepoint.checkpoint.retention import Facts, Retention, ranked, reasons


def facts(*scores: float | None) -> list[Facts]:
    """One checkpoint every 10 steps, alternately inside and at the end of an epoch."""
    return [Facts(10 * n, n // 2, score, n % 2 == 0) for n, score in enumerate(scores, 1)]


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(), {20, 60}),
        (Retention(keep_last=0, keep_best=0), {20, 60}),
        (Retention(keep_last=3), {20, 40, 50, 60}),
        (Retention(keep_best=3), {10, 20, 30, 60}),
        (Retention(keep_every_n_epochs=1), {20, 40, 60}),
        (Retention(keep_every_n_epochs=2), {20, 40, 60}),
        (Retention(keep_every_n_epochs=3, keep_best=0), {20, 60}),
        (Retention(keep_every_n_steps=30), {20, 30, 60}),
        (Retention(keep_every_n_steps=1), {10, 20, 30, 40, 50, 60}),
        (Retention(keep_last=9, keep_best=9), {10, 20, 30, 40, 50, 60}),
    ],
)
def test_a_checkpoint_stays_if_any_rule_keeps_it(retention: Retention, kept: set[int]) -> None:
    assert set(reasons(facts(3.0, 1.0, 2.0, 5.0, 4.0, 6.0), retention, "min")) == kept


def test_each_reason_is_said() -> None:
    why = reasons(
        facts(3.0, 1.0, 2.0, 5.0),
        Retention(2, 2, keep_every_n_epochs=2, keep_every_n_steps=20),
        "max",
    )
    assert why == {
        40: ["last-1", "best-1", "every 2 epochs", "every 20 steps"],
        30: ["last-2"],
        10: ["best-2"],
        20: ["every 20 steps"],
    }


def test_an_epoch_counts_only_at_its_end() -> None:
    in_the_middle = [Facts(10, 2, None, False), Facts(20, 3, None, False)]
    assert set(reasons(in_the_middle, Retention(keep_every_n_epochs=1), "min")) == {20}


@pytest.mark.parametrize(("mode", "best"), [("min", [10, 30, 20]), ("max", [20, 10, 30])])
def test_of_equal_scores_the_earlier_is_better(mode: str, best: list[int]) -> None:
    assert [one.step for one in ranked(facts(1.0, 2.0, 1.0), mode)] == best
    assert [one.step for one in ranked(facts(1.0, 2.0, 1.0)[::-1], mode)] == best


@pytest.mark.parametrize("mode", ["min", "max"])
def test_no_number_that_is_not_finite_is_ranked(mode: str) -> None:
    assert [one.step for one in ranked(facts(math.nan, math.inf, 1.0, -math.inf, None), mode)] == [
        30
    ]


@pytest.mark.parametrize(
    "bad",
    [{"keep_last": -1}, {"keep_best": -1}, {"keep_every_n_steps": 0}, {"keep_every_n_epochs": -2}],
)
def test_a_number_out_of_range_is_refused_by_name(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Retention(**bad)


scores = st.lists(st.none() | st.floats() | st.integers(0, 3).map(float), min_size=1, max_size=30)
numbers = st.integers(0, 4)
intervals = st.none() | st.integers(1, 5)


@given(
    scores,
    st.builds(Retention, numbers, numbers, intervals, intervals),
    st.sampled_from(["min", "max"]),
)
def test_the_newest_and_the_best_never_go(
    scores: list[float | None], retention: Retention, mode: str
) -> None:
    checkpoints = facts(*scores)
    kept = reasons(checkpoints, retention, mode)
    finite = [one for one in checkpoints if one.score is not None and math.isfinite(one.score)]
    assert max(one.step for one in checkpoints) in kept
    if finite:
        best = (min if mode == "min" else max)(one.score for one in finite)
        assert next(one.step for one in finite if one.score == best) in kept
    assert all(kept.values())


@given(scores, st.builds(Retention, numbers, numbers, intervals, intervals))
def test_what_was_kept_is_kept_again(scores: list[float | None], retention: Retention) -> None:
    """Retention over what retention left deletes nothing more."""
    kept = reasons(facts(*scores), retention, "min")
    left = [one for one in facts(*scores) if one.step in kept]
    assert reasons(left, retention, "min").keys() == kept.keys()
