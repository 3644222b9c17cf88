"""The launcher of this process: its rank, its job, whether the job was started before."""

import os


def rank() -> int:
    """Of this process, as its launcher says; 0 where there is none."""
    return int(
        os.environ.get("RANK")
        or os.environ.get("LOCAL_RANK")
        or os.environ.get("SLURM_PROCID")
        or 0
    )


def scheduled() -> str | None:
    """The id of the job, where a scheduler or torchrun starts this process: the same on every rank
    and after a requeue.
    """
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")


def requeued() -> bool:
    """Whether SLURM has started this very job before: then the command goes on with its run."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
