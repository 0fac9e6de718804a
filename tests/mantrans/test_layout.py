"""Buckets: what ranks exchange at once, and how a rank's pieces of it lie in memory."""

from __future__ import annotations

import pytest

from mantrans.config import ModelConfig
from mantrans.models import build
from mantrans.parameters import ALIGNMENT, PIECES, layout

GPT2 = {"vocab_size": 61, "d_model": 20, "n_blocks": 3, "n_heads": 2, "d_ffn": 13}
LLAMA = {**GPT2, "norm": "rms_norm", "position": "rope", "mlp": "swiglu", "tie_embeddings": False}


@pytest.mark.parametrize("shape", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_layout_buckets(shape: dict) -> None:
    """One after the other, each of equal aligned pieces; a block's matrices are one bucket."""
    parameters = list(build(ModelConfig.complete(dict(shape), "test")).parameters())
    found = layout(parameters)
    blocks = [f"blocks.{i}" for i in range(3)]
    assert list(found.buckets) == ["tables", *blocks, "vectors"]
    end = 0
    for bucket in found.buckets.values():
        assert bucket.start == end and (bucket.stop - end) % (PIECES * ALIGNMENT) == 0
        end = bucket.stop
    assert end == found.elements
    for p in parameters:
        bucket, offset = found.buckets[p.bucket], found.offsets[p.name]
        assert bucket.start <= offset and offset + p.stored_elements <= bucket.stop
        assert p.bucket in (p.group, p.name[: len("blocks.0")])
        assert (p.bucket in blocks) == (len(p.shape) == 2 and p.name.startswith("blocks."))
    assert len({found.buckets[b].stop - found.buckets[b].start for b in blocks}) == 1
    assert found.groups == {
        "tables": found.buckets["tables"],
        "matrices": slice(found.buckets["blocks.0"].start, found.buckets["blocks.2"].stop),
        "vectors": found.buckets["vectors"],
    }
