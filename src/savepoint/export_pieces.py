"""The weights of a checkpoint as safetensors in pieces, tensor by tensor: memory holds one of them.

    model-00001-of-00002.safetensors, ...
    model.safetensors.index.json            which piece has which weight, as Hugging Face's
                                            libraries write and read it

Neither the model is built nor the state put together: a checkpoint in shards may be larger than the
memory of this machine.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from savepoint import files
from savepoint.checkpoint import format, manifest
from savepoint.checkpoint.format import fingerprint
from savepoint.errors import ConfigError, SavepointError
from savepoint.resume.overrides import plain_name
from savepoint.sharded.pieces import Shards

INDEX = "model.safetensors.index.json"
_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


class Weights:
    """Those of a checkpoint that was verified: their shapes at once, each one's values when it is
    asked for.
    """

    def __init__(self, path: Path) -> None:
        self._shards: Shards | None = None
        facts = manifest.verify(path)
        if manifest.has_parts(path):
            self._shards = Shards(path, facts)
            path = path / manifest.COMMON
        state: dict[str, Any] = format.decode(path, mmap=True)["state_dict"]
        self._saved = {name: one for name, one in state.items() if isinstance(one, Tensor)}
        self.by_name = {plain_name(name): one for name, one in self._saved.items()}
        self._names = {plain_name(name): name for name in self._saved}

    def read(self, name: str) -> Tensor:
        tensor = self.by_name[name]
        if not tensor.is_meta or self._shards is None:
            return tensor.detach().contiguous()
        whole = torch.empty(tensor.shape, dtype=tensor.dtype)
        self._shards.read(f"state_dict.{self._names[name]}", whole, [0] * whole.dim())
        return whole


def export(path: Path, target: Path, most_bytes: int) -> list[str]:
    """Makes the directory `target`. It gets its name once each weight was read back and compared.

    Args:
        most_bytes: Of a piece; a larger weight has one by itself.

    Returns:
        The names of the pieces.

    Raises:
        ConfigError: A weight is of a kind that the format has not.
        CheckpointSaveError: The directory cannot be written.
    """
    weights = Weights(path)
    _refuse_unknown(weights)
    shares = list(_shares(weights, most_bytes))
    names = [f"model-{n:05d}-of-{len(shares):05d}.safetensors" for n in range(1, len(shares) + 1)]
    index = {name: piece for piece, share in zip(names, shares, strict=True) for name in share}
    total = sum(one.nbytes for one in weights.by_name.values())
    with files.saving(target), files.filling(target) as directory:
        for piece, share in zip(names, shares, strict=True):
            with (directory / piece).open("wb") as file:
                _write(weights, share, file)
                _sync(file)
            _compare(weights, share, directory / piece)
        with (directory / INDEX).open("wb") as file:
            text = {"metadata": {"total_size": total}, "weight_map": index}
            file.write(json.dumps(text, indent=2).encode() + b"\n")
            _sync(file)
    return names


def _refuse_unknown(weights: Weights) -> None:
    for name, one in weights.by_name.items():
        if one.dtype not in _TYPES or one.layout is not torch.strided:
            kind = str(one.dtype).removeprefix("torch.")
            raise ConfigError(
                f"Not possible as safetensors: {name} is {kind}, {one.layout}. Dense tensors of "
                "plain numbers were expected. Give --format ckpt"
            )


def _shares(weights: Weights, most_bytes: int) -> Iterator[list[str]]:
    """The names of the weights of each piece."""
    share: list[str] = []
    size = 0
    for name, one in weights.by_name.items():
        if share and size + one.nbytes > most_bytes:
            yield share
            share = []
            size = 0
        share.append(name)
        size += one.nbytes
    yield share


def _write(weights: Weights, share: list[str], file: BinaryIO) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name in share:
        one = weights.by_name[name]
        place = [begin, begin + one.nbytes]
        header[name] = {"dtype": _TYPES[one.dtype], "shape": list(one.shape), "data_offsets": place}
        begin = place[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin where a processor can map them
    file.write(len(text).to_bytes(8, "little") + text)
    for name in share:
        file.write(weights.read(name).reshape(-1).view(torch.uint8).numpy().data)


def _compare(weights: Weights, share: list[str], piece: Path) -> None:
    with safetensors.safe_open(piece, "pt") as opened:
        for name in share:
            if fingerprint(opened.get_tensor(name)) != fingerprint(weights.read(name)):
                raise SavepointError(
                    f"The exported piece holds another {name} than the checkpoint: {piece.name}. "
                    "Every bit was expected to be the same. Nothing was kept; look at the disk."
                )


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
