"""The whole model on a GPU beside transformers' GPT-2: the loss and every gradient.

Both sides are compared with transformers in float64 from the same weights. Ours may err FACTOR
times as much as transformers does in our dtype: another order of summation errs differently, not
more. The key part of the attention bias has no gradient, because softmax does not feel what is
added to all scores of a row: both sides hold rounding noise there, and it is left out.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mantrans import CustomTransformerWrapper
from mantrans.wrapper import shift
from tests.support.compare import relative_error
from tests.support.huggingface import gpt2, oriented, their_name

pytestmark = pytest.mark.gpu
pytest.importorskip("transformers", reason="transformers is the oracle here")

FACTOR = 2.0
# Where transformers happens to be nearly exact, a handful of our own roundings are no fault.
FLOOR = {torch.bfloat16: 2.0**-9, torch.float32: 2.0**-20}
V, B, T, C = 1000, 3, 200, 256


def gradients_of(
    model: torch.nn.Module, names: list[str], ids: Tensor, labels: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a transformers model, by our names."""
    logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), shift(labels).flatten())
    loss.backward()
    theirs = dict(model.named_parameters())
    return loss.detach(), {
        n: without_keys(n, oriented(n, theirs[their_name(n)].grad)) for n in names
    }


def without_keys(name: str, gradient: Tensor) -> Tensor:
    """The gradient, less the part that mathematics makes zero."""
    if not name.endswith("qkv.bias"):
        return gradient
    q, _, v = gradient.chunk(3)
    return torch.cat([q, v])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("n_heads", [4, 2, 8])  # head widths 64, 128, 32
@pytest.mark.parametrize("backend", ["triton", "native"])
def test_model_loss_and_gradients(
    device: torch.device, dtype: torch.dtype, n_heads: int, backend: str
) -> None:
    torch.manual_seed(0)
    ours = CustomTransformerWrapper(
        vocab_size=V, d_model=C, n_blocks=3, n_heads=n_heads, max_seq_len=256, dtype=dtype,
        device=device, backend=backend,
    )  # fmt: skip
    for name, parameter in list(ours.model.named_parameters()):  # so large that every path matters
        base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        ours.model.parameters.write(name, base + 0.05 * torch.randn(parameter.shape))
    weights = [(name, value.detach().cpu()) for name, value in ours.model.named_parameters()]
    ids = torch.randint(0, V, (B, T), device=device)
    labels = ids.clone()
    labels[0, :9] = -100

    names = [name for name, _ in weights]
    exact_loss, exact = gradients_of(
        gpt2(ours.config, torch.float64, weights).to(device), names, ids, labels
    )
    rival_loss, rival = gradients_of(
        gpt2(ours.config, dtype, weights).to(device), names, ids, labels
    )
    for _, gradient in ours.model.named_gradients():
        gradient.fill_(7.0)  # what an earlier step left
    loss = ours.accumulate_gradients(ids, shift(labels), micro_batches=3, overwrite=True)

    allowed = FACTOR * relative_error(rival_loss, exact_loss) + FLOOR[dtype]
    assert relative_error(loss, exact_loss) <= allowed
    for name, gradient in ours.model.named_gradients():
        error = relative_error(without_keys(name, gradient), exact[name])
        theirs = relative_error(rival[name], exact[name])
        assert error <= FACTOR * theirs + FLOOR[dtype], f"{name}: {error:.2e}, theirs {theirs:.2e}"
