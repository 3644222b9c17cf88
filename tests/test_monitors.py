"""What a run can switch on by config. That each resumes exactly is in test_exact_resume.py."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from support.small import SmallModel, final_state, fit, read, rows

from savepoint.checkpoint.callback import CheckpointCallback
from savepoint.config import compose
from savepoint.errors import ConfigError
from savepoint.monitors import GradientNorm, LearningRateFinder, Resources


def test_the_gradient_norm_is_that_of_all_gradients_before_they_are_clipped(tmp_path: Path) -> None:
    norms: list[tuple[float, float]] = []

    class Both(Callback):
        def on_before_optimizer_step(
            self, trainer: Trainer, module: LightningModule, optimizer: Any
        ) -> None:
            self.before = float(torch.cat([p.grad.flatten() for p in module.parameters()]).norm())

        def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
            logged = float(trainer.logged_metrics["train/grad_norm"])
            norms.append((self.before, logged))

    fit(
        tmp_path,
        callbacks=lambda: [Both(), GradientNorm()],
        gradient_clip_val=0.01,
        log_every_n_steps=1,
        max_epochs=1,
    )
    assert len(norms) == 6
    for before, logged in norms:
        assert logged == pytest.approx(before, rel=1e-6)
        assert logged > 0.01


def test_each_of_several_optimizers_has_a_norm_of_its_own(tmp_path: Path) -> None:
    fit(
        tmp_path,
        model=partial(SmallModel, automatic=False),
        callbacks=lambda: [GradientNorm()],
        max_epochs=1,
    )
    assert {"train/grad_norm_0", "train/grad_norm_1"} <= {
        name for row in rows(tmp_path) for name in row
    }


def test_what_comes_from_the_clock_stands_in_time_columns_and_in_no_checkpoint(
    tmp_path: Path,
) -> None:
    fit(tmp_path, callbacks=lambda: [Resources()], max_epochs=1)
    measured = [row for row in read(tmp_path / "metrics.csv") if row["time/step_ms"]]
    assert [row["step"] for row in measured] == ["2", "4", "6"]
    assert all(float(row[name]) > 0 for row in measured for name in row if name.startswith("time/"))
    assert not [name for name in final_state(tmp_path)["callback_metrics"] if "time" in name]


class TestLearningRateFinder:
    model = staticmethod(partial(SmallModel, lr=0.01))

    @staticmethod
    def finder(**arguments: Any) -> list[Callback]:
        return [LearningRateFinder(**{"min_lr": 1e-4, "num_training_steps": 20} | arguments)]

    def test_what_is_found_is_the_rate_that_the_schedule_multiplies(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rates: list[float] = []

        class Watch(Callback):
            def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
                rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        trainer = fit(tmp_path, model=self.model, callbacks=lambda: [*self.finder(), Watch()])
        found = trainer.callbacks[0].found
        assert f"learning rate found: {found:.3g}" in capsys.readouterr().out
        assert found != 0.01
        assert trainer.lightning_module.lr == found
        assert rates == pytest.approx([found * (1 - step / 18) for step in range(18)])

    def test_a_resume_goes_on_with_it_and_does_not_search(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        keep_all = CheckpointCallback(monitor="val/loss", mode="min", keep_every_n_steps=1)
        first = fit(tmp_path, model=self.model, callbacks=self.finder, checkpointing=keep_all)
        capsys.readouterr()
        early = tmp_path / "checkpoints" / "step-00000006.ckpt"
        second = fit(tmp_path / "on", model=self.model, callbacks=self.finder, ckpt_path=early)
        assert "found" not in capsys.readouterr().out
        assert second.lightning_module.lr == first.callbacks[0].found

    def test_where_nothing_is_found_the_run_does_not_begin(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="No learning rate found"):
            fit(tmp_path, model=self.model, callbacks=partial(self.finder, num_training_steps=2))


def test_a_file_can_add_to_a_list_of_the_trainer(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(
            f"trainer: {{max_epochs: 3, callbacks+: [{{class_path: {name}}}]}}"
        )
    flags = [f"--config={tmp_path / name}.yaml" for name in ("one", "two")]
    assert compose.compose(flags).config["trainer"]["callbacks"] == [
        {"class_path": "one"},
        {"class_path": "two"},
    ]
    (tmp_path / "three.yaml").write_text("trainer: {callbacks: [{class_path: three}]}")
    last = compose.compose([*flags, f"--config={tmp_path / 'three.yaml'}"]).config["trainer"]
    assert last == {"max_epochs": 3, "callbacks": [{"class_path": "three"}]}
