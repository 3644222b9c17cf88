"""A model that is spread over ranks (FSDP2, gloo): from each safe point a resume equals the run
that was never stopped, and any number of ranks goes on from what another has saved.
"""

import shutil
from pathlib import Path

import pytest
import torch
from support.ranks import differences, run_ranks
from support.sharded_ranks import KINDS

from savepoint.checkpoint import store
from savepoint.checkpoint.format import fingerprint


def test_with_two_ranks_a_resume_from_shards_equals_the_straight_run(tmp_path: Path) -> None:
    assert differences("sharded_ranks", tmp_path, 2, "plain", every=5) == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_kind_of_sharded_training_resumes_exactly(
    tmp_path: Path, ranks: int, kind: str
) -> None:
    assert differences("sharded_ranks", tmp_path, ranks, kind) == {}


@pytest.mark.slow
def test_any_number_of_ranks_loads_what_any_other_has_saved(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    for ranks in (1, 2, 4):
        work = tmp_path / str(ranks)
        run_ranks("sharded_ranks", ranks, work, ranks, "plain", 6)
        kept = sorted(path for path in (work / "points").iterdir() if "-batch-" in path.name)
        shutil.copytree(kept[-1], tmp_path / "saved" / f"by-{ranks}.ckpt")
    for ranks in (1, 2, 4):
        run_ranks("sharded_ranks", ranks, tmp_path, ranks, "load", 1)
        for file in (tmp_path / "saved").iterdir():
            state, facts = store.load(file)
            loaded = torch.load(tmp_path / f"{file.stem}-on-{ranks}.pt", weights_only=True)
            assert len(facts["shards"]) == int(file.stem[-1])
            for key in ("state_dict", "optimizer_states"):
                assert fingerprint(loaded[key]) == fingerprint(state[key]), (file.name, ranks)
