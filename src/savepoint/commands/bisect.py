"""`savepoint bisect A B`: the first step at which two runs differ, and what differs there first.

Checkpoints that both runs have are compared, and both are trained again between the last ones that
agree and the first ones that do not. The runs are only read. Exit code 0 where they are equal, 1
where they differ.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from savepoint import entry, find, words
from savepoint.commands import output
from savepoint.commands.replay import add_allow
from savepoint.errors import ConfigError
from savepoint.replay.side import Keep, Part, record
from savepoint.replay.stretch import Pair, Stretch, choose
from savepoint.run import Run
from savepoint.words import plural, show

if TYPE_CHECKING:
    from savepoint.checkpoint.store import Checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name in "ab":
        parser.add_argument(name, metavar=name.upper(), help="a run directory")
    python = "the interpreter that B is trained with: of another environment"
    parser.add_argument("--python", metavar="PATH", type=Path, help=python)
    add_allow(parser)


def main(arguments: argparse.Namespace) -> int:
    runs = [find.run(arguments.a), find.run(arguments.b)]
    if arguments.python is not None and not arguments.python.is_file():
        raise ConfigError(
            f"No interpreter there: {arguments.python}. A program such as .venv/bin/python was "
            "expected. Name one."
        )
    for run in runs:
        if not run.store.checkpoints():
            raise ConfigError(
                f"No checkpoint to begin at: {show(run.directory)}. Two runs with checkpoints were "
                "expected. To compare their configs: diff A/config.yaml B/config.yaml"
            )

    with entry.importing():
        import savepoint.replay.recording  # noqa: F401

    found = _bisected(runs, arguments)
    if arguments.json:
        output.put_json(found)
    else:
        output.put(_text(found))
    return 0 if found["equal"] else 1


def _bisected(runs: Sequence[Run], arguments: argparse.Namespace) -> dict[str, Any]:
    from savepoint.replay import choice

    a, b = runs
    found: dict[str, Any] = {"a": a.directory, "b": b.directory, "equal": True, "notes": []}
    # Refuses what cannot be replayed before anything is compared.
    sources = [choice.load(run.store.checkpoints()[0].path) for run in runs]
    found["config"] = _configs(*(source.state for source in sources))
    found["data"] = _data(*(source.state for source in sources))
    agreed, differing, parts = _compared(a, b)
    row, until = _first_row(runs, agreed)
    found |= {"agree": agreed[-1][0].step if agreed else None, "row": row, "parts": parts}
    found["differ"] = differing[0].step if differing else None
    replays = arguments.python is not None
    stretch = choose(runs, agreed, differing, parts, replays=replays, until=until)
    if stretch is None:
        found["equal"] = row is None
        return found
    found |= {"from": 0 if stretch.anew else stretch.begin[0].step, "to": stretch.step}
    found["notes"] = list(_notes(runs, stretch, arguments))
    last = min(run.store.checkpoints()[-1].step for run in runs)
    with tempfile.TemporaryDirectory(prefix="bisect-") as scratch:
        found |= _trained(runs, stretch, Path(scratch), arguments)
        if _shows_later(found) and stretch.step < last:
            # A schedule, say, or data of which these steps have used nothing yet.
            stretch = replace(stretch, step=last, at=None, end=None)
            found |= {"to": last} | _trained(runs, stretch, Path(scratch), arguments)
    wrong = (row, found["differ"], found["first"], found["replayed_row"], found["ended"])
    found["equal"] = not any(wrong) and not found["ends"]["each other"]
    return found


def _shows_later(found: Mapping[str, Any]) -> bool:
    """Whether what differs in the state at the end has made no difference to a batch yet."""
    return found["first"] is None and bool(found["ends"]["each other"]) and not found["ended"]


# -- what the runs have ---------------------------------------------------------------------------


def _configs(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    from savepoint.resume.plan import differences

    return {key: list(pair) for key, pair in differences(one["config"], other["config"]).items()}


def _data(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The data in memory that have other values, as `training loader 0.dataset.tensors`."""
    was = one.get("numbers") or {}
    now = other.get("numbers") or {}
    return [name for name in was if name in now and was[name] != now[name]]


def _compared(a: Run, b: Run) -> tuple[list[Pair], Pair | None, list[str]]:
    """The checkpoints of the same steps that agree in all values, up to the first that do not;
    these; and the parts in which they differ.
    """
    from savepoint.replay import differing

    others = {_place(one): one for one in b.store.checkpoints()}
    pairs = [(one, others[_place(one)]) for one in a.store.checkpoints() if _place(one) in others]
    agreed: list[Pair] = []
    for one, other in pairs:
        print(f"Comparing the checkpoints of step {one.step}", file=sys.stderr, flush=True)
        if parts := differing.parts(find.load(one.path)[0], find.load(other.path)[0]):
            return agreed, (one, other), parts
        agreed.append((one, other))
    return agreed, None, []


