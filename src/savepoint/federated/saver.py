"""When the server of a federated run is saved: at the end of a round, as a Trainer is at the end of
an epoch.
"""

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from savepoint import preemption
from savepoint.checkpoint.saver import Saver
from savepoint.checkpoint.scores import Scores
from savepoint.checkpoint.store import CheckpointStore
from savepoint.errors import CheckpointSaveError
from savepoint.preemption import Preempted
from savepoint.run import Run
from savepoint.training.logs import RunCSVLogger

Made = tuple[Mapping[str, Any], Mapping[str, Any]]
"""The state of a checkpoint, and its facts."""


class RoundSaver(Saver):
    """A `Saver` of a server. Round, step and epoch are one number.

    Args:
        log: Its rows are on disk before the checkpoint that counts them.
        saved: Called after each save, for what is derived from it.
        parameters: Names in the state_dict, of what must be finite.
    """

    def __init__(
        self,
        store: CheckpointStore,
        scores: Scores,
        run: Run,
        log: RunCSVLogger,
        saved: Callable[[], None],
        parameters: Collection[str],
        **intervals: Any,
    ) -> None:
        super().__init__(store, **intervals)
        self.scores = scores
        self.run = run
        self.log = log
        self.saved = saved
        self.parameters = frozenset(parameters)

    def end_round(
        self, server_round: int, make: Callable[[str, str | None], Made], ended: str
    ) -> None:
        """Saves where that is due or asked for, or where the run has ended; stops where a signal
        has asked.

        Args:
            make: Called with why it is saved, and how the run has ended, if a save is made.
            ended: "" where it goes on.

        Raises:
            Preempted: After the save.
            NonFiniteLossError: The weights are not finite, with `on_nan="stop"`.
        """
        stop, now = self.requests()
        reason = self.reason(stop, now) or self.due(server_round, server_round)
        if not reason and self.scores.best_step == server_round and self.scores.best is not None:
            reason = "best"
        if reason or ended:
            self.save(server_round, make, reason or "end", ended)
        if stop and not ended:
            preemption.disarm()
            raise Preempted(stop)

    def save(
        self,
        server_round: int,
        make: Callable[[str, str | None], Made],
        reason: str,
        ended: str = "",
    ) -> None:
        state, facts = make(reason, ended or None)
        started = time.perf_counter()
        said = f"round {server_round}: {self.scores.sentence(server_round)}"

        def write() -> None:
            self._sync_log()
            written = self.store.write(state, facts)
            self.store.commit()
            self.succeed(written.path, said, started)
            self.saved()

        weights: Mapping[str, Tensor] = state["state_dict"]
        parameters = [weights[name] for name in self.parameters]
        buffers = [one for name, one in weights.items() if name not in self.parameters]
        self.attempt(server_round, "round", write, (parameters, buffers))

    def _sync_log(self) -> None:
        self.run.check()
        try:
            self.take_request()
            self.log.sync()
        except OSError as error:
            path = self.store.directory
            raise CheckpointSaveError(
                f"The log could not be written before the save: {path} ({error}).", path
            ) from error
