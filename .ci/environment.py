"""The environment of `make setup`: made once, and installed anew where the pins change.

python3 .ci/environment.py VENV UV [ARGUMENT...]

UV is the program uv, or empty: then pip installs. With ARGUMENTs these are installed in place of
requirements.txt. Standard library alone, since nothing is there yet.

VENV/ready    the project that the environment was made for, and a digest of what was installed
VENV/lock     held by the one process that installs, and by its installer: a kill releases it
"""

import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

PIN = re.compile(r"^([\w.-]+)(?:\[.*?\])?==([^\s;#]+)", re.MULTILINE)
LIBRARY = re.compile(r"^\./vendor/(savepoint_lightning)-([^-\s]+)-.*\.whl", re.MULTILINE)


def main(venv: Path, uv: str, arguments: Sequence[str], root: Path) -> int:
    if not arguments and (code := settled(venv, root)) is not None:
        return code
    venv.mkdir(parents=True, exist_ok=True)
    with (venv / "lock").open("a") as lock:
        take(lock, venv)
        if arguments:
            return install(venv, uv, arguments, lock.fileno())
        code = settled(venv, root)  # by the process that was waited for
        if code is None:
            code = set_up(venv, uv, root, lock.fileno())
        return code


def settled(venv: Path, root: Path) -> int | None:
    """0 where the environment fits, 2 where it does not and is another project's; None where it is
    to be installed.
    """
    ready = venv / "ready"
    if not ready.is_file():
        return None
    known = ready.read_text()
    if known == record(root):
        return 0
    place = venv.resolve()
    owner = Path(known.partition("\n")[0] or place.parent)  # an older version left it empty
    inside = place.is_relative_to(root)  # though it may have been copied along
    if inside or owner == root or not (owner / "requirements.txt").is_file():
        return None
    wrong = misfits(venv, (root / "requirements.txt").read_text())
    if not wrong:
        return 0
    print(
        f"Another project's environment: {venv}, made for {owner}. It has {', '.join(wrong)}.\n"
        f"Expected the versions in requirements.txt, as two projects share one set. Nothing was "
        f"changed.\nPin the same versions, or name a place for an environment of your own: "
        "make setup VENV=...",
        file=sys.stderr,
    )
    return 2


def record(root: Path) -> str:
    """What VENV/ready holds after an installation."""
    pins = (root / "requirements.txt").read_text()
    files = (root / "pyproject.toml", root / "src/savepoint/pyproject.toml")
    projects = [tomllib.loads(file.read_text()).get("project") for file in files if file.is_file()]
    digest = hashlib.sha256(json.dumps([pins, projects], default=str).encode())
    return f"{root}\n{digest.hexdigest()}\n"


def misfits(venv: Path, requirements: str) -> list[str]:
    """The pins that the environment does not keep, each as what it has in their place."""
    folders = venv.glob("lib/python*/site-packages/*.dist-info")
    pairs = (folder.stem.rpartition("-") for folder in folders)
    installed = {plain(name): version for name, _, version in pairs}
    wrong = []
    for name, wanted in PIN.findall(requirements) + LIBRARY.findall(requirements):
        version = installed.get(plain(name))
        if version is None:
            wrong.append(f"no {name}")
        elif wanted not in (version, version.partition("+")[0]):  # 2.15.0+cpu is a 2.15.0
            wrong.append(f"{name} {version} (not {wanted})")
    return wrong


def plain(name: str) -> str:
    """The name as an installer compares it."""
    return re.sub("[-_.]+", "-", name).lower()


def take(lock: IO[str], venv: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"Another set-up of {venv} is running. This one waits for it.", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)


def set_up(venv: Path, uv: str, root: Path, lock: int) -> int:
    tool = "uv" if uv else "pip"
    print(f"Setting up {venv} with {tool}, once: about 6 GB, two to five minutes.", flush=True)
    wanted = record(root)  # before: a change meanwhile is installed by the next call
    if not ((venv / "bin/python").exists() and (venv / "bin/pip").exists()):
        code = run([sys.executable, "-m", "venv", str(venv)], lock)
        if code:
            return code
    if not uv:
        print(
            "pip names each package, then unpacks them in silence for a minute or two.", flush=True
        )
    code = install(venv, uv, ["--requirement", "requirements.txt"], lock)
    if code:
        otherwise = " (make setup UV= takes pip)" if uv else ""
        print(
            f"Not set up: {venv}. {tool} says why above. The next call goes on from here: "
            f"make setup{otherwise}",
            file=sys.stderr,
        )
    else:
        (venv / "ready").write_text(wanted)
    return code


def install(venv: Path, uv: str, arguments: Sequence[str], lock: int) -> int:
    python = str(venv / "bin/python")
    command = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    if uv:
        # As pip does: where Python may write none, as in many containers, `import lightning` would
        # take 14 s in place of 6, each time.
        command = [uv, "pip", "install", "--compile-bytecode", "--python", python]
    return run([*command, *arguments], lock)


def run(command: Sequence[str], lock: int) -> int:
    # With make's PYTHONPATH pip would take what lies in src/ for installed.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # The lock goes along: an installer that outlives its parent still holds it.
    done = subprocess.run(command, pass_fds=[lock], env=environment, check=False)
    return done.returncode


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:], Path.cwd()))
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        print(
            f"No environment: {error.filename} ({error.strerror}). It is a folder that this user may "
            "write to. Make room and permission, or name another place: make setup VENV=...",
            file=sys.stderr,
        )
        sys.exit(2)
