"""The library as a wheel: its build, its version, its line in requirements.txt."""

import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

from savepoint.errors import ConfigError

DISTRIBUTION = "savepoint-lightning"
FOLDER = "vendor"
METADATA = re.compile(r"[^/]+\.dist-info/METADATA")
LINE = re.compile(r"^\./vendor/savepoint_lightning-[^/\s]+\.whl$", re.MULTILINE)
"""The line of the wheel in requirements.txt."""


def line(wheel: Path) -> str:
    return f"./{FOLDER}/{wheel.name}"


def build(source: Path, folder: Path) -> Path:
    """The wheel of the sources, in a new folder.

    Raises:
        ConfigError: pip cannot build it; with the last line of its errors.
    """
    code, errors = _call(
        sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--no-build-isolation", "--wheel-dir", str(folder), str(source),
    )  # fmt: skip
    built = sorted(folder.glob("*.whl"))
    if code or len(built) != 1:
        last = (errors.strip().splitlines() or [f"exit code {code}"])[-1]
        raise ConfigError(
            f"The library's wheel was not built: {last}. It needs pip and setuptools 77 or newer "
            f"in the environment of {sys.executable}, as requirements.txt has them. "
            "Call: make setup"
        )
    version(built[0])
    return built[0]


def _call(*command: str) -> tuple[int, str]:
    """Exit code and stderr. An interrupt also ends the processes that the command has started."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        errors = process.communicate()[1]
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    return process.returncode, errors


def version(path: Path) -> str:
    """The version of the library in a wheel.

    Raises:
        ConfigError: the file is no wheel of the library.
    """
    try:
        facts = _metadata(path)
    except (OSError, zipfile.BadZipFile, KeyError, StopIteration, UnicodeDecodeError) as error:
        raise _no_wheel(path, str(error) or type(error).__name__) from None
    if facts.get("Name") != DISTRIBUTION:
        raise _no_wheel(path, f"it is one of {facts.get('Name')}")
    held = facts.get("Version", "")
    if path.name != f"savepoint_lightning-{held}-py3-none-any.whl":
        raise _no_wheel(path, f"it holds version {held}, and its name says otherwise")
    return held


def _metadata(path: Path) -> dict[str, str]:
    with zipfile.ZipFile(path) as wheel:
        name = next(filter(METADATA.fullmatch, wheel.namelist()))
        head = wheel.read(name).decode().partition("\n\n")[0]
    pairs = (row.partition(": ") for row in head.splitlines())
    return {key: value for key, _, value in pairs}


def _no_wheel(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"No wheel of {DISTRIBUTION}: {path} ({why}). `pip wheel` makes one of the library, under "
        "the name that pip reads. For example: "
        "WHEEL=path/to/savepoint_lightning-1.0-py3-none-any.whl"
    )
