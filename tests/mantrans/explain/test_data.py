"""The page's numbers are those of the step, whatever the family."""

from __future__ import annotations

import base64
import json
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from mantrans.explain.arrays import Arrays, spread
from mantrans.explain.data import Data
from mantrans.explain.step import Step, float64_copy, run
from mantrans.wrapper import CustomTransformerWrapper
from tests.support import families

T, V, SAMPLES = 9, 97, 16
CASES = ["gpt2", "llama", "qwen3", "sgd", "muon"]


@cache
def explained(case: str) -> tuple[Step, dict[str, Any]]:
    if case in ("gpt2", "sgd", "muon"):
        optimizer = "adamw" if case == "gpt2" else case
        model = CustomTransformerWrapper(
            V, 48, 2, 4, max_seq_len=T, device="cpu", optimizer=optimizer, dtype=torch.bfloat16
        )
    else:
        model = families.ours(case, torch.float32, "native", optimizer="adamw")
    tokens = torch.randint(V, (1, T), generator=torch.Generator().manual_seed(3))
    step = run(float64_copy(model.state_dict()), tokens, 1e-2)
    return step, Data(step, str, samples=SAMPLES).all()


def values(array: dict[str, Any]) -> np.ndarray:
    """(planes, rows, columns) float32"""
    data = np.frombuffer(base64.b64decode(array["data"]), "<f4")
    return data.reshape(array["planes"], -1, len(array["columns"] or range(array["shape"][-1])))


