"""The networks: which layers a config asks for, and the model that computes with them."""

from __future__ import annotations

from types import ModuleType

from mantrans.config import ModelConfig
from mantrans.kernels import reference
from mantrans.models import composition
from mantrans.models.family import Family
from mantrans.models.gpt2 import GPT2
from mantrans.models.llama import LLAMA, QWEN2, QWEN3
from mantrans.models.network import Network
from mantrans.models.starcoder2 import STARCODER2

FAMILIES: tuple[Family, ...] = (GPT2, LLAMA, QWEN2, QWEN3, STARCODER2)


def build(
    config: ModelConfig, ops: ModuleType = reference, recompute_activation: bool = False
) -> Network:
    """The network that `config` describes; it has no memory until `Parameters` allocates it."""
    return composition.network(config, ops, recompute_activation)
