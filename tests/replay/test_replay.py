"""A run is trained again up to any step, beside its log, and is left as it is."""

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.programs import FOUR_AN_EPOCH, begin, go, into
from support.small import SmallModel, fit
from support.trained import Capture, altered, say, trained
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import project  # noqa: F401  (its classes can be named shortly)
from savepoint import find
from savepoint.checkpoint import store
from savepoint.comparing import compare
from savepoint.errors import NonFiniteLossError
from savepoint.loaders.resumable import resumable
from savepoint.replay.looking import StepLook
from savepoint.training.logs import read_rows


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.getbasetemp())


@pytest.fixture
def run_dir(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "outputs" / "first"))


def replayed(capsys: Capture, run_dir: Path, *words: str) -> tuple[int, dict[str, Any]]:
    code, out, _ = say(capsys, "replay", str(run_dir), *words, "--json")
    return code, json.loads(out)


def content(directory: Path) -> dict[str, str]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# -- replay --------------------------------------------------------------------------------------


def test_the_rows_up_to_a_step_are_those_of_the_log_and_the_run_is_left_as_it_is(
    run_dir: Path, capsys: Capture
) -> None:
    before = content(run_dir)
    code, out, err = say(capsys, "replay", str(run_dir), "--step", "7", "--to", "11")
    assert code == 0
    assert "rows 5 to 9: equal to the log" in out
    assert f"step 7 of {run_dir}: epoch 2, batch 3, loss " in out
    assert "all outputs are finite" in out
    assert "Replaying 7 steps" in err
    assert content(run_dir) == before


def test_a_run_of_other_code_is_refused_and_replayed_where_that_is_allowed(
    run_dir: Path, capsys: Capture
) -> None:
    record = json.loads((run_dir / "run.json").read_text())
    for start in record["starts"]:
        start["git"] = {"commit": "0123456789" * 4, "dirty": False}
    (run_dir / "run.json").write_text(json.dumps(record))
    code, _, err = say(capsys, "replay", str(run_dir), "--step", "7")
    assert code == 2
    assert "trained at commit 0123456, which is not known here" in err
    assert "--allow-code" in err
    code, out, _ = say(capsys, "replay", str(run_dir), "--step", "7", "--allow-code")
    assert code == 0
    assert "note: it was trained at commit 0123456" in out
    assert say(capsys, "audit", str(run_dir))[0] == 2
    assert say(capsys, "bisect", str(run_dir), str(run_dir), "--allow-code")[0] == 0


def test_the_first_row_that_differs_is_named_with_both_values(
    run_dir: Path, capsys: Capture
) -> None:
    log = run_dir / "metrics.csv"
    _, rows = read_rows(log)
    [row] = [row for row in rows if row["step"] == "7" and row["train/loss_step"]]
    was = row["train/loss_step"]
    row["train/loss_step"] = "0.5"
    with log.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    code, found = replayed(capsys, run_dir, "--step", "8")
    assert code == 1
    values = {"train/loss_step": ["0.5", was]}
    assert found["rows"]["differing"] == {"step": 7, "values": values}
    out = say(capsys, "replay", str(run_dir), "--step", "8")[1]
    assert (
        f"row of step 7: DIFFERENT from the log, after 1 equal rows: train/loss_step 0.5 in the log, {was} now"
        in out
    )


def test_the_step_is_that_of_the_run(run_dir: Path, capsys: Capture) -> None:
    _, found = replayed(capsys, run_dir, "--step", "6")
    logged = {row["step"]: row for row in read_rows(run_dir / "metrics.csv")[1]}
    assert found["step"]["loss"] == pytest.approx(float(logged["5"]["train/loss_step"]), rel=1e-6)
    layers = found["step"]["layers"]
    state = store.load(run_dir / "checkpoints" / "step-00000008.ckpt")[0]
    assert layers.keys() <= state["state_dict"].keys()
    assert all(row["gradient_norm"] > 0 and row["update"] > 0 for row in layers.values())


