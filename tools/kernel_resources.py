"""The resources that each shipped kernel takes on a GPU, measured without a GPU, and their limits.

    python -m tools.kernel_resources [--arch 80 90 100] [--write docs/kernel-resources.md] [--fresh]

Every configuration in a kernel file's `resource_cases()` is compiled for each architecture. The
compiler's log and the disassembly show what no test on a CPU can see. The gate, which the command's
exit status reports:

  * it compiles, and its shared memory fits into a multiprocessor;
  * on sm_90 no register is spilled to memory, which is slow in an inner loop;
  * on sm_90 the products of 16-bit numbers are warp-group products (HGMMA): with head width 64 or
    more a per-warp product (HMMA) means that the compiler gave up half the tensor cores' speed.

The imported Triton is used; put another one on PYTHONPATH to measure that. Results are kept beside
Triton's cache under a hash of everything that they depend on.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mantrans.kernels import triton as kernels

# Bytes of shared memory that one program can have (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability"), less the 1 KiB that the driver keeps.
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
WIDE_PRODUCT_HEAD = 64  # from this head width on, products must be HGMMA on sm_90


class Job(NamedTuple):
    """One configuration for one architecture; only names, so that it can be sent to a process."""

    module: str
    number: int  # which of the module's resource_cases()
    name: str
    arch: int
    key: str  # hash of all that the result depends on


class Usage(NamedTuple):
    """A compiled kernel's resources. Shared bytes are per program, the other bytes per thread."""

    name: str
    arch: int
    warps: int
    stages: int
    multiplies: bool  # whether it computes matrix products of 16-bit numbers
    head: int  # head width, WIDE_PRODUCT_HEAD for a kernel without heads
    shared: int = 0
    registers: int = 0
    stack: int = 0
    spilled: int = 0  # stored and loaded
    local: int = 0  # instructions on thread-local memory: LDL and STL
    hmma: int = 0  # the tensor cores' instructions: of single warps (sm_80 and smaller tiles),
    hgmma: int = 0  # of warp groups (sm_90),
    utchmma: int = 0  # and of sm_100's tensor memory
    accesses: int = 0  # instructions on global memory: LDG, STG
    wide_accesses: int = 0  # of which 16 bytes wide
    bulk_copies: int = 0  # tiles moved by the copy engine (TMA)
    error: str = ""  # why it does not compile


# ------------------------------------------------------------------------------------ measuring


def jobs(architectures: Sequence[int]) -> Iterator[Job]:
    """Every configuration of every kernel file, for every architecture."""
    for info in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{info.name}")
        if not hasattr(module, "resource_cases"):
            continue
        for number, case in enumerate(module.resource_cases()):
            for arch in sorted(set(architectures) & set(case.architectures)):
                yield Job(module.__name__, number, case.name, arch, key(case, arch))


def key(case: Any, arch: int) -> str:
    """A hash of the kernel's source with all it calls, its configuration, and the compilers."""
    configuration = {
        "source": case.fn.cache_key,
        "this": Path(__file__).read_text(),
        "signature": dict(case.signature),
        "constexprs": dict(case.constexprs),
        "rest": (case.name, case.divisible_by_16, case.num_warps, case.num_stages, arch),
        "triton": triton.__version__,
        "ptxas": os.environ.get("TRITON_PTXAS_PATH", ""),
    }
    text = json.dumps(configuration, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def measure(job: Job) -> Usage:
    """Compile one configuration and read its resources from the log and the binary."""
    case = importlib.import_module(job.module).resource_cases()[job.number]
    usage = Usage(
        name=case.name,
        arch=job.arch,
        warps=case.num_warps,
        stages=case.num_stages,
        multiplies=False,
        head=case.constexprs.get("D", WIDE_PRODUCT_HEAD),
    )
    try:
        compiled, log = compile_ahead(case, job.arch)
    except Exception as error:  # any error is the result
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return usage._replace(error=first_line)
    sixteen_bit = any(re.search(r"bf16|fp16", type_) for type_ in case.signature.values())
    return usage._replace(
        multiplies=sixteen_bit and "tt.dot" in compiled.asm["ttir"],
        shared=compiled.metadata.shared,
        **read_log(log),
        **count_instructions(disassemble(compiled.asm["cubin"])),
    )


def compile_ahead(case: Any, arch: int) -> tuple[Any, str]:
    """The compiled kernel and ptxas' log; in a new cache, because a cached kernel has no log."""
    names = case.fn.arg_names
    signature = {n: "constexpr" if n in case.constexprs else case.signature[n] for n in names}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in case.divisible_by_16}
    source = ASTSource(case.fn, signature, dict(case.constexprs), attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    log = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as directory,
        triton.knobs.cache.scope(),
        triton.knobs.nvidia.scope(),
        contextlib.redirect_stdout(log),
    ):
        triton.knobs.cache.dir = directory
        triton.knobs.nvidia.dump_ptxas_log = True
        target = GPUTarget("cuda", arch, 32)
        compiled = triton.compile(source, target=target, options=options)
    return compiled, log.getvalue()


def read_log(log: str) -> dict[str, Any]:
    """Registers, stack and spilled bytes per thread, from the output of `ptxas -v`."""
    registers = re.findall(r"Used (\d+) registers", log)
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    if not registers or not frames:
        raise RuntimeError(f"no register count in the log of ptxas: {log.strip()!r}")
    return {
        "registers": max(map(int, registers)),
        "stack": max(int(stack) for stack, _, _ in frames),
        "spilled": sum(int(stores) + int(loads) for _, stores, loads in frames),
    }


