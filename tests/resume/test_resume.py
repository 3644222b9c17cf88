"""What resume.py chooses, says, refuses and changes; the programs' own functions, called in this
process.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoint_files import no_room_for
from support.programs import FOUR_AN_EPOCH as SMALL
from support.programs import begin, go, steps
from support.small import rows

import project
from savepoint.checkpoint import format, store
from savepoint.checkpoint.state import process
from savepoint.errors import (
    CheckpointCorruptError,
    CheckpointForeignError,
    CheckpointNotFoundError,
    ConfigError,
    ConfigMismatchError,
    RunDirectoryError,
    RunLockedError,
    SavepointError,
)
from savepoint.resume import plan, request
from savepoint.training import progress


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("outputs")
    assert begin(*SMALL, "--output_dir", str(outputs), "--run_name", "first") == 0
    return outputs / "first"


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, elsewhere: a run directory is self-contained."""
    return Path(shutil.copytree(finished, tmp_path / "outputs" / "first"))


@pytest.fixture
def at_epoch_2(run_dir: Path) -> Path:
    """The run as it was when its second epoch had ended."""
    for name in ("step-00000012.ckpt", "last.ckpt", "best.ckpt"):
        (run_dir / "checkpoints" / name).unlink()
    (run_dir / "summary.json").unlink()
    return run_dir


