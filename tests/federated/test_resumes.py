"""What a resume of a federated run may change, and the other ways to go on."""

import shlex
import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from support import federated, rounds
from support.federated import TINY
from support.rounds import KEEPS, resume, train

from savepoint import commands
from savepoint.checkpoint import store
from savepoint.errors import ConfigError, ConfigMismatchError
from savepoint.federated import runtime, server_app
from savepoint.run import Run

SIX = ["--federated.num_server_rounds", "6"]
ONE = ["--federated.num_server_rounds", "1"]


@pytest.fixture
def copy(straight: Path, tmp_path: Path) -> Path:
    shutil.copytree(straight, tmp_path / "copy")
    return tmp_path / "copy"


def test_more_rounds_end_as_a_run_of_that_length(
    straight: Path, copy: Path, tmp_path: Path
) -> None:
    assert resume(copy, *SIX) == 0
    assert train(tmp_path / "six", *KEEPS, *SIX) == 0
    one, other = (store.load(federated.newest(d))[0] for d in (copy, tmp_path / "six"))
    assert one["federated"]["clients"] == other["federated"]["clients"]
    assert rounds.history(copy) == rounds.history(tmp_path / "six")
    federated.assert_equal(copy, tmp_path / "six")


def test_a_finished_run_says_how_to_go_on(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume(copy) == 0
    said = capsys.readouterr().out
    assert "has played its 4 rounds" in said
    assert "--federated.num_server_rounds 8" in said


def test_a_run_that_was_killed_before_its_test_is_completed(copy: Path) -> None:
    (copy / "summary.json").unlink()
    (copy / "results.json").unlink()
    assert resume(copy) == 0
    assert Run(copy).state() == "finished"
    assert len(rounds.history(copy)) == 4


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("num_clients", "4"), ("fraction_train", "1.0"), ("strategy", "FedAdam"), ("lr_decay", "0.5"),
        ("partitioner", "Iid"), ("local_epochs", "2"), ("personal", "[net.features]"), ("min_train_nodes", "3"),
        ("buffers", "strategy"),
    ],
)  # fmt: skip
def test_what_changes_the_trajectory_is_refused(copy: Path, flag: str, value: str) -> None:
    with pytest.raises(ConfigMismatchError, match=rf"federated.{flag}.*\n.*--allow"):
        resume(copy, *SIX, f"--federated.{flag}", value)


def test_what_changes_the_trajectory_is_allowed_by_name(copy: Path) -> None:
    allowed = ["--federated.lr_decay", "0.5", "--allow", "federated.lr_decay"]
    assert resume(copy, *SIX, *allowed) == 0
    assert len(rounds.history(copy)) == 6


@pytest.mark.parametrize("flag", ["timeout", "retries", "min_replies", "save_client_models"])
def test_what_changes_no_round_is_free(copy: Path, flag: str) -> None:
    assert resume(copy, *SIX, "--plan", f"--federated.{flag}", "2") == 0


def test_fewer_rounds_than_were_played_are_refused(copy: Path) -> None:
    with pytest.raises(ConfigError, match=r"Past that already.*round 4"):
        resume(copy, "--federated.num_server_rounds", "2", "--fork", "less")


def test_other_parts_are_refused_as_other_data(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from savepoint.federated import partition

    monkeypatch.setattr(partition, "_digest", lambda parts: "0" * 64)
    with pytest.raises(ConfigMismatchError, match=r"Another data set: .*its parts 000000000000"):
        resume(copy, *SIX)


def test_the_plan_says_what_is_restored_and_writes_nothing(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(copy.rglob("*"))
    assert resume(copy, *SIX, "--plan") == 0
    said = capsys.readouterr().out
    assert "round 4 of 6, verified" in said
    assert "FedAvg (without a state)" in said
    assert "proved by digest" in said
    assert "left        2 rounds" in said
    assert sorted(copy.rglob("*")) == before


def test_a_fork_goes_on_from_an_older_round_with_the_states_of_that_round(
    straight: Path, tmp_path: Path
) -> None:
    """Equal to the rest of the run that it was forked from; whose directory may go."""
    origin = tmp_path / "origin"
    shutil.copytree(straight, origin)
    older = origin / "checkpoints/step-00000003.ckpt"
    where = ["--output_dir", str(tmp_path), "--fork", "fork"]
    before = sorted(path for path in origin.rglob("*"))
    assert resume_file(older, *where) == 0
    assert sorted(path for path in origin.rglob("*")) == before
    assert rounds.history(tmp_path / "fork") == rounds.history(straight)
    shutil.rmtree(origin)
    assert resume(tmp_path / "fork", *SIX) == 0


def resume_file(file: Path, *flags: str) -> int:
    return resume(file, *flags)


def test_a_rewound_run_goes_on_as_it_went_on_before(straight: Path, copy: Path) -> None:
    older = copy / "checkpoints/step-00000003.ckpt"
    assert resume(older, "--rewind") == 0
    assert list((copy / "rewound").rglob("step-00000004.ckpt"))
    assert rounds.history(copy) == rounds.history(straight)
    assert commands.main(["diff", str(straight), str(copy)]) == 0


def test_rot_in_the_newest_checkpoint_costs_a_round_and_its_states_are_found(
    straight: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from support.run_dirs import flip

    for name in (
        "last.ckpt",
        "best.ckpt",
    ):  # of a copied run whole files, which would take its place
        (copy / "checkpoints" / name).unlink()
    flip(copy / "checkpoints/step-00000004.ckpt")
    assert resume(copy) == 0
    assert "costs 1 steps" in capsys.readouterr().out
    assert rounds.history(copy) == rounds.history(straight)


def test_a_run_goes_on_where_it_was_moved_to(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "moved" / "elsewhere")
    assert resume(tmp_path / "moved" / "elsewhere", *SIX) == 0


def test_states_stay_as_few_as_checkpoints_name(straight: Path) -> None:
    kept = len(list((straight / "checkpoints").glob("step-*.ckpt")))
    for folder in (straight / "clients").iterdir():
        assert len(list(folder.glob("step-*.ckpt"))) <= kept + 1


@pytest.mark.parametrize("kind", ["ckpt", "npz"])
def test_a_run_can_begin_with_the_weights_of_another_alone(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    weights = straight / "checkpoints/best.ckpt"
    if kind == "npz":
        exported = tmp_path / "global.npz"
        assert commands.main(["export", str(weights), "--format", "npz", "-o", str(exported)]) == 0
        weights = exported
    one = [*ONE, "--init_from", str(weights)]
    assert train(tmp_path / "new", *one) == 0
    assert "its rounds begin anew" in capsys.readouterr().out


def test_the_record_of_flwr_run_has_our_commands_and_no_token_of_flowers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["flwr-serverapp", "--token", "a secret"])
    run_dir = tmp_path / "run"
    flags = shlex.join([*TINY, "--output_dir", str(tmp_path), "--run_name", "run"])
    begin = {"config": "configs/federated/digits.yaml", "num-server-rounds": 1, "flags": flags}
    assert server_app.play(begin, runtime.play) == 0
    assert server_app.play({"resume": str(run_dir), "num-server-rounds": 2}, runtime.play) == 0
    began, went_on = (start["argv"] for start in Run(run_dir).starts())
    assert began[:3] == ["train.py", "--config", "configs/federated/digits.yaml"]
    assert went_on == ["resume.py", str(run_dir), "--federated.num_server_rounds", "2"]
    assert "a secret" not in (run_dir / "run.json").read_text()
