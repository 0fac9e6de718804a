"""The lines of the project's own code that computed something, read when the page is made."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOP = Path(os.path.realpath(__file__)).parents[2]


def source(function: Callable) -> dict[str, Any]:
    """A function's lines, as they are in its file now, and where that is."""
    lines, first = inspect.getsourcelines(function)
    where = place(inspect.getsourcefile(function) or "", first)
    return {**where, "source": "".join(lines).rstrip()}


def place(file: str | Path, line: int | None = None) -> dict[str, Any]:
    """file: from the top of the repository, kernels/reference.py; path: the whole, None if there is
    no such file, as there are no docs in an installed package."""
    path = Path(os.path.realpath(file))
    shown = path.relative_to(TOP).as_posix() if path.is_relative_to(TOP) else path.name
    return {"file": shown, "path": str(path) if path.is_file() else None, "line": line}
