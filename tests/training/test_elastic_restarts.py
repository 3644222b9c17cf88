"""Processes come and go, under torchrun: each step sees the samples of the straight run, and with
the tree the bits are the same.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.limits import HANG_SECS
from support.programs import PLAIN, ROOT, run
from support.recording import recorded
from support.small import difference, final_state

from savepoint.checkpoint import manifest, store

pytestmark = pytest.mark.slow

# Two epochs of eight steps; 8 batches of 8 to a step.
COMMAND = [
    *PLAIN, "--trainer.limit_train_batches", "8", "--trainer.max_epochs", "2", "--model.net", "ClassicNet",
    "--trainer.accelerator", "cpu", "--data.batch_size", "8", "--data.global_batch_size", "64",
    "--checkpoint.save_every_steps", "1", "--checkpoint.keep_last", "99", "--resume", "auto",
]  # fmt: skip


def arguments(outputs: Path, name: str, strategy: str) -> list[str]:
    into = outputs / f"seen-{name}"
    into.mkdir(exist_ok=True)
    recording = f"{{class_path: support.recording.Recording, init_args: {{into: {into}}}}}"
    return [
        *COMMAND, "--output_dir", str(outputs), "--run_name", name, "--trainer.strategy", strategy,
        "--trainer.callbacks+", recording,
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def find_support(monkeypatch: pytest.MonkeyPatch) -> None:
    path = [str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


def torchrun(processes: int, *options: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--rdzv-id", "elastic"]
    return [*launcher, "--nproc-per-node", str(processes), *(options or ["--standalone"])]


@pytest.mark.parametrize("strategy", ["ddp", "elastic_ddp"])
def test_four_then_two_then_one_then_four_processes_see_what_one_run_sees(
    tmp_path: Path, strategy: str
) -> None:
    done = run("train.py", *arguments(tmp_path, "straight", strategy))
    assert done.returncode == 0, done.stderr
    for start, (processes, dies_at) in enumerate([(4, 3), (2, 6), (1, 11), (4, -1)]):
        done = subprocess.run(
            [*torchrun(processes), str(ROOT / "train.py"), *arguments(tmp_path, "killed", strategy)],
            cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECS,
            env=os.environ | {"START": str(start), "DIES_AT": str(dies_at)},
        )  # fmt: skip
        said = done.stdout + done.stderr
        assert (done.returncode == 0) == (dies_at < 0), said
    straight = recorded(tmp_path / "seen-straight")
    killed = recorded(tmp_path / "seen-killed")
    assert killed == straight
    assert len(straight) == 16
    ends = [final_state(tmp_path / name) for name in ("straight", "killed")]
    differs = [*difference(ends[0]["state_dict"], ends[1]["state_dict"])]
    differs += [*difference(ends[0]["optimizer_states"], ends[1]["optimizer_states"])]
    facts = manifest.read(tmp_path / "killed" / "checkpoints" / "last.ckpt")
    assert facts["exact"] == (strategy == "elastic_ddp")
    if strategy == "elastic_ddp":
        assert differs == []
    else:
        assert differs != []
        changed = manifest.read(tmp_path / "killed" / "checkpoints" / "step-00000004.ckpt")
        assert not changed["exact"]
        assert "other bits" in changed["unsaved"][0]


def test_a_host_that_is_gone_leaves_the_rest_to_the_others(tmp_path: Path) -> None:
    """Two agents of torchrun with two processes each, of which one is killed with all it started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    done = run("train.py", *arguments(tmp_path, "straight", "elastic_ddp"))
    assert done.returncode == 0, done.stderr
    hosts = []
    for host in range(2):
        wanted = ["--nnodes", "1:2", "--rdzv-backend", "c10d", "--rdzv-endpoint", place]
        timeouts = "join_timeout=300,last_call_timeout=20"
        wanted += ["--max-restarts", "3", "--rdzv-conf", f"is_host={int(host == 0)},{timeouts}"]
        command = [*arguments(tmp_path, "shared", "elastic_ddp"), "--trainer.devices", "2"]
        hosts.append(
            subprocess.Popen(
                [*torchrun(2, *wanted), str(ROOT / "train.py"), *command],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    checkpoints = tmp_path / "shared" / "checkpoints"
    until = time.monotonic() + HANG_SECS
    while len(list(checkpoints.glob("step-*.ckpt"))) < 3:
        assert time.monotonic() < until
        time.sleep(0.05)
    # torchrun starts its workers in sessions of their own.
    agent = hosts[1].pid
    workers = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    for pid in [agent, *map(int, workers)]:
        os.kill(pid, signal.SIGKILL)
    hosts[1].communicate(timeout=HANG_SECS)
    said = hosts[0].communicate(timeout=HANG_SECS)[0]
    assert hosts[0].returncode == 0, said
    worlds = {store.load(file)[1]["world_size"] for file in checkpoints.glob("step-*.ckpt")}
    assert worlds == {4, 2}
    ends = [final_state(tmp_path / name)["state_dict"] for name in ("straight", "shared")]
    assert [*difference(*ends)] == []
