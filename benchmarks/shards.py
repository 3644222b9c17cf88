"""A save of a state that is spread over ranks (FSDP2): each writes its shard, against the first one
gathering all of it for one file, and against that one file alone, as under DDP; and what the ranks
of DDP share out.

python benchmarks/shards.py
python benchmarks/shards.py --megabytes 900 --ranks 2 4 --rounds 5
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from savepoint.checkpoint import format, store
from savepoint.sharded import pieces, saving
from savepoint.sharded.together import Ranks
from savepoint.words import table

TENSORS = 24
HOW = ("shards", "gathered for one file", "shared out (DDP)", "one file of the first rank")


def spread_state(mesh: DeviceMesh, megabytes: float) -> dict[str, Any]:
    """A model and AdamW's two moments, a third of the bytes each."""
    rows = int(megabytes * 1e6 / 4 / 1024 / 3 / TENSORS) // mesh.size() * mesh.size()

    def part(number: int) -> DTensor:
        generator = torch.Generator().manual_seed(number * 100 + mesh.get_local_rank())
        own = torch.randn(rows // mesh.size(), 1024, generator=generator)
        return DTensor.from_local(own, mesh, [Shard(0)], run_check=False)

    weights = {f"layer{number}.weight": part(number) for number in range(TENSORS)}
    moments = {
        number: {"exp_avg": part(100 + number), "exp_avg_sq": part(200 + number)}
        for number in range(TENSORS)
    }
    return {"state_dict": weights, "optimizer_states": [{"state": moments, "param_groups": []}]}


def measure(rank: int, ranks: int, folder: Path, megabytes: float, rounds: int, how: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    state = spread_state(init_device_mesh("cpu", (ranks,)), megabytes)
    together = Ranks()
    facts = {"step": 1, "world_size": ranks}
    whole = pieces.whole(state, keep=rank == 0 or how == HOW[2]) if how in HOW[2:] else None

    def save(path: Path) -> None:
        if how == HOW[0]:
            saving.save(together, path, state, {}, facts)
            return
        if how == HOW[2]:
            leaves = format.leaves(whole)
            held = {key: leaf for key, leaf in leaves if isinstance(leaf, torch.Tensor)}
            parts = saving.split(together, whole or {}, {}, held)
            saving.write(together, path, parts, facts)
            return
        kept = whole
        if how == HOW[1]:
            kept = pieces.whole(state, keep=rank == 0)
        if kept is not None:
            store.write(path, kept, facts)
        dist.barrier()

    secs = []
    before = peak_megabytes()
    for number in range(rounds + 1):
        path = folder / f"{number}.ckpt"
        dist.barrier()
        began = time.monotonic()
        save(path)
        secs.append(time.monotonic() - began)
        dist.barrier()
        if rank == 0:
            size = sum(one.stat().st_size for one in [path, *path.glob("*")] if one.is_file())
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if rank == 0:
        found = {"secs": secs[1:], "memory": peak_megabytes() - before, "bytes": size}
        (folder / "found.json").write_text(json.dumps(found))


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def in_ranks(ranks: int, work: Callable[[int], None]) -> None:
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            work(rank)
            os._exit(0)
        children.append(child)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=float, default=300)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rows = []
    for ranks in arguments.ranks:
        alone = 0.0
        for how in reversed(HOW):
            with tempfile.TemporaryDirectory(dir=".") as name:
                folder = Path(name).absolute()
                given = (ranks, folder, arguments.megabytes, arguments.rounds, how)
                in_ranks(ranks, lambda rank, given=given: measure(rank, *given))  # type: ignore[misc]
                found = json.loads((folder / "found.json").read_text())
            middle = statistics.median(found["secs"])
            alone = alone or middle
            spread = f"{min(found['secs']):.2f} to {max(found['secs']):.2f}"
            row = (how, f"{middle:.2f}", spread, f"{middle / alone:.2f}")
            rows.append((str(ranks), *row, f"{found['memory']:.0f}", f"{found['bytes'] / 1e6:.0f}"))
    head = ("ranks", "save", "secs", "from, to", "ratio", "more MB in rank 0", "MB on disk")
    print(table(head, rows))


if __name__ == "__main__":
    main()
