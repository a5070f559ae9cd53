"""Protects the proofs: bounds are below every plan, and ``exact`` finds what brute force finds.

The oracle is ``brute``: every assignment of the space, scored by the evaluator.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import lru_cache

import pytest

from planner.memory import RESERVE_BYTES
from planner.plan import Problem
from planner.search import search
from planner.search.bounds import Proof, lower_bound_s
from planner.search.descent import fastest
from planner.search.evaluate import Evaluator, Score
from planner.search.options import Assignment, OptionSpace
from planner.search.relaxation import Relaxation
from planner.simulate import StepPrices
from profiles.errors import InfeasibleError
from tests.planner.plans import SPEC, make_test_cluster, ppo
from tests.planner.test_search import model_of, space_of


def small_problem(rng: random.Random) -> Problem:
    """PPO on two devices: of one node or two, roomy or tight, with fast or very slow links."""
    spec = replace(SPEC, num_layers=rng.choice([2, 3]), ffn=rng.choice([32, 128]))
    memory_bytes = RESERVE_BYTES["cpu"] + rng.choice([400, 500, 800, 1200, 4000]) * 1024
    cluster = make_test_cluster(*rng.choice([(1, 2), (2, 1)]), memory_bytes=memory_bytes)
    if rng.random() < 0.5:  # moving weights costs as much as a call
        slow = replace(cluster.intra_link, bytes_per_s=rng.choice([1e6, 1e7]))
        cluster = replace(cluster, intra_link=slow, inter_link=slow)
    overrides = [f"batch_size={rng.choice([1, 2])}", "ppo.num_mini_batches=1"]
    return ppo(cluster, [*overrides, f"reward.source={rng.choice(['model', 'vader'])}"], spec)


@lru_cache(maxsize=64)
def instance(seed: int) -> tuple[Problem, float]:
    """A problem and its optimum by brute force; inf where nothing fits."""
    problem = small_problem(random.Random(seed))
    try:
        best = search(problem, model_of(problem), engine="brute", time_limit_s=600, gap=0.0)
    except InfeasibleError:
        return problem, math.inf
    assert best.plan.estimate is not None
    return problem, best.plan.estimate.step_s


def proof_of(evaluator: Evaluator) -> tuple[Proof, float]:
    """The proof without any plan to start from, and the best that it met."""
    seen = [math.inf]

    def visit(assignment: Assignment) -> Score:
        score = evaluator.score(assignment)
        if score.overshoot == 0:
            seen.append(score.step_s)
        return score

    proof = Proof(Relaxation(evaluator), best_s=lambda: min(seen), visit=visit)
    return proof.run(lambda _: False), min(seen)


@pytest.mark.parametrize("seed", range(36))
def test_exact_proves_the_optimum_of_brute_force(seed: int) -> None:
    """From nothing: same optimum, closed; and the quick bound is not above it."""
    problem, optimum_s = instance(seed)
    try:
        space = space_of(problem)
    except InfeasibleError:
        assert optimum_s == math.inf
        return
    evaluator = Evaluator(space)
    proof, best_s = proof_of(evaluator)
    assert proof.closed
    assert best_s == pytest.approx(optimum_s, rel=1e-9)
    assert proof.lower_bound_s == best_s
    assert lower_bound_s(evaluator) <= optimum_s * (1 + 1e-9)


def test_the_instances_are_of_every_kind() -> None:
    """Some fit nowhere, most do; of those some move weights and some are tight."""
    found = [instance(seed)[1] for seed in range(36)]
    assert 0 < sum(math.isinf(seconds) for seconds in found) < 12


@pytest.mark.parametrize("seed", range(4))
def test_a_box_bounds_its_assignments(seed: int) -> None:
    """Halving towards a random assignment the bound never exceeds its seconds, nor falls."""
    rng = random.Random(seed)
    problem = ppo(make_test_cluster(2, 2), ["batch_size=8"])
    space = OptionSpace(problem, StepPrices(problem, model_of(problem)))
    evaluator = Evaluator(space)
    relaxation = Relaxation(evaluator)
    for _ in range(20):
        box = relaxation.pools.root()
        last_s = relaxation.bound_s(box)
        while relaxation.pools.assignment(box) is None:
            i = rng.choice(
                [i for i, pool in enumerate(box) if not relaxation.pools.is_single(pool)]
            )
            half = relaxation.pools.split(box[i])[rng.randrange(2)]
            box = (*box[:i], half, *box[i + 1 :])
            bound_s = relaxation.bound_s(box, price=True)
            assert bound_s >= last_s * (1 - 1e-9)
            last_s = bound_s
        assignment = relaxation.pools.assignment(box)
        assert assignment is not None
        score = evaluator.score(assignment)
        assert last_s <= score.step_s * (1 + 1e-9) or score.overshoot > 0


@pytest.mark.parametrize(("seed", "slack"), [(0, 1.0), (1, 1.5), (2, 10.0), (3, 10.0)])
def test_dives_lead_to_assignments_that_the_proof_has_not_cut_off(
    seed: int, slack: float
) -> None:  # fmt: skip
    """Each of the space and not below the bound; the same again from the same seed."""
    evaluator = Evaluator(space_of(ppo(make_test_cluster(2, 2), ["batch_size=8"])))
    best_s = evaluator.score(fastest(evaluator)).step_s * slack
    proof = Proof(Relaxation(evaluator), best_s=lambda: best_s, visit=None)
    proof.run(lambda proof: proof.boxes >= 20)
    open_boxes = len(proof.heap)
    found = list(proof.dives(random.Random(seed), 8, most=200))
    assert found == list(proof.dives(random.Random(seed), 8, most=200))
    assert len(found) <= min(8, open_boxes)
    assert len(proof.heap) == open_boxes
    for assignment in found:
        assert evaluator.space.allows(assignment)
        score = evaluator.score(assignment)
        assert score.step_s >= proof.lower_bound_s * (1 - 1e-9) or score.overshoot > 0
    assert found or slack < 10.0
    assert list(proof.dives(random.Random(seed), 8, most=1)) == []


def test_the_engine_stops_at_the_gap_and_repeats_itself() -> None:
    problem = ppo(make_test_cluster(1, 4), ["batch_size=8"])
    runs = [
        search(problem, model_of(problem), engine="exact", gap=0.01, max_evaluations=3000,
               time_limit_s=600)
        for _ in range(2)
    ]  # fmt: skip
    assert runs[0].gap <= 0.01
    assert runs[0].plan.allocations == runs[1].plan.allocations
    assert runs[0].lower_bound_s == runs[1].lower_bound_s
