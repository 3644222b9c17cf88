"""Marks for what needs more than a plain machine; the tests run from the repository's root."""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Read when torch is imported, by the processes that a test starts too: several workers with as
    # many threads as there are cores wait for each other most of the time.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from savepoint import entry, record, workspace

ROOT = Path(__file__).resolve().parents[1]

# `make test ARGS=-x` hands its words on to each make that a test starts.
for name in [name for name in os.environ if name == "ARGS" or name.startswith(("MAKE", "MFLAGS"))]:
    del os.environ[name]


@pytest.fixture(autouse=True, scope="session")
def at_the_root() -> Iterator[None]:
    """Git is asked once for the commit of this tree, not by each of hundreds of trainings."""
    os.chdir(ROOT)
    workspace.enter(workspace.Project(ROOT, Path("configs/mnist.yaml")))
    ask, ask_once = record._ask_git, cache(record._ask_git)
    with pytest.MonkeyPatch.context() as patch:
        here = "savepoint.record._ask_git"
        patch.setattr(here, lambda *a: (ask_once if workspace.project().root == ROOT else ask)(*a))
        yield


@pytest.fixture(autouse=True)
def without_fsync(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches a disk is the question of a few tests; a tenth of the others' time went there."""
    if "faults" not in request.path.parts:
        monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What the test modules import stays: no collection of garbage looks at it again and again."""
    with entry.importing():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch  # not in the process that only hands the tests out

    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no accelerator here"))
        if "root" in item.keywords and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="needs root"))
