"""Seconds of moving weights between layouts and data between meshes.

Between groups of unlike nodes each device sends or takes at the rate of its own network
(``model.Bridge``).

A reallocation has two phases, one after the other (``planner.routes``): what devices lack comes
from who holds it, then what came over the network goes on inside each node. All messages of a phase
run together; a device is done when its own bytes have passed, so the slowest device counts. Bytes
within a node and between nodes take different links and overlap; out and in are both directions of
one link. Contention: all messages of a device share its link, and ``ClusterSpec.inter_link`` is a
device's share of its node's network, so that all devices of a node at once get what its adapters
carry. One that sends while the others of its node are idle gets no more than its share, which is
too slow where several devices have one adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from planner.cost.lanes import IN_INTER, OUT_INTER, LaneLoads, lane_loads
from planner.cost.model import Bridge, CostModel, Costs, MixedCosts
from planner.cost.pipeline import LinkClass
from planner.cost.stage import stage_shapes, stage_values
from planner.layout import Layout
from planner.memory import AVERAGE_BYTES
from planner.mesh import DeviceMesh
from profiles.collectives import Collectives
from profiles.hardware import ClusterSpec

# Rows of ``LaneLoads`` by the link that they take, of the first phase and of the second.
LANES: Sequence[tuple[LinkClass, slice]] = (("intra", slice(0, 2)), ("inter", slice(2, 4)))
RELAY: tuple[LinkClass, slice] = ("intra", slice(4, 6))


def reallocation_seconds(src: Layout, dst: Layout, *, bytes_per_value: int, model: Costs) -> float:
    """Seconds until every device of ``dst`` holds its layout.

    In each phase max over devices, directions and link classes of bytes / bandwidth + one latency
    for each message, and of both phases the sum; plus max over devices of the passes over memory:
    what is sent is packed, what comes is unpacked and what stays is copied, one read and one write
    each; but blocks that a device holds alike are lent, not copied. The executor does these on the
    device that also sends, so they add up. CPU workers that read each other's memory pack
    nothing and send two small messages; there passes and latencies stand for what strided rows
    take longer than the rows that were measured.
    """
    if isinstance(model, MixedCosts):
        if _apart(src.mesh, dst.mesh, model):
            bridge = model.between(src.mesh, dst.mesh)
            return _crossing_seconds(src, dst, bytes_per_value, bridge)
        own, mesh = model.at(src.mesh)
        src = replace(src, mesh=mesh)
        dst, model = replace(dst, mesh=model.at(dst.mesh)[1]), own
    src, dst = _at_the_start(src, dst, model.cluster)
    question = (src, dst, bytes_per_value)
    seconds = model.known_reallocations.get(question)
    if seconds is None:
        seconds = _reallocation_s(src, dst, bytes_per_value, model)
        seconds *= model.corrections.get("reallocate", 1.0)
        model.known_reallocations[question] = seconds
    return seconds


def _apart(a: DeviceMesh, b: DeviceMesh, costs: MixedCosts) -> bool:
    """Are two meshes in unlike groups?"""
    return costs.cluster.group_index(a.first) != costs.cluster.group_index(b.first)


def _crossing_seconds(src: Layout, dst: Layout, bytes_per_value: int, bridge: Bridge) -> float:
    """As ``reallocation_seconds`` from one group to another, wherever in them both layouts are.

    Devices of the source share no node with those of the destination, whose nodes are as in their
    group. No device is in both, so givers pass over their own memory while takers do over theirs.
    """
    count, per_node = dst.mesh.num_devices, bridge.target.cluster.devices_per_node
    # A mesh is whole nodes or a part of one, so that it spans as many nodes from the first on.
    dst = replace(dst, mesh=DeviceMesh(0, count))
    start = -(-count // per_node) * per_node
    src = replace(src, mesh=DeviceMesh(start, src.mesh.num_devices))
    question = (src, dst, bytes_per_value)
    if question not in bridge.known_reallocations:
        loads = lane_loads(src, dst, devices_per_node=per_node)
        lanes_s = max(
            _slowest_lane_s(
                loads.heaviest(slice(lane, lane + 1)), bytes_per_value, (0, 1), bridge.latency_s,
                end,
            )
            for lane, end in zip((OUT_INTER, IN_INTER), bridge.ends, strict=True)
        )  # fmt: skip
        lanes_s += _lanes_s(*RELAY, loads, bytes_per_value, bridge.target)
        ends = ((loads.passes[start:], bridge.source), (loads.passes[:count], bridge.target))
        passes_s = max(
            int(passes.max()) * bytes_per_value / model.cluster.device.memory_bytes_per_s
            for passes, model in ends
        )
        seconds = (lanes_s + passes_s) * bridge.correction
        bridge.known_reallocations[question] = seconds
    return bridge.known_reallocations[question]


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
    seconds = max(_lanes_s(*lanes, loads, bytes_per_value, model) for lanes in LANES)
    seconds += _lanes_s(*RELAY, loads, bytes_per_value, model)
    passes_bytes = int(loads.passes.max()) * bytes_per_value
    return seconds + passes_bytes / model.cluster.device.memory_bytes_per_s


def _lanes_s(
    link: LinkClass, lanes: slice, loads: LaneLoads, bytes_per_value: int, model: CostModel
) -> float:
    """Of lanes of one link between any two devices that it joins."""
    heaviest = loads.heaviest(lanes)
    if not heaviest:
        return 0.0
    peers = model.two_devices(link)
    latency_s = model.cluster.link_between(*peers).latency_s
    return _slowest_lane_s(heaviest, bytes_per_value, peers, latency_s, model.collectives)


def average_seconds(layout: Layout, *, model: Costs) -> float:
    """Seconds of moving an average over steps in ``layout`` towards weights that are there.

    Passes over memory on the fullest device: the average, in fp32, is read and written, the other
    weights are read, and the average's own weights written.
    """
    shapes = set(stage_shapes(layout.spec, layout.pp))
    num_values = max(stage_values(layout.spec, shape, layout.tp, layout.ep) for shape in shapes)
    own, _ = model.at(layout.mesh)
    passes_bytes = num_values * (2 * AVERAGE_BYTES + 2 * own.value_bytes)
    return passes_bytes / own.cluster.device.memory_bytes_per_s


def _slowest_lane_s(
    heaviest: Sequence[tuple[int, int]], bytes_per_value: int, peers: tuple[int, int],
    latency_s: float, collectives: Collectives,
) -> float:  # fmt: skip
    """Of lanes of the link between ``peers``, which takes ``latency_s`` for a message.

    A lane with no more values and no more messages than another's is taken to be no slower.
    """
    return max(
        (
            collectives.read(float(num_values * bytes_per_value), *peers).seconds
            + (count - 1) * latency_s
            for num_values, count in heaviest
        ),
        default=0.0,
    )


def transfer_seconds(
    num_bytes: float, src_mesh: DeviceMesh, dst_mesh: DeviceMesh, model: Costs
) -> float:
    """Seconds to bring ``num_bytes`` in all from one mesh's devices to another's.

    The bytes are spread over the smaller mesh and take the network unless both meshes lie on one
    node. Equal meshes are priced alike, over their links: samples may sit on other replicas.
    Between groups they are spread over each mesh, and the slower end counts.
    """
    if num_bytes <= 0:
        return 0.0
    if isinstance(model, MixedCosts):
        if _apart(src_mesh, dst_mesh, model):
            return max(
                crossing_end_s(num_bytes, src_mesh, dst_mesh, model),
                crossing_end_s(num_bytes, dst_mesh, src_mesh, model),
            )
        own, src_mesh = model.at(src_mesh)
        dst_mesh, model = model.at(dst_mesh)[1], own
    cluster = model.cluster
    lanes = min(src_mesh.num_devices, dst_mesh.num_devices)
    last = max(src_mesh.devices[-1], dst_mesh.devices[-1])
    first = min(src_mesh.first, dst_mesh.first)
    if first == last:
        return 0.0
    link: LinkClass = "intra" if cluster.node_of(first) == cluster.node_of(last) else "inter"
    return model.collectives.p2p(num_bytes / lanes, *model.two_devices(link)).seconds


def crossing_end_s(
    num_bytes: float, mesh: DeviceMesh, other: DeviceMesh, costs: MixedCosts
) -> float:
    """Seconds in which ``mesh``'s devices send, or take, their shares of what goes between it and

    ``other``, a mesh of another group.
    """
    end = costs.between(mesh, other).ends[0]
    return end.p2p(num_bytes / mesh.num_devices, 0, 1).seconds
