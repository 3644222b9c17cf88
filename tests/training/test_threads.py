"""How many threads a training computes with, and what is said where it waits for its turn."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.programs import ROOT

from savepoint import job
from savepoint.errors import ConfigError
from savepoint.training import threads
from savepoint.training.threads import WaitWatch, chosen


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of control groups, with this process in `/jobs/mine`, and eight cores."""
    monkeypatch.setattr(job, "_CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    real = job._read

    def read(path: Path) -> str:
        own = "4:cpu,cpuacct:/jobs/mine\n0::/jobs/mine\n"
        return own if path == Path("/proc/self/cgroup") else real(path)

    monkeypatch.setattr(job, "_read", read)
    return tmp_path


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_a_quota_the_affinity_counts(groups: Path) -> None:
    put(groups / "jobs/mine/cpu.max", "max 100000\n")
    assert job.cores() == 8


@pytest.mark.parametrize(("quota", "cores"), [("50000", 1), ("200000", 2), ("250000", 3)])
def test_a_quota_of_version_2_counts_rounded_up(groups: Path, quota: str, cores: int) -> None:
    put(groups / "jobs/mine/cpu.max", f"{quota} 100000\n")
    assert job.cores() == cores


def test_a_quota_of_a_group_above_counts(groups: Path) -> None:
    put(groups / "jobs/mine/cpu.max", "max 100000\n")
    put(groups / "jobs/cpu.max", "200000 100000\n")
    assert job.cores() == 2


def test_a_quota_of_version_1_counts(groups: Path) -> None:
    put(groups / "cpu,cpuacct/jobs/mine/cpu.cfs_quota_us", "300000\n")
    put(groups / "cpu,cpuacct/jobs/mine/cpu.cfs_period_us", "100000\n")
    assert job.cores() == 3


def test_no_quota_of_version_1_is_minus_one(groups: Path) -> None:
    put(groups / "cpu,cpuacct/jobs/mine/cpu.cfs_quota_us", "-1\n")
    put(groups / "cpu,cpuacct/jobs/mine/cpu.cfs_period_us", "100000\n")
    assert job.cores() == 8


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts it")
def test_who_shares_a_core_waits_for_it() -> None:
    core = str(min(os.sched_getaffinity(0)))
    code = (
        f"import os; os.sched_setaffinity(0, [{core}]); from savepoint import job; "
        "sum(range(30_000_000)); print(job.waited())"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
        for _ in range(2)
    ]
    waited = [float(one.communicate()[0]) for one in both]
    assert sum(waited) > 0.2


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(job, "cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)


@pytest.mark.usefixtures("four_cores")
def test_the_cores_are_shared_by_the_ranks_of_this_machine() -> None:
    assert [chosen(None, None, ranks) for ranks in (1, 2, 8)] == [4, 2, 1]


@pytest.mark.usefixtures("four_cores")
def test_a_resume_takes_the_number_of_the_checkpoint_where_there_are_so_many_cores() -> None:
    assert [chosen(None, saved) for saved in (2, 4, 8)] == [2, 4, 4]


@pytest.mark.usefixtures("four_cores")
def test_what_the_user_says_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(9, 2) == 9
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    assert chosen(None, 2) == 16


def test_no_threads_are_refused() -> None:
    with pytest.raises(ConfigError, match="threads is 0"):
        chosen(0)


def watch(
    monkeypatch: pytest.MonkeyPatch, *, steps: int, waited: int, throttled: int, threads_now: int
) -> None:
    """Twenty seconds of a training, as `WaitWatch` sees them."""
    watch_all(monkeypatch, [[0, 0, 0, 0], [20, steps, waited, throttled]], threads_now)


def watch_all(
    monkeypatch: pytest.MonkeyPatch,
    looks: Sequence[list[float]],
    threads_now: int,
    validated: Sequence[list[float]] = (),
) -> None:
    """A training that `WaitWatch` looks at, with a validation after the first batch."""
    trainer, watching = SimpleNamespace(is_global_zero=True), WaitWatch()

    def at(now: list[float], hook: Callable[..., None]) -> None:
        monkeypatch.setattr(WaitWatch, "_now", staticmethod(lambda trainer: now))
        monkeypatch.setattr(threads.time, "monotonic", lambda: now[0])
        hook(trainer, None)

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads_now)
    at(looks[0], watching.on_train_start)
    for now, hook in zip(
        validated, (watching.on_validation_start, watching.on_validation_end), strict=False
    ):
        at(now, hook)
    for now in looks[1:]:
        at(now, watching.on_train_batch_end)
        at(now, watching.on_train_batch_end)


def test_slow_steps_under_a_quota_are_said_once_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watch(monkeypatch, steps=8, waited=0, throttled=190, threads_now=8)
    assert capsys.readouterr().out == (
        "Slow: 0.40 batches/s with 8 threads, and a CPU quota has stopped it 190 times. Fewer "
        "threads may be faster: --threads 4\n"
    )


def test_slow_steps_on_cores_that_others_use_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watch(monkeypatch, steps=8, waited=12, throttled=0, threads_now=2)
    assert "it waited 60% of the time for a core: others use its cores" in capsys.readouterr().out


def test_others_that_come_later_are_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks: list[list[float]] = [
        [0, 0, 0, 0],
        [20, 2000, 1, 0],
        [40, 2020, 13, 0],
        [60, 2040, 25, 0],
    ]
    watch_all(monkeypatch, looks, threads_now=2)
    assert capsys.readouterr().out == (
        "Slow: 1.00 batches/s with 2 threads, and it waited 60% of the time for a core: others "
        "use its cores. Fewer threads may be faster: --threads 1\n"
    )


def test_a_validation_is_no_slow_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks: list[list[float]] = [[0, 0, 0, 0], [600, 2000, 400, 0]]
    watch_all(monkeypatch, looks, 2, validated=[[1, 0, 0, 0], [580, 0, 399, 0]])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "seen",
    [
        {"steps": 2000, "waited": 12, "throttled": 90, "threads_now": 8},
        {"steps": 8, "waited": 1, "throttled": 0, "threads_now": 8},
        {"steps": 8, "waited": 12, "throttled": 90, "threads_now": 1},
        {"steps": 8, "waited": 1, "throttled": 2, "threads_now": 8},
    ],
    ids=["fast steps", "a large model", "one thread", "a quota that hardly binds"],
)
def test_nothing_is_said_of(
    seen: dict[str, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watch(monkeypatch, **seen)
    assert capsys.readouterr().out == ""


@pytest.fixture
def half_a_core() -> Iterator[Path]:
    group = Path("/sys/fs/cgroup/cpu") / f"savepoint-test-{os.getpid()}"
    group.mkdir()
    (group / "cpu.cfs_quota_us").write_text("50000")
    yield group
    group.rmdir()


@pytest.mark.root
def test_in_a_real_group_of_half_a_core_one_thread_is_taken(half_a_core: Path) -> None:
    code = "from savepoint.training import threads; print(threads.chosen(None))"
    lacking = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    enter = f"echo $$ > {half_a_core}/cgroup.procs && exec {sys.executable} -c '{code}'"
    printed = subprocess.check_output(
        ["sh", "-c", enter], text=True, env=lacking | {"PYTHONPATH": str(ROOT / "src")}
    )
    assert printed == "1\n"
