"""Soak: one training under random faults, started again and again by the same command; is its end
that of a calm run?

    PYTHONPATH=benchmarks python -m faults.soak --minutes 15
    PYTHONPATH=benchmarks python -m faults.soak --minutes 3 --seed 7

Faults: SIGKILL, SIGTERM, SIGINT, SIGHUP at random moments; SIGKILL during start-up; a full disk,
freed after a while, under a training or before a start; a flipped bit, a zeroed page or a
truncation in the newest checkpoint while nothing runs. The run directory is a small disk in memory,
mounted for this program alone: it needs Linux, and root or user namespaces. When the time is over
the run comes to its end without faults, and its final state and its log are compared, bit for bit,
with those of the same training that ran undisturbed beside it.

Prints a line a fault and a table. Leaves with 1 where anything went wrong: another end, an exit
code or a traceback that the fault does not explain, a resume that fails or begins elsewhere than at
the newest whole checkpoint, steps lost to a signal, files left behind.
"""

import argparse
import csv
import errno
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from report import ROOT, machine, table

from savepoint.prove import digest, rows

# The embedded digits and a small network: a step takes some milliseconds, and no data is needed.
EPOCH = 40  # steps
TRAINING = [
    "--config", "configs/mnist.yaml", "--data", "configs/data/digits.yaml",
    "--data.batch_size", "16", "--model.net.width", "4",
    "--trainer.limit_train_batches", str(EPOCH), "--trainer.log_every_n_steps", "1",
    "--checkpoint.save_every_steps", "7", "--checkpoint.keep_last", "3", "--resume", "auto",
]  # fmt: skip
DISK_MB = 128
PATIENCE_SECS = 300.0
# Of the given time, for the undisturbed run: starts, and steps that are trained again, take the
# rest.
SHARE = 0.5
CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129, "SIGKILL": -9}
DAMAGES = ("flipped bit", "zeroed page", "truncation")
FAULTS = (
    *CODES, *DAMAGES, "SIGKILL in start-up",
    "full disk", "full disk and SIGKILL", "full disk and SIGTERM", "full disk at a start",
)  # fmt: skip


class Attempt:
    """One process of a run."""

    def __init__(self, run: Path, epochs: int, log: Path) -> None:
        self.run = run
        self.log = log
        self.begun = time.monotonic()
        self._rows_before = inode(run / "metrics.csv")
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            *TRAINING,
            "--trainer.max_epochs",
            str(epochs),
        ]
        command += ["--output_dir", str(run.parent), "--run_name", run.name]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=file, env=environment
            )

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def runs(self) -> bool:
        return self.process.poll() is None

    @property
    def trains(self) -> bool:
        """Whether it has logged a step: its first log call makes a new file of metrics.csv."""
        return inode(self.run / "metrics.csv") not in (None, self._rows_before)

    @property
    def began_at(self) -> int | None:
        """The step of its checkpoint, 0 where there was none; None until that is said."""
        found = re.search(r"^training from step (\d+)", self.said, re.MULTILINE)
        return int(found[1]) if found else None

    @property
    def reached(self) -> int:
        """The last step that is in the log, or in what was said of a save."""
        named = [int(step) for step in re.findall(r"step-(\d{8})\.ckpt", self.said)]
        return max(
            [self.began_at or 0, *named, last_step(self.run / "metrics.csv") if self.trains else 0]
        )

    def wait_for_a_step(self) -> float:
        """Seconds from its start to its first step, or to its end."""
        while self.runs and not self.trains and time.monotonic() - self.begun < PATIENCE_SECS:
            time.sleep(0.01)
        return time.monotonic() - self.begun

    def end(self, signum: int | None = None, patience_secs: float = PATIENCE_SECS) -> int:
        """Its exit code; 1000 for one that does not end."""
        if signum is not None:
            self.process.send_signal(signum)
        try:
            return self.process.wait(patience_secs)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return 1000


@dataclass
class Event:
    """A fault, and what the next start that trained made of it. No `step`: it ended no training."""

    secs: float
    fault: str
    code: int | None
    step: int | None
    resumed: int | None = None
    restart_secs: float | None = None

    @property
    def lost(self) -> int | None:
        return (
            None if self.step is None or self.resumed is None else max(0, self.step - self.resumed)
        )

    def __str__(self) -> str:
        parts = [
            f"{self.secs:7.1f} s  {self.fault:<21}",
            " " * 14 if self.step is None else f"at step {self.step:6d}",
        ]
        parts.append("goes on  " if self.code is None else f"exit {self.code:4d}")
        if self.restart_secs is not None:
            parts.append(
                f"first step after {self.restart_secs:4.1f} s, from step {self.resumed}, "
                f"{self.lost or 0} lost"
            )
        return "  ".join(parts)


