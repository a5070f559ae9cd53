"""What each call may choose: what ``variants.py`` lists, costed, then pruned.

Seconds and bytes of a call do not change when its mesh moves by whole nodes, or within a node, so
a ``Choice`` is priced once for each size of mesh; an ``Option`` is a choice on one mesh. Read
``Choice``, ``Option``, then ``OptionSpace``.

Pruning is safe: a choice goes only if it needs more memory than a device has, or if another with
the same layout is no slower and no larger on any stage. What other calls see of a call is its
layout, so every plan keeps an equal that is at least as good.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import add, sub

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
    leaves_device,
    running_bytes,
)
from planner.mesh import DeviceMesh
from planner.plan import Allocation, Problem, offload_problem
from planner.search.variants import considered_meshes, variants
from planner.simulate import StepPrices
from planner.strategy import ParallelStrategy
from profiles.errors import ConfigError, InfeasibleError
from profiles.models import ModelSpec
from profiles.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choice:
    """A strategy with micro-batches on any mesh of its size.

    ``seconds``: of the call and of what leaves the device after it, ``reload_s`` of what comes from
    the host before it, ``average_s`` of the average in its layout, where its role is one. Bytes by
    pipeline stage: ``held`` what stays on a device if the call's layout is a home of its role,
    ``borrowed`` if the weights come for this call, ``running`` while it runs.
    """

    strategy: ParallelStrategy
    num_micro_batches: int
    generation_batch: int = 0
    offload: bool = False
    seconds: float
    reload_s: float = 0.0
    average_s: float = 0.0
    held: tuple[int, ...]
    borrowed: tuple[int, ...]
    running: tuple[int, ...]

    @property
    def busy_s(self) -> float:
        """Seconds of its devices, whatever it waits for."""
        return self.reload_s + self.seconds

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
            offload=self.choice.offload,
        )


Assignment = tuple[Option, ...]  # one option for each call, in the order of ``step_calls``


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
    return (
        a.reload_s <= b.reload_s
        and all(x <= y for x, y in zip(a.held, b.held))
        and all(x <= y for x, y in zip(a.running, b.running))
    )


class OptionSpace:
    """All options of a problem under the prices of a cost model.

    ``larger``: the space of the same problem and locks on more of the same nodes, under the same
    prices; what it knows of meshes of one size is not priced again.

    Raises:
        InfeasibleError: a call fits on no mesh even alone.
        ConfigError: no option of a call is as its lock says.
    """

    def __init__(
        self, problem: Problem, prices: StepPrices, locks: Mapping[str, Lock] | None = None, *,
        offload: bool = True, larger: OptionSpace | None = None,
    ) -> None:  # fmt: skip
        self.problem = problem
        self._larger = larger
        # On a CPU the host's memory is the device's.
        self.offload = offload and problem.cluster.device.kind != "cpu"
        self.locks = dict(locks or {})
        self.prices = prices
        self.calls = problem.graph.step_calls
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
            offload_problem(self.problem, call.name) is None,
            (call.num_mini_batches, call.num_epochs),
            self.problem.spec_of(call.name),
            workload,
        )
        if key in self._known:
            return self._known[key]
        found: dict[int, tuple[Choice, ...]] = {}
        for size in self.meshes_by_size:
            kept = self._choices_of(call, size)
            if kept:
                found[size] = kept
        if not found:
            raise self._locked_out(call) if call.name in self.locks else self._infeasible(call)
        self._known[key] = found
        return found

    def _choices_of(self, call: ModelFunctionCall, size: int) -> tuple[Choice, ...]:
        """Choices on meshes of one size that no other beats, fastest first."""
        meshes, larger = self.meshes_of(call.name, size), self._larger
        shared = larger is not None and larger.offload == self.offload
        if larger is not None and shared and meshes and larger.meshes_of(call.name, size):
            return larger.choices[call.name].get(size, ())
        groups: dict[tuple[int, int, int], list[Choice]] = {}
        for choice in self._fitting(call, meshes):
            groups.setdefault(choice.axes, []).append(choice)
        kept = [choice for group in groups.values() for choice in undominated(group)]
        return tuple(sorted(kept, key=lambda c: c.busy_s))

    def _fitting(self, call: ModelFunctionCall, meshes: Sequence[DeviceMesh]) -> Iterator[Choice]:
        """Choices that fit, and are as locked, on meshes of one size: all cost the same."""
        lock = self.locks.get(call.name, Lock())
        if lock.allocation is not None and meshes:
            candidates: Iterable[Allocation] = [lock.allocation]
        else:
            candidates = (
                variants(self.problem, call, meshes[0], offload=self.offload) if meshes else ()
            )
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
        kind = self.problem.cluster.device.kind
        if spec is None:
            return (0,), (0,)
        counts = (allocation.num_micro_batches, allocation.generation_batch)
        key = (s.pp, s.tp, s.dp, s.recompute, s.sequence_parallel, counts)
        if key not in known:
            known[key] = running_bytes(self.problem, call, allocation, spec)
        held = self._held(spec, s, call.kind is CallKind.TRAIN)
        if self._is_average(call):
            held = tuple(average_bytes(weights, kind) for weights in held)
        if not leaves_device(allocation, kind):
            return held, known[key]
        leaving = self._leaving(spec, s, call.kind is CallKind.TRAIN)
        return tuple(map(sub, held, leaving)), tuple(map(add, known[key], leaving))

    def _leaving(self, spec: ModelSpec, s: ParallelStrategy, trained: bool) -> tuple[int, ...]:
        """Of ``_held`` what is on the host while an offloaded call does not run."""
        weights = self._held(spec, s, False)
        return tuple(map(sub, self._held(spec, s, True), weights)) if trained else weights

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
        average_s = 0.0
        if spec is not None and self._is_average(call):
            average_s = self.prices.average_s(Layout.of(spec, allocation.mesh, s))
        swap = self.prices.swap(call.name, allocation)
        return Choice(
            strategy=s,
            num_micro_batches=allocation.num_micro_batches,
            generation_batch=allocation.generation_batch,
            offload=allocation.offload,
            seconds=self.prices.call(call.name, allocation).seconds + swap.offload_s,
            reload_s=swap.reload_s,
            average_s=average_s,
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
