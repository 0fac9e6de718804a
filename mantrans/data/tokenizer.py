"""Text to tokens and back, without loss: byte-level BPE.

A tokenizer is a folder with `tokenizer.json`, or with GPT-2's `vocab.json` and `merges.txt`. Only a
part of what the `tokenizers` library can run is accepted: every byte has a token, so that nothing
is unknown; text is neither normalized nor given a leading space, so that any text is restored
exactly; `<|endoftext|>` is the only special token. In a document this text is *never* read as the
special token, so no document can end itself early; the end of a document is the number `eot_id`,
which only `shards` appends. `tokenizer_tool` trains tokenizers.

A model's own tokenizer, which comes with it, may be `foreign`: it may have more tokens that are
added, its end of text may be another of ENDS, and it may bring text into Unicode's form NFC, as
Qwen's do.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import unicodedata
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from operator import index
from pathlib import Path
from typing import Any, Final

import numpy as np
import tokenizers

from mantrans.assets import ASSETS
from mantrans.errors import DataError

END_OF_TEXT = "<|endoftext|>"
ENDS = (END_OF_TEXT, "<|end_of_text|>")  # the latter is Llama 3's; the first that there is, is used
NFC: Final = "NFC"
TOKENIZER_FILE = "tokenizer.json"
MANIFEST_FILE = "manifest.json"
OWN = Path("assets", "models", "tokenizers")  # of the current directory
SHIPPED = ASSETS / "tokenizers"
_LARGEST_FILE = 256 * 2**20  # bytes; the largest published vocabularies take about 30 MB
_PROBES = (
    "Once upon a time, there was a kind girl.",
    "  two spaces\r\nand\ttabs \n\n\n",
    "e\u0301 \u00e9 \ufb01 \u6f22\u5b57 \U0001f600\u200d\U0001f680 \x00\x7f\ufeff",
    f"a {END_OF_TEXT} b",
)


class Tokenizer:
    """A checked tokenizer.

    `vocab_size` counts all tokens, ids 0 .. vocab_size-1; `eot_id` ends a document; `hash` is the
    sha256 of what determines the tokens of a text, independent of how the tokenizer is stored;
    `token_bytes` (vocab_size,) int64 is the number of bytes of text of each token, 0 for the end of
    text.
    """

    def __init__(
        self, library: tokenizers.Tokenizer, name: str, source: str, foreign: bool = False
    ) -> None:
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = True  # "<|endoftext|>" in a text is text
        self.library = library
        self.name = name
        description = json.loads(library.to_str())
        ends = ENDS if foreign else (END_OF_TEXT,)
        vocabulary = _vocabulary(library, source, ends)
        self.vocab_size = len(vocabulary)
        self.eot_id = next(vocabulary.index(end) for end in ends if end in vocabulary)
        self.token_bytes = np.array([len(token) for token in vocabulary], dtype=np.int64)
        self.token_bytes[self.eot_id] = 0
        self.hash = _canonical_hash(description, vocabulary)
        _check_bytes(vocabulary, description, source)
        _check_added(description, source, foreign)
        _check_lossless(self, description, source, foreign)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In another process: the library's own state does not include this setting."""
        vars(self).update(state)
        self.library.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text. DataError for a lone surrogate, which UTF-8 does not allow."""
        try:
            encodings = self.library.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            found = next((t for t in texts if not _is_unicode(t)), texts)
            raise DataError(
                f"text: expected Unicode, got {found!r:.60}: half of a surrogate pair, or no string"
            ) from None
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. DataError out of range."""
        try:
            numbers = [index(i) for i in ids]
        except TypeError:
            raise DataError(
                f"tokenizer {self.name!r}: expected token ids, got {ids!r:.60}"
            ) from None
        for number in numbers:
            if not 0 <= number < self.vocab_size:
                raise DataError(
                    f"tokenizer {self.name!r}: expected token ids 0 to {self.vocab_size - 1}, "
                    f"got {number}"
                )
        return self.library.decode(numbers, skip_special_tokens=False)

    def padded(self, vocab_size: int) -> Tokenizer:
        """This tokenizer for a model of at least as many rows, some of which stand for no token: no
        text has their ids, which decode to nothing."""
        if vocab_size == self.vocab_size:
            return self
        larger = copy.copy(self)
        larger.vocab_size = vocab_size
        larger.token_bytes = np.pad(self.token_bytes, (0, vocab_size - self.vocab_size))
        return larger

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, vocab_size={self.vocab_size}, hash={self.hash[:12]})"


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """The tokenizer in that folder, or of that name: in ./assets/models/tokenizers, in the package,
    or GPT-2's.

    Raises DataError if there is none, or if its files are damaged or not as the module's docstring
    says.
    """
    name = os.path.expanduser(name_or_path)
    if not name.strip() or "\0" in name:
        raise DataError(
            "data.tokenizer: expected a name under assets/models/tokenizers/ or a folder, "
            f"got {name!r}"
        )
    try:
        return _find(name)
    except OSError as error:  # a name that no file can have, or a folder without permission
        raise DataError(f"tokenizer {name!r} cannot be read: {error.strerror or error}") from None


