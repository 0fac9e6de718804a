"""Multiple-choice questions, beside a plain computation and beside lm_eval."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from mantrans import CustomTransformerWrapper
from mantrans.checkpoint import state_file
from mantrans.cli import main
from mantrans.data.tokenizer import Tokenizer, load_tokenizer
from mantrans.errors import DataError, ModelError
from mantrans.evaluation.choices import Question, measure_choices, read_questions
from mantrans.kernels.reference import IGNORE_INDEX
from mantrans.training import saving
from mantrans.training.trainer import Trainer
from tests.support.runs import small

STORIES = Path(__file__).parents[2] / "data/lm_eval/stories.jsonl"
RULES = ("acc", "acc_norm", "acc_bytes", "acc_tokens")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("tinystories_bpe_4096")


@pytest.fixture(scope="module")
def wrapper() -> CustomTransformerWrapper:
    """Untrained, but with opinions: large weights."""
    return CustomTransformerWrapper(
        4096, d_model=32, n_blocks=2, n_heads=2, max_seq_len=96, dtype=torch.float64, device="cpu",
        initializer_range=0.2, seed=1,
    )  # fmt: skip


class Recorded(NamedTuple):
    """A model of another's losses, which remembers what it was asked."""

    model: Any
    asked: list[tuple[Tensor, Tensor]]

    def losses(self, tokens: Tensor, targets: Tensor, document_start: Tensor | None = None):
        self.asked.append((tokens, targets))
        return self.model.losses(tokens, targets, document_start)


def measure(
    model: Any, tokenizer: Tokenizer, questions: list[Question], batch_size: int, length: int = 96
) -> dict[str, float]:
    return measure_choices(
        model, tokenizer, questions, max_length=length, batch_size=batch_size
    )  # fmt: skip


@pytest.mark.slow
def test_choices_equal_transformers(
    wrapper: CustomTransformerWrapper, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """One ending after the other, by transformers in float64: the same answers, with any batch."""
    transformers = pytest.importorskip("transformers")
    wrapper.save_pretrained(str(tmp_path / "model"))
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float64
    )
    questions = read_questions(STORIES)
    hits = {rule: 0 for rule in RULES}
    for question in questions:
        costs = []
        context = tokenizer.encode(question.context)
        for ending in question.endings:
            ids = tokenizer.encode(f"{question.context} {ending}")
            with torch.no_grad():
                log_p = oracle(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
            n = len(ids) - len(context)
            loss = -sum(log_p[t, ids[t + 1]].item() for t in range(len(ids) - 1 - n, len(ids) - 1))
            costs.append([loss, loss / len(ending), loss / len(ending.encode()), loss / n])
        for rule, column in zip(RULES, np.array(costs).T, strict=True):
            hits[rule] += int(column.argmin()) == question.label
    found = [measure(wrapper.model, tokenizer, questions, size) for size in (1, 7, 1000)]
    n = len(questions)
    assert found[0] == found[1] == found[2]
    assert {rule: found[0][rule] for rule in RULES} == {r: hits[r] / n for r in RULES}
    assert len(set(hits.values())) > 2, f"the rules differ, or they are not tested: {hits}"
    acc = found[0]["acc"]
    assert found[0]["acc_stderr"] == pytest.approx(math.sqrt(acc * (1 - acc) / (n - 1)))
    assert found[0]["questions"] == n
    assert found[0]["chance"] == pytest.approx(np.mean([1 / len(q.endings) for q in questions]))


def test_choices_losses_any_batch(wrapper: CustomTransformerWrapper, tokenizer: Tokenizer) -> None:
    """Every ending's loss is that of the ending alone, in ragged batches, each tokens once."""
    questions = read_questions(STORIES)[:6]
    alone: dict[tuple[int, ...], float] = {}
    for question in questions:
        context = tokenizer.encode(question.context)
        for ending in question.endings:
            ids = tokenizer.encode(f"{question.context} {ending}")
            x, y = torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])
            y[0, : len(context) - 1] = IGNORE_INDEX
            alone[tuple(ids[:-1])] = wrapper.model.losses(x, y).sum().item()
    for size in (1, 4, 100):
        model = Recorded(wrapper.model, [])
        measure(model, tokenizer, questions, size)
        seen = {}
        for tokens, targets in model.asked:
            assert len(tokens) <= size
            losses = wrapper.model.losses(tokens, targets).view(tokens.shape).sum(1)
            for row, loss in zip(tokens.tolist(), losses.tolist(), strict=True):
                seen[next(k for k in alone if row[: len(k)] == list(k) and not any(
                    t != tokenizer.eot_id for t in row[len(k):]))] = loss  # fmt: skip
        assert seen == pytest.approx(alone, rel=1e-12)


