"""RoPE of q and k, alone and after each head's RMS norm: the mathematics, then the backends.

Tolerances, all on the relative RMS error:
  1e-12  float64 against autograd, PyTorch's and transformers' own, and finite differences: some
         thousand roundings of 2^-53 each.
  NATIVE a backend against the reference, on the same inputs. float32: a product and a sum or two in
         another order, and the root of a mean: 2e-6. 16 bits: both round float32 results once; they
         differ where these fall on both sides of a boundary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mantrans.kernels import native, reference, triton
from mantrans.kernels import operations as described
from mantrans.kernels.operations import Draw, Shapes
from tests.kernels.common import BACKENDS, each_backend, in_partials, random_gradients
from tests.support.compare import assert_close

NATIVE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 5e-5, torch.bfloat16: 4e-4}
CPU = torch.device("cpu")
EPS = 1e-6

SHAPES = {
    "one head, T=1, D=2": Shapes(D=2),
    "one head, odd T": Shapes(B=2, T=17, D=16),
    "three heads": Shapes(B=1, T=9, H=3, H_kv=3, D=6),
    "groups of three": Shapes(B=2, T=5, H=6, H_kv=2, D=10),
    "one key head": Shapes(B=1, T=33, H=4, H_kv=1, D=96),
}
OPERATIONS = [described.Rotary(), described.NormRotary()]

each_shape = pytest.mark.parametrize("s", SHAPES.values(), ids=SHAPES.keys())
each_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)


def angles(T: int, D: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """cos and sin (T, D/2) of the positions 0 .. T-1."""
    return described.rotations(T, D, Draw(dtype, CPU))


def run(operation: described.Operation, ops: Any, i: dict[str, Any]) -> dict[str, Tensor]:
    """Results, and what was added to each gradient; i stays as it is."""
    i = {name: x.clone() if isinstance(x, Tensor) else x for name, x in i.items()}
    before = {name: i[name].clone() for name in operation.vectors}
    results = operation.forward(ops, i)
    results |= operation.backward(ops, i, results)
    return {name: x - before.get(name, 0) for name, x in results.items()}


# ------------------------------------------------------------------------------- the mathematics


@each_shape
@each_operation
def test_rotary_reference_equals_autograd(operation: described.Operation, s: Shapes) -> None:
    i = dict(operation.inputs(s, Draw(torch.float64, CPU)))
    leaves = {name: i[name].clone().requires_grad_() for name in operation.leaves}
    rotated = operation.plain(i | leaves)["rotated"]
    gradients = torch.autograd.grad(rotated, list(leaves.values()), i["drotated"])
    actual = run(operation, reference, i)
    assert_close(actual["rotated"], rotated.detach(), 1e-12)
    for name, gradient in zip(leaves, gradients, strict=True):
        assert_close(actual[f"d{name}"], gradient, 1e-12, f"d{name}")


# Weights of f(x + n h), n = 1 .. 4, in a central difference with an error of h^8.
STENCIL = (4 / 5, -1 / 5, 4 / 105, -1 / 280)


@each_shape
@each_operation
def test_rotary_backward_equals_finite_differences(
    operation: described.Operation, s: Shapes
) -> None:
    """Along a random direction of all inputs at once. The smallest head is 0.7 long: with h = 0.002
    the stencil's error is (4 h / 0.7)^8 of it; cancellation costs 1e-16 / h. Relative to the sum's
    terms, of either sign."""
    i = dict(operation.inputs(s, Draw(torch.float64, CPU)))
    torch.manual_seed(1)
    direction = {name: torch.randn_like(i[name]) for name in operation.leaves}
    h = 0.002

    def loss(steps: int) -> Tensor:
        moved = {name: i[name] + steps * h * v for name, v in direction.items()}
        return (operation.forward(reference, i | moved)["rotated"] * i["drotated"]).sum()

    numeric = sum(w * (loss(n) - loss(-n)) for n, w in enumerate(STENCIL, 1)) / h
    results = run(operation, reference, i)
    terms = torch.cat([(results[f"d{name}"] * v).flatten() for name, v in direction.items()])
    assert abs(numeric - terms.sum()) <= 1e-12 * terms.norm() * terms.numel() ** 0.5


@pytest.mark.parametrize(("H", "H_kv"), [(3, 3), (6, 2)])
def test_rotary_equals_transformers(H: int, H_kv: int) -> None:
    """Its layout is that of halves, in Llama as in Qwen."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    s = Shapes(B=2, T=7, H=H, H_kv=H_kv, D=8)
    i = dict(described.Rotary().inputs(s, Draw(torch.float64, CPU)))
    q, k, v = reference.split_heads(i["qkv"], H, H_kv)
    twice = [torch.cat([i[name]] * 2, -1)[None] for name in ("cos", "sin")]
    q, k = apply_rotary_pos_emb(q, k, *twice)
    rotated = reference.rotary_forward(i["qkv"], i["cos"], i["sin"], H, H_kv)
    for actual, expected in zip(reference.split_heads(rotated, H, H_kv), (q, k, v), strict=True):
        assert_close(actual, expected, 1e-12)


