"""A run that does not fit into memory is refused with the number, before the system kills it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mantrans.config import Config
from mantrans.errors import ConfigError
from mantrans.runtime import available_memory
from mantrans.training import memory, room

ROOT = Path(__file__).parents[3]
GIB = 2**30


def configured(*settings: str) -> Config:
    return Config.from_dict({}, "test", ["training.max_steps=1", "training.device=cpu", *settings])


SIZES = {
    "training.batch_size": 2**20,
    "training.gradient_accumulation_steps": 2**20,
    "model.max_seq_len": 2**20,
    "model.d_model": 2**16,
    "model.n_blocks": 1024,
    "model.d_ffn": 2**20,
}
EVALUATION = {"evaluation.batch_size": 2**20, "evaluation.max_generation_length": 2**20}


@pytest.mark.promise("memory")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(("field", "most"), SIZES.items())
def test_memory_each_size(
    monkeypatch: pytest.MonkeyPatch, field: str, most: int, dtype: str
) -> None:
    """Doubled from a small value on, a size fits until it does not, and then never again."""
    monkeypatch.setattr(room, "available_memory", lambda: GIB)
    settings = ["model.n_heads=1", "model.d_model=32", f"model.dtype={dtype}"]
    fits, size = [], 32
    while size <= most:
        try:
            needed = room.require_memory(configured(*settings, f"{field}={size}"), 4096)
            assert 0 < needed.bytes <= GIB
            fits.append(True)
        except ConfigError as refusal:
            words = "expected a step that fits into the 1.0 GiB free of cpu, got one of "
            assert words in str(refusal) and str(refusal).endswith(" GiB")
            fits.append(False)
        size *= 2
    assert fits == sorted(fits, reverse=True) and fits[0] and not fits[-1]


@pytest.mark.promise("memory")
@pytest.mark.parametrize("field", EVALUATION)
def test_memory_evaluation_batches(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    """As far as there is data to fill them: a huge limit on little text is harmless."""
    monkeypatch.setattr(room, "available_memory", lambda: GIB)
    settings = ["model.max_seq_len=16384", f"{field}={EVALUATION[field]}"]
    long = "model.max_seq_len=1048576" if "length" in field else "training.eval_batches=null"
    config = configured(*settings, long, "data.max_length=64")
    with pytest.raises(ConfigError, match=r"evaluation\.batch_size.* 1\.0 GiB free of cpu, got "):
        room.require_evaluation_memory(config, 4096, windows=2**20)
    few = configured(f"{field}={EVALUATION[field]}", "data.max_length=64")
    room.require_evaluation_memory(few, 4096, windows=4)


def system(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.promise("memory")
def test_available_memory_least(tmp_path: Path) -> None:
    """Available memory is the least of system and groups."""
    group = "sys/fs/cgroup/job/step"
    root = system(tmp_path, proc__meminfo=f"MemTotal: 9 kB\nMemAvailable: {4 * GIB // 1024} kB\n")
    assert available_memory(root) == 4 * GIB
    system(root, proc__self__cgroup="0::/job/step\n")
    assert available_memory(root) == 4 * GIB
    for name, text in (("memory.max", "max"), ("memory.current", "1")):
        system(root, **{f"{group}/{name}": text})
    assert available_memory(root) == 4 * GIB
    system(root, **{"sys/fs/cgroup/job/memory.max": str(3 * GIB)})
    system(root, **{"sys/fs/cgroup/job/memory.current": str(2 * GIB)})
    system(root, **{"sys/fs/cgroup/job/memory.stat": f"anon 5\ninactive_file {GIB // 2}\n"})
    assert available_memory(root) == 3 * GIB // 2


def test_available_memory_cgroup_v1(tmp_path: Path) -> None:
    root = system(tmp_path, proc__self__cgroup="4:memory:/job\n3:cpuset:/other\n")
    group = "sys/fs/cgroup/memory/job"
    system(root, **{f"{group}/memory.limit_in_bytes": str(2 * GIB)})
    system(root, **{f"{group}/memory.usage_in_bytes": str(GIB)})
    system(root, **{f"{group}/memory.stat": "total_inactive_file 100\ninactive_file 7\n"})
    assert available_memory(root) == GIB + 100


def test_available_memory_system() -> None:
    assert 0 < available_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert available_memory(Path("/nowhere")) == os.sysconf("SC_PAGE_SIZE") * os.sysconf(
        "SC_PHYS_PAGES"
    )


MEASURE = """
import sys, threading, time
import torch
from mantrans.config import Config
from mantrans.training import memory, room
from mantrans.training.building import build_wrapper
from mantrans.training.step import TrainStep

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

class Source:
    def __init__(self, n, T):
        self.tokens = torch.zeros((n, T + 1), dtype=torch.int64)
        self.staging = torch.zeros_like(self.tokens)
    def load(self, step):
        self.tokens.copy_(torch.randint(0, 300, self.tokens.shape))
    def rows(self):
        return self.tokens

torch.set_num_threads(1)
settings = ["training.max_steps=1", "training.device=cpu", *sys.argv[1:]]
config = Config.from_dict({"model": {"vocab_size": 300}}, "test", settings)
predicted = room.require_memory(config, 300).bytes
before, peak, done = resident(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
wrapper = build_wrapper(config, 300)
step = TrainStep(
    wrapper.model, wrapper.trainable(),
    Source(config.training.sequences_per_step, config.sequence_length),
    micro_batches=config.training.gradient_accumulation_steps, history=10,
    end_of_text=None if config.data.attend_across_documents else 0,
)
for number in range(2):
    step.run(number, 1e-3)
done = True
thread.join()
print(predicted, peak - before)
"""


LLAMA = (
    "model.norm=rms_norm model.position=rope model.mlp=swiglu model.bias=false model.n_kv_heads=1"
)


@pytest.mark.promise("memory")
@pytest.mark.slow
@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape",
    [
        "model.d_model=16 model.max_seq_len=16 training.batch_size=4096",
        "model.d_model=128 model.max_seq_len=128 training.batch_size=64",
        "model.d_model=1024 model.max_seq_len=16 training.batch_size=1 training.optimizer=muon",
        "model.d_model=128 model.max_seq_len=128 training.batch_size=64 training.recompute=block",
        "model.d_model=64 model.max_seq_len=1024 training.batch_size=8",
        "model.d_model=64 model.max_seq_len=64 training.batch_size=64 model.n_blocks=8",
        "model.d_model=16 model.max_seq_len=16 training.gradient_accumulation_steps=1024",
        f"{LLAMA} model.d_model=128 model.max_seq_len=128 training.batch_size=64",
        f"{LLAMA} model.d_model=128 model.max_seq_len=128 training.batch_size=64 "
        "model.qk_norm=true training.recompute=block",
        f"{LLAMA} model.d_model=128 model.max_seq_len=128 training.batch_size=64 "
        "model.qk_norm=true training.recompute=gelu",
        f"{LLAMA} model.d_model=64 model.max_seq_len=1024 training.batch_size=8 "
        "model.attention_window=100",
    ],
)
def test_memory_step_measured(shape: str, dtype: str, documents: bool) -> None:
    """Measured on the resident memory of a process: never more, and at least a third of it."""
    settings = [
        *shape.split(), f"model.dtype={dtype}", "model.n_heads=2",
        f"data.attend_across_documents={not documents}".lower(),
    ]  # fmt: skip
    if "n_blocks" not in shape:
        settings.append("model.n_blocks=2")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *settings],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    predicted, measured = map(int, done.stdout.split())
    assert measured <= predicted <= 3 * measured + memory.CPU_LIBRARIES, (predicted, measured)
