"""metrics.csv goes on after a resume as if nothing had happened."""

import csv
from pathlib import Path

from savepoint.logs import RunCSVLogger


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "time/secs"} for row in csv.DictReader(file)]


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
