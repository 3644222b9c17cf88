"""The working tree as a template, committed to a repository of its own, and its programs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


def call(at: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The program of the template or the copy in `at`, as its Makefile calls it."""
    return subprocess.run(
        [sys.executable, "-m", "savepoint.template", *arguments],
        cwd=at, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(at / "src")} | environment,
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
