"""`savepoint diff`: exit codes like diff(1), and what it names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoint_files import State, facts, small_state
from support.run_dirs import flip, make_run, say

from savepoint.checkpoint.store import write

Capture = pytest.CaptureFixture[str]


def other(change: Callable[[State], Any]) -> State:
    state = small_state()
    change(state)
    return state


def pair(directory: Path, state: State, **more: Any) -> list[Path]:
    write(directory / "a.ckpt", small_state(), facts(30, 0.5))
    write(directory / "b.ckpt", state, facts(30, 0.5) | more)
    return [directory / "a.ckpt", directory / "b.ckpt"]


def compared(capsys: Capture, paths: list[Path]) -> dict[str, Any]:
    code, out, _ = say(capsys, "diff", *paths, "--json")
    found: dict[str, Any] = json.loads(out)
    assert code == (0 if found["equal"] else 1)
    return found


def test_states_that_say_only_when_and_where_they_were_made_differently_are_equal(
    tmp_path: Path, capsys: Capture
) -> None:
    made = {"run": {"name": "b"}, "callbacks": {"Meter": {"fit_secs": 3.0}}}
    code, out, _ = say(
        capsys, "diff", *pair(tmp_path, small_state() | made, created="2026-01-01T00:00:00+00:00")
    )
    assert code == 0
    assert (
        out.splitlines()[-1]
        == "Equal: every value and every bit, but for manifest, run, events and the clock."
    )


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("epoch", lambda state: state.update(epoch=3)),
        ("rng", lambda state: state["rng"]["torch"].__setitem__(7, 0)),
        (
            "state_dict",
            lambda state: state["state_dict"].__setitem__("bias", torch.full((20,), -0.0)),
        ),
        (
            "state_dict",
            lambda state: state["state_dict"].__setitem__(
                "bias", torch.zeros(20, dtype=torch.float16)
            ),
        ),
        ("state_dict", lambda state: state["state_dict"].pop("bias")),
        ("config", lambda state: state.update(config="model:\n  lr: 0.2\n")),
        ("metric_states", lambda state: state.update(metric_states={})),
    ],
)
def test_any_value_or_bit_that_differs_is_found_and_its_part_named(
    part: str, change: Callable[[State], Any], tmp_path: Path, capsys: Capture
) -> None:
    paths = pair(tmp_path, other(change))
    assert compared(capsys, paths)["parts"] == [part]
    assert say(capsys, "diff", *paths)[1].splitlines()[-1] == f"Different in: {part}"


def test_the_change_of_a_layer_is_relative_to_its_length(tmp_path: Path, capsys: Capture) -> None:
    def change(state: State) -> None:
        state["state_dict"]["weight"] *= 1.5
        state["state_dict"]["bias"] += 1.0
        state["state_dict"]["count"] += 7

    found = compared(capsys, pair(tmp_path, other(change)))
    changes = {row["name"]: row["change"] for row in found["weights"]}
    assert changes == {"weight": pytest.approx(0.5), "bias": "inf", "count": 1.0}


def test_weights_of_other_shapes_and_names_are_told(tmp_path: Path, capsys: Capture) -> None:
    def change(state: State) -> None:
        state["state_dict"]["weight"] = torch.zeros(20, 10)
        state["state_dict"]["bias_2"] = state["state_dict"].pop("bias")

    rows = compared(capsys, pair(tmp_path, other(change)))["weights"]
    assert {row["name"]: row["why"] for row in rows} == {
        "weight": "[20, 30] and [20, 10]", "bias": "only in A", "bias_2": "only in B",
    }  # fmt: skip


def test_config_keys_are_named_as_their_flags_are(tmp_path: Path, capsys: Capture) -> None:
    config = "model: {class_path: Net, init_args: {width: 8}}\ndata: null\n"
    found = compared(capsys, pair(tmp_path, other(lambda state: state.update(config=config))))
    assert found["config"] == {
        "model": [None, "Net"],
        "model.width": [None, 8],
        "model.lr": [0.1, None],
        "data": [None] * 2,
    }


def test_an_optimizer_is_compared_by_kind_of_state_step_and_hyper_parameters(
    tmp_path: Path, capsys: Capture
) -> None:
    def change(state: State) -> None:
        (optimizer,) = state["optimizer_states"]
        optimizer["state"][0] = {"momentum_buffer": torch.ones(20, 30), "step": torch.tensor(4.0)}
        optimizer["param_groups"] += [{"lr": 0.3, "params": [1, 2]}]

    (row,) = compared(capsys, pair(tmp_path, other(change)))["optimizers"]
    assert row["changed"] == {
        "state": [["exp_avg", "step"], ["momentum_buffer", "step"]],
        "steps": [[3.0], [4.0]],
        "[1].lr": [None, 0.3],
        "[1].number of parameters": [None, 2],
    }


def test_facts_and_metrics_that_differ_are_shown_with_their_steps(
    tmp_path: Path, capsys: Capture
) -> None:
    paths = pair(tmp_path, small_state(), **facts(40, 0.25))
    code, out, _ = say(capsys, "diff", *paths)
    assert code == 0  # of one state
    assert "val/loss  0.5000 at step 30  0.2500 at step 40" in out
    assert "step   30  40" in out


def test_of_a_run_the_newest_checkpoint_is_compared(tmp_path: Path, capsys: Capture) -> None:
    runs = [make_run(tmp_path, name, steps=(10, 20)) for name in "ab"]
    found = compared(capsys, runs)
    assert [Path(found[one]).name for one in "ab"] == ["step-00000020.ckpt"] * 2
    assert found["equal"]


def test_a_damaged_file_is_no_difference_but_bad_input(tmp_path: Path, capsys: Capture) -> None:
    paths = pair(tmp_path, small_state())
    flip(paths[1])
    code, out, err = say(capsys, "diff", *paths)
    assert (code, out) == (2, "")
    assert str(paths[1]) in err


def test_a_nan_in_config_or_optimizer_is_equal_to_itself(tmp_path: Path, capsys: Capture) -> None:
    def change(state: State) -> None:
        state.update(config="model:\n  floor: .nan\n  all: [1, {deep: .nan}]\n  lr: 0.2\n")
        state["optimizer_states"] = [
            {"state": {}, "param_groups": [{"lr": float("nan"), "params": []}]}
        ]

    write(tmp_path / "a.ckpt", other(change), facts(30, 0.5))
    write(tmp_path / "b.ckpt", other(change) | {"epoch": 9}, facts(30, 0.5))
    found = compared(capsys, [tmp_path / "a.ckpt", tmp_path / "b.ckpt"])
    assert (found["config"], found["optimizers"]) == ({}, [])