def test_rotary_equals_original() -> None:
    """Su et al. turn (x_2i, x_2i+1) as a complex number; here these are x_i and x_{i+D/2}."""
    T, D = 5, 12
    cos, sin = angles(T, D)
    x = torch.randn(T, D, dtype=torch.float64)
    neighbors = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
    expected = torch.cat((neighbors.real, neighbors.imag), -1)
    halves = x.unflatten(-1, (-1, 2)).mT.flatten(-2)
    assert_close(reference.rotate(halves, cos, sin), expected, 1e-12)


def angles_at(positions: Tensor, D: int) -> tuple[Tensor, Tensor]:
    """cos and sin (T, D/2) of any positions."""
    frequency = 10_000.0 ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
    angle = positions.double()[:, None] * frequency
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("shift", [1, 1000, 2**20 - 8])
def test_rotary_distance_alone(shift: int) -> None:
    """q · k is the same `shift` positions further on, up to position 2^20 - 1."""
    D = 32
    torch.manual_seed(0)
    q, k = torch.randn(2, D, dtype=torch.float64)

    def scores(first: int) -> Tensor:
        cos, sin = angles_at(torch.arange(8) + first, D)
        return reference.rotate(q, cos, sin) @ reference.rotate(k, cos, sin).T

    here, there = scores(0), scores(shift)
    # an angle of 10^6 is rounded to 1e-10 before its cosine is taken
    assert_close(there, here, 1e-12 if shift < 2000 else 1e-9)
    assert (here - here[0, 0]).abs().max() > 0.1  # of another distance they are others


# ---------------------------------------------------------------------------------- the backends

FLOAT16 = [pytest.param(ops, torch.float16) for ops in (native, triton)]


@each_shape
@each_operation
@pytest.mark.parametrize(("ops", "dtype"), [*BACKENDS, *FLOAT16])
def test_rotary_equals_reference(
    ops: Any, dtype: torch.dtype, operation: described.Operation, s: Shapes
) -> None:
    i = dict(operation.inputs(s, Draw(dtype, CPU)))
    exact = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in i.items()
    }
    expected, actual = run(operation, reference, exact), run(operation, ops, i)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(actual[name], value.to(actual[name].dtype), NATIVE[dtype], name)


