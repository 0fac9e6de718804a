"""A configuration's size, work and memory, before it is run."""

from __future__ import annotations

import torch

from mantrans.config import Config
from mantrans.interop.huggingface import read_shape
from mantrans.runtime import resolve_dtype
from mantrans.training.flops import flops_per_token
from mantrans.training.memory import parameter_groups, predict

_KNOWN_VOCABULARIES = {"gpt2": 50_257}


def summary(config: Config, tokens_per_epoch: int | None = None) -> str:
    """Return the summary as text; sets config.model.vocab_size if it is null. With
    training.init_from the shape is the folder's.

    Raises:
        MantransError: the tokenizer, which determines the vocabulary size, cannot be loaded.
    """
    if folder := config.training.init_from:
        config = config.with_model(read_shape(folder)[1], folder)
    if config.model.vocab_size is None:
        config.model.vocab_size = _vocabulary(config.data.tokenizer)
    parts = [_parameters(config), _work(config, tokens_per_epoch)]
    device = config.training.device
    parts += [_memory(config, d) for d in (("cuda", "cpu") if device == "auto" else (device,))]
    return "\n\n".join(parts)


def _vocabulary(tokenizer: str) -> int:
    if tokenizer in _KNOWN_VOCABULARIES:
        return _KNOWN_VOCABULARIES[tokenizer]
    from mantrans.data.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer).vocab_size


def _parameters(config: Config) -> str:
    groups = parameter_groups(config.model)
    rows = [(name, f"{count:,}") for name, count in groups.items()]
    rows.append(("all", f"{sum(groups.values()):,}"))
    return _table("parameters", rows)


def _work(config: Config, tokens_per_epoch: int | None) -> str:
    training = config.training
    per_step = config.tokens_per_step
    per_token = flops_per_token(config.model, config.sequence_length)
    steps = training.max_steps
    if steps is None and tokens_per_epoch is not None and training.num_epochs is not None:
        steps = tokens_per_epoch * training.num_epochs // per_step
    unknown = "unknown before the text is prepared (--tokens)"
    epoch = unknown if tokens_per_epoch is None else f"{tokens_per_epoch:,}"
    rows = [
        ("tokens per step", f"{per_step:,}"),
        ("FLOPs per token", f"{per_token:.4g}"),
        ("FLOPs per step", f"{per_token * per_step:.4g}"),
        ("tokens per epoch", epoch),
        (
            "epochs",
            "as many as training.max_steps needs"
            if training.num_epochs is None
            else str(training.num_epochs),
        ),
        ("steps", unknown if steps is None else f"{steps:,}"),
        ("tokens in all", unknown if steps is None else f"{steps * per_step:,}"),
        ("FLOPs in all", unknown if steps is None else f"{steps * per_step * per_token:.4g}"),
    ]
    return _table("work", rows)


def _memory(config: Config, device: str) -> str:
    dtype = torch.bfloat16  # "auto" on a GPU, which this machine need not have
    if config.model.dtype != "auto" or device == "cpu":
        dtype = resolve_dtype(config.model.dtype, torch.device("cpu"))
    predicted = predict(config, dtype, device)
    recompute = f"activations (recompute: {config.training.recompute})"
    rows = [
        ("weights", predicted.weights),
        ("float32 masters", predicted.masters),
        ("gradients", predicted.gradients),
        ("moments", predicted.moments),
        (recompute, predicted.activations),
        ("backward workspace (or loss)", predicted.backward_workspace),
        ("loss workspace (or backward)", predicted.loss_workspace),
        ("library workspace", predicted.library),
        ("peak", predicted.total),
    ]
    title = f"memory, predicted for {str(dtype).removeprefix('torch.')} on {device}"
    return _table(title, [(name, _mebibytes(count)) for name, count in rows])


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)])
