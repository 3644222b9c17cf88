"""What `ckpt_path="last"` and `"best"` mean: Lightning asks its own ModelCheckpoint alone."""

import sys
from typing import Any

from lightning.pytorch import Trainer

from savepoint.checkpoint.manifest import step_files
from savepoint.checkpoint.state import loops
from savepoint.checkpoint.store import CheckpointStore


def load_last(trainer: Trainer, store: CheckpointStore) -> None:
    """Makes `ckpt_path="last"` the newest checkpoint that verifies: Lightning looks at its own
    ModelCheckpoint only.

    Finding none, it would go on with untrained weights. What lies ready where it puts a file that
    it has read, it restores.

    Raises:
        CheckpointNotFoundError: to test, validate or predict there must be one; a fit may begin
            without.
    """
    call = running_call()
    if call is None or call[0] is not trainer or call[2] != "last" or call[3]:
        return
    if call[1] == "fit" and not step_files(store.directory):
        if trainer.is_global_zero:
            print(
                f'No checkpoint yet in {store.directory}: ckpt_path="last" begins a new training.',
                flush=True,
            )
        return
    chosen, checkpoint, lines = store.load_latest(lock_holder=False)
    if trainer.is_global_zero:
        print("\n".join([*lines, f"From {chosen.path}: step {chosen.step}"]), flush=True)
    loops.give_loaded(trainer, checkpoint)


def running_call() -> tuple[Trainer, str, Any, Any] | None:
    """The running call of `fit`, `validate`, `test` or `predict`: of which trainer, which, its
    ckpt_path, the path found.

    By the time a callback is asked, Lightning has forgotten the word: it stands only in the frame
    of the call.
    """
    frame = sys._getframe()
    found = None
    while frame.f_back is not None:
        frame = frame.f_back
        own = frame.f_locals.get("self")
        values = frame.f_locals
        if isinstance(own, Trainer) and frame.f_code.co_name == "_run":
            found = values.get("ckpt_path")
        if isinstance(own, Trainer) and frame.f_code.co_name in (
            "fit",
            "validate",
            "test",
            "predict",
        ):
            return own, frame.f_code.co_name, values.get("ckpt_path"), found
    return None
