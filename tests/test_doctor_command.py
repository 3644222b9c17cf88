"""`savepoint doctor`: what is wrong, in words, and a command that mends it."""

import json
import os
import shlex
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.checkpoint_files import facts, small_checkpoint, small_state
from support.run_dirs import flip, latest, make_run, say, store, training_in, truncate

from savepoint.words import python

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("sys.argv", ["train.py", "--config", "configs/fast.yaml"])
    return make_run(tmp_path, ended="max_epochs")


def findings(capsys: Capture, path: Path, *, wrong: bool = True) -> dict[str, str]:
    """What -> what to do, of those that are wrong, or only worth knowing."""
    code, out, _ = say(capsys, "doctor", path, "--json")
    found = json.loads(out)["findings"]
    assert code == (1 if any(one["wrong"] for one in found) else 0)
    return {one["what"]: one["do"] for one in found if one["wrong"] == wrong}


# -- runs ------------------------------------------------------------------------------------------------------------


def test_nothing_is_wrong_with_a_finished_run(run_dir: Path, capsys: Capture) -> None:
    code, out, _ = say(capsys, "doctor", run_dir)
    assert code == 0
    assert out.splitlines() == [f"{run_dir}: finished at step 30, epoch 3", "  Nothing is wrong."]
    assert say(capsys, "doctor", run_dir / "checkpoints")[1] == out


@pytest.mark.parametrize("name", ["step-00000030.ckpt", "step-00000020.ckpt"])
def test_a_damaged_checkpoint_is_named_with_the_step_to_go_on_from(name: str, run_dir: Path, capsys: Capture) -> None:
    flip(run_dir / "checkpoints" / name)
    (found,) = findings(capsys, run_dir).items()
    assert found[0].startswith(f"{name} does not verify: one or more damaged bytes in record ")
    assert found[1].startswith(f"Go on from step {20 if '30' in name else 30}: ")
    assert found[1].endswith(f"{python()} resume.py {run_dir}")


def test_a_run_without_a_checkpoint_that_verifies_is_started_again(run_dir: Path, capsys: Capture) -> None:
    command = f"{python()} train.py --config configs/fast.yaml --run_name"
    for one in store(run_dir).checkpoints():
        truncate(one.path)
    wrong = findings(capsys, run_dir)
    assert len(wrong) == 3
    assert all(do.endswith(f"Start it again, under another name: {command} first-2") for do in wrong.values())
    for path in (run_dir / "checkpoints").iterdir():
        path.unlink()
    assert findings(capsys, run_dir)["It has no checkpoint that verifies."] == (
        f"Start it again: {command} first --resume auto"
    )


def test_a_foreign_file_under_a_checkpoint_s_name_is_no_damage(run_dir: Path, capsys: Capture) -> None:
    torch.save({}, run_dir / "checkpoints" / "step-00000040.ckpt")
    (found,) = findings(capsys, run_dir).items()
    assert "a torch.save file without a manifest" in found[0]
    assert found[1].startswith("Start from its weights: ")


@pytest.mark.parametrize(("name", "target"), [("last.ckpt", "step-00000030.ckpt"), ("best.ckpt", "step-00000010.ckpt")])
def test_a_pointer_that_shows_another_file_is_mended_by_the_command_that_is_named(
    name: str, target: str, run_dir: Path, capsys: Capture
) -> None:
    pointer = run_dir / "checkpoints" / name
    pointer.unlink()
    for damage in (lambda: None, lambda: os.link(run_dir / "checkpoints" / "step-00000020.ckpt", pointer)):
        damage()
        (found,) = findings(capsys, run_dir).items()
        assert found[0] == f"{name} does not show {target}."
    command = shlex.split(found[1].removeprefix("Point it there: "))
    assert command[1:3] == ["-m", "savepoint"]
    assert say(capsys, *command[3:])[0] == 0
    assert findings(capsys, run_dir) == {}


