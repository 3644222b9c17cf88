"""Says in words what a file is that is no checkpoint. Nothing is ever unpickled."""

import codecs
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from savepoint import words
from savepoint.checkpoint.seal import MAGIC, RECORD, SEAL_BYTES

_ITEM_BYTES = {
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("ByteStorage", "CharStorage", "BoolStorage", "UntypedStorage"), 1),
    "ComplexDoubleStorage": 16,
}
# Of torch for each tensor: header, padding to 64 bytes, descriptor, directory entry.
_RECORD_OVERHEAD_BYTES = 150
_END_OVERHEAD_BYTES = 3000  # of ours and torch's: small records, manifest, seal
# The first value of torch.save's format before zip, pickled.
_LEGACY_TORCH = b"l\xfc\x9cF\xf9 j\xa8P\x19"


_OTHERS = {
    "an image": (b"\x89PNG", b"\xff\xd8\xff", b"GIF8"),
    "an array of NumPy": (b"\x93NUMPY",),
}
KERAS_WEIGHTS = "model.weights.h5"  # in a .keras archive
HDF5 = b"\x89HDF\r\n\x1a\n"
_NAME_ANOTHER = "Name a checkpoint."
_SAVE_WEIGHTS = (
    "Where it was made, save its weights: torch.save(model.state_dict(), FILE). Name that."
)
_TAKE_WEIGHTS = "Start from its weights: {python} train.py --init_from {file}"
_TAKE_MORE = (
    f"{_TAKE_WEIGHTS}\n"
    "or with its epoch and best as well: {python} resume.py {file} --config CONFIG.yaml"
)


class Finding(NamedTuple):
    """What a file is.

    Attributes:
        foreign: A file of some other program; otherwise a checkpoint that is damaged, or the
            remains of one.
        advice: What to do with a foreign one, with places for {python} and {file}.
    """

    words: str
    foreign: bool
    advice: str = _NAME_ANOTHER

    @property
    def has_weights(self) -> bool:
        return self.advice in (_TAKE_WEIGHTS, _TAKE_MORE)


