"""The archive that a checkpoint is: what other readers of such files find in it."""

import io
import zipfile
from pathlib import Path

import pytest
import torch

from savepoint.checkpoint import archive, manifest, store
from savepoint.checkpoint.archive import Archive

STATE = {
    "none": torch.empty(0),
    "bytes": torch.arange(7).to(torch.int8),
    "large": torch.arange(1 << 19).double().reshape(2, -1),
    "texts": ["ä", {"x": (1, 2.5)}],
    "last": torch.ones(3, 5).bfloat16(),
}


def written(path: Path) -> Path:
    store.write(path, STATE, {"step": 1})
    return path


def same(one: dict[str, object]) -> bool:
    return all(
        torch.equal(value, STATE[key]) if isinstance(value, torch.Tensor) else value == STATE[key]
        for key, value in one.items()
    )


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_it_and_may_map_it(tmp_path: Path, mmap: bool) -> None:
    loaded = torch.load(written(tmp_path / "a.ckpt"), mmap=mmap, weights_only=True)
    assert same(loaded)
    assert loaded["large"].data_ptr() % 64 == 0


def test_its_records_are_those_that_torch_writes(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as theirs:
        expected = {
            name.partition("/")[2]: theirs.read(name)
            for name in theirs.namelist()
            if not name.endswith("serialization_id")
        }
    with zipfile.ZipFile(written(tmp_path / "b.ckpt")) as ours:
        assert ours.testzip() is None
        found = {name.partition("/")[2]: ours.read(name) for name in ours.namelist()}
    del found["manifest.json"]
    assert found == expected


def test_what_is_larger_than_a_field_of_zip_stands_in_a_wider_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = written(tmp_path / "small.ckpt").stat().st_size
    monkeypatch.setattr(archive, "_LIMIT", 5000)
    monkeypatch.setattr(archive, "_NUMBER_LIMIT", 3)
    path = written(tmp_path / "a.ckpt")
    assert path.stat().st_size > small
    with zipfile.ZipFile(path) as found:
        assert found.testzip() is None
        wide = {record.filename for record in found.infolist() if record.extra[:2] == b"\1\0"}
        assert "archive/data/2" in wide, "its size"
        assert "archive/manifest.json" in wide, "its place"
        assert "archive/data.pkl" not in wide
    assert same(torch.load(path, weights_only=True))


@pytest.mark.slow
def test_a_tensor_of_more_than_four_gigabytes_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    tensor = torch.zeros((1 << 32) + 5, dtype=torch.uint8)
    tensor[-1] = 7
    store.write(path, {"tensor": tensor, "after": torch.ones(2)}, {"step": 1})
    manifest.verify(path)
    loaded = torch.load(path, mmap=True, weights_only=True)
    assert loaded["tensor"].shape == tensor.shape
    assert loaded["tensor"][-1] == 7
    assert torch.equal(loaded["after"], torch.ones(2))


def test_before_the_seal_it_is_refused() -> None:
    whole = io.BytesIO()
    begun = Archive(whole)
    begun.save(STATE)
    records = whole.tell()
    begun.seal({"step": 1})
    assert manifest.read_sealed(io.BytesIO(whole.getvalue()), "whole")["step"] == 1
    for size in (records, records + 100, len(whole.getvalue()) - 1):
        with pytest.raises(manifest.CheckpointCorruptError):
            manifest.read_sealed(io.BytesIO(whole.getvalue()[:size]), "cut")
