"""Protects the filling of holes in a grid: exact where the form is exact, silent outside."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.holes import Coordinates, fill_holes

AXIS = (1.0, 2.0, 4.0, 16.0, 32.0)


def grid(*slopes: float) -> dict[Coordinates, float]:
    """A plane over the logarithms."""
    return {
        point: sum(a * math.log(x) for a, x in zip(slopes, point))
        for point in product(AXIS, repeat=len(slopes))
    }


@given(
    slopes=st.tuples(*[st.floats(-2, 2)] * 3),
    hole=st.tuples(*[st.sampled_from(AXIS)] * 3),
)
def test_a_plane_is_restored(slopes: tuple[float, ...], hole: Coordinates) -> None:
    points = grid(*slopes)
    value = points.pop(hole)
    found = fill_holes(points)
    inside = any(x not in (AXIS[0], AXIS[-1]) for x in hole)
    assert set(found) == ({hole} if inside else set()), "a corner has neighbours on one side only"
    if inside:
        assert found[hole] == pytest.approx(value, abs=1e-9)


def test_the_dimension_that_predicts_better_counts_more() -> None:
    """Smooth along the first, steps along the second."""
    points = {(x, y): math.log(x) + (j % 2) * 1.0 for x in AXIS for j, y in enumerate(AXIS)}
    value = points.pop((4.0, 4.0))
    (found,) = fill_holes(points).values()
    assert found == pytest.approx(value, abs=0.01), "the second alone would be 1 off"


def test_a_whole_grid_has_no_holes() -> None:
    assert fill_holes(grid(1.0, 1.0)) == {}
    assert fill_holes({}) == {}
