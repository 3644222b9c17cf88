"""Which part of a tensor a rank holds, and a tensor from its parts.

A state is what `state_dict` of the module and of the optimizers give, with DTensors in it. In
common.ckpt an empty tensor of the same shape stands for each (on the device `meta`, which has no
bytes); the shards hold the parts, by the place in the state and the offset in the whole. So the
whole, put together, is the state that one process would have saved. Tensors that all ranks hold
whole, under DDP, may be shared out among the shards.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from savepoint.checkpoint import format, manifest
from savepoint.errors import CheckpointContentError

OWN = "other_ranks"  # in a whole state: what each rank but the first has of its own
_OF_ANOTHER_RANK = re.compile(rf"{OWN}\[\d+\]\.")
_OF_PARAMETER = re.compile(r"optimizer_states\[(\d+)\]\.state\.(\d+)\.")

Replacing = dict[int, Any]


def split(
    state: Mapping[str, Any], rank: int = 0, writers: Mapping[int, int] | None = None
) -> tuple[Replacing, dict[str, Any]]:
    """What stands for each DTensor of `state`, for `replaced`; and this rank's parts of them.

    Args:
        writers: As `shared_out` gives them: these tensors go into shards too, each of them whole.

    Raises:
        CheckpointContentError: a tensor of which each rank holds a summand.
    """
    stands: Replacing = {}
    pieces: dict[str, Tensor] = {}
    places: dict[str, list[int]] = {}
    copies: dict[int, Tensor] = {}
    shared = writers or {}
    in_shards = [
        (key, leaf)
        for key, leaf in format.leaves(state)
        if isinstance(leaf, DTensor) or id(leaf) in shared
    ]
    for number, (key, leaf) in enumerate(in_shards):
        offsets = _offsets(key, leaf)
        part = local(leaf)
        if isinstance(leaf, DTensor):
            stands[id(leaf)] = torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
            writes = _is_the_writer(number, leaf)
        else:
            stands[id(leaf)] = torch.empty_like(leaf, device="meta")
            writes = shared[id(leaf)] == rank
        if not part.numel() or not writes:
            continue
        if part.untyped_storage().nbytes() != part.nbytes:
            # A view of a larger buffer, all of which would be written.
            part = copies.setdefault(id(leaf), part.clone())
        pieces[key] = part
        places[key] = offsets
    return stands, {"pieces": pieces, "places": places}


def shared_out(tensors: Iterable[Tensor], number: int) -> dict[int, int]:
    """id -> the rank that writes it, of tensors that each of `number` ranks holds whole: the
    largest first, each by the rank that has the fewest bytes to write. Tied weights, which are
    written once, go to one rank.
    """
    loads = [0] * number
    writers: dict[int, int] = {}
    of_memory: dict[tuple[torch.device, int, int], int] = {}
    for tensor in sorted(tensors, key=lambda one: -one.nbytes):
        memory = (tensor.device, tensor.data_ptr(), tensor.nbytes)
        if memory not in of_memory:
            of_memory[memory] = loads.index(min(loads))
            loads[of_memory[memory]] += tensor.nbytes
        writers[id(tensor)] = of_memory[memory]
    return writers


def replaced(tree: Any, by: Replacing) -> Any:
    """A copy of the tree, with other tensors in the place of some; the rest of them are shared."""
    kept = {id(leaf): leaf for _, leaf in format.leaves(tree) if isinstance(leaf, Tensor)}
    return copy.deepcopy(tree, kept | by)  # what its memo has is taken as copied


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local().detach()


def whole(state: Any, *, keep: bool) -> Any:
    """The state with all of each tensor, on the CPU. All ranks call it together.

    Args:
        keep: Whether this rank needs it; others help, and hold one tensor at a time.
    """
    gathered: Replacing = {}
    for _, leaf in format.leaves(state):
        if isinstance(leaf, DTensor) and id(leaf) not in gathered:
            full = cast(DTensor, leaf.detach()).full_tensor()
            gathered[id(leaf)] = full.cpu() if keep else None
    return replaced(state, gathered) if keep else None


def _offsets(key: str, tensor: Tensor) -> list[int]:
    if not isinstance(tensor, DTensor):
        return [0] * tensor.dim()
    if any(placement.is_partial() for placement in tensor.placements):
        raise CheckpointContentError(
            f"A checkpoint cannot hold this value: {key} is a DTensor of which each rank holds a "
            "summand. One that is sharded or replicated was expected. Reduce it before the step "
            "ends.",
            "",
            key,
        )
    # The protocol that torch's own distributed checkpoints go by.
    chunks: Any = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    return list(chunks[0].offsets) if chunks else [0] * tensor.dim()


def _is_the_writer(turn: int, tensor: DTensor) -> bool:
    """Whether this rank writes its part: of equal parts one is written, replicas take turns."""
    mesh = tensor.device_mesh
    here = mesh.get_coordinate()
    if here is None:
        return False
    number = 0
    replicas = 1
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            number = number * mesh.size(dimension) + here[dimension]
            replicas *= mesh.size(dimension)
    return turn % replicas == number


class Shards:
    """The parts of one checkpoint, mapped into memory: only what is asked for is read.

    Args:
        facts: The checkpoint's manifest; `store.load` and the chooser have looked at every byte.

    Attributes:
        own: What each rank had of its own; nothing of the first, whose own is in common.ckpt.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path = path
        self.own: list[dict[str, Any]] = []
        self._parts: dict[str, list[tuple[list[int], Tensor]]] = defaultdict(list)
        for name in facts["shards"]:
            shard = format.decode(path / name, mmap=True)
            self.own.append(shard["own"])
            for key, tensor in shard["pieces"].items():
                self._parts[key].append((shard["places"][key], tensor))

    def read(self, key: str, into: Tensor, begin: Sequence[int]) -> None:
        """Fills `into`, which is the part from `begin` on of the tensor at `key`.

        Raises:
            CheckpointCorruptError: the shards do not hold all of it.
        """
        missing = into.numel()
        for place, piece in self._parts.get(_OF_ANOTHER_RANK.sub("", key), ()):
            first = [max(pair) for pair in zip(place, begin, strict=True)]
            ends = zip(place, piece.shape, begin, into.shape, strict=True)
            last = [min(there + size, here + length) for there, size, here, length in ends]
            if any(end <= start for start, end in zip(first, last, strict=True)):
                continue
            part = piece[_box(first, last, place)]
            into[_box(first, last, begin)] = part.to(into.device)
            missing -= part.numel()
        if missing:
            raise manifest.corrupt(self.path, f"its shards hold not all of {key}")


