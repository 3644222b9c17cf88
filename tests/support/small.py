"""A training small enough to be resumed hundreds of times, with everything in it that a resume can
lose.
"""

import csv
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from savepoint import Batches, resumable
from savepoint.checkpoint import store
from savepoint.checkpoint.callback import CheckpointCallback
from savepoint.checkpoint.trainer_saver import TrainerSaver
from savepoint.testing import difference, final_state
from savepoint.training.logs import RunCSVLogger


class SmallModel(LightningModule):
    """Dropout, batch norm, draws from every generator, metrics, and sums logged in every way."""

    def __init__(
        self,
        schedule: str = "one_cycle",
        automatic: bool = True,
        forever: bool = False,
        lr: float = 0.05,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.schedule, self.automatic_optimization, self.lr = schedule, automatic, lr
        self.net = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
        )
        self.train_accuracy = MulticlassAccuracy(3)
        self.forever = MulticlassAccuracy(3) if forever else None
        self.val_accuracy = MulticlassAccuracy(3)
        self.example_input_array = torch.linspace(-1, 1, 24).view(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        noise = torch.randn_like(x) + float(np.random.rand()) + __import__("random").random()
        loss = nn.functional.cross_entropy(self(x + 0.1 * noise), y)
        self.train_accuracy(self(x), y)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("train/biggest", loss.detach(), on_step=False, on_epoch=True, reduce_fx="max")
        self.log("train/accuracy", self.train_accuracy, on_step=True, on_epoch=True)
        if self.forever is not None:
            self.forever.update(self(x), y)
        if not self.automatic_optimization:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
        return loss

    def validation_step(
        self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        x, y = batch
        logits = self(x + 0.01 * torch.randn_like(x))
        self.val_accuracy(logits, y)
        self.log(
            "val/loss",
            nn.functional.cross_entropy(logits, y),
            add_dataloader_idx=dataloader_idx > 0,
        )
        if dataloader_idx == 0:
            self.log("val/accuracy", self.val_accuracy, add_dataloader_idx=False)

    def configure_optimizers(self) -> Any:
        if not self.automatic_optimization:
            halves = list(self.net[:2].parameters()), list(self.net[2:].parameters())
            return [
                torch.optim.SGD(halves[0], lr=0.05, momentum=0.9),
                torch.optim.AdamW(halves[1], lr=0.01),
            ]
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        if self.schedule == "one_cycle":
            total = self.trainer.estimated_stepping_batches
            scheduler = LambdaLR(optimizer, lambda step: 1 - min(step, total) / total)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
            }
        interval = self.schedule.removeprefix("plateau_")
        monitor = "val/loss" if interval == "epoch" else "train/loss"
        scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.7)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": interval, "monitor": monitor},
        }


class SmallData(LightningDataModule):
    def __init__(self, workers: int | None = None, samples: int = 22, validations: int = 1) -> None:
        super().__init__()
        self.workers, self.validations = workers, validations
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(samples + 9, 6, generator=generator)
        self.y = torch.randint(0, 3, (samples + 9,), generator=generator)
        self.samples = samples
        self.name, self.fingerprint = "small", str(samples)

    def train_dataloader(self) -> Any:
        x, y = self.x[: self.samples], self.y[: self.samples]
        if self.workers is None:
            ranks = {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
            return Batches(x, y, batch_size=4, seed=3, **ranks)
        return resumable(
            DataLoader(TensorDataset(x, y), 4, shuffle=True, num_workers=self.workers), seed=3
        )

    def val_dataloader(self) -> Any:
        x, y = self.x[self.samples :], self.y[self.samples :]
        loaders = [
            Batches(x, y, batch_size=4, seed=3, shuffle=False) for _ in range(self.validations)
        ]
        return loaders if self.validations > 1 else loaders[0]


class EveryPoint(CheckpointCallback):
    """Saves at every point at which the callback would look whether a save is due, and keeps every
    file.
    """

    def __init__(self, keep_in: Path, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.keep_in, self.kept = keep_in, []
        keep_in.mkdir(parents=True, exist_ok=True)
        self.saver.__class__ = self._Saver
        self.saver.keep = self._keep

    class _Saver(TrainerSaver):
        keep: Callable[[Trainer, str], None]

        def agree(self, trainer: Trainer) -> tuple[int, bool]:
            return 0, True

        def save(self, trainer: Trainer, at: Any, **arguments: Any) -> None:
            super().save(trainer, at, **arguments)
            self.finish_writing(trainer)
            self.keep(trainer, at)

    def _keep(self, trainer: Trainer, at: str) -> None:
        if trainer.is_global_zero:
            copy = self.keep_in / f"{len(self.kept):03d}-{at}-{trainer.global_step}.ckpt"
            saved = self.store.path(trainer.global_step)
            shutil.copytree(saved, copy) if saved.is_dir() else shutil.copy(saved, copy)
            self.kept.append(copy)


def fit(
    directory: Path,
    *,
    checkpointing: CheckpointCallback | None = None,
    model: Callable[[], LightningModule] = SmallModel,
    data: Callable[[], LightningDataModule] = SmallData,
    callbacks: Callable[[], list[Callback]] = list,
    ckpt_path: Path | None = None,
    keep_rows: int = 0,
    **arguments: Any,
) -> Trainer:
    seed_everything(1, verbose=False)
    directory.mkdir(parents=True, exist_ok=True)
    checkpointing = checkpointing or CheckpointCallback(mode="min", monitor="val/loss")
    trainer = Trainer(
        callbacks=[*callbacks(), checkpointing],
        default_root_dir=str(directory),
        logger=RunCSVLogger(directory / "metrics.csv", keep_rows),
        **{
            "accelerator": "cpu", "max_epochs": 3, "log_every_n_steps": 2, "enable_progress_bar": False,
            "enable_model_summary": False, "num_sanity_val_steps": 0, **arguments,
        },
    )  # fmt: skip
    trainer.fit(model(), datamodule=data(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "time/secs"} for row in csv.DictReader(file)]


def rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open(newline="") as file:
        return [
            {k: v for k, v in row.items() if not k.startswith("time/") and v}
            for row in csv.DictReader(file)
        ]


def resume_differs(straight: Path, file: Path, work: Path, **arguments: Any) -> list[str]:
    """Resumes `file` of the run in `straight` in a directory of its own; what is different at the
    end.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    shutil.copy(straight / "metrics.csv", work)
    state, _ = store.load(file)
    fit(work, ckpt_path=file, keep_rows=state["logged_rows"], **arguments)
    found = list(difference(final_state(straight), final_state(work)))
    return found + [f"row: {a} and {b}" for a, b in zip_rows(rows(straight), rows(work)) if a != b]


def zip_rows(one: list[Any], other: list[Any]) -> list[tuple[Any, Any]]:
    longest = max(len(one), len(other))
    return list(
        zip(
            one + [None] * (longest - len(one)),
            other + [None] * (longest - len(other)),
            strict=True,
        )
    )


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
