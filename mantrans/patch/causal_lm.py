"""What the patched models have in common: the loss without logits, and what they refuse."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mantrans.kernels.reference import IGNORE_INDEX
from mantrans.ops import linear_cross_entropy
from mantrans.ops.registration import expect
from mantrans.patch.replace import own_forward

# What the loss without logits serves; with any other argument the model's own code runs.
SERVED = {
    "input_ids", "attention_mask", "position_ids", "token_type_ids", "inputs_embeds", "cache",
    "use_cache", "output_hidden_states", "output_attentions", "num_items_in_batch", "shift_labels",
}  # fmt: skip


def base_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Of the model below the output projection: its own, without weights of attention."""
    wanted = kwargs.get("output_attentions")
    wanted = self.config.output_attentions if wanted is None else wanted
    expect("output_attentions", not wanted, "False for a patched model", wanted)
    return own_forward(self)(*args, **kwargs)


def causal_lm_forward(self: Any, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
    """In training, with labels: the loss of labels shifted by one, and logits None. Otherwise the
    model's own forward."""
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    if labels is None or not self.training or not _serves(self, args, kwargs):
        given = {} if labels is None else {"labels": labels}
        return own_forward(self)(*args, **kwargs, **given)
    from transformers.modeling_outputs import CausalLMOutputWithPast

    n_items, targets = kwargs.pop("num_items_in_batch", None), kwargs.pop("shift_labels", None)
    base = dict(getattr(self, self.base_model_prefix)(*args, **kwargs))
    hidden = base.pop("last_hidden_state")
    if targets is None:
        targets = F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
    targets, weight = targets.to(hidden.device), self.lm_head.weight
    if isinstance(n_items, Tensor):
        n_items = n_items.to(hidden.device)
    loss = linear_cross_entropy(hidden, weight, targets, divisor=n_items)
    return CausalLMOutputWithPast(loss=loss, logits=None, **base)


def _serves(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    from transformers.loss.loss_utils import ForCausalLMLoss

    plain = type(model.lm_head) is nn.Linear and model.lm_head.bias is None
    return (
        plain and model.loss_function is ForCausalLMLoss and len(args) < 2
        and kwargs.keys() <= SERVED and model.config.return_dict
    )  # fmt: skip
