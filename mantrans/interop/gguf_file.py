"""GGUF: one file with everything that llama.cpp needs to run a model.

Tensors have the names of the package `gguf`'s map from transformers' names. Matrices are (out, in),
as ours, in the weights' dtype; vectors and positions are float32, as llama.cpp expects, and float64
is rounded to it. Two layouts of RoPE's pairs: ours and transformers' are halves, (i, i + D/2), and
so are Qwen's here; llama.cpp's `llama` has them interleaved, (2i, 2i + 1), so that q's and k's rows
are written in that order. Llama 3's scaling is a tensor: by how much each pair is slower.

llama.cpp splits text as the file's `tokenizer.ggml.pre` names it. The tokenizer's own rules tell
which name that is; a tokenizer with other rules is refused.

Source: llama.cpp's convert_hf_to_gguf.py and src/models, and the package gguf 0.19.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mantrans.checkpoint.atomic import replacing
from mantrans.checkpoint.state_file import reason
from mantrans.config import ModelConfig
from mantrans.errors import CheckpointError, ConfigError, show, single_line
from mantrans.interop.config_json import family_of
from mantrans.interop.huggingface import SavedTokenizer, all_theirs
from mantrans.layers.rotary import Angles, Scaling
from mantrans.models import Family

_FILE_TYPES = {
    torch.float32: ("ALL_F32", "F32"),
    torch.float16: ("MOSTLY_F16", "F16"),
    torch.bfloat16: ("MOSTLY_BF16", "BF16"),
}
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's name of a pre-tokenizer: the steps of ours, as `_step` tells them apart.
PRE_TOKENIZERS = {
    "gpt-2": ["bytes of GPT-2's words"],
    "smollm": ["single digits", "bytes of GPT-2's words"],
    "llama-bpe": [_CONTRACTIONS + r"\p{N}{1,3}" + _REST, "bytes"],
    "qwen2": [_CONTRACTIONS + r"\p{N}" + _REST, "bytes"],
}


def save(
    path: str | Path,
    config: ModelConfig,
    weights: dict[str, Tensor],
    tokenizer: SavedTokenizer | None = None,
) -> None:
    """Write a model as the file that llama.cpp reads; `path` is replaced atomically.

    weights: all parameters by our names, on any device. tokenizer: written into the file; without
    one llama.cpp computes with token ids only.

    Raises ConfigError for a model or a tokenizer that llama.cpp has not, CheckpointError if the
    file cannot be written or the package gguf is missing.
    """
    path = Path(path)
    family = family_of(config)
    _require_known(family, config)
    vocabulary = None if tokenizer is None else _vocabulary(tokenizer, config)
    try:
        import gguf
    except ImportError:
        raise CheckpointError(
            f"{single_line(str(path))}: needs the package gguf (pip install gguf)"
        ) from None
    tensors = dict(_tensors(gguf, family, config, weights))
    writer = gguf.GGUFWriter(None, family.model_type)
    _add_shape(writer, config, path.stem)
    _add_vocabulary(writer, vocabulary)
    dtype = next(x.dtype for x in tensors.values() if x.dim() > 1)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype][0]])
    for name, x in tensors.items():
        kind = gguf.GGMLQuantizationType[_FILE_TYPES[x.dtype][1]]
        size = x.numel() * x.element_size()
        writer.add_tensor_info(name, x.shape, np.dtype("u2" if size < 4 else "f4"), size, kind)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            writer.write_header_to_file(Path(str(file.name)))
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for x in tensors.values():  # one at a time in memory
                writer.write_tensor_data(_array(x))
            writer.close()
    except (OSError, ValueError) as error:
        cause = single_line(reason(error))
        raise CheckpointError(f"{single_line(str(path))}: could not be written ({cause})") from None


def _require_known(family: Family, config: ModelConfig) -> None:
    """ConfigError for a shape of the family that llama.cpp does not compute."""
    own = config.resolved()
    for name, value in family.llama_cpp.items():
        if own[name] != value:
            raise ConfigError(
                f"{name}: expected {show(value)}, since llama.cpp computes no other "
                f"{family.model_type}, got {show(own[name])}"
            )
    if family.square_in_llama_cpp and config.n_heads * config.head_width != config.d_model:
        raise ConfigError(
            f"head_dim: expected d_model / n_heads ({config.d_model / config.n_heads:g}), since "
            f"llama.cpp computes no other {family.model_type}, got {config.head_width}"
        )


# --------------------------------------------------------------------------------------- tensors


def _tensors(
    gguf: Any, family: Family, config: ModelConfig, weights: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all tensors of the file; views, but for those that change their layout."""
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.model_type)
    names = gguf.get_tensor_name_map(arch, config.n_blocks)
    if config.rope_scaling_factor is not None:
        yield gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS] + ".weight", slowing(config)
    for theirs, x in all_theirs(replace(family, transposed=False), config, weights).items():
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ConfigError(f"{theirs}: expected a tensor that llama.cpp has, got none of it")
        for part, heads in (("q_proj", config.n_heads), ("k_proj", config.key_value_heads)):
            if family.interleaved_in_gguf and theirs.split(".")[-2] == part:
                x = interleaved(x, heads)
        is_matrix = x.dim() > 1 and x.dtype in _FILE_TYPES and "position" not in name
        yield name, x if is_matrix else x.float()


