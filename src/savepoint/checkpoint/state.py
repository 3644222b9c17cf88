"""What is saved beyond Lightning's own: captured where nothing is half done, and put back there. No
files.

Everything here is plain types and tensors, so that `weights_only=True` reads it. The private names
of Lightning 2.6 that an exact resume needs stand here and in `callback.py`, nowhere else.

captured   random states, metric states, logged sums, gradients that are pending, and whatever
           `look` sees to change
derived    the order of batches and what samples draw: `loader`
named      what has changed and is no plain value: `inexact`
"""

import copy
import platform
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import LightningModule, Trainer
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
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher, _PrefetchDataFetcher
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.parsing import (
    lightning_getattr,
    lightning_hasattr,
    lightning_setattr,
)
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers import MetricTracker

import savepoint
from savepoint.checkpoint import manifest
from savepoint.checkpoint.look import Baseline, Look, is_library
from savepoint.checkpoint.pack import fingerprint
from savepoint.errors import CheckpointForeignError, ConfigError, ConfigMismatchError
from savepoint.loader import derive

# Hooks that run once the gradients of their own step are there.
_AFTER_BACKWARD = (
    "on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping", "on_train_batch_end",
)  # fmt: skip
# What `self.log(...)` was called with, apart from the value: enough to make the same entry again.
_LOG_ARGUMENTS = (
    "fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx", "metric_attribute",
)  # fmt: skip


def capture_rng(device: torch.device) -> dict[str, Any]:
    """The random states of this process: python, numpy, torch on the CPU and, where there is one,
    on the accelerator.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        # One tensor: as 625 numbers they would take longer to pickle than all the rest of a small
        # checkpoint.
        "python": [version, torch.from_numpy(np.array(words)), gauss],
        # Seen as int32: torch.save takes uint32, but plain pickle, with which ranks exchange this,
        # does not.
        "numpy": [
            name,
            torch.from_numpy(np.array(keys).view(np.int32)),
            position,
            has_gauss,
            cached,
        ],
        "torch": torch.get_rng_state(),
        "accelerator": None
        if device.type == "cpu"
        else torch.get_device_module(device).get_rng_state(),
    }


def restore_rng(rng: Mapping[str, Any], device: torch.device) -> None:
    """Puts `capture_rng`'s result back. A state of an accelerator that is not there is left out."""
    version, words, gauss = rng["python"]
    random.setstate((version, tuple(torch.as_tensor(words).tolist()), gauss))
    name, keys, *rest = rng["numpy"]
    np.random.set_state((name, keys.cpu().numpy().view(np.uint32), *rest))
    torch.set_rng_state(rng["torch"].cpu())
    if rng["accelerator"] is not None and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(rng["accelerator"].cpu())


@contextmanager
def isolated_rng(device: torch.device) -> Iterator[None]:
    """Nothing that draws inside is noticed outside: a save must not disturb the training it saves."""
    before = capture_rng(device)
    try:
        yield
    finally:
        restore_rng(before, device)


def _metrics(module: LightningModule) -> dict[str, Metric]:
    return {name: part for name, part in module.named_modules() if isinstance(part, Metric)}


# -- the three points ----------------------------------------------------------------------------


