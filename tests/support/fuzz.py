"""Configurations as people and programs get them wrong, for hypothesis."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from hypothesis import strategies as st

from mantrans.config import SECTIONS

FIELDS = [(section, field) for section, kind in SECTIONS.items() for field in kind.model_fields]
# What is a setting somewhere, or nearly one, or nothing at all. No number between 64 and 2^60: a
# run of that size may be valid, and runs of these configurations must end.
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.integers(min_value=2**60),
    st.integers(min_value=2**60).map(lambda n: n**20),
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(0.0, 1.0),
    st.text(max_size=8),
    st.sampled_from(
        ["", "1", "3e-4", "nan", "..", "../x", "auto", "cpu", "cuda:3", "triton", "native",
         "reference", "bfloat16", "float64", "sgd", "block", "wsd", "local", "gpt", "a\0b",
         "\ud800", "/dev/null", "/proc/self/mem", "x" * 300, "tinystories_bpe_4096"]
    ),
)  # fmt: skip
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=5), SCALARS)
KINDS = ["value"] * 6 + ["default"] * 3 + ["drop", "drop", "unknown", "section", "nest", "top"]
Change = tuple[str, str, str, Any]


def changes() -> st.SearchStrategy[list[Change]]:
    """Up to three changes to a configuration: (kind, section, field, value)."""
    change = st.tuples(st.sampled_from(KINDS), st.sampled_from(FIELDS), VALUES)
    return st.lists(change.map(lambda c: (c[0], *c[1], c[2])), max_size=3)


def changed(values: dict[Any, Any], wanted: list[Change]) -> Any:
    """The configuration with these changes, made in place."""
    for kind, section, field, value in wanted:
        inside = values.get(section)
        key = value if isinstance(value, Hashable) else f"{field}_"
        if kind == "top":
            return value
        if kind == "section":
            values[section] = value
            values[key] = value
        elif not isinstance(inside, dict):
            continue
        elif kind == "drop":
            inside.pop(field, None)
        elif kind == "unknown":
            inside[key] = value
        elif kind == "nest":
            inside[field] = {section: dict(inside)}
        elif kind == "default" and field != "dataset":  # which would be one of a hub
            inside[field] = getattr(SECTIONS[section](), field)
        else:
            inside[field] = value
    return values
