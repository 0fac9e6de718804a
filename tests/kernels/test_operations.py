"""Every operation of `reference` against autograd and finite differences, `native` against it.

Tolerances, all on the relative RMS error:
  1e-12  float64 against autograd: the same formula summed in another order; 2^-53 = 1.1e-16 a
         rounding, and a few thousand of them add up as a random walk.
  1e-6   central differences in float64 with h = 1e-5: truncation h² = 1e-10, cancellation
         1e-16 / h = 1e-11, amplified by the third derivatives of softmax and GELU.
  NATIVE native against reference in the same dtype. float64: 1e-12 as above. float32: sums of up to
         a few thousand terms in another order, 2^-24 each: 2e-6. bfloat16 and float16: inputs
         are the same, results are rounded once (2^-9 and 2^-12 at most, a third of that in RMS),
         and an intermediate that one side rounds and the other does not costs about two more.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mantrans.kernels import native, reference
from mantrans.kernels import operations as described
from mantrans.kernels.operations import Draw, Inputs, Shapes
from tests.support.compare import assert_close, relative_error

NATIVE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = list(NATIVE)
EPS = 1e-5


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def buffer(x: Tensor) -> Tensor:
    """A gradient buffer that already holds something: what is added must not overwrite it."""
    return torch.ones(x.shape, dtype=acc(x.dtype))


# ------------------------------------------------------------------------- operations as described


class DocumentsOfAnyLength(described.Attention):
    """Attention with documents of one to a few tokens."""

    def inputs(self, s: Shapes, draw: Draw) -> Inputs:
        starts = reference.document_starts(draw.integers(3, s.B, s.T), 0)
        return {**super().inputs(s, draw), "starts": starts}


class Case(NamedTuple):
    """An operation at one size; without a bias where it can do without."""

    operation: described.Operation
    shapes: Shapes
    bias: bool = True

    def inputs(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        i = dict(self.operation.inputs(self.shapes, Draw(dtype, torch.device("cpu"))))
        return i if self.bias else i | {"bias": None, "dbias": None}

    @property
    def leaves(self) -> list[str]:
        return [name for name in self.operation.leaves if self.bias or name != "bias"]

    def run(self, ops: Any, i: dict[str, Any]) -> dict[str, Tensor]:
        """All results, and what was added to each gradient buffer; i stays as it is."""
        i = {name: x.clone() if isinstance(x, Tensor) else x for name, x in i.items()}
        starts = {
            f"d{name}": x.clone() for name in self.leaves if (x := i.get(f"d{name}")) is not None
        }
        results = self.operation.forward(ops, i)
        gradients = self.operation.backward(ops, i, results)
        found = {**results, **gradients}
        return {
            name: x - starts.get(name, 0)
            for name, x in found.items()
            if name != "saved" and x is not None
        }


def attention(B: int, T: int, H: int, D: int, H_kv: int | None = None, documents: bool = False):
    operation = DocumentsOfAnyLength() if documents else described.Attention()
    return Case(operation, Shapes(B=B, T=T, H=H, H_kv=H_kv or H, D=D))


CASES = {
    "embedding": Case(described.Embedding(), Shapes(B=3, T=5, C=12, V=7, Vp=9)),
    "embedding T=1": Case(described.Embedding(), Shapes(C=12, V=7, Vp=7)),
    "embedding without positions": Case(
        described.TokenEmbedding(), Shapes(B=3, T=5, C=12, V=7, Vp=9)
    ),
    "linear": Case(described.Linear(), Shapes(N=18, C=6, F=11)),
    "linear no bias": Case(described.Linear(), Shapes(N=18, C=6, F=11), bias=False),
    "linear one row": Case(described.Linear(), Shapes(C=3)),
    "layer norm": Case(described.LayerNorm(), Shapes(N=7, C=33)),
    "layer norm no bias": Case(described.LayerNorm(), Shapes(N=7, C=33), bias=False),
    "layer norm one row": Case(described.LayerNorm(), Shapes(C=5)),
    "layer norm many rows": Case(described.LayerNorm(), Shapes(N=3000, C=24)),
    "add layer norm": Case(described.AddLayerNorm(), Shapes(N=6, C=20)),
    "attention": attention(2, 17, 3, 8),
    "attention T=1": attention(2, 1, 2, 4),
    "attention one head, odd D": attention(1, 13, 1, 5),
    "attention documents": attention(2, 19, 2, 6, documents=True),
    "attention over several query blocks": attention(1, 300, 2, 8),
    "attention documents over several blocks": attention(2, 270, 1, 8, documents=True),
    "attention in groups of two": attention(2, 17, 4, 6, H_kv=2),
    "attention in groups of three, documents": attention(2, 19, 6, 7, 2, documents=True),
    "attention of one key head over several blocks": attention(1, 301, 3, 5, H_kv=1),
    "bias gelu": Case(described.BiasGelu(), Shapes(N=9, F=14)),
    "gelu no bias": Case(described.BiasGelu(), Shapes(N=9, F=14), bias=False),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request) -> Case:
    return request.param


def test_reference_equals_autograd(case: Case) -> None:
    i = case.inputs()
    leaves = {name: i[name].clone().requires_grad_() for name in case.leaves}
    results = case.operation.plain(i | leaves)
    upstream = case.operation.upstream.items()
    gradients = torch.autograd.grad(
        [results[name] for name, _ in upstream],
        list(leaves.values()),
        [i[dy] for _, dy in upstream],
    )
    expected = results | {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}
    actual = case.run(reference, i)
    for name, value in expected.items():
        assert_close(actual[name], value.detach(), 1e-12, name)


@pytest.mark.parametrize(
    "operation",
    [described.DecodeAttention(), described.RaggedDecodeAttention()],
    ids=lambda o: o.name,
)
@pytest.mark.parametrize("H_kv", [6, 2])
def test_decode_attention_equals_pytorch(operation: described.Operation, H_kv: int) -> None:
    case = Case(operation, Shapes(B=3, T=11, H=6, H_kv=H_kv, D=5))
    i = case.inputs()
    expected = operation.plain(i)["out"]
    assert expected.isfinite().all()
    assert_close(operation.forward(reference, i)["out"], expected, 1e-12)


def test_backward_equals_finite_differences(case: Case) -> None:
    """Along a random direction of all inputs at once: (L(x + hv) - L(x - hv)) / 2h = dL·v."""
    h, i = 1e-5, case.inputs()
    direction = {name: torch.randn_like(i[name]) for name in case.leaves}

    def loss(sign: float) -> Tensor:
        moved = {name: i[name] + sign * h * v for name, v in direction.items()}
        results = case.operation.forward(reference, i | moved)
        return sum((results[y] * i[dy]).sum() for y, dy in case.operation.upstream.items())

    numeric = (loss(+1) - loss(-1)) / (2 * h)
    results = case.run(reference, i)
    analytic = sum((results[f"d{name}"] * v).sum() for name, v in direction.items())
    assert abs(numeric - analytic) <= 1e-6 * max(1.0, abs(analytic))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_equals_reference(case: Case, dtype: torch.dtype) -> None:
    i = case.inputs(dtype)
    expected, actual = case.run(reference, i), case.run(native, i)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        # the reference keeps the mean for its own backward in float64
        assert name == "mean" or actual[name].dtype == value.dtype, name
        assert_close(actual[name], value, NATIVE[dtype], name)


def test_attention_bfloat16() -> None:
    """The batched products round the scores to bfloat16, which PyTorch's kernel does not.

    Against float64 the error may be at most twice that of PyTorch's kernel: scores of unit scale
    are rounded as finely as the probabilities, which both round.
    """
    qkv = randn(2, 256, 3 * 4 * 64).bfloat16()
    expected, _ = reference.attention_forward(qkv.double(), 4)
    ours = relative_error(native.attention_forward(qkv, 4)[0], expected)
    q, k, v = reference.split_heads(qkv, 4)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert ours <= 2 * relative_error(reference.merge_heads(theirs), expected)


@pytest.mark.parametrize("flash", ["forward", "forward and backward", "never"])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("H_kv", [2, 1])
def test_attention_bfloat16_each_way(
    monkeypatch: pytest.MonkeyPatch, flash: str, documents: bool, H_kv: int
) -> None:
    """With AMX or without, short or long: whatever this machine would choose by itself."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: flash != "never")
    monkeypatch.setattr(native, "LONGEST_BATCHED", 0 if "backward" in flash else 1024)
    case = attention(2, 300, 2, 16, H_kv, documents)
    i = case.inputs(torch.bfloat16)
    expected, actual = (case.run(ops, i) for ops in (reference, native))
    for name, value in expected.items():
        assert_close(actual[name], value, NATIVE[torch.bfloat16], name)


