"""Protects the seconds of reallocations and transfers: hand counts and laws."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cost import CostModel
from planner.cost.transfer import reallocation_seconds, transfer_seconds
from planner.layout import Layout, parameters
from planner.mesh import DeviceMesh
from planner.reallocation import reallocate
from profiles.catalogue import MODELS
from profiles.clusters import make_cluster
from profiles.collectives import Collectives
from profiles.hardware import ClusterSpec, LinkSpec
from profiles.roofline import RooflineCosts
from tests.planner.plans import WHOLE_RATES

SPEC = MODELS["tiny"]


def model_on(cluster: ClusterSpec) -> CostModel:
    return CostModel(
        cluster,
        RooflineCosts(cluster.device),
        Collectives(cluster, **WHOLE_RATES),
    )


def two_nodes(*, intra: float, inter: float) -> ClusterSpec:
    """Two nodes of four devices, without latency, copies for free."""
    base = make_cluster("a100", 8)
    return replace(
        base,
        num_nodes=2,
        devices_per_node=4,
        device=replace(base.device, memory_bytes_per_s=1e30),
        intra_link=LinkSpec(bytes_per_s=intra, latency_s=0.0),
        inter_link=LinkSpec(bytes_per_s=inter, latency_s=0.0),
    )


def layout(first: int, count: int, **axes: int) -> Layout:
    return Layout(spec=SPEC, mesh=DeviceMesh(first, count), **axes)


def test_a_whole_model_to_a_neighbour_takes_its_bytes() -> None:
    model = model_on(two_nodes(intra=10.0, inter=1.0))
    num_bytes = 2 * SPEC.num_parameters
    near = reallocation_seconds(layout(0, 1), layout(1, 1), bytes_per_value=2, model=model)
    far = reallocation_seconds(layout(0, 1), layout(4, 1), bytes_per_value=2, model=model)
    assert near == pytest.approx(num_bytes / 10)
    assert far == pytest.approx(num_bytes / 1)


def test_nothing_moves_between_equal_layouts() -> None:
    model = model_on(two_nodes(intra=10.0, inter=1.0))
    same = layout(0, 4, dp=2, tp=2)
    assert reallocation_seconds(same, same, bytes_per_value=2, model=model) < 1e-12


def test_shards_arrive_in_parallel() -> None:
    """Two halves on two devices to two other devices: half of the time, but for the norms."""
    model = model_on(two_nodes(intra=10.0, inter=1.0))
    whole = reallocation_seconds(layout(0, 1), layout(1, 1), bytes_per_value=2, model=model)
    halves = reallocation_seconds(
        layout(0, 2, tp=2), layout(2, 2, tp=2), bytes_per_value=2, model=model
    )
    assert halves == pytest.approx(whole / 2, rel=0.01)


def test_what_stays_is_lent_or_copied_and_parts_of_rows_are_packed() -> None:
    """Device 0 lends all to its new layout and device 1 receives all in its place; where shards

    are joined each copies its half and unpacks what of the other are parts of rows.
    """
    cluster = two_nodes(intra=1e30, inter=1e30)
    slow = replace(cluster, device=replace(cluster.device, memory_bytes_per_s=1.0))
    found = reallocation_seconds(
        layout(0, 1), layout(0, 2, dp=2), bytes_per_value=2, model=model_on(slow)
    )
    assert found < 1e-12
    alone = reallocation_seconds(
        layout(0, 2, dp=2), layout(0, 1), bytes_per_value=2, model=model_on(slow)
    )
    assert alone == 0
    joined = reallocation_seconds(
        layout(0, 2, tp=2), layout(0, 1), bytes_per_value=2, model=model_on(slow)
    )
    halved = [prod(p.shape) // 2 for p in parameters(SPEC) if p.shard_dim is not None]
    inner = [prod(p.shape) // 2 for p in parameters(SPEC) if p.shard_dim]
    assert joined == pytest.approx(2 * 2 * (sum(halved) + sum(inner)))


def test_messages_that_leave_or_enter_one_device_share_its_part_of_the_network() -> None:
    """A link's rate is one device's share, so a node's adapters carry no more than all of them.

    Four shards to four devices of the other node: a quarter of the bytes on each share, all of the
    node's network. From one device, or into one, all bytes pass one share, whoever is idle beside.
    What is wanted by several of a node enters it once; keys, values and norms are few here, so that
    one device takes them, and shares are a tenth apart.
    """
    model = model_on(two_nodes(intra=1e30, inter=2.0))
    one, four = layout(0, 1), layout(0, 4, tp=4)
    far_one, far_four = layout(4, 1), layout(4, 4, tp=4)
    num_bytes = 2 * SPEC.num_parameters

    def seconds(src: Layout, dst: Layout) -> float:
        return reallocation_seconds(src, dst, bytes_per_value=2, model=model)

    assert seconds(four, far_four) == pytest.approx(num_bytes / 4 / 2.0, rel=0.1)
    assert seconds(one, far_four) == pytest.approx(num_bytes / 2.0)
    assert seconds(four, far_one) == pytest.approx(num_bytes / 2.0)
    # Two holders of all: each sends a half.
    assert seconds(layout(0, 2, dp=2), far_four) == pytest.approx(num_bytes / 2 / 2.0, rel=0.1)


@pytest.mark.parametrize(
    ("server", "gbit_per_s"), [("p4d", 400), ("p4de", 400), ("p5", 3200), ("g6e", 400), ("g5", 100)]
)
def test_devices_shares_of_a_server_s_network_add_up_to_it(server: str, gbit_per_s: int) -> None:
    """What the vendor gives for the whole server: eight senders at once get no more."""
    cluster = make_cluster(server, 16)
    node_rate = cluster.inter_link.bytes_per_s * cluster.devices_per_node
    assert node_rate == pytest.approx(gbit_per_s * 1e9 / 8)


def test_every_message_of_a_device_has_its_latency() -> None:
    cluster = two_nodes(intra=1e30, inter=1e30)
    late = replace(cluster, intra_link=LinkSpec(bytes_per_s=1e30, latency_s=1.0))
    found = reallocation_seconds(
        layout(0, 2, tp=2), layout(2, 1), bytes_per_value=2, model=model_on(late)
    )
    assert found == pytest.approx(3.0)  # one half from either shard, and norms from one


pairs = st.tuples(
    st.sampled_from([(0, 8), (0, 4), (4, 4), (2, 2), (6, 1)]),
    st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2)]),
)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    (first, count), (pp, tp) = draw(pairs)
    pp, tp = (pp, tp) if pp * tp <= count else (1, 1)
    return layout(first, count, pp=pp, tp=tp, dp=count // (pp * tp))


@settings(deadline=None, max_examples=60)
@given(layouts(), layouts())
def test_seconds_are_those_of_the_real_messages(src: Layout, dst: Layout) -> None:
    """Oracle: the bytes of the executor's own message list, counted device by device."""
    cluster = two_nodes(intra=10.0, inter=1.0)
    found = reallocation_seconds(src, dst, bytes_per_value=2, model=model_on(cluster))
    expected = 0.0
    for phase in (0, 1):  # one after the other
        lanes: dict[tuple[int, str, bool], int] = {}
        for message in reallocate(src, dst, devices_per_node=4).messages:
            if message.phase == phase:
                inside = message.src // 4 == message.dst // 4
                for lane in ((message.src, "out", inside), (message.dst, "in", inside)):
                    lanes[lane] = lanes.get(lane, 0) + 2 * message.num_values
        expected += max((n / (10.0 if lane[2] else 1.0) for lane, n in lanes.items()), default=0.0)
    assert found == pytest.approx(expected, abs=1e-12)


