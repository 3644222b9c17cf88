"""Nothing numeric is silent: the first loss that is NaN or infinite is told, and such a state is
never saved.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from savepoint import record
from savepoint.checkpoint import format
from savepoint.checkpoint.store import CheckpointStore
from savepoint.errors import CheckpointSaveError, NonFiniteLossError
from savepoint.words import python, show

NEVER = 2**62  # the step of the first non-finite loss, while there is none
_SMALL = (torch.float16, torch.bfloat16)  # whose sums would overflow, or be those of few values


def loss_of(outputs: Any) -> Any:
    """The loss in what a `training_step` has returned. That may be nothing, a dict without a loss
    or, under manual optimization, anything.
    """
    return outputs.get("loss") if isinstance(outputs, Mapping) else outputs


class FiniteWatch:
    """Watches the training loss without making the device wait, and the weights before each save.

    Args:
        on_nan: stop the training, or warn.
    """

    def __init__(self, on_nan: Literal["stop", "warn"]) -> None:
        self.on_nan = on_nan
        self._told: int | None = None
        self._first_bad = torch.tensor(NEVER)

    def begin(self, device: torch.device) -> None:
        # Kept on the device: asking for the value at every step would make the device wait at every
        # step.
        self._first_bad = torch.tensor(NEVER, device=device)

    def see(self, loss: Tensor, step: int) -> None:
        self._first_bad = torch.where(
            torch.isfinite(loss).all(), self._first_bad, self._first_bad.clamp(max=step)
        )

    def check_loss(
        self,
        store: CheckpointStore,
        reduce: Callable[[Tensor], Tensor] | None = None,
        speaks: bool = True,
    ) -> int | None:
        """The first step with a loss that is not finite, said once; None if there is none.

        Args:
            reduce: The smallest of all ranks' numbers; all of them ask at the same steps.
            speaks: Whether this is the rank that prints.

        Raises:
            NonFiniteLossError: with `on_nan: stop`.
        """
        first = int(reduce(self._first_bad) if reduce else self._first_bad)
        if first == NEVER:
            return None
        message = _message(f"The training loss is not finite: first at step {first}.", store, first)
        if self.on_nan == "stop":
            raise NonFiniteLossError(message)
        if self._told != first and speaks:
            print(message, file=sys.stderr, flush=True)
        self._told = first
        return first

    def check_weights(
        self,
        parameters: Iterable[Tensor],
        buffers: Iterable[Tensor],
        step: int,
        store: CheckpointStore,
        reduce: Callable[[Tensor], Tensor] | None = None,
        speaks: bool = True,
    ) -> CheckpointSaveError | None:
        """Why the state must not be saved; None where it may. NaN weights never become the latest
        checkpoint, or retention would delete the good ones.

        Args:
            parameters: Must be finite.
            buffers: Must hold no NaN: a mask may well be infinite.

        Raises:
            NonFiniteLossError: with `on_nan: stop`.
        """
        first = self.check_loss(store, reduce, speaks)
        sound = _all_finite(list(parameters), list(buffers))
        if reduce:  # statistics are each rank's own: all ranks save, or none
            sound = bool(reduce(self._first_bad.new_tensor(int(sound))))
        if sound:
            self._first_bad.fill_(NEVER)  # at most a bad batch, left out by a gradient scaler
            return None
        began = f" (the training loss: first at step {first})" if first is not None else ""
        what = f"The weights are not finite at step {step}{began}."
        message = _message(what, store, step if first is None else first)
        if self.on_nan == "stop":
            raise NonFiniteLossError(message)
        return CheckpointSaveError(message, store.directory)


def _all_finite(parameters: list[Tensor], buffers: list[Tensor]) -> bool:
    """A sum is finite only if all that is summed is. It takes no memory, and a device is waited for
    once, for all of them.
    """
    tensors = [format.numbers(tensor) for tensor in (*parameters, *buffers) if tensor.numel()]
    sums = [
        tensor.sum(dtype=torch.float32 if tensor.dtype in _SMALL else None) for tensor in tensors
    ]
    on_each = defaultdict(list)
    for one in sums:
        on_each[one.device].append(one.abs().float())
    if all(bool(torch.stack(some).isfinite().all()) for some in on_each.values()):
        return True
    # A sum may also overflow, and that of a buffer is infinite where a value is.
    return all(map(_finite, parameters)) and not any(
        bool(torch.isnan(format.numbers(buffer)).any()) for buffer in buffers
    )


def _finite(weights: Tensor) -> bool:
    return all(
        bool(torch.isfinite(part).all())
        for part in torch.split(format.numbers(weights).reshape(-1), 1 << 22)
    )


def _message(what: str, store: CheckpointStore, step: int) -> str:
    if (latest := store.latest()) is None:
        return (
            f"{what} No training recovers from it. There is no checkpoint yet. Start again with a "
            "lower learning rate."
        )
    where = f"The last checkpoint is from before it: {latest.path}"
    run = store.directory.parent
    look = ""
    if (run / record.NAME).is_file():  # not of a training loop of one's own
        look = f" Look at that step: {python()} -m savepoint replay {show(run)} --step {step}"
    return (
        f"{what} No training recovers from it. {where}. Go on from there with a lower learning "
        f"rate (--allow model.lr).{look}"
    )
