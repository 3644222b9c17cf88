"""What surrounds this process: its rank, its job, and how many cores it may use."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def rank() -> int:
    """Of this process, as its launcher says; 0 where there is none."""
    return int(
        os.environ.get("RANK")
        or os.environ.get("LOCAL_RANK")
        or os.environ.get("SLURM_PROCID")
        or 0
    )


def launched() -> bool:
    """Whether a launcher has started this process as a rank."""
    return "LOCAL_RANK" in os.environ or "SLURM_PROCID" in os.environ


def scheduled() -> str | None:
    """The id of the job, where a scheduler or torchrun starts this process: the same on every rank
    and after a requeue.
    """
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")


def requeued() -> bool:
    """Whether SLURM has started this very job before: then the command goes on with its run."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def local_processes() -> int:
    """How many ranks the launcher has started on this machine; 1 where there is none."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def of_torchrun() -> tuple[int, int] | None:
    """(processes on each host, hosts) of a torchrun that gives each host equally many; None where
    there is none.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    each = local_processes()
    hosts, left = divmod(int(os.environ.get("WORLD_SIZE") or 0), each)
    return (each, hosts) if hosts and not left else None


def cores() -> int:
    """How many cores this process may use at once: its affinity, or the quota of its control
    group where that is less. At least 1.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min([allowed or 1, *map(math.ceil, _quotas())]))


def throttled() -> int:
    """How often a quota has made this process wait, so far; 0 where there is none."""
    for directory in _groups("cpu"):
        for line in _read(directory / "cpu.stat").splitlines():
            name, _, number = line.partition(" ")
            if name == "nr_throttled" and int(number):
                return int(number)
    return 0


def waited() -> float:
    """Secs in which the main thread was ready and others had its core, so far; 0 where the system
    does not count them.
    """
    counted = _read(Path("/proc/self/schedstat")).split()
    return int(counted[1]) / 1e9 if counted else 0.0


def _quotas() -> Iterator[float]:
    """Of this process's control groups, in cores."""
    for directory in _groups("cpu"):
        quota, _, period = _read(directory / "cpu.max").partition(" ")  # version 2
        if not quota:
            quota = _read(directory / "cpu.cfs_quota_us")
            period = _read(directory / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():  # "max" and -1 are no quota
            yield int(quota) / int(period)


def _groups(controller: str) -> Iterator[Path]:
    """The directories of the groups that hold this process, from its own up to the root."""
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        root = _CGROUPS
        if controllers and controller not in controllers.split(","):
            continue
        if controllers:  # version 1: a hierarchy for each controller
            root = _CGROUPS / controllers
        own = root / path.lstrip("/")
        for directory in (own, *own.parents):
            if directory.is_relative_to(root):
                yield directory


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
