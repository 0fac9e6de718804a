"""The models that are trained, and the text they are trained on.

The vocabulary of the GPT-2 models is the padded one, 50,304, for everybody: an odd 50,257 would
slow the rivals' matrix products down, while ours pad by themselves.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from benchmarks import machine
from mantrans.config import ModelConfig
from mantrans.data.stories import stories
from mantrans.data.tokenizer import load_tokenizer

# name -> (C, blocks, H, F, V)
SHAPES = {
    "seed-sized": (256, 4, 4, 512, 4096),
    "TinyStories 33M": (768, 4, 16, 3072, 4096),
    "GPT-2 124M": (768, 12, 12, 3072, 50304),
    "GPT-2 350M": (1024, 24, 16, 4096, 50304),
    "tiny": (32, 2, 2, 64, 4096),
}
TOKENIZER = "tinystories_bpe_4096"


def model_config(name: str, T: int) -> ModelConfig:
    """The named model with positions for sequences of T."""
    C, blocks, H, width, V = SHAPES[name]
    return ModelConfig(
        d_model=C, n_blocks=blocks, n_heads=H, d_ffn=width, max_seq_len=T, vocab_size=V
    )


@cache
def text(count: int) -> Tensor:
    """`count` tokens of the built-in stories, 1-D int64: words as frequent as they are, all
    again where that is more than there are."""
    return _all_stories().repeat(-(-count // len(_all_stories())))[:count]


@cache
def _all_stories() -> Tensor:
    """The tokens of every built-in story, 1-D int64, each story ended."""
    tokenizer = load_tokenizer(TOKENIZER)
    encoded = tokenizer.encode_batch(stories())
    return torch.tensor([token for ids in encoded for token in (*ids, tokenizer.eot_id)])


class Batches:
    """Some batches that lie on the device; step i takes number i, round and round.

    It is a `mantrans.training.batches.TokenSource`, and the rivals read the same rows: nobody's
    loading of data is timed.
    """

    def __init__(self, sequences: int, T: int, count: int = 10) -> None:
        tokens = text(count * sequences * (T + 1)).view(count, sequences, T + 1)
        self.all = tokens.to(machine.device())
        self.current = self.all[0].clone()

    def load(self, step: int) -> None:
        """Make batch `step` the current one, where captured steps read it."""
        self.current.copy_(self.all[step % len(self.all)])

    def rows(self) -> Tensor:
        """(sequences, T+1) int64: inputs and, one further, targets."""
        return self.current
