"""`savepoint doctor FILE|RUN_DIR`: exit code 1 if something is wrong. Nothing is changed; each finding names a command."""

import argparse
import contextlib
import csv
import os
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from savepoint import files, find, words
from savepoint.checkpoint import manifest
from savepoint.checkpoint.store import BEST, LAST
from savepoint.commands import output, verify
from savepoint.errors import (
    CheckpointError,
    CheckpointForeignError,
    CheckpointNotFoundError,
    CheckpointVersionError,
    ConfigError,
)
from savepoint.run import Run
from savepoint.words import plural, python

_EXPORT = "Save its weights where it was made, with torch.save(model.state_dict(), FILE), and name that file."
# What `manifest.diagnose` calls a file of another program -> what helps.
_FOREIGN = (
    ("git-LFS", "Fetch it: git lfs pull --include {file}"),
    ("HTML page", "Look at it in a browser, and download the file again."),
    ("compressed", "Unpack it, and name what comes out."),
    ("tar archive", "Unpack it, and name what comes out: tar -xf {file}"),
    ("TorchScript", _EXPORT),
    ("safetensors", "Start from its weights: {python} train.py --init_from {file}"),
    (
        "torch.save",
        "Start from its weights: {python} train.py --init_from {file}\n"
        "         or with its epoch and best as well: {python} resume.py {file} --config configs/mnist.yaml",
    ),
    ("pickled", _EXPORT),
)


@dataclass(frozen=True)
class Finding:
    """`wrong`: or else worth knowing. `do` is a command, or a sentence."""

    wrong: bool
    what: str
    do: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="FILE|RUN_DIR", nargs="?", help="default: the newest run under outputs/")


def main(arguments: argparse.Namespace) -> int:
    given = arguments.path and manifest.local_path(arguments.path)
    if given and not given.is_dir():
        if not given.exists():
            raise find.missing(given, "a checkpoint or a run directory")
        title, findings = str(given), list(_file(given))
    else:
        examined = find.run(arguments.path)
        title, findings = f"{examined.shown}: {_state(examined)}", list(_run(examined))
    wrong = [finding for finding in findings if finding.wrong]
    if arguments.json:
        output.put_json({"what": title, "findings": [asdict(finding) for finding in findings]})
    else:
        output.put("\n".join([title, *map(_text, findings), *([] if wrong else ["  Nothing is wrong."])]))
    return 1 if wrong else 0


def _text(finding: Finding) -> str:
    head = f"  {'WRONG' if finding.wrong else 'note '}  {finding.what}"
    return f"{head}\n         {finding.do}" if finding.do else head


# -- a file ----------------------------------------------------------------------------------------------------------


def _file(path: Path) -> Iterator[Finding]:
    try:
        facts = manifest.verify(path)
    except CheckpointError:
        yield Finding(True, f"It does not verify: {manifest.diagnose(path)}.", _advice(path))
    except OSError as error:
        yield Finding(True, f"It cannot be read: {error.strerror}.", f"Permit it: {_quoted('chmod', 'u+r', path)}")
    else:
        what = f"It verifies: step {facts['step']}, epoch {facts.get('epoch')}, every byte as it was written."
        run = find.run_of(path)
        older = run is not None and run.latest is not None and run.latest.step > facts["step"]
        command = _quoted(python(), "resume.py", path)
        yield Finding(
            False, what, f"Go on from it{', in a new run' if older else ''}: {command}{' --fork' if older else ''}"
        )


def _advice(path: Path) -> str:
    """For a file that does not verify."""
    reason = manifest.diagnose(path)
    try:
        manifest.read(path)
    except CheckpointForeignError:
        advice = next((text for kind, text in _FOREIGN if kind in reason), "It is no checkpoint. Name another file.")
        return advice.format(file=shlex.quote(str(path)), python=python())
    except CheckpointVersionError:
        return "Use the version of this project that wrote it."
    except (CheckpointError, OSError):
        pass
    run = find.run_of(path)
    if run is None:
        return "Copy it again from where it came from; here it cannot be mended."
    if whole := run.store.newest_whole():
        return f"Go on from step {whole.step}: {run.command('resume.py')}"
    return f"No checkpoint of its run verifies. {_start_again(run)}"


def _damage(path: Path) -> str | None:
    """Why it does not verify; None where it does, or where the run has deleted it since the listing."""
    try:
        reason: str | None = verify.check(path)["reason"]
    except CheckpointNotFoundError:
        return None
    return reason


def _quoted(*words: str | Path) -> str:
    return shlex.join(map(str, words))


# -- a run -----------------------------------------------------------------------------------------------------------


def _state(run: Run) -> str:
    where = f" at step {run.latest.step}, epoch {run.latest.epoch}" if run.latest else ""
    return f"{run.state()}{where}"


def _run(run: Run) -> Iterator[Finding]:
    yield from _process(run)
    yield from _checkpoints(run)
    yield from _records(run)
    if not run.holder():  # what a process that trains is just changing
        yield from _pointers(run)
        yield from _left_over(run)
        yield from _newest(run)
        yield from _room(run)


def _process(run: Run) -> Iterator[Finding]:
    go_on = f"Go on: {run.command('resume.py')}"
    state = run.state()
    if holder := run.holder():
        yield Finding(False, f"{holder} trains here now.")
    elif (dead := run.left_by()) and state != "finished":
        yield Finding(False, f"{dead} died while it trained here.", go_on if run.latest else "")
    elif state == "stopped":
        ended = run.latest is not None and run.latest.manifest.get("ended")
        yield Finding(False, "Its training ended, the test was not made." if ended else "It was stopped.", go_on)
    for directory in (run.directory, run.checkpoints):
        if not os.access(directory, os.W_OK):
            what = f"This user cannot write in {directory}: it cannot go on here."
            yield Finding(True, what, _quoted("chmod", "u+w", directory))


