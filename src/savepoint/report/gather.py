"""The facts of a report, from a run directory; the page says what is damaged or missing."""

import contextlib
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from savepoint import find
from savepoint.checkpoint import manifest
from savepoint.checkpoint.retention import RULES, Retention
from savepoint.checkpoint.store import Checkpoint, CheckpointStore
from savepoint.report import clients, pictures
from savepoint.report.curves import Curves, series_of, steps_by
from savepoint.run import Run
from savepoint.words import plural

KINDS: dict[str, type] = {
    **dict.fromkeys(("step", "reached", "world_size"), int),
    **dict.fromkeys(("checkpoint", "took_over", "host", "hardware"), str),
    **dict.fromkeys(("parent", "versions"), dict),
}
Start = Mapping[str, Any]


@dataclass(frozen=True)
class File:
    """A checkpoint, or a damaged one.

    Attributes:
        fate: Why retention keeps it, or what happened to it.
        marks: "best", "latest", both or none.
    """

    path: Path
    place: str
    fate: str
    checkpoint: Checkpoint | None = None
    marks: tuple[str, ...] = ()

    @property
    def step(self) -> int | None:
        return self.checkpoint.step if self.checkpoint else manifest.step_in_name(self.path.name)

    @property
    def size_bytes(self) -> int | None:
        return find.size(self.path)


class Mark(NamedTuple):
    """An event of the run. Sorted by time, with a fault before the resume that it caused."""

    when: float
    kind: str
    step: int
    text: str


