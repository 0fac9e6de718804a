"""A module's class, exchanged for one with another forward, and put back.

The class and not the instance's `forward`: PyTorch and transformers find a module's forward by its
class where they compile, copy, replicate or checkpoint it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

# A module, the class whose forward it must have, and what runs in its place.
Part = tuple[nn.Module, type[nn.Module], Callable[..., Any]]

OWN = "forward_before_patch"  # of an exchanged class: the forward of the class below it
PUT = "forward_of_patch"  # and what runs in its place


def put(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let `module` run forward(module, ...); as `module.forward_before_patch` it keeps its own."""
    module.__class__ = _exchanged(type(module), forward)  # type: ignore[arg-type]


def take_out(module: nn.Module) -> None:
    """Undo `put`; nothing for a module that has nothing to undo."""
    if is_put(module):
        module.__class__ = type(module).__mro__[1]


def is_put(module: nn.Module) -> bool:
    """Whether `put` made its class."""
    return OWN in vars(type(module))


def is_bare(module: nn.Module) -> bool:
    """Whether a call does no more than its class's forward: no hook, no forward of the instance."""
    hooked = (
        module._forward_hooks or module._forward_pre_hooks
        or module._backward_hooks or module._backward_pre_hooks
    )  # fmt: skip
    return not hooked and "forward" not in module.__dict__


def runs(module: nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether a call of `module` does no more than forward(module, ...)."""
    return getattr(type(module), PUT, None) is forward and is_bare(module)


@functools.cache
def _exchanged(kind: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    """A class with the name and the signatures of `kind`, by which transformers knows a model."""

    @functools.wraps(kind.forward)
    def shown(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        patched = hasattr(self, OWN)  # who wrapped this function calls it after `take_out` too
        return (forward if patched else kind.forward)(self, *args, **kwargs)

    name = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    parts = {"forward": shown, OWN: kind.forward, PUT: staticmethod(forward)}
    return type(kind.__name__, (kind,), {**name, **parts})
