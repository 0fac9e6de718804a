"""One training step of each candidate: ours, the same model under autograd, transformers'.

All have the same start weights, batches, AdamW settings, clipping and learning rate. "bfloat16" is
what each recommends: bfloat16 weights with float32 masters for ours, float32 weights under autocast
for the others. The vocabulary of the GPT-2 models is the padded one, 50,304, for all: an odd
50,257 would slow the others' matrix products down, while ours pad by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import machine
from mantrans.config import ModelConfig
from mantrans.data.stories import stories
from mantrans.data.tokenizer import load_tokenizer
from mantrans.interop.huggingface import to_theirs
from mantrans.models import GPT2
from mantrans.training.step import TrainStep
from mantrans.wrapper import CustomTransformerWrapper

# name -> (C, blocks, H, F, V), and what is not GPT-2's
LLAMA = {"norm": "rms_norm", "position": "rope", "mlp": "swiglu", "bias": False}
MODELS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "160 wide": ((160, 4, 4, 480, 4096), {}),
    "seed-sized": ((256, 4, 4, 512, 4096), {}),
    "TinyStories 33M": ((768, 4, 16, 3072, 4096), {}),
    "GPT-2 124M": ((768, 12, 12, 3072, 50304), {}),
    "GPT-2 350M": ((1024, 24, 16, 4096, 50304), {}),
    "tiny": ((32, 2, 2, 64, 4096), {}),
    "Llama 4M": ((256, 4, 4, 704, 4096), LLAMA),
    "Llama 15M": ((288, 6, 6, 768, 4096), LLAMA),
    "SmolLM2 135M": ((576, 30, 9, 1536, 49152), {**LLAMA, "n_kv_heads": 3, "rope_theta": 1e5}),
    "Qwen2.5 0.5B": (
        (896, 24, 14, 4864, 151936),
        {**LLAMA, "n_kv_heads": 2, "rope_theta": 1e6, "qkv_bias": True, "layer_norm_epsilon": 1e-6},
    ),
    "Llama, tiny": ((32, 2, 4, 64, 4096), {**LLAMA, "n_kv_heads": 2}),
}
TOKENIZER = "tinystories_bpe_4096"
LEARNING_RATE = 3e-4
BETAS, EPSILON, WEIGHT_DECAY, MAX_GRAD_NORM = (0.9, 0.95), 1e-8, 0.1, 1.0
HISTORY = 512  # losses that are kept until they are taken
NamedTensors = Iterable[tuple[str, Tensor]]


def model_config(name: str, T: int) -> ModelConfig:
    """The named model with positions for sequences of T."""
    (C, blocks, H, width, V), others = MODELS[name]
    return ModelConfig(
        d_model=C, n_blocks=blocks, n_heads=H, d_ffn=width, max_seq_len=T, vocab_size=V, **others
    )


# ----------------------------------------------------------------------------------- their text


@cache
def _all_stories() -> Tensor:
    """The tokens of every built-in story, 1-D int64, each story ended."""
    tokenizer = load_tokenizer(TOKENIZER)
    encoded = tokenizer.encode_batch(stories())
    return torch.tensor([token for ids in encoded for token in (*ids, tokenizer.eot_id)])


class Batches:
    """Some batches of stories that lie on the device; step i takes number i, round and round.

    It is a `mantrans.training.batches.TokenSource`, and the baselines read the same rows: no
    loading of data is timed. Stories are read again where they are too few.
    """

    def __init__(self, sequences: int, T: int, count: int = 10) -> None:
        stories, n = _all_stories(), count * sequences * (T + 1)
        tokens = stories.repeat(-(-n // len(stories)))[:n].view(count, sequences, T + 1)
        self.all = tokens.to(machine.device())
        self.current = self.all[0].clone()

    def load(self, step: int) -> None:
        """Make batch `step` the current one, where captured steps read it."""
        self.current.copy_(self.all[step % len(self.all)])

    def rows(self) -> Tensor:
        """(sequences, T+1) int64: inputs and, one further, targets."""
        return self.current


# ---------------------------------------------------------------------------- models of autograd


def _norm(config: ModelConfig, width: int) -> nn.Module:
    if config.norm == "rms_norm":
        return nn.RMSNorm(width, config.layer_norm_epsilon)
    return nn.LayerNorm(width, config.layer_norm_epsilon, bias=config.bias)


def _bias(config: ModelConfig, kind: str) -> bool:
    own = getattr(config, kind)
    return config.bias if own is None else own


class Block(nn.Module):
    """Pre-norm attention and MLP, scaled_dot_product_attention inside."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C, width, self.D = config.d_model, config.feed_forward_width, config.head_width
        self.heads = (config.n_heads, config.key_value_heads, config.key_value_heads)
        projection_bias, mlp_bias = _bias(config, "projection_bias"), _bias(config, "mlp_bias")
        self.norm_1 = _norm(config, C)
        self.qkv = nn.Linear(C, sum(self.heads) * self.D, bias=_bias(config, "qkv_bias"))
        self.projection = nn.Linear(config.n_heads * self.D, C, bias=projection_bias)
        self.norm_2 = _norm(config, C)
        self.gated = config.mlp == "swiglu"
        if self.gated:
            self.gate_up = nn.Linear(C, 2 * width, bias=mlp_bias)
        else:
            self.up = nn.Linear(C, width, bias=mlp_bias)
        self.down = nn.Linear(width, C, bias=mlp_bias)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        B, T, _ = x.shape
        heads = self.qkv(self.norm_1(x)).view(B, T, -1, self.D).transpose(1, 2)
        q, k, v = heads.split(self.heads, dim=1)
        if angles is not None:
            q, k = (_rotate(z, *angles).to(v.dtype) for z in (q, k))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        x = x + self.projection(out.transpose(1, 2).reshape(B, T, -1))
        return x + self.down(self._hidden(self.norm_2(x)))

    def _hidden(self, y: Tensor) -> Tensor:
        if not self.gated:
            return F.gelu(self.up(y), approximate="tanh")
        gate, up = self.gate_up(y).chunk(2, dim=-1)
        return F.silu(gate) * up


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the layout of halves. x (B, H, T, D); cos, sin (T, D/2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class GPT(nn.Module):
    """A config's model for autograd; forward: tokens, targets (B, T) -> mean loss, 0-d float32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vocab_size is not None
        C, D, T = config.d_model, config.head_width, config.max_seq_len
        self.token_embedding = nn.Embedding(config.vocab_size, C)
        self.learned = config.position == "learned"
        if self.learned:
            self.position_embedding = nn.Embedding(T, C)
        else:
            frequency = config.rope_theta ** -(torch.arange(0, D, 2) / D)
            angles = torch.outer(torch.arange(T), frequency)
            self.register_buffer("cos", angles.cos())
            self.register_buffer("sin", angles.sin())
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_blocks))
        self.final_norm = _norm(config, C)
        self.output = nn.Linear(C, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.output.weight = self.token_embedding.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(tokens)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, V)."""
        T = tokens.shape[1]
        x, angles = self.token_embedding(tokens), None
        if self.learned:
            x = x + self.position_embedding(torch.arange(T, device=tokens.device))
        else:
            angles = self.cos[:T], self.sin[:T]
        for block in self.blocks:
            x = block(x, angles)
        return self.output(self.final_norm(x))

    def load(self, named_parameters: NamedTensors) -> None:
        """Take over our model's weights."""
        theirs = dict(self.named_parameters())
        with torch.no_grad():
            for name, value in named_parameters:
                theirs[name.replace("attention.", "").replace("mlp.", "")].copy_(value)


class TransformersGPT2(nn.Module):
    """`transformers.GPT2LMHeadModel` with its SDPA attention; forward as GPT's.

    Without dropout, which would make it another function. Its GELU is the fused tanh form, the
    faster of the two that it has for the same formula.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        self.config = config
        self.gpt2 = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=config.vocab_size, n_positions=config.max_seq_len,
                n_embd=config.d_model, n_layer=config.n_blocks, n_head=config.n_heads,
                n_inner=config.feed_forward_width, activation_function="gelu_pytorch_tanh",
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None,
                eos_token_id=None, layer_norm_epsilon=config.layer_norm_epsilon, use_cache=False,
                attn_implementation="sdpa",
            )
        )  # fmt: skip

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.gpt2(tokens).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)

    def load(self, named_parameters: NamedTensors) -> None:
        """Take over our model's weights."""
        theirs = dict(self.gpt2.named_parameters())
        with torch.no_grad():
            for name, value in to_theirs(GPT2, self.config, named_parameters).items():
                theirs[name].copy_(value)


# ------------------------------------------------------------------------------- training steps
# A trainer has step(i), one optimization step on batch i; losses(), those since they were last
# taken; resident(), the tensors that live from before a step to after it.


def build(
    provider: str, config: ModelConfig, batches: Batches, micro_batches: int, dtype: str
) -> OurTrainer | AutogradTrainer:
    """The trainer of a name in OURS or BASELINES, at the start weights."""
    if provider in OURS:
        return OurTrainer(config, batches, micro_batches, dtype, *OURS[provider])
    make, mode = BASELINES[provider]
    source = new_model(config, dtype, "native", optimizer="sgd").model.parameters
    start = source.named(source.best_weights())
    return AutogradTrainer(make, config, start, batches, micro_batches, dtype, mode)


def new_model(
    config: ModelConfig, dtype: str, backend: str = "auto", **more: Any
) -> CustomTransformerWrapper:
    """Our model of this shape, with AdamW unless another one is named; the same weights always."""
    if "optimizer" not in more:
        options = {"beta1": BETAS[0], "beta2": BETAS[1], "epsilon": EPSILON}
        options |= {"weight_decay": WEIGHT_DECAY, "max_grad_norm": MAX_GRAD_NORM}
        more |= {"optimizer": "adamw", "optimizer_options": options}
    shape = config.model_copy(update={"dtype": dtype})
    return CustomTransformerWrapper.from_config(
        shape, device=machine.device(), backend=backend, seed=1, **more
    )


def _reduced_precision_reductions(allowed: bool) -> None:
    """Whether cuBLAS may add partial products in bfloat16. PyTorch lets it, and so do the others;
    we do not (`mantrans.kernels.backend`). The switch is one for the whole process."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = allowed


class OurTrainer:
    """mantrans; backend as in `mantrans.kernels.backend`; capture: the step as one CUDA graph."""

    def __init__(
        self, config: ModelConfig, batches: Batches, micro_batches: int, dtype: str,
        backend: str = "auto", capture: bool = False,
    ) -> None:  # fmt: skip
        self.wrapper = new_model(config, dtype, backend)
        self.train_step = TrainStep(
            self.wrapper.model, self.wrapper.optimizer, batches, micro_batches=micro_batches,
            capture=capture, history=HISTORY,
        )  # fmt: skip

    def step(self, i: int) -> None:
        _reduced_precision_reductions(False)
        if self.train_step.unread == HISTORY:
            self.train_step.read()
        self.train_step.run(i, LEARNING_RATE)

    def losses(self) -> list[float]:
        return [record.loss for record in self.train_step.read()]

    def resident(self) -> Iterator[Tensor]:
        p = self.wrapper.model.parameters
        yield from (p.weights, *self.train_step.gradient_sum.levels)
        yield from self.wrapper.optimizer.state().values()
        if p.master is not None:
            yield p.master


class AutogradTrainer:
    """A module under autograd with fused AdamW. mode: None for eager, else torch.compile's mode."""

    def __init__(
        self, make: Callable[[ModelConfig], nn.Module], config: ModelConfig, start: NamedTensors,
        batches: Batches, micro_batches: int, dtype: str, mode: str | None = None,
    ) -> None:  # fmt: skip
        self.module = module = make(config).to(machine.device())
        module.load(start)
        self.parameters = list(module.parameters())
        groups = [
            {"params": [p for p in self.parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in self.parameters if p.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=True
        )
        self.loss: Callable[[Tensor, Tensor], Tensor] = module
        if mode is not None:
            self.loss = torch.compile(module, mode=mode, dynamic=False)
        self.batches, self.micro_batches, self.dtype = batches, micro_batches, dtype
        # Gradients that a CUDA graph wrote are overwritten by its next replay: where one step
        # replays it several times, they are kept in memory of their own.
        self.keep_gradients = mode == "reduce-overhead" and micro_batches > 1
        if self.keep_gradients:
            for p in self.parameters:
                p.grad = torch.zeros_like(p)
        self._losses: list[Tensor] = []

    def step(self, i: int, learning_rate: float = LEARNING_RATE) -> None:
        _reduced_precision_reductions(True)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.batches.load(i)
        rows = self.batches.rows()
        inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        total = torch.zeros((), device=rows.device)
        device, low = rows.device.type, self.dtype == "bfloat16"
        for x, y in zip(
            inputs.chunk(self.micro_batches), targets.chunk(self.micro_batches), strict=True
        ):
            torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast(device, torch.bfloat16, enabled=low):
                loss = self.loss(x, y) / self.micro_batches
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.keep_gradients)
        self._losses = [*self._losses[-HISTORY:], total]

    def losses(self) -> list[float]:
        taken, self._losses = self._losses, []
        return [x.item() for x in taken]

    def resident(self) -> Iterator[Tensor]:
        yield from self.parameters
        for state in self.optimizer.state.values():
            yield from (x for x in state.values() if isinstance(x, Tensor))


OURS = {
    "native": ("native", False),
    "triton": ("triton", False),
    "triton captured": ("triton", True),
}
BASELINES: dict[str, tuple[Callable[[ModelConfig], nn.Module], str | None]] = {
    "PyTorch eager": (GPT, None),
    "torch.compile": (GPT, "default"),
    "torch.compile reduce-overhead": (GPT, "reduce-overhead"),
    "transformers": (TransformersGPT2, None),
}
