"""What a shape is, and the plain network, data and logger that most of them vary."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import savepoint

TRAIN, VAL, BATCH = 40, 12, 4


WRAPPED = True  # whether `resumable` wraps: not where Lightning trains alone


def resumable(loader: DataLoader[Any]) -> Any:
    """Savepoint's, or the loader as it is."""
    return savepoint.resumable(loader) if WRAPPED else loader


class Net(LightningModule):
    """Ten steps an epoch, and nothing in it that a resume could lose."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        optimizer.step()
        self.log("train/loss", loss.detach(), on_step=True, on_epoch=True)
        return loss


def tensors(count: int = TRAIN, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed))
    return x, x.sum(1, keepdim=True)


class Samples(Dataset[Any]):
    """A map-style data set to build on."""

    def __init__(self, count: int = TRAIN, seed: int = 0) -> None:
        self.x, self.y = tensors(count, seed)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.y[index]


def shuffled(**arguments: Any) -> Any:
    arguments = {"batch_size": BATCH, "shuffle": True, **arguments}
    return resumable(DataLoader(TensorDataset(*tensors()), **arguments))


def validation(**arguments: Any) -> Any:
    arguments = {"batch_size": BATCH, **arguments}
    return DataLoader(TensorDataset(*tensors(VAL, 1)), **arguments)


class Data(LightningDataModule):
    def __init__(
        self,
        train: Callable[[], Any] = shuffled,
        val: Callable[[], Any] = validation,
    ) -> None:
        super().__init__()
        self.make_train, self.make_val = train, val

    def train_dataloader(self) -> Any:
        return self.make_train()

    def val_dataloader(self) -> Any:
        return self.make_val()


def data(train: Callable[[], Any] = shuffled, val: Callable[[], Any] = validation) -> Any:
    """The factory of a data module with these loaders."""
    return lambda: Data(train, val)


class RowLogger(Logger):
    """Keeps each row that is logged; `rows` is how many, as a checkpoint counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int | None, dict[str, Any]]] = []

    name, version = "rows", 0

    @property
    def rows(self) -> int:
        return len(self.logged)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


def nothing(*args: Any) -> None: ...


@dataclass(frozen=True)
class Shape:
    """One training.

    Attributes:
        data: Makes a data module, or the arguments of `fit`.
        extra: What else has to be equal at the end, of the model and the Trainer.
        seeded: Whether the script seeds all generators; without, each start has a seed of its own.
        clocks: Beginnings of the names of rows that are read off a clock.
        slow: Resumed from fewer points: worker processes take their time to start.
        reset: What a new process would find anew (class attributes, globals).
    """

    model: Callable[[], LightningModule] = Net
    data: Callable[[], LightningDataModule | dict[str, Any]] = Data
    callbacks: Callable[[], list[Callback]] = list
    trainer: Mapping[str, Any] = field(default_factory=dict)
    checkpointing: Mapping[str, Any] = field(default_factory=dict)
    extra: Callable[[Any, Trainer], Any] = nothing
    seeded: bool = True
    clocks: tuple[str, ...] = ()
    slow: bool = False
    reset: Callable[[], None] = nothing
