"""What server and clients tell each other, beside the records that Flower's strategies know.

A message to a client has the records of the strategy and one of ours, `savepoint`: the order. A
reply has one too: what became of the order.
"""

# mypy: disable-error-code="import-not-found,misc,no-any-return,unused-ignore,untyped-decorator"
# Without Flower, which is optional, its types are Any.

import functools
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

_NPY = b"\x93NUMPY\x01\x00"  # how each array begins
RECORD = "savepoint"
ARRAYS = "arrays"
METRICS = "metrics"
CONFIG = "config"
SAMPLES = "num-examples"

Outcome = Literal["done", "failed", "refused"]


@dataclass
class Order:
    """What the server asks of a client.

    Attributes:
        config: Of the run, as YAML text.
        run_ids: Of the run, and of those that it was forked from, the nearest first.
        directory: Of the run: a client that sees it, as in a simulation, keeps its state in it.
        state_round: The round of the state to go on with; 0 for none.
        keep: The rounds of the states that checkpoints of the server still name.
        saves_model: Whether the whole model is to be kept.
        allows_lost: Whether a client whose state is lost begins anew.
    """

    config: str
    client: int
    server_round: int
    lr_factor: float
    run_ids: list[str]
    directory: str
    state_round: int = 0
    state_digest: str = ""
    keep: list[int] = field(default_factory=list)
    saves_model: bool = False
    allows_lost: bool = False

    def record(self) -> ConfigRecord:
        return ConfigRecord({key: value for key, value in asdict(self).items() if value != []})

    @classmethod
    def of(cls, content: RecordDict) -> "Order":
        values: Any = dict(content[RECORD])
        return cls(**values)


@dataclass
class Answer:
    """What became of an order.

    Attributes:
        outcome: `refused` ends the run, `failed` counts as a reply that is missing.
        text: Why.
        state_round: Of the state that was saved; 0 where none was.
        anew: Whether the client has begun anew, as its state was lost.
    """

    outcome: Outcome = "done"
    text: str = ""
    state_round: int = 0
    state_digest: str = ""
    anew: bool = False

    def record(self) -> ConfigRecord:
        return ConfigRecord(asdict(self))

    @classmethod
    def of(cls, content: RecordDict) -> "Answer":
        values: Any = dict(content[RECORD])
        return cls(**values)


def without_ours(content: RecordDict) -> RecordDict:
    return RecordDict({key: one for key, one in content.items() if key != RECORD})


def arrays_of(state: Mapping[str, Tensor]) -> ArrayRecord:
    """As they are sent: NumPy has no bfloat16, and half a precision is not averaged well; whole
    numbers, such as counts of batches, are not what strategies can multiply in place.
    """
    return ArrayRecord({name: Array(_as_sent(value).numpy()) for name, value in state.items()})


def _as_sent(value: Tensor) -> Tensor:
    if value.dtype in (torch.bfloat16, torch.float16):
        return value.float()
    return value if value.is_floating_point() or value.is_complex() else value.double()


def tensors_of(arrays: ArrayRecord, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In the types of `like`: a mean makes numbers with a fraction of all."""
    return {name: _as_type(array_of(one), like[name].dtype) for name, one in arrays.items()}


def array_of(array: Array) -> Any:
    """Its numbers, not to be written to: those of `Array.numpy`, which parses the same header anew
    for each client.
    """
    data = array.data
    if data[:8] != _NPY:
        return array.numpy()
    begin = 10 + int.from_bytes(data[8:10], "little")
    shape, by_column, dtype = _header(data[8:begin])
    return np.frombuffer(data, dtype, offset=begin).reshape(shape, order="F" if by_column else "C")


@functools.lru_cache(1000)
def _header(text: bytes) -> Any:
    return np.lib.format.read_array_header_1_0(io.BytesIO(text))


def _as_type(array: Any, dtype: torch.dtype) -> Tensor:
    tensor = torch.from_numpy(np.array(array))
    if tensor.is_floating_point() and not dtype.is_floating_point and not dtype.is_complex:
        tensor = tensor.round()
    return tensor.to(dtype)
