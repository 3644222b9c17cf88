"""What is on disk before a save is reported: the log's rows, the file, its name; and deletions only
after that.

No power is cut here: these tests look at the order of the calls, in this process and, under strace,
as the kernel saw them. tests/faults/test_power_cut.py cuts it.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.checkpoint_files import facts, names, small_state
from support.file_calls import Call, watched
from support.programs import ROOT
from support.small import fit

from savepoint.checkpoint import manifest, store
from savepoint.checkpoint.callback import CheckpointCallback
from savepoint.checkpoint.io import CheckpointIO
from savepoint.checkpoint.store import CheckpointStore
from savepoint.run import Run

SAVED = re.compile(r"saved (step-\d+\.ckpt)")


@dataclass(frozen=True)
class Event:
    """A call that was made, or "said": `path` was reported as saved.

    Attributes:
        rows: Of the log at its fsync; of a checkpoint that gets its name, those that it counts.
    """

    name: str
    path: Path
    target: Path | None = None
    rows: int | None = None


class Events(list[Event]):
    """Also a stand-in for sys.stdout, which hears what the callback reports."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory

    @contextlib.contextmanager
    def seen(self) -> Iterator[None]:
        with watched(self.directory, self.see), contextlib.redirect_stdout(self):  # type: ignore[type-var]
            yield

    def see(self, call: Call) -> object:
        if (
            call.name == "fsync"
            and ".ckpt.tmp-" in call.path.name
            and call.path.stat().st_size > 1000
        ):
            assert manifest.diagnose(call.path) == "", "whole when it is synced"
        result = call.go()
        rows = None
        if call.name == "fsync" and call.path.name == "metrics.csv":
            rows = len(call.path.read_text().splitlines()) - 1
        if call.target and call.target.name.startswith("step-"):
            rows = store.load(call.target)[0].get("logged_rows")
        self.append(Event(call.name, call.path, call.target, rows))
        return result

    def write(self, text: str) -> None:
        for name in SAVED.findall(text):
            self.say(self.directory / "checkpoints" / name)

    def flush(self) -> None: ...

    def say(self, path: Path) -> None:
        self.append(Event("said", path))

    def places(
        self, name: str, path: Path, after: int = -1, before: int | None = None
    ) -> list[int]:
        """Where this was done to `path`; a rename is done to its new name."""
        between = enumerate(self[:before])
        return [
            i
            for i, one in between
            if i > after and one.name == name and path == (one.target or one.path)
        ]

    def check_written(self, named: int) -> None:
        """The bytes of what gets its name at `named` were on disk before."""
        temp = self[named].path
        assert (
            self.places("write", temp, before=named)[-1]
            < self.places("fsync", temp, before=named)[-1]
        )

    def check(self, path: Path, said: int) -> None:
        """`path`, reported at `said`, was on disk: its bytes before it got its name, and then its
        name.
        """
        named = self.places("replace", path, before=said)[-1]
        self.check_written(named)
        on_disk = self.places("fsync", path.parent, after=named, before=said)[0]
        gone = [
            i for i, one in enumerate(self) if one.name == "unlink" and one.path.suffix == ".ckpt"
        ]
        assert not [i for i in gone if named < i < on_disk], "nothing is deleted before"
        if path.name.startswith("step-"):
            last = self.places("replace", path.with_name("last.ckpt"), after=on_disk)[0]
            assert not [i for i in gone if on_disk < i < last], (
                "nor before what `last` shows is there"
            )

    def check_all(self) -> list[str]:
        for place, event in enumerate(self):
            if event.name == "said":
                self.check(event.path, place)
        return [event.path.name for event in self if event.name == "said"]


def by_the_store(directory: Path, events: Events) -> None:
    kept = CheckpointStore(directory / "checkpoints", monitor="val/loss")
    for step in (10, 20, 30):
        events.say(kept.add(small_state(), facts(step, 1.0)).path)


def by_the_plugin_in_a_thread(directory: Path, events: Events) -> None:
    io = CheckpointIO(async_save=True)
    io.store = kept = CheckpointStore(directory / "checkpoints", monitor="val/loss")
    for step in (10, 20, 30):
        io.save_checkpoint(small_state() | {"manifest": facts(step, 1.0)}, kept.path(step))
        io.submit(kept.commit)
        io.submit(lambda step=step: events.say(kept.path(step)))  # type: ignore[misc]
    io.teardown()


