"""What the gate writes: its record, the page docs/kernels.md, and the list of all kernels."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import triton

from tools.gate.cards import CARDS
from tools.gate.digest import RECORD, ROOT, digest
from tools.gate.run import CACHE, Result, Row

PAGE = ROOT / "docs/kernels.md"


def summary(capability: int, result: Result) -> dict[str, Any]:
    """One run in few numbers: an entry of the record."""
    return {
        "triton": triton.__version__,
        "capability": capability,
        "kernels": len(result.rows),
        "launches": result.launches,
        "violations": len(result.broken),
        "by_name": {name: worst(rows) for name, rows in grouped(result.rows).items()},
        "configs": {
            name: {"kernels": len(rows), "seconds": round(sum(r.seconds for r in rows))}
            for name, rows in first_steps(result.rows).items()
        },
    }


def grouped(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by the kernel's name, sorted."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.kernel.split()[0], []).append(row)
    return dict(sorted(found.items()))


def worst(rows: Sequence[Row]) -> dict[str, int]:
    """The largest needs of some kernels."""
    return {
        "configurations": len(rows),
        "registers": max(r.registers for r in rows),
        "shared": max(r.shared for r in rows),
        "programs": min(r.programs for r in rows),
        "most_programs": max(r.programs for r in rows),
        "spills": sum(r.stack > 0 or r.local > 0 for r in rows),
        "spilled": max(r.stack for r in rows),
    }


def first_steps(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The kernels that a run of each config needs until its first step is done."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        for group in row.groups:
            if group.startswith("config ") and not group.endswith(", later"):
                found.setdefault(group.removeprefix("config "), []).append(row)
    return dict(sorted(found.items()))


def write(capability: int, result: Result) -> None:
    """Put a run into the record, beside those of the same sources, and write the page anew."""
    record: dict[str, Any] = {"digest": digest(), "runs": []}
    if RECORD.exists() and (old := json.loads(RECORD.read_text()))["digest"] == record["digest"]:
        record = old
    entries = [*record["runs"], summary(capability, result)]
    new = {(entry["triton"], entry["capability"]): entry for entry in entries}
    record["runs"] = [new[key] for key in sorted(new)]
    runs = ",\n".join(json.dumps(run) for run in record["runs"])  # a line each
    RECORD.write_text(f'{{"digest": "{record["digest"]}", "runs": [\n{runs}\n]}}\n')
    PAGE.write_text(page(record))


# ------------------------------------------------------------------------------------ the page

INTRODUCTION = Path(__file__).with_name("introduction.md")


def page(record: dict[str, Any]) -> str:
    """docs/kernels.md."""
    runs = sorted(record["runs"], key=lambda run: (run["capability"], run["triton"]))
    parts = [
        INTRODUCTION.read_text(),
        "## What was run\n",
        table(RUN_HEADINGS, map(run_cells, runs)),
        not_run(runs),
        "\n## Until the first step\n\n"
        "Kernels that a run compiles for its self-check and its first step, and the seconds of "
        "one core (of a two-core machine) that Triton takes for them, one after the other. On "
        "a GPU, Triton 3.6 also builds a launcher for each signature, with a C compiler: about a "
        "second each, not counted here. A run compiles them on all its cores "
        "(`mantrans/training/compiling.py`); both are kept in Triton's cache.\n",
        table(*first_step_cells(runs)),
    ]
    for run in runs:
        card = CARDS[run["capability"]]
        parts.append(
            f"\n## {card.architecture}: {card.name}, Triton {run['triton']}\n\n"
            "The most registers a thread, the most bytes of shared memory a program, the fewest "
            "and most programs a multiprocessor, and how many configurations spill registers, with "
            "the most bytes a thread.\n"
        )
        parts.append(table(KERNEL_HEADINGS, map(kernel_cells, run["by_name"].items())))
    return "\n".join(parts) + "\n"


def not_run(runs: Sequence[dict[str, Any]]) -> str:
    """A line on the GPUs that the gate has not compiled these sources for."""
    missing = [
        card.architecture
        for n, card in CARDS.items()
        if n not in {run["capability"] for run in runs}
    ]
    return f"\nNot run with these sources: {', '.join(missing)}." if missing else ""


RUN_HEADINGS = ("GPU", "architecture", "Triton", "kernels", "launches", "violations")
KERNEL_HEADINGS = ("kernel", "configurations", "registers", "shared bytes", "programs", "spill")


def run_cells(run: dict[str, Any]) -> tuple[str, ...]:
    numbers = (run["kernels"], run["launches"], run["violations"])
    card = CARDS[run["capability"]]
    return card.name, card.architecture, run["triton"], *(f"{n:,}" for n in numbers)


def kernel_cells(item: tuple[str, dict[str, int]]) -> tuple[str, ...]:
    name, most = item
    programs = str(most["programs"])
    if most["most_programs"] > most["programs"]:
        programs += f" to {most['most_programs']}"
    spills = f"{most['spills']}: {most['spilled']:,}" if most["spills"] else ""
    return (
        f"`{name}`", str(most["configurations"]), str(most["registers"]), f"{most['shared']:,}",
        programs, spills,
    )  # fmt: skip


def first_step_cells(
    runs: Sequence[dict[str, Any]],
) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    """Headings and rows: a config each, a run a column."""
    headings = [
        "config",
        *(f"{CARDS[run['capability']].architecture}, {run['triton']}" for run in runs),
    ]
    names = sorted({name for run in runs for name in run["configs"]})

    def cell(run: dict[str, Any], name: str) -> str:
        found = run["configs"].get(name)
        return f"{found['kernels']}, {found['seconds']} s" if found else ""

    return headings, [(name, *(cell(run, name) for run in runs)) for name in names]


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def full_list(capability: int, result: Result) -> Path:
    """Write every kernel of a run to a file, and return its path."""
    path = CACHE / f"kernels-{CARDS[capability].architecture}-triton-{triton.__version__}.md"
    rows = sorted(result.rows, key=lambda row: row.kernel)
    cells = (tuple(str(value) for value in row._replace(groups=len(row.groups))) for row in rows)  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(table(Row._fields, cells) + "\n")
    return path
