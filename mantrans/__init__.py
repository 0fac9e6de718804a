"""Decoder-only transformers with a hand-written backward pass."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mantrans.models.transformer import CustomTransformer
    from mantrans.wrapper import CustomTransformerWrapper

__all__ = ["CustomTransformer", "CustomTransformerWrapper"]
__version__ = "0.1.0"

_MODULES = {"CustomTransformer": "models.transformer", "CustomTransformerWrapper": "wrapper"}


def __getattr__(name: str) -> Any:
    """Import a class when it is first used, so that the command line's --help needs no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
