"""Where checkpoints are: one directory, and in what order its files come and go. No Lightning.

    step-00000430.ckpt              a checkpoint, if and only if it verifies: a file, or a directory
                                    of shards (see `manifest`)
    last.ckpt, best.ckpt            hard links to two of these (a symlink or a copy where links
                                    fail; of a directory a symlink): made from the manifests, never
                                    read by the store itself
    *.corrupt                       what did not verify, renamed and kept
    .step-00000430.ckpt.tmp-...     being written, by the host and process in the name

Invariants: a file under a final name was complete and on disk before it got that name; nothing is
deleted before what replaces it is; files with other names are never touched.
"""

import contextlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from savepoint import files
from savepoint.checkpoint import manifest, retention
from savepoint.checkpoint.retention import Facts, Mode, Retention
from savepoint.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointForeignError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    CheckpointVersionError,
    RunDirectoryError,
)

LAST = "last.ckpt"
BEST = "best.ckpt"
_ENDS = ("epoch", "round")  # a round of a federated run is an epoch of its server
_UNREADABLE = (CheckpointCorruptError, CheckpointForeignError, CheckpointVersionError, OSError)


@dataclass(frozen=True)
class Checkpoint:
    """A file, or a directory of shards, whose manifest reads."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def epoch(self) -> int:
        return int(self.manifest.get("epoch") or 0)

    @property
    def score(self) -> float | None:
        """By the metric that was monitored when it was saved."""
        return self.score_of(self.manifest.get("monitor"))

    def score_of(self, monitor: str | None) -> float | None:
        """The value of `monitor` if it was measured at this very step and is finite."""
        metric = self.manifest.get("metrics", {}).get(monitor)
        if metric is None and monitor == self.manifest.get("monitor"):
            metric = {"value": self.manifest.get("score"), "step": self.step}
        if metric is None or metric["step"] != self.step:
            return None
        value = metric["value"]
        return value if isinstance(value, int | float) and math.isfinite(value) else None


def write(path: Path | str, state: Mapping[str, Any], facts: Mapping[str, Any]) -> Checkpoint:
    """Write one checkpoint, whole and durable, or leave what was there untouched.

    Raises:
        CheckpointSaveError: with the path, the reason and `errno`; the previous file is intact, no
            temp is left.
        CheckpointContentError: a value that could not be read back.
    """
    # Torch, a second: those who only list do not wait for it.
    from savepoint.checkpoint import format

    files.refuse_url(path, "the file to save")
    path = manifest.local_path(path)
    if in_parts := manifest.has_parts(path):
        facts = {**facts, "shards": {}}  # one process saves the step again: all is in common.ckpt
    with files.replacing(path / manifest.COMMON if in_parts else path) as file:
        written = format.encode(state, facts, file)
    return Checkpoint(path, written)


def load(
    path: Path | str, map_location: Any = "cpu", *, whole: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state, manifest) of a file or directory that was named: every byte is looked at first,
    nothing renamed, nothing else tried.

    Args:
        whole: False: of a checkpoint in parts what all ranks share, with empty tensors for what is
            in its shards; `sharded.pieces` fills them.

    Raises: what `manifest.verify` raises.
    """
    facts = manifest.verify(path)
    return decode(manifest.local_path(path), facts, map_location, whole=whole), facts


def decode(
    path: Path, facts: Mapping[str, Any], map_location: Any = "cpu", *, whole: bool = True
) -> dict[str, Any]:
    """As `load`, of a checkpoint that was looked at already."""
    # Torch, a second: those who only list do not wait for it.
    from savepoint.checkpoint import format

    if not manifest.has_parts(path):
        return format.decode(path, map_location=map_location)
    state = format.decode(path / manifest.COMMON, map_location=map_location)
    if not whole:
        return state
    # Of torch.distributed, another half second: for those alone who need it.
    from savepoint.sharded import pieces

    return pieces.assembled(path, facts, state)


