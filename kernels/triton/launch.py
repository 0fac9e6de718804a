"""The code around every Triton launch: check the arguments, size the grid, launch.

Arguments are checked before a launch, because a kernel with a wrong pointer reads arbitrary memory.
A failed check is a ValueError of one line: "ARGUMENT: expected X, got Y".
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import triton
from torch import Tensor

# The dtypes that kernels support; float64 needs the reference or native backend.
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

MOST_THREADS = 1024  # of a program

# Most programs on each axis of a grid (CUDA C++ Programming Guide, compute capabilities).
GRID_LIMITS = (2**31 - 1, 65_535, 65_535)


class GPU(NamedTuple):
    """What launchers ask of the GPU that kernels run on."""

    capability: int  # 90 for compute capability 9.0; 0 for a GPU of AMD
    multiprocessors: int  # the unit of a persistent grid
    lanes: int = 32  # of a warp, which AMD calls a wavefront


# The interpreter takes Hopper's way through the kernels. It runs one program after the other; with
# two "multiprocessors" persistent loops run more than once.
INTERPRETER = GPU(90, 2)

# The GPU for which kernels are compiled where none is: `tools.gate` sets it. CPU tensors then stand
# for that GPU's.
absent_gpu: GPU | None = None

only_compile = False  # a launch compiles its kernel and no more: see `compiling_only`


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    """The smallest power of two >= n (1 for n <= 1)."""
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def present_gpu(device: torch.device) -> GPU:
    """The GPU that a CUDA device is; PyTorch calls AMD's that too."""
    properties = torch.cuda.get_device_properties(device)
    capability = 0 if torch.version.hip else 10 * properties.major + properties.minor
    return GPU(capability, properties.multi_processor_count, properties.warp_size)


def gpu_of(device: torch.device) -> GPU | None:
    """The GPU that kernels on tensors of `device` are for; None where they cannot run."""
    if device.type == "cuda":
        return present_gpu(device)
    return INTERPRETER if interpreted() else absent_gpu


def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of `device`."""
    gpu = gpu_of(device)
    return gpu.multiprocessors if gpu else refuse("device", device, "one that can run kernels")


def lanes_of_warp(device: torch.device) -> int:
    """The number of lanes of a warp on `device`: 32, or 64 on some of AMD's."""
    gpu = gpu_of(device)
    return gpu.lanes if gpu else 32


@contextlib.contextmanager
def compiling_only(device: torch.device) -> Iterator[None]:
    """Inside, CPU tensors stand for those of `device`, and launches only compile their kernels."""
    global absent_gpu, only_compile
    before = absent_gpu, only_compile
    absent_gpu, only_compile = gpu_of(device), True
    try:
        yield
    finally:
        absent_gpu, only_compile = before


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """kernel[grid](*arguments, **constants) on the device of the first argument, a tensor.

    A multiplication and the addition after it are one instruction, with one rounding. That is
    Triton's default up to 3.9, and will not be from 3.10.

    An empty grid launches nothing. ValueError for a grid that is too large for any GPU.
    """
    if 0 in grid:
        return
    if any(n > limit for n, limit in zip(grid, GRID_LIMITS, strict=False)):
        refuse(f"grid of {kernel.__name__}", grid, f"at most {GRID_LIMITS} programs")
    device = arguments[0].device
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    start = functools.partial(kernel.warmup, grid=grid) if only_compile else kernel[grid]
    with on_device:
        start(*arguments, enable_fp_fusion=True, **constants)


def refuse(argument: str, got: object, expected: object) -> NoReturn:
    """Raise the one-line ValueError of a failed check."""
    raise ValueError(f"{argument}: expected {expected}, got {got}")


def check_tensor(
    argument: str,
    tensor: Tensor,
    *,
    shape: Sequence[int | None] | None = None,
    dtype: torch.dtype | Sequence[torch.dtype] | None = FLOAT_DTYPES,
    device: torch.device | None = None,
    contiguous: bool = True,
) -> None:
    """Refuse a tensor that a kernel would misread.

    argument: its name in the message. shape: the expected shape, None for any length.
    dtype: the accepted dtypes. device: that of the other arguments; by default any device that can
    run kernels. contiguous: whether the tensor must be contiguous.
    """
    if not isinstance(tensor, Tensor):
        refuse(argument, type(tensor).__name__, "a torch.Tensor")
    if device is not None and tensor.device != device:
        refuse(argument, tensor.device, f"device {device}, as the other arguments")
    if gpu_of(tensor.device) is None:
        refuse(argument, tensor.device, "a CUDA device (TRITON_INTERPRET is not set)")
    dtypes = (dtype,) if isinstance(dtype, torch.dtype) else dtype
    if dtypes is not None and tensor.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        refuse(argument, str(tensor.dtype).removeprefix("torch."), f"dtype {names}")
    if shape is not None and not _fits(tensor.shape, shape):
        expected = ", ".join("*" if length is None else str(length) for length in shape)
        refuse(argument, tuple(tensor.shape), f"shape ({expected})")
    if contiguous and not tensor.is_contiguous():
        refuse(argument, f"strides {tensor.stride()}", "a contiguous tensor")


def _fits(shape: Sequence[int], expected: Sequence[int | None]) -> bool:
    return len(shape) == len(expected) and all(
        length in (None, got) for got, length in zip(shape, expected, strict=True)
    )
