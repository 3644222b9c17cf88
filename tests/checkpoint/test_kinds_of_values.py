"""Weights and buffers of every kind, and what `get_extra_state` gives: saved, resumed, compared and
searched for NaN.
"""

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.run_dirs import say
from support.small import SmallModel, difference, final_state, fit
from torch import Tensor, nn

from savepoint.checkpoint import format, store
from savepoint.checkpoint.callback import CheckpointCallback
from savepoint.checkpoint.finite import _all_finite
from savepoint.resume.overrides import ApplyOverrides

warnings.filterwarnings("ignore", message=".*[Ss]parse.*")
pytestmark = pytest.mark.filterwarnings("ignore:.*[Ss]parse:UserWarning")

ROWS = torch.tensor([[0.0, 1.5, 0.0], [0.0, 0.0, 2.5]])
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
VALUES: dict[str, Any] = {
    **{str(kind).removeprefix("torch."): ROWS.to(kind) for kind in FLOAT8},
    "coo": ROWS.to_sparse(),
    "coo not coalesced": torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (2, 3)),
    "csr": ROWS.to_sparse_csr(),
    "csc": ROWS.to_sparse_csc(),
    "complex": torch.complex(ROWS, ROWS),
    "bool": ROWS > 1,
    "uint16": ROWS.to(torch.uint16),
    "no dimension": torch.tensor(1.5),
    "empty": torch.zeros(0, 3),
}
EACH = pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)


def all_finite(module: torch.nn.Module) -> bool:
    return _all_finite(list(module.parameters()), list(module.buffers()))


def holding(value: Tensor) -> SmallModel:
    model = SmallModel()
    model.register_buffer("held", value.clone())
    return model


class Extra(nn.Module):
    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


class WithExtra(SmallModel):
    def __init__(self, state: Any) -> None:
        super().__init__()
        self.extra = Extra(state)


def resumed(directory: Path, model: Any, asynchronous: bool = False) -> list[str]:
    """A run of two epochs, and its first checkpoint resumed: what is different at the end."""

    def saving() -> CheckpointCallback:
        return CheckpointCallback(
            monitor="val/loss", mode="min", keep_last=9, async_save=asynchronous
        )

    fit(directory / "straight", checkpointing=saving(), model=model, max_epochs=2)
    file = sorted((directory / "straight" / "checkpoints").glob("step-*"))[0]
    state, facts = store.load(file)
    (directory / "again").mkdir()
    shutil.copy(directory / "straight" / "metrics.csv", directory / "again")
    fit(
        directory / "again", checkpointing=saving(), model=model, max_epochs=2, ckpt_path=file,
        keep_rows=state["logged_rows"], callbacks=lambda: [ApplyOverrides(state, facts, {}, [])],
    )  # fmt: skip
    one, other = final_state(directory / "straight"), final_state(directory / "again")
    assert format.fingerprint(one["state_dict"]) == format.fingerprint(other["state_dict"])
    return list(difference(one["optimizer_states"], other["optimizer_states"]))


@EACH
@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "in a thread"])
def test_a_buffer_of_any_kind_is_saved_and_resumed(
    value: Tensor, asynchronous: bool, tmp_path: Path
) -> None:
    assert not resumed(tmp_path, lambda: holding(value), asynchronous)


@pytest.mark.parametrize(
    "state",
    [{"a": [1, 2.5, "b"]}, 3, torch.ones(2), None],
    ids=["dict", "number", "tensor", "none"],
)
def test_extra_state_is_saved_resumed_and_compared(
    state: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not resumed(tmp_path, lambda: WithExtra(state))
    a, b = (str(tmp_path / name) for name in ("straight", "again"))
    assert say(capsys, "diff", a, b)[0] == 0
    for words in (("show", a), ("verify", "--deep", a)):
        assert say(capsys, *words)[0] == 0
    files = [tmp_path / "one.ckpt", tmp_path / "two.ckpt"]
    for file, extra in zip(files, (state, {"other": 1}), strict=True):
        store.write(file, {"state_dict": {"extra._extra_state": extra}}, {"step": 1, "epoch": 0})
    code, out, _ = say(capsys, "diff", *files)
    assert code == 1
    assert "extra._extra_state  other values" in out


@EACH
def test_files_with_any_value_are_compared_shown_and_looked_through(
    value: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "one.ckpt", tmp_path / "same.ckpt", tmp_path / "two.ckpt"]
    for file, held in zip(files, (value, value.clone(), torch.zeros(2, 3)), strict=True):
        store.write(file, {"state_dict": {"held": held}}, {"step": 1, "epoch": 0})
    assert say(capsys, "diff", *files[:2])[0] == 0
    assert say(capsys, "diff", files[0], files[2])[0] == 1
    for words in (("show", files[0]), ("verify", "--deep", files[0])):
        assert say(capsys, *words)[0] == 0


def with_nan(value: Tensor) -> Tensor:
    rows = ROWS.clone()
    rows[0, 1] = float("nan")
    if value.layout is torch.sparse_csc:
        return rows.to_sparse_csc()
    if value.layout is not torch.strided:
        return rows.to_sparse_csr() if value.layout is torch.sparse_csr else rows.to_sparse()
    return rows.to(value.dtype)


@pytest.mark.parametrize(
    "name", [name for name in VALUES if name.startswith(("float8", "coo", "cs", "complex"))]
)
def test_a_nan_in_a_value_of_any_kind_is_found(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert all_finite(holding(VALUES[name]))
    bad = with_nan(VALUES[name])
    assert not all_finite(holding(bad))
    store.write(tmp_path / "a.ckpt", {"state_dict": {"held": bad}}, {"step": 1, "epoch": 0})
    code, out, _ = say(capsys, "verify", "--deep", tmp_path / "a.ckpt")
    assert code == 1
    assert "is not finite in 1 tensor: state_dict.held" in out
