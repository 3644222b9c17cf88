"""`savepoint report [RUN_DIR] [-o FILE]`: exits with 0 once the file is there, whatever it says."""

import argparse
from pathlib import Path

from savepoint import files, find
from savepoint.commands import output
from savepoint.errors import ConfigError, RunDirectoryError
from savepoint.report import gather, page
from savepoint.words import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    place = "a run directory; the newest run under outputs/"
    parser.add_argument("run_dir", metavar="RUN_DIR", nargs="?", help=place)
    file = "default: report.html in the run directory"
    parser.add_argument("-o", "--output", metavar="FILE", help=file)


def main(arguments: argparse.Namespace) -> int:
    run = find.run(arguments.run_dir)
    path = Path(arguments.output or run.directory / "report.html")
    _refuse_other_file(path)
    report = gather.Report(run)
    size = _write(path, page.page(report))
    missing = report.missing + report.curves.missing
    if arguments.json:
        facts = {"run_dir": run.directory, "file": path, "bytes": size, "state": report.state}
        output.put_json(facts | {"missing": missing})
    else:
        output.put("\n".join([*missing, f"{show(path.absolute())}: {size / 1e3:.0f} kB"]))
    return 0


def _refuse_other_file(path: Path) -> None:
    """A report is written anew at each call; nothing else is ever replaced by one."""
    is_report = path.is_file() and page.GENERATOR.encode() in path.read_bytes()[:1000]
    if path.exists() and not is_report:
        there = f"There already, and no report: {path}"
        expected = "Expected a new file, or a report. Give another one: -o FILE"
        raise ConfigError(f"{there}. {expected}")


def _write(path: Path, text: str) -> int:
    data = text.encode("utf-8", "replace")  # a file's name may hold bytes that are no text
    try:
        path.parent.stat()  # a directory that is not there is a slip of the pen: none is made
        with files.rewriting(path) as file:
            file.write(data)
    except OSError as error:
        room = f"with room for {len(data) / 1e3:.0f} kB"
        raise RunDirectoryError(
            f"Cannot write the report: {path} ({error.strerror}). Expected a file that this user "
            f"may write, {room}. Name another one: -o FILE"
        ) from error
    return len(data)
