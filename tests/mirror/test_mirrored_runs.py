"""Real trainings with a mirror: killed, their directory gone, and on from the mirror alone."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import object_stores
from support.forked import Program, run, without_fsync
from support.object_stores import SERVERS, Server, needs_servers, serving
from support.programs import FOUR_AN_EPOCH, into
from support.small import rows

from savepoint.mirror.remote import connect
from savepoint.testing import difference, final_state

EVERY_STEP = ["--checkpoint.save_every_steps", "1"]


def command(work: Path, url: str | None, *more: str) -> list[str]:
    mirror = ["--checkpoint.mirror", url] if url else []
    return ["train.py", *FOUR_AN_EPOCH, *EVERY_STEP, *into(work / "outputs"), *mirror, *more]


def check_equal(straight: Path, resumed: Path) -> None:
    assert list(without_mirror(difference(final_state(straight), final_state(resumed)))) == []
    assert rows(straight) == rows(resumed)


def without_mirror(differences: Any) -> list[str]:
    """One of the two runs has a mirror, and its config says so."""
    return [one for one in differences if not one.startswith(".config:")]


def train_killed(
    work: Path, url: str, at_step: int, before: Callable[[], None], **env: str
) -> None:
    """A run that is killed once its mirror has a step, and whose directory is then gone."""
    with Program(command(work, url), work / "log", before, **env) as program:
        names = lambda: connect(url).names("run/checkpoints")  # noqa: E731
        program.wait_for(lambda: any(name >= f"step-{at_step:08d}" for name in names()))
        program.kill()
    shutil.rmtree(work / "outputs")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("straight")
    code, said = run(command(work, None), work / "log", without_fsync)
    assert code == 0, said
    return work / "outputs" / "run"


@pytest.mark.parametrize("way", ["--resume auto", "resume.py URL"])
def test_a_run_whose_directory_is_gone_ends_like_one_that_was_never_stopped(
    way: str, straight: Path, tmp_path: Path
) -> None:
    url = f"file://{tmp_path}/cloud"
    train_killed(tmp_path, url, 3, without_fsync)
    again = command(tmp_path, url, "--resume", "auto")
    if way == "resume.py URL":
        again = ["resume.py", f"{url}/run", "--output_dir", str(tmp_path / "outputs")]
    code, said = run(again, tmp_path / "log", without_fsync)
    assert code == 0, said
    assert "Fetched step" in said
    assert said.splitlines()[-1] == f"Step 12 is in the mirror: {url}/run"
    check_equal(straight, tmp_path / "outputs" / "run")


def test_a_signal_uploads_what_it_saves(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/cloud"
    with Program(command(tmp_path, url), tmp_path / "log", without_fsync) as program:
        program.wait_for(lambda: program.saved)
        program.signal(signal.SIGTERM)
        assert program.wait() == 128 + signal.SIGTERM
        last = program.saved[-1]
        lines = program.said.splitlines()
        line = lines.index(f"Step {last} is in the mirror: {url}/run")
        assert [one for one in lines[line + 1 :] if not one.startswith("Stopped by")] == []
    assert not connect(url).names("run").get("lease.json"), "released"


# -- the same with servers -------------------------------------------------------------------------


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    with serving(request.param, tmp_path / "server") as made:
        yield made


def with_s3() -> None:
    without_fsync()
    object_stores.make_importable()


def environment(server: Server) -> dict[str, str]:
    return {name: value for name, value in server.environment.items() if name != "PYTHONPATH"}


@pytest.mark.slow
@needs_servers
def test_a_run_comes_back_out_of_an_s3_server(
    server: Server, straight: Path, tmp_path: Path
) -> None:
    url, env = "s3://bucket/some/prefix", environment(server)
    train_killed(tmp_path, url, 3, with_s3, **env)
    again = command(tmp_path, url, "--resume", "auto")
    with Program(again, tmp_path / "log", with_s3, **env) as program:
        assert program.wait() == 0, program.said
        said = program.said
    assert "Fetched step" in said
    assert ("keeps no If-None-Match" in said) == (server.kind == "rclone")
    assert said.splitlines()[-1] == f"Step 12 is in the mirror: {url}/run", said
    check_equal(straight, tmp_path / "outputs" / "run")


@pytest.mark.slow
@needs_servers
def test_a_run_trains_on_while_its_server_is_gone(
    server: Server, straight: Path, tmp_path: Path
) -> None:
    url, env = "s3://bucket/prefix", environment(server)
    argv = command(tmp_path, url, "--checkpoint.mirror_grace_secs", "1")
    with Program(argv, tmp_path / "log", with_s3, **env) as program:
        program.wait_for(lambda: program.saved)
        server.stop()
        assert program.wait() == 0, program.said
        said = program.said
    assert said.count("It is tried again.") == 1
    assert "the run at step 12" in said.splitlines()[-1]
    check_equal(straight, tmp_path / "outputs" / "run")


@pytest.mark.slow
@needs_servers
def test_a_second_machine_is_refused_while_the_first_trains(server: Server, tmp_path: Path) -> None:
    """By either server: only between two that begin at one moment do their conditions count."""
    url, env = "s3://bucket/prefix", environment(server)
    first = command(tmp_path, url, "--trainer.max_epochs", "2000")
    with Program(first, tmp_path / "log", with_s3, **env) as program:
        program.wait_for(lambda: program.saved)
        program.wait_for(lambda: "step" in str(connect(url).names("run/checkpoints")))
        second = [*first, "--resume", "auto", "--output_dir", str(tmp_path / "other")]
        with Program(second, tmp_path / "log2", with_s3, **env) as other:
            assert other.wait() == 2, other.said
            assert f"held by pid {program.pid} on {os.uname().nodename}" in other.said
        program.signal(signal.SIGTERM)
        assert program.wait() == 128 + signal.SIGTERM
        assert "is in the mirror" in program.said
