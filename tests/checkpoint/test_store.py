import errno
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from support.checkpoint_files import facts, names, small_state

from savepoint import files
from savepoint.checkpoint import format, manifest, store
from savepoint.checkpoint.archive import Archive
from savepoint.checkpoint.retention import Retention
from savepoint.checkpoint.store import CheckpointStore
from savepoint.errors import (
    CheckpointContentError,
    CheckpointCorruptError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    CheckpointVersionError,
)

ALL = Retention(keep_every_n_steps=1)


@pytest.fixture
def kept(tmp_path: Path) -> CheckpointStore:
    """Four checkpoints, all kept; 20 is the best."""
    kept = CheckpointStore(tmp_path / "checkpoints", retention=ALL, monitor="val/loss")
    for step, score in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 1.0)):
        kept.add(small_state(step), facts(step, score))
    return kept


def damage(path: Path) -> None:
    """Flip a bit in a tensor, in place: hard links see it too."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def damage_end(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)


def failing(code: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


# -- looking -------------------------------------------------------------------------------------


def test_a_saved_checkpoint_is_found_and_loads(kept: CheckpointStore) -> None:
    assert [one.step for one in kept.checkpoints()] == [10, 20, 30, 40]
    assert (kept.latest().step, kept.best().step) == (40, 20)
    state, read = store.load(kept.path(30))
    assert format.fingerprint(state) == format.fingerprint(small_state(30))
    assert (read["step"], read["metrics"]["val/loss"]["value"]) == (30, 2.0)
    assert names(kept.directory) == [
        "best.ckpt", "last.ckpt", *(f"step-000000{step}.ckpt" for step in (10, 20, 30, 40)),
    ]  # fmt: skip


def test_an_empty_or_missing_directory_has_no_checkpoint(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "none"):
        empty = CheckpointStore(directory)
        assert (
            empty.checkpoints(),
            empty.latest(),
            empty.best(),
            empty.commit(),
            empty.sweep(),
        ) == (
            [],
            None,
            None,
            [],
            [],
        )


def test_the_facts_rank_not_the_name_or_the_time(kept: CheckpointStore) -> None:
    os.utime(kept.path(10))
    kept.path(20).rename(kept.path(99))
    found = CheckpointStore(kept.directory, monitor="val/loss")
    assert [one.step for one in found.checkpoints()] == [10, 20, 30, 40]
    assert found.latest().path == kept.path(40)
    assert found.best().path == kept.path(99)


@pytest.mark.parametrize("score", ["nan", "inf", "-inf", None])
def test_a_score_that_is_no_number_never_wins(kept: CheckpointStore, score: Any) -> None:
    kept.add(small_state(), facts(50, score))
    assert kept.best().step == 20
    assert kept.best(mode="max").step == 10


def test_a_metric_measured_at_another_step_does_not_rank(kept: CheckpointStore) -> None:
    kept.write(small_state(), facts(50) | {"metrics": {"val/loss": {"value": 0.0, "step": 40}}})
    assert kept.best().step == 20
    assert kept.latest().score is None


def test_any_metric_can_rank_afterwards(tmp_path: Path) -> None:
    kept = CheckpointStore(tmp_path, retention=ALL)
    for step, accuracy in ((10, 0.5), (20, 0.9), (30, 0.9)):
        metrics = {
            "val/accuracy": {"value": accuracy, "step": step},
            "val/loss": {"value": -step, "step": step},
        }
        kept.add(small_state(), facts(step) | {"metrics": metrics})
    assert kept.best("val/accuracy", "max").step == 20
    assert kept.best("val/accuracy", "min").step == 10
    assert kept.best("val/other") is None
    assert kept.best().step == 30  # what the newest was saved with: val/loss, min


def test_files_that_do_not_read_are_listed_apart(kept: CheckpointStore) -> None:
    damage_end(kept.path(40))
    torch.save({}, kept.path(50))
    (kept.directory / "step-x.ckpt").write_text("not named as a checkpoint")
    assert [one.step for one in kept.checkpoints()] == [10, 20, 30]
    rejected = kept.rejected()
    assert [path for path, _ in rejected] == [kept.path(40), kept.path(50)]
    assert "truncated" in rejected[0][1]
    assert rejected[1][1].startswith("not a checkpoint of Savepoint: a torch.save file without")
    assert "\n" not in rejected[1][1]
    assert kept.path(40).exists()


def test_a_file_that_changed_is_read_again(kept: CheckpointStore) -> None:
    kept.checkpoints()
    store.write(kept.path(30), small_state(), facts(30, 0.1))
    assert kept.best().step == 30


def test_a_file_that_did_not_change_is_not_read_again(
    kept: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.checkpoints()
    monkeypatch.setattr(manifest, "read", failing(errno.EIO))
    assert [one.step for one in kept.checkpoints()] == [10, 20, 30, 40]
    assert CheckpointStore(kept.directory).checkpoints() == []


# -- saving --------------------------------------------------------------------------------------


def test_retention_deletes_after_the_pointers_moved(tmp_path: Path) -> None:
    kept = CheckpointStore(tmp_path, retention=Retention(keep_last=2), monitor="val/loss")
    for step, score in ((10, 1.0), (20, 2.0), (30, 3.0), (40, 4.0)):
        kept.add(small_state(step), facts(step, score))
    assert names(tmp_path) == [
        "best.ckpt", "last.ckpt", "step-00000010.ckpt", "step-00000030.ckpt", "step-00000040.ckpt",
    ]  # fmt: skip
    assert manifest.verify(tmp_path / "last.ckpt")["step"] == 40
    assert manifest.verify(tmp_path / "best.ckpt")["step"] == 10
    assert os.path.samefile(tmp_path / "last.ckpt", kept.path(40))


def test_saving_a_step_again_moves_the_pointers_too(kept: CheckpointStore) -> None:
    kept.add(small_state(7), facts(40, 0.1, at="epoch"))
    for name in ("last.ckpt", "best.ckpt"):
        assert os.path.samefile(kept.directory / name, kept.path(40))


@pytest.mark.parametrize("links", ["symlinks", "copies"])
def test_pointers_work_where_links_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: str
) -> None:
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    if links == "copies":
        monkeypatch.setattr(os, "symlink", failing(errno.EPERM))
        monkeypatch.setattr(Path, "symlink_to", failing(errno.EPERM))
    kept = CheckpointStore(tmp_path / "a", monitor="val/loss")
    for step, score in ((10, 1.0), (20, 2.0), (30, 3.0)):
        kept.add(small_state(), facts(step, score))
    moved = (tmp_path / "a").rename(tmp_path / "b")
    assert names(moved) == ["best.ckpt", "last.ckpt", "step-00000010.ckpt", "step-00000030.ckpt"]
    assert (
        manifest.verify(moved / "last.ckpt")["step"],
        manifest.verify(moved / "best.ckpt")["step"],
    ) == (30, 10)
    assert (moved / "last.ckpt").is_symlink() == (links == "symlinks")
    before = (moved / "last.ckpt").lstat().st_ino
    CheckpointStore(moved, monitor="val/loss").commit()
    assert (moved / "last.ckpt").lstat().st_ino == before


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = store.write(tmp_path / "a.ckpt", small_state(), facts(1)).path
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_value_that_cannot_be_read_back_leaves_no_file(kept: CheckpointStore) -> None:
    before = kept.path(40).read_bytes()
    with pytest.raises(CheckpointContentError, match=r"hyper_parameters\.root"):
        kept.add({"hyper_parameters": {"root": Path("x")}}, facts(40))
    assert kept.path(40).read_bytes() == before
    assert not [name for name in names(kept.directory) if "tmp" in name]


@pytest.mark.parametrize("call", ["open", "fdopen", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_a_save_that_fails_says_why_and_changes_nothing(
    kept: CheckpointStore, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    before = {path.name: path.read_bytes() for path in kept.directory.iterdir()}
    monkeypatch.setattr(files.os, call, failing(code))
    with pytest.raises(CheckpointSaveError) as error:
        store.write(kept.path(40), small_state(9), facts(40))
    monkeypatch.undo()
    assert (error.value.errno, error.value.path) == (code, kept.path(40))
    assert f"{kept.path(40)}: {os.strerror(code)}" in str(error.value)
    assert {path.name: path.read_bytes() for path in kept.directory.iterdir()} == before


def test_a_disk_that_fills_within_a_tensor_is_told_as_such(
    kept: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch answers a failed write with an error of its own that says nothing of the disk."""

    def full(descriptor: int, mode: str) -> Any:
        os.close(descriptor)
        return open("/dev/full", mode)

    before = names(kept.directory)
    monkeypatch.setattr(files.os, "fdopen", full)
    with pytest.raises(CheckpointSaveError, match="No space left on device"):
        store.write(kept.path(40), small_state() | {"big": torch.zeros(100_000)}, facts(40))
    assert names(kept.directory) == before
    assert manifest.verify(kept.path(40))