def _find(name: str) -> Tokenizer:
    """The tokenizer of a checked name or path."""
    if Path(name).is_dir():
        return _from_folder(Path(name))
    if Path(name).name == TOKENIZER_FILE and Path(name).is_file():
        return _from_folder(Path(name).parent)
    for root in () if ".." in Path(name).parts else (OWN, SHIPPED):
        if (root / name).is_dir():
            if not (root / name).resolve().is_relative_to(root.resolve()):
                raise DataError(f"tokenizer {name!r}: expected a folder in {root}, got a link")
            return _from_folder(root / name)
    if name == "gpt2":
        return _gpt2_from_hub()
    known = [*known_names(), "gpt2"]
    close = get_close_matches(name, known, n=1)
    raise DataError(
        f"data.tokenizer: expected a folder or one of {', '.join(known)}, got {name!r}"
        + (f"; did you mean {close[0]!r}?" if close else "")
    )


def tokenizer_from_text(text: str, name: str, source: str) -> Tokenizer:
    """The foreign tokenizer of a `tokenizer.json` with this content; errors as `load_tokenizer`."""
    try:
        library = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise _damaged(Path(source), str(error)) from None
    return Tokenizer(library, name, source, foreign=True)


def foreign_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that comes with a model in a folder. DataError as for `load_tokenizer`."""
    return _from_folder(Path(folder), foreign=True)


def known_names() -> list[str]:
    """The names of the tokenizers on this disk."""
    return sorted(
        {p.parent.name for root in (OWN, SHIPPED) for p in root.glob(f"*/{TOKENIZER_FILE}")}
    )


def write_manifest(folder: Path, tokenizer: Tokenizer, facts: dict[str, Any]) -> None:
    """Write the checksum of `tokenizer.json`, which loading verifies, and how it was made."""
    manifest = {
        "vocab_size": tokenizer.vocab_size,
        "hash": tokenizer.hash,
        "sha256_of_tokenizer_json": _sha256(folder / TOKENIZER_FILE),
        **facts,
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")


def _from_folder(folder: Path, foreign: bool = False) -> Tokenizer:
    """Read a folder of either kind; the library's message about a bad file becomes one line."""
    file = folder / TOKENIZER_FILE
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    try:
        if file.is_file():
            _check_size(file)
            _check_manifest(folder, file)
            library = tokenizers.Tokenizer.from_file(str(file))
        elif vocab.is_file() and merges.is_file():
            file = vocab
            _check_size(vocab)
            _check_size(merges)
            library = _gpt2_library(vocab, merges)
        else:
            raise DataError(
                f"tokenizer folder {folder}: expected {TOKENIZER_FILE}, or vocab.json and "
                "merges.txt, got neither"
            )
    except DataError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise _damaged(file, str(error)) from None
    return Tokenizer(library, folder.resolve().name, str(file), foreign)


def _gpt2_library(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocab), str(merges)))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    if library.token_to_id(END_OF_TEXT) is None:
        raise _damaged(vocab, f"it has no token {END_OF_TEXT}")
    library.add_special_tokens([END_OF_TEXT])
    return library


def _gpt2_from_hub() -> Tokenizer:
    """GPT-2's tokenizer from the Hugging Face cache, or else from the hub."""
    ways = (
        "put GPT-2's vocab.json and merges.txt into a folder and give its path, or use the "
        "shipped tokenizer tinystories_bpe_4096"
    )
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise DataError(
            f"tokenizer 'gpt2' needs the package huggingface_hub, which is missing: {ways}"
        ) from None
    file, failure = None, "no answer"
    # The cache first, so that later runs do not need the network.
    for local_only in (True, False):
        try:
            file = hf_hub_download(
                "openai-community/gpt2", TOKENIZER_FILE, local_files_only=local_only
            )
            break
        except Exception as error:  # network, proxy, disk: the hub raises many kinds
            failure = type(error).__name__
    if file is None:
        raise DataError(
            f"tokenizer 'gpt2' is not in the cache and the Hugging Face hub cannot be reached "
            f"({failure}): "
            f"{ways}"
        )
    try:
        return Tokenizer(tokenizers.Tokenizer.from_file(file), "gpt2", file)
    except DataError:
        raise
    except Exception as error:
        raise _damaged(Path(file), str(error)) from None


