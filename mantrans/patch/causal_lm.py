"""What the patched models have in common: the loss without logits, and what they refuse."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mantrans.kernels.reference import IGNORE_INDEX
from mantrans.ops import linear_cross_entropy
from mantrans.ops.registration import expect
from mantrans.patch.replace import is_bare

# What the loss without logits serves; with any other argument the model's own code runs.
SERVED = {
    "input_ids", "attention_mask", "position_ids", "token_type_ids", "inputs_embeds", "cache",
    "use_cache", "output_hidden_states", "output_attentions", "num_items_in_batch", "shift_labels",
    "return_dict",
}  # fmt: skip


def base_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Of the model below the output projection: its own, without weights of attention."""
    wanted = kwargs.get("output_attentions")
    wanted = self.config.output_attentions if wanted is None else wanted
    expect("output_attentions", not wanted, "False for a patched model", wanted)
    return self.forward_before_patch(*args, **kwargs)


def causal_lm_forward(self: Any, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
    """In training, with labels: the loss of labels shifted by one, and logits None. Otherwise the
    model's own forward."""
    given = {name: value for name, value in kwargs.items() if value is not None}
    if labels is None or not self.training or not _serves(self, args, given):
        kwargs = kwargs if labels is None else {"labels": labels, **kwargs}
        return self.forward_before_patch(*args, **kwargs)
    n_items, targets = given.pop("num_items_in_batch", None), given.pop("shift_labels", None)
    base = getattr(self, self.base_model_prefix)(*args, **given)
    hidden = base.last_hidden_state
    if targets is None:
        targets = F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
    if isinstance(n_items, Tensor):  # under DataParallel it has an axis
        n_items = n_items.to(hidden.device).reshape(())
    targets, weight = targets.to(hidden.device), self.lm_head.weight
    loss = linear_cross_entropy(hidden, weight, targets, divisor=n_items)
    return _output_of(base)(loss=loss, cache=base.cache, hidden_states=base.hidden_states)


def _output_of(base: Any) -> Any:
    """The class in which the model's own forward returns its outputs."""
    from transformers import modeling_outputs

    crossed = isinstance(base, modeling_outputs.BaseModelOutputWithPastAndCrossAttentions)
    name = "CausalLMOutputWithCrossAttentions" if crossed else "CausalLMOutputWithPast"
    return getattr(modeling_outputs, name)


def _serves(model: Any, args: tuple[Any, ...], given: dict[str, Any]) -> bool:
    """Whether the loss without logits is what the model's own code would make."""
    head = model.lm_head
    return (
        type(head) is nn.Linear and head.bias is None and is_bare(head)
        and _has_plain_loss(model) and len(args) < 2
        and all(name in SERVED for name in given)
        and given.get("return_dict", model.config.return_dict)
    )  # fmt: skip


def _has_plain_loss(model: Any) -> bool:
    """Whether `model.loss_function` is transformers' for language models. That property logs, which
    `torch.compile` refuses."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    chosen = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "", ForCausalLMLoss)
    return getattr(model, "_loss_function", chosen) is ForCausalLMLoss
