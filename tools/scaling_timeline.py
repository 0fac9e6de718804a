"""Predicts a step on several GPUs, and draws it: `python -m tools.scaling_timeline`.

Measured on one H100: how long a step's parts take. Stated by others: how fast GPUs send. Everything
else is arithmetic, so the result is a prediction: no machine with two GPUs was there.

The picture is docs/figures/scaling.svg, the table is printed; docs/scaling.md has both.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "scaling.svg"
RANKS = 8
SHARDS = ("none", "optimizer", "gradients")


class Model(NamedTuple):
    """One rank's micro-batch and update, in milliseconds, on one H100."""

    name: str
    blocks: int
    block_parameters: int  # of its matrices
    table_parameters: int
    forward: float  # all of it, and the loss with its gradient
    block_backward: float
    update: float  # AdamW and the norm

    @property
    def parameters(self) -> int:
        return self.blocks * self.block_parameters + self.table_parameters

    def step(self, micro_batches: int = 1) -> float:
        """Of one GPU alone."""
        return micro_batches * (self.forward + self.blocks * self.block_backward) + self.update


# GPT-2 124M, 16 x 1024 tokens, captured, bfloat16: kernels 30.5 ms and gaps of 1.3 ms, which are
# shared out. Products take 17.7 ms: 19.8 at the speeds at which each was measured alone, of which
# 0.773 in a block's backward and 12 x 0.393 + 5.81 before it.
_GAPS, _PRODUCTS = 31.8 / 30.5, 17.7 / 19.8
SMALL = Model(
    "GPT-2 124M, 16 × 1,024 tokens",
    12,
    12 * 768**2,
    50304 * 768,
    # products, attention, GELU, layer norm, cross-entropy, zeroing and memsets
    forward=_GAPS * (_PRODUCTS * (12 * 0.393 + 5.81) + 1.20 + 0.84 + 0.82 + 1.21 + 0.16 + 0.09),
    # products; attention, GELU, layer norm, column sums and partials of all 12
    block_backward=_GAPS * (_PRODUCTS * 0.773 + (3.49 + 1.28 + 1.22 + 0.61 + 0.41) / 12),
    update=_GAPS * (1.24 + 0.17),
)
# GPT-2 1,558M, 8 x 1024 tokens: 45.6k tokens/s with one micro-batch a step, 49.3k with four, which
# gives 162 ms a micro-batch. By operations 95% are the blocks', two thirds of that their backward.
LARGE = Model(
    "GPT-2 1.5B, 8 × 1,024 tokens",
    48,
    12 * 1600**2,
    50304 * 1600,
    forward=162 * (0.05 + 0.95 / 3),
    block_backward=162 * 0.95 * 2 / 3 / 48,
    update=1.41 * 1558 / 124.4,
)


class Link(NamedTuple):
    """What a GPU sends in a second, at the same time as it receives as much."""

    name: str
    bytes_per_second: float


# NVLink 4: 450 GB/s each way, 370 after the protocol (NCCL's author: nccl-tests issue 212).
NVLINK = Link("NVLink, 370 GB/s", 370e9)
NETWORK = Link("network, 50 GB/s", 50e9)  # a 400 Gbit/s adapter for each GPU, as in a DGX H100
LINKS = (NVLINK, NETWORK)
LATENCY = 0.02  # ms a message: an assumption, for a launch and the partner's answer
MEMORY = 2428e9  # bytes a second, measured: each sum reads two numbers and writes one
LEVELS = RANKS.bit_length() - 1


def sending(elements: int, size: int, link: Link, *, adds: bool) -> float:
    """Milliseconds of one halving (adds) or one doubling of a bucket over RANKS."""
    moved = elements * size * (1 - 1 / RANKS)
    sums = 3 * moved / MEMORY if adds else 0.0
    return 1e3 * (moved / link.bytes_per_second + sums) + LEVELS * LATENCY


class Bar(NamedTuple):
    """Work of a lane."""

    lane: str  # "computes" or "sends"
    kind: str
    start: float
    stop: float


