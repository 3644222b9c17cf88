"""How everything looked at the start, what has changed since, and how that is put back."""

import copy
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from savepoint.look.classes import is_library
from savepoint.look.kinds import Unpackable
from savepoint.look.marks import mark, sample_sum
from savepoint.look.places import (
    Memory,
    Path,
    Place,
    in_words,
    packed_path,
    path_of,
    put_back,
    resolve,
)
from savepoint.look.unpack import each_once
from savepoint.look.walk import Look

_MOST_SUMS = 100  # places, in a file


class Baseline:
    """How everything looked before the first step of this process, and what has changed since.

    Only what a fresh start of the same code would not come to by itself is saved.
    """

    def __init__(self, first: Look) -> None:
        self.places: dict[Path, Place] = {}
        self.objects: dict[Path, type] = {}
        self._made: dict[Path, int] = {}  # what hooks of a start make, to be put something into
        self._memory: dict[Path, Memory] = {}  # where the first batch begins
        self._roots: set[str] = set()
        self._owners: set[Path] = set(first.owners)
        self._absent: set[Path] = set(first.absent)
        self._alive: list[Any] = []
        self.meet(first)

    def begin(self, look: Look) -> None:
        """After the hooks that set up: what they have made is as it was at the start.

        What they have changed counts as changed, if it is small: a resume may set up other values
        (a finder, say). So do copies of the weights: a resume makes them of the weights that it has
        loaded.
        """
        weights = look.weight_marks()
        for path, place in look.places.items():
            before = self.places.get(path)
            if before is None or not (before.small and place.small):
                self.places[path] = _without_large(place)
            if before is None and any(mark(tensor) in weights for tensor in _tensors(place.packed)):
                self.places[path].mark = object()
        for path in [path for path in self.places if path not in look.places]:
            del self.places[path]
        self.objects = dict(look.objects)
        self._roots = set(look.roots)
        self._owners |= look.owners
        self._absent |= look.absent
        self._alive += look.alive

    def meet(self, look: Look) -> None:
        """Roots that were not there before, such as a loader that has just been made, are as they
        were at the start.
        """
        new = set(look.roots) - self._roots
        if not new:
            return
        self._roots |= new
        for path, place in look.places.items():
            if path[0][1] in new or path[0][0] != "root":
                self.places.setdefault(path, _without_large(place))
        self.objects |= {path: kind for path, kind in look.objects.items() if path[0][1] in new}
        self._alive += look.alive

    def accept(self, look: Look) -> None:
        """Objects that the hooks before the first batch have made: a resumed process makes them
        too.
        """
        self.objects |= look.objects
        self._owners |= look.owners
        self._absent |= look.absent
        self._alive += look.alive
        for path, place in look.places.items():
            self._memory[path] = place.memory
            if place.what and path not in self.places:
                self.places[path] = _without_large(place)
            elif place.needs_live:
                self._made[path] = place.needs_live

    def changes(self, look: Look) -> tuple[list[Any], list[str]]:
        """What has changed: [packed path, packed value] of each place, and words for what is no
        value.
        """
        packed: dict[Path, Any] = {}
        named: list[str] = []
        for path, place in look.places.items():
            before = self.places.get(path)
            if before is place or (before is not None and before.mark == place.mark):
                continue
            if not place.what:
                packed[path] = place.packed
                named += self._cannot_be_put_back(path, place, before)
            elif before is not None or self._is_new(path):
                named.append(f"{in_words(path)} ({place.what})")
        waiting = list(packed)
        while waiting:
            path = waiting.pop()
            # What is or was one with it: both are put back, or none.
            one_with = look.places[path].memory.one_with | self._memory_at(path).one_with
            for other in one_with & look.places.keys() - packed.keys():
                if not look.places[other].what:
                    packed[other] = look.places[other].packed
                    waiting.append(other)
        saved = [[packed_path(path), value] for path, value in packed.items()]
        # As a set, which takes over the hashes of the paths: there are hundreds.
        for path in sorted(set(self.places).difference(look.places), key=in_words):
            gone = path[-1][0] == "attr" and path not in look.visited and path[:-1] in look.objects
            # Of a dict with objects in it, which is put back key by key.
            gone |= path[-1][0] == "item" and path not in look.visited and path[:-1] in look.dicts
            if gone:
                saved.append([packed_path(path), {"!": "gone"}])
        for path, kind in look.objects.items():
            if self.objects.get(path) is not kind and path[-1][0] != "root":
                named.append(f"{in_words(path)} (a new {kind.__name__})")
        return saved, named

    def _cannot_be_put_back(self, path: Path, place: Place, before: Place | None) -> list[str]:
        """Words for what a changed value is beside its numbers."""
        named = []
        there = before.needs_live if before else self._made.get(path, 0)
        if place.needs_live != there:
            named.append(f"{in_words(path)} (a generator or the like, made in mid-training)")
        now = place.memory
        then = self._memory_at(path)
        met = {partner for partner, _ in then.overlaps}
        views = [at for at, written_to in now.overlaps if written_to and at not in met]
        if now.shares and now.shares != then.shares:
            named.append(f"{in_words(path)} (shares its memory with {in_words(now.shares)})")
        elif then.shares and not now.shares:
            # What is put back is written into the memory of both.
            named.append(f"{in_words(path)} (shared its memory with {in_words(then.shares)})")
        elif views:
            named.append(f"{in_words(path)} (holds a view of {min(map(in_words, views))})")
        return named

    def _memory_at(self, path: Path) -> Memory:
        """Where the first batch begins, or as it was at the start."""
        before = self.places.get(path)
        return self._memory.get(path, before.memory if before else Memory())

    def _is_new(self, path: Path) -> bool:
        """Whether it was not there before: of a class or function that was not met, all is new."""
        if path[0][0] == "root":
            return path[-1][0] != "hooks"
        return path[:-1] in self._owners or path in self._absent

    def restore(
        self,
        look: Look,
        saved: Iterable[Any],
        device: torch.device,
        loaded: Iterable[str] = (),
        alone: bool = False,
    ) -> list[str]:
        """Puts every place where it was when `saved` was made; returns words for what has no place
        here.

        Args:
            look: At the objects as they are now: what the hooks of this start have changed is taken
                back too.
            loaded: Roots that have loaded a state of their own since the first look: what that
                changed stays.
            alone: Put back what was saved, and nothing else.
        """
        loaded = set(loaded)
        meant = {path_of(packed): value for packed, value in saved}
        for path, place in look.places.items() if not alone else ():
            before = self.places.get(path)
            if path in meant or before is None or before.mark == place.mark or place.what:
                continue
            if before.small and path[0][1] not in loaded:
                meant[path] = before.packed
        # What was the same object as at another place, and no more is, is not written into that
        # one.
        aliases = {path for path in meant if path in self.places and self.places[path].is_alias}
        return _put_all_back(look, meant, device, aliases)


