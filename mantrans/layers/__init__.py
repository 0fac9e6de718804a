"""The layers. Each answers for itself; nobody else knows what is inside.

A layer is made of `Parameter`s, which get their memory when `Parameters` places them, and of the
module of operations (`ops`, see `mantrans.kernels.backend`) that it computes with.

    parameters()         its parameters, in the order in which it meets them
    forward(x)           -> y, saved     `saved` is what the backward needs, named as in mathematics
    backward(dy, saved)  -> dx           the forward read upwards; weight gradients are added to, or
                                         with accumulate=False overwritten
    flops(T)             operations of the forward, a token of a sequence of T
    kept()               elements that the forward keeps for the backward, a token
    workspace()          elements that the backward has alive besides, a token

Tensors: B batch, T sequence, C model width, H heads, D head width, F feed-forward width, V
vocabulary, N = B·T rows; x is (B, T, C) throughout.
"""

from mantrans.layers.attention import Attention, KeyValueCache
from mantrans.layers.block import Block
from mantrans.layers.elements import Elements
from mantrans.layers.embedding import Embedding
from mantrans.layers.linear import Linear
from mantrans.layers.mlp import MLP
from mantrans.layers.norm import LayerNorm
from mantrans.layers.output import Output

__all__ = [
    "MLP",
    "Attention",
    "Block",
    "Elements",
    "Embedding",
    "KeyValueCache",
    "LayerNorm",
    "Linear",
    "Output",
]