def timeline(model: Model, shard: str, link: Link, micro_batches: int = 1) -> list[Bar]:
    """One rank's step. Blocks are exchanged during the backward, the table after it.

    With `gradients` in every micro-batch: a block's buffer is free when the block before the last
    one is exchanged, the table's before the next micro-batch. Vectors, 0.1% of all, are left out.
    """
    bars: list[Bar] = []
    now = free = 0.0  # of the two lanes

    def exchange(elements: int) -> float:
        begin = max(now, free)
        took = sending(elements, 4, link, adds=True)
        if shard == "none":
            took += sending(elements, 4, link, adds=False)
        bars.append(Bar("sends", "gradients", begin, begin + took))
        return begin + took

    for number in range(micro_batches):
        exchanged = shard == "gradients" or number == micro_batches - 1
        bars.append(Bar("computes", "forward", now, now + model.forward))
        now += model.forward
        before: list[float] = []
        for _ in range(model.blocks):
            if shard == "gradients" and len(before) > 1:
                now = max(now, before[-2])
            bars.append(Bar("computes", "backward", now, now + model.block_backward))
            now += model.block_backward
            if exchanged:
                free = exchange(model.block_parameters)
                before.append(free)
        if exchanged:
            free = exchange(model.table_parameters)
            now = max(now, free) if shard == "gradients" else now
    now = max(now, free)
    update = model.update / (1 if shard == "none" else RANKS)
    bars.append(Bar("computes", "update", now, now + update))
    now += update
    if shard != "none":
        took = 0.0
        for elements in (*[model.block_parameters] * model.blocks, model.table_parameters):
            took += sending(elements, 2, link, adds=False)
        bars.append(Bar("sends", "weights", now, now + took))
    return bars


def sent(model: Model, shard: str, micro_batches: int = 1) -> float:
    """Bytes that a rank sends in a step."""
    share = 1 - 1 / RANKS
    times = micro_batches if shard == "gradients" else 1
    gathered = 4 if shard == "none" else 2
    return model.parameters * share * (4 * times + gathered)


def table() -> str:
    """Markdown: the step of one GPU, and of RANKS, with its share of RANKS times the speed."""
    lines = [
        "| model, a rank's micro-batches | one GPU | `shard` | a rank sends | "
        f"{NVLINK.name} | {NETWORK.name} |",
        "|---|---|---|---|---|---|",
    ]
    for model in (SMALL, LARGE):
        for micro_batches in (1, 4):
            alone = model.step(micro_batches)
            what, how_long = f"{model.name}, {micro_batches}", f"{alone:.1f} ms"
            for shard in SHARDS:
                steps = (end(timeline(model, shard, link, micro_batches)) for link in LINKS)
                cells = [f"{step:.1f} ms, {alone / step:.0%}" for step in steps]
                gigabytes = f"{sent(model, shard, micro_batches) / 1e9:.2f} GB"
                lines.append(f"| {' | '.join([what, how_long, shard, gigabytes, *cells])} |")
                what = how_long = ""
    return "\n".join(lines)


def end(bars: list[Bar]) -> float:
    return max(bar.stop for bar in bars)


COLORS = {
    "forward": "#7c93b2",
    "backward": "#334155",
    "update": "#b7a26a",
    "gradients": "#c2410c",
    "weights": "#e0a080",
}
WIDTH, LANE, LEFT, ROW = 860, 16, 190, 62


def picture() -> str:
    """The timelines of one micro-batch over NVLink, as SVG."""
    cases = [(m, s) for m in (SMALL, LARGE) for s in ("none", "optimizer")]
    drawn = [line for i, case in enumerate(cases) for line in _row(40 + i * ROW, *case)]
    height = 40 + len(cases) * ROW + 24
    legend = [
        line
        for i, (kind, color) in enumerate(COLORS.items())
        for line in (
            f'<rect x="{LEFT + 120 * i}" y="14" width="10" height="10" fill="{color}"/>',
            f'<text x="{LEFT + 14 + 120 * i}" y="23">{_LABELS[kind]}</text>',
        )
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            'font-family="sans-serif" font-size="11" fill="#334155">',
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
            *legend,
            *drawn,
            f'<text x="{LEFT}" y="{height - 8}">A prediction for 8 H100 over NVLink, one '
            "micro-batch a rank; each row has its own scale.</text>",
            "</svg>\n",
        ]
    )


_LABELS = {
    "forward": "forward, loss",
    "backward": "backward, by block",
    "update": "update",
    "gradients": "sends gradients",
    "weights": "sends weights",
}


def _row(top: int, model: Model, shard: str) -> Iterator[str]:
    bars = timeline(model, shard, NVLINK)
    scale = (WIDTH - LEFT - 70) / end(bars)
    yield f'<text x="4" y="{top + 12}">{model.name.partition(",")[0]}</text>'
    yield f'<text x="4" y="{top + 28}">shard: {shard}</text>'
    for lane, y in (("computes", top), ("sends", top + LANE + 2)):
        yield f'<text x="{LEFT - 56}" y="{y + 12}">{lane}</text>'
        for bar in (b for b in bars if b.lane == lane):
            x, width = LEFT + bar.start * scale, max(0.4, (bar.stop - bar.start) * scale - 0.4)
            color = COLORS[bar.kind]
            yield f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{LANE}" fill="{color}"/>'
    yield f'<text x="{LEFT + end(bars) * scale + 6:.1f}" y="{top + 20}">{end(bars):.1f} ms</text>'


if __name__ == "__main__":
    FIGURE.write_text(picture(), encoding="utf-8")
    print(table())
