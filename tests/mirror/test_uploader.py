"""A run is uploaded while it trains; no training is needed for it."""

import json
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.mirrors import Outage, save, steps, uploading, wait_until
from support.run_dirs import flip, latest, make_run

from savepoint.checkpoint import manifest
from savepoint.errors import (
    ConfigError,
    ConfigMismatchError,
    MirrorError,
    RunExistsError,
    RunLockedError,
)
from savepoint.mirror import remote as remotes
from savepoint.mirror import uploader
from savepoint.mirror.lease import Lease
from savepoint.mirror.settings import Mirroring


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Its newest is step 10, and its best."""
    made = make_run(tmp_path / "outputs", steps=(10,))
    (made / "metrics.csv").write_text("step,loss\n1,0.5\n2,0.25\n")
    return made


def test_a_checkpoint_arrives_byte_for_byte_with_the_records_that_it_counts(
    run_dir: Path, cloud: Path, url: str
) -> None:
    with uploading(run_dir, url) as mirror:
        path = save(run_dir, 20)
        mirror.take(path)
    there = cloud / "first"
    assert (there / "checkpoints" / path.name).read_bytes() == path.read_bytes()
    for name in ("metrics.csv", "run.json", "config.yaml"):
        assert (there / name).read_bytes() == (run_dir / name).read_bytes()
    assert sorted(one.name for one in there.iterdir()) == [
        "checkpoints", "config.yaml", "metrics.csv", "run.json",
    ]  # fmt: skip


def test_a_row_that_is_being_written_is_left_out(run_dir: Path, cloud: Path, url: str) -> None:
    with (run_dir / "metrics.csv").open("a") as log:
        log.write("3,0.1")
    with uploading(run_dir, url) as mirror:
        mirror.take(save(run_dir, 20))
    assert (cloud / "first" / "metrics.csv").read_text() == "step,loss\n1,0.5\n2,0.25\n"


def test_the_log_goes_before_the_checkpoint_that_counts_its_rows(
    run_dir: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    put, put_file = remotes._Local.put, remotes._Local.put_file
    monkeypatch.setattr(remotes._Local, "put", lambda *a, **k: (sent.append(a[1]), put(*a, **k))[1])
    monkeypatch.setattr(remotes._Local, "put_file", lambda *a: (sent.append(a[2]), put_file(*a))[1])
    with uploading(run_dir, url) as mirror:
        mirror.take(save(run_dir, 20))
    checkpoint = next(key for key in sent if key.endswith(".ckpt"))
    assert sent.index("first/metrics.csv") < sent.index(checkpoint)


def test_the_newest_goes_next_and_those_between_are_left_out(
    run_dir: Path, cloud: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, goes_on = threading.Event(), threading.Event()
    put_file, names = remotes._Local.put_file, []

    def slow(one: Any, path: Path, key: str) -> None:
        names.append(path.name)
        begun.set()
        goes_on.wait()
        put_file(one, path, key)

    monkeypatch.setattr(remotes._Local, "put_file", slow)
    with uploading(run_dir, url, keep_last=9) as mirror:
        mirror.take(save(run_dir, 20))
        begun.wait()
        for step in (30, 40, 50):
            mirror.take(save(run_dir, step))
        goes_on.set()
    assert names[:2] == ["step-00000020.ckpt", "step-00000050.ckpt"]
    assert steps(cloud) == [10, 20, 50], "and the best, which nobody has handed over"


def test_every_nth_is_uploaded_and_the_last(run_dir: Path, cloud: Path, url: str) -> None:
    with uploading(run_dir, url, every=2, keep_last=9, keep_best=0) as mirror:
        for step in (20, 30, 40):
            mirror.take(save(run_dir, step))
            wait_until(lambda step=step: step != 30 or mirror.step == 30)
        assert steps(cloud) == [30]
    assert steps(cloud) == [30, 40]


def test_a_mirror_has_a_retention_of_its_own(run_dir: Path, cloud: Path, url: str) -> None:
    with uploading(run_dir, url, keep_last=2) as mirror:
        mirror.catch_up()
        for step in (20, 30, 40, 50):
            mirror.take(save(run_dir, step))
            wait_until(lambda step=step: mirror.step == step)
    assert steps(cloud) == [10, 40, 50], "the best, and the two newest"


def test_what_another_has_put_there_is_never_deleted(run_dir: Path, cloud: Path, url: str) -> None:
    other = make_run(cloud.parent / "others", "other", steps=(15, 16))
    there = cloud / "first" / "checkpoints"
    there.mkdir(parents=True)
    foreign = latest(other).path
    (there / foreign.name).write_bytes(foreign.read_bytes())
    (there / "step-00000007.ckpt").write_bytes(b"no checkpoint")
    (there / "notes.txt").write_text("mine")
    with uploading(run_dir, url, keep_last=1) as mirror:
        for step in (20, 30):
            mirror.take(save(run_dir, step))
            wait_until(lambda step=step: mirror.step == step)
    names = {path.name for path in there.iterdir()}
    assert names >= {foreign.name, "step-00000007.ckpt", "notes.txt"}
    assert "step-00000020.ckpt" not in names


def test_the_one_that_was_resumed_from_is_never_deleted(
    run_dir: Path, cloud: Path, url: str
) -> None:
    save(run_dir, 20, score=90.0)
    with uploading(run_dir, url) as mirror:
        mirror.catch_up()
        wait_until(lambda: mirror.step == 20)
    digest = latest(run_dir).manifest["digest"]
    with uploading(run_dir, url, keep_last=1, resumed=digest) as mirror:
        for step in (30, 40):
            mirror.take(save(run_dir, step))
            wait_until(lambda step=step: mirror.step == step)
    assert steps(cloud) == [10, 20, 40]


def test_an_outage_is_said_once_and_its_end(
    run_dir: Path,
    cloud: Path,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    outage = Outage(monkeypatch)
    with uploading(run_dir, url) as mirror:
        outage.on = True
        mirror.take(save(run_dir, 20))
        wait_until(lambda: outage.asked > 3)
        said = json.loads((run_dir / "mirror.json").read_text())
        assert (said["step"], "an outage" in said["failure"]) == (None, True)
        outage.on = False
        wait_until(lambda: mirror.step == 20)
    error = capsys.readouterr().err.splitlines()
    assert error == [
        "No access to the mirror: an outage. Training goes on. It is tried again.",
        f"The mirror is there again, and is at step 20: {url}/first",
    ]
    assert steps(cloud) == [10, 20]
    assert json.loads((run_dir / "mirror.json").read_text())["failure"] is None


def test_the_last_line_says_what_is_in_the_mirror(
    run_dir: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with uploading(run_dir, url) as mirror:
        mirror.take(save(run_dir, 20))
    assert capsys.readouterr().out.splitlines()[-1] == f"Step 20 is in the mirror: {url}/first"


def test_the_last_line_says_where_a_mirror_is_that_is_not_reached(
    run_dir: Path, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outage = Outage(monkeypatch)
    with uploading(run_dir, url, grace_secs=0.2) as mirror:
        mirror.catch_up()
        wait_until(lambda: mirror.step == 10)
        outage.on = True
        mirror.take(save(run_dir, 20))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        f"The mirror is at step 10, the run at step 20: {url}/first. "
        "No access to the mirror: an outage."
    )


def test_an_upload_that_is_cut_short_does_not_count_and_is_made_again(
    run_dir: Path, cloud: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a server that says it has all of it."""
    Outage(monkeypatch)
    put_file, cut = remotes._Local.put_file, []

    def cutting(one: Any, path: Path, key: str) -> None:
        put_file(one, path, key)
        if not cut:
            cut.append(key)
            there = cloud / key
            there.write_bytes(there.read_bytes()[:-100])

    monkeypatch.setattr(remotes._Local, "put_file", cutting)
    with uploading(run_dir, url) as mirror:
        mirror.take(save(run_dir, 20))
        wait_until(lambda: mirror.step == 20)
    assert cut
    assert steps(cloud) == [10, 20]


