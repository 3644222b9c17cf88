"""Every config of this project composes, trains, and resumes exactly; what it trained is exported.

Nothing here names a class: the tests stay as they are when another model and other data move in.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import project
from savepoint import testing

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {
    path.relative_to(ROOT / "configs").as_posix(): path
    for path in sorted((ROOT / "configs").rglob("*.yaml"))
    if path.parent.name != "sweep"
}
LITTLE = getattr(project, "LITTLE", ())
ADDITIONS = ("callbacks", "debug", "logger")  # not every model takes each of them
# Two batches are too few for it.
MORE = {"callbacks/lr_finder.yaml": ("--trainer.limit_train_batches", "20")}


@cache
def composed(name: str) -> dict[str, Any]:
    return testing.composes(CONFIGS[name])


def little(name: str) -> Sequence[str]:
    """LITTLE for this config: all of it, or what it has for the class of the config's data."""
    if not isinstance(LITTLE, Mapping):
        return LITTLE
    class_path = composed(name)["data"]["class_path"]
    return LITTLE.get(class_path.rpartition(".")[2], ())


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_composes(name: str) -> None:
    assert composed(name)["model"]["class_path"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_stopped_run_that_is_resumed_equals_the_straight_one(name: str, tmp_path: Path) -> None:
    group, _, package = name.removesuffix(".yaml").partition("/")
    if group == "federated":
        pytest.skip("trained by many clients: a test of its own")
    if group == "logger" and importlib.util.find_spec(package) is None:
        pytest.skip("needs: make extras")
    flags = (*little(name), *MORE.get(name, ()))
    try:
        found = testing.resumes_exactly(CONFIGS[name], tmp_path, *flags)
    except testing.Refused as refused:
        if group not in ADDITIONS:
            raise
        # Early stopping where nothing is ranked, clipping under manual optimization: not for it.
        pytest.skip(str(refused).splitlines()[-1])
    assert found == []
    testing.exports(tmp_path / "stopped")
