"""Checks for the tests of a project: does each of its configs compose, train and resume exactly?

They run the project's train.py and resume.py in this process, on a CPU, for two epochs of two
batches. Warnings of a training are not shown.
"""

import os
import runpy
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from itertools import count, zip_longest
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from savepoint import export, preemption, rebuilding, workspace
from savepoint.checkpoint import store
from savepoint.checkpoint.callback import CheckpointCallback
from savepoint.commands.export import SUFFIXES
from savepoint.comparing import comparable
from savepoint.config import compose
from savepoint.errors import ConfigError
from savepoint.prove import rows

QUICK = (
    "--trainer.max_epochs", "2", "--trainer.limit_train_batches", "2",
    "--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1",
    "--trainer.val_check_interval", "1.0",
    "--trainer.num_sanity_val_steps", "0", "--trainer.log_every_n_steps", "1",
    "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.strategy", "auto",
    "--checkpoint.mirror", "null",
)  # fmt: skip
"""The flags of every run of this module."""

SHOWN = 3000
"""Characters of a failed program's output."""


class Refused(AssertionError):
    """train.py or resume.py has refused a config with exit code 2: this model, or these data, and
    what the config asks for do not go together.
    """


def composes(config: Path | str, *flags: str) -> dict[str, Any]:
    """Lays a config out, with the types of the project's classes, and prints nothing.

    Args:
        config: A file. In a folder `model`, `data`, `trainer` or `checkpoint` it is such a group.
        flags: Of train.py, over the config: `"--data.batch_size", "8"`.

    Returns:
        Every key with its value: `["data"]["class_path"]`, say.

    Raises:
        AssertionError: train.py refuses it; with its output.
    """
    printed = _run("train.py", *_named(config), *flags, "--print_config")
    laid_out: dict[str, Any] = compose.parse_yaml(printed, "the config")
    return laid_out


def resumes_exactly(config: Path | str, directory: Path, *flags: str) -> list[str]:
    """Trains a config straight, and again with a stop by SIGTERM in the first epoch and a resume.

    Args:
        config: As for `composes`.
        directory: For the two runs, `straight` and `stopped`; they are not there yet.
        flags: Over the config and over QUICK.

    Returns:
        The differences at the end: weights, optimizers, all other state, rows of the log. Empty
        where the two are equal bit for bit.

    Raises:
        Refused: train.py does not take the config; with its output.
        AssertionError: a run ended in another way than it should; with its output.
    """
    command = [*_named(config), *QUICK, *flags, "--output_dir", str(directory)]
    tracking = f"sqlite:///{directory / 'mlflow.db'}"  # not in the project's own outputs/
    with patch.dict(os.environ, MLFLOW_TRACKING_URI=tracking):
        _run("train.py", *command, "--run_name", "straight")
        with _signal_after_batch(1):
            _run("train.py", *command, "--run_name", "stopped", expected=128 + signal.SIGTERM)
        _run("resume.py", str(directory / "stopped"))
    straight = directory / "straight"
    stopped = directory / "stopped"
    differences = list(difference(final_state(straight), final_state(stopped)))
    pairs = zip_longest(rows(straight), rows(stopped))
    return differences + [f"row: {one} and {other}" for one, other in pairs if one != other]


def exports(run: Path, kind: str = "safetensors") -> str:
    """Writes the weights of a run's newest checkpoint for other programs, and compares the two.

    Args:
        kind: safetensors, npz, state_dict, pt2 or onnx.

    Returns:
        Why a model like this one cannot be written in this format; empty where it was.

    Raises:
        ParityError: the file does not hold what the checkpoint holds.
    """
    checkpoint = store.CheckpointStore(run / "checkpoints").latest()
    assert checkpoint is not None, f"no checkpoint in {run}"
    with _as_a_process_of_its_own():
        rebuilt = rebuilding.rebuild(checkpoint.path)
        try:
            export.export(rebuilt, run / f"exported{SUFFIXES[kind]}", kind)
        except ConfigError as error:
            return str(error)
    return ""


def final_state(run: Path) -> dict[str, Any]:
    """The state in a run's newest checkpoint, without the facts of time and place."""
    latest = store.CheckpointStore(run / "checkpoints").latest()
    assert latest is not None, f"no checkpoint in {run}"
    state, _ = store.load(latest.path)
    return comparable(state)


def difference(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """The places in which two nested states are not exactly equal."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.dtype != other.dtype or one.shape != other.shape or not torch.equal(one, other):
            yield f"{path}: tensors differ"
    elif isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            if key not in one or key not in other:
                yield f"{path}.{key}: only in one"
            else:
                yield from difference(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            yield f"{path}: {len(one)} and {len(other)} long"
        for place, (a, b) in enumerate(zip(one, other, strict=False)):
            yield from difference(a, b, f"{path}[{place}]")
    elif one != other and not (one != one and other != other):
        yield f"{path}: {one!r} and {other!r}"


def _named(config: Path | str) -> list[str]:
    """The flag that names a config file, as the folder that it lies in says."""
    group = Path(config).parent.name
    is_group = group in compose.GROUPS and group != "federated"  # whose files are whole configs
    return [f"--{group}" if is_group else "--config", str(config)]


def _run(script: str, *argv: str, expected: int = 0) -> str:
    """What a program of the project prints, run in this process."""
    path = str(workspace.project().root / script)
    output = StringIO()
    errors = StringIO()
    with _as_a_process_of_its_own(), redirect_stdout(output), redirect_stderr(errors):
        sys.argv = [path, *argv]
        code: Any = 0
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as left:
            code = left.code or 0
    if code != expected:
        raise (Refused if code == 2 else AssertionError)(
            f"{script} {' '.join(argv)} ended with exit code {code}. Expected {expected}. "
            f"Its output:\n{(output.getvalue() + errors.getvalue())[-SHOWN:]}"
        )
    return output.getvalue()


@contextmanager
def _signal_after_batch(nth: int) -> Iterator[None]:
    original = CheckpointCallback.on_train_batch_end
    calls = count(1)

    def on_train_batch_end(self: CheckpointCallback, *arguments: Any, **named: Any) -> None:
        if next(calls) == nth:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, *arguments, **named)

    with patch.object(CheckpointCallback, "on_train_batch_end", on_train_batch_end):
        yield


@contextmanager
def _as_a_process_of_its_own() -> Iterator[None]:
    """Undoes at the end what a program of the project changes in its process."""
    threads = torch.get_num_threads()
    argv = sys.argv
    hook = sys.unraisablehook
    handlers = {one: signal.getsignal(one) for one in (*preemption.STOP, preemption.SAVE)}
    torch.set_num_threads(1)  # the fastest for small models
    try:
        with (
            warnings.catch_warnings(),
            patch.dict(os.environ),
            patch.object(preemption, "requests", preemption._Requests()),
            patch.object(workspace, "_entered", workspace._entered),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        tracker = sys.modules.get("wandb")
        if tracker is not None:  # it ends its run with the process
            tracker.finish()
        sys.argv = argv
        sys.unraisablehook = hook
        torch.set_num_threads(threads)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
