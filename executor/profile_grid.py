"""Which points are measured: a coarse grid, and more lines where interpolation misses.

Read ``explore`` first. A held-out point halfway between two neighbours is predicted from what is
known, then measured; where the prediction is off, the whole line through the point is added and
both halves are looked at in turn, until the time that a component has is used up. How a point
is measured and how it is predicted are arguments: nothing here knows of tensors or files.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from executor.profile_measure import Measurement

Point = tuple[int, int]  # (size, length)
Found = dict[Point, dict[str, Measurement]]  # point -> operation -> seconds of one layer

Axis = Literal[0, 1]
SIZE: Axis = 0
LENGTH: Axis = 1

ERROR_LIMIT = 0.05
# Neighbours closer than this ratio are not looked between.
SMALLEST_RATIO = 1.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """``sizes`` x ``lengths``, ascending. ``whole``: a point needs size >= length (packed

    tokens of whole sequences) and not only some sequences of a context.
    """

    sizes: tuple[int, ...]
    lengths: tuple[int, ...]
    whole: bool = False

    def holds(self, point: Point) -> bool:
        size, length = point
        return not self.whole or (size >= length and size % max(1, length) == 0)

    def points(self) -> list[Point]:
        """Cheap ones first."""
        points = [(size, length) for size in self.sizes for length in self.lengths]
        return sorted(filter(self.holds, points), key=lambda p: (p[0], p[1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is explored. ``measure(point, cap_s)``: every operation; ``predict(found, operation,

    point)``: seconds; ``depth(point)``: layers that are run to measure one.
    """

    measure: Callable[[Point, float], dict[str, Measurement]]
    predict: Callable[[Found, str, Point], float]
    depth: Callable[[Point], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """A point that was predicted before it was measured."""

    operation: str
    point: Point
    predicted_s: float
    measured_s: float

    @property
    def error(self) -> float:
        """Relative; above zero where the prediction is too long."""
        return self.predicted_s / self.measured_s - 1.0


class Allowance:
    """Seconds that a component may take; all workers see the slowest one's clock."""

    def __init__(self, seconds: float, agree: Callable[[float], float]) -> None:
        self.seconds = seconds
        self.agree = agree
        self.start_s = time.perf_counter()

    def left_s(self, *, stretch: float = 1.0) -> float:
        """Of ``stretch`` times the seconds; below zero where they are used up."""
        return self.seconds * stretch - self.agree(time.perf_counter() - self.start_s)


# Three samples, each of a forward alone and a forward with backward: 4/3 of what is read.
RUNS_A_POINT = 4.5
# The coarse grid may take so much more, where the machine is busy with something else.
COARSE_STRETCH = 1.5
LEAST_CAP_S, LARGEST_CAP_S = 0.15, 2.0


def explore(
    grid: Grid, target: Target, allowance: Allowance, *, tick: Callable[[Point], None]
) -> tuple[Found, list[HeldOut]]:
    """What was measured on ``grid`` and between its points, and how well it was predicted.

    Points that cannot be measured in the time left are left out, the first one never.
    ``tick`` hears of every point before it is measured.
    """
    search = _Search(grid, target, allowance, tick)
    search.coarse()
    search.refine()
    return search.found, search.held_out


class _Search:
    def __init__(
        self, grid: Grid, target: Target, allowance: Allowance, tick: Callable[[Point], None]
    ) -> None:
        self.grid, self.target, self.allowance, self.tick = grid, target, allowance, tick
        self.found: Found = {}
        self.held_out: list[HeldOut] = []

    def coarse(self) -> None:
        points = self.grid.points()
        for index, point in enumerate(points):
            left_s = self.allowance.left_s(stretch=COARSE_STRETCH)
            # Cheap points are worth more than the time they take.
            if self.found and RUNS_A_POINT * self._guess_s(point) > max(left_s, LEAST_CAP_S):
                continue
            weight = _work(point) / sum(_work(p) for p in points[index:])
            self.found[point] = self._measure(point, 0.7 * self.allowance.left_s() * weight)

    def refine(self) -> None:
        """Looks between the lengths first, then between the sizes."""
        queue: deque[tuple[Axis, int, int]] = deque()
        for axis in (LENGTH, SIZE):
            values = self._values(axis)
            queue.extend((axis, a, b) for a, b in pairwise(values))
        while queue:
            axis, low, high = queue.popleft()
            middle = round_to_power(math.sqrt(low * high)) if low else 0
            line = self._line(axis, middle)
            if high < SMALLEST_RATIO * low or not low < middle < high or not line:
                continue
            if self._missed(axis, line):
                queue += [(axis, low, middle), (axis, middle, high)]

    def _missed(self, axis: Axis, line: Sequence[Point]) -> bool:
        """Whether the middle of a line was predicted badly; then all of the line is measured."""
        tested = line[len(line) // 2]
        if not self._affordable(tested):
            return False
        operations = next(iter(self.found.values()))
        predicted = {op: self.target.predict(self.found, op, tested) for op in operations}
        measured = self._measure(tested, self.allowance.left_s() / 8)
        errors = [
            HeldOut(operation=op, point=tested, predicted_s=guess, measured_s=measured[op].seconds)
            for op, guess in predicted.items()
            if op in measured
        ]
        self.held_out += errors
        missed = _total_error(errors) > ERROR_LIMIT
        # A single point of a new size would stand for all lengths: only with its line.
        if missed or axis == LENGTH or len(line) == 1:
            self.found[tested] = measured
        for point in line:
            if missed and point not in self.found and self._affordable(point):
                self.found[point] = self._measure(point, self.allowance.left_s() / 8)
        return missed

    def _measure(self, point: Point, cap_s: float) -> dict[str, Measurement]:
        self.tick(point)
        return self.target.measure(point, min(LARGEST_CAP_S, max(LEAST_CAP_S, cap_s)))

    def _values(self, axis: int) -> list[int]:
        return sorted({point[axis] for point in self.found})

    def _line(self, axis: Axis, value: int) -> list[Point]:
        """The new points at ``value`` of one axis, along the values that the other axis has."""
        others = self._values(1 - axis)
        line = [(value, other) if axis == SIZE else (other, value) for other in others]
        return [point for point in line if self.grid.holds(point) and point not in self.found]

    def _affordable(self, point: Point) -> bool:
        return RUNS_A_POINT * self._guess_s(point) < self.allowance.left_s()

    def _guess_s(self, point: Point) -> float:
        """Seconds of one run of ``point``: its nearest neighbour's by work, and as they grew."""
        near = min(self.found, key=lambda p: abs(math.log(_work(p) / _work(point))))
        smaller = [p for p in self.found if p[0] < near[0] and _work(p) < _work(near)]
        power = 0.5
        if smaller:
            before = max(smaller, key=_work)
            growth = math.log(self._layer_s(near) / self._layer_s(before))
            power = min(1.2, max(0.0, growth / math.log(_work(near) / _work(before))))
        ratio = max(1.0, _work(point) / _work(near))
        return self._layer_s(near) * self.target.depth(point) * ratio**power

    def _layer_s(self, point: Point) -> float:
        return sum(measured.seconds for measured in self.found[point].values())


def _total_error(errors: Sequence[HeldOut]) -> float:
    """Of the operations together: an error of a cheap one beside a dear one does not count."""
    measured_s = sum(e.measured_s for e in errors)
    return sum(abs(e.predicted_s - e.measured_s) for e in errors) / measured_s if errors else 1.0


def _work(point: Point) -> float:
    """Up to a factor: tokens, and a share for the length that attention looks at."""
    size, length = point
    return size * (1.0 + length / 2048)


def round_to_power(value: float) -> int:
    """The nearest power of two by ratio, so that points divide each other.

    >>> round_to_power(90)
    64
    """
    return 2 ** round(math.log2(value))
