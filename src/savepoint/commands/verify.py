"""`savepoint verify [PATH...]`: every byte of checkpoints, and the other files of a run.

Exit code 0 if all is well, 1 if a file does not verify, something in a run is broken or a directory
holds no checkpoint, 2 for a wrong path. Nothing is changed; each finding says what to do.
"""

import argparse
import contextlib
import csv
import json
import os
import shlex
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from savepoint import entry, files, find, record, words
from savepoint.checkpoint import manifest, store
from savepoint.checkpoint.store import BEST, LAST
from savepoint.commands import output
from savepoint.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointForeignError,
    CheckpointVersionError,
    ConfigError,
)
from savepoint.federated import listing
from savepoint.run import Run
from savepoint.words import plural, python

# Files of a run: checkpoints without any of them were copied from one.
_OF_A_RUN = (record.NAME, f"{record.NAME}.corrupt", "config.yaml", "lock")


class Finding(NamedTuple):
    """A fault of a run, or a note. `do` is the advice: a command or a sentence."""

    wrong: bool
    what: str
    do: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    named = "checkpoints, run directories, directories of checkpoints; default: the newest run"
    parser.add_argument("paths", metavar="PATH", nargs="*", help=named)
    deep = "look for weights and optimizer states that are not finite in each, not only the newest"
    parser.add_argument("--deep", action="store_true", help=deep)


def main(arguments: argparse.Namespace) -> int:
    named = list(map(manifest.local_path, arguments.paths)) or [Path(find.run(None).shown)]
    reports = [_look(path, deep=arguments.deep, quiet=arguments.json) for path in named]
    if arguments.json:
        output.put_json(reports)
    return 0 if all(one["well"] for one in reports) else 1


def _look(path: Path, *, deep: bool, quiet: bool) -> dict[str, Any]:
    """The results for a path; unless `quiet`, each is printed as soon as it is known."""
    if not path.exists():
        raise find.missing(path, "a checkpoint or a run directory")
    put = (lambda text: None) if quiet else output.put
    run = _run_at(path)
    results = []
    for result in _results(path, run, deep):
        results.append(result)
        put(_line(result))
    findings = list(_findings(run, results)) if run else []
    if not run and not results:
        what = f"No checkpoint there: {path}. A run directory has checkpoints/step-*.ckpt in it."
        message = f"savepoint verify: {what} {find.instead(path)}"
        print(output.named(words.printable(message)), file=sys.stderr)
    is_well = all(one["verifies"] and one["finite"] is not False for one in results)
    is_well = is_well and not any(one.wrong for one in findings) and bool(run or results)
    if run:
        where = f" at step {run.latest.step}, epoch {run.latest.epoch}" if run.latest else ""
        put("\n".join([f"{run.shown}: {run.state()}{where}", *map(_item, findings)]))
        put("  Nothing is wrong." if is_well else "  Something is wrong: see above.")
    report = {"path": path, "state": run.state() if run else None, "well": is_well}
    return report | {"files": results, "findings": [one._asdict() for one in findings]}


def _run_at(path: Path) -> Run | None:
    run = find.run_at(path)
    is_run = run and any((run.directory / name).exists() for name in _OF_A_RUN)
    return run if is_run else None


def _item(one: Finding) -> str:
    lines = [f"{'WRONG' if one.wrong else 'note '}  {one.what}", textwrap.indent(one.do, " " * 7)]
    return textwrap.indent("\n".join(lines).rstrip(), "  ")


def _line(result: Mapping[str, Any]) -> str:
    advice = textwrap.indent(result["do"], "  ")
    return f"{result['file']}: {_verdict(result)}\n{advice}".rstrip()


