"""Protects the collectives' formulas, which links a group takes, and the use of measured rows."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.clusters import make_cluster
from profiles.collectives import Collectives, ring_all_reduce_s, ring_gather_s
from profiles.costs import Provenance
from profiles.devices import DEVICES
from profiles.hardware import ClusterSpec, LinkSpec
from profiles.kernel_tables import has_table, shipped_devices, shipped_table
from profiles.table import CostRow, CostTable
from scripts.validate_profiles import (
    COLLECTIVES,
    MEDIAN_LIMIT,
    held_out_collectives,
    network_check,
)


def cluster(intra: float = 100.0, inter: float = 10.0, latency: float = 0.0) -> ClusterSpec:
    """Four nodes of four devices; rates in bytes per second that a hand can count with."""
    base = make_cluster("a100", 16)
    return replace(
        base,
        num_nodes=4,
        devices_per_node=4,
        intra_link=LinkSpec(bytes_per_s=intra, latency_s=latency),
        inter_link=LinkSpec(bytes_per_s=inter, latency_s=latency),
    )


def collectives(**links: float) -> Collectives:
    """Formulas of whole rates, without what a network takes to start."""
    return Collectives(
        cluster(**links), bandwidth_efficiency=1.0, network_efficiency=1.0, network_start_s=0.0
    )


def test_in_a_node_the_ring_formulas_hold() -> None:
    model = collectives(latency=1.0)
    # 2 * 3 / 4 * 400 bytes / 100 B/s + 2 * 3 steps of 1 s; half of it for either half.
    assert model.all_reduce(400, range(4)).seconds == pytest.approx(6 + 6)
    assert model.all_gather(400, range(4)).seconds == pytest.approx(3 + 3)
    assert model.reduce_scatter(400, range(4)).seconds == pytest.approx(3 + 3)
    assert model.p2p(400, 1, 2).seconds == pytest.approx(4 + 1)


def test_between_nodes_the_share_of_each_device_takes_the_network() -> None:
    model = collectives()
    # Groups of 16: scatter and gather 3/4 * 400 / 100 each, ring of 4 nodes over 100 bytes.
    expected = 3 + 3 + 2 * 3 / 4 * 100 / 10
    assert model.all_reduce(400, range(16)).seconds == pytest.approx(expected)
    # One device of each node: the whole tensor crosses.
    assert model.all_reduce(400, range(0, 16, 4)).seconds == pytest.approx(1.5 * 400 / 10)
    assert model.p2p(400, 3, 4).seconds == pytest.approx(40)


def test_an_all_to_all_sends_each_device_its_part() -> None:
    model = collectives()
    # To each of three others a quarter of 400 bytes, at 100 B/s.
    assert model.all_to_all(400, range(4)).seconds == pytest.approx(3)
    # 16 devices: to three neighbours 25 bytes each inside, to twelve others through the network.
    assert model.all_to_all(400, range(16)).seconds == pytest.approx(3 * 25 / 100 + 12 * 25 / 10)
    # One device of each node: all but its own quarter crosses.
    assert model.all_to_all(400, range(0, 16, 4)).seconds == pytest.approx(300 / 10)
    assert model.all_to_all(400, range(1)).seconds == 0
    assert model.all_to_all(0, range(4)).seconds == 0
    slow = collectives(intra=1e30, inter=1e30, latency=1.0)
    assert slow.all_to_all(400, range(0, 16, 4)).seconds == pytest.approx(3)


def test_a_strided_group_inside_a_node_stays_inside() -> None:
    model = collectives()
    assert model.spread(range(0, 4, 2)) == (2, 1)
    assert model.spread(range(0, 8, 2)) == (2, 2)
    assert model.spread(range(4, 8)) == (4, 1)
    inside, across = model.all_reduce(400, range(0, 4, 2)), model.all_reduce(400, range(2, 6, 2))
    assert inside.seconds < across.seconds


def test_one_device_and_no_bytes_cost_nothing() -> None:
    model = collectives(latency=1.0)
    for call in (model.all_reduce, model.all_gather, model.reduce_scatter):
        assert call(400, range(3, 4)).seconds == 0
        assert call(0, range(16)).seconds == 0
    assert model.p2p(400, 5, 5).seconds == 0
    assert model.p2p(0, 0, 5).seconds == 0


@given(st.integers(1, 10**9), st.integers(2, 16))
def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather(num_bytes: int, count: int) -> None:
    link = LinkSpec(bytes_per_s=1e9, latency_s=1e-6)
    assert ring_all_reduce_s(num_bytes, count, link) == pytest.approx(
        2 * ring_gather_s(num_bytes, count, link)
    )


@given(st.integers(1, 10**9), st.integers(1, 10**9), st.floats(1, 100), st.integers(1, 16))
def test_more_bytes_or_a_slower_link_are_never_faster(
    a: int, b: int, factor: float, count: int
) -> None:
    slow, fast = collectives(), collectives(intra=100 * factor, inter=10 * factor)
    group = range(count)
    assert slow.all_reduce(min(a, b), group).seconds <= slow.all_reduce(max(a, b), group).seconds
    assert fast.all_reduce(a, group).seconds <= slow.all_reduce(a, group).seconds * (1 + 1e-12)


# ---- measured rows ----------------------------------------------------------------------------


def measured(*rows: tuple[str, int, int, float]) -> Collectives:
    table = CostTable(
        device=DEVICES["a100"], dtype="bf16", date="2026-01-01", source="test",
        rows=tuple(
            CostRow(component="collective", operation=o, workers=w, size=s, seconds=t)
            for o, w, s, t in rows
        ),
    )  # fmt: skip
    return Collectives(cluster(), table, bandwidth_efficiency=1.0)


def test_measured_rows_are_used_inside_a_node() -> None:
    model = measured(
        ("all_reduce", 2, 1000, 7.0), ("all_reduce", 2, 4000, 16.0), ("p2p", 2, 1000, 3.0)
    )
    assert model.all_reduce(1000, range(2)).seconds == 7.0
    assert model.all_reduce(1000, range(2)).provenance is Provenance.MEASURED
    # A third of the way in bytes, so a third of the way from 7 to 16 s.
    assert model.all_reduce(2000, range(2)).seconds == pytest.approx(10.0)
    assert model.all_reduce(2000, range(2)).provenance is Provenance.INTERPOLATED
    for beyond, seconds in ((500, 7.0), (8000, 32.0)):
        found = model.all_reduce(beyond, range(2))
        assert found.seconds == pytest.approx(seconds)
        assert found.provenance is Provenance.EXTRAPOLATED
    assert model.p2p(1000, 0, 1).seconds == 3.0
    assert model.all_gather(1000, range(2)).provenance is Provenance.ROOFLINE


def test_more_workers_than_measured_follow_the_formula_at_the_measured_level() -> None:
    model = measured(("all_reduce", 2, 1000, 20.0))  # twice the formula's 10 s
    found = model.all_reduce(1000, range(4))
    assert found.seconds == pytest.approx(2 * 1.5 * 1000 / 100)
    assert found.provenance is Provenance.EXTRAPOLATED


def test_measured_rows_say_nothing_of_the_network() -> None:
    model = measured(("p2p", 2, 1000, 3.0))
    # 10 B/s, of which messages get 0.72, and what NCCL takes to start.
    assert model.p2p(1000, 0, 4).seconds == pytest.approx(14e-6 + 100 / 0.72)


def test_reads_are_messages_where_none_was_measured_and_between_nodes() -> None:
    rows = ("p2p", 2, 1000, 3.0), ("read", 2, 1000, 0.5)
    assert measured(*rows).read(1000, 0, 1).seconds == 0.5
    assert measured(rows[0]).read(1000, 0, 1).seconds == 3.0
    assert measured(*rows).read(1000, 0, 4) == measured(rows[0]).p2p(1000, 0, 4)
    assert measured(*rows).read(1000, 1, 1).seconds == 0


def test_messages_inside_a_node_are_the_shipped_ones() -> None:
    dgx = make_cluster("dgx-h100", 16)
    model = Collectives(dgx, shipped="h100")
    rows = shipped_table("h100", "send_recv").rows
    assert model.p2p(67108864, 0, 7).seconds == pytest.approx(rows[(2, 67108864)])
    # No such table: the formula.
    assert model.p2p(67108864, 0, 7).source == "collectives: vidur h100_dgx"
    assert Collectives(dgx, shipped="h200").p2p(1e9, 0, 7).provenance is Provenance.ROOFLINE


@pytest.mark.parametrize("device", ["a100", "h100"])
def test_the_network_formula_agrees_with_measured_messages(device: str) -> None:
    """Vidur's, between two nodes; the H100s' adapters are a DGX's."""
    rate, errors = network_check(device)
    assert statistics.median(errors) < 0.15
    if device == "h100":
        assert rate == make_cluster("dgx-h100", 16).inter_link.bytes_per_s


@pytest.mark.parametrize("device", shipped_devices())
def test_sizes_held_out_of_the_shipped_tables_are_predicted(device: str) -> None:
    """The gate of ``scripts/validate_profiles.py``, and that what it sets aside is a minority."""
    for name in (n for n in COLLECTIVES if has_table(device, n)):
        found = held_out_collectives(device, name)
        assert not found.is_bad, (name, found.median, found.lawful[-3:])
        assert found.median <= MEDIAN_LIMIT
        assert len(found.lawful) > len(found.errors) / 2, name
