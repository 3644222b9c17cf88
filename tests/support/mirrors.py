"""Mirrors of runs that no training made: directories behind file://, and what can be done to them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from savepoint.checkpoint import manifest
from savepoint.errors import MirrorError
from savepoint.mirror import remote, uploader
from savepoint.mirror.settings import Mirroring
from savepoint.mirror.uploader import Uploader
from savepoint.run import Run
from support.checkpoint_files import facts, small_state
from support.limits import HANG_SECS
from support.run_dirs import store
from support.shards import write_halves


def wait_until(happened: Callable[[], object]) -> None:
    until = time.monotonic() + HANG_SECS
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.005)


def save(run_dir: Path, step: int, score: float | None = None) -> Path:
    """One more checkpoint of a run that `make_run` made."""
    made = {"run_id": Run(run_dir).id(), "created": f"2026-01-01T00:00:{step:02d}+00:00"}
    value = float(step) if score is None else score
    return store(run_dir).add(small_state(float(step)), facts(step, value, **made)).path


def save_parts(run_dir: Path, step: int, score: float | None = None, tag: str = "") -> Path:
    """The same, of two shards."""
    value = float(step) if score is None else score
    made = {"run_id": Run(run_dir).id(), "created": f"2026-01-01T00:00:{step:02d}+00:00"}
    path = store(run_dir).path(step)
    write_halves(path, step, value, value, tag, **made)
    store(run_dir).commit()
    return path


@contextmanager
def uploading(run_dir: Path, url: str, *, is_new: bool = False, **more: Any) -> Iterator[Uploader]:
    """An uploader that has begun; closed at the end."""
    named = {name: more.pop(name) for name in ("resumed", "rewinds") if name in more}
    run_id = Run(run_dir).id()
    assert run_id is not None
    made = Uploader(Mirroring(url, **more), run_dir, run_id, **named)
    try:
        made.begin(is_new=is_new)
        yield made
    finally:
        made.close()


def steps(cloud: Path, run: str = "first") -> list[int]:
    """Of the checkpoints in a mirror that is a directory, each of which must verify."""
    there = sorted((cloud / run / "checkpoints").glob("step-*.ckpt"))
    return [manifest.verify(path)["step"] for path in there]


class Outage:
    """While `on`, no server is reached."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.on = False
        self.asked = 0
        asking = remote.Remote._asking

        @contextmanager
        def meanwhile(one: remote.Remote, key: str) -> Iterator[None]:
            if self.on:
                self.asked += 1
                raise MirrorError("No access to the mirror: an outage.")
            with asking(one, key):
                yield

        patch.setattr(remote.Remote, "_asking", meanwhile)
        patch.setattr(uploader, "_FIRST_PAUSE_SECS", 0.01)
