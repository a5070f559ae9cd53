"""Names of clusters: how devices are wired, one row each, with the source of its figures.

Devices are rows of ``devices.py``. To add a server write one row in ``_SYSTEM_ROWS``; the first row
of a device is the server that its bare name means. The functions at the end turn what a user
typed into a ``ClusterSpec``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from profiles.devices import DEVICES
from profiles.errors import ConfigError, unknown_name
from profiles.hardware import (
    MAX_DEVICES,
    Cluster,
    ClusterSpec,
    DeviceSpec,
    LinkSpec,
    MixedCluster,
)
from profiles.units import GB, GIB, US

# ---- servers: how devices are wired -----------------------------------------------------------

# Seconds of one step of a ring: NCCL's own tuning constants (graph/tuning.cc: hwLat, ring, LL128).
_NVLINK_STEP_S, _PCIE_STEP_S, _NETWORK_STEP_S = 1.9 * US, 2.5 * US, 4.0 * US


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """A server of one device kind: rates are one direction of one device's share.

    ``dollars_per_hour``: of one of its devices, where they are let in this server at another
    price than the device's own (0: the device's).
    """

    name: str
    device: str
    devices_per_node: int = 8
    intra: LinkSpec
    inter: LinkSpec
    host: LinkSpec
    most_devices: int = MAX_DEVICES
    dollars_per_hour: float = 0.0
    price_source: str = ""

    def device_spec(self) -> DeviceSpec:
        """The catalogue's device, at this server's price."""
        device = DEVICES[self.device]
        if self.dollars_per_hour == 0:
            return device
        return replace(
            device, dollars_per_hour=self.dollars_per_hour, price_source=self.price_source
        )


def _nvlink(gb_per_s: float, source: str) -> LinkSpec:
    return LinkSpec(bytes_per_s=gb_per_s * GB, latency_s=_NVLINK_STEP_S, source=source)


def _network(gbit_per_s: float, source: str) -> LinkSpec:
    return LinkSpec(bytes_per_s=gbit_per_s / 8 * GB, latency_s=_NETWORK_STEP_S, source=source)


def _pcie(generation: int) -> LinkSpec:
    return LinkSpec(
        bytes_per_s={4: 32, 5: 64}[generation] * GB,
        latency_s=_PCIE_STEP_S,
        source=f"PCIe {generation}.0 x16, one direction",
    )


_A100_NVLINK = _nvlink(300, "NVLink 3: 600 GB/s both ways (A100 datasheet)")
_HOPPER_NVLINK = _nvlink(450, "NVLink 4: 900 GB/s both ways (H100 and H200 datasheets)")
_BLACKWELL_NVLINK = _nvlink(900, "NVLink 5: 1.8 TB/s both ways (DGX B200 datasheet)")

_SYSTEM_ROWS = (
    Platform(
        name="dgx-a100", device="a100", intra=_A100_NVLINK, host=_pcie(4),
        inter=_network(200, "DGX A100: one 200 Gb/s HDR adapter for each GPU"),
    ),
    Platform(
        name="p4de", device="a100", intra=_A100_NVLINK, host=_pcie(4),
        inter=_network(50, "AWS p4de.24xlarge: 400 Gb/s EFA for eight GPUs"),
        dollars_per_hour=3.431, price_source="AWS p4de.24xlarge / 8, us-east-1 on demand, 2026-11",
    ),
    Platform(
        name="p4d", device="a100-40g", intra=_A100_NVLINK, host=_pcie(4),
        inter=_network(50, "AWS p4d.24xlarge: 400 Gb/s EFA for eight GPUs"),
        dollars_per_hour=2.745, price_source="AWS p4d.24xlarge / 8, us-east-1 on demand, 2026-11",
    ),
    Platform(
        name="dgx-h100", device="h100", intra=_HOPPER_NVLINK, host=_pcie(5),
        inter=_network(400, "DGX H100: one 400 Gb/s NDR adapter for each GPU"),
    ),
    Platform(
        name="p5", device="h100", intra=_HOPPER_NVLINK, host=_pcie(5),
        inter=_network(400, "AWS p5.48xlarge: 3200 Gb/s EFA for eight GPUs"),
        dollars_per_hour=6.88, price_source="AWS p5.48xlarge / 8, us-east-1 on demand, 2026-11",
    ),
    Platform(
        name="dgx-h200", device="h200", intra=_HOPPER_NVLINK, host=_pcie(5),
        inter=_network(400, "DGX H200: one 400 Gb/s NDR adapter for each GPU"),
    ),
    Platform(
        name="gb200-nvl72", device="gb200", devices_per_node=4, intra=_BLACKWELL_NVLINK,
        inter=_nvlink(900, "NVLink 5 through the rack's switches (GB200 NVL72 datasheet)"),
        host=_pcie(5), most_devices=72,
    ),
    Platform(
        name="dgx-b200", device="b200", intra=_BLACKWELL_NVLINK, host=_pcie(5),
        inter=_network(400, "DGX B200: one 400 Gb/s adapter for each GPU"),
    ),
    Platform(
        name="l40s-box", device="l40s", intra=_pcie(4), host=_pcie(4),
        inter=_network(100, "assumed: two GPUs share a 200 Gb/s adapter"),
    ),
    Platform(
        name="g6e", device="l40s", intra=_pcie(4), host=_pcie(4),
        inter=_network(50, "AWS g6e.48xlarge: 400 Gb/s for eight GPUs"),
    ),
    Platform(
        name="g5", device="a10g", intra=_pcie(4), host=_pcie(4),
        inter=_network(12.5, "AWS g5.48xlarge: 100 Gb/s for eight GPUs"),
    ),
)  # fmt: skip
SYSTEMS: Mapping[str, Platform] = {row.name: row for row in _SYSTEM_ROWS}
# The server that a device's bare name means: the first of its rows.
PLATFORMS: Mapping[str, Platform] = {row.device: row for row in reversed(_SYSTEM_ROWS)}
LAPTOP = "laptop"
CLUSTER_NAMES = (*SYSTEMS, LAPTOP)

# Workers of one machine talk over gloo on the loopback device; modest figures, not measured.
_LOOPBACK = LinkSpec(bytes_per_s=1 * GB, latency_s=50 * US, source="gloo over loopback, assumed")


# ---- what a user typed ------------------------------------------------------------------------


def _check_count(num_devices: int, *, where: str) -> None:
    if not isinstance(num_devices, int) or isinstance(num_devices, bool) or num_devices < 1:
        raise ConfigError(
            f"{num_devices!r} is not a positive whole number of devices", where=where,
            remedy="write it like 8",
        )  # fmt: skip


def make_cluster(name: str, num_devices: int) -> ClusterSpec:
    """``num_devices`` of a catalogue device in its usual servers, or in the servers of a name.

    ``cpu`` is this machine, ``laptop`` a usual one. Fewer devices than a server has make one node
    of that many.

    >>> make_cluster("a100", 16).num_nodes
    2
    >>> make_cluster("p5", 16).device.name
    'h100'

    Raises:
        ConfigError: an unknown name, a count that is not a positive whole number, that does not
            fill its nodes, or that is more than the servers' network joins.
    """
    if name not in DEVICES and name not in CLUSTER_NAMES:
        raise unknown_name("device or cluster", name, [*DEVICES, *CLUSTER_NAMES], where="--device")
    _check_count(num_devices, where="--devices")
    if name == "cpu":
        return local_cluster(num_devices)
    if name == LAPTOP:
        return laptop_cluster(num_devices)
    platform = SYSTEMS.get(name) or PLATFORMS[name]
    if num_devices > platform.most_devices:
        raise ConfigError(
            f"{num_devices} devices, but one {platform.name} has {platform.most_devices}",
            where="--devices",
            remedy="describe the network between several in a cluster file",
        )
    device = platform.device
    per_node = min(platform.devices_per_node, num_devices)
    if num_devices % per_node:
        low = num_devices // per_node * per_node
        raise ConfigError(
            f"{num_devices} devices do not fill nodes of {per_node} {device}", where="--devices",
            remedy=f"use {low} or {low + per_node}",
        )  # fmt: skip
    return ClusterSpec(
        name=f"{num_devices} x {device}" if name == device else f"{name}, {num_devices} x {device}",
        device=platform.device_spec(), num_nodes=num_devices // per_node,
        devices_per_node=per_node, intra_link=platform.intra, inter_link=platform.inter,
        host_link=platform.host,
    )  # fmt: skip


def make_groups(text: str, *, where: str = "--device") -> Cluster:
    """Groups of catalogue devices, each with its number: ``h100:64+l40s:32``; ``,`` joins as well.

    >>> make_groups("h100:16+l40s:8").name
    '16 x h100 + 8 x l40s'
    >>> make_groups("p5:16").num_nodes
    2

    Raises:
        ConfigError: as ``make_cluster``, a part that is not NAME:NUMBER, or one of this machine.
    """
    found = []
    for part in text.replace(",", "+").split("+"):
        name, colon, count = part.strip().partition(":")
        if not colon or not count.strip().isdecimal():
            raise ConfigError(
                f"'{part.strip()}' is no group of devices", where=where,
                remedy="write NAME:NUMBER like h100:64+l40s:32",
            )  # fmt: skip
        if name in ("cpu", LAPTOP):
            raise ConfigError(
                f"{name} is one machine, not a group of nodes", where=where,
                remedy="name a GPU or a server of realplan devices",
            )  # fmt: skip
        try:
            found.append(make_cluster(name, int(count)))
        except ConfigError as error:
            problem = f"{part.strip()}: {error.problem}"
            raise ConfigError(problem, where=where, remedy=error.remedy) from None
    if len(found) == 1:
        return found[0]
    return MixedCluster(name=" + ".join(group.name for group in found), groups=tuple(found))


def machine_memory_bytes() -> int:
    """RAM of this machine, or less where a control group (a container) allows less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such file on this system, or "max"
        return total
    return min(total, limit)


