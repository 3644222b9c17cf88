"""The run directory: one per run, one process at a time, the same on every rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.copies import commit, git

from savepoint import record, workspace
from savepoint.errors import ConfigError, RunDirectoryError, RunExistsError, RunLockedError
from savepoint.run import Run, resume_command


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "SAVEPOINT_RUN_DIR",
        "RANK",
        "LOCAL_RANK",
        "SLURM_PROCID",
        "SLURM_JOB_ID",
        "TORCHELASTIC_RUN_ID",
    ):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_a_name_that_is_taken_is_refused_with_the_command_that_continues_it(tmp_path: Path) -> None:
    run = Run.create(str(tmp_path), "first", "mnist")
    run.unlock()
    with pytest.raises(RunExistsError, match=r"first.*--resume auto"):
        Run.create(str(tmp_path), "first", "mnist")
    (run.directory / "checkpoints").mkdir()
    (run.directory / "checkpoints" / "step-00000001.ckpt").touch()
    with pytest.raises(RunExistsError, match=r"first.*python resume\.py .*first"):
        Run.create(str(tmp_path), "first", "mnist")


def test_two_runs_of_the_same_second_get_directories_of_their_own(tmp_path: Path) -> None:
    runs = []
    for _ in range(3):
        os.environ.pop("SAVEPOINT_RUN_DIR", None)
        runs.append(Run.create(str(tmp_path), None, "mnist"))
    assert len({run.directory for run in runs}) == 3
    assert all("mnist-2" in run.directory.name for run in runs)


def test_other_ranks_take_the_directory_of_rank_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Run.create(str(tmp_path), None, "mnist")
    monkeypatch.setenv("LOCAL_RANK", "1")  # the launcher's, beside what it inherited
    assert Run.create(str(tmp_path), None, "mnist").directory == made.directory


def test_ranks_that_start_by_themselves_agree_by_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    monkeypatch.setenv("RANK", "1")
    directory = Run.create(str(tmp_path), None, "mnist").directory
    assert directory.parent == tmp_path
    assert directory.name.endswith("mnist-job7")
    assert list(tmp_path.iterdir()) == []  # rank 0 makes it
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(ConfigError, match="--run_name"):
        Run.create(str(tmp_path), None, "mnist")


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden"])
def test_a_name_that_leaves_the_output_directory_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="plain file name"):
        Run.create(str(tmp_path), name, "mnist")


def test_an_output_directory_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunDirectoryError, match=r"file.*--output_dir"):
        Run.create(str(tmp_path / "file"), "x", "mnist")


def test_the_lock_is_held_against_other_processes_and_dropped_with_the_process(
    tmp_path: Path,
) -> None:
    program = "import sys, pathlib, savepoint.run as r; r.Run.open(pathlib.Path(sys.argv[1])); print('held'); sys.stdin.read()"
    command = [sys.executable, "-uc", program, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunLockedError, match=f"pid {holder.pid} on"):
            Run.open(tmp_path)
        holder.kill()
        holder.wait()
    Run.open(tmp_path).unlock()
    assert (tmp_path / "lock").read_text() == ""


def test_an_empty_directory_is_taken_for_the_run_and_left_empty_where_no_training_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SAVEPOINT_RUN_DIR", raising=False)
    (tmp_path / "volume" / "lost+found").mkdir(parents=True)
    run = Run.create(str(tmp_path), "volume", "mnist")
    assert run.directory == tmp_path / "volume"
    assert Run(run.directory).holder()
    (run.directory / "checkpoints").mkdir()
    run.unlock()
    run.discard()
    assert [path.name for path in (tmp_path / "volume").iterdir()] == ["lost+found"]


def test_a_stale_lock_is_taken_over_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lock").write_text(json.dumps({"host": "gone", "pid": 1, "boot_id": ""}))
    Run.open(tmp_path)
    assert "pid 1 on gone" in capsys.readouterr().out


def test_each_start_is_an_entry_of_the_record(tmp_path: Path) -> None:
    run = Run.open(tmp_path)
    for step in (0, 430):
        run.record_start(run.record, "config: 1\n", step=step)
    record = json.loads((tmp_path / "run.json").read_text())
    assert [start["step"] for start in record["starts"]] == [0, 430]
    assert {"argv", "git", "versions", "host", "hardware", "time"} <= record["starts"][0].keys()
    assert (tmp_path / "config.yaml").read_text() == "config: 1\n"


def test_python_files_that_changed_since_a_commit_are_known_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "_entered", workspace.Project(tmp_path))
    (tmp_path / "model.py").write_text("lr = 1\n")
    (tmp_path / "README.md").touch()
    git(tmp_path, "init", "--quiet")
    begun = commit(tmp_path)
    (tmp_path / "README.md").write_text("words\n")
    assert record.code_changed_since(begun) == []
    (tmp_path / "model.py").write_text("lr = 2\n")
    assert record.code_changed_since(begun) == ["model.py"]
    assert record.code_changed_since("0123456789" * 4) is None
    assert record.code_changed_since("--output=x") is None


def test_a_directory_in_which_no_training_began_is_removed_and_any_other_kept(
    tmp_path: Path,
) -> None:
    run = Run.create(str(tmp_path), "empty", "mnist")
    run.discard()
    assert not run.directory.exists()
    found = tmp_path / "found"
    found.mkdir()
    other = Run.open(found)
    other.discard()
    assert found.exists()
    os.environ.pop("SAVEPOINT_RUN_DIR")
    begun = Run.create(str(tmp_path), "begun", "mnist")
    begun.record_start(begun.record, "config")
    begun.discard()
    assert begun.directory.exists()


@pytest.mark.parametrize("damaged", ["{bad", "[]", "{}", "\udcff"])
def test_a_damaged_record_is_set_aside_and_a_new_one_begun(damaged: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(damaged.encode("utf-8", "surrogateescape"))
    run = Run.open(tmp_path)
    run.record_start(run.record, "")
    assert len(run.record["starts"]) == 1
    assert (tmp_path / "run.json.corrupt").exists()


def test_a_look_at_a_damaged_record_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{bad")
    run = Run(tmp_path)
    assert run.record["starts"] == []
    assert run.record_damage()
    assert run.id() is None
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_temporary_files_of_a_dead_process_are_swept_by_the_next_holder_of_the_lock(
    tmp_path: Path,
) -> None:
    (tmp_path / ".metrics.csv.99999.tmp").touch()
    Run.open(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize(
    "damaged",
    ['{"id": "x", "name": "r", "created": "2026", "starts": null}', "[" * 100_000],
    ids=["no starts", "too deep to read"],
)
def test_a_record_of_another_shape_is_damaged_too(damaged: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(damaged)
    run = Run(tmp_path)
    run.record_start(run.record, "")
    assert len(run.record["starts"]) == 1
    assert (tmp_path / "run.json.corrupt").read_text() == damaged


def test_a_record_that_is_a_directory_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "run.json").mkdir()
    run = Run.open(tmp_path)
    run.record_start(run.record, "")
    assert (tmp_path / "run.json.corrupt").is_dir()


def test_a_command_can_be_said_where_the_working_directory_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert resume_command(tmp_path / "run").endswith(f"resume.py {tmp_path / 'run'}")


def test_a_lock_that_could_not_be_taken_anew_is_asked_for_at_each_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    run = Run.open(tmp_path)
    run.check()
    (tmp_path / "lock").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        for _ in range(2):
            with pytest.raises(RunDirectoryError):
                run.check()
    run.check()
    assert Run(tmp_path).holder() == "this very process"
    run.unlock()
