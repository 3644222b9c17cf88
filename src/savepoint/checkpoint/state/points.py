"""The points of a training where nothing is half done.

    batch        the train loader is about to be asked for its next batch
    epoch        an epoch is about to begin, or the last one has ended
    validation   inside a validation (signals, saves on demand): the state is that of its start, and
                 a resume runs it again

At Lightning's own hooks a log row, a plateau step or a validation of the same step is still to
come, or the hooks of other callbacks have half run, so a file made there resumes short of them.
What is due there waits for the next point.
"""

from collections.abc import Callable
from typing import Any, Literal

from lightning.pytorch import Trainer

Point = Literal["batch", "epoch", "validation"]


class Points:
    """Calls back at the points of a training where nothing is half done, before any hook of anybody
    runs there.

    Lightning has no hooks at these places: `on_train_epoch_start` comes after those of other
    callbacks, which a resume would run twice. So three functions of this one Trainer's loops are
    called through ours, until `remove`.

    Args:
        epoch: An epoch is about to begin.
        batch: The next batch is about to be asked for. False leaves the batch out: a validation is
            to be run again.
        validation: A validation is about to begin.
        end: The last epoch has ended.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        epoch: Callable[[], None],
        batch: Callable[[], bool],
        validation: Callable[[], None],
        end: Callable[[], None],
    ) -> None:
        self._fit = trainer.fit_loop
        self._epoch_loop = self._fit.epoch_loop
        self._batch = batch
        self.remove()
        self._before(self._fit, "on_advance_start", epoch)
        self._before(self._epoch_loop.val_loop, "run", validation)
        self._before(self._fit, "on_run_end", end)
        advance = self._epoch_loop.advance

        def called_through_ours(fetcher: Any) -> None:
            self._advance(advance, fetcher)

        setattr(self._epoch_loop, "advance", called_through_ours)  # noqa: B010 - an instance's own, as above

    def _before(self, loop: Any, name: str, call: Callable[[], None]) -> None:
        original = getattr(loop, name)

        def called_before() -> Any:
            call()
            return original()

        setattr(loop, name, called_before)

    def _advance(self, advance: Callable[[Any], None], fetcher: Any) -> None:
        begins = not self._epoch_loop.batch_progress.current.ready
        if not self._batch():
            return
        try:
            advance(fetcher)
        except StopIteration:
            if not begins or self._epoch_loop.batch_progress.current.ready or fetcher.fetched:
                raise
            # A loader that was put back to the end of its epoch has nothing more: a new pass
            # begins.
            iter(fetcher)
            advance(fetcher)

    def remove(self) -> None:
        for loop, name in (
            (self._fit, "on_advance_start"),
            (self._fit, "on_run_end"),
            (self._epoch_loop, "advance"),
            (self._epoch_loop.val_loop, "run"),
        ):
            vars(loop).pop(name, None)
