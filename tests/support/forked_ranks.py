"""Ranks that save what they share, forked from a process that has imported everything: no training,
a start takes a tenth of a second. See test_failing_ranks.py.

python -m support.forked_ranks SCENARIO DIRECTORY RANKS TIMES SEED

What it found is left in found.json beside DIRECTORY.
"""

import errno
import itertools
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo  # which DTensors import, each child by itself otherwise
import torch.distributed as dist
import torch.distributed.checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from savepoint.checkpoint import manifest, store
from savepoint.checkpoint.format import fingerprint
from savepoint.checkpoint.io import CheckpointIO
from savepoint.checkpoint.retention import Retention
from savepoint.checkpoint.store import CheckpointStore
from savepoint.errors import CheckpointSaveError
from savepoint.sharded import pieces, saving
from savepoint.sharded.strategy import Sharding
from savepoint.sharded.together import Ranks
from support.checkpoint_files import facts, names
from support.file_calls import Call, watched
from support.limits import HANG_SECS

State = dict[str, Any]
ROWS = 60


def whole_state(step: int, megabytes: float = 0.0) -> State:
    """What the training has at a step."""
    rows = ROWS + int(megabytes * 1e6 / (4 * 50))
    weight = torch.arange(50.0 * rows).reshape(rows, 50) + step
    moments = {0: {"exp_avg": weight * 2, "step": torch.tensor(float(step))}}
    optimizer = {"state": moments, "param_groups": [{"lr": 0.1 / step, "params": [0]}]}
    return {
        "global_step": step,
        "state_dict": {"weight": weight, "count": torch.tensor(step)},
        "optimizer_states": [optimizer],
        "optimizer": optimizer,
    }


def spread(state: State, mesh: DeviceMesh) -> State:
    """`state` with this rank's part of each matrix, a DTensor."""

    def part(tensor: torch.Tensor) -> DTensor:
        chunks = tensor.chunk(mesh.size())
        own = chunks[mesh.get_local_rank()].clone()
        return DTensor.from_local(
            own, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride()
        )

    moments = state["optimizer_states"][0]["state"][0]
    matrices = {id(one): part(one) for one in (state["state_dict"]["weight"], moments["exp_avg"])}
    result: State = pieces.replaced(state, matrices)
    return result


def join(directory: Path, rank: int, ranks: int, attempt: int) -> DeviceMesh:
    torch.set_num_threads(1)
    meeting = f"file://{directory.parent}/meeting-{attempt}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    return init_device_mesh("cpu", (ranks,))


def forked(ranks: int, work: Callable[[int], None]) -> list[int]:
    """The processes that do `work`, one a rank; each ends with 1 after an error."""
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                work(rank)
                code = 0
            except BaseException:  # noqa: BLE001 - of a child: whatever it is, it is printed
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    return children


def ended(children: list[int], within_secs: float = HANG_SECS) -> list[int | None]:
    """How each has ended; None for one that has not, which is killed."""
    until = time.monotonic() + within_secs
    codes: dict[int, int | None] = {}
    while len(codes) < len(children) and time.monotonic() < until:
        for child in children:
            done, status = os.waitpid(child, os.WNOHANG) if child not in codes else (0, 0)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    for child in (one for one in children if one not in codes):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return [codes.get(child) for child in children]


# -- scenarios -----------------------------------------------------------------------------------


def kills(
    directory: Path, ranks: int, times: int, seed: int, *, in_a_thread: bool = False
) -> State:
    """A random rank is killed at a random moment while all save without a pause; then they go on
    from what is there.
    """
    dice = random.Random(seed)
    tally: State = {"kills": 0, "damaged": [], "lost": [], "hung": 0, "temps": [], "unequal": []}
    before = 0
    for attempt in range(times):
        work = _saving(directory, ranks, attempt, in_a_thread=in_a_thread)
        children = forked(ranks, work)
        _wait_for_a_save(directory, children, before)
        time.sleep(dice.uniform(0.0, 0.15))
        os.kill(dice.choice(children), signal.SIGKILL)
        codes = ended(children)
        tally["kills"] += 1
        tally["hung"] += codes.count(None)
        before = _look(directory, tally, before)
    return tally | {"steps": before}


