"""Generation at its edges: ties, broken models, extreme temperatures; through every door."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mantrans import CustomTransformerWrapper
from mantrans.checkpoint import state_file
from mantrans.cli import main
from mantrans.errors import ModelError
from mantrans.evaluation.evaluator import generate_samples
from mantrans.inference.text import continue_text, prompt_tokens
from mantrans.models.sampling import sample
from mantrans.training.trainer import Trainer
from tests.support.drawing import probabilities_of
from tests.support.runs import checkpoints, small

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
NAN, INF = math.nan, math.inf


def drawn(logits: Tensor, **options) -> Tensor:
    return sample(logits, torch.Generator().manual_seed(0), **options)


def kept(logits: Tensor, **options) -> list[list[int]]:
    """Which tokens of each row `sample` would draw."""
    return [row.nonzero()[:, 0].tolist() for row in probabilities_of(logits, **options)]


# -------------------------------------------------------------------------------------------- ties


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 10, 50257])
@pytest.mark.parametrize("value", [-7.25, 3e38])
def test_top_k_equal_logits(dtype, V: int, value: float) -> None:
    """Of equal logits the lowest ids are kept."""
    logits = torch.full((2, V), value, dtype=dtype)
    assert drawn(logits, temperature=0).tolist() == [0, 0]
    for k in {1, 2, V // 2, V - 1, V, V + 5} - {0}:
        assert kept(logits, top_k=k) == [list(range(min(k, V)))] * 2
        if k <= V:
            assert kept(logits, top_p=k / V) == [list(range(k))] * 2


def test_top_p_equal_logits() -> None:
    """top_p = k / n of n equal tokens are k of them, whatever the roundings of the sum."""
    for n in range(1, 41):
        for k in range(1, n + 1):
            assert kept(torch.zeros(1, n), top_p=k / n) == [list(range(k))], (k, n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_top_k_and_p_ties(dtype) -> None:
    """Ties at the threshold go to the lowest ids."""
    logits = torch.tensor([[1, 3, 5, 3, 3, 0, 5], [5, 5, 0, 0, 0, 0, 3]], dtype=dtype)
    assert drawn(logits, temperature=0).tolist() == [2, 0]
    assert kept(logits, top_k=1) == [[2], [0]]
    assert kept(logits, top_k=4) == [[1, 2, 3, 6], [0, 1, 2, 6]]
    assert kept(logits, top_p=1e-12) == [[2], [0]]
    assert kept(logits, top_k=4, top_p=0.9) == [[1, 2, 6], [0, 1]]
    assert kept(logits, top_k=3, top_p=0.45) == [[2], [0]]


def test_top_k_bfloat16_model() -> None:
    """Its logits have eight bits, so that many share the value at the threshold."""
    ours = CustomTransformerWrapper(
        vocab_size=4096, d_model=64, n_blocks=2, n_heads=4, dtype=torch.bfloat16, device="cpu"
    )
    ids = torch.randint(0, 4096, (1, 64), generator=torch.Generator().manual_seed(0))
    logits = ours.forward(ids)["logits"][0]
    threshold = logits.topk(50).values[:, -1:]
    assert ((logits >= threshold).sum(-1) > 50).any(), "no tie to be broken"
    assert {len(row) for row in kept(logits, top_k=50)} == {50}


def test_filters_equal_transformers() -> None:
    """The one difference from transformers: it keeps every token that ties with the k-th."""
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
    tied = (logits * 4).round()

    def theirs(warper, logits: Tensor) -> list[list[int]]:
        return [row.isfinite().nonzero()[:, 0].tolist() for row in warper(None, logits.clone())]

    for k in (1, 7, 50, 299):
        warper = warpers.TopKLogitsWarper(k)
        assert kept(logits, top_k=k) == theirs(warper, logits)
        for ours, all_ties in zip(kept(tied, top_k=k), theirs(warper, tied), strict=True):
            assert len(ours) == k and set(ours) <= set(all_ties)
    for p in (0.1, 0.5, 0.9):
        assert kept(logits, top_p=p) == theirs(warpers.TopPLogitsWarper(p), logits)


def tied_model(backend: str, dtype: torch.dtype) -> CustomTransformerWrapper:
    """Whatever it reads, its largest logit is that of tokens 5, 9 and 11: sums of small integers,
    which are exact in every dtype and order."""
    ours = CustomTransformerWrapper(
        vocab_size=16, d_model=8, n_blocks=1, n_heads=2, max_seq_len=8, dtype=dtype, device="cpu",
        backend=backend, tie_embeddings=False,
    )  # fmt: skip
    write = ours.model.parameters.write
    table = torch.randint(-1, 2, (16, 8), generator=torch.Generator().manual_seed(0)).float()
    table[[5, 9, 11]] = 1.0
    table[[0, 1, 2]] = 0.0
    write("output.weight", table)
    write("final_norm.weight", torch.zeros(8))
    write("final_norm.bias", torch.full((8,), 2.0))
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_ties_every_path(backend: str, dtype: torch.dtype) -> None:
    """Ties go to the lowest id on every path."""
    ours = tied_model(backend, dtype)
    prompts = [[3], [1, 2, 3, 4, 5], list(range(12))]  # the last is longer than the window
    for options in (
        {"temperature": 0},
        {"top_k": 1},
        {"top_p": 1e-6},
        {"temperature": 1e-3, "top_k": 7, "top_p": 0.3},
    ):
        for cache in (True, False):
            for seed in range(2):
                options |= {"use_cache": cache, "seed": seed, "max_length": 15}
                for prompt, row in zip(prompts, ours.generate(prompts, **options), strict=True):
                    assert row[len(prompt) :].tolist() == [5] * (15 - len(prompt))
                tensor = ours.generate(torch.tensor(prompts[1:2]), **options)
                assert set(tensor[0, 5:].tolist()) == {5}
                steps = list(ours.stream(prompts, **options))
                assert {token for step in steps for token in step} == {5, None}


# ---------------------------------------------------------------------------------- broken models


BROKEN = {
    "one NaN": [1.0, NAN, 0.0],
    "all NaN": [NAN, NAN, NAN],
    "+inf": [1.0, INF, 0.0],
    "all +inf": [INF, INF, INF],
    "NaN and +inf": [NAN, INF, 0.0],
    "all -inf": [-INF, -INF, -INF],
}
WAYS = [
    {"temperature": 0},
    {},
    {"temperature": 0.5, "top_k": 2},
    {"top_k": 1},
    {"top_p": 0.5},
    {"top_k": 2, "top_p": 0.5},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", BROKEN.values(), ids=BROKEN.keys())
def test_logits_broken(row, dtype) -> None:
    """Broken logits are refused in the same words in every way."""
    logits = torch.tensor([[1.0, 2.0, 3.0], row], dtype=dtype)
    said = set()
    for way in WAYS:
        with pytest.raises(ModelError) as refused:
            drawn(logits, **way)
        said.add(str(refused.value))
    [line] = said
    assert line.startswith("logits: expected finite numbers, got ") and " in row 1: " in line
    assert line.isprintable()


def test_logits_masked() -> None:
    logits = torch.tensor([[-INF, 1.0, -INF], [-INF, -INF, -3e38]])
    for way in WAYS:
        assert drawn(logits, **way).tolist() == [1, 2], way


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperature_any(dtype) -> None:
    """No accepted temperature breaks finite logits."""
    logits = torch.tensor([[3e38, -3e38, 1.0], [-5.0, 2.0, 1.5], [0.0, 1e-30, 0.0]], dtype=dtype)
    for temperature in (1e-37, 1e-30, 1e-9, 1.0, 100.0):
        drawn(logits, temperature=temperature)
    assert kept(logits, temperature=1e-37) == [[0], [1], [1]]
    assert kept(logits[1:2], temperature=100) == [[0, 1, 2]]


def break_weight(ours: CustomTransformerWrapper, value: float) -> None:
    """One weight, on the way of every token."""
    ours.model.parameters.write("final_norm.bias", torch.full((ours.config.d_model,), value))


@pytest.mark.promise("logits that are not finite")
@pytest.mark.parametrize("value", [NAN, INF, 3e38])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_generate_broken_model(backend: str, value: float) -> None:
    """It is refused when it generates."""
    ours = CustomTransformerWrapper(
        vocab_size=19, d_model=8, n_blocks=1, n_heads=2, max_seq_len=8, dtype=torch.float32,
        device="cpu", backend=backend, initializer_range=1.0,
    )  # fmt: skip
    ours.model.parameters.write("token_embedding.weight", torch.full((19, 8), 2.0))
    break_weight(ours, value)
    said = set()
    for way in WAYS:
        for cache in (True, False):
            for prompts in (torch.tensor([[1, 2]]), torch.tensor([1, 2]), [[1], list(range(11))]):
                with pytest.raises(ModelError) as refused:
                    ours.generate(prompts, max_length=14, use_cache=cache, **way)
                said.add(str(refused.value))
            steps = ours.stream([[1, 2]], use_cache=cache, **way)
            with pytest.raises(ModelError) as refused:
                next(steps)
            said.add(str(refused.value))
    [line] = said
    assert line.startswith("logits: expected finite numbers, got ")


def test_stream_breaking_midway(monkeypatch) -> None:
    """A model that breaks in the middle has given what it could."""
    ours = tied_model("native", torch.float32)
    steps = ours.stream([[1]], temperature=0)
    assert [next(steps), next(steps)] == [[5], [5]]
    break_weight(ours, NAN)
    with pytest.raises(ModelError):
        next(steps)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run of two steps, and its last checkpoint with a NaN weight as broken.pt."""
    config = small(tmp_path, tmp_path / "tokens", max_steps=2)
    Trainer(config, quiet=True).run()
    state = state_file.load(checkpoints(tmp_path) / "latest.pt")
    state["parameters"]["final_norm.bias"] = torch.full((16,), NAN)
    state_file.save(tmp_path / "broken.pt", state)
    return tmp_path


