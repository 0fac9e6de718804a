"""A configuration's size, work and memory, before it is run."""

from __future__ import annotations

from typing import get_args

import torch

from mantrans.config import Config, TrainingConfig
from mantrans.interop.huggingface import read_shape
from mantrans.runtime import resolve_device, resolve_dtype
from mantrans.training.flops import flops_per_token, update_flops
from mantrans.training.memory import MemoryPrediction, parameter_groups, predict
from mantrans.training.room import free_memory

_KNOWN_VOCABULARIES = {"gpt2": 50_257}


def summary(config: Config, tokens_per_epoch: int | None = None, ranks: int = 1) -> str:
    """Return the summary as text; sets config.model.vocab_size if it is null. With
    training.init_from the shape is the folder's. With several ranks the memory is that of one of
    them, for each way to divide it.

    Raises:
        MantransError: the tokenizer, which determines the vocabulary size, cannot be loaded.
    """
    if folder := config.training.init_from:
        config = config.with_model(read_shape(folder)[1], folder)
    if config.model.vocab_size is None:
        config.model.vocab_size = _vocabulary(config.data.tokenizer)
    parts = [_parameters(config), _work(config, tokens_per_epoch)]
    device = config.training.device
    parts += [
        _memory(config, d, ranks) for d in (("cuda", "cpu") if device == "auto" else (device,))
    ]
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
    update = update_flops(config.model, training.optimizer)
    all_of_step = per_token * per_step + update
    steps = training.max_steps
    if steps is None and tokens_per_epoch is not None and training.num_epochs is not None:
        steps = tokens_per_epoch * training.num_epochs // per_step
    unknown = "unknown before the text is prepared (--tokens)"
    epoch = unknown if tokens_per_epoch is None else f"{tokens_per_epoch:,}"
    rows = [
        ("tokens per step", f"{per_step:,}"),
        ("FLOPs per token", f"{per_token:.4g}"),
        *(
            [("FLOPs per update", f"{update:.4g}, {update / all_of_step:.1%} of a step")]
            if update
            else []
        ),
        ("FLOPs per step", f"{all_of_step:.4g}"),
        ("tokens per epoch", epoch),
        (
            "epochs",
            "as many as training.max_steps needs"
            if training.num_epochs is None
            else str(training.num_epochs),
        ),
        ("steps", unknown if steps is None else f"{steps:,}"),
        ("tokens in all", unknown if steps is None else f"{steps * per_step:,}"),
        ("FLOPs in all", unknown if steps is None else f"{steps * all_of_step:.4g}"),
    ]
    return _table("work", rows)


def _memory(config: Config, device: str, ranks: int) -> str:
    dtype = torch.bfloat16  # "auto" on a GPU, which this machine need not have
    if config.model.dtype != "auto" or device == "cpu":
        dtype = resolve_dtype(config.model.dtype, torch.device("cpu"))
    title = f"predicted for {str(dtype).removeprefix('torch.')} on {device}"
    if device != "cpu" and not torch.cuda.is_available():
        title += ", an H100 as none is here"
    if ranks == 1:
        rows = _purposes(predict(config, dtype, device), config)
        if device == "cpu" or torch.cuda.is_available():
            rows.append(("free now", _mebibytes(free_memory(resolve_device(device)))))
        return _table(f"memory, {title}", rows)
    per_shard = [
        _purposes(predict(_with(config, s), dtype, device, ranks=ranks), config) for s in SHARDS
    ]
    values = [SHARDS, *zip(*([value for _, value in rows] for rows in per_shard), strict=True)]
    widths = [max(map(len, column)) for column in zip(*values, strict=True)]
    names = ["training.shard", *(name for name, _ in per_shard[0])]
    lines = [
        "  ".join(f"{value:>{width}}" for value, width in zip(row, widths, strict=True))
        for row in values
    ]
    title = f"memory of one of {ranks} ranks, {title}"
    return _table(title, list(zip(names, lines, strict=True)))


SHARDS = get_args(TrainingConfig.model_fields["shard"].annotation)


def _with(config: Config, shard: str) -> Config:
    training = config.training.model_copy(update={"shard": shard})
    return config.model_copy(update={"training": training})


def _purposes(predicted: MemoryPrediction, config: Config) -> list[tuple[str, str]]:
    rows = [
        ("weights", predicted.weights),
        ("float32 masters", predicted.masters),
        ("gradients", predicted.gradients),
        ("sums of micro-batches", predicted.levels),
        ("received of other ranks", predicted.exchange),
        ("moments", predicted.moments),
        (f"activations (recompute: {config.training.recompute})", predicted.activations),
        ("backward workspace (or loss)", predicted.backward_workspace),
        ("loss workspace (or backward)", predicted.loss_workspace),
        *([("update workspace", predicted.update_workspace)] if predicted.update_workspace else []),
        ("library workspaces", predicted.library),
    ]
    if predicted.beside:
        rows += [
            ("peak of a step", predicted.step),
            ("beside it: validation", predicted.validation),
            ("or the check of a save", predicted.save_check),
            ("or a second computation", predicted.recheck),
            ("samples, at the end", predicted.samples),
        ]
    rows.append(("peak", predicted.total))
    return [(name, _mebibytes(count)) for name, count in rows]


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)])
