"""Models of transformers with our operations inside, beside themselves without.

Tolerances, relative RMS over each tensor: float64 1e-10, float32 1e-5, as for the whole models in
tests/mantrans/models: a rounding grows through some hundred dependent operations.
"""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mantrans import patch
from tests.mantrans.models import test_against_transformers as our_gpt2
from tests.support import families
from tests.support.compare import assert_close, assert_same_bits

transformers = pytest.importorskip("transformers", reason="its models are patched")
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.loss.loss_utils import ForCausalLMLoss  # noqa: E402

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
B, T = 2, 21


def gpt2(dtype: torch.dtype) -> nn.Module:
    return our_gpt2.build(dtype, "native")[1]


def family(case: str) -> Callable[[torch.dtype], nn.Module]:
    def make(dtype: torch.dtype) -> nn.Module:
        return families.theirs(families.ours(case, dtype, "native"), exact=dtype == torch.float64)

    return make


MODELS: dict[str, tuple[Callable[[torch.dtype], nn.Module], Callable[[Any], Any]]] = {
    "gpt2": (gpt2, patch.patch_gpt2),
    **{case: (family(case), patch.patch_llama) for case in families.CASES if "llama" in case},
    **{case: (family(case), patch.patch_qwen3) for case in families.CASES if "qwen3" in case},
}
FEW = ["gpt2", "llama", "qwen3, window, biases"]
each_model = pytest.mark.parametrize("name", MODELS)
each_kind = pytest.mark.parametrize("name", FEW)
# Llama's code is Qwen3's without norms of heads, a window and biases.
each_of_two = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "llama" else ()) for n in FEW]
)


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Callable[[Any], Any]]:
    make, put = MODELS[name]
    return make(dtype).train(), put


def batch(model: Any) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (B, T), generator=source)
    labels = ids.clone()
    labels[0, :5] = labels[1, 15:] = -100  # no row without a key has a target, see `ragged`
    return ids, labels


class Watch(TorchDispatchMode):
    """Counts the calls of each operation; ours by their names alone."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen[function.name().removeprefix("mantrans::")] += 1
        return function(*args, **(kwargs or {}))


def plain_loss(model: Any, ids: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """From the logits: the model's own loss rounds them to float32."""
    logits = model(ids, **options).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> None:
    """A bias of keys has no gradient: there rounding is measured beside the bias of queries."""
    assert found.keys() == expected.keys()
    for name, x in found.items():
        y = expected[name]
        if name.endswith("c_attn.bias"):
            size = y.chunk(3)[0].norm()
        else:
            size = expected[name.replace("k_proj.bias", "q_proj.bias")].norm()
        assert (x - y).norm() <= tolerance * size, f"{name}: {(x - y).norm() / size:.1e}"


# ------------------------------------------------------------------------------- the same numbers


@contextmanager
def without_exact_norms(model: Any) -> Iterator[None]:
    """Inside, its norms have their class's forward, which alone is replaced."""
    own = {m: vars(m).pop("forward") for m in model.modules()
           if type(m).__name__.endswith("RMSNorm") and "forward" in vars(m)}  # fmt: skip
    yield
    for module, forward in own.items():
        module.forward = forward


@each_model
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float64, marks=pytest.mark.slow), torch.float32], ids=str
)
def test_patch_gradients(name: str, dtype: torch.dtype) -> None:
    """Loss and every gradient, with some labels ignored; afterwards the first bits again."""
    model, put = made(name, dtype)
    ids, labels = batch(model)
    options = {"use_cache": False}
    before = plain_loss(model, ids, labels, **options)
    expected = gradients(model, before)
    with without_exact_norms(model):
        put(model)
        outputs = model(ids, labels=labels, **options)
        assert outputs.logits is None
        assert_close(outputs.loss.detach(), before.detach(), TOLERANCE[dtype])
        assert_same_gradients(gradients(model, outputs.loss), expected, TOLERANCE[dtype])
        patch.unpatch(model)
    assert_same_bits(gradients(model, plain_loss(model, ids, labels, **options)), expected)


