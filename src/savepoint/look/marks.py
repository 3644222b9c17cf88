"""What is equal for two values if they are equal, at the cost of one look at each."""

import ctypes
import zlib
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

# Up to here every byte of a tensor is compared, above it its version and a sample.
_WHOLE_BYTES = 2**20
_SAMPLE = 1024


def mark(packed: Any) -> Any:
    """What is equal for two packed values if, and but for huge ones only if, they are equal."""
    kind = type(packed)
    if kind is int or kind is str or packed is None:
        return (kind.__name__, packed)
    if isinstance(packed, Tensor):
        return _tensor_mark(packed)
    if isinstance(packed, list):
        return tuple([mark(item) for item in packed])
    if isinstance(packed, dict):
        if packed["!"] == "texts":
            return len(packed["of"]), zlib.crc32(
                "\0".join(packed["of"]).encode("utf-8", "surrogatepass")
            )
        if packed["!"] in _COPIED:  # made for this look: neither version nor address say anything
            return tuple([(key, _copy_mark(item)) for key, item in packed.items()])
        return tuple([(key, mark(item)) for key, item in packed.items()])
    if isinstance(packed, float):
        return repr(packed)  # one NaN is like another, and 0.0 unlike -0.0
    return (kind.__name__, packed)


_COPIED = ("array", "number", "stack", "numbers", "bytes", "raw")


def _copy_mark(packed: Any) -> Any:
    if isinstance(packed, Tensor) and packed.device.type == "cpu" and not packed.is_quantized:
        return (
            str(packed.dtype),
            tuple(packed.shape),
            _sum(packed.resolve_conj().resolve_neg().reshape(-1)),
        )
    return mark(packed)


def own_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is spread over ranks (a DTensor): a look at one must not
    wait for the others.
    """
    if type(tensor) in _PLAIN or not hasattr(tensor, "to_local"):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()
    return part


_PLAIN = (Tensor, torch.nn.Parameter)


def _tensor_mark(tensor: Tensor) -> Any:
    tensor = own_part(tensor)
    head = (str(tensor.dtype), tuple(tensor.shape))
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return (*head, _version(tensor), id(tensor))
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    if tensor.nbytes <= _WHOLE_BYTES:
        return (*head, _sum(flat))
    return (*head, _version(tensor), tensor.data_ptr(), _sum(flat[:: len(flat) // _SAMPLE]))


def fingerprint(tensor: Tensor) -> Any:
    """Differs once a tensor was written to: by a sample too, as writing through `.data` leaves its
    version as it is.
    """
    tensor = own_part(tensor)
    if (
        tensor.layout is not torch.strided
        or is_lazy(tensor)
        or tensor.is_quantized
        or tensor.is_meta
    ):
        return _version(tensor)
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    return _version(tensor), tensor.data_ptr(), _sum(flat[:: max(1, len(flat) // _SAMPLE)].cpu())


def sample_sum(tensor: Tensor, total: int = 0) -> int:
    """A sum over a sample of a tensor's values, wherever it is, added to `total`."""
    tensor = own_part(tensor)
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        return total
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    return _sum(flat[:: max(1, len(flat) // _SAMPLE)].cpu(), total)


def sum_of_all(tensors: Iterable[Tensor], number: int) -> int:
    """A sum over a sample of all of them, for ranks that should hold the same: on each rank, of
    the same places. It is made at every save, and costs a few microseconds a tensor.

    Args:
        number: Of the tensors that share the places: more of them have fewer each.
    """
    samples: dict[Any, list[Tensor]] = defaultdict(list)
    with torch.no_grad():
        for tensor in tensors:
            sample = _blocks(tensor, max(_FEWEST, _PLACES // number))
            samples[sample.device, sample.dtype, sample.dim()].append(sample)
        whole = [torch.cat(alike).view(-1).cpu() for alike in samples.values()]
    total = 0
    for flat in whole:
        total = _sum(flat, total)
    return total


# Of all tensors together, and of one at least. A place costs a fetch from memory, with which some
# of the values beside it are there too.
_PLACES = 2**14
_FEWEST = 16
_BLOCK = 16


def _blocks(tensor: Tensor, places: int) -> Tensor:
    tensor = own_part(tensor)
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        return torch.empty(0)
    if not tensor.is_contiguous():  # in the order of its memory, such as channels_last, is no copy
        tensor = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    flat = tensor.reshape(-1)
    step = len(flat) // places
    return flat if step <= _BLOCK else flat.unfold(0, _BLOCK, step)


def _sum(flat: Tensor, total: int = 0) -> int:
    if not flat.numel():
        return total
    whole = flat.contiguous()
    # Not by `numpy()`, which lets nobody resize the tensor any more.
    return zlib.crc32((ctypes.c_char * whole.nbytes).from_address(whole.data_ptr()), total)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
