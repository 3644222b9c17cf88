"""The URLs that `ls`, `show` and `verify` take: of a mirror, a run in it, or a checkpoint."""

import argparse
import contextlib
import tempfile
from pathlib import Path

from savepoint import files
from savepoint.checkpoint.manifest import STEP_NAME
from savepoint.commands import output
from savepoint.mirror.shadow import shadow

# Of `show`: what stands in the end of a file.
_AT_THE_END = ("facts", "metrics", "lineage")


def copy(
    arguments: argparse.Namespace, path: str | None, copies: contextlib.ExitStack
) -> str | None:
    """A local copy of what a URL names, until `copies` closes; any other path as it is."""
    if path is None or not files.is_url(path) or path.startswith("http"):
        return path
    is_file = path.endswith(".ckpt")
    if is_file and ("paths" not in arguments or not STEP_NAME.fullmatch(path.rpartition("/")[2])):
        return path  # refused by the command: a file elsewhere is no checkpoint of a mirror
    verifies = "deep" in arguments
    shows = "only" in arguments
    directory = copies.enter_context(tempfile.TemporaryDirectory(prefix="savepoint-mirror-"))
    made = shadow(
        path,
        Path(directory),
        whole=verifies or (shows and arguments.only not in _AT_THE_END),
        records=not verifies,  # a mirror is no run directory, with all that can be wrong there
        beside=shows,
    )
    output.name(directory, made.url)
    return str(made.path.parent if is_file else made.path)
