"""The facts of one checkpoint file and the seal that shows damage. Standard library only: a listing
imports no torch.

A checkpoint is the zip archive that torch.save writes, with one more record and a comment at its
end:

    archive/data.pkl, archive/data/0, ...     torch's records, stored; their CRC32s stand in the
                                              directory
    archive/manifest.json                     the facts, `body` and `digest` (see below)
    directory, zip64 end records              zip's own
    end record, comment                       `savepoint1 <offset of the manifest> <sha256>`

- The comment's sha256 covers every byte from the manifest's local header to the end of the file but
  its own 64 digits.
- `body` is the sha256 of every byte before the manifest that is no record's data: local headers and
  padding.
- `digest` is the sha256 of (name, size, CRC32) of torch's records: the identity of the content.

So each byte is covered by a CRC, by `body` or by the seal. `read` looks at the end of the file
alone and vouches for the facts; `verify` looks at every byte. torch.load, Lightning and zipfile
read the file as if nothing had been added.

A checkpoint in parts is a directory of such files:

    step-00000430.ckpt/
        shard-00000.ckpt ...    a rank's share of the tensors, and what that rank alone has
        common.ckpt             all the rest; written last. Its manifest is the directory's: it
                                names each shard with its size and digest

It is there if and only if common.ckpt is whole, and so is each shard that it names. What else lies
in the directory is no part of it.
"""

import errno
import hashlib
import json
import os
import re
import shlex
import stat
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from savepoint import files
from savepoint.checkpoint import claims
from savepoint.checkpoint.claims import SHARD_NAME
from savepoint.checkpoint.seal import DIGITS, MAGIC, SEAL_BYTES
from savepoint.errors import (
    CheckpointCorruptError,
    CheckpointForeignError,
    CheckpointNotFoundError,
    CheckpointVersionError,
)
from savepoint.words import python

if TYPE_CHECKING:
    from savepoint.checkpoint.diagnosis import Finding

FORMAT_VERSION = 1
PARTS_VERSION = 2  # of common.ckpt, so that older code takes none for a whole checkpoint
STEP_NAME = re.compile(r"step-(\d+)\.ckpt")
COMMON = "common.ckpt"

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_END_RECORD = struct.Struct("<4s4H2IH")
_FIRST_READ_BYTES = 8192  # holds the end of a checkpoint with some fifty tensors
_MAX_TAIL_BYTES = 1 << 28
_CHUNK_BYTES = 1 << 20


def step_entries(directory: Path) -> list[os.DirEntry[str]]:
    """What of `directory` is named as a checkpoint, unread, in the order of the names."""
    with os.scandir(directory) as entries:
        return sorted(
            (entry for entry in entries if STEP_NAME.fullmatch(entry.name)),
            key=lambda entry: entry.name,
        )


def step_files(directory: Path) -> list[Path]:
    """The same, as paths; nothing where there is no directory."""
    if not directory.is_dir():
        return []
    return [directory / entry.name for entry in step_entries(directory)]


def step_in_name(name: str) -> int | None:
    """Also of what was set aside: `step-00000430.ckpt.corrupt`."""
    match = STEP_NAME.match(name)
    return int(match[1]) if match else None


def read(path: Path | str) -> dict[str, Any]:
    """The manifest of `path`, vouched for by the seal. One small read, and of a directory a look at
    the size of each shard: damage to tensors is `verify`'s to find.

    Raises:
        CheckpointNotFoundError: no such file, another directory, or a URL.
        CheckpointCorruptError: a checkpoint that is truncated or damaged, or lacks a shard.
        CheckpointForeignError: a readable file that Savepoint did not write.
        CheckpointVersionError: a format newer than this code.
    """
    path = local_path(path)
    if has_parts(path):
        facts = _of_part(path, COMMON, read)
        _look_at_shards(path, facts)
        return facts
    with _open(path) as file:
        return _read_tail(path, file).facts


