"""A part of a run is trained again, and each batch of it is written down: the digest of all that
goes into the batch, and of all that comes out of it.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from savepoint.checkpoint.finite import loss_of
from savepoint.checkpoint.format import fingerprint, leaves
from savepoint.checkpoint.state.process import capture_rng, environment
from savepoint.errors import NonFiniteLossError
from savepoint.loaders.position import Resumable
from savepoint.replay import choice
from savepoint.replay.playing import Goal, play
from savepoint.replay.side import ENVIRONMENT, KEPT, KINDS, RECORDS, RUN, Keep, Part


def record(part: Part, directory: Path, keep: Keep | None) -> None:
    """Trains a part in `directory`, and leaves there what `side.Recorded` reads."""
    source = choice.load(Path(part.checkpoint))
    (directory / ENVIRONMENT).write_text(json.dumps(environment(torch.device("cpu"))))
    with (directory / RECORDS).open("w") as file:
        recorder = Recorder(file, keep)
        goal = Goal(part.step, part.at, saves=keep is None)  # type: ignore[arg-type]
        # A state that is not finite is recorded, and cannot be saved.
        with suppress(NonFiniteLossError):
            play(
                source,
                directory,
                RUN,
                goal,
                callbacks=[recorder],
                allow=part.allow,
                config=part.config,
                anew=part.anew,
            )
    torch.save(recorder.kept, directory / KEPT)


class Recorder(Callback):
    """Writes a line of JSON for each batch: `step`, which the batch is part of, `epoch`, `batch`,
    and `values`: kind -> name -> digest, in the order in which a difference would spread.

    Args:
        keep: The values themselves are kept of some places in one line.
    """

    def __init__(self, file: IO[str], keep: Keep | None) -> None:
        self.kept: dict[str, dict[str, Any]] = {}
        self._file = file
        self._keep = keep
        self._lines = 0
        self._line: dict[str, Any] = {}
        self._handles: list[RemovableHandle] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._line = {
            "step": trainer.global_step + 1,
            "epoch": trainer.current_epoch,
            "batch": batch_idx,
            "values": {kind: {} for kind in KINDS},
        }
        loader = trainer.train_dataloader
        if isinstance(loader, Resumable):
            self._put("samples", "the batch", loader.indices(batch_idx))
        for name, one in leaves(batch, "batch"):
            self._put("batch", name, one)
        self._put_all("weight", _weights(pl_module))
        self._put_all("random state", capture_rng(pl_module.device).items())
        self._handles = [
            module.register_forward_hook(self._watch(name))
            for name, module in pl_module.named_modules()
            if name
        ]

    def _watch(self, name: str) -> Any:
        def watch(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = [one for _, one in leaves(output) if isinstance(one, Tensor)]
            self._put("output", name, tensors[0] if len(tensors) == 1 else tensors)

        return watch

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if not self._line:
            return
        # A gradient comes out of the last layer first.
        for name, one in reversed(list(pl_module.named_parameters())):
            if one.grad is not None:
                self._put("gradient", name, one.grad)
        self._put_all("setting", _settings(trainer.optimizers, optimizer))

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        loss = loss_of(outputs)
        self._put("loss", "the batch", loss)
        self._put_all("optimizer state", _states(trainer.optimizers, pl_module))
        self._put_all("weight after the step", _weights(pl_module))
        self._file.write(json.dumps(self._line) + "\n")
        self._line = {}
        self._lines += 1

    def _put_all(self, kind: str, values: Any) -> None:
        for name, value in values:
            self._put(kind, name, value)

    def _put(self, kind: str, name: str, value: Any) -> None:
        values = self._line["values"][kind]
        times = 2
        place = name
        while place in values:  # a module that is called again, a second step in the batch
            place = f"{name} ({times})"
            times += 1
        try:
            values[place] = fingerprint(value)[:16]
        except TypeError:  # an object, which is no value to compare
            return
        keep = self._keep
        if keep is not None and self._lines == keep.line and (kind, place) in keep.places:
            is_tensor = isinstance(value, Tensor)
            self.kept.setdefault(kind, {})[place] = (
                value.detach().cpu().clone() if is_tensor else value
            )


def _weights(module: LightningModule) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _settings(optimizers: Sequence[Optimizer], optimizer: Optimizer) -> Iterator[tuple[str, Any]]:
    """The rates and other numbers of an optimizer, as `lr`."""
    of_which = _prefix(optimizers, optimizer)
    for place, group in enumerate(optimizer.param_groups):
        of_group = f" of group {place + 1}" if len(optimizer.param_groups) > 1 else ""
        for name, value in group.items():
            if name not in ("params", "initial_lr") and value is not None:
                yield f"{of_which}{name}{of_group}", value


def _states(optimizers: Sequence[Optimizer], module: LightningModule) -> Iterator[tuple[str, Any]]:
    names: dict[Tensor, str] = {one: name for name, one in module.named_parameters()}
    for optimizer in optimizers:
        of_which = _prefix(optimizers, optimizer)
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                yield f"{of_which}{key} of {names.get(parameter, '?')}", value


def _prefix(optimizers: Sequence[Optimizer], optimizer: Optimizer) -> str:
    if len(optimizers) == 1:
        return ""
    return f"optimizer {[id(one) for one in optimizers].index(id(optimizer)) + 1}: "
