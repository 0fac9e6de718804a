"""The gate (tools/gate): its rules can fail, a small step passes them, its record is up to date."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mantrans.training.shapes_only import ShapesOnly
from tools.gate.assembly import read_assembly
from tools.gate.cards import CARDS, resident_programs
from tools.gate.digest import ROOT, digest, stale
from tools.gate.driver import Kernel, Launch, TensorMap
from tools.gate.machine_code import MachineCode, count_instructions, read_usage
from tools.gate.rules import violations

# ------------------------------------------------------------------------------------ the rules

CODE = MachineCode(registers=152, hgmma=32, accesses=8, wide_accesses=8, bulk_copies=26)
KERNEL = Kernel(
    name="dkdv_kernel", capability=90, constants={"D": 128}, types={"dqkv": "*bf16", "T": "i32"},
    multiples={"dqkv": 16, "stride": 16}, warps=8, stages=2, shared=200_000, scratch=0,
    multiplies=True, code=CODE, seconds=1.0,
)  # fmt: skip
MAP = TensorMap(
    address=1 << 20, element_bytes=2, shape=(4, 36, 1000, 64), strides=(2304000, 64, 2304, 1),
    box=(1, 1, 64, 64), swizzle=3,
)  # fmt: skip
LAUNCH = Launch(KERNEL, (768, 1, 1), {"dqkv": 1 << 20, "T": 1000, "stride": 2304}, {"q": MAP})


def complaints(launch: Launch = LAUNCH, capability: int = 90) -> list[str]:
    return list(violations(launch, CARDS[capability]))


def test_violations_good_launch() -> None:
    assert complaints() == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"grid": (2**31, 1, 1)}, r"grid: .* got \(2147483648, 1, 1\)"),
        ({"grid": (1, 65_600, 1)}, r"grid: .* got \(1, 65600, 1\)"),
        ({"grid": (1, 1, 65_536)}, "grid: "),
        ({"grid": (0, 1, 1)}, "grid: "),
        ({"numbers": {"dqkv": (1 << 20) + 8, "stride": 16}}, "dqkv: expected a multiple of 16"),
        ({"numbers": {"dqkv": 16, "stride": 24}}, "stride: expected a multiple of 16, got 24"),
    ],
)
def test_violations_launch(change: dict[str, Any], complaint: str) -> None:
    [line] = complaints(LAUNCH._replace(**change))
    assert re.match(complaint, line)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"address": (1 << 20) + 8}, "an address of a multiple of 16"),
        ({"box": (1, 1, 512, 64)}, "a box of 1 to 256"),
        ({"box": (1, 1, 64, 4)}, "rows of multiples of 16 bytes in a box, got 8"),
        ({"box": (1, 1, 64, 128)}, "rows of at most 128 bytes in a box, got 256"),
        ({"strides": (2304000, 64, 2300, 1)}, "strides of multiples of 16 bytes"),
        ({"strides": (2**39, 64, 2304, 1)}, "strides of multiples of 16 bytes"),
        ({"strides": (2304000, 64, 2304, 2)}, "the last 1"),
        ({"shape": (4, 36, 0, 64)}, "axes of 1 to "),
        ({"shape": (1,) * 6, "strides": (16,) * 5 + (1,), "box": (8,) * 6}, "at most 5 axes"),
    ],
)
def test_violations_tensor_map(change: dict[str, Any], complaint: str) -> None:
    [line] = complaints(LAUNCH._replace(maps={"q": MAP._replace(**change)}))
    assert line.startswith("tensor map of q: expected ") and complaint in line


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"shared": 232_449}, "expected at most 232,448 bytes, got 232,449"),
        ({"scratch": 128}, "global scratch: expected 0 bytes"),
        ({"warps": 64}, "threads: expected at most 1024, got 2048"),
        ({"warps": 16}, "registers: expected at most 65,536 a program, got 77,824"),
        ({"code": CODE._replace(stack=896)}, "a stack of 896 bytes"),
        ({"code": CODE._replace(local=3)}, "3 instructions on local memory"),
        ({"code": CODE._replace(hmma=4)}, "none of single warps, got 4 HMMA"),
        ({"code": CODE._replace(hgmma=0, utchmma=1)}, "warp groups, got no HGMMA"),
        ({"code": CODE._replace(accesses=9, wide_accesses=0, bulk_copies=0)}, "16-byte accesses: "),
    ],
)
def test_violations_kernel(change: dict[str, Any], complaint: str) -> None:
    lines = complaints(LAUNCH._replace(kernel=KERNEL._replace(**change)))
    assert any(complaint in line for line in lines)


@pytest.mark.parametrize("capability", CARDS)
def test_violations_shared_memory_of_card(capability: int) -> None:
    limit = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376,
             942: 65_536, 1100: 65_536}  # fmt: skip
    fits = LAUNCH._replace(kernel=KERNEL._replace(shared=limit[capability]))
    assert complaints(fits, capability) == []
    larger = LAUNCH._replace(kernel=KERNEL._replace(shared=limit[capability] + 1))
    assert "shared memory" in complaints(larger, capability)[0]


def test_violations_few_spills() -> None:
    """Allowed where kernels were not measured."""
    code = CODE._replace(hgmma=0, hmma=8, stack=128, local=9)
    elsewhere = LAUNCH._replace(kernel=KERNEL._replace(shared=0, code=code))
    assert complaints(elsewhere, 120) == []
    spilling = KERNEL._replace(code=CODE._replace(stack=128, local=9))
    for change in ({"multiples": {}}, {"types": {"dqkv": "*fp32", "T": "i32"}}):
        assert complaints(LAUNCH._replace(kernel=spilling._replace(**change))) == []
    more = KERNEL._replace(shared=0, code=code._replace(stack=129))
    [line] = complaints(LAUNCH._replace(kernel=more), 120)
    assert "at most 128 bytes, got a stack of 129" in line


def test_violations_spills_on_rdna() -> None:
    """What was found there, and no more; elsewhere wide heads have the bound of all."""
    wide = KERNEL._replace(constants={"D": 128, "BLOCK_D": 128}, shared=0)
    for stack, capability, found in ((328, 1100, 0), (329, 1100, 1), (129, 942, 1)):
        code = CODE._replace(registers=64, hgmma=0, hmma=8, stack=stack)
        launch = LAUNCH._replace(kernel=wide._replace(code=code))
        assert len(complaints(launch, capability)) == found


def test_violations_short_rows_of_logits() -> None:
    """16-byte accesses are asked for where a row has as many lanes as a warp of the card."""
    code = CODE._replace(hgmma=0, hmma=8, accesses=9, wide_accesses=0, bulk_copies=0)
    kernel = KERNEL._replace(constants={"LANES": 32, "D": 64}, shared=0, code=code)
    launch = LAUNCH._replace(kernel=kernel)
    assert complaints(launch, 942) == [] and len(complaints(launch, 1100)) == 1


def test_violations_narrow_heads() -> None:
    """Single warps are allowed."""
    narrow = KERNEL._replace(constants={"D": 32}, code=CODE._replace(hgmma=0, hmma=8))
    assert complaints(LAUNCH._replace(kernel=narrow)) == []


def test_resident_programs_limits() -> None:
    """By what runs out first."""
    card = CARDS[90]
    assert resident_programs(card, registers=128, warps=8, shared=0) == 2
    assert resident_programs(card, registers=32, warps=32, shared=0) == 2
    assert resident_programs(card, registers=32, warps=1, shared=0) == 32
    assert resident_programs(card, registers=32, warps=4, shared=100_000) == 2


def test_resident_programs_amd() -> None:
    """Wavefronts of 64 lanes; 128 KiB registers of 4 bytes and 64 KiB of shared memory."""
    card = CARDS[942]
    assert card.architecture == "gfx942"
    assert resident_programs(card, registers=256, warps=8, shared=0) == 1
    assert resident_programs(card, registers=32, warps=1, shared=0) == 32
    assert resident_programs(card, registers=32, warps=4, shared=32_768) == 2


@pytest.mark.parametrize(("capability", "most"), [(90, 32), (942, 16), (1100, 32)])
def test_violations_threads(capability: int, most: int) -> None:
    """A program has at most 1,024, in warps of 32 or 64."""
    code = CODE._replace(registers=32, hgmma=0, hmma=1)
    kernel = KERNEL._replace(constants={"D": 32}, shared=0, code=code)
    assert not complaints(LAUNCH._replace(kernel=kernel._replace(warps=most)), capability)
    [line] = complaints(LAUNCH._replace(kernel=kernel._replace(warps=2 * most)), capability)
    assert line == "threads: expected at most 1024, got 2048"


# ------------------------------------------------------------------------- what it reads and makes


def test_read_assembly() -> None:
    """AMD's."""
    text = """
        buffer_load_dwordx4 v[2:5], v1, s[4:7], 0 offen
        global_store_dword v[0:1], v2, off
        ds_read_b128 v[6:9], v1
        v_mfma_f32_32x32x8_bf16 a[0:15], v[2:3], v[4:5], a[0:15]
        scratch_store_dword off, v2, s0
    amdhsa.kernels:
      - .agpr_count:     16
        .private_segment_fixed_size: 24
        .sgpr_spill_count: 0
        .vgpr_count:     132
        .vgpr_spill_count: 6
    """
    assert read_assembly(text) == MachineCode(
        registers=132, stack=24, local=6, hmma=1, accesses=2, wide_accesses=1
    )


