"""Two processes (DDP, gloo): stopped, killed and resumed, they end as two that were never stopped."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.limits import HANG_SECS
from support.programs import ROOT, run, start, wait_for_a_checkpoint
from support.programs import TWO_RANKS as TWO
from support.small import difference, final_state, rows

from savepoint.checkpoint import store

pytestmark = pytest.mark.slow

Send = Callable[[int, int], None]  # to the process of rank 0 and to that of rank 1


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes that nothing disturbed."""
    outputs = tmp_path_factory.mktemp("outputs")
    done = run("train.py", *TWO, "--output_dir", str(outputs), "--run_name", "straight")
    assert done.returncode == 0, done.stderr
    assert len(final_state(outputs / "straight")["other_ranks"]) == 1
    return outputs / "straight"


def begin(run_dir: Path, *more: str) -> tuple[subprocess.Popen[str], int]:
    """A run that has its first checkpoint, and the process of its rank 1."""
    process = start(
        "train.py", *TWO, "--output_dir", str(run_dir.parent), "--run_name", run_dir.name, *more
    )
    wait_for_a_checkpoint(run_dir, process)
    return process, rank_1(process.pid)


def rank_1(parent: int) -> int:
    """The launcher's child, by the variable that it was given."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if b"LOCAL_RANK=1" in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"{parent} has no rank 1")


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def goes_on_as(straight: Path, run_dir: Path) -> None:
    done = run("resume.py", str(run_dir))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        list(
            difference(
                final_state(straight) | {"config": ""}, final_state(run_dir) | {"config": ""}
            )
        )
        == []
    )
    assert rows(straight) == rows(run_dir)
    assert store.CheckpointStore(run_dir / "checkpoints").rejected() == []


def find_support(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a config of the programs name what stands in tests/support/."""
    path = [str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_both_ranks_resume_exactly_after_a_signal_and_after_a_kill(
    straight: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    process, _ = begin(tmp_path / "stopped", "--checkpoint.save_every_steps", "2")
    process.send_signal(signum)
    said = process.communicate()[0]
    assert process.returncode == (-9 if signum == signal.SIGKILL else 143), said
    goes_on_as(straight, tmp_path / "stopped")


@pytest.mark.parametrize(
    "send",
    [
        lambda zero, one: os.kill(one, 15),
        lambda zero, one: [os.kill(pid, 15) for pid in (one, zero)],
    ],
    ids=["to rank 1", "to both"],
)
def test_both_ranks_stop_at_the_same_step_whichever_got_the_signal(
    straight: Path, tmp_path: Path, send: Send
) -> None:
    process, other = begin(tmp_path / "stopped")
    send(process.pid, other)
    said = process.communicate()[0]
    assert process.returncode == 143, said
    saved = [int(step) for step in re.findall(r"saved step-0*(\d+)\.ckpt", said)]
    assert re.findall(r"Saved at step (\d+)\. Continue with", said) == [str(saved[-1])]
    state, _ = store.load(tmp_path / "stopped" / "checkpoints" / "last.ckpt")
    assert len(saved) == len(set(saved))
    assert state["global_step"] == saved[-1]
    assert not lives(other)
    goes_on_as(straight, tmp_path / "stopped")


def test_the_signal_to_save_may_come_to_rank_1_alone(straight: Path, tmp_path: Path) -> None:
    process, other = begin(tmp_path / "asked", "--checkpoint.keep_last", "9")
    os.kill(other, signal.SIGUSR1)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert len(re.findall(r"step \d+: saved", said)) == 1, said
    assert rows(straight) == rows(tmp_path / "asked")


@pytest.mark.parametrize("killed", [0, 1])
def test_where_one_rank_is_killed_the_other_ends_and_the_run_goes_on(
    straight: Path, tmp_path: Path, killed: int
) -> None:
    process, other = begin(tmp_path / "half", "--checkpoint.save_every_steps", "2")
    os.kill((process.pid, other)[killed], signal.SIGKILL)
    said = process.communicate()[0]
    assert process.returncode != 0, said
    if killed == 1:
        assert process.returncode == 1
        assert "Another rank is gone" in said
        assert "Traceback" not in said
    until = time.monotonic() + HANG_SECS
    while lives(other):
        assert time.monotonic() < until, "rank 1 does not end"
        time.sleep(0.1)
    goes_on_as(straight, tmp_path / "half")


@pytest.mark.parametrize("where", ["sanity check", "test"])
def test_a_signal_to_rank_1_before_and_after_the_training_ends_both(
    where: str, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's handlers would wait for the other rank, which waits for this one."""
    find_support(monkeypatch)
    waiting = f"{{class_path: support.waiting.Waiting, init_args: {{where: {where}, mark: {tmp_path / 'there'}}}}}"
    command = [
        *TWO,
        "--output_dir",
        str(tmp_path),
        "--run_name",
        "run",
        "--trainer.callbacks+",
        waiting,
    ]
    process = start("train.py", *command)
    while not (tmp_path / "there").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    other = rank_1(process.pid)
    os.kill(other, signal.SIGTERM)
    said = process.communicate(timeout=HANG_SECS)[0]
    assert process.returncode != 0, said
    assert not lives(other)
    done = run("train.py", *command, "--resume", "auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "summary.json").exists()
    assert rows(straight) == rows(tmp_path / "run")


@pytest.mark.parametrize("rank", [0, 1])
def test_where_the_weights_of_one_rank_are_not_finite_no_rank_saves(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_support(monkeypatch)
    breaking = f"{{class_path: support.breaking.Breaking, init_args: {{rank: {rank}, step: 4}}}}"
    more = ["--checkpoint.save_every_steps", "2", "--checkpoint.on_nan", "warn"]
    more += ["--trainer.max_epochs", "1", "--trainer.callbacks+", breaking]
    done = run("train.py", *TWO, "--output_dir", str(tmp_path), "--run_name", "broken", *more)
    assert done.returncode == 1, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert re.findall(r"not finite at step (\d+)", said) == ["4", "6", "8", "10", "12", "12"]
    newest = store.CheckpointStore(tmp_path / "broken" / "checkpoints").latest()
    assert newest is not None
    assert newest.step == 2


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    done = run(
        "train.py",
        *TWO,
        "--output_dir",
        str(tmp_path),
        "--run_name",
        "two",
        "--trainer.max_epochs",
        "1",
    )
    assert done.returncode == 0, done.stderr
    done = run(
        "resume.py", str(tmp_path / "two"), "--trainer.devices", "1", "--trainer.max_epochs", "2"
    )
    assert done.returncode == 2
    assert "Another number of processes: 1" in done.stderr
    done = run(
        "resume.py", str(tmp_path / "two"), "--trainer.devices", "3", "--trainer.max_epochs", "2"
    )
    assert done.returncode == 2
    assert done.stderr.count("Another number of processes: 3") == 1
