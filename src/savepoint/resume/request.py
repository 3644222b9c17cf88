"""The command line of resume.py: its run or file, and its flags. All that needs no torch."""

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from savepoint import files, record
from savepoint.checkpoint import manifest
from savepoint.config import compose, quick
from savepoint.errors import CheckpointForeignError, CheckpointNotFoundError, ConfigError
from savepoint.find import is_folder, newest_run, run_directory, two_checkpoints
from savepoint.job import requeued
from savepoint.mirror.fetch import fetch
from savepoint.run import Run, check_name
from savepoint.words import nearest, python, show

USAGE = """\
usage: python resume.py [CKPT | RUN_DIR] [--KEY VALUE]...

  python resume.py                                      the newest run under outputs/
  python resume.py outputs/first                        its latest checkpoint that verifies
  python resume.py outputs/first --trainer.max_epochs 20
  python resume.py FILE --config CONFIG.yaml            a file of another program: its weights,
                                                        and what else it has

  --best            the best checkpoint of the run, not the latest
  --plan            print what would be restored and changed, and stop
  --allow KEY       let an override change the trajectory (model.lr, data.batch_size, world_size,
                    dataset ...)
  --fork [NAME]     a new run from the checkpoint; the old one stays as it is
  --rewind          go on from an older checkpoint; later ones and their log rows go to rewound/
  --output_dir DIR  where runs are looked for (outputs)

Every key of the config can be given, as for train.py.
"""

FLAGS = ("--best", "--plan", "--allow", "--fork", "--rewind")


@dataclass
class Request:
    """The command line of resume.py, with an existing run directory or a verified file."""

    run_dir: Path | None = None
    file: Path | None = None  # the one that the user named, or the best: no fallback to another
    foreign: bool = False
    best: bool = False
    plan: bool = False
    rewind: bool = False
    fork: str | None = None  # its name; "" for the default one
    allow: list[str] = field(default_factory=list)
    output_dir: str = "outputs"
    overrides: list[str] = field(default_factory=list)


def requested(argv: Sequence[str]) -> Request | None:
    """The request in `argv`; None after `--help`.

    Raises:
        CheckpointNotFoundError, CheckpointCorruptError, CheckpointForeignError,
            CheckpointVersionError: about the target.
        ConfigError: about the flags.
    """
    request, target = _parse(argv)
    if request is None:
        print(USAGE, end="")
        return None
    files.refuse_url(request.output_dir, "output_dir")
    if requeued() and not request.plan:
        target = _once(request, target)
    if target is None:
        request.run_dir = newest_run(Path(request.output_dir))
    else:
        _find(request, target)
    flags = [word.split("=")[0] for word in request.overrides]
    if request.foreign and "--config" not in flags and "-c" not in flags:
        raise CheckpointForeignError(
            f"Not written by Savepoint: {request.file}. The file holds no config. Name one: "
            f"{python()} resume.py {request.file} --config CONFIG.yaml",
            request.file or "",
        )
    _check_overrides(request)
    if request.run_dir is not None and request.fork is None and not request.plan:
        Run(request.run_dir).refuse_if_held()
    return request


def _once(request: Request, target: str | None) -> str | None:
    """The target of a requeued job, which runs the same command again: a fork that was begun goes
    on, and a rewind is refused.
    """
    fork = Path(request.output_dir) / (request.fork or "")
    if request.fork and manifest.step_files(fork / "checkpoints"):
        request.fork = None
        request.best = False
        return str(fork)
    if request.rewind or request.fork == "":
        flag = "--rewind" if request.rewind else "--fork"
        raise ConfigError(
            f"{flag} in a job that SLURM requeued: each start of the job would begin anew. A job "
            "that is requeued must go on. Submit: python resume.py RUN_DIR, or --fork NAME"
        )
    return target


def _check_overrides(request: Request) -> None:
    """Raises ConfigError for the flags where the run has its config.yaml; without it they are
    checked after the imports.
    """
    if request.foreign:
        quick.check(request.overrides)
    elif request.run_dir is not None and (config := request.run_dir / "config.yaml").is_file():
        try:
            base = config.read_text()
            compose.compose([], base=base)
        except (OSError, ValueError, AttributeError):
            return  # damaged: the config in the checkpoint counts
        quick.check(request.overrides, base=base)


