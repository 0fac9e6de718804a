"""Writes a run's model for other programs: the work of `mantrans export`."""

from __future__ import annotations

from pathlib import Path

from mantrans.checkpoint import state_file
from mantrans.config import Config, ModelConfig
from mantrans.inference.trained import check_vocabulary, load_trained, tokenizer_of
from mantrans.interop import gguf_file, huggingface
from mantrans.models import build
from mantrans.wrapper import check_same_parameters


def export(checkpoint: Path, output: Path, gguf: bool) -> None:
    """Write the model of `checkpoint` with its tokenizer: a folder of transformers, or a GGUF file.

    The weights are the checkpoint's, in their own dtype, one at a time in memory.
    Raises MantransError (one line): a checkpoint that is none, a model or tokenizer that the other
    programs do not know, a place that cannot be written.
    """
    state = load_trained(checkpoint)
    config = Config.from_dict(state["config"], str(checkpoint))
    with state_file.understood(checkpoint):
        tokenizer = tokenizer_of(state, config)
        check_vocabulary(state, tokenizer)
        model = ModelConfig.complete(dict(state["model_config"]), "CustomTransformer")
        described = {p.name: p for p in build(model).parameters()}
        check_same_parameters(state["parameters"], described)
    save = gguf_file.save if gguf else huggingface.save
    save(output, model, state["parameters"], tokenizer)
