"""`python -m tools.gradient_errors`: our gradients beside those of transformers, the worst."""

from __future__ import annotations

import torch

from mantrans.wrapper import shift
from tests.mantrans.models.test_against_transformers import batch, build, their_loss
from tests.support.compare import relative_error
from tests.support.huggingface import oriented, their_name

COLUMNS = [(d, b) for d in (torch.float64, torch.float32) for b in ("reference", "native")]


def errors(dtype: torch.dtype, backend: str) -> dict[str, float]:
    """Largest relative RMS error over the layers, by parameter, without the keys' bias."""
    ours, theirs = build(dtype, backend)
    ids, labels = batch(ignored=True)
    their_loss(theirs, ids, labels)[1].backward()
    ours.model.zero_gradients()
    ours.accumulate_gradients(ids, shift(labels), 3)
    parameters = dict(theirs.named_parameters())
    worst: dict[str, float] = {}
    for name, gradient in ours.model.named_gradients():
        expected = oriented(name, parameters[their_name(name)].grad)
        if name.endswith("qkv.bias"):
            (q, _, v), (q2, _, v2) = gradient.chunk(3), expected.chunk(3)
            gradient, expected = torch.cat([q, v]), torch.cat([q2, v2])
        group = name.split(".", 2)[2] if name.startswith("blocks.") else name
        worst[group] = max(worst.get(group, 0.0), relative_error(gradient, expected))
    return worst


def main() -> None:
    columns = [errors(dtype, backend) for dtype, backend in COLUMNS]
    titles = [f"{str(dtype).removeprefix('torch.')} {backend}" for dtype, backend in COLUMNS]
    print("| parameter | " + " | ".join(titles) + " |")
    print("|---" * (len(titles) + 1) + "|")
    for group in columns[0]:
        print(f"| {group} | " + " | ".join(f"{c[group]:.1e}" for c in columns) + " |")


if __name__ == "__main__":
    main()