def test_an_interrupted_save_leaves_no_temp(
    kept: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = names(kept.directory)
    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        kept.add(small_state(), facts(50))
    assert names(kept.directory) == before


def full_until(monkeypatch: pytest.MonkeyPatch, directory: Path, count: int) -> None:
    """A disk with room for `count` checkpoints."""
    fsync = os.fsync

    def guarded(descriptor: int) -> None:
        if len(list(directory.glob("step-*.ckpt"))) + len(list(directory.glob(".step-*"))) > count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", guarded)


def test_a_full_disk_is_freed_of_what_the_save_makes_superfluous(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = CheckpointStore(tmp_path, retention=Retention(keep_last=3), monitor="val/loss")
    for step in (10, 20, 30, 40):
        kept.add(small_state(), facts(step, float(step)))
    assert [one.step for one in kept.checkpoints()] == [10, 20, 30, 40]
    full_until(monkeypatch, tmp_path, 4)
    kept.add(small_state(), facts(50, 50.0))
    assert [one.step for one in kept.checkpoints()] == [10, 30, 40, 50]
    assert manifest.verify(tmp_path / "last.ckpt")["step"] == 50


def test_a_full_disk_never_costs_the_newest_or_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = CheckpointStore(tmp_path, monitor="val/loss")
    kept.add(small_state(), facts(10, 1.0))
    kept.add(small_state(), facts(20, 2.0))
    full_until(monkeypatch, tmp_path, 2)
    # This one would be both the newest and the best: were it counted as there, the two others would
    # go.
    with pytest.raises(CheckpointSaveError, match="No space left"):
        kept.add(small_state(), facts(30, 0.5))
    assert [one.step for one in kept.checkpoints()] == [10, 20]
    assert manifest.verify(tmp_path / "last.ckpt")["step"] == 20


def test_a_deletion_that_fails_is_said(
    kept: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = CheckpointStore(kept.directory, monitor="val/loss")
    monkeypatch.setattr(Path, "unlink", failing(errno.EACCES))
    with pytest.raises(CheckpointSaveError, match="step-00000010"):
        strict.commit()


# -- starting again ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damaging", [damage, damage_end, lambda path: os.truncate(path, 0)], ids=["bit", "end", "empty"]
)
def test_a_damaged_newest_is_named_and_the_one_before_is_taken(
    kept: CheckpointStore, damaging: Callable[[Path], None]
) -> None:
    damaging(kept.path(40))
    checkpoint, state, lines = kept.load_latest(lock_holder=True)
    assert checkpoint.step == 30
    assert format.fingerprint(state) == format.fingerprint(small_state(30))
    assert len(lines) == 1
    assert lines[0].startswith("step-00000040.ckpt does not verify: ")
    assert lines[0].endswith(
        "renamed to step-00000040.ckpt.corrupt. Going on from step 30 costs 10 steps."
    )
    assert (kept.directory / "step-00000040.ckpt.corrupt").exists()
    assert not kept.path(40).exists()
    assert manifest.verify(kept.directory / "last.ckpt")["step"] == 30
    assert manifest.verify(kept.directory / "best.ckpt")["step"] == 20


def test_every_byte_is_looked_at_once_and_of_the_chosen_file_alone(
    kept: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at, look = [], manifest._damaged_records

    def seen(file: BinaryIO, tail: Any) -> list[str]:
        looked_at.append(Path(file.name).name)
        return look(file, tail)

    monkeypatch.setattr(manifest, "_damaged_records", seen)
    kept.load_latest(lock_holder=True)
    assert looked_at == ["step-00000040.ckpt"]


def test_who_does_not_hold_the_lock_renames_nothing(kept: CheckpointStore) -> None:
    before = names(kept.directory)
    damage(kept.path(40))
    damage(kept.path(30))
    checkpoint, _, lines = kept.load_latest(lock_holder=False)
    assert checkpoint.step == 20
    assert [line.split()[-2] for line in lines] == ["20", "10"]
    assert names(kept.directory) == before


def test_where_none_verifies_all_are_named_and_none_is_deleted(kept: CheckpointStore) -> None:
    for one in kept.checkpoints():
        damage(one.path)
    with pytest.raises(
        CheckpointNotFoundError,
        match=r"4 found: step-00000040\.ckpt does not verify: one or more damaged",
    ):
        kept.load_latest(lock_holder=True)
    assert names(kept.directory) == [f"step-000000{step}.ckpt.corrupt" for step in (10, 20, 30, 40)]
    with pytest.raises(CheckpointNotFoundError, match="none found"):
        kept.load_latest(lock_holder=True)


def test_a_second_damaged_file_of_a_name_replaces_none(kept: CheckpointStore) -> None:
    for _ in range(2):
        damage(kept.add(small_state(), facts(50)).path)
        kept.load_latest(lock_holder=True)
    assert {"step-00000050.ckpt.corrupt", "step-00000050.ckpt.2.corrupt"} <= set(
        names(kept.directory)
    )


def test_a_copy_of_the_newest_takes_the_place_of_a_damaged_one(kept: CheckpointStore) -> None:
    """`last` is a file of its own where links fail, or after a copy of the run that kept no links."""
    (kept.directory / "last.ckpt").unlink()
    shutil.copy(kept.path(40), kept.directory / "last.ckpt")
    damage(kept.path(40))
    checkpoint, _, lines = kept.load_latest(lock_holder=True)
    assert checkpoint.path == kept.path(40)
    assert lines[0].endswith(
        "renamed to step-00000040.ckpt.corrupt. Going on from step 40 costs 0 steps."
    )
    assert manifest.verify(kept.directory / "last.ckpt")["step"] == 40


def test_a_copy_is_taken_where_a_foreign_file_has_its_name_and_the_others_are_damaged(
    kept: CheckpointStore,
) -> None:
    shutil.copy(kept.path(40), kept.directory / "copy")
    os.replace(kept.directory / "copy", kept.directory / "last.ckpt")
    kept.path(40).unlink()
    torch.save({"x": 1}, kept.path(40))
    for step in (10, 20, 30):
        damage(kept.path(step))
    assert kept.load_latest(lock_holder=True)[0].step == 40


def test_a_foreign_file_in_the_way_is_passed_by_and_left(kept: CheckpointStore) -> None:
    torch.save({"x": 1}, kept.path(50))
    checkpoint, _, lines = kept.load_latest(lock_holder=True)
    assert checkpoint.step == 40
    assert "without a manifest" in lines[0]
    assert "costs 10 steps" in lines[0]
    assert torch.load(kept.path(50), weights_only=True) == {"x": 1}


def test_a_newer_savepoints_checkpoint_is_not_passed_by(kept: CheckpointStore) -> None:
    with kept.path(40).open("w+b") as file:
        archive = Archive(file)
        archive.save({})
        archive.seal(facts(40) | {"format_version": 99})
    with pytest.raises(CheckpointVersionError, match="this is 99"):
        kept.load_latest(lock_holder=True)
    assert kept.path(40).exists()


def test_a_named_file_has_no_fallback(kept: CheckpointStore) -> None:
    damage(kept.path(40))
    with pytest.raises(CheckpointCorruptError, match=r"step-00000040\.ckpt"):
        store.load(kept.path(40))
    assert kept.path(40).exists()


def temp(host: str, pid: int, name: str = "step-00000050.ckpt") -> str:
    return f".{name}.tmp-{host}-{pid}-0a1b2c3d"


def test_a_sweep_takes_the_temps_of_the_dead_alone(kept: CheckpointStore) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = files._HOST
    stale = [
        temp(here, dead.pid),
        temp(here, dead.pid, "last.ckpt"),
        temp(here, os.getpid()),
        temp("gone", 1, "best.ckpt"),
    ]
    fresh = [
        temp("other", 1),
        temp(here, os.getppid()),
        ".step-00000050.ckpt.tmp-mine",
        "notes.txt",
        "a.ckpt.tmp",
    ]
    for name in stale + fresh:
        (kept.directory / name).write_bytes(b"x")
    os.utime(kept.directory / stale[-1], (time.time() - 7200,) * 2)
    before = set(names(kept.directory))
    assert {path.name for path in kept.sweep()} == set(stale)
    assert before - set(names(kept.directory)) == set(stale)


def test_a_sweep_leaves_what_this_process_is_writing(kept: CheckpointStore) -> None:
    with files.replacing(kept.path(50)) as file:
        format.encode(small_state(), facts(50), file)
        assert kept.sweep() == []
    assert kept.latest().step == 50


def test_a_temp_never_looks_like_a_checkpoint(kept: CheckpointStore) -> None:
    with files.replacing(kept.path(50)):
        (name,) = (name for name in names(kept.directory) if "tmp" in name)
        assert not name.endswith(".ckpt")
        assert socket.gethostname()[:1] in name


def test_later_checkpoints_are_set_aside_for_a_rewind(kept: CheckpointStore) -> None:
    into = kept.directory / "after-step-20"
    into.mkdir()
    (into / "step-00000040.ckpt").write_text("of an earlier rewind")
    moved = kept.set_aside_after(20, into)
    assert sorted(path.name for path in moved) == ["step-00000030.ckpt", "step-00000040.2.ckpt"]
    assert [manifest.verify(path)["step"] for path in moved] == [40, 30]
    assert (into / "step-00000040.ckpt").read_text() == "of an earlier rewind"
    assert [one.step for one in kept.checkpoints()] == [10, 20]
    assert manifest.verify(kept.directory / "last.ckpt")["step"] == 20
    assert kept.set_aside_after(20, into) == []
    kept.set_aside_after(0, into)
    assert names(kept.directory) == ["after-step-20"]


def test_other_peoples_files_are_never_touched(kept: CheckpointStore) -> None:
    others = {
        name: f"mine {name}"
        for name in (
            "model.ckpt",
            "step-1.ckpt.bak",
            "step-abc.ckpt",
            ".hidden",
            "x.tmp",
            "a.corrupt",
        )
    }
    for name, text in others.items():
        (kept.directory / name).write_text(text)
    strict = CheckpointStore(kept.directory, monitor="val/loss")
    damage(kept.path(40))
    strict.load_latest(lock_holder=True)
    strict.add(small_state(), facts(50, 5.0))
    strict.sweep()
    strict.set_aside_after(20, kept.directory.parent / "aside")
    assert {name: (kept.directory / name).read_text() for name in others} == others


def test_checkpoints_move_with_their_directory(kept: CheckpointStore, tmp_path: Path) -> None:
    moved = CheckpointStore(shutil.move(kept.directory, tmp_path / "elsewhere"), monitor="val/loss")
    assert (moved.latest().step, moved.best().step) == (40, 20)
    assert moved.load_latest(lock_holder=False)[2] == []


def test_a_directory_named_by_a_url_is_refused() -> None:
    for url in ("s3://bucket/run", "gs://bucket/run"):
        with pytest.raises(CheckpointNotFoundError, match="URL"):
            CheckpointStore(url)


def test_the_holder_of_a_lock_sweeps_what_others_left_whoever_they_were(
    kept: CheckpointStore,
) -> None:
    """A container has another host name at each start, and its pids begin anew."""
    left = {temp("other", 1), temp(files._HOST, os.getppid())}
    for name in left:
        (kept.directory / name).write_bytes(b"x")
    with files.replacing(kept.path(50)) as file:
        format.encode(small_state(), facts(50), file)
        assert {path.name for path in kept.sweep(alone=True)} == left


def test_files_are_set_aside_on_another_disk_too(
    kept: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, replace = kept.latest().path.read_bytes(), os.replace

    def on_one_disk_only(source: Any, target: Any) -> None:
        if Path(source).parent != Path(target).parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        replace(source, target)

    monkeypatch.setattr(os, "replace", on_one_disk_only)
    newest = kept.latest().step
    (moved,) = kept.set_aside_after(newest - 1, tmp_path / "elsewhere")
    assert moved.read_bytes() == before
    assert kept.latest().step < newest
    assert names(tmp_path / "elsewhere") == [moved.name]


def test_a_checkpoint_that_is_deleted_while_it_is_chosen_gives_way_to_a_newer_one(
    kept: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest, verify = kept.latest(), manifest.verify

    def trains_on(path: Path) -> dict[str, Any]:
        if path == newest.path:
            kept.write(small_state(), facts(newest.step + 10))
            newest.path.unlink()
        return verify(path)

    monkeypatch.setattr(manifest, "verify", trains_on)
    chosen, state, said = kept.load_latest(lock_holder=False)
    assert (chosen.step, said) == (newest.step + 10, [])
    assert state.keys() == small_state().keys()


def test_a_damaged_copy_of_a_pointer_is_replaced_at_the_next_commit(kept: CheckpointStore) -> None:
    """As `cp -r` leaves them: files of their own."""
    for name in ("last.ckpt", "best.ckpt"):
        whole = (kept.directory / name).read_bytes()
        (kept.directory / name).unlink()
        (kept.directory / name).write_bytes(whole)
        damage(kept.directory / name)
    kept.mend()
    assert [manifest.diagnose(kept.directory / name) for name in ("last.ckpt", "best.ckpt")] == [
        "",
        "",
    ]
