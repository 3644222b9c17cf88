"""A few inputs and the model's outputs for them, in each checkpoint: what a resume, an evaluation
and an export compare.

Changed code and a wrong conversion show in it. A forward that draws runs under a fixed seed, which
gives the same draws on the same kind of device. One that cannot be repeated, raises or changes
attributes of the module has no canary: its first run finds that out.
"""

import contextlib
import copy
import dataclasses
import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import RNNBase

from savepoint.checkpoint.state.process import isolated_rng
from savepoint.look.baseline import Baseline
from savepoint.look.classes import is_library
from savepoint.look.marks import own_part
from savepoint.look.walk import Look

SEED = 0

Kind = Literal["plain", "draws", "none"]
_kinds: WeakKeyDictionary[LightningModule, Kind] = WeakKeyDictionary()


def canary(
    module: LightningModule, state_dict: Mapping[str, Any], example: Any = None
) -> dict[str, Any] | None:
    """`example_input_array` and its output with exactly the weights in `state_dict`, in eval mode;
    None where there is none.

    Args:
        example: The input in a file, in place of the module's own. What the forward raises for it
            is raised here.

    Returns:
        `input` and `output`; where the forward draws, also `seed` and the type of `device` that the
        draws are those of.
    """
    given = example is not None
    example = example if given else getattr(module, "example_input_array", None)
    if not _is_plain(example) or _kinds.get(module) == "none":
        return None
    # Not by `eval`, which a user's own class may do more in than `train` takes back.
    parts = list(module.modules())
    in_training = [part for part in parts if part.training]
    before = {}
    for part in in_training:
        part.training = False
    try:
        plain = _kinds.get(module) == "plain"
        isolated = contextlib.nullcontext() if plain else isolated_rng(module.device)
        with torch.no_grad(), isolated:
            if module not in _kinds:
                _kinds[module] = _kind(module, state_dict, example)
            if _kinds[module] == "none":
                return None
            if _kinds[module] == "draws":
                _seed()
            before = _attributes(part for part in parts if _is_own(part))
            output = _forward(module, state_dict, example)
    # Whatever a forward raises that is not made for eval mode or for these inputs.
    except Exception:
        if given:
            raise
        _kinds[module] = "none"
        return None
    finally:
        if _put_back(before):  # by a forward that does so from some epoch on
            _kinds[module] = "none"
        for part in in_training:
            part.training = True
    if _kinds[module] == "none" or not dict(tensors(output)):
        return None
    drawn = {"seed": SEED, "device": module.device.type} if _kinds[module] == "draws" else {}
    return {"input": _moved(example, torch.device("cpu")), "output": output} | drawn


