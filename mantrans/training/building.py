"""The model and the optimizer of a run."""

from __future__ import annotations

from mantrans import optim
from mantrans.config import Config
from mantrans.distributed.world import World
from mantrans.errors import ConfigError
from mantrans.wrapper import CustomTransformerWrapper


def build_wrapper(
    config: Config, vocab_size: int, world: World | None = None
) -> CustomTransformerWrapper:
    """The model and optimizer that a config describes, for a tokenizer of `vocab_size` entries.

    world: the processes that divide its state by training.shard; None for this one alone.

    Raises ConfigError if the config names another vocabulary size.
    """
    model, training = config.model, config.training
    if model.vocab_size not in (None, vocab_size):
        raise ConfigError(
            f"model.vocab_size: expected null or {vocab_size}, the entries of data.tokenizer "
            f"({config.data.tokenizer}), got {model.vocab_size}"
        )
    return CustomTransformerWrapper.from_config(
        model.model_copy(update={"vocab_size": vocab_size}),
        device=training.device,
        backend=training.backend,
        optimizer=training.optimizer,
        optimizer_options=optim.options(training),
        seed=training.seed,
        recompute=training.recompute,
        stochastic_rounding=training.stochastic_rounding,
        world=world,
        shard=training.shard,
    )
