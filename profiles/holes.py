"""Points that a rectangular grid lacks, from their neighbours along each dimension.

A neighbourly estimate along one dimension is linear in its logarithm. How far such estimates are
from the points that are there, in the mean, says how much each dimension is worth: estimates are
averaged with the inverse squares of these errors (inverse-variance weighting). On a point that is
missing in a corner, with no neighbour on both sides of any dimension, nothing is said.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from itertools import product
from statistics import mean

Coordinates = tuple[float, ...]
_Line = tuple[list[float], list[float]]  # coordinates, ascending, and values

# Of the points that are there so many are enough to tell what a dimension is worth.
_SAMPLES = 2000


def fill_holes(points: Mapping[Coordinates, float]) -> dict[Coordinates, float]:
    """Values of the points of the grid's rectangle that are not among ``points``.

    >>> fill_holes({(1.0, 1.0): 0.0, (4.0, 1.0): 2.0, (1.0, 2.0): 1.0, (2.0, 2.0): 2.0,
    ...             (4.0, 2.0): 3.0})
    {(2.0, 1.0): 1.0}
    """
    if not points:
        return {}
    axes = [sorted({point[i] for point in points}) for i in range(len(next(iter(points))))]
    missing = [point for point in product(*axes) if point not in points]
    if not missing:
        return {}
    lines = [_lines(points, i) for i in range(len(axes))]
    weights = [_weight(points, line, i) for i, line in enumerate(lines)]
    found: dict[Coordinates, float] = {}
    for point in missing:
        guesses = [_between(line, point, i) for i, line in enumerate(lines)]
        known = [(w, g) for w, g in zip(weights, guesses, strict=True) if g is not None]
        total = sum(weight for weight, _ in known)
        if total > 0:
            found[point] = sum(weight * guess for weight, guess in known) / total
    return found


def _lines(points: Mapping[Coordinates, float], axis: int) -> dict[Coordinates, _Line]:
    """The other coordinates -> the points along ``axis``."""
    lines: dict[Coordinates, _Line] = {}
    for point in sorted(points):
        coordinates, values = lines.setdefault(_without(point, axis), ([], []))
        coordinates.append(point[axis])
        values.append(points[point])
    return lines


def _without(point: Coordinates, axis: int) -> Coordinates:
    return point[:axis] + point[axis + 1 :]


def _between(lines: Mapping[Coordinates, _Line], point: Coordinates, axis: int) -> float | None:
    """The value at ``point`` from its neighbours along ``axis``, itself left out."""
    coordinates, values = lines.get(_without(point, axis), ([], []))
    above = below = bisect_left(coordinates, point[axis])
    if above < len(coordinates) and coordinates[above] == point[axis]:
        above += 1
    if below == 0 or above == len(coordinates):
        return None
    low, high = math.log(coordinates[below - 1]), math.log(coordinates[above])
    share = (math.log(point[axis]) - low) / (high - low)
    return values[below - 1] + share * (values[above] - values[below - 1])


def _weight(
    points: Mapping[Coordinates, float], lines: Mapping[Coordinates, _Line], axis: int
) -> float:
    """1 / (mean error of points that are there, each predicted along ``axis``) squared."""
    errors = [
        abs(guess - points[point])
        for point in _spread(points)
        if (guess := _between(lines, point, axis)) is not None
    ]
    return 1.0 / max(mean(errors), 1e-6) ** 2 if errors else 0.0


def _spread(points: Iterable[Coordinates]) -> list[Coordinates]:
    """Some of the points, from everywhere: the step is odd, so that no dimension is skipped."""
    ordered = sorted(points)
    return ordered[:: max(1, len(ordered) // _SAMPLES) | 1]
