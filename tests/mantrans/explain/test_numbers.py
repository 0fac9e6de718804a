"""Every number on the page, recomputed by others (`tests.support.explained`) from the same weights.

What the page shows must be handled here: a key that no check knows is an error.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mantrans.explain.code import TOP
from mantrans.explain.data import Data
from mantrans.explain.step import float64_copy, run
from mantrans.kernels import reference
from mantrans.wrapper import CustomTransformerWrapper
from tests.support import families
from tests.support.explained import Truth, truth, updated

EXACT = 1e-10  # of what float64 computes in another order
T, V, RATE = 9, 97, 3e-3
CASES = (
    "gpt2",
    "gpt2, sgd",
    "qwen3",
    "llama",
    "llama, scaled, tied",
    "qwen2, window",
    "qwen3, window, biases",
)
PARTS = ("inputs", "outputs", "inside")


class Page:
    """A page's data beside the truth. checked: the arrays that a check has read."""

    def __init__(self, data: dict[str, Any], truth: Truth) -> None:
        self.data, self.truth = data, truth
        self.checked: set[int] = set()

    def check_array(self, index: int, expected: Tensor, what: str) -> None:
        """An array is the tensor `expected`: shape, statistics and the elements that are shown."""
        array = self.data["arrays"][index]
        self.checked.add(index)
        assert array.keys() == {
            "shape", "axes", "planes", "rows", "columns", "data", "least", "most", "mean", "rms"
        }, what  # fmt: skip
        if what.endswith("output.y"):
            return
        assert array["shape"] == list(expected.shape), what
        sizes = self.data["about"]["sizes"]
        letters = {**sizes, "HD": sizes["H"] * sizes["D"], "2F": 2 * sizes["F"],
                   "M": (sizes["H"] + 2 * sizes["H_kv"]) * sizes["D"]}  # fmt: skip
        for axis, size in zip(array["axes"], array["shape"], strict=True):
            assert letters.get(axis, size) == size, (what, axis)
        finite = expected[expected.isfinite()]
        statistics = [finite.min(), finite.max(), finite.mean(), finite.square().mean().sqrt()]
        found = [array[name] for name in ("least", "most", "mean", "rms")]
        atol = EXACT * max(1e-3, finite.abs().max().item())
        np.testing.assert_allclose(found, torch.stack(statistics).numpy(), EXACT, atol, True, what)
        matrix = expected if expected.dim() == 3 else expected.reshape(1, -1, expected.shape[-1])
        assert array["planes"] == len(matrix), what
        for axis, kept in ((1, array["rows"]), (2, array["columns"])):
            if kept is not None:
                assert kept == sorted(set(kept)) and len(kept) < matrix.shape[axis], what
                matrix = matrix.index_select(axis, torch.tensor(kept))
        shown = np.frombuffer(base64.b64decode(array["data"]), "<f4").reshape(matrix.shape)
        expected32 = matrix.float().numpy()  # the page keeps float32
        np.testing.assert_allclose(shown, expected32, 3e-7, atol, True, what)


def near(found: Any, expected: Any, what: str, tolerance: float = EXACT) -> None:
    found, expected = (np.asarray(x, dtype=float) for x in (found, expected))
    scale = np.abs(expected).max(initial=0.0)
    np.testing.assert_allclose(found, expected, tolerance, tolerance * max(scale, 1e-6), True, what)


def check_about(page: Page) -> None:
    about, wrapper = page.data["about"], page.truth.wrapper
    config = wrapper.config.resolved()
    assert about["config"] == config
    sizes = {
        "B": 1, "T": page.truth.tokens.shape[1], "C": config["d_model"], "H": config["n_heads"],
        "H_kv": config["n_kv_heads"], "D": config["head_dim"], "F": config["d_ffn"],
        "V": config["vocab_size"],
    }  # fmt: skip
    assert about["sizes"] == sizes
    assert about["parameters"] == sum(x.numel() for x in page.truth.weights.values())
    optimizer = wrapper.trainable()
    assert about["updates"] == wrapper.model.parameters.updates + 1
    assert about["optimizer"].pop("name") == wrapper.optimizer_name
    for name, value in about["optimizer"].items():
        assert value == getattr(optimizer, name)
    norm = torch.cat([g.flatten() for g in page.truth.weights.values()]).norm().item()
    near(about["grad_norm"], norm, "grad_norm")
    near(about["clip"], min(1.0, optimizer.max_grad_norm / (norm + 1e-6)), "clip")
    assert about["applied"] is True
    known = {"config", "sizes", "parameters", "learning_rate", "updates", "optimizer", "grad_norm",
             "clip", "applied", "title", "text", "notes"}  # fmt: skip
    assert about.keys() <= known