def ragged(ids: Tensor) -> dict[str, Tensor]:
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, 15:] = 0
    return {"attention_mask": mask}


def packed(ids: Tensor) -> dict[str, Tensor]:
    positions = torch.cat((torch.arange(8), torch.arange(T - 8)))
    return {"position_ids": positions.expand(B, T), "use_cache": False}


SITUATIONS: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "cache": lambda ids: {"use_cache": True},
    "mask of ones": lambda ids: {"attention_mask": torch.ones_like(ids), "use_cache": False},
    "padding": ragged,
    "packed": packed,
    "positions of each row": lambda ids: {
        "position_ids": torch.arange(T) + torch.tensor([[0], [9]]), "use_cache": False,
        "attention_mask": torch.ones_like(ids),
    },
    "shift_labels": lambda ids: {"shift_labels": ids, "use_cache": False},
    "num_items": lambda ids: {"num_items_in_batch": torch.tensor(7), "use_cache": False},
    "num_items, int": lambda ids: {"num_items_in_batch": 7, "use_cache": False},
    "mask of four axes": lambda ids: {
        "attention_mask": torch.where(torch.rand(B, 1, T, T) - torch.eye(T) < 0.5, 0.0, -1e30),
        "use_cache": False,
    },
    "not causal": lambda ids: {"is_causal": False, "use_cache": False},
    "unknown argument": lambda ids: {"of_another_kind": 1, "use_cache": False},
    "return_dict": lambda ids: {"return_dict": True, "use_cache": False},
    "hidden states": lambda ids: {"output_hidden_states": True},
    "logits_to_keep": lambda ids: {"logits_to_keep": T},
    "tuple": lambda ids: {"return_dict": False},
}  # fmt: skip


@each_of_two
@pytest.mark.parametrize("situation", SITUATIONS)
def test_patch_situations(name: str, situation: str) -> None:
    """Their own loss, float32: with what a caller may pass."""
    model, put = made(name)
    ids, labels = batch(model)
    options = SITUATIONS[situation](ids)
    results, classes = [], []
    for prepare in (lambda model: model, put):
        prepare(model)
        outputs = model(input_ids=ids, labels=labels, **options)
        loss = outputs[0]
        assert loss.dim() == 0
        extra = getattr(outputs, "hidden_states", None) or ()
        results.append((loss.detach(), extra, gradients(model, loss)))
        classes.append(type(outputs))
    assert classes[0] is classes[1]
    (loss, extra, found), (loss_2, extra_2, found_2) = results
    assert_close(loss_2, loss, 1e-5)
    assert_same_gradients(found_2, found, 2e-5)
    assert len(extra) == len(extra_2)
    for x, y in zip(extra_2, extra, strict=True):
        assert_close(x.detach(), y.detach(), 1e-5)


@each_kind
def test_patch_checkpointing(name: str) -> None:
    """With gradient checkpointing the same bits as without, and every layer computed again."""
    model, put = made(name)
    ids, labels = batch(model)
    put(model)
    products, results = [], []
    for prepare in (lambda: None, model.gradient_checkpointing_enable):
        prepare()
        with Watch() as watch:
            results.append(gradients(model, model(ids, labels=labels, use_cache=False).loss))
        products.append(watch.seen["swiglu"] + watch.seen["bias_gelu"])
    assert_same_bits(*results)
    assert products == [model.config.num_hidden_layers, 2 * model.config.num_hidden_layers]


