"""Small checkpoints for the tests of storage."""

import errno
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from savepoint.checkpoint.store import Checkpoint, write

State = dict[str, Any]


def small_state(value: float = 1.0) -> State:
    weight = torch.arange(600.0).reshape(20, 30) + value
    momentum = torch.full((20, 30), value)
    optimizer = {
        "state": {0: {"exp_avg": momentum, "step": torch.tensor(3.0)}},
        "param_groups": [{"lr": 0.1, "params": [0]}],
    }
    return {
        "epoch": 2,
        "global_step": 30,
        "state_dict": {"weight": weight, "bias": torch.zeros(20), "count": torch.tensor(7)},
        "optimizer_states": [optimizer],
        "optimizer": optimizer,
        "rng": {"torch": torch.arange(50, dtype=torch.uint8), "python": (3, (1, 2, 2**31), None)},
        "config": "model:\n  lr: 0.1\n",
    }


def facts(step: int, score: float | str | None = None, **more: Any) -> dict[str, Any]:
    metrics = {} if score is None else {"val/loss": {"value": score, "step": step}}
    return {
        "step": step,
        "epoch": step // 10,
        "metrics": metrics,
        "monitor": "val/loss",
        "mode": "min",
        **more,
    }


def small_checkpoint(path: Path, step: int = 30) -> Checkpoint:
    return write(path, small_state(), facts(step, 0.5))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def no_room_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full whenever a file of that name is to be put in its place."""
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if name in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)


def bytes_of_tensors(path: Path) -> set[int]:
    positions: set[int] = set()
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            name = len(record.filename)
            extra = int.from_bytes(data[record.header_offset + 28 :][:2], "little")
            if "/data/" in record.filename:
                start = record.header_offset + 30 + name + extra
                positions.update(range(start, start + record.file_size))
    return positions
