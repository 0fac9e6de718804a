"""Perplexity, bits per byte, diversity, reports, and evaluate.py: against counts made by hand."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mantrans.checkpoint import state_file
from mantrans.cli import main
from mantrans.config import Config
from mantrans.data.dataset import TokenDataset
from mantrans.data.tokenizer import Tokenizer, load_tokenizer
from mantrans.errors import DataError
from mantrans.evaluation import diversity
from mantrans.evaluation.evaluator import (
    as_json,
    as_text,
    generate_samples,
    measure_stream,
    printable,
)
from mantrans.evaluation.perplexity import Perplexity, batches, measure
from mantrans.inference.text import prompt_tokens
from mantrans.kernels.reference import IGNORE_INDEX, document_starts
from mantrans.training import saving
from mantrans.training.trainer import Trainer
from mantrans.wrapper import CustomTransformerWrapper

END = 0
VOCABULARY = 7
TOKEN_BYTES = np.array([0, 1, 2, 3, 5, 8, 13])


class BigramModel:
    """Predicts from the token before alone, by a table: what it costs can be added up by hand."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        table = torch.rand(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64)
        self.nats = -torch.log_softmax(3 * table, -1)

    def losses(self, tokens: Tensor, targets: Tensor, document_start: Tensor | None) -> Tensor:
        counted = targets != IGNORE_INDEX
        nats = self.nats[tokens, targets.where(counted, 0)]
        return torch.where(counted, nats, 0).float().reshape(-1)

    def cost(self, stream: list[int]) -> float:
        return sum(self.nats[a, b].item() for a, b in zip([END, *stream], stream, strict=False))


streams = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=60)
sizes = st.tuples(st.integers(1, 9), st.integers(1, 5))


@given(streams, sizes, st.sampled_from([np.uint16, np.uint32]))
def test_windows_every_token_once(stream: list[int], size: tuple[int, int], dtype: type):
    length, batch_size = size
    inputs, targets = [], []
    for x, y in batches(np.array(stream, dtype=dtype), length, batch_size, END):
        assert x.shape == y.shape and x.shape[1] == length and x.shape[0] <= batch_size
        inputs += x.reshape(-1).tolist()
        targets += y.reshape(-1).tolist()
    n = len(stream)
    assert targets[:n] == stream
    assert set(targets[n:]) <= {IGNORE_INDEX} and len(targets) - n < length
    assert inputs[:n] == [END, *stream[:-1]]


@given(streams, sizes)
@settings(deadline=None)
def test_stream_cost_any_windows(stream: list[int], size: tuple[int, int]):
    model, (length, batch_size) = BigramModel(), size
    measured = measure(
        model,
        np.array(stream, dtype=np.uint16),
        TOKEN_BYTES,
        length=length,
        batch_size=batch_size,
        end_of_text=END,
    )
    # float32 losses, added in float64: the relative error is that of one rounding, 2^-24
    assert measured.nats == pytest.approx(model.cost(stream), rel=2**-23)
    assert measured.tokens == len(stream)
    assert measured.bytes == sum(TOKEN_BYTES[token] for token in stream)


def test_max_batches_bytes():
    """The bytes are those of the tokens that count."""
    model = BigramModel()
    stream = np.array([1, 6, 0, 2, 5, 4, 3, 0, 1, 1, 6, 2], dtype=np.uint16)
    kinds = {"length": 3, "batch_size": 2, "end_of_text": END}
    measured = measure(model, stream, TOKEN_BYTES, max_batches=1, **kinds)
    first = stream[:6].tolist()
    assert measured.tokens == 6
    assert measured.bytes == 1 + 13 + 0 + 2 + 8 + 5
    assert measured.nats == pytest.approx(model.cost(first), rel=2**-23)
    assert measure(model, stream, TOKEN_BYTES, max_batches=99, **kinds) == measure(
        model, stream, TOKEN_BYTES, **kinds
    )


def test_sums_float64():
    """2^24 + 1 is where float32 stops counting by ones."""

    class OneLargeThenOnes:
        def losses(self, tokens: Tensor, targets: Tensor, document_start: Tensor | None) -> Tensor:
            return torch.where(tokens == END, 2.0**24, 1.0).float().reshape(-1)

    stream = np.ones(6, dtype=np.uint16)
    result = measure(
        OneLargeThenOnes(), stream, TOKEN_BYTES, length=1, batch_size=1, end_of_text=END
    )
    assert result.nats == 2.0**24 + 5