def doubled_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Another implementation, for which transformers makes no masks."""
    out, _ = sdpa_attention_forward(*args, **kwargs)
    return 2 * out, None


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@each_of_two
@pytest.mark.parametrize(
    "changed",
    ["hooks", "forwards", "scaling", "activation", "attention", "loss", "product", "modules"],
)
def test_patch_changed_afterwards(name: str, changed: str) -> None:
    """What is done to a patched model does to its numbers what it does to those of an unpatched
    one: hooks run, and ours is not taken for what it does not serve."""
    results = []
    for patched in (False, True):
        model, put = made(name)
        ids, labels = batch(put(model) if patched else model)
        layer = next(m for m in model.modules() if type(m).__name__.endswith(("Layer", "Block")))
        attention = layer.attn if name == "gpt2" else layer.self_attn
        options: dict[str, Any] = {"use_cache": False}
        last = layer.ln_2 if name == "gpt2" else layer.post_attention_layernorm
        act = layer.mlp.act if name == "gpt2" else layer.mlp.act_fn
        watched = [last, act, model.lm_head, *([layer.mlp.c_fc] if name == "gpt2" else [])]
        if changed == "hooks":
            for number, module in enumerate(watched):
                module.register_forward_hook(lambda m, x, y, n=number: y * (1 + 0.1 * n) + 0.1)
        elif changed == "forwards":
            for module in watched:
                module.forward = lambda x, own=module.forward: 1.1 * own(x) + 0.1
        elif changed == "loss":
            model.loss_function = lambda logits, labels, **rest: (
                3 * ForCausalLMLoss(logits, labels, logits.shape[-1])
            )
        elif changed == "product":
            product = layer.mlp.c_fc if name == "gpt2" else layer.mlp.gate_proj
            product.register_forward_hook(lambda m, x, y: 1.1 * y)
        elif changed == "modules":  # as an adapter puts them
            first = "c_fc" if name == "gpt2" else "gate_proj"
            setattr(layer.mlp, first, nn.Sequential(getattr(layer.mlp, first)))
            model.lm_head.__class__ = Doubled
        elif changed == "scaling":
            attention.scaling *= 2
        elif changed == "activation":
            layer.mlp.act = layer.mlp.act_fn = nn.Tanh()
        else:
            transformers.AttentionInterface.register("doubled", doubled_attention)
            model.set_attn_implementation("doubled")
        loss = model(ids, labels=labels, **options).loss
        results.append((loss.detach(), gradients(model, loss)))
    (loss, expected), (found_loss, found) = results
    assert_close(found_loss, loss, 1e-5)
    assert_same_gradients(found, expected, 2e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_patch_float32_norms(name: str) -> None:
    """Norms in float32 in a bfloat16 model, as adapters have them: every product sees the dtype
    that it sees in the unpatched one."""
    seen: list[list[torch.dtype]] = []
    for patched in (False, True):
        model, put = made(name)
        ids, _ = batch(put(model) if patched else model)
        model.bfloat16()
        seen.append([])
        for module in model.modules():
            if type(module).__name__.endswith("Norm"):
                module.float()
            elif type(module).__name__.endswith(("MLP", "Attention")):
                module.register_forward_pre_hook(
                    lambda m, args, kwargs, kinds=seen[-1]: kinds.append(
                        (*args, *kwargs.values())[0].dtype
                    ),
                    with_kwargs=True,
                )
        with torch.autocast("cpu", torch.bfloat16):
            base = getattr(model, model.base_model_prefix)(ids, use_cache=False)
            seen[-1].append(base.last_hidden_state.dtype)
    assert seen[0] == seen[1] and len(seen[0]) > 4


def test_patch_outputs_without_labels_or_training() -> None:
    """Logits where the model's own code runs; arguments by position are its own matter."""
    model, put = made("llama")
    ids, labels = batch(put(model))
    assert model(ids, labels=labels, use_cache=False).logits is None
    assert model(ids, labels=labels, logits_to_keep=T).logits is not None
    assert model(ids, None, None, None, None, labels).logits is not None
    with pytest.raises(TypeError, match="multiple values for argument 'labels'"):
        model(ids, None, None, None, None, labels, labels=labels)
    assert model.eval()(ids, labels=labels).logits is not None


