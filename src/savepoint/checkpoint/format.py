"""How the bytes of a checkpoint look: plain nested dicts to a file and back. Torch, but no policy
and no Lightning.

A state holds plain Python values and tensors only, so that `torch.load(path, weights_only=True)`
reads all of it: nothing here ever loads in another way. The manifest is written last (see
`manifest`), by the same call.
"""

import copy
import hashlib
import io
import pickle
import re
import struct
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from savepoint.checkpoint import manifest
from savepoint.checkpoint.archive import Archive
from savepoint.errors import CheckpointContentError
from savepoint.look.marks import own_part

State = dict[str, Any]

# From format n to n + 1. A reader of old files is never removed: its test holds a small file of
# each old format.
MIGRATIONS: dict[int, Callable[[State], State]] = {}

# Read back by weights_only exactly as they are. Anything else is tried, one value at a time.
_PLAIN = {
    type(None),
    bool,
    float,
    complex,
    str,
    bytes,
    bytearray,
    torch.Size,
    torch.dtype,
    torch.device,
}
_CONTAINERS = {dict, OrderedDict, Counter, list, tuple, set}
_TENSORS = {Tensor, torch.nn.Parameter}
# NumPy numbers that are equal to Python's in every computation. Of np.float32 that is not true.
_NUMBERS = (np.float64, np.integer, np.bool_)


def encode(state: Mapping[str, Any], facts: Mapping[str, Any], file: BinaryIO) -> State:
    """Write `state` and its manifest to `file`, open for reading and writing; returns the manifest.
    Tensors stream.

    Raises:
        CheckpointContentError: a value that could not be read back; nothing was written.
        OSError: what the file system says.
    """
    if check_readable(state):
        state = _with_plain_numbers(state, {})
    archive = Archive(file)
    archive.save(state)
    return archive.seal(facts)


def decode(path: Path | str, map_location: Any = "cpu", mmap: bool = False) -> State:
    """The state in `path`. Bytes are taken as they are: `store.load` looks at them first.

    Raises:
        CheckpointCorruptError: torch cannot read it; `manifest.read` has more.
    """
    path = manifest.local_path(path)
    facts = manifest.read(path)
    try:
        # Torch warns of what it then refuses; what cannot be read ends in an error of ours.
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
            # An open file, as torch goes by the name of one that ends in .safetensors; it maps only
            # what it opens itself.
            source = path if mmap else file
            state: State = torch.load(
                source, map_location=map_location, mmap=mmap, weights_only=True
            )
    except (
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
    ) as error:
        reason = (
            manifest.diagnose(path) or f"torch {torch.__version__} cannot read it: {_cause(error)}"
        )
        raise manifest.corrupt(path, reason) from error
    for version in range(facts["format_version"], manifest.FORMAT_VERSION):
        state = MIGRATIONS[version](state)
    return state


def check_readable(state: Any) -> bool:
    """Refuse a state that could be written but not read back. Costs a walk, no copy of a tensor.

    Returns:
        Whether it holds NumPy numbers that are saved as Python's own.

    Raises:
        CheckpointContentError: names the key and the type of the first value that cannot be read
            back.
    """
    if _is_plain(state, set()):
        return False
    holds_numbers = False
    for key, value in leaves(state):
        if isinstance(value, _NUMBERS):
            holds_numbers = True
        elif not _reads_back(value):
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            group, *names = key.replace("[", ".").split(".")
            advice = "Store it as one of them, such as a str or a list."
            if group in ("hyper_parameters", "datamodule_hyper_parameters") and names:
                advice = f'Leave it out: self.save_hyperparameters(ignore=["{names[0]}"])'
            raise CheckpointContentError(
                f"A checkpoint cannot hold this value: {key} is a {kind}. A tensor or a plain "
                "value (number, text, list, dict, ...) was expected, as only those can be read "
                f"back safely. {advice}",
                "",
                key,
            )
    return holds_numbers