def _put_all_back(
    look: Look, meant: Mapping[Path, Any], device: torch.device, aliases: Collection[Path] = ()
) -> list[str]:
    """Returns words for the places that are no more, or hold another kind of value now."""
    failed = []
    with each_once():
        for path, packed in meant.items():
            try:
                put_back(look.roots, path, packed, device, look.weights, path not in aliases)
            except (LookupError, AttributeError, TypeError, ValueError, RuntimeError, Unpackable):
                failed.append(in_words(path))
    return failed


def changed_since(marks: Mapping[Path, Any], look: Look) -> list[str]:
    """Words for what is another one than when `marks` were taken: the running epoch goes by what
    they were.
    """
    now = {path: look.places[path].mark for path in marks if path in look.places}
    changed = [path for path, mark in marks.items() if now.get(path) != mark]
    return [f"{in_words(path)} (changed while the epoch goes by what it was)" for path in changed]


def put_back_into_model(module: nn.Module, saved: Iterable[Any], device: torch.device) -> list[str]:
    """Of what a training has changed, that of the model: for a model that is used and not trained
    on.

    What belongs to an object that only a training makes, such as a teacher of `on_fit_start`, is
    left out.

    Returns:
        Words for what is of another kind in this model.
    """
    look = Look({"model": module}, {}, module.state_dict().keys())
    meant = {}
    for place, value in saved:
        path = path_of(place)
        of_training = path[-1] == ("attr", "training") or path[-1][0] == "requires_grad"
        if path[0] == ("root", "model") and not of_training and _can_be_had(look, path[:-1]):
            same_as = isinstance(value, dict) and value["!"] == "same" and path_of(value["of"])
            if not same_as or _can_be_had(look, same_as):
                meant[path] = value
    return _put_all_back(look, meant, device)


def _can_be_had(look: Look, path: Path) -> bool:
    try:
        resolve(look.roots, path)
    except (LookupError, AttributeError, TypeError):
        return False
    return True


def _without_large(place: Place) -> Place:
    if place.small and next(_tensors(place.packed), None) is None:
        return place
    if place.small:
        return dataclasses.replace(place, packed=copy.deepcopy(place.packed))
    return dataclasses.replace(place, packed=None)


def _tensors(packed: Any) -> Iterator[Tensor]:
    if isinstance(packed, Tensor):
        yield packed
    elif isinstance(packed, list | dict):
        for item in packed.values() if isinstance(packed, dict) else packed:
            yield from _tensors(item)


def sums_of_numbers(look: Look) -> dict[str, int]:
    """A sum of the numbers at each place of the model and of the data that no state_dict holds, in
    words: a start that draws them anew gives another one.

    Generators are left out, as a loader derives them.
    """
    sums: dict[str, int] = {}
    for path, place in look.places.items():
        kind, root = path[0]
        of_data = root in ("model", "data") or str(root).endswith(".dataset")
        if kind != "root" or not of_data or place.what or place.is_alias:
            continue
        owner = look.objects.get(path[:-1])
        # Such as the kernel size of a convolution. A library's data set holds numbers of the user's.
        is_layer = owner is not None and issubclass(owner, nn.Module)
        if is_layer and is_library(owner.__module__) and next(_tensors(place.packed), None) is None:
            continue
        total = 0
        for numbers in _numbers(place.packed):
            total = sample_sum(numbers, total)
        if total and len(sums) < _MOST_SUMS:
            sums[in_words(path)] = total
    return sums


def _numbers(packed: Any) -> Iterator[Tensor]:
    """Tensors, and lists of numbers as such."""
    if isinstance(packed, Tensor):
        yield packed
    elif isinstance(packed, list) and packed and {*map(type, packed)} <= {int, float}:
        yield torch.tensor(packed, dtype=torch.float64)
    elif isinstance(packed, list) or (isinstance(packed, dict) and packed["!"] != "generator"):
        for item in packed if isinstance(packed, list) else packed.values():
            yield from _numbers(item)
