"""A checkpoint that is a directory: it is there if and only if all of it is."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from support.checkpoint_files import names, small_state
from support.pretended import together
from support.shards import flip, in_store, write_halves

from savepoint import files
from savepoint.checkpoint import format, manifest, store
from savepoint.checkpoint.format import fingerprint
from savepoint.checkpoint.retention import Retention
from savepoint.checkpoint.store import CheckpointStore
from savepoint.errors import (
    CheckpointCorruptError,
    CheckpointNotFoundError,
    CheckpointSaveError,
)
from savepoint.sharded import pieces, saving
from savepoint.sharded.together import Ranks

STEP = "step-00000030.ckpt"


def test_put_together_it_is_the_state_that_one_process_would_have_saved(tmp_path: Path) -> None:
    write_halves(tmp_path / STEP)
    state, facts = store.load(tmp_path / STEP)
    others = state.pop("other_ranks")
    assert fingerprint(state) == fingerprint(small_state())
    assert [one["rng"]["torch"].tolist() for one in others] == [[1] * 5]
    assert facts["step"] == 30
    assert state["optimizer"] is state["optimizer_states"][0]


def test_what_every_rank_holds_whole_is_written_once_and_shared_out(tmp_path: Path) -> None:
    sizes = {"weight": 50, "bias": 20, "head": 30}
    whole = {name: torch.arange(size).reshape(2, -1).T for name, size in sizes.items()}

    def save(ranks: Ranks) -> None:
        weights = {name: tensor.clone() for name, tensor in whole.items()}
        mean = torch.tensor([float(ranks.rank)])  # a buffer: that of the first rank counts
        state = {"state_dict": {**weights, "mean": mean}}
        held = {f"state_dict.{name}": tensor for name, tensor in weights.items()}
        own = {"rng": ranks.rank}
        parts = saving.split(ranks, state, own, held)
        saving.write(ranks, tmp_path / STEP, parts, {"step": 30, "world_size": 2})

    together(tmp_path, 2, save)
    shards = [format.decode(tmp_path / STEP / f"shard-{rank:05d}.ckpt") for rank in range(2)]
    held = [sorted(key.removeprefix("state_dict.") for key in one["pieces"]) for one in shards]
    assert held == [["weight"], ["bias", "head"]]
    state, _ = store.load(tmp_path / STEP)
    for name, tensor in whole.items():
        loaded = state["state_dict"][name]
        assert torch.equal(loaded, tensor)
        assert loaded.stride() == tensor.stride()
    assert state["state_dict"]["mean"].tolist() == [0.0]


def test_what_the_ranks_do_not_hold_alike_is_the_first_ones(tmp_path: Path) -> None:
    """One tensor that differs: none is shared out, as they belong together."""

    def save(ranks: Ranks) -> None:
        weights = {"weight": torch.ones(40), "codes": torch.full((20,), float(ranks.rank))}
        held = {f"state_dict.{name}": tensor for name, tensor in weights.items()}
        parts = saving.split(ranks, {"state_dict": weights}, {}, held)
        saving.write(ranks, tmp_path / STEP, parts, {"step": 30, "world_size": 2})

    together(tmp_path, 2, save)
    state, _ = store.load(tmp_path / STEP, whole=False)
    assert state["state_dict"]["weight"].tolist() == [1.0] * 40
    assert state["state_dict"]["codes"].tolist() == [0.0] * 20


def test_states_of_weights_that_are_not_spread_come_from_shards_too(tmp_path: Path) -> None:
    module = torch.nn.Linear(6, 8)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(4, 6)).sum().backward()
    optimizer.step()
    whole = {"state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()]}

    def save(ranks: Ranks) -> None:
        held = {key: leaf for key, leaf in format.leaves(whole) if isinstance(leaf, torch.Tensor)}
        parts = saving.split(ranks, whole, {}, held)
        saving.write(ranks, tmp_path / STEP, parts, {"step": 30, "world_size": 2})

    together(tmp_path, 2, save)
    state, facts = store.load(tmp_path / STEP, whole=False)
    shards = pieces.Shards(tmp_path / STEP, facts)
    placed = pieces.placed(state, shards, module.state_dict(), [optimizer])
    assert fingerprint(placed) == fingerprint(whole)


def test_without_its_shards_it_says_the_shapes(tmp_path: Path) -> None:
    write_halves(tmp_path / STEP)
    state, _ = store.load(tmp_path / STEP, whole=False)
    assert state["state_dict"]["weight"].is_meta
    assert state["state_dict"]["weight"].shape == (20, 30)
    assert state["state_dict"]["bias"].tolist() == [0.0] * 20


@pytest.mark.parametrize("name", ["shard-00001.ckpt", "common.ckpt"])
def test_a_part_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    write_halves(tmp_path / STEP)
    (tmp_path / STEP / name).unlink()
    with pytest.raises(CheckpointCorruptError, match=f"{name} is missing"):
        manifest.read(tmp_path / STEP)
    directory = CheckpointStore(tmp_path)
    assert directory.checkpoints() == []
    assert directory.rejected() == [(tmp_path / STEP, f"{name} is missing")]


def test_a_shard_of_another_size_is_seen_in_a_listing(tmp_path: Path) -> None:
    directory = CheckpointStore(tmp_path)
    shard = in_store(tmp_path, 30) / "shard-00000.ckpt"
    assert len(directory.checkpoints()) == 1
    size = shard.stat().st_size
    os.truncate(shard, size - 10)
    assert directory.checkpoints() == []
    assert directory.rejected()[0][1] == f"shard-00000.ckpt has {size - 10} bytes, not {size}"


@pytest.mark.parametrize("name", ["shard-00000.ckpt", "shard-00001.ckpt", "common.ckpt"])
@pytest.mark.parametrize("at", [0.05, 0.3, 0.5, 0.7, 0.999])
def test_a_flipped_bit_anywhere_is_found_and_the_part_is_named(
    tmp_path: Path, name: str, at: float
) -> None:
    write_halves(tmp_path / STEP)
    flip(tmp_path / STEP / name, at)
    with pytest.raises(CheckpointCorruptError, match=f": {name}: "):
        manifest.verify(tmp_path / STEP)


def test_a_whole_shard_of_another_save_is_found(tmp_path: Path) -> None:
    write_halves(tmp_path / STEP)
    write_halves(tmp_path / "other.ckpt", value=2.0)
    shutil.copy(tmp_path / "other.ckpt" / "shard-00001.ckpt", tmp_path / STEP)
    assert manifest.read(tmp_path / STEP)["step"] == 30
    with pytest.raises(CheckpointCorruptError, match="of another save than common"):
        store.load(tmp_path / STEP)


def test_the_digest_is_of_the_content_of_all_parts_whatever_they_are_called(
    tmp_path: Path,
) -> None:
    one = write_halves(tmp_path / "a.ckpt").manifest["digest"]
    assert write_halves(tmp_path / "b.ckpt", tag="-0123abcd").manifest["digest"] == one
    shutil.rmtree(tmp_path / "b.ckpt")
    assert write_halves(tmp_path / "b.ckpt", value=2.0).manifest["digest"] != one


def test_a_part_by_itself_is_no_checkpoint(tmp_path: Path) -> None:
    write_halves(tmp_path / STEP)
    for name in ("shard-00000.ckpt", "common.ckpt"):
        with pytest.raises(CheckpointNotFoundError, match=rf"A part of .* Name that: .*{STEP}"):
            store.load(tmp_path / STEP / name)


def test_a_manifest_names_no_file_elsewhere(tmp_path: Path) -> None:
    write_halves(tmp_path / STEP)
    named = {"../../secret.ckpt": {"bytes": 1, "digest": ""}}
    store.write(tmp_path / STEP / "common.ckpt", {}, {"step": 30, "shards": named})
    with pytest.raises(CheckpointCorruptError, match=r"says shards .* not a table of shards"):
        manifest.read(tmp_path / STEP)


def test_both_kinds_are_listed_ranked_pointed_to_and_pruned_alike(tmp_path: Path) -> None:
    directory = CheckpointStore(
        tmp_path, retention=Retention(keep_last=2), monitor="val/loss", mode="min"
    )
    for step, score in ((10, 0.1), (20, 0.9), (30, 0.8), (50, 0.7)):
        in_store(tmp_path, step, score)
    shutil.rmtree(tmp_path / STEP)
    directory.add(small_state(), {**manifest.read(tmp_path / "step-00000020.ckpt"), "step": 40})
    assert [one.step for one in directory.checkpoints()] == [10, 40, 50]
    assert manifest.read(tmp_path / "last.ckpt")["step"] == 50
    assert manifest.verify(tmp_path / "best.ckpt")["step"] == 10
    assert (tmp_path / "best.ckpt").is_symlink()
    assert names(tmp_path) == [
        "best.ckpt",
        "last.ckpt",
        *(f"step-000000{step}.ckpt" for step in (10, 40, 50)),
    ]


def test_a_damaged_one_is_set_aside_whole_and_the_one_before_it_taken(tmp_path: Path) -> None:
    directory = CheckpointStore(tmp_path)
    in_store(tmp_path, 20)
    flip(in_store(tmp_path, 30) / "shard-00001.ckpt")
    directory.commit()
    chosen, state, lines = CheckpointStore(tmp_path).load_latest(lock_holder=True)
    assert chosen.step == 20
    assert state["state_dict"]["weight"][0, 0] == 20
    assert "shard-00001.ckpt: one or more damaged bytes in record" in lines[0]
    assert "costs 10 steps" in lines[0]
    aside = tmp_path / f"{STEP}.corrupt"
    assert names(aside) == ["common.ckpt", "shard-00000.ckpt", "shard-00001.ckpt"]
    assert manifest.read(tmp_path / "last.ckpt")["step"] == 20


def test_a_start_sweeps_what_a_save_that_was_cut_off_has_left(tmp_path: Path) -> None:
    directory = CheckpointStore(tmp_path)
    whole = in_store(tmp_path, 20)
    (whole / "shard-00000-01234567.ckpt").write_bytes(b"half")
    temp = tmp_path / ".step-00000030.ckpt.tmp-host-1-ab"
    write_halves(temp)
    (whole / "notes.txt").write_text("mine")
    pointer = tmp_path / ".last.ckpt.tmp-host-1-cd"
    pointer.symlink_to(whole.name)
    swept = directory.sweep(alone=True)
    assert {path.name for path in swept} == {
        temp.name,
        pointer.name,
        "shard-00000-01234567.ckpt",
    }
    assert names(tmp_path) == ["step-00000020.ckpt"]
    assert names(whole) == ["common.ckpt", "notes.txt", "shard-00000.ckpt", "shard-00001.ckpt"]


def test_one_process_that_saves_the_step_again_replaces_it_in_one_step(tmp_path: Path) -> None:
    path = in_store(tmp_path, 30)
    known = json.loads(json.dumps(manifest.read(path)))
    store.write(path, small_state(7.0), {"step": 30, "epoch": known["epoch"]})
    state, facts = store.load(path)
    assert facts["shards"] == {}
    assert state["state_dict"]["weight"][0, 0] == 7
    assert torch.equal(state["state_dict"]["weight"], small_state(7.0)["state_dict"]["weight"])


def test_a_directory_that_fails_to_be_filled_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with files.filling(tmp_path / STEP) as temp:
            (temp / "shard-00000.ckpt").write_bytes(b"half")
            raise CheckpointSaveError("full", tmp_path)

    with pytest.raises(CheckpointSaveError):
        fill()
    assert names(tmp_path) == []


def test_a_file_of_the_same_step_gives_way_to_a_directory(tmp_path: Path) -> None:
    store.write(tmp_path / STEP, small_state(), {"step": 30})
    with files.filling(tmp_path / STEP) as temp:
        write_halves(temp)
    assert manifest.verify(tmp_path / STEP)["world_size"] == 2
    assert names(tmp_path) == [STEP]


def test_a_directory_is_moved_to_another_disk_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = in_store(tmp_path, 30)
    replace = os.replace

    def refusing(source: Path, target: Path) -> None:
        if Path(source) == path:
            raise OSError(18, os.strerror(18))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refusing)
    moved = files.move(path, tmp_path / "elsewhere.ckpt")
    assert manifest.verify(moved)["step"] == 30
    assert names(tmp_path) == ["elsewhere.ckpt"]