class Points:
    """Calls back at the points of a training where nothing is half done, before any hook of anybody
    runs there.

    Lightning has no hooks at these places: `on_train_epoch_start` comes after those of other
    callbacks, which a resume would run twice. So three functions of this one Trainer's loops are
    called through ours, until `remove`.

    Args:
        epoch: An epoch is about to begin.
        batch: The next batch is about to be asked for. False leaves the batch out: a validation is
            to be run again.
        validation: A validation is about to begin.
        end: The last epoch has ended.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        epoch: Callable[[], None],
        batch: Callable[[], bool],
        validation: Callable[[], None],
        end: Callable[[], None],
    ) -> None:
        self._fit = trainer.fit_loop
        self._epoch_loop = self._fit.epoch_loop
        self._batch = batch
        self.remove()
        self._before(self._fit, "on_advance_start", epoch)
        self._before(self._epoch_loop.val_loop, "run", validation)
        self._before(self._fit, "on_run_end", end)
        advance = self._epoch_loop.advance

        def called_through_ours(fetcher: Any) -> None:
            self._advance(advance, fetcher)

        setattr(self._epoch_loop, "advance", called_through_ours)  # noqa: B010 - an instance's own, as above

    def _before(self, loop: Any, name: str, call: Callable[[], None]) -> None:
        original = getattr(loop, name)

        def called_before() -> Any:
            call()
            return original()

        setattr(loop, name, called_before)

    def _advance(self, advance: Callable[[Any], None], fetcher: Any) -> None:
        begins = not self._epoch_loop.batch_progress.current.ready
        if not self._batch():
            return
        try:
            advance(fetcher)
        except StopIteration:
            if not begins or self._epoch_loop.batch_progress.current.ready or fetcher.fetched:
                raise
            # A loader that was put back to the end of its epoch has nothing more: a new pass
            # begins.
            iter(fetcher)
            advance(fetcher)

    def remove(self) -> None:
        for loop, name in (
            (self._fit, "on_advance_start"),
            (self._fit, "on_run_end"),
            (self._epoch_loop, "advance"),
            (self._epoch_loop.val_loop, "run"),
        ):
            vars(loop).pop(name, None)


# -- what is looked at ---------------------------------------------------------------------------

_NOT_LOOKED_AT = (
    ProgressBar, ModelSummary, Checkpoint, LearningRateMonitor, DeviceStatsMonitor, Timer, ThroughputMonitor,
    LearningRateFinder, BatchSizeFinder,
)  # fmt: skip
_LOADER_PARTS = ("dataset", "sampler", "batch_sampler", "collate_fn", "generator")
# Of the Trainer, what callbacks change in mid-training.
_SETTINGS = (
    "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "limit_val_batches",
    "check_val_every_n_epoch", "val_check_interval", "val_check_batch", "log_every_n_steps", "limit_train_batches",
    "reload_dataloaders_every_n_epochs", "max_batches",
)  # fmt: skip


# Of its loops, and needed before these run.
_BOUNDS = ("max_epochs", "min_epochs", "max_steps")


def _parts(name: str, loader: Any) -> dict[str, Any]:
    """Of a loader, what the user made. A loader with a state_dict answers for itself."""
    if hasattr(loader, "user_parts"):
        return {f"{name}.{part}": value for part, value in loader.user_parts().items()}
    if isinstance(loader, _Stateful):
        return {}
    if not isinstance(loader, DataLoader):
        return {name: loader}
    own = getattr(loader, "_savepoint_generator", None)
    parts = {part: getattr(loader, part, None) for part in _LOADER_PARTS}
    return {f"{name}.{part}": value for part, value in parts.items() if value is not own}


def look(trainer: Trainer) -> Look:
    """At everything of this training that its state_dicts may leave out."""
    module = trainer.lightning_module
    roots: dict[str, Any] = _own_optimizers(trainer)
    roots["model"] = module
    if trainer.datamodule is not None:  # type: ignore[attr-defined]
        roots["data"] = trainer.datamodule  # type: ignore[attr-defined]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, _NOT_LOOKED_AT):
            continue
        name = type(callback).__name__
        number = sum(one.startswith(name) for one in roots)
        roots[f"{name}{number + 1 if number else ''}"] = callback
    for number, loader in enumerate(train_loaders(trainer)):
        roots |= _parts(f"training loader {number}", loader)
    for number, loader in enumerate(_validation_loaders(trainer)):
        roots |= _parts(f"validation loader {number}", loader)
    roots |= _functions(trainer)
    known: dict[int, str] = {id(trainer): "the trainer", id(trainer.strategy): "the strategy"}
    known |= {id(logger): "a logger" for logger in trainer.loggers}
    optimizers = [*trainer.optimizers, *trainer.strategy._lightning_optimizers]
    known |= {id(optimizer): f"optimizer {i}" for i, optimizer in enumerate(optimizers)}
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    known |= {id(scheduler): f"schedule {i}" for i, scheduler in enumerate(schedulers)}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, _NOT_LOOKED_AT):
            known[id(callback)] = type(callback).__name__
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            known[id(callback._average_model)] = "the averaged weights"
    if trainer.model is not module:
        known[id(trainer.model)] = "the wrapped model"
    for root in roots.values():
        known.pop(id(root), None)
    return Look(roots, known, module.state_dict().keys())


def _own_optimizers(trainer: Trainer) -> dict[str, Any]:
    """Optimizers and schedules of the user's own classes: their state_dict may leave out what they
    count.
    """
    own: dict[str, Any] = {f"optimizer {i}": one for i, one in enumerate(trainer.optimizers)}
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
    # The state_dict of torch's own base class of schedules holds every attribute.
    own |= {
        f"schedule {i}": one for i, one in enumerate(schedules) if not isinstance(one, LRScheduler)
    }
    return {name: one for name, one in own.items() if not is_library(type(one).__module__)}


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


def bounds(trainer: Trainer) -> dict[str, Any]:
    return {name: getattr(_owner(trainer, name), name) for name in _BOUNDS}


def settings(trainer: Trainer) -> dict[str, Any]:
    return {name: getattr(_owner(trainer, name), name, None) for name in (*_SETTINGS, *_BOUNDS)}


def _put_settings(trainer: Trainer, saved: Mapping[str, Any]) -> None:
    for name, value in saved.items():
        setattr(_owner(trainer, name), name, value)


def _owner(trainer: Trainer, setting: str) -> Any:
    if setting == "max_steps":
        return trainer.fit_loop.epoch_loop
    return trainer.fit_loop if setting in ("max_epochs", "min_epochs", "max_batches") else trainer


def train_loaders(trainer: Trainer) -> list[Any]:
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def _validation_loaders(trainer: Trainer) -> list[Any]:
    combined = trainer.fit_loop.epoch_loop.val_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


# -- Lightning's own books -----------------------------------------------------------------------


def as_lightning_saves(trainer: Trainer) -> dict[str, Any]:
    """What `Trainer.save_checkpoint` would write, with what callbacks add."""
    return dict(trainer._checkpoint_connector.dump_checkpoint(weights_only=False))


def give_loaded(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Where Lightning puts a file that it has read: from there it restores."""
    trainer._checkpoint_connector._loaded_checkpoint = checkpoint


