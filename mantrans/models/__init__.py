"""The networks: which layers a config asks for, and the model that computes with them."""

from __future__ import annotations

from types import ModuleType

from mantrans.config import ModelConfig
from mantrans.kernels import reference
from mantrans.models import gpt2
from mantrans.models.network import Network


def build(
    config: ModelConfig, ops: ModuleType = reference, recompute_gelu: bool = False
) -> Network:
    """The network that `config` describes; it has no memory until `Parameters` allocates it."""
    return gpt2.network(config, ops, recompute_gelu)