@pytest.mark.parametrize("ops", [reference, native], ids=["reference", "native"])
@pytest.mark.parametrize(
    ("width", "n_heads", "n_kv_heads", "message"),
    [
        (40, 6, 4, "n_kv_heads: expected a divisor of n_heads = 6, got 4"),
        (40, 4, 8, "n_kv_heads: expected a divisor of n_heads = 4, got 8"),
        (40, 4, 0, "n_kv_heads: expected a divisor of n_heads = 4, got 0"),
        (40, 0, None, "n_kv_heads: expected a divisor of n_heads = 0, got 0"),
        (40, 2, None, "q, k and v: expected a width of .* = 6·D together, got 40"),
        (42, 4, 2, "q, k and v: expected a width of .* = 8·D together, got 42"),
    ],
)
def test_attention_heads_not_fitting(
    ops, width: int, n_heads: int, n_kv_heads: int | None, message: str
) -> None:
    """Heads that do not fit are refused."""
    qkv = torch.zeros(1, 3, width)
    with pytest.raises(ValueError, match=f"^{message}$"):
        ops.attention_forward(qkv, n_heads, None, n_kv_heads)
    with pytest.raises(ValueError, match=f"^{message}$"):
        ops.attention_backward(qkv, qkv, qkv, qkv.new_empty(0), n_heads, None, n_kv_heads)


