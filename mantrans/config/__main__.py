"""Print the schema or the reference page: `python -m mantrans.config --schema | --reference`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from mantrans import terminal
from mantrans.config import SECTIONS, Config
from mantrans.config.messages import accepted

HEAD = """# Configuration

Written by `python -m mantrans.config --reference` from the fields in `mantrans/config`.

A run is described by a YAML file of four sections. Every field may be left out. Any field can be
changed for one run: `python train.py --config configs/quickstart.yaml --set training.seed=2`. A
value that is not accepted, or an unknown name, ends the command with one line. Numbers are used in
float32: what it rounds to 0 (below 1.2e-38), or to a limit that is not accepted, is refused too.

Editors check and complete a configuration with [`configs/schema.json`](../configs/schema.json), for
example VS Code's YAML extension, if the first line is
`# yaml-language-server: $schema=schema.json`.
"""


class _WithoutTitles(GenerateJsonSchema):
    """Without titles, which would repeat the fields' names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schema() -> str:
    """Return the JSON schema of a configuration, as text."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    described = Config.model_json_schema(schema_generator=_WithoutTitles)
    return json.dumps(dialect | described, indent=2, ensure_ascii=False) + "\n"


def reference() -> str:
    """Return the reference page: each field's default, meaning and accepted values."""
    lines = [HEAD]
    for name, section in SECTIONS.items():
        lines += [f"## {name}", "", section.__doc__, ""]
        lines += ["| field | default | meaning | accepted |", "|---|---|---|---|"]
        fields = section.model_json_schema()["properties"]
        lines += [_row(field, described) for field, described in fields.items()]
        lines.append("")
    return "\n".join(lines)


def _row(name: str, described: dict[str, Any]) -> str:
    default = json.dumps(described["default"])
    cells = [f"`{name}`", f"`{default}`", described["description"], accepted(described)]
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def main() -> None:
    """Print the schema or the reference page."""
    parser = argparse.ArgumentParser(prog="python -m mantrans.config", description=__doc__)
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--schema", action="store_true", help="for editors: configs/schema.json")
    wanted.add_argument("--reference", action="store_true", help="docs/configuration.md")
    terminal.show(schema() if parser.parse_args().schema else reference(), end="")


if __name__ == "__main__":
    main()
