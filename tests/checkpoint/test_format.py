import argparse
import collections
import dataclasses
import datetime
import enum
import functools
import io
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st
from support.checkpoint_files import facts, small_state

from savepoint.checkpoint import format, manifest, store
from savepoint.checkpoint.archive import Archive
from savepoint.errors import CheckpointContentError, CheckpointCorruptError


class Colour(enum.Enum):
    RED = 1


class Text(enum.StrEnum):
    A = "a"


@dataclasses.dataclass
class Config:
    size: int = 3


# Ordinary values of hyper-parameters. Whether torch reads one back may change with its version;
# silence may not.
VALUES = {
    "path": Path("/data"),
    "numpy scalar": np.float32(0.5),
    "numpy array": np.ones(3),
    "enum": Colour.RED,
    "enum of str": Text.A,
    "dataclass": Config(),
    "timedelta": datetime.timedelta(seconds=3),
    "datetime": datetime.datetime(2026, 1, 1),
    "range": range(3),
    "namespace": argparse.Namespace(a=1),
    "class": Config,
    "loss": torch.nn.CrossEntropyLoss(),
    "partial": functools.partial(max, 1),
    "defaultdict": collections.defaultdict(list),
    "frozenset": frozenset({1}),
    "a huge int": 1 << 5000,
    "dtype": torch.float16,
    "size": torch.Size([1, 2]),
    "set": {1, 2},
    "device": torch.device("cuda", 3),
    "bytes": b"\x00\xff",
    "no bytes": b"",
    "bytearray": bytearray(b"ab"),
    "ordered dict": collections.OrderedDict(a=1),
    "counter": collections.Counter("aab"),
    "int": 2**40,
    "float": float("inf"),
    "complex": 1 + 2j,
    "half a surrogate pair": "\ud800",
    "none": None,
    "bool": True,
}
READ_BACK = [
    "dtype",
    "size",
    "set",
    "device",
    "bytes",
    "int",
    "float",
    "complex",
    "none",
    "bool",
    "ordered dict",
]


def written(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    return format.decode(store.write(path, state, facts(1)).path)


@pytest.mark.parametrize("name", VALUES)
def test_a_value_reads_back_equal_or_is_refused_by_name(tmp_path: Path, name: str) -> None:
    value = VALUES[name]
    state = {"epoch": 1, "hyper_parameters": {"deep": [0, {"root": value}]}}
    if name in READ_BACK or torch_reads_back(value):
        back = written(tmp_path / "a.ckpt", state)["hyper_parameters"]["deep"][1]["root"]
        assert back == value
        assert type(back) is type(value)
        return
    with pytest.raises(CheckpointContentError) as error:
        store.write(tmp_path / "a.ckpt", state, facts(1))
    assert error.value.key == "hyper_parameters.deep[1].root"
    assert (
        f"hyper_parameters.deep[1].root is a {type(value).__module__}.{type(value).__qualname__}"
        in str(error.value)
    )
    assert "weights_only" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def torch_reads_back(value: Any) -> bool:
    """What torch itself says: a whole file with this value, written and loaded."""
    file = io.BytesIO()
    torch.save({"value": value}, file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True


def test_a_key_that_cannot_be_read_back_is_refused() -> None:
    with pytest.raises(
        CheckpointContentError, match=r"the key a\.Colour\.RED is a test_format\.Colour"
    ):
        format.check_readable({"a": {"RED": 1, Colour.RED: 2}})


def test_what_hangs_on_a_state_dict_is_looked_at_too() -> None:
    state = torch.nn.Linear(2, 2).state_dict()
    format.check_readable({"state_dict": state})
    state._metadata["x"] = Path("a")
    with pytest.raises(CheckpointContentError, match=r"state_dict\._metadata\.x"):
        format.check_readable({"state_dict": state})


def test_a_state_that_holds_itself_is_looked_at_once() -> None:
    state: dict[str, Any] = {"a": 1}
    state["self"] = state
    format.check_readable(state)


def test_a_tensor_of_another_class_is_refused() -> None:
    class Odd(torch.Tensor):
        pass

    with pytest.raises(CheckpointContentError, match="Odd"):
        format.check_readable({"x": torch.ones(2).as_subclass(Odd)})


@pytest.mark.filterwarnings("ignore:Validating sparse:UserWarning")
@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12).reshape(3, 4).T[1:],
        torch.tensor(3.5, dtype=torch.bfloat16),
        torch.empty(0, 3),
        torch.ones(3, dtype=torch.complex64).conj(),
        torch.tensor([True, False]),
        torch.eye(3).to_sparse(),
        torch.nn.Parameter(torch.ones(2)),
        torch.arange(4, dtype=torch.float32)[::2],
    ],
    ids=lambda tensor: f"{tensor.dtype} {tuple(tensor.shape)} {tensor.layout}",
)
def test_every_kind_of_tensor_reads_back(tmp_path: Path, tensor: torch.Tensor) -> None:
    back = written(tmp_path / "a.ckpt", {"x": tensor, "y": [tensor]})
    assert back["x"].dtype == tensor.dtype
    assert torch.equal(back["x"].to_dense(), tensor.detach().to_dense())
    assert type(back["x"]) is type(tensor)