# -------------------------------------------------------------------------------- cross-entropy


def logits_and_targets(N: int, V: int, padding: int, dtype: torch.dtype, ignored: str = "some"):
    logits = (randn(N, V + padding) * 4).to(dtype)
    logits[:, V:] = 1e4 if dtype != torch.float16 else 6e4  # padding must not be seen
    targets = torch.randint(0, V, (N,))
    targets[{"none": slice(0, 0), "some": slice(0, None, 3), "all": slice(None)}[ignored]] = -100
    return logits, targets


@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize(("N", "V", "padding"), [(1, 1, 0), (1, 7, 3), (10, 37, 91), (33, 513, 0)])
def test_cross_entropy_equals_autograd(N: int, V: int, padding: int, ignored: str) -> None:
    logits, targets = logits_and_targets(N, V, padding, torch.float64, ignored)
    leaf = logits.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf[:, :V], targets, reduction="none")
    scale = torch.tensor(0.3, dtype=torch.float64)
    (expected.sum() * scale).backward()

    losses, normalizer = reference.cross_entropy_forward(logits, targets, V)
    dlogits = reference.cross_entropy_backward(logits, targets, normalizer, scale, V)
    assert dlogits.data_ptr() == logits.data_ptr()
    assert_close(losses, expected.detach(), 1e-12, "losses")
    assert_close(dlogits, leaf.grad, 1e-12, "dlogits")
    assert (dlogits[:, V:] == 0).all() and (dlogits[targets == -100] == 0).all()


