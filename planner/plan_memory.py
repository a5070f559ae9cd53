"""Bytes on every device of a plan over a step: ``memory_over_time``, and whether it fits.

One call's bytes are ``memory.py``'s; here is what stays between calls, what is borrowed for some
of them, and what comes from the host's memory for one. Borrowed weights and caches of generation
keep their memory between steps where there is enough of it: ``kept_layouts``, ``kept_caches``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from planner.cost.stage import VALUE_BYTES
from planner.graph import CallKind
from planner.layout import Layout
from planner.lending import stored_values
from planner.memory import (
    RESERVE_BYTES,
    STAGING_BYTES,
    MemoryBreakdown,
    average_bytes,
    cache_memory,
    held_memory,
    leaves_device,
    offloaded_memory,
    running_memory,
)
from planner.mesh import DeviceMesh
from planner.plan import ExecutionPlan
from planner.strategy import ParallelStrategy
from profiles.errors import InfeasibleError
from profiles.hardware import DeviceKind
from profiles.units import format_bytes


def home_strategies(plan: ExecutionPlan) -> dict[str, dict[Layout, ParallelStrategy]]:
    """The layouts in which each role's weights stay over steps, with the strategy of each.

    A trained role lives where it is trained, a frozen one in every layout that reads it: as
    ``planner.program.home_layouts``.
    """
    homes: dict[str, dict[Layout, ParallelStrategy]] = {}
    for role in plan.problem.graph.roles:
        train = plan.problem.graph.train_call(role)
        calls = (train,) if train else plan.problem.graph.calls_of(role)
        found = homes.setdefault(role, {})
        for call in calls:
            allocation = plan.allocations[call.name]
            layout = Layout.of(plan.problem.models[role], allocation.mesh, allocation.strategy)
            found.setdefault(layout, allocation.strategy)
    return homes


# Of a device's memory a plan may fill so much for the sake of speed. The tenth that is left is as
# much as the memory model may be wrong by (tests/executor/test_fake.py, test_tracked_memory.py).
KEPT_SHARE = 0.9

Held = tuple[str, Layout]  # a role's weights in a layout


def read_ahead(plan: ExecutionPlan) -> frozenset[Held]:
    """Borrowed layouts in which a step's work for the next one goes on while the role is trained.

    They are copies: what a rank holds of the trained weights it cannot lend, for it changes.
    """
    homes = home_strategies(plan)
    found = set[Held]()
    for call in plan.problem.graph.ahead:
        assert call.role is not None, call
        allocation = plan.allocations[call.name]
        layout = Layout.of(plan.problem.models[call.role], allocation.mesh, allocation.strategy)
        if layout not in homes[call.role]:
            found.add((call.role, layout))
    return frozenset(found)


def kept_layouts(plan: ExecutionPlan) -> frozenset[Held]:
    """Borrowed layouts whose memory stays from step to step, where a plan has room for it.

    Memory that is there need not be found, mapped and touched again, and what knows its addresses
    (a CUDA graph) stays right. In the order of their first use each layout is kept that leaves
    its devices at most ``KEPT_SHARE`` full at their fullest; the others come and go.
    """
    homes = home_strategies(plan)
    averaged = [
        (average.of, layout)
        for average in plan.problem.graph.averages
        for layout in homes[average.role]
        if layout not in homes[average.of]
    ]
    kept: frozenset[Held] = frozenset()
    for held in dict.fromkeys((*_borrowed(plan, homes), *averaged)):
        moments = memory_over_time(plan, kept=kept | {held})
        if _leaves_room(plan, moments, held[1].mesh):
            kept |= {held}
    return kept


def kept_caches(plan: ExecutionPlan, kept: frozenset[Held]) -> frozenset[str]:
    """Calls whose generation leaves its cache to the next step's, where a plan has room for it.

    With a cache stay the graphs of its decode turns, which know where the weights lie: they stay
    there too, at home or in a ``kept`` layout, and are not offloaded. In the order of the step each
    cache is kept that leaves its devices at most ``KEPT_SHARE`` full at their fullest.
    """
    homes = home_strategies(plan)
    caches: frozenset[str] = frozenset()
    for call in plan.problem.graph.step_calls:
        if call.kind is not CallKind.GENERATE or call.role is None:
            continue
        allocation = plan.allocations[call.name]
        layout = Layout.of(plan.problem.models[call.role], allocation.mesh, allocation.strategy)
        stays = layout in homes[call.role] or (call.role, layout) in kept
        if allocation.offload or not stays:
            continue
        moments = memory_over_time(plan, kept=kept, caches=caches | {call.name})
        if _leaves_room(plan, moments, allocation.mesh):
            caches |= {call.name}
    return caches


def _leaves_room(
    plan: ExecutionPlan, moments: Mapping[int, Sequence[MemoryMoment]], mesh: DeviceMesh
) -> bool:
    """Are a mesh's devices at most ``KEPT_SHARE`` full at their fullest?"""
    limit = KEPT_SHARE * memory_bytes_of(mesh.first, plan)
    return all(fullest(moments[device]).need.total <= limit for device in mesh.devices)


