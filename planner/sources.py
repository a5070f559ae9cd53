"""Whose numbers a plan's seconds rest on: measured tables by name and version, formulas, rates.

A search carries seconds by ``Provenance`` only, four numbers, since it adds up a million of them.
Here a plan's calls are priced again, once for each source, with costs of the same seconds of which
only that source's count: sums of shares are linear, so the parts add up to the whole exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from planner.cost import CostModel, Costs, MixedCosts, call_cost
from planner.plan import ExecutionPlan
from profiles.collectives import CollectiveOperation, Collectives
from profiles.costs import Component, Cost, LayerCosts, Operation, Provenance
from profiles.models import ModelSpec

# What the planner's own formulas add: recomputation, functions of the user's.
OWN = "the planner's formulas"

_Seconds = dict[Provenance, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceShare:
    """``share`` of the calls' seconds that ``source`` gives, known so."""

    source: str
    provenance: Provenance
    share: float


def shares_by_source(plan: ExecutionPlan, model: Costs) -> tuple[SourceShare, ...]:
    """What the seconds of a plan's calls rest on, largest first; the shares add up to one.

    Every call counts alone, as in ``Estimate.provenance``, of which this is the finer account.
    """
    names: set[str] = set()
    own = _seconds(plan, _only(model, None, names))
    rows: list[tuple[str, Provenance, float]] = [(OWN, p, s) for p, s in own.items()]
    for name in sorted(names):
        for provenance, seconds in _seconds(plan, _only(model, name, set())).items():
            rows.append((name, provenance, seconds - own.get(provenance, 0.0)))
    total = sum(seconds for _, _, seconds in rows)
    found = [
        SourceShare(source=name or "unnamed", provenance=provenance, share=seconds / total)
        for name, provenance, seconds in rows
        if seconds > 1e-9 * total
    ]
    return tuple(sorted(found, key=lambda row: -row.share))


def _seconds(plan: ExecutionPlan, model: Costs) -> _Seconds:
    """Of all calls, by provenance."""
    sums: _Seconds = {}
    for call in plan.problem.graph.calls:
        cost: Mapping[Provenance, float] = call_cost(
            plan.problem, call.name, plan.allocations[call.name], model
        ).provenance
        for provenance, seconds in cost.items():
            sums[provenance] = sums.get(provenance, 0.0) + seconds
    return sums


def _only(model: Costs, source: str | None, names: set[str]) -> Costs:
    """``model`` with the shares of one source; ``names`` takes every source that answers."""
    if isinstance(model, MixedCosts):
        return MixedCosts(model.cluster, [_only_of(own, source, names) for own in model.models])
    return _only_of(model, source, names)


def _only_of(model: CostModel, source: str | None, names: set[str]) -> CostModel:
    return CostModel(
        model.cluster, _Layers(model.layer_costs, source, names),
        _Collectives(model.collectives, source, names), function_s=model.function_s,
        kernels=model.stages.kernels, stops_early=model.stages.stops_early,
        calibration=model.calibration,
    )  # fmt: skip


def _seen(cost: Cost, source: str | None, names: set[str]) -> Cost:
    names.update(name for name, shares in cost.by_source if any(shares))
    return cost.only(source)


class _Layers:
    """``LayerCosts`` with the seconds of ``inner`` and the shares of one source."""

    def __init__(self, inner: LayerCosts, source: str | None, names: set[str]) -> None:
        self.inner, self.source, self.names = inner, source, names

    def layer(
        self, spec: ModelSpec, component: Component, operation: Operation, *, tp: int, size: int,
        length: int,
    ) -> Cost:  # fmt: skip
        cost = self.inner.layer(spec, component, operation, tp=tp, size=size, length=length)
        return _seen(cost, self.source, self.names)

    def optimizer_step(self, num_parameters: int) -> Cost:
        return _seen(self.inner.optimizer_step(num_parameters), self.source, self.names)


class _Collectives(Collectives):
    """The same of collectives."""

    def __init__(self, inner: Collectives, source: str | None, names: set[str]) -> None:
        super().__init__(inner.cluster)
        self.inner, self.source, self.names = inner, source, names

    def p2p(self, num_bytes: float, src: int, dst: int) -> Cost:
        return _seen(self.inner.p2p(num_bytes, src, dst), self.source, self.names)

    def read(self, num_bytes: float, src: int, dst: int) -> Cost:
        return _seen(self.inner.read(num_bytes, src, dst), self.source, self.names)

    def _collective(self, operation: CollectiveOperation, num_bytes: float, devices: range) -> Cost:
        cost = getattr(self.inner, operation)(num_bytes, devices)
        return _seen(cost, self.source, self.names)
