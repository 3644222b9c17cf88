"""`savepoint report [RUN_DIR] [-o FILE]`: exit code 0 once the file is written."""

import argparse
from pathlib import Path

from savepoint import files, find, words
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
        output.put("\n".join([*missing, f"{show(path.absolute())}: {words.size(size)}"]))
    return 0


def _refuse_other_file(path: Path) -> None:
    """A report replaces an older report, and no other file."""
    is_report = path.is_file() and page.GENERATOR.encode() in path.read_bytes()[:1000]
    if path.exists() and not is_report:
        raise ConfigError(
            f"There already, and no report: {path}. A report replaces only a report. Give another "
            "file: -o FILE"
        )


def _write(path: Path, text: str) -> int:
    data = text.encode("utf-8", "replace")  # a file's name may hold bytes that are no text
    try:
        path.parent.stat()  # a missing directory is a typing mistake: none is made
        with files.rewriting(path) as file:
            file.write(data)
    except OSError as error:
        raise RunDirectoryError(
            f"Cannot write the report: {path} ({error.strerror}). This user writes it, and it "
            f"needs {words.size(len(data))}. Name another one: -o FILE"
        ) from error
    return len(data)
