"""Each command of the README's table, typed as it stands there, in a clone: the front door for
real.
"""

import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
from PIL import Image
from support.copies import committed, set_up  # noqa: F401  (committed is a fixture)
from support.limits import HANG_SECS
from support.programs import LITTLE

from savepoint.commands import main

ROOT = Path(__file__).resolve().parents[1]
SWEEP = """config: configs/fast.yaml
sampler: grid
parameters: {model.lr: {choices: [0.02]}}
overrides: {data.dataset: digits, trainer.limit_train_batches: 2, trainer.log_every_n_steps: 1}
"""
# What takes minutes, is this very test, or ends only when it is stopped (test_tensorboard.py starts
# that).
NOT_HERE = [
    "make prove",
    "make drill",
    "make bench",
    "make test",
    "make lint",
    "make tensorboard",
    "make upgrade",
]
WORDS = {
    "make train": ["CONFIG=configs/fast.yaml", f"ARGS=--run_name first {shlex.join(LITTLE)}"],
    "make resume": ["CKPT=outputs/first", "ARGS=--trainer.max_epochs 2"],
    "make predict": ["CKPT=outputs/first", "INPUT=a picture.png"],
    "make export": ["CKPT=outputs/first/checkpoints/best.ckpt", "ARGS=--format npz"],
    "make report": ["RUN=outputs/first"],
    "make sweep": ["CONFIG=one.yaml"],
    "python train.py": ["--run_name", "second", *LITTLE, "--trainer.max_epochs", "1"],
    "python resume.py": ["outputs/second", "--trainer.max_epochs", "2"],
    "python -m savepoint diff": [
        "outputs/first/checkpoints/best.ckpt",
        "outputs/second/checkpoints/best.ckpt",
    ],
    "python -m savepoint verify": ["--deep", "outputs/first"],
    "python -m savepoint gc": ["outputs/first", "--dry-run"],
    "python -m savepoint replay": ["outputs/first", "--step", "3"],
    "python -m savepoint bisect": ["outputs/first", "outputs/first"],
    "python -m savepoint export": ["outputs/first", "--format", "safetensors"],
    "python -m project.predict": ["a picture.png"],
    "python -m savepoint sweep": ["one.yaml"],
    "make new": ["NAME=cats", "DEST=../cats"],
}


# Of each kind of command one; the others are in the slow tests, since each start takes seconds.
FRONT = ["make train", "make ls", "python -m savepoint verify"]


def rows() -> list[str]:
    table = (ROOT / "README.md").read_text().split("\n## Commands")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    found = [code for cell in cells for code in re.findall("`([^`]+)`", cell)]
    return [
        re.match(r"make \S+|python -m savepoint \S+|python \S+ ?\S*", code)[0].strip()
        for code in found
    ]  # type: ignore[index]


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(FRONT, id="the first"),
        pytest.param(rows(), id="all", marks=pytest.mark.slow),
    ],
)
def test_each_command_of_the_table_runs_as_it_is_written_there(
    asked: list[str], committed: Path
) -> None:
    assert set(asked) <= set(rows())
    set_up(committed)
    (committed / "one.yaml").write_text(SWEEP)
    Image.new("L", (28, 28)).save(committed / "a picture.png")
    environment = os.environ | {"PYTHONPATH": str(committed / "src"), "OMP_NUM_THREADS": "1"}
    for row in asked:
        words = shlex.split(row)
        row = " ".join(words[:3] if words[1] == "-m" and words[2] == "project.predict" else words)
        if row in NOT_HERE or ("sweep" in row and importlib.util.find_spec("optuna") is None):
            continue
        program = [".venv/bin/python", *words[1:]] if words[0] == "python" else words
        done = subprocess.run(
            [*program, *WORDS.get(row, [])],
            cwd=committed,
            env=environment,
            capture_output=True,
            text=True,
            timeout=HANG_SECS,
        )
        expected = 1 if row == "python -m savepoint diff" else 0  # of two configs
        assert done.returncode == expected, (row, done.stdout, done.stderr)
        assert done.stdout.strip(), row


@pytest.fixture
def front(tmp_path: Path) -> Path:
    """The Makefile alone, in an environment whose python only ends, with the code in ARGS."""
    (tmp_path / ".ci").mkdir()
    for name in ("Makefile", "requirements.txt", "pyproject.toml", ".ci/environment.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    set_up(tmp_path)
    ended = "#!/bin/sh\nfor code; do :; done\nexit $code\n"
    (tmp_path / ".venv/bin/python").write_text(ended)
    return tmp_path


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_after_a_clean_stop_make_leaves_by_the_same_signal_without_a_word(
    front: Path, signum: signal.Signals
) -> None:
    words = ["make", "train", f"ARGS={128 + signum}"]
    done = subprocess.run(words, cwd=front, capture_output=True, text=True, timeout=HANG_SECS)
    assert done.returncode == -signum
    assert done.stderr == ""


def test_a_failure_under_make_stays_one(front: Path) -> None:
    words = ["make", "train", "ARGS=1"]
    done = subprocess.run(words, cwd=front, capture_output=True, text=True, timeout=HANG_SECS)
    assert done.returncode == 2
    assert "Error 1" in done.stderr


def test_the_help_names_every_target_under_a_heading_in_80_columns(front: Path) -> None:
    shutil.copytree(ROOT / "benchmarks", front / "benchmarks")
    text = subprocess.check_output(["make", "help"], cwd=front, text=True)
    makefiles = (ROOT / "Makefile").read_text() + (ROOT / "benchmarks/bench.mk").read_text()
    declared = re.findall(r"^\.PHONY: (.*)$", makefiles, re.MULTILINE)
    groups = text.split("\n\n")
    assert len(groups) >= 5
    named = [name for group in groups for name in re.findall(r"^  make (\S+)", group, re.MULTILINE)]
    assert sorted([*named, "help"]) == sorted(" ".join(declared).split())
    assert [line for line in text.splitlines() if len(line) > 80 and "  make " in line] == []


def test_the_console_script_is_the_same_program() -> None:
    (script,) = metadata.entry_points(group="console_scripts", name="savepoint")
    assert script.load() is main


@pytest.mark.slow
@pytest.mark.parametrize("words", [
    ["make", "prove", "ARGS=--config configs/fast.yaml --epochs 1 --kills 1 --data.dataset digits"],
    ["make", "drill", "ARGS=--help"],
    ["make", "bench", "ARGS=--help"],
], ids=lambda words: words[1])  # fmt: skip
def test_what_takes_minutes_starts(committed: Path, words: list[str]) -> None:
    set_up(committed)
    environment = os.environ | {"PYTHONPATH": str(committed / "src")}
    done = subprocess.run(
        words, cwd=committed, env=environment, capture_output=True, text=True, timeout=HANG_SECS
    )
    assert done.returncode == 0, done.stdout + done.stderr
