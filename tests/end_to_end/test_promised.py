"""What was promised and stays: every command, run as it is written, and the classes' interface.

Data sets and tokenizers that can only come from a hub are replaced by local ones with `--set`, and
runs are kept tiny the same way; the rest of a line stays as it is.
"""

from __future__ import annotations

import inspect
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from mantrans import CustomTransformer, CustomTransformerWrapper
from mantrans.config import DATASETS, SECTIONS
from mantrans.data.tokenizer import known_names
from tests import test_loss_decreases
from tests.support.processes import Ended, Processes

ROOT = Path(__file__).parents[2]
PARTS = ("assets", "configs", "kernels", "mantrans", "tests", "pyproject.toml", "train.py")
PARTS += ("evaluate.py", "config_summary.py")

TEXT = ["data.dataset=local", "data.path=tests/golden/stories.txt", "data.validation_fraction=0.2"]
TEXT += ["data.max_length=32", "training.device=cpu", "evaluation.max_generation_length=32"]
BYTES = ["data.tokenizer=tests/golden/tokenizer"]  # where the config wants gpt2
STEPS = ["training.max_steps=2", "training.batch_size=2", "training.eval_batches=2"]
STEPS += ["model.d_model=32", "model.n_heads=2", "model.max_seq_len=32"]


class Promise(NamedTuple):
    """A command, the settings added to it, what it says and what it does not say."""

    line: str
    settings: list[str]
    says: str
    never: str = "Traceback"


COMMANDS = [  # in an order in which each finds what it needs
    Promise("python config_summary.py configs/tinystories.yaml", [], "15,040,256"),
    Promise(
        'python -m pytest tests/test_loss_decreases.py -v -s --override-ini="addopts="',
        [], " passed", " failed",
    ),
    Promise("python tests/forward_test.py", [], "blocks.2.mlp.down.bias"),
    Promise(
        "python train.py --config configs/tinystories_custom_tokenizer.yaml",
        [*TEXT, *STEPS], "bits per byte",
    ),
    Promise(
        "python train.py --config configs/tiny-textbooks-small.yaml",
        [*TEXT, *BYTES, *STEPS], "bits per byte",
    ),
    Promise(
        "python train.py --config configs/tinystories.yaml --no-coherence-eval",
        [*TEXT, *BYTES, *STEPS, "evaluation.evaluate_coherence=true"],
        "bits per byte", "coherence not scored",
    ),
    Promise(
        "python train.py --config configs/tinystories.yaml",
        [*TEXT, *BYTES, *STEPS, "evaluation.evaluate_coherence=true"], "coherence not scored",
    ),
    Promise(
        "python train.py --config configs/tinystories.yaml --resume checkpoints/latest.pt",
        [*TEXT, *BYTES, *STEPS, "training.max_steps=3"],
        "resumed from checkpoints/latest.pt at step 2",
    ),
    Promise(
        "python evaluate.py --checkpoint checkpoints/best.pt --config configs/tinystories.yaml",
        [*TEXT, *BYTES], "perplexity", "distinct",
    ),
    Promise(
        "python evaluate.py --checkpoint checkpoints/best.pt --config configs/tinystories.yaml"
        " --generate",
        [*TEXT, *BYTES], "[Once upon a time]",
    ),
    Promise(
        "python evaluate.py --checkpoint checkpoints/best.pt --config configs/tinystories.yaml"
        " --max-batches 50",
        [*TEXT, *BYTES, "evaluation.batch_size=1"], "1,600 tokens",
    ),
]  # fmt: skip


def run(arguments: list[str], folder: Path) -> Ended:
    """`python ...` in the folder, as a process of its own."""
    environment = {name: v for name, v in os.environ.items() if not name.startswith("ANTHROPIC")}
    environment |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # none of them is promised
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return Ended(done.returncode, done.stdout)


@pytest.mark.parametrize("forked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_commands_as_written(tmp_path: Path, processes: Processes, forked: bool) -> None:
    """forked: only the first lines of train.py, evaluate.py and pytest start an interpreter; the
    others run the script in a process that has imported PyTorch already."""
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tmp_path / part)
    seen = {"config_summary.py", "tests/forward_test.py"}
    for promise in COMMANDS:
        python, *arguments = shlex.split(promise.line)
        assert python == "python"
        for setting in promise.settings:
            arguments += ["--set", setting]
        script = arguments[0]
        if forked and script in seen:
            environment = {name: "" for name in os.environ if name.startswith("ANTHROPIC")}
            ended = processes.run(
                *arguments[1:], main=script, cwd=tmp_path, environment=environment
            )
        else:
            ended = run(arguments, tmp_path)
        seen.add(script)
        assert ended.status == 0, f"{promise.line}\n{ended.text}"
        assert promise.says in ended.text, f"{promise.line}\n{ended.text}"
        assert promise.never not in ended.text, f"{promise.line}\n{ended.text}"


def test_functional_tests_ten() -> None:
    assert sum(name.startswith("test_") for name in vars(test_loss_decreases)) == 10


