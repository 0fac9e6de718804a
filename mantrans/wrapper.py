"""CustomTransformerWrapper: a model with its optimizer, and checks of all arguments.

model = CustomTransformerWrapper(vocab_size=4096, d_model=256, n_blocks=4, n_heads=4)
outputs = model.forward(input_ids, labels=labels)
result = model.train_step(input_ids, labels, learning_rate=1e-3)
tokens = model.generate(input_ids, max_length=100)
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mantrans.checkpoint import state_file
from mantrans.config import ModelConfig, TrainingConfig
from mantrans.config.arguments import (
    BUILD,
    SAMPLING,
    SHAPE,
    STOP,
    FilePath,
    GradNorm,
    Rate,
    checked,
    field,
)
from mantrans.distributed.world import World
from mantrans.errors import CheckpointError, ConfigError, show
from mantrans.interop import gguf_file, huggingface
from mantrans.kernels import backend as backends
from mantrans.kernels.reference import IGNORE_INDEX, sum_in_parts
from mantrans.models import build, generation
from mantrans.models.sampling import Sampling
from mantrans.models.stop_texts import Codec, before_stop
from mantrans.models.transformer import CustomTransformer
from mantrans.optim import OPTIMIZERS, Optimizer
from mantrans.parameters import Parameter
from mantrans.runtime import resolve_device, resolve_dtype

# Fields that do not change what a model's weights compute.
_OF_NO_FUNCTION = ("dtype", "initializer_range")
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_log = logging.getLogger(__name__)


class CustomTransformerWrapper:
    """A decoder-only transformer with its optimizer.

    vocab_size, d_model, n_blocks, n_heads, d_ffn, max_seq_len, and the keywords from tie_embeddings
        to mlp_bias: as in `mantrans.config.ModelConfig`; by default a GPT-2.
    dtype: torch.bfloat16, torch.float32, torch.float64, or "auto": bfloat16 where the processor
        multiplies it, else float32, which is faster there (see `mantrans.runtime`).
    device: "cpu", "cuda", "cuda:1", or "auto" (a GPU if there is one).
    backend: "auto", "reference", "native" or "triton" (see `mantrans.kernels.backend`).
    optimizer: "sgd" (the default), "adamw" or "muon", with `optimizer_options` as its keywords.
    seed: of the initial weights.
    recompute: "none", "gelu" or "block": which activations are recomputed instead of kept.
    stochastic_rounding: bfloat16 weights without float32 masters.
    inference: only weights, 2 bytes a parameter in bfloat16; no gradients, masters or optimizer.

    Raises ConfigError (a ValueError): "ARGUMENT: expected X, got Y". An argument has the limits of
    the config's field of that name (docs/configuration.md); scalars of NumPy are accepted.
    """

    @checked(**SHAPE, **BUILD)
    def __init__(
        self,
        vocab_size: int,
        d_model: int = 256,
        n_blocks: int = 4,
        n_heads: int = 4,
        d_ffn: int | None = None,
        max_seq_len: int = 256,
        *,
        dtype: torch.dtype | str = torch.bfloat16,
        device: torch.device | str = "auto",
        backend: str = "auto",
        optimizer: str = "sgd",
        optimizer_options: dict[str, Any] | None = None,
        seed: int = 0,
        tie_embeddings: bool = True,
        bias: bool = True,
        layer_norm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        norm: str = "layer_norm",
        position: str = "learned",
        rope_theta: float = 10_000.0,
        rope_scaling_factor: float | None = None,
        rope_low_freq_factor: float = 1.0,
        rope_high_freq_factor: float = 4.0,
        rope_original_length: int = 8192,
        mlp: str = "gelu",
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: bool = False,
        attention_window: int | None = None,
        qkv_bias: bool | None = None,
        projection_bias: bool | None = None,
        mlp_bias: bool | None = None,
        recompute: str = "none",
        stochastic_rounding: bool = False,
        inference: bool = False,
    ) -> None:
        given = locals()
        resolved = resolve_device(device)
        shape = {name: given[name] for name in SHAPE}
        shape["dtype"] = _name(resolve_dtype(dtype, resolved))
        self._build(
            ModelConfig.complete(shape, "CustomTransformer"),
            device=resolved,
            backend=backend,
            optimizer=optimizer,
            optimizer_options=optimizer_options,
            seed=seed,
            recompute=recompute,
            stochastic_rounding=stochastic_rounding,
            inference=inference,
        )

    @classmethod
    def from_config(cls, config: ModelConfig, **keywords: Any) -> CustomTransformerWrapper:
        """The model that `config` describes; vocab_size must be set.

        keywords: device, backend, optimizer, optimizer_options, seed, recompute,
        stochastic_rounding, inference: as for the class. world, shard: see `Parameters`.
        """
        wrapper = cls.__new__(cls)
        wrapper._build(config, **keywords)
        return wrapper

    @checked(**BUILD)
    def _build(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str = "auto",
        backend: str = "auto",
        optimizer: str = "sgd",
        optimizer_options: dict[str, Any] | None = None,
        seed: int = 0,
        recompute: str = "none",
        stochastic_rounding: bool = False,
        inference: bool = False,
        world: World | None = None,
        shard: str = "none",
    ) -> None:
        if not isinstance(config, ModelConfig) or config.vocab_size is None:
            raise ConfigError(
                f"config: expected a ModelConfig with a vocab_size, got {show(config)}"
            )
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        self.config = config.model_copy(update={"dtype": _name(self.dtype)})
        options = _checked_options(optimizer, optimizer_options)
        try:
            ops = backends.choose(backend, self.device, self.dtype)
        except ValueError as wrong:
            raise ConfigError(str(wrong)) from None
        self.model = CustomTransformer(
            self.config,
            ops,
            dtype=self.dtype,
            device=self.device,
            recompute=recompute,
            training=not inference,
            keep_master=not stochastic_rounding,
            seed=seed,
            world=world,
            shard=shard,
        )
        self.optimizer_name = optimizer
        self.optimizer: Optimizer | None = None
        if not inference:
            self.optimizer = OPTIMIZERS[optimizer](ops, self.model.parameters, **options)

    # ---------------------------------------------------------------------------------- training

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Logits, and with labels the mean loss over the labels that are not -100.

        input_ids, labels (B, T) integers. labels has the positions of input_ids and is shifted
        here: the logits at t are compared with the label at t + 1.
        Returns {"logits": (B, T, V)} and, with labels, {"loss": 0-d}.
        """
        input_ids = self._checked_ids(input_ids, "input_ids")
        logits = self.model.forward(input_ids, keep=False)
        if labels is None:
            return {"logits": logits}
        targets = shift(self._checked_labels(labels, input_ids)).flatten()
        # without the padding of the vocabulary's last rows, as kernels read it
        flat = logits.reshape(len(targets), -1).contiguous()
        losses, _ = self.model.ops.cross_entropy_forward(flat, targets, self.config.vocab_size)
        return {"logits": logits, "loss": sum_in_parts(losses) * mean_scale(targets, losses.dtype)}

    @checked(
        learning_rate=Rate,
        max_grad_norm=GradNorm,
        micro_batches=field(TrainingConfig, "gradient_accumulation_steps"),
    )
    def train_step(
        self,
        input_ids: Tensor,
        labels: Tensor,
        learning_rate: float = 1e-3,
        max_grad_norm: float | Literal["configured"] | None = "configured",
        micro_batches: int = 1,
    ) -> dict[str, Any]:
        """Forward, backward, clip, update.

        max_grad_norm: a longer gradient is scaled down to this norm; None never scales. By default
            the optimizer's (optimizer_options), which is 1.0 unless set.
        micro_batches: the number of parts in which the batch is processed, to save memory. The
            gradient is that of the whole batch, a mean over all its targets.

        Returns {"loss": float, "status": "ok" | "nan_detected" | "nan_gradient",
        "grad_norm": float}. Weights, moments and the count of updates stay as they were unless the
        status is "ok"; so they do if no label is a target, which is "ok" and a line in the log.
        """
        input_ids = self._checked_ids(input_ids, "input_ids")
        targets = shift(self._checked_labels(labels, input_ids))
        optimizer = self.trainable()
        loss = self.accumulate_gradients(input_ids, targets, micro_batches, overwrite=True)
        rate = torch.tensor(learning_rate, dtype=self._wide, device=self.device)
        scale = mean_scale(targets, self._wide)
        outcome = optimizer.step(loss, rate, max_grad_norm=max_grad_norm, has_targets=scale > 0)
        status = "ok"
        if scale == 0:
            _log.warning("train_step: no label is a target: nothing was updated")
        elif not outcome.applied:
            status = "nan_gradient" if loss.isfinite() else "nan_detected"
        return {"loss": loss.item(), "status": status, "grad_norm": outcome.grad_norm.item()}

    def trainable(self) -> Optimizer:
        """The optimizer. RuntimeError for a model that was built for inference."""
        if self.optimizer is None:
            raise RuntimeError("training: expected a model with gradients, got inference=True")
        return self.optimizer

    @checked(micro_batches=field(TrainingConfig, "gradient_accumulation_steps"), overwrite=bool)
    def accumulate_gradients(
        self, tokens: Tensor, targets: Tensor, micro_batches: int = 1, overwrite: bool = False
    ) -> Tensor:
        """Add the gradient of the mean loss over (B, T) tokens and targets; returns that loss.

        overwrite: replace the gradients instead of adding to them.
        """
        self.trainable()
        scale = mean_scale(targets, self._wide)
        parts = zip(tokens.chunk(micro_batches), targets.chunk(micro_batches), strict=True)
        losses = [
            self.model.forward_backward(t, y, scale, accumulate=not overwrite or i > 0)
            for i, (t, y) in enumerate(parts)
        ]
        return torch.stack(losses).sum()

    # -------------------------------------------------------------------------------- generation

    @checked(**SAMPLING, stop=STOP)
    def generate(
        self,
        input_ids: Tensor | Sequence,
        max_length: int = 100,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        tokenizer: Codec | None = None,
        eos_token_id: int | None = None,
        seed: int = 0,
        use_cache: bool = True,
    ) -> Tensor | list[Tensor]:
        """Continue prompts by sampling (see `mantrans.models.sampling.sample`).

        input_ids: (B, T) or (T,) integers, or a list of prompts of different lengths. Text is
            encoded first: `load_tokenizer(NAME).encode(text)`, from `mantrans.data.tokenizer`.
        max_length includes the prompt.
        repetition_penalty counts the prompt's tokens too.
        stop: a row ends before the first of these texts in what is new; needs the model's
            `tokenizer`. If a stop text begins inside a token, the text before it is encoded anew.
        eos_token_id: a row ends after this token (a tokenizer's `eot_id`). Without it every row
            goes on to max_length, past the end of a text into the next one.
        use_cache: False recomputes all keys and values for each token. In float32 and float64 that
            gives the same tokens. In bfloat16 it may not, even greedily (temperature 0): products
            of other shapes are summed in another order, so that a logit may be rounded to the next
            of bfloat16's few values, and two tokens close to each other change places.
        Returns (B, L) int64 for a tensor, where rows that ended early are padded with eos_token_id,
        or else the tokenizer's; for a list, a list of 1-D tensors.
        Raises ValueError for wrong arguments, ModelError if the model's logits are not finite.
        """
        as_tensor = isinstance(input_ids, Tensor)
        prompts = self._checked_prompts(input_ids)
        news: list[list[int]] = [[] for _ in prompts]
        sampling = self._sampling(
            temperature, top_k, top_p, min_p, repetition_penalty,
            stop, tokenizer, eos_token_id, seed, use_cache,
        )  # fmt: skip
        for tokens in generation.stream(self.model, prompts, max_length, sampling):
            for new, token in zip(news, tokens, strict=True):
                if token is not None:
                    new.append(token)
        if tokenizer is not None and sampling.stop:
            # a row that ended at its end of text has no stop text before it
            cut = (
                n if n[-1:] == [eos_token_id] else before_stop(n, tokenizer, sampling.stop)
                for n in news
            )
            news = list(cut)
        rows = [prompt + new for prompt, new in zip(prompts, news, strict=True)]
        if not as_tensor:
            return [torch.tensor(row) for row in rows]
        longest = max(len(row) for row in rows)
        ends = (eos_token_id, None if tokenizer is None else tokenizer.eot_id, 0)
        filler = next(token for token in ends if token is not None)
        return torch.tensor(
            [row + [filler] * (longest - len(row)) for row in rows], device=self.device
        )

    @checked(**SAMPLING, stop=STOP)
    def stream(
        self,
        input_ids: Tensor | Sequence,
        max_length: int = 100,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        tokenizer: Codec | None = None,
        eos_token_id: int | None = None,
        seed: int = 0,
        use_cache: bool = True,
    ) -> Iterator[list[int | None]]:
        """The new tokens of `generate`, with the same arguments, as soon as they are drawn.

        Yields at each step a list with one token per prompt, None for a row that has ended. The
        last token of a row may complete a stop text: `mantrans.inference.text` streams the text
        before it. Wrong arguments raise ValueError at once, not at the first token; ModelError
        comes when a token is due and the model's logits are not finite.
        """
        prompts = self._checked_prompts(input_ids)
        sampling = self._sampling(
            temperature, top_k, top_p, min_p, repetition_penalty,
            stop, tokenizer, eos_token_id, seed, use_cache,
        )  # fmt: skip
        return generation.stream(self.model, prompts, max_length, sampling)

    def _sampling(self, *settings: Any) -> Sampling:
        """The settings of `generate`, whose last checks need the model."""
        sampling = Sampling(*settings)
        eos_token_id, tokenizer = sampling.eos_token_id, sampling.tokenizer
        if eos_token_id is not None and eos_token_id >= self.model.vocab_size:
            raise ValueError(
                f"eos_token_id: expected below the vocabulary's {self.model.vocab_size}, "
                f"got {eos_token_id}"
            )
        if sampling.stop and tokenizer is None:
            raise ValueError("tokenizer: expected one from load_tokenizer, with stop, got null")
        self._check_tokenizer(tokenizer)
        return sampling

    # ------------------------------------------------------------------------ saving and loading

    def state_dict(self) -> dict[str, Any]:
        """The complete state of model and optimizer: plain data and tensors, by name.

        As in PyTorch, the tensors share the model's memory: copy them to keep them. Ranks that
        divide the state all call this; that of rank 0 is complete.
        """
        p = self.model.parameters
        moments: dict[str, dict[str, Tensor]] = {}
        if self.optimizer is not None:
            shards = self.optimizer.shards()
            moments = {k: p.whole(flat, shards[k]) for k, flat in self.optimizer.state().items()}
        return {
            "model_config": self.config.model_dump(),
            "parameters": dict(p.named(p.weights)) if p.master is None else p.whole(p.master),
            "optimizer": self.optimizer_name,
            "optimizer_state": moments,
            "optimizer_updates": int(p.updates.item()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned; the optimizer's part if it is of the same kind.

        Raises CheckpointError for a model of another shape or function, such as one with other
        n_heads, and TypeError for what is no state. Everything is checked before anything is
        changed.
        """
        p = self.model.parameters
        check_same_function(_item(state, "model_config", dict), self.config)
        check_same_parameters(_item(state, "parameters", dict), p.by_name)
        own, shards = {}, {}
        if self.optimizer is not None:
            own, shards = self.optimizer.state(), self.optimizer.shards()
        moments: dict[str, dict[str, Tensor]] = {}
        if self.optimizer is not None and _item(state, "optimizer", str) == self.optimizer_name:
            saved = _item(state, "optimizer_state", dict)
            moments = {key: _item(saved, key, dict) for key in own}
            for key, named in moments.items():
                check_same_parameters(named, p.within(shards[key]))
            p.updates.fill_(_checked_count(_item(state, "optimizer_updates", int)))
        for name, value in state["parameters"].items():
            p.write(name, value)
        for key, named in moments.items():
            for name, value in named.items():
                p.store(own[key], name, value, shards[key])

    @checked(path=FilePath)
    def save_checkpoint(self, path: str | Path, **extra: Any) -> None:
        """Write the model, its optimizer and `extra` (plain data, such as epoch=5) to one file."""
        state_file.save(path, {**self.state_dict(), "extra": extra})

    @checked(path=FilePath)
    def load_checkpoint(self, path: str | Path) -> dict[str, Any]:
        """Load a checkpoint's weights and optimizer; returns its `extra`.

        Raises CheckpointError for a file that is damaged or of a model of another shape.
        """
        state = state_file.load(path)
        with state_file.understood(path):
            self.load_state_dict(state)
            return state["extra"]

    @classmethod
    @checked(path=FilePath)
    def from_checkpoint(cls, path: str | Path, **keywords: Any) -> CustomTransformerWrapper:
        """The model in a checkpoint. `keywords` override device, backend, dtype, ...

        Raises CheckpointError for a file that is damaged, or whose weights do not fit its own
        description of the model. The model's memory is allocated only after these checks.
        """
        cls._check_keywords(keywords)
        state = state_file.load(path)
        with state_file.understood(path):
            return cls.from_state_dict(state, **keywords)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], **keywords: Any) -> CustomTransformerWrapper:
        """The model that a `state_dict` describes; CheckpointError if its weights do not fit."""
        cls._check_keywords(keywords)
        shape = dict(_item(state, "model_config", dict))
        config = ModelConfig.complete(shape, "CustomTransformer")
        described = {p.name: p for p in build(config).parameters()}
        check_same_parameters(_item(state, "parameters", dict), described)
        if "dtype" in keywords:
            device = resolve_device(keywords.get("device", "auto"))
            dtype = _name(resolve_dtype(keywords.pop("dtype"), device))
            config = config.model_copy(update={"dtype": dtype})
        wrapper = cls.from_config(
            config, **{"optimizer": _item(state, "optimizer", str), **keywords}
        )
        wrapper.load_state_dict(state)
        return wrapper

    @classmethod
    def _check_keywords(cls, keywords: dict[str, Any]) -> None:
        """TypeError for a keyword that `from_config` lacks, for which the file is not to blame."""
        known = inspect.signature(cls._build).parameters.keys() - {"self", "config"} | {"dtype"}
        for name in keywords.keys() - known:
            raise TypeError(f"{name}: expected one of {', '.join(sorted(known))}")

    @classmethod
    @checked(directory=FilePath)
    def from_pretrained(cls, directory: str | Path, **keywords: Any) -> CustomTransformerWrapper:
        """The model in a folder of transformers: GPT-2, Llama, Qwen2, Qwen3 or StarCoder2 (see
        `mantrans.interop.huggingface`).

        keywords: dtype, device, backend, optimizer, ... as for the class: it trains with SGD unless
        another optimizer is given. The model is float32 unless dtype is given, whatever the file's
        dtype. The network's shape is the folder's.

        Raises CheckpointError for any other folder, before the model's memory is allocated.
        """
        weights = huggingface.Weights(directory)
        wrapper = cls(**weights.shape, **{"dtype": torch.float32, **keywords})
        for name, value in weights:
            wrapper.model.parameters.write(name, value)
        return wrapper

    @checked(directory=FilePath)
    def save_pretrained(
        self, directory: str | Path, tokenizer: huggingface.SavedTokenizer | None = None
    ) -> None:
        """Write the weights (the masters if there are any) as a folder of transformers.

        tokenizer: of `load_tokenizer`, to be written beside them. Raises ValueError for one with
        another number of tokens, ConfigError for a model that transformers has not,
        CheckpointError if the folder cannot be written.
        """
        self._check_tokenizer(tokenizer)
        p = self.model.parameters
        huggingface.save(directory, self.config, dict(p.named(p.best_weights())), tokenizer)

    @checked(path=FilePath)
    def save_gguf(
        self, path: str | Path, tokenizer: huggingface.SavedTokenizer | None = None
    ) -> None:
        """Write the weights (the masters if there are any) as a GGUF file, which llama.cpp reads.

        tokenizer: as for `save_pretrained`. Needs the package gguf. Raises ValueError for a
        tokenizer with another number of tokens, ConfigError for a model or a tokenizer that
        llama.cpp has not, CheckpointError if the file cannot be written.
        """
        self._check_tokenizer(tokenizer)
        p = self.model.parameters
        gguf_file.save(path, self.config, dict(p.named(p.best_weights())), tokenizer)

    def _check_tokenizer(self, tokenizer: huggingface.SavedTokenizer | Codec | None) -> None:
        """ValueError unless it is None or one of as many tokens as the model has."""
        if tokenizer is not None:
            found = getattr(tokenizer, "vocab_size", None)
            if found != self.config.vocab_size or not hasattr(tokenizer, "library"):
                raise ValueError(
                    f"tokenizer: expected one of {self.config.vocab_size} tokens from "
                    f"load_tokenizer, got {show(tokenizer)}"
                )

    # -------------------------------------------------------------------------------- information

    def __repr__(self) -> str:
        shape = self.config.resolved()
        facts = {
            **{name: shape[name] for name in shape if name not in _OF_NO_FUNCTION},
            "parameters": f"{self.count_parameters():,}",
            "dtype": self.config.dtype,
            "device": self.device,
            "backend": self.model.ops.__name__.rpartition(".")[2],
            "optimizer": self.optimizer_name if self.optimizer else None,
        }
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in facts.items())})"

    def count_parameters(self) -> int:
        """Number of parameters. Tied embeddings count once; padding does not count."""
        return self.model.parameters.count()

    def get_model_info(self) -> dict[str, Any]:
        """The model's shape, size and where it runs."""
        p = self.model.parameters
        buffers = [p.weights, p.master]
        if self.optimizer is not None:
            buffers += [p.gradients, *self.optimizer.state().values()]
            buffers += [] if p.owned_gradients is p.gradients else [p.owned_gradients]
        return {
            **self.config.resolved(),
            "parameters": self.count_parameters(),
            "device": str(self.device),
            "backend": self.model.ops.__name__.rpartition(".")[2],
            "optimizer": self.optimizer_name,
            "state_bytes": sum(x.numel() * x.element_size() for x in buffers if x is not None),
        }

    # ------------------------------------------------------------------------------------- checks

    @property
    def _wide(self) -> torch.dtype:
        return self.model.parameters.wide

    def _checked_ids(self, ids: Tensor, name: str, any_length: bool = False) -> Tensor:
        """(B, T) int64 on the model's device; ValueError for ids outside the vocabulary."""
        _require_tensor(ids, name)
        if ids.dim() != 2 or ids.dtype not in _INTEGERS or ids.numel() == 0:
            raise ValueError(
                f"{name}: expected integers (batch, sequence), at least one, "
                f"got shape {tuple(ids.shape)} of {ids.dtype}"
            )
        if not any_length and ids.shape[1] > self.config.max_seq_len:
            raise ValueError(
                f"{name}: expected at most max_seq_len ({self.config.max_seq_len}) tokens a row, "
                f"got {ids.shape[1]}"
            )
        low, high = ids.min().item(), ids.max().item()
        if low < 0 or high >= self.model.vocab_size:
            raise ValueError(
                f"{name}: expected token ids from 0 to {self.model.vocab_size - 1}, "
                f"got {low} to {high}"
            )
        return ids.to(self.device, torch.int64)

    def _checked_prompts(self, input_ids: Tensor | Sequence) -> list[list[int]]:
        """The tokens of each prompt, at least one."""
        if isinstance(input_ids, str) or (
            isinstance(input_ids, list | tuple) and any(isinstance(x, str) for x in input_ids)
        ):
            raise TypeError(
                "input_ids: expected token ids, got text; load_tokenizer(NAME).encode(text) of "
                "mantrans.data.tokenizer gives a prompt's ids"
            )
        if isinstance(input_ids, Tensor):
            _require_tensor(input_ids, "input_ids")
            input_ids = input_ids[None] if input_ids.dim() == 1 else input_ids
        try:
            if isinstance(input_ids, Mapping | Set):
                raise TypeError("no order")
            tensors = [torch.as_tensor(row)[None] for row in input_ids]
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise TypeError(
                "input_ids: expected a tensor of token ids, or a list of prompts, each a list of "
                f"token ids, got {show(input_ids)}"
            ) from None
        if not tensors:
            raise ValueError("input_ids: expected at least one prompt, got none")
        return [self._checked_ids(x, "input_ids", any_length=True)[0].tolist() for x in tensors]

    def _checked_labels(self, labels: Tensor, input_ids: Tensor) -> Tensor:
        _require_tensor(labels, "labels")
        if labels.dtype not in _INTEGERS:
            raise TypeError(f"labels: expected integers, got {labels.dtype}")
        if labels.shape != input_ids.shape:
            raise ValueError(
                f"labels: expected the shape of input_ids, {tuple(input_ids.shape)}, "
                f"got {tuple(labels.shape)}"
            )
        labels = labels.to(self.device, torch.int64)
        self._checked_ids(labels.where(labels != IGNORE_INDEX, 0), "labels")
        return labels


def shift(labels: Tensor) -> Tensor:
    """Labels (B, T) -> targets (B, T): at each position the next label, -100 at the last."""
    ending = torch.full_like(labels[:, :1], IGNORE_INDEX)
    return torch.cat([labels[:, 1:], ending], dim=1)


def mean_scale(targets: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / number of targets that are not -100, 0-d: turns a sum of losses into their mean.

    0 if there are none.
    """
    return scale_of(count_targets(targets), dtype)


def count_targets(targets: Tensor) -> Tensor:
    """0-d int64."""
    return (targets != IGNORE_INDEX).sum()


def scale_of(count: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / count, 0-d; 0 if it is 0."""
    count = count.to(dtype)
    return count.clamp(max=1) / count.clamp(min=1)


def check_same_function(found: dict[str, Any], own: ModelConfig) -> None:
    """Raise CheckpointError if the checkpoint's config makes another function of the weights."""
    expected = ModelConfig.complete(dict(found), "checkpoint").resolved()
    for name, got in own.resolved().items():
        if name not in _OF_NO_FUNCTION and expected[name] != got:
            raise CheckpointError(
                f"{name}: expected {show(expected[name])}, as in the checkpoint, got {show(got)}"
            )


def check_same_parameters(found: dict[str, Tensor], described: dict[str, Parameter]) -> None:
    """Raise CheckpointError unless names and shapes are those of the model."""
    if found.keys() != described.keys():
        odd = sorted(found.keys() ^ described.keys())
        raise CheckpointError(
            f"checkpoint: expected the parameters of this model, got others: {len(odd)} names "
            f"differ, the first is {odd[0]}"
        )
    for name in found:
        value = _item(found, name, Tensor)
        if tuple(value.shape) != described[name].shape:
            raise CheckpointError(
                f"checkpoint: {name}: expected shape {described[name].shape}, "
                f"got {tuple(value.shape)}"
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _item(state: Any, name: str, kind: type) -> Any:
    """An item of a state. TypeError for another kind, which `understood` says of a file."""
    found = state.get(name) if isinstance(state, dict) else state
    if not isinstance(found, kind):
        raise TypeError(
            f"{name}: expected a {kind.__name__}, as in a state_dict, got {show(found)}"
        )
    return found


def _checked_count(found: Any) -> int:
    if type(found) is not int or found < 0:
        raise CheckpointError(f"optimizer_updates: expected a count of steps, got {found!r:.20}")
    return found


def _checked_options(optimizer: str, options: dict[str, Any] | None) -> dict[str, Any]:
    """The optimizer's keywords; their values are checked by its class."""
    known = [
        name
        for name, parameter in inspect.signature(OPTIMIZERS[optimizer]).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    options = {} if options is None else options
    unknown = options.keys() - known if isinstance(options, dict) else [options]
    for name in unknown:
        found = name if isinstance(name, str) else show(name)
        raise ConfigError(
            f"optimizer_options: expected a dict of {', '.join(known)} for {optimizer}, got {found}"
        )
    return options


def _require_tensor(value: Any, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor of token ids, got {show(value)}")
    if value.layout != torch.strided or value.is_meta:
        raise TypeError(
            f"{name}: expected a dense tensor with data, got {value.layout} on {value.device}"
        )
