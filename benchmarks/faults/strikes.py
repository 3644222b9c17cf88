"""Real trainings through real faults, two systems by the same program: what drill.py and
tests/faults/test_kills.py share.

runs.py says what the two systems are. Each fault strikes a run so many times at moments from a
seed, starts it again by the same command and counts what that cost. A failed automatic resume is
mended as a person would (`Run.mend`), and the run goes on. A run that comes to its end is compared
with one that nothing disturbed.
"""

import contextlib
import multiprocessing
import random
import shutil
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults import damage
from faults.runs import SYSTEMS, HarnessError, Run, Start, Task

# What the process that a signal met is to end with; 0: it saves and goes on.
EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129, signal.SIGUSR1: 0}
AT_START = 1 / 6  # so many of the kills strike while a training starts
IN_A_ROW = 3  # so many failed resumes in a row, each mended, and the harness gives up


@dataclass
class Tally:
    """What was counted over the faults of one kind on one system."""

    times: int = 0
    # Steps that had to be trained again, for each restart.
    lost: list[int] = field(default_factory=list)
    # Faults after which a file under a final name is damaged, or holds the weights of two steps.
    damaged: int = 0
    # Faults after which no checkpoint is whole, although one had been written.
    nothing_left: int = 0
    failed: int = 0  # automatic resumes that stopped
    # Resumes that trained on from damaged bytes, or from an older file without a word.
    silent: int = 0
    temps: int = 0  # temp files that outlived a restart
    unsaved: int = 0  # signals that cost steps
    # Signals after which the process ended with another code than `EXIT_CODES` has.
    wrong_codes: int = 0
    codes: Counter[int] = field(default_factory=Counter)  # of the processes that met the fault
    restart_secs: list[float] = field(default_factory=list)  # from a restart to its first step done
    ends: int = 0  # runs that came to their end
    identical: int = 0  # of these, those that ended like the one that nothing disturbed

    def count(self, run: Run, start: Start) -> None:
        """A start that is over: what it trained again, how long it took to train at all."""
        if not (steps := start.steps()):
            return
        if run.starts > 1:
            self.lost.append(run.trained - (steps[0][0] - 1))
            self.restart_secs.append(steps[0][1] - start.begun)
        run.trained = steps[-1][0]

    def look(self, run: Run) -> str:
        """After a fault: what it has damaged, in words."""
        whole, damaged = run.whole_and_damaged()
        self.nothing_left += not whole and run.trained > 1
        # One that an earlier fault has damaged, and that nothing has written since, counts once.
        new = {(path, path.stat().st_mtime_ns): reason for path, reason in damaged.items()}
        new = {key: reason for key, reason in new.items() if key not in run.known_damage}
        run.known_damage |= new.keys()
        self.damaged += bool(new)
        if not new:
            return "nothing damaged"
        return "DAMAGED: " + "; ".join(
            f"{path.name} ({reason[:60]})" for (path, _), reason in new.items()
        )

    def compare(self, run: Run, expected: str) -> str:
        """A run that came to its end, in words."""
        self.ends += 1
        self.identical += (same := run.digest() == expected)
        return "ends identical" if same else "ends DIFFERENT"

    def finish(self, run: Run, code: int, expected: str) -> str:
        """Starts a run that ended with `code` again until it comes to its end."""
        failures = 0
        while code != 0:
            start = run.start()
            code = start.end()
            self.count(run, start)
            failures += code != 0
            if code != 0:
                self.mend(run, start, failures)
        return self.compare(run, expected)

    def mend(self, run: Run, start: Start, failures: int) -> None:
        self.failed += 1
        if failures == IN_A_ROW:
            raise HarnessError(
                f"{run.system}: {failures} resumes in a row failed. The last "
                f"said:\n{start.said[-2000:]}"
            )
        run.mend()


# -- the faults ----------------------------------------------------------------------------------


def undisturbed(system: str, work: Path, task: Task) -> str:
    """The digest of what a run ends with that nothing disturbs."""
    run = Run(system, task, work / "undisturbed", work / "tmp")
    start = run.start()
    if (code := start.end()) != 0:
        raise HarnessError(
            f"{system}: a run that nothing disturbed ended with {code}:\n{start.said[-2000:]}"
        )
    return run.digest()


