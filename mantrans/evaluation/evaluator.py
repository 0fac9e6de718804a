"""The report of a trained model: its loss, its samples and their quality.

The trainer writes a report at the end of a run, `evaluate.py` one of a checkpoint. A report is a
dict of plain data; `as_json` and `as_text` format it for machines and for people.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from mantrans.config import TrainingConfig
from mantrans.config.arguments import checked, field
from mantrans.errors import ConfigError, printable
from mantrans.evaluation.coherence import CRITERIA, score_samples
from mantrans.evaluation.diversity import diversity
from mantrans.inference.text import prompt_tokens, sampling_options

if TYPE_CHECKING:
    from mantrans.config import Config
    from mantrans.data.shards import TokenStream
    from mantrans.data.tokenizer import Tokenizer
    from mantrans.evaluation.perplexity import Perplexity
    from mantrans.wrapper import CustomTransformerWrapper

_MAX_BATCHES = field(TrainingConfig, "eval_batches")
Sample = dict[str, str]  # {"prompt": text, "continuation": the model's text after it}


@checked(max_batches=_MAX_BATCHES, generate=bool, coherence=bool, show_progress=bool)
def evaluate(
    wrapper: CustomTransformerWrapper,
    tokenizer: Tokenizer,
    validation: TokenStream | None,
    config: Config,
    *,
    max_batches: int | None = None,
    generate: bool = True,
    coherence: bool = True,
    show_progress: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The report of a model: `measure_stream`, and with `generate` samples and their scores.

    validation: None to measure nothing. coherence: False for no scores from Claude, whatever the
    config says. say: called with one line that explains why there are no scores, or why samples are
    empty.

    Returns {"loss", "perplexity", "bits_per_byte", "tokens", "bytes"} and, with `generate`,
    {"samples", "diversity" (of the continuations), "coherence" (None without scores)}.
    Raises ModelError if the model is broken, so that no sample can be drawn from it.
    """
    report: dict[str, Any] = {}
    if validation is not None:
        measured = measure_stream(
            wrapper, tokenizer, validation, config,
            max_batches=max_batches, show_progress=show_progress,
        )  # fmt: skip
        report = {
            "loss": measured.loss,
            "perplexity": measured.perplexity,
            "bits_per_byte": measured.bits_per_byte,
            "tokens": measured.tokens,
            "bytes": measured.bytes,
        }
    if generate:
        settings, scored = config.evaluation, coherence and config.evaluation.evaluate_coherence
        _say_what_has_no_room(tokenizer, config, say)
        count = len(settings.generation_prompts)
        samples = generate_samples(
            wrapper, tokenizer, config, max(count, settings.coherence_samples) if scored else count
        )
        report["samples"] = samples
        report["diversity"] = diversity([sample["continuation"] for sample in samples])
        texts = [sample["prompt"] + sample["continuation"] for sample in samples]
        texts = texts[: settings.coherence_samples]
        report["coherence"] = (
            score_samples(texts, settings.coherence_model, say=say) if scored else None
        )
    return report


@checked(max_batches=_MAX_BATCHES, show_progress=bool)
def measure_stream(
    wrapper: CustomTransformerWrapper,
    tokenizer: Tokenizer,
    validation: TokenStream,
    config: Config,
    *,
    max_batches: int | None = None,
    show_progress: bool = False,
) -> Perplexity:
    """The cost of a stream under a model, in windows of the configured sequence length.

    Raises ConfigError if a window is longer than the model's max_seq_len.
    """
    if config.sequence_length > wrapper.config.max_seq_len:
        raise ConfigError(
            f"data.max_length: expected at most the checkpoint's max_seq_len "
            f"({wrapper.config.max_seq_len}), got {config.sequence_length}"
        )
    from mantrans.evaluation.perplexity import measure  # imports torch, which other users need not

    return measure(
        wrapper.model,
        validation.tokens,
        tokenizer.token_bytes,
        length=config.sequence_length,
        batch_size=config.evaluation_batch,
        end_of_text=tokenizer.eot_id,
        attend_across_documents=config.data.attend_across_documents,
        device=wrapper.device,
        max_batches=max_batches,
        show_progress=show_progress,
    )


def generate_samples(
    wrapper: CustomTransformerWrapper, tokenizer: Tokenizer, config: Config, count: int
) -> list[Sample]:
    """`count` samples for the configured prompts in turn, with the configured sampling and seed.

    A sample ends at `max_generation_length` tokens, `prompt_tokens` included, or before the model's
    end-of-text token or a `stop` text.
    """
    options, size = sampling_options(config, tokenizer), config.evaluation_batch
    prompts = list(islice(cycle(config.evaluation.generation_prompts), count))
    given = prompt_tokens(tokenizer, config, prompts)
    samples: list[Sample] = []
    for first in range(0, len(prompts), size):
        # another seed each, else all batches of one prompt would be the same
        options["seed"] = config.training.seed + first
        rows = wrapper.generate(given[first : first + size], **options)
        for row in rows:
            prompt, ids = prompts[len(samples)], given[len(samples)]
            made = [token for token in row[len(ids) :].tolist() if token != tokenizer.eot_id]
            samples.append({"prompt": prompt, "continuation": tokenizer.decode(made)})
    return samples


def _say_what_has_no_room(tokenizer: Tokenizer, config: Config, say: Callable[[str], None]) -> None:
    """Say which prompts are as long as a sample may be, so that nothing is added to them."""
    limit, prompts = config.evaluation.max_generation_length, config.evaluation.generation_prompts
    lengths = [len(ids) for ids in prompt_tokens(tokenizer, config, prompts)]
    full = [length for length in lengths if length >= limit]
    if full:
        say(
            f"evaluation.max_generation_length: expected more than the {max(full)} tokens of the "
            f"longest prompt, got {limit}: {len(full)} of {len(prompts)} samples are empty"
        )


def as_json(report: dict[str, Any]) -> str:
    """The report as JSON; infinity and NaN, which JSON lacks, become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def as_text(report: dict[str, Any]) -> str:
    """The report for a terminal: the numbers first, then each sample."""
    facts = {}
    if "loss" in report:
        facts = {
            "loss per token": f"{report['loss']:.4f} nats",
            "perplexity": f"{report['perplexity']:.2f}",
            "bits per byte": f"{report['bits_per_byte']:.4f}",
            "counted": f"{report['tokens']:,} tokens, {report['bytes']:,} bytes",
        }
    if "choices" in report:
        facts |= _answers(report["choices"])
    for name, value in report.get("diversity", {}).items():
        facts[name.replace("_", " ")] = "none" if value is None else f"{value:.3f}"
    if report.get("coherence"):
        scored = report["coherence"]
        means = ", ".join(f"{name} {scored[name]:.2f}" for name in CRITERIA)
        facts["scores out of 5"] = f"{means} ({len(scored['scores'])} samples, {scored['model']})"
    lines = [f"{name:<22}{fact}" for name, fact in facts.items()]
    for sample in report.get("samples", []):
        lines += ["", printable(f"[{sample['prompt']}]{sample['continuation']}")]
    return "\n".join(lines)


def _answers(report: dict[str, Any]) -> dict[str, str]:
    """What `choices.measure_choices` has returned, for a terminal."""
    rules = {"acc": "", "acc_norm": " by character", "acc_bytes": " by byte"}
    rules["acc_tokens"] = " by token"
    facts = {
        name: f"{report[name]:.4f} ± {report[f'{name}_stderr']:.4f}, least loss{rule}"
        for name, rule in rules.items()
    }
    return facts | {"questions": f"{report['questions']:,}; by chance {report['chance']:.4f}"}
