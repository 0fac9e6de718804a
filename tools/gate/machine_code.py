"""What a kernel's machine code (cubin) shows: registers, spills, the kinds of instructions.

Read with `cuobjdump` and `nvdisasm`, which are in Triton's package.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import triton

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"


class MachineCode(NamedTuple):
    """A kernel's resources: bytes and registers are a thread's, the rest counts instructions."""

    registers: int = 0
    stack: int = 0  # bytes; Triton's kernels need a stack for spilled registers only
    local: int = 0  # LDL and STL: on thread-local memory
    hmma: int = 0  # the tensor cores': of single warps,
    hgmma: int = 0  # of warp groups (Hopper),
    utchmma: int = 0  # and of tensor memory (Blackwell, sm_100)
    accesses: int = 0  # LDG, STG, LDGSTS: on global memory
    wide_accesses: int = 0  # of which 16 bytes wide
    bulk_copies: int = 0  # tiles moved by the copy engine (TMA)


def read(cubin: bytes, cache: Path) -> MachineCode:
    """The resources of a binary; remembered in the folder `cache`."""
    path = cache / f"{hashlib.sha256(cubin + Path(__file__).read_bytes()).hexdigest()}.json"
    if path.exists():
        return MachineCode(**json.loads(path.read_text()))
    usage = read_usage(tool_output("cuobjdump", "--dump-resource-usage", cubin))
    code = MachineCode(**usage, **count_instructions(tool_output("nvdisasm", "-c", cubin)))
    write_whole(path, json.dumps(code._asdict()))
    return code


def write_whole(path: Path, text: str) -> None:
    """Write a file that other processes may read at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    Path(file.name).replace(path)


def tool_output(tool: str, option: str, cubin: bytes) -> str:
    """What one of Triton's tools says about a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run(
            [BIN / tool, option, file.name], check=True, capture_output=True, text=True
        )
    return run.stdout


def read_usage(text: str) -> dict[str, int]:
    """Registers and stack of a thread, from cuobjdump's line `REG:40 STACK:0 SHARED:0 …`."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if not found:
        raise RuntimeError(f"no register count in what cuobjdump says: {text.strip()!r}")
    return {"registers": int(found[1]), "stack": int(found[2])}


def count_instructions(assembly: str) -> dict[str, Any]:
    """The number of instructions of each kind."""
    # a line reads `/*0040*/ @!P0 LDG.E.128 R4, ...`; the address and the predicate are optional
    opcodes = re.findall(r"^\s*(?:/\*\w+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", assembly, re.M)
    kinds = Counter(opcode.split(".")[0] for opcode in opcodes)
    memory = [o for o in opcodes if o.split(".")[0] in ("LDG", "STG", "LDGSTS")]

    def counted(condition: Callable[[str], bool]) -> int:
        return sum(n for kind, n in kinds.items() if condition(kind))

    return {
        "local": kinds["LDL"] + kinds["STL"],
        "hmma": kinds["HMMA"],
        "hgmma": kinds["HGMMA"],
        "utchmma": kinds["UTCHMMA"],
        "accesses": len(memory),
        "wide_accesses": sum(bool({"128", "256"} & set(o.split("."))) for o in memory),
        "bulk_copies": counted(lambda kind: kind.startswith(("UTMA", "UBLKCP"))),
    }