def test_tensors_that_share_memory_share_it_in_the_file(tmp_path: Path) -> None:
    big = torch.randn(200, 200)
    one = store.write(tmp_path / "a.ckpt", {"x": big}, facts(1)).path
    two = store.write(
        tmp_path / "b.ckpt", {"x": big, "y": {"again": big, "row": big[3]}}, facts(1)
    ).path
    assert two.stat().st_size - one.stat().st_size < 1000
    back = format.decode(two)
    assert back["x"].data_ptr() == back["y"]["again"].data_ptr()


def test_saving_takes_no_memory_for_the_whole(tmp_path: Path) -> None:
    """64 MB of tensors go to the file one by one, as they are; in a process of its own, as memory
    stays taken.
    """
    program = (
        "import resource, sys, torch; from pathlib import Path; from savepoint.checkpoint import "
        "store\n"
        "state = {'state_dict': {str(n): torch.ones(1 << 20) for n in range(16)}}\n"
        "store.write(Path(sys.argv[1]) / 'a.ckpt', {'x': torch.ones(3)}, {'step': 1})\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "store.write(Path(sys.argv[1]) / 'b.ckpt', state, {'step': 2})\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 8 * 1024  # kB


@pytest.mark.parametrize("at", [1, 3, 12, 20])
def test_what_the_file_system_says_is_raised(at: int) -> None:
    class Full(io.BytesIO):
        writes = 0

        def write(self, data: Any) -> int:
            self.writes += 1
            if self.writes >= at:
                raise OSError(28, "No space left on device")
            return super().write(data)

    with pytest.raises(OSError, match="No space left on device"):
        format.encode(small_state(), facts(1), Full())


@contextmanager
def tagged(location: str) -> Iterator[None]:
    """Tensors that are saved in the block say that they were on `location`: torch's own way to name
    a device.
    """
    before = list(torch.serialization._package_registry)
    torch.serialization.register_package(-1, lambda storage: location, lambda storage, tag: None)
    try:
        yield
    finally:
        torch.serialization._package_registry[:] = before


@pytest.mark.parametrize("location", ["cuda:0", "cuda:3", "mps", "xpu:1"])
def test_a_checkpoint_of_a_device_that_is_not_here_loads(tmp_path: Path, location: str) -> None:
    state = small_state()
    with tagged(location):
        path = store.write(tmp_path / "a.ckpt", state, facts(1)).path
    assert location.encode() in path.read_bytes()
    for back in (store.load(path)[0], format.decode(path), format.decode(path, mmap=True)):
        assert back["state_dict"]["weight"].device.type == "cpu"
        assert format.fingerprint(back) == format.fingerprint(state)


def test_a_file_that_runs_a_program_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "a.ckpt"
    with path.open("w+b") as file:
        archive = Archive(file)
        archive.save({"x": Payload()})
        archive.seal(facts(1))
    assert manifest.verify(path)["step"] == 1
    with pytest.raises(CheckpointCorruptError) as error:
        store.load(path)
    assert "weights_only" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_an_older_format_is_brought_up_step_by_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store.write(tmp_path / "a.ckpt", {"x": 1}, facts(1)).path
    monkeypatch.setattr(manifest, "FORMAT_VERSION", 3)
    monkeypatch.setattr(
        format,
        "MIGRATIONS",
        {1: lambda state: state | {"y": 2}, 2: lambda state: {"z": state["y"] + 1}},
    )
    assert format.decode(path) == {"z": 3}


def test_an_archive_without_a_seal_is_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match=str(path)):
        format.decode(path)


