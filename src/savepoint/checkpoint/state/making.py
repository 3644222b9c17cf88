"""How the loaders of a training are made, so that a resume makes the same ones.

A loader may be made of what the training has changed, such as a pool of samples that grows, and of
draws. A resume makes its loaders earlier than the training did.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from savepoint.checkpoint.state.process import capture_rng, restore_rng
from savepoint.checkpoint.state.roots import look
from savepoint.look.baseline import Baseline

Made = dict[str, Any]  # by "training" and "validation"
_HOOKS = {"training": "train_dataloader", "validation": "val_dataloader"}


class Making:
    """Has the loaders of one `Trainer.fit` made through it, until `remove`.

    Attributes:
        made: What the loaders that are there were made of: what the training had changed by then,
            and the random states, if they were drawn from.
        as_then: What those are to be made of that a resume makes first.
    """

    def __init__(self, trainer: Trainer, baseline: Callable[[], Baseline]) -> None:
        self._trainer = trainer
        self._baseline = baseline
        self.made: Made = {}
        self.as_then: Made = {}
        fit = trainer.fit_loop
        self._loops: Mapping[str, Any] = {"training": fit, "validation": fit.epoch_loop.val_loop}
        for name, loop in self._loops.items():
            # Around what `elastic.follow` has put there, where it follows the loaders.
            vars(loop)["setup_data"] = partial(self._set_up, name, loop.setup_data)

    def remove(self) -> None:
        for loop in self._loops.values():
            vars(loop).pop("setup_data", None)

    def _set_up(self, name: str, original: Callable[[], None]) -> None:
        if not self._is_due(name):
            original()
            return
        device = self._trainer.lightning_module.device
        now = capture_rng(device)
        then = self.as_then.pop(name, None)
        if then is None:
            changed = self._changed(name)
            original()
            drawn = not _are_same(now, capture_rng(device))
            self.made[name] = {"of": changed, "rng": now if drawn else None}
            return
        self.made[name] = then
        self._put_back(name, then["of"])
        if then["rng"] is not None:
            restore_rng(then["rng"], device)
        original()
        restore_rng(now, device)

    def _is_due(self, name: str) -> bool:
        loop = self._loops[name]
        again = "_should_reload_train_dl" if name == "training" else "_should_reload_val_dl"
        return loop._combined_loader is None or bool(getattr(loop, again))

    def _makers(self, name: str) -> set[str]:
        """The roots of a look whose hooks make the loaders."""
        trainer = self._trainer
        makers = {"data": trainer.datamodule, "model": trainer.lightning_module}  # type: ignore[attr-defined]
        return {root for root, one in makers.items() if is_overridden(_HOOKS[name], one)}

    def _changed(self, name: str) -> list[Any]:
        """What the training has changed of them."""
        makers = self._makers(name)
        if not makers:
            return []
        changed, _ = self._baseline().changes(look(self._trainer))
        return copy.deepcopy([[path, value] for path, value in changed if path[0][1] in makers])

    def _put_back(self, name: str, changed: list[Any]) -> None:
        now = look(self._trainer)
        device = self._trainer.lightning_module.device
        # Those of the validation are made late: what a resume has changed by then is taken back.
        late = name == "validation"
        others = now.roots.keys() - self._makers(name)
        if changed or late:
            self._baseline().restore(now, changed, device, others, alone=not late)


def of_file(saved: Mapping[str, Any]) -> Made:
    """Of an older file, too."""
    of_older = {"training": {"of": saved.get("made_by", []), "rng": None}}
    made: Made = saved.get("loaders_made", of_older)
    return dict(made)


def _are_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(_bytes(one[name]) == _bytes(other[name]) for name in one)


def _bytes(state: Any) -> Any:
    if isinstance(state, list):
        return [_bytes(part) for part in state]
    return state.cpu().numpy().tobytes() if hasattr(state, "numpy") else state