def _is_plain(value: Any, seen: set[int]) -> bool:
    """Whether all of a tree surely reads back: what nearly every state answers, in a third of the
    time that `leaves` takes to name each value.
    """
    kind = type(value)
    if kind is str or kind is float or kind is bool or value is None:
        return True
    if kind is int:
        return bool(value.bit_length() < 64)
    if kind in _TENSORS:
        return value.layout is torch.strided and not value.is_quantized and not vars(value)
    if kind not in _CONTAINERS:
        return kind in _PLAIN and value != b""
    if id(value) in seen:
        return True
    seen.add(id(value))
    if isinstance(value, dict):
        for name, item in value.items():
            if not (type(name) is str or _is_plain(name, seen)) or not _is_plain(item, seen):
                return False
        return kind is dict or _is_plain(vars(value), seen)
    return all(_is_plain(item, seen) for item in value)


def _with_plain_numbers(tree: Any, done: dict[int, Any]) -> Any:
    """The tree with Python's numbers in place of NumPy's: `lr=np.logspace(-4, -1, 7)[2]` is an
    np.float64. A container that stands twice is one in it, too.
    """
    if isinstance(tree, _NUMBERS):
        return tree.item()
    if type(tree) not in _CONTAINERS:
        return tree
    if id(tree) not in done:
        done[id(tree)] = _rebuilt(tree, done)
    return done[id(tree)]


def _rebuilt(tree: Any, done: dict[int, Any]) -> Any:
    kind = type(tree)
    if kind in (list, tuple, set):
        return kind(_with_plain_numbers(item, done) for item in tree)
    changed = copy.copy(tree)
    changed.clear()
    for key, value in tree.items():
        changed[_with_plain_numbers(key, done)] = _with_plain_numbers(value, done)
    if hasattr(changed, "__dict__"):
        vars(changed).update(_with_plain_numbers(vars(tree), done))
    return changed


def size_bytes(state: Any) -> int:
    """What the tensors of a state take in a file; memory that several share counts once."""
    own = (own_part(leaf) for _, leaf in leaves(state) if isinstance(leaf, Tensor))
    tensors = [part for one in own for part in parts(one) if not part.is_meta]
    return sum(
        {
            (t.device, t.untyped_storage().data_ptr()): t.untyped_storage().nbytes()
            for t in tensors
        }.values()
    )


def parts(tensor: Tensor) -> list[Tensor]:
    """The strided tensors that a tensor of another layout is made of; itself, if it is one. The
    values come last.
    """
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor if tensor.layout is torch.strided else tensor.to_dense()]


def numbers(tensor: Tensor) -> Tensor:
    """The values of a tensor of any kind, those of a sparse one alone, in a type that torch can sum
    and compare.
    """
    values = parts(tensor.detach())[-1] if tensor.layout is not torch.strided else tensor.detach()
    if values.is_quantized:
        return values.dequantize()
    # Of eight bits torch knows no sum, of large unsigned numbers neither.
    if values.is_floating_point() and values.element_size() == 1:
        return values.float()
    return values.double() if values.dtype in (torch.uint16, torch.uint32, torch.uint64) else values


def dense(tensor: Tensor) -> Tensor:
    """A tensor of any kind as a strided one of numbers, for arithmetic."""
    whole = tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()
    return numbers(whole)


def fingerprint(tree: Any) -> str:
    """sha256 over a nested tree of plain values and tensors: equal if and only if every value and
    every bit is.

    The order of dict keys and the device of tensors do not count; types, dtypes and shapes do.
    """
    return _hash(tree).hex()


