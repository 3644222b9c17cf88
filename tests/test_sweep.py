"""Sweeps: trials are runs, finished ones are not run again, one that was cut off goes on. Real trials need the extra."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_entry_points import ROOT

from savepoint import sweep
from savepoint.errors import ConfigError

SMALL = {
    "data.dataset": "digits", "trainer.limit_train_batches": 12, "trainer.max_epochs": 3,
    "trainer.log_every_n_steps": 3, "model.net.width": 4,
}  # fmt: skip


def written(path: Path, **changed: Any) -> Path:
    content = {"config": "configs/data/run.yaml", "parameters": {"model.lr": {"choices": [0.001, 0.02]}}} | changed
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not ...}))
    return path


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"config": ...}, "Expected the keys `config` and `parameters`"),
        ({"trails": 3}, "Did you mean trials"),
        ({"sampler": "gird"}, "tpe or random or grid"),
        ({"mode": "maximum"}, "min or max"),
        ({"parameters": {"model.lr": 0.1}}, "parameters.model.lr is 0.1"),
        ({"parameters": {"model.lr": {"low": 0.1}}}, "low: 0.001, high: 0.1"),
        ({"sampler": "grid", "parameters": {"model.lr": {"low": 0.1, "high": 1.0}}}, "a grid has choices"),
    ],
)
def test_what_is_wrong_with_a_sweep_file_is_said_before_anything_runs(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        sweep.read(written(tmp_path / "wrong.yaml", **changed))
    assert "wrong.yaml" in str(raised.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_sweep_of_the_project_reads_and_its_values_fit_its_config(path: Path) -> None:
    import project  # noqa: F401
    from savepoint import cli, compose

    asked = sweep.read(path)
    for edge in (0, -1):
        values = {
            key: space["choices"][edge] if "choices" in space else space["low" if edge == 0 else "high"]
            for key, space in asked.parameters.items()
        }
        flags = [f"--{key}={value}" for key, value in {**asked.overrides, **values}.items()]
        parsed = compose.flatten(cli.dump(cli.parse(["--config", str(ROOT / asked.config), *flags])))
        assert {key: parsed[key] for key in values} == values


def test_without_its_package_the_command_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r'optuna.*pip install -e "\.\[sweep\]"'):
        sweep.run(written(tmp_path / "lr.yaml"), str(tmp_path))


# -- with Optuna ---------------------------------------------------------------------------------------------------------


def command(file: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "savepoint", "sweep", str(file), "--output_dir", str(out)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "DATA_ROOT": "/nowhere"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    pytest.importorskip("optuna", reason="needs the extra: pip install -e '.[sweep]'")
    return written(tmp_path / "tiny.yaml", config="configs/mnist.yaml", sampler="grid", overrides=SMALL)


@pytest.mark.slow
def test_a_sweep_that_is_cut_off_goes_on_with_the_same_trial_and_repeats_none(file: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(command(file, tmp_path), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    second = tmp_path / "tiny" / "trial-001" / "checkpoints"
    until = time.monotonic() + 240
    while not list(second.glob("step-*.ckpt")):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143
    before = (tmp_path / "tiny" / "trial-000" / "run.json").read_bytes()
    done = subprocess.run(command(file, tmp_path), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 trials, 1 done" in done.stdout
    assert (tmp_path / "tiny" / "trial-000" / "run.json").read_bytes() == before
    assert "Resume" in (tmp_path / "tiny" / "trial-001.log").read_text()
    with (tmp_path / "tiny" / "trials.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert sorted(row["model.lr"] for row in rows) == ["0.001", "0.02"]
    assert {row["state"] for row in rows} == {"complete"}
    assert rows[0]["val/accuracy"] >= rows[1]["val/accuracy"]
    assert (tmp_path / "tiny" / "trials.png").read_bytes().startswith(b"\x89PNG")
    again = subprocess.run(command(file, tmp_path), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert "2 trials, 2 done" in again.stdout


@pytest.mark.slow
def test_a_trial_that_falls_behind_is_stopped_and_can_be_gone_on_with(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna", reason="needs the extra: pip install -e '.[sweep]'")

    class Behind:
        number, reported = 0, []

        def report(self, value: float, step: int) -> None:
            self.reported.append(value)

        def should_prune(self) -> bool:
            return True

    asked = sweep.read(written(tmp_path / "tiny.yaml", config="configs/mnist.yaml"))
    pruned, code = sweep._train(Behind(), SMALL | {"trainer.max_epochs": 200}, asked, tmp_path / "trial-000")
    assert (pruned, code) == (True, 143)
    assert Behind.reported
    assert (tmp_path / "trial-000" / "RESUME.txt").exists()
    assert optuna.__version__
