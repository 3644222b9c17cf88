"""The table at the end of a run."""

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from savepoint.checkpoint.scores import Scores
from savepoint.run import Run
from savepoint.training import summary
from savepoint.words import python


def test_the_last_lines_name_the_command_that_shows_the_run(tmp_path: Path) -> None:
    training: Any = SimpleNamespace(
        run=Run(tmp_path / "a run"),
        checkpointing=SimpleNamespace(scores=Scores(None, "min")),
        meter=SimpleNamespace(goes_on=False),
        trainer=SimpleNamespace(max_steps=-1, max_epochs=2, current_epoch=2, global_step=4, callbacks=[]),
    )  # fmt: skip
    numbers = {"epochs": 2, "steps": 4, "fit_secs": 1.0, "wall_secs": 2.0, "samples_per_sec": 8}
    facts = {"dataset": "digits", "parameters": 1, "tested_checkpoint": None, **numbers}
    lines = summary.table(training, facts).splitlines()
    shown = shlex.join([python(), "-m", "savepoint", "report", str(tmp_path / "a run")])
    assert [line for line in lines if line.split("  ")[0] == "look at it"] == [
        f"look at it     {shown}"
    ]
