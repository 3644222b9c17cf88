"""When the callback saves, what it ranks, what it says, and how it lives beside Lightning's own."""

import os
import shutil
from collections.abc import Iterator
from datetime import timedelta
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy
from support.checkpoint_files import no_room_for, small_checkpoint
from support.small import (
    SmallData,
    SmallModel,
    difference,
    final_state,
    fit,
    one_thread,
    resume_differs,
    rows,
)
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from savepoint.checkpoint import store
from savepoint.checkpoint.callback import CheckpointCallback
from savepoint.checkpoint.facts import why_ended
from savepoint.checkpoint.scores import Scores
from savepoint.checkpoint.state import ranks
from savepoint.errors import (
    CheckpointContentError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    ConfigError,
    ConfigMismatchError,
    NonFiniteLossError,
)

# An epoch of SmallData has 6 steps.


def saving(**arguments: Any) -> CheckpointCallback:
    return CheckpointCallback(
        **({"monitor": "val/loss", "mode": "min", "keep_last": 99} | arguments)
    )


def steps(directory: Path) -> list[int]:
    return [one.step for one in store.CheckpointStore(directory / "checkpoints").checkpoints()]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [6, 12, 18]),
        ({"save_every_epochs": 2}, [12, 18]),
        ({"save_every_epochs": None}, [18]),
        ({"save_every_epochs": None, "save_every_steps": 4}, [4, 8, 12, 16, 18]),
        ({"save_every_epochs": 1, "save_every_steps": 5}, [5, 6, 10, 12, 15, 18]),
        ({"save_every_epochs": None, "save_every_secs": 1e-6}, list(range(1, 19))),
        ({"save_every_epochs": None, "save_every_secs": 1e6}, [18]),
    ],
)
def test_saves_come_when_any_of_the_intervals_says_so(
    tmp_path: Path, arguments: dict[str, Any], expected: list[int]
) -> None:
    fit(tmp_path, checkpointing=saving(keep_best=0, **arguments))
    assert steps(tmp_path) == expected


def test_what_improved_is_saved_whatever_the_interval(tmp_path: Path) -> None:
    trainer = fit(tmp_path, checkpointing=saving(save_every_epochs=None), val_check_interval=2)
    assert trainer.checkpoint_callback.scores.best_step in steps(tmp_path)
    assert trainer.checkpoint_callback.scores.best_step != 18


def test_with_accumulation_a_save_waits_until_no_gradients_are_pending(tmp_path: Path) -> None:
    fit(tmp_path, checkpointing=saving(save_every_secs=1e-6), accumulate_grad_batches=4)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_file_in_the_run_directory_asks_for_a_save(tmp_path: Path) -> None:
    (tmp_path / "save-now").touch()
    fit(tmp_path, checkpointing=saving(save_every_epochs=None, keep_best=0))
    assert steps(tmp_path) == [1, 18]
    assert not (tmp_path / "save-now").exists()


def test_a_checkpoint_holds_what_its_name_promises(tmp_path: Path) -> None:
    trainer = fit(tmp_path)
    checkpoint = torch.load(
        tmp_path / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True
    )
    assert checkpoint["epoch"] == 3
    assert checkpoint["best_loss"] == trainer.checkpoint_callback.scores.best
    assert checkpoint["optimizer"].keys() == checkpoint["optimizer_states"][0].keys()
    assert checkpoint["state_dict"].keys() == trainer.lightning_module.state_dict().keys()
    model = SmallModel()
    model.load_state_dict(checkpoint["state_dict"])
    with torch.no_grad():
        assert torch.equal(
            model.eval()(checkpoint["canary"]["input"]), checkpoint["canary"]["output"]
        )


def test_saving_at_every_step_changes_nothing_in_the_training(tmp_path: Path) -> None:
    with one_thread():
        fit(tmp_path / "often", checkpointing=saving(save_every_secs=1e-6))
        fit(tmp_path / "once", checkpointing=saving(save_every_epochs=None))
    assert list(difference(final_state(tmp_path / "often"), final_state(tmp_path / "once"))) == []
    assert rows(tmp_path / "often") == rows(tmp_path / "once")


