"""Reading and writing weights inside an optimizer's kernel: masters, rounding, skipped steps.

An optimizer computes in float32 on the *master* of each weight: a separate float32 buffer, or else
the weights themselves. `store_weights` writes the result to the master and, in the same pass,
rounded to the weights that the model computes with:

    to nearest even, as the hardware rounds; or
    stochastically to bfloat16, up or down with the probability that makes the mean exact: a uniform
    16-bit number is added to the lower half of the float32 before it is cut off. The number is a
    hash of (index, seed), the same in every backend.

`reference.write_weights`, `round_stochastically` and `hash32` are the same in plain torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mantrans.kernels.triton.launch import cdiv, check_tensor, refuse

BLOCK = 1024  # eight elements a lane
WARPS = 4


@triton.jit
def hash32(index, seed):
    """A well-mixed uint32 of two integers, modulo 2³² (the lowbias32 mixer of C. Wellons, 2018)."""
    x = index.to(tl.uint32) * 0x9E3779B1 + seed.to(tl.uint32) * 0x85EBCA77
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def round_stochastically(x, index, seed):
    """float32 x rounded up or down to a value that bfloat16 holds exactly.

    index: int, the element's index in the buffer; seed: 0-d int64. Infinity and NaN stay the same.
    """
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + (hash32(index, seed) & 0xFFFF)) & 0xFFFF0000
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, rounded, bits).to(tl.float32, bitcast=True)


@triton.jit
def load_master(weights_ptr, master_ptr, index, mask):
    """The float32 weights to update."""
    if master_ptr is None:
        w = tl.load(weights_ptr + index, mask=mask, other=0.0).to(tl.float32)
    else:
        w = tl.load(master_ptr + index, mask=mask, other=0.0)
    return w


@triton.jit
def store_weights(w, weights_ptr, master_ptr, seed_ptr, index, offset, mask):
    """Write float32 w to the master, if there is one, and to the weights in their dtype.

    offset: of element 0 in the whole buffer, which the rounding noise depends on.
    """
    if master_ptr is not None:
        tl.store(master_ptr + index, w, mask=mask)
    if seed_ptr is not None:
        w = round_stochastically(w, index + offset, tl.load(seed_ptr))
    tl.store(weights_ptr + index, w.to(weights_ptr.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------ for the launchers


def grid(weights: Tensor) -> tuple[int]:
    """One program per block of the flat buffer."""
    return (cdiv(weights.numel(), BLOCK),)


def check_buffers(weights: Tensor, master: Tensor | None, **moments: Tensor) -> None:
    """Refuse flat buffers that do not fit together."""
    check_tensor("weights", weights, shape=(None,))
    if master is not None:
        moments["master"] = master
    for name, buffer in moments.items():
        check_tensor(name, buffer, shape=weights.shape, dtype=torch.float32, device=weights.device)


def check_scalars(device: torch.device, **numbers: Tensor) -> None:
    """Refuse a learning rate, clip factor or step that is not a number on the device."""
    for name, number in numbers.items():
        check_tensor(name, number, shape=(), dtype=(torch.float32, torch.float64), device=device)


def check_switches(weights: Tensor, finite: Tensor, rounding_seed: Tensor | None) -> None:
    """Refuse a finite flag or rounding seed that the kernels cannot use."""
    device = weights.device
    check_tensor("finite", finite, shape=(), dtype=torch.bool, device=device)
    if rounding_seed is not None:
        check_tensor("rounding_seed", rounding_seed, shape=(), dtype=torch.int64, device=device)
        if weights.dtype != torch.bfloat16:
            refuse("rounding_seed", f"a seed for {weights.dtype}", "None unless bfloat16 weights")
