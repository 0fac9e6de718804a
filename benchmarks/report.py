"""Writes the results into docs/benchmarks.md and draws their figures, from the newest rows.

    python -m benchmarks.report [--output FOLDER]

With another folder of results than the repository's, page and figures go into that folder.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks import commandline, comparison, figures, records, tables
from benchmarks.records import RESULTS, Row

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BEGIN = "<!-- results: written by python -m benchmarks.report, not by hand -->"
END = "<!-- end of results -->"
NOTHING = "No results: there are no rows."


def main() -> None:
    arguments = commandline.arguments(__doc__ or "", seconds=60)
    rows = records.newest(records.load(arguments.output), arguments.quick)
    own = arguments.output.resolve() != RESULTS.resolve()
    page = arguments.output / "benchmarks.md" if own else PAGE
    write(rows, page)
    print(summary(rows))
    print(f"written to {page}")


def write(rows: Sequence[Row], page: Path) -> None:
    """Replace what stands between the marks of `page`; a page that is not there begins as ours."""
    text = (page if page.exists() else PAGE).read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    sections = [section(device_rows, page) for device_rows in by_device(rows).values()]
    middle = "\n\n".join(sections) or NOTHING
    page.write_text(f"{before}{BEGIN}\n\n{middle}\n\n{END}{after}", encoding="utf-8")


def by_device(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """device -> its rows; GPUs before CPUs."""
    devices = sorted(
        {row.device for row in rows}, key=lambda name: (name.endswith("threads"), name)
    )
    return {device: [row for row in rows if row.device == device] for device in devices}


def section(rows: Sequence[Row], page: Path) -> str:
    """All of one device: tables with their figures, in the order in which one reads them."""
    device = rows[0].device
    pictures = figures.draw(rows, device, page.parent / "figures")
    parts = [f"## {device}", tables.provenance(rows)]

    def add(stage: str, heading: str, table, title: str = "") -> None:
        if not any(row.stage == stage for row in rows):
            return
        parts.extend([f"### {heading}", table(rows)])
        for name, path in pictures.items():
            if title and name.startswith(title):
                parts.append(f"![{name}, {device}]({os.path.relpath(path, page.parent)})")

    add("ceilings", "Ceilings", tables.ceilings)
    add("steps", "Training steps", tables.steps, "Training steps")
    add("kernels", "Operations", tables.kernels, "Operations")
    if any(row.stage == "kernels" for row in rows):
        details = tables.kernel_details(rows)
        parts.append(f"<details><summary>Everybody's figures</summary>\n\n{details}\n\n</details>")
    add("scaling", "Growth", tables.exponents, "How")
    add("bench", "The small set of `make bench`", tables.bench)
    return "\n\n".join(parts)


def summary(rows: Sequence[Row]) -> str:
    """A line per case: ours beside the fastest other."""
    lines = []
    for stage in ("steps", "kernels", "bench"):
        for case in comparison.comparisons(rows, stage):
            ours, rivals = case.ours, case.rivals
            if ours is None or not rivals:
                continue
            name = f"{ours.operation} {ours.direction} {ours.size} {ours.dtype}"
            lines.append(
                f"{name[:78]:78} {tables.short(comparison.milliseconds(ours)):>7} ms  "
                f"{case.times_faster(rivals[0]):5.2f}x {rivals[0].provider}"
            )
    return "\n".join(lines) or NOTHING


if __name__ == "__main__":
    main()