def by_the_callback(directory: Path, events: Events, *, async_save: bool = False) -> None:
    fit(
        directory,
        checkpointing=CheckpointCallback(
            mode="min", monitor="val/loss", keep_last=1, async_save=async_save
        ),
    )


def by_the_callback_in_a_thread(directory: Path, events: Events) -> None:
    by_the_callback(directory, events, async_save=True)


def by_a_user(directory: Path, events: Events) -> None:
    trainer = fit(directory, max_epochs=1)
    for name in ("mine.ckpt", "mine.ckpt", "new/deeper/mine.ckpt"):
        trainer.save_checkpoint(directory / name)
        events.say(directory / name)


WAYS: dict[Callable[[Path, Events], None], int] = {
    by_the_store: 3,
    by_the_plugin_in_a_thread: 3,
    by_the_callback: 3,
    by_the_callback_in_a_thread: 3,
    by_a_user: 4,
}


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: way.__name__)
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Events, int]:
    directory = tmp_path_factory.mktemp("run")
    events = Events(directory)
    with events.seen():
        request.param(directory, events)
    return events, WAYS[request.param]


def test_a_file_and_its_name_are_on_disk_before_a_save_is_reported(
    saved: tuple[Events, int],
) -> None:
    events, number = saved
    said = events.check_all()
    assert len(said) == number, said


def test_a_new_directory_is_on_disk_before_a_save_in_it_is_reported(
    saved: tuple[Events, int],
) -> None:
    events, _ = saved
    for place, event in enumerate(events):
        if event.name == "mkdir":
            said = next(i for i, one in enumerate(events) if i > place and one.name == "said")
            assert events.places("fsync", event.path.parent, after=place, before=said), event.path


def test_the_log_is_on_disk_before_the_checkpoint_that_counts_its_rows(
    saved: tuple[Events, int],
) -> None:
    events, _ = saved
    rows = [0]
    for event in events:
        if event.name == "fsync" and event.rows is not None:
            rows.append(event.rows)
        elif event.name == "replace" and event.rows is not None:
            assert max(rows) >= event.rows > 0, event.target


def test_the_name_of_the_log_is_on_disk_before_the_checkpoint_that_counts_its_rows(
    saved: tuple[Events, int],
) -> None:
    events, _ = saved
    for place in events.places("replace", events.directory / "metrics.csv"):
        events.check_written(place)
        counting = next(
            i
            for i, one in enumerate(events)
            if i > place and one.name == "replace" and one.rows is not None
        )
        assert events.places("fsync", events.directory, after=place, before=counting)


def test_a_record_is_on_disk_before_it_gets_its_name(tmp_path: Path) -> None:
    run, events = Run.open(tmp_path), Events(tmp_path)
    with events.seen():
        run.record_start(run.record, "config: 1\n")
        run.write_resume_command("python resume.py")
        run.write_summary({"steps": 1})
    run.unlock()
    for name in ("run.json", "config.yaml", "RESUME.txt", "summary.json"):
        (named,) = events.places("replace", tmp_path / name)
        events.check_written(named)


def older(pointer: Path) -> None:
    os.link(pointer.with_name("step-00000010.ckpt"), pointer)


def of_nothing(pointer: Path) -> None:
    pointer.symlink_to("step-00000005.ckpt")


def torn(pointer: Path) -> None:
    pointer.write_bytes(pointer.with_name("step-00000020.ckpt").read_bytes()[:2000])


