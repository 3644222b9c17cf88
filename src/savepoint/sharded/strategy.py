"""Lightning's strategies whose ranks save together: `ModelParallelStrategy`, which writes past
every CheckpointIO, saves and loads as we do; and, where that is asked for, DDP's ranks share out
what each of them holds. What these have saved is loaded as any checkpoint is.

States are what `state_dict` of the module and of the optimizers give, DTensors included: weights by
their names and states of optimizers by their numbers, as in a file of one process. That of
`torch.distributed.checkpoint.state_dict` names the optimizers' states otherwise, and steps them
with a rate of 0 to make states to load into.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer

from savepoint.checkpoint import format, manifest, store
from savepoint.checkpoint.io import CheckpointIO
from savepoint.checkpoint.state.ranks import hold_the_same, is_spread
from savepoint.sharded import pieces, saving
from savepoint.sharded.together import Ranks


class Sharding:
    """How one Trainer's strategy saves and loads, until its process ends.

    Args:
        in_parts: Whether each rank writes its part; else the first one writes all of it in one
            file.
    """

    def __init__(self, trainer: Trainer, *, in_parts: bool) -> None:
        self.trainer = trainer
        self.in_parts = in_parts
        self.ranks = Ranks()
        strategy: Any = trainer.strategy
        strategy.save_checkpoint = self._save
        self.is_spread = is_spread(trainer)
        if not self.is_spread:
            return
        strategy.lightning_module_state_dict = lambda: self._module.state_dict()
        strategy.optimizer_state = lambda optimizer: optimizer.state_dict()
        strategy.load_checkpoint = self._load
        strategy.load_model_state_dict = self._load_weights

    @property
    def _module(self) -> LightningModule:
        return self.trainer.lightning_module

    @property
    def _io(self) -> CheckpointIO:
        return cast(CheckpointIO, self.trainer.strategy.checkpoint_io)

    def _save(
        self, checkpoint: dict[str, Any], filepath: Path | str, storage_options: Any = None
    ) -> None:
        if self.in_parts:
            self._save_in_parts(checkpoint, filepath, storage_options)
            return
        is_first = self.ranks.rank == 0
        whole = pieces.whole(checkpoint, keep=is_first)
        self.ranks.first(lambda: self._io.save_checkpoint(whole, filepath, storage_options))

    def _save_in_parts(
        self, checkpoint: dict[str, Any], filepath: Path | str, storage_options: Any
    ) -> None:
        own = checkpoint.pop("own", {})
        path, state, facts = self._io.ready(checkpoint, filepath, storage_options)
        room = self._io.store_of(path, facts)
        self._io.settle()  # its thread is in a collective of this group until then
        parts = saving.split(self.ranks, state, own, self._held_by_all(state))
        if not self._io.async_save:
            saving.write(self.ranks, path, parts, facts, room)
            return
        copies: list[Mapping[str, Any]] = []
        # What one rank cannot copy, none waits for in its thread.
        self.ranks.together(lambda: copies.append(self._io.copied(parts)))
        self._io.write_later(lambda: saving.write(self.ranks, path, copies[0], facts, room))

    def _held_by_all(self, state: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """By their places, weights and the optimizers' states, which DDP keeps equal.

        It does not keep buffers so: those of the first rank count. Single numbers, such as the
        steps of an optimizer, stay in common.ckpt: they have no bytes to share, and are no part of
        a model that is spread.
        """
        if not hold_the_same(self.trainer):
            return None
        ignored = getattr(self._module, "_ddp_params_and_buffers_to_ignore", ())
        names = {
            f"state_dict.{name}"
            for name, _ in self._module.named_parameters(remove_duplicate=False)
        }
        names -= {f"state_dict.{name}" for name in ignored}
        optimizers = [] if ignored else self.trainer.optimizers
        places = tuple(
            f"optimizer_states[{number}].state."
            for number, one in enumerate(optimizers)
            if not isinstance(one, ZeroRedundancyOptimizer)
        )
        return {
            key: leaf
            for key, leaf in format.leaves(state)
            if (key in names or key.startswith(places))
            and isinstance(leaf, Tensor)
            and leaf.dim()
            and leaf.layout == torch.strided
            and torch.empty_like(leaf, device="meta").stride() == leaf.stride()
        }

    def _load(self, checkpoint_path: Path | str, weights_only: bool | None = None) -> Any:
        """The checkpoint with this rank's part of each tensor; a whole file too."""
        path = Path(checkpoint_path)
        state = self._io.load_checkpoint(path, weights_only=weights_only, whole=False)
        shards = None
        if manifest.has_parts(path):
            facts = manifest.read(path)
            shards = pieces.Shards(path, facts)
            # Another number of ranks shares out what all of them had.
            as_many = facts.get("world_size") == self.ranks.number
            state = dict(state) | pieces.own_of(shards, facts, self.ranks.rank if as_many else None)
        return self._placed(state, shards)

    def _placed(self, state: Mapping[str, Any], shards: pieces.Shards | None) -> dict[str, Any]:
        fits = self.trainer.state.fn == TrainerFn.FITTING
        optimizers = self.trainer.optimizers if fits else []
        return pieces.placed(state, shards, self._module.state_dict(), optimizers)

    def _load_weights(self, checkpoint: dict[str, Any], strict: bool = True) -> None:
        # Of a whole one that lay ready, for `ckpt_path="last"`.
        checkpoint.update(self._placed(checkpoint, None))
        self._module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def weights_of(self, path: Path) -> dict[str, Any]:
        """The checkpoint, with this rank's part of each weight; its other tensors are left out."""
        state, facts = store.load(path, whole=False)
        shards = pieces.Shards(path, facts) if manifest.has_parts(path) else None
        weights = {"state_dict": state["state_dict"]}
        return state | pieces.placed(weights, shards, self._module.state_dict())

    def load_optimizers(self, checkpoint: Mapping[str, Any]) -> None:
        """Lightning leaves these to a strategy that spreads the model, before callbacks have added
        groups to them.
        """
        if not self.is_spread:
            return
        states = checkpoint.get("optimizer_states", [])
        for optimizer, state in zip(self.trainer.optimizers, states, strict=False):
            optimizer.load_state_dict(state)