def _verdict(result: Mapping[str, Any]) -> str:
    if not result["verifies"]:
        return f"does not verify: {result['reason']}"
    if bad := result["not_finite"]:
        names = ", ".join([*bad[:3], *["..."] * (len(bad) > 3)])
        return f"verifies, but is not finite in {plural(len(bad), 'tensor')}: {names}"
    finite = ", loads, is finite" if result["finite"] else ""
    where = f"step {result['step']}, epoch {result['epoch']}"
    return f"verifies: {where}, {result['bytes']} bytes{finite}"


# -- files ---------------------------------------------------------------------------------------


def _results(path: Path, run: Run | None, deep: bool) -> Iterator[dict[str, Any]]:
    # A process that trains has verified its newest file, and may delete it at any moment.
    is_idle = run is not None and not run.holder()
    newest = run.latest.path.name if run and run.latest and is_idle else None
    for file in _files(path):
        try:
            result = _check(file, deep or file.name == newest)
        except FileNotFoundError:
            if file == path:
                raise
            continue  # deleted by the run since the listing
        yield result | {"do": _advice(result, run or find.run_of(file), is_named=file == path)}


def _files(path: Path) -> list[Path]:
    """The checkpoints to verify; `last` and `best` only where they are no links to one of these."""
    if not find.is_folder(path):
        return [path]
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    every = manifest.step_files(directory)
    for name in (LAST, BEST):
        pointer = directory / name
        if pointer.exists() and not any(_is_same(pointer, file) for file in every):
            every.append(pointer)
    return every


def _is_same(pointer: Path, file: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):  # deleted by the run since the listing
        return pointer.samefile(file)
    return False


def _check(path: Path, deep: bool) -> dict[str, Any]:
    """The result of reading every byte. `finite` is None where the tensors were not read."""
    result: dict[str, Any] = {"file": path, "verifies": False, "not_finite": []}
    result |= dict.fromkeys(("step", "epoch", "bytes", "finite", "logged_rows", "reason"))
    if path.is_dir() and not manifest.has_parts(path):
        return result | {"reason": "a directory, not a file"}
    try:
        facts = manifest.verify(path)
        result |= {"step": facts["step"], "epoch": facts.get("epoch")}
        result |= {"bytes": files.size(path)} | (_inside(path) if deep else {})
        result["verifies"] = True
    except FileNotFoundError:
        raise
    except CheckpointCorruptError as error:
        result["reason"] = error.reason
    except CheckpointError:
        result["reason"] = manifest.diagnose(path)
    except OSError as error:
        result["reason"] = f"cannot be read: {error.strerror}"
    return result


def _inside(path: Path) -> dict[str, Any]:
    """The weights and optimizer states that hold a NaN or an infinity."""
    with entry.importing():
        import torch

        from savepoint.checkpoint import format

    state = store.decode(path, manifest.read(path))
    leaves = format.leaves({key: state.get(key) for key in ("state_dict", "optimizer_states")})
    tensors = [(key, leaf) for key, leaf in leaves if isinstance(leaf, torch.Tensor)]
    bad = [key for key, one in tensors if not bool(torch.isfinite(format.numbers(one)).all())]
    return {"not_finite": bad, "finite": not bad, "logged_rows": state.get("logged_rows")}


def _advice(result: Mapping[str, Any], run: Run | None, *, is_named: bool) -> str:
    path = result["file"]
    if not result["verifies"]:
        return _instead_of(path, run)
    if result["not_finite"]:
        see = f", with --rewind: {run.command('-m', 'savepoint', 'ls')}" if run else "."
        return f"Choose an older one{see}"
    if not is_named:
        return ""
    resume = shlex.join([python(), "resume.py", str(path)])
    if run and run.latest and run.latest.step > result["step"]:
        return f"Go on from it, in a new run: {resume} --fork"
    return f"Go on from it: {resume}"


def _instead_of(path: Path, run: Run | None) -> str:
    """The advice for a file that does not verify."""
    quoted = shlex.quote(str(path))
    try:
        manifest.read(path)
    except CheckpointForeignError as error:
        return error.advice
    except CheckpointVersionError:
        return "Use the version of this project that wrote it."
    except PermissionError:
        return f"Permit it: chmod u+r {quoted}"
    except (CheckpointError, OSError):
        pass
    return _way_around(run) if run else "Copy it again from where it came from; no run is around."


