"""Which rows decode when: ``num_sequences`` answers of unlike lengths in ``generation_batch`` rows.

A row's first token comes out of prefill, so an answer of n tokens decodes for n - 1 turns; then a
waiting prompt takes its row (continuous batching, Yu et al. 2022, Orca). Everything here counts
turns; ``generate.py`` prices them.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import sqrt

import numpy as np

# Turns are priced in so many stretches: live rows and contexts are means over a stretch.
NUM_STRETCHES = 16
_GOLDEN = (sqrt(5.0) - 1.0) / 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """``turns`` turns with ``rows`` live rows that have made ``answered`` tokens, in the mean."""

    turns: int
    rows: float
    answered: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """``entries``: number of prompts that enter in one turn -> how many such turns."""

    entries: Mapping[int, int]
    stretches: Sequence[Stretch]


def spread(lengths: Sequence[int], num_sequences: int) -> list[int]:
    """``num_sequences`` lengths in the proportions of ``lengths``, in an order without a trend.

    Sequence i has the quantile (i' + 0.5) / num_sequences, where i' is the rank of the fraction
    of i times the golden ratio among all of them: neighbours are unlike, as in a shuffled batch.

    >>> sorted(spread([1, 9], 4))
    [1, 1, 9, 9]
    """
    ordered, count = sorted(lengths), len(lengths)
    by_rank = [ordered[(2 * rank + 1) * count // (2 * num_sequences)]
               for rank in range(num_sequences)]  # fmt: skip
    keys = [i * _GOLDEN % 1.0 for i in range(num_sequences)]
    found = [0] * num_sequences
    for rank, i in enumerate(sorted(range(num_sequences), key=keys.__getitem__)):
        found[i] = by_rank[rank]
    return found


@lru_cache(maxsize=4096)
def schedule(lengths: tuple[int, ...], num_sequences: int, num_rows: int) -> Schedule:
    """Sequences in order into ``num_rows`` rows, each into the one that is free first.

    Runs in O(num_sequences log num_rows).
    """
    turns = [length - 1 for length in spread(lengths, num_sequences)]
    starts = [0] * min(num_rows, num_sequences)
    busy = [turns[i] for i in range(len(starts))]
    heapq.heapify(busy)
    for own in turns[len(starts) :]:
        start = busy[0]
        starts.append(start)
        heapq.heapreplace(busy, start + own)
    entries = Counter(Counter(starts).values())
    return Schedule(entries=entries, stretches=_stretches(starts, turns))


def _stretches(starts: Sequence[int], turns: Sequence[int]) -> list[Stretch]:
    """Live rows and their answered tokens over stretches of about equal length."""
    start = np.array(starts, dtype=np.int64)
    end = start + np.array(turns, dtype=np.int64)
    last = int(end.max())
    count = min(NUM_STRETCHES, last)
    bounds = [i * last // count for i in range(count + 1)] if count else []
    found = []
    for lo, hi in pairwise(bounds):
        first, behind = np.maximum(start, lo), np.minimum(end, hi)
        live = np.maximum(behind - first, 0)
        # In turn t a row that started at s has answered t - s + 1 tokens.
        answered = live * ((first + behind - 1) / 2.0 - start + 1.0)
        row_turns = float(live.sum())
        if row_turns:
            found.append(
                Stretch(turns=hi - lo, rows=row_turns / (hi - lo),
                        answered=float(answered.sum()) / row_turns)
            )  # fmt: skip
    return found