def read_sealed(file: BinaryIO, name: str) -> dict[str, Any]:
    """As `read`, of a file that may lie elsewhere, and that no other program can have written."""
    try:
        facts = _sealed_tail(file).facts
    except (ValueError, RecursionError) as error:
        raise corrupt(Path(name), f"no seal that holds: {error}".rstrip(" :")) from None
    if wrong := claims.wrong(facts):
        raise corrupt(Path(name), wrong)
    return facts


def verify(path: Path | str) -> dict[str, Any]:
    """The manifest of `path` after a look at every byte of it. Raises what `read` raises."""
    path = local_path(path)
    if has_parts(path):
        return _verify_parts(path)
    facts = _verify_file(path)
    if "shards" in facts or "shard" in facts:
        raise CheckpointNotFoundError(
            f"A part of a checkpoint: {path}. The whole of it was expected, which is a directory. "
            f"Name that: {path.parent}",
            path,
        )
    return facts


def has_parts(path: Path) -> bool:
    """Whether `path` is a directory with the parts of a checkpoint, or with some of them."""
    try:
        names = os.listdir(path)
    except OSError:
        return False
    return any(name == COMMON or SHARD_NAME.fullmatch(name) for name in names)


def files_of(path: Path) -> list[Path]:
    """The files of a checkpoint: itself, or its parts, those that its manifest names."""
    if not has_parts(path):
        return [path]
    return [*(path / name for name in read(path)["shards"]), path / COMMON]


def superfluous_in(path: Path) -> list[Path]:
    """Of a checkpoint in parts, files of earlier saves and of those that were cut off."""
    kept = {part.name for part in files_of(path)}
    others = (one for one in path.iterdir() if one.name not in kept)
    return [one for one in others if SHARD_NAME.search(one.name) or COMMON in one.name]


def wrong_shards(facts: Mapping[str, Any], size_of: Callable[[str], int | None]) -> str:
    """What a look at the shards that common.ckpt names shows, in words; "" where all are there.

    Args:
        size_of: The bytes of a shard; None where it is missing.
    """
    if "shards" not in facts:
        return f"{COMMON} names no shards: it is a whole checkpoint by itself"
    for name, known in facts["shards"].items():
        size = size_of(name)
        if size is None:
            return f"{name} is missing"
        if size != known["bytes"]:
            return f"{name} has {size} bytes, not {known['bytes']}"
    return ""


def _look_at_shards(path: Path, facts: Mapping[str, Any]) -> None:
    """Raises CheckpointCorruptError where a shard is missing or has another size."""

    def size_of(name: str) -> int | None:
        try:
            return os.stat(path / name).st_size
        except FileNotFoundError:
            if not path.exists():  # deleted meanwhile
                raise
            return None

    if wrong := wrong_shards(facts, size_of):
        raise corrupt(path, wrong)


def _verify_parts(path: Path) -> dict[str, Any]:
    facts = _of_part(path, COMMON, _verify_file)
    _look_at_shards(path, facts)
    for name, known in facts["shards"].items():
        found = _of_part(path, name, _verify_file)
        if found["digest"] != known["digest"]:
            raise corrupt(path, f"{name} is whole, but of another save than {COMMON}")
    return facts


