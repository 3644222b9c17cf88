"""What `python resume.py ...` was asked to do, as far as it can be told without torch: which run,
which file, what flags.
"""

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from savepoint import files, words
from savepoint.checkpoint import manifest
from savepoint.config import compose, quick
from savepoint.errors import CheckpointForeignError, CheckpointNotFoundError, ConfigError
from savepoint.find import newest_run
from savepoint.job import requeued
from savepoint.run import Run, check_name
from savepoint.words import show

USAGE = """\
usage: python resume.py [CKPT | RUN_DIR] [--KEY VALUE]...

  python resume.py                                      the newest run under outputs/
  python resume.py outputs/first                        its latest checkpoint that verifies
  python resume.py outputs/first --trainer.max_epochs 20
  python resume.py FILE --config configs/mnist.yaml     a file of another program: its weights, and what else it has

  --best            the best checkpoint of the run, not the latest
  --plan            say what would be restored and changed, and stop
  --allow KEY       let an override change the trajectory (model.lr, data.batch_size, world_size, dataset ...)
  --fork [NAME]     a new run from the checkpoint; the old one stays as it is
  --rewind          go on from an older checkpoint; later ones and their log rows are set aside under rewound/
  --output_dir DIR  where runs are looked for (outputs)

Every key of the config can be given, as for train.py.
"""

FLAGS = ("--best", "--plan", "--allow", "--fork", "--rewind")


@dataclass
class Request:
    """The command line of resume.py, its target found and, if it is a file, verified."""

    run_dir: Path | None = None
    file: Path | None = None  # named by the user, or the best one: no fallback to another
    foreign: bool = False
    best: bool = False
    plan: bool = False
    rewind: bool = False
    fork: str | None = None  # "" for a name of our own
    allow: list[str] = field(default_factory=list)
    output_dir: str = "outputs"
    overrides: list[str] = field(default_factory=list)


def requested(argv: Sequence[str]) -> Request | None:
    """The request in `argv`; None where `--help` was all of it.

    Raises:
        CheckpointNotFoundError, CheckpointCorruptError, CheckpointVersionError: about the target.
        ConfigError: about the flags.
    """
    asked, target = _parse(list(argv))
    if asked is None:
        print(USAGE, end="")
        return None
    files.refuse_url(asked.output_dir, "output_dir")
    if requeued() and not asked.plan:
        target = _once(asked, target)
    if target is None:
        asked.run_dir = newest_run(Path(asked.output_dir))
    else:
        _find(asked, target)
    if asked.foreign and not any(
        flag.split("=")[0] in ("--config", "-c") for flag in asked.overrides
    ):
        raise CheckpointForeignError(
            f"Not written by Savepoint: {asked.file}. It holds no config. Say which run it is for: "
            f"python resume.py {asked.file} --config configs/mnist.yaml",
            asked.file or "",
        )
    _check_overrides(asked)
    if asked.run_dir is not None and asked.fork is None and not asked.plan:
        Run(asked.run_dir).refuse_if_held()
    return asked


def _once(asked: Request, target: str | None) -> str | None:
    """A requeued job gives the same command again: a fork that was begun goes on, and nothing is
    set aside twice.
    """
    fork = Path(asked.output_dir) / (asked.fork or "")
    if asked.fork and manifest.step_files(fork / "checkpoints"):
        asked.fork = None
        asked.best = False
        return str(fork)
    if asked.rewind or asked.fork == "":
        flag = "--rewind" if asked.rewind else "--fork"
        raise ConfigError(
            f"{flag} in a job that SLURM requeued: what it began would be begun again. Expected a "
            "command that goes on. Requeue: python resume.py RUN_DIR, or --fork NAME"
        )
    return target