def test_measures():
    measured = Perplexity(nats=8 * math.log(2), tokens=4, bytes=16)
    assert measured.loss == pytest.approx(2 * math.log(2))
    assert measured.perplexity == pytest.approx(4)
    assert measured.bits_per_byte == pytest.approx(0.5)
    assert Perplexity(nats=1e6, tokens=1, bytes=1).perplexity == math.inf
    assert math.isnan(Perplexity(nats=math.nan, tokens=1, bytes=1).perplexity)
    assert math.isnan(Perplexity(nats=1.0, tokens=1, bytes=0).bits_per_byte)


@pytest.mark.parametrize(("stream", "words"), [([], "got 0"), ([1, 7], "got 7")])
def test_measures_impossible_data(stream: list[int], words: str):
    with pytest.raises(DataError, match=words):
        measure(
            BigramModel(),
            np.array(stream, dtype=np.uint16),
            TOKEN_BYTES,
            length=4,
            batch_size=2,
            end_of_text=END,
        )


# ----------------------------------------------------------------------------------- diversity


def test_words():
    assert diversity.words_of("The cat's hat -- it's RED, no?") == [
        "the", "cat's", "hat", "it's", "red", "no",
    ]  # fmt: skip


def test_distinct_all_texts():
    """Distinct counts over all texts."""
    texts = ["a b a b", "b a"]
    assert diversity.distinct(texts, 1) == pytest.approx(2 / 6)
    assert diversity.distinct(texts, 2) == pytest.approx(2 / 4)  # ab, ba, ab | ba
    assert diversity.distinct(["a b", "c d"], 3) is None  # no phrase spans two texts


def test_vocabulary_diversity_mean():
    """Vocabulary diversity is a mean over texts."""
    assert diversity.vocabulary_diversity(["a b a b", "", "a b c"]) == pytest.approx((0.5 + 1) / 2)
    assert diversity.vocabulary_diversity(["", "?!"]) is None


def test_repetition_rate():
    assert diversity.repetition_rate(["one two three four five six"]) == 0
    loop = "the cat sat down " * 5  # 20 words, 17 phrases of 4, 4 different ones
    assert diversity.repetition_rate([loop]) == pytest.approx(13 / 17)
    # the same text twice is no repetition within a text
    assert diversity.repetition_rate(["a b c d e", "a b c d e"]) == 0
    assert diversity.repetition_rate(["too short now"]) is None


@given(st.lists(st.text(alphabet="ab ,", max_size=40), max_size=5))
def test_diversity_bounds(texts: list[str]):
    """Diversity lies between zero and one."""
    for value in diversity.diversity(texts).values():
        assert value is None or 0 <= value <= 1


# ------------------------------------------- the real tokenizer, data, model and command line

STORIES = [
    "Tom had a red ball. He lost it in the park. Mia found it, and they played all day.",
    "A little bird could not fly. Her mother said, “Try once more.” She tried, and she flew!",
    "Ben did not share his cake. His friends went home. Ben was sad, so he baked another one.",
    "The cat saw the moon in the pond. She jumped. The moon was wet, and so was the cat.",
] * 6
CONFIG = {
    "model": {"d_model": 32, "n_blocks": 2, "n_heads": 2, "max_seq_len": 16, "dtype": "float64"},
    "data": {"dataset": "local", "validation_fraction": 0.4},
    "training": {"max_steps": 1, "device": "cpu", "seed": 3},
    "evaluation": {
        "generation_prompts": ["Tom had", "The cat saw the moon", "Ben"],
        "max_generation_length": 24,
        "batch_size": 2,
    },
}


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level BPE of our own, in the form that `load_tokenizer` takes."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.train_from_iterator(
        STORIES,
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    folder.mkdir()
    library.save(str(folder / "tokenizer.json"))


