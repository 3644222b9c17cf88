"""Weights of Keras and Flax in a torch model: the same logits as where they were made.

tests/files/arrays/ holds one small network as Keras 3.15 (net.keras) and Flax 0.12 (net.msgpack, a
TrainState; net.npz, its variables flattened) have saved it, with their logits below.
"""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from savepoint import layouts, weights
from savepoint.checkpoint import arrays, foreign
from savepoint.errors import CheckpointCorruptError, CheckpointForeignError, ConfigMismatchError

FILES = Path(__file__).parent / "files" / "arrays"
INPUT = torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8)
KERAS = [
    [4.860177040100098, -0.5294168591499329, 7.683733940124512],
    [2.977752447128296, -0.3118330240249634, 4.684616565704346],
]
FLAX = [
    [2.013134479522705, -0.010931402444839478, 0.08166563510894775],
    [2.7876620292663574, -0.10731765627861023, -0.24738836288452148],
]
NEEDS = {"keras": "h5py", "h5": "h5py", "msgpack": "msgpack", "npz": "numpy"}


class Net(LightningModule):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(80, 7), nn.ReLU(), nn.Linear(7, classes))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images))
        return logits


def file_of(kind: str, tmp_path: Path) -> Path:
    pytest.importorskip(NEEDS[kind], reason="needs: make extras")
    if kind != "h5":
        return FILES / f"net.{kind}"
    with zipfile.ZipFile(FILES / "net.keras") as archive:  # as save_weights writes it
        archive.extract("model.weights.h5", tmp_path)
    return tmp_path / "model.weights.h5"


@pytest.mark.parametrize(
    ("kind", "logits"), [("keras", KERAS), ("h5", KERAS), ("msgpack", FLAX), ("npz", FLAX)]
)
def test_the_logits_are_those_of_the_other_framework(
    kind: str, logits: list[list[float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Net()
    weights.initialise(model, file_of(kind, tmp_path), strict=True)
    with torch.inference_mode():
        assert torch.allclose(model.eval()(INPUT), torch.tensor(logits), atol=1e-5)
    out = capsys.readouterr().out
    assert ": 13 of 13 tensors\n" in out
    kernel = next(line for line in out.splitlines() if "body.0.weight" in line)
    assert kernel.split()[1:] == [
        "[3,",
        "3,",
        "1,",
        "3]",
        "body.0.weight",
        "[3,",
        "1,",
        "3,",
        "3]",
        "transposed",
    ]
    assert "transposed, 16 places x 5 channels reordered" in out


class Named(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(4, 4)
        self.first = nn.Linear(4, 4)


def test_a_layer_of_the_same_name_is_found_by_its_name(tmp_path: Path) -> None:
    kernels = {name: np.random.rand(4, 4).astype("float32") for name in ("first", "second")}
    flat = {f"params/{name}/kernel": kernel for name, kernel in kernels.items()}
    np.savez(tmp_path / "a.npz", **flat, **{f"{n[:-6]}bias": np.zeros(4, "float32") for n in flat})
    model = Named()
    weights.initialise(model, tmp_path / "a.npz", strict=True)
    for name, kernel in kernels.items():
        assert torch.equal(getattr(model, name).weight, torch.from_numpy(kernel.T))


def test_an_npz_with_the_names_of_the_model_is_taken_as_it_is(tmp_path: Path) -> None:
    model = Net()
    np.savez(tmp_path / "a.npz", **{name: one.numpy() for name, one in model.state_dict().items()})
    other = Net()
    weights.initialise(other, tmp_path / "a.npz", strict=True)
    assert all(
        torch.equal(one, two)
        for one, two in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )


# -- what is not sure is not mapped --------------------------------------------------------------


def variables() -> dict[str, Tensor]:
    return arrays.read(FILES / "net.npz", "npz")


def mapped(found: dict[str, Tensor], model: nn.Module | None = None) -> set[str]:
    return {row.place for row in layouts.onto(model or Net(), found).rows}


def test_layers_of_a_kind_of_which_there_are_more_or_fewer_are_not_mapped() -> None:
    found = variables()
    more = found | {"params/Dense_2/kernel": torch.ones(3, 3), "params/Dense_2/bias": torch.ones(3)}
    assert mapped(found) - mapped(more) == {n for n in found if n.startswith("params/Dense_")}
    assert set(layouts.onto(Net(), more).weights) >= {"params/Dense_2/kernel"}


def test_layers_whose_order_no_number_says_are_not_mapped() -> None:
    found = variables()
    moved = {n.replace("params/Conv_1", "params/Block_0/Conv_0"): one for n, one in found.items()}
    assert not [place for place in mapped(moved) if "Conv" in place]


def test_numbers_count_as_numbers() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(11)))
    found = {f"layers/dense_{n}/vars/0": torch.full((2, 2), float(n)) for n in range(1, 11)}
    found["layers/dense/vars/0"] = torch.zeros(2, 2)
    weights = layouts.onto(model, found).weights
    assert [float(weights[f"{n}.weight"][0, 0]) for n in range(11)] == list(range(11))


@pytest.mark.parametrize(
    ("model", "arrays"),
    [
        (nn.Conv2d(4, 4, 3), {"layers/conv2d_transpose/vars": [(3, 3, 4, 4), (4,)]}),
        (nn.Conv1d(4, 4, 4), {"layers/einsum_dense/vars": [(4, 4, 4), (4,)]}),
        (nn.LayerNorm(4), {"layers/group_normalization/vars": [(4,), (4,)]}),
        (nn.Linear(4, 4), {"layers/attention/dense/vars": [(4, 4), (4,)]}),
    ],
    ids=["transposed", "einsum", "group norm", "attention"],
)
def test_a_layer_whose_name_says_another_kind_is_not_mapped(
    model: nn.Module, arrays: dict[str, list[tuple[int, ...]]]
) -> None:
    found = {
        f"{place}/{number}": torch.ones(shape)
        for place, shapes in arrays.items()
        for number, shape in enumerate(shapes)
    }
    mapped = layouts.onto(nn.Sequential(model), found)
    assert (mapped.rows, set(mapped.weights)) == ([], set(found))


def of_numbers(*layers: tuple[str, list[Tensor]]) -> dict[str, Tensor]:
    return {
        f"layers/{name}/vars/{number}": one
        for name, arrays in layers
        for number, one in enumerate(arrays)
    }


def test_a_batch_norm_of_flattened_images_gets_the_order_of_torch() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.BatchNorm1d(8))
    found = of_numbers(("batch_normalization", [torch.arange(8.0)] * 4))
    weights = layouts.onto(model, found).weights
    assert weights["2.running_mean"].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_a_norm_that_may_be_of_flattened_signals_or_of_several_is_not_mapped() -> None:
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.Flatten(), nn.BatchNorm1d(8))
    assert not layouts.onto(model, of_numbers(("batch_normalization", [torch.ones(8)] * 4))).rows