def local_cluster(num_workers: int) -> ClusterSpec:
    """This machine's CPU cut into ``num_workers`` equal workers, one node, talking over gloo.

    Memory is the machine's by the number of workers; rates are the catalogue's ``cpu`` row by
    the number of cores of each worker, not measured (``realexec profile`` does that).

    Raises:
        ConfigError: the count is not a positive whole number.
    """
    _check_count(num_workers, where="--workers")
    cores = max(1.0, (os.cpu_count() or 1) / num_workers)
    return _cpu_cluster(
        f"{num_workers} CPU workers", num_workers, cores=cores,
        memory_bytes=machine_memory_bytes() // num_workers,
        memory_bytes_per_s=DEVICES["cpu"].memory_bytes_per_s, source=DEVICES["cpu"].source,
    )  # fmt: skip


def laptop_cluster(num_workers: int) -> ClusterSpec:
    """The CPU of a usual laptop cut into ``num_workers``: 8 cores, 16 GiB, two channels of DDR5.

    A machine to plan for without having it; ``local`` is the one at hand.
    """
    return _cpu_cluster(
        f"a laptop's CPU, {num_workers} workers", num_workers, cores=8 / num_workers,
        memory_bytes=16 * GIB // num_workers, memory_bytes_per_s=76.8 * GB / num_workers,
        source="assumed: 8 cores with AVX2, 16 GiB, DDR5-4800 in two channels",
    )  # fmt: skip


def _cpu_cluster(
    name: str, num_workers: int, *, cores: float, memory_bytes: int, memory_bytes_per_s: float,
    source: str,
) -> ClusterSpec:  # fmt: skip
    """One node of workers with ``cores`` cores, ``memory_bytes`` and their share of a rate each."""
    row = DEVICES["cpu"]
    device = replace(
        row, peak_flops=row.peak_flops * cores, memory_bytes=memory_bytes,
        memory_bytes_per_s=memory_bytes_per_s, source=f"{source}; {cores:g} cores a worker",
    )  # fmt: skip
    host = LinkSpec(bytes_per_s=memory_bytes_per_s, latency_s=0.0, source=source)
    return ClusterSpec(
        name=name, device=device, num_nodes=1, devices_per_node=num_workers,
        intra_link=_LOOPBACK, inter_link=_LOOPBACK, host_link=host,
    )  # fmt: skip
