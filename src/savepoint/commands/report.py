"""`savepoint report [RUN_DIR] [-o FILE]`: exit code 0 once the file is written, whatever the state of the run."""

import argparse
from pathlib import Path

from savepoint import files, find
from savepoint.commands import output
from savepoint.errors import ConfigError, RunDirectoryError
from savepoint.report import gather, page
from savepoint.words import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", nargs="?", help="a run directory; the newest run under outputs/")
    parser.add_argument("-o", "--output", metavar="FILE", help="default: report.html in the run directory")


def main(arguments: argparse.Namespace) -> int:
    run = find.run(arguments.run_dir)
    path = Path(arguments.output or run.directory / "report.html")
    _refuse_other_file(path)
    report = gather.Report(run)
    size = _write(path, page.page(report))
    if arguments.json:
        facts = {"run_dir": run.directory, "file": path, "bytes": size, "state": report.state}
        output.put_json(facts | {"missing": report.missing + report.curves.missing})
    else:
        output.put(
            "\n".join([*report.missing, *report.curves.missing, f"{show(path.absolute())}: {size / 1e3:.0f} kB"])
        )
    return 0


def _refuse_other_file(path: Path) -> None:
    """A report is written anew at each call; nothing else is ever replaced by one."""
    if not path.exists() or (path.is_file() and page.GENERATOR.encode() in path.read_bytes()[:1000]):
        return
    raise ConfigError(
        f"There already, and no report: {path}. Expected a new file, or a report. Give another one: -o FILE"
    )


def _write(path: Path, text: str) -> int:
    data = text.encode("utf-8", "replace")  # a file's name may hold bytes that are no text
    try:
        path.parent.stat()  # a directory that is not there is a slip of the pen: none is made
        with files.rewriting(path) as file:
            file.write(data)
    except OSError as error:
        raise RunDirectoryError(
            f"Cannot write the report: {path} ({error.strerror}). Expected a file that this user "
            f"may write, with room for {len(data) / 1e3:.0f} kB. Name another one: -o FILE"
        ) from error
    return len(data)
