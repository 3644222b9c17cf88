"""A run that was saved anywhere and resumed equals one that was never stopped: every tensor, every logged value."""

import inspect
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, LearningRateMonitor
from small import EveryPoint, SmallData, SmallModel, fit, one_thread, resume_differs

from savepoint.checkpoint import callback as callback_module
from savepoint.checkpoint import state as state_module
from savepoint.monitors import GradientNorm, LearningRateFinder, Resources

CASES: dict[str, dict[str, Any]] = {
    "validation after each epoch": {},
    "validation inside epochs": {"val_check_interval": 2},
    "validation after every second epoch": {"check_val_every_n_epoch": 2, "max_epochs": 4},
    "no validation": {"limit_val_batches": 0},
    "plateau by epoch": {"model": partial(SmallModel, schedule="plateau_epoch")},
    "plateau by step": {"model": partial(SmallModel, schedule="plateau_step")},
    "max_steps": {"max_steps": 9, "max_epochs": -1},
    "accumulation": {"accumulate_grad_batches": 3},
    "early stopping": {"callbacks": lambda: [EarlyStopping("val/loss", patience=1)], "max_epochs": 5},
    "early stopping before min_epochs": {
        "callbacks": lambda: [EarlyStopping("val/loss", patience=0)],
        "min_epochs": 4,
        "max_epochs": 5,
    },
    "loaders made anew": {"reload_dataloaders_every_n_epochs": 1},
    "two validation loaders": {
        "data": partial(SmallData, validations=2),
        "check_val_every_n_epoch": 2,
        "max_epochs": 4,
    },
    "metrics that are never reset": {"model": partial(SmallModel, forever=True)},
    "weight averaging": {"callbacks": lambda: [EMAWeightAveraging(decay=0.8)]},
    "two optimizers": {"model": partial(SmallModel, automatic=False)},
    "gradient clipping": {"gradient_clip_val": 0.1},
    "monitors": {"callbacks": lambda: [LearningRateMonitor("step"), GradientNorm(), Resources()]},
    "learning rate finder": {
        "model": partial(SmallModel, lr=0.01),
        "callbacks": lambda: [LearningRateFinder(min_lr=1e-4, num_training_steps=20)],
    },
    "map-style loader": {"data": partial(SmallData, workers=0)},
    "map-style loader with two workers": {"data": partial(SmallData, workers=2), "max_epochs": 2},
}


def straight(work: Path, case: dict[str, Any]) -> list[Path]:
    """The files of a run that was saved at every point, but for the last: from there nothing is left to do."""
    keep = EveryPoint(work / "kept", mode="min", monitor="val/loss")
    fit(work, checkpointing=keep, **case)
    return keep.kept[:-1]


@pytest.mark.parametrize("name", CASES)
def test_a_resume_from_every_point_equals_the_straight_run(name: str, tmp_path: Path) -> None:
    with one_thread():
        files = straight(tmp_path / "straight", CASES[name])
        assert len(files) >= 9
        for file in files:
            assert resume_differs(tmp_path / "straight", file, tmp_path / "resumed", **CASES[name]) == [], file.name
    print(f"{name}: {len(files)} resumes, all equal")


@pytest.mark.parametrize(
    "callbacks", [list, lambda: [EMAWeightAveraging(decay=0.8)]], ids=["plain", "weight averaging"]
)
def test_a_finished_run_that_trains_longer_equals_the_longer_run(callbacks: Any, tmp_path: Path) -> None:
    case: dict[str, Any] = {"model": partial(SmallModel, schedule="plateau_epoch"), "callbacks": callbacks}
    with one_thread():
        fit(tmp_path / "longer", max_epochs=4, **case)
        fit(tmp_path / "short", max_epochs=2, **case)
        last = tmp_path / "short" / "checkpoints" / "last.ckpt"
        assert resume_differs(tmp_path / "longer", last, tmp_path / "resumed", max_epochs=4, **case) == []


# Each line of the mechanism: without it, a resume of one of these cases goes wrong.
LINES = {
    "trainer._logger_connector._first_loop_iter = True": "validation after each epoch",
    'progress["ready"] = progress["completed"]': "validation after each epoch",
    "fit._restarting = False": "plateau by epoch",
    "epoch._restarting = validation._restarting = False": "max_steps",
    "epoch._batches_that_stepped -= 1": "validation inside epochs",
    'validation._restarting, validation._restart_stage = False, "restarted_mid_evaluation"': "validation inside epochs",
    'state.restore_rng(self._pending["rng"], module.device)': "validation after each epoch",
    "        restore_logged(trainer, module, saved)": "validation after each epoch",
    "    restore_callback_metrics(trainer, saved)": "plateau by epoch",
    "    restore_metric_states(module, saved)": "validation after each epoch",
    'trainer.should_stop = saved["should_stop"]': "early stopping before min_epochs",
    "fit._combined_loader._load_state_dicts(fit._combined_loader_states_to_load)": "validation after each epoch",
}


def without(line: str, monkeypatch: pytest.MonkeyPatch) -> type:
    """CheckpointCallback made of the same source less one line."""
    for module in (state_module, callback_module):
        source = inspect.getsource(module)
        if line in source:
            assert source.count(line) == 1
            broken = ModuleType(module.__name__)
            exec(compile(source.replace(line.strip(), "pass"), module.__file__, "exec"), broken.__dict__)
            if module is callback_module:
                return broken.CheckpointCallback
            monkeypatch.setattr(callback_module, "state", broken)
            return callback_module.CheckpointCallback
    raise AssertionError(f"not in the source: {line}")


@pytest.mark.parametrize("line", LINES)
def test_without_this_line_a_resume_goes_wrong(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[LINES[line]]
    broken = without(line, monkeypatch)
    if "progress" in line:  # it acts when saving
        monkeypatch.setattr(EveryPoint, "on_save_checkpoint", broken.on_save_checkpoint)
    with one_thread():
        for file in straight(tmp_path / "straight", case):
            resumed = broken(mode="min", monitor="val/loss")
            try:
                if resume_differs(tmp_path / "straight", file, tmp_path / "resumed", checkpointing=resumed, **case):
                    return
            except Exception:  # noqa: BLE001  (a resume that crashes has gone wrong too)
                return
    pytest.fail("every resume was equal without it")
