"""Names of devices and clusters: one row each, with the source of its figures.

To add a GPU write one row in ``DEVICES`` and one in ``PLATFORMS``. The functions at the end turn
what a user typed into a ``ClusterSpec``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from profiles.errors import ConfigError, unknown_name
from profiles.hardware import ClusterSpec, DeviceSpec, LinkSpec
from profiles.units import GB, GIB, MIB, TFLOPS, US

# ---- devices ----------------------------------------------------------------------------------

# Host time of one kernel of eager PyTorch: Python, dispatcher and driver together. Commonly
# reported as 4 to 10 us; ``realexec profile`` measures it.
_LAUNCH_S = 5 * US

# What one core does in fp32 with AVX2: 2 ports x 8 lanes x 2 (multiply, add) x 2.5 GHz.
_CPU_CORE_FLOPS = 80e9

_DEVICE_ROWS = (
    DeviceSpec(
        name="a100", kind="cuda", peak_flops=312 * TFLOPS, memory_bytes=80 * GIB,
        memory_bytes_per_s=2039 * GB, launch_s=_LAUNCH_S,
        source="NVIDIA A100 datasheet 2021: A100-SXM4-80GB, bf16 dense",
    ),
    DeviceSpec(
        name="h100", kind="cuda", peak_flops=989 * TFLOPS, memory_bytes=81559 * MIB,
        memory_bytes_per_s=3350 * GB, launch_s=_LAUNCH_S,
        source="NVIDIA H100 datasheet: SXM5, bf16 without sparsity; memory as in nvidia-smi",
    ),
    DeviceSpec(
        name="h200", kind="cuda", peak_flops=989 * TFLOPS, memory_bytes=143771 * MIB,
        memory_bytes_per_s=4800 * GB, launch_s=_LAUNCH_S,
        source="NVIDIA H200 datasheet: SXM, bf16 without sparsity; memory as in nvidia-smi",
    ),
    DeviceSpec(
        name="b200", kind="cuda", peak_flops=2250 * TFLOPS, memory_bytes=180 * GB,
        memory_bytes_per_s=8000 * GB, launch_s=_LAUNCH_S,
        source="NVIDIA DGX B200 datasheet, one of eight GPUs, bf16 without sparsity",
    ),
    DeviceSpec(
        name="l40s", kind="cuda", peak_flops=362 * TFLOPS, memory_bytes=46068 * MIB,
        memory_bytes_per_s=864 * GB, launch_s=_LAUNCH_S,
        source="NVIDIA L40S datasheet, bf16 without sparsity; memory as nvidia-smi has it",
    ),
    DeviceSpec(
        name="cpu", kind="cpu", peak_flops=_CPU_CORE_FLOPS, memory_bytes=4 * GIB,
        memory_bytes_per_s=10 * GB, launch_s=_LAUNCH_S,
        source="one core of a server CPU with AVX2, assumed; measure with realexec profile",
    ),
)  # fmt: skip
DEVICES: Mapping[str, DeviceSpec] = {device.name: device for device in _DEVICE_ROWS}

# ---- platforms: how devices are wired ---------------------------------------------------------

# Seconds of one step of a ring: NCCL's own tuning constants (graph/tuning.cc: hwLat, ring, LL128).
_NVLINK_STEP_S, _PCIE_STEP_S, _NETWORK_STEP_S = 1.9 * US, 2.5 * US, 4.0 * US


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """A usual server of one device kind: rates are one direction of one device's share."""

    device: str
    devices_per_node: int
    intra: LinkSpec
    inter: LinkSpec
    host: LinkSpec


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


_PLATFORM_ROWS = (
    Platform(
        device="a100", devices_per_node=8,
        intra=_nvlink(300, "NVLink 3: 600 GB/s both ways (A100 datasheet)"),
        inter=_network(200, "DGX A100: one 200 Gb/s HDR adapter for each GPU"), host=_pcie(4),
    ),
    Platform(
        device="h100", devices_per_node=8,
        intra=_nvlink(450, "NVLink 4: 900 GB/s both ways (H100 datasheet)"),
        inter=_network(400, "DGX H100: one 400 Gb/s NDR adapter for each GPU"), host=_pcie(5),
    ),
    Platform(
        device="h200", devices_per_node=8,
        intra=_nvlink(450, "NVLink 4: 900 GB/s both ways (H200 datasheet)"),
        inter=_network(400, "DGX H200: one 400 Gb/s NDR adapter for each GPU"), host=_pcie(5),
    ),
    Platform(
        device="b200", devices_per_node=8,
        intra=_nvlink(900, "NVLink 5: 1.8 TB/s both ways (DGX B200 datasheet)"),
        inter=_network(400, "DGX B200: one 400 Gb/s adapter for each GPU"), host=_pcie(5),
    ),
    Platform(
        device="l40s", devices_per_node=8, intra=_pcie(4),
        inter=_network(100, "assumed: two GPUs share a 200 Gb/s adapter"), host=_pcie(4),
    ),
)  # fmt: skip
PLATFORMS: Mapping[str, Platform] = {row.device: row for row in _PLATFORM_ROWS}

# Workers of one machine talk over gloo on the loopback device; modest figures, not measured.
_LOOPBACK = LinkSpec(bytes_per_s=1 * GB, latency_s=50 * US, source="gloo over loopback, assumed")


# ---- what a user typed ------------------------------------------------------------------------


def _check_count(num_devices: int, *, where: str) -> None:
    if not isinstance(num_devices, int) or isinstance(num_devices, bool) or num_devices < 1:
        raise ConfigError(
            f"{num_devices!r} is not a positive whole number of devices", where=where,
            remedy="write it like 8",
        )  # fmt: skip


def make_cluster(device: str, num_devices: int) -> ClusterSpec:
    """``num_devices`` of a catalogue device in its usual servers; ``cpu`` is this machine.

    Fewer devices than a server has make one node of that many.

    >>> make_cluster("a100", 16).num_nodes
    2

    Raises:
        ConfigError: an unknown device, a count that is not a positive whole number, or one that
            does not fill its nodes.
    """
    if device not in DEVICES:
        raise unknown_name("device", device, DEVICES, where="--device")
    _check_count(num_devices, where="--devices")
    if device == "cpu":
        return local_cluster(num_devices)
    platform = PLATFORMS[device]
    per_node = min(platform.devices_per_node, num_devices)
    if num_devices % per_node:
        low = num_devices // per_node * per_node
        raise ConfigError(
            f"{num_devices} devices do not fill nodes of {per_node} {device}", where="--devices",
            remedy=f"use {low} or {low + per_node}",
        )  # fmt: skip
    return ClusterSpec(
        name=f"{num_devices} x {device}", device=DEVICES[device],
        num_nodes=num_devices // per_node, devices_per_node=per_node, intra_link=platform.intra,
        inter_link=platform.inter, host_link=platform.host,
    )  # fmt: skip


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
    row = DEVICES["cpu"]
    device = DeviceSpec(
        name="cpu", kind="cpu", peak_flops=row.peak_flops * cores,
        memory_bytes=machine_memory_bytes() // num_workers,
        memory_bytes_per_s=row.memory_bytes_per_s, launch_s=row.launch_s,
        source=f"{row.source}; {cores:g} cores a worker",
    )  # fmt: skip
    host = LinkSpec(bytes_per_s=row.memory_bytes_per_s, latency_s=0.0, source=row.source)
    return ClusterSpec(
        name=f"{num_workers} CPU workers", device=device, num_nodes=1,
        devices_per_node=num_workers, intra_link=_LOOPBACK, inter_link=_LOOPBACK, host_link=host,
    )  # fmt: skip