def interleaved(x: Tensor, heads: int) -> Tensor:
    """Rows of q or k, (heads·D, ...): pairs (i, i + D/2) of each head become (2i, 2i + 1)."""
    D = len(x) // heads
    return x.unflatten(0, (heads, 2, D // 2)).transpose(1, 2).flatten(0, 2)


def slowing(config: ModelConfig) -> Tensor:
    """(D/2,) float32: by which factor scaled RoPE turns each pair slower."""
    assert config.rope_scaling_factor is not None
    scaling = Scaling(
        config.rope_scaling_factor,
        config.rope_low_freq_factor,
        config.rope_high_freq_factor,
        config.rope_original_length,
    )
    shape = (config.max_seq_len, config.head_width, config.rope_theta)
    return (Angles(*shape).frequencies() / Angles(*shape, scaling).frequencies()).float()


def _array(x: Tensor) -> np.ndarray[Any, Any]:
    x = x.detach().cpu().contiguous()
    return (x if x.dtype == torch.float32 else x.view(torch.uint16)).numpy()


# -------------------------------------------------------------------------------------- metadata


def _add_shape(writer: Any, config: ModelConfig, name: str) -> None:
    """The model's shape. The feed-forward width is written for every family."""
    writer.add_type("model")
    writer.add_name(single_line(name))
    writer.add_quantization_version(2)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_blocks)
    writer.add_feed_forward_length(config.feed_forward_width)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.key_value_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    if config.norm == "rms_norm":
        writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    if config.position == "rope":
        writer.add_rope_dimension_count(config.head_width)
        writer.add_rope_freq_base(config.rope_theta)


def _add_vocabulary(writer: Any, vocabulary: dict[str, Any] | None) -> None:
    if vocabulary is None:
        writer.add_tokenizer_model("none")
        return
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(vocabulary["pre"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    writer.add_token_merges(vocabulary["merges"])
    writer.add_bos_token_id(vocabulary["end"])
    writer.add_eos_token_id(vocabulary["end"])
    writer.add_add_bos_token(False)


def _vocabulary(tokenizer: SavedTokenizer, config: ModelConfig) -> dict[str, Any]:
    """What the file contains of a tokenizer. ConfigError for one that llama.cpp does not know."""
    description = json.loads(tokenizer.library.to_str())
    assert config.vocab_size is not None
    special = {t["id"]: t["special"] for t in description["added_tokens"]}
    tokens, types = [], []
    for i in range(config.vocab_size):
        token = tokenizer.library.id_to_token(i)
        tokens.append(f"[PAD{i}]" if token is None else token)
        normal, control, added, unused = 1, 3, 4, 5  # as gguf.TokenType
        if token is None:
            types.append(unused)
        else:
            types.append(normal if i not in special else control if special[i] else added)
    merges = [m if isinstance(m, str) else " ".join(m) for m in description["model"]["merges"]]
    return {
        "pre": pre_tokenizer(description),
        "tokens": tokens,
        "types": types,
        "merges": merges,
        "end": tokenizer.eot_id,
    }


def pre_tokenizer(description: dict[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer in a tokenizer.json.

    Raises ConfigError if it has none.
    """
    step = description.get("pre_tokenizer") or {"type": "none"}
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    found = [_step(step) for step in steps]
    for name, expected in PRE_TOKENIZERS.items():
        if found == expected:
            return name
    raise ConfigError(
        f"tokenizer: expected a pre-tokenizer that llama.cpp knows as {', '.join(PRE_TOKENIZERS)}, "
        f"got another ({single_line(', '.join(found))}); the model can be written without it"
    )


def _step(step: dict[str, Any]) -> str:
    """One step of a pre-tokenizer in a word; equal words are equal rules."""
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space", True):
        return "bytes of GPT-2's words" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step.get("individual_digits"):
        return "single digits"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex"))
    return str(kind)
