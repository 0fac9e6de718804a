"""Draws a run's losses: `python -m benchmarks.learning_curve runs/NAME FILE.png`."""

from __future__ import annotations

import sys
from pathlib import Path

from mantrans.records import read_records


def draw(run: Path, picture: Path) -> None:
    """Training loss as a line, validation loss as points, from runs/NAME/metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_records(run / "metrics.jsonl")
    training = [(r["tokens"] / 1e6, r["loss"]) for r in records if "loss" in r]
    tokens_of = {r["step"]: r["tokens"] / 1e6 for r in records if "loss" in r}
    validation = [
        (tokens_of[r["step"]], r["validation_loss"])
        for r in records
        if "validation_loss" in r and r["step"] in tokens_of
    ]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*training, strict=True), label="training", linewidth=1)
    axes.plot(*zip(*validation, strict=True), "o-", label="validation", markersize=4)
    axes.set(xlabel="million tokens", ylabel="loss per token (nats)", title=run.name)
    axes.grid(alpha=0.3)
    axes.legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
