"""Which weights count as finite, whatever their sums are."""

import pytest
import torch
from torch import nn

from savepoint.checkpoint.finite import _all_finite

LARGEST = torch.finfo(torch.float32).max
TWO_LARGEST = torch.full((2,), torch.finfo(torch.float64).max, dtype=torch.float64)


def all_finite(module: torch.nn.Module) -> bool:
    return _all_finite(list(module.parameters()), list(module.buffers()))


def module(weights: torch.Tensor, buffer: torch.Tensor | None = None) -> nn.Module:
    made = nn.Module()
    made.weights = nn.Parameter(weights, requires_grad=False)
    made.register_buffer("mask", buffer)
    return made


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found(dtype: torch.dtype, bad: float) -> None:
    weights = torch.ones(5000, dtype=dtype)
    assert all_finite(module(weights))
    weights[4321] = bad
    assert not all_finite(module(weights))


def test_infinities_that_cancel_are_found() -> None:
    weights = torch.ones(9)
    weights[:2] = torch.tensor([float("inf"), -float("inf")])
    assert not all_finite(module(weights))


@pytest.mark.parametrize("weights", [
    torch.full((64,), LARGEST), torch.full((4096,), 60000.0, dtype=torch.float16), TWO_LARGEST,
    torch.zeros(0), torch.tensor([2**62, 2**62]), torch.tensor([True, False]),
], ids=["largest", "half", "double", "empty", "whole numbers", "truth values"])  # fmt: skip
def test_finite_weights_whose_sum_overflows_are_finite(weights: torch.Tensor) -> None:
    assert all_finite(module(weights)) is bool(torch.isfinite(weights).all())


def test_a_mask_may_be_infinite_and_not_nan() -> None:
    assert all_finite(module(torch.ones(3), torch.tensor([0.0, -float("inf")])))
    assert not all_finite(module(torch.ones(3), torch.tensor([0.0, float("nan")])))
