"""What is wrong with a checkpoint of either system, every byte looked at; and how to damage one."""

import os
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def found(system: str, path: Path) -> str:
    """What is wrong with a file, "" where nothing is: ours by its manifest and seal, Lightning's by
    its CRCs and a load.
    """
    from savepoint.checkpoint import store
    from savepoint.errors import CheckpointCorruptError, CheckpointForeignError

    if system == "savepoint":
        try:
            return _torn(store.load(path)[0])
        except CheckpointCorruptError as error:
            return error.reason
        except CheckpointForeignError as error:
            return str(error)
    try:
        with zipfile.ZipFile(path) as archive:
            if record := archive.testzip():
                return f"the CRC of {record} is wrong"
        return _torn(load(path))
    except FileNotFoundError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a loader raises, the file cannot be loaded
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0] or 'without a word'}"


def load(path: Path) -> Any:
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)


def _torn(state: Any) -> str:
    """Whether each parameter has seen as many steps as the file says: AdamW counts them."""
    steps = {int(one["step"]) for one in state["optimizer_states"][0]["state"].values()}
    return (
        ""
        if steps == {state["global_step"]}
        else f"step {state['global_step']} with parameters of {sorted(steps)}"
    )


# -- damaging ------------------------------------------------------------------------------------


def _flip_a_bit(path: Path, dice: random.Random) -> None:
    records = _tensor_bytes(path)
    start, size = dice.choices(records, [size for _, size in records])[0]
    _overwrite(
        path,
        start + dice.randrange(size),
        1,
        lambda byte: bytes([byte[0] ^ 1 << dice.randrange(8)]),
    )


def _zero_a_page(path: Path, dice: random.Random) -> None:
    start, size = max(_tensor_bytes(path), key=lambda record: record[1])
    first = -(-start // 4096)
    last = (start + size) // 4096
    _overwrite(path, 4096 * dice.randrange(first, last), 4096, lambda page: bytes(len(page)))


def _cut_off(path: Path, dice: random.Random) -> None:
    os.truncate(path, int(path.stat().st_size * dice.uniform(0.1, 0.95)))


KINDS: dict[str, Callable[[Path, random.Random], None]] = {
    "a flipped bit": _flip_a_bit,
    "a zeroed page": _zero_a_page,
    "a truncation": _cut_off,
}


def _tensor_bytes(path: Path) -> list[tuple[int, int]]:
    """Where the tensors' bytes lie: (start, size) of each."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        places = []
        for record in archive.infolist():
            if "/data/" in record.filename:
                file.seek(record.header_offset + 26)
                name, extra = struct.unpack("<2H", file.read(4))
                places.append((record.header_offset + 30 + name + extra, record.file_size))
    return places


def _overwrite(path: Path, place: int, size: int, change: Callable[[bytes], bytes]) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        before = file.read(size)
        after = change(before)
        assert after != before, f"nothing is different at {place}"
        file.seek(place)
        file.write(after)
