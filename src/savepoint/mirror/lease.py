"""One process at a time uploads to a run's mirror: the one that renews `lease.json`.

Nothing is judged by a clock of another machine: a lease is free when it was seen not to change for
its whole length. That of a process that died on this very machine is free at once.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from savepoint.errors import MirrorError, RunLockedError
from savepoint.lock import boot_id
from savepoint.mirror.remote import Remote

LEASE_SECS = 60.0


class Lease:
    """The lease of one run.

    Attributes:
        lost: Who has taken it from this process, in words.
    """

    def __init__(self, remote: Remote, run: str, secs: float = LEASE_SECS) -> None:
        self.lost = ""
        self._remote = remote
        self._run = run
        self._key = f"{run}/lease.json"
        self._secs = secs
        self._token = secrets.token_hex(8)
        self._number = 0
        self._tag: str | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Waits for the length of a lease that another process has left, and takes it.

        Raises:
            RunLockedError: that process is alive.
            MirrorError: the server cannot be reached.
        """
        if self._thread is not None:
            return
        for _ in range(5):
            # Asked for before the content: of a lease that changes in between it is refused.
            self._tag = self._remote.tag(self._key)
            found = self._read()
            try:
                if found is None:
                    self._write(absent=True)
                else:
                    self._wait_for(found)
                    self._write()
                break
            except FileExistsError:
                continue  # another process was faster
        else:
            raise self._held(self._read() or {})
        if not self._is_mine(now := self._read()):
            raise self._held(now or {})
        self._thread = threading.Thread(target=self._renew, name="mirror-lease", daemon=True)
        self._thread.start()

    def release(self, *, delete: bool = True) -> None:
        """Never raises: a lease that stays costs the next start a wait."""
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join(timeout=1)
        with contextlib.suppress(MirrorError):
            if delete and not self.lost and self._is_mine(self._read()):
                self._remote.delete(self._key)

    def _renew(self) -> None:
        while not self._ended.wait(self._secs / 4):
            # What is not reached now is asked again: meanwhile the lease may be taken over.
            with contextlib.suppress(MirrorError):
                self.check()

    def check(self) -> None:
        """Renews the lease, unless another process has it: `lost` then says which."""
        now = self._read()
        if self.lost or self._ended.is_set():
            return
        try:
            if now is not None and not self._is_mine(now):
                raise FileExistsError
            self._write(absent=now is None)
        except FileExistsError:
            self._tag = self._remote.tag(self._key)
            now = self._read()
            if not self._is_mine(now):  # or an answer of the server was lost on its way
                self.lost = _holder(now or {})

    def _wait_for(self, found: dict[str, Any]) -> None:
        if _is_dead_here(found):
            return
        print(
            f"Waiting up to {self._secs:.0f} s for {_holder(found)}, which holds the mirror "
            f"{self._remote.named(self._run)}.",
            flush=True,
        )
        until = time.monotonic() + self._secs
        while time.monotonic() < until:
            time.sleep(min(1.0, self._secs / 10))
            now = self._read()
            if now is None:
                raise FileExistsError  # it was released: begin again
            if (now.get("token"), now.get("number")) != (found.get("token"), found.get("number")):
                raise self._held(now)

    def _held(self, found: dict[str, Any]) -> RunLockedError:
        return RunLockedError(
            f"Another process uploads to this mirror: {self._remote.named(self._run)}, held by "
            f"{_holder(found)}. Two would delete each other's checkpoints. Wait for it or stop "
            "it, or start a run of another name."
        )

    def _read(self) -> dict[str, Any] | None:
        try:
            content = json.loads(self._remote.read(self._key))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    def _write(self, *, absent: bool = False) -> None:
        """Raises FileExistsError where another process was faster, and the server says so."""
        self._number += 1
        mine = {"token": self._token, "number": self._number, "secs": self._secs}
        mine |= {"host": socket.gethostname(), "pid": os.getpid(), "boot_id": boot_id()}
        tag = self._tag if self._remote.keeps_tags and not absent else None
        self._tag = self._remote.put(self._key, json.dumps(mine).encode(), absent=absent, tag=tag)

    def _is_mine(self, found: dict[str, Any] | None) -> bool:
        return found is not None and found.get("token") == self._token


def _holder(found: dict[str, Any]) -> str:
    if "pid" not in found:
        return "a process that left no name"
    return f"pid {found['pid']} on {found.get('host')}"


def _is_dead_here(found: dict[str, Any]) -> bool:
    if not boot_id() or found.get("boot_id") != boot_id():
        return False
    if found.get("host") != socket.gethostname():  # another container on this machine
        return False
    return not Path(f"/proc/{found.get('pid')}").exists()
