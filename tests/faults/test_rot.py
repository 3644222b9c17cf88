"""Files that changed on disk: none loads, whichever way it is asked for, and the one before it is
taken.

tests/checkpoint/test_manifest.py has what is seen in a file; these tests go through every door
of the project.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoint_files import bytes_of_tensors, facts, names, small_state
from support.forked import run
from support.small import difference, final_state, rows

from savepoint.checkpoint import foreign, store
from savepoint.checkpoint.io import CheckpointIO
from savepoint.checkpoint.retention import Retention
from savepoint.checkpoint.store import CheckpointStore
from savepoint.commands import main
from savepoint.errors import CheckpointCorruptError
from savepoint.resume import request, source

Damages = Iterator[tuple[str, bytes]]


def flipped(data: bytes, position: int, bit: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]


def anywhere(data: bytes, inside: set[int], draw: random.Random) -> Damages:
    for _ in range(100):
        place = draw.randrange(len(data)), draw.randrange(8)
        yield f"bit {place} flipped", flipped(data, *place)


def outside_tensors(data: bytes, inside: set[int], draw: random.Random) -> Damages:
    outside = sorted(set(range(len(data))) - inside)
    for position in draw.sample(outside, 100):
        yield f"bit of byte {position} flipped", flipped(data, position, draw.randrange(8))


def zeroed_pages(data: bytes, inside: set[int], draw: random.Random) -> Damages:
    pages = range(-(-len(data) // 4096))
    for page in draw.sample(pages, 50):
        begin, end = 4096 * page, min(4096 * (page + 1), len(data))
        yield f"page {page} of {len(pages)} zeroed", data[:begin] + bytes(end - begin) + data[end:]


def cut(data: bytes, inside: set[int], draw: random.Random) -> Damages:
    for length in [
        0,
        *(draw.randrange(len(data)) for _ in range(49)),
        *(len(data) - n for n in range(1, 23)),
    ]:
        yield f"cut to {length} of {len(data)} bytes", data[:length]


def longer(data: bytes, inside: set[int], draw: random.Random) -> Damages:
    for size in (1, 2, 22, 4096, 70_000):
        yield f"{size} zero bytes appended", data + bytes(size)
        yield f"{size} bytes appended", data + draw.randbytes(size)


def rewritten(data: bytes, inside: set[int], draw: random.Random) -> Damages:
    yield "zeros", bytes(len(data))
    yield "random bytes", draw.randbytes(len(data))
    yield "twice", data * 2
    yield "halves changed", data[len(data) // 2 :] + data[: len(data) // 2]


DAMAGES = {anywhere: 100, outside_tensors: 100, zeroed_pages: 50, cut: 72, longer: 10, rewritten: 4}
TRAINING = [
    "train.py", "--data", "configs/data/digits.yaml", "--trainer.limit_train_batches", "4", "--trainer.max_epochs", "3",
    "--trainer.log_every_n_steps", "2", "--model.net.width", "4", "--checkpoint.keep_last", "9",
    "--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1", "--trainer.accelerator", "cpu",
    "--resume", "auto",
]  # fmt: skip


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> CheckpointStore:
    """Steps 10 and 20, the newer one of 80 pages."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    kept = CheckpointStore(directory, monitor="val/loss", retention=Retention(keep_last=9))
    big = {"state_dict": small_state()["state_dict"] | {"big": torch.randn(200, 370)}}
    kept.add(small_state(10), facts(10, 1.0))
    kept.add(small_state(20) | big, facts(20, 2.0))
    for name in ("last.ckpt", "best.ckpt"):
        (directory / name).unlink()  # they are the same file
    return kept


def refused(load: Callable[[Path], Any], path: Path) -> str:
    """What the error says, if there is one: damaged, not foreign, or it would not be set aside."""
    try:
        load(path)
    except CheckpointCorruptError as error:
        return str(error)
    return ""


DOORS: dict[str, Callable[[Path], Any]] = {
    "store.load": store.load,
    "Trainer.fit(ckpt_path=)": CheckpointIO().load_checkpoint,
    "train.py --init_from": foreign.read,
    "resume.py FILE": lambda path: source.choose(request.Request(file=path), may_rename=True),
    "resume.py FILE, before the imports": lambda path: request.requested([str(path)]),
}


@pytest.mark.parametrize("kind", DAMAGES, ids=lambda kind: kind.__name__)
def test_no_damaged_file_loads_through_any_door_and_the_one_before_is_taken(
    kept: CheckpointStore, kind: Callable[..., Damages], capsys: pytest.CaptureFixture[str]
) -> None:
    path = kept.path(20)
    whole, tried = path.read_bytes(), 0
    try:
        for what, data in kind(whole, bytes_of_tensors(path), random.Random(0)):
            assert data != whole
            path.write_bytes(data)
            tried += 1
            for door, load in DOORS.items():
                assert str(path) in refused(load, path), f"{what}: {door}"
            check_verify(path, what, capsys)
            check_fallback(kept, what, capsys)
    finally:
        path.write_bytes(whole)
    assert tried == DAMAGES[kind]
    assert names(kept.directory) == ["step-00000010.ckpt", "step-00000020.ckpt"]


