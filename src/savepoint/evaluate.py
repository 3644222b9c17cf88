"""What a checkpoint scores, rebuilt from the file alone: the metrics of its test, and what its
callbacks have to say.

Metrics are what every LightningModule has; classes and confusion are of one kind of task. So what
goes beyond metrics comes from the project's own callbacks, which see each output of the test: one
that has `report(trainer, directory)` is asked, after the test, for a text to print and for facts as
JSON can hold them; what it draws goes to the directory.
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
    made: Rebuilt,
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
    _check_parts(made, split)
    if "dataset" not in allow:
        made.trainer.callbacks.append(_SameData(made.manifest.get("dataset") or {}))  # type: ignore[attr-defined]
    if makes_layers_late(made.model):
        made.trainer.callbacks.append(Once(lambda model: restore(model, made.state)))  # type: ignore[attr-defined]
    loop = made.trainer.test if split == "test" else made.trainer.validate
    results = loop(made.model, datamodule=made.data, verbose=False)
    facts: dict[str, Any] = {
        "checkpoint": made.path.name,
        "step": made.manifest["step"],
        "epoch": made.manifest.get("epoch"),
        "run_id": made.manifest.get("run_id"),
        "digest": made.manifest["digest"],
        "averaged": made.averaged,
        "split": split,
        "dataset": getattr(made.data, "name", None) or type(made.data).__name__,
        "device": str(made.trainer.strategy.root_device),
        "overrides": list(overrides),
        "metrics": {name: value for result in results for name, value in result.items()},
    }
    texts = []
    for callback in made.trainer.callbacks if split == "test" else []:  # type: ignore[attr-defined]
        if hasattr(callback, "report"):
            directory.mkdir(parents=True, exist_ok=True)
            text, more = callback.report(made.trainer, directory)
            facts |= more
            texts += [text] if text else []
    # Last: where it is, the rest is. A crash before it leaves the metrics of the evaluation before,
    # if there was one.
    with files.replacing(directory / "metrics.json") as file:
        file.write(json.dumps(facts, indent=2).encode() + b"\n")
    return facts, texts


def _check_parts(made: Rebuilt, split: Split) -> None:
    stage = {"test": "test", "val": "validation"}[split]
    parts = ((made.model, f"{stage}_step"), (made.data, f"{split}_dataloader"))
    for part, name in parts:
        if not is_overridden(name, part):
            other = "val" if split == "test" else "test"
            raise ConfigError(
                f"Nothing to evaluate: {type(part).__name__} has no {name}. Expected one. Write "
                f"it, or give --split {other}"
            )


class _SameData(Callback):
    """Refuses other data than the checkpoint was trained on, once the data module knows what it has
    found.
    """

    def __init__(self, trained_on: dict[str, Any]) -> None:
        self.trained_on = trained_on

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        now = getattr(data, "fingerprint", None)
        if now != self.trained_on.get("fingerprint"):
            raise ConfigMismatchError(
                f"Another data set: {getattr(data, 'name', None)} ({now}). The checkpoint was "
                f"trained on {self.trained_on.get('name')} ({self.trained_on.get('fingerprint')}). "
                "Expected the same. Point --data.root at it, or evaluate on this one: --allow "
                "dataset"
            )