def test_a_step_before_the_first_checkpoint_is_refused(run_dir: Path, capsys: Capture) -> None:
    code, out, err = say(capsys, "replay", str(run_dir), "--step", "3")
    assert (code, out) == (2, "")
    assert "No checkpoint before step 3" in err
    assert "has those of 4, 8, 12" in err


def test_a_step_after_the_end_of_the_run_is_refused(run_dir: Path, capsys: Capture) -> None:
    code, out, err = say(capsys, "replay", str(run_dir), "--step", "13")
    assert (code, out) == (2, "")
    assert "Not reached: step 13" in err


def test_a_replay_that_ends_too_early_leaves_nothing(run_dir: Path, capsys: Capture) -> None:
    words = ["--step", "9", "--to", "13", "--fork", "kept"]
    code, out, err = say(capsys, "replay", str(run_dir), *words)
    assert (code, out) == (2, "")
    assert f"Not reached: step 13. {run_dir} ends at step 12" in err
    assert sorted(path.name for path in run_dir.parent.iterdir()) == ["first"]


def test_an_end_before_the_step_is_refused(run_dir: Path, capsys: Capture) -> None:
    code, _, err = say(capsys, "replay", str(run_dir), "--step", "9", "--to", "0")
    assert code == 2
    assert "No such steps: --step 9 --to 0" in err


def test_a_directory_for_the_batch_is_refused_before_the_training(
    run_dir: Path, capsys: Capture, tmp_path: Path
) -> None:
    words = ["--step", "9", "--save-batch", str(tmp_path)]
    code, _, err = say(capsys, "replay", str(run_dir), *words)
    assert code == 2
    assert len(err.splitlines()) == 1


def test_a_training_of_several_processes_is_refused(run_dir: Path, capsys: Capture) -> None:
    file = run_dir / "checkpoints" / "step-00000008.ckpt"
    state, facts = store.load(file)
    store.write(file, state, {**facts, "world_size": 2})
    code, _, err = say(capsys, "replay", str(run_dir), "--step", "9")
    assert code == 2
    assert "A training of 2 processes" in err


def test_what_stands_against_an_equal_replay_is_said(run_dir: Path, capsys: Capture) -> None:
    file = run_dir / "checkpoints" / "step-00000008.ckpt"
    state, facts = store.load(file)
    store.write(file, state, {**facts, "exact": False, "unsaved": ["model.x (a file handle)"]})
    _, found = replayed(capsys, run_dir, "--step", "9")
    assert found["notes"] == ["step-00000008.ckpt is not exact: model.x (a file handle)"]


def test_the_batch_of_a_step_can_be_kept(run_dir: Path, capsys: Capture, tmp_path: Path) -> None:
    file = tmp_path / "batch.pt"
    _, found = replayed(capsys, run_dir, "--step", "6", "--save-batch", str(file))
    images, labels = torch.load(file, weights_only=True)
    assert found["step"]["shapes"] == [list(images.shape), list(labels.shape)]
    assert len(found["step"]["indices"]) == len(labels)


def test_the_state_of_a_step_can_be_kept_as_a_run_of_its_own(
    run_dir: Path, capsys: Capture
) -> None:
    code, _ = replayed(capsys, run_dir, "--step", "8", "--fork", "kept")
    assert code == 0
    kept = find.run(run_dir.parent / "kept")
    assert kept.latest is not None
    was = store.load(run_dir / "checkpoints" / "step-00000008.ckpt")[0]
    now = store.load(kept.latest.path)[0]
    assert compare(was, now)["parts"] == ["logged_rows"]  # its log begins at step 4


def test_a_function_of_the_users_is_called_at_the_step_and_changes_nothing(
    run_dir: Path, capsys: Capture, tmp_path: Path
) -> None:
    code = "import torch\ndef look(trainer, module, batch, batch_idx):\n"
    code += "    print('looked', trainer.global_step, batch_idx, len(batch), torch.rand(1).shape)\n"
    (tmp_path / "mine.py").write_text(code)
    words = ["--step", "6", "--to", "9", "--with", str(tmp_path / "mine.py")]
    ended, out, err = say(capsys, "replay", str(run_dir), *words)
    assert err.count("looked 5 1 2 torch.Size([1])") == 1
    assert (ended, "equal to the log" in out) == (0, True)


