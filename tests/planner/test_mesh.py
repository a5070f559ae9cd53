"""Protects the shape of meshes: whole nodes or aligned slices of one, and all of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.mesh import DeviceMesh, check_mesh, enumerate_meshes
from profiles.errors import PlanError
from tests.planner.plans import make_test_cluster

nodes = st.integers(1, 4)
per_node = st.sampled_from([1, 2, 3, 4, 6, 8])


@given(nodes, per_node)
def test_enumerated_meshes_are_exactly_the_legal_ones(num_nodes: int, devices: int) -> None:
    """Oracle: ``check_mesh`` on every run of devices."""
    cluster = make_test_cluster(num_nodes, devices)
    legal = set()
    for first in range(cluster.num_devices):
        for count in range(1, cluster.num_devices - first + 1):
            try:
                check_mesh(DeviceMesh(first, count), cluster, where="mesh")
            except PlanError:
                continue
            legal.add(DeviceMesh(first, count))
    found = list(enumerate_meshes(cluster))
    assert len(found) == len(set(found))
    assert set(found) == legal


@given(nodes, per_node)
def test_slices_nest_or_are_apart(num_nodes: int, devices: int) -> None:
    cluster = make_test_cluster(num_nodes, devices)
    slices = [m for m in enumerate_meshes(cluster) if m.num_devices < devices]
    for a in slices:
        for b in slices:
            common = set(a.devices) & set(b.devices)
            assert a.overlaps(b) == bool(common)
            assert common in (set(), set(a.devices), set(b.devices))


@pytest.mark.parametrize(
    ("first", "count", "message"),
    [
        (1, 2, "neither whole nodes of 8 nor an aligned"),
        (0, 3, "neither whole nodes"),
        (4, 8, "neither whole nodes"),
        (8, 16, r"\[8-23\] is outside the 16 devices"),
        (0, 0, "outside"),
    ],
)
def test_an_illegal_mesh_is_named(first: int, count: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_mesh(DeviceMesh(first, count), make_test_cluster(2, 8), where="allocations.x.mesh")