def _of_part(path: Path, name: str, look: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What `look` says of a part; of the checkpoint, where it is damaged."""
    try:
        return look(path / name)
    except CheckpointCorruptError as error:
        raise corrupt(path, f"{name}: {error.reason}") from None
    except CheckpointForeignError:
        raise corrupt(path, f"{name}: not what a save writes") from None
    except CheckpointNotFoundError:
        if not path.exists():  # deleted meanwhile
            raise
        raise corrupt(path, f"{name} is missing") from None


def _verify_file(path: Path) -> dict[str, Any]:
    with _open(path) as file:
        tail = _read_tail(path, file)
        try:
            damaged = _damaged_records(file, tail)
        except (zipfile.BadZipFile, struct.error, ValueError, KeyError) as error:
            raise corrupt(path, f"its zip directory cannot be followed: {error}") from error
        if damaged:
            raise corrupt(path, f"one or more damaged bytes in {' and '.join(damaged)}")
    return tail.facts


def digest(records: Iterable[Any], shards: Mapping[str, Mapping[str, Any]] | None) -> str:
    """The identity of what torch's records hold, and of shards, if there are any."""
    lines = sorted(f"{record.filename} {record.file_size} {record.CRC}\n" for record in records)
    # The names of the shards may change from save to save; what is in them is the content.
    lines += [f"{shard['digest']}\n" for shard in (shards or {}).values()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def diagnose(path: Path | str) -> str:
    """What is wrong with `path`, in words: "truncated: 43 % of 312 kB", "an HTML page"; "" if it
    verifies.
    """
    try:
        verify(path)
    except CheckpointCorruptError as error:
        return error.reason
    except CheckpointForeignError:
        return _examine(Path(path)).words
    except CheckpointVersionError as error:
        return f"written by a newer Savepoint: {error}"
    except CheckpointNotFoundError:
        return "a directory" if os.path.isdir(path) else "not there"
    return ""


def local_path(path: Path | str) -> Path:
    """`path` as a Path; a URL is refused (a Path made of one has lost a slash, so one slash is
    enough).
    """
    if path == "":  # of a variable that is not set; pathlib would take it for the working directory
        raise CheckpointNotFoundError(
            "An empty path: a shell variable may be unset. Name a file or a directory.", path
        )
    if files.is_url(path):
        raise CheckpointNotFoundError(
            f"No checkpoint is loaded from a URL: {path}. A path on this machine was expected. "
            "Download the file first and name the copy.",
            path,
        )
    return path if isinstance(path, Path) else Path(path)


def corrupt(path: Path, reason: str) -> CheckpointCorruptError:
    return CheckpointCorruptError(
        f"The checkpoint does not verify: {path}. A whole, unchanged file was expected; this one: "
        f"{reason}. Use another checkpoint of the run, or a copy of this one.",
        path,
        reason,
    )


@dataclass(frozen=True)
class _Tail:
    """What stands behind the records: the manifest from `offset` on, then the directory."""

    offset: int
    facts: dict[str, Any]


def _open(path: Path) -> BinaryIO:
    try:
        if stat.S_ISREG(mode := os.stat(path).st_mode) or stat.S_ISDIR(mode):
            return open(path, "rb")
        # A named pipe would let the reader wait for ever.
        raise CheckpointNotFoundError(
            f"Not a file: {path}. A checkpoint is a regular file. Check the path.", path
        )
    except FileNotFoundError:
        message = f"No checkpoint there: {path}. A checkpoint is one file. Check the path."
        raise CheckpointNotFoundError(message, path) from None
    except IsADirectoryError:
        message = (
            f"A directory, not a checkpoint: {path}. A checkpoint is one file, or a directory of "
            "shards. Name one of the checkpoints in it."
        )
        raise CheckpointNotFoundError(message, path) from None
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENAMETOOLONG):
            raise
        message = (
            f"Not a path to a checkpoint: {str(path)[:200]} ({error.strerror}). A checkpoint is "
            "one file. Check the path."
        )
        raise CheckpointNotFoundError(message, path) from None


def _read_tail(path: Path, file: BinaryIO) -> _Tail:
    try:
        tail = _sealed_tail(file)
    except (ValueError, RecursionError) as error:
        raise _refusal(path, sealed=not isinstance(error, _NoSealError)) from None
    newest = PARTS_VERSION if "shards" in tail.facts else FORMAT_VERSION
    if (version := tail.facts["format_version"]) > newest:
        raise CheckpointVersionError(
            f"Written by a newer Savepoint: {path}. Format {newest} or older was "
            f"expected, this is {version}. Update Savepoint.",
            path,
        )
    if wrong := claims.wrong(tail.facts):
        raise corrupt(path, wrong)
    return tail


class _NoSealError(ValueError): ...


def _sealed_tail(file: BinaryIO) -> _Tail:
    size = file.seek(0, os.SEEK_END)
    start = file.seek(max(0, size - _FIRST_READ_BYTES))
    data = file.read()
    end = data[-_END_RECORD.size - SEAL_BYTES :]
    if not end.startswith(b"PK\5\6") or not end[_END_RECORD.size :].startswith(MAGIC):
        raise _NoSealError
    offset = int(end[_END_RECORD.size + len(MAGIC) :][:16], 16)
    if not 0 <= offset < size or size - offset > _MAX_TAIL_BYTES:
        raise ValueError("the seal points outside the file")
    if offset < start:
        file.seek(offset)
        data = file.read()
    else:
        data = data[offset - start :]
    if hashlib.sha256(data[:-DIGITS]).hexdigest().encode() != data[-DIGITS:]:
        raise ValueError("the seal does not match")
    return _Tail(offset, _parse(data))


def _parse(data: bytes) -> dict[str, Any]:
    fields = _LOCAL_HEADER.unpack_from(data)
    size = fields[7]
    name_bytes = fields[9]
    extra_bytes = fields[10]
    begin = _LOCAL_HEADER.size + name_bytes + extra_bytes
    facts = _DECODER.decode(data[begin : begin + size].decode())
    if not isinstance(facts, dict) or not claims.is_count(facts.get("format_version")):
        raise ValueError("a manifest without a format version")
    return facts


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)  # a listing reads thousands


