"""A callback that a config can name: it makes a training another one from a step on."""

import os
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class Planted(Callback):
    """From the batch on that leads to `step`.

    Args:
        what: "weight" has changed once; "late", too, and each checkpoint before it differs;
            "order": another order of the samples, from the next epoch; "noise": an operation that
            is not deterministic; "nothing".
    """

    def __init__(self, what: str, step: int = 6) -> None:
        self.what, self.step = what, step

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.what == "order" and trainer.global_step + 1 >= self.step:
            trainer.train_dataloader._seed = 99

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if self.what in ("weight", "late") and trainer.global_step + 1 == self.step:
            next(module.parameters()).data.view(-1)[3] += 1

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step} if self.what == "late" else {}

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.what != "noise":
            return

        def noise(layer: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
            begun = module.training and trainer.global_step + 1 >= self.step
            return output + os.urandom(1)[0] / 100 if begun else None

        module.net.classify.register_forward_hook(noise)