@pytest.mark.promise("logits that are not finite")
@pytest.mark.parametrize("temperature", ["0", "0.8"])
def test_commands_broken_checkpoint(trained: Path, temperature: str, capsys) -> None:
    """They end in one line."""
    checkpoint = ["--checkpoint", str(trained / "broken.pt")]
    commands = [
        ["generate", *checkpoint, "--prompt", "Once", "--temperature", temperature],
        ["evaluate", *checkpoint, "--generate", "--set", f"evaluation.temperature={temperature}"],
    ]
    for command in commands:
        assert main(command) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: logits: expected finite numbers, got nan in row 0: ")
    assert main(["evaluate", *checkpoint]) == 0
    assert "nan nats" in capsys.readouterr().out


@pytest.mark.promise("logits that are not finite")
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_train_without_samples(tmp_path: Path, temperature: float) -> None:
    """The weights are finite and are saved, but too large for any logit to be finite."""
    config = small(tmp_path, tmp_path / "tokens", max_steps=2)
    config.evaluation.temperature = temperature
    trainer = Trainer(config, quiet=True)
    messages: list[str] = []
    trainer.logger.message = messages.append
    save = trainer._save

    def overflow_and_save(**options) -> None:
        weights = dict(trainer.wrapper.model.named_parameters())
        weights["final_norm.bias"].fill_(3e38)
        weights["token_embedding.weight"].fill_(10.0)
        save(**options)

    trainer._save = overflow_and_save
    report = trainer.run()
    assert report is not None and "samples" not in report
    written = json.loads((tmp_path / "runs" / "small" / "report.json").read_text())
    assert written["run"]["step"] == 2 and "loss" in written
    [line] = [m for m in messages if "no samples" in m]
    assert line.startswith("warning: no samples: logits: expected finite numbers, got ")
    assert (checkpoints(tmp_path) / "latest.pt").exists()


def test_samples_and_stream_ties(tmp_path: Path) -> None:
    """The doors that a run and the command line use, with logits that are all 0."""
    config = small(tmp_path, tmp_path / "tokens", max_steps=2)
    trainer = Trainer(config, quiet=True)
    trainer.logger.close()
    ours, tokenizer = trainer.wrapper, trainer.tokenizer
    ours.model.parameters.write("final_norm.weight", torch.zeros(16))
    ours.model.parameters.write("final_norm.bias", torch.zeros(16))
    for temperature, top_k, top_p in ((0.0, 50, 1.0), (0.9, 1, 1.0), (0.9, None, 1e-6)):
        settings = config.evaluation
        settings.temperature, settings.top_k, settings.top_p = temperature, top_k, top_p
        [given] = prompt_tokens(tokenizer, config, ["Once"])
        expected = tokenizer.decode([0] * (settings.max_generation_length - len(given)))
        settings.generation_prompts = ["Once"]
        assert generate_samples(ours, tokenizer, config, 1)[0]["continuation"] == expected
        assert "".join(continue_text(ours, tokenizer, config, "Once")) == expected
