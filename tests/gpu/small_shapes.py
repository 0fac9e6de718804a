"""Launches every kernel once on small shapes: `python -m tests.gpu.small_shapes [PART ...]`.

A part is one of the shapes in one dtype; --list prints their names. Without any, all are launched.
This is what a memory or race checker is pointed at: sizes that no block divides, so that each mask
is needed, and few enough elements for a tool that slows a program down a hundredfold. Results are
not looked at; the parity tests do that.
"""

from __future__ import annotations

import itertools
import sys

import torch

from mantrans.kernels import selfcheck, triton
from mantrans.kernels.selfcheck import Draw, Shapes

SHAPES = (
    Shapes(B=2, T=130, H=2, H_kv=2, D=64, C=128, F=320, V=1000, Vp=1024, N=67),
    Shapes(B=1, T=70, H=3, H_kv=1, D=100, C=100, F=72, V=5, Vp=128, N=33),
)
DTYPES = (torch.bfloat16, torch.float32)
PARTS = {str(i): part for i, part in enumerate(itertools.product(SHAPES, DTYPES))}


def main() -> None:
    chosen = sys.argv[1:] or list(PARTS)
    if chosen == ["--list"]:
        print(*PARTS)
        return
    for part in chosen:
        shapes, dtype = PARTS[part]
        for draw_inputs, program in selfcheck.PROGRAMS:
            program(triton, draw_inputs(shapes, Draw(dtype, torch.device("cuda"))))
            torch.cuda.synchronize()
        print(f"{len(selfcheck.PROGRAMS)} programs ran in {dtype} at {shapes}")


if __name__ == "__main__":
    main()