# -- fingerprints --------------------------------------------------------------------------------

plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.binary(max_size=3)
)
trees = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=2) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=8,
)


def described(tree: Any) -> Any:
    """A text that is equal if and only if two trees are equal in every value, type and bit; dicts
    in any order.
    """
    if isinstance(tree, dict):
        return (
            "{"
            + ",".join(
                sorted(f"{described(key)}:{described(value)}" for key, value in tree.items())
            )
            + "}"
        )
    if isinstance(tree, list | tuple):
        return f"{type(tree).__name__}[{','.join(described(item) for item in tree)}]"
    return f"{type(tree).__name__} {tree.hex() if isinstance(tree, float | bytes) else ascii(tree)}"


@given(trees, trees)
def test_fingerprints_are_equal_exactly_where_trees_are(one: Any, two: Any) -> None:
    assert (format.fingerprint(one) == format.fingerprint(two)) == (
        described(one) == described(two)
    )


@given(trees)
def test_a_fingerprint_survives_the_file(tree: Any) -> None:
    try:
        format.check_readable(tree)
    except CheckpointContentError:  # b"", and integers of more than 2,000 bits
        reject()
    file = io.BytesIO()
    torch.save(tree, file)
    file.seek(0)
    assert format.fingerprint(torch.load(file, weights_only=True)) == format.fingerprint(tree)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(2), -torch.zeros(2)),
        (torch.tensor(1), 1),
        (1, 1.0),
        (True, 1),
        ([1, [2]], [[1], 2]),
        (["ab", "c"], ["a", "bc"]),
        (
            torch.tensor([1.0, 2.0]),
            torch.tensor([1.0, torch.tensor(2.0).nextafter(torch.tensor(3.0))]),
        ),
    ],
)
def test_a_fingerprint_shows_each_difference(one: Any, two: Any) -> None:
    assert format.fingerprint({"a": one}) != format.fingerprint({"a": two})


def test_a_fingerprint_is_the_same_for_another_order_and_layout() -> None:
    square = torch.arange(9.0).reshape(3, 3)
    one = {"a": square.T.contiguous(), "b": {"x": 1, "y": (None, {2, 3})}}
    two = {"b": {"y": (None, {3, 2}), "x": 1}, "a": square.T}
    assert format.fingerprint(one) == format.fingerprint(two)


def test_numpy_numbers_are_saved_as_pythons_own(tmp_path: Path) -> None:
    named = collections.OrderedDict({np.int64(3): [np.float64(0.1)]})
    named.extra = {"flag": np.bool_(True)}  # type: ignore[attr-defined]
    state = {"lr": np.float64(0.3), "inner": (named, {np.int32(7)})}
    with (tmp_path / "a.ckpt").open("w+b") as file:
        format.encode(state, {"step": 1}, file)
    read = format.decode(tmp_path / "a.ckpt")
    assert read == {"lr": 0.3, "inner": (collections.OrderedDict({3: [0.1]}), {7})}
    assert read["inner"][0].extra == {"flag": True}
    assert type(read["lr"]) is float
    assert type(state["lr"]) is np.float64