@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_native_equals_reference(dtype: torch.dtype, ignored: str) -> None:
    V = 300
    logits, targets = logits_and_targets(21, V, 84, dtype, ignored)
    scale = torch.tensor(1 / 21, dtype=acc(dtype))
    expected = logits.clone()
    losses, normalizer = reference.cross_entropy_forward(logits, targets, V)
    reference.cross_entropy_backward(expected, targets, normalizer, scale, V)

    both, second = logits.clone(), logits.clone()
    tolerance = NATIVE[dtype]
    assert_close(native.cross_entropy_forward_backward(both, targets, scale, V), losses, tolerance)
    assert_close(both, expected, tolerance, "dlogits in one")
    native_losses, native_normalizer = native.cross_entropy_forward(logits, targets, V)
    assert_close(native_losses, losses, tolerance, "losses")
    counted = targets != -100
    assert_close(native_normalizer[counted], normalizer[counted], tolerance, "normalizer")
    native.cross_entropy_backward(second, targets, native_normalizer, scale, V)
    assert_close(second, expected, tolerance, "dlogits in two")
    assert (both[:, V:] == 0).all() and (both[targets == -100] == 0).all()


@pytest.mark.parametrize("ops", [reference, native], ids=["reference", "native"])
def test_linear_cross_entropy_equals_autograd(ops, monkeypatch) -> None:
    """Over several chunks, the last one short, with ignored rows and padded columns."""
    monkeypatch.setattr(reference, "CHUNK_ROWS", 16)
    monkeypatch.setattr(native, "CHUNK_ROWS", 40)
    monkeypatch.setattr(native, "SOFTMAX_ELEMENTS", 1)
    N, C, V, padded = 150, 12, 29, 40
    x, weight = randn(N, C).requires_grad_(), randn(padded, C).requires_grad_()
    targets = torch.randint(0, V, (N,))
    targets[::4] = -100
    scale = 1 / (targets != -100).sum().double()
    expected = torch.nn.functional.cross_entropy((x @ weight.T)[:, :V], targets)
    dx_expected, dweight_expected = torch.autograd.grad(expected, [x, weight])

    x, weight = x.detach(), weight.detach()
    dweight = buffer(weight)
    loss, dx = ops.linear_cross_entropy_forward_backward(x, weight, targets, scale, dweight, V)
    losses = ops.linear_cross_entropy_forward(x, weight, targets, V)
    assert_close(loss, expected.detach(), 1e-12, "loss")
    assert_close(losses.sum() * scale, expected.detach(), 1e-12, "losses")
    assert_close(dx, dx_expected, 1e-12, "dx")
    assert_close(dweight - 1, dweight_expected, 1e-12, "dweight")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_cross_entropy_native_equals_reference(dtype: torch.dtype) -> None:
    N, C, V, padded = 70, 24, 50, 128
    x, weight, targets = randn(N, C, dtype=dtype), randn(padded, C, dtype=dtype), None
    targets = torch.randint(0, V, (N,))
    scale = torch.tensor(1 / N, dtype=acc(dtype))
    results = []
    for ops in (reference, native):
        dweight = buffer(weight)
        loss, dx = ops.linear_cross_entropy_forward_backward(x, weight, targets, scale, dweight, V)
        results.append((loss, dx, dweight - 1))
    for name, expected, actual in zip(("loss", "dx", "dweight"), *results, strict=True):
        assert_close(actual, expected, NATIVE[dtype], name)


# ------------------------------------------------------------------------------ decode attention


@pytest.mark.parametrize("lengths", [[11, 1, 6], [7, 7, 7], [1, 1, 1]], ids=str)
@pytest.mark.parametrize(("H", "H_kv"), [(2, None), (6, 2), (3, 1)])
@pytest.mark.parametrize("ops", [reference, native], ids=["reference", "native"])
def test_decode_attention_last_row(ops, H: int, H_kv: int | None, lengths: list[int]) -> None:
    B, T, D = 3, 11, 6
    width = (H_kv or H) * D
    qkv = randn(B, T, H * D + 2 * width)
    out, _ = reference.attention_forward(qkv, H, None, H_kv)
    q, k, v = qkv.split([H * D, width, width], dim=-1)
    k_cache, v_cache = (torch.full((B, T + 4, width), math.nan, dtype=q.dtype) for _ in "kv")
    for b, n in enumerate(lengths):
        k_cache[b, :n], v_cache[b, :n] = k[b, :n], v[b, :n]
    last = torch.stack([q[b, n - 1] for b, n in enumerate(lengths)])
    expected = torch.stack([out[b, n - 1] for b, n in enumerate(lengths)])
    actual = ops.decode_attention(last, k_cache, v_cache, torch.tensor(lengths), H, H_kv)
    assert_close(actual, expected, 1e-12)


