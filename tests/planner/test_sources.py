"""Protects the account of a plan's seconds by source: it adds up, names tables with versions, and
nothing that was measured here is called somebody else's.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

import pytest

from planner.cost import CostModel, call_cost
from planner.plan import ExecutionPlan
from planner.resolve import make_costs
from planner.sources import OWN, SourceShare, shares_by_source
from profiles.catalogue import MODELS
from profiles.clusters import make_cluster
from profiles.costs import Cost, Provenance
from profiles.devices import DEVICES
from profiles.shapes import shape_key
from profiles.table import CostRow, CostTable
from tests.planner.plans import ppo, random_allocation


def a_plan(seed: int, cluster_name: str = "dgx-h100", gpus: int = 16) -> ExecutionPlan:
    problem = ppo(make_cluster(cluster_name, gpus), ["batch_size=32"], MODELS["llama-7b"])
    rng = random.Random(seed)
    allocations = {c.name: random_allocation(rng, problem, c.name) for c in problem.graph.calls}
    return ExecutionPlan(problem=problem, allocations=allocations)


def by_class(rows: tuple[SourceShare, ...]) -> dict[Provenance, float]:
    sums: dict[Provenance, float] = defaultdict(float)
    for row in rows:
        sums[row.provenance] += row.share
    return sums


def estimated(plan: ExecutionPlan, model: CostModel) -> dict[Provenance, float]:
    """Shares by provenance, as an estimate has them."""
    sums: dict[Provenance, float] = defaultdict(float)
    for call in plan.problem.graph.calls:
        cost = call_cost(plan.problem, call.name, plan.allocations[call.name], model)
        for provenance, seconds in cost.provenance.items():
            sums[provenance] += seconds
    total = sum(sums.values())
    return {provenance: seconds / total for provenance, seconds in sums.items()}


@pytest.mark.parametrize("seed", range(4))
def test_the_shares_add_up_to_what_the_estimate_says(seed: int) -> None:
    plan = a_plan(seed)
    model = make_costs(plan.problem.cluster, None)
    rows = shares_by_source(plan, model)
    assert sum(row.share for row in rows) == pytest.approx(1.0)
    expected = estimated(plan, model)
    for provenance, share in by_class(rows).items():
        assert share == pytest.approx(expected[provenance], abs=1e-6)


def test_tables_are_named_with_version_and_device() -> None:
    rows = shares_by_source(a := a_plan(1), make_costs(a.problem.cluster, None))
    names = {row.source for row in rows}
    assert any("gemm: aiconfigurator h100_sxm trtllm/" in name for name in names)
    assert any("NCCL 2." in name for name in names)
    assert "peak rates of h100" in names
    backward = [row for row in rows if "backward modelled" in row.source]
    assert sum(row.share for row in backward) > 0.01, "training is in no table"
    assert not any(row.source == "unnamed" for row in rows)


def test_what_a_profile_measured_is_its_own() -> None:
    plan = a_plan(2)
    shape = shape_key(MODELS["llama-7b"])
    rows = [
        CostRow(component="block", operation=operation, shape=shape, tp=tp, size=size,
                length=length, seconds=1e-3)
        for operation in ("forward", "backward", "decode") for tp in (1, 2, 4, 8)
        for size in (1, 2**17) for length in (1, 4096)
    ]  # fmt: skip
    table = CostTable(
        device=DEVICES["h100"], rows=tuple(rows), dtype="bf16", date="2026-11-23T00:00:00",
        source="test", versions={"torch": "2.13"},
    )  # fmt: skip
    found = shares_by_source(plan, make_costs(plan.problem.cluster, table))
    assert "profile of 2026-11-23, torch 2.13 (h100)" in {row.source for row in found}
    blocks = [r for r in found if r.source.startswith(("gemm", "decode att", "prefill att"))]
    # Of the shipped tables only the heads' products are left.
    assert sum(row.share for row in blocks) < 0.2
    assert any(row.source.startswith("collectives") for row in found)


def test_a_cluster_without_tables_rests_on_rates() -> None:
    plan = a_plan(3, "laptop", 4)
    found = shares_by_source(plan, make_costs(plan.problem.cluster, None))
    assert {row.provenance for row in found} == {Provenance.ROOFLINE}
    assert {row.source.split(":")[0] for row in found} <= {
        "peak rates of cpu", "alpha-beta of a link", OWN
    }  # fmt: skip


def test_a_sum_keeps_the_seconds_of_each_source() -> None:
    a, b = (Cost(s, Provenance.MEASURED, source=name) for s, name in ((1.0, "a"), (2.0, "b")))
    c = Cost(4.0, Provenance.ROOFLINE, source="a")
    whole = Cost.total([Cost.total([a, b]), c], times=3.0)
    assert (whole.seconds, whole.provenance) == (21.0, Provenance.ROOFLINE)
    assert dict(whole.by_source) == {"a": (3.0, 0.0, 0.0, 12.0), "b": (6.0, 0.0, 0.0, 0.0)}
    assert whole.only("a") == replace(whole, shares=(3.0, 0.0, 0.0, 12.0), sources=())
    assert whole.only(None).shares == (0.0, 0.0, 0.0, 0.0)