def _way_around(run: Run) -> str:
    try:
        whole = run.store.newest_whole()
    except CheckpointError as error:  # of a newer version, or just deleted
        return str(error)
    if whole is None:
        return f"No checkpoint of its run verifies. {_start_again(run)}"
    return f"Go on from step {whole.step}: {run.command('resume.py')}"


# -- a run ---------------------------------------------------------------------------------------


def _findings(run: Run, results: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    yield from _process(run)
    yield from _quarantined(run)
    yield from _records(run)
    yield from _mirror(run)
    if not run.holder():  # a process that trains changes these files
        yield from _pointers(run)
        yield from _left_over(run)
        yield from _lost_rows(run, results)
        yield from _clients(run)
        yield from _room(run)


def _process(run: Run) -> Iterator[Finding]:
    go_on = f"Go on: {run.command('resume.py')}"
    state = run.state()
    if holder := run.holder():
        yield Finding(False, f"{holder} trains here now.")
    elif (dead := run.left_by()) and state != "finished":
        yield Finding(False, f"{dead} died while it trained here.", go_on if run.latest else "")
    elif state == "stopped":
        has_ended = run.latest is not None and run.latest.manifest.get("ended")
        what = "Its training ended, the test was not made." if has_ended else "It was stopped."
        yield Finding(False, what, go_on)
    for directory in _directories(run):
        if not os.access(directory, os.W_OK):
            what = f"This user cannot write in {directory}: it cannot go on here."
            yield Finding(True, what, shlex.join(["chmod", "u+w", str(directory)]))


def _mirror(run: Run) -> Iterator[Finding]:
    """By what the run itself has noted; the mirror is not asked."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        noted = json.loads((run.directory / "mirror.json").read_text())
        step = noted["step"]
        if run.latest is not None and step != run.latest.step:
            where = "has nothing of it" if step is None else f"is at step {step}"
            what = f"The mirror {where}, the run at step {run.latest.step}: {noted['url']}."
            yield Finding(False, what, noted.get("failure") or "")


def _directories(run: Run) -> list[Path]:
    both = dict.fromkeys((run.directory, run.checkpoints))
    return [directory for directory in both if directory.exists()]


def _quarantined(run: Run) -> Iterator[Finding]:
    for path in run.corrupt():
        what = f"{path.name} is quarantined: {manifest.diagnose(path)}."
        yield Finding(False, what, f"Nothing needs it: {shlex.join(['rm', str(path)])}")
    if run.latest is None and not run.store.rejected():
        yield Finding(True, "It has no checkpoint that verifies.", _start_again(run))


def _start_again(run: Run) -> str:
    """The command that began the run: under its name where it never had a checkpoint, else under
    another.
    """
    argv: list[str] = next((start["argv"] for start in run.starts()), [])
    begun = [python(), *map(str, argv or ["train.py"])]
    if not argv:
        return f"Start another one: {shlex.join(begun)}"
    is_new = Path(begun[1]).name == "train.py"
    if is_new and not (run.corrupt() or run.store.rejected()):
        return f"Start it again: {shlex.join([*begun, '--run_name', run.name, '--resume', 'auto'])}"
    other = ["--run_name", f"{run.name}-2"] if is_new else []
    return f"Start it again, under another name: {shlex.join([*begun, *other])}"


def _records(run: Run) -> Iterator[Finding]:
    if not run.starts():
        what = f"{_lack(run, record.NAME)}: the record of the starts is lost."
        do = "Nothing to do: the next resume begins a new one from the checkpoints."
        yield Finding(True, what, do)
    if run.is_summary_damaged():
        do = f"Write it again: {run.command('resume.py')}"
        yield Finding(True, "summary.json is damaged.", do)
    config = run.directory / "config.yaml"
    if not _reads_as_config(config):
        show = run.command("-m", "savepoint", "show", "--only", "config")
        do = f"{show} > {shlex.quote(str(config))}" if run.latest else ""
        yield Finding(True, f"{_lack(run, config.name)}.", do)


def _lack(run: Run, name: str) -> str:
    return f"{name} is {'damaged' if (run.directory / name).exists() else 'missing'}"


def _reads_as_config(path: Path) -> bool:
    from savepoint.config.compose import parse_yaml

    with contextlib.suppress(OSError, UnicodeDecodeError, ConfigError):
        return isinstance(parse_yaml(path.read_text(), path.name), dict)
    return False


def _pointers(run: Run) -> Iterator[Finding]:
    for name, target in ((LAST, run.latest), (BEST, run.store.best())):
        if target and _digest(run.checkpoints / name, target.path) != target.manifest["digest"]:
            do = f"Point it there: {run.command('-m', 'savepoint', 'gc')}"
            yield Finding(True, f"{name} does not show {target.path.name}.", do)


def _digest(pointer: Path, target: Path) -> str | None:
    """None where it does not verify. A link to `target` was verified with it."""
    with contextlib.suppress(CheckpointError, OSError):
        read = manifest.read if pointer.samefile(target) else manifest.verify
        return str(read(pointer)["digest"])
    return None


def _left_over(run: Run) -> Iterator[Finding]:
    temps = list(chain.from_iterable(map(files.stale_temps, _directories(run))))
    if temps:
        size = words.megabytes(sum(find.size(path) or 0 for path in temps))
        what = f"{plural(len(temps), 'file')} that a process was writing when it died, {size}."
        do = f"The next resume deletes them, or: {run.command('-m', 'savepoint', 'gc')}"
        yield Finding(False, what, do)


def _lost_rows(run: Run, results: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    loaded = [one for one in results if isinstance(one["logged_rows"], int)]
    newest = max(loaded, key=lambda one: int(one["step"]), default=None)
    there = _rows(run.directory / "metrics.csv")
    if newest and there < newest["logged_rows"]:
        counted = f"{newest['logged_rows']} rows that {newest['file'].name} counts"
        what = f"metrics.csv has {there} of the {counted}: the others are lost."
        do = "Put a copy of it back. Without one the curve has a gap; the training is the same."
        yield Finding(True, what, do)


def _clients(run: Run) -> Iterator[Finding]:
    """The states of the clients of a federated run, and whether the newest checkpoint finds its."""
    found = listing.summary(run.directory)
    if found is None:
        return
    bad = list(listing.damaged(run.directory))
    for path, reason in bad:
        yield Finding(True, f"{path.relative_to(run.directory)} does not verify: {reason}.")
    is_whole = run.latest is not None and run.latest.manifest.get("kind") == "federated"
    for _, why in listing.lost(run.directory, run.latest.path) if run.latest and is_whole else ():
        yield Finding(True, why)
    if not bad:
        states = plural(found["states"], "state")
        yield Finding(False, f"{states} of {plural(found['clients'], 'client')}: all verify.")


def _rows(path: Path) -> int:
    try:
        with path.open(newline="", errors="replace") as file:
            return sum(1 for _ in csv.DictReader(file))
    except (FileNotFoundError, csv.Error):
        return 0


def _room(run: Run) -> Iterator[Finding]:
    if run.latest is None:
        return
    size = files.size(run.latest.path)
    disk = os.statvfs(run.checkpoints)
    free = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and free < 2 * size:  # some file systems report no blocks
        figures = f"{words.megabytes(free)} free, a checkpoint takes {words.megabytes(size)}"
        do = f"Free some space; see {run.command('-m', 'savepoint', 'gc', '--dry-run')}"
        yield Finding(True, f"Too little room: {figures}.", do)
