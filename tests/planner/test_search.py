"""Protects the search: its quick numbers are the simulator's and the memory model's, its bound is
below every plan, it finds the optimum where brute force can, and a seed fixes its answer.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from planner.cost import CostModel
from planner.memory import RESERVE_BYTES, plan_memory
from planner.plan import Problem
from planner.program import compile_plan
from planner.search import search
from planner.search.evaluate import Evaluator
from planner.search.options import Assignment, OptionSpace
from planner.simulate import StepPrices, run_program
from profiles.collectives import Collectives
from profiles.errors import InfeasibleError
from profiles.roofline import RooflineCosts
from tests.planner.plans import SPEC, make_test_cluster, ppo, random_problem


def model_of(problem: Problem) -> CostModel:
    cluster = problem.cluster
    return CostModel(cluster, RooflineCosts(cluster.device), Collectives(cluster))


def space_of(problem: Problem) -> OptionSpace:
    return OptionSpace(problem, StepPrices(problem, model_of(problem)))


def random_assignment(rng: random.Random, space: OptionSpace) -> Assignment:
    """Any option for each call; now and then one call copies the mesh of another."""
    chosen = []
    for call in space.calls:
        mesh = rng.choice(space.meshes[call.name])
        if chosen and rng.random() < 0.5 and chosen[-1].mesh in space.meshes[call.name]:
            mesh = chosen[-1].mesh
        choice = rng.choice(space.choices[call.name][mesh.num_devices])
        chosen.append(space.option(call.name, mesh, choice))
    return tuple(chosen)


@pytest.mark.parametrize("seed", range(12))
def test_the_evaluator_agrees_with_the_simulator_and_the_memory_model(seed: int) -> None:
    """On random plans: step_s to 1e-9, the fullest device to the byte, no floor above it."""
    rng = random.Random(seed)
    problem = random_problem(rng)
    space = space_of(problem)
    evaluator = Evaluator(space)
    for _ in range(12):
        assignment = random_assignment(rng, space)
        plan = evaluator.plan(assignment)
        timeline = run_program(plan, compile_plan(plan), space.prices)
        score = evaluator.score(assignment)
        assert score.step_s == pytest.approx(timeline.step_s, rel=1e-9)
        assert evaluator.floor_s(assignment) <= score.step_s * (1 + 1e-9)
        fullest = max(need.total for need in plan_memory(plan).values())
        had = problem.cluster.device.memory_bytes
        assert score.overshoot == pytest.approx(max(0.0, fullest / had - 1.0), rel=1e-12)


def test_overshoot_is_that_of_the_memory_model() -> None:
    """Options fit alone; together they may not, by as much as the memory model says."""
    rng = random.Random(5)
    roomy = ppo(make_test_cluster(1, 4), ["batch_size=24"])
    fullest = sorted(fullest_bytes(space_of(roomy), rng) for _ in range(41))
    had = fullest[10]
    space = space_of(ppo(make_test_cluster(1, 4, memory_bytes=had), ["batch_size=24"]))
    evaluator, seen = Evaluator(space), 0
    for _ in range(60):
        assignment = random_assignment(rng, space)
        need = max(n.total for n in plan_memory(evaluator.plan(assignment)).values())
        overshoot = evaluator.overshoot(assignment)
        assert overshoot == pytest.approx(max(0.0, need / had - 1.0), abs=1e-12)
        seen += overshoot > 0
    assert 0 < seen < 60


def tiny_problem(rng: random.Random) -> Problem:
    """Few enough plans to try them all; memory for some of them only."""
    spec = replace(SPEC, num_layers=rng.choice([2, 3]), ffn=rng.choice([32, 128]))
    reserve = RESERVE_BYTES["cpu"]
    cluster = make_test_cluster(
        1, 2, memory_bytes=reserve + rng.choice([500, 800, 1200, 4000]) * 1024
    )
    overrides = [f"batch_size={rng.choice([2, 3])}", "ppo.num_mini_batches=1"]
    return ppo(cluster, [*overrides, f"reward.source={rng.choice(['model', 'vader'])}"], spec)


@pytest.mark.parametrize("seed", range(12))
def test_the_walk_finds_the_optimum_and_the_bound_is_below_it(seed: int) -> None:
    """Brute force over every plan is the oracle; baselines are never better than the result."""
    rng = random.Random(seed)
    problem = tiny_problem(rng)
    try:
        best = search(problem, model_of(problem), engine="brute", time_limit_s=600)
    except InfeasibleError:
        with pytest.raises(InfeasibleError, match=r"GiB|MiB|KiB"):
            search(problem, model_of(problem), seed=seed, max_evaluations=2000)
        return
    found = search(problem, model_of(problem), seed=seed, gap=0.0, max_evaluations=8000)
    assert best.plan.estimate is not None
    assert found.plan.estimate is not None
    assert found.plan.estimate.step_s == pytest.approx(best.plan.estimate.step_s, rel=1e-9)
    assert found.lower_bound_s <= best.plan.estimate.step_s * (1 + 1e-9)
    assert found.gap == pytest.approx(1 - found.lower_bound_s / found.plan.estimate.step_s)
    assert all(s >= found.plan.estimate.step_s * (1 - 1e-9) for s in found.baselines.values())


def fullest_bytes(space: OptionSpace, rng: random.Random) -> int:
    plan = Evaluator(space).plan(random_assignment(rng, space))
    return max(need.total for need in plan_memory(plan).values())
