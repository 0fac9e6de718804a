"""llama.cpp itself, by the package xllamacpp, reads our GGUF files: its log probabilities are ours.

Its GELU is a table of half-precision numbers, so that GPT-2's agree less closely.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mantrans.data.tokenizer import load_tokenizer
from mantrans.interop import gguf_file
from tests.mantrans.interop.test_gguf_file import build

pytest.importorskip("xllamacpp", reason="it has llama.cpp")
pytest.importorskip("gguf", reason="the files are written with it")
pytestmark = pytest.mark.slow
TOKENIZER = load_tokenizer("tinystories_bpe_4096")
TEXT = "Once upon a time, Lily had 12345 toys.\n\n  She don't"
# In a process of its own, whose end takes llama.cpp's threads along.
PROGRAM = """
import json, sys, xllamacpp as x
path, ids, text, n_tokens = json.loads(sys.argv[1])
p = x.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.n_gpu_layers, p.warmup = path, 64, 1, 0, False
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
p.fit_params, p.verbosity = False, 1  # errors alone
server = x.Server(p)
common = {"temperature": -1.0, "cache_prompt": False, "return_tokens": True}
def answer(**asked):
    found = server.handle_completions({**common, **asked})
    return found if isinstance(found, dict) else json.loads(found)
one = answer(prompt=ids, n_predict=1, n_probs=n_tokens)
likely = one["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
longer = answer(prompt=text, n_predict=6)
print("RESULT", json.dumps([[(t["id"], t["logprob"]) for t in likely],
                            longer["choices"][0]["text"]]))
"""


def asked(file: Path, ids: list[int]) -> tuple[str, Any]:
    """What llama.cpp says, and its answers: None if it does not read the file."""
    given = json.dumps([str(file), ids, TEXT, TOKENIZER.vocab_size])
    done = subprocess.run([sys.executable, "-c", PROGRAM, given], capture_output=True, text=True)
    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
    said = done.stdout[-2000:] + done.stderr[-2000:]
    return said, line and json.loads(line.removeprefix("RESULT "))


@pytest.mark.parametrize(
    ("case", "shape", "tolerance"),
    [
        ("gpt2", {"d_ffn": 80, "max_seq_len": 64}, 2e-3),
        ("gpt2, no biases", {"max_seq_len": 64, "tie_embeddings": False}, 2e-3),
        ("llama", {}, 1e-4),
        ("llama, biases", {}, 1e-4),
        ("llama, scaled, tied", {"n_kv_heads": 2}, 1e-4),  # with 1 it ends at once
        ("qwen2", {}, 1e-4),
        ("qwen3", {"head_dim": 20}, 1e-4),
        ("starcoder2", {"head_dim": None}, 2e-3),
    ],
)
def test_llama_cpp_computes_the_same(
    tmp_path: Path, case: str, shape: dict[str, Any], tolerance: float
) -> None:
    """All log probabilities after a prompt, and a greedy continuation from text."""
    shape = {"max_seq_len": 64, **shape, "vocab_size": TOKENIZER.vocab_size}
    model = build(case, **shape)
    model.save_gguf(tmp_path / "model.gguf", TOKENIZER)
    ids = TOKENIZER.encode(TEXT)
    said, found = asked(tmp_path / "model.gguf", ids)
    assert found, said
    likely, text = found
    expected = model.forward(torch.tensor([ids]))["logits"][0, -1].log_softmax(-1)
    assert len({token for token, _ in likely}) > 4000
    assert max(abs(expected[token].item() - value) for token, value in likely) < tolerance
    greedy = model.generate(
        [ids], max_length=len(ids) + 6, temperature=0, eos_token_id=TOKENIZER.eot_id
    )[0]
    assert text == TOKENIZER.decode(greedy[len(ids) :].tolist())


@pytest.mark.parametrize("case", ["qwen2", "starcoder2"])
def test_llama_cpp_reads_no_other_head_width(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Why such a model is refused. If this fails, llama.cpp has learned it."""
    monkeypatch.setattr(gguf_file, "_require_known", lambda family, config: None)
    model = build(case, head_dim=10, max_seq_len=64, vocab_size=TOKENIZER.vocab_size)
    model.save_gguf(tmp_path / "model.gguf", TOKENIZER)
    said, found = asked(tmp_path / "model.gguf", TOKENIZER.encode(TEXT))
    assert found is None and "attn_q.weight' has wrong shape" in said, said
