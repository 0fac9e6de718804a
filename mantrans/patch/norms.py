"""Layer norm and RMS norm modules through our operations, alone and after a residual's sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mantrans import ops
from mantrans.patch.replace import runs


def norm_forward(self: Any, x: Tensor) -> Tensor:
    """A module's own code where gains and inputs differ in dtype: results are of both then."""
    if self.weight.dtype != x.dtype:
        return self.forward_before_patch(x)
    return _normalized(self, x, None)


def add_norm(norm: nn.Module, branch: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """norm(branch + residual), and the sum, in the wider dtype of the two."""
    dtype = torch.promote_types(branch.dtype, residual.dtype)
    if not runs(norm, norm_forward) or norm.weight.dtype != dtype:
        total = branch + residual
        return norm(total), total
    return _normalized(norm, branch.to(dtype), residual.to(dtype))


def _normalized(norm: Any, x: Tensor, residual: Tensor | None) -> Any:
    if isinstance(norm, nn.LayerNorm):
        return ops.layer_norm(x, norm.weight, norm.bias, norm.eps, residual)
    return ops.rms_norm(x, norm.weight, norm.variance_epsilon, residual)