def test_patch_layer_twice() -> None:
    """A layer that stands in two places is patched once."""
    model, put = made("llama")
    model.model.layers[1] = model.model.layers[0]
    ids, labels = batch(model)
    expected = model(ids, labels=labels, use_cache=False).loss
    loss = put(model)(ids, labels=labels, use_cache=False).loss
    assert_close(loss.detach(), expected.detach(), 1e-5)
    layer = patch.unpatch(model).model.layers[0]
    assert type(layer) is type(made("llama")[0].model.layers[0])


def test_patch_num_items_of_one_axis() -> None:
    """As Trainer gives them under DataParallel."""
    model, put = made("llama")
    ids, labels = batch(put(model))
    one, axis = (
        model(ids, labels=labels, num_items_in_batch=n, use_cache=False).loss.detach()
        for n in (torch.tensor(7), torch.tensor([7]))
    )
    assert_same_bits(axis, one)


@each_kind
def test_patch_labels_all_ignored(name: str) -> None:
    """As the unpatched model: the loss is NaN, and no gradient is."""
    model, put = made(name)
    ids, labels = batch(put(model))
    loss = model(ids, labels=torch.full_like(labels, -100), use_cache=False).loss
    assert loss.isnan()
    assert not any(g.any() for g in gradients(model, loss).values())


@pytest.mark.slow
@each_kind
def test_patch_compile_fullgraph(name: str) -> None:
    """One graph of loss and gradients: the same numbers as without."""
    model, put = made(name)
    ids, labels = batch(put(model))
    expected = model(ids, labels=labels, use_cache=False).loss
    exact = gradients(model, expected)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(ids, labels=labels, use_cache=False).loss
    assert_close(loss.detach(), expected.detach(), 1e-6)
    assert_same_gradients(gradients(model, loss), exact, 1e-5)


@each_kind
def test_patch_autocast(name: str) -> None:
    """Under autocast gradients are as near those of float32 as the unpatched model's."""
    model, put = made(name)
    ids, labels = batch(model)
    exact = gradients(model, plain_loss(model, ids, labels, use_cache=False))
    far = []
    for prepare in (lambda model: model, put):
        prepare(model)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=labels, use_cache=False).loss
        found = gradients(model, loss)
        assert all(g.dtype == torch.float32 for g in found.values())
        far.append(torch.stack([(found[n] - g).norm() for n, g in exact.items()]).norm())
    assert far[1] <= 1.5 * far[0]