def _refusal(path: Path, *, sealed: bool) -> CheckpointCorruptError | CheckpointForeignError:
    found = _examine(path)
    if sealed or not found.foreign:
        # With a seal, even one that does not hold, it is ours: a damaged name can make it look like
        # another program's.
        return corrupt(
            path, "one or more damaged bytes in its directory" if found.foreign else found.words
        )
    advice = found.advice.format(file=shlex.quote(str(path)), python=python())
    return CheckpointForeignError(
        f"Not a checkpoint of Savepoint: {path}. A file with a manifest was expected; this is "
        f"{found.words}. {advice}",
        path,
        reason=f"not a checkpoint of Savepoint: {found.words}",
        advice=advice,
        has_weights=found.has_weights,
    )


def _examine(path: Path) -> "Finding":
    # Only for a file that is refused: a listing must start fast.
    from savepoint.checkpoint.diagnosis import examine

    return examine(path)


def _damaged_records(file: BinaryIO, tail: _Tail) -> list[str]:
    """Names of the records whose bytes are not those that were written; headers and padding count
    as one more.
    """
    with zipfile.ZipFile(file) as archive:
        records = [record for record in archive.infolist() if record.header_offset < tail.offset]
    damaged = [
        f"record {record.filename}" for record in records if _crc(file, record) != record.CRC
    ]
    if not damaged and _body(file, records, tail.offset) != tail.facts["body"]:
        damaged = ["the headers or padding between the records"]
    shards = tail.facts.get("shards")
    if not damaged and digest(records, shards) != tail.facts["digest"]:
        damaged = ["the list of records"]
    return damaged


def _crc(file: BinaryIO, record: zipfile.ZipInfo) -> int:
    from savepoint.checkpoint.crc import crc32  # not for those who only list

    start = _data_start(file, record)
    value = 0
    for chunk in _chunks(file, start, start + record.compress_size):
        value = crc32(chunk, value)
    return value


def _body(file: BinaryIO, records: Iterable[zipfile.ZipInfo], end: int) -> str:
    """sha256 of the bytes before `end` that are no record's data."""
    total = hashlib.sha256()
    position = 0
    for record in sorted(records, key=lambda record: record.header_offset):
        start = _data_start(file, record)
        for chunk in _chunks(file, position, start):
            total.update(chunk)
        position = start + record.compress_size
    for chunk in _chunks(file, position, end):
        total.update(chunk)
    return total.hexdigest()


def _data_start(file: BinaryIO, record: zipfile.ZipInfo) -> int:
    file.seek(record.header_offset)
    fields = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    return int(record.header_offset + _LOCAL_HEADER.size + fields[9] + fields[10])


def _chunks(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    if start > end:
        raise ValueError("two records overlap")
    file.seek(start)
    while start < end and (chunk := file.read(min(_CHUNK_BYTES, end - start))):
        yield chunk
        start += len(chunk)
