"""The real programs, as processes: what they print, how they end, what they leave behind.

Where the start itself is not what is asked, a process is forked from one that has imported all.
"""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import forked
from support.forked import Program
from support.programs import ROOT, into
from support.programs import TWELVE_AN_EPOCH as SMALL
from support.small import difference, final_state, rows


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    outputs = tmp_path_factory.mktemp("outputs")
    code, said = forked.run(["train.py", *SMALL, *into(outputs, "straight")], outputs / "said.txt")
    assert code == 0, said
    return outputs / "straight"


def test_a_run_leaves_what_the_readme_names(straight: Path) -> None:
    summary = json.loads((straight / "summary.json").read_text())
    for key in ("test/accuracy", "best_accuracy", "best_step", "epochs", "steps", "fit_secs", "wall_secs",
                "samples_per_sec", "dataset", "parameters"):  # fmt: skip
        assert summary[key] is not None, key
    assert summary["epochs"] == 3
    assert summary["dataset"] == "embedded digits"
    record = json.loads((straight / "run.json").read_text())
    assert len(record["starts"]) == 1
    assert (straight / "config.yaml").exists()
    assert list(straight.glob("events.out.tfevents.*"))
    names = {path.name for path in (straight / "checkpoints").iterdir()}
    assert {"last.ckpt", "best.ckpt"} <= names
    assert not list(straight.rglob("*.tmp*"))


@pytest.mark.parametrize(
    "signum",
    [
        signal.SIGTERM,
        signal.SIGINT,
        signal.SIGKILL,
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_that_is_resumed_equals_the_straight_one(
    straight: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    run_dir, log = tmp_path / "stopped", tmp_path / "said.txt"
    command = ["train.py", *SMALL, *into(tmp_path, "stopped"), "--checkpoint.save_every_steps", "2"]
    with Program(command, log) as process:
        process.wait_for(lambda: list((run_dir / "checkpoints").glob("step-*.ckpt")))
        process.signal(signum)
        code = process.wait()
    assert code == (-9 if signum == signal.SIGKILL else 128 + signum), process.said
    if signum != signal.SIGKILL:
        assert f"python resume.py {run_dir}" in process.said
        assert (run_dir / "RESUME.txt").exists()
    assert forked.run(["resume.py", str(run_dir)], log)[0] == 0, log.read_text()
    one, other = (final_state(run) | {"config": ""} for run in (straight, run_dir))
    assert list(difference(one, other)) == []
    assert rows(straight) == rows(run_dir)
    resumed = json.loads((run_dir / "run.json").read_text())["starts"][-1]
    assert resumed["took_over"] == (
        f"pid {process.pid} on {socket.gethostname()}" if signum == signal.SIGKILL else None
    )


def test_a_signal_to_save_saves_and_the_run_goes_on(straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "asked"
    saving = ["--checkpoint.save_every_steps", "1000", "--checkpoint.keep_last", "9"]
    command = ["train.py", *SMALL, *into(tmp_path, "asked"), *saving]
    with Program(command, tmp_path / "said.txt") as process:
        process.wait_for(lambda: (run_dir / "config.yaml").exists())  # training begins
        time.sleep(0.2)
        process.signal(signal.SIGUSR1)
        (run_dir / "save-now").touch()
        assert process.wait() == 0, process.said
    assert not (run_dir / "save-now").exists()
    steps = [int(path.name[5:13]) for path in (run_dir / "checkpoints").glob("step-*")]
    assert any(step % 10 for step in steps), process.said
    assert rows(straight) == rows(run_dir)


def test_a_finished_run_says_so_and_trains_longer_when_asked(
    straight: Path, tmp_path: Path
) -> None:
    code, said = forked.run(["resume.py", str(straight)], tmp_path / "said.txt")
    assert code == 0
    assert "ended by max_epochs" in said
    assert "--trainer.max_epochs" in said
    before = len(rows(straight))
    code, said = forked.run(
        ["resume.py", str(straight), "--trainer.max_epochs", "4"], tmp_path / "said.txt"
    )
    assert code == 0, said
    assert "learning rate at step" in said
    assert json.loads((straight / "summary.json").read_text())["epochs"] == 4
    steps = [int(row["step"]) for row in rows(straight) if "train/loss_step" in row]
    assert steps == sorted(set(steps))
    assert len(rows(straight)) > before
    assert len(json.loads((straight / "run.json").read_text())["starts"]) == 2


def test_the_code_of_another_copy_is_refused(tmp_path: Path) -> None:
    shutil.copy(ROOT / "train.py", tmp_path)
    done = subprocess.run(
        [sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "another copy's code" in done.stderr
    assert len(done.stderr.splitlines()) <= 5


def test_a_project_in_an_environment_that_others_share_runs_its_own_code(tmp_path: Path) -> None:
    own = tmp_path / "src/project/__init__.py"
    own.parent.mkdir(parents=True)
    own.touch()
    body = "def main(argv):\n    import project\n    print(project.__file__)\n    return 0\n"
    program = tmp_path / "program.py"
    program.write_text(f"from savepoint import entry\n{body}entry.run(main, __file__)\n")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{own}\n", "")


def test_a_command_refuses_the_library_of_another_copy(tmp_path: Path) -> None:
    (tmp_path / "src/savepoint").mkdir(parents=True)
    (tmp_path / "resume.py").touch()
    command = [sys.executable, "-m", "savepoint", "ls"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "another copy's code" in done.stderr
    assert len(done.stderr.splitlines()) <= 5


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("train.py", ["--model.lrr", "1"], "lrr"),
        ("train.py", ["--trainer.max_epoch", "1"], "max_epochs"),
        ("train.py", ["--config", "configs/minst.yaml"], "mnist.yaml"),
        ("train.py", ["--model.lr", "fast"], "model.lr"),
        ("train.py", ["--data.root", "/nowhere", "--data.download", "false"], "/nowhere"),
        ("train.py", ["--output_dir", "/dev/null/x"], "/dev/null/x"),
        ("train.py", ["--data.batch_size", "0"], "data.batch_size is 0"),
        ("resume.py", ["outputs/no-such-run"], "outputs/no-such-run"),
    ],
)
def test_bad_input_is_one_to_five_lines_that_name_it_and_leaves_nothing(
    script: str, arguments: list[str], said: str, tmp_path: Path
) -> None:
    out = [] if "--output_dir" in arguments else ["--output_dir", str(tmp_path / "out")]
    code, stderr = forked.run([script, *arguments, *out], tmp_path / "said.txt")
    assert code == 2, stderr
    assert said in stderr
    assert 1 <= len(stderr.splitlines()) <= 5
    assert "Traceback" not in stderr
    assert not list((tmp_path / "out").glob("*"))