def accumulates(trainer: Trainer) -> bool:
    """Whether the gradients of the batch that was trained last wait for more."""
    return bool(trainer.fit_loop.epoch_loop._should_accumulate())


def measured(trainer: Trainer) -> dict[str, Tensor]:
    """Each metric that was logged, the object as it was reduced: another object means that it was
    measured again.
    """
    return trainer._logger_connector._callback_metrics


def set_steps(trainer: Trainer, batches: int) -> None:
    """For the logs of a training that goes on from a file of another program."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = batches


# -- capture -------------------------------------------------------------------------------------


def capture(
    trainer: Trainer, module: LightningModule, reads_gradients: bool = True
) -> dict[str, Any]:
    """The state of this process that Lightning leaves out: with the tensors themselves, for use
    before training goes on.
    """
    connector, fit = trainer._logger_connector, trainer.fit_loop
    logged = [
        {
            "log": {name: getattr(result.meta, name) for name in _LOG_ARGUMENTS}
            | {
                "reduce_fx": result.meta.reduce_fx.__name__,
                "sync_dist": result.meta.sync.should,
                "rank_zero_only": result.meta.sync.rank_zero_only,
            },
            "dataloader_idx": result.meta.dataloader_idx,
            "builtin": result.meta.reduce_fx in (min, max, sum),
            "last": result._forward_cache,
            "value": result.value if result.is_tensor else None,
            "size": result.cumulated_batch_size
            if result.is_tensor and result.meta.is_mean_reduction
            else None,
        }
        for result in fit.epoch_loop._results.values()
        if not result.has_reset
    ]
    for part in module.modules():
        if isinstance(part, MetricCollection) and part._groups_checked:
            # Of a group, one metric alone is kept up to date.
            part._compute_groups_create_state_ref()
    fetcher, combined = fit._data_fetcher, fit._combined_loader
    iterator = None if combined is None else combined._iterator
    state = {
        "rng": capture_rng(module.device),
        "metric_states": {
            name: {"updates": metric._update_count} | {key: getattr(metric, key) for key in metric._defaults}
            for name, metric in _metrics(module).items()
        },
        "trackers": {
            name: len(part) for name, part in module.named_modules() if isinstance(part, MetricTracker)
        },
        "logged": logged,
        "callback_metrics": dict(connector._callback_metrics),
        "logged_metrics": dict(connector._logged_metrics),
        "progress_bar_metrics": dict(connector._progress_bar_metrics),
        "gradients": _pending_gradients(trainer, module, reads_gradients),
        "fetching": {
            "first": connector._first_loop_iter,
            "fetched": 0 if fetcher is None else fetcher.fetched,
            "index": 0 if iterator is None else iterator._idx,
            "consumed": list(getattr(iterator, "_consumed", [])),
            "batch": getattr(fetcher, "_batch_idx", 0),
            "seen": dict(fit.epoch_loop.val_loop._seen_batches_per_dataloader),
            "reloaded": _reloaded(trainer),
        },
    }  # fmt: skip
    detached: dict[str, Any] = _detached(state)
    return detached


def _reloaded(trainer: Trainer) -> list[int | None]:
    """The epochs in which the loaders were made anew, where they are; None for one that never was."""
    if not trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        return []
    loop = trainer.fit_loop
    last = (loop._last_train_dl_reload_epoch, loop.epoch_loop.val_loop._last_val_dl_reload_epoch)
    return [None if epoch == float("-inf") else int(epoch) for epoch in last]


def reads_gradients(now: Look) -> bool:
    """Whether the user's code may look at the gradients of the step before, which stand until they
    are set to zero.
    """
    return now.mentions(("grad", "grad_norm"), but_in=_AFTER_BACKWARD)


def _pending_gradients(trainer: Trainer, module: LightningModule, read: bool) -> dict[str, Tensor]:
    """Gradients that the next step may add to: elsewhere Lightning's own zero_grad comes before any
    it computes.

    A step that takes the iterator is counted before its batch is known, and zeroes by the number of
    the batch before.
    """
    own = ("optimizer_zero_grad", "optimizer_step", "backward", "on_before_zero_grad")
    overridden = any(is_overridden(name, module) for name in own)
    takes_iterator = isinstance(trainer.fit_loop._data_fetcher, _DataLoaderIterDataFetcher)
    late = takes_iterator and trainer.accumulate_grad_batches > 1
    if module.automatic_optimization and not overridden and not late and not read:
        return {}
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def kinds(trainer: Trainer) -> dict[str, Any]:
    """What another process sets up by itself: once it is another one, no file makes it so."""
    names = {id(parameter): name for name, parameter in trainer.lightning_module.named_parameters()}
    found: dict[str, Any] = {"other callbacks": [type(one).__name__ for one in trainer.callbacks]}  # type: ignore[attr-defined]
    for i, optimizer in enumerate(trainer.optimizers):
        groups = optimizer.param_groups
        found[f"another optimizer {i}"] = type(optimizer).__name__
        found[f"other parameters in optimizer {i}"] = [
            [names.get(id(p), "") for p in g["params"]] for g in groups
        ]
    for i, config in enumerate(trainer.lr_scheduler_configs):
        found[f"another schedule {i}"] = type(config.scheduler).__name__
        found[f"other settings of schedule {i}"] = [
            config.interval,
            config.frequency,
            config.monitor,
        ]
    return found


def other_kinds(trainer: Trainer, before: Mapping[str, Any]) -> list[str]:
    now = kinds(trainer)
    for name in now:
        # Groups that have joined are in the file.
        if name.startswith("other parameters") and name in before:
            now[name] = now[name][: len(before[name])]
    return [
        f"{name} than at the start"
        for name in {**before, **now}
        if now.get(name) != before.get(name)
    ]


def group_counts(trainer: Trainer) -> list[int]:
    return [len(optimizer.param_groups) for optimizer in trainer.optimizers]


def grown_groups(trainer: Trainer, before: Sequence[int]) -> dict[int, list[list[str]]]:
    """Names of the parameters in each group that an optimizer was given in mid-training, by the
    optimizer's number.
    """
    names = {id(parameter): name for name, parameter in trainer.lightning_module.named_parameters()}
    grown = {}
    for number, (optimizer, count) in enumerate(zip(trainer.optimizers, before, strict=False)):
        groups = optimizer.param_groups[count:]
        if groups:
            grown[number] = [[names.get(id(p), "") for p in group["params"]] for group in groups]
    return grown


def add_groups(trainer: Trainer, grown: Mapping[int, list[list[str]]]) -> None:
    """Before Lightning restores the optimizers: what a group holds besides its parameters is in
    their state.
    """
    parameters = dict(trainer.lightning_module.named_parameters())
    for number, groups in grown.items():
        there = {
            id(p) for group in trainer.optimizers[number].param_groups for p in group["params"]
        }
        for names in groups:
            new = [parameters[name] for name in names if name in parameters]
            if new and not there.intersection(map(id, new)):
                trainer.optimizers[number].add_param_group({"params": new})


# -- put back ------------------------------------------------------------------------------------


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
    """`load_state_dict` gives each of the two an own one, and a schedule would then reach only one."""
    for outer, inner, name in shared:
        setattr(inner, name, getattr(outer, name))


def prepare(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Before the loops run, on a resume: what decides whether they run at all."""
    loop = trainer.fit_loop.epoch_loop
    changed = saved.get("settings", {})
    _put_settings(trainer, {name: changed[name] for name in _BOUNDS if name in changed})
    saved["max_steps"] = loop.max_steps
    if saved["at"] == "validation" and 0 <= loop.max_steps <= saved["global_step"]:
        # The last step is done, the validation after it is not: Lightning would take the training
        # for done.
        loop.max_steps = saved["global_step"] + 1


