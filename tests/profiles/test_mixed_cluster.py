"""Protects clusters of unlike nodes: who is where, which link joins whom, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.clusters import local_cluster, make_cluster, make_groups
from profiles.errors import ConfigError
from profiles.hardware import Cluster, ClusterSpec, LinkSpec, MixedCluster
from tests.planner.plans import make_mixed_cluster, make_test_cluster

shapes = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=2, max_size=4)


def cluster_of(shapes: list[tuple[int, int]]) -> MixedCluster:
    """Groups with links of their own: 100, 200, … bytes/s inside nodes, 10, 20, … between them."""
    groups = []
    for index, shape in enumerate(shapes, start=1):
        link = LinkSpec(bytes_per_s=100.0 * index, latency_s=0.0)
        between = LinkSpec(bytes_per_s=10.0 * index, latency_s=1.0 / index)
        groups.append(replace(make_test_cluster(*shape), intra_link=link, inter_link=between))
    return make_mixed_cluster(*groups)


@given(shapes)
def test_devices_and_nodes_are_numbered_on_from_group_to_group(
    shapes: list[tuple[int, int]],
) -> None:
    """Oracle: the list of all devices, node after node."""
    cluster = cluster_of(shapes)
    listed = [
        (group, sum(nodes for nodes, _ in shapes[:group]) + node)
        for group, (nodes, per_node) in enumerate(shapes)
        for node in range(nodes)
        for _ in range(per_node)
    ]
    assert cluster.num_devices == len(listed)
    assert cluster.num_nodes == len({node for _, node in listed})
    for device, (group, node) in enumerate(listed):
        assert cluster.group_index(device) == group
        assert cluster.group_of(device) is cluster.groups[group]
        assert cluster.node_of(device) == node
    for start, group in zip(cluster.starts, cluster.groups, strict=True):
        assert cluster.group_of(start) is group


@given(shapes, st.data())
def test_a_message_takes_the_slower_of_two_networks_and_the_longer_latency(
    shapes: list[tuple[int, int]], data: st.DataObject
) -> None:
    cluster = cluster_of(shapes)
    devices = st.integers(0, cluster.num_devices - 1)
    a, b = data.draw(devices), data.draw(devices)
    found, i, j = cluster.link_between(a, b), cluster.group_index(a), cluster.group_index(b)
    if i != j:
        assert found.bytes_per_s == 10.0 * (min(i, j) + 1)
        assert found.latency_s == 1.0 / (min(i, j) + 1)
    else:
        near = cluster.node_of(a) == cluster.node_of(b)
        assert found.bytes_per_s == (100.0 if near else 10.0) * (i + 1)


def test_equal_nodes_are_one_group() -> None:
    """What asks for the group of a device gets the same answer as before there were groups."""
    cluster: Cluster = make_cluster("a100", 16)
    assert cluster.groups == (cluster,)
    assert cluster.starts == (0,)
    assert cluster.group_of(15) is cluster


def test_a_memory_limit_leaves_smaller_devices_as_they_are() -> None:
    cluster = make_groups("h100:8+l40s:8").with_memory_limit(60 * 2**30)
    h100, l40s = (group.device.memory_bytes for group in cluster.groups)
    assert h100 == 60 * 2**30
    assert l40s == make_cluster("l40s", 8).device.memory_bytes


def test_groups_by_name() -> None:
    cluster = make_groups("h100:16, p4d:8")
    assert cluster.groups == (make_cluster("h100", 16), make_cluster("p4d", 8))
    assert cluster.name == str(cluster) == "16 x h100 + p4d, 8 x a100-40g"
    assert make_groups("h100:16") == make_cluster("h100", 16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h100:16+l40s", r"--device: 'l40s' is no group of devices; write NAME:NUMBER"),
        ("h100:16+l40s:x", r"'l40s:x' is no group"),
        ("h100:16+", r"'' is no group"),
        ("h100:16+l40x:8", r"l40x:8: unknown device or cluster 'l40x'"),
        ("h100:12+l40s:8", r"h100:12: 12 devices do not fill nodes of 8 h100; use 8 or 16"),
        ("h100:8+cpu:2", r"cpu is one machine, not a group of nodes"),
    ],
)
def test_a_group_that_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_groups(text)


def test_what_is_no_cluster_of_groups_is_refused() -> None:
    gpu, cpu = make_cluster("a100", 8), local_cluster(2)
    with pytest.raises(ConfigError, match=r"cluster.groups: 1 groups; give two or more"):
        MixedCluster(name="x", groups=(gpu,))
    with pytest.raises(ConfigError, match=r"kinds cpu and cuda; plan for one kind"):
        MixedCluster(name="x", groups=(gpu, cpu))
    many: ClusterSpec = make_cluster("a100", 2**17)
    with pytest.raises(ConfigError, match=r"131080 devices; at most 131072"):
        MixedCluster(name="x", groups=(many, gpu))
