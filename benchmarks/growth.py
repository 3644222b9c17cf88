"""How cost grows: with the bytes of a state, and with the number of checkpoints that are kept.

    python benchmarks/growth.py
    python benchmarks/growth.py --plot growth.png         (needs matplotlib: make extras)

First table: states of 4, 8 ... 256 MB: a save with its fsyncs, one read of the file into one buffer
of 1 MiB, one into new memory, a look at every byte, a load (which looks too, and fills new memory),
and a look at the manifest alone. Second: directories with 1 to 1,000 small checkpoints
that are all kept: one more save, and, as a process that starts anew would, the choice of the latest
and of the best. Last: `savepoint ls` of 10,000, a whole process, and whether it imported torch. The
sizes take turns; the first round is not counted; medians. TMPDIR should be a disk.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from report import ROOT, machine, ratio, table

from savepoint.checkpoint import format, manifest, store
from savepoint.checkpoint.retention import Retention
from savepoint.checkpoint.store import CheckpointStore

TIMES = (1, 2, 4, 8, 16, 32, 64)
COUNTS = (1, 10, 100, 1000)
LISTED = 10_000
BASE_BYTES = 4_000_000


def facts(step: int) -> dict[str, object]:
    score = (step * 37 % 1000) / 1000
    metrics = {"val/accuracy": {"value": score, "step": step}}
    return {
        "step": step,
        "epoch": step,
        "at": "epoch",
        "metrics": metrics,
        "monitor": "val/accuracy",
        "mode": "max",
    }


def secs(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def read_once(path: Path) -> None:
    buffer = bytearray(2**20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def by_bytes(
    rounds: int, folder: Path, sizes: Sequence[int] = TIMES
) -> dict[int, dict[str, float]]:
    """Factor -> seconds of each kind."""
    found: dict[int, dict[str, list[float]]] = {times: {} for times in sizes}
    states = {
        times: {"weights": [torch.rand(BASE_BYTES // 4) for _ in range(times)]} for times in sizes
    }
    for _ in range(rounds + 1):
        for times, state in states.items():
            path = folder / f"{times}.ckpt"
            calls: dict[str, Callable[[], object]] = {
                "save": lambda path=path, state=state: store.write(path, state, facts(1)),  # type: ignore[misc]
                "read": lambda path=path: read_once(path),  # type: ignore[misc]
                "read anew": lambda path=path: path.read_bytes(),  # type: ignore[misc]
                "verify": lambda path=path: manifest.verify(path),  # type: ignore[misc]
                "load": lambda path=path: store.load(path),  # type: ignore[misc]
                "manifest": lambda path=path: manifest.read(path),  # type: ignore[misc]
            }
            for name, call in calls.items():
                found[times].setdefault(name, []).append(secs(call))
            path.unlink()
    return {
        times: {name: median(values[1:]) for name, values in row.items()}
        for times, row in found.items()
    }


def fill(directory: Path, count: int) -> None:
    """With checkpoints that are whole; not synced, which only costs time here."""
    directory.mkdir()
    for step in range(1, count + 1):
        with (directory / f"step-{step:08d}.ckpt").open("w+b") as file:
            format.encode({"weights": torch.zeros(8)}, facts(step), file)


def by_count(rounds: int, folder: Path) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, list[float]]] = {count: {} for count in COUNTS}
    running = {}
    for count in COUNTS:
        fill(folder / str(count), count)
        running[count] = CheckpointStore(folder / str(count), retention=Retention(keep_last=10**6))
    for i in range(rounds + 1):
        for count, kept in running.items():
            step = count + 1 + i
            anew = CheckpointStore(kept.directory, mode="max")
            row = found[count]
            row.setdefault("save", []).append(
                secs(lambda k=kept, s=step: k.add({"w": torch.zeros(8)}, facts(s)))
            )  # type: ignore[misc]
            row.setdefault("choose", []).append(secs(lambda a=anew: (a.latest(), a.best())))  # type: ignore[misc]
    return {
        count: {name: median(values[1:]) for name, values in row.items()}
        for count, row in found.items()
    }


def listing(rounds: int, folder: Path) -> tuple[float, bool]:
    """(seconds of the whole command, whether it imported torch)"""
    fill(folder / "checkpoints", LISTED)
    program = (
        "import sys; from savepoint.commands import main; code = main(['ls', sys.argv[1]]); "
        "print('torch' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    found = []
    said = ""
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, cwd=ROOT
        )
        found.append(time.perf_counter() - begun)
        said = done.stderr.strip()
        if done.returncode or done.stdout.count("step-") < LISTED:
            sys.exit(f"savepoint ls ended with {done.returncode}: {done.stderr[-500:]}")
    return median(found[1:]), said == "True"


def plot(
    path: Path, bytes_found: dict[int, dict[str, float]], count_found: dict[int, dict[str, float]]
) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in ("save", "load", "verify", "manifest"):
        left.plot(
            [times * BASE_BYTES / 1e6 for times in TIMES],
            [row[name] for row in bytes_found.values()],
            "o-",
            label=name,
        )
    left.set(xscale="log", yscale="log", xlabel="MB", ylabel="seconds", title="by bytes")
    for name in ("save", "choose"):
        right.plot(COUNTS, [row[name] for row in count_found.values()], "o-", label=name)
    right.set(xscale="log", yscale="log", xlabel="checkpoints kept", title="by number")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plot", type=Path, help="file to draw both tables into")
    asked = parser.parse_args()
    print(f"On {machine()}", flush=True)
    with tempfile.TemporaryDirectory(prefix="growth-") as folder:
        grown = by_bytes(asked.rounds, Path(folder))
        first = grown[1]
        rows = [
            [
                f"{times * BASE_BYTES / 1e6:.0f} MB",
                *(f"{1000 * row[name]:.1f} ms ({ratio(row[name] / first[name])})" for name in row),
            ]
            for times, row in grown.items()
        ]
        print(
            table(["state", "save", "read", "read anew", "verify", "load", "manifest"], rows)
            + "\n",
            flush=True,
        )
        counted = by_count(asked.rounds, Path(folder))
        rows = [
            [str(count), f"{1000 * row['save']:.1f} ms", f"{1000 * row['choose']:.1f} ms"]
            for count, row in counted.items()
        ]
        print(table(["kept", "one more save", "latest and best, anew"], rows) + "\n", flush=True)
        whole, torch_came = listing(asked.rounds, Path(folder))
        print(
            f"savepoint ls of {LISTED:,}: {whole:.2f} s, torch {'was' if torch_came else 'not'} "
            "imported"
        )
        if asked.plot:
            plot(asked.plot, grown, counted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
