"""train.py and resume.py, called in this process or as processes of their own, with arguments that
make them quick.
"""

import os
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from savepoint import preemption, workspace
from savepoint.checkpoint import store
from savepoint.config import quick
from savepoint.resume import request
from savepoint.resume import start as mains
from support.limits import HANG_SECS

ROOT = Path(__file__).resolve().parents[2]
# The digits that need no data, one thread, small enough for an epoch to take a second.
TWELVE_AN_EPOCH = [
    "--data", "configs/data/digits.yaml", "--data.batch_size", "32", "--trainer.limit_train_batches", "12",
    "--trainer.max_epochs", "3", "--trainer.limit_val_batches", "2", "--trainer.limit_test_batches", "2",
    "--trainer.log_every_n_steps", "3", "--model.net.width", "4",
]  # fmt: skip
# Three epochs of four steps.
FOUR_AN_EPOCH = [
    "--data", "configs/data/digits.yaml", "--data.batch_size", "32", "--trainer.limit_train_batches", "4",
    "--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "2", "--model.net.width", "4", "--checkpoint.keep_last", "9",
    "--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1", "--trainer.accelerator", "cpu",
]  # fmt: skip
# Epochs of six steps; a validation of four batches.
SIX_AN_EPOCH = [
    "--data", "configs/data/digits.yaml", "--data.batch_size", "32", "--model.net.width", "4", "--trainer.accelerator", "cpu",
    "--trainer.limit_train_batches", "6", "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "2",
    "--trainer.limit_test_batches", "2",
]  # fmt: skip
# The same commands on little data that needs no download.
LITTLE = [
    "--data.dataset", "digits", "--data.batch_size", "16", "--trainer.limit_train_batches", "2",
    "--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1", "--trainer.log_every_n_steps", "1",
]  # fmt: skip
# ClassicNet has dropout: each rank draws from its own generator.
PLAIN = [
    word
    for pair in zip(TWELVE_AN_EPOCH[::2], TWELVE_AN_EPOCH[1::2], strict=True)
    if "width" not in pair[0]
    for word in pair
]
TWO_RANKS = [
    *PLAIN, "--model.net", "ClassicNet", "--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp",
]  # fmt: skip

# Four epochs of twelve steps of two ranks that share a model.
LITTLE_SHARDS = [
    "--config", "configs/sharded.yaml", "--data.dataset", "digits", "--data.batch_size", "16", "--model.net.width", "4",
    "--trainer.limit_train_batches", "12", "--trainer.limit_val_batches", "2", "--trainer.max_epochs", "4",
    "--trainer.log_every_n_steps", "2", "--trainer.limit_test_batches", "1", "--checkpoint.save_every_steps", "1",
]  # fmt: skip


def into(outputs: Path, name: str = "run") -> list[str]:
    """The arguments that give a run its place."""
    return ["--output_dir", str(outputs), "--run_name", name]


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECS, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for_a_checkpoint(run_dir: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + HANG_SECS
    while not list((run_dir / "checkpoints").glob("step-*.ckpt")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.02)


def begin(*argv: str) -> int:
    with as_a_new_process():
        return mains.start(quick.check(argv))


def go(*argv: str) -> int:
    asked = request.requested(argv)
    assert asked is not None
    with as_a_new_process():
        return mains.resume(asked)


def call(script: str, *argv: str) -> int:
    """The exit code of a program, run in this process."""
    with pytest.MonkeyPatch.context() as patch, as_a_new_process():
        patch.setattr(preemption, "requests", preemption._Requests())
        patch.setattr(workspace, "_entered", None)
        patch.setattr(sys, "argv", [str(ROOT / script), *argv])
        for name in ("stdout", "stderr", "unraisablehook"):  # which the program wraps
            patch.setattr(sys, name, getattr(sys, name))
        with pytest.raises(SystemExit) as left:
            runpy.run_path(sys.argv[0], run_name="__main__")
    return int(left.value.code or 0)


@contextmanager
def as_a_new_process() -> Iterator[None]:
    """A run tells its directory and its checkpoint, through the environment, to the ranks that it
    starts.
    """
    try:
        yield
    finally:
        for name in ("SAVEPOINT_RUN_DIR", "SAVEPOINT_CHECKPOINT"):
            os.environ.pop(name, None)


def steps(run_dir: Path) -> list[int]:
    return [one.step for one in store.CheckpointStore(run_dir / "checkpoints").checkpoints()]
