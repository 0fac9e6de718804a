"""transformers' GPT-2: our names and theirs, and the folder that both sides read and write.

    config.json                   the shape; only the fields in FIELDS and ACCEPTED are used
    model.safetensors             the weights; or if they are in several files,
    model.safetensors.index.json  {"weight_map": {tensor: file}}

Two things differ: the names, and their Conv1D, which stores a block's matrices transposed,
(in, out). Their GPT-2 always has biases: a model without them is written with zeros, which gives
the same outputs, and becomes a model with biases when it is read again. We have no dropout: its
fields are ignored when reading and written as 0. Ids of special tokens belong to the tokenizer:
they are ignored when reading and written as null, unless the tokenizer is written too.

Source: GPT2LMHeadModel of transformers 5.24, and the safetensors format as its README describes it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mantrans.checkpoint.atomic import replacing, write_all
from mantrans.checkpoint.state_file import reason
from mantrans.checkpoint.tensor_file import content_of, header_for
from mantrans.config import ModelConfig
from mantrans.errors import CheckpointError, ConfigError, show, single_line
from mantrans.models.gpt2 import INNER_NAMES, OUTER_NAMES
from mantrans.parameters import Parameter

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PREFIX = "transformer."
OUTPUT = "lm_head.weight"
MAX_JSON_BYTES = 4 << 20

# our field -> theirs; optional fields have the same defaults
FIELDS = {
    "vocab_size": "vocab_size",
    "max_seq_len": "n_positions",
    "d_model": "n_embd",
    "n_blocks": "n_layer",
    "n_heads": "n_head",
    "d_ffn": "n_inner",
    "layer_norm_epsilon": "layer_norm_epsilon",
    "initializer_range": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
}
REQUIRED = ("model_type", "vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
# Fields that change the function of the same weights; the first value is the default.
ACCEPTED: dict[str, tuple] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
# Masks that older versions of transformers saved among the weights.
_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")


# ---------------------------------------------------------------------------------- the mapping


def their_name(name: str) -> str:
    """The name of our parameter in GPT2LMHeadModel."""
    layer, _, kind = name.rpartition(".")
    if layer in OUTER_NAMES:
        return f"{OUTER_NAMES[layer]}.{kind}"
    _, index, layer = layer.split(".", 2)
    return f"{PREFIX}h.{index}.{INNER_NAMES[layer]}.{kind}"


def oriented(name: str, x: Tensor) -> Tensor:
    """A view of their tensor (or its gradient) in our orientation, or of ours in theirs."""
    return x.T if name.startswith("blocks.") and x.dim() == 2 else x


# --------------------------------------------------------------------------------------- reading


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """For whatever asks the system about `path`: names in a downloaded file can be anything, and a
    folder can forbid the question."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL in a name
        cause = single_line(reason(error))
        raise CheckpointError(f"{_shown(path)}: cannot be read ({cause})") from None


def read_shape(directory: str | Path) -> dict[str, Any]:
    """The network's shape in a folder's config.json, as keywords of `ModelConfig`.

    Raises CheckpointError: "FILE: FIELD: expected X, got Y".
    """
    if not os.path.isdir(directory):
        raise CheckpointError(
            f"{_shown(directory)}: expected a folder with {CONFIG} and {WEIGHTS}, got no such "
            "folder; nothing is downloaded"
        )
    path = Path(directory) / CONFIG
    found, where = _read_json(path), _shown(path)
    for field in REQUIRED:
        if field not in found:
            raise CheckpointError(f"{where}: {field}: expected that of a GPT-2, got none")
    for field, choices in ACCEPTED.items():
        if found.get(field, choices[0]) not in choices:
            expected = " or ".join(json.dumps(choice) for choice in choices)
            raise CheckpointError(
                f"{where}: {field}: expected {expected}, got {show(found[field])}"
            )
    values = {ours: found[theirs] for ours, theirs in FIELDS.items() if theirs in found}
    try:
        return ModelConfig.complete(values, where, FIELDS).model_dump(include=set(values))
    except ConfigError as wrong:
        raise CheckpointError(str(wrong)) from None


