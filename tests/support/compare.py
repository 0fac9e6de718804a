"""One measure of error for every comparison: the root mean square of the difference, relative."""

from __future__ import annotations

import torch
from torch import Tensor


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
