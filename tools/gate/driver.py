"""A driver for Triton that launches nothing: it hands each launch to us.

An ordinary `kernel[grid](cpu_tensor, ...)` goes through Triton's own specialization and compilation
for the driver's GPU. No part of Triton is changed, and neither libcuda nor a C compiler is needed.
TRITON_INTERPRET must not be set. `launch.absent_gpu` opens the project's own check of devices.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.tools.tensor_descriptor import TensorDescriptor

from mantrans.kernels.triton import launch as launching
from tools.gate import assembly, machine_code
from tools.gate.cards import Card
from tools.gate.machine_code import MachineCode

MOST_SHARED = 2**30  # so that Triton refuses no kernel: the rules do, with a line of their own


class TensorMap(NamedTuple):
    """What CUDA is given to make a tensor map; axes are counted from the outermost."""

    address: int
    element_bytes: int
    shape: tuple[int, ...]  # elements
    strides: tuple[int, ...]  # elements; the last is 1
    box: tuple[int, ...]  # elements
    swizzle: int  # 0: none; 1, 2, 3: within 32, 64, 128 bytes


class Kernel(NamedTuple):
    """One compiled kernel."""

    name: str
    capability: int
    constants: dict[str, Any]  # argument -> value, if it is part of the code
    types: dict[str, str]  # argument -> Triton's type, of the others
    multiples: dict[str, int]  # argument -> number of which the code takes it to be a multiple
    warps: int
    stages: int
    shared: int  # bytes a program
    scratch: int  # bytes of global memory that a program wants to be given
    multiplies: bool  # whether it has products of 16-bit numbers
    code: MachineCode
    seconds: float  # of CPU that compiling took


class Launch(NamedTuple):
    """One launch of a kernel."""

    kernel: Kernel
    grid: tuple[int, int, int]
    numbers: dict[str, int]  # argument -> address, or value of an integer
    maps: dict[str, TensorMap]


Record = Callable[[Launch], None]


class Utils:
    """What Triton asks of a driver to load kernels."""

    handles = itertools.count(1)

    def __init__(self, card: Card) -> None:
        self.properties = {
            "max_shared_mem": MOST_SHARED,
            "multiprocessor_count": card.multiprocessors,
            "warpSize": card.lanes,
        }
        self.binaries: dict[int, bytes] = {}

    def get_device_properties(self, device: int) -> dict[str, int]:
        return self.properties

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[int, ...]:
        handle = next(self.handles)
        self.binaries[handle] = cubin
        return handle, handle, 0, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module: int) -> None:
        del self.binaries[module]


class Driver(DriverBase):
    """Compiles for `card` and gives each launch to `record`. cache: a folder to remember things."""

    def __init__(self, card: Card, record: Record, cache: Path) -> None:
        self.card, self.record, self.cache = card, record, cache
        by_amd = card.vendor == "amd"
        kind = ("hip", card.architecture) if by_amd else ("cuda", card.capability)
        self.target, self.utils = GPUTarget(*kind, card.lanes), Utils(card)
        self.kernels: dict[int, Kernel] = {}
        # function handle -> Triton's intermediate code, and for AMD the assembly
        self.texts: dict[int, dict[str, str]] = {}
        self.began = cpu_seconds()  # since the last launch: a machine may be busy with other work

    @classmethod
    def is_active(cls) -> bool:
        return True

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """The function that launches a kernel; its first call looks at the kernel."""

        def run(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            if function not in self.kernels:
                self.kernels[function] = self.look_at(function, source, metadata)
            arguments = dict(zip(source.fn.arg_names, rest[4:], strict=True))
            kernel = self.kernels[function]
            numbers, maps = numbers_of(arguments, kernel), maps_of(arguments, metadata)
            self.record(Launch(kernel, (x, y, z), numbers, maps))
            self.began = cpu_seconds()

        return run

    def look_at(self, function: int, source: Any, metadata: Any) -> Kernel:
        names = source.fn.arg_names
        constants = {names[path[0]]: value for path, value in source.constants.items()}
        types = {n: t for n, t in source.signature.items() if n not in constants}
        multiples = {
            names[path[0]]: number
            for path, attributes in source.attrs.items()
            for kind, number in attributes
            if kind == "tt.divisibility"
        }
        sixteen_bit = any("bf16" in t or "fp16" in t for t in types.values())
        return Kernel(
            name=metadata.name,
            capability=self.card.capability,
            constants=constants,
            types=types,
            multiples=multiples,
            warps=metadata.num_warps,
            stages=metadata.num_stages,
            shared=metadata.shared,
            scratch=getattr(metadata, "global_scratch_size", 0) + metadata.profile_scratch_size,
            multiplies=sixteen_bit and "tt.dot" in self.texts[function]["ttir"],
            code=self.machine_code(function),
            seconds=self.seconds(metadata.hash),
        )

    def machine_code(self, function: int) -> MachineCode:
        if self.card.vendor == "amd":
            return assembly.read_assembly(self.texts[function]["amdgcn"])
        return machine_code.read(self.utils.binaries[function], self.cache / "machine-code")

    def loaded(self, module: int, function: int, name: str, files: Any, hash: str) -> None:
        self.texts[function] = {
            kind: Path(path).read_text()
            for file, path in files.items()
            if (kind := file.rpartition(".")[2]) in ("ttir", "amdgcn")
        }

    def compiled(self, *, metadata: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            path = self.cache / "seconds" / metadata["hash"]
            machine_code.write_whole(path, f"{cpu_seconds() - self.began:.3f}")

    def seconds(self, hash: str) -> float:
        path = self.cache / "seconds" / hash
        return float(path.read_text()) if path.exists() else 0.0

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.card.capability  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs here")


def cpu_seconds() -> float:
    """Of this process and of those that it waited for, such as assemblers."""
    return sum(os.times()[:4])


def numbers_of(arguments: dict[str, Any], kernel: Kernel) -> dict[str, int]:
    """The addresses and integers that a kernel is launched with."""
    given = {n: v for n, v in arguments.items() if n not in kernel.constants}
    addresses = {n: v.data_ptr() for n, v in given.items() if isinstance(v, Tensor)}
    return addresses | {n: v for n, v in given.items() if type(v) is int}


def maps_of(arguments: dict[str, Any], metadata: Any) -> dict[str, TensorMap]:
    """The tensor maps that a kernel is launched with."""
    given = {n: v for n, v in arguments.items() if isinstance(v, TensorDescriptor)}
    made = getattr(metadata, "tensordesc_meta", None) or [{} for _ in given]
    return {
        name: TensorMap(
            address=x.base.data_ptr(),
            element_bytes=x.base.element_size(),
            shape=tuple(x.shape),
            strides=tuple(x.strides),
            box=tuple(how.get("block_size", x.block_shape)),
            swizzle=how.get("swizzle", 0),
        )
        for (name, x), how in zip(given.items(), made, strict=True)
    }


@contextlib.contextmanager
def launches_for(card: Card, record: Record, cache: Path) -> Iterator[None]:
    """Inside, kernels are compiled for `card`, and each launch is given to `record`.

    Triton has no way back to having no driver: this one stays when it is left.
    """
    driver = Driver(card, record, cache)
    knobs = triton.knobs
    with knobs.cache.scope(), knobs.runtime.scope(), knobs.compilation.scope():
        knobs.cache.dir = str(cache / "triton")
        knobs.runtime.kernel_load_end_hook = driver.loaded
        knobs.compilation.listener = driver.compiled
        triton.runtime.driver.set_active(driver)
        capability = 0 if card.vendor == "amd" else card.capability
        launching.absent_gpu = launching.GPU(capability, card.multiprocessors, card.lanes)
        try:
            yield
        finally:
            launching.absent_gpu = None
