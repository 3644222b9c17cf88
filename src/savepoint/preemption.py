"""Signals: a run that gets one saves at its next safe point, and exits with the code that its
caller expects.

A handler only sets a flag. The checkpoint callback polls the flag at safe points, and raises
`Preempted` after the save. Where there is nothing to lose (start-up, the test after training) a
signal to stop raises at once.

    SIGTERM, SIGINT, SIGHUP   say so, save, exit with 143, 130, 129; a second signal, at least a
                              second later, ends the process at once; Ctrl-C a quarter later
    SIGUSR1                   save, go on

A signal that was ignored when the process started (nohup, a background job) stays ignored.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from savepoint.job import launched, rank

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAVE = signal.SIGUSR1
# Two signals within this time are one request: systemd sends SIGTERM and SIGHUP together, and a
# launcher forwards a signal that the ranks got too.
SAME_SECS = 1.0
# Nobody types faster; `timeout` sends the signal twice, but without a pause.
SAME_KEY_SECS = 0.25


class Preempted(SystemExit):
    """A signal stopped the run. Nobody has to catch this: the process exits with 128 + the number
    of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum
        self.name = signal.Signals(signum).name


class _Requests:
    def __init__(self) -> None:
        self.stop = 0  # number of the signal to stop; 0 before one came
        self.since = 0.0
        self.save = False
        self.armed = False
        self.answered = False  # the training that got these requests has ended
        self.ignored: set[int] = set()


requests = _Requests()


def install() -> None:
    """Installs the handlers: at the start of the process, and again after Lightning has installed
    its own.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for signum in (*STOP, SAVE):
        if signal.getsignal(signum) is signal.SIG_IGN:
            # Remembered, as Lightning installs a handler even for an ignored signal.
            requests.ignored.add(signum)
        handler = _on_save if signum == SAVE else _on_stop
        signal.signal(signum, signal.SIG_IGN if signum in requests.ignored else handler)


def sent_again(otherwise: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A `sys.unraisablehook`. Python drops the exceptions of a destructor: a signal whose handler
    ran inside one is sent again.
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
    # The second training of a notebook does not stop for the signal that stopped the first.
    if requests.answered:
        requests.stop = 0
        requests.save = False
        requests.answered = False
    requests.armed = True
    install()


def disarm() -> None:
    """The training has ended: from here on a signal ends the process at once."""
    requests.armed = False
    requests.answered = True


@contextmanager
def stoppable() -> Iterator[_Requests]:
    """For a training loop of your own: inside the block a signal only sets `stop` or `save` of the
    object that is yielded, both false at first.

    Raises:
        Preempted: at the end of the block, after a signal to stop: the process exits with 128 + its
            number.
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
    if requests.stop and _is_same(signum):
        return
    if requests.stop:
        # The second signal: somebody cannot wait. The last checkpoint on disk is whole, as after a
        # SIGKILL.
        _say("Left at once; what was saved before is whole.")
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
        return
    requests.stop = signum
    requests.since = time.monotonic()
    if not requests.armed:
        raise Preempted(signum)
    if signum == signal.SIGINT:
        _say("Saving at the next step, then leaving. Ctrl-C again leaves at once.")
    else:
        name = signal.Signals(signum).name
        _say(f"{name}: saving at the next step, then leaving. A second one leaves at once.")


def _is_same(signum: int) -> bool:
    """Whether a signal is one with the first."""
    is_typed = signum == requests.stop == signal.SIGINT and not launched()
    same_secs = SAME_KEY_SECS if is_typed else SAME_SECS
    return time.monotonic() - requests.since < same_secs


def _say(text: str) -> None:
    """By the system's own call: the handler may interrupt a print, whose buffer admits no other."""
    # A data worker inherits the handler, and gets what is typed at the terminal too.
    if rank() or multiprocessing.parent_process() is not None:
        return
    descriptor = next((one for one in (2, 1) if os.isatty(one)), 2)
    # A bar may stand in this line of the terminal.
    line = f"\r\x1b[K{text}\n" if os.isatty(descriptor) else f"{text}\n"
    with suppress(OSError):  # a closed terminal, a full disk
        os.write(descriptor, line.encode())


def _on_save(signum: int, frame: FrameType | None) -> None:
    requests.save = True
