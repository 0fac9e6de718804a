"""Text in, text out: a prompt as tokens, and the new tokens as text while they are drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mantrans.config import Config
from mantrans.errors import ConfigError

if TYPE_CHECKING:
    from mantrans.data.tokenizer import Tokenizer
    from mantrans.wrapper import CustomTransformerWrapper


def sampling_config(saved: Any, source: str, sampling: dict[str, Any], seed: int | None) -> Config:
    """A checkpoint's config with other sampling: fields of `evaluation`, and the seed.

    saved: the config as plain data, from the file named `source`. Raises ConfigError.
    """
    values = Config.from_dict(saved, source).to_dict()
    values["evaluation"] |= sampling
    if seed is not None:
        values["training"]["seed"] = seed
    return Config.from_dict(values, "generate")


def prompt_tokens(tokenizer: Tokenizer, config: Config, prompts: Sequence[str]) -> list[list[int]]:
    """Each prompt's tokens after an end-of-text token, because a document starts here.

    A model trained with attention inside documents has never seen that token from a document, so it
    gets none, unless the prompt is empty.
    """
    opening = [tokenizer.eot_id] if config.data.attend_across_documents else []
    return [opening + ids or [tokenizer.eot_id] for ids in tokenizer.encode_batch(prompts)]


def continue_text(
    wrapper: CustomTransformerWrapper, tokenizer: Tokenizer, config: Config, prompt: str
) -> Iterator[str]:
    """The continuation of `prompt`, in pieces of whole characters, as soon as they are drawn.

    Samples with config.evaluation and training.seed. Ends at max_generation_length tokens, prompt
    included, or before the model's end of text. Raises ConfigError at once if the prompt is already
    that long.
    """
    settings = config.evaluation
    [ids] = prompt_tokens(tokenizer, config, [prompt])
    if len(ids) >= settings.max_generation_length:
        raise ConfigError(
            f"evaluation.max_generation_length: expected more than the {len(ids)} tokens of the "
            f"prompt, got {settings.max_generation_length}"
        )
    steps = wrapper.stream(
        [ids],
        settings.max_generation_length,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        eos_token_id=tokenizer.eot_id,
        seed=config.training.seed,
    )
    return _characters(tokenizer, steps)


def _characters(tokenizer: Tokenizer, steps: Iterable[list[int | None]]) -> Iterator[str]:
    """The text of one row; an incomplete character waits for the token that completes it."""
    waiting: list[int] = []
    for [token] in steps:
        if token is not None and token != tokenizer.eot_id:
            waiting.append(token)
        text = tokenizer.decode(waiting)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text
            waiting = []
    yield tokenizer.decode(waiting)
