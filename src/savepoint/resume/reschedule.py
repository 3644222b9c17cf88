"""The rates of a resume whose config says something else: those of a schedule made anew, after the
steps that are done.

A restored schedule carries what its constructor computed from the old config. So the fresh one is
used, which `configure_optimizers` has just made from the new config: it is advanced by as many
steps as the saved one has made, step by step, as most schedules compute each rate from the one
before. ReduceLROnPlateau follows what was measured: it keeps its state and takes the new arguments.
A scheduler that is not torch's is left as it was saved.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR

from savepoint.errors import ConfigMismatchError

# Whose rate is a function of the step alone: all steps but the last can be left out.
_OF_THE_STEP = (LambdaLR, CyclicLR, OneCycleLR)
# What a schedule writes into the groups of its optimizer, beside momentum.
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
    """What the config of now makes of each optimizer's groups and of each scheduler, at the step of
    the checkpoint.

    Attributes:
        schedulers: States; None for one that is left as it was saved.
    """

    groups: list[list[dict[str, Any]]]
    schedulers: list[dict[str, Any] | None]


def advance(
    trainer: Trainer, saved: Sequence[Mapping[str, Any]], loops: Mapping[str, Any]
) -> Fresh:
    """Steps the schedulers as often as the saved ones were; called before the checkpoint overwrites
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
        alone = sum(_optimizer(other) is _optimizer(config) for other in configs) == 1
        if alone and steps and type(scheduler) in _OF_THE_STEP:
            scheduler.last_epoch = steps - 1
            scheduler._step_count = steps
            steps = 1
        when = _when(config, steps, loops, trainer.accumulate_grad_batches)
        calls += [(time, config.interval == "epoch", place) for time in when]
    for _, _, place in sorted(calls):
        _step(configs[place])
    return Fresh(
        groups=[
            [_copied(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers
        ],
        schedulers=[
            dict(config.scheduler.state_dict()) if _is_torchs(config.scheduler) else None
            for config in configs
        ],
    )


def put(trainer: Trainer, fresh: Fresh, changed: Changed) -> None:
    """Brings `fresh` into the restored training, and says what the learning rates were and are."""
    hyper = any(key.split(".")[0] == "model" for key in changed)
    before = _rates(trainer)
    left = []
    for place, (optimizer, groups) in enumerate(zip(trainer.optimizers, fresh.groups, strict=True)):
        own = [
            (config, state)
            for config, state in zip(trainer.lr_scheduler_configs, fresh.schedulers, strict=True)
            if _optimizer(config) is optimizer
        ]
        # Groups that were added on the way (a finetuning callback's): the schedules of now know
        # nothing of them.
        grown = len(groups) != len(optimizer.param_groups)
        strange = [config for config, state in own if state is None]
        plateau = any(config.reduce_on_plateau for config, _ in own)
        kept = [config for config, _ in own] if grown else strange
        left += [f"{type(config.scheduler).__name__} of optimizer {place}" for config in kept]
        for group, new in zip(optimizer.param_groups, groups, strict=False):
            if hyper:
                _write(
                    group,
                    {key: value for key, value in new.items() if key not in ("params", *_RATES)},
                )
            if strange or (grown and own):
                continue
            if plateau:
                _scale(group, new, changed)
            elif own or hyper:
                _write(group, {key: new[key] for key in _RATES if key in new})
                cycled = (
                    ("momentum", "betas") if "base_momentum" in new or "max_momentum" in new else ()
                )
                _write(group, {key: new[key] for key in cycled if key in new})
        for config, state in own:
            if state is not None and not grown:
                config.scheduler.load_state_dict(
                    _plateau(config, state) if config.reduce_on_plateau else state
                )
    if not trainer.is_global_zero:
        return
    if (after := _rates(trainer)) != before:
        pairs = [f"{was:.4g} -> {now:.4g}" for was, now in zip(before, after, strict=True)]
        more = f" and {len(pairs) - 3} more groups" if len(pairs) > 3 else ""
        print(
            f"learning rate at step {trainer.global_step}: {', '.join(pairs[:3])}{more}", flush=True
        )
    if left:
        print(
            f"learning rate: {', '.join(left)} goes on as it was saved, overrides do not reach it",
            flush=True,
        )


def _steps(state: Mapping[str, Any]) -> int:
    """How often a scheduler was stepped; a chain counts by its first link."""
    return int(state["last_epoch"]) if "last_epoch" in state else _steps(state["_schedulers"][0])


def _when(
    config: LRSchedulerConfig, steps: int, loops: Mapping[str, Any], accumulated: int
) -> list[float]:
    """After how many batches each step was made: several schedules of one optimizer change the same
    rate in turns.
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
            f"({error}). Expected one that is longer than what is trained already. Train longer, "
            "or leave the override away."
        ) from error


def _is_torchs(scheduler: Any) -> bool:
    """Whether it is stepped as torch's own are: one of the user may override the rate, not the way
    to it.
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


def _write(group: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(group.get(key), Tensor):
            group[key].fill_(value)  # a compiled step has this very tensor
        else:
            group[key] = value


def _scale(group: dict[str, Any], new: Mapping[str, Any], changed: Changed) -> None:
    """A plateau has brought the rate to some share of its base: it keeps the share, and takes the
    new base.

    What the old base was stands in no file: it is known where the config names it.
    """
    for key, (was, now) in changed.items():
        named = key.startswith("model.") and key.rpartition(".")[2].endswith(("lr", "rate"))
        if named and isinstance(was, int | float) and was and now == new["lr"]:
            _write(group, {"lr": now if group["lr"] == was else group["lr"] * now / was})
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