@pytest.mark.slow
@each_kind
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_patch_generate(name: str, padded: bool) -> None:
    """Greedy tokens with a cache, and the logits of an evaluation with labels."""
    model, put = made(name)
    model.eval()
    ids, labels = batch(model)
    options = {"attention_mask": torch.ones_like(ids)}
    if padded:
        options["attention_mask"][0, :6] = 0
    options |= {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    results = []
    for prepare in (lambda model: model, put):
        prepare(model)
        with torch.no_grad():
            results.append((model.generate(ids, **options), model(ids, labels=labels)))
    (tokens, outputs), (tokens_2, outputs_2) = results
    assert torch.equal(tokens, tokens_2) and tokens.shape[1] > T
    assert_close(outputs_2.logits, outputs.logits, 1e-5)
    assert_close(outputs_2.loss, outputs.loss, 1e-5)


def test_patch_operations_run() -> None:
    """Training calls each of them: no other code computes in their place."""
    seen: Counter[str] = Counter()
    for name in FEW:
        model, put = made(name)
        ids, labels = batch(put(model))
        with Watch() as watch:
            model(ids, labels=labels, use_cache=False).loss.backward()
        seen += watch.seen
    forward = {
        "layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm", "rope", "swiglu", "bias_gelu",
        "attention", "linear_cross_entropy",
    }  # fmt: skip
    backward = {f"{n}_backward" for n in forward if not n.startswith("add_")}
    assert forward | backward <= seen.keys()
    others = ("softmax", "scaled_dot", "native_layer_norm", "aten::silu", "gelu", "nll_loss")
    assert not [s for s in seen.keys() - forward - backward if any(other in s for other in others)]


# ------------------------------------------------------------------------------- in and out again


def state_of(model: Any) -> dict[str, Any]:
    """What a patch could leave behind: classes and attributes of modules, and the config."""
    attributes = {n: (type(m), sorted(vars(m))) for n, m in model.named_modules()}
    return {
        **attributes,
        "config": model.config.to_dict(),
        "how": model.config._attn_implementation,
    }


@each_kind
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_unpatch_leaves_nothing(name: str, attention: str) -> None:
    model, put = made(name)
    model.set_attn_implementation(attention)
    before, names = state_of(model), list(model.state_dict())
    signature = inspect.signature(model.forward)
    assert put(model) is model
    assert state_of(model) != before and list(model.state_dict()) == names
    assert inspect.signature(model.forward) == signature  # Trainer reads it
    assert patch.unpatch(model) is model
    assert state_of(model) == before


def test_unpatch_wrapped_forward() -> None:
    """As accelerate wraps a model's forward for mixed precision: it runs the model's own then."""
    model, put = made("llama")
    ids, labels = batch(model)
    expected = model(ids, labels=labels, use_cache=False)
    inner = put(model).forward.__func__
    model.forward = MethodType(lambda self, *args, **kwargs: inner(self, *args, **kwargs), model)
    assert model(ids, labels=labels, use_cache=False).logits is None
    found = patch.unpatch(model)(ids, labels=labels, use_cache=False)
    assert_same_bits(found.logits.detach(), expected.logits.detach())


def test_patch_copy_and_folder(tmp_path: Any) -> None:
    """A copy computes with its own weights; a saved folder is a plain model."""
    model, put = made("llama")
    ids, labels = batch(put(model))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    loss = twin(ids, labels=labels, use_cache=False).loss.item()
    assert loss == pytest.approx(math.log(model.config.vocab_size))
    assert not twin.model.layers[0].mlp(torch.ones(1, 48)).any()
    patch.unpatch(twin)
    replica = model.model.norm._replicate_for_data_parallel()
    replica.weight = torch.zeros(48)
    assert not replica(torch.ones(1, 48)).any()
    with pytest.raises(pickle.PicklingError, match="it's not the same object as transformers"):
        pickle.dumps(model)
    model.save_pretrained(tmp_path)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert found.config._attn_implementation == "sdpa"
    assert_same_bits(dict(found.state_dict()), dict(model.state_dict()))


# ------------------------------------------------------------------------------------- refusals


def small(kind: str, **settings: Any) -> Any:
    sizes = {
        "gpt2": {"n_embd": 8, "n_layer": 1, "n_head": 2, "attn_pdrop": 0.0},
        "llama": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "intermediate_size": 8},
    }[kind]  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, vocab_size=7, **{**sizes, **settings})
    return transformers.AutoModelForCausalLM.from_config(config)


