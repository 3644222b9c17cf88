"""Checkpoints in parts without a training: what two ranks of a model would write."""

from pathlib import Path
from typing import Any

import torch

from savepoint.checkpoint import manifest, store
from savepoint.checkpoint.store import Checkpoint
from support.checkpoint_files import facts, small_state

State = dict[str, Any]


def halves(state: State) -> tuple[State, list[State]]:
    """What is in common.ckpt, and in the shards of two ranks, each with half of each matrix."""
    momentum = state["optimizer_states"][0]["state"][0]
    whole = {
        "state_dict.weight": state["state_dict"]["weight"],
        "optimizer_states[0].state.0.exp_avg": momentum["exp_avg"],
    }
    common = small_state()
    empty = torch.empty(20, 30, device="meta")
    common["state_dict"]["weight"] = empty
    common["optimizer_states"][0]["state"][0]["exp_avg"] = torch.empty(20, 30, device="meta")
    shards = []
    for rank, rows in enumerate((slice(0, 12), slice(12, 20))):
        pieces = {key: tensor[rows].clone() for key, tensor in whole.items()}
        places = {key: [rows.start, 0] for key in whole}
        own = {"rng": {"torch": torch.full((5,), rank, dtype=torch.uint8)}} if rank else {}
        shards.append({"pieces": pieces, "places": places, "own": own})
    return common, shards


def write_halves(
    path: Path,
    step: int = 30,
    value: float = 1.0,
    score: float = 0.5,
    tag: str = "",
    **known: object,
) -> Checkpoint:
    common, shards = halves(small_state(value))
    path.mkdir(parents=True, exist_ok=True)
    named = {}
    for rank, shard in enumerate(shards):
        name = f"shard-{rank:05d}{tag}.ckpt"
        written = store.write(path / name, shard, {"step": step, "shard": rank})
        size = (path / name).stat().st_size
        named[name] = {"bytes": size, "digest": written.manifest["digest"]}
    known |= {"world_size": 2, "shards": named}
    store.write(path / manifest.COMMON, common, facts(step, score) | known)
    return Checkpoint(path, manifest.read(path))


def in_store(directory: Path, step: int, score: float = 0.5) -> Path:
    return write_halves(directory / f"step-{step:08d}.ckpt", step, float(step), score).path


def flip(file: Path, at: float = 0.5) -> None:
    data = bytearray(file.read_bytes())
    data[int(len(data) * at)] ^= 1
    file.write_bytes(data)
