"""Names of models, devices and clusters: one row each, with the source of its figures.

To add a GPU write one row in ``DEVICES`` and one in ``PLATFORMS``; to add a model, one in
``MODELS``. The functions at the end turn what a user typed into values.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from profiles.errors import ConfigError
from profiles.hardware import ClusterSpec, DeviceSpec, LinkSpec
from profiles.models import HeadKind, ModelSpec, read_hf_config
from profiles.units import GB, GIB, MIB, TFLOPS, US

# ---- models -----------------------------------------------------------------------------------

_LLAMA2 = "Touvron et al. 2023 (Llama 2), and config.json of meta-llama/Llama-2-{}-hf"
_LLAMA3 = "config.json of meta-llama/Meta-Llama-3-{}"
_QWEN = "config.json of Qwen/Qwen2.5-{}-Instruct"

_MODEL_ROWS = (
    ModelSpec(
        name="llama-7b", num_layers=32, hidden=4096, num_heads=32, num_kv_heads=32, head_dim=128,
        ffn=11008, vocab=32000, max_positions=4096, source=_LLAMA2.format("7b"),
    ),
    ModelSpec(
        name="llama-13b", num_layers=40, hidden=5120, num_heads=40, num_kv_heads=40, head_dim=128,
        ffn=13824, vocab=32000, max_positions=4096, source=_LLAMA2.format("13b"),
    ),
    ModelSpec(
        name="llama-34b", num_layers=48, hidden=8192, num_heads=64, num_kv_heads=8, head_dim=128,
        ffn=22016, vocab=32000, rope_theta=1e6, max_positions=16384,
        source="config.json of codellama/CodeLlama-34b-hf (Llama 2 34B was not released)",
    ),
    ModelSpec(
        name="llama-70b", num_layers=80, hidden=8192, num_heads=64, num_kv_heads=8, head_dim=128,
        ffn=28672, vocab=32000, max_positions=4096, source=_LLAMA2.format("70b"),
    ),
    ModelSpec(
        name="llama3-8b", num_layers=32, hidden=4096, num_heads=32, num_kv_heads=8, head_dim=128,
        ffn=14336, vocab=128256, rope_theta=5e5, max_positions=8192, source=_LLAMA3.format("8B"),
    ),
    ModelSpec(
        name="llama3-70b", num_layers=80, hidden=8192, num_heads=64, num_kv_heads=8, head_dim=128,
        ffn=28672, vocab=128256, rope_theta=5e5, max_positions=8192, source=_LLAMA3.format("70B"),
    ),
    ModelSpec(
        name="smollm2-135m", num_layers=30, hidden=576, num_heads=9, num_kv_heads=3, head_dim=64,
        ffn=1536, vocab=49152, tied_embedding=True, rope_theta=1e5, max_positions=8192,
        source="config.json of HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    ModelSpec(
        name="qwen2.5-0.5b", family="qwen2", num_layers=24, hidden=896, num_heads=14,
        num_kv_heads=2, head_dim=64, ffn=4864, vocab=151936, tied_embedding=True, rope_theta=1e6,
        norm_eps=1e-6, max_positions=32768, qkv_bias=True, source=_QWEN.format("0.5B"),
    ),
    ModelSpec(
        name="qwen2.5-1.5b", family="qwen2", num_layers=28, hidden=1536, num_heads=12,
        num_kv_heads=2, head_dim=128, ffn=8960, vocab=151936, tied_embedding=True, rope_theta=1e6,
        norm_eps=1e-6, max_positions=32768, qkv_bias=True, source=_QWEN.format("1.5B"),
    ),
    ModelSpec(
        name="qwen2.5-7b", family="qwen2", num_layers=28, hidden=3584, num_heads=28,
        num_kv_heads=4, head_dim=128, ffn=18944, vocab=152064, rope_theta=1e6, norm_eps=1e-6,
        max_positions=32768, qkv_bias=True, source=_QWEN.format("7B"),
    ),
    ModelSpec(
        name="mistral-7b", family="mistral", num_layers=32, hidden=4096, num_heads=32,
        num_kv_heads=8, head_dim=128, ffn=14336, vocab=32000, rope_theta=1e6, max_positions=32768,
        source="config.json of mistralai/Mistral-7B-Instruct-v0.2 (no sliding window)",
    ),
    ModelSpec(
        name="tinyllama-1.1b", num_layers=22, hidden=2048, num_heads=32, num_kv_heads=4,
        head_dim=64, ffn=5632, vocab=32000, max_positions=2048,
        source="config.json of TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    ),
    ModelSpec(
        name="tiny", num_layers=4, hidden=64, num_heads=4, num_kv_heads=2, head_dim=16, ffn=128,
        vocab=512, tied_embedding=True, max_positions=4096, source="ours: a shape for tests",
    ),
)  # fmt: skip
MODELS: Mapping[str, ModelSpec] = {spec.name: spec for spec in _MODEL_ROWS}

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


def _unknown(what: str, name: str, known: Iterable[str], *, where: str) -> ConfigError:
    names = sorted(known)
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return ConfigError(
        f"unknown {what} '{name}'", where=where, remedy=f"{hint}known: {', '.join(names)}"
    )


def resolve_model(name_or_path: str, head: HeadKind = "lm") -> ModelSpec:
    """The model of a catalogue name, or of a Hugging Face folder or ``config.json``.

    >>> resolve_model("llama-7b").num_parameters
    6738415616

    Raises:
        ConfigError: neither a known name (lists the nearest) nor a readable config.
    """
    if name_or_path in MODELS:
        return MODELS[name_or_path].with_head(head)
    path = Path(name_or_path)
    if path.exists() or os.sep in name_or_path or path.suffix == ".json":
        return read_hf_config(path, head=head)
    error = _unknown("model", name_or_path, MODELS, where="--model")
    error.remedy += "; or give a Hugging Face folder"
    raise error


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
        raise _unknown("device", device, DEVICES, where="--device")
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
