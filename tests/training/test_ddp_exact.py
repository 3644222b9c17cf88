"""Three ranks and more (DDP, gloo): from each safe point a resume equals the run that was never
stopped.

From three ranks on a sum depends on where DDP has put a gradient in its buckets.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.ddp_ranks import KINDS
from support.limits import HANG_SECS
from support.ranks import TESTS, differences


def test_with_three_ranks_a_resume_equals_the_straight_run(tmp_path: Path) -> None:
    assert differences("ddp_ranks", tmp_path, 3, "plain", every=3) == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [3, 4])
def test_every_kind_of_ddp_resumes_exactly(tmp_path: Path, ranks: int, kind: str) -> None:
    assert differences("ddp_ranks", tmp_path, ranks, kind) == {}


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