class _Words:
    """The words of a command line, taken one after the other."""

    def __init__(self, words: Sequence[str]) -> None:
        self.left = list(words)

    def has_value(self) -> bool:
        return bool(self.left) and not self.left[0].startswith("--")

    def value(self, word: str) -> str:
        """The value of the flag `word`: after its `=`, or the next word."""
        flag, equals, value = word.partition("=")
        if equals:
            return value
        if not self.has_value():
            raise ConfigError(
                f"No value after {flag}. Expected: {flag} VALUE. See: python resume.py --help"
            )
        return self.left.pop(0)


def _parse(argv: Sequence[str]) -> tuple[Request | None, str | None]:
    request = Request()
    target = None
    words = _Words(argv)
    while words.left:
        word = words.left.pop(0)
        flag, equals, _ = word.partition("=")
        if word in ("-h", "--help"):
            return None, None
        if word in ("--best", "--plan", "--rewind"):
            setattr(request, word[2:], True)
        elif flag == "--allow":
            request.allow += words.value(word).split(",")
        elif flag == "--output_dir":
            request.output_dir = words.value(word)
            request.overrides += ["--output_dir", request.output_dir]
        elif flag == "--fork":
            has_name = equals or (words.has_value() and not os.path.exists(words.left[0]))
            request.fork = words.value(word) if has_name else ""
        elif word.startswith("-"):
            _refuse_unknown(flag)
            request.overrides.append(word)
            if not equals and words.has_value():
                request.overrides.append(words.left.pop(0))
        elif target is not None:
            raise two_checkpoints(target, word)
        else:
            target = word
    if request.fork:
        check_name(request.fork)
    if request.rewind and request.fork is not None:
        raise ConfigError(
            "Both --fork and --rewind. The first makes a new run, the second goes on with the same "
            "run from an earlier step. Give one of them."
        )
    return request, target


def _refuse_unknown(flag: str) -> None:
    """Raises ConfigError for a flag that is no key of a config, and near to one of resume.py's."""
    near = nearest(flag, FLAGS)
    if near and flag.removeprefix("--").split(".")[0] not in compose.KEYS:
        raise ConfigError(f"Unknown flag: {flag}.{near}")


def _find(request: Request, target: str) -> None:
    """Sets the run directory, or the file that is verified here."""
    # A file elsewhere, and whatever a web server has, is no mirrored run: refused below.
    if files.is_url(target) and not target.startswith("http") and not target.endswith(".ckpt"):
        target = str(fetch(target, Path(request.output_dir)))
    path = manifest.local_path(target)
    try:
        is_directory = is_folder(path)
    except OSError as error:
        raise CheckpointNotFoundError(
            f"Not a path: {target[:200]} ({error.strerror}). Expected a checkpoint or a run "
            "directory. Check the path.",
            path,
        ) from None
    if is_directory:
        request.run_dir = run_directory(path)
        if not manifest.step_files(request.run_dir / "checkpoints"):
            raise CheckpointNotFoundError(
                f"No checkpoint in this directory: {show(path.absolute())}. A run directory has "
                f"checkpoints/step-*.ckpt in it. {_nearest(target, request)}",
                path,
            )
        return
    try:
        manifest.verify(path)
    except CheckpointForeignError as error:
        if not error.has_weights:
            raise
        request.foreign = True
    except CheckpointNotFoundError as error:
        raise CheckpointNotFoundError(f"{error} {_nearest(target, request)}", path) from None
    request.file = path
    parent = path.absolute().parent
    if parent.name == "checkpoints" and (parent.parent / record.NAME).exists():
        request.run_dir = parent.parent


def _nearest(target: str, request: Request) -> str:
    runs = list(Path(request.output_dir).glob("*"))
    paths = [path for run in runs for path in (run / "checkpoints").glob("*.ckpt")]
    paths += [run for run in runs if manifest.step_files(run / "checkpoints")]
    known = [show(path.absolute()) for path in paths]
    near = difflib.get_close_matches(target, known, n=3, cutoff=0.4)
    known_by = f"See the runs: {python()} -m savepoint ls"
    return f"Nearest: {', '.join(near)}." if near else known_by
