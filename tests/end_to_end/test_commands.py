"""Commands: a number out of range, a closed input, an output that lacks characters."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mantrans.cli import main
from mantrans.data.tokenizer_tool import train as train_tokenizer
from mantrans.errors import DataError
from mantrans.training.profile import WARM_UP_STEPS, StepProfiler
from tests.mantrans.training.test_profile import run_steps
from tests.support.runs import NAME, finish, small

BPE = "tinystories_bpe_4096"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of some steps whose names and texts are not ASCII."""
    folder = tmp_path_factory.mktemp("漢字")
    config = small(folder, folder / "tokens", max_steps=6)
    config.evaluation.generation_prompts = ["é 漢 \N{RIGHTWARDS ARROW}"]
    finish(config)
    config.save(folder / "config.yaml")
    (folder / "text é.txt").write_text("É 漢字 \N{RIGHTWARDS ARROW} \n" * 300, encoding="utf-8")
    return folder


# ------------------------------------------------------------------------------ numbers

INTEGERS = {
    "train --profile": (0, 1000),
    "evaluate --checkpoint none.pt --max-batches": (1, 10**12),
    "summary configs/quickstart.yaml --tokens": (1, 10**12),
    "summary configs/quickstart.yaml --ranks": (1, 10**6),
    "explain --checkpoint none.pt --text a --max-tokens": (2, 2**20),
    "generate --checkpoint none.pt --prompt a --max-length": (1, 2**20),
    "generate --checkpoint none.pt --prompt a --top-k": (1, 2**24),
    "generate --checkpoint none.pt --prompt a --seed": (0, 2**63 - 1),
    "generate --checkpoint none.pt --prompt a --count": (1, 10**6),
    "chat --checkpoint none.pt --max-tokens": (1, 2**20),
    "prepare --config none.yaml --processes": (1, 4096),
    "verify none --steps 1 --from": (1, 10**12),
    "verify none --from 1 --steps": (1, 10**12),
    "tokenizer train --output none --input none.txt --vocab-size": (257, 2**24),
    "tokenizer train --output none --dataset builtin-stories --limit": (1, 10**12),
}


