"""``DeviceMesh``: the block of devices that one call runs on.

A mesh is a run of whole nodes, or an aligned power-of-two slice of one node, so that meshes
nest or are disjoint inside a node and a tensor-parallel group never straddles two nodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from profiles.errors import PlanError
from profiles.hardware import ClusterSpec


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

    def __contains__(self, device: object) -> bool:
        return device in self.devices

    def __str__(self) -> str:
        last = self.first + self.num_devices - 1
        return f"[{self.first}]" if self.num_devices == 1 else f"[{self.first}-{last}]"


def check_mesh(mesh: DeviceMesh, cluster: ClusterSpec, *, where: str) -> None:
    """Raise ``PlanError`` unless ``mesh`` is whole nodes or an aligned slice of one node."""
    per_node, count = cluster.devices_per_node, mesh.num_devices
    if count < 1 or mesh.first < 0 or mesh.first + count > cluster.num_devices:
        raise PlanError(
            f"mesh {mesh} is outside the {cluster.num_devices} devices of the cluster", where=where
        )
    if count % per_node == 0 and mesh.first % per_node == 0:
        return
    # A slice is aligned within its node, whose size need not be a power of two.
    offset = mesh.first % per_node
    if count & (count - 1) == 0 and offset % count == 0 and offset + count <= per_node:
        return
    raise PlanError(
        f"mesh {mesh} is neither whole nodes of {per_node} nor an aligned power-of-two part of one",
        where=where,
        remedy=f"start at a multiple of the mesh's size, or use multiples of {per_node} devices",
    )


def enumerate_meshes(cluster: ClusterSpec) -> Iterator[DeviceMesh]:
    """Every legal mesh, small ones first."""
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
