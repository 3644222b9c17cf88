"""Signals in whole trainings: what is saved, how the process ends, and that the command it prints
goes on from there.

The signals are real, and where no other process is needed to see what one does, this one sends it
to itself: at a given call of a hook, so that it certainly falls into a step, a validation, the
start or the test.
"""

import hashlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.forked import Program
from support.limits import LONGER_SECS
from support.programs import ROOT, call, wait_for_a_checkpoint
from support.programs import SIX_AN_EPOCH as SMALL
from support.run_dirs import latest
from support.small import SmallModel, difference, final_state, fit, one_thread, rows
from support.stopping import STOPPING, handlers, send_in  # noqa: F401  (handlers is a fixture)

from project.data import ImageData
from project.model import ImageClassifier
from savepoint import preemption
from savepoint.checkpoint import store
from savepoint.checkpoint.store import CheckpointStore
from savepoint.preemption import Preempted


def of_best(run_dir: Path) -> tuple[str, int, str]:
    """The bytes of best.ckpt, the file it is, and the name of that file."""
    path, best = (
        run_dir / "checkpoints" / "best.ckpt",
        CheckpointStore(run_dir / "checkpoints").best(),
    )
    assert best is not None
    return hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_ino, best.path.name


# -- training and validation ---------------------------------------------------------------------


@pytest.mark.parametrize("signum", STOPPING)
@pytest.mark.parametrize(("hook", "nth"), [("training_step", 9), ("validation_step", 5)])
def test_a_signal_loses_no_step_leaves_the_best_as_it_is_and_the_resume_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals, hook: str, nth: int
) -> None:
    """The ninth step is in the second epoch, and so is the fifth batch of a validation: a best
    checkpoint is there.
    """
    preemption.install()
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    with one_thread():
        fit(straight)
        with monkeypatch.context() as patch:
            seen = send_in(
                patch, SmallModel, hook, nth=nth, signum=signum,
                before=lambda module: (module.global_step, of_best(stopped)),
            )  # fmt: skip
            with pytest.raises(Preempted) as left:
                fit(stopped)
        (step, best), saved = seen[0], latest(stopped)
        assert left.value.code == 128 + signum
        # The step that it fell into was ended and saved.
        assert saved.step == step + (hook == "training_step")
        assert saved.manifest["reason"] == f"signal {int(signum)}"
        assert saved.manifest["at"] == ("batch" if hook == "training_step" else "validation")
        assert of_best(stopped) == best
        fit(stopped, ckpt_path=saved.path, keep_rows=store.load(saved.path)[0]["logged_rows"])
    assert list(difference(final_state(straight), final_state(stopped))) == []
    assert rows(straight) == rows(stopped)


def test_the_printed_command_is_the_one_in_the_run_directory_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "it's stopped"
    with monkeypatch.context() as patch:
        send_in(patch, ImageClassifier, "training_step", nth=9, signum=signal.SIGHUP)
        assert (
            call("train.py", *SMALL, "--output_dir", str(tmp_path), "--run_name", run_dir.name)
            == 129
        )
    said = capfd.readouterr()
    assert "Saved at step 9. Continue with: " in said.out  # and nothing of lost steps
    assert said.err.splitlines() == [
        "SIGHUP: saving at the next step, then leaving. A second one leaves at once.",
        "Stopped by SIGHUP.",
    ]
    printed = re.findall("Continue with: (.*)", said.out)[0]
    assert (run_dir / "RESUME.txt").read_text() == f"{printed}\n"
    python, script, *argv = shlex.split(printed)
    assert (Path(python).name, Path(script).name) == ("python", "resume.py")
    assert call("resume.py", *argv) == 0
    assert latest(run_dir).step == 12
    assert not (run_dir / "RESUME.txt").exists()


def test_the_signal_to_save_in_a_validation_saves_and_changes_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    preemption.install()
    with one_thread():
        fit(tmp_path / "straight")
        capsys.readouterr()
        send_in(monkeypatch, SmallModel, "validation_step", nth=5, signum=signal.SIGUSR1)
        fit(tmp_path / "asked")
    assert re.findall("(.*?): .*saved step-00000012", capsys.readouterr().out) == [
        "step 12",
        "epoch 2",
    ]
    assert (
        list(difference(final_state(tmp_path / "straight"), final_state(tmp_path / "asked"))) == []
    )
    assert rows(tmp_path / "straight") == rows(tmp_path / "asked")


