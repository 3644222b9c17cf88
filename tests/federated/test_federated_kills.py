"""A federated run that was killed anywhere in a round, and resumed, equals one that was not."""

import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from support import federated
from support.federated import PLACES, TINY, VARIANTS
from support.forked import Program

pytest.importorskip("flwr")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory):
    """The directory of a straight run of a variant, made once."""
    folder = tmp_path_factory.mktemp("straight")

    def of(variant: str) -> Path:
        directory = folder / variant.replace(" ", "-")
        if not directory.exists():
            code, said = federated.train(directory, *VARIANTS[variant])
            assert code == 0, said
        return directory

    yield of
    shutil.rmtree(folder)


def assert_survives(straight: Path, directory: Path, variant: str, place: str, number: int) -> None:
    federated.killed(directory, VARIANTS[variant], place, number)
    code, said = resumed_or_begun(directory, variant)
    assert code == 0, said
    federated.assert_equal(straight, directory)


def resumed_or_begun(directory: Path, variant: str) -> tuple[int, str]:
    """Resumed; or started again by the same command, where no round was saved yet."""
    return federated.train(directory, *VARIANTS[variant], "--resume", "auto")


@pytest.mark.parametrize(
    "place", ["after a client has saved", "before the seal", "before the results"]
)
def test_a_run_that_was_killed_in_its_third_round_ends_as_a_straight_one(
    straight, tmp_path: Path, place: str
) -> None:
    variant = "head and optimizer"
    assert_survives(straight(variant), tmp_path / "killed", variant, place, 3)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_survives_each_place(
    straight, tmp_path: Path, variant: str, place: str
) -> None:
    # Of the variant that saves every second round the other places are in a round that is saved.
    number = 3 if variant != "every second round" or place in PLACES[:2] else 2
    assert_survives(straight(variant), tmp_path / "killed", variant, place, number)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(11))
def test_kills_at_random_moments_leave_no_trace(straight, tmp_path: Path, seed: int) -> None:
    variant = "head and optimizer"
    whole = straight(variant)
    directory = tmp_path / "killed"
    command = [
        "train.py",
        *TINY,
        *VARIANTS[variant],
        "--output_dir",
        str(tmp_path),
        "--run_name",
        "killed",
    ]
    with Program([*command, "--resume", "auto"], directory.with_suffix(".log")) as program:
        program.wait_for(lambda: program.saved)
        time.sleep(random.Random(seed).uniform(0, 1))
        program.kill()  # some have ended by then
    code, said = resumed_or_begun(directory, variant)
    assert code == 0, said
    federated.assert_equal(whole, directory)


@pytest.mark.parametrize("signum", [signal.SIGTERM])
def test_a_signal_stops_at_the_end_of_the_round(
    straight, tmp_path: Path, signum: signal.Signals
) -> None:
    assert_stops(straight("head and optimizer"), tmp_path / "stopped", signum, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("wait", [0.0, 0.1, 0.2, 0.4])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_whenever_it_comes(
    straight, tmp_path: Path, signum: signal.Signals, wait: float
) -> None:
    assert_stops(straight("head and optimizer"), tmp_path / "stopped", signum, wait)


def assert_stops(whole: Path, directory: Path, signum: signal.Signals, wait: float) -> None:
    command = [
        "train.py",
        *TINY,
        *VARIANTS["head and optimizer"],
        "--output_dir",
        str(directory.parent),
    ]
    log = directory.with_suffix(".log")
    with Program([*command, "--run_name", directory.name], log) as program:
        program.wait_for(lambda: program.saved)
        time.sleep(wait)
        with suppress(ProcessLookupError):  # a fast machine has ended it by then
            program.signal(signum)
        code = program.wait()
        said = program.said
    if "rounds  " not in said:  # it had not ended before
        assert code == 128 + signum, said
        assert "Continue with: " in said
        assert (directory / "RESUME.txt").read_text().split()[-1] in said
    code, said = federated.resume(directory)
    assert code == 0, said
    federated.assert_equal(whole, directory)
