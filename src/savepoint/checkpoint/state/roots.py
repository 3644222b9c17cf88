"""Where the look at a training begins: everything that its state_dicts may leave out."""

import itertools
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    Checkpoint,
    DeviceStatsMonitor,
    LearningRateFinder,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
    WeightAveraging,
)
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from savepoint.checkpoint.state.loops import is_stateful, train_loaders, validation_loaders
from savepoint.look.classes import is_library
from savepoint.look.walk import Before, Look

_NOT_LOOKED_AT = (
    ProgressBar, ModelSummary, Checkpoint, LearningRateMonitor, DeviceStatsMonitor, Timer,
    ThroughputMonitor, LearningRateFinder, BatchSizeFinder,
)  # fmt: skip
_LOADER_PARTS = ("dataset", "sampler", "batch_sampler", "collate_fn", "generator")


def _parts(name: str, loader: Any) -> dict[str, Any]:
    """Of a loader, what the user made. A loader with a state_dict answers for itself."""
    if hasattr(loader, "user_parts"):
        return {f"{name}.{part}": value for part, value in loader.user_parts().items()}
    if is_stateful(loader):
        return {}
    if not isinstance(loader, DataLoader):
        return {name: loader}
    own = getattr(loader, "_savepoint_generator", None)
    parts = {part: getattr(loader, part, None) for part in _LOADER_PARTS}
    found = {f"{name}.{part}": value for part, value in parts.items() if value is not own}
    if not is_library(type(loader).__module__):  # a class of the user's may count, too
        found[name] = loader
    return found


def look(trainer: Trainer, before: Before = Before()) -> Look:  # noqa: B008 - cannot be changed
    """At everything of this training that its state_dicts may leave out."""
    module = trainer.lightning_module
    roots: dict[str, Any] = own_optimizers(trainer)
    roots["model"] = module
    if trainer.datamodule is not None:  # type: ignore[attr-defined]
        roots["data"] = trainer.datamodule  # type: ignore[attr-defined]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not _is_looked_at(callback):
            continue
        roots[_new_name(type(callback).__name__, roots)] = callback
    for number, loader in enumerate(train_loaders(trainer)):
        roots |= _parts(f"training loader {number}", loader)
    for number, loader in enumerate(validation_loaders(trainer)):
        roots |= _parts(f"validation loader {number}", loader)
    roots |= _functions(trainer)
    known: dict[int, str] = {id(trainer): "the trainer", id(trainer.strategy): "the strategy"}
    known |= {id(logger): "a logger" for logger in trainer.loggers}
    optimizers = [*trainer.optimizers, *trainer.strategy._lightning_optimizers]
    known |= {id(optimizer): f"optimizer {i}" for i, optimizer in enumerate(optimizers)}
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    known |= {id(scheduler): f"schedule {i}" for i, scheduler in enumerate(schedulers)}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not _is_looked_at(callback):
            known[id(callback)] = type(callback).__name__
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            known[id(callback._average_model)] = "the averaged weights"
    if trainer.model is not module:
        known[id(trainer.model)] = "the wrapped model"
    for root in roots.values():
        known.pop(id(root), None)
    return Look(roots, known, module.state_dict().keys(), _noted_on(trainer), before)


def _is_looked_at(callback: Callback) -> bool:
    ours = type(callback).__module__.startswith("savepoint.")
    return not ours and not isinstance(callback, _NOT_LOOKED_AT)


def _noted_on(trainer: Trainer) -> dict[str, Any]:
    """What is Lightning's own, and written on by those who find no better place."""
    noted: dict[str, Any] = {"trainer": trainer, "strategy": trainer.strategy}
    noted |= {"loop": trainer.fit_loop, "epoch loop": trainer.fit_loop.epoch_loop}
    noted |= {f"logger {i}": logger for i, logger in enumerate(trainer.loggers)}
    wrapped = trainer.strategy._lightning_optimizers
    return noted | {f"Lightning's optimizer {i}": one for i, one in enumerate(wrapped)}


def _new_name(name: str, roots: Mapping[str, Any]) -> str:
    numbered = (f"{name}{number}" for number in itertools.count(2))
    return next(one for one in itertools.chain([name], numbered) if one not in roots)


def own_optimizers(trainer: Trainer) -> dict[str, Any]:
    """Optimizers, and schedules of the user's own classes: their state_dict may leave out what they
    count, or what is written on them.
    """
    own: dict[str, Any] = {f"optimizer {i}": one for i, one in enumerate(trainer.optimizers)}
    own |= {
        # Of another class, which may be the user's: it makes this rank's part of each step.
        f"{name}.optim": one.optim
        for name, one in list(own.items())
        if isinstance(one, ZeroRedundancyOptimizer)
    }
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
    # The state_dict of torch's own base class of schedules holds every attribute.
    own |= {
        f"schedule {i}": one for i, one in enumerate(schedules) if not isinstance(one, LRScheduler)
    }
    return {
        name: one
        for name, one in own.items()
        if isinstance(one, Optimizer) or not is_library(type(one).__module__)
    }


def _functions(trainer: Trainer) -> dict[str, Any]:
    """What optimizers and schedules call: a function may count, and no state_dict holds what it
    does.
    """
    found: dict[str, Any] = {}
    for i, optimizer in enumerate(trainer.optimizers):
        hooks = [
            getattr(optimizer, f"_optimizer_step_{when}_hooks", {}) for when in ("pre", "post")
        ]
        found[f"hooks of optimizer {i}"] = [hook for one in hooks for hook in one.values()]
    for i, config in enumerate(trainer.lr_scheduler_configs):
        parts = [config.scheduler, *getattr(config.scheduler, "_schedulers", [])]
        found[f"functions of schedule {i}"] = [
            one for part in parts for one in getattr(part, "lr_lambdas", [])
        ]
    return found


def held(trainer: Trainer, before: Mapping[Any, Any]) -> dict[Any, Any]:
    """Marks of what the running epoch goes by: its sampler, and data sets of which workers hold a
    copy.

    Args:
        before: The marks of the epoch before: workers that persist hold the copy that they began
            with.
    """
    marks: dict[Any, Any] = {}
    now: Look | None = None
    for loader in train_loaders(trainer):
        parts = loader.user_parts() if hasattr(loader, "user_parts") else {}
        if not parts.get("sampler"):
            continue
        now = now or look(trainer)
        if loader.goes_by_its_sampler:
            marks |= now.marks_below(parts["sampler"])
        if loader.num_workers:
            copies = now.marks_below(parts["dataset"])
            kept = {path: before[path] for path in copies if path in before}
            marks |= copies | (kept if loader.persistent_workers else {})
    return marks


def kept(trainer: Trainer, now: Look, marks: Mapping[Any, Any]) -> dict[Any, Any]:
    """Of these marks, those that the epochs to come go by too: persistent workers hold copies."""
    below: set[Any] = set()
    for loader in train_loaders(trainer):
        if hasattr(loader, "user_parts") and loader.num_workers and loader.persistent_workers:
            below |= set(now.marks_below(loader.user_parts().get("dataset")))
    return {path: mark for path, mark in marks.items() if path in below}


def by_worker(trainer: Trainer, now: Look) -> list[str]:
    """Words for data that go by the worker's number: after a resume, another worker reads them."""
    return [
        "the training data go by which worker reads them (get_worker_info)"
        for loader in train_loaders(trainer)
        if hasattr(loader, "user_parts")
        and loader.num_workers
        and now.mentioned_below(loader.user_parts().get("dataset"), "get_worker_info")
    ]
