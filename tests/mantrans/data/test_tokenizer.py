"""Tokenizers: lossless on any text, refused when damaged, and the command line that makes them."""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mantrans.cli import main
from mantrans.config import Config
from mantrans.data import tokenizer_tool
from mantrans.data.holdout import part_of
from mantrans.data.text import Piece, pieces_of, read_txt
from mantrans.data.tokenizer import (
    END_OF_TEXT,
    SHIPPED,
    Tokenizer,
    known_names,
    load_tokenizer,
)
from mantrans.errors import DataError
from tests.support.damage import damaged

SHARED = Path(__file__).parents[4] / "shared" / "data"
SAMPLE = SHARED / "tinystories_sample.txt"
GPT2 = SHARED / "gpt2"
needs_sample = pytest.mark.skipif(not SAMPLE.exists(), reason=f"no real text at {SAMPLE}")
needs_gpt2 = pytest.mark.skipif(not GPT2.exists(), reason=f"no GPT-2 tokenizer at {GPT2}")
NAME = "tinystories_bpe_4096"


@pytest.fixture(scope="module")
def shipped() -> Tokenizer:
    return load_tokenizer(NAME)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return load_tokenizer(GPT2)


def saved(folder: Path, change: Callable[[dict], None]) -> Path:
    """A folder with the shipped tokenizer after a change, without the manifest that would tell."""
    content = json.loads((SHIPPED / NAME / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


# --- the shipped tokenizer ---------------------------------------------------------------------


def test_shipped_vocab_size(shipped: Tokenizer) -> None:
    assert NAME in known_names()
    assert shipped.vocab_size == 4096
    assert shipped.name == NAME
    assert shipped.decode([shipped.eot_id]) == END_OF_TEXT
    manifest = json.loads((SHIPPED / NAME / "manifest.json").read_text())
    assert manifest["hash"] == shipped.hash
    assert manifest["vocab_size"] == 4096


def test_shipped_transformers_loads(shipped: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(SHIPPED / NAME)
    assert len(theirs) == theirs.vocab_size == 4096
    assert theirs.eos_token_id == shipped.eot_id
    text = "Once upon a time, Lily's \n\n  zebra said \u201chi\u201d \U0001f600"
    assert theirs(text)["input_ids"] == shipped.encode(text)
    assert theirs.decode(shipped.encode(text)) == text


@needs_sample
def test_shipped_bytes_a_token(shipped: Tokenizer) -> None:
    """Unseen TinyStories take at least 3.6 bytes a token."""
    manifest = json.loads((SHIPPED / NAME / "manifest.json").read_text())
    fraction = manifest["held_out_of_each_input"]
    assert fraction == 0.1
    held = part_of(lambda: read_txt(SAMPLE), fraction, held=True)
    result = tokenizer_tool.analyze(shipped, held)
    assert 60 < result.documents < 120
    assert result.bytes_per_token >= 3.6


def test_token_bytes(shipped: Tokenizer) -> None:
    for text in ("Once upon a time", "\u6f22\u5b57 \U0001f600", "\x00\r\n"):
        assert shipped.token_bytes[shipped.encode(text)].sum() == len(text.encode())
    assert shipped.token_bytes[shipped.eot_id] == 0
    assert shipped.token_bytes.shape == (4096,)


# --- lossless ----------------------------------------------------------------------------------

TEXTS = st.text() | st.text(
    alphabet="ab \t\r\n\0'\u00e9\u0301\u6f22\U0001f600<|endoftxt>", max_size=60
)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_shipped_any_text(shipped: Tokenizer, text: str) -> None:
    """Any text comes back exactly."""
    ids = shipped.encode(text)
    assert shipped.decode(ids) == text
    assert shipped.eot_id not in ids


@needs_gpt2
@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_gpt2_any_text(gpt2: Tokenizer, text: str) -> None:
    """Any text comes back exactly from GPT-2."""
    assert gpt2.decode(gpt2.encode(text)) == text


def test_shipped_unicode_planes(shipped: Tokenizer) -> None:
    """Every Unicode plane and control comes back."""
    codes = [code for code in range(0, 0x110000, 37) if not 0xD800 <= code < 0xE000]
    text = "".join(map(chr, [*range(256), *codes]))
    assert shipped.decode(shipped.encode(text)) == text


def test_encode_written_end_of_text(shipped: Tokenizer) -> None:
    text = f"one{END_OF_TEXT}two"
    ids = shipped.encode(text)
    assert shipped.eot_id not in ids
    assert shipped.decode(ids) == text
    assert shipped.decode([shipped.eot_id]) == END_OF_TEXT


def test_encode_half_surrogate_pair(shipped: Tokenizer) -> None:
    """It ends in one clear error."""
    with pytest.raises(DataError, match="half of a surrogate pair"):
        shipped.encode_batch(["fine", "\ud800"])


def test_decode_ids_out_of_range(shipped: Tokenizer) -> None:
    """Decoding refuses ids out of range."""
    for wrong in (-1, 4096, 2**70):
        with pytest.raises(DataError, match=f"expected token ids 0 to 4095, got {wrong}"):
            shipped.decode([1, wrong])


# --- GPT-2, names, hashes ----------------------------------------------------------------------


@needs_gpt2
def test_gpt2_files_tokens(gpt2: Tokenizer) -> None:
    """GPT-2 files give GPT-2's tokens."""
    assert gpt2.encode("Hello world, once upon a time") == [15496, 995, 11, 1752, 2402, 257, 640]
    assert (gpt2.vocab_size, gpt2.eot_id) == (50_257, 50_256)


@needs_gpt2
def test_hash_of_tokenizer_not_files(gpt2: Tokenizer, tmp_path: Path) -> None:
    gpt2.library.save(str(tmp_path / "tokenizer.json"), pretty=False)
    assert load_tokenizer(tmp_path).hash == gpt2.hash


def test_hash_any_change(shipped: Tokenizer, tmp_path: Path) -> None:
    def swap_merges(content: dict) -> None:
        merges = content["model"]["merges"]
        merges[-1], merges[-2] = merges[-2], merges[-1]

    def swap_tokens(content: dict) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    hashes = {shipped.hash, load_tokenizer(saved(tmp_path, lambda content: None)).hash}
    assert len(hashes) == 1
    for change in (swap_merges, swap_tokens):
        hashes.add(load_tokenizer(saved(tmp_path, change)).hash)
    assert len(hashes) == 3


@pytest.mark.promise("names and links")
@pytest.mark.parametrize("name", ["../secrets", "a/../../b", "", " ", "nul\0", "..", "/srv/../etc"])
def test_load_names_without_tokenizer(name: str) -> None:
    with pytest.raises(DataError, match=r"expected"):
        load_tokenizer(name)


@pytest.mark.promise("names and links")
@pytest.mark.parametrize("name", ["../here", "../../{top}/here", "inside/../../here", "../here/."])
def test_load_own_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """From the working directory; but a name under assets/models/tokenizers/ stays there."""
    saved(tmp_path / "here", lambda content: None)
    (tmp_path / "there" / "inside").mkdir(parents=True)
    (tmp_path / "there" / "assets" / "models" / "tokenizers" / "own").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "there")
    name = name.format(top=tmp_path.name)
    assert load_tokenizer(name).name == load_tokenizer(tmp_path / "here").name
    config = Config.from_dict({"training": {"max_steps": 1}}, "", [f"data.tokenizer={name}"])
    assert config.data.tokenizer == name
    with pytest.raises(DataError, match="expected a folder or one of"):
        load_tokenizer("own/../../../../../here")


@pytest.mark.promise("names and links")
def test_load_link_out_of_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link out of the shipped folder is refused."""
    inside, outside = tmp_path / "tokenizers", saved(tmp_path / "outside", lambda content: None)
    inside.mkdir()
    (inside / "sly").symlink_to(outside)
    monkeypatch.setattr("mantrans.data.tokenizer.SHIPPED", inside)
    with pytest.raises(DataError, match="got a link"):
        load_tokenizer("sly")


def test_load_unknown_name() -> None:
    """An unknown name is told the nearest."""
    with pytest.raises(DataError, match=r"did you mean 'tinystories_bpe_4096'"):
        load_tokenizer("tinystories_bpe_4069")
    with pytest.raises(DataError, match=r"expected tokenizer\.json, or vocab\.json"):
        load_tokenizer(Path(__file__).parent)


@pytest.mark.parametrize("offline", [True, False])
def test_load_hub_unreachable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    """At once with HF_HUB_OFFLINE=1; else after the library's own tries, here without its waits."""
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(DataError, match=r"hub cannot be reached.*or use the shipped") as error:
        load_tokenizer("gpt2")
    assert "\n" not in str(error.value)


# --- damaged files -----------------------------------------------------------------------------


def damaged_copy(folder: Path) -> tuple[Path, bytes]:
    folder.mkdir()
    for file in (SHIPPED / NAME).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder / "tokenizer.json", (folder / "tokenizer.json").read_bytes()


@pytest.mark.promise("damaged tokens and tokenizers")
def test_load_flipped_byte_or_truncated(tmp_path: Path) -> None:
    """Every flipped byte and truncation is found."""
    file, whole = damaged_copy(tmp_path / "copy")
    chance = random.Random(0)
    for _ in range(200):
        file.write_bytes(damaged(whole, chance))
        with pytest.raises(DataError, match=r"tokenizer\.json cannot be used: its bytes"):
            load_tokenizer(file.parent)
        file.write_bytes(whole[: chance.randrange(len(whole))])
        with pytest.raises(DataError, match=r"tokenizer\.json cannot be used"):
            load_tokenizer(file.parent)


@pytest.mark.parametrize("manifest", ["", "[]", "{}", "[" * 10_000, '{"sha256": 3}', "\x00"])
def test_load_damaged_manifest(tmp_path: Path, manifest: str) -> None:
    file, _ = damaged_copy(tmp_path / "copy")
    (file.parent / "manifest.json").write_text(manifest)
    with pytest.raises(DataError, match=r"manifest\.json cannot be used"):
        load_tokenizer(file.parent)


def test_load_damage_without_manifest(tmp_path: Path) -> None:
    """Without a manifest damage is an error or harmless."""
    (tmp_path / "copy").mkdir()
    whole = (SHIPPED / NAME / "tokenizer.json").read_bytes()
    chance = random.Random(1)
    refused = 0
    for _ in range(40):
        (tmp_path / "copy" / "tokenizer.json").write_bytes(damaged(whole, chance))
        try:
            tokenizer = load_tokenizer(tmp_path / "copy")
        except DataError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert tokenizer.decode(tokenizer.encode("any text")) == "any text"
    assert refused > 20


def without_a_token(content: dict) -> None:
    del content["model"]["vocab"]["Ġupon"]


def with_a_hole(content: dict) -> None:
    content["model"]["vocab"]["extra"] = 5000


def with_two_on_one_id(content: dict) -> None:
    content["model"]["vocab"]["extra"] = 7


def without_a_byte(content: dict) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["\u00e0\u00e0\u00e0"] = vocabulary.pop("\u0100")


def without_end_of_text(content: dict) -> None:
    content["added_tokens"] = []
    vocabulary = content["model"]["vocab"]
    vocabulary["other"] = vocabulary.pop(END_OF_TEXT)


def with_more_special_tokens(content: dict) -> None:
    content["added_tokens"].append({**content["added_tokens"][0], "id": 4096, "content": "<pad>"})


def with_a_prefix_space(content: dict) -> None:
    content["pre_tokenizer"]["add_prefix_space"] = True


def with_normalization(content: dict) -> None:
    content["normalizer"] = {"type": "NFC"}


def with_lower_case(content: dict) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def without_byte_splitting(content: dict) -> None:
    content["pre_tokenizer"] = {"type": "Whitespace"}


def as_another_model(content: dict) -> None:
    content["model"] = {"type": "WordLevel", "vocab": {"a": 0, END_OF_TEXT: 1}, "unk_token": "a"}
    content["added_tokens"] = []


@pytest.mark.promise("wrong tokenizer")
@pytest.mark.parametrize(
    "change",
    [
        without_a_token,
        with_a_hole,
        with_two_on_one_id,
        without_a_byte,
        without_end_of_text,
        with_more_special_tokens,
        with_a_prefix_space,
        with_normalization,
        with_lower_case,
        without_byte_splitting,
        as_another_model,
    ],
)
def test_load_not_lossless(tmp_path: Path, change: Callable[[dict], None]) -> None:
    """A tokenizer that is not lossless is refused."""
    with pytest.raises(DataError, match="cannot be used: ") as error:
        load_tokenizer(saved(tmp_path / "changed", change))
    assert "\n" not in str(error.value)


@needs_gpt2
def test_load_gpt2_files_with_holes(tmp_path: Path) -> None:
    vocabulary = json.loads((GPT2 / "vocab.json").read_text(encoding="utf-8"))
    del vocabulary["hello"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "merges.txt").write_bytes((GPT2 / "merges.txt").read_bytes())
    with pytest.raises(DataError, match="cannot be used"):
        load_tokenizer(tmp_path)


# --- the command line --------------------------------------------------------------------------


def test_command_train_analyze_encode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "small"
    arguments = ["--dataset", "builtin-stories", "--limit", "200"]
    train = ["train", "--output", str(folder), "--vocab-size", "500", *arguments]
    assert main(["tokenizer", *train]) == 0
    assert "500 tokens" in capsys.readouterr().out
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == 500
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert list(tmp_path.iterdir()) == [folder]

    assert main(["tokenizer", "analyze", "--tokenizer", str(folder), "--json", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["documents"] == 200
    assert report["tokens_used"] + len(report["unused"]) == 499
    assert report["coverage"] == pytest.approx(report["tokens_used"] / 499)
    assert report["bytes_per_token"] == pytest.approx(report["bytes"] / report["tokens"])

    assert main(["tokenizer", "analyze", "--tokenizer", str(folder), *arguments]) == 0
    assert "bytes per token" in capsys.readouterr().out
    assert main(["tokenizer", "encode", "--tokenizer", str(folder), "Once upon"]) == 0
    ids = [int(word) for word in capsys.readouterr().out.splitlines()[0].split()]
    assert tokenizer.decode(ids) == "Once upon"


def test_train_twice(tmp_path: Path) -> None:
    """Training twice gives the same bytes."""
    text = [*pieces_of("the cat sat on the mat, and the cat ate the rat. " * 30)]
    for name in ("one", "two"):
        tokenizer_tool.train(text, 270, tmp_path / name)
    first, second = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "two"))
    assert first == second


def test_train_held_out(tmp_path: Path) -> None:
    """Documents held out are left out of the tokenizer's training."""
    file = tmp_path / "a.txt"
    file.write_text(END_OF_TEXT.join(f"document {i}" for i in range(200)))
    kept, held = ([*part_of(lambda: read_txt(file), 0.1, held)] for held in (False, True))
    assert len(kept) + len(held) == 200
    assert 8 < len(held) < 35
    assert not {piece.text for piece in kept} & {piece.text for piece in held}


@pytest.mark.parametrize(("n_documents", "share"), [(1, 0.1), (1, 0.05), (2, 0.05)])
def test_hold_out_few_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], n_documents: int, share: float
) -> None:
    """As training does. Of 0.1 the first document is held out, of 0.05 none of the first two."""
    n_held = round(6000 * share)
    text = ("the fox ran home. " * 400)[: 5999 - n_held] + "."
    text += (END_OF_TEXT if n_documents == 2 else "") + "zzzq" * (n_held // 4)
    (tmp_path / "a.txt").write_text(text)
    file = ["--input", str(tmp_path / "a.txt")]
    command = ["train", "--output", str(tmp_path / "t"), "--vocab-size", "262", *file]
    assert main(["tokenizer", *command, "--hold-out", str(share)]) == 0
    note = f"note: {file[1]}: one side would have no document: the last {share} of the text is held"
    note += " out"
    assert capsys.readouterr().err == f"{note}, by characters\n"
    analyze = ["analyze", "--tokenizer", str(tmp_path / "t"), "--json", *file]
    assert main(["tokenizer", *analyze, "--held-out", str(share)]) == 0
    said = capsys.readouterr()
    assert said.err == f"{note}, by characters\n"
    report = json.loads(said.out)
    assert (report["bytes"], report["documents"]) == (n_held, 1)
    assert report["tokens"] == n_held  # never seen: letter by letter


def test_hold_out_parts() -> None:
    """The parts of a text are all of it and share nothing."""
    text = "".join(chr(0x4E00 + i) for i in range(1000))

    def read() -> list[Piece]:
        return [Piece(text[:10], False), Piece(text[10:905], False), Piece(text[905:], True)]

    for fraction in (1e-9, 0.001, 0.1, 0.5, 0.99):
        kept, held = ([*part_of(read, fraction, side)] for side in (False, True))
        parts = ["".join(piece.text for piece in part) for part in (kept, held)]
        assert "".join(parts) == text and len(parts[1]) == max(1, round(1000 * fraction))
    assert [*part_of(read, 0.0, False)] == read()
    assert [*part_of(lambda: [], 0.1, True)] == []


@pytest.mark.parametrize("word", ["ACGT", "漢字かな", "x", "  ", "=-", "\u3000"])
def test_train_time_long_words(tmp_path: Path, word: str) -> None:
    """It was by the square: 25 s for 200,000 letters."""
    chance = random.Random(1)
    said: list[str] = []
    taken: list[float] = []
    for count in (20_000, 80_000):
        letters = "".join(chance.choice(word) for _ in range(count))
        begun = time.process_time()
        with contextlib.suppress(DataError):  # some of these texts have few tokens
            tokenizer_tool.train([Piece(letters, True)], 400, tmp_path / "t", say=said.append)
        taken.append(time.process_time() - begun)
    assert taken[1] < 8 * taken[0] + 0.3
    assert any("words of over 128 characters were cut" in note for note in said)


def test_train_long_words(tmp_path: Path) -> None:
    """Words that are not too long are learned as they are."""
    words = ["a" * 128, "b" * 127, " " * 128, "c d e"]
    assert [tokenizer_tool._cut(word) for word in words] == [[word] for word in words]
    for text in ("a" * 129, "é" * 1000 + " x", "x" + "\n" * 700, ""):
        parts = tokenizer_tool._cut(text)
        assert "".join(parts) == text and (len(parts) > 1) == (len(text) > 128)


def test_command_help_defaults() -> None:
    """Each help of the tool names its defaults."""
    parser = argparse.ArgumentParser()
    tokenizer_tool.add_arguments(parser)
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for command in commands.choices.values():
        for option in command._actions:
            assert option.help, option.dest
            if option.default not in (None, False, [], argparse.SUPPRESS):
                assert "default" in option.help, option.dest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--output", "{tmp}/x"], "got neither"),
        (["train", "--output", "{tmp}", "--dataset", "builtin-stories"], "exists already"),
        (["train", "--output", "{tmp}/x", "--input", "{tmp}/no.txt"], "got no such path"),
        (["train", "--output", "{tmp}/x", "--input", "{tmp}/tiny.txt"], "for this text, got"),
        (
            ["train", "--output", "{tmp}/x", "--input", "{tmp}/tiny.txt", "--vocab-size", "9"],
            "from 257 to 16777216",
        ),
        (["analyze", "--tokenizer", "nope", "--dataset", "builtin-stories"], "got 'nope'"),
        (["analyze", "--tokenizer", NAME, "--input", "{tmp}/empty.txt"], "got no document"),
        (["encode", "--tokenizer", "../x", "a"], "got '../x'"),
    ],
)
def test_command_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "tiny.txt").write_text("tiny")
    (tmp_path / "empty.txt").write_text("")
    filled = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    assert main(["tokenizer", *filled]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_module_as_documented() -> None:
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "mantrans", "tokenizer"]
    result = subprocess.run(
        [*command, "encode", "--tokenizer", NAME],
        input="Once upon a time",
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[1] == "'Once' ' upon' ' a' ' time'"


def test_load_foreign_truncation_and_padding(tmp_path: Path) -> None:
    """Truncation and padding of a foreign file are switched off."""

    def with_limits(content: dict) -> None:
        library = tokenizers.Tokenizer.from_str(json.dumps(content))
        library.enable_truncation(4)
        library.enable_padding(length=50)
        content.update(json.loads(library.to_str()))

    tokenizer = load_tokenizer(saved(tmp_path / "changed", with_limits))
    assert tokenizer.decode(tokenizer.encode("one two three four five six")) == (
        "one two three four five six"
    )
