"""Protects the optimum's common sense: what a planner must never get wrong, whatever its costs.

``exact`` run to the end is the oracle of both sides.
"""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from planner.cost import CostModel
from planner.lock import Lock
from planner.memory import RESERVE_BYTES
from planner.mesh import DeviceMesh
from planner.plan import Problem
from planner.search import search
from planner.search.baselines import baselines
from planner.search.evaluate import Evaluator
from planner.search.options import OptionSpace
from planner.simulate import StepPrices
from planner.strategy import ParallelStrategy
from profiles.collectives import Collectives
from profiles.errors import ConfigError, InfeasibleError
from profiles.hardware import LinkSpec
from profiles.roofline import RooflineCosts
from tests.planner.plans import SPEC, make_test_cluster, ppo
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


@pytest.mark.parametrize("seed", range(6))
def test_more_devices_are_never_worse(seed: int) -> None:
    """Another node, or twice as many devices in each: every plan of before is still there."""
    rng = random.Random(seed)
    spec = replace(SPEC, num_layers=2)
    memory_bytes = RESERVE_BYTES["cpu"] + rng.choice([800, 1200, 4000]) * 1024
    overrides = [f"batch_size={rng.choice([1, 2])}", "ppo.num_mini_batches=1"]
    shapes = [(1, 1), (2, 1), (3, 1)] if seed % 2 else [(1, 1), (1, 2), (1, 4)]
    found_s = [
        optimum_s(ppo(make_test_cluster(*shape, memory_bytes=memory_bytes), overrides, spec))
        for shape in shapes
    ]
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(found_s))


@pytest.mark.parametrize("scale", [0.125, 3.0, 1000.0])
def test_k_times_slower_hardware_takes_k_times_as_long(scale: float) -> None:
    """Rates divided and latencies multiplied by k: the optimum, too, and the same bound."""
    problem = small_problem(random.Random(8))
    cluster, device = problem.cluster, problem.cluster.device

    def slower(link: LinkSpec) -> LinkSpec:
        return replace(link, bytes_per_s=link.bytes_per_s / scale, latency_s=link.latency_s * scale)

    scaled = replace(
        cluster,
        device=replace(
            device, peak_flops=device.peak_flops / scale, launch_s=device.launch_s * scale,
            memory_bytes_per_s=device.memory_bytes_per_s / scale,
        ),
        intra_link=slower(cluster.intra_link), inter_link=slower(cluster.inter_link),
        host_link=slower(cluster.host_link),
    )  # fmt: skip
    costs = CostModel(
        scaled, RooflineCosts(scaled.device), Collectives(scaled), function_s=1e-4 * scale
    )
    before = search(problem, model_of(problem), engine="exact", gap=0.0)
    after = search(replace(problem, cluster=scaled), costs, engine="exact", gap=0.0)
    assert before.gap <= 1e-9
    assert after.step_s == pytest.approx(scale * before.step_s, rel=1e-9)
    assert after.lower_bound_s == pytest.approx(scale * before.lower_bound_s, rel=1e-9)


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
    with pytest.raises(ConfigError, match=r"lock\.actor_gen.*dp 64 exceeds the"):
        search(problem, model_of(problem), locks={"actor_gen": bad})


@pytest.mark.parametrize(
    "lock",
    [
        Lock(mesh=DeviceMesh(4, 4)),
        Lock(mesh=DeviceMesh(0, 8)),
        Lock(strategy=ParallelStrategy(tp=2, dp=4)),
        Lock(num_micro_batches=2),
    ],
)
def test_baselines_keep_locks(lock: Lock) -> None:
    """They are what a locked problem allows, or none."""
    problem = ppo(make_test_cluster(2, 4), ["batch_size=24"])
    space = OptionSpace(problem, StepPrices(problem, model_of(problem)), {"critic_inf": lock})
    found = baselines(Evaluator(space))
    assert all(space.allows(baseline.assignment) for baseline in found.values())
    assert found or lock.mesh is not None


def test_what_does_not_fit_together_says_which_roles_on_which_device_lack_how_much() -> None:
    """Each call fits alone; all roles on one device do not."""
    spec = replace(SPEC, num_layers=2)
    for kib in range(100, 1200, 25):
        cluster = make_test_cluster(1, 1, memory_bytes=RESERVE_BYTES["cpu"] + kib * 1024)
        problem = ppo(cluster, ["batch_size=2", "ppo.num_mini_batches=1"], spec)
        try:
            OptionSpace(problem, StepPrices(problem, model_of(problem)))
        except InfeasibleError:
            continue
        with pytest.raises(
            InfeasibleError,
            match=r"device 0 needs .*B while \w+ runs and has .*B, .*B too little; most is \w+ "
            r"with .*roles that stay there: .*actor.*more than one device, ",
        ):
            search(problem, model_of(problem))
        return
    raise AssertionError("every size of memory fits all or not even one call")
