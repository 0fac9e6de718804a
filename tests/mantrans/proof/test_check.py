"""`check_gradients` passes what is right, and sees what is wrong, in every backend and dtype."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mantrans import CustomTransformerWrapper, check_gradients
from mantrans.kernels import native, reference
from mantrans.proof.check import DIFFERENCE, chosen
from tests.support import families

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
LARGEST = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 0.2}
# The operations of a block, and a factor that a gradient of each is wrongly given.
BROKEN = {
    "gpt2": ("linear", "layer_norm", "attention", "bias_gelu", "linear_cross_entropy"),
    "qwen3": ("rms_norm", "norm_rotary", "attention", "swiglu"),
    "llama": ("rotary",),
}
FAST = ("gpt2", "layer_norm"), ("gpt2", "linear_cross_entropy"), ("qwen3", "norm_rotary")
PAIRS = [
    pytest.param(case, operation, marks=[] if (case, operation) in FAST else pytest.mark.slow)
    for case, operations in BROKEN.items()
    for operation in operations
]
RIGHT = [
    pytest.param(case, dtype, marks=[] if fast else pytest.mark.slow)
    for case in ("gpt2", *families.CASES)
    for dtype in DTYPES
    for fast in [(case, dtype) in (("gpt2", "float64"), ("qwen3", "bfloat16"))]
]


def model(case: str, dtype: str = "float32", **options: Any) -> CustomTransformerWrapper:
    options = {"backend": "native", "n_blocks": 2, **options}
    if case != "gpt2":
        return families.ours(case, DTYPES[dtype], **options)
    return CustomTransformerWrapper(
        97, 16, n_heads=2, d_ffn=24, max_seq_len=12, dtype=DTYPES[dtype], device="cpu",
        initializer_range=0.2, **options,
    )  # fmt: skip


def batch(T: int = 8) -> tuple[Tensor, Tensor]:
    ids = torch.randint(97, (2, T), generator=torch.Generator().manual_seed(4))
    labels = ids.clone()
    labels[0, :3] = -100
    return ids, labels


def break_backward(ops: ModuleType, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it returns, or the last of it, is half as large again."""
    name = next(f"{operation}{way}" for way in ("_backward", "_forward_backward")
                if hasattr(ops, f"{operation}{way}"))  # fmt: skip
    right = getattr(ops, name)

    def wrong(*args: Any, **named: Any) -> Any:
        found = right(*args, **named)
        return 1.5 * found if isinstance(found, Tensor) else (*found[:-1], 1.5 * found[-1])

    monkeypatch.setattr(ops, name, wrong)


@pytest.mark.parametrize(("case", "dtype"), RIGHT)
def test_check_right_model(case: str, dtype: str) -> None:
    wrapper = model(case, dtype)
    found = check_gradients(wrapper, *batch(), samples=1)
    assert found.ok, str(found)
    assert [row.name for row in found.rows] == list(wrapper.model.parameters.by_name)
    for row in found.rows:
        assert row.own <= LARGEST[dtype] and row.exact <= 1e-12, row
        assert (row.peer > 1e-9) == (dtype != "float64"), row
        assert len(row.samples) == 1 and row.difference <= DIFFERENCE / 100, row
        if dtype == "bfloat16":
            assert row.own > 1e-5, "the model's own gradient is measured, not its copy's"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("case", "operation"), PAIRS)
