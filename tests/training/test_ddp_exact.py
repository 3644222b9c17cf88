"""Three ranks and more (DDP, gloo): from each safe point a resume equals the run that was never
stopped.

From three ranks on a sum depends on where DDP has put a gradient in its buckets.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from support.ddp_ranks import KINDS, UNEQUAL, Zero
from support.limits import HANG_SECS
from support.ranks import TESTS, differences, run_ranks
from support.small import EveryPoint, fit, resume_differs

from savepoint.checkpoint import store


def test_with_three_ranks_a_resume_equals_the_straight_run(tmp_path: Path) -> None:
    assert differences("ddp_ranks", tmp_path, 3, "plain", every=3) == {}


@pytest.mark.parametrize("kind", UNEQUAL)
def test_weights_that_differ_from_rank_to_rank_are_named_and_of_one_rank_in_the_file(
    tmp_path: Path, kind: str
) -> None:
    """A mixture of them would be a model that no rank has had."""
    run_ranks("ddp_ranks", 2, tmp_path, 2, kind, 0)
    saved = sorted((tmp_path / "points").iterdir())[2]
    state, facts = store.load(saved)
    said = "differs from rank to rank, and the first rank's is saved: make it a buffer"
    assert (facts["exact"], facts["unsaved"]) == (False, [f"model.codes ({said})"])
    assert torch.equal(state["state_dict"]["codes"], state["state_dict"]["copy_of_codes"])


@pytest.mark.filterwarnings("ignore:.*sync_dist=True")
def test_of_states_that_ranks_share_out_a_file_holds_what_the_users_own_counts_and_no_caches(
    tmp_path: Path,
) -> None:
    def given(name: str) -> dict[str, Any]:
        points = EveryPoint(tmp_path / name, monitor=None)
        few = {"max_epochs": 1, "limit_val_batches": 0, "devices": 1}
        return {"model": Zero, "strategy": DDPStrategy(), "checkpointing": points, **few}

    straight = given("points")
    try:
        fit(tmp_path / "run", **straight)
        file = straight["checkpointing"].kept[2]
        differs = resume_differs(tmp_path / "run", file, tmp_path / "resumed", **given("again"))
    finally:
        torch.distributed.destroy_process_group()
    state, facts = store.load(file)
    places = [place for place, _ in state["attributes"]]
    assert places == [[["root", "optimizer 0.optim"], ["attr", "steps"]]]
    assert facts["exact"]
    assert differs == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [3, 4])
def test_every_kind_of_ddp_resumes_exactly(tmp_path: Path, ranks: int, kind: str) -> None:
    assert differences("ddp_ranks", tmp_path, ranks, kind) == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "shards"])
def test_eight_ranks_resume_exactly(tmp_path: Path, kind: str) -> None:
    assert differences("ddp_ranks", tmp_path, 8, kind) == {}


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
