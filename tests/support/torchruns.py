"""torchrun on this machine, and the death of one of its ranks."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from support.limits import HANG_SECS

DICE = random.Random(1)


def children(pid: int) -> list[int]:
    try:
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def environment(pid: int) -> dict[str, str]:
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return dict(word.decode().split("=", 1) for word in words if b"=" in word)


def ranks_of(agent: int, restart: int) -> dict[int, int]:
    """The processes that a torchrun has started so often again, by their ranks."""
    found = {}
    for pid in children(agent):
        known = environment(pid)
        if known.get("TORCHELASTIC_RESTART_COUNT") == str(restart):
            found[int(known["RANK"])] = pid
    return found


def newest(run_dir: Path) -> int:
    listed = (run_dir / "checkpoints").glob("step-*.ckpt")
    return max((int(path.stem.removeprefix("step-")) for path in listed), default=0)


def _wait(agent: int, happened: Callable[[], object], said: str) -> None:
    until = time.monotonic() + HANG_SECS
    while not happened():
        # That nobody has waited for it leaves it a name, and no program.
        assert Path(f"/proc/{agent}/exe").exists(), "torchrun has ended"
        assert time.monotonic() < until, said
        time.sleep(0.01)


def kill_a_rank(agent: int, run_dir: Path, restart: int = 0, dice: random.Random = DICE) -> int:
    """SIGKILL of one of the ranks that were started so often again, once they have saved. Returns
    the newest step.
    """
    _wait(agent, lambda: ranks_of(agent, restart), "it did not start again")
    before = newest(run_dir)  # what those before them were about to save is there by now
    _wait(agent, lambda: newest(run_dir) != before, f"nothing was saved after {restart} restarts")
    time.sleep(dice.uniform(0, 0.5))
    os.kill(dice.choice(list(ranks_of(agent, restart).values())), signal.SIGKILL)
    return newest(run_dir)
