"""Protects interpolation: exact at its points, between its neighbours' values, honest outside."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles.costs import Provenance
from profiles.interpolate import Messages, Surface

sizes = st.integers(1, 1 << 20)
lengths = st.integers(1, 1 << 14)
grids = st.dictionaries(
    st.tuples(sizes, lengths), st.floats(1e-6, 10.0), min_size=1, max_size=12
)  # fmt: skip


@settings(deadline=None)
@given(grids)
def test_every_point_is_given_back_exactly(points: dict[tuple[int, int], float]) -> None:
    surface = Surface(points)
    for (size, length), seconds in points.items():
        assert surface.at(size, length).seconds == pytest.approx(seconds, rel=1e-12)
        assert surface.at(size, length).provenance is Provenance.MEASURED


@settings(deadline=None)
@given(grids, sizes, lengths)
def test_no_answer_is_below_every_measurement_or_not_finite(
    points: dict[tuple[int, int], float], size: int, length: int
) -> None:
    least_per_unit = min(seconds / size for (size, _), seconds in points.items())
    seconds = Surface(points).at(size, length).seconds
    assert 0 < seconds < float("inf")
    assert seconds >= least_per_unit * size * (1 - 1e-9)


@settings(deadline=None)
@given(st.floats(0.5, 1.5), st.floats(0.0, 0.5), sizes, lengths)
def test_a_power_law_is_reproduced_inside_its_range(
    a: float, b: float, size: int, length: int
) -> None:
    """seconds = size^a * length^b is a plane in logarithms."""
    corners = [(1, 1), (1, 1 << 14), (1 << 20, 1), (1 << 20, 1 << 14), (1 << 10, 1 << 7)]
    surface = Surface({(s, n): s**a * n**b for s, n in corners})
    # On the middle size only one length is known: away from it use the corners alone.
    surface_of_corners = Surface({(s, n): s**a * n**b for s, n in corners[:4]})
    found = surface_of_corners.at(size, length)
    assert found.seconds == pytest.approx(size**a * length**b, rel=1e-9)
    assert found.provenance is not Provenance.EXTRAPOLATED
    assert surface.at(1 << 10, 1 << 7).seconds == pytest.approx((1 << 10) ** a * (1 << 7) ** b)


def test_beyond_the_largest_size_efficiency_is_constant() -> None:
    surface = Surface({(100, 0): 1.0, (200, 0): 1.5})
    assert surface.at(800, 0).seconds == pytest.approx(6.0)
    assert surface.at(800, 0).provenance is Provenance.EXTRAPOLATED


def test_below_the_smallest_size_seconds_are_constant() -> None:
    surface = Surface({(100, 0): 1.0, (200, 0): 1.5})
    assert surface.at(1, 0).seconds == 1.0
    assert surface.at(1, 0).provenance is Provenance.EXTRAPOLATED


def test_one_length_stands_for_all() -> None:
    """The embedding's cost does not depend on the length: it is measured at length 0."""
    surface = Surface({(100, 0): 1.0, (200, 0): 2.0})
    assert surface.at(100, 4096).provenance is Provenance.MEASURED
    assert surface.at(150, 4096).provenance is Provenance.INTERPOLATED


def test_a_longer_context_goes_on_as_a_line() -> None:
    surface = Surface({(8, 1000): 1.0, (8, 2000): 1.5})
    assert surface.at(8, 4000).seconds == pytest.approx(2.5)
    assert surface.at(8, 4000).provenance is Provenance.EXTRAPOLATED
    falling = Surface({(8, 1000): 1.0, (8, 2000): 0.9})  # noise must not reach zero
    assert falling.at(8, 10**6).seconds == pytest.approx(0.9)


def test_a_triangular_grid_is_covered() -> None:
    """Packed tokens: a length can only be measured where the size holds a sequence of it."""
    surface = Surface({(256, 256): 1.0, (1024, 256): 3.0, (1024, 1024): 4.0})
    between = surface.at(512, 256)
    assert between.provenance is Provenance.INTERPOLATED
    # Efficiency in logarithms: seconds / size is the geometric mean of the neighbours'.
    assert between.seconds == pytest.approx(512 * ((1.0 / 256) * (3.0 / 1024)) ** 0.5)
    # The smaller neighbour has no such length, the larger one has it between two.
    assert surface.at(512, 512).provenance is Provenance.INTERPOLATED
    assert surface.at(256, 512).provenance is Provenance.EXTRAPOLATED
    assert surface.at(512, 2048).provenance is Provenance.EXTRAPOLATED
    assert between.seconds < surface.at(512, 512).seconds < 4.0


# ---- messages ---------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.floats(1e-6, 1e-3), st.floats(1e-12, 1e-8), st.integers(1 << 10, 1 << 20))
def test_a_start_and_a_rate_are_reproduced_between_sizes(
    start_s: float, s_per_byte: float, num_bytes: int
) -> None:
    messages = Messages({(n, 4): start_s + s_per_byte * n for n in (1 << 10, 1 << 14, 1 << 20)})
    found = messages.at(num_bytes, 4)
    assert found.seconds == pytest.approx(start_s + s_per_byte * num_bytes, rel=1e-9)
    assert found.provenance is not Provenance.EXTRAPOLATED


def test_between_two_numbers_of_workers_seconds_are_their_geometric_mean() -> None:
    messages = Messages({(100, 2): 1.0, (200, 2): 2.0, (100, 8): 4.0, (200, 8): 8.0})
    assert messages.at(100, 4).seconds == pytest.approx(2.0)
    assert messages.at(150, 4).seconds == pytest.approx((1.5 * 6.0) ** 0.5)
    assert messages.at(100, 4).provenance is Provenance.INTERPOLATED
    assert messages.at(400, 4).provenance is Provenance.EXTRAPOLATED
