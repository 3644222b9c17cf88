"""The facts of one checkpoint that no tensor holds: who made it, where, why, and how the training
ended.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer

from savepoint.checkpoint.state import elastic, loops
from savepoint.checkpoint.state.process import environment


@dataclass
class Provenance:
    """What a run writes into each of its checkpoints.

    Attributes:
        config: As YAML text: the checkpoint alone rebuilds the run.
        parent: Digest of the checkpoint that this process started from.
        run: Its id and name.
    """

    config: str = ""
    parent: str | None = None
    run: Mapping[str, Any] = field(default_factory=dict)


def gather(trainer: Trainer, provenance: Provenance) -> dict[str, Any]:
    """What the trainer knows, as JSON can hold it."""
    data = getattr(trainer, "datamodule", None)
    return {
        "step": trainer.global_step,
        "logged_step": loops.logged_step(trainer),
        "epoch": trainer.current_epoch,
        "world_size": trainer.world_size,
        "elastic": elastic.promise(trainer),
        **of_run(provenance, data, trainer.strategy.root_device),
    }


def of_run(provenance: Provenance, data: Any, device: torch.device) -> dict[str, Any]:
    """What holds for any training: whose it is, of which data, when and where."""
    return {
        "run_id": provenance.run.get("id"),
        "parent": provenance.parent,
        "dataset": {key: getattr(data, key, None) for key in ("name", "fingerprint")},
        "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
    } | environment(device)


def why_ended(trainer: Trainer) -> str:
    """Which limit ended the training: said when a finished run is resumed."""
    if 0 <= trainer.max_steps <= trainer.global_step:
        return "max_steps"
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch:
        return "max_epochs"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping) and callback.stopped_epoch:
            return "early stopping"
        if isinstance(callback, Timer) and (callback.time_remaining() or 0) <= 0:
            return "max_time"
    return "a callback"
