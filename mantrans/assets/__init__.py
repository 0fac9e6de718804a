"""The package's data: configs, the shipped tokenizer, the built-in stories.

`configs` and `tokenizers` are links to the folders at the top of the repository; a wheel has the
files themselves.
"""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent


def find_config(path: str | Path) -> Path:
    """`path`; the shipped file for a configs/NAME.yaml that does not exist here."""
    shipped = ASSETS / path
    in_configs = Path(path).parent == Path("configs")
    return shipped if in_configs and not Path(path).exists() and shipped.is_file() else Path(path)
