"""A module of this package as several processes of one training on the CPU, forked from one that
has imported everything.
"""

import json
import os
import socket
from pathlib import Path

from support.forked import Program, without_fsync
from support.programs import ROOT

TESTS = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])}


def run_ranks(module: str, ranks: int, directory: Path, *arguments: object) -> None:
    """The module's first argument is the directory, which gets a log of each rank too."""
    directory.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [f"tests/support/{module}.py", str(directory), *map(str, arguments)]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    programs = [
        Program(
            command, directory / f"rank-{rank}.log", without_fsync, LOCAL_RANK=str(rank), **address
        )
        for rank in range(ranks)
    ]
    ended = [program.wait() for program in programs]
    assert ended == [0] * ranks, "\n".join(program.said for program in programs)


def differences(
    module: str, directory: Path, ranks: int, kind: str, every: int = 1
) -> dict[str, list[str]]:
    """By safe point, what is different at the end of a resume from there."""
    run_ranks(module, ranks, directory, ranks, kind, every)
    found: dict[str, list[str]] = json.loads((directory / "found.json").read_text())
    assert len(found) >= 4
    return {point: what for point, what in found.items() if what}