class CheckpointStore:
    """The checkpoints of one directory. One process at a time saves, renames and deletes: the
    holder of the run's lock.

    Args:
        directory: need not exist before the first save.
        retention: what `commit` keeps.
        monitor: the metric that ranks; None takes what the newest checkpoint was saved with.
        mode: whether a smaller or a larger value of `monitor` is better.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        retention: Retention = Retention(),  # noqa: B008 - frozen
        monitor: str | None = None,
        mode: Mode = "min",
    ) -> None:
        self.directory = manifest.local_path(directory)
        self.retention = retention
        self.monitor = monitor
        self.mode: Mode = mode
        self._cache: dict[Any, Checkpoint] = {}

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}.ckpt"

    # -- looking ----------------------------------------------------------------------------------

    def checkpoints(self) -> list[Checkpoint]:
        """By step, those whose manifest reads: structure and seal. The one that is chosen is looked
        at whole.
        """
        return self._scan()[0]

    def rejected(self) -> list[tuple[Path, str]]:
        """Those named as checkpoints whose manifest does not read, with the reason. Nothing is
        renamed.
        """
        return self.listing()[1]

    def listing(self) -> tuple[list[Checkpoint], list[tuple[Path, str]]]:
        """`checkpoints` and `rejected`, of one look at the directory."""
        good, bad = self._scan()
        return good, [(path, _reason(error)) for path, error in bad]

    def latest(self) -> Checkpoint | None:
        return next(reversed(self.checkpoints()), None)

    def best(self, monitor: str | None = None, mode: Mode | None = None) -> Checkpoint | None:
        """The best by `monitor`, from the metrics that each manifest holds; a tie keeps the earlier
        one.
        """
        return self.best_of(self.checkpoints(), monitor, mode)

    def best_of(
        self, listed: Sequence[Checkpoint], monitor: str | None = None, mode: Mode | None = None
    ) -> Checkpoint | None:
        """As `best`, of checkpoints that were listed before."""
        monitor, mode = self._ranking(listed, monitor, mode)
        first = next(iter(retention.ranked(_facts(listed, monitor), mode)), None)
        return next((one for one in listed if first and one.step == first.step), None)

    def _ranking(
        self, listed: Sequence[Checkpoint], monitor: str | None, mode: Mode | None
    ) -> tuple[str | None, Mode]:
        recorded = listed[-1].manifest if listed and not (monitor or self.monitor) else {}
        monitor = monitor or self.monitor or recorded.get("monitor")
        return monitor, mode or recorded.get("mode") or self.mode

    def _scan(self) -> tuple[list[Checkpoint], list[tuple[Path, Exception]]]:
        good: list[Checkpoint] = []
        bad: list[tuple[Path, Exception]] = []
        cache: dict[Any, Checkpoint] = {}
        # Of thousands that are kept, each is read once: in a save's way stands one look at its size
        # and time.
        for entry in manifest.step_entries(self.directory) if self.directory.is_dir() else []:
            try:
                key = _mark(entry)
                known = self._cache.get(key)
                if known is None:
                    path = self.directory / entry.name
                    known = Checkpoint(path, manifest.read(path))
                cache[key] = known
                good.append(known)
            except (CheckpointNotFoundError, FileNotFoundError):
                continue  # deleted since the listing
            except _UNREADABLE as error:
                bad.append((self.directory / entry.name, error))
        self._cache = cache
        return sorted(good, key=lambda one: one.step), bad

    # -- saving -----------------------------------------------------------------------------------

    def preflight(self, least_bytes: int, likely_bytes: int, *, alone: bool = False) -> str:
        """Before the first step: sweep the directory, try it as a save will, look for room for all
        that retention keeps.

        Args:
            least_bytes: what a checkpoint takes in any case.
            likely_bytes: what it probably takes, once the optimizer has its state.
            alone: see `sweep`.

        Returns:
            A warning, where the room may be too small; else "".

        Raises:
            RunDirectoryError: the directory cannot be written, or has less room than is certainly
                needed.
        """
        try:
            self.sweep(alone=alone)
            files.try_out(self.directory)
            disk = os.statvfs(self.directory)
            listed = self.checkpoints()
            superfluous = self._superfluous(listed)
            freed = sum(files.size(one.path) for one in superfluous)
        except OSError as error:
            reason = error.strerror or getattr(error.__cause__, "strerror", None) or error
            raise RunDirectoryError(
                f"Checkpoints cannot be saved: {self.directory} ({reason}). Expected a directory "
                "in which files can be written, synced, renamed and linked. Mend it, or give "
                "another one: --output_dir DIR"
            ) from error
        # A save on a full disk deletes what retention lets go.
        free = disk.f_bavail * disk.f_frsize + freed
        # While one is written, those that retention keeps are all there. What is there already
        # takes no more room.
        there = len(listed) - len(superfluous)
        number = max(1, self.retention.at_most(self.monitor is not None) + 1 - there)
        # No blocks: a file system that does not say.
        if not disk.f_blocks or free >= number * likely_bytes:
            return ""
        if free < number * least_bytes:
            few = self._too_little("Too little", free, number, least_bytes, "at least")
            raise RunDirectoryError(few)
        return self._too_little("Perhaps too little", free, number, likely_bytes, "about")

    def _too_little(self, room: str, free: int, number: int, size: int, about: str) -> str:
        return (
            f"{room} room for checkpoints: {self.directory} has {free / 1e6:.1f} MB free. Expected "
            f"{number * size / 1e6:.1f} MB: {number} more of {about} {size / 1e6:.1f} MB, the one "
            "being written included. Free some space, keep fewer, or give another --output_dir."
        )

    def save(
        self,
        state: Mapping[str, Any],
        *,
        step: int,
        epoch: int = 0,
        metrics: Mapping[str, float] | None = None,
    ) -> Checkpoint:
        """Saves the state of a loop of one's own, then deletes what retention lets go.

        Args:
            state: Tensors and plain values, such as a model's `state_dict()` and an optimizer's.
            step: Names the file.
            metrics: What was measured at this step; the store's `monitor` is looked up in it.

        Raises: what `write` raises.
        """
        measured = {
            name: {"value": float(value), "step": step} for name, value in (metrics or {}).items()
        }
        score = measured.get(self.monitor or "", {}).get("value")
        ranked = {"monitor": self.monitor, "mode": self.mode, "score": score, "metrics": measured}
        facts = {
            "step": step,
            "epoch": epoch,
            "at": None,
            "exact": False,
            "reason": "user",
            "ended": None,
        }
        created = datetime.now(UTC).isoformat(timespec="milliseconds")
        return self.add(state, facts | ranked | {"created": created})

    def add(self, state: Mapping[str, Any], facts: Mapping[str, Any]) -> Checkpoint:
        """`write` under the name of its step, then `commit`."""
        checkpoint = self.write(state, facts)
        self.commit()
        return checkpoint

    def write(self, state: Mapping[str, Any], facts: Mapping[str, Any]) -> Checkpoint:
        """Write under the name of its step; on a full disk once more, without what this save makes
        superfluous.
        """
        path = self.path(facts["step"])
        try:
            return write(path, state, facts)
        except CheckpointSaveError as error:
            if error.errno not in files.FULL or not self.make_room(facts):
                raise
        return write(path, state, facts)

    def make_room(self, facts: Mapping[str, Any]) -> list[Path]:
        """Deletes what a save of these facts makes superfluous; returns what went."""
        upcoming = Checkpoint(self.path(facts["step"]), dict(facts))
        return self._delete(self._superfluous(self.checkpoints(), upcoming))

    def commit(self) -> list[Path]:
        """After a write: point `last` and `best`, and only then delete what retention lets go.
        Returns what went.
        """
        listed = self.checkpoints()
        self._point(listed)
        # A crash before or between the deletions costs disk space until the next commit.
        return self._delete(self._superfluous(listed))

    def reasons(self) -> dict[int, list[str]]:
        """Why retention keeps each checkpoint, by step; one without a reason is pruned next."""
        listed = self.checkpoints()
        monitor, mode = self._ranking(listed, None, None)
        return retention.reasons(_facts(listed, monitor), self.retention, mode)

    def _superfluous(
        self, listed: Sequence[Checkpoint], upcoming: Checkpoint | None = None
    ) -> list[Checkpoint]:
        """What retention lets go, counting `upcoming` as there; never the newest nor the best of
        those that are.
        """
        everything = sorted([*listed, *([upcoming] if upcoming else [])], key=lambda one: one.step)
        monitor, mode = self._ranking(everything, None, None)
        kept = set(retention.reasons(_facts(everything, monitor), self.retention, mode))
        kept |= {one.step for one in (*listed[-1:], self.best_of(listed, monitor, mode)) if one}
        return [one for one in listed if one.step not in kept]

    def _delete(self, checkpoints: Sequence[Checkpoint]) -> list[Path]:
        for one in checkpoints:
            with files.saving(one.path):
                files.remove(one.path)
        return [one.path for one in checkpoints]

    def _point(self, listed: Sequence[Checkpoint]) -> None:
        for name, target in ((LAST, listed[-1] if listed else None), (BEST, self.best_of(listed))):
            if target:
                with files.saving(self.directory / name):
                    files.point(self.directory / name, target.path, _is_copy)

    # -- starting again ---------------------------------------------------------------------------

    def load_latest(
        self, *, lock_holder: bool, whole: bool = True
    ) -> tuple[Checkpoint, dict[str, Any], list[str]]:
        """The newest checkpoint that verifies, its state, and a line for each newer one that does
        not.

        Args:
            lock_holder: may rename those to *.corrupt. Only the process that holds the run's lock
                may.
            whole: See `load`.

        Raises:
            CheckpointNotFoundError: none verifies.
            CheckpointVersionError: the newest was written by a newer Savepoint: nothing is wrong
                with it, so going on from an older one would only lose its steps.
        """
        for _ in range(20):
            try:
                chosen, said = self._choose(lock_holder)
                state = decode(chosen.path, chosen.manifest, whole=whole) if chosen else {}
            # A run that trains has deleted what was just chosen: there is a newer one.
            except CheckpointNotFoundError:
                continue
            if chosen is None:
                found = (
                    f"{len(said)} found: {'; '.join(text for text, _ in said)}"
                    if said
                    else "none found"
                )
                raise CheckpointNotFoundError(
                    f"No checkpoint that verifies: {self.directory} ({found}). A damaged file is "
                    "never loaded. Start the run again, or name a checkpoint elsewhere.",
                    self.directory,
                )
            cost = [(text, step - chosen.step) for text, step in said]
            lines = [
                f"{text}. Going on from step {chosen.step} costs {steps} steps."
                for text, steps in cost
            ]
            return chosen, state, lines
        raise CheckpointNotFoundError(
            f"Each checkpoint that was chosen was deleted before it was read: {self.directory}. "
            "The run that trains there prunes them. Let it keep more (checkpoint.keep_last), or "
            "wait until it has ended.",
            self.directory,
        )

    def _choose(self, lock_holder: bool) -> tuple[Checkpoint | None, list[tuple[str, int]]]:
        """The newest that verifies, and (what to say, step) of each newer one that does not."""
        chosen, failed = self._first_whole()
        renamed = self._set_aside_corrupt(failed) if lock_holder else {}
        # Perhaps there is a copy of what is damaged, which the holder of the lock has given its
        # name by now.
        if failed:
            chosen = self._or_a_copy(self._first_whole()[0] if renamed else chosen)
        return chosen, [
            (f"{path.name} does not verify: {_reason(error)}{renamed.get(path, '')}", step)
            for path, step, error in failed
        ]

    def newest_whole(self) -> Checkpoint | None:
        """What a resume would go on from, after a look at every byte; nothing is renamed."""
        chosen, failed = self._first_whole()
        return self._or_a_copy(chosen) if failed else chosen

    def _or_a_copy(self, chosen: Checkpoint | None) -> Checkpoint | None:
        """`chosen`, or what `last` or `best` shows: whole files of their own where links fail, or
        in a copied run.
        """
        for pointer in (self.directory / LAST, self.directory / BEST):
            with contextlib.suppress(*_UNREADABLE):
                copy = Checkpoint(pointer, manifest.verify(pointer))
                chosen = copy if chosen is None or copy.step > chosen.step else chosen
        return chosen

    def _first_whole(self) -> tuple[Checkpoint | None, list[tuple[Path, int, Exception]]]:
        """The newest that verifies, and (path, step, error) of those newer ones that do not."""
        good, bad = self._scan()
        steps = {one.path: one.step for one in good} | {
            path: manifest.step_in_name(path.name) or 0 for path, _ in bad
        }
        failed: list[tuple[Path, int, Exception]] = []
        for path, step in sorted(steps.items(), key=lambda item: item[1], reverse=True):
            try:
                return Checkpoint(path, manifest.verify(path)), failed
            except (CheckpointVersionError, CheckpointNotFoundError):
                raise
            except _UNREADABLE as error:
                failed.append((path, step, error))
        return None, failed

    def _set_aside_corrupt(self, failed: Sequence[tuple[Path, int, Exception]]) -> dict[Path, str]:
        """Rename damaged files, and only those: a foreign one is someone's, an unreadable one may
        be whole.
        """
        corrupt = [path for path, _, error in failed if isinstance(error, CheckpointCorruptError)]
        moved = {path: files.move(path, path.with_name(path.name + ".corrupt")) for path in corrupt}
        self._adopt_copies()
        self._repoint(moved.values())
        return {path: f", renamed to {target.name}" for path, target in moved.items()}

    def _adopt_copies(self) -> None:
        """Where `last` or `best` is a whole file of its own (links fail, or a copied run): give it
        its step's name.

        Only if that name is free. A crash after it costs a pointer until the next commit.
        """
        for pointer in (self.directory / LAST, self.directory / BEST):
            try:
                target = self.path(manifest.read(pointer)["step"])
                # Asked first: a look at every byte of a gigabyte takes a third of a second.
                if target.exists():
                    continue
                manifest.verify(pointer)
            except _UNREADABLE:
                continue
            files.move(pointer, target)

    def set_aside_after(self, step: int, into: Path) -> list[Path]:
        """Move the checkpoints after `step` into the directory `into`. Returns their new paths."""
        with files.saving(into):
            files.make_directory(into)
        # A crash between two moves leaves the rest in place: newest first, so that what stays is a
        # run up to some step.
        later = [one for one in reversed(self.checkpoints()) if one.step > step]
        moved = [files.move(one.path, into / one.path.name) for one in later]
        self._repoint(moved)
        return moved

    def _repoint(self, moved: Iterable[Path]) -> None:
        """Point `last` and `best` to what is left; where nothing is, take away those that show a
        moved file.
        """
        if not (moved := list(moved)):
            return
        self._point(self.checkpoints())
        for pointer in (self.directory / LAST, self.directory / BEST):
            if (pointer.is_symlink() and not pointer.exists()) or any(
                pointer.exists() and pointer.samefile(path) for path in moved
            ):
                with files.saving(pointer):
                    pointer.unlink(missing_ok=True)

    def mend(self) -> None:
        """After a kill between a write and its commit: no temps, and `last` and `best` show what
        they should.

        For the holder of the run's lock.
        """
        self.sweep(alone=True)
        self._point(self.checkpoints())

    def sweep(self, *, alone: bool = False) -> list[Path]:
        """Delete what dead processes were writing when they died. At a start.

        Args:
            alone: the run's lock keeps all others out. Without one, what another host wrote within
                the hour stays.
        """
        swept = []
        for path in sorted(self.directory.iterdir()) if self.directory.is_dir() else []:
            if files.is_stale_temp(path, alone=alone):
                swept.append(path)
            elif alone and manifest.STEP_NAME.fullmatch(path.name):
                swept += _superfluous_in(path)
        for path in swept:
            with files.saving(path):
                files.delete(path)
        return swept


def _superfluous_in(path: Path) -> list[Path]:
    with contextlib.suppress(*_UNREADABLE):
        return manifest.superfluous_in(path) if path.is_dir() else []
    return []  # what does not verify is not ours to judge


def _mark(entry: "os.DirEntry[str]") -> tuple[Any, ...]:
    """What is equal only for an entry that is as it was: a directory with all files in it."""
    if not entry.is_dir():
        found = [(entry.name, entry.stat())]
    else:
        with os.scandir(entry.path) as inside:
            found = sorted((one.name, one.stat()) for one in inside)
    marks = [(name, one.st_size, one.st_mtime_ns, one.st_ino) for name, one in found]
    return entry.name, *marks


def _facts(listed: Iterable[Checkpoint], monitor: str | None) -> list[Facts]:
    return [
        Facts(one.step, one.epoch, one.score_of(monitor), one.manifest.get("at") in _ENDS)
        for one in listed
    ]


def _reason(error: Exception) -> str:
    if isinstance(error, CheckpointCorruptError | CheckpointForeignError):
        return error.reason
    return (
        f"cannot be read: {error.strerror}"
        if isinstance(error, OSError) and error.strerror
        else str(error)
    )


def _is_copy(pointer: Path, target: Path) -> bool:
    try:
        return manifest.read(pointer) == manifest.read(target)
    except (CheckpointError, OSError):
        return False
