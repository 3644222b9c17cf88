"""A mirror of checkpoints in parts: each is there once its common.ckpt is."""

import shutil
from pathlib import Path

import pytest
from support.checkpoint_files import names
from support.mirrors import save, save_parts, steps, uploading, wait_until
from support.programs import LITTLE_SHARDS as LITTLE
from support.programs import into, run
from support.run_dirs import latest, make_run, say
from support.shards import flip
from support.small import difference, final_state, rows

from savepoint.checkpoint import manifest
from savepoint.mirror import held
from savepoint.mirror import remote as remotes
from savepoint.mirror.fetch import fetch
from savepoint.mirror.remote import connect
from savepoint.run import Run

Capture = pytest.CaptureFixture[str]
WHOLE = ["common.ckpt", "shard-00000.ckpt", "shard-00001.ckpt"]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path / "outputs", steps=(10,))


def there(cloud: Path, step: int) -> Path:
    return cloud / "first" / "checkpoints" / f"step-{step:08d}.ckpt"


def test_each_part_arrives_byte_for_byte_and_common_last(
    run_dir: Path, cloud: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    put_file = remotes._Local.put_file
    monkeypatch.setattr(remotes._Local, "put_file", lambda *a: (sent.append(a[2]), put_file(*a))[1])
    with uploading(run_dir, url) as mirror:
        path = save_parts(run_dir, 20)
        mirror.take(path)
    assert [Path(key).name for key in sent if path.name in key] == [*WHOLE[1:], WHOLE[0]]
    for name in WHOLE:
        assert (there(cloud, 20) / name).read_bytes() == (path / name).read_bytes()


def test_without_its_common_part_it_is_not_there_and_the_next_start_sweeps_it(
    run_dir: Path, cloud: Path, url: str
) -> None:
    with uploading(run_dir, url) as mirror:
        mirror.take(save_parts(run_dir, 20))
    (there(cloud, 20) / "common.ckpt").unlink()
    listing = held.listed(connect(url), "first")
    assert ([one.step for one in listing.checkpoints], listing.rejected) == ([10], {})
    shutil.rmtree(run_dir / "checkpoints/step-00000020.ckpt")
    with uploading(run_dir, url):
        pass
    assert not there(cloud, 20).exists()


@pytest.mark.parametrize("damage", ["missing", "shorter"])
def test_one_whose_shard_is_missing_or_shorter_is_no_checkpoint(
    run_dir: Path, cloud: Path, url: str, damage: str
) -> None:
    with uploading(run_dir, url) as mirror:
        mirror.take(save_parts(run_dir, 20))
    shard = there(cloud, 20) / "shard-00001.ckpt"
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-9])
    listing = held.listed(connect(url), "first")
    assert [one.step for one in listing.checkpoints] == [10]
    assert listing.rejected["step-00000020.ckpt"].startswith("shard-00001.ckpt ")


def test_retention_deletes_all_of_one(run_dir: Path, cloud: Path, url: str) -> None:
    with uploading(run_dir, url, keep_last=1, keep_best=0) as mirror:
        for step in (20, 30):
            mirror.take(save_parts(run_dir, step, 100.0 - step))
            wait_until(lambda step=step: mirror.step == step)
    assert names(cloud / "first" / "checkpoints") == ["step-00000030.ckpt"]
    assert names(there(cloud, 30)) == WHOLE


def test_the_step_saved_again_takes_the_place_in_one_step(
    run_dir: Path, cloud: Path, url: str
) -> None:
    with uploading(run_dir, url) as mirror:
        mirror.take(save_parts(run_dir, 20))
    path = save_parts(run_dir, 20, tag="-01234567")
    for one in manifest.superfluous_in(path):
        one.unlink()
    with uploading(run_dir, url) as mirror:
        mirror.take(path)
    assert names(there(cloud, 20)) == names(path)
    assert steps(cloud) == [10, 20]


