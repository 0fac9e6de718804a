"""Multiple-choice questions: which ending does the model find the likeliest?

    {"ctx": "A man opens a book. He", "endings": ["reads.", "flies.", "boils it."], "label": 0}

A file has a line of JSON for each question, as HellaSwag's has (Zellers et al. 2019, "HellaSwag:
Can a Machine Really Finish Your Sentence?"); other fields are passed over. A choice is read as
`ctx`, a space, and the ending; its loss S is that of the ending's tokens, space included. Four
accuracies, each with another rule for the choice that is taken:

    acc         the least S
    acc_norm    the least S for a character of the ending
    acc_bytes   the least S for a byte of its UTF-8
    acc_tokens  the least S for a token, as in llm.c

Texts, tokens and the first three are those of lm-evaluation-harness (`lm_eval`, 0.4.13), so that
the numbers of an exported model are the same there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mantrans import terminal
from mantrans.data.files import opened
from mantrans.data.tokenizer import Tokenizer
from mantrans.errors import DataError, ModelError, show
from mantrans.evaluation.perplexity import LossModel
from mantrans.kernels.reference import IGNORE_INDEX

LONGEST_LINE = 2**20  # bytes
ROUNDED_TO = 16  # tokens: of lengths that are multiples of it a GPU's kernels are compiled once


class Question(NamedTuple):
    """One line of a file, which `where` names."""

    context: str
    endings: list[str]
    label: int
    where: str


class Choice(NamedTuple):
    """An ending after its context, as the model reads it."""

    tokens: tuple[int, ...]  # at most max_length + 1
    counted: int  # of these the last, which are the ending's


def read_questions(path: Path) -> list[Question]:
    """All questions of a .jsonl file, which may be compressed (.gz, .zst).

    DataError, which names the file and the line, for anything that is no question.
    """
    if not path.is_file():
        got = "a folder" if path.is_dir() else "no such file"
        raise DataError(f"{path}: expected a .jsonl file of questions, got {got}")
    questions = []
    with opened(path) as stream:
        lines = iter(lambda: stream.readline(LONGEST_LINE + 1), b"")
        for number, line in enumerate(lines, 1):
            where = f"{path}: line {number}"
            if len(line) > LONGEST_LINE:
                raise DataError(f"{where}: expected at most {LONGEST_LINE:,} bytes, got more")
            if line.strip():
                questions.append(_question(line, where))
    if not questions:
        raise DataError(f"{path}: expected at least 1 question, got 0")
    return questions


def _question(line: bytes, where: str) -> Question:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: expected a JSON object, got {show(line.decode(errors='replace'))}"
        )
    if "ctx" not in row and {"ctx_a", "ctx_b"} <= row.keys():  # HellaSwag has the halves too
        halves = [_text(row[name], f"{where}: {name}", blank=True) for name in ("ctx_a", "ctx_b")]
        row["ctx"] = " ".join(halves).strip()
    context = _text(row.get("ctx"), f"{where}: ctx")
    endings, label = row.get("endings"), row.get("label")
    if not isinstance(endings, list) or len(endings) < 2:
        raise DataError(f"{where}: endings: expected a list of at least 2, got {show(endings)}")
    endings = [_text(text, f"{where}: endings[{i}]") for i, text in enumerate(endings)]
    if isinstance(label, str) and label.isdecimal():  # as in HellaSwag on the hub
        label = int(label) if len(label) < 10 else None
    if type(label) is not int or not 0 <= label < len(endings):
        last = len(endings) - 1
        raise DataError(f"{where}: label: expected 0 to {last}, got {show(row.get('label'))}")
    return Question(context, endings, label, where)


def _text(value: Any, name: str, blank: bool = False) -> str:
    try:
        if isinstance(value, str) and (blank or value.strip()):
            value.encode()
            return value
    except UnicodeEncodeError:
        raise DataError(f"{name}: expected Unicode, got half of a surrogate pair") from None
    raise DataError(f"{name}: expected a text, got {show(value)}")


def measure_choices(
    model: LossModel,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    max_length: int,
    batch_size: int,
    device: torch.device | str = "cpu",
    show_progress: bool = False,
) -> dict[str, float]:
    """The four accuracies of a model, their standard errors, and what chance would give.

    max_length: the model's max_seq_len; of a longer choice the last tokens are read. batch_size:
    choices in a batch; results do not depend on it, but for the rounding of the model's dtype.

    Returns {"questions", "chance", "acc", "acc_stderr", "acc_norm", ..., "acc_tokens_stderr"}.
    Raises DataError for an ending without a token or longer than max_length, ModelError for a loss
    that is not finite, ValueError for no question.
    """
    if not questions:
        raise ValueError("questions: expected at least 1, got 0")
    choices = [_choices_of(question, tokenizer, max_length) for question in questions]
    losses = _losses(
        model, {choice for few in choices for choice in few}, tokenizer.eot_id,
        max_length, batch_size, device, show_progress,
    )  # fmt: skip
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": [], "acc_bytes": [], "acc_tokens": []}
    for question, few in zip(questions, choices, strict=True):
        sums = np.array([losses[choice] for choice in few])
        if not np.isfinite(sums).all():
            raise ModelError(f"{question.where}: expected finite losses, got {sums.tolist()}")
        lengths = (
            [1] * len(few),
            [len(ending) for ending in question.endings],
            [len(ending.encode()) for ending in question.endings],
            [choice.counted for choice in few],
        )
        for hits, length in zip(right.values(), lengths, strict=True):
            hits.append(int((sums / length).argmin()) == question.label)
    n = len(questions)
    report: dict[str, float] = {"questions": n}
    report["chance"] = sum(1 / len(question.endings) for question in questions) / n
    for name, hits in right.items():
        share = report[name] = sum(hits) / n
        report[f"{name}_stderr"] = math.sqrt(share * (1 - share) / max(1, n - 1))
    return report


def _choices_of(question: Question, tokenizer: Tokenizer, max_length: int) -> list[Choice]:
    """A token may reach over the end of the context, so that all is encoded together: what comes
    after as many tokens as the context alone has is the ending's. White space at the end of the
    context counts as the ending's."""
    context, *whole = tokenizer.encode_batch(
        [question.context.rstrip(), *(f"{question.context} {end}" for end in question.endings)]
    )
    choices = []
    for i, tokens in enumerate(whole):
        counted = len(tokens) - len(context)
        if not 0 < counted <= max_length:
            raise DataError(
                f"{question.where}: endings[{i}]: expected 1 to {max_length} tokens after ctx, as "
                f"many as the model can read, got {counted}"
            )
        choices.append(Choice(tuple(tokens[-(max_length + 1) :]), counted))
    return choices


