"""Tensors as heat maps: of a large one some rows and columns, and statistics of the whole."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MOST = 64  # rows and columns of a heat map
MOST_ELEMENTS = MOST * MOST  # of all planes


def spread(size: int, limit: int, first: Sequence[int] = ()) -> list[int]:
    """At most `limit` of range(size): those in `first`, and evenly spaced others; sorted."""
    if size <= limit:
        return list(range(size))
    chosen = dict.fromkeys(i for i in first if 0 <= i < size)
    kept = list(chosen)[:limit]
    others = [i for i in range(size) if i not in chosen]
    rest = limit - len(kept)
    return sorted(kept + [others[i * len(others) // rest] for i in range(rest)])


class Arrays:
    """The arrays of a page, each tensor once.

    important: axis letter -> indices that are kept where an axis is sampled.
    """

    def __init__(self, important: dict[str, Sequence[int]]) -> None:
        self.important = important
        self.items: list[dict[str, Any]] = []
        self._known: dict[tuple, int] = {}
        self.tensors: list[Tensor] = []  # of items; kept, so that no address is used twice

    def add(self, x: Tensor, axes: Sequence[str]) -> int:
        """The index of the array of x, whose leading dimension of one row is left out.

        x: (n,), (rows, columns) or (planes, rows, columns), each after a 1 that is left out;
        axes: a letter for each dimension that is left.
        """
        x = x.detach()
        while x.dim() > len(axes):
            x = x[0]
        key = (x.data_ptr(), x.shape, x.stride())
        if key not in self._known:
            self._known[key] = len(self.items)
            self.tensors.append(x)
            self.items.append(self._array(x, list(axes)))
        return self._known[key]

    def _array(self, x: Tensor, axes: list[str]) -> dict[str, Any]:
        planes = x.view(-1, *x.shape[-2:]) if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])
        if x.dim() == 1:  # a vector is shown as lines of 64
            rows, columns = [0], spread(x.shape[0], MOST_ELEMENTS)
        else:
            rows = self._spread(planes.shape[1], axes[-2], MOST)
            room = MOST if axes[-1] == "T" else max(1, MOST_ELEMENTS // len(planes) // len(rows))
            columns = self._spread(planes.shape[2], axes[-1], min(MOST, room))
        kept = planes[:, rows][:, :, columns]
        data = kept.float().contiguous().numpy().astype("<f4").tobytes()
        return {
            "shape": list(x.shape),
            "axes": axes,
            "planes": len(planes),
            "rows": None if len(rows) == planes.shape[1] else rows,
            "columns": None if len(columns) == planes.shape[2] else columns,
            "data": base64.b64encode(data).decode(),
            **statistics(x),
        }

    def _spread(self, size: int, axis: str, limit: int) -> list[int]:
        return spread(size, limit, self.important.get(axis, ()))


def statistics(x: Tensor) -> dict[str, float | None]:
    """Smallest and largest element, mean and root mean square, of the finite ones."""
    x = x.double().flatten()
    x = x[x.isfinite()]
    if not x.numel():
        return dict.fromkeys(("least", "most", "mean", "rms"))
    found = torch.stack([x.min(), x.max(), x.mean(), x.square().mean().sqrt()])
    return dict(zip(("least", "most", "mean", "rms"), found.tolist(), strict=True))
