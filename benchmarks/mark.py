"""The callback of the processes whose starts are timed."""

import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from report import memory_bytes


class Mark(Callback):
    """At the end of step number BENCHMARK_STEPS of this process: writes to BENCHMARK_MARK the time,
    and the most memory that the process had held when its first step began; leaves at once.
    """

    # Of this process: a resume must not bring it back.
    savepoint_skip = frozenset({"steps", "peak"})

    def __init__(self) -> None:
        self.steps = 0
        self.peak = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.peak = self.peak or memory_bytes("VmHWM")

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1
        if self.steps == int(os.environ["BENCHMARK_STEPS"]):
            Path(os.environ["BENCHMARK_MARK"]).write_text(f"{time.monotonic()!r} {self.peak}")
            os._exit(0)
