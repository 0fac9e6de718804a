"""The mathematics of the whole model, in plain torch: each forward, and below it its backward.

This file is the oracle of every test and is written to be read: one textbook expression after the
other, without fusion; the only in-place operation is the accumulation of gradients. `native` and
`triton` have the same functions under the same names and are compared with these.

The contract of every backward:
  * the gradient of an activation is returned as a new tensor, in the activation's dtype;
  * the gradient of a weight is *added* to the buffer that is passed in (dweight, dbias, ...), so
    that tied weights and micro-batches need no further code. These buffers are float32 (float64
    for a float64 model), whatever the dtype of the weights.

The contract of every update: weights, master and moments change in place, gradients are only read.

Everything is computed in float32, or in float64 for float64 inputs, and rounded once at the end.
Sums whose length grows with the batch or the model are float64: added one after the other in
float32, the gradients of 65,536 equal tokens are off by 6e-4. Norms are float64 too: no row is too
far from zero for them.

Without rows (B = 0 or T = 0) every operation, in every backend, returns tensors without rows and
adds nothing to gradients; the loss of no row is 0. `CustomTransformerWrapper` refuses such a batch.

Alphabet: B batch, T sequence, C model width, H heads (H_kv of keys and of values), D head width,
F feed-forward width, V vocabulary (Vp: padded with rows that no token uses), N = B*T rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

IGNORE_INDEX = -100  # the label of a position that has no target, as in PyTorch and transformers
VOCABULARY_MULTIPLE = 128  # matrix products are faster with dimensions that are multiples of a tile


def padded_vocabulary(V: int) -> int:
    """Vp: the rows in the table of a vocabulary of V tokens; those after the first V are zero."""
    return -(-V // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over tensors of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(x: Tensor) -> Tensor:
    """`x` in the dtype in which it is summed."""
    return x.to(wide_dtype(x.dtype))


SUMMED_AT_ONCE = 2**14


def sum_in_parts(x: Tensor) -> Tensor:
    """Σ x (N,), 0-d, in parts that PyTorch adds with one thread each: the order in which it adds
    more than 2^15 numbers depends on the number of threads."""
    return torch.stack([part.sum() for part in x.split(SUMMED_AT_ONCE)]).sum()


# ---------------------------------------------------------------------------------- embedding


def embedding_forward(
    tokens: Tensor, token_table: Tensor, position_table: Tensor | None = None
) -> Tensor:
    """x[b, t] = token_table[tokens[b, t]] + position_table[t].

    tokens (B, T) int64; token_table (Vp, C); position_table (T_max, C), T <= T_max, or None where
    positions are not learned. Returns x (B, T, C) in the tables' dtype.
    """
    x = token_table[tokens]
    if position_table is None:
        return x
    T = tokens.shape[1]
    return (widen(x) + widen(position_table[:T])).to(x.dtype)  # (B,T,C) + (T,C)


def embedding_backward(
    dx: Tensor, tokens: Tensor, dtoken_table: Tensor, dposition_table: Tensor | None = None
) -> None:
    """The gradient of a row is the sum of the gradients of all positions that read it.

    dx (B, T, C); tokens (B, T). Adds to dtoken_table (Vp, C) and dposition_table (T_max, C).
    """
    T, C = dx.shape[1:]
    dx = dx.double()
    sums = torch.zeros_like(dtoken_table, dtype=dx.dtype)
    dtoken_table += sums.index_add_(0, tokens.reshape(-1), dx.reshape(-1, C))
    if dposition_table is not None:
        dposition_table[:T] += dx.sum(0)


# ------------------------------------------------------------------------------------- linear


def flat_rows(x: Tensor) -> Tensor:
    """(..., C) -> (N, C); where C is 0 too, which -1 in a shape cannot tell."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b.   x (..., K); weight (M, K); bias (M,) or None. Returns y (..., M)."""
    y = widen(x) @ widen(weight).T
    if bias is not None:
        y = y + widen(bias)
    return y.to(x.dtype)


def linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    dweight: Tensor,
    dbias: Tensor | None = None,
    accumulate: bool = True,
) -> Tensor:
    """dx = dy W;  dW += dyᵀ x;  db += Σ_rows dy.

    dy (..., M); x (..., K); weight (M, K). Adds to dweight (M, K) and dbias (M,); without
    `accumulate` dweight is overwritten. Returns dx (..., K).
    """
    if not accumulate:
        dweight.zero_()
    dweight += flat_rows(widen(dy)).T @ flat_rows(widen(x))
    if dbias is not None:
        bias_gradient(dy, dbias)
    return (widen(dy) @ widen(weight)).to(x.dtype)


def bias_gradient(dy: Tensor, dbias: Tensor) -> None:
    """db += Σ_rows dy.   dy (..., M). Adds to dbias (M,)."""
    dbias += dy.double().reshape(-1, dy.shape[-1]).sum(0)


def partial_rows(device: torch.device) -> int:
    """Rows of partial sums for the gradients of vectors: 0, because this backend adds to the
    gradients directly. See `sum_partials`."""
    return 0