def test_check_broken_backend(
    case: str, operation: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_backward(native, operation, monkeypatch)
    found = check_gradients(model(case, dtype), *batch(), samples=0)
    assert {row.wrong for row in found.rows} <= {(), ("own",)}, str(found)
    assert not found.ok and "WRONG: own" in str(found)


@pytest.mark.parametrize("samples", [0, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("case", "operation"), PAIRS)
def test_check_broken_reference(
    case: str, operation: str, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_backward(reference, operation, monkeypatch)
    found = check_gradients(model(case), *batch(), samples=samples)
    wrong = [row.wrong for row in found.rows if row.wrong]
    assert all("exact" in which and "own" not in which for which in wrong) and wrong, str(found)
    assert (sum("difference" in which for which in wrong) > len(wrong) // 2) == (samples > 0)


def test_check_forgotten_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the key's norm of Qwen3; no other parameter's is wrong."""
    right = reference.norm_rotary_backward

    def without_k(*args: Any) -> Tensor:
        return right(*args[:8], torch.zeros_like(args[8]), *args[9:])

    monkeypatch.setattr(reference, "norm_rotary_backward", without_k)
    found = check_gradients(model("qwen3", backend="reference"), *batch())
    wrong = {row.name: row.wrong for row in found.rows if row.wrong}
    assert wrong == {
        f"blocks.{i}.attention.k_norm.weight": ("own", "exact", "difference") for i in range(2)
    }


def test_check_nan() -> None:
    wrapper = model("gpt2")
    dict(wrapper.model.named_parameters())["blocks.1.mlp.down.weight"][0, 0] = torch.nan
    assert not any(not row.wrong for row in check_gradients(wrapper, *batch(), samples=1).rows[:-2])


def test_check_model_unchanged() -> None:
    wrapper = model("gpt2", optimizer="adamw")
    wrapper.train_step(*batch())
    p = wrapper.model.parameters
    before = [x.clone() for x in (p.weights, p.gradients, p.updates)]
    check_gradients(wrapper, *batch(), samples=0)
    assert all(map(torch.equal, before, (p.weights, p.gradients, p.updates)))
    ops = wrapper.model.ops
    assert wrapper.model.blocks[0].mlp.ops is ops


def test_check_recomputation() -> None:
    assert check_gradients(model("llama", recompute="block"), *batch(), samples=0).ok


def test_table_rows() -> None:
    found = check_gradients(model("gpt2", n_blocks=1), *batch(), samples=3)
    head, *lines, last = str(found).splitlines()
    assert head.split() == ["parameter", "shape", "gradient", "float32", "native", "float32",
                            "autograd", "float64", "difference"]  # fmt: skip
    assert len(lines) == len(found.rows)
    for line, row in zip(lines, found.rows, strict=True):
        assert line.split() == [
            row.name, *" × ".join(map(str, row.shape)).split(),
            *(f"{x:.1e}" for x in (row.norm, row.own, row.peer, row.exact, row.difference)),
        ]  # fmt: skip
    n = sum(len(row.samples) for row in found.rows)
    assert last.startswith(f"{len(lines)} of {len(lines)} gradients are right")
    assert f"{n} finite differences" in last and n > 2 * len(lines)


def test_chosen_elements() -> None:
    gradient = torch.zeros(1000, 4)
    gradient[7] = 1.0
    found = chosen(gradient, 6, torch.Generator().manual_seed(0))
    assert len(set(found)) == 6
    assert sum(row == 7 for row, _ in found) == 3
    assert chosen(torch.zeros(2), 5, torch.Generator()) == [(0,), (1,)]


def test_check_wrong_arguments() -> None:
    wrapper, (ids, labels) = model("gpt2"), batch()
    for arguments, kind, message in (
        ((wrapper.model, ids, labels), TypeError, "model: expected a CustomTransformerWrapper"),
        ((wrapper, ids + 90, labels), ValueError, "input_ids: expected token ids from 0"),
        ((wrapper, ids, labels[:1]), ValueError, "labels: expected the shape of input_ids"),
        ((wrapper, ids, labels * 0 - 100), ValueError, "labels: expected at least one"),
        ((wrapper, ids[:, :1], labels[:, :1]), ValueError, "labels: expected at least one"),
    ):
        with pytest.raises(kind, match=f"^{message}"):
            check_gradients(*arguments)
    with pytest.raises(ValueError, match=r"^samples: expected"):
        check_gradients(wrapper, ids, labels, samples=-1)
    with pytest.raises(RuntimeError, match="inference=True"):
        check_gradients(model("gpt2", inference=True), ids, labels)