def _losses(
    model: LossModel,
    choices: Iterable[Choice],
    padding: int,
    max_length: int,
    batch_size: int,
    device: torch.device | str,
    show_progress: bool,
) -> dict[Choice, float]:
    """The sum of each ending's losses in nats; the same choice has one. The longest come first, so
    that a lack of memory shows at once."""
    in_order = sorted(choices, key=lambda choice: (-len(choice.tokens), choice))
    batches = [in_order[i : i + batch_size] for i in range(0, len(in_order), batch_size)]
    watched: Iterable[list[Choice]] = batches
    if show_progress:
        watched = terminal.watched(batches, len(batches), "evaluating", "batch")
    sums = []
    for batch in watched:
        longest = len(batch[0].tokens) - 1
        T = min(max_length, -(-longest // ROUNDED_TO) * ROUNDED_TO)
        inputs = np.full((len(batch), T), padding)
        targets = np.full((len(batch), T), IGNORE_INDEX)
        for i, (tokens, counted) in enumerate(batch):
            end = len(tokens) - 1
            inputs[i, :end] = tokens[:-1]
            targets[i, end - counted : end] = tokens[-counted:]
        x, y = (torch.from_numpy(array).to(device) for array in (inputs, targets))
        sums.append(model.losses(x, y).double().view(len(batch), T).sum(1))
    return dict(zip(in_order, torch.cat(sums).tolist(), strict=True))  # waits once, at the end
