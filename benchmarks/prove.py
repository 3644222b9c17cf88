"""Proof of exact resume in front of you: a straight run against one that is killed at random points
and resumed.

    make prove
    make prove CONFIG=configs/mine.yaml ARGS="--epochs 1 --kills 2 --seed 3"

Both run side by side with one thread each, on the default config or yours: the test of a new model
of your own. At the end the two final checkpoints are compared whole (weights, optimizer, schedule,
counters, random states, metric states), and every value in metrics.csv that is not derived from the
clock. What is left out of the comparison is what `savepoint diff` leaves out.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def start(script: str, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / script), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with log.open("ab") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=environment)


def saved_steps(run: Path) -> int:
    names = [path.name for path in (run / "checkpoints").glob("step-*.ckpt")]
    return max((int(name[5:13]) for name in names), default=0)


def kill_and_resume(
    arguments: list[str], work: Path, kills: list[int], dice: random.Random
) -> None:
    """Runs to the end through `kills`, each at a random moment after its first new checkpoint."""
    run, log = work / "killed", work / "killed.log"
    process = start("train.py", *arguments, "--run_name", "killed", log=log)
    for signum in kills:
        before, begun = saved_steps(run), time.monotonic()
        while process.poll() is None and saved_steps(run) <= before:
            time.sleep(0.01)
        time.sleep(dice.uniform(0.0, 1.5))
        if process.poll() is not None:
            break
        process.send_signal(signum)
        code = process.wait()
        step = saved_steps(run)
        name = signal.Signals(signum).name
        print(
            f"  {name} {time.monotonic() - begun:5.1f} s after its start: exit {code}, resumes "
            f"from step {step}",
            flush=True,
        )
        process = start("resume.py", str(run), log=log)
    if process.wait() != 0:
        sys.exit(f"The resumed run failed. Its output: {log}\n{log.read_text()[-2000:]}")


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [
            {key: value for key, value in row.items() if not key.startswith("time/")}
            for row in csv.DictReader(file)
        ]


def digest(run: Path) -> tuple[str, str]:
    from savepoint.checkpoint import format, store
    from savepoint.commands import diff

    latest = store.CheckpointStore(run / "checkpoints").latest()
    assert latest is not None, f"no checkpoint in {run}"
    state, _ = store.load(latest.path)
    return format.fingerprint(diff.comparable(state)), format.fingerprint(rows(run))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--kills", type=int, default=2, help="SIGKILL and SIGTERM in turn")
    parser.add_argument(
        "--seed", type=int, default=None, help="of the moments; by default a new one each time"
    )
    parser.add_argument("--config", default="configs/mnist.yaml")
    asked, more = parser.parse_known_args()
    seed = asked.seed if asked.seed is not None else random.SystemRandom().randrange(10**6)
    kills = [(signal.SIGKILL, signal.SIGTERM)[i % 2] for i in range(asked.kills)]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="prove-") as folder:
        work = Path(folder)
        arguments = [
            "--config",
            asked.config,
            "--trainer.max_epochs",
            str(asked.epochs),
            "--output_dir",
            str(work),
        ]
        arguments += ["--checkpoint.save_every_steps", "40", *more]
        print(
            f"{asked.config}, {asked.epochs} epochs: a straight run beside one that is killed "
            f"(moments from seed {seed})"
        )
        straight = start(
            "train.py", *arguments, "--run_name", "straight", log=work / "straight.log"
        )
        kill_and_resume(arguments, work, kills, random.Random(seed))
        if straight.wait() != 0:
            sys.exit(f"The straight run failed:\n{(work / 'straight.log').read_text()[-2000:]}")
        one, other = digest(work / "straight"), digest(work / "killed")
    for name, digests in (("straight", one), ("killed and resumed", other)):
        print(f"  {name:<18}  state {digests[0][:32]}  log {digests[1][:32]}")
    print(f"{'identical' if one == other else 'DIFFERENT'}, {time.monotonic() - began:.0f} s")
    return 0 if one == other else 1


if __name__ == "__main__":
    sys.exit(main())