def leaves(value: Any, key: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """Every value of the tree that is no container, with its place: `hyper_parameters.root`,
    `betas[0]`.
    """
    kind = type(value)
    if kind not in _CONTAINERS:
        yield key or "the checkpoint", value
        return
    seen = set() if seen is None else seen
    if id(value) in seen:  # shared, or a cycle: pickle writes it once
        return
    seen.add(id(value))
    if isinstance(value, dict):
        for name, item in value.items():
            place = f"{key}.{name}" if key else str(name)
            if type(name) is not str:
                yield from leaves(name, f"the key {place}", seen)
            yield from leaves(item, place, seen)
    else:
        for index, item in enumerate(value):
            yield from leaves(item, f"{key}[{index}]", seen)
    # An OrderedDict's, such as a state_dict's _metadata.
    for name, item in getattr(value, "__dict__", {}).items():
        yield from leaves(item, f"{key}.{name}", seen)


def _reads_back(value: Any) -> bool:
    kind = type(value)
    # Of all bytes only the empty ones are pickled as a call that is refused.
    if kind in _PLAIN and value != b"":
        return True
    if kind is int and value.bit_length() < 64:
        return True
    if kind in _TENSORS and value.layout is torch.strided and not value.is_quantized:
        return not vars(value) or all(_reads_back(extra) for _, extra in leaves(vars(value)))
    if isinstance(value, Tensor) and own_part(value) is not value:
        return True  # it is saved in parts
    file = io.BytesIO()
    try:
        with warnings.catch_warnings(action="ignore"):  # what torch says of sparse tensors
            torch.save(value, file)
            file.seek(0)
            torch.load(file, weights_only=True)
    except Exception:  # noqa: BLE001 - whatever a user's __reduce__ raises
        return False
    return True


def _cause(error: Exception) -> str:
    """In torch's words, but never with its advice to load in a way that runs programs."""
    if found := re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error)):
        return f"it holds a {found[1]}, which is neither a tensor nor a plain value"
    words = str(error).partition("\n")[0]
    if "weights_only" in str(error) or not words:
        return "it does not hold tensors and plain values alone"
    return words


def _hash(value: Any) -> bytes:
    """sha256 of one value: its type's name, then its parts, each of them hashed, so that no two
    trees run together.
    """
    if isinstance(value, Tensor):
        return _joined(b"tensor", *_tensor_parts(value))
    if isinstance(value, Mapping):
        pairs = sorted(_hash(key) + _hash(item) for key, item in value.items())
        return _joined(b"dict", *pairs)
    if isinstance(value, list | tuple):
        return _joined(
            b"list" if isinstance(value, list) else b"tuple", *(_hash(item) for item in value)
        )
    if isinstance(value, set | frozenset):
        return _joined(b"set", *sorted(_hash(item) for item in value))
    if isinstance(value, bytes | bytearray):
        return _joined(b"bytes", hashlib.sha256(value).digest())
    if isinstance(value, float) and not isinstance(value, bool):
        return _joined(b"float", struct.pack("<d", value))
    if value is None or isinstance(value, bool | int | str | complex | torch.dtype | torch.device):
        text = f"{type(value).__name__}:{value}".encode("utf-8", "surrogatepass")
        return _joined(b"plain", hashlib.sha256(text).digest())
    raise TypeError(
        f"No fingerprint for this value: {type(value)}. A tensor or a plain value was expected."
    )


def _joined(kind: bytes, *parts: bytes) -> bytes:
    total = hashlib.sha256(kind + b"\0" + str(len(parts)).encode() + b"\0")
    for part in parts:
        total.update(part)
    return total.digest()


def _tensor_parts(tensor: Tensor) -> tuple[bytes, bytes]:
    head = f"{tensor.dtype} {list(tensor.shape)}"
    if tensor.layout is not torch.strided:
        head += f" {tensor.layout}"
        data = b"".join(b"".join(_tensor_parts(part)) for part in parts(tensor.detach()))
    elif tensor.is_quantized:
        head += f" {tensor.qscheme()} {_quantization(tensor)}"
        data = b"".join(_tensor_parts(tensor.detach().int_repr()))
    else:
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        data = plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return hashlib.sha256(head.encode()).digest(), hashlib.sha256(data).digest()


def _quantization(tensor: Tensor) -> list[Any]:
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return [tensor.q_scale(), tensor.q_zero_point()]
    return [
        tensor.q_per_channel_scales().tolist(),
        tensor.q_per_channel_zero_points().tolist(),
        tensor.q_per_channel_axis(),
    ]
