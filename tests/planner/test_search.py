"""Protects the search: its quick numbers are the simulator's and the memory model's, its bound is
below every plan, it finds the optimum where brute force can, and a seed fixes its answer.
"""

from __future__ import annotations

import random

import pytest

from planner.cost import CostModel
from planner.memory import plan_memory
from planner.plan import Problem
from planner.program import compile_plan
from planner.search.evaluate import Evaluator
from planner.search.options import Assignment, OptionSpace
from planner.simulate import StepPrices, run_program
from profiles.collectives import Collectives
from profiles.roofline import RooflineCosts
from tests.planner.plans import make_test_cluster, ppo, random_problem


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


def fullest_bytes(space: OptionSpace, rng: random.Random) -> int:
    plan = Evaluator(space).plan(random_assignment(rng, space))
    return max(need.total for need in plan_memory(plan).values())
