"""run.json: id, name and creation of a run, then one entry a start. The file may be damaged."""

import contextlib
import functools
import json
import os
import platform
import socket
import subprocess
import sys
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import savepoint
from savepoint.workspace import project

NAME = "run.json"


def new(name: str) -> dict[str, Any]:
    return {"id": uuid.uuid4().hex, "name": name, "created": _now(), "starts": []}


def read(directory: Path) -> tuple[dict[str, Any] | None, str]:
    """The record, and its damage in words: (None, "") where there is none, (None, words) where it
    is damaged.
    """
    try:
        content = json.loads((directory / NAME).read_text())
        keys = {"id", "name", "created", "starts"}
        if not isinstance(content, dict) or not keys <= content.keys():
            raise ValueError("not a record of a run")
        if not isinstance(content["starts"], list):
            raise ValueError("its starts are no list")
    except (FileNotFoundError, NotADirectoryError):
        return None, ""
    except (ValueError, RecursionError, IsADirectoryError) as error:
        return None, str(error)
    return content, ""


def starts(record: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The whole entries; one that `with_start` did not write is left out."""
    return [start for start in (record or {}).get("starts", []) if _is_start(start)]


def with_start(record: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    entry = {
        "time": _now(),
        "argv": sys.argv,
        "default_config": str(project().default_config),
        "git": git(),
        "versions": dict(_versions()),
        "host": socket.gethostname(),
    }
    entry |= {"hardware": f"{platform.machine()}, {os.cpu_count()} cores"} | facts
    return {**record, "starts": [*record["starts"], entry]}


def _is_start(entry: Any) -> bool:
    kinds = {"time": str, "argv": list, "changed": dict, "git": dict | None}
    if not isinstance(entry, dict):
        return False
    return all(isinstance(entry.get(key), kind) for key, kind in kinds.items())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def git() -> dict[str, Any] | None:
    commit = _ask_git("rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(_ask_git("status", "--porcelain"))}


def code_changed_since(commit: str) -> list[str] | None:
    """The Python files that are not as they were in a commit; None where that is not known here."""
    names = _ask_git("diff", "--name-only", "--end-of-options", commit, "--", "*.py")
    return None if names is None else names.splitlines()


def _ask_git(*arguments: str) -> str | None:
    command = ["git", *arguments]
    here = project().root
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def _versions() -> dict[str, str]:
    """Of what this process has loaded, or would load; to read them takes 20 ms."""
    names = ("torch", "torchvision", "lightning", "torchmetrics", "numpy", "flwr", "ray")
    versions = {"python": platform.python_version(), "savepoint": savepoint.__version__}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
