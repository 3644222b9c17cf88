"""Whatever dies in the middle of an upload: what lists as a checkpoint verifies.

The upload is made by a process of its own, which is killed at a call (file://) or at a random
moment (a server).
"""

import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoint_files import facts
from support.file_calls import Call, watched
from support.mirrors import save, save_parts
from support.object_stores import SERVERS, needs_servers, serving
from support.run_dirs import make_run

from savepoint import files
from savepoint.checkpoint import manifest, store
from savepoint.mirror import held
from savepoint.mirror.fetch import fetch
from savepoint.mirror.remote import connect
from savepoint.mirror.settings import Mirroring
from savepoint.mirror.uploader import Uploader
from savepoint.run import Run

KILLED = 9
Saved = Callable[[Path, int], Path]
SAVED = (save, save_parts)


def upload(run_dir: Path, url: str) -> None:
    run_id = Run(run_dir).id()
    assert run_id is not None
    mirror = Uploader(Mirroring(url), run_dir, run_id)
    mirror.begin(is_new=False)
    mirror.catch_up()
    mirror.close()


def check(url: str, run_dir: Path, work: Path) -> list[int]:
    """The steps in the mirror, after a look at every byte of each."""
    remote = connect(url)
    listing = held.listed(remote, run_dir.name)
    for one in listing.checkpoints:
        held.download(remote, one, work / "copy")
        assert manifest.verify(work / "copy") == one.manifest
        files.delete(work / "copy")
    assert listing.rejected == {}, "no half an object under the name of a checkpoint"
    return [one.step for one in listing.checkpoints]