@pytest.mark.parametrize("left", [lambda _: None, older, of_nothing, Path.touch, torn], ids=[
    "gone", "older", "of_nothing", "empty", "torn",
])  # fmt: skip
def test_pointers_need_not_be_durable_as_the_store_never_reads_them_and_the_next_save_mends_them(
    tmp_path: Path, left: Callable[[Path], object]
) -> None:
    kept = CheckpointStore(tmp_path, monitor="val/loss", retention=store.Retention(keep_last=3))
    for step, score in ((10, 3.0), (20, 1.0)):
        kept.add(small_state(step), facts(step, score))
    for name in ("last.ckpt", "best.ckpt"):
        (tmp_path / name).unlink()
        left(tmp_path / name)
    fresh = CheckpointStore(tmp_path, monitor="val/loss", retention=store.Retention(keep_last=3))
    assert (fresh.latest().step, fresh.best().step) == (20, 20)
    checkpoint, _, lines = fresh.load_latest(lock_holder=True)
    assert (checkpoint.step, lines) == (20, [])
    fresh.add(small_state(30), facts(30, 2.0))
    assert manifest.verify(tmp_path / "last.ckpt")["step"] == 30
    assert manifest.verify(tmp_path / "best.ckpt")["step"] == 20
    assert names(tmp_path) == [
        "best.ckpt",
        "last.ckpt",
        *(f"step-000000{step}.ckpt" for step in (10, 20, 30)),
    ]


# -- as the kernel sees it -----------------------------------------------------------------------

TRACED = "write,fsync,fdatasync,rename,renameat,renameat2,link,linkat,unlink,unlinkat"
STRACE = ["strace", "-f", "--seccomp-bpf"]  # stops the process at the traced calls alone
BEGIN = """
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
"""
STORE = """
from support.checkpoint_files import facts, small_state
from savepoint.checkpoint.store import CheckpointStore

kept = CheckpointStore(Path(sys.argv[2]) / "checkpoints")
for step in (10, 20, 30):
    print(f"saved {kept.add(small_state(), facts(step)).path.name}", flush=True)
"""
TRAINING = """
from support.small import fit

fit(Path(sys.argv[2]))
"""


def traced(directory: Path, program: str) -> Events:
    """The calls of a process of its own that runs a training."""
    log = directory.with_suffix(".strace")
    command = [
        *STRACE,
        "-y",
        "-qq",
        "-s",
        "300",
        "-e",
        "signal=none",
        "-e",
        f"trace={TRACED}",
        "-o",
        log,
    ]
    command += [sys.executable, "-W", "ignore", "-c", program, ROOT / "tests", directory]
    subprocess.run(
        command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    events = Events(directory)
    begun: dict[str, str] = {}
    for line in log.read_text(errors="replace").splitlines():
        process, rest = line.split(maxsplit=1)
        if rest.endswith("<unfinished ...>"):
            begun[process] = rest.removesuffix("<unfinished ...>")
        elif resumed := re.match(r"<\.\.\. \w+ resumed>(.*)", rest):
            take(events, begun.pop(process) + resumed[1])
        else:
            take(events, rest)
    return events


def take(events: Events, call: str) -> None:
    name, arguments = call.split("(", maxsplit=1)
    if " = -1 " in arguments:
        return
    if name == "write" and arguments.startswith("1<"):
        events.write(arguments)
        return
    by_descriptor = name in ("write", "fsync", "fdatasync")
    paths = re.findall(r"^\d+<([^>]*)>" if by_descriptor else r'"([^"]*)"', arguments)
    if paths and Path(paths[0]).is_relative_to(events.directory):
        plain = {"rename": "replace"}.get(short := name.removesuffix("2").removesuffix("at"), short)
        events.append(Event(plain, Path(paths[0]), Path(paths[1]) if paths[1:] else None))


def can_trace() -> bool:
    return (
        bool(shutil.which("strace"))
        and not subprocess.run([*STRACE, "true"], capture_output=True).returncode
    )


@pytest.mark.skipif(not can_trace(), reason="needs strace and the right to use it")
@pytest.mark.parametrize(
    "program", [STORE, pytest.param(TRAINING, marks=pytest.mark.slow)], ids=["store", "training"]
)
def test_the_kernel_sees_the_same_order_in_a_process_of_its_own(
    program: str, tmp_path: Path
) -> None:
    events = traced(tmp_path / "run", BEGIN + program)
    assert len(events.check_all()) == 3
    log = tmp_path / "run" / "metrics.csv"
    for event in (one for one in events if one.name == "said" and program == TRAINING):
        named = events.places("replace", event.path)[-1]
        begun = events.places("write", events[named].path)[0]
        assert (
            events.places("write", log, before=begun)[-1]
            < events.places("fsync", log, before=begun)[-1]
        )
