"""Reads a small YAML file that a stranger may have written, or says in one line why not.

What is accepted is deliberately less than YAML: mappings with plain keys, lists, text, numbers,
true/false and null. Anchors and aliases are refused, so a file cannot expand into more than it
holds (the "billion laughs"); so are tags (`!!python/...`), duplicate keys, deep nesting and files
larger than a configuration has reason to be. Numbers follow YAML 1.2, where `3e-4` is a number;
PyYAML by itself follows 1.1, where it is text.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any

import yaml

from mantrans.errors import ConfigError

MAX_BYTES = 256 * 1024
MAX_NODES = 10_000
MAX_DEPTH = 12

_NUMBER_START = list("-+0123456789.")
# Longer integers stay text: no setting needs them, and int() is quadratic in their length.
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]{0,30})\Z")
_FLOAT = re.compile(
    r"(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
)
_BOOLEAN = re.compile(
    r"(?:true|True|TRUE|false|False|FALSE|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF)\Z"
)
_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader without aliases, tags, duplicate keys or unbounded size."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.n_nodes = 0
        self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        problem = None
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            problem = "anchors and aliases (& and *) are not accepted"
        elif getattr(event, "tag", None) is not None:
            problem = "tags (such as !!str) are not accepted"
        elif self.depth >= MAX_DEPTH:
            problem = f"nested more than {MAX_DEPTH} deep"
        elif self.n_nodes >= MAX_NODES:
            problem = f"more than {MAX_NODES} values"
        if problem is not None:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self.n_nodes += 1
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            mark = key.start_mark
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be plain text", problem_mark=mark)
            if key.value in seen:
                problem = f"the key {key.value!r} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes whatever `_StrictLoader` would not read back as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_StrictLoader.yaml_implicit_resolvers = {}  # none of YAML 1.1's: dates, octal, base 60, merging
for _tag, _pattern, _first in (
    ("null", _NULL, ["~", "n", "N", ""]),
    ("bool", _BOOLEAN, list("tTfFyYnNoO")),
    ("int", _INTEGER, _NUMBER_START),
    ("float", _FLOAT, _NUMBER_START),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)


def parse(text: str, source: str) -> Any:
    """Return the plain Python value that `text` describes (None for an empty text).

    Raises:
        ConfigError: the text is not in the accepted part of YAML; the message opens with `source`.
    """
    loader: _StrictLoader | None = None
    try:
        loader = _StrictLoader(text)
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
        raise ConfigError(f"{source}:{where} {single_line(reason)}; accepted: plain YAML") from None
    finally:
        if loader is not None:
            loader.dispose()


def read(path: str | Path) -> Any:
    """Return the plain Python value in the YAML file at `path`.

    Raises:
        ConfigError: the file is missing, not a regular file, unreadable, larger than `MAX_BYTES`,
            empty, not UTF-8, or not in the accepted part of YAML.
    """
    source = single_line(str(path))
    try:
        is_file = stat.S_ISREG(Path(path).stat().st_mode)
        raw = b""
        if is_file:
            with open(path, "rb") as file:
                raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{source}: no such file; accepted: the path of a YAML file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{source}: cannot be read ({single_line(reason)})") from None
    if not is_file:
        raise ConfigError(f"{source}: not a regular file; accepted: a YAML file")
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{source}: larger than {MAX_BYTES // 1024} KiB; accepted: a short file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{source}: byte {error.start} (0x{raw[error.start]:02x}) is not UTF-8; "
            "accepted: a text file in UTF-8"
        ) from None
    if not text.strip():
        raise ConfigError(f"{source}: the file is empty; accepted: YAML with a `model:` section")
    return parse(text, source)


def dump(value: Any) -> str:
    """Return YAML that `parse` reads back as an equal value; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def single_line(text: str) -> str:
    """Return `text` fit for one line of a terminal: unprintable characters escaped, length cut."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return shown if len(shown) <= 200 else shown[:197] + "..."