def data_as_loaders_are_made(trainer: Trainer, baseline: Baseline) -> list[Any]:
    """What the data module has changed, where its loaders are made anew in each epoch: of a growing
    batch size, say.
    """
    if not trainer.reload_dataloaders_every_n_epochs or trainer.datamodule is None:  # type: ignore[attr-defined]
        return []
    changed, _ = baseline.changes(look(trainer))
    return copy.deepcopy([[path, value] for path, value in changed if path[0][1] == "data"])


def put_data_back(trainer: Trainer, saved: Mapping[str, Any], baseline: Baseline) -> None:
    """Before the loaders are made."""
    if saved.get("made_by"):
        baseline.restore(
            look(trainer), saved["made_by"], trainer.lightning_module.device, alone=True
        )


def reenter(trainer: Trainer, saved: Mapping[str, Any], baseline: Baseline, now: Look) -> list[str]:
    """Puts everything where it was when the checkpoint was made, at the very same point. Random
    states come last.

    Without any one of these lines some resume goes wrong: tests/resume/test_exact_resume.py takes
    each away.

    Returns:
        Words for what has changed in the training that made the checkpoint, and has no place in
        this one.
    """
    module, fit = trainer.lightning_module, trainer.fit_loop
    epoch, connector = fit.epoch_loop, trainer._logger_connector
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
    if trainer.global_rank:
        _restore_buffers(module, saved.get("buffers", {}))
    if "syncs_buffers" in saved and isinstance(trainer.strategy.model, DistributedDataParallel):
        trainer.strategy.model.require_forward_param_sync = saved["syncs_buffers"]
    loaded = _own_optimizers(trainer)
    failed = baseline.restore(now, saved.get("attributes", []), module.device, loaded)
    _put_settings(trainer, saved.get("settings", {}))
    trainer.should_stop = saved["should_stop"]
    if saved["at"] == "validation" and _by_the_clock(trainer):
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
    """Lightning has counted on from the file; here its loops stand as if they had never been left."""
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
    fetcher, combined = trainer.fit_loop._data_fetcher, trainer.fit_loop._combined_loader
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
    state = _moved({"metric_states": state["metric_states"]}, module.device)
    for name, metric in _metrics(module).items():
        if name not in state["metric_states"]:
            continue
        saved = dict(state["metric_states"][name])
        metric._update_count, metric._computed = saved.pop("updates"), None
        for key, value in saved.items():
            setattr(metric, key, value)