def test_read_usage() -> None:
    line = " Function f:\n  REG:168 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:620 TEXTURE:0\n"
    assert read_usage(line) == {"registers": 168, "stack": 16}
    with pytest.raises(RuntimeError, match="no register count"):
        read_usage("")


def test_count_instructions() -> None:
    assembly = """
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 STG.E [R2], R4 ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0040*/                   STL.64 [R1], R4 ;
        /*0050*/             @UP0  UTMALDG.4D [UR8], [UR4] ;
    """
    counts = count_instructions(assembly)
    assert counts["accesses"] == 2 and counts["wide_accesses"] == 1
    assert counts["hgmma"] == 1 and counts["hmma"] == 0
    assert counts["local"] == 1 and counts["bulk_copies"] == 1


def test_shapes_only_no_values() -> None:
    """Memory and views are made, but no values."""
    weight = torch.ones(4, 6)
    with ShapesOnly():
        huge = torch.randn(1 << 20, 4096)  # 16 GiB, were it written
        product = huge @ torch.empty(4096, 8, dtype=torch.float32)
        view = weight[1:].view(-1)
        total = weight.add_(1)
        weight[::2] = 7
        values, order = torch.sort(torch.empty(5, dtype=torch.int32), stable=True)
        with pytest.raises(RuntimeError, match="item"):
            weight.sum().item()
        drawn = torch.randn(3, 1, dtype=torch.float16, generator=torch.Generator())
        sums = drawn * torch.ones(4) + torch.ones((), dtype=torch.float64)
        flags = torch.where(sums.T > 1, torch.ones(3, dtype=torch.int32), 2)
        fraction, exponent = torch.frexp(torch.empty(2, 3))
        biased = torch.addmm(drawn[0], drawn, drawn.T)
    assert (sums.shape, sums.dtype) == ((3, 4), torch.float32)
    assert (flags.shape, flags.dtype) == ((4, 3), torch.int32)
    assert (fraction.shape, exponent.dtype) == ((2, 3), torch.int32)
    assert (biased.shape, biased.dtype, drawn.dtype) == ((3, 3), torch.float16, torch.float16)
    assert product.shape == (1 << 20, 8) and product.device.type == "cpu"
    assert view.data_ptr() == weight.data_ptr() + 24 and total is weight
    assert (weight == 1).all()
    assert (values.dtype, order.dtype) == (torch.int32, torch.int64)