def check_losses(page: Page) -> None:
    data, ids = page.data, page.truth.tokens[0].tolist()
    assert [t["id"] for t in data["tokens"]] == ids
    assert data["targets"] == [*ids[1:], None]
    assert data["losses"][-1] is None
    near(data["losses"][:-1], page.truth.losses, "losses")
    near(data["loss"], page.truth.loss, "loss")


def check_boxes(page: Page) -> None:
    boxes = page.data["boxes"]
    assert [b["layer"] for b in boxes] == list(layers(page.truth.wrapper))
    used = [name for box in boxes for name in box["parameters"]]
    assert set(used) == page.truth.weights.keys()
    kept = keeps(page.truth.wrapper)
    for box in boxes:
        assert box.keys() == {
            "layer", "operation", "title", "group", "parameters", "keeps", *PARTS
        }  # fmt: skip
        kind = box["layer"].split(".")[-1]
        assert box["keeps"] == page.truth.tokens.shape[1] * kept[kind], box["layer"]
        for pair in (p for part in PARTS for p in box[part]):
            assert pair.keys() <= {"name", "gradient_name", "value", "gradient", "error"}
            name = f"{box['layer']}.{pair['name']}"
            if name == "loss.losses":
                losses = torch.nn.functional.pad(page.truth.losses, (0, 1), value=torch.nan)
                page.check_array(pair["value"], losses, name)
                assert pair["gradient"] is None
                continue
            page.check_array(pair["value"], page.truth.values[name], name)
            gradient = page.truth.gradients[name]
            page.check_array(pair["gradient"], gradient, f"gradient of {name}")
            check_error(pair["error"], gradient, name)


def keeps(wrapper: CustomTransformerWrapper) -> dict[str, int]:
    """Numbers a token that the backward of a layer reads again, by the end of its name."""
    config = wrapper.config.resolved()
    C, F, V = (config[name] for name in ("d_model", "d_ffn", "vocab_size"))
    H, H_kv, D = (config[name] for name in ("n_heads", "n_kv_heads", "head_dim"))
    M, modern = (H + 2 * H_kv) * D, config["norm"] == "rms_norm"
    norm = C + (1 if modern else 2)  # and the mean
    return {
        "embedding": 0, "norm_1": norm, "norm_2": norm, "final_norm": norm, "qkv": C,
        "rotary": M + H + H_kv if config["qk_norm"] else 0, "attention": M + H * D + 2 * H,
        "projection": H * D, "up": C, "gate_up": C, "mlp": 2 * F if modern else F, "down": F,
        "output": C, "loss": V + 2,
    }  # fmt: skip


def check_error(error: dict[str, float], expected: Tensor, what: str) -> None:
    """What the page says of itself is small, and of two numbers that fit together."""
    assert error.keys() == {"absolute", "relative"}
    largest = expected.abs().max().item()
    assert 0 <= error["absolute"] <= 1e-12 * max(largest, 1e-3), what
    near(error["absolute"], error["relative"] * largest, what, 1e-6)


def layers(wrapper: CustomTransformerWrapper) -> Iterator[str]:
    """What the model computes, in order, as its code is read."""
    modern = wrapper.config.norm == "rms_norm"
    yield "embedding"
    for i in range(wrapper.config.n_blocks):
        own = f"blocks.{i}"
        yield from (f"{own}.norm_1", f"{own}.attention.qkv")
        yield from [f"{own}.attention.rotary"] if modern else []
        yield from (f"{own}.attention", f"{own}.attention.projection", f"{own}.norm_2")
        yield from (f"{own}.mlp.{'gate_up' if modern else 'up'}", f"{own}.mlp", f"{own}.mlp.down")
    yield from ("final_norm", "output", "loss")


