"""Stops and resumes each shape at its safe points, and compares with one that was never stopped.

    cd tests
    PYTHONPATH=../src ../.venv/bin/python -m shapes.runner [NAME...] [--jobs 2] [--failing] [--few]

NAME is a shape or the beginning of its name ("flags/"). A line each, then how often it was:

    exact         the file says exact, and all is equal
    said          the file says that it is not exact; whether it was equal is counted too
    DIFFERENT     the file says exact, and something differs
    CRASHED       it ends in an error where Lightning alone trains
"""

import argparse
import contextlib
import io
import logging
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib import import_module
from itertools import zip_longest
from multiprocessing import get_context
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, Checkpoint, Timer
from support.limits import HANG_SECS
from support.small import EveryPoint, one_thread
from torch import Tensor

import shapes
from savepoint import preemption
from savepoint.checkpoint import store
from savepoint.checkpoint.callback import CheckpointCallback
from savepoint.checkpoint.store import CheckpointStore
from savepoint.preemption import Preempted
from shapes import base
from shapes.base import RowLogger, Shape

POINTS = {"batch": 5, "epoch": 2, "validation": 2}  # resumed from, of each kind, evenly chosen
LESS = {"batch": 2, "epoch": 1, "validation": 1}  # of a shape that is slow
FEW = {"batch": 1, "epoch": 1, "validation": 1}  # beside those of two signals
ALARM, SIGNALS = "no end after", (*preemption.STOP, preemption.SAVE)


def all_shapes() -> dict[str, Shape]:
    found = {}
    for info in iter_modules(shapes.__path__):
        module = import_module(f"shapes.{info.name}") if info.name != "runner" else None
        for name, shape in getattr(module, "SHAPES", {}).items():
            found[f"{info.name}/{name}"] = shape
    return found


