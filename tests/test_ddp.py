"""Two processes (DDP, gloo): stopped, killed and resumed, they end as two that were never stopped."""

import signal
from pathlib import Path

import pytest
from small import difference, final_state, rows
from test_entry_points import SMALL, run, start, wait_for_a_checkpoint

from savepoint.checkpoint import store

pytestmark = pytest.mark.slow

# ClassicNet has dropout: each rank draws from its own generator.
PLAIN = [word for pair in zip(SMALL[::2], SMALL[1::2], strict=True) if "width" not in pair[0] for word in pair]
TWO = [
    *PLAIN,
    "--model.net",
    "ClassicNet",
    "--trainer.accelerator",
    "cpu",
    "--trainer.devices",
    "2",
    "--trainer.strategy",
    "ddp",
]


def test_both_ranks_resume_exactly_after_a_signal_and_after_a_kill(tmp_path: Path) -> None:
    out = ["--output_dir", str(tmp_path)]
    done = run("train.py", *TWO, *out, "--run_name", "straight")
    assert done.returncode == 0, done.stderr
    straight = final_state(tmp_path / "straight")
    assert len(straight["other_ranks"]) == 1
    for signum in (signal.SIGTERM, signal.SIGKILL):
        name = signum.name
        process = start("train.py", *TWO, *out, "--run_name", name,
                        "--checkpoint.save_every_steps", "2")  # fmt: skip
        wait_for_a_checkpoint(tmp_path / name, process)
        process.send_signal(signum)
        said = process.communicate()[0]
        assert process.returncode == (-9 if signum == signal.SIGKILL else 143), said
        done = run("resume.py", str(tmp_path / name))
        assert done.returncode == 0, done.stdout + done.stderr
        assert list(difference(straight | {"config": ""}, final_state(tmp_path / name) | {"config": ""})) == []
        assert rows(tmp_path / "straight") == rows(tmp_path / name)
        assert store.CheckpointStore(tmp_path / name / "checkpoints").rejected() == []


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    done = run("train.py", *TWO, "--output_dir", str(tmp_path), "--run_name", "two", "--trainer.max_epochs", "1")
    assert done.returncode == 0, done.stderr
    done = run("resume.py", str(tmp_path / "two"), "--trainer.devices", "1", "--trainer.max_epochs", "2")
    assert done.returncode == 2
    assert "Another number of processes: 1" in done.stderr
