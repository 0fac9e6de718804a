"""Every kernel, in every configuration that ships, on a GPU.

Each is held to what PyTorch's own kernels achieve in the same dtype: both are compared with the
reference in float64, and ours may err FACTOR times as much. Run again, it must give the same bits.
The programs of operations are those of `mantrans.kernels.selfcheck`.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mantrans.kernels import native, reference, selfcheck
from mantrans.kernels.selfcheck import Draw, Inputs, Outputs, Program, Shapes, poisoned_memory

pytestmark = pytest.mark.gpu

# Another order of summation, or one rounding more between two products, errs differently but not by
# more than this: it is what flash-attention's own tests allow, too.
FACTOR = 2.0
# Where PyTorch happens to be exact, a few roundings of float32 are no fault.
FLOOR = 8 * 2.0**-24

LOW = (torch.bfloat16, torch.float16)
ALL = (*LOW, torch.float32)
PROGRAMS = {program.__name__: (inputs, program) for inputs, program in selfcheck.PROGRAMS}
STANDARD = Shapes(B=2, T=64, H=4, H_kv=4, D=64, C=256, F=1024, V=1000, Vp=1024, N=300)

Case = tuple[str, torch.dtype, Shapes]


def attention_cases() -> Iterator[Case]:
    """Each block of head widths at its full width and below it, T around and far over a block."""
    for dtype in ALL:
        for D in (16, 24, 32, 64, 80, 96, 128, 160, 256):
            for T in (1, 127, 128, 1000) if dtype in LOW else (1, 33, 200):
                yield "attention", dtype, STANDARD._replace(T=T, H=3, H_kv=3, D=D)
    for D in (20, 100):  # heads that do not begin on 16 bytes
        yield "attention", torch.bfloat16, STANDARD._replace(T=1000, H=3, H_kv=3, D=D)
    for D in (64, 128):
        yield "attention", torch.bfloat16, STANDARD._replace(B=1, T=4096, H=2, H_kv=2, D=D)
        for dtype in ALL:  # groups of three
            yield "attention", dtype, STANDARD._replace(T=300, H=6, H_kv=2, D=D)
            yield "decoding", dtype, STANDARD._replace(T=300, H=6, H_kv=2, D=D)
    for D in (64, 128, 256):  # and of four
        yield "attention", torch.bfloat16, STANDARD._replace(T=300, H=8, H_kv=2, D=D)
    yield "decoding", torch.bfloat16, STANDARD._replace(T=16_384, H=8, H_kv=2)


def row_cases() -> Iterator[Case]:
    """Each tile of the norms, GELU and SwiGLU, with fewer and with more rows than programs."""
    for dtype in ALL:
        for C in (48, 64, 256, 512, 768, 1000, 1024, 1280, 1600, 4096, 8192):
            for N in (1, 5000):
                yield "layer_norm", dtype, STANDARD._replace(C=C, N=N)
                yield "rms_norm", dtype, STANDARD._replace(C=C, N=N)
        for F in (64, 1000, 3072):
            for N in (1, 5000):
                yield "gelu", dtype, STANDARD._replace(F=F, N=N)
                yield "swiglu", dtype, STANDARD._replace(F=F, N=N)
                yield "linear", dtype, STANDARD._replace(F=F, N=N)


def vocabulary_cases() -> Iterator[Case]:
    """Each row length of the loss; padded and unpadded; a vocabulary smaller than a block."""
    for dtype in ALL:
        for V, Vp in ((5, 128), (256, 256), (4096, 4096), (50_257, 50_304)):
            yield "loss", dtype, STANDARD._replace(V=V, Vp=Vp, N=301)
            yield "embedding", dtype, STANDARD._replace(V=V, Vp=Vp, T=255)
        yield "embedding", dtype, STANDARD._replace(C=64)


def other_cases() -> Iterator[Case]:
    for dtype in ALL:
        for C in (64, 512):  # 4 C² + 3 weights
            yield "steps", dtype, STANDARD._replace(C=C)
        for D in (16, 64, 80, 128, 256):
            for T in (1, 1000):
                yield "decoding", dtype, STANDARD._replace(T=T, D=D)


def rotary_cases() -> Iterator[Case]:
    """Widths of one and of several 16-byte loads, and of none; groups; one position and many."""
    for dtype in ALL:
        for D in (10, 64, 96, 128, 256) if dtype == torch.bfloat16 else (64, 96):
            for T in (1, 1000):
                yield "rotary", dtype, STANDARD._replace(T=T, H=6, H_kv=2, D=D)
    for H, H_kv, D in ((14, 2, 64), (16, 8, 128)):  # Qwen2.5-0.5B's and Qwen3-0.6B's
        yield "rotary", torch.bfloat16, STANDARD._replace(T=4096, H=H, H_kv=H_kv, D=D)


CASES = [
    *attention_cases(),
    *rotary_cases(),
    *row_cases(),
    *vocabulary_cases(),
    *other_cases(),
]


def label(case: Case) -> str:
    name, dtype, shapes = case
    changed = [
        f"{field}{value}"
        for field, value in shapes._asdict().items()
        if value != getattr(STANDARD, field)
    ]
    return "-".join([name, str(dtype).removeprefix("torch."), *changed])


# ------------------------------------------------------------------------------- PyTorch's kernels


def sdpa_forward(qkv: Tensor, n_heads: int, document_start: Tensor | None, n_kv_heads: int) -> Any:
    """PyTorch's attention: the flash kernel, or with documents the one that takes a mask."""
    q, k, v = reference.split_heads(qkv, n_heads, n_kv_heads)
    mask = None
    if document_start is not None:
        mask = reference.visible(qkv.shape[1], document_start, qkv.device)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return reference.merge_heads(out), None


