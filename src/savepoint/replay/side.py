"""One side of a comparison of two runs: a part of a run is trained again and recorded, in this
process or by another interpreter.

`PYTHON -m savepoint.replay.side FILE` is the other interpreter. What goes there and back is plain
data in files: JSON, a sealed checkpoint, and tensors that torch's safe loader reads.
"""

import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from savepoint import entry
from savepoint.checkpoint.store import Checkpoint
from savepoint.errors import ConfigError, SavepointError
from savepoint.run import Run
from savepoint.words import printable
from savepoint.workspace import project

KINDS = (
    "samples",
    "batch",
    "weight",
    "random state",
    "output",
    "loss",
    "gradient",
    "setting",
    "optimizer state",
    "weight after the step",
)
"""What is recorded of a batch, in the order in which a difference would spread."""

RECORDS = "records.jsonl"
ENVIRONMENT = "environment.json"
KEPT = "kept.pt"
RUN = "run"
_REQUEST = "request.json"
_THERE = "there"


@dataclass(frozen=True)
class Part:
    """What is to be trained, as plain data.

    Attributes:
        checkpoint: Where it begins; with `anew` only its config counts, and the part begins at
            step 0.
        step: Where it ends, and `at`: the point there; None for the first one.
        config: In place of the checkpoint's: of a resume there that had changed it.
    """

    checkpoint: str
    step: int
    at: str | None = None
    anew: bool = False
    config: str | None = None
    allow: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Keep:
    """Places, as (kind, name), in one line of a record, whose values are kept."""

    line: int
    places: list[tuple[str, str]]


@dataclass(frozen=True)
class Recorded:
    """What a side has left in its directory."""

    directory: Path

    @cached_property
    def batches(self) -> list[dict[str, Any]]:
        lines = (self.directory / RECORDS).read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def environment(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.directory / ENVIRONMENT).read_text())
        return found

    @property
    def log(self) -> Path:
        return self.directory / RUN / "metrics.csv"

    @property
    def end(self) -> Checkpoint | None:
        """None where the training has ended before."""
        return Run(self.directory / RUN).store.latest()

    def kept(self) -> dict[str, dict[str, Any]]:
        import torch

        values: dict[str, dict[str, Any]] = torch.load(self.directory / KEPT, weights_only=True)
        return values


def record(
    part: Part, directory: Path, *, keep: Keep | None = None, python: Path | None = None
) -> Recorded:
    """Trains and records a part.

    Args:
        keep: Also keeps values; the state at the end is not saved then.
        python: The interpreter; None for this process.
    """
    directory.mkdir()
    if python is None:
        from savepoint.replay import recording

        with redirect_stdout(sys.stderr):  # the result alone goes to standard output
            recording.record(part, directory, keep)
        return Recorded(directory)
    request = {"part": asdict(part), "keep": asdict(keep) if keep else None}
    (directory / _REQUEST).write_text(json.dumps(request))
    _call(python, directory / _REQUEST)
    there = Recorded(directory / _THERE)
    if not (there.directory / KEPT).is_file():
        raise ConfigError(
            f"Not an interpreter: {python} has trained nothing. A program such as .venv/bin/python "
            "was expected. Name one."
        )
    return there


def _call(python: Path, request: Path) -> None:
    own = project().root / "src"
    environment = dict(os.environ)
    for name in ("SAVEPOINT_RUN_DIR", "SAVEPOINT_CHECKPOINT"):
        environment.pop(name, None)
    if (own / "savepoint").is_dir():  # the same sources of the library and the project
        others = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{own}{os.pathsep}{others}" if others else str(own)
    command = [str(python), "-m", "savepoint.replay.side", str(request)]
    try:
        # Its own words go to standard error.
        code = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode
    except OSError as error:
        raise ConfigError(
            f"Not an interpreter: {python} ({error.strerror}). A program such as .venv/bin/python "
            "was expected. Name one."
        ) from error
    if code:
        raise ConfigError(
            f"No replay by {python}: it ended with exit code {code}, and has said why. An "
            "interpreter that trains this project was expected. Install there what is missing, or "
            "name another."
        )


def main(request: Path) -> int:
    """In the other interpreter."""
    asked = json.loads(request.read_text())
    keep = asked["keep"]
    if keep is not None:
        keep = Keep(keep["line"], [(kind, name) for kind, name in keep["places"]])
    try:
        root = project().root
        if (root / "resume.py").is_file():
            entry.take_own_code(root)
        record(Part(**asked["part"]), request.parent / _THERE, keep=keep)
    except ImportError as error:
        print(f"{sys.executable} lacks a package: {error}", file=sys.stderr)
        return 2
    except SavepointError as error:
        print(printable(str(error)), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
