"""What is saved beyond Lightning's own: random states, metric states, logged sums. Capture and restore, no files.

Everything here is plain types and tensors, so that `weights_only=True` reads it. The private names of Lightning 2.6 that
an exact resume needs stand here and in `callback.py`, nowhere else.
"""

import platform
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Metric

import savepoint
from savepoint.checkpoint import manifest
from savepoint.errors import CheckpointForeignError, ConfigError, ConfigMismatchError

# What `self.log(...)` was called with, apart from the value: enough to make the same entry again.
_LOG_ARGUMENTS = (
    "fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx", "metric_attribute",
)  # fmt: skip


def capture_rng(device: torch.device) -> dict[str, Any]:
    """The random states of this process: python, numpy, torch on the CPU and, where there is one, on the accelerator."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        # One tensor: as 625 numbers they would take longer to pickle than all the rest of a small checkpoint.
        "python": [version, torch.from_numpy(np.array(words)), gauss],
        # Seen as int32: torch.save takes uint32, but plain pickle, with which ranks exchange this, does not.
        "numpy": [name, torch.from_numpy(np.array(keys).view(np.int32)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "accelerator": None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(),
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


def capture(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """The state of this process that Lightning leaves out: with the tensors themselves, for use before training goes on."""
    logged = [
        {
            "log": {name: getattr(result.meta, name) for name in _LOG_ARGUMENTS}
            | {"reduce_fx": result.meta.reduce_fx.__name__, "sync_dist": result.meta.sync.should},
            "dataloader_idx": result.meta.dataloader_idx,
            "last": result._forward_cache,
            "value": result.value if result.is_tensor else None,
            "size": result.cumulated_batch_size if result.is_tensor and result.meta.is_mean_reduction else None,
        }
        for result in trainer.fit_loop.epoch_loop._results.values()
        if result.meta.on_epoch and not result.has_reset
    ]
    state = {
        "rng": capture_rng(module.device),
        "metric_states": {
            name: {"updates": metric._update_count} | {key: getattr(metric, key) for key in metric._defaults}
            for name, metric in _metrics(module).items()
        },
        "logged": logged,
        "callback_metrics": dict(trainer._logger_connector._callback_metrics),
    }
    detached: dict[str, Any] = _detached(state)
    return detached


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
        value = module.get_submodule(row["log"]["metric_attribute"]) if row["value"] is None else row["value"]
        results.log(value=value, batch_size=1, sync_dist_fn=trainer.strategy.reduce, **row["log"])
        result = list(results.values())[-1]
        result._forward_cache = row["last"]
        if row["value"] is not None:
            result.value = row["value"]
        if row["size"] is not None:
            result.cumulated_batch_size = row["size"]
    results.dataloader_idx = None
    # Otherwise the first self.log takes what was just put back for the last epoch's, and resets it.
    trainer._logger_connector._first_loop_iter = True


def reenter(trainer: Trainer, module: LightningModule, saved: Mapping[str, Any]) -> None:
    """Puts Lightning's loops, from `on_train_start`, where the checkpoint was made.

    Without any one of these lines some resume goes wrong: tests/test_exact_resume.py takes each away.
    """
    fit = trainer.fit_loop
    epoch = fit.epoch_loop
    validation = epoch.val_loop
    if fit._combined_loader_states_to_load:
        # A schedule that asks for `estimated_stepping_batches` made Lightning set up the loader before it had these.
        fit._combined_loader._load_state_dicts(fit._combined_loader_states_to_load)  # type: ignore[union-attr]
    # A restarting fit loop leaves out the plateau step at the end of its first epoch.
    fit._restarting = False
    if saved["at"] == "epoch":
        # With max_steps, Lightning takes every resume for one in mid-epoch, and would first run an empty epoch.
        epoch._restarting = validation._restarting = False
    else:
        restore_logged(trainer, module, saved)
    restore_metric_states(module, saved)
    trainer.should_stop = saved["should_stop"]
    if saved["at"] == "batch" and epoch._should_check_val_fx(fit._data_fetcher):  # type: ignore[arg-type]
        # To leave out the validation that is done, Lightning ends the last step once more, and counts it twice.
        epoch._batches_that_stepped -= 1
    if saved["at"] == "validation":
        validation._restarting, validation._restart_stage = False, "restarted_mid_evaluation"
    restore_callback_metrics(trainer, saved)


class _WalkReducer(torch.autograd.Function):
    """Tells a reducer in its backward, as it would hear in a model's, that each gradient is ready."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, reducer: Any, parameters: int) -> Tensor:
        ctx.reducer, ctx.parameters = reducer, parameters
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        for index in reversed(range(ctx.parameters)):  # the order in which most models' backward comes to them
            ctx.reducer._autograd_hook(index)
        return None, None, None


