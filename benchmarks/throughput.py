"""Images per second: a bare PyTorch loop, Lightning alone, Lightning with all that is ours; our
batches and a DataLoader's.

    DATA_ROOT=/path/to/data python benchmarks/throughput.py
    DATA_ROOT=/path/to/data python benchmarks/throughput.py --rounds 7 --epochs 1

First table: the run of configs/mnist.yaml, `--epochs` epochs. Both sides train the same network on
the same batches, shifts included, with the same optimizer, schedule, loss and metric updates, and
validate after each epoch. `ours` is what train.py builds: progress lines, metrics.csv, TensorBoard,
a durable save at the end of each epoch; then the same with a save every 50 steps. `stock Trainer`
is Lightning's with its own CSV and TensorBoard loggers, and no checkpoint at all. Timed is from the
first batch to the return of `fit`, the save at its end included, without start-up and the sanity
check. Second table: batches alone, no network, one pass over the training images, normalised and
ready for the network; ours are shifted too.

The sides take turns in one process; one round of each goes before and is not counted; medians.
"""

import argparse
import contextlib
import io
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from report import ROOT, in_turns, machine, ratio, require_mnist, table
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from project import ConvNet, ImageClassifier, ImageData
from savepoint.config import typed
from savepoint.run import Run
from savepoint.schedules import one_cycle
from savepoint.training import build
from savepoint.training.progress import Meter

MEAN = 0.1307
STD = 0.3081


def whole_rate(meter: Meter) -> float:
    """Called once `fit` has returned: the save at its end counts, which the meter leaves out."""
    return meter._samples_now / (time.monotonic() - meter._began)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What Lightning says of itself is no part of a table."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        yield
    log.setLevel(level)


def lightning_rate(config: Any, directory: Path) -> float:
    """Images/s of `trainer.fit` as train.py does it, in a run directory of its own."""
    directory.mkdir()
    run = Run.open(directory)
    with quiet():
        built = build.build(config, run)
        built.trainer.fit(built.model, datamodule=built.data)
        rate = whole_rate(built.meter)
    run.unlock()
    return rate


def stock_rate(epochs: int, directory: Path, steps: int | None) -> float:
    """Images/s of Lightning alone, of the same model and batches."""
    meter = Meter()
    torch.manual_seed(0)
    loggers = [CSVLogger(directory), TensorBoardLogger(directory)]
    with quiet():
        trainer = Trainer(
            max_epochs=epochs,
            limit_train_batches=steps,
            accelerator="cpu",
            logger=loggers,
            callbacks=[meter],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(ImageClassifier(ConvNet()), datamodule=ImageData())
    return whole_rate(meter)


def bare_rate(epochs: int, steps: int | None) -> float:
    """The same training without Lightning: ImageClassifier serves as a plain module, for its
    network and its metrics.
    """
    torch.manual_seed(0)
    data = ImageData()
    model = ImageClassifier(ConvNet())
    data.setup()
    batches = data.train_dataloader()
    held_out = data.val_dataloader()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=model.lr, weight_decay=model.weight_decay, fused=True
    )
    total_steps = epochs * len(batches)
    scheduler = LambdaLR(optimizer, lambda step: one_cycle(step, total_steps))
    images_seen = 0
    begun = time.perf_counter()
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        model.train()
        for images, labels in islice(batches, steps):
            logits = model(images)
            losses = F.cross_entropy(
                logits, labels, label_smoothing=model.label_smoothing, reduction="none"
            )
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
            scheduler.step()
            model.train_loss.update(losses.detach())
            model.train_accuracy.update(logits.detach(), labels)
            images_seen += len(images)
        model.eval()
        with torch.no_grad():
            for images, labels in held_out:
                logits = model(images)
                model.val_loss.update(F.cross_entropy(logits, labels, reduction="none"))
                model.val_accuracy.update(logits, labels)
        for metric in (model.train_loss, model.train_accuracy, model.val_loss, model.val_accuracy):
            metric.compute()
            metric.reset()
    return images_seen / (time.perf_counter() - begun)


def our_batches() -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    data = ImageData()
    epochs = count()
    data.setup()
    batches = data.train_dataloader()

    def one_pass() -> Iterator[tuple[Tensor, Tensor]]:
        batches.set_epoch(next(epochs))
        for images, labels in batches:
            yield (images.float() / 255 - MEAN) / STD, labels

    return one_pass


def torchvision_batches(workers: int) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    from torchvision import datasets, transforms

    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])
    data = datasets.MNIST(os.environ["DATA_ROOT"], train=True, transform=transform)
    loader = DataLoader(data, batch_size=128, shuffle=True, num_workers=workers)
    return lambda: iter(loader)


def pass_rate(one_pass: Callable[[], Iterator[tuple[Tensor, Tensor]]]) -> float:
    begun = time.perf_counter()
    images_seen = sum(len(images) for images, _ in one_pass())
    return images_seen / (time.perf_counter() - begun)


def measure_fit(epochs: int, rounds: int, warm_steps: int | None = None) -> dict[str, float]:
    """Images/s of each way to train.

    Args:
        warm_steps: An epoch of the round that is not counted; None for a whole one.
    """
    if warm_steps:
        fits(epochs, 0, warm_steps)
    return fits(epochs, rounds, None, warm=not warm_steps)


def fits(epochs: int, rounds: int, steps: int | None, *, warm: bool = True) -> dict[str, float]:
    """`steps`: of an epoch; None for all."""
    config = typed.parse(
        ["--config", str(ROOT / "configs/mnist.yaml"), f"--trainer.max_epochs={epochs}"]
    )
    config.trainer.limit_train_batches = steps
    often = config.clone()
    often.checkpoint.save_every_steps = 50
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        names = (Path(folder, str(i)) for i in count())
        sides = {
            "bare loop": lambda: bare_rate(epochs, steps),
            "stock Trainer": lambda: stock_rate(epochs, next(names), steps),
            "ours": lambda: lightning_rate(config, next(names)),
            "ours, every 50 steps": lambda: lightning_rate(often, next(names)),
        }
        return in_turns(sides, rounds, warm=warm)


def measure_batches(rounds: int, workers: Sequence[int] = (0, 2)) -> dict[str, float]:
    """Images/s of each way to make batches."""
    loaders = {"our batches": our_batches()}
    loaders |= {f"torchvision, {n} workers": torchvision_batches(n) for n in workers}
    return in_turns(
        {name: lambda p=one_pass: pass_rate(p) for name, one_pass in loaders.items()}, rounds
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=1)
    asked = parser.parse_args()
    require_mnist()
    print(
        f"On {machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True
    )
    fit = measure_fit(asked.epochs, asked.rounds)
    bare = fit["bare loop"]
    stock = fit["stock Trainer"]
    rows = [
        [name, f"{rate:,.0f}", ratio(rate / bare), ratio(stock / rate)]
        for name, rate in fit.items()
    ]
    print(
        table(["fit", "images/s", "of the bare loop", "a step's time over stock"], rows) + "\n",
        flush=True,
    )
    loading = measure_batches(asked.rounds)
    rows = [
        [name, f"{rate:,.0f}", ratio(loading["our batches"] / rate)]
        for name, rate in loading.items()
    ]
    print(table(["batches alone", "images/s", "ours is"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
