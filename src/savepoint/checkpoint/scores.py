"""What was measured at which step, and the best of the monitored metric. No files, no Lightning."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor

from savepoint.checkpoint.store import Checkpoint
from savepoint.errors import ConfigError


def never_logged(place: str, name: str, logged: Iterable[str], *, hint: str = "") -> ConfigError:
    """For a metric that is waited for: `place` says where it is named."""
    instead = "null to rank nothing" if place == "checkpoint.monitor" else "leave that out"
    return ConfigError(
        f"A metric that is waited for was never logged: {name}, of {place}. Expected one of "
        f"{', '.join(sorted(logged)) or 'those that the model logs: none'}. "
        f"Give its name and its mode, or {instead}.{hint}"
    )


class Scores:
    """Keeps every metric with the step it was measured at: a checkpoint is never ranked by another
    step's value.
    """

    def __init__(self, monitor: str | None, mode: Literal["min", "max"]) -> None:
        self.monitor = monitor
        self.mode = mode
        self.best: float | None = None
        self.best_step: int | None = None
        self._previous_best: float | None = None
        self._measured: dict[str, tuple[float, int]] = {}
        self._by_validation: set[str] = set()

    @property
    def key(self) -> str:
        """`best_accuracy` for `val/accuracy`."""
        return f"best_{(self.monitor or 'score').split('/')[-1]}"

    def measure_validation(self, metrics: Mapping[str, Tensor], step: int) -> None:
        self._by_validation |= set(metrics)
        self._measure(metrics, step)

    def measure_training(self, metrics: Mapping[str, Tensor], step: int) -> None:
        """At the end of an epoch. What validation logged stands among `metrics` too, but may be of
        an earlier step.
        """
        self._measure(
            {name: value for name, value in metrics.items() if name not in self._by_validation},
            step,
        )

    def _measure(self, metrics: Mapping[str, Tensor], step: int) -> None:
        self._measured |= {name: (float(value), step) for name, value in metrics.items()}
        score = self.score(step)
        if score is None or self.best_step == step:
            return
        # A tie keeps the earlier one.
        if self.best is None or (score > self.best if self.mode == "max" else score < self.best):
            self._previous_best = self.best
            self.best = score
            self.best_step = step

    def score(self, step: int) -> float | None:
        """The monitored metric, if it was measured at this very step and is finite."""
        value, measured_at = self._measured.get(self.monitor or "", (math.nan, -1))
        return value if measured_at == step and math.isfinite(value) else None

    def sentence(self, step: int) -> str:
        if self.score(step) is None or self.best is None:
            return ""
        if self.best_step != step:
            return f"{self.monitor} did not improve from {self.best:.4f}, "
        since = "" if self._previous_best is None else f" from {self._previous_best:.4f}"
        return f"{self.monitor} improved{since} to {self.best:.4f}, "

    def require_monitor(self) -> None:
        """Raises ConfigError where a validation has run and did not log the monitored metric."""
        if self._by_validation and self.monitor and self.monitor not in self._measured:
            raise never_logged("checkpoint.monitor", self.monitor, self._measured)

    def facts(self, step: int) -> dict[str, Any]:
        """For the manifest, as JSON can hold it."""
        metrics = {
            name: {"value": value if math.isfinite(value) else str(value), "step": measured_at}
            for name, (value, measured_at) in self._measured.items()
        }
        ranking = {
            "monitor": self.monitor,
            "mode": self.mode,
            "score": self.score(step),
            "best_score": self.best,
        }
        return {"metrics": metrics, **ranking}

    def state_dict(self) -> dict[str, Any]:
        return {
            "monitor": self.monitor,
            "mode": self.mode,
            "best": self.best,
            "best_step": self.best_step,
            "measured": {name: list(pair) for name, pair in self._measured.items()},
            "by_validation": sorted(self._by_validation),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """False where another metric was monitored: the best is then not known from here."""
        self._measured = {name: (value, step) for name, (value, step) in state["measured"].items()}
        self._by_validation = set(state["by_validation"])
        same = (self.monitor, self.mode) == (state["monitor"], state["mode"])
        if same:
            self.best = state["best"]
            self.best_step = state["best_step"]
        return same

    def begin_with(self, best: Checkpoint | None) -> None:
        if best is not None:
            self.best = best.score_of(self.monitor)
            self.best_step = best.step