# -- before and after ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "hook"),
    [
        (ImageData, "setup"),
        (ImageClassifier, "configure_optimizers"),
        (ImageClassifier, "validation_step"),  # Lightning's look at the validation before it trains
        (preemption, "arm"),
    ],
    ids=lambda one: getattr(one, "__name__", one),
)
def test_a_signal_before_the_first_step_leaves_with_its_code_and_nothing_half_made(
    owner: Any, hook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*SMALL, "--output_dir", str(tmp_path), "--run_name", "early"]
    with monkeypatch.context() as patch:
        if owner is preemption:
            arm = preemption.arm
            patch.setattr(preemption, "arm", lambda: (os.kill(os.getpid(), signal.SIGTERM), arm()))
        else:
            send_in(patch, owner, hook, nth=1, signum=signal.SIGTERM)
        assert call("train.py", *command) == 143
    assert list(tmp_path.iterdir()) == []


def test_a_signal_in_the_test_after_the_training_ends_the_process_and_a_resume_makes_the_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call("train.py", *SMALL, "--output_dir", str(tmp_path), "--run_name", "straight") == 0
    capfd.readouterr()
    run_dir = tmp_path / "tested"
    training = ["train.py", *SMALL, "--output_dir", str(tmp_path), "--run_name", "tested"]
    for command in (training, ["resume.py", str(run_dir)]):
        with monkeypatch.context() as patch:
            send_in(patch, ImageClassifier, "test_step", nth=2, signum=signal.SIGTERM)
            assert call(*command) == 143
        said = capfd.readouterr()
        assert "Saved at step 12. Continue with: " in said.out
        assert said.err == "Stopped by SIGTERM.\n"
        assert not (run_dir / "summary.json").exists()
    assert call("resume.py", str(run_dir)) == 0
    assert (run_dir / "summary.json").exists()
    # The test's figures at the step that it tested.
    assert rows(tmp_path / "straight") == rows(run_dir)
    assert "training from step" not in capfd.readouterr().out


# -- the handlers --------------------------------------------------------------------------------

OURS = {**dict.fromkeys(STOPPING, preemption._on_stop), signal.SIGUSR1: preemption._on_save}


def now() -> dict[signal.Signals, Any]:
    return {signum: signal.getsignal(signum) for signum in OURS}


