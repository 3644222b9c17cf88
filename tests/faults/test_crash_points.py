"""Kills a process at each call that changes a file, one call after the other, and looks at what is
left.

The work is done by this file run as a program: each point is a fork of it that ends itself with
os._exit, as kill -9 would, before the k-th call (and, for a write, after half of its bytes); or
whose k-th call fails, or writes less than it was given. All points are enumerated; of a whole
training every sixth, and all of them in the slow test.
"""

import contextlib
import csv
import errno
import itertools
import json
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoint_files import facts, names, small_state
from support.file_calls import Call, watched
from support.forked import Program
from support.limits import LONGER_SECS

from savepoint import record, run
from savepoint.checkpoint import manifest
from savepoint.checkpoint.store import CheckpointStore
from savepoint.errors import SavepointError

OTHERS = {"model.ckpt": "mine", "step-00000030.ckpt.tmp": "mine too", ".notes": "and mine"}
KILLED, SAID, DONE = 9, 3, 0
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EIO, errno.EROFS, errno.EINTR)
# The others are met by "save", and by all in the slow test; there each call meets all of them.
THREE = (errno.ENOSPC, errno.EIO, errno.EROFS)
LASTING = ("short", errno.EROFS)  # from the k-th call on: such a file system stays as it is


@dataclass
class Fault:
    """Counts the calls; at the `at`-th, what `happens`: "kill", "half" or "short" (of a write), or
    an errno.
    """

    at: int
    happens: str | int
    calls: list[str] = field(default_factory=list)
    number: Iterator[int] = field(default_factory=partial(itertools.count, 1))

    def __call__(self, call: Call) -> Any:
        self.calls.append(call.name)
        now = next(self.number)  # one step: the writer's thread and the training count together
        if now != self.at and not (now > self.at and self.happens in LASTING):
            return call.go()
        if isinstance(self.happens, int):
            raise OSError(self.happens, os.strerror(self.happens))
        if self.happens == "short":
            return call.half() if call.size > 1 else call.go()
        if self.happens == "half":
            call.half()
        os._exit(KILLED)


@dataclass(frozen=True)
class Ended:
    """How a scenario ended, and what it printed."""

    code: int
    said: str


@dataclass(frozen=True)
class Scenario:
    """What is there before, what is done under the fault, and what must hold after it.

    Attributes:
        every: of its points, each so many-th is looked at.
        errors: what a call can fail with.
        in_turn: whether each call fails with one of them, the next call with the next.
        forks: whether a point that does not kill needs a process of its own too.
    """

    prepare: Callable[[Path], None]
    work: Callable[[Path], None]
    check: Callable[[Path, Ended], None]
    every: int = 1
    errors: tuple[int, ...] = THREE
    in_turn: bool = False
    forks: bool = False


# -- a store -------------------------------------------------------------------------------------


def opened(directory: Path) -> CheckpointStore:
    return CheckpointStore(directory, monitor="val/loss")


def prepared(directory: Path) -> None:
    """Step 10 is the best, step 20 the newest; files of other people beside them."""
    for step, score in ((10, 1.0), (20, 2.0)):
        opened(directory).add(small_state(step), facts(step, score))
    for name, text in OTHERS.items():
        (directory / name).write_text(text)


def prepared_without_links(directory: Path) -> None:
    without_links(prepared)(directory)


def prepared_damaged(directory: Path) -> None:
    prepared(directory)
    with opened(directory).path(20).open("r+b") as file:
        file.seek(1500)
        byte = file.read(1)
        file.seek(1500)
        file.write(bytes([byte[0] ^ 1]))


def without_links(work: Callable[[Path], None]) -> Callable[[Path], None]:
    """`last` and `best` are symlinks: they must show the new checkpoint before what they showed
    goes.
    """

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, "links are not permitted")

    def worked(directory: Path) -> None:
        link, os.link = os.link, refuse
        try:
            work(directory)
        finally:
            os.link = link

    return worked


def save(directory: Path) -> None:
    """The newest and the best in one: both that were there go. Its large tensor is written in
    pieces.
    """
    opened(directory).add(
        small_state(30) | {"large": [torch.ones(5000)] + [torch.ones(3000)] * 2}, facts(30, 0.5)
    )


def save_again(directory: Path) -> None:
    """The newest once more, over itself, as at an epoch's end after a validation."""
    opened(directory).add(small_state(21), facts(20, 0.5))