def test_asynchronous_saves_are_the_same_files_and_resume_exactly(tmp_path: Path) -> None:
    with one_thread():
        fit(tmp_path / "sync", checkpointing=saving(save_every_steps=4))
        fit(tmp_path / "async", checkpointing=saving(save_every_steps=4, async_save=True))
        assert steps(tmp_path / "sync") == steps(tmp_path / "async")
        for step in steps(tmp_path / "sync"):
            files = [
                tmp_path / name / "checkpoints" / f"step-{step:08d}.ckpt"
                for name in ("sync", "async")
            ]
            states = [store.load(file)[0] for file in files]
            for state in states:
                del state["manifest" if "manifest" in state else "callbacks"]
            assert list(difference(*states)) == []
            if step < 18:
                assert resume_differs(tmp_path / "sync", files[1], tmp_path / "resumed") == []


class TestBest:
    def test_nan_and_infinity_never_win_and_a_tie_keeps_the_earlier(self) -> None:
        scores = Scores("val/loss", "min")
        for step, value in enumerate([3.0, float("nan"), 2.0, float("-inf"), 2.0, 2.5], 1):
            scores.measure_validation({"val/loss": torch.tensor(value)}, step)
        assert (scores.best, scores.best_step) == (2.0, 3)
        assert scores.facts(4)["metrics"]["val/loss"] == {"value": 2.5, "step": 6}

    def test_a_value_of_another_step_never_ranks(self) -> None:
        scores = Scores("val/loss", "min")
        scores.measure_validation({"val/loss": torch.tensor(1.0)}, 4)
        assert scores.score(4) == 1.0
        assert scores.score(5) is None
        scores.measure_training({"val/loss": torch.tensor(1.0), "train/loss": torch.tensor(0.5)}, 6)
        assert scores.score(6) is None

    def test_it_says_what_improved(self) -> None:
        scores = Scores("val/accuracy", "max")
        said = []
        for step, value in enumerate([0.9871, 0.9903, 0.9], 1):
            scores.measure_validation({"val/accuracy": torch.tensor(value)}, step)
            said.append(scores.sentence(step))
        assert said == [
            "val/accuracy improved to 0.9871, ",
            "val/accuracy improved from 0.9871 to 0.9903, ",
            "val/accuracy did not improve from 0.9903, ",
        ]

    def test_another_metric_ranks_the_files_that_are_there_again(self, tmp_path: Path) -> None:
        fit(tmp_path, checkpointing=saving(), max_epochs=2)
        other = saving(monitor="val/accuracy", mode="max")
        fit(
            tmp_path,
            checkpointing=other,
            ckpt_path=tmp_path / "checkpoints" / "last.ckpt",
            max_epochs=2,
        )
        best = store.CheckpointStore(tmp_path / "checkpoints").best("val/accuracy", "max")
        assert best is not None
        assert (other.scores.best, other.scores.best_step) == (
            best.score_of("val/accuracy"),
            best.step,
        )

    def test_a_moved_directory_keeps_its_best(self, tmp_path: Path) -> None:
        trainer = fit(tmp_path / "here")
        (tmp_path / "here").rename(tmp_path / "there")
        best = store.CheckpointStore(tmp_path / "there" / "checkpoints").best()
        assert best is not None
        assert best.step == trainer.checkpoint_callback.scores.best_step

    def test_a_monitor_that_nothing_logs_is_an_error_with_the_names_that_are_logged(
        self, tmp_path: Path
    ) -> None:
        with pytest.raises(ConfigError, match=r"val/acuracy.*val/accuracy"):
            fit(tmp_path, checkpointing=saving(monitor="val/acuracy"))
        assert steps(tmp_path) == [6]


