"""Choosing the next token: a uniform number for every (seed, step, sample, position), and the
token that this number picks from the logits.

Read ``sample`` first. The noise is a function of its four keys and of nothing else: which rank
draws, with how many others and in which order changes no token, so that every layout of a model
generates the same answers. Who calls this, and when, is ``engine.py``'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from profiles.errors import ConfigError

# splitmix64's constants (Steele, Lea and Flood 2014; the mixer is Stafford's variant 13).
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MIX_FIRST = 0xBF58476D1CE4E5B9
MIX_SECOND = 0x94D049BB133111EB
WORD = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How answers are sampled; ``top_k`` 0 and ``top_p`` 1 mean: no truncation.

    An answer ends with the first token of ``stop_token_ids`` (it is kept), which cannot come
    among the first ``min_new_tokens`` tokens, or after ``max_new_tokens`` tokens without one.

    Raises:
        ConfigError: a value out of its range; names it.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        def check(right: bool, name: str, rule: str, remedy: str = "") -> None:
            if not right:
                value = getattr(self, name)
                raise ConfigError(
                    f"{name} is {value!r}, not {rule}", where="generation", remedy=remedy
                )

        for name, least in (("max_new_tokens", 1), ("min_new_tokens", 0), ("top_k", 0)):
            right = _is_count(getattr(self, name), least)
            check(right, name, f"a whole number of at least {least}")
        check(
            self.min_new_tokens <= self.max_new_tokens,
            "min_new_tokens",
            f"at most max_new_tokens = {self.max_new_tokens}",
        )
        check(
            math.isfinite(self.temperature) and self.temperature > 0,
            "temperature",
            "above 0",
            "for the likeliest token set greedy=true",
        )
        check(0 < self.top_p <= 1, "top_p", "in (0, 1]", "1 turns it off")
        check(
            isinstance(self.stop_token_ids, tuple)
            and all(_is_count(token, 0) for token in self.stop_token_ids),
            "stop_token_ids",
            "a tuple of token ids",
        )

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


# ---- noise ----------------------------------------------------------------------------------


def uniform(seed: int, step: int, samples: Tensor, positions: Tensor) -> Tensor:
    """One number in [0, 1) for every (seed, step, sample, position).

    ``samples`` and ``positions`` [n] int64 -> [n] float64, with 53 random bits. A counter-based
    generator (Salmon et al. 2011) made of splitmix64's mixer, which is a bijection of 64 bits
    in which every bit of the input moves half of the output's: each key is mixed into the hash
    of the keys before it.
    """
    return uniform_of(samples ^ noise_key(seed, step), positions)


def noise_key(seed: int, step: int) -> int:
    """The hash of both, as a signed integer of 64 bits."""
    prefix = 0
    for word in (seed, step):
        prefix = _mix_int((prefix ^ (word & WORD)) + GOLDEN_GAMMA)
    return _signed(prefix)


def uniform_of(keyed: Tensor, positions: Tensor) -> Tensor:
    """``uniform``, from ``keyed`` = samples ^ ``noise_key``: no number but tensors' values."""
    state = _mix(keyed + _signed(GOLDEN_GAMMA))
    state = _mix((state ^ positions) + _signed(GOLDEN_GAMMA))
    return _shift_right(state, 11).double() * 2.0**-53


def _signed(word: int) -> int:
    """The int64 with the same 64 bits."""
    return word - (1 << 64) if word >> 63 else word


def _mix_int(word: int) -> int:
    """splitmix64's finalizer on one unsigned 64-bit integer."""
    word &= WORD
    word = (word ^ (word >> 30)) * MIX_FIRST & WORD
    word = (word ^ (word >> 27)) * MIX_SECOND & WORD
    return word ^ (word >> 31)


def _mix(x: Tensor) -> Tensor:
    """``_mix_int`` on int64 tensors, whose products wrap as unsigned ones do."""
    x = (x ^ _shift_right(x, 30)) * _signed(MIX_FIRST)
    x = (x ^ _shift_right(x, 27)) * _signed(MIX_SECOND)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Zeros come in from the left, as in unsigned integers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


# ---- the token ------------------------------------------------------------------------------


