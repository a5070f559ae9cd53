"""What is wrong with a lock: parts that cannot be, or that a search does not try.

``check_lock`` runs before anything is priced; what memory leaves is ``OptionSpace``'s to say.
"""

from __future__ import annotations

from collections.abc import Collection

from planner.graph import ModelFunctionCall
from planner.lock import Lock
from planner.mesh import DeviceMesh, check_mesh
from planner.plan import Problem, allocation_problem, largest_dp, offload_problem
from planner.search.variants import ways
from planner.strategy import strategy_problem
from profiles.errors import ConfigError, PlanError


def check_lock(
    problem: Problem, call: ModelFunctionCall, lock: Lock, meshes: Collection[DeviceMesh], *,
    offload: bool,
) -> None:  # fmt: skip
    """``meshes``: those that a search tries. ``offload``: may state be in the host's memory?

    Raises:
        ConfigError: no option of ``call`` can be as ``lock`` says, whatever memory there is.
    """
    where = f"lock.{call.name}"
    fixed = lock.allocation
    mesh = lock.mesh if fixed is None else fixed.mesh
    if mesh is not None:
        _check_mesh(problem, mesh, meshes, where=where + (".mesh" if fixed is None else ""))
    if fixed is not None:
        reason = allocation_problem(problem, call.name, fixed)
        if reason is None and not lock.allows(fixed):
            reason = f"the plan has {fixed}, and another part of the lock says otherwise"
        if reason is not None:
            raise ConfigError(reason, where=where, remedy="lock what this problem can run")
        return
    if lock.strategy is not None:
        _check_strategy(problem, call, lock, meshes)
    if lock.num_micro_batches is not None:
        _check_micro_batches(problem, call, lock, meshes)
    if lock.offload:
        reason = offload_problem(problem, call.name)
        if reason is None and not offload:
            on_cpu = problem.cluster.kind == "cpu"
            reason = "on a CPU the host's memory is the device's" if on_cpu else "but offload=false"
        if reason is not None:
            raise ConfigError(reason, where=f"{where}.offload", remedy="leave it out")


def _check_mesh(
    problem: Problem, mesh: DeviceMesh, meshes: Collection[DeviceMesh], *, where: str
) -> None:
    try:
        check_mesh(mesh, problem.cluster, where=where)
    except PlanError as error:
        raise ConfigError(error.problem, where=where, remedy=error.remedy) from None
    if mesh not in meshes:
        larger = min(
            (m for m in meshes if set(mesh.devices) <= set(m.devices)),
            key=lambda m: (m.num_devices, m.first),
        )
        raise ConfigError(
            f"mesh {mesh} is not tried: on so many nodes only longer runs at multiples of some are",
            where=where, remedy=f"use [{larger.first},{larger.num_devices}]",
        )  # fmt: skip


def _check_strategy(
    problem: Problem, call: ModelFunctionCall, lock: Lock, meshes: Collection[DeviceMesh]
) -> None:
    where, s = f"lock.{call.name}.strategy", lock.strategy
    assert s is not None
    most = largest_dp(problem, call.name)
    if s.dp > most:
        raise ConfigError(
            f"dp {s.dp} exceeds the {most} groups of a mini-batch", where=where,
            remedy=f"use a dp of 1 to {most}",
        )  # fmt: skip
    sizes = sorted({mesh.num_devices for mesh in meshes})
    places = [m for m in meshes if m.num_devices == s.num_devices and lock.mesh in (None, m)]
    if not places and lock.mesh is None:
        raise ConfigError(
            f"{s.short} takes {s.num_devices} devices, and no mesh has so many", where=where,
            remedy=f"meshes have {_numbers(sizes)} devices",
        )  # fmt: skip
    spec = problem.spec_of(call.name)
    places = places or [mesh for mesh in (lock.mesh,) if mesh is not None]
    reasons = [strategy_problem(spec, s, mesh, problem.cluster) for mesh in places]
    if all(reason is not None for reason in reasons):
        raise ConfigError(str(reasons[0]), where=where, remedy="fix another, or less of it")


def _check_micro_batches(
    problem: Problem, call: ModelFunctionCall, lock: Lock, meshes: Collection[DeviceMesh]
) -> None:
    """Of the counts that are tried some fit the rest of the lock."""
    of_size = {mesh.num_devices: mesh for mesh in meshes if lock.mesh in (None, mesh)}
    counts = {
        way.num_micro_batches
        for mesh in of_size.values()
        for layout in ways(problem, call, mesh)
        for way in layout
        if lock.strategy is None or way.strategy.short == lock.strategy.short
    }
    if lock.num_micro_batches not in counts:
        raise ConfigError(
            f"{lock.num_micro_batches} micro-batches are not tried",
            where=f"lock.{call.name}.num_micro_batches",
            remedy=f"use {_numbers(sorted(counts))}, or lock.{call.name}=plan.json with "
            "an allocation of your own",
        )


def _numbers(values: list[int], most: int = 12) -> str:
    """``1, 2 or 4``; of many the first."""
    if len(values) > most:
        return f"{', '.join(map(str, values[:most]))}, …"
    return " or ".join(filter(None, [", ".join(map(str, values[:-1])), *map(str, values[-1:])]))
