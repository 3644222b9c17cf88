"""Up to thousands of ranks in one process, a thread each, that save together by the real code: what
they say to each other and which files they change is counted. Tensors have shapes and no bytes.
"""

import json
import pickle
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from savepoint import files
from savepoint.checkpoint import format, manifest
from savepoint.sharded import saving
from savepoint.sharded.together import Ranks
from support.file_calls import Call, watched

State = dict[str, Any]
LAYERS = 20
ROWS = 8192
COLUMNS = 500_000
# Of weights and Adam's two moments, in 32 bits: 0.98 TB.
STATE_BYTES = 3 * LAYERS * ROWS * COLUMNS * 4


class Meeting:
    """Where the pretended ranks meet.

    Attributes:
        counted: "gather" and "broadcast", by how often they met; "to the first" and "from the
            first", the bytes of what went between it and one other rank.
        calls: By rank, its calls that change files, writes left out.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.counted: Counter[str] = Counter()
        self.calls: dict[int, Counter[str]] = {rank: Counter() for rank in range(number)}
        self.said: list[Any] = [None] * number
        self.told: Any = None
        self.barrier = threading.Barrier(number)
        self.here = threading.local()

    def see(self, call: Call) -> Any:
        if call.name != "write":
            self.calls[self.here.rank][call.name] += 1
        return call.go()


class Pretended(Ranks):
    """One of them. A real one sends what it says pickled."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank = rank
        self.number = meeting.number
        self._meeting = meeting

    def _gather(self, own: Any) -> list[Any]:
        meeting = self._meeting
        meeting.said[self.rank] = own
        meeting.barrier.wait()
        if self.rank:
            return []
        meeting.counted["gather"] += 1
        meeting.counted["to the first"] += len(pickle.dumps(meeting.said[-1]))
        return list(meeting.said)

    def _tell(self, what: Any) -> Any:
        meeting = self._meeting
        if self.rank == 0:
            meeting.told = what
            meeting.counted["broadcast"] += 1
            meeting.counted["from the first"] += len(pickle.dumps(what))
        meeting.barrier.wait()
        told = meeting.told
        meeting.barrier.wait()
        return told


def state_of(rank: int, ranks: int, replicas: int) -> State:
    """A model of LAYERS layers and Adam's moments, spread over the ranks in equal rows."""
    shards = ranks // replicas
    placed = torch.arange(ranks).reshape(replicas, shards)
    mesh = DeviceMesh("cpu", placed, _init_backend=False, _rank=rank)

    def part() -> DTensor:
        own = torch.empty(ROWS // shards, COLUMNS, device="meta")
        return DTensor.from_local(own, mesh, [Replicate(), Shard(0)], run_check=False)

    weights = {f"layer{number}.weight": part() for number in range(LAYERS)}
    moments = {
        number: {"exp_avg": part(), "exp_avg_sq": part(), "step": torch.tensor(1.0)}
        for number in range(LAYERS)
    }
    group = {"lr": 0.1, "params": list(range(LAYERS))}
    optimizer = {"state": moments, "param_groups": [group]}
    return {"state_dict": weights, "optimizer_states": [optimizer]}


def saved(path: Path, ranks: int, replicas: int = 1) -> Meeting:
    """One save of a checkpoint by so many ranks."""

    def save(one: Ranks) -> None:
        own = {"rng": bytes(5000)}  # about as large as a rank's random states
        facts = {"step": 1, "epoch": 0, "world_size": ranks}
        saving.save(one, path, state_of(one.rank, ranks, replicas), own, facts)

    return together(path.parent, ranks, save)


def together(directory: Path, number: int, save: Callable[[Ranks], None]) -> Meeting:
    """`save` on each of so many ranks; what they do in `directory` is counted."""
    meeting = Meeting(number)
    failures: list[BaseException] = []

    def work(rank: int) -> None:
        meeting.here.rank = rank
        try:
            save(Pretended(rank, meeting))
        except BaseException as error:  # noqa: BLE001 - of a thread: it is raised below
            failures.append(error)
            meeting.barrier.abort()

    with watched(directory, meeting.see):
        _in_threads(number, work)
    for error in failures:
        raise error
    return meeting


def _in_threads(number: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def counted(directory: Path, ranks: int, replicas: int = 1) -> dict[str, int]:
    """What a save by so many ranks took, and what it left."""
    path = directory / f"{ranks}-{replicas}" / "step-00000001.ckpt"
    path.parent.mkdir()
    meeting = saved(path, ranks, replicas)
    facts = manifest.verify(path)
    parts = [_tensor_bytes(path, name) for name in facts["shards"]]
    sizes = [known["bytes"] for known in facts["shards"].values()]
    common = files.size(path / manifest.COMMON)
    return {
        "ranks": ranks,
        "gathers": meeting.counted["gather"],
        "broadcasts": meeting.counted["broadcast"],
        "bytes to the first": meeting.counted["to the first"],
        "bytes from the first": meeting.counted["from the first"],
        "files": len(list(path.iterdir())),
        "common.ckpt": common,
        "without the shards' names": common - len(json.dumps(facts["shards"])),
        "a shard, without tensors": max(sizes),
        "tensors": sum(parts),
        "most tensors of a rank": max(parts),
        "calls of the first": meeting.calls[0].total(),
        "most calls of another": max(meeting.calls[rank].total() for rank in range(1, ranks)),
    }


def _tensor_bytes(path: Path, shard: str) -> int:
    found = format.decode(path / shard)["pieces"]
    return sum(tensor.nbytes for tensor in found.values())
