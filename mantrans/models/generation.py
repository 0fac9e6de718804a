"""Sampling of text, token by token, with a key/value cache.

A model sees at most max_seq_len tokens. When a sequence grows beyond that, its window drops the
oldest half at once and then grows again. So the cache, whose positions start at the window's first
token, is rebuilt every max_seq_len / 2 tokens instead of at every token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mantrans.config.arguments import SAMPLING, checked
from mantrans.cuda_graph import cuda_graph
from mantrans.errors import ModelError
from mantrans.kernels.reference import wide_dtype
from mantrans.layers import KeyValueCache
from mantrans.models.transformer import CustomTransformer


def window_start(length: int, max_seq_len: int) -> int:
    """Index of the first token that the model sees in a sequence of `length` tokens."""
    stride = max(1, max_seq_len // 2)
    return max(0, -(-(length - max_seq_len) // stride)) * stride


# The share of the probability by which a sum may miss top_p: that of rounding, and no token's.
ROUNDING = 1e-9


@checked(**{name: SAMPLING[name] for name in ("temperature", "top_k", "top_p")})
def sample(
    logits: Tensor,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Draw one token per row from logits (B, V) -> (B,) int64.

    temperature divides the logits, 0 takes the most likely token; top_k keeps the k most likely;
    top_p the smallest set of likely tokens whose probabilities sum to p (Holtzman et al. 2020).
    Of equally likely tokens the lowest ids are kept or taken. A logit of -inf is never drawn.
    Raises ModelError where a logit is NaN or +inf, or all of a row are -inf.
    """
    return _draw(logits, generator, temperature, top_k, top_p)


def _draw(
    logits: Tensor,
    generator: torch.Generator,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> Tensor:
    """`sample` with arguments that were checked before."""
    _refuse_broken(logits)
    if temperature == 0:
        return logits.argmax(-1)  # of several the first
    tokens = None
    if top_k is not None and top_k < logits.shape[-1]:  # drawing among few takes less time
        tokens = _most_likely(logits, top_k)
        logits = logits.gather(1, tokens)
    z = logits.double()
    z = (z - z.amax(-1, keepdim=True)) / temperature  # at most 0: no temperature overflows
    if top_p is not None and top_p < 1:
        ordered, order = z.sort(descending=True, stable=True)
        p = ordered.softmax(-1)
        likelier = p.cumsum(-1).roll(1, -1)  # the sum of the tokens before each
        likelier[:, 0] = -1  # the first is always kept
        ordered = ordered.masked_fill(likelier >= top_p - ROUNDING, -torch.inf)
        z = z.scatter(1, order, ordered)
    p = z.softmax(-1).to(wide_dtype(logits.dtype))
    drawn = torch.multinomial(p, 1, generator=generator)
    return (drawn if tokens is None else tokens.gather(1, drawn))[:, 0]


def _most_likely(logits: Tensor, k: int) -> Tensor:
    """The k < V largest of each row of logits (B, V), exactly k: their ids (B, k), in order."""
    values, ids = logits.topk(k + 1)
    if (values[:, -2] > values[:, -1]).all():
        return ids[:, :k].sort(-1).values
    smallest = values[:, -2:-1]  # others are equal to it
    above, equal = logits > smallest, logits == smallest
    kept = above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    return kept.nonzero()[:, 1].view(-1, k)


def _refuse_broken(logits: Tensor) -> None:
    """Without this, a broken model would be sampled from as if nothing had happened."""
    largest = logits.amax(-1)  # NaN if any is
    if not largest.isfinite().all():
        row = int((~largest.isfinite()).int().argmax())
        raise ModelError(
            f"logits: expected finite numbers, got {largest[row].item()} in row {row}: the weights "
            "are broken, or their results exceed the model's dtype; use an earlier checkpoint"
        )


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


@checked(**SAMPLING)
def stream(
    model: CustomTransformer,
    prompts: list[list[int]],
    max_length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | None = None,
    seed: int = 0,
    use_cache: bool = True,
) -> Iterator[list[int | None]]:
    """Continue each prompt; yields per step each row's new token, or None if the row has ended.

    A row ends at `max_length` tokens, prompt included, or after its end-of-text token.
    Raises ModelError, at the step where it happens, for logits that are not finite: see `sample`.
    """
    sequences = [list(prompt) for prompt in prompts]
    decoder = Decoder(model, sequences, max_length, use_cache)
    generator = torch.Generator(model.parameters.weights.device).manual_seed(seed)
    open_rows = [len(s) < max_length for s in sequences]
    while any(open_rows):
        drawn = _draw(decoder.next_logits(), generator, temperature, top_k, top_p).tolist()
        yield [token if is_open else None for token, is_open in zip(drawn, open_rows, strict=True)]
        for row, token in enumerate(drawn):
            sequences[row].append(
                token
            )  # rows that have ended get tokens too, so that all rows stay equally long
            open_rows[row] &= token != eos_token_id and len(sequences[row]) < max_length
