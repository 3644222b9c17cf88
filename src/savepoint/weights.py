"""`--init_from`: a new run from the weights of any file that can be read safely."""

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch import LightningModule
from torch import Tensor

from savepoint.checkpoint import foreign
from savepoint.errors import ConfigMismatchError
from savepoint.overrides import mismatches, shapes, shortened
from savepoint.run import rank


def read(path: Path) -> Mapping[str, Tensor]:
    """The state_dict of a checkpoint of ours or of another program."""
    weights: Mapping[str, Tensor] = foreign.read(path)["state_dict"]
    return weights


def fit_names(weights: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the model's names: a file made from the bare network lacks the LightningModule's prefix."""
    prefixes = {name.split(".")[0] for name in model}
    for prefix in sorted(prefixes):
        renamed = {f"{prefix}.{name}": value for name, value in weights.items()}
        if sum(name in model for name in renamed) > sum(name in model for name in weights):
            return renamed
    return dict(weights)


def initialise(model: LightningModule, path: str | Path, *, strict: bool) -> None:
    """Copies the weights of a file into the model.

    Args:
        strict: Whether all must fit; else what fits is taken, and a table of the rest printed.

    Raises:
        ConfigMismatchError: strict, and something does not fit; or nothing does.
    """
    target = model.state_dict()
    found = fit_names(read(Path(path)), target)
    wanted = shapes(target)
    fits = {name: found[name] for name, shape in shapes(found).items() if name in target and shape == wanted[name]}
    lines = mismatches(shapes(found), target)
    if not fits or (strict and lines):
        advice = " Take what fits: --init_strict false" if fits else ""
        raise ConfigMismatchError(
            f"The weights do not fit the model: {path}. Expected the same names and shapes.{advice}\n"
            + shortened(lines)
        )
    model.load_state_dict(fits, strict=False)
    if rank() == 0:
        print(f"Weights from {path}: {len(fits)} of {len(target)} tensors")
        if lines:
            print("\n".join(["not loaded:", *lines]), flush=True)
