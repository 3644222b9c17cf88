"""What a report shows, read from a run directory. What is damaged or not there is left out, and `missing` says so."""

import contextlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from savepoint.checkpoint import manifest
from savepoint.checkpoint.retention import RULES, Retention
from savepoint.checkpoint.store import Checkpoint, CheckpointStore
from savepoint.report import curves, pictures
from savepoint.report.chart import Mark
from savepoint.report.curves import Curves
from savepoint.report.pictures import Picture
from savepoint.run import Run
from savepoint.words import plural


class Start(NamedTuple):
    """One entry of run.json, as far as it can be read."""

    number: int
    time: str
    argv: Sequence[str]
    step: int | None
    checkpoint: str | None
    parent: str | None
    took_over: str | None
    reached: int | None
    changed: Mapping[str, Any]
    host: str
    hardware: str
    processes: int | None
    commit: str | None
    dirty: bool
    versions: Mapping[str, str]


@dataclass(frozen=True)
class File:
    """A checkpoint, or what was one.

    Attributes:
        place: Its line in the picture.
        changed: When it last changed, in whole seconds since 1970; of a rewound file, when that was moved.
        saved: When, and the reason that its manifest gives.
        fate: Why retention keeps it, or what happened to it.
    """

    name: str
    place: Literal["in the run", "damaged", "rewound"]
    fate: str
    step: int | None
    size_bytes: int | None
    changed: float
    epoch: int | None = None
    score: float | None = None
    saved: str = ""
    latest: bool = False
    best: bool = False


@dataclass
class Report:
    """All that the page says.

    Attributes:
        latest: The manifest of the newest checkpoint.
        summary: Of this end of the run; empty where there is none.
        rules: The retention that the run's config asks for; None where that is not known.
        commands: (what for, what to type).
        missing: What is not there or cannot be read, one sentence each.
    """

    name: str
    shown: str
    state: str
    holder: str | None
    latest: Mapping[str, Any]
    summary: Mapping[str, Any]
    starts: list[Start]
    curves: Curves
    files: list[File]
    rules: Mapping[str, int] | None
    marks: list[Mark]
    pictures: list[Picture]
    config: str | None
    commands: list[tuple[str, str]]
    missing: list[str]

    @property
    def monitor(self) -> str:
        return str(self.latest.get("monitor") or "score")

    @property
    def dataset(self) -> Mapping[str, Any]:
        found = self.latest.get("dataset")
        return found if isinstance(found, dict) else {}

    @property
    def last_step(self) -> float:
        """The end of every step axis."""
        steps = [self.curves.last_step, *(mark.step for mark in self.marks)]
        return max(steps + [file.step for file in self.files if file.step is not None])


def gather(run: Run) -> Report:
    latest, starts, config, missing = run.latest, _starts(run), _text(run.directory / "config.yaml"), list[str]()
    if not starts:
        missing.append("run.json is missing or damaged: how and where the run was started is not known.")
    if config is None:
        missing.append("config.yaml is missing.")
    elif not isinstance(_parsed(config), dict):
        missing.append("config.yaml is damaged.")
    if run.is_summary_damaged():
        missing.append("summary.json is damaged: the results are not known.")
    elif (run.directory / "summary.json").exists() and not run.is_summarised():
        missing.append("summary.json tells of an earlier end of this run: its results are left out.")
    state, rules = run.state(), _rules(config or "")
    files = [*_in_the_run(run, rules), *_damaged(run), *_rewound(run.directory)]
    return Report(
        name=run.name,
        shown=run.shown,
        state=state,
        holder=run.holder(),
        latest=latest.manifest if latest else {},
        summary=run.summary() if run.is_summarised() else {},
        starts=starts,
        curves=curves.read(run.directory / "metrics.csv", latest.manifest.get("monitor") if latest else None),
        files=files,
        rules=rules,
        marks=_marks(starts, files),
        pictures=list(pictures.read(run.directory, missing)),
        config=config,
        commands=_commands(run, state, latest),
        missing=missing,
    )


# -- starts ----------------------------------------------------------------------------------------------------------


def _starts(run: Run) -> list[Start]:
    return [_start(number, entry) for number, entry in enumerate(run.starts(), 1)]


def _start(number: int, entry: Mapping[str, Any]) -> Start:
    def of(name: str, kind: type, source: Mapping[str, Any] = entry) -> Any:
        return value if isinstance(value := source.get(name), kind) else None

    git = of("git", dict) or {}
    return Start(
        number,
        of("time", str) or "",
        [str(word) for word in of("argv", list) or []],
        of("step", int),
        of("checkpoint", str),
        (of("parent", dict) or {}).get("name"),
        of("took_over", str),
        of("reached", int),
        of("changed", dict) or {},
        of("host", str) or "",
        of("hardware", str) or "",
        of("world_size", int),
        of("commit", str, git),
        bool(git.get("dirty")),
        {str(name): str(version) for name, version in (of("versions", dict) or {}).items()},
    )


class _Event(NamedTuple):
    """In the order in which it is told: a fault before the resume of the same second, which it caused."""

    when: float
    order: int
    step: float
    kind: Literal["resume", "fault"]
    text: str