def save_behind(directory: Path) -> None:
    """Twice in a thread, as the callback does it, with deletions behind each: what fails is said,
    the next is made.
    """
    from savepoint.checkpoint.io import CheckpointIO

    io, failures = CheckpointIO(async_save=True), []
    io.store = opened(directory)
    for step, score in ((30, 0.5), (40, 3.0)):
        try:
            io.save_checkpoint(
                small_state(step) | {"manifest": facts(step, score)}, io.store.path(step)
            )
            io.submit(io.store.commit)
            io.wait()
        except OSError as error:
            failures.append(error)
    io.teardown()
    if failures:
        raise failures[0]


def fall_back(directory: Path) -> None:
    opened(directory).load_latest(lock_holder=True)


def rewind(directory: Path) -> None:
    opened(directory).set_aside_after(10, directory / "aside")


def check_store(
    steps: set[int],
    done: int,
    value: int | None = None,
    *,
    points: bool = True,
    damaged: bool = False,
) -> Callable[[Path, Ended], None]:
    """What must hold wherever the process ended.

    Args:
        steps: of which the newest whole checkpoint may be.
        done: what it is if nothing was said, and `value` what its tensors were made of.
        points: whether `last` and `best` show whole files at all times.
    """

    def check(directory: Path, ended: Ended) -> None:
        for pointer in ("last.ckpt", "best.ckpt") if points else ():
            assert manifest.diagnose(directory / pointer) == "", pointer
        fresh = opened(directory)
        fresh.sweep()
        assert not [name for name in names(directory) if ".tmp-" in name], "no temp is left"
        whole = [one.step for one in fresh.checkpoints() if manifest.diagnose(one.path) == ""]
        checkpoint, state, lines = fresh.load_latest(lock_holder=True)
        assert checkpoint.step == max(whole), "the newest whole one"
        assert checkpoint.step in steps
        content = float(state["state_dict"]["weight"][0, 0])
        assert content in (checkpoint.step, checkpoint.step + 1), "its own tensors"
        assert damaged or lines == [], "nothing damaged under a final name"
        if ended.code == DONE:
            assert (checkpoint.step, content) == (done, value or done), (
                "what says nothing has done its work"
            )
        assert {name: (directory / name).read_text() for name in OTHERS} == OTHERS, (
            "other people's files"
        )
        assert fresh.add(small_state(50), facts(50, 9.0)).step == 50, "the run goes on"
        assert manifest.verify(directory / "last.ckpt")["step"] == 50

    return check


# -- a run's record ------------------------------------------------------------------------------

CONFIGS = ["config: 1\n", "config: 2\n"]


def begun(directory: Path) -> None:
    directory.mkdir()
    held = run.Run.open(directory)
    held.record_start(held.record, CONFIGS[0])
    held.unlock()


def begin_again(directory: Path) -> None:
    held = run.Run.open(directory)
    try:
        held.record_start(held.record, CONFIGS[1])
        held.write_resume_command("python resume.py")
        held.write_summary({"steps": 1})
    finally:
        held.unlock()


def check_record(directory: Path, ended: Ended) -> None:
    held = run.Run.open(directory)
    assert not [name for name in names(directory) if name.endswith(".tmp")], "no temp is left"
    assert 1 <= len(held.record["starts"]) <= 2
    assert (directory / "config.yaml").read_text() in CONFIGS
    for name, text in (
        ("RESUME.txt", "python resume.py\n"),
        ("summary.json", '{\n  "steps": 1\n}\n'),
    ):
        assert not (directory / name).exists() or (directory / name).read_text() == text, (
            "whole or not there"
        )
    if ended.code == DONE:
        assert names(directory) == ["config.yaml", "lock", "run.json", "summary.json"]
    held.record_start(held.record, CONFIGS[1])
    held.unlock()


# -- a whole training ----------------------------------------------------------------------------


def made(directory: Path) -> None:
    directory.mkdir()
    for name, text in OTHERS.items():
        (directory / name).write_text(text)


def train(
    directory: Path, async_save: bool = False, ckpt_path: Path | None = None, keep_rows: int = 0
) -> None:
    """Three saves, one of them within an epoch; the last one deletes the two before it."""
    from support.small import fit

    from savepoint.checkpoint.callback import CheckpointCallback

    saving = CheckpointCallback(
        mode="min", monitor="val/loss", save_every_steps=4, keep_last=1, async_save=async_save
    )
    short = {"max_epochs": 2, "limit_train_batches": 3}
    fit(directory, checkpointing=saving, ckpt_path=ckpt_path, keep_rows=keep_rows, **short)
    if saving.saver.failure:
        raise saving.saver.failure


