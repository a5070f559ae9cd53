"""What each call may choose: legal (mesh, strategy, micro-batches), costed, then pruned.

Seconds and bytes of a call do not change when its mesh moves by whole nodes, or within a node, so
a ``Choice`` is priced once for each size of mesh; an ``Option`` is a choice on one mesh. Read
``Choice``, ``Option``, then ``OptionSpace``.

Pruning is safe: a choice goes only if it needs more memory than a device has, or if another with
the same layout is no slower and no larger on any stage. What other calls see of a call is its
layout, so every plan keeps an equal that is at least as good.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from operator import add

from planner.cost.stage import VALUE_BYTES
from planner.graph import CallKind, ModelFunctionCall
from planner.layout import Layout
from planner.lock import Lock
from planner.memory import (
    RESERVE_BYTES,
    STAGING_BYTES,
    MemoryBreakdown,
    average_bytes,
    call_memory,
    held_memory,
    running_bytes,
)
from planner.mesh import DeviceMesh, enumerate_meshes
from planner.plan import Allocation, Problem, largest_dp
from planner.simulate import StepPrices
from planner.strategy import ParallelStrategy, Recompute, legal_strategies
from profiles.errors import ConfigError, InfeasibleError
from profiles.hardware import ClusterSpec
from profiles.models import ModelSpec
from profiles.units import format_bytes

RECOMPUTE: Sequence[Recompute] = ("none", "selective", "full")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choice:
    """A strategy with micro-batches on any mesh of its size.

    Bytes by pipeline stage: ``held`` what stays on a device if the call's layout is a home of
    its role, ``borrowed`` if the weights come for this call, ``running`` while it runs.
    """

    strategy: ParallelStrategy
    num_micro_batches: int
    generation_batch: int = 0
    seconds: float
    held: tuple[int, ...]
    borrowed: tuple[int, ...]
    running: tuple[int, ...]

    @property
    def axes(self) -> tuple[int, int, int]:
        """What fixes the layout on a given mesh: (pp, tp, dp)."""
        return self.strategy.pp, self.strategy.tp, self.strategy.dp


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Option:
    """A choice on a mesh; one value for each, so options are compared by identity."""

    call: str
    mesh: DeviceMesh
    choice: Choice
    layout: Layout | None

    @property
    def seconds(self) -> float:
        return self.choice.seconds

    @property
    def allocation(self) -> Allocation:
        return Allocation(
            mesh=self.mesh,
            strategy=self.choice.strategy,
            num_micro_batches=self.choice.num_micro_batches,
            generation_batch=self.choice.generation_batch,
        )


Assignment = tuple[Option, ...]  # one option for each call, in the graph's order


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


def _enough_rows(problem: Problem, spec: ModelSpec, strategy: ParallelStrategy) -> int:
    """Sequences whose keys and values take ``SMALL_CACHE`` of a device's memory."""
    device = problem.cluster.device
    row_bytes = problem.workload.max_tokens * spec.kv_bytes_per_token(
        bytes_per_value=VALUE_BYTES[device.kind]
    )
    return ceil(SMALL_CACHE * device.memory_bytes * strategy.pp * strategy.tp / row_bytes)


