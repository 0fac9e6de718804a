"""Before a run on a GPU: the kernels that it uses are compiled, and compared with the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mantrans.config import Config
from mantrans.errors import MantransError
from mantrans.kernels import selfcheck
from mantrans.kernels.operations import Draw, Inputs, Shapes
from mantrans.kernels.selfcheck import Program
from mantrans.models.transformer import CustomTransformer
from mantrans.terminal import Progress

NOT_RUN = (
    "note: the kernels are compiled for AMD's gfx942 and gfx1100, but had not yet run on an AMD "
    "GPU when this version was written; the self-check has just compared them on this one"
)


def check(config: Config, model: CustomTransformer, *, quiet: bool = False) -> list[str]:
    """Refuse to train on a kernel whose results differ from the reference: MantransError.

    The first run of a shape compiles its kernels, which takes seconds: a bar shows how far it is.
    Returns what the user should know.
    """
    shape = model.config
    programs = programs_of(config)
    bar = Progress(len(programs), "compiling, checking kernels", "", keep=False, quiet=quiet)
    try:
        selfcheck.check(
            model.ops,
            d_model=shape.d_model,
            n_heads=shape.n_heads,
            n_kv_heads=shape.n_kv_heads,
            head_dim=shape.head_dim,
            d_ffn=shape.feed_forward_width,
            vocab_size=model.vocab_size,
            sequence_length=config.sequence_length,
            dtype=model.parameters.weights.dtype,
            device=model.parameters.weights.device,
            programs=programs,
            progress=lambda done, total: bar.update(done - bar.done),
        )
    except selfcheck.KernelCheckError as wrong:
        raise MantransError(str(wrong)) from None
    except torch.OutOfMemoryError:
        raise MantransError(
            f"{model.parameters.weights.device}: out of memory while kernels are compared with the "
            "reference; free some of it, or make the model or training.batch_size smaller"
        ) from None
    finally:
        bar.close()
    return [NOT_RUN] if torch.version.hip and model.ops.__name__.endswith("triton") else []


def programs_of(config: Config) -> Sequence[tuple[Callable[[Shapes, Draw], Inputs], Program]]:
    """The self-check's programs that a run of `config` uses, validation and samples included."""
    model = config.model
    unused = {"rms_norm" if model.norm == "layer_norm" else "layer_norm"}
    unused |= {"swiglu" if model.mlp == "gelu" else "gelu"}
    if model.position == "learned":
        unused.add("rotary")
    if config.training.optimizer != "muon":
        unused.add("muon")
    if not config.training.stochastic_rounding:
        unused.add("stochastic_rounding")
    window = model.attention_window is not None
    documents = not config.data.attend_across_documents
    # Prompts are read as one document.
    modes = [" with a window"] if window else [""]
    return selfcheck.programs_for(unused, [*modes, " with documents"] if documents else modes)
