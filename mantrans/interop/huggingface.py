"""Folders of transformers: the weights by their names, and the files that both sides read.

    config.json                   the shape: see `mantrans.interop.config_json`
    model.safetensors             the weights; or if they are in several files,
    model.safetensors.index.json  {"weight_map": {tensor: file}}
    tokenizer.json, tokenizer_config.json, generation_config.json     written with a tokenizer

Names and layouts are those of the model's `Family`: some of our matrices are several of theirs, row
after row, and GPT-2's Conv1D stores a block's matrices transposed, (in, out). Heads of q and k that
are rotated have the layout of halves on both sides: a pair is (i, i + D/2).

Biases that a family always has are written as zeros for a model without them, which gives the same
outputs, and becomes a model with biases when it is read again. Ids of special tokens belong to the
tokenizer: they are ignored when reading and written as null, unless the tokenizer is written too.

Source: transformers 5.24, and the safetensors format as its README describes it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mantrans.checkpoint.atomic import replacing, write_all
from mantrans.checkpoint.state_file import reason
from mantrans.checkpoint.tensor_file import content_of, header_for
from mantrans.config import ModelConfig
from mantrans.errors import CheckpointError, show, single_line
from mantrans.interop import config_json
from mantrans.models import Family, build
from mantrans.models.family import packed_rows

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_JSON_BYTES = 4 << 20

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
# What older versions of transformers saved among the weights: masks, and RoPE's frequencies.
_BUFFER = re.compile(r"(h|layers)\.\d+\.(attn\.(masked_)?bias|self_attn\.rotary_emb\.inv_freq)")


# ---------------------------------------------------------------------------------- the mapping


class Part(NamedTuple):
    """One of their tensors: its name, its shape, and which rows it is in a parameter of ours."""

    name: str
    shape: tuple[int, ...]
    rows: slice


def parts(family: Family, config: ModelConfig, name: str, shape: tuple[int, ...]) -> Iterator[Part]:
    """Their tensors in our parameter of this name and shape, from the first row on."""
    names = family.their_names(name)
    end = 0
    for theirs, n in zip(names, packed_rows(config, name) if names[1:] else shape[:1], strict=True):
        start, end = end, end + n
        own = (n, *shape[1:])
        yield Part(theirs, own[::-1] if _transposed(family, name) else own, slice(start, end))


def to_theirs(
    family: Family, config: ModelConfig, named: Iterable[tuple[str, Tensor]]
) -> dict[str, Tensor]:
    """Views of our parameters, or of their gradients, as the tensors that transformers has."""
    return {
        part.name: _turned(family, name, value[part.rows])
        for name, value in named
        for part in parts(family, config, name, tuple(value.shape))
    }


def _transposed(family: Family, name: str) -> bool:
    return family.transposed and name.startswith("blocks.")


def _turned(family: Family, name: str, x: Tensor) -> Tensor:
    """A view of a tensor of theirs in our orientation, or of ours in theirs."""
    return x.T if x.dim() == 2 and _transposed(family, name) else x


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


class Weights:
    """A folder's model: its shape, as keywords of `ModelConfig`, and its weights.

    The tensors must be exactly those of the shape. This is checked at once, from the files'
    headers, before memory is taken. Iteration then gives (our name, tensor as ours), one parameter
    at a time, in the files' dtype, on the CPU. Names may lack the family's prefix, such as
    `transformer.`. The format has no checksums, so a changed weight is not found.

    Raises CheckpointError that names the file, and its first field that is wrong or its first
    tensor that is missing, surplus or of another shape or dtype.
    """

    def __init__(self, directory: str | Path) -> None:
        self.folder = Path(directory)
        self.family, self.shape = read_shape(directory)
        config = ModelConfig(**self.shape)
        self.parts = {
            p.name: list(parts(self.family, config, p.name, p.shape))
            for p in build(config).parameters()
        }
        every = [part for parts in self.parts.values() for part in parts]
        self.expected = {self._bare(part.name): part.shape for part in every}
        [self.output] = self.family.their_names("output.weight")
        [embedding] = self.family.their_names("token_embedding.weight")
        self.embedding = self._bare(embedding)
        self.is_tied = self.output not in self.expected
        self.found: dict[str, tuple[Any, str]] = {}  # bare name: open file, name in it
        with _readable(self.folder):
            paths = _weight_files(self.folder)
        self.files = [self.folder / CONFIG, *paths]
        for path in paths:
            file = _open(path)
            for name in file.keys():  # noqa: SIM118  (a safetensors file is not a mapping)
                self._add(path, file, name)
        for name in self.expected:
            if name not in self.found:
                raise CheckpointError(
                    f"{_shown(self.folder)}: expected the {len(self.expected)} tensors of "
                    f"{CONFIG}, got no {name}"
                )
        self._check_copy()

    def _bare(self, name: str) -> str:
        """A name without the prefix, which files of the model without its output lack."""
        return name.removeprefix(self.family.blocks.partition(".")[0] + ".")

    def _add(self, path: Path, file: Any, name: str) -> None:
        """Add one tensor, or refuse it."""
        bare = self._bare(name)
        if _BUFFER.fullmatch(bare):
            return
        where = f"{_shown(path)}: tensor {single_line(name)}"
        if bare in self.found:
            raise CheckpointError(f"{where}: expected once, got twice")
        # With tied embeddings the file may contain a copy as the output projection.
        is_copy = bare == self.output and self.is_tied
        shape = self.expected.get(self.embedding if is_copy else bare)
        if shape is None:
            raise CheckpointError(f"{where}: expected only the tensors of {CONFIG}, got another")
        claim = file.get_slice(name)
        _check_claim(where, shape, tuple(claim.get_shape()), claim.get_dtype())
        self.found[bare] = file, name

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, parts in self.parts.items():
            tensors = [
                _turned(self.family, name, self._tensor(self._bare(part.name))) for part in parts
            ]
            yield name, torch.cat(tensors) if tensors[1:] else tensors[0]

    def _tensor(self, bare: str) -> Tensor:
        file, name = self.found[bare]
        return file.get_tensor(name)

    def _check_copy(self) -> None:
        """Check that an output projection saved with tied embeddings is equal to the embedding.
        If they differ, transformers 4 follows the config and transformers 5 the tensors."""
        if not self.is_tied or self.output not in self.found:
            return
        output, embedding = self._tensor(self.output), self._tensor(self.embedding)
        if output.dtype != embedding.dtype or not torch.equal(output, embedding):
            raise CheckpointError(
                f"{_shown(self.folder / CONFIG)}: tie_word_embeddings: expected false, got true: "
                f"{self.output} differs from {self.embedding}"
            )


def read_shape(directory: str | Path) -> tuple[Family, dict[str, Any]]:
    """The family of a folder's model, and its shape as keywords of `ModelConfig`.

    Raises CheckpointError: "FILE: FIELD: expected X, got Y".
    """
    if not os.path.isdir(directory):
        raise CheckpointError(
            f"{_shown(directory)}: expected a folder with {CONFIG} and {WEIGHTS}, got no such "
            "folder; nothing is downloaded"
        )
    path = Path(directory) / CONFIG
    return config_json.read(_read_json(path), _shown(path))


def _check_claim(where: str, expected: tuple[int, ...], shape: tuple[int, ...], dtype: str) -> None:
    """Check a tensor's shape, in their orientation, and its dtype."""
    if shape != expected:
        raise CheckpointError(f"{where}: expected shape {expected}, as {CONFIG} says, got {shape}")
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
    """Write a model as the folder that `AutoModelForCausalLM.from_pretrained` reads.

    weights: all parameters by our names, on any device; they keep their dtype, which config.json
    records. tokenizer: written as `AutoTokenizer.from_pretrained` reads it, with the settings of
    generation. Each file is replaced atomically: the weights first, the config last. Files of other
    names in the folder stay.

    Raises ConfigError if the model is none of transformers', CheckpointError if a file cannot be
    written, and the earlier file then stays, or if the folder has weights in several files.
    """
    family = config_json.family_of(config)
    folder = Path(directory)
    fields = config_json.write(family, config)
    tensors = all_theirs(family, config, weights)
    dtype = next(iter(tensors.values())).dtype
    end = tokenizer and tokenizer.eot_id
    ids = {"bos_token_id": end, "eos_token_id": end}
    texts = {} if tokenizer is None else _tokenizer_files(tokenizer, config, ids)
    texts[CONFIG] = _text({**fields, "dtype": str(dtype).removeprefix("torch."), **ids})
    path = folder
    try:
        if (folder / INDEX).exists():  # some programs would read its files and ours
            raise CheckpointError(
                f"{_shown(folder)}: expected a folder without weights in several files, "
                f"got {INDEX}; choose another"
            )
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


def all_theirs(
    family: Family, config: ModelConfig, weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Views of our weights as the tensors that a reader of the family expects; zeros for biases
    that the family always has and our model lacks."""
    tensors = to_theirs(family, config, weights.items())
    some = next(iter(tensors.values()))
    _, shape = config_json.read(config_json.write(family, config), CONFIG)
    expected = ModelConfig(**shape)
    for p in build(expected).parameters():
        for part in parts(family, expected, p.name, p.shape):
            if part.name not in tensors:
                tensors[part.name] = some.new_zeros(part.shape)
    return tensors


def _tokenizer_files(
    tokenizer: SavedTokenizer, config: ModelConfig, ids: dict[str, Any]
) -> dict[str, str]:
    """{name: text} of what is written with a tokenizer."""
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
        "generation_config.json": _text(ids),
    }


def _text(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


def _write_tensors(file: FileIO, tensors: dict[str, Tensor]) -> None:
    """Write the safetensors format, one tensor in memory at a time, unlike the package's writer."""
    write_all(file, header_for({"format": "pt"}, tensors))  # transformers requires this metadata
    for tensor in tensors.values():
        write_all(file, content_of(tensor))
