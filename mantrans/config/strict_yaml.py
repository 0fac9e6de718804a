"""Reads a small YAML file, possibly a malicious one, or says in one line why not.

Only a part of YAML is accepted: mappings with plain keys, lists, text, numbers, true/false and
null. Anchors and aliases are refused, so that a file cannot expand (the "billion laughs"); so are
tags (`!!python/...`), duplicate keys, deep nesting and large files. Numbers follow YAML 1.2, where
`3e-4` is a number; PyYAML follows 1.1, where it is text.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any

import yaml

from mantrans.errors import ConfigError, single_line

MAX_BYTES = 64 * 1024  # 50 times a configuration; any such file is read in about a second

_SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": "true|True|TRUE|false|False|FALSE|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF",
    # Longer integers stay text: no field needs them, and int() is quadratic in their length.
    "int": r"[-+]?(?:0|[1-9][0-9_]{0,30})",
    "float": r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases, tags, duplicate keys or unbounded size."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _refusal(event, "anchors and aliases (& and *) are not accepted")
        if getattr(event, "tag", None):
            raise _refusal(event, "tags (such as !!str) are not accepted")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refusal(key, "a key must be plain text")
            if key.value in seen:
                raise _refusal(key, f"the key {key.value!r} is given twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _refusal(place: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which `_Loader` would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.yaml_implicit_resolvers = {}  # none of YAML 1.1's: dates, octal, base 60
for _type, _pattern in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _whole = re.compile(rf"(?:{_pattern})\Z")
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_type}", _whole, None)


def parse(text: str, source: str) -> Any:
    """Return the plain Python value that `text` describes (None for an empty text).

    Raises:
        ConfigError: the text is not in the accepted part of YAML; the message starts with `source`.
    """
    try:
        return _Loader(text).get_single_data()
    except RecursionError:
        raise ConfigError(f"{source}: nested too deep; expected plain YAML") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}:" if mark is not None else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
        raise ConfigError(f"{source}:{where} {single_line(reason)}; expected plain YAML") from None


def read(path: str | Path) -> Any:
    """Return the plain Python value in the YAML file at `path`.

    Raises:
        ConfigError: the file is missing, too large, not UTF-8, or not accepted YAML.
    """
    source = single_line(str(path))
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):  # checked first: opening a pipe would wait
            raise ValueError("not a regular file")
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if not raw.strip() or len(raw) > MAX_BYTES:
            raise ValueError("too large" if raw.strip() else "the file is empty")
        text = raw.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = single_line(getattr(error, "strerror", None) or str(error))
        limit = f"at most {MAX_BYTES // 1024} KiB"
        raise ConfigError(
            f"{source}: cannot be read ({reason}); expected a YAML file in UTF-8 of {limit}"
        ) from None
    return parse(text, source)


def dump(value: Any) -> str:
    """Return YAML that `parse` reads back as an equal value; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
