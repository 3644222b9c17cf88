"""Run directories as trainings leave them, without the training."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from savepoint import commands
from savepoint.checkpoint.retention import Retention
from savepoint.checkpoint.store import Checkpoint, CheckpointStore
from savepoint.run import Run
from support.checkpoint_files import facts, small_state

CONFIG = "model: {class_path: Net}\ncheckpoint: {keep_last: 1, keep_best: 1, monitor: val/loss, mode: min}\n"


def make_run(
    output_dir: Path,
    name: str = "first",
    *,
    steps: Sequence[int] = (10, 20, 30),
    ended: str | None = None,
    **more: Any,
) -> Path:
    """Its losses are its steps: the first is the best."""
    directory = output_dir / name
    directory.mkdir(parents=True)
    run = Run(directory)
    run.record_start(run.record, CONFIG, checkpoint=None, step=0, changed={}, world_size=1)
    run_id = run.record["id"]
    kept = store(directory)
    for step in steps:
        last = ended if step == steps[-1] else None
        made = {
            "created": f"2026-01-01T00:00:{step:02d}+00:00",
            "best_score": float(steps[0]),
            "run_id": run_id,
        }
        kept.add(small_state(float(step)), facts(step, float(step), ended=last, **made, **more))
    if ended:
        run.write_summary({"steps": steps[-1], "test/loss": 0.25, "test/accuracy": 0.5})
    return directory


def store(directory: Path) -> CheckpointStore:
    return CheckpointStore(
        directory / "checkpoints", retention=Retention(keep_last=9), monitor="val/loss"
    )


def latest(directory: Path) -> Checkpoint:
    found = store(directory).latest()
    assert found is not None
    return found


def fork(parent: Path, name: str, step: int) -> Path:
    """A run beside `parent`, whose first process started from the parent's checkpoint of `step`."""
    origin = next(one for one in store(parent).checkpoints() if one.step == step)
    made = make_run(
        parent.parent, name, steps=(step + 1, step + 2), parent=origin.manifest["digest"]
    )
    record = json.loads((made / "run.json").read_text())
    changed = {"checkpoint": origin.path.name, "step": step, "changed": {"model.lr": [0.1, 0.2]}}
    record["starts"][0] |= changed | {"parent": {"id": None, "name": parent.name}}
    (made / "run.json").write_text(json.dumps(record))
    return made


def flip(path: Path) -> None:
    """Damage one byte of a tensor."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@contextmanager
def training_in(directory: Path) -> Iterator[int]:
    """Another process holds the run's lock. Yields its pid."""
    program = "import sys, pathlib; from savepoint.run import Run; run = Run(pathlib.Path(sys.argv[1])); run.lock()"
    command = [sys.executable, "-uc", f"{program}; print('held'); sys.stdin.read()", str(directory)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield holder.pid
        holder.kill()


def say(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command."""
    code = commands.main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err
