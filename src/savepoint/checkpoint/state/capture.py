"""The state of this process that Lightning does not save."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    LearningRateFinder,
)
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.utilities.parsing import (
    lightning_getattr,
    lightning_hasattr,
)
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers import MetricTracker

from savepoint.checkpoint.state.process import capture_rng
from savepoint.look.walk import Look

# Hooks that run once the gradients of their own step are there.
_AFTER_BACKWARD = (
    "on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping",
    "on_train_batch_end",
)  # fmt: skip
# What `self.log(...)` was called with, apart from the value: enough to make the same entry again.
_LOG_ARGUMENTS = (
    "fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx",
    "metric_attribute",
)  # fmt: skip
_OF_GRADIENTS = ("grad", "grad_norm", "clip_grad_norm_", "clip_grad_value_", "get_total_norm")
_MOST_BUFFER_BYTES = 64 * 2**20  # of what is copied at each validation, and saved for each rank


def capture(
    trainer: Trainer,
    module: LightningModule,
    reads: tuple[bool, bool] = (True, True),
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """The state of this process that Lightning leaves out: with the tensors themselves, for use
    before training goes on.

    Args:
        reads: What `reads_gradients` has found.
        defaults: What `metric_defaults` was at the start.
    """
    connector = trainer._logger_connector
    fit = trainer.fit_loop
    modules = dict(module.named_modules())
    for part in modules.values():
        if isinstance(part, MetricCollection) and part._groups_checked:
            # Of a group, one metric alone is kept up to date.
            part._compute_groups_create_state_ref()
    state = {
        "rng": capture_rng(module.device),
        "metric_states": {
            name: _metric_state(part)
            for name, part in modules.items()
            if isinstance(part, Metric) and not _is_reset(part, defaults.get(name))
        },
        "trackers": {
            name: len(part) for name, part in modules.items() if isinstance(part, MetricTracker)
        },
        "logged": [_logged(r) for r in fit.epoch_loop._results.values() if not r.has_reset],
        "callback_metrics": dict(connector._callback_metrics),
        "logged_metrics": dict(connector._logged_metrics),
        "progress_bar_metrics": dict(connector._progress_bar_metrics),
        "gradients": _pending_gradients(trainer, module, *reads),
        "toggled": _toggled(module),
        "fetching": _fetching(trainer),
    }  # fmt: skip
    detached: dict[str, Any] = _detached(state)
    return detached


def _detached(tree: Any) -> Any:
    """Of plain containers alone: Lightning's `recursive_detach` takes four times as long."""
    if isinstance(tree, Tensor):
        return tree.detach()
    if type(tree) is dict:
        return {key: _detached(value) for key, value in tree.items()}
    if type(tree) is list:
        return [_detached(value) for value in tree]
    return tree


def metric_defaults(module: LightningModule) -> dict[str, Any]:
    """What stands for the states that each metric has after its `reset`, until it is changed."""
    return {name: _default_marks(metric) for name, metric in metrics_of(module).items()}


def metrics_of(module: LightningModule) -> dict[str, Metric]:
    return {name: part for name, part in module.named_modules() if isinstance(part, Metric)}


def changed_defaults(module: LightningModule, at_start: Mapping[str, Any]) -> list[str]:
    """Words for metrics whose `reset` goes to another state than that of a fresh start."""
    now = metric_defaults(module)
    return [
        f"model.{name} (another state to reset to than at the start)"
        for name, marks in at_start.items()
        if name in now and now[name] != marks
    ]


def _default_marks(metric: Metric) -> list[Any]:
    return [(id(one), getattr(one, "_version", one)) for one in metric._defaults.values()]


def _is_reset(metric: Metric, at_start: Any) -> bool:
    """Whether it is as after the `reset` of a fresh start, as those of a validation are in a
    training epoch: each tensor less is a thirtieth of a small save.
    """
    unused = metric._update_count == 0 and _default_marks(metric) == at_start
    return unused and all(
        _is_default(getattr(metric, name), default) for name, default in metric._defaults.items()
    )