def check_moments(page: Page) -> None:
    """The order, and what is alive: what a later operation reads, and nothing else."""
    moments, names = page.data["moments"], list(layers(page.truth.wrapper))
    found = [(m["phase"], None if m["box"] is None else names[m["box"]]) for m in moments]
    order = [("forward", n) for n in names] + [("backward", n) for n in names[::-1]]
    assert found == [*order, ("update", None)]
    alive = living(page.truth.wrapper, page.truth.tokens.shape[1])
    assert [(m["activations"], m["gradients"]) for m in moments] == [*alive, (0, 0)]
    for moment in moments:
        assert moment["functions"], moment
        line = (TOP / moment["caller"]["file"]).read_text().splitlines()
        assert any(f"{name}(" in " ".join(line[moment["caller"]["line"] - 1 :][:4])
                   for name in moment["functions"]), moment  # fmt: skip


def living(wrapper: CustomTransformerWrapper, T: int) -> list[tuple[int, int]]:
    """Numbers of activations and of gradients at each moment of forward and backward: every result
    lives from the operation that makes it to the last one that reads it."""
    names, config = list(layers(wrapper)), wrapper.config.resolved()
    C, H, H_kv, D, F = (
        config[n] for n in ("d_model", "n_heads", "n_kv_heads", "head_dim", "d_ffn")
    )
    modern = config["norm"] == "rms_norm"
    M, vocabulary = (H + 2 * H_kv) * D, -(-config["vocab_size"] // 128) * 128
    statistics, hidden = (1, 2 * F) if modern else (2, F)
    alive = [[0, 0] for _ in 2 * names]

    def at(name: str, way: str) -> int:
        return names.index(name) if way == "forward" else 2 * len(names) - 1 - names.index(name)

    def lives(numbers: int, kind: int, born: str, last: str) -> None:
        ways = [x.split() for x in (born, last)]
        for moment in range(at(*ways[0]), at(*ways[1]) + 1):
            alive[moment][kind] += T * numbers

    def norm(name: str, x: int, reader: str, before: str) -> None:
        """before: the backward that reads the gradient on the residual last."""
        lives(x + statistics, 0, f"{name} forward", f"{name} backward")
        lives(C, 0, f"{name} forward", f"{reader} backward")
        lives(C, 1, f"{reader} backward", f"{name} backward")
        lives(C, 1, f"{name} backward", before)

    lives(C, 0, "embedding forward", "blocks.0.norm_1 backward")
    for i in range(config["n_blocks"]):
        own, last = f"blocks.{i}", i + 1 == config["n_blocks"]
        following = "final_norm" if last else f"blocks.{i + 1}.norm_1"
        attention, mlp, norm_1, norm_2 = (
            f"{own}.{x}" for x in ("attention", "mlp", "norm_1", "norm_2")
        )
        first = f"{mlp}.{'gate_up' if modern else 'up'}"
        before = "embedding backward" if i == 0 else f"blocks.{i - 1}.norm_2 backward"
        norm(norm_1, C if i else 0, f"{attention}.qkv", before)
        norm(norm_2, C, first, f"{norm_1} backward")
        if modern:
            gains = config["qk_norm"]
            end = "backward" if gains else "forward"
            lives(M, 0, f"{attention}.qkv forward", f"{attention}.rotary {end}")
            if gains:
                lives(H + H_kv, 0, f"{attention}.rotary forward", f"{attention}.rotary backward")
            lives(M, 0, f"{attention}.rotary forward", f"{attention} backward")
            lives(M, 1, f"{attention} backward", f"{attention}.rotary backward")
            lives(M, 1, f"{attention}.rotary backward", f"{attention}.qkv backward")
        else:
            lives(M, 0, f"{attention}.qkv forward", f"{attention} backward")
            lives(M, 1, f"{attention} backward", f"{attention}.qkv backward")
        lives(H * D + 2 * H, 0, f"{attention} forward", f"{attention} backward")
        lives(H * D, 1, f"{attention}.projection backward", f"{attention} backward")
        lives(C, 0, f"{attention}.projection forward", f"{norm_2} forward")
        lives(hidden, 0, f"{first} forward", f"{mlp} backward")
        lives(F, 0, f"{mlp} forward", f"{mlp}.down backward")
        lives(F, 1, f"{mlp}.down backward", f"{mlp} backward")
        lives(hidden, 1, f"{mlp} backward", f"{first} backward")
        lives(C, 0, f"{mlp}.down forward", f"{following} forward")
    end = f"blocks.{config['n_blocks'] - 1}.norm_2 backward"
    norm("final_norm", C, "output", end)
    # the loss is computed without the padding of the vocabulary
    lives(vocabulary, 0, "output forward", "output forward")
    lives(config["vocab_size"], 0, "loss forward", "loss forward")
    lives(1, 0, "loss forward", "loss forward")
    lives(2, 0, "loss forward", "loss backward")
    lives(config["vocab_size"], 1, "loss backward", "loss backward")
    lives(vocabulary, 1, "output backward", "output backward")
    return [(a, g) for a, g in alive]


def check_functions(page: Page) -> None:
    for name, found in page.data["functions"].items():
        lines = (TOP / found["file"]).read_text().splitlines()[found["line"] - 1 :]
        source = found["source"].splitlines()
        assert source == lines[: len(source)] and source[0].startswith(f"def {name}("), name


def check_parameters(page: Page) -> None:
    truth, rate = page.truth, page.data["about"]["learning_rate"]
    after, clipped, _, theirs = updated(truth, rate)
    states = {name: theirs.state[x] for name, x in after.items()}
    before = dict(truth.wrapper.model.named_parameters())
    assert list(page.data["parameters"]) == list(before)
    for name, found in page.data["parameters"].items():
        gradient = truth.weights[name]
        assert found["shape"] == list(gradient.shape)
        page.check_array(found["value"], before[name], name)
        page.check_array(found["gradient"], gradient, f"gradient of {name}")
        norms = {"value": before[name].norm(), "gradient": gradient.norm(),
                 "change": (after[name] - before[name]).norm()}  # fmt: skip
        assert found["norms"].keys() == norms.keys()
        for key, norm in norms.items():
            near(found["norms"][key], norm, f"{key} of {name}", 1e-8)
        at = tuple(torch.tensor(found["elements"]).T)
        for key, x in (("gradients", gradient), ("before", before[name]), ("after", after[name])):
            near(found[key], x[at], f"{key} of {name}", 1e-8)
        check_update(found["update"], name, at, clipped[name], after[name], states[name], page)
        check_error(found["error"], gradient, name)

        def loss(element: tuple[int, ...], distance: float, name: str = name) -> float:
            moved = before[name].clone()
            moved[element] += distance
            return truth.loss_of({name: moved})

        check_differences(found, gradient, loss, name)


def check_update(
    found: dict[str, list[float]],
    name: str,
    at: tuple[Tensor, ...],
    clipped: Tensor,
    after: Tensor,
    state: dict[str, Any],
    page: Page,
) -> None:
    expected = {"w": after[at]}
    if state:
        optimizer, t = page.truth.wrapper.trainable(), state["step"].item()
        m, v = state["exp_avg"][at], state["exp_avg_sq"][at]
        hats = m / (1 - optimizer.beta1**t), v / (1 - optimizer.beta2**t)
        expected |= {"g": clipped[at], "m": m, "v": v, "m_hat": hats[0], "v_hat": hats[1]}
    assert found.keys() == expected.keys()
    for key, x in expected.items():
        near(found[key], x, f"{key} of {name}", 1e-8)


def check_differences(
    found: dict[str, Any],
    gradient: Tensor,
    loss: Callable[[tuple[int, ...], float], float],
    name: str,
) -> None:
    """loss: with an element moved so far; that of the other model. Asked for two elements."""
    differences = found["differences"]
    assert differences.keys() == {"step", "above", "below", "slopes"}
    step = differences["step"]
    rises = np.subtract(differences["above"], differences["below"])
    np.testing.assert_allclose(differences["slopes"], rises / (2 * step), 1e-12, 1e-15, name)
    largest = gradient.abs().max().item()
    np.testing.assert_allclose(differences["slopes"], found["gradients"], 0, 1e-5 * largest + 1e-9)
    for i in {0, len(found["elements"]) - 1}:
        for key, sign in (("above", 1), ("below", -1)):
            expected = loss(tuple(found["elements"][i]), sign * step)
            near(differences[key][i], expected, name, 1e-13)


def check_results(page: Page) -> None:
    """What has no matrix of its own has differences of its input."""
    truth = page.truth
    boxes = [
        box for box in page.data["boxes"]
        if box["inputs"] and all(truth.weights[name].dim() == 1 for name in box["parameters"])
    ]  # fmt: skip
    found = page.data["results"]
    assert found.keys() == {f"{b['layer']}.{b['inputs'][0]['name']}" for b in boxes}
    for name, result in found.items():
        assert result.keys() == {"error", "elements", "gradients", "differences"}
        gradient = page.truth.gradients[name]
        check_error(result["error"], gradient, name)
        at = tuple(torch.tensor(result["elements"]).T)
        near(result["gradients"], gradient[at], name)
        check_differences(result, gradient, partial(page.truth.moved, name), name)


def check_residual(page: Page) -> None:
    names = [n for n in layers(page.truth.wrapper) if "norm" in n]
    expected = [
        {"layer": n, "norm": page.truth.values[f"{n}.x"].norm().item(),
         "gradient": page.truth.gradients[f"{n}.x"].norm().item()} for n in names
    ]  # fmt: skip
    assert [r["layer"] for r in page.data["residual"]] == names
    for found, right in zip(page.data["residual"], expected, strict=True):
        assert found.keys() == right.keys()
        near([found["norm"], found["gradient"]], [right["norm"], right["gradient"]], right["layer"])


def check_norms(page: Page) -> None:
    """The means of g and of g x̂ are what the gradient of x lacks along 1 and along x̂."""
    names = [n for n in layers(page.truth.wrapper) if "norm" in n]
    assert list(page.data["norms"]) == names
    for name, found in page.data["norms"].items():
        assert found.keys() == {"g", "x_hat", "square"}
        g, x_hat = page.truth.gradients[f"{name}.x_hat"], page.truth.values[f"{name}.x_hat"]
        if page.truth.wrapper.config.norm == "layer_norm":
            near(found["g"], g.mean(-1), name)
        else:
            assert found["g"] is None
        near(found["x_hat"], (g * x_hat).mean(-1), name)
        near(found["square"], g.square().mean(-1), name)


def check_deltas(page: Page) -> None:
    """δ = Σ p dp of each query and head."""
    names = [n for n in layers(page.truth.wrapper) if n.endswith(".attention")]
    assert page.data["deltas"].keys() == set(names)
    for name, found in page.data["deltas"].items():
        p, dp = (x[f"{name}.p"] for x in (page.truth.values, page.truth.gradients))
        near(found, (p * dp).sum(-1), name)


def check_predictions(page: Page) -> None:
    logits, gradients = page.truth.values["loss.logits"], page.truth.gradients["loss.logits"]
    probabilities, targets = logits.softmax(-1), page.data["targets"]
    assert len(page.data["predictions"]) == len(logits)
    for t, found in enumerate(page.data["predictions"]):
        assert found.keys() == {"ids", "probabilities", "gradients"}
        assert len(set(found["ids"])) == len(found["ids"])
        if targets[t] is not None:
            assert found["ids"][0] == targets[t]
        others = [i for i in found["ids"] if i != targets[t]]
        likeliest = [i for i in logits[t].argsort(descending=True).tolist() if i != targets[t]]
        assert others == likeliest[: len(others)] and len(others) >= 7
        near(found["probabilities"], probabilities[t][found["ids"]], f"position {t}")
        near(found["gradients"], gradients[t][found["ids"]], f"position {t}")


def check_tied(page: Page) -> None:
    tied, truth = page.data["tied"], page.truth
    if not truth.wrapper.config.tie_embeddings:
        assert tied is None
        return
    assert tied.keys() == {"ids", "output", "embedding", "together", "norms"}
    ids, row = tied["ids"], truth.tokens[0]
    assert ids == sorted(set(row.tolist()))
    expected = {
        "output": (truth.gradients["logits"].T @ truth.values["final_norm.y"])[ids],
        "embedding": torch.stack([truth.gradients["embedding.x"][row == i].sum(0) for i in ids]),
        "together": truth.weights["token_embedding.weight"][ids],
    }
    for part, x in expected.items():
        page.check_array(tied[part], x, part)
        near(tied["norms"][part], x.norm(dim=-1), part)


def check_variants(page: Page) -> None:
    truth, before = page.truth, dict(page.truth.wrapper.model.named_parameters())
    ways: dict[str, dict[str, Any]] = {
        "this step": {}, "without clipping": {"clipped": False},
        "twice the learning rate": {"factor": 2.0},
    }  # fmt: skip
    assert [v["name"] for v in page.data["variants"]] == list(ways)
    for found, way in zip(page.data["variants"], ways.values(), strict=True):
        assert found.keys() == {"name", "loss", "length"}
        after, *_ = updated(truth, page.data["about"]["learning_rate"], **way)
        near(found["loss"], truth.loss_of(after), found["name"])
        length = math.sqrt(sum((x - before[n]).square().sum().item() for n, x in after.items()))
        near(found["length"], length, found["name"], 1e-8)


CHECKS = MappingProxyType(
    {
        "about": check_about, "losses": check_losses, "boxes": check_boxes,
        "moments": check_moments, "functions": check_functions, "parameters": check_parameters,
        "results": check_results, "residual": check_residual, "norms": check_norms,
        "deltas": check_deltas, "predictions": check_predictions, "tied": check_tied,
        "variants": check_variants,
    }
)  # fmt: skip
# Checked with the losses, or with what uses them; texts and words hold no number.
ELSEWHERE = {"tokens", "targets", "loss", "arrays", "texts", "words"}


def check_page(data: dict[str, Any], wrapper: CustomTransformerWrapper, tokens: Tensor) -> None:
    """wrapper: the float64 model before the step."""
    assert data.keys() == CHECKS.keys() | ELSEWHERE
    page = Page(data, truth(wrapper, tokens))
    for check in CHECKS.values():
        check(page)
    assert page.checked == set(range(len(data["arrays"]))), "an array that nothing shows"


@cache
def small(case: str) -> tuple[CustomTransformerWrapper, Tensor, dict[str, Any]]:
    """A model that has learned for three steps, the sentence, and the page's data."""
    name, optimizer = case.removesuffix(", sgd"), "sgd" if case.endswith("sgd") else "adamw"
    options = {"optimizer": optimizer, "dtype": torch.float64}
    if name == "gpt2":
        model = CustomTransformerWrapper(
            V, 24, 2, 3, 40, 16, device="cpu", initializer_range=0.2, **options
        )
    else:
        model = families.ours(name, backend="reference", **options)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        batch = torch.randint(V, (2, T), generator=generator)
        model.train_step(batch, batch, learning_rate=RATE)
    tokens = torch.randint(V, (1, T), generator=generator)
    tokens[0, 4] = tokens[0, 1]  # a token twice
    state = model.state_dict()
    return (
        float64_copy(state),
        tokens,
        Data(run(float64_copy(state), tokens, RATE), str, samples=4).all(),
    )


@pytest.mark.slow  # `test_run` has a GPT-2 that is not
@pytest.mark.parametrize("case", CASES)
def test_every_number_of_the_page(case: str) -> None:
    wrapper, tokens, data = small(case)
    assert data["about"]["learning_rate"] == RATE
    check_page(data, wrapper, tokens)


def test_errors_of_broken_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page says so: half as much again is an error of a half, here and in all that follows."""
    join = reference.join_heads  # dq, dk and dv to dqkv
    monkeypatch.setattr(reference, "join_heads", lambda *args: 1.5 * join(*args))
    wrapper = CustomTransformerWrapper(
        V, 16, 2, 2, 24, T, device="cpu", backend="reference", dtype=torch.float64
    )
    tokens = torch.randint(V, (1, T), generator=torch.Generator().manual_seed(5))
    data = Data(run(wrapper, tokens, RATE), str, samples=2).all()
    boxes = {box["layer"]: box for box in data["boxes"]}
    near(boxes["blocks.1.attention"]["inputs"][0]["error"]["relative"], 0.5, "dqkv")
    near(data["results"]["blocks.1.attention.qkv"]["error"]["relative"], 0.5, "dqkv")
    near(data["parameters"]["blocks.1.attention.qkv.bias"]["error"]["relative"], 0.5, "bias")
    assert boxes["blocks.1.attention"]["outputs"][0]["error"]["relative"] < 1e-12
    assert boxes["embedding"]["outputs"][0]["error"]["relative"] > 1e-3
    found = data["results"]["blocks.1.attention.qkv"]
    slopes = np.asarray(found["differences"]["slopes"])
    np.testing.assert_allclose(1.5 * slopes, found["gradients"], 1e-3)
