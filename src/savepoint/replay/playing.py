"""A run is trained again from one of its checkpoints, up to a step or to a point of another one."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from savepoint.checkpoint.state.points import Point
from savepoint.checkpoint.trainer_saver import TrainerSaver
from savepoint.config import typed
from savepoint.resume.go_on import start_from
from savepoint.resume.plan import differences
from savepoint.resume.request import Request
from savepoint.resume.source import Source
from savepoint.run import Run
from savepoint.training import build
from savepoint.training.execute import take_weights


@dataclass(frozen=True)
class Goal:
    """Where a replay ends.

    Attributes:
        step: The number of steps that are done there.
        at: The point; None for the first one that follows the step.
        saves: Whether the state is saved there.
    """

    step: int
    at: Point | None = None
    saves: bool = False

    def is_reached(self, step: int, at: Point) -> bool:
        return step >= self.step and self.at in (None, at)


@dataclass(frozen=True)
class Played:
    """A run whose log begins at the checkpoint, and the step at which it ended: at the goal, or
    before it, by the limits of its config.
    """

    run: Run
    step: int


class _Reached(Exception):
    """The replay has come to its goal."""


class _Until:
    """In place of what a training saves by itself: nothing before the goal, and there the end.

    A signal still stops it, and nothing is saved for it.
    """

    def __init__(self, saver: TrainerSaver, goal: Goal) -> None:
        self.saver = saver
        self.goal = goal
        self._save = saver.save
        saver.save = self.save  # type: ignore[method-assign]
        saver.poll_at = self.poll_at  # type: ignore[method-assign]

    def poll_at(self, trainer: Trainer, at: Point) -> None:
        stop, _ = self.saver.agree(trainer)
        if stop:
            self.saver.leave(trainer, stop)
        self.save(trainer, at, reason="replay")

    def save(self, trainer: Trainer, at: Point, *, reason: str, ended: str | None = None) -> None:
        if not self.goal.is_reached(trainer.global_step, at):
            return
        if self.goal.saves:
            self._save(trainer, at, reason=reason, ended=ended)
            self.saver.finish_writing(trainer)
        if ended is None:
            raise _Reached


def remove(run: Run) -> None:
    """Nothing is left of a replay that has failed: `discard` keeps what a training has begun."""
    run.discard()
    shutil.rmtree(run.directory, ignore_errors=True)


def play(
    source: Source,
    output_dir: Path,
    name: str | None,
    goal: Goal,
    *,
    callbacks: Sequence[Callback] = (),
    allow: Sequence[str] = (),
    config: str | None = None,
    anew: bool = False,
) -> Played:
    """Trains from `source` to the goal, as a run of its own.

    Args:
        callbacks: Called after all others.
        allow: What `--allow` names.
        config: In place of the checkpoint's: that of a resume, which had changed it.
        anew: Begins at step 0, as the run of the checkpoint once did.
    """
    was = typed.parse([], base=source.state["config"])
    settings = typed.parse([], base=config) if config else was
    changed = differences(typed.dump(was), typed.dump(settings)) if config else {}
    settings.trainer.logger = None  # a tracker would take the replay for the run
    settings.checkpoint.mirror = None
    run = Run.create(str(output_dir), name, "replay")
    if anew:
        begin = build.Start(threads=source.manifest.get("threads"))
    else:
        begin = start_from(Request(allow=list(allow)), source, changed, None)
    try:
        training = build.build(settings, run, begin)
        begin.state = None  # it is as large as the model
        if anew:
            take_weights(training, settings)
        every: list[Any] = training.trainer.callbacks  # type: ignore[attr-defined]
        every += callbacks
        _Until(training.checkpointing.saver, goal)
        path = None if anew else source.path
        training.trainer.fit(training.model, datamodule=training.data, ckpt_path=path)
    except _Reached:
        pass
    except BaseException:
        remove(run)
        raise
    finally:
        run.unlock()
    return Played(run, training.trainer.global_step)
