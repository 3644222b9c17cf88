"""What the benchmarks share: where the data is, what machine this is, how a table looks."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

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


def alone(program: str, function: str, *given: Any) -> Any:
    """What a function of a program here returns in a process of its own: one that forks, has
    threads of its own number, or says much.
    """
    call = f"{program}.{function}(*json.loads(sys.argv[1]))"
    code = f"import json, sys, {program}; print(json.dumps({call}))"
    return last_line([sys.executable, "-c", code, json.dumps(given)])


def last_line(command: Sequence[str]) -> Any:
    """What a process prints last, as JSON."""
    environment = os.environ | {"PYTHONPATH": with_benchmarks()}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def with_benchmarks() -> str:
    """PYTHONPATH, for a process that imports from here."""
    known = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(Path(__file__).parent), *([known] if known else [])])


def in_ranks(ranks: int, work: Callable[[int], None]) -> None:
    """Calls `work` in so many forks: of a process that has computed nothing with torch yet."""
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            work(rank)
            os._exit(0)
        children.append(child)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0


def memory_bytes(field: str) -> int:
    """Of this process: VmRSS now, VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def in_turns(
    sides: Mapping[str, Callable[[], float]], rounds: int, *, warm: bool = True
) -> dict[str, float]:
    """The median of what each side returns, one after the other in each round; the first round is
    not counted, unless what went before has warmed all up.

    Each round begins with another side: what one leaves behind is not always the same one's to
    bear.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for i in range(not warm, rounds + 1):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(sides[name]())
        said = ", ".join(f"{name} {values[-1]:,.5g}" for name, values in found.items())
        print(f"  {f'round {i}' if i else 'warm-up'}: {said}", flush=True)
    return {name: median(values[warm:] or values) for name, values in found.items()}


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
