"""The numbers of the page, as `mantrans.explain` describes them: all from one recorded step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mantrans.explain.arrays import MOST, Arrays
from mantrans.explain.boxes import Boxes, largest_error, named, parameter_axes
from mantrans.explain.code import TOP, place, source
from mantrans.explain.operations import OPERATIONS
from mantrans.explain.step import Step
from mantrans.proof.differences import differences
from mantrans.proof.exact import exact_copy
from mantrans.recording import Call
from mantrans.terminal import watched
from mantrans_oracle import differentiate

ELEMENTS = 64
LIKELIEST = 8  # predicted tokens of a position


class Data:
    """decode: a token's text. samples: elements of a parameter that can be followed through proof
    and update. seed: of their choice. It takes two forwards of the model an element."""

    def __init__(
        self, step: Step, decode: Callable[[int], str], samples: int = ELEMENTS, seed: int = 0
    ) -> None:
        self.step, self.decode, self.samples = step, decode, samples
        self.calls = {(c.layer, c.operation): c for c in step.calls}
        self.parameters = step.wrapper.model.parameters
        self.ids = step.tokens[0].tolist()
        likeliest = self._probabilities().topk(min(LIKELIEST, self._vocabulary), dim=-1).indices
        targets = step.targets.tolist()
        self.shown = [
            list(dict.fromkeys([*([t] if t >= 0 else []), *row]))
            for t, row in zip(targets, likeliest.tolist(), strict=True)
        ]
        words = dict.fromkeys([*self.ids, *(t for t in targets if t >= 0)])
        words |= dict.fromkeys(row[0] for row in self.shown)
        self.words = list(words)[:MOST]
        self.arrays = Arrays({"V": self.words, "position": range(len(self.ids))})
        self.exact = exact_copy(step.wrapper.model)
        self.exact.parameters.weights.copy_(step.before)
        self.targets = step.targets.view(step.tokens.shape)
        self.judged = differentiate(self.exact, step.tokens, self.targets)
        self.boxes = Boxes(step.calls, self.arrays, self.judged.results)
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def _vocabulary(self) -> int:
        return self.step.wrapper.model.vocab_size

    def all(self) -> dict[str, Any]:
        step, moments = self.step, self.boxes.moments()
        boxes = self.boxes.boxes()
        names = self.parameters.by_name
        progress = watched(names, len(names), "finite differences", "parameter")
        parameters = {name: self._parameter(name) for name in progress}
        functions = {c.operation: c.function for c in step.calls}
        tied = self._tied()
        predictions = self._predictions()
        used = {b["operation"] for b in boxes} | {step.wrapper.optimizer_name}
        named_ids = {*self.ids, *(i for p in predictions for i in p["ids"]), *self._rows_of_words()}
        return {
            "about": self._about(),
            "tokens": [{"id": i, "text": self.decode(i)} for i in self.ids],
            "targets": [None if t < 0 else t for t in step.targets.tolist()],
            "losses": [
                None if t < 0 else x
                for t, x in zip(step.targets.tolist(), step.losses.tolist(), strict=True)
            ],
            "loss": step.loss,
            "texts": {str(i): self.decode(i) for i in sorted(named_ids)},
            "boxes": boxes,
            "moments": moments,
            "functions": {name: source(function) for name, function in functions.items()},
            "words": {name: words(name) for name in OPERATIONS if name in used},
            "parameters": parameters,
            "results": self._results(boxes),
            "residual": self._residual(),
            "norms": self._norms(),
            "deltas": self._deltas(),
            "predictions": predictions,
            "tied": tied,
            "variants": [v._asdict() for v in step.variants],
            "arrays": self.arrays.items,
        }

    def _rows_of_words(self) -> list[int]:
        """The tokens that rows and columns of arrays stand for."""
        arrays = [a for a in self.arrays.items if "V" in a["axes"]]
        kept = [a["rows"] if a["axes"][0] == "V" else a["columns"] for a in arrays]
        return [i for ids in kept for i in (range(self._vocabulary) if ids is None else ids)
                if i < self._vocabulary]  # fmt: skip

    def _about(self) -> dict[str, Any]:
        step, optimizer = self.step, self.step.wrapper.trainable()
        config = step.wrapper.config
        attention = step.wrapper.model.blocks[0].attention
        H, H_kv = attention.n_heads, attention.n_kv_heads
        sizes = {
            "B": 1, "T": len(self.ids), "C": config.d_model, "H": H, "H_kv": H_kv,
            "D": attention.widths[0] // H, "F": config.resolved()["d_ffn"], "V": self._vocabulary,
        }  # fmt: skip
        numbers = {k: v for k, v in vars(optimizer).items() if isinstance(v, int | float)}
        update = next(c for c in step.calls if "clip" in c.inputs)
        return {
            "config": config.resolved(),
            "parameters": self.parameters.count(),
            "sizes": sizes,
            "learning_rate": step.learning_rate,
            "updates": int(self.parameters.updates.item()),
            "optimizer": {"name": step.wrapper.optimizer_name, **numbers},
            "grad_norm": step.grad_norm,
            "clip": update.inputs["clip"].item(),
            "applied": step.applied,
        }

    # ------------------------------------------------------------------------ parameters, update

    def _parameter(self, name: str) -> dict[str, Any]:
        p, step = self.parameters, self.step
        before, after, gradient = (p.view(x, name) for x in (step.before, step.after, p.gradients))
        letters = parameter_axes(name, gradient.dim())
        value, gradient_array = self.arrays.add(before, letters), self.arrays.add(gradient, letters)
        elements = self._elements(gradient, gradient_array, self.samples)
        at = tuple(torch.tensor(elements).T)
        return {
            "shape": list(gradient.shape),
            "value": value,
            "gradient": gradient_array,
            "norms": {
                "value": before.norm().item(),
                "gradient": gradient.norm().item(),
                "change": (after - before).norm().item(),
            },
            "error": largest_error(gradient, self.judged.weights[name]),
            "differences": self._differences(name, elements),
            "elements": elements,
            "gradients": gradient[at].tolist(),
            "before": before[at].tolist(),
            "after": after[at].tolist(),
            "update": self._update(name, elements),
        }

    def _elements(self, gradient: Tensor, index: int, count: int) -> list[list[int]]:
        """Elements that the heat map shows: half of them the steepest, half drawn by lot, of those
        whose gradient is not 0 if there are as many."""
        array = self.arrays.items[index]
        columns = array["columns"] or range(gradient.shape[-1])
        rows = (array["rows"] or range(len(gradient))) if gradient.dim() == 2 else [0]
        seen = gradient.view(-1, gradient.shape[-1])[list(rows)][:, list(columns)].abs().flatten()
        count = min(count, seen.numel())
        steepest = seen.topk(count // 2).indices.tolist()
        lots = torch.rand(seen.numel(), generator=self.generator) + (seen != 0)
        drawn = lots.argsort(descending=True).tolist()
        cells = list(dict.fromkeys([*steepest, *drawn]))[:count]
        found = [[rows[c // len(columns)], columns[c % len(columns)]] for c in sorted(cells)]
        return found if gradient.dim() == 2 else [[column] for _, column in found]

    def _results(self, boxes: list[dict[str, Any]]) -> dict[str, Any]:
        """Differences of the inputs of boxes that have no matrix of weights."""
        found = {}
        for box in boxes:
            if all(self.parameters.by_name[n].group == "vectors" for n in box["parameters"]):
                for pair in box["inputs"]:
                    name = self.boxes.results[pair["value"]]
                    gradient = self.arrays.tensors[pair["gradient"]]
                    count = max(1, self.samples // 4)
                    elements = self._elements(gradient, pair["gradient"], count)
                    at = tuple(torch.tensor(elements).T)
                    found[f"{box['layer']}.{pair['name']}"] = {
                        "error": pair["error"],
                        "elements": elements,
                        "gradients": gradient[at].tolist(),
                        "differences": self._differences(name, [[0, *e] for e in elements]),
                    }
        return found

    def _differences(self, name: str, elements: list[list[int]]) -> dict[str, Any]:
        """The loss on both sides of each element, of a parameter or of a result."""
        tokens = self.step.tokens
        found = differences(self.exact, tokens, self.targets, name, elements, order=2)
        losses = {"above": found.above[:, 0].tolist(), "below": found.below[:, 0].tolist()}
        return {"step": found.step, **losses, "slopes": found.values.tolist()}

    def _update(self, name: str, elements: list[list[int]]) -> dict[str, list[float]]:
        """The local variables of the optimizer's function that have one number a weight."""
        p = self.parameters
        width = p.by_name[name].shape[-1] if len(elements[0]) == 2 else 0
        places = torch.tensor([e[0] * width + e[-1] if width else e[0] for e in elements])
        places += p.offset(name)
        start, mean = 0, {}
        for call in self.boxes.updates:  # which go through the flat buffers, part by part
            if call.operation == "nesterov_momentum":  # of the weights of the next update
                mean = {"m": call.values["m"]}
            if call.operation.endswith("_update"):
                end = start + call.values["w"].numel()
                if p.offset(name) < end:
                    own = {n: x for n, x in call.values.items() if n not in call.inputs}
                    found = mean | own
                    return {n: x[places - start].tolist() for n, x in found.items() if x.dim()}
                start, mean = end, {}
        raise AssertionError(f"{name}: expected an update of each weight")

    # --------------------------------------------------------------------------- single questions

    def _call(self, layer: str, end: str) -> Call:
        return next(c for (name, op), c in self.calls.items() if name == layer and op.endswith(end))

    def _norm_layers(self) -> list[str]:
        return [b.layer for b in self.boxes.forwards if "norm" in b.layer.split(".")[-1]]

    def _residual(self) -> list[dict[str, Any]]:
        found = []
        for layer in self._norm_layers():
            back = named(self._call(layer, "_backward"))
            norms = {"norm": back["x"].norm().item(), "gradient": back["dx"].norm().item()}
            found.append({"layer": layer, **norms})
        return found

    def _norms(self) -> dict[str, Any]:
        """The means of g and of g x̂, as the code subtracts them; RMS norm has only the second."""
        found = {}
        for layer in self._norm_layers():
            call = self._call(layer, "_backward")
            g, x_hat = call.values["g"], call.values["x_hat"]
            shift = g.mean(-1).tolist() if call.operation == "layer_norm_backward" else None
            found[layer] = {
                "g": shift,
                "x_hat": (g * x_hat).mean(-1).tolist(),
                "square": g.square().mean(-1).tolist(),
            }
        return found

    def _deltas(self) -> dict[str, list[list[float]]]:
        """δ of each head and query, which the softmax takes from dp."""
        calls = [c for c in self.step.calls if c.operation == "attention_backward"]
        return {c.layer: c.values["delta"][0, :, :, 0].tolist() for c in calls}

    def _probabilities(self) -> Tensor:
        values = self.calls["loss", "cross_entropy_backward"].values
        return values["e"] / values["total"]

    def _predictions(self) -> list[dict[str, Any]]:
        probabilities = self._probabilities()
        gradients = named(self.calls["loss", "cross_entropy_backward"])["dlogits"]
        return [
            {"ids": ids, "probabilities": p[ids].tolist(), "gradients": dz[ids].tolist()}
            for ids, p, dz in zip(self.shown, probabilities, gradients, strict=True)
        ]

    def _tied(self) -> dict[str, Any] | None:
        """The two gradients of the rows of the sentence's tokens."""
        if not self.step.wrapper.model.output.tied:
            return None
        ids = sorted(set(self.ids))
        whole = self.parameters.view(self.parameters.gradients, "token_embedding.weight")[ids]
        own = self.calls["embedding", "embedding_backward"].values["sums"][ids]
        parts = {"output": whole - own, "embedding": own, "together": whole}
        return {
            "ids": ids,
            **{name: self.arrays.add(x, ["row", "C"]) for name, x in parts.items()},
            "norms": {name: x.norm(dim=-1).tolist() for name, x in parts.items()},
        }


def words(operation: str) -> dict[str, Any]:
    """What `operations` says of one."""
    found = OPERATIONS[operation]
    ways = {way: getattr(found, way)._asdict() for way in ("forward", "backward")}
    derivation = place(TOP / "docs" / "gradients" / f"{found.derivation}.md")
    return {"title": found.title, "derivation": derivation, **ways}
