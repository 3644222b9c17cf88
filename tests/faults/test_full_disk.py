"""Disks that fill up or cannot be written, under a real training of 14 MB of state.

    python -m pytest -n 0 -m root -s tests/faults/test_full_disk.py

Whatever happens: no damaged file under a final name, the checkpoints before it load, each save that
failed is said, the process ends with 1 unless a later save succeeded, and the same command goes on
once the disk is mended, to the very end that an undisturbed run reaches.
"""

import contextlib
import errno
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.filesystems import Disk, command, disk, enter_private_namespace, fill
from support.forked import Program, run, without_privileges
from support.small import difference, final_state, rows

from savepoint.checkpoint import manifest, store

pytestmark = pytest.mark.root

TRAINING = [
    "train.py", "--data", "configs/data/digits.yaml", "--data.batch_size", "16", "--model", "configs/model/classic.yaml",
    "--trainer.limit_train_batches", "12", "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1",
    "--checkpoint.save_every_steps", "4", "--checkpoint.keep_last", "1", "--resume", "auto",
]  # fmt: skip
DUE = {4, 8, 12, 16, 20, 24}
KEEP_ALL, KEEP_THREE = ["--checkpoint.keep_every_n_steps", "1"], ["--checkpoint.keep_last", "3"]
# Takes each byte that becomes free.
NEIGHBOUR = """
import sys
with open(sys.argv[1], "ab", buffering=0) as file:
    while True:
        for size in (65536, 4096, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                pass
"""


@pytest.fixture(scope="module", autouse=True)
def mounts() -> None:
    enter_private_namespace()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, mounts: None) -> Path:
    """The same training, undisturbed."""
    run_dir = tmp_path_factory.mktemp("outputs") / "straight"
    code, said = run(training(run_dir), run_dir.parent / "log")
    assert code == 0, said
    assert {int(step) for step in re.findall(r"saved step-(\d+)", said)} == DUE
    return run_dir


def training(run_dir: Path, *more: str) -> list[str]:
    return [*TRAINING, "--output_dir", str(run_dir.parent), "--run_name", run_dir.name, *more]


@contextmanager
def held(program: Program, saves: int) -> Iterator[None]:
    """The program does not move, from its `saves`-th reported save on."""
    program.wait_for(lambda: len(program.saved) >= saves)
    program.signal(signal.SIGSTOP)
    time.sleep(0.05)
    yield
    program.signal(signal.SIGCONT)


def check_whole(run_dir: Path, reported: list[int], straight: Path) -> int:
    """No file under a final name is damaged, the newest reported one is there, and no row that it
    counts is missing.
    """
    found = [manifest.verify(path)["step"] for path in (run_dir / "checkpoints").glob("*.ckpt")]
    assert found
    assert max(found) >= max(reported)
    state, _ = store.load(run_dir / f"checkpoints/step-{max(found):08d}.ckpt")
    assert rows(run_dir)[: state["logged_rows"]] == rows(straight)[: state["logged_rows"]]
    return max(found)


def check_failed(run_dir: Path, program: Program, straight: Path) -> None:
    """The run has ended: 1, each save that was due is reported or said to have failed, what was
    there is whole.
    """
    assert program.wait() == 1, program.said
    assert "Traceback" not in program.said
    assert "Error:" not in program.said
    assert "The newest state of this run is not saved" in program.said
    failed = {
        int(step)
        for step in re.findall(r"(?:failed|before the save): \S*step-(\d+)\.ckpt", program.said)
    }
    assert failed
    assert failed | set(program.saved) == DUE, program.said
    check_whole(run_dir, program.saved, straight)


def check_goes_on(run_dir: Path, log: Path, straight: Path, *more: str) -> None:
    """The same command now ends as the undisturbed run did."""
    before = max(one.step for one in store.CheckpointStore(run_dir / "checkpoints").checkpoints())
    code, said = run(training(run_dir, *more), log)
    assert code == 0, said
    assert f"from step-{before:08d}.ckpt" in said
    check_same(run_dir, said, straight)


def check_same(run_dir: Path, said: str, straight: Path) -> None:
    assert "Traceback" not in said
    one, other = final_state(straight) | {"config": ""}, final_state(run_dir) | {"config": ""}
    assert list(difference(one, other)) == []
    assert rows(straight) == rows(run_dir)
    assert not list(run_dir.rglob(".*tmp*"))


def check_refused(code: int, said: str, *names: str) -> None:
    """Before the first step, in a few lines that name what cannot be written."""
    assert code == 2, said
    assert all(name in said for name in names), said
    assert "saved step" not in said
    assert "Traceback" not in said
    assert (
        len(
            [
                line
                for line in said.splitlines()
                if not line.startswith(("Run ", "training from", "Resume "))
            ]
        )
        <= 5
    )


