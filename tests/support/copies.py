"""The working tree as a template, committed to a repository of its own; its programs and wheels."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from savepoint.template import wheel as wheels
from support.programs import ROOT


def git(at: Path, *arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    done = subprocess.run(
        ["git", *arguments], cwd=at, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip("\n")


def commit(at: Path) -> str:
    git(at, "add", "--all")
    git(at, "-c", "user.name=A", "-c", "user.email=a@a", "commit", "--quiet", "--message", "more")
    return git(at, "rev-parse", "HEAD")


def environment(at: Path, library: Path | None = None) -> dict[str, str]:
    """For programs of the template or the copy in `at`: its own code, and a library if it has none."""
    paths = [at / "src", library or ROOT / "src"]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}


def call(at: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The program of the template or the copy in `at`, as its Makefile calls it."""
    return subprocess.run(
        [sys.executable, "-m", "savepoint.template", *arguments],
        cwd=at, capture_output=True, text=True, env=environment(at) | more,
    )  # fmt: skip


def files(at: Path) -> dict[str, bytes]:
    found = (
        path
        for path in at.rglob("*")
        if path.is_file() and ".git" not in path.relative_to(at).parts
    )
    return {
        path.relative_to(at).as_posix(): path.read_bytes()
        for path in found
        if "__pycache__" not in path.parts
    }


def set_up(at: Path) -> None:
    """Has make take the environment of this process for the one of the template or copy in `at`."""
    python = at / ".venv/bin/python"
    python.parent.mkdir(exist_ok=True, parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    record = runpy.run_path(str(at / ".ci/environment.py"))["record"]
    (at / ".venv/ready").write_text(record(at.resolve()))


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git repository: which files are the template's is not known")
    template = tmp_path_factory.mktemp("committed") / "template"
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (template / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, template / name)
    git(template, "init", "--quiet")
    commit(template)
    call(template, "--help")  # compiled once, not in each test
    return template


def built(folder: Path, version: str = "") -> Path:
    """A wheel of the working tree's library, with its own version or another."""
    source = folder / "savepoint"
    leave = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    shutil.copytree(ROOT / "src/savepoint", source, ignore=leave)
    if version:
        face = source / "__init__.py"
        named = re.sub(r'(?m)^__version__ = ".*"$', f'__version__ = "{version}"', face.read_text())
        face.write_text(named)
    return wheels.build(source, folder / "wheel")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="session")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same library under a later version."""
    return built(tmp_path_factory.mktemp("newer"), "97.0.1")


def unpacked(wheel: Path, folder: Path) -> Path:
    """What an installer makes of a wheel, for PYTHONPATH."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder
