"""The recorded calls as boxes, in the order of the forward, and as moments, in that of the run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mantrans.explain.arrays import Arrays
from mantrans.explain.code import place
from mantrans.explain.operations import OPERATIONS, RENAMED, RESULTS
from mantrans.kernels.reference import IGNORE_INDEX
from mantrans.recording import Call

# Axis letters of what is not (T, C): by the last part of the layer's name.
_WIDTHS = {
    "qkv": {"y": "M"},
    "rotary": dict.fromkeys(("qkv", "rotated"), "M"),
    "attention": {"qkv": "M", "out": "HD"},
    "projection": {"x": "HD"},
    "up": {"y": "F"},
    "gate_up": {"y": "2F"},
    "mlp": dict.fromkeys(("u", "a", "gate", "up"), "F"),
    "down": {"x": "F"},
    "output": {"y": "V"},
    "loss": {"logits": "V"},
}
# Rows and columns of the matrices, by the last part of their layer's name.
_MATRICES = {
    "qkv": "M C", "projection": "C HD", "up": "F C", "gate_up": "2F C", "down": "C F",
    "token_embedding": "V C", "position_embedding": "position C", "output": "V C",
    "q_norm": "D", "k_norm": "D",
}  # fmt: skip
_OF_QUERY_AND_KEY = ("p", "scores")
_OF_THE_MODEL = ("cos", "sin")  # tables, which are always there


def base(operation: str) -> str:
    """ "linear" for linear_forward and linear_backward."""
    return operation.removesuffix("_forward").removesuffix("_backward")


def group(layer: str) -> str:
    """The block of a layer, "blocks.0", or the layer itself."""
    return ".".join(layer.split(".")[:2]) if layer.startswith("blocks.") else layer


def named(call: Call | None) -> dict[str, Tensor]:
    """Everything that a call took, computed and returned, by the names of the page."""
    if call is None:
        return {}
    renamed = RENAMED.get(call.operation, {})
    values = {renamed.get(name, name): x for name, x in call.values.items()}
    if call.operation in RESULTS:
        values[RESULTS[call.operation]] = call.results[0]
    if "losses" in values:  # the last token has no target, so it has no loss
        without = values["targets"] == IGNORE_INDEX
        values["losses"] = values["losses"].masked_fill(without, torch.nan)
    return values


def largest_error(gradient: Tensor, expected: Tensor) -> dict[str, float]:
    """The largest absolute error, and that relative to the largest expected gradient."""
    absolute = (gradient.reshape(expected.shape) - expected).abs().max().item()
    largest = expected.abs().max().item()
    return {"absolute": absolute, "relative": absolute / largest if largest else absolute}


def axes(call: Call, name: str, dimensions: int) -> list[str]:
    """The letters of the dimensions of a value of the forward, without B."""
    if dimensions == 4:
        return ["H", "T", "T" if name in _OF_QUERY_AND_KEY else "D"]
    if name == "losses":
        return ["T"]
    if name == "h":  # of SwiGLU: gate and value side by side
        return ["T", "2F" if call.operation == "swiglu_forward" else "F"]
    return ["T", _WIDTHS.get(call.layer.split(".")[-1], {}).get(name, "C")]


def parameter_axes(name: str, dimensions: int) -> list[str]:
    layer = name.split(".")[-2]
    letters = _MATRICES.get(layer, "C").split()
    return letters[-2:] if dimensions == 2 else letters[:1]


class Boxes:
    """The boxes and moments of one step's calls.

    expected: name of a result (`mantrans.proof.exact.Exact.loss`) -> its gradient by autograd.
    """

    def __init__(self, calls: list[Call], arrays: Arrays, expected: dict[str, Tensor]) -> None:
        self.arrays, self.expected = arrays, expected
        self.results: dict[int, str] = {}  # array of a result -> its name in `expected`
        self.forwards = [c for c in calls if c.operation.endswith("_forward")]
        self.backwards = [c for c in calls if c.operation.endswith("_backward")]
        self.updates = [c for c in calls if c.layer == "update"]
        self.backward_of = {c.layer: c for c in self.backwards}
        self.made = {memory(x) for c in self.forwards for x in c.results if isinstance(x, Tensor)}
        self.V = self.backward_of["loss"].inputs["logits"].shape[-1]

    def boxes(self) -> list[dict[str, Any]]:
        return [self._box(call) for call in self.forwards]

    def _box(self, call: Call) -> dict[str, Any]:
        operation, backward = base(call.operation), self.backward_of.get(call.layer)
        words = OPERATIONS[operation]
        return {
            "layer": call.layer,
            "operation": operation,
            "title": words.title,
            "group": group(call.layer),
            "parameters": list(call.parameters.values()),
            "keeps": self._keeps(call, backward),
            **{
                part: list(self._pairs(call, backward, getattr(words, part)))
                for part in ("inputs", "outputs", "inside")
            },
        }

    def _keeps(self, call: Call, backward: Call | None) -> int:
        """Numbers of the forward that the backward reads again; of the logits it reads a copy."""
        kept = {
            memory(x): size(x)
            for name, x in ({} if backward is None else backward.inputs).items()
            if memory(x) in self.made or (name in call.inputs and name == "logits")
        }
        return sum(kept.values())

    def _pairs(
        self, call: Call, backward: Call | None, names: tuple[tuple[str, str], ...]
    ) -> Iterator[dict[str, Any]]:
        there, back = named(call), named(backward)
        for name, gradient_name in names:
            value, gradient = there.get(name, back.get(name)), back.get(gradient_name)
            if call.layer == "output" and name == "y":  # without the padding of the table's rows
                value, gradient = (
                    None if x is None else x[..., : self.V] for x in (value, gradient)
                )
            found = [x for x in (value, gradient) if x is not None]
            letters = axes(call, name, found[0].dim())
            array = None if value is None else self.arrays.add(value, letters)
            yield {
                "name": name,
                "gradient_name": gradient_name,
                "value": array,
                "gradient": None if gradient is None else self.arrays.add(gradient, letters),
                "error": self._error(call.layer, name, array, gradient),
            }

    def _error(
        self, layer: str, name: str, array: int | None, gradient: Tensor | None
    ) -> dict[str, float] | None:
        """Of a value's gradient; an input has the name that it had as a result."""
        result = {"output.y": "logits", "loss.logits": "logits"}.get(f"{layer}.{name}")
        result = result or f"{layer}.{name}"
        if array is not None and result in self.expected:
            self.results.setdefault(array, result)
        expected = self.expected.get(self.results.get(-1 if array is None else array, result))
        if gradient is None or expected is None:
            return None
        return largest_error(gradient, expected)

    def moments(self) -> list[dict[str, Any]]:
        """Forward, backward and one update; with the numbers that are alive at each."""
        index = {call.layer: i for i, call in enumerate(self.forwards)}
        steps = [
            *((c, "forward") for c in self.forwards),
            *((c, "backward") for c in self.backwards),
        ]
        alive = numbers_alive([call for call, _ in steps], len(self.forwards))
        found = [
            {
                "phase": phase,
                "box": index[call.layer],
                "functions": [call.operation],
                "caller": place(*call.caller),
                "activations": activations,
                "gradients": gradients,
            }
            for (call, phase), (activations, gradients) in zip(steps, alive, strict=True)
        ]
        functions = list(dict.fromkeys(c.operation for c in self.updates))
        caller = place(*self.updates[-1].caller)
        return [
            *found,
            {"phase": "update", "box": None, "functions": functions, "caller": caller,
             "activations": 0, "gradients": 0},
        ]  # fmt: skip


def memory(x: Tensor) -> int:
    """The same for all views of one memory."""
    return x.untyped_storage().data_ptr()


def size(x: Tensor) -> int:
    """Elements of the whole memory that x is a view of."""
    return x.untyped_storage().nbytes() // x.element_size()


def numbers_alive(calls: list[Call], forwards: int) -> list[tuple[int, int]]:
    """(of the forward, of the backward): what is alive at each call. A result lives until its last
    use; a copy that a layer makes, such as of the logits with their padding, while it is read."""
    lives: dict[int, list[int]] = {}  # memory -> born, last used, elements
    copies = []
    for i, call in enumerate(calls):
        for x in call.results:
            if isinstance(x, Tensor):
                lives.setdefault(memory(x), [i, i, size(x)])[1] = i
        for name, x in call.inputs.items():
            if memory(x) in lives:
                lives[memory(x)][1] = i
            elif x.is_floating_point() and x.dim() and name not in _OF_THE_MODEL:
                copies.append([i, i, x.numel()])
    alive = [[0, 0] for _ in calls]
    for born, last, elements in [*lives.values(), *copies]:
        for i in range(born, last + 1):
            alive[i][born >= forwards] += elements
    return [(a, g) for a, g in alive]
