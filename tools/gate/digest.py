"""A digest of all that decides what the GPU gets: the kernels' sources, and the configs' shapes.

Comments, docstrings and layout do not count, and neither does the version of Python, PyTorch or
Triton at hand: the versions that the gate ran with are recorded beside it. What layers launch is
not in it either: a new use of a kernel is the gate's to see when it next runs.
"""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_name("record.json")  # what `make gate` found last
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def digest(root: Path = ROOT) -> str:
    """Of the kernels and configs below `root`."""
    total = hashlib.sha256()
    for path in sorted((root / "kernels/triton").glob("*.py")):
        total.update(repr((path.name, form(ast.parse(path.read_text())))).encode())
    for path in sorted((root / "configs").glob("*.yaml")):
        config = yaml.safe_load(path.read_text())
        sizes = (config["model"], config["training"].get("batch_size"))
        total.update(json.dumps((path.name, sizes), sort_keys=True).encode())
    return total.hexdigest()


def form(node: Any) -> Any:
    """A syntax tree as plain data, equal in all versions of Python: empty fields are left out."""
    if isinstance(node, list):
        return [form(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = fields["body"][1:]
    return [
        type(node).__name__,
        *((name, form(value)) for name, value in fields.items() if value not in (None, [])),
    ]


def stale(record: Path = RECORD, root: Path = ROOT) -> str | None:
    """What to do if the gate has not passed these kernels; None if it has."""
    found = json.loads(record.read_text()) if record.exists() else {"digest": None}
    if found["digest"] != digest(root):
        return "kernels or configs have changed since the gate last ran: run `make gate`, commit"
    if any(run["violations"] for run in found["runs"]):
        return "the gate has found violations: see docs/kernels.md, mend them, run `make gate`"
    return None
