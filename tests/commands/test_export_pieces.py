"""The weights in pieces of safetensors: of a file and of shards, as libraries of others read them."""

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoint_files import names, small_checkpoint, small_state
from support.run_dirs import say
from support.shards import flip, in_store

from savepoint import export_pieces
from savepoint.checkpoint import store

Capture = pytest.CaptureFixture[str]


def pieces_of(directory: Path) -> dict[str, torch.Tensor]:
    """As a reader of the index finds them."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    found = {
        name: load_file(directory / piece)[name] for name, piece in index["weight_map"].items()
    }
    assert index["metadata"]["total_size"] == sum(one.nbytes for one in found.values())
    return found


@pytest.mark.parametrize("kind", ["a file", "shards"])
@pytest.mark.parametrize(("megabytes", "number"), [("0.0001", 2), ("5000", 1)])
def test_each_weight_is_in_one_piece_bit_for_bit(
    tmp_path: Path, capsys: Capture, kind: str, megabytes: str, number: int
) -> None:
    path = in_store(tmp_path / "run" / "checkpoints", 30)
    if kind == "a file":
        path = small_checkpoint(tmp_path / "one.ckpt").path
    export = ["export", str(path), "--format", "safetensors", "--pieces", megabytes]
    code, said, _ = say(capsys, *export, "-o", str(tmp_path / "out"))
    assert (code, f"written: {number} piece" in said) == (0, True)
    found, saved = pieces_of(tmp_path / "out"), store.load(path)[0]["state_dict"]
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
    assert len(names(tmp_path / "out")) == number + 1


def test_types_of_weights_come_back_as_they_are(tmp_path: Path, capsys: Capture) -> None:
    kinds = (torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.complex64, torch.int8)
    weights = {str(kind): torch.ones(3, 2).to(kind) for kind in kinds}
    weights["nothing"] = torch.empty(0, 4)
    weights["part"] = torch.arange(12.0).reshape(3, 4).T[1:]
    store.write(tmp_path / "a.ckpt", small_state() | {"state_dict": weights}, {"step": 1})
    export = ["export", str(tmp_path / "a.ckpt"), "--format", "safetensors", "--pieces", "1"]
    assert say(capsys, *export, "-o", str(tmp_path / "out"))[0] == 0
    for name, tensor in pieces_of(tmp_path / "out").items():
        assert tensor.dtype == weights[name].dtype
        assert tensor.tolist() == weights[name].tolist()


def test_what_is_damaged_or_not_possible_leaves_nothing(tmp_path: Path, capsys: Capture) -> None:
    path = in_store(tmp_path / "run" / "checkpoints", 30)
    out = tmp_path / "out"
    for words in (
        ["--format", "npz", "--pieces", "1"],
        ["--format", "safetensors", "--pieces", "0"],
    ):
        code, _, said = say(capsys, "export", str(path), *words, "-o", str(out))
        assert (code, "Not in pieces:" in said) == (2, True)
    flip(path / "shard-00001.ckpt")
    words = ["--format", "safetensors", "--pieces", "1", "-o", str(out)]
    assert say(capsys, "export", str(path), *words)[0] == 2
    assert not out.exists()
    out.mkdir()
    code, _, said = say(capsys, "export", str(path), *words)
    assert (code, "There already:" in said) == (2, True)


def test_of_the_weights_memory_holds_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = in_store(tmp_path / "run" / "checkpoints", 30)
    reads = export_pieces.Weights.read
    handed_out: list[weakref.ref[torch.Tensor]] = []
    alive = []

    def read(self: export_pieces.Weights, name: str) -> torch.Tensor:
        gc.collect()
        alive.append(sum(one() is not None for one in handed_out))
        found = reads(self, name).clone()
        handed_out.append(weakref.ref(found))
        return found

    monkeypatch.setattr(export_pieces.Weights, "read", read)
    export_pieces.export(path, tmp_path / "out", 10_000)
    assert len(handed_out) == 2 * 3  # written, and compared
    assert max(alive) == 0
