"""docs/coming-from.md: whatever a table says is ours, works."""

import inspect
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.programs import ROOT
from support.trained import trained

import project
from savepoint import commands
from savepoint.config import quick, typed
from savepoint.resume import request

PAGE = (ROOT / "docs/coming-from.md").read_text()
TABLES = [block for block in PAGE.split("\n\n") if block.startswith("| ")]
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]
    for table in TABLES
    for line in table.splitlines()[2:]
]
OURS = list(dict.fromkeys(code for row in ROWS for code in re.findall(r"`([^`]+)`", row[1])))


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the run that the page names."""
    place = tmp_path_factory.mktemp("coming")
    shutil.copytree(trained(tmp_path_factory.getbasetemp()), place / "outputs" / "first")
    (place / "configs").symlink_to(ROOT / "configs")
    torch.save(
        {"epoch": 1, "state_dict": project.ClassicNet().state_dict()}, place / "checkpoint.pth.tar"
    )
    return place


@pytest.fixture(scope="module")
def names(at: Path) -> dict[str, Any]:
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(at)
        exec(code, found)
    return found


def compose(argv: list[str]) -> None:
    if not any("federated" in word for word in argv):  # Flower may not be installed
        quick.check(argv)
    typed.parse(argv)


def ask(argv: list[str]) -> None:
    asked = request.requested(argv)
    assert asked is not None
    base = None if asked.foreign else Path("outputs/first/config.yaml").read_text()
    typed.parse(asked.overrides, base=base)


@pytest.mark.parametrize("code", OURS)
def test_what_is_ours_works(
    code: str, at: Path, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(at)
    words = shlex.split(code)
    if words[:2] == ["python", "train.py"]:
        compose(words[2:])
    elif words[:2] == ["python", "resume.py"]:
        ask(words[2:])
    elif words[:3] == ["python", "-m", "savepoint"]:
        assert commands.main(words[3:]) == 0
    elif words[0] == "make":
        assert subprocess.run([*words, "--dry-run"], cwd=ROOT, capture_output=True).returncode == 0
    elif words[0].startswith("--"):
        compose(words)
    else:
        assert eval(code, names) is not None


def test_each_row_has_something_of_ours() -> None:
    assert len(ROWS) >= 100
    assert [row for row in ROWS if len(row) != 3 or "`" not in row[1]] == []


def test_no_argument_of_lightnings_own_callback_is_left_out() -> None:
    said = " ".join(row[0] for row in ROWS)
    arguments = list(inspect.signature(ModelCheckpoint).parameters)
    assert [name for name in arguments if not re.search(rf"\b{name}\b", said)] == []
