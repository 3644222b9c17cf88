"""A model in shards under torchrun: ranks are killed, torchrun starts all of them again, and the end
is that of a run that nothing disturbed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.limits import HANG_SECS
from support.programs import LITTLE_SHARDS as LITTLE
from support.programs import ROOT, into
from support.small import difference, final_state, rows
from support.torchruns import kill_a_rank

from savepoint.checkpoint import manifest


def begin(outputs: Path, name: str, restarts: int, epochs: int) -> subprocess.Popen[bytes]:
    little = [*LITTLE, "--trainer.max_epochs", str(epochs)]
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
             "--max-restarts", str(restarts), "--rdzv-id", name, "train.py", *little, "--resume", "auto"]  # fmt: skip
    apart = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with (outputs / f"{name}.txt").open("wb") as log:
        return subprocess.Popen(
            [*agent, *into(outputs, name)], cwd=ROOT, env=os.environ | apart, stdout=log, stderr=log
        )


def check_restarts(outputs: Path, times: int) -> None:
    epochs = 3 + times  # of twelve steps: more than a start makes before it is killed
    straight = begin(outputs, "straight", 0, epochs)
    assert straight.wait(HANG_SECS) == 0, (outputs / "straight.txt").read_text()
    agent = begin(outputs, "killed", times, epochs)
    killed = [kill_a_rank(agent.pid, outputs / "killed", number) for number in range(times)]
    assert agent.wait(HANG_SECS) == 0, (outputs / "killed.txt").read_text()[-5000:]
    starts = json.loads((outputs / "killed/run.json").read_text())["starts"]
    print(f"{len(starts) - 1} of {times} restarts came up; killed after {killed}")
    assert len(starts) == times + 1
    ends = [outputs / name for name in ("straight", "killed")]
    last = manifest.verify(ends[1] / "checkpoints/last.ckpt")
    assert (last["step"], len(last["shards"]), last["exact"]) == (12 * epochs, 2, True)
    assert list(difference(*map(final_state, ends))) == []
    assert rows(ends[0]) == rows(ends[1])


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 20])
def test_each_restart_comes_up_and_the_end_is_that_of_the_straight_run(
    tmp_path: Path, times: int
) -> None:
    check_restarts(tmp_path, times)
