"""`train.py`, with the process's memory and open files noted every `--every` steps."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from mantrans.config import Config
from mantrans.training.trainer import Trainer

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE // 1024


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def main() -> int:
    """sampled.py CONFIG SAMPLES EVERY: writes [[step, resident KiB, open files], …]."""
    config, file, every = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    trainer = Trainer(Config.load(config), quiet=True)
    samples = []
    advance = trainer._advance

    def and_look() -> None:
        advance()
        if trainer.progress.step % every == 0:
            samples.append([trainer.progress.step, resident_kib(), open_files()])

    trainer._advance = and_look  # type: ignore[method-assign]
    trainer.run()
    file.write_text(json.dumps(samples))
    return 0
