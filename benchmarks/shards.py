"""A save of a state that is spread over ranks (FSDP2): each writes its shard, against the first one
gathering all of it for one file, and against that one file alone, as under DDP; and what the ranks
of DDP share out.

python benchmarks/shards.py
python benchmarks/shards.py --megabytes 900 --ranks 2 4 --rounds 5

The ways take turns; the first round is not counted; medians of the first rank, as all wait for all.
The memory is the most that the first rank held beyond what it held before, in any round.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from report import in_ranks, machine, ratio
from saves import Measure
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


def save_in_turns(
    rank: int, ranks: int, folder: Path, megabytes: float, rounds: int, ways: Sequence[str]
) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    state = spread_state(init_device_mesh("cpu", (ranks,)), megabytes)
    together = Ranks()
    facts = {"step": 1, "world_size": ranks}
    whole = pieces.whole(state, keep=True)
    assert whole is not None

    def save(how: str, path: Path) -> None:
        if how == HOW[0]:
            saving.save(together, path, state, {}, facts)
            return
        if how == HOW[2]:
            leaves = format.leaves(whole)
            held = {key: leaf for key, leaf in leaves if isinstance(leaf, torch.Tensor)}
            saving.write(together, path, saving.split(together, whole, {}, held), facts)
            return
        kept = whole
        if how == HOW[1]:
            kept = pieces.whole(state, keep=rank == 0)
        if rank == 0:
            store.write(path, kept, facts)
        dist.barrier()

    measured = Measure()
    sizes = {}
    for number in range(rounds + 1):
        for how in ways:
            path = folder / f"{number}.ckpt"
            dist.barrier()
            measured(how, partial(save, how, path), lambda _: dist.barrier())
            if rank == 0:
                files = [one for one in (path, *path.glob("*")) if one.is_file()]
                sizes[how] = sum(one.stat().st_size for one in files) / 1e6
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    if rank == 0:
        found = {
            how: {
                "waits": row["waits"][1:],
                "secs": statistics.median(row["waits"][1:]),
                "memory": max(row["memory"]) / 1e6,
                "state": format.size_bytes(whole) / 1e6,
                "on disk": sizes[how],
            }
            for how, row in measured.found.items()
        }
        (folder / "found.json").write_text(json.dumps(found))


def measure(
    ranks: int, megabytes: float, rounds: int, ways: Sequence[str] = HOW
) -> dict[str, dict[str, Any]]:
    """By way: seconds of a save, megabytes of memory, of the state and of the files."""
    with tempfile.TemporaryDirectory(prefix="shards-") as name:
        folder = Path(name)
        given = (ranks, folder, megabytes, rounds, ways)
        in_ranks(ranks, lambda rank: save_in_turns(rank, *given))
        found: dict[str, dict[str, Any]] = json.loads((folder / "found.json").read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=300)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(f"On {machine()}", flush=True)
    rows = []
    for ranks in arguments.ranks:
        found = measure(ranks, arguments.megabytes, arguments.rounds)
        alone = found[HOW[-1]]["secs"]
        for how, one in found.items():
            spread = f"{min(one['waits']):.2f} to {max(one['waits']):.2f}"
            row = (str(ranks), how, f"{one['secs']:.2f}", spread, ratio(one["secs"] / alone))
            rows.append((*row, f"{one['memory']:.0f}", f"{one['on disk']:.0f}"))
    head = ("ranks", "save", "secs", "from, to", "ratio", "more MB in rank 0", "MB on disk")
    print(table(head, rows))


if __name__ == "__main__":
    main()
