"""`make setup`: what it installs, and when it leaves an environment alone. A program that notes its
arguments stands in for uv.
"""

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.programs import ROOT

INSTALLER = """#!/bin/sh
echo "$@" >> installed
test -z "$PYTHONPATH" || exit 9  # or pip takes what lies in src/ for installed
test ! -e broken
"""
PINS = "torch==2.15.0\njsonargparse[jsonnet,signatures]==4.53.0\n./vendor/savepoint_lightning-1.0-py3-none-any.whl\n-e .\n"


@pytest.fixture
def cats(tmp_path: Path) -> Path:
    return project(tmp_path / "cats")


def project(root: Path) -> Path:
    (root / ".venv/bin").mkdir(parents=True)
    for name in ("python", "pip"):
        (root / ".venv/bin" / name).touch()
    (root / "requirements.txt").write_text(PINS)
    (root / "pyproject.toml").write_text('[project]\nname = "cats"\n')
    (root / "uv").write_text(INSTALLER)
    (root / "uv").chmod(0o755)
    return root


def command(at: Path, *arguments: str, venv: str = ".venv", uv: str | None = None) -> list[str]:
    script = str(ROOT / ".ci/environment.py")
    return [sys.executable, script, venv, str(at / "uv") if uv is None else uv, *arguments]


def call(at: Path, *arguments: str, **more: str) -> tuple[int, str]:
    done = subprocess.run(command(at, *arguments, **more), cwd=at, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def installed(at: Path) -> list[str]:
    return (at / "installed").read_text().splitlines() if (at / "installed").exists() else []


def holds(venv: Path, **versions: str) -> None:
    for name, version in versions.items():
        (venv / f"lib/python3.12/site-packages/{name}-{version}.dist-info").mkdir(parents=True)


FITTING = {"torch": "2.15.0+cpu", "jsonargparse": "4.53.0", "savepoint_lightning": "1.0"}


def test_the_pins_are_installed_once_and_again_where_they_change(cats: Path) -> None:
    code, said = call(cats)
    assert code == 0
    assert said.startswith("Setting up .venv with uv")
    assert installed(cats) == [
        "pip install --compile-bytecode --python .venv/bin/python --requirement requirements.txt"
    ]
    assert call(cats) == (0, "")
    (cats / "pyproject.toml").write_text(
        '[project]\nname = "cats"\n[tool.ruff]\nline-length = 99\n'
    )
    assert call(cats) == (0, "")
    (cats / "requirements.txt").write_text(PINS.replace("2.15.0", "2.16.0"))
    assert call(cats)[0] == 0
    assert len(installed(cats)) == 2


def test_without_uv_pip_installs_and_says_what_it_does(cats: Path) -> None:
    (cats / ".venv/bin/python").write_text(INSTALLER)
    (cats / ".venv/bin/python").chmod(0o755)
    assert call(cats, uv="")[0] == 0
    [line] = installed(cats)
    assert line.startswith("-m pip install ")
    assert "quiet" not in line


def test_a_set_up_that_failed_is_taken_up_by_the_next_call(cats: Path) -> None:
    (cats / "broken").touch()
    code, said = call(cats)
    assert code == 1
    assert "Not set up: .venv. uv says why above." in said
    (cats / "broken").unlink()
    assert call(cats)[0] == 0
    assert len(installed(cats)) == 2


def test_a_second_set_up_waits_for_the_first_and_does_nothing_again(cats: Path) -> None:
    with (cats / ".venv/lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = subprocess.Popen(command(cats), cwd=cats, stdout=subprocess.PIPE, text=True)
        assert second.stdout
        assert second.stdout.readline() == (
            "Another set-up of .venv is running. This one waits for it.\n"
        )
        record = "import runpy, sys, pathlib; "
        record += "print(runpy.run_path(sys.argv[1])['record'](pathlib.Path.cwd()), end='')"
        asked = [sys.executable, "-c", record, str(ROOT / ".ci/environment.py")]
        (cats / ".venv/ready").write_text(subprocess.check_output(asked, cwd=cats, text=True))
    assert second.communicate() == ("", None)
    assert second.returncode == 0
    assert installed(cats) == []


def test_an_installer_that_outlives_a_killed_set_up_still_holds_the_lock(cats: Path) -> None:
    os.mkfifo(cats / "gate")
    (cats / "uv").write_text("#!/bin/sh\necho begun >> installed\nread line < gate\n")
    first = subprocess.Popen(command(cats), cwd=cats, stdout=subprocess.DEVNULL)
    while not installed(cats):
        time.sleep(0.01)
    first.kill()
    first.wait()
    with (cats / ".venv/lock").open("a") as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (cats / "gate").write_text("go on\n")
        fcntl.flock(lock, fcntl.LOCK_EX)  # comes back: nothing is locked for ever


@pytest.mark.parametrize(
    ("venv", "way"), [("../cats/.venv", "named"), (".venv", "linked")], ids=["named", "linked"]
)
def test_another_projects_environment_is_taken_as_it_is_where_its_versions_fit(
    cats: Path, tmp_path: Path, venv: str, way: str
) -> None:
    call(cats)
    holds(cats / ".venv", **FITTING)
    dogs = tmp_path / "dogs"
    dogs.mkdir()
    (dogs / "requirements.txt").write_text(PINS)
    (dogs / "pyproject.toml").write_text('[project]\nname = "dogs"\n')
    if way == "linked":
        (dogs / ".venv").symlink_to(cats / ".venv")
    assert call(dogs, venv=venv, uv=str(cats / "uv")) == (0, "")
    (dogs / "requirements.txt").write_text(PINS.replace("2.15.0", "2.14.0") + "optuna==4.5\n")
    code, said = call(dogs, venv=venv, uv=str(cats / "uv"))
    assert code == 2
    assert "It has torch 2.15.0+cpu (not 2.14.0), no optuna." in said
    assert len(said.splitlines()) <= 5
    assert installed(dogs) == []


def test_an_environment_whose_project_is_gone_or_that_lies_here_is_this_ones(
    cats: Path, tmp_path: Path
) -> None:
    call(cats)
    copied = tmp_path / "copied"
    copied.mkdir()
    for name in ("requirements.txt", "pyproject.toml", ".venv", "uv"):
        subprocess.run(["cp", "-r", cats / name, copied], check=True)
    assert call(copied)[0] == 0
    assert len(installed(copied)) == 1
    moved = cats.rename(tmp_path / "moved")
    assert call(moved)[0] == 0
    assert len(installed(moved)) == 2


def test_what_is_named_is_installed_in_place_of_the_pins(cats: Path) -> None:
    assert call(cats, "savepoint-lightning[sweep]")[0] == 0
    assert installed(cats) == [
        "pip install --compile-bytecode --python .venv/bin/python savepoint-lightning[sweep]"
    ]
    assert not (cats / ".venv/ready").exists()


def test_a_place_that_cannot_be_written_to_is_a_message(cats: Path) -> None:
    code, said = call(cats, venv="/dev/null/x")
    assert code == 2
    assert said.startswith("No environment: /dev/null/x")
