"""What a save costs: milliseconds that training waits, bytes a second, memory, and steps that are
slower meanwhile.

    python benchmarks/saves.py
    python benchmarks/saves.py --megabytes 100 --rounds 9

A real training of toy.py with AdamW is saved after every step, by each of these in turn, of one and
the same state:

    ours                what CheckpointCallback does: state captured, logs flushed, file and
                        directory synced, retention
    ours, async         the same with async_save: the copy; written in a thread
    Lightning + fsync   Trainer.save_checkpoint by TorchCheckpointIO, then file and directory synced
    torch.save + fsync  weights and optimizer alone
    DCP, DCP async      torch.distributed.checkpoint, weights and optimizer alone; its files are
                        synced by default
    raw write + fsync   as many bytes as our file has, from memory
    memcpy              the state's tensors into tensors that are kept

`waits` is how long the call takes; for the asynchronous ones `on disk` is when the write is done.
`memory` is the most that the process held beyond what it held before, over the size of the state. A
process a size; the first round is not counted. Each writes new files and then lets the old ones go,
as who must not lose the old ones while the new ones are half there. The files land in TMPDIR: it
should be a disk. Writes go through the page cache and then, by fsync, to the disk.

Last: the steps of a small convolution network, alone and while 300 MB are written by a thread.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from report import last_line, machine, memory_bytes, ratio, table

ROUNDS = {0.3: 30, 100.0: 7, 1000.0: 5}  # megabytes: saves of each kind
BLOCKING = ("ours", "Lightning + fsync", "torch.save + fsync", "DCP", "raw write + fsync")
ASYNC = ("ours, async", "DCP async", "memcpy")


def synced(path: Path) -> None:
    for place in (path, path.parent):
        descriptor = os.open(place, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


class Measure:
    """Times of calls by name, and the memory that each took."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, list[float]]] = {}
        gc.freeze()  # what was imported needs no look at each collection: 0.3 s of it

    def __call__(
        self, name: str, call: Callable[[], Any], finish: Callable[[Any], Any] = lambda made: None
    ) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = memory_bytes("VmRSS")
        begun = time.perf_counter()
        made = call()
        waited = time.perf_counter() - begun
        finish(made)
        whole = time.perf_counter() - begun
        row = self.found.setdefault(name, {"waits": [], "on disk": [], "memory": []})
        for key, value in (
            ("waits", waited),
            ("on disk", whole),
            ("memory", memory_bytes("VmHWM") - before),
        ):
            row[key].append(value)


