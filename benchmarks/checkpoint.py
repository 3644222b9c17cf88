"""What a checkpoint costs: bytes and milliseconds of a save, and seconds until a resume trains.

    DATA_ROOT=/path/to/data python benchmarks/checkpoint.py
    DATA_ROOT=/path/to/data python benchmarks/checkpoint.py --rounds 9 --saves 40

First table: the run of configs/mnist.yaml, saved after every step. Each save is the real one (state captured, logs
flushed, file and directory synced, retention); right after it, the same state goes to Lightning's own file (TorchCheckpointIO,
without our callback, not synced), and our file's bytes to a raw file that is synced. The first saves are not counted.
Second table: real processes, from their start to the end of the first optimizer step: `train.py`, and `resume.py` from
the end of the first epoch, in turns. One round goes before and is not counted: the files are in the page cache.
"""

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from lightning.pytorch import Callback
from report import ROOT, machine, ratio, require_mnist, table

WARM_UP = 5


class Mark(Callback):
    """In the processes that are timed: after BENCHMARK_STEPS steps, writes the time to BENCHMARK_MARK and leaves."""

    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1
        if self.steps == int(os.environ["BENCHMARK_STEPS"]):
            Path(os.environ["BENCHMARK_MARK"]).write_text(repr(time.monotonic()))
            os._exit(0)


def secs_to_step(steps: int, mark: Path, *command: str) -> float:
    """Seconds from the start of a process to the end of its step number `steps`."""
    environment = os.environ | {"BENCHMARK_STEPS": str(steps), "BENCHMARK_MARK": str(mark)}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    begun = time.monotonic()  # one clock for all processes of a machine
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return float(mark.read_text()) - begun


def measure_starts(rounds: int, work: Path) -> tuple[list[float], list[float]]:
    """Seconds to the first step: (of fresh starts, of resumes)."""
    train = ["train.py", "--trainer.callbacks", "checkpoint.Mark", "--output_dir", str(work)]
    mark, run = work / "mark", work / "resumed"
    secs_to_step(435, mark, *train, "--run_name", run.name)  # leaves in its second epoch, after the save of the first
    fresh, resumed = [], []
    for i in range(rounds + 1):
        fresh.append(secs_to_step(1, mark, *train, "--run_name", f"fresh-{i}"))
        resumed.append(secs_to_step(1, mark, "resume.py", str(run)))
        print(f"  {f'round {i}' if i else 'warm-up'}: fresh {fresh[-1]:.2f} s, resumed {resumed[-1]:.2f} s", flush=True)
    return fresh[1:], resumed[1:]


def synced_write(content: bytes, path: Path) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def measure_saves(saves: int, work: Path, *flags: str) -> dict[str, list[float]]:
    """Milliseconds of each way to save one state, and the bytes of its file."""
    from lightning.pytorch.plugins.io import TorchCheckpointIO

    import project  # noqa: F401
    from savepoint import cli, training
    from savepoint.checkpoint.callback import CheckpointCallback
    from savepoint.run import Run

    found: dict[str, list[float]] = {"ours": [], "theirs": [], "raw": [], "our bytes": [], "their bytes": []}

    def timed(name: str, call: Any, *args: Any, **kwargs: Any) -> None:
        begun = time.perf_counter()
        call(*args, **kwargs)
        found[name].append(1000 * (time.perf_counter() - begun))

    class Measured(CheckpointCallback):
        def _save(self, trainer: Any, at: Any, **kwargs: Any) -> None:
            timed("ours", super()._save, trainer, at, **kwargs)
            content, other = self.store.path(trainer.global_step).read_bytes(), work / "lightning.ckpt"
            timed("raw", synced_write, content, work / "raw")
            callbacks, plugin = trainer.callbacks, trainer.strategy.checkpoint_io
            trainer.callbacks = [callback for callback in callbacks if callback is not self]
            trainer.strategy.checkpoint_io = TorchCheckpointIO()
            timed("theirs", trainer.save_checkpoint, other)
            trainer.callbacks, trainer.strategy.checkpoint_io = callbacks, plugin
            found["our bytes"].append(len(content))
            found["their bytes"].append(other.stat().st_size)

    config = cli.parse(["--checkpoint.save_every_steps=1", f"--trainer.max_steps={saves + WARM_UP}", *flags])
    directory = Path(tempfile.mkdtemp(dir=work))
    run = Run.open(directory)
    with contextlib.redirect_stdout(io.StringIO()):
        built = training.build(config, run)
        built.checkpointing.__class__ = Measured
        built.trainer.fit(built.model, datamodule=built.data)
    run.unlock()
    os.environ.pop("SAVEPOINT_RUN_DIR", None)
    return {name: values[WARM_UP:] for name, values in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="starts of each kind")
    parser.add_argument("--saves", type=int, default=30)
    asked = parser.parse_args()
    require_mnist()
    print(f"On {machine()}", flush=True)
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        rows = []
        for name, *flags in (("ConvNet",), ("ClassicNet", f"--model={ROOT}/configs/model/classic.yaml")):
            found = {key: median(values) for key, values in measure_saves(asked.saves, Path(folder), *flags).items()}
            ours, theirs = found["our bytes"] / 1000, found["their bytes"] / 1000
            rows += [
                [f"{name}: ours", f"{ours:.1f} kB", f"{ours - theirs:+.1f} kB", f"{found['ours']:.1f} ms"],
                [f"{name}: Lightning's, not synced", f"{theirs:.1f} kB", "", f"{found['theirs']:.1f} ms"],
                [f"{name}: our bytes, raw write + fsync", f"{ours:.1f} kB", "", f"{found['raw']:.1f} ms"],
            ]
        print(table(["one save, blocking", "size", "more", "time"], rows) + "\n", flush=True)
        fresh, resumed = measure_starts(asked.rounds, Path(folder))
    start, again = median(fresh), median(resumed)
    rows = [["train.py", f"{start:.2f} s", ""], ["resume.py", f"{again:.2f} s", f"{again - start:+.2f} s"]]
    print(table(["process start to first step", "time", "more"], rows))
    print(f"ratio {ratio(again / start)}, spread of the resumes {min(resumed):.2f} to {max(resumed):.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
