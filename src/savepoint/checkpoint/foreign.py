"""Other people's files: FloydHub and imagenet dictionaries, bare state_dicts, stock Lightning
checkpoints, safetensors; the arrays of Keras, NumPy and Flax.

Torch's own are read by its safe loader alone: tensors, plain values and, for the scores in old
scripts, numpy scalars. No reader runs what a file says.
"""

import importlib
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from savepoint.checkpoint import arrays, manifest, store
from savepoint.errors import CheckpointForeignError

_WEIGHTS = ("state_dict", "model_state_dict", "model", "net")
_OPTIMIZERS = ("optimizer", "optimizer_state_dict", "optim")
_BEST = ("best_accuracy", "best_acc", "best_acc1", "best_prec1", "best_score")


def read(path: Path | str) -> dict[str, Any]:
    """The weights in `path` and what stands beside them.

    Returns:
        `state_dict`: names without the prefixes that DataParallel and torch.compile put before
            them; `epoch`,
        `best_accuracy` (int, float) and `optimizer`: None where the file has none; `kind`:
        "savepoint", "lightning", "dictionary", "state_dict", "safetensors", or one of
        `arrays.KINDS`, whose names and layouts are those of the file.

    Raises:
        CheckpointForeignError: nothing here that can be read safely, and why.
        CheckpointNotFoundError, CheckpointCorruptError: as `manifest.verify`.
    """
    path = manifest.local_path(path)
    try:
        return _from_dictionary(path, store.load(path)[0], "savepoint")
    except CheckpointForeignError:
        pass
    if _is_safetensors(path):
        return _found("safetensors", _load_safetensors(path))
    if kind := arrays.kind_of(path):
        return _found(kind, _load_arrays(path, kind))
    content = load_plain(path)
    if _is_weights(content):
        return _found("state_dict", content)
    return _from_dictionary(
        path, content, "lightning" if "pytorch-lightning_version" in content else "dictionary"
    )


def load_plain(path: Path | str, map_location: Any = "cpu") -> dict[str, Any]:
    """The dictionary in a torch file that Savepoint did not write, zip or older, as it is.

    Raises:
        CheckpointForeignError: names the cause.
    """
    path = manifest.local_path(path)
    try:
        # Torch warns of old pickle protocols; what cannot be read ends in an error of ours.
        # An open file: of a path torch would look at the name, and take *.safetensors for one.
        with (
            torch.serialization.safe_globals(_numpy_scalars()),
            warnings.catch_warnings(action="ignore"),
            path.open("rb") as file,
        ):
            content = torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(path, _cause(error, path)) from error
    except (
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        IndexError,
    ) as error:
        raise _refused(path, f"it is {manifest.diagnose(path)}") from error
    if not isinstance(content, dict):
        raise _refused(path, f"it holds a {type(content).__name__}, no dictionary")
    return content


def _from_dictionary(path: Path, content: Mapping[str, Any], kind: str) -> dict[str, Any]:
    weights = next((content[key] for key in _WEIGHTS if _is_weights(content.get(key))), None)
    if weights is None:
        raise _refused(
            path,
            "it holds no weights; its keys are "
            f"{', '.join(map(str, list(content)[:12])) or 'none'}",
        )
    optimizer = next((content[key] for key in _OPTIMIZERS if key in content), None)
    if optimizer is None and (states := content.get("optimizer_states")):
        optimizer = states[0]
    best = next(
        (content[key] for key in content if key in _BEST or str(key).startswith("best_")), None
    )
    return _found(
        kind, weights, epoch=_number(content.get("epoch")), best=_number(best), optimizer=optimizer
    )


def _found(
    kind: str,
    weights: Mapping[str, Tensor],
    *,
    epoch: Any = None,
    best: Any = None,
    optimizer: Any = None,
) -> dict[str, Any]:
    return {
        "kind": kind,
        "state_dict": _without_prefixes(weights),
        "epoch": epoch,
        "best_accuracy": best,
        "optimizer": optimizer,
    }


def _without_prefixes(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {name: name.replace("_orig_mod.", "") for name in weights}
    while names and all(name.startswith("module.") for name in names.values()):
        names = {name: short.removeprefix("module.") for name, short in names.items()}
    return {short: weights[name] for name, short in names.items()}


def _is_weights(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    return all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )


def _number(value: Any) -> int | float | None:
    """A score as old scripts keep it: a number, a numpy scalar or a tensor with one value."""
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1):
        value = value.item()
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _numpy_scalars() -> list[Any]:
    """What the pickle of a numpy scalar names: its constructor, under its old and its new module,
    and the dtypes.
    """
    constructor = np.float64(0).__reduce__()[0]
    types = sorted(
        {type(np.dtype(kind)) for kind in "?bhilqBHILQefdg"}, key=lambda one: one.__name__
    )
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [*((constructor, name) for name in names), np.dtype, *types]


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(10)
    return head[8:] == b'{"'


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        importlib.import_module("safetensors")
        reader = importlib.import_module("safetensors.torch")
    except ImportError:
        raise CheckpointForeignError(
            f"A safetensors file, and its reader is not installed: {path}. The package "
            "safetensors was expected. Install it: pip install safetensors",
            path,
        ) from None
    try:
        weights: dict[str, Tensor] = reader.load_file(path)
    except Exception as error:
        raise _refused(path, str(error)) from error
    return weights


def _load_arrays(path: Path, kind: str) -> dict[str, Tensor]:
    try:
        found = arrays.read(path, kind)
    except arrays.Unreadable as error:
        raise _refused(path, str(error)) from error
    if not found:
        raise _refused(path, "it holds no arrays")
    return found


def _cause(error: pickle.UnpicklingError, path: Path) -> str:
    """What the safe loader refused, in its own words, without its advice to load unsafely."""
    text = str(error)
    for mark in ("Unsupported global: GLOBAL ", "Unsupported class "):
        if mark in text:
            kind = text.split(mark)[1].split()[0]
            return f"it holds a {kind}, which is neither a tensor nor a plain value"
    return f"it is {manifest.diagnose(path)}"


def _refused(path: Path, cause: str) -> CheckpointForeignError:
    return CheckpointForeignError(
        f"This file cannot be read safely: {path}: {cause}. A dictionary of tensors and plain "
        "values was expected. Save the weights alone (torch.save(model.state_dict(), ...)) where "
        "the file was made, and use that file.",
        path,
    )
