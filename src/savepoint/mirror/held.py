"""The checkpoints that a mirror holds. Read from the ends of the objects: none is downloaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from savepoint.checkpoint import manifest, retention
from savepoint.checkpoint.retention import Facts, Mode
from savepoint.checkpoint.store import Checkpoint
from savepoint.errors import CheckpointCorruptError
from savepoint.mirror.remote import Ranged, Remote

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Held(Checkpoint):
    """One whose seal holds; `path` is its name alone."""

    run: str = ""
    size: int = 0

    @property
    def key(self) -> str:
        return key(self.run, self.path.name)


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


def read(remote: Remote, run: str, name: str, size: int) -> Held:
    """Raises CheckpointCorruptError; FileNotFoundError where it was deleted since the listing."""
    place = key(run, name)
    facts = sealed(Ranged(remote, place, size), remote.named(place))
    return Held(Path(name), facts, run, size)


def sealed(file: Ranged, name: str) -> dict[str, Any]:
    return manifest.read_sealed(cast(BinaryIO, file), name)


def listed(remote: Remote, run: str) -> Listing:
    good = []
    bad = {}
    for name, size in remote.names(f"{run}/{CHECKPOINTS}").items():
        if size is None or not manifest.STEP_NAME.fullmatch(name):
            continue
        try:
            good.append(read(remote, run, name, size))
        except CheckpointCorruptError as error:
            bad[name] = error.reason
        except FileNotFoundError:
            continue  # deleted since the listing
    return Listing(sorted(good, key=lambda one: one.step), bad)