class Run(NamedTuple):
    """An untrained model with everything that surrounds a trained one."""

    folder: Path
    config: Config
    tokenizer: Tokenizer
    data: TokenDataset
    wrapper: CustomTransformerWrapper
    checkpoint: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What `train.py` has made before its first step, saved as it saves."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_tokenizer(folder / "small", 300)
    write_tokenizer(folder / "other", 320)
    (folder / "stories.txt").write_text("<|endoftext|>".join(STORIES), encoding="utf-8")
    values = json.loads(json.dumps(CONFIG))
    values["data"] |= {
        "tokenizer": str(folder / "small"),
        "path": str(folder / "stories.txt"),
        "cache_dir": str(folder / "cache"),
    }
    values["training"] |= {
        "output_dir": str(folder / "runs"),
        "checkpoint_dir": str(folder / "checkpoints"),
    }
    config = Config.from_dict(values)
    trainer = Trainer(config, quiet=True)
    state_file.save(folder / "best.pt", saving.state(trainer))
    trainer.logger.close()
    trainer.folders.close()
    config.save(folder / "config.yaml")
    longer = Config.from_dict({**values, "model": {**values["model"], "max_seq_len": 64}})
    longer.save(folder / "long.yaml")
    return Run(
        folder, config, trainer.tokenizer, trainer.dataset, trainer.wrapper, folder / "best.pt"
    )


def cost_from_logits(run: Run, ids: list[int], within_documents: bool) -> float:
    """-log probability of `ids`, from the model's logits, one window after the other."""
    T, total = run.config.sequence_length, 0.0
    read = [run.tokenizer.eot_id, *ids]
    for first in range(0, len(ids), T):
        window = torch.tensor([read[first : first + T]])[:, : len(ids) - first]
        starts = document_starts(window, run.tokenizer.eot_id) if within_documents else None
        log_p = torch.log_softmax(run.wrapper.model.forward(window, starts)[0], -1)
        total -= sum(log_p[t, token].item() for t, token in enumerate(ids[first : first + T]))
    return total


@pytest.mark.parametrize("within_documents", [False, True])
def test_evaluate_real_stream(trained: Run, within_documents: bool):
    config = Config.from_dict(trained.config.to_dict())
    config.data.attend_across_documents = not within_documents
    stream = trained.data.validation
    measured = measure_stream(trained.wrapper, trained.tokenizer, stream, config)
    assert measured.tokens == len(stream)
    assert measured.bytes == stream.n_bytes
    ids = stream.tokens.tolist()
    assert trained.tokenizer.eot_id in ids[:-1], "several documents, or the masks are not tested"
    # float64 throughout: what differs is the order of sums
    assert measured.nats == pytest.approx(
        cost_from_logits(trained, ids, within_documents), rel=1e-12
    )


def test_evaluate_first_batches_bytes(trained: Run):
    """Bytes of the first batches are those of their text."""
    stream, tokenizer = trained.data.validation, trained.tokenizer
    measured = measure_stream(trained.wrapper, tokenizer, stream, trained.config, max_batches=2)
    counted = stream.tokens[: 2 * 2 * 16]
    text = tokenizer.decode(counted[counted != tokenizer.eot_id])
    assert measured.tokens == len(counted) < len(stream)
    assert measured.bytes == len(text.encode())


