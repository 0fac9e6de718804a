"""All operations of `mantrans.ops`: numbers beside PyTorch's, and what torch.library promises.

Tolerances, relative RMS, in float64 against autograd through PyTorch's own functions: some hundred
roundings of 2^-53, 1e-12; of 2^-24, 2e-6; in 16 bits ours round float32 results once, to 2^-9 and
2^-12 at most each, the upstream gradients and the sums of attention twice.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.nn import functional as F

from mantrans import ops
from mantrans.ops import registration
from tests.mantrans.ops.cases import (
    CASES,
    CU_SEQLENS,
    Case,
    Inputs,
    each_case,
    each_case_interpreted,
    is_float,
    on_triton,
    outputs_and_gradients,
)
from tests.support.compare import assert_close, assert_same_bits

TOLERANCE = {
    torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2,
}  # fmt: skip


def assert_right(case: Case, dtype: torch.dtype) -> None:
    """Outputs and gradients are those of PyTorch in float64, for the same rounded inputs."""
    inputs = case.inputs(dtype)
    exact = {n: x.double() if is_float(x) else x for n, x in inputs.items()}
    expected = outputs_and_gradients(case.plain, exact, case)
    found = outputs_and_gradients(case.ours, inputs, case)
    assert len(found) == len(expected)
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert_close(x, y, TOLERANCE[dtype], f"number {i}")
    for name, gradient in zip(case.shapes, found[-len(case.shapes) :], strict=True):
        assert gradient.dtype == dtype, name


@each_case
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_ops_equal_pytorch(case: Case, dtype: torch.dtype) -> None:
    assert_right(case, dtype)


@each_case_interpreted
@pytest.mark.parametrize(
    "dtype",
    [*(pytest.param(d, marks=pytest.mark.slow) for d in (torch.float32, torch.float16)),
     torch.bfloat16],
    ids=str,
)  # fmt: skip
def test_ops_triton_equal_pytorch(case: Case, dtype: torch.dtype, monkeypatch) -> None:
    with on_triton(monkeypatch):
        assert_right(case, dtype)


def strided(x: Tensor) -> Tensor:
    """The same numbers with gaps between them, and the axes in another order."""
    wide = torch.full((*x.shape, 2), torch.nan, dtype=x.dtype)
    wide[..., 1] = x
    if x.dim() > 1:
        wide = wide.movedim(0, -1).contiguous().movedim(-1, 0)
    return wide[..., 1]


def tensors(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def upstream(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """A gradient of each output, always the same."""
    source = torch.Generator().manual_seed(9)
    return [torch.randn(y.shape, generator=source).to(y.dtype) for y in outputs]


def with_leaves(inputs: Inputs, names: Iterable[str]) -> tuple[Inputs, list[Tensor]]:
    """The same inputs, and those of these names, which have a gradient now."""
    leaves = {n: inputs[n].detach().requires_grad_() for n in names}
    return {**inputs, **leaves}, list(leaves.values())


def gradients(case: Case, inputs: Inputs, names: Iterable[str] | None = None) -> list[Tensor]:
    """Of the case's inputs, or of some of them."""
    given, leaves = with_leaves(inputs, names or case.shapes)
    outputs = tensors(case.ours(**given))
    pairs = [(y, g) for y, g in zip(outputs, upstream(outputs), strict=True) if y.requires_grad]
    return list(torch.autograd.grad([y for y, _ in pairs], leaves, [g for _, g in pairs]))


@each_case
@pytest.mark.parametrize("backend", ["native", pytest.param("triton", marks=pytest.mark.slow)])
def test_ops_strides(case: Case, backend: str, monkeypatch) -> None:
    """Non-contiguous inputs and upstream gradients give what contiguous ones do, to the bit."""
    monkeypatch.setitem(registration.BACKENDS, "cpu", backend)
    inputs = case.inputs(torch.float32)
    gaps = {n: strided(x) if n in case.shapes else x for n, x in inputs.items()}
    assert not any(gaps[n].is_contiguous() for n in case.shapes)
    given, leaves = with_leaves(gaps, case.shapes)
    outputs = tensors(case.ours(**given))
    assert_same_bits(tuple(y.detach() for y in outputs), tensors(case.ours(**inputs)))
    above = [strided(g) if g.dim() else g for g in upstream(outputs)]
    found = torch.autograd.grad(outputs, leaves, above)
    assert_same_bits(list(found), gradients(case, inputs))


