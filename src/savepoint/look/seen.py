"""What a look has seen: at each place a value that a checkpoint can hold, or words for it."""

import contextlib
import contextvars
import enum
import io
from typing import Any

import numpy as np
from torch import Tensor

from savepoint.look.classes import is_library
from savepoint.look.kinds import SCALARS, Unpackable, keys_of, values_of
from savepoint.look.marks import mark
from savepoint.look.overlaps import Extents, is_written_to
from savepoint.look.pack import MOST_BYTES, Packed, Packer, pack
from savepoint.look.places import Path, Place, memory_of, storage_of

_SMALL_VALUES = 1_000  # of what the first look keeps a copy
_SMALL_BYTES = 64 * 1024
_IN_MEMORY = (Tensor, np.ndarray)
_FEW = 16  # items of a tuple that are looked at one by one
_TRUE, _FALSE = (Place(("bool", value), value, small=True) for value in (True, False))


class Seen:
    """The places of a look, and what holds a value that was seen before.

    Attributes:
        first: The path to each object, by its address: the first one names it.
        weights: By the memory of each weight that Lightning restores, its path: an attribute may be
            a view.
        alive: What was seen, so that no address is given to a second object while marks hold it.
    """

    def __init__(self, most_bytes: float = MOST_BYTES) -> None:
        self.most_bytes = most_bytes
        self.places: dict[Path, Place] = {}
        self.first: dict[int, Path] = {}
        self.weights: dict[int, Path] = {}
        self.alive: list[Any] = []
        self._memory: dict[int, Path] = {}
        self._extents = Extents()
        self._packed: Packed = {}
        self._holders: dict[int, Path] = {}  # by the address of what is packed, who held it first
        self._stacked: set[int] = set()

    def put(self, path: Path, value: Any) -> None:
        """A value that `is_settled`."""
        if value is True or value is False:
            self.places[path] = _TRUE if value else _FALSE
            return
        packed = value if value is None or type(value) is str else pack(value)
        self.places[path] = Place(mark(packed), packed, small=True)

    def put_packed(self, path: Path, value: Any) -> None:
        """A tensor, an array, a generator: one value, though a large one."""
        packer = Packer(self._packed, self.most_bytes)
        try:
            packed = packer.pack(value)
        except Unpackable as error:
            self.put_opaque(path, value, _words(error.args[0]))
            return
        self._hold(path, value, packer, packed)
        self._share(path, self._shares(path, value))

    def put_container(self, path: Path, value: Any) -> Unpackable | None:
        """A container of plain values.

        Returns:
            Why it is none: what stands in it is no plain value, or there is too much of it.
        """
        packer = Packer(self._packed, self.most_bytes)
        try:
            packed = packer.pack(value)
        except Unpackable as error:
            return error
        self._hold(path, value, packer, packed)
        if isinstance(value, dict) and any(key in self.first for key in _first_number(value)):
            self.places[path].what = "a dict that goes by the addresses of objects"
        return None

    def put_opaque(self, path: Path, value: Any, what: str, always: bool = False) -> None:
        """What is itself, or another one than at the start.

        Args:
            always: Whether it may have changed at any time, unseen.
        """
        self.places[path] = Place(object() if always else id(value), what=what)

    def put_size(self, path: Path, value: Any, what: str) -> None:
        """Too much to compare: its length and a sample of its values."""
        items = list(value)
        if isinstance(value, dict):
            items = list(zip(keys_of(value), values_of(value), strict=True))
        sample = items[:: max(1, len(items) // 500)]
        try:
            seen = mark(Packer().pack(sample))
        except Unpackable:
            seen = id(value)
        self.places[path] = Place((len(items), seen), what=what)

    def put_members(self, path: Path, value: Any, what: str) -> None:
        """A set of objects: which they are, and what stands in those that are seen nowhere else."""
        members = list(value)
        self.alive += members
        self.places[path] = Place(frozenset(map(self._member_mark, members)), what=what)

    def _member_mark(self, member: Any) -> Any:
        notes = {} if id(member) in self.first else getattr(member, "__dict__", {})
        with contextlib.suppress(Unpackable):
            return id(member), mark(Packer().pack(dict(notes)))
        return id(member)

    def put_pointer(self, path: Path, value: Any) -> None:
        """What it leads to, which it does not hold."""
        if isinstance(value, contextvars.ContextVar):
            target = value.get(None)
            what = "a context variable"
        else:
            target = value()
            what = "a weak reference"
        seen = id(target)
        with contextlib.suppress(Unpackable):
            if isinstance(target, SCALARS):
                seen = mark(pack(target))
        self.places[path] = Place((what, seen), what=what)

    def _hold(self, path: Path, value: Any, packer: Packer, packed: Any) -> None:
        self.places[path] = Place(
            mark(packed),
            packed,
            small=packer.values <= _SMALL_VALUES and packer.bytes <= _SMALL_BYTES,
            needs_live=packer.needs_live,
        )
        self._stacked |= packer.stacked
        for one in (value, *packer.inner):
            holder = self._holders.setdefault(id(one), path)
            if holder is not path:
                self._join(path, holder, one)
            elif isinstance(one, _IN_MEMORY):
                self._extents.add(path, one)
                if one is not value and storage_of(one) in self.weights:
                    self._share(path, self.weights[storage_of(one) or 0])

    def _join(self, path: Path, holder: Path, value: Any) -> None:
        """What two places hold is one again if both are in the file."""
        if id(value) in self._stacked or self.places[holder].what:
            self._share(path, holder)
            return
        for at, partner in ((path, holder), (holder, path)):
            memory = self.places[at].memory
            self.places[at].memory = memory._replace(one_with=memory.one_with | {partner})

    def _share(self, path: Path, shares: Path | None) -> None:
        if shares is not None:
            self.places[path].memory = self.places[path].memory._replace(shares=shares)

    def see_overlaps(self) -> None:
        """Put back, a view and its base are two."""
        for one, other in self._extents.overlapping():
            written_to = is_written_to(one.value) or is_written_to(other.value)
            for at, partner in ((one.path, other.path), (other.path, one.path)):
                memory = self.places[at].memory
                overlaps = memory.overlaps | {(partner, written_to)}
                self.places[at].memory = memory._replace(overlaps=overlaps)

    def _shares(self, path: Path, value: Any) -> Path | None:
        memory = memory_of(value)
        if memory is None:
            return None
        first = self._memory.setdefault(memory, path)
        return None if first == path else first


def is_settled(value: Any) -> bool:
    """Whether a value cannot change in place, nor hold one that can."""
    kind = type(value)
    if kind is tuple:
        return len(value) <= _FEW and all(type(item) in SCALARS for item in value)
    return kind in SCALARS or isinstance(value, enum.Enum)


def is_hidden_iterator(value: Any) -> bool:
    """One whose place is no attribute, as that of an object of the user's own may be."""
    kind = type(value)
    if not hasattr(kind, "__next__"):
        return False
    return any(is_library(base.__module__) for base in kind.__mro__ if hasattr(base, "__next__"))


def _first_number(value: dict[Any, Any]) -> list[int]:
    return [key for key in keys_of(value)[:1] if type(key) is int]


def _words(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, io.IOBase):
        return "a file handle"
    kind = type(value)
    return (
        f"a {kind.__name__}"
        if kind.__module__ == "builtins"
        else f"a {kind.__module__}.{kind.__name__}"
    )
