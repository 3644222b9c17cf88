"""Arrays of Keras and Flax as weights of a torch model: layer by layer, each in torch's layout.

A layer is found by its name or, where no name of the file is one of the model's, by its number
among the layers of its kind, which both frameworks count (`conv2d_1`, `Dense_0`). What is not sure
is not mapped: it keeps the name it has in the file, so that it is listed as what the model lacks.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from savepoint.checkpoint.arrays import by_collections

_COLLECTIONS = ("params", "batch_stats")
# Names of the same thing in Keras and Flax.
_ROLES = {
    "gamma": "scale",
    "beta": "bias",
    "moving_mean": "mean",
    "moving_variance": "var",
    "embeddings": "embedding",
}
_KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "convolution": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    "dense": (nn.Linear,),
    "batch norm": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    "layer norm": (nn.LayerNorm,),
    "embedding": (nn.Embedding,),
}
# In the names of layers of other kinds, whose arrays have the shapes of these.
_OTHERS = (
    "transpose", "depthwise", "separable", "einsum", "prelu", "attention",
    "groupnorm", "rmsnorm", "instancenorm", "lstm", "gru", "rnn",
)  # fmt: skip
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS: tuple[type[nn.Module], ...] = (*_KINDS["convolution"], *_TRANSPOSED)
_OF_IMAGES = (nn.Conv2d, nn.Conv3d, *_TRANSPOSED[1:])
# Where the parts of a layer of Keras 3 have numbers only.
_NUMBERED = {
    "convolution": ("kernel", "bias"),
    "dense": ("kernel", "bias"),
    "batch norm": ("scale", "bias", "mean", "var"),
    "layer norm": ("scale", "bias"),
    "embedding": ("embedding",),
}


@dataclass
class Layer:
    """Of the file: its place, and its arrays by role (kernel, bias, scale, mean, var, embedding)
    or, of Keras 3, by number.
    """

    name: str
    arrays: dict[str, Tensor] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str | None:
        """None where the arrays do not say, or the name says another one."""
        if any(other in self.name.lower().replace("_", "") for other in _OTHERS):
            return None
        rank = {role: array.dim() for role, array in self.arrays.items()}
        first = rank.get("kernel", rank.get("0", 0))
        if "embedding" in rank or (set(rank) == {"0"} and "embedding" in self.name.lower()):
            return "embedding"
        if first >= 3:
            return "convolution"
        if first == 2 and set(rank) in ({"kernel"}, {"kernel", "bias"}, {"0"}, {"0", "1"}):
            return "dense"
        if "mean" in rank or (len(rank) == 4 and set(rank.values()) == {1}):
            return "batch norm"
        if "scale" in rank or (set(rank) == {"0", "1"} and set(rank.values()) == {1}):
            return "layer norm"
        return None


class Row(NamedTuple):
    """Of the table: place and shape in the file, name and shape in the model, and what was done."""

    place: str
    was: str
    name: str
    now: str
    how: str


class Mapped(NamedTuple):
    weights: dict[str, Tensor]
    rows: list[Row]


def onto(model: nn.Module, arrays: Mapping[str, Tensor]) -> Mapped:
    """The arrays as weights of a model. What cannot be mapped keeps its place as its name."""
    if not any("/" in place for place in arrays):  # flattened with the other usual sign
        arrays = {place.replace(".", "/"): array for place, array in arrays.items()}
    arrays = by_collections(arrays)
    layers = _layers(arrays)
    modules = _modules(model)
    pairs = _by_name(layers, modules)
    pairs |= _by_number(layers, modules, pairs)
    weights: dict[str, Tensor] = {}
    rows: list[Row] = []
    taken: set[str] = set()
    behind: nn.Module | None = None  # the convolution whose output reaches a module
    for name, module in model.named_modules():
        layer = pairs.get(name)
        if layer is not None:
            fitted = _fitted(layer, module, behind)
            for role, (own, tensor, how) in fitted.items():
                place = layer.places[role]
                taken.add(place)
                weights[f"{name}.{own}"] = tensor
                shapes = [str(list(one.shape)) for one in (arrays[place], tensor)]
                rows.append(Row(place, shapes[0], f"{name}.{own}", shapes[1], how))
            if fitted and isinstance(module, _KINDS["batch norm"]):
                weights |= _counter(name, module)
        if isinstance(module, _CONVOLUTIONS):
            behind = module
        elif isinstance(module, nn.Linear):
            behind = None
    weights |= {place: array for place, array in arrays.items() if place not in taken}
    return Mapped(weights, rows)


def _counter(name: str, module: nn.Module) -> dict[str, Tensor]:
    """Of the batches of a batch norm, which other frameworks do not count."""
    counter = getattr(module, "num_batches_tracked", None)
    return {} if counter is None else {f"{name}.num_batches_tracked": counter.detach().clone()}


def _layers(arrays: Mapping[str, Tensor]) -> list[Layer]:
    found: dict[str, Layer] = {}
    for place, array in arrays.items():
        parts = place.split("/")
        *above, role = parts
        if above[:1] and above[0] in _COLLECTIONS:
            above = above[1:]
        if above[-1:] == ["vars"]:
            above = above[:-1]
        role = role.removesuffix(":0")  # of Keras 2, which names a layer twice
        if above[:1] == ["model_weights"]:
            above = above[1:]
        if above and above[0] == above[-1]:
            above = above[:1]
        name = "/".join(above)
        layer = found.setdefault(name, Layer(name))
        layer.arrays[_ROLES.get(role, role)] = array
        layer.places[_ROLES.get(role, role)] = place
    return list(found.values())


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Those of a known kind, in the order of the model, each once."""
    known = tuple(kind for kinds in _KINDS.values() for kind in kinds)
    return {name: one for name, one in model.named_modules() if isinstance(one, known)}


