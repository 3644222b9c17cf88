"""What the README and the configs say works: every command is run, every config trains."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from support.programs import LITTLE, ROOT, as_a_new_process

import project  # noqa: F401
from savepoint import commands
from savepoint.checkpoint import store
from savepoint.config import quick
from savepoint.resume import request, start


def commands_in(text: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


README = commands_in((ROOT / "README.md").read_text())
CONTRIBUTING = commands_in((ROOT / "CONTRIBUTING.md").read_text())


def execute(words: list[str]) -> int:
    program, argv = words[1], words[2:]
    with as_a_new_process():
        if program == "train.py":
            quick.check(argv)
            return start.start(quick.check([*argv, *LITTLE]))
        if program == "resume.py":
            asked = request.requested(argv)
            assert asked is not None
            return start.resume(asked)
        assert words[1:3] == ["-m", "savepoint"]
        return commands.main(words[3:])


def test_the_commands_of_the_readme_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # runs go to its outputs/
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    python = [shlex.split(command, comments=True) for command in README if command.startswith("python ")]
    assert len(python) >= 10
    for words in python:
        if "--print_config" in words:
            with pytest.raises(SystemExit, match="0"):
                execute(words)
        else:
            assert execute(words) == 0, words


@pytest.mark.parametrize("command", [line for line in README + CONTRIBUTING if line.startswith("make ")])
def test_make_knows_the_targets_that_are_named(command: str) -> None:
    done = subprocess.run([*shlex.split(command, comments=True), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


HEAD = """
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from savepoint.loader import resumable
"""


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_edits_that_make_it_yours_train_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    code, config = (re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("python", "yaml"))
    assert code
    assert config
    (tmp_path / "mine.py").write_text(HEAD + code[1])
    (tmp_path / "mine.yaml").write_text(config[1])
    monkeypatch.syspath_prepend(str(tmp_path))
    import mine  # type: ignore[import-not-found]  # noqa: F401

    command = ["--config", str(tmp_path / "mine.yaml"), "--output_dir", str(tmp_path), "--run_name", "mine"]
    with as_a_new_process():
        assert start.start(quick.check([*command, "--trainer.max_epochs", "2"])) == 0
        asked = request.requested([str(tmp_path / "mine"), "--trainer.max_epochs", "3"])
        assert asked is not None
        assert start.resume(asked) == 0
    latest = store.CheckpointStore(tmp_path / "mine" / "checkpoints").latest()
    assert latest is not None
    assert latest.epoch == 3
    assert latest.manifest["exact"] is True
    assert latest.manifest["monitor"] == "val/loss"


CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
RUNS = [path for path in CONFIGS if path.parent.name != "sweep"]  # those have test_sweep.py


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_config_trains(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.parent.name == "logger":
        pytest.importorskip(path.stem, reason="needs: make extras")
    monkeypatch.chdir(tmp_path)
    group = path.parent.name if path.parent.name in ("model", "data", "checkpoint") else "config"
    command = [f"--{group}", str(path), "--output_dir", str(tmp_path), "--run_name", "x", "--trainer.max_epochs", "1"]
    more = ["--trainer.limit_train_batches", "40"] if path.stem == "lr_finder" else []  # too few to find one
    with as_a_new_process():
        assert start.start(quick.check([*command, *LITTLE, *more])) == 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_config_says_what_to_expect_of_it(path: Path) -> None:
    head = path.read_text()
    assert "TODO" not in head
    for word in ("command:", "hardware:", "time:", "expect:"):
        assert word in head
