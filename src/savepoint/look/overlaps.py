"""Which tensors and arrays lie in the same memory, as a view and its base do."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from savepoint.look.marks import own_part
from savepoint.look.places import Path

_MOST_WORK = 1_000  # of NumPy, for one pair


class Extent(NamedTuple):
    start: int
    end: int
    nth: int  # of this look: two extents may be equal
    value: Any
    path: Path


class Extents:
    """Where the values of a look lie."""

    def __init__(self) -> None:
        self._extents: list[Extent] = []

    def add(self, path: Path, value: Any) -> None:
        bounds = _bounds(value)
        if bounds is not None:
            self._extents.append(Extent(*bounds, len(self._extents), value, path))

    def overlapping(self) -> list[tuple[Extent, Extent]]:
        """Pairs of two values, of which a write to one is seen in the other."""
        found = []
        furthest = None
        for extent in sorted(self._extents):
            if furthest is not None and _overlap(furthest, extent):
                found.append((furthest, extent))
            if furthest is None or extent.end > furthest.end:
                furthest = extent
        return found


def _bounds(value: Any) -> tuple[int, int] | None:
    if isinstance(value, np.ndarray):
        return np.lib.array_utils.byte_bounds(value) if value.size else None
    value = own_part(value)
    if value.layout is not torch.strided or value.is_meta or not value.numel():
        return None
    last = sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
    start = value.data_ptr()
    return (start, start + (last + 1) * value.element_size()) if start else None


def _overlap(one: Extent, other: Extent) -> bool:
    if other.start >= one.end or other.value is one.value:
        return False
    if isinstance(one.value, Tensor) or isinstance(other.value, Tensor):
        return True
    try:
        return bool(
            np.shares_memory(one.value, other.value, _MOST_WORK)  # type: ignore[arg-type]
        )
    except np.exceptions.TooHardError:
        return True


def is_written_to(value: Any) -> bool:
    """Whether a write to it may come: of an array, nothing tells."""
    return isinstance(value, np.ndarray) or value.is_inference() or value._version > 0
