"""A run that was saved anywhere and resumed equals one that was never stopped: every tensor, every
logged value.
"""

import inspect
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
)
from support.small import EveryPoint, SmallData, SmallModel, fit, one_thread, resume_differs

from savepoint.checkpoint import callback
from savepoint.checkpoint.state import reenter, start, training
from savepoint.monitors import GradientNorm, LearningRateFinder, Resources


class TakesIterator(SmallModel):
    """Two batches a step: how many were fetched is another number than how many steps were made."""

    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        (x, y), _, _ = next(dataloader_iter)
        if not self.trainer.fit_loop._data_fetcher.done:  # type: ignore[union-attr]
            x, y = (torch.cat(pair) for pair in zip((x, y), next(dataloader_iter)[0], strict=True))
        loss = torch.nn.functional.cross_entropy(self(x), y)
        self.log("train/loss", loss, on_epoch=True, batch_size=len(x))
        return loss


class KeepsGradients(SmallModel):
    """Zeroes them itself, every third step."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        if batch_idx % 3 == 0:
            optimizer.zero_grad()


class LogsAtTheStart(Callback):
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.logger.log_metrics({"start": 1.0}, step=trainer.global_step)  # type: ignore[union-attr]


CASES: dict[str, dict[str, Any]] = {
    "validation after each epoch": {},
    "validation inside epochs": {"val_check_interval": 2},
    "validation after every second epoch": {"check_val_every_n_epoch": 2, "max_epochs": 4},
    "no validation": {"limit_val_batches": 0},
    "plateau by epoch": {"model": partial(SmallModel, schedule="plateau_epoch")},
    "plateau by step": {"model": partial(SmallModel, schedule="plateau_step")},
    "plateau by step, validation inside epochs": {
        "model": partial(SmallModel, schedule="plateau_step"),
        "val_check_interval": 2,
    },
    "max_steps": {"max_steps": 9, "max_epochs": -1},
    "stopped after max_steps": {"max_steps": 8, "max_epochs": -1, "val_check_interval": 2},
    "steps that take the iterator": {"model": TakesIterator},
    "gradients that are kept": {"model": KeepsGradients},
    "an accumulation that grows": {"callbacks": lambda: [GradientAccumulationScheduler({1: 2})]},
    "rows at the start": {"callbacks": lambda: [LogsAtTheStart()]},
    "accumulation": {"accumulate_grad_batches": 3},
    "early stopping": {
        "callbacks": lambda: [EarlyStopping("val/loss", patience=1)],
        "max_epochs": 5,
    },
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


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[Path]]]:
    """Trains a case once for all tests: the run, and the files of one that was saved at every point
    but the last, from where nothing is left to do.
    """

    @cache
    def trained(name: str) -> tuple[Path, list[Path]]:
        work = tmp_path_factory.mktemp("straight")
        keep = EveryPoint(work / "kept", mode="min", monitor="val/loss")
        fit(work, checkpointing=keep, **CASES[name])
        return work, keep.kept[:-1]

    return trained


def of_each_kind(files: list[Path], nth: int) -> list[Path]:
    """A point in an epoch, one at the start of an epoch, one in a validation: the nth of each."""
    kinds: dict[str, list[Path]] = {}
    for file in files:
        kinds.setdefault(file.stem.split("-")[1], []).append(file)
    assert len(kinds) >= 2
    return [these[nth % len(these)] for these in kinds.values()]


# The first case is resumed from each of its points, the others from one of each kind, each case
# from another one; the slow tests leave none out.
@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
@pytest.mark.parametrize(
    ("name", "points"),
    [(next(iter(CASES)), "all"), *((name, "some") for name in list(CASES)[1:])]
    + [pytest.param(name, "all", marks=pytest.mark.slow) for name in list(CASES)[1:]],
)
def test_a_resume_from_every_point_equals_the_straight_run(
    name: str, points: str, straight: Callable[[str], tuple[Path, list[Path]]], tmp_path: Path
) -> None:
    with one_thread():
        run, files = straight(name)
        assert len(files) >= 8
        nth = list(CASES).index(name)
        chosen = files if points == "all" else of_each_kind(files, nth)
        for file in chosen:
            found = resume_differs(run, file, tmp_path / "resumed", **CASES[name])
            assert found == [], file.name
    print(f"{name}: {len(chosen)} resumes, all equal")


@pytest.mark.parametrize(
    "callbacks", [list, lambda: [EMAWeightAveraging(decay=0.8)]], ids=["plain", "weight averaging"]
)
def test_a_finished_run_that_trains_longer_equals_the_longer_run(
    callbacks: Any, tmp_path: Path
) -> None:
    case: dict[str, Any] = {
        "model": partial(SmallModel, schedule="plateau_epoch"),
        "callbacks": callbacks,
    }
    with one_thread():
        fit(tmp_path / "longer", max_epochs=4, **case)
        fit(tmp_path / "short", max_epochs=2, **case)
        last = tmp_path / "short" / "checkpoints" / "last.ckpt"
        assert (
            resume_differs(tmp_path / "longer", last, tmp_path / "resumed", max_epochs=4, **case)
            == []
        )


# Each line of the mechanism: without it, a resume of one of these cases goes wrong.
LINES = {
    'connector._first_loop_iter = fetching["first"]': "validation after each epoch",
    "loop._restarting = loop._loaded_from_state_dict = loop._resuming_from_checkpoint = False": "plateau by epoch",
    "    _restore_counters(trainer, saved)": "plateau by step, validation inside epochs",
    '    restore_rng(saved["rng"], module.device)': "validation after each epoch",
    "        restore_logged(trainer, module, saved)": "validation after each epoch",
    "        _restore_fetching(trainer, fetching)": "steps that take the iterator",
    '    _restore_gradients(module, saved.get("gradients", {}))': "gradients that are kept",
    "    restore_metrics(trainer, saved)": "plateau by epoch",
    "    restore_metric_states(module, saved)": "validation after each epoch",
    'trainer.should_stop = saved["should_stop"]': "early stopping before min_epochs",
    "fit._combined_loader._load_state_dicts(fit._combined_loader_states_to_load)": "validation after each epoch",
    'loop.max_steps = saved["global_step"] + 1': "stopped after max_steps",
    'put_settings(trainer, saved.get("settings", {}))': "an accumulation that grows",
    "        self._mute()": "rows at the start",
}


def take_away(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules that put a state back, made of the same source less one line."""
    modules = [reenter, start, training]
    [module] = [one for one in modules if line in inspect.getsource(one)]
    source = inspect.getsource(module)
    assert source.count(line) == 1
    broken = ModuleType(module.__name__)
    code = compile(source.replace(line.strip(), "pass"), module.__file__, "exec")
    exec(code, broken.__dict__)
    if module is training:
        monkeypatch.setattr(callback, "TrainingState", broken.TrainingState)
    else:
        monkeypatch.setattr(training, module.__name__.rpartition(".")[2], broken)


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
@pytest.mark.parametrize("line", LINES)
def test_without_this_line_a_resume_goes_wrong(
    line: str,
    straight: Callable[[str], tuple[Path, list[Path]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = CASES[LINES[line]]
    with one_thread():
        run, files = straight(LINES[line])
        take_away(line, monkeypatch)
        for file in reversed(files):  # late in a run most of them have something to put back
            try:
                if resume_differs(run, file, tmp_path / "resumed", **case):
                    return
            except Exception:  # noqa: BLE001  (a resume that crashes has gone wrong too)
                return
    pytest.fail("every resume was equal without it")