def lay_buckets(trainer: Trainer) -> None:
    """Lays DDP's gradient buckets for good: before the first step of every start, on all ranks.

    DDP lays them anew after its first backward, which in a resume is another step than in the straight run. From three
    ranks on a sum depends on the place of a gradient in its bucket. No parameter is used, so that no hook of one runs.
    """
    ddp = trainer.strategy.model
    if not isinstance(ddp, DistributedDataParallel) or ddp._use_python_reducer:
        return
    if ddp.find_unused_parameters and not ddp.static_graph:
        return  # such buckets stay as they are
    parameters, sparse = ddp._build_params_for_reducer()  # type: ignore[no-untyped-call]
    if ddp.static_graph or ddp._comm_hooks or any(sparse):
        # These look into the gradients of a backward: none is made, and the buckets are in the order of the parameters.
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


def restore_callback_metrics(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """What plateau schedules and early stopping read."""
    device = trainer.strategy.root_device
    trainer._logger_connector._callback_metrics.update(_moved(state["callback_metrics"], device))


def canary(
    module: LightningModule, state_dict: Mapping[str, Tensor], example: Tensor | None = None
) -> dict[str, Any] | None:
    """`example_input_array` and its output with exactly the weights in `state_dict`, in eval mode; None where there is none.

    Compared when a checkpoint is resumed, on any device: changed code and a wrong conversion show in it.
    """
    example = getattr(module, "example_input_array", None) if example is None else example
    if not isinstance(example, Tensor):
        return None
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad(), isolated_rng(module.device):
            parts = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
            weights = {name: value.to(module.device) for name, value in state_dict.items() if name in parts}
            output = torch.func.functional_call(module, weights, (example.to(module.device),))
    finally:
        for part, training in modes.items():
            part.training = training
    return {"input": example.cpu(), "output": output.float().cpu()} if isinstance(output, Tensor) else None


def why_not_exact(trainer: Trainer) -> str | None:
    """The sentence for a training whose resume is as exact as Lightning's own; None where it is exact."""
    loaders = trainer.fit_loop._combined_loader.flattened  # type: ignore[union-attr]
    if len(loaders) != 1:
        return f"{len(loaders)} training data loaders: checkpoints at epoch ends only, and a resume is not exact."
    if not hasattr(loaders[0], "at_boundary"):
        return (
            "The training data loader keeps no position: checkpoints at epoch ends only, and a resume is not exact. "
            "Wrap it: savepoint.loader.resumable(loader)."
        )
    inexact = (
        StochasticWeightAveraging,
        GradientAccumulationScheduler,
    )  # they keep what they changed outside any state
    names = [type(callback).__name__ for callback in trainer.callbacks if isinstance(callback, inexact)]  # type: ignore[attr-defined]
    return f"With {', '.join(names)} a resume is not exact: it does not save all it changes." if names else None


def ranks_changed(was: int, now: int) -> str:
    """What a resume with another number of processes costs."""
    return (
        f"processes {was} -> {now}: random states, metric sums and each rank's place in the data are not restored; which "
        "samples this epoch sees changes. Checkpoints say exact: false until the next epoch begins."
    )


def refuse_shards(trainer: Trainer) -> None:
    """Raises ConfigError for a strategy that spreads the state over the ranks."""
    if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
        raise ConfigError(
            f"Sharded training is not supported yet: trainer.strategy is {type(trainer.strategy).__name__}. A strategy "
            "that keeps the whole model on each rank was expected, as a checkpoint is one file. Use ddp."
        )


def refuse_different_starts(trainer: Trainer) -> None:
    """Raises ConfigMismatchError, on all ranks, where they do not go on from one and the same checkpoint."""
    if trainer.world_size == 1:
        return
    starts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(starts, _start_of(trainer.ckpt_path))
    rank, other = next(((rank, one) for rank, one in enumerate(starts) if one != starts[0]), (0, None))
    if rank:
        raise ConfigMismatchError(
            f"The ranks begin differently: rank 0 from {starts[0]}, rank {rank} from {other}. One checkpoint for all "
            "was expected. Give a run directory that all hosts share."
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
    """Inside a validation, weight averaging holds the averaged weights in the module: a save needs the current ones there."""
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
        "device": device.type if device.type == "cpu" else torch.get_device_module(device).get_device_name(device),
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
