"""Names of devices: one row each, with the source of its figures and of its price.

To add a GPU write one row in ``_DEVICE_ROWS``, and in ``clusters.py`` the server that it is in.
Prices are what was asked for one of the GPUs, on demand, on the day that is named: defaults, to be
replaced by ``device.dollars_per_hour`` of a cluster file or ``cluster.device.dollars_per_hour=…``.
"""

from __future__ import annotations

from collections.abc import Mapping

from profiles.hardware import DeviceSpec
from profiles.units import GB, GIB, MIB, TFLOPS, US

# Host time of one kernel of eager PyTorch: Python, dispatcher and driver together. Commonly
# reported as 4 to 10 us; ``realexec profile`` measures it.
_LAUNCH_S = 5 * US

# What one core does in fp32 with AVX2: 2 ports x 8 lanes x 2 (multiply, add) x 2.5 GHz.
_CPU_CORE_FLOPS = 80e9

_LAMBDA = "Lambda, servers of 8 on demand, list of 2026-09-20 (lambda.ai/instances)"

_DEVICE_ROWS = (
    DeviceSpec(
        name="a100", kind="cuda", peak_flops=312 * TFLOPS, memory_bytes=80 * GIB,
        memory_bytes_per_s=2039 * GB, launch_s=_LAUNCH_S,
        source="NVIDIA A100 datasheet 2021: A100-SXM4-80GB, bf16 dense",
        dollars_per_hour=2.79, price_source=_LAMBDA,
    ),
    DeviceSpec(
        name="a100-40g", kind="cuda", peak_flops=312 * TFLOPS, memory_bytes=40 * GIB,
        memory_bytes_per_s=1555 * GB, launch_s=_LAUNCH_S,
        source="NVIDIA A100 datasheet 2020: A100-SXM4-40GB, bf16 dense",
        dollars_per_hour=1.99, price_source=_LAMBDA,
    ),
    DeviceSpec(
        name="h100", kind="cuda", peak_flops=989 * TFLOPS, memory_bytes=81559 * MIB,
        memory_bytes_per_s=3350 * GB, launch_s=_LAUNCH_S,
        source="NVIDIA H100 datasheet: SXM5, bf16 without sparsity; memory as in nvidia-smi",
        dollars_per_hour=3.99, price_source=_LAMBDA,
    ),
    DeviceSpec(
        name="h200", kind="cuda", peak_flops=989 * TFLOPS, memory_bytes=143771 * MIB,
        memory_bytes_per_s=4800 * GB, launch_s=_LAUNCH_S,
        source="NVIDIA H200 datasheet: SXM, bf16 without sparsity; memory as in nvidia-smi",
        dollars_per_hour=3.99,
        price_source="Hyperstack, on demand, list of 2026-08-26 (hyperstack.cloud/gpu-pricing)",
    ),
    DeviceSpec(
        name="gb200", kind="cuda", peak_flops=2500 * TFLOPS, memory_bytes=189471 * MIB,
        memory_bytes_per_s=8000 * GB, launch_s=_LAUNCH_S,
        source="NVIDIA GB200 NVL72 datasheet, one of 72 GPUs, bf16 without sparsity; memory as in "
        "nvidia-smi",
        dollars_per_hour=4.54,
        price_source="Spheron, on demand, 9.08 for a superchip of two GPUs, 2026-03-17",
    ),
    DeviceSpec(
        name="b200", kind="cuda", peak_flops=2250 * TFLOPS, memory_bytes=180 * GB,
        memory_bytes_per_s=8000 * GB, launch_s=_LAUNCH_S,
        source="NVIDIA DGX B200 datasheet, one of eight GPUs, bf16 without sparsity",
        dollars_per_hour=6.69, price_source=_LAMBDA,
    ),
    DeviceSpec(
        name="l40s", kind="cuda", peak_flops=362 * TFLOPS, memory_bytes=46068 * MIB,
        memory_bytes_per_s=864 * GB, launch_s=_LAUNCH_S,
        source="NVIDIA L40S datasheet, bf16 without sparsity; memory as nvidia-smi has it",
        dollars_per_hour=1.861,
        price_source="AWS g6e.xlarge (one GPU), us-east-1 on demand, 2025-08",
    ),
    DeviceSpec(
        name="a10g", kind="cuda", peak_flops=70 * TFLOPS, memory_bytes=23028 * MIB,
        memory_bytes_per_s=600 * GB, launch_s=_LAUNCH_S,
        source="NVIDIA A10G datasheet (AWS), bf16 without sparsity; memory as in nvidia-smi",
        dollars_per_hour=1.006,
        price_source="AWS g5.xlarge (one GPU), us-east-1 on demand, 2026-06",
    ),
    DeviceSpec(
        name="cpu", kind="cpu", peak_flops=_CPU_CORE_FLOPS, memory_bytes=4 * GIB,
        memory_bytes_per_s=10 * GB, launch_s=_LAUNCH_S,
        source="one core of a server CPU with AVX2, assumed; measure with realexec profile",
    ),
)  # fmt: skip
DEVICES: Mapping[str, DeviceSpec] = {device.name: device for device in _DEVICE_ROWS}