# -- full ----------------------------------------------------------------------------------------


def test_on_a_disk_that_fills_up_what_is_there_stays_whole(tmp_path: Path, straight: Path) -> None:
    with disk(tmp_path, "ext4", 64) as made:
        run_dir = made.directory / "run"
        with Program(training(run_dir, *KEEP_ALL), tmp_path / "log") as program:
            check_failed(run_dir, program, straight)
        assert len(program.saved) == 3
        for step in program.saved[:2]:
            (run_dir / f"checkpoints/step-{step:08d}.ckpt").unlink()
        check_goes_on(run_dir, tmp_path / "log", straight)


def test_a_run_that_filled_its_disk_goes_on_when_it_is_told_to_keep_fewer(
    tmp_path: Path, straight: Path
) -> None:
    with disk(tmp_path, "ext4", 64) as made:
        run_dir = made.directory / "run"
        assert run(training(run_dir, *KEEP_ALL), tmp_path / "log")[0] == 1
        check_goes_on(run_dir, tmp_path / "log", straight)


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_neighbour_who_takes_each_byte_that_is_freed_harms_no_checkpoint(
    tmp_path: Path, straight: Path, kind: str
) -> None:
    with disk(tmp_path, kind, 80) as made:
        run_dir, taken = made.directory / "run", made.directory / "neighbour"
        with Program(training(run_dir), tmp_path / "log") as program:
            # The log has all its columns: what meets the full disk is a save.
            with held(program, 4):
                neighbour = subprocess.Popen([sys.executable, "-S", "-c", NEIGHBOUR, taken])
                time.sleep(0.5)
            try:
                check_failed(run_dir, program, straight)
            finally:
                neighbour.kill()
                neighbour.wait()
        taken.unlink()
        check_goes_on(run_dir, tmp_path / "log", straight)


def test_a_disk_without_room_for_the_weights_is_refused_with_figures(tmp_path: Path) -> None:
    with disk(tmp_path, "ext4", 16) as made:
        code, said = run(training(made.directory / "run"), tmp_path / "log")
        check_refused(code, said, str(made.directory), "MB free", "Expected 14.")
        assert sorted(path.name for path in made.directory.iterdir()) == ["lost+found"]


def test_a_disk_without_room_for_the_optimizer_too_is_warned_of_with_figures(
    tmp_path: Path, straight: Path
) -> None:
    with disk(tmp_path, "ext4", 24) as made:
        with Program(training(made.directory / "run"), tmp_path / "log") as program:
            check_failed(made.directory / "run", program, straight)
        first = program.said[: program.said.index("saved step")]
        assert re.search(
            r"Perhaps too little room .* has [\d.]+ MB free. Expected 43\.. MB", first
        ), program.said


def test_a_resume_on_a_full_disk_is_refused_and_changes_nothing(
    tmp_path: Path, straight: Path
) -> None:
    with disk(tmp_path, "ext4", 80) as made:
        run_dir, ballast = stopped(tmp_path, made.directory / "run"), made.directory / "ballast"
        fill(ballast)
        before = contents(run_dir)
        code, said = run(training(run_dir), tmp_path / "log")
        check_refused(code, said, str(run_dir))
        assert re.search(r"No space left|\b0.0 MB free", said), said
        assert before.items() <= contents(run_dir).items()
        ballast.unlink()
        check_goes_on(run_dir, tmp_path / "log", straight)


@pytest.mark.parametrize("later", ["false", "true"])
def test_a_disk_that_is_full_only_for_a_while_costs_nothing(
    tmp_path: Path, straight: Path, later: str
) -> None:
    with disk(tmp_path, "ext4", 80) as made:
        run_dir, ballast = made.directory / "run", made.directory / "ballast"
        with Program(
            training(run_dir, "--checkpoint.async_save", later), tmp_path / "log"
        ) as program:
            with held(program, 2):
                fill(ballast)
            program.wait_for(
                lambda: "Saving failed" in program.said or "before the save" in program.said
            )
            ballast.unlink()
            assert program.wait() == 0, program.said
        assert program.saved[-1] == 24
        check_same(run_dir, program.said, straight)


def test_output_into_a_file_on_the_full_disk_ends_no_training(
    tmp_path: Path, straight: Path
) -> None:
    with disk(tmp_path, "ext4", 80) as made:
        run_dir, ballast = made.directory / "run", made.directory / "ballast"
        with Program(training(run_dir), made.directory / "log") as program:
            with held(program, 2):
                fill(ballast)
            time.sleep(0.5)
            ballast.unlink()
            assert program.wait() == 0, program.said
        check_same(run_dir, program.said, straight)


