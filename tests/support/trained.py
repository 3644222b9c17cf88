"""A run of a second that leaves real checkpoints, and copies of these in which something else
stands.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from savepoint.checkpoint import store
from support.programs import FOUR_AN_EPOCH as SMALL
from support.programs import begin
from support.run_dirs import say

Capture = pytest.CaptureFixture[str]
__all__ = ["Capture", "altered", "best", "say", "trained"]


@cache
def trained(folder: Path) -> Path:
    """A run of twelve steps on the embedded digits, tested on all of them; made once a process, to
    be left as it is.
    """
    outputs = folder / "trained"
    whole = [
        "--trainer.limit_test_batches",
        "1.0",
        "--output_dir",
        str(outputs),
        "--run_name",
        "first",
    ]
    assert begin(*SMALL, *whole) == 0
    return outputs / "first"


def best(run_dir: Path) -> Path:
    found = store.CheckpointStore(run_dir / "checkpoints").best()
    assert found is not None
    return found.path


def altered(file: Path, copy: Path, **values: Any) -> Path:
    """A checkpoint like `file`, whole and sealed, with other values in its state."""
    state, facts = store.load(file)
    return store.write(copy, {**state, **values}, facts).path
