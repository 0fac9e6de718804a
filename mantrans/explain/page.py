"""One training step as one self-contained HTML page.

    mantrans explain [--checkpoint best.pt] [--text "..."] [--output FOLDER]

The page needs no network. Its data is `Data.all`; page.html, page.css and page.js define it, and
jinja2 escapes everything that comes from a file or from the user.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from markupsafe import Markup

from mantrans import optim
from mantrans.checkpoint.atomic import replacing, write_all
from mantrans.config import Config
from mantrans.data.tokenizer import Tokenizer, load_tokenizer
from mantrans.errors import ConfigError, MantransError, ModelError, printable, show, single_line
from mantrans.explain.data import ELEMENTS, Data
from mantrans.explain.step import float64_copy, run
from mantrans.inference import trained
from mantrans.optim.schedule import rate
from mantrans.report.page import environment
from mantrans.runtime import disable_malloc_trim
from mantrans.wrapper import CustomTransformerWrapper

PAGE = "explain.html"
TEXT = "Once upon a time, there was a little girl named Lily. She had a red ball."
TOKENS = 24  # of a sentence, unless more are asked for
MOST_OPERATIONS = 10**12  # of all finite differences
QUICKSTART = Path("checkpoints/quickstart/best.pt")


class Subject(NamedTuple):
    """A model to explain. folder: where its page goes by default."""

    title: str
    wrapper: CustomTransformerWrapper  # a float64 copy
    tokenizer: Tokenizer
    learning_rate: float
    folder: Path
    notes: list[str]


def of_checkpoint(path: Path) -> Subject:
    """The model of a run's checkpoint, with its optimizer and the learning rate of its next step.

    Raises CheckpointError for any other file.
    """
    state = trained.load_trained(path)
    config = Config.from_dict(state["config"], str(path))
    tokenizer = trained.tokenizer_of(state, config)
    trained.check_vocabulary(state, tokenizer)
    training, dtype = config.training, state["model_config"].get("dtype")
    wrapper = float64_copy(state, optim.options(training))
    notes = []
    if dtype != "float64":
        notes.append(
            f"The model was trained in {dtype}. This page computes with a copy of its weights in "
            "float64, on the CPU."
        )
    step, total = state["optimizer_updates"], training.max_steps
    learning_rate = rate(training, min(step, total - 1), total) if total else training.learning_rate
    folder = Path(training.output_dir) / training.experiment_name
    title = f"{training.experiment_name} ({path.name})"
    return Subject(title, wrapper, tokenizer, learning_rate, folder, notes)


def fresh(**shape: Any) -> Subject:
    """A tiny model with its first weights, which has learned nothing yet. shape: fields of it."""
    tokenizer = load_tokenizer("tinystories_bpe_4096")
    wrapper = CustomTransformerWrapper(
        tokenizer.vocab_size, 32, 2, 2, max_seq_len=64, dtype=torch.float64, device="cpu",
        backend="reference", optimizer="adamw", **shape,
    )  # fmt: skip
    note = (
        "This is a tiny model that has learned nothing yet. Train one with python train.py, and "
        "give --checkpoint to see it."
    )
    return Subject("A tiny untrained model", wrapper, tokenizer, 1e-3, Path("runs/explain"), [note])


def write_page(
    checkpoint: Path | None = None,
    text: str | None = None,
    output: Path | None = None,
    max_tokens: int = TOKENS,
) -> Path:
    """Run a step of the model in `checkpoint` on `text`, and write its page to a folder.

    checkpoint: None for the quickstart's if it is there, else a tiny fresh model. output: by
    default the run's folder. max_tokens: a longer text is cut there, or at the model's context.
    Returns the page's path. Raises MantransError (one line) for what cannot be explained.
    """
    if checkpoint is None and QUICKSTART.is_file():
        checkpoint = QUICKSTART
    subject = fresh() if checkpoint is None else of_checkpoint(checkpoint)
    return write(subject, TEXT if text is None else text, output or subject.folder, max_tokens)


def write(subject: Subject, text: str, folder: Path, max_tokens: int = TOKENS) -> Path:
    """Run the step, whose update `subject` then has, and write its page into `folder`."""
    disable_malloc_trim()
    ids, notes = sentence(subject, text, max_tokens)
    step = run(subject.wrapper, torch.tensor([ids]), subject.learning_rate)
    if not step.applied:
        raise ModelError(f"loss and gradient: expected finite numbers, got a loss of {step.loss}")
    samples, more = affordable(subject.wrapper, len(ids))
    data = Data(step, lambda i: printable(subject.tokenizer.decode([i])), samples).all()
    shown = subject.tokenizer.decode(ids)
    data["about"] |= {"title": subject.title, "text": shown, "notes": subject.notes + notes + more}
    return save(data, folder)


def affordable(wrapper: CustomTransformerWrapper, T: int) -> tuple[int, list[str]]:
    """Finite differences a parameter, of each of which two forwards are computed, and what is to be
    said of their number."""
    p = wrapper.model.parameters
    each = 2 * 2 * p.count() * T * len(p.by_name)
    samples = max(1, min(ELEMENTS, MOST_OPERATIONS // each))
    if samples == ELEMENTS:
        return samples, []
    return samples, [
        f"The model is large: {samples} of a parameter's elements have a finite difference, not "
        f"{ELEMENTS}."
    ]


def sentence(subject: Subject, text: str, max_tokens: int) -> tuple[list[int], list[str]]:
    """The first tokens of `text`, and what is to be said of it. ConfigError for fewer than two."""
    ids = subject.tokenizer.encode(text)
    if len(ids) < 2:
        raise ConfigError(f"--text: expected at least 2 tokens, got {len(ids)} from {show(text)}")
    context = subject.wrapper.config.max_seq_len
    most = min(max_tokens, context)
    if len(ids) <= most:
        return ids, []
    why = f"the model's context is {context}" if most == context else "--max-tokens shows more"
    return ids[:most], [f"The text has {len(ids):,} tokens; the first {most} are used ({why})."]


def save(data: dict[str, Any], folder: Path) -> Path:
    """Write the page with `data` into `folder`, which is made if it is not there."""
    path = folder / PAGE
    places = [*data["functions"].values(), *(m["caller"] for m in data["moments"])]
    for where in places + [w["derivation"] for w in data["words"].values()]:
        where["link"] = link(where.pop("path"), where["line"], folder)
    # inside <script> only "<" can end it
    content = json.dumps(data, allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")
    here = Path(__file__).parent
    script = (here / "page.js").read_text(encoding="utf-8")  # which would not parse as a template
    template = environment(here).get_template("page.html")
    page = template.render(data=data, json=Markup(content), script=Markup(script))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise MantransError(f"{path}: expected the name of an HTML file, got no regular file")
        with replacing(path) as file:
            write_all(file, page.encode())
    except OSError as error:
        shown = single_line(str(path))
        raise MantransError(f"{shown}: cannot be written ({error.strerror})") from None
    return path


def link(path: str | None, line: int | None, folder: Path) -> str | None:
    """From a page in `folder` to a line of the source."""
    there = path and Path(os.path.relpath(path, folder.resolve())).as_posix()
    return f"{there}#L{line}" if there and line else there
