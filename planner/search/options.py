"""What each call may choose, and where: ``OptionSpace``.

Seconds and bytes of a call do not change when its mesh moves by whole nodes of its group, or within
a node, so a ``Choice`` is priced once for each kind of mesh (``choices.py``), a size in a group; an
``Option`` is a choice on one mesh. Read ``Option``, then ``OptionSpace``.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from planner.graph import ModelFunctionCall
from planner.layout import Layout
from planner.lock import Lock
from planner.memory import (
    MemoryBreakdown,
    call_memory,
)
from planner.mesh import DeviceMesh, MeshKind, kind_of
from planner.plan import Allocation, Problem, offload_problem
from planner.search.choices import Choice, Costing
from planner.search.locked import check_lock
from planner.search.variants import considered_meshes, variants
from planner.simulate import StepPrices
from profiles.errors import InfeasibleError
from profiles.units import format_bytes


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


@contextmanager
def no_collector() -> Iterator[None]:
    """Costing makes a million small values and no cycles of them: the collector would take a

    fifth of its time to find none.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class OptionSpace:
    """All options of a problem under the prices of a cost model.

    ``larger``: the space of the same problem and locks on more of the same nodes, under the same
    prices; what it knows of meshes of one kind is not priced again.

    Raises:
        InfeasibleError: a call fits on no mesh even alone.
        ConfigError: no option of a call can be as its lock says.
    """

    def __init__(
        self, problem: Problem, prices: StepPrices, locks: Mapping[str, Lock] | None = None, *,
        offload: bool = True, larger: OptionSpace | None = None,
    ) -> None:  # fmt: skip
        self.problem = problem
        self._larger = larger
        # On a CPU the host's memory is the device's.
        self.offload = offload and problem.cluster.kind != "cpu"
        self.locks = dict(locks or {})
        self.prices = prices
        self.calls = problem.graph.step_calls
        self.meshes_by_kind: dict[MeshKind, list[DeviceMesh]] = {}
        for mesh in considered_meshes(problem.cluster):
            self.meshes_by_kind.setdefault(kind_of(mesh, problem.cluster), []).append(mesh)
        tried = {mesh: None for like in self.meshes_by_kind.values() for mesh in like}
        for call in self.calls:
            if call.name in self.locks:
                check_lock(problem, call, self.locks[call.name], tried, offload=self.offload)
        self._costing = Costing(problem, prices)
        self._options: dict[tuple[str, DeviceMesh, int], Option] = {}
        self._known: dict[tuple[object, ...], Mapping[MeshKind, tuple[Choice, ...]]] = {}
        with no_collector():
            self.choices = {call.name: self._choices(call) for call in self.calls}
        self.meshes: Mapping[str, tuple[DeviceMesh, ...]] = {
            name: tuple(m for kind in by_kind for m in self.meshes_of(name, kind))
            for name, by_kind in self.choices.items()
        }

    def meshes_of(self, call: str, kind: MeshKind) -> list[DeviceMesh]:
        """Meshes of a kind that a call may take, by position."""
        fixed = self._fixed_mesh(call)
        return [m for m in self.meshes_by_kind.get(kind, []) if fixed in (None, m)]

    def choices_on(self, call: str, mesh: DeviceMesh) -> tuple[Choice, ...]:
        """What a call may choose on a mesh, fastest first."""
        return self.choices[call].get(kind_of(mesh, self.problem.cluster), ())

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
            for choice in self.choices_on(call, mesh):
                yield self.option(call, mesh, choice)

    @property
    def num_plans(self) -> float:
        """How many assignments there are."""
        product = 1.0
        for call in self.calls:
            product *= sum(len(self.choices_on(call.name, m)) for m in self.meshes[call.name])
        return product

    # ---- pricing ----

    def _choices(self, call: ModelFunctionCall) -> Mapping[MeshKind, tuple[Choice, ...]]:
        """Choices by kind of mesh, fastest first; only kinds that have one."""
        # Calls of equal kind and model cost the same: critic_inf and rew_inf.
        workload = self.problem.workload_of(call.name)
        key = (
            self.locks.get(call.name),
            call.kind,
            any(average.role == call.role for average in self.problem.graph.averages),
            offload_problem(self.problem, call.name) is None,
            (call.num_mini_batches, call.num_epochs),
            self.problem.spec_of(call.name),
            workload,
        )
        if key in self._known:
            return self._known[key]
        found: dict[MeshKind, tuple[Choice, ...]] = {}
        for kind in self.meshes_by_kind:
            kept = self._choices_of(call, kind)
            if kept:
                found[kind] = kept
        if not found:
            raise self._infeasible(call)
        self._known[key] = found
        return found

    def _choices_of(self, call: ModelFunctionCall, kind: MeshKind) -> tuple[Choice, ...]:
        """Choices on meshes of one kind that no other beats, fastest first."""
        meshes, larger = self.meshes_of(call.name, kind), self._larger
        shared = larger is not None and larger.offload == self.offload
        if larger is not None and shared and meshes and larger.meshes_of(call.name, kind):
            return larger.choices[call.name].get(kind, ())
        if not meshes:
            return ()
        lock = self.locks.get(call.name, Lock())
        return self._costing.choices(call, meshes[0], lock, offload=self.offload)

    def _infeasible(self, call: ModelFunctionCall) -> InfeasibleError:
        """What the smallest way to run a call lacks, of those that its lock allows."""
        best: tuple[int, Allocation, MemoryBreakdown] | None = None
        cluster, lock = self.problem.cluster, self.locks.get(call.name, Lock())
        for kind in self.meshes_by_kind:
            meshes = self.meshes_of(call.name, kind)
            if not meshes:
                continue
            had = cluster.group_of(meshes[0].first).device.memory_bytes
            ways = variants(self.problem, call, meshes[0], offload=self.offload)
            for allocation in [lock.allocation] if lock.allocation else ways:
                if not lock.allows(allocation):
                    continue
                need = call_memory(self.problem, call.name, allocation)
                if best is None or need.total - had < best[0]:
                    best = (need.total - had, allocation, need)
        assert best is not None, call.name
        lacks, allocation, need = best
        device = cluster.group_of(allocation.mesh.first).device
        item, num_bytes = need.biggest
        locked = " as it is locked" if call.name in self.locks else ""
        return InfeasibleError(
            f"role {call.role} does not fit{locked}: at its smallest ({allocation}) each "
            f"{device.name} needs {format_bytes(need.total)} and has "
            f"{format_bytes(device.memory_bytes)}, {format_bytes(lacks)} too little; most is "
            f"{item} with {format_bytes(num_bytes)}",
            where=call.name,
            remedy=("lock less of it, " if locked else "") + more_memory(self.problem, item),
        )


def more_memory(problem: Problem, item: str) -> str:
    """What a user can do where ``item`` of a ``MemoryBreakdown`` takes too much."""
    count = problem.cluster.num_devices
    remedies = [
        f"use more than {'one device' if count == 1 else f'{count} devices'}",
        "devices with more memory",
        "a smaller model",
    ]
    if item in ("kv_cache", "activations", "logits", "buffers"):
        remedies[-1] = "a smaller batch_size"
    return ", ".join(remedies[:-1]) + f", or {remedies[-1]}"
