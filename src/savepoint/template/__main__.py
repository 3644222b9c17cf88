"""python -m savepoint.template new NAME DEST      make new NAME=cats DEST=../cats
python -m savepoint.template upgrade WHEEL      make upgrade WHEEL=...
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from savepoint.errors import ConfigError, SavepointError
from savepoint.template.new import new
from savepoint.template.upgrade import upgrade


def main(argv: Sequence[str] | None = None) -> int:
    asked = _parser().parse_args(argv)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Exits as after an error: unfinished files are removed.
        signal.signal(signum, lambda number, _: sys.exit(128 + number))
    try:
        if asked.command == "upgrade":
            return upgrade(asked.wheel)
        return new(asked.name, asked.destination, library=asked.library, wheel=asked.wheel)
    except SavepointError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        where = error.filename2 or error.filename
        refusal = ConfigError(
            f"Cannot write: {where} ({error.strerror}). The copy is files and a git repository of "
            "this user. Make room and permission, or choose another place."
        )
        print(refusal, file=sys.stderr)
        return refusal.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="template", description="Projects from the template.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    arguments = commands.add_parser("new", help="the start of a project, a thin copy of this")
    arguments.add_argument("name")
    arguments.add_argument("destination")
    arguments.add_argument(
        "--library", choices=("wheel", "source"), default="wheel",
        help="whether the library goes along as one file or as the folder src/savepoint, to edit",
    )  # fmt: skip
    arguments.add_argument("--wheel", type=Path, help=argparse.SUPPRESS)  # skips the build
    arguments = commands.add_parser("upgrade", help="in a copy: another version of the library")
    arguments.add_argument("wheel")
    return parser


if __name__ == "__main__":
    sys.exit(main())