@pytest.mark.parametrize("damage", [None, "{", "3"])
def test_a_config_that_is_lost_is_written_by_the_command_that_is_named(
    damage: str | None, run_dir: Path, capsys: Capture
) -> None:
    (run_dir / "config.yaml").unlink()
    if damage:
        (run_dir / "config.yaml").write_text(damage)
    ((what, do),) = findings(capsys, run_dir).items()
    assert what == f"config.yaml is {'damaged' if damage else 'missing'}."
    command, _, file = do.partition(" > ")
    (run_dir / "config.yaml").write_text(say(capsys, *shlex.split(command)[3:])[1])
    assert file == str(run_dir / "config.yaml")
    assert (run_dir / "config.yaml").read_text() == small_state()["config"]
    assert findings(capsys, run_dir) == {}


@pytest.mark.parametrize("name", ["run.json", "summary.json"])
def test_damaged_records_are_said(name: str, run_dir: Path, capsys: Capture) -> None:
    (run_dir / name).write_text("{bad")
    assert any(what.startswith(f"{name} is damaged") for what in findings(capsys, run_dir))


def test_rows_that_the_newest_checkpoint_counts_and_the_log_has_not_are_missed(run_dir: Path, capsys: Capture) -> None:
    store(run_dir).add(small_state() | {"logged_rows": 3}, facts(40, 40.0))
    for text, there in (("step,loss\n1,2\n", 1), ("", 0), (None, 0)):
        (run_dir / "metrics.csv").unlink(missing_ok=True)
        if text is not None:
            (run_dir / "metrics.csv").write_text(text)
        (what,) = findings(capsys, run_dir)
        assert what == f"metrics.csv has {there} of the 3 rows that step-00000040.ckpt counts: the others are lost."
    (run_dir / "metrics.csv").write_text("step,loss\n1,2\n2,2\n3,1\n4,1\n")  # a resume cuts what is too much
    assert findings(capsys, run_dir) == {}


def test_weights_that_are_not_finite_are_said(run_dir: Path, capsys: Capture) -> None:
    state = small_state()
    state["state_dict"]["bias"][3] = float("nan")
    store(run_dir).add(state, facts(40, 40.0))
    assert findings(capsys, run_dir).keys() == {
        "step-00000040.ckpt holds numbers that are not finite, in 1 tensor: state_dict.bias."
    }


def test_too_little_room_is_said(run_dir: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=10, f_frsize=1000, f_blocks=99))
    assert findings(capsys, run_dir).keys() == {"Too little room: 0.01 MB free, a checkpoint takes 0.01 MB."}


def test_a_directory_that_cannot_be_written_is_said(
    run_dir: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode == os.W_OK and path == run_dir))
    assert findings(capsys, run_dir) == {
        f"This user cannot write in {run_dir}: it cannot go on here.": f"chmod u+w {run_dir}"
    }


def test_what_is_worth_knowing_is_no_fault(run_dir: Path, capsys: Capture) -> None:
    (run_dir / "summary.json").unlink()
    assert findings(capsys, run_dir, wrong=False).keys() == {"Its training ended, the test was not made."}
    with training_in(run_dir) as pid:
        (what,) = findings(capsys, run_dir, wrong=False)
        assert what.startswith(f"pid {pid} on ")
        assert what.endswith(" trains here now.")
    (what,) = findings(capsys, run_dir, wrong=False)
    assert what.endswith(" died while it trained here.")
    (run_dir / ".metrics.csv.99.tmp").touch()
    shutil.copy(latest(run_dir).path, run_dir / "checkpoints" / "step-00000040.ckpt.corrupt")
    truncate(run_dir / "checkpoints" / "step-00000040.ckpt.corrupt")
    notes = findings(capsys, run_dir, wrong=False)
    assert any(what.startswith("1 file that a process was writing when it died") for what in notes)
    assert any(what.startswith("step-00000040.ckpt.corrupt was set aside: truncated") for what in notes)


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_whole_file_goes_on_in_its_run_or_in_a_new_one(run_dir: Path, capsys: Capture) -> None:
    for step, fork in ((30, ""), (10, " --fork")):
        path = run_dir / "checkpoints" / f"step-{step:08d}.ckpt"
        (do,) = findings(capsys, path, wrong=False).values()
        assert do.endswith(f"resume.py {path}{fork}")


