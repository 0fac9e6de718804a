"""Text, token by token, with a key/value cache.

A model sees at most max_seq_len tokens. When a sequence grows beyond that, its window drops the
oldest half at once and then grows again. So the cache, whose positions start at the window's first
token, is rebuilt every max_seq_len / 2 tokens instead of at every token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mantrans.cuda_graph import cuda_graph
from mantrans.layers import KeyValueCache
from mantrans.models.sampling import Sampling, draw
from mantrans.models.stop_texts import Reader
from mantrans.models.transformer import CustomTransformer


def window_start(length: int, max_seq_len: int) -> int:
    """Index of the first token that the model sees in a sequence of `length` tokens."""
    stride = max(1, max_seq_len // 2)
    return max(0, -(-(length - max_seq_len) // stride)) * stride


class TokenStep:
    """One more token per row, against a cache that stays where it is.

    On a GPU a captured graph, whose inputs and logits have fixed addresses: launching the kernels
    of one token takes the host ten times as long as they run. Running a token's step again changes
    nothing, since it writes the same keys and values; so the capture may.
    """

    def __init__(self, model: CustomTransformer, cache: list[KeyValueCache], rows: int) -> None:
        self.model, self.cache = model, cache
        device = model.parameters.weights.device
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.lengths = torch.ones_like(self.tokens)
        self.logits: Tensor | None = None
        self.run: Callable[[], None] | None = None

    def __call__(self, tokens: list[int], lengths: list[int]) -> Tensor:
        """Logits (rows, V) after `tokens`, at index lengths[b] - 1; valid until the next call."""
        self.tokens.copy_(torch.tensor(tokens))
        self.lengths.copy_(torch.tensor(lengths))
        if self.run is None:
            self.run = cuda_graph(self._run) if self.captures(self.tokens.device) else self._run
        self.run()
        assert self.logits is not None
        return self.logits

    @staticmethod
    def captures(device: torch.device) -> bool:
        return device.type == "cuda"

    def _run(self) -> None:
        self.logits = self.model.decode(self.tokens, self.lengths, self.cache)


class Decoder:
    """The next-token logits of a growing batch of sequences.

    sequences: one list of tokens per row, which the caller extends by one token between calls.
    max_length: the final length of the shortest; the cache has room for it.
    use_cache: False recomputes everything at each call.
    """

    def __init__(
        self,
        model: CustomTransformer,
        sequences: list[list[int]],
        max_length: int,
        use_cache: bool = True,
    ) -> None:
        self.model, self.sequences, self.use_cache = model, sequences, use_cache
        # Rows that have ended are continued until the last one ends.
        lengths = [len(s) for s in sequences] or [0]
        length = max(lengths) + max(0, max_length - min(lengths))
        length = min(length, model.config.max_seq_len)
        self.cache = model.new_cache(len(sequences), length)
        self.step = TokenStep(model, self.cache, len(sequences))
        self.starts: list[int] | None = None  # of the windows that the cache holds

    def next_logits(self) -> Tensor:
        """Logits (B, V) after the last token of each sequence."""
        limit = self.model.config.max_seq_len
        starts = [window_start(len(s), limit) for s in self.sequences]
        lengths = [len(s) - start for s, start in zip(self.sequences, starts, strict=True)]
        if self.use_cache and starts == self.starts:
            return self.step([s[-1] for s in self.sequences], lengths)
        self.starts = starts
        width = max(lengths)
        windows = [
            s[start:] + [0] * (width - n)
            for s, start, n in zip(self.sequences, starts, lengths, strict=True)
        ]
        return self.model.prefill(self._tensor(windows), self._tensor(lengths), self.cache)

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, device=self.model.parameters.weights.device)


def stream(
    model: CustomTransformer, prompts: list[list[int]], max_length: int, sampling: Sampling
) -> Iterator[list[int | None]]:
    """Continue each prompt; yields per step each row's new token, or None if the row has ended.

    A row ends at `max_length` tokens, prompt included, after its end-of-text token, or after the
    token that completes a stop text.
    Raises ModelError, at the step where it happens, for logits that are not finite: see `sample`.
    """
    sequences = [list(prompt) for prompt in prompts]
    decoder = Decoder(model, sequences, max_length, sampling.use_cache)
    device = model.parameters.weights.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    tokenizer, stop = sampling.tokenizer, sampling.stop
    readers = [Reader(tokenizer, stop) for _ in prompts] if stop and tokenizer is not None else []
    seen = None if sampling.repetition_penalty == 1 else _seen(sequences, model.vocab_size, device)
    open_rows = [len(s) < max_length for s in sequences]
    while any(open_rows):
        drawn = draw(decoder.next_logits(), sampling, generator, seen)
        if seen is not None:
            seen.scatter_(1, drawn[:, None], True)
        tokens = drawn.tolist()
        yield [token if is_open else None for token, is_open in zip(tokens, open_rows, strict=True)]
        for row, token in enumerate(tokens):  # all rows stay equally long, also those that ended
            sequences[row].append(token)
            open_rows[row] &= token != sampling.eos_token_id and len(sequences[row]) < max_length
            if readers and open_rows[row]:
                readers[row].read(token)
                open_rows[row] = not readers[row].ended


def _seen(sequences: list[list[int]], vocab_size: int, device: torch.device) -> Tensor:
    """(B, V) bool: the tokens that each row has."""
    seen = torch.zeros(len(sequences), vocab_size, dtype=torch.bool)
    for row, tokens in zip(seen, sequences, strict=True):
        row[tokens] = True
    return seen.to(device)