def restore_logged(trainer: Trainer, module: LightningModule, state: Mapping[str, Any]) -> None:
    """Puts the logged sums back, so that the curve of the running epoch goes on."""
    state = _moved({"logged": state["logged"]}, module.device)
    results = trainer.fit_loop.epoch_loop._results
    for row in state["logged"]:
        results.dataloader_idx = row["dataloader_idx"]
        value = (
            module.get_submodule(row["log"]["metric_attribute"])
            if row["value"] is None
            else row["value"]
        )
        given = dict(row["log"])
        if row.get("builtin"):  # Lightning takes Python's own `max` for another one than torch's
            given["reduce_fx"] = {"min": min, "max": max, "sum": sum}[given["reduce_fx"]]
        results.log(value=value, batch_size=1, sync_dist_fn=trainer.strategy.reduce, **given)
        result = list(results.values())[-1]
        result._forward_cache = row["last"]
        if row["value"] is not None:
            result.value = row["value"]
        if row["size"] is not None:
            result.cumulated_batch_size = row["size"]
    results.dataloader_idx = None


def restore_metrics(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """What plateau schedules, early stopping and progress bars read."""
    connector, device = trainer._logger_connector, trainer.strategy.root_device
    connector._callback_metrics = _moved(state["callback_metrics"], device)
    connector._logged_metrics = _moved(state.get("logged_metrics", {}), device)
    connector._progress_bar_metrics = _moved(state.get("progress_bar_metrics", {}), device)


# -- one start -----------------------------------------------------------------------------------


def load_in_precision(
    trainer: Trainer, module: LightningModule, checkpoint: Mapping[str, Any]
) -> None:
    """Weights of `64-true` or `bf16-true`: Lightning loads them before the module has that type."""
    if not isinstance(trainer.precision_plugin, DoublePrecision | HalfPrecision):
        return
    trainer.precision_plugin.convert_module(module)
    module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)


