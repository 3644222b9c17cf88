"""Signals that this process sends to itself."""

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from savepoint import preemption

STOPPING = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.fixture(autouse=True)
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Those of the tests' own process come back, whatever a test did to them."""
    before = {signum: signal.getsignal(signum) for signum in (*STOPPING, signal.SIGUSR1)}
    monkeypatch.setattr(preemption, "requests", preemption._Requests())
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def send_in(
    patch: pytest.MonkeyPatch,
    owner: type,
    hook: str,
    *,
    nth: int,
    signum: int,
    before: Callable[[Any], Any] = id,
) -> list[Any]:
    """This process gets `signum` at the `nth` call of a hook. Returns what `before` makes of the
    hook's object then.
    """
    original, calls, seen = getattr(owner, hook), [], []

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(hook)
        if len(calls) == nth:
            seen.append(before(self))
            os.kill(os.getpid(), signum)
        return original(self, *args, **kwargs)

    patch.setattr(owner, hook, wrapped)
    return seen
