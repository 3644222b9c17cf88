"""What all commands have in common, and ls and show."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.checkpoint_files import facts, names, small_state
from support.run_dirs import flip, fork, latest, make_run, say, store, training_in, truncate

from savepoint import commands, entry, find, words, workspace
from savepoint.errors import RunLockedError
from savepoint.run import Run

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def started_by_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "configs/fast.yaml"])


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path)


LOOKING = ("ls", "show", "diff", "verify", "gc")


def command_line(name: str, path: Path) -> list[str]:
    return [name, *[str(path)] * (2 if name == "diff" else 1)]


# -- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_says_what_it_takes(name: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="0"):
        commands.main([name, "--help"])
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize("name", LOOKING)
def test_an_unknown_flag_is_refused_with_the_nearest_one(name: str, capsys: Capture) -> None:
    code, out, err = say(capsys, *command_line(name, Path("a")), "--jsn")
    assert (code, out) == (2, "")
    assert "Unknown flag: --jsn. Did you mean --json?" in err
    assert len(err.splitlines()) <= 5


@pytest.mark.parametrize("name", LOOKING)
def test_a_path_that_is_not_there_is_bad_input(name: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "none"
    code, out, err = say(capsys, *command_line(name, path))
    assert (code, out) == (2, "")
    assert str(path) in err
    assert len(err.splitlines()) <= 5


@pytest.mark.parametrize("name", ["ls", "gc"])
def test_a_file_in_the_place_of_a_run_is_bad_input(
    name: str, run_dir: Path, capsys: Capture
) -> None:
    code, _, err = say(capsys, name, latest(run_dir).path)
    assert code == 2
    assert "A file, not a run directory" in err


@pytest.mark.parametrize("name", LOOKING)
def test_every_command_speaks_json_with_the_same_exit_code(
    name: str, run_dir: Path, capsys: Capture
) -> None:
    command = command_line(name, run_dir)
    text = say(capsys, *command)
    code, out, err = say(capsys, *command, "--json")
    assert json.loads(out)
    assert (code, err) == (text[0], text[2])


@pytest.mark.parametrize(
    "words",
    [
        ["ls", "."], ["ls", ".."], ["verify", "checkpoints/last.ckpt"], ["gc", "."],
        ["show", ".", "--only", "lineage"], ["show", ".", "--only", "metrics"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_only_looks_at_files_starts_without_torch(words: list[str], run_dir: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "savepoint", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=run_dir)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not {"torch", "numpy", "lightning"} & imported
    assert "savepoint.commands.output" in imported
    assert done.stdout


@pytest.mark.parametrize(
    "words", [["nonsense"], ["--json"], ["shw"], ["diff", "a"], ["gc", "--keep_last", "few"]]
)
def test_wrong_words_are_refused_in_a_few_lines(words: list[str], capsys: Capture) -> None:
    code, out, err = say(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("savepoint")
    assert len(err.splitlines()) <= 5


def test_a_command_that_is_nearly_right_is_named(capsys: Capture) -> None:
    assert "Did you mean show?" in say(capsys, "shw")[2]


def test_without_words_the_commands_are_listed(capsys: Capture) -> None:
    code, out, err = say(capsys)
    assert (code, out) == (2, "")
    assert all(f"\n  {name}" in err for name in commands.COMMANDS)
    assert say(capsys, "--help")[:2] == (0, err)


@pytest.mark.parametrize("name", ["show", "diff", "verify"])
def test_a_command_that_reads_tensors_says_that_it_loads_torch(
    name: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    said = []
    monkeypatch.setattr(entry, "importing", lambda: contextlib.nullcontext(said.append("loading")))
    say(capsys, *command_line(name, run_dir))
    assert said


def test_a_file_below_the_working_directory_is_named_from_there(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(run_dir.parent)
    begin = f"{run_dir.name}/checkpoints/step-"
    for name, place in (("show", 0), ("diff", 1)):  # after "A"
        commands.main(command_line(name, run_dir))
        assert capsys.readouterr().out.split()[place].startswith(begin), name
    assert find.file_or_best(str(run_dir))[1].startswith(begin)  # of eval and export


@pytest.mark.parametrize("name", ["show", "verify", "gc"])
def test_without_a_path_the_newest_run_under_outputs_is_meant(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = say(capsys, name)
    assert code == 2
    assert f"No run with a checkpoint under: {tmp_path / 'outputs'}. " in err
    make_run(tmp_path / "outputs", "a", steps=(3,))
    record = json.loads((tmp_path / "outputs" / "a" / "run.json").read_text())
    record["starts"][0]["time"] = "2020-01-01T00:00:00+00:00"
    (tmp_path / "outputs" / "a" / "run.json").write_text(json.dumps(record))
    make_run(tmp_path / "outputs", "b", steps=(4,))
    assert "outputs/b" in str(json.loads(say(capsys, name, "--json")[1]))


def test_what_the_file_system_refuses_is_said_in_words(run_dir: Path, capsys: Capture) -> None:
    (run_dir / "summary.json").unlink(missing_ok=True)
    (run_dir / "summary.json").mkdir()
    code, _, err = say(capsys, "report", run_dir)
    assert (code, len(err.splitlines())) == (2, 1)
    assert f"No access: {run_dir / 'summary.json'} (Is a directory)" in err


def test_a_reader_that_goes_away_ends_a_command_silently(run_dir: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "savepoint", "ls", str(run_dir)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")  # what it says of the run, whoever listens


def test_a_name_cannot_act_on_the_terminal(tmp_path: Path, capsys: Capture) -> None:
    make_run(tmp_path, "with space\x1b[2J", steps=(3,))
    (tmp_path / os.fsdecode(b"\xff")).mkdir()
    (tmp_path / os.fsdecode(b"\xff") / "run.json").touch()
    out = say(capsys, "ls", tmp_path)[1]
    assert "with space\\x1b[2J" in out
    assert "\\udcff" in out
    assert "\x1b" not in out


def test_columns_of_numbers_stand_to_the_right() -> None:
    assert words.table(("a", "b", "c"), [("x", "1 MB", "y"), ("long", "-", "zz")]) == (
        "a        b  c\nx     1 MB  y\nlong     -  zz"
    )


# -- ls ------------------------------------------------------------------------------------------


def test_ls_shows_step_score_and_which_is_latest_and_best(run_dir: Path, capsys: Capture) -> None:
    code, out, _ = say(capsys, "ls", run_dir)
    rows = [line.split() for line in out.splitlines()]
    assert code == 0
    assert rows[0] == ["file", "step", "epoch", "val/loss", "size", "age", "mark", "verified"]
    assert [row[:4] for row in rows[1:]] == [
        ["step-00000010.ckpt", "10", "1", "10.0000"],
        ["step-00000020.ckpt", "20", "2", "20.0000"],
        ["step-00000030.ckpt", "30", "3", "30.0000"],
    ]
    assert [row[-2:] for row in rows[1:]] == [["best", "yes"], ["d", "yes"], ["latest", "yes"]]
    assert say(capsys, "ls", run_dir / "checkpoints")[1] == out


def test_ls_shows_no_score_that_was_measured_at_another_step(
    run_dir: Path, capsys: Capture
) -> None:
    measured = {"val/loss": {"value": 1.0, "step": 30}}
    store(run_dir).add(small_state(), {**facts(40), "metrics": measured})
    last = json.loads(say(capsys, "ls", run_dir, "--json")[1])["checkpoints"][-1]
    assert (last["step"], last["monitor"], last["score"]) == (40, "val/loss", None)


def test_ls_names_a_damaged_file_and_exits_with_1(run_dir: Path, capsys: Capture) -> None:
    truncate(run_dir / "checkpoints" / "step-00000020.ckpt")
    code, out, _ = say(capsys, "ls", run_dir)
    assert code == 1
    assert "NO: truncated: " in next(
        line for line in out.splitlines() if line.startswith("step-00000020.ckpt")
    )


def test_ls_shows_what_was_set_aside_which_is_no_longer_wrong(
    run_dir: Path, capsys: Capture
) -> None:
    damaged = run_dir / "checkpoints" / "step-00000020.ckpt"
    truncate(damaged)
    damaged.rename(f"{damaged}.corrupt")
    code, out, _ = say(capsys, "ls", run_dir)
    assert code == 0
    assert "quarantined: truncated: " in out
    for path in store(run_dir).checkpoints():
        path.path.unlink()
    assert say(capsys, "ls", run_dir)[0] == 1


def test_a_directory_of_runs_is_none_and_names_them(run_dir: Path, capsys: Capture) -> None:
    for name in ("show", "gc"):
        code, _, err = say(capsys, name, run_dir.parent)
        assert code == 2
        assert f"It holds runs: {run_dir}" in err


def test_ls_of_a_name_that_is_nearly_right_says_which(run_dir: Path, capsys: Capture) -> None:
    assert f"Did you mean {run_dir}?" in say(capsys, "ls", run_dir.with_name("firts"))[2]


# -- ls of a directory of runs -------------------------------------------------------------------


def test_ls_tells_the_states_of_runs_apart(tmp_path: Path, capsys: Capture) -> None:
    make_run(tmp_path, "finished", ended="max_epochs")
    make_run(tmp_path, "stopped")
    make_run(tmp_path, "longer", ended="max_epochs")
    store(tmp_path / "longer").add(small_state(), facts(40, 40.0))
    (make_run(tmp_path, "untested", ended="max_epochs") / "summary.json").unlink()
    make_run(tmp_path, "broken", steps=())
    running = make_run(tmp_path, "running", ended="max_epochs")
    (tmp_path / "another thing").mkdir()
    with training_in(running):
        code, out, _ = say(capsys, "ls", tmp_path, "--json")
    assert code == 1
    states = {row["run"]: row["state"] for row in json.loads(out)}
    assert states == {"longer": "stopped", "untested": "stopped"} | {
        name: name for name in ("finished", "stopped", "broken", "running")
    }
    last = say(capsys, "ls", tmp_path)[1].splitlines()[-1]
    assert last.endswith(f"-m savepoint verify {tmp_path / 'broken'}")


def test_ls_shows_what_the_test_logged_whatever_its_name(tmp_path: Path, capsys: Capture) -> None:
    run = Run(make_run(tmp_path, ended="max_epochs"))
    run.write_summary({"steps": 30, "loss_test": 0.5, "test_metrics": ["loss_test"]})
    assert "loss_test 0.5000" in say(capsys, "ls", tmp_path)[1]


def test_ls_shows_best_and_test_of_the_newest_state_alone(tmp_path: Path, capsys: Capture) -> None:
    finished = make_run(tmp_path, ended="max_epochs")
    make_run(tmp_path, "second", ended="max_epochs")
    store(tmp_path / "second").add(small_state(), facts(40, 40.0))  # the summary is of step 30
    fork(finished, "third", 20)
    code, out, _ = say(capsys, "ls", tmp_path)
    rows = {line.split()[0]: line.split()[1:-2] for line in out.splitlines()}
    assert code == 0
    assert rows["first"] == [
        "fast", "val/loss", "10.0000", "accuracy", "50.00", "%", "30", "finished",
    ]  # fmt: skip
    assert rows["second"][-3:] == ["-", "40", "stopped"]
    assert rows["third"][:3] == ["fork", "of", "first"]


def test_ls_neither_takes_nor_drops_nor_makes_the_lock(run_dir: Path, capsys: Capture) -> None:
    before = names(run_dir)
    say(capsys, "ls", run_dir.parent)
    assert names(run_dir) == before
    with training_in(run_dir) as pid:
        said = (run_dir / "lock").read_text()
        assert "running" in say(capsys, "ls", run_dir.parent)[1]
        assert (run_dir / "lock").read_text() == said
        with pytest.raises(RunLockedError, match=f"pid {pid} on"):
            Run(run_dir).lock()
    assert "stopped" in say(capsys, "ls", run_dir.parent)[1]


def test_ls_goes_on_past_a_run_that_cannot_be_read(run_dir: Path, capsys: Capture) -> None:
    unreadable = make_run(run_dir.parent, "unreadable")
    (unreadable / "lock").symlink_to("lock")
    code, out, _ = say(capsys, "ls", run_dir.parent)
    assert code == 1
    assert (
        f"unreadable cannot be read: {unreadable / 'lock'}: Too many levels of symbolic links"
        in out
    )
    assert (
        next(line for line in out.splitlines() if line.startswith("first")).split()[-3] == "stopped"
    )


def test_ls_of_nothing_is_fine_of_a_file_not(
    run_dir: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "empty").mkdir()
    assert say(capsys, "ls", tmp_path / "empty")[:2] == (0, f"{tmp_path / 'empty'}: no runs\n")
    assert "A file, not a run directory" in say(capsys, "ls", run_dir / "run.json")[2]


def test_ls_without_a_path_lists_the_runs_under_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = say(capsys, "ls")
    assert code == 2
    there = tmp_path / "outputs"
    assert f"No runs yet: {there}. The first run makes this directory. Start one: " in err
    for name in ("a", "checkpoints"):  # a run may be called so
        make_run(tmp_path / "outputs", name, steps=(3,))
    found = json.loads(say(capsys, "ls", "--json")[1])
    assert {row["run"] for row in found} == {"a", "checkpoints"}
    one = json.loads(say(capsys, "ls", "outputs/checkpoints", "--json")[1])
    assert [row["step"] for row in one["checkpoints"]] == [3]


@pytest.mark.parametrize(
    "damage", ["", "{bad", "[]", '{"starts": 3}', '{"starts": [3, {"argv": 3, "time": 1}]}']
)
def test_a_damaged_record_costs_what_stood_in_it_alone(
    damage: str, run_dir: Path, capsys: Capture
) -> None:
    (run_dir / "run.json").write_text(damage)
    code, out, _ = say(capsys, "ls", run_dir.parent, "--json")
    (row,) = json.loads(out)
    assert code == 0
    assert (row["config"], row["step"], row["state"]) == (None, 30, "stopped")
    assert "run.json is missing or damaged" in lineage(capsys, run_dir)
    (run_dir / "run.json").unlink()
    assert "run.json is missing or damaged" in say(capsys, "show", run_dir)[1]


# -- show ----------------------------------------------------------------------------------------


def test_show_prints_facts_metrics_config_and_tensors(run_dir: Path, capsys: Capture) -> None:
    code, out, _ = say(capsys, "show", run_dir)
    assert code == 0
    assert out.startswith(f"{latest(run_dir).path}\n")
    rows = [line.split() for line in out.splitlines()]
    assert ["step", "30"] in rows
    assert ["val/loss", "30.0000", "30"] in rows
    norm = f"{float(small_state(30.0)['state_dict']['weight'].double().norm()):.4f}"
    assert ["weight", "(20,", "30)", "float32", norm, "2400"] in rows
    assert ["count", "()", "int64", "7.0000", "8"] in rows
    assert ["optimizer_states", "2", "2404"] in rows
    assert small_state()["config"] in out


def test_the_config_alone_can_be_written_to_a_file(run_dir: Path, capsys: Capture) -> None:
    assert say(capsys, "show", run_dir, "--only", "config")[1] == small_state()["config"]


def test_a_damaged_file_is_not_shown(run_dir: Path, capsys: Capture) -> None:
    flip(latest(run_dir).path)
    code, out, err = say(capsys, "show", latest(run_dir).path)
    assert (code, out) == (2, "")
    assert "damaged bytes in record" in err


def test_a_norm_that_is_no_number_is_a_text_in_json(run_dir: Path, capsys: Capture) -> None:
    state = small_state()
    state["state_dict"]["weight"][0, 0] = float("inf")
    store(run_dir).add(state, facts(40, "nan"))
    shown = json.loads(say(capsys, "show", run_dir, "--json")[1])
    assert shown["tensors"]["weights"][0]["norm"] == "inf"
    assert shown["metrics"]["val/loss"]["value"] == "nan"


# -- show: lineage -------------------------------------------------------------------------------


def lineage(capsys: Capture, path: Path) -> str:
    code, out, _ = say(capsys, "show", path, "--only", "lineage")
    assert code == 0
    return out


def test_a_run_without_a_checkpoint_has_a_lineage(tmp_path: Path, capsys: Capture) -> None:
    run_dir = make_run(tmp_path, steps=())
    assert "run  first, id " in lineage(capsys, run_dir)
    code, _, err = say(capsys, "show", run_dir)
    assert code == 2
    assert f"-m savepoint verify {run_dir}" in err


def test_show_ends_with_the_lineage_of_the_run(run_dir: Path, capsys: Capture) -> None:
    fork(run_dir, "child", 20)
    path = run_dir / "checkpoints" / "step-00000020.ckpt"
    assert say(capsys, "show", run_dir)[1].endswith(lineage(capsys, run_dir))
    assert say(capsys, "show", path)[1].endswith(lineage(capsys, path))
    assert "forked into  child, at step 20" in lineage(capsys, path)


def test_lineage_goes_on_past_a_run_of_another_user(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    fork(run_dir, "child", 20)
    theirs = make_run(run_dir.parent, "theirs") / "checkpoints"
    scandir = os.scandir

    def refusing(path: Path) -> Any:
        if path == theirs:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert "forked into  child, at step 20" in lineage(capsys, run_dir)


def test_lineage_tells_the_starts_and_finds_forks_in_both_directions(
    run_dir: Path, capsys: Capture
) -> None:
    child = fork(run_dir, "child", 20)
    grandchild = fork(child, "grand child", 21)
    code, out, _ = say(capsys, "show", child, "--json")
    found = json.loads(out)["lineage"]
    assert code == 0
    assert [(one["run"], one["step"]) for one in found["ancestors"]] == [("first", 20)]
    assert [(one["run"], one["step"]) for one in found["forks"]] == [("grand child", 21)]
    text = lineage(capsys, grandchild)
    forked = [line for line in text.splitlines() if line.startswith("forked from")]
    assert [line.split("  ")[-1][:20].strip() for line in forked] == [
        "step 21 of child (/t",
        "step 20 of first (/t",
    ]
    assert "step 21  model.lr 0.1 -> 0.2  train.py --config configs/fast.yaml" in text


def test_lineage_of_a_file_names_where_its_process_began(run_dir: Path, capsys: Capture) -> None:
    child = fork(run_dir, "child", 20)
    began = "by a process that began from"
    assert f"step 30, {began} nothing" in lineage(capsys, latest(run_dir).path)
    assert f"step 22, {began} step 20 of first" in lineage(capsys, latest(child).path)
    (run_dir / "checkpoints" / "step-00000020.ckpt").unlink()
    assert f"step 22, {began} a checkpoint that is not here" in lineage(capsys, latest(child).path)
    assert "forked from  step 20 of a run whose checkpoint is not here" in lineage(capsys, child)


def test_a_copy_of_a_run_is_not_its_fork(run_dir: Path, capsys: Capture) -> None:
    parent = latest(run_dir).manifest["digest"]
    store(run_dir).add(
        small_state(), facts(40, 40.0, parent=parent, run_id=latest(run_dir).manifest["run_id"])
    )
    subprocess.run(["cp", "-r", run_dir, run_dir.with_name("copy")], check=True)
    found = json.loads(say(capsys, "show", run_dir, "--only", "lineage", "--json")[1])["lineage"]
    assert (found["ancestors"], found["forks"]) == ([], [])


@pytest.mark.parametrize("command", ["ls", "show", "verify", "gc", "report", "export"])
def test_an_empty_path_is_not_the_working_directory(
    command: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(run_dir)
    more = ["--format", "npz"] if command == "export" else []
    code, out, err = say(capsys, command, "", *more)
    assert (code, out) == (2, "")
    assert "An empty path" in err


def test_a_name_does_nothing_to_a_terminal_in_a_message_either(
    tmp_path: Path, capsys: Capture
) -> None:
    code, _, err = say(capsys, "ls", tmp_path / "\x1b[2J")
    assert code == 2
    assert "\\x1b[2J" in err
    assert "\x1b" not in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_the_output_is_no_success(
    run_dir: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "savepoint", "ls", run_dir],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
        monkeypatch.setattr(sys, "stdout", entry.tolerant(full))
        code = commands.main(["show", str(run_dir)])
    assert (done.returncode, code) == (2, 2)
    for said in (done.stderr, capsys.readouterr().err):
        assert "The output could not be written: No space left on device" in said
        assert len(said.splitlines()) == 1


def test_a_run_that_named_no_config_is_listed_with_the_default_one(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--run_name", "first"])
    with monkeypatch.context() as as_train:
        entered = workspace.Project(tmp_path, Path("configs/mine.yaml"))
        as_train.setattr(workspace, "_entered", entered)
        make_run(tmp_path)
    (row,) = json.loads(say(capsys, "ls", tmp_path, "--json")[1])
    assert row["config"] == "mine"


def test_a_name_that_has_to_be_escaped_moves_no_column(tmp_path: Path, capsys: Capture) -> None:
    make_run(tmp_path, "plain")
    make_run(tmp_path, "\x1b[31mred")
    header, *lines = say(capsys, "ls", tmp_path)[1].splitlines()
    assert {line[header.index("config") :].split()[0] for line in lines[:2]} == {"fast"}
