"""The Triton operations, under the names that `reference` and `native` give them.

Matrix products use cuBLAS, as in `native`: our own would not be faster. All else is one kernel,
or two if it sums over all rows, in a file of its name.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from mantrans.kernels import native
from mantrans.kernels.native import linear_forward, orthogonalize
from mantrans.kernels.reference import document_starts, head_sizes, window_starts
from mantrans.kernels.triton import attention
from mantrans.kernels.triton.adamw import adamw_update
from mantrans.kernels.triton.attention_tiles import MAX_HEAD_WIDTH
from mantrans.kernels.triton.bias_gradient import bias_gradient
from mantrans.kernels.triton.cross_entropy import (
    cross_entropy_backward,
    cross_entropy_forward,
    cross_entropy_forward_backward,
    linear_cross_entropy_forward,
    linear_cross_entropy_forward_backward,
)
from mantrans.kernels.triton.decode_attention import decode_attention
from mantrans.kernels.triton.embedding import embedding_backward, embedding_forward
from mantrans.kernels.triton.gelu import bias_gelu_backward, bias_gelu_forward
from mantrans.kernels.triton.gradient_norms import gradient_norms
from mantrans.kernels.triton.layer_norm import (
    add_layer_norm_forward,
    layer_norm_backward,
    layer_norm_forward,
)
from mantrans.kernels.triton.nesterov_momentum import nesterov_momentum
from mantrans.kernels.triton.norm_rotary import norm_rotary_backward, norm_rotary_forward
from mantrans.kernels.triton.partials import partial_rows, sum_partials
from mantrans.kernels.triton.rms_norm import (
    add_rms_norm_forward,
    rms_norm_backward,
    rms_norm_forward,
)
from mantrans.kernels.triton.rotary import rotary_backward, rotary_forward
from mantrans.kernels.triton.sgd import sgd_update
from mantrans.kernels.triton.swiglu import swiglu_backward, swiglu_forward

__all__ = [
    "adamw_update",
    "add_layer_norm_forward",
    "add_rms_norm_forward",
    "attention_backward",
    "attention_forward",
    "bias_gelu_backward",
    "bias_gelu_forward",
    "bias_gradient",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "cross_entropy_forward_backward",
    "decode_attention",
    "document_starts",
    "embedding_backward",
    "embedding_forward",
    "empty_statistics",
    "gradient_norms",
    "layer_norm_backward",
    "layer_norm_forward",
    "linear_backward",
    "linear_cross_entropy_forward",
    "linear_cross_entropy_forward_backward",
    "linear_forward",
    "nesterov_momentum",
    "norm_rotary_backward",
    "norm_rotary_forward",
    "orthogonalize",
    "partial_rows",
    "rms_norm_backward",
    "rms_norm_forward",
    "rotary_backward",
    "rotary_forward",
    "sgd_update",
    "sum_partials",
    "swiglu_backward",
    "swiglu_forward",
    "window_starts",
]


# dk and dv of wider float32 heads do not fit in a GPU's registers: they go by batched products.
WIDEST_FLOAT32_HEAD = 128


def attention_forward(
    qkv: Tensor,
    n_heads: int,
    document_start: Tensor | None = None,
    n_kv_heads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.attention_forward`."""
    ops = _attention_of(qkv, n_heads, n_kv_heads)
    return ops.attention_forward(qkv, n_heads, document_start, n_kv_heads)


def attention_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    n_heads: int,
    document_start: Tensor | None = None,
    n_kv_heads: int | None = None,
) -> Tensor:
    """See `reference.attention_backward`."""
    ops = _attention_of(qkv, n_heads, n_kv_heads)
    return ops.attention_backward(dout, qkv, out, lse, n_heads, document_start, n_kv_heads)


def empty_statistics(qkv: Tensor, n_heads: int, n_kv_heads: int | None = None) -> Tensor:
    """Unwritten statistics as `attention_forward` gives for qkv."""
    return _attention_of(qkv, n_heads, n_kv_heads).empty_statistics(qkv, n_heads, n_kv_heads)


def _attention_of(qkv: Tensor, n_heads: int, n_kv_heads: int | None) -> ModuleType:
    """The module that serves this dtype and head width."""
    _, D = head_sizes(qkv.shape[-1], n_heads, n_kv_heads)
    too_wide = WIDEST_FLOAT32_HEAD < D <= MAX_HEAD_WIDTH
    return native if qkv.dtype == torch.float32 and too_wide else attention


def linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    dweight: Tensor,
    dbias: Tensor | None = None,
    accumulate: bool = True,
) -> Tensor:
    """See `reference.linear_backward`. Products as in `native`; our column sums for the bias."""
    if dbias is not None:
        bias_gradient(dy, dbias)
    return native.linear_backward(dy, x, weight, dweight, accumulate=accumulate)
