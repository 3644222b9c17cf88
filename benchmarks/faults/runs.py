"""One run directory, started again and again by the same command: the trainings that the faults of
strikes.py hit.

    savepoint    `train.py --resume auto`, the whole of it: callback, store, run directory, resume
    lightning    Trainer and ModelCheckpoint(dirpath, monitor, filename="best", save_last=True),
                 resumed by fit(ckpt_path="last") where last.ckpt is there

Both train the model and the batches of toy.py. The metric that ranks improves at every step: with
one that stalls, ModelCheckpoint writes neither of its files. Each start is a process of its own,
forked from one that has imported PyTorch and Lightning already: that saves seconds a start and
changes nothing else.
"""

import contextlib
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import ROOT

from faults import damage

SYSTEMS = ("savepoint", "lightning")
FORK = multiprocessing.get_context("fork")
PATIENCE_SECS = 120.0  # a training that has not ended by then hangs


class HarnessError(RuntimeError):
    """A training that hangs, or that no mending helps."""


@dataclass(frozen=True)
class Task:
    """What is trained. `megabytes`: of its state; `batches`: an epoch; `save_every_steps`: None
    saves once an epoch.
    """

    megabytes: float = 1.0
    epochs: int = 3
    batches: int = 16
    save_every_steps: int | None = 1

    @property
    def steps(self) -> int:
        return self.epochs * self.batches


class Run:
    """One run directory of one system. `tmp` is its TMPDIR."""

    def __init__(self, system: str, task: Task, directory: Path, tmp: Path) -> None:
        self.system = system
        self.task = task
        self.directory = directory
        self.tmp = tmp
        self.checkpoints = directory / "checkpoints"
        self.notes = directory.with_name(f"{directory.name}-notes")
        self.starts = 0
        self.trained = 0  # the step that it had reached when it was last looked at
        # Files found damaged, with the time they were written.
        self.known_damage: set[tuple[Path, int]] = set()
        for folder in (self.notes, tmp):
            folder.mkdir(parents=True, exist_ok=True)

    def start(self) -> "Start":
        self.starts += 1
        return Start(self)

    def whole_and_damaged(self) -> tuple[list[Path], dict[Path, str]]:
        """The files under final names, one with two names once; what is wrong with those that are
        damaged.
        """
        whole = []
        damaged = {}
        seen = set()
        for path in sorted(self.checkpoints.glob("*.ckpt")):
            with contextlib.suppress(FileNotFoundError):  # a training that goes on may delete it
                status = path.stat()
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                if reason := damage.found(self.system, path):
                    damaged[path] = reason
                else:
                    whole.append(path)
        return whole, damaged

    def temps(self) -> set[Path]:
        """What is neither under a final name nor set aside: in the run directory, and in TMPDIR."""
        beside = {
            path for path in self.checkpoints.glob("*") if path.suffix not in (".ckpt", ".corrupt")
        }
        return beside | set(self.directory.glob(".*.tmp")) | set(self.tmp.iterdir())

    def newest(self) -> tuple[Path, int]:
        """The checkpoint that an automatic resume will take, and its step."""
        if self.system == "savepoint":
            path = max(self.checkpoints.glob("step-*.ckpt"))
            return path, _step(path)
        path = self.checkpoints / "last.ckpt"
        return path, damage.load(path)["global_step"]

    def has_saved_inside_an_epoch(self) -> bool:
        return any(_step(path) % self.task.batches for path in self.checkpoints.glob("step-*.ckpt"))

    def mend(self) -> None:
        """What a person does after an automatic resume that stopped: damaged files go, best.ckpt
        becomes last.ckpt.
        """
        whole, damaged = self.whole_and_damaged()
        for path in damaged:
            path.unlink()
        last = self.checkpoints / "last.ckpt"
        if self.system == "lightning" and whole and not last.exists():
            shutil.copy2(whole[0], last)

    def digest(self) -> str:
        """Of what the run ended with: of ours everything but the clock and the number of starts,
        its log included.
        """
        from savepoint.checkpoint.format import fingerprint
        from savepoint.prove import digest

        if self.system == "savepoint":
            return " ".join(digest(self.directory))
        state = damage.load(self.checkpoints / "last.ckpt")
        return fingerprint(
            {key: state[key] for key in ("state_dict", "optimizer_states", "global_step")}
        )


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


