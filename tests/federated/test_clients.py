"""The versions of one client on disk: no Flower."""

import errno
import os
from pathlib import Path

import pytest
import torch
from support.run_dirs import flip, truncate

from savepoint import files
from savepoint.errors import CheckpointSaveError, ClientStateError
from savepoint.federated import listing
from savepoint.federated.clients import ClientStates, Version


def state(value: float) -> dict[str, object]:
    return {
        "state_dict": {"head.weight": torch.full((3, 2), value)},
        "user": {"visits": int(value)},
    }


@pytest.fixture
def states(tmp_path: Path) -> ClientStates:
    return ClientStates([tmp_path / "clients"], 12)


def test_a_version_is_read_back_as_it_was(states: ClientStates) -> None:
    version = states.save(state(1), 5, "run")
    found = states.load(version)
    assert torch.equal(found["state_dict"]["head.weight"], torch.ones(3, 2))
    assert found["user"] == {"visits": 1}
    assert states.directory.name == "partition-00012"


def test_equal_states_have_equal_digests_in_any_run(states: ClientStates, tmp_path: Path) -> None:
    other = ClientStates([tmp_path / "others"], 12)
    assert states.save(state(1), 5, "one") == other.save(state(1), 5, "another")


def test_another_state_under_the_name_is_refused(states: ClientStates) -> None:
    version = states.save(state(1), 5, "run")
    states.save(state(2), 5, "run")
    with pytest.raises(ClientStateError, match=r"client 12 .*another state stands there"):
        states.load(version)


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_a_state_that_is_damaged_or_gone_is_refused_and_no_older_one_taken(
    states: ClientStates, damage
) -> None:
    states.save(state(1), 4, "run")
    version = states.save(state(2), 5, "run", keep=[4])
    damage(states.directory / "step-00000005.ckpt")
    with pytest.raises(ClientStateError, match="client 12"):
        states.load(version)


def test_only_the_versions_that_checkpoints_name_stay(states: ClientStates) -> None:
    for number in (1, 2, 4, 6):
        states.save(state(number), number, "run", keep=[1, 2, 4])
    states.save(state(9), 9, "run", keep=[2, 6])
    assert [number for number, _ in states.versions()] == [2, 6, 9]


def test_a_full_disk_leaves_the_version_of_before(
    states: ClientStates, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = states.save(state(1), 5, "run")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(CheckpointSaveError, match="No space left"):
        states.save(state(2), 6, "run", keep=[5])
    monkeypatch.undo()
    assert states.load(version)["user"] == {"visits": 1}
    assert [path.name for path in states.directory.iterdir()] == ["step-00000005.ckpt"]


def test_what_a_dead_process_was_writing_is_swept_at_the_next_save(states: ClientStates) -> None:
    states.save(state(1), 5, "run")
    (states.directory / ".step-00000006.ckpt.tmp-host-1-ab").write_text("half")
    states.save(state(2), 7, "run")
    assert [path.name for path in states.directory.iterdir()] == ["step-00000007.ckpt"]


def test_a_fork_gets_the_states_of_its_parent_as_links(tmp_path: Path) -> None:
    parent = ClientStates([tmp_path / "parent"], 3)
    version = parent.save(state(1), 5, "run")
    fork = ClientStates([tmp_path / "fork", tmp_path / "parent"], 3)
    target = fork.adopt(version)
    assert target.samefile(parent.directory / "step-00000005.ckpt")
    assert fork.find(version) == target
    assert fork.adopt(version) == target


def test_a_client_of_a_deployment_finds_the_state_of_the_run_before(tmp_path: Path) -> None:
    version = ClientStates([tmp_path / "old"], 3).save(state(1), 5, "old")
    now = ClientStates([tmp_path / "new", tmp_path / "old"], 3)
    assert now.load(version)["user"] == {"visits": 1}
    now.save(state(2), 6, "new")
    assert (tmp_path / "new" / "partition-00003" / "step-00000006.ckpt").exists()


def test_ten_thousand_clients_are_listed_without_opening_a_file(tmp_path: Path) -> None:
    for client in range(200):
        folder = tmp_path / "clients" / f"partition-{client:05d}"
        folder.mkdir(parents=True)
        (folder / "step-00000003.ckpt").touch()
    (tmp_path / "clients" / "notes.txt").touch()
    assert listing.summary(tmp_path) == {"clients": 200, "states": 200, "newest_round": 3}


def test_a_run_without_clients_has_none(tmp_path: Path) -> None:
    assert listing.summary(tmp_path) is None


def test_a_version_is_a_round_and_a_digest() -> None:
    assert Version(3, "ab")._asdict() == {"round": 3, "digest": "ab"}
