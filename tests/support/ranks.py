"""A module of this package as several processes of one training on the CPU."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from support.limits import HANG_SECS
from support.programs import ROOT

TESTS = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])}


def start_ranks(module: str, ranks: int, *arguments: object) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "OMP_NUM_THREADS": "1",
        }
    return [
        subprocess.Popen(
            [sys.executable, "-m", f"support.{module}", *map(str, arguments)],
            env=os.environ | TESTS | address | {"LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip


def run_ranks(module: str, ranks: int, *arguments: object) -> None:
    processes = start_ranks(module, ranks, *arguments)
    said = [process.communicate(timeout=HANG_SECS)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(said)


def differences(
    module: str, directory: Path, ranks: int, kind: str, every: int = 1
) -> dict[str, list[str]]:
    """By safe point, what is different at the end of a resume from there."""
    run_ranks(module, ranks, directory, ranks, kind, every)
    found: dict[str, list[str]] = json.loads((directory / "found.json").read_text())
    assert len(found) >= 4
    return {point: what for point, what in found.items() if what}
