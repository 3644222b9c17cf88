"""Kills a process at each call that changes a file, one call after the other, and looks at what is left.

The work is done by this file run as a program: each point is a fork of it that ends itself with os._exit, as kill -9
would, before the k-th call (and, for a write, after half of its bytes); or whose k-th call fails.
"""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import facts, small_state

from savepoint.checkpoint import manifest
from savepoint.checkpoint.store import CheckpointStore
from savepoint.errors import CheckpointSaveError

CALLS = ("open", "mkdir", "fsync", "replace", "link", "symlink", "unlink")
OTHERS = {"model.ckpt": "mine", "step-00000030.ckpt.tmp": "mine too", ".notes": "and mine"}
KILLED, SAID, DONE = 9, 3, 0


def prepared(directory: Path) -> CheckpointStore:
    """Step 10 is the best, step 20 the newest; files of other people beside them."""
    kept = CheckpointStore(directory, monitor="val/loss")
    for step, score in ((10, 1.0), (20, 2.0)):
        kept.save(small_state(step), facts(step, score))
    for name, text in OTHERS.items():
        (directory / name).write_text(text)
    return kept


def save(kept: CheckpointStore) -> None:
    """The newest and the best in one: both that were there go. Its large tensor is written in pieces."""
    kept.save(small_state(30) | {"large": [torch.ones(5000)] + [torch.ones(3000)] * 2}, facts(30, 0.5))


def refuse(*_: Any, **__: Any) -> None:
    raise PermissionError(errno.EPERM, "links are not permitted")


def save_without_links(kept: CheckpointStore) -> None:
    """`last` and `best` are symlinks: they must show the new checkpoint before what they showed goes."""
    os.link = refuse
    save(kept)


def save_again(kept: CheckpointStore) -> None:
    """The newest once more, over itself, as at an epoch's end after a validation."""
    kept.save(small_state(21), facts(20, 0.5))


def fall_back(kept: CheckpointStore) -> None:
    kept.load_latest(lock_holder=True)


def rewind(kept: CheckpointStore) -> None:
    kept.set_aside_after(10, kept.directory / "aside")


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    with path.open("r+b") as file:
        file.write(data)


SCENARIOS: dict[str, tuple[Callable[[CheckpointStore], None], set[int]]] = {
    "save": (save, {20, 30}),
    "save_without_links": (save_without_links, {20, 30}),
    "save_again": (save_again, {20}),
    "fall_back": (fall_back, {10}),
    "rewind": (rewind, {10, 20}),
}


