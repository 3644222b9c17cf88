"""Killed again and again with SIGKILL while it saves 50 MB after every step: run by hand, two or
three minutes a test.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.programs import ROOT

sys.path.append(str(ROOT / "benchmarks"))
from faults import strikes
from faults.runs import Task

pytestmark = pytest.mark.slow


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system at /dev/shm")
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


def killed_sixty_times(work: Path, tmp: Path, seed: int) -> strikes.Tally:
    task = Task(megabytes=50, epochs=4, batches=10)
    with strikes.workers() as pool:
        expected = pool.submit(strikes.undisturbed, "savepoint", work, task).result()
        return pool.submit(strikes.kills, "savepoint", work, task, tmp, 60, seed, expected).result()


def check(tally: strikes.Tally) -> None:
    assert tally.times == 60
    assert (tally.damaged, tally.nothing_left, tally.failed, tally.temps) == (0, 0, 0, 0)
    assert max(tally.lost) <= 1, "a save after every step"
    assert tally.identical == tally.ends >= 1


def test_sixty_kills_damage_nothing_and_the_run_ends_as_if_there_had_been_none(
    tmp_path: Path,
) -> None:
    check(killed_sixty_times(tmp_path, tmp_path / "tmp", seed=1))


def test_sixty_kills_do_no_harm_either_where_temp_files_lie_on_another_file_system(
    tmp_path: Path, elsewhere: Path
) -> None:
    check(killed_sixty_times(tmp_path, elsewhere, seed=2))
