"""What an override changes for real in a restored training, and what does not fit at all."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from savepoint.checkpoint.state import canary, environment
from savepoint.errors import ConfigMismatchError

# Of a scheduler's state: what its constructor computed from the length of the training and the learning rate.
_CONSTRUCTED = ("base_lrs", "total_steps", "T_max", "total_iters", "_schedule_phases")


class ApplyOverrides(Callback):
    """Refuses another data set or number of processes; brings changed hyper-parameters into the restored optimizer.

    A restored optimizer carries the values of the checkpoint, whatever the config says: without this, `--model.lr` on a
    resume would be ignored.
    """

    def __init__(
        self,
        state: Mapping[str, Any],
        manifest: Mapping[str, Any],
        changed: Mapping[str, tuple[Any, Any]],
        allow: Sequence[str],
    ) -> None:
        self.shapes = {name: tuple(value.shape) for name, value in state["state_dict"].items()}
        self.manifest, self.changed, self.allow = manifest, changed, allow

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_shapes(self.shapes, pl_module.state_dict(), self.changed)
        now = getattr(trainer.datamodule, "fingerprint", None)  # type: ignore[attr-defined]
        saved = self.manifest["dataset"]
        if now != saved["fingerprint"] and "dataset" not in self.allow:
            name = getattr(trainer.datamodule, "name", None)  # type: ignore[attr-defined]
            raise ConfigMismatchError(
                f"Another data set: {name} ({now}). The checkpoint was trained on {saved['name']} ({saved['fingerprint']}). "
                "Expected the same. Point --data.root at it, or go on with this one: --allow dataset"
            )
        was = self.manifest["world_size"]
        if trainer.world_size != was and "world_size" not in self.allow:
            raise ConfigMismatchError(
                f"Another number of processes: {trainer.world_size}. The checkpoint was made by {was}. Expected the same, "
                "as the batches of a step are shared among them. If that is meant: --allow world_size"
            )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if "canary" not in self.allow:
            check_canary(pl_module, checkpoint)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Built from the config of now, and not yet overwritten by the checkpoint.
        self._groups = [[dict(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]
        self._schedulers = [dict(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        was, now = self.manifest["device"], environment(trainer.strategy.root_device)["device"]
        if trainer.is_global_zero and was != now:
            print(f"device {was} -> {now}: not bit-equal to a run that was never stopped", flush=True)
        longer = any(key in self.changed for key in ("trainer.max_epochs", "trainer.max_steps"))
        hyper = any(key.split(".")[0] == "model" for key in self.changed)
        if not longer and not hyper:
            return
        before = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if hyper:
            for optimizer, fresh_groups in zip(trainer.optimizers, self._groups, strict=True):
                for group, fresh in zip(optimizer.param_groups, fresh_groups, strict=True):
                    _take_over(group, fresh)
        for config, fresh in zip(trainer.lr_scheduler_configs, self._schedulers, strict=True):
            for key in _CONSTRUCTED:
                if key in fresh:
                    setattr(config.scheduler, key, fresh[key])
            if isinstance(config.scheduler, LambdaLR):
                evaluate(config.scheduler)
        after = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if trainer.is_global_zero and before != after:
            print(f"learning rate at step {trainer.global_step}: {before[0]:.4g} -> {after[0]:.4g}", flush=True)


def _take_over(group: dict[str, Any], fresh: Mapping[str, Any]) -> None:
    for key, value in fresh.items():
        if key not in ("params", "lr", "initial_lr"):
            group[key] = value
    if "initial_lr" in group and "initial_lr" in fresh:
        # The schedule has brought the rate to some share of its base: keep the share, take the new base.
        group["lr"] *= fresh["initial_lr"] / group["initial_lr"]
        group["initial_lr"] = fresh["initial_lr"]
    else:
        group["lr"] = fresh["lr"]


def evaluate(scheduler: LambdaLR) -> None:
    """The rate of the step it stands at, by the functions and base rates it has now."""
    rows = zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    for group, base, factor in rows:
        group["lr"] = base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def check_canary(module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Raises ConfigMismatchError where the weights in the file no longer give the output that is in the file.

    One percent of the largest output is left to the arithmetic of another device.
    """
    saved = checkpoint.get("canary")
    if saved is None:
        return
    now = canary(module, checkpoint["state_dict"], saved["input"])
    far = float((now["output"] - saved["output"]).abs().max()) if now else float("inf")
    if not far <= 0.01 * max(1.0, float(saved["output"].abs().max())):
        raise ConfigMismatchError(
            f"The model computes something else than when it was saved: with the same weights its output differs by {far:.3g}. "
            "Expected the same code in forward. Put it back, or go on with this one: --allow canary"
        )


def check_shapes(
    saved: Mapping[str, tuple[int, ...]],
    model: Mapping[str, Tensor],
    changed: Mapping[str, tuple[Any, Any]] | None = None,
) -> None:
    """Raises ConfigMismatchError with a table of names and shapes, and the config keys that explain it."""
    lines = mismatches(saved, model)
    if not lines:
        return
    keys = [f"{key}: {was} -> {now}" for key, (was, now) in (changed or {}).items() if key.split(".")[0] == "model"]
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
    """Three lines at most, the last one among them: names of the model come first, then those of the file."""
    if len(lines) <= 3:
        return "\n".join(lines)
    return "\n".join([*lines[:2], f"{lines[-1]} (and {len(lines) - 3} more)"])


def mismatches(saved: Mapping[str, tuple[int, ...]], model: Mapping[str, Tensor]) -> list[str]:
    """One line for each weight that is missing, unknown or of another shape; with the nearest name where there is one."""
    lines = []
    for name, value in model.items():
        if name not in saved:
            near = difflib.get_close_matches(name, [other for other in saved if other not in model], n=1, cutoff=0.85)
            lines.append(f"  {name} {list(value.shape)}: not in the file{f' (nearest: {near[0]})' if near else ''}")
        elif saved[name] != tuple(value.shape):
            lines.append(f"  {name}: {list(saved[name])} in the file, {list(value.shape)} in the model")
    lines += [
        f"  {name} {list(shape)}: in the file, not in the model" for name, shape in saved.items() if name not in model
    ]
    return lines
