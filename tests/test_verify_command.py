import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.checkpoint_files import facts, small_checkpoint, small_state

from savepoint.checkpoint import manifest
from savepoint.checkpoint.retention import Retention
from savepoint.checkpoint.store import CheckpointStore
from savepoint.commands import main


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    kept = CheckpointStore(tmp_path / "checkpoints", retention=Retention(keep_last=9), monitor="val/loss")
    for step in (10, 20, 30):
        kept.add(small_state(), facts(step, float(step)))
    return tmp_path


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["", "checkpoints", "checkpoints/step-00000020.ckpt", "checkpoints/best.ckpt"])
def test_what_verifies_exits_with_0(run_dir: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run_dir / name)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (1 if name.endswith(".ckpt") else 3)
    assert all(": verifies: step " in line for line in lines)


def test_one_damaged_file_exits_with_1_and_is_named(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run_dir / "checkpoints" / "step-00000020.ckpt")
    assert main(["verify", str(run_dir)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [": verifies: " in line for line in lines] == [True, False, True]
    assert "step-00000020.ckpt: does not verify: one or more damaged bytes in record archive/data/" in lines[1]
    assert main(["verify", str(run_dir / "checkpoints" / "step-00000010.ckpt")]) == 0


def test_a_pointer_that_is_a_file_of_its_own_is_looked_at(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = run_dir / "checkpoints" / "last.ckpt"
    last.unlink()
    shutil.copy(run_dir / "checkpoints" / "step-00000030.ckpt", last)
    flip(last)
    assert main(["verify", str(run_dir)]) == 1
    assert "last.ckpt: does not verify" in capsys.readouterr().out


def test_a_foreign_file_does_not_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({}, tmp_path / "a.pt")
    assert main(["verify", str(tmp_path / "a.pt")]) == 1
    assert "a torch.save file without a manifest" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "code"), [("none", 2), ("empty", 1), ("run", 1)])
def test_nothing_to_look_at_is_said_and_is_no_success(
    tmp_path: Path, name: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert main(["verify", str(tmp_path / name)]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("savepoint verify: No checkpoint")
    assert str(tmp_path / name) in captured.err


def test_a_directory_under_a_checkpoint_s_name_does_not_verify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints" / "step-00000020.ckpt").mkdir(parents=True)
    assert main(["verify", str(tmp_path)]) == 1
    assert "step-00000020.ckpt: does not verify: a directory" in capsys.readouterr().out


def test_the_command_starts_without_torch(tmp_path: Path) -> None:
    path = small_checkpoint(tmp_path / "a.ckpt").path
    command = [sys.executable, "-X", "importtime", "-m", "savepoint", "verify", path]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.split("|")[-1].strip() for line in run.stderr.splitlines()}
    assert not {"torch", "numpy", "lightning"} & imported
    assert "savepoint.checkpoint.manifest" in imported
    assert run.stdout.startswith(f"{path}: verifies: step 30")


def test_a_file_that_its_run_deletes_meanwhile_is_passed_over(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = manifest.step_files(run_dir / "checkpoints")
    monkeypatch.setattr(manifest, "step_files", lambda directory: listed)
    listed[1].unlink()
    assert main(["verify", str(run_dir)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_deep_look_finds_weights_that_are_not_finite(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--deep", str(run_dir)]) == 0
    assert all(line.endswith(" bytes, loads, is finite") for line in capsys.readouterr().out.splitlines())
    state = small_state()
    state["state_dict"]["weight"][3, 4] = float("nan")
    state["optimizer_states"][0]["state"][0]["exp_avg"][0] = float("inf")
    CheckpointStore(run_dir / "checkpoints", retention=Retention(keep_last=9)).add(state, facts(40))
    assert main(["verify", str(run_dir)]) == 0
    capsys.readouterr()
    assert main(["verify", "--deep", str(run_dir)]) == 1
    said = capsys.readouterr().out.splitlines()[-1]
    assert "verifies, but 2 tensors are not finite: state_dict.weight, optimizer_states[0].state.0.exp_avg" in said


def test_several_paths_are_looked_at_and_one_that_is_damaged_is_enough(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = small_checkpoint(run_dir / "a b.ckpt").path
    flip(other)
    assert main(["verify", str(run_dir / "checkpoints" / "last.ckpt"), str(other), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [(Path(one["file"]).name, one["verifies"]) for one in found] == [("last.ckpt", True), ("a b.ckpt", False)]
    assert found[1]["reason"].startswith("one or more damaged bytes in record")