class MemoryMoment(NamedTuple):
    """A device's bytes while ``call`` runs on it, or ``after`` it; "" between calls."""

    call: str
    need: MemoryBreakdown
    after: str = ""


def memory_over_time(
    plan: ExecutionPlan, *, kept: frozenset[Held] | None = None,
    caches: frozenset[str] = frozenset(),
) -> Mapping[int, tuple[MemoryMoment, ...]]:  # fmt: skip
    """Every device's bytes over a step: between calls, then in each of its calls in their order.

    What stays, what the call needs while it runs, and weights that are borrowed for it, or for
    calls before and after it. ``kept`` and ``caches``: see ``kept_layouts`` and ``kept_caches``,
    whose answers are taken for ``kept`` None; with none kept a plan needs least, and as much as the
    search counts.
    """
    problem, kind = plan.problem, plan.problem.cluster.kind
    homes = home_strategies(plan)
    if kept is None:
        assert not caches, "caches that stay are known with the layouts that do"
        kept = kept_layouts(plan)
        caches = kept_caches(plan, kept)
    resident = _resident(plan, homes, kept, caches)
    borrowed = _borrowed(plan, homes)
    found = {device: [MemoryMoment("", need)] for device, need in resident.items()}
    for position, call in enumerate(problem.graph.step_calls):
        allocation = plan.allocations[call.name]
        spec = problem.spec_of(call.name)
        stages: list[MemoryBreakdown] = [MemoryBreakdown()]
        if spec is not None:
            pp = allocation.strategy.pp
            stages = [running_memory(problem, call, allocation, spec, stage) for stage in range(pp)]
            if call.name in caches:
                there_anyway = _cache_of(plan, call.name)
                stages = [need - own for need, own in zip(stages, there_anyway, strict=True)]
            if leaves_device(allocation, kind):
                trained = call.kind is CallKind.TRAIN
                held = [
                    held_memory(spec, allocation.strategy, stage, kind, trained=trained)
                    for stage in range(pp)
                ]
                stages = [
                    need + offloaded_memory(own, trained=trained)
                    for need, own in zip(stages, held, strict=True)
                ]
        there = [held for held, (a, b) in borrowed.items() if a <= position <= b]
        for device in allocation.mesh.devices:
            stage, _, _ = allocation.strategy.coordinates(device - allocation.mesh.first)
            need = resident[device] + stages[stage]
            for held_there in there:
                if device in held_there[1].mesh:
                    need += _borrowed_memory(held_there, device, kind, kept)
            found[device].append(MemoryMoment(call.name, need))
    for average in problem.graph.averages:
        train = problem.graph.train_call(average.of)
        assert train is not None, average
        for layout in homes[average.role]:
            for device in layout.mesh.devices:
                need = resident[device]
                if layout not in homes[average.of]:  # the trained weights are brought here
                    need += _borrowed_memory((average.of, layout), device, kind, kept)
                found[device].append(MemoryMoment(train.name, need, f"average {average.role}"))
    return {device: tuple(moments) for device, moments in found.items()}