class Report:
    """All facts of the page: the templates use each attribute by its name.

    Attributes:
        latest: The manifest of the newest checkpoint.
        summary: Of the run's last end; empty where there is none.
        missing: One sentence for each file that is missing or unreadable.
        rules: The retention in the run's config; None where it is not known.
        command: (purpose, command line).
        lanes: The files with a step, by place.
        last_step: The end of every step axis.
        per_batch: Steps of optimizers for each that the log counts.
        clients: Of a federated run; None for any other.
        unit: What a step is called.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.state = run.state()
        self.holder = run.holder()
        self.latest = run.latest.manifest if run.latest else {}
        self.monitor = str(self.latest.get("monitor") or "score")
        dataset = self.latest.get("dataset")
        self.dataset = dataset if isinstance(dataset, dict) else {}
        self.summary = run.summary() if run.is_summarised() else {}
        self.config = _text(run.directory / "config.yaml")
        parsed = _parsed(self.config or "")
        self.missing = _missing(run, self.config, parsed)
        self.rules = _rules(parsed)
        self.files = [*_in_the_run(run, self.rules), *_damaged(run), *_rewound(run.directory)]
        to_step = steps_by(_pairs(self.files))
        self.per_batch = _per_batch(self.latest)
        starts = enumerate(run.starts(), 1)
        self.starts = [_start(number, one, to_step) for number, one in starts]
        self.marks = sorted([*_marks_of_starts(self.starts), *_marks_of_files(self.files)])
        self.curves = Curves(run.directory / "metrics.csv", self.latest.get("monitor"), to_step)
        self.pictures = list(pictures.read(run.directory, self.missing))
        self.clients = clients.read(run.directory)
        self.unit = "round" if self.latest.get("kind") == "federated" else "step"
        self._place_test()
        self.command = _command(run, self.state)
        known = [file for file in self.files if file.step is not None]
        self.lanes = {key: list(files) for key, files in groupby(known, lambda file: file.place)}
        steps = [file.step or 0 for file in known] + [mark.step for mark in self.marks]
        self.last_step = max([self.curves.last_step, *steps])

    def _place_test(self) -> None:
        """What the test of the best checkpoint logged belongs to its step: the log names the last
        step of the training.
        """
        step = manifest.step_in_name(str(self.summary.get("tested_checkpoint")))
        if step is None:
            return
        for series in (one for chart in self.curves.charts for one in chart.series):
            if series.role == "test":
                series.measured_at(step)
        self.pictures = [
            one._replace(step=step) if series_of(one.tag).role == "test" else one
            for one in self.pictures
        ]


def _pairs(files: Sequence[File]) -> Iterator[tuple[int, int]]:
    """(step in the log, step) of each checkpoint; those of older versions do not know both."""
    for one in filter(None, (file.checkpoint for file in files)):
        if "logged_step" in one.manifest:
            yield one.manifest["logged_step"], one.step


def _per_batch(latest: Mapping[str, Any]) -> float:
    """How many steps of optimizers a batch of the log has; 1 where that is not known."""
    logged = latest.get("logged_step")
    return latest["step"] / logged if logged else 1.0


def _missing(run: Run, config: str | None, parsed: Any) -> list[str]:
    sentences = []
    if not run.starts():
        unknown = "how and where the run was started is not known"
        sentences.append(f"run.json is missing or damaged: {unknown}.")
    if not isinstance(parsed, dict):
        sentences.append(f"config.yaml is {'missing' if config is None else 'damaged'}.")
    if run.is_summary_damaged():
        sentences.append("summary.json is damaged: the results are not known.")
    elif (run.directory / "summary.json").exists() and not run.is_summarised():
        sentences.append(
            "summary.json tells of an earlier end of this run: its results are left out."
        )
    return sentences


def _start(number: int, entry: Mapping[str, Any], to_step: Callable[[float], float]) -> Start:
    """An entry of run.json; a value of another type than a run writes becomes None."""
    known = {key: entry.get(key) for key in KINDS}
    known = {key: value if isinstance(value, KINDS[key]) else None for key, value in known.items()}
    if known["reached"] is not None:  # the last row of the log
        known["reached"] = int(to_step(known["reached"]))
    words = ["python", *map(str, entry["argv"])] if entry["argv"] else []
    changes = ", ".join(f"{key}: {_change(pair)}" for key, pair in entry["changed"].items())
    return {**entry, **known, "number": number, "command": shlex.join(words), "changes": changes}


def _change(pair: Any) -> str:
    return " → ".join(map(str, pair if isinstance(pair, list) else [pair]))


def _marks_of_starts(starts: Sequence[Start]) -> Iterator[Mark]:
    for start in starts:
        number = start["number"]
        step = start["step"]
        when = _seconds(start["time"])
        reached = (step or 0) if start["reached"] is None else start["reached"]
        if start["took_over"] and number > 1:
            killed = f"Start {number - 1} was killed at step {reached:,} or later"
            yield Mark(when, "fault", reached, killed)
        if step is None or not start["checkpoint"]:
            continue
        what = f"Start {number} {'resumed' if number > 1 else 'began'} from {start['checkpoint']}"
        if number > 1 and reached > step:
            what += f": {plural(reached - step, 'step')} or more trained again"
        elif number == 1 and start["parent"] and start["parent"].get("name"):
            what += f" of {start['parent']['name']}"
        yield Mark(when, "resume", step, what)


def _marks_of_files(files: Sequence[File]) -> Iterator[Mark]:
    rewinds = {file.fate: file for file in files if file.place == "rewound" and file.step}
    for file in [file for file in files if file.place == "damaged"] + [*rewinds.values()]:
        what = f"{file.path.name} {file.fate}"
        changed = _stat(file.path)
        if file.place == "rewound":
            what = f"The run was at step {file.step:,} and was {file.fate}"
            changed = _stat(file.path.parent)  # it was moved then
        if file.step is not None:
            yield Mark(int(changed.st_mtime) if changed else 0, "fault", file.step, what)


def _seconds(time: str) -> float:
    try:
        return datetime.fromisoformat(time).timestamp()
    except (ValueError, OverflowError):
        return 0


def _in_the_run(run: Run, rules: Mapping[str, int] | None) -> Iterator[File]:
    listed = CheckpointStore(run.checkpoints, retention=Retention(**rules or {}))
    best = listed.best()
    why = listed.reasons()
    for one in listed.checkpoints():
        fate = "whether it is kept is not known"
        if rules is not None:
            kept = f"kept: {', '.join(map(_placed, why.get(one.step, ())))}"
            fate = kept if one.step in why else "goes with the next save"
        named = {"best": best, "latest": run.latest}
        marks = (name for name, other in named.items() if other and other.path == one.path)
        yield File(one.path, "in the run", fate, one, tuple(marks))


def _placed(reason: str) -> str:
    """`last-2` of retention is the 2nd newest."""
    kind, _, place = reason.partition("-")
    name = {"last": "newest", "best": "best"}.get(kind)
    if name is None or place == "1":
        return f"the {name}" if name else reason
    ending = {"1": "st", "2": "nd", "3": "rd"}.get(place[-1], "th")
    return f"{place}{'th' if place[-2:-1] == '1' else ending} {name}"


def _damaged(run: Run) -> Iterator[File]:
    for path, reason in run.store.rejected():
        yield File(path, "damaged", f"does not verify: {_wrong(path) or reason}")
    for path in run.corrupt():
        yield File(path, "damaged", f"was quarantined: {_wrong(path) or 'it verifies now'}")


def _wrong(path: Path) -> str:
    with contextlib.suppress(OSError):
        return manifest.diagnose(path)
    return ""


def _rewound(directory: Path) -> Iterator[File]:
    for path in filter(Path.is_dir, sorted((directory / "rewound").glob("*"))):
        for one in CheckpointStore(path).checkpoints():
            yield File(one.path, "rewound", f"rewound: set aside in rewound/{path.name}", one)


def _stat(path: Path) -> os.stat_result | None:
    with contextlib.suppress(FileNotFoundError):  # the run may delete it after the listing
        return path.stat()
    return None


def _rules(config: Any) -> Mapping[str, int] | None:
    """The retention in the config; None where it is not readable."""
    with contextlib.suppress(ValueError, TypeError, AttributeError):  # edited by hand
        group = config.get("checkpoint")
        given = {rule: group[rule] for rule in RULES if group.get(rule) is not None}
        Retention(**given)  # a ConfigError where a number is out of range
        return given
    return None


def _parsed(config: str) -> Any:
    from savepoint.config.compose import parse_yaml

    with contextlib.suppress(ValueError, TypeError, RecursionError):
        return parse_yaml(config, "config.yaml")
    return None


def _text(path: Path) -> str | None:
    with contextlib.suppress(FileNotFoundError):
        return path.read_text(errors="replace")
    return None


def _command(run: Run, state: str) -> tuple[str, str]:
    if state == "running":
        return "Save now, and go on", shlex.join(["touch", f"{run.shown}/save-now"])
    if state == "broken" or run.latest is None:
        return "See what is wrong", run.command("-m", "savepoint", "verify")
    limits = {"max_epochs": run.latest.epoch, "max_steps": run.latest.step}
    ended = run.latest.manifest.get("ended")
    if state == "finished" and ended in limits:
        twice = 2 * max(1, limits[ended])
        return "Train longer", f"{run.command('resume.py')} --trainer.{ended} {twice}"
    if state == "finished" and ended == "num_server_rounds":
        twice = 2 * run.latest.step
        return "More rounds", f"{run.command('resume.py')} --federated.{ended} {twice}"
    return "Go on", run.command("resume.py")
