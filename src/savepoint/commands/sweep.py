"""`savepoint sweep FILE`: exit code 1 if no trial came to an end."""

import argparse
from pathlib import Path

from savepoint import preemption, sweep


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="such as configs/sweep/lr.yaml")
    parser.add_argument("--output_dir", metavar="DIR", default="outputs", help="default: outputs")


def run(arguments: argparse.Namespace) -> int:
    preemption.install()
    return sweep.run(arguments.file, arguments.output_dir)
