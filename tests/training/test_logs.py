"""The logs go on after a resume, and through a full disk, as if nothing had happened."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small import read
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from savepoint.tail import last_step
from savepoint.training.logs import RunCSVLogger, RunTensorBoardLogger


class Disk:
    """While `full`, nothing can be written but what `room` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full, self.room, self._write, self._replace = False, 0, os.write, os.replace
        monkeypatch.setattr(os, "write", self.write)
        monkeypatch.setattr(os, "replace", self.replace)

    def write(self, descriptor: int, data: bytes) -> int:
        if not self.full:
            return self._write(descriptor, data)
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part, self.room = bytes(data[: self.room]), 0
        return self._write(descriptor, part)

    def replace(self, source: Any, target: Any) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._replace(source, target)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_rows_stand_in_the_order_of_the_calls_in_full_precision(tmp_path: Path) -> None:
    logger = RunCSVLogger(tmp_path / "metrics.csv")
    logger.log_metrics({"loss": 1 / 3}, step=1)
    logger.log_metrics({"loss": 0.1, "accuracy": 0.5}, step=2)
    logger.log_metrics({"accuracy": 1.0}, step=2)
    logger.finalize("success")
    assert read(tmp_path / "metrics.csv") == [
        {"step": "1", "loss": repr(1 / 3), "accuracy": ""},
        {"step": "2", "loss": "0.1", "accuracy": "0.5"},
        {"step": "2", "loss": "", "accuracy": "1.0"},
    ]
    assert logger.rows == 3


def test_a_picture_that_is_added_to_each_logger_is_no_matter_of_the_rows(tmp_path: Path) -> None:
    loggers = (RunTensorBoardLogger(tmp_path), RunCSVLogger(tmp_path / "metrics.csv"))
    for logger in loggers:
        logger.experiment.add_image("generated", torch.zeros(1, 2, 2), 0)
        logger.finalize("success")
    assert not (tmp_path / "metrics.csv").exists()


def test_what_no_logger_has_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match="no attribute 'add_imagee'"):
        RunCSVLogger(tmp_path / "metrics.csv").experiment.add_imagee("generated", 0)


def test_what_was_logged_after_the_checkpoint_is_cut_and_the_header_kept(tmp_path: Path) -> None:
    first = RunCSVLogger(tmp_path / "metrics.csv")
    for step in range(5):
        first.log_metrics({"loss": float(step)} | ({"late": 1.0} if step == 4 else {}), step=step)
    first.finalize("success")
    second = RunCSVLogger(tmp_path / "metrics.csv", keep_rows=3)
    second.log_metrics({"loss": 30.0}, step=3)
    second.finalize("success")
    assert [row["loss"] for row in read(tmp_path / "metrics.csv")] == ["0.0", "1.0", "2.0", "30.0"]
    assert second.rows == 4


def test_the_last_step_of_a_log_is_known_without_reading_it_all(tmp_path: Path) -> None:
    log = tmp_path / "metrics.csv"
    assert last_step(log) is None
    log.write_text("loss,step,epoch\n")
    assert last_step(log) is None
    with log.open("a") as file:
        file.writelines(f"0.25,{step},0\n" for step in range(20_000))
    assert last_step(log) == 19_999
    log.write_text("loss,step\n0.5,torn")
    assert last_step(log) is None


def test_nothing_is_touched_before_the_first_row(tmp_path: Path) -> None:
    logger = RunCSVLogger(tmp_path / "metrics.csv")
    logger.sync()
    logger.finalize("success")
    assert list(tmp_path.iterdir()) == []


def test_a_row_after_the_end_of_the_training_is_added_not_cut(tmp_path: Path) -> None:
    logger = RunCSVLogger(tmp_path / "metrics.csv")
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.finalize("success")
    logger.log_metrics({"test/loss": 2.0}, step=2)
    logger.finalize("success")
    assert [row["step"] for row in read(tmp_path / "metrics.csv")] == ["1", "2"]


