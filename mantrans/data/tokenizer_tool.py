"""The command `mantrans tokenizer`: train a tokenizer, analyze one, encode with one.

    mantrans tokenizer train --output assets/models/tokenizers/NAME \\
        --input stories.txt --dataset builtin-stories --vocab-size 4096 --hold-out 0.1
    mantrans tokenizer analyze --tokenizer NAME --input stories.txt \\
        --held-out 0.1
    mantrans tokenizer encode --tokenizer NAME "Once upon a time"

`--dataset hub:NAME[:FIELD]` is any set of the Hugging Face hub, as in data.dataset.
`--hold-out` leaves out the same documents that `data.validation_fraction` of the same size holds
out of training, so that neither tokenizer nor model has seen them; `analyze --held-out` counts only
these (`holdout`, also for a text of one document).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from mantrans.config import DATASETS, HUB_SET
from mantrans.data.files import ACCEPTED
from mantrans.data.holdout import part_of
from mantrans.data.registry import Source, find_source
from mantrans.data.text import Piece, ReadReport
from mantrans.data.tokenizer import (
    END_OF_TEXT,
    TOKENIZER_FILE,
    Tokenizer,
    load_tokenizer,
    write_manifest,
)
from mantrans.errors import DataError, single_line
from mantrans.options import integer, share
from mantrans.terminal import say, show

SMALLEST_VOCABULARY = 257  # the bytes and the end of text
LARGEST_VOCABULARY = 2**24  # as model.vocab_size
_NAMES = f"{', '.join(DATASETS[:-1])}, or hub:NAME[:FIELD]"  # all but local, which is --input
_BATCH = 1000  # pieces tokenized in one call
_LONGEST_WORD = 128  # characters; learning takes time by the square of a word's length
_TOO_LONG = re.compile(rf"\S{{{_LONGEST_WORD}}}(?=\S)|\s{{{_LONGEST_WORD}}}(?=\s)")


@dataclass(frozen=True)
class Analysis:
    """A tokenizer's statistics on a text. `coverage`: the share of its tokens that occur in it."""

    tokenizer: str
    vocab_size: int
    documents: int
    bytes: int
    tokens: int
    bytes_per_token: float
    tokens_used: int
    coverage: float
    unused: list[str]


def train(
    pieces: Iterable[Piece],
    vocab_size: int,
    folder: Path,
    *,
    show_progress: bool = False,
    say: Callable[[str], None] = lambda note: None,
) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2) learned from the pieces' text.

    The end of text is token 0, then come the 256 bytes and the merges in the order in which they
    were learned. Writes `tokenizer.json` and `tokenizer_config.json` to `folder`, which
    `transformers.PreTrainedTokenizerFast` loads. Words of over 128 characters are cut, so that no
    token reaches across; `say` is called with a note on that. DataError if the text has fewer
    tokens.
    """
    if not SMALLEST_VOCABULARY <= vocab_size <= LARGEST_VOCABULARY:
        raise DataError(
            f"--vocab-size: expected {SMALLEST_VOCABULARY} to {LARGEST_VOCABULARY}, "
            f"got {vocab_size}"
        )
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    counts = Counter[str]()

    def texts() -> Iterator[str]:
        for piece in pieces:
            parts = _cut(piece.text)
            counts["cuts"] += len(parts) - 1
            yield from parts

    library.train_from_iterator(texts(), trainer)
    if n_cuts := counts["cuts"]:
        say(f"words of over {_LONGEST_WORD} characters were cut to learn from, {n_cuts:,} times")
    if library.get_vocab_size() != vocab_size:
        raise DataError(
            f"--vocab-size: expected at most {library.get_vocab_size()} for this text, "
            f"got {vocab_size}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / TOKENIZER_FILE))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return Tokenizer(library, folder.resolve().name, str(folder))


def analyze(tokenizer: Tokenizer, pieces: Iterable[Piece]) -> Analysis:
    """Count the tokens of the pieces; the end of text counts neither as used nor as unused."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    documents = 0
    for batch in _batches(pieces):
        documents += sum(piece.is_last for piece in batch)
        ids = list(chain.from_iterable(tokenizer.encode_batch([piece.text for piece in batch])))
        counts += np.bincount(np.asarray(ids, dtype=np.int64), minlength=tokenizer.vocab_size)
    n_tokens, n_bytes = int(counts.sum()), int(counts @ tokenizer.token_bytes)
    if n_tokens == 0:
        raise DataError("--input, --dataset: expected a text to analyze, got no document")
    unused = [int(i) for i in np.flatnonzero(counts == 0) if i != tokenizer.eot_id]
    return Analysis(
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        documents=documents,
        bytes=n_bytes,
        tokens=n_tokens,
        bytes_per_token=n_bytes / n_tokens,
        tokens_used=int((counts > 0).sum()),
        coverage=float((counts > 0).sum() / (tokenizer.vocab_size - 1)),
        unused=[tokenizer.decode([i]) for i in unused],
    )


