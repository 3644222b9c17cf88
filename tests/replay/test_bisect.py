"""Two runs that ought to be equal are followed to the first step, and the first value, in which
they differ.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from support.programs import FOUR_AN_EPOCH, begin, go, into
from support.run_dirs import say
from support.trained import Capture, altered, trained

import project  # noqa: F401  (its classes can be named shortly)
from savepoint.checkpoint import store


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.getbasetemp())


def planted(outputs: Path, what: str, *flags: str) -> Path:
    """A run like `straight`, in which something is another from step 6 on."""
    callback = f"{{class_path: support.planted.Planted, init_args: {{what: {what}}}}}"
    words = ["--trainer.callbacks+", callback]
    assert begin(*FOUR_AN_EPOCH, *words, *into(outputs, what), *flags) == 0
    return outputs / what


def told(capsys: Any, *words: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()  # of the trainings before
    return say(capsys, "bisect", *words)


def bisected(capsys: Capture, *words: str | Path, code: int = 1) -> dict[str, Any]:
    ended, out, err = told(capsys, *words, "--json")
    assert ended == code, err
    found: dict[str, Any] = json.loads(out)
    return found


def first_place(found: dict[str, Any]) -> tuple[int, str, str]:
    kind, names = next(iter(found["first"]["places"].items()))
    return found["first"]["step"], kind, names[0]


# -- planted differences -------------------------------------------------------------------------


def test_one_weight_that_has_changed_is_found_at_its_step(
    straight: Path, tmp_path: Path, capsys: Capture
) -> None:
    other = planted(tmp_path, "weight")
    found = bisected(capsys, straight, other)
    assert (found["agree"], found["differ"]) == (4, 8)
    assert first_place(found) == (6, "weight", "net.features.0.weight")
    size = found["sizes"]["weight"]
    assert (size["largest"], size["differing"], size["of"]) == (pytest.approx(1), 1, 36)
    assert found["unstable"] == []


def test_what_differs_in_a_state_before_a_batch_does_is_followed_to_that_batch(
    straight: Path, tmp_path: Path, capsys: Capture
) -> None:
    found = bisected(capsys, straight, planted(tmp_path, "late"))
    assert (found["differ"], found["parts"]) == (4, ["callbacks"])
    assert first_place(found) == (6, "weight", "net.features.0.weight")


def test_a_difference_behind_the_last_checkpoints_that_both_have_is_found(
    straight: Path, tmp_path: Path, capsys: Capture
) -> None:
    other = planted(tmp_path, "weight")
    for step in (8, 12):
        (other / "checkpoints" / f"step-{step:08d}.ckpt").unlink()
    found = bisected(capsys, straight, other)
    assert (found["agree"], found["differ"]) == (4, None)
    assert first_place(found) == (6, "weight", "net.features.0.weight")


def test_data_of_other_values_are_named(straight: Path, tmp_path: Path, capsys: Capture) -> None:
    other = Path(shutil.copytree(straight, tmp_path / "other"))
    for file in sorted((other / "checkpoints").glob("step-*.ckpt")):
        numbers = store.load(file)[0]["numbers"]
        altered(file, file, numbers={name: value + 1 for name, value in numbers.items()})
    found = bisected(capsys, straight, other)
    assert found["data"]
    assert set(found["data"]) <= set(store.load(file)[0]["numbers"])


@pytest.mark.slow
def test_another_order_of_the_data_is_found_where_it_begins(
    straight: Path, tmp_path: Path, capsys: Capture
) -> None:
    other = planted(tmp_path, "order")
    found = bisected(capsys, straight, other)
    assert found["agree"] == 8
    assert first_place(found) == (9, "samples", "the batch")
    assert "weight" not in found["first"]["places"]


def test_an_operation_that_is_not_deterministic_is_found_and_named_as_such(
    straight: Path, tmp_path: Path, capsys: Capture
) -> None:
    other = planted(tmp_path, "noise")
    code, out, _ = told(capsys, straight, other)
    assert code == 1
    assert "They agree at step 4. At step 8 they do not" in out
    assert "First difference: step 6 (epoch 2, batch 2)" in out
    assert "  output of net.classify and 1 more: largest difference" in out
    assert "B is not deterministic: trained twice, it differs from itself at step 6" in out
    assert "A is not deterministic" not in out


@pytest.mark.slow
def test_another_seed_is_found_at_the_first_step(
    straight: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = ["--trainer.limit_test_batches", "1.0", "--seed_everything", "5"]
    assert begin(*FOUR_AN_EPOCH, *words, *into(tmp_path, "seed")) == 0
    found = bisected(capsys, straight, tmp_path / "seed")
    assert (found["agree"], found["from"]) == (None, 0)
    assert found["config"] == {"seed_everything": [0, 5]}
    assert first_place(found) == (1, "samples", "the batch")
    assert "weight" in found["first"]["places"]


def test_another_learning_rate_of_a_fork_is_found_where_it_begins(
    straight: Path, tmp_path: Path, capsys: Capture
) -> None:
    outputs = tmp_path / "outputs"
    parent = Path(shutil.copytree(straight, outputs / "first"))
    file = parent / "checkpoints" / "step-00000008.ckpt"
    flags = ["--model.lr", "0.5", "--allow", "model.lr", "--output_dir", str(outputs)]
    assert go(str(file), "--fork", "faster", *flags) == 0
    found = bisected(capsys, parent, outputs / "faster")
    assert found["from"] == 8
    assert first_place(found)[:2] == (9, "setting")
    assert found["first"]["places"]["setting"] == ["lr"]
    assert "gradient" not in found["first"]["places"]
    was, now = found["sizes"]["setting"]["values"]
    assert 0 < was < now


def test_a_file_that_was_changed_is_told_from_a_training_that_differs(
    straight: Path, tmp_path: Path, capsys: Capture
) -> None:
    other = Path(shutil.copytree(straight, tmp_path / "other"))
    file = other / "checkpoints" / "step-00000008.ckpt"
    state, _ = store.load(file)
    weights = {name: one.clone() for name, one in state["state_dict"].items()}
    next(iter(weights.values())).view(-1)[0] += 1
    altered(file, file, state_dict=weights)
    with_facts(other, exact=False, unsaved=["model.x (a file handle)"])
    code, out, _ = told(capsys, straight, other)
    assert code == 1
    assert "Equal, trained again from step 4 to 8: every batch, and the state at the end." in out
    assert "B's checkpoint of step 8 does not come out again: state_dict differ" in out
    assert "A's checkpoint" not in out
    assert "note: B: step-00000004.ckpt is not exact: model.x (a file handle)" in out


# -- runs that are equal -------------------------------------------------------------------------


def test_equal_runs_are_said_to_be(straight: Path, tmp_path: Path, capsys: Capture) -> None:
    other = shutil.copytree(straight, tmp_path / "other")
    code, out, _ = told(capsys, straight, other)
    assert code == 0
    assert "Equal up to step 12: all values of all checkpoints that both have." in out


def test_a_log_that_alone_differs_is_said(straight: Path, tmp_path: Path, capsys: Capture) -> None:
    other = shutil.copytree(straight, tmp_path / "other")
    log = other / "metrics.csv"
    header, first, *others = log.read_text().splitlines()
    values = first.split(",")
    values[header.split(",").index("train/loss_step")] = "3.5"
    log.write_text("\n".join([header, ",".join(values), *others, ""]))
    code, out, _ = told(capsys, straight, other)
    assert code == 1
    assert "The first row of their logs that differs: step 1, " in out
    assert "All their checkpoints are equal: the log alone is not." in out


def test_nothing_is_written_into_the_runs(straight: Path, tmp_path: Path, capsys: Capture) -> None:
    runs = [Path(shutil.copytree(straight, tmp_path / name)) for name in "ab"]
    (runs[1] / "checkpoints" / "step-00000012.ckpt").unlink()
    (runs[0] / "checkpoints" / "step-00000004.ckpt").unlink()

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = content()
    found = bisected(capsys, *runs, code=0)
    assert found["agree"] == 8
    assert content() == before
    (runs[1] / "checkpoints" / "step-00000008.ckpt").unlink()
    found = bisected(capsys, *runs, code=0)
    assert (found["agree"], found["from"], found["to"]) == (None, 0, 4)
    assert sorted(tmp_path.iterdir()) == runs


# -- another interpreter -------------------------------------------------------------------------


@pytest.fixture
def short(straight: Path, tmp_path: Path) -> Path:
    """Two steps before its end."""
    run = Path(shutil.copytree(straight, tmp_path / "short"))
    (run / "checkpoints" / "step-00000004.ckpt").unlink()
    return run


def test_another_interpreter_trains_one_side(short: Path, tmp_path: Path, capsys: Capture) -> None:
    found = bisected(capsys, short, short, "--python", sys.executable, code=0)
    assert (found["from"], found["to"], found["first"]) == (8, 12, None)
    assert found["ends"] == {"each other": []}
    assert found["environment"][0] == found["environment"][1]


def test_an_interpreter_that_cannot_train_says_why(
    short: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    bare.chmod(0o755)
    code, _, err = told(capfd, short, short, "--python", bare)
    assert code == 2
    assert "No module named 'savepoint'" in err
    assert f"No replay by {bare}: it ended with exit code 1, and has said why." in err
    assert "Traceback" not in err


@pytest.mark.parametrize("kind", ["missing", "text", "another program"])
def test_what_is_no_interpreter_is_refused(
    short: Path, tmp_path: Path, capsys: Capture, kind: str
) -> None:
    (tmp_path / "text").write_text("x")
    (tmp_path / "another program").write_text("#!/bin/sh\n")
    (tmp_path / "another program").chmod(0o755)
    code, out, err = told(capsys, short, short, "--python", tmp_path / kind)
    assert (code, out) == (2, "")
    assert "A program such as .venv/bin/python was expected." in err


# -- bad input -----------------------------------------------------------------------------------


def with_facts(run: Path, **facts: Any) -> Path:
    for file in run.glob("checkpoints/step-*.ckpt"):
        state, known = store.load(file)
        store.write(file, state, {**known, **facts})
    return run


@pytest.mark.parametrize(
    ("facts", "words"),
    [({"world_size": 2}, "A training of 2 processes"), ({"kind": "federated"}, "A federated run")],
)
def test_what_one_process_cannot_train_is_refused(
    straight: Path, tmp_path: Path, capsys: Capture, facts: dict[str, Any], words: str
) -> None:
    other = with_facts(Path(shutil.copytree(straight, tmp_path / "other")), **facts)
    code, out, err = told(capsys, straight, other)
    assert (code, out) == (2, "")
    assert words in err


def test_runs_that_agree_nowhere_and_begin_elsewhere_are_refused(
    straight: Path, tmp_path: Path, capsys: Capture
) -> None:
    other = Path(shutil.copytree(straight, tmp_path / "other"))
    for step in (4, 8, 12):
        altered(
            other / f"checkpoints/step-{step:08d}.ckpt",
            other / f"checkpoints/step-{step:08d}.ckpt",
            state_dict={},
        )
    record = json.loads((other / "run.json").read_text())
    record["starts"][0] |= {"checkpoint": "step-00000002.ckpt", "step": 2}
    (other / "run.json").write_text(json.dumps(record))
    code, out, err = told(capsys, straight, other)
    assert (code, out) == (2, "")
    assert "cannot be trained from step 0: it began at step-00000002.ckpt of another run" in err


def test_a_run_without_checkpoints_is_refused(
    straight: Path, tmp_path: Path, capsys: Capture
) -> None:
    other = Path(shutil.copytree(straight, tmp_path / "other"))
    shutil.rmtree(other / "checkpoints")
    code, out, err = told(capsys, straight, other)
    assert (code, out) == (2, "")
    assert "No checkpoint to begin at" in err