@dataclass
class Soak:
    """The run, what was done to it, and what went wrong."""

    run: Path
    epochs: int
    logs: Path
    dice: random.Random
    begun: float = field(default_factory=time.monotonic)
    events: list[Event] = field(default_factory=list)
    told: int = 0  # of the events
    attempts: list[Attempt] = field(default_factory=list)
    damaged: set[int] = field(default_factory=set)  # inodes
    failures: list[str] = field(default_factory=list)

    @property
    def secs(self) -> float:
        return time.monotonic() - self.begun

    # -- starts and ends --------------------------------------------------------------------------

    def attempt(self) -> Attempt:
        self.attempts.append(
            Attempt(self.run, self.epochs, self.logs / f"start-{len(self.attempts) + 1:03d}.log")
        )
        return self.attempts[-1]

    def resume(self) -> Attempt:
        """A start that has to train on, from the newest whole checkpoint."""
        newest = self.newest_whole()
        attempt = self.attempt()
        secs = attempt.wait_for_a_step()
        if attempt.began_at is None or not (attempt.trains or attempt.process.poll() == 0):
            self.fail(f"failed resume: it does not train, exit {attempt.process.poll()}", attempt)
        elif attempt.began_at != newest:
            self.fail(
                f"wrong resume: from step {attempt.began_at}, the newest whole one is of {newest}",
                attempt,
            )
        for event in self.events[self.told :]:
            event.resumed = attempt.began_at
        if self.events[self.told :]:
            self.events[-1].restart_secs = secs
        self.tell()
        if left := self.stale_temps(attempt):
            self.fail(f"left behind: {', '.join(left)}", attempt)
        return attempt

    def tell(self) -> None:
        for event in self.events[self.told :]:
            print(event, flush=True)
            if event.fault in ("SIGTERM", "SIGINT", "SIGHUP") and event.lost:
                self.fail(f"{event.lost} steps lost to {event.fault}", self.attempts[-2])
        self.told = len(self.events)

    def ended(self, attempt: Attempt, code: int, expected: int) -> int:
        if code != expected:
            self.fail(f"exit {code}, expected {expected}", attempt)
        elif "Traceback" in attempt.said:
            self.fail(f"a traceback before exit {code}", attempt)
        return code

    def fail(self, what: str, attempt: Attempt) -> None:
        self.failures.append(what)
        said = "\n".join(f"    {text}" for text in attempt.said.splitlines()[-40:])
        print(f"{self.secs:7.1f} s  FAILURE: {what}. It said:\n{said}", flush=True)

    def note(self, fault: str, code: int | None, attempt: Attempt | None) -> None:
        self.events.append(Event(self.secs, fault, code, attempt.reached if attempt else None))

    # -- what lies there --------------------------------------------------------------------------

    def newest_whole(self) -> int:
        """The step that a start has to go on from. Files that nobody damaged verify, those that
        were do not.
        """
        from savepoint.checkpoint import manifest

        for path in sorted((self.run / "checkpoints").glob("step-*.ckpt"), reverse=True):
            reason = manifest.diagnose(path)
            if bool(reason) != (inode(path) in self.damaged):
                self.fail(f"{path.name}: {reason or 'damaged, and it verifies'}", self.attempts[-1])
            if not reason:
                return int(path.stem.removeprefix("step-"))
        return 0

    def stale_temps(self, attempt: Attempt) -> list[str]:
        names = [path.name for path in self.run.rglob(".*tmp*")]
        return [name for name in names if str(attempt.process.pid) not in name]

    # -- faults -----------------------------------------------------------------------------------

    def strike(self, fault: str, attempt: Attempt) -> Attempt | None:
        """One fault, on a training. Returns it if it is to go on."""
        if fault == "full disk":
            return self.fill_for_a_while(attempt)
        if fault.startswith("full disk and"):
            self.stop_on_a_full_disk(fault, attempt)
        elif fault == "full disk at a start":
            self.start_on_a_full_disk(attempt)
        elif fault == "SIGKILL in start-up":
            self.kill_in_start_up(attempt)
        else:
            self.stop(fault, attempt)
        return None

    def stop(self, fault: str, attempt: Attempt) -> None:
        name = "SIGKILL" if fault in DAMAGES else fault
        code = self.ended(attempt, attempt.end(signal.Signals[name]), CODES[name])
        if fault in DAMAGES and not self.damage_newest(fault):
            fault = "SIGKILL"
        self.note(fault, code, attempt)

    def fill_for_a_while(self, attempt: Attempt) -> Attempt:
        ballast = self.fill()
        self.pause(0.5, 4)
        ballast.unlink()
        self.note("full disk", None, attempt)
        self.tell()
        return attempt

    def stop_on_a_full_disk(self, fault: str, attempt: Attempt) -> None:
        ballast = self.fill()
        name = fault.split()[-1]
        self.pause(0.2, 3)
        code = self.ended(attempt, attempt.end(signal.Signals[name]), CODES[name])
        ballast.unlink()
        self.note(fault, code, attempt)

    def start_on_a_full_disk(self, attempt: Attempt) -> None:
        """Is refused."""
        self.stop("SIGKILL", attempt)
        ballast = self.fill(slack=False)
        refused = self.attempt()
        code = self.ended(refused, refused.end(), 2)
        ballast.unlink()
        self.note("full disk at a start", code, None)

    def kill_in_start_up(self, attempt: Attempt) -> None:
        self.stop("SIGKILL", attempt)
        short = self.attempt()
        self.pause(0.0, 4.0)
        code = self.ended(short, short.end(signal.SIGKILL), -9)
        self.note("SIGKILL in start-up", code, short if short.trains else None)

    def fill(self, slack: bool = True) -> Path:
        """Takes all the room; with `slack`, sometimes all but some kilobytes."""
        ballast = self.run.parent / "ballast"
        with ballast.open("wb", buffering=0) as file:
            for piece in (1 << 20, 1 << 12):
                try:
                    while True:
                        file.write(bytes(piece))
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
            if slack:
                file.truncate(
                    max(0, file.tell() - self.dice.choice((0, self.dice.randrange(300_000))))
                )
        return ballast

    def damage_newest(self, kind: str) -> bool:
        """False where it is the only one: then nothing could be resumed."""
        found = sorted((self.run / "checkpoints").glob("step-*.ckpt"))
        if len(found) < 2:
            return False
        data = bytearray(found[-1].read_bytes())
        place = self.dice.randrange(len(data))
        if kind == "truncation":
            del data[place:]
        elif kind == "flipped bit":
            data[place] ^= 1 << self.dice.randrange(8)
        else:
            page = slice(place - place % 4096, min(len(data), place - place % 4096 + 4096))
            data[page] = bytes(page.stop - page.start)
        changed = bytes(data) != found[-1].read_bytes()
        if changed:
            with found[-1].open("r+b") as file:  # in place: hard links see it too
                file.truncate(len(data))
                file.write(data)
            self.damaged.add(found[-1].stat().st_ino)
        return changed

    def pause(self, least: float, most: float) -> None:
        time.sleep(self.dice.uniform(least, most))


