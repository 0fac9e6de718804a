"""What a launch must keep to so that a GPU runs it, and runs it well.

Each rule is a function that yields a line for each thing that breaks it: "NAME: expected X, got Y".
"""

from __future__ import annotations

from collections.abc import Iterator

from tools.gate.cards import LARGEST_GRID, LARGEST_PROGRAM, Card, registers_taken
from tools.gate.driver import Kernel, Launch, TensorMap

WIDE_PRODUCT_HEAD = 64  # from this head width on, Hopper's products must be those of warp groups
WIDE_HEAD = 128  # bytes: shorter rows may be shared by threads in other ways
FEW_SPILLED = 128  # bytes a thread
# The same of 16-bit kernels on gfx1100 (see `attention_tiles`), by name, BLOCK_D and whether 16
# divides lengths: what was found with Triton 3.6.0, and no more.
SPILLED_ON_RDNA = {
    ("dkdv_kernel", 128, True): 328,
    ("dkdv_kernel", 128, False): 416,
    ("dkdv_kernel", 256, True): 1124,
    ("dq_kernel", 128, False): 492,
    ("dq_kernel", 256, True): 828,
}
FEW_ACCESSES = 8  # of a kernel that moves little
MAP_ALIGNMENT = 16  # bytes
LARGEST_BOX, MOST_AXES, LARGEST_STRIDE = 256, 5, 2**40
SWIZZLE_SPAN = {1: 32, 2: 64, 3: 128}  # bytes of a row within which a map swizzles


def violations(launch: Launch, card: Card) -> Iterator[str]:
    """A line for each rule that a launch breaks, its kernel's included."""
    for rule in (grid, alignment, maps):
        yield from rule(launch)
    for of_kernel in (resources, spills, products, accesses):
        yield from of_kernel(launch.kernel, card)


def grid(launch: Launch) -> Iterator[str]:
    """The number of programs on each axis."""
    if any(not 0 < n <= most for n, most in zip(launch.grid, LARGEST_GRID, strict=True)):
        yield f"grid: expected 1 to {LARGEST_GRID} programs, got {launch.grid}"


def alignment(launch: Launch) -> Iterator[str]:
    """Compiled code relies on what its arguments are multiples of."""
    for name, number in launch.kernel.multiples.items():
        if name in launch.numbers and launch.numbers[name] % number:
            yield f"{name}: expected a multiple of {number}, got {launch.numbers[name]}"


def maps(launch: Launch) -> Iterator[str]:
    """CUDA's rules for tensor maps (cuTensorMapEncodeTiled): it refuses a launch otherwise."""
    for name, tensor_map in launch.maps.items():
        for line in refused(tensor_map):
            yield f"tensor map of {name}: {line}"


def refused(m: TensorMap) -> Iterator[str]:
    """Why CUDA refuses a tensor map."""
    if not len(m.shape) == len(m.strides) == len(m.box) <= MOST_AXES:
        yield f"expected at most {MOST_AXES} axes, got {m.shape}, {m.strides} and {m.box}"
        return
    if m.address % MAP_ALIGNMENT:
        yield f"expected an address of a multiple of {MAP_ALIGNMENT}, got {m.address}"
    if any(not 0 < n <= 2**32 for n in m.shape):
        yield f"expected axes of 1 to 2**32 elements, got {m.shape}"
    strides = [n * m.element_bytes for n in m.strides[:-1]]
    if m.strides[-1] != 1 or any(n % MAP_ALIGNMENT or not 0 < n < LARGEST_STRIDE for n in strides):
        yield f"expected strides of multiples of {MAP_ALIGNMENT} bytes, the last 1, got {m.strides}"
    if any(not 0 < n <= LARGEST_BOX for n in m.box):
        yield f"expected a box of 1 to {LARGEST_BOX} on each axis, got {m.box}"
    row = m.box[-1] * m.element_bytes
    if row % MAP_ALIGNMENT:
        yield f"expected rows of multiples of {MAP_ALIGNMENT} bytes in a box, got {row}"
    if row > SWIZZLE_SPAN.get(m.swizzle, row):
        yield f"expected rows of at most {SWIZZLE_SPAN[m.swizzle]} bytes in a box, got {row}"


