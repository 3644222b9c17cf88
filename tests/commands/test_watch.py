"""`savepoint watch`: what all runs of a directory do, from their files alone."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.run_dirs import make_run, say

from savepoint.commands import main, watch
from savepoint.run import Run

Capture = pytest.CaptureFixture[str]
ROWS = "step,time/secs,train/loss\n{}"


def looked(capsys: Capture, directory: Path) -> dict[str, dict[str, Any]]:
    code, out, _ = say(capsys, "watch", str(directory), "--json")
    assert code == 0
    return {row["run"]: row for row in json.loads(out)}


def log(run: Path, *rows: str) -> None:
    (run / "metrics.csv").write_text(ROWS.format("".join(f"{row}\n" for row in rows)))


def test_each_run_is_in_one_state(tmp_path: Path, capsys: Capture) -> None:
    make_run(tmp_path, "finished", ended="max_epochs")
    make_run(tmp_path, "gone")
    (make_run(tmp_path, "stopped") / "RESUME.txt").write_text("python resume.py ...\n")
    make_run(tmp_path, "broken", steps=())
    trains = make_run(tmp_path, "trains")
    with Run(trains).locked():
        rows = looked(capsys, tmp_path)
    assert {name: row["state"] for name, row in rows.items()} == {
        "trains": "running", "finished": "finished", "gone": "gone", "stopped": "stopped", "broken": "broken",
    }  # fmt: skip
    assert next(iter(rows)) == "trains"
    assert rows["gone"]["last"] == "its process ended without a word"
    assert rows["finished"]["last"] == "ended by max_epochs"


def test_rate_and_time_left_are_those_of_the_start_that_runs(
    tmp_path: Path, capsys: Capture
) -> None:
    run = make_run(tmp_path, "trains")
    log(run, "10,100.0,1", "20,1.0,1", "40,11.0,1", "50,16.0,1", "6")
    config = "trainer: {max_steps: 80, max_epochs: null}\n"
    (run / "config.yaml").write_text(config)
    with Run(run).locked():
        row = looked(capsys, tmp_path)["trains"]
    assert (row["step"], row["rate"], row["left"]) == (50, 2.0, 15.0)


def test_a_log_that_is_damaged_or_missing_costs_the_rate_alone(
    tmp_path: Path, capsys: Capture
) -> None:
    run = make_run(tmp_path, "trains")
    log(run, "x,y", "1,nan,2", "a,3,4", "2")
    with Run(run).locked():
        row = looked(capsys, tmp_path)["trains"]
    assert (row["rate"], row["left"], row["saved"]) == (None, None, 30)


@pytest.mark.parametrize("head", ["step,ti\rme/secs\n", "\0" * 200_000], ids=["return", "zeros"])
def test_a_log_whose_first_line_is_damaged_costs_its_own_steps_alone(
    head: str, tmp_path: Path, capsys: Capture
) -> None:
    run = make_run(tmp_path, "damaged", ended="max_epochs")
    (run / "metrics.csv").write_text(f"{head}5,1.0\n", newline="")
    make_run(tmp_path, "whole", ended="max_epochs")
    assert set(looked(capsys, tmp_path)) == {"damaged", "whole"}


def test_one_look_is_a_table(tmp_path: Path, capsys: Capture) -> None:
    make_run(tmp_path, "one", ended="max_epochs")
    code, out, _ = say(capsys, "watch", str(tmp_path), "--once")
    head, line = out.splitlines()
    assert code == 0
    assert head.split()[:2] == ["run", "state"]
    assert "30, " in line
    assert "val/loss" in line


def test_of_a_run_itself_its_own_line_is_shown(tmp_path: Path, capsys: Capture) -> None:
    run = make_run(tmp_path, "one", ended="max_epochs")
    assert list(looked(capsys, run)) == ["one"]


def test_a_directory_without_runs_is_said_to_have_none(tmp_path: Path, capsys: Capture) -> None:
    code, out, _ = say(capsys, "watch", str(tmp_path), "--once")
    assert (code, out) == (0, f"{tmp_path}: no runs\n")


@pytest.mark.parametrize(("given", "waited"), [("inf", 3600.0), ("1e300", 3600.0), ("-1", 0.1)])
def test_any_pause_between_two_looks_is_one_that_the_clock_knows(
    given: str, waited: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(watch, "_watch", lambda _, every: pauses.append(every))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["watch", str(tmp_path), f"--every={given}"]) == 0
    assert pauses == [waited]


def test_on_a_narrow_terminal_the_names_of_runs_stay_whole(tmp_path: Path) -> None:
    names = ["mnist-20261129-194838", "mnist-20261129-200008"]
    for name in names:
        make_run(tmp_path, name, ended="max_epochs")
    shown = io.StringIO()
    Console(file=shown, width=80).print(watch.drawn(tmp_path))
    assert [name for name in names if name in shown.getvalue()] == names


def test_no_torch_is_loaded(tmp_path: Path) -> None:
    make_run(tmp_path, "one")
    code = "import sys; from savepoint import commands; commands.main(['watch', sys.argv[1]]); "
    code += "sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True).returncode == 0
    )


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the process has left its end
        return b""


def test_on_a_terminal_it_goes_on_until_ctrl_c(tmp_path: Path) -> None:
    make_run(tmp_path, "one")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "savepoint", "watch", str(tmp_path), "--every", "0.2"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        seen = b""
        while b"two" not in seen and (more := read(ours)):
            seen += more
            if b"one" in seen and not (tmp_path / "two").exists():
                make_run(tmp_path, "two")
        process.send_signal(signal.SIGINT)
        while read(ours):
            pass
    os.close(ours)
    assert b"two" in seen
    assert process.returncode == 130


def test_a_start_whose_clock_begins_anew_counts_alone() -> None:
    rows = [{"step": "5", "time/secs": "9"}, {"step": "6", "time/secs": "1"}]
    assert watch.rate(rows) is None
