"""Under SLURM: a job that is requeued goes on with its run by the same command, and Lightning's own
requeueing stays out.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.plugins.environments import SLURMEnvironment
from support.programs import ROOT, call, into, start, wait_for_a_checkpoint
from support.programs import SIX_AN_EPOCH as SMALL
from support.programs import TWO_RANKS as TWO
from support.run_dirs import latest
from support.small import difference, final_state, rows
from support.stopping import handlers, send_in  # noqa: F401  (handlers is a fixture)

from project.model import ImageClassifier
from savepoint.config import typed
from savepoint.errors import ConfigError
from savepoint.resume import plan, request
from savepoint.run import default_name
from savepoint.training import build

# What `srun` gives to the one task of a job.
TASK = {
    "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "1",
    "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost",
}  # fmt: skip


# What a run of that job is called where no name is given.
NAME = "mnist-4711"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of one task, with the cluster's commands. Returns the file in which they would say that
    they were called.
    """
    programs, called = tmp_path / "bin", tmp_path / "called.txt"
    programs.mkdir()
    for name in ("scontrol", "srun"):
        (programs / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {called}\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    return called


def test_a_requeued_job_goes_on_by_the_same_command_and_ends_as_if_nothing_had_happened(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """SIGUSR1 is what Lightning takes for "save within the handler and call scontrol"."""
    out, run_dir = ["--output_dir", str(tmp_path / "outputs")], tmp_path / "outputs" / NAME
    assert call("train.py", *SMALL, *into(tmp_path, "straight")) == 0
    with monkeypatch.context() as patch:
        environment = send_in(
            patch, ImageClassifier, "training_step", nth=3, signum=signal.SIGUSR1,
            before=lambda module: type(module.trainer._accelerator_connector.cluster_environment),
        )  # fmt: skip
        send_in(patch, ImageClassifier, "training_step", nth=9, signum=signal.SIGTERM)
        assert call("train.py", *SMALL, *out) == 143
    assert environment == [SLURMEnvironment]
    said = capfd.readouterr().out
    assert "step 3: saved step-00000003.ckpt" in said
    assert "Saved at step 9." in said
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert call("train.py", *SMALL, *out) == 0
    assert [path.name for path in run_dir.parent.iterdir()] == [NAME]
    assert list(difference(final_state(tmp_path / "straight"), final_state(run_dir))) == []
    assert rows(tmp_path / "straight") == rows(run_dir)
    assert call("train.py", *SMALL, *out) == 0  # requeued once more, with nothing left to do
    assert "Finished" in capfd.readouterr().out
    assert not job.exists()
    assert not list(tmp_path.rglob("hpc_ckpt*"))


@pytest.mark.slow
def test_the_two_tasks_of_a_job_that_is_requeued_go_on_together(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `srun` does it: it starts both by the same command, sends a signal to both and takes the
    highest exit code.
    """
    outputs, run_dir = tmp_path / "outputs", tmp_path / "outputs" / NAME
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")

    def srun(output_dir: Path) -> list[subprocess.Popen[str]]:
        tasks = []
        for number in "01":
            monkeypatch.setenv("SLURM_PROCID", number)
            monkeypatch.setenv("SLURM_LOCALID", number)
            tasks.append(start("train.py", *TWO, "--output_dir", str(output_dir)))
        return tasks

    def codes(tasks: list[subprocess.Popen[str]]) -> list[int]:
        for task in tasks:
            task.communicate()
        return [task.returncode for task in tasks]

    assert codes(srun(tmp_path / "straight")) == [0, 0]
    tasks = srun(outputs)
    wait_for_a_checkpoint(run_dir, tasks[0])
    for task in tasks:
        task.send_signal(signal.SIGTERM)
    assert max(codes(tasks)) == 143
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert codes(srun(outputs)) == [0, 0]
    assert [path.name for path in outputs.iterdir()] == [NAME]
    assert list(difference(final_state(tmp_path / "straight" / NAME), final_state(run_dir))) == []
    assert rows(tmp_path / "straight" / NAME) == rows(run_dir)
    assert not job.exists()


def test_the_tasks_of_an_array_have_runs_of_their_own(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a job id of its own; the last one's is that of the array."""
    names = set()
    for task, job_id in ((1, "101"), (2, "102"), (3, "100")):
        for key, value in (
            ("ARRAY_JOB_ID", "100"),
            ("ARRAY_TASK_ID", str(task)),
            ("JOB_ID", job_id),
        ):
            monkeypatch.setenv(f"SLURM_{key}", value)
        names.add(default_name("mnist"))
    assert len(names) == 3


def test_a_job_that_was_requeued_before_its_first_checkpoint_begins_in_the_same_directory(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    (tmp_path / "outputs" / NAME).mkdir(parents=True)
    assert (
        call(
            "train.py",
            *SMALL,
            "--output_dir",
            str(tmp_path / "outputs"),
            "--trainer.max_epochs",
            "1",
        )
        == 0
    )
    assert latest(tmp_path / "outputs" / NAME).step == 6


@pytest.mark.parametrize(
    ("resume", "restarts", "runs"),
    [
        ([], "", 2),  # another job, to which the cluster gave the same number
        ([], "0", 2),
        ([], "1", 1),
        (["--resume", "never"], "1", 2),
        (["--resume", "auto"], "", 1),
    ],
)
def test_what_the_command_says_about_resuming_counts_more_than_what_slurm_says(
    resume: list[str],
    restarts: str,
    runs: int,
    job: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    outputs = tmp_path / "outputs"
    (outputs / NAME).mkdir(parents=True)
    with monkeypatch.context() as patch:
        send_in(patch, ImageClassifier, "training_step", nth=1, signum=signal.SIGTERM)
        assert call("train.py", *SMALL, "--output_dir", str(outputs), *resume) == 143
    assert sorted(path.name for path in outputs.iterdir()) == [NAME, f"{NAME}-2"][:runs]


def test_a_requeued_job_that_had_several_runs_is_asked_for_their_names(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two times `srun python train.py` in one script: without a name, both would go on with the
    first one's run.
    """
    for name in (NAME, f"{NAME}-2"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert call("train.py", *SMALL, "--output_dir", str(tmp_path)) == 2
    assert (
        f"{NAME} and {NAME}-2. Every start must find the same run. Give --run_name NAME."
        in capfd.readouterr().err
    )


def test_a_fork_with_a_name_that_a_requeued_job_began_goes_on(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("train.py", *SMALL, *into(tmp_path), "--trainer.max_epochs", "1") == 0
    command = [
        str(tmp_path / "run"),
        "--fork",
        "second",
        "--output_dir",
        str(tmp_path),
        "--trainer.max_epochs",
        "2",
    ]
    for signum, code in ((signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        with monkeypatch.context() as patch:
            send_in(patch, ImageClassifier, "training_step", nth=2, signum=signum)
            assert call("resume.py", *command) == code
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert latest(tmp_path / "second").step == 6 + 2 + 2
    assert latest(tmp_path / "run").step == 6


def test_a_config_that_says_never_as_older_checkpoints_do_is_resumed() -> None:
    now = typed.dump(build.portable(typed.parse([])))
    older = now.replace("resume: null", "resume: never")
    assert older != now
    assert plan.differences(typed.dump(typed.parse([], base=older)), now) == {}


@pytest.mark.parametrize("flag", ["--rewind", "--fork"])
def test_what_a_requeued_job_would_do_a_second_time_is_refused(
    flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(ConfigError, match=f"^{flag} in a job that SLURM requeued"):
        request.requested(["outputs/run", flag])


@pytest.mark.parametrize("code", [0, 1, 2, 143])
def test_the_batch_script_requeues_only_what_was_stopped(
    code: int, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    srun = job.parent / "bin" / "srun"
    srun.write_text(f'#!/bin/sh\necho "$@" >> {job}\nexit {code}\n')
    monkeypatch.setenv("SLURM_NNODES", "2")
    script = ["bash", "configs/cluster/slurm.sh", "--run_name", "a b"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, "")
    started = "python train.py --trainer.num_nodes 2 --trainer.devices 1 --run_name a b"
    requeued = ["scontrol requeue 4711"] if code == 143 else []
    assert job.read_text().splitlines() == [started, *requeued]


OUT_OF_TIME = """#!/bin/sh
"$@" & task=$!
while kill -0 $task 2>/dev/null && ! [ -e "$STOP" ]; do sleep 0.05; done
[ -e "$STOP" ] && kill -TERM $task
wait $task
"""


@pytest.mark.slow
def test_a_job_that_the_batch_script_requeues_ends_as_if_nothing_had_happened(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice out of time: SLURM sends SIGTERM to what `srun` has started."""
    srun = job.parent / "bin" / "srun"
    srun.write_text(OUT_OF_TIME)
    monkeypatch.setenv(
        "PATH", f"{job.parent}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    words = [*SMALL, "--checkpoint.save_every_steps", "1", "--checkpoint.keep_last", "99"]

    def batch(outputs: str, restart: int = 0, stop: str = "never") -> int:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        monkeypatch.setenv("STOP", f"{tmp_path}/{outputs}/{NAME}/checkpoints/{stop}")
        script = ["bash", "configs/cluster/slurm.sh", *words, "--output_dir", tmp_path / outputs]
        return subprocess.run(script, cwd=ROOT).returncode

    assert batch("straight") == 0
    assert batch("outputs", 0, "step-00000002.ckpt") == 143
    assert batch("outputs", 1, "step-00000007.ckpt") == 143
    assert batch("outputs", 2) == 0
    assert job.read_text() == "scontrol requeue 4711\n" * 2
    straight, requeued = (tmp_path / outputs / NAME for outputs in ("straight", "outputs"))
    assert list(difference(final_state(straight), final_state(requeued))) == []
    assert rows(straight) == rows(requeued)
