"""The directory of a checkpoint, from its first shard to its name.

1. The first rank makes a directory under a temporary name, and says where.
2. Each rank writes and syncs its shard there, and reports size and digest, or its error.
3. The first writes and syncs common.ckpt, which names the shards; the directory gets its name.

A rank that fails in 2 fails the save on all: the temporary directory is removed. A rank that dies
leaves it, and the next start sweeps it: under a temporary name nothing is a checkpoint. Where the
step has a directory already, the shards go in there under free names and common.ckpt is replaced in
one step: before it the old shards count, after it the new ones.
"""

import contextlib
import secrets
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from savepoint import files
from savepoint.checkpoint import manifest, store
from savepoint.checkpoint.store import CheckpointStore
from savepoint.errors import CheckpointSaveError, RunDirectoryError
from savepoint.look.marks import sum_of_all
from savepoint.sharded import pieces
from savepoint.sharded.together import Ranks


def save(
    ranks: Ranks,
    path: Path,
    state: Mapping[str, Any],
    own: Mapping[str, Any],
    facts: Mapping[str, Any],
    room: CheckpointStore | None = None,
) -> None:
    """`split`, then `write`."""
    write(ranks, path, split(ranks, state, own), facts, room)


def split(
    ranks: Ranks,
    state: Mapping[str, Any],
    own: Mapping[str, Any],
    held_by_all: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """What this rank writes, for `write`.

    Args:
        state: The same on all ranks, but for their parts of each DTensor.
        own: What this rank alone has; of the first one it is in `state`.
        held_by_all: By their places, those of its tensors that each rank holds whole: the ranks
            share them out, if they hold the same. None on each rank, or on none.
    """
    writers = {}
    if held_by_all is not None and _hold_the_same(ranks, held_by_all):
        writers = pieces.shared_out(held_by_all.values(), ranks.number)
    stands, shard = pieces.split(state, ranks.rank, writers)
    shard["own"] = pieces.replaced(own, stands)
    common = pieces.replaced(state, stands) if ranks.rank == 0 else {}
    return {"common": common, "shard": shard}


def _hold_the_same(ranks: Ranks, tensors: Mapping[str, Tensor]) -> bool:
    """Else a checkpoint would be pieced together from different states, or have holes; that of the
    first rank counts then. Of each tensor a sample is looked at.
    """
    places = zlib.crc32(repr(list(tensors)).encode())
    said = ranks.together(lambda: (places, sum_of_all(tensors.values(), len(tensors))))
    return ranks.first(lambda: len(set(said)) == 1)


def write(
    ranks: Ranks,
    path: Path,
    parts: Mapping[str, Any],
    facts: Mapping[str, Any],
    room: CheckpointStore | None = None,
) -> None:
    """Writes on all ranks together.

    Args:
        facts: Of the manifest; those of the first rank count.
        room: On a full disk, what its retention lets go is deleted, and the save made once more.

    Raises:
        CheckpointSaveError: on all ranks, where one of them failed; what was there is intact.
    """
    given = (parts["common"], parts["shard"], facts)
    try:
        _attempt(ranks, path, *given)
    except CheckpointSaveError as error:
        if error.errno not in files.FULL or room is None:
            raise
        if not ranks.first(lambda: bool(room.make_room(facts))):
            raise
        _attempt(ranks, path, *given)


def _attempt(
    ranks: Ranks,
    path: Path,
    common: Mapping[str, Any],
    shard: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> None:
    with contextlib.ExitStack() as opened:  # on the first rank alone there is something in it
        place, tag = ranks.first(lambda: _open(opened, path))
        part = Path(place) / f"shard-{ranks.rank:05d}{tag}.ckpt"
        own = {"step": facts["step"], "shard": ranks.rank}
        try:
            written = ranks.together(lambda: _write(part, shard, own))
            ranks.first(lambda: _commit(opened, Path(place), path, common, facts, written))
        except CheckpointSaveError:
            if tag:  # in the directory of a checkpoint, which names none of these
                with contextlib.suppress(OSError):
                    part.unlink()
            raise


def _open(opened: contextlib.ExitStack, path: Path) -> tuple[str, str]:
    """Where the shards go, and what their names end in."""
    if manifest.has_parts(path):
        return str(path), f"-{secrets.token_hex(4)}"
    with files.saving(path):
        return str(opened.enter_context(files.filling(path))), ""


def _write(
    path: Path, shard: Mapping[str, Any], facts: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    written = store.write(path, shard, facts)
    return path.name, {"bytes": files.size(path), "digest": written.manifest["digest"]}


def _commit(
    opened: contextlib.ExitStack,
    place: Path,
    path: Path,
    common: Mapping[str, Any],
    facts: Mapping[str, Any],
    written: list[tuple[str, dict[str, Any]]],
) -> None:
    for name, known in written:
        part = place / name
        if not part.exists() or files.size(part) != known["bytes"]:
            raise CheckpointSaveError(
                f"Not in this directory: {part}, which its rank has written. All hosts save to one "
                "directory that they share. Give such a one: --output_dir",
                part,
            )
    # Until it is there, the shards are nothing: a crash before leaves what was there.
    store.write(place / manifest.COMMON, common, {**facts, "shards": dict(written)})
    with files.saving(path):
        opened.close()
        # Of the save of this step before this one: a crash in here costs space until the next
        # start.
        for one in manifest.superfluous_in(path):
            one.unlink(missing_ok=True)


def require_shared(ranks: Ranks, directory: Path) -> None:
    """Before the first step: all ranks see the directory that the first one writes to.

    Raises:
        RunDirectoryError: on all ranks.
    """
    with contextlib.ExitStack() as opened:
        token = ranks.first(lambda: str(opened.enter_context(files.shown(directory))))
        seen = ranks.together(lambda: Path(token).exists())
        lacking = ranks.first(lambda: [rank for rank, sees in enumerate(seen) if not sees])
    if lacking:
        raise RunDirectoryError(
            f"Rank {lacking[0]} does not see the directory of rank 0: {directory}. All hosts save "
            "to one directory that they share. Give such a one: --output_dir DIR"
        )