def kills_of_threads(directory: Path, ranks: int, times: int, seed: int) -> State:
    """The same, with saves in a thread, and training's own collectives meanwhile."""
    return kills(directory, ranks, times, seed, in_a_thread=True)


def _saving(
    directory: Path, ranks: int, attempt: int, *, in_a_thread: bool
) -> Callable[[int], None]:
    def work(rank: int) -> None:
        mesh = join(directory, rank, ranks, attempt)
        own = CheckpointStore(directory, retention=Retention(keep_last=2))
        saver = Saves(own, in_a_thread=in_a_thread)
        step = saver.sharding.ranks.first(lambda: _start(own))
        while True:
            step += 1
            state = spread(whole_state(step, 1.0), mesh)
            saver.save(step, state, {"rank": rank})
            dist.barrier()
            if step % 3 == 0:  # the same step once more, as at the end of a training
                saver.save(step, state, {"rank": rank})

    return work


class Saves:
    """As Lightning calls the strategy: where there is no Trainer, whatever it asks of one."""

    def __init__(self, own: CheckpointStore, *, in_a_thread: bool) -> None:
        self.own, self.io = own, CheckpointIO(async_save=in_a_thread)
        self.io.store = own
        strategy = SimpleNamespace(checkpoint_io=self.io)
        self.sharding = Sharding(SimpleNamespace(strategy=strategy), in_parts=True)  # type: ignore[arg-type]

    def save(self, step: int, state: State, alone: State) -> None:
        known = {**facts(step, 0.5), "world_size": self.sharding.ranks.number}
        everything = {**state, "own": alone, "manifest": known}
        self.sharding._save(everything, self.own.path(step))
        if self.sharding.ranks.rank == 0:
            self.io.submit(lambda: _nothing(self.own.commit()))


def _nothing(_: object) -> None: ...


def _start(own: CheckpointStore) -> int:
    if not own.directory.exists() or not own.checkpoints():
        return 0
    own.mend()
    chosen, state, lines = own.load_latest(lock_holder=True)
    assert not lines
    assert fingerprint(_of_step(state)) == fingerprint(whole_state(chosen.step, 1.0))
    return chosen.step


def _of_step(state: State) -> State:
    return {key: value for key, value in state.items() if key != pieces.OWN}


def _wait_for_a_save(directory: Path, children: list[int], before: int) -> None:
    until = time.monotonic() + HANG_SECS
    newest = directory / f"step-{before + 1:08d}.ckpt"
    later = directory / f"step-{before + 2:08d}.ckpt"
    while not newest.exists() and not later.exists() and time.monotonic() < until:
        time.sleep(0.002)


def _look(directory: Path, tally: State, before: int) -> int:
    """What a kill has left; returns the newest step."""
    own = CheckpointStore(directory)
    tally["damaged"] += [f"{path.name}: {why}" for path, why in own.rejected()]
    newest = 0
    for one in own.checkpoints():
        newest = max(newest, one.step)
        state, _ = store.load(one.path)
        if fingerprint(_of_step(state)) != fingerprint(whole_state(one.step, 1.0)):
            tally["unequal"].append(one.step)
        if [other["rank"] for other in state.get(pieces.OWN, [])] != list(
            range(1, one.manifest["world_size"])
        ):
            tally["unequal"].append(f"{one.step}: what each rank has of its own")
    if newest < before:
        tally["lost"].append([before, newest])
    own.mend()
    tally["temps"] += [name for name in names(directory) if ".tmp-" in name]
    for one in own.checkpoints():
        tally["temps"] += map(str, manifest.superfluous_in(one.path))
    return newest


