"""The checkpoints that a mirror holds. Read from the ends of the objects: none is downloaded.

One in parts is there if and only if its common.ckpt is: that is uploaded last and deleted first.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from savepoint import files
from savepoint.checkpoint import manifest, retention
from savepoint.checkpoint.claims import SHARD_NAME
from savepoint.checkpoint.retention import Facts, Mode
from savepoint.checkpoint.store import Checkpoint
from savepoint.errors import CheckpointCorruptError
from savepoint.mirror.remote import Ranged, Remote

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Held(Checkpoint):
    """One whose seal holds; `path` is its name alone.

    Attributes:
        parts: Bytes by key, in the order of an upload; of one file that alone.
    """

    run: str = ""
    parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Listing:
    """By step, and the reason for each that is named as a checkpoint and is none."""

    checkpoints: list[Held]
    rejected: dict[str, str]

    def facts(self) -> list[Facts]:
        """For retention; ranked by what the newest was saved with."""
        monitor = self.checkpoints[-1].manifest.get("monitor") if self.checkpoints else None
        return [
            Facts(one.step, one.epoch, one.score_of(monitor), one.manifest.get("at") == "epoch")
            for one in self.checkpoints
        ]

    def mode(self) -> Mode:
        recorded = self.checkpoints[-1].manifest.get("mode") if self.checkpoints else None
        return recorded or "min"

    def best(self) -> Held | None:
        first = next(iter(retention.ranked(self.facts(), self.mode())), None)
        return next((one for one in self.checkpoints if first and one.step == first.step), None)


def key(run: str, name: str) -> str:
    return f"{run}/{CHECKPOINTS}/{name}"


def read(remote: Remote, run: str, name: str, size: int | None) -> Held | None:
    """One checkpoint; None where there is none of this name.

    Args:
        size: Of a directory None.

    Raises:
        CheckpointCorruptError: There is one, and it is damaged.
        FileNotFoundError: It was deleted since the listing.
    """
    place = key(run, name)
    if size is not None:
        facts = sealed(Ranged(remote, place, size), remote.named(place))
        return Held(Path(name), facts, run, {place: size})
    inside = remote.names(place)
    common = inside.get(manifest.COMMON)
    if common is None:
        return None
    last = f"{place}/{manifest.COMMON}"
    facts = sealed(Ranged(remote, last, common), remote.named(last))
    if wrong := manifest.wrong_shards(facts, inside.get):
        raise manifest.corrupt(Path(remote.named(place)), wrong)
    shards = {f"{place}/{shard}": known["bytes"] for shard, known in facts["shards"].items()}
    return Held(Path(name), facts, run, {**shards, last: common})


def sealed(file: Ranged, name: str) -> dict[str, Any]:
    return manifest.read_sealed(cast(BinaryIO, file), name)


def listed(remote: Remote, run: str) -> Listing:
    good = []
    bad = {}
    for name, size in remote.names(f"{run}/{CHECKPOINTS}").items():
        if not manifest.STEP_NAME.fullmatch(name):
            continue
        try:
            found = read(remote, run, name, size)
        except CheckpointCorruptError as error:
            bad[name] = error.reason
        except FileNotFoundError:
            continue  # deleted since the listing
        else:
            good += [found] if found else []
    return Listing(sorted(good, key=lambda one: one.step), bad)


def download(remote: Remote, one: Held, path: Path) -> None:
    """Makes `path` of a checkpoint: under another name until every byte was looked at.

    Raises:
        CheckpointCorruptError: It does not verify.
    """
    if "shards" not in one.manifest:
        with files.arriving(path) as temp:
            for place, size in one.parts.items():
                remote.download(place, size, temp)
            manifest.verify(temp)
        return
    with files.filling(path) as temp:
        for place, size in one.parts.items():
            part = temp / place.rpartition("/")[2]
            part.touch()
            remote.download(place, size, part)
            with part.open("rb") as file:
                os.fsync(file.fileno())
        manifest.verify(temp)
        if path.is_dir():  # one that does not verify, or this would not be asked for
            files.remove(path)


def delete(remote: Remote, one: Held) -> None:
    # A crash in here leaves shards that nothing names, for the next sweep.
    for place in reversed(list(one.parts)):
        remote.delete(place)
    sweep(remote, one.run, one.path.name)


def sweep(remote: Remote, run: str, name: str) -> None:
    """Of a checkpoint in parts, deletes the shards that no common.ckpt names: of uploads that were
    cut off, and of earlier saves of the step. For the holder of the lease.
    """
    place = key(run, name)
    inside = remote.names(place)
    try:
        one = read(remote, run, name, None)
    except CheckpointCorruptError:
        return  # what does not verify is not ours to judge
    named = one.parts if one else {}
    for part in inside:
        if SHARD_NAME.fullmatch(part) and f"{place}/{part}" not in named:
            remote.delete(f"{place}/{part}")
    if one is None:
        remote.delete_folder(place)
