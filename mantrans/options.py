"""One setting of a configuration: its limits, and what to say of a value outside them.

`option(...)` declares a dataclass field with its meaning and limits; `checked_value` holds a value
from a stranger against the field's type and those limits. Every message is one line, whatever the
value was: thousands of digits, control characters, a mapping where a number belongs.
"""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from mantrans.errors import ConfigError
from mantrans.strict_yaml import single_line

_NUMERIC_TEXT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


def option(
    default: Any,
    meaning: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
    pattern: str | None = None,
    form: str | None = None,
) -> Any:
    """Declare one setting: its default, its meaning in a line, and the values it may take.

    `pattern` is a regular expression the whole text must match; `form` says it in words.
    """
    limits = {
        "meaning": meaning,
        "at_least": at_least,
        "at_most": at_most,
        "above": above,
        "below": below,
        "choices": choices,
        "pattern": pattern,
        "form": form,
    }
    if isinstance(default, tuple):
        return field(default_factory=lambda: list(default), metadata=limits)
    return field(default=default, metadata=limits)


def kind_of(hint: Any) -> tuple[Any, bool]:
    """Return the type of a field annotated `hint`, and whether null is accepted too."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not type(None)), True
    return hint, False


def checked_value(value: Any, hint: Any, limits: Mapping[str, Any], where: str) -> Any:
    """Return `value` as its field's type, or raise ConfigError saying what is accepted."""
    kind, nullable = kind_of(hint)
    if value is None and nullable:
        return None
    if kind is float:
        value = _as_float(value)
    if _is_a(value, kind) and _within(value, limits):
        return value
    nearest = ""
    if limits["choices"] and isinstance(value, str):
        match = difflib.get_close_matches(value, limits["choices"], n=1)
        nearest = f"; did you mean {match[0]!r}?" if match else ""
    accepted = _accepted(kind, nullable, limits)
    raise ConfigError(f"{where}: found {show(value)}; accepted: {accepted}{nearest}")


def _as_float(value: Any) -> Any:
    """Return the number an int, a float or numeric text stands for; anything else unchanged."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_numeric_text = (
        isinstance(value, str) and len(value) < 64 and _NUMERIC_TEXT.fullmatch(value) is not None
    )
    if not is_number and not is_numeric_text:
        return value
    try:
        return float(value)
    except OverflowError:
        return value


def _is_a(value: Any, kind: Any) -> bool:
    """Say whether `value` is of the declared type: bool is not int, text is printable UTF-8."""
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, float) and math.isfinite(value)
    if kind is str:
        # Names and paths: a line break or NUL in one is a mistake or an attack.
        return isinstance(value, str) and value != "" and len(value) <= 4096 and value.isprintable()
    if kind is bool:
        return isinstance(value, bool)
    return isinstance(value, list) and all(_is_prompt(item) for item in value)


def _is_prompt(value: Any) -> bool:
    """Say whether `value` is text that can be encoded: no NUL, no lone surrogate."""
    if not isinstance(value, str) or value == "" or "\0" in value:
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _within(value: Any, limits: Mapping[str, Any]) -> bool:
    """Say whether a value of the right type respects its field's limits."""
    return (
        (limits["at_least"] is None or value >= limits["at_least"])
        and (limits["at_most"] is None or value <= limits["at_most"])
        and (limits["above"] is None or value > limits["above"])
        and (limits["below"] is None or value < limits["below"])
        and (limits["choices"] is None or value in limits["choices"])
        and (limits["pattern"] is None or re.fullmatch(limits["pattern"], value) is not None)
    )


def _accepted(kind: Any, nullable: bool, limits: Mapping[str, Any]) -> str:
    """Say in words what a field takes, as the end of an error message."""
    if limits["choices"]:
        words = "one of " + ", ".join(limits["choices"])
    elif limits["form"]:
        words = limits["form"]
    else:
        named: dict[Any, str] = {
            int: "an integer",
            float: "a finite number",
            bool: "true or false",
            str: "one line of text, in quotes if it looks like a number",
        }
        words = named.get(kind, "a list of texts, none empty")
    bounds = (
        ("at_least", "at least"),
        ("above", "above"),
        ("at_most", "at most"),
        ("below", "below"),
    )
    stated = [
        f"{text} {limits[key]:g}" if kind is float else f"{text} {limits[key]}"
        for key, text in bounds
        if limits[key] is not None
    ]
    return " ".join([words, " and ".join(stated)]).strip() + (" or null" if nullable else "")


def show(value: Any) -> str:
    """Return a value and its kind for an error message: one short line, whatever the value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        # Python refuses to print integers of thousands of digits.
        return str(value) if value.bit_length() <= 128 else f"a {value.bit_length()}-bit integer"
    if isinstance(value, str):
        shown = single_line(value)
        return f"{shown if len(shown) <= 60 else shown[:57] + '...'} (text)" if shown else "''"
    if isinstance(value, float):
        return f"{value!r} (number)"
    words: dict[Any, str] = {list: "a list", dict: "a mapping"}
    return words.get(type(value), f"a {type(value).__name__}")
