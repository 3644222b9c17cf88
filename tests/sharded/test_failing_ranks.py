"""Ranks that save together: one is killed, or finds its disk full."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.forked import Program
from support.limits import HANG_SECS


def scenario(name: str, work: Path, ranks: int, times: int = 1, seed: int = 1) -> dict[str, Any]:
    words = [name, work / "checkpoints", ranks, times, seed]
    command = ["tests/support/forked_ranks.py", *map(str, words)]
    with Program(command, work / "log", OMP_NUM_THREADS="1") as program:
        code = program.wait(HANG_SECS + 5 * times)
        said = program.said[-3000:]
    assert code == 0, said
    found: dict[str, Any] = json.loads((work / "found.json").read_text())
    print(found)
    return found | {"said": said}


def test_a_full_disk_on_one_rank_fails_the_save_on_all_and_the_next_one_succeeds(
    tmp_path: Path,
) -> None:
    found = scenario("full_disk", tmp_path, 2)
    assert found["codes"] == [0, 0], found["said"]
    for rank in ("rank-0", "rank-1"):
        *saved, failed, last = found[rank]
        assert [*saved, last] == ["saved"] * 4  # the third once what retention lets go made room
        assert failed.startswith("On rank 1: Saving failed: DIR/.step-00000004.ckpt.tmp-")
        assert "No space left on device" in failed
    assert found["names-3"] == ["best.ckpt", "last.ckpt", "step-00000003.ckpt"]
    assert found["names-4"] == found["names-3"]
    assert found["names-5"] == ["best.ckpt", "last.ckpt", "step-00000005.ckpt"]


def test_saves_in_threads_end_whatever_the_training_sends_meanwhile(tmp_path: Path) -> None:
    found = scenario("threads", tmp_path, 2, times=10)
    assert found["codes"] == [0, 0], found["said"]
    assert (found["steps"], found["unequal"]) == (list(range(1, 11)), [])


def test_a_full_disk_in_the_thread_of_one_rank_is_heard_by_all(tmp_path: Path) -> None:
    found = scenario("full_disk_of_a_thread", tmp_path, 2)
    assert found["codes"] == [0, 0], found["said"]
    for rank in ("rank-0", "rank-1"):
        saved, failed, last = found[rank]
        assert (saved, last) == ("saved", "saved")
        assert failed.startswith("On rank 1: Saving failed: DIR/.step-00000002.ckpt.tmp-")
    assert [name for name in found["names"] if "step-" in name] == [
        "step-00000001.ckpt",
        "step-00000003.ckpt",
    ]


def test_any_number_of_ranks_reads_its_part_of_what_others_have_saved(tmp_path: Path) -> None:
    found = scenario("resharded", tmp_path, 3)
    assert found["saved"] == [0] * 3, found["said"]
    for other in (1, 2, 3, 4):
        assert found[str(other)] == [0] * other, found["said"]


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_at_each_call_of_a_save_a_death_leaves_a_checkpoint_that_verifies(
    tmp_path: Path, every: int
) -> None:
    found = scenario("crash_points", tmp_path, 1, times=every)
    assert found["points"] > len(found["calls"]) // every
    calls = ("open", "fsync", "replace", "unlink", "open", "fsync")
    first = [name for name in found["calls"] if name != "write"][1 : 1 + 19]
    around = ("open", "fsync", "rename", "unlink", "open", "fsync")
    assert first == ["mkdir", *calls, *calls, *around]
    for kind in ("damaged", "lost", "temps", "unequal"):
        assert found[kind] == [], kind


def check_kills(tally: dict[str, Any], times: int) -> None:
    assert tally["kills"] == times
    assert tally["hung"] == 0
    for kind in ("damaged", "lost", "temps", "unequal"):
        assert tally[kind] == [], kind


@pytest.mark.slow
@pytest.mark.parametrize("saves", ["kills", "kills_of_threads"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_hundred_kills_of_random_ranks_leave_no_half_checkpoint(
    tmp_path: Path, ranks: int, saves: str
) -> None:
    check_kills(scenario(saves, tmp_path, ranks, times=100, seed=ranks), 100)
