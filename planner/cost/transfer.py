"""Seconds of moving weights between layouts and data between meshes.

All messages of a reallocation run together; a device is done when its own bytes have passed, so
the slowest device counts. Bytes within a node and between nodes take different links and overlap;
out and in are both directions of one link.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from planner.cost.model import CostModel
from planner.layout import Layout
from planner.mesh import DeviceMesh
from planner.reallocation import route_values, routes
from profiles.hardware import ClusterSpec

_Lane = tuple[int, str, str]  # (device, "in" or "out", "intra" or "inter")


def reallocation_seconds(
    src: Layout, dst: Layout, *, bytes_per_value: int, model: CostModel
) -> float:
    """Seconds until every device of ``dst`` holds its layout.

    max over devices, directions and link classes of bytes / bandwidth + one latency for each
    message, plus max over devices of the passes over memory: what is sent is packed, what comes
    is unpacked and what stays is copied, one read and one write each, and the new buffer is
    cleared. The executor does these on the device that also sends, so they add up.
    """
    src, dst = _at_the_start(src, dst, model.cluster)
    question = (src, dst, bytes_per_value)
    seconds = model.known_reallocations.get(question)
    if seconds is None:
        seconds = _reallocation_s(src, dst, bytes_per_value, model)
        model.known_reallocations[question] = seconds
    return seconds


def _at_the_start(src: Layout, dst: Layout, cluster: ClusterSpec) -> tuple[Layout, Layout]:
    """Both layouts moved by the same number of whole nodes, which changes no link."""
    per_node = cluster.devices_per_node
    shift = min(src.mesh.first, dst.mesh.first) // per_node * per_node
    if shift == 0:
        return src, dst
    near, far = (
        replace(x, mesh=DeviceMesh(x.mesh.first - shift, x.mesh.num_devices)) for x in (src, dst)
    )
    return near, far


def _reallocation_s(src: Layout, dst: Layout, bytes_per_value: int, model: CostModel) -> float:
    cluster = model.cluster
    lanes: dict[_Lane, int] = defaultdict(int)
    messages: dict[_Lane, int] = defaultdict(int)
    passes: dict[int, int] = defaultdict(int)  # bytes read or written on each device
    for route in routes(src, dst, devices_per_node=cluster.devices_per_node):
        num_bytes = route_values(src.spec, route) * bytes_per_value
        passes[route.dst] += 3 * num_bytes  # read, written, and cleared before
        if route.src == route.dst:
            continue
        passes[route.src] += 2 * num_bytes
        inside = cluster.node_of(route.src) == cluster.node_of(route.dst)
        link = "intra" if inside else "inter"
        for lane in ((route.src, "out", link), (route.dst, "in", link)):
            lanes[lane] += num_bytes
            messages[lane] += 1
    slowest_s = _slowest_lane_s(lanes, messages, model)
    return slowest_s + max(passes.values(), default=0) / cluster.device.memory_bytes_per_s


def _slowest_lane_s(
    lanes: Mapping[_Lane, int], messages: Mapping[_Lane, int], model: CostModel
) -> float:
    slowest_s = 0.0
    # Lanes of one class differ in bytes and messages only; few pairs are different.
    pairs = {(link, num_bytes, messages[lane]) for lane, num_bytes in lanes.items()
             for link in (lane[2],)}  # fmt: skip
    for link, num_bytes, count in pairs:
        peers = _two_devices(model.cluster, link)
        latency_s = model.cluster.link_between(*peers).latency_s
        cost = model.collectives.p2p(float(num_bytes), *peers)
        slowest_s = max(slowest_s, cost.seconds + (count - 1) * latency_s)
    return slowest_s


def _two_devices(cluster: ClusterSpec, link: str) -> tuple[int, int]:
    """Two devices that are joined by a link of this class."""
    return (0, 1) if link == "intra" else (0, cluster.devices_per_node)


def transfer_seconds(
    num_bytes: float, src_mesh: DeviceMesh, dst_mesh: DeviceMesh, model: CostModel
) -> float:
    """Seconds to bring ``num_bytes`` in all from one mesh's devices to another's.

    The bytes are spread over the smaller mesh and take the network unless both meshes lie on one
    node. Equal meshes are priced alike, over their links: samples may sit on other replicas.
    """
    if num_bytes <= 0:
        return 0.0
    cluster = model.cluster
    last = max(src_mesh.devices[-1], dst_mesh.devices[-1])
    first = min(src_mesh.first, dst_mesh.first)
    if first == last:
        return 0.0
    inside = cluster.node_of(first) == cluster.node_of(last)
    lanes = min(src_mesh.num_devices, dst_mesh.num_devices)
    peers = _two_devices(cluster, "intra" if inside else "inter")
    return model.collectives.p2p(num_bytes / lanes, *peers).seconds
