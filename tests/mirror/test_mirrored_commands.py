"""ls, show and verify read a mirror by its URL."""

import json
import os
from pathlib import Path

import pytest
from support.mirrors import save, uploading
from support.run_dirs import flip, fork, make_run, say

from savepoint.mirror.remote import Remote


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Of a mirror with a run at step 20, and a fork of it."""
    place = f"file://{tmp_path}/cloud"
    first = make_run(tmp_path / "outputs", steps=(10,))
    with uploading(first, place) as mirror:
        mirror.take(save(first, 20))
    forked = fork(first, "forked", 20)
    with uploading(forked, place) as mirror:
        mirror.catch_up()
    return place


def test_ls_lists_the_runs_of_a_mirror(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = say(capsys, "ls", url)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["first", "forked"]
    code, out, _ = say(capsys, "ls", url, "--json")
    assert {row["path"] for row in json.loads(out)} == {f"{url}/first", f"{url}/forked"}


def test_ls_lists_the_checkpoints_of_a_run_without_downloading_one(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Remote, "download", lambda *_: pytest.fail("downloaded"))
    code, out, _ = say(capsys, "ls", f"{url}/first")
    assert code == 0
    assert "step-00000020.ckpt" in out
    assert "latest" in out


def test_ls_says_of_half_an_object_that_it_is_none(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "cloud" / "first" / "checkpoints"
    (there / "step-00000030.ckpt").write_bytes((there / "step-00000020.ckpt").read_bytes()[:-9])
    code, out, _ = say(capsys, "ls", f"{url}/first")
    assert code == 1
    assert "NO" in next(line for line in out.splitlines() if "step-00000030" in line)


def test_show_names_the_url_and_the_run_that_it_was_forked_from(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = say(capsys, "show", f"{url}/forked", "--only", "lineage")
    assert code == 0
    assert f"step 20 of first ({url}/first/checkpoints/step-00000020.ckpt)" in out
    code, out, _ = say(capsys, "show", f"{url}/first", "--json")
    assert json.loads(out)["file"] == f"{url}/first/checkpoints/step-00000020.ckpt"


def test_verify_looks_at_every_byte_of_a_mirror(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = say(capsys, "verify", f"{url}/first")
    assert code == 0
    assert f"{url}/first/checkpoints/step-00000020.ckpt: verifies: step 20" in out
    flip(tmp_path / "cloud" / "first" / "checkpoints" / "step-00000020.ckpt")
    code, out, _ = say(capsys, "verify", f"{url}/first")
    assert code == 1
    assert f"{url}/first/checkpoints/step-00000020.ckpt: does not verify: one or more" in out


def test_verify_takes_the_url_of_one_checkpoint(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = say(capsys, "verify", f"{url}/first/checkpoints/step-00000010.ckpt")
    assert code == 0
    assert out.startswith(f"{url}/first/checkpoints/step-00000010.ckpt: verifies: step 10")


@pytest.mark.parametrize("command", ["ls", "show", "verify"])
def test_a_url_of_nothing_is_an_error(
    command: str, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = say(capsys, command, f"{url}/nothing")
    assert code == 2
    assert f"Nothing there: {url}/nothing." in error


def test_nothing_is_left_behind(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.chdir(tmp_path / "tmp")
    code, out, _ = say(capsys, "ls", url, "--json")
    assert code == 0
    assert {row["path"] for row in json.loads(out)} == {f"{url}/first", f"{url}/forked"}
    assert os.listdir(tmp_path / "tmp") == []


def test_verify_says_how_far_the_mirror_of_a_run_is_behind(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "outputs" / "first"
    _, out, _ = say(capsys, "verify", run_dir)
    assert "mirror" not in out
    save(run_dir, 30)
    _, out, _ = say(capsys, "verify", run_dir)
    assert f"The mirror is at step 20, the run at step 30: {url}/first." in out
