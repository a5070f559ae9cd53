"""What is measured of the machine itself: its rates, its collectives, its names and versions.

Collectives are timed over the process group and through the functions that a run uses.
"""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from executor.cross_memory import CrossMemory, place_of
from executor.parallel import data
from executor.profile_measure import Action, Lockstep, Probe
from profiles.clusters import machine_memory_bytes
from profiles.hardware import DeviceSpec
from profiles.units import KIB, MIB

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "p2p", "read")
PAIRWISE = frozenset({"p2p", "read"})
COLLECTIVE_BYTES = (KIB, 32 * KIB, 256 * KIB, MIB, 8 * MIB, 64 * MIB)
COPY_BYTES = 256 * MIB
_DRIVER = Path("/proc/driver/nvidia/version")
# Rows of the matrix products whose best rate stands for the device's peak.
PEAK_ROWS = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192, 16384)}


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def versions(device: torch.device) -> dict[str, str]:
    """What a measurement depends on besides the device."""
    found = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
    }
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["driver"] = driver_version(_DRIVER)
    return found


def driver_version(file: Path) -> str:
    """NVIDIA's, as its kernel module gives it: the first number with two points."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "unknown"
    found = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", text)
    return found[0] if found else "unknown"


def memory_bytes(device: torch.device, workers: int) -> int:
    """Of the device, or one worker's share of the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return machine_memory_bytes() // workers


def measure_device(
    lockstep: Lockstep, *, hidden: int, ffn: int, dtype: torch.dtype, workers: int, cap_s: float
) -> DeviceSpec:
    """The device, or one worker's share of the CPU, while all workers are busy.

    ``peak_flops``: the best rate of a block's widest product, [rows, hidden] x [hidden, ffn].
    ``memory_bytes_per_s``: a copy's bytes, read and written. ``launch_s``: host time of one
    operation on one value.
    """
    device, kind = lockstep.device, lockstep.device.type
    assert kind in ("cpu", "cuda"), kind
    weight = torch.randn(ffn, hidden, dtype=dtype, device=device)
    peak = 0.0
    for rows in PEAK_ROWS[kind]:
        x = torch.randn(rows, hidden, dtype=dtype, device=device)
        product_s = _seconds(lockstep, partial(torch.mm, x, weight.T), cap_s / 4)
        peak = max(peak, 2.0 * rows * hidden * ffn / product_s)
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    copy_s = _seconds(lockstep, lambda: target.copy_(source), cap_s / 4)
    share = device_name(device)
    if kind == "cpu":
        share += f", 1 of {workers} workers with {torch.get_num_threads()} threads"
    return DeviceSpec(
        name=share,
        kind="cuda" if kind == "cuda" else "cpu",
        peak_flops=peak,
        memory_bytes=memory_bytes(device, workers),
        memory_bytes_per_s=2.0 * COPY_BYTES / copy_s,
        launch_s=_launch_s(device),
        source="realexec profile: best matrix product, copy, one operation on one value",
    )


def _seconds(lockstep: Lockstep, action: Action, cap_s: float) -> float:
    probe = Probe(actions=(action,), readings={"time": (1,)})
    return lockstep.measure(probe, cap_s=cap_s)["time"].seconds


def _launch_s(device: torch.device, repeats: int = 200) -> float:
    """Host seconds of starting one operation on one value: the best of ten rounds."""
    x = torch.ones(1, device=device)
    rounds = []
    for _ in range(10):
        before_s = time.perf_counter()
        for _ in range(repeats):
            x.add_(1.0)
        rounds.append((time.perf_counter() - before_s) / repeats)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return min(rounds)


# ---- collectives --------------------------------------------------------------------------


def group_sizes(workers: int) -> list[int]:
    """Powers of two that divide ``workers``, and all workers.

    >>> group_sizes(12)
    [2, 4, 12]
    """
    sizes = [2**i for i in range(1, workers.bit_length()) if workers % 2**i == 0]
    return sizes + ([workers] if workers > 1 and workers not in sizes else [])


def build_groups(workers: int, rank: int) -> Mapping[int, tuple[list[int], dist.ProcessGroup]]:
    """Group size -> this rank's (ranks, group) among disjoint groups of it; collective."""
    mine: dict[int, tuple[list[int], dist.ProcessGroup]] = {}
    for size in group_sizes(workers):
        for first in range(0, workers, size):
            ranks = list(range(first, first + size))
            group = dist.new_group(ranks)
            if rank in ranks:
                mine[size] = (ranks, group)
    return mine


def collective_action(
    operation: str, num_bytes: int, *, ranks: Sequence[int], group: dist.ProcessGroup,
    device: torch.device, memory: CrossMemory | None = None,
) -> Action:  # fmt: skip
    """``operation`` on fp32 values of ``num_bytes``: the whole tensor's, before it is cut or

    after it is joined. ``p2p`` goes from the group's first rank to its last and back: two
    messages. ``read``: of two ranks each reads all of the other's, both at once.
    """
    size = len(ranks)
    num_values = max(1, num_bytes // 4 // size) * size
    first, last, me = ranks[0], ranks[-1], dist.get_rank()
    if operation == "read":
        assert memory is not None
        return _reading(num_values, memory, first if me == last else last, group)
    flat = torch.zeros(num_values, device=device)
    if operation == "all_reduce":
        return lambda: data.all_reduce(flat, group)
    if operation == "all_gather":
        return lambda: data.all_gather(flat, group)
    if operation == "reduce_scatter":
        return lambda: data.reduce_scatter(flat, group)
    assert operation == "p2p", operation

    def there_and_back() -> None:
        if me == first:
            dist.send(flat, last)
            dist.recv(flat, last)
        elif me == last:
            dist.recv(flat, first)
            dist.send(flat, first)

    return there_and_back


def _reading(num_values: int, memory: CrossMemory, other: int, group: dist.ProcessGroup) -> Action:
    """Both of two ranks call it: they tell each other where the values lie."""
    # One storage, so that what is read lives as long as the action.
    shown, target = torch.zeros(2, num_values)
    places = data.gather(torch.tensor(place_of(shown)), group)
    theirs = places[dist.get_group_rank(group, other)].tolist()
    return lambda: memory.read(other, [theirs], [target])
