"""Signals, in a process of their own."""

import signal
import subprocess
import sys

import pytest
from support.limits import HANG_SECS

HEAD = "import os, signal, sys, time\nfrom savepoint import preemption as p\n"


def run(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HEAD + body], capture_output=True, text=True, timeout=HANG_SECS
    )


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_while_nothing_is_at_stake_a_signal_leaves_at_once_with_its_code(signum: int) -> None:
    done = run(f"p.install()\nos.kill(os.getpid(), {int(signum)})\ntime.sleep(9)\nprint('went on')")
    assert done.returncode == 128 + signum
    assert "went on" not in done.stdout


def test_in_training_the_first_signal_is_only_noted_and_the_second_leaves() -> None:
    once, again = (
        "p.install(); p.arm()\nos.kill(os.getpid(), 15)\n",
        "time.sleep(1.1)\nos.kill(os.getpid(), 15)\n",
    )
    twice = f"{once}print(p.requests.stop, flush=True)\n{again}"
    done = run(twice + "time.sleep(9)")
    assert done.stdout == "15\n"
    assert done.returncode == -15


def test_two_signals_that_come_together_are_one_request() -> None:
    body = "p.install(); p.arm()\nos.kill(os.getpid(), 15)\nos.kill(os.getpid(), 1)\nprint(p.requests.stop)"
    assert run(body).stdout == "15\n"


def test_a_signal_that_was_ignored_at_the_start_stays_ignored() -> None:
    body = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\np.install(); p.arm()\nos.kill(os.getpid(), 1)\nprint(p.requests.stop)"
    assert run(body).stdout == "0\n"


def test_the_signal_to_save_is_noted() -> None:
    body = "p.install(); p.arm()\nos.kill(os.getpid(), signal.SIGUSR1)\nprint(p.requests.save, p.requests.stop)"
    assert run(body).stdout == "True 0\n"
