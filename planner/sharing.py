"""Tokens that sequences of a batch have in common at their beginning, which are computed once.

The answers to one prompt, or a pair's two, begin with the same tokens, and every token sees the
same before it: inference and training compute the prompt once for all of them. What is shared is
found in the data (``executor.model.shared``); here is what an estimate takes it to be.

    group of 3, prompt p, answers a, b, c: computed are p a, b, c; keys of b are p b, of c p c
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from planner.plan import Workload
from profiles.hardware import DeviceKind

# Fewer tokens in common are computed again.
LEAST_SHARED = 16
# Of a micro-batch's tokens, what sharing must spare: whole sequences' keys and values are copied
# together in every block, and kept there for backward.
LEAST_SPARED = 1 / 8


def spares_enough(num_spared: float, num_tokens: float) -> bool:
    """Is it worth while to compute ``num_spared`` of ``num_tokens`` with others?"""
    return num_spared > 0 and num_spared >= LEAST_SPARED * num_tokens


class GroupTokens(NamedTuple):
    """Of one group: tokens that are computed, and those of its whole sequences."""

    computed: float
    whole: float

    @property
    def shares(self) -> bool:
        return self.computed < self.whole


def group_tokens(prompt: float, response: float, group_size: int) -> GroupTokens:
    """Tokens of a group of answers of ``response`` tokens to a prompt of ``prompt``.

    >>> group_tokens(1024, 1024, 8)
    GroupTokens(computed=9216, whole=16384)
    >>> group_tokens(16, 1024, 8)  # spares too little
    GroupTokens(computed=8320, whole=8320)
    """
    whole = group_size * (prompt + response)
    spared = (group_size - 1) * prompt
    if prompt < LEAST_SHARED or not spares_enough(spared, whole):
        spared = 0
    return GroupTokens(whole - spared, whole)


def expected_group(workload: Workload) -> GroupTokens:
    """A group of mean lengths, which seconds are for."""
    return group_tokens(
        workload.expected_prompt_tokens, workload.expected_response_tokens, workload.group_size
    )


def largest_groups(workload: Workload) -> tuple[GroupTokens, ...]:
    """Groups of which one takes most memory: the longest, and where it shares its prompt also the

    largest that does not: answers at their longest, after the longest prompt that spares too
    little, p < n r / ((n - 1) / LEAST_SPARED - n) or p < LEAST_SHARED.
    """
    prompt, response, n = workload.prompt_tokens, workload.response_tokens, workload.group_size
    longest = group_tokens(prompt, response, n)
    if not longest.shares:
        return (longest,)
    short = max(LEAST_SHARED, ceil(n * response / ((n - 1) / LEAST_SPARED - n))) - 1
    whole = n * (min(short, prompt) + response)
    return longest, GroupTokens(whole, whole)


def attended_tokens(workload: Workload, kind: DeviceKind) -> float:
    """The length of sequences whose attention takes as long, token by token, as a group's.

    Twice the pairs of tokens that a kernel works on, over the tokens that are computed. Whole
    sequences of L tokens: L^2 / 2. After a shared prompt p an answer r: r p + r^2 / 2 in
    variable-length kernels on GPUs, which skip what is masked; r (p + r) on CPUs, where all
    sequences but the first go through a mask.
    """
    group = expected_group(workload)
    if not group.shares:
        return workload.attended_tokens
    prompt, others = workload.expected_prompt_tokens, workload.group_size - 1
    lengths = workload.response_lengths or (workload.response_tokens,)
    own = 2.0 if kind == "cpu" else 1.0
    twice_pairs = sum(
        (prompt + length) ** 2 + others * length * (2 * prompt + own * length) for length in lengths
    )
    return twice_pairs / len(lengths) / group.computed
