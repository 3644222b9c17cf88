"""The table at the end of a run."""

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from savepoint.checkpoint.scores import Scores
from savepoint.run import Run
from savepoint.training import summary
from savepoint.words import python


def lines_of(run: Path, **results: Any) -> list[str]:
    training: Any = SimpleNamespace(
        run=Run(run),
        checkpointing=SimpleNamespace(scores=Scores(None, "min")),
        meter=SimpleNamespace(goes_on=False),
        trainer=SimpleNamespace(max_steps=-1, max_epochs=2, current_epoch=2, global_step=4, callbacks=[]),
    )  # fmt: skip
    numbers = {"epochs": 2, "steps": 4, "fit_secs": 1.0, "wall_secs": 2.0, "samples_per_sec": 8}
    facts = {"dataset": "digits", "parameters": 1, "tested_checkpoint": None, **numbers}
    return summary.table(training, facts | results).splitlines()


def test_the_last_lines_name_the_command_that_shows_the_run(tmp_path: Path) -> None:
    lines = lines_of(tmp_path / "a run")
    shown = shlex.join([python(), "-m", "savepoint", "report", str(tmp_path / "a run")])
    assert [line for line in lines if line.split("  ")[0] == "look at it"] == [
        f"look at it     {shown}"
    ]


def test_what_the_test_logged_is_shown_whatever_its_name(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, loss_test=0.5, test_metrics=["loss_test"])
    assert any(line.split() == ["loss_test", "0.5000"] for line in lines)
