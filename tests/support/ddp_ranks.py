"""One rank of a DDP training on the CPU that is resumed from its safe points: see
test_ddp_exact.py.

python -m support.ddp_ranks DIRECTORY RANKS KIND EVERY      with LOCAL_RANK, MASTER_ADDR and
                                                            MASTER_PORT set

EVERY 1 takes each safe point, 2 every second one, 0 none: then nothing is resumed.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim.lr_scheduler import LambdaLR

from support.resumed_points import write_differences
from support.small import EveryPoint, SmallData, SmallModel, fit


class Frozen(SmallModel):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].weight.requires_grad = False


class Sparse(SmallModel):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.table = nn.Embedding(5, 6, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.table((x[:, 0].abs() * 2).long() % 5))

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.net.parameters(), lr=0.05),
            torch.optim.SparseAdam(self.table.parameters()),
        ]


class Unused(SmallModel):
    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(2, 2)


class Hooked(SmallModel):
    """Each gradient of a parameter is counted, by a hook that a step may rely on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        for parameter in self.parameters():
            parameter.register_hook(self.see)
            parameter.register_post_accumulate_grad_hook(self.see)

    def see(self, gradient: Tensor) -> None:
        self.seen += 1


class Adam(SmallModel):
    """With batch norm: its buffers differ from rank to rank."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(self.net[0].out_features))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Tied(Adam):
    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Linear(6, 8)
        self.twin.weight = self.net[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.twin(x)[:, :3]


class FrozenAdam(Adam):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].weight.requires_grad = False


class Slowing(torch.optim.AdamW):
    """What it counts is in no state_dict."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        for group in self.param_groups:
            group["weight_decay"] = 0.1 / self.steps
        return super().step(closure)


class Zero(SmallModel):
    """Each rank keeps the optimizer's states of some weights, and steps these alone."""

    def configure_optimizers(self) -> Any:
        optimizer = ZeroRedundancyOptimizer(self.parameters(), optimizer_class=Slowing, lr=0.01)
        schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Codebook(Adam):
    """A weight without a gradient, which each rank moves by its own batches."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.zeros(40, 6), requires_grad=False)
        self.register_buffer("copy_of_codes", torch.zeros(40, 6))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.codes.mul_(0.9).add_(x.mean(0), alpha=0.1)
                self.copy_of_codes.copy_(self.codes)
        return super().forward(x + self.codes[0])


class Reduced(SmallModel):
    def on_fit_start(self) -> None:
        self.trainer.strategy.model.register_comm_hook(None, allreduce_hook)


KINDS: dict[str, tuple[type[SmallModel], dict[str, Any]]] = {
    "plain": (SmallModel, {}),
    "accumulating": (SmallModel, {"accumulate_grad_batches": 2}),
    "frozen parameters": (Frozen, {}),
    "hooks of parameters": (Hooked, {}),
    "a comm hook": (Reduced, {}),
    "sparse gradients": (Sparse, {}),
    "unused parameters": (Unused, {"find_unused_parameters": True}),
    "a static graph": (SmallModel, {"static_graph": True}),
    "states shared out": (Zero, {}),
    "shards, states shared out": (Zero, {"sharded": True, "async_save": True}),
    "buckets as gradients": (SmallModel, {"gradient_as_bucket_view": True}),
    "shards": (Adam, {"sharded": True}),
    "shards in a thread": (Adam, {"sharded": True, "async_save": True}),
    "shards, accumulating": (Adam, {"sharded": True, "accumulate_grad_batches": 2}),
    "shards, tied weights": (Tied, {"sharded": True}),
    "shards, frozen weights": (FrozenAdam, {"sharded": True}),
    "shards, sparse gradients": (Sparse, {"sharded": True, "async_save": True}),
}
UNEQUAL: dict[str, tuple[type[SmallModel], dict[str, Any]]] = {
    "one file": (Codebook, {}),
    "shards": (Codebook, {"sharded": True}),
}


def small_data() -> SmallData:
    return SmallData(samples=60)


def main(directory: Path, ranks: int, kind: str, every: int) -> None:
    model, flags = (UNEQUAL if every == 0 else KINDS)[kind]
    flags = dict(flags)
    accumulate = flags.pop("accumulate_grad_batches", 1)
    saving = {name: flags.pop(name) for name in ("sharded", "async_save") if name in flags}

    def train(directory: Path, **arguments: Any) -> Trainer:
        given = {"max_epochs": 2, "devices": ranks, "accumulate_grad_batches": accumulate}
        given |= {"strategy": DDPStrategy(**flags), **arguments}
        return fit(directory, model=model, data=small_data, **given)

    if every:
        write_differences(directory, every, train, **saving)
    else:
        train(directory, checkpointing=EveryPoint(directory / "points", monitor=None, **saving))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