def threads(directory: Path, ranks: int, times: int, seed: int) -> State:
    """Saves in threads, with barriers of the training in between; the state goes on changing."""

    def work(rank: int) -> None:
        mesh = join(directory, rank, ranks, 0)
        own = CheckpointStore(directory, retention=Retention(keep_last=99))
        saver = Saves(own, in_a_thread=True)
        state = spread(whole_state(1, 2.0), mesh)
        weight = state["state_dict"]["weight"].to_local()
        for step in range(1, times + 1):
            saver.save(step, {**state, "global_step": step}, {"rank": rank})
            dist.barrier()
            weight += 1  # in the middle of the write
            dist.barrier()
        saver.io.wait()

    found: State = {"codes": ended(forked(ranks, work)), "steps": [], "unequal": []}
    for one in CheckpointStore(directory).checkpoints():
        state, _ = store.load(one.path)
        found["steps"].append(one.step)
        expected = whole_state(1, 2.0)["state_dict"]["weight"] + (one.step - 1)
        if not torch.equal(state["state_dict"]["weight"], expected):
            found["unequal"].append(one.step)
    return found


def full_disk_of_a_thread(directory: Path, ranks: int, times: int, seed: int) -> State:
    """The last rank finds the disk full in its thread; what each rank has heard, and when."""
    said = directory.parent

    def work(rank: int) -> None:
        mesh = join(directory, rank, ranks, 0)
        own = CheckpointStore(directory, retention=Retention(keep_last=9))
        saver = Saves(own, in_a_thread=True)
        words = []
        sync = os.fsync
        for step in (1, 2, 3):
            if rank == ranks - 1 and step == 2:

                def full(file: Any) -> None:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

                os.fsync = full
            saver.save(step, spread(whole_state(step), mesh), {})
            try:
                saver.io.wait()
                words.append("saved")
            except CheckpointSaveError as error:
                words.append(str(error).replace(str(directory), "DIR"))
            os.fsync = sync
        (said / f"rank-{rank}.json").write_text(json.dumps(words))

    codes = ended(forked(ranks, work))
    found: State = {"codes": codes, "names": names(directory)}
    return found | {f.stem: json.loads(f.read_text()) for f in sorted(said.glob("*.json"))}


def full_disk(directory: Path, ranks: int, times: int, seed: int) -> State:
    """The last rank finds the disk full, once, and later for good; returns what each rank said."""
    said = directory.parent

    def work(rank: int) -> None:
        mesh = join(directory, rank, ranks, 0)
        together = Ranks()
        own = CheckpointStore(directory, retention=Retention(keep_last=1))
        words = []
        for step, failures in ((1, 0), (2, 0), (3, 1), (4, 99), (5, 0)):
            left = [failures if rank == ranks - 1 else 0]
            sync = os.fsync

            def full(file: Any, left: list[int] = left, sync: Any = sync) -> None:
                if left[0]:
                    left[0] -= 1
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                sync(file)

            os.fsync = full
            known = {**facts(step, 1.0 / step), "world_size": ranks}
            try:
                saving.save(
                    together, own.path(step), spread(whole_state(step), mesh), {}, known, own
                )
                words.append("saved")
                if step > 2:
                    together.first(lambda: bool(own.commit()))
            except CheckpointSaveError as error:
                words.append(str(error).replace(str(directory), "DIR"))
            finally:
                os.fsync = sync
            if rank == 0:
                (said / f"names-{step}.json").write_text(json.dumps(names(directory)))
            together.together(lambda: None)
        (said / f"rank-{rank}.json").write_text(json.dumps(words))

    codes = ended(forked(ranks, work))
    found: State = {"codes": codes}
    for file in sorted(said.glob("*.json")):
        found[file.stem] = json.loads(file.read_text())
    return found