def _is_default(value: Any, default: Any) -> bool:
    if isinstance(value, Tensor) and isinstance(default, Tensor):
        return value.dtype == default.dtype and torch.equal(value, default.to(value.device))
    return type(value) is list and value == [] == default


def _metric_state(metric: Metric) -> dict[str, Any]:
    states = {name: getattr(metric, name) for name in metric._defaults}
    return {"updates": metric._update_count} | states


def _logged(result: Any) -> dict[str, Any]:
    """Of one logged value: how it was logged, and its running sum."""
    meta = result.meta
    is_mean = result.is_tensor and meta.is_mean_reduction
    value = result.value if result.is_tensor else None
    arguments = {name: getattr(meta, name) for name in _LOG_ARGUMENTS}
    arguments["reduce_fx"] = meta.reduce_fx.__name__
    arguments["sync_dist"] = meta.sync.should
    arguments["rank_zero_only"] = meta.sync.rank_zero_only
    return {
        "log": arguments,
        "dataloader_idx": meta.dataloader_idx,
        "builtin": meta.reduce_fx in (min, max, sum),
        "last": result._forward_cache,
        "value": value,
        "size": result.cumulated_batch_size if is_mean else None,
    }


def _fetching(trainer: Trainer) -> dict[str, Any]:
    """How far the loaders of the running epoch have come, by Lightning's own count."""
    loop = trainer.fit_loop
    fetcher = loop._data_fetcher
    iterator = getattr(loop._combined_loader, "_iterator", None)
    return {
        "first": trainer._logger_connector._first_loop_iter,
        "fetched": getattr(fetcher, "fetched", 0),
        "index": getattr(iterator, "_idx", 0),
        "consumed": list(getattr(iterator, "_consumed", [])),
        "batch": getattr(fetcher, "_batch_idx", 0),
        "seen": dict(loop.epoch_loop.val_loop._seen_batches_per_dataloader),
        "reloaded": _reloaded(trainer),
    }


def _reloaded(trainer: Trainer) -> list[int | None]:
    """The epochs in which loaders that are made anew were made; None for one that never was."""
    if not trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        return []
    loop = trainer.fit_loop
    last = (loop._last_train_dl_reload_epoch, loop.epoch_loop.val_loop._last_val_dl_reload_epoch)
    return [None if epoch == float("-inf") else int(epoch) for epoch in last]


def reads_gradients(now: Look) -> tuple[bool, bool]:
    """Whether the user's code may look at the gradients of the step before, which stand until they
    are set to zero; and whether it looks at gradients at all.
    """
    before = now.mentions(("grad", "grad_norm"), but_in=_AFTER_BACKWARD)
    return before, before or now.mentions(_OF_GRADIENTS, but_in=())


def _toggled(module: LightningModule) -> dict[str, bool]:
    """What `toggle_optimizer` keeps until `untoggle_optimizer`, by the names of the weights."""
    kept = module._param_requires_grad_state
    return {name: kept[p] for name, p in module.named_parameters() if kept and p in kept}  # type: ignore[index]


def _pending_gradients(
    trainer: Trainer, module: LightningModule, read: bool, all_read: bool
) -> dict[str, Tensor]:
    """Gradients that the next step may add to: elsewhere Lightning's own zero_grad comes before any
    it computes.

    A step that takes the iterator is counted before its batch is known, and zeroes by the number of
    the batch before.
    """
    overridden = _steps_by_itself(module)
    takes_iterator = isinstance(trainer.fit_loop._data_fetcher, _DataLoaderIterDataFetcher)
    late = takes_iterator and trainer.accumulate_grad_batches > 1
    all_pending = overridden or late or read or not module.automatic_optimization
    if not all_pending and not all_read:
        return {}
    pending = {name: p for name, p in module.named_parameters() if p.grad is not None}
    if not all_pending:
        trained = {
            id(p)
            for one in trainer.optimizers
            for group in one.param_groups
            for p in group["params"]
        }
        # Those of weights that nobody trains are summed up for ever.
        pending = {name: p for name, p in pending.items() if id(p) not in trained}
    return {name: p.grad for name, p in pending.items() if p.grad is not None}