def _borrowed_memory(
    held: Held, device: int, kind: DeviceKind, kept: frozenset[Held]
) -> MemoryBreakdown:
    """Weights in a layout that is no home, and what was under way to bring them.

    As if nothing of them were lent, unless their memory is there anyway.
    """
    staging = MemoryBreakdown(buffers=STAGING_BYTES[kind])
    if held in kept:
        return MemoryBreakdown() if kind == "cpu" else staging  # a CPU keeps this too
    _, layout = held
    strategy = ParallelStrategy(pp=layout.pp, tp=layout.tp, dp=layout.dp, ep=layout.ep)
    stage = layout.coordinates(device)[0]
    return held_memory(layout.spec, strategy, stage, kind, trained=False) + staging


def fullest(moments: Sequence[MemoryMoment]) -> MemoryMoment:
    """The moment with the most bytes, the first of several."""
    return max(moments, key=lambda moment: moment.need.total)


def plan_memory(
    plan: ExecutionPlan, *, kept: frozenset[Held] | None = None,
    caches: frozenset[str] = frozenset(),
) -> Mapping[int, MemoryBreakdown]:  # fmt: skip
    """The fullest moment of every device of the cluster: what stays, and the worst call.

    ``kept`` and ``caches`` as ``memory_over_time`` has them.
    """
    moments = memory_over_time(plan, kept=kept, caches=caches)
    return {device: fullest(own).need for device, own in moments.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fullest:
    """The fullest device: what it needs at its worst moment ``call``, and what it has, in bytes."""

    device: int
    call: str
    need: MemoryBreakdown
    has_bytes: int

    @property
    def headroom_bytes(self) -> int:
        return self.has_bytes - self.need.total


def memory_bytes_of(device: int, plan: ExecutionPlan) -> int:
    """What a device of the plan's cluster has."""
    return plan.problem.cluster.group_of(device).device.memory_bytes


def alike(plan: ExecutionPlan) -> list[tuple[list[int], MemoryBreakdown, int]]:
    """Devices that need and have as much at their fullest: (devices, need, bytes that each has).

    The fullest first, by share of what they have.
    """
    groups: dict[tuple[MemoryBreakdown, int], list[int]] = {}
    for device, need in sorted(plan_memory(plan).items()):
        groups.setdefault((need, memory_bytes_of(device, plan)), []).append(device)
    found = [(devices, need, has) for (need, has), devices in groups.items()]
    return sorted(found, key=lambda row: -row[1].total / row[2])


def fullest_device(plan: ExecutionPlan) -> Fullest:
    """The device that needs the largest share of its memory, the first of several."""
    found = []
    for device, moments in sorted(memory_over_time(plan).items()):
        call, need, _ = fullest(moments)
        has_bytes = memory_bytes_of(device, plan)
        found.append(Fullest(device=device, call=call, need=need, has_bytes=has_bytes))
    return max(found, key=lambda full: full.need.total / full.has_bytes)


def check_memory(plan: ExecutionPlan) -> None:
    """Raise unless every device of the plan has the memory that it needs.

    Raises:
        InfeasibleError: names the fullest device, the call, the roles, the bytes and the item
            that takes most.
    """
    full = fullest_device(plan)
    if full.headroom_bytes >= 0:
        return
    device, need = full.device, full.need
    call_name = full.call or plan.problem.graph.calls[0].name  # too full before any call
    item, num_bytes = need.biggest
    roles = [
        role
        for role, layouts in home_strategies(plan).items()
        if any(device in layout.mesh for layout in layouts)
    ]
    raise InfeasibleError(
        f"device {device}{_name_of(device, plan)} needs {format_bytes(need.total)} while "
        f"{call_name} runs and has {format_bytes(full.has_bytes)}, "
        f"{format_bytes(-full.headroom_bytes)} too little; most is {item} with "
        f"{format_bytes(num_bytes)} "
        f"(roles that stay there: {', '.join(roles) or 'none'})",
        where=f"allocations.{call_name}",
        remedy=REMEDIES[item],
    )


def _name_of(device: int, plan: ExecutionPlan) -> str:
    """What kind of device it is, where there are several kinds."""
    cluster = plan.problem.cluster
    several = len({group.device.name for group in cluster.groups}) > 1
    return f" ({cluster.group_of(device).device.name})" if several else ""


REMEDIES: Mapping[str, str] = {
    "weights": "raise tp or pp, place roles on different devices, or offload frozen roles",
    "gradients": "raise tp or pp of the trained roles, or train them on different devices",
    "optimizer": "use ZeRO 1 or offload, or raise tp or pp of the trained roles",
    "activations": "use more micro-batches, recompute, or raise tp or dp",
    "logits": "use more micro-batches, or raise tp or dp",
    "kv_cache": "lower the call's generation_batch, or raise its dp, tp or pp",
    "buffers": "use more micro-batches, or raise tp",
    "reserve": "use devices with more memory",
}


def _resident(
    plan: ExecutionPlan,
    homes: Mapping[str, Mapping[Layout, ParallelStrategy]],
    kept: frozenset[Held],
    caches: frozenset[str],
) -> dict[int, MemoryBreakdown]:
    """What every device holds at all times."""
    kind = plan.problem.cluster.kind
    found = {
        device: MemoryBreakdown(reserve=RESERVE_BYTES[kind])
        for device in range(plan.problem.cluster.num_devices)
    }
    for role, layouts in homes.items():
        trained = plan.problem.graph.train_call(role) is not None
        averaged = any(average.role == role for average in plan.problem.graph.averages)
        for layout, strategy in layouts.items():
            held = [
                held_memory(layout.spec, strategy, stage, kind, trained=trained)
                for stage in range(layout.pp)
            ]
            if layout in _offloaded(plan, role):
                held = [own - offloaded_memory(own, trained=trained) for own in held]
            for device in layout.mesh.devices:
                own = held[layout.coordinates(device)[0]]
                found[device] += own
                if averaged:
                    more = average_bytes(own.weights, kind) - own.weights
                    found[device] += MemoryBreakdown(weights=more)
    copies = read_ahead(plan)
    for role, layout in kept:
        (home,) = homes[role]
        for device in layout.mesh.devices:
            whole = (role, layout) in copies
            stored = layout.num_values(device) if whole else stored_values(home, layout, device)
            found[device] += MemoryBreakdown(weights=stored * VALUE_BYTES[kind])
    if kind == "cpu":
        for device in {device for _, layout in kept for device in layout.mesh.devices}:
            found[device] += MemoryBreakdown(buffers=STAGING_BYTES[kind])
    for name in caches:
        stages, allocation = _cache_of(plan, name), plan.allocations[name]
        for device in allocation.mesh.devices:
            stage, _, _ = allocation.strategy.coordinates(device - allocation.mesh.first)
            found[device] += stages[stage]
    return found


def _cache_of(plan: ExecutionPlan, name: str) -> list[MemoryBreakdown]:
    """What stays of a generation, on a device of each stage."""
    call, allocation, spec = (
        plan.problem.graph.call(name), plan.allocations[name], plan.problem.spec_of(name)
    )  # fmt: skip
    assert spec is not None, name
    return [
        cache_memory(plan.problem, call, allocation, spec, stage)
        for stage in range(allocation.strategy.pp)
    ]


def _offloaded(plan: ExecutionPlan, role: str) -> set[Layout]:
    """Homes of a role of which a part is in the host's memory between calls."""
    kind = plan.problem.cluster.kind
    return {
        Layout.of(plan.problem.models[role], allocation.mesh, allocation.strategy)
        for call in plan.problem.graph.calls_of(role)
        if leaves_device(allocation := plan.allocations[call.name], kind)
    }


def _borrowed(
    plan: ExecutionPlan, homes: Mapping[str, Mapping[Layout, ParallelStrategy]]
) -> dict[Held, tuple[int, int]]:
    """Layouts that exist for a part of the step: positions of their first and last call."""
    found: dict[Held, tuple[int, int]] = {}
    ahead = plan.problem.graph.ahead
    for position, call in enumerate(plan.problem.graph.step_calls):
        if call.role is None:
            continue
        allocation = plan.allocations[call.name]
        layout = Layout.of(plan.problem.models[call.role], allocation.mesh, allocation.strategy)
        if layout not in homes[call.role]:
            first, _ = found.get((call.role, layout), (position, position))
            found[(call.role, layout)] = (0 if call in ahead else first, position)
    return found
