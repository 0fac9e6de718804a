"""The layers. Each describes itself completely; no other code knows what is inside.

A layer holds `Parameter`s, which get their memory from `Parameters`, and the module of operations
(`ops`, see `mantrans.kernels.backend`) that it computes with.

    parameters()         its parameters, in the order of the forward
    forward(x)           -> y, saved     `saved` is what the backward needs, named as in formulas
    backward(dy, saved)  -> dx           the forward in reverse; weight gradients are added to, or
                                         overwritten with accumulate=False
    flops(T)             operations of the forward per token of a sequence of length T
    kept()               elements per token that the forward keeps for the backward
    workspace()          further elements per token that are alive during the backward

Tensors: B batch, T sequence, C model width, H heads, D head width, F feed-forward width, V
vocabulary, N = B·T rows; x is (B, T, C) throughout.
"""

from mantrans.layers.attention import Attention, KeyValueCache
from mantrans.layers.block import Block
from mantrans.layers.elements import Elements
from mantrans.layers.embedding import Embedding
from mantrans.layers.linear import Linear
from mantrans.layers.mlp import GELUMLP, MLP, SwiGLUMLP
from mantrans.layers.norm import LayerNorm, Norm, RMSNorm
from mantrans.layers.output import Output
from mantrans.layers.rotary import Angles, Rotary, Scaling

__all__ = [
    "GELUMLP",
    "MLP",
    "Angles",
    "Attention",
    "Block",
    "Elements",
    "Embedding",
    "KeyValueCache",
    "LayerNorm",
    "Linear",
    "Norm",
    "Output",
    "RMSNorm",
    "Rotary",
    "Scaling",
    "SwiGLUMLP",
]