def _steps_by_itself(module: LightningModule) -> bool:
    own = ("optimizer_zero_grad", "optimizer_step", "backward", "on_before_zero_grad")
    kind = type(module)
    return any(
        name in vars(module) or getattr(kind, name) is not getattr(LightningModule, name)
        for name in own
    )


def kinds(trainer: Trainer, now: Look) -> dict[str, Any]:
    """What another process sets up by itself: once it is another one, no file makes it so."""
    callbacks = [type(one).__name__ for one in trainer.callbacks]  # type: ignore[attr-defined]
    found: dict[str, Any] = {"other callbacks": callbacks}
    for i, optimizer in enumerate(trainer.optimizers):
        groups = optimizer.param_groups
        found[f"another optimizer {i}"] = type(optimizer).__name__
        found[f"other parameters in optimizer {i}"] = [
            # A weight that has another place now is given, by the file, to another one.
            [(id(p), now.path_to(p)) for p in group["params"]]
            for group in groups
        ]
    for i, config in enumerate(trainer.lr_scheduler_configs):
        found[f"another schedule {i}"] = type(config.scheduler).__name__
        found[f"other settings of schedule {i}"] = [
            config.interval,
            config.frequency,
            config.monitor,
        ]
    return found


def other_kinds(trainer: Trainer, now: Look, before: Mapping[str, Any]) -> list[str]:
    after = kinds(trainer, now)
    for name in after:
        # Groups that have joined are in the file.
        if name.startswith("other parameters") and name in before:
            after[name] = after[name][: len(before[name])]
    return [
        f"{name} than at the start"
        for name in {**before, **after}
        if after.get(name) != before.get(name)
    ]


def group_counts(trainer: Trainer) -> list[int]:
    return [len(optimizer.param_groups) for optimizer in trainer.optimizers]


def grown_groups(trainer: Trainer, before: Sequence[int]) -> dict[int, list[list[str]]]:
    """Names of the parameters in each group that an optimizer was given in mid-training, by the
    optimizer's number.
    """
    if [len(optimizer.param_groups) for optimizer in trainer.optimizers] == before:
        return {}
    names = {id(parameter): name for name, parameter in trainer.lightning_module.named_parameters()}
    grown = {}
    for number, (optimizer, count) in enumerate(zip(trainer.optimizers, before, strict=False)):
        groups = optimizer.param_groups[count:]
        if groups:
            grown[number] = [[names.get(id(p), "") for p in group["params"]] for group in groups]
    return grown


def found(trainer: Trainer) -> dict[str, Any]:
    """What Lightning's finders have set before the training: a resume does not search again."""
    module = trainer.lightning_module
    values: dict[str, Any] = {}
    for name in finders(trainer):
        if name and lightning_hasattr(module, name):
            values[name] = lightning_getattr(module, name)
    return values


def finders(trainer: Trainer) -> dict[str, Callback]:
    """The finders by the attribute that each sets."""
    by_attribute: dict[str, Callback] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if type(callback).__module__.startswith("savepoint."):
            continue
        if isinstance(callback, BatchSizeFinder):
            by_attribute[callback._batch_arg_name] = callback
        if isinstance(callback, LearningRateFinder):
            has_lr = lightning_hasattr(trainer.lightning_module, "lr")
            default = "lr" if has_lr else "learning_rate"
            by_attribute[callback._attr_name or default] = callback
    return by_attribute


def own_rank(trainer: Trainer) -> dict[str, Any]:
    """What each rank has of its own: in manual optimization DDP leaves it its running statistics
    after the first step.
    """
    ddp = trainer.strategy.model
    syncs = not isinstance(ddp, DistributedDataParallel) or ddp.require_forward_param_sync
    return {"buffers": own_buffers(trainer.lightning_module), "syncs_buffers": bool(syncs)}


def own_buffers(module: LightningModule) -> dict[str, Tensor]:
    buffers = {name: buffer for name, buffer in module.named_buffers() if not buffer.is_sparse}
    return (
        buffers if sum(buffer.nbytes for buffer in buffers.values()) <= _MOST_BUFFER_BYTES else {}
    )