@pytest.fixture
def wrapper() -> CustomTransformerWrapper:
    return CustomTransformerWrapper(
        vocab_size=4096, d_model=256, n_blocks=4, n_heads=4, d_ffn=512, max_seq_len=256,
        dtype=torch.bfloat16,
    )  # fmt: skip


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(0, 4096, (2, 16), generator=torch.Generator().manual_seed(0))


def defaults(function: object, *names: str) -> list[object]:
    parameters = inspect.signature(function).parameters  # type: ignore[arg-type]
    return [parameters[name].default for name in names]


def test_wrapper_arguments(wrapper: CustomTransformerWrapper) -> None:
    """dtype may be left out; what it is then (bfloat16 was promised) is another issue's matter."""
    shape = defaults(CustomTransformerWrapper, "d_model", "n_blocks", "n_heads", "max_seq_len")
    assert shape == [256, 4, 4, 256]
    assert defaults(CustomTransformerWrapper, "dtype") != [inspect.Parameter.empty]
    assert wrapper.config.d_ffn == 512 and wrapper.dtype == torch.bfloat16
    assert isinstance(wrapper.model, CustomTransformer)


def test_transformer_trained_by_hand() -> None:
    wrapper = CustomTransformerWrapper(vocab_size=50, d_model=16, n_heads=2, dtype=torch.float32)
    model, tokens = wrapper.model, torch.arange(24).reshape(2, 12)
    logits = model.forward(tokens)
    assert logits.shape == (2, 12, 50)
    model.backward(torch.ones_like(logits) * torch.linspace(-1, 1, 50))
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.update_parameters(0.5)
    for (name, after), (_, gradient) in zip(
        model.named_parameters(), model.named_gradients(), strict=True
    ):
        torch.testing.assert_close(after, before[name] - 0.5 * gradient)
        assert gradient.any(), name


def test_wrapper_forward_and_train_step(
    wrapper: CustomTransformerWrapper, input_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = input_ids
    assert abs(wrapper.forward(input_ids, labels=labels)["loss"].item() - math.log(4096)) < 0.5
    step = wrapper.train_step
    assert defaults(step, "learning_rate") == [0.001]
    result = step(input_ids, labels, learning_rate=0.001, max_grad_norm=1.0)
    assert {key: type(value) for key, value in result.items()} == {
        "loss": float, "status": str, "grad_norm": float,
    }  # fmt: skip
    assert result["status"] == "ok"

    forward_backward = wrapper.model.forward_backward

    def poisoned(*arguments: Any, **options: Any) -> torch.Tensor:
        loss = forward_backward(*arguments, **options)
        wrapper.model.parameters.gradients[3] = math.nan
        return loss

    monkeypatch.setattr(wrapper.model, "forward_backward", poisoned)
    assert step(input_ids, labels)["status"] == "nan_gradient"
    wrapper.model.parameters.weights.fill_(math.nan)
    assert step(input_ids, labels)["status"] == "nan_detected"


def test_max_grad_norm_default() -> None:
    """The promised default of max_grad_norm; one that the optimizer was given stands."""

    def trained(options: dict[str, Any], **arguments: Any) -> torch.Tensor:
        model = CustomTransformerWrapper(
            50, 16, 1, 2, 32, 8, dtype=torch.float32, optimizer_options=options
        )
        ids = torch.full((2, 8), 7)
        assert model.train_step(ids, ids, 1.0, **arguments)["grad_norm"] > 1
        return model.model.parameters.weights

    promised, unclipped = trained({}, max_grad_norm=1.0), trained({}, max_grad_norm=None)
    assert torch.equal(trained({}), promised) and not torch.equal(unclipped, promised)
    assert torch.equal(trained({"max_grad_norm": None}), unclipped)
    assert torch.equal(trained({"max_grad_norm": 0.1}), trained({}, max_grad_norm=0.1))


def test_wrapper_generate_and_checkpoints(
    wrapper: CustomTransformerWrapper,
    input_ids: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert defaults(wrapper.generate, "max_length") == [100]
    tokens = wrapper.generate(input_ids, max_length=100, temperature=0.8, top_k=50)
    assert tokens.shape == (2, 100)
    monkeypatch.chdir(tmp_path)
    wrapper.save_checkpoint("checkpoint.pt", epoch=5, train_loss=1.23)
    assert wrapper.load_checkpoint("checkpoint.pt") == {"epoch": 5, "train_loss": 1.23}
    other = CustomTransformerWrapper.from_checkpoint("checkpoint.pt")
    assert torch.equal(other.forward(input_ids)["logits"], wrapper.forward(input_ids)["logits"])


FIELDS = {
    "model": "d_model n_blocks n_heads d_ffn max_seq_len",
    "data": "dataset tokenizer max_length subset_size val_subset_size",
    "training": "batch_size learning_rate num_epochs max_grad_norm log_every eval_every",
    "evaluation": "generation_prompts max_generation_length temperature top_k evaluate_coherence",
}


def test_config_fields_data_sets_and_tokenizers() -> None:
    for section, names in FIELDS.items():
        assert set(names.split()) <= set(SECTIONS[section].__annotations__)
    promised = {"tinystories", "tiny-textbooks", "tiny-strange-textbooks", "tiny-codes"}
    assert promised <= set(DATASETS)
    assert "tinystories_bpe_4096" in known_names()