def inode(path: Path) -> int | None:
    with suppress(FileNotFoundError):
        return path.stat().st_ino
    return None


def last_step(log: Path) -> int:
    """Of its last whole rows. Lightning counts the steps of rows from 0."""
    with suppress(FileNotFoundError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        steps = [row.split(b",")[0] for row in file.read().split(b"\n")[1:-1]]
        return max((int(step) + 1 for step in steps if step.isdigit()), default=0)
    return 0


def deck(dice: random.Random) -> Iterator[str]:
    """Each fault once before any comes again."""
    while True:
        yield from dice.sample(FAULTS, len(FAULTS))


# -- the program ---------------------------------------------------------------------------------


def soak(state: Soak, secs: float) -> None:
    """Faults until the time is over, then on to the end."""
    faults = deck(state.dice)
    attempt = None
    while state.secs < secs and len(state.failures) < 5:
        attempt = attempt or state.resume()
        state.pause(0.2, 8)
        if not attempt.runs:
            break  # its end, or a failure that is told below
        attempt = state.strike(next(faults), attempt)
    attempt = attempt or state.resume()
    print(
        f"{state.secs:7.1f} s  the end of the faults, at step {attempt.reached} of "
        f"{state.epochs * EPOCH}",
        flush=True,
    )
    state.ended(attempt, attempt.end(patience_secs=4 * secs + PATIENCE_SECS), 0)


def step_secs(work: Path) -> float:
    """On this machine, with all that is around a step. The first epoch warms up."""
    attempt = Attempt(work / "calibration", 4, work / "calibration.log")
    if attempt.end() != 0:
        sys.exit(f"The training does not run:\n{attempt.said}")
    with (work / "calibration" / "metrics.csv").open(newline="") as file:
        times = [float(row["time/secs"]) for row in csv.DictReader(file) if row["train/loss_step"]]
    return (times[-1] - times[EPOCH]) / (len(times) - 1 - EPOCH)


def differences(straight: Path, state: Soak) -> list[str]:
    """What is not the same at the end."""
    from savepoint.checkpoint import manifest

    damaged = [
        path.name for path in (state.run / "checkpoints").glob("*.ckpt") if manifest.diagnose(path)
    ]
    one = digest(straight)
    other = digest(state.run)
    for name, digests in (("undisturbed", one), ("under faults", other)):
        print(f"  {name:<12}  state {digests[0][:32]}  log {digests[1][:32]}", flush=True)
    found = [f"damaged: {', '.join(damaged)}"] if damaged else []
    found += ["state"] if one[0] != other[0] else []
    return found + (["log"] if one[1] != other[1] and not best_was_refused(straight, state) else [])


def best_was_refused(straight: Path, state: Soak) -> bool:
    """Whether the logs differ in the test alone, because the disk was full when the best checkpoint
    was to be saved.
    """
    best = json.loads((straight / "summary.json").read_text())["tested_checkpoint"]
    failed = re.compile(rf"(failed|before the save): \S*{best}")
    if not any(failed.search(attempt.said) for attempt in state.attempts):
        return False
    print(f"  The best checkpoint, {best}, met a full disk: another one was tested.", flush=True)
    own = [row for row in rows(state.run) if not row.get("test/loss")]
    return own == [row for row in rows(straight) if not row.get("test/loss")]


def summary(events: list[Event]) -> str:
    body = []
    for fault in FAULTS:
        mine = [event for event in events if event.fault == fault]
        lost = [event.lost for event in mine if event.lost is not None]
        secs = [event.restart_secs for event in mine if event.restart_secs is not None]
        steps = f"{statistics.median(lost):.0f} / {max(lost)}" if lost else "-"
        restart = f"{statistics.median(secs):.1f} / {max(secs):.1f}" if secs else "-"
        body.append((fault, str(len(mine)), steps, restart))
    return table(
        [
            "fault",
            "times",
            "steps lost, median / most",
            "s from restart to first step, median / most",
        ],
        body,
    )


def perform(minutes: float, seed: int, work: Path) -> bool:
    """Whether all went well."""
    disk = work / "disk"
    disk.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(disk)], check=True
    )
    epochs = max(2, round(60 * minutes * SHARE / step_secs(work) / EPOCH))
    print(
        f"{epochs * EPOCH} steps, {minutes:g} minutes of faults from seed {seed}. Logs: {work}",
        flush=True,
    )
    straight = Attempt(work / "straight", epochs, work / "straight.log")
    state = Soak(disk / "soak", epochs, work, random.Random(seed))
    try:
        soak(state, 60 * minutes)
        state.ended(straight, straight.end(patience_secs=4 * 60 * minutes + PATIENCE_SECS), 0)
        found = differences(straight.run, state) if not state.failures else []
    finally:
        for attempt in (straight, *state.attempts):
            attempt.end(signal.SIGKILL)
        with suppress(OSError):
            shutil.copytree(state.run, work / "soak")  # the disk goes with this process
    return report(state, found)


