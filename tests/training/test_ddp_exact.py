"""Three ranks and more (DDP, gloo): from each safe point a resume equals the run that was never
stopped.

From three ranks on a sum depends on where DDP has put a gradient in its buckets.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.ddp_ranks import KINDS
from support.limits import HANG_SECS
from support.programs import ROOT

TESTS = {"PYTHONPATH": str(ROOT / "tests")}


def differences(directory: Path, ranks: int, kind: str, every: int = 1) -> dict[str, list[str]]:
    """By safe point, what is different at the end of a resume from there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "OMP_NUM_THREADS": "1",
        }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "support.ddp_ranks", str(directory), str(ranks), kind, str(every)],
            env=os.environ | TESTS | address | {"LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    said = [process.communicate(timeout=HANG_SECS)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(said)
    found: dict[str, list[str]] = json.loads((directory / "found.json").read_text())
    assert len(found) >= 4
    return {point: what for point, what in found.items() if what}


def test_with_three_ranks_a_resume_equals_the_straight_run(tmp_path: Path) -> None:
    assert differences(tmp_path, 3, "plain", every=3) == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [3, 4])
def test_every_kind_of_ddp_resumes_exactly(tmp_path: Path, ranks: int, kind: str) -> None:
    assert differences(tmp_path, ranks, kind) == {}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_launchers_that_make_their_own_processes_train_and_resume(
    tmp_path: Path, strategy: str
) -> None:
    command = [sys.executable, "-m", "support.spawned", strategy, str(tmp_path)]
    done = subprocess.run(
        command,
        env=os.environ | TESTS | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANG_SECS,
    )
    assert done.returncode == 0, done.stderr[-2000:]
