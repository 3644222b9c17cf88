"""From the start of a process to its first optimizer step, to its help, to the word that something
is wrong.

    DATA_ROOT=/path/to/data python benchmarks/starts.py
    DATA_ROOT=/path/to/data python benchmarks/starts.py --rounds 9 --megabytes 100

Small: the run of configs/mnist.yaml: `train.py`, and `resume.py` from the end of its first epoch.
Beside it what every such program pays, `python -c "import lightning"`, and what a user waits for
who asks for help, mistypes a key or looks at the checkpoints. Large: toy.py with a state of 1 GB:
`train.py`, `resume.py`, which looks at every byte before it loads, and Lightning's
`Trainer.fit(ckpt_path=...)` from its own file of the same state; for each, its fresh start without
a checkpoint.

`memory` is the most that the process held (VmHWM) until its first step began: what a resume reads,
builds and copies, with no gradient yet. From it goes the same of a resume whose state is next to
nothing, which pays for the same imports, data and threads. A resume may read its file before there
is a model, so nothing of its own process before the model would do.

Real processes, in turns. One round goes before and is not counted, so the files are in the page
cache; medians.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from report import ROOT, in_turns, machine, ratio, require_mnist, table, with_benchmarks

TOY = [
    "--model",
    "toy.Toy",
    "--data",
    "toy.Numbers",
    "--checkpoint.monitor",
    "null",
    "--trainer.accelerator",
    "cpu",
]


def timed(
    command: Sequence[str], *, code: int = 0, steps: int | None = None, mark: Path | None = None
) -> float:
    """Seconds of a whole process; with `steps`, to the end of its step of that number, at which it
    leaves.
    """
    environment = os.environ | {"PYTHONPATH": with_benchmarks()}
    if mark:
        environment |= {"BENCHMARK_STEPS": str(steps), "BENCHMARK_MARK": str(mark)}
        mark.unlink(missing_ok=True)
    begun = time.monotonic()  # one clock for all processes of a machine
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    ended = time.monotonic()
    if done.returncode != code or (mark and not mark.exists()):
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return (float(mark.read_text().split()[0]) if mark else ended) - begun


def small(rounds: int, work: Path, *, warm: bool = True) -> dict[str, float]:
    """`warm`: whether a round goes before."""
    mark = work / "mark"
    run = work / "resumed"
    last = run / "checkpoints" / "last.ckpt"  # of a run, the newest would be loaded as well
    train = ["train.py", "--trainer.callbacks", "mark.Mark", "--output_dir", str(work)]
    # Leaves in its second epoch, after the first save. Twenty steps make a checkpoint like any.
    short = ["--run_name", run.name, "--trainer.limit_train_batches", "20"]
    timed([*train, *short], steps=25, mark=mark)

    def fresh() -> float:
        shutil.rmtree(work / "fresh", ignore_errors=True)
        return timed([*train, "--run_name", "fresh"], steps=1, mark=mark)

    return in_turns(
        {
            "import lightning": lambda: timed(["-c", "import lightning"]),
            "--help": lambda: timed(["train.py", "--help"]),
            "savepoint ls": lambda: timed(["-m", "savepoint", "ls", str(run)]),
            "savepoint verify": lambda: timed(["-m", "savepoint", "verify", str(last)]),
            "a wrong key": lambda: timed(["train.py", "--model.learning_rate", "0.1"], code=2),
            "a fresh start": fresh,
            "a resume": lambda: timed(["resume.py", str(run)], steps=1, mark=mark),
        },
        rounds,
        warm=warm,
    )


def checkpointed(megabytes: float, work: Path) -> dict[str, list[str]]:
    """The commands of both sides with a state of that size, once there are checkpoints of it."""
    mark = work / "mark"
    run = work / "large"
    ours = [
        "train.py",
        *TOY,
        "--model.megabytes",
        str(megabytes),
        "--trainer.callbacks",
        "mark.Mark",
    ]
    ours += [
        "--output_dir",
        str(work),
        "--checkpoint.save_every_steps",
        "1",
        "--trainer.max_epochs",
        "9",
    ]
    timed([*ours, "--run_name", run.name], steps=2, mark=mark)  # leaves after its first save
    theirs = [__file__, "--megabytes", str(megabytes), "--lightning", str(work / "lightning.ckpt")]
    timed(theirs, steps=2, mark=mark)
    return {
        "a fresh start": [*ours, "--run_name", "fresh"],
        "a resume": ["resume.py", str(run)],
        "Lightning's fresh start": [*theirs[:-1], str(work / "none.ckpt")],
        "Lightning's resume": theirs,
    }


def large(rounds: int, megabytes: float, work: Path) -> dict[str, float]:
    def start(command: list[str]) -> float:
        shutil.rmtree(work / "fresh", ignore_errors=True)
        return timed(command, steps=1, mark=work / "mark")

    sides = checkpointed(megabytes, work)
    return in_turns({name: partial(start, command) for name, command in sides.items()}, rounds)


def memory(megabytes: float, work: Path) -> dict[str, float]:
    """Megabytes: of the state, and by how much a resume with it peaks above one with next to none,
    ours and Lightning's.
    """
    peaks: dict[float, dict[str, float]] = {}
    for size in (megabytes, 0.01):
        place = work / str(size)
        place.mkdir()
        sides = checkpointed(size, place)
        for name in ("a resume", "Lightning's resume"):
            timed(sides[name], steps=1, mark=place / "mark")
            peak = float((place / "mark").read_text().split()[1]) / 1e6
            peaks.setdefault(size, {})[name] = peak
    large, least = peaks.values()
    ours, theirs = (large[name] - least[name] for name in large)
    return {"state": megabytes, "ours": ours, "Lightning": theirs}


def lightning(checkpoint: Path, megabytes: float) -> None:
    """In a process of its own: what a user of Lightning alone writes. Makes the checkpoint where
    there is none.
    """
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from mark import Mark
    from toy import Numbers, Toy

    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if not checkpoint.exists():
                trainer.save_checkpoint(checkpoint)

    trainer = Trainer(
        accelerator="cpu",
        max_epochs=9,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(checkpoint.parent), Mark(), Save()],
        default_root_dir=checkpoint.parent,
    )
    trainer.fit(
        Toy(megabytes), datamodule=Numbers(), ckpt_path=checkpoint if checkpoint.exists() else None
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--megabytes", type=float, default=1000.0, help="of the large state; 0 for none"
    )
    parser.add_argument("--lightning", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.lightning:
        lightning(asked.lightning, asked.megabytes)
        return 0
    require_mnist()
    print(f"On {machine()}", flush=True)
    with tempfile.TemporaryDirectory(prefix="starts-") as folder:
        found = small(asked.rounds, Path(folder))
        base = found["import lightning"]
        rows = [
            [name, f"{secs:.2f} s", f"{secs - base:+.2f} s", ratio(secs / base)]
            for name, secs in found.items()
        ]
        print(
            table(
                ["small, from the start of the process", "time", "over the import", "ratio"], rows
            )
            + "\n"
        )
        if asked.megabytes:
            found = large(max(2, asked.rounds // 2), asked.megabytes, Path(folder))
            base = found["a fresh start"]
            rows = [
                [name, f"{secs:.2f} s", f"{secs - base:+.2f} s", ratio(secs / base)]
                for name, secs in found.items()
            ]
            print(
                table(
                    [
                        f"{asked.megabytes:.0f} MB, to the first step",
                        "time",
                        "over the fresh",
                        "ratio",
                    ],
                    rows,
                )
            )
            print(flush=True)
            with tempfile.TemporaryDirectory(prefix="starts-") as other:
                held = memory(asked.megabytes, Path(other))
            rows = [
                [name, f"{held[name]:,.0f} MB", ratio(held[name] / held["state"])]
                for name in ("ours", "Lightning")
            ]
            print(table(["memory of the resume", "peak", "of the state"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
