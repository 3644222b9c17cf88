"""A metric that something waits for and nothing logs is said in words, before an epoch is spent
where that can be known, and nothing is left of the run.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.programs import LITTLE, ROOT, call

from project.model import ImageClassifier
from savepoint.commands import main


class OnAPlateau(ImageClassifier):
    watched = "val_loss"

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "monitor": self.watched},
        }


class OnAPlateauOfTheTraining(OnAPlateau):
    watched = "loss"


class OnAPlateauOfNothing(OnAPlateau):
    watched = None  # type: ignore[assignment]


STOP = "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: NAME}}]}\n"
OURS = "trainer: {callbacks: [{class_path: savepoint.monitors.StopEarly}]}\n"
KEEP = "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {monitor: NAME}}]}\n"
ON_A_PLATEAU = "model: {class_path: CLASS, init_args: {net: {class_path: ConvNet}}}\n"
EARLY = {
    "the checkpoints": ("checkpoint: {monitor: val/loss_}\n", "val/loss_, of checkpoint.monitor"),
    "early stopping": (STOP.replace("NAME", "val_loss"), "val_loss, of EarlyStopping(monitor=...)"),
    "Lightning's checkpoints": (
        KEEP.replace("NAME", "valid/f1"),
        "valid/f1, of ModelCheckpoint(monitor=...)",
    ),
    "a schedule": (
        ON_A_PLATEAU.replace("CLASS", "OnAPlateau"),
        "val_loss, of ReduceLROnPlateau in configure_optimizers",
    ),
}
LATE = {
    "the checkpoints": ("checkpoint: {monitor: loss}\n", "loss, of checkpoint.monitor"),
    "early stopping": (STOP.replace("NAME", "loss"), "loss, of EarlyStopping(monitor=...)"),
    "a schedule": (
        ON_A_PLATEAU.replace("CLASS", "OnAPlateauOfTheTraining"),
        "loss, of ReduceLROnPlateau in configure_optimizers",
    ),
}


def train(directory: Path, config: str, *flags: str) -> int:
    (directory / "more.yaml").write_text(config)
    configs = [str(ROOT / "configs/fast.yaml"), str(directory / "more.yaml")]
    words = [word for path in configs for word in ("--config", path)]
    words += ["--output_dir", str(directory / "outputs"), "--run_name", "run"]
    return call("train.py", *words, *LITTLE, *flags)


@pytest.mark.parametrize("name", EARLY)
def test_what_no_validation_logs_is_said_before_the_first_epoch(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, said = EARLY[name]
    assert train(tmp_path, config) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert f"never logged: {said}. Expected one of val/accuracy, val/loss. " in line
    assert not (tmp_path / "outputs/run").exists()


@pytest.mark.parametrize("name", LATE)
def test_what_the_training_might_have_logged_is_said_after_its_first_epoch(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, said = LATE[name]
    assert train(tmp_path, config) == 2
    *_, line = capfd.readouterr().err.splitlines()
    assert f"never logged: {said}. Expected one of train/accuracy, train/loss, " in line


def test_a_metric_of_the_training_may_be_waited_for(tmp_path: Path) -> None:
    config = "checkpoint: {monitor: train/loss, mode: min}\n" + STOP.replace("NAME", "train/loss")
    assert train(tmp_path, config) == 0


def test_early_stopping_watches_what_ranks_the_checkpoints(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The loss is the largest at first, so that it does not improve where more is better."""
    config = "checkpoint: {monitor: val/loss, mode: max}\n" + OURS
    assert train(tmp_path, config, "--trainer.max_epochs", "30", "--model.lr", "0.01") == 0
    capfd.readouterr()
    assert main(["show", str(tmp_path / "outputs/run")]) == 0
    assert "early stopping" in capfd.readouterr().out


def test_early_stopping_without_a_metric_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, "checkpoint: {monitor: null}\n" + OURS) == 2
    assert "Nothing to wait for: StopEarly names no monitor" in capfd.readouterr().err


def test_what_else_lightning_refuses_is_a_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, ON_A_PLATEAU.replace("CLASS", "OnAPlateauOfNothing")) == 2
    assert "Lightning refuses this training: " in capfd.readouterr().err


def test_an_interval_that_is_longer_than_the_epoch_is_a_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, "trainer: {val_check_interval: 50}\n") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("Lightning refuses this training: `val_check_interval` (50) must be")


class Broken(ImageClassifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise ValueError("a fault of the model")


def test_an_error_of_the_model_is_no_message(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a fault of the model"):
        train(tmp_path, ON_A_PLATEAU.replace("CLASS", "Broken"))


def test_a_dev_run_that_logs_nothing_ends_well(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, "trainer: {fast_dev_run: true}\n") == 0
    assert "not whole" not in capfd.readouterr().err


@pytest.mark.parametrize("preset", ["short", "normal", "long"])
def test_a_preset_of_checkpoints_leaves_the_metric_alone(preset: str, tmp_path: Path) -> None:
    flags = ["--checkpoint", str(ROOT / f"configs/checkpoint/{preset}.yaml")]
    config = "checkpoint: {monitor: val/loss, mode: min}\n"
    assert train(tmp_path, config, *flags, "--checkpoint.save_every_steps", "1") == 0
    assert "monitor: val/loss" in (tmp_path / "outputs/run/config.yaml").read_text()


def test_a_run_that_ranks_nothing_has_no_column_for_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, "trainer: {}\n", "--trainer.limit_val_batches", "0") == 0
    capfd.readouterr()
    for place in ("outputs", "outputs/run"):
        assert main(["ls", str(tmp_path / place)]) == 0
        assert "val/accuracy" not in capfd.readouterr().out
