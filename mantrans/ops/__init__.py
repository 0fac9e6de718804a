"""Our operations for any PyTorch model: under autograd and in `torch.compile(fullgraph=True)`.

Each is registered with `torch.library`, in torch.ops.mantrans; its gradient is our explicit
backward. On CUDA the Triton kernels compute, elsewhere and in float64 PyTorch's own primitives.
Inputs may have any leading shape and any strides; wrong ones are a ValueError that names them.
float64, float32, bfloat16 and float16; sums are float32 at least. Refused: gradients of gradients,
derivatives in forward mode, `torch.func.grad`. `torch.vmap` takes one example after the other.
"""

from mantrans.ops.attention import attention, packed_attention
from mantrans.ops.bias_gelu import bias_gelu
from mantrans.ops.cross_entropy import cross_entropy
from mantrans.ops.layer_norm import layer_norm
from mantrans.ops.linear_cross_entropy import linear_cross_entropy
from mantrans.ops.rms_norm import rms_norm
from mantrans.ops.rope import rope
from mantrans.ops.swiglu import swiglu

__all__ = [
    "attention",
    "bias_gelu",
    "cross_entropy",
    "layer_norm",
    "linear_cross_entropy",
    "packed_attention",
    "rms_norm",
    "rope",
    "swiglu",
]
