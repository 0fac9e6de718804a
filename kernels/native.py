"""The operations of `reference` through PyTorch's own fused primitives, without autograd.

PyTorch's fused operators come in pairs: a forward, and the backward function that autograd would
call. Here both are called directly. CPUs train with this backend, and it runs on any device. Names,
shapes and contracts are those of `reference`, which also has the formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mantrans.kernels import reference
from mantrans.kernels.reference import (
    CHUNK_ROWS,
    IGNORE_INDEX,
    attention_scale,
    check_window,
    document_starts,
    flat_rows,
    head_sizes,
    join_heads,
    merge_heads,
    partial_rows,
    rotary_sizes,
    split_heads,
    sum_in_parts,
    sum_partials,
    wide_dtype,
    widen,
    window_starts,
)

__all__ = ["document_starts", "partial_rows", "sum_partials", "window_starts"]

aten = torch.ops.aten

CACHED_ELEMENTS = 2**18  # of a float32 temporary: 1 MB, which fits into a CPU core's L2 cache
FEW_ROWS = 16
HAS_ONEDNN = torch.backends.mkldnn.is_available()

# ---------------------------------------------------------------------------------- embedding


def embedding_forward(
    tokens: Tensor, token_table: Tensor, position_table: Tensor | None = None
) -> Tensor:
    """See `reference.embedding_forward`."""
    x = aten.embedding(token_table, tokens)
    return x if position_table is None else x.add_(position_table[: tokens.shape[1]])


def embedding_backward(
    dx: Tensor, tokens: Tensor, dtoken_table: Tensor, dposition_table: Tensor | None = None
) -> None:
    """See `reference.embedding_backward`. Deterministic: on a CPU `index_add_` adds the rows in
    order, in float64 to those of the tokens that occur. On CUDA it does not, so
    `embedding_dense_backward` is used there: it sorts the tokens, but fills a whole table."""
    T, C = dx.shape[1:]
    if dx.is_cuda:
        wide = dx.to(dtoken_table.dtype)
        dtoken_table += aten.embedding_dense_backward(wide, tokens, len(dtoken_table), -1, False)
    else:
        wide = dx.double()
        used, row = torch.unique(tokens, return_inverse=True)
        sums = wide.new_zeros(len(used), C).index_add_(0, row.view(-1), wide.reshape(-1, C))
        dtoken_table.index_add_(0, used, sums.to(dtoken_table.dtype))
    if dposition_table is not None:
        dposition_table[:T] += wide.sum(0)


# ------------------------------------------------------------------------------------- linear


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `reference.linear_forward`. Few rows, as decoding has, take the time in which the weights
    are read: in float32 oneDNN reads large ones faster than MKL, which F.linear calls."""
    few = x.numel() <= FEW_ROWS * x.shape[-1] and weight.numel() >= CACHED_ELEMENTS
    if few and x.device.type == "cpu" and x.dtype == torch.float32 and HAS_ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.nn.functional.linear(x, weight, bias)


def linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    dweight: Tensor,
    dbias: Tensor | None = None,
    accumulate: bool = True,
) -> Tensor:
    """See `reference.linear_backward`."""
    dy_rows = flat_rows(dy)
    weight_gradient(dy_rows, flat_rows(x), dweight, accumulate)
    if dbias is not None:
        bias_gradient(dy_rows, dbias)
    return torch.mm(dy_rows, weight).view(x.shape)


