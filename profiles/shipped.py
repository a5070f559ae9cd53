"""Which costs a cluster gets without a profile of the user's: shipped tables, or peak rates.

A device is known by its name; a measured one ("NVIDIA H100 80GB HBM3") by a word of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from profiles.clusters import PLATFORMS
from profiles.collectives import Collectives
from profiles.costs import LayerCosts
from profiles.devices import DEVICES
from profiles.hardware import ClusterSpec, DeviceSpec
from profiles.kernel_costs import KernelCosts
from profiles.kernel_tables import shipped_devices, shipped_table
from profiles.kernels import KernelSurfaces
from profiles.roofline import RooflineCosts
from profiles.table import CostTable

# Devices without tables of their own -> the one whose efficiencies hold for them: the same chip
# with slower memory.
SAME_CHIP: Mapping[str, str] = {"a100-40g": "a100"}


def tables_of(device: DeviceSpec) -> str | None:
    """The catalogue's device whose tables hold for ``device``; None where there are none.

    >>> tables_of(DEVICES["a100-40g"])
    'a100'
    """
    if device.kind != "cuda":
        return None
    names = [device.name, *re.split(r"[^a-z0-9]+", device.name.lower())]
    found = (SAME_CHIP.get(name, name) for name in names)
    return next((name for name in found if name in shipped_devices()), None)


def shipped_costs(
    cluster: ClusterSpec, table: CostTable | None = None
) -> tuple[LayerCosts, Collectives]:
    """Layers and collectives on ``cluster``; collectives that ``table`` has come from there.

    Measured collectives hold for the links that the device's usual server has: with other links
    inside the node they come from the alpha-beta formulas.

    Raises:
        ProfileError: a shipped table is damaged.
    """
    device = cluster.device
    name = tables_of(device)
    if name is None:
        return RooflineCosts(device), Collectives(cluster, table)
    if device.name not in DEVICES:  # measured: its rates are achieved ones, not the maker's
        device = DEVICES[name]
    surfaces = KernelSurfaces.shipped(device, DEVICES[name])
    usual = PLATFORMS[name]
    same_links = (
        cluster.intra_link == usual.intra and cluster.devices_per_node <= usual.devices_per_node
    )
    collectives = Collectives(cluster, table, shipped=name if same_links else None)
    return KernelCosts(surfaces, RooflineCosts(device)), collectives


def describe_costs(device: DeviceSpec) -> str:
    """What a device's costs rest on where the user gave no profile, in a sentence."""
    name = tables_of(device)
    if name is None:
        return f"costs are from {device.name}'s peak rates"
    return (
        f"costs are from the shipped {name} tables ({shipped_table(name, 'gemm').source}); "
        "what these lack is from peak rates"
    )
