"""The built-in stories: a language in miniature, learnable in minutes by a small model.

They come with the package as one compressed text, which `tools/stories.py` made.
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
