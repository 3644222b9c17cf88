"""Signals, in a process of their own."""

import multiprocessing
import signal
import subprocess
import sys

import pytest
from support.limits import HANG_SECS

from savepoint import preemption

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


def test_a_second_ctrl_c_leaves_though_it_comes_soon() -> None:
    once = "os.kill(os.getpid(), 2)\n"
    done = run(f"p.install(); p.arm()\n{once}time.sleep(0.3)\n{once}time.sleep(9)")
    assert done.returncode == -2
    assert done.stderr.splitlines()[1:] == ["Left at once; what was saved before is whole."]


def test_ctrl_c_of_a_rank_comes_twice_by_terminal_and_launcher_and_is_one_request() -> None:
    once = "os.kill(os.getpid(), 2)\n"
    rank = "os.environ['LOCAL_RANK'] = '0'\n"
    done = run(f"{rank}p.install(); p.arm()\n{once}time.sleep(0.3)\n{once}print('goes on')")
    assert done.stdout == "goes on\n"


@pytest.mark.parametrize(
    ("signum", "said"),
    [
        (signal.SIGINT, "Saving at the next step, then leaving. Ctrl-C again leaves at once.\n"),
        (
            signal.SIGTERM,
            "SIGTERM: saving at the next step, then leaving. A second one leaves at once.\n",
        ),
    ],
)
def test_a_signal_is_answered_at_once_even_in_the_middle_of_a_print(
    signum: signal.Signals, said: str
) -> None:
    # The buffer of standard error is in use, as it is where a handler interrupts a print.
    body = (
        "class Busy:\n"
        "    def write(self, text): raise RuntimeError('reentrant call')\n"
        "    flush = write\n"
        f"p.install(); p.arm()\nreal = sys.stderr\nsys.stdout = sys.stderr = Busy()\n"
        f"os.kill(os.getpid(), {int(signum)})\nos._exit(p.requests.stop)"
    )
    done = run(body)
    assert done.stderr == said
    assert done.returncode == signum


def test_one_rank_answers_for_all() -> None:
    done = run("os.environ['RANK'] = '1'\np.install(); p.arm()\nos.kill(os.getpid(), 15)")
    assert done.stderr == ""


def test_two_signals_that_come_together_are_one_request() -> None:
    body = "p.install(); p.arm()\nos.kill(os.getpid(), 15)\nos.kill(os.getpid(), 1)\nprint(p.requests.stop)"
    assert run(body).stdout == "15\n"


def test_a_signal_that_was_ignored_at_the_start_stays_ignored() -> None:
    body = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\np.install(); p.arm()\nos.kill(os.getpid(), 1)\nprint(p.requests.stop)"
    assert run(body).stdout == "0\n"


def test_the_signal_to_save_is_noted() -> None:
    body = "p.install(); p.arm()\nos.kill(os.getpid(), signal.SIGUSR1)\nprint(p.requests.save, p.requests.stop)"
    assert run(body).stdout == "True 0\n"


def test_a_data_worker_says_nothing_of_a_signal(capfd: pytest.CaptureFixture[str]) -> None:
    context = multiprocessing.get_context("fork")
    worker = context.Process(target=preemption._say, args=("Saving at the next step.",))
    worker.start()
    worker.join()
    assert capfd.readouterr() == ("", "")
    preemption._say("Saving at the next step.")
    assert "Saving at the next step." in capfd.readouterr().err