@each_case
def test_ops_gradient_of_each_input_alone(case: Case) -> None:
    """The same bits as beside the gradients of the other inputs."""
    inputs = case.inputs(torch.float32)
    for name, expected in zip(case.shapes, gradients(case, inputs), strict=True):
        assert_same_bits(gradients(case, inputs, [name]), [expected])


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16),
     (torch.float32, torch.float64)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "bias_gelu"])
def test_ops_vectors_of_another_dtype(
    name: str, dtypes: tuple[torch.dtype, torch.dtype], backend: str, monkeypatch
) -> None:
    """Gains and biases, with gaps: results are x's dtype, gradients each their own."""
    monkeypatch.setitem(registration.BACKENDS, "cpu", backend)
    case, (dtype, of_vectors) = CASES[name], dtypes
    first = next(iter(case.shapes))
    inputs = {
        n: x.to(dtype) if n == first else strided(x.to(of_vectors))
        for n, x in case.inputs(torch.float32).items()
    }
    expected = outputs_and_gradients(case.plain, {n: x.double() for n, x in inputs.items()}, case)
    given, leaves = with_leaves(inputs, case.shapes)
    source = torch.Generator().manual_seed(7)
    (y,) = tensors(case.ours(**given))
    above = torch.randn(y.shape, generator=source).to(dtype)
    found = [y.detach(), *torch.autograd.grad(y, leaves, above)]
    assert [x.dtype for x in found] == [dtype, *(x.dtype for x in inputs.values())]
    for x, y in zip(found, expected, strict=True):
        assert_close(x, y, TOLERANCE[torch.bfloat16])


@each_case
def test_ops_transforms(case: Case) -> None:
    """Forward mode is refused, in both of PyTorch's forms, and `torch.func`'s gradients are."""
    inputs = case.inputs(torch.float32)
    for name in case.shapes:

        def call(x: Tensor, name: str = name) -> Tensor:
            return tensors(case.ours(**{**inputs, name: x}))[0].sum()

        x = inputs[name]
        with pytest.raises(ValueError, match="expected no derivative in forward mode, got one"):
            torch.func.jvp(call, (x,), (x,))
        with forward_ad.dual_level(), pytest.raises(ValueError, match="in forward mode, got one"):
            call(forward_ad.make_dual(x, x))
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(call)(x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_ops_vmap() -> None:
    """One example after the other, with gradients."""
    x, weight = torch.randn(3, 4, 8, requires_grad=True), torch.randn(8)
    found = torch.vmap(lambda x: ops.rms_norm(x, weight))(x)
    expected = ops.rms_norm(x, weight)
    assert_same_bits(found.detach(), expected.detach())
    assert_same_bits(*(torch.autograd.grad(y.square().sum(), x) for y in (found, expected)))
    with pytest.raises(ValueError, match="in forward mode, got one"):
        torch.func.jvp(torch.vmap(lambda x: ops.rms_norm(x, weight)), (x,), (x,))


def test_ops_statistics_without_gradient() -> None:
    """What is kept for the backward does not look as if it could be differentiated."""
    x, weight = torch.randn(3, 8, requires_grad=True), torch.ones(8)
    y, rstd = torch.ops.mantrans.rms_norm(x, weight, 1e-6)
    assert y.requires_grad and not rstd.requires_grad


@each_case
def test_ops_gradcheck(case: Case) -> None:
    """By finite differences, with undefined upstream gradients and repeated backwards."""
    inputs = case.inputs(torch.float64)
    given, leaves = with_leaves(inputs, case.shapes)

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        return tensors(case.ours(**{**given, **dict(zip(case.shapes, values, strict=True))}))

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@each_case
def test_ops_gradient_of_gradient(case: Case) -> None:
    """Refused, and never taken for constant."""
    given, leaves = with_leaves(case.inputs(torch.float32), case.shapes)
    total = sum(y.square().sum() for y in tensors(case.ours(**given)))
    with pytest.raises(RuntimeError, match=r"no autograd formula was|create_graph=False"):
        first = torch.autograd.grad(total, leaves, create_graph=True)
        sum(g.sum() for g in first).backward()


def test_linear_cross_entropy_gradient_of_gradient() -> None:
    """The forward made its gradients, so none of them would show that a second one is wanted."""
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8)
    loss = ops.linear_cross_entropy(x, weight, torch.arange(3))
    with pytest.raises(RuntimeError, match="expected create_graph=False, got True"):
        torch.autograd.grad(loss, x, create_graph=True)


