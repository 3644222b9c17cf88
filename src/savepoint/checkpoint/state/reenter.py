"""Puts a captured state back, at the very point where it was captured."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torchmetrics import Metric

from savepoint.checkpoint.state.capture import metrics_of
from savepoint.checkpoint.state.exactness import versions
from savepoint.checkpoint.state.loops import averaging, by_the_clock, put_settings
from savepoint.checkpoint.state.process import restore_rng
from savepoint.checkpoint.state.roots import own_optimizers
from savepoint.look.baseline import Baseline
from savepoint.look.walk import Look


def shared_groups(trainer: Trainer) -> list[tuple[Any, Any, str]]:
    """Optimizers that wrap another one, as SAM and Lookahead do, and the attributes that both of
    them hold.
    """
    return [
        (outer, inner, name)
        for outer in trainer.optimizers
        for inner in vars(outer).values()
        for name in ("param_groups", "state")
        if isinstance(inner, Optimizer) and getattr(inner, name) is getattr(outer, name)
    ]


def share_again(shared: Sequence[tuple[Any, Any, str]]) -> None:
    """`load_state_dict` gives each of the two one of its own; a schedule would reach only one."""
    for outer, inner, name in shared:
        setattr(inner, name, getattr(outer, name))


def reenter(trainer: Trainer, saved: Mapping[str, Any], baseline: Baseline, now: Look) -> list[str]:
    """Puts everything where it was when the checkpoint was made, at the very same point. Random
    states come last.

    Without any one of these lines some resume goes wrong: tests/resume/test_exact_resume.py takes
    each away.

    Returns:
        Words for what has changed in the training that made the checkpoint, and has no place in
        this one.
    """
    module = trainer.lightning_module
    fit = trainer.fit_loop
    epoch = fit.epoch_loop
    connector = trainer._logger_connector
    _restore_counters(trainer, saved)
    _load_again(trainer, saved)
    fetching = saved.get("fetching")
    if fetching:
        if fetching["reloaded"]:
            last = [float("-inf") if number is None else number for number in fetching["reloaded"]]
            fit._last_train_dl_reload_epoch, epoch.val_loop._last_val_dl_reload_epoch = last
        connector._first_loop_iter = fetching["first"]
        epoch.val_loop._seen_batches_per_dataloader.update(fetching["seen"])
    else:
        connector._first_loop_iter = True  # of an older file
    for name, length in saved.get("trackers", {}).items():
        tracker: Any = module.get_submodule(name)
        while len(tracker) < length:
            tracker.increment()
    restore_metric_states(module, saved)
    epoch._results.clear()
    if saved["at"] == "epoch":
        _restore_loaders(trainer, saved)
    else:
        restore_logged(trainer, module, saved)
        _restore_fetching(trainer, fetching)
    restore_metrics(trainer, saved)
    _restore_gradients(module, saved.get("gradients", {}))
    toggled = saved.get("toggled", {})
    kept: Any = {p: toggled[name] for name, p in module.named_parameters() if name in toggled}
    module._param_requires_grad_state = kept
    if trainer.global_rank:
        _restore_buffers(module, saved.get("buffers", {}))
    if "syncs_buffers" in saved and isinstance(trainer.strategy.model, DistributedDataParallel):
        trainer.strategy.model.require_forward_param_sync = saved["syncs_buffers"]
    loaded = own_optimizers(trainer)
    failed = baseline.restore(now, saved.get("attributes", []), module.device, loaded)
    put_settings(trainer, saved.get("settings", {}))
    trainer.should_stop = saved["should_stop"]
    if saved["at"] == "validation" and by_the_clock(trainer):
        # It is due, whatever the clock of this process says.
        vars(trainer)["_last_val_time"] = float("-inf")
    restore_rng(saved["rng"], module.device)
    return failed


def put_groups_back(trainer: Trainer, saved: Mapping[str, Any]) -> None:
    """Learning rates and the like: a hook of a start may set them, which was done before the first
    step alone.
    """
    for optimizer, state in zip(trainer.optimizers, saved["optimizer_states"], strict=False):
        groups = state.get("param_groups", ()) if isinstance(state, Mapping) else ()
        for group, then in zip(optimizer.param_groups, groups, strict=False):
            for name in [name for name in then if name != "params"]:
                if isinstance(group.get(name), Tensor) and isinstance(then[name], Tensor):
                    group[name].copy_(then[name])
                else:
                    group[name] = copy.deepcopy(then[name])


def _load_again(trainer: Trainer, saved: Mapping[str, Any]) -> None:
    """Hooks of a start may write to weights, which a start from the beginning does before the first
    step alone.
    """
    module = trainer.lightning_module
    if versions(module) != saved["versions"] and not averaging(trainer):
        module.load_state_dict(saved["state_dict"], strict=module.strict_loading)


def _restore_counters(trainer: Trainer, saved: Mapping[str, Any]) -> None:
    """Lightning has counted on from the file: its loops stand here as if never left."""
    fit = trainer.fit_loop
    epoch = fit.epoch_loop
    fit.load_state_dict(saved["loops"]["fit_loop"])
    fit._combined_loader_states_to_load = []
    for loop in (
        fit,
        epoch,
        epoch.val_loop,
        epoch.automatic_optimization,
        epoch.manual_optimization,
    ):
        loop._restarting = loop._loaded_from_state_dict = loop._resuming_from_checkpoint = False
        loop.reset_restart_stage()
    epoch.max_steps = saved["max_steps"]


def _restore_loaders(trainer: Trainer, saved: Mapping[str, Any]) -> None:
    """Where an epoch begins Lightning leaves the loaders' states alone; the one of a stream goes on
    all the same.
    """
    states = saved["loops"]["fit_loop"]["state_dict"].get("combined_loader")
    if states:
        trainer.fit_loop._combined_loader._load_state_dicts(states)  # type: ignore[union-attr]


def load_waiting_states(trainer: Trainer) -> None:
    """A schedule that asks for `estimated_stepping_batches` made Lightning set up the loader before
    it had these.
    """
    fit = trainer.fit_loop
    if fit._combined_loader_states_to_load and fit.restarting:
        fit._combined_loader._load_state_dicts(fit._combined_loader_states_to_load)  # type: ignore[union-attr]
        fit._combined_loader_states_to_load = []
        iter(fit._data_fetcher)  # type: ignore[arg-type]


def _restore_fetching(trainer: Trainer, fetching: Mapping[str, Any] | None) -> None:
    fetcher = trainer.fit_loop._data_fetcher
    combined = trainer.fit_loop._combined_loader
    if not fetching or fetcher is None or combined is None or combined._iterator is None:
        return
    ahead = combined._iterator._idx  # what was fetched in advance, of a loader without a length
    combined._iterator._idx = fetching["index"]
    if hasattr(combined._iterator, "_consumed"):
        combined._iterator._consumed = list(fetching["consumed"])
    if not ahead:
        fetcher.fetched = fetching["fetched"]
    if isinstance(fetcher, _DataLoaderIterDataFetcher):
        fetcher._batch_idx = fetching["batch"]


def _restore_buffers(module: LightningModule, buffers: Mapping[str, Tensor]) -> None:
    own = dict(module.named_buffers())
    with torch.no_grad():
        for name, buffer in buffers.items():
            own[name].copy_(buffer)


def _restore_gradients(module: LightningModule, gradients: Mapping[str, Tensor]) -> None:
    parameters = dict(module.named_parameters())
    for name, gradient in gradients.items():
        parameters[name].grad = gradient.to(parameters[name].device, copy=True)


def restore_metric_states(module: LightningModule, state: Mapping[str, Any]) -> None:
    state = move_data_to_device({"metric_states": state["metric_states"]}, module.device)
    for name, metric in metrics_of(module).items():
        saved = dict(state["metric_states"].get(name) or _as_reset(metric))
        metric._update_count = saved.pop("updates")
        metric._computed = None
        for key, value in saved.items():
            setattr(metric, key, value)


def _as_reset(metric: Metric) -> dict[str, Any]:
    states: dict[str, Any] = {
        name: default.detach().clone().to(metric.device) if isinstance(default, Tensor) else []
        for name, default in metric._defaults.items()
    }
    return {"updates": 0} | states


class _LoggedAlone(_Metadata):
    """How a value was logged in one process, where Lightning takes no notice of `sync_dist`: the
    next call says it.
    """

    def __ne__(self, other: object) -> bool:  # asked before that of `other`, which is no subclass
        if isinstance(other, _Metadata):
            self.sync.should = other.sync.should
        self.__class__ = _Metadata  # type: ignore[assignment]
        return self != other


def restore_logged(trainer: Trainer, module: LightningModule, state: Mapping[str, Any]) -> None:
    """Puts the logged sums back, so that the curve of the running epoch goes on."""
    logged = move_data_to_device(state["logged"], module.device)
    results = trainer.fit_loop.epoch_loop._results
    distributed = trainer._accelerator_connector.is_distributed
    for row in logged:
        results.dataloader_idx = row["dataloader_idx"]
        value = (
            module.get_submodule(row["log"]["metric_attribute"])
            if row["value"] is None
            else row["value"]
        )
        given = dict(row["log"])
        if row.get("builtin"):  # Lightning takes Python's own `max` for another one than torch's
            given["reduce_fx"] = {"min": min, "max": max, "sum": sum}[given["reduce_fx"]]
        given["sync_dist"] = given["sync_dist"] and distributed
        results.log(value=value, batch_size=1, sync_dist_fn=trainer.strategy.reduce, **given)
        result = list(results.values())[-1]
        if distributed and not state.get("other_ranks"):
            result.meta.__class__ = _LoggedAlone
        result._forward_cache = row["last"]
        if row["value"] is not None:
            result.value = row["value"]
        if row["size"] is not None:
            result.cumulated_batch_size = row["size"]
    results.dataloader_idx = None


def restore_metrics(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """What plateau schedules, early stopping and progress bars read."""
    connector = trainer._logger_connector
    device = trainer.strategy.root_device
    connector._callback_metrics = move_data_to_device(state["callback_metrics"], device)
    connector._logged_metrics = move_data_to_device(state.get("logged_metrics", {}), device)
    connector._progress_bar_metrics = move_data_to_device(
        state.get("progress_bar_metrics", {}), device
    )
