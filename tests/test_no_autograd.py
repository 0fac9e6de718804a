"""The promise: nothing in kernels/ or mantrans/ lets PyTorch differentiate anything."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from mantrans import CustomTransformerWrapper

ROOT = Path(__file__).parents[1]
FORBIDDEN_NAMES = {"requires_grad", "requires_grad_", "autograd", "enable_grad", "vjp", "jvp"}


def uses_of_autograd(source: str) -> list[str]:
    """Every mention of an autograd name, and every `.backward()` that is called on a tensor.

    Our own backward functions always take the gradient they start from; a tensor's takes none.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        name = (
            getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "arg", None)
        )
        if name in FORBIDDEN_NAMES:
            found.append(f"line {node.lineno}: {name}")
        is_call = isinstance(node, ast.Call) and not node.args and not node.keywords
        if is_call and getattr(node.func, "attr", None) == "backward":
            found.append(f"line {node.lineno}: .backward()")
        if isinstance(node, ast.ImportFrom | ast.Import):
            modules = [getattr(node, "module", None) or "", *(a.name for a in node.names)]
            if any("autograd" in m or m == "torch.func" for m in modules):
                found.append(f"line {node.lineno}: import")
    return found


@pytest.mark.parametrize("folder", ["kernels", "mantrans"])
def test_source_without_autograd(folder: str) -> None:
    """Source does not mention autograd."""
    files = sorted((ROOT / folder).rglob("*.py"))
    assert len(files) > 5
    found = {f.name: u for f in files if (u := uses_of_autograd(f.read_text(encoding="utf-8")))}
    assert not found


@pytest.mark.parametrize(
    "line",
    ["loss.backward()", "x.requires_grad = True", "torch.autograd.grad(y, x)", "f(requires_grad=1)",
     "from torch.autograd import Function", "from torch import autograd", "import torch.func as f",
     "from torch.func import grad", "with torch.enable_grad(): pass"],
)  # fmt: skip
def test_search_finds(line: str) -> None:
    assert uses_of_autograd(line)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_training_without_graph(backend: str, monkeypatch) -> None:
    """With autograd's engine broken, training, evaluation and generation work all the same."""

    def broken(*args, **kwargs):
        raise AssertionError("autograd was called")

    monkeypatch.setattr(torch.autograd, "backward", broken)
    monkeypatch.setattr(torch.autograd, "grad", broken)
    model = CustomTransformerWrapper(
        vocab_size=50, d_model=16, n_blocks=1, n_heads=2, max_seq_len=16, device="cpu",
        backend=backend, optimizer="adamw",
    )  # fmt: skip
    ids = torch.randint(0, 50, (2, 8))
    outputs = model.forward(ids, ids)
    assert outputs["loss"].grad_fn is None and outputs["logits"].grad_fn is None
    assert model.train_step(ids, ids)["status"] == "ok"
    model.generate(ids[:, :3], max_length=6)
    for _, tensor in [*model.model.named_parameters(), *model.model.named_gradients()]:
        assert tensor.grad_fn is None and not tensor.requires_grad
