"""Learning-rate schedules: pure functions of (step, total_steps) that give the factor on the
learning rate.

Nothing is kept between calls, so a resume needs the step alone. Past `total_steps` the factor stays
where it ended: training longer never crashes, and is not quite dead (`end` is small, not 0).
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

Schedule = Callable[[int, float], float]
ScheduleName = Literal["one_cycle", "cosine", "constant", "step"]


def one_cycle(
    step: int, total_steps: float, warmup: float = 0.2, start: float = 0.04, end: float = 0.001
) -> float:
    """A straight rise from `start` to 1 over the share `warmup` of all steps, then half a cosine
    down to `end`.

    Source: https://arxiv.org/abs/1708.07120
    """
    done = _done(step, total_steps)
    if done < warmup:
        return start + (1 - start) * done / warmup
    return _half_cosine((done - warmup) / (1 - warmup), end) if warmup < 1 else 1.0


def cosine(step: int, total_steps: float, end: float = 0.001) -> float:
    """Half a cosine from 1 down to `end`, without warm-up."""
    return _half_cosine(_done(step, total_steps), end)


def constant(step: int, total_steps: float) -> float:
    """Always 1: the one schedule for a training without an end."""
    return 1.0


def step(
    step: int, total_steps: float, drops: Sequence[float] = (0.5, 0.75), gamma: float = 0.1
) -> float:
    """Times `gamma` at each share of all steps in `drops`."""
    done = _done(step, total_steps)
    return math.prod(gamma for drop in drops if done >= drop)


SCHEDULES: dict[str, Schedule] = {
    "one_cycle": one_cycle,
    "cosine": cosine,
    "constant": constant,
    "step": step,
}


def _done(step: int, total_steps: float) -> float:
    return min(step / max(total_steps, 1), 1.0)


def _half_cosine(done: float, end: float) -> float:
    return end + (1 - end) * (1 + math.cos(math.pi * done)) / 2
