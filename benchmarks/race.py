"""The same loss in less time: recipes train on one text, each for the same seconds.

model     GPT-2's blocks, 160 wide, 4 of them; windows of 160 tokens, 12 of them a step

text      a tenth of its documents is held out (`mantrans.data.holdout`); no recipe sees it, nor
          does the vocabulary, of 4,096 tokens learned from the rest
time      of training steps alone: building, compiling, warming up and evaluating are not counted
rates     follow the share of the seconds that has passed, so that schedule and time end together
result    bits per byte of the held-out text, cut into windows, each byte a target once; over wall
          time, CPU time and tokens. A recipe's curve is of a schedule that ends at its last point
"""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import machine
from benchmarks.baselines import BASELINES, GPT, HISTORY, AutogradTrainer
from benchmarks.harness import Quantiles, Recorder
from mantrans.config import Config
from mantrans.data.dataset import prepare
from mantrans.data.holdout import part_of
from mantrans.data.loader import BatchLoader
from mantrans.data.text import read_txt
from mantrans.data.tokenizer import Tokenizer, load_tokenizer
from mantrans.data.tokenizer_tool import train as learn_vocabulary
from mantrans.evaluation.perplexity import measure
from mantrans.optim.schedule import rate
from mantrans.training.batches import HostTokens
from mantrans.training.building import build_wrapper
from mantrans.training.step import TrainStep

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
VOCABULARY, HELD_OUT = 4096, 0.1
WARM_UP = 3
SCHEDULE = 100_000  # steps that the schedule is told of; the share of the time chooses one


class Recipe(NamedTuple):
    """Who trains, and what differs from configs/quickstart.yaml."""

    provider: str  # OURS, or a name in BASELINES
    settings: tuple[str, ...] = ()


OURS = "mantrans"
# What the recipes were tuned for; all else is the quickstart's, which has a narrower model.
SHAPE = (
    "model.d_model=160", "model.n_heads=4", "model.d_ffn=480", "training.learning_rate=4e-3",
    "training.min_learning_rate=1e-4", "training.lr_decay=cosine",
)  # fmt: skip
ADAMW = ("training.optimizer=adamw", "model.position=learned")
# nanoGPT's initial values, schedule, and windows that reach across documents. The learning rate is
# the best of 1e-3, 2e-3, 3e-3, 4e-3 and 8e-3: see the performance log.
NANOGPT = (
    *ADAMW, "model.initializer_range=0.02", "data.attend_across_documents=true",
    "training.learning_rate=3e-3", "training.min_learning_rate=3e-4",
)  # fmt: skip
RECIPES = {
    "PyTorch eager, nanoGPT's recipe": Recipe("PyTorch eager", NANOGPT),
    "torch.compile, nanoGPT's recipe": Recipe("torch.compile", NANOGPT),
    "mantrans, AdamW and learned positions": Recipe(OURS, ADAMW),
    "mantrans, Muon and rotary positions": Recipe(OURS),
}


class Point(NamedTuple):
    """Where a run stands."""

    wall: float  # seconds of steps
    cpu: float  # of all threads
    tokens: int
    bits_per_byte: float


def main(arguments: Namespace) -> int:
    """`python -m benchmarks race --text FILE`."""
    if arguments.text is None:
        print("--text: expected a file of documents, separated by <|endoftext|>, got none")
        return 2
    recorder = Recorder(arguments.output, "race", arguments.quick)
    seconds = 2.0 if arguments.quick else arguments.seconds
    points = 1 if arguments.quick else arguments.points
    with tempfile.TemporaryDirectory() as folder:
        for name, recipe in RECIPES.items():
            for seed in arguments.seeds if arguments.only in name else ():
                race = Race(recipe, arguments.text, seed, Path(folder))
                curve = race.run(seconds, points)
                _record(recorder, arguments.text.stem, name, seconds, race, curve)
    return 0


def _record(
    recorder: Recorder, text: str, name: str, seconds: float, race: Race, curve: list[Point]
) -> None:
    last = curve[-1]
    shape = {"seconds": round(seconds), "seed": race.config.training.seed}
    bits = Quantiles.of([last.bits_per_byte])
    recorder.add(
        (f"race {text}", "step", shape, race.dtype), name, "bits per byte", "bits/byte", bits,
        curve=[[round(number, 4) for number in point] for point in curve],
    )  # fmt: skip
    print(
        f"{text}, seed {race.config.training.seed}, {name}: {last.bits_per_byte:.4f} bits per byte "
        f"after {last.tokens:,} tokens, {last.wall:.0f} s, {last.cpu:.0f} s of CPU",
        flush=True,
    )


