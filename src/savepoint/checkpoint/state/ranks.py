"""Many processes: DDP's buckets, and what all ranks must agree on."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
)
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from savepoint.checkpoint import manifest
from savepoint.checkpoint.state import capture, loops
from savepoint.errors import CheckpointForeignError, ConfigError, ConfigMismatchError
from savepoint.look.marks import sum_of_all


class _WalkReducer(torch.autograd.Function):
    """Tells a reducer in its backward, as a model's would, that each gradient is ready."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, reducer: Any, parameters: int) -> Tensor:
        ctx.reducer = reducer
        ctx.parameters = parameters
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


OTHER_SAMPLES = "this epoch was begun by another number of processes"


def shared_anew(was: int, now: int, reasons: Sequence[str]) -> str:
    """What a resume with another number of processes keeps, with a global batch."""
    if not reasons:
        return f"processes {was} -> {now}: the same samples at each step, and the same bits"
    return (
        f"processes {was} -> {now}: the same samples and rates at each step. Checkpoints say "
        f"exact: false until the next epoch begins: {'; '.join(reasons)}."
    )


def ranks_changed(was: int, now: int) -> str:
    """What a resume with another number of processes costs."""
    return (
        f"processes {was} -> {now}: random states, metric sums and each rank's place in the data "
        "are not restored; which samples this epoch sees changes. Checkpoints say exact: false "
        "until the next epoch begins."
    )


def refuse_shards(trainer: Trainer) -> None:
    """Raises ConfigError for a strategy that spreads the state over the ranks in a way that is not
    known here.
    """
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
        raise ConfigError(
            f"Not supported: trainer.strategy is {type(trainer.strategy).__name__}, which spreads "
            "the state over the ranks in a way of its own. Use ModelParallelStrategy, with "
            "fully_shard in the model's configure_model, or ddp."
        )
    if is_spread(trainer) and _tensor_parallel_size(trainer) > 1:
        raise ConfigError(
            f"Not supported: tensor_parallel_size is {_tensor_parallel_size(trainer)}. The ranks "
            "that compute one layer together must read the same samples, and the loaders here give "
            "each rank its own. Use data_parallel_size alone, with tensor_parallel_size 1."
        )


def refuse_with_shards(trainer: Trainer, sharded: Literal["auto"] | bool) -> None:
    """Raises ConfigError for what goes with no strategy that spreads the state over the ranks, and
    where `sharded` asks for shares of what nothing is known to share out.
    """
    strategy = type(trainer.strategy).__name__
    if not is_spread(trainer):
        known = isinstance(trainer.strategy, DDPStrategy) or trainer.world_size == 1
        if sharded is True and not known:
            raise ConfigError(
                "Nothing is known to share out: checkpoint.sharded is true, and trainer.strategy "
                f"is {strategy}. Expected DDP, whose ranks hold the same, or "
                "ModelParallelStrategy. Leave it at auto."
            )
        return
    refused = {
        "a finder of learning rates or batch sizes": bool(capture.finders(trainer)),
        "an average of the weights": bool(loops.averaging(trainer)),
    }
    for what in [name for name, is_there in refused.items() if is_there]:
        raise ConfigError(
            f"Not supported where the state is spread over ranks: {what}, with {strategy}. Leave "
            "it out."
        )


def _tensor_parallel_size(trainer: Trainer) -> int:
    mesh: Any = trainer.strategy.device_mesh  # type: ignore[attr-defined]
    return int(mesh.size(mesh.mesh_dim_names.index("tensor_parallel")))


def is_spread(trainer: Trainer) -> bool:
    """Whether the strategy spreads the state over the ranks, as DTensors."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def hold_the_same(trainer: Trainer) -> bool:
    """Whether the ranks have equal weights after each step: not where DDP averages them now and
    then.
    """
    strategy = trainer.strategy
    return isinstance(strategy, DDPStrategy) and strategy._model_averaging_period is None


def gathered(trainer: Trainer, own: Any) -> list[Any]:
    """What each rank gives."""
    everyone: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(everyone, own)
    return everyone


def unequal_weights(trainer: Trainer) -> list[str]:
    """Words for weights that the training has not kept equal on all ranks, as DDP does with those
    that have gradients. Of each a sample is looked at.
    """
    if is_spread(trainer):
        return []
    named = trainer.lightning_module.named_parameters()
    parameters = {name: one for name, one in named if not is_lazy(one)}
    number = len(parameters)
    names = zlib.crc32(repr(list(parameters)).encode())
    if len(set(gathered(trainer, (names, sum_of_all(parameters.values(), number))))) == 1:
        return []
    sums = {name: sum_of_all([one], number) for name, one in parameters.items()}
    first, *others = gathered(trainer, sums)
    return [
        f"model.{name} (differs from rank to rank, and the first rank's is saved: make it a buffer)"
        for name in first
        if any(other.get(name) != first[name] for other in others)
    ]


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