def test_evaluate_story_bytes(tmp_path: Path):
    real = Path(__file__).parents[4] / "shared/data"
    if not real.is_dir():
        pytest.skip("the real TinyStories sample is not beside this checkout")
    tokenizer = load_tokenizer(real / "gpt2")
    stories = (real / "tinystories_sample.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    ids = [tokenizer.eot_id]
    for story in stories[:40]:
        ids += [*tokenizer.encode(story), tokenizer.eot_id]

    class Uniform:
        def losses(self, tokens: Tensor, targets: Tensor, document_start: Tensor | None) -> Tensor:
            counted = (targets != IGNORE_INDEX).float().reshape(-1)
            return counted * math.log(tokenizer.vocab_size)

    measured = measure(
        Uniform(),
        np.array(ids, dtype=np.uint16),
        tokenizer.token_bytes,
        length=64,
        batch_size=8,
        end_of_text=tokenizer.eot_id,
    )
    n_bytes = len("".join(stories[:40]).encode())
    assert measured.bytes == n_bytes
    assert measured.perplexity == pytest.approx(50257, rel=1e-6)  # float32's rounding of the log
    assert measured.bits_per_byte == pytest.approx(len(ids) * math.log2(50257) / n_bytes, rel=1e-6)


def test_samples_config(trained: Run):
    samples = generate_samples(trained.wrapper, trained.tokenizer, trained.config, 5)
    prompts = trained.config.evaluation.generation_prompts
    assert [sample["prompt"] for sample in samples] == [*prompts, *prompts[:2]]
    again = generate_samples(trained.wrapper, trained.tokenizer, trained.config, 5)
    assert samples == again
    for sample in samples:
        given = trained.tokenizer.encode(sample["prompt"])
        whole = trained.tokenizer.encode(sample["prompt"] + sample["continuation"])
        assert "<|endoftext|>" not in sample["continuation"]
        assert sample["continuation"] and len(whole) > len(given)
    # one prompt twice, in batches of one: it must not be the same sample
    config = Config.from_dict(trained.config.to_dict())
    config.evaluation.batch_size = 1
    alone = generate_samples(trained.wrapper, trained.tokenizer, config, 4)
    assert alone[0]["prompt"] == alone[3]["prompt"] and alone[0] != alone[3]


@pytest.mark.parametrize("attend_across_documents", [True, False])
def test_samples_added_text(trained: Run, attend_across_documents: bool):
    """A sample is what the model adds."""
    config = Config.from_dict(trained.config.to_dict())
    config.data.attend_across_documents = attend_across_documents
    config.evaluation.temperature = 0.0
    tokenizer = trained.tokenizer
    given = tokenizer.encode("Tom had")
    if attend_across_documents:
        given = [tokenizer.eot_id, *given]
    row = trained.wrapper.generate(torch.tensor(given), 24, temperature=0.0)[0].tolist()
    added = row[len(given) :]
    if tokenizer.eot_id in added:
        added = added[: added.index(tokenizer.eot_id)]
    [sample] = generate_samples(trained.wrapper, tokenizer, config, 1)
    assert sample == {"prompt": "Tom had", "continuation": tokenizer.decode(added)}


def test_samples_settings(trained: Run):
    """Sampling settings reach the model."""
    config = Config.from_dict(trained.config.to_dict())
    config.evaluation.temperature = 0.0
    greedy = generate_samples(trained.wrapper, trained.tokenizer, config, 3)
    config.training.seed = 99
    assert generate_samples(trained.wrapper, trained.tokenizer, config, 3) == greedy
    config.evaluation.temperature, config.evaluation.top_k = 5.0, 1
    assert generate_samples(trained.wrapper, trained.tokenizer, config, 3) == greedy
    config.evaluation.top_k, config.evaluation.top_p = None, 1e-9
    assert generate_samples(trained.wrapper, trained.tokenizer, config, 3) == greedy
    config.evaluation.top_p, config.evaluation.max_generation_length = None, 8
    short = generate_samples(trained.wrapper, trained.tokenizer, config, 3)
    assert len(short[2]["continuation"]) <= 7 * max(trained.tokenizer.token_bytes)


def test_report_infinite_loss():
    report = {"loss": math.inf, "list": [{"x": math.nan}], "tokens": 3}
    assert json.loads(as_json(report)) == {"loss": None, "list": [{"x": None}], "tokens": 3}


def test_report_terminal():
    """A printed report leaves the terminal alone."""
    report = {"loss": 1.0, "perplexity": math.e, "bits_per_byte": 0.5, "tokens": 1, "bytes": 3}
    sample = {"prompt": "Tom", "continuation": " \x1b[2J\x07“é”\n\tday"}
    assert as_text({**report, "samples": [sample]}).endswith("[Tom] \ufffd[2J\ufffd“é”\n\tday")


def test_report_scores():
    """A printed report has the coherence scores."""
    marks = {"grammar": 4.5, "coherence": 3.0, "plot": 2.0, "model": "claude-haiku-4-5"}
    report = {
        "loss": 1.0,
        "perplexity": math.e,
        "bits_per_byte": 0.5,
        "tokens": 1,
        "bytes": 3,
        "diversity": {"distinct_1": None, "distinct_2": 0.25},
        "coherence": {**marks, "scores": [{}, {}]},
    }
    printed = as_text(report)
    assert "grammar 4.50, coherence 3.00, plot 2.00 (2 samples, claude-haiku-4-5)" in printed
    assert "distinct 1            none" in printed and "distinct 2            0.250" in printed


def command(run: Run, *arguments: str) -> int:
    return main(["evaluate", "--checkpoint", str(run.checkpoint), *arguments])


def test_evaluate_command(trained: Run, capsys: pytest.CaptureFixture[str]):
    file = trained.folder / "report.json"
    assert command(trained, "--generate", "--json", str(file)) == 0
    printed = capsys.readouterr().out
    report = json.loads(file.read_text())
    measured = measure_stream(
        trained.wrapper, trained.tokenizer, trained.data.validation, trained.config
    )
    assert report["loss"] == measured.loss and report["tokens"] == measured.tokens
    assert report["bits_per_byte"] == measured.bits_per_byte and report["bytes"] == measured.bytes
    assert report["diversity"].keys() >= {"vocabulary_diversity", "repetition_rate"}
    assert report["coherence"] is None
    assert len(report["samples"]) == 3
    assert f"{measured.perplexity:.2f}" in printed and f"{measured.bits_per_byte:.4f}" in printed
    assert printable(f"[Tom had]{report['samples'][0]['continuation']}") in printed


def test_evaluate_config_file(trained: Run, capsys: pytest.CaptureFixture[str]):
    config = str(trained.folder / "config.yaml")
    assert command(trained, "--config", config, "--max-batches", "1") == 0
    with_file = capsys.readouterr().out
    assert "32 tokens" in with_file and "distinct" not in with_file
    assert command(trained, "--max-batches", "1", "--set", "evaluation.batch_size=1") == 0
    assert "16 tokens" in capsys.readouterr().out


def test_evaluate_missing_key(
    trained: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Missing key is said once and the rest goes on."""
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    monkeypatch.delenv("ANTHROPIC_AUTH_TOKEN", raising=False)
    wanted = ["--generate", "--set", "evaluation.evaluate_coherence=true"]
    wanted += ["--set", "evaluation.coherence_samples=4", "--max-batches", "1"]
    assert command(trained, *wanted) == 0
    printed = capsys.readouterr()
    assert printed.err.count("coherence not scored") == 1 and printed.out.count("[Tom had]") == 2
    assert command(trained, *wanted, "--no-coherence-eval") == 0
    assert "coherence" not in "".join(capsys.readouterr())


# ---------------------------------------------------- a text of one's own, and no data at all

STORY = "Mia found a blue cup.\r\nShe put it – gently – on the table.\n\n  And left.\n"


@pytest.fixture
def without_data(trained: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """The same checkpoint where neither the training text nor its tokens are left."""
    state = state_file.load(trained.checkpoint)
    state["config"]["data"] |= {"path": str(tmp_path / "gone.txt"), "cache_dir": str(tmp_path)}
    state_file.save(tmp_path / "alone.pt", state)
    return trained._replace(folder=tmp_path, checkpoint=tmp_path / "alone.pt")


def written(folder: Path, name: str) -> Path:
    """STORY and two short documents in a file of that name."""
    file = folder / name
    rows = "".join(json.dumps({"text": t}) + "\n" for t in (STORY, "One.", "Two."))
    text = rows if ".jsonl" in name else "<|endoftext|>".join((STORY, "One.", "Two."))
    content = text.encode()
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return file


@pytest.mark.promise("own text measured")
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.gz", "README.md", "a"])
def test_evaluate_own_text(without_data: Run, capsys: pytest.CaptureFixture[str], name: str):
    """A text of one's own is measured whole and needs no data."""
    file, report = written(without_data.folder, name), without_data.folder / "report.json"
    before = sorted(without_data.folder.rglob("*"))
    assert command(without_data, "--text", str(file), "--json", str(report)) == 0
    printed, found = capsys.readouterr().out, json.loads(report.read_text())
    texts = [t.strip().replace("\r\n", "\n" if ".jsonl" not in name else "\r\n")
             for t in (STORY, "One.", "Two.")]  # fmt: skip
    tokenizer = without_data.tokenizer
    tokens = [i for text in texts for i in [*tokenizer.encode(text), tokenizer.eot_id]]
    assert found["bytes"] == sum(len(text.encode()) for text in texts)
    assert found["tokens"] == len(tokens) and found["dataset"] == str(file)
    expected = measure(
        without_data.wrapper.model, np.array(tokens), tokenizer.token_bytes, length=16,
        batch_size=1, end_of_text=tokenizer.eot_id,
    )  # fmt: skip
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-12)
    assert f"{expected.bits_per_byte:.4f}" in printed
    assert sorted(without_data.folder.rglob("*")) == sorted([*before, report])  # nothing is cached


@pytest.mark.promise("own text measured")
def test_evaluate_samples_without_data(without_data: Run, capsys: pytest.CaptureFixture[str]):
    assert command(without_data) == 2
    assert "data.path: expected a file" in capsys.readouterr().err
    report = without_data.folder / "report.json"
    assert command(without_data, "--generate", "--json", str(report)) == 0
    printed = capsys.readouterr()
    assert printed.out.count("[Tom had]") == 1 and "loss" not in printed.out
    (line,) = printed.err.splitlines()
    assert line.startswith("note: samples only, no loss: data.path: expected a file")
    found = json.loads(report.read_text())
    assert len(found["samples"]) == 3 and "loss" not in found
    generate = ["generate", "--checkpoint", str(without_data.checkpoint), "--prompt", "Tom"]
    assert main(generate) == 0 and capsys.readouterr().out.startswith("Tom")


@pytest.mark.promise("own text measured")
@pytest.mark.parametrize("kind", ["absent", "empty", "blank", "folder", "binary", "latin"])
def test_evaluate_text_unmeasurable(
    without_data: Run, capsys: pytest.CaptureFixture[str], kind: str
):
    file = without_data.folder / "text"
    contents = {"empty": b"", "blank": b" \n\n", "binary": b"\x89PNG\0", "latin": b"caf\xe9 " * 9}
    if kind in contents:
        file.write_bytes(contents[kind])
    elif kind == "folder":
        file.mkdir()
    for options in ([], ["--generate"]):
        assert command(without_data, "--text", str(file), *options) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: ") and str(file) in line and "expected" in line


@pytest.mark.promise("own text measured")
def test_evaluate_prompt_without_room(trained: Run, capsys: pytest.CaptureFixture[str]):
    """The report is the same, with a line about it."""
    prompts = trained.config.evaluation.generation_prompts
    longest = max(map(len, prompt_tokens(trained.tokenizer, trained.config, prompts)))
    for limit, empty in ((longest + 1, 0), (longest, 1), (1, 3)):
        setting = f"evaluation.max_generation_length={limit}"
        assert command(trained, "--generate", "--set", setting, "--max-batches", "1") == 0
        said = capsys.readouterr().err
        assert (f"{empty} of 3 samples are empty" in said) == bool(empty), said
        assert (f"more than the {longest} tokens of the longest prompt, got {limit}" in said) == (
            empty > 0
        )


def test_evaluate_batch_size_default(trained: Run):
    """Validation batches follow the training batch unless told."""

    def sizes(**batches: int) -> set[int]:
        values = trained.config.to_dict()
        values["evaluation"]["batch_size"] = batches.get("evaluation")
        values["training"]["batch_size"] = batches["training"]
        config = Config.from_dict(values)
        model, seen = trained.wrapper.model, set()
        watched = SimpleNamespace(
            config=trained.wrapper.config, device="cpu", model=SimpleNamespace(
                losses=lambda x, y, s: seen.add(len(x)) or model.losses(x, y, s)),
        )  # fmt: skip
        measure_stream(watched, trained.tokenizer, trained.data.validation, config, max_batches=2)
        return seen

    assert sizes(training=2) == {2} and sizes(training=5) == {5}
    assert sizes(training=5, evaluation=3) == {3}


WRONG = {
    "tokenizer": (["--set", "data.tokenizer={}/other"], ["'other' (320", "'small' (300"]),
    "field": (["--set", "evaluation.temprature=1"], ["evaluation.temperature"]),
    "count": (["--max-batches", "0"], ["--max-batches", "from 1 to"]),
    "option": (["--generat0r"], ["--generat0r"]),
    "config": (["--config", "{}/none.yaml"], ["none.yaml"]),
    "json": (["--json", "{}/none/report.json", "--max-batches", "1"], ["--json", "none"]),
    "device": (["--device", "abacus"], ["device", "abacus"]),
    "length": (["--config", "{}/long.yaml"], ["data.max_length: expected", "(16), got 64"]),
    "model": (["--set", "model.d_model=64"], ["model.d_model=64", "checkpoint's"]),
    "contradiction": (
        ["--set", "training.min_learning_rate=1.0"],
        ["best.pt: training.min_learning_rate"],
    ),
}


@pytest.mark.parametrize(("arguments", "words"), WRONG.values(), ids=WRONG.keys())
def test_evaluate_mistakes(
    trained: Run, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
):
    assert command(trained, *(a.format(trained.folder) for a in arguments)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no such file"), (b"garbage", "damaged"), ("plain", "train.py saved")],
)
def test_evaluate_not_a_checkpoint(
    trained: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | str | None,
    words: str,
):
    path = tmp_path / "model.pt"
    if content == "plain":
        trained.wrapper.save_checkpoint(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    assert main(["evaluate", "--checkpoint", str(path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line and str(path) in line
