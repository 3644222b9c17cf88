"""One rank of a training with a global batch: see test_elastic.py.

python -m support.elastic_ranks DIRECTORY RANKS KIND [FILE ...]     with LOCAL_RANK, MASTER_ADDR and
                                                                   MASTER_PORT set

Without a FILE it trains in DIRECTORY, and saves at every safe point to DIRECTORY/points. Else it
goes on from each of these checkpoints in DIRECTORY/NAME. Each rank appends the samples of each of
its batches to seen-RANK.jsonl.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from savepoint import Batches, ElasticDDP, resumable
from savepoint.checkpoint import store
from support.small import EveryPoint, fit

SAMPLES = 70
GLOBAL = 16
EACH = 2  # samples a batch: 8 batches to a step


class Numbered(LightningDataModule):
    """Samples that carry their number."""

    def __init__(self, loader: str = "batches") -> None:
        super().__init__()
        self.loader = loader
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(SAMPLES + 10, 6, generator=generator)
        self.y = torch.randint(0, 3, (SAMPLES + 10,), generator=generator)
        self.number = torch.arange(SAMPLES + 10)
        self.name = "numbered"
        self.fingerprint = "1"

    def train_dataloader(self) -> Any:
        tensors = self.x[:SAMPLES], self.y[:SAMPLES], self.number[:SAMPLES]
        if self.loader == "batches":
            return Batches(
                *tensors, batch_size=EACH, seed=3, global_batch_size=GLOBAL, augment=shaken
            )
        loader = DataLoader(TensorDataset(*tensors), EACH, shuffle=True, num_workers=1)
        return resumable(loader, seed=3, global_batch_size=GLOBAL)

    def val_dataloader(self) -> Any:
        held_out = self.x[SAMPLES:], self.y[SAMPLES:], self.number[SAMPLES:]
        return Batches(*held_out, batch_size=EACH, seed=3, shuffle=False)


def shaken(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + 0.1 * torch.randn(x.shape, generator=generator)


class Model(LightningModule):
    """Dropout, noise, a schedule per step, sums and metrics; no statistics over samples."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)
        )
        self.accuracy = MulticlassAccuracy(3)
        self.losses = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, number = batch
        logits = self.net(x + 0.1 * torch.randn_like(x))
        loss = nn.functional.cross_entropy(logits, y)
        self.accuracy.update(logits, y)
        self.losses.update(loss.detach())
        self.log("train/loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("train/accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log("train/losses", self.losses, on_step=False, on_epoch=True)
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        note(
            self.trainer, [self.current_epoch, self.global_step, rate, number.tolist(), x.tolist()]
        )
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y, _ = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("val/loss", loss, sync_dist=True)
        note(self.trainer, ["validated", self.global_step])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        total = self.trainer.estimated_stepping_batches
        every = {
            "scheduler": LambdaLR(optimizer, lambda step: 1 - step / (total + 1)),
            "interval": "step",
        }
        return {"optimizer": optimizer, "lr_scheduler": every}


class EverySecond(Model):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        every = {"scheduler": StepLR(optimizer, 1, 0.7), "interval": "step", "frequency": 2}
        return {"optimizer": optimizer, "lr_scheduler": every}


class Sharded(Model):
    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self.net, FSDPModule):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def note(trainer: Trainer, line: list[Any]) -> None:
    with Path(trainer.default_root_dir, f"seen-{trainer.global_rank}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tree": {"tree": True},
    "workers": {"loader": "resumable"},
    "every second step": {"model": EverySecond},
    "every second step, workers": {"model": EverySecond, "loader": "resumable"},
    "limits": {"limit_train_batches": 3, "val_check_interval": 2},
    "shares": {"limit_train_batches": 0.8, "val_check_interval": 0.5},
    "clipped": {"tree": True, "gradient_clip_val": 0.5},
    "max steps": {"tree": True, "max_steps": 6},
    "shards": {"model": Sharded},
    "shares of ddp, in a tree": {"tree": True, "sharded": True},
    "across epochs": {"val_check_interval": 3, "check_val_every_n_epoch": None},
}


def main(directory: Path, ranks: int, kind: str, start: Path | None = None) -> None:
    flags = dict(KINDS[kind])
    model = flags.pop("model", Model)
    strategy: Any = ElasticDDP() if flags.pop("tree", False) else DDPStrategy()
    if kind == "shards":
        strategy = ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)
        strategy = strategy if ranks > 1 else "auto"
    loader = flags.pop("loader", "batches")
    points = directory / "points"
    sharded = flags.pop("sharded", "auto")
    fit(
        directory,
        checkpointing=EveryPoint(points, monitor="val/loss", mode="min", sharded=sharded),
        model=model,
        data=lambda: Numbered(loader),
        ckpt_path=start,
        keep_rows=store.load(start)[0]["logged_rows"] if start else 0,
        **{"max_epochs": 2, "devices": ranks, "strategy": strategy} | flags,
    )


# -- what a test asks ------------------------------------------------------------------------------


def steps(directory: Path) -> dict[int, Any]:
    """By step: its rates, and the numbers and values of its samples in the order of the ranks."""
    found: dict[int, Any] = {}
    for file in sorted(directory.glob("seen-*.jsonl")):
        for line in map(json.loads, file.read_text().splitlines()):
            if line[0] != "validated":
                epoch, step, rate, numbers, x = line
                known = found.setdefault(step, {"epoch": epoch, "rates": [], "samples": []})
                known["rates"] += [rate] * (rate not in known["rates"])
                known["samples"] += list(zip(numbers, x, strict=True))
    return found


def validated(directory: Path) -> list[int]:
    lines = map(json.loads, (directory / "seen-0.jsonl").read_text().splitlines())
    return sorted({line[1] for line in lines if line[0] == "validated"})


if __name__ == "__main__":
    torch.set_num_threads(1)
    root, number, name, *files = sys.argv[1:]
    if not files:
        main(Path(root), int(number), name)
    for file in map(Path, files):
        work = Path(root, file.stem)
        if os.environ["LOCAL_RANK"] == "0":
            work.mkdir(exist_ok=True)
            shutil.copy(file.parent.parent / "metrics.csv", work)
        main(work, int(number), name, file)
