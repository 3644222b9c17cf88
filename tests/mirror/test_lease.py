"""Two processes, one mirror: one goes on."""

import json
import os
import uuid
from pathlib import Path
from typing import Any

import pytest
from support.mirrors import wait_until

from savepoint.errors import RunLockedError
from savepoint.mirror import lease
from savepoint.mirror.lease import Lease
from savepoint.mirror.remote import Remote, connect


@pytest.fixture(params=["file", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Remote:
    if request.param == "file":
        return connect(f"file://{tmp_path}/cloud")
    return connect(f"memory://{uuid.uuid4().hex}/cloud")


def content(place: Remote) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(place.read("run/lease.json"))
    return found


def left_behind(place: Remote, **more: Any) -> None:
    """The lease of a process that was killed, on a machine that is gone."""
    gone = {"token": "theirs", "number": 7, "secs": 0.5, "host": "gone", "pid": 5, "boot_id": "x"}
    place.put("run/lease.json", json.dumps(gone | more).encode())


def test_a_second_process_is_refused_while_the_first_renews(place: Remote) -> None:
    first = Lease(place, "run", 0.5)
    first.take()
    with pytest.raises(RunLockedError, match=f"held by pid {os.getpid()} on"):
        Lease(place, "run", 0.5).take()
    first.release()


def test_a_released_lease_is_free_at_once(
    place: Remote, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Lease(place, "run")
    first.take()
    first.release()
    assert place.names("run") == {}
    second = Lease(place, "run")
    second.take()
    second.release()
    assert capsys.readouterr().out == ""


def test_the_lease_of_a_machine_that_is_gone_is_taken_after_its_length(
    place: Remote, capsys: pytest.CaptureFixture[str]
) -> None:
    left_behind(place)
    mine = Lease(place, "run", 0.5)
    mine.take()
    assert content(place)["pid"] == os.getpid()
    assert "for pid 5 on gone, which holds the mirror" in capsys.readouterr().out
    mine.release()


def test_that_of_a_process_that_died_on_this_machine_is_free_at_once(
    place: Remote, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lease, "boot_id", lambda: "this boot")
    here = {"host": lease.socket.gethostname(), "boot_id": "this boot", "pid": 2**22 + 1}
    left_behind(place, **here)
    mine = Lease(place, "run", 3600)
    mine.take()
    mine.release()
    assert capsys.readouterr().out == ""


def test_who_has_lost_its_lease_knows_and_leaves_that_of_the_other(place: Remote) -> None:
    mine = Lease(place, "run", 0.2)
    mine.take()
    left_behind(place)
    wait_until(lambda: mine.lost)
    assert mine.lost == "pid 5 on gone"
    mine.release()
    assert content(place)["token"] == "theirs"


def test_a_lease_that_somebody_deleted_is_written_again(place: Remote) -> None:
    mine = Lease(place, "run")
    mine.take()
    place.delete("run/lease.json")
    mine.check()
    assert not mine.lost
    assert content(place)["pid"] == os.getpid()
    mine.release()


def test_a_damaged_lease_is_one_of_nobody(place: Remote) -> None:
    place.put("run/lease.json", b"{")
    mine = Lease(place, "run", 0.3)
    mine.take()
    assert content(place)["pid"] == os.getpid()
    mine.release()