def _check_overrides(asked: Request) -> None:
    """What is wrong with the flags is said now where the run's config lies beside its checkpoints,
    else after the imports.
    """
    if asked.foreign:
        quick.check(asked.overrides)
    elif asked.run_dir is not None and (config := asked.run_dir / "config.yaml").is_file():
        try:
            base = config.read_text()
            compose.compose([], base=base)
        except (OSError, ValueError, AttributeError):
            return  # damaged: what counts is the config in the checkpoint
        quick.check(asked.overrides, base=base)


def _parse(argv: list[str]) -> tuple[Request | None, str | None]:
    asked = Request()
    target = None
    while argv:
        word = argv.pop(0)
        flag, equals, value = word.partition("=")

        def take(flag: str = flag, equals: str = equals, value: str = value) -> str:
            if equals:
                return value
            if not argv or argv[0].startswith("--"):
                raise ConfigError(
                    f"No value after {flag}. Expected: {flag} VALUE. See: python resume.py --help"
                )
            return argv.pop(0)

        if word in ("-h", "--help"):
            return None, None
        if word in ("--best", "--plan", "--rewind"):
            setattr(asked, word[2:], True)
        elif flag == "--allow":
            asked.allow += take().split(",")
        elif flag == "--output_dir":
            asked.output_dir = take()
            asked.overrides += ["--output_dir", asked.output_dir]
        elif flag == "--fork":
            named = equals or (
                argv and not argv[0].startswith("--") and not os.path.exists(argv[0])
            )
            asked.fork = take() if named else ""
        elif word.startswith("-"):
            if flag.removeprefix("--").split(".")[0] not in compose.KEYS and (
                near := words.nearest(flag, FLAGS)
            ):
                raise ConfigError(f"Unknown flag: {flag}.{near}")
            asked.overrides.append(word)
            if not equals and argv and not argv[0].startswith("--"):
                asked.overrides.append(argv.pop(0))
        elif target is not None:
            raise ConfigError(
                f"Two checkpoints: {target} and {word}. Expected one. Name one of them."
            )
        else:
            target = word
    if asked.fork:
        check_name(asked.fork)
    if asked.rewind and asked.fork is not None:
        raise ConfigError(
            "Both --fork and --rewind. Expected one: a new run, or the same run from an earlier "
            "step."
        )
    return asked, target


def _find(asked: Request, target: str) -> None:
    path = Path(target)
    try:
        is_directory = path.is_dir()
    except OSError as error:
        raise CheckpointNotFoundError(
            f"Not a path: {target[:200]} ({error.strerror}). Expected a checkpoint or a run "
            "directory. Check the path.",
            path,
        ) from None
    if is_directory:
        path = path.absolute()
        # A run may be called so.
        is_run = path.name != "checkpoints" or (path / "checkpoints").is_dir()
        asked.run_dir = path if is_run else path.parent
        if not manifest.step_files(asked.run_dir / "checkpoints"):
            raise CheckpointNotFoundError(
                f"No checkpoint in this directory: {show(path)}. Expected a run directory with "
                f"checkpoints/step-*.ckpt in it. {_nearest(target, asked)}",
                path,
            )
        return
    try:
        manifest.verify(path)
    except CheckpointForeignError:
        asked.foreign = True
    except CheckpointNotFoundError as error:
        raise CheckpointNotFoundError(f"{error} {_nearest(target, asked)}", path) from None
    asked.file = path
    parent = path.absolute().parent
    if parent.name == "checkpoints" and (parent.parent / "run.json").exists():
        asked.run_dir = parent.parent


def _nearest(target: str, asked: Request) -> str:
    known = {
        show(path.absolute()): path for path in Path(asked.output_dir).glob("*/checkpoints/*.ckpt")
    }
    runs = Path(asked.output_dir).glob("*")
    known |= {
        show(path.absolute()): path for path in runs if manifest.step_files(path / "checkpoints")
    }
    near = difflib.get_close_matches(target, known, n=3, cutoff=0.4)
    return f"Nearest: {', '.join(near)}." if near else "Runs are found by: ls outputs"
