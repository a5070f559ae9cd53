"""``DeviceMesh``: the block of devices that one call runs on.

A mesh is a run of whole nodes, or an aligned power-of-two slice of one node, so that meshes
nest or are disjoint inside a node and a tensor-parallel group never straddles two nodes. It lies in
one group of a cluster: a call runs on like devices, as its ranks wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from profiles.errors import PlanError
from profiles.hardware import Cluster, ClusterSpec


@dataclass(frozen=True, slots=True, order=True)
class DeviceMesh:
    """Devices ``first`` … ``first + num_devices - 1``."""

    first: int
    num_devices: int

    @property
    def devices(self) -> range:
        return range(self.first, self.first + self.num_devices)

    def overlaps(self, other: DeviceMesh) -> bool:
        return (
            self.first < other.first + other.num_devices
            and other.first < self.first + self.num_devices
        )

    def shifted(self, offset: int) -> DeviceMesh:
        """The same ``offset`` devices further."""
        return DeviceMesh(self.first + offset, self.num_devices)

    def __contains__(self, device: object) -> bool:
        return device in self.devices

    def __str__(self) -> str:
        last = self.first + self.num_devices - 1
        return f"[{self.first}]" if self.num_devices == 1 else f"[{self.first}-{last}]"


class MeshKind(NamedTuple):
    """Meshes on which a call may choose the same, and costs the same: of one size in one group."""

    group: int  # index of ``Cluster.groups``
    num_devices: int


def kind_of(mesh: DeviceMesh, cluster: Cluster) -> MeshKind:
    return MeshKind(cluster.group_index(mesh.first), mesh.num_devices)


class NodeGrid(NamedTuple):
    """Node of a device: ``(device - first) // size``."""

    first: int
    size: int


def node_grid(a: DeviceMesh, b: DeviceMesh, cluster: Cluster) -> NodeGrid:
    """Nodes as what goes from ``a`` to ``b`` sees them: those of ``b``'s group.

    Where ``a`` is in another one, its devices are in none of these: their numbers are below 0, or
    above all of the group's.
    """
    group = cluster.group_index(b.first)
    return NodeGrid(cluster.starts[group], cluster.groups[group].devices_per_node)


def node_edges(cluster: Cluster, *, most_nodes: int = 16) -> list[int]:
    """First devices of nodes, or of every so many where there are more, and the end; for figures.

    >>> from profiles.clusters import make_groups
    >>> node_edges(make_groups("h100:16+l40s:8"))
    [0, 8, 16, 24]
    """
    every = max(1, cluster.num_nodes // most_nodes)
    found = [
        start + node * group.devices_per_node
        for start, group in zip(cluster.starts, cluster.groups, strict=True)
        for node in range(0, group.num_nodes, every)
    ]
    ends = cluster.groups[-1].num_nodes % every == 0
    return [*found, cluster.num_devices] if ends else found


def check_mesh(mesh: DeviceMesh, cluster: Cluster, *, where: str) -> None:
    """Raise ``PlanError`` unless ``mesh`` is whole nodes or an aligned slice of one node."""
    count = mesh.num_devices
    if count < 1 or mesh.first < 0 or mesh.first + count > cluster.num_devices:
        raise PlanError(
            f"mesh {mesh} is outside the {cluster.num_devices} devices of the cluster", where=where
        )
    index = cluster.group_index(mesh.first)
    group, start = cluster.groups[index], cluster.starts[index]
    if mesh.first + count > start + group.num_devices:
        raise PlanError(
            f"mesh {mesh} leaves its group of like devices, "
            f"{DeviceMesh(start, group.num_devices)} ({group.device.name})",
            where=where, remedy="keep a call within one group",
        )  # fmt: skip
    per_node, first = group.devices_per_node, mesh.first - start
    if count % per_node == 0 and first % per_node == 0:
        return
    # A slice is aligned within its node, whose size need not be a power of two.
    offset = first % per_node
    if count & (count - 1) == 0 and offset % count == 0 and offset + count <= per_node:
        return
    raise PlanError(
        f"mesh {mesh} is neither whole nodes of {per_node} nor an aligned power-of-two part of one",
        where=where,
        remedy=f"start at a multiple of the mesh's size, or use multiples of {per_node} devices",
    )


def enumerate_meshes(cluster: Cluster) -> Iterator[DeviceMesh]:
    """Every legal mesh, group after group, small ones of each first."""
    for start, group in zip(cluster.starts, cluster.groups, strict=True):
        for mesh in _meshes_of_nodes(group):
            yield mesh.shifted(start)


def _meshes_of_nodes(cluster: ClusterSpec) -> Iterator[DeviceMesh]:
    per_node = cluster.devices_per_node
    size = 1
    while size < per_node:
        for node in range(cluster.num_nodes):
            for offset in range(0, per_node - size + 1, size):
                yield DeviceMesh(node * per_node + offset, size)
        size *= 2
    for nodes in range(1, cluster.num_nodes + 1):
        for first in range(cluster.num_nodes - nodes + 1):
            yield DeviceMesh(first * per_node, nodes * per_node)