def test_what_rots_on_the_disk_before_its_upload_is_carried_no_further(
    run_dir: Path, cloud: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Outage(monkeypatch)
    with uploading(run_dir, url, grace_secs=0.1) as mirror:
        path = save(run_dir, 20)
        path.write_bytes(path.read_bytes()[:-10])
        mirror.take(path)
    assert not list((cloud / "first").rglob("step-00000020.ckpt"))


def test_the_same_checkpoint_is_not_uploaded_twice(
    run_dir: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with uploading(run_dir, url) as mirror:
        mirror.catch_up()
    monkeypatch.setattr(remotes._Local, "put_file", lambda *_: pytest.fail("uploaded again"))
    with uploading(run_dir, url) as mirror:
        mirror.catch_up()
    assert mirror.step == 10


def test_a_new_run_refuses_a_mirror_that_is_not_reached(
    run_dir: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Outage(monkeypatch).on = True
    with (
        pytest.raises(MirrorError, match=r"an outage.* --checkpoint\.mirror null"),
        uploading(run_dir, url, is_new=True),
    ):
        pass


def test_a_run_that_goes_on_does_not_wait_for_its_mirror(
    run_dir: Path, cloud: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outage = Outage(monkeypatch)
    outage.on = True
    with uploading(run_dir, url) as mirror:
        mirror.catch_up()
        outage.on = False
        wait_until(lambda: mirror.step == 10)
    assert steps(cloud) == [10]


def test_the_name_of_another_run_is_taken_in_the_mirror(
    run_dir: Path, tmp_path: Path, url: str
) -> None:
    with uploading(run_dir, url) as mirror:
        mirror.catch_up()
    other = make_run(tmp_path / "elsewhere", steps=(10,))
    with pytest.raises(RunExistsError, match="taken in the mirror"), uploading(other, url):
        pass


def test_a_mirror_that_is_ahead_is_refused_and_one_whose_newest_is_damaged_is_not(
    run_dir: Path, cloud: Path, url: str
) -> None:
    path = save(run_dir, 20)
    with uploading(run_dir, url) as mirror:
        mirror.take(path)
    path.unlink()
    refused = "step 20 in .*, step 10 in"
    with pytest.raises(ConfigMismatchError, match=refused), uploading(run_dir, url):
        pass
    flip(cloud / "first" / "checkpoints" / path.name)
    with uploading(run_dir, url) as mirror:
        mirror.take(save(run_dir, 15))
    assert steps(cloud) == [10, 15], "the damaged one is of a branch that is no more"


def test_a_rewind_takes_its_later_checkpoints_out_of_the_mirror(
    run_dir: Path, cloud: Path, url: str
) -> None:
    later = save(run_dir, 20)
    with uploading(run_dir, url) as mirror:
        mirror.take(later)
    later.unlink()
    with uploading(run_dir, url, rewinds=True) as mirror:
        mirror.catch_up()
    assert steps(cloud) == [10]


def test_a_mirror_that_was_taken_over_gets_nothing_more(
    run_dir: Path, cloud: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with uploading(run_dir, url, keep_best=0) as mirror:
        mirror.catch_up()
        wait_until(lambda: mirror.step == 10 and mirror._wanted is None)
        (cloud / "first" / "lease.json").write_text('{"token": "theirs", "pid": 5, "host": "far"}')
        mirror.take(save(run_dir, 20))
    captured = capsys.readouterr()
    assert "held by pid 5 on far. Nothing more is uploaded" in captured.err
    assert captured.out.splitlines()[-1].startswith("The mirror is at step 10, the run at step 20")
    assert steps(cloud) == [10]


def test_a_second_uploader_is_refused(
    run_dir: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploader, "Lease", partial(Lease, secs=0.5))
    with (
        uploading(run_dir, url),
        pytest.raises(RunLockedError, match="Another process uploads to this mirror"),
        uploading(run_dir, url),
    ):
        pass


def test_a_handover_does_no_work(run_dir: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands in a save."""
    with uploading(run_dir, url) as mirror:
        monkeypatch.setattr(manifest, "read", lambda *_: pytest.fail("read in a save"))
        monkeypatch.setattr(remotes, "connect", lambda *_: pytest.fail("asked in a save"))
        with mirror._changed:  # the thread cannot go on
            mirror._newest = mirror.directory / "checkpoints" / "step-00000010.ckpt"
            mirror.take(mirror._newest)
        monkeypatch.undo()


@pytest.mark.parametrize("wrong", [{"every": 0}, {"grace_secs": -1}, {"keep_last": -1}])
def test_a_setting_that_means_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Mirroring("file:///tmp/x", **wrong)


def test_an_upload_that_its_time_runs_out_for_is_left_and_its_thread_ends(
    run_dir: Path, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr(remotes._Local, "put_file", lambda *_: goes_on.wait())
    with uploading(run_dir, url, grace_secs=0.1) as mirror:
        mirror.catch_up()
    assert "The mirror has nothing of it, the run at step 10" in capsys.readouterr().out
    goes_on.set()
    wait_until(lambda: not [one for one in threading.enumerate() if one.name.startswith("mirror")])


def test_a_run_that_hands_nothing_over_is_uploaded_at_its_end(
    run_dir: Path, cloud: Path, url: str
) -> None:
    """One that had ended, and is only tested again."""
    with uploading(run_dir, url):
        pass
    assert steps(cloud) == [10]
