"""A training step by others: what every number on the page of `mantrans explain` must be.

GPT-2's step is transformers' model with our weights, in float64 under autograd, and torch.optim's
update. For Llama's, Qwen2's and Qwen3's, transformers gives the gradients of the weights, and
`mantrans_oracle` (PyTorch's own functions) those of what lies between.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mantrans.proof import plain
from mantrans.proof.exact import Exact
from mantrans.wrapper import CustomTransformerWrapper
from mantrans_oracle import differentiate
from tests.support import families
from tests.support.huggingface import gpt2, oriented, their_name


def page_data(page: Path) -> dict[str, Any]:
    """The numbers of a page that the command wrote."""
    html = page.read_text(encoding="utf-8")
    found = re.findall(r'<script type="application/json" id="step">(.*?)</script>', html, re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


@dataclass
class Truth:
    """One step from the weights and moments of `wrapper`, float64.

    values, gradients: "LAYER.NAME" -> a result of the forward and its gradient, without B; of a
        layer's inputs too.
    weights: parameter -> gradient. loss_of: the loss with other weights, by name.
    moved: the loss with an element of a value, without B, raised by so much.
    """

    wrapper: CustomTransformerWrapper
    tokens: Tensor  # (1,T)
    values: dict[str, Tensor]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    losses: Tensor  # (T-1,)
    loss_of: Callable[[dict[str, Tensor]], float]
    moved: Callable[[str, tuple[int, ...], float], float]

    @property
    def loss(self) -> float:
        return self.losses.mean().item()


def truth(wrapper: CustomTransformerWrapper, tokens: Tensor) -> Truth:
    """wrapper: a float64 model on the CPU, before its update."""
    wrapper = copied(wrapper)
    of_gpt2 = wrapper.config.norm == "layer_norm"
    values, gradients, weights, theirs = (transformers_gpt2 if of_gpt2 else by_autograd)(
        wrapper, tokens
    )
    source_of = sources(values, wrapper.config.n_blocks, of_gpt2)
    for found in (values, gradients):
        found |= {name: found[source] for name, source in source_of.items() if source in found}
    losses = F.cross_entropy(values["loss.logits"][:-1], tokens[0, 1:], reduction="none")

    @torch.no_grad()
    def loss_of(changed: dict[str, Tensor]) -> float:
        other = copied(wrapper)
        for name, value in changed.items():
            other.model.parameters.write(name, value)
        logits = theirs(other)(tokens).logits[0, :-1]
        return F.cross_entropy(logits, tokens[0, 1:]).item()

    def moved(name: str, element: tuple[int, ...], distance: float) -> float:
        def see(result: str, x: Tensor) -> Tensor:
            if result == source_of.get(name, name):
                x = x.clone()
                x[(0, *element)] += distance
            return x

        targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
        return Exact(wrapper.model, plain).loss(tokens, targets, see).item()

    return Truth(wrapper, tokens, values, gradients, weights, losses, loss_of, moved)


def copied(wrapper: CustomTransformerWrapper) -> CustomTransformerWrapper:
    state = copy.deepcopy(wrapper.state_dict())
    options = {
        name: x for name, x in vars(wrapper.trainable()).items()
        if isinstance(x, float) or name == "max_grad_norm"
    }  # fmt: skip
    return CustomTransformerWrapper.from_state_dict(
        state, device="cpu", backend="reference", optimizer_options=options
    )


Found = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], Callable]


def by_autograd(wrapper: CustomTransformerWrapper, tokens: Tensor) -> Found:
    theirs = families.theirs(wrapper, exact=True)
    logits = theirs(tokens).logits[0, :-1]
    F.cross_entropy(logits, tokens[0, 1:]).backward()
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
    found = differentiate(wrapper.model, tokens, targets)
    values, gradients = ({n: x[0] for n, x in d.items()} for d in (found.values, found.results))
    weights = families.gradients(wrapper, theirs)
    return values, gradients, weights, lambda other: families.theirs(other, exact=True)


def transformers_gpt2(wrapper: CustomTransformerWrapper, tokens: Tensor) -> Found:
    def build(other: CustomTransformerWrapper) -> torch.nn.Module:
        return gpt2(other.config, torch.float64, other.model.named_parameters()).eval()

    theirs, seen = build(wrapper), {}
    outputs_of = {"embedding.x": theirs.transformer.drop, "final_norm.y": theirs.transformer.ln_f}
    inputs_of = {"final_norm.x": theirs.transformer.ln_f}
    for i, block in enumerate(theirs.transformer.h):
        own = f"blocks.{i}"
        inputs_of |= {f"{own}.norm_1.x": block.ln_1, f"{own}.norm_2.x": block.ln_2,
                      f"{own}.attention.out": block.attn.c_proj}  # fmt: skip
        outputs_of |= {
            f"{own}.norm_1.y": block.ln_1, f"{own}.attention.qkv.y": block.attn.c_attn,
            f"{own}.attention.projection.y": block.attn.c_proj, f"{own}.norm_2.y": block.ln_2,
            f"{own}.mlp.u": block.mlp.c_fc, f"{own}.mlp.a": block.mlp.act,
            f"{own}.mlp.down.y": block.mlp.c_proj, f"{own}.attention.p": block.attn,
        }  # fmt: skip

    def keep(name: str, x: Any) -> None:
        x = x[-1] if isinstance(x, tuple) else x  # attention: (out, p)
        x.retain_grad()
        seen[name] = x

    for name, module in inputs_of.items():
        module.register_forward_pre_hook(lambda _, x, name=name: keep(name, x[0]))
    for name, module in outputs_of.items():
        module.register_forward_hook(lambda _, x, y, name=name: keep(name, y))
    logits = theirs(tokens).logits
    keep("logits", logits)
    F.cross_entropy(logits[0, :-1], tokens[0, 1:]).backward()
    values = {name: x.detach()[0] for name, x in seen.items()}
    gradients = {name: x.grad[0] for name, x in seen.items()}
    named = dict(theirs.named_parameters())
    weights = {n: oriented(n, named[their_name(n)].grad) for n in wrapper.model.parameters.by_name}
    inside_gpt2(wrapper, values, gradients)
    return values, gradients, weights, build


def inside_gpt2(
    wrapper: CustomTransformerWrapper, values: dict[str, Tensor], gradients: dict[str, Tensor]
) -> None:
    """What transformers' modules do not show: x_hat, h, q, k, v and the scores."""
    named = dict(wrapper.model.named_parameters())
    for layer in [n.removesuffix(".weight") for n in named if "norm" in n and "weight" in n]:
        values[f"{layer}.x_hat"] = F.layer_norm(
            values[f"{layer}.x"], named[f"{layer}.weight"].shape,
            eps=wrapper.config.layer_norm_epsilon,
        )  # fmt: skip
        gradients[f"{layer}.x_hat"] = gradients[f"{layer}.y"] * named[f"{layer}.weight"]
    for i in range(wrapper.config.n_blocks):
        own, mlp = f"blocks.{i}.attention", f"blocks.{i}.mlp"
        values[f"{mlp}.up.y"] = values[f"{mlp}.u"] - named[f"{mlp}.up.bias"]
        gradients[f"{mlp}.up.y"] = gradients[f"{mlp}.u"]
        for found in (values, gradients):
            for name, x in zip("qkv", found[f"{own}.qkv.y"].chunk(3, dim=-1), strict=True):
                found[f"{own}.{name}"] = x.unflatten(-1, (wrapper.config.n_heads, -1)).transpose(
                    0, 1
                )
        q, k = values[f"{own}.q"], values[f"{own}.k"]
        hidden = torch.ones(len(q[0]), len(q[0])).triu(1).bool()
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf).requires_grad_()
        p = scores.softmax(-1)
        (gradients[f"{own}.scores"],) = torch.autograd.grad(p, scores, gradients[f"{own}.p"])
        values[f"{own}.scores"] = scores.detach()


