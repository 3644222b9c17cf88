"""The `savepoint` command: one module a subcommand, imported only when it is called, so that each starts fast.

A module has `add_arguments(parser)` and `run(arguments) -> exit code`; what it does stands in COMMANDS.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from savepoint.errors import SavepointError

COMMANDS = {"verify": "look at every byte of a checkpoint, or of all checkpoints of a run"}


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="savepoint", description="Look at runs and checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, description in COMMANDS.items():
        command = commands.add_parser(name, help=description, description=f"{description[0].upper()}{description[1:]}.")
        if name in argv:  # the others' modules are not needed to say what they do
            importlib.import_module(f"savepoint.commands.{name}").add_arguments(command)
    arguments = parser.parse_args(argv)
    try:
        code: int = importlib.import_module(f"savepoint.commands.{arguments.command}").run(arguments)
    except SavepointError as error:
        print(f"savepoint {arguments.command}: {error}", file=sys.stderr)
        return error.exit_code
    return code
