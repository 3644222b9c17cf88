"""Files of arrays that other frameworks write: Keras' HDF5 and `.keras`, NumPy's npz, the msgpack
of Flax and older Orbax.

What comes out is flat: the place of an array in the file, its parts joined by "/", and the array
as it lies there. Only numbers are read: no pickle, no link out of the file.
"""

import importlib
import io
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from savepoint.checkpoint.diagnosis import HDF5, KERAS_WEIGHTS, is_map
from savepoint.errors import CheckpointForeignError

KINDS = ("keras", "npz", "flax")
_ARRAY = 1  # of Flax's msgpack: shape, dtype, bytes
_SCALAR = 3
_CHUNKED = "__msgpack_chunked_array__"
# What zipfile, NumPy and h5py raise on a damaged file. A RuntimeError is also an archive that is
# encrypted or of an unknown method; a MemoryError a size that cannot be meant.
_READ_ERRORS = (
    zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, KeyError, RuntimeError,
    MemoryError,
)  # fmt: skip


class Unreadable(ValueError):
    """Says in words why a file cannot be read safely."""


def kind_of(path: Path) -> str | None:
    """Of KINDS; None for a file of any other kind."""
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(HDF5):
        return "keras"
    if head.startswith(b"PK"):
        names = _names(path)
        if KERAS_WEIGHTS in names:
            return "keras"
        return "npz" if names and all(name.endswith(".npy") for name in names) else None
    return "flax" if is_map(head) else None


def _names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return []


def read(path: Path, kind: str) -> dict[str, Tensor]:
    """The arrays of a file, by their places.

    Raises:
        Unreadable: it holds something else, or is damaged.
        CheckpointForeignError: the package that reads it is not installed.
    """
    if kind == "npz":
        return dict(_npz(path))
    if kind == "flax":
        return dict(_msgpack(path))
    with path.open("rb") as file:
        if zipfile.is_zipfile(file):
            return _hdf5(path, io.BytesIO(_member(file, KERAS_WEIGHTS)))
        return _hdf5(path, file)


def _member(file: BinaryIO, name: str) -> bytes:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.read(name)
    except _READ_ERRORS as error:
        raise Unreadable(f"it is no whole zip archive: {_line(error)}") from error


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _tensor(array: Any) -> Tensor:
    if array.dtype.kind not in "fiub":
        raise Unreadable(f"it holds {array.dtype}, and no numbers")
    native = array.astype(array.dtype.newbyteorder("="), copy=True)
    return torch.from_numpy(np.ascontiguousarray(native).reshape(array.shape))


# -- npz -----------------------------------------------------------------------------------------


def _npz(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            for name in archive.files:
                yield name, _tensor(archive[name])
    except Unreadable:
        raise
    except (*_READ_ERRORS, TypeError) as error:
        why = _line(error)
        if "allow_pickle" in why:  # which runs programs, and is never advised
            why = "it holds Python objects, which are pickled"
        raise Unreadable(why) from error


# -- msgpack -------------------------------------------------------------------------------------


def _msgpack(path: Path) -> Iterator[tuple[str, Tensor]]:
    msgpack = _package("msgpack", path, "flax")

    def extension(code: int, data: bytes) -> Any:
        if code not in (_ARRAY, _SCALAR):
            raise Unreadable(f"it holds a value of the unknown kind {code}")
        shape, kind, numbers = msgpack.unpackb(data, raw=True)
        return _from_bytes(shape, kind.decode(), numbers)

    try:
        content = msgpack.unpackb(
            path.read_bytes(), ext_hook=extension, raw=False, strict_map_key=False
        )
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(f"it is no whole msgpack: {type(error).__name__}") from error
    if not isinstance(content, dict):
        raise Unreadable(f"it holds a {type(content).__name__}, no dictionary")
    try:
        yield from _flat(content, "")
    except (*_READ_ERRORS, TypeError, AttributeError) as error:
        raise Unreadable(f"an array in chunks is not whole: {_line(error)}") from error


def _from_bytes(shape: Any, kind: str, numbers: bytes) -> Tensor:
    kinds = {"V2": torch.bfloat16, "bool_": torch.bool, "bool": torch.bool}
    found = kinds.get(kind) or getattr(torch, kind, None)
    if not isinstance(found, torch.dtype):
        raise Unreadable(f"it holds {kind}, which torch does not know")
    if 0 in shape and not numbers:  # torch reads no empty buffer
        return torch.empty(tuple(shape), dtype=found)
    return torch.frombuffer(bytearray(numbers), dtype=found).reshape(tuple(shape))


def _flat(value: Any, place: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, dict) and value.get(_CHUNKED):
        shape = [value["shape"][str(number)] for number in range(len(value["shape"]))]
        parts = [value["chunks"][str(number)] for number in range(len(value["chunks"]))]
        yield place, torch.cat([part.reshape(-1) for part in parts]).reshape(shape)
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(inner, f"{place}/{name}" if place else str(name))


# -- HDF5 ----------------------------------------------------------------------------------------


def _hdf5(path: Path, file: BinaryIO) -> dict[str, Tensor]:
    h5py = _package("h5py", path, "keras")
    found: dict[str, Tensor] = {}

    def visit(name: str, one: Any) -> None:
        if not isinstance(one, h5py.Dataset):
            return
        if not isinstance(name, str):  # bytes that are no text
            raise Unreadable("it is no whole HDF5 file: a name in it is damaged")
        if one.is_virtual or one.external:
            raise Unreadable(f"its {name} lies in another file")
        found[name] = _tensor(one[()]) if one.shape else _tensor(np.asarray(one[()]))

    try:
        with h5py.File(file, "r") as opened:
            opened.visititems(visit)  # follows no soft and no external links
    except Unreadable:
        raise
    except (*_READ_ERRORS, TypeError) as error:
        raise Unreadable(f"it is no whole HDF5 file: {_line(error)}") from error
    return found


def _package(name: str, path: Path, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise CheckpointForeignError(
            f"A file of arrays, and the package that reads it is not installed: {path}. {name} was "
            f"expected. Install it: pip install 'savepoint-lightning[{extra}]', or make extras",
            path,
        ) from None


def by_collections(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model among the arrays: without those of an optimizer, of counters and of
    seeds, which a framework keeps beside them.
    """
    names = {name: name.split("/") for name in arrays}
    if any(parts[0] == "params" for parts in names.values()):  # a state of Flax
        return {n: arrays[n] for n, parts in names.items() if parts[0] in ("params", "batch_stats")}
    beside = (
        "optimizer",
        "optimizer_weights",
        "metrics",
        "seed_generator",
        "top_level_model_weights",
    )
    return {n: arrays[n] for n, parts in names.items() if not set(parts) & set(beside)}
