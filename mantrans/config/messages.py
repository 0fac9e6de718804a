"""What pydantic found wrong, as one line: where, what was expected, what came.

What a field expects is read from its JSON schema, so that messages, the editors' schema and the
reference page say the same.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from mantrans.errors import ConfigError, show, single_line

Names = Mapping[str, str]
NO_NAMES: Names = MappingProxyType({})

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
    """Say in words what the field of a JSON schema takes, such as "an integer at least 1"."""
    if "anyOf" in schema:
        return f"{accepted(schema['anyOf'][0])}, or null"
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    if "patternErrorMessage" in schema:
        return schema["patternErrorMessage"]
    form = "g" if schema["type"] == "number" else "d"
    bounds = [f"{word} {schema[key]:{form}}" for key, word in _BOUNDS.items() if key in schema]
    return " ".join([_WORDS[schema["type"]], " and ".join(bounds)]).strip()


def clash(field: str, expected: str, got: Any, other: str = "") -> PydanticCustomError:
    """The error of a field that does not fit `other`, whose name replaces {} in `expected`."""
    context = {"field": field, "expected": expected, "got": got, "other": other}
    return PydanticCustomError("clash", "fields that do not fit", context)


def refusal(
    wrong: ValidationError, kind: type[BaseModel], source: str, names: Names, sources: Names
) -> ConfigError:
    """The first thing that is wrong with values for a `kind`, an unknown name before all else.

    names, sources: as of `mantrans.config.Section.checked`.
    """

    def path(*parts: str) -> str:
        return ".".join(names.get(part, part) for part in parts if part)

    errors: list[Any] = wrong.errors(include_url=False)
    error = next((e for e in errors if _is_unknown(kind, e)), errors[0])
    holder, section, rest = _located(kind, error["loc"])
    if _is_unknown(kind, error):
        name = rest[0] if error["type"] == "extra_forbidden" else error["input"]
        where = sources.get(path(section, str(name)), source)
        expected, got = _known(kind, holder, section, name)
    elif error["type"] == "clash":
        found = error["ctx"]
        where = f"{source}: {path(section, found['field'])}"
        expected = found["expected"].format(path(section, found["other"]))
        got = show(found["got"])
    elif rest:
        name = path(section, rest[0])
        where = sources.get(name, f"{source}: {name}")
        expected, got = _field(holder.model_json_schema()["properties"][rest[0]], error["input"])
        got += f" as item {rest[1] + 1}" if len(rest) > 1 else ""
    else:
        where = sources.get(section, f"{source}: {section}" if section else source)
        inside = ", ".join(_sections(holder))
        expected = f"the sections {inside}" if inside else "a mapping of its fields"
        got = show(error["input"])
    return ConfigError(f"{where}: expected {expected}, got {got}")


def _sections(kind: type[BaseModel]) -> dict[str, Any]:
    """The fields of `kind` that are models themselves."""
    annotations = {name: field.annotation for name, field in kind.model_fields.items()}
    return {name: hint for name, hint in annotations.items() if hasattr(hint, "model_fields")}


def _located(kind: type[BaseModel], place: tuple) -> tuple[type[BaseModel], str, tuple]:
    """The model that an error's `place` lies in, its section ("" for none), the rest of `place`."""
    holder = _sections(kind).get(place[0]) if place else None
    return (holder, place[0], place[1:]) if holder else (kind, "", place)


def _is_unknown(kind: type[BaseModel], error: Mapping[str, Any]) -> bool:
    """Say whether the error is about a name: of no field, or no text at all."""
    holder, _, rest = _located(kind, error["loc"])
    is_whole = error["type"] in ("clash", "model_type")
    return not is_whole and (not rest or rest[0] not in holder.model_fields)


def _known(kind: type[BaseModel], holder: type[BaseModel], section: str, name: Any) -> Any:
    """(expected, got) for an unknown name; the nearest known one, if there is one, with it."""
    inner = _sections(kind)
    what = "a section" if _sections(holder) else "a field" + (section and f" of {section}")
    if isinstance(name, str):
        near = [f"{home}.{name}" for home, model in inner.items() if name in model.model_fields]
        close = difflib.get_close_matches(name[:100], holder.model_fields, n=1)
        near += [f"{section}.{match}" if section else match for match in close]
        if near:
            return what, f"{single_line(name)}; did you mean {near[0]}?"
    return f"{what} ({', '.join(holder.model_fields)})", show(name)


def _field(schema: Mapping[str, Any], got: Any) -> tuple[str, str]:
    """(expected, got) for the value of a field; the nearest choice, if there is one, with it."""
    close = difflib.get_close_matches(got, schema.get("enum", []), n=1) if type(got) is str else []
    return accepted(schema), show(got) + "".join(f"; did you mean {match!r}?" for match in close)
