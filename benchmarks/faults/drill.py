"""The faults that end runs, in front of you: savepoint and Lightning's ModelCheckpoint side by
side, one table at the end.

    make drill
    make drill ARGS="--full --seed 3"

Real processes are killed while they save, their newest checkpoint is damaged, their disk is filled
by another program, they are sent the signals of schedulers and terminals; then the same command is
given again. The moments come from the seed. runs.py says how the two systems are set up, strikes.py
what each fault does. The full disk is a small tmpfs in a mount namespace of its own; where that is
not permitted, its rows say so. Ends with 1 if anything of savepoint was damaged, did not resume,
was loaded although damaged, or ended other than the run that nothing disturbed.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from report import machine, table

from faults import damage, strikes
from faults.runs import SYSTEMS, HarnessError, Task
from faults.strikes import Tally

HEADER = (
    "fault",
    "system",
    "times",
    "lost steps",
    "damaged",
    "no resume",
    "silent",
    "temps",
    "exit",
    "restart",
    "same end",
)
LEGEND = """\
lost steps  to be trained again after a restart: median / most
damaged     faults that left a damaged file under a final name
no resume   automatic restarts that stopped with an error
silent      restarts that trained on from damaged bytes without a word
temps       temp files that outlived a restart
exit        code of the process that met the fault
restart     seconds from a restart to its first step, median, without the imports ({imports:.1f} s)
same end    runs that ended equal, bit for bit, to one that nothing disturbed"""


@dataclass(frozen=True)
class Rounds:
    """How often each fault strikes each system."""

    kills: int
    rot: int
    disk: int
    signals: int


SHORT = Rounds(kills=12, rot=2, disk=1, signals=2)
FULL = Rounds(kills=60, rot=10, disk=5, signals=15)


@dataclass
class Drill:
    """The faults that were, as rows of the table and as counts."""

    pool: ProcessPoolExecutor
    work: Path
    seed: int
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tallies: dict[str, list[Tally]] = field(
        default_factory=lambda: {system: [] for system in SYSTEMS}
    )
    number: int = 0

    def undisturbed(self, task: Task) -> dict[str, str]:
        print(
            f"\n(runs of {task.steps} steps, {task.megabytes} MB, that nothing disturbs: to "
            "compare with)",
            flush=True,
        )
        return self._both(strikes.undisturbed, task=task)

    def strike(self, label: str, text: str, fault: Callable[..., Tally], **arguments: Any) -> None:
        print(f"\n{text}", flush=True)
        found = self._both(fault, seed=self.seed, **arguments)
        for system in SYSTEMS:
            self.rows.append([label if system == SYSTEMS[0] else "", system, *cells(found[system])])
            self.tallies[system].append(found[system])

    def skip(self, label: str, text: str, needs: str) -> None:
        print(f"\n{text}\n  not run: needs {needs}", flush=True)
        self.rows.append([label, "not run", *["-"] * (len(HEADER) - 2)])
        self.notes.append(f"not run: {label} needs {needs}")

    def _both(self, fault: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
        self.number += 1
        return strikes.side_by_side(self.pool, fault, self.work / str(self.number), **arguments)


def cells(tally: Tally) -> list[str]:
    lost = f"{median(tally.lost):.0f} / {max(tally.lost)}" if tally.lost else "-"
    codes = ["killed" if code < 0 else str(code) for code in sorted(tally.codes)]
    restart = f"{median(tally.restart_secs):.1f} s" if tally.restart_secs else "-"
    ends = f"{tally.identical} of {tally.ends}" if tally.ends else "-"
    counts = map(str, (tally.damaged, tally.failed, tally.silent, tally.temps))
    return [str(tally.times), lost, *counts, ", ".join(codes) or "-", restart, ends]


def run_all(drill: Drill, rounds: Rounds, elsewhere: Path | None, may_mount: bool) -> None:
    kill(drill, rounds.kills, elsewhere)
    rot(drill, rounds.rot)
    fill(drill, rounds.disk, may_mount)
    send_signals(drill, rounds.signals)


def kill(drill: Drill, times: int, elsewhere: Path | None) -> None:
    task = Task(megabytes=24, epochs=3, batches=8)
    asked = {
        "fault": strikes.kills,
        "task": task,
        "times": times,
        "expected": drill.undisturbed(task),
    }
    saves = f"a save ({task.megabytes} MB after every step)"
    text = f"SIGKILL within half a second of {saves}, then the same command again"
    drill.strike("SIGKILL", text, tmp=_each(drill.work / "tmp"), **asked)
    label = "SIGKILL, other TMPDIR"
    text = "The same with TMPDIR on another file system, as on clusters and in containers"
    if elsewhere:
        drill.strike(label, text, tmp=_each(elsewhere), **asked)
    else:
        drill.skip(label, text, "a second file system with 100 MB free at /dev/shm")


def rot(drill: Drill, times: int) -> None:
    task = Task(megabytes=1, epochs=2, batches=16)
    expected = drill.undisturbed(task)
    for kind in damage.KINDS:
        text = f"Rot: {kind} in the checkpoint that the next start will take"
        drill.strike(
            f"rot: {kind}", text, strikes.rot, task=task, kind=kind, times=times, expected=expected
        )


def fill(drill: Drill, times: int, may_mount: bool) -> None:
    task = Task(megabytes=4, epochs=3, batches=16)
    text = "Another program fills the disk for eight steps, and takes what is freed"
    if not may_mount:
        drill.skip("full disk", text, "unshare and mount: root, or user namespaces")
        return
    asked = {
        "fault": strikes.full_disk,
        "task": task,
        "times": times,
        "expected": drill.undisturbed(task),
    }
    drill.strike("full disk", text, tmp=None, **asked)
    drill.strike(
        "full disk, other TMPDIR",
        "The same with TMPDIR elsewhere",
        tmp=_each(drill.work / "tmp"),
        **asked,
    )


def send_signals(drill: Drill, times: int) -> None:
    task = Task(megabytes=1, epochs=3, batches=60, save_every_steps=None)
    expected = drill.undisturbed(task)
    for signum in strikes.EXIT_CODES:
        text = f"{signum.name} in the middle of an epoch; saved once an epoch"
        drill.strike(
            signum.name,
            text,
            strikes.signals,
            task=task,
            signum=signum,
            times=times,
            expected=expected,
        )


def _each(folder: Path) -> dict[str, Path]:
    return {system: folder / system for system in SYSTEMS}


def verdict(system: str, found: list[Tally]) -> tuple[bool, str]:
    """Whether nothing went wrong, and one line on what did."""

    def total(name: str) -> int:
        return sum(getattr(tally, name) for tally in found)

    wrong = {
        "left damaged files": total("damaged"),
        "left no whole checkpoint": total("nothing_left"),
        "failed resumes": total("failed"),
        "silent loads of damaged bytes": total("silent"),
        "signals that cost steps": total("unsaved"),
        "exit codes that hide the signal": total("wrong_codes"),
        "temp files left": total("temps"),
        "ends that differ": total("ends") - total("identical"),
    }
    said = ", ".join(f"{number} {what}" for what, number in wrong.items() if number)
    fine = f"nothing damaged, every restart went on by itself, all {total('ends')} ends identical"
    return not said, f"{system}: {total('times')} faults, {said or fine}."


def enter_namespace() -> bool:
    """Starts this program anew where it may mount and nobody else sees it; False where that is not
    permitted.
    """
    if os.environ.get("DRILL_MAY_MOUNT"):
        return True
    unshare = (
        ["unshare", "--mount"]
        if os.geteuid() == 0
        else ["unshare", "--user", "--map-root-user", "--mount"]
    )
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(
                [*unshare, "mount", "-t", "tmpfs", "none", folder],
                check=True,
                stderr=subprocess.DEVNULL,
            )
        except (OSError, subprocess.CalledProcessError):
            return False
    os.environ["DRILL_MAY_MOUNT"] = "1"
    os.execvp(unshare[0], [*unshare, sys.executable, *sys.orig_argv[1:]])
    return False  # not reached


def second_file_system(work: Path, megabytes: int) -> Path | None:
    """A folder on another file system than `work`, where there is one with room."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK) or shared.stat().st_dev == work.stat().st_dev:
        return None
    room = shutil.disk_usage(shared).free >= megabytes * 1e6
    return Path(tempfile.mkdtemp(prefix="drill-", dir=shared)) if room else None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seed", type=int, default=None, help="of the moments; by default a new one each time"
    )
    parser.add_argument(
        "--full", action="store_true", help="more rounds: about a quarter of an hour"
    )
    asked = parser.parse_args()
    may_mount = enter_namespace()
    began = time.monotonic()
    seed = asked.seed if asked.seed is not None else random.SystemRandom().randrange(10**6)
    print(
        "Real faults for savepoint and Lightning's ModelCheckpoint, side by side; moments from "
        f"seed {seed}\n{machine()}"
    )
    work = Path(tempfile.mkdtemp(prefix="drill-"))
    elsewhere = second_file_system(work, 100)
    try:
        with strikes.workers() as pool:
            imports = time.monotonic() - began
            drill = Drill(pool, work, seed)
            run_all(drill, FULL if asked.full else SHORT, elsewhere, may_mount)
    except HarnessError as error:
        print(f"{error}\nIts files: {work}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        shutil.rmtree(work, ignore_errors=True)
        return 130
    finally:
        if elsewhere:
            shutil.rmtree(elsewhere)
    print(
        "\n"
        + "\n".join(
            [table(HEADER, drill.rows), *drill.notes, "", LEGEND.format(imports=imports), ""]
        )
    )
    verdicts = {system: verdict(system, drill.tallies[system]) for system in SYSTEMS}
    print("\n".join(said for _, said in verdicts.values()))
    passed = verdicts["savepoint"][0]
    if passed:
        shutil.rmtree(work)
    print(
        f"{'Passed' if passed else f'FAILED (its files: {work})'}, {time.monotonic() - began:.0f} s"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
