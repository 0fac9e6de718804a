"""The gate of `tools.kernel_resources`: no kernel ships that spills, outgrows shared memory,
or misses the tensor cores. Compiled without a GPU, with the Triton at hand
and with the oldest supported one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.kernel_resources import Usage, count_instructions, document, read_log, violations

ROOT = Path(__file__).parents[1]
OLDEST_TRITON = ROOT / ".venv/triton-3.6.0"  # `make setup` puts it there


def run_gate(python_path: Path | None, *arch: str) -> subprocess.CompletedProcess[str]:
    """`python -m tools.kernel_resources`, with another Triton before the installed one if given."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if python_path is not None:
        environment["PYTHONPATH"] = str(python_path)
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tools.kernel_resources", "--arch", *arch],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


# Minutes where nothing is remembered, a second where all is.
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("triton_version", ["installed", "3.6.0"])
@pytest.mark.parametrize(
    ("arch", "at_least"),
    [(("90",), 100), pytest.param(("80", "100"), 100, marks=pytest.mark.slow)],
    ids=["sm_90", "sm_80 and sm_100"],
)
def test_every_shipped_configuration_passes_the_gate(
    arch: tuple[str, ...], at_least: int, triton_version: str
) -> None:
    oldest = triton_version == "3.6.0"
    if oldest and not OLDEST_TRITON.exists():
        pytest.skip(f"Triton 3.6.0 is not in {OLDEST_TRITON.relative_to(ROOT)}")
    run = run_gate(OLDEST_TRITON if oldest else None, *arch)
    assert run.returncode == 0, run.stderr
    summary = run.stdout.splitlines()[-1]
    found = re.fullmatch(r"(\d+) configurations with Triton (\S+), 0 violations", summary)
    assert found and int(found[1]) >= at_least
    assert not oldest or found[2] == "3.6.0"


GOOD = Usage("attention_forward bf16 D=128", 90, 8, 2, True, 128, shared=200_000, hgmma=16)


def test_a_good_kernel_passes() -> None:
    assert list(violations(GOOD)) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"spilled": 896}, "896 bytes spilled"),
        ({"local": 3}, "3 instructions on local memory"),
        ({"shared": 232_449}, "expected at most 232,448 bytes of shared memory, got 232,449"),
        ({"arch": 80}, "at most 166,912"),
        ({"hgmma": 0}, "no HGMMA"),
        ({"hmma": 4}, "4 HMMA"),
        ({"error": "out of registers"}, "does not compile: out of registers"),
    ],
)
def test_each_rule_is_enforced(change: dict[str, Any], complaint: str) -> None:
    [line] = violations(GOOD._replace(**change))
    assert complaint in line and line.startswith("attention_forward bf16 D=128, sm_")
    assert line in document([GOOD], [line])


def test_narrow_heads_may_use_single_warps() -> None:
    assert not list(violations(GOOD._replace(head=32, hgmma=0, hmma=8)))


def test_the_log_of_ptxas_is_read() -> None:
    log = (
        "ptxas info    : Function properties for kernel\n"
        "    16 bytes stack frame, 24 bytes spill stores, 40 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers\n"
    )
    assert read_log(log) == {"registers": 255, "stack": 16, "spilled": 64}


def test_an_unreadable_log_is_an_error_not_a_pass() -> None:
    with pytest.raises(RuntimeError, match="no register count"):
        read_log("")


def test_instructions_are_counted() -> None:
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