def resharded(directory: Path, ranks: int, times: int, seed: int) -> State:
    """What `ranks` save, one to four of them load."""
    state = whole_state(7)

    def save(rank: int) -> None:
        mesh = join(directory, rank, ranks, 0)
        known = {**facts(7, 0.5), "world_size": ranks}
        saving.save(Ranks(), directory / "a.ckpt", spread(state, mesh), {"rank": rank}, known)

    found: State = {"saved": ended(forked(ranks, save))}
    for other in (1, 2, 3, 4):

        def load(rank: int, other: int = other) -> None:
            mesh = join(directory, rank, other, other)
            common, known = store.load(directory / "a.ckpt", whole=False)
            shards = pieces.Shards(directory / "a.ckpt", known)
            like = spread(whole_state(1), mesh)
            weight = torch.nn.Parameter(like["state_dict"]["weight"])
            optimizer = torch.optim.Adam([weight])
            placed = pieces.placed(common, shards, {"weight": weight}, [optimizer])
            own = placed["state_dict"]["weight"]
            assert isinstance(own, DTensor)
            assert own.to_local().shape == weight.to_local().shape
            assert fingerprint(pieces.whole(placed, keep=True)) == fingerprint(state)

        found[str(other)] = ended(forked(other, load))
    return found


def crash_points(directory: Path, ranks: int, times: int, seed: int) -> State:
    """The first rank dies at each call that changes a file: of a first save, of a second one of the
    same step, and of what retention then deletes.
    """
    tally: State = {"points": 0, "calls": [], "damaged": [], "lost": [], "unequal": [], "temps": []}

    def saves(fault: Callable[[Call], Any], place: Path) -> None:
        own = CheckpointStore(place, retention=Retention(keep_last=1))
        with watched(place, fault):
            for step in (2, 3, 3):
                known = {**facts(step, 0.5), "world_size": 1}
                saving.save(Ranks(), own.path(step), whole_state(step), {}, known, own)
                own.commit()

    for at in itertools.count(1, times):  # each call, or every fourth one
        place = directory / str(at)
        place.mkdir()
        known = {**facts(1, 0.9), "world_size": 1}
        saving.save(Ranks(), CheckpointStore(place).path(1), whole_state(1), {}, known)
        calls = itertools.count(1)

        def fault(call: Call, at: int = at, calls: Any = calls) -> Any:
            if next(calls) == at:
                os._exit(9)
            return call.go()

        def work(rank: int, fault: Any = fault, place: Path = place) -> None:
            saves(fault, place)

        if ended(forked(1, work)) == [0]:
            seen: list[str] = []

            def count(call: Call, seen: list[str] = seen) -> Any:
                seen.append(call.name)
                return call.go()

            saves(count, directory / "counted")
            return tally | {"points": at // times, "calls": seen}
        newest = _newest_of_crash(place, tally)
        if newest == 0:
            tally["lost"].append(at)
    return tally


def _newest_of_crash(place: Path, tally: State) -> int:
    own = CheckpointStore(place)
    tally["damaged"] += [f"{path.name}: {why}" for path, why in own.rejected()]
    own.mend()
    chosen, state, lines = own.load_latest(lock_holder=True)
    if lines or fingerprint(_of_step(state)) != fingerprint(whole_state(chosen.step)):
        tally["unequal"].append(f"{place.name}: {lines}")
    tally["temps"] += [f"{place.name}/{name}" for name in names(place) if ".tmp-" in name]
    for one in own.checkpoints():
        tally["temps"] += map(str, manifest.superfluous_in(one.path))
    return chosen.step


SCENARIOS = {
    "crash_points": crash_points,
    "kills": kills,
    "kills_of_threads": kills_of_threads,
    "threads": threads,
    "full_disk_of_a_thread": full_disk_of_a_thread,
    "full_disk": full_disk,
    "resharded": resharded,
}


def main(scenario: str, directory: Path, ranks: int, times: int, seed: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    found = SCENARIOS[scenario](directory, ranks, times, seed)
    (directory.parent / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6]))