def test_what_retention_lets_go_anyway_makes_room_on_a_full_disk(
    tmp_path: Path, straight: Path
) -> None:
    with disk(tmp_path, "ext4", 100) as made:
        run_dir, ballast = made.directory / "run", made.directory / "ballast"
        with Program(training(run_dir, *KEEP_THREE), tmp_path / "log") as program:
            with held(program, 4):
                fill(ballast)
                os.truncate(ballast, ballast.stat().st_size - (1 << 20))  # for the log
            program.wait_for(lambda: 20 in program.saved)
            ballast.unlink()
            assert program.wait() == 0, program.said
        assert "Saving failed" not in program.said
        check_same(run_dir, program.said, straight)


def test_a_signal_on_a_full_disk_leaves_with_its_code_and_says_what_is_lost(
    tmp_path: Path, straight: Path
) -> None:
    with disk(tmp_path, "ext4", 80) as made:
        run_dir, ballast = made.directory / "run", made.directory / "ballast"
        with Program(training(run_dir), tmp_path / "log") as program:
            with held(program, 2):
                fill(ballast)
                program.signal(signal.SIGTERM)
            assert program.wait() == 143, program.said
        assert "Traceback" not in program.said
        assert re.search(r"Saved at step 8, \d+ steps? lost. Continue with", program.said), (
            program.said
        )
        check_whole(run_dir, program.saved, straight)
        ballast.unlink()
        check_goes_on(run_dir, tmp_path / "log", straight)


def test_a_disk_without_inodes_is_as_full_as_any(tmp_path: Path, straight: Path) -> None:
    with disk(tmp_path, "ext4", 80, "-N", "64") as made:
        run_dir, others = made.directory / "run", made.directory / "others"
        others.mkdir()
        with Program(training(run_dir), tmp_path / "log") as program:
            with held(program, 2):
                take_inodes(others)
            check_failed(run_dir, program, straight)
        for path in others.iterdir():
            path.unlink()
        check_goes_on(run_dir, tmp_path / "log", straight)


def take_inodes(directory: Path) -> None:
    with contextlib.suppress(OSError):
        for number in range(1000):
            (directory / str(number)).touch()


def test_a_temporary_directory_that_is_too_small_for_a_checkpoint_is_harmless(
    tmp_path: Path, straight: Path
) -> None:
    with disk(tmp_path, "tmpfs", 8) as made:
        run_dir = tmp_path / "outputs" / "run"
        with Program(training(run_dir), tmp_path / "log", TMPDIR=str(made.directory)) as program:
            assert program.wait() == 0, program.said
        check_same(run_dir, program.said, straight)
        assert not list(made.directory.glob("*.ckpt*"))


# -- quota ---------------------------------------------------------------------------------------


def test_a_project_quota_is_a_full_disk(tmp_path: Path, straight: Path) -> None:
    with disk(tmp_path, "xfs", 320) as made:
        demand_quota(made, "prjquota")
        limited = made.directory / "limited"
        limited.mkdir()
        quota(made.directory, f"project -s -p {limited} 42", "limit -p bhard=56m 42")
        with Program(training(limited / "run", *KEEP_ALL), tmp_path / "log") as program:
            check_failed(limited / "run", program, straight)
        assert len(program.saved) == 3
        quota(made.directory, "limit -p bhard=200m 42")
        check_goes_on(limited / "run", tmp_path / "log", straight)


def demand_quota(made: Disk, option: str) -> None:
    made.unmount()
    made.options = option
    try:
        made.mount()
    except AssertionError:
        pytest.skip(f"this kernel has no quotas for XFS ({option})")


def quota(directory: Path, *commands: str) -> None:
    for one in commands:
        command("xfs_quota", "-x", "-c", one, str(directory))


def test_the_error_of_a_quota_is_that_of_a_full_disk(tmp_path: Path, straight: Path) -> None:
    """Where the kernel has no quotas: what it would say is said in its place, in a real training."""
    run_dir = tmp_path / "outputs" / "run"
    with Program(training(run_dir, *KEEP_ALL), tmp_path / "log", with_a_quota) as program:
        check_failed(run_dir, program, straight)
    assert len(program.saved) == 3
    assert "Disk quota exceeded" in program.said
    check_goes_on(run_dir, tmp_path / "log", straight)


