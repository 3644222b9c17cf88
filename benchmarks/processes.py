"""Two processes against one: DDP over gloo on the CPU, a thread each.

    DATA_ROOT=/path/to/data python benchmarks/processes.py

One epoch of configs/mnist.yaml, with one and with two processes (each takes every second image, so
that a step sees twice as many), saved at its end alone and every 20 steps. Images/s are those of
summary.json, validation included. Only the first process writes; the other waits for it at the end
of a save, as it would at the next step. Whole processes in turns; the first round is not counted;
medians.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import count
from pathlib import Path

from report import ROOT, in_turns, machine, ratio, require_mnist, table

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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
