"""The `savepoint` command: one module a subcommand, imported only when it is called, so that each
starts fast.

A module has `add_arguments(parser)` and `main(arguments) -> exit code`; COMMANDS describes it.
Every command takes `--json`. Exit codes: 0 all is well, 1 something is wrong (or differs), 2 bad
input.
"""

import argparse
import contextlib
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from savepoint import entry, files, leaving, words
from savepoint.commands import output
from savepoint.errors import CheckpointSaveError, ConfigError, SavepointError
from savepoint.workspace import project

COMMANDS = {
    "ls": "list runs with best score, test result and state, or the checkpoints of one",
    "watch": "all runs of a directory, live: state, rate, time left, newest checkpoint",
    "show": "show what a checkpoint holds: facts, metrics, config, tensors; and its lineage",
    "diff": "compare two checkpoints: config, metrics, weights, optimizer, all other state",
    "verify": "look at every byte of checkpoints and at all of a run: what is wrong, what to do",
    "gc": "delete the checkpoints that retention prunes, and the temps of dead processes",
    "eval": "test a checkpoint: metrics, and what the project's callbacks report",
    "export": "write a checkpoint's model in a format that others read, and compare the two",
    "replay": "train a run again up to a step, compare it with the log, and look at that step",
    "audit": "train each part between two checkpoints again: does the run come out equal here?",
    "bisect": "the first step at which two runs differ, and what differs there first",
    "report": "write one HTML file that shows a run: curves, pictures, checkpoints, config",
    "sweep": "try values of config keys, each trial a run; the same command goes on",
}

READ_MIRRORS = ("ls", "show", "verify")
"""The commands whose paths may be URLs of a mirror."""


def main(argv: Sequence[str] | None = None) -> int:
    if argv is not None:
        return _main(argv)
    # A process of our own, whose exit code `| head` must not change.
    sys.stdout = entry.tolerant(sys.stdout)
    sys.stderr = entry.tolerant(sys.stderr)
    code = _main(sys.argv[1:], is_own=True)
    leaving.with_code(code)
    return code


def _main(argv: Sequence[str], is_own: bool = False) -> int:
    name, *args = argv or [""]
    if name in ("", "-h", "--help"):
        print(usage(), file=sys.stdout if name else sys.stderr)
        return 0 if name else 2
    if name not in COMMANDS:
        near = words.nearest(name, COMMANDS)
        what = f"savepoint: No such command: {name}"
        print(f"{what}. Expected one of {', '.join(COMMANDS)}.{near}", file=sys.stderr)
        return 2
    try:
        if is_own:
            root = project().root
            if (root / "resume.py").is_file():
                entry.take_own_code(root)
        code = _execute(name, args)
        entry.require_whole_output()
    except CheckpointSaveError as error:  # about the place that the user named, not a run
        return _refuse(name, str(error), 2)
    except SavepointError as error:
        return _refuse(name, str(error), error.exit_code)
    except OSError as error:
        what = f"No access: {error.filename} ({error.strerror})"
        why = "The command reads it as this user. Check its permissions, or name another."
        return _refuse(name, f"{what}. {why}", 2)
    except KeyboardInterrupt:
        return 130
    return code


def usage() -> str:
    lines = [f"  {name:<8}  {what}" for name, what in COMMANDS.items()]
    head = "usage: savepoint COMMAND ... [--json]     (or: python -m savepoint COMMAND ...)"
    return "\n".join([head, "", *lines, "", "What a command takes: savepoint COMMAND --help"])


def _execute(name: str, args: Sequence[str]) -> int:
    module = importlib.import_module(f"savepoint.commands.{name}")
    arguments = _parse(name, module, args)
    with contextlib.ExitStack() as copies:
        if name in READ_MIRRORS:
            _copy_urls(arguments, copies)
        code: int = module.main(arguments)
    return code


def _copy_urls(arguments: argparse.Namespace, copies: contextlib.ExitStack) -> None:
    """Puts local copies in the place of URLs of a mirror."""
    several = getattr(arguments, "paths", None)
    paths = [arguments.path] if several is None else several
    if not any(path and files.is_url(path) for path in paths):
        return
    from savepoint.commands import mirrored

    found = [mirrored.copy(arguments, path, copies) for path in paths]
    if several is None:
        [arguments.path] = found
    else:
        arguments.paths = found


class Parser(argparse.ArgumentParser):
    """Prints an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[0].upper()}{message[1:]}. See: {self.prog} --help")


def _parse(name: str, module: ModuleType, args: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog=f"savepoint {name}",
        description=f"{COMMANDS[name][0].upper()}{COMMANDS[name][1:]}.",
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    parser.add_argument(
        "--json", action="store_true", help="for scripts: one JSON document instead of text"
    )
    arguments, unknown = parser.parse_known_args(args)
    if "words" in arguments:  # a command that takes any key of a config as a flag
        arguments.words = unknown
        unknown = []
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        kind = "Unknown flag" if unknown[0].startswith("-") else "One word too many"
        long_flags = [flag for flag in flags if flag.startswith("--")]
        near = words.nearest(unknown[0].split("=")[0], long_flags)
        raise ConfigError(f"{kind}: {unknown[0]}.{near} See: {parser.prog} --help")
    return arguments


def _refuse(name: str, message: str, code: int) -> int:
    print(output.named(words.printable(f"savepoint {name}: {message}")), file=sys.stderr)
    return code