# ----------------------------------------------------------------------------------- the digest


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    for folder in ("kernels/triton", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "old", "new", "same"),
    [
        ("kernels/triton/gelu.py", "\nimport torch\n", "\n\nimport torch  # a comment\n", True),
        ("kernels/triton/gelu.py", '    """y = gelu(h + bias).', '    """Other words.', True),
        ("kernels/triton/gelu.py", "num_warps=1,", "num_warps=2,", False),
        ("kernels/triton/attention_tiles.py", "128: Tiles(64, 64", "128: Tiles(64, 32", False),
        ("configs/gpt2-124m.yaml", "learning_rate: 6.0e-4", "learning_rate: 3.0e-4", True),
        ("configs/gpt2-124m.yaml", "n_heads: 12", "n_heads: 6", False),
    ],
)
def test_digest_source_changed(sources: Path, file: str, old: str, new: str, same: bool) -> None:
    """The digest is of what reaches the GPU."""
    path = sources / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert (digest(sources) == digest()) == same


def test_stale_message(sources: Path) -> None:
    """It says what to do."""
    record = sources / "record.json"
    for broken, complaint in ((0, "None"), (3, "violations")):
        runs = f'[{{"violations": 0}}, {{"violations": {broken}}}]'
        record.write_text(f'{{"digest": "{digest(sources)}", "runs": {runs}}}')
        assert complaint in str(stale(record, sources))
    (sources / "kernels/triton/sgd.py").write_text("x = 1\n")
    assert "make gate" in str(stale(record, sources))
    record.unlink()
    assert "make gate" in str(stale(record, sources))


def test_record_current() -> None:
    """A kernel has changed? `make gate` compiles it for all GPUs and writes a new record."""
    complaint = stale()
    assert complaint is None, complaint


# -------------------------------------------------------------------------- in a process of its own


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_run_small_step() -> None:
    """20 s of CPU where Triton's cache is cold, 5 where it is warm."""
    result = run("-m", "tools.gate", "--small")
    assert result.returncode == 0, result.stderr
    found = re.match(r"sm_90: (\d+) kernels, (\d+) launches .* 0 violations", result.stdout)
    assert found and int(found[1]) >= 20 and int(found[2]) >= 40


# The fault that the first run on a GPU met: δ's grid had the pairs of sequence and head on its
# second axis ("Triton Error [CUDA]: invalid argument"). The launcher's own check came after it.
AS_IT_WAS = """
from mantrans.kernels.triton import attention, launch
from tools.gate.programs import at_the_edge
from tools.gate.run import gather

launch.GRID_LIMITS = (2**31 - 1,) * 3
now = attention.launch
def as_it_was(kernel, grid, *arguments, **constants):
    if kernel is attention.delta_kernel:
        now(kernel, grid[::-1], *arguments, **constants)
attention.launch = as_it_was
programs = [p for p in at_the_edge() if p.name.startswith("attention ")]
print(*gather(90, programs).broken, sep="\\n")
"""


def test_run_known_fault() -> None:
    """The fault that a GPU showed is found without one."""
    result = run("-c", AS_IT_WAS)
    assert result.returncode == 0, result.stderr
    found = "grid: expected 1 to (2147483647, 65535, 65535) programs, got (2, 65600, 1)"
    assert result.stdout.count(found) == 2  # with documents and without
