"""Two plans side by side: in what they differ, which is faster, and which change makes it so.

Plans of one problem are compared call by call. They may differ in cluster and in options that
change no cost; plans that train other models, or on other data, answer other questions and are
refused with what differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from planner.confidence import Confidence, confidence
from planner.cost import Costs
from planner.explain import CriticalCycle, steady_cycle
from planner.plan import Allocation, ExecutionPlan, Problem, allocation_problem
from planner.plan_memory import Fullest, fullest_device
from planner.program import compile_plan
from planner.search import estimate_plan
from planner.simulate import StepPrices
from profiles.errors import ConfigError
from profiles.hardware import Cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One plan with a fresh estimate, its critical cycle and its fullest device."""

    name: str
    plan: ExecutionPlan
    cycle: CriticalCycle
    fullest: Fullest

    @property
    def step_s(self) -> float:
        assert self.plan.estimate is not None
        return self.plan.estimate.step_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """The slower plan with one call's allocation of the faster: its seconds per step.

    ``headroom_bytes``: what its fullest device has left; below 0 the change does not fit.
    """

    call: str
    allocation: Allocation
    step_s: float
    headroom_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """``a`` and ``b``; ``clusters_differ``: fields of the cluster with both values.

    ``swaps``: of each call that is allocated otherwise, on plans of one cluster; the largest gain
    first. ``confidence``: that the faster is faster, where a calibration knows.
    """

    a: Side
    b: Side
    clusters_differ: Mapping[str, tuple[Any, Any]]
    swaps: tuple[Swap, ...]
    confidence: Confidence | None = None

    @property
    def faster(self) -> Side:
        return self.b if self.b.step_s < self.a.step_s else self.a

    @property
    def slower(self) -> Side:
        return self.a if self.faster is self.b else self.b


def compare(
    a: ExecutionPlan, b: ExecutionPlan, costs_a: Costs, costs_b: Costs, *,
    names: tuple[str, str] = ("a", "b"),
) -> Comparison:  # fmt: skip
    """Both plans, each under its own costs.

    Raises:
        ConfigError: they are plans of different problems; says in what.
    """
    differ = problem_differences(a.problem, b.problem)
    if differ:
        texts = [f"{field} ({x} and {y})" for field, (x, y) in list(differ.items())[:4]]
        more = f" and {len(differ) - 4} more" if len(differ) > 4 else ""
        raise ConfigError(
            f"{names[0]} and {names[1]} are plans of different problems: they differ in "
            f"{', '.join(texts)}{more}",
            remedy="compare plans of one algorithm, with the same models and data",
        )
    side_a, side_b = _side(names[0], a, costs_a), _side(names[1], b, costs_b)
    clusters = _cluster_differences(a.problem.cluster, b.problem.cluster)
    swaps: tuple[Swap, ...] = ()
    sure: Confidence | None = None
    if not clusters:
        slow, fast = (a, b) if side_b.step_s < side_a.step_s else (b, a)
        swaps = swap_each(slow, fast, costs_a)
        sure = confidence(fast, slow, StepPrices(a.problem, costs_a))
    return Comparison(a=side_a, b=side_b, clusters_differ=clusters, swaps=swaps, confidence=sure)


def _side(name: str, plan: ExecutionPlan, costs: Costs) -> Side:
    prices = StepPrices(plan.problem, costs)
    estimated, _ = estimate_plan(plan, prices)
    cycle, _ = steady_cycle(plan, compile_plan(plan), prices)
    return Side(name=name, plan=estimated, cycle=cycle, fullest=fullest_device(plan))


def swap_each(plan: ExecutionPlan, other: ExecutionPlan, costs: Costs) -> tuple[Swap, ...]:
    """``plan`` with one call's allocation of ``other`` at a time, the fastest first."""
    prices, found = StepPrices(plan.problem, costs), []
    for name, allocation in other.allocations.items():
        if plan.allocations[name] == allocation:
            continue
        if allocation_problem(plan.problem, name, allocation) is not None:
            continue
        changed = replace(plan, allocations={**plan.allocations, name: allocation})
        estimated, _ = estimate_plan(changed, prices)
        assert estimated.estimate is not None
        found.append(
            Swap(
                call=name, allocation=allocation, step_s=estimated.estimate.step_s,
                headroom_bytes=fullest_device(changed).headroom_bytes,
            )
        )  # fmt: skip
    return tuple(sorted(found, key=lambda swap: swap.step_s))


def problem_differences(a: Problem, b: Problem) -> Mapping[str, tuple[Any, Any]]:
    """Fields of two problems that change what a step does, with both values.

    The cluster is left out, and so is the configuration: what of it matters is in the graph and
    the workload.
    """
    found: dict[str, tuple[Any, Any]] = {}
    if a.algorithm != b.algorithm:
        return {"algorithm": (a.algorithm, b.algorithm)}
    found.update(_differences(asdict(a.workload), asdict(b.workload), "workload."))
    for role in dict.fromkeys([*a.models, *b.models]):
        x, y = a.models.get(role), b.models.get(role)
        if x != y:
            pair = (x.name if x else "none", y.name if y else "none")
            found[f"models.{role}"] = pair if pair[0] != pair[1] else ("one shape", "another")
    names = [tuple(call.name for call in problem.graph.calls) for problem in (a, b)]
    if names[0] != names[1]:
        found["calls"] = (", ".join(names[0]), ", ".join(names[1]))
    elif a.graph != b.graph:
        for x_call, y_call in zip(a.graph.calls, b.graph.calls):
            if x_call != y_call:
                found[f"graph.{x_call.name}"] = ("one definition", "another")
    return found


def _cluster_differences(a: Cluster, b: Cluster) -> Mapping[str, tuple[Any, Any]]:
    """Fields that differ; of clusters with unlike numbers of groups just what they are."""
    if len(a.groups) != len(b.groups):
        return {"groups": (a.name, b.name)}
    if len(a.groups) == 1:
        return _differences(a.to_dict(), b.to_dict())
    pairs = zip(a.groups, b.groups, strict=True)
    parts = [_differences(x.to_dict(), y.to_dict(), f"groups[{i}].")
             for i, (x, y) in enumerate(pairs)]  # fmt: skip
    return {field: values for part in parts for field, values in part.items()}


def _differences(
    a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Leaves of two nested mappings that differ, by their path."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*a, *b]):
        x, y = a.get(key), b.get(key)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            found.update(_differences(x, y, f"{prefix}{key}."))
        elif x != y and key != "source":
            found[f"{prefix}{key}"] = (x, y)
    return found
