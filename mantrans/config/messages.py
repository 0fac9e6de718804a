"""Turns pydantic's errors into one line: "FILE: FIELD: expected X, got Y".

What a field accepts is read from its JSON schema, so that messages, the editors' schema and the
reference page say the same.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from operator import attrgetter
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from mantrans.errors import ConfigError, show, single_line

Names = Mapping[str, str]
NO_NAMES: Names = MappingProxyType({})

# What other trainers call our fields.
ELSEWHERE = {
    "lr": "training.learning_rate",
    "max_lr": "training.learning_rate",
    "min_lr": "training.min_learning_rate",
    "lr_scheduler": "training.lr_decay",
    "lr_scheduler_type": "training.lr_decay",
    "scheduler": "training.lr_decay",
    "warmup": "training.warmup_steps",
    "warmup_iters": "training.warmup_steps",
    "epochs": "training.num_epochs",
    "num_train_epochs": "training.num_epochs",
    "steps": "training.max_steps",
    "max_iters": "training.max_steps",
    "num_steps": "training.max_steps",
    "batch": "training.batch_size",
    "per_device_train_batch_size": "training.batch_size",
    "accumulate": "training.gradient_accumulation_steps",
    "grad_clip": "training.max_grad_norm",
    "clip": "training.max_grad_norm",
    "wd": "training.weight_decay",
    "eps": "training.epsilon",
    "model_name_or_path": "training.init_from",
    "pretrained": "training.init_from",
    "name": "training.experiment_name",
    "run_name": "training.experiment_name",
    "eval_interval": "training.eval_every",
    "eval_steps": "training.eval_every",
    "log_interval": "training.log_every",
    "logging_steps": "training.log_every",
    "save_steps": "training.save_every",
    "n_layer": "model.n_blocks",
    "n_layers": "model.n_blocks",
    "num_layers": "model.n_blocks",
    "num_hidden_layers": "model.n_blocks",
    "depth": "model.n_blocks",
    "n_head": "model.n_heads",
    "num_heads": "model.n_heads",
    "num_attention_heads": "model.n_heads",
    "n_embd": "model.d_model",
    "hidden_size": "model.d_model",
    "dim": "model.d_model",
    "width": "model.d_model",
    "d_ff": "model.d_ffn",
    "intermediate_size": "model.d_ffn",
    "block_size": "model.max_seq_len",
    "context_length": "model.max_seq_len",
    "n_positions": "model.max_seq_len",
    "n_ctx": "model.max_seq_len",
    "seq_len": "data.max_length",
    "sequence_length": "data.max_length",
    "file": "data.path",
    "max_new_tokens": "evaluation.max_generation_length",
    "prompts": "evaluation.generation_prompts",
}

_UNKNOWN = ("extra_forbidden", "invalid_key")
_WORDS = {
    "integer": "an integer",
    "number": "a finite number",
    "boolean": "true or false",
    "string": "one line of text, in quotes if it looks like a number",
    "array": "a list of texts, none empty",
}
_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


def accepted(schema: Mapping[str, Any]) -> str:
    """Describe what a field of a JSON schema accepts, such as "an integer at least 1"."""
    if "anyOf" in schema:
        return ", or ".join(accepted(part) for part in schema["anyOf"])
    if schema.get("type") == "null":
        return "null"
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    if "patternErrorMessage" in schema:
        return schema["patternErrorMessage"]
    form = "g" if schema["type"] == "number" else "d"
    bounds = [f"{word} {schema[key]:{form}}" for key, word in _BOUNDS.items() if key in schema]
    return " ".join([_WORDS[schema["type"]], " and ".join(bounds)]).strip()


def clash(holder: BaseModel, field: str, expected: str, other: str = "") -> PydanticCustomError:
    """The error of a field that does not fit another field of `holder`.

    expected: what would fit; its two {} are replaced by the other field's name and value.
    """
    got, value = (attrgetter(name)(holder) if name else None for name in (field, other))
    context = {"field": field, "expected": expected, "got": got, "other": other, "value": value}
    return PydanticCustomError("clash", "fields that do not fit", context)


def refusal(
    wrong: ValidationError, kind: type[BaseModel], source: str, names: Names, sources: Names
) -> ConfigError:
    """The first error in values for a `kind`; unknown names come before all others.

    names, sources: as of `mantrans.config.Section.checked`.
    """

    def path(*parts: str) -> str:
        return ".".join(names.get(part, part) for part in parts if part)

    errors: list[Any] = wrong.errors(include_url=False)
    error = min(errors, key=lambda e: e["type"] not in _UNKNOWN)
    place = error["loc"]
    section = place[0] if place and place[0] in _sections(kind) else ""
    holder, rest = _sections(kind).get(section, kind), place[1:] if section else place
    if error["type"] in _UNKNOWN:
        name = error["input"] if error["type"] == "invalid_key" else rest[0]
        where = sources.get(path(section, str(name)), source)
        expected, got = _known(kind, holder, section, name)
    elif error["type"] == "clash":
        found = error["ctx"]
        where = f"{source}: {path(section, found['field'])}"
        value = "true" if found["value"] is True else found["value"]
        expected = found["expected"].format(path(section, found["other"]), value)
        got = show(found["got"])
    elif rest:
        name = path(section, rest[0])
        where = sources.get(name, f"{source}: {name}")
        expected, got = _field(_properties(holder)[rest[0]], error["input"])
        expected = error["msg"] if error["type"] == "home" else expected
        got += f" as item {rest[1] + 1}" if isinstance(rest[-1], int) else ""
        got += ", which float32 does not hold" if error["type"] == "float32" else ""
    else:
        where = sources.get(section, f"{source}: {section}" if section else source)
        inside = ", ".join(_sections(holder))
        expected = f"the sections {inside}" if inside else "a mapping of its fields"
        got = show(error["input"])
    return ConfigError(f"{where}: expected {expected}, got {got}")


@functools.cache
def _properties(kind: type[BaseModel]) -> dict[str, Any]:
    """The JSON schemas of the fields of `kind`."""
    return kind.model_json_schema()["properties"]


def _sections(kind: type[BaseModel]) -> dict[str, Any]:
    """The fields of `kind` that are sections."""
    annotations = {name: field.annotation for name, field in kind.model_fields.items()}
    return {name: hint for name, hint in annotations.items() if hasattr(hint, "model_fields")}


def _known(kind: type[BaseModel], holder: type[BaseModel], section: str, name: Any) -> Any:
    """(expected, got) for an unknown name, with the most similar known name if there is one."""
    inner = _sections(kind)
    what = "a section" if _sections(holder) else "a field" + (section and f" of {section}")
    if isinstance(name, str):
        near = [f"{home}.{name}" for home, model in inner.items() if name in model.model_fields]
        near += [ELSEWHERE[name.lower()]] if name.lower() in ELSEWHERE else []
        close = difflib.get_close_matches(name[:100], holder.model_fields, n=1)
        near += [f"{section}.{match}" if section else match for match in close]
        if near:
            return what, f"{single_line(name)}; did you mean {near[0]}?"
    return f"{what} ({', '.join(holder.model_fields)})", show(name)


def _field(schema: Mapping[str, Any], got: Any) -> tuple[str, str]:
    """(expected, got) for the value of a field, with the most similar choice if there is one."""
    choices = [name for part in (schema, *schema.get("anyOf", [])) for name in part.get("enum", [])]
    close = difflib.get_close_matches(got, choices, n=1) if type(got) is str else []
    return accepted(schema), show(got) + "".join(f"; did you mean {match!r}?" for match in close)