@each_backend
def test_rotary_q_and_k_alone(ops: Any, dtype: torch.dtype) -> None:
    H, H_kv, D = 4, 2, 6
    i = dict(described.NormRotary().inputs(Shapes(B=2, T=5, H=H, H_kv=H_kv, D=D), Draw(dtype, CPU)))
    qkv, v = i["qkv"].clone(), i["qkv"][..., -H_kv * D :].clone()
    weights = i["q_weight"], i["k_weight"]
    normed, _ = ops.norm_rotary_forward(qkv, *weights, i["cos"], i["sin"], EPS, H, H_kv)
    assert qkv.equal(i["qkv"])  # the backward reads it again
    rotated = ops.rotary_forward(qkv, i["cos"], i["sin"], H, H_kv)
    for x in (normed, rotated):
        assert x[..., -H_kv * D :].equal(v)
        assert x.dtype == dtype
        assert not x[:, 1:, 0].equal(i["qkv"][:, 1:, 0])


@each_backend
def test_rotary_queries_alone(ops: Any, dtype: torch.dtype) -> None:
    """Without keys and values the heads are the same bits as beside them."""
    H, H_kv, D = 4, 2, 6
    i = described.Rotary().inputs(Shapes(B=2, T=5, H=H, H_kv=H_kv, D=D), Draw(dtype, CPU))
    q, tables = i["qkv"][..., : H * D].contiguous(), (i["cos"], i["sin"])
    together = ops.rotary_forward(i["qkv"].clone(), *tables, H, H_kv)[..., : H * D]
    alone = ops.rotary_forward(q.clone(), *tables, H, 0)
    assert torch.equal(alone, together)
    back = ops.rotary_backward(i["qkv"].clone(), *tables, H, H_kv)[..., : H * D]
    assert torch.equal(ops.rotary_backward(q.clone(), *tables, H, 0), back)
    with pytest.raises(ValueError, match="width"):
        ops.rotary_forward(q[..., 1:].contiguous(), *tables, H, 0)


@each_backend
def test_rotary_backward_inverse(ops: Any, dtype: torch.dtype) -> None:
    """Rotary backward undoes the forward."""
    i = dict(described.Rotary().inputs(Shapes(B=2, T=40, H=3, H_kv=1, D=64), Draw(dtype, CPU)))
    rotated = ops.rotary_forward(i["qkv"].clone(), i["cos"], i["sin"], 3, 1)
    back = ops.rotary_backward(rotated, i["cos"], i["sin"], 3, 1)
    assert_close(back, i["qkv"], {torch.float64: 1e-15, torch.float32: 2e-7}.get(dtype, 4e-3))


