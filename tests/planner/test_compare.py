"""Protects ``compare``: equal plans are equal, swaps are what an estimate of the swapped plan says,
and plans of different problems are refused with what differs.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from planner.compare import compare, problem_differences, swap_each
from planner.resolve import make_costs
from planner.search import estimate_plan
from planner.simulate import StepPrices
from profiles.errors import ConfigError
from tests.planner.plans import make_test_cluster, ppo, random_plan


@pytest.mark.parametrize("seed", range(6))
def test_swapping_every_call_makes_the_other_plan(seed: int) -> None:
    rng = random.Random(seed)
    a = random_plan(rng)
    b = random_plan(rng, a.problem)
    costs = make_costs(a.problem.cluster, None)
    found = compare(a, b, costs, costs)
    assert found.faster.step_s <= found.slower.step_s
    assert {swap.call for swap in found.swaps} == {
        name for name, allocation in a.allocations.items() if allocation != b.allocations[name]
    }
    slow, fast = found.slower.plan, found.faster.plan
    for swap in swap_each(slow, fast, costs):
        changed = replace(slow, allocations={**slow.allocations, swap.call: swap.allocation})
        again, _ = estimate_plan(changed, StepPrices(a.problem, costs))
        assert again.estimate is not None
        assert swap.step_s == again.estimate.step_s


def test_a_plan_equals_itself() -> None:
    plan = random_plan(random.Random(3))
    costs = make_costs(plan.problem.cluster, None)
    found = compare(plan, plan, costs, costs)
    assert found.a.step_s == found.b.step_s
    assert not found.swaps
    assert not found.clusters_differ


def test_clusters_may_differ_but_not_the_work() -> None:
    small, large = make_test_cluster(1, 2), make_test_cluster(2, 2)
    a = random_plan(random.Random(1), ppo(small, ["batch_size=24"]))
    b = random_plan(random.Random(1), ppo(large, ["batch_size=24"]))
    found = compare(a, b, make_costs(small, None), make_costs(large, None))
    assert found.clusters_differ == {"num_nodes": (1, 2)}
    other = random_plan(random.Random(1), ppo(small, ["batch_size=30"]))
    with pytest.raises(ConfigError, match=r"differ in workload.batch_size \(24 and 30\)"):
        compare(a, other, make_costs(small, None), make_costs(small, None))
    assert not problem_differences(a.problem, b.problem)
