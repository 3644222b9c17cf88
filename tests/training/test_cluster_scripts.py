"""The scripts of configs/cluster/, run as they are: hosts and spot machines that are pretended on
this one. That of SLURM is in test_slurm.py.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.limits import HANG_SECS
from support.programs import PLAIN, ROOT, into
from support.small import difference, final_state, rows
from support.torchruns import kill_a_rank

SCRIPTS = sorted(path.name for path in (ROOT / "configs/cluster").iterdir())
BINARIES = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def begin(script: str, *words: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(ROOT / "configs/cluster" / script), *words],
        env=os.environ | {"PATH": BINARIES, "OMP_NUM_THREADS": "1"} | variables,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    said = process.communicate(timeout=HANG_SECS)[0]
    return process.returncode, said


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_has_nothing_to_say(script: str) -> None:
    done = subprocess.run(
        ["shellcheck", ROOT / "configs/cluster" / script], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("script", "words", "missing"),
    [
        ("torchrun.sh", [], "the name of the run is missing"),
        ("torchrun.sh", ["NAME"], "HOSTS"),
        ("spot.sh", [], "the name of the run is missing"),
        ("spot.sh", ["NAME"], "MIRROR"),
    ],
)
def test_what_a_script_is_not_told_it_asks_for(script: str, words: list[str], missing: str) -> None:
    code, said = end(begin(script, *words))
    assert code != 0
    assert missing in said


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def on_two_hosts(outputs: Path, *, kill: bool = False) -> list[str]:
    """Trains one run; the rank of the second is killed. Returns what each has said."""
    words = ["run", *PLAIN, "--model.net", "ClassicNet", "--trainer.accelerator", "cpu", "--trainer.strategy", "ddp",
             "--checkpoint.save_every_steps", "2", "--output_dir", str(outputs)]  # fmt: skip
    first = f"127.0.0.1:{free_port()}"
    variables = {"HOSTS": "2", "RANKS": "1", "FIRST": first, "ADDRESS": "127.0.0.1"}
    hosts = [begin("torchrun.sh", *words, **variables) for _ in range(2)]
    if kill:
        kill_a_rank(hosts[1].pid, outputs / "run")
    said = [end(host) for host in hosts]
    assert [code for code, _ in said] == [0, 0], said
    return [text for _, text in said]


@pytest.mark.slow
def test_of_a_run_on_two_hosts_one_rank_is_killed_and_the_end_is_that_of_the_straight_run(
    tmp_path: Path,
) -> None:
    on_two_hosts(tmp_path / "straight")
    said = on_two_hosts(tmp_path / "killed", kill=True)
    assert "failed (exitcode: -9)" in said[1]
    assert "Resume " in "".join(said)
    straight, killed = (tmp_path / outputs / "run" for outputs in ("straight", "killed"))
    assert list(difference(final_state(straight), final_state(killed))) == []
    assert rows(straight) == rows(killed)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["a signal", "a notice"])
def test_a_spot_machine_that_goes_is_followed_by_another_that_ends_the_run(
    tmp_path: Path, how: str
) -> None:
    words = [*PLAIN, "--checkpoint.save_every_steps", "1"]
    straight = [sys.executable, "train.py", *words, *into(tmp_path / "straight")]
    subprocess.run(straight, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    variables = {
        "MIRROR": f"file://{tmp_path}/cloud",
        "NOTICE": f"test -e {tmp_path}/notice",
        "EVERY_SECS": "0.1",
    }

    def machine(number: int) -> subprocess.Popen[str]:
        outputs = str(tmp_path / f"machine-{number}")
        return begin("spot.sh", "run", *words, "--output_dir", outputs, **variables)

    first = machine(1)
    until = time.monotonic() + HANG_SECS
    while not list(tmp_path.glob("machine-1/run/checkpoints/step-*.ckpt")):
        assert first.poll() is None, end(first)
        assert time.monotonic() < until
        time.sleep(0.02)
    if how == "a signal":
        first.send_signal(signal.SIGTERM)
    else:
        (tmp_path / "notice").touch()
    code, said = end(first)
    assert code == 143, said
    assert "is in the mirror" in said
    shutil.rmtree(tmp_path / "machine-1")
    (tmp_path / "notice").unlink(missing_ok=True)
    code, said = end(machine(2))
    assert code == 0, said
    assert "Fetched step" in said
    finished = tmp_path / "machine-2" / "run"
    differing = list(difference(final_state(tmp_path / "straight/run"), final_state(finished)))
    assert [one.partition(":")[0] for one in differing] == [".config"]  # which has no mirror
    assert rows(tmp_path / "straight/run") == rows(finished)
