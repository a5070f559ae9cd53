"""Prompts that begin alike: whose keys and values a new row takes over instead of computing them.

A system prompt, examples before a question, the n samples of one prompt: what two prompts have in
common at their beginning has the same keys and values in both. ``Prefixes`` finds, among rows that
are there or enter first, the one that shares most with a new prompt; a prefix tree would find the
same (Zheng et al. 2024, SGLang's RadixAttention), but in sorted order it is always a neighbour.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from planner.sharing import LEAST_SHARED

_BYTES = 4  # of a token in a key


@dataclass(frozen=True, slots=True, kw_only=True)
class Alike:
    """The first ``num_tokens`` tokens of a new row are those of ``row``, which was there before."""

    row: int = 0
    num_tokens: int = 0


def prefix_key(prompt: Tensor) -> bytes:
    """Token ids [length] as bytes that sort as the sequences of ids do."""
    return bytes(prompt.numpy().astype(">u4").tobytes())


class Prefixes:
    """Prompts of rows, by ``prefix_key``."""

    def __init__(self) -> None:
        self._sorted: list[tuple[bytes, int]] = []

    def add(self, key: bytes, row: int) -> None:
        insort(self._sorted, (key, row))

    def find(self, key: bytes) -> Alike:
        """The row that has most tokens in common with a prompt, and how many these are.

        None, if they are fewer than ``LEAST_SHARED`` and not the whole prompt.
        """
        place = bisect_left(self._sorted, (key, 0))
        best = Alike()
        for other, row in self._sorted[max(0, place - 1) : place + 1]:
            count = _num_common(key, other)
            if count > best.num_tokens:
                best = Alike(row=row, num_tokens=count)
        whole = best.num_tokens * _BYTES == len(key)
        return best if whole or best.num_tokens >= LEAST_SHARED else Alike()


def _num_common(one: bytes, other: bytes) -> int:
    """Tokens that two keys have in common at their beginning."""
    count = min(len(one), len(other))
    if one[:count] == other[:count]:
        return count // _BYTES
    ids = [np.frombuffer(key, "u4", count // _BYTES) for key in (one, other)]
    return int((ids[0] != ids[1]).argmax())