def check_verify(path: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`savepoint verify` says of the file that it does not, in one line, and what to do."""
    assert main(["verify", str(path)]) == 1, what
    line, advice = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{path}: does not verify: "), what
    assert advice.startswith("  Go on from step 10: "), what


def check_fallback(kept: CheckpointStore, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A run goes on from the file before, with one line that says why and what it costs."""
    checkpoint, state, lines = CheckpointStore(kept.directory).load_latest(lock_holder=False)
    assert (checkpoint.step, float(state["state_dict"]["weight"][0, 0])) == (10, 10), what
    (line,) = lines
    assert line.startswith("step-00000020.ckpt does not verify: "), what
    assert line.endswith(". Going on from step 10 costs 10 steps."), what
    found = source.choose(request.Request(run_dir=kept.directory.parent), may_rename=False)
    assert found.path == kept.path(10), what
    assert capsys.readouterr().out.splitlines() == [line], what


def flip(path: Path) -> bytes:
    """Turns a bit in the middle of the file, where its tensors are. Returns what is there now."""
    data = path.read_bytes()
    path.unlink()  # its links stay whole
    path.write_bytes(flipped(data, len(data) // 2, 0))
    return path.read_bytes()


@pytest.fixture
def run_of_four(tmp_path: Path) -> CheckpointStore:
    kept = CheckpointStore(
        tmp_path / "checkpoints", monitor="val/loss", retention=Retention(keep_last=3)
    )
    for step in (10, 20, 30, 40):
        kept.add(small_state(step), facts(step, float(step)))
    for name in ("last.ckpt", "best.ckpt"):
        (kept.directory / name).unlink()
    return kept


def test_a_file_that_was_set_aside_is_kept_and_counts_for_nothing(
    run_of_four: CheckpointStore,
) -> None:
    damaged = flip(run_of_four.path(40))
    run_of_four.load_latest(lock_holder=True)
    aside = run_of_four.directory / "step-00000040.ckpt.corrupt"
    for step in (31, 32, 33):
        fresh = CheckpointStore(
            run_of_four.directory, monitor="val/loss", retention=Retention(keep_last=3)
        )
        fresh.add(small_state(step), facts(step, float(step)))
        assert aside.read_bytes() == damaged
    assert [one.step for one in fresh.checkpoints()] == [10, 31, 32, 33]  # the best, and three
    checkpoint, _, lines = fresh.load_latest(lock_holder=True)
    assert (checkpoint.step, lines) == (33, [])


def test_a_damaged_file_in_the_middle_is_said_and_set_aside_once_it_is_needed(
    run_of_four: CheckpointStore,
) -> None:
    flip(run_of_four.path(30))
    before = names(run_of_four.directory)
    checkpoint, _, lines = run_of_four.load_latest(lock_holder=True)
    assert (checkpoint.step, lines, names(run_of_four.directory)) == (40, [], before)
    flip(run_of_four.path(40))
    checkpoint, _, lines = run_of_four.load_latest(lock_holder=True)
    assert (checkpoint.step, len(lines)) == (20, 2)
    assert [line.split(" costs ")[1] for line in lines] == ["20 steps.", "10 steps."]
    assert {"step-00000030.ckpt.corrupt", "step-00000040.ckpt.corrupt"} < set(
        names(run_of_four.directory)
    )


def test_a_run_with_a_flipped_bit_goes_on_from_the_file_before_and_ends_as_if_nothing_had_been(
    tmp_path: Path,
) -> None:
    """A process of its own; tests/resume/test_resume.py has the best file that is damaged before
    the final test.
    """
    run_dir, log = tmp_path / "first", tmp_path / "log"
    training = [*TRAINING, "--output_dir", str(tmp_path), "--run_name", "first"]
    assert run(training, log)[0] == 0
    end, logged = final_state(run_dir), rows(run_dir)
    newest = run_dir / "checkpoints" / "step-00000012.ckpt"
    for pointer in ("last.ckpt", "best.ckpt"):
        (run_dir / "checkpoints" / pointer).unlink()
    damaged = flip(newest)
    code, said = run(training, log)
    assert code == 0, said
    (line,) = [line for line in said.splitlines() if "does not verify" in line]
    assert line.startswith(
        "step-00000012.ckpt does not verify: one or more damaged bytes in record archive/data/"
    )
    assert line.endswith(
        "renamed to step-00000012.ckpt.corrupt. Going on from step 8 costs 4 steps."
    )
    assert newest.with_name("step-00000012.ckpt.corrupt").read_bytes() == damaged
    assert list(difference(end, final_state(run_dir))) == []
    assert rows(run_dir) == logged