def _place(one: "Checkpoint") -> tuple[int, Any]:
    return one.step, one.manifest.get("at")


def _first_row(
    runs: Sequence[Run], agreed: Sequence[Pair]
) -> tuple[dict[str, Any] | None, int | None]:
    """The first row in which the logs differ, and the step up to which the runs have to be trained
    to see it where it stands behind all checkpoints that agree.
    """
    from savepoint.replay import rows

    skips = [0, 0]
    if any(start.get("checkpoint") for run in runs for start in run.starts()[:1]):
        if not agreed:  # that of a fork begins at its checkpoint
            return None, None
        skips = [find.load(one.path)[0].get("logged_rows") or 0 for one in agreed[0]]
    logs = [run.directory / "metrics.csv" for run in runs]
    compared = rows.compare(logs[0], skips[0], logs[1], skips[1])
    row = compared.differing
    if row is None or not agreed:
        return row, None
    known = find.load(agreed[-1][0].path)[0].get("logged_rows") or 0
    if skips[0] + compared.equal < known:
        return row, None
    lasts = [run.store.checkpoints()[-1].step for run in runs]
    return row, max(*lasts, row["step"] + 1)


def _notes(runs: Sequence[Run], stretch: Stretch, arguments: argparse.Namespace) -> Iterator[str]:
    from savepoint.replay import choice

    for name, run, begin, config in zip("AB", runs, stretch.begin, stretch.configs, strict=True):
        source = choice.load(begin.path, None if arguments.allow_code else run)
        # A changed config of a resume is no reservation where the replay has it, too.
        end = source.manifest["step"] if stretch.anew else stretch.step
        for note in choice.reservations(
            run, source, end, anew=stretch.anew, resumed=config is not None
        ):
            yield f"{name}: {note}"


# -- what comes out again -------------------------------------------------------------------------


