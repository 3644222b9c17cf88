"""A run out of its mirror: to go on with it where its directory is gone, or older."""

import contextlib
import json
import time
from collections.abc import Iterable
from pathlib import Path

from savepoint import files, record
from savepoint.checkpoint import manifest
from savepoint.checkpoint.store import LAST, CheckpointStore
from savepoint.errors import (
    CheckpointCorruptError,
    CheckpointNotFoundError,
    RunExistsError,
)
from savepoint.job import rank
from savepoint.mirror import held
from savepoint.mirror.held import Held, Listing
from savepoint.mirror.remote import Remote, connect
from savepoint.run import Run, check_name
from savepoint.words import megabytes, show

_RECORDS = ("config.yaml", "metrics.csv", "summary.json", record.NAME)
_WAIT_SECS = 600.0


def fetch(url: str, output_dir: Path) -> Path:
    """The directory of a mirrored run below `output_dir`, with the newest checkpoint of the mirror
    that verifies, unless one there is as new. Other ranks than the first wait for it.

    Raises:
        CheckpointNotFoundError: no run there, or none of its checkpoints verifies.
        RunExistsError: another run is in that directory.
        RunLockedError: a process trains there.
        MirrorError: the mirror cannot be reached.
    """
    place, _, name = url.rstrip("/").removesuffix(f"/{held.CHECKPOINTS}").rpartition("/")
    if manifest.STEP_NAME.fullmatch(name):
        raise CheckpointNotFoundError(
            f"Not a run but one of its checkpoints: {url}. A run in a mirror was expected, whose "
            f"newest is fetched. Name it: {place.removesuffix(f'/{held.CHECKPOINTS}')}",
            name,
        )
    remote = connect(place, "the run")
    check_name(name)
    directory = output_dir / name
    if rank():
        return _wait_for(directory)
    listing = held.listed(remote, name)
    if not listing.checkpoints:
        raise CheckpointNotFoundError(
            f"No checkpoint in this mirror: {remote.named(name)}. A mirrored run has checkpoints/"
            f"step-*.ckpt there. {_runs(remote)}",
            name,
        )
    _refuse_another(remote, name, directory)
    latest = CheckpointStore(directory / held.CHECKPOINTS).latest()
    if latest and latest.step >= listing.checkpoints[-1].step:
        print(f"{show(directory)} is as new as {remote.named(name)}: step {latest.step}.")
        return directory
    files.make_directory(directory)
    with Run(directory).locked():
        _fill(remote, listing, directory, latest.step if latest else 0)
    return directory


def has(url: str) -> bool:
    """Whether a mirror has a checkpoint of the run at a URL."""
    place, _, name = url.rstrip("/").rpartition("/")
    return bool(held.listed(connect(place), name).checkpoints)


def _wait_for(directory: Path) -> Path:
    until = time.monotonic() + _WAIT_SECS
    while not (directory / held.CHECKPOINTS / LAST).exists():
        if time.monotonic() > until:
            raise CheckpointNotFoundError(
                f"Not fetched from the mirror in {_WAIT_SECS:.0f} s: {directory}. Rank 0 fetches "
                "for all; its output says how far it is. Give all ranks one directory.",
                directory,
            )
        time.sleep(0.2)
    return directory


def _runs(remote: Remote) -> str:
    names = [name for name, size in remote.names().items() if size is None]
    if not names:
        return "Check the URL."
    return f"Runs in {remote.url}: {', '.join(sorted(names)[:5])}."


def _refuse_another(remote: Remote, name: str, directory: Path) -> None:
    here = Run(directory).id()
    if here is None:
        return
    try:
        content = json.loads(remote.read(f"{name}/{record.NAME}"))
        there = content.get("id") if isinstance(content, dict) else None
    except (FileNotFoundError, ValueError):
        there = None
    if here != there:
        raise RunExistsError(
            f"Another run is in this directory: {show(directory)}. Expected the run of "
            f"{remote.named(name)}, or nothing. Give another one: --output_dir DIR"
        )


def _fill(remote: Remote, listing: Listing, directory: Path, here: int) -> None:
    """The records first, the newest last: what a crash leaves is older than the mirror, and the
    next start fetches again.
    """
    for name in _RECORDS:
        with contextlib.suppress(FileNotFoundError):
            data = remote.read(f"{directory.name}/{name}")
            with files.rewriting(directory / name) as file:
                file.write(data)
    store = CheckpointStore(directory / held.CHECKPOINTS)
    later = [one for one in reversed(listing.checkpoints) if one.step > here]
    best = listing.best()
    if best is not None and not store.path(best.step).exists():
        # Or the test at the end would be that of another one.
        _fetch_first(remote, [best], store)
    newest, damaged = _fetch_first(remote, later, store)
    store.mend()
    latest = store.latest()
    if latest is None:
        reasons = "; ".join(f"{one.path.name}: {reason}" for one, reason in damaged)
        raise CheckpointNotFoundError(
            f"No checkpoint that verifies: {remote.named(directory.name)} ({reasons}). A damaged "
            "one is never loaded. Start the run again, under another --run_name.",
            directory,
        )
    for one, reason in damaged:
        print(
            f"{one.path.name} in the mirror does not verify: {reason}. Going on from step "
            f"{latest.step} costs {one.step - latest.step} steps."
        )
    if newest is not None:
        size = megabytes(newest.size)
        print(f"Fetched step {newest.step} from {remote.named(directory.name)} ({size}).")


def _fetch_first(
    remote: Remote, candidates: Iterable[Held], store: CheckpointStore
) -> tuple[Held | None, list[tuple[Held, str]]]:
    """The first that verifies once it is here, and the reason for each before it."""
    damaged = []
    for one in candidates:
        try:
            held.download(remote, one, store.directory / one.path)
        except CheckpointCorruptError as error:
            damaged.append((one, error.reason))
        else:
            return one, damaged
    return None, damaged