@dataclass
class Verdict:
    """Of one shape: how often each outcome was met, and what was wrong where."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[str, str, list[str]]] = field(default_factory=list)

    def add(self, outcome: str, point: str = "", details: list[str] | None = None) -> None:
        self.counts[outcome] += 1
        if outcome in ("DIFFERENT", "CRASHED", "BAD SHAPE"):
            self.faults.append((outcome, point, details or []))

    def told(self) -> Iterator[str]:
        """The first faults, and of each one difference of each part of the state."""
        for outcome, point, details in self.faults[:3]:
            parts: dict[str, str] = {}
            for text in details:
                parts.setdefault(re.split(r"[.\[ ]", text)[0], text[:240])
            yield f"{outcome} at {point}: {'; '.join([*parts.values()][:3])}"

    def line(self) -> str:
        return f"{self.name:45s} " + ", ".join(f"{n} {k}" for k, n in self.counts.items())


# -- one run -------------------------------------------------------------------------------------


@dataclass
class Run:
    """What stands at the end of a run, or what it ended with."""

    end: dict[str, Any] | None
    rows: list[Any]
    error: BaseException | None = None

    def why(self) -> list[str]:
        assert self.error is not None
        frames = traceback.extract_tb(self.error.__traceback__)
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        return [f"{type(self.error).__name__}: {str(self.error)[:300]} ({where})"]


class Kill(Callback):
    """SIGTERM at one call of a hook."""

    def __init__(self, hook: str, batch: int) -> None:
        self.hook, self.batch, self.calls, self.sent = hook, batch, 0, False

    def _call(self, trainer: Trainer, hook: str) -> None:
        if hook != self.hook or trainer.sanity_checking:
            return
        self.calls += 1
        if self.calls == self.batch and not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._call(trainer, "train")

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._call(trainer, "validation")


def seed(shape: Shape, resumed: bool) -> None:
    seed_everything(99, workers=True, verbose=False)  # the process that trained is gone
    if shape.seeded:
        seed_everything(1, workers=True, verbose=False)
        return
    os.environ.pop("PL_GLOBAL_SEED", None)
    own = 2 if resumed else 1
    random.seed(own)
    np.random.seed(own)
    torch.manual_seed(own)


def fit(
    shape: Shape,
    directory: Path,
    *,
    checkpointing: CheckpointCallback | None,
    resume: Path | None = None,
    kill: Kill | None = None,
) -> Run:
    preemption.requests.__init__()  # type: ignore[misc]
    seed(shape, resume is not None)
    base.WRAPPED = checkpointing is not None
    shape.reset()
    logger = RowLogger()
    ours = [checkpointing] if checkpointing else []
    arguments = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 3, "log_every_n_steps": 2,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
        "logger": logger, **shape.trainer,
    }  # fmt: skip
    try:
        callbacks = [*shape.callbacks(), *([kill] if kill else []), *ours]
        if not any(isinstance(callback, Checkpoint) for callback in callbacks):
            arguments["enable_checkpointing"] = False
        trainer = Trainer(callbacks=callbacks, default_root_dir=str(directory), **arguments)
        model, data = shape.model(), shape.data()
        given = {"datamodule": data} if isinstance(data, LightningDataModule) else data
        if resume:
            given = {**given, "ckpt_path": resume, "weights_only": True}
        trainer.fit(model, **given)
        end = snapshot(shape, trainer, model)
    except Preempted as stopped:
        return Run(None, logger.logged, stopped)
    except Exception as error:  # noqa: BLE001 - the verdict names it
        return Run(None, logger.logged, error)
    return Run(end, logger.logged)


def snapshot(shape: Shape, trainer: Trainer, model: Any) -> dict[str, Any]:
    _, keys, *rest = np.random.get_state()
    # Not the paths of files, a clock, and the signal.
    others = [c for c in trainer.callbacks if not isinstance(c, Checkpoint | Timer | Kill)]
    return {
        "weights": dict(model.state_dict()),
        "modes": {name: part.training for name, part in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
        "callbacks": {c.state_key: c.state_dict() for c in others},
        "callback_metrics": dict(trainer.callback_metrics),
        "progress": [trainer.global_step, trainer.current_epoch],
        "random": [random.getstate(), [keys.tolist(), *rest], torch.get_rng_state()],
        "extra": shape.extra(model, trainer),
    }


# -- comparing -----------------------------------------------------------------------------------


def differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """The places where two states are not the same, bit for bit."""
    # As exact as Python's own in every computation, and saved as that.
    one, other = (
        float(value) if isinstance(value, np.float64) else value for value in (one, other)
    )
    if isinstance(one, Tensor):
        yield from _tensors(one, other, path)
    elif isinstance(one, Mapping) != isinstance(other, Mapping) or (
        type(one) is not type(other) and not isinstance(one, Mapping)
    ):
        yield f"{path}: {repr(one)[:60]} and {repr(other)[:60]}"
    elif isinstance(one, np.ndarray):
        if one.dtype != other.dtype or not np.array_equal(one, other):
            yield f"{path}: arrays differ"
    elif isinstance(one, Mapping):
        for key in {**one, **other}:
            if key in one and key in other:
                yield from differences(one[key], other[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}: only in the {'straight' if key in one else 'resumed'} one"
    elif isinstance(one, list | tuple | deque):
        if len(one) != len(other):
            yield f"{path}: {len(one)} and {len(other)} long"
        for i, (a, b) in enumerate(zip(one, other, strict=False)):
            yield from differences(a, b, f"{path}[{i}]")
    elif callable(one):
        return
    elif one != other and not (one != one and other != other):
        yield f"{path}: {repr(one)[:60]} and {repr(other)[:60]}"


def _tensors(one: Tensor, other: Any, path: str) -> Iterator[str]:
    if not isinstance(other, Tensor) or one.dtype != other.dtype or one.shape != other.shape:
        yield f"{path}: {repr(one)[:40]} and {repr(other)[:40]}"
        return
    a, b = one.detach(), other.detach()
    if a.layout is not torch.strided:
        a, b = a.to_dense(), b.to_dense()
    if not torch.equal(a, b) and not torch.allclose(a, b, rtol=0, atol=0, equal_nan=True):
        yield f"{path}: tensors differ by {(a.double() - b.double()).abs().max():.3g}"


def compare(straight: Run, other: Run, rows: list[Any], clocks: tuple[str, ...]) -> list[str]:
    """What differs between the end of a run and that of another, which logged `rows` in all."""
    assert straight.end is not None
    assert other.end is not None
    found: list[str] = []
    for key, end in straight.end.items():
        found += differences(end, other.end[key], key)
    pairs = zip_longest(_clockless(straight.rows, clocks), _clockless(rows, clocks))
    for i, (a, b) in enumerate(pairs):
        if list(differences(a, b)):
            found.append(f"row {i}: {a} and {b}")
    return found


def _clockless(rows: list[Any], clocks: tuple[str, ...]) -> list[Any]:
    kept = [(s, {k: v for k, v in row.items() if not k.startswith(clocks)}) for s, row in rows]
    return [row for row in kept if row[1]] if clocks else rows


# -- one shape -----------------------------------------------------------------------------------


def judge(name: str, shape: Shape, points: Mapping[str, int] = POINTS) -> Verdict:
    verdict = Verdict(name)
    with (
        tempfile.TemporaryDirectory() as root,
        quiet(),
        one_thread(),
        signals_kept(),
        at_most(HANG_SECS),
    ):
        try:
            _judge(verdict, shape, Path(root), points)
        except TimeoutError as error:
            verdict.add("CRASHED", "some run", [str(error)])
        except Exception as error:  # noqa: BLE001 - one shape does not end the others
            verdict.add("CRASHED", "comparison", Run(None, [], error).why())
    return verdict


def _judge(verdict: Verdict, shape: Shape, root: Path, points: Mapping[str, int]) -> None:
    arguments = {"monitor": None, **shape.checkpointing}
    # That a shape is the same twice is asked where all points are.
    times = 1 if points is FEW else 2
    stock = [fit(shape, root / f"stock{i}", checkpointing=None) for i in range(times)]
    for run in stock:
        if run.error:
            verdict.add("BAD SHAPE", "Lightning alone", run.why())
            return
    if found := compare(stock[0], stock[-1], stock[-1].rows, shape.clocks):
        verdict.add("BAD SHAPE", "Lightning alone, twice", found)
        return
    straight = fit(shape, root / "straight", checkpointing=CheckpointCallback(**arguments))
    if straight.error:
        verdict.add("CRASHED", "straight", straight.why())
        return
    every = EveryPoint(root / "kept", **arguments)
    saved = fit(shape, root / "every", checkpointing=every)
    if saved.error:
        verdict.add("CRASHED", "straight, saved everywhere", saved.why())
    elif found := compare(straight, saved, saved.rows, shape.clocks):
        verdict.add("DIFFERENT", "straight, saved everywhere", found)
    number = LESS if shape.slow and points is not FEW else points
    for file in chosen(every.kept, number):
        _resume(verdict, shape, straight, saved.rows, file, file.stem, root)
    for hook, batch in (("train", 13), ("validation", 5)):
        _stop(verdict, shape, straight, hook, batch, root)


def chosen(files: list[Path], points: Mapping[str, int]) -> list[Path]:
    """Evenly of each kind, one from their middle; a file that is the same point as another only
    once.
    """
    unique: dict[str, Path] = {}
    for file in files:
        unique.setdefault(file.stem.split("-", 1)[1], file)
    found = []
    for kind, number in points.items():
        these = [file for point, file in unique.items() if point.startswith(kind)]
        last = len(these) - 1
        places = (
            {round(i * last / (number - 1)) for i in range(number)} if number > 1 else {last // 2}
        )
        found += [these[i] for i in sorted(places) if 0 <= i < len(these)]
    return found


def _stop(verdict: Verdict, shape: Shape, straight: Run, hook: str, batch: int, root: Path) -> None:
    """A real signal, and from the newest file on."""
    kill, directory = Kill(hook, batch), root / f"stopped-{hook}"
    arguments = {"monitor": None, **shape.checkpointing}
    run = fit(shape, directory, checkpointing=CheckpointCallback(**arguments), kill=kill)
    if not kill.sent:
        return
    point = f"SIGTERM in {hook}"
    if not isinstance(run.error, Preempted):
        why = run.why() if run.error else ["it trained on to its end"]
        verdict.add("CRASHED", point, why)
        return
    latest = CheckpointStore(directory / "checkpoints").latest()
    if latest is None:
        verdict.add("CRASHED", point, ["no checkpoint was saved"])
        return
    _resume(verdict, shape, straight, run.rows, latest.path, point, root)


def _resume(
    verdict: Verdict,
    shape: Shape,
    straight: Run,
    rows: list[Any],
    file: Path,
    point: str,
    root: Path,
) -> None:
    state, facts = store.load(file)
    if facts["ended"]:
        return
    kept, exact = state["logged_rows"], facts["exact"]
    del state
    work = root / "work"
    shutil.rmtree(work, ignore_errors=True)
    arguments = {"monitor": None, **shape.checkpointing}
    run = fit(shape, work, checkpointing=CheckpointCallback(**arguments), resume=file)
    if run.error:
        # A model of another shape than the code makes: Lightning says so, and the file did.
        refused = not exact and "loading state_dict" in str(run.error)
        outcome = "said, not loaded" if refused else "CRASHED"
        verdict.add(outcome, f"resume of {point}", run.why())
        return
    found = compare(straight, run, [*rows[: kept or 0], *run.rows], shape.clocks)
    if exact:
        verdict.add("DIFFERENT" if found else "exact", point, found)
    else:
        verdict.add("said, different" if found else "said, equal", point, found)


# -- surroundings --------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    names = ("lightning.pytorch", "lightning.fabric")
    before = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        try:
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    requests = preemption.requests
    preemption.requests = preemption._Requests()
    try:
        yield
    finally:
        preemption.requests = requests
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def late(*args: Any) -> None:
        raise TimeoutError(f"{ALARM} {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judge_named(name: str, points: Mapping[str, int]) -> Verdict:
    return judge(name, all_shapes()[name], points)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--failing", action="store_true", help="only those with a fault, and why")
    parser.add_argument("--few", action="store_true", help="from fewer points")
    arguments = parser.parse_args()
    points = FEW if arguments.few else POINTS
    names = [n for n in all_shapes() if not arguments.names or n.startswith(tuple(arguments.names))]
    total: Counter[str] = Counter()
    failing = 0
    with contextlib.ExitStack() as stack:
        if arguments.jobs > 1:
            pool = stack.enter_context(ProcessPoolExecutor(arguments.jobs, get_context("fork")))
            futures = [pool.submit(judge_named, name, points) for name in names]
            verdicts = (future.result() for future in as_completed(futures))
        else:
            verdicts = (judge_named(name, points) for name in names)
        for verdict in verdicts:
            total += verdict.counts
            failing += bool(verdict.faults)
            if verdict.faults or not arguments.failing:
                print(verdict.line(), flush=True)
            for text in verdict.told():
                print(f"    {text}", flush=True)
    print(f"{len(names)} shapes, {failing} with a fault")
    for outcome, number in total.most_common():
        print(f"{number:6d} {outcome}")
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
