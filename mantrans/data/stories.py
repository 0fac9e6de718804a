"""The built-in stories: simple English that a small model learns in minutes.

They are part of the package as one compressed text, written by `tools/stories.py`.
"""

from __future__ import annotations

import lzma

from mantrans.assets import ASSETS

COUNT = 10_500
SEPARATOR = "\n<|endoftext|>\n"
FILE = ASSETS / "stories" / "stories.txt.xz"


def stories() -> list[str]:
    """All `COUNT` stories, each one or two paragraphs, always in the same order."""
    return lzma.decompress(FILE.read_bytes()).decode().split(SEPARATOR)