@pytest.mark.parametrize("code", ["x = 1", "look = 1", "1 / 0", "look ="])
def test_a_file_without_such_a_function_is_refused(
    code: str, run_dir: Path, capsys: Capture, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(code)
    words = ["--step", "6", "--with", str(tmp_path / "mine.py")]
    ended, _, err = say(capsys, "replay", str(run_dir), *words)
    assert ended == 2
    assert "No function `look` in" in err
    assert len(err.splitlines()) == 1


def test_a_replay_that_fails_leaves_no_fork(run_dir: Path, capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def look(*_):\n    raise KeyError('no')\n")
    words = ["--step", "6", "--fork", "kept", "--with", str(tmp_path / "mine.py")]
    with pytest.raises(KeyError):
        say(capsys, "replay", str(run_dir), *words)
    assert not (run_dir.parent / "kept").exists()


def test_a_debugger_stops_in_the_training_step(
    run_dir: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("p 'batch', batch_idx\nc\n"))
    code, _, err = say(capsys, "replay", str(run_dir), "--step", "6", "--debug")
    assert code == 0
    assert "training_step(" in err
    assert "('batch', 1)" in err


# -- what a step shows ---------------------------------------------------------------------------


class DividesByZero(SmallModel):
    def __init__(self) -> None:
        super().__init__()
        self.root = nn.Module()
        self.root.forward = self.of_root  # type: ignore[method-assign]

    def of_root(self, x: Tensor) -> Tensor:
        return x / 0 if self.trainer.global_step == 4 else x

    def forward(self, x: Tensor) -> Tensor:
        return self.root(super().forward(x))


def test_the_first_module_whose_output_is_not_finite_is_named(tmp_path: Path) -> None:
    look = StepLook(5)
    with pytest.raises(NonFiniteLossError):
        fit(tmp_path, model=DividesByZero, callbacks=lambda: [look], max_epochs=1)
    assert look.found["not_finite"] == "root"
    assert not any(row["finite"] for row in look.found["layers"].values())


class NotFiniteInTheFirstOfTwo(SmallModel):
    """The batches of the third step, of two each."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        is_bad = (self.trainer.global_step, batch_idx % 2) == (2, 0)
        return super().training_step((x / 0, y) if is_bad else batch, batch_idx)


def test_a_step_of_several_batches_is_looked_at_in_each_of_them(tmp_path: Path) -> None:
    look = StepLook(3)
    with pytest.raises(NonFiniteLossError, match="first at step 3"):
        fit(
            tmp_path,
            model=NotFiniteInTheFirstOfTwo,
            callbacks=lambda: [look],
            max_epochs=1,
            accumulate_grad_batches=2,
        )
    assert look.found["not_finite"] == "net.0"


def test_a_loader_knows_the_samples_of_a_batch() -> None:
    samples = TensorDataset(torch.arange(10))
    loader = resumable(DataLoader(samples, batch_size=4, shuffle=True), seed=1)
    batches = [batch[0].tolist() for batch in loader]
    assert [loader.indices(number) for number in range(3)] == batches


# -- audit ---------------------------------------------------------------------------------------


def test_a_run_is_reproducible_here(run_dir: Path, capsys: Capture) -> None:
    before = content(run_dir)
    code, out, _ = say(capsys, "audit", str(run_dir))
    assert code == 0
    assert "This run is reproducible here: 2 of 2 parts equal." in out
    assert content(run_dir) == before


def test_a_run_that_was_trained_longer_is_reproducible_too(run_dir: Path, capsys: Capture) -> None:
    assert go(str(run_dir), "--trainer.max_epochs", "4") == 0
    code, out, _ = say(capsys, "audit", str(run_dir))
    assert (code, "3 of 3 parts equal" in out) == (0, True)
    assert "the replay is not" not in out
    code, out, _ = say(capsys, "replay", str(run_dir), "--step", "14")
    assert (code, "equal to the log" in out) == (0, True)


def test_a_row_of_zeros_that_a_crash_has_left_is_a_row_that_differs(
    run_dir: Path, capsys: Capture
) -> None:
    log = run_dir / "metrics.csv"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([*lines[:-2], "\0" * 200_000, "\n"]))
    code, out, _ = say(capsys, "audit", str(run_dir), "--json")
    assert code == 1
    assert [part["equal"] for part in json.loads(out)["parts"]] == [True, False]


@pytest.mark.parametrize("change", [
    lambda content: content[:-5000],
    lambda content: content[:9000] + bytes([content[9000] ^ 1]) + content[9001:],
], ids=["cut", "one bit"])  # fmt: skip
def test_a_damaged_checkpoint_takes_nothing_from_the_parts_that_can_be_read(
    change: Callable[[bytes], bytes], run_dir: Path, capsys: Capture
) -> None:
    newest = run_dir / "checkpoints" / "step-00000012.ckpt"
    newest.write_bytes(change(newest.read_bytes()))
    code, out, _ = say(capsys, "audit", str(run_dir))
    assert code == 1
    assert "This run is reproducible here: 1 of 2 parts equal, 1 not read." in out
    assert "step-00000012.ckpt: " in out


@pytest.mark.parametrize("number", ["0", "-3"])
def test_a_sample_of_no_parts_is_refused(number: str, run_dir: Path, capsys: Capture) -> None:
    code, out, err = say(capsys, "audit", str(run_dir), "--sample", number)
    assert (code, out) == (2, "")
    assert f"--sample {number}" in err


def test_the_part_that_comes_out_differently_is_named(run_dir: Path, capsys: Capture) -> None:
    file = run_dir / "checkpoints" / "step-00000008.ckpt"
    state, _ = store.load(file)
    weights = {name: one.clone() for name, one in state["state_dict"].items()}
    next(iter(weights.values())).view(-1)[0] += 1
    altered(file, file, state_dict=weights)
    code, out, _ = say(capsys, "audit", str(run_dir), "--allow", "canary", "--json")
    assert code == 1
    parts = json.loads(out)["parts"]
    assert [(part["from"], part["equal"]) for part in parts] == [(4, False), (8, False)]
    assert parts[0]["state"] == ["state_dict"]


def test_a_log_that_lacks_rows_is_not_what_the_run_has_logged(
    run_dir: Path, capsys: Capture
) -> None:
    log = run_dir / "metrics.csv"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:4]))
    code, out, _ = say(capsys, "audit", str(run_dir), "--json")
    assert code == 1
    assert [part["missing_rows"] > 0 for part in json.loads(out)["parts"]] == [True, True]


def test_one_checkpoint_alone_is_nothing_to_audit(run_dir: Path, capsys: Capture) -> None:
    cut, gone = (run_dir / "checkpoints" / f"step-{step:08d}.ckpt" for step in (4, 8))
    gone.unlink()
    os.truncate(cut, 1000)
    code, _, err = say(capsys, "audit", str(run_dir))
    assert code == 2
    assert "has 1 checkpoint, and 1 that cannot be read." in err
    cut.unlink()
    assert "has 1 checkpoint." in say(capsys, "audit", str(run_dir))[2]


# -- a run that stopped --------------------------------------------------------------------------


def test_a_run_that_stops_on_nan_names_the_command_that_shows_the_step(
    tmp_path: Path, capsys: Capture
) -> None:
    breaking = "{class_path: support.breaking.Breaking, init_args: {rank: 0, step: 5}}"
    words = [*into(tmp_path, "nan"), "--trainer.callbacks+", breaking]
    with pytest.raises(NonFiniteLossError, match=r"savepoint replay .*nan --step 6"):
        begin(*FOUR_AN_EPOCH, *words)
    code, out, _ = say(capsys, "replay", str(tmp_path / "nan"), "--step", "6")
    assert code == 0
    assert "is the first" in out
