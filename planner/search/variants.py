"""What is worth trying for a call: meshes, strategies, micro-batches, waves, offload.

``choices.py`` prices it. Read ``variants``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from math import ceil, gcd

from planner.cost.stage import VALUE_BYTES
from planner.graph import CallKind, ModelFunctionCall
from planner.mesh import DeviceMesh, enumerate_meshes
from planner.plan import Allocation, Problem, largest_dp, offload_problem
from planner.strategy import ParallelStrategy, Recompute, legal_strategies
from profiles.hardware import Cluster, ClusterSpec, DeviceSpec
from profiles.models import ModelSpec

RECOMPUTE: Sequence[Recompute] = ("none", "selective", "full")


def micro_batch_counts(strategy: ParallelStrategy, num_sequences: int) -> list[int]:
    """Counts worth trying for ``num_sequences`` of a data-parallel rank.

    Without a pipeline powers of two: they only save memory. With one of ``pp`` stages, one
    micro-batch and multiples of ``pp`` by powers of two; fewer than ``pp`` only where there are
    no more sequences.

    >>> micro_batch_counts(ParallelStrategy(), 9)
    [1, 2, 4, 8]
    >>> micro_batch_counts(ParallelStrategy(pp=3), 16)
    [1, 3, 6, 12]
    >>> micro_batch_counts(ParallelStrategy(pp=8), 5)
    [1, 5]
    """
    pp = strategy.pp
    found = {1, min(pp, num_sequences)}
    count = pp
    while count <= num_sequences:
        found.add(count)
        count *= 2
    return sorted(found)


def generation_batches(num_sequences: int, num_micro_batches: int, *, enough: int) -> list[int]:
    """Counts worth trying for the sequences of a data-parallel rank: all (0), a half, a quarter, …

    At least one sequence for each group in flight, and no less than ``enough``, below which
    memory that keys and values leave free is of no use to anybody.

    >>> generation_batches(32, 2, enough=4)
    [0, 16, 8, 4]
    """
    found, rows = [0], num_sequences
    while rows % 2 == 0 and rows // 2 >= max(num_micro_batches, enough):
        rows //= 2
        found.append(rows)
    return found


# Keys and values that take less than this share of a device are not worth waves.
SMALL_CACHE = 1 / 16


def _enough_rows(
    problem: Problem, spec: ModelSpec, strategy: ParallelStrategy, device: DeviceSpec
) -> int:
    """Sequences whose keys and values take ``SMALL_CACHE`` of a device's memory."""
    row_bytes = problem.workload.max_tokens * spec.kv_bytes_per_token(
        bytes_per_value=VALUE_BYTES[device.kind]
    )
    return ceil(SMALL_CACHE * device.memory_bytes * strategy.pp * strategy.tp / row_bytes)


def variants(
    problem: Problem, call: ModelFunctionCall, mesh: DeviceMesh, *, offload: bool = False
) -> Iterator[Allocation]:
    """Every way to run a call on a mesh that is worth pricing, in every state (``ways``,

    ``zero_and_offload``).
    """
    states = zero_and_offload(problem, call, offload=offload)
    for layout in ways(problem, call, mesh):
        for way, (zero, away) in product(layout, states):
            if zero == 0 or way.strategy.dp > 1:
                yield replace(way, strategy=replace(way.strategy, zero=zero), offload=away)


def ways(
    problem: Problem, call: ModelFunctionCall, mesh: DeviceMesh
) -> Iterator[Sequence[Allocation]]:
    """Of each (pp, tp, dp, ep) what may be chosen besides; ZeRO is 0, offload False."""
    most, spec = largest_dp(problem, call.name), problem.spec_of(call.name)
    group_size = problem.workload_of(call.name).group_size
    splits = legal_strategies(spec, mesh, problem.cluster, max_dp=most)
    for legal in (way for split in splits for way in _with_experts(spec, split)):
        share = ceil(problem.workload.batch_size / legal.dp) * group_size
        counts = micro_batch_counts(legal, most // legal.dp) if spec is not None else [1]
        if call.kind is CallKind.GENERATE and spec is not None:
            device = problem.cluster.group_of(mesh.first).device
            enough = _enough_rows(problem, spec, legal, device)
            yield [
                Allocation(
                    mesh=mesh, strategy=legal, num_micro_batches=count, generation_batch=rows
                )
                for count in counts
                for rows in generation_batches(share, count, enough=enough)
            ]
        else:
            yield [
                Allocation(mesh=mesh, strategy=strategy, num_micro_batches=count)
                for strategy, count in product(_strategies(call, legal), counts)
            ]


def _with_experts(spec: ModelSpec | None, split: ParallelStrategy) -> list[ParallelStrategy]:
    """``split`` with every ep that divides its dp and the experts; without experts as it is."""
    if spec is None or not spec.num_experts:
        return [split]
    most = gcd(split.dp, spec.num_experts)
    return [replace(split, ep=ep) for ep in range(1, most + 1) if most % ep == 0]


def zero_and_offload(
    problem: Problem, call: ModelFunctionCall, *, offload: bool
) -> list[tuple[int, bool]]:
    """ZeRO stages (above 0 with dp > 1 only) and whether a part of its role is in the host's

    memory meanwhile, which only ``offload`` allows.
    """
    zeros = (0, 1) if call.kind is CallKind.TRAIN else (0,)
    may = offload and offload_problem(problem, call.name) is None
    return list(product(zeros, (False, True) if may else (False,)))


def _strategies(call: ModelFunctionCall, legal: ParallelStrategy) -> list[ParallelStrategy]:
    """A split with sequence parallelism, and with recomputation where the call trains."""
    recompute = RECOMPUTE if call.kind is CallKind.TRAIN else ("none",)
    return [
        replace(legal, recompute=again, sequence_parallel=split)
        for again in recompute
        for split in ((False, True) if legal.tp > 1 else (False,))
    ]


def considered_meshes(cluster: Cluster, *, most_runs: int = 16) -> Iterator[DeviceMesh]:
    """Every legal mesh where a group has at most ``most_runs`` nodes; a coarser set on more.

    With ``step = ceil(nodes / most_runs)``: slices of a node, runs of a power of two of nodes
    below ``step`` at multiples of their length, runs of multiples of ``step`` nodes at multiples
    of ``step``, and the whole group. So the space does not grow with large clusters; a lower
    bound is over plans with these meshes.
    """
    for start, group in zip(cluster.starts, cluster.groups, strict=True):
        for mesh in _considered(group, most_runs):
            yield mesh.shifted(start)


def _considered(cluster: ClusterSpec, most_runs: int) -> Iterator[DeviceMesh]:
    per_node = cluster.devices_per_node
    step = ceil(cluster.num_nodes / most_runs)
    for mesh in enumerate_meshes(cluster):
        nodes, first = mesh.num_devices // per_node, mesh.first // per_node
        slice_or_whole = mesh.num_devices % per_node or mesh.num_devices == cluster.num_devices
        long_run = nodes % step == 0 and first % step == 0
        short_run = nodes < step and nodes & (nodes - 1) == 0 and first % max(1, nodes) == 0
        if slice_or_whole or long_run or short_run:
            yield mesh
