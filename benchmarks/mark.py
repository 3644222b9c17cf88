"""The callback of the processes whose starts are timed."""

import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback


class Mark(Callback):
    """At the end of step number BENCHMARK_STEPS of this process: writes the time to BENCHMARK_MARK
    and leaves at once.
    """

    savepoint_skip = frozenset({"steps"})  # of this process: a resume must not bring it back

    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1
        if self.steps == int(os.environ["BENCHMARK_STEPS"]):
            Path(os.environ["BENCHMARK_MARK"]).write_text(repr(time.monotonic()))
            os._exit(0)