def _cut(text: str) -> list[str]:
    """The text, cut inside words, and runs of white space, that are too long."""
    cuts = [0, *(found.end() for found in _TOO_LONG.finditer(text)), len(text)]
    return [text[start:stop] for start, stop in pairwise(cuts)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the commands train, analyze and encode; `options.run(options)` runs one."""
    commands = parser.add_subparsers(required=True, metavar="train | analyze | encode")
    text = argparse.ArgumentParser(add_help=False)
    add = text.add_argument
    add("--input", action="append", default=[], help=f"{ACCEPTED}, or a folder; may be repeated")
    add(
        "--dataset", action="append", default=[], type=_dataset, metavar="NAME",
        help=f"{_NAMES}; may be repeated",
    )  # fmt: skip
    add("--limit", type=integer(1), help="documents of each --dataset (default: all)")
    add("--text-field", help="of .jsonl and .parquet (default: text)")
    add(
        "--separator",
        choices=("eot", "blank_line"),
        default="eot",
        help="of documents in a .txt: the text <|endoftext|>, or a blank line (default: eot)",
    )

    train_command = commands.add_parser("train", parents=[text], help="learn a tokenizer")
    train_command.add_argument("--output", required=True, type=Path, help="a new folder")
    train_command.add_argument(
        "--vocab-size",
        type=integer(SMALLEST_VOCABULARY, LARGEST_VOCABULARY),
        default=4096,
        help="tokens in all (default: 4096)",
    )
    train_command.add_argument(
        "--hold-out",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="of each --input, and --dataset without a split to validate on: leave out what "
        "data.validation_fraction holds out (default: 0)",
    )
    train_command.set_defaults(run=_run_train)

    analyze_command = commands.add_parser("analyze", parents=[text], help="count its tokens")
    analyze_command.add_argument("--tokenizer", required=True, help="a name, or its folder")
    analyze_command.add_argument(
        "--held-out",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="of the same: count only what this share holds out (default: 0, count all)",
    )
    analyze_command.add_argument("--json", action="store_true", help="print all as JSON")
    analyze_command.set_defaults(run=_run_analyze)

    encode_command = commands.add_parser("encode", help="show the tokens of a text")
    encode_command.add_argument("--tokenizer", required=True, help="a name, or its folder")
    encode_command.add_argument("text", nargs="?", type=str, help="default: standard input")
    encode_command.set_defaults(run=_run_encode)


def _dataset(text: str) -> str:
    """argparse's type of --dataset."""
    if text not in DATASETS[:-1] and not re.fullmatch(HUB_SET, text):
        raise argparse.ArgumentTypeError(f"expected one of {_NAMES}, got {single_line(text)!r}")
    return text


def _run_train(options: argparse.Namespace) -> None:
    """Train in a temporary folder, which is renamed when it is complete."""
    output: Path = options.output
    if output.exists():
        raise DataError(f"--output: expected a new folder, got {output}, which exists already")
    aside = output.with_name(output.name + ".unfinished")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        tokenizer = train(
            _pieces(options, options.hold_out, held=False),
            options.vocab_size,
            aside,
            show_progress=sys.stderr.isatty(),
            say=_say,
        )
        facts = {
            "trained_on": [*(Path(name).name for name in options.input), *options.dataset],
            "documents_of_each_dataset": options.limit,
            "held_out_of_each_input": options.hold_out,
        }
        write_manifest(aside, tokenizer, facts)
        aside.rename(output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    show(f"wrote {output}: {tokenizer.vocab_size} tokens, hash {tokenizer.hash}")


def _run_analyze(options: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(options.tokenizer)
    result = analyze(tokenizer, _pieces(options, options.held_out, held=options.held_out > 0))
    if options.json:
        show(json.dumps(asdict(result), ensure_ascii=False))
        return
    show(f"tokenizer        {result.tokenizer}, {result.vocab_size:,} tokens")
    show(f"text             {result.documents:,} documents, {result.bytes:,} bytes")
    show(f"tokens           {result.tokens:,}")
    show(f"bytes per token  {result.bytes_per_token:.3f}")
    show(f"coverage         {result.coverage:.1%} of the tokens occur ({result.tokens_used:,})")
    show(f"unused           {len(result.unused):,}: {_some(result.unused)}")


def _run_encode(options: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(options.tokenizer)
    ids = tokenizer.encode(_standard_input() if options.text is None else options.text)
    show(" ".join(map(str, ids)))
    show(" ".join(repr(tokenizer.decode([i])) for i in ids))


def _standard_input() -> str:
    """All of it. DataError if it is closed or not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except (AttributeError, OSError, ValueError) as error:  # AttributeError: there is none
        reason = (
            "it is closed" if sys.stdin is None or sys.stdin.closed else single_line(str(error))
        )
        raise DataError(f"standard input: expected text in UTF-8, got none ({reason})") from None


def _pieces(options: argparse.Namespace, fraction: float, held: bool) -> Iterator[Piece]:
    """All text that the options name; of the named sets only training documents."""
    if not options.input and not options.dataset:
        raise DataError("--input, --dataset: expected at least one of them, got neither")
    for path in options.input:
        source = find_source(
            "local",
            path=path,
            text_field=options.text_field,
            document_separator=options.separator,
            path_name="--input",
        )
        for note in source.notes:
            _say(note)
        report = ReadReport()
        read = partial(_train_split, source, report)
        yield from part_of(read, fraction, held, partial(_say, of=path))
        for note in report.notes():
            _say(note, of=path)
    for name in options.dataset:
        source, report = find_source(name), ReadReport()
        with tempfile.TemporaryDirectory() as folder:  # for the files of the hub
            splits = source.open(report, folder=Path(folder))
            pieces: Iterable[Piece] = splits.train
            if fraction and splits.validation is None:
                read = partial(_train_split, source, report, Path(folder))
                pieces = part_of(read, fraction, held, partial(_say, of=name))
            yield from _first(pieces, options.limit)
        for note in report.notes():
            _say(note, of=name)


def _train_split(source: Source, report: ReadReport, folder: Path | None = None) -> Iterable[Piece]:
    """Its text, read from the start; the report is of this reading alone."""
    vars(report).update(vars(ReadReport()))
    return source.open(report, folder=folder).train


def _say(note: str, of: str = "") -> None:
    say(f"note: {of}{': ' * bool(of)}{note}")


def _first(pieces: Iterable[Piece], documents: int | None) -> Iterator[Piece]:
    taken = 0
    for piece in pieces:
        yield piece
        taken += piece.is_last
        if taken == documents:  # before the next is read: it may have to be downloaded
            return


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    for piece in pieces:
        batch.append(piece)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _some(tokens: list[Any], count: int = 12) -> str:
    shown = " ".join(repr(token) for token in tokens[:count])
    return shown + (" ..." if len(tokens) > count else "")