def test_the_channels_of_a_transposed_convolution_count() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ConvTranspose2d(8, 2, 2), nn.Flatten(), nn.Linear(8, 1)
    )
    rows = layouts.onto(model, of_numbers(("dense", [torch.ones(8, 1), torch.ones(1)]))).rows
    assert rows[0].how == "transposed, 4 places x 2 channels reordered"


@pytest.mark.parametrize(
    "change",
    [
        {"params/Conv_0/bias": None},
        {"params/Conv_0/kernel": torch.ones(5, 5, 1, 3)},
        {"params/Conv_0/more": torch.ones(3)},
    ],
    ids=["lacks a bias", "of another size", "has one more"],
)
def test_a_layer_is_mapped_whole_or_not_at_all(change: dict[str, Tensor | None]) -> None:
    found = {n: one for n, one in {**variables(), **change}.items() if one is not None}
    assert not [place for place in mapped(found) if "Conv_0" in place]


def test_what_is_not_mapped_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigMismatchError, match="--init_strict false"):
        weights.initialise(Net(classes=4), FILES / "net.npz", strict=True)
    model = Net(classes=4)
    weights.initialise(model, FILES / "net.npz", strict=False)
    out = capsys.readouterr().out
    assert "11 of 13 tensors" in out
    listed = out.split("not loaded:\n")[1].splitlines()
    assert {line.split()[0] for line in listed} == {
        "head.2.weight", "head.2.bias", "params/Dense_1/kernel", "params/Dense_1/bias",
    }  # fmt: skip


# -- files ---------------------------------------------------------------------------------------


def test_python_objects_in_an_npz_are_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.array([{}], dtype=object))
    with pytest.raises(CheckpointForeignError, match="Python objects, which are pickled") as error:
        foreign.read(tmp_path / "a.npz")
    assert "allow_pickle" not in str(error.value)


@pytest.mark.parametrize("kind", ["keras", "h5", "msgpack", "npz"])
def test_a_cut_file_is_refused(kind: str, tmp_path: Path) -> None:
    whole = file_of(kind, tmp_path).read_bytes()
    for share in (0.3, 0.9):
        cut = tmp_path / f"cut.{kind}"
        cut.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises((CheckpointForeignError, CheckpointCorruptError)):
            foreign.read(cut)


