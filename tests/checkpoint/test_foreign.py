import collections
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoint_files import facts, small_state

from savepoint.checkpoint import foreign, store
from savepoint.errors import CheckpointCorruptError, CheckpointForeignError, CheckpointNotFoundError

WEIGHTS = {"conv.weight": torch.arange(6.0).reshape(2, 3), "conv.bias": torch.zeros(2)}


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return collections.OrderedDict((prefix + name, tensor) for name, tensor in WEIGHTS.items())


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before zip"])
@pytest.mark.parametrize(
    "best",
    [91.5, torch.tensor(91.5), torch.tensor([91.5]), np.float64(91.5), np.float32(91.5)],
    ids=lambda best: type(best).__name__,
)
def test_a_floydhub_file_gives_weights_epoch_and_best_accuracy(
    tmp_path: Path, best: Any, old: bool
) -> None:
    content = {"epoch": 4, "state_dict": prefixed("module."), "best_accuracy": best}
    torch.save(content, tmp_path / "a.pth.tar", _use_new_zipfile_serialization=not old)
    found = foreign.read(tmp_path / "a.pth.tar")
    assert same(found.pop("state_dict"), WEIGHTS)
    assert found == {"kind": "dictionary", "epoch": 4, "best_accuracy": 91.5, "optimizer": None}
    assert type(found["best_accuracy"]) is float


def test_an_imagenet_file_gives_its_optimizer(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    content = {
        "epoch": 1,
        "arch": "resnet18",
        "state_dict": model.state_dict(),
        "best_acc1": torch.tensor(5.0),
    }
    torch.save(
        content | {"optimizer": optimizer.state_dict(), "scheduler": {}}, tmp_path / "a.pth.tar"
    )
    found = foreign.read(tmp_path / "a.pth.tar")
    assert found["optimizer"]["param_groups"][0]["lr"] == 0.3
    assert found["best_accuracy"] == 5.0


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."],
)
@pytest.mark.parametrize("old", [False, True], ids=["zip", "before zip"])
def test_a_bare_state_dict_loses_its_prefixes(tmp_path: Path, prefix: str, old: bool) -> None:
    torch.save(prefixed(prefix), tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
    found = foreign.read(tmp_path / "a.pt")
    assert same(found["state_dict"], WEIGHTS)
    assert (found["kind"], found["epoch"], found["best_accuracy"], found["optimizer"]) == (
        "state_dict",
        None,
        None,
        None,
    )


def test_a_module_that_is_called_module_keeps_its_name(tmp_path: Path) -> None:
    weights = {"module.weight": torch.ones(1), "head.weight": torch.ones(2)}
    torch.save(weights, tmp_path / "a.pt")
    assert same(foreign.read(tmp_path / "a.pt")["state_dict"], weights)


def test_a_compiled_part_inside_a_module_is_named_as_before(tmp_path: Path) -> None:
    torch.save({"model._orig_mod.weight": torch.ones(1)}, tmp_path / "a.pt")
    assert list(foreign.read(tmp_path / "a.pt")["state_dict"]) == ["model.weight"]


def test_a_stock_lightning_checkpoint_is_known(tmp_path: Path) -> None:
    content = {
        "epoch": 3,
        "global_step": 9,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": WEIGHTS,
    }
    torch.save(
        content | {"optimizer_states": [{"state": {}, "param_groups": []}]}, tmp_path / "a.ckpt"
    )
    found = foreign.read(tmp_path / "a.ckpt")
    assert (found["kind"], found["epoch"], found["optimizer"]) == (
        "lightning",
        3,
        {"state": {}, "param_groups": []},
    )


def test_our_own_checkpoint_is_read_whole(tmp_path: Path) -> None:
    path = store.write(tmp_path / "a.ckpt", small_state() | {"best_accuracy": 0.9}, facts(30)).path
    found = foreign.read(path)
    assert (found["kind"], found["epoch"], found["best_accuracy"]) == ("savepoint", 2, 0.9)
    assert found["optimizer"]["param_groups"][0]["lr"] == 0.1
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointCorruptError):
        foreign.read(path)


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (exec, (f"open({str(self.target)!r}, 'w')",))


REFUSED = {
    "a whole model": (
        lambda path: torch.save(torch.nn.Linear(1, 1), path),
        "torch.nn.modules.linear.Linear",
    ),
    "a path": (
        lambda path: torch.save({"state_dict": WEIGHTS, "root": Path("x")}, path),
        "pathlib",
    ),
    "a payload": (
        lambda path: torch.save({"state_dict": WEIGHTS, "x": Payload(path.with_name("ran"))}, path),
        "exec",
    ),
    "an old payload": (
        lambda path: torch.save(
            {"x": Payload(path.with_name("ran"))}, path, _use_new_zipfile_serialization=False
        ),
        "exec",
    ),
    "a pickle": (
        lambda path: path.write_bytes(pickle.dumps(Payload(path.with_name("ran")))),
        "a pickled object|exec",
    ),
    "an object array": (
        lambda path: torch.save({"state_dict": WEIGHTS, "x": np.array([Path()])}, path),
        "numpy",
    ),
    "a list": (lambda path: torch.save([1, 2], path), "it holds a list"),
    "no weights": (
        lambda path: torch.save({"epoch": 1, "names": ["a"]}, path),
        "its keys are epoch, names",
    ),
    "a page": (lambda path: path.write_text("<html></html>"), "an HTML page"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_anything_else_is_refused_with_its_name_and_the_cause(tmp_path: Path, kind: str) -> None:
    make, cause = REFUSED[kind]
    path = tmp_path / "a.pt"
    make(path)
    with pytest.raises(CheckpointForeignError, match=cause) as error:
        foreign.read(path)
    assert str(path) in str(error.value)
    assert "weights_only" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", bytes(100), b"PK\3\4truncated"])
def test_remains_of_a_file_are_called_that(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match=r"a\.pt.*(empty|all zero|truncated)"):
        foreign.read(tmp_path / "a.pt")


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"none\.pt"):
        foreign.read(tmp_path / "none.pt")


def test_numpy_stays_allowed_only_while_a_file_is_read(tmp_path: Path) -> None:
    torch.save({"state_dict": WEIGHTS, "best_accuracy": np.float64(1)}, tmp_path / "a.pt")
    before = set(torch.serialization.get_safe_globals())
    foreign.read(tmp_path / "a.pt")
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.pt", weights_only=True)


def safetensors_bytes() -> bytes:
    header = b'{"conv.bias":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    return len(header).to_bytes(8, "little") + header + bytes(8)


def test_safetensors_are_read_where_their_reader_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes())
    found = foreign.read(tmp_path / "a.safetensors")
    assert same(found["state_dict"], {"conv.bias": torch.zeros(2)})
    assert found["kind"] == "safetensors"


def test_safetensors_without_their_reader_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes())
    with pytest.raises(CheckpointForeignError, match="pip install safetensors"):
        foreign.read(tmp_path / "a.safetensors")