def kills(
    system: str, work: Path, task: Task, tmp: Path, times: int, seed: int, expected: str
) -> Tally:
    """SIGKILL at a random moment, up to half a second after the first save of a start; some strike
    while it starts.

    A run that comes to its end is followed by a new one; after the last kill the run goes to its
    end.
    """
    dice = random.Random(seed)
    tally = Tally()
    number = 0
    run: Run | None = None
    while run or tally.times < times:
        if run is None:
            number = number + 1
            failures = 0
            before = set[Path]()
            run = Run(system, task, work / f"killed-{number}", tmp)
        start = run.start()
        if tally.times < times:
            _strike(start, dice)
        code = start.end()
        steps = [step for step, _ in start.steps()]
        tally.count(run, start)
        if steps:  # what lay about has met a restart
            tally.temps += _sweep(before & run.temps())
            failures = 0
        if code == -signal.SIGKILL:
            tally.times += 1
            found = tally.look(run)
            before |= run.temps()
            when = f"after steps {steps[0]} to {steps[-1]}" if steps else "while it starts"
            _say(system, f"kill {tally.times:>2} of {times}, {when}: {found}")
        elif code == 0:
            tally.temps += _sweep(run.temps())
            _say(system, f"left alone it {tally.compare(run, expected)}, at step {run.trained}")
            run = None
        else:
            failures += 1
            tally.mend(run, start, failures)
            _say(system, f"the resume stops with exit code {code}; mended by hand")
    return tally


def _strike(start: Start, dice: random.Random) -> None:
    if dice.random() < AT_START:
        start.wait(dice.uniform(0, 1))
    elif start.reach(2):  # then the save after its first step is done
        start.wait(dice.uniform(0, 0.5))
    start.send(signal.SIGKILL)


