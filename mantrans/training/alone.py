"""What only rank 0 has: the run's folders, its records, its checkpoints, its profile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from mantrans.distributed.world import World

P = ParamSpec("P")
Made = TypeVar("Made")


class Silent:
    """In place of such an object on the other ranks: whatever is called does nothing."""

    def __getattr__(self, name: str) -> Silent:
        return self

    def __call__(self, *arguments: Any, **keywords: Any) -> None:
        return None


def on_first(
    world: World, make: Callable[P, Made], *arguments: P.args, **keywords: P.kwargs
) -> Made:
    """`make(...)` on rank 0, a `Silent` elsewhere: its methods return None."""
    return make(*arguments, **keywords) if world.is_first else cast(Made, Silent())
