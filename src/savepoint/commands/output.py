"""The output of the commands: plain text that reads the same in a pipe, and JSON. No colours."""

import json
import os
import sys
from typing import Any

from savepoint.training import notebook
from savepoint.words import Table, plain, printable

_names: dict[str, str] = {}


def name(path: str, url: str) -> None:
    """From here on what lies below `path` is printed as below `url`, from which it was copied."""
    _names[path] = url
    # As it is shown where the working directory is around it.
    _names[os.path.relpath(path)] = url


def named(text: str) -> str:
    for path, url in _names.items():
        text = text.replace(path, url)
    return text


def put(text: str) -> None:
    if isinstance(text, Table) and notebook.is_attached():
        notebook.show(named(text._repr_html_()))
        return
    sys.stdout.write(named(printable(text)) + "\n")


def put_json(data: Any) -> None:
    """Prints data as JSON, see `words.plain`."""
    sys.stdout.write(named(json.dumps(plain(data), indent=2, allow_nan=False)) + "\n")