def variants(problem: Problem, call: ModelFunctionCall, mesh: DeviceMesh) -> Iterator[Allocation]:
    """Every way to run a call on a mesh that is worth pricing."""
    most, spec = largest_dp(problem, call.name), problem.spec_of(call.name)
    for legal in legal_strategies(spec, mesh, problem.cluster, max_dp=most):
        groups = ceil(problem.workload.batch_size / legal.dp)
        share = groups * problem.workload_of(call.name).group_size
        for count in micro_batch_counts(legal, most // legal.dp) if spec is not None else [1]:
            if call.kind is CallKind.GENERATE and spec is not None:
                enough = _enough_rows(problem, spec, legal)
                batches, strategies = generation_batches(share, count, enough=enough), [legal]
            else:
                batches, strategies = [0], _strategies(call, legal)
            for strategy in strategies:
                for rows in batches:
                    yield Allocation(
                        mesh=mesh, strategy=strategy, num_micro_batches=count,
                        generation_batch=rows,
                    )  # fmt: skip


def _strategies(call: ModelFunctionCall, legal: ParallelStrategy) -> list[ParallelStrategy]:
    """A split with sequence parallelism, and with ZeRO and recomputation where the call trains."""
    split_tokens = (False, True) if legal.tp > 1 else (False,)
    if call.kind is not CallKind.TRAIN:
        return [replace(legal, sequence_parallel=split) for split in split_tokens]
    return [
        replace(legal, zero=zero, recompute=recompute, sequence_parallel=split)
        for zero in ((0, 1) if legal.dp > 1 else (0,))
        for recompute in RECOMPUTE
        for split in split_tokens
    ]


def considered_meshes(cluster: ClusterSpec, *, most_runs: int = 16) -> Iterator[DeviceMesh]:
    """Every legal mesh where there are at most ``most_runs`` nodes; a coarser set on more.

    With ``step = ceil(nodes / most_runs)``: slices of a node, runs of a power of two of nodes
    below ``step`` at multiples of their length, runs of multiples of ``step`` nodes at multiples
    of ``step``, and the whole cluster. So the space does not grow with large clusters; a lower
    bound is over plans with these meshes.
    """
    per_node = cluster.devices_per_node
    step = ceil(cluster.num_nodes / most_runs)
    for mesh in enumerate_meshes(cluster):
        nodes, first = mesh.num_devices // per_node, mesh.first // per_node
        slice_or_whole = mesh.num_devices % per_node or mesh.num_devices == cluster.num_devices
        long_run = nodes % step == 0 and first % step == 0
        short_run = nodes < step and nodes & (nodes - 1) == 0 and first % max(1, nodes) == 0
        if slice_or_whole or long_run or short_run:
            yield mesh


def undominated(choices: Sequence[Choice]) -> list[Choice]:
    """Choices of one layout without those that another equals or beats in seconds and bytes.

    >>> def choice(seconds, running):
    ...     return Choice(strategy=ParallelStrategy(), num_micro_batches=1, seconds=seconds,
    ...                   held=(0,), borrowed=(0,), running=(running,))
    >>> [c.seconds for c in undominated([choice(1, 9), choice(2, 5), choice(3, 7)])]
    [1, 2]
    """
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.seconds, sum(c.held), sum(c.running))):
        if not any(_no_larger(better, choice) for better in kept):
            kept.append(choice)
    return kept


def _no_larger(a: Choice, b: Choice) -> bool:
    return all(x <= y for x, y in zip(a.held, b.held)) and all(
        x <= y for x, y in zip(a.running, b.running)
    )


