"""Sweeps: trials are runs, finished ones are not run again, one that was cut off goes on. Real
trials need the extra.
"""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
import yaml
from support import forked
from support.forked import Program, without_fsync
from support.limits import HANG_SECS
from support.programs import ROOT
from support.run_dirs import say
from support.stopping import handlers  # noqa: F401  (handlers is a fixture)

from savepoint import sweep, sweep_file
from savepoint.commands import sweep as sweep_command
from savepoint.errors import ConfigError

SMALL = {
    "data.dataset": "digits", "trainer.limit_train_batches": 12, "trainer.max_epochs": 3,
    "trainer.log_every_n_steps": 3, "model.net.width": 4,
}  # fmt: skip


def written(path: Path, **changed: Any) -> Path:
    content = {
        "config": "configs/mnist.yaml",
        "parameters": {"model.lr": {"choices": [0.001, 0.02]}},
        "monitor": "val/accuracy",
        "mode": "max",
    } | changed
    path.write_text(
        yaml.safe_dump({key: value for key, value in content.items() if value is not ...})
    )
    return path


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"config": ...}, "Expected the keys `config` and `parameters`"),
        ({"trails": 3}, "Did you mean trials"),
        ({"sampler": "gird"}, "tpe or random or grid"),
        ({"mode": "maximum"}, "min or max"),
        ({"mode": ...}, "`monitor` and `mode` belong together"),
        ({"parameters": {"model.lr": 0.1}}, "parameters.model.lr is 0.1"),
        ({"parameters": {"model.lr": {"low": 0.1}}}, "low: 0.001, high: 0.1"),
        (
            {"sampler": "grid", "parameters": {"model.lr": {"low": 0.1, "high": 1.0}}},
            "a grid has choices",
        ),
        ({"parameters": ["model.lr"]}, "parameters is .* a value of type dict"),
        ({"parameters": {}}, "a config key or more"),
        ({"parameters": {"model.lr": {"low": 1.0, "high": 0.1}}}, "low below high"),
        ({"parameters": {"model.lr": {"low": "a", "high": "b"}}}, "parameters.model.lr is"),
        (
            {"parameters": {"model.lr": {"low": 0, "high": 1, "log": True}}},
            "parameters.model.lr is",
        ),
        (
            {"parameters": {"model.lr": {"low": 1, "high": 8, "log": True, "step": 2}}},
            "parameters.model.lr is",
        ),
        ({"parameters": {"model.lr": {"choices": []}}}, "parameters.model.lr is"),
        ({"trials": "many"}, "trials is many. Expected a value of type int"),
        ({"trials": 0}, "trials is 0. Expected 1 or more"),
        ({"overrides": [1]}, "overrides is .* type dict"),
    ],
)
def test_what_is_wrong_with_a_sweep_file_is_said_before_anything_runs(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        sweep_file.read(written(tmp_path / "wrong.yaml", **changed))
    assert "wrong.yaml" in str(raised.value)


@pytest.mark.usefixtures("quick_starts")
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"config": "configs/none.yaml"}, r"No such config file: .*none\.yaml"),
        ({"parameters": {"model.lrr": {"choices": [1]}}}, r"model\.lrr.*Did you mean model\.lr"),
        ({"overrides": {"trainer.max_epoch": 1}}, r"trainer\.max_epoch.*Did you mean .*max_epochs"),
    ],
)
def test_what_is_wrong_with_the_config_of_a_sweep_costs_no_trial(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        sweep.check(sweep_file.read(written(tmp_path / "wrong.yaml", **changed)))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "sweep").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_sweep_of_the_project_reads_and_its_values_fit_its_config(path: Path) -> None:
    import project  # noqa: F401
    from savepoint.config import compose, typed

    asked = sweep_file.read(path)
    for edge in (0, -1):
        values = {
            key: space["choices"][edge]
            if "choices" in space
            else space["low" if edge == 0 else "high"]
            for key, space in asked.parameters.items()
        }
        flags = [f"--{key}={value}" for key, value in {**asked.overrides, **values}.items()]
        parsed = compose.flatten(
            typed.dump(typed.parse(["--config", str(ROOT / asked.config), *flags]))
        )
        assert {key: parsed[key] for key in values} == values