def refusals() -> Iterator[tuple[str, Callable[[], Any], str]]:
    for field, value, expected in [
        ("attn_pdrop", 0.1, "0"), ("activation_function", "relu", "gelu_new or gelu_pytorch_tanh"),
        ("scale_attn_weights", False, "True"), ("scale_attn_by_inverse_layer_idx", True, "False"),
        ("reorder_and_upcast_attn", True, "False"), ("add_cross_attention", True, "False"),
    ]:  # fmt: skip
        message = f"config.{field}: expected {expected}, got {value}"
        yield field, lambda f=field, v=value: patch.patch_gpt2(small("gpt2", **{f: v})), message
    for field, value in [("hidden_act", "gelu"), ("attention_dropout", 0.2)]:
        message = f"config.{field}: expected .*, got {value}"
        yield field, lambda f=field, v=value: patch.patch_llama(small("llama", **{f: v})), message
    message = "model: expected a GPT2LMHeadModel, got LlamaForCausalLM"
    yield "kind", lambda: patch.patch_gpt2(small("llama")), message
    yield "base", lambda: patch.patch_llama(small("llama").model), "ForCausalLM, got LlamaModel"
    yield "nothing", lambda: patch.patch_qwen3(None), "a Qwen3ForCausalLM, got NoneType"
    yield "twice", lambda: patch.patch_llama(patch.patch_llama(small("llama"))), "got a patched one"
    yield "not in", lambda: patch.unpatch(small("llama")), "expected a patched model, got Llama"

    def attentions() -> None:
        model = patch.patch_llama(small("llama"))
        model(torch.ones(1, 3, dtype=torch.long), output_attentions=True)

    yield "attentions", attentions, "output_attentions: expected False for a patched model, got Tr"

    def hooked() -> None:
        model = small("llama")
        model.lm_head._hf_hook = object()
        patch.patch_llama(model)

    yield "hooks", hooked, "expected one without accelerate's hooks, got one on lm_head"

    def other_code(change: Callable[[Any], Any]) -> Callable[[], None]:
        def call() -> None:
            model = small("llama")
            change(model)
            patch.patch_llama(model)

        return call

    of_norm = other_code(lambda model: setattr(model.model.norm, "forward", lambda x: 2 * x))
    yield "forward", of_norm, "model.norm: expected LlamaRMSNorm's own forward, got another one"
    of_mlp = other_code(lambda model: setattr(model.model.layers[0], "mlp", nn.Linear(8, 8)))
    yield "module", of_mlp, r"model.layers.0.mlp: expected LlamaMLP's own forward, got another one"

    class Scaled(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError

    of_model = other_code(lambda model: setattr(model, "__class__", Scaled))
    yield "subclass", of_model, "model: expected LlamaForCausalLM's own forward, got another one"

    def shared() -> None:
        config = small("llama").config
        for _ in range(2):
            patch.patch_llama(transformers.LlamaForCausalLM(config))

    yield "shared config", shared, "config: expected the model's own, got that of a patched one"

    def covered() -> None:
        model = patch.patch_llama(small("llama"))
        norm = model.model.norm
        norm.__class__ = type("Outer", (type(norm),), {})
        patch.unpatch(model)

    yield "covered", covered, "expected no class around a patched one, got one in model.norm"

    def encoder() -> None:
        model, ids = patch.patch_gpt2(small("gpt2")), torch.ones(1, 3, dtype=torch.long)
        model(ids, encoder_hidden_states=torch.zeros(1, 2, 8))

    def softcap() -> None:
        model = patch.patch_llama(small("llama"))
        model(torch.ones(1, 3, dtype=torch.long), softcap=2.0, use_cache=False)

    yield "softcap", softcap, "attention does not support `softcap`"
    yield "encoder", encoder, "encoder_hidden_states: expected None for a patched model, got a tens"

    def dropout(use_cache: bool, kind: str) -> Callable[[], None]:
        def call() -> None:
            model = {"gpt2": patch.patch_gpt2, "llama": patch.patch_llama}[kind](small(kind))
            if kind == "gpt2":
                model.transformer.h[0].attn.attn_dropout.p = 0.1
            else:
                model.model.layers[0].self_attn.attention_dropout = 0.1
            ids = torch.ones(1, 3, dtype=torch.long)
            model.eval()(ids, use_cache=use_cache)
            model.train()(ids, use_cache=use_cache)

        return call

    for kind in ("gpt2", "llama"):
        for cached in (True, False):
            call = dropout(cached, kind)
            yield f"dropout later, {kind}, {cached}", call, "attention dropout: expected 0, got 0.1"


REFUSALS = list(refusals())


@pytest.mark.parametrize(
    ("call", "message"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS]
)
def test_patch_refuses(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        call()
    assert "\n" not in str(refused.value)


def test_patch_refused_untouched() -> None:
    model = small("gpt2", attn_pdrop=0.1)
    before = state_of(model)
    with pytest.raises(ValueError, match="attn_pdrop"):
        patch.patch_gpt2(model)
    assert state_of(model) == before
