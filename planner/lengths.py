"""Lengths of answers as a short list, of which each is equally likely.

A step's answers differ in length, and generation is over when the last one ends. An estimate
takes a list of a few dozen lengths: of a lognormal distribution, or of answers that were seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import NormalDist

from profiles.errors import ConfigError

# Lengths of a list: the last is the mean of the longest 1.6%, and a search hashes it often.
MOST_LENGTHS = 64
_P95 = NormalDist().inv_cdf(0.95)


def lognormal_sigma(mean: float, p95: float) -> float:
    """The sigma of a lognormal distribution with this mean and 95th percentile.

    With z = 1.645: ln(p95 / mean) = z sigma - sigma^2 / 2, of whose two solutions the smaller.

    >>> round(lognormal_sigma(400, 1000), 3)
    0.711

    Raises:
        ConfigError: p95 is not above the mean, or above exp(z^2 / 2) = 3.87 times the mean,
            which no lognormal distribution reaches.
    """
    most = math.exp(_P95**2 / 2)
    if not mean < p95 <= most * mean:
        raise ConfigError(
            f"{p95:g} is not above the mean of {mean:g} and at most {most:.2f} times it",
            where="data.response_p95", remedy="give data.response_sigma or data.response_lengths",
        )  # fmt: skip
    return _P95 - math.sqrt(max(0.0, _P95**2 - 2 * math.log(p95 / mean)))


def lognormal_lengths(mean: float, sigma: float, longest: int) -> tuple[int, ...]:
    """Lengths of a lognormal distribution of this mean, cut off at ``longest``.

    ``sigma``: standard deviation of the logarithm. What is cut off counts at ``longest``, as an
    answer that reaches it, so the list's mean is below ``mean``.

    >>> lognormal_lengths(100, 0.0, 1000) == (100,)
    True
    """
    if sigma == 0:
        return summary([min(longest, max(1, round(mean)))])
    normal = NormalDist(math.log(mean) - sigma**2 / 2, sigma)
    count = 32 * MOST_LENGTHS
    found = (math.exp(normal.inv_cdf((i + 0.5) / count)) for i in range(count))
    return summary([min(longest, max(1, round(length))) for length in found])


def summary(lengths: Sequence[int]) -> tuple[int, ...]:
    """At most ``MOST_LENGTHS`` lengths in order: means of equally many neighbours of ``lengths``.

    >>> summary([7, 3, 5])
    (3, 5, 7)
    >>> summary([4] * 1000)
    (4,)
    """
    ordered = sorted(lengths)
    if ordered[0] == ordered[-1]:
        return (ordered[0],)
    count = min(len(ordered), MOST_LENGTHS)
    bounds = [i * len(ordered) // count for i in range(count + 1)]
    parts = [ordered[a:b] for a, b in pairwise(bounds)]
    return tuple(round(sum(part) / len(part)) for part in parts)