def _checkpoints(run: Run) -> Iterator[Finding]:
    for one in run.store.checkpoints():
        if reason := _damage(one.path):
            yield Finding(True, f"{one.path.name} does not verify: {reason}.", _advice(one.path))
    for path, reason in run.store.rejected():
        yield Finding(True, f"{path.name} does not verify: {reason}.", _advice(path))
    for path in run.corrupt():
        what = f"{path.name} was set aside: {manifest.diagnose(path)}."
        yield Finding(False, what, f"Nothing needs it: {_quoted('rm', path)}")
    if run.latest is None and not run.store.rejected():
        yield Finding(True, "It has no checkpoint that verifies.", _start_again(run))


def _start_again(run: Run) -> str:
    """The command that began the run: under its own name where no checkpoint was ever made, else under another."""
    argv: list[str] = next((start["argv"] for start in run.starts()), [])
    if not argv:
        return f"Start another one: {python()} train.py"
    words = [python(), *map(str, argv)]
    if Path(words[1]).name != "train.py":
        return f"Start it again, under another name: {shlex.join(words)}"
    if run.corrupt() or run.store.rejected():
        return f"Start it again, under another name: {shlex.join([*words, '--run_name', f'{run.name}-2'])}"
    return f"Start it again: {shlex.join([*words, '--run_name', run.name, '--resume', 'auto'])}"


def _pointers(run: Run) -> Iterator[Finding]:
    for name, target in ((LAST, run.latest), (BEST, run.store.best())):
        if target is None:
            continue
        try:
            pointer = run.checkpoints / name
            look = (
                manifest.read if pointer.samefile(target.path) else manifest.verify
            )  # a link was looked at whole already
            found = look(pointer)["digest"]
        except (CheckpointError, OSError):
            found = None
        if found != target.manifest["digest"]:
            what = f"{name} does not show {target.path.name}."
            yield Finding(True, what, f"Point it there: {run.command('-m', 'savepoint', 'gc')}")


def _left_over(run: Run) -> Iterator[Finding]:
    temps = [*files.stale_temps(run.checkpoints), *files.stale_temps(run.directory)]
    if temps:
        size = words.megabytes(sum(path.lstat().st_size for path in temps))
        what = f"{plural(len(temps), 'file')} that a process was writing when it died, {size}."
        yield Finding(False, what, f"The next resume deletes them, or: {run.command('-m', 'savepoint', 'gc')}")


def _records(run: Run) -> Iterator[Finding]:
    if not run.starts():
        do = "Nothing to do: the next resume begins a new one; the checkpoints hold all that it needs."
        yield Finding(True, f"run.json is {_lack(run, 'run.json')}: the record of the starts is lost.", do)
    if run.is_summary_damaged():
        yield Finding(True, "summary.json is damaged.", f"Write it again: {run.command('resume.py')}")
    if not _reads_as_config(run.directory / "config.yaml"):
        do = f"{run.command('-m', 'savepoint', 'show', '--only', 'config')} > {_quoted(run.directory / 'config.yaml')}"
        yield Finding(True, f"config.yaml is {_lack(run, 'config.yaml')}.", do if run.latest else "")


def _lack(run: Run, name: str) -> str:
    return "damaged" if (run.directory / name).exists() else "missing"


def _reads_as_config(path: Path) -> bool:
    from savepoint.config.compose import parse_yaml

    with contextlib.suppress(OSError, UnicodeDecodeError, ConfigError):
        return isinstance(parse_yaml(path.read_text(), path.name), dict)
    return False


def _newest(run: Run) -> Iterator[Finding]:
    """What stands inside the newest checkpoint, and so needs torch."""
    if run.latest is None or _damage(run.latest.path):
        return
    from savepoint.checkpoint import format

    state = format.decode(run.latest.path)
    if bad := verify.not_finite(state):
        where = f"{plural(len(bad), 'tensor')}: {', '.join(bad[:3])}"
        what = f"{run.latest.path.name} holds numbers that are not finite, in {where}."
        yield Finding(True, what, f"Choose an older one, with --rewind: {run.command('-m', 'savepoint', 'ls')}")
    counted, rows = state.get("logged_rows") or 0, _rows(run.directory / "metrics.csv")
    if rows < counted:
        what = f"metrics.csv has {rows} of the {counted} rows that {run.latest.path.name} counts: the others are lost."
        yield Finding(
            True, what, "Put a copy of it back. Without one the curve has a gap; the training is not touched."
        )


def _rows(path: Path) -> int:
    try:
        with path.open(newline="", errors="replace") as file:
            return sum(1 for _ in csv.DictReader(file))
    except (FileNotFoundError, csv.Error):
        return 0


def _room(run: Run) -> Iterator[Finding]:
    if run.latest is None:
        return
    size, disk = run.latest.path.stat().st_size, os.statvfs(run.checkpoints)
    free = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and free < 2 * size:  # no blocks: a file system that does not say
        what = f"Too little room: {words.megabytes(free)} free, a checkpoint takes {words.megabytes(size)}."
        yield Finding(True, what, f"Free some space; see {run.command('-m', 'savepoint', 'gc', '--dry-run')}")
