"""What each call may choose, and where: ``OptionSpace``.

Seconds and bytes of a call do not change when its mesh moves by whole nodes, or within a node, so
a ``Choice`` is priced once for each size of mesh (``choices.py``); an ``Option`` is a choice on one
mesh. Read ``Option``, then ``OptionSpace``.
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
from planner.mesh import DeviceMesh
from planner.plan import Allocation, Problem, offload_problem
from planner.search.choices import Choice, Costing
from planner.search.variants import considered_meshes, variants
from planner.simulate import StepPrices
from profiles.errors import ConfigError, InfeasibleError
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
        self._costing = Costing(problem, prices)
        self._options: dict[tuple[str, DeviceMesh, int], Option] = {}
        self._known: dict[tuple[object, ...], Mapping[int, tuple[Choice, ...]]] = {}
        with no_collector():
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
            any(average.role == call.role for average in self.problem.graph.averages),
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
        if not meshes:
            return ()
        lock = self.locks.get(call.name, Lock())
        return self._costing.choices(call, meshes[0], lock, offload=self.offload)

    def _locked_out(self, call: ModelFunctionCall) -> ConfigError:
        return ConfigError(
            "no option of this call that fits a device's memory is as it is locked",
            where=f"lock.{call.name}",
            remedy="fix less of it: mesh, strategy or num_micro_batches",
        )

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
