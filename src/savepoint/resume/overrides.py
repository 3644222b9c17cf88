"""What an override changes for real in a restored training, and what does not fit at all."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn import Module

from savepoint.checkpoint import canary
from savepoint.checkpoint.callback import CheckpointCallback
from savepoint.checkpoint.state import environment
from savepoint.errors import ConfigMismatchError
from savepoint.resume import reschedule

_LENGTH = (
    "trainer.accumulate_grad_batches", "trainer.devices", "trainer.limit_train_batches", "trainer.max_epochs",
    "trainer.max_steps", "trainer.num_nodes", "trainer.overfit_batches",
)  # fmt: skip


class ApplyOverrides(Callback):
    """Refuses another data set or number of processes; brings changed hyper-parameters into the
    restored optimizer.

    A restored optimizer carries the values of the checkpoint, whatever the config says: without
    this, `--model.lr` on a resume would be ignored.
    """

    def __init__(
        self,
        state: Mapping[str, Any],
        manifest: Mapping[str, Any],
        changed: Mapping[str, tuple[Any, Any]],
        allow: Sequence[str],
    ) -> None:
        self.names = set(state["state_dict"])
        self.schedulers = state["lr_schedulers"]
        self.loops = state["loops"]
        self.manifest = manifest
        self.changed = changed
        self.allow = allow
        self._fresh: reschedule.Fresh | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        # Lightning loads the weights once the model has made its layers, in `configure_model` at
        # the latest: there they are compared.
        self._hook = pl_module.register_load_state_dict_pre_hook(self._compare)  # type: ignore[no-untyped-call]
        now = getattr(trainer.datamodule, "fingerprint", None)  # type: ignore[attr-defined]
        saved = self.manifest["dataset"]
        if now != saved["fingerprint"] and "dataset" not in self.allow:
            name = getattr(trainer.datamodule, "name", None)  # type: ignore[attr-defined]
            raise ConfigMismatchError(
                f"Another data set: {name} ({now}). The checkpoint was trained on {saved['name']} "
                f"({saved['fingerprint']}). Expected the same. Point --data.root at it, or go on "
                "with this one: --allow dataset"
            )
        was = self.manifest["world_size"]
        if trainer.world_size != was and "world_size" not in self.allow:
            raise ConfigMismatchError(
                f"Another number of processes: {trainer.world_size}. The checkpoint was made by "
                f"{was}. Expected the same, as the batches of a step are shared among them. If "
                "that is meant: --allow world_size"
            )

    def _compare(self, module: Module, state_dict: dict[str, Any], *_: Any) -> None:
        if state_dict.keys() != self.names:
            return  # a load of the model's own, in its setup
        model = module.state_dict()
        found = under_names_of(state_dict, model)
        check_shapes(
            shapes(found), model, self.changed, strict=cast(LightningModule, module).strict_loading
        )
        state_dict.clear()
        state_dict.update(found)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._hook.remove()
        if "canary" in self.allow:
            return
        try:
            check_canary(pl_module, checkpoint)
        except ConfigMismatchError:
            # A forward may go by what the training has changed in the model, which comes back at
            # the point of the file.
            if not any(path[0][1] == "model" for path, _ in checkpoint.get("attributes", [])):
                raise

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if any(_reaches_the_rates(key) for key in self.changed) and len(self.schedulers) == len(
            trainer.lr_scheduler_configs
        ):
            # Built from the config of now, and not yet overwritten by the checkpoint.
            self._fresh = reschedule.advance(trainer, self.schedulers, self.loops)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        was = self.manifest["device"]
        now = environment(trainer.strategy.root_device)["device"]
        if trainer.is_global_zero and was != now:
            print(
                f"device {was} -> {now}: not bit-equal to a run that was never stopped", flush=True
            )
        if self._fresh is not None:
            reschedule.put(trainer, self._fresh, self.changed)
            self._fresh = None
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, CheckpointCallback):
                    callback.rates_are_overridden = True


def _reaches_the_rates(key: str) -> bool:
    """Hyper-parameters, and what the length of the training comes from, which schedules may ask
    for.
    """
    if key in ("data.root", "data.num_workers"):
        return False
    return key.split(".")[0] in ("model", "data") or key in _LENGTH


def check_canary(module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Raises ConfigMismatchError where the weights in the file no longer give the output that is in
    the file.

    One percent of the largest output is left to the arithmetic of another device.
    """
    saved = checkpoint.get("canary")
    if saved is None:
        return
    try:
        weights = under_names_of(checkpoint["state_dict"], module.state_dict())
        now = canary.canary(module, weights, saved["input"])
    except Exception as error:
        raise ConfigMismatchError(
            "The model computes something else than when it was saved: for the inputs in the file "
            f"its forward raises {type(error).__name__} ({str(error).partition(chr(10))[0]}). "
            "Expected the same code in forward. Put it back, or go on with this one: --allow "
            "canary"
        ) from error
    # A forward that cannot be repeated shows nothing.
    if now is None or not canary.comparable(saved, now):
        return
    far = canary.distance(now["output"], saved["output"])
    if not far <= 0.01 * canary.largest(saved["output"]):
        raise ConfigMismatchError(
            "The model computes something else than when it was saved: with the same weights its "
            f"output differs by {far:.3g}. Expected the same code in forward. Put it back, or go "
            "on with this one: --allow canary"
        )