def sample(
    logits: Tensor, u: Tensor, params: SamplingParams, allow_stop: Tensor | None = None, *,
    static: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A token for every row, and its log-probability.

    1. logits / temperature; rows whose ``allow_stop`` is False lose their stop tokens.
    2. top-k: tokens below the k-th logit go. top-p: of what is left, tokens go that are not
       among the likeliest with together a probability of ``top_p``; the likeliest stays.
       Tokens of equal logit stay or go together. (Hugging Face's chain and order.)
    3. In the order of the vocabulary, the first token whose cumulative probability, in float64,
       exceeds ``u``. Greedy takes the largest logit instead.

    The log-probability is log_softmax(logits / temperature)[token]: of the *whole* softmax,
    neither truncated nor without stop tokens, because this is what the trainer recomputes from
    its own forward pass, where nothing is truncated.

    Shapes: logits [n, vocab], u [n] float64, allow_stop [n] bool or None (all True) ->
    tokens [n] int64, log-probabilities [n] float32. ``logits`` is left as it was. ``static``: what
    is done does not depend on values, and nothing waits for the device; so it is on CUDA always.
    """
    scaled = logits.float()
    if params.temperature != 1:
        scaled = scaled / params.temperature
    forbidden = None if allow_stop is None or not params.stop_token_ids else ~allow_stop
    allowed = scaled if forbidden is None else _without_stops(scaled, forbidden, params)
    if params.greedy:
        tokens = allowed.argmax(-1)
        log_total = scaled.logsumexp(-1).double()
    else:
        tokens, log_total = _draw(allowed, u, params, static=static)
        if forbidden is not None:
            log_total = scaled.logsumexp(-1).double()
    chosen = scaled.gather(1, tokens[:, None])[:, 0]
    return tokens, (chosen.double() - log_total).float()


def _without_stops(logits: Tensor, forbidden: Tensor, params: SamplingParams) -> Tensor:
    """A copy with -inf at the stop tokens of the rows where ``forbidden`` [n]."""
    copy = logits.clone()
    for token in set(params.stop_token_ids):  # few, and nothing crosses to the device
        copy[:, token].masked_fill_(forbidden, -math.inf)
    return copy


def _draw(
    logits: Tensor, u: Tensor, params: SamplingParams, *, static: bool
) -> tuple[Tensor, Tensor]:
    """(tokens [n], log of the untruncated sum of exp(logits) [n] float64); logits [n, vocab]."""
    num_rows, vocab = logits.shape
    largest = logits.amax(-1, keepdim=True)
    block = max(1, math.isqrt(vocab))
    num_blocks = -(-vocab // block)
    # exp(logit - largest); zeros fill the last block.
    weights = logits.new_empty(num_rows, num_blocks * block)
    weights[:, vocab:].zero_()
    torch.sub(logits, largest, out=weights[:, :vocab]).exp_()
    blocks = weights.view(num_rows, num_blocks, block)
    sums = blocks.sum(-1).double()
    log_total = sums.sum(-1).log() + largest[:, 0]
    if params.truncates:
        least = _least_weight(weights[:, :vocab], sums.sum(-1), params, static=static)
        weights.masked_fill_(weights < least[:, None], 0)
        sums = blocks.sum(-1).double()
    return _inverse_cdf(blocks, sums, u), log_total


def _inverse_cdf(blocks: Tensor, sums: Tensor, u: Tensor) -> Tensor:
    """Index of the first weight whose cumulative share exceeds u.

    In two steps, so that only one block of a row is accumulated value by value: blocks
    [n, num_blocks, block], their ``sums`` [n, num_blocks] float64, u [n] -> [n] int64.
    """
    ends = sums.cumsum(-1)  # [n, num_blocks]
    target = (u * ends[:, -1])[:, None]
    block_index = _first_above(ends, target)
    before = ends.gather(1, block_index) - sums.gather(1, block_index)
    index = block_index[..., None].expand(-1, -1, blocks.shape[-1])
    inside = blocks.gather(1, index)[:, 0].double().cumsum(-1)  # [n, block]
    return (block_index * blocks.shape[-1] + _first_above(inside, target - before))[:, 0]


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """First index with cumulative > target; never one of zero weight, though u rounds up to 1.

    cumulative [n, m], target [n, 1] -> [n, 1].
    """
    found = (cumulative <= target).sum(-1, keepdim=True)
    last = (cumulative < cumulative[:, -1:]).sum(-1, keepdim=True)
    return torch.minimum(found, last)


# Candidates that top-p looks at first without top-k: trained models rarely need more.
TOP_P_CANDIDATES = 256


def _least_weight(
    weights: Tensor, total: Tensor, params: SamplingParams, *, static: bool
) -> Tensor:
    """Smallest weight that top-k and then top-p keep.

    weights [n, vocab], their sums ``total`` [n] float64 -> [n]. Sorts no more than it needs: the
    k largest, or without top-k a growing number of candidates; all, where it may not ask.
    """
    vocab = weights.shape[1]
    if 0 < params.top_k < vocab:
        top = weights.topk(params.top_k, dim=-1).values  # [n, k], largest first
        if params.top_p == 1:
            return top[:, -1]
        # Weights equal to the k-th are kept by top-k, however many they are.
        kept = torch.where(weights < top[:, -1:], 0, weights)
        return _nucleus(top, kept.sum(-1).double(), params.top_p)
    if params.top_p == 1:
        return weights.new_zeros(weights.shape[0])
    count = vocab if static or weights.is_cuda else min(TOP_P_CANDIDATES, vocab)
    while True:
        top = weights.topk(count, dim=-1).values
        if count == vocab or bool((top.sum(-1) > params.top_p * total).all()):
            return _nucleus(top, total, params.top_p)
        count = min(count * 16, vocab)


def _nucleus(top: Tensor, total: Tensor, top_p: float) -> Tensor:
    """The last of ``top`` [n, k] (largest first) whose predecessors sum to less than top_p."""
    top64 = top.double()
    before = top64.cumsum(-1) - top64
    count = (before < top_p * total[:, None]).sum(-1, keepdim=True).clamp_(min=1)
    return top.gather(1, count - 1)[:, 0]