def test_no_temporary_file_is_left(tmp_path: Path) -> None:
    logger = RunCSVLogger(tmp_path / "metrics.csv")
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.finalize("success")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("room", [0, 7])
def test_rows_wait_while_the_disk_is_full_and_none_is_lost_cut_or_doubled(
    tmp_path: Path, disk: Disk, room: int, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = RunCSVLogger(tmp_path / "metrics.csv")
    for step in range(6):
        disk.full = 2 <= step < 5
        disk.room = room if step == 3 else 0  # a row that is cut in the middle
        logger.log_metrics({"loss": float(step)}, step=step)
        logger.save()
    logger.finalize("success")
    assert [row["loss"] for row in read(tmp_path / "metrics.csv")] == [
        "0.0",
        "1.0",
        "2.0",
        "3.0",
        "4.0",
        "5.0",
    ]
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in said] == ["Cannot be written", "Written again, whole"]
    assert str(tmp_path / "metrics.csv") in said[0]
    assert "No space left" in said[0]


def test_a_column_that_appears_while_the_disk_is_full_waits_too(tmp_path: Path, disk: Disk) -> None:
    logger = RunCSVLogger(tmp_path / "metrics.csv")
    logger.log_metrics({"loss": 0.0}, step=0)
    logger.save()
    disk.full = True
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.save()
    logger.log_metrics({"accuracy": 0.5}, step=1)
    logger.save()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
    disk.full = False
    logger.sync()
    assert [(row["loss"], row["accuracy"]) for row in read(tmp_path / "metrics.csv")] == [
        ("0.0", ""), ("1.0", ""), ("", "0.5"),
    ]  # fmt: skip


def test_a_sync_that_could_not_write_raises_so_that_no_checkpoint_counts_the_rows(
    tmp_path: Path, disk: Disk
) -> None:
    logger = RunCSVLogger(tmp_path / "metrics.csv")
    logger.log_metrics({"loss": 0.0}, step=0)
    disk.full = True
    with pytest.raises(OSError, match="No space left"):
        logger.sync()
    assert logger.failure is not None
    disk.full = False
    logger.sync()
    assert logger.failure is None


def test_the_end_of_a_training_on_a_full_disk_is_told_and_raises_nothing(
    tmp_path: Path, disk: Disk
) -> None:
    logger = RunCSVLogger(tmp_path / "metrics.csv")
    logger.log_metrics({"loss": 0.0}, step=0)
    disk.full = True
    logger.finalize("success")
    assert logger.failure is not None


def events(directory: Path) -> EventAccumulator:
    (file,) = directory.glob("events.out.tfevents.*")
    return EventAccumulator(str(file)).Reload()


def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    logger = RunTensorBoardLogger(tmp_path)
    logger.log_metrics({"loss": 0.5}, step=3)
    logger.experiment.add_image("test/picture", torch.zeros(1, 4, 4), 3)
    logger.finalize("success")
    logger.log_metrics({"test/loss": 0.25}, step=4)  # the test after a training
    logger.finalize("success")
    seen = events(tmp_path)
    assert [(event.step, event.value) for event in seen.Scalars("loss")] == [(3, 0.5)]
    assert [(event.step, event.value) for event in seen.Scalars("test/loss")] == [(4, 0.25)]
    assert seen.Tags()["images"] == ["test/picture"]


def log(logger: RunTensorBoardLogger, values: dict[int, float]) -> None:
    for step, value in values.items():
        logger.log_metrics({"loss": value}, step=step)
    logger.finalize("success")


def losses(directory: Path) -> list[tuple[int, float]]:
    seen = EventAccumulator(str(directory)).Reload()
    return [(event.step, round(event.value, 5)) for event in seen.Scalars("loss")]


def test_tensorboard_hides_what_a_resume_from_an_old_checkpoint_logs_again(tmp_path: Path) -> None:
    log(RunTensorBoardLogger(tmp_path), {1: 0.1, 2: 0.2, 3: 0.3})
    log(RunTensorBoardLogger(tmp_path, purge_step=2), {2: 20.0, 3: 30.0})
    assert losses(tmp_path) == [(1, 0.1), (2, 20.0), (3, 30.0)]


