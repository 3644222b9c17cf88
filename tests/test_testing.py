"""The checks that the tests of a project call."""

from pathlib import Path

import pytest
from support.programs import LITTLE

from savepoint import testing


@pytest.fixture
def manual(tmp_path: Path) -> Path:
    """A config that train.py refuses only when the training starts."""
    config = tmp_path / "more.yaml"
    config.write_text("trainer: {callbacks: [{class_path: savepoint.monitors.StopEarly}]}\n")
    return config


def test_a_config_that_is_refused_is_told_from_a_failure(manual: Path, tmp_path: Path) -> None:
    flags = (*LITTLE, "--checkpoint.monitor", "null")
    with pytest.raises(testing.Refused, match="Nothing to wait for: StopEarly names"):
        testing.resumes_exactly(manual, tmp_path / "runs", *flags)


def test_a_config_that_composes_is_returned_with_all_its_values() -> None:
    found = testing.composes("configs/callbacks/ema.yaml", "--data.batch_size", "8")
    assert found["data"]["class_path"] == "project.ImageData"
    assert found["data"]["init_args"]["batch_size"] == 8
    assert found["trainer"]["callbacks"][0]["init_args"]["decay"] == 0.99


def test_a_failure_is_no_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr("savepoint.training.execute._finish", fails)
    with pytest.raises(OSError, match="the disk is gone"):
        testing.resumes_exactly("configs/fast.yaml", tmp_path, *LITTLE)


def test_a_config_that_validates_inside_its_epochs_is_shortened_too(tmp_path: Path) -> None:
    config = tmp_path / "often.yaml"
    config.write_text("trainer: {val_check_interval: 50}\n")
    assert testing.resumes_exactly(config, tmp_path / "runs", *LITTLE) == []