def weight_gradient(dy: Tensor, x: Tensor, dweight: Tensor, accumulate: bool) -> None:
    """dW += dyᵀ x.   dy (N, M); x (N, K). Adds to dweight (M, K), or overwrites it.

    cuBLAS adds bfloat16 products directly to the float32 buffer. PyTorch has no such product on a
    CPU: there each product, itself summed in float32, is rounded to bfloat16 once and then added in
    float32, a few rows at a time, so that the float32 copy stays in the cache.
    """
    if x.dtype == dweight.dtype:
        dweight.addmm_(dy.T, x, beta=int(accumulate))  # beta 0 reads nothing
    elif x.is_cuda and accumulate:
        torch.addmm(dweight, dy.T, x, out_dtype=dweight.dtype, out=dweight)
    elif x.is_cuda:
        torch.mm(dy.T, x, out_dtype=dweight.dtype, out=dweight)
    else:
        rows = max(1, CACHED_ELEMENTS // max(1, x.shape[1]))
        for total, part in zip(dweight.split(rows), torch.mm(dy.T, x).split(rows), strict=True):
            total.add_(part) if accumulate else total.copy_(part)


def bias_gradient(dy: Tensor, dbias: Tensor) -> None:
    """See `reference.bias_gradient`. On a CPU the sum is rounded once, as in `weight_gradient`:
    summing bfloat16 in float32 would make a float32 copy of all of dy."""
    rounded_once = dy.device.type == "cpu" and dy.dtype == torch.bfloat16
    dtype = torch.bfloat16 if rounded_once else dbias.dtype
    dbias += dy.reshape(-1, dy.shape[-1]).sum(0, dtype=dtype)


# --------------------------------------------------------------------------------- layer norm


def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.layer_norm_forward`, which also computes what PyTorch's kernel does not."""
    wide_weight, wide_bias = _norm_weights(x, weight, bias)
    y, mean, rstd = aten.native_layer_norm(x, [x.shape[-1]], wide_weight, wide_bias, eps)
    mean, rstd = mean.view(-1), rstd.view(-1)
    if _rows_far_from_zero(mean, rstd):
        return reference.layer_norm_forward(x, weight, bias, eps)
    return y, mean, rstd


def add_layer_norm_forward(
    branch: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.add_layer_norm_forward`."""
    x = residual + branch
    y, mean, rstd = layer_norm_forward(x, weight, bias, eps)
    return y, x, mean, rstd


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dweight: Tensor,
    dbias: Tensor | None = None,
    dresidual: Tensor | None = None,
    dbranch_bias: Tensor | None = None,
) -> Tensor:
    """See `reference.layer_norm_backward`, which also computes what PyTorch's kernel does not."""
    if _rows_far_from_zero(mean, rstd):
        return reference.layer_norm_backward(
            dy, x, weight, mean, rstd, dweight, dbias, dresidual, dbranch_bias
        )
    # PyTorch's kernel also sums dweight and dbias, but in an order that depends on the threads.
    dy_rows, x_rows, wide = flat_rows(dy), flat_rows(x), rstd.dtype
    dx, gain = torch.empty_like(x_rows), weight.to(wide)
    for rows in _cached_rows(dx):
        upstream, part = dy_rows[rows].to(wide), x_rows[rows].to(wide)
        m, r = mean[rows, None].to(wide), rstd[rows, None]
        out, _, _ = aten.native_layer_norm_backward(
            upstream, part, part.shape[1:], m, r, gain, None, [True, False, False]
        )
        dweight += (part - m).mul_(r).mul_(upstream).sum(0)
        if dbias is not None:
            dbias += upstream.sum(0)
        dx[rows] = out if dresidual is None else out.add_(flat_rows(dresidual)[rows])
    if dbranch_bias is not None:
        bias_gradient(dx, dbranch_bias)
    return dx.view(x.shape)


# |μ| / σ up to which PyTorch's kernel is right to 1e-6 (it loses as many bits as there are in this
# quotient), and 1 / σ down to which its sum of squares stays finite in float32.
LARGEST_OFFSET = 16.0
SMALLEST_RSTD = 1e-16
FEW_NORMS = 64


def _rows_far_from_zero(mean: Tensor, rstd: Tensor) -> bool:
    """Whether some row is too far from zero, or too large, for PyTorch's layer norm. Only asked on
    a CPU: a GPU would have to wait for the answer."""
    if mean.is_cuda or not mean.numel():
        return False
    if len(mean) <= FEW_NORMS:  # of one token each: Python is faster than four operations
        rows = zip(mean.tolist(), rstd.tolist(), strict=True)
        return not all(abs(m * r) <= LARGEST_OFFSET and r >= SMALLEST_RSTD for m, r in rows)
    offset = torch.linalg.vector_norm(mean * rstd, torch.inf)  # NaN if one is
    return not (offset <= LARGEST_OFFSET and rstd.amin() >= SMALLEST_RSTD)


def _norm_weights(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """On a CPU mean and rstd get the dtype of the weights: float32 keeps their precision."""
    if x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16):
        return weight, bias
    return weight.float(), None if bias is None else bias.float()


# ----------------------------------------------------------------------------------- RMS norm


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.rms_norm_forward`, which also computes rows too large for float32 squares."""
    y, _, rstd = _rms_norm(x, None, weight, eps)
    return y, rstd


def add_rms_norm_forward(
    branch: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.add_rms_norm_forward`."""
    return _rms_norm(residual, branch, weight, eps)


def _rms_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, x and rstd; a branch is added to x first.

    PyTorch has one kernel for this on CUDA alone. These operations take a few rows at a time, so
    that on a CPU what one writes is still in the cache for the next.
    """
    rows_in, C = flat_rows(x), x.shape[-1]
    wide = wide_dtype(x.dtype)
    total = rows_in if branch is None else torch.empty_like(rows_in)
    y, rstd = torch.empty_like(rows_in), rows_in.new_empty(len(rows_in), dtype=wide)
    gain = weight.to(wide)
    for rows in _cached_rows(rows_in):
        if branch is not None:
            torch.add(rows_in[rows], flat_rows(branch)[rows], out=total[rows])
        part = total[rows].to(wide)
        mean_square = torch.linalg.vector_norm(part, dim=-1).square_().div_(C)
        root = mean_square.add(eps).rsqrt_()  # of an infinite square it is 0, which would hide that
        rstd[rows] = torch.where(mean_square < torch.inf, root, torch.nan)
        normed = y[rows] if y.dtype == wide else part
        torch.mul(part, rstd[rows, None], out=normed).mul_(gain)
        _write_part(y, rows, normed)
    y, total = y.view(x.shape), x if branch is None else total.view(x.shape)
    if _too_large_to_square(rstd):
        y, rstd = reference.rms_norm_forward(total, weight, eps)
    return y, total, rstd


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    dweight: Tensor,
    dresidual: Tensor | None = None,
    dbranch_bias: Tensor | None = None,
) -> Tensor:
    """See `reference.rms_norm_backward`."""
    if _too_large_to_square(rstd):
        return reference.rms_norm_backward(dy, x, weight, rstd, dweight, dresidual, dbranch_bias)
    dy_rows, x_rows, C = flat_rows(dy), flat_rows(x), x.shape[-1]
    dx, gain = torch.empty_like(x_rows), weight.to(rstd.dtype)
    for rows in _cached_rows(dx):
        upstream, r = dy_rows[rows].to(rstd.dtype), rstd[rows, None]
        x_hat = x_rows[rows] * r
        p = upstream * x_hat
        dweight += p.sum(0)
        mean_gx = torch.mv(p, gain).div_(C)[:, None]
        g = torch.mul(upstream, gain, out=p)
        out = torch.mul(g.addcmul_(x_hat, mean_gx, value=-1), r, out=_wide_part(dx, rows))
        if dresidual is not None:
            out += flat_rows(dresidual)[rows]
        _write_part(dx, rows, out)
    if dbranch_bias is not None:
        bias_gradient(dx, dbranch_bias)
    return dx.view(x.shape)


def _cached_rows(x: Tensor) -> Iterator[slice]:
    """Slices of the rows of x (N, C) whose float32 copies stay in a CPU's cache; a GPU has no use
    for them."""
    size = len(x) if x.is_cuda else CACHED_ELEMENTS // max(1, x.shape[1])
    return row_chunks(len(x), max(1, size))


def _wide_part(out: Tensor, rows: slice) -> Tensor:
    """Where to compute these rows of `out`: there, or in float32 if it is 16 bits wide."""
    part, wide = out[rows], wide_dtype(out.dtype)
    return part if part.dtype == wide else torch.empty_like(part, dtype=wide)


def _write_part(out: Tensor, rows: slice, part: Tensor) -> None:
    """Round what was computed in `_wide_part`, once."""
    if part.dtype != out.dtype:
        out[rows] = part


# --------------------------------------------------------------------- rotary position embedding