class TestChoosing:
    def test_a_run_goes_on_from_its_latest_checkpoint_and_ends_as_the_straight_one(
        self, finished: Path, at_epoch_2: Path
    ) -> None:
        assert go(str(at_epoch_2)) == 0
        ends = [
            store.load(path / "checkpoints" / "last.ckpt")[0] for path in (finished, at_epoch_2)
        ]
        for name, value in ends[0]["state_dict"].items():
            assert torch.equal(value, ends[1]["state_dict"][name]), name
        assert rows(finished) == rows(at_epoch_2)
        assert len(json.loads((at_epoch_2 / "run.json").read_text())["starts"]) == 2

    def test_without_a_name_the_run_that_was_started_last_is_taken(self, at_epoch_2: Path) -> None:
        older = at_epoch_2.with_name("older")
        shutil.copytree(at_epoch_2, older)
        record = json.loads((older / "run.json").read_text())
        record["starts"][-1]["time"] = "2020-01-01T00:00:00+00:00"
        (older / "run.json").write_text(json.dumps(record))
        asked = request.requested(["--output_dir", str(at_epoch_2.parent)])
        assert asked is not None
        assert asked.run_dir == at_epoch_2

    def test_a_damaged_newest_file_is_said_set_aside_and_the_one_before_it_taken(
        self, run_dir: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        damaged = run_dir / "checkpoints" / "step-00000012.ckpt"
        data = bytearray(damaged.read_bytes())
        data[len(data) // 2] ^= 1
        damaged.write_bytes(data)
        for link in ("last.ckpt", "best.ckpt"):  # which were the same file
            (run_dir / "checkpoints" / link).unlink()
        assert go(str(run_dir)) == 0
        said = capsys.readouterr().out
        assert "step-00000012.ckpt" in said
        assert "4 steps" in said
        assert damaged.with_name("step-00000012.ckpt.corrupt").exists()
        assert 12 in steps(run_dir)

    def test_a_damaged_file_that_was_named_is_an_error_and_stays_as_it_is(
        self, run_dir: Path
    ) -> None:
        damaged = run_dir / "checkpoints" / "step-00000012.ckpt"
        whole = damaged.read_bytes()
        damaged.unlink()
        damaged.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CheckpointCorruptError, match="truncated"):
            go(str(damaged))
        assert damaged.exists()

    def test_an_older_checkpoint_is_refused_in_place_with_both_ways_named(
        self, run_dir: Path
    ) -> None:
        with pytest.raises(ConfigMismatchError, match=r"(?s)--fork NAME.*--rewind"):
            go(str(run_dir / "checkpoints" / "step-00000008.ckpt"))
        assert steps(run_dir) == [4, 8, 12]

    def test_a_fork_is_a_new_run_and_leaves_the_old_one_as_it_was(self, run_dir: Path) -> None:
        before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
        source = run_dir / "checkpoints" / "step-00000008.ckpt"
        assert go(str(source), "--fork", "second", "--output_dir", str(run_dir.parent)) == 0
        assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
        assert steps(run_dir.with_name("second")) == [12]
        parent = store.load(source)[1]["digest"]
        assert (
            store.CheckpointStore(run_dir.with_name("second") / "checkpoints")
            .checkpoints()[0]
            .manifest["parent"]
            == parent
        )

    def test_a_rewind_sets_later_checkpoints_and_rows_aside(
        self, finished: Path, run_dir: Path
    ) -> None:
        assert go(str(run_dir / "checkpoints" / "step-00000004.ckpt"), "--rewind") == 0
        aside = next((run_dir / "rewound").iterdir())
        assert {path.name for path in aside.iterdir()} >= {
            "step-00000008.ckpt",
            "step-00000012.ckpt",
            "metrics.csv",
        }
        assert steps(run_dir) == [4, 8, 12]
        assert rows(run_dir) == rows(finished)

    def test_a_file_alone_on_another_machine_is_enough(self, run_dir: Path, tmp_path: Path) -> None:
        alone = tmp_path / "alone.ckpt"
        shutil.copy(run_dir / "checkpoints" / "step-00000008.ckpt", alone)
        assert go(str(alone), "--output_dir", str(tmp_path / "elsewhere")) == 0
        made = next((tmp_path / "elsewhere").iterdir())
        assert steps(made) == [12]

    def test_the_plan_names_a_processor_that_may_compute_otherwise(
        self,
        at_epoch_2: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert go(str(at_epoch_2), "--plan") == 0
        assert "processor" not in capsys.readouterr().out
        monkeypatch.setattr(process, "processor", lambda: "another")
        assert go(str(at_epoch_2), "--plan") == 0
        assert "-> another: not bit-equal" in capsys.readouterr().out

    def test_a_note_names_those_versions_alone_that_differ(self, at_epoch_2: Path) -> None:
        checkpoint = store.CheckpointStore(at_epoch_2 / "checkpoints").latest()
        assert checkpoint is not None
        then = {**checkpoint.manifest["versions"], "torch": "1.0"}
        notes = list(plan.notes_of_environment({**checkpoint.manifest, "versions": then}, None))
        now = checkpoint.manifest["versions"]["torch"]
        assert notes == [f"torch 1.0 -> {now}: not bit-equal to a run that was never stopped"]

    def test_the_plan_is_printed_and_nothing_changes(
        self, at_epoch_2: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = {path: path.read_bytes() for path in at_epoch_2.rglob("*") if path.is_file()}
        assert go(str(at_epoch_2), "--plan", "--trainer.max_epochs", "7") == 0
        said = capsys.readouterr().out
        for part in (
            "step-00000008.ckpt",
            "overridden",
            "trainer.max_epochs: 3 -> 7",
            "left",
            "5 epochs",
        ):
            assert part in said
        assert {
            path: path.read_bytes() for path in at_epoch_2.rglob("*") if path.is_file()
        } == before


class TestOverrides:
    def test_a_change_of_the_trajectory_is_refused_unless_it_is_allowed(
        self, at_epoch_2: Path
    ) -> None:
        with pytest.raises(ConfigMismatchError, match=r"(?s)model\.lr.*--allow model\.lr"):
            go(str(at_epoch_2), "--model.lr", "0.5")
        assert steps(at_epoch_2) == [4, 8]

    def test_a_learning_rate_that_is_allowed_reaches_the_optimizer_and_its_schedule(
        self, at_epoch_2: Path
    ) -> None:
        before, _ = store.load(at_epoch_2 / "checkpoints" / "step-00000008.ckpt")
        new = 10 * before["optimizer"]["param_groups"][0]["initial_lr"]
        assert (
            go(
                str(at_epoch_2),
                "--model.lr",
                str(new),
                "--allow",
                "model.lr",
                "--trainer.max_epochs",
                "4",
            )
            == 0
        )
        after, _ = store.load(at_epoch_2 / "checkpoints" / "step-00000012.ckpt")
        assert after["optimizer"]["param_groups"][0]["initial_lr"] == pytest.approx(new)
        assert after["lr_schedulers"][0]["base_lrs"] == [pytest.approx(new)]
        assert (
            after["optimizer"]["param_groups"][0]["lr"]
            > before["optimizer"]["param_groups"][0]["lr"]
        )

    def test_a_free_change_is_applied_without_asking(self, at_epoch_2: Path) -> None:
        assert (
            go(str(at_epoch_2), "--data.root", "/nowhere", "--checkpoint.save_every_steps", "3")
            == 0
        )
        assert 11 in steps(at_epoch_2) or 12 in steps(at_epoch_2)

    def test_another_architecture_is_refused_with_names_shapes_and_the_key(
        self, at_epoch_2: Path
    ) -> None:
        with pytest.raises(
            ConfigMismatchError,
            match=r"(?s)features.*\[.*\] in the file.*model\.net\.width: 4 -> 8",
        ):
            go(str(at_epoch_2), "--model.net.width", "8", "--allow", "model.net")

    def test_a_model_that_computes_something_else_is_refused(
        self, at_epoch_2: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        forward = project.ConvNet.forward
        monkeypatch.setattr(project.ConvNet, "forward", lambda self, images: -forward(self, images))
        with pytest.raises(ConfigMismatchError, match="--allow canary"):
            go(str(at_epoch_2))
        assert steps(at_epoch_2) == [4, 8]
        assert go(str(at_epoch_2), "--allow", "canary") == 0

    def test_another_data_set_is_refused(
        self, at_epoch_2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from project import sources

        images, test = sources.embedded_digits()
        monkeypatch.setattr(
            sources, "embedded_digits", lambda: (images.pick(np.arange(1000)), test)
        )
        with pytest.raises(ConfigMismatchError, match="Another data set"):
            go(str(at_epoch_2))

    def test_a_finished_run_says_so_and_changes_nothing(
        self, run_dir: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = (run_dir / "run.json").read_bytes()
        assert go(str(run_dir)) == 0
        assert "Finished" in capsys.readouterr().out
        assert (run_dir / "run.json").read_bytes() == before


class TestAfterAnAccident:
    def test_a_run_that_was_killed_in_its_test_is_tested_and_not_trained(
        self, run_dir: Path
    ) -> None:
        before = (run_dir / "checkpoints" / "step-00000012.ckpt").read_bytes()
        summary = json.loads((run_dir / "summary.json").read_text())
        (run_dir / "summary.json").unlink()
        assert go(str(run_dir)) == 0
        again = json.loads((run_dir / "summary.json").read_text())
        for key in ("test/accuracy", "best_accuracy", "best_step", "steps", "epochs"):
            assert again[key] == summary[key], key
        assert (run_dir / "checkpoints" / "step-00000012.ckpt").read_bytes() == before

    def test_a_summary_of_an_earlier_end_does_not_count(self, run_dir: Path) -> None:
        old = json.loads((run_dir / "summary.json").read_text())
        (run_dir / "summary.json").write_text(json.dumps(old | {"steps": 4}))
        assert go(str(run_dir)) == 0
        assert json.loads((run_dir / "summary.json").read_text())["steps"] == 12

    @pytest.mark.parametrize("name", ["run.json", "config.yaml"])
    @pytest.mark.parametrize("damage", [b"", b"{bad", b"[]", b"model: [", b"\xff\xfe"])
    def test_damaged_records_do_not_stop_a_resume(
        self, name: str, damage: bytes, at_epoch_2: Path
    ) -> None:
        (at_epoch_2 / name).write_bytes(damage)
        assert go(str(at_epoch_2), "--trainer.max_epochs", "3") == 0
        assert steps(at_epoch_2) == [4, 8, 12]

    def test_a_run_whose_newest_state_could_not_be_saved_ends_with_1(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        no_room_for("step-00000012", monkeypatch)
        assert begin(*SMALL, "--output_dir", str(tmp_path), "--run_name", "full") == 1
        assert "newest state of this run is not saved" in capsys.readouterr().err
        assert steps(tmp_path / "full") == [4, 8]

    def test_a_damaged_best_file_is_not_passed_over_in_the_test(self, tmp_path: Path) -> None:
        worst = [
            *SMALL,
            "--checkpoint.mode",
            "min",
            "--output_dir",
            str(tmp_path),
            "--run_name",
            "worst",
        ]
        assert begin(*worst) == 0
        run_dir = tmp_path / "worst"
        best = store.CheckpointStore(run_dir / "checkpoints").best()
        assert best is not None
        assert best.step == 4  # not the newest
        data = bytearray(best.path.read_bytes())
        data[len(data) // 2] ^= 1
        best.path.write_bytes(data)
        (run_dir / "summary.json").unlink()
        with pytest.raises(CheckpointCorruptError, match=r"step-00000004\.ckpt"):
            go(str(run_dir))

    def test_lost_rows_are_said(self, at_epoch_2: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (at_epoch_2 / "metrics.csv").unlink()
        assert go(str(at_epoch_2)) == 0
        assert "has 0 of the" in capsys.readouterr().out

    def test_a_rewind_that_does_not_fit_moves_nothing(self, run_dir: Path) -> None:
        with pytest.raises(ConfigMismatchError, match="architecture"):
            go(
                str(run_dir / "checkpoints" / "step-00000004.ckpt"),
                "--rewind",
                "--model.net.width",
                "5",
                "--allow",
                "model",
            )
        assert steps(run_dir) == [4, 8, 12]
        assert not (run_dir / "rewound").exists()

    def test_a_file_named_from_inside_its_directory_continues_its_own_run(
        self, at_epoch_2: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(at_epoch_2 / "checkpoints")
        asked = request.requested(["step-00000008.ckpt"])
        assert asked is not None
        assert asked.run_dir == at_epoch_2
        asked = request.requested(["."])
        assert asked is not None
        assert asked.run_dir == at_epoch_2

    @pytest.mark.parametrize(
        "make", [os.mkfifo, lambda path: path.symlink_to(path)], ids=["pipe", "loop"]
    )
    def test_what_is_no_file_is_refused_at_once(
        self, make: Callable[[Path], Any], tmp_path: Path
    ) -> None:
        make(tmp_path / "odd.ckpt")
        with pytest.raises(CheckpointNotFoundError, match=r"odd\.ckpt"):
            request.requested([str(tmp_path / "odd.ckpt")])

    def test_a_word_after_allow_that_names_nothing_is_refused(self, at_epoch_2: Path) -> None:
        with pytest.raises(ConfigError, match=r"modle\.lr.*model\.lr"):
            go(str(at_epoch_2), "--allow", "modle.lr")


class TestAutomatic:
    def test_auto_does_not_start_over_where_all_checkpoints_are_damaged(
        self, at_epoch_2: Path
    ) -> None:
        for path in (at_epoch_2 / "checkpoints").iterdir():
            path.write_bytes(path.read_bytes()[:1000])
        for _ in range(2):
            with pytest.raises(CheckpointNotFoundError):
                self.auto(at_epoch_2.parent, "auto")
        assert rows(at_epoch_2)

    def auto(self, outputs: Path, how: str) -> int:
        return begin(*SMALL, "--output_dir", str(outputs), "--run_name", "first", "--resume", how)

    def test_auto_starts_what_is_not_there_and_continues_what_is(
        self, tmp_path: Path, at_epoch_2: Path
    ) -> None:
        assert self.auto(tmp_path / "new", "auto") == 0
        assert steps(tmp_path / "new" / "first") == [4, 8, 12]
        assert self.auto(at_epoch_2.parent, "auto") == 0
        assert steps(at_epoch_2) == [4, 8, 12]
        assert self.auto(at_epoch_2.parent, "auto") == 0  # a scheduler may call it once too often

    def test_must_is_an_error_where_there_is_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointNotFoundError, match="--resume must"):
            self.auto(tmp_path, "must")
        assert list(tmp_path.iterdir()) == []

    def test_a_run_that_is_being_trained_is_refused(self, at_epoch_2: Path) -> None:
        # From another process: a POSIX lock does not hold against its own.
        program = "import sys, pathlib, savepoint.run as r; r.Run.open(pathlib.Path(sys.argv[1])); print(); sys.stdin.read()"
        command = [sys.executable, "-uc", program, str(at_epoch_2)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            with pytest.raises(RunLockedError, match=f"pid {holder.pid} on"):
                go(str(at_epoch_2))
            holder.kill()
        assert go(str(at_epoch_2)) == 0  # the lock of a dead process is taken over


def payload(path: Path) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {path.parent}/ran",)

    torch.save({"state_dict": {}, "x": Runs()}, path)


BAD: dict[str, tuple[Callable[[Path], Any], type[SavepointError], str]] = {
    "empty": (lambda p: p.write_bytes(b""), SavepointError, "empty"),
    "zeros": (lambda p: p.write_bytes(bytes(5000)), SavepointError, "zero"),
    "html": (lambda p: p.write_text("<!DOCTYPE html><html><body>404</body></html>"), SavepointError, "HTML"),
    "git-lfs": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"), SavepointError, "LFS",
    ),
    "payload": (payload, SavepointError, "bad.ckpt"),
    "model": (lambda p: torch.save(torch.nn.Linear(2, 2), p), SavepointError, "bad.ckpt"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("flags", [[], ["--config", "configs/fast.yaml"]])
def test_a_wrong_file_is_named_with_its_cause_and_never_run(
    name: str, flags: list[str], tmp_path: Path
) -> None:
    write, error, cause = BAD[name]
    path = tmp_path / "bad.ckpt"
    write(path)
    before = path.read_bytes()
    with pytest.raises(
        error, match=f"(?is)(bad.ckpt.*{cause}|{cause}.*bad.ckpt|bad.ckpt)"
    ) as caught:
        go(str(path), *flags, "--output_dir", str(tmp_path / "outputs"))
    assert "weights_only" not in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 5
    assert path.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"bad.ckpt"}


def test_fewer_epochs_than_are_trained_already_are_refused(at_epoch_2: Path) -> None:
    before = sorted(at_epoch_2.rglob("*"))
    with pytest.raises(
        ConfigError, match=r"is of epoch 2, and trainer\.max_epochs is 1\. Expected 2 or more"
    ):
        go(str(at_epoch_2), "--trainer.max_epochs", "1")
    assert sorted(at_epoch_2.rglob("*")) == before


def test_fewer_steps_or_less_time_than_are_trained_already_are_refused(at_epoch_2: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"is of step 8, and trainer\.max_steps is 5\. Expected 8 or more"
    ):
        go(str(at_epoch_2), "--trainer.max_steps", "5")
    with pytest.raises(ConfigError, match=r"is of step 8, and trainer\.max_steps is 5"):
        go(str(at_epoch_2), "--trainer.max_steps", "5", "--trainer.max_epochs", "9")
    assert steps(at_epoch_2) == [4, 8]


def test_a_plan_of_a_run_with_a_damaged_record_says_so_and_leaves_it(
    at_epoch_2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (at_epoch_2 / "run.json").write_text("{bad")
    capsys.readouterr()
    assert go(str(at_epoch_2), "--plan") == 0
    said = capsys.readouterr().out
    assert "run.json is damaged" in said
    assert "made by another run" not in said
    assert (at_epoch_2 / "run.json").read_text() == "{bad"


def test_a_missing_file_is_said_with_the_nearest_ones(run_dir: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"Nearest: .*first"):
        request.requested([str(run_dir.parent / "frist"), "--output_dir", str(run_dir.parent)])


@pytest.mark.parametrize("target", ["https://example.org/x.ckpt", "s3://bucket/x.ckpt"])
def test_an_address_is_refused(target: str) -> None:
    with pytest.raises(SavepointError, match=r"x\.ckpt"):
        request.requested([target])


def test_a_foreign_file_needs_a_config(tmp_path: Path) -> None:
    torch.save({"epoch": 1, "state_dict": {}}, tmp_path / "foreign.pth")
    with pytest.raises(CheckpointForeignError, match="--config"):
        request.requested([str(tmp_path / "foreign.pth")])


@pytest.mark.parametrize("argv", [["a", "b"], ["--allow"], ["--fork", "x", "--rewind"]])
def test_a_command_line_that_cannot_be_meant_is_refused(argv: list[str]) -> None:
    with pytest.raises(ConfigError):
        request.requested(argv)


class TestWhatABreakerFound:
    def test_a_fork_that_was_killed_before_its_first_save_is_begun_again_by_the_same_command(
        self, run_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        command = [
            str(run_dir),
            "--fork",
            "again",
            "--trainer.max_epochs",
            "4",
            "--output_dir",
            str(run_dir.parent),
        ]
        with monkeypatch.context() as patch:
            patch.setattr(project.ImageClassifier, "training_step", lambda *_: sys.exit(9))
            with pytest.raises(SystemExit):
                go(*command)
        fork = run_dir.parent / "again"
        assert (fork / "run.json").exists()
        assert go(*command) == 0
        assert steps(fork) == [16]
        with pytest.raises(SavepointError, match="The run name is taken"):
            go(*command)

    def test_a_rewind_that_is_refused_for_lack_of_room_moves_nothing(
        self, run_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any, **__: Any) -> str:
            raise RunDirectoryError("Too little room for checkpoints.")

        before = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
        monkeypatch.setattr(store.CheckpointStore, "preflight", refuse)
        with pytest.raises(RunDirectoryError, match="Too little room"):
            go(str(run_dir / "checkpoints" / "step-00000004.ckpt"), "--rewind")
        assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == before
        assert not (run_dir / "rewound").exists()

    def test_a_run_may_be_called_checkpoints(self, run_dir: Path) -> None:
        named = run_dir.rename(run_dir.with_name("checkpoints"))
        assert request.requested([str(named)]).run_dir == named
        assert request.requested([str(named / "checkpoints")]).run_dir == named

    def test_a_checkpoint_of_another_run_is_named_in_the_plan(
        self, run_dir: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        record = json.loads((run_dir / "run.json").read_text())
        (run_dir / "run.json").write_text(json.dumps(record | {"id": "another"}))
        assert go(str(run_dir), "--trainer.max_epochs", "4", "--plan") == 0
        assert "made by another run" in capsys.readouterr().out

    def test_a_plan_from_an_older_file_says_what_it_needs(
        self, run_dir: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert go(str(run_dir / "checkpoints" / "step-00000004.ckpt"), "--plan") == 0
        assert (
            "not the newest of its run, which is at 12: it goes on with --fork or --rewind only"
            in capsys.readouterr().out
        )

    def test_the_file_is_read_once(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        read, decode = [], format.decode
        monkeypatch.setattr(
            format, "decode", lambda path, *rest, **more: (read.append(path.name), decode(path))[1]
        )
        assert go(str(run_dir), "--trainer.max_epochs", "4") == 0
        assert len(read) == 2, "one for the resume, and the best for the test"

    def test_a_directory_called_save_now_is_no_request_and_stops_no_save(
        self, at_epoch_2: Path
    ) -> None:
        (at_epoch_2 / "save-now").mkdir()
        assert go(str(at_epoch_2)) == 0
        assert steps(at_epoch_2) == [4, 8, 12]


class TestWhatANewcomerMissed:
    def test_while_an_epoch_is_long_lines_say_that_the_training_lives(
        self, at_epoch_2: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(progress, "QUIET_SECS", 0.0)
        assert go(str(at_epoch_2)) == 0
        assert "step 10: batch 2 of 4 in epoch 3, " in capsys.readouterr().out

    def test_a_test_on_a_part_of_the_data_says_so(
        self, at_epoch_2: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert go(str(at_epoch_2)) == 0
        assert "a part of the test data: trainer.limit_test_batches 1" in capsys.readouterr().out
        assert json.loads((at_epoch_2 / "summary.json").read_text())["limit_test_batches"] == 1


def test_a_value_that_is_no_number_is_equal_to_itself() -> None:
    was = "model: {floor: .nan, all: [1, {deep: .nan}], lr: .nan}"
    changed = plan.differences(was, was.replace("lr: .nan", "lr: 0.1"))
    assert list(changed) == ["model.lr"]
    assert changed["model.lr"][1] == 0.1
