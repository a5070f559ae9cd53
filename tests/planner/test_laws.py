"""Protects the optimum's common sense: what a planner must never get wrong, whatever its costs.

``exact`` run to the end is the oracle of both sides.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from planner.lock import Lock
from planner.mesh import DeviceMesh
from planner.plan import Problem
from planner.search import search
from planner.strategy import ParallelStrategy
from profiles.errors import ConfigError, InfeasibleError
from tests.planner.test_exact import small_problem
from tests.planner.test_search import model_of


def optimum_s(problem: Problem, locks: dict[str, Lock] | None = None) -> float:
    try:
        found = search(
            problem, model_of(problem), engine="exact", gap=0.0, max_evaluations=3000,
            time_limit_s=600, locks=locks,
        )  # fmt: skip
    except InfeasibleError:
        return float("inf")
    assert found.gap <= 1e-9
    assert found.plan.estimate is not None
    return found.plan.estimate.step_s


@pytest.mark.parametrize("seed", range(6))
def test_more_of_anything_is_never_worse(seed: int) -> None:
    """Twice the bandwidth of either link, or the memory."""
    problem = small_problem(random.Random(seed))
    before_s, cluster = optimum_s(problem), problem.cluster

    def faster(name: str) -> Problem:
        link = getattr(cluster, name)
        wider = replace(link, bytes_per_s=2 * link.bytes_per_s)
        return replace(problem, cluster=replace(cluster, **{name: wider}))

    roomy = replace(cluster.device, memory_bytes=2 * cluster.device.memory_bytes)
    better = [
        faster("intra_link"), faster("inter_link"),
        replace(problem, cluster=replace(cluster, device=roomy)),
    ]  # fmt: skip
    for other in better:
        assert optimum_s(other) <= before_s * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_a_locked_plan_is_never_better_than_the_free_one(seed: int) -> None:
    problem = small_problem(random.Random(seed))
    free_s = optimum_s(problem)
    locks = [Lock(mesh=DeviceMesh(0, 1)), Lock(strategy=ParallelStrategy(dp=2))]
    for lock in locks:
        try:
            locked_s = optimum_s(problem, {"actor_gen": lock})
        except ConfigError:  # memory leaves no such option
            continue
        assert locked_s >= free_s * (1 - 1e-9)


def test_a_lock_is_kept_and_one_that_nothing_meets_is_refused() -> None:
    problem = small_problem(random.Random(1))
    lock = Lock(mesh=DeviceMesh(1, 1), num_micro_batches=1)
    for engine in ("mcmc", "exact", "brute"):
        found = search(problem, model_of(problem), engine=engine, locks={"critic_inf": lock})
        assert lock.allows(found.plan.allocations["critic_inf"])
    bad = Lock(strategy=ParallelStrategy(dp=64))
    with pytest.raises(ConfigError, match=r"lock\.actor_gen.*no option of this call"):
        search(problem, model_of(problem), locks={"actor_gen": bad})
