"""Which checkpoints to keep: pure functions over facts, no files.

The rules are joined by OR: a checkpoint that any rule keeps stays. Whatever the numbers, the newest
and the best stay.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

from savepoint.errors import ConfigError

Mode = Literal["min", "max"]


class Facts(NamedTuple):
    """What retention looks at. `score`: None unless measured at this very step; `epoch`: how many
    are completed.
    """

    step: int
    epoch: int
    score: float | None
    epoch_end: bool


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay on disk.

    Attributes:
        keep_last: the newest so many; the newest always stays.
        keep_best: the best so many by the monitored metric; the best always stays.
        keep_every_n_epochs: those at the end of each n-th epoch, for good.
        keep_every_n_steps: those at each n-th step, for good.
    """

    keep_last: int = 1
    keep_best: int = 1
    keep_every_n_epochs: int | None = None
    keep_every_n_steps: int | None = None

    def at_most(self, ranked: bool) -> int:
        """How many files stay at a time, those that are kept for good not counted. `ranked`: by a
        monitored metric.
        """
        return max(1, self.keep_last) + (max(1, self.keep_best) if ranked else 0)

    def __post_init__(self) -> None:
        for name, least in (
            ("keep_last", 0),
            ("keep_best", 0),
            ("keep_every_n_epochs", 1),
            ("keep_every_n_steps", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(
                    f"{name} is out of range: {value}. {least} or more was expected. To keep every "
                    "checkpoint, set keep_every_n_steps to 1."
                )


RULES = tuple(rule.name for rule in fields(Retention))


def reasons(
    facts: Iterable[tuple[int, int, float | None, bool]], retention: Retention, mode: Mode
) -> dict[int, list[str]]:
    """Why each checkpoint stays, by step: {430: ["last-1", "every 5 epochs"]}. One that is absent
    may go.
    """
    checkpoints = sorted((Facts(*one) for one in facts), key=lambda one: one.step)
    why: dict[int, list[str]] = defaultdict(list)
    for place, one in enumerate(reversed(checkpoints[-max(1, retention.keep_last) :]), 1):
        why[one.step].append(f"last-{place}")
    for place, one in enumerate(ranked(checkpoints, mode)[: max(1, retention.keep_best)], 1):
        why[one.step].append(f"best-{place}")
    for one in checkpoints:
        if (n := retention.keep_every_n_epochs) and one.epoch_end and one.epoch % n == 0:
            why[one.step].append(f"every {n} epochs")
        if (n := retention.keep_every_n_steps) and one.step % n == 0:
            why[one.step].append(f"every {n} steps")
    return dict(why)


def ranked(facts: Sequence[Facts], mode: Mode) -> list[Facts]:
    """Those with a finite score, best first. NaN never wins; of equal scores the earlier step is
    better.
    """
    sign = 1 if mode == "min" else -1
    scored = [
        (sign * one.score, one.step, one)
        for one in facts
        if one.score is not None and math.isfinite(one.score)
    ]
    return [one for _, _, one in sorted(scored, key=lambda entry: entry[:2])]
