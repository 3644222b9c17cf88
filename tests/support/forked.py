"""train.py and resume.py as real processes, forked from one that has imported everything: a start
takes no seconds.
"""

import atexit
import ctypes
import multiprocessing
import os
import re
import runpy
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from support.limits import HANG_SECS

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
# The first one sees to it that no collection of garbage, here or in a fork, looks at what all of them
# import. Without Flower the last one is left out.
CONTEXT.set_forkserver_preload(["project", "savepoint.resume.start", "savepoint.federated.runtime"])


class Program:
    """One process.

    Args:
        command: As it would follow `python`.
        log: Where its output goes, after what is there.
        before: Called in the process before the script runs; a function of a module.
        at: The working directory.
        environment: More variables.
    """

    def __init__(
        self,
        command: list[str],
        log: Path,
        before: Callable[[], None] | None = None,
        at: Path = ROOT,
        **environment: str,
    ) -> None:
        self.log, self._begins = log, log.stat().st_size if log.exists() else 0
        self._process = CONTEXT.Process(
            target=_main, args=(command, log, before, at, environment), daemon=True
        )
        self._process.start()

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def said(self) -> str:
        return self.log.read_bytes()[self._begins :].decode() if self.log.exists() else ""

    @property
    def saved(self) -> list[int]:
        """The steps whose save was reported."""
        return [int(step) for step in re.findall(r"saved step-(\d+)\.ckpt", self.said)]

    @property
    def runs(self) -> bool:
        return self._process.exitcode is None

    def wait_for(self, happened: Callable[[], object]) -> None:
        until = time.monotonic() + HANG_SECS
        while not happened():
            assert self.runs, self.said
            assert time.monotonic() < until, self.said
            time.sleep(0.003)

    def signal(self, signum: signal.Signals) -> None:
        os.kill(self.pid, signum)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def wait(self, secs: float = HANG_SECS) -> int:
        """Its exit code."""
        self._process.join(secs)
        if self.runs:
            self.kill()
            raise AssertionError(f"It does not end. {self.said}")
        assert self._process.exitcode is not None
        return self._process.exitcode


def run(
    command: list[str], log: Path, before: Callable[[], None] | None = None, at: Path = ROOT
) -> tuple[int, str]:
    """Exit code and output."""
    with Program(command, log, before, at) as program:
        return program.wait(), program.said


def without_privileges() -> None:
    """Root like anybody else: from here on the permissions of other people's files hold for it too."""
    libc = ctypes.CDLL(None, use_errno=True)
    # capset(2), version 3, this process.
    header, no_capabilities = struct.pack("Ii", 0x20080522, 0), bytes(24)
    assert libc.capset(header, no_capabilities) == 0, os.strerror(ctypes.get_errno())


def without_fsync() -> None:
    os.fsync = lambda _: None  # type: ignore[assignment]


def _main(
    command: list[str],
    log: Path,
    before: Callable[[], None] | None,
    at: Path,
    environment: dict[str, str],
) -> None:
    # It ends with its parent; as a program of its own it may have children, such as workers that load.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(at)
    os.environ.update(environment)
    tempfile.tempdir = None  # read TMPDIR again
    import torch

    torch.set_num_threads(1)
    if before:
        before()
    sys.argv = command
    try:
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a forked process leaves them out