def with_a_quota() -> None:
    """Of 56 MB, for what a checkpoint is written to."""
    written = 0

    class Limited(io.FileIO):
        def write(self, data: Any) -> int:
            nonlocal written
            if written + len(data) > 56e6:
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
            written += len(data)
            return super().write(data)

    os.fdopen = lambda descriptor, mode: io.BufferedRandom(Limited(descriptor, "r+"))  # type: ignore[assignment]


# -- not writable --------------------------------------------------------------------------------


def test_a_directory_of_somebody_else_is_refused_before_the_first_step(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    give_away(outputs, 0o755)
    code, said = run(training(outputs / "run"), tmp_path / "log", without_privileges)
    check_refused(code, said, str(outputs / "run"), "Permission denied")
    assert not list(outputs.iterdir())


@pytest.mark.parametrize("place", ["run", "run/checkpoints"])
def test_a_run_of_somebody_else_is_refused_before_the_first_step(
    tmp_path: Path, straight: Path, place: str
) -> None:
    run_dir = stopped(tmp_path)
    (run_dir / f"checkpoints/.step-00000012.ckpt.tmp-{socket.gethostname()}-1000000000-0a").touch()
    give_away(run_dir, 0o777)
    give_away(run_dir.parent / place, 0o755)
    before = contents(run_dir)
    code, said = run(training(run_dir), tmp_path / "log", without_privileges)
    check_refused(code, said, str(run_dir.parent / place), "Permission denied")
    assert before.items() <= contents(run_dir).items()
    check_goes_on(run_dir, tmp_path / "log", straight)


def test_checkpoints_that_only_somebody_else_may_replace_stay_and_no_failure_is_silent(
    tmp_path: Path, straight: Path
) -> None:
    run_dir = stopped(tmp_path)
    give_away(run_dir, 0o777)
    # As in /tmp: everybody may make files there, and delete only their own.
    (run_dir / "checkpoints").chmod(0o1777)
    before = contents(run_dir / "checkpoints")
    code, said = run(training(run_dir), tmp_path / "log", without_privileges)
    assert code in (1, 2), said
    assert "Operation not permitted" in said
    assert "saved step" not in said
    assert "Traceback" not in said
    assert before.items() <= contents(run_dir / "checkpoints").items()
    check_whole(run_dir, [8], straight)
    assert run(training(run_dir), tmp_path / "log")[0] == 0  # root may again
    check_same(run_dir, "", straight)


def give_away(directory: Path, mode: int) -> None:
    """It and all in it belong to nobody; others may do what `mode` says."""
    for path in (directory, *directory.rglob("*")):
        os.chown(path, 65534, 65534)
        path.chmod(mode if path.is_dir() else mode & 0o666)


def stopped(tmp_path: Path, run_dir: Path | None = None) -> Path:
    """A run that was killed after its second save."""
    run_dir = run_dir or tmp_path / "outputs" / "run"
    with Program(training(run_dir), tmp_path / "log") as program:
        with held(program, 2):
            pass
        program.kill()
    return run_dir


def contents(directory: Path) -> dict[str, bytes]:
    found = {
        str(path.relative_to(directory)): path for path in directory.rglob("*") if path.is_file()
    }
    return {
        name: path.read_bytes()
        for name, path in found.items()
        if name not in ("lock", "metrics.csv")
    }


def test_a_read_only_disk_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with disk(tmp_path, "ext4", 80, options="ro") as made:
        code, said = run(training(made.directory / "run"), tmp_path / "log")
        check_refused(code, said, str(made.directory / "run"), "Read-only file system")


def test_a_run_on_a_disk_that_is_read_only_now_is_refused_before_the_first_step(
    tmp_path: Path, straight: Path
) -> None:
    with disk(tmp_path, "ext4", 80) as made:
        run_dir = made.directory / "run"
        with Program(training(run_dir), tmp_path / "log") as program:
            program.wait_for(lambda: program.saved)
        command("mount", "-o", "remount,ro", str(made.directory))
        code, said = run(training(run_dir), tmp_path / "log")
        check_refused(code, said, str(run_dir), "Read-only file system")
        command("mount", "-o", "remount,rw", str(made.directory))
        check_goes_on(run_dir, tmp_path / "log", straight)


def test_a_disk_that_turns_read_only_under_the_training_costs_what_comes_after(
    tmp_path: Path, straight: Path
) -> None:
    with disk(tmp_path, "ext4", 80, options="errors=remount-ro") as made:
        run_dir = made.directory / "run"
        with Program(training(run_dir), tmp_path / "log") as program:
            with held(program, 2):
                made.fail()
            check_failed(run_dir, program, straight)
        assert "Read-only file system" in program.said
        made.repair()
        check_whole(run_dir, program.saved, straight)
        check_goes_on(run_dir, tmp_path / "log", straight)
