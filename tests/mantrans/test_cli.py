"""The command line: mistakes and accidents end in one line, generate writes text."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mantrans.wrapper
from mantrans import CustomTransformer
from mantrans.cli import main
from mantrans.config import Config
from mantrans.evaluation.evaluator import generate_samples, printable
from mantrans.inference.text import continue_text
from mantrans.inference.trained import load_model, load_trained
from mantrans.runtime import OUT_OF_MEMORY
from tests.support.runs import NAME, finish, small

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of some steps: config.yaml, best.pt and runs/small."""
    folder = tmp_path_factory.mktemp("run")
    config = small(folder, folder / "tokens", max_steps=6)
    finish(config)
    config.save(folder / "config.yaml")
    (folder / "checkpoints" / NAME / "best.pt").rename(folder / "best.pt")
    return folder


def filled(arguments: str, run: Path) -> list[str]:
    return [word.replace("RUN", str(run)) for word in arguments.split()]


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


# --------------------------------------------------------------------------------------- commands


def test_main_installed_and_module() -> None:
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [(name, value)] = project["scripts"].items()
    assert name == "mantrans"
    assert importlib.metadata.EntryPoint(name, value, "console_scripts").load() is main
    command = [sys.executable, "-m", "mantrans", "trian"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "trian" in done.stderr and "Traceback" not in done.stderr


# --------------------------------------------------------------------------- mistakes, accidents

MISTAKES = {
    "": "command",
    "trian": "trian",
    "train --config": "--config: expected one argument",
    "train --confg c.yaml": "--confg",
    "train --profile many": "--profile",
    "train --config absent.yaml": "absent.yaml",
    "train --config RUN/config.yaml --set training.learning_rat=1": "training.learning_rate",
    "train --config RUN/config.yaml --resume nothing.pt": "nothing.pt",
    "evaluate": "--checkpoint",
    "evaluate --checkpoint nothing.pt": "nothing.pt",
    "evaluate --checkpoint RUN/best.pt --max-batches 0": "from 1 to 1000000000000, got '0'",
    "summary": "config",
    "summary RUN/config.yaml --set model.d_model=7": "7",
    "tokenizer": "train",
    "tokenizer train --output RUN --vocab-size -3": "from 257 to 16777216, got '-3'",
    "tokenizer encode --tokenizer nowhere a": "nowhere",
    "prepare --config absent.yaml": "absent.yaml",
    "prepare --format xml": "choose from",
    "prepare --format llmc": "--format: expected --output beside it, got none",
    "prepare --output RUN/new": "--output: expected --format beside it, got none",
    "prepare --config RUN/config.yaml --format llmc --output RUN/best.pt": "best.pt: File exists",
    "generate --checkpoint RUN/best.pt": "--prompt",
    "generate --checkpoint RUN/best.pt --prompt a --top-k 0": "from 1 to 16777216, got '0'",
    "generate --checkpoint RUN/best.pt --prompt a --temperature -1": "evaluation.temperature",
    "generate --checkpoint RUN/best.pt --prompt a --seed 99999999999999999999": "--seed",
    "generate --checkpoint RUN/best.pt --prompt abcdef --max-length 5": "the 7 tokens of the",
    "generate --checkpoint RUN/config.yaml --prompt a": "config.yaml",
    "generate --checkpoint RUN/best.pt --prompt a --file b": "not allowed with",
    "generate --checkpoint RUN/best.pt --file nothing.txt": "nothing.txt: No such file",
    "generate --checkpoint RUN/best.pt --file RUN": "Is a directory",
    "generate --checkpoint RUN/best.pt --file RUN/best.pt": "--file: expected text in UTF-8, got",
    "generate --checkpoint RUN/best.pt --file /dev/zero": "--file: expected at most 16,777,216",
    "generate --checkpoint RUN/best.pt --prompt a --min-p 0": "evaluation.min_p: expected",
    "generate --checkpoint RUN/best.pt --prompt a --repetition-penalty 0": "repetition_penalty",
    "chat": "--checkpoint",
    "chat --checkpoint RUN/best.pt --top-p 2": "command line: evaluation.top_p: expected",
    "chat --checkpoint RUN/best.pt --format xml": "choose from",
    "chat --checkpoint RUN/best.pt --format chatml": "the tokenizer has no <|im_end|>, got chatml",
    "report nowhere": "nowhere",
    "report": "run",
    "report RUN --compare": "--compare: expected at least one argument",
    "verify RUN": "--from, --steps",
    "verify nowhere --from 1 --steps 1": "RUN: expected latest, a checkpoint",
    "convert RUN/best.pt": "new",
    "convert RUN/config.yaml RUN/new.pt": "config.yaml",
}


@pytest.mark.parametrize(("arguments", "words"), MISTAKES.items())
def test_main_mistake(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: str, words: str
) -> None:
    assert main(filled(arguments, run)) == 2
    assert words in error_line(capsys)


WORKING = {
    "train": "train --config RUN/config.yaml --no-coherence-eval",
    "evaluate": "evaluate --checkpoint RUN/best.pt --max-batches 1 --json RUN/report.json",
    "generate": "generate --checkpoint RUN/best.pt --prompt Once --device cpu",
}


@pytest.mark.parametrize("arguments", WORKING.values(), ids=WORKING)
def test_main_memory_full(
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
) -> None:
    """One line, which does not blame the checkpoint."""

    def too_large(*_: object, **__: object) -> torch.Tensor:
        return torch.empty(2**50, dtype=torch.uint8)  # more than any address space

    monkeypatch.setattr(mantrans.wrapper, "CustomTransformer", too_large)
    assert main(filled(arguments, run)) == 2
    assert error_line(capsys) == f"error: {OUT_OF_MEMORY}"


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_main_inference_no_gradients(
    run: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """A model that is only read has no gradients."""
    built = []

    def watched(*arguments: object, **options: object) -> CustomTransformer:
        built.append(CustomTransformer(*arguments, **options))  # type: ignore[arg-type]
        return built[-1]

    monkeypatch.setattr(mantrans.wrapper, "CustomTransformer", watched)
    assert main(filled(WORKING[command], run)) == 0
    [model] = built
    assert model.parameters.master is None and not hasattr(model.parameters, "gradients")


@pytest.mark.parametrize(
    ("raised", "status"), [(KeyboardInterrupt(), 130), (MemoryError(), 2), (BrokenPipeError(), 141)]
)
def test_main_exit_status(
    run: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, status: int
) -> None:
    """Each kind of accident has its own."""

    def accident(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("mantrans.training.summary.summary", accident)
    with open(os.devnull, "w") as nowhere:
        monkeypatch.setattr(sys, "stdout", nowhere)
        assert main(filled("summary RUN/config.yaml", run)) == status


def test_main_system_refusal(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal of the system names the file."""
    monkeypatch.setattr("mantrans.training.summary.summary", lambda *_: os.listdir("/nowhere"))
    assert main(filled("summary RUN/config.yaml", run)) == 2
    assert error_line(capsys) == "error: /nowhere: No such file or directory"
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["report", str(run / "runs" / NAME)]) == 2
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    assert error_line(capsys) == "error: No space left on device"


def test_main_bug(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug keeps its traceback."""
    monkeypatch.setattr(
        "mantrans.training.summary.summary", lambda *_: torch.ones(2) @ torch.ones(3)
    )
    with pytest.raises(RuntimeError, match="size"):
        main(filled("summary RUN/config.yaml", run))


READERS = [WORKING["evaluate"], WORKING["generate"], "summary RUN/config.yaml"]
READERS += [f"report RUN/runs/{NAME}"]


@pytest.mark.parametrize("arguments", READERS, ids=lambda arguments: arguments.split()[0])
def test_main_reader_gone(
    run: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
) -> None:
    """It ends quietly."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(filled(arguments, run)) == 141
        print("what is still to be written goes nowhere")
    said = capfd.readouterr().err
    assert "error" not in said and "Traceback" not in said
    if "--json" in arguments:
        assert (run / "report.json").stat().st_size > 0


# -------------------------------------------------------------------------------------- generate


CHOSEN = {"temperature": 1.5, "top_k": 40, "max_generation_length": 30}


@pytest.mark.parametrize(
    ("options", "sampling", "seed"),
    [("", {}, 0), ("--temperature 1.5 --top-k 40 --max-length 30 --seed 7", CHOSEN, 7)],
    ids=["the checkpoint's", "chosen"],
)
def test_generate_equals_samples(
    run: Path, capsys: pytest.CaptureFixture[str], options: str, sampling: dict, seed: int
) -> None:
    """Generate writes what evaluation samples."""
    config = Config.load(run / "config.yaml")
    config.training.seed = seed
    for name, value in {"generation_prompts": ["Once upon"], **sampling}.items():
        setattr(config.evaluation, name, value)
    state = load_trained(run / "best.pt")
    [sample] = generate_samples(*load_model(run / "best.pt", state, config), config, 1)
    assert sample["continuation"]
    checkpoint = ["generate", "--checkpoint", str(run / "best.pt")]
    assert main([*checkpoint, "--prompt", "Once upon", *options.split()]) == 0
    assert capsys.readouterr().out == printable("Once upon" + sample["continuation"]) + "\n"


def test_generate_empty_prompt(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty prompt begins a document."""
    assert main(["generate", "--checkpoint", str(run / "best.pt"), "--prompt", ""]) == 0
    assert len(capsys.readouterr().out) > 1


def test_generate_streams(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text comes while it is made."""
    config = Config.load(run / "config.yaml")
    wrapper, tokenizer = load_model(
        run / "best.pt", load_trained(run / "best.pt"), config, device="cpu"
    )
    drawn: list[int] = []
    stream = wrapper.stream

    def counted(*arguments: object, **options: object) -> Iterator[list[int | None]]:
        for step in stream(*arguments, **options):  # type: ignore[arg-type]
            drawn.append(1)
            yield step

    monkeypatch.setattr(wrapper, "stream", counted)
    pieces = iter(continue_text(wrapper, tokenizer, config, "Once"))
    monkeypatch.setattr(type(tokenizer), "decode", lambda _, ids: "x" * len(ids))
    assert next(pieces) == "x" and len(drawn) == 1
    assert len(list(pieces)) >= len(drawn) - 1 > 1
