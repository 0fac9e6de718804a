"""Decoder-only transformers with a hand-written backward pass."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mantrans.models.transformer import CustomTransformer
    from mantrans.proof.check import check_gradients
    from mantrans.wrapper import CustomTransformerWrapper

__all__ = ["CustomTransformer", "CustomTransformerWrapper", "check_gradients"]
__version__ = "0.1.0"

_MODULES = {
    "CustomTransformer": "models.transformer",
    "CustomTransformerWrapper": "wrapper",
    "check_gradients": "proof.check",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that --help needs no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
