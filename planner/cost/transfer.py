"""Seconds of moving weights between layouts and data between meshes.

All messages of a reallocation run together; a device is done when its own bytes have passed, so
the slowest device counts. Bytes within a node and between nodes take different links and overlap;
out and in are both directions of one link. Contention: all messages of a device share its link, and
``ClusterSpec.inter_link`` is a device's share of its node's network, so that all devices of a node
at once get what its adapters carry. One that sends while the others of its node are idle gets no
more than its share, which is too slow where several devices have one adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from planner.cost.lanes import Ints, lane_loads
from planner.cost.model import CostModel
from planner.cost.pipeline import LinkClass
from planner.cost.stage import stage_shapes, stage_values
from planner.layout import Layout
from planner.memory import AVERAGE_BYTES
from planner.mesh import DeviceMesh
from profiles.hardware import ClusterSpec

# Rows of ``LaneLoads`` by the link that they take.
LANES: Sequence[tuple[LinkClass, slice]] = (("intra", slice(0, 2)), ("inter", slice(2, 4)))


def reallocation_seconds(
    src: Layout, dst: Layout, *, bytes_per_value: int, model: CostModel
) -> float:
    """Seconds until every device of ``dst`` holds its layout.

    max over devices, directions and link classes of bytes / bandwidth + one latency for each
    message, plus max over devices of the passes over memory: what is sent is packed, what comes
    is unpacked and what stays is copied, one read and one write each; but blocks that a device
    holds alike are lent, not copied. The executor does these on the device that also sends, so
    they add up.
    """
    src, dst = _at_the_start(src, dst, model.cluster)
    question = (src, dst, bytes_per_value)
    seconds = model.known_reallocations.get(question)
    if seconds is None:
        seconds = _reallocation_s(src, dst, bytes_per_value, model)
        seconds *= model.corrections.get("reallocate", 1.0)
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
    loads = lane_loads(src, dst, devices_per_node=model.cluster.devices_per_node)
    slowest_s = max(
        _slowest_lane_s(loads.values[lanes], loads.messages[lanes], link, bytes_per_value, model)
        for link, lanes in LANES
    )
    passes_bytes = int(loads.passes.max()) * bytes_per_value
    return slowest_s + passes_bytes / model.cluster.device.memory_bytes_per_s


def average_seconds(layout: Layout, *, model: CostModel) -> float:
    """Seconds of moving an average over steps in ``layout`` towards weights that are there.

    Passes over memory on the fullest device: the average, in fp32, is read and written, the other
    weights are read, and the average's own weights written.
    """
    shapes = set(stage_shapes(layout.spec, layout.pp))
    num_values = max(stage_values(layout.spec, shape, layout.tp, layout.ep) for shape in shapes)
    passes_bytes = num_values * (2 * AVERAGE_BYTES + 2 * model.value_bytes)
    return passes_bytes / model.cluster.device.memory_bytes_per_s


def _slowest_lane_s(
    values: Ints, messages: Ints, link: LinkClass, bytes_per_value: int, model: CostModel
) -> float:
    busy = messages > 0
    if not busy.any():
        return 0.0
    peers = model.two_devices(link)
    latency_s = model.cluster.link_between(*peers).latency_s
    # Lanes of one link differ in bytes and messages only; few pairs are different.
    pairs = set(zip(values[busy].tolist(), messages[busy].tolist()))
    seconds: list[float] = [
        model.collectives.p2p(float(num_values * bytes_per_value), *peers).seconds
        + (count - 1) * latency_s
        for num_values, count in pairs
    ]
    return max(seconds)


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
    link: LinkClass = "intra" if cluster.node_of(first) == cluster.node_of(last) else "inter"
    lanes = min(src_mesh.num_devices, dst_mesh.num_devices)
    return model.collectives.p2p(num_bytes / lanes, *model.two_devices(link)).seconds