def test_events_beyond_the_checkpoint_are_cut_whatever_step_they_name(tmp_path: Path) -> None:
    first = RunTensorBoardLogger(tmp_path)
    first.experiment.add_scalar("loss", 0.5, 500)
    counted = first.counted()
    log(first, {7: 0.7, 600: 0.6})
    log(RunTensorBoardLogger(tmp_path, counted), {7: 7.0, 600: 6.0})
    log(RunTensorBoardLogger(tmp_path, counted), {7: 70.0, 600: 60.0})
    assert losses(tmp_path) == [(500, 0.5), (7, 70.0), (600, 60.0)]


def test_events_that_the_checkpoint_counts_stay_whatever_step_they_name(tmp_path: Path) -> None:
    first = RunTensorBoardLogger(tmp_path)
    log(first, {500: 0.5, 7: 0.7})
    counted = first.counted()
    log(first, {600: 0.6})
    second = RunTensorBoardLogger(tmp_path, counted)
    log(second, {8: 0.8})
    again = second.counted()
    log(second, {601: 0.6})
    log(RunTensorBoardLogger(tmp_path, again), {9: 0.9})
    assert losses(tmp_path) == [(500, 0.5), (7, 0.7), (8, 0.8), (9, 0.9)]


def test_curves_of_add_scalars_are_cut_too_and_files_of_other_writers_are_not(
    tmp_path: Path,
) -> None:
    with SummaryWriter(str(tmp_path / "other")) as other:
        other.add_scalar("loss", 1.0, 1)
    first = RunTensorBoardLogger(tmp_path)
    first.experiment.add_scalars("a/b", {"one": 0.1, "two/three": 0.2}, 1)
    counted = first.counted()
    first.experiment.add_scalars("a/b", {"one": 0.3, "four": 0.4}, global_step=2)
    first.save()
    second = RunTensorBoardLogger(tmp_path, counted)
    second.experiment.add_scalars("a/b", {"one": 3.0}, 2)
    second.save()
    curves = EventAccumulator(str(tmp_path / "a_b_one")).Reload().Scalars("a/b")
    assert [(event.step, round(event.value, 5)) for event in curves] == [(1, 0.1), (2, 3.0)]
    assert list((tmp_path / "a_b_two/three").glob("events*"))
    assert not list((tmp_path / "a_b_four").glob("events*"))
    assert list((tmp_path / "other").glob("events*"))


def test_nothing_is_cut_before_the_first_event_is_written(tmp_path: Path) -> None:
    log(RunTensorBoardLogger(tmp_path), {1: 0.1})
    second = RunTensorBoardLogger(tmp_path)
    second.experiment.add_scalar("loss", 0.2, 1)
    assert losses(tmp_path) == [(1, 0.1)]
    second.save()
    assert losses(tmp_path) == [(1, 0.2)]


@pytest.mark.parametrize("log", [
    lambda logger, step: logger.log_metrics({"loss": float(step)}, step),
    lambda logger, step: logger.experiment.add_scalar("loss", float(step), step),
])  # fmt: skip
def test_tensorboard_events_wait_while_the_disk_is_full(
    tmp_path: Path, disk: Disk, log: Callable[[RunTensorBoardLogger, int], None]
) -> None:
    logger = RunTensorBoardLogger(tmp_path)
    for step in range(6):
        disk.full, disk.room = 2 <= step < 5, 9 if step == 3 else 0
        log(logger, step)
        logger.save()
    logger.finalize("success")
    assert [event.step for event in events(tmp_path).Scalars("loss")] == list(range(6))
    assert logger.failure is None


def test_a_damaged_byte_that_looks_like_a_quote_costs_no_other_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    rows = [f"{step},0.0,{step}.5" for step in range(20_000)]
    rows[3] = '3,0.0,"3.5'
    path.write_text("\n".join(["step,time/secs,loss", *rows]) + "\n")
    logger = RunCSVLogger(path, keep_rows=20_000)
    logger.log_metrics({"loss": 1.0}, step=20_000)
    logger.finalize("success")
    assert len(path.read_text().splitlines()) == 20_002
    assert logger.rows == 20_001