@pytest.mark.promise("decoding on a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [[400] * 5, [400, 1, 399, 256, 17], [3, 2, 3, 1, 1]], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_decode_attention_native_exact(
    dtype: torch.dtype, lengths: list[int], scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 400 positions the float32 copies are made in two parts, some with equal rows."""
    T, H, H_kv, D = 400, 8, 4, 64
    q, k, v = (scale * randn(5, *s, dtype=dtype) for s in ((H * D,), (T, H_kv * D), (T, H_kv * D)))
    lengths = torch.tensor(lengths)
    for cache in (k, v):
        cache[torch.arange(T) >= lengths[:, None]] = math.nan
    exact = reference.decode_attention(q.double(), k.double(), v.double(), lengths, H, H_kv)
    bound = 2 * (reference.decode_attention(q, k, v, lengths, H, H_kv) - exact).abs().max()
    monkeypatch.delattr(reference, "decode_attention")
    found = native.decode_attention(q, k, v, lengths, H, H_kv)
    assert found.dtype == dtype and found.shape == q.shape
    assert (found - exact).abs().max() <= bound


@pytest.mark.parametrize("rows", [(1,), (8,), (2, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_few_float32_rows(rows, bias: bool) -> None:
    """Few float32 rows and a large weight give the same product."""
    x, weight, b = randn(*rows, 520), randn(700, 520), randn(700) if bias else None
    expected = reference.linear_forward(x, weight, b)
    narrow = [None if t is None else t.float() for t in (x, weight, b)]
    assert_close(native.linear_forward(*narrow), expected, 1e-5)
    strided = narrow[0].mT.contiguous().mT  # a transposed view
    assert_close(native.linear_forward(strided, *narrow[1:]), expected, 1e-5)


def test_document_starts() -> None:
    tokens = torch.tensor([[5, 0, 7, 8, 0, 0, 9], [0, 1, 2, 3, 4, 5, 6]])
    starts = reference.document_starts(tokens, end_of_text=0)
    assert starts.tolist() == [[0, 0, 2, 2, 2, 5, 6], [0, 1, 1, 1, 1, 1, 1]]
    assert starts.dtype == torch.int32


# --------------------------------------------------------------------------------- optimization


def update(ops, name: str, state: dict[str, Tensor], gradient: Tensor, step: int, **options):
    """One update of `state` = {weights, master, exp_avg, exp_avg_sq} by the named optimizer."""
    scalars = {key: torch.as_tensor(options.pop(key, 1.0)) for key in ("learning_rate", "clip")}
    finite = options.pop("finite", torch.tensor(True))
    common = {**scalars, "finite": finite, "weight_decay": 0.1, **options}
    weights, master = state["weights"], state.get("master")
    if name == "sgd":
        ops.sgd_update(weights, master, gradient, **common)
    else:
        ops.adamw_update(
            weights, master, gradient, state["exp_avg"], state["exp_avg_sq"],
            step=torch.tensor(float(step)), beta1=0.9, beta2=0.99, eps=1e-8, **common,
        )  # fmt: skip


def optimizer_state(P: int, dtype: torch.dtype, master: bool) -> dict[str, Tensor]:
    w = randn(P, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    state = {"weights": w.to(dtype), "exp_avg": torch.zeros_like(w)}
    return state | {"exp_avg_sq": torch.zeros_like(w)} | ({"master": w} if master else {})


@pytest.mark.parametrize("ops", [reference, native], ids=["reference", "native"])
def test_adamw_and_sgd_equal_torch(ops) -> None:
    for name in ("adamw", "sgd"):
        state = optimizer_state(9, torch.float64, master=False)
        decayed, plain = (
            state["weights"].clone()[s].requires_grad_() for s in (slice(5), slice(5, 9))
        )
        groups = [
            {"params": [decayed], "weight_decay": 0.1},
            {"params": [plain], "weight_decay": 0},
        ]
        torch_optimizer = (
            torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99), eps=1e-8)
            if name == "adamw"
            else torch.optim.SGD(groups, lr=0.01)
        )
        for step in range(1, 8):
            gradient = randn(9)
            decayed.grad, plain.grad = gradient[:5] * 0.5, gradient[5:] * 0.5
            torch_optimizer.step()
            lr = torch.tensor(0.01, dtype=torch.float64)
            for part, decay in ((slice(5), 0.1), (slice(5, 9), 0.0)):
                views = {key: x[part] for key, x in state.items()}
                options = {"learning_rate": lr, "clip": 0.5, "weight_decay": decay}
                update(ops, name, views, gradient[part].clone(), step, **options)
        expected = torch.cat([decayed, plain]).detach()
        assert_close(state["weights"], expected, 1e-12, name)


@pytest.mark.parametrize("ops", [reference, native], ids=["reference", "native"])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_update_not_finite(ops, name: str, stochastic: bool) -> None:
    """It changes no bit."""
    dtype = torch.bfloat16
    state = optimizer_state(9, dtype, master=not stochastic)
    before = {key: x.clone() for key, x in state.items()}
    gradient = torch.full((9,), math.nan)
    seed = {"rounding_seed": torch.tensor(3)} if stochastic else {}
    update(ops, name, state, gradient, 1, finite=torch.tensor(False), **seed)
    for key, x in state.items():
        assert torch.equal(x, before[key]), key


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_update_native_bfloat16(name: str) -> None:
    states = [optimizer_state(4099, torch.bfloat16, master=True)]
    states.append({key: x.clone() for key, x in states[0].items()})
    for step in range(1, 4):
        gradient = randn(4099, dtype=torch.float32)
        for ops, state in zip((reference, native), states, strict=True):
            update(ops, name, state, gradient.clone(), step, learning_rate=1e-2, clip=0.7)
    for key, value in states[0].items():
        # float32 state: a few roundings apart. bfloat16 weights: the same master, rounded.
        assert_close(states[1][key], value, 1e-3 if key == "weights" else 1e-6, key)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_update_in_parts(name: str) -> None:
    """The noise of stochastic rounding is a function of the place in the whole buffer."""
    whole = optimizer_state(4096, torch.bfloat16, master=False)
    parts = {key: x.clone() for key, x in whole.items()}
    gradient, options = randn(4096, dtype=torch.float32), {"rounding_seed": torch.tensor(3)}
    update(reference, name, whole, gradient, 1, learning_rate=1e-2, **options)
    for start in (0, 1000):
        part = slice(start, 1000 if start == 0 else None)
        views = {key: x[part] for key, x in parts.items()}
        update(
            reference, name, views, gradient[part], 1, learning_rate=1e-2, offset=start, **options
        )
    for key, x in whole.items():
        assert torch.equal(x, parts[key]), key


def test_stochastic_rounding_mean() -> None:
    """The mean of n draws differs from x by about ulp / √(12 n); 5 of those are allowed."""
    x = torch.tensor([1.0, -2.5, 1.001, -0.3333, 1e-20, 3.3e38, math.inf])
    draws = torch.stack(
        [reference.round_stochastically(x, torch.tensor(seed)).double() for seed in range(4000)]
    )
    assert (draws[:, :2] == x[:2].double()).all()
    ulp = x.double().abs() * 2**-7
    inner = slice(2, 5)
    bias = (draws.mean(0) - x.double())[inner].abs()
    assert (bias <= 5 * ulp[inner] / math.sqrt(12 * 4000)).all()
    assert (draws[:, inner].std(0) > 0).all()
    assert (draws[:, 6] == math.inf).all()


@pytest.mark.parametrize("ops", [reference, native], ids=["reference", "native"])
def test_gradient_norm(ops) -> None:
    g = randn(1001, dtype=torch.float32)
    assert_close(ops.gradient_norms(g, 1)[0], g.double().norm(), 1e-6)
    g[500] = math.nan
    assert not ops.gradient_norms(g, 1)[0].isfinite()
