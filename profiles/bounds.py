"""Seconds that a device's peak rates allow a kernel of a shipped table: none is sooner done,

but for what a cache holds. ``kernels.py`` interpolates times over these, ``kernel_tables.py``
refuses those that are far from them.
"""

from __future__ import annotations

from profiles.hardware import DeviceSpec

Coordinates = tuple[float, ...]
_VALUE_BYTES = 2  # every shipped table is bf16


def product_bytes(m: float, n: float, k: float) -> float:
    """Of [m, k] x [k, n] in bf16, each matrix once."""
    return _VALUE_BYTES * (m * k + k * n + m * n)


def product_bound_s(
    device: DeviceSpec, m: float, n: float, k: float, *, cold_share: float = 1.0
) -> float:
    """Seconds of [m, k] x [k, n] in bf16 at the peak rates, each matrix read or written once;

    of the memory's rate ``cold_share``.
    """
    memory_s = product_bytes(m, n, k) / (cold_share * device.memory_bytes_per_s)
    return max(2.0 * m * n * k / device.peak_flops, memory_s)


def attention_point(
    batch: float, length: float, heads: int, kv_heads: int, head_dim: int
) -> Coordinates:
    """Where in its table a kernel is: (head size, heads of a kv head, blocks, length).

    A block is one kv head of one sequence.
    """
    return head_dim, heads / kv_heads, batch * kv_heads, length


def attention_bound_s(device: DeviceSpec, point: Coordinates, *, decode: bool) -> float:
    """Seconds at the peak rates of attention at an ``attention_point``.

    4 * head_dim FLOPs for each head and pair of positions, half of the pairs when causal; q, k, v
    and the result once.
    """
    head_dim, group, blocks, length = point
    queries = 1.0 if decode else length
    flops = (4.0 if decode else 2.0) * blocks * group * head_dim * queries * length
    values = 2.0 * blocks * head_dim * (group * queries + length)
    return max(flops / device.peak_flops, _VALUE_BYTES * values / device.memory_bytes_per_s)


def kernel_bound_s(device: DeviceSpec, table: str, row: tuple[int, ...]) -> float:
    """Of the kernel in ``row`` of a shipped ``table``; a collective reads its bytes from memory."""
    if table == "gemm":
        m, n, k = row
        return product_bound_s(device, m, n, k)
    if table.endswith("attention"):
        batch, length, heads, kv_heads, head_dim = row
        point = attention_point(batch, length, heads, kv_heads, head_dim)
        return attention_bound_s(device, point, decode=table == "decode_attention")
    return row[-1] / device.memory_bytes_per_s
