"""A module's forward, exchanged for another and put back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

OWN = "_forward_before_patch"  # where a patched module keeps its own; None: its class's


def put(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let `module` run forward(module, ...), which shows the signature of what it replaces."""

    @functools.wraps(type(module).forward)
    def shown(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    setattr(module, OWN, vars(module).get("forward"))
    module.forward = MethodType(shown, module)


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """What `module` ran before `put`."""
    own = getattr(module, OWN)
    return MethodType(type(module).forward, module) if own is None else own


def take_out(module: nn.Module) -> None:
    """Undo `put`; nothing for a module that has nothing to undo."""
    if OWN in vars(module):
        own = vars(module).pop(OWN)
        del module.forward
        if own is not None:
            module.forward = own