@each_case
def test_ops_changed_in_place(case: Case) -> None:
    """Of an input that is changed after the forward, and of a result, PyTorch refuses the backward
    where it reads them; elsewhere gradients are right."""
    inputs = case.inputs(torch.float32)
    given, leaves = with_leaves(inputs, case.shapes)
    plain = tensors(case.ours(**given))
    for changed in [*case.shapes, *range(len(plain))]:
        copies = {n: x.clone() for n, x in given.items() if n in case.shapes}
        outputs = tensors(case.ours(**{**given, **copies}))
        above = upstream(outputs)
        (copies[changed] if isinstance(changed, str) else outputs[changed]).mul_(2)
        try:
            found = torch.autograd.grad(outputs, leaves, above)
        except RuntimeError as refused:
            assert "modified by an inplace operation" in str(refused)
        else:
            twice = [2 * g if i == changed else g for i, g in enumerate(above)]
            expected = torch.autograd.grad(plain, leaves, twice, retain_graph=True)
            assert_same_bits(found, expected)


@each_case
def test_ops_under_autocast(case: Case) -> None:
    """Attention and the product of the loss in its dtype, all else as without it; nothing inside an
    operation changes its dtype. Scores are large, so that native attention computes with them in
    float32."""
    inputs = case.inputs(torch.float32)
    inputs = {n: 8 * x if n in ("q", "qkv") else x for n, x in inputs.items()}
    product = case.ours is ops.linear_cross_entropy or not {"q", "qkv"}.isdisjoint(case.shapes)
    cast = product and case.ours is not ops.rope
    names = case.shapes if cast else ()
    expected = gradients(case, {n: x.bfloat16() if n in names else x for n, x in inputs.items()})
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(case, inputs)
    assert_same_bits(found, [g.float() for g in expected])


@each_case
def test_ops_inference_mode(case: Case) -> None:
    inputs = case.inputs(torch.float32)
    expected = tensors(case.ours(**inputs))
    with torch.inference_mode():
        found = tensors(case.ours(**inputs))
        assert all(y.is_inference() for y in found)
        assert_close(torch.cat([y.reshape(-1) for y in found]),
                     torch.cat([y.reshape(-1) for y in expected]), 1e-6)  # fmt: skip


