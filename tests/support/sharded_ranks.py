"""One rank of a training under FSDP2 on the CPU that is resumed from its safe points: see
test_sharded_exact.py.

python -m support.sharded_ranks DIRECTORY RANKS KIND EVERY      with LOCAL_RANK, MASTER_ADDR and
                                                                MASTER_PORT set

EVERY 1 takes each safe point, 2 every second one. With the KIND "load" it loads each checkpoint in
DIRECTORY/saved instead, and writes what it has then.
"""

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from savepoint.sharded import pieces
from support.resumed_points import write_differences
from support.small import SmallData, SmallModel, fit


class Sharded(SmallModel):
    """Each layer is sharded on its own, then the rest; a plain model where there is no mesh."""

    def configure_model(self) -> None:
        if self.device_mesh is None or hasattr(self.net, "reshard"):
            return
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class OneGroup(SmallModel):
    """All weights are gathered at once, and stay so after a validation."""

    def configure_model(self) -> None:
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class Replicas(SmallModel):
    """Pairs of ranks share the model, each pair has all of it (HSDP)."""

    def configure_model(self) -> None:
        pairs = torch.distributed.get_world_size() // 2
        mesh = init_device_mesh("cpu", (pairs, 2), mesh_dim_names=("replicas", "shards"))
        for layer in self.net:
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh)


class Momentum(Sharded):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


KINDS: dict[str, tuple[type[SmallModel], dict[str, Any], dict[str, Any]]] = {
    "plain": (Sharded, {}, {}),
    "momentum": (Momentum, {}, {}),
    "accumulating": (Sharded, {"accumulate_grad_batches": 2}, {}),
    "one group": (OneGroup, {}, {}),
    "replicas": (Replicas, {}, {}),
    "one file": (Sharded, {}, {"sharded": False}),
    "in a thread": (Sharded, {}, {"async_save": True}),
    "one file in a thread": (Sharded, {}, {"sharded": False, "async_save": True}),
}


def small_data() -> SmallData:
    return SmallData(samples=60)


class Loaded(Callback):
    """What the training has before its first step: weights and optimizers, all of it."""

    def __init__(self) -> None:
        self.state: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
        state = {"state_dict": pl_module.state_dict(), "optimizer_states": optimizers}
        self.state = copy.deepcopy(pieces.whole(state, keep=True))
        trainer.should_stop = True


def load(directory: Path, ranks: int) -> None:
    for file in sorted((directory / "saved").iterdir()):
        strategy: Any = "auto"  # one process holds all of the model
        if ranks > 1:
            strategy = ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)
        loaded = Loaded()
        given = {"max_epochs": 2, "devices": ranks, "strategy": strategy, "min_epochs": 0}
        work = directory / f"{file.stem}-on-{ranks}"
        callbacks = {"callbacks": lambda: [loaded]}  # noqa: B023 - called at once
        trainer = fit(work, model=Sharded, data=small_data, ckpt_path=file, **callbacks, **given)
        if trainer.is_global_zero:
            torch.save(loaded.state, directory / f"{file.stem}-on-{ranks}.pt")


def main(directory: Path, ranks: int, kind: str, every: int) -> None:
    if kind == "load":
        torch.set_num_threads(1)
        load(directory, ranks)
        return
    model, arguments, saving = KINDS[kind]

    def train(directory: Path, **more: Any) -> Trainer:
        strategy = ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)
        given = {"max_epochs": 2, "devices": ranks, "strategy": strategy, **arguments, **more}
        return fit(directory, model=model, data=small_data, **given)

    write_differences(directory, every, train, **saving)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