def test_choices_same_ending_twice(tokenizer: Tokenizer) -> None:
    """Of equals the first is taken, whatever a batch's rounding is: they are computed once."""

    class Noisy:
        def losses(self, tokens: Tensor, targets: Tensor, document_start: Tensor | None = None):
            return torch.rand(targets.numel(), dtype=torch.float64) * (targets.flatten() >= 0)

    questions = [Question("A dog", ["ran."] * 3, label % 3, "") for label in range(30)]
    assert measure(Noisy(), tokenizer, questions, 2)["acc"] == 1 / 3


def test_choices_long_context(wrapper: CustomTransformerWrapper, tokenizer: Tokenizer) -> None:
    """Of what is too long the last tokens are read; an ending that is too long is refused."""
    [question] = [Question("the dog " * 60 + "ran", ["to the cat", "home"], 0, "here")]
    model = Recorded(wrapper.model, [])
    measure(model, tokenizer, [question], 2, 48)
    ((x, y),) = model.asked
    ids = tokenizer.encode(question.context + " to the cat")
    counted = len(ids) - len(tokenizer.encode(question.context))
    rows = [i for i in range(2) if x[i].tolist() == ids[-49:-1]]
    assert x.shape == (2, 48) and len(rows) == 1
    assert y[rows[0]].tolist() == [IGNORE_INDEX] * (48 - counted) + ids[-counted:]
    long = Question("a", ["b", "the dog " * 60], 0, "FILE: line 3")
    with pytest.raises(
        DataError, match=r"^FILE: line 3: endings\[1\]: expected 1 to 48 tokens after"
    ):
        measure(wrapper.model, tokenizer, [long], 2, 48)


def test_choices_not_finite(tokenizer: Tokenizer) -> None:
    class Broken:
        def losses(self, tokens: Tensor, targets: Tensor, document_start: Tensor | None = None):
            return torch.full((targets.numel(),), math.nan)

    with pytest.raises(ModelError, match=r"stories\.jsonl: line 1: expected finite losses, got"):
        measure(Broken(), tokenizer, read_questions(STORIES), 8)


def test_choices_no_token_of_its_own() -> None:
    """As with a tokenizer whose tokens reach over spaces."""
    joining = SimpleNamespace(encode_batch=lambda texts: [[7] for _ in texts], eot_id=0)
    question = Question("a", ["b", "c"], 0, "FILE: line 3")
    with pytest.raises(DataError, match=r"^FILE: line 3: endings\[0\]: expected 1 to 96 .* got 0$"):
        measure(None, joining, [question], 8)


def test_choices_none(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"^questions: expected at least 1, got 0"):
        measure(None, tokenizer, [], 8)


GOOD = {"ctx": "A dog", "endings": ["ran.", "sat."], "label": 1, "ind": 24, "source_id": "x"}


def test_read_questions_forms(tmp_path: Path) -> None:
    """HellaSwag's own file, and that on the hub; blank lines, a byte order mark, gzip's rest."""
    halves = {"ctx_a": "A dog", "ctx_b": "it", "endings": ["ran.", "sat."], "label": "0"}
    path = tmp_path / "q.jsonl"
    lines = ["\ufeff" + json.dumps(GOOD), "", json.dumps(halves, ensure_ascii=False), " "]
    path.write_text("\r\n".join(lines), encoding="utf-8")
    first, second = read_questions(path)
    assert first == Question("A dog", ["ran.", "sat."], 1, f"{path}: line 1")
    assert second == Question("A dog it", ["ran.", "sat."], 0, f"{path}: line 3")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[1]", "expected a JSON object, got [1]"),
        ('{"ctx": "A', "expected a JSON object"),
        ({"ctx": 3}, "ctx: expected a text, got 3"),
        ({"ctx": " "}, "ctx: expected a text"),
        ({"ctx": None}, "ctx: expected a text, got null"),
        ({"ctx": "\ud800"}, "ctx: expected Unicode, got half of a surrogate pair"),
        ({"endings": "ran."}, "endings: expected a list of at least 2, got ran."),
        ({"endings": ["ran."]}, "endings: expected a list of at least 2"),
        ({"endings": ["ran.", ""]}, "endings[1]: expected a text, got ''"),
        ({"endings": ["ran.", ["a"]]}, "endings[1]: expected a text, got a list"),
        ({"label": 2}, "label: expected 0 to 1, got 2"),
        ({"label": -1}, "label: expected 0 to 1, got -1"),
        ({"label": True}, "label: expected 0 to 1, got true"),
        ({"label": "x"}, "label: expected 0 to 1, got x (text)"),
        ({"label": "9" * 5000}, "label: expected 0 to 1, got 999"),
        ({"label": 10**400}, "label: expected 0 to 1, got a 1329-bit integer"),
        ("x" * 2**21, "expected at most 1,048,576 bytes, got more"),
    ],
)
def test_read_questions_mistakes(tmp_path: Path, line: Any, words: str) -> None:
    path = tmp_path / "q.jsonl"
    text = line if isinstance(line, str) else json.dumps({**GOOD, **line})
    path.write_text(f"{json.dumps(GOOD)}\n\n{text}\n")
    with pytest.raises(DataError) as refusal:
        read_questions(path)
    assert str(refusal.value).startswith(f"{path}: line 3: {words}")
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400


