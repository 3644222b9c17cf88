import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from support.checkpoint_files import bytes_of_tensors, facts, small_checkpoint, small_state

from savepoint.checkpoint import manifest, seal, store
from savepoint.errors import (
    CheckpointCorruptError,
    CheckpointForeignError,
    CheckpointNotFoundError,
    CheckpointVersionError,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return small_checkpoint(tmp_path / "a.ckpt").path


def refused(path: Path) -> bool:
    """Whether the file is refused with an error that says why, and by the load too."""
    with pytest.raises((CheckpointCorruptError, CheckpointForeignError)) as error:
        manifest.verify(path)
    assert str(path) in str(error.value)
    assert manifest.diagnose(path)
    with pytest.raises((CheckpointCorruptError, CheckpointForeignError)):
        store.load(path)
    return True


def test_no_flipped_bit_of_the_end_verifies(path: Path) -> None:
    """One of each byte of the manifest, the directory and the seal: here CRCs miss some, or the
    manifest loses its name.
    """
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo(seal.RECORD).header_offset
    for position in range(start, len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointCorruptError):
            manifest.read(path)


def test_no_truncated_file_loads(path: Path) -> None:
    data = path.read_bytes()
    for length in {*range(0, len(data), 97), *range(len(data) - 300, len(data))}:
        path.write_bytes(data[:length])
        with pytest.raises((CheckpointCorruptError, CheckpointForeignError)):
            manifest.verify(path)
    path.write_bytes(data[: len(data) // 2])
    assert refused(path)


def test_a_reader_of_the_end_vouches_for_the_facts_only(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[min(bytes_of_tensors(path))] ^= 1
    path.write_bytes(data)
    assert manifest.read(path)["step"] == 30
    with pytest.raises(CheckpointCorruptError, match=r"record archive/data/\d"):
        manifest.verify(path)


def test_other_readers_read_a_checkpoint_as_if_nothing_had_been_added(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert json.loads(archive.read(seal.RECORD))["step"] == 30
    for mmap in (False, True):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        assert torch.equal(state["state_dict"]["weight"], small_state()["state_dict"]["weight"])
    assert "weight" in torch.load(path, map_location="meta", weights_only=True)["state_dict"]


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    one = store.write(tmp_path / "a.ckpt", small_state(), facts(1)).manifest["digest"]
    same = store.write(tmp_path / "b.ckpt", small_state(), facts(2)).manifest["digest"]
    other = store.write(tmp_path / "c.ckpt", small_state(2.0), facts(1)).manifest["digest"]
    assert one == same
    assert one != other


def test_equal_states_and_facts_give_equal_files(tmp_path: Path) -> None:
    one, two = (
        store.write(tmp_path / name, small_state(), facts(1)).path for name in ("a.ckpt", "b.ckpt")
    )
    assert one.read_bytes() == two.read_bytes()


def test_a_newer_format_is_not_called_corrupt(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "FORMAT_VERSION", 0)
    with pytest.raises(CheckpointVersionError, match=r"newer Savepoint: .*a\.ckpt"):
        manifest.read(path)


@pytest.mark.parametrize(
    "url", ["http://host/a.ckpt", "s3://bucket/a.ckpt", "file:///a.ckpt", Path("https://h/a")]
)
def test_a_url_is_refused_in_words(url: str | Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="No checkpoint is loaded from a URL"):
        manifest.read(url)


def test_nothing_there_and_a_directory_are_not_found(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"No checkpoint there: .*none\.ckpt"):
        manifest.read(tmp_path / "none.ckpt")
    with pytest.raises(FileNotFoundError, match="A directory"):
        manifest.verify(tmp_path)


def legacy(path: Path) -> None:
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)


def some_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")


WRONG = {
    "an HTML page": lambda path: path.write_text("<!DOCTYPE html><p>404"),
    "a git-LFS pointer": lambda path: path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"
    ),
    "a pickled object": lambda path: path.write_bytes(pickle.dumps({"a": 1})),
    "a torch.save file of the old format": legacy,
    "a torch.save file without a manifest": lambda path: torch.save({"a": 1}, path),
    "a zip archive of something else": some_zip,
    "a safetensors file": lambda path: path.write_bytes((2).to_bytes(8, "little") + b'{"a":1}'),
    "a text file": lambda path: path.write_text("lr: 0.1\n"),
    "a compressed file": lambda path: path.write_bytes(b"\x1f\x8b\x08" + bytes(20) + b"x"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_file_of_another_program_is_foreign_and_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.ckpt"
    WRONG[kind](path)
    assert manifest.diagnose(path).startswith(kind)
    with pytest.raises(CheckpointForeignError, match=kind) as error:
        manifest.read(path)
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (bytes(5000), "all zero bytes"),
        (b"\xff\xfe\x01\x02" * 9, "no zip archive: it begins with the bytes ff fe 01 02"),
    ],
)
def test_remains_of_a_file_are_corrupt_and_named(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match=reason) as error:
        manifest.read(path)
    assert error.value.reason.startswith(reason)
    assert error.value.path == path


def test_the_whole_size_of_a_truncated_file_is_estimated(tmp_path: Path) -> None:
    state = {
        "half": torch.zeros(50_000, dtype=torch.float16),
        "long": torch.zeros(30_000, dtype=torch.int64),
    }
    state |= {"shared": state["long"][:5], "tensors": [torch.randn(10, 10) for _ in range(40)]}
    path = store.write(tmp_path / "a.ckpt", state, facts(1)).path
    size = path.stat().st_size
    os.truncate(path, int(size * 0.43))
    percent, _, _, whole, unit = manifest.diagnose(path).removeprefix("truncated: ").split()
    assert (percent, unit) == ("43", "kB")
    assert abs(float(whole) * 1000 - size) < 0.01 * size


def test_what_was_damaged_is_said(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-7])
    assert manifest.diagnose(path) == "truncated: its last 7 bytes are missing"
    path.write_bytes(data + b"12345")
    assert manifest.diagnose(path) == "5 bytes were appended to it"
    path.write_bytes(data[:40] + b"?" + data[41:])
    assert manifest.diagnose(path).startswith("one or more damaged bytes in ")
    path.write_bytes(data)
    assert manifest.diagnose(path) == ""


def test_each_flipped_bit_of_a_large_file_is_found_and_its_record_named(tmp_path: Path) -> None:
    path = tmp_path / "large.ckpt"
    store.write(
        path, {"weights": [torch.zeros(3_000_000, dtype=torch.uint8) for _ in range(7)]}, facts(1)
    )
    for number, middle in enumerate(range(1_500_000, 21_000_000, 3_000_000)):
        with path.open("r+b") as file:
            for byte in (1, 0):
                file.seek(middle)
                file.write(bytes([byte]))
                file.flush()
                said = f"one or more damaged bytes in record archive/data/{number}" if byte else ""
                assert manifest.diagnose(path) == said


def test_facts_that_are_no_json_are_refused_before_the_seal(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        store.write(tmp_path / "a.ckpt", small_state(), facts(1, float("nan")))
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_is_read_without_torch(path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from savepoint.checkpoint import manifest, store\n"
        "manifest.verify(sys.argv[1]); assert "
        "store.CheckpointStore(Path(sys.argv[1]).parent).latest() is None\n"
        "print([name for name in ('torch', 'numpy', 'lightning') if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"
