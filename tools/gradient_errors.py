"""`python -m tools.gradient_errors`: our gradients beside those of transformers, the worst.

A table for each family: the largest relative RMS error over its layers and, but for GPT-2, over all
its shapes in `tests.support.families`, by parameter.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mantrans.wrapper import CustomTransformerWrapper, shift
from tests.mantrans.models import test_against_transformers as gpt2
from tests.mantrans.models import test_families
from tests.support import families
from tests.support.compare import relative_error
from tests.support.huggingface import oriented, their_name

COLUMNS = [(d, b) for d in (torch.float64, torch.float32) for b in ("reference", "native")]
SHAPES = {"gpt2": [""]} | {
    family: [case for case in families.CASES if case.startswith(family)]
    for family in ("llama", "qwen2", "qwen3")
}
Pairs = Iterator[tuple[str, Tensor, Tensor]]


def of_gpt2(dtype: torch.dtype, backend: str) -> Pairs:
    """(name, gradient, expected), without the keys' bias, which has none."""
    ours, theirs = gpt2.build(dtype, backend)
    ids, labels = gpt2.batch(ignored=True)
    gpt2.their_loss(theirs, ids, labels)[1].backward()
    accumulate(ours, ids, labels)
    parameters = dict(theirs.named_parameters())
    for name, gradient in ours.model.named_gradients():
        expected = oriented(name, parameters[their_name(name)].grad)
        if name.endswith("qkv.bias"):
            (q, _, v), (q2, _, v2) = gradient.chunk(3), expected.chunk(3)
            gradient, expected = torch.cat([q, v]), torch.cat([q2, v2])
        yield name, gradient, expected


def of_family(case: str, dtype: torch.dtype, backend: str) -> Pairs:
    ours = families.ours(case, dtype, backend)
    theirs = families.theirs(ours, exact=dtype == torch.float64)
    ids, labels = test_families.batch()
    test_families.their_loss(theirs, ids, labels)[1].backward()
    accumulate(ours, ids, labels)
    expected = families.gradients(ours, theirs)
    for name, gradient in ours.model.named_gradients():
        yield name, gradient, expected[name]


def accumulate(ours: CustomTransformerWrapper, ids: Tensor, labels: Tensor) -> None:
    """Over three micro-batches."""
    ours.model.zero_gradients()
    ours.accumulate_gradients(ids, shift(labels), 3)


def errors(family: str, dtype: torch.dtype, backend: str) -> dict[str, float]:
    """The largest error of each parameter, by its name without the block's number."""
    worst: dict[str, float] = {}
    for case in SHAPES[family]:
        pairs = of_family(case, dtype, backend) if case else of_gpt2(dtype, backend)
        for name, gradient, expected in pairs:
            group = name.split(".", 2)[2] if name.startswith("blocks.") else name
            worst[group] = max(worst.get(group, 0.0), relative_error(gradient, expected))
    return worst


def main() -> None:
    titles = [f"{str(dtype).removeprefix('torch.')} {backend}" for dtype, backend in COLUMNS]
    for family in SHAPES:
        columns = [errors(family, dtype, backend) for dtype, backend in COLUMNS]
        print(f"| {family} | " + " | ".join(titles) + " |")
        print("|---" * (len(titles) + 1) + "|")
        for group in columns[0]:
            print(f"| {group} | " + " | ".join(f"{c[group]:.1e}" for c in columns) + " |")
        print()


if __name__ == "__main__":
    main()