class Start:
    """One process that trains in a run directory until it ends or is killed."""

    def __init__(self, run: Run) -> None:
        self.system = run.system
        self._said = run.notes / f"{run.starts:03d}.log"
        self._steps = run.notes / f"{run.starts:03d}.steps"
        self._steps.touch()
        self.begun = time.monotonic()
        self._process = FORK.Process(
            target=_train, args=(run, self._said, self._steps), daemon=True
        )
        self._process.start()

    @property
    def said(self) -> str:
        return self._said.read_text(errors="replace") if self._said.exists() else ""

    def steps(self) -> list[tuple[int, float]]:
        """(number, when) of each step that this process has completed."""
        from toy import STEP

        noted = self._steps.read_bytes()
        return list(STEP.iter_unpack(noted[: len(noted) // STEP.size * STEP.size]))

    def reach(self, steps: int) -> bool:
        """Waits until this process has completed so many; False if it ended before."""
        return self.wait_until(lambda: len(self.steps()) >= steps)

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        until = time.monotonic() + PATIENCE_SECS
        while not condition():
            if self._process.exitcode is not None:
                return condition()
            if time.monotonic() > until:
                self._give_up()
            time.sleep(0.001)
        return True

    def wait(self, secs: float) -> None:
        """Waits so long, or until the process ends."""
        self._process.join(secs)

    def send(self, signum: int) -> None:
        if self._process.exitcode is None:  # then nobody has waited for it, and the pid is its own
            os.kill(self._process.pid, signum)

    def end(self) -> int:
        """Waits for the end: the exit code, negative for the signal that killed it."""
        self._process.join(PATIENCE_SECS)
        if self._process.exitcode is None:
            self._give_up()
        return self._process.exitcode

    def _give_up(self) -> None:
        self._process.kill()
        self._process.join()
        raise HarnessError(
            f"{self.system}: no end after {PATIENCE_SECS:.0f} s. What it said:\n{self.said[-2000:]}"
        )


def _train(run: Run, said: Path, steps: Path) -> None:
    """In the new process: everything that a start of its own would find."""
    from toy import STEPS_KEY

    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {STEPS_KEY: str(steps), "TMPDIR": str(run.tmp)}
    tempfile.tempdir = None  # remembered from the process before
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        # One that is ignored here, as in a background job, would stay ignored.
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    {"savepoint": _train_ours, "lightning": _train_theirs}[run.system](run)


def _train_ours(run: Run) -> None:
    task = run.task
    config: dict[str, Any] = {
        "model": {"class_path": "toy.Toy", "init_args": {"megabytes": task.megabytes}},
        "data": {"class_path": "toy.Numbers", "init_args": {"batches": task.batches}},
        "trainer": {"max_epochs": task.epochs, "accelerator": "cpu", "log_every_n_steps": 4},
        # Two files of different steps, so that there is one to fall back on; Lightning's two are of
        # the same step.
        "checkpoint": {
            "save_every_steps": task.save_every_steps,
            "monitor": "progress",
            "mode": "max",
            "keep_last": 2,
        },
    }
    config["trainer"]["callbacks"] = [{"class_path": "toy.Steps"}]
    file = run.notes / "toy.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    sys.argv = ["train.py", "--config", str(file), "--output_dir", str(run.directory.parent)]
    sys.argv += ["--run_name", run.directory.name, "--resume", "auto"]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def _train_theirs(run: Run) -> None:
    from lightning.pytorch import Trainer, seed_everything
    from lightning.pytorch.callbacks import ModelCheckpoint
    from toy import Numbers, Steps, Toy

    seed_everything(0, workers=True, verbose=False)
    every = run.task.save_every_steps
    checkpointing = ModelCheckpoint(
        run.checkpoints,
        filename="best",
        monitor="progress",
        mode="max",
        save_last=True,
        every_n_train_steps=every,
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=run.task.epochs,
        log_every_n_steps=4,
        callbacks=[Steps(), checkpointing],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run.directory,
    )
    last = "last" if (run.checkpoints / "last.ckpt").exists() else None
    trainer.fit(Toy(run.task.megabytes), datamodule=Numbers(run.task.batches), ckpt_path=last)
