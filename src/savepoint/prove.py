"""A proof of exact resume in front of you: a straight run against one that is killed and resumed.

    make prove
    make prove CONFIG=configs/mine.yaml ARGS="--epochs 1 --kills 2 --seed 3"

Both run side by side with one thread each, on the default config or yours: a test for a model of
your own. At the end the two final checkpoints are compared whole (weights, optimizer, schedule,
counters, random states, metric states), but for what `savepoint diff` leaves out, and every value
in metrics.csv that does not come from the clock.
"""

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from savepoint.checkpoint.manifest import step_files, step_in_name
from savepoint.errors import ConfigError, SavepointError
from savepoint.words import plural
from savepoint.workspace import project

SHOWN = 2000
"""Characters of a failed run's output."""


class Failed(SavepointError):
    """One of the two runs ended with an error."""

    exit_code = 1


def start(script: str, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
    root = project().root
    if not (root / script).is_file():
        raise ConfigError(
            f"No {script} in {root}. A project with train.py and resume.py was expected, as its "
            "runs are compared. Start this in its directory."
        )
    command = [sys.executable, str(root / script), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with log.open("ab") as file:
        return subprocess.Popen(command, cwd=root, stdout=file, stderr=file, env=environment)


def newest_step(run: Path) -> int:
    files = step_files(run / "checkpoints")
    return max((step_in_name(path.name) or 0 for path in files), default=0)


def kill_and_resume(
    arguments: list[str],
    work: Path,
    kills: list[int],
    dice: random.Random,
) -> None:
    """Runs to the end through `kills`, each at a random moment after its first new checkpoint."""
    run = work / "killed"
    log = work / "killed.log"
    process = start("train.py", *arguments, "--run_name", "killed", log=log)
    for signum in kills:
        before = newest_step(run)
        begun = time.monotonic()
        while process.poll() is None and newest_step(run) <= before:
            time.sleep(0.01)
        time.sleep(dice.uniform(0.0, 1.5))
        name = signal.Signals(signum).name
        if process.poll() is not None:
            print(f"  {name} would have come after its end: one kill less", flush=True)
            break
        process.send_signal(signum)
        code = process.wait()
        secs = time.monotonic() - begun
        step = newest_step(run)
        # By a signal, as a shell gives it.
        outcome = f"exit {128 - code if code < 0 else code}, resumes from step {step}"
        if code == 0:
            outcome = f"after its last step, {step}: the resume has nothing left to train"
        print(f"  {name} {secs:5.1f} s after its start: {outcome}", flush=True)
        process = start("resume.py", str(run), log=log)
    end(process, "killed and resumed", log)


def end(process: subprocess.Popen[bytes], name: str, log: Path) -> None:
    code = process.wait()
    said = log.read_text()[-SHOWN:]
    if code == ConfigError.exit_code:
        raise ConfigError(said.strip())
    if code:
        raise Failed(f"The {name} run failed. The end of its output:\n{said}")


def rows(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, without the values of the clock."""
    with (run / "metrics.csv").open(newline="") as file:
        whole = list(csv.DictReader(file))
    for row in whole:
        for key in [key for key in row if key.startswith("time/")]:
            del row[key]
    return whole


def digest(run: Path) -> tuple[str, str]:
    """The digests of a run's final state and of its log."""
    from savepoint.checkpoint import format, store
    from savepoint.comparing import comparable

    latest = store.CheckpointStore(run / "checkpoints").latest()
    assert latest is not None, f"no checkpoint in {run}"
    state, _ = store.load(latest.path)
    return format.fingerprint(comparable(state)), format.fingerprint(rows(run))


def prove(arguments: list[str], kills: list[int], seed: int) -> bool:
    """Prints both digests; whether they are the same."""
    with tempfile.TemporaryDirectory(prefix="prove-") as folder:
        work = Path(folder)
        arguments = [*arguments, "--output_dir", folder]
        log = work / "straight.log"
        straight = start("train.py", *arguments, "--run_name", "straight", log=log)
        try:
            kill_and_resume(arguments, work, kills, random.Random(seed))
            end(straight, "straight", log)
        finally:
            straight.kill()
            straight.wait()
        digests = {
            "straight": digest(work / "straight"),
            "killed and resumed": digest(work / "killed"),
        }
    for name, (state, log_rows) in digests.items():
        print(f"  {name:<18}  state {state[:32]}  log {log_rows[:32]}")
    return len(set(digests.values())) == 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="prove", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--kills", type=int, default=2, help="SIGKILL and SIGTERM in turn")
    parser.add_argument("--seed", type=int, help="of the moments; by default a new one each time")
    parser.add_argument("--config", help="the project's default config if not given")
    asked, more = parser.parse_known_args(argv)
    seed = asked.seed if asked.seed is not None else random.SystemRandom().randrange(10**6)
    kills: list[int] = [(signal.SIGKILL, signal.SIGTERM)[i % 2] for i in range(asked.kills)]
    arguments = ["--config", asked.config] if asked.config else []
    arguments += ["--trainer.max_epochs", str(asked.epochs), "--checkpoint.save_every_steps", "40"]
    began = time.monotonic()
    print(
        f"{asked.config or 'The default config'}, {plural(asked.epochs, 'epoch')}: a straight run "
        f"beside one that is killed (moments from seed {seed})",
        flush=True,
    )
    try:
        same = prove([*arguments, *more], kills, seed)
    except SavepointError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{'identical' if same else 'DIFFERENT'}, {time.monotonic() - began:.0f} s")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
