"""`python -m tools.step_picture CHECKPOINT`: the README's picture of `mantrans explain`.

A headless Chromium opens the page of the checkpoint at one gradient, by day and by night.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from PIL import Image

from mantrans.explain.page import write_page
from tests.support.browser import Browser

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
SIZE = 1360, 1440
MOMENT = "blocks.1.mlp/backward"
COLORS = 224


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = write_page(options.checkpoint, output=Path(folder))
        with Browser(Path(folder) / "profile") as browser:
            for name, dark in (("step.png", False), ("step-dark.png", True)):
                browser.open(page, *SIZE, dark=dark, address=MOMENT)
                browser.wait("scrollY > 0", "the page does not scroll to its box")
                taken = Path(folder) / name
                browser.screenshot(taken)
                with Image.open(taken) as picture:
                    few = picture.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
                    few.save(FIGURES / name, optimize=True)
                print(f"{FIGURES / name}: {(FIGURES / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