def found(trainer: Trainer) -> dict[str, Any]:
    """What Lightning's finders have set before the training: a resume does not search again."""
    module = trainer.lightning_module
    values: dict[str, Any] = {}
    for name in _finders(trainer):
        if name and lightning_hasattr(module, name):
            values[name] = lightning_getattr(module, name)
    return values


def _finders(trainer: Trainer) -> dict[str, Callback]:
    """The finders by the attribute that each sets."""
    finders: dict[str, Callback] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if type(callback).__module__.startswith("savepoint."):
            continue
        if isinstance(callback, BatchSizeFinder):
            finders[callback._batch_arg_name] = callback
        if isinstance(callback, LearningRateFinder):
            has_lr = lightning_hasattr(trainer.lightning_module, "lr")
            default = "lr" if has_lr else "learning_rate"
            finders[callback._attr_name or default] = callback
    return finders


def skip_finders(trainer: Trainer, values: Mapping[str, Any]) -> None:
    """Until `wake_finders`: a search would start from the weights of a training in progress, and
    end it.
    """
    for name, callback in _finders(trainer).items():
        search = "lr_find" if isinstance(callback, LearningRateFinder) else "scale_batch_size"
        vars(callback)[search] = _search_nothing
        if name in values and lightning_hasattr(trainer.lightning_module, name):
            lightning_setattr(trainer.lightning_module, name, values[name])


def wake_finders(trainer: Trainer) -> None:
    for callback in _finders(trainer).values():
        for search in ("lr_find", "scale_batch_size"):
            vars(callback).pop(search, None)


def _search_nothing(*args: Any, **kwargs: Any) -> None: ...


def run_in_order(trainer: Trainer) -> None:
    """Lightning overfits on the same batches by a sequential sampler, which it knows how to give a
    DataLoader only.
    """
    for loader in train_loaders(trainer):
        if trainer.overfit_batches and hasattr(loader, "shuffle"):  # type: ignore[attr-defined]
            loader.shuffle = False


def set_up_validation(trainer: Trainer) -> None:
    """The validation's loaders, for a resume to put their state back before the first validation."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    if loop._combined_loader is not None or not trainer.enable_validation:
        return
    trainer.validating = True
    loop.setup_data()
    trainer.training = True


_MOST_BUFFER_BYTES = 64 * 2**20  # of what is copied at each validation, and saved for each rank

# -- many ranks -----------------------------------------------------------------------------------


class _WalkReducer(torch.autograd.Function):
    """Tells a reducer in its backward, as it would hear in a model's, that each gradient is ready."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, reducer: Any, parameters: int) -> Tensor:
        ctx.reducer, ctx.parameters = reducer, parameters
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        # The order in which most models' backward comes to them.
        for index in reversed(range(ctx.parameters)):
            ctx.reducer._autograd_hook(index)
        return None, None, None


def lay_buckets(trainer: Trainer) -> None:
    """Lays DDP's gradient buckets for good: before the first step of every start, on all ranks.

    DDP lays them anew after its first backward, which in a resume is another step than in the
    straight run. From three ranks on a sum depends on the place of a gradient in its bucket. No
    parameter is used, so that no hook of one runs.
    """
    ddp = trainer.strategy.model
    if not isinstance(ddp, DistributedDataParallel) or ddp._use_python_reducer:
        return
    if ddp.find_unused_parameters and not ddp.static_graph:
        return  # such buckets stay as they are
    parameters, sparse = ddp._build_params_for_reducer()  # type: ignore[no-untyped-call]
    if ddp.static_graph or ddp._comm_hooks or any(sparse):
        # These look into the gradients of a backward: none is made, and the buckets are in the
        # order of the parameters.
        ddp.reducer._push_all_rebuilt_params()
    else:
        pending = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        ddp.reducer.prepare_for_backward([])
        anchor = torch.zeros((), device=parameters[0].device, requires_grad=True)
        _WalkReducer.apply(anchor, ddp.reducer, len(parameters)).backward()
        for parameter, gradient in zip(parameters, pending, strict=True):
            parameter.grad = gradient
    ddp.reducer._rebuild_buckets()


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


# -- around the loaders --------------------------------------------------------------------------


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
        marks |= now.marks_below(parts["sampler"])
        if loader.num_workers:
            copies = now.marks_below(parts["dataset"])
            kept = {path: before[path] for path in copies if path in before}
            marks |= copies | (kept if loader.persistent_workers else {})
    return marks