def comparable(saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two canaries have drawn the same numbers, if any: another kind of device draws
    others.
    """
    return saved.get("seed") == now.get("seed") and saved.get("device") == now.get("device")


def distance(one: Any, other: Any) -> float:
    """The largest difference of two outputs, infinite where they have other parts. Equal infinities
    and NaNs are equal.
    """
    first = dict(tensors(one))
    second = dict(tensors(other))
    if first.keys() != second.keys() or any(first[key].shape != second[key].shape for key in first):
        return float("inf")
    return max(
        (_apart(first[key], second[key]) for key in first if first[key].numel()), default=0.0
    )


def largest(output: Any) -> float:
    """The largest finite absolute value, 1 at least."""
    values = [_wide(tensor).abs() for _, tensor in tensors(output)]
    return max(
        [1.0, *(float(value.nan_to_num(0, 0, 0).max()) for value in values if value.numel())]
    )


def tensors(output: Any, key: str = "") -> Iterator[tuple[str, Tensor]]:
    """Each tensor of a nested output, with its place."""
    if isinstance(output, Tensor):
        yield key, output
    elif isinstance(output, Mapping):
        for name, value in output.items():
            yield from tensors(value, f"{key}.{name}")
    elif isinstance(output, list | tuple):
        for place, value in enumerate(output):
            yield from tensors(value, f"{key}[{place}]")


def _kind(module: LightningModule, state_dict: Mapping[str, Any], example: Any) -> Kind:
    if _is_spread(module.modules()):
        _forward(module, state_dict, example)  # the first one of FSDP sets up what stays
    before = _attributes(module.modules())
    look = Look({"model": module}, {}, state_dict)
    inside = Baseline(look)  # of attributes: a meter's count, an array, a generator
    try:
        _seed()
        undrawn = _random_states(module.device)
        first = _forward(module, state_dict, example)
        drawn = _random_states(module.device) != undrawn
    finally:
        changed = _put_back(before)
        look = Look({"model": module}, {}, state_dict)
        if any(inside.changes(look)):
            changed = True
            inside.restore(look, [], module.device)
    if changed:
        return "none"
    _seed()
    second = _forward(module, state_dict, example)
    if distance(first, second) > 0.01 * largest(first):
        return "none"
    return "draws" if drawn else "plain"


def _forward(module: LightningModule, state_dict: Mapping[str, Any], example: Any) -> Any:
    example = _moved(example, module.device)
    positional = example if isinstance(example, tuple) else (example,)
    if isinstance(example, Mapping):
        positional = ()
    named = dict(example) if isinstance(example, Mapping) else {}
    parts = dict(module.named_modules())
    if _is_spread(parts.values()):
        return _spread_forward(module, positional, named)
    own = _are_its_own(parts, state_dict)
    with _copied_buffers(parts.values()):
        if own:
            return _plain(module(*positional, **named))
        return _forward_with(state_dict, module, positional, named)


def _forward_with(
    state_dict: Mapping[str, Any], module: LightningModule, positional: Any, named: Any
) -> Any:
    buffers = {name for name, _ in module.named_buffers()}
    wanted = buffers.union(name for name, _ in module.named_parameters())
    weights = {
        name: value.to(module.device) for name, value in state_dict.items() if name in wanted
    }
    weights |= {name: weights[name].clone() for name in buffers.intersection(weights)}
    # A recurrent layer lists its weights, and would go on with a list of those that it is called
    # with here.
    lists = [(part, dict(vars(part))) for part in module.modules() if isinstance(part, RNNBase)]
    try:
        return _plain(torch.func.functional_call(module, weights, positional, named))
    finally:
        for part, attributes in lists:
            vars(part).update(attributes)


def _are_its_own(parts: Mapping[str, nn.Module], state_dict: Mapping[str, Any]) -> bool:
    """Whether all of a state_dict is the very memory that the module computes with, as in a save:
    to put it into the module would take longer than most forwards.
    """
    return all(
        _is_same_memory(tensor, state_dict.get(f"{prefix}.{name}" if prefix else name, tensor))
        for prefix, part in parts.items()
        for name, tensor in (*part._parameters.items(), *part._buffers.items())
        if tensor is not None
    )


def _is_same_memory(one: Tensor, other: Any) -> bool:
    if one is other:
        return True
    if not isinstance(other, Tensor) or one.layout is not torch.strided:
        return False
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
        and one.device == other.device
    )


@contextlib.contextmanager
def _copied_buffers(parts: Iterable[nn.Module]) -> Iterator[None]:
    """A forward may change a buffer in place: it gets copies."""
    kept = [(part._buffers, dict(part._buffers)) for part in parts if part._buffers]
    copies: dict[int, Tensor] = {}
    for own, buffers in kept:
        for name, buffer in buffers.items():
            if buffer is not None:
                own[name] = copies.setdefault(id(buffer), buffer.clone())
    try:
        yield
    finally:
        for own, buffers in kept:
            own.clear()
            own.update(buffers)


def _is_spread(parts: Iterable[nn.Module]) -> bool:
    parameters = [one for part in parts for one in part._parameters.values() if one is not None]
    return any(own_part(parameter) is not parameter for parameter in parameters)


def _spread_forward(module: LightningModule, positional: Any, named: Any) -> Any:
    """With the weights as they are, which are those in the file: gathered by hooks, from all ranks,
    and let go again.
    """
    try:
        return _plain(module(*positional, **named))
    finally:
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def _plain(output: Any) -> Any:
    """An output as a file can hold it: lists, dicts and tensors on the CPU, real numbers as
    float32; the rest is None.
    """
    if isinstance(output, Tensor):
        if hasattr(output, "full_tensor"):
            output = output.full_tensor()
        dense = output.detach().dequantize() if output.is_quantized else output.detach()
        dense = (
            (dense if dense.layout is torch.strided else dense.to_dense())
            .resolve_conj()
            .resolve_neg()
        )
        return dense.float().cpu() if dense.is_floating_point() else dense.cpu()
    if isinstance(output, Mapping):
        return {str(name): _plain(value) for name, value in output.items()}
    if isinstance(output, list | tuple):
        return [_plain(value) for value in output]
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {
            field.name: _plain(getattr(output, field.name)) for field in dataclasses.fields(output)
        }
    return None


def _is_plain(example: Any) -> bool:
    if isinstance(example, list | tuple):
        return all(map(_is_plain, example))
    if isinstance(example, Mapping):
        return all(isinstance(name, str) for name in example) and all(
            map(_is_plain, example.values())
        )
    return isinstance(example, Tensor | bool | int | float | str)


def _moved(example: Any, device: torch.device) -> Any:
    if isinstance(example, Tensor):
        return example.to(device)
    if isinstance(example, Mapping):
        return {name: _moved(value, device) for name, value in example.items()}
    if isinstance(example, list | tuple):
        moved = [_moved(value, device) for value in example]
        return tuple(moved) if isinstance(example, tuple) else moved
    return example


def _apart(one: Tensor, other: Tensor) -> float:
    one = _wide(one)
    other = _wide(other)
    equal = (one == other) | (one.isnan() & other.isnan())
    far = float(torch.where(equal, 0.0, (one - other).abs()).max())
    return far if far == far else float("inf")


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _seed() -> None:
    torch.manual_seed(SEED)
    np.random.seed(SEED)
    random.seed(SEED)


def _random_states(device: torch.device) -> list[Any]:
    numpy: Any = np.random.get_state()
    states = [
        random.getstate(),
        numpy[1].tobytes(),
        numpy[2:],
        torch.get_rng_state().numpy().tobytes(),
    ]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state().cpu().numpy().tobytes())
    return states


_Contents = dict[torch.nn.Module, tuple[dict[str, Any], dict[str, Any]]]


def _is_own(part: nn.Module) -> bool:
    return not is_library(type(part).__module__)


def _attributes(parts: Iterable[nn.Module]) -> _Contents:
    """Of each part, its attributes, and copies of those that can change in place."""
    kinds = (list, dict, set, deque)
    return {
        part: (
            dict(vars(part)),
            {k: copy.copy(v) for k, v in vars(part).items() if isinstance(v, kinds)},
        )
        for part in parts
    }


def _put_back(before: _Contents) -> bool:
    """Undoes what a forward did to attributes; whether it did something."""
    changed = False
    for part, (attributes, containers) in before.items():
        now = vars(part)
        if now.keys() != attributes.keys() or any(
            now[name] is not value for name, value in attributes.items()
        ):
            changed = True
            now.clear()
            now.update(attributes)
        for name, kept in containers.items():
            value = attributes[name]
            if _members(value) == _members(kept):
                continue
            changed = True
            value.clear()
            value.extend(kept) if isinstance(value, list | deque) else value.update(kept)
    return changed


def _members(container: Any) -> list[int]:
    members = [*container, *container.values()] if isinstance(container, dict) else container
    return (
        sorted(map(id, members))
        if isinstance(container, set)
        else [id(member) for member in members]
    )
