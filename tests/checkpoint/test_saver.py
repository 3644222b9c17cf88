"""A training loop of one's own, with a `Saver`: when it saves, and what a failed save means."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from savepoint import CheckpointStore, Preempted, Saver, load, preemption, stoppable
from savepoint.errors import CheckpointSaveError, ConfigError, NonFiniteLossError


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CheckpointStore]:
    yield CheckpointStore(tmp_path / "checkpoints")
    preemption.requests.stop = preemption.requests.save = 0


def state(value: float = 1.0) -> Any:
    return lambda: {"weight": torch.full((3,), value)}


def steps(store: CheckpointStore) -> list[int]:
    return [one.step for one in store.checkpoints()]


def test_a_loop_saves_after_each_interval(store: CheckpointStore) -> None:
    saver = Saver(store, save_every_steps=4)
    assert [step for step in range(1, 13) if saver.poll(step, state())] == [4, 8, 12]


def test_a_loop_that_goes_on_waits_for_the_next_interval(store: CheckpointStore) -> None:
    Saver(store, save_every_steps=4).poll(8, state())
    saver = Saver(store, save_every_steps=4)
    assert [step for step in range(9, 14) if saver.poll(step, state())] == [12]


def test_epochs_count_where_one_has_ended(store: CheckpointStore) -> None:
    saver = Saver(store, save_every_epochs=2)
    ended = {5: 1, 10: 2, 15: 3, 20: 4}
    saved = [s for s in range(1, 21) if saver.poll(s, state(), ended_epochs=ended.get(s))]
    assert saved == [10, 20]


def test_seconds_count_from_the_save_before(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("savepoint.checkpoint.saver.time.monotonic", lambda: clock[0])
    saver = Saver(store, save_every_secs=30)
    saved = []
    for step in range(1, 8):
        clock[0] += 10
        if saver.poll(step, state()):
            saved.append(step)
    assert saved == [3, 6]


def test_the_file_save_now_asks_for_one_save(store: CheckpointStore, tmp_path: Path) -> None:
    saver = Saver(store)
    (tmp_path / "save-now").touch()
    assert [saver.poll(1, state()), saver.poll(2, state())] == [True, False]
    assert not (tmp_path / "save-now").exists()


def test_a_signal_saves_and_leaves(store: CheckpointStore) -> None:
    saver = Saver(store)

    def loop() -> None:
        with stoppable():
            for step in range(1, 5):
                if step == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                saver.poll(step, state())

    with pytest.raises(Preempted) as left:
        loop()
    assert left.value.code == 128 + signal.SIGTERM
    assert steps(store) == [3]


def test_the_state_is_asked_for_only_where_it_is_saved(store: CheckpointStore) -> None:
    def unwanted() -> dict[str, Any]:
        raise AssertionError("not to be called")

    assert not Saver(store, save_every_steps=5).poll(3, unwanted)


def test_the_monitor_ranks_what_was_measured(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", monitor="loss", mode="min")
    saver = Saver(store, save_every_steps=1)
    for step, loss in enumerate([3.0, 1.0, 2.0], start=1):
        saver.poll(step, state(loss), metrics={"loss": loss})
    best = store.best()
    assert best is not None
    assert load(best.path)[0]["weight"].tolist() == [1.0, 1.0, 1.0]


def test_a_full_disk_ends_no_loop_and_is_tried_again(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saver = Saver(store, save_every_steps=2)

    def full(*args: Any, **kwargs: Any) -> None:
        raise CheckpointSaveError("No space left on device.", store.directory)

    with monkeypatch.context() as patched:
        patched.setattr(store, "save", full)
        assert not saver.poll(2, state())
    assert "No space left on device. Training goes on" in capsys.readouterr().err
    assert isinstance(saver.failure, CheckpointSaveError)
    assert not saver.poll(3, state())  # a minute has not passed
    monkeypatch.setattr("savepoint.checkpoint.saver.RETRY_SECS", 0.0)
    assert saver.poll(3, state())
    assert saver.failure is None


def test_a_value_that_cannot_be_read_back_is_said_and_training_goes_on(
    store: CheckpointStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not Saver(store, save_every_steps=1).poll(1, lambda: {"lock": object()})
    assert "lock is a builtins.object" in capsys.readouterr().err


def test_a_state_with_a_nan_is_never_saved(
    store: CheckpointStore, capsys: pytest.CaptureFixture[str]
) -> None:
    warning = Saver(store, save_every_steps=1, on_nan="warn")
    assert not warning.poll(1, state(float("nan")))
    assert "not finite at step 1" in capsys.readouterr().err
    with pytest.raises(NonFiniteLossError):
        Saver(store, save_every_steps=1).poll(1, state(float("nan")))
    assert steps(store) == []


def test_where_the_state_is_not_finite_the_next_try_is_the_next_interval(
    store: CheckpointStore, capsys: pytest.CaptureFixture[str]
) -> None:
    saver = Saver(store, save_every_steps=3, on_nan="warn")
    for step in range(1, 8):
        saver.poll(step, state(float("nan")))
    assert re.findall(r"not finite at step (\d)", capsys.readouterr().err) == ["3", "6"]


def test_an_infinite_mask_is_no_reason(store: CheckpointStore) -> None:
    assert Saver(store, save_every_steps=1).poll(1, state(float("-inf")))


@pytest.mark.parametrize("name", ["save_every_epochs", "save_every_steps", "save_every_secs"])
def test_an_interval_of_nothing_is_refused(name: str, store: CheckpointStore) -> None:
    with pytest.raises(ConfigError, match=f"checkpoint.{name} is 0"):
        Saver(store, **{name: 0})