@pytest.mark.promise("wrong arguments")
@pytest.mark.parametrize(("command", "limits"), INTEGERS.items())
def test_command_integer_out_of_range(capsys, command: str, limits: tuple) -> None:
    low, high = limits
    wrong = [low - 1, high + 1, -5, -1, -(2**63), 2**64, 10**19, 10**40, "9" * 5000]
    for text in [*map(str, wrong), "1.5", "nan", "inf", "1e3", "0x10", "", " ", "x", "١", "--"]:
        if text == "-1" and low < 0:
            continue
        assert main([*command.split(), text]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and command.split()[-1] in line and len(line) < 300


def test_command_integers_all_tried() -> None:
    root = Path(__file__).parents[2] / "mantrans"
    source = (root / "cli.py").read_text() + (root / "data/tokenizer_tool.py").read_text()
    assert "type=int" not in source.replace("type=integer(", "")
    assert source.count("type=integer(") == len(INTEGERS)


@pytest.mark.promise("wrong arguments")
@pytest.mark.parametrize("option", ["--hold-out", "--held-out"])
@pytest.mark.parametrize("text", ["1", "-0.1", "nan", "inf", "x", "", "1e400", "-1e-400x"])
def test_command_share_out_of_range(capsys, option: str, text: str) -> None:
    command = "train --output none" if option == "--hold-out" else f"analyze --tokenizer {BPE}"
    assert main(["tokenizer", *command.split(), f"{option}={text}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert option in line


@pytest.mark.parametrize("size", [-1, 0, 256, 2**24 + 1, 2**63, 2**64, 2**70])
def test_tokenizer_train_vocab_size_impossible(tmp_path, size: int) -> None:
    with pytest.raises(DataError, match=rf"--vocab-size: expected 257 to \d+, got {size}$"):
        train_tokenizer(iter(()), size, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------ input and output

TEXTS = {
    "encode": ["tokenizer", "encode", "--tokenizer", BPE, "é → 漢"],
    "analyze": ["tokenizer", "analyze", "--tokenizer", BPE, "--input", "RUN/text é.txt"],
    "analyze as JSON": ["tokenizer", "analyze", "--tokenizer", BPE, "--input", "RUN/text é.txt",
                        "--json"],
    "train a tokenizer": ["tokenizer", "train", "--output", "RUN/é", "--input", "RUN/text é.txt",
                          "--vocab-size", "260"],
    "summary": ["summary", "RUN/config.yaml"],
    "generate": ["generate", "--checkpoint", f"RUN/checkpoints/{NAME}/best.pt", "--prompt", "é→"],
    "evaluate": ["evaluate", "--checkpoint", f"RUN/checkpoints/{NAME}/best.pt", "--generate",
                 "--max-batches", "1"],
    "report": ["report", f"RUN/runs/{NAME}"],
    "train": ["train", "--config", "RUN/config.yaml", "--set", "training.experiment_name=other"],
    "mistake": ["summary", "RUN/→.yaml"],
}  # fmt: skip


@pytest.mark.promise("odd characters")
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("command", TEXTS)
def test_command_output_lacks_characters(
    run: Path, monkeypatch, command: str, encoding: str
) -> None:
    """As with PYTHONIOENCODING=ascii:strict; a lone half of a surrogate pair is no UTF-8 either."""
    if encoding != "ascii" and command in ("train", "train a tokenizer"):
        pytest.skip("one output is enough for a command that writes files")
    raw = {name: io.BytesIO() for name in ("stdout", "stderr")}
    for name, stream in raw.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding, errors="strict"))
    status = main([word.replace("RUN", str(run)) for word in TEXTS[command]])
    sys.stdout.flush(), sys.stderr.flush()
    shown = (raw["stdout"].getvalue() + raw["stderr"].getvalue()).decode(encoding)
    assert status == (2 if command == "mistake" else 0), shown
    assert shown.strip() and "Traceback" not in shown


@pytest.mark.promise("odd characters")
@pytest.mark.parametrize(
    ("redirection", "status"),
    [
        ("<&-", 2),
        *(
            pytest.param(redirection, status, marks=pytest.mark.slow)
            for redirection, status in (
                (">&-", None),
                ("< /dev/null", 0),
                ("<<< 'é →'", 0),
                ("< /bin/true", 2),
            )
        ),
    ],
)
def test_encode_any_standard_streams(redirection: str, status: int | None) -> None:
    """Closed, empty, text, or bytes that are no text."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "1"}
    ended = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m mantrans tokenizer encode --tokenizer {BPE} "
         + redirection],
        cwd=Path(__file__).parents[2], env=environment, input=b"a", capture_output=True,
    )  # fmt: skip
    assert b"Traceback" not in ended.stderr and ended.stderr.count(b"\n") <= 1
    assert status is None or ended.returncode == status, ended.stderr


# ------------------------------------------------------------------------------ the profiler


@pytest.mark.parametrize("steps", [0, -1, -(10**9)])
def test_profile_no_steps(tmp_path, steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps: expected at least 1, got {steps}"):
        StepProfiler(steps, tmp_path, torch.device("cpu"), torch.float32, print)


@pytest.mark.parametrize("before", [0, WARM_UP_STEPS - 1, WARM_UP_STEPS + 1])
def test_profile_after_end(tmp_path, before: int) -> None:
    """PyTorch's profiler crashes the process that exits while it records."""
    profiler = StepProfiler(3, tmp_path, torch.device("cpu"), torch.float32, lambda text: None)
    run_steps(profiler, before)
    profiler.finish()
    run_steps(profiler, WARM_UP_STEPS + 5)
    assert not torch.autograd.profiler._is_profiler_enabled
