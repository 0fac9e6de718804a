"""Runs programs for one GPU and gathers what they launch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from mantrans.training.shapes_only import ShapesOnly
from tools.gate.cards import CARDS, resident_programs
from tools.gate.driver import Kernel, Launch, launches_for
from tools.gate.programs import Program, programs, small
from tools.gate.rules import violations

CACHE = Path(__file__).parents[2] / ".cache/gate"


class Row(NamedTuple):
    """One kernel in one configuration, as the full list has it."""

    kernel: str
    capability: int
    groups: tuple[str, ...]  # of programs that launch it
    launches: int
    warps: int
    stages: int
    shared: int
    programs: int  # a multiprocessor
    registers: int
    stack: int
    local: int
    hmma: int
    hgmma: int
    utchmma: int
    accesses: int
    wide_accesses: int
    bulk_copies: int
    seconds: float


class Result(NamedTuple):
    """What a GPU's run found."""

    rows: list[Row]
    broken: list[str]  # one line each
    launches: int


class Gathered:
    """Takes launches, keeps each kernel once and each complaint once."""

    def __init__(self, capability: int) -> None:
        self.card = CARDS[capability]
        self.program = Program("", "", lambda: None)
        self.kernels: dict[int, Kernel] = {}
        self.groups: dict[int, dict[str, None]] = {}
        self.counts: dict[int, int] = {}
        self.broken: dict[str, str] = {}

    def take(self, launch: Launch) -> None:
        key = id(launch.kernel)
        self.kernels[key] = launch.kernel
        self.counts[key] = self.counts.get(key, 0) + 1
        self.groups.setdefault(key, {})[self.program.group] = None
        for line in violations(launch, self.card):
            where = f"{label(launch.kernel)}, {self.card.architecture}"
            first = f"first in {self.program.group}: {self.program.name}"
            self.broken.setdefault(f"{where}: {line}", first)

    def run(self, program: Program) -> None:
        """An error that ends a program is a violation too."""
        self.program = program
        try:
            program.run()
        except Exception as error:
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            where = f"{program.group}: {program.name}, {self.card.architecture}"
            self.broken[f"{where}: {type(error).__name__}"] = first_line

    def row(self, key: int) -> Row:
        kernel = self.kernels[key]
        return Row(
            label(kernel),
            kernel.capability,
            tuple(self.groups[key]),
            self.counts[key],
            kernel.warps,
            kernel.stages,
            kernel.shared,
            resident_programs(self.card, kernel.code.registers, kernel.warps, kernel.shared),
            **kernel.code._asdict(),
            seconds=kernel.seconds,
        )


def gather(capability: int, programs: Iterable[Program], cache: Path = CACHE) -> Result:
    """Run programs for the card of a capability."""
    gathered = Gathered(capability)
    with launches_for(gathered.card, gathered.take, cache), ShapesOnly():
        for program in programs:
            gathered.run(program)
    rows = [gathered.row(key) for key in gathered.kernels]
    broken = [f"{line} ({where})" for line, where in gathered.broken.items()]
    return Result(rows, broken, sum(gathered.counts.values()))


def gather_all(capability: int) -> Result:
    """What the card of a capability is launched in all."""
    return gather(capability, programs(capability))


def gather_small() -> Result:
    """What one small step launches on sm_90."""
    return gather(90, small())


def label(kernel: Kernel) -> str:
    """A kernel's name, the types of its pointers, and the constants of its code."""
    types: dict[str, None] = {}
    for type_ in kernel.types.values():
        element = type_.removeprefix("*").removeprefix("tensordesc<").split("[")[0]
        if type_.startswith(("*", "tensordesc")) and element in ("bf16", "fp16", "fp32"):
            types[element] = None
    constants = [constant(name, value) for name, value in kernel.constants.items()]
    odd = [n for n, t in kernel.types.items() if n not in kernel.multiples and t[:1] in "i*"]
    return " ".join(
        [
            kernel.name.removesuffix("_kernel"),
            "+".join(types),
            *filter(None, constants),
            *([f"(any {', '.join(odd)})"] if odd else []),
        ]
    )


def constant(name: str, value: Any) -> str:
    if value is None:
        return f"no-{name.removesuffix('_ptr')}"
    if isinstance(value, bool):
        return name if value else ""
    return f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
