"""When a training is saved, whoever trains: the intervals, what is asked for from outside, and what
happens when a save fails. No Lightning.
"""

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from savepoint import files, preemption
from savepoint.checkpoint import format
from savepoint.checkpoint.finite import FiniteWatch
from savepoint.checkpoint.store import CheckpointStore
from savepoint.errors import CheckpointContentError, ConfigError
from savepoint.preemption import Preempted
from savepoint.words import megabytes

RETRY_SECS = 60.0  # after a save that failed: an interval may be hours


class Saver:
    """Saves when an interval has passed, when a signal or the file `save-now` asks for it, and
    again a minute after a save that failed; a full disk ends no training.

    `CheckpointCallback` has one. A training loop of one's own, or a server, calls `poll` where
    nothing is half done.

    Args:
        store: Where the checkpoints go.
        save_every_epochs: Epochs between saves; None for none.
        save_every_steps: Steps between saves; None for none.
        save_every_secs: Seconds between saves; None for none.
        on_nan: What a value that is not finite does: stop the training, or warn and save nothing
            until all are finite.

    Attributes:
        failure: Of the newest save; None once a later one succeeded.
        saved_step: The step of the newest save, also of one that failed.
        committed: Called with each file once it is saved; must do no work.

    Raises:
        ConfigError: An interval is not more than 0.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        save_every_epochs: int | None = None,
        save_every_steps: int | None = None,
        save_every_secs: float | None = None,
        on_nan: Literal["stop", "warn"] = "stop",
    ) -> None:
        intervals = {
            "epochs": save_every_epochs,
            "steps": save_every_steps,
            "secs": save_every_secs,
        }
        for name, every in intervals.items():
            if every is not None and every <= 0:
                raise ConfigError(
                    f"checkpoint.save_every_{name} is {every}. Expected more than 0. Give null to "
                    "save without this interval."
                )
        self.store = store
        self.every_epochs = save_every_epochs
        self.every_steps = save_every_steps
        self.every_secs = save_every_secs
        self.watch = FiniteWatch(on_nan)
        self.failure: Exception | None = None
        self.saved_step = 0
        self.committed: Callable[[Path], None] | None = None
        self._saved: tuple[int, str | None] | None = None  # step and point of the newest save
        self._saved_at = time.monotonic()
        self._polled = False
        self._said_inexact: set[str] = set()

    def say_inexact(self, reasons: Iterable[str]) -> None:
        """Each reason once a start."""
        new = [reason for reason in reasons if reason not in self._said_inexact]
        self._said_inexact |= set(new)
        if new:
            print(f"A resume will not be exact: {'; '.join(new[:5])}.", flush=True)

    def poll(
        self,
        step: int,
        state: Callable[[], Mapping[str, Any]],
        *,
        metrics: Mapping[str, float] | None = None,
        ended_epochs: int | None = None,
    ) -> bool:
        """Between two steps of a loop: saves, if that is due or asked for.

        Args:
            state: Called for the state only if it is saved.
            metrics: What was measured at this step; the store's `monitor` is looked up in it.
            ended_epochs: How many epochs are done, where one has just ended.

        Returns:
            Whether a checkpoint was written.

        Raises:
            Preempted: After the save, where a signal asked to stop.
            NonFiniteLossError: A tensor of the state holds a NaN, with `on_nan="stop"`.
        """
        if not self._polled:
            self._polled = True
            latest = self.store.latest()
            if latest is not None and latest.step < step:  # a loop that goes on from it
                self.saved_step = latest.step
        stop, now = self.requests()
        reason = self.reason(stop, now) or self.due(step, ended_epochs)
        saved = False
        if reason:
            saved = self._save_state(step, state(), metrics, ended_epochs or 0)
        if stop:
            preemption.disarm()
            raise Preempted(stop)
        return saved

    def _save_state(
        self,
        step: int,
        state: Mapping[str, Any],
        metrics: Mapping[str, float] | None,
        epoch: int,
    ) -> bool:
        tensors = [value for _, value in format.leaves(dict(state)) if isinstance(value, Tensor)]
        started = time.perf_counter()

        def write() -> None:
            self.take_request()
            written = self.store.save(state, step=step, epoch=epoch, metrics=metrics)
            self.succeed(written.path, f"step {step}: ", started)

        return self.attempt(step, None, write, ((), tensors))

    # -- when -------------------------------------------------------------------------------------

    def begin(self) -> None:
        """The training begins: the seconds between saves count from here."""
        self._saved_at = time.monotonic()

    def requests(self) -> tuple[int, bool]:
        """(signal that asks to stop or 0, whether to save now) of this process."""
        since = time.monotonic() - self._saved_at
        now = self.every_secs is not None and since >= self.every_secs
        now = now or (self.failure is not None and since >= RETRY_SECS)
        now = now or preemption.requests.save or self._request.is_file()
        return preemption.requests.stop, now

    def reason(self, stop: int, now: bool) -> str:
        if stop:
            return f"signal {stop}"
        return "request or time" if now else ""

    def due(self, step: int, ended_epochs: int | None = None) -> str:
        """Which interval has passed; "" if none has."""
        if self.every_steps and step // self.every_steps > self.saved_step // self.every_steps:
            return "steps"
        if self.every_epochs and ended_epochs and ended_epochs % self.every_epochs == 0:
            return "epochs"
        return ""

    def is_saved(self, step: int, at: str | None) -> bool:
        """Whether the newest save is of this very step and point."""
        return self._saved == (step, at)

    # -- saving -----------------------------------------------------------------------------------

    def preflight(
        self,
        state: Mapping[str, Any],
        growth_bytes: int,
        *,
        alone: bool = False,
        writes: bool = True,
    ) -> None:
        """What would make the first save fail is said before the first step.

        Args:
            growth_bytes: What the state will likely be larger after a step.
            alone: Whether a lock keeps all others out of the directory.
            writes: Whether this process writes the files.

        Raises:
            CheckpointContentError: A value that could not be read back.
            RunDirectoryError: The directory cannot be written, or is certainly too full.
        """
        format.check_readable(state)
        if not writes:
            return
        least = format.size_bytes(state)
        warning = self.store.preflight(least, least + growth_bytes, alone=alone)
        if warning:
            print(warning, file=sys.stderr, flush=True)

    def attempt(
        self,
        step: int,
        at: str | None,
        write: Callable[[], None],
        weights: tuple[Iterable[Tensor], Iterable[Tensor]],
        reduce: Callable[[Tensor], Tensor] | None = None,
        speaks: bool = True,
    ) -> bool:
        """Calls `write`, if the weights are sound; what the disk or a value refuses is said, and
        training goes on.

        Args:
            weights: Parameters, which must be finite, and buffers, which must hold no NaN.
            reduce: See `FiniteWatch.check_loss`.
            speaks: Whether this is the rank that prints.

        Returns:
            Whether it was written.

        Raises:
            NonFiniteLossError: With `on_nan="stop"`.
        """
        unsound = self.watch.check_weights(*weights, step, self.store, reduce, speaks)
        self.saved_step = step  # or a save that fails would be due again at each step
        if unsound:
            self.fail(unsound, speaks)
            return False
        self._saved = (step, at)
        preemption.requests.save = False
        try:
            write()
        except (OSError, CheckpointContentError) as error:
            self.fail(error, speaks)
            return False
        finally:
            self._saved_at = time.monotonic()
        return True

    def take_request(self) -> None:
        """Takes away the file `save-now`: the save that it asked for is being made."""
        if self._request.is_file():
            self._request.unlink(missing_ok=True)

    def succeed(self, path: Path, said: str, started: float) -> None:
        """Once the file and what points to it are on disk.

        Args:
            said: The beginning of the line that says so.
            started: When, by `time.perf_counter`.
        """
        self.forget_failure()
        if self.committed is not None:
            self.committed(path)
        milliseconds = 1000 * (time.perf_counter() - started)
        print(
            f"{said}saved {path.name} ({megabytes(files.size(path))}, {milliseconds:.0f} ms)",
            flush=True,
        )

    def forget_failure(self) -> None:
        """A later save has succeeded."""
        self.failure = None

    def fail(self, error: Exception, speaks: bool = True) -> None:
        self.failure = error
        self._saved = None
        self._saved_at = time.monotonic()
        said = f"{error} Training goes on; the checkpoints before it are intact."
        if speaks:
            print(said, file=sys.stderr, flush=True)

    @property
    def _request(self) -> Path:
        return self.store.directory.parent / "save-now"
