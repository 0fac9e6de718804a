"""What comes with the package besides code: configs, the shipped tokenizer, the built-in stories.

`configs` and `tokenizers` are links to the folders at the top of the repository, where people look
for them; a wheel holds the files themselves.
"""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent


def find_config(path: str | Path) -> Path:
    """`path`; for a configs/NAME.yaml that is not here, as outside a clone, the shipped one."""
    shipped = ASSETS / path
    in_configs = Path(path).parent == Path("configs")
    return shipped if in_configs and not Path(path).exists() and shipped.is_file() else Path(path)
