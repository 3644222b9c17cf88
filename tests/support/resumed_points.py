"""A training of several ranks, resumed from its safe points: each of them calls `write_differences`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from savepoint.checkpoint import store
from support.small import EveryPoint, difference, final_state, rows


def write_differences(
    directory: Path, every: int, train: Callable[..., Trainer], **saving: Any
) -> None:
    """Trains to the end, and from every n-th point again. What is different then at the end is in
    found.json, by point.

    Args:
        train: Called with a directory and arguments of `fit`.
        saving: Of the checkpointing.
    """
    torch.set_num_threads(1)
    straight = directory / "straight"
    checkpointing = EveryPoint(directory / "points", monitor="val/loss", mode="min", **saving)
    trainer = train(straight, checkpointing=checkpointing)
    found = {}
    # At the last one all is done.
    for file in trainer.strategy.broadcast(checkpointing.kept[:-1:every]):
        work = directory / f"from-{file.stem}"
        if trainer.is_global_zero:
            work.mkdir()
            shutil.copy(straight / "metrics.csv", work)
        torch.distributed.barrier()
        state, facts = store.load(file)
        train(work, ckpt_path=file, keep_rows=state["logged_rows"])
        if trainer.is_global_zero:
            found[file.stem] = list(difference(final_state(straight), final_state(work)))
            found[file.stem] += ["rows differ"] if rows(straight) != rows(work) else []
            found[file.stem] += [] if facts["exact"] else [f"not exact: {facts['unsaved']}"]
    if trainer.is_global_zero:
        (directory / "found.json").write_text(json.dumps(found))