class Weights:
    """The tensors of a folder, which must be exactly those of `parameters`.

    This is checked at once, from the files' headers. Iteration then gives (our name, tensor in our
    orientation), one at a time, in the files' dtype, on the CPU. Names may lack the leading
    `transformer.`. The format has no checksums, so a changed weight is not found.

    Raises CheckpointError that names the file and the first tensor that is missing, surplus or of
    another shape or dtype.
    """

    def __init__(self, directory: str | Path, parameters: Iterable[Parameter]) -> None:
        self.folder = Path(directory)
        self.parameters = {_bare(their_name(p.name)): p for p in parameters}
        self.is_tied = OUTPUT not in self.parameters
        self.found: dict[str, tuple[Any, str]] = {}  # bare name: open file, name in it
        with _readable(self.folder):
            paths = _weight_files(self.folder)
        for path in paths:
            file = _open(path)
            for name in file.keys():  # noqa: SIM118  (a safetensors file is not a mapping)
                self._add(path, file, name)
        for name in self.parameters:
            if name not in self.found:
                raise CheckpointError(
                    f"{_shown(self.folder)}: expected the {len(self.parameters)} tensors of "
                    f"{CONFIG}, got no {name}"
                )
        self._check_copy()

    def _add(self, path: Path, file: Any, name: str) -> None:
        """Add one tensor, or refuse it."""
        bare = _bare(name)
        if _BUFFER.fullmatch(bare):
            return
        where = f"{_shown(path)}: tensor {single_line(name)}"
        if bare in self.found:
            raise CheckpointError(f"{where}: expected once, got twice")
        # With tied embeddings the file may contain a copy as the output projection.
        parameter = self.parameters.get("wte.weight" if bare == OUTPUT and self.is_tied else bare)
        if parameter is None:
            raise CheckpointError(f"{where}: expected only the tensors of {CONFIG}, got another")
        claim = file.get_slice(name)
        _check_claim(where, parameter, claim.get_shape(), claim.get_dtype())
        self.found[bare] = file, name

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for bare, parameter in self.parameters.items():
            yield parameter.name, oriented(parameter.name, self._tensor(bare))

    def _tensor(self, bare: str) -> Tensor:
        file, name = self.found[bare]
        return file.get_tensor(name)

    def _check_copy(self) -> None:
        """Check that an output projection saved with tied embeddings is equal to the embedding.
        If they differ, transformers 4 follows the config and transformers 5 the tensors."""
        if not self.is_tied or OUTPUT not in self.found:
            return
        output, embedding = self._tensor(OUTPUT), self._tensor("wte.weight")
        if output.dtype != embedding.dtype or not torch.equal(output, embedding):
            raise CheckpointError(
                f"{_shown(self.folder / CONFIG)}: tie_word_embeddings: expected false, got true: "
                f"{OUTPUT} differs from wte.weight"
            )


def _check_claim(where: str, parameter: Parameter, shape: list[int], dtype: str) -> None:
    """Check a tensor's shape, in their orientation, and its dtype."""
    transposed = parameter.name.startswith("blocks.") and len(parameter.shape) == 2
    expected = parameter.shape[::-1] if transposed else parameter.shape
    if tuple(shape) != expected:
        raise CheckpointError(
            f"{where}: expected shape {expected}, as {CONFIG} says, got {tuple(shape)}"
        )
    if dtype not in DTYPES.values():
        raise CheckpointError(f"{where}: expected dtype {', '.join(DTYPES.values())}, got {dtype}")


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder; a single file is preferred, as in transformers."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return _shards(folder / INDEX)
    pickled = sorted(path.name for path in folder.glob("pytorch_model*"))
    if pickled:
        raise CheckpointError(
            f"{_shown(folder / pickled[0])}: expected {WEIGHTS}, got a pickle, which may run code "
            "when it is read; save the model again with transformers' save_pretrained"
        )
    raise CheckpointError(f"{_shown(folder)}: expected {WEIGHTS} or {INDEX}, got neither")


