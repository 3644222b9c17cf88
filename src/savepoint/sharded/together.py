"""What all ranks do together: a failure of one is a failure of all, and nobody waits for it."""

import datetime
import errno
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from savepoint.errors import CheckpointContentError, CheckpointSaveError

TIMEOUT_SECS = 1800.0  # how long the others wait for the slowest

T = TypeVar("T")


class Ranks:
    """All processes of a training, on a group of their own: on the CPU, whatever the training's is,
    and no collective of the training comes between.

    Made on all ranks at the same moment. What grows with their number is one small message from
    each to the first, and one back.
    """

    def __init__(self) -> None:
        self.rank = 0
        self.number = 1
        self._group: Any = None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.rank = torch.distributed.get_rank()
            self.number = torch.distributed.get_world_size()
            timeout = datetime.timedelta(seconds=TIMEOUT_SECS)
            self._group = torch.distributed.new_group(backend="gloo", timeout=timeout)

    def together(self, job: Callable[[], T]) -> list[T]:
        """Runs `job` on each rank. Returns the results of all on the first one, nothing elsewhere.

        Raises:
            CheckpointSaveError: on all ranks, where the job failed on one.
        """
        own: tuple[T | None, tuple[int | None, str] | None] = (None, None)
        try:
            own = (job(), None)
        except (OSError, CheckpointContentError) as error:
            own = (None, (getattr(error, "errno", None), str(error)))
        everyone = self._gather(own)
        failures = [(rank, one[1]) for rank, one in enumerate(everyone) if one[1] is not None]
        # A full disk first: there something can be done.
        failures.sort(key=lambda one: one[1][0] != errno.ENOSPC)
        self._raise(self._tell(failures[0] if failures else None))
        return [one[0] for one in everyone]

    def first(self, job: Callable[[], T]) -> T:
        """Runs `job` on the first rank, and returns its result on all.

        Raises:
            CheckpointSaveError: on all ranks, where the job failed.
        """
        result: Any = None
        failure = None
        if self.rank == 0:
            try:
                result = job()
            except (OSError, CheckpointContentError) as error:
                failure = (0, (getattr(error, "errno", None), str(error)))
        result, failure = self._tell((result, failure))
        self._raise(failure)
        told: T = result
        return told

    def _raise(self, failure: tuple[int, tuple[int | None, str]] | None) -> None:
        if failure is None:
            return
        rank, (number, text) = failure
        where = f"On rank {rank}: " if self.number > 1 else ""
        error = CheckpointSaveError(f"{where}{text}", "")
        error.errno = number
        raise error

    def _gather(self, own: Any) -> list[Any]:
        if self._group is None:
            return [own]
        everyone: list[Any] | None = [None] * self.number if self.rank == 0 else None
        torch.distributed.gather_object(own, everyone, group=self._group)
        return everyone or []

    def _tell(self, what: Any) -> Any:
        """The first rank's, on all."""
        if self._group is None:
            return what
        told = [what]
        torch.distributed.broadcast_object_list(told, group=self._group)
        return told[0]
