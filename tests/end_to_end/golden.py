"""A hundred steps whose losses are on record, for the same bits here and nearly the same elsewhere.

`python -m tests.end_to_end.golden` adds this machine's bits to tests/golden/loss_curve.json. Run
it when a change of the arithmetic is meant, and look at what it does to the curve.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import tempfile
from pathlib import Path

import torch

from mantrans.records import read_records
from mantrans.training.trainer import Trainer
from tests.support.runs import GOLDEN, metrics_file, small

CURVE = GOLDEN / "loss_curve.json"


def losses(folder: Path, tokens: Path, **training) -> list[float]:
    """The 100 training losses of the golden run: float32, two blocks, every step logged."""
    config = small(
        folder, tokens, max_steps=100, warmup_steps=10, log_every=1, eval_every=100, save_every=100,
        model={"d_model": 32, "n_blocks": 2, "d_ffn": 128, "max_seq_len": 32}, **training,
    )  # fmt: skip
    Trainer(config, quiet=True).run()
    return [record["loss"] for record in read_records(metrics_file(folder)) if "loss" in record]


def fingerprint() -> str:
    """What decides the order in which sums are formed: processor, PyTorch, threads."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    facts = {}
    for line in lines:
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    names = ("model name", "cpu family", "model", "stepping")
    processor = " ".join(facts.get(name, "?") for name in names)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{processor}; {capability}; torch {torch.__version__}; {torch.get_num_threads()} thread"


def bits(curve: list[float]) -> str:
    """A hash of the losses' exact values."""
    return hashlib.sha256(struct.pack(f"<{len(curve)}d", *curve)).hexdigest()


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        curve = losses(Path(folder) / "run", Path(folder) / "tokens")
    known = json.loads(CURVE.read_text()) if CURVE.exists() else {"bits": {}}
    known.setdefault("losses", curve)
    known["bits"][fingerprint()] = bits(curve)
    CURVE.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