def _shards(index: Path) -> list[Path]:
    """The files that an index names, all in its folder."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{_shown(index)}: weight_map: expected a mapping from tensors to files, "
            f"got {show(weight_map)}"
        )
    for name in weight_map.values():
        plain = isinstance(name, str) and name.isprintable() and not re.search(r"[/\\]", name)
        if not plain or name in ("", ".", ".."):
            raise CheckpointError(
                f"{_shown(index)}: weight_map: expected a file name in the same folder, "
                f"got {show(name)}"
            )
    return [index.parent / name for name in sorted(set(weight_map.values()))]


def _open(path: Path) -> Any:
    """An open safetensors file, with its header checked; no tensor is read yet."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise CheckpointError(
            f"{_shown(path)}: needs the package safetensors (pip install safetensors)"
        ) from None
    with _readable(path):
        if not path.is_file():
            raise CheckpointError(f"{_shown(path)}: expected the file that {INDEX} names, got none")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{_shown(path)}: expected an intact safetensors file, got other bytes "
            f"({single_line(reason(error))})"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError of one line for anything else."""
    where = _shown(path)
    try:
        if not path.is_file():
            raise CheckpointError(f"{where}: expected a JSON file, got no such file")
        with open(path, "rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
        value = json.loads(text) if len(text) <= MAX_JSON_BYTES else None
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be read ({reason(error)})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: expected a JSON object, got other text ({single_line(reason(error))})"
        ) from None
    if len(text) > MAX_JSON_BYTES:
        size = f"{MAX_JSON_BYTES >> 20} MiB"
        raise CheckpointError(f"{where}: expected at most {size}, got more")
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {show(value)}")
    return value


def _bare(name: str) -> str:
    return name.removeprefix(PREFIX)


def _shown(path: str | Path) -> str:
    return single_line(str(path))


# --------------------------------------------------------------------------------------- writing


class SavedTokenizer(Protocol):
    """What is written of a tokenizer: `mantrans.data.tokenizer.Tokenizer` has it."""

    library: Any  # of the package tokenizers
    vocab_size: int
    eot_id: int


def save(
    directory: str | Path,
    config: ModelConfig,
    weights: dict[str, Tensor],
    tokenizer: SavedTokenizer | None = None,
) -> None:
    """Write a model as the folder that `GPT2LMHeadModel.from_pretrained` reads.

    weights: all parameters by our names, on any device; they keep their dtype, which config.json
    records. tokenizer: written as `AutoTokenizer.from_pretrained` reads it. Each file is replaced
    atomically: the weights first, the config last. Files of other names in the folder stay.

    Raises CheckpointError if a file cannot be written; the earlier file then stays.
    """
    folder = Path(directory)
    tensors = _theirs(weights)
    dtype = next(iter(tensors.values())).dtype
    texts = _tokenizer_files(tokenizer, config)
    texts[CONFIG] = _text(_their_config(config, dtype, tokenizer))
    path = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / WEIGHTS
        with replacing(path) as file:
            _write_tensors(file, tensors)
        for name, text in texts.items():
            path = folder / name
            with replacing(path) as file:
                write_all(file, text.encode())
    except (OSError, ValueError) as error:
        cause = single_line(reason(error))
        raise CheckpointError(f"{_shown(path)}: could not be written ({cause})") from None


def _tokenizer_files(tokenizer: SavedTokenizer | None, config: ModelConfig) -> dict[str, str]:
    """{name: text}; none without a tokenizer."""
    if tokenizer is None:
        return {}
    end = tokenizer.library.id_to_token(tokenizer.eot_id)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "model_max_length": config.max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": tokenizer.library.to_str(pretty=True) + "\n",
        "tokenizer_config.json": _text(settings),
    }


def _text(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


def _their_config(
    config: ModelConfig, dtype: torch.dtype, tokenizer: SavedTokenizer | None
) -> dict[str, Any]:
    """config.json: the shape, the accepted values, no dropout, the tokenizer's end of text."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        **{theirs: getattr(config, ours) for ours, theirs in FIELDS.items()},
        **{field: choices[0] for field, choices in ACCEPTED.items()},
        "dtype": str(dtype).removeprefix("torch."),
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "n_ctx": config.max_seq_len,  # read by older programs
        "bos_token_id": tokenizer and tokenizer.eot_id,
        "eos_token_id": tokenizer and tokenizer.eot_id,
    }


def _theirs(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Views of our weights under their names; zeros for the biases of a model without biases."""
    tensors = {}
    for name, value in weights.items():
        tensors[their_name(name)] = oriented(name, value)
        layer, _, kind = name.rpartition(".")
        has_bias = layer == "final_norm" or layer not in OUTER_NAMES
        if kind == "weight" and has_bias and f"{layer}.bias" not in weights:
            tensors[their_name(f"{layer}.bias")] = value.new_zeros(len(value))
    return tensors


def _write_tensors(file: FileIO, tensors: dict[str, Tensor]) -> None:
    """Write the safetensors format, one tensor in memory at a time, unlike the package's writer."""
    write_all(file, header_for({"format": "pt"}, tensors))  # transformers requires this metadata
    for tensor in tensors.values():
        write_all(file, content_of(tensor))
