"""A run comes back out of its mirror."""

from pathlib import Path

import pytest
from support.mirrors import Outage, save, steps, uploading
from support.programs import begin, into
from support.run_dirs import flip, latest, make_run, training_in

import project  # noqa: F401
from savepoint.checkpoint import manifest
from savepoint.errors import (
    CheckpointNotFoundError,
    ConfigError,
    MirrorError,
    RunExistsError,
    RunLockedError,
)
from savepoint.mirror.fetch import fetch
from savepoint.resume import request
from savepoint.run import Run


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Of a run at step 30, whose best is step 10; its directory is gone."""
    run_dir = make_run(tmp_path / "gone", steps=(10,))
    (run_dir / "metrics.csv").write_text("step,loss\n1,0.5\n2,0.25\n")
    with uploading(run_dir, f"file://{tmp_path}/cloud") as mirror:
        mirror.catch_up()
        for step in (20, 30):
            path = save(run_dir, step)
        mirror.take(path)
    assert steps(tmp_path / "cloud") == [10, 30]
    return f"file://{tmp_path}/cloud/first"


@pytest.fixture
def cloud(tmp_path: Path) -> Path:
    return tmp_path / "cloud" / "first" / "checkpoints"


def names(run_dir: Path) -> list[str]:
    return sorted(
        path.name for path in run_dir.rglob("*") if path.is_file() and path.name != "lock"
    )


def test_the_newest_and_the_best_come_back_with_the_records(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = fetch(url, tmp_path / "outputs")
    assert names(run_dir) == [
        "best.ckpt", "config.yaml", "last.ckpt", "metrics.csv", "run.json", "step-00000010.ckpt", "step-00000030.ckpt",
    ]  # fmt: skip
    assert run_dir == tmp_path / "outputs" / "first"
    assert manifest.verify(run_dir / "checkpoints" / "last.ckpt")["step"] == 30
    assert manifest.verify(run_dir / "checkpoints" / "best.ckpt")["step"] == 10
    assert Run(run_dir).id() == Run(tmp_path / "gone" / "first").id()
    assert capsys.readouterr().out.startswith(f"Fetched step 30 from {url} (")


def test_what_is_here_and_as_new_is_left_alone(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = fetch(url, tmp_path / "outputs")
    (run_dir / "metrics.csv").write_text("mine")
    capsys.readouterr()
    assert fetch(url, tmp_path / "outputs") == run_dir
    assert (run_dir / "metrics.csv").read_text() == "mine"
    assert "is as new as" in capsys.readouterr().out


def test_what_is_older_here_gets_the_newer_and_its_log(url: str, tmp_path: Path) -> None:
    run_dir = fetch(url, tmp_path / "outputs")
    latest(run_dir).path.unlink()
    (run_dir / "metrics.csv").write_text("step,loss\n1,0.5\n")
    fetch(url, tmp_path / "outputs")
    assert latest(run_dir).step == 30
    assert (run_dir / "metrics.csv").read_text() == "step,loss\n1,0.5\n2,0.25\n"


def test_a_damaged_newest_is_said_and_the_one_before_it_is_taken(
    url: str, cloud: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(cloud / "step-00000030.ckpt")
    run_dir = fetch(url, tmp_path / "outputs")
    assert latest(run_dir).step == 10
    said = capsys.readouterr().out
    assert "step-00000030.ckpt in the mirror does not verify: one or more damaged bytes" in said
    assert "Going on from step 10 costs 20 steps." in said
    assert not list(run_dir.rglob("step-00000030*"))


def test_a_mirror_of_damaged_checkpoints_alone_is_refused(
    url: str, cloud: Path, tmp_path: Path
) -> None:
    for path in cloud.iterdir():
        flip(path)
    with pytest.raises(
        CheckpointNotFoundError, match=r"No checkpoint that verifies.*step-00000010"
    ):
        fetch(url, tmp_path / "outputs")


def test_half_an_object_is_no_checkpoint(url: str, cloud: Path, tmp_path: Path) -> None:
    (cloud / "step-00000040.ckpt").write_bytes((cloud / "step-00000030.ckpt").read_bytes()[:-500])
    assert latest(fetch(url, tmp_path / "outputs")).step == 30


def test_what_a_killed_fetch_leaves_is_fetched_again(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("savepoint.mirror.remote.Remote.download", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch(url, tmp_path / "outputs")
    assert not list((tmp_path / "outputs").rglob("*.ckpt"))
    assert latest(fetch(url, tmp_path / "outputs")).step == 30


def test_another_run_of_that_name_is_left_alone(url: str, tmp_path: Path) -> None:
    make_run(tmp_path / "outputs", steps=(1,))
    with pytest.raises(RunExistsError, match="Another run is in this directory"):
        fetch(url, tmp_path / "outputs")


def test_a_run_that_trains_here_is_not_filled_from_below(url: str, tmp_path: Path) -> None:
    run_dir = fetch(url, tmp_path / "outputs")
    latest(run_dir).path.unlink()
    with training_in(run_dir), pytest.raises(RunLockedError):
        fetch(url, tmp_path / "outputs")


def test_a_url_of_nothing_names_the_runs_that_are_there(url: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"Runs in .*: first\."):
        fetch(url.replace("first", "frist"), tmp_path / "outputs")
    file = [f"{url}/checkpoints/step-00000030.ckpt", "--output_dir", str(tmp_path)]
    with pytest.raises(CheckpointNotFoundError, match="No checkpoint is loaded from a URL"):
        request.requested(file)
    with pytest.raises(CheckpointNotFoundError, match="Not a run but one of its checkpoints"):
        fetch(f"{url}/checkpoints/step-00000030.ckpt", tmp_path / "outputs")


def test_resume_takes_the_url_of_a_run(url: str, cloud: Path, tmp_path: Path) -> None:
    (cloud.parent / "config.yaml").unlink()  # that of a made-up model
    asked = request.requested([url, "--output_dir", str(tmp_path / "outputs")])
    assert asked is not None
    assert asked.run_dir == tmp_path / "outputs" / "first"


def test_an_auto_resume_without_a_directory_begins_nothing_while_its_mirror_is_not_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would begin the run anew, over the one in the mirror."""
    Outage(monkeypatch).on = True
    mirror = ["--checkpoint.mirror", f"file://{tmp_path}/cloud", "--resume", "auto"]
    with pytest.raises(MirrorError):
        begin("--config", "configs/fast.yaml", *into(tmp_path / "outputs", "first"), *mirror)
    assert not (tmp_path / "outputs").exists()


def test_a_url_to_save_to_stays_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Nothing is saved to a URL"):
        begin("--config", "configs/fast.yaml", "--output_dir", f"file://{tmp_path}/outputs")