class OptionSpace:
    """All options of a problem under the prices of a cost model.

    Raises:
        InfeasibleError: a call fits on no mesh even alone.
        ConfigError: no option of a call is as its lock says.
    """

    def __init__(
        self, problem: Problem, prices: StepPrices, locks: Mapping[str, Lock] | None = None
    ) -> None:
        self.problem = problem
        self.locks = dict(locks or {})
        self.prices = prices
        self.calls = problem.graph.calls
        self.meshes_by_size: dict[int, list[DeviceMesh]] = {}
        for mesh in considered_meshes(problem.cluster):
            self.meshes_by_size.setdefault(mesh.num_devices, []).append(mesh)
        self.num_costed = 0
        self._options: dict[tuple[str, DeviceMesh, int], Option] = {}
        self._known_held: dict[tuple[object, ...], tuple[int, ...]] = {}
        self._known: dict[tuple[object, ...], Mapping[int, tuple[Choice, ...]]] = {}
        self.choices = {call.name: self._choices(call) for call in self.calls}
        self.meshes: Mapping[str, tuple[DeviceMesh, ...]] = {
            name: tuple(m for size in by_size for m in self.meshes_of(name, size))
            for name, by_size in self.choices.items()
        }

    def meshes_of(self, call: str, size: int) -> list[DeviceMesh]:
        """Meshes of ``size`` devices that a call may take, by position."""
        fixed = self._fixed_mesh(call)
        return [m for m in self.meshes_by_size.get(size, []) if fixed in (None, m)]

    def _fixed_mesh(self, call: str) -> DeviceMesh | None:
        lock = self.locks.get(call, Lock())
        return lock.allocation.mesh if lock.allocation is not None else lock.mesh

    def allows(self, assignment: Assignment) -> bool:
        """Is every locked call as its lock says?"""
        return not self.locks or all(
            option.call not in self.locks or self.locks[option.call].allows(option.allocation)
            for option in assignment
        )

    def option(self, call: str, mesh: DeviceMesh, choice: Choice) -> Option:
        """The option of ``choice`` on ``mesh``."""
        key = (call, mesh, id(choice))
        found = self._options.get(key)
        if found is None:
            spec = self.problem.spec_of(call)
            layout = None if spec is None else Layout.of(spec, mesh, choice.strategy)
            found = Option(call=call, mesh=mesh, choice=choice, layout=layout)
            self._options[key] = found
        return found

    def options(self, call: str) -> Iterator[Option]:
        """Every option of a call, by mesh and then seconds."""
        for mesh in self.meshes[call]:
            for choice in self.choices[call][mesh.num_devices]:
                yield self.option(call, mesh, choice)

    @property
    def num_plans(self) -> float:
        """How many assignments there are."""
        product = 1.0
        for call in self.calls:
            by_size = self.choices[call.name]
            product *= sum(len(by_size[m.num_devices]) for m in self.meshes[call.name])
        return product

    # ---- pricing ----

    def _choices(self, call: ModelFunctionCall) -> Mapping[int, tuple[Choice, ...]]:
        """Choices by size of mesh, fastest first; only sizes that have one."""
        # Calls of equal kind and model cost the same: critic_inf and rew_inf.
        workload = self.problem.workload_of(call.name)
        key = (
            self.locks.get(call.name),
            call.kind,
            self._is_average(call),
            (call.num_mini_batches, call.num_epochs),
            self.problem.spec_of(call.name),
            workload,
        )
        if key in self._known:
            return self._known[key]
        found: dict[int, tuple[Choice, ...]] = {}
        for size in self.meshes_by_size:
            groups: dict[tuple[int, int, int], list[Choice]] = {}
            for choice in self._fitting(call, self.meshes_of(call.name, size)):
                groups.setdefault(choice.axes, []).append(choice)
            kept = [choice for group in groups.values() for choice in undominated(group)]
            if kept:
                found[size] = tuple(sorted(kept, key=lambda c: c.seconds))
        if not found:
            raise self._locked_out(call) if call.name in self.locks else self._infeasible(call)
        self._known[key] = found
        return found

    def _fitting(self, call: ModelFunctionCall, meshes: Sequence[DeviceMesh]) -> Iterator[Choice]:
        """Choices that fit, and are as locked, on meshes of one size: all cost the same."""
        lock = self.locks.get(call.name, Lock())
        if lock.allocation is not None and meshes:
            candidates: Iterable[Allocation] = [lock.allocation]
        else:
            candidates = variants(self.problem, call, meshes[0]) if meshes else ()
        device = self.problem.cluster.device
        free_bytes = device.memory_bytes - RESERVE_BYTES[device.kind]
        known: dict[tuple[object, ...], tuple[int, ...]] = {}
        for allocation in candidates:
            if not lock.allows(allocation):
                continue
            held, running = self._bytes(call, allocation, known)
            if max(map(add, held, running)) <= free_bytes:
                self.num_costed += 1
                yield self._choice(call, allocation, held, running)

    def _locked_out(self, call: ModelFunctionCall) -> ConfigError:
        return ConfigError(
            "no option of this call that fits a device's memory is as it is locked",
            where=f"lock.{call.name}",
            remedy="fix less of it: mesh, strategy or num_micro_batches",
        )

    def _bytes(
        self, call: ModelFunctionCall, allocation: Allocation,
        known: dict[tuple[object, ...], tuple[int, ...]],
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:  # fmt: skip
        """Held and running, by stage; the latter does not depend on ZeRO: kept in ``known``."""
        spec, s = self.problem.spec_of(call.name), allocation.strategy
        if spec is None:
            return (0,), (0,)
        counts = (allocation.num_micro_batches, allocation.generation_batch)
        key = (s.pp, s.tp, s.dp, s.recompute, s.sequence_parallel, counts)
        if key not in known:
            known[key] = running_bytes(self.problem, call, allocation, spec)
        held = self._held(spec, s, call.kind is CallKind.TRAIN)
        if self._is_average(call):
            kind = self.problem.cluster.device.kind
            held = tuple(average_bytes(weights, kind) for weights in held)
        return held, known[key]

    def _is_average(self, call: ModelFunctionCall) -> bool:
        return any(average.role == call.role for average in self.problem.graph.averages)

    def _choice(
        self, call: ModelFunctionCall, allocation: Allocation, held: tuple[int, ...],
        running: tuple[int, ...],
    ) -> Choice:  # fmt: skip
        spec, s = self.problem.spec_of(call.name), allocation.strategy
        borrowed: tuple[int, ...] = (0,)
        if spec is not None:
            staging = STAGING_BYTES[self.problem.cluster.device.kind]
            borrowed = tuple(weights + staging for weights in self._held(spec, s, False))
        return Choice(
            strategy=s,
            num_micro_batches=allocation.num_micro_batches,
            generation_batch=allocation.generation_batch,
            seconds=self.prices.call(call.name, allocation).seconds,
            held=held,
            borrowed=borrowed,
            running=running,
        )

    def _held(self, spec: ModelSpec, s: ParallelStrategy, trained: bool) -> tuple[int, ...]:
        """Bytes of weights and their state, by stage."""
        key = (spec, s.pp, s.tp, s.dp, s.zero if trained else 0, trained)
        if key not in self._known_held:
            kind = self.problem.cluster.device.kind
            self._known_held[key] = tuple(
                held_memory(spec, s, stage, kind, trained=trained).total for stage in range(s.pp)
            )
        return self._known_held[key]

    def _infeasible(self, call: ModelFunctionCall) -> InfeasibleError:
        """What the smallest way to run a call lacks."""
        best: tuple[int, Allocation, MemoryBreakdown] | None = None
        for meshes in self.meshes_by_size.values():
            for allocation in variants(self.problem, call, meshes[0]):
                need = call_memory(self.problem, call.name, allocation)
                if best is None or need.total < best[0]:
                    best = (need.total, allocation, need)
        assert best is not None, call.name
        total, allocation, need = best
        cluster = self.problem.cluster
        item, num_bytes = need.biggest
        return InfeasibleError(
            f"role {call.role} does not fit: at its smallest ({allocation}) each "
            f"{cluster.device.name} needs {format_bytes(total)} and has "
            f"{format_bytes(cluster.device.memory_bytes)}, "
            f"{format_bytes(total - cluster.device.memory_bytes)} too little; most is {item} with "
            f"{format_bytes(num_bytes)}",
            where=call.name,
            remedy=more_memory(problem=self.problem, item=item),
        )


def more_memory(problem: Problem, item: str) -> str:
    """What a user can do where ``item`` of a ``MemoryBreakdown`` takes too much."""
    remedies = [
        f"use more than {problem.cluster.num_devices} devices",
        "devices with more memory",
        "a smaller model",
    ]
    if item in ("kv_cache", "activations", "logits", "buffers"):
        remedies[-1] = "a smaller batch_size"
    return ", ".join(remedies[:-1]) + f", or {remedies[-1]}"
