"""The test of a checkpoint, rebuilt from the file alone: its metrics, and the reports of callbacks.

Every LightningModule has metrics; classes and confusion belong to one kind of task, and so to the
project's own callbacks. After the test each callback with a method `report(trainer, directory)`
returns a text to print and facts for metrics.json, and may write pictures into the directory.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden

from savepoint import files
from savepoint.errors import ConfigError, ConfigMismatchError
from savepoint.rebuilding import Rebuilt
from savepoint.weights import Once, makes_layers_late, restore

Split = Literal["test", "val"]


def evaluate(
    rebuilt: Rebuilt,
    split: Split,
    directory: Path,
    *,
    overrides: Sequence[str] = (),
    allow: Sequence[str] = (),
) -> tuple[dict[str, Any], list[str]]:
    """Test, or with "val" validate, and write `metrics.json` into `directory`.

    Returns:
        The content of metrics.json, and the texts of the callbacks that reported.

    Raises:
        ConfigError: the model or its data has no such part.
        ConfigMismatchError: another data set than the checkpoint's, unless `allow` has "dataset".
        CheckpointSaveError: `directory` cannot be written.
    """
    _check_parts(rebuilt, split)
    callbacks: list[Callback] = rebuilt.trainer.callbacks  # type: ignore[attr-defined]
    if "dataset" not in allow:
        callbacks.append(_SameData(rebuilt.manifest.get("dataset") or {}))
    if makes_layers_late(rebuilt.model):
        callbacks.append(Once(lambda model: restore(model, rebuilt.state)))
    loop = rebuilt.trainer.test if split == "test" else rebuilt.trainer.validate
    results = loop(rebuilt.model, datamodule=rebuilt.data, verbose=False)
    facts = _facts(rebuilt, split, overrides)
    facts["metrics"] = {name: value for result in results for name, value in result.items()}
    texts = []
    # Read again: Lightning has made a new list, with the model's own callbacks.
    callbacks = rebuilt.trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if split == "test" and hasattr(callback, "report"):
            directory.mkdir(parents=True, exist_ok=True)
            text, more = callback.report(rebuilt.trainer, directory)
            facts |= more
            texts += [text] if text else []
    # Written last: where it is, the rest is. A crash before this leaves the metrics of an earlier
    # evaluation, if there was one.
    with files.replacing(directory / "metrics.json") as file:
        file.write(json.dumps(facts, indent=2).encode() + b"\n")
    return facts, texts


def _facts(rebuilt: Rebuilt, split: Split, overrides: Sequence[str]) -> dict[str, Any]:
    return {
        "checkpoint": rebuilt.path.name,
        "step": rebuilt.manifest["step"],
        "epoch": rebuilt.manifest.get("epoch"),
        "run_id": rebuilt.manifest.get("run_id"),
        "digest": rebuilt.manifest["digest"],
        "averaged": rebuilt.averaged,
        "split": split,
        "dataset": getattr(rebuilt.data, "name", None) or type(rebuilt.data).__name__,
        "device": str(rebuilt.trainer.strategy.root_device),
        "overrides": list(overrides),
    }


def _check_parts(rebuilt: Rebuilt, split: Split) -> None:
    stage = {"test": "test", "val": "validation"}[split]
    parts = ((rebuilt.model, f"{stage}_step"), (rebuilt.data, f"{split}_dataloader"))
    for part, name in parts:
        if not is_overridden(name, part):
            other = "val" if split == "test" else "test"
            raise ConfigError(
                f"Nothing to evaluate: {type(part).__name__} has no {name}, which the split "
                f"{split} calls. Write it, or give --split {other}"
            )


class _SameData(Callback):
    """Refuses other data than the checkpoint was trained on, once `setup` has read the data."""

    def __init__(self, trained_on: dict[str, Any]) -> None:
        self.trained_on = trained_on

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        now = getattr(data, "fingerprint", None)
        if now != self.trained_on.get("fingerprint"):
            raise ConfigMismatchError(
                f"Another data set: {getattr(data, 'name', None)} ({now}). The checkpoint was "
                f"trained on {self.trained_on.get('name')} ({self.trained_on.get('fingerprint')}). "
                "Scores on other data do not compare. Point --data.root at that data set, or "
                "evaluate on this one: --allow dataset"
            )