def _box(first: Sequence[int], last: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    bounds = zip(first, last, origin, strict=True)
    return tuple(slice(start - zero, end - zero) for start, end, zero in bounds)


def assembled(path: Path, facts: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """The whole state of a checkpoint in parts, as one process would have saved it.

    Args:
        state: That of common.ckpt.
    """
    shards = Shards(path, facts)
    state = dict(state) | own_of(shards, facts)
    found: Replacing = {}
    for key, leaf in format.leaves(state):
        if isinstance(leaf, Tensor) and leaf.is_meta:
            found[id(leaf)] = torch.empty_like(leaf, device="cpu")
            shards.read(key, found[id(leaf)], [0] * leaf.dim())
    result: dict[str, Any] = replaced(state, found)
    return result


def own_of(shards: Shards, facts: Mapping[str, Any], rank: int | None = None) -> dict[str, Any]:
    """What the ranks but the first had of their own; of `rank` alone, if it is given."""
    if facts.get("world_size", 1) == 1:
        return {}
    numbered = enumerate(shards.own[1:], 1)
    return {OWN: [own if rank in (None, number) else {} for number, own in numbered]}


def placed(
    state: Mapping[str, Any],
    shards: Shards | None,
    targets: Mapping[str, Tensor],
    optimizers: Iterable[torch.optim.Optimizer] = (),
) -> dict[str, Any]:
    """`state` with this rank's part of each tensor, spread as the model now is.

    Args:
        state: That of common.ckpt, or a whole one.
        shards: Of a whole state None.
        targets: The module's `state_dict`.
    """
    parameters = [
        [one for group in optimizer.param_groups for one in group["params"]]
        for optimizer in optimizers
    ]
    found: Replacing = {}
    for key, leaf in format.leaves(state):
        if not isinstance(leaf, Tensor) or isinstance(leaf, DTensor):
            continue
        of_optimizer = _OF_PARAMETER.match(key)  # of no use where there is none
        like = _target(_OF_ANOTHER_RANK.sub("", key), targets, parameters)
        if isinstance(like, DTensor) and (like.shape == leaf.shape or leaf.is_meta):
            found[id(leaf)] = _part_like(like, key, leaf, shards)
        elif leaf.is_meta and shards is not None and (like is not None or not of_optimizer):
            found[id(leaf)] = torch.empty_like(leaf, device="cpu")
            shards.read(key, found[id(leaf)], [0] * leaf.dim())
    result: dict[str, Any] = replaced(state, found) if found else dict(state)
    return result


def _target(
    key: str, targets: Mapping[str, Tensor], parameters: Sequence[Sequence[Tensor]]
) -> Tensor | None:
    kind, _, name = key.partition(".")
    if kind in ("state_dict", "gradients"):
        return targets.get(name)
    found = _OF_PARAMETER.match(key)
    if found and int(found[1]) < len(parameters):
        own = parameters[int(found[1])]
        return own[int(found[2])] if int(found[2]) < len(own) else None
    return None


def _part_like(like: DTensor, key: str, leaf: Tensor, shards: Shards | None) -> DTensor:
    """The tensor at `key`, spread over the ranks as `like` is."""
    same = like.shape == leaf.shape
    placements = like.placements if same else [Replicate()] * like.device_mesh.ndim
    own = torch.empty(local(like).shape if same else leaf.shape, dtype=leaf.dtype)
    begin = _offsets(key, like) if same else [0] * leaf.dim()
    if own.numel() and shards is not None:
        shards.read(key, own, begin)
    elif own.numel():
        end = [start + size for start, size in zip(begin, own.shape, strict=True)]
        own.copy_(leaf[_box(begin, end, [0] * leaf.dim())])
    stride = torch.empty(leaf.shape, device="meta").stride()
    return DTensor.from_local(
        own.to(local(like).device),
        like.device_mesh,
        placements,
        run_check=False,
        shape=leaf.shape,
        stride=stride,
    )