def test_a_node_s_adapters_share_what_all_its_devices_want() -> None:
    """By hand: a 7B model to 8 devices of a node that have nothing of it, 8 ways from 8 holders.

    An eighth over each adapter, then seven eighths over each device's links inside the node.
    """
    cluster = make_cluster("h100", 16)
    cluster = replace(
        cluster,
        device=replace(cluster.device, memory_bytes_per_s=1e30),
        intra_link=LinkSpec(bytes_per_s=100.0, latency_s=0.0),
        inter_link=LinkSpec(bytes_per_s=10.0, latency_s=0.0),
    )
    spec = MODELS["llama-7b"]
    src, dst = (Layout(spec=spec, mesh=DeviceMesh(first, 8), dp=8) for first in (0, 8))
    found = reallocation_seconds(src, dst, bytes_per_value=2, model=model_on(cluster))
    num_bytes = 2 * spec.num_parameters
    assert found == pytest.approx(num_bytes / 8 / 10 + num_bytes * 7 / 8 / 100, rel=1e-3)


def test_a_large_reallocation_is_priced_fast_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = make_cluster("a100", 128)
    model = model_on(cluster)
    spec = MODELS["llama-70b"]
    src = Layout(spec=spec, mesh=DeviceMesh(0, 128), pp=4, tp=8, dp=4)
    dst = Layout(spec=spec, mesh=DeviceMesh(0, 128), pp=1, tp=8, dp=16)
    seconds = reallocation_seconds(src, dst, bytes_per_value=2, model=model)
    # A device lacks at most its new shard of 1 / 8, at 25 GB/s between nodes.
    assert 0 < seconds < 2 * spec.num_parameters / 8 / 25e9 * 1.2
    monkeypatch.setattr("planner.cost.transfer.lane_loads", None)
    assert reallocation_seconds(src, dst, bytes_per_value=2, model=model) == seconds


def test_transfers_use_all_devices_and_the_slower_link() -> None:
    model = model_on(two_nodes(intra=10.0, inter=1.0))
    near, far, whole = DeviceMesh(0, 2), DeviceMesh(4, 2), DeviceMesh(0, 4)
    assert transfer_seconds(40, near, DeviceMesh(2, 2), model) == pytest.approx(2.0)
    assert transfer_seconds(40, near, far, model) == pytest.approx(20.0)
    assert transfer_seconds(40, whole, whole, model) == pytest.approx(1.0)
    assert transfer_seconds(0, near, far, model) == 0
    assert transfer_seconds(40, DeviceMesh(0, 1), DeviceMesh(0, 1), model) == 0
