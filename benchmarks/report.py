"""What the benchmarks share: where the data is, what machine this is, how a table looks."""

import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]


def require_mnist() -> None:
    """Leaves with a message unless DATA_ROOT holds the real MNIST; makes it absolute for the
    processes that are started.
    """
    root = os.environ.get("DATA_ROOT")
    if not root or not Path(root, "MNIST", "raw", "train-images-idx3-ubyte").is_file():
        print(
            f"No MNIST in DATA_ROOT: {root or 'not set'}. Expected a folder with "
            "MNIST/raw/train-images-idx3-ubyte and three more, unpacked: the figures are those "
            "of the real data. Set it: DATA_ROOT=/path/to/data",
            file=sys.stderr,
        )
        sys.exit(2)
    os.environ["DATA_ROOT"] = str(Path(root).resolve())


def machine() -> str:
    """One line for the head of a table. Imports no torch: that is part of what some programs
    measure.
    """
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [
            line
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        name = models[0].partition(":")[2].strip() if models else name
    load = f"load {os.getloadavg()[0]:.1f} at the start"
    return f"{os.cpu_count()} cores of {name}, Python {platform.python_version()}, {load}"


def in_turns(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of what each side returns, one after the other in each round; the first round is
    not counted.

    Each round begins with another side: what one leaves behind is not always the same one's to
    bear.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for i in range(rounds + 1):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(sides[name]())
        said = ", ".join(f"{name} {values[-1]:,.5g}" for name, values in found.items())
        print(f"  {f'round {i}' if i else 'warm-up'}: {said}", flush=True)
    return {name: median(values[1:]) for name, values in found.items()}


def ratio(value: float) -> str:
    return f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need; the first one to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(
            [
                cells[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)),
            ]
        )
        for cells in (header, *rows)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
