"""Whatever dies in the middle of an upload: what lists as a checkpoint verifies.

The upload is made by this file run as a program, which is killed at a call (file://) or at a random
moment (a server).
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.file_calls import Call, watched
from support.mirrors import save
from support.object_stores import SERVERS, make_importable, needs_servers, packages, serving
from support.run_dirs import make_run

from savepoint.checkpoint import manifest
from savepoint.mirror import held
from savepoint.mirror.fetch import fetch
from savepoint.mirror.remote import connect
from savepoint.mirror.settings import Mirroring
from savepoint.mirror.uploader import Uploader
from savepoint.run import Run

KILLED = 9


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
        copy = work / "copy"
        copy.write_bytes(b"")
        remote.download(one.key, one.size, copy)
        assert manifest.verify(copy) == one.manifest
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


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_at_any_call_an_upload_publishes_nothing_that_is_half(
    whole: bool, run_dir: Path, tmp_path: Path
) -> None:
    cloud = tmp_path / "cloud"
    upload(run_dir, f"file://{cloud}")
    newest = save(run_dir, 20)
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
        (cloud / "first" / "checkpoints" / newest.name).unlink(missing_ok=True)
    assert kills > (20 if whole else 3)
    assert not [path for path in cloud.rglob("*") if ".tmp-" in path.name], "swept"
    assert fetch(f"file://{cloud}/first", tmp_path / "back").name == "first"


@pytest.mark.slow
@needs_servers
@pytest.mark.parametrize("kind", SERVERS)
def test_killed_two_hundred_times_an_upload_to_a_server_publishes_nothing_that_is_half(
    kind: str, run_dir: Path, tmp_path: Path
) -> None:
    """40 MB, in parts, so that most kills meet the middle of one."""
    big = save(run_dir, 20)
    grow(big, 40_000_000)
    chance = random.Random(1)
    url = "s3://bucket/prefix"
    whole = 0
    with serving(kind, tmp_path / "server") as server:
        environment = os.environ | server.environment
        took = min(uploaded(run_dir, url, environment, None) for _ in range(2))
        for _ in range(200):
            connect(url).delete(held.key("first", big.name))
            uploaded(run_dir, url, environment, chance.uniform(0, 1.1 * took))
            steps = check(url, run_dir, tmp_path)
            assert set(steps) <= {10, 20}
            whole += 20 in steps
        uploaded(run_dir, url, environment, None)
        assert 20 in check(url, run_dir, tmp_path)
        assert pending(url) == [], "what a killed upload leaves is ended by the next"
    print(f"{kind}: 200 kills, {whole} of them after the upload was whole, 0 half objects")
    assert 0 < whole < 200


def grow(path: Path, size: int) -> None:
    import torch
    from support.checkpoint_files import facts

    from savepoint.checkpoint import store

    made = manifest.read(path)
    state = {"state_dict": {"weight": torch.randn(size // 4)}}
    store.write(path, state, facts(20, 20.0, run_id=made["run_id"]))


def uploaded(
    run_dir: Path, url: str, environment: dict[str, str], kill_after: float | None
) -> float:
    """Seconds from the begin of an upload by another process to its end, which may be a kill."""
    command = [sys.executable, __file__, str(run_dir), url]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begin\n"
        began = time.perf_counter()
        if kill_after is not None:
            time.sleep(kill_after)
            process.send_signal(signal.SIGKILL)
        process.stdout.read()
        return time.perf_counter() - began


def pending(url: str) -> list[str]:
    remote: Any = connect(url)
    found = remote._fs.call_s3("list_multipart_uploads", Bucket="bucket")
    return [one["Key"] for one in found.get("Uploads") or []]


if __name__ == "__main__":
    if packages():
        make_importable()
    print("begin", flush=True)
    upload(Path(sys.argv[1]), sys.argv[2])
