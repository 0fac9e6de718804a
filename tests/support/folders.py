"""Folders of transformers' models, loaded and changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mantrans import CustomTransformerWrapper
from mantrans.errors import CheckpointError


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any):
    return CustomTransformerWrapper.from_pretrained(folder, dtype=dtype, device="cpu", **options)


def rewrite_config(folder: Path, **changes: Any) -> None:
    """Set fields of config.json; `...` removes one."""
    fields = {**json.loads((folder / "config.json").read_text()), **changes}
    fields = {name: value for name, value in fields.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(fields))


def rewrite_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    import safetensors.torch as safetensors_torch

    path = folder / "model.safetensors"
    tensors = change(safetensors_torch.load_file(path))
    safetensors_torch.save_file({k: v.clone().contiguous() for k, v in tensors.items()}, path)


def refusal(folder: Path) -> str:
    """The one line with which a folder is refused, before there is a model."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError) as caught:
        patch.setattr(CustomTransformerWrapper, "__init__", lambda *a, **k: pytest.fail("built"))
        load(folder)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 700, message
    return message
