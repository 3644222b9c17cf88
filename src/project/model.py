"""The networks, and the LightningModule that trains any of them."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from project.figures import TestFigures
from savepoint.errors import ConfigError
from savepoint.schedules import SCHEDULES, ScheduleName

Batch = tuple[Tensor, Tensor]


class ConvNet(nn.Module):
    """Four batch-normalised convolutions and one linear layer: images (B, 1, 28, 28) to logits (B,
    num_classes).

    Args:
        width: Channels of the first convolution; the others have 2, 3 and 4 times as many. 16:
            47,194 parameters.
    """

    def __init__(self, width: int = 16, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_halve(1, width),  # 28x28 to 14x14
            *_halve(width, 2 * width),  # to 7x7
            *_halve(2 * width, 3 * width),  # to 3x3
            nn.Conv2d(3 * width, 4 * width, kernel_size=3, bias=False),  # to 1x1
            nn.BatchNorm2d(4 * width),
            nn.ReLU(),
        )
        self.classify = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classify(self.features(images).flatten(1))
        return logits


def _halve(channels_in: int, channels_out: int) -> list[nn.Module]:
    # Pooling before normalising leaves a quarter of the work to the slow, memory-bound layers.
    return [
        nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    ]


class ClassicNet(nn.Module):
    """The network of the classic MNIST tutorials, 1.2 million parameters: (B, 1, 28, 28) to logits
    (B, num_classes).
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3)
        self.drop1 = nn.Dropout(0.25)
        self.fc1 = nn.Linear(9216, 128)
        self.drop2 = nn.Dropout(0.5)
        self.fc2 = nn.Linear(128, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(self.conv2(F.relu(self.conv1(images))))
        hidden = F.relu(self.fc1(self.drop1(F.max_pool2d(maps, 2)).flatten(1)))
        logits: Tensor = self.fc2(self.drop2(hidden))
        return logits


class ImageClassifier(LightningModule):
    """Trains a network to name the class of an image.

    Args:
        net: Maps normalised images (B, 1, 28, 28) to logits (B, num_classes).
        lr: The highest learning rate; `schedule` gives the share of it at each step.
        schedule: Over the whole training, as long as the Trainer says it is.
        label_smoothing: Of the training loss only: `val/loss` and `test/loss` are plain
            cross-entropy.
        mean: Subtracted from images in 0..1, before they are divided by `std`.
    """

    def __init__(
        self,
        net: nn.Module,
        lr: float = 0.02,
        weight_decay: float = 0.05,
        optimizer: Literal["adamw", "adam", "sgd", "adadelta"] = "adamw",
        schedule: ScheduleName = "one_cycle",
        label_smoothing: float = 0.1,
        num_classes: int = 10,
        mean: float = 0.1307,
        std: float = 0.3081,
    ) -> None:
        super().__init__()
        # Only values that weights_only=True reads back. A config names its net; a net that was
        # built in Python is not saved: `load_from_checkpoint(path, net=...)` needs it again.
        self.save_hyperparameters(ignore=["net"])
        if "_instantiator" in self.hparams:  # built from a config
            self.save_hyperparameters()
        self.net = net.to(memory_format=torch.channels_last)  # ConvNet: half the time on a CPU
        self.lr = lr
        self.weight_decay = weight_decay
        self.optimizer = optimizer
        self.schedule = schedule
        self.label_smoothing = label_smoothing
        self.mean = mean
        self.std = std
        self.train_loss, self.val_loss, self.test_loss = (
            MeanMetric(nan_strategy="disable") for _ in range(3)
        )
        self.train_accuracy, self.val_accuracy, self.test_accuracy = (
            MulticlassAccuracy(num_classes, average="micro", validate_args=False) for _ in range(3)
        )
        self.example_input_array = (
            (torch.arange(8 * 28 * 28) * 37 % 256).to(torch.uint8).view(8, 1, 28, 28)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, 1, 28, 28), uint8 in 0..255 or float in 0..1."""
        pixels = images.to(self.dtype) / 255 if images.dtype == torch.uint8 else images
        normalised = (pixels - self.mean) / self.std
        logits: Tensor = self.net(normalised.contiguous(memory_format=torch.channels_last))
        return logits

    # The metrics add up at every step and are logged at the end of the epoch: a `self.log` at every
    # step would cost as much time as a tenth of the network.

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        losses = F.cross_entropy(
            logits, labels, label_smoothing=self.label_smoothing, reduction="none"
        )
        loss = losses.mean()
        self.train_loss.update(losses.detach())
        self.train_accuracy.update(logits.detach(), labels)
        log_every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if log_every and (self.global_step + 1) % log_every == 0:
            self.log("train/loss_step", loss.detach(), prog_bar=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("train/loss", self.train_loss)
        self.log("train/accuracy", self.train_accuracy)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.val_loss.update(F.cross_entropy(logits, labels, reduction="none"))
        self.val_accuracy.update(logits, labels)

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", self.val_loss)
        self.log("val/accuracy", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the logits, for the figures."""
        images, labels = batch
        logits: Tensor = self(images)
        self.test_loss.update(F.cross_entropy(logits, labels, reduction="none"))
        self.test_accuracy.update(logits, labels)
        return logits

    def on_test_epoch_end(self) -> None:
        self.log("test/loss", self.test_loss)
        self.log("test/accuracy", self.test_accuracy)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        total_steps = self.trainer.estimated_stepping_batches
        if total_steps == float("inf") and self.schedule != "constant":
            raise ConfigError(
                f"A schedule without an end: model.schedule is {self.schedule}, but the training "
                "has no last step. A schedule is stretched over all steps. Set "
                "--trainer.max_epochs or --trainer.max_steps, or --model.schedule constant."
            )
        optimizer = self._optimizer()
        schedule = SCHEDULES[self.schedule]
        # A lambda, because LambdaLR saves the attributes of any other callable with the checkpoint.
        scheduler = LambdaLR(optimizer, lambda step: schedule(step, total_steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def configure_callbacks(self) -> list[Callback]:
        return [TestFigures()]

    def _optimizer(self) -> Optimizer:
        options: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.optimizer == "adadelta":
            return torch.optim.Adadelta(self.parameters(), **options)
        options["fused"] = True
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), momentum=0.9, nesterov=True, **options)
        adam = torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.Adam
        return adam(self.parameters(), **options)
