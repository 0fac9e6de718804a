"""The README's way from a text of one's own to a model, as commands that a test can run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from mantrans.data.stories import stories

ROOT = Path(__file__).parents[2]
# A small model, trained for a moment.
QUICK = ["model.d_model=32", "model.n_blocks=1", "model.max_seq_len=32", "training.device=cpu"]
QUICK += ["training.batch_size=2", "training.eval_batches=2", "evaluation.max_generation_length=24"]


def own_text_commands() -> list[list[str]]:
    """The lines of the block, without the word mantrans; training is kept short by --set."""
    section = (
        (ROOT / "README.md").read_text(encoding="utf-8").partition("### On your own text\n")[2]
    )
    (block,) = re.findall(r"\A\n```\n(.*?)```", section, re.DOTALL)
    commands = [shlex.split(line) for line in block.splitlines()]
    assert {command[0] for command in commands} == {"mantrans"}
    commands = [command[1:] for command in commands]
    steps = 2
    for command in commands:
        if command[0] == "train":
            settings = [f"training.max_steps={steps}", *(QUICK if steps == 2 else [])]
            command += [f"--set={setting}" for setting in settings]
            steps *= 2
    return commands


def write_own_texts(folder: Path) -> None:
    """mine.txt and other.txt: built-in stories."""
    texts = stories()
    for name, part in (("mine.txt", texts[:1000]), ("other.txt", texts[1000:1020])):
        (folder / name).write_text("\n<|endoftext|>\n".join(part), encoding="utf-8")