def sdpa_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    statistics: None,
    n_heads: int,
    document_start: Tensor | None,
    n_kv_heads: int,
) -> Tensor:
    """Its backward, through autograd."""
    leaf = qkv.detach().clone().requires_grad_()
    again, _ = sdpa_forward(leaf, n_heads, document_start, n_kv_heads)
    return torch.autograd.grad(again, leaf, dout)[0]


def pytorch() -> types.SimpleNamespace:
    """The baseline: `native`, which is PyTorch's kernels, and PyTorch's attention."""
    attention = {"attention_forward": sdpa_forward, "attention_backward": sdpa_backward}
    return types.SimpleNamespace(**{**vars(native), **attention})


# ---------------------------------------------------------------------------------------- the tests


def draw(case: Case, device: torch.device) -> tuple[Inputs, Program]:
    name, dtype, shapes = case
    draw_inputs, program = PROGRAMS[name]
    return draw_inputs(shapes, Draw(dtype, device)), program


def run(program: Program, ops: Any, inputs: Inputs) -> Outputs:
    """The program's outputs; its inputs stay as they are."""
    copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with poisoned_memory():
        return program(ops, copies)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_kernel_error(case: Case, triton: types.ModuleType, device: torch.device) -> None:
    """Error is at most PyTorch's."""
    inputs, program = draw(case, device)
    exact = run(program, reference, {k: selfcheck.in_float64(v) for k, v in inputs.items()})
    ours, theirs = run(program, triton, inputs), run(program, pytorch(), inputs)
    for key, value in exact.items():
        error = selfcheck.relative_error(ours[key], value)
        baseline = selfcheck.relative_error(theirs[key], value)
        assert error <= FACTOR * baseline + FLOOR, f"{key}: {error:.2e}, PyTorch {baseline:.2e}"


@pytest.mark.parametrize("case", CASES, ids=label)
def test_kernel_bits_repeat(case: Case, triton: types.ModuleType, device: torch.device) -> None:
    inputs, program = draw(case, device)
    first = run(program, triton, inputs)
    for _ in range(3):
        again = run(program, triton, inputs)
        for key, value in first.items():
            assert torch.equal(again[key], value), f"{key} differs between two runs"


def test_cross_entropy_offsets_beyond_int32(triton: types.ModuleType, device: torch.device) -> None:
    """More than 2³¹ logits: the last rows must come out as they do alone."""
    V = 50_304
    N = 2**31 // V + 300
    if torch.cuda.mem_get_info()[0] < 3 * N * V * 2:
        pytest.skip("less than 13 GB of GPU memory are free")
    generator = torch.Generator(device).manual_seed(1)
    logits = torch.zeros(N, V, dtype=torch.bfloat16, device=device)
    tail = torch.randn(64, V, device=device, generator=generator).bfloat16()
    logits[-64:] = tail
    targets = torch.randint(V, (N,), device=device, generator=generator)
    scale = torch.tensor(1.0, device=device)
    losses = triton.cross_entropy_forward_backward(logits, targets, scale, V)
    alone = triton.cross_entropy_forward_backward(tail, targets[-64:].contiguous(), scale, V)
    assert torch.equal(losses[-64:], alone)
    assert torch.equal(logits[-64:], tail)


def test_attention_offsets_beyond_int32(triton: types.ModuleType, device: torch.device) -> None:
    """More than 2³¹ elements of qkv: the last sequence must come out as it does alone."""
    B, T, H, D = 90, 16_384, 8, 64
    if torch.cuda.mem_get_info()[0] < 4 * B * T * 3 * H * D * 2:
        pytest.skip("less than 20 GB of GPU memory are free")
    generator = torch.Generator(device).manual_seed(1)
    qkv = torch.zeros(B, T, 3 * H * D, dtype=torch.bfloat16, device=device)
    qkv[-1] = torch.randn(T, 3 * H * D, device=device, generator=generator).bfloat16()
    last = qkv[-1:].clone()
    out, statistics = triton.attention_forward(qkv, H)
    alone, statistics_alone = triton.attention_forward(last, H)
    assert torch.equal(out[-1:], alone)
    dqkv = triton.attention_backward(out, qkv, out, statistics, H)
    assert torch.equal(
        dqkv[-1:], triton.attention_backward(alone, last, alone, statistics_alone, H)
    )