class TestLightning:
    def test_fit_from_best_takes_the_best_file(self, tmp_path: Path) -> None:
        trainer = fit(tmp_path)
        callback = trainer.checkpoint_callback
        assert Path(callback.best_model_path).name == f"step-{callback.scores.best_step:08d}.ckpt"
        trainer.fit_loop.max_epochs = 3
        trainer.fit(SmallModel(), datamodule=SmallData(), ckpt_path="best")

    def test_fit_from_last_takes_the_newest_that_verifies_and_resumes_exactly(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with one_thread():
            straight = fit(tmp_path / "straight")
            shutil.copytree(tmp_path / "straight", tmp_path / "again")
            newest = tmp_path / "again" / "checkpoints" / "step-00000012.ckpt"
            for name in ("step-00000018.ckpt", "last.ckpt", "best.ckpt"):
                newest.with_name(name).unlink()
            newest.with_name("step-00000099.ckpt").write_bytes(newest.read_bytes()[:-100])
            kept = store.load(newest)[0]["logged_rows"]
            fit(tmp_path / "again", ckpt_path="last", keep_rows=kept)  # type: ignore[arg-type]
        assert straight.global_step == 18
        assert not list(
            difference(final_state(tmp_path / "straight"), final_state(tmp_path / "again"))
        )
        assert f"From {newest}: step 12" in capsys.readouterr().out

    def test_fit_from_last_begins_where_there_is_nothing_yet(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert fit(tmp_path, ckpt_path="last").global_step == 18  # type: ignore[arg-type]
        assert "No checkpoint yet" in capsys.readouterr().out

    @pytest.mark.parametrize("word", ["last", "best"])
    @pytest.mark.parametrize("anew", [False, True], ids=["after fit", "in a new process"])
    def test_last_and_best_are_tested_validated_and_predicted(
        self, word: str, anew: bool, tmp_path: Path
    ) -> None:
        class Model(SmallModel):
            def on_validation_batch_end(self, *args: Any) -> None:
                self.seen = self.net[0].weight.clone()

            def test_step(self, batch: Any, batch_idx: int) -> None:
                self.seen = self.net[0].weight.clone()

            def predict_step(self, batch: Any, batch_idx: int) -> Any:
                self.seen = self.net[0].weight.clone()
                return self.seen

        trainer = fit(tmp_path, model=Model)
        files = store.CheckpointStore(tmp_path / "checkpoints", monitor="val/loss", mode="min")
        chosen = files.latest() if word == "last" else files.best()
        assert chosen is not None
        wanted = store.load(chosen.path)[0]["state_dict"]["net.0.weight"]
        if anew:
            trainer = Trainer(
                callbacks=[CheckpointCallback(mode="min", monitor="val/loss")], default_root_dir=str(tmp_path),
                logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
            )  # fmt: skip
        loader = SmallData().val_dataloader()
        for call in (trainer.test, trainer.validate, trainer.predict):
            model = Model()
            call(model, loader, ckpt_path=word)
            assert torch.equal(model.seen, wanted)

    @pytest.mark.parametrize("word", ["last", "best"])
    @pytest.mark.parametrize("call", ["test", "validate", "predict"])
    def test_before_there_is_a_checkpoint_they_are_refused(
        self, call: str, word: str, tmp_path: Path
    ) -> None:
        class Model(SmallModel):
            test_step = SmallModel.validation_step

        trainer = Trainer(
            callbacks=[CheckpointCallback(mode="min", monitor="val/loss")], default_root_dir=str(tmp_path),
            logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        )  # fmt: skip
        with pytest.raises(CheckpointNotFoundError):
            getattr(trainer, call)(Model(), SmallData().val_dataloader(), ckpt_path=word)

    @pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
    def test_validate_test_and_predict_read_our_file(self, tmp_path: Path) -> None:
        class Model(SmallModel):
            def test_step(self, batch: Any, batch_idx: int) -> None:
                self.log("test/loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))

            def predict_step(self, batch: Any, batch_idx: int) -> Any:
                return self(batch[0])

        fit(tmp_path, model=Model)
        file, loader = tmp_path / "checkpoints" / "last.ckpt", SmallData().val_dataloader()
        trainer = Trainer(
            logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu"
        )
        direct = Model.load_from_checkpoint(file, weights_only=True).eval()
        x, y = SmallData().x[22:], SmallData().y[22:]
        with torch.no_grad():
            expected = torch.nn.functional.cross_entropy(direct(x), y)
        found = trainer.test(Model(), loader, ckpt_path=file, weights_only=True, verbose=False)[0][
            "test/loss"
        ]
        assert found == pytest.approx(float(expected))
        predicted = trainer.predict(Model(), loader, ckpt_path=file, weights_only=True)
        assert all(
            torch.equal(one, direct(batch[0])) for one, batch in zip(predicted, loader, strict=True)
        )
        trainer.validate(Model(), loader, ckpt_path=file, weights_only=True, verbose=False)

    def test_a_users_save_is_durable_verified_and_said_to_be_not_exact(
        self, tmp_path: Path
    ) -> None:
        trainer = fit(tmp_path)
        trainer.save_checkpoint(tmp_path / "mine" / "own.ckpt")
        _, manifest = store.load(tmp_path / "mine" / "own.ckpt")
        assert manifest["exact"] is False
        assert manifest["at"] is None
        assert manifest["step"] == 18

    def test_its_own_model_checkpoint_beside_ours_breaks_nothing(self, tmp_path: Path) -> None:
        with one_thread():
            fit(tmp_path / "alone")
            stock = ModelCheckpoint(
                tmp_path / "stock", monitor="val/loss", save_last=True, every_n_train_steps=4
            )
            fit(tmp_path / "both", callbacks=lambda: [stock])
        alone, both = (
            final_state(tmp_path / name) | {"callbacks": {}} for name in ("alone", "both")
        )
        assert list(difference(alone, both)) == []
        assert (tmp_path / "stock" / "last.ckpt").exists()

    @pytest.mark.parametrize(
        "arguments",
        [{"fast_dev_run": True}, {"callbacks": lambda: [LearningRateFinder(num_training_steps=4)]}],
    )
    def test_a_trial_run_leaves_no_checkpoint_of_its_own(
        self, tmp_path: Path, arguments: dict[str, Any]
    ) -> None:
        class Model(SmallModel):
            def __init__(self) -> None:
                super().__init__(schedule="plateau_epoch")
                self.lr = 0.05

        fit(tmp_path, model=Model, **arguments)
        assert steps(tmp_path)[-1:] == ([] if "fast_dev_run" in arguments else [18])
        assert list(tmp_path.glob("*.ckpt")) == []

    def test_why_a_training_ended_is_recorded(self, tmp_path: Path) -> None:
        for name, arguments in {
            "max_epochs": {},
            "max_steps": {"max_steps": 4, "max_epochs": -1},
            "max_time": {"max_time": timedelta(milliseconds=1)},
        }.items():
            trainer = fit(tmp_path / name, **arguments)
            assert why_ended(trainer) == name
            latest = store.CheckpointStore(tmp_path / name / "checkpoints").latest()
            assert latest is not None
            assert latest.manifest["ended"] == name


@pytest.mark.parametrize(("max_steps", "exact"), [(6, True), (4, False)])
def test_an_end_inside_an_epoch_is_said_to_be_not_exact(
    tmp_path: Path, max_steps: int, exact: bool
) -> None:
    fit(tmp_path, max_steps=max_steps, max_epochs=-1)
    latest = store.CheckpointStore(tmp_path / "checkpoints").latest()
    assert latest is not None
    assert latest.manifest["exact"] is exact
    assert any("inside an epoch" in reason for reason in latest.manifest["unsaved"]) is not exact


def test_what_cannot_be_saved_is_named_in_the_manifest_and_once_in_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Model(SmallModel):
        def on_train_batch_end(self, *args: Any) -> None:
            self.source = iter([1])

    fit(tmp_path, model=Model, checkpointing=saving())
    latest = store.CheckpointStore(tmp_path / "checkpoints").latest()
    assert latest is not None
    assert latest.manifest["exact"] is False
    assert latest.manifest["unsaved"] == ["model.source (an iterator (list_iterator))"]
    assert capsys.readouterr().out.count("A resume will not be exact: model.source") == 1


def test_a_loader_without_a_position_is_saved_inside_an_epoch_all_the_same(tmp_path: Path) -> None:
    class Two:
        def __init__(self, x: Any, y: Any) -> None:
            self.batches = [(x[:4], y[:4]), (x[4:8], y[4:8])]

        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Any:
            return iter(self.batches)

    class Plain(SmallData):
        def train_dataloader(self) -> Any:
            return Two(self.x, self.y)

    fit(tmp_path, data=Plain, checkpointing=saving(save_every_steps=1, monitor=None), max_epochs=2)
    found = store.CheckpointStore(tmp_path / "checkpoints").checkpoints()
    assert [(one.step, one.manifest["exact"]) for one in found] == [
        (1, False),
        (2, True),
        (3, False),
        (4, True),
    ]


class Colour(Enum):
    RED = 1


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_stream_without_a_position_is_told_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Rows(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from zip(SmallData().x, SmallData().y, strict=True)

    class Streamed(SmallData):
        def train_dataloader(self) -> Any:
            return DataLoader(Rows(), 4)

    fit(tmp_path, data=Streamed, checkpointing=saving(save_every_steps=4), max_epochs=1)
    said = capsys.readouterr().out
    assert "keeps no position; a stream says its own: give the loader state_dict()" in said


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_stock_data_loader_is_exact_where_an_epoch_begins_and_said_to_be_not_exact_inside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stock(SmallData):
        def train_dataloader(self) -> Any:
            return DataLoader(TensorDataset(self.x[:22], self.y[:22]), 4, shuffle=True)

    with one_thread():
        fit(tmp_path / "straight", data=Stock, checkpointing=saving(save_every_steps=4))
        assert "wrap it: savepoint.resumable(loader)" in capsys.readouterr().out
        found = store.CheckpointStore(tmp_path / "straight" / "checkpoints").checkpoints()
        assert {one.step: one.manifest["exact"] for one in found} == {
            4: False, 6: True, 8: False, 12: True, 16: False, 18: True,
        }  # fmt: skip
        for step in (6, 12):
            file = tmp_path / "straight" / "checkpoints" / f"step-{step:08d}.ckpt"
            arguments = {"data": Stock, "checkpointing": saving()}
            assert (
                resume_differs(tmp_path / "straight", file, tmp_path / "resumed", **arguments) == []
            )


def test_what_cannot_be_read_back_is_refused_before_the_first_step(tmp_path: Path) -> None:
    class Model(SmallModel):
        def __init__(self, colour: Colour = Colour.RED) -> None:
            super().__init__()
            self.save_hyperparameters()

    with pytest.raises(CheckpointContentError, match=r"hyper_parameters\.colour.*Colour"):
        fit(tmp_path, model=Model)
    assert steps(tmp_path) == []


@pytest.mark.filterwarnings("ignore:Attribute 'loss' is an instance of `nn.Module`")
def test_a_hyper_parameter_that_cannot_be_read_back_is_answered_with_the_line_that_leaves_it_out(
    tmp_path: Path,
) -> None:
    class Model(SmallModel):
        def __init__(self, loss: torch.nn.Module) -> None:
            super().__init__()
            self.save_hyperparameters()

    with pytest.raises(CheckpointContentError, match=r'save_hyperparameters\(ignore=\["loss"\]\)'):
        fit(tmp_path, model=lambda: Model(torch.nn.CrossEntropyLoss()))


@pytest.mark.parametrize("url", ["s3://bucket/x", "memory://x", "file:///nowhere/x"])
def test_a_trainer_whose_directory_is_a_url_is_refused_before_the_first_step(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(
        default_root_dir=url, accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[saving()],
    )  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"Nothing is saved to a URL: trainer\.default_root_dir is"
    ):
        trainer.fit(SmallModel(), datamodule=SmallData())
    assert trainer.global_step == 0
    assert list(tmp_path.iterdir()) == []


def test_with_another_number_of_processes_no_checkpoint_is_exact_until_the_next_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path / "two", checkpointing=saving(save_every_steps=2), max_epochs=1)
    content, facts = store.load(tmp_path / "two" / "checkpoints" / "step-00000002.ckpt")
    made_by_two = store.write(
        tmp_path / "two.ckpt", content | {"other_ranks": [{}]}, facts | {"world_size": 2}
    )
    capsys.readouterr()
    fit(tmp_path / "one", checkpointing=saving(save_every_steps=2), ckpt_path=made_by_two.path)
    assert "processes 2 -> 1: random states, metric sums" in capsys.readouterr().out
    kept = store.CheckpointStore(tmp_path / "one" / "checkpoints").checkpoints()
    assert [one.step for one in kept if not one.manifest["exact"]] == [4]
    assert [one.step for one in kept if one.manifest["exact"]] == [6, 8, 10, 12, 14, 16, 18]
    fit(tmp_path / "again", checkpointing=saving(save_every_steps=1), ckpt_path=kept[0].path)
    kept = store.CheckpointStore(tmp_path / "again" / "checkpoints").checkpoints()
    assert [one.step for one in kept if not one.manifest["exact"]] == [5]


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_a_strategy_that_spreads_the_state_in_a_way_of_its_own_is_refused_in_words(
    strategy: type[Strategy],
) -> None:
    with pytest.raises(ConfigError, match=f"Not supported: .* is {strategy.__name__}, which"):
        ranks.refuse_shards(SimpleNamespace(strategy=object.__new__(strategy)))


def test_ranks_that_chose_different_checkpoints_are_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_checkpoint(tmp_path / "a.ckpt").path

    def gather(found: list[Any], own: Any) -> None:
        found[:] = [own, own, "the beginning"]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(
        ConfigMismatchError, match=r"rank 0 from step 30 \(digest .*\), rank 2 from the beginning"
    ):
        ranks.refuse_different_starts(SimpleNamespace(world_size=3, ckpt_path=path))
    ranks.refuse_different_starts(SimpleNamespace(world_size=1, ckpt_path=path))


def test_a_save_to_a_url_by_hand_is_refused_in_words(tmp_path: Path) -> None:
    trainer = fit(tmp_path, max_epochs=1)
    with pytest.raises(ConfigError, match="Nothing is saved to a URL"):
        trainer.save_checkpoint("s3://bucket/a.ckpt")


class TestFailure:
    def test_a_save_that_fails_is_said_and_the_training_goes_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        no_room_for("step-00000012", monkeypatch)
        callback = saving()
        trainer = fit(tmp_path, checkpointing=callback)
        assert trainer.global_step == 18
        assert steps(tmp_path) == [6, 18]
        said = capsys.readouterr().err
        assert "step-00000012.ckpt" in said
        assert "No space left" in said
        assert callback.saver.failure is None  # a later save succeeded

    @pytest.mark.parametrize("async_save", [False, True])
    def test_the_last_save_that_fails_is_remembered_for_the_exit_code(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, async_save: bool
    ) -> None:
        callback = saving(save_every_epochs=None, keep_best=0, async_save=async_save)
        no_room_for("step-", monkeypatch)
        fit(tmp_path, checkpointing=callback)
        assert isinstance(callback.saver.failure, CheckpointSaveError)

    def test_a_log_that_cannot_be_written_fails_the_save_that_would_count_its_rows(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write, callback = os.write, saving()

        def full(descriptor: int, data: bytes) -> int:
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith("metrics.csv") and steps(
                tmp_path
            ) == [6]:
                raise OSError(28, "No space left on device")
            return write(descriptor, data)

        monkeypatch.setattr(os, "write", full)
        assert fit(tmp_path, checkpointing=callback).global_step == 18
        assert steps(tmp_path) == [6]
        assert isinstance(callback.saver.failure, CheckpointSaveError)
        said = capsys.readouterr().err
        assert said.count("Cannot be written") == 1
        assert "The log could not be written before the save" in said

    def test_a_value_that_cannot_be_read_back_later_fails_the_save_and_not_the_training(
        self, tmp_path: Path
    ) -> None:
        class Turning(SmallModel):
            def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                checkpoint["turned"] = Colour.RED if self.global_step == 12 else None

        callback = saving()
        assert fit(tmp_path, model=Turning, checkpointing=callback).global_step == 18
        assert steps(tmp_path) == [6, 18]
        assert callback.saver.failure is None  # a later save succeeded

    def test_a_save_that_failed_is_tried_again_long_before_the_interval_is_over(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        replace, failed = os.replace, []

        def twice(source: Any, target: Any) -> None:
            if "step-" in str(target) and 12 <= int(str(target)[-13:-5]) < 14:
                failed.append(target)
                raise OSError(28, "No space left on device")
            replace(source, target)

        monkeypatch.setattr(os, "replace", twice)
        monkeypatch.setattr("savepoint.checkpoint.saver.RETRY_SECS", 0.0)
        callback = saving()
        fit(tmp_path, checkpointing=callback)
        assert len(failed) == 2
        assert steps(tmp_path) == [6, 14, 18]
        assert callback.saver.failure is None


class Exploding(SmallModel):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.global_step == 8 else loss


class TestNonFinite:
    def test_a_loss_that_is_not_a_number_stops_the_run_and_names_its_first_step(
        self, tmp_path: Path
    ) -> None:
        with pytest.raises(NonFiniteLossError, match=r"first at step 9.*step-00000006\.ckpt"):
            fit(tmp_path, model=Exploding)
        latest = store.CheckpointStore(tmp_path / "checkpoints").latest()
        assert latest is not None
        assert latest.step == 6

    def test_weights_that_became_infinite_under_a_finite_loss_never_replace_a_good_checkpoint(
        self, tmp_path: Path
    ) -> None:
        class Overflowing(SmallModel):
            def on_after_backward(self) -> None:
                if self.global_step == 11:  # the last batch of the second epoch
                    for parameter in self.parameters():
                        parameter.grad *= float("inf")

        with pytest.raises(
            NonFiniteLossError, match=r"weights are not finite at step 12.*step-00000006\.ckpt"
        ):
            fit(tmp_path, model=Overflowing, checkpointing=CheckpointCallback(monitor=None))
        assert steps(tmp_path) == [6]

    def test_with_warn_the_run_goes_on_and_such_a_state_is_never_saved(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        callback = saving(on_nan="warn")
        trainer: Trainer = fit(tmp_path, model=Exploding, checkpointing=callback)
        assert trainer.global_step == 18
        assert steps(tmp_path) == [6]
        said = capsys.readouterr().err
        assert said.count("The training loss is not finite: first at step 9.") == 1, (
            "once, at the next log"
        )
        assert "The weights are not finite at step 12 (the training loss: first at step 9)." in said
        assert callback.saver.failure is not None

    def test_a_running_mean_that_is_not_a_number_is_not_saved_although_the_weights_are_finite(
        self, tmp_path: Path
    ) -> None:
        class Poisoned(SmallModel):
            def on_train_batch_end(self, *_: Any) -> None:
                if self.global_step == 12:
                    self.net[1].running_mean.fill_(float("nan"))

        with pytest.raises(NonFiniteLossError, match="not finite at step 12"):
            fit(tmp_path, model=Poisoned)
        assert steps(tmp_path) == [6]


@pytest.mark.parametrize("name", ["epochs", "steps", "secs"])
def test_an_interval_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"save_every_{name} is 0"):
        saving(**{f"save_every_{name}": 0})


def test_the_module_is_a_plain_lightning_module_for_the_callback(tmp_path: Path) -> None:
    class WithoutExample(SmallModel):
        def __init__(self) -> None:
            super().__init__()
            self.example_input_array = None

    module: type[LightningModule] = WithoutExample
    fit(tmp_path, model=module)
    assert final_state(tmp_path)["canary"] is None


def test_a_manifest_has_the_step_of_the_optimizers_and_that_of_the_log(tmp_path: Path) -> None:
    trainer = fit(tmp_path, model=lambda: SmallModel(automatic=False), max_epochs=1)
    newest = store.CheckpointStore(tmp_path / "checkpoints").latest()
    assert newest is not None
    assert newest.step == trainer.global_step == 12
    assert newest.manifest["logged_step"] == 6
    assert rows(tmp_path)[-1]["step"] == "5"
