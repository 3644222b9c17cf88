"""Runs that survive: how a training is saved, verified and resumed exactly. `__all__` is public.

Each name is imported at its first use, so that a command that only lists files does not wait for
torch.
"""

import time
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from savepoint import entry, errors, schedules, testing
    from savepoint.checkpoint.callback import CheckpointCallback
    from savepoint.checkpoint.io import CheckpointIO
    from savepoint.checkpoint.retention import Retention
    from savepoint.checkpoint.saver import Saver
    from savepoint.checkpoint.store import Checkpoint, CheckpointStore, load
    from savepoint.commands import Parser
    from savepoint.elastic_ddp import ElasticDDP
    from savepoint.files import replacing
    from savepoint.find import file_or_best
    from savepoint.loaders.batches import Batches
    from savepoint.loaders.resumable import ResumableLoader, resumable
    from savepoint.preemption import Preempted, stoppable
    from savepoint.rebuilding import Rebuilt, rebuild
    from savepoint.run import Run
    from savepoint.words import plural, table

__version__ = "0.2.0"

STARTED = time.monotonic()  # the entry points import this first: what `wall_secs` counts from

_HOMES = {
    "Batches": "loaders.batches",
    "Checkpoint": "checkpoint.store",
    "CheckpointCallback": "checkpoint.callback",
    "CheckpointIO": "checkpoint.io",
    "CheckpointStore": "checkpoint.store",
    "ElasticDDP": "elastic_ddp",
    "Parser": "commands",
    "Preempted": "preemption",
    "Rebuilt": "rebuilding",
    "ResumableLoader": "loaders.resumable",
    "Retention": "checkpoint.retention",
    "Run": "run",
    "Saver": "checkpoint.saver",
    "file_or_best": "find",
    "load": "checkpoint.store",
    "plural": "words",
    "rebuild": "rebuilding",
    "replacing": "files",
    "resumable": "loaders.resumable",
    "stoppable": "preemption",
    "table": "words",
}

__all__ = [
    "Batches", "Checkpoint", "CheckpointCallback", "CheckpointIO", "CheckpointStore", "ElasticDDP",
    "Parser", "Preempted", "Rebuilt", "ResumableLoader", "Retention", "Run", "Saver", "entry",
    "errors", "file_or_best", "load", "plural", "rebuild", "replacing", "resumable", "schedules",
    "stoppable", "table", "testing",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"savepoint.{_HOMES[name]}"), name)
    if name in __all__:
        return import_module(f"savepoint.{name}")
    raise AttributeError(f"module 'savepoint' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
