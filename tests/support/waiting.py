"""A callback that a config can name: rank 1 stays where it is for a while, and says that it is
there.
"""

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from support.limits import LONGER_SECS


class Waiting(Callback):
    def __init__(self, where: str, mark: str) -> None:
        self.where, self.mark = where, Path(mark)

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.where == "sanity check" and trainer.sanity_checking:
            self._wait(trainer)

    def on_test_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.where == "test":
            self._wait(trainer)

    def _wait(self, trainer: Trainer) -> None:
        if trainer.global_rank == 1 and not self.mark.exists():
            self.mark.touch()
            time.sleep(LONGER_SECS)