Shapes = Mapping[str, tuple[int, ...] | None]


def shapes(state_dict: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """Of each weight its shape; None for what a part's `get_extra_state` gave, which may be
    anything.
    """
    return {name: _shape(name, value) for name, value in state_dict.items()}


def plain_name(name: str) -> str:
    """Without what `torch.compile` puts into the names of what it wraps."""
    return name.replace("_orig_mod.", "")


def under_names_of(state_dict: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """Weights under the names that the model has for them, whichever of the two was compiled."""
    own = {plain_name(name): name for name in model}
    return {
        name if name in model else own.get(plain_name(name), name): value
        for name, value in state_dict.items()
    }


def _shape(name: str, value: Any) -> tuple[int, ...] | None:
    extra = name.rpartition(".")[2] == "_extra_state" or not isinstance(value, Tensor)
    return None if extra else tuple(value.shape)


def check_shapes(
    saved: Shapes,
    model: Mapping[str, Any],
    changed: Mapping[str, tuple[Any, Any]] | None = None,
    *,
    strict: bool = True,
) -> None:
    """Raises ConfigMismatchError with a table of names and shapes, and the config keys that explain
    it.

    Args:
        strict: A module's `strict_loading`. False: names that only one of them has are left as they
            are.
    """
    both = saved.keys() & model.keys()
    if both and not strict:
        saved = {name: saved[name] for name in both}
        model = {name: model[name] for name in both}
    lines = mismatches(saved, model)
    if not lines:
        return
    keys = [
        f"{key}: {was} -> {now}"
        for key, (was, now) in (changed or {}).items()
        if key.split(".")[0] == "model"
    ]
    raise ConfigMismatchError(
        "Another architecture: the weights do not fit. Expected the model of the checkpoint.\n"
        + shortened(lines)
        + (
            f"\nChanged in the config: {'; '.join(keys)}"
            if keys
            else "\nThe model's code or its config is another one."
        )
    )


def shortened(lines: Sequence[str]) -> str:
    """Three lines at most, the last one among them: names of the model come first, then those of
    the file.
    """
    if len(lines) <= 3:
        return "\n".join(lines)
    return "\n".join([*lines[:2], f"{lines[-1]} (and {len(lines) - 3} more)"])


def mismatches(saved: Shapes, model: Mapping[str, Any]) -> list[str]:
    """One line for each weight that is missing, unknown or of another shape; with the nearest name
    where there is one.
    """
    lines = []
    for name, shape in shapes(model).items():
        if name not in saved:
            near = difflib.get_close_matches(
                name, [other for other in saved if other not in model], n=1, cutoff=0.85
            )
            lines.append(
                f"  {name} {_said(shape)}: not in the "
                f"file{f' (nearest: {near[0]})' if near else ''}"
            )
        elif saved[name] != shape:
            lines.append(f"  {name}: {_said(saved[name])} in the file, {_said(shape)} in the model")
    lines += [
        f"  {name} {_said(shape)}: in the file, not in the model"
        for name, shape in saved.items()
        if name not in model
    ]
    return lines


def _said(shape: tuple[int, ...] | None) -> str:
    return "(no tensor)" if shape is None else str(list(shape))