def examine(path: Path) -> Finding:
    """What `path` is, given that its seal does not hold."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(4096)
        if not head:
            return Finding("empty", False)
        if not head.strip(b"\0") and _is_zero(file):
            return Finding(
                f"all zero bytes ({words.size(size)}), as after a write that never reached the "
                "disk",
                False,
            )
        if head.startswith(b"PK\3\4") or zipfile.is_zipfile(file):
            return _examine_zip(path, file, size)
    return _examine_other(head)


def _examine_zip(path: Path, file: BinaryIO, size: int) -> Finding:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return Finding(_broken_end(file, size), False)
    if RECORD in names:
        return Finding(_broken_seal(file, size), False)
    folder = names[0].split("/")[0] if names else ""
    if f"{folder}/constants.pkl" in names:
        return Finding("a TorchScript program or an exported one", True, _SAVE_WEIGHTS)
    if f"{folder}/data.pkl" in names:
        return Finding(
            "a torch.save file without a manifest, such as Lightning and other programs write",
            True,
            _TAKE_MORE,
        )
    if KERAS_WEIGHTS in names:
        return Finding("a model of Keras", True, _TAKE_WEIGHTS)
    if names and all(name.endswith(".npy") for name in names):
        return Finding("arrays of NumPy (npz)", True, _TAKE_WEIGHTS)
    return Finding("a zip archive of something else", True)


def _broken_seal(file: BinaryIO, size: int) -> str:
    """A whole zip with a manifest: its seal is in the wrong place, or is not the seal of these
    bytes.
    """
    start = file.seek(max(0, size - (1 << 17)))
    data = file.read()
    found = data.rfind(MAGIC)
    extra = size - (start + found + SEAL_BYTES)
    if found >= 0 and extra > 0:
        return f"{extra} bytes were appended to it"
    if found >= 0 and extra < 0:
        return f"truncated: its last {-extra} bytes are missing"
    return "one or more damaged bytes in its manifest, directory or seal"


def _broken_end(file: BinaryIO, size: int) -> str:
    whole = _estimated_size(file)
    if whole is None:
        return f"truncated: {words.size(size)} are there, less than its first record"
    if size < 0.99 * whole:
        return f"truncated: {100 * size / whole:.0f} % of {words.size(whole)}"
    file.seek(max(0, size - 4096))
    if not file.read().strip(b"\0"):
        return "its end is zero bytes, as after a write that never reached the disk"
    there = f"{words.size(size)} of about {words.size(whole)} are there"
    return f"truncated or damaged at its end: {there}"


def _estimated_size(file: BinaryIO) -> float | None:
    """Of a torch archive whose end is missing: its first record, data.pkl, names every tensor with
    its size.
    """
    file.seek(26)
    lengths = file.read(4)
    start = 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    file.seek(start)
    try:
        storages = dict(_storages(file))
    except (ValueError, EOFError, IndexError, KeyError, TypeError):
        return None
    data = sum(storages.values()) + len(storages) * _RECORD_OVERHEAD_BYTES
    return file.tell() + data + _END_OVERHEAD_BYTES


def _storages(file: BinaryIO) -> Iterator[tuple[str, int]]:
    """(name, bytes) of each storage. Torch writes one as the tuple ("storage", its class, name,
    device, items).
    """
    memo: dict[Any, Any] = {}
    recent: list[Any] = []
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = recent[-1] if recent else None
        elif name in ("BINGET", "LONG_BINGET"):
            recent.append(memo.get(argument))
        elif name == "TUPLE":
            recent.append(recent[-5:])
        elif name == "BINPERSID":
            _, kind, key, _, items = recent[-1]
            yield str(key), int(items) * _ITEM_BYTES.get(str(kind).split()[-1], 4)
        elif argument is not None:
            recent.append(argument)
        del recent[:-8]


def _examine_other(head: bytes) -> Finding:
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return Finding(
            "an HTML page, perhaps the answer to a download that failed",
            True,
            "Look at it in a browser, and download the file again.",
        )
    if head.startswith(b"version https://git-lfs"):
        return Finding(
            "a git-LFS pointer: the file itself has not been fetched (git lfs pull)",
            True,
            "Fetch it: git lfs pull --include {file}",
        )
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 1 << 32:
        return Finding("a safetensors file", True, _TAKE_WEIGHTS)
    if head.startswith(b"\x80") and head[1:2] <= bytes([pickle.HIGHEST_PROTOCOL]):
        if _LEGACY_TORCH[1:] in head[:32]:
            return Finding("a torch.save file of the old format, before zip", True, _TAKE_MORE)
        return Finding("a pickled object", True, _SAVE_WEIGHTS)
    if head.startswith(HDF5):
        return Finding("an HDF5 file, such as Keras writes", True, _TAKE_WEIGHTS)
    if is_map(head):
        return Finding("a msgpack file, such as Flax writes", True, _TAKE_WEIGHTS)
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return Finding(
            "a compressed file: unpack it first", True, "Unpack it, and name what comes out."
        )
    if head[257:262] == b"ustar":
        return Finding("a tar archive", True, "Unpack it, and name what comes out: tar -xf {file}")
    for kind, begins in _OTHERS.items():
        if head.startswith(begins):
            return Finding(kind, True)
    if _is_text(head):
        return Finding("a text file", True)
    return Finding(f"no zip archive: it begins with the bytes {head[:4].hex(' ')}", False)


def is_map(head: bytes) -> bool:
    """Whether bytes begin like a msgpack map whose first key is a text."""
    if head[:1] in (b"\xde", b"\xdf"):
        head = head[2:] if head[:1] == b"\xde" else head[4:]
    elif not b"\x81" <= head[:1] <= b"\x8f":
        return False
    return b"\xa1" <= head[1:2] <= b"\xbf" or head[1:2] in (b"\xd9", b"\xda")


def _is_text(head: bytes) -> bool:
    try:
        # A character may be cut at the end.
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(letter.isprintable() or letter.isspace() for letter in text)


def _is_zero(file: BinaryIO) -> bool:
    file.seek(0)
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            return False
    return True
