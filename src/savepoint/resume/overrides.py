"""Brings overrides into a restored training, and refuses a checkpoint that does not fit."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn import Module

from savepoint.checkpoint import canary
from savepoint.checkpoint.callback import CheckpointCallback
from savepoint.checkpoint.state.process import environment
from savepoint.errors import ConfigMismatchError
from savepoint.resume import reschedule

# The keys that decide the length of a training.
_LENGTH = (
    "trainer.accumulate_grad_batches",
    "trainer.devices",
    "trainer.limit_train_batches",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.num_nodes",
    "trainer.overfit_batches",
)


def fit_strategy(config: Any, flags: Sequence[str]) -> None:
    """A strategy that spreads a model says over how many processes, too: where another number of
    them was given and no other strategy, it follows. One process holds all of the model.
    """
    names = {flag.partition("=")[0] for flag in flags}
    strategy = config.trainer.strategy
    kind = str(getattr(strategy, "class_path", "")).rpartition(".")[2]
    devices = str(config.trainer.devices)
    if kind != "ModelParallelStrategy" or not devices.isdigit():
        return
    given = names & {"--trainer.devices", "--trainer.num_nodes"}
    if not given or any(name.startswith("--trainer.strategy") for name in names):
        return
    processes = int(devices) * config.trainer.num_nodes
    if processes == 1:
        config.trainer.strategy = "auto"
        return
    in_each = strategy.init_args.tensor_parallel_size
    if isinstance(in_each, int) and processes % in_each == 0:
        strategy.init_args.data_parallel_size = processes // in_each


class ApplyOverrides(Callback):
    """Refuses another data set or number of processes; puts changed hyper-parameters into the
    restored optimizer.

    A restored optimizer has the values of the checkpoint: without this, `--model.lr` on a resume
    would have no effect.
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
        # Lightning loads the weights after the model has made its layers, in `configure_model` at
        # the latest: this hook compares them there.
        register: Any = pl_module.register_load_state_dict_pre_hook
        self._hook = register(self._compare)
        now = getattr(trainer.datamodule, "fingerprint", None)  # type: ignore[attr-defined]
        saved = self.manifest["dataset"]
        if now != saved["fingerprint"] and "dataset" not in self.allow:
            name = getattr(trainer.datamodule, "name", None)  # type: ignore[attr-defined]
            raise ConfigMismatchError(
                f"Another data set: {name} ({now}). The checkpoint was trained on {saved['name']} "
                f"({saved['fingerprint']}). A resume goes on with the same samples. Point "
                "--data.root at that data set, or go on with this one: --allow dataset"
            )
        was = self.manifest["world_size"]
        shares_anew = self.manifest.get("elastic") is not None and self.manifest["at"] is not None
        if trainer.world_size != was and not shares_anew and "world_size" not in self.allow:
            raise ConfigMismatchError(
                f"Another number of processes: {trainer.world_size}. The checkpoint was made by "
                f"{was}, which share the batches of a step. Start {was}, or allow the change: "
                "--allow world_size"
            )

    def _compare(self, module: Module, state_dict: dict[str, Any], *_: Any) -> None:
        if state_dict.keys() != self.names:
            return  # the model loads other weights, in its setup
        model = module.state_dict()
        weights = under_names_of(state_dict, model)
        strict = cast(LightningModule, module).strict_loading
        check_shapes(shapes(weights), model, self.changed, strict=strict)
        state_dict.clear()
        state_dict.update(weights)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._hook.remove()
        if "canary" in self.allow:
            return
        try:
            check_canary(pl_module, checkpoint)
        except ConfigMismatchError:
            # A forward may depend on attributes that the training has changed; they are restored
            # later, at the point of the file.
            if not any(path[0][1] == "model" for path, _ in checkpoint.get("attributes", [])):
                raise

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        is_complete = len(self.schedulers) == len(trainer.lr_scheduler_configs)
        if is_complete and any(_reaches_the_rates(key) for key in self.changed):
            # The schedulers come from the new config; the checkpoint has not overwritten them yet.
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
                    callback.keep_rates()


def _reaches_the_rates(key: str) -> bool:
    """Whether a key may change a schedule: hyper-parameters, and the length of the training."""
    if key in ("data.root", "data.num_workers"):
        return False
    return key.split(".")[0] in ("model", "data") or key in _LENGTH


def check_canary(module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Raises ConfigMismatchError where the weights in the file no longer give the output in the
    file. The arithmetic of another device may differ by one percent of the largest output.
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
            "Its code has changed. Put the old code back, or go on with this one: --allow canary"
        ) from error
    # A forward that cannot be repeated proves nothing.
    if now is None or not canary.comparable(saved, now):
        return
    far = canary.distance(now["output"], saved["output"])
    if not far <= 0.01 * canary.largest(saved["output"]):
        raise ConfigMismatchError(
            "The model computes something else than when it was saved: with the same weights its "
            f"output differs by {far:.3g}. Its code has changed. Put the old code back, or go on "
            "with this one: --allow canary"
        )


Shapes = Mapping[str, tuple[int, ...] | None]


def shapes(state_dict: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """The shape of each weight; None for a value of `get_extra_state`, which may be anything."""
    return {name: _shape(name, value) for name, value in state_dict.items()}


def plain_name(name: str) -> str:
    """The name without the prefix that `torch.compile` adds."""
    return name.replace("_orig_mod.", "")


def under_names_of(state_dict: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """Weights under the names of the model, whichever of the two was compiled."""
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
    """Raises ConfigMismatchError with a table of names and shapes, and the changed config keys.

    Args:
        strict: A module's `strict_loading`. False: names that only one side has are left out.
    """
    both = saved.keys() & model.keys()
    if both and not strict:
        saved = {name: saved[name] for name in both}
        model = {name: model[name] for name in both}
    lines = mismatches(saved, model)
    if not lines:
        return
    pairs = [(key, pair) for key, pair in (changed or {}).items() if key.startswith("model")]
    reason = "The model's code or its config is another one."
    if pairs:
        changes = [f"{key}: {was} -> {now}" for key, (was, now) in pairs]
        reason = f"Changed in the config: {'; '.join(changes)}"
    raise ConfigMismatchError(
        "Another architecture: the weights do not fit. Expected the model of the checkpoint.\n"
        f"{shortened(lines)}\n{reason}"
    )


def shortened(lines: Sequence[str]) -> str:
    """Three lines at most, with the last one among them: names of the model come first, those of
    the file last.
    """
    if len(lines) <= 3:
        return "\n".join(lines)
    return "\n".join([*lines[:2], f"{lines[-1]} (and {len(lines) - 3} more)"])


def mismatches(saved: Shapes, model: Mapping[str, Any]) -> list[str]:
    """One line for each weight that is missing, unknown or of another shape, with the nearest
    name.
    """
    lines = []
    unknown = [name for name in saved if name not in model]
    for name, shape in shapes(model).items():
        here = _shown(shape)
        if name not in saved:
            close = difflib.get_close_matches(name, unknown, n=1, cutoff=0.85)
            nearest = f" (nearest: {close[0]})" if close else ""
            lines.append(f"  {name} {here}: not in the file{nearest}")
        elif saved[name] != shape:
            lines.append(f"  {name}: {_shown(saved[name])} in the file, {here} in the model")
    return lines + [
        f"  {name} {_shown(saved[name])}: in the file, not in the model" for name in unknown
    ]


def _shown(shape: tuple[int, ...] | None) -> str:
    return "(no tensor)" if shape is None else str(list(shape))