def report(state: Soak, found: list[str]) -> bool:
    print(f"\n{summary(state.events)}\n")
    damages = sum(event.fault in DAMAGES for event in state.events)
    print(
        f"{len(state.events)} faults, {len(state.attempts)} starts in {state.secs / 60:.1f} "
        f"minutes. {damages} files damaged, "
        f"{sum('wrong resume' in what for what in state.failures)} of them loaded. Failed resumes: "
        f"{sum('failed resume' in what for what in state.failures)}. Failures: "
        f"{len(state.failures)}."
    )
    for what in state.failures:
        print(f"  {what}")
    print(
        "identical"
        if not found and not state.failures
        else f"DIFFERENT: {', '.join(found) or 'see the failures'}"
    )
    return not found and not state.failures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument(
        "--seed", type=int, default=None, help="of the faults; by default a new one each time"
    )
    parser.add_argument("--mounted", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if not asked.mounted:
        # In a mount namespace of its own: whatever ends this program, the kernel takes the disk
        # away.
        if shutil.which("unshare") is None:
            print(
                "No unshare here: this program mounts a small disk of its own. Expected Linux.",
                file=sys.stderr,
            )
            return 2
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        again = [sys.executable, *sys.orig_argv[1:], "--mounted"]
        os.execvp("unshare", ["unshare", "--mount", "--propagation", "private", *user, *again])
    seed = asked.seed if asked.seed is not None else random.SystemRandom().randrange(10**6)
    print(machine(), flush=True)
    work = Path(tempfile.mkdtemp(prefix="soak-"))
    well = perform(asked.minutes, seed, work)
    if well:
        subprocess.run(["umount", str(work / "disk")], check=True)
        shutil.rmtree(work)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
