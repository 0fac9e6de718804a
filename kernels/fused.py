"""The Triton operations, gathered under the names that `reference` and `native` give them.

Matrix products are cuBLAS's, as in `native`: nothing is gained over it. All else is one kernel, or
two where a sum over all rows is needed, in the file that bears its name.
"""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.adamw import adamw_update
from kernels.attention import attention_backward, attention_forward
from kernels.bias_gradient import bias_gradient
from kernels.cross_entropy import (
    cross_entropy_backward,
    cross_entropy_forward,
    cross_entropy_forward_backward,
    linear_cross_entropy_forward,
    linear_cross_entropy_forward_backward,
)
from kernels.decode_attention import decode_attention
from kernels.embedding import embedding_backward, embedding_forward
from kernels.gelu import bias_gelu_backward, bias_gelu_forward
from kernels.gradient_norm import gradient_norm
from kernels.layer_norm import add_layer_norm_forward, layer_norm_backward, layer_norm_forward
from kernels.native import linear_forward
from kernels.reference import document_starts
from kernels.sgd import sgd_update

__all__ = [
    "adamw_update",
    "add_layer_norm_forward",
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
    "gradient_norm",
    "layer_norm_backward",
    "layer_norm_forward",
    "linear_backward",
    "linear_cross_entropy_forward",
    "linear_cross_entropy_forward_backward",
    "linear_forward",
    "sgd_update",
]


def linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, dweight: Tensor, dbias: Tensor | None = None
) -> Tensor:
    """See `reference.linear_backward`: native's products, and our column sums for the bias."""
    if dbias is not None:
        bias_gradient(dy, dbias)
    return native.linear_backward(dy, x, weight, dweight)