def _trained(
    runs: Sequence[Run], stretch: Stretch, scratch: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    from savepoint.replay import differing, rows

    parts = [
        Part(
            str(begin.path.absolute()),
            stretch.step,
            stretch.at,
            anew=stretch.anew,
            config=config,
            allow=arguments.allow,
        )
        for begin, config in zip(stretch.begin, stretch.configs, strict=True)
    ]
    pythons = (None, arguments.python)
    sides = []
    scratch = Path(tempfile.mkdtemp(dir=scratch))
    for name, run, part, python in zip("ab", runs, parts, pythons, strict=True):
        _say(f"Training {name.upper()}, {show(run.directory)}", stretch)
        sides.append(record(part, scratch / name, python=python))
    first = differing.first(*(side.batches for side in sides))
    log = rows.compare(sides[0].log, 0, sides[1].log)
    found: dict[str, Any] = {
        "first": first and asdict(first),
        "replayed_row": log.differing,
        "ends": differing.ends(sides, stretch.end),
        "ended": {
            name: side.batches[-1]["step"] if side.batches else begin.step
            for name, side, begin in zip("AB", sides, stretch.begin, strict=True)
            if side.end is None
        },
        "environment": [side.environment for side in sides],
        "unstable": [],
    }
    if first is None:
        return found
    again = []
    keep = Keep(first.line, [(kind, names[0]) for kind, names in first.places.items()])
    for name, part, python in zip("ab", parts, pythons, strict=True):
        _say(f"Training {name.upper()} again, for the values", replace(stretch, step=first.step))
        shorter = replace(part, step=first.step, at=None)
        again.append(record(shorter, scratch / f"{name}-again", keep=keep, python=python))
    for name, side, other in zip("AB", sides, again, strict=True):
        own = differing.first(side.batches[: len(other.batches)], other.batches)
        if own is not None:
            found["unstable"].append({"run": name, **asdict(own)})
    found["sizes"] = differing.sizes(first, *(side.kept() for side in again))
    return found


def _say(what: str, stretch: Stretch) -> None:
    begin = 0 if stretch.anew else stretch.begin[0].step
    print(f"{what}: steps {begin + 1} to {stretch.step}", file=sys.stderr, flush=True)


# -- the text -------------------------------------------------------------------------------------


def _text(found: Mapping[str, Any]) -> str:
    lines = [words.table((), [("A", show(found["a"])), ("B", show(found["b"]))])]
    if found["config"]:
        rows = [(key, str(was), str(now)) for key, (was, now) in found["config"].items()]
        lines += ["", words.table(("config", "A", "B"), rows)]
    lines += ["", *(f"note: {note}" for note in found["notes"]), *_environments(found)]
    if found["data"]:
        lines.append(f"Their data differ: {', '.join(found['data'][:5])}.")
    lines += [_checkpoints(found)]
    if found["row"]:
        lines.append(f"The first row of their logs that differs: {_row(found['row'])}.")
    if "first" in found:
        lines += ["", *_outcome(found)]
    elif not found["equal"]:
        lines.append("All their checkpoints are equal: the log alone is not.")
    return "\n".join(lines)


def _environments(found: Mapping[str, Any]) -> Iterator[str]:
    if "environment" not in found:
        return
    one, other = found["environment"]
    for key, was in one.items():
        now = other[key]
        if isinstance(was, Mapping):
            names = [name for name in was if was[name] != now.get(name)]
            for name in names:
                yield f"environment: {name} {was[name]} for A, {now.get(name)} for B"
        elif was != now:
            yield f"environment: {key} {was} for A, {now} for B"


def _checkpoints(found: Mapping[str, Any]) -> str:
    agree = found["agree"]
    if found["differ"] is None and agree is not None:
        return f"Equal up to step {agree}: all values of all checkpoints that both have."
    last = "They agree in no checkpoint." if agree is None else f"They agree at step {agree}."
    if found["differ"] is None:
        return f"{last} They have none of the same step."
    return f"{last} At step {found['differ']} they do not: {', '.join(found['parts'][:5])}."


def _outcome(found: Mapping[str, Any]) -> Iterator[str]:
    first = found["first"]
    stretch = f"trained again from step {found['from']} to {found['to']}"
    if first is None:
        yield from _nothing_found(found, stretch)
        return
    kind, *others = first["places"]
    place = f"step {first['step']} (epoch {first['epoch'] + 1}, batch {first['batch'] + 1})"
    yield f"First difference: {place}, {stretch}"
    yield f"  {_named(kind, first['places'][kind])}: {_shown(found['sizes'][kind])}"
    for other in others:
        yield f"  then {_named(other, first['places'][other])}: {_shown(found['sizes'][other])}"
    for one in found["unstable"]:
        kind, *_ = one["places"]
        yield (
            f"{one['run']} is not deterministic: trained twice, it differs from itself at step "
            f"{one['step']}, {_named(kind, one['places'][kind])}."
        )


def _nothing_found(found: Mapping[str, Any], stretch: str) -> Iterator[str]:
    ends = found["ends"]
    for name, step in found["ended"].items():
        yield f"{name}, {stretch}, ended at step {step}, by the limits of its config."
    if found["ended"]:
        yield "Every batch that both have trained is equal."
        return
    if found["replayed_row"]:
        yield f"Every batch is equal, {stretch}; a row of the logs is not: "
        yield f"  {_row(found['replayed_row'])}"
    if ends["each other"]:
        yield f"Every batch is equal, {stretch}. The state at the end is not: "
        yield f"  {', '.join(ends['each other'])}"
        return
    yield f"Equal, {stretch}: every batch, and the state at the end."
    wrong = {name: parts for name, parts in ends.items() if parts}
    for name, parts in wrong.items():
        yield (
            f"{name}'s checkpoint of step {found['to']} does not come out again: "
            f"{', '.join(parts[:5])} differ from what was saved."
        )
    if wrong and found["differ"] is not None:
        yield (
            "What made the difference is not in the training as it runs here: other code or "
            "packages then, a change of the file, or an operation that is not deterministic."
        )


def _named(kind: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{kind} of {names[0]}{more}"


def _shown(size: Mapping[str, Any]) -> str:
    if not size:
        return "equal when it was trained again"
    if "missing" in size:
        return f"not in {size['missing']}"
    if "values" in size:
        was, now = size["values"]
        return "other values" if was is now is None else f"{was} in A, {now} in B"
    relative = words.number(size["relative"])
    apart = f"largest difference {size['largest']:.3g}, relative {relative}"
    return f"{apart}, {size['differing']:,} of {plural(size['of'], 'value')}"


def _row(row: Mapping[str, Any]) -> str:
    values = "; ".join(
        f"{name} {was} in A, {now} in B" for name, (was, now) in list(row["values"].items())[:3]
    )
    return f"step {row['step']}, {values}"