def _by_name(layers: Sequence[Layer], modules: Mapping[str, nn.Module]) -> dict[str, Layer]:
    """Where a layer's name is the end of exactly one module's name, and no other layer's."""
    pairs: dict[str, list[Layer]] = {}
    for layer in layers:
        dotted = ".".join(part for part in layer.name.split("/") if part != "layers")
        fits = [name for name in modules if f".{name}".endswith(f".{dotted}")]
        if len(fits) == 1:
            pairs.setdefault(fits[0], []).append(layer)
    return {name: found[0] for name, found in pairs.items() if len(found) == 1}


def _by_number(
    layers: Sequence[Layer], modules: Mapping[str, nn.Module], named: Mapping[str, Layer]
) -> dict[str, Layer]:
    """Of each kind without a layer that is found by name, and of which file and model have as many,
    where the numbers in the names of the file say the order: all lie in one place, and have one
    name.
    """
    pairs: dict[str, Layer] = {}
    for kind, classes in _KINDS.items():
        if any(isinstance(modules[name], classes) for name in named):
            continue
        given = [layer for layer in layers if layer.kind == kind]
        wanted = [name for name, one in modules.items() if isinstance(one, classes)]
        numbers = [_numbered(layer.name) for layer in given]
        if len(given) == len(wanted) and len({base for base, _ in numbers}) == 1:
            order = sorted(range(len(given)), key=lambda place: numbers[place][1])
            pairs |= {name: given[place] for name, place in zip(wanted, order, strict=True)}
    return pairs


def _numbered(name: str) -> tuple[str, int]:
    """`conv2d_1` -> conv2d, 1; Keras leaves the number of the first one out."""
    match = re.fullmatch(r"(.*?)_(\d+)", name)
    return (match[1], int(match[2])) if match else (name, -1)


Fitted = tuple[str, Tensor, str]


def _fitted(layer: Layer, module: nn.Module, behind: nn.Module | None) -> dict[str, Fitted]:
    """Role in the file -> name in the module, array in its layout, what was done; empty where not
    every array of the layer fits.
    """
    kind = next(kind for kind, classes in _KINDS.items() if isinstance(module, classes))
    roles = _NUMBERED[kind]
    arrays = dict(layer.arrays)
    back = {role: role for role in arrays}
    if all(role.isdigit() for role in arrays):
        back = {roles[int(role)]: role for role in arrays if int(role) < len(roles)}
        arrays = {role: layer.arrays[number] for role, number in back.items()}
    own = dict(_wanted(kind, module))
    if set(own) != set(arrays) or len(back) != len(layer.arrays):
        return {}
    fitted: dict[str, Fitted] = {}
    for role, (name, target) in own.items():
        laid_out = _laid_out(arrays[role], role, module, behind)
        if laid_out is None or laid_out[0].shape != target.shape:
            return {}
        tensor, how = laid_out
        fitted[back[role]] = (name, tensor.to(target.dtype), how)
    return fitted


def _wanted(kind: str, module: nn.Module) -> Iterator[tuple[str, tuple[str, Tensor]]]:
    """Role -> name and value in the module, for those it has."""
    names = {
        "kernel": "weight",
        "embedding": "weight",
        "scale": "weight",
        "bias": "bias",
        "mean": "running_mean",
        "var": "running_var",
    }
    for role in _NUMBERED[kind]:
        value = getattr(module, names[role], None)
        if value is not None:
            yield role, (names[role], value)


def _laid_out(
    array: Tensor, role: str, module: nn.Module, behind: nn.Module | None
) -> tuple[Tensor, str] | None:
    """An array in the layout of torch, and what was done; None where that is not sure.

    Args:
        behind: The convolution whose output reaches the module, if there is one.
    """
    channels = 0 if behind is None else int(behind.out_channels)  # type: ignore[arg-type]
    spots = array.shape[0] // channels if channels and array.dim() else 0
    is_flat = spots > 1 and array.shape[0] == spots * channels
    if role == "kernel" and array.dim() > 2:  # (places..., in, out) -> (out, in, places...)
        places = list(range(array.dim() - 2))
        return array.permute(-1, -2, *places).contiguous(), "transposed"
    # Flattened images: the channel is the fastest index there, the slowest one in torch.
    how = f"{spots} places x {channels} channels reordered"
    if role == "kernel":
        if not is_flat:
            return array.t().contiguous(), "transposed"
        columns = array.shape[1]
        ordered = array.reshape(spots, channels, columns).permute(2, 1, 0)
        return ordered.reshape(columns, -1).contiguous(), f"transposed, {how}"
    if is_flat and isinstance(module, nn.BatchNorm1d | nn.LayerNorm):
        if not (isinstance(module, nn.BatchNorm1d) and isinstance(behind, _OF_IMAGES)):
            return None  # as well a norm of signals that were put side by side
        return array.reshape(spots, channels).t().reshape(-1).contiguous(), how
    return array, ""