def states_before_prefetching(trainer: Trainer) -> list[Any] | None:
    """Of loaders without a length Lightning fetches one batch in advance: their states before they
    give the next one.

    None where nothing is fetched in advance.
    """
    fetcher, combined = trainer.fit_loop._data_fetcher, trainer.fit_loop._combined_loader
    if (
        not isinstance(fetcher, _PrefetchDataFetcher)
        or fetcher.length is not None
        or combined is None
    ):
        return None
    return copy.deepcopy(combined._state_dicts())


def loader_states(trainer: Trainer) -> list[Any]:
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else combined._state_dicts()


# -- around a validation -------------------------------------------------------------------------


def before_validation(trainer: Trainer) -> dict[str, Any]:
    """What a file made inside the validation takes from its start: counters, and buffers that its
    hooks may change.
    """
    module = trainer.lightning_module
    return {
        "fit_loop": trainer.fit_loop.state_dict(),
        "buffers": {name: buffer.detach().clone() for name, buffer in own_buffers(module).items()},
        "versions": versions(module),
        "rates": _rates(trainer),
    }


def as_before_validation(
    trainer: Trainer, checkpoint: dict[str, Any], before: Mapping[str, Any]
) -> list[str]:
    """Puts into `checkpoint` what `before_validation` gave; returns words for weights that the
    validation has changed.
    """
    checkpoint["loops"]["fit_loop"] = before["fit_loop"]
    _put_rates(checkpoint, before["rates"])
    if averaging(trainer):  # it exchanges the weights for the validation, and back for this file
        return []
    weights: dict[str, Any] = checkpoint["state_dict"]
    weights |= {name: value for name, value in before["buffers"].items() if name in weights}
    now = versions(trainer.lightning_module)
    changed = [name for name in now if now[name] != before["versions"].get(name)]
    return [
        f"model.{name} (changed inside a validation)"
        for name in changed
        if name not in before["buffers"]
    ]


def _rates(trainer: Trainer) -> tuple[list[Any], list[Any]]:
    """What hooks of a validation change by hand: learning rates, and schedules that they step."""
    groups = [
        [_settings_of(group) for group in optimizer.param_groups]
        for optimizer in trainer.optimizers
    ]
    return groups, [
        copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs
    ]


def _settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}


def _put_rates(checkpoint: dict[str, Any], rates: tuple[list[Any], list[Any]]) -> None:
    groups, checkpoint["lr_schedulers"] = rates
    for state, settings_then in zip(checkpoint["optimizer_states"], groups, strict=True):
        for group, then in zip(state.get("param_groups", []), settings_then, strict=False):
            for name in [name for name in group if name != "params" and name not in then]:
                del group[name]
            group.update(then)


