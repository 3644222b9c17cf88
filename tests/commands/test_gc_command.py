"""`savepoint gc` deletes what retention lets go, and nothing else."""

import json
import os
from pathlib import Path

import pytest
from support.checkpoint_files import facts, names, small_state
from support.run_dirs import flip, latest, make_run, say, store, training_in

from savepoint.checkpoint.store import write

Capture = pytest.CaptureFixture[str]
SLIP = "checkpoint: {keep_last: 1, keep_best: 1, monitor: val/loss, mode: maxx}\n"
STEPS = (10, 20, 30, 40, 50)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path, steps=STEPS)


def left(run_dir: Path) -> list[int]:
    return [one.step for one in store(run_dir).checkpoints()]


def test_the_rules_of_the_config_decide_and_each_file_is_told_with_its_reason(
    run_dir: Path, capsys: Capture
) -> None:
    code, out, err = say(capsys, "gc", run_dir)
    assert (code, err) == (0, "")
    assert left(run_dir) == [10, 50]  # keep_last 1, keep_best 1
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["keep_last", "1,", "keep_best", "1"]
    assert [(line[0], line[3:]) for line in lines[2:-1]] == [
        ("step-00000010.ckpt", ["stays", "best-1"]),
        ("step-00000020.ckpt", ["goes", "no", "rule,", "last-4,", "best-2"]),
        ("step-00000030.ckpt", ["goes", "no", "rule,", "last-3,", "best-3"]),
        ("step-00000040.ckpt", ["goes", "no", "rule,", "last-2,", "best-4"]),
        ("step-00000050.ckpt", ["stays", "last-1"]),
        ("last.ckpt", ["stays", "the", "name", "of", "the", "newest"]),
        ("best.ckpt", ["stays", "the", "name", "of", "the", "best"]),
    ]
    assert out.splitlines()[-1] == "Deleted 3 files, 0.02 MB."


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ("--keep_last 2", [10, 40, 50]),
        ("--keep_best 3 --keep_last 0", [10, 20, 30, 50]),
        ("--keep_last 0 --keep_best 0", [10, 50]),  # the newest and the best always stay
        ("--keep_every_n_steps 20", [10, 20, 40, 50]),
    ],
)
def test_a_dry_run_says_what_a_real_one_then_does(
    flags: str, kept: list[int], run_dir: Path, capsys: Capture
) -> None:
    before = names(run_dir / "checkpoints")
    code, out, _ = say(capsys, "gc", run_dir, "--dry-run", "--json", *flags.split())
    assert code == 0
    assert [
        row["step"] for row in json.loads(out)["files"] if row["step"] and not row["goes"]
    ] == kept
    assert names(run_dir / "checkpoints") == before
    assert "lock" not in names(run_dir)
    say(capsys, "gc", run_dir, *flags.split())
    assert left(run_dir) == kept


def test_foreign_and_damaged_files_are_never_touched_and_what_a_dead_process_left_goes(
    run_dir: Path, capsys: Capture
) -> None:
    checkpoints = run_dir / "checkpoints"
    others = ["notes.txt", "step-7.pt", "step-00000005.ckpt.corrupt", "step-00000025.ckpt"]
    for name in others:
        (checkpoints / name).write_text("mine")
    # Any other name is foreign, too.
    host = write(checkpoints / "x.ckpt", small_state(), facts(1)).path
    (checkpoints / ".step-00000060.ckpt.tmp-gone.example-1-0a").touch()
    os.utime(checkpoints / ".step-00000060.ckpt.tmp-gone.example-1-0a", (0, 0))
    code, out, _ = say(capsys, "gc", run_dir)
    assert code == 0
    assert names(checkpoints) == sorted(
        [*others, host.name, "best.ckpt", "last.ckpt", "step-00000010.ckpt", "step-00000050.ckpt"]
    )
    assert "left by a process that died" in out
    assert "stays  does not verify, never deleted" in out


def test_where_a_process_trains_nothing_is_deleted(run_dir: Path, capsys: Capture) -> None:
    with training_in(run_dir) as pid:
        code, out, err = say(capsys, "gc", run_dir)
        assert (code, out) == (2, "")
        assert (
            f"Another process trains in this run directory: {run_dir}, held by pid {pid} on" in err
        )
        assert say(capsys, "gc", run_dir, "--dry-run")[0] == 0
    assert left(run_dir) == list(STEPS)


def test_the_lock_is_given_back_and_json_stays_json_where_a_holder_died(
    run_dir: Path, capsys: Capture
) -> None:
    (run_dir / "lock").write_text('{"host": "gone", "pid": 1, "boot_id": ""}')
    code, out, err = say(capsys, "gc", run_dir, "--json")
    assert code == 0
    assert len([row for row in json.loads(out)["files"] if row["step"]]) == len(STEPS)
    assert "Taking over the lock of pid 1 on gone" in err
    assert (run_dir / "lock").read_text() == ""


@pytest.mark.parametrize("step", [10, 50])
def test_nothing_is_deleted_where_one_that_would_stay_is_damaged(
    step: int, run_dir: Path, capsys: Capture
) -> None:
    flip(run_dir / "checkpoints" / f"step-{step:08d}.ckpt")
    for flags in ([], ["--dry-run"]):
        code, out, _ = say(capsys, "gc", run_dir, *flags)
        assert code == 1
        assert "DAMAGED: one or more damaged bytes" in out
        assert left(run_dir) == list(STEPS)


@pytest.mark.parametrize("damage", [None, "{", "checkpoint: 3\n", "\udcff", SLIP])
def test_the_config_in_the_newest_checkpoint_decides_where_the_file_is_lost(
    damage: str | None, run_dir: Path, capsys: Capture
) -> None:
    (run_dir / "config.yaml").unlink()
    if damage is not None:
        (run_dir / "config.yaml").write_bytes(damage.encode("utf-8", "surrogateescape"))
    code, _, err = say(capsys, "gc", run_dir)
    assert code == 2
    assert "No config that says what to keep" in err
    config = "checkpoint: {keep_last: 3, keep_best: 1, monitor: val/loss, mode: max}\n"
    store(run_dir).add(small_state() | {"config": config}, facts(60, 60.0))
    assert say(capsys, "gc", run_dir)[0] == 0
    assert left(run_dir) == [40, 50, 60]  # the largest is the best now


def test_a_rule_out_of_range_is_bad_input(run_dir: Path, capsys: Capture) -> None:
    code, _, err = say(capsys, "gc", run_dir, "--keep_last", "-1")
    assert code == 2
    assert "keep_last is out of range: -1" in err
    assert left(run_dir) == list(STEPS)


def test_pointers_show_the_newest_and_the_best_afterwards(run_dir: Path, capsys: Capture) -> None:
    (run_dir / "checkpoints" / "last.ckpt").unlink()
    say(capsys, "gc", run_dir)
    assert (run_dir / "checkpoints" / "last.ckpt").samefile(latest(run_dir).path)


def test_a_directory_of_checkpoints_without_a_run_is_refused(
    run_dir: Path, capsys: Capture
) -> None:
    (run_dir / "checkpoints").rename(run_dir.with_name("loose"))
    code, _, err = say(capsys, "gc", run_dir.with_name("loose"))
    assert code == 2
    assert "No run" in err
