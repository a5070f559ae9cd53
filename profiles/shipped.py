"""Which costs a cluster gets without a profile of the user's: shipped tables, or peak rates."""

from __future__ import annotations

from profiles.clusters import PLATFORMS
from profiles.collectives import Collectives
from profiles.costs import LayerCosts
from profiles.devices import DEVICES
from profiles.hardware import ClusterSpec
from profiles.kernel_costs import KernelCosts
from profiles.kernel_tables import shipped_devices, shipped_table
from profiles.kernels import KernelSurfaces
from profiles.roofline import RooflineCosts
from profiles.table import CostTable


def shipped_costs(
    cluster: ClusterSpec, table: CostTable | None = None
) -> tuple[LayerCosts, Collectives]:
    """Layers and collectives on ``cluster``; collectives that ``table`` has come from there.

    A device is known by its name. Measured collectives hold for the links that the device's usual
    server has: with other links inside the node they come from the alpha-beta formulas.

    Raises:
        ProfileError: a shipped table is damaged.
    """
    device = cluster.device
    roofline = RooflineCosts(device)
    if device.name not in shipped_devices():
        return roofline, Collectives(cluster, table)
    surfaces = KernelSurfaces.shipped(device, DEVICES[device.name])
    usual = PLATFORMS[device.name]
    same_links = (
        cluster.intra_link == usual.intra and cluster.devices_per_node <= usual.devices_per_node
    )
    return KernelCosts(surfaces, roofline), Collectives(cluster, table, shipped=same_links)


def describe_costs(device: str) -> str:
    """What a device's costs rest on where the user gave no profile, in a sentence."""
    if device not in shipped_devices():
        return f"costs are from {device}'s peak rates"
    return (
        f"costs are from the shipped {device} tables ({shipped_table(device, 'gemm').source}); "
        "what these lack is from peak rates"
    )