class Killing:
    """Ends the process before the k-th call below the mirror; of a write, after half of its bytes."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, call: Call) -> Any:
        self.calls += 1
        if self.calls == self.at:
            if call.size > 1:
                call.half()
            os._exit(KILLED)
        return call.go()


def forked(run_dir: Path, cloud: Path, at: int) -> int:
    """The exit code of an upload in a fork of this process."""
    if (pid := os.fork()) == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        with watched(cloud, Killing(at)):
            upload(run_dir, f"file://{cloud}")
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    made = make_run(tmp_path / "outputs", steps=(10,))
    (made / "metrics.csv").write_text("step,loss\n1,0.5\n")
    return made


def points(whole: bool) -> Iterator[int]:
    return iter(range(1, 10_000, 1 if whole else 9))


@pytest.mark.parametrize("saved", SAVED, ids=["a file", "shards"])
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_at_any_call_an_upload_publishes_nothing_that_is_half(
    whole: bool, saved: Saved, run_dir: Path, tmp_path: Path
) -> None:
    cloud = tmp_path / "cloud"
    upload(run_dir, f"file://{cloud}")
    saved(run_dir, 20)
    before = check(f"file://{cloud}", run_dir, tmp_path)
    assert before == [10]
    kills = 0
    for at in points(whole):
        code = forked(run_dir, cloud, at)
        steps = check(f"file://{cloud}", run_dir, tmp_path)
        assert steps in ([10], [10, 20])
        if code == 0:
            break
        assert code == KILLED
        kills += 1
        if 20 in steps:  # again from the beginning
            held.delete(connect(f"file://{cloud}"), listed(f"file://{cloud}")[-1])
    assert kills > (20 if whole else 3)
    assert not [path for path in cloud.rglob("*") if ".tmp-" in path.name], "swept"
    assert fetch(f"file://{cloud}/first", tmp_path / "back").name == "first"


def test_of_another_branch_nothing_is_mixed_wherever_the_upload_dies(
    run_dir: Path, tmp_path: Path
) -> None:
    """The step is in the mirror already, and its shards are called the same."""
    cloud = tmp_path / "cloud"
    upload(run_dir, f"file://{cloud}")
    for at in range(1, 10_000, 3):
        shutil.rmtree(cloud / "first/checkpoints/step-00000020.ckpt", ignore_errors=True)
        for value in (1.0, 2.0):  # as large as the other
            files.delete(run_dir / "checkpoints/step-00000020.ckpt")
            save_parts(run_dir, 20, value)
            if value == 1.0:
                upload(run_dir, f"file://{cloud}")
        code = forked(run_dir, cloud, at)
        assert check(f"file://{cloud}", run_dir, tmp_path) in ([10], [10, 20])
        if code == 0:
            break
    assert code == 0


@pytest.mark.slow
@pytest.mark.parametrize("saved", SAVED, ids=["a file", "shards"])
@pytest.mark.parametrize(
    "kind", [*(pytest.param(one, marks=needs_servers) for one in SERVERS), "a directory"]
)
def test_killed_two_hundred_times_an_upload_publishes_nothing_that_is_half(
    kind: str, saved: Saved, run_dir: Path, tmp_path: Path
) -> None:
    """40 MB, in parts, so that most kills meet the middle of one."""
    big = saved(run_dir, 20)
    grow(big, 40_000_000)
    chance = random.Random(1)
    url = f"file://{tmp_path}/cloud" if kind == "a directory" else "s3://bucket/prefix"
    whole = 0
    kills = int(os.environ.get("KILLS", "200"))
    with contextlib.ExitStack() as running:
        if kind != "a directory":
            running.enter_context(serving(kind, tmp_path / "server"))
        took = wait(in_a_fork(lambda: upload(run_dir, url)))
        assert found(url, run_dir, tmp_path)[0] == [10, 20]
        for _ in range(kills):
            wait(in_a_fork(lambda: held.delete(connect(url), listed(url)[-1])))
            pid = in_a_fork(lambda: upload(run_dir, url))
            wait(pid, kill_after=chance.uniform(0, 1.1 * took))
            steps, _ = found(url, run_dir, tmp_path)
            assert steps in ([10], [10, 20])
            whole += 20 in steps
            if 20 not in steps:
                wait(in_a_fork(lambda: upload(run_dir, url)))
        steps, pending = found(url, run_dir, tmp_path)
        assert steps == [10, 20]
        assert pending == 0, "what a killed upload leaves is ended by the next"
    print(f"{kind}: {kills} kills, {whole} after the upload was whole, 0 half objects")


def listed(url: str) -> list[held.Held]:
    return held.listed(connect(url), "first").checkpoints


def grow(path: Path, size: int) -> None:
    made = manifest.read(path)
    names = list(made.get("shards", [path.name]))
    known = facts(20, 20.0, run_id=made["run_id"])
    weight = torch.randn(size // 4 // len(names))
    if "shards" not in made:
        store.write(path, {"state_dict": {"weight": weight}}, known)
        return
    shards = {}
    for rank, name in enumerate(names):
        part = {"pieces": {"weight": weight}, "places": {"weight": [0]}, "own": {}}
        written = store.write(path / name, part, {"step": 20, "shard": rank})
        shards[name] = {"bytes": files.size(path / name), "digest": written.manifest["digest"]}
    store.write(path / manifest.COMMON, {}, known | {"shards": shards})


def in_a_fork(job: Callable[[], object]) -> int:
    """The pid. This process itself asks no server: the client's threads would not survive a fork."""
    if pid := os.fork():
        return pid
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    job()
    os._exit(0)


def wait(pid: int, kill_after: float | None = None) -> float:
    """Seconds to its end, which may be a kill."""
    began = time.perf_counter()
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return time.perf_counter() - began


def found(url: str, run_dir: Path, work: Path) -> tuple[list[int], int]:
    """The steps that list, each looked at whole, and the number of uploads that are pending."""
    answer = work / "answer"
    answer.unlink(missing_ok=True)

    def look() -> None:
        remote: Any = connect(url)
        steps = check(url, run_dir, work)
        pending = 0
        with contextlib.suppress(FileNotFoundError, AttributeError):  # a directory has none
            answered = remote._fs.call_s3("list_multipart_uploads", Bucket="bucket")
            pending = len(answered.get("Uploads") or [])
        answer.write_text(json.dumps([steps, pending]))

    wait(in_a_fork(look))
    steps, pending = json.loads(answer.read_text())
    return steps, pending
