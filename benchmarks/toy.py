"""What the faults hit and what is saved for the clock: a training of any size in which nothing that
a resume could lose goes unnoticed.
"""

import os
import random
import struct
import time
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn

from savepoint import Batches

# One record a step: its number, and when it was done (time.monotonic is one clock for all processes
# of a machine).
STEP = struct.Struct("<qd")
STEPS_KEY = "FAULTS_STEPS"  # the environment says where they go


class Toy(LightningModule):
    """Draws from every generator at every step, so that a state that was lost shows in the weights
    at the end.

    Args:
        megabytes: Of the state, about; AdamW holds every weight three times.
    """

    def __init__(self, megabytes: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        width = round((megabytes * 1e6 / 12) ** 0.5)
        self.net = nn.Sequential(
            nn.Linear(16, width),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 3),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        noise = torch.randn_like(x) * float(np.random.rand()) * random.random()
        loss = nn.functional.cross_entropy(self.net(x + noise), y)
        self.log("train/loss", loss)
        self.log("progress", float(self.global_step + 1))  # ranks: it improves at every step
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val/loss", nn.functional.cross_entropy(self.net(x), y))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Numbers(LightningDataModule):
    """`batches` batches of four an epoch, in an order that is shuffled anew in each."""

    def __init__(self, batches: int = 16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(4 * batches + 4, 16, generator=generator)
        self.y = torch.randint(0, 3, (4 * batches + 4,), generator=generator)

    def train_dataloader(self) -> Any:
        return Batches(self.x[4:], self.y[4:], batch_size=4, seed=3)

    def val_dataloader(self) -> Any:
        return Batches(self.x[:4], self.y[:4], batch_size=4, seed=3, shuffle=False)


class Steps(Callback):
    """Notes every step that is done, in a file that a kill cannot take back."""

    def __init__(self) -> None:
        self._file = os.open(os.environ[STEPS_KEY], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        os.write(self._file, STEP.pack(trainer.global_step, time.monotonic()))