class Shim:
    """Counts the calls that change files; at the `at`-th, what `happens`: "kill", "half" (of a write) or an errno."""

    def __init__(self, at: int, happens: str | int) -> None:
        self.at, self.happens, self.calls = at, happens, []

    @contextmanager
    def installed(self) -> Iterator[None]:
        before = {name: getattr(os, name) for name in (*CALLS, "fdopen")}
        self.install()
        try:
            yield
        finally:
            for name, call in before.items():
                setattr(os, name, call)

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self.counted(name, getattr(os, name)))
        shim = self

        class Counted(io.FileIO):
            def write(self, data: Any) -> int:
                shim.point("write", lambda: io.FileIO.write(self, data[: len(data) // 2]))
                return super().write(data)

        os.fdopen = lambda descriptor, mode: io.BufferedRandom(Counted(descriptor, "r+"))  # type: ignore[assignment]

    def counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.point(name, lambda: None)
            return call(*arguments, **options)

        return counted

    def point(self, name: str, half: Callable[[], Any]) -> None:
        self.calls.append(name)
        if len(self.calls) != self.at:
            return
        if isinstance(self.happens, int):
            raise OSError(self.happens, os.strerror(self.happens))
        if self.happens == "half":
            half()
        os._exit(KILLED)


def ended(scenario: str, kept: CheckpointStore, shim: Shim) -> int:
    """Runs the scenario under the shim and says how it ended."""
    with shim.installed():
        try:
            SCENARIOS[scenario][0](kept)
        except CheckpointSaveError:
            return SAID
        except BaseException:  # noqa: BLE001 - a fork must never go on as its parent
            traceback.print_exc()
            return 1
    return DONE


def ended_in_a_fork(scenario: str, kept: CheckpointStore, shim: Shim) -> int:
    pid = os.fork()
    if not pid:
        os._exit(ended(scenario, kept, shim))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def check(scenario: str, kept: CheckpointStore, code: int, happens: str | int) -> None:
    """What must hold wherever the process ended."""
    assert code == KILLED if isinstance(happens, str) else code in (SAID, DONE), f"ended with {code}"
    fresh = CheckpointStore(kept.directory, monitor="val/loss")
    whole = [one.step for one in fresh.checkpoints() if manifest.diagnose(one.path) == ""]
    before = names(kept.directory)
    checkpoint, state, lines = fresh.load_latest(lock_holder=False)
    assert checkpoint.step == max(whole), "the newest whole one"
    assert checkpoint.step in SCENARIOS[scenario][1]
    assert float(state["state_dict"]["weight"][0, 0]) in (checkpoint.step, checkpoint.step + 1), "its own tensors"
    assert scenario == "fall_back" or lines == [], "nothing damaged under a final name"
    assert names(kept.directory) == before, "a look changes nothing"
    for pointer in ("last.ckpt", "best.ckpt") if scenario.startswith("save") else ():
        assert manifest.diagnose(kept.directory / pointer) == "", pointer
    if isinstance(happens, int) and code == DONE and scenario == "save":
        assert checkpoint.step == 30, "a save that says nothing has saved"
    fresh.sweep()
    assert not [name for name in names(kept.directory) if ".tmp-" in name], "no temp is left"
    assert {name: (kept.directory / name).read_text() for name in OTHERS} == OTHERS, "other people's files"
    fresh.load_latest(lock_holder=True)
    assert fresh.save(small_state(40), facts(40, 9.0)).step == 40, "the run goes on"
    assert manifest.verify(kept.directory / "last.ckpt")["step"] == 40


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def points(scenario: str) -> Iterator[tuple[int, str, str | int]]:
    """(k, name of the call, what happens there) for each call of an undisturbed run."""
    with tempfile.TemporaryDirectory() as folder:
        shim = Shim(0, "kill")
        assert ended(scenario, start(scenario, Path(folder)), shim) == DONE
    for at, name in enumerate(shim.calls, 1):
        yield at, name, "kill"
        if name == "write":
            yield at, name, "half"
        for code in (errno.ENOSPC, errno.EACCES, errno.EIO):
            yield at, name, code


def start(scenario: str, directory: Path) -> CheckpointStore:
    link = os.link
    if scenario == "save_without_links":
        os.link = refuse
    kept = prepared(directory)
    os.link = link
    if scenario == "fall_back":
        damage(kept.path(20))
    return kept


def enumerate_points(scenario: str, folder: Path) -> dict[str, Any]:
    counts: dict[str, int] = {}
    failures = []
    for at, name, happens in points(scenario):
        directory = folder / "checkpoints"
        kept = start(scenario, directory)
        run = ended_in_a_fork if isinstance(happens, str) else ended
        code = run(scenario, kept, Shim(at, happens))
        try:
            check(scenario, kept, code, happens)
        except Exception:  # noqa: BLE001 - every point is looked at, then all failures are shown
            failures.append(f"{name}, call {at}, {happens}: {traceback.format_exc(limit=-1)}")
        shutil.rmtree(directory)
        kind = "killed" if isinstance(happens, str) else "failed"
        counts[kind] = counts.get(kind, 0) + 1
        counts[name] = counts.get(name, 0) + (happens == "kill")
    return {"counts": counts, "failures": failures}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, tmp_path_factory.mktemp("crash")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_wherever_a_process_dies_or_a_call_fails_a_checkpoint_is_left(results: dict[str, Any], scenario: str) -> None:
    counts, failures = results[scenario]["counts"], results[scenario]["failures"]
    print(f"{scenario}: {counts}")
    assert not failures, "\n".join(failures)
    assert counts["replace"] >= 1
    if scenario.startswith("save"):
        link = "symlink" if scenario == "save_without_links" else "link"
        assert {"open", "write", "fsync", "replace", link, "unlink"} <= counts.keys()
        assert counts["killed"] > 20


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.fsync = lambda _: None  # counted, but not done: what a dead process wrote, the next one sees
    folder = Path(sys.argv[1])
    print(json.dumps({scenario: enumerate_points(scenario, folder) for scenario in SCENARIOS}))
