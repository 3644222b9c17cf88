"""Test accuracy of a config over several seeds, each through the real `python train.py` in a
process of its own.

    DATA_ROOT=/path/to/data python benchmarks/accuracy.py
    DATA_ROOT=/path/to/data python benchmarks/accuracy.py --config configs/fast.yaml --seeds 0 1 2
    DATA_ROOT=/path/to/data python benchmarks/accuracy.py --seeds 0 1 --model.lr 0.01

What is tested are the best weights of each run by val/accuracy, as train.py does. The figures are
those of its summary.json; `wall` counts the whole process but the start of Python. Flags that are
not named here go to train.py.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from report import ROOT, machine, require_mnist, table


def train(config: str, seed: int, more: Sequence[str], output_dir: Path) -> dict[str, Any]:
    """The summary of one run."""
    name = f"seed-{seed}"
    command = [
        sys.executable,
        "train.py",
        "--config",
        config,
        "--seed_everything",
        str(seed),
        *more,
    ]
    command += ["--output_dir", str(output_dir), "--run_name", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command[1:])} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    summary: dict[str, Any] = json.loads((output_dir / name / "summary.json").read_text())
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/mnist.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    asked, more = parser.parse_known_args()
    require_mnist()
    print(f"{asked.config} {' '.join(more)} on {machine()}", flush=True)
    rows = []
    accuracies = []
    with tempfile.TemporaryDirectory(prefix="accuracy-") as folder:
        for seed in asked.seeds:
            summary = train(asked.config, seed, more, Path(folder))
            accuracies.append(100 * summary["test/accuracy"])
            rows.append(
                [
                    str(seed),
                    f"{accuracies[-1]:.2f} %",
                    f"{100 * summary['best_accuracy']:.2f} %",
                    str(summary["best_step"]),
                    f"{summary['fit_secs']:.1f} s",
                    f"{summary['wall_secs']:.1f} s",
                    summary["dataset"],
                ]
            )
            print(f"  seed {seed}: {rows[-1][1]}", flush=True)
    print(table(["seed", "test accuracy", "best val", "at step", "fit", "wall", "data"], rows))
    print(f"mean {mean(accuracies):.3f} %, min {min(accuracies):.2f} %, {len(accuracies)} seeds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
