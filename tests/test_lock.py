"""Two runs and one directory: the second is refused, with the name of the first; a lock outlives
nobody.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.forked import Program
from support.limits import LONGER_SECS
from support.programs import SIX_AN_EPOCH as SMALL
from support.programs import call, into, run, start, wait_for_a_checkpoint
from support.run_dirs import latest
from support.small import rows
from support.stopping import handlers, send_in  # noqa: F401  (handlers is a fixture)

from project.model import ImageClassifier
from savepoint.checkpoint.store import CheckpointStore
from savepoint.run import Run

HEAD = (
    "import json, os, signal, sys, time\nfrom pathlib import Path\nfrom savepoint.run import Run\n"
)

# Forked processes that all wait, then start at once; those that got a directory keep it until every
# one has spoken.
TOGETHER = """
from savepoint.errors import SavepointError

def main(outputs, directories, each, start):
    told, tell = os.pipe()
    may_start, start_all = os.pipe()
    may_end, end_all = os.pipe()
    for number in range(directories * each):
        if os.fork() == 0:
            os.close(start_all), os.close(end_all)
            os.read(may_start, 1)
            report = {"asked": number // each, "pid": os.getpid(), "directory": None, "error": None, "code": 0}
            try:
                report["directory"] = str(start(outputs, f"run-{number // each}").directory)
            except SavepointError as error:
                report |= {"error": str(error), "code": error.exit_code}
            os.write(tell, json.dumps(report).encode() + b"\\n")
            os.read(may_end, 1)
            os._exit(0)
    os.close(start_all), os.close(tell)
    with os.fdopen(told) as reports:
        for _ in range(directories * each):
            print(reports.readline(), end="", flush=True)
    os.close(end_all)
"""


def together(outputs: Path, directories: int, each: int, start: str) -> list[dict[str, Any]]:
    program = (
        f"{HEAD}{TOGETHER}\nmain(sys.argv[1], {directories}, {each}, lambda outputs, name: {start})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(outputs)], capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@contextmanager
def held(run_dir: Path, then: str = "") -> Iterator[subprocess.Popen[str]]:
    """Another process trains in `run_dir`."""
    program = f"{HEAD}run = Run.open(Path(sys.argv[1]))\n{then}\nprint('held', flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(run_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        try:
            yield holder
        finally:
            holder.kill()


def refused(run_dir: Path) -> bool:
    """Whether a process that starts now is refused."""
    program = f"{HEAD}Run.open(Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", program, str(run_dir)], capture_output=True, text=True
    )
    assert done.returncode in (0, 1)
    return "RunLockedError" in done.stderr


# -- started together ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "start",
    ["Run.open(Path(outputs) / name)", "Run.create(outputs, name, 'mnist')"],
    ids=["a run that is there", "a new one by its name"],
)
def test_of_each_pair_that_starts_together_one_is_refused_with_the_name_of_the_other(
    start: str, tmp_path: Path
) -> None:
    for number in range(16 if "open" in start else 0):
        (tmp_path / f"run-{number}").mkdir()
    reports = together(tmp_path, 16, 2, start)
    for number in range(16):
        pair = [report for report in reports if report["asked"] == number]
        (winner,), (loser,) = (
            [one for one in pair if bool(one["error"]) is lost] for lost in (False, True)
        )
        assert loser["code"] == 2
        assert f"held by pid {winner['pid']} on {socket.gethostname()}" in loser["error"]
        assert Path(winner["directory"]) == tmp_path / f"run-{number}"


def test_runs_without_a_name_that_start_together_get_directories_of_their_own(
    tmp_path: Path,
) -> None:
    reports = together(tmp_path, 1, 12, "Run.create(outputs, None, 'mnist')")
    assert len({report["directory"] for report in reports}) == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        Path(one["directory"]).name for one in reports
    )


@pytest.mark.slow
def test_of_whole_programs_that_start_together_one_trains_and_nothing_is_mixed(
    tmp_path: Path,
) -> None:
    for number in range(16):
        command = ["train.py", *SMALL, *into(tmp_path, f"run-{number}")]
        pair = [Program(command, tmp_path / f"said-{number}-{side}.txt") for side in "ab"]
        codes = sorted(one.wait() for one in pair)
        assert codes == [0, 2], [one.said for one in pair]
        loser = max(pair, key=Program.wait)
        assert f"on {socket.gethostname()}" in loser.said or "The run name is taken" in loser.said
        record = json.loads((tmp_path / f"run-{number}" / "run.json").read_text())
        assert len(record["starts"]) == 1
        found = CheckpointStore(tmp_path / f"run-{number}" / "checkpoints").checkpoints()
        assert {one.manifest["run_id"] for one in found} == {record["id"]}
        steps = [
            int(row["step"]) for row in rows(tmp_path / f"run-{number}") if "train/loss_step" in row
        ]
        assert steps == sorted(set(steps))


# -- a lock and its holder -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "line"),
    [
        # More than Linux counts to.
        (json.dumps({"host": "h", "pid": 2**22 + 1, "boot_id": "x"}), "pid 4194305 on h"),
        (
            json.dumps(
                {"host": "h", "pid": os.getpid(), "boot_id": "of another start of the machine"}
            ),
            f"pid {os.getpid()}",
        ),
        ("{half a", "a process that left no name"),
        ("[7]", "a process that left no name"),
        ("\udcff\x00", "a process that left no name"),
    ],
    ids=["a dead process", "another boot", "half a record", "no record", "no text"],
)
def test_a_lock_that_nobody_holds_is_taken_over_whatever_stands_in_it(
    said: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lock").write_bytes(said.encode(errors="surrogateescape"))
    run = Run.open(tmp_path)
    assert f"Taking over the lock of {line}" in capsys.readouterr().out
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    run.unlock()
    Run.open(tmp_path).unlock()
    assert capsys.readouterr().out == ""  # an empty one was given back by its holder


def test_the_lock_dies_with_its_process_though_a_forked_one_lives_on(tmp_path: Path) -> None:
    forks = f"pid = os.fork()\nif pid == 0: time.sleep({LONGER_SECS})\n(Path(sys.argv[1]) / 'worker').write_text(str(pid))"
    with held(tmp_path, forks) as holder:
        assert refused(tmp_path)
        holder.kill()
        holder.wait()
        worker = int((tmp_path / "worker").read_text())
        os.kill(worker, 0)  # it is there
        Run.open(tmp_path).unlock()
        os.kill(worker, signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_training_restarts_at_once_though_its_data_workers_live_on(tmp_path: Path) -> None:
    """A worker asks every few seconds whether its parent is there."""
    command = [
        *SMALL,
        "--data.in_memory",
        "false",
        "--data.num_workers",
        "2",
        "--trainer.max_epochs",
        "3",
    ]
    process = start("train.py", *command, *into(tmp_path),
                    "--checkpoint.save_every_steps", "1")  # fmt: skip
    wait_for_a_checkpoint(tmp_path / "run", process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(workers := children.read_text().split()) < 2:
        assert process.poll() is None
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()  # the workers hold its other end
    lived_on = [worker for worker in workers if Path(f"/proc/{worker}").exists()]
    assert not refused(tmp_path / "run")
    done = run("resume.py", str(tmp_path / "run"))
    assert lived_on
    assert done.returncode == 0, done.stdout + done.stderr


def test_who_holds_the_lock_keeps_it_whatever_it_reads_and_asks_in_the_directory(
    tmp_path: Path,
) -> None:
    """Closing any descriptor of the file would drop a POSIX lock, without a word."""
    assert call("train.py", *SMALL, *into(tmp_path), "--trainer.max_epochs", "1") == 0
    asks = """
from savepoint.resume.request import requested
from savepoint.commands import main
from savepoint.errors import RunLockedError
for take in (lambda: Run.open(Path(sys.argv[1])), lambda: requested([sys.argv[1]])):
    try:
        take()
    except RunLockedError as error:
        assert "this very process" in str(error)
    else:
        raise AssertionError
sys.stdout = sys.stderr
assert main(["verify", sys.argv[1]]) == 0
sys.stdout = sys.__stdout__
"""
    with held(tmp_path / "run", asks):
        assert refused(tmp_path / "run")


def test_a_training_holds_its_lock_to_the_end_of_its_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, seen = tmp_path / "run", []
    for hook, nth in (("training_step", 11), ("validation_step", 5), ("test_step", 2)):
        seen.append(
            send_in(
                monkeypatch,
                ImageClassifier,
                hook,
                nth=nth,
                signum=0,
                before=lambda _: refused(run_dir),
            )
        )
    assert call("train.py", *SMALL, *into(tmp_path)) == 0
    assert seen == [[True]] * 3
    assert not refused(run_dir)


# -- resume.py on a directory in use -------------------------------------------------------------


def test_a_run_that_trains_is_neither_resumed_nor_rewound_but_read_and_forked(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call("train.py", *SMALL, *into(tmp_path), "--checkpoint.keep_last", "2") == 0
    run_dir, first = tmp_path / "run", str(tmp_path / "run" / "checkpoints" / "step-00000006.ckpt")
    before = sorted(path.name for path in run_dir.rglob("*"))
    with held(run_dir) as holder:
        capfd.readouterr()
        for argv in (
            [str(run_dir)],
            [first, "--rewind"],
            [str(run_dir), "--trainer.max_epochs", "9"],
        ):
            assert call("resume.py", *argv) == 2
            assert f"held by pid {holder.pid} on {socket.gethostname()}" in capfd.readouterr().err
        assert call("train.py", *SMALL, *into(tmp_path), "--resume", "auto") == 2
        assert call("resume.py", first, "--plan") == 0
        assert call("resume.py", first, "--fork", "other", "--output_dir", str(tmp_path)) == 0
        assert refused(run_dir)
    assert sorted(path.name for path in run_dir.rglob("*")) == before
    assert latest(tmp_path / "other").step == 12


# -- a directory that does not stay --------------------------------------------------------------


@pytest.mark.parametrize("signum", [0, signal.SIGTERM], ids=["to its end", "until SIGTERM"])
def test_of_a_run_that_is_moved_while_it_trains_nothing_is_lost_and_nothing_is_made_where_it_was(
    signum: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir, moved = tmp_path / "run", tmp_path / "moved"
    send_in(
        monkeypatch,
        ImageClassifier,
        "training_step",
        nth=8,
        signum=signum,
        before=lambda _: run_dir.rename(moved),
    )
    code = call("train.py", *SMALL, *into(tmp_path))
    assert code == (143 if signum else 1)
    assert (
        f"Not the run directory that this process began in any more: {run_dir}"
        in capfd.readouterr().err
    )
    assert latest(moved).step == 6
    assert not list(tmp_path.glob("run/checkpoints/*"))
    monkeypatch.undo()
    assert call("resume.py", str(moved)) == 0
    assert latest(moved).step == 12
    assert json.loads((moved / "run.json").read_text())["starts"][-1]["reached"] == (
        7 if signum else 11
    )


def test_a_run_in_whose_place_another_lies_writes_nothing_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir, there = tmp_path / "run", dict[Path, bytes]()

    def replace(_: object) -> None:
        run_dir.rename(tmp_path / "moved")
        shutil.copytree(tmp_path / "moved", run_dir, ignore=shutil.ignore_patterns("lock"))
        there.update({file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()})

    send_in(monkeypatch, ImageClassifier, "training_step", nth=8, signum=0, before=replace)
    assert call("train.py", *SMALL, *into(tmp_path)) == 1
    assert "Not tested: Not the run directory" in capfd.readouterr().err
    assert {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()} == there


def test_a_run_whose_record_is_deleted_keeps_its_checkpoints_when_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "run" / "run.json"
    send_in(
        monkeypatch,
        ImageClassifier,
        "training_step",
        nth=8,
        signum=signal.SIGTERM,
        before=lambda _: record.unlink(),
    )
    assert call("train.py", *SMALL, *into(tmp_path)) == 143
    assert latest(tmp_path / "run").step == 8


def test_a_lock_file_that_is_deleted_is_made_anew_unless_another_process_was_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def delete(run_dir: Path, other: bool) -> None:
        (run_dir / "lock").unlink()
        if other:
            thief.enter_context(held(run_dir))

    for name, other in (("alone", False), ("second", True)):
        with ExitStack() as thief, monkeypatch.context() as patch:
            run_dir = tmp_path / name
            send_in(patch, ImageClassifier, "training_step", nth=8, signum=0,
                    before=lambda _, run_dir=run_dir, other=other: delete(run_dir, other))  # fmt: skip
            assert call("train.py", *SMALL, *into(tmp_path, name)) == (1 if other else 0)
            assert latest(run_dir).step == (6 if other else 12)
            assert ("taken over" in capfd.readouterr().err) is other
            assert refused(run_dir) is other