@each_case
def test_ops_meta(case: Case) -> None:
    """Shapes, dtypes and strides without numbers, with gradients."""
    inputs = case.inputs(torch.bfloat16)
    given, leaves = with_leaves(inputs, case.shapes)
    expected = tensors(case.ours(**given))
    expected += torch.autograd.grad(expected, leaves, upstream(expected))
    there = {n: x.to("meta") if isinstance(x, Tensor) else x for n, x in inputs.items()}
    given, leaves = with_leaves(there, case.shapes)
    found = tensors(case.ours(**given))
    found += torch.autograd.grad(found, leaves, [torch.empty_like(y) for y in found])
    for x, y in zip(found, expected, strict=True):
        assert x.is_meta and (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


@pytest.mark.parametrize("lead", [(), (3,), (2, 1, 3)], ids=str)
def test_ops_leading_shapes(lead: tuple[int, ...]) -> None:
    """Any number of axes before those that an operation names."""
    x, weight = torch.randn(*lead, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    rows = x.reshape(-1, 8)
    targets = torch.arange(rows.shape[0]).view(lead) % 8
    table = torch.randn(5, 8, dtype=torch.float64)
    q = torch.randn(*lead, 4, 2, 6, dtype=torch.float64)
    assert torch.equal(ops.layer_norm(x, weight).view(rows.shape), ops.layer_norm(rows, weight))
    assert torch.equal(ops.rms_norm(x, weight).view(rows.shape), ops.rms_norm(rows, weight))
    assert torch.equal(ops.swiglu(x).view(-1, 4), ops.swiglu(rows))
    assert torch.equal(ops.bias_gelu(x, weight).view(rows.shape), ops.bias_gelu(rows, weight))
    losses = ops.cross_entropy(x, targets, reduction="none")
    assert losses.shape == lead
    assert torch.equal(losses.sum(), ops.cross_entropy(rows, targets.flatten(), reduction="sum"))
    loss = ops.linear_cross_entropy(x, table, targets % 5)
    assert torch.equal(loss, ops.linear_cross_entropy(rows, table, targets.flatten() % 5))
    out = ops.attention(q, q, q)
    assert out.shape == q.shape
    assert torch.equal(out.view(-1, 4, 2, 6), ops.attention(*3 * [q.reshape(-1, 4, 2, 6)]))


@each_case
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_ops_no_rows(case: Case, backend: str, monkeypatch) -> None:
    """Empty results, and gradients of zero for what the rows share."""
    monkeypatch.setitem(registration.BACKENDS, "cpu", backend)
    inputs = case.inputs(torch.float32)
    empty = {n: x[:0] if isinstance(x, Tensor) and x.dim() > 1 else x for n, x in inputs.items()}
    for name in {"weight", "cos", "sin"} & inputs.keys():
        empty[name] = inputs[name][:0] if inputs[name].dim() == 3 else inputs[name]
    if "cu_seqlens" in inputs:
        empty["cu_seqlens"] = torch.zeros_like(CU_SEQLENS)
    for gradient in outputs_and_gradients(case.ours, empty, case)[-len(case.shapes) :]:
        assert not gradient.nan_to_num(0).any()


def test_add_norm_sum_alone() -> None:
    """A gradient that comes around the norm alone, or through it alone."""
    x, residual, weight = (torch.randn(s, requires_grad=True) for s in ((3, 8), (3, 8), (8,)))
    y, total = ops.rms_norm(x, weight, residual=residual)
    dx, dweight = torch.autograd.grad(total.sum(), (x, weight), retain_graph=True)
    assert torch.equal(dx, torch.ones(3, 8)) and not dweight.any()
    (alone,) = torch.autograd.grad(y.sum(), residual)
    summed = (x + residual).detach().requires_grad_()
    ops.rms_norm(summed, weight).sum().backward()
    assert torch.equal(alone, summed.grad)


def test_linear_cross_entropy_logits_absent() -> None:
    """No tensor as large as all logits is made or kept, with gradients or without."""
    N, width, vocabulary = 2100, 2, 1500
    x, weight = torch.randn(N, width), torch.randn(vocabulary, width)
    targets = torch.zeros(N, dtype=torch.int64)
    for leaf in (x, x.clone().requires_grad_()):
        with torch.profiler.profile(profile_memory=True) as seen:
            loss = ops.linear_cross_entropy(leaf, weight, targets)
            if leaf.requires_grad:
                loss.backward()
        largest = max(event.cpu_memory_usage for event in seen.events())
        assert 0 < largest < 0.6 * N * vocabulary * 4


def test_linear_cross_entropy_no_grad() -> None:
    """Without gradients none is made."""
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(500, 8)
    targets = torch.arange(3)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as seen:
        loss = ops.linear_cross_entropy(x, weight, targets)
    assert max(event.cpu_memory_usage for event in seen.events()) < weight.nbytes
    assert_same_bits(loss, ops.linear_cross_entropy(x, weight, targets).detach())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_linear_cross_entropy_divisor(dtype: torch.dtype) -> None:
    """Loss and gradients are those of the sum, divided, whatever the loss is multiplied by; half
    precision keeps gradients that a division by many rows would round to 0."""
    x, weight = (torch.randn(s, dtype=dtype, requires_grad=True) for s in ((6, 8), (7, 8)))
    targets, divisor = torch.arange(6), torch.tensor(2.0**22)
    loss = ops.linear_cross_entropy(x, weight, targets, divisor=divisor)
    found = torch.autograd.grad(loss * 2.0**22, (x, weight))
    exact = (y.detach().double().requires_grad_() for y in (x, weight))
    exact_x, exact_weight = exact
    total = F.cross_entropy(exact_x @ exact_weight.T, targets, reduction="sum")
    assert_close(loss.detach().double(), total.detach() / divisor.double(), TOLERANCE[dtype])
    expected = torch.autograd.grad(total, (exact_x, exact_weight))
    for y, z in zip(found, expected, strict=True):
        assert_close(y, z, TOLERANCE[dtype])


LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": lambda x, weight, *rest, **more: ops.cross_entropy(
        x @ weight.T, *rest, **more
    ),
    "linear_cross_entropy": ops.linear_cross_entropy,
}
each_loss = pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES.keys())


