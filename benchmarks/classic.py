"""From the start of Python to 99.0 % on MNIST: `train.py --config configs/fast.yaml` against the
classic pipeline.

    DATA_ROOT=/path/to/data python benchmarks/classic.py
    DATA_ROOT=/path/to/data FULL=1 python benchmarks/classic.py

The classic pipeline is what tutorials show, as a plain loop in a process of its own: torchvision's
MNIST, ToTensor, Normalize and a DataLoader of batch 64, image by image; two convolutions with
dropout, Adadelta with lr 1.0, StepLR with gamma 0.7; a test after each epoch. With seed 1 it passes
99.0 % in its fourth epoch (with seed 0 not even then): FULL=1 runs all four, once. Without it, the
first tenth of one epoch and one test are measured (the warm-up of their first batches included) and
scaled; the two sides take turns, and medians are compared. The files are in the page cache for
both.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from report import ROOT, machine, ratio, require_mnist, table

EPOCHS = 4
TRAINING_BATCHES = 938


def classic(batches_a_epoch: int, epochs: int) -> dict[str, Any]:
    """The loop itself, in the child. Imports nothing of ours, nor Lightning."""
    import torch
    import torch.nn.functional as F
    from torch import nn
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    root = os.environ["DATA_ROOT"]
    torch.manual_seed(1)  # as the tutorial does
    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    )
    train_loader = DataLoader(
        datasets.MNIST(root, train=True, transform=transform), batch_size=64, shuffle=True
    )
    test_loader = DataLoader(
        datasets.MNIST(root, train=False, transform=transform), batch_size=1000
    )
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Dropout(0.25), nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(128, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    train_secs = 0.0
    test_secs = 0.0
    accuracies = []
    for _ in range(epochs):
        begun = time.perf_counter()
        model.train()
        for i, (images, labels) in enumerate(train_loader):
            if i == batches_a_epoch:
                break
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        trained = time.perf_counter()
        model.eval()
        with torch.no_grad():
            right = sum(
                int((model(images).argmax(1) == labels).sum()) for images, labels in test_loader
            )
        accuracies.append(right / 10_000)
        scheduler.step()
        train_secs += trained - begun
        test_secs += time.perf_counter() - trained
    return {"train_secs": train_secs, "test_secs": test_secs, "accuracies": accuracies}


def measure_classic(full: bool) -> dict[str, Any]:
    """Seconds of the whole process and of training and tests, scaled to four epochs unless all of
    them were run.
    """
    batches, epochs = (TRAINING_BATCHES, EPOCHS) if full else (TRAINING_BATCHES // 10, 1)
    begun = time.perf_counter()
    command = [sys.executable, __file__, "--child", str(batches), str(epochs)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    wall = time.perf_counter() - begun
    found: dict[str, Any] = json.loads(done.stdout)
    start_up = wall - found["train_secs"] - found["test_secs"]
    fit = EPOCHS / epochs * (found["train_secs"] * TRAINING_BATCHES / batches + found["test_secs"])
    return {"wall": start_up + fit, "fit": fit, "accuracies": found["accuracies"]}


def measure_fast() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="classic-") as folder:
        command = [
            sys.executable,
            "train.py",
            "--config",
            "configs/fast.yaml",
            "--output_dir",
            folder,
        ]
        begun = time.perf_counter()
        subprocess.run([*command, "--run_name", "fast"], cwd=ROOT, check=True, capture_output=True)
        wall = time.perf_counter() - begun
        summary = json.loads(Path(folder, "fast", "summary.json").read_text())
    return {"wall": wall, "fit": summary["fit_secs"], "accuracies": [summary["test/accuracy"]]}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", type=int, nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(classic(*asked.child)))
        return 0
    require_mnist()
    full = os.environ.get("FULL") == "1"
    print(f"Whole processes, in turns, on {machine()}", flush=True)
    fast = []
    classics = []
    for i in range(asked.rounds):
        fast.append(measure_fast())
        classics += [measure_classic(full)] if not full or i == 0 else []
        print(
            f"  round {i + 1}: {fast[-1]['wall']:.1f} s against {classics[-1]['wall']:.1f} s",
            flush=True,
        )
    wall, fit = (median(run[key] for run in fast) for key in ("wall", "fit"))
    other_wall, other_fit = (median(run[key] for run in classics) for key in ("wall", "fit"))
    rows = [
        ["whole process", f"{wall:.1f} s", f"{other_wall:.1f} s", ratio(other_wall / wall)],
        ["fit alone", f"{fit:.1f} s", f"{other_fit:.1f} s", ratio(other_fit / fit)],
    ]
    print(table(["", "configs/fast.yaml", "classic, 4 epochs", "ratio"], rows))
    print(
        "test accuracy of configs/fast.yaml: "
        + ", ".join(f"{100 * run['accuracies'][0]:.2f} %" for run in fast)
    )
    if full:
        print(
            "of the classic pipeline after each epoch: "
            + ", ".join(f"{100 * a:.2f} %" for a in classics[0]["accuracies"])
        )
    else:
        print(
            "classic: start-up + 4 epochs of 10 times the measured tenth + 4 tests; FULL=1 runs "
            "them all"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
