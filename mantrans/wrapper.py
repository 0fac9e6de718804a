"""CustomTransformerWrapper: a model with its optimizer, and checks of all arguments.

model = CustomTransformerWrapper(vocab_size=4096, d_model=256, n_blocks=4, n_heads=4)
outputs = model.forward(input_ids, labels=labels)
result = model.train_step(input_ids, labels, learning_rate=1e-3)
tokens = model.generate(input_ids, max_length=100)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mantrans.checkpoint import state_file
from mantrans.config import ModelConfig
from mantrans.errors import CheckpointError, ConfigError
from mantrans.interop import huggingface
from mantrans.kernels import backend as backends
from mantrans.kernels.reference import IGNORE_INDEX
from mantrans.models import build, generation
from mantrans.models.transformer import CustomTransformer
from mantrans.optim import OPTIMIZERS, Optimizer
from mantrans.parameters import Parameter
from mantrans.runtime import resolve_device, resolve_dtype


class CustomTransformerWrapper:
    """A decoder-only transformer with its optimizer.

    vocab_size, d_model, n_blocks, n_heads, d_ffn (None: 4 · d_model), max_seq_len, tie_embeddings,
        bias, layer_norm_epsilon, initializer_range: as in `mantrans.config.ModelConfig`.
    dtype: torch.float32, torch.bfloat16, torch.float64, or "auto" (see `mantrans.runtime`).
    device: "cpu", "cuda", "cuda:1", or "auto" (a GPU if there is one).
    backend: "auto", "reference", "native" or "triton" (see `mantrans.kernels.backend`).
    optimizer: "sgd" or "adamw", with `optimizer_options` as its keywords.
    seed: of the initial weights.
    recompute: "none", "gelu" or "block": which activations are recomputed instead of kept.
    stochastic_rounding: bfloat16 weights without float32 masters.
    inference: only weights, 2 bytes a parameter in bfloat16; no gradients, masters or optimizer.

    Raises ConfigError (a ValueError): "ARGUMENT: expected X, got Y".
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 256,
        n_blocks: int = 4,
        n_heads: int = 4,
        d_ffn: int | None = None,
        max_seq_len: int = 256,
        *,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str = "auto",
        backend: str = "auto",
        optimizer: str = "sgd",
        optimizer_options: dict[str, Any] | None = None,
        seed: int = 0,
        tie_embeddings: bool = True,
        bias: bool = True,
        layer_norm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        recompute: str = "none",
        stochastic_rounding: bool = False,
        inference: bool = False,
    ) -> None:
        resolved = resolve_device(device)
        shape = {
            "vocab_size": vocab_size,
            "d_model": d_model,
            "n_blocks": n_blocks,
            "n_heads": n_heads,
            "d_ffn": d_ffn,
            "max_seq_len": max_seq_len,
            "tie_embeddings": tie_embeddings,
            "bias": bias,
            "layer_norm_epsilon": layer_norm_epsilon,
            "initializer_range": initializer_range,
            "dtype": _name(resolve_dtype(dtype, resolved)),
        }
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
        stochastic_rounding, inference: as for the class.
        """
        wrapper = cls.__new__(cls)
        wrapper._build(config, **keywords)
        return wrapper

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
    ) -> None:
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        self.config = config.model_copy(update={"dtype": _name(self.dtype)})
        if optimizer not in OPTIMIZERS:
            raise ConfigError(f"optimizer: expected {' or '.join(OPTIMIZERS)}, got {optimizer!r}")
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
        )
        self.optimizer_name = optimizer
        self.optimizer: Optimizer | None = None
        if not inference:
            self.optimizer = OPTIMIZERS[optimizer](
                ops, self.model.parameters, **(optimizer_options or {})
            )

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
        flat = logits.reshape(len(targets), -1)
        losses, _ = self.model.ops.cross_entropy_forward(flat, targets, self.config.vocab_size)
        return {"logits": logits, "loss": losses.sum() * mean_scale(targets, losses.dtype)}

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
        "grad_norm": float}. Unless the status is "ok", weights and moments are unchanged.
        """
        input_ids = self._checked_ids(input_ids, "input_ids")
        targets = shift(self._checked_labels(labels, input_ids))
        optimizer = self.trainable()
        loss = self.accumulate_gradients(input_ids, targets, micro_batches, overwrite=True)
        rate = torch.tensor(learning_rate, dtype=self._wide, device=self.device)
        outcome = optimizer.step(loss, rate, max_grad_norm=max_grad_norm)
        status = "ok"
        if not outcome.applied:
            status = "nan_gradient" if loss.isfinite() else "nan_detected"
        return {"loss": loss.item(), "status": status, "grad_norm": outcome.grad_norm.item()}

    def trainable(self) -> Optimizer:
        """The optimizer. RuntimeError for a model that was built for inference."""
        if self.optimizer is None:
            raise RuntimeError("training: expected a model with gradients, got inference=True")
        return self.optimizer

    def accumulate_gradients(
        self, tokens: Tensor, targets: Tensor, micro_batches: int = 1, overwrite: bool = False
    ) -> Tensor:
        """Add the gradient of the mean loss over (B, T) tokens and targets; returns that loss.

        overwrite: replace the gradients instead of adding to them.
        """
        scale = mean_scale(targets, self._wide)
        parts = zip(tokens.chunk(micro_batches), targets.chunk(micro_batches), strict=True)
        losses = [
            self.model.forward_backward(t, y, scale, accumulate=not overwrite or i > 0)
            for i, (t, y) in enumerate(parts)
        ]
        return torch.stack(losses).sum()

    # -------------------------------------------------------------------------------- generation

    def generate(
        self,
        input_ids: Tensor | Sequence,
        max_length: int = 100,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | None = None,
        seed: int = 0,
        use_cache: bool = True,
    ) -> Tensor | list[Tensor]:
        """Continue prompts by sampling (see `mantrans.models.generation`).

        input_ids: (B, T) or (T,) integers, or a list of prompts of different lengths.
        max_length includes the prompt. A row ends after eos_token_id.
        Returns (B, L) int64 for a tensor, where rows that ended early are padded with eos_token_id;
        for a list, a list of 1-D tensors.
        Raises ValueError for wrong arguments, ModelError if the model's logits are not finite.
        """
        as_tensor = isinstance(input_ids, Tensor)
        rows = self._checked_prompts(input_ids)
        for tokens in self.stream(
            rows,
            max_length,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_token_id=eos_token_id,
            seed=seed,
            use_cache=use_cache,
        ):
            for row, token in zip(rows, tokens, strict=True):
                if token is not None:
                    row.append(token)
        if not as_tensor:
            return [torch.tensor(row) for row in rows]
        longest = max(len(row) for row in rows)
        filler = 0 if eos_token_id is None else eos_token_id  # without it all rows are equally long
        return torch.tensor(
            [row + [filler] * (longest - len(row)) for row in rows], device=self.device
        )

    def stream(
        self,
        input_ids: Tensor | Sequence,
        max_length: int = 100,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | None = None,
        seed: int = 0,
        use_cache: bool = True,
    ) -> Iterator[list[int | None]]:
        """The new tokens of `generate`, with the same arguments, as soon as they are drawn.

        Yields at each step a list with one token per prompt, None for a row that has ended. Wrong
        arguments raise ValueError at once, not at the first token; ModelError comes when a token is
        due and the model's logits are not finite.
        """
        prompts = self._checked_prompts(input_ids)
        _check_sampling(max_length, temperature, top_k, top_p)
        return generation.stream(
            self.model,
            prompts,
            max_length,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_token_id=eos_token_id,
            seed=seed,
            use_cache=use_cache,
        )

    # ------------------------------------------------------------------------ saving and loading

    def state_dict(self) -> dict[str, Any]:
        """The complete state of model and optimizer: plain data and tensors, by name.

        As in PyTorch, the tensors share the model's memory: copy them to keep them.
        """
        p = self.model.parameters
        moments = self.optimizer.state() if self.optimizer else {}
        optimizer = {name: dict(p.named(flat)) for name, flat in moments.items()}
        return {
            "model_config": self.config.model_dump(),
            "parameters": dict(p.named(p.best_weights())),
            "optimizer": self.optimizer_name,
            "optimizer_state": optimizer,
            "optimizer_updates": int(p.updates.item()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned; the optimizer's part if it is of the same kind.

        Raises CheckpointError for another shape. Everything is checked before anything is changed.
        """
        p = self.model.parameters
        check_same_parameters(state["parameters"], p.by_name)
        own = {} if self.optimizer is None else self.optimizer.state()
        moments: dict[str, dict[str, Tensor]] = {}
        if self.optimizer is not None and state["optimizer"] == self.optimizer_name:
            moments = {key: state["optimizer_state"][key] for key in own}
            for named in moments.values():
                check_same_parameters(named, p.by_name)
            p.updates.fill_(_checked_count(state["optimizer_updates"]))
        for name, value in state["parameters"].items():
            p.write(name, value)
        for key, named in moments.items():
            for name, value in named.items():
                p.view(own[key], name).copy_(value)

    def save_checkpoint(self, path: str | Path, **extra: Any) -> None:
        """Write the model, its optimizer and `extra` (plain data, such as epoch=5) to one file."""
        state_file.save(path, {**self.state_dict(), "extra": extra})

    def load_checkpoint(self, path: str | Path) -> dict[str, Any]:
        """Load a checkpoint's weights and optimizer; returns its `extra`.

        Raises CheckpointError for a file that is damaged or of a model of another shape.
        """
        state = state_file.load(path)
        with state_file.understood(path):
            self.load_state_dict(state)
            return state["extra"]

    @classmethod
    def from_checkpoint(cls, path: str | Path, **keywords: Any) -> CustomTransformerWrapper:
        """The model in a checkpoint. `keywords` override device, backend, dtype, ...

        Raises CheckpointError for a file that is damaged, or whose weights do not fit its own
        description of the model. The model's memory is allocated only after these checks.
        """
        state = state_file.load(path)
        with state_file.understood(path):
            return cls.from_state_dict(state, **keywords)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], **keywords: Any) -> CustomTransformerWrapper:
        """The model that a `state_dict` describes; CheckpointError if its weights do not fit."""
        config = ModelConfig.complete(dict(state["model_config"]), "CustomTransformer")
        described = {p.name: p for p in build(config).parameters()}
        check_same_parameters(state["parameters"], described)
        if "dtype" in keywords:
            device = resolve_device(keywords.get("device", "auto"))
            dtype = _name(resolve_dtype(keywords.pop("dtype"), device))
            config = config.model_copy(update={"dtype": dtype})
        wrapper = cls.from_config(config, **{"optimizer": state["optimizer"], **keywords})
        wrapper.load_state_dict(state)
        return wrapper

    @classmethod
    def from_pretrained(cls, directory: str | Path, **keywords: Any) -> CustomTransformerWrapper:
        """The model in a folder of transformers' GPT-2 format (see `mantrans.interop.huggingface`).

        keywords: dtype, device, backend, optimizer, ... as for the class. The model is float32
        unless dtype is given, whatever the file's dtype. The network's shape is the folder's.

        Raises CheckpointError for any other folder, before the model's memory is allocated.
        """
        shape = huggingface.read_shape(directory)
        weights = huggingface.Weights(directory, build(ModelConfig(**shape)).parameters())
        wrapper = cls(**shape, **keywords)
        for name, value in weights:
            wrapper.model.parameters.write(name, value)
        return wrapper

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the weights (the masters if there are any) in transformers' GPT-2 format.

        Raises CheckpointError if the folder cannot be written.
        """
        p = self.model.parameters
        huggingface.save(directory, self.config, dict(p.named(p.best_weights())))

    # -------------------------------------------------------------------------------- information

    def count_parameters(self) -> int:
        """Number of parameters. Tied embeddings count once; padding does not count."""
        return self.model.parameters.count()

    def get_model_info(self) -> dict[str, Any]:
        """The model's shape, size and where it runs."""
        p = self.model.parameters
        buffers = [p.weights, p.master]
        if self.optimizer is not None:
            buffers += [p.gradients, *self.optimizer.state().values()]
        return {
            **self.config.model_dump(),
            "d_ffn": self.config.feed_forward_width,
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
        if ids.dim() != 2 or ids.is_floating_point() or ids.numel() == 0:
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
        rows = [input_ids] if isinstance(input_ids, Tensor) and input_ids.dim() == 1 else input_ids
        if not len(rows):
            raise ValueError("input_ids: expected at least one prompt, got none")
        return [
            self._checked_ids(torch.as_tensor(row)[None], "input_ids", any_length=True)[0].tolist()
            for row in rows
        ]

    def _checked_labels(self, labels: Tensor, input_ids: Tensor) -> Tensor:
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
    """1 / number of targets that are not -100, 0-d: turns a sum of losses into their mean."""
    return 1 / (targets != IGNORE_INDEX).sum().clamp(min=1).to(dtype)


def check_same_parameters(found: dict[str, Tensor], described: dict[str, Parameter]) -> None:
    """Raise CheckpointError unless names and shapes are those of the model."""
    if found.keys() != described.keys():
        odd = sorted(found.keys() ^ described.keys())
        raise CheckpointError(
            f"checkpoint: expected the parameters of this model, got others: {len(odd)} names "
            f"differ, the first is {odd[0]}"
        )
    for name, value in found.items():
        if tuple(value.shape) != described[name].shape:
            raise CheckpointError(
                f"checkpoint: {name}: expected shape {described[name].shape}, "
                f"got {tuple(value.shape)}"
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _checked_count(found: Any) -> int:
    if type(found) is not int or found < 0:
        raise CheckpointError(f"optimizer_updates: expected a count of steps, got {found!r:.20}")
    return found


def _check_sampling(
    max_length: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if max_length < 1:
        raise ValueError(f"max_length: expected at least 1, got {max_length}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected a number of at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1 or None, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected above 0 and at most 1, or None, got {top_p}")