@each_loss
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_losses_of_no_target(
    loss_of: Callable[..., Tensor], dtype: torch.dtype, backend: str, monkeypatch
) -> None:
    """As PyTorch's: the mean is NaN, the sum 0; gradients are 0, also of a sum divided by 0."""
    monkeypatch.setitem(registration.BACKENDS, "cpu", backend)
    x, weight = (torch.randn(s, dtype=dtype, requires_grad=True) for s in ((3, 8), (5, 8)))
    targets = torch.full((3,), -100)
    mean, total = loss_of(x, weight, targets), loss_of(x, weight, targets, reduction="sum")
    assert mean.isnan() and total == 0
    for loss in (mean, total, total / 0):
        for gradient in torch.autograd.grad(loss, (x, weight), retain_graph=True):
            assert torch.equal(gradient, torch.zeros_like(gradient))
    with torch.no_grad():
        assert loss_of(x, weight, targets).isnan()


@each_loss
def test_losses_ignore_index(loss_of: Callable[..., Tensor]) -> None:
    """Another index than -100, within the vocabulary or not; -100 itself is a wrong target then."""
    x, weight = torch.randn(4, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    targets = torch.tensor([3, 1, 3, 0])
    for ignored in (3, 255, -1):
        given = targets.where(targets != 3, ignored)
        expected = F.cross_entropy(x @ weight.T, given, ignore_index=ignored)
        assert_close(loss_of(x, weight, given, ignored), expected, 1e-12)
    with pytest.raises(ValueError, match="targets: expected 0 to 4, or 3, got -100"):
        loss_of(x, weight, targets.where(targets != 0, -100), 3)


def test_cross_entropy_of_rows() -> None:
    """Gradients of rows are rounded once, after they are multiplied: half precision keeps those of
    a scaled loss. That of an ignored row is 0 whatever the row's upstream gradient is."""
    logits = torch.tensor([[0.0, -18.0], [1.0, 2.0]]).half().requires_grad_()
    losses = ops.cross_entropy(logits, torch.tensor([0, -100]), reduction="none")
    losses.backward(torch.tensor([2.0**15, torch.inf]))
    expected = 2.0**15 / (1 + math.exp(18.0))
    assert_close(logits.grad[0].double(), torch.tensor([-expected, expected]).double(), 2e-3)
    assert torch.equal(logits.grad[1], torch.zeros(2).half())


def test_linear_cross_entropy_autocast() -> None:
    """Products in autocast's dtype, as `F.linear` has them; the loss stays float32."""
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(7, 8, requires_grad=True)
    targets = torch.arange(5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.linear_cross_entropy(x, weight, targets)
    expected = ops.linear_cross_entropy(x.bfloat16(), weight.bfloat16(), targets)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    loss.backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


# ---------------------------------------------------------------- torch.library and torch.compile


def registered_calls(case: Case, dtype: torch.dtype) -> list[tuple[Any, tuple[Any, ...]]]:
    """Each registered operation that forward and backward of a case call, with its arguments."""
    calls: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "mantrans":
                detached = [x.detach().clone() if isinstance(x, Tensor) else x for x in args]
                calls[function.name()] = function, tuple(detached)
            return function(*args, **(kwargs or {}))

    with Watch():
        outputs_and_gradients(case.ours, case.inputs(dtype), case)
    assert len(calls) > 1, "forward and backward"
    return list(calls.values())


def with_gradients(function: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if function.name().endswith("_backward"):
        return args
    return tuple(x.requires_grad_() if is_float(x) else x for x in args)


@each_case
def test_ops_opcheck(case: Case) -> None:
    """In bfloat16, beside which sums in float32 show a wrong dtype."""
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for function, args in registered_calls(case, torch.bfloat16):
        opcheck(function, with_gradients(function, args), test_utils=tests)


@pytest.mark.slow
@each_case
def test_ops_opcheck_all(case: Case) -> None:
    """With dynamic shapes, forward and backward; in the dtype of attention's other kernel."""
    for function, args in registered_calls(case, torch.float32):
        opcheck(function, with_gradients(function, args))


@pytest.mark.slow
@each_case
def test_ops_opcheck_triton(case: Case, monkeypatch) -> None:
    """Shapes and strides as the fakes promise, of the other backend too."""
    with on_triton(monkeypatch):
        for function, args in registered_calls(case, torch.float32):
            tests = ("test_schema", "test_faketensor")
            opcheck(function, with_gradients(function, args), test_utils=tests)


def everything(**inputs: Any) -> tuple[Tensor, ...]:
    """All cases in one function, so that it is traced once."""
    found: list[Tensor] = []
    for name, case in CASES.items():
        y = case.ours(**inputs[name])
        found += y if isinstance(y, tuple) else (y,)
    return tuple(found)


def test_ops_compile_fullgraph() -> None:
    """One graph, no breaks, and the same bits forward and backward."""
    drawn = {name: case.inputs(torch.float32) for name, case in CASES.items()}
    assert_compiled(everything, drawn, "aot_eager")


@pytest.mark.slow
@each_case
@pytest.mark.parametrize("dynamic", [False, True])
def test_ops_compile_inductor(case: Case, dynamic: bool) -> None:
    def one(**inputs: Any) -> tuple[Tensor, ...]:
        y = case.ours(**inputs["one"])
        return y if isinstance(y, tuple) else (y,)

    torch._dynamo.reset()
    assert_compiled(one, {"one": case.inputs(torch.float32)}, "inductor", dynamic, 1e-6)


def assert_compiled(
    call: Any, drawn: dict[str, Any], backend: str, dynamic: bool = False, tolerance: float = 0.0
) -> None:
    results = []
    compiled = torch.compile(call, fullgraph=True, backend=backend, dynamic=dynamic)
    for run in (call, compiled):
        inputs = {
            name: {n: x.clone().requires_grad_() if is_float(x) else x for n, x in values.items()}
            for name, values in drawn.items()
        }
        outputs = run(**inputs)
        sum(y.square().sum() for y in outputs).backward()
        grads = [x.grad for v in inputs.values() for n, x in v.items() if is_float(x)]
        results.append([*outputs, *(g for g in grads if g is not None)])
    assert len(results[0]) == len(results[1])
    for x, y in zip(*results, strict=True):
        assert_close(y.detach(), x.detach(), tolerance)


# ----------------------------------------------------------------------------------- bad inputs


X = torch.zeros(2, 3, 8)
Q = torch.zeros(2, 3, 4, 6)
ROWS = torch.zeros(3, 4, 6)
BAD: list[tuple[str, Any, str]] = [
    ("ints", lambda: ops.rms_norm(X.long(), X[0, 0]), "x: expected one of float64"),
    ("weight", lambda: ops.layer_norm(X, torch.zeros(7)), r"weight: expected shape \(8,\), got"),
    ("bias", lambda: ops.layer_norm(X, X[0, 0], X[0, 0].half()), "bias: expected float32, got"),
    ("residual", lambda: ops.rms_norm(X, X[0, 0], residual=X[:1]), "residual: expected shape"),
    ("no axis", lambda: ops.layer_norm(X[0, 0, 0], X[0, 0]), "x: expected a last axis"),
    ("gelu", lambda: ops.bias_gelu(X, torch.zeros(9)), r"bias: expected shape \(8,\), got \(9,\)"),
    ("no feature", lambda: ops.bias_gelu(X[..., :0]), "h: expected a last axis of at least 1"),
    ("no pair", lambda: ops.rope(Q[..., :0], Q, X, X), "q: expected .*D even"),
    ("no head", lambda: ops.attention(*3 * [Q[..., :0]]), "expected heads of at least 1"),
    ("odd", lambda: ops.swiglu(X[..., :7]), "gate: expected an even last axis"),
    ("up", lambda: ops.swiglu(X, X[..., :7]), r"up: expected shape \(2, 3, 8\)"),
    ("odd heads", lambda: ops.rope(Q[..., :5], Q, X, X), "q: expected .*D even"),
    ("cos", lambda: ops.rope(Q, Q, X, X), r"cos: expected shape \(3, 3\) or \(2, 3, 3\), got"),
    ("eps", lambda: ops.rms_norm(X, X[0, 0], None), "eps: expected a number"),
    ("table", lambda: ops.rope(Q, Q, torch.ones(()), X), r"cos: expected \(T, D/2\) or"),
    ("place", lambda: ops.rope(Q, Q, X.to("meta"), X), "cos: expected device cpu, got meta"),
    ("targets", lambda: ops.cross_entropy(X, X[..., 0]), "targets: expected int64 or int32, got f"),
    ("short", lambda: ops.cross_entropy(X, X[..., 0].short()), "expected int64 or int32, got"),
    ("shape", lambda: ops.cross_entropy(X, torch.ones(6, dtype=torch.long)), "targets: expected s"),
    ("outside", lambda: ops.cross_entropy(X, torch.full((2, 3), 8)), "expected 0 to 7, or -100, g"),
    ("far", lambda: ops.linear_cross_entropy(X, torch.zeros(5, 8), torch.full((2, 3), 5)), "to 4"),
    ("sum", lambda: ops.cross_entropy(X, X[..., 0].long(), reduction="max"), "reduction: expected"),
    ("none", lambda: ops.linear_cross_entropy(X, X[0], X[..., 0].long(), reduction="none"), "red"),
    ("table of one axis", lambda: ops.linear_cross_entropy(X, X[0, 0], X[..., 0].long()),
     r"weight: expected \(V, C\), got \(8,\)"),
    ("no vocabulary", lambda: ops.linear_cross_entropy(X, X[0, :0], X[..., 0].long()), "weight:"),
    ("no width", lambda: ops.linear_cross_entropy(X[..., :0], X[0], X[..., 0].long()), "x: exp"),
    ("sum divided", lambda: ops.linear_cross_entropy(
        X, X[0], X[..., 0].long(), reduction="sum", divisor=2), "divisor: expected None for a sum"),
    ("divisors", lambda: ops.linear_cross_entropy(X, X[0], X[..., 0].long(), divisor=torch.ones(1)),
     r"divisor: expected a number or a 0-d tensor, got \(1,\)"),
    ("width", lambda: ops.linear_cross_entropy(X, X[0, :, :7], X[..., 0].long()), "weight: exp"),
    ("axes", lambda: ops.attention(Q[0, 0], Q[0, 0], Q[0, 0]), "q: expected"),
    ("groups", lambda: ops.attention(Q, Q[:, :, :3], Q[:, :, :3]), "expected a divisor of n_heads"),
    ("v", lambda: ops.attention(Q, Q, Q[:, :2]), "v: expected shape"),
    ("window", lambda: ops.attention(Q, Q, Q, window=0), "window: expected at least 1, got 0"),
    ("part", lambda: ops.attention(Q, Q, Q, window=2.5), "window: expected an int"),
    ("list", lambda: ops.attention(ROWS, ROWS, ROWS, cu_seqlens=[0, 3]), "expected a torch.Tensor"),
    ("halves", lambda: ops.attention(ROWS, ROWS, ROWS, cu_seqlens=torch.tensor([0, 3.0])),
     "cu_seqlens: expected int64 or int32, got float32"),
    ("two axes", lambda: ops.attention(ROWS, ROWS, ROWS, cu_seqlens=CU_SEQLENS[None]),
     r"cu_seqlens: expected one axis, got \(1, 5\)"),
    ("packed", lambda: ops.packed_attention(X[..., :7], 2), "expected a width of"),
    ("batch", lambda: ops.attention(Q, Q, Q, cu_seqlens=CU_SEQLENS), r"expected \(N, ...\), got 2"),
    ("bounds", lambda: ops.attention(ROWS, ROWS, ROWS, cu_seqlens=torch.tensor([0, 2])),
     r"cu_seqlens: expected bounds that rise from 0 to 3, got \[0, 2\]"),
    ("falling", lambda: ops.attention(ROWS, ROWS, ROWS, cu_seqlens=torch.tensor([0, 2, 1, 3])),
     r"cu_seqlens: expected bounds that rise from 0 to 3, got \[0, 2, 1, 3\]"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_ops_refuse(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        call()
    assert "\n" not in str(refused.value)


def test_ops_complete() -> None:
    """Every public operation has a case and says what it takes."""
    tested = {name.partition(",")[0] for name in CASES} | {"packed_attention"}
    assert tested == set(ops.__all__)
    assert all(inspect.getdoc(getattr(ops, name)) for name in ops.__all__)