def train_behind(directory: Path) -> None:
    train(directory, async_save=True)


def rows(directory: Path) -> list[dict[str, str]]:
    """The whole lines of metrics.csv, without the clock and what was not logged."""
    path = directory / "metrics.csv"
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1].splitlines()
    return [
        {k: v for k, v in row.items() if v and not k.startswith("time/")}
        for row in csv.DictReader(whole)
    ]


class CheckTraining:
    """Beside the straight run. A point's run goes on from what it left, at each `resumes`-th point."""

    def __init__(self, resumes: int) -> None:
        self.resumes, self.points, self.resumed, self.straight = resumes, 0, 0, Path()

    def __call__(self, directory: Path, ended: Ended) -> None:
        run.Run.open(directory).unlock()
        kept = CheckpointStore(directory / "checkpoints")
        kept.sweep()
        assert not [path for path in directory.rglob("*.tmp*") if path.name not in OTHERS], (
            "no temp is left"
        )
        assert {name: (directory / name).read_text() for name in OTHERS} == OTHERS, (
            "other people's files"
        )
        reported = [
            int(line.split("saved step-")[1][:8])
            for line in ended.said.splitlines()
            if ": saved step-" in line
        ]
        latest = kept.latest()
        if latest is None:
            assert not reported, "a save that was reported is there"
            assert ended.code != DONE, "a run that says nothing has saved"
            return
        checkpoint, state, lines = kept.load_latest(lock_holder=True)
        assert checkpoint.step == latest.step >= max(reported, default=0), (
            "the newest that was reported, or newer"
        )
        assert lines == [], "nothing damaged under a final name"
        assert ended.code != DONE or checkpoint.step == 6, (
            "a run that says nothing has saved its end"
        )
        assert (
            rows(directory)[: state["logged_rows"]] == rows(self.straight)[: state["logged_rows"]]
        ), "no gap"
        assert len(rows(directory)) >= state["logged_rows"]
        self.points += 1
        if self.points % self.resumes == 0 and checkpoint.manifest["ended"] is None:
            self.resume(directory, checkpoint.path, state["logged_rows"])

    def resume(self, directory: Path, path: Path, keep_rows: int) -> None:
        from support.small import difference, final_state

        assert in_a_fork(lambda: train(directory, False, path, keep_rows)) == DONE
        assert list(difference(final_state(self.straight), final_state(directory))) == []
        assert rows(directory) == rows(self.straight)
        self.resumed += 1


# -- the program ---------------------------------------------------------------------------------

STORE = {
    "save": Scenario(prepared, save, check_store({20, 30}, 30), errors=ERRORS),
    "save without links": Scenario(
        prepared_without_links, without_links(save), check_store({20, 30}, 30), in_turn=True
    ),
    "save again": Scenario(prepared, save_again, check_store({20}, 20, 21), in_turn=True),
    "fall back": Scenario(
        prepared_damaged, fall_back, check_store({10}, 10, points=False, damaged=True)
    ),
    "rewind": Scenario(prepared, rewind, check_store({10, 20}, 10, points=False)),
    "record": Scenario(begun, begin_again, check_record, in_turn=True),
}
LIGHTNING = {
    "save behind": Scenario(prepared, save_behind, check_store({20, 30, 40}, 40), in_turn=True),
    "train": Scenario(made, train, CheckTraining(3), every=6, errors=(errno.ENOSPC,), forks=True),
}
WHOLE = {
    "train": Scenario(made, train, CheckTraining(1), errors=ERRORS, forks=True),
    "train behind": Scenario(
        made, train_behind, CheckTraining(5), errors=(errno.ENOSPC, errno.EIO), forks=True
    ),
}
ALL = {
    name: replace(scenario, errors=ERRORS, in_turn=False)
    for name, scenario in (STORE | LIGHTNING).items()
} | WHOLE
PROGRAMS = {"store": STORE, "lightning": LIGHTNING, "all": ALL}