@pytest.mark.parametrize("now", ["shards", "a file"])
@pytest.mark.parametrize("before", ["shards", "a file"])
def test_another_branch_of_the_step_takes_the_place(
    run_dir: Path, cloud: Path, url: str, before: str, now: str
) -> None:
    kinds = {"shards": save_parts, "a file": save}
    with uploading(run_dir, url) as mirror:
        mirror.take(kinds[before](run_dir, 20, 0.25))
    path = run_dir / "checkpoints/step-00000020.ckpt"
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    kinds[now](run_dir, 20, 0.75)
    with uploading(run_dir, url) as mirror:
        mirror.take(path)
    assert manifest.verify(there(cloud, 20)) == manifest.verify(path)
    assert there(cloud, 20).is_dir() == (now == "shards")


def test_a_run_is_fetched_whole(run_dir: Path, cloud: Path, url: str, tmp_path: Path) -> None:
    with uploading(run_dir, url) as mirror:
        path = save_parts(run_dir, 20)
        mirror.take(path)
    fetched = fetch(f"{url}/first", tmp_path / "elsewhere")
    assert manifest.verify(fetched / "checkpoints" / path.name) == manifest.verify(path)
    assert names(fetched / "checkpoints" / path.name) == WHOLE
    assert manifest.read(fetched / "checkpoints/last.ckpt")["step"] == 20


def test_a_whole_one_takes_the_place_of_a_damaged_directory(
    run_dir: Path, cloud: Path, url: str
) -> None:
    with uploading(run_dir, url) as mirror:
        path = save_parts(run_dir, 20)
        mirror.take(path)
    (path / "shard-00000.ckpt").unlink()
    fetch(f"{url}/first", run_dir.parent)
    assert manifest.verify(path) == manifest.verify(there(cloud, 20))


def test_a_damaged_shard_is_named_and_the_one_before_taken(
    run_dir: Path, cloud: Path, url: str, tmp_path: Path, capsys: Capture
) -> None:
    with uploading(run_dir, url) as mirror:
        mirror.take(save_parts(run_dir, 20))
    flip(there(cloud, 20) / "shard-00001.ckpt")
    fetched = fetch(f"{url}/first", tmp_path / "elsewhere")
    assert latest(fetched).step == 10
    said = capsys.readouterr().out
    assert "step-00000020.ckpt in the mirror does not verify: shard-00001.ckpt: one or" in said
    assert Run(fetched).id() == Run(run_dir).id()


def test_commands_read_it_by_its_url(run_dir: Path, cloud: Path, url: str, capsys: Capture) -> None:
    with uploading(run_dir, url) as mirror:
        mirror.take(save_parts(run_dir, 20))
    code, said, _ = say(capsys, "ls", f"{url}/first")
    assert (code, "yes, 2 shards" in said) == (0, True)
    code, said, _ = say(capsys, "show", f"{url}/first")
    assert (code, "shard-00001.ckpt" in said) == (0, True)
    for place in (f"{url}/first", f"{url}/first/checkpoints/step-00000020.ckpt"):
        assert say(capsys, "verify", place)[0] == 0
    flip(there(cloud, 20) / "shard-00000.ckpt")
    code, said, _ = say(capsys, "verify", f"{url}/first")
    assert code == 1
    assert "shard-00000.ckpt" in said


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_from_its_mirror_and_ends_as_the_straight_one(
    url: str, tmp_path: Path
) -> None:
    def train(script: str, *words: str) -> None:
        done = run(script, *words)
        assert done.returncode == 0, done.stdout + done.stderr

    # Any other schedule is stretched over all steps: two epochs would be no beginning of four.
    little = [*LITTLE, "--model.schedule", "constant"]
    train("train.py", *little, *into(tmp_path / "straight"))
    mirrored = ["--checkpoint.mirror", url, "--checkpoint.async_save", "true"]
    first = ["--trainer.max_epochs", "2", *into(tmp_path / "first")]
    train("train.py", *little, *mirrored, *first)
    shutil.rmtree(tmp_path / "first")
    train(
        "resume.py", f"{url}/run", "--trainer.max_epochs", "4", "--output_dir", f"{tmp_path}/second"
    )
    straight, second = tmp_path / "straight/run", tmp_path / "second/run"
    assert len(latest(second).manifest["shards"]) == 2
    differing = list(difference(final_state(straight), final_state(second)))
    assert [one.partition(":")[0] for one in differing] == [".config"]  # which has no mirror
    assert rows(straight) == rows(second)
