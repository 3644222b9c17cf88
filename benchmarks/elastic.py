"""The price of the tree: a step of `elastic_ddp` against one of DDP with the same batches, over gloo
on the CPU, a thread each.

python benchmarks/elastic.py
python benchmarks/elastic.py --ranks 1 2 4 --steps 30 --rounds 5

A global batch of 8 batches of 16 images for a network of 1.2 million parameters, 4.8 MB of
gradients. Whole processes in turns; of each the median step, the first five not counted. The time
that a process computes counts no waiting: on a machine that others use, it is the figure.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from report import in_turns, machine, ratio, table

from project.model import ClassicNet, ImageClassifier
from savepoint import Batches, CheckpointCallback

EACH = 16
GLOBAL = 8 * EACH
WARM = 5
STRATEGIES = ("ddp", "elastic_ddp")


class Clock(Callback):
    def __init__(self) -> None:
        self.at: dict[int, tuple[float, float]] = {}

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        now = (time.perf_counter(), time.process_time())
        self.at.setdefault(trainer.global_step, now)


def train(ranks: int, strategy: str, steps: int) -> None:
    """Prints medians of the milliseconds a step on the first rank: those that passed, and those that
    it has computed.
    """
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (GLOBAL * 4, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (GLOBAL * 4,), generator=generator)
    loader = Batches(images, labels, batch_size=EACH, seed=1, global_batch_size=GLOBAL)
    model: LightningModule = ImageClassifier(ClassicNet())
    clock = Clock()
    quiet = ("enable_progress_bar", "enable_model_summary", "logger")
    trainer = Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy, max_steps=steps, limit_val_batches=0,
        callbacks=[clock, CheckpointCallback(save_every_epochs=None, monitor=None)],
        default_root_dir=os.environ["FOLDER"], **dict.fromkeys(quiet, False),
    )  # fmt: skip
    trainer.fit(model, loader)
    times = [clock.at[step] for step in sorted(clock.at) if step > WARM]
    if trainer.is_global_zero:
        passed, computed = (1000 * between(kind) for kind in zip(*times, strict=True))
        print(f"ms {passed} {computed}")


def between(times: Sequence[float]) -> float:
    return statistics.median(later - one for one, later in itertools.pairwise(times))


def measure(ranks: int, strategy: str, steps: int, computed: list[float]) -> float:
    command = [sys.executable, __file__, "--train", strategy, "--ranks", str(ranks)]
    with tempfile.TemporaryDirectory(prefix="elastic-") as folder:
        done = subprocess.run(
            [*command, "--steps", str(steps)], capture_output=True, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "FOLDER": folder},
        )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    said = next(line.split() for line in done.stdout.splitlines() if line.startswith("ms "))
    computed.append(float(said[2]))
    return float(said[1])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.train:
        train(asked.ranks[0], asked.train, asked.steps)
        return 0
    print(f"On {machine()}", flush=True)
    rows = []
    for ranks in asked.ranks:
        computed: dict[str, list[float]] = {name: [] for name in STRATEGIES}
        kinds = {
            name: partial(measure, ranks, name, asked.steps, into)
            for name, into in computed.items()
        }
        passed = in_turns(kinds, asked.rounds)
        own = {name: statistics.median(values[1:]) for name, values in computed.items()}
        for what, found in (("passed", passed), ("computed by a process", own)):
            plain, tree = (found[name] for name in STRATEGIES)
            rows.append([str(ranks), what, f"{plain:.0f}", f"{tree:.0f}", ratio(tree / plain)])
    print(table(["ranks", "ms a step", *STRATEGIES, "ratio"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
