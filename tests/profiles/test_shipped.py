"""Protects which costs a device gets: its tables by name, its chip's, or peak rates."""

from __future__ import annotations

from dataclasses import replace

import pytest

from profiles.catalogue import MODELS
from profiles.clusters import make_cluster
from profiles.costs import Provenance
from profiles.devices import DEVICES
from profiles.kernel_costs import KernelCosts
from profiles.roofline import RooflineCosts
from profiles.shipped import describe_costs, shipped_costs, tables_of

SPEC = MODELS["llama-7b"]


@pytest.mark.parametrize(
    ("name", "tables"),
    [
        ("h100", "h100"),
        ("a100-40g", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA B200", "b200"),
        ("a10g", None),
        ("NVIDIA RTX 6000", None),
    ],
)
def test_a_device_is_known_by_a_word_of_its_name(name: str, tables: str | None) -> None:
    device = replace(DEVICES["h100"], name=name)
    assert tables_of(device) == tables
    text = describe_costs(device)
    assert ("shipped" in text) == (tables is not None), text
    assert tables_of(replace(device, kind="cpu")) is None


def test_a_chip_with_slower_memory_has_its_chips_efficiencies() -> None:
    fast, slow = (shipped_costs(make_cluster(name, 8))[0] for name in ("dgx-a100", "p4d"))
    ask = {"tp": 1, "size": 16, "length": 512}
    ratio = (
        slow.layer(SPEC, "block", "decode", **ask).seconds
        / fast.layer(SPEC, "block", "decode", **ask).seconds
    )
    assert 1.1 < ratio < 2039 / 1555 + 0.01, "as much slower as its memory, but for launches"


def test_a_graphs_kernels_do_not_wait_for_the_host() -> None:
    """With a host that needs a second for each kernel: only decode steps of dense models are fast,

    on few devices as on many, where every kernel is short.
    """
    cluster = make_cluster("h100", 8)
    usual, _ = shipped_costs(cluster)
    costs, _ = shipped_costs(replace(cluster, device=replace(cluster.device, launch_s=1.0)))
    experts = MODELS["mixtral-8x7b"]
    for tp in (1, 8):
        ask = {"tp": tp, "size": 16, "length": 512}
        for component in ("block", "head"):
            found = costs.layer(SPEC, component, "decode", **ask)
            assert found == usual.layer(SPEC, component, "decode", **ask)
            assert costs.layer(SPEC, component, "forward", **ask).seconds > 1.0
        assert costs.layer(experts, "block", "decode", **ask).seconds > 10.0


def test_what_a_measured_gpu_lacks_is_from_its_makers_rates() -> None:
    """Its own rates are achieved ones: efficiencies would count twice."""
    catalogue = make_cluster("h100", 8)
    measured = replace(
        catalogue.device, name="NVIDIA H100 80GB HBM3", peak_flops=700e12, memory_bytes_per_s=2.8e12
    )
    costs, _ = shipped_costs(replace(catalogue, device=measured))
    expected, _ = shipped_costs(catalogue)
    ask = {"tp": 2, "size": 4096, "length": 1024}
    assert isinstance(costs, KernelCosts)
    assert costs.layer(SPEC, "block", "forward", **ask) == expected.layer(
        SPEC, "block", "forward", **ask
    )


def test_other_links_have_no_measured_collectives() -> None:
    cluster = make_cluster("h100", 8)
    slow = replace(cluster, intra_link=replace(cluster.intra_link, bytes_per_s=32e9))
    _, usual = shipped_costs(cluster)
    _, other = shipped_costs(slow)
    assert usual.all_reduce(1 << 26, range(8)).provenance is Provenance.MEASURED
    assert other.all_reduce(1 << 26, range(8)).provenance is Provenance.ROOFLINE


def test_a_device_without_tables_has_peak_rates() -> None:
    costs, collectives = shipped_costs(make_cluster("g5", 8))
    assert isinstance(costs, RooflineCosts)
    assert collectives.p2p(1e6, 0, 1).provenance is Provenance.ROOFLINE
