"""Uploads a run to its mirror, in one thread, while it trains.

A save hands over a path and waits for nothing. The newest committed checkpoint goes next; those
between two uploads are left out. The records go before it, so that no row that it counts is
missing. What the server refuses is said once, and tried again until the run ends.
"""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from savepoint import files
from savepoint.checkpoint import manifest, retention
from savepoint.checkpoint.store import Checkpoint, CheckpointStore
from savepoint.errors import (
    CheckpointCorruptError,
    ConfigMismatchError,
    MirrorError,
    RunExistsError,
    RunLockedError,
)
from savepoint.mirror import held
from savepoint.mirror.held import Held
from savepoint.mirror.lease import Lease
from savepoint.mirror.remote import Remote, connect
from savepoint.mirror.settings import Mirroring

RECORDS = ("config.yaml", "run.json", "metrics.csv")
STATUS = "mirror.json"
"""In the run directory: how far its mirror is."""
# The mirror is another process's, or another run's: waiting changes nothing.
_FINAL = (RunExistsError, RunLockedError, ConfigMismatchError)
_FIRST_PAUSE_SECS = 1.0
_LONGEST_PAUSE_SECS = 30.0


class Uploader:
    """The mirror of one run that trains here.

    Args:
        directory: Of the run; its name is the run's in the mirror too.
        run_id: Of the run.
        resumed: Digest of the checkpoint that this process started from.
        rewinds: Whether later checkpoints than that are given up.
        resume_from: The command that goes on from a URL.
    """

    def __init__(
        self,
        settings: Mirroring,
        directory: Path,
        run_id: str,
        *,
        resumed: str | None = None,
        rewinds: bool = False,
        resume_from: Callable[[str], str] = str,
    ) -> None:
        self.settings = settings
        self.directory = directory
        self.step: int | None = None  # the newest in the mirror
        self._run = directory.name
        self._id = run_id
        self._resumed = resumed
        self._rewinds = rewinds
        self._resume_from = resume_from
        self._store = CheckpointStore(directory / "checkpoints")
        self._remote: Remote | None = None
        self._is_prepared = False
        self._lease: Lease | None = None
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._wanted: Path | None = None
        self._newest: Path | None = None
        self._handed_over = 0
        self._wants_best = False
        self._best: Path | None = None  # where the best goes next, which was left out before
        self._closing = False
        self._abandoned = False  # its time at the end is over
        self._failure: BaseException | None = None
        self._sent: dict[str, bytes] = {}  # the records, as they are in the mirror

    @property
    def url(self) -> str:
        return f"{self.settings.url.rstrip('/')}/{self._run}"

    # -- what the training calls ------------------------------------------------------------------

    def begin(self, *, is_new: bool) -> None:
        """Before the first step: tries the mirror out, takes its lease, starts the thread.

        Args:
            is_new: Whether the run has no checkpoint: then the mirror must be there, as it may have
                a run of this name.

        Raises:
            MirrorError: it cannot be reached.
            RunExistsError: it has another run of this name.
            RunLockedError: another process uploads there.
            ConfigMismatchError: it is ahead of this directory.
        """
        try:
            self._prepare()
        except MirrorError as error:
            if is_new or error.refused:
                raise MirrorError(
                    f"{error} A run that begins tries its mirror out. Check the URL and what "
                    "gives access to it, or train without: --checkpoint.mirror null",
                    refused=error.refused,
                ) from error
            self._fail(error)
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def catch_up(self) -> None:
        """Once the training begins: what was saved before it and is not in the mirror."""
        if self._thread is not None and (latest := self._store.latest()):
            self._want(latest.path)

    def take(self, path: Path) -> None:
        """A checkpoint was committed. Called in a save: does no work."""
        self._newest = path
        self._handed_over += 1
        if self._handed_over % self.settings.every == 0:
            self._want(path)

    def close(self, since: float | None = None) -> None:
        """At the end, however it came: uploads the newest within the grace time, and says what is
        in the mirror. Never raises.

        Args:
            since: When the grace time began, by `time.monotonic`.
        """
        if self._thread is None:
            if self._lease is not None:
                self._lease.release()
            return
        until = (since or time.monotonic()) + self.settings.grace_secs
        latest = self._latest()
        with self._changed:
            self._closing = True
            # A run that had ended before, and was only tested now, has handed nothing over.
            self._wanted = latest.path if latest else None
            self._changed.notify()
        self._thread.join(min(2.0, max(0.0, until - time.monotonic())))
        if self._thread.is_alive() and until > time.monotonic():
            left = until - time.monotonic()
            print(f"Uploading to the mirror, for {left:.0f} s at most ...", flush=True)
            self._thread.join(left)
        self._abandoned = self._thread.is_alive()
        if self._lease is not None:
            # What is still being uploaded is this run's until the lease has lapsed.
            self._lease.release(delete=not self._abandoned)
        self._note()
        print(self._sentence(), flush=True)
        self._thread = None

    def _sentence(self) -> str:
        newest = self._newest_step()
        if newest is None:
            return f"Nothing was saved, and nothing uploaded to {self.url}."
        if self.step == newest and self._failure is None:
            return f"Step {newest} is in the mirror: {self.url}"
        where = "has nothing of it" if self.step is None else f"is at step {self.step}"
        why = f" {str(self._failure) or repr(self._failure)}" if self._failure else ""
        return f"The mirror {where}, the run at step {newest}: {self.url}.{why}"

    def _latest(self) -> Checkpoint | None:
        with contextlib.suppress(OSError):
            return self._store.latest()
        return None

    def _newest_step(self) -> int | None:
        latest = self._latest()
        return latest.step if latest else None

    # -- the start --------------------------------------------------------------------------------

    def _prepare(self) -> None:
        # Once: a client takes most of a second to make, which each try would take from the training.
        remote = self._remote or connect(self.settings.url)
        self._remote = remote
        ignored = remote.probe(self._run)
        self._refuse_another_run(remote)
        if self._lease is None:
            self._lease = Lease(remote, self._run)
        self._lease.take()
        self._sweep(remote)
        there = held.listed(remote, self._run).checkpoints
        self._refuse_if_ahead(remote, there)
        self._is_prepared = True
        if ignored:
            print(
                f"The mirror's server keeps no {' and no '.join(ignored)}: two processes that "
                f"begin at the same moment may both upload to {self.url}.",
                flush=True,
            )

    def _sweep(self, remote: Remote) -> None:
        try:
            for key in (self._run, f"{self._run}/{held.CHECKPOINTS}"):
                remote.sweep(key)
            self._sweep_shards(remote)
        except MirrorError as error:
            if not error.refused:
                raise
            left = "What an upload that was cut off has left there may stay, and cost money."
            print(f"{error} {left}", file=sys.stderr, flush=True)

    def _sweep_shards(self, remote: Remote) -> None:
        for name, size in remote.names(f"{self._run}/{held.CHECKPOINTS}").items():
            if size is None and manifest.STEP_NAME.fullmatch(name):
                remote.sweep(held.key(self._run, name))
                held.sweep(remote, self._run, name)

    def _refuse_another_run(self, remote: Remote) -> None:
        try:
            record = json.loads(remote.read(f"{self._run}/run.json"))
            found = record.get("id") if isinstance(record, dict) else None
        except (FileNotFoundError, ValueError):
            return
        if found != self._id:
            raise RunExistsError(
                f"The run name is taken in the mirror: {self.url}. It has another run, of id "
                f"{found}. Choose another --run_name, or go on with that run: "
                f"{self._resume_from(self.url)}"
            )

    def _refuse_if_ahead(self, remote: Remote, there: list[Held]) -> None:
        """Later checkpoints than those here would be taken for the newest of this run."""
        newest = self._newest_step() or 0
        for one in reversed(there):
            if one.step <= newest or self._rewinds:
                break
            if one.manifest.get("run_id") == self._id and self._is_whole(remote, one):
                raise ConfigMismatchError(
                    f"The mirror is ahead of this directory: step {one.step} in {self.url}, step "
                    f"{newest} in {self.directory}. Steps would be trained twice.\n"
                    f"  go on from the mirror:  {self._resume_from(self.url)}\n"
                    "  give its steps up:      the same command with --rewind, and the checkpoint "
                    "to go on from"
                )

    def _is_whole(self, remote: Remote, one: Held) -> bool:
        looked_at = self.directory / ".mirror-look"
        try:
            held.download(remote, one, looked_at)
        except CheckpointCorruptError:
            return False
        files.delete(looked_at)
        return True

    # -- the thread -------------------------------------------------------------------------------

    def _want(self, path: Path) -> None:
        with self._changed:
            self._newest = path
            self._wanted = path
            self._changed.notify()

    def _work(self) -> None:
        try:
            self._upload_all()
        except BaseException as error:  # a fault of ours: the last line is to say so
            self._failure = error
            raise

    def _upload_all(self) -> None:
        pause = _FIRST_PAUSE_SECS
        while not self._abandoned:
            try:
                is_idle = self._one_step()
            except _FINAL as error:
                self._fail(error, for_good=True)
                return
            except OSError as error:
                self._fail(error)
                self._wait(pause if not self._closing else _FIRST_PAUSE_SECS)
                pause = min(2 * pause, _LONGEST_PAUSE_SECS)
                continue
            pause = _FIRST_PAUSE_SECS
            if is_idle and self._closing:
                return
            if is_idle:
                self._wait(None)

    def _wait(self, secs: float | None) -> None:
        """Until there is something to do, or to be tried again."""
        until = None if secs is None else time.monotonic() + secs
        with self._changed:
            if until is None:
                self._changed.wait_for(lambda: self._wanted is not None or self._closing)
                return
            was_closing = self._closing
            self._changed.wait_for(lambda: self._closing != was_closing, secs)

    def _one_step(self) -> bool:
        """Uploads one checkpoint; True where there is none to upload."""
        if not self._is_prepared:
            self._prepare()
        assert self._lease is not None
        assert self._remote is not None
        path = self._next()
        if path is None:
            if self._closing:
                self._keep_lease(self._lease)
                self._send_records(self._remote, (*RECORDS, "summary.json"))
                self._recover()
            return True
        self._keep_lease(self._lease)
        with contextlib.suppress(FileNotFoundError):  # pruned meanwhile: there is a newer one
            self._upload(self._remote, path)
        with self._changed:
            if self._wanted == path:
                self._wanted = None
        self._wants_best = path != self._best
        return False

    def _next(self) -> Path | None:
        self._best = None
        if self._wanted is not None:
            return self._wanted
        if self._wants_best and self.settings.keep_best and (best := self._store.best()):
            self._best = best.path
        return self._best

    def _keep_lease(self, lease: Lease) -> None:
        lease.check()
        if lease.lost:
            raise RunExistsError(
                f"Another process has taken this mirror over: {self.url}, held by {lease.lost}. "
                "Nothing more is uploaded from here."
            )

    def _upload(self, remote: Remote, path: Path) -> None:
        try:
            local = Checkpoint(path, manifest.read(path))
        except CheckpointCorruptError as error:  # rot on the disk: never carried further
            raise MirrorError(str(error)) from error
        self._send_records(remote, RECORDS)
        if not self._has(remote, local):
            self._put(remote, local)
            if not self._has(remote, local):
                raise MirrorError(f"Not whole after its upload: {self.url}, {path.name}.")
        if path != self._best:
            self.step = local.step
        self._recover()
        self._note()
        self._prune(remote)

    def _put(self, remote: Remote, local: Checkpoint) -> None:
        key = held.key(self._run, local.path.name)
        self._make_way(remote, local)
        if "shards" not in local.manifest:
            remote.put_file(local.path, key)
            return
        # common.ckpt last: a crash before leaves shards that nothing names, for the next sweep.
        for part in manifest.files_of(local.path):
            remote.put_file(part, f"{key}/{part.name}")

    def _make_way(self, remote: Remote, local: Checkpoint) -> None:
        """The step may be there, of a branch that was given up: it goes before one of its shards is
        written over, and where one is a file and the other has shards.
        """
        name = local.path.name
        there = remote.names(f"{self._run}/{held.CHECKPOINTS}")
        shards = local.manifest.get("shards")
        if name not in there or (shards is None and there[name] is not None):
            return  # a file takes the place of a file in one step
        with contextlib.suppress(CheckpointCorruptError):
            found = held.read(remote, self._run, name, there[name])
            named = found.manifest.get("shards") if found else {}
            if shards is not None and named is not None and not named.keys() & shards:
                return
            if found:
                held.delete(remote, found)
                return
        remote.delete(f"{held.key(self._run, name)}/{manifest.COMMON}")

    def _has(self, remote: Remote, local: Checkpoint) -> bool:
        """Whether the mirror has this very checkpoint: by its size, and by a read of its end."""
        name = local.path.name
        there = remote.names(f"{self._run}/{held.CHECKPOINTS}")
        try:
            found = held.read(remote, self._run, name, there[name]) if name in there else None
        except (CheckpointCorruptError, FileNotFoundError):
            return False
        if found is None or found.manifest != local.manifest:
            return False
        return found.size == sum(files.size(part) for part in manifest.files_of(local.path))

    def _send_records(self, remote: Remote, names: tuple[str, ...]) -> None:
        for name in names:
            try:
                data = (self.directory / name).read_bytes()
            except FileNotFoundError:
                continue
            if name.endswith(".csv"):
                data = data[: data.rfind(b"\n") + 1]  # a row may be being written
            if self._sent.get(name) != data:
                remote.put(f"{self._run}/{name}", data)
                self._sent[name] = data

    def _prune(self, remote: Remote) -> None:
        """Deletes what retention lets go, and what is later than the run itself: of a branch that a
        rewind has given up; and the shards of uploads that were not ended.
        """
        self._sweep_shards(remote)
        listing = held.listed(remote, self._run)
        newest = self.step or 0
        branch = [one for one in listing.facts() if one.step <= newest]
        kept = retention.reasons(branch, self.settings.retention, listing.mode())
        for one in listing.checkpoints:
            mine = one.manifest.get("run_id") == self._id
            if mine and one.step not in kept and one.manifest["digest"] != self._resumed:
                held.delete(remote, one)

    # -- what is said -----------------------------------------------------------------------------

    def _fail(self, error: Exception, *, for_good: bool = False) -> None:
        was = self._failure
        self._failure = error
        if was is None or for_good:
            goes_on = "Nothing more is uploaded." if for_good else "It is tried again."
            print(f"{error} Training goes on. {goes_on}", file=sys.stderr, flush=True)
            self._note()

    def _recover(self) -> None:
        if self._failure is not None:
            self._failure = None
            at = "" if self.step is None else f", and is at step {self.step}"
            print(f"The mirror is there again{at}: {self.url}", file=sys.stderr, flush=True)

    def _note(self) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        status = {"url": self.url, "step": self.step, "time": now}
        status |= {"failure": str(self._failure) if self._failure else None}
        # A full disk is said by the save that meets it.
        with contextlib.suppress(OSError), files.rewriting(self.directory / STATUS) as file:
            file.write(json.dumps(status, indent=2).encode() + b"\n")