def versions(module: LightningModule) -> dict[str, Any]:
    """Of each weight and buffer what changes when it is written to, without a look at all its
    values.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {
        name: (id(tensor), fingerprint(tensor))
        for name, tensor in tensors
        if not tensor.is_inference()
    }


def left_out(
    module: LightningModule, weights: Mapping[str, Any], at_start: Mapping[str, Any]
) -> list[str]:
    """Words for weights that have changed and that the user's own code has taken out of the file,
    and for new ones.
    """
    names = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    gone = names.intersection(module.state_dict()).difference(weights)
    now = versions(module) if gone else {}
    words = [
        f"model.{name} (left out of the file)"
        for name in sorted(gone)
        if now.get(name) != at_start.get(name)
    ]
    made = sorted(names.intersection(weights).difference(at_start))
    return words + [f"model.{name} (made in mid-training)" for name in made]


def at_end_of_epoch(trainer: Trainer) -> bool:
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


# -- what cannot be exact ------------------------------------------------------------------------


def inexact(trainer: Trainer, at: str | None) -> list[str]:
    """Why a resume from this point would not equal the straight run, as far as no look is needed to
    know.
    """
    if at is None:
        return ["saved elsewhere than at a safe point"]
    reasons = [_without_position(loader, at, trainer) for loader in train_loaders(trainer)]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging):
            reasons.append(f"{type(callback).__name__} does not save all it changes")
    if _by_the_clock(trainer):
        reasons.append("validations go by the clock (val_check_interval)")
    for loader in _validation_loaders(trainer):
        if isinstance(loader, DataLoader) and loader.num_workers and loader.persistent_workers:
            reasons.append(
                "the validation loader keeps its workers, and what they have drawn with them; "
                "wrap it: savepoint.loader.resumable(loader)"
            )
    return [reason for reason in dict.fromkeys(reasons) if reason]


def _by_the_clock(trainer: Trainer) -> bool:
    return getattr(trainer, "_val_check_time_interval", None) is not None


def _without_position(loader: Any, at: str, trainer: Trainer) -> str:
    if isinstance(loader, _Stateful):
        limited = trainer.num_training_batches < (_length(loader) or 0)
        if at == "epoch" and limited and not hasattr(loader, "user_parts"):
            return "the training loader is left in the middle of its own epoch"
        return ""
    if at != "epoch":
        return "the training loader keeps no position; wrap it: savepoint.loader.resumable(loader)"
    if isinstance(loader, DataLoader) and loader.num_workers and loader.persistent_workers:
        return "the training loader keeps its workers, and what they have drawn with them"
    return ""


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def seed_validation(trainer: Trainer) -> None:
    """What the workers of a validation draw is a function of (seed, step, loader), and shifts no
    generator of the training.

    A stock loader would draw the seed of its workers from the global generator, as often as it is
    iterated: after a resume once more, where its workers stay.
    """
    for number, loader in enumerate(_validation_loaders(trainer)):
        own = getattr(loader, "_savepoint_generator", None)
        if isinstance(loader, DataLoader) and loader.generator is own:
            seed = derive(torch.initial_seed(), trainer.global_step, number)
            loader.generator = loader._savepoint_generator = torch.Generator().manual_seed(seed)


def ranks_changed(was: int, now: int) -> str:
    """What a resume with another number of processes costs."""
    return (
        f"processes {was} -> {now}: random states, metric sums and each rank's place in the data "
        "are not restored; which samples this epoch sees changes. Checkpoints say exact: false "
        "until the next epoch begins."
    )


def refuse_shards(trainer: Trainer) -> None:
    """Raises ConfigError for a strategy that spreads the state over the ranks."""
    if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
        raise ConfigError(
            "Sharded training is not supported yet: trainer.strategy is "
            f"{type(trainer.strategy).__name__}. A strategy that keeps the whole model on each "
            "rank was expected, as a checkpoint is one file. Use ddp."
        )


def refuse_different_starts(trainer: Trainer) -> None:
    """Raises ConfigMismatchError, on all ranks, where they do not go on from one and the same
    checkpoint.
    """
    if trainer.world_size == 1:
        return
    starts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(starts, _start_of(trainer.ckpt_path))
    rank, other = next(
        ((rank, one) for rank, one in enumerate(starts) if one != starts[0]), (0, None)
    )
    if rank:
        raise ConfigMismatchError(
            f"The ranks begin differently: rank 0 from {starts[0]}, rank {rank} from {other}. One "
            "checkpoint for all was expected. Give a run directory that all hosts share."
        )


def _start_of(path: Any) -> str:
    if path is None:
        return "the beginning"
    try:
        facts = manifest.read(path)
    except CheckpointForeignError:
        return f"{Path(path).name} of another program, {Path(path).stat().st_size} bytes"
    return f"step {facts['step']} (digest {facts['digest'][:12]})"


def averaging(trainer: Trainer) -> list[WeightAveraging]:
    return [callback for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]  # type: ignore[attr-defined]


def copied_weights(module: LightningModule) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@contextmanager
def current_weights(trainer: Trainer) -> Iterator[None]:
    """Inside a validation, weight averaging holds the averaged weights in the module: a save needs
    the current ones there.
    """
    callbacks = averaging(trainer)
    for callback in callbacks:
        callback.on_validation_epoch_end(trainer, trainer.lightning_module)
    try:
        yield
    finally:
        for callback in callbacks:
            callback.on_validation_epoch_start(trainer, trainer.lightning_module)


def environment(device: torch.device) -> dict[str, Any]:
    """What a resume says when it differs, and never refuses: bit equality needs the same."""
    return {
        "versions": {
            "savepoint": savepoint.__version__,
            "torch": str(torch.__version__),
            "lightning": lightning.__version__,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
        "device": device.type
        if device.type == "cpu"
        else torch.get_device_module(device).get_device_name(device),
    }


def _map(tree: Any, change: Any) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: _map(value, change) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_map(value, change) for value in tree)
    return tree


def _detached(tree: Any) -> Any:
    return _map(tree, lambda tensor: tensor.detach())


def _moved(tree: Any, device: torch.device) -> Any:
    return _map(tree, lambda tensor: tensor.to(device))