@pytest.mark.parametrize("case", CASES)
class TestData:
    def test_data_numbers_json(self, case: str) -> None:
        json.dumps(explained(case)[1], allow_nan=False)

    def test_data_boxes_and_moments(self, case: str) -> None:
        """Boxes and moments mirror each other."""
        data = explained(case)[1]
        boxes = list(range(len(data["boxes"])))
        by_phase = {
            phase: [m["box"] for m in data["moments"] if m["phase"] == phase]
            for phase in ("forward", "backward", "update")
        }
        assert by_phase == {"forward": boxes, "backward": boxes[::-1], "update": [None]}

    def test_data_activations(self, case: str) -> None:
        """Activations die as the backward passes."""
        data = explained(case)[1]
        moments = data["moments"]
        kept = [m["activations"] for m in moments]
        output = kept.index(max(kept))
        assert output == len(data["boxes"]) - 2
        assert kept[output:] == sorted(kept[output:], reverse=True)
        assert kept[-2] == kept[-1] == 0 < kept[0]
        assert all((m["gradients"] > 0) == (m["phase"] == "backward") for m in moments)

    def test_data_boxes_keep(self, case: str) -> None:
        """Boxes keep what their backward reads."""
        keeps = {box["layer"]: box["keeps"] for box in explained(case)[1]["boxes"]}
        assert keeps["embedding"] == keeps["loss"] - keeps["loss"] == 0
        assert keeps["blocks.1.attention.qkv"] == keeps["output"] == T * 48
        assert keeps["blocks.0.mlp.down"] == T * (80 if case in families.CASES else 4 * 48)
        if case in families.CASES:  # only heads that are normalized are read again
            assert (keeps["blocks.0.attention.rotary"] > 0) == (case == "qwen3")

    def test_data_delta(self, case: str) -> None:
        """Delta is the mean that the softmax takes."""
        data = explained(case)[1]
        box = next(b for b in data["boxes"] if b["layer"] == "blocks.1.attention")
        p, dp = (values(data["arrays"][box["inside"][0][end]]) for end in ("value", "gradient"))
        delta = data["deltas"]["blocks.1.attention"]
        np.testing.assert_allclose((p * dp).sum(-1), delta, 1e-4, 1e-9)

    def test_data_gradient_shapes(self, case: str) -> None:
        """Each value has its gradient of the same shape."""
        data = explained(case)[1]
        arrays = data["arrays"]
        pairs = [
            p for b in data["boxes"] for part in ("inputs", "outputs", "inside") for p in b[part]
        ]
        assert len(pairs) > 2 * len(data["boxes"])
        for pair in pairs:
            if pair["name"] != "losses":
                assert arrays[pair["value"]]["shape"] == arrays[pair["gradient"]]["shape"], pair

    def test_data_parameters(self, case: str) -> None:
        """Parameters are those of the step."""
        step, data = explained(case)
        p = step.wrapper.model.parameters
        gradients = dict(step.wrapper.model.named_gradients())
        assert list(data["parameters"]) == list(p.by_name)
        for name, found in data["parameters"].items():
            gradient = gradients[name]
            places = [tuple(e) for e in found["elements"]]
            assert len(set(places)) == len(places) == min(SAMPLES, gradient.numel())
            assert found["gradients"] == [gradient[e].item() for e in places]
            assert found["before"] == [p.view(step.before, name)[e].item() for e in places]
            assert found["after"] == [p.view(step.after, name)[e].item() for e in places]
            assert found["update"]["w"] == found["after"], name
            array = data["arrays"][found["gradient"]]
            assert array["rms"] == pytest.approx(gradient.square().mean().sqrt().item())
            matrix = gradient.view(-1, gradient.shape[-1])[array["rows"] or slice(None)]
            shown = matrix[:, array["columns"] or slice(None)]
            np.testing.assert_array_equal(values(array)[0], shown.float().numpy())

    def test_data_mean_of_losses(self, case: str) -> None:
        """The loss's box says the step's loss: the last token has no target, and does not count."""
        data = explained(case)[1]
        (losses,) = (b["outputs"][0] for b in data["boxes"] if b["layer"] == "loss")
        array = data["arrays"][losses["value"]]
        assert array["mean"] == pytest.approx(data["loss"], rel=1e-12)
        assert np.isnan(values(array)).sum() == 1

    def test_data_gradients(self, case: str) -> None:
        data = explained(case)[1]
        pairs = [
            p for b in data["boxes"] for part in ("inputs", "outputs", "inside") for p in b[part]
        ]
        errors = [p["error"] for p in pairs if p["name"] != "losses"]
        errors += [p["error"] for p in data["parameters"].values()]
        assert all(error["relative"] < 1e-12 for error in errors)
        for name, found in data["parameters"].items():
            d = found["differences"]
            slopes = (np.array(d["above"]) - np.array(d["below"])) / (2 * d["step"])
            np.testing.assert_allclose(d["slopes"], slopes, 1e-12, err_msg=name)
            np.testing.assert_allclose(d["slopes"], found["gradients"], 1e-3, 1e-7, err_msg=name)

    def test_data_update(self, case: str) -> None:
        """Update follows from its own numbers."""
        step, data = explained(case)
        about, optimizer = data["about"], data["about"]["optimizer"]
        assert about["clip"] == pytest.approx(min(1, 1 / (step.grad_norm + 1e-6)))
        for name, found in data["parameters"].items():
            if case == "sgd":
                continue
            update = found["update"]
            if case == "muon" and name.startswith("blocks.") and len(found["shape"]) == 2:
                assert update["w"] == found["after"] != found["before"]
                means = [0.05 * about["clip"] * g for g in found["gradients"]]
                assert update.keys() == {"m", "w"} and update["m"] == pytest.approx(means, rel=1e-9)
                continue
            decay = optimizer["weight_decay"] if len(found["shape"]) == 2 else 0
            for before, after, g, clipped, m, v in zip(
                found["before"], found["after"], found["gradients"],
                update["g"], update["m_hat"], update["v_hat"], strict=True,
            ):  # fmt: skip
                assert clipped == pytest.approx(g * about["clip"], rel=1e-12), name
                change = about["learning_rate"] * m / (math.sqrt(v) + optimizer["epsilon"])
                expected = before * (1 - about["learning_rate"] * decay) - change
                assert after == pytest.approx(expected, rel=1e-12, abs=1e-15), name

    def test_data_update_variants(self, case: str) -> None:
        """Variants are other updates of the same step."""
        step, data = explained(case)
        this, unclipped, twice = data["variants"]
        change = (step.after - step.before).norm().item()
        assert this["length"] == pytest.approx(change, rel=1e-12)
        assert twice["length"] == pytest.approx(2 * change, rel=1e-9)
        assert unclipped["length"] != this["length"]
        loss = step.wrapper.forward(step.tokens, step.tokens)["loss"].item()
        assert this["loss"] == pytest.approx(loss, rel=1e-12)

    def test_data_tied_gradients(self, case: str) -> None:
        data = explained(case)[1]
        if data["about"]["config"]["tie_embeddings"]:
            output, embedding, together = (
                values(data["arrays"][data["tied"][part]])
                for part in ("output", "embedding", "together")
            )
            np.testing.assert_allclose(output + embedding, together, 1e-4, 1e-7)
        else:
            assert data["tied"] is None


def test_rows_important() -> None:
    assert spread(5, 64) == [0, 1, 2, 3, 4]
    assert spread(1000, 4, [999, 7, 1000]) == [0, 7, 500, 999]
    kept = spread(4096, 64, range(60, 90))
    assert set(range(60, 90)) <= set(kept) and len(kept) == 64 and kept == sorted(kept)


def test_arrays_sampled_once() -> None:
    arrays = Arrays({"V": [77]})
    x = torch.arange(2 * 100 * 90, dtype=torch.float64).view(2, 100, 90)
    assert arrays.add(x, ["H", "T", "V"]) == arrays.add(x, ["H", "T", "V"]) == 0
    array = arrays.items[0]
    assert len(array["rows"]) == 64 and 77 in array["columns"]
    rows, columns = torch.tensor(array["rows"]), torch.tensor(array["columns"])
    assert len(columns) == 32, "at most 64 x 64 numbers in all"
    np.testing.assert_array_equal(values(array), x[:, rows][:, :, columns].float().numpy())
    assert (array["least"], array["most"]) == (0, x.max().item())