@pytest.mark.parametrize(
    ("content", "what", "do"),
    [
        (b"", "empty", "Copy it again"),
        (b"\0" * 5000, "all zero bytes", "Copy it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer", "git lfs pull --include '"),
        (b"<html>", "an HTML page", "download the file again"),
        (b"\x1f\x8b123", "a compressed file", "Unpack it"),
        (b"notes", "a text file", "It is no checkpoint"),
        (b'\x02\0\0\0\0\0\0\0{"', "a safetensors file", "train.py --init_from '"),
        (b"\x80\x04K\x01.", "a pickled object", "torch.save(model.state_dict(), FILE)"),
    ],
)
def test_each_kind_of_file_gets_advice_of_its_own(
    content: bytes, what: str, do: str, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "a file"
    path.write_bytes(content)
    ((said, advice),) = findings(capsys, path).items()
    assert said.startswith("It does not verify: ")
    assert what in said
    assert do in advice


def test_files_that_torch_wrote_get_advice_of_their_own(tmp_path: Path, capsys: Capture) -> None:
    model = torch.nn.Linear(2, 2)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    ((said, advice),) = findings(capsys, tmp_path / "weights.pt").items()
    assert "torch.save" in said
    assert "train.py --init_from" in advice
    assert f"with its epoch and best as well: {python()} resume.py" in advice
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:  # as torch.jit.save lays it out
        archive.writestr("script/code/__torch__.py", "")
        archive.writestr("script/constants.pkl", "")
    ((said, advice),) = findings(capsys, tmp_path / "script.pt").items()
    assert "TorchScript" in said


def test_a_truncated_copy_is_copied_again_and_one_in_a_run_is_gone_around(run_dir: Path, capsys: Capture) -> None:
    copy = small_checkpoint(run_dir.parent / "copy.ckpt").path
    truncate(copy)
    ((what, do),) = findings(capsys, copy).items()
    assert what.startswith("It does not verify: truncated: ")
    assert do.startswith("Copy it again")
    truncate(latest(run_dir).path)
    assert (
        findings(capsys, run_dir / "checkpoints" / "step-00000030.ckpt").popitem()[1].startswith("Go on from step 20")
    )


def test_a_whole_copy_of_a_damaged_checkpoint_is_what_a_resume_goes_on_from(run_dir: Path, capsys: Capture) -> None:
    newest = run_dir / "checkpoints" / "step-00000030.ckpt"
    copy = run_dir / "checkpoints" / "last.ckpt"
    copy.unlink()
    shutil.copy(newest, copy)  # a run that was copied without its links
    flip(newest)
    assert any(do.startswith("Go on from step 30: ") for do in findings(capsys, run_dir).values())
    planned, _, said = store(run_dir).load_latest(lock_holder=False)
    assert (planned.step, len(said)) == (30, 1)
    chosen, _, said = store(run_dir).load_latest(lock_holder=True)
    assert (chosen.step, chosen.path, len(said)) == (30, newest, 1)


def test_a_record_of_another_shape_is_damaged(run_dir: Path, capsys: Capture) -> None:
    (run_dir / "run.json").write_text('{"id": 3, "starts": [{"argv": 7}]}')
    (run_dir / "summary.json").write_text('{"test": [1]}')
    said = " ".join(findings(capsys, run_dir))
    assert "run.json is damaged" in said
    assert "summary.json is damaged" in said


def test_a_pointer_that_is_a_damaged_copy_is_named(run_dir: Path, capsys: Capture) -> None:
    last = run_dir / "checkpoints" / "last.ckpt"
    whole = last.read_bytes()
    last.unlink()
    last.write_bytes(whole)
    assert findings(capsys, run_dir) == {}
    flip(last)
    assert list(findings(capsys, run_dir)) == ["last.ckpt does not show step-00000030.ckpt."]
