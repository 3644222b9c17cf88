"""The library as one file: built from sources, recognised, named by a project's requirements."""

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
"""What names the wheel in requirements.txt."""


def line(wheel: Path) -> str:
    return f"./{FOLDER}/{wheel.name}"


def build(source: Path, folder: Path) -> Path:
    """The wheel of the sources, in a new folder.

    Raises:
        ConfigError: pip cannot build it; with its last words.
    """
    code, said = _call(
        sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--no-build-isolation", "--wheel-dir", str(folder), str(source),
    )  # fmt: skip
    built = sorted(folder.glob("*.whl"))
    if code or len(built) != 1:
        last = (said.strip().splitlines() or [f"exit code {code}"])[-1]
        raise ConfigError(
            f"The library's wheel was not built: {last}. Expected pip and setuptools 77 or newer "
            f"in the environment of {sys.executable}, as requirements.txt has them. "
            "Call: make setup"
        )
    version(built[0])
    return built[0]


def _call(*command: str) -> tuple[int, str]:
    """Exit code and stderr. An interrupt first ends what the command has started, too."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said = process.communicate()[1]
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    return process.returncode, said


def version(path: Path) -> str:
    """Of the library in a wheel.

    Raises:
        ConfigError: the file is no wheel of the library.
    """
    try:
        facts = _metadata(path)
    except (OSError, zipfile.BadZipFile, KeyError, StopIteration, UnicodeDecodeError) as error:
        raise _no_wheel(path, str(error) or type(error).__name__) from None
    if facts.get("Name") != DISTRIBUTION:
        raise _no_wheel(path, f"it is one of {facts.get('Name')}")
    found = facts.get("Version", "")
    if path.name != f"savepoint_lightning-{found}-py3-none-any.whl":
        raise _no_wheel(path, f"it holds version {found}, and its name says otherwise")
    return found


def _metadata(path: Path) -> dict[str, str]:
    with zipfile.ZipFile(path) as wheel:
        name = next(one for one in wheel.namelist() if METADATA.fullmatch(one))
        head = wheel.read(name).decode().partition("\n\n")[0]
    pairs = (row.partition(": ") for row in head.splitlines())
    return {key: value for key, _, value in pairs}


def _no_wheel(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"No wheel of {DISTRIBUTION}: {path} ({why}). Expected what `pip wheel` makes of the "
        "library, under its own name, since pip reads that. For example: "
        "WHEEL=path/to/savepoint_lightning-1.0-py3-none-any.whl"
    )