def resources(kernel: Kernel, card: Card) -> Iterator[str]:
    """What a multiprocessor must have, and memory that nothing allocates."""
    if kernel.shared > card.shared:
        yield f"shared memory: expected at most {card.shared:,} bytes, got {kernel.shared:,}"
    if kernel.warps * card.lanes > LARGEST_PROGRAM:
        yield f"threads: expected at most {LARGEST_PROGRAM}, got {kernel.warps * card.lanes}"
    taken = registers_taken(card, kernel.code.registers, kernel.warps)
    if taken > card.registers:
        yield f"registers: expected at most {card.registers:,} a program, got {taken:,}"
    if kernel.scratch:
        yield f"global scratch: expected 0 bytes, got {kernel.scratch}"


def spills(kernel: Kernel, card: Card) -> Iterator[str]:
    """Registers kept in memory are slow in an inner loop: none in 16-bit kernels on Hopper, where
    they were measured. Few pass in float32, which is for exactness, where kernels have not run
    yet, and where lengths that 16 does not divide take more registers for addresses. On RDNA 3 a
    backward for wide heads spills whatever its tiles."""
    code, divide = kernel.code, lengths_divide(kernel)
    most = 0 if card.capability == 90 and sixteen_bit(kernel) and divide else FEW_SPILLED
    if card.capability == 1100 and sixteen_bit(kernel):
        wide = kernel.name, kernel.constants.get("BLOCK_D", 0), divide
        most = SPILLED_ON_RDNA.get(wide, most)
    if code.stack > most or (code.local and not most):
        yield (
            f"spills: expected at most {most} bytes, got a stack of {code.stack} bytes and "
            f"{code.local} instructions on local memory"
        )


def sixteen_bit(kernel: Kernel) -> bool:
    """Whether a kernel reads or writes tensors of 16-bit numbers."""
    return any("bf16" in type_ or "fp16" in type_ for type_ in kernel.types.values())


def lengths_divide(kernel: Kernel) -> bool:
    """Whether the code relies on all addresses and row lengths being multiples of 16."""
    return all(
        name in kernel.multiples
        for name, type_ in kernel.types.items()
        if type_.startswith("*") or name in ("n", "n_columns") or name.startswith("stride")
    )


def products(kernel: Kernel, card: Card) -> Iterator[str]:
    """Products of 16-bit numbers are the tensor cores' (AMD: MFMA, WMMA), on Hopper those of warp
    groups."""
    code = kernel.code
    if not kernel.multiplies:
        return
    if not code.hmma + code.hgmma + code.utchmma:
        yield "products: expected the tensor cores', got none"
    if card.capability == 90 and kernel.constants.get("D", WIDE_PRODUCT_HEAD) >= WIDE_PRODUCT_HEAD:
        if not code.hgmma:
            yield "products: expected those of warp groups, got no HGMMA"
        if code.hmma:
            yield f"products: expected none of single warps, got {code.hmma} HMMA"


def accesses(kernel: Kernel, card: Card) -> Iterator[str]:
    """Where addresses, row lengths and heads allow it, memory is accessed 16 bytes at a time."""
    head = kernel.constants.get("D", WIDE_HEAD) * (2 if sixteen_bit(kernel) else 4)
    short = head % 16 or head < WIDE_HEAD or kernel.constants.get("LANES", card.lanes) < card.lanes
    if short or not lengths_divide(kernel):
        return
    code = kernel.code
    if code.accesses > FEW_ACCESSES and not code.wide_accesses and not code.bulk_copies:
        yield f"16-byte accesses: expected some, got none of {code.accesses}"