def sum_partials(partials: Tensor, gradients: Tensor) -> None:
    """g += Σ_rows p, and p ← 0.   partials p (P, W). Adds to gradients g (W,).

    For backends whose kernels run many programs at once, each adding to a separate row.
    """
    gradients += partials.double().sum(0)
    partials.zero_()


# --------------------------------------------------------------------------------- layer norm


def centered_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x - μ and μ of every row of x (..., C), in float64: (N, C) and (N, 1).

    The mean of large numbers is rounded to one of their neighbors, so that the deviations from it
    have a mean of their own. Subtracting that too leaves exactly 0 of a constant row.
    """
    rows = x.double().reshape(-1, x.shape[-1])
    mean = rows.mean(-1, keepdim=True)
    rest = (rows - mean).mean(-1, keepdim=True)
    return rows - mean - rest, mean + rest


def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y = γ x̂ + β with x̂ = (x - μ) / √(σ² + ε), over the last axis (Ba, Kiros & Hinton 2016).

    x (..., C); weight γ (C,); bias β (C,) or None. Right for every finite row in float64; a float32
    kernel is right up to deviations of 1e18, and gives NaN where their squares are not finite.
    Returns y (..., C), and for the backward mean μ (N,), in float64, and rstd 1/√(σ² + ε) (N,).
    """
    centered, mean = centered_rows(x)
    # in units of the largest deviation no square overflows
    unit = centered.abs().amax(-1, keepdim=True).clamp(min=1)
    variance = (centered / unit).square().mean(-1, keepdim=True)
    rstd = torch.rsqrt(variance + eps / unit / unit) / unit
    y = centered * rstd * weight.double()
    if bias is not None:
        y = y + bias.double()
    return y.reshape(x.shape).to(x.dtype), mean[:, 0], rstd[:, 0].to(wide_dtype(x.dtype))


def add_layer_norm_forward(
    branch: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x = residual + branch, then y = layer_norm(x): the step between two branches of a block.

    branch, residual (..., C). Returns y (..., C), x (..., C), mean (N,), rstd (N,). Both summands
    have the gradient of x, so `layer_norm_backward` with `dresidual` is the whole backward.
    """
    x = (widen(residual) + widen(branch)).to(residual.dtype)
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
    """With g = γ dy:  dx = rstd (g - mean(g) - x̂ mean(g x̂));  dγ += Σ dy x̂;  dβ += Σ dy.

    The two means are subtracted because μ and σ depend on every element of the row.
    dy, x (..., C); mean, rstd (N,) as this backend's forward returned them. (Here x is centered
    anew: in float64, too, a mean is rounded.) Adds to dweight (C,), dbias (C,).
    Returns dx (..., C), plus `dresidual` (..., C), the gradient around the norm, if given.
    dbranch_bias (C,): if x = residual + branch and the branch ends in a bias, Σ dx is added to it,
    because dx is also the gradient of the branch.
    """
    dy_rows = dy.double().reshape(-1, x.shape[-1])
    x_hat = centered_rows(x)[0] * rstd[:, None]
    g = dy_rows * weight.double()
    dx = rstd[:, None] * (g - g.mean(-1, keepdim=True) - x_hat * (g * x_hat).mean(-1, keepdim=True))
    dweight += (dy_rows * x_hat).sum(0)
    if dbias is not None:
        dbias += dy_rows.sum(0)
    dx = dx.reshape(x.shape)
    if dresidual is not None:
        dx = dx + dresidual
    dx = dx.to(x.dtype)
    if dbranch_bias is not None:
        bias_gradient(dx, dbranch_bias)
    return dx


# ----------------------------------------------------------------------------------- RMS norm


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y = γ x̂ with x̂ = x / √(mean(x²) + ε), over the last axis (Zhang & Sennrich 2019).

    x (..., C); weight γ (C,). Right for every finite row in float64; a float32 kernel is right up
    to elements of 1e18, and gives NaN where their squares are not finite.
    Returns y (..., C), and for the backward rstd 1/√(mean(x²) + ε) (N,).
    """
    rows = x.double().reshape(-1, x.shape[-1])
    # in units of the largest element no square overflows
    unit = rows.abs().amax(-1, keepdim=True).clamp(min=1)
    mean_square = (rows / unit).square().mean(-1, keepdim=True)
    rstd = torch.rsqrt(mean_square + eps / unit / unit) / unit
    y = rows * rstd * weight.double()
    return y.reshape(x.shape).to(x.dtype), rstd[:, 0].to(wide_dtype(x.dtype))


