"""Whole runs of train.py whose model is spread over two ranks, and what can be done with them."""

from pathlib import Path

import pytest
from support.checkpoint_files import names
from support.programs import LITTLE_SHARDS as LITTLE
from support.programs import into, run
from support.run_dirs import say
from support.small import difference, final_state, rows

from savepoint.checkpoint import manifest

pytestmark = pytest.mark.slow


def test_a_run_that_is_rewound_sets_whole_directories_aside_and_ends_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keeping = ["--checkpoint.keep_last", "99", "--checkpoint.async_save", "true"]
    run_dir = tmp_path / "run"
    done = run("train.py", *LITTLE, *keeping, *into(tmp_path))
    assert done.returncode == 0, done.stderr
    before, logged = final_state(run_dir), rows(run_dir)
    code, _, said = say(capsys, "audit", str(run_dir))
    assert (code, "A replay runs in one" in said) == (2, True)
    assert say(capsys, "report", str(run_dir))[0] == 0
    done = run("resume.py", str(run_dir / "checkpoints/step-00000020.ckpt"), "--rewind")
    assert done.returncode == 0, done.stderr
    aside = next((run_dir / "rewound").iterdir())
    for step in range(21, 49):
        assert manifest.verify(aside / f"step-{step:08d}.ckpt")["step"] == step
    assert list(difference(before, final_state(run_dir))) == []
    assert logged == rows(run_dir)
    assert "step-00000048.ckpt" in names(run_dir / "checkpoints")