def test_without_its_package_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"optuna.*pip install 'savepoint-lightning\[sweep\]'"):
        sweep.run(sweep_file.read(written(tmp_path / "lr.yaml")), "lr", str(tmp_path))


def test_flags_with_several_values_are_a_grid_and_the_others_hold_for_every_trial() -> None:
    flags = [
        "--config", "configs/fast.yaml", "--model.net=ConvNet,ClassicNet", "--model.net.width", "8",
        "--model.lr", "1e-2,0.003,0.01",
    ]  # fmt: skip
    asked, name = sweep_file.of_flags(flags)
    assert asked.grid() == [
        {"model.net": net, "model.lr": lr}
        for net in ("ConvNet", "ClassicNet")
        for lr in (0.01, 0.003)
    ]
    assert re.fullmatch("sweep-net-lr-[0-9a-f]{6}", name)
    assert sweep_file.of_flags(flags)[1] == name
    assert sweep_file.of_flags([*flags, "--trainer.max_epochs", "2"])[1] != name
    assert asked.arguments(asked.grid()[0]) == [
        "--config", str(ROOT / "configs/fast.yaml"), "--model.net=ConvNet", "--model.lr=0.01",
        "--model.net.width=8",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--model.lr", "0.01"], "Nothing to try: no flag has several values"),
        ([], "Nothing to try: "),
        (["configs/sweep/lr.yaml", "--model.lr", "1,2"], "A sweep file and more"),
        (["--model.lr", "[1,2"], r"Malformed YAML: --model\.lr \[1,2"),
    ],
)
def test_flags_that_are_no_sweep_are_refused(given: list[str], said: str) -> None:
    pytest.importorskip("optuna", reason="needs: make extras")
    with pytest.raises(ConfigError, match=said):
        sweep_command._asked(given)


# -- with Optuna ---------------------------------------------------------------------------------


def command(file: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "savepoint", "sweep", str(file), "--output_dir", str(out)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "DATA_ROOT": "/nowhere"}


