"""How a checkpoint is written: torch's records, then the manifest and the seal, in one go.

`manifest` says what the file looks like, and reads it. torch.save would end the archive itself: it
had to be read again, and its end written a second time, to add the manifest and the seal.
"""

import hashlib
import json
import pickle
import struct
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, BinaryIO, cast

import torch
from torch import UntypedStorage

from savepoint.checkpoint import manifest
from savepoint.checkpoint.crc import crc32
from savepoint.checkpoint.seal import MAGIC, PREFIX, RECORD, SEAL_BYTES

_ALIGNMENT = 64  # of a record's data: torch.load maps it, and says so in a record
_PART_BYTES = 1 << 20  # still in the processor's cache when it is written
# What says in a field of 32 or 16 bits that a wider one has the value, and from where on it has.
_WIDE = 0xFFFFFFFF
_WIDE_NUMBER = 0xFFFF
_LIMIT = _WIDE
_NUMBER_LIMIT = _WIDE_NUMBER
_VERSION = 45  # of zip, the first with these fields
_DATE = 33  # 1 January 1980: equal states and facts give equal files

_LOCAL = struct.Struct("<4s5H3I2H")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")


class Record:
    """A record of the archive, by the names that zipfile's have."""

    def __init__(self, filename: str, header_offset: int, file_size: int) -> None:
        self.filename = filename
        self.header_offset = header_offset
        self.file_size = file_size
        self.CRC = 0

    def local(self) -> bytes:
        """What stands before the data, which is aligned by it."""
        name = self.filename.encode()
        large = self.file_size >= _LIMIT
        extra = struct.pack("<2H2Q", 1, 16, self.file_size, self.file_size) if large else b""
        begin = self.header_offset + _LOCAL.size + len(name) + len(extra) + 4
        padding = -begin % _ALIGNMENT
        extra += struct.pack("<2sH", b"FB", padding) + bytes(padding)
        size = _WIDE if large else self.file_size
        fields = (_VERSION, 0, 0, 0, _DATE, self.CRC, size, size, len(name), len(extra))
        return _LOCAL.pack(b"PK\3\4", *fields) + name + extra

    def entry(self) -> bytes:
        """Its line in the directory."""
        name = self.filename.encode()
        size = _WIDE if self.file_size >= _LIMIT else self.file_size
        offset = _WIDE if self.header_offset >= _LIMIT else self.header_offset
        wide = [self.file_size] * 2 * (size == _WIDE) + [self.header_offset] * (offset == _WIDE)
        extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        head = (_VERSION, _VERSION, 0, 0, 0, _DATE, self.CRC, size, size)
        fields = (*head, len(name), len(extra), 0, 0, 0, 0, offset)
        return _ENTRY.pack(b"PK\1\2", *fields) + name + extra


class Archive:
    """Writes a checkpoint to `file`, which is empty, and may be read and written anywhere.

    Nothing takes it for a checkpoint before `seal` is done: a crash in here leaves a file that is
    refused.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._position = 0
        self._records: list[Record] = []
        self._body = hashlib.sha256()

    def save(self, state: Mapping[str, Any]) -> None:
        """Writes the records that torch.save would write; tensors stream."""
        save: Any = torch.serialization._save
        save(dict(state), self, _PICKLING, 2, False)
        self.write_record("version", b"3\n", 2)

    def write_record(self, name: str, data: str | bytes | UntypedStorage, size: int) -> None:
        """What torch calls for each record."""
        content = _bytes(data)
        record = Record(PREFIX + name, self._position, size)
        if size > _PART_BYTES:
            self._file.write(record.local())
            record.CRC = self._write_parts(content)
            self._file.seek(self._position)
            header = record.local()
            self._file.write(header)
            self._file.seek(size, 1)
        else:
            record.CRC = crc32(content)
            header = record.local()
            self._file.write(header)
            self._file.write(content)
        self._body.update(header)
        self._position += len(header) + size
        self._records.append(record)

    def _write_parts(self, content: memoryview) -> int:
        value = 0
        for begin in range(0, len(content), _PART_BYTES):
            part = content[begin : begin + _PART_BYTES]
            value = crc32(part, value)
            self._file.write(part)
        return value

    def seal(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the manifest, the directory and the seal. Returns the manifest.

        Raises:
            ValueError: a fact that is not JSON; NaN is none, pass it as a string.
        """
        shards = facts.get("shards")
        version = manifest.FORMAT_VERSION if shards is None else manifest.PARTS_VERSION
        found = {
            "digest": manifest.digest(self._records, shards),
            "body": self._body.hexdigest(),
        }
        text = json.dumps({"format_version": version, **facts, **found}, allow_nan=False).encode()
        record = Record(RECORD, self._position, len(text))
        record.CRC = crc32(text)
        begin = record.local() + text
        directory = b"".join(one.entry() for one in (*self._records, record))
        end = begin + directory + self._end(self._position + len(begin), len(directory))
        end += MAGIC + b"%016x " % self._position
        # The seal comes last, and without it this is no checkpoint.
        self._file.write(end + hashlib.sha256(end).hexdigest().encode())
        written: dict[str, Any] = json.loads(text)
        return written

    def _end(self, offset: int, size: int) -> bytes:
        """The records that say where the directory is, up to the comment, which is the seal."""
        number = len(self._records) + 1
        wide = b""
        if offset >= _LIMIT or number >= _NUMBER_LIMIT:
            fields = (44, _VERSION, _VERSION, 0, 0, number, number, size, offset)
            wide = _END64.pack(b"PK\6\6", *fields)
            wide += _LOCATOR.pack(b"PK\6\7", 0, offset + size, 1)
            number = _WIDE_NUMBER
            offset = _WIDE
        place = (number, number, size, offset, SEAL_BYTES)
        return wide + _END.pack(b"PK\5\6", 0, 0, *place)


class _Pickler(pickle.Pickler):
    """Python's own, for torch's to be made of, which asks of every value whether it is the storage
    of a tensor: in this one only of what may be one. A state has thousands of plain values.
    """

    def __init__(self, file: Any, protocol: int) -> None:
        # Not bound: a pickler that holds itself would hold all that it has pickled, too.
        of_storage: Any = type(self).persistent_id

        def of_value(value: Any) -> Any:
            return of_storage(None, value) if isinstance(value, _STORAGES) else None

        vars(self)["persistent_id"] = of_value  # goes before that of a class
        super().__init__(file, protocol)


_STORAGES = (torch.TypedStorage, UntypedStorage)


_PICKLING = SimpleNamespace(Pickler=_Pickler)  # the module of it, as torch has it


def _bytes(data: str | bytes | UntypedStorage) -> memoryview:
    if isinstance(data, UntypedStorage):
        return memoryview(cast(Any, torch.empty(0, dtype=torch.uint8).set_(data).numpy()))
    return memoryview(data.encode() if isinstance(data, str) else data)
