"""Compiled: seconds that no plan is below because of who can share a device: ``pattern_bound_s``.

A *pattern* is a set of calls that one device takes part in. In T seconds a device can only have a
pattern whose calls take T together, whose calls between a role's reader and its training take no
more than these two leave of T, and whose bytes it has. Every call needs its number of devices, so
with x_S devices of pattern S

    least sum of x_S   such that   sum over S with c of x_S = n_c for every call c,   x >= 0

is at most the number of devices. If it is more, no plan takes T: a configuration linear program
(Gilmore and Gomory 1961), solved by the revised simplex method. The proof is its dual: with prices
y_c >= 0 of which no pattern has more than 1 in all, sum of n_c y_c devices are needed.
"""

from __future__ import annotations

import numpy as np

from planner.jit import compiled, entry
from planner.search.records import Floats, Ints

MOST_CALLS = 10  # 2^10 patterns
MOST_PIVOTS = 60  # then nothing is claimed
HALVINGS = 6
# Columns of ``pools``: least over the options of a call, bytes also over its stages.
DEVICES, SECONDS, BUSY, HELD, RUNNING = range(5)


@compiled
def list_patterns(
    pools: Floats, windows: Ints, moves_s: Floats, free_bytes: float, least_s: Floats
) -> None:  # fmt: skip
    """Fill ``least_s`` [2^C]: seconds of a step in which a device can have each pattern."""
    num_calls = len(pools)
    for pattern in range(len(least_s)):
        busy_s, held, running = 0.0, 0.0, 0.0
        for i in range(num_calls):
            if pattern >> i & 1:
                busy_s += pools[i, BUSY]
                held += pools[i, HELD]
                running = max(running, pools[i, RUNNING])
        for w in range(len(windows)):
            inside_s = pools[windows[w, 0], SECONDS] + pools[windows[w, 1], SECONDS] + moves_s[w]
            for i in range(num_calls):
                if pattern & windows[w, 2] & 1 << i:
                    inside_s += pools[i, SECONDS]
            busy_s = max(busy_s, inside_s)
        least_s[pattern] = busy_s if held + running <= free_bytes else np.inf


@compiled
def priciest(prices: Floats, least_s: Floats, step_s: float, worth: Floats) -> int:
    """The pattern that is possible in ``step_s`` and has the most of ``prices``."""
    best = 0
    for pattern in range(1, len(least_s)):
        i = 0
        while pattern >> i & 1 == 0:
            i += 1
        worth[pattern] = worth[pattern & (pattern - 1)] + prices[i]
        if least_s[pattern] <= step_s and worth[pattern] > worth[best]:
            best = pattern
    return best


@compiled
def pivot(inverse: Floats, amounts: Floats, pattern: int, column: Floats) -> bool:
    """Bring ``pattern`` into the basis; False where no amount falls."""
    num_calls, leaves, ratio = len(amounts), -1, np.inf
    for row in range(num_calls):
        column[row] = 0.0
        for i in range(num_calls):
            if pattern >> i & 1:
                column[row] += inverse[row, i]
        if column[row] > 1e-9 and amounts[row] / column[row] < ratio:
            leaves, ratio = row, amounts[row] / column[row]
    if leaves < 0:
        return False
    for i in range(num_calls):
        inverse[leaves, i] /= column[leaves]
    amounts[leaves] = ratio
    for row in range(num_calls):
        if row != leaves:
            amounts[row] -= column[row] * ratio
            for i in range(num_calls):
                inverse[row, i] -= column[row] * inverse[leaves, i]
    return True


@compiled
def too_many(
    pools: Floats, least_s: Floats, step_s: float, num_devices: float, room: Floats, worth: Floats
) -> bool:  # fmt: skip
    """Do the calls surely need more devices than there are, if a step takes ``step_s``?

    ``room``: the basis' inverse [C, C], then rows of amounts, prices and a column.
    """
    num_calls = len(pools)
    inverse, amounts, prices = room[:num_calls], room[num_calls], room[num_calls + 1]
    for i in range(num_calls):
        if least_s[1 << i] > step_s:
            return True
        amounts[i] = pools[i, DEVICES]
        for j in range(num_calls):
            inverse[i, j] = 1.0 if i == j else 0.0
    for _ in range(MOST_PIVOTS):
        needed, proven = 0.0, 0.0
        for j in range(num_calls):
            needed += amounts[j]
            prices[j] = 0.0
            for i in range(num_calls):
                prices[j] += inverse[i, j]
            prices[j] = max(0.0, prices[j])
            proven += prices[j] * pools[j, DEVICES]
        if needed <= num_devices:
            return False
        best = priciest(prices, least_s, step_s, worth)
        if proven > num_devices * (1.0 + 1e-9) * max(1.0, worth[best]):
            return True
        if worth[best] <= 1.0 + 1e-9:
            return False
        if not pivot(inverse, amounts, best, room[num_calls + 2]):
            return False
    return False


@entry
def pattern_bound_s(
    pools: Floats, windows: Ints, moves_s: Floats, num_devices: float, free_bytes: float,
    low_s: float, best_s: float, room: Floats, patterns: Floats,
) -> float:  # fmt: skip
    """Seconds, at least ``low_s``, that no plan is below; inf: nor is any below ``best_s``.

    ``pools`` [C, 5], ``windows`` [W, 3]: reader, training, calls between as bits; ``moves_s`` [W]:
    of the weights that go from that training to that reader. ``room`` [C + 3, C] and ``patterns``
    [2, 2^C], or larger, are written to.
    """
    least_s, worth = patterns[0, : 1 << len(pools)], patterns[1, : 1 << len(pools)]
    worth[0] = 0.0
    list_patterns(pools, windows, moves_s, free_bytes, least_s)
    low, high = low_s, 0.0
    for pattern in range(len(least_s)):
        if least_s[pattern] < np.inf:
            high = max(high, least_s[pattern])
    high = min(high, best_s)
    if too_many(pools, least_s, high, num_devices, room, worth):
        return np.inf
    for _ in range(HALVINGS):
        middle = (low + high) / 2.0
        if middle > low and too_many(pools, least_s, middle, num_devices, room, worth):
            low = middle
        else:
            high = middle
    # What is possible changes only where a pattern becomes possible.
    while too_many(pools, least_s, low, num_devices, room, worth):
        step_s = np.inf
        for pattern in range(len(least_s)):
            if low < least_s[pattern] < step_s:
                step_s = least_s[pattern]
        if step_s > high:
            break
        low = step_s
    return low