def _marks(starts: Sequence[Start], files: Sequence[File]) -> list[Mark]:
    """What happened, by time; the start of a new run is no event."""
    found = [event for start in starts for event in _of_start(start)]
    found += [
        _Event(file.changed, 0, file.step, "fault", f"{file.name} {file.fate}")
        for file in files
        if file.place == "damaged" and file.step is not None
    ]
    rewound = {file.fate: file for file in files if file.place == "rewound" and file.step}  # of each rewind, the last
    found += [
        _Event(file.changed, 0, file.step or 0, "fault", f"The run was at step {file.step:,} and was {fate}")
        for fate, file in rewound.items()
    ]
    return [Mark(number, one.step, one.kind, one.text) for number, one in enumerate(sorted(found), 1)]


def _of_start(start: Start) -> list[_Event]:
    when, found = _seconds(start.time), list[_Event]()
    reached = start.reached if start.reached is not None else start.step or 0
    if start.took_over and start.number > 1:
        found.append(
            _Event(when, 1, reached, "fault", f"Start {start.number - 1} was killed at step {reached:,} or later")
        )
    if start.step is None or not start.checkpoint:
        return found
    again = reached - start.step if start.number > 1 else 0
    lost = f": {plural(again, 'step')} or more trained again" if again > 0 else ""
    what = "resumed" if start.number > 1 else "began"
    origin = f" of {start.parent}" if start.number == 1 and start.parent else ""
    text = f"Start {start.number} {what} from {start.checkpoint}{origin}{lost}"
    return [*found, _Event(when, 2, start.step, "resume", text)]


def _seconds(time: str) -> float:
    try:
        return datetime.fromisoformat(time).timestamp()
    except (ValueError, OverflowError):
        return 0


# -- checkpoints -----------------------------------------------------------------------------------------------------


def _in_the_run(run: Run, rules: Mapping[str, int] | None) -> list[File]:
    listed = CheckpointStore(run.checkpoints, retention=Retention(**rules or {}))
    best, why = listed.best(), listed.reasons()
    fates = {step: _stays(words) for step, words in why.items()} if rules is not None else {}
    otherwise = "goes with the next save" if rules is not None else "whether it is kept is not known"
    return [
        replace(
            _file(one, "in the run", fates.get(one.step, otherwise)),
            latest=run.latest is not None and one.path == run.latest.path,
            best=best is not None and one.path == best.path,
        )
        for one in listed.checkpoints()
    ]


def _damaged(run: Run) -> list[File]:
    found = [(path, f"does not verify: {_wrong(path, reason)}") for path, reason in run.store.rejected()]
    found += [(path, f"was set aside: {_wrong(path, 'it verifies now')}") for path in run.corrupt()]
    return [File(path.name, "damaged", fate, manifest.step_in_name(path.name), *_size(path)) for path, fate in found]


def _wrong(path: Path, otherwise: str) -> str:
    try:
        return manifest.diagnose(path) or otherwise
    except OSError:
        return otherwise


def _rewound(directory: Path) -> list[File]:
    return [
        replace(_file(one, "rewound", f"rewound: set aside in rewound/{path.name}"), changed=_size(path)[1])
        for path in sorted((directory / "rewound").glob("*"))
        if path.is_dir()
        for one in CheckpointStore(path).checkpoints()
    ]


def _file(one: Checkpoint, place: Literal["in the run", "rewound"], fate: str) -> File:
    saved = " · ".join(str(one.manifest[key]) for key in ("created", "reason") if one.manifest.get(key))
    return File(one.path.name, place, fate, one.step, *_size(one.path), one.epoch, one.score, saved)


def _stays(why: Sequence[str]) -> str:
    """`last-2` of retention is the 2nd newest."""
    words = [re.sub(r"^(last|best)-(\d+)$", _placed, word) for word in why]
    return f"kept: {', '.join(words)}"


def _placed(match: re.Match[str]) -> str:
    kind, place = {"last": "newest", "best": "best"}[match[1]], int(match[2])
    ending = "th" if place % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"the {kind}" if place == 1 else f"{place}{ending} {kind}"


def _size(path: Path) -> tuple[int | None, int]:
    """Bytes, and the second of its last change; None and 0 where the run has deleted it since the listing."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None, 0
    return found.st_size, int(found.st_mtime)


def _rules(config: str) -> Mapping[str, int] | None:
    """What the config says of retention, with the defaults of a training; None where it is not readable."""
    with contextlib.suppress(ValueError, TypeError):  # edited by hand
        found = _parsed(config)
        group = found.get("checkpoint") if isinstance(found, dict) else None
        if isinstance(group, dict):
            given = {rule: group[rule] for rule in RULES if group.get(rule) is not None}
            Retention(**given)  # a ConfigError where a number is out of range
            return given
    return None


def _parsed(config: str) -> Any:
    from savepoint.compose import parse_yaml

    with contextlib.suppress(ValueError, TypeError, RecursionError):
        return parse_yaml(config, "config.yaml")
    return None


# -- the rest --------------------------------------------------------------------------------------------------------


def _commands(run: Run, state: str, latest: Checkpoint | None) -> list[tuple[str, str]]:
    if state == "running":
        return [("Save now, and go on", shlex.join(["touch", f"{run.shown}/save-now"]))]
    if state == "broken" or latest is None:
        return [("See what is wrong", run.command("-m", "savepoint", "verify"))]
    limits, ended = {"max_epochs": latest.epoch, "max_steps": latest.step}, latest.manifest.get("ended")
    if state == "finished" and ended in limits:
        return [("Train longer", f"{run.command('resume.py')} --trainer.{ended} {2 * max(1, limits[ended])}")]
    return [("Go on", run.command("resume.py"))]


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None