def ended(scenario: Scenario, directory: Path, fault: Fault, said: Path) -> int:
    """Runs the scenario under the fault and says how it ended; what it prints goes to `said`."""
    with said.open("w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            with watched(directory, fault):
                scenario.work(directory)
        except SavepointError as error:
            print(error)
            return SAID
        except Exception:  # noqa: BLE001 - a failure of this point
            traceback.print_exc()
            return 1
    return DONE


def in_a_fork(work: Callable[[], int | None]) -> int:
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        code = work() or DONE
    finally:  # a fork must never go on as its parent
        os._exit(code)


def points(scenario: Scenario, calls: list[str]) -> Iterator[tuple[int, str, str | int]]:
    """(k, name of the call, what happens there) for the calls of an undisturbed run."""
    for at, name in enumerate(calls, 1):
        if at % scenario.every == 0:
            yield at, name, "kill"
            if name == "write":
                yield at, name, "half"
                yield at, name, "short"
            turn = at % len(scenario.errors)
            errors = scenario.errors[turn : turn + 1] if scenario.in_turn else scenario.errors
            yield from ((at, name, code) for code in errors)


def enumerate_points(scenario: Scenario, folder: Path) -> dict[str, Any]:
    straight, directory, said, seen = (
        folder / name for name in ("straight", "run", "said.txt", "calls.json")
    )
    if isinstance(scenario.check, CheckTraining):
        scenario.check.straight = straight
    scenario.prepare(straight)
    assert in_a_fork(lambda: undisturbed(scenario, straight, said, seen)) == DONE, said.read_text()
    counts = {"killed": 0, "failed": 0, "short": 0}
    failures = []
    for at, name, happens in points(scenario, json.loads(seen.read_text())):
        scenario.prepare(directory)
        fault, dies = Fault(at, happens), happens in ("kill", "half")
        go = partial(ended, scenario, directory, fault, said)
        code = in_a_fork(go) if dies or scenario.forks else go()
        try:
            expected = [KILLED] if dies else [DONE] if happens == "short" else [SAID, DONE]
            assert code in expected, f"ended with {code}"
            scenario.check(directory, Ended(code, said.read_text()))
        except Exception:  # noqa: BLE001 - every point is looked at, then all failures are shown
            what = errno.errorcode[happens] if isinstance(happens, int) else happens
            failures.append(
                f"{name}, call {at}, {what}: "
                f"{traceback.format_exc(limit=-1)}{said.read_text()[-900:]}"
            )
        shutil.rmtree(directory)
        counts["killed" if dies else "short" if happens == "short" else "failed"] += 1
        counts[name] = counts.get(name, 0) + (happens == "kill")
    shutil.rmtree(straight)
    if isinstance(scenario.check, CheckTraining):
        counts["resumed"] = scenario.check.resumed
    return {"counts": counts, "failures": failures}


def undisturbed(scenario: Scenario, directory: Path, said: Path, seen: Path) -> int:
    fault = Fault(0, "kill")
    code = ended(scenario, directory, fault, said)
    seen.write_text(json.dumps(fault.calls))
    return code


def results(program: str, folder: Path) -> dict[str, Any]:
    command = ["tests/faults/test_crash_points.py", program, str(folder)]
    with Program(command, folder / "log") as process:
        assert process.wait(LONGER_SECS) == 0, process.said
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    for name, result in found.items():
        print(f"{name}: {result['counts']}, {len(result['failures'])} wrong")
    return found


@pytest.mark.parametrize(
    "program", ["store", "lightning", pytest.param("all", marks=pytest.mark.slow)]
)
def test_wherever_a_process_dies_or_a_call_fails_a_checkpoint_is_left(
    program: str, tmp_path: Path
) -> None:
    found = results(program, tmp_path)
    failures = [f"{name}: {text}" for name, result in found.items() for text in result["failures"]]
    assert not failures, f"{len(failures)} points, the first of them\n" + "\n".join(failures[:3])
    for name, result in found.items():
        counts = result["counts"]
        assert counts["killed"] > 3
        assert counts["failed"] > 10
        assert counts.get("resumed", 1) > 0
        if name.startswith("save"):
            link = "symlink" if name == "save without links" else "link"
            assert {"open", "write", "fsync", "replace", link, "unlink"} <= counts.keys()
            assert counts["killed"] > 15
            assert counts["short"]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1] != "store":
        from support import small  # noqa: F401 - once, not in each fork
    record.git = lambda: None  # two processes a start
    os.fsync = lambda _: None  # counted, but not done: what a dead process wrote, the next one sees
    folder = Path(sys.argv[2])
    found = {
        name: enumerate_points(scenario, folder) for name, scenario in PROGRAMS[sys.argv[1]].items()
    }
    (folder / "found.json").write_text(json.dumps(found))
