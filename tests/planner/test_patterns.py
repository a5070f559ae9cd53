"""Protects the bound by patterns: against every way to share out devices, and by hand."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from planner.search.patterns import pattern_bound_s

FREE = 10.0


def bound_of(
    pools: np.ndarray, windows: np.ndarray, num_devices: int, best_s: float = math.inf
) -> float:
    count = len(pools)
    return pattern_bound_s(
        pools, windows, np.zeros(len(windows)), float(num_devices), FREE, 0.0, best_s,
        np.zeros((count + 3, count)), np.zeros((2, 1 << count)),
    )  # fmt: skip


def random_pools(rng: random.Random, count: int, num_devices: int) -> np.ndarray:
    rows = []
    for _ in range(count):
        seconds = rng.uniform(1, 10)
        rows.append((rng.randint(1, num_devices), seconds, seconds + rng.choice([0, 1]),
                     rng.uniform(0, 4), rng.uniform(0, 5)))  # fmt: skip
    return np.array(rows, dtype=float)


def seconds_of(pools: np.ndarray, windows: np.ndarray, pattern: frozenset[int]) -> float:
    """Of a step in which a device has these calls; inf where they do not fit."""
    bytes_ = sum(pools[i, 3] for i in pattern) + max((pools[i, 4] for i in pattern), default=0)
    if bytes_ > FREE:
        return math.inf
    inside = [
        pools[first, 1] + pools[last, 1] + sum(pools[i, 1] for i in pattern if mask >> i & 1)
        for first, last, mask in windows.tolist()
    ]
    return max([sum(pools[i, 2] for i in pattern), *inside])


def best_of(pools: np.ndarray, windows: np.ndarray, num_devices: int) -> float:
    """Brute force over the devices of every call."""
    sets = [
        list(itertools.combinations(range(num_devices), int(pools[i, 0])))
        for i in range(len(pools))
    ]
    best = math.inf
    for chosen in itertools.product(*sets):
        patterns = {
            frozenset(i for i, own in enumerate(chosen) if device in own)
            for device in range(num_devices)
        }
        best = min(best, max(seconds_of(pools, windows, p) for p in patterns))
    return best


@pytest.mark.parametrize("seed", range(40))
def test_no_placement_is_faster(seed: int) -> None:
    rng = random.Random(seed)
    count, num_devices = rng.choice([(2, 4), (3, 4), (4, 3)])
    pools = random_pools(rng, count, num_devices)
    windows = np.array([(0, count - 1, (1 << (count - 1)) - 2)][: rng.choice([0, 1])],
                       dtype=np.int64).reshape(-1, 3)  # fmt: skip
    best = best_of(pools, windows, num_devices)
    found = bound_of(pools, windows, num_devices)
    assert found <= best
    if math.isfinite(best):  # a plan that is no faster than the best is not looked for
        assert bound_of(pools, windows, num_devices, best * 0.999) in (math.inf, found)
        assert bound_of(pools, windows, num_devices, best * 1.001) == found


def test_of_three_calls_that_crowd_each_other_two_share_a_device() -> None:
    """64 + 48 + 64 of 128 devices: area alone would allow 6.1 s."""
    pools = np.array([(64, 4.05, 4.05, 0, 0), (48, 5.5, 5.5, 0, 0), (64, 4.1, 4.1, 0, 0)])
    none = np.zeros((0, 3), dtype=np.int64)
    assert bound_of(pools, none, 128) == pytest.approx(4.05 + 4.1)


def test_who_does_not_fit_beside_another_needs_devices_of_its_own() -> None:
    """Seconds would allow both on all devices."""
    none = np.zeros((0, 3), dtype=np.int64)
    pools = np.array([(5, 1, 1, 4, 4), (4, 1, 1, 4, 4)], dtype=float)
    assert bound_of(pools, none, 8) == math.inf
    assert bound_of(pools, none, 9) == pytest.approx(1.0)