def swept(file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    asked = [*command(file, file.parent), *arguments]
    return subprocess.run(asked, cwd=ROOT, env=environment(), capture_output=True, text=True)


class Trial(Program):
    """What a sweep asks of a process, of one that is forked: its start takes no seconds."""

    def __init__(self, command: list[str], *, stdout: BinaryIO, **_: Any) -> None:
        super().__init__(command[1:], Path(stdout.name), without_fsync, DATA_ROOT="/nowhere")

    def poll(self) -> int | None:
        return None if self.runs else self.wait()

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def terminate(self) -> None:
        self.signal(signal.SIGTERM)


@pytest.fixture
def quick_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command runs in this process, and what it starts is forked."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        code, said = forked.run(command[1:], tmp_path / "checks.txt")
        return subprocess.CompletedProcess(command, code, said, said)

    monkeypatch.setattr(sweep, "subprocess", SimpleNamespace(run=run, Popen=Trial))


def states(file: Path) -> list[str]:
    with (file.parent / file.stem / "trials.csv").open(newline="") as table:
        return [row["state"] for row in csv.DictReader(table)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    pytest.importorskip("optuna", reason="needs: make extras")
    return written(tmp_path / "tiny.yaml", sampler="grid", overrides=SMALL)


def test_a_trial_is_named_before_it_trains(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "check", lambda asked: None)
    monkeypatch.setattr(sweep, "_train", stop)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(sweep_file.read(file), "tiny", str(file.parent), said.append)
    log = file.parent / "tiny" / "trial-000.log"
    assert said[1:] == [f"trial-000: model.lr 0.001: trains, see {log}"]


@pytest.mark.usefixtures("quick_starts")
def test_a_sweep_tells_a_script_each_trial_and_the_best_of_them(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spaces = {
        "model.lr": {"low": 0.005, "high": 0.05, "log": True},
        "data.batch_size": {"choices": [32, 64]},
    }
    once = SMALL | {"trainer.max_epochs": 1}
    written(file, sampler="tpe", trials=2, overrides=once, parameters=spaces)
    code, out, err = say(capsys, "sweep", file, "--output_dir", file.parent, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert [one["state"] for one in told["trials"]] == ["complete", "complete"]
    best, other = told["trials"]
    assert best["value"] >= other["value"] > 0
    assert 0.005 <= best["parameters"]["model.lr"] <= 0.05
    record = json.loads((Path(best["run_dir"]) / "summary.json").read_text())
    assert record["best_accuracy"] == best["value"]
    assert Path(told["plot"]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("quick_starts")
def test_a_sweep_from_flags_takes_the_metric_of_the_config_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna", reason="needs: make extras")
    ranked = {"checkpoint.monitor": "val/loss", "checkpoint.mode": "min", "trainer.max_epochs": 1}
    flags = [f"--{key}={value}" for key, value in (SMALL | ranked).items()]
    flags += ["--model.lr", "1e-7,0.02", "--output_dir", str(tmp_path)]
    code, out, err = say(capsys, "sweep", *flags, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["monitor"] == "val/loss"
    assert [one["parameters"]["model.lr"] for one in told["trials"]] == [0.02, 1e-7]
    code, out, _ = say(capsys, "sweep", *flags)
    assert (code, out.splitlines()[0].endswith(": 2 trials, 2 done")) == (0, True)


@pytest.mark.usefixtures("quick_starts")
def test_a_sweep_file_without_a_metric_takes_that_of_its_config(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = {"trainer.max_epochs": 1, "trainer.limit_train_batches": 4, "model.width": 8}
    lrs = {"model.lr": {"choices": [1e-6, 0.01]}}
    written(
        file, config="configs/text.yaml", sampler="grid", monitor=..., mode=..., overrides=overrides,
        parameters=lrs,
    )  # fmt: skip
    code, out, err = say(capsys, "sweep", file, "--output_dir", file.parent, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["monitor"] == "val/perplexity"
    assert [one["parameters"]["model.lr"] for one in told["trials"]] == [0.01, 1e-6]


@pytest.mark.usefixtures("quick_starts")
def test_a_trial_that_is_refused_or_measures_another_metric_stops_the_sweep_and_stays_open(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = SMALL | {"trainer.max_epochs": 1}
    choices = {"model.lr": {"choices": [0.02, "much", 0.01]}}
    written(file, sampler="grid", overrides=small, parameters=choices)
    code, _, err = say(capsys, "sweep", file, "--output_dir", file.parent)
    assert (code, len(err.splitlines())) == (2, 1), err
    assert "trial-001 was refused: " in err
    assert "much" in err
    other = written(file.with_name("other.yaml"), monitor="val/acuracy", overrides=small)
    code, _, err = say(capsys, "sweep", other, "--output_dir", file.parent)
    assert (code, len(err.splitlines())) == (2, 1), err
    assert "trial-000 measured no `val/acuracy`" in err
    assert "val/accuracy" in err


def test_a_record_that_is_damaged_and_a_sweep_that_runs_are_refused(file: Path) -> None:
    directory = file.parent / "tiny"
    directory.mkdir()
    (directory / "study.db").write_text("garbage")
    done = swept(file)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "Not the record of a sweep: " in done.stderr
    with sweep._lock(directory).locked():
        done = swept(file)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert (
        f"Another process runs this sweep: {directory}, held by pid {os.getpid()} on" in done.stderr
    )


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_sweep_that_is_cut_off_goes_on_with_the_values_that_it_would_have_had(
    sampler: str, tmp_path: Path
) -> None:
    optuna = pytest.importorskip("optuna", reason="needs: make extras")
    asked = sweep_file.read(
        written(
            tmp_path / "a.yaml",
            sampler=sampler,
            parameters={"model.lr": {"low": 0.001, "high": 0.1}},
        )
    )
    drawn: dict[str, list[float]] = {}
    for name, parts in (("whole", [4]), ("cut off", [1, 2, 1])):
        (tmp_path / name).mkdir()
        for part in parts:
            study = sweep._open(optuna, asked, tmp_path / name)
            for _ in range(part):
                trial = study.ask()
                study.sampler = sweep._sampler(optuna, asked, trial.number)
                value = sweep._suggest(trial, "model.lr", asked.parameters["model.lr"])
                study.tell(trial, value)
                drawn.setdefault(name, []).append(value)
    assert drawn["whole"] == drawn["cut off"]
    assert len(set(drawn["whole"])) == 4


@pytest.mark.slow
def test_a_trial_that_failed_is_told_and_tried_again(file: Path) -> None:
    first = written(file, sampler="grid", overrides=SMALL | {"trainer.max_epochs": 1})
    taken = file.parent / "tiny" / "trial-000.log"
    process = subprocess.Popen(
        command(first, file.parent), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    while not (taken.exists() and "training from" in taken.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    subprocess.run(
        ["pkill", "-KILL", "-f", "--", f"--output_dir {file.parent / 'tiny'} --run_name trial-000"],
        check=True,
    )
    said = process.communicate()[0]
    assert process.returncode == 1, said
    assert "1 trial failed" in said
    assert sorted(states(file)) == ["complete", "fail"]
    again = swept(first)
    assert again.returncode == 0, again.stderr
    assert sorted(states(file)) == ["complete", "complete", "fail"]


@pytest.mark.slow
def test_a_sweep_that_is_killed_says_who_still_trains_and_then_goes_on(file: Path) -> None:
    one = {"model.lr": {"choices": [0.02]}}
    written(file, sampler="grid", parameters=one, overrides=SMALL | {"trainer.max_epochs": 60})
    process = subprocess.Popen(
        command(file, file.parent), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL
    )
    lock = file.parent / "tiny" / "trial-000" / "run.json"
    while not lock.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    refused = swept(file)
    assert refused.returncode == 2
    taken_over, said = refused.stderr.splitlines()
    assert taken_over.startswith(f"Taking over the lock of pid {process.pid} on ")
    assert "Another process trains" in said
    until = time.monotonic() + HANG_SECS
    while (done := swept(file)).returncode == 2:
        assert time.monotonic() < until
    assert done.returncode == 0, done.stderr
    assert states(file) == ["complete"]


@pytest.mark.slow
def test_a_trial_that_falls_behind_is_stopped_shown_and_not_run_again(file: Path) -> None:
    values = [0.02, 0.03, 0.015, 0.025, 1e-7]
    overrides = SMALL | {"trainer.max_epochs": 6}
    pruning = written(
        file, sampler="grid", parameters={"model.lr": {"choices": values}}, overrides=overrides
    )
    done = swept(pruning)
    assert done.returncode == 0, done.stderr
    assert sorted(states(file)) == ["complete"] * 4 + ["pruned"]
    behind = next(line for line in done.stdout.splitlines() if line.endswith(": pruned"))
    assert "1e-07" in behind
    stopped = file.parent / "tiny" / behind.split(":")[0]
    assert (stopped / "RESUME.txt").exists()
    before = (stopped / "run.json").read_bytes()
    assert "5 trials, 5 done" in swept(pruning).stdout
    assert (stopped / "run.json").read_bytes() == before


@pytest.mark.slow
def test_a_sweep_that_is_cut_off_goes_on_with_the_same_trial_and_repeats_none(
    file: Path, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        command(file, tmp_path), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    second = tmp_path / "tiny" / "trial-001" / "checkpoints"
    until = time.monotonic() + HANG_SECS
    while not list(second.glob("step-*.ckpt")):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143
    before = (tmp_path / "tiny" / "trial-000" / "run.json").read_bytes()
    done = subprocess.run(
        command(file, tmp_path), cwd=ROOT, env=environment(), capture_output=True, text=True
    )
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
    again = subprocess.run(
        command(file, tmp_path), cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert "2 trials, 2 done" in again.stdout
