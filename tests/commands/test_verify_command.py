"""`savepoint verify`: every byte; of a run what is wrong, in words, and what mends it."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.checkpoint_files import facts, small_checkpoint, small_state
from support.run_dirs import flip, latest, make_run, say, store, training_in, truncate

from savepoint.checkpoint import manifest
from savepoint.words import python

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("sys.argv", ["train.py", "--config", "configs/fast.yaml"])
    return make_run(tmp_path, ended="max_epochs")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """Checkpoints that were copied from a run, without its records."""
    kept = store(tmp_path / "copied")
    for step in (10, 20, 30):
        kept.add(small_state(), facts(step, float(step)))
    return tmp_path / "copied"


def verified(capsys: Capture, *words: str | Path) -> tuple[int, list[str], str]:
    """(exit code, what is said of each file without the advice, stderr)"""
    code, out, err = say(capsys, "verify", *words)
    return code, [line for line in out.splitlines() if ".ckpt: " in line and line[0] != " "], err


def looked_at(capsys: Capture, path: Path) -> dict[str, Any]:
    code, out, _ = say(capsys, "verify", path, "--json")
    (found,) = json.loads(out)
    assert code == (0 if found["well"] else 1)
    return dict(found)


def findings(capsys: Capture, path: Path, *, wrong: bool = True) -> dict[str, str]:
    """What -> what to do, of the files and the findings that are wrong, or only worth knowing."""
    found = looked_at(capsys, path)
    said: dict[str, str] = {}
    for one in found["files"]:
        name, is_well = Path(one["file"]).name, one["verifies"] and one["finite"] is not False
        what = f"{name} does not verify: {one['reason']}."
        if one["verifies"]:
            what = f"{name} verifies" + ("" if is_well else f", not finite: {one['not_finite']}")
        if is_well is not wrong and (one["do"] or wrong):
            said[what] = one["do"]
    said |= {one["what"]: one["do"] for one in found["findings"] if one["wrong"] == wrong}
    assert not wrong or bool(said) is not found["well"]
    return said


# -- what verifies -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", "checkpoints", "checkpoints/step-00000020.ckpt", "checkpoints/best.ckpt"]
)
def test_what_verifies_exits_with_0(copied: Path, name: str, capsys: Capture) -> None:
    code, lines, _ = verified(capsys, copied / name)
    assert code == 0
    assert len(lines) == (1 if name.endswith(".ckpt") else 3)
    assert all(": verifies: step " in line for line in lines)


def test_one_damaged_file_exits_with_1_and_is_named(copied: Path, capsys: Capture) -> None:
    flip(copied / "checkpoints" / "step-00000020.ckpt")
    code, lines, _ = verified(capsys, copied)
    assert code == 1
    assert [": verifies: " in line for line in lines] == [True, False, True]
    assert (
        "step-00000020.ckpt: does not verify: one or more damaged bytes in record archive/data/"
        in lines[1]
    )
    assert verified(capsys, copied / "checkpoints" / "step-00000010.ckpt")[0] == 0


def test_a_pointer_that_is_a_file_of_its_own_is_looked_at(copied: Path, capsys: Capture) -> None:
    last = copied / "checkpoints" / "last.ckpt"
    last.unlink()
    shutil.copy(copied / "checkpoints" / "step-00000030.ckpt", last)
    flip(last)
    code, lines, _ = verified(capsys, copied)
    assert code == 1
    assert "last.ckpt: does not verify" in lines[-1]


def test_a_foreign_file_does_not_verify(tmp_path: Path, capsys: Capture) -> None:
    torch.save({}, tmp_path / "a.pt")
    code, out, _ = say(capsys, "verify", tmp_path / "a.pt")
    assert code == 1
    assert "a torch.save file without a manifest" in out


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [("none", 2, "thing"), ("empty", 1, " checkpoint"), ("run", 1, " checkpoint")],
)
def test_nothing_to_look_at_is_said_and_is_no_success(
    tmp_path: Path, name: str, code: int, said: str, capsys: Capture
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    found, lines, err = verified(capsys, tmp_path / name)
    assert (found, lines) == (code, [])
    assert err.startswith(f"savepoint verify: No{said} there: {tmp_path / name}. ")


def test_a_directory_that_is_named_as_a_checkpoint_is_none(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "checkpoints" / "step-00000020.ckpt").mkdir(parents=True)
    code, (line,), _ = verified(capsys, tmp_path)
    assert code == 1
    assert "step-00000020.ckpt: does not verify: a directory" in line


def test_the_command_starts_without_torch(tmp_path: Path) -> None:
    path = small_checkpoint(tmp_path / "a.ckpt").path
    command = [sys.executable, "-X", "importtime", "-m", "savepoint", "verify", path]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.split("|")[-1].strip() for line in run.stderr.splitlines()}
    assert not {"torch", "numpy", "lightning"} & imported
    assert "savepoint.checkpoint.manifest" in imported
    assert run.stdout.startswith(f"{path}: verifies: step 30")


def test_a_file_that_its_run_deletes_meanwhile_is_passed_over(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    listed = manifest.step_files(copied / "checkpoints")
    monkeypatch.setattr(manifest, "step_files", lambda directory: listed)
    listed[1].unlink()
    code, lines, _ = verified(capsys, copied)
    assert (code, len(lines)) == (0, 2)


def test_a_deep_look_finds_weights_that_are_not_finite(copied: Path, capsys: Capture) -> None:
    code, lines, _ = verified(capsys, "--deep", copied)
    assert code == 0
    assert all(line.endswith(" bytes, loads, is finite") for line in lines)
    state = small_state()
    state["state_dict"]["weight"][3, 4] = float("nan")
    state["optimizer_states"][0]["state"][0]["exp_avg"][0] = float("inf")
    store(copied).add(state, facts(40))
    assert verified(capsys, copied)[0] == 0
    code, lines, _ = verified(capsys, "--deep", copied)
    assert code == 1
    names = "state_dict.weight, optimizer_states[0].state.0.exp_avg"
    assert lines[-1].endswith(f"verifies, but is not finite in 2 tensors: {names}")


def test_one_damaged_path_of_several_is_enough(copied: Path, capsys: Capture) -> None:
    other = small_checkpoint(copied / "a b.ckpt").path
    flip(other)
    last = copied / "checkpoints" / "last.ckpt"
    code, out, _ = say(capsys, "verify", last, other, copied, "--json")
    assert code == 1
    whole, damaged, directory = json.loads(out)
    assert [one["well"] for one in (whole, damaged, directory)] == [True, False, True]
    (one,) = damaged["files"]
    assert (Path(one["file"]).name, one["verifies"]) == ("a b.ckpt", False)
    assert one["reason"].startswith("one or more damaged bytes in record")
    assert len(directory["files"]) == 3


def test_of_checkpoints_alone_nothing_else_is_asked(copied: Path, capsys: Capture) -> None:
    found = looked_at(capsys, copied)
    assert (found["state"], found["findings"], found["well"]) == (None, [], True)
    (copied / "config.yaml").write_text("model: {}")
    said = findings(capsys, copied)
    assert list(said) == ["run.json is missing: the record of the starts is lost."]


def test_what_a_run_that_trains_changes_is_not_looked_at(run_dir: Path, capsys: Capture) -> None:
    (run_dir / "checkpoints" / "last.ckpt").unlink()
    with training_in(run_dir):
        found = looked_at(capsys, run_dir)
    assert (found["state"], found["well"]) == ("running", True)
    assert [one["finite"] for one in found["files"]] == [None] * 3


def test_a_directory_of_runs_is_none_and_names_them(run_dir: Path, capsys: Capture) -> None:
    code, _, err = verified(capsys, run_dir.parent)
    assert code == 1
    assert f"It holds runs: {run_dir}. Name one of them." in err


def test_a_file_that_may_not_be_read_is_to_be_permitted(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    path = run_dir / "checkpoints" / "step-00000010.ckpt"
    monkeypatch.setattr(manifest, "read", refuse)
    monkeypatch.setattr(manifest, "verify", refuse)
    said = f"{path.name} does not verify: cannot be read: Permission denied."
    assert findings(capsys, path) == {said: f"Permit it: chmod u+r {path}"}


# -- runs ----------------------------------------------------------------------------------------


def test_nothing_is_wrong_with_a_finished_run(run_dir: Path, capsys: Capture) -> None:
    code, out, _ = say(capsys, "verify", run_dir)
    *files, title, last = out.splitlines()
    assert code == 0
    assert len(files) == 3
    assert all(": verifies: step " in line for line in files)
    assert (title, last) == (f"{run_dir}: finished at step 30, epoch 3", "  Nothing is wrong.")
    assert say(capsys, "verify", run_dir / "checkpoints")[1] == out


@pytest.mark.parametrize("name", ["step-00000030.ckpt", "step-00000020.ckpt"])
def test_a_damaged_checkpoint_is_named_with_the_step_to_go_on_from(
    name: str, run_dir: Path, capsys: Capture
) -> None:
    flip(run_dir / "checkpoints" / name)
    (found,) = findings(capsys, run_dir).items()
    assert found[0].startswith(f"{name} does not verify: one or more damaged bytes in record ")
    assert found[1].startswith(f"Go on from step {20 if '30' in name else 30}: ")
    assert found[1].endswith(f"{python()} resume.py {run_dir}")


def test_a_run_without_a_checkpoint_that_verifies_is_started_again(
    run_dir: Path, capsys: Capture
) -> None:
    command = f"{python()} train.py --config configs/fast.yaml --run_name"
    for one in store(run_dir).checkpoints():
        truncate(one.path)
    wrong = findings(capsys, run_dir)
    assert len(wrong) == 3
    assert all(
        do.endswith(f"Start it again, under another name: {command} first-2")
        for do in wrong.values()
    )
    for path in (run_dir / "checkpoints").iterdir():
        path.unlink()
    assert findings(capsys, run_dir)["It has no checkpoint that verifies."] == (
        f"Start it again: {command} first --resume auto"
    )


def test_a_foreign_file_under_a_checkpoint_s_name_is_no_damage(
    run_dir: Path, capsys: Capture
) -> None:
    torch.save({}, run_dir / "checkpoints" / "step-00000040.ckpt")
    (found,) = findings(capsys, run_dir).items()
    assert "a torch.save file without a manifest" in found[0]
    assert found[1].startswith("Start from its weights: ")


@pytest.mark.parametrize(
    ("name", "target"), [("last.ckpt", "step-00000030.ckpt"), ("best.ckpt", "step-00000010.ckpt")]
)
def test_a_pointer_that_shows_another_file_is_mended_by_the_command_that_is_named(
    name: str, target: str, run_dir: Path, capsys: Capture
) -> None:
    pointer = run_dir / "checkpoints" / name
    pointer.unlink()
    for damage in (
        lambda: None,
        lambda: os.link(run_dir / "checkpoints" / "step-00000020.ckpt", pointer),
    ):
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


def test_rows_that_the_newest_checkpoint_counts_and_the_log_has_not_are_missed(
    run_dir: Path, capsys: Capture
) -> None:
    store(run_dir).add(small_state() | {"logged_rows": 3}, facts(40, 40.0))
    for text, there in (("step,loss\n1,2\n", 1), ("", 0), (None, 0)):
        (run_dir / "metrics.csv").unlink(missing_ok=True)
        if text is not None:
            (run_dir / "metrics.csv").write_text(text)
        (what,) = findings(capsys, run_dir)
        assert (
            what
            == f"metrics.csv has {there} of the 3 rows that step-00000040.ckpt counts: the others are lost."
        )
    # A resume cuts what is too much.
    (run_dir / "metrics.csv").write_text("step,loss\n1,2\n2,2\n3,1\n4,1\n")
    assert findings(capsys, run_dir) == {}


def test_weights_that_are_not_finite_are_said(run_dir: Path, capsys: Capture) -> None:
    state = small_state()
    state["state_dict"]["bias"][3] = float("nan")
    store(run_dir).add(state, facts(40, 40.0))
    what = "step-00000040.ckpt verifies, not finite: ['state_dict.bias']"
    assert list(findings(capsys, run_dir)) == [what]
    code, out, _ = say(capsys, "verify", run_dir)
    assert code == 1
    assert "step-00000040.ckpt: verifies, but is not finite in 1 tensor: state_dict.bias\n" in out
    assert f"  Choose an older one, with --rewind: {python()} -m savepoint ls {run_dir}\n" in out


def test_too_little_room_is_said(
    run_dir: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        os, "statvfs", lambda path: SimpleNamespace(f_bavail=10, f_frsize=1000, f_blocks=99)
    )
    assert findings(capsys, run_dir).keys() == {
        "Too little room: 0.01 MB free, a checkpoint takes 0.01 MB."
    }


def test_a_run_that_ended_before_its_first_save_is_started_again(
    tmp_path: Path, run_dir: Path, capsys: Capture
) -> None:
    broken = make_run(tmp_path, "broken", steps=())
    assert not (broken / "checkpoints").exists()
    do = f"{python()} train.py --config configs/fast.yaml --run_name broken --resume auto"
    (found,) = findings(capsys, broken).items()
    assert found == ("It has no checkpoint that verifies.", f"Start it again: {do}")


def test_a_directory_that_cannot_be_written_is_said(
    run_dir: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode == os.W_OK and path == run_dir))
    assert findings(capsys, run_dir) == {
        f"This user cannot write in {run_dir}: it cannot go on here.": f"chmod u+w {run_dir}"
    }


def test_what_is_worth_knowing_is_no_fault(run_dir: Path, capsys: Capture) -> None:
    (run_dir / "summary.json").unlink()
    assert findings(capsys, run_dir, wrong=False).keys() == {
        "Its training ended, the test was not made."
    }
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
    assert any(
        what.startswith("step-00000040.ckpt.corrupt is quarantined: truncated") for what in notes
    )


# -- what to do with a file ----------------------------------------------------------------------


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
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "git-LFS pointer",
            "git lfs pull --include '",
        ),
        (b"<html>", "an HTML page", "download the file again"),
        (b"\x1f\x8b123", "a compressed file", "Unpack it"),
        (b"notes", "a text file", "Name a checkpoint."),
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
    assert said.startswith("a file does not verify: ")
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


def test_a_truncated_copy_is_copied_again_and_one_in_a_run_is_gone_around(
    run_dir: Path, capsys: Capture
) -> None:
    copy = small_checkpoint(run_dir.parent / "copy.ckpt").path
    truncate(copy)
    ((what, do),) = findings(capsys, copy).items()
    assert what.startswith("copy.ckpt does not verify: truncated: ")
    assert do.startswith("Copy it again")
    truncate(latest(run_dir).path)
    assert (
        findings(capsys, run_dir / "checkpoints" / "step-00000030.ckpt")
        .popitem()[1]
        .startswith("Go on from step 20")
    )


def test_a_whole_copy_of_a_damaged_checkpoint_is_what_a_resume_goes_on_from(
    run_dir: Path, capsys: Capture
) -> None:
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
    damaged, pointer = findings(capsys, run_dir)
    assert damaged.startswith("last.ckpt does not verify: one or more damaged bytes in record ")
    assert pointer == "last.ckpt does not show step-00000030.ckpt."
