"""Loaders of other kinds: stock ones, streams, lists, loaders with state, several at once."""

from collections import UserList
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, random_split

from savepoint import Batches
from shapes.base import (
    BATCH,
    TRAIN,
    VAL,
    Data,
    Net,
    Samples,
    Shape,
    data,
    resumable,
    shuffled,
    tensors,
    validation,
)


class Stream(IterableDataset[Any]):
    """As long as `count` says; endless without."""

    def __init__(self, count: int | None = TRAIN) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        x, y = tensors()
        i = 0
        while self.count is None or i < self.count:
            yield x[i % TRAIN], y[i % TRAIN]
            i += 1


class RandomStream(Stream):
    def __iter__(self) -> Iterator[Any]:
        for x, y in super().__iter__():
            yield x + 0.1 * torch.randn(4), y


class KeepsPosition:
    """A loader with a position of its own, as torchdata's StatefulDataLoader has."""

    def __init__(self, shuffle: bool = True, sized: bool = True) -> None:
        self.generator, self.shuffle = torch.Generator().manual_seed(2), shuffle
        self.position, self.order, self.resumed = 0, torch.arange(TRAIN), False
        self.x, self.y = tensors()
        if sized:
            self.__class__ = type("Sized", (KeepsPosition,), {"__len__": lambda loader: 10})

    def __iter__(self) -> Iterator[Any]:
        if not self.resumed:
            self.position = 0
            if self.shuffle:
                self.order = torch.randperm(TRAIN, generator=self.generator)
        self.resumed = False
        while self.position < TRAIN:
            pick = self.order[self.position : self.position + BATCH]
            self.position += BATCH
            yield self.x[pick], self.y[pick]

    def state_dict(self) -> dict[str, Any]:
        return {
            "position": self.position,
            "order": self.order,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position, self.order, self.resumed = state["position"], state["order"], True
        self.generator.set_state(state["generator"])


class Several(Net):
    """Takes the batches of several loaders, some of which may have ended."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        parts = list(batch.values()) if isinstance(batch, dict) else batch
        loss = sum(self.loss(part) for part in parts if part is not None)
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=BATCH)
        return loss


class WholeTensors(Net):
    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self(batch[:, :4]), batch[:, 4:])


class Grows(Samples):
    """A curriculum: more of the samples with each epoch."""

    shown = 16

    def __len__(self) -> int:
        return self.shown

    def __getitem__(self, index: int) -> Any:
        return self.x[index % TRAIN] + 0.01 * self.shown, self.y[index % TRAIN]


class Curriculum(Callback):
    def __init__(self) -> None:
        self.samples: Any = None

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        trainer.datamodule.samples.y = trainer.datamodule.samples.y * 0.9


class Held(LightningDataModule):
    """Keeps its data set, as most do."""

    def __init__(self) -> None:
        super().__init__()
        self.samples = Samples()

    def train_dataloader(self) -> Any:
        return resumable(DataLoader(self.samples, BATCH, shuffle=True))

    def val_dataloader(self) -> Any:
        return validation()


class Counts(Held):
    """Counts what it moved, and scales by it."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.trainer.training:
            self.moved += 1
        return batch[0] / (1 + 0.01 * self.moved), batch[1]


class CountsWithState(Counts):
    def state_dict(self) -> dict[str, Any]:
        return {"moved": self.moved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.moved = state_dict["moved"]


class Splits(LightningDataModule):
    """Split by a draw in `setup`, as the tutorials do."""

    def setup(self, stage: str) -> None:
        self.train_set, self.val_set = random_split(TensorDataset(*tensors(52)), [40, 12])

    def train_dataloader(self) -> Any:
        return resumable(DataLoader(self.train_set, BATCH, shuffle=True))

    def val_dataloader(self) -> Any:
        return DataLoader(self.val_set, BATCH)


class Reloads(Held):
    """A larger batch with each time the loader is made."""

    made = 0

    def train_dataloader(self) -> Any:
        self.made += 1
        size = 4 if self.trainer.current_epoch == 0 else 8
        return resumable(DataLoader(self.samples, size, shuffle=True))


class LargerBatches(Held):
    """The loader is made anew, of a batch size that a hook has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 4

    def train_dataloader(self) -> Any:
        return resumable(DataLoader(self.samples, self.size, shuffle=True))


class Enlarge(Callback):
    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        trainer.datamodule.size += 1


class Noises(Held):
    """Random augmentation of whole batches, after the transfer."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]


def other(count: int = 24) -> Any:
    return resumable(DataLoader(TensorDataset(*tensors(count, 5)), BATCH, shuffle=True))


def stock(**arguments: Any) -> Any:
    return DataLoader(TensorDataset(*tensors()), BATCH, **arguments)


def whole_batches() -> list[Any]:
    x, y = tensors()
    return [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, TRAIN, BATCH)]


def combined(mode: str) -> Any:
    return data(lambda: CombinedLoader({"a": shuffled(), "b": other()}, mode))


INTERVAL = {"val_check_interval": 3}
SHAPES = {
    "stock": Shape(data=data(stock)),
    "stock_shuffled": Shape(data=data(lambda: stock(shuffle=True))),
    "stock_shuffled_interval": Shape(data=data(lambda: stock(shuffle=True)), trainer=INTERVAL),
    "stock_workers": Shape(
        data=data(lambda: stock(shuffle=True, num_workers=2)),
        trainer={"max_epochs": 2},
        slow=True,
    ),
    "stream": Shape(data=data(lambda: DataLoader(Stream(), BATCH))),
    "stream_random": Shape(data=data(lambda: DataLoader(RandomStream(), BATCH))),
    "endless": Shape(
        data=data(lambda: DataLoader(Stream(None), BATCH)),
        trainer={"max_steps": 25, "max_epochs": -1, "val_check_interval": 6},
    ),
    "endless_limited": Shape(
        data=data(lambda: DataLoader(Stream(None), BATCH)),
        trainer={"limit_train_batches": 10},
    ),
    "keeps_position": Shape(data=data(KeepsPosition)),
    "keeps_position_in_order": Shape(data=data(lambda: KeepsPosition(shuffle=False))),
    "keeps_position_interval": Shape(data=data(KeepsPosition), trainer=INTERVAL),
    "keeps_position_unsized": Shape(data=data(lambda: KeepsPosition(sized=False))),
    "list_of_batches": Shape(data=data(lambda: UserList(whole_batches()))),
    "batches": Shape(
        data=data(lambda: Batches(*tensors(), batch_size=BATCH, seed=1)),
        trainer=INTERVAL,
    ),
    "tensor": Shape(
        model=WholeTensors,
        data=lambda: {
            "train_dataloaders": resumable(
                DataLoader(torch.cat(tensors(), 1), BATCH, shuffle=True),
            ),
            "val_dataloaders": DataLoader(torch.cat(tensors(VAL, 1), 1), BATCH),
        },
    ),
    "no_data_module": Shape(
        data=lambda: {"train_dataloaders": shuffled(), "val_dataloaders": validation()},
    ),
    "no_validation": Shape(data=lambda: {"train_dataloaders": shuffled()}),
    "two_in_a_dict": Shape(model=Several, data=data(lambda: {"a": shuffled(), "b": other(40)})),
    "two_in_a_list": Shape(model=Several, data=data(lambda: [shuffled(), other()])),
    "combined_min_size": Shape(model=Several, data=combined("min_size")),
    "combined_max_size": Shape(model=Several, data=combined("max_size")),
    "combined_max_size_cycle": Shape(model=Several, data=combined("max_size_cycle")),
    "combined_sequential_validations": Shape(
        data=data(
            val=lambda: CombinedLoader([validation(), validation(shuffle=True)], "sequential"),
        ),
        trainer=INTERVAL,
    ),
    "combined_stock": Shape(
        model=Several,
        data=data(lambda: CombinedLoader([stock(shuffle=True), stock()], "min_size")),
    ),
    "two_validations": Shape(data=data(val=lambda: [validation(), validation(batch_size=6)])),
    "two_validations_interval": Shape(
        data=data(val=lambda: [validation(shuffle=True), validation()]),
        trainer=INTERVAL,
    ),
    "validation_shuffled": Shape(data=data(val=lambda: validation(shuffle=True))),
    "validation_resumable": Shape(
        data=data(val=lambda: resumable(validation(shuffle=True))),
        trainer=INTERVAL,
    ),
    "validation_workers": Shape(
        data=data(val=lambda: validation(num_workers=1)),
        trainer={"max_epochs": 2},
        slow=True,
    ),
    "growing": Shape(data=data(lambda: resumable(DataLoader(Grows(), BATCH, shuffle=True)))),
    "curriculum": Shape(data=Held, callbacks=lambda: [Curriculum()]),
    "counts": Shape(data=Counts, extra=lambda m, t: t.datamodule.moved),
    "counts_interval": Shape(data=Counts, trainer=INTERVAL, extra=lambda m, t: t.datamodule.moved),
    "counts_with_state": Shape(data=CountsWithState, extra=lambda m, t: t.datamodule.moved),
    "splits": Shape(data=Splits),
    "reloads": Shape(data=Reloads, trainer={"reload_dataloaders_every_n_epochs": 1}),
    "larger_batches": Shape(
        data=LargerBatches,
        callbacks=lambda: [Enlarge()],
        trainer={"reload_dataloaders_every_n_epochs": 1},
    ),
    "noises": Shape(data=Noises, trainer=INTERVAL),
    "unseeded_module": Shape(data=lambda: Data(shuffled), seeded=False, trainer=INTERVAL),
}