class Race:
    """One recipe on one text, ready for its first step."""

    def __init__(self, recipe: Recipe, text: Path, seed: int, folder: Path) -> None:
        self.tokenizer = _vocabulary(text, folder)
        self.config = config = Config.load(CONFIG, (
            "data.dataset=local", f"data.path={text}", f"data.tokenizer={folder / text.stem}",
            f"data.validation_fraction={HELD_OUT}", f"training.seed={seed}",
            *SHAPE, *recipe.settings,
        ))  # fmt: skip
        self.dtype = "bfloat16" if machine.has_native_bfloat16() else "float32"
        data = prepare(config.data, self.tokenizer, cache_dir=folder / "cache", quiet=True)
        self.held_out = data.validation
        self.tokens_of_step = config.training.sequences_per_step * config.sequence_length
        size, T = config.training.sequences_per_step, config.sequence_length
        batches = HostTokens(BatchLoader(data.train, size, T, seed), machine.device())
        trainer = _Ours if recipe.provider == OURS else _Theirs
        self.trainer = trainer(recipe, config, self.tokenizer, batches, self.dtype)

    def run(self, seconds: float, points: int) -> list[Point]:
        """Train for so many seconds; the points of the curve."""
        for step in range(WARM_UP):
            self.trainer.step(step, 0.0)
        wall, cpu, steps, curve = 0.0, 0.0, 0, []
        while wall < seconds:
            until = seconds * (len(curve) + 1) / points
            before, began, began_cpu = wall, time.monotonic(), time.process_time()
            while wall < until:
                self.trainer.step(steps, self._rate(wall / seconds))
                steps += 1
                wall = before + time.monotonic() - began
            cpu += time.process_time() - began_cpu
            curve.append(Point(wall, cpu, steps * self.tokens_of_step, self._bits_per_byte()))
        return curve

    def _rate(self, share: float) -> float:
        return rate(self.config.training, int(SCHEDULE * share), SCHEDULE)

    def _bits_per_byte(self) -> float:
        data = self.config.data
        return measure(
            self.trainer, self.held_out.tokens, self.tokenizer.token_bytes,
            length=self.config.sequence_length, batch_size=self.config.evaluation_batch,
            end_of_text=self.tokenizer.eot_id, device=machine.device(),
            attend_across_documents=data.attend_across_documents,
        ).bits_per_byte  # fmt: skip


def _vocabulary(text: Path, folder: Path) -> Tokenizer:
    """Learned from the documents that are not held out; the folder has it for the next recipe."""
    if (folder / text.stem).is_dir():
        return load_tokenizer(folder / text.stem)
    pieces = part_of(lambda: read_txt(text), HELD_OUT, held=False)
    return learn_vocabulary(pieces, VOCABULARY, folder / text.stem)


class _Ours:
    """What `train.py` builds of the config."""

    def __init__(
        self, recipe: Recipe, config: Config, tokenizer: Tokenizer, batches: HostTokens, dtype: str
    ) -> None:
        self.wrapper = build_wrapper(config, tokenizer.vocab_size)
        self.losses = self.wrapper.model.losses
        inside = None if config.data.attend_across_documents else tokenizer.eot_id
        self.train_step = TrainStep(
            self.wrapper.model, self.wrapper.optimizer, batches, end_of_text=inside,
            capture=machine.on_gpu(), history=HISTORY,
        )  # fmt: skip

    def step(self, number: int, learning_rate: float) -> None:
        if self.train_step.unread == HISTORY:
            self.train_step.read()
        self.train_step.run(number, learning_rate)


class _Theirs(AutogradTrainer):
    """A module under autograd with the config's shape and initial values."""

    def __init__(
        self, recipe: Recipe, config: Config, tokenizer: Tokenizer, batches: HostTokens, dtype: str
    ) -> None:
        make, mode = BASELINES[recipe.provider]
        parameters = build_wrapper(config, tokenizer.vocab_size).model.parameters
        start = parameters.named(parameters.best_weights())
        shape = config.model.model_copy(update={"vocab_size": tokenizer.vocab_size})
        super().__init__(make, shape, start, batches, 1, dtype, mode)

    @torch.no_grad()
    def losses(
        self, tokens: Tensor, targets: Tensor, document_start: Tensor | None = None
    ) -> Tensor:
        """See `LossModel`; windows reach across documents."""
        assert isinstance(self.module, GPT)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            logits = self.module.logits(tokens).flatten(0, 1).float()
        return F.cross_entropy(logits, targets.flatten(), reduction="none")
