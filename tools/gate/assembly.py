"""What a kernel's assembly for AMD, which Triton leaves beside the binary, shows."""

from __future__ import annotations

import re

from tools.gate.machine_code import MachineCode


def read_assembly(text: str) -> MachineCode:
    """The resources of a kernel for AMD, from its assembly and the metadata at its end (LLVM's
    "User Guide for AMDGPU Backend", code object metadata)."""
    facts = {
        name: int(number)
        for name, number in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.M)
    }  # fmt: skip
    opcodes = re.findall(r"^\s+([a-z]\w+)", text, re.M)
    memory = [o for o in opcodes if re.match(r"(global|buffer|flat)_(load|store)", o)]
    return MachineCode(
        registers=facts["vgpr_count"],
        stack=facts["private_segment_fixed_size"],
        local=facts["vgpr_spill_count"],
        hmma=sum(o.startswith(("v_mfma", "v_smfma", "v_wmma")) for o in opcodes),
        accesses=len(memory),
        wide_accesses=sum(o.endswith(("x4", "b128")) for o in memory),
    )
