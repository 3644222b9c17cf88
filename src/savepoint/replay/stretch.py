"""Which part of two runs is trained again, to find the first step at which they differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from savepoint import find
from savepoint.checkpoint.store import Checkpoint
from savepoint.errors import ConfigError
from savepoint.replay.choice import config_after
from savepoint.run import Run
from savepoint.words import show

Pair = tuple[Checkpoint, Checkpoint]


@dataclass(frozen=True)
class Stretch:
    """What is trained again.

    Attributes:
        begin: A checkpoint of each run: where they agree, or, with `anew`, whose config is that of
            step 0.
        step: The end, and `at`: the point there, where the runs have checkpoints of it: `end`.
        parts: The parts of these that differ.
        configs: In place of those of `begin`.
    """

    begin: Pair
    step: int
    at: str | None = None
    end: Pair | None = None
    anew: bool = False
    parts: Sequence[str] = ()
    configs: tuple[str | None, str | None] = (None, None)


def choose(
    runs: Sequence[Run],
    agreed: Sequence[Pair],
    differing: Pair | None,
    parts: Sequence[str],
    *,
    replays: bool,
    until: int | None = None,
) -> Stretch | None:
    """What is to be trained again; None where the checkpoints say that the runs are equal.

    Args:
        agreed: The checkpoints of both that are equal.
        differing: The first ones that are not, and `parts`, in which they differ.
        replays: Whether to train also where all of them agree.
        until: Where all of them agree, the step at which the logs behind them do not.

    Raises:
        ConfigError: There is nowhere to begin.
    """
    lasts = [run.store.checkpoints()[-1] for run in runs]
    step = differing[0].step if differing else min(one.step for one in lasts)
    at = differing[0].manifest["at"] if differing else None
    end = {"end": differing} if at in ("batch", "epoch") else {"end": None}
    ends: dict[str, Any] = {"step": step, "at": at if end["end"] else None, "parts": parts} | end
    if until is not None and not differing:
        return _with_configs_of_resumes(runs, Stretch(agreed[-1], until))
    if agreed:
        begin = agreed[-1] if differing or agreed[-1][0].step < step else agreed[0]
        if not differing and begin is agreed[0] and not replays and step == agreed[-1][0].step:
            return None
        if begin[0].step >= step:
            return None
        return _with_configs_of_resumes(runs, Stretch(begin, **ends))
    for one, other in ((0, 1), (1, 0)):
        origin = _origin(runs[one], runs[other])
        if origin is not None and origin.step < step:
            config = find.load(runs[other].store.checkpoints()[0].path)[0]["config"]
            configs = (None, config) if other else (config, None)
            return Stretch((origin, origin), configs=configs, **ends)
    for run in runs:
        _require_start(run)
    firsts = [run.store.checkpoints()[0] for run in runs]
    return Stretch((firsts[0], firsts[1]), anew=True, **ends)


def _with_configs_of_resumes(runs: Sequence[Run], stretch: Stretch) -> Stretch:
    """A run that was resumed at the beginning with another config is trained with that one."""
    one, other = (config_after(*pair) for pair in zip(runs, stretch.begin, strict=True))
    return replace(stretch, configs=(one, other))


def _origin(run: Run, fork: Run) -> Checkpoint | None:
    """The checkpoint of a run from which the other one was forked."""
    starts = fork.starts()
    parent = (starts[0].get("parent") if starts else None) or {}
    if run.id() is None or parent.get("id") != run.id():
        return None
    name = starts[0].get("checkpoint")
    return next((one for one in run.store.checkpoints() if one.path.name == name), None)


def _require_start(run: Run) -> None:
    """Raises ConfigError where a run cannot be trained from step 0 again."""
    starts = run.starts()
    first: Mapping[str, Any] = starts[0] if starts else {}
    program = Path((first.get("argv") or [""])[0]).name
    why = ""
    if not starts:
        why = "it has no record of its start"
    elif first.get("checkpoint"):
        why = f"it began at {first['checkpoint']} of another run"
    elif program == "resume.py":
        why = "it began with a file of another program"
    if why:
        raise ConfigError(
            f"No checkpoint in which the two agree, and {show(run.directory)} cannot be trained "
            f"from step 0: {why}. Runs that agree somewhere were expected. To see what differs: "
            "python -m savepoint diff A B"
        )
