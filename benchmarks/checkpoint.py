"""What a checkpoint of the example costs: bytes and milliseconds of a save.

    DATA_ROOT=/path/to/data python benchmarks/checkpoint.py
    DATA_ROOT=/path/to/data python benchmarks/checkpoint.py --saves 40

The run of configs/mnist.yaml, saved after every step. Each save is the real one (state captured,
logs flushed, file and directory synced, retention); right after it, the same state goes to
Lightning's own file (TorchCheckpointIO, without our callback, not synced), and our file's bytes to
a raw file that is synced. The first saves are not counted.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from report import ROOT, machine, require_mnist, table

WARM_UP = 5


def synced_write(content: bytes, path: Path) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def measure_saves(saves: int, work: Path, *flags: str) -> dict[str, list[float]]:
    """Milliseconds of each way to save one state, and the bytes of its file."""
    from lightning.pytorch.plugins.io import TorchCheckpointIO

    import project  # noqa: F401
    from savepoint.checkpoint.callback import CheckpointCallback
    from savepoint.checkpoint.trainer_saver import TrainerSaver
    from savepoint.config import typed
    from savepoint.run import Run
    from savepoint.training import build

    found: dict[str, list[float]] = {
        "ours": [],
        "theirs": [],
        "raw": [],
        "our bytes": [],
        "their bytes": [],
    }

    def timed(name: str, call: Any, *args: Any, **kwargs: Any) -> None:
        begun = time.perf_counter()
        call(*args, **kwargs)
        found[name].append(1000 * (time.perf_counter() - begun))

    class Measured(TrainerSaver):
        def save(self, trainer: Any, at: Any, **kwargs: Any) -> None:
            timed("ours", super().save, trainer, at, **kwargs)
            content = self.store.path(trainer.global_step).read_bytes()
            other = work / "lightning.ckpt"
            timed("raw", synced_write, content, work / "raw")
            callbacks = trainer.callbacks
            plugin = trainer.strategy.checkpoint_io
            trainer.callbacks = [
                callback for callback in callbacks if not isinstance(callback, CheckpointCallback)
            ]
            trainer.strategy.checkpoint_io = TorchCheckpointIO()
            timed("theirs", trainer.save_checkpoint, other)
            trainer.callbacks = callbacks
            trainer.strategy.checkpoint_io = plugin
            found["our bytes"].append(len(content))
            found["their bytes"].append(other.stat().st_size)

    config = typed.parse(
        ["--checkpoint.save_every_steps=1", f"--trainer.max_steps={saves + WARM_UP}", *flags]
    )
    directory = Path(tempfile.mkdtemp(dir=work))
    run = Run.open(directory)
    with contextlib.redirect_stdout(io.StringIO()):
        built = build.build(config, run)
        built.checkpointing.saver.__class__ = Measured
        built.trainer.fit(built.model, datamodule=built.data)
    run.unlock()
    os.environ.pop("SAVEPOINT_RUN_DIR", None)
    return {name: values[WARM_UP:] for name, values in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--saves", type=int, default=30)
    asked = parser.parse_args()
    require_mnist()
    print(f"On {machine()}", flush=True)
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        rows = []
        for name, *flags in (
            ("ConvNet",),
            ("ClassicNet", f"--model={ROOT}/configs/model/classic.yaml"),
        ):
            found = {
                key: median(values)
                for key, values in measure_saves(asked.saves, Path(folder), *flags).items()
            }
            ours = found["our bytes"] / 1000
            theirs = found["their bytes"] / 1000
            rows += [
                [
                    f"{name}: ours",
                    f"{ours:.1f} kB",
                    f"{ours - theirs:+.1f} kB",
                    f"{found['ours']:.1f} ms",
                ],
                [
                    f"{name}: Lightning's, not synced",
                    f"{theirs:.1f} kB",
                    "",
                    f"{found['theirs']:.1f} ms",
                ],
                [
                    f"{name}: our bytes, raw write + fsync",
                    f"{ours:.1f} kB",
                    "",
                    f"{found['raw']:.1f} ms",
                ],
            ]
        print(table(["one save, blocking", "size", "more", "time"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
