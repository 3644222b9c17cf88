"""The learning rates of a resume with another config: those of a new schedule, after the steps that
are done.

A restored schedule has the values that its constructor computed from the old config. Instead the
new one is used, which `configure_optimizers` has just made from the new config. It is advanced by
the number of steps of the saved one, one by one, as most schedules compute each rate from the one
before. ReduceLROnPlateau depends on measured values: it keeps its state and takes the new
arguments. A scheduler that is not torch's stays as it was saved.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR

from savepoint.errors import ConfigMismatchError

# Schedules whose rate is a function of the step alone: all steps but the last can be skipped.
_OF_THE_STEP = (LambdaLR, CyclicLR, OneCycleLR)
# The keys that a schedule writes into the groups of its optimizer, beside momentum.
_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum")
_PLATEAU = (
    "factor",
    "min_lrs",
    "default_min_lr",
    "patience",
    "cooldown",
    "eps",
    "threshold",
    "threshold_mode",
)

Changed = Mapping[str, tuple[Any, Any]]


@dataclass
class Fresh:
    """The groups of each optimizer and the state of each scheduler by the new config, at the step
    of the checkpoint.

    Attributes:
        schedulers: None for one that stays as it was saved.
    """

    groups: list[list[dict[str, Any]]]
    schedulers: list[dict[str, Any] | None]


def advance(
    trainer: Trainer, saved: Sequence[Mapping[str, Any]], loops: Mapping[str, Any]
) -> Fresh:
    """Steps the new schedulers as often as the saved ones. Called before the checkpoint overwrites
    them.

    Args:
        saved: The states of the schedulers in the checkpoint, `loops` those of the loops.

    Raises:
        ConfigMismatchError: a schedule does not reach that far.
    """
    configs = trainer.lr_scheduler_configs
    calls: list[tuple[float, bool, int]] = []
    for place, (config, state) in enumerate(zip(configs, saved, strict=True)):
        if not _is_torchs(config.scheduler) or config.reduce_on_plateau:
            continue
        steps = _steps(state)
        scheduler = config.scheduler
        is_only = sum(_optimizer(other) is _optimizer(config) for other in configs) == 1
        if is_only and steps and type(scheduler) in _OF_THE_STEP:
            scheduler.last_epoch = steps - 1
            scheduler._step_count = steps
            steps = 1
        when = _when(config, steps, loops, trainer.accumulate_grad_batches)
        calls += [(time, config.interval == "epoch", place) for time in when]
    for _, _, place in sorted(calls):
        _step(configs[place])
    schedulers = [config.scheduler for config in configs]
    return Fresh(
        groups=[list(map(_copied, optimizer.param_groups)) for optimizer in trainer.optimizers],
        schedulers=[dict(one.state_dict()) if _is_torchs(one) else None for one in schedulers],
    )


def put(trainer: Trainer, fresh: Fresh, changed: Changed) -> None:
    """Puts `fresh` into the restored training, and prints the learning rates before and after."""
    before = _rates(trainer)
    left = []
    for place, (optimizer, groups) in enumerate(zip(trainer.optimizers, fresh.groups, strict=True)):
        pairs = zip(trainer.lr_scheduler_configs, fresh.schedulers, strict=True)
        own = [(config, state) for config, state in pairs if _optimizer(config) is optimizer]
        kept = _put_one(optimizer, groups, own, changed)
        left += [f"{type(config.scheduler).__name__} of optimizer {place}" for config in kept]
    if not trainer.is_global_zero:
        return
    after = _rates(trainer)
    if after != before:
        changes = [f"{was:.4g} -> {now:.4g}" for was, now in zip(before, after, strict=True)]
        more = f" and {len(changes) - 3} more groups" if len(changes) > 3 else ""
        shown = ", ".join(changes[:3])
        print(f"learning rate at step {trainer.global_step}: {shown}{more}", flush=True)
    if left:
        print(
            f"learning rate: {', '.join(left)} goes on as it was saved, overrides do not reach it",
            flush=True,
        )


def _put_one(
    optimizer: Optimizer,
    groups: Sequence[Mapping[str, Any]],
    own: Sequence[tuple[LRSchedulerConfig, dict[str, Any] | None]],
    changed: Changed,
) -> list[LRSchedulerConfig]:
    """Puts the new groups and schedules into one optimizer; returns the schedules that stay as they
    were saved.
    """
    hyper = any(key.split(".")[0] == "model" for key in changed)
    # Groups that were added later (by a finetuning callback) are unknown to the new schedules.
    grown = len(groups) != len(optimizer.param_groups)
    strange = [config for config, state in own if state is None]
    plateau = any(config.reduce_on_plateau for config, _ in own)
    for group, new in zip(optimizer.param_groups, groups, strict=False):
        if hyper:
            _write(group, new, [key for key in new if key not in ("params", *_RATES)])
        if strange or (grown and own):
            continue
        if plateau:
            _scale(group, new, changed)
        elif own or hyper:
            cycles = "base_momentum" in new or "max_momentum" in new
            _write(group, new, [*_RATES, "momentum", "betas"] if cycles else _RATES)
    for config, state in own:
        if state is not None and not grown:
            restored = _plateau(config, state) if config.reduce_on_plateau else state
            config.scheduler.load_state_dict(restored)
    return [config for config, _ in own] if grown else strange


def _steps(state: Mapping[str, Any]) -> int:
    """The number of steps that a scheduler has made; a chain counts by its first part."""
    return int(state["last_epoch"]) if "last_epoch" in state else _steps(state["_schedulers"][0])


def _when(
    config: LRSchedulerConfig, steps: int, loops: Mapping[str, Any], accumulated: int
) -> list[float]:
    """The number of batches before each step of a schedule: several schedules of one optimizer
    change the same rate in turns.
    """
    batches = loops["fit_loop"]["epoch_loop.batch_progress"]
    epochs = loops["fit_loop"]["epoch_progress"]["current"]
    begun = epochs["ready"] > epochs["completed"]
    whole = batches["total"]["completed"] - (batches["current"]["completed"] if begun else 0)
    in_epoch = whole / epochs["completed"] if epochs["completed"] else math.inf
    if config.interval == "epoch":
        return [count * config.frequency * in_epoch for count in range(1, steps + 1)]
    stride = math.lcm(config.frequency, accumulated)
    if in_epoch == math.inf:
        return [float(count * stride) for count in range(1, steps + 1)]
    calls = max(1, int(in_epoch // stride))
    return [count // calls * in_epoch + (count % calls + 1) * stride for count in range(steps)]


def _step(config: LRSchedulerConfig) -> None:
    try:
        # Torch misses the optimizer's steps: they are in the checkpoint.
        with warnings.catch_warnings(action="ignore"):
            config.scheduler.step()  # type: ignore[call-arg]
    except ValueError as error:
        raise ConfigMismatchError(
            f"The schedule ends before the checkpoint: {type(config.scheduler).__name__} "
            f"({error}). It must reach beyond the steps that are done. Train longer, or leave the "
            "override away."
        ) from error


def _is_torchs(scheduler: Any) -> bool:
    """Whether a scheduler steps as torch's own do: a user's class may override the rate, not
    `step`.
    """
    step = getattr(type(scheduler), "step", None)
    inner = getattr(scheduler, "_schedulers", [])
    return str(getattr(step, "__module__", "")).startswith("torch.") and all(map(_is_torchs, inner))


def _optimizer(config: LRSchedulerConfig) -> Optimizer:
    return config.scheduler.optimizer


def _copied(group: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in group.items()
        if key != "params"
    }


def _write(group: dict[str, Any], new: Mapping[str, Any], keys: Iterable[str]) -> None:
    for key in keys:
        if key not in new:
            continue
        if isinstance(group.get(key), Tensor):
            group[key].fill_(new[key])  # a compiled step uses this very tensor
        else:
            group[key] = new[key]


def _scale(group: dict[str, Any], new: Mapping[str, Any], changed: Changed) -> None:
    """Scales a rate that a plateau has lowered: it stays the same share of the new base.

    No file holds the old base: it is known where the config names it.
    """
    for key, (was, now) in changed.items():
        named = key.startswith("model.") and key.rpartition(".")[2].endswith(("lr", "rate"))
        if named and isinstance(was, int | float) and was and now == new["lr"]:
            scaled = now if group["lr"] == was else group["lr"] * now / was
            _write(group, {"lr": scaled}, ["lr"])
            return


def _plateau(config: LRSchedulerConfig, fresh: dict[str, Any]) -> dict[str, Any]:
    restored = config.scheduler.state_dict()
    if restored["mode"] != fresh["mode"]:
        return fresh
    rates = [group["lr"] for group in config.scheduler.optimizer.param_groups]
    return restored | {key: fresh[key] for key in _PLATEAU} | {"_last_lr": rates}


def _rates(trainer: Trainer) -> list[float]:
    return [
        float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups
    ]
