"""A callback that a config names: it writes down what each step has seen, and kills a rank."""

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class Recording(Callback):
    """Appends to `into`/START-RANK.jsonl, of each batch, its step, rate and samples. START is the
    number of this start; in the environment, as is DIES_AT, the step at which the last rank is gone.
    """

    def __init__(self, into: str) -> None:
        self.into = into

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        dies_at = int(os.environ.get("DIES_AT", "-1"))
        if trainer.global_step == dies_at and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        images, labels = batch
        samples = [
            [hashlib.sha256(image.numpy().tobytes()).hexdigest()[:12], int(label)]
            for image, label in zip(images, labels, strict=True)
        ]
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        line = [trainer.global_step, trainer.current_epoch, rate, samples]
        start = os.environ.get("START", "0")
        with Path(self.into, f"{start}-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def recorded(into: Path) -> dict[int, list[Any]]:
    """By step: epoch, rate and samples, as the last start that has made it has seen them."""
    found: dict[int, tuple[int, list[Any]]] = {}
    files = {tuple(map(int, file.stem.split("-"))): file for file in into.glob("*.jsonl")}
    for (start, _), file in sorted(files.items()):
        for step, epoch, rate, samples in map(json.loads, file.read_text().splitlines()):
            known = found.get(step)
            if known is None or known[0] < start:
                known = found[step] = (start, [epoch, rate, []])
            known[1][2] += samples
    return {step: what for step, (_, what) in found.items()}