def rotary_forward(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    n_heads: int,
    n_kv_heads: int | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """See `reference.rotary_forward`. Written over qkv, in the layout of halves."""
    for part, angles in _pieces((qkv,), cos, sin, positions):
        turned, _ = rotary_heads(part[0], n_heads, n_kv_heads)
        turned.copy_(_turned(turned, *angles))
    return qkv


def rotary_backward(
    dqkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int | None = None
) -> Tensor:
    """See `reference.rotary_backward`. Written over dqkv."""
    return rotary_forward(dqkv, cos, -sin, n_heads, n_kv_heads)


def norm_rotary_forward(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    n_heads: int,
    n_kv_heads: int | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.norm_rotary_forward`, which also computes what float32 squares cannot.

    Gains are multiplied into the angles, of which there are as many for all heads."""
    B, T, width = qkv.shape
    H_kv, D = head_sizes(width, n_heads, n_kv_heads)
    rotated = torch.empty_like(qkv)
    wide = wide_dtype(qkv.dtype)
    rstd = torch.empty(B, T, n_heads + H_kv, dtype=wide, device=qkv.device)
    for part, angles in _pieces((qkv, rotated, rstd), cos, sin, positions):
        heads, v = rotary_heads(part[0], n_heads, H_kv)
        out, v_out = rotary_heads(part[1], n_heads, H_kv)
        v_out.copy_(v)
        heads = heads.to(wide)
        r = torch.linalg.vector_norm(heads, dim=-1).square_().div_(D).add_(eps).rsqrt_()
        part[2].copy_(r)
        heads = heads * r[..., None]
        for who, weight in _queries_and_keys(n_heads, q_weight, k_weight):
            gained = (angle * weight.to(wide) for angle in angles)
            out[:, :, who] = _turned(heads[:, :, who], *gained)
    if _too_large_to_square(rstd):
        return reference.norm_rotary_forward(
            qkv, q_weight, k_weight, cos, sin, eps, n_heads, n_kv_heads, positions
        )
    return rotated, rstd.flatten(0, 1)


def norm_rotary_backward(
    dqkv: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rstd: Tensor,
    cos: Tensor,
    sin: Tensor,
    dq_weight: Tensor,
    dk_weight: Tensor,
    n_heads: int,
    n_kv_heads: int | None = None,
) -> Tensor:
    """See `reference.norm_rotary_backward`. Written over dqkv."""
    B, T, _ = qkv.shape
    whole = (dqkv, qkv, rstd.unflatten(0, (B, T)))
    sums = torch.zeros(2, q_weight.shape[0], dtype=torch.float64, device=qkv.device)
    for part, angles in _pieces(whole, cos, sin, None):
        d_heads, _ = rotary_heads(part[0], n_heads, n_kv_heads)
        raw, _ = rotary_heads(part[1], n_heads, n_kv_heads)
        r = part[2][..., None]
        dy = _turned(d_heads, angles[0], -angles[1])  # of the normalized heads
        x_hat = raw * r
        weights = _queries_and_keys(n_heads, q_weight, k_weight)
        for total, (who, weight) in zip(sums, weights, strict=True):
            total += (dy[:, :, who] * x_hat[:, :, who]).sum((0, 1, 2))
            dy[:, :, who] *= weight.to(dy.dtype)
        mean = (dy * x_hat).mean(-1, keepdim=True)
        d_heads.copy_(dy.addcmul_(x_hat, mean, value=-1).mul_(r))
    dq_weight += sums[0]
    dk_weight += sums[1]
    return dqkv


def rotary_heads(qkv: Tensor, n_heads: int, n_kv_heads: int | None) -> tuple[Tensor, Tensor]:
    """Views of the heads that are rotated, (B, T, H + H_kv, D), and of those of v."""
    H_kv, D = rotary_sizes(qkv.shape[-1], n_heads, n_kv_heads)
    turned, rest = qkv.unflatten(-1, (-1, D)).split((n_heads + H_kv, H_kv), dim=2)
    return turned, rest


def _queries_and_keys(n_heads: int, of_q: Tensor, of_k: Tensor) -> tuple[tuple[slice, Tensor], ...]:
    """The rotated heads that are queries, and those that are keys, each with its vector."""
    return (slice(0, n_heads), of_q), (slice(n_heads, None), of_k)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`reference.rotate` of heads x (..., D) as a new tensor, in cos's dtype. cos and sin are (...,
    D): each half of a head is multiplied by its own. Whole heads are read where that can be:
    PyTorch goes through a half's few elements in a loop of their own."""
    x = x.to(cos.dtype)
    y = x * cos
    (x1, x2), (y1, y2), (sin1, sin2) = (z.chunk(2, dim=-1) for z in (x, y, sin))
    y1.addcmul_(x2, sin2, value=-1)
    y2.addcmul_(x1, sin1)
    return y


def _pieces(
    tensors: tuple[Tensor, ...], cos: Tensor, sin: Tensor, positions: Tensor | None
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Tensors (B, T, ...) a few positions at a time, so that a CPU's temporaries stay in its cache,
    with cos and sin of these positions for both halves, (rows, 1, D) or (B, rows, 1, D)."""
    B, T, width = tensors[0].shape
    rows = T if cos.is_cuda else max(1, CACHED_ELEMENTS // max(1, B * width))
    for begin in range(0, T, rows):
        piece = slice(begin, min(begin + rows, T))
        at = piece if positions is None else positions[:, piece]
        both = (torch.cat((table[at],) * 2, -1).unsqueeze(-2) for table in (cos, sin))
        yield tuple(x[:, piece] for x in tensors), tuple(both)


def _too_large_to_square(rstd: Tensor) -> bool:
    """Whether some squares of an RMS norm may be too large for float32, or too small. Only asked on
    a CPU: a GPU would have to wait for the answer."""
    if rstd.is_cuda or not rstd.numel():
        return False
    smallest, largest = rstd.aminmax()  # NaN if one is
    return not (smallest >= SMALLEST_RSTD and largest <= 1 / SMALLEST_RSTD)


# ---------------------------------------------------------------------------------- attention

# Query rows worked on at a time: none of them looks at a key that the block's last row cannot see.
QUERY_BLOCK = 256
DOCUMENT_BLOCK = 128  # with documents or a window: fewer keys that no row of the block can see
LONGEST_BATCHED = 1024


def attention_forward(
    qkv: Tensor,
    n_heads: int,
    document_start: Tensor | None = None,
    n_kv_heads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.attention_forward`. Its statistics: lse (B, H, T) = log Σ_j exp(score_ij) of
    PyTorch's kernel, or nothing (0,) after batched products, which the backward repeats."""
    qkv = _dense(qkv)
    heads = split_heads(qkv, n_heads, n_kv_heads)
    if not qkv.numel():
        return merge_heads(heads[0]), qkv.new_empty(0)
    if _flash_forward(qkv):
        out, lse = _flash(heads, document_start)
        return merge_heads(out), lse
    q, k, v = _stack_heads(*heads)
    out = torch.empty_like(q)
    for rows, keys in _query_blocks(qkv.shape[1], document_start):
        p = _probabilities(q, k, rows, keys, n_heads, document_start)
        torch.bmm(p, v[:, keys], out=out[:, rows])
    return merge_heads(out.unflatten(0, (-1, n_heads))), qkv.new_empty(0)


def empty_statistics(qkv: Tensor, n_heads: int, n_kv_heads: int | None = None) -> Tensor:
    """Unwritten statistics as `attention_forward` gives for qkv, contiguous."""
    B, T, _ = qkv.shape
    if not qkv.numel() or not _flash_forward(qkv):
        return qkv.new_empty(0)
    return qkv.new_empty(B, n_heads, T, dtype=wide_dtype(qkv.dtype))


def attention_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    statistics: Tensor,
    n_heads: int,
    document_start: Tensor | None = None,
    n_kv_heads: int | None = None,
) -> Tensor:
    """See `reference.attention_backward`."""
    if not qkv.numel():
        return torch.empty_like(qkv)
    dout, qkv, out = _dense(dout), _dense(qkv), _dense(out)
    if statistics.numel() and not _lse_is_exact(statistics):
        # the forward's scores were float32, whatever the dtype of qkv
        wide = wide_dtype(qkv.dtype)
        dqkv = _batched_backward(dout.to(wide), qkv.to(wide), n_heads, document_start, n_kv_heads)
        return dqkv.to(qkv.dtype)
    if not _flash_backward(qkv, statistics):
        return _batched_backward(dout, qkv, n_heads, document_start, n_kv_heads)
    B, T, _ = out.shape
    heads = split_heads(qkv, n_heads, n_kv_heads)
    do, o = (x.view(B, T, n_heads, -1).transpose(1, 2) for x in (dout, out))
    gradients = _flash_gradients(do, heads, o, statistics, document_start)
    return join_heads(gradients, n_kv_heads).to(qkv.dtype)


def _flash(
    heads: tuple[Tensor, Tensor, Tensor], document_start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out (B, H, T, D) and lse (B, H, T) by PyTorch's blocked CPU kernel. Its own blocks skip what
    lies right of the diagonal, but with a mask nothing: then blocks of queries are given to it."""
    kernel = aten._scaled_dot_product_flash_attention_for_cpu
    if document_start is None:
        return kernel(*heads, 0.0, True)
    q, k, v = heads
    parts = []
    for rows, keys in _query_blocks(q.shape[2], document_start):
        mask = _additive_mask(rows, keys, document_start, q)[:, None]
        some = q[:, :, rows], k[:, :, keys], v[:, :, keys]
        parts.append(kernel(*some, 0.0, False, attn_mask=mask))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _flash_gradients(
    do: Tensor,
    heads: tuple[Tensor, Tensor, Tensor],
    o: Tensor,
    lse: Tensor,
    document_start: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv by the backward of that kernel, in blocks as there. dk and dv of several blocks
    are added up in float32."""
    kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward
    if document_start is None:
        return kernel(do, *heads, o, lse, 0.0, True)
    q, k, v = heads
    dq, dk, dv = (torch.zeros_like(x, dtype=wide_dtype(x.dtype)) for x in heads)
    for rows, keys in _query_blocks(q.shape[2], document_start):
        mask = _additive_mask(rows, keys, document_start, q)[:, None]
        some = q[:, :, rows], k[:, :, keys], v[:, :, keys], o[:, :, rows], lse[..., rows]
        parts = kernel(do[:, :, rows], *some, 0.0, False, attn_mask=mask)
        dq[:, :, rows], part_k, part_v = parts
        dk[:, :, keys] += part_k
        dv[:, :, keys] += part_v
    return dq, dk, dv


def _batched_backward(
    dout: Tensor, qkv: Tensor, n_heads: int, document_start: Tensor | None, n_kv_heads: int | None
) -> Tensor:
    """The gradient by batched products over blocks of queries, with the forward's softmax again."""
    B, T, _ = dout.shape
    q, k, v = _stack_heads(*split_heads(qkv, n_heads, n_kv_heads))
    (do,) = _stack_heads(dout.view(B, T, n_heads, -1).transpose(1, 2))
    scale = attention_scale(q)
    dq, dk, dv = dqkv = q.new_empty(3, *q.shape)
    written = T  # where the keys begin to which a block has written
    for rows, keys in reversed(list(_query_blocks(T, document_start))):
        beta = 0 if rows.stop == T else 1  # the last rows write to all the keys they see
        dk[:, keys.start : written * beta] = dv[:, keys.start : written * beta] = 0
        written = keys.start
        p = _probabilities(q, k, rows, keys, n_heads, document_start)
        dv[:, keys].baddbmm_(p.mT, do[:, rows], beta=beta)
        dp = torch.bmm(do[:, rows], v[:, keys].mT)
        ds = aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp)
        dq[:, rows].baddbmm_(ds, k[:, keys], beta=0, alpha=scale)
        dk[:, keys].baddbmm_(ds.mT, q[:, rows], beta=beta, alpha=scale)
    return join_heads(dqkv.unflatten(1, (B, n_heads)), n_kv_heads)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    n_heads: int,
    n_kv_heads: int | None = None,
    window: int | None = None,
) -> Tensor:
    """See `reference.decode_attention`. On a CPU by PyTorch's blocked kernel, in float32 where that
    kernel is slow in q's dtype, a few rows at a time, so that the copies stay in the cache."""
    if q.device.type != "cpu" or not q.numel():
        return reference.decode_attention(q, k_cache, v_cache, lengths, n_heads, n_kv_heads, window)
    check_window(window)
    longest, width = int(lengths.max()), k_cache.shape[2]
    if window is not None and window < longest:
        k_cache, v_cache = (_last_positions(x, lengths, window) for x in (k_cache, v_cache))
        lengths, longest = lengths.clamp(max=window), window
    dtype = q.dtype if _flash_forward(q) else wide_dtype(q.dtype)
    H_kv, _ = head_sizes(q.shape[1] + 2 * width, n_heads, n_kv_heads)
    rows = len(q) if dtype == q.dtype else max(1, CACHED_ELEMENTS // (longest * width))
    whole = (q, k_cache, v_cache, lengths)
    if rows >= len(q):
        return _decode_rows(whole, H_kv, dtype)
    parts = (x.split(rows) for x in whole)
    outs = [_decode_rows(part, H_kv, dtype) for part in zip(*parts, strict=True)]
    return torch.cat(outs)


def _last_positions(cache: Tensor, lengths: Tensor, window: int) -> Tensor:
    """The last `window` of each row's positions, or its first ones where it has fewer: (B, window,
    width), a view of the cache (B, T_max, width) if all rows are of one length."""
    first = (lengths - window).clamp(min=0)
    begin, last = (int(n) for n in first.aminmax())
    if begin == last:
        return cache[:, begin : begin + window]
    positions = first[:, None] + torch.arange(window)
    return cache[torch.arange(len(cache))[:, None], positions]


def _decode_rows(part: tuple[Tensor, ...], H_kv: int, dtype: torch.dtype) -> Tensor:
    """`decode_attention` of (q, k_cache, v_cache, lengths), computed in `dtype`.

    PyTorch's kernel multiplies by 0 what lies beyond a shorter row, which was never written and may
    be NaN: that is set to 0 first, in the caches themselves if they need no copy.
    """
    q, k_cache, v_cache, lengths = part
    shortest, longest = (int(n) for n in lengths.aminmax())
    k, v = (_dense(x[:, :longest].to(dtype)) for x in (k_cache, v_cache))
    mask = None
    if shortest < longest:
        row, beyond = (torch.arange(longest) >= lengths[:, None]).nonzero(as_tuple=True)
        k[row, beyond] = v[row, beyond] = 0
        mask = q.new_zeros(len(q), 1, 1, longest, dtype=dtype)
        mask[row, 0, 0, beyond] = -torch.inf
    k, v = (x.unflatten(2, (H_kv, -1)).transpose(1, 2) for x in (k, v))
    group = _dense(q.to(dtype)).view(len(q), H_kv, -1, k.shape[3])  # of the queries that share keys
    out, _ = aten._scaled_dot_product_flash_attention_for_cpu(
        group, k, v, 0.0, False, attn_mask=mask
    )
    return out.reshape(q.shape).to(q.dtype)


def _dense(x: Tensor) -> Tensor:
    """x with a last stride of 1, which PyTorch's blocked CPU kernel takes for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _flash_forward(qkv: Tensor) -> bool:
    """Whether PyTorch's blocked CPU kernel goes forward, and not the batched products below, which
    serve every other device. In bfloat16 it needs AMX: with it it was measured 1.7 to 4 times as
    fast as they are, without it a third as fast."""
    if qkv.device.type != "cpu" or qkv.dtype == torch.float16:
        return False
    return qkv.dtype != torch.bfloat16 or torch.cpu._is_amx_tile_supported()


def _flash_backward(qkv: Tensor, lse: Tensor) -> bool:
    """Whether its backward, which reads the forward's lse, is the faster one too: in bfloat16 only
    beyond LONGEST_BATCHED positions."""
    short = qkv.shape[1] <= LONGEST_BATCHED and qkv.dtype == torch.bfloat16
    return bool(lse.numel()) and not short


# |lse| up to which exp(score - lse) is right to 1e-5: the rounding of lse is all of its error.
LARGEST_LSE = 128.0


def _lse_is_exact(lse: Tensor) -> bool:
    """Whether PyTorch's backward gets the forward's probabilities back. (On a CPU, as that is.)"""
    return bool(torch.linalg.vector_norm(lse, torch.inf) <= LARGEST_LSE)


def _additive_mask(rows: slice, keys: slice, document_start: Tensor | None, like: Tensor) -> Tensor:
    """0 where a key may be seen and -inf elsewhere, in the dtype of `like`: (rows, keys), or (B,
    rows, keys) with documents."""
    position = torch.arange(keys.stop, device=like.device)
    key = position[keys]
    seen = key <= position[rows, None]
    if document_start is not None:
        seen = seen & (key >= document_start[:, rows, None])
    return torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, -torch.inf)


def _stack_heads(*heads: Tensor) -> Tensor:
    """n of (B, H, T, D) -> (n, BH, T, D), contiguous."""
    return torch.stack(heads).flatten(1, 2)


def _query_blocks(T: int, document_start: Tensor | None) -> Iterator[tuple[slice, slice]]:
    """Query rows, a block at a time, and the keys that some row of the block may see: from where
    the document of its first row begins, of all sequences the earliest. (On a GPU from 0: it would
    have to wait for the answer.)"""
    size = QUERY_BLOCK if document_start is None else DOCUMENT_BLOCK
    # No single row at the end: PyTorch's kernel would share its keys among the threads.
    blocks = range(0, max(1, T - 1), size)
    firsts = [0] * len(blocks)
    if document_start is not None and not document_start.is_cuda:
        firsts = document_start[:, : blocks.stop : size].amin(0).clamp(min=0).tolist()
    for start, first in zip(blocks, firsts, strict=True):
        stop = start + size if start + size < T - 1 else T
        yield slice(start, stop), slice(first, stop)


def _probabilities(
    q: Tensor,
    k: Tensor,
    rows: slice,
    keys: slice,
    n_heads: int,
    document_start: Tensor | None,
) -> Tensor:
    """softmax(q kᵀ / √D + mask) for a block of query rows: (BH, rows, keys), in q's dtype.

    In bfloat16 the scores are rounded before the softmax, which PyTorch's batched product on a CPU
    cannot avoid; large ones are computed again in float32. The softmax itself is float32 always.
    """
    mask = _additive_mask(rows, keys, document_start, q)
    if document_start is not None:
        mask = mask.repeat_interleave(n_heads, 0)
    q, k, scale = q[:, rows], k[:, keys].mT, attention_scale(q)
    scores = torch.baddbmm(mask, q, k, alpha=scale)
    p = scores
    if _too_large_to_round(scores):
        scores = torch.baddbmm(mask.float(), q.float(), k.float(), alpha=scale)
    return p.copy_(aten._softmax.out(scores, -1, False, out=scores))


# |score| up to which rounding it to bfloat16 changes a probability by 2^-5 at most. With scores in
# float32 attention takes half its time again.
LARGEST_ROUNDED_SCORE = 16.0


def _too_large_to_round(scores: Tensor) -> bool:
    """Whether the largest score of some row, in 16 bits, may be too large for that, of either sign.
    It is not below the score of the row's own position. Only asked on a CPU: a GPU would have to
    wait for the answer."""
    if scores.is_cuda or scores.element_size() > 2:
        return False
    own = scores[..., -scores.shape[1] :].diagonal(dim1=1, dim2=2)  # the block's are its last keys
    largest = torch.aminmax(scores).max  # faster than amax
    return bool(largest.maximum(-own.amin()) > LARGEST_ROUNDED_SCORE)


# ---------------------------------------------------------------------------------- bias + GELU


def bias_gelu_forward(h: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `reference.bias_gelu_forward`. ½ (1 + tanh z) = σ(2 z): one exponential takes half the
    time of PyTorch's own GELU, and keeps the digits of small results."""
    x = (h if bias is None else h + bias).contiguous()
    y = torch.empty_like(x) if bias is None else x
    rate = x.new_tensor(2 * reference.GELU_SCALE, dtype=wide_dtype(x.dtype))
    size = max(1, x.numel() if x.is_cuda else CACHED_ELEMENTS)
    memory = rate.new_empty(min(size, x.numel()))  # of all parts: fresh memory is in no cache
    for part, out in zip(x.view(-1).split(size), y.view(-1).split(size), strict=True):
        u, s = part.to(rate.dtype), memory[: len(part)]
        torch.addcmul(rate, u, u, value=2 * reference.GELU_SCALE * reference.GELU_CUBIC, out=s)
        for share in _even_shares(s.mul_(u), SHARE):
            share.sigmoid_()
        torch.mul(u, s, out=out)
    return y


def bias_gelu_backward(
    dy: Tensor, h: Tensor, bias: Tensor | None = None, dbias: Tensor | None = None
) -> Tensor:
    """See `reference.bias_gelu_backward`."""
    x = (h if bias is None else h + bias).contiguous()
    dh = x if bias is not None and dy.dtype == x.dtype else torch.empty_like(x)
    shares = (_even_shares(z) for z in (dy.contiguous(), x, dh))
    for upstream, part, out in zip(*shares, strict=True):
        aten.gelu_backward.grad_input(upstream, part, approximate="tanh", grad_input=out)
    if dbias is not None:
        bias_gradient(dh, dbias)
    return dh


SHARE = 2**15  # elements for which PyTorch's loops take another thread
VECTORS = 64  # elements: of every dtype a multiple of what PyTorch's loops take at a time


def _even_shares(x: Tensor, least: int = 0) -> tuple[Tensor, Tensor]:
    """x (...), flat, in two parts: one of which each thread gets whole vectors, and the rest.

    What a thread's share has beyond whole vectors is computed an element at a time, with another
    exp. Without this the last bits would depend on the number of threads.
    least: elements for which PyTorch takes another thread; 0: it takes all, as for GELU.
    """
    flat, shares = x.view(-1), 1 if x.is_cuda else torch.get_num_threads()
    if least:
        shares = min(shares, -(-len(flat) // least))
    unit = VECTORS * max(1, shares)
    whole = max(len(flat) // unit * unit, (shares - 1) * least)
    return flat[:whole], flat[whole:]


# -------------------------------------------------------------------------------------- SwiGLU


def swiglu_forward(h: Tensor) -> Tensor:
    """See `reference.swiglu_forward`. A few rows at a time, as in `_rms_norm`."""
    packed, F = flat_rows(h), h.shape[-1] // 2
    y, wide = packed.new_empty(len(packed), F), wide_dtype(h.dtype)
    for rows in _cached_rows(y):
        gate, up = packed[rows].to(wide).chunk(2, dim=-1)
        out = _wide_part(y, rows).copy_(gate)
        for part in _even_shares(out, SHARE):
            aten.silu_(part)
        _write_part(y, rows, out.mul_(up))
    return y.view(*h.shape[:-1], F)


def swiglu_backward(dy: Tensor, h: Tensor) -> Tensor:
    """See `reference.swiglu_backward`. With a = g s, the slope s (1 + g (1 - s)) is a + s (1 - a):
    the point between a and 1 that `lerp` finds. One sigmoid serves both gradients, which are
    written over gate and up: in dh itself, or in float32 memory that all parts share, because fresh
    memory is in no cache."""
    packed, dy_rows, wide = flat_rows(h), flat_rows(dy), wide_dtype(h.dtype)
    dh, one, is_wide = torch.empty_like(packed), packed.new_ones((), dtype=wide), h.dtype == wide
    parts = list(_cached_rows(dy_rows))
    size = parts[0].stop if parts else 0
    x_memory = packed.new_empty(size, packed.shape[1], dtype=wide)
    dy_memory, s_memory = packed.new_empty(2, size, dy_rows.shape[1], dtype=wide)
    for rows in parts:
        here = slice(rows.stop - rows.start)
        x = (dh[rows] if is_wide else x_memory[here]).copy_(packed[rows])
        upstream = dy_rows[rows] if is_wide else dy_memory[here].copy_(dy_rows[rows])
        gate, up = x.chunk(2, dim=-1)
        s = s_memory[here].copy_(gate)
        for part in _even_shares(s, SHARE):
            part.sigmoid_()
        a = gate.mul_(s)
        slope_up = torch.lerp(a, one, s, out=s).mul_(up)
        torch.mul(a, upstream, out=up)  # du
        torch.mul(slope_up, upstream, out=gate)  # dg; dy u alone could be infinite
        _write_part(dh, rows, x)
    return dh.view(h.shape)


# -------------------------------------------------------------------- softmax cross-entropy


def cross_entropy_forward(
    logits: Tensor, targets: Tensor, vocab_size: int, ignore_index: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor]:
    """See `reference.cross_entropy_forward`."""
    z = logits[:, :vocab_size].to(wide_dtype(logits.dtype))
    counted = targets != ignore_index
    row = _softmax_of_others(z, targets.where(counted, 0)[:, None], torch.empty_like(z))
    return torch.where(counted, row.losses, 0), row.normalizer


def cross_entropy_backward(
    logits: Tensor,
    targets: Tensor,
    normalizer: Tensor,
    scale: Tensor,
    vocab_size: int,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """See `reference.cross_entropy_backward`."""
    counted = targets != ignore_index
    target = targets.where(counted, 0)[:, None]
    largest, others = normalizer.split(1, dim=1)
    e = (logits[:, :vocab_size] - largest).exp_()
    factor = scale / (others + e.gather(1, target))
    return _write_gradient(logits, e, target, others, factor, counted)


def cross_entropy_forward_backward(
    logits: Tensor,
    targets: Tensor,
    scale: Tensor,
    vocab_size: int,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """See `reference.cross_entropy_forward_backward`. The probabilities are computed once, a few
    rows at a time, in the logits' memory if that is wide."""
    losses = torch.empty(len(logits), dtype=wide_dtype(logits.dtype), device=logits.device)
    counted = targets != ignore_index
    target = targets.where(counted, 0)[:, None]
    for rows in row_chunks(len(logits), softmax_rows(logits.shape[1])):
        z = logits[rows].to(losses.dtype)
        z[:, vocab_size:] = -torch.inf
        row = _softmax_of_others(z, target[rows], z)
        losses[rows] = row.losses
        _write_gradient(logits[rows], row.p, target[rows], row.rest, scale, counted[rows])
    logits[:, vocab_size:] = 0  # NaN in a row of NaN
    return losses.masked_fill_(~counted, 0)


class _Softmax(NamedTuple):
    """Rows of a softmax without the target's column, and what follows from them."""

    p: Tensor  # (N, V) softmax, 0 in the target's column
    rest: Tensor  # (N, 1) Σ p
    losses: Tensor  # (N,)
    normalizer: Tensor  # (N, 2) as `reference.cross_entropy_forward` describes it


def _softmax_of_others(z: Tensor, target: Tensor, out: Tensor) -> _Softmax:
    """The softmax of z (N, V), in `out`, which may be z. target (N, 1) lies inside the vocabulary.

    The largest probability is 1 / Σ exp(z - max z), the unit of all others.
    """
    largest, picked = z.amax(-1, keepdim=True), z.gather(1, target)
    p = aten._softmax.out(z, -1, False, out=out)
    unit = p.amax(-1, keepdim=True)
    e_target = torch.where(picked == largest, 1, p.gather(1, target) / unit)
    rest = p.scatter_(1, target, 0).sum(-1, keepdim=True)
    others = rest / unit
    losses = (largest - picked) + torch.log1p(others - (1 - e_target))
    return _Softmax(p, rest, losses[:, 0], torch.cat([largest, others], 1))


def _write_gradient(
    logits: Tensor, p: Tensor, target: Tensor, rest: Tensor, factor: Tensor, counted: Tensor
) -> Tensor:
    """Overwrite the logits (N, Vp) with p · factor, and the target's column with -rest · factor.

    p (N, V or Vp) is overwritten too, and may be the logits' memory; target, rest (N, 1); factor
    0-d or (N, 1); counted (N,).
    """
    V = p.shape[1]
    p.scatter_(1, target, -rest).mul_(factor)
    if p.data_ptr() != logits.data_ptr():
        logits[:, :V] = p
    logits[:, V:] = 0
    return clear_rows(logits, ~counted)


def clear_rows(x: Tensor, which: Tensor) -> Tensor:
    """Set rows of x (N, ...) to 0 where `which` (N,), whatever they hold: 0 · NaN is not 0.

    On a CPU by index, because a mask takes as long as a softmax. A GPU is not asked how many.
    """
    if x.is_cuda:
        return x.masked_fill_(which[:, None], 0)
    return x.index_fill_(0, which.nonzero()[:, 0], 0)


# ---------------------------------------------------------- output projection + cross-entropy

# Float32 probabilities at a time: several passes read them, and 4 MB fit into a CPU's cache.
SOFTMAX_ELEMENTS = 2**20


def softmax_rows(n_columns: int) -> int:
    """The number of rows of logits in one softmax."""
    return max(16, SOFTMAX_ELEMENTS // n_columns)


def row_chunks(n_rows: int, size: int) -> Iterator[slice]:
    """Slices of `size` rows, the last one shorter, that cover n_rows."""
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


def linear_cross_entropy_forward(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int
) -> Tensor:
    """See `reference.linear_cross_entropy_forward`."""
    losses = torch.empty(len(x), dtype=wide_dtype(x.dtype), device=x.device)
    for rows in row_chunks(len(x), CHUNK_ROWS):
        logits = torch.mm(x[rows], weight.T)
        parts = zip(
            *(y.split(softmax_rows(len(weight))) for y in (logits, targets[rows])), strict=True
        )
        losses[rows] = torch.cat([cross_entropy_forward(z, t, vocab_size)[0] for z, t in parts])
    return losses


def linear_cross_entropy_forward_backward(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor,
    dweight: Tensor,
    vocab_size: int,
    accumulate: bool = True,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.linear_cross_entropy_forward_backward`. Each chunk adds a whole (Vp, C) to
    dweight, so chunks are long; the softmax inside works on fewer rows at a time.
    dx begins as x without its ignored rows; each chunk overwrites what it has used up."""
    losses = torch.empty(len(x), dtype=wide_dtype(x.dtype), device=x.device)
    dx = clear_rows(x.clone(), targets == IGNORE_INDEX)
    size = chunk_rows or CHUNK_ROWS
    workspace = x.new_empty(min(len(x), size), len(weight))
    for rows in row_chunks(len(x), size):
        logits = torch.mm(dx[rows], weight.T, out=workspace[: rows.stop - rows.start])
        losses[rows] = cross_entropy_forward_backward(logits, targets[rows], scale, vocab_size)
        weight_gradient(logits, dx[rows], dweight, accumulate)
        torch.mm(logits, weight, out=dx[rows])
        accumulate = True
    if not accumulate:  # there was no row
        dweight.zero_()
    return sum_in_parts(losses) * scale, dx


# ------------------------------------------------------------------------------- optimization


SHORT = 256  # squares that a CPU adds in float32, a few at a time in each lane
SMALLEST_NORM = 1e-15  # above it no square that counts was too small for float32


def gradient_norms(gradients: Tensor, pieces: int) -> Tensor:
    """See `reference.gradient_norms`. A piece's norm has the same bits whatever lies beside it.

    On a CPU it is the norm of the norms of its short parts: PyTorch's own adds up millions of
    squares in float32, and is 1% low at GPT-2's size. On a GPU the `foreach` norm, which divides
    work tensor by tensor.
    """
    g = gradients.view(pieces, len(gradients) // pieces)
    if gradients.is_cuda:
        return torch.stack(torch._foreach_norm(g.unbind(), 2, torch.float64))
    n_short = g.shape[1] // SHORT
    parts = torch.linalg.vector_norm(g[:, : n_short * SHORT].view(pieces, n_short, SHORT), dim=2)
    rest = torch.linalg.vector_norm(g[:, n_short * SHORT :], dim=1)
    norms = torch.linalg.vector_norm(
        torch.cat([parts, rest[:, None]], 1), dim=1, dtype=torch.float64
    )
    doubtful = ~((norms > SMALLEST_NORM) & (norms < torch.inf))
    for i in doubtful.nonzero()[:, 0].tolist():
        if g[i].any():
            scaled = [reference.gradient_norms(part, 1) for part in g[i].split(CACHED_ELEMENTS)]
            norms[i] = reference.gradient_norms(torch.cat(scaled), 1)[0]
    return norms


CLIPPED_ELEMENTS = 2**24  # of gradients at a time on a GPU: few launches, in 64 MB


def sgd_update(
    weights: Tensor,
    master: Tensor | None,
    gradients: Tensor,
    learning_rate: Tensor,
    clip: Tensor,
    finite: Tensor,
    weight_decay: float,
    rounding_seed: Tensor | None = None,
    offset: int = 0,
) -> None:
    """See `reference.sgd_update`."""
    if rounding_seed is not None:
        reference.sgd_update(
            weights,
            master,
            gradients,
            learning_rate,
            clip,
            finite,
            weight_decay,
            rounding_seed,
            offset,
        )
        return
    w = weights if master is None else master
    for part, gradient, skip in _clipped(gradients, clip, finite):
        torch._fused_sgd_(
            [w[part]],
            [gradient],
            [],
            weight_decay=weight_decay,
            momentum=0.0,
            lr=learning_rate,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            found_inf=skip,
        )
    if master is not None:
        _round_from(master, weights, finite)


def adamw_update(
    weights: Tensor,
    master: Tensor | None,
    gradients: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    learning_rate: Tensor,
    clip: Tensor,
    finite: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rounding_seed: Tensor | None = None,
    offset: int = 0,
) -> None:
    """See `reference.adamw_update`."""
    if rounding_seed is not None:
        reference.adamw_update(
            weights,
            master,
            gradients,
            exp_avg,
            exp_avg_sq,
            step,
            learning_rate,
            clip,
            finite,
            beta1,
            beta2,
            eps,
            weight_decay,
            rounding_seed,
            offset,
        )
        return
    w = weights if master is None else master
    for part, gradient, skip in _clipped(gradients, clip, finite):
        torch._fused_adamw_(
            [w[part]],
            [gradient],
            [exp_avg[part]],
            [exp_avg_sq[part]],
            [],
            [step],
            lr=learning_rate,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
            found_inf=skip,
        )
    if master is not None:
        _round_from(master, weights, finite)


def nesterov_momentum(
    exp_avg: Tensor,
    gradients: Tensor,
    clip: Tensor,
    finite: Tensor,
    beta: float,
    update: Tensor,
) -> None:
    """See `reference.nesterov_momentum`."""
    for part, gradient, _ in _clipped(gradients, clip, finite):
        m = exp_avg[part]
        if m.is_cuda:  # reading `finite` on the host would wait for the device
            new = torch.lerp(m, gradient, 1 - beta)
            m.copy_(torch.where(finite, new, m))
            m = new
        else:
            m.lerp_(gradient, 1 - beta)
        update[part].copy_(gradient.lerp_(m, beta))


def orthogonalize(matrices: Tensor, scale: float) -> None:
    """See `reference.orthogonalize`. Batched products in the matrices' own dtype, which sum in
    float32; the last one scales, so that the result is rounded once."""
    a, b, c = reference.NEWTON_SCHULZ
    x = reference.unit_matrices(reference.wide_matrices(matrices))
    for step in range(1, reference.NEWTON_SCHULZ_STEPS + 1):
        s = scale if step == reference.NEWTON_SCHULZ_STEPS else 1.0
        gram = torch.bmm(x, x.mT)
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=s * a, alpha=s)
    reference.wide_matrices(matrices).copy_(x)


def _round_from(master: Tensor, weights: Tensor, finite: Tensor) -> None:
    """weights = master in the weights' dtype, unless the step was refused."""
    if weights.is_cuda:  # reading `finite` on the host would wait for the device
        weights.copy_(torch.where(finite, master.to(weights.dtype), weights))
    elif finite:
        weights.copy_(master)


def _clipped(
    gradients: Tensor, clip: Tensor, finite: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Parts of the flat buffer, each with a clipped copy of its gradients in one small memory, in
    the wide dtype: PyTorch's fused optimizers would write the clipped ones over the gradients. The
    last is what makes them skip the step on a GPU; on a CPU there is nothing to update then."""
    on_gpu = gradients.is_cuda
    if not on_gpu and not finite:
        return
    size = CLIPPED_ELEMENTS if on_gpu else CACHED_ELEMENTS
    memory = gradients.new_empty(min(len(gradients), size), dtype=wide_dtype(gradients.dtype))
    skip = (~finite).float() if on_gpu else None
    for part in row_chunks(len(gradients), size):
        here = memory[: part.stop - part.start]
        yield part, torch.mul(widen(gradients[part]), clip, out=here), skip