def sources(values: dict[str, Tensor], n_blocks: int, of_gpt2: bool) -> dict[str, str]:
    """An input of a layer -> the result that it is, of a layer before."""
    found = {"blocks.0.norm_1.x": "embedding.x", "output.x": "final_norm.y", "output.y": "logits",
             "loss.logits": "logits"}  # fmt: skip
    first = "up" if of_gpt2 else "gate_up"
    rotary = "blocks.0.attention.rotary.rotated" in values
    for i in range(n_blocks):
        own = f"blocks.{i}"
        found |= {
            f"{own}.attention.qkv.x": f"{own}.norm_1.y",
            f"{own}.attention.rotary.qkv": f"{own}.attention.qkv.y",
            f"{own}.attention.qkv": f"{own}.attention.{'rotary.rotated' if rotary else 'qkv.y'}",
            f"{own}.attention.projection.x": f"{own}.attention.out",
            f"{own}.mlp.{first}.x": f"{own}.norm_2.y",
            f"{own}.mlp.h": f"{own}.mlp.{first}.y",
            f"{own}.mlp.down.x": f"{own}.mlp.a",
        }
    return found


def updated(
    truth: Truth, rate: float, factor: float = 1.0, clipped: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor], float, torch.optim.Optimizer]:
    """torch.optim's update: weights, clipped gradients, their norm before, and the optimizer."""
    optimizer = truth.wrapper.trainable()
    limit = optimizer.max_grad_norm if clipped else None
    leaves = {name: x.clone() for name, x in truth.wrapper.model.named_parameters()}
    for name, x in leaves.items():
        x.grad = truth.weights[name].clone()
    norm = torch.nn.utils.clip_grad_norm_(leaves.values(), torch.inf if limit is None else limit)
    groups = [
        {"params": [x for x in leaves.values() if x.dim() > 1],
         "weight_decay": optimizer.weight_decay},
        {"params": [x for x in leaves.values() if x.dim() == 1], "weight_decay": 0.0},
    ]  # fmt: skip
    if truth.wrapper.optimizer_name == "sgd":  # without momentum its decay is decoupled too
        theirs: torch.optim.Optimizer = torch.optim.SGD(groups, lr=rate * factor)
    else:
        betas = optimizer.beta1, optimizer.beta2
        theirs = torch.optim.AdamW(groups, rate * factor, betas, optimizer.epsilon)
    p = truth.wrapper.model.parameters
    for name, x in leaves.items():
        moments = {key: p.view(flat, name).clone() for key, flat in optimizer.state().items()}
        theirs.state[x] = {"step": p.updates.double().clone(), **moments} if moments else {}
    theirs.step()
    return leaves, {n: x.grad for n, x in leaves.items()}, norm.item(), theirs
