"""Text in, text out: a prompt as tokens, and the new tokens as text while they are drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mantrans.config import Config
from mantrans.config.arguments import DRAWING
from mantrans.errors import ConfigError
from mantrans.models.stop_texts import Reader

if TYPE_CHECKING:
    from mantrans.data.tokenizer import Tokenizer
    from mantrans.wrapper import CustomTransformerWrapper


def prompt_tokens(tokenizer: Tokenizer, config: Config, prompts: Sequence[str]) -> list[list[int]]:
    """Each prompt's tokens after an end-of-text token, because a document starts here.

    A model trained with attention inside documents has never seen that token from a document, so it
    gets none, unless the prompt is empty.
    """
    opening = [tokenizer.eot_id] if config.data.attend_across_documents else []
    return [opening + ids or [tokenizer.eot_id] for ids in tokenizer.encode_batch(prompts)]


def sampling_options(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """The keywords of `generate` and `stream` that a config has, with the tokenizer for `stop`."""
    settings = config.evaluation
    return {
        **{name: getattr(settings, name) for name in DRAWING},
        "max_length": settings.max_generation_length,
        "stop": settings.stop,
        "tokenizer": tokenizer,
        "eos_token_id": tokenizer.eot_id,
        "seed": config.training.seed,
    }


class Continuation:
    """The continuation of a prompt: iterates over pieces of whole characters, as they are drawn.

    ids: the prompt's tokens. options: keywords of `stream`; the text ends before the first of the
    `stop` texts, before eos_token_id or the end of text, or at max_length tokens, prompt included.
    `tokens` counts those drawn.
    """

    def __init__(
        self, wrapper: CustomTransformerWrapper, ids: list[int], options: dict[str, Any]
    ) -> None:
        self.tokens = 0
        self._ends = {options["eos_token_id"], options["tokenizer"].eot_id}
        self._reader = Reader(options["tokenizer"], options["stop"])
        self._steps = wrapper.stream([ids], **options | {"stop": ()})  # is read here

    def __iter__(self) -> Iterator[str]:
        for [token] in self._steps:
            self.tokens += 1
            if token is None or token in self._ends:
                break
            yield self._reader.read(token)
            if self._reader.ended:
                return
        yield self._reader.rest()


def continue_text(
    wrapper: CustomTransformerWrapper,
    tokenizer: Tokenizer,
    config: Config,
    prompt: str,
    seed: int | None = None,
) -> Continuation:
    """The continuation of `prompt`, sampled with config.evaluation and `seed`, or training.seed.

    Raises ConfigError at once if the prompt has max_generation_length tokens already.
    """
    options = sampling_options(config, tokenizer)
    options["seed"] = options["seed"] if seed is None else seed
    [ids] = prompt_tokens(tokenizer, config, [prompt])
    if len(ids) >= options["max_length"]:
        raise ConfigError(
            f"evaluation.max_generation_length: expected more than the {len(ids)} tokens of the "
            f"prompt, got {options['max_length']}"
        )
    return Continuation(wrapper, ids, options)