def add_rms_norm_forward(
    branch: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x = residual + branch, then y = rms_norm(x), as in `add_layer_norm_forward`.

    branch, residual (..., C). Returns y (..., C), x (..., C), rstd (N,).
    """
    x = (widen(residual) + widen(branch)).to(residual.dtype)
    y, rstd = rms_norm_forward(x, weight, eps)
    return y, x, rstd


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    dweight: Tensor,
    dresidual: Tensor | None = None,
    dbranch_bias: Tensor | None = None,
) -> Tensor:
    """With g = γ dy:  dx = rstd (g - x̂ mean(g x̂));  dγ += Σ dy x̂.

    One mean is subtracted, because the root depends on every element of the row.
    dy, x (..., C); rstd (N,) as this backend's forward returned it. Adds to dweight (C,).
    Returns dx (..., C), plus `dresidual` if given; dbranch_bias: as in `layer_norm_backward`.
    """
    dy_rows = dy.double().reshape(-1, x.shape[-1])
    x_hat = x.double().reshape(-1, x.shape[-1]) * rstd[:, None]
    g = dy_rows * weight.double()
    dx = rstd[:, None] * (g - x_hat * (g * x_hat).mean(-1, keepdim=True))
    dweight += (dy_rows * x_hat).sum(0)
    dx = dx.reshape(x.shape)
    if dresidual is not None:
        dx = dx + dresidual
    dx = dx.to(x.dtype)
    if dbranch_bias is not None:
        bias_gradient(dx, dbranch_bias)
    return dx


# --------------------------------------------------------------------- rotary position embedding


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + D/2}) of a head by its angle, in the layout of halves:

    y_i = x_i cos_i - x_{i+D/2} sin_i;  y_{i+D/2} = x_{i+D/2} cos_i + x_i sin_i.

    x (..., D); cos, sin (..., D/2), which broadcast. Its transpose turns back: sin with a minus.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotary_sizes(width: int, n_heads: int, n_kv_heads: int | None) -> tuple[int, int]:
    """`head_sizes`; n_kv_heads 0: all heads are queries, in `width` = H·D columns."""
    if n_kv_heads != 0:
        return head_sizes(width, n_heads, n_kv_heads)
    if n_heads < 1 or width % n_heads:
        raise ValueError(f"heads: expected a width of n_heads·D = {n_heads}·D, got {width}")
    return 0, width // n_heads


def rotary_heads(qkv: Tensor, n_heads: int, n_kv_heads: int | None) -> tuple[Tensor, Tensor]:
    """(B, T, (H + 2 H_kv)·D) -> the heads that are rotated, of q and k (B, T, H + H_kv, D), and the
    others, of v (B, T, H_kv, D); in the dtype in which they are computed with."""
    H_kv, D = rotary_sizes(qkv.shape[-1], n_heads, n_kv_heads)
    heads = widen(qkv).unflatten(-1, (n_heads + 2 * H_kv, D))
    turned, rest = heads.split((n_heads + H_kv, H_kv), dim=2)
    return turned, rest


def angles_at(positions: Tensor | None, T: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of each position, (T, 1, D/2) or (B, T, 1, D/2): the same for all heads."""
    rows = slice(0, T) if positions is None else positions
    return cos[rows].unsqueeze(-2), sin[rows].unsqueeze(-2)


def rotary_forward(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    n_heads: int,
    n_kv_heads: int | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """The heads of q and k, each pair turned by an angle that grows with its position, so that
    q · k depends on how far apart the two are (RoPE: Su et al. 2021). v stays.

    qkv (B, T, (H + 2 H_kv)·D) as in `attention_forward`, in the layout of halves (`rotate`): it is
    that of transformers; the original has neighbors (x_2i, x_2i+1) as pairs. D is even.
    n_kv_heads 0: queries alone, (B, T, H·D). cos, sin (T_max, D/2), float32 (float64 for a float64
    model). positions (B, T) int64, the rows of cos and sin to use; None: 0 .. T-1 in each row.
    Returns the rotated qkv. Backends may write it over `qkv`, which is not read again.
    """
    turned, v = rotary_heads(qkv, n_heads, n_kv_heads)
    turned = rotate(turned, *angles_at(positions, qkv.shape[1], cos, sin))
    return torch.cat((turned, v), dim=2).flatten(2).to(qkv.dtype)


def rotary_backward(
    dqkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int | None = None
) -> Tensor:
    """A rotation's transpose is the rotation back. Positions are 0 .. T-1.

    dqkv (B, T, (H + 2 H_kv)·D), of the rotated qkv. Returns that of qkv, possibly written over it.
    """
    turned, v = rotary_heads(dqkv, n_heads, n_kv_heads)
    turned = rotate(turned, *angles_at(None, dqkv.shape[1], cos, -sin))
    return torch.cat((turned, v), dim=2).flatten(2).to(dqkv.dtype)


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
    """RMS norm of each head of q and of k over its D elements (Henry et al. 2020), then the
    rotation of `rotary_forward`, in one pass.

    q_weight, k_weight (D,): the gains of all heads of q, and of k. The rest as in `rotary_forward`;
    qkv is kept for the backward, and not written to.
    Returns the rotated qkv, and rstd (N, H + H_kv) of the heads of q, then k.
    """
    raw, v = rotary_heads(qkv, n_heads, n_kv_heads)
    q, k = raw.split((n_heads, raw.shape[2] - n_heads), dim=2)
    q, q_rstd = rms_norm_forward(q, q_weight, eps)
    k, k_rstd = rms_norm_forward(k, k_weight, eps)
    angles = angles_at(positions, qkv.shape[1], cos, sin)
    rotated = torch.cat((rotate(q, *angles), rotate(k, *angles), v), dim=2)
    rows = math.prod(qkv.shape[:2])
    rstd = torch.cat((q_rstd.view(rows, q.shape[2]), k_rstd.view(rows, k.shape[2])), dim=1)
    return rotated.flatten(2).to(qkv.dtype), rstd


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
    """The rotation back, then the backward of each head's RMS norm. Positions are 0 .. T-1.

    dqkv (B, T, (H + 2 H_kv)·D), of the rotated qkv; qkv and rstd from the forward. Adds to
    dq_weight, dk_weight (D,). Returns the gradient of qkv, possibly written over dqkv.
    """
    turned, dv = rotary_heads(dqkv, n_heads, n_kv_heads)
    raw, _ = rotary_heads(qkv, n_heads, n_kv_heads)
    turned = rotate(turned, *angles_at(None, qkv.shape[1], cos, -sin))
    sizes = (n_heads, raw.shape[2] - n_heads)
    (dq, dk), (q, k), (q_rstd, k_rstd) = (
        turned.split(sizes, 2),
        raw.split(sizes, 2),
        rstd.split(sizes, 1),
    )
    dq = rms_norm_backward(dq, q, q_weight, q_rstd.flatten(), dq_weight)
    dk = rms_norm_backward(dk, k, k_weight, k_rstd.flatten(), dk_weight)
    return torch.cat((dq, dk, dv), dim=2).flatten(2).to(qkv.dtype)


# ---------------------------------------------------------------------------------- attention


def head_sizes(width: int, n_heads: int, n_kv_heads: int | None = None) -> tuple[int, int]:
    """(H_kv, D) of heads that lie side by side in `width` = (H + 2 H_kv)·D columns.

    n_kv_heads: H_kv, None for H. ValueError if it does not divide H, or no D fits.
    """
    H_kv = n_heads if n_kv_heads is None else n_kv_heads
    if n_heads < 1 or H_kv < 1 or n_heads % H_kv:
        raise ValueError(f"n_kv_heads: expected a divisor of n_heads = {n_heads}, got {H_kv}")
    parts = n_heads + 2 * H_kv
    if width % parts:
        formula = f"(n_heads + 2 n_kv_heads)·D = {parts}·D"
        raise ValueError(f"q, k and v: expected a width of {formula} together, got {width}")
    return H_kv, width // parts


def split_heads(
    qkv: Tensor, n_heads: int, n_kv_heads: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, T, D) of a packed projection qkv (B, T, (H + 2 H_kv)·D).

    Key and value head n serve the n-th group of H / H_kv query heads (Ainslie et al. 2023), and are
    repeated for each of them. With H_kv = H all three are views.
    """
    H_kv, D = head_sizes(qkv.shape[2], n_heads, n_kv_heads)
    q, k, v = qkv.unflatten(2, (-1, D)).transpose(1, 2).split((n_heads, H_kv, H_kv), dim=1)
    if n_heads != H_kv:
        k, v = (x.repeat_interleave(n_heads // H_kv, dim=1) for x in (k, v))
    return q, k, v


def join_heads(gradients: Iterable[Tensor], n_kv_heads: int | None = None) -> Tensor:
    """The backward of `split_heads`: dq, dk, dv -> dqkv; dk and dv are summed over each group."""
    dq, dk, dv = gradients
    if n_kv_heads not in (None, dq.shape[1]):
        dk, dv = (dx.unflatten(1, (n_kv_heads, -1)).sum(2) for dx in (dk, dv))
    return torch.cat([dx.transpose(1, 2) for dx in (dq, dk, dv)], dim=2).flatten(2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, D) -> (B, T, H·D): the heads side by side again."""
    B, H, T, D = x.shape
    return x.transpose(1, 2).reshape(B, T, H * D)


def visible(T: int, document_start: Tensor | None, device: torch.device) -> Tensor:
    """Which key j each query i may see: document_start[i] <= j <= i.

    document_start (B, T): where the document of each position begins, or None for one document.
    Returns a boolean mask, (T, T) or (B, 1, T, T).
    """
    position = torch.arange(T, device=device)
    causal = position[None, :] <= position[:, None]
    if document_start is None:
        return causal
    return causal & (position >= document_start[:, None, :, None])


def masked_scores(q: Tensor, k: Tensor, document_start: Tensor | None) -> Tensor:
    """q kᵀ, -inf where a key is not seen: (B, H, T, T). q is divided by √D already: that overflows
    for no score that fits, and both passes have the same scores to the last bit."""
    seen = visible(q.shape[-2], document_start, q.device)
    return (q @ k.mT).masked_fill(~seen, -math.inf)


def window_starts(tokens: Tensor, window: int, document_start: Tensor | None = None) -> Tensor:
    """For each position, the first key of a window of `window` keys that ends with it, or its
    document's first token if that is later: a `document_start` for `attention_forward`.

    tokens (B, T), of which only the shape counts; document_start (B, T) int32. Returns one such.
    ValueError for a window below 1.
    """
    check_window(window)
    first = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.int32) - (window - 1)
    first = first.clamp(min=0).expand(tokens.shape)
    return first.contiguous() if document_start is None else first.maximum(document_start)


def check_window(window: int | None) -> None:
    """ValueError unless a query sees at least its own key; None: all."""
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")


def document_starts(tokens: Tensor, end_of_text: int) -> Tensor:
    """For each token, the index in its row at which its document begins. (B, T) -> (B, T) int32.

    The end-of-text token closes its document: the token after it begins the next one.
    """
    T = tokens.shape[1]
    position = torch.arange(T, device=tokens.device)
    begins = torch.zeros_like(tokens)
    begins[:, 1:] = torch.where(tokens[:, :-1] == end_of_text, position[1:], 0)
    return begins.cummax(1).values.int()


def attention_forward(
    qkv: Tensor,
    n_heads: int,
    document_start: Tensor | None = None,
    n_kv_heads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """o = softmax(q kᵀ / √D + mask) v per head (Vaswani et al. 2017), causal.

    qkv (B, T, (H + 2 H_kv)·D): H heads of queries, H_kv of keys and H_kv of values side by side.
    n_kv_heads: H_kv, which divides H; None: H.
    document_start (B, T) int32, or None for one document: query i sees the keys
    document_start[i] <= j <= i. It must not fall as i grows, and must be at most i, so that each
    query sees itself. The beginnings of documents are one case; a window of the last W keys,
    i - W + 1, is another, and so is the larger of both. Below 0 means 0.
    Returns out (B, T, H·D), and `statistics` of each row's softmax for `attention_backward`. Their
    form is the backend's own, and nobody else reads them. Here: (2, B, H, T), the largest score and
    log Σ_j exp(score_ij - largest); beside a large score their sum would lose the second's digits.
    """
    q, k, v = (widen(x) for x in split_heads(qkv, n_heads, n_kv_heads))
    if not qkv.numel():
        return merge_heads(q).to(qkv.dtype), q.new_empty(2, *q.shape[:3])
    scores = masked_scores(q * attention_scale(q), k, document_start)
    largest = scores.amax(-1, keepdim=True)
    log_sum = torch.exp(scores - largest).sum(-1, keepdim=True).log()
    p = torch.exp(scores - largest - log_sum)
    return merge_heads(p @ v).to(qkv.dtype), torch.stack((largest, log_sum))[..., 0]


def empty_statistics(qkv: Tensor, n_heads: int, n_kv_heads: int | None = None) -> Tensor:
    """Unwritten statistics of the shape, dtype and strides that this backend's `attention_forward`
    gives for qkv; in `native` and `triton` also for one that has a shape but no memory."""
    B, T, _ = qkv.shape
    return qkv.new_empty(2, B, n_heads, T, dtype=wide_dtype(qkv.dtype))


def attention_scale(q: Tensor) -> float:
    """1/√D for heads (..., D): what scores are multiplied by in both directions."""
    return q.shape[-1] ** -0.5


def attention_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    statistics: Tensor,
    n_heads: int,
    document_start: Tensor | None = None,
    n_kv_heads: int | None = None,
) -> Tensor:
    """The probabilities come back from q, k and the statistics of each row (Dao 2022).

    dv = pᵀ do;  dp = do vᵀ;  ds = p (dp - δ) with δ_i = Σ_j p_ij dp_ij = do_i · o_i;
    dq = ds k / √D;  dk = dsᵀ q / √D.

    dout, out (B, T, H·D); out and statistics from the forward, the others as there. Returns dqkv,
    as qkv.
    """
    B, T, C = dout.shape
    q, k, v = (widen(x) for x in split_heads(qkv, n_heads, n_kv_heads))
    do = widen(dout).reshape(B, T, n_heads, C // n_heads).transpose(1, 2)
    scale = attention_scale(q)
    q = q * scale
    largest, log_sum = statistics[..., None]
    p = torch.exp(masked_scores(q, k, document_start) - largest - log_sum)  # (B,H,T,T)
    dv = p.mT @ do
    dp = do @ v.mT
    delta = (p * dp).sum(-1, keepdim=True)  # (B,H,T,1); do · o would see the rounding of out
    ds = p * (dp - delta)
    dq = ds @ k * scale
    dk = ds.mT @ q
    return join_heads((dq, dk, dv), n_kv_heads).to(qkv.dtype)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    n_heads: int,
    n_kv_heads: int | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of one new position per row over its cached keys 0 .. lengths[b]-1. No backward.

    q (B, H·D); k_cache, v_cache (B, T_max, H_kv·D); lengths (B,) int64 in 1..T_max; n_kv_heads as
    in `attention_forward`. window: only the last `window` of these keys are seen; None: all.
    The queries of a group are rows of one product. Returns out (B, H·D).
    """
    check_window(window)
    B, T, width = k_cache.shape
    H_kv, D = head_sizes(q.shape[1] + 2 * width, n_heads, n_kv_heads)
    k, v = (widen(x).reshape(B, T, H_kv, D).transpose(1, 2) for x in (k_cache, v_cache))
    q_groups = widen(q).reshape(B, H_kv, n_heads // H_kv, D)
    scores = q_groups * attention_scale(q_groups) @ k.mT  # (B,H_kv,H/H_kv,T)
    position, length = torch.arange(T, device=q.device), lengths[:, None, None, None]
    past = position < length
    if window is not None:
        past = past & (position >= length - window)
    p = torch.softmax(scores.masked_fill(~past, -math.inf), -1)
    # what lies beyond `lengths` was never written: 0 * NaN must not reach the sum
    v = v.masked_fill(~past.mT, 0)
    return (p @ v).reshape(q.shape).to(k_cache.dtype)


# ---------------------------------------------------------------------------------- bias + GELU

GELU_SCALE = math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715


def bias_gelu_forward(h: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = ½ u (1 + tanh(√(2/π) (u + 0.044715 u³))) with u = h + b (Hendrycks & Gimpel 2016).

    h (..., F): the matrix product before its bias; bias (F,) or None. Returns y (..., F).
    """
    u = widen(h) if bias is None else widen(h) + widen(bias)
    y = 0.5 * u * (1 + torch.tanh(GELU_SCALE * (u + GELU_CUBIC * u**3)))
    return y.to(h.dtype)


def bias_gelu_backward(
    dy: Tensor, h: Tensor, bias: Tensor | None = None, dbias: Tensor | None = None
) -> Tensor:
    """With t = tanh(z(u)):  dh = dy (½ (1 + t) + ½ u (1 - t²) z'(u));  db += Σ_rows dh.

    dy, h (..., F). Adds to dbias (F,). Returns dh (..., F).
    """
    u = widen(h) if bias is None else widen(h) + widen(bias)
    t = torch.tanh(GELU_SCALE * (u + GELU_CUBIC * u**3))
    dz = GELU_SCALE * (1 + 3 * GELU_CUBIC * u**2)
    dh = widen(dy) * (0.5 * (1 + t) + 0.5 * u * (1 - t**2) * dz)
    if dbias is not None:
        bias_gradient(dh, dbias)
    return dh.to(h.dtype)


# -------------------------------------------------------------------------------------- SwiGLU


def swiglu_forward(h: Tensor) -> Tensor:
    """y = silu(g) u with silu(g) = g σ(g), for a gate g and a value u (Shazeer 2020).

    h (..., 2F): g in the first F columns, u in the last. Returns y (..., F).
    """
    gate, up = widen(h).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(h.dtype)


def swiglu_backward(dy: Tensor, h: Tensor) -> Tensor:
    """With s = σ(g):  dg = dy u s (1 + g (1 - s));  du = dy g s.

    dy (..., F); h (..., 2F). Returns dh (..., 2F).
    """
    gate, up = widen(h).chunk(2, dim=-1)
    s, rest = torch.sigmoid(gate), torch.sigmoid(-gate)  # 1 - s would keep few digits
    dgate = widen(dy) * (up * (s * (1 + gate * rest)))  # dy u alone could be infinite
    dup = widen(dy) * (gate * s)
    return torch.cat((dgate, dup), dim=-1).to(h.dtype)


# -------------------------------------------------------------------- softmax cross-entropy


def cross_entropy_forward(
    logits: Tensor, targets: Tensor, vocab_size: int, ignore_index: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor]:
    """loss_n = log Σ_v exp(z_nv) - z_n,target, from differences of logits alone:

    m_n = max_v z_nv;  e_nv = exp(z_nv - m_n);  s_n = Σ e_nv over all v but the target;
    loss_n = (m_n - z_n,target) + log1p(s_n - (1 - e_n,target)).

    So it does not depend on what all logits of a row have in common, and a small loss keeps its
    digits: if the target's logit is the largest, the loss is log1p(s_n).

    logits (N, Vp), of which the columns from vocab_size on are padding; targets (N,) int64.
    Returns losses (N,), 0 where the target is ignore_index, and for the backward normalizer (N, 2):
    m_n and s_n, which mean nothing where the target is ignored.
    """
    z = widen(logits)[:, :vocab_size]
    counted = targets != ignore_index
    target = targets.where(counted, 0)[:, None]
    largest = z.amax(-1, keepdim=True)
    e = torch.exp(z - largest)
    others = e.scatter(1, target, 0).sum(-1, keepdim=True)
    losses = (largest - z.gather(1, target)) + torch.log1p(others - (1 - e.gather(1, target)))
    return torch.where(counted, losses[:, 0], 0), torch.cat([largest, others], 1)


def cross_entropy_backward(
    logits: Tensor,
    targets: Tensor,
    normalizer: Tensor,
    scale: Tensor,
    vocab_size: int,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """dz = (softmax(z) - onehot(target)) · scale, written over the logits.

    With m, s and e as above, softmax(z)_v = e_v / (s + e_target), and in the target's column
    softmax(z) - 1 = -s / (s + e_target): minus the sum of all other columns.

    normalizer (N, 2): the forward's. scale: 0-d, the gradient that each row's loss receives
    (1 / number of targets for a mean). Padded columns and ignored rows get exactly 0, whatever
    their logits. Returns dlogits (N, Vp), the logits' own memory.
    """
    counted = targets != ignore_index
    target = targets.where(counted, 0)[:, None]
    largest, others = normalizer.split(1, dim=1)
    e = torch.exp(widen(logits)[:, :vocab_size] - largest)
    total = others + e.gather(1, target)
    dz = torch.zeros_like(logits, dtype=e.dtype)
    dz[:, :vocab_size] = (e / total).scatter(1, target, -others / total)
    return logits.copy_(torch.where(counted[:, None], dz * scale, 0))


def cross_entropy_forward_backward(
    logits: Tensor,
    targets: Tensor,
    scale: Tensor,
    vocab_size: int,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Both in one call, as the training step uses them: returns losses, logits become dlogits."""
    losses, normalizer = cross_entropy_forward(logits, targets, vocab_size, ignore_index)
    cross_entropy_backward(logits, targets, normalizer, scale, vocab_size, ignore_index)
    return losses


# ---------------------------------------------------------- output projection + cross-entropy

CHUNK_ROWS = 1024


def linear_cross_entropy_forward(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int
) -> Tensor:
    """The loss of each row of x for logits = x Wᵀ, a chunk of rows at a time; for evaluation.

    x (N, C); weight (Vp, C); targets (N,). Returns losses (N,).
    """
    losses = [
        cross_entropy_forward(linear_forward(x_chunk, weight), t_chunk, vocab_size)[0]
        for x_chunk, t_chunk in zip(x.split(CHUNK_ROWS), targets.split(CHUNK_ROWS), strict=True)
    ]
    return torch.cat(losses)


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
    """Loss and gradients of the output projection, `chunk_rows` rows of logits at a time.

    x (N, C); weight (Vp, C); targets (N,); scale 0-d. Adds to dweight (Vp, C); without `accumulate`
    overwrites it. Returns the loss, scale · Σ losses (0-d), and dx (N, C). An ignored row counts
    for nothing, whatever x holds there: 0 · NaN must not reach dweight.
    """
    losses, dx = [], []
    size = chunk_rows or CHUNK_ROWS
    x = x.masked_fill((targets == IGNORE_INDEX)[:, None], 0)
    for x_chunk, t_chunk in zip(x.split(size), targets.split(size), strict=True):
        logits = linear_forward(x_chunk, weight)
        losses.append(cross_entropy_forward_backward(logits, t_chunk, scale, vocab_size))
        dx.append(linear_backward(logits, x_chunk, weight, dweight, accumulate=accumulate))
        accumulate = True
    return (sum_in_parts(torch.cat(losses).double()) * scale).to(scale.dtype), torch.cat(dx)


# ------------------------------------------------------------------------------- optimization


def gradient_norms(gradients: Tensor, pieces: int) -> Tensor:
    """√(Σ g²) of each of `pieces` equal parts of the flat buffer, (pieces,) float64.

    Not finite where any gradient is not. The norm of these norms is that of all.

    In float64, because the norm of finite float32 gradients can be too large for float32; and
    scaled, as max |g| · √(Σ (g / max |g|)²), so that no square is too large or too small.
    gradients (P,), P a multiple of pieces.
    """
    g = gradients.double().abs().view(pieces, len(gradients) // pieces)
    largest = torch.linalg.vector_norm(g, torch.inf, dim=1) if g.numel() else g.sum(1)
    scale = largest.where((largest > 0) & largest.isfinite(), 1)
    return scale * (g / scale[:, None]).square().sum(1).sqrt()


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
    """w ← w (1 - η λ) - η (c g).

    weights (P,) in the model's dtype; master (P,) float32, or None if there is none; gradients
    (P,), which may be bfloat16, as what `orthogonalize` makes. learning_rate η, clip c, finite:
    0-d; if finite is False nothing changes. rounding_seed 0-d int64: round stochastically to
    bfloat16 weights without a master; offset: the index of weights[0] in the whole buffer, which
    the rounding noise depends on.
    """
    w = (weights if master is None else master).to(wide_dtype(gradients.dtype), copy=True)
    w *= 1 - learning_rate * weight_decay
    w -= learning_rate * (clip * widen(gradients))
    write_weights(w, weights, master, finite, rounding_seed, offset)


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
    """AdamW (Loshchilov & Hutter 2019, algorithm 2); t = step, which is 1 at the first update.

    m ← β₁ m + (1 - β₁) c g;  v ← β₂ v + (1 - β₂) (c g)²;
    w ← w (1 - η λ) - η (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε).

    exp_avg m, exp_avg_sq v (P,); the rest as in `sgd_update`.
    """
    g = clip * gradients
    m = beta1 * exp_avg + (1 - beta1) * g
    v = beta2 * exp_avg_sq + (1 - beta2) * g * g
    t = step.double()  # in float32, 1 - 0.999**1 would keep only four digits
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    w = (weights if master is None else master).to(gradients.dtype, copy=True)
    w *= 1 - learning_rate * weight_decay
    w -= learning_rate * m_hat / (v_hat.sqrt() + eps)
    write_weights(w, weights, master, finite, rounding_seed, offset)
    exp_avg.copy_(torch.where(finite, m, exp_avg))
    exp_avg_sq.copy_(torch.where(finite, v, exp_avg_sq))


def nesterov_momentum(
    exp_avg: Tensor,
    gradients: Tensor,
    clip: Tensor,
    finite: Tensor,
    beta: float,
    update: Tensor,
) -> None:
    """m ← β m + (1 - β) c g;  update = β m + (1 - β) c g: a look ahead (Nesterov), rounded.

    exp_avg m (P,), gradients g (P,); update (P,) of any dtype is written. clip c, finite: 0-d; if
    finite is False m stays, and `update` may hold anything.
    """
    step = (1 - beta) * (clip * gradients)
    m = beta * exp_avg + step
    update.copy_(beta * m + step)
    exp_avg.copy_(torch.where(finite, m, exp_avg))


# Of the quintic whose iterates bring every singular value between 0.7 and 1.2 in five steps
# (Jordan et al. 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
SMALLEST_MATRIX = 1e-7  # a shorter matrix is divided by this instead of its norm


def orthogonalize(matrices: Tensor, scale: float) -> None:
    """Replace each matrix U S Vᵀ by about scale · U Vᵀ, by Newton–Schulz steps.

    X = matrix / ‖matrix‖;  five times: A = X Xᵀ;  X ← a X + (b A + c A²) X.

    matrices (n, M, K), in place. Zero stays zero.
    """
    a, b, c = NEWTON_SCHULZ
    x = unit_matrices(widen(wide_matrices(matrices)))
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    wide_matrices(matrices).copy_(scale * x)


def orthogonalize_flops(M: int, K: int) -> int:
    """Operations of the matrix products for one matrix (M, K)."""
    M, K = min(M, K), max(M, K)
    return NEWTON_SCHULZ_STEPS * (2 * M * M * K + 2 * M * M * M + 2 * M * M * K)


def wide_matrices(x: Tensor) -> Tensor:
    """View (n, M, K) with at least as many columns as rows, so that X Xᵀ is the smaller product."""
    return x.mT if x.shape[1] > x.shape[2] else x


def unit_matrices(x: Tensor) -> Tensor:
    """x (n, M, K) / Frobenius norm, in x's dtype, contiguous; see SMALLEST_MATRIX.

    First scaled by a power of two, which is exact, so that no square is too large or too small.
    Rows first: the order of sums does not depend on the number of threads.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    largest = torch.linalg.vector_norm(x, torch.inf, dim=(1, 2), keepdim=True).to(wide)
    power = torch.pow(2.0, -largest.frexp().exponent.clamp(-126, 126).to(wide))
    x = (x * power.to(x.dtype)).contiguous()
    rows = torch.linalg.vector_norm(x, dim=2, keepdim=True)
    norm = torch.linalg.vector_norm(rows.double(), dim=1, keepdim=True)
    return x.div_(norm.maximum(SMALLEST_MATRIX * power.double()).to(x.dtype))


def write_weights(
    updated: Tensor,
    weights: Tensor,
    master: Tensor | None,
    finite: Tensor,
    rounding_seed: Tensor | None,
    offset: int,
) -> None:
    """Copy `updated` (P,) to the master and the weights; leave both unchanged if not finite."""
    if master is not None:
        master.copy_(torch.where(finite, updated, master))
    if rounding_seed is not None:
        updated = round_stochastically(updated, rounding_seed, offset)
    weights.copy_(torch.where(finite, updated.to(weights.dtype), weights))


def round_stochastically(x: Tensor, seed: Tensor, offset: int = 0) -> Tensor:
    """float32 (P,) -> bfloat16, up or down with the probability that makes the mean exact.

    bfloat16 is the upper half of a float32. A uniform 16-bit number is added to the lower half: the
    probability that it carries into the upper half is the size of the lower half. The number is a
    hash of (offset + position, seed), so that every backend draws the same one.
    """
    index = torch.arange(offset, offset + x.numel(), device=x.device)
    noise = hash32(index, seed) & 0xFFFF
    bits = (x.view(torch.int32).to(torch.int64) + noise).to(torch.int32) & -0x10000
    return torch.where(x.isfinite(), bits.view(torch.float32), x).bfloat16()


def hash32(index: Tensor, seed: Tensor) -> Tensor:
    """A well-mixed 32-bit number from two integers (the `lowbias32` mixer of C. Wellons, 2018)."""
    x = (index * 0x9E3779B1 + seed * 0x85EBCA77) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
