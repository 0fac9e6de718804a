"""The house (README): a module imports only from floors below its own, and what stands beside it
only where BESIDE says so."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    "kernels.reference kernels.native kernels.triton kernels.backend "
    "kernels.operations kernels.selfcheck errors cores",
    "layers ops parameters config runtime cuda_graph finite distributed assets terminal options",
    "models optim checkpoint interop wrapper records recording patch",
    "training evaluation data inference report explain proof mantrans",
    "cli __main__",
]
FLOOR = {unit: number for number, units in enumerate(FLOORS) for unit in units.split()}
BESIDE = {
    "kernels.native": "kernels.reference",
    "kernels.triton": "kernels.reference kernels.native",
    "kernels.backend": "kernels.triton",
    "kernels.operations": "kernels.reference",
    "kernels.selfcheck": "kernels.reference kernels.operations",
    "layers": "parameters",
    "distributed": "terminal",
    "parameters": "distributed",
    "config": "assets",
    "interop": "models checkpoint",
    "wrapper": "models optim checkpoint interop",
    "records": "checkpoint",
    "recording": "models wrapper",
    "training": "evaluation data inference report",
    "explain": "training inference data report proof",
    "evaluation": "data inference",
    "inference": "data",
    "__main__": "cli",
}


def unit_of(module: str) -> str:
    """The module or package of FLOORS that `module`, such as mantrans.layers.mlp, belongs to."""
    parts = module.split(".")[1:]
    if parts[:1] == ["kernels"]:
        return ".".join(parts[:2])
    return "__main__" if "__main__" in parts else parts[0] if parts else "mantrans"


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, unit) of every import of ours, at whatever depth, that is made when the code runs.

    Left out are those for type checkers, and of a module that is started as a command.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in (
            "TYPE_CHECKING", "__name__ == '__main__'",
        ):  # fmt: skip
            continue
        if not isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(node)
            continue
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            parts = ("mantrans", "mantrans.kernels")
            names = [f"{node.module}.{n}" for n in names] if node.module in parts else [node.module]
        for name in names:
            if name.split(".")[0] == "mantrans":
                unit = unit_of(name)
                yield node.lineno, unit if unit in FLOOR else "mantrans"


def refused(unit: str, source: str) -> list[str]:
    """The imports that code of `unit` may not make."""
    return [
        f"line {line}: {other}"
        for line, other in imported(ast.parse(source))
        if other != unit
        and FLOOR[other] >= FLOOR[unit]
        and other not in BESIDE.get(unit, "").split()
    ]


def test_imports_downward() -> None:
    found, units = {}, set()
    for file in [*(ROOT / "mantrans").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        parts = file.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts if parts[0] == "mantrans" else ("mantrans", *parts))
        unit = unit_of(module.removesuffix(".__init__"))
        units.add(unit)
        if wrong := refused(unit, file.read_text(encoding="utf-8")):
            found[module] = wrong
    assert not found
    assert units == FLOOR.keys(), "FLOORS names what there is, and all of it"


@pytest.mark.parametrize(
    ("unit", "line"),
    [
        ("layers", "from mantrans.models import build"),
        ("layers", "from mantrans.config import Config"),
        ("kernels.reference", "from mantrans.kernels import native"),
        ("kernels.native", "import mantrans.errors"),
        ("config", "from mantrans import CustomTransformer"),
        ("data", "from mantrans.training.step import TrainStep"),
        ("models", "def f():\n    with g():\n        import mantrans.wrapper"),
        ("training", "if True:\n    from mantrans import cli"),
    ],
)
def test_imports_upward_or_sideways(unit: str, line: str) -> None:
    """They are found."""
    assert len(refused(unit, line)) == 1
    assert not refused(unit, f"if TYPE_CHECKING:\n    {line.splitlines()[-1].strip()}")
