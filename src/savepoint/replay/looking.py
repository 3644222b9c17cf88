"""What people look for at a step: its batch, loss, rates, and each layer's numbers."""

import hashlib
import pdb
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from savepoint.checkpoint.finite import loss_of
from savepoint.checkpoint.format import leaves, numbers
from savepoint.checkpoint.state.process import isolated_rng
from savepoint.loaders.position import Resumable

Look = Callable[[Trainer, LightningModule, Any, int], Any]


class StepLook(Callback):
    """Looks at the step that leads from `step - 1` steps to `step`.

    With gradients that accumulate, at the last batch of it.

    Args:
        look: A function of the user's, called before the `training_step`. What it draws from the
            global generators is undone.
        debug: Whether a debugger stops in the `training_step`.

    Attributes:
        found: What was seen; empty where the step was not reached.
        batch: Of the step, as the loader gave it, on its device.
    """

    def __init__(self, step: int, *, look: Look | None = None, debug: bool = False) -> None:
        self.step = step
        self.look = look
        self.debug = debug
        self.found: dict[str, Any] = {}
        self.batch: Any = None
        self._seen: dict[str, Any] = {}
        self._before: dict[str, Tensor] = {}
        self._infinite: str | None = None
        self._steps = -1
        self._handles: list[RemovableHandle] = []

    # -- the step ---------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # A batch may make a step of each optimizer.
        if not self.step - len(trainer.optimizers) <= trainer.global_step < self.step:
            return
        self.batch = batch
        if (
            self._steps != trainer.global_step
        ):  # else its gradients accumulate with the batch before
            self._infinite = None
        self._steps = trainer.global_step
        self._seen = {"epoch": trainer.current_epoch, "batch": batch_idx} | self._of(
            trainer, batch, batch_idx
        )
        self._handles = [
            module.register_forward_hook(self._watch(name))
            for name, module in pl_module.named_modules()
            if name
        ]
        if self.look is not None:
            with isolated_rng(pl_module.device):
                self.look(trainer, pl_module, batch, batch_idx)
        if self.debug:
            self._stop_inside(pl_module)

    def _of(self, trainer: Trainer, batch: Any, number: int) -> dict[str, Any]:
        tensors = [value for _, value in leaves(batch) if isinstance(value, Tensor)]
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(
                numbers(tensor).cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
            )
        loader = trainer.train_dataloader
        known = loader.indices(number) if isinstance(loader, Resumable) else None
        return {
            "shapes": [list(tensor.shape) for tensor in tensors],
            "digest": digest.hexdigest(),
            "indices": known,
        }

    def _watch(self, name: str) -> Any:
        def watch(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._infinite is None and not _are_finite(output):
                self._infinite = name

        return watch

    def _stop_inside(self, module: LightningModule) -> None:
        original = module.training_step

        def stopping(*arguments: Any, **named: Any) -> Any:
            del module.training_step
            return pdb.runcall(original, *arguments, **named)

        module.training_step = stopping  # type: ignore[method-assign]

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if trainer.global_step != self.step - 1 or not self._handles:
            return
        self._seen["rates"] = [group["lr"] for group in optimizer.param_groups]
        weights = dict(pl_module.named_parameters())
        self._before = {name: one.detach().clone() for name, one in weights.items()}
        self._seen["layers"] = {
            name: {
                "weight_norm": _norm(one),
                "gradient_norm": None if one.grad is None else _norm(one.grad),
                "finite": _are_finite(one) and (one.grad is None or _are_finite(one.grad)),
            }
            for name, one in weights.items()
        }

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
        if self._handles and trainer.global_step >= self.step and not self.found:
            loss = loss_of(outputs)
            has_loss = isinstance(loss, Tensor) and loss.numel() == 1
            self._seen["loss"] = float(loss) if has_loss else None
            for name, one in pl_module.named_parameters():
                before = self._before.get(name)
                if before is not None:
                    self._seen["layers"][name]["update"] = _ratio(one.detach(), before)
            self._seen["not_finite"] = self._infinite
            self.found = {"step": self.step, **self._seen}
        self._handles = []
        self._before = {}


def _are_finite(value: Any) -> bool:
    return all(bool(torch.isfinite(numbers(tensor)).all()) for tensor in _tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    for _, one in leaves(value):
        if isinstance(one, Tensor) and (one.is_floating_point() or one.is_complex()):
            yield one.detach()


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(numbers(tensor.detach()).double()))


def _ratio(now: Tensor, before: Tensor) -> float | None:
    """||now - before|| / ||before||."""
    size = _norm(before)
    return _norm(now - before) / size if size else None
