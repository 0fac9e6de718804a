"""How transformers names and shapes the models of one architecture, as data for `interop`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mantrans.config import ModelConfig


@dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    model_type, architecture: in config.json; the latter is the name of its class.
    outer: our layer outside the blocks -> theirs, in full.
    blocks: their prefix of block N is f"{blocks}.{N}".
    inner: our layer inside a block -> theirs. Several are packed in ours, row after row, with the
        rows of `packed_rows`.
    transposed: their blocks' matrices are (in, out), which is Conv1D's way; ours are (out, in).
    fields: our field -> theirs in config.json. Two of ours may be one of theirs: they are equal.
    rope: our field -> theirs in config.json's "rope_parameters".
    window: attention_window is their "sliding_window".
    defaults: our field -> the value where config.json lacks theirs; fields without are required.
    fixed: our field -> the value that all models of the family have; None is our default.
    accepted: their field -> the values that we can compute; the first is their default.
    written: their field -> the value that we write, which is of no use to us.
    repeated: their field -> ours, which has another name for us too; only written.
    whole_heads: d_model must be a multiple of n_heads, even if head_dim is given.
    llama_cpp: our field -> the only value with which llama.cpp computes the family.
    square_in_llama_cpp: llama.cpp takes head_dim to be d_model / n_heads.
    interleaved_in_gguf: llama.cpp's RoPE turns pairs (2i, 2i + 1) of it, not (i, i + D/2).
    """

    model_type: str
    architecture: str
    outer: Mapping[str, str]
    blocks: str
    inner: Mapping[str, tuple[str, ...]]
    fields: Mapping[str, str]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]
    transposed: bool = False
    rope: Mapping[str, str] = field(default_factory=dict)
    window: bool = False
    accepted: Mapping[str, tuple] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=dict)
    repeated: Mapping[str, str] = field(default_factory=dict)
    whole_heads: bool = False
    llama_cpp: Mapping[str, Any] = field(default_factory=dict)
    square_in_llama_cpp: bool = False
    interleaved_in_gguf: bool = False

    def describes(self, config: ModelConfig) -> bool:
        """Whether a model of this config is one of the family."""
        return not self.misfits(config)

    def misfits(self, config: ModelConfig) -> dict[str, Any]:
        """Our fields in which a model of this config is none of the family -> what they would be;
        {} for a model of the family."""
        own = config.resolved()
        wanted = config.model_copy(update={**own, **self.fixed}).resolved()
        by_theirs = {theirs: wanted[ours] for ours, theirs in self.fields.items()}
        wanted |= {ours: by_theirs[theirs] for ours, theirs in self.fields.items()}
        if self.whole_heads and config.d_model % config.n_heads:
            wanted["d_model"] = -(-config.d_model // config.n_heads) * config.n_heads
        return {name: value for name, value in wanted.items() if value != own[name]}

    def their_names(self, name: str) -> tuple[str, ...]:
        """Their tensors in our parameter `name`, from the first row on."""
        layer, _, kind = name.rpartition(".")
        if layer in self.outer:
            return (f"{self.outer[layer]}.{kind}",)
        _, number, layer = layer.split(".", 2)
        return tuple(f"{self.blocks}.{number}.{theirs}.{kind}" for theirs in self.inner[layer])


def packed_rows(config: ModelConfig, name: str) -> tuple[int, ...]:
    """The rows of each part in our parameter `name`: q, k, v, or gate, up. () for all others."""
    layer = name.rpartition(".")[0]
    if layer.endswith(".attention.qkv"):
        heads = (config.n_heads, config.key_value_heads, config.key_value_heads)
        return tuple(n * config.head_width for n in heads)
    return (config.feed_forward_width,) * 2 if layer.endswith(".mlp.gate_up") else ()