def measure(
    megabytes: float, rounds: int, folder: Path, only: Sequence[str] = ()
) -> dict[str, Any]:
    import torch
    import torch.distributed.checkpoint as dcp
    from lightning.pytorch import Trainer
    from lightning.pytorch.plugins.io import TorchCheckpointIO
    from toy import Numbers, Toy

    from savepoint.checkpoint import format
    from savepoint.checkpoint.callback import CheckpointCallback
    from savepoint.checkpoint.io import CheckpointIO
    from savepoint.checkpoint.trainer_saver import TrainerSaver

    measured = Measure()
    sizes = {}

    class Measured(TrainerSaver):
        kept: list[torch.Tensor]
        later = CheckpointIO(async_save=True)

        def save(self, trainer: Any, at: Any, **kwargs: Any) -> None:
            if kwargs.get("ended"):
                return
            module = trainer.lightning_module
            optimizer = trainer.optimizers[0]
            plain = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 1}
            tensors = [leaf for _, leaf in format.leaves(plain) if isinstance(leaf, torch.Tensor)]
            self.kept = getattr(self, "kept", None) or [
                torch.empty_like(tensor) for tensor in tensors
            ]
            ours = CheckpointIO()
            self.later.store = ours.store = self.store

            def by(plugin: CheckpointIO) -> Callable[[], None]:
                def save() -> None:
                    self.is_saved = lambda step, at: False
                    trainer.strategy.checkpoint_io = plugin
                    super(Measured, self).save(trainer, at, **kwargs)

                return save

            def lightning() -> None:
                callbacks = trainer.callbacks
                trainer.callbacks = [one for one in callbacks if one is not checkpointing]
                trainer.strategy.checkpoint_io = TorchCheckpointIO()
                trainer.save_checkpoint(folder / "lightning.ckpt")
                synced(folder / "lightning.ckpt")
                trainer.callbacks = callbacks
                trainer.strategy.checkpoint_io = ours

            def torch_save() -> None:
                torch.save(plain, folder / "torch.new")
                synced(folder / "torch.new")
                os.replace(folder / "torch.new", folder / "torch.pt")

            def raw() -> None:
                with (folder / "raw.new").open("wb", buffering=0) as file:
                    for tensor in tensors:
                        file.write(
                            tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
                        )
                    file.truncate(sizes["file"])
                synced(folder / "raw.new")
                os.replace(folder / "raw.new", folder / "raw")

            def dcp_save() -> None:
                dcp.save(plain, checkpoint_id=folder / f"dcp-{trainer.global_step}")
                shutil.rmtree(folder / f"dcp-{trainer.global_step - 1}", ignore_errors=True)

            def dcp_finish(future: Any) -> None:
                future.result()
                shutil.rmtree(folder / f"later-{trainer.global_step - 1}", ignore_errors=True)

            def memcpy() -> None:
                with torch.no_grad():
                    for kept, tensor in zip(self.kept, tensors, strict=True):
                        kept.copy_(tensor)

            by(ours)()
            sizes.update(
                file=self.store.path(trainer.global_step).stat().st_size,
                state=format.size_bytes(plain),
            )
            ways: list[tuple[Any, ...]] = [
                ("ours", by(ours)),
                ("ours, async", by(self.later), lambda _: self.later.wait()),
                ("Lightning + fsync", lightning),
                ("torch.save + fsync", torch_save),
                ("DCP", dcp_save),
                (
                    "DCP async",
                    lambda: dcp.async_save(
                        plain, checkpoint_id=folder / f"later-{trainer.global_step}"
                    ),
                    dcp_finish,
                ),
                ("raw write + fsync", raw),
                ("memcpy", memcpy),
            ]
            ways = [way for way in ways if not only or way[0] in only]
            # What one leaves behind, another pays for: each comes after each.
            turn = trainer.global_step % len(ways)
            for way in ways[turn:] + ways[:turn]:
                os.sync()
                measured(*way)
                trainer.strategy.checkpoint_io = ours

    checkpointing = CheckpointCallback(save_every_epochs=None, save_every_steps=1, monitor=None)
    checkpointing.saver.__class__ = Measured
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        trainer = Trainer(
            max_steps=rounds + 1, default_root_dir=folder, callbacks=[checkpointing], logger=False,
            accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
            limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(Toy(megabytes), Numbers(4 * (rounds + 1)))
    return {
        "sizes": sizes,
        "found": {n: {k: v[1:] for k, v in row.items()} for n, row in measured.found.items()},
    }


def measure_steps(
    folder: Path, megabytes: int = 300, steps: int = 60, only: Sequence[str] = ()
) -> dict[str, Any]:
    """Seconds a step of a small convolution network: alone, and while something is written in a
    thread.
    """
    import threading

    import torch
    from torch import nn

    from savepoint.checkpoint.io import CheckpointIO

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 576, 10),
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    x = torch.randn(128, 1, 28, 28)
    y = torch.randint(0, 10, (128,))
    ballast = [torch.rand(1_000_000) for _ in range(megabytes // 4)]
    state = {"ballast": ballast, "step": 0, "epoch": 0}

    def step() -> float:
        begun = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        return time.perf_counter() - begun

    plugin = CheckpointIO(async_save=True)
    turn = iter(range(1_000_000))

    def ours() -> Callable[[], bool]:
        plugin.save_checkpoint({**state, "global_step": next(turn)}, folder / "ours.ckpt")
        return lambda: all(job.done() for job in plugin._queued)

    def thread() -> Callable[[], bool]:
        copied = {"ballast": [tensor.clone() for tensor in ballast]}

        def write() -> None:
            torch.save(copied, folder / "thread.pt")
            synced(folder / "thread.pt")

        writer = threading.Thread(target=write)
        writer.start()
        return lambda: not writer.is_alive()

    ways = {"ours, async": ours, "torch.save in a thread": thread}
    if only:
        ways = {name: ways[name] for name in only}
    secs: dict[str, list[float]] = {name: [] for name in ("alone", *ways)}
    for _ in range(4):  # the first round is not counted
        rows: dict[str, list[float]] = {"alone": [step() for _ in range(steps)]}
        for name, begin in ways.items():
            done = begin()
            rows[name] = []
            while not done():
                rows[name].append(step())
            plugin.wait()
        for name, row in rows.items():
            secs[name].append(sum(row) / max(1, len(row)))
    return {name: median(values[1:]) for name, values in secs.items()}


def rows_of(megabytes: float, result: Mapping[str, Any]) -> list[list[str]]:
    found = result["found"]
    sizes = result["sizes"]
    middle = {
        name: {key: median(values) for key, values in row.items()} for name, row in found.items()
    }
    theirs = middle["Lightning + fsync"]
    state = sizes["state"]
    rows = []
    for name in (*BLOCKING, *ASYNC):
        one = middle[name]
        title = f"{state / 1e6:.1f} MB: {name}" if name == BLOCKING[0] else f"  {name}"
        speed = f"{state / 1e6 / one['on disk']:,.0f} MB/s" if name != "memcpy" else ""
        memory = f"{100 * one['memory'] / state:.0f} %" if megabytes >= 10 else ""
        waits = [f"{1000 * one['waits']:.1f} ms", ratio(theirs["waits"] / one["waits"])]
        rows.append([title, *waits, f"{1000 * one['on disk']:.1f} ms", speed, memory])
    return rows


def child(*words: str) -> Any:
    with tempfile.TemporaryDirectory(prefix="saves-", ignore_cleanup_errors=True) as folder:
        return last_line([sys.executable, __file__, "--child", folder, *words])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, nargs="*", default=list(ROUNDS))
    parser.add_argument(
        "--rounds", type=int, help="saves of each kind; without it as many as a minute holds"
    )
    parser.add_argument("--only", nargs="+", default=(), help=argparse.SUPPRESS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        (megabytes,) = asked.megabytes[:1] or [0]
        result = (
            measure_steps(asked.child, only=asked.only)
            if asked.steps
            else measure(megabytes, asked.rounds, asked.child, asked.only)
        )
        print(json.dumps(result))
        return 0
    print(f"On {machine()}", flush=True)
    rows: list[list[str]] = []
    for megabytes in asked.megabytes:
        rounds = asked.rounds or ROUNDS.get(megabytes, 5)
        rows += rows_of(megabytes, child("--megabytes", str(megabytes), "--rounds", str(rounds)))
        print(f"  {megabytes} MB done", flush=True)
    print(
        table(["one save", "waits", "Lightning's over it", "on disk", "speed", "memory"], rows)
        + "\n",
        flush=True,
    )
    steps = child("--steps")
    alone = steps["alone"]
    print(
        table(
            ["a step while 300 MB are written", "time", "slower"],
            [[n, f"{1000 * s:.1f} ms", ratio(s / alone)] for n, s in steps.items()],
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