def disassemble(cubin: bytes) -> str:
    """The machine code as text, by the disassembler inside Triton's package."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        run = subprocess.run([tool, "-c", path], check=True, capture_output=True, text=True)
    return run.stdout


def count_instructions(assembly: str) -> dict[str, Any]:
    """The number of instructions of each kind."""
    # a line reads `/*0040*/ @!P0 LDG.E.128 R4, ...`; the address and the predicate are optional
    opcodes = re.findall(r"^\s*(?:/\*\w+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", assembly, re.M)
    kinds = Counter(opcode.split(".")[0] for opcode in opcodes)
    memory = [o for o in opcodes if o.split(".")[0] in ("LDG", "STG", "LDGSTS")]
    return {
        "local": kinds["LDL"] + kinds["STL"],
        "hmma": kinds["HMMA"],
        "hgmma": kinds["HGMMA"],
        "utchmma": kinds["UTCHMMA"],
        "accesses": len(memory),
        "wide_accesses": sum("128" in opcode.split(".") for opcode in memory),
        "bulk_copies": sum(n for kind, n in kinds.items() if kind.startswith(("UTMA", "UBLKCP"))),
    }


def measure_all(all_jobs: Sequence[Job], fresh: bool = False) -> list[Usage]:
    """Measure what is not cached, with one process per core, and cache it."""
    directory = Path(triton.knobs.cache.dir) / "mantrans-resources"
    directory.mkdir(parents=True, exist_ok=True)
    missing = [job for job in all_jobs if fresh or not (directory / job.key).exists()]
    if missing:
        # processes are spawned, not forked: LLVM does not survive a fork with threads
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(len(missing), os.cpu_count() or 1, 8), context) as pool:
            for job, usage in zip(missing, pool.map(measure, missing), strict=True):
                partial = directory / f"{job.key}.{os.getpid()}"
                partial.write_text(json.dumps(usage._asdict()))
                partial.replace(directory / job.key)
    return [Usage(**json.loads((directory / job.key).read_text())) for job in all_jobs]


# ------------------------------------------------------------------------------------- the gate


def violations(usage: Usage) -> Iterator[str]:
    """One line for each rule that a configuration breaks."""
    where = f"{usage.name}, sm_{usage.arch}"
    if usage.error:
        yield f"{where}: does not compile: {usage.error}"
        return
    if usage.shared > SHARED_LIMIT[usage.arch]:
        limit = SHARED_LIMIT[usage.arch]
        yield f"{where}: expected at most {limit:,} bytes of shared memory, got {usage.shared:,}"
    if usage.arch != 90:
        return
    if usage.spilled or usage.local:
        yield (
            f"{where}: expected no spills, got {usage.spilled} bytes spilled, "
            f"{usage.local} instructions on local memory"
        )
    if usage.multiplies and usage.head >= WIDE_PRODUCT_HEAD:
        if not usage.hgmma:
            yield f"{where}: expected warp-group products, got no HGMMA"
        if usage.hmma:
            yield f"{where}: expected no products of single warps, got {usage.hmma} HMMA"


# ------------------------------------------------------------------------------------- reporting

HEADINGS = (
    "kernel",
    "sm",
    "warps",
    "stages",
    "registers",
    "shared bytes",
    "stack",
    "spilled",
    "tensor-core products",
    "16-byte share of global accesses",
    "TMA",
)


def cells(usage: Usage) -> tuple[str, ...]:
    """One row of the table, under HEADINGS."""
    if usage.error:
        return (usage.name, str(usage.arch), usage.error, *[""] * (len(HEADINGS) - 3))
    kinds = {"HMMA": usage.hmma, "HGMMA": usage.hgmma, "UTCHMMA": usage.utchmma}
    products = " ".join(f"{kind} {count}" for kind, count in kinds.items() if count)
    share = f"{usage.wide_accesses}/{usage.accesses}" if usage.accesses else "-"
    numbers = (usage.arch, usage.warps, usage.stages, usage.registers)
    return (
        usage.name,
        *map(str, numbers),
        f"{usage.shared:,}",
        str(usage.stack),
        str(usage.spilled),
        products or "-",
        share,
        str(usage.bulk_copies or "-"),
    )


def table(usages: Iterable[Usage]) -> str:
    """A Markdown table with aligned columns, readable in a terminal too."""
    rows = [HEADINGS, *map(cells, usages)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def document(usages: Sequence[Usage], broken: Sequence[str]) -> str:
    """The page that --write writes."""
    verdict = "\n".join(f"- {line}" for line in broken) or "No configuration breaks the gate."
    return (
        "# What each kernel takes on a GPU\n\n"
        "Written by `python -m tools.kernel_resources --write docs/kernel-resources.md` "
        f"with Triton {triton.__version__}: every shipped configuration, compiled ahead of "
        "time. Registers, stack and spilled bytes are a thread's, shared bytes a program's; "
        "products, accesses and TMA (tiles moved by the copy engine) count "
        "instructions. The gate is described in `tools/kernel_resources.py`.\n\n"
        f"{verdict}\n\n{table(usages)}\n"
    )


def main() -> int:
    """Measure and print; the exit status says whether the gate is passed."""
    parser = argparse.ArgumentParser(prog="python -m tools.kernel_resources", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_LIMIT, default=[80, 90, 100])
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table there as well")
    parser.add_argument("--fresh", action="store_true", help="measure again what is cached")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels that are interpreted cannot be compiled")

    usages = measure_all(list(jobs(arguments.arch)), arguments.fresh)
    broken = [line for usage in usages for line in violations(usage)]
    print(table(usages))
    configurations = f"{len(usages)} configurations with Triton {triton.__version__}"
    print(f"{configurations}, {len(broken)} violations")
    if arguments.write:
        arguments.write.write_text(document(usages, broken))
    for line in broken:
        print(f"error: {line}", file=sys.stderr)
    return 1 if broken or not usages else 0


if __name__ == "__main__":
    sys.exit(main())
