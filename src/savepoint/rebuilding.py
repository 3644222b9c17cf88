"""Model, data and trainer from a checkpoint alone, on the device that is there: nothing is trained,
nothing written.

For what is done with a trained model: eval, export, predict. The weights are those of `state_dict`,
which a run's own test looks at: with weight averaging the averaged ones.
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

# In place of what the run was trained on and logged to; a flag of the user comes after them and
# wins.
HERE = [
    "--trainer.accelerator=auto", "--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto",
    "--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
    "--trainer.profiler=null", "--trainer.barebones=false",
]  # fmt: skip


@dataclass
class Rebuilt:
    """A model in eval mode with the weights of a checkpoint, and what it was trained with. The data
    is not read yet.
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
        """What the data module calls its classes; None where it does not, or where the run fell
        back on other data.
        """
        names = getattr(self.data, "classes", None)
        trained_on = (self.manifest.get("dataset") or {}).get("name")
        return (
            None
            if names is None or getattr(self.data, "name", None) != trained_on
            else list(map(str, names))
        )

    @property
    def averaged(self) -> bool:
        return "current_model_state" in self.state


def rebuild(path: Path, overrides: Sequence[str] = (), *, allow: Sequence[str] = ()) -> Rebuilt:
    """What the config in a checkpoint describes, `overrides` (`--KEY VALUE`, as for train.py) on
    top of it.

    Raises:
        CheckpointError: about the file.
        ConfigError: no config in it, or one that does not build.
        ConfigMismatchError: the model's code is another one: the weights do not fit, or, unless
            `allow` has "canary", give another output than when they were saved.
    """
    state, facts = store.load(path)
    if not state.get("config"):
        raise ConfigError(
            f"No config in this checkpoint: {path}. Expected one, as train.py puts into each. Take "
            "a checkpoint of a run."
        )
    build.quieten()
    config = typed.parse([*HERE, *overrides], base=state["config"])
    model, data, trainer = typed.instantiate(config)
    data.setup = build.RepeatedSetup(data)  # type: ignore[method-assign]
    if weights.makes_layers_late(model):
        _make_layers(model, data, trainer, state)
    # A run in `64-true` or `bf16-true` has weights of that type: the model gets it before the
    # weights, as in training.
    trainer.precision_plugin.convert_module(model)
    weights.restore(model, state)
    lost = put_back_into_model(model, state.get("attributes", []), model.device)
    if lost and "canary" not in allow:
        raise ConfigMismatchError(
            f"The model's code is another one: {', '.join(lost[:3])} is of another kind. Expected "
            f"the code that made the checkpoint, whose training has changed it: {path}. Put it "
            "back, or go on with this one: --allow canary"
        )
    if "canary" not in allow:
        check_canary(model, {**state, "state_dict": model.state_dict()})
    return Rebuilt(path, state, facts, config, model.eval(), data, trainer)


def _make_layers(
    model: LightningModule, data: LightningDataModule, trainer: Trainer, state: Mapping[str, Any]
) -> None:
    """Calls `setup` and `configure_model` as Lightning does: for a test or, where that makes other
    layers, for a fit.

    The data is set up only where the model's `setup` fails without: to export or predict, none
    needs to be there.
    """
    model.trainer = data.trainer = trainer
    trainer.datamodule = data  # type: ignore[attr-defined]
    for stage in (TrainerFn.TESTING, TrainerFn.FITTING):
        try:
            model.setup(stage)
        except Exception:  # noqa: BLE001 - whatever it raises that asks for data which is not there
            data.prepare_data()
            data.setup(stage)
            model.setup(stage)
        with trainer.precision_plugin.module_init_context():
            model.configure_model()
        target = model.state_dict()
        lines = mismatches(shapes(under_names_of(state["state_dict"], target)), target)
        if not lines or not model.strict_loading:
            return
