"""Signals: asked to stop, a run saves at its next safe point and leaves with the code its caller
expects.

A handler only sets a flag. The checkpoint callback polls it where nothing is half done, and raises
`Preempted` after the save. While nothing is at stake (start-up, the test after training) a signal
to stop raises at once.

    SIGTERM, SIGINT, SIGHUP   save, leave with 143, 130, 129; a second one, a second later or more,
                              leaves at once
    SIGUSR1                   save, go on

A signal that was ignored when the process started (nohup, a background job) stays ignored.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAVE = signal.SIGUSR1
# Two within this time are one request: systemd sends SIGTERM and SIGHUP together, launchers forward
# what reached all.
SAME_SECS = 1.0


class Preempted(SystemExit):
    """The run was asked to stop. Nobody has to catch it: the process leaves with 128 + the signal's
    number.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum
        self.name = signal.Signals(signum).name


class _Requests:
    def __init__(self) -> None:
        self.stop = 0  # number of the signal that asked to stop, 0 while none did
        self.since = 0.0
        self.save = False
        self.armed = False
        self.answered = False  # what stands above was asked of a training that has ended
        self.ignored: set[int] = set()


requests = _Requests()


def install() -> None:
    """Takes the signals. Called at the start of the process, and again once Lightning has put its
    own handlers there.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for signum in (*STOP, SAVE):
        if signal.getsignal(signum) is signal.SIG_IGN:
            # Remembered: Lightning puts a handler of its own even there.
            requests.ignored.add(signum)
        handler = _on_save if signum == SAVE else _on_stop
        signal.signal(signum, signal.SIG_IGN if signum in requests.ignored else handler)


def asked_again(otherwise: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A `sys.unraisablehook`. A handler may run inside a destructor, whose exceptions Python drops:
    then it is asked anew.
    """

    def hook(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, Preempted):
            requests.stop = 0
            threading.Timer(0.01, os.kill, (os.getpid(), unraisable.exc_value.signum)).start()
        else:
            otherwise(unraisable)

    return hook


def arm() -> None:
    """From here on a signal waits for the next safe point."""
    # The second training of a notebook does not stop for what stopped the first.
    if requests.answered:
        requests.stop = 0
        requests.save = False
        requests.answered = False
    requests.armed = True
    install()


def disarm() -> None:
    """The training has ended: from here on a signal leaves at once."""
    requests.armed = False
    requests.answered = True


@contextmanager
def stoppable() -> Iterator[_Requests]:
    """For a training loop of one's own: inside, a signal only asks. What it yields has `stop` and
    `save`, both false at first.

    Raises:
        Preempted: at the end of the block, where a signal asked to stop: the process leaves with
            128 + its number.
    """
    before = {signum: signal.getsignal(signum) for signum in (*STOP, SAVE)}
    arm()
    try:
        yield requests
    finally:
        disarm()
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if requests.stop:
        raise Preempted(requests.stop)


def _on_stop(signum: int, frame: FrameType | None) -> None:
    if requests.stop and time.monotonic() - requests.since < SAME_SECS:
        return
    if requests.stop:
        # The second one: somebody cannot wait. The last checkpoint on disk is whole, as it is after
        # a SIGKILL.
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
        return
    requests.stop = signum
    requests.since = time.monotonic()
    if not requests.armed:
        raise Preempted(signum)


def _on_save(signum: int, frame: FrameType | None) -> None:
    requests.save = True
