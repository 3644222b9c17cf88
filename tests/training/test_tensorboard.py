"""TensorBoard itself, started as a person would, shows a run that was stopped and resumed as one
curve.
"""

import json
import os
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.limits import HANG_SECS
from support.small import rows

import project  # noqa: F401
from savepoint.config import quick
from savepoint.resume import request, start

SMALL = [
    "--data", "configs/data/digits.yaml", "--trainer.limit_train_batches", "6", "--trainer.max_epochs", "3",
    "--trainer.log_every_n_steps", "1", "--model.net.width", "4", "--trainer.accelerator", "cpu",
    "--checkpoint.save_every_steps", "4", "--checkpoint.keep_last", "9",
]  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed twice before the newest checkpoint was there: steps 8 to 17, then 12 to 17 were logged
    again.
    """
    outputs = tmp_path_factory.mktemp("outputs")
    run_dir = outputs / "killed"
    start.start(quick.check([*SMALL, "--output_dir", str(outputs), "--run_name", "killed"]))
    go_on_from(run_dir, 8)
    go_on_from(run_dir, 12)
    return run_dir


def go_on_from(run_dir: Path, step: int) -> None:
    for file in [*(run_dir / "checkpoints").glob("*.ckpt"), run_dir / "summary.json"]:
        if file.name not in [f"step-{saved:08d}.ckpt" for saved in range(step + 1)]:
            file.unlink()
    for name in ("SAVEPOINT_RUN_DIR", "SAVEPOINT_CHECKPOINT"):  # as in a process of its own
        os.environ.pop(name, None)
    asked = request.requested([str(run_dir)])
    assert asked is not None
    start.resume(asked)


@pytest.fixture(scope="module", params=["auto", "false"])
def ask(run_dir: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Asks a running TensorBoard for data: one that reads with its data server, and one that reads
    in Python.
    """
    log = run_dir.parent / "tensorboard.log"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", run_dir, "--port", "0", "--host", "127.0.0.1",
               "--load_fast", request.param]  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    try:
        until, found = time.monotonic() + HANG_SECS, None
        while (found := re.search(r"http://127\.0\.0\.1:\d+/", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        address = found[0]

        def get(path: str, **query: str) -> Any:
            with urllib.request.urlopen(
                f"{address}data/plugin/{path}?{urllib.parse.urlencode(query)}", timeout=HANG_SECS
            ) as answer:
                return json.load(answer)

        while not get("scalars/tags"):  # it reads the files in a thread of its own
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        yield get
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    "tag", ["train/loss_step", "train/loss", "val/loss", "val/accuracy", "test/accuracy"]
)
def test_a_killed_and_resumed_run_is_one_curve_that_equals_the_log(
    run_dir: Path, ask: Callable[..., Any], tag: str
) -> None:
    assert len(list(run_dir.glob("events.out.tfevents.*"))) == 3
    seen = [(step, value) for _, step, value in ask("scalars/scalars", run=".", tag=tag)]
    logged = [(int(row["step"]), float(row[tag])) for row in rows(run_dir) if tag in row]
    assert [step for step, _ in seen] == [step for step, _ in logged]
    assert torch.equal(
        torch.tensor([value for _, value in seen]), torch.tensor([value for _, value in logged])
    )


def test_no_step_of_the_curve_is_missing_or_doubled(ask: Callable[..., Any]) -> None:
    steps = [step for _, step, _ in ask("scalars/scalars", run=".", tag="train/loss_step")]
    assert steps == list(range(18))


def test_every_metric_of_the_log_is_there_and_no_other(
    run_dir: Path, ask: Callable[..., Any]
) -> None:
    logged = {name for row in rows(run_dir) for name in row} - {"step"}
    assert set(ask("scalars/tags")["."]) == logged


def test_the_pictures_of_the_test_are_there(ask: Callable[..., Any]) -> None:
    assert set(ask("images/tags")["."]) == {"test/confusion", "test/worst_mistakes"}
    images = ask("images/images", run=".", tag="test/confusion", sample="0")
    assert images[-1]["step"] == 18