def damaged(kind: str, folder: Path) -> Path:
    file = folder / f"damaged.{kind}"
    if kind == "keras":
        whole = bytearray((FILES / "net.keras").read_bytes())
        whole[len(whole) // 2] ^= 255
        file.write_bytes(whole)
    elif kind == "h5":
        h5py = pytest.importorskip("h5py", reason="needs: make extras")
        with h5py.File(file, "w") as opened:
            opened.create_dataset("kernel", shape=(10**13,), chunks=(1000,), dtype="f4")
    elif kind == "npz":
        np.savez_compressed(file, a=np.arange(1000.0))
        whole = bytearray(file.read_bytes())
        whole[60:90] = bytes(range(30))
        file.write_bytes(whole)
    else:
        np.savez(file, a=np.zeros(3, np.longdouble))
    return file


@pytest.mark.parametrize("kind", ["keras", "h5", "npz", "longdouble.npz"])
def test_a_damaged_array_is_refused_in_words(kind: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointForeignError, match="cannot be read safely"):
        foreign.read(damaged(kind, tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        {"kernel": ([2, 3], b"")},
        {"kernel": {"__msgpack_chunked_array__": True, "shape": {"0": 4}, "chunks": {}}},
        {"kernel": {"__msgpack_chunked_array__": True, "shape": 4, "chunks": {}}},
    ],
    ids=["has no bytes", "lacks its chunks", "has no shape"],
)
def test_an_array_of_flax_that_is_not_whole_is_refused(
    content: dict[str, Any], tmp_path: Path
) -> None:
    msgpack = pytest.importorskip("msgpack", reason="needs: make extras")
    if isinstance(content["kernel"], tuple):
        shape, numbers = content["kernel"]
        content = {"kernel": msgpack.ExtType(1, msgpack.packb((shape, "float32", numbers)))}
    (tmp_path / "net.msgpack").write_bytes(msgpack.packb({"params": {"dense": content}}))
    with pytest.raises(CheckpointForeignError, match=r"is no whole msgpack|is not whole"):
        foreign.read(tmp_path / "net.msgpack")


def test_a_link_out_of_an_hdf5_file_is_not_followed(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="needs: make extras")
    with h5py.File(tmp_path / "secret.h5", "w") as other:
        other["kernel"] = np.ones((2, 2))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["dense/kernel"] = np.zeros((2, 2))
        file["outside"] = h5py.ExternalLink("secret.h5", "kernel")
    assert set(foreign.read(tmp_path / "a.h5")["state_dict"]) == {"dense/kernel"}
    layout = h5py.VirtualLayout((2, 2), "f8")
    layout[:] = h5py.VirtualSource(tmp_path / "secret.h5", "kernel", (2, 2))
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file.create_virtual_dataset("kernel", layout)
    with pytest.raises(CheckpointForeignError, match="its kernel lies in another file"):
        foreign.read(tmp_path / "b.h5")


def test_weights_of_keras_2_have_their_own_names(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="needs: make extras")
    kernel = np.random.rand(4, 2).astype("float32")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["model_weights/dense/dense/kernel:0"] = kernel
        file["model_weights/dense/dense/bias:0"] = np.ones(2, "float32")
        file["optimizer_weights/Adam/dense/kernel/m:0"] = kernel
    model = nn.Linear(4, 2)
    found = layouts.onto(nn.Sequential(model), foreign.read(tmp_path / "a.h5")["state_dict"])
    assert torch.equal(found.weights["0.weight"], torch.from_numpy(kernel.T))
    assert set(found.weights) == {"0.weight", "0.bias"}


def test_arrays_in_chunks_and_of_bfloat16_are_read(tmp_path: Path) -> None:
    msgpack = pytest.importorskip("msgpack", reason="needs: make extras")

    def packed(one: Tensor, kind: str) -> object:
        data = one.view(torch.uint8).numpy().tobytes()
        return msgpack.ExtType(1, msgpack.packb((list(one.shape), kind, data)))

    whole = torch.arange(6.0)
    chunks = {"0": packed(whole[:4], "float32"), "1": packed(whole[4:], "float32")}
    large = {"__msgpack_chunked_array__": True, "shape": {"0": 2, "1": 3}, "chunks": chunks}
    half = torch.ones(2, 2, dtype=torch.bfloat16)
    content = {"params": {"large": large, "half": packed(half, "bfloat16")}}
    (tmp_path / "a.msgpack").write_bytes(msgpack.packb(content))
    found = foreign.read(tmp_path / "a.msgpack")["state_dict"]
    assert torch.equal(found["params/large"], whole.reshape(2, 3))
    assert torch.equal(found["params/half"], half)


@pytest.mark.parametrize(("name", "package"), [("net.keras", "h5py"), ("net.msgpack", "msgpack")])
def test_a_missing_package_is_named(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(CheckpointForeignError, match=rf"{package} was expected\. Install it: pip"):
        foreign.read(FILES / name)
