"""What the outputs in a checkpoint are compared with, for forwards of every kind."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from savepoint.checkpoint import format, store
from savepoint.checkpoint.canary import canary
from savepoint.errors import ConfigMismatchError
from savepoint.resume.overrides import check_canary

INF, NAN = float("inf"), float("nan")


class Pair(NamedTuple):
    one: Tensor
    other: Any


class Net(LightningModule):
    """`shift` stands for a change of the code that shows in the output."""

    def __init__(
        self, after: Callable[["Net", Tensor], Any], example: Any = None, shift: float = 0.0
    ) -> None:
        super().__init__()
        self.after, self.shift = after, shift
        self.layer = nn.Linear(3, 3)
        nn.init.eye_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)
        self.register_buffer("count", torch.zeros(1))
        self.calls, self.seen = 0, []
        self.example_input_array = torch.ones(2, 3) if example is None else example

    def forward(self, x: Any, more: Any = None) -> Any:
        x = x["x"] if isinstance(x, dict) else x
        return self.after(self, self.layer(x) + self.shift + (0 if more is None else more))


def raising(net: Net, y: Tensor) -> Tensor:
    raise RuntimeError("only in training")


def counting(net: Net, y: Tensor) -> Tensor:
    net.calls += 1
    return y


def keeping(net: Net, y: Tensor) -> Tensor:
    net.seen.append(y)
    return y


def buffering(net: Net, y: Tensor) -> Tensor:
    net.count += 1
    return y + net.count


ONCE = iter(range(1000))
FORWARDS: dict[str, Any] = {
    "plain": lambda net, y: y,
    "drawn by torch": lambda net, y: y + torch.randn_like(y),
    "drawn by numpy": lambda net, y: y + float(np.random.rand()),
    "drawn by python": lambda net, y: y + random.random(),
    "a mask": lambda net, y: y.masked_fill(torch.eye(2, 3).bool(), -INF),
    "no number": lambda net, y: y.masked_fill(torch.eye(2, 3).bool(), NAN),
    "whole numbers": lambda net, y: (10 * y).long(),
    "truth values": lambda net, y: y > 1.5,
    "half": lambda net, y: y.half(),
    "complex": lambda net, y: torch.complex(y, y),
    "tuple": lambda net, y: (torch.zeros(1), y),
    "named tuple": lambda net, y: Pair(torch.zeros(1), [y]),
    "dict": lambda net, y: {"a": {"b": y}, "text": "no tensor"},
    "a buffer that changes": buffering,
}
EACH = pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)


def stored(net: Net, path: Path) -> dict[str, Any]:
    """What a file gives back of the second save in a process."""
    saved: dict[str, Any] = {"state_dict": net.state_dict()}
    canary(net, saved["state_dict"])
    saved["canary"] = canary(net, saved["state_dict"])
    store.write(path, saved, {"step": 1, "epoch": 0})
    return format.decode(path)


@EACH
def test_the_same_code_gives_the_same_and_other_code_is_found(forward: Any, tmp_path: Path) -> None:
    saved = stored(Net(forward), tmp_path / "a.ckpt")
    assert saved["canary"] is not None
    torch.manual_seed(17)
    check_canary(Net(forward), saved)
    with pytest.raises(ConfigMismatchError, match="computes something else"):
        check_canary(Net(forward, shift=1.0), saved)


@pytest.mark.parametrize(
    "example",
    [
        (torch.ones(2, 3), torch.ones(1)),
        {"x": torch.ones(2, 3), "more": torch.ones(1)},
        ({"x": torch.ones(2, 3)}, 2),
    ],
    ids=["tuple", "dict", "nested"],
)
def test_an_example_may_be_all_arguments(example: Any, tmp_path: Path) -> None:
    saved = stored(Net(FORWARDS["plain"], example), tmp_path / "a.ckpt")
    assert saved["canary"] is not None
    check_canary(Net(FORWARDS["plain"]), saved)
    with pytest.raises(ConfigMismatchError, match="computes something else"):
        check_canary(Net(FORWARDS["plain"], shift=1.0), saved)


@pytest.mark.parametrize(
    "forward",
    [raising, counting, keeping, lambda net, y: y + next(ONCE), lambda net, y: "text"],
    ids=["raises", "counts", "keeps", "never the same", "text"],
)
def test_a_forward_that_cannot_be_repeated_has_no_canary(forward: Any, tmp_path: Path) -> None:
    net = Net(forward)
    assert canary(net, net.state_dict()) is None
    assert canary(net, net.state_dict()) is None


@pytest.mark.parametrize("forward", [counting, keeping, buffering, FORWARDS["drawn by torch"]])
def test_the_module_and_the_generators_are_as_before(forward: Any) -> None:
    net = Net(forward)
    net.layer.eval()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for _ in range(2):
        canary(net, net.state_dict())
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert (net.calls, net.seen, float(net.count), net.training, net.layer.training) == (
        0,
        [],
        0.0,
        True,
        False,
    )


@pytest.mark.parametrize("layer", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_recurrent_layer_has_a_canary_and_goes_on_with_its_own_weights(
    layer: type[nn.RNNBase],
) -> None:
    class Recurrent(Net):
        def __init__(self) -> None:
            super().__init__(lambda net, y: net.recurrent(y)[0])
            self.recurrent = layer(3, 2)

    net = Recurrent()
    given = {name: torch.zeros_like(value) for name, value in net.state_dict().items()}
    for _ in range(2):
        found = canary(net, given)
        assert found
        assert found["output"].abs().sum() == 0
        assert [id(one) for one in net.recurrent._flat_weights] == [
            id(one) for one in net.recurrent.parameters()
        ]


def test_a_file_from_before_draws_were_fixed_is_compared_where_nothing_is_drawn() -> None:
    net = Net(FORWARDS["plain"])
    saved = {
        "state_dict": net.state_dict(),
        "canary": {"input": torch.ones(2, 3), "output": torch.ones(2, 3)},
    }
    check_canary(net, saved)
    with pytest.raises(ConfigMismatchError, match="computes something else"):
        check_canary(Net(FORWARDS["plain"], shift=1.0), saved)
    check_canary(Net(FORWARDS["drawn by torch"]), saved)


def test_a_forward_that_raises_now_is_other_code(tmp_path: Path) -> None:
    saved = stored(Net(FORWARDS["plain"]), tmp_path / "a.ckpt")
    with pytest.raises(ConfigMismatchError, match="raises RuntimeError \\(only in training\\)"):
        check_canary(Net(raising), saved)


@pytest.mark.parametrize("name", ["layer.weight", "count"])
def test_the_weights_of_another_state_are_those_that_are_computed_with(name: str) -> None:
    net = Net(lambda net, y: y + net.count)
    own = canary(net, net.state_dict())
    state = dict(net.state_dict())
    state[name] = state[name].clone()
    assert canary(net, state)["output"].equal(own["output"])
    state[name] += 1
    assert not canary(net, state)["output"].equal(own["output"])
    assert canary(net, net.state_dict())["output"].equal(own["output"])