@pytest.mark.parametrize("installed", [True, False], ids=["in a program", "in a notebook"])
def test_while_it_trains_the_handlers_are_ours_and_afterwards_those_from_before(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for signum in OURS:
        signal.signal(signum, signal.SIG_DFL)
    if installed:
        preemption.install()
    before, seen = now(), []
    original = SmallModel.training_step
    monkeypatch.setattr(
        SmallModel, "training_step", lambda *args: (seen.append(now()), original(*args))[1]
    )
    fit(tmp_path, max_epochs=1)
    assert seen == [OURS] * 6
    assert now() == before
    assert (before == OURS) is installed


@pytest.mark.parametrize("signum", OURS)
def test_a_signal_that_was_ignored_at_the_start_is_ignored_by_the_training_too(
    signum: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning puts its handler even where a signal was ignored."""
    signal.signal(signum, signal.SIG_IGN)
    preemption.install()
    send_in(monkeypatch, SmallModel, "training_step", nth=2, signum=signum)
    fit(tmp_path, max_epochs=1)
    assert latest(tmp_path).manifest["reason"] == "end"
    assert len(CheckpointStore(tmp_path / "checkpoints").checkpoints()) == 1
    assert signal.getsignal(signum) is signal.SIG_IGN


def test_what_stopped_one_training_does_not_stop_the_next_of_the_same_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        send_in(patch, SmallModel, "training_step", nth=2, signum=signal.SIGINT)
        with pytest.raises(Preempted):
            fit(tmp_path)
    saved = latest(tmp_path)
    assert saved.step == 2
    fit(tmp_path, ckpt_path=saved.path, keep_rows=store.load(saved.path)[0]["logged_rows"])
    assert latest(tmp_path).step == 18


# -- processes of their own ----------------------------------------------------------------------


def with_a_validation_that_takes_an_hour() -> None:
    original = ImageClassifier.validation_step

    def slow(self: ImageClassifier, *args: Any) -> None:
        if self.global_step == 12:
            (Path(self.trainer.default_root_dir) / "slow").touch()
            time.sleep(LONGER_SECS)
        original(self, *args)

    ImageClassifier.validation_step = slow  # type: ignore[method-assign]


def test_a_second_signal_leaves_at_once_and_the_last_checkpoint_is_whole(tmp_path: Path) -> None:
    command = ["train.py", *SMALL, "--output_dir", str(tmp_path), "--run_name", "hurry"]
    process = Program(command, tmp_path / "said.txt", with_a_validation_that_takes_an_hour)
    process.wait_for((tmp_path / "hurry" / "slow").exists)
    process.signal(signal.SIGTERM)
    time.sleep(preemption.SAME_SECS + 0.1)
    assert process.runs
    process.signal(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM, process.said
    assert latest(tmp_path / "hurry").step == 6
    assert store.load(latest(tmp_path / "hurry").path)[0]["global_step"] == 6
    assert call("resume.py", str(tmp_path / "hurry")) == 0


@pytest.mark.slow
@pytest.mark.parametrize("place", ["the repository", "elsewhere"])
def test_the_command_goes_on_as_it_is_printed_where_it_is_printed(
    place: str, tmp_path: Path
) -> None:
    """Pasted into the shell that started the run, whichever Python is the first on its PATH."""
    where = ROOT if place == "the repository" else tmp_path
    little = [word if word != SMALL[1] else str(ROOT / word) for word in SMALL]
    command = [
        *little,
        "--config",
        str(ROOT / "configs" / "mnist.yaml"),
        "--output_dir",
        str(tmp_path / "my runs"),
    ]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *command, "--run_name", "run", "--trainer.max_epochs", "9"],
        cwd=where, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wait_for_a_checkpoint(tmp_path / "my runs" / "run", process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    assert process.returncode == 143, said
    printed = re.findall("Continue with: (.*)", said)[0]
    done = subprocess.run(printed, shell=True, cwd=where, capture_output=True, text=True)
    assert done.returncode == 0, (printed, done.stderr)


@pytest.mark.slow
def test_a_background_job_under_nohup_trains_on_when_the_terminal_closes(tmp_path: Path) -> None:
    command = shlex.join(
        [sys.executable, "train.py", *SMALL, "--output_dir", str(tmp_path), "--run_name", "left"]
    )
    script = f"nohup {command} --trainer.max_epochs 40 & echo $!; wait $!; exit $?"
    with subprocess.Popen(["sh", "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}) as shell:  # fmt: skip
        assert shell.stdout is not None
        pid = int(shell.stdout.readline())
        while not list((tmp_path / "left").glob("checkpoints/step-*")):
            time.sleep(0.02)
        for signum in (signal.SIGHUP, signal.SIGINT):
            os.kill(pid, signum)
        said = shell.communicate()[0]
    assert shell.returncode == 0, said
    assert latest(tmp_path / "left").epoch == 40


@pytest.mark.slow
def test_a_signal_at_any_time_of_the_start_leaves_nothing_that_cannot_be_started_again(
    tmp_path: Path,
) -> None:
    """The real program, imports and all: at sixteen moments up to its first steps."""
    command = ["train.py", *SMALL, "--trainer.max_epochs", "40", "--output_dir", str(tmp_path)]

    def begin(name: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *command, "--run_name", name], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    began, process = time.monotonic(), begin("whole")
    while not (tmp_path / "whole" / "run.json").exists():
        time.sleep(0.01)
    needed = time.monotonic() - began
    assert process.communicate()[1] == ""
    codes, left = [], []
    for nth in range(16):
        process = begin(f"early-{nth}")
        time.sleep(needed * (nth + 0.5) / 15)
        process.send_signal(signal.SIGTERM)
        assert "Traceback" not in process.communicate()[1]
        codes.append(process.returncode)
        if (tmp_path / f"early-{nth}").exists():
            left.append(nth)
    print(f"exit codes {codes}, begun and left as they are {left}")
    assert set(codes) <= {143, -signal.SIGTERM}  # the latter before the first line of ours
    for nth in left:
        assert call(*command, "--run_name", f"early-{nth}", "--resume", "auto") == 0
