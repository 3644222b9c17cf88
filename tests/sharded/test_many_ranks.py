"""What a save costs with up to 1,024 ranks, counted: the real planner, manifests and order of a
save, by ranks that are pretended and tensors without bytes (0.98 TB of them).
"""

from pathlib import Path

import pytest
from support.pretended import ROWS, STATE_BYTES, counted

from savepoint.words import table

Counted = dict[str, int]


@pytest.fixture(scope="module")
def few_and_many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Counted, Counted]:
    directory = tmp_path_factory.mktemp("ranks")
    return counted(directory, 8), counted(directory, 64)


def check_growth(few: Counted, many: Counted) -> None:
    """What stays the same with more ranks, and what does not."""
    for what in ("gathers", "broadcasts", "calls of the first", "most calls of another"):
        assert few[what] == many[what], what
    assert (few["gathers"], few["broadcasts"]) == (1, 3)
    assert max(many["bytes to the first"], many["bytes from the first"]) < 400
    for one in (few, many):
        assert one["files"] == one["ranks"] + 1
        assert one["tensors"] == STATE_BYTES
        assert one["most tensors of a rank"] == STATE_BYTES // one["ranks"]
    # A digit more in a number of ranks, and nothing else.
    assert abs(few["without the shards' names"] - many["without the shards' names"]) < 20
    assert many["a shard, without tensors"] < 1.1 * few["a shard, without tensors"]


def test_with_more_ranks_messages_and_calls_of_a_save_stay_as_they_are(
    few_and_many: tuple[Counted, Counted],
) -> None:
    check_growth(*few_and_many)


def test_of_replicas_each_writes_its_share_once(tmp_path: Path) -> None:
    found = counted(tmp_path, 16, replicas=8)
    assert found["tensors"] == STATE_BYTES
    # 60 tensors, of which each of eight replicas has seven or eight.
    assert found["most tensors of a rank"] <= STATE_BYTES // 60 * 8 // 2


@pytest.mark.slow
def test_what_1024_ranks_take_for_a_terabyte(tmp_path: Path) -> None:
    assert ROWS % 1024 == 0
    found = [counted(tmp_path, ranks) for ranks in (8, 64, 256, 1024)]
    print(table(["", *(str(one["ranks"]) for one in found)], [
        (what, *(f"{one[what]:,}" for one in found)) for what in found[0] if what != "ranks"
    ]))  # fmt: skip
    check_growth(found[0], found[-1])
