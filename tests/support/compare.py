"""Equality to the bit; and one measure of error, the relative root mean square of a difference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def assert_same_bits(one: Any, other: Any, where: str = "") -> None:
    """The same types, and the same bits in tensors: NaN is equal to itself, and 0 is not -0."""
    assert type(one) is type(other), where
    if isinstance(one, Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), where
        bits = [x.contiguous().view(-1).view(torch.uint8) for x in (one, other)]
        assert torch.equal(*bits), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_same_bits(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same_bits(left, right, f"{where}[{number}]")
    else:
        assert repr(one) == repr(other), where


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖ in float64. NaN in either is an infinite error.

    Where `expected` is all zeros the norm of `actual` itself is returned.
    """
    assert actual.shape == expected.shape, f"shapes {actual.shape} and {expected.shape}"
    difference = (actual.double() - expected.double()).norm()
    if not torch.isfinite(difference):
        return float("inf")
    scale = expected.double().norm()
    return (difference / scale if scale > 0 else difference).item()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """`relative_error` is at most `tolerance`; says by how much it is not."""
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what or 'tensor'}: relative error {error:.2e} > {tolerance:.0e}"