@each_operation
@each_backend
def test_rotary_table_of_positions(
    ops: Any, dtype: torch.dtype, operation: described.Operation
) -> None:
    """Decoding: each row of the batch is at positions of its own, here up to 2^20 - 1."""
    B, T, H, H_kv, D = 3, 2, 4, 2, 6
    i = dict(operation.inputs(Shapes(B=B, T=T, H=H, H_kv=H_kv, D=D), Draw(dtype, CPU)))
    cos = torch.full((2**20, D // 2), torch.nan, dtype=reference.wide_dtype(dtype))
    sin = cos.clone()
    positions = torch.tensor([[0, 1], [2**20 - 1, 5], [77, 1000]])
    some = positions.flatten()
    cos[some], sin[some] = (x.to(cos.dtype) for x in angles_at(some, D))
    x = i["qkv"]

    def rotated(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> Tensor:
        if not operation.vectors:
            return ops.rotary_forward(x.clone(), cos, sin, H, H_kv, positions)
        weights = i["q_weight"], i["k_weight"]
        return ops.norm_rotary_forward(x, *weights, cos, sin, EPS, H, H_kv, positions)[0]

    actual = rotated(x, cos, sin, positions)
    for b in range(B):
        rows = positions[b]
        expected = rotated(x[b : b + 1], cos[rows].clone(), sin[rows].clone(), None)
        assert actual[b : b + 1].equal(expected)


@each_backend
def test_norm_rotary_heads_far_from_one(ops: Any, dtype: torch.dtype) -> None:
    """All zero, tiny beside eps, and as large as the dtype's squares allow (and do not)."""
    H, D = 3, 8
    sizes = torch.tensor([0.0, 1e-30, 1e-4, 1.0, 1e4])
    if dtype == torch.float64 or (ops is not reference and dtype != torch.float16):
        sizes = torch.cat([sizes, torch.tensor([1e17])])
    if ops is native and dtype in (torch.float32, torch.bfloat16):
        sizes = torch.cat([sizes, torch.tensor([1e30])])  # goes by float64
    T = len(sizes)
    i = dict(described.NormRotary().inputs(Shapes(T=T, H=H, H_kv=1, D=D), Draw(dtype, CPU)))
    qkv = (i["qkv"].double() * sizes[None, :, None]).to(dtype)
    angles_ = i["cos"], i["sin"]

    def both(ops: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x, dy = qkv.to(dtype), i["drotated"].to(dtype).clone()
        weights = [i[name].to(dtype) for name in ("q_weight", "k_weight")]
        table = [a.to(reference.wide_dtype(dtype)) for a in angles_]
        sums = [torch.zeros(D, dtype=table[0].dtype) for _ in range(2)]
        rotated, rstd = ops.norm_rotary_forward(x, *weights, *table, EPS, H, 1)
        dqkv = ops.norm_rotary_backward(dy, x, *weights, rstd, *table, *sums, H, 1)
        return rotated, rstd, dqkv, *sums

    for actual, expected in zip(both(ops, dtype), both(reference, torch.float64), strict=True):
        assert actual.isfinite().all()
        if actual.dim() == 3:  # each position by itself: their sizes lie far apart
            for t in range(T):
                assert_close(actual[:, t], expected[:, t].to(dtype), 2 * NATIVE[dtype])
        else:
            assert_close(actual, expected, 2 * NATIVE[dtype] if actual.dim() == 1 else 2e-6)
    rotated, *_ = both(ops, dtype)
    assert (rotated[:, 0, : (H + 1) * D] == 0).all()  # of zeros


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
@each_backend
def test_rotary_no_rows(ops: Any, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    H, D = 2, 4
    qkv = torch.empty(*shape, 3 * H * D, dtype=dtype)
    cos, sin = angles(3, D, dtype)
    weight, sums = torch.ones(D, dtype=dtype), torch.ones(2, D, dtype=cos.dtype)
    assert ops.rotary_forward(qkv, cos, sin, H).shape == qkv.shape
    assert ops.rotary_backward(qkv, cos, sin, H).shape == qkv.shape
    rotated, rstd = ops.norm_rotary_forward(qkv, weight, weight, cos, sin, EPS, H)
    assert rotated.shape == qkv.shape and rstd.shape == (0, 2 * H)
    dqkv = ops.norm_rotary_backward(qkv, qkv, weight, weight, rstd, cos, sin, *sums, H)
    assert dqkv.shape == qkv.shape and (sums == 1).all()


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_rotary_native_pieces(
    monkeypatch: pytest.MonkeyPatch, operation: described.Operation
) -> None:
    """A few positions at a time, the last piece shorter, give the bits of all at once; sums differ
    in order alone."""
    i = dict(operation.inputs(Shapes(B=2, T=11, H=3, H_kv=1, D=8), Draw(torch.float32, CPU)))
    whole = run(operation, native, i)
    monkeypatch.setattr(native, "CACHED_ELEMENTS", 4 * 2 * 5 * 8)  # four positions
    for name, value in run(operation, native, i).items():
        assert_close(value, whole[name], 1e-6 if name in operation.vectors else 0.0, name)


# ---------------------------------------------------------------------------------------- triton


@pytest.mark.parametrize(
    "D", [34, *(pytest.param(D, marks=pytest.mark.slow) for D in (2, 96, 200, 256))]
)
def test_rotary_triton_even_widths(D: int) -> None:
    """Up to 256, not a power of two: over several programs and several tiles of one."""
    s = Shapes(B=2, T=7, H=9, H_kv=3, D=D)
    for operation in OPERATIONS:
        i = dict(operation.inputs(s, Draw(torch.float32, CPU)))
        expected, actual = run(operation, reference, i), run(operation, triton, i)
        for name, value in expected.items():
            assert_close(actual[name], value, 2e-6, name)


def test_norm_rotary_triton_partial_sums() -> None:
    """Gains' gradients are added to rows of partial sums."""
    H, H_kv, D = 3, 1, 16
    s = Shapes(B=2, T=33, H=H, H_kv=H_kv, D=D)
    i = dict(described.NormRotary().inputs(s, Draw(torch.float32, CPU)))
    weights, table = (i["q_weight"], i["k_weight"]), (i["cos"], i["sin"])
    _, rstd = triton.norm_rotary_forward(i["qkv"], *weights, *table, EPS, H, H_kv)

    def backward(ops: Any, vectors: list[Tensor]) -> Tensor:
        return ops.norm_rotary_backward(
            i["drotated"].clone(), i["qkv"], *weights, rstd, *table, *vectors, H, H_kv
        )

    vectors = random_gradients(torch.Generator().manual_seed(0), (D,), (D,))
    expected = [x.clone() for x in vectors]
    dqkv = in_partials(lambda rows: backward(triton, rows), vectors)
    assert_close(dqkv, backward(reference, expected), 2e-6)
    for actual, wanted in zip(vectors, expected, strict=True):
        assert_close(actual, wanted, 2e-6)
    assert dqkv.equal(backward(triton, vectors))  # the same bits, whoever sums up


def rotary_arguments() -> dict[str, Any]:
    i = described.NormRotary().inputs(Shapes(B=1, T=3, H=2, H_kv=1, D=4), Draw(torch.float32, CPU))
    return dict(i)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"qkv": torch.zeros(1, 3, 12)}, r"head width: expected an even number.*, got 3"),
        ({"qkv": torch.zeros(1, 3, 15)}, r"q, k and v: expected a width of .* = 4·D together"),
        ({"qkv": torch.zeros(3, 16)}, r"qkv: expected shape \(\*, \*, \*\), got \(3, 16\)"),
        ({"qkv": torch.zeros(1, 3, 16).double()}, r"qkv: expected dtype .*, got float64"),
        ({"qkv": torch.zeros(1, 3, 32)[..., ::2]}, r"qkv: expected a contiguous tensor"),
        ({"qkv": torch.zeros(1, 4, 16)}, r"qkv: expected at most 3, the rows of cos, got 4"),
        ({"cos": torch.zeros(3, 4)}, r"cos: expected shape \(\*, 2\), got \(3, 4\)"),
        ({"sin": torch.zeros(3, 2).bfloat16()}, r"sin: expected dtype float32, got bfloat16"),
        ({"sin": torch.zeros(4, 2)}, r"sin: expected shape \(3, 2\), that of cos"),
        ({"k_weight": torch.zeros(3)}, r"k_weight: expected shape \(4\), got \(3,\)"),
        ({"positions": torch.zeros(3)}, r"positions: expected dtype int64, got float32"),
    ],
)
def test_rotary_triton_refuses(changed: dict[str, Any], message: str) -> None:
    """What it would misread."""
    i = rotary_arguments() | changed
    with pytest.raises(ValueError, match=f"^{message}"):
        triton.norm_rotary_forward(
            i["qkv"], i["q_weight"], i["k_weight"], i["cos"], i["sin"], EPS, 2, 1,
            i.get("positions"),
        )  # fmt: skip


def test_norm_rotary_triton_backward_refuses() -> None:
    """Rows of another stride."""
    i = rotary_arguments()
    arguments = i["drotated"], i["qkv"], i["q_weight"], i["k_weight"], torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"^dk_weight: expected .* of dq_weight, got strides"):
        triton.norm_rotary_backward(
            *arguments, i["cos"], i["sin"], torch.zeros(4, 4), torch.zeros(4, 8)[:, :4], 2, 1
        )