def _vocabulary(library: tokenizers.Tokenizer, source: str, ends: tuple[str, ...]) -> list[str]:
    """Tokens by id; checks that ids are 0, 1, 2, … and that the end of text is among them."""
    by_text = library.get_vocab(with_added_tokens=True)
    tokens = sorted(by_text, key=by_text.__getitem__)
    ids = [by_text[token] for token in tokens]
    for expected, found in enumerate(ids):
        if expected != found:
            raise _damaged(
                Path(source),
                f"expected token ids 0 to {len(ids) - 1}, each once, got {found} in place of "
                f"{expected}",
            )
    if not any(end in by_text for end in ends):
        raise _damaged(Path(source), f"it has no token {' or '.join(ends)}")
    return tokens


def _canonical_hash(description: dict[str, Any], vocabulary: list[str]) -> str:
    """sha256 of vocabulary, merges and pre-tokenizer, independent of the library's version."""
    merges = [
        pair.split(" ") if isinstance(pair, str) else pair
        for pair in description["model"].get("merges", [])
    ]
    splitting = description.get("pre_tokenizer") or {}
    splitting = {key: value for key, value in splitting.items() if key != "trim_offsets"}
    parts = [vocabulary, merges, splitting] + ([NFC] if _is_nfc(description) else [])
    content = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def _check_bytes(vocabulary: list[str], description: dict[str, Any], source: str) -> None:
    """Refuse a tokenizer that lacks a byte."""
    if description["model"].get("type") != "BPE":
        raise _damaged(Path(source), f"it is {description['model'].get('type')}, not BPE")
    missing = set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) - set(vocabulary)
    if missing:
        raise _damaged(
            Path(source), f"{len(missing)} of the 256 byte tokens are missing: not byte-level BPE"
        )


def _check_added(description: dict[str, Any], source: str, foreign: bool) -> None:
    """Refuse added tokens that no text can be trusted with."""
    added = description.get("added_tokens", [])
    extra = {token["content"] for token in added} - {END_OF_TEXT}
    if extra and not foreign:
        raise _damaged(
            Path(source), f"it has added tokens besides {END_OF_TEXT}: {sorted(extra)[:3]}"
        )
    for token in added:
        # One that is not special is found in texts, where it must not take spaces with it.
        if not token["special"] and (token["lstrip"] or token["rstrip"]):
            raise _damaged(Path(source), f"its token {token['content']!r} takes spaces with it")


def _check_lossless(
    tokenizer: Tokenizer, description: dict[str, Any], source: str, foreign: bool
) -> None:
    """Refuse a tokenizer that does not restore texts exactly."""
    for probe in _PROBES:
        restored = probe
        if foreign and _is_nfc(description):
            restored = unicodedata.normalize(NFC, probe)
        ids = tokenizer.encode(probe)
        lossless = ids and max(ids) < tokenizer.vocab_size and tokenizer.eot_id not in ids
        if not lossless or tokenizer.decode(ids) != restored:
            raise _damaged(Path(source), f"it does not restore the text {probe!r} exactly")


def _is_nfc(description: dict[str, Any]) -> bool:
    """Whether texts are brought into that form of Unicode before they are split."""
    return description.get("normalizer") == {"type": NFC}


def _check_size(file: Path) -> None:
    if file.stat().st_size > _LARGEST_FILE:
        raise DataError(
            f"{file}: expected at most {_LARGEST_FILE:,} bytes, got {file.stat().st_size:,}"
        )


def _check_manifest(folder: Path, file: Path) -> None:
    """If there is a manifest, check that `tokenizer.json` has the checksum in it."""
    manifest = folder / MANIFEST_FILE
    if not manifest.is_file():
        return
    _check_size(manifest)
    try:
        expected = json.loads(manifest.read_bytes())["sha256_of_tokenizer_json"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _damaged(manifest, f"it has no checksum of {TOKENIZER_FILE}") from None
    if expected != _sha256(file):
        raise _damaged(file, f"its bytes do not have the checksum in {MANIFEST_FILE}")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _damaged(file: Path, what: str) -> DataError:
    reason = " ".join(what.split())[:200]
    return DataError(f"tokenizer file {file} cannot be used: {reason}; restore or retrain it")


def _is_unicode(text: object) -> bool:
    return isinstance(text, str) and not any(
        0xD800 <= ord(character) <= 0xDFFF for character in text
    )