def test_read_questions_no_file(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    for path, words in (
        (tmp_path / "none.jsonl", "expected a .jsonl file of questions, got no such file"),
        (tmp_path, "expected a .jsonl file of questions, got a folder"),
        (tmp_path / "empty.jsonl", "expected at least 1 question, got 0"),
    ):
        with pytest.raises(DataError) as refusal:
            read_questions(path)
        assert str(refusal.value) == f"{path}: {words}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """That of a run, with a tokenizer that is shipped."""
    folder = tmp_path_factory.mktemp("choices")
    config = small(
        folder, folder / "tokens",
        model={"max_seq_len": 64, "d_model": 32, "dtype": "float32", "initializer_range": 0.2},
        data={"tokenizer": "tinystories_bpe_4096"},
    )  # fmt: skip
    trainer = Trainer(config, quiet=True)
    state_file.save(folder / "best.pt", saving.state(trainer))
    trainer.logger.close()
    trainer.folders.close()
    shutil.rmtree(folder / "tokens")  # questions need no data
    yield folder / "best.pt"


def answers(checkpoint: Path, *arguments: str) -> dict[str, Any]:
    report = checkpoint.parent / "report.json"
    assert main(["evaluate", "--checkpoint", str(checkpoint), "--choices", str(STORIES),
                 "--json", str(report), *arguments]) == 0  # fmt: skip
    return json.loads(report.read_text())


def test_evaluate_choices(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = answers(checkpoint)
    printed = capsys.readouterr().out
    found = report["choices"]
    assert found["file"] == str(STORIES) and found["questions"] == 48 and "loss" not in report
    for rule in RULES:
        assert f"{rule:<22}{found[rule]:.4f} ± {found[f'{rule}_stderr']:.4f}" in printed
    assert "48; by chance 0.2792" in printed
    text = checkpoint.parent / "text.txt"
    text.write_text("A dog ran to the park.")
    both = answers(checkpoint, "--text", str(text), "--set", "evaluation.batch_size=3")
    assert both["choices"] == found and both["tokens"] > 3
    print(capsys.readouterr().err)
    assert main(["evaluate", "--checkpoint", str(checkpoint), "--choices", "none.jsonl"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == "error: none.jsonl: expected a .jsonl file of questions, got no such file"


@pytest.mark.slow
def test_choices_equal_lm_eval(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`lm_eval --model hf` on the exported folder: the same accuracies, and the same errors."""
    pytest.importorskip("lm_eval")
    for name, value in (("HF_HUB_OFFLINE", "1"), ("HF_HOME", str(tmp_path / "home"))):
        monkeypatch.setenv(name, value)
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    ours = answers(checkpoint)["choices"]
    folder = str(tmp_path / "exported")
    assert main(["export", "--checkpoint", str(checkpoint), "--output", folder]) == 0
    monkeypatch.chdir(STORIES.parent)
    theirs = simple_evaluate(
        model="hf",
        model_args={"pretrained": folder, "dtype": "float32", "device": "cpu"},
        tasks=["stories"],
        task_manager=TaskManager(include_path=str(STORIES.parent), include_defaults=False),
        bootstrap_iters=0,
        batch_size=4,
    )["results"]["stories"]
    for rule in RULES[:3]:
        assert theirs[f"{rule},none"] == ours[rule], rule
    assert len({ours[rule] for rule in RULES}) > 1
