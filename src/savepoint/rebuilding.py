"""Model, data and trainer from a checkpoint alone, on the device that is there, for eval, export
and predict. Nothing is trained or written.

The weights are those of `state_dict`, as in the run's own test: with weight averaging the averaged
ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from savepoint import weights
from savepoint.checkpoint import store
from savepoint.config import typed
from savepoint.errors import ConfigError, ConfigMismatchError
from savepoint.look.baseline import put_back_into_model
from savepoint.resume.overrides import check_canary, mismatches, shapes, under_names_of
from savepoint.training import build

# In place of the run's hardware and loggers; a flag of the user comes later and wins.
HERE = [
    "--trainer.accelerator=auto",
    "--trainer.devices=1",
    "--trainer.num_nodes=1",
    "--trainer.strategy=auto",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.profiler=null",
    "--trainer.barebones=false",
]


@dataclass
class Rebuilt:
    """A model in eval mode with the weights of a checkpoint, its data module and its trainer. The
    data is not read yet.
    """

    path: Path
    state: Mapping[str, Any]
    manifest: Mapping[str, Any]
    config: Any
    model: LightningModule
    data: LightningDataModule
    trainer: Trainer

    @property
    def classes(self) -> list[str] | None:
        """The data module's names of its classes; None where it has none, or where the run fell
        back on other data.
        """
        names = getattr(self.data, "classes", None)
        trained_on = (self.manifest.get("dataset") or {}).get("name")
        if names is None or getattr(self.data, "name", None) != trained_on:
            return None
        return list(map(str, names))

    @property
    def averaged(self) -> bool:
        return "current_model_state" in self.state


def rebuild(path: Path, overrides: Sequence[str] = (), *, allow: Sequence[str] = ()) -> Rebuilt:
    """Builds what the config in a checkpoint describes, with `overrides` on top of it (`--KEY
    VALUE`, as for train.py).

    Raises:
        CheckpointError: about the file.
        ConfigError: it holds no config, or one that does not build.
        ConfigMismatchError: the model's code has changed: the weights do not fit or, unless `allow`
            has "canary", give another output than when they were saved.
    """
    state, facts = store.load(path)
    if not state.get("config"):
        raise ConfigError(
            f"No config in this checkpoint: {path}. The model is built from it; train.py puts one "
            "into each. Take a checkpoint of a run."
        )
    build.quieten()
    config = typed.parse([*HERE, *overrides], base=state["config"])
    model, data, trainer = typed.instantiate(config)
    data.setup = build.RepeatedSetup(data)  # type: ignore[method-assign]
    if weights.makes_layers_late(model):
        _make_layers(model, data, trainer, state)
    # A run in `64-true` or `bf16-true` has weights of that type: as in training, the model is
    # converted before they are loaded.
    trainer.precision_plugin.convert_module(model)
    weights.restore(model, state)
    lost = put_back_into_model(model, state.get("attributes", []), model.device)
    if lost and "canary" not in allow:
        raise ConfigMismatchError(
            f"The model's code has changed: {', '.join(lost[:3])} is of another kind than in "
            f"{path}, whose training has set it. Put the old code back, or go on with this one: "
            "--allow canary"
        )
    if "canary" not in allow:
        check_canary(model, {**state, "state_dict": model.state_dict()})
    return Rebuilt(path, state, facts, config, model.eval(), data, trainer)


def _make_layers(
    model: LightningModule, data: LightningDataModule, trainer: Trainer, state: Mapping[str, Any]
) -> None:
    """Calls `setup` and `configure_model` as Lightning does: for a test or, where that makes other
    layers, for a fit.

    The data is set up only where the model's `setup` fails without it: export and predict need no
    data.
    """
    model.trainer = data.trainer = trainer
    trainer.datamodule = data  # type: ignore[attr-defined]
    for stage in (TrainerFn.TESTING, TrainerFn.FITTING):
        try:
            model.setup(stage)
        except Exception:  # noqa: BLE001 - any error, where it reads data that is not set up
            data.prepare_data()
            data.setup(stage)
            model.setup(stage)
        with trainer.precision_plugin.module_init_context():
            model.configure_model()
        target = model.state_dict()
        lines = mismatches(shapes(under_names_of(state["state_dict"], target)), target)
        if not lines or not model.strict_loading:
            return
