"""Decoder-only transformers with a hand-written backward pass."""

from mantrans.models.transformer import CustomTransformer
from mantrans.wrapper import CustomTransformerWrapper

__all__ = ["CustomTransformer", "CustomTransformerWrapper"]
__version__ = "0.1.0"
