"""Two processes against one: DDP over gloo on the CPU, a thread each.

    DATA_ROOT=/path/to/data python benchmarks/processes.py

One epoch of configs/mnist.yaml, with one and with two processes (each takes every second image, so
that a step sees twice as many), saved at its end alone and every 20 steps. Images/s are those of
summary.json, validation included. Only the first process writes; the other waits for it at the end
of a save, as it would at the next step. Whole processes in turns; the first round is not counted;
medians.

Second table: a training of toy.py with AdamW and --megabytes of state, in one, two and four
processes that have all imported before. `save` is how long all of them wait for one by
CheckpointCallback; `anew` and `resume` are the seconds from the call of `fit` to the end of its
first step, without and with `ckpt_path`, in turns.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from report import ROOT, in_ranks, in_turns, machine, ratio, require_mnist, table

TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
OFTEN = ["--checkpoint.save_every_steps", "20"]
KINDS = {
    "one process": [],
    "one process, every 20 steps": OFTEN,
    "two processes": TWO,
    "two processes, every 20 steps": [*TWO, *OFTEN],
}


def rate(output_dir: Path, name: str, flags: list[str]) -> float:
    command = [
        sys.executable,
        "train.py",
        "--config",
        "configs/mnist.yaml",
        "--trainer.max_epochs",
        "1",
        *flags,
    ]
    command += ["--trainer.accelerator", "cpu", "--output_dir", str(output_dir), "--run_name", name]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return float(json.loads((output_dir / name / "summary.json").read_text())["samples_per_sec"])


def measure(rounds: int) -> dict[str, float]:
    """Images/s of each kind."""
    with tempfile.TemporaryDirectory(prefix="processes-") as folder:
        names = (f"run-{i}" for i in count())
        kinds = {
            name: lambda f=flags: rate(Path(folder), next(names), f)
            for name, flags in KINDS.items()
        }
        return in_turns(kinds, rounds)


def fits(rank: int, ranks: int, folder: Path, megabytes: float, rounds: int, port: int) -> None:
    """One rank of a training that saves after each step, and of such as begin there and anew."""
    import torch
    from lightning.pytorch import Callback, Trainer
    from toy import Numbers, Toy

    from savepoint import CheckpointCallback
    from savepoint.checkpoint.trainer_saver import TrainerSaver

    torch.set_num_threads(1)
    if ranks > 1:  # as torchrun has it
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        numbers |= {"GROUP_RANK": 0, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in numbers.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "fits"}
    saves = []
    stepped = []

    class Timed(TrainerSaver):
        def save(self, trainer: Trainer, at: Any, **kwargs: Any) -> None:
            trainer.strategy.barrier()
            begun = time.perf_counter()
            super().save(trainer, at, **kwargs)
            trainer.strategy.barrier()
            if kwargs.get("ended") is None:
                saves.append(time.perf_counter() - begun)

    class Clock(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            stepped.append(time.perf_counter())

    def fit(place: Path, steps: int, every: int | None = None, begin: Path | None = None) -> float:
        saving = CheckpointCallback(save_every_epochs=None, save_every_steps=every, monitor=None)
        saving.saver.__class__ = Timed
        trainer = Trainer(
            accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto",
            max_steps=steps, callbacks=[Clock(), saving], default_root_dir=place, logger=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        )  # fmt: skip
        model = Toy(megabytes)
        data = Numbers(8 * ranks * (rounds + 2))
        stepped.clear()
        begun = time.perf_counter()
        trainer.fit(model, data, ckpt_path=begin)
        return stepped[0] - begun

    last = rounds + 1
    fit(folder / "saved", last, every=1)
    whence = folder / "saved" / "checkpoints" / f"step-{last:08d}.ckpt"
    places = (folder / f"begun-{i}" for i in count())
    sides = {
        "fresh": lambda: fit(next(places), 1),
        "resume": lambda: fit(next(places), last + 1, begin=whence),
    }
    found = in_turns(sides, rounds)
    if rank == 0:
        found |= {"ranks": ranks, "save": median(saves[1:last])}
        (folder / "found.json").write_text(json.dumps(found))


def measure_fits(numbers: Sequence[int], megabytes: float, rounds: int) -> list[dict[str, float]]:
    """Of each number of processes: seconds of a save, and to the first step anew and resumed."""
    import savepoint.checkpoint.trainer_saver  # noqa: F401 - here, not in each fork

    found = []
    for ranks in numbers:
        with tempfile.TemporaryDirectory(prefix="processes-") as name, socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            free.close()
            folder = Path(name)
            given = (ranks, folder, megabytes, rounds, port)
            in_ranks(ranks, lambda rank, given=given: fits(rank, *given))  # type: ignore[misc]
            found.append(json.loads((folder / "found.json").read_text()))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=50.0, help="of the second table's state")
    asked = parser.parse_args()
    require_mnist()
    print(f"On {machine()}", flush=True)
    found = measure(asked.rounds)
    one = found["one process"]
    print(
        table(
            ["", "images/s", "of one"],
            [[name, f"{value:,.0f}", ratio(value / one)] for name, value in found.items()],
        )
    )
    rows = [
        [f"{one['ranks']}", *(f"{one[name]:.3f} s" for name in ("save", "fresh", "resume"))]
        for one in measure_fits([1, 2, 4], asked.megabytes, asked.rounds)
    ]
    print("\n" + table(["processes", "save", "anew", "resume"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