def rot(
    system: str, work: Path, task: Task, kind: str, times: int, seed: int, expected: str
) -> Tally:
    """Damages the newest checkpoint of a run that was killed, and starts it again."""
    dice = random.Random(f"{seed} {kind}")
    tally = Tally()
    run = Run(system, task, work / "rotten", work / "tmp")
    aside = work / "aside"
    start = run.start()
    start.reach(task.steps * 2 // 3)
    start.send(signal.SIGKILL)
    start.end()
    run.directory.rename(aside)
    for _ in range(times):
        shutil.rmtree(run.directory, ignore_errors=True)
        subprocess.run(["cp", "-a", aside, run.directory], check=True)  # hard links stay hard links
        path, run.trained = run.newest()
        damage.KINDS[kind](path, dice)
        _say(
            system, f"{kind} in {path.name}, step {run.trained}: {_after_rot(run, tally, expected)}"
        )
    return tally


def _after_rot(run: Run, tally: Tally, expected: str) -> str:
    """Starts a run whose newest checkpoint is damaged; what comes of it, in words."""
    damaged_step = run.trained
    start = run.start()
    code = start.end()
    tally.times += 1
    tally.codes[code] += 1
    tally.count(run, start)
    if code != 0:
        tally.failed += 1
        return f"the resume stops with exit code {code}"
    from_step = start.steps()[0][0] - 1
    said = "does not verify" in start.said
    tally.silent += from_step == damaged_step or not said
    where = "trains on from it" if from_step == damaged_step else f"goes on from step {from_step}"
    return f"{'says so' if said else 'not a word'}, {where}, {tally.compare(run, expected)}"


def full_disk(
    system: str, work: Path, task: Task, tmp: Path | None, times: int, seed: int, expected: str
) -> Tally:
    """Another program fills the disk for eight steps, and takes what is freed meanwhile. `tmp`:
    None lies on that disk.

    The disk is a tmpfs that is mounted here: the caller has seen to it that this is permitted and
    seen by no one else.
    """
    dice = random.Random(seed)
    tally = Tally()
    disk = work / "disk"
    disk.mkdir(parents=True)
    size = f"size={12 * task.megabytes:.0f}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "savepoint-drill", disk], check=True)
    try:
        for number in range(times):
            run = Run(system, task, disk / f"full-{number}", tmp or disk / "tmp")
            start = run.start()
            start.reach(task.batches + dice.randrange(task.batches // 2))
            at = run.trained = len(start.steps())
            with neighbour(disk / "neighbour"):
                start.reach(at + 8)
                found = tally.look(run)
            code = start.end()
            tally.times += 1
            tally.codes[code] += 1
            tally.count(run, start)
            if code == 0:  # it went on to its end, with what the failed saves did not save
                tally.lost.append(0)
            failed = start.said.count("Saving failed")
            what = (
                f"{failed} saves fail, it trains on"
                if code == 0
                else f"it stops with exit code {code}"
            )
            _say(system, f"full at step {at}: {what}, {found}, {tally.finish(run, code, expected)}")
            _sweep(run.temps())
            shutil.rmtree(run.directory)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
    return tally


@contextlib.contextmanager
def neighbour(path: Path) -> Iterator[None]:
    """Another program: it writes until the disk is full, keeps trying, and frees all at the end."""
    enough = threading.Event()

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            while not enough.wait(0.001):
                for block in (bytes(1 << 20), bytes(4096)):
                    with contextlib.suppress(OSError):
                        while file.write(block) == len(block) and not enough.is_set():
                            pass

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        enough.set()
        thread.join()
        path.unlink()


def signals(
    system: str,
    work: Path,
    task: Task,
    signum: signal.Signals,
    times: int,
    seed: int,
    expected: str,
) -> Tally:
    """A signal in the middle of the second epoch of a run that saves once an epoch; then the run is
    started again.
    """
    dice = random.Random(f"{seed} {signum}")
    tally = Tally()
    for number in range(times):
        run = Run(system, task, work / f"{signum.name}-{number}", work / "tmp")
        start = run.start()
        start.reach(task.batches + dice.randrange(task.batches // 4, task.batches // 2))
        at = len(start.steps())
        start.send(signum)
        saved = start.wait_until(run.has_saved_inside_an_epoch)
        code = start.end()
        tally.times += 1
        tally.codes[code] += 1
        tally.wrong_codes += code != EXIT_CODES[signum]
        tally.count(run, start)
        found = tally.look(run)
        if went_on := run.trained == task.steps:
            tally.lost.append(0 if saved else at % task.batches)
        end = tally.finish(run, 0 if went_on else 1, expected)
        lost = tally.lost[-1]
        tally.unsaved += lost > 0
        what = "dies of it" if code < 0 else f"leaves with exit code {code}"
        if went_on:
            what = "goes on"
        _say(system, f"{signum.name} at step {at}: {what}, {found}, {lost} steps lost, {end}")
    return tally


def _sweep(paths: set[Path]) -> int:
    """Temp files are counted once, and do not fill the disk."""
    for path in paths:
        path.unlink()
    return len(paths)


def _say(system: str, text: str) -> None:
    print(f"  {system:<9}  {text}", flush=True)


# -- two systems side by side --------------------------------------------------------------------


def workers() -> ProcessPoolExecutor:
    """Two processes that have imported everything, and fork each start of a training: a system
    each, at the same time.
    """
    pool = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), initializer=_import_all)
    list(pool.map(abs, range(2)))
    return pool


def _import_all() -> None:
    import torch
    import toy  # noqa: F401

    import project  # noqa: F401
    import savepoint.resume.go_on  # noqa: F401

    torch.set_num_threads(1)


def side_by_side(
    pool: ProcessPoolExecutor, fault: Callable[..., Any], work: Path, **arguments: Any
) -> dict[str, Any]:
    """`fault` on both systems at once, each in a folder of its own. An argument that is a dict has
    a value for each.
    """
    asked = {}
    for system in SYSTEMS:
        own = {
            key: value[system] if isinstance(value, dict) else value
            for key, value in arguments.items()
        }
        asked[system] = pool.submit(fault, system, work / system, **own)
    return {system: future.result() for system, future in asked.items()}
